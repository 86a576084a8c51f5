"""What a run of an encoder takes on this machine, learnt from the runs that were made."""

from __future__ import annotations

from typing import Final

MIN_RUN_TOKENS: Final = 64  # a run may have so many tokens, however slow the model is
MAX_RUN_TOKENS: Final = 16_384  # and no more than so many, however fast: padding and memory grow with it
FIRST_RUN_TOKENS: Final = 256  # before anything was measured
_KEEP: Final = 0.95  # weight of what was known beside a new measurement: the last 20 runs count
_KEEP_SINGLE: Final = 0.8


class RunTimes:
    """Seconds of a run as a line over its tokens, and seconds of a single text by its length.

    Threads may learn at the same time: a lost measurement does no harm.
    """

    def __init__(self) -> None:
        self._sums = (0.0, 0.0, 0.0, 0.0, 0.0)  # weights, tokens, seconds, tokens squared, tokens times seconds
        self._single: dict[int, float] = {}  # by the binary length of the number of tokens

    def learn(self, texts: int, tokens: int, seconds: float) -> None:
        """A run of so many texts and tokens, padding included, took so long."""
        n, x, y, xx, xy = (_KEEP * value for value in self._sums)
        self._sums = (n + 1, x + tokens, y + seconds, xx + tokens * tokens, xy + tokens * seconds)
        if texts == 1:
            length = tokens.bit_length()
            before = self._single.get(length, seconds)
            self._single[length] = _KEEP_SINGLE * before + (1 - _KEEP_SINGLE) * seconds

    def single(self, tokens: int) -> float | None:
        """Seconds that a run of one text of about so many tokens takes; None before one was seen."""
        return self._single.get(tokens.bit_length())

    def budget(self, run_s: float) -> int:
        """Tokens, padding included, of a run that takes about `run_s`."""
        n, x, y, xx, xy = self._sums
        if not x or y <= 0:
            return FIRST_RUN_TOKENS
        fixed, each = 0.0, y / x
        spread = n * xx - x * x
        if spread > 1e-3 * n * xx:  # else all runs were alike, and no line can be told
            slope = (n * xy - x * y) / spread
            start = (y - slope * x) / n
            if slope > 0 and start >= 0:
                fixed, each = start, slope
        return int(min(max((run_s - fixed) / each, MIN_RUN_TOKENS), MAX_RUN_TOKENS))
