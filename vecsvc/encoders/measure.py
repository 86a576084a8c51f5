"""Finds out how an encoder runs best on this machine by a short measurement: threads, spinning, runs at once.

What is compared is stated in `pays` and `runs_at_once`; the rest opens, measures and keeps.
"""

from __future__ import annotations

import contextlib
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, Generic, TypeAlias, TypeVar

import numpy as np

from vecsvc.encoders.base import Encoder
from vecsvc.errors import EncoderError
from vecsvc.onnx_session import usable_cores
from vecsvc.tokenizer import Tokens

E = TypeVar("E", bound=Encoder)
Open: TypeAlias = Callable[[int, bool], E]  # threads of a run, and whether they spin
Clock: TypeAlias = Callable[[], float]

WHOLE_S: Final = 1.0  # after the first opening; then no third is tried, and one that was begun is measured
PART_S: Final = 0.05  # time for each of the measurements of an opening, but one run is always made
MAX_RUNS: Final = 9
MAX_INSTANCES: Final = 64
MAX_BATCH_TEXTS: Final = 8
SHORT: Final = "how do I list the files of a folder"
LONGER: Final = "The quick brown fox jumps over the lazy dog, and the files of a folder are listed by name. " * 2
LONGER_COSTS: Final = 4  # short queries, by its tokens

# More cores are taken from everything else, so they must pay: a query must get so much faster by them, ...
PAYS_SHORT: Final = 0.85
# ... or the texts a second so many times more, with a query that does not get slower, ...
PAYS_TEXTS: Final = 1.3
SLOWER: Final = 1.1
# ... and neither may cost more than that where searches keep half of the cores busy, or where many texts wait.
SLOWER_BUSY: Final = 1.25
KEEPS_TEXTS: Final = 0.75
# A run more at the same time takes a core only while texts wait for it, so it need not bring as much.
PAYS_RUN: Final = 1.15


@dataclass(frozen=True, slots=True)
class Timing:
    """What an encoder does that was opened in one way."""

    short_s: float  # median seconds of one short query, with nothing beside it
    busy_s: float  # the same while other threads keep half of the cores busy
    texts_s: Mapping[int, float]  # texts a second of batches, by the number of runs at the same time


@dataclass(frozen=True, slots=True, kw_only=True)
class RunChoice:
    """How an encoder is run, and why so."""

    threads: int  # of a run; 0 is one a core
    spinning: bool  # whether they spin while they wait for each other
    instances: int  # runs at the same time: threads that run one session, which share its weights
    why: str


@dataclass(frozen=True, slots=True)
class _Opened(Generic[E]):
    encoder: E
    threads: int
    spinning: bool
    timing: Timing

    def __str__(self) -> str:
        at_once = runs_at_once(self.timing.texts_s)
        return (
            f"{_way(self.threads, self.spinning)}: {self.timing.short_s * 1e3:.2f} ms a query, "
            f"{self.timing.busy_s * 1e3:.2f} beside busy threads, "
            f"{self.timing.texts_s[at_once]:,.0f} texts/s with {at_once} run{'s' if at_once > 1 else ''} at once"
        )


def _way(threads: int, spinning: bool) -> str:
    """How an encoder was opened, for people."""
    return f"{threads} {'spinning ' if spinning else ''}thread{'s' if threads > 1 else ''}"


# ------------------------------------------------------------------------------------------------- the rules


def pays(before: Timing, after: Timing) -> bool:
    """Whether more threads, or spinning ones, are worth what they take from others."""
    texts, more_texts = (one.texts_s[runs_at_once(one.texts_s)] for one in (before, after))
    if after.busy_s > SLOWER_BUSY * before.busy_s:
        return False
    if after.short_s <= PAYS_SHORT * before.short_s:
        return more_texts >= KEEPS_TEXTS * texts
    return after.short_s <= SLOWER * before.short_s and more_texts >= PAYS_TEXTS * texts


def runs_at_once(texts_s: Mapping[int, float]) -> int:
    """How many runs at the same time pay: each step up must bring PAYS_RUN times the texts of the step below."""
    best, *others = sorted(texts_s)
    for runs in others:
        if texts_s[runs] < PAYS_RUN * texts_s[best]:
            break
        best = runs
    return best


def steps(most: int) -> list[int]:
    """1, 2, 4, ... and `most`."""
    return [*(1 << n for n in range((most - 1).bit_length())), most] if most > 1 else [1]


# ------------------------------------------------------------------------------------- opening and measuring


