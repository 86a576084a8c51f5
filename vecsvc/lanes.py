"""Which waiting texts go into the next run of an encoder: queues by lane, fair to requests, sorted by length."""

from __future__ import annotations

import time
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Final, Literal, TypeAlias, get_args

import numpy as np

from vecsvc.tokenizer import Tokens
from vecsvc.types import Vectors

LaneName: TypeAlias = Literal["interactive", "bulk"]
LANES: Final[tuple[LaneName, ...]] = get_args(LaneName)

# Texts share a run where the longer has at most so many tokens more, or so many times those of the shorter:
# beyond that, padding costs more than a run of its own.
NEAR_TOKENS: Final = 16
NEAR_FACTOR: Final = 1.25
OVERTAKING_RUNS: Final = 16  # so many interactive runs in a row, then one of bulk, if it waits


class Request:
    """Texts that one caller waits for. Whoever holds the batcher's lock may change it."""

    __slots__ = (
        "begun",
        "deadline",
        "failed",
        "gone",
        "lane",
        "left",
        "lengths",
        "missing",
        "queued",
        "run_s",
        "tokens",
        "vectors",
    )

    def __init__(self, tokens: Sequence[Tokens], dim: int, deadline: float, gone: Callable[[], bool]) -> None:
        """`deadline` is in seconds of time.monotonic(); `gone` tells whether the caller has left."""
        self.tokens = tokens
        self.deadline = deadline
        self.gone = gone
        self.lane: LaneName = "interactive"  # where it waits
        lengths = [cost(one) for one in tokens]
        # Texts that no run has taken yet, the shortest first.
        self.left = sorted(range(len(tokens)), key=lengths.__getitem__)
        self.lengths = [lengths[at] for at in self.left]
        self.missing = len(tokens)  # vectors that are not there yet
        self.vectors: Vectors = np.empty((len(tokens), dim), dtype=np.float32)
        self.run_s = 0.0  # time in runs of the model
        self.begun = False  # True once a run has taken its first text
        self.queued = 0.0  # time.perf_counter() when it began to wait
        self.failed = False

    @property
    def waiting_tokens(self) -> int:
        return sum(self.lengths)

    def longest(self, most: int) -> int:
        """The most tokens that a waiting text has, of those with at most `most`; 0 where there is none."""
        at = bisect_right(self.lengths, most)
        return self.lengths[at - 1] if at else 0

    def take(self, least: int, most: int, count: int) -> list[int]:
        """Take out at most `count` texts of `least` to `most` tokens, the longest ones; their positions."""
        high = bisect_right(self.lengths, most)
        low = max(bisect_left(self.lengths, least), high - count)
        taken = self.left[low:high]
        del self.left[low:high], self.lengths[low:high]
        return taken


Place: TypeAlias = tuple[Request, int]  # a request and the position of one of its texts


def cost(tokens: Tokens) -> int:
    """What a text adds to a run; a text without any token is padded to one."""
    return len(tokens) or 1


def begin(places: Sequence[Place]) -> tuple[float, ...]:
    """Note that the requests' first texts are taken; the seconds that each has waited for that."""
    now = time.perf_counter()
    waited = []
    for request, _ in places:
        if not request.begun:
            request.begun = True
            waited.append(now - request.queued)
    return tuple(waited)


def fail(places: Iterable[Place]) -> list[Request]:
    """Mark the requests of these texts as failed, and return those that were not before."""
    found = {id(request): request for request, _ in places if not request.failed}
    for request in found.values():
        request.failed = True
    return list(found.values())


