"""The threads that run an encoder for the batcher: whole runs, or steps of a batch that texts join and leave."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import sys
import threading
import time
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from vecsvc.batcher import Batcher, Run, RunFacts
from vecsvc.encoders.base import Encoder, StepEncoder
from vecsvc.errors import EncoderError
from vecsvc.lanes import LaneName, Lanes, Place, cost
from vecsvc.tokenizer import Tokens

log: Final = logging.getLogger("vecsvc.batcher")

SPARE_PART: Final = 4  # of a stepper's places one in so many is kept free of bulk
ALONE_TOKENS: Final = 64  # a single text of at most so many tokens is run whole where nothing else waits or runs


def start_worker(batcher: Batcher, encoder: Encoder, number: int, lane: LaneName | None) -> threading.Thread:
    """Start a thread that runs the encoder for what waits in the lane, until the batcher has no more use for it.

    None stands for both lanes: texts of both are in a batch that goes by steps.
    """
    worker = _StepWorker(batcher, encoder, number) if lane is None else _Worker(batcher, encoder, number, lane)
    # A daemon: a model that never returns must not keep the process from ending.
    thread = threading.Thread(target=worker.work, name=f"vecsvc-encoder-{number}", daemon=True)
    thread.start()
    return thread


def _yield_to_others(nice: int) -> None:
    """Give this thread a smaller share of a core that others want, too: at 10 a tenth. There is no way back."""
    if sys.platform == "linux":  # elsewhere it would be the whole process
        with contextlib.suppress(OSError):
            thread = threading.get_native_id()
            os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + nice)


class _Worker:
    """Makes whole runs, one after the other."""

    def __init__(self, batcher: Batcher, encoder: Encoder, number: int, lane: LaneName | None) -> None:
        self.batcher, self.encoder, self.number, self.lane = batcher, encoder, number, lane

    def work(self) -> None:
        if self.lane == "bulk" and self.batcher.bulk_nice:
            _yield_to_others(self.batcher.bulk_nice)
        while True:
            try:
                if not self.turn():
                    return
            except Exception as error:  # a failing model ends elsewhere: this is a bug of ours
                log.exception("a bug of ours", extra={"data": {"encoder": self.encoder.spec.name}})
                self.batcher.fail_all(self.number, error)

    def turn(self) -> bool:
        run = self.batcher.wait(self.number, self.lane, self._choose)
        if run is not None:
            self.run_whole(run)
        return run is not None

    def _choose(self, lanes: Lanes) -> Run | None:
        assert self.lane is not None
        return self.batcher.take(self.lane)

    def run_whole(self, run: Run) -> None:
        """One run; where it fails, one for each request in it, so that only the guilty one fails."""
        found: list[tuple[Place, NDArray[np.float32]]] = []
        failed: list[tuple[Sequence[Place], Exception]] = []
        started = time.perf_counter()
        try:
            found = self._attempt(run.places)
            longest = max(cost(request.tokens[at]) for request, at in run.places)
            if self.batcher.has_run(self.number):  # what a wedged run took says nothing of others
                seconds = time.perf_counter() - started
                self.batcher.learn(run.lane, len(run.places), len(run.places) * longest, seconds)
        except Exception as error:
            parts = [list(part) for _, part in itertools.groupby(run.places, key=lambda place: id(place[0]))]
            if len(parts) == 1:
                failed = [(run.places, error)]
            for part in parts if len(parts) > 1 else ():
                if not self.batcher.retry(self.number, run):
                    return
                try:
                    found += self._attempt(part)
                except Exception as again:
                    failed.append((part, again))
        self.finish(run, run.places, found, failed, time.perf_counter() - started)

    def _attempt(self, places: Sequence[Place]) -> list[tuple[Place, NDArray[np.float32]]]:
        tokens: list[Tokens] = [request.tokens[at] for request, at in places]
        return list(zip(places, self.batcher.run(self.encoder, tokens), strict=True))

    def finish(
        self,
        run: Run,
        counted: Sequence[Place],
        found: Sequence[tuple[Place, NDArray[np.float32]]],
        failed: Sequence[tuple[Sequence[Place], Exception]],
        seconds: float,
    ) -> None:
        tokens = sum(len(request.tokens[at]) for request, at in counted)
        facts = RunFacts(run.lane, len(run.places), len(counted), tokens, seconds, run.waited_s, bool(failed))
        self.batcher.finish(self.number, run, found, failed, seconds, facts)


class _StepWorker(_Worker):
    """Advances a batch by steps; between two of them texts join it, and those that are ready or unwanted leave."""

    def __init__(self, batcher: Batcher, encoder: Encoder, number: int) -> None:
        super().__init__(batcher, encoder, number, None)
        assert isinstance(encoder, StepEncoder)
        self._steps = encoder
        self._stepper = encoder.stepper()
        self._inside: dict[int, Place] = {}
        self._keys = itertools.count()
        self._joining = 0  # of the run's places, the last so many come new

    def turn(self) -> bool:
        gone = [key for key, (request, _) in self._inside.items() if request.gone() or request.failed]
        if gone:
            self._stepper.drop(gone)
            for key in gone:
                del self._inside[key]
        run = self.batcher.wait(self.number, None, self._choose_joining, inside=bool(self._inside))
        if run is None:
            self.batcher.give_up(self._inside.values())
            return False
        new = run.places[len(self._inside) :]
        if not self._inside and len(new) == 1 and cost(new[0][0].tokens[new[0][1]]) <= ALONE_TOKENS:
            self.run_whole(run)
            return True
        self._advance(run, new)
        return True

    def _choose_joining(self, lanes: Lanes) -> Run | None:
        room = self._stepper.room()
        spare = (room + len(self._inside)) // SPARE_PART
        joining = lanes.take_any(room, spare if self._inside else min(spare, room - 1))
        places = [*self._inside.values(), *joining]
        return Run((joining or places)[0][0].lane, places) if places else None

    def _advance(self, run: Run, new: Sequence[Place]) -> None:
        started = time.perf_counter()
        joining = dict(zip(self._keys, new, strict=False))
        self._inside |= joining
        try:
            if joining:
                self._stepper.join([(key, request.tokens[at]) for key, (request, at) in joining.items()])
            ready = self._stepper.step()
            found = [(self._inside.pop(key), vector) for key, vector in ready]
        except Exception as error:
            self.batcher.note(error)
            # Nobody can tell what state the batch is in: a fresh one, and each request of the old one by itself.
            self._inside.clear()
            self._stepper = self._steps.stepper()
            ordered = sorted(run.places, key=lambda place: id(place[0]))
            self._alone(run, ordered, error)
            return
        self.finish(run, new, found, [], time.perf_counter() - started)

    def _alone(self, run: Run, places: Sequence[Place], error: Exception) -> None:
        found: list[tuple[Place, NDArray[np.float32]]] = []
        failed: list[tuple[Sequence[Place], Exception]] = []
        started = time.perf_counter()
        for place in places:
            if not self.batcher.retry(self.number, run):
                return
            try:
                found += self._attempt([place])
            except Exception as again:
                failed.append(([place], again if isinstance(again, EncoderError) else error))
        self.finish(run, [], found, failed, time.perf_counter() - started)
