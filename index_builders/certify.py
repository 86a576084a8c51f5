"""Measures the recall of a finished index, and picks the search settings that keep what was promised."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from index_builders import base
from index_builders.given_questions import Questions
from index_builders.questions import count, moved_rows
from vecsvc import indexes
from vecsvc.distance import exact_distances
from vecsvc.exact_search import ExactSearch
from vecsvc.indexes import Index
from vecsvc.manifest import Certificate, OperatingPoint, ProbePoint
from vecsvc.ranking import nearest_shards, recall
from vecsvc.storage import release_pages
from vecsvc.types import Distances, IndexSpec, Metric, StoredVectors, Vectors

K: Final = 10
MOVED: Final = "rows of the corpus, each moved by as much as its nearest neighbour is away"
TIMED: Final = 32  # queries whose latency is taken at each operating point
BLOCK_ROWS: Final = 32_768  # rows compared before their pages are let go
PROBED: Final = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192)  # numbers of shards that are worth a figure

_Ranked: TypeAlias = tuple[Distances, NDArray[np.int64]]  # distances and corpus rows (queries, m); -1 at +inf


class Certifier:
    """Recall@10 of questions that the user gave, or that are made of sampled rows.

    Shards are measured one by one, while each is in memory; their answers are merged in the end.
    """

    def __init__(
        self,
        vectors: list[StoredVectors],
        rows: list[NDArray[np.int64]],
        metric: Metric,
        queries: int,
        seed: int,
        *,
        centroids: Vectors | None = None,
        alone: bool = False,
        given: Questions | None = None,
    ) -> None:
        """`rows` are the corpus rows of each shard's vectors, ascending: all rows where there are several shards.

        With `centroids` some rows may live in two shards; they count once. `alone` is the one shard of its version:
        settings beyond those that miss nothing are not measured then. Of several, nobody knows at one what others miss.
        Without `given` questions, up to `queries` are made of rows.
        """
        self.vectors, self.metric = vectors, metric
        self._rows, self._centroids, self._alone = rows, centroids, alone
        self._given, source = given is not None, MOVED
        if given is not None:
            self._queries, source = given.vectors, f"questions of {given.path}"
        else:
            self._queries = moved_rows(vectors, rows, metric, queries, seed)
        self._method = f"{source}; exact distances; ties are no errors"
        self._k = min(K, count(rows))
        self._truth: list[_Ranked] = []
        self._found: list[list[_Ranked]] = []  # of each shard, at each of its operating points
        self._latency: list[list[float]] = []
        self._visited: list[list[float]] = []
        self._points: list[list[dict[str, Any]]] = []
        self._kind = ""

    def load(self, number: int, folder: Path, spec: IndexSpec) -> Index:
        return indexes.load(folder, spec, vectors=self.vectors[number])

    def measure(self, number: int, index: Index, num_threads: int = 1) -> None:
        """Ask one shard's index every query at every operating point, and every vector for the truth."""
        if not len(self._queries):
            return
        points = base.operating_points(index.spec)
        self._truth.append(self._nearest(number))
        self._kind = index.spec.kind
        found, latency, visited = [], [], []
        for point in points:
            params = indexes.search_params(index.spec.kind, **point)
            answer = index.search(self._queries, self._k, params, num_threads=num_threads)
            times = []
            for query in self._queries[:TIMED]:
                started = time.perf_counter()
                index.search(query[None], self._k, params)
                times.append(time.perf_counter() - started)
            found.append(self._distances(number, answer.labels))
            latency.append(float(np.median(times)) * 1e3)
            visited.append(float(answer.visited.mean()))
            if self._alone and is_thorough(point, self._floor()) and self._recall([found[-1]])[0] == 1.0:
                break
        points = points[: len(found)]
        self._found.append(found)
        self._latency.append(latency)
        self._visited.append(visited)
        self._points.append(points)

    def _floor(self) -> str:
        """The kind below whose defaults nothing may serve; "" where the user's own questions say what may."""
        return "" if self._given else self._kind

    def _nearest(self, number: int) -> _Ranked:
        """The nearest rows (queries, k) by true distances. Pages of the map are let go on the way."""
        vectors, rows = self.vectors[number], self._rows[number]
        distances = np.full((len(self._queries), self._k), np.inf, dtype=np.float32)
        nearest = np.full(distances.shape, -1, dtype=np.int64)
        for start in range(0, len(vectors), BLOCK_ROWS):
            block = vectors[start : start + BLOCK_ROWS]
            found = ExactSearch(block, self.metric).search(self._queries, min(self._k, len(block)))
            both = np.concatenate([distances, found.distances], axis=1)
            names = np.concatenate([nearest, rows[found.labels + start]], axis=1)
            order = np.argsort(both, axis=1, kind="stable")[:, : self._k]
            distances, nearest = np.take_along_axis(both, order, axis=1), np.take_along_axis(names, order, axis=1)
            release_pages(vectors)
        return distances, nearest

    def _distances(self, number: int, labels: NDArray[np.int64]) -> _Ranked:
        """The labels found, with true distances; -1 at +inf for empty places."""
        vectors, rows = self.vectors[number], self._rows[number]
        distances = np.full(labels.shape, np.inf, dtype=np.float32)
        for i, row in enumerate(labels):
            keep = row >= 0
            distances[i, keep] = exact_distances(self._queries[i], vectors[row[keep]], self.metric)
            if i % 8 == 7:
                release_pages(vectors)  # with each row the system maps its neighbourhood too
        release_pages(vectors)
        return distances, np.where(labels < 0, -1, rows[labels])

    def certificate(self, target: float) -> tuple[Certificate | None, dict[str, Any]]:
        """The certificate, and the settings that `choose` picks; none where nothing was measured."""
        if not self._found:
            return None, {}
        points = []
        # What a kind offers may depend on the size of a shard; what all of them know can be asked of the index.
        for params in [point for point in self._points[0] if all(point in points for points in self._points)]:
            at = [points.index(params) for points in self._points]
            measured, error = self._recall([found[i] for found, i in zip(self._found, at, strict=True)])
            points.append(
                OperatingPoint(
                    params=params,
                    recall=measured,
                    recall_error=error,
                    latency_ms=round(sum(latency[i] for latency, i in zip(self._latency, at, strict=True)), 4),
                    visited=_all_told([visited[i] for visited, i in zip(self._visited, at, strict=True)]),
                )
            )
        chosen, reached = choose(points, target, self._floor())
        certificate = Certificate(
            k=self._k,
            queries=len(self._queries),
            method=self._method,
            target=target,
            reached=reached,
            points=points,
        )
        return certificate, dict(chosen.params)

    def probes(self, search: dict[str, Any]) -> list[ProbePoint]:
        """Recall where each query asks its nearest shards only, with these search settings."""
        if not self._found or self._centroids is None:
            return []
        found = [found[points.index(search)] for found, points in zip(self._found, self._points, strict=True)]
        shards = len(found)
        order = nearest_shards(self._queries, self._centroids, shards, self.metric)
        place = np.argsort(order, axis=1)  # of each shard among those that a query would ask
        measured = []
        for n in sorted({shards, *(n for n in PROBED if n < shards)}):
            asked = [
                (np.where(place[:, [number]] < n, distances, np.float32(np.inf)), rows)
                for number, (distances, rows) in enumerate(found)
            ]
            measured.append(ProbePoint(n, *self._recall(asked)))
        return measured

    def _recall(self, found: list[_Ranked]) -> tuple[float, float]:
        """Of what the shards found together: the mean, and half the width of its 95 % interval."""
        each = recall(_merged(found, self._k), _merged(self._truth, self._k)[:, self._k - 1])
        return round(float(each.mean()), 4), round(1.96 * float(each.std()) / float(np.sqrt(len(each))), 4)


