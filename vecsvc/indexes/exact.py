"""Kind `exact`: compares with every vector. The right choice for small indexes, and the truth for all others."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vecsvc.exact_search import ExactSearch
from vecsvc.indexes.base import check_search
from vecsvc.types import IndexSpec, Limit, Mask, Neighbors, StoredVectors, Vectors


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchParams:
    """Nothing to choose: every answer is exact."""


def load(directory: Path, spec: IndexSpec, *, vectors: StoredVectors, mmap: bool, device: str) -> ExactIndex:
    """Over the shard's own rows (size, dim), as they are: there is no file of this kind."""
    return ExactIndex(spec, vectors)


class ExactIndex:
    shares_work = True  # one matrix product reads the vectors once for all queries

    def __init__(self, spec: IndexSpec, vectors: StoredVectors) -> None:
        self.spec = spec
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
        """As `base.Index.search` says. NumPy's BLAS decides on threads, whatever `num_threads` asks for."""
        check_search(self.spec, queries, k, params, SearchParams, allowed)
        return self._exact.search(queries, k, allowed=allowed, limit=limit)

    def save(self, directory: Path) -> None:
        """Nothing to write: the shard owns the rows."""

    def close(self) -> None:
        """Nothing to close: memory goes with the last reference, so that searches in flight end undisturbed."""
