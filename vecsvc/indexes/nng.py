"""Kind `nng`: a neighbourhood graph over 4-bit codes, read side. The fastest here, and what `auto` picks.

A search ranks a few hundred pivots, walks the graph from the nearest of them towards the query by the upper halves of
8-bit codes, orders what it found by both halves, and compares the head of that with the vectors themselves. Where
codes cannot tell neighbours apart, it walks by the vectors. How the graph is built is told in
index_builders/nng.py; the walk is in nng_kernels.py.
"""

from __future__ import annotations

import copy
import struct
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from vecsvc import machine_code
from vecsvc.config import option
from vecsvc.distance import check_vector
from vecsvc.errors import ArtifactDamaged, InvalidVector
from vecsvc.exact_search import row_norms
from vecsvc.indexes import nng_layout as at
from vecsvc.indexes.addresses import Block
from vecsvc.indexes.base import check_arguments, check_rows, empty
from vecsvc.storage import open_array, release_pages, write_array
from vecsvc.types import IndexSpec, Limit, Mask, Metric, Neighbors, StoredVectors, Vectors

GRAPH: Final = "nng_graph.npy"  # (size, degree) int32: the places of the neighbours, -1 after the last
HIGH: Final = "nng_high.npy"  # (size, bytes) uint8: upper halves of the 8-bit codes, two a byte
LOW: Final = "nng_low.npy"  # (size, bytes) uint8: lower halves
SCALE: Final = "nng_scale.npy"  # (3, dim) float32: mean, value of code 0, step from code to code
ORDER: Final = "nng_order.npy"  # (size,) int32: the label of each place; neighbours lie near each other
PIVOTS: Final = "nng_pivots.npy"  # (pivots,) int32: places that walks start from
BIAS: Final = "nng_bias.npy"  # (size,) float32, l2 only: the squared distance from the mean, by place
VECTORS: Final = "nng_vectors.npy"  # (size, dim) float16, rerank float16 only: by place; unit vectors for cosine

CHUNK_VALUES: Final = 128  # values whose halves fill a cache line
CHUNK_BYTES: Final = 64
MAX_PIVOTS: Final = 65_536

COMPARE_UP_TO: Final = 2000  # so few are compared exactly: no slower than by codes first, and nothing is missed
# A walk widened for a filter costs so much for each place of its pool as comparing this many of the allowed by codes.
# Measured with ef_search 32 to 128: they cross at 25 to 35 at 79,890 x 384, at 30 to 60 at 200,000 x 128.
SCAN_A_PLACE: Final = 32
# What the slowest machine in mind compares, to turn a deadline into a bound.
VISITS_A_SECOND: Final = 5_000_000
VALUES_A_SECOND: Final = 1_000_000_000
ROWS: Final = 8192  # rows whose norms are taken at a time
SPREAD_ROWS: Final = 1000  # rows that say how far codes lie apart
UNIT_TOLERANCE: Final = 1e-6  # norms this close to 1 are 1: float32 products are no better
BLOCK: Final = 64  # queries that a thread takes at a time; with a deadline that is near, each by itself
AMPLE: Final = 100  # comparisons for each place of the pool, which no walk needs

SPARE: Final = 6  # candidates beyond k that are compared exactly, at least
DEEPEN: Final = 8  # of so many places of the pool one is compared exactly
NO_LIMIT: Final = 1 << 60
FEW: Final = 1e-3  # share of vectors that may lie so far from the mean that a walk does not see how far
FAR_AWAY: Final = 4.0  # times the squared distance within which the others are

_CALL: Final = struct.Struct(f"{at.CALL_SLOTS}q")
# Made once: NumPy takes half the time to recognise them.
_I64, _F32, _BOOL, _U8 = np.dtype(np.int64), np.dtype(np.float32), np.dtype(np.bool_), np.dtype(np.uint8)

# The kernel that searches, by what the walk compares.
SEARCHES: Final = {"codes": "nng_search", "vectors": "nng_search_vectors"}