class Lane:
    """Requests that wait for the same right of way; each in turn leads a run that the others fill up."""

    def __init__(self) -> None:
        self.requests: deque[Request] = deque()
        self.tokens = 0  # that wait, without padding

    def __len__(self) -> int:
        return len(self.requests)

    def add(self, request: Request) -> None:
        self.requests.append(request)
        self.tokens += request.waiting_tokens

    def sweep(self, now: float) -> list[Request]:
        """Forget whose callers left, and return those whose deadline has passed, which wait no longer either."""
        late = [request for request in self.requests if request.deadline <= now and not request.gone()]
        kept = [r for r in self.requests if r.deadline > now and not r.gone() and not r.failed]
        if len(kept) < len(self.requests):
            self.requests = deque(kept)
            self.tokens = sum(request.waiting_tokens for request in kept)
        return late

    def take(self, budget: int) -> list[Place]:
        """Texts of like length for one run, of at most `budget` tokens with padding; one text goes whatever its length.

        The request in front gives its longest text, and more while there is room; then the others in turn fill up
        with texts of like length. It goes to the end, so that the next run is led by the next one, and a large
        request holds up a small one for no more than a run of each.
        """
        if not self.requests:
            return []
        lead = self.requests[0].lengths[-1]
        reach = max(lead + NEAR_TOKENS, int(lead * NEAR_FACTOR))
        most = max(request.longest(reach) for request in self.requests)
        if most > budget:
            most = lead  # a longer text of somebody else must not push the leader's out
        least = min(most - NEAR_TOKENS, int(most / NEAR_FACTOR))
        return self._collect(max(1, budget // most), least, most)

    def take_any(self, count: int) -> list[Place]:
        """At most `count` texts of any length, for a batch whose texts come and go: one of each request in turn."""
        found: list[Place] = []
        while self.requests and len(found) < count:
            found += self._collect(1, 0, self.requests[0].lengths[-1])
        return found

    def _collect(self, room: int, least: int, most: int) -> list[Place]:
        found: list[Place] = []
        emptied = False
        for request in self.requests:
            taken = request.take(least, most, room - len(found))
            found += [(request, at) for at in taken]
            emptied = emptied or not request.left
            if len(found) >= room:
                break
        self.tokens -= sum(cost(request.tokens[at]) for request, at in found)
        self.requests.rotate(-1)
        if emptied:
            self.requests = deque(request for request in self.requests if request.left)
        return found


class Lanes:
    """The interactive and the bulk lane, and who goes first."""

    def __init__(self) -> None:
        self._lanes: dict[LaneName, Lane] = {"interactive": Lane(), "bulk": Lane()}
        self._overtaken = 0  # interactive runs in a row while bulk waited

    def __bool__(self) -> bool:
        return any(map(len, self._lanes.values()))

    def tokens(self, name: LaneName) -> int:
        """How many tokens wait in a lane."""
        return self._lanes[name].tokens

    def add(self, request: Request, name: LaneName) -> None:
        request.lane = name
        self._lanes[name].add(request)

    def sweep(self, now: float) -> list[Request]:
        """Forget whose callers left; those whose deadline has passed come back, and wait no longer."""
        return [request for lane in self._lanes.values() for request in lane.sweep(now)]

    def first(self) -> LaneName | None:
        """Which lane goes where only one can; None where nothing waits."""
        interactive, bulk = len(self._lanes["interactive"]), len(self._lanes["bulk"])
        # Without this, a stream of queries that fills the encoder would keep a bulk request waiting for ever.
        if not interactive or (bulk and self._overtaken >= OVERTAKING_RUNS):
            return "bulk" if bulk else None
        return "interactive"

    def take(self, name: LaneName, budget: int, *, overtakes: bool = False) -> list[Place]:
        """The texts of the lane's next run, of at most `budget` tokens with padding; none where nothing waits in it.

        `overtakes` says that bulk could have had this run.
        """
        if name == "bulk" or not self._lanes["bulk"]:
            self._overtaken = 0
        elif overtakes:
            self._overtaken += 1
        return self._lanes[name].take(budget)

    def take_any(self, room: int, spare: int) -> list[Place]:
        """Texts of any length that may join a running batch; bulk leaves `spare` of the `room` to queries to come.

        Where queries took all that bulk may have so often in a row, one text of bulk goes first.
        """
        bulk = self._lanes["bulk"]
        first = bulk.take_any(1) if room > 0 and self._overtaken >= OVERTAKING_RUNS else []
        found = first + self._lanes["interactive"].take_any(room - len(first))
        rest = bulk.take_any(room - len(found) - spare)
        if first or rest or not bulk:
            self._overtaken = 0
        elif len(found) > len(first):
            self._overtaken += 1
        return found + rest

    def clear(self) -> list[Request]:
        """Forget all, and return them."""
        waiting = [request for lane in self._lanes.values() for request in lane.requests]
        self._lanes = {"interactive": Lane(), "bulk": Lane()}
        return waiting
