"""What every kind of index promises, the table that names them, and the checks they share.

A kind is a module that the entry-point group `vecsvc.indexes` names, with two public things:

    SearchParams                                                  a frozen dataclass of `config.option`s
    load(directory, spec, *, vectors, mmap, device) -> Index      opens what `Index.save` wrote

An index that answers a search with few allowed rows faster than comparing them all does, and misses none of them, may
have the attribute `compares_the_allowed = True`; for others the shard compares them (shard.py).

Ours go through the same door as anybody's: `[project.entry-points."vecsvc.indexes"]` in pyproject.toml.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, Protocol, cast, runtime_checkable

import numpy as np

from vecsvc.config import make
from vecsvc.distance import check_vector
from vecsvc.errors import BackendMissing, DimensionMismatch, InvalidParameter, UnknownKind
from vecsvc.types import MAX_ABS, MAX_DIM, IndexSpec, Labels, Limit, Mask, Neighbors, StoredVectors, Vectors

GROUP: Final = "vecsvc.indexes"

# Which extra brings the library that a kind needs.
_EXTRAS: Final = {"hnswlib": "hnsw", "faiss": "cpu"}


@runtime_checkable
class Index(Protocol):
    """An index that was built once and does not change. Any number of threads may search it at once."""

    spec: IndexSpec

    def search(
        self,
        queries: Vectors,
        k: int,
        params: Any = None,
        *,
        allowed: Mask | None = None,
        limit: Limit | None = None,
        num_threads: int = 1,
    ) -> Neighbors:
        """The k nearest labels of each query (n, dim), the closest first.

        `params` is the kind's frozen SearchParams, None for its defaults. Only labels that `allowed`
        (size,) marks come back. Rows with fewer than k answers end in -1 at +inf.
        Raises DimensionMismatch, InvalidVector or InvalidParameter, naming the value and what is right.
        """
        ...

    def save(self, directory: Path) -> None:
        """Write the index's files into an existing folder, through storage's helpers."""
        ...

    def close(self) -> None: ...


class IndexModule(Protocol):
    """What a module of the table offers."""

    SearchParams: type

    @staticmethod
    def load(directory: Path, spec: IndexSpec, *, vectors: StoredVectors, mmap: bool, device: str) -> Index: ...


@functools.cache
def _table() -> dict[str, importlib.metadata.EntryPoint]:
    return {point.name: point for point in importlib.metadata.entry_points(group=GROUP)}


def kinds() -> list[str]:
    """Every kind that is installed, ours and others'; its library may still be missing."""
    return sorted(_table())


def import_kind(table: dict[str, importlib.metadata.EntryPoint], kind: str, *others: str) -> Any:
    """The module that an entry point names; a missing library becomes BackendMissing with the remedy.

    `others` are kinds that may be asked for beside those of the table, for the message.
    """
    if kind not in table:
        raise UnknownKind(f"{kind[:80]!r} is no kind of index; known are {', '.join(sorted([*table, *others]))}")
    try:
        return table[kind].load()
    except ImportError as error:
        extra = _EXTRAS.get(error.name or "")
        remedy = f"pip install 'vecsvc[{extra}]'" if extra else f"install {error.name}"
        raise BackendMissing(f"kind {kind!r} needs {error.name}: {remedy}") from error


def module(kind: str) -> IndexModule:
    return cast(IndexModule, import_kind(_table(), kind))


def load(directory: Path, spec: IndexSpec, *, vectors: StoredVectors, mmap: bool = True, device: str = "cpu") -> Index:
    """Open a saved index. The files must have been checked: native loaders do not survive damaged ones.

    `vectors` (size, dim) are the shard's own rows. `mmap` is a permission, not a promise.
    """
    return module(spec.kind).load(directory, spec, vectors=vectors, mmap=mmap, device=device)


def search_params(kind: str, **values: Any) -> Any:
    """The kind's frozen search dataclass, checked: `search_params("hnsw", ef_search=64)`."""
    return make(module(kind).SearchParams, values, what=kind)


