"""Questions to measure recall with, where nobody gave any: rows of the corpus, moved to where no row is.

A row itself is no fair question: the index has linked or filed it beside its neighbours, and finds them by it even
where it finds little else. Each row sampled is therefore moved by as much as its nearest neighbour is away, in the
direction in which two other rows differ: so it lies as far from all rows as they lie from each other, and along what
the corpus varies in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from vecsvc.distance import unit
from vecsvc.exact_search import ExactSearch
from vecsvc.storage import release_pages
from vecsvc.types import MAX_ABS, Metric, StoredVectors, Vectors

Rows = NDArray[np.int64]  # of the corpus

COMPARED_ROWS: Final = 131_072  # among so many of a larger corpus the nearest neighbour is looked for
BLOCK_ROWS: Final = 1024  # that lie together, where not all are compared
CANDIDATES: Final = 16  # of a block: the first may be the row and its duplicates
SAME: Final = {"l2": 0.0, "cosine": 1e-7}  # distances that are none, but for rounding


def moved_rows(vectors: Sequence[StoredVectors], rows: Sequence[Rows], metric: Metric, n: int, seed: int) -> Vectors:
    """Questions (up to n, dim) for shards of these vectors, whose corpus rows are `rows`, ascending.

    None where there are fewer than two rows. A row is moved past its duplicates.
    """
    total = count(rows)
    if total < 2:
        return np.empty((0, vectors[0].shape[1]), np.float32)
    rng = np.random.default_rng(seed)
    sampled = np.sort(rng.choice(total, size=min(n, total), replace=False))
    one = rng.integers(0, total, len(sampled))
    other = (one + rng.integers(1, total, len(sampled))) % total
    points, a, b = (_of(vectors, rows, wanted) for wanted in (sampled, one, other))
    if metric == "cosine":
        points, a, b = unit(points), unit(a), unit(b)
    along = a - b
    same = ~along.any(axis=1)
    along[same] = (a - points)[same]
    moved = points + _nearest(vectors, points, metric)[:, None] * unit(along)
    # What no index takes: values that are too large, and under cosine no direction at all.
    wrong = ~((np.abs(moved).max(axis=1) <= MAX_ABS) & (moved.any(axis=1) | (metric != "cosine")))
    moved[wrong] = points[wrong]
    return moved


def count(rows: Sequence[Rows]) -> int:
    """How many rows of the corpus there are in shards: all of it where there are several."""
    return len(rows[0]) if len(rows) == 1 else 1 + max(int(mine[-1]) for mine in rows)


def labels_of(wanted: Rows, rows: Rows) -> NDArray[np.int64]:
    """The labels of corpus rows in a shard that holds `rows`, ascending; -1 for those that do not live there."""
    at = np.minimum(np.searchsorted(rows, wanted), len(rows) - 1)
    return np.where(rows[at] == wanted, at, -1)


def _of(vectors: Sequence[StoredVectors], rows: Sequence[Rows], wanted: NDArray[np.int64]) -> Vectors:
    """The vectors of the `wanted` ones among all rows there are, in float32."""
    if len(rows) == 1:
        wanted = rows[0][wanted]
    found = np.empty((len(wanted), vectors[0].shape[1]), np.float32)
    for part, mine in zip(vectors, rows, strict=True):
        labels = labels_of(wanted, mine)
        found[labels >= 0] = part[labels[labels >= 0]]
        release_pages(part)
    return found


def _nearest(vectors: Sequence[StoredVectors], points: Vectors, metric: Metric) -> NDArray[np.float32]:
    """How far the nearest row that is not the same is from each point, in a straight line; of unit vectors for cosine.

    0 where there is none.
    """
    total = sum(map(len, vectors))
    step = max(1, total // COMPARED_ROWS) * BLOCK_ROWS
    # A product between vectors says nothing of how far apart they are.
    straight: Metric = "cosine" if metric == "cosine" else "l2"
    nearest = np.full(len(points), np.inf, np.float32)
    for part in vectors:
        for start in range(0, len(part), step):
            block = part[start : start + BLOCK_ROWS]
            # The row itself lies in one block, and its duplicates may lie beside it.
            distances = ExactSearch(block, straight).search(points, min(CANDIDATES, len(block))).distances
            others = np.where(distances > SAME[straight], distances, np.float32(np.inf))
            np.minimum(nearest, others.min(axis=1), out=nearest)
        release_pages(part)
    away = np.sqrt(2 * nearest if straight == "cosine" else nearest)
    return np.where(np.isfinite(away), away, np.float32(0))
