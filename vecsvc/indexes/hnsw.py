"""Kind `hnsw`: hnswlib's navigable graph, read side; a search is a walk towards the query.

Malkov and Yashunin, Efficient and robust approximate nearest neighbor search using Hierarchical Navigable
Small World graphs (2016), arXiv:1603.09320.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import hnswlib
import numpy as np

from vecsvc.config import option
from vecsvc.distance import unit
from vecsvc.errors import ArtifactDamaged, StorageError
from vecsvc.exact_search import ExactSearch
from vecsvc.indexes.base import check_search, empty, padded
from vecsvc.storage import native_file
from vecsvc.types import IndexSpec, Limit, Mask, Metric, Neighbors, StoredVectors, Vectors

FILE: Final = "hnsw.bin"

# The head of hnswlib's file: offset of the links, capacity, count, bytes an element, offsets of label and
# vector, top level, entry point, links a level, links on the ground level, m, level factor, ef_construction.
_HEADER: Final = struct.Struct("<6QiI3QdQ")


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchParams:
    ef_search: int = option(
        64, "breadth of the search: more gives better recall, slower; never less than k", low=1, high=10_000
    )


def load(directory: Path, spec: IndexSpec, *, vectors: StoredVectors, mmap: bool, device: str) -> HnswIndex:
    """Open what `HnswIndex.save` wrote; hnswlib reads it into memory. Raises ArtifactDamaged."""
    path = directory / FILE
    _check_header(path, spec)
    index = new_index(spec.metric, spec.dim)
    try:
        index.load_index(str(path), max_elements=spec.size)
    except RuntimeError as error:
        raise ArtifactDamaged(f"{path}: hnswlib cannot read it: {error}") from error
    if index.get_current_count() != spec.size:
        raise ArtifactDamaged(f"{path}: holds {index.get_current_count()} vectors, expected {spec.size}")
    return HnswIndex(spec, index, vectors)


def new_index(metric: Metric, dim: int) -> Any:
    """hnswlib's object without elements. Cosine is its inner product over unit vectors, made by us."""
    return hnswlib.Index(space="l2" if metric == "l2" else "ip", dim=dim)


class HnswIndex:
    def __init__(self, spec: IndexSpec, index: Any, vectors: StoredVectors) -> None:
        self.spec = spec
        self._index = index
        # The shared object's own breadth is set to the least, once: hnswlib searches with the larger of it
        # and the number of neighbours asked for, so that the breadth travels with each call.
        index.set_ef(1)
        self._exact = ExactSearch(vectors, spec.metric)

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
        """As `base.Index.search` says. hnswlib does not tell how many vectors it compared."""
        settings: SearchParams = check_search(self.spec, queries, k, params, SearchParams, allowed)
        ask = min(max(settings.ef_search, k), self.spec.size)
        filter = None
        if allowed is not None:
            ask = min(ask, int(np.count_nonzero(allowed)))
            if ask == 0:
                return empty(len(queries), k)
            # The filter is called for every vector met, with the interpreter's lock: more threads only wait.
            filter, num_threads = allowed.data.__getitem__, 1
        sides = _unit(queries) if self.spec.metric == "cosine" else queries
        try:
            labels, distances = self._index.knn_query(sides, ask, num_threads, filter)
        except RuntimeError:
            return self._one_by_one(queries, sides, k, ask, filter, allowed, limit)
        return padded(labels.view(np.int64), distances, k)

    def _one_by_one(
        self, queries: Vectors, sides: Vectors, k: int, ask: int, filter: Any, allowed: Mask | None, limit: Limit | None
    ) -> Neighbors:
        """hnswlib refuses a whole batch where one query's walk meets fewer vectors than were asked for.

        Such a query (its graph falls apart, as with many duplicates) is compared with every vector.
        """
        answer = empty(len(queries), k)
        for i in range(len(queries)):
            try:
                labels, distances = self._index.knn_query(sides[i], ask, 1, filter)
                found = padded(labels.view(np.int64), distances, k)
            except RuntimeError:
                found = self._exact.search(queries[i : i + 1], k, allowed=allowed, limit=limit)
            for whole, part in (
                (answer.labels, found.labels),
                (answer.distances, found.distances),
                (answer.visited, found.visited),
                (answer.stopped, found.stopped),
            ):
                whole[i] = part[0]
        return answer

    def save(self, directory: Path) -> None:
        path = directory / FILE
        with native_file(path):
            self._index.save_index(str(path))
            # hnswlib does not look whether its writes succeed: a full disk leaves a short file.
            if path.stat().st_size != self._index.index_file_size():
                raise StorageError(f"cannot write {path}: only {path.stat().st_size} bytes fit; nothing was published")

    def close(self) -> None:
        """Nothing to close: memory goes with the last reference, so that searches in flight end undisturbed."""


def _unit(queries: Vectors) -> Vectors:
    """What `distance.unit` gives, in a fifth of its time for the single query that a server sends."""
    sides = np.empty_like(queries)
    for query, side in zip(queries, sides, strict=True):
        length = math.sqrt(np.vdot(query, query))
        if 1e-15 < length < 1e15:
            np.divide(query, length, out=side)
        else:  # the square of such a length may have overflowed or vanished
            side[:] = unit(query)
    return sides


def _check_header(path: Path, spec: IndexSpec) -> None:
    """hnswlib takes any file's word for the length of its vectors, and would compare with what is not there."""
    try:
        with path.open("rb") as file:
            head = file.read(_HEADER.size)
    except OSError as error:
        raise ArtifactDamaged(f"{path}: {error.strerror}") from error
    if len(head) < _HEADER.size:
        raise ArtifactDamaged(f"{path}: has {len(head)} bytes, too few for hnswlib's header")
    _, _, count, element_bytes, label_at, vector_at, *_ = _HEADER.unpack(head)
    if (count, label_at - vector_at, element_bytes - label_at) != (spec.size, 4 * spec.dim, 8):
        raise ArtifactDamaged(
            f"{path}: holds {count} vectors of {(label_at - vector_at) / 4:g} dimensions, "
            f"expected {spec.size} of {spec.dim}"
        )
