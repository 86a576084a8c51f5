"""The search behind the short way: one vector, one shard, nothing asked but the nearest. All else is question.py's."""

from __future__ import annotations

import time
from typing import Final

from vecsvc.catalog import Plan, Served
from vecsvc.distance import score
from vecsvc.question_checks import check_question, milliseconds
from vecsvc.types import Coverage, Hit, Limit, SearchAnswer, SearchSettings, Stats, TookMs, VectorQuery

_ALL: Final = Coverage(1, 1, [])


def is_plain(served: Served, query: VectorQuery, settings: SearchSettings) -> bool:
    """Whether all questions by one vector with these settings are such.

    Raises InvalidRequest where such a question is never answered.
    """
    check_question(query, settings, served.manifest)
    return (
        len(served.manifest.shards) == 1
        and served.whole
        and settings.k <= served.shards[0].size
        and settings.max_visited is None
        and not (settings.conditions or settings.include or settings.exact)
        and settings.rerank_depth is None
        and settings.probe_shards is None
    )


def quick_search(
    served: Served, plan: Plan, query: VectorQuery, settings: SearchSettings, started: float, deadline: float
) -> tuple[SearchAnswer, float] | None:
    """The answer and the seconds of the search; `started` is by time.perf_counter(), `deadline` by time.monotonic().

    None where some place stayed empty or the search was cut short. The index checks the vector, in its own words.
    """
    shard = served.shards[0]
    before = time.perf_counter()
    found = shard.plain_search(query.vectors, settings.k, plan.params, Limit(None, deadline))
    if found is None:
        # Where it was not for want of time, it would be so again, and such questions need not be searched for twice.
        plan.plain = time.monotonic() >= deadline
        return None
    [labels] = found.labels.tolist()
    [distances] = found.distances.tolist()
    [scores] = score(found.distances, shard.spec.metric).tolist()
    hits = list(map(Hit, shard.ids.of(labels), scores, distances))
    now = time.perf_counter()
    took = TookMs(milliseconds(now - started), 0.0, 0.0, milliseconds(now - before), 0.0)
    stats = Stats(shard.spec.kind, int(found.visited[0]), 0)
    return SearchAnswer(hits, took, _ALL, stats, served.id), now - before
