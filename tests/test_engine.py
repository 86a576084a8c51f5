"""The engine without HTTP: where searches run, what ends them, what holds a version open, and what merging promises."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pytest
import service
from corpora import build, write_corpus
from service import DIM, Corpus, corpora

from vecsvc import columns, exact_search, filters, schemas
from vecsvc.catalog import MAX_SLICE, SLICE, SLICE_S, TRIES, Catalog, Plan, Served
from vecsvc.config import ServeSettings
from vecsvc.engine import PARTIAL_GRACE_S, Engine
from vecsvc.errors import (
    DeadlineExceeded,
    DimensionMismatch,
    InvalidRequest,
    InvalidVector,
    NotReady,
    Overloaded,
    UnknownId,
    UnknownIndex,
)
from vecsvc.indexes import nng
from vecsvc.question import Search
from vecsvc.question_checks import Clock
from vecsvc.shard import Shard
from vecsvc.storage import IndexFolder, Lease
from vecsvc.telemetry import Metrics
from vecsvc.together import run_together
from vecsvc.types import (
    BatchAnswer,
    ColumnsAnswer,
    IdQuery,
    Query,
    SearchAnswer,
    SearchSettings,
    TextQuery,
    VectorQuery,
)

QUERIES = service.vectors(6, seed=50)


@contextlib.contextmanager
def opened(directory: Path, threads: int = 2, **settings: Any) -> Iterator[Engine]:
    limits = ServeSettings(**settings)
    catalog = Catalog(directory, limits)
    catalog.refresh()
    assert catalog.names(), catalog.problems
    engine = Engine(catalog, limits, Metrics(), threads)
    try:
        yield engine
    finally:
        engine.close()
        catalog.close()


def vector(row: int = 0, dim: int = DIM) -> VectorQuery:
    return VectorQuery(service.vectors(row + 1, seed=51, dim=dim)[row:])


def ids(answer: SearchAnswer) -> list[Any]:
    return [hit.id for hit in answer.results]


class Spy:
    """Stands in for the index of a shard: notes the thread of each search, and can make one slow."""

    def __init__(self, engine: Engine, name: str | None = None) -> None:
        [shard] = engine.catalog.get(name).shards
        self._index = shard.index
        self.threads: list[str] = []
        self.sleep_s = 0.0
        self.gate = threading.Event()
        self.gate.set()
        shard.index = self  # type: ignore[assignment]

    def search(self, *arguments: Any, **named: Any) -> Any:
        self.threads.append("event loop" if threading.current_thread() is threading.main_thread() else "thread")
        time.sleep(self.sleep_s)
        assert self.gate.wait(20)
        return self._index.search(*arguments, **named)

    def close(self) -> None:
        self._index.close()


async def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.001)


def run(coroutine: Awaitable[Any]) -> Any:
    async def main() -> Any:
        return await coroutine

    return asyncio.run(main())


# ------------------------------------------------------------------------------------------- where searches run


def test_a_question_runs_in_a_thread_until_its_like_was_measured_to_be_short() -> None:
    async def ask(engine: Engine, spy: Spy) -> None:
        for _ in range(3):
            await engine.search(None, vector(), SearchSettings(k=5))
        assert spy.threads == ["thread", "event loop", "event loop"]
        await engine.search(None, vector(), SearchSettings(k=6))
        assert spy.threads.pop() == "thread", "another k is another question"

    with opened(service.index("products"), inline_ms=50) as engine:
        run(ask(engine, Spy(engine)))


def test_a_question_that_turns_out_long_goes_to_a_thread_again() -> None:
    async def ask(engine: Engine, spy: Spy) -> None:
        spy.sleep_s = 0.01  # so that a busy machine makes none of them twice as slow as the one before
        for _ in range(3):
            await engine.search(None, vector(), SearchSettings())
        spy.sleep_s = 0.6
        for _ in range(4):
            await engine.search(None, vector(), SearchSettings())
        assert spy.threads[2:] == ["event loop", "event loop", "event loop", "event loop", "thread"]

    with opened(service.index("products"), inline_ms=25) as engine:
        run(ask(engine, Spy(engine)))


def test_one_question_that_is_held_up_does_not_send_its_like_to_a_thread() -> None:
    async def ask(engine: Engine, spy: Spy) -> None:
        for pause in (0.0, 0.0, 0.0, 0.4, 0.0, 0.4, 0.0):
            spy.sleep_s = pause
            await engine.search(None, vector(), SearchSettings())
        assert spy.threads == ["thread"] + 6 * ["event loop"]

    with opened(service.index("products"), inline_ms=30) as engine:
        run(ask(engine, Spy(engine)))


def test_questions_near_the_limit_keep_their_way() -> None:
    plan = Plan(None)
    assert not plan.is_short(0.001)
    plan.learn(0.0009)
    assert plan.is_short(0.001)
    for _ in range(50):
        plan.learn(0.0018)
    assert plan.is_short(0.001)
    for _ in range(50):
        plan.learn(0.0022)
    assert not plan.is_short(0.001)
    for _ in range(50):
        plan.learn(0.0012)
    assert not plan.is_short(0.001)


def test_what_a_thread_makes_long_is_tried_without_one() -> None:
    """So that a first measurement in a thread does not keep its like in threads for ever."""
    plan = Plan(None)
    plan.learn(0.0018)
    tries = 0
    for _ in range(4 * TRIES):
        tries += plan.is_short(0.001)
        plan.learn(0.0018)
    assert tries == 4
    while not plan.is_short(0.001):
        plan.learn(0.0018)
    plan.learn(0.0009)  # of the one that was tried
    assert all(plan.is_short(0.001) for _ in range(TRIES))
    much_too_long = Plan(None)
    much_too_long.learn(0.0022)
    assert not any(much_too_long.is_short(0.001) for _ in range(4 * TRIES))


def test_long_searches_never_run_in_the_event_loop() -> None:
    async def ask(engine: Engine, spy: Spy) -> None:
        spy.sleep_s = 0.02
        for _ in range(5):
            await engine.search(None, vector(), SearchSettings())
        assert set(spy.threads) == {"thread"}

    with opened(service.index("products"), inline_ms=5) as engine:
        run(ask(engine, Spy(engine)))


def test_nothing_runs_in_the_event_loop_where_inline_ms_is_0() -> None:
    async def ask(engine: Engine, spy: Spy) -> None:
        for _ in range(5):
            await engine.search(None, vector(), SearchSettings())
        assert set(spy.threads) == {"thread"}

    with opened(service.index("products"), inline_ms=0) as engine:
        run(ask(engine, Spy(engine)))


@pytest.mark.parametrize(
    "query",
    [VectorQuery(service.vectors(3, seed=52)), TextQuery(["river", "cat"]), IdQuery("t-1")],
    ids=["batch", "texts", "id"],
)
def test_batches_and_ids_always_go_to_a_thread(query: Query) -> None:
    async def ask(engine: Engine, spy: Spy) -> None:
        for _ in range(4):
            await engine.search_batch(None, query, SearchSettings())
        assert set(spy.threads) == {"thread"}

    with opened(service.index("texts"), inline_ms=100) as engine:
        run(ask(engine, Spy(engine)))


def test_a_text_is_searched_like_its_vector_and_encoded_in_the_event_loop_where_that_is_short() -> None:
    async def ask(engine: Engine, spy: Spy) -> None:
        for _ in range(3):
            await engine.search(None, TextQuery(["river"]), SearchSettings())
        assert spy.threads == ["thread", "event loop", "event loop"]
        assert set(threads) == {"MainThread"}

    with opened(service.index("texts"), inline_ms=100, encoder_cache=0) as engine:
        threads = watch_runs(engine)
        run(ask(engine, Spy(engine)))
        assert len(threads) == 3


def watch_runs(engine: Engine) -> list[str]:
    """The names of the threads that run the encoder from now on."""
    encoder = engine.catalog.get(None).encoder
    assert encoder is not None
    threads: list[str] = []
    model = encoder.batcher.encoder
    original = model.run

    def noted(tokens: Any) -> Any:
        threads.append(threading.current_thread().name)
        return original(tokens)

    model.run = noted  # type: ignore[method-assign]
    return threads


def test_a_text_is_encoded_by_a_worker_where_runs_are_long() -> None:
    async def ask(engine: Engine) -> None:
        for _ in range(3):
            await engine.search(None, TextQuery(["river"]), SearchSettings())

    with opened(service.index("texts"), inline_ms=0, encoder_cache=0) as engine:
        threads = watch_runs(engine)
        run(ask(engine))
        assert len(threads) == 3 and all(name.startswith("vecsvc-encoder-") for name in threads)


def test_filters_always_go_to_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []
    evaluate = filters.evaluate

    def noted(*arguments: Any) -> Any:
        threads.append(threading.current_thread() is threading.main_thread())
        return evaluate(*arguments)

    monkeypatch.setattr(filters, "evaluate", noted)

    async def ask(engine: Engine) -> None:
        conditions = filters.parse({"year": 2000}, max_nodes=9, max_values=9)
        for _ in range(4):
            await engine.search(None, vector(), SearchSettings(conditions=conditions))

    with opened(service.index("products"), inline_ms=100) as engine:
        run(ask(engine))
    assert threads == [False] * 4


def test_what_a_batch_costs_does_not_move_single_questions_to_a_thread() -> None:
    async def ask(engine: Engine, spy: Spy) -> None:
        for _ in range(3):
            await engine.search(None, vector(), SearchSettings())
        spy.sleep_s = 0.5
        await engine.search_batch(None, VectorQuery(QUERIES), SearchSettings())
        spy.sleep_s = 0.0
        await engine.search(None, vector(), SearchSettings())
        assert spy.threads == ["thread", "event loop", "event loop", "thread", "event loop"]

    with opened(service.index("products"), inline_ms=20) as engine:
        run(ask(engine, Spy(engine)))


def test_the_event_loop_goes_on_while_a_thread_searches() -> None:
    async def ask(engine: Engine, spy: Spy) -> None:
        spy.gate.clear()
        search = asyncio.create_task(engine.search(None, vector(), SearchSettings()))
        for _ in range(20):
            await asyncio.sleep(0.001)
        assert not search.done()
        spy.gate.set()
        assert len((await search).results) == 10

    with opened(service.index("products")) as engine:
        run(ask(engine, Spy(engine)))


# ------------------------------------------------------------------------------------- deadlines and admission


def test_a_search_whose_deadline_passed_in_the_queue_never_begins() -> None:
    async def ask(engine: Engine, spy: Spy) -> None:
        spy.gate.clear()
        first = asyncio.create_task(engine.search(None, vector(), SearchSettings(timeout_ms=20_000)))
        await until(lambda: len(spy.threads) == 1)
        started = time.monotonic()
        with pytest.raises(DeadlineExceeded, match="timeout_ms"):
            await engine.search(None, vector(), SearchSettings(timeout_ms=30))
        assert time.monotonic() - started < 1
        spy.gate.set()
        await first
        await until(lambda: engine.in_flight == 0)
        assert len(spy.threads) == 1

    with opened(service.index("products"), threads=1) as engine:
        run(ask(engine, Spy(engine)))


def test_a_search_keeps_its_place_until_its_thread_ends_and_not_only_until_its_caller_left() -> None:
    async def ask(engine: Engine, spy: Spy) -> None:
        spy.gate.clear()
        with pytest.raises(DeadlineExceeded):
            await engine.search(None, vector(), SearchSettings(timeout_ms=20))
        assert engine.in_flight == 1
        with pytest.raises(Overloaded, match="1 requests are in flight, the limit max_in_flight"):
            await engine.search(None, vector(), SearchSettings())
        spy.gate.set()
        await until(lambda: engine.in_flight == 0)
        assert len((await engine.search(None, vector(), SearchSettings())).results) == 10

    with opened(service.index("products"), max_in_flight=1) as engine:
        run(ask(engine, Spy(engine)))


def test_a_caller_who_is_cancelled_leaves_his_search_counted_until_it_ends() -> None:
    async def ask(engine: Engine, spy: Spy) -> None:
        spy.gate.clear()
        search = asyncio.create_task(engine.search(None, vector(), SearchSettings()))
        await until(lambda: len(spy.threads) == 1)
        search.cancel()
        with pytest.raises(asyncio.CancelledError):
            await search
        assert engine.in_flight == 1
        spy.gate.set()
        await until(lambda: engine.in_flight == 0)

    with opened(service.index("products")) as engine:
        run(ask(engine, Spy(engine)))


def test_as_many_as_allowed_are_admitted_and_not_one_more() -> None:
    async def ask(engine: Engine, spy: Spy) -> None:
        spy.gate.clear()
        searches = [
            asyncio.create_task(engine.search(None, vector(), SearchSettings(timeout_ms=20_000))) for _ in range(5)
        ]
        await asyncio.sleep(0.01)
        assert engine.in_flight == 5
        for _ in range(3):
            with pytest.raises(Overloaded):
                await engine.search(None, vector(), SearchSettings())
        spy.gate.set()
        assert {len(answer.results) for answer in await asyncio.gather(*searches)} == {10}
        assert engine.in_flight == 0

    with opened(service.index("products"), max_in_flight=5) as engine:
        run(ask(engine, Spy(engine)))


@pytest.mark.parametrize(
    ("query", "settings", "error"),
    [
        (VectorQuery(service.vectors(1, seed=1, dim=9)), SearchSettings(), DimensionMismatch),
        (VectorQuery(np.full((1, DIM), np.nan, np.float32)), SearchSettings(), InvalidVector),
        (TextQuery(["a"]), SearchSettings(), InvalidRequest),
        (IdQuery("nobody"), SearchSettings(), UnknownId),
        (vector(), schemas.parse_search(b'{"id": 1, "params": {"nprobe": 1}}', ServeSettings())[1], InvalidRequest),
    ],
)  # fmt: skip
def test_a_refused_question_gives_its_place_back(query: Query, settings: Any, error: type[Exception]) -> None:
    async def ask(engine: Engine) -> None:
        for _ in range(3):
            with pytest.raises(error):
                await engine.search(None, query, settings)
            await until(lambda: engine.in_flight == 0)

    with opened(service.index("products"), max_in_flight=1) as engine:
        run(ask(engine))


@pytest.mark.parametrize(
    ("queries", "k", "include"),
    [(1024, 1000, ["fields"]), (1024, 1000, ["vector"]), (2, 1_000_000, []), (600, 200, ["fields", "vector"])],
)
def test_an_answer_that_would_fill_the_memory_is_refused_beforehand(queries: int, k: int, include: list[str]) -> None:
    async def ask(engine: Engine, spy: Spy) -> None:
        query = VectorQuery(service.vectors(queries, seed=53))
        with pytest.raises(
            InvalidRequest, match=f"{queries * k} hits of some [0-9]+ bytes, the limit is {2**28} bytes"
        ):
            await engine.search_batch(None, query, SearchSettings(k=k, include=frozenset(include)))
        assert not spy.threads and engine.in_flight == 0

    with opened(service.index("products")) as engine:
        run(ask(engine, Spy(engine)))


@pytest.mark.parametrize(
    "settings",
    [
        SearchSettings(timeout_ms=300, include=frozenset(("fields",))),
        SearchSettings(timeout_ms=300, partial=True),
        SearchSettings(timeout_ms=300, k=4000),
    ],
    ids=["fields", "partial", "many hits"],
)
def test_what_was_found_in_time_is_answered_however_long_it_takes_to_write(settings: SearchSettings) -> None:
    def write(answer: BatchAnswer) -> bytes:
        time.sleep(0.5)
        return b"%d" % len(answer.results)

    with opened(service.index("products")) as engine:
        query = VectorQuery(service.vectors(3, seed=53))
        assert run(engine.encoded(None, query, settings, BatchAnswer, write)) == b"3"


def test_one_that_leaves_a_shared_search_does_not_cut_it_short_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = SearchSettings(k=5, exact=True)
    with opened(service.index("sharded")) as engine:
        served = engine.retained(None)
        try:
            queries = service.vectors(3, seed=57)
            now = time.monotonic()
            searches = [
                Search(served, VectorQuery(row[None]), settings, Clock(0.0, now + 30 + at), 1)
                for at, row in enumerate(queries)
            ]
            expected = [
                Search(served, VectorQuery(row[None]), settings, Clock(0.0, now + 30), 1).run(SearchAnswer)
                for row in queries
            ]
            search = Shard.search

            def leaves(*given: Any, **named: Any) -> Any:
                searches[-1].clock.deadline = 0.0
                return search(*given, **named)

            monkeypatch.setattr(Shard, "search", leaves)
            found = run_together(searches)
        finally:
            served.release()
    for answer, alone in zip(found[:2], expected[:2], strict=True):
        assert isinstance(answer, SearchAnswer) and answer.coverage == alone.coverage
        assert [hit.id for hit in answer.results] == [hit.id for hit in alone.results]


@pytest.mark.parametrize("kind", [BatchAnswer, ColumnsAnswer])
def test_a_short_answer_is_written_in_the_thread_that_found_it(kind: Any) -> None:
    def write(answer: Any) -> bytes:
        return threading.current_thread().name.encode()

    with opened(service.index("products")) as engine:
        query = VectorQuery(service.vectors(3, seed=53))
        assert run(engine.encoded(None, query, SearchSettings(), kind, write)).startswith(b"vecsvc-search")


def test_the_largest_batch_of_the_largest_k_is_answered_where_nothing_more_is_asked_for() -> None:
    limits = ServeSettings()
    with opened(service.index("texts")) as engine:
        query = VectorQuery(service.vectors(limits.max_batch, seed=53))
        answer = run(engine.search_batch(None, query, SearchSettings(k=limits.max_k, timeout_ms=60_000)))
    assert {len(found) for found in answer.results} == {60}


def test_a_question_that_fails_comes_late_or_is_called_off_holds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What holds itself waits for the garbage collector, and keeps a version open that nobody serves any more."""
    made: list[weakref.ref[Search]] = []
    begin = Search.__init__

    def remembered(self: Search, *arguments: Any, **named: Any) -> None:
        made.append(weakref.ref(self))
        begin(self, *arguments, **named)

    monkeypatch.setattr(Search, "__init__", remembered)
    bad = service.vectors(3, seed=1)
    bad[1, 0] = np.nan

    async def ask(engine: Engine) -> None:
        with pytest.raises(InvalidVector):
            await engine.search_batch(None, VectorQuery(bad), SearchSettings())
        run_search = Search.run
        monkeypatch.setattr(Search, "run", lambda self, kind: (time.sleep(0.1), run_search(self, kind))[1])
        with pytest.raises(DeadlineExceeded):
            await engine.search_batch(None, VectorQuery(service.vectors(3, seed=1)), SearchSettings(timeout_ms=20))
        task = asyncio.ensure_future(
            engine.search_batch(None, VectorQuery(service.vectors(3, seed=1)), SearchSettings())
        )
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        del task
        await asyncio.sleep(0.3)

    gc.collect()
    gc.disable()
    try:
        with opened(service.index("products")) as engine:
            run(ask(engine))
            assert len(made) == 3 and [reference() for reference in made] == [None, None, None]
            assert engine.in_flight == 0
    finally:
        gc.enable()


