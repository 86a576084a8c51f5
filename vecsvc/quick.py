"""The search behind the short way: of one vector, nothing asked but the nearest. All else is question.py's."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Final

from vecsvc.catalog import Plan, Served
from vecsvc.distance import score
from vecsvc.manifest import Manifest
from vecsvc.nearest import nearest
from vecsvc.question_checks import check_question, check_vectors, milliseconds
from vecsvc.ranking import nearest_shards
from vecsvc.shard import Shard
from vecsvc.types import (
    MAX_SHARDS,
    Coverage,
    Hit,
    Limit,
    Neighbors,
    SearchAnswer,
    SearchSettings,
    Stats,
    TookMs,
    VectorQuery,
)

MAX_K: Final = 1000  # more hits take long enough to name to hold up the event loop

_WHOLE: Final = [Coverage(n, n, []) for n in range(MAX_SHARDS + 1)]


def is_plain(query: VectorQuery, settings: SearchSettings, manifest: Manifest) -> bool:
    """Whether all questions by one vector with these settings want nothing of a shard but its nearest.

    Raises InvalidRequest where such a question is never answered.
    """
    check_question(query, settings, manifest)
    return (
        settings.k <= MAX_K
        and settings.max_visited is None
        and not (settings.conditions or settings.include or settings.exact)
        and settings.rerank_depth is None
    )


def quick_find(
    shards: Sequence[Shard], plan: Plan, query: VectorQuery, k: int, deadline: float
) -> tuple[list[Neighbors], int] | None:
    """What each of the shards finds, one behind the other, and `visited` of all; `deadline` is by time.monotonic().

    None where some place stayed empty or the search was cut short. The index checks the vector, in its own words.
    """
    for shard in shards:
        if k > shard.size:
            return None
    found: list[Neighbors] = []
    visited, limit = 0, Limit(None, deadline)
    for shard in shards:
        part = shard.index.search(query.vectors, k, plan.params, limit=limit)
        if part.labels[0, -1] < 0 or part.stopped[0]:
            # Where it was not for want of time it would be so again, and such questions need not be searched for twice.
            plan.plain = time.monotonic() >= deadline
            return None
        found.append(part)
        seen = int(part.visited[0])
        visited = -1 if seen < 0 or visited < 0 else visited + seen
    return found, visited


def quick_search(
    served: Served, plan: Plan, query: VectorQuery, settings: SearchSettings, started: float, deadline: float
) -> tuple[SearchAnswer, float] | None:
    """The answer of a whole version, and the seconds of the search; `started` is by time.perf_counter().

    None as with `quick_find`.
    """
    before = time.perf_counter()
    shards, manifest = served.shards, served.manifest
    if settings.probe_shards is not None and served.centroids is not None:
        check_vectors(query.vectors, manifest)
        [numbers] = nearest_shards(query.vectors, served.centroids, settings.probe_shards, manifest.metric).tolist()
        shards = [shards[number] for number in numbers]
    quick = quick_find(shards, plan, query, settings.k, deadline)
    if quick is None:
        return None
    found, visited = quick
    asked = len(shards)
    if asked == 1:  # whose order is the answer's
        [labels] = found[0].labels.tolist()
        ids, kept = shards[0].ids.of(labels), found[0].distances[0]
    else:
        best = nearest(shards, found, 0, settings.k)
        ids, kept = best.ids, best.distances
    seconds = time.perf_counter() - before  # merging many shards may take as long as searching them
    hits = list(map(Hit, ids, score(kept, shards[0].spec.metric).tolist(), kept.tolist()))
    took = TookMs(milliseconds(time.perf_counter() - started), 0.0, 0.0, milliseconds(seconds), 0.0)
    stats = Stats(shards[0].spec.kind, visited, 0)
    return SearchAnswer(hits, took, _WHOLE[asked], stats, served.id), seconds
