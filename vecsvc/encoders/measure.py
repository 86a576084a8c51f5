"""Finds out how many threads an encoder is fastest with on this machine, by a short measurement."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

from vecsvc.encoders.base import Encoder
from vecsvc.onnx_session import usable_cores
from vecsvc.tokenizer import Tokens

E = TypeVar("E", bound=Encoder)

PART_S: Final = 0.1  # time for each of the four measurements, but one run is always made
MAX_RUNS: Final = 9
BATCH_TEXTS: Final = 16
SHORT: Final = "how do I list the files of a folder"
LONGER: Final = "The quick brown fox jumps over the lazy dog, and the files of a folder are listed by name. " * 2
# All cores are taken from everything else, so they must pay: a query must get so much faster by them, ...
PAYS_SHORT: Final = 0.85
# ... or a batch so much, with a query that does not get slower.
PAYS_BATCH: Final = 0.7


@dataclass(frozen=True, slots=True)
class Timing:
    """Median seconds of a run, by the number of threads it ran with."""

    short_s: float  # one short query
    batch_s: float  # BATCH_TEXTS texts of some forty tokens


def open_fastest(open_with: Callable[[int], E], cores: int | None = None) -> E:
    """Open an encoder with one thread and with one a core, and keep the better one.

    `open_with` opens it with so many threads. With one core there is nothing to choose.
    """
    cores = cores if cores is not None else usable_cores()
    single = open_with(1)
    if cores == 1:
        return single
    try:
        alone = measure(single)
        many = open_with(cores)
    except BaseException:
        single.close()
        raise
    try:
        together = measure(many)
    except BaseException:
        single.close()
        many.close()
        raise
    if pays(alone, together):
        single.close()
        return many
    many.close()
    return single


def pays(alone: Timing, together: Timing) -> bool:
    """Whether all cores are worth taking, given what one and what all of them need."""
    if together.short_s <= PAYS_SHORT * alone.short_s:
        return True
    return together.short_s <= 1.1 * alone.short_s and together.batch_s <= PAYS_BATCH * alone.batch_s


def measure(encoder: Encoder, clock: Callable[[], float] = time.perf_counter) -> Timing:
    """How long the encoder takes for a short query and for a batch, each within about PART_S."""
    short = encoder.split([SHORT])
    batch = encoder.split([LONGER] * BATCH_TEXTS)
    encoder.run(short)  # what the first run allocates is not counted
    return Timing(_median(encoder, short, clock), _median(encoder, batch, clock))


def _median(encoder: Encoder, tokens: Sequence[Tokens], clock: Callable[[], float]) -> float:
    end = clock() + PART_S
    seconds: list[float] = []
    while not seconds or (len(seconds) < MAX_RUNS and clock() < end):
        started = clock()
        encoder.run(tokens)
        seconds.append(clock() - started)
    return statistics.median(seconds)