def choose(points: list[OperatingPoint], target: float, kind: str) -> tuple[OperatingPoint, bool]:
    """The cheapest settings whose recall is at least `target` beyond chance, and True.

    Never below the defaults of `kind`, unless that is "": at small breadths moved rows are easier to find than what
    people ask. Where nothing reaches the target, the cheapest of those with the highest recall, and False.
    """
    thorough = [point for point in points if is_thorough(point.params, kind)] or points[-1:]
    for point in thorough:
        if point.recall - point.recall_error >= target:
            return point, True
    return max(thorough, key=lambda point: point.recall), False


def is_thorough(params: dict[str, Any], kind: str) -> bool:
    """Whether these search settings are at least the kind's defaults; all are where it is ""."""
    if not kind:
        return True
    defaults = indexes.params_dict(indexes.search_params(kind))
    return all(params.get(name, value) >= value for name, value in defaults.items())


def _all_told(visited: list[float]) -> float:
    """The sum over shards; -1 where a kind does not tell."""
    return -1.0 if min(visited) < 0 else round(sum(visited), 1)


def _merged(parts: list[_Ranked], k: int) -> Distances:
    """The k smallest distances (queries, k) of all parts; a row that two parts have counts once."""
    distances = np.concatenate([distances for distances, _ in parts], axis=1)
    rows = np.concatenate([rows for _, rows in parts], axis=1)
    order = np.lexsort((distances, rows), axis=1)
    distances, rows = np.take_along_axis(distances, order, axis=1), np.take_along_axis(rows, order, axis=1)
    distances[:, 1:][rows[:, 1:] == rows[:, :-1]] = np.inf
    distances.sort(axis=1)
    return distances[:, :k]
