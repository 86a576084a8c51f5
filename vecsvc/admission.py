"""How many requests may be at work at once: budgets of their own for questions and for bulk, which refuse at once."""

from __future__ import annotations

import time
from typing import Final, Literal, TypeAlias

from vecsvc.errors import Overloaded

FEW: Final = 8  # so many queries or texts in one request are a question still; more are bulk
# A batch whose body is longer, or of unknown length, is taken for bulk before anybody knows how many queries it has.
LARGE_BYTES: Final = 65_536
MIN_RETRY_S: Final = 0.001
MAX_RETRY_S: Final = 30.0
_KEEP: Final = 0.9  # weight of what was known beside a new measurement

# What a route asks of the process: nothing worth counting, one question, or as much as its body says.
Load: TypeAlias = Literal["none", "single", "many"]


class Budget:
    """Places for requests at work. Belongs to one event loop."""

    __slots__ = ("_filled_at", "_seconds", "coming", "in_flight", "limit", "setting")

    def __init__(self, setting: str, limit: int) -> None:
        self.setting, self.limit = setting, limit
        self.in_flight = 0
        self.coming = 0  # let in, and not begun
        self._seconds: float | None = None  # that a request held its place lately
        self._filled_at = 0.0  # time.perf_counter() when the last free place was taken

    @property
    def full(self) -> bool:
        return self.in_flight >= self.limit

    @property
    def crowded(self) -> bool:
        """Whether those that were let in and have not begun may take all that is free: a turn of the loop tells."""
        return self.in_flight < self.limit <= self.in_flight + self.coming

    def check(self) -> None:
        """Raise Overloaded where no place is free."""
        if self.in_flight >= self.limit:
            raise Overloaded(
                f"{self.limit} requests are in flight, the limit {self.setting}", retry_after_s=self.retry_after_s
            )

    def enter(self) -> float:
        """Take a place; what `leave` gets back."""
        self.check()
        now = time.perf_counter()
        self.in_flight += 1
        if self.in_flight >= self.limit:
            self._filled_at = now
        return now

    def leave(self, entered: float) -> None:
        self.in_flight -= 1
        seconds = time.perf_counter() - entered
        self._seconds = seconds if self._seconds is None else _KEEP * self._seconds + (1 - _KEEP) * seconds

    @property
    def retry_after_s(self) -> float:
        """When a place will be free, by what requests took lately.

        Where none has been free for longer than that, they take longer now: then that long, or what is said where
        nobody can tell.
        """
        if self._seconds is None:
            return Overloaded.retry_after_s
        full_s = time.perf_counter() - self._filled_at if self.full else 0.0
        return min(max(self._seconds, min(full_s, Overloaded.retry_after_s), MIN_RETRY_S), MAX_RETRY_S)


class Admission:
    """The budgets of one process. Bulk never takes the place of a question, and administration needs none."""

    __slots__ = ("bulk", "single")

    def __init__(self, max_in_flight: int, max_bulk_in_flight: int) -> None:
        self.single = Budget("max_in_flight", max_in_flight)
        self.bulk = Budget("max_bulk_in_flight", max_bulk_in_flight)

    @property
    def in_flight(self) -> int:
        return self.single.in_flight + self.bulk.in_flight

    def of(self, queries: int) -> Budget:
        """The budget that a request with so many queries or texts is counted in."""
        return self.single if queries <= FEW else self.bulk

    def check(self, load: Load, body_bytes: int | None) -> None:
        """Raise Overloaded where a request will be refused whatever its body holds, of which only the size is known.

        `body_bytes` is None where even that is not.
        """
        if load == "single":
            self.single.check()
        elif load == "many" and self.bulk.full:
            if body_bytes is None or body_bytes > LARGE_BYTES:
                self.bulk.check()
            self.single.check()  # the body is small, and so may be what it asks

    def crowded(self, load: Load, body_bytes: int) -> bool:
        """Whether a budget is crowded that a request may be counted in, of which only the size is known."""
        if load == "single":
            return self.single.crowded
        return self.bulk.crowded or (body_bytes <= LARGE_BYTES and self.single.crowded)
