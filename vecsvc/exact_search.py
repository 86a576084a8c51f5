"""Compares queries with every row there is: the oracle of every index, and what they fall back on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray

from vecsvc.blocks import block_rows
from vecsvc.distance import approximate_distances, exact_distances, unit
from vecsvc.ranking import pad, top_k
from vecsvc.types import Distances, Labels, Limit, Mask, Metric, Neighbors, StoredVectors, Vectors

QUERY_BLOCK: Final = 256  # queries that share one matrix product
SPARE: Final = 32  # candidates kept beyond k, so that rounding seldom leaves a doubt at the boundary
TINY_NORM: Final = 1e-30  # a shorter row may lose digits to underflow, so that no product of it can be trusted


class ExactSearch:
    """Exact search over rows (size, dim) of float32 or float16. Any number of threads may search at once."""

    def __init__(self, vectors: StoredVectors, metric: Metric) -> None:
        self._vectors = vectors
        self._metric = metric
        self._norms: Vectors | None = None

    def search(self, queries: Vectors, k: int, *, allowed: Mask | None = None, limit: Limit | None = None) -> Neighbors:
        """The k nearest labels of each checked query (n, dim), by (distance, label), whatever stands beside it.

        A float32 matrix product finds candidates, and `exact_distances` orders them. Every row that was
        left out is known to be farther than the k-th by more than the product's rounding error; where it
        is not (ties, duplicates, data far from the origin), the rows in doubt are compared one by one.
        `limit` is looked at between blocks of rows; `visited` counts the rows compared. NumPy's BLAS
        decides how many threads a product takes.
        """
        rows = None if allowed is None or allowed.all() else np.flatnonzero(allowed)
        total = len(self._vectors) if rows is None else len(rows)
        ceiling = total if limit is None or limit.max_visited is None else min(total, limit.max_visited)
        kept, bounds, seen = self._candidates(queries, k + max(SPARE, k // 2), rows, ceiling, limit)
        n = len(queries)
        labels = np.empty((n, k), dtype=np.int64)
        distances = np.empty((n, k), dtype=np.float32)
        stopped = np.full(n, seen < total)
        for i, query in enumerate(queries):
            found, values = nearest(query, kept[i][kept[i] >= 0], k, self._vectors, self._metric)
            # Where no k were found, nothing was left out.
            if len(found) == k and values[-1] >= bounds[i]:
                if limit is not None and limit.expired():
                    stopped[i] = True
                else:
                    found, values = self._among_doubtful(query, k, float(values[-1]), rows, seen)
            labels[i], distances[i] = pad(found, values, k)
        return Neighbors(labels, distances, np.full(n, seen, dtype=np.int64), stopped)

    def _candidates(
        self, queries: Vectors, keep: int, rows: Labels | None, ceiling: int, limit: Limit | None
    ) -> tuple[Labels, Distances, int]:
        """(labels (n, keep) with -1 for none, bounds (n,), rows seen): no row left out is nearer than its bound."""
        labels = np.full((len(queries), keep), -1, dtype=np.int64)
        lower = np.full((len(queries), keep), np.inf, dtype=np.float32)
        bounds = np.full(len(queries), np.inf, dtype=np.float32)
        lengths = row_norms(queries)
        sides = unit(queries) if self._metric == "cosine" else queries
        seen = 0
        for names, block, norms in self._blocks(rows, ceiling):
            if limit is not None and limit.expired():
                break
            seen += len(names)
            for start in range(0, len(queries), QUERY_BLOCK):
                part = slice(start, start + QUERY_BLOCK)
                found = lower_bounds(sides[part], lengths[part], block, norms, self._metric)
                for i, row in enumerate(found, start):
                    hits = np.flatnonzero(row < bounds[i])
                    if len(hits) == 0:
                        continue
                    values = np.concatenate([lower[i], row[hits]])
                    best = np.argpartition(values, keep - 1)[:keep]
                    lower[i] = values[best]
                    labels[i] = np.concatenate([labels[i], names[hits]])[best]
                    bounds[i] = lower[i].max()
        return labels, bounds, seen

    def _among_doubtful(
        self, query: Vectors, k: int, kth: float, rows: Labels | None, seen: int
    ) -> tuple[Labels, Distances]:
        """The k nearest of the first `seen` rows, comparing exactly all that may be within `kth`."""
        length = row_norms(query[None])
        side = unit(query[None]) if self._metric == "cosine" else query[None]
        labels = np.empty(0, dtype=np.int64)
        distances = np.empty(0, dtype=np.float32)
        for names, block, norms in self._blocks(rows, seen):
            doubtful = np.flatnonzero(lower_bounds(side, length, block, norms, self._metric)[0] <= kth)
            exact = exact_distances(query, block[doubtful], self._metric)
            labels, distances = top_k(np.concatenate([distances, exact]), k, np.concatenate([labels, names[doubtful]]))
        return labels, distances

    def _blocks(self, rows: Labels | None, total: int) -> Iterator[tuple[Labels, Vectors, Vectors]]:
        """The first `total` rows, or those of `rows`: (labels (m,), rows (m, dim) as float32, norms (m,))."""
        step = block_rows(self._vectors.shape[1])
        for start in range(0, total, step):
            stop = min(start + step, total)
            if rows is None:
                block = np.asarray(self._vectors[start:stop], dtype=np.float32)
                yield np.arange(start, stop), block, self._all_norms()[start:stop]
            else:
                block = np.asarray(self._vectors[rows[start:stop]], dtype=np.float32)
                norms = row_norms(block) if self._norms is None else self._norms[rows[start:stop]]
                yield rows[start:stop], block, norms

    def _all_norms(self) -> Vectors:
        # Two threads may both find it missing; they compute the same, and either may stay.
        if self._norms is None:
            step = block_rows(self._vectors.shape[1])
            starts = range(0, len(self._vectors), step)
            self._norms = np.concatenate([row_norms(self._vectors[start : start + step]) for start in starts])
        return self._norms


def row_norms(rows: StoredVectors) -> Vectors:
    """Euclidean lengths (m,) of rows (m, dim), summed in float64, so that tiny ones do not vanish."""
    return np.asarray(np.sqrt(np.einsum("ij,ij->i", rows, rows, dtype=np.float64)), dtype=np.float32)


def lower_bounds(queries: Vectors, lengths: Vectors, rows: Vectors, norms: Vectors, metric: Metric) -> Distances:
    """Values (n, m) that no exact distance is below: the matrix product less what rounding may have added.

    `norms` (m,) are the rows' lengths and `lengths` (n,) those of the queries as given; for cosine, `queries`
    (n, dim) are unit vectors. A float32 sum of dim products is off by at most dim * 2^-24 * |q||x|, in
    whatever order it is added up (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section
    3.1); twice that and a few units more cover the other roundings on the way.
    """
    unit_error = (rows.shape[1] + 8) * float(np.finfo(np.float32).eps)
    longest = float(norms.max())
    wide = lengths.astype(np.float64)
    if metric == "l2":
        bounds = approximate_distances(queries, rows, metric, norms * norms)
        # What underflows in the squares of tiny values is lost absolutely, not relatively.
        error = unit_error * (wide + longest) ** 2 + rows.shape[1] * float(np.finfo(np.float32).tiny)
    elif metric == "ip":
        bounds = approximate_distances(queries, rows, metric, norms)
        error = unit_error * (1.0 + wide * longest)
    else:
        # The rows are as given, not unit vectors: scaling m products is cheaper than scaling m rows.
        bounds = queries @ rows.T
        bounds *= np.divide(1.0, norms, out=np.zeros_like(norms), where=norms >= TINY_NORM)
        np.subtract(1.0, bounds, out=bounds)
        untrusted = bool(np.any((norms > 0) & (norms < TINY_NORM)))
        error = np.full(len(queries), np.inf if untrusted else 2 * unit_error)
    bounds -= error.astype(np.float32)[:, None]
    return bounds


def nearest(
    query: Vectors, candidates: NDArray[np.int64], k: int, vectors: StoredVectors, metric: Metric
) -> tuple[Labels, Distances]:
    """The k nearest of the labels `candidates` (m,) by exact (distance, label); fewer where m < k."""
    return top_k(exact_distances(query, vectors[candidates], metric), k, candidates)
