"""What waits for a thread goes together, what need not wait goes at once, and an error reaches its own caller alone."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import service
from service import DIM
from test_engine import opened, until

from vecsvc.engine import Engine
from vecsvc.errors import DeadlineExceeded
from vecsvc.gather import Gather
from vecsvc.types import Limit, SearchAnswer, SearchSettings, VectorQuery

WAIT_S = 10.0


class Runs:
    """Squares numbers, and notes which came together; the first run waits for `gate`."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.began = threading.Event()
        self.together: list[list[int]] = []

    def __call__(self, numbers: list[int]) -> list[int | Exception]:
        self.together.append(numbers)
        self.began.set()
        assert self.gate.wait(WAIT_S)
        return [ValueError(f"{n} is odd") if n % 2 else n * n for n in numbers]


@pytest.fixture
def runs() -> Runs:
    return Runs()


def test_what_waits_under_one_key_goes_together_within_the_limit(runs: Runs) -> None:
    with ThreadPoolExecutor(1) as pool:
        gather: Gather[int, int] = Gather(pool, runs, limit=3)
        first = gather.submit("a", 2)
        assert runs.began.wait(WAIT_S)
        futures = [gather.submit("a", n) for n in (4, 6, 8, 10)] + [gather.submit("b", 12)]
        runs.gate.set()
        assert [f.result(WAIT_S) for f in (first, *futures)] == [4, 16, 36, 64, 100, 144]
    assert runs.together == [[2], [4, 6, 8], [10], [12]]


def test_with_threads_free_each_goes_alone(runs: Runs) -> None:
    runs.gate.set()
    with ThreadPoolExecutor(2) as pool:
        gather: Gather[int, int] = Gather(pool, runs)
        for n in (2, 4, 6):
            assert gather.submit("a", n).result(WAIT_S) == n * n
    assert runs.together == [[2], [4], [6]]


def test_an_error_reaches_its_own_caller_alone_and_who_left_is_not_asked_for(runs: Runs) -> None:
    with ThreadPoolExecutor(1) as pool:
        gather: Gather[int, int] = Gather(pool, runs)
        gather.submit("a", 2)
        assert runs.began.wait(WAIT_S)
        good, bad, gone = (gather.submit("a", n) for n in (4, 5, 6))
        assert gone.cancel()
        runs.gate.set()
        assert good.result(WAIT_S) == 16
        with pytest.raises(ValueError, match="5 is odd"):
            bad.result(WAIT_S)
    assert runs.together[1] == [4, 5]


def test_a_run_that_fails_whole_tells_all_and_the_next_one_goes_on() -> None:
    answers: list[Any] = [[1], RuntimeError("a bug"), [3]]

    def run(numbers: list[int]) -> list[int | Exception]:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer  # type: ignore[no-any-return]

    with ThreadPoolExecutor(1) as pool:
        gather: Gather[int, int] = Gather(pool, run)
        assert gather.submit("a", 1).result(WAIT_S) == 1
        with pytest.raises(RuntimeError, match="a bug"):
            gather.submit("a", 2).result(WAIT_S)
        assert gather.submit("a", 3).result(WAIT_S) == 3


def test_what_still_waits_when_the_pool_closes_is_cancelled(runs: Runs) -> None:
    pool = ThreadPoolExecutor(1)
    gather: Gather[int, int] = Gather(pool, runs)
    first = gather.submit("a", 2)
    assert runs.began.wait(WAIT_S)
    waiting: list[Future[int]] = [gather.submit("a", 4), gather.submit("a", 6)]
    closing = threading.Thread(target=lambda: pool.shutdown(wait=True, cancel_futures=True))
    closing.start()
    for future in waiting:
        with pytest.raises(CancelledError):
            future.result(WAIT_S)
    runs.gate.set()
    closing.join()
    assert first.result(WAIT_S) == 4


# ------------------------------------------------------------------------------------------------- in the engine


class Slow:
    """Stands in for an exact index: notes how many queries came at once, and holds the first until `gate`."""

    shares_work = True

    def __init__(self, engine: Engine, name: str | None = None) -> None:
        [shard] = engine.catalog.get(name).shards
        self._index = shard.index
        self.queries: list[int] = []
        self.limits: list[Limit] = []
        self.gate = threading.Event()
        self.fails_together = False
        shard.index = self  # type: ignore[assignment]

    def search(self, queries: Any, *arguments: Any, limit: Limit, **named: Any) -> Any:
        self.queries.append(len(queries))
        self.limits.append(limit)
        assert self.gate.wait(WAIT_S)
        if self.fails_together and len(queries) > 1:
            raise RuntimeError("not more than one")
        return self._index.search(queries, *arguments, limit=limit, **named)

    def close(self) -> None:
        self._index.close()


def question(row: int) -> VectorQuery:
    return VectorQuery(service.vectors(20, seed=61)[row : row + 1])


