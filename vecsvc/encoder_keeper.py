"""Watches over an opened encoder: one that is wedged, or keeps failing its runs and its self-test, is replaced."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Final

from vecsvc.batcher import Batcher
from vecsvc.encoders.base import CANARY_TEXTS, Encoder, check_canaries
from vecsvc.errors import EncoderError
from vecsvc.types import Vectors

log: Final = logging.getLogger("vecsvc.encoder")

MAX_FAILURES: Final = 3  # runs in a row that gave nothing; then the encoder itself is tested
LOOK_S: Final = 0.5  # between two looks; less where a stall is shorter than some of them
FIRST_PAUSE_S: Final = 1.0  # between two attempts to open the encoder anew; each is twice the one before
LAST_PAUSE_S: Final = 60.0


class EncoderKeeper:
    """A thread that looks at a batcher now and then, and gives it a new encoder where the old one is no good.

    A wedged session cannot be stopped: its thread is left behind, and its memory with it, until it returns.
    """

    def __init__(
        self,
        batcher: Batcher,
        reopen: Callable[[], Encoder],
        golden: Vectors,
        stall_s: float,
        replaced: Callable[[], None] = lambda: None,
    ) -> None:
        """`golden` are the vectors (n, dim) of CANARY_TEXTS as the encoder gave them when it was opened.

        `replaced` is called in the keeper's thread after a fresh session took over.
        """
        self._replaced = replaced
        self._batcher = batcher
        self._reopen = reopen
        self._golden = golden
        self._stall_s = stall_s
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="vecsvc-encoder-keeper", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop watching. An encoder that is just being opened is closed again."""
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(min(LOOK_S, self._stall_s / 4)):
            try:
                why = self._diagnose()
                if why:
                    self._replace(why)
            except Exception:
                log.exception("a bug of ours")

    def _diagnose(self) -> str:
        """What is wrong with the encoder; empty where nothing is."""
        name = self._batcher.encoder.spec.name
        if self._batcher.longest_run_s() > self._stall_s:
            return f"a run of encoder {name!r} took longer than encoder_stall_s, {self._stall_s:g} s"
        if self._batcher.failures < MAX_FAILURES:
            return ""
        # So many failures may as well be the texts' fault.
        why = self._test(self._batcher.encoder)
        if why:
            return f"encoder {name!r} failed {self._batcher.failures} runs in a row and its self-test: {why}"
        self._batcher.failures = 0
        return ""

    def _test(self, encoder: Encoder) -> str:
        """Why the canaries do not come out as they did when the encoder was opened; empty where they do."""
        outcome = [f"no vectors within encoder_stall_s, {self._stall_s:g} s"]

        def test() -> None:
            try:
                check_canaries(encoder.spec.name, encoder.encode(CANARY_TEXTS), encoder.spec.name, self._golden)
                outcome[0] = ""
            except Exception as error:
                outcome[0] = str(error)

        thread = threading.Thread(target=test, name="vecsvc-encoder-test", daemon=True)
        thread.start()
        thread.join(self._stall_s)
        return outcome[0]

    def _replace(self, why: str) -> None:
        old = self._batcher.encoder
        self._batcher.suspend(why)
        log.warning("encoder suspended", extra={"data": {"encoder": old.spec.name, "why": why}})
        old.close()
        pause = FIRST_PAUSE_S
        while not self._closed.is_set():
            try:
                fresh = self._reopen()
                problem = self._test(fresh)
                if problem:
                    fresh.close()
                    raise EncoderError(problem)
                self._batcher.resume(fresh)
            except Exception as error:
                self._batcher.problem = f"{why}; opening it anew failed: {error}"
                log.warning("encoder not reopened", extra={"data": {"encoder": old.spec.name, "why": str(error)}})
                self._closed.wait(pause)
                pause = min(2 * pause, LAST_PAUSE_S)
                continue
            self._replaced()
            log.info("encoder replaced", extra={"data": {"encoder": old.spec.name}})
            return
