"""Several questions of one kind in one search: what waits for a thread is answered with what waits beside it."""

from __future__ import annotations

import copy
import dataclasses
import logging
import time
from typing import Final

import msgspec
import numpy as np

from vecsvc.errors import DeadlineExceeded
from vecsvc.question import Search
from vecsvc.shard import Found
from vecsvc.types import SearchAnswer

log: Final = logging.getLogger("vecsvc.engine")


def run_together(searches: list[Search]) -> list[SearchAnswer | Exception]:
    """Answer questions that share version and settings in one search; each has its own answer or error.

    The search may take as long as the latest deadline: who has to go earlier is not waiting any more when it ends.
    """
    now, began = time.monotonic(), time.perf_counter()
    answers: dict[int, SearchAnswer | Exception] = {}
    going: dict[int, Search] = {}
    for place, search in enumerate(searches):
        search.clock.queue += began - search.waits_since
        if now < search.clock.deadline:
            going[place] = search
        else:
            answers[place] = DeadlineExceeded(
                "the deadline passed while the request waited for a thread; allow more by timeout_ms"
            )
    if len(going) > 1:
        try:
            answers |= _together(going)
        except Exception:
            log.exception("a search for several failed", extra={"data": {"questions": len(going)}})
    for place, search in going.items():
        if place not in answers:
            try:
                answers[place] = search.run(SearchAnswer)
            except Exception as error:
                answers[place] = error
    return [answers[place] for place in range(len(searches))]


def _together(going: dict[int, Search]) -> dict[int, SearchAnswer | Exception]:
    before = time.perf_counter()
    vectors = np.concatenate([search.vectors for search in going.values() if search.vectors is not None])
    last = max(going.values(), key=lambda search: search.clock.deadline)
    # One whose caller leaves has no deadline left from then on, which must not cut short what the others wait for.
    asker = copy.copy(last)
    asker.clock = dataclasses.replace(last.clock)
    found = asker.recall(vectors, {})
    seconds = time.perf_counter() - before
    answers: dict[int, SearchAnswer | Exception] = {}
    for row, (place, search) in enumerate(going.items()):
        search.together, search.clock.search = True, seconds
        try:
            answers[place] = search.answer_from([_row(part, row) for part in found if part is not None])
        except DeadlineExceeded as error:
            answers[place] = error
    return answers


def _row(found: Found, row: int) -> Found:
    """What one of several queries found; each compared as many vectors as any other."""
    n = len(found.labels)
    return msgspec.structs.replace(
        found,
        labels=found.labels[row : row + 1],
        distances=found.distances[row : row + 1],
        visited=found.visited // n if found.visited >= 0 else -1,
        hops=found.hops // n if found.hops >= 0 else -1,
    )