METRICS: Final[dict[Metric, int]] = {"l2": at.L2, "ip": at.IP, "cosine": at.COSINE}


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchParams:
    ef_search: int = option(
        64, "breadth of the search: more gives better recall, slower; never less than k", low=1, high=10_000
    )


def code_bytes(dim: int) -> int:
    """Bytes of one half of a vector's codes: whole cache lines."""
    return -(-dim // CHUNK_VALUES) * CHUNK_BYTES


def load(directory: Path, spec: IndexSpec, *, vectors: StoredVectors, mmap: bool, device: str) -> NngIndex:
    """Open what `NngIndex.save` wrote. Raises ArtifactDamaged where it would lead a walk astray."""
    check_rows(spec, vectors)
    size, width, degree = spec.size, code_bytes(spec.dim), spec.params.get("degree")
    if not isinstance(degree, int) or not 1 <= degree <= at.MAX_DEGREE:
        raise ArtifactDamaged(f"{directory / GRAPH}: built with degree {degree}, expected 1 to {at.MAX_DEGREE}")
    walk, rerank = spec.params.get("walk", "codes"), spec.params.get("rerank")
    if not isinstance(walk, str) or walk not in SEARCHES or (walk == "vectors" and rerank == "none"):
        raise ArtifactDamaged(f"{directory / GRAPH}: walked by {walk!r} with rerank {rerank!r}, which cannot be")

    def array(name: str, dtype: Any, *shape: int | None) -> NDArray[Any]:
        return open_array(directory / name, dtype, shape, mmap=True)

    parts = NngParts(
        graph=array(GRAPH, np.int32, size, degree),
        high=array(HIGH, np.uint8, size, width),
        low=array(LOW, np.uint8, size, width),
        scale=array(SCALE, np.float32, 3, spec.dim),
        order=array(ORDER, np.int32, size),
        pivots=array(PIVOTS, np.int32, None),
        bias=array(BIAS, np.float32, size) if spec.metric == "l2" else None,
        vectors=array(VECTORS, np.float16, size, spec.dim) if spec.params.get("rerank") == "float16" else None,
    )
    _check(directory, parts, spec)
    return NngIndex(spec, parts, vectors, mmap=mmap)


@dataclass(frozen=True, slots=True)
class NngParts:
    """The arrays of an index, as the files have them."""

    graph: NDArray[np.int32]
    high: NDArray[np.uint8]
    low: NDArray[np.uint8]
    scale: NDArray[np.float32]
    order: NDArray[np.int32]
    pivots: NDArray[np.int32]
    bias: NDArray[np.float32] | None
    vectors: NDArray[np.float16] | None


class NngIndex:
    def __init__(self, spec: IndexSpec, parts: NngParts, vectors: StoredVectors, *, mmap: bool) -> None:
        """`mmap` leaves the arrays where they are; otherwise they are copied into memory that has huge pages."""
        self.spec = spec
        self.parts = parts
        self.compares_the_allowed = spec.params["rerank"] == "vectors"  # in a fifth of the time of exact search
        self._search = machine_code.load("vecsvc.indexes.nng_kernels", SEARCHES[spec.params.get("walk", "codes")], 1)
        keep = (lambda a: a) if mmap else aligned
        places = np.empty(spec.size, dtype=np.int32)
        places[parts.order] = np.arange(spec.size, dtype=np.int32)
        bias, most = bounded(parts.bias)
        rows, half, by_place, norms = self._rerank_rows(vectors)
        self._block = Block(
            at.INDEX_SLOTS,
            {
                at.SIZE: spec.size,
                at.DIM: spec.dim,
                at.DEGREE: parts.graph.shape[1],
                at.CHUNKS: parts.high.shape[1] // CHUNK_BYTES,
                at.METRIC: METRICS[spec.metric],
                at.N_PIVOTS: len(parts.pivots),
                at.VECTORS_HALF: int(half),
                at.VECTORS_BY_PLACE: int(by_place),
            },
            {
                at.GRAPH: keep(parts.graph),
                at.HIGH: keep(parts.high),
                at.LOW: keep(parts.low),
                at.SCALE: parts.scale,
                at.ORDER: parts.order,
                at.PLACES: places,
                at.PIVOTS: parts.pivots,
                at.PIVOT_CODES: aligned(parts.high[parts.pivots]),
                at.BIAS: bias,
                at.BIAS_MOST: np.array([most], np.float32),
                at.VECTORS: rows,
                at.INVERSE_NORMS: norms,
                at.SPREAD: np.array([_spread(parts.high, spec.dim)], np.float32),
            },
        )
        self._idle: deque[Workspace] = deque()

    def _rerank_rows(
        self, vectors: StoredVectors
    ) -> tuple[NDArray[Any] | None, bool, bool, NDArray[np.float32] | None]:
        """(rows, whether float16, whether by place, inverse norms by label) for the exact comparison."""
        if self.spec.params.get("rerank") == "none":
            return None, False, False, None
        if self.parts.vectors is not None:
            by_place = inverse_norms(self.parts.vectors) if self.spec.metric == "cosine" else None
            norms = None
            if by_place is not None:  # float16 moves a length by as much as near ones lie apart
                norms = np.empty_like(by_place)
                norms[self.parts.order] = by_place
            return self.parts.vectors, True, True, norms
        norms = None
        if self.spec.metric == "cosine":
            norms = inverse_norms(vectors)
        return vectors, vectors.dtype == np.float16, False, norms

    def search(
        self,
        queries: Vectors,
        k: int,
        params: SearchParams | None = None,
        *,
        allowed: Mask | None = None,
        limit: Limit | None = None,
        num_threads: int = 1,
    ) -> Neighbors:
        """As `base.Index.search` says. A filter is honoured by the walk, or by comparing all that it allows."""
        settings: SearchParams = check_arguments(self.spec, queries, k, params, SearchParams, allowed)
        n, size = len(queries), self.spec.size
        ef = min(max(settings.ef_search, k), size)
        # Codes alone cannot tell the nearest apart, least of all in few dimensions: a broader search compares more.
        depth = k + max(SPARE, k // 2, ef // DEEPEN)
        pool, enough, count = max(ef, depth), 0, 0
        if allowed is not None:
            count = int(np.count_nonzero(allowed))
            if count == 0:
                nothing = empty(n, k)
                return msgspec.structs.replace(nothing, hops=nothing.visited)
            allowed = np.ascontiguousarray(allowed)
            enough = min(count, max(k, ef // 2))
            wide = min(-(-ef * size // count), size)
            ef = -1 if count <= COMPARE_UP_TO else 0 if count <= SCAN_A_PLACE * wide else wide
            pool = count if ef < 0 else max(ef, 9 * depth)  # two heaps: see nearest_allowed
        queries = np.ascontiguousarray(queries)
        answer = Neighbors(
            np.empty((n, k), _I64), np.empty((n, k), _F32), np.empty(n, _I64), np.empty(n, _BOOL), np.empty(n, _I64),
            None if allowed is None else np.zeros(n, _U8),
        )  # fmt: skip
        step = BLOCK
        if n > 1 and limit is not None and limit.deadline is not None:
            step = min(BLOCK, -(-n // num_threads))
            if _visits(limit, self.spec.dim, step) < AMPLE * pool:
                step = 1  # what is left is little: it is looked at before each query
        if n <= step:
            self._answer(queries, 0, n, k, ef, depth, enough, pool, allowed, count, limit, answer)
            return answer
        starts = iter(range(0, n, step))

        def work() -> None:
            for start in starts:  # threads share the iterator: each step of it is one of the interpreter's
                end = min(start + step, n)
                self._answer(queries, start, end, k, ef, depth, enough, pool, allowed, count, limit, answer)

        workers = min(num_threads, -(-n // step))
        if workers == 1:
            work()
        else:
            with ThreadPoolExecutor(workers) as threads:
                for done in [threads.submit(work) for _ in range(workers)]:
                    done.result()
        return answer

    def _answer(
        self,
        queries: Vectors,
        first: int,
        end: int,
        k: int,
        ef: int,
        depth: int,
        enough: int,
        pool: int,
        allowed: Mask | None,
        count: int,
        limit: Limit | None,
        answer: Neighbors,
    ) -> None:
        """Answer queries[first:end] in this thread; nng_layout says what the numbers mean."""
        try:
            work = self._idle.pop()
        except IndexError:
            work = Workspace(self._block)
        if pool > work.room:
            work.make_room(pool)
        visits = NO_LIMIT if limit is None else _visits(limit, self.spec.dim, end - first)
        mask = 0 if allowed is None else id(allowed)
        checked = -1
        while True:
            _CALL.pack_into(
                work.call, 0, self._block.address, work.address, id(queries), first, end, checked, k, ef, enough, depth,
                mask, visits, id(answer.labels), id(answer.distances), id(answer.visited), id(answer.stopped),
                id(answer.hops), 0 if answer.ways is None else id(answer.ways), count,
            )  # fmt: skip
            first = self._search(work.call_address)
            if first == end:
                break
            # The kernel found no quick proof that this query's values are allowed; it is not in use while we look.
            try:
                check_vector(queries[first], self.spec.metric, f"queries[{first}]")
            except InvalidVector:
                self._idle.append(work)
                raise
            checked = first
        self._idle.append(work)

    def walked_by(self, walk: str) -> NngIndex:
        """The same index, whose graph is walked by `codes` or by `vectors`."""
        other = copy.copy(self)
        other.spec = replace(self.spec, params={**self.spec.params, "walk": walk})
        other._search = machine_code.load("vecsvc.indexes.nng_kernels", SEARCHES[walk], 1)
        other._idle = deque()
        return other

    def save(self, directory: Path) -> None:
        for name, array in (
            (GRAPH, self.parts.graph),
            (HIGH, self.parts.high),
            (LOW, self.parts.low),
            (SCALE, self.parts.scale),
            (ORDER, self.parts.order),
            (PIVOTS, self.parts.pivots),
            (BIAS, self.parts.bias),
            (VECTORS, self.parts.vectors),
        ):
            if array is not None:
                write_array(directory / name, array)

    def close(self) -> None:
        """Nothing to close: memory goes with the last reference, so that searches in flight end undisturbed."""


def _visits(limit: Limit, dim: int, queries: int) -> int:
    """How many vectors may be compared for each of so many queries, one after the other."""
    visits = NO_LIMIT if limit.max_visited is None else limit.max_visited
    if limit.deadline is not None:
        rate = min(VISITS_A_SECOND, VALUES_A_SECOND // dim)
        visits = min(visits, int(max(0.0, limit.deadline - time.monotonic()) * rate) // queries)
    return visits


class Workspace:
    """Where one search at a time works: made once, and handed from search to search."""

    def __init__(self, index: Block) -> None:
        """For the index of that block."""
        dim, codes = int(index.values[at.DIM]), int(index.values[at.CHUNKS]) * CHUNK_VALUES
        arrays: dict[int, NDArray[Any]] = {
            at.FRESH: np.zeros(at.MAX_DEGREE + 4, np.int32),
            at.SEEN: np.zeros(int(index.values[at.SIZE]), np.uint8),
            at.QUERY: np.empty(dim, np.float32),
            at.CENTRED: np.empty(dim, np.float32),
            at.QUERY_CODE: np.empty(codes, np.int8),
            at.WEIGHTS: np.empty(codes, np.float32),
            at.RANKED: np.empty(at.SEEDS * at.ROUNDS + 1, np.int64),
            at.KEYS: np.empty(at.MAX_DEGREE + 4, np.int32),
            at.NEAR: np.empty(at.MAX_DEGREE + 1, np.int64),
        }
        self._block = Block(at.WORK_SLOTS, {}, arrays)
        self.room = 0
        self.address = self._block.address
        call = np.zeros(at.CALL_SLOTS, np.int64)
        self.call, self.call_address = call.data, int(call.ctypes.data)

    def make_room(self, places: int) -> None:
        """Let the pool hold so many places."""
        if places > self.room:
            self.room = 2 * places
            self._block.put(at.POOL, np.empty(self.room + 1, np.int64))


def inverse_norms(vectors: StoredVectors) -> NDArray[np.float32] | None:
    """1 / |x| of each row (size,), 0 for rows of zeros; None where all are unit vectors already."""
    norms = np.concatenate([row_norms(vectors[start : start + ROWS]) for start in range(0, len(vectors), ROWS)])
    release_pages(vectors)
    if np.all(np.abs(norms - 1.0) <= UNIT_TOLERANCE):
        return None
    inverse = np.divide(1.0, norms, out=np.zeros(len(norms)), where=norms > 0)
    # That of a length at the end of float32 is brought back into it.
    held: NDArray[np.float32] = np.minimum(inverse, float(np.finfo(np.float32).max)).astype(np.float32)
    return held


def _spread(high: NDArray[np.uint8], dim: int) -> float:
    """The standard deviation of a value's 8-bit codes, the mean over the values, by some rows of upper halves."""
    rows = np.asarray(high[:: max(1, len(high) // SPREAD_ROWS)])
    halves = np.concatenate([rows & 15, rows >> 4], axis=1)
    return float(16.0 * np.sqrt(halves.var(axis=0, dtype=np.float64).sum() / dim + 1.0 / 12.0))


def bounded(bias: NDArray[np.float32] | None) -> tuple[NDArray[np.float32] | None, float]:
    """The bias of l2 (size,) and its greatest value: what lies far beyond nearly all is brought nearer.

    A walk counts in 32 bits, of which one vector that went astray would leave none to the others.
    """
    if bias is None:
        return None, 0.0
    most = float(bias.max())
    usual = FAR_AWAY * float(np.quantile(bias, 1 - FEW))
    return (np.minimum(bias, np.float32(usual)), usual) if 0 < usual < most else (bias, most)


def aligned(array: NDArray[Any]) -> NDArray[Any]:
    """A copy that begins at a cache line, in memory that NumPy asks huge pages for where it is large."""
    room = np.empty(array.nbytes + CHUNK_BYTES, np.uint8)
    start = -room.ctypes.data % CHUNK_BYTES
    copy = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    np.copyto(copy, array)
    release_pages(array)
    return copy


def _check(directory: Path, parts: NngParts, spec: IndexSpec) -> None:
    """Whatever the walk follows stays inside the arrays."""
    for name, places in ((GRAPH, parts.graph), (PIVOTS, parts.pivots), (ORDER, parts.order)):
        least = -1 if name == GRAPH else 0
        if len(places) and not (least <= int(places.min()) and int(places.max()) < spec.size):
            raise ArtifactDamaged(f"{directory / name}: names places beyond 0 to {spec.size - 1}")
    if not 1 <= len(parts.pivots) <= MAX_PIVOTS:
        raise ArtifactDamaged(f"{directory / PIVOTS}: holds {len(parts.pivots)} pivots, expected 1 to {MAX_PIVOTS}")
    if not np.array_equal(np.bincount(parts.order, minlength=spec.size), np.ones(spec.size)):
        raise ArtifactDamaged(f"{directory / ORDER}: is no permutation of 0 to {spec.size - 1}")
    for name, values in ((SCALE, parts.scale), (BIAS, parts.bias)):
        if values is not None and not np.isfinite(values).all():
            raise ArtifactDamaged(f"{directory / name}: holds values that are not finite")