def params_dict(params: Any) -> dict[str, Any]:
    """Search or build parameters as plain values, for manifests and explanations."""
    return {name: value for name, value in asdict(params).items() if value is not None}


# ------------------------------------------------------------------------------- checks of the kinds


def check_search(spec: IndexSpec, queries: Vectors, k: int, params: Any, expected: type, allowed: Mask | None) -> Any:
    """The checks at the door of every `search`. Returns the params, the kind's defaults for None."""
    params = check_arguments(spec, queries, k, params, expected, allowed)
    # One sum of squares over everything finds what may be NaN, infinite or too large; then it is worth knowing where.
    if not np.vdot(queries, queries) <= MAX_ABS or spec.metric == "cosine":
        for row, query in enumerate(queries):
            check_vector(query, spec.metric, f"queries[{row}]")
    return params


def check_arguments(
    spec: IndexSpec, queries: Vectors, k: int, params: Any, expected: type, allowed: Mask | None
) -> Any:
    """What `check_search` checks, but for the queries' values: for kinds that look at those anyway."""
    if queries.ndim != 2 or queries.shape[1] != spec.dim:
        raise DimensionMismatch(f"queries have shape {queries.shape}, the index has dim {spec.dim}")
    if queries.dtype != np.float32:
        raise InvalidParameter(f"queries are {queries.dtype}, expected float32")
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise InvalidParameter(f"k must be an integer of at least 1, got {k!r}")
    if params is None:
        params = expected()
    elif type(params) is not expected:
        given = f"{type(params).__module__}.{type(params).__name__}"
        raise InvalidParameter(f"{spec.kind} takes {expected.__module__}.{expected.__name__}, got {given}")
    if allowed is not None and (allowed.dtype != np.bool_ or allowed.shape != (spec.size,)):
        raise InvalidParameter(f"allowed has shape {allowed.shape} of {allowed.dtype}, expected ({spec.size},) of bool")
    return params


def check_rows(spec: IndexSpec, vectors: StoredVectors) -> None:
    """The check at the door of a `load` whose kernels read the shard's rows by address."""
    if vectors.shape != (spec.size, spec.dim) or vectors.dtype not in (np.float32, np.float16):
        raise DimensionMismatch(
            f"vectors have shape {vectors.shape} of {vectors.dtype}, "
            f"the index was built over ({spec.size}, {spec.dim}) of float32 or float16"
        )


def check_build(vectors: StoredVectors) -> None:
    """The checks at the door of every `build`: shape, dtype and finiteness of (n, dim) rows."""
    if vectors.ndim != 2 or not 1 <= vectors.shape[1] <= MAX_DIM or len(vectors) == 0:
        raise DimensionMismatch(
            f"vectors have shape {vectors.shape}, expected (n, dim) with n >= 1 and dim from 1 to {MAX_DIM}"
        )
    if vectors.dtype not in (np.float32, np.float16):
        raise InvalidParameter(f"vectors are {vectors.dtype}, expected float32 or float16")


def empty(n: int, k: int) -> Neighbors:
    """The answer of n queries that found nothing."""
    return Neighbors(
        labels=np.full((n, k), -1, dtype=np.int64),
        distances=np.full((n, k), np.inf, dtype=np.float32),
        visited=np.zeros(n, dtype=np.int64),
        stopped=np.zeros(n, dtype=np.bool_),
    )


def padded(labels: Labels, distances: Vectors, k: int, visited: int = -1) -> Neighbors:
    """Neighbours (n, m) of a library as rows of exactly k places; labels below 0 count as empty."""
    n, m = labels.shape
    if m < k:
        wide = empty(n, k)
        wide.labels[:, :m] = labels
        wide.distances[:, :m] = distances
        labels, distances = wide.labels, wide.distances
    elif m > k:
        labels, distances = labels[:, :k], distances[:, :k]
    seen = np.empty(n, dtype=np.int64)
    seen.fill(visited)  # a quarter of the time of np.full, which every single query would pay for
    return Neighbors(labels, distances, seen, np.zeros(n, dtype=np.bool_))
