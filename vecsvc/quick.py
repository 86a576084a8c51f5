"""The search behind the short way: one vector, one shard, nothing asked but the nearest. All else is question.py's."""

from __future__ import annotations

import time
from typing import Final

from vecsvc.catalog import Plan, Served
from vecsvc.distance import score
from vecsvc.manifest import Manifest
from vecsvc.question_checks import check_question, milliseconds
from vecsvc.remote import Part
from vecsvc.shard import Shard
from vecsvc.types import Coverage, Hit, Limit, Neighbors, SearchAnswer, SearchSettings, Stats, TookMs, VectorQuery

_ALL: Final = Coverage(1, 1, [])


def is_plain(query: VectorQuery, settings: SearchSettings, manifest: Manifest) -> bool:
    """Whether all questions by one vector with these settings want nothing of a shard but its nearest.

    Raises InvalidRequest where such a question is never answered.
    """
    check_question(query, settings, manifest)
    return (
        settings.max_visited is None
        and not (settings.conditions or settings.include or settings.exact)
        and settings.rerank_depth is None
        and settings.probe_shards is None
    )


def _found(shard: Shard, plan: Plan, query: VectorQuery, k: int, deadline: float) -> Neighbors | None:
    """What the shard finds; None where some place stayed empty or the search was cut short."""
    found = shard.plain_search(query.vectors, k, plan.params, Limit(None, deadline)) if k <= shard.size else None
    if found is None:
        # Where it was not for want of time, it would be so again, and such questions need not be searched for twice.
        plan.plain = time.monotonic() >= deadline
    return found


def quick_search(
    served: Served, plan: Plan, query: VectorQuery, settings: SearchSettings, started: float, deadline: float
) -> tuple[SearchAnswer, float] | None:
    """The answer and the seconds of the search; `started` is by time.perf_counter(), `deadline` by time.monotonic().

    None where some place stayed empty or the search was cut short. The index checks the vector, in its own words.
    """
    shard = served.shards[0]
    before = time.perf_counter()
    found = _found(shard, plan, query, settings.k, deadline)
    if found is None:
        return None
    [labels] = found.labels.tolist()
    [distances] = found.distances.tolist()
    [scores] = score(found.distances, shard.spec.metric).tolist()
    hits = list(map(Hit, shard.ids.of(labels), scores, distances))
    now = time.perf_counter()
    took = TookMs(milliseconds(now - started), 0.0, 0.0, milliseconds(now - before), 0.0)
    stats = Stats(shard.spec.kind, int(found.visited[0]), 0)
    return SearchAnswer(hits, took, _ALL, stats, served.id), now - before


def quick_part(
    shard: Shard, plan: Plan, query: VectorQuery, settings: SearchSettings, deadline: float
) -> tuple[Part, float] | None:
    """As `quick_search`: a shard's part of the answer that a front door makes."""
    before = time.perf_counter()
    found = _found(shard, plan, query, settings.k, deadline)
    if found is None:
        return None
    labels = found.labels[0]
    seconds = time.perf_counter() - before
    part = Part(
        counts=[len(labels)],
        distances=found.distances.astype("<f4", copy=False).tobytes(),
        rows=shard.rows[labels].astype("<i8", copy=False).tobytes(),
        ids=shard.ids.of(labels.tolist()),
        fields=None,
        vectors=None,
        strategy=shard.spec.kind,
        visited=int(found.visited[0]),
        stopped=False,
        queue_s=0.0,
        search_s=seconds,
        rerank_s=0.0,
        explain=None,
    )
    return part, seconds