def open_fastest(
    open_with: Open[E],
    *,
    cores: int | None = None,
    instances: int = 0,
    spinning: bool | None = None,
    clock: Clock = time.perf_counter,
) -> tuple[E, RunChoice]:
    """Open an encoder in several ways, two at a time, and keep the one that `pays` prefers.

    First with one thread, then with twice as many each time while that pays, then with threads that spin unless
    `spinning` says whether they do. `instances` fixes the runs at the same time. With one core there is no choice.
    Another opening that fails, or whose runs do, is no choice either.
    """
    cores = cores if cores is not None else usable_cores()
    if cores == 1:
        only = RunChoice(threads=1, spinning=False, instances=max(1, instances), why="there is one core")
        return open_with(1, False), only

    def at_once(threads: int) -> Sequence[int]:
        return [instances] if instances else steps(min(cores // threads, MAX_INSTANCES))

    first = open_with(1, False)
    end = clock() + WHOLE_S
    with _closing(first):
        batch = _batch(first, clock)
        best = _Opened(first, 1, False, measure(first, at_once(1), cores, batch, clock))
    told = [str(best)]

    def try_out(threads: int, spins: bool) -> bool:
        nonlocal best
        with _closing(best.encoder):
            try:
                encoder = open_with(threads, spins)
                with _closing(encoder):
                    tried = _Opened(encoder, threads, spins, measure(encoder, at_once(threads), cores, batch, clock))
            except EncoderError as error:
                told.append(f"{_way(threads, spins)}: {error}")
                return False
        told.append(str(tried))
        better = pays(best.timing, tried.timing)
        (best if better else tried).encoder.close()
        best = tried if better else best
        return better

    for threads in steps(cores)[1:]:
        # Large models take long to open, and win the most by threads: the second opening does not look at the time.
        if threads > 2 and clock() >= end:
            told.append(f"{threads} threads were not tried after {WHOLE_S:g} s")
            break
        if not try_out(threads, spinning is True):
            break
    if spinning is None and clock() < end:
        try_out(max(2, best.threads), True)
    elif spinning is None:
        told.append(f"spinning was not tried after {WHOLE_S:g} s")
    runs = runs_at_once(best.timing.texts_s)
    return best.encoder, RunChoice(threads=best.threads, spinning=best.spinning, instances=runs, why="; ".join(told))


def measure(
    encoder: Encoder, at_once: Sequence[int], cores: int, batch: Sequence[Tokens], clock: Clock = time.perf_counter
) -> Timing:
    """Time a short query, and batches with so many runs `at_once` as pay, in turn, each for about PART_S.

    Raises EncoderError where a run alone fails; several at once, which a memory ceiling may not hold, count as nothing.
    """
    short = encoder.split([SHORT])
    for tokens in (short, batch):
        encoder.run(tokens)  # what the first run allocates is not counted
    alone = _median(encoder, short, clock)
    with _busy_threads(cores // 2):
        busy = _median(encoder, short, clock)
    texts_s: dict[int, float] = {}
    for runs in at_once:
        try:
            texts_s[runs] = texts_a_second(encoder, batch, runs, PART_S, clock)
        except EncoderError:
            if runs == 1:
                raise
            if not texts_s:
                texts_s[runs] = 0.0  # given, and more than a memory ceiling holds of such batches
            break
        if runs_at_once(texts_s) != runs:
            break
    return Timing(alone, busy, texts_s)


def _batch(encoder: Encoder, clock: Clock) -> Sequence[Tokens]:
    """A batch that takes no longer than a measurement may, and no more memory than there is; large models get one text.

    Raises EncoderError where not even a short query can be run.
    """
    short = encoder.split([SHORT])
    encoder.run(short)
    one_s = LONGER_COSTS * _median(encoder, short, clock)
    texts = max(1, int(PART_S / one_s)) if one_s * MAX_BATCH_TEXTS > PART_S else MAX_BATCH_TEXTS
    while texts:
        batch = encoder.split([LONGER] * texts)
        try:
            encoder.run(batch)
        except EncoderError:
            texts //= 2
        else:
            return batch
    return short


def _median(encoder: Encoder, tokens: Sequence[Tokens], clock: Clock) -> float:
    end = clock() + PART_S
    seconds: list[float] = []
    while not seconds or (len(seconds) < MAX_RUNS and clock() < end):
        started = clock()
        encoder.run(tokens)
        seconds.append(clock() - started)
    return statistics.median(seconds)


def texts_a_second(
    encoder: Encoder, batch: Sequence[Tokens], runs: int, part_s: float, clock: Clock = time.perf_counter
) -> float:
    """Texts a second while so many threads run the batch again and again, each at least once."""
    started = clock()

    def work(_: int) -> int:
        encoder.run(batch)
        done = len(batch)
        while clock() < started + part_s:
            encoder.run(batch)
            done += len(batch)
        return done

    with ThreadPoolExecutor(runs) as pool:
        return sum(pool.map(work, range(runs))) / (clock() - started)


@contextlib.contextmanager
def _busy_threads(count: int) -> Iterator[None]:
    """So many threads compute inside, as searches do: without Python's lock."""
    numbers, stop = np.linspace(0, 1e3, 1 << 14), threading.Event()

    def work() -> None:
        while not stop.is_set():
            np.sin(numbers)

    threads = [threading.Thread(target=work, name="vecsvc-busy", daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


@contextlib.contextmanager
def _closing(encoder: Encoder) -> Iterator[None]:
    """Close the encoder where what is inside fails."""
    try:
        yield
    except BaseException:
        encoder.close()
        raise