async def ask_together(
    engine: Engine, index: Slow, settings: list[SearchSettings]
) -> list[SearchAnswer | BaseException]:
    """The answers of questions of which all but the first come while that one searches."""
    asked = [asyncio.create_task(engine.search(None, question(0), settings[0]))]
    await until(lambda: index.queries == [1])
    asked += [asyncio.create_task(engine.search(None, question(i), s)) for i, s in enumerate(settings[1:], 1)]
    await until(lambda: engine.in_flight == len(settings))
    await asyncio.sleep(0.05)
    index.gate.set()
    return await asyncio.gather(*asked, return_exceptions=True)


@pytest.mark.parametrize("include", [(), ("fields", "vector")])
def test_questions_that_wait_are_searched_together_and_answered_as_if_alone(include: tuple[str, ...]) -> None:
    settings = SearchSettings(k=7, include=frozenset(include))
    with opened(service.index("numbers"), threads=1, inline_ms=0) as engine:
        index = Slow(engine)
        answers = asyncio.run(ask_together(engine, index, [settings] * 6))
        assert index.queries == [1, 5]
        for row, answer in enumerate(answers):
            assert isinstance(answer, SearchAnswer)
            alone = asyncio.run(engine.search(None, question(row), settings))
            assert answer.results == alone.results and answer.stats == alone.stats and answer.index == alone.index
            assert answer.took_ms.search > 0 and (row == 0 or answer.took_ms.queue > 40)
        assert engine.in_flight == 0


def test_each_keeps_its_own_deadline() -> None:
    settings = [SearchSettings(k=3, timeout_ms=ms) for ms in (20_000, 30, 10_000, 20_000)]
    with opened(service.index("numbers"), threads=1, inline_ms=0) as engine:
        index = Slow(engine)
        started = time.monotonic()
        first, short, *others = asyncio.run(ask_together(engine, index, settings))
        assert isinstance(short, DeadlineExceeded)
        assert all(isinstance(answer, SearchAnswer) for answer in (first, *others))
        assert index.queries == [1, 2], "whose deadline has passed is not searched for"
        deadline = index.limits[1].deadline
        assert deadline is not None and deadline - started > 15, "the latest of the deadlines ends the search"
        assert engine.in_flight == 0


def test_where_a_search_for_several_fails_each_is_searched_alone(caplog: pytest.LogCaptureFixture) -> None:
    with opened(service.index("numbers"), threads=1, inline_ms=0) as engine:
        index = Slow(engine)
        index.fails_together = True
        answers = asyncio.run(ask_together(engine, index, [SearchSettings(k=3)] * 3))
        assert all(isinstance(answer, SearchAnswer) for answer in answers)
        assert index.queries == [1, 2, 1, 1]
    assert "a search for several failed" in caplog.text


def test_what_is_cheaper_alone_or_must_be_told_apart_goes_alone() -> None:
    odd = [
        SearchSettings(k=3, partial=True),
        SearchSettings(k=3, include=frozenset(["explain"])),
        SearchSettings(k=3, rerank_depth=5),
    ]
    with opened(service.index("numbers"), threads=1, inline_ms=0) as engine:
        index = Slow(engine)
        for settings in odd:
            index.queries.clear()
            index.gate.clear()
            asyncio.run(ask_together(engine, index, [settings] * 3))
            assert index.queries == [1, 1, 1], settings
    with opened(service.index("numbers"), threads=1, inline_ms=0) as engine:
        index = Slow(engine)
        index.shares_work = False
        asyncio.run(ask_together(engine, index, [SearchSettings(k=3)] * 3))
        assert index.queries == [1, 1, 1]


def test_a_shared_run_says_nothing_of_what_one_question_costs() -> None:
    with opened(service.index("numbers"), threads=1, inline_ms=0) as engine:
        index = Slow(engine)
        settings = SearchSettings(k=3)
        plan = engine.catalog.get(None).plan(settings)

        async def ask() -> None:
            first = asyncio.create_task(engine.search(None, question(0), settings))
            await until(lambda: index.queries == [1])
            rest = [asyncio.create_task(engine.search(None, question(i), settings)) for i in (1, 2)]
            await until(lambda: engine.in_flight == 3)
            index.gate.set()
            await first
            learnt = plan.seconds
            await asyncio.gather(*rest)
            assert plan.seconds == learnt

        asyncio.run(ask())
        assert index.queries == [1, 2]


def test_exact_answers_of_a_batch_are_those_of_its_questions() -> None:
    """What sharing a run rests on, to the last bit."""
    queries = service.vectors(33, seed=62)
    with opened(service.index("numbers")) as engine:
        index = engine.catalog.get(None).shards[0].index
        batch = index.search(queries, 9)
        for row in range(len(queries)):
            alone = index.search(queries[row : row + 1], 9)
            assert np.array_equal(batch.labels[row], alone.labels[0])
            assert np.array_equal(batch.distances[row], alone.distances[0])
            assert batch.visited[row] == alone.visited[0]
    assert queries.shape[1] == DIM
