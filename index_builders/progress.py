"""Says how far a long piece of work is: a bar on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Final, TextIO

LINE_EVERY_S: Final = 5.0
TELLING: Final = 1000  # so many, or a hundredth: what the first few took, kernels to compile among it, says nothing


def no_progress(done: int) -> None:
    pass


def part(progress: Callable[[int], None], name: str) -> None:
    """Say which part of a phase is being worked on, to whoever shows it."""
    if isinstance(progress, Phase):
        progress.part = name


class Phase:
    """One phase of known or unknown length. Use as a context manager; call it with the rows that got done."""

    def __init__(
        self, name: str, total: int | None, stream: TextIO | None = None, unit: str = "rows", before: int = 0
    ) -> None:
        """`before` of the total were done by an earlier run: they count as done, and not for the speed."""
        self.name, self.total, self.unit = name, total, unit
        self.part = ""
        self.done = self._before = before
        self._stream = stream if stream is not None else sys.stderr
        self._terminal = self._stream.isatty()
        self._started = self._shown = time.monotonic()

    def __enter__(self) -> Phase:
        return self

    def __call__(self, done: int) -> None:
        self.done += done
        now = time.monotonic()
        if now - self._shown >= (0.1 if self._terminal else LINE_EVERY_S):
            self._shown = now
            self._show("\r" if self._terminal else "", "" if self._terminal else "\n")

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if error is None:
            self._show("\r" if self._terminal else "", "\n")
        elif self._terminal:
            self._stream.write("\n")

    def _show(self, before: str, after: str) -> None:
        seconds = time.monotonic() - self._started
        name = f"{self.name} ({self.part})" if self.part and self.done < (self.total or 0) else self.name
        line = f"{name}: {self.done:,} {self.unit}"
        if self.total and self.done > self.total:
            pass  # of one shard of many it is an estimate
        elif self.total and self._terminal:
            filled = round(24 * self.done / self.total)
            line = f"{name:<12} [{'#' * filled}{'.' * (24 - filled)}] {self.done:,}/{self.total:,} {self.unit}"
        elif self.total:
            line = f"{name}: {self.done:,} of {self.total:,} {self.unit} ({100 * self.done / self.total:.0f} %)"
        line += f", {seconds:.1f} s"
        now = self.done - self._before
        if now and seconds > 2:
            speed = now / seconds
            line += f", {speed:,.0f} {self.unit}/s" if speed >= 10 else f", {speed:.2g} {self.unit}/s"
            if self.total and self.done < self.total and now >= min(self.total / 100, TELLING):
                line += f", about {_duration((self.total - self.done) / speed)} to go"
        self._stream.write(f"{before}{line:<78}" if self._terminal else line)
        self._stream.write(after)
        self._stream.flush()


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 100 else f"{minutes} min" if minutes < 100 else f"{minutes / 60:.1f} h"
