"""Builds kind `nng`: leaves of TP-trees give neighbour lists, the graph drawn from them is searched for better ones.

1. Vectors become int8 codes, by which everything here is compared, unless neighbours lie within what codes round off:
   then it is by the vectors. One TP-tree puts them into an order in which neighbours lie near each other; from then on
   they are places in that order.
2. In the leaves of several TP-trees every pair is compared; each place keeps a list of the nearest it met (Wang et
   al., Scalable k-NN graph construction for visual descriptors, CVPR 2012, section 3).
3. Occlusion pruning picks edges out of the lists, and each edge is offered to its other end too.
4. The graph is searched for the neighbours of every place, twice, the second time with the breadth asked for; the
   places that the search ends with are pruned to the edges of the next graph (Subramanya et al., DiskANN: Fast
   Accurate Billion-point Nearest Neighbor Search on a Single Node, NeurIPS 2019, section 2).
5. What cannot be reached from the pivots becomes a pivot.
6. Searches for some of the vectors show whether the graph has to be walked by vectors, too.

Every phase reads one graph and writes another, so that the result does not depend on the number of threads.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Final, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from index_builders import nng_layout as here
from index_builders.base import Progress
from index_builders.progress import part
from index_builders.tp_tree import partition
from vecsvc import machine_code
from vecsvc.blocks import checked_blocks
from vecsvc.config import option
from vecsvc.distance import unit
from vecsvc.errors import BackendMissing, InvalidParameter
from vecsvc.indexes import nng_layout as at
from vecsvc.indexes.addresses import Block
from vecsvc.indexes.base import params_dict
from vecsvc.indexes.nng import (
    CHUNK_BYTES,
    CHUNK_VALUES,
    FEW,
    MAX_PIVOTS,
    NngIndex,
    NngParts,
    SearchParams,
    Workspace,
    aligned,
    bounded,
    code_bytes,
)
from vecsvc.storage import release_pages
from vecsvc.types import IndexSpec, Labels, Metric, StoredVectors, Vectors

EF_SEARCH: Final = (10, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512)

OUTSIDE: Final = 0.0007  # share of values beyond each end of the 8-bit codes: 3.2 standard deviations, if normal
NORMAL_REACH: Final = 3.2
MAX_REACH: Final = 32.0  # standard deviations that the codes span to each side at most, for ip
FAR_BEYOND: Final = 2.0  # times the squared length that those are given: longer vectors are pivots
EQUAL_UP_TO: Final = 0.95  # share of vectors that one more dimension makes equally long, for ip
SAMPLE: Final = 20_000  # rows that say how large values get
SAMPLED_VALUES: Final = 1_000_000  # of theirs, for what is asked of all dimensions together
CLIPPED: Final = 1e-3  # share of values beyond what the int8 codes' ends are measured by
ORDER_LEAF: Final = 64  # vectors of a leaf of the tree that orders them
LIST_WIDTH: Final = 32  # neighbours a list keeps
LINK_ROOM: Final = 256  # candidates considered where too many edges lead to a place
FIRST_EF: Final = 64  # breadth of the first search of the graph
BLOCK: Final = 1024  # places that a thread takes at a time
RELEASE_BLOCKS: Final = 64  # after so many the pages of a mapped corpus are let go
# Thirty thousand pivots instead of a hundred were measured to save a walk 4 % of what it compares, among a million
# vectors, and nothing among eighty thousand.
N_PIVOTS: Final = 128
FIRST_DEGREE: Final = 32  # edges in the graphs on the way
SLACK_PERCENT: Final = 110  # distances between neighbours count so much when edges are pruned

# Neighbours that lie nearer to each other than so many times what rounding to codes moves them are blurred.
BLURRED: Final = 10.0
BLURRED_RANK: Final = 10  # the neighbour that is looked at, ...
BLURRED_PLACES: Final = 1000  # ... of so many places
SAME_UNIT: Final = 1e-7  # values of unit vectors that differ by no more are the same

MISLED_ROWS: Final = 200  # vectors that are searched for, to see whether codes mislead a walk
MISLED_K: Final = 10
MISLED_EF: Final = 64
# Recall that a walk by codes may miss: a walk twice as broad finds so much, at half of what vectors cost.
MISLED: Final = 0.05

# What share of the time each phase takes, for progress; the last search takes the rest.
SHARE_LISTS: Final = 0.15
SHARE_FIRST: Final = 0.05
SHARE_FIRST_SEARCH: Final = 0.25
SHARE_BEFORE: Final = SHARE_LISTS + SHARE_FIRST + SHARE_FIRST_SEARCH

T = TypeVar("T")
Graph: TypeAlias = NDArray[np.int32]  # (size, degree) places, -1 after the last
Lists: TypeAlias = tuple[NDArray[np.int64], NDArray[np.int32]]  # (size, LIST_WIDTH) candidates, (size,) how many


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildParams:
    degree: int = option(
        64, "most edges of a vector: more gives better recall, at 4 bytes an edge and slower builds", low=4, high=256
    )
    ef_construction: int = option(
        256, "breadth of the search for edges: more gives a better graph, built slower", low=4, high=10_000
    )
    n_trees: int = option(8, "TP-trees for the first lists: more gives better lists, built slower", low=1, high=64)
    leaf_size: int = option(800, "vectors in a leaf, all pairs of which are compared: as n_trees", low=16, high=100_000)
    device: str = option(
        "cpu",
        "where the first lists come from: the leaves of TP-trees, or all pairs compared on a GPU by faiss",
        choices=("cpu", "cuda"),
    )
    rerank: str = option(
        "vectors",
        "what the best candidates are compared by: the corpus' vectors; a float16 copy that lies as the graph does, "
        "so that the others may leave memory; or none, and answers carry the distances of 8-bit codes",
        choices=("vectors", "float16", "none"),
    )
    walk: str = option(
        "auto",
        "what the graph is walked by: 4-bit codes, or what rerank names, which is right where neighbours lie so near "
        "each other that codes cannot tell them apart, and slower; auto finds out, and the manifest says what it took",
        choices=("auto", "codes", "vectors"),
    )

    def __post_init__(self) -> None:
        if self.walk == "vectors" and self.rerank == "none":
            raise InvalidParameter("walk 'vectors' needs vectors, but rerank is 'none'; choose vectors or float16")


def build(
    vectors: StoredVectors, *, metric: Metric, params: BuildParams, num_threads: int, seed: int, progress: Progress
) -> NngIndex:
    """The index over rows (n, dim). One seed gives the same index, whatever the number of threads.

    Raises InvalidVector, or BackendMissing where there is no GPU for `device` cuda.
    """
    size, dim = vectors.shape
    rng = np.random.default_rng(seed)
    neighbours = _gpu_neighbours(vectors, metric) if params.device == "cuda" and size > 1 else None
    work = _Work(size, num_threads, progress)
    part(progress, "codes")
    codes = _Codes(vectors, metric)
    part(progress, "order")
    order, _ = partition(codes.bytes, leaf_size=ORDER_LEAF, n_samples=1000, n_top_dims=5, rng=rng)
    codes.reorder(order)
    pivots = np.unique(np.append(np.linspace(0, size - 1, N_PIVOTS).astype(np.int32), codes.outliers(N_PIVOTS)))
    builder = _Builder(codes, params, pivots, work)

    def lists(share: float) -> Lists:
        if neighbours is not None:
            return builder.given(neighbours, order, share)
        return builder.lists(
            lambda: partition(codes.bytes, leaf_size=params.leaf_size, n_samples=1000, n_top_dims=5, rng=rng), share
        )

    known = lists(SHARE_LISTS)
    if codes.blur(known, vectors, order):
        codes.compare_rows(vectors, order)
        known = lists(0.0)
    graph = builder.first(known)
    first_ef = min(FIRST_EF, params.ef_construction)
    graph = builder.refined(graph, known, first_ef, FIRST_DEGREE, "first search", SHARE_FIRST_SEARCH)
    graph = builder.refined(graph, known, params.ef_construction, params.degree, "search", 1.0 - SHARE_BEFORE)
    parts = NngParts(
        graph=graph,
        high=codes.high,
        low=codes.low,
        scale=codes.scale,
        order=order,
        pivots=builder.reachable(graph),
        bias=codes.bias,
        vectors=_float16(vectors, order, metric) if params.rerank == "float16" else None,
    )
    walk = "codes" if params.walk == "auto" else params.walk
    made = params_dict(replace(params, walk=walk))
    spec = IndexSpec("nng", dim, metric, size, made, exact_distances=params.rerank == "vectors")
    index = NngIndex(spec, parts, vectors, mmap=True)
    if params.walk == "auto" and params.rerank != "none":
        return index.walked_by("vectors" if _misled(index, vectors, rng, num_threads) else "codes")
    return index


def _misled(index: NngIndex, vectors: StoredVectors, rng: np.random.Generator, num_threads: int) -> bool:
    """Whether walks by codes miss so much of what walks by vectors find that a broader walk is no remedy.

    Asked for by some of the rows themselves. What no walk would find is no fault of the codes.
    """
    size, copy = len(vectors), index.parts.vectors
    if size <= MISLED_K:
        return False  # all are answers
    if copy is not None and _held(copy) > FEW:
        return False  # a copy that had to be held within float16 knows less than codes
    drawn = np.sort(rng.choice(size, min(size, MISLED_ROWS), replace=False))
    rows = np.asarray(vectors[drawn], np.float32)
    rows = rows[np.any(rows != 0, axis=1)]  # cosine has no word for a query of zeros
    if len(rows) == 0:
        return False
    k = min(MISLED_K, size)

    def search(walked: NngIndex, breadth: int) -> NDArray[np.float32]:
        return walked.search(rows, k, SearchParams(ef_search=breadth), num_threads=num_threads).distances

    by_vectors = index.walked_by("vectors")
    wanted = search(by_vectors, 4 * MISLED_EF)[:, -1:]
    missed = 1.0 - float((search(index, MISLED_EF) <= wanted).mean())
    return missed > MISLED and missed - 1.0 + float((search(by_vectors, MISLED_EF) <= wanted).mean()) > MISLED


def _gpu_neighbours(vectors: StoredVectors, metric: Metric) -> Labels:
    """Labels (size, n) of each row's neighbours, by faiss on a GPU. Raises BackendMissing."""
    try:
        from index_builders import gpu_lists
    except ImportError as error:
        raise BackendMissing(f"device cuda needs {error.name}: pip install 'vecsvc[gpu]'; or choose cpu") from error
    return gpu_lists.gpu_neighbours(vectors, LIST_WIDTH, metric)[0]


