"""The search behind the short way: one vector, one shard, nothing asked but the nearest. All else is question.py's."""

from __future__ import annotations

import time
from typing import Final

from vecsvc.catalog import Plan, Served
from vecsvc.distance import score
from vecsvc.manifest import Manifest
from vecsvc.question_checks import check_question, milliseconds
from vecsvc.shard import Shard
from vecsvc.types import Coverage, Hit, Limit, Neighbors, SearchAnswer, SearchSettings, Stats, TookMs, VectorQuery

MAX_K: Final = 1000  # more hits take long enough to name to hold up the event loop

_ALL: Final = Coverage(1, 1, [])


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
        and settings.probe_shards is None
    )


def quick_find(shard: Shard, plan: Plan, query: VectorQuery, k: int, deadline: float) -> tuple[Neighbors, float] | None:
    """What the shard finds, and the seconds that took; `deadline` is by time.monotonic().

    None where some place stayed empty or the search was cut short. The index checks the vector, in its own words.
    """
    if k > shard.size:
        return None
    before = time.perf_counter()
    found = shard.plain_search(query.vectors, k, plan.params, Limit(None, deadline))
    if found is None:
        # Where it was not for want of time, it would be so again, and such questions need not be searched for twice.
        plan.plain = time.monotonic() >= deadline
        return None
    return found, time.perf_counter() - before


def quick_search(
    served: Served, plan: Plan, query: VectorQuery, settings: SearchSettings, started: float, deadline: float
) -> tuple[SearchAnswer, float] | None:
    """The answer and the seconds of the search, as `quick_find`; `started` is by time.perf_counter()."""
    shard = served.shards[0]
    quick = quick_find(shard, plan, query, settings.k, deadline)
    if quick is None:
        return None
    found, seconds = quick
    [labels] = found.labels.tolist()
    [distances] = found.distances.tolist()
    [scores] = score(found.distances, shard.spec.metric).tolist()
    hits = list(map(Hit, shard.ids.of(labels), scores, distances))
    took = TookMs(milliseconds(time.perf_counter() - started), 0.0, 0.0, milliseconds(seconds), 0.0)
    stats = Stats(shard.spec.kind, int(found.visited[0]), 0)
    return SearchAnswer(hits, took, _ALL, stats, served.id), seconds
