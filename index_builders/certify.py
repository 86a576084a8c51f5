"""Measures the recall of a finished index, and picks the search settings that keep what was promised."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from index_builders import base
from vecsvc import indexes
from vecsvc.distance import exact_distances
from vecsvc.exact_search import ExactSearch
from vecsvc.indexes import Index
from vecsvc.manifest import Certificate, OperatingPoint
from vecsvc.ranking import recall
from vecsvc.storage import release_pages
from vecsvc.types import Distances, IndexSpec, Metric, StoredVectors, Vectors

K: Final = 10
TIMED: Final = 32  # queries whose latency is taken at each operating point
BLOCK_ROWS: Final = 8192  # rows compared before their pages are let go


class Certifier:
    """Recall@10 of sampled rows, each one's own row left out of truth and answer.

    Shards are measured one by one, while each is in memory; their answers are merged in the end.
    """

    def __init__(self, vectors: list[StoredVectors], metric: Metric, queries: int, seed: int) -> None:
        self.vectors, self.metric = vectors, metric
        self._offsets = np.concatenate([[0], np.cumsum([len(v) for v in vectors])])
        total = int(self._offsets[-1])
        rng = np.random.default_rng(seed)
        # A row needs others to be near to.
        self._rows = np.sort(rng.choice(total, size=min(queries, total), replace=False)) if total > 1 else np.empty(0)
        self._queries = self._gather()
        self._k = min(K, total - 1)
        self._truth: list[Distances] = []
        self._found: list[list[Distances]] = []
        self._latency: list[NDArray[np.float64]] = []
        self._visited: list[NDArray[np.float64]] = []
        self._points: list[dict[str, Any]] = []
        self._defaults: dict[str, Any] = {}

    def _gather(self) -> Vectors:
        dim = self.vectors[0].shape[1]
        queries = np.empty((len(self._rows), dim), dtype=np.float32)
        for i, row in enumerate(self._rows):
            shard = int(np.searchsorted(self._offsets, row, side="right")) - 1
            queries[i] = self.vectors[shard][int(row - self._offsets[shard])]
        return queries

    def load(self, number: int, folder: Path, spec: IndexSpec) -> Index:
        return indexes.load(folder, spec, vectors=self.vectors[number])

    def measure(self, number: int, index: Index, num_threads: int = 1) -> None:
        """Ask one shard's index every query at every operating point, and every vector for the truth."""
        if not len(self._rows):
            return
        vectors, offset = self.vectors[number], int(self._offsets[number])
        own = self._rows - offset
        self._truth.append(self._nearest(vectors, own))
        self._points = base.operating_points(index.spec)
        self._defaults = indexes.params_dict(indexes.search_params(index.spec.kind))
        found, latency, visited = [], [], []
        for point in self._points:
            params = indexes.search_params(index.spec.kind, **point)
            answer = index.search(self._queries, self._k + 1, params, num_threads=num_threads)
            times = []
            for query in self._queries[:TIMED]:
                started = time.perf_counter()
                index.search(query[None], self._k, params)
                times.append(time.perf_counter() - started)
            found.append(self._distances(vectors, answer.labels, own))
            latency.append(float(np.median(times)) * 1e3)
            visited.append(float(answer.visited.mean()))
        self._found.append(found)
        self._latency.append(np.array(latency))
        self._visited.append(np.array(visited))

    def _nearest(self, vectors: StoredVectors, own: NDArray[Any]) -> Distances:
        """True distances (queries, k) of the nearest rows, sorted. Pages of the map are let go on the way."""
        best = np.full((len(self._queries), self._k), np.inf, dtype=np.float32)
        for start in range(0, len(vectors), BLOCK_ROWS):
            block = vectors[start : start + BLOCK_ROWS]
            found = ExactSearch(block, self.metric).search(self._queries, min(self._k + 1, len(block)))
            distances = np.where(found.labels + start == own[:, None], np.float32(np.inf), found.distances)
            best = np.sort(np.concatenate([best, distances], axis=1), axis=1)[:, : self._k]
            release_pages(vectors)
        return best

    def _distances(self, vectors: StoredVectors, labels: NDArray[np.int64], own: NDArray[Any]) -> Distances:
        """True distances of the labels found, sorted, without the query's own row; +inf for empty places."""
        distances = np.full(labels.shape, np.inf, dtype=np.float32)
        for i, row in enumerate(labels):
            keep = (row >= 0) & (row != own[i])
            distances[i, keep] = exact_distances(self._queries[i], vectors[row[keep]], self.metric)
            if i % 8 == 7:
                release_pages(vectors)  # with each row the system maps its neighbourhood too
        release_pages(vectors)
        distances.sort(axis=1)
        return distances

    def _at_least_default(self, params: dict[str, Any]) -> bool:
        return all(params.get(name, value) >= value for name, value in self._defaults.items())

    def certificate(self, target: float) -> tuple[Certificate | None, dict[str, Any]]:
        """The certificate, and the cheapest settings whose recall is at least `target` beyond chance.

        Never below the kind's own defaults: rows of the corpus are easier to find than what people ask.
        Where nothing reaches the target, the best there is, and the certificate says so.
        """
        if not self._found:
            return None, {}
        bounds = np.sort(np.concatenate(self._truth, axis=1), axis=1)[:, self._k - 1]
        points = []
        for at, params in enumerate(self._points):
            merged = np.sort(np.concatenate([found[at] for found in self._found], axis=1), axis=1)[:, : self._k]
            each = recall(merged, bounds)
            error = 1.96 * float(each.std()) / np.sqrt(len(each))
            points.append(
                OperatingPoint(
                    params=params,
                    recall=round(float(each.mean()), 4),
                    recall_error=round(float(error), 4),
                    latency_ms=round(float(sum(latency[at] for latency in self._latency)), 4),
                    visited=round(float(sum(visited[at] for visited in self._visited)), 1),
                )
            )
        good = [p for p in points if p.recall - p.recall_error >= target and self._at_least_default(p.params)]
        chosen = good[0] if good else points[-1]
        certificate = Certificate(
            k=self._k,
            queries=len(self._rows),
            method="sampled rows of the corpus, each one's own row left out; exact distances; ties are no errors",
            target=target,
            reached=bool(good),
            points=points,
        )
        return certificate, dict(chosen.params)