def operating_points(spec: IndexSpec) -> list[dict[str, Any]]:
    """Breadths from hasty to thorough."""
    return [{"ef_search": breadth} for breadth in EF_SEARCH]


# ------------------------------------------------------------------------------------------------ codes


class _Codes:
    """What the vectors are while the graph is built: codes for comparing each other, and those of the index."""

    bytes: NDArray[np.int8]  # (size, lines * 64): what `between` compares
    high: NDArray[np.uint8]
    low: NDArray[np.uint8]
    bias: NDArray[np.float32] | None  # l2: the squared distance from the mean
    lengths: NDArray[np.float64] | None  # ip: squared
    augment: NDArray[np.float32] | None  # ip: the dimension that makes vectors equally long, 0 for the longest
    rows: NDArray[np.float32] | None  # (size, dim) by place, where codes blur: what `between` compares then

    def __init__(self, vectors: StoredVectors, metric: Metric) -> None:
        """Two passes over the rows (size, dim), in their order. Raises InvalidVector."""
        size, dim = vectors.shape
        self._metric = metric
        self.lengths = np.empty(size) if metric == "ip" else None
        self.augment = self.rows = None
        self._even = False
        self.scale, self._step = self._measure(vectors)
        if self.lengths is not None:
            # Were they measured by the longest of all, the others would be near each other and nowhere near it, and
            # no edge would lead to the longest, which are what most queries want.
            self._bound = float(np.quantile(self.lengths, EQUAL_UP_TO))
            missing = np.maximum(0.0, self._bound - self.lengths)
            self.augment = np.sqrt(missing).astype(np.float32)
            self._even = bool(missing.max() <= BLURRED * dim / 6 * self._step**2)
        self.bytes = np.zeros((size, -(-dim // CHUNK_BYTES) * CHUNK_BYTES), np.int8)
        self.high = np.empty((size, code_bytes(dim)), np.uint8)
        self.low = np.empty((size, code_bytes(dim)), np.uint8)
        self.bias = np.empty(size, np.float32) if metric == "l2" else None
        mean, zero, step = self.scale
        inverse = np.divide(1.0, step, out=np.zeros_like(step), where=step > 1e-38)
        for start, rows in checked_blocks(vectors):
            part = slice(start, start + len(rows))
            rows = self._as_compared(rows)
            centred = rows - mean
            np.clip(np.rint(centred / self._step), -127, 127, out=centred)
            self.bytes[part, :dim] = centred
            self.high[part], self.low[part] = halves((rows - zero) * inverse)
            if self.bias is not None:
                centred = rows - mean
                self.bias[part] = np.einsum("ij,ij->i", centred, centred)

    def _as_compared(self, rows: Vectors) -> Vectors:
        return unit(rows) if self._metric == "cosine" else rows

    def _measure(self, vectors: StoredVectors) -> tuple[NDArray[np.float32], float]:
        """(mean, code 0 and step of the index' codes (3, dim); step of the int8 codes)."""
        sample: list[NDArray[np.float32]] = []
        for start, rows in checked_blocks(vectors):
            rows = self._as_compared(rows)
            if self.lengths is not None:
                self.lengths[start : start + len(rows)] = np.einsum("ij,ij->i", rows, rows, dtype=np.float64)
            sample.append(rows[:: -(-len(vectors) // SAMPLE)].copy())  # a view would keep all rows in memory
        drawn = np.concatenate(sample)
        columns = np.ascontiguousarray(drawn.T)  # of which each is sorted in part, in half the time
        least, greatest = drawn.min(axis=0), drawn.max(axis=0)
        # Quantiles, because a few rows that went astray move means and deviations as far as they like.
        ends = np.quantile(columns, (OUTSIDE, 1 - OUTSIDE), axis=1).astype(np.float32)
        low, high = np.where(ends[0] < ends[1], ends, np.stack([least, greatest]))
        mean = np.clip(drawn, low, high).mean(axis=0, dtype=np.float64).astype(np.float32)
        if self._metric == "ip":
            # The greatest products are those of the longest vectors: what is cut off of these is missing in answers.
            # Those far beyond all others are left to the pivots.
            squares = np.einsum("ij,ij->i", drawn, drawn, dtype=np.float64)
            usual = drawn[squares <= FAR_BEYOND * np.quantile(squares, EQUAL_UP_TO)]
            least, greatest = usual.min(axis=0), usual.max(axis=0)
            reach = (high - low) * (MAX_REACH / (2 * NORMAL_REACH))
            low = np.minimum(low, np.maximum(least, mean - reach))
            high = np.maximum(high, np.minimum(greatest, mean + reach))
        scale = np.stack([mean, low, (high - low) / 255])
        far = np.abs(drawn - mean)
        step = 1.2 * float(np.quantile(far[:: max(1, far.size // SAMPLED_VALUES)], 1 - CLIPPED)) / 127
        return scale, step or 1.0

    def blur(self, known: Lists, vectors: StoredVectors, order: NDArray[np.int32]) -> bool:
        """Whether half of all places have neighbours so near that rounding to codes has a say in which are nearest.

        Rounding moves a value by a variance of 1/12 of a step, so two vectors by dim / 6. Places whose neighbours are
        duplicates do not count: those are no less the same as codes.
        """
        lists, filled = known
        places = np.flatnonzero(filled >= BLURRED_RANK)
        places = places[:: max(1, len(places) // BLURRED_PLACES)]
        entries = lists[places, BLURRED_RANK - 1]
        folded = entries & 0xFFFFFFFF
        others = places + ((folded >> 1) ^ -(folded & 1))  # as nng_kernels.other_of
        apart = self._as_compared(np.asarray(vectors[order[places]], np.float32))
        apart = apart - self._as_compared(np.asarray(vectors[order[others]], np.float32))
        # Of unit vectors the last digits are of their lengths.
        different = np.abs(apart).max(axis=1) > (SAME_UNIT if self._metric == "cosine" else 0.0)
        if not different.any():
            return False
        return bool(np.median(entries[different] >> 32) < BLURRED * self.scale.shape[1] / 6)

    def compare_rows(self, vectors: StoredVectors, order: NDArray[np.int32]) -> None:
        """From now on compare the vectors themselves: a copy of them, by place, is kept until the graph is built."""
        self.rows = np.empty(vectors.shape, np.float32)
        for block, rows in _by_place(vectors, order):
            self.rows[block] = self._as_compared(rows)
        self.block.put(here.ROWS, self.rows)
        if self.augment is not None:
            self.block.put(here.AUGMENT, self.augment)
        self.block.values[here.WIDTH] = self.scale.shape[1]

    def reorder(self, order: NDArray[np.int32]) -> None:
        """From labels to places, and from arrays to what the kernels read."""
        self.bytes, self.high, self.low = (aligned(a[order]) for a in (self.bytes, self.high, self.low))
        self.bias = None if self.bias is None else self.bias[order]
        self.augment = None if self.augment is None else self.augment[order]
        self.lengths = None if self.lengths is None else self.lengths[order]
        lengths = np.empty(len(order), np.int32)
        shifts = np.empty(len(order), np.int32)
        for start in range(0, len(order), BLOCK):
            rows = self.bytes[start : start + BLOCK].astype(np.int32)
            lengths[start : start + BLOCK] = np.einsum("ij,ij->i", rows, rows)
            shifts[start : start + BLOCK] = 128 * rows.sum(axis=1)
        self.block = Block(
            here.CODE_SLOTS,
            {here.LINES: self.bytes.shape[1] // CHUNK_BYTES},
            {
                here.BYTES: self.bytes,
                here.SQUARES: lengths,
                here.SHIFTS: shifts,
                here.AUGMENT: self.extra,
                here.STEP: np.array([self._step], np.float32),
            },
        )

    @property
    def extra(self) -> NDArray[np.float32] | None:
        """`augment`, but where vectors are as equally long as codes can tell: it costs a sixth of a build."""
        return None if self._even and self.rows is None else self.augment

    def outliers(self, count: int) -> NDArray[np.int32]:
        """Up to `count` places of vectors so far out that walks from anywhere else would seldom come by.

        Those are far from the mean for l2, and long for ip; cosine has none.
        """
        if self.lengths is not None:
            out, usual = self.lengths, FAR_BEYOND * self._bound
        elif self.bias is not None:
            out, usual = self.bias.astype(np.float64), bounded(self.bias)[1]
        else:
            return np.empty(0, np.int32)
        order = np.argsort(-out, kind="stable")[:count]
        return order[out[order] > usual].astype(np.int32)


def halves(values: NDArray[Any]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Values (n, dim) in units of codes -> upper and lower halves of their codes, as kernels.py lays them out."""
    n, dim = values.shape
    chunks = code_bytes(dim) // CHUNK_BYTES
    codes = np.zeros((n, chunks * CHUNK_VALUES), np.uint8)
    codes[:, :dim] = np.clip(np.rint(values), 0, 255)
    lines = codes.reshape(n, chunks, 2, CHUNK_BYTES)
    high, low = lines >> np.uint8(4), lines & np.uint8(15)
    return _packed(high), _packed(low)


def _packed(lines: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(n, chunks, 2, 64) values below 16 -> (n, chunks * 64) bytes of two."""
    packed: NDArray[np.uint8] = lines[:, :, 0] | lines[:, :, 1] << np.uint8(4)
    return packed.reshape(len(lines), -1)


def _float16(vectors: StoredVectors, order: NDArray[np.int32], metric: Metric) -> NDArray[np.float16]:
    """The vectors as the graph lies; values beyond float16 are held at its ends."""
    copy = np.empty(vectors.shape, np.float16)
    ends = float(np.finfo(np.float16).max)
    for block, rows in _by_place(vectors, order):
        copy[block] = np.clip(unit(rows) if metric == "cosine" else rows, -ends, ends)
    return copy


def _held(copy: NDArray[np.float16]) -> float:
    """The share of rows, some of them looked at, with a value at the ends of float16."""
    rows = copy[:: max(1, len(copy) // SAMPLE)]
    return float((np.abs(rows.astype(np.float32)).max(axis=1) >= np.finfo(np.float16).max).mean())


def _by_place(vectors: StoredVectors, order: NDArray[np.int32]) -> Iterator[tuple[slice, Vectors]]:
    """The rows in the order of places, in blocks; of mapped ones, pages are let go on the way."""
    for start in range(0, len(order), BLOCK):
        yield slice(start, start + BLOCK), np.asarray(vectors[order[start : start + BLOCK]], np.float32)
        if start // BLOCK % RELEASE_BLOCKS == RELEASE_BLOCKS - 1:
            release_pages(vectors)
    release_pages(vectors)


# ------------------------------------------------------------------------------------------------ graph


class _Work:
    """Threads that take blocks of places, and the share of the whole that they tell progress."""

    def __init__(self, size: int, num_threads: int, progress: Progress) -> None:
        self.size, self.num_threads = size, num_threads
        self._progress, self._told, self._done = progress, 0, 0.0

    def each(self, tasks: list[T], run: Callable[[T], object], name: str, share: float) -> None:
        """Run every task, `num_threads` at a time; together they are `share` of the whole."""
        part(self._progress, name)
        with ThreadPoolExecutor(self.num_threads) as threads:
            for _ in threads.map(run, tasks):
                self._done += share / len(tasks)
                rows = min(self.size, int(self._done * self.size)) - self._told
                if rows > 0:
                    self._told += rows
                    self._progress(rows)

    def blocks(self) -> list[tuple[int, int]]:
        return [(start, min(start + BLOCK, self.size)) for start in range(0, self.size, BLOCK)]


class _Builder:
    """The kernels of the building, each over blocks of places."""

    def __init__(self, codes: _Codes, params: BuildParams, pivots: NDArray[np.int32], work: _Work) -> None:
        self.codes, self.params, self.pivots, self.work = codes, params, pivots, work
        self.size = work.size
        self._codes = codes.block.address
        self._spaces: list[tuple[Workspace, NDArray[np.int64]]] = []

    def lists(self, order: Callable[[], tuple[NDArray[np.int32], NDArray[np.int64]]], share: float) -> Lists:
        """Every pair in the leaves of `n_trees` trees, which `order` grows, compared: the nearest of each place."""
        pair = machine_code.load("index_builders.nng_kernels", "nng_pair_leaf", 7)
        lists = np.empty((self.size, LIST_WIDTH), np.int64)
        filled = np.zeros(self.size, np.int32)
        for _ in range(self.params.n_trees):
            places, starts = order()
            leaves = list(zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True))

            def compare(leaf: tuple[int, int], places: NDArray[np.int32] = places) -> None:
                pair(self._codes, id(places), leaf[0], leaf[1], id(lists), LIST_WIDTH, id(filled))

            self.work.each(leaves, compare, "lists", share / self.params.n_trees)
        return lists, filled

    def given(self, neighbours: Labels, order: NDArray[np.int32], share: float) -> Lists:
        """The lists that somebody else has made: labels (size, n) by label, -1 after the last."""
        take = machine_code.load("index_builders.nng_kernels", "nng_take_lists", 10)
        lists, filled = np.empty((self.size, LIST_WIDTH), np.int64), np.zeros(self.size, np.int32)
        places = np.empty(self.size, np.int32)
        places[order] = np.arange(self.size, dtype=np.int32)

        def run(block: tuple[int, int]) -> None:
            take(
                self._codes, id(neighbours), neighbours.shape[1], id(order), id(places), id(lists), LIST_WIDTH,
                id(filled), *block,
            )  # fmt: skip

        self.work.each(self.work.blocks(), run, "lists", share)
        return lists, filled

    def first(self, known: Lists) -> Graph:
        """The graph that the lists alone give."""
        choose = machine_code.load("index_builders.nng_kernels", "nng_choose", 9)
        lists, filled = known
        graph = np.empty((self.size, FIRST_DEGREE), np.int32)

        def run(block: tuple[int, int]) -> None:
            choose(self._codes, id(lists), LIST_WIDTH, id(filled), id(graph), FIRST_DEGREE, SLACK_PERCENT, *block)

        self.work.each(self.work.blocks(), run, "graph", SHARE_FIRST)
        return self._linked(graph, FIRST_DEGREE)

    def refined(self, graph: Graph, known: Lists, ef: int, degree: int, name: str, share: float) -> Graph:
        """The graph of what a search of `graph` with breadth `ef` finds for every place."""
        kernel = "nng_refine" if self.codes.rows is None else "nng_refine_vectors"
        refine = machine_code.load("index_builders.nng_kernels", kernel, 13)
        lists, filled = known
        index = self._walked(graph)
        new = np.empty((self.size, degree), np.int32)

        def run(block: tuple[int, int]) -> None:
            space, pool = self._space(index, ef)
            refine(
                index.address, space.address, self._codes, ef, id(lists), LIST_WIDTH, id(filled), id(pool),
                SLACK_PERCENT, id(new), degree, *block,
            )  # fmt: skip
            self._spaces.append((space, pool))

        self.work.each(self.work.blocks(), run, name, share)
        return self._linked(new, degree)

    def _walked(self, graph: Graph) -> Block:
        """The index block that a search of the graph under way needs: Euclidean, whatever the metric."""
        codes = self.codes
        bias, most = bounded(codes.bias)
        euclidean = codes.bias is not None or (codes.rows is not None and codes.augment is None)
        if codes.extra is not None:
            bias, most = codes.extra, float(codes.extra.max(initial=0.0)) ** 2
        return Block(
            at.INDEX_SLOTS,
            {
                at.SIZE: self.size,
                at.DIM: codes.scale.shape[1],
                at.DEGREE: graph.shape[1],
                at.CHUNKS: codes.high.shape[1] // CHUNK_BYTES,
                at.METRIC: at.L2 if euclidean else at.IP,
                at.VECTORS_BY_PLACE: 1,
                at.N_PIVOTS: len(self.pivots),
            },
            {
                at.GRAPH: graph,
                at.HIGH: codes.high,
                at.LOW: codes.low,
                at.SCALE: codes.scale,
                at.BIAS: bias,
                at.BIAS_MOST: np.array([most], np.float32),
                at.PIVOTS: self.pivots,
                at.PIVOT_CODES: aligned(codes.high[self.pivots]),
                at.ORDER: np.arange(self.size, dtype=np.int32),
                at.VECTORS: codes.rows,
            },
        )

    def _space(self, index: Block, ef: int) -> tuple[Workspace, NDArray[np.int64]]:
        """Where one thread works; lent out and given back, as threads come and go."""
        with contextlib.suppress(IndexError):
            space, pool = self._spaces.pop()
            space.make_room(ef)
            if len(pool) >= ef + LIST_WIDTH + 1:
                return space, pool
        space = Workspace(index)
        space.make_room(ef)
        return space, np.empty(ef + LIST_WIDTH + 1, np.int64)

    def _linked(self, graph: Graph, degree: int) -> Graph:
        """Every edge offered to its other end, in at most `degree` slots a place."""
        count = machine_code.load("index_builders.nng_kernels", "nng_count_in", 4)
        fill = machine_code.load("index_builders.nng_kernels", "nng_fill_in", 5)
        link = machine_code.load("index_builders.nng_kernels", "nng_link", 12)
        starts = np.zeros(self.size + 1, np.int64)
        count(id(graph), self.size, graph.shape[1], id(starts))
        np.cumsum(starts, out=starts)
        sources, ends = np.empty(int(starts[-1]), np.int32), starts.copy()
        fill(id(graph), self.size, graph.shape[1], id(ends), id(sources))
        linked = aligned(np.empty((self.size, degree), np.int32))

        def run(block: tuple[int, int]) -> None:
            pool = np.empty(LINK_ROOM + 1, np.int64)
            link(
                self._codes, id(graph), graph.shape[1], id(starts), id(sources), SLACK_PERCENT, id(pool), LINK_ROOM,
                id(linked), degree, *block,
            )  # fmt: skip

        self.work.each(self.work.blocks(), run, "links", 0.0)
        return linked

    def reachable(self, graph: Graph) -> NDArray[np.int32]:
        """The pivots, and one more for each part of the graph that they do not reach, as long as there is room."""
        reach = machine_code.load("index_builders.nng_kernels", "nng_reach", 6)
        reached, queue = np.zeros(self.size, np.bool_), np.empty(self.size, np.int32)
        pivots = self.pivots
        total = reach(id(graph), graph.shape[1], id(pivots), len(pivots), id(reached), id(queue))
        more: list[int] = []
        lost = 0
        while total < self.size and len(pivots) + len(more) < MAX_PIVOTS:
            lost += int(np.argmin(reached[lost:]))
            seed = np.array([lost], np.int32)
            total += reach(id(graph), graph.shape[1], id(seed), 1, id(reached), id(queue))
            more.append(lost)
        return np.concatenate([pivots, np.array(more, np.int32)])
