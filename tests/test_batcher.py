"""What waits goes when the model is free, in fair turns; each request is answered once, and only the guilty fail."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import pytest
from numpy.typing import NDArray

from vecsvc import batcher as batching
from vecsvc.batcher import Batcher, BatchSettings, Run, RunFacts
from vecsvc.encoder_workers import start_worker
from vecsvc.encoders.base import Encoder, EncoderSpec, Role, StepEncoder
from vecsvc.errors import DeadlineExceeded, EncoderError, NotReady, Overloaded
from vecsvc.lanes import NEAR_TOKENS, OVERTAKING_RUNS, Lane, Lanes, Request
from vecsvc.run_times import FIRST_RUN_TOKENS, GROWTH, MAX_RUN_TOKENS, MIN_RUN_TOKENS, RunTimes
from vecsvc.tokenizer import Tokens
from vecsvc.types import Vectors

T = TypeVar("T")

DIM = 3
POISON = 666  # a token that the fake model fails on
SPEC = EncoderSpec(
    name="fake", fingerprint="0" * 64, dim=DIM, pooling="mean", normalize=False, max_tokens=512, prompts={}
)


def text(number: int, length: int = 4) -> Tokens:
    """The tokens of a text whose vector tells which it was."""
    return Tokens([number, *[1] * (length - 1)], [0] * length)


def expected(tokens: Sequence[Tokens]) -> NDArray[np.float32]:
    return np.array([[one.ids[0], len(one), sum(one.ids)] for one in tokens], dtype=np.float32)


class FakeEncoder:
    """A model that notes its runs, and can be made to wait, fail or be slow."""

    spec = SPEC

    def __init__(self) -> None:
        self.runs: list[list[int]] = []  # the first token of each text
        self.threads: list[threading.Thread] = []
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)
        self.closed = False
        self.broken = False

    def split(self, texts: Sequence[str], role: Role = "query") -> list[Tokens]:
        return [text(int(one)) for one in texts]

    def run(self, tokens: Sequence[Tokens]) -> Vectors:
        self.runs.append([one.ids[0] for one in tokens])
        self.threads.append(threading.current_thread())
        self.entered.release()
        assert self.gate.wait(20)
        if self.broken or any(one.ids[0] == POISON for one in tokens):
            raise RuntimeError("the model gave up")
        if self.closed:
            raise EncoderError("the model was closed")
        return expected(tokens)

    def encode(self, texts: Sequence[str], role: Role = "query") -> Vectors:
        return self.run(self.split(texts, role))

    def close(self) -> None:
        self.closed = True


class FakeStepper:
    """Texts leave after as many steps as they have tokens."""

    def __init__(self, owner: FakeStepEncoder) -> None:
        self._owner = owner
        self._inside: dict[int, tuple[Tokens, int]] = {}

    def room(self) -> int:
        return self._owner.slots - len(self._inside)

    def join(self, texts: Sequence[tuple[int, Tokens]]) -> None:
        assert 0 < len(texts) <= self.room()
        for key, tokens in texts:
            assert key not in self._inside
            self._inside[key] = (tokens, len(tokens))

    def drop(self, keys: Sequence[int]) -> None:
        for key in keys:
            del self._inside[key]
            self._owner.dropped += 1

    def step(self) -> list[tuple[int, NDArray[np.float32]]]:
        self._owner.runs.append([tokens.ids[0] for tokens, _ in self._inside.values()])
        self._owner.entered.release()
        assert self._owner.gate.wait(20)
        if any(tokens.ids[0] == POISON for tokens, _ in self._inside.values()):
            raise RuntimeError("the step gave up")
        ready = []
        for key, (tokens, left) in list(self._inside.items()):
            if left > 1:
                self._inside[key] = (tokens, left - 1)
            else:
                del self._inside[key]
                ready.append((key, expected([tokens])[0]))
        return ready

    def __len__(self) -> int:
        return len(self._inside)


class FakeStepEncoder(FakeEncoder):
    slots = 4

    def __init__(self) -> None:
        super().__init__()
        self.dropped = 0

    def stepper(self) -> FakeStepper:
        return FakeStepper(self)


class World:
    """A batcher over a fake encoder, used within one event loop."""

    def __init__(self, encoder: FakeEncoder, **settings: Any) -> None:
        self.encoder = encoder
        self.facts: list[RunFacts] = []
        self.batcher = Batcher(encoder, BatchSettings(**{"inline_s": 0.0, **settings}), start_worker, self.facts.append)

    def ask(self, tokens: Sequence[Tokens], seconds: float = 20.0, lane: Any = None) -> asyncio.Task[Any]:
        return asyncio.ensure_future(self.batcher.encode(tokens, time.monotonic() + seconds, lane))

    async def entered(self) -> None:
        """Wait until the model begins a run."""
        assert await asyncio.get_running_loop().run_in_executor(None, lambda: self.encoder.entered.acquire(timeout=20))

    async def held(self) -> asyncio.Task[Any]:
        """Close the gate and send a text ahead, so that whatever comes next waits together."""
        self.encoder.gate.clear()
        first = self.ask([text(1)])
        await self.entered()
        return first

    async def release(self) -> None:
        await asyncio.sleep(0)  # what was asked just now has joined the queue
        self.encoder.gate.set()


def play(scene: Callable[[World], Awaitable[T]], encoder: FakeEncoder | None = None, **settings: Any) -> T:
    async def main() -> T:
        world = World(encoder if encoder is not None else FakeEncoder(), **settings)
        try:
            return await scene(world)
        finally:
            world.encoder.gate.set()
            world.batcher.close()

    return asyncio.run(main())


KINDS = pytest.mark.parametrize("kind", [FakeEncoder, FakeStepEncoder])


def test_the_fakes_are_what_they_stand_for() -> None:
    assert isinstance(FakeStepEncoder(), StepEncoder) and not isinstance(FakeEncoder(), StepEncoder)


# ------------------------------------------------------------------------------------------------ gathering


@KINDS
def test_a_request_gets_its_vectors_in_its_order(kind: type[FakeEncoder]) -> None:
    async def scene(world: World) -> None:
        tokens = [text(number, length) for number, length in enumerate([9, 2, 300, 4, 4, 80, 1, 300], start=2)]
        done = await world.ask(tokens)
        np.testing.assert_array_equal(done.vectors, expected(tokens))
        assert done.run_s > 0 and done.queue_s >= 0
        assert (await world.ask([])).vectors.shape == (0, DIM)

    play(scene, kind())


def test_what_waits_goes_in_one_run_when_the_model_is_free() -> None:
    async def scene(world: World) -> None:
        first = await world.held()
        others = [world.ask([text(number)]) for number in range(2, 12)]
        await world.release()
        done = await asyncio.gather(first, *others)
        assert world.encoder.runs == [[1], list(range(2, 12))]
        for number, one in enumerate(done, start=1):
            np.testing.assert_array_equal(one.vectors, expected([text(number)]))
        assert sum(facts.texts for facts in world.facts) == 11 and done[-1].queue_s > 0

    play(scene)


def test_texts_of_unlike_length_do_not_share_a_run() -> None:
    async def scene(world: World) -> None:
        first = await world.held()
        tasks = [world.ask([text(number, length)]) for number, length in ((2, 5), (3, 100), (4, 6), (5, 105))]
        await world.release()
        await asyncio.gather(first, *tasks)
        assert [sorted(run) for run in world.encoder.runs] == [[1], [2, 4], [3, 5]]

    play(scene, inline_s=0.0, run_s=1000.0)


def test_no_run_has_more_tokens_than_its_time_allows_and_a_longer_text_goes_alone() -> None:
    lane = Lane()
    lane.add(request(*[10] * 30))
    lane.add(request(900))
    for _ in range(20):
        places = lane.take(60)
        if not places:
            break
        assert len(places) <= 6
    assert not len(lane) and lane.tokens == 0


def test_a_lone_text_that_is_known_to_be_short_runs_in_its_callers_thread() -> None:
    async def scene(world: World) -> None:
        await world.ask([text(2)])
        await world.ask([text(3)])
        await world.ask([text(4, 400)])
        await world.ask([text(5)], lane="bulk")
        here = [thread is threading.current_thread() for thread in world.encoder.threads]
        assert here == [False, True, False, False], "unknown, known, of unknown length, bulk"
        world.encoder.broken = True
        with pytest.raises(EncoderError, match=r"^encoder 'fake' failed on this; the service's log says why$"):
            await world.ask([text(6)])
        assert world.batcher.failures == 1

    play(scene, inline_s=10.0)


def test_a_text_that_comes_while_the_model_runs_does_not_run_beside_it() -> None:
    async def scene(world: World) -> None:
        await world.ask([text(2)])
        world.encoder.gate.clear()
        busy = world.ask([text(3, 400)])  # of unknown length, so it goes to the worker
        await world.entered()
        later = world.ask([text(4)])
        await world.release()
        await asyncio.gather(busy, later)
        assert world.encoder.threads[-1] is not threading.current_thread()

    play(scene, inline_s=10.0)


# ------------------------------------------------------------------------------------- several runs at once


class BulkGate(FakeEncoder):
    """Its gate holds runs of more than one text."""

    def run(self, tokens: Sequence[Tokens]) -> Vectors:
        self.runs.append([one.ids[0] for one in tokens])
        self.threads.append(threading.current_thread())
        self.entered.release()
        assert len(tokens) == 1 or self.gate.wait(20)
        return expected(tokens)


@pytest.mark.parametrize("workers", [2, 4])
def test_of_several_runs_at_once_bulk_leaves_one_to_queries(workers: int) -> None:
    async def scene(world: World) -> None:
        world.encoder.gate.clear()
        jobs = [world.ask([text(100 + at, 64) for at in range(40)], lane="bulk") for _ in range(workers)]
        for _ in range(workers - 1):
            await world.entered()
        await world.ask([text(2)])
        assert [len(run) > 1 for run in world.encoder.runs] == [True] * (workers - 1) + [False]
        assert world.encoder.runs[-1] == [2]
        await world.release()
        await asyncio.gather(*jobs)

    play(scene, BulkGate(), workers=workers)


def test_with_one_worker_a_query_may_begin_beside_bulk_and_a_second_one_not() -> None:
    async def scene(world: World) -> None:
        world.encoder.gate.clear()
        jobs = [world.ask([text(100 + at, 64) for at in range(40)], lane="bulk") for _ in range(2)]
        await world.entered()
        await world.ask([text(2)])  # through, while bulk is held
        await world.entered()
        assert world.encoder.runs[-1] == [2] and sum(len(run) > 1 for run in world.encoder.runs) == 1
        pair = world.ask([text(3), text(4)])  # held, and so is the place of queries
        await world.entered()
        later = world.ask([text(5)])
        await asyncio.sleep(0.05)
        assert world.encoder.runs[-1] == [3, 4] and not later.done()
        await world.release()
        await asyncio.gather(*jobs, pair, later)

    play(scene, BulkGate(), workers=1, beside_bulk=True)


def test_texts_that_join_a_running_batch_have_no_run_beside_it() -> None:
    async def scene(world: World) -> None:
        assert len(world.batcher._workers) == 1
        await world.ask([text(2)])

    play(scene, FakeStepEncoder(), workers=1, beside_bulk=True)


@pytest.mark.parametrize("long_runs", [1e9, 0])
def test_a_short_text_runs_in_its_callers_thread_beside_bulk_unless_that_seems_to_hang(
    long_runs: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching, "LONG_RUNS", long_runs)

    async def scene(world: World) -> None:
        await world.ask([text(2)])
        world.encoder.gate.clear()
        job = world.ask([text(100 + at, 64) for at in range(40)], lane="bulk")
        await world.entered()
        await world.entered()
        await world.ask([text(3)])
        assert world.encoder.runs[-1] == [3]
        assert (world.encoder.threads[-1] is threading.current_thread()) is (long_runs > 0)
        await world.release()
        await job

    play(scene, BulkGate(), workers=2, inline_s=10.0)


def test_a_worker_that_bulk_was_kept_from_takes_it_when_another_run_ends() -> None:
    encoder = BulkGate()
    batcher = Batcher(encoder, BatchSettings(workers=3, inline_s=0.0), start_worker)
    request = Request([text(100 + at, 64) for at in range(3)], DIM, time.monotonic() + 20, lambda: False)
    with batcher._lock:
        run = Run("bulk", [(request, 0)])
        batcher._runs = {-1: run, -2: Run("bulk", [(request, 1)])}
        request.take(0, 64, 2)
        batcher._lanes.add(request, "bulk")
        assert not batcher.takes("bulk"), "two of three runs are bulk already"
        batcher._wake_all()
    batcher.finish(-1, run, [], [], 0.0, None)
    assert encoder.entered.acquire(timeout=20)
    batcher.close()


# ---------------------------------------------------------------------------------------------- lanes, fairness


def test_interactive_overtakes_bulk() -> None:
    async def scene(world: World) -> None:
        first = await world.held()
        bulk = world.ask([text(number, 64) for number in range(100, 140)])
        query = world.ask([text(2)])
        await world.release()
        await asyncio.gather(first, bulk, query)
        assert world.encoder.runs[1] == [2]
        assert {facts.lane for facts in world.facts} == {"interactive", "bulk"}
        assert len(world.encoder.runs) > 3, "bulk is cut into runs"

    play(scene)


@pytest.mark.parametrize("workers", [1, 2])
def test_bulk_goes_on_when_the_queries_that_it_gave_way_to_are_gone(workers: int) -> None:
    async def scene(world: World) -> None:
        held = [await world.held()]
        if workers == 2:
            held.append(world.ask([text(1)]))
            await world.entered()
        queries = [world.ask([text(number)]) for number in range(2, 6)]
        bulk = world.ask([text(number, 64) for number in range(100, 104)], lane="bulk")
        await asyncio.sleep(0)
        for query in queries:
            query.cancel()
        await world.release()
        await asyncio.wait_for(asyncio.gather(*held, bulk), 20)
        assert not any(number in run for run in world.encoder.runs for number in range(2, 6))

    play(scene, workers=workers)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere threads have no niceness of their own")
@pytest.mark.parametrize("workers", [1, 2])
def test_threads_of_bulk_leave_the_processor_to_those_of_queries(workers: int) -> None:
    class Noting(FakeEncoder):
        def run(self, tokens: Sequence[Tokens]) -> Vectors:
            nice.append((len(tokens), os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) - usual))
            return super().run(tokens)

    usual = os.getpriority(os.PRIO_PROCESS, 0)
    nice: list[tuple[int, int]] = []

    async def scene(world: World) -> None:
        await world.ask([text(2)])
        await world.ask([text(number) for number in range(2, 6)], lane="bulk")
        await world.ask([text(3)])
        assert [one for one in nice if one[0] == 1] == [(1, 0)] * 2
        assert {more for count, more in nice if count > 1} == {min(4, 19 - usual) if workers > 1 else 0}

    play(scene, Noting(), workers=workers, bulk_nice=4)


def test_what_bulk_takes_says_nothing_of_queries_where_it_gives_way() -> None:
    async def scene(world: World) -> None:
        world.batcher.learn("bulk", 8, 4096, 10.0)
        assert world.batcher.times.budget(0.01) == FIRST_RUN_TOKENS
        world.batcher.learn("interactive", 8, 4096, 0.01)
        assert world.batcher.times.budget(0.01) > FIRST_RUN_TOKENS > world.batcher.bulk_times.budget(0.01)

    play(scene, workers=2, bulk_nice=4)
    assert Batcher(FakeEncoder(), BatchSettings(bulk_nice=4), lambda *given: threading.Thread()).bulk_nice == 0


def test_bulk_that_gave_way_to_a_query_goes_on_when_that_has_left() -> None:
    encoder = FakeEncoder()
    batcher = Batcher(encoder, BatchSettings(inline_s=0.0), start_worker)
    looks = [0]

    def gone() -> bool:
        looks[0] += 1
        return looks[0] > 1

    query = Request([text(1)], DIM, time.monotonic() + 20, gone)
    job = Request([text(number, 64) for number in (2, 3)], DIM, time.monotonic() + 20, lambda: False)
    time.sleep(0.1)  # until both workers wait
    with batcher._lock:
        batcher._lanes.add(query, "interactive")
        batcher._lanes.add(job, "bulk")
        batcher._news["bulk"].notify()  # it sees the query, which leaves before a worker of its own looks
    assert encoder.entered.acquire(timeout=20) and sorted(encoder.runs[0]) == [2, 3]
    batcher.close()


def test_a_stream_of_queries_that_fills_the_only_run_does_not_starve_bulk() -> None:
    class Slow(FakeEncoder):
        def run(self, tokens: Sequence[Tokens]) -> Vectors:
            time.sleep(0.002)
            return super().run(tokens)

    async def scene(world: World) -> None:
        async def client(length: int) -> None:
            while not stopped:
                await world.ask([text(5, length), text(6, length)], lane="interactive")

        stopped: list[bool] = []
        clients = [asyncio.ensure_future(client(4 + 40 * number)) for number in range(8)]
        await asyncio.sleep(0.1)
        await world.ask([text(number, 64) for number in range(100, 110)], seconds=10.0, lane="bulk")
        stopped.append(True)
        await asyncio.gather(*clients)

    play(scene, Slow())


def test_texts_that_a_run_left_behind_go_at_once_where_there_is_room() -> None:
    async def scene(world: World) -> None:
        world.encoder.gate.clear()
        job = world.ask([text(100 + at, 64) for at in range(40)], lane="bulk")
        for _ in range(3):
            await world.entered()
        assert len(world.encoder.runs) == 3
        await world.release()
        await job

    play(scene, workers=4)


def test_failures_of_a_model_fill_no_log(caplog: pytest.LogCaptureFixture) -> None:
    async def scene(world: World) -> None:
        world.encoder.broken = True
        for number in range(2, 40):
            with pytest.raises(EncoderError):
                await world.ask([text(number)])

    play(scene)
    lines = [record for record in caplog.records if record.message == "a run failed"]
    assert 1 <= len(lines) <= 5 and "RuntimeError: the model gave up" in lines[0].data["why"]  # type: ignore[attr-defined]


def test_bulk_gets_a_run_now_and_then_however_many_queries_come() -> None:
    lanes = Lanes()
    lanes.add(request(4, 4), "bulk")
    taken = []
    for _ in range(OVERTAKING_RUNS + 2):
        lanes.add(request(4), "interactive")
        name = lanes.first()
        assert name is not None and len(lanes.take(name, 4, overtakes=True)) == 1
        taken.append(name)
    assert taken == ["interactive"] * OVERTAKING_RUNS + ["bulk", "interactive"]


def test_a_large_request_does_not_hold_up_a_small_one_of_its_lane() -> None:
    lane = Lane()
    large, small = request(*[20] * 1000), request(20, 20)
    lane.add(large)
    lane.add(small)
    for _ in range(2):
        lane.take(60)
    assert not small.left and len(large.left) >= 990


def request(*lengths: int, deadline: float = 1e9, gone: Callable[[], bool] = lambda: False) -> Request:
    return Request([text(2, length) for length in lengths], DIM, deadline, gone)


def test_every_text_is_taken_once_whatever_the_lengths() -> None:
    random = np.random.default_rng(7)
    lane = Lane()
    requests = [request(*random.integers(1, 500, random.integers(1, 60)).tolist()) for _ in range(25)]
    for one in requests:
        lane.add(one)
    seen: list[tuple[int, int]] = []
    while len(lane):
        places = lane.take(700)
        longest = max(len(r.tokens[at]) for r, at in places)
        shortest = min(len(r.tokens[at]) for r, at in places)
        assert len(places) == 1 or len(places) * longest <= 700
        assert longest <= max(shortest + NEAR_TOKENS, 1.25 * shortest + 1)
        seen += [(id(r), at) for r, at in places]
    assert sorted(seen) == sorted((id(r), at) for r in requests for at in range(len(r.tokens)))
    assert lane.tokens == 0


def test_bulk_leaves_places_of_a_running_batch_to_queries() -> None:
    lanes = Lanes()
    lanes.add(request(*[5] * 20), "bulk")
    lanes.add(request(5), "interactive")
    assert len(lanes.take_any(8, spare=2)) == 6
    assert len(lanes.take_any(2, spare=2)) == 0
    lanes.add(request(5), "interactive")
    assert len(lanes.take_any(2, spare=2)) == 1


def test_texts_join_a_running_batch_and_leave_it_when_they_are_ready() -> None:
    async def scene(world: World) -> None:
        world.encoder.gate.clear()
        long = world.ask([text(2, 100)])
        await world.entered()
        short = world.ask([text(3, 3)])
        await world.release()
        done = await short
        np.testing.assert_array_equal(done.vectors, expected([text(3, 3)]))
        assert not long.done() and [2, 3] in world.encoder.runs
        np.testing.assert_array_equal((await long).vectors, expected([text(2, 100)]))

    play(scene, SlowSteps())


class SlowSteps(FakeStepEncoder):
    """So slow that a long text is surely inside when a short one is ready."""

    def stepper(self) -> FakeStepper:
        class Slow(FakeStepper):
            def step(self) -> list[tuple[int, NDArray[np.float32]]]:
                time.sleep(0.002)
                return super().step()

        return Slow(self)


# ------------------------------------------------------------------------------------------------------ errors


@KINDS
def test_only_the_guilty_request_fails_and_the_worker_goes_on(kind: type[FakeEncoder]) -> None:
    async def scene(world: World) -> None:
        first = await world.held()
        tasks = [world.ask([text(n)]) for n in (2, POISON, 3)]
        await world.release()
        done = await asyncio.gather(first, *tasks, return_exceptions=True)
        np.testing.assert_array_equal(done[1].vectors, expected([text(2)]))
        np.testing.assert_array_equal(done[3].vectors, expected([text(3)]))
        assert isinstance(done[2], EncoderError) and "gave up" in str(done[2].__cause__)
        np.testing.assert_array_equal((await world.ask([text(9)])).vectors, expected([text(9)]))
        assert world.batcher.failures == 0

    play(scene, kind())


def test_a_request_with_one_bad_text_fails_whole_and_what_is_left_of_it_is_dropped() -> None:
    async def scene(world: World) -> None:
        first = await world.held()
        large = world.ask([text(POISON, 300), *[text(n, 20) for n in range(2, 400)]])
        await world.release()
        with pytest.raises(EncoderError):
            await large
        await first
        await world.ask([text(5)])
        assert world.batcher.waiting_tokens == 0

    play(scene)


@KINDS
def test_failures_in_a_row_are_counted_and_a_good_run_ends_the_row(kind: type[FakeEncoder]) -> None:
    async def scene(world: World) -> None:
        world.encoder.broken = True
        for number in range(3):
            assert world.batcher.failures == number
            with pytest.raises(EncoderError):
                await world.ask([text(2)])
        world.encoder.broken = False
        await world.ask([text(2)])
        assert world.batcher.failures == 0

    play(scene, kind())


def test_a_model_that_gives_vectors_of_another_shape_is_an_error() -> None:
    class Wrong(FakeEncoder):
        def run(self, tokens: Sequence[Tokens]) -> Vectors:
            return np.zeros((len(tokens), DIM + 1), dtype=np.float32)

    async def scene(world: World) -> None:
        with pytest.raises(EncoderError, match=r"gave \(1, 4\), expected \(1, 3\)"):
            await world.ask([text(2)])

    play(scene, Wrong())


# ------------------------------------------------------------------------- callers that leave, deadlines, bounds


@KINDS
def test_who_left_is_dropped_before_a_run(kind: type[FakeEncoder]) -> None:
    async def scene(world: World) -> None:
        first = await world.held()
        gone, stays = world.ask([text(2), text(3)]), world.ask([text(4)])
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.sleep(0)
        await world.release()
        await asyncio.gather(first, stays)
        assert gone.cancelled()
        assert not {2, 3} & {number for run in world.encoder.runs for number in run}
        assert world.batcher.waiting_tokens == 0

    play(scene, kind())


@KINDS
def test_a_deadline_that_passes_while_waiting_is_an_error_and_no_run(kind: type[FakeEncoder]) -> None:
    async def scene(world: World) -> None:
        first = await world.held()
        with pytest.raises(DeadlineExceeded):
            await world.ask([text(2)], seconds=0.02)
        await world.release()
        await first
        with pytest.raises(DeadlineExceeded):
            await world.ask([text(3)], seconds=-1)
        await world.ask([text(4)])
        assert not {2, 3} & {number for run in world.encoder.runs for number in run}

    play(scene, kind())


def test_a_text_inside_a_running_batch_leaves_it_with_its_caller() -> None:
    async def scene(world: World) -> None:
        world.encoder.gate.clear()
        gone = world.ask([text(2, 500)])
        stays = world.ask([text(3, 5)])
        await world.entered()
        gone.cancel()
        await asyncio.sleep(0.01)
        await world.release()
        await stays
        await world.ask([text(4, 100)])
        assert isinstance(world.encoder, FakeStepEncoder) and world.encoder.dropped == 1

    play(scene, FakeStepEncoder())


def test_more_than_may_wait_is_refused_at_once_in_each_lane() -> None:
    async def scene(world: World) -> None:
        first = await world.held()
        bulk = world.ask([text(n, 10) for n in range(2, 9)], lane="bulk")
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match=r"70 tokens wait for the encoder and 40 came, the limit max_waiting_tok"):
            await world.ask([text(2, 40)], lane="bulk")
        query = world.ask([text(10, 40)])
        await world.release()
        await asyncio.gather(first, bulk, query)
        huge = [text(n, 50) for n in range(2, 9)]
        np.testing.assert_array_equal((await world.ask(huge, lane="bulk")).vectors, expected(huge))

    play(scene, max_waiting_tokens=100)


# ----------------------------------------------------------------------------------------- closing, replacing


@KINDS
def test_closing_ends_runs_under_way_and_tells_who_waits(kind: type[FakeEncoder]) -> None:
    async def scene(world: World) -> None:
        first = await world.held()
        waiting = world.ask([text(2, 300), text(3, 300)], lane="bulk")
        await asyncio.sleep(0)
        loop = asyncio.get_running_loop()
        closing = loop.run_in_executor(None, world.batcher.close)
        with pytest.raises(NotReady, match="encoder 'fake' was closed"):
            await waiting
        world.encoder.gate.set()
        np.testing.assert_array_equal((await first).vectors, expected([text(1)]))
        await closing
        assert world.encoder.closed
        world.batcher.close()
        with pytest.raises(NotReady, match="was closed"):
            await world.ask([text(4)])

    play(scene, kind())


@KINDS
def test_a_wedged_run_is_given_up_and_a_new_encoder_takes_the_rest(kind: type[FakeEncoder]) -> None:
    async def scene(world: World) -> None:
        first = await world.held()
        await asyncio.sleep(0.02)
        assert world.batcher.longest_run_s() > 0.01
        waiting = world.ask([text(2)])
        await asyncio.sleep(0)
        world.batcher.suspend("it hangs")
        with pytest.raises(EncoderError, match="it hangs"):
            await first
        with pytest.raises(NotReady, match="it hangs"):
            await world.ask([text(3)])
        assert world.batcher.longest_run_s() == 0
        fresh = kind()
        world.batcher.resume(fresh)
        np.testing.assert_array_equal((await waiting).vectors, expected([text(2)]))
        await world.release()
        await world.ask([text(4)])
        assert [2] in fresh.runs and world.batcher.problem == ""

    play(scene, kind())


def test_a_bug_in_a_worker_leaves_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(world: World) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(Lanes, "take", lambda self, *_, **__: 1 / 0)
            with pytest.raises(EncoderError, match="the batcher failed: ZeroDivisionError"):
                await world.ask([text(2)])
        await world.ask([text(3)])

    play(scene)


# ------------------------------------------------------------------------------------------------ all at once


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("workers", [1, 3])
@KINDS
def test_no_request_is_lost_doubled_or_mixed_up(kind: type[FakeEncoder], workers: int, seed: int) -> None:
    async def one(world: World, number: int) -> str:
        random = np.random.default_rng([seed, number])
        await asyncio.sleep(float(random.uniform(0, 0.05)))
        count = int(random.choice([1, 1, 1, 2, 5, 40]))
        tokens = [text(1000 + 50 * number + at, int(random.geometric(0.05))) for at in range(count)]
        fate = random.choice(["stays", "leaves", "late", "bad"], p=[0.7, 0.1, 0.1, 0.1])
        if fate == "bad":
            tokens[int(random.integers(count))] = text(POISON, 3)
        task = world.ask(tokens, 0.003 if fate == "late" else 20, random.choice(["interactive", "bulk", None]))
        if fate == "leaves":
            await asyncio.sleep(float(random.uniform(0, 0.01)))
            task.cancel()
        try:
            done = await task
        except (DeadlineExceeded, EncoderError, asyncio.CancelledError) as error:
            kinds = {"leaves": asyncio.CancelledError, "late": DeadlineExceeded, "bad": EncoderError}
            assert fate != "stays" and isinstance(error, kinds[fate]), (fate, error)
            return "refused"
        assert fate != "bad"
        np.testing.assert_array_equal(done.vectors, expected(tokens))
        return "answered"

    async def scene(world: World) -> None:
        fates = await asyncio.gather(*(one(world, number) for number in range(100)))
        assert fates.count("answered") >= 50
        await world.ask([text(2)])
        assert world.batcher.waiting_tokens == 0 and world.batcher.longest_run_s() == 0

    play(scene, kind(), workers=workers)


def test_loops_of_several_threads_may_share_a_batcher() -> None:
    batcher = Batcher(FakeEncoder(), BatchSettings(inline_s=1.0), start_worker)

    def ask(number: int) -> bool:
        tokens = [text(number + at) for at in range(3)]
        done = asyncio.run(batcher.encode(tokens, time.monotonic() + 20))
        return bool((done.vectors == expected(tokens)).all())

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(10, 200, 5)))
    batcher.close()


# ------------------------------------------------------------------------------------------------- run times


def test_the_budget_follows_what_runs_take() -> None:
    times = RunTimes()
    assert times.budget(0.01) == FIRST_RUN_TOKENS and times.single(10) is None
    for tokens in [16, 500, 64, 1000, 256] * 6:
        times.learn(2, tokens, 0.001 + 1e-5 * tokens)
    assert abs(times.budget(0.01) - 900) <= 2
    for tokens in [16, 500, 64, 1000, 256] * 12:
        times.learn(2, tokens, 0.001 + 1e-4 * tokens)  # another process takes half of the machine
    assert 85 <= times.budget(0.01) <= 95
    assert times.budget(1e-9) == MIN_RUN_TOKENS and times.budget(1e9) == GROWTH * 1000
    times.learn(2, MAX_RUN_TOKENS, 1.0)
    assert times.budget(1e9) == MAX_RUN_TOKENS


def test_runs_of_one_size_give_a_rate() -> None:
    times = RunTimes()
    for _ in range(5):
        times.learn(4, 100, 0.004)
    assert 245 <= times.budget(0.01) <= 255
    assert times.budget(1.0) == GROWTH * 100
    times.learn(1, 12, 0.001)
    assert times.single(15) == times.single(3) == 0.001 and times.single(16) is None


def test_an_encoder_is_an_encoder() -> None:
    encoder: Encoder = FakeEncoder()
    assert encoder.spec.dim == DIM


def test_queries_that_take_all_room_of_a_running_batch_do_not_starve_bulk() -> None:
    """Where texts join and leave, too: after sixteen joins that gave it nothing, one text of bulk goes first."""
    lanes = Lanes()
    lanes.add(request(*[3] * 40), "bulk")
    for _ in range(40):
        lanes.add(request(3), "interactive")
    joined = [lanes.take_any(1, spare=0) for _ in range(18)]
    sizes = [len(places[0][0].tokens) for places in joined]
    assert sizes[:16] == [1] * 16 and sizes[16] == 40 and sizes[17] == 1
