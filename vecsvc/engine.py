"""The use case: a question in, an answer out. Encode, recall from every shard, merge, name the ids."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, TypeVar

from vecsvc.admission import Admission, Budget
from vecsvc.catalog import Catalog, Served
from vecsvc.config import ServeSettings
from vecsvc.encoders.base import EncoderSpec, Role
from vecsvc.errors import DeadlineExceeded
from vecsvc.gather import Gather
from vecsvc.nearest import Nearest, nearest
from vecsvc.question import A, Search
from vecsvc.question_checks import INLINE_HITS, Clock, count, encoder_of, plan_of
from vecsvc.quick import is_plain, quick_find, quick_search
from vecsvc.shard import Found, Shard
from vecsvc.telemetry import Metrics
from vecsvc.together import run_together
from vecsvc.types import (
    BatchAnswer,
    Embedded,
    Query,
    SearchAnswer,
    SearchSettings,
    Stats,
    TextQuery,
    VectorQuery,
)

T = TypeVar("T")

# Who takes a part of the answer waits so much beyond the deadline for the search to notice it and stop.
PARTIAL_GRACE_S: Final = 0.05


class Engine:
    """Answers questions from a catalog, within admission and deadlines. Belongs to one event loop."""

    def __init__(self, catalog: Catalog, settings: ServeSettings, metrics: Metrics, threads: int) -> None:
        self.catalog = catalog
        self._settings = settings
        self._metrics = metrics
        self._threads = threads
        self.admission = Admission(settings.max_in_flight, settings.max_bulk_in_flight)
        self._pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="vecsvc-search")
        # Bulk waits for threads of its own, so that no question waits behind it; the cores are shared by the system.
        self._bulk_pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="vecsvc-bulk")
        self._gather: Gather[Search, SearchAnswer] = Gather(self._pool, run_together)
        self._inline_s = settings.inline_ms / 1e3

    async def search(self, name: str | None, query: Query, settings: SearchSettings) -> SearchAnswer:
        """Answer one question. Raises what errors.py lists under RequestError and ServiceError."""
        return await self._answer(name, query, settings, SearchAnswer, _as_it_is)

    async def search_batch(self, name: str | None, query: Query, settings: SearchSettings) -> BatchAnswer:
        """Answer many questions that share their settings."""
        return await self._answer(name, query, settings, BatchAnswer, _as_it_is)

    async def encoded(
        self, name: str | None, query: Query, settings: SearchSettings, kind: type[A], encode: Callable[[A], bytes]
    ) -> bytes:
        """The answer to many questions as bytes, which are made in the thread that found it, before its caches cool.

        `kind` is BatchAnswer, or ColumnsAnswer for those who want no `include`.
        """
        if settings.k * count(query) <= INLINE_HITS and not (settings.include or settings.partial):
            return await self._answer(name, query, settings, kind, encode)
        # What was found in time is answered, however long that takes to write.
        answer = await self._answer(name, query, settings, kind, _as_it_is)
        return await self.in_thread(lambda: encode(answer))

    def search_now(self, name: str | None, query: VectorQuery, settings: SearchSettings) -> SearchAnswer | None:
        """Answer one question by its vector before anything else happens in the event loop.

        None where that may take longer than `inline_ms`, or nobody knows how long, or too many wait already, or where
        what was found is not the whole answer.
        """
        if self.admission.single.full:
            return None
        started, deadline = time.perf_counter(), time.monotonic() + settings.timeout_ms / 1e3
        served = self.retained(name)
        try:
            plan = plan_of(served, settings)
            if not plan.is_short(self._inline_s):
                return None
            if plan.plain is None:
                enough = served.whole and settings.k <= min(shard.size for shard in served.shards)
                plan.plain = is_plain(query, settings, served.manifest) and enough
            if plan.plain:
                found = quick_search(served, plan, query, settings, started, deadline)
                if found is None:
                    return None
                answer, seconds = found
            else:
                clock = Clock(started, deadline)
                search = Search(served, query, settings, clock, 1)
                if not search.measurable:
                    return None
                answer = search.run(SearchAnswer)
                seconds = clock.search + clock.rerank
            plan.learn(seconds)
        finally:
            served.release()
        self._count(served, answer.stats, seconds)
        return answer

    async def _answer(
        self, name: str | None, query: Query, settings: SearchSettings, kind: type[A], make: Callable[[A], T]
    ) -> T:
        """What `make` makes of the answer, in the thread that found it."""
        clock = Clock(time.perf_counter(), time.monotonic() + settings.timeout_ms / 1e3)
        budget = self.admission.of(count(query))
        budget.check()
        served = self.retained(name)
        # From here on `work` owns both until it ends: a caller whose deadline passes leaves a search behind
        # in its thread, and that still counts, and still reads the index.
        work = _Work(budget, served)
        try:
            search = Search(served, query, settings, clock, self._threads_for(budget))
            if isinstance(query, TextQuery):
                await search.encode(query.texts)
            measurable = search.measurable

            def run() -> tuple[Stats, T]:
                answer = search.run(kind)
                return answer.stats, make(answer)

            # A hop to a thread and back costs more than a search of a graph; a long search in the event loop
            # costs everybody. So a question goes to a thread until its like was measured to be short.
            if measurable and search.plan.is_short(self._inline_s):
                stats, made = run()
            elif kind is SearchAnswer and search.shares_work:
                answer = await self._gathered(work, search)
                stats, made = answer.stats, make(answer)
            else:
                grace_s = PARTIAL_GRACE_S if settings.partial else 0.0
                stats, made = await self._in_thread(work, run, clock, grace_s)
            if measurable and not search.together:
                search.plan.learn(clock.search + clock.rerank)
        finally:
            work.leave()
        self._count(served, stats, clock.search)
        return made

    def _count(self, served: Served, stats: Stats, seconds: float) -> None:
        self._metrics.search(served.name, stats.strategy).observe(seconds)
        if stats.shortfall:
            self._metrics.shortfall(served.name).inc(stats.shortfall)

    def part_now(
        self, served: Served, shards: list[Shard], query: VectorQuery, settings: SearchSettings, deadline: float
    ) -> tuple[Nearest, int, float] | None:
        """As `search_now`: what some shards of a version that the caller has retained find, `visited`, and the seconds.

        `deadline` is by time.monotonic(); that of the settings is not looked at.
        """
        if self.admission.single.full:
            return None
        plan = plan_of(served, settings, len(shards))
        if not plan.is_short(self._inline_s):
            return None
        if plan.plain is None:
            plan.plain = is_plain(query, settings, served.manifest)
        before = time.perf_counter()
        quick = quick_find(shards, plan, query, settings.k, deadline) if plan.plain else None
        if quick is None:
            return None
        found, visited = quick
        best = nearest(shards, found, 0, settings.k)
        seconds = time.perf_counter() - before
        plan.learn(seconds)
        self._metrics.search(served.name, shards[0].spec.kind).observe(seconds)
        return best, visited, seconds

    async def search_part(
        self, served: Served, shards: list[Shard], query: VectorQuery, settings: SearchSettings, *, of: int
    ) -> tuple[Search, list[Found], Clock]:
        """What some shards of a version find, for a front door that merges it with what others do.

        `of` is how many queries the whole question has. The caller has retained `served`, and releases it. What comes
        back is read while that is so.
        """
        clock = Clock(time.perf_counter(), time.monotonic() + settings.timeout_ms / 1e3)
        budget = self.admission.of(of)
        budget.check()
        served.retain()
        work = _Work(budget, served)
        try:
            search = Search(served, query, settings, clock, self._threads_for(budget), shards)
            if search.measurable and search.plan.is_short(self._inline_s):
                found = search.find()
            else:
                # A front door that takes parts keeps so much of its time back for what the deadline cuts short.
                grace_s = min(PARTIAL_GRACE_S, settings.timeout_ms / 2.5e4) if settings.partial else 0.0
                found = await self._in_thread(work, search.find, clock, grace_s)
            if search.measurable:
                search.plan.learn(clock.search + clock.rerank)
        finally:
            work.leave()
        self._metrics.search(served.name, found[0].strategy).observe(clock.search)
        return search, found, clock

    async def embed(
        self,
        name: str | None,
        texts: list[str],
        *,
        role: Role,
        timeout_ms: float,
        check: Callable[[EncoderSpec], None] = lambda spec: None,
    ) -> Embedded:
        """The vectors that the encoder of an index makes of the texts.

        `check` sees the very encoder that will make them, and may refuse: the index may get another at any time.
        """
        budget = self.admission.of(len(texts))
        budget.check()
        served = self.retained(name)
        entered = budget.enter()
        try:
            encoder = encoder_of(served)
            check(encoder.spec)
            encoded = await encoder.encode(texts, role, deadline=time.monotonic() + timeout_ms / 1e3)
        finally:
            budget.leave(entered)
            served.release()
        return Embedded(encoded.vectors, encoded.tokens, encoded.truncated, encoder.spec.name)

    def retained(self, name: str | None) -> Served:
        """The version of `name` that serves, kept open until the caller releases it.

        A refresh in its thread may close a version just before it is retained; then the catalog has another.
        """
        while not (served := self.catalog.get(name)).retain():
            pass
        return served

    def _threads_for(self, budget: Budget) -> int:
        """Batches that run side by side share the threads that one alone may have."""
        return max(1, self._threads // budget.in_flight) if budget is self.admission.bulk else self._threads

    async def _in_thread(self, work: _Work, run: Callable[[], T], clock: Clock, grace_s: float) -> T:
        submitted = time.perf_counter()

        def timed() -> T:
            clock.queue += time.perf_counter() - submitted
            if time.monotonic() >= clock.deadline:
                raise DeadlineExceeded(
                    "the deadline passed while the request waited for a thread; allow more by timeout_ms"
                )
            return run()

        pool = self._bulk_pool if work.budget is self.admission.bulk else self._pool
        return await self._until(work, pool.submit(timed), clock, grace_s)

    async def _gathered(self, work: _Work, search: Search) -> SearchAnswer:
        """The answer of a question that may share its run with others; each waits until its own deadline."""
        search.waits_since = time.perf_counter()
        return await self._until(work, self._gather.submit(search.plan, search), search.clock, 0.0)

    async def _until(self, work: _Work, future: Future[T], clock: Clock, grace_s: float) -> T:
        """What a thread makes of it, unless the deadline passes first: then the thread ends alone.

        With what asyncio has for this (a wrapped future, a shield around it, a timeout around both) the way back from
        the thread takes twice as many turns and objects, all of them in caches that the search has emptied.
        """
        loop = asyncio.get_running_loop()
        made: asyncio.Future[T] = loop.create_future()
        waiter: asyncio.Future[T] | None = made
        work.begin()

        def over(done: Future[T]) -> None:  # not `future`, which would then hold itself, and the version
            work.leave()
            if waiter is not None and not waiter.done():
                _settle(waiter, done)

        def too_late() -> None:
            if waiter is not None and not waiter.done():
                waiter.set_exception(DeadlineExceeded("no answer within timeout_ms; ask for less, or allow more time"))

        future.add_done_callback(lambda done: None if loop.is_closed() else loop.call_soon_threadsafe(over, done))
        timer = loop.call_later(max(0.0, clock.deadline + grace_s - time.monotonic()), too_late)
        try:
            return await made
        except asyncio.CancelledError:
            clock.deadline = 0.0  # nobody waits any more: what has not begun will not, what has ends at its next look
            raise
        finally:
            timer.cancel()
            # They hold an error, whose traceback holds this frame: together they would keep the version open.
            waiter = None
            del future, made

    async def in_thread(self, run: Callable[[], T]) -> T:
        """Run something long of the service's own, outside admission."""
        return await asyncio.get_running_loop().run_in_executor(None, run)

    @property
    def in_flight(self) -> int:
        return self.admission.in_flight

    def close(self) -> None:
        for pool in (self._pool, self._bulk_pool):
            pool.shutdown(wait=True, cancel_futures=True)


class _Work:
    """Holds a place in admission and a version open until both the caller and its thread are done."""

    def __init__(self, budget: Budget, served: Served) -> None:
        self.budget, self._served = budget, served
        self._entered = budget.enter()
        self._holders = 1  # the caller; a thread is the second

    def begin(self) -> None:
        """A thread works on it, until it calls `leave` by the event loop."""
        self._holders += 1

    def leave(self) -> None:
        """The caller or the thread is done."""
        self._holders -= 1
        if not self._holders:
            self.budget.leave(self._entered)
            self._served.release()


def _settle(waiter: asyncio.Future[T], future: Future[T]) -> None:
    """Hand what became of a thread's work to who waits for it."""
    if future.cancelled():
        waiter.cancel()
    elif (error := future.exception()) is not None:
        waiter.set_exception(error)
    else:
        waiter.set_result(future.result())


def _as_it_is(answer: A) -> A:
    return answer