def test_a_search_that_fails_tells_its_caller_only(monkeypatch: pytest.MonkeyPatch) -> None:
    async def ask(engine: Engine) -> None:
        [shard] = engine.catalog.get(None).shards
        good = shard.index

        class Broken:
            def search(self, *arguments: Any, **named: Any) -> Any:
                raise RuntimeError("the library gave up")

        shard.index = Broken()  # type: ignore[assignment]
        with pytest.raises(RuntimeError, match="gave up"):
            await engine.search(None, vector(), SearchSettings())
        shard.index = good
        assert engine.in_flight == 0
        assert len((await engine.search(None, vector(), SearchSettings())).results) == 10

    with opened(service.index("products"), max_in_flight=1) as engine:
        run(ask(engine))


@pytest.fixture
def slow_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact search goes through the rows ten at a time, and takes 5 ms for each ten."""
    bounds = exact_search.lower_bounds

    def slow(*arguments: Any) -> Any:
        time.sleep(0.005)
        return bounds(*arguments)

    monkeypatch.setattr(exact_search, "lower_bounds", slow)
    monkeypatch.setattr(exact_search, "block_rows", lambda dim: 10)


@pytest.mark.usefixtures("slow_blocks")
def test_a_deadline_in_the_middle_of_a_search_is_504_or_a_part_of_the_answer_as_was_asked() -> None:
    async def ask(engine: Engine) -> None:
        started = time.monotonic()
        settings = SearchSettings(k=3, exact=True, timeout_ms=80, partial=True)
        answer = await engine.search(None, vector(), settings)
        assert time.monotonic() - started < 0.08 + PARTIAL_GRACE_S + 0.05
        assert answer.coverage.degraded == ["the search was cut short"]
        seen = answer.stats.visited
        assert 10 <= seen < 400 and seen % 10 == 0
        corpus = corpora()["products"]
        first = Corpus(corpus.ids[:seen], corpus.vectors[:seen], corpus.fields[:seen], corpus.metric)
        assert ids(answer) == first.ids_of(vector().vectors[0], 3)
        await until(lambda: engine.in_flight == 0)
        with pytest.raises(DeadlineExceeded, match="timeout_ms"):
            await engine.search(None, vector(), SearchSettings(k=3, exact=True, timeout_ms=80))

    with opened(service.index("products")) as engine:
        run(ask(engine))


# --------------------------------------------------------------------------------------------------- versions


@pytest.fixture
def demo(tmp_path: Path) -> IndexFolder:
    for number in (1, 2):
        corpus = Corpus([f"v{number}-{i}" for i in range(30)], service.vectors(30, seed=60 + number), [], "l2")
        service.build(corpus, tmp_path, "demo", f"v{number}", kind="exact", metric="l2")
    folder = IndexFolder(tmp_path / "demo")
    folder.serve("v1")
    return folder


def is_held(folder: IndexFolder, version: str) -> bool:
    lease = Lease.take(folder.path / version, exclusive=True)
    if lease is not None:
        lease.release()
    return lease is None


def test_a_retired_version_closes_after_its_last_search(demo: IndexFolder) -> None:
    async def ask(engine: Engine, spy: Spy) -> None:
        spy.gate.clear()
        searches = [asyncio.create_task(engine.search(None, vector(), SearchSettings())) for _ in range(2)]
        await until(lambda: len(spy.threads) == 2)
        demo.serve("v2")
        assert engine.catalog.refresh() == [("demo", "v2")]
        assert ids(await engine.search(None, vector(), SearchSettings(k=1)))[0].startswith("v2-")
        assert is_held(demo, "v1") and is_held(demo, "v2")
        spy.gate.set()
        for search in searches:
            answer = await search
            assert answer.index.version == "v1" and all(id.startswith("v1-") for id in ids(answer))
        await until(lambda: not is_held(demo, "v1"))
        assert is_held(demo, "v2")

    with opened(demo.path, threads=4) as engine:
        run(ask(engine, Spy(engine)))
    assert not is_held(demo, "v2")


def test_a_version_whose_caller_left_is_held_until_the_search_ends(demo: IndexFolder) -> None:
    async def ask(engine: Engine, spy: Spy) -> None:
        spy.gate.clear()
        with pytest.raises(DeadlineExceeded):
            await engine.search(None, vector(), SearchSettings(timeout_ms=20))
        demo.serve("v2")
        engine.catalog.refresh()
        assert is_held(demo, "v1")
        spy.gate.set()
        await until(lambda: not is_held(demo, "v1"))

    with opened(demo.path) as engine:
        run(ask(engine, Spy(engine)))


def test_a_swap_between_looking_up_a_version_and_holding_it_is_noticed(
    demo: IndexFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    retain = Served.retain

    def swapped_before(served: Served) -> bool:
        if demo.current() == "v1":
            demo.serve("v2")
            engine.catalog.refresh()
        return retain(served)

    with opened(demo.path) as engine:
        monkeypatch.setattr(Served, "retain", swapped_before)
        answer = run(engine.search(None, vector(), SearchSettings(k=30)))
    assert answer.index.version == "v2" and len(answer.results) == 30
    assert not is_held(demo, "v1")


def test_an_index_that_is_not_there_and_one_that_is_not_ready_are_told_apart(demo: IndexFolder) -> None:
    with opened(demo.path.parent) as engine:
        with pytest.raises(UnknownIndex, match="no index 'other'; served are: demo"):
            run(engine.search("other", vector(), SearchSettings()))
        (demo.path.parent / "late" / "v1").mkdir(parents=True)
        (demo.path.parent / "late" / "v1" / "manifest.json").write_text("{}")
        engine.catalog.refresh()
        with pytest.raises(NotReady, match=r"index 'late' is not ready: .*no version serves; let one of v1 serve"):
            run(engine.search("late", vector(), SearchSettings()))
        assert ids(run(engine.search("demo", vector(), SearchSettings(k=1))))


# ------------------------------------------------------------------------------------------------- what comes out


@pytest.mark.parametrize("name", ["products", "numbers", "sharded", "squared"])
@pytest.mark.parametrize(
    "settings",
    [
        SearchSettings(k=7),
        SearchSettings(k=7, exact=True),
        SearchSettings(k=7, include=frozenset(["fields", "vector"])),
    ],
    ids=["index", "exact", "include"],
)
def test_a_batch_is_its_singles(name: str, settings: SearchSettings) -> None:
    async def ask(engine: Engine) -> None:
        batch = await engine.search_batch(None, VectorQuery(QUERIES), settings)
        singles = [await engine.search(None, VectorQuery(row[None]), settings) for row in QUERIES]
        assert batch.results == [single.results for single in singles]
        if singles[0].stats.visited >= 0:
            assert batch.stats.visited == sum(single.stats.visited for single in singles)

    with opened(service.index(name)) as engine:
        run(ask(engine))


@pytest.mark.parametrize("k", [1, 3, 4, 5, 50, 400])
def test_the_number_of_shards_changes_no_answer_though_nearly_everything_is_a_tie(tmp_path: Path, k: int) -> None:
    corpus = corpora()["sharded"]
    folder = service.work_folder() / "one-shard"
    if not folder.exists():
        service.build(corpus, folder, "whole", kind=service.GRAPH, metric="cosine", fields="part")
    settings = SearchSettings(k=k, exact=True)

    async def ask(engine: Engine) -> list[list[tuple[Any, float]]]:
        questions = [*corpus.vectors[:10], *QUERIES]
        answers = [await engine.search(None, VectorQuery(query[None]), settings) for query in questions]
        return [[(hit.id, hit.distance) for hit in answer.results] for answer in answers]

    with opened(service.index("sharded")) as three, opened(folder) as one:
        split, whole = run(ask(three)), run(ask(one))
    assert split == whole
    assert whole == [corpus.nearest(query, k) for query in [*corpus.vectors[:10], *QUERIES]]


def test_explain_says_what_every_shard_did() -> None:
    conditions = filters.parse({"part": {"$in": [0, 2]}}, max_nodes=9, max_values=9)
    settings = SearchSettings(k=5, conditions=conditions, include=frozenset(["explain"]))
    with opened(service.index("sharded")) as engine:
        answer = run(engine.search(None, vector(), settings))
        sizes = [shard.size for shard in engine.catalog.get(None).shards]
    assert [(part.shard, part.size, part.strategy) for part in answer.explain] == [
        (number, size, "exact") for number, size in enumerate(sizes)
    ]
    assert sum(part.allowed for part in answer.explain) == sum(part.visited for part in answer.explain) == 200
    assert answer.stats.visited == 200 and all(part.took_ms >= 0 for part in answer.explain)
    assert [part.hops for part in answer.explain] == [-1, -1, -1]  # only a walk makes hops


def test_explain_counts_the_hops_of_a_walk_over_all_slices_of_a_batch(tmp_path: Path) -> None:
    corpus = Corpus(list(range(500)), service.vectors(500, seed=71), [], "l2")
    service.build(corpus, tmp_path, "demo", kind="nng", metric="l2")
    settings = SearchSettings(k=5, include=frozenset(["explain"]))
    many = VectorQuery(service.vectors(150, seed=72))
    with opened(tmp_path) as engine:
        batch = run(engine.search_batch(None, many, settings)).explain[0]
        alone = [run(engine.search(None, VectorQuery(q[None]), settings)).explain[0].hops for q in many.vectors]
    assert batch.hops == sum(alone) and min(alone) >= 64 and batch.visited > batch.hops


def test_the_strategy_says_what_a_filter_made_of_the_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = Corpus(list(range(600)), service.vectors(600, seed=73), [{"part": i % 10} for i in range(600)], "l2")
    service.build(corpus, tmp_path, "demo", kind="nng", metric="l2", fields="part")
    all_but_one = filters.parse({"part": {"$ne": 3}}, max_nodes=9, max_values=9)
    with opened(tmp_path) as engine:

        def strategy(conditions: Any = ()) -> str:
            return run(engine.search(None, vector(), SearchSettings(conditions=conditions))).stats.strategy

        assert (strategy(), strategy(all_but_one)) == ("nng", "exact")
        monkeypatch.setattr(nng, "COMPARE_UP_TO", 0)
        assert strategy(all_but_one) == "scan"
        monkeypatch.setattr(nng, "SCAN_A_PLACE", 0.1)
        assert strategy(all_but_one) == "nng"


def test_where_the_time_went_adds_up_to_no_more_than_the_total() -> None:
    with opened(service.index("texts")) as engine:
        took = run(engine.search(None, TextQuery(["river"]), SearchSettings(rerank_depth=20))).took_ms
    assert took.encode > 0 and took.search > 0 and took.rerank > 0
    assert took.queue + took.encode + took.search + took.rerank <= took.total + 0.01


@pytest.mark.parametrize("inline_ms", [0, 100])
def test_texts_in_any_number_get_the_answers_of_their_vectors(inline_ms: float) -> None:
    texts = ["river cloud", "music", "cat " * 3, "river cloud", "bread fire stone water"]

    async def ask(engine: Engine) -> None:
        vectors = (await engine.embed(None, texts, role="query", timeout_ms=20_000)).vectors
        expected = await engine.search_batch(None, VectorQuery(vectors), SearchSettings(k=5))
        for _ in range(2):
            batch = await engine.search_batch(None, TextQuery(texts), SearchSettings(k=5))
            singles = [await engine.search(None, TextQuery([text]), SearchSettings(k=5)) for text in texts]
            for found, single, wanted in zip(batch.results, singles, expected.results, strict=True):
                assert [hit.id for hit in found] == [hit.id for hit in single.results] == [hit.id for hit in wanted]
            assert batch.encoder == "tiny"

    with opened(service.index("texts"), inline_ms=inline_ms) as engine:
        run(ask(engine))


def test_an_answer_says_which_texts_were_cut() -> None:
    long, short = "river " * 100, "river"

    async def ask(engine: Engine) -> None:
        for _ in range(2):  # the second time a short one may come from the cache
            one = await engine.search(None, TextQuery([long]), SearchSettings(k=3))
            assert one.coverage.degraded == ["the text was cut at 24 tokens"]
            assert (await engine.search(None, TextQuery([short]), SearchSettings(k=3))).coverage.degraded == []
            some = await engine.search_batch(None, TextQuery([short, long, short, long]), SearchSettings(k=3))
            assert some.coverage.degraded == ["cut at 24 tokens: texts 1, 3"]
            many = await engine.search_batch(None, TextQuery([long] * 12), SearchSettings(k=3))
            assert many.coverage.degraded == ["cut at 24 tokens: texts 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more"]

    with opened(service.index("texts")) as engine:
        run(ask(engine))


def test_texts_are_embedded_with_their_tokens_and_whether_they_were_cut() -> None:
    async def ask(engine: Engine) -> None:
        texts = ["river", "", "cat " * 500, "\x00\x07 😀"]
        found = await engine.embed("texts", texts, role="passage", timeout_ms=20_000)
        assert found.vectors.shape == (4, DIM) and found.encoder == "tiny"
        assert found.tokens[:3] == [3, 2, 24] and found.truncated == [False, False, True, False]
        np.testing.assert_allclose(found.vectors[0], corpus_vector(engine, "river"), atol=1e-5)
        assert (await engine.embed("texts", [], role="query", timeout_ms=100)).vectors.shape[0] == 0
        with pytest.raises(InvalidRequest, match="text 1 has a lone surrogate"):
            await engine.embed("texts", ["a", "\ud800"], role="query", timeout_ms=20_000)
        with pytest.raises(DeadlineExceeded):
            await engine.embed("texts", ["river"] * 100, role="passage", timeout_ms=0.0)
        assert engine.in_flight == 0

    with opened(service.index("texts")) as engine:
        run(ask(engine))
    with opened(service.index("products")) as engine, pytest.raises(InvalidRequest, match="has no encoder"):
        run(engine.embed(None, ["a"], role="query", timeout_ms=1000))


def corpus_vector(engine: Engine, text: str) -> Any:
    encoder = engine.catalog.get(None).encoder
    assert encoder is not None
    return encoder.encode_now([text])[0]


def test_a_caller_who_is_cancelled_while_his_text_waits_gives_everything_back() -> None:
    async def ask(engine: Engine) -> None:
        encoder = engine.catalog.get(None).encoder
        assert encoder is not None
        gate, model = threading.Event(), encoder.batcher.encoder
        original, entered = model.run, []

        def held(tokens: Any) -> Any:
            entered.append(tokens)
            assert gate.wait(20)
            return original(tokens)

        model.run = held  # type: ignore[method-assign]
        settings = SearchSettings(timeout_ms=20_000)
        first = asyncio.create_task(engine.search(None, TextQuery(["river"]), settings))
        await until(lambda: bool(entered))
        second = asyncio.create_task(engine.search(None, TextQuery(["cat"]), settings))
        await until(lambda: encoder.batcher.waiting_tokens > 0)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        assert engine.in_flight == 1
        gate.set()
        assert len((await first).results) == 10
        assert engine.in_flight == 0

    with opened(service.index("texts"), inline_ms=0, encoder_cache=0, encoder_instances=1) as engine:
        run(ask(engine))


def test_shortfall_counts_the_places_that_stayed_empty() -> None:
    with opened(service.index("texts")) as engine:
        assert run(engine.search(None, vector(), SearchSettings(k=100))).stats.shortfall == 40
        batch = run(engine.search_batch(None, VectorQuery(QUERIES), SearchSettings(k=100)))
        assert batch.stats.shortfall == 40 * len(QUERIES)
        assert run(engine.search(None, IdQuery("t-1"), SearchSettings(k=60))).stats.shortfall == 1


def test_stored_fields_come_back_in_the_order_of_the_corpus(tmp_path: Path) -> None:
    fields = [{"zebra": i, "apple": str(i), "mango": i / 2} for i in range(20)]
    corpus = Corpus(list(range(20)), service.vectors(20, seed=70), fields, "ip")
    service.build(corpus, tmp_path, "demo", kind="exact", metric="ip", fields="zebra,apple,mango")
    with opened(tmp_path) as engine:
        answer = run(engine.search(None, vector(), SearchSettings(k=20, include=frozenset(["fields"]))))
    for hit in answer.results:
        assert hit.fields == fields[hit.id] and list(hit.fields) == ["zebra", "apple", "mango"]


# ------------------------------------------------------------------------------------------- the short way


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("kind", ["exact", "hnsw", "nng", "kd_tree", "tp_tree", "faiss"])
def test_what_is_refused_is_refused_at_once_too(tmp_path: Path, kind: str, metric: str) -> None:
    """Whether or not its like was measured to be short, a vector is right or wrong."""
    pytest.importorskip({"hnsw": "hnswlib", "faiss": "faiss"}.get(kind, "numpy"))
    if kind == "kd_tree" and metric == "ip":
        pytest.skip("kd_tree knows no ip")
    corpus = write_corpus(tmp_path / "c.parquet", n=300, dim=8)
    build(corpus, tmp_path / "out", name="c", kind=kind, metric=metric)
    with opened(tmp_path / "out", inline_ms=100) as engine:
        settings = SearchSettings(k=3)
        good = VectorQuery(service.vectors(1, seed=53)[:, :8].copy())

        async def ask() -> None:
            for _ in range(2):
                await engine.search(None, good, settings)
            answer = engine.search_now(None, good, settings)
            assert answer is not None and answer.results == (await engine.search(None, good, settings)).results
            for value in (1e16, 1e17, 3e38, np.inf, np.nan):
                bad = VectorQuery(np.array([[0, value, 0, 0, 0, 0, 0, 1]], np.float32))
                with pytest.raises(InvalidVector):
                    await engine.search(None, bad, settings)
                with pytest.raises(InvalidVector):
                    engine.search_now(None, bad, settings)

        asyncio.run(ask())


def test_what_cannot_be_whole_is_searched_for_once(tmp_path: Path) -> None:
    build(write_corpus(tmp_path / "c.parquet", n=20, dim=8), tmp_path / "out", name="c", kind="exact")
    with opened(tmp_path / "out", inline_ms=100) as engine:
        spy = Spy(engine)
        good = VectorQuery(service.vectors(1, seed=53)[:, :8].copy())

        async def ask() -> None:
            for settings in (SearchSettings(k=30), SearchSettings(k=3, max_visited=5)):
                for _ in range(2):
                    await engine.search(None, good, settings)
                before = len(spy.threads)
                answer = engine.search_now(None, good, settings)
                assert answer is not None and answer == msgspec.structs.replace(
                    await engine.search(None, good, settings), took_ms=answer.took_ms
                )
                assert len(spy.threads) == before + 2

        asyncio.run(ask())


# ------------------------------------------------------------------------------------ what a deadline leaves


def cut_after(spy: Spy, search: Search, slices: int) -> None:
    """The deadline passes while so many slices of a batch are searched."""
    searching, asked = spy.search, [0]

    def counting(*arguments: Any, **named: Any) -> Any:
        asked[0] += 1
        if asked[0] == slices:
            search.clock.deadline = 0.0
        return searching(*arguments, **{**named, "limit": None})

    spy.search = counting  # type: ignore[method-assign]


def test_slices_of_a_batch_grow_while_they_are_quick_and_shrink_at_once() -> None:
    plan = Plan(None)
    plan.learn_slice(SLICE - 1, 1e-6)
    assert plan.slice == SLICE, "so few say little"
    grown = []
    while plan.slice < MAX_SLICE:
        plan.learn_slice(plan.slice, 0.0)
        grown.append(plan.slice)
    assert grown == [SLICE << n for n in range(1, len(grown) + 1)]
    plan.learn_slice(MAX_SLICE, 4 * SLICE_S)
    assert plan.slice == MAX_SLICE // 4
    plan.learn_slice(SLICE, 60.0)
    assert plan.slice == SLICE


@pytest.mark.parametrize("kind", [BatchAnswer, ColumnsAnswer])
def test_a_batch_that_takes_parts_keeps_what_was_found_before_the_deadline(
    kind: type[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vecsvc.catalog.MAX_SLICE", SLICE)  # however quick they are
    with opened(service.index("products")) as engine:
        spy = Spy(engine)
        served = engine.catalog.get(None)
        queries = VectorQuery(service.vectors(200, seed=52))

        def search(partial: bool) -> Search:
            made = Search(served, queries, SearchSettings(k=3, partial=partial), Clock(0.0, time.monotonic() + 60), 1)
            cut_after(spy, made, 2)
            return made

        answer = search(True).run(kind)
        if kind is BatchAnswer:
            assert [len(hits) for hits in answer.results] == 128 * [3] + 72 * [0]
        else:
            table = pa.ipc.open_stream(columns.stream(answer.results, b"{}")).read_all()
            queries_of_hits = table["query"].to_pylist()
            assert queries_of_hits == [row for row in range(128) for _ in range(3)]
        assert answer.coverage.degraded == ["the search was cut short"]
        assert answer.stats.shortfall == 72 * 3
        with pytest.raises(DeadlineExceeded, match="the deadline passed after 128 of 200 queries"):
            search(False).run(kind)
        [part] = search(True).find()
        assert part.labels.shape == (200, 3) and part.stopped
        assert (part.labels[:128] >= 0).all() and (part.labels[128:] == -1).all()
        assert np.isinf(part.distances[128:]).all()


def test_what_a_question_costs_is_known_by_the_shards_that_it_asks() -> None:
    with opened(service.index("sharded")) as engine:
        served = engine.catalog.get(None)
        settings = SearchSettings()
        assert served.plan(settings) is served.plan(settings)
        served.plan(settings, 1).learn(0.001)
        assert served.plan(settings).seconds is None and served.plan(settings, 2).seconds is None
