"""Gathers waiting texts into one run of the encoder, with two lanes, a deadline for each caller, and no timer.

What waits goes as soon as the model is free. Interactive requests overtake bulk ones, and no run of either lane is
planned to hold the model longer than `run_s`. Where runs may be under way at once, bulk leaves one of them to queries,
so that a query that comes while a large job is under way waits for no run of it; else it waits for one short run.

The seam to encoders is `encoders/base.py`: an `Encoder` has `run(tokens)`, one run of its model over a batch that is
chosen here. A `StepEncoder` brings a `Stepper` besides, and its texts join and leave the running batch between
steps. In both cases queues, lanes, deadlines, cancellations, errors and delivery are kept here, so a scheduler of
cells is a plain object that one thread uses: `room`, `join`, `drop`, `step`, `len`. The threads that run either kind
are in `encoder_workers.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from vecsvc.encoders.base import Encoder, StepEncoder, run_checked
from vecsvc.errors import DeadlineExceeded, EncoderError, NotReady, Overloaded
from vecsvc.lanes import LANES, LaneName, Lanes, Place, Request, begin, cost, fail
from vecsvc.run_times import RunTimes
from vecsvc.telemetry import LineBudget
from vecsvc.tokenizer import Tokens
from vecsvc.types import Vectors

log: Final = logging.getLogger("vecsvc.batcher")

FAILURES_LOGGED_PER_S: Final = 1  # of one encoder: where a model fails on every text, one line tells as much as all
CLOSE_S: Final = 1.0  # how long `close` waits for runs under way


class RunFacts(msgspec.Struct, frozen=True):
    """What one run of the model was, for metrics."""

    lane: LaneName
    size: int  # texts in it
    texts: int  # of them, those that came new: in a batch that goes by steps most are old
    tokens: int  # of the new ones, without padding
    seconds: float
    waited_s: tuple[float, ...]  # of each request whose first text was in it
    failed: bool


class Done(msgspec.Struct, frozen=True):
    """What became of the texts of one request, and where the time went."""

    vectors: Vectors  # (n, dim)
    run_s: float  # in runs of the model
    queue_s: float  # waiting for it


LONG_RUNS: Final = 10  # times `run_s` after which a run under way is not trusted to end


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSettings:
    run_s: float = 0.01  # no run is planned to be longer: more is better for throughput, worse for who comes meanwhile
    inline_s: float = 0.0005  # a lone text whose like took less is run in its caller's thread
    max_waiting_tokens: int = 1 << 20  # in each lane
    workers: int = 1  # runs at the same time; of several, one is kept free of bulk
    beside_bulk: bool = False  # where `workers` is 1, a run of queries may begin beside one of bulk
    bulk_nice: int = 0  # how much nicer threads of bulk are, of 19, where queries need not wait for them


class Waiting(Request):
    """A request of the event loop that `future` belongs to; the future is done when its caller has gone, too."""

    __slots__ = ("future",)

    def __init__(self, tokens: Sequence[Tokens], dim: int, deadline: float, future: asyncio.Future[None]) -> None:
        super().__init__(tokens, dim, deadline, future.done)
        self.future = future


class Run:
    """Texts that are in the model now."""

    __slots__ = ("lane", "places", "started", "waited_s")

    def __init__(self, lane: LaneName, places: Sequence[Place]) -> None:
        self.lane = lane
        self.places = places
        self.started = time.perf_counter()
        self.waited_s: tuple[float, ...] = ()


class Batcher:
    """The queue of one encoder, for callers in event loops and for the workers that run it."""

    def __init__(
        self,
        encoder: Encoder,
        settings: BatchSettings,
        start_worker: Callable[[Batcher, Encoder, int, LaneName | None], threading.Thread],
        observe: Callable[[RunFacts], None] = lambda facts: None,
    ) -> None:
        """`observe` is called once for each run, in the event loop of one of its callers."""
        self.encoder = encoder
        self.settings = settings
        self._steps = isinstance(encoder, StepEncoder)
        self.bulk_nice = settings.bulk_nice if self._most_runs() > 1 else 0
        self.times = RunTimes()
        # What gives way takes longer, and says nothing of what a query will take.
        self.bulk_times = RunTimes() if self.bulk_nice else self.times
        self._failure_lines = LineBudget(FAILURES_LOGGED_PER_S)
        self.failures = 0  # runs in a row that gave nothing
        self.problem = ""  # why nothing is taken in; empty where it is
        self._start_worker = start_worker
        self._observe = observe
        # What follows is changed by whoever holds the lock. Workers wait for news of their lane.
        self._lock = threading.Lock()
        self._news: dict[LaneName, threading.Condition] = {name: threading.Condition(self._lock) for name in LANES}
        if self._steps:
            self._news["bulk"] = self._news["interactive"]
        self._lanes = Lanes()
        self._runs: dict[int, Run] = {}  # by worker
        self._workers: dict[int, threading.Thread] = {}
        self._numbers = itertools.count()
        self._closed = False
        with self._lock:
            self._start()

    # ------------------------------------------------------------------------------------------- for callers

    async def encode(self, tokens: Sequence[Tokens], deadline: float, lane: LaneName | None = None) -> Done:
        """The vectors of the texts. Without a lane, what one run can do is interactive, and more than that bulk.

        Raises Overloaded at once where too much waits, NotReady while the encoder is being replaced,
        DeadlineExceeded when `deadline` (seconds of time.monotonic()) passes, EncoderError where the model fails.
        """
        if not tokens:
            return Done(np.empty((0, self.encoder.spec.dim), dtype=np.float32), 0.0, 0.0)
        if len(tokens) == 1 and lane != "bulk":
            found = self._run_here(tokens)
            if found is not None:
                return found
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        request = Waiting(tokens, self.encoder.spec.dim, deadline, future)
        self._submit(request, lane if lane is not None else self._lane(tokens))
        timer = loop.call_later(max(0.0, deadline - time.monotonic()), _expire, future)
        try:
            # Where the caller is cancelled so is the future, and the workers drop what is left of the request.
            await future
        finally:
            timer.cancel()
        return Done(request.vectors, request.run_s, max(0.0, time.perf_counter() - request.queued - request.run_s))

    def _lane(self, tokens: Sequence[Tokens]) -> LaneName:
        """A request that one run can do delays nobody for longer than any other, so it may overtake."""
        padded = max(map(cost, tokens)) * len(tokens)
        return "interactive" if len(tokens) == 1 or padded <= self.times.budget(self.settings.run_s) else "bulk"

    def _run_here(self, tokens: Sequence[Tokens]) -> Done | None:
        """Run a short text in the caller's thread while the model is free: to wake a worker would cost more."""
        expected = self.times.single(cost(tokens[0]))
        if expected is None or expected > self.settings.inline_s:
            return None
        with self._lock:
            if not self._is_free() or self.problem or self._closed:
                return None
        started = time.perf_counter()
        vectors: Vectors | None = None
        try:
            vectors = self.run(self.encoder, tokens)
        finally:
            seconds = time.perf_counter() - started
            if vectors is not None:
                self.times.learn(1, cost(tokens[0]), seconds)
            self.failures = self.failures + 1 if vectors is None else 0
            self._observe(RunFacts("interactive", 1, 1, len(tokens[0]), seconds, (0.0,), vectors is None))
        return Done(vectors, seconds, 0.0)

    def _is_free(self) -> bool:
        """Whether a run may begin at once that no worker is about to begin.

        Not beside one that takes long: it may hang in the session, and whoever runs it in the event loop with it.
        """
        latest = time.perf_counter() - LONG_RUNS * self.settings.run_s
        if any(run.started < latest for run in self._runs.values()):
            return False
        bulk_comes = self._lanes.tokens("bulk") > 0 and self.takes("bulk")
        room = self.takes("interactive") and len(self._runs) + bulk_comes < self._most_runs()
        return room and not self._lanes.tokens("interactive")

    def _submit(self, request: Request, lane: LaneName) -> None:
        with self._lock:
            self._check_open()
            waiting = self._lanes.tokens(lane)
            # A request that is larger than the bound may come when nobody else waits.
            if waiting and waiting + request.waiting_tokens > self.settings.max_waiting_tokens:
                raise Overloaded(
                    f"{waiting} tokens wait for the encoder and {request.waiting_tokens} came, "
                    f"the limit max_waiting_tokens is {self.settings.max_waiting_tokens}",
                    retry_after_s=waiting / self.times.budget(self.settings.run_s) * self.settings.run_s,
                )
            request.queued = time.perf_counter()
            self._lanes.add(request, lane)
            self._news[lane].notify()

    def _check_open(self) -> None:
        if self._closed:
            raise NotReady(f"encoder {self.encoder.spec.name!r} was closed")
        if self.problem:
            raise NotReady(self.problem)

    @property
    def waiting_tokens(self) -> int:
        return self._lanes.tokens("interactive") + self._lanes.tokens("bulk")

    def close(self) -> None:
        """Runs under way end, and their callers get what they gave; who still waits is told. May be called twice."""
        with self._lock:
            self._closed = True
            waiting = self._lanes.clear()
            workers = list(self._workers.values())
            self._wake_all()
        self._tell(waiting, NotReady(f"encoder {self.encoder.spec.name!r} was closed"))
        end = time.monotonic() + CLOSE_S
        for worker in workers:
            if worker is not threading.current_thread():
                worker.join(max(0.0, end - time.monotonic()))
        self.encoder.close()

    # ---------------------------------------------------------------------------------------- for the keeper

    def longest_run_s(self) -> float:
        """How long the oldest run under way has been going; 0 where there is none."""
        now = time.perf_counter()
        with self._lock:
            return max((now - run.started for run in self._runs.values()), default=0.0)

    def suspend(self, problem: str) -> None:
        """Take in nothing more, tell the callers of the runs under way, and forget these runs. Others go on waiting."""
        with self._lock:
            self.problem = problem
            told = [request for run in self._runs.values() for request in fail(run.places)]
            self._runs.clear()
            self._workers.clear()  # they notice when their runs end, if ever
            self._wake_all()
        self._tell(told, EncoderError(problem))

    def resume(self, encoder: Encoder) -> None:
        """Go on with another session of the same encoder."""
        with self._lock:
            if not self._closed:
                self.encoder = encoder
                # Where no worker starts, it stays suspended: open doors without workers would let every text wait.
                try:
                    self._start()
                except BaseException:
                    self._workers.clear()
                    encoder.close()
                    raise
                self.failures = 0
                self.problem = ""
                return
        encoder.close()

    def _start(self) -> None:
        most = self._most_runs()
        # Bulk has threads of its own, which leave the processor to those of queries.
        threads: dict[LaneName | None, int] = {"interactive": self.settings.workers, "bulk": max(1, most - 1)}
        if self._steps:
            threads = {None: most}
        for lane, count in threads.items():
            for _ in range(count):
                number = next(self._numbers)
                self._workers[number] = self._start_worker(self, self.encoder, number, lane)

    def _wake_all(self) -> None:
        for news in self._news.values():
            news.notify_all()

    def _most_runs(self) -> int:
        """Runs of either lane at the same time. A batch that goes by steps has both lanes' texts inside."""
        return max(self.settings.workers, 2 if self.settings.beside_bulk and not self._steps else 1)

    # ----------------------------------------------------------------------------------------- for the workers

    def wait(
        self, number: int, lane: LaneName | None, choose: Callable[[Lanes], Run | None], inside: bool = False
    ) -> Run | None:
        """What `choose` picks once something waits, or at once for a worker with texts inside; None: it must end.

        Where `choose` finds nothing, it is called again when there is news of the lane. No lane stands for both.
        """
        while True:
            late: list[Request] = []
            with self._lock:
                while True:
                    if (self._closed and not inside) or number not in self._workers:
                        return None
                    late = self._lanes.sweep(time.monotonic())
                    run = choose(self._lanes) if inside or self._lanes else None
                    if run is not None:
                        run.waited_s = begin(run.places)
                        self._runs[number] = run
                    if run is not None or late:
                        break
                    self._pass_on()
                    self._news[lane or "interactive"].wait()
                self._pass_on()
            if late:
                self._tell(
                    late, DeadlineExceeded("the deadline passed before the encoder was free; allow more by timeout_ms")
                )
            if run is not None:
                return run

    def run(self, encoder: Encoder, tokens: Sequence[Tokens]) -> Vectors:
        """One run by whoever calls; why one fails is in the log, not in the error."""
        try:
            return run_checked(encoder, tokens)
        except EncoderError as error:
            self.note(error.__cause__ or error)
            raise

    def note(self, why: BaseException) -> None:
        """Log why a run or a step failed, but not every time."""
        lines = self._failure_lines
        with self._lock:
            if not lines.take():
                return
            left_out, lines.kept_back = lines.kept_back, 0
        name, text = self.encoder.spec.name, f"{type(why).__name__}: {why}"
        log.warning("a run failed", extra={"data": {"encoder": name, "why": text, "left_out": left_out}})

    def learn(self, lane: LaneName, texts: int, tokens: int, seconds: float) -> None:
        """A run of so many texts and tokens, padding included, took so long."""
        self._times(lane).learn(texts, tokens, seconds)

    def takes(self, lane: LaneName) -> bool:
        """Whether a lane may begin a run, for whoever holds the lock: of several, one is left to queries."""
        most = self._most_runs()
        runs = sum(run.lane == lane for run in self._runs.values())
        return len(self._runs) < most and runs < (max(1, most - 1) if lane == "bulk" else self.settings.workers)

    def take(self, lane: LaneName) -> Run | None:
        """The lane's next run where it is its turn, for whoever holds the lock."""
        if not self._has_turn(lane):
            return None
        overtakes = lane == "interactive" and self.takes("bulk") and len(self._runs) + 1 == self._most_runs()
        return Run(lane, self._lanes.take(lane, self._times(lane).budget(self.settings.run_s), overtakes=overtakes))

    def _times(self, lane: LaneName) -> RunTimes:
        return self.bulk_times if lane == "bulk" else self.times

    def _has_turn(self, lane: LaneName) -> bool:
        """Whether a run of the lane begins now: texts wait in it, and the other lane has no better right."""
        if not self._lanes.tokens(lane) or not self.takes(lane):
            return False
        other: LaneName = "bulk" if lane == "interactive" else "interactive"
        alone = len(self._runs) + 1 == self._most_runs()  # no run may begin beside this one
        return not (alone and self._lanes.tokens(other) and self.takes(other)) or self._lanes.first() == lane

    def _pass_on(self) -> None:
        """Wake a worker of each lane that has its turn: a run left texts behind, or what kept bulk from it is gone."""
        for lane in LANES:
            if not self._steps and self._has_turn(lane):
                self._news[lane].notify()

    def retry(self, number: int, run: Run) -> bool:
        """Note that a worker begins a part of its run anew; False where it is no longer wanted."""
        with self._lock:
            run.started = time.perf_counter()
            return number in self._workers

    def finish(
        self,
        number: int,
        run: Run,
        vectors: Iterable[tuple[Place, NDArray[np.float32]]],
        failed: Sequence[tuple[Sequence[Place], Exception]],
        seconds: float,
        facts: RunFacts | None,
    ) -> None:
        """Take what a run gave; the callers of requests that are whole, or failed, are told."""
        ready: list[Request] = []
        errors: list[tuple[list[Request], Exception]] = []
        with self._lock:
            if self._runs.pop(number, None) is None:
                return  # it took too long, and its callers were told so
            self._pass_on()
            for request in {id(request): request for request, _ in run.places}.values():
                request.run_s += seconds
            gave = False
            for (request, at), vector in vectors:
                gave = True
                request.vectors[at] = vector
                request.missing -= 1
                if not request.missing and not request.failed:
                    ready.append(request)
            for places, error in failed:
                errors.append((fail(places), error))
            if gave or failed:
                self.failures = 0 if gave else self.failures + 1
        loop = run.places[0][0].future.get_loop() if run.places and isinstance(run.places[0][0], Waiting) else None
        if facts is not None and loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop was closed, and nobody is left to be told
                loop.call_soon_threadsafe(self._observe, facts)
        self._tell(ready, None)
        for requests, error in errors:
            self._tell(requests, error)

    def give_up(self, places: Iterable[Place]) -> None:
        """Tell the callers of texts that were inside an encoder that is no longer wanted."""
        with self._lock:
            told = fail(places)
        self._tell(told, EncoderError(self.problem or f"encoder {self.encoder.spec.name!r} was closed"))

    def has_run(self, number: int) -> bool:
        """False once the run of this worker was given up."""
        with self._lock:
            return number in self._runs

    def fail_all(self, number: int, error: Exception) -> None:
        """After a bug of ours in a worker: tell everybody, so that nobody waits for ever, and begin anew."""
        with self._lock:
            run = self._runs.pop(number, None)
            told = (fail(run.places) if run is not None else []) + self._lanes.clear()
        self._tell(told, EncoderError(f"the batcher failed: {type(error).__name__}: {error}"))

    def _tell(self, requests: Sequence[Request], error: Exception | None) -> None:
        loops: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = {}
        for request in requests:
            if isinstance(request, Waiting):
                loops.setdefault(request.future.get_loop(), []).append(request.future)
        for loop, futures in loops.items():
            with contextlib.suppress(RuntimeError):  # the loop was closed, and nobody is left to be told
                loop.call_soon_threadsafe(_resolve, futures, error)


def _resolve(futures: Sequence[asyncio.Future[None]], error: Exception | None) -> None:
    for future in futures:
        if future.done():
            continue
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)


def _expire(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_exception(DeadlineExceeded("no vectors within timeout_ms; ask for less, or allow more time"))
