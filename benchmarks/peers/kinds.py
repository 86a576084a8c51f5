"""Every kind of vecsvc, built by `index_builders.build` and asked through the public `Index.search`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import index_builders
from index_builders.base import operating_points
from peers.base import Point, Searcher, System
from vecsvc import indexes

SEED = 7
# The breadth of a graph, in steps of about a fifth.
BREADTHS = (10, 12, 14, 17, 20, 24, 29, 35, 42, 50, 60, 72, 86, 104, 125, 150, 180, 216, 260, 310, 375, 450, 540, 800)
# These hold the vectors themselves, so that nothing is read beside their own files.
WHOLE = frozenset(("hnsw",))
# Other choices of a kind: name, package, parameters, and whether it reads the raw vectors beside its own files.
VARIANTS: tuple[tuple[str, str, Point, bool], ...] = (
    ("nng rerank float16", "vecsvc", {"kind": "nng", "rerank": "float16"}, False),
    ("nng rerank none", "vecsvc", {"kind": "nng", "rerank": "none"}, False),
    ("faiss HNSW32", "faiss-cpu", {"kind": "faiss", "factory": "HNSW32"}, False),
    ("faiss HNSW32_SQ8", "faiss-cpu", {"kind": "faiss", "factory": "HNSW32_SQ8"}, True),
    ("faiss ivf-pq-fast", "faiss-cpu", {"kind": "faiss", "preset": "ivf-pq-fast"}, True),
    ("faiss rabitq", "faiss-cpu", {"kind": "faiss", "preset": "rabitq"}, True),
)


class Kind:
    def __init__(self, vectors: np.ndarray, metric: str, threads: int, params: Mapping[str, Any]) -> None:
        values = dict(params)
        kind = values.pop("kind")
        self.index = index_builders.build(
            vectors,
            kind=kind,
            metric=metric,  # type: ignore[arg-type]
            params=values,
            num_threads=threads,
            seed=SEED,
        )

    def set(self, point: Point, threads: int) -> None:
        self._params = indexes.search_params(self.index.spec.kind, **point)
        self._threads = threads

    def search(self, queries: np.ndarray, k: int) -> Any:
        return self.index.search(queries, k, self._params, num_threads=self._threads).labels

    def save(self, folder: Path) -> int:
        self.index.save(folder)
        return 0


def points(searcher: Searcher) -> list[Point]:
    """The kind's own operating points; where their only knob is a breadth, steps fine enough for a curve."""
    assert isinstance(searcher, Kind)
    own = operating_points(searcher.index.spec)
    if len(own) > 1 and all(set(point) == {"ef_search"} for point in own):
        return [{"ef_search": breadth} for breadth in BREADTHS]
    return list(own)


def kinds() -> list[System]:
    """One system a kind with its default parameters, then its other choices; faiss has no default worth a curve."""
    found = []
    for kind in indexes.kinds():
        if kind == "faiss":
            continue
        found.append(
            System(
                name=f"vecsvc {kind}",
                package={"hnsw": "hnswlib"}.get(kind, "vecsvc"),
                build=Kind,
                points=points,
                params={"kind": kind},
                ours=True,
                unit=False,
                reranks=kind not in WHOLE,
            )
        )
    for name, package, params, reranks in VARIANTS:
        found.append(
            System(
                name=f"vecsvc {name}",
                package=package,
                build=Kind,
                points=points,
                params=params,
                ours=True,
                unit=False,
                reranks=reranks,
            )
        )
    return found
