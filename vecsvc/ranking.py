"""Who comes first: selection and merging as pure functions over arrays. Ties go to the smaller label."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from vecsvc.distance import exact_distances, unit
from vecsvc.types import Distances, Labels, Metric, Vectors

# A distance this close to the k-th true one is a hit: in proportion, for what is near may be as near as that; and what
# is no distance at all, but for the rounding of sums in float64.
TOLERANCE: Final = 1e-6
NOTHING: Final = 1e-13


def top_k(distances: Distances, k: int, labels: Labels | None = None) -> tuple[Labels, Distances]:
    """The k smallest of `distances` (m,), by (distance, label); fewer where m < k.

    `labels` (m,) are the entries' names; without them an entry's name is its position.
    """
    names = np.arange(len(distances), dtype=np.int64) if labels is None else labels
    if len(distances) > k:
        # Everything tied with the k-th stays in, so that the label decides and not the partition.
        bound = np.partition(distances, k - 1)[k - 1]
        keep = np.flatnonzero(distances <= bound)
        names, distances = names[keep], distances[keep]
    order = np.lexsort((names, distances))[:k]
    return names[order], distances[order]


def pad(labels: Labels, distances: Distances, k: int) -> tuple[Labels, Distances]:
    """Rows (m,) with m <= k as rows of k places; the empty ones are -1 at +inf."""
    full_labels = np.full(k, -1, dtype=np.int64)
    full_distances = np.full(k, np.inf, dtype=np.float32)
    full_labels[: len(labels)] = labels
    full_distances[: len(distances)] = distances
    return full_labels, full_distances


def merge_top_k(distances: Distances, rows: NDArray[np.int64], k: int) -> NDArray[np.intp]:
    """Merge shards' answers: the places of the best k among `distances` (m,) of corpus `rows` (m,), by (distance, row).

    Empty places (row -1) are dropped, and a row that is there several times counts once, where it comes first.
    """
    order = np.lexsort((rows, distances))
    ranked: list[int] = rows[order].tolist()
    # Put in from the last to the first, so that the first rank of a row stays. NumPy's own way takes longer where
    # there are tens of rows, and as long where there are thousands.
    firsts = dict(zip(reversed(ranked), range(len(ranked) - 1, -1, -1), strict=True))
    firsts.pop(-1, None)
    if len(firsts) < len(ranked):
        order = order[np.array(sorted(firsts.values()), np.intp)]
    return order[:k]


def nearest_shards(queries: Vectors, centroids: Vectors, n: int, metric: Metric) -> NDArray[np.int64]:
    """The n shards (n_queries, n) in which each query's neighbours are likeliest, the likeliest first.

    `centroids` (n_shards, dim + 1) is what a version's centroids.npy holds: where a shard is, and last what is added
    to the distance from there. That offset is what keeps shards equally large, so it moves their borders, for queries
    as for rows. Distances are squared for l2, otherwise `1 - <q, c>` of the query's direction: how long a query is
    changes nothing in its answer. All shards where there are fewer than n; ties go to the smaller number.
    """
    places, offsets = centroids[:, :-1], centroids[:, -1]
    flat: Metric = "l2" if metric == "l2" else "ip"
    points = queries if metric == "l2" else unit(queries)
    return np.stack([top_k(exact_distances(point, places, flat) + offsets, n)[0] for point in points])


def queries_of_shards(chosen: NDArray[np.int64]) -> dict[int, NDArray[np.intp]]:
    """Which rows of `chosen` (n_queries, n) ask each shard, so that each is asked once, by its number."""
    return {int(shard): np.flatnonzero((chosen == shard).any(axis=1)) for shard in np.unique(chosen)}


def recall(found: Distances, bounds: Distances) -> NDArray[np.float64]:
    """Of each query, the share of its places (n, k) that are within its bound (n,), the distance of the k-th nearest.

    Ties are no errors, and neither is rounding. Both are computed by `exact_distances`, never taken from what an index
    reports; an empty place is at +inf.
    """
    wide = bounds.astype(np.float64)
    wide += TOLERANCE * np.abs(wide) + NOTHING
    each: NDArray[np.float64] = np.mean(found <= wide[:, None], axis=1)
    return each
