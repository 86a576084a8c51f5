"""Builds kind `hnsw` with hnswlib: vectors are inserted one after another, each linked to the nearest before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from index_builders.base import Progress
from vecsvc.blocks import checked_blocks
from vecsvc.config import option
from vecsvc.distance import unit
from vecsvc.indexes.base import params_dict
from vecsvc.indexes.hnsw import HnswIndex, new_index
from vecsvc.types import IndexSpec, Metric, StoredVectors

EF_SEARCH: Final = (16, 32, 64, 128, 256, 512)


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildParams:
    m: int = option(
        16, "links a vector keeps: more gives better recall, at 8 to 10 bytes a link and slower builds", low=2, high=512
    )
    ef_construction: int = option(
        200, "breadth of the search for links: more gives a better graph, built slower", low=4, high=10_000
    )


def build(
    vectors: StoredVectors, *, metric: Metric, params: BuildParams, num_threads: int, seed: int, progress: Progress
) -> HnswIndex:
    """The index over rows (n, dim), in hnswlib's own copy. One thread and one seed give the same graph.

    Raises InvalidVector.
    """
    size, dim = vectors.shape
    index = new_index(metric, dim)
    index.init_index(max_elements=size, M=params.m, ef_construction=params.ef_construction, random_seed=seed)
    for start, rows in checked_blocks(vectors):
        items = unit(rows) if metric == "cosine" else rows
        index.add_items(items, np.arange(start, start + len(rows)), num_threads=num_threads)
        progress(len(rows))
    return HnswIndex(IndexSpec("hnsw", dim, metric, size, params_dict(params)), index, vectors)


def operating_points(spec: IndexSpec) -> list[dict[str, Any]]:
    """Breadths from hasty to thorough."""
    return [{"ef_search": breadth} for breadth in EF_SEARCH]
