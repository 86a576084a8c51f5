"""Spreads rows over shards by nearness, so that a query finds most of its neighbours in few shards.

Balanced k-means on a sample gives each shard a place and an offset that is added to distances from there: a power
diagram, whose cells can be made equally large by offsets alone (Aurenhammer, Hoffmann and Aronov, "Minkowski-type
theorems and least-squares clustering", 1998). Every row then goes to its nearest shard with room, and those that lie
nearest to a border also into the shard behind it (closure assignment: Chen et al., "SPANN", 2021, section 3.2).

Distances between rows and places are squared for l2. For cosine, rows are points of length 1. For ip, they are divided
by the greatest length and given one more dimension that makes them of length 1 (Bachrach et al., "Speeding up the
Xbox recommender system", 2014); a query has 0 there, so the dimension is not kept.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from vecsvc.blocks import block_rows
from vecsvc.distance import unit
from vecsvc.types import Distances, Metric, StoredVectors, Vectors

SAMPLE_ROWS_PER_SHARD: Final = 1024
MAX_SAMPLE_VALUES: Final = 1 << 26  # of the sample, and of its distances to all places
# A shard has at most so much more than its equal share of the rows, beside those that live in two.
BALANCE_SLACK: Final = 0.1
ROUNDS: Final = 12  # of k-means, each with offsets that balance it
OFFSET_STEPS: Final = 20  # of balancing in one round; the next one goes on from there


def sample_size(shards: int, dim: int) -> int:
    return min(SAMPLE_ROWS_PER_SHARD * shards, max(shards, MAX_SAMPLE_VALUES // max(dim + 1, shards)))


class Clustering:
    """Where the shards are, learnt from a sample."""

    def __init__(self, sample: StoredVectors, shards: int, metric: Metric, border_share: float, seed: int) -> None:
        """`sample` (n, dim) with n >= shards. The same sample and seed give the same places."""
        from sklearn.cluster import kmeans_plusplus

        self.metric, self._border_share = metric, border_share
        raw = np.asarray(sample, dtype=np.float32)
        self._longest = float(np.sqrt(np.einsum("ij,ij->i", raw, raw, dtype=np.float64).max())) or 1.0
        points = self._points(raw)
        self.places: Vectors = np.array(kmeans_plusplus(points, shards, random_state=seed)[0], dtype=np.float32)
        self.offsets = np.zeros(shards, dtype=np.float32)
        for _ in range(ROUNDS):
            distances = self._from(points)
            self.offsets = balanced_offsets(distances, self.offsets, steps=OFFSET_STEPS)
            self._move(points, np.argmin(distances + self.offsets, axis=1))
        distances = self._from(points)
        self.offsets = balanced_offsets(distances, self.offsets, steps=10 * OFFSET_STEPS)
        # A row whose border is no farther lives on both sides of it: so do `border_share` of the sample.
        self._border = float(np.quantile(self._to_border(distances + self.offsets)[0], border_share))

    def centroids(self, dim: int) -> Vectors:
        """What centroids.npy holds, (shards, dim + 1): see ranking.nearest_shards."""
        return np.concatenate([self.places[:, :dim], self.offsets[:, None]], axis=1)

    def distances(self, rows: StoredVectors) -> Distances:
        """From every row (n, dim) to every shard, offsets included."""
        return self._from(self._points(np.asarray(rows, dtype=np.float32))) + self.offsets

    def near_border(self, distances: Distances) -> NDArray[np.int64]:
        """The shard behind the border for each row (n,) that lies near one; -1 for the others."""
        if not self._border_share or len(self.offsets) == 1:
            return np.full(len(distances), -1, dtype=np.int64)
        far, second = self._to_border(distances)
        return np.where(far <= self._border, second, -1)

    def _points(self, rows: Vectors) -> Vectors:
        if self.metric == "l2":
            return rows
        if self.metric == "cosine":
            return unit(rows)
        scaled = rows / np.float32(self._longest)
        squared = np.einsum("ij,ij->i", scaled, scaled)
        # A row that is longer than all of the sample is taken for one of its length.
        return unit(np.concatenate([scaled, np.sqrt(np.maximum(0.0, 1.0 - squared))[:, None]], axis=1))

    def _from(self, points: Vectors) -> Distances:
        found = np.empty((len(points), len(self.places)), dtype=np.float32)
        own = np.einsum("ij,ij->i", self.places, self.places)
        step = block_rows(max(points.shape[1], len(self.places)))
        for start in range(0, len(points), step):
            block = points[start : start + step]
            products = block @ self.places.T
            if self.metric == "l2":
                squared = np.einsum("ij,ij->i", block, block)
                found[start : start + len(block)] = squared[:, None] - 2.0 * products + own
            else:
                found[start : start + len(block)] = 1.0 - products
        return found

    def _move(self, points: Vectors, shard_of: NDArray[Any]) -> None:
        """Every place to the middle of its points; one without points stays."""
        for number in range(len(self.places)):
            mine = points[shard_of == number]
            if len(mine):
                middle = mine.mean(axis=0, dtype=np.float64).astype(np.float32)
                self.places[number] = middle if self.metric == "l2" else unit(middle[None])[0]

    def _to_border(self, distances: Distances) -> tuple[Distances, NDArray[np.int64]]:
        """How far each row is from the border to its second nearest shard, and which that is."""
        if len(self.offsets) == 1:
            return np.zeros(len(distances), dtype=np.float32), np.zeros(len(distances), dtype=np.int64)
        two = np.argpartition(distances, 1, axis=1)[:, :2]
        near = np.take_along_axis(distances, two, axis=1)
        first, second = np.where((near[:, 1] < near[:, 0])[:, None], two[:, ::-1], two).T
        apart = np.linalg.norm(self.places[first] - self.places[second], axis=1)
        more = np.abs(near[:, 1] - near[:, 0]) / (2.0 if self.metric == "l2" else 1.0)
        return np.divide(more, apart, out=np.zeros_like(more), where=apart > 0), second.astype(np.int64)


def balanced_offsets(distances: Distances, offsets: NDArray[np.float32], steps: int) -> NDArray[np.float32]:
    """Offsets (k,) with which the nearest of k shards is the same for about as many rows, given distances (n, k).

    An auction: a shard with too many rows raises its offset until half of what is too much would rather go elsewhere.
    Where rows cannot be told apart it ends with the most even offsets that it met.
    """
    n, k = distances.shape
    bound = (1.0 + BALANCE_SLACK / 2) * n / k
    best, fewest = offsets, n + 1
    for _ in range(steps if k > 1 else 0):
        shifted = distances + offsets
        first = np.argmin(shifted, axis=1)
        sizes = np.bincount(first, minlength=k)
        if sizes.max() < fewest:
            best, fewest = offsets, int(sizes.max())
        if fewest <= bound:
            break
        near = np.partition(shifted, 1, axis=1)[:, :2]
        margins = near[:, 1] - near[:, 0]
        raised = offsets.astype(np.float64)
        for shard in np.flatnonzero(sizes > n / k):
            leave = int(np.ceil((sizes[shard] - n / k) / 2))
            raised[shard] += np.partition(margins[first == shard], leave - 1)[leave - 1] * (1 + 1e-6)
        offsets = (raised - raised.min()).astype(np.float32)
    return best


class Spreader:
    """Says of each row, in the order of the corpus, in which shards it lives. No shard gets more than its room."""

    def __init__(self, clustering: Clustering, rows: int, border_share: float) -> None:
        shards = len(clustering.offsets)
        self.capacity = -(-rows // shards) + int(BALANCE_SLACK * rows / shards)
        self.copies = 0
        self._clustering = clustering
        self._room = np.full(shards, self.capacity, dtype=np.int64)
        self._copy_room = np.full(shards, int(border_share * self.capacity), dtype=np.int64)
        self._copies_left = int(border_share * rows)

    def spread(self, vectors: StoredVectors) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The shard (n,) of each of the next n rows, and the second one of those near a border, -1 for the others."""
        distances = self._clustering.distances(vectors)
        second = self._clustering.near_border(distances)
        nearest = np.argmin(distances, axis=1)
        first = self._with_room(distances, nearest)
        second[first != nearest] = -1  # it lies behind a border already
        for shard in range(len(self._room)):
            wanting = np.flatnonzero(second == shard)
            kept = min(len(wanting), int(self._copy_room[shard]), self._copies_left)
            second[wanting[kept:]] = -1
            self._copy_room[shard] -= kept
            self._copies_left -= kept
            self.copies += kept
        return first, second

    def _with_room(self, distances: Distances, nearest: NDArray[np.int64]) -> NDArray[np.int64]:
        """As if each row in turn had gone to its nearest shard with room."""
        first, open_to = nearest.copy(), distances.copy()
        while True:
            full = False
            for shard in range(len(self._room)):
                late = np.flatnonzero(first == shard)[self._room[shard] :]
                if len(late):
                    # A row that came before keeps its place, so whoever is turned away need not ask here again.
                    open_to[late, shard] = np.inf
                    first[late] = np.argmin(open_to[late], axis=1)
                    full = True
            if not full:
                self._room -= np.bincount(first, minlength=len(self._room))
                return first
