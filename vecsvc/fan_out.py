"""One question to many nodes: a replica of each shard, a second one where the first takes long, one deadline for all.

Which replica: the better of two at random by observed latency and load (Mitzenmacher, "The Power of Two Choices in
Randomized Load Balancing", IEEE TPDS 2001). When a second one: after the 95th percentile of the replica's latency
(Dean and Barroso, "The Tail at Scale", CACM 2013), within a budget; the loser is cancelled. Where that budget is used
up, a replica that is silent for half of a question's time is asked around all the same, within another.
"""

from __future__ import annotations

import asyncio
import functools
import random
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from vecsvc import remote
from vecsvc.config import RouteSettings
from vecsvc.errors import (
    DeadlineExceeded,
    InternalError,
    NodeFailed,
    NotReady,
    Overloaded,
    ProtocolError,
    ShardsMissing,
    UserError,
    VecsvcError,
)
from vecsvc.node import KNOWN_AFTER, SLOW_START_S, Node
from vecsvc.remote import Kind
from vecsvc.route_metrics import RouteMetrics

PROBE_PART: Final = 0.2  # of the share of second questions, what copies may be
HEDGE_BURST: Final = 32.0  # second questions that may be asked at once after a quiet time
SILENCE_BURST: Final = 32.0  # questions that may be asked around silent nodes at once after a quiet time
RETRY_BURST: Final = 256.0  # a node that dies fails all that it had in flight at once
MAX_BUDGETS: Final = 65_536  # groups of shards with a budget of their own; past that all begin anew
LOOK_S: Final = 0.05  # a question that waits, and knows nobody else to ask, looks so often who has come back
PROBE_S: Final = 1.0  # a slower replica gets a copy of a question so often, to see whether it recovered
PROBE_GRACE_S: Final = 0.1  # past its deadline a copy is waited for so long, and then given up

# Another replica may answer where one failed in these ways; all else is the question's fault, or would be the same.
_RETRIED: Final = (NodeFailed, NotReady, Overloaded, InternalError)


class Budget:
    """A share of what was done may be done once more; `take` says whether there is room."""

    __slots__ = ("_burst", "_left", "share")

    def __init__(self, share: float, burst: float) -> None:
        self.share, self._burst = share, burst
        self._left = burst if share else 0.0

    def earn(self, times: int = 1) -> None:
        """Something was done so often."""
        self._left = min(self._burst, self._left + times * self.share)

    def take(self) -> bool:
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True


class ShardBudgets:
    """The budgets of some shards for second questions: what is asked again because it is late, and copies.

    Copies have their own. Where few questions come, one a second would be more than the budget, and nothing be left
    for late answers. So has silence: shards that are all slow would use up what a black hole needs.
    """

    __slots__ = ("hedges", "probes", "silence")

    def __init__(self, share: float, silence_share: float) -> None:
        self.hedges = Budget((1.0 - PROBE_PART) * share, HEDGE_BURST)
        self.probes = Budget(PROBE_PART * share, 1.0)
        self.silence = Budget(silence_share, SILENCE_BURST)

    def earn(self) -> None:
        self.hedges.earn()
        self.probes.earn()
        self.silence.earn()


@dataclass(slots=True)
class Budgets:
    """What all questions of a front door share. Shards have budgets of their own for second questions (decision 75)."""

    retries: Budget
    hedge_share: float
    hedge_min_s: float
    metrics: RouteMetrics
    shards: dict[Hashable, ShardBudgets] = field(default_factory=dict)

    @classmethod
    def of(cls, settings: RouteSettings, metrics: RouteMetrics) -> Budgets:
        return cls(
            Budget(settings.retry_share, RETRY_BURST), settings.hedge_share, settings.hedge_min_ms / 1e3, metrics
        )

    def of_shards(self, group: Group) -> ShardBudgets:
        """Those of the group's shards."""
        key = group.index, group.shards
        found = self.shards.get(key)
        if found is None:
            if len(self.shards) >= MAX_BUDGETS:
                self.shards.clear()
            found = self.shards[key] = ShardBudgets(self.hedge_share, self.retries.share)
        return found


class Group(msgspec.Struct, eq=False):
    """Shards that the same nodes hold, so that one of these is asked for all of them."""

    index: str
    shards: tuple[int, ...]
    nodes: list[Node]
    make: Callable[[int, float], bytes]  # the frame, from a request id and the milliseconds that are left
    expects: Kind
    holders: Callable[[tuple[int, ...]], list[Node]] | None = None  # who has these shards now; None for `nodes` always
    check: Callable[[Any], None] = lambda answer: None  # raises ProtocolError where the answer makes no sense
    queries: list[int] | None = None  # which of the question's queries these shards are asked; None for all
    answer: Any = None
    error: VecsvcError | None = None
    tried: list[Node] = []
    attempts: list[_Attempt] = []  # under way
    hedge_at: float = 0.0  # time.monotonic() when it will have taken long enough to ask another; 0 for never

    @property
    def done(self) -> bool:
        return self.answer is not None or self.error is not None


class _Attempt(msgspec.Struct, eq=False):
    """One node that was asked for one group."""

    group: Group
    node: Node
    kind: str
    started: float  # time.monotonic()
    request: int = 0
    awaited: bool = True


class Call:
    """One question under way. Made and used in the event loop: `run` it, or `begin` it and `end` it when it says so."""

    def __init__(
        self, groups: list[Group], budgets: Budgets, key: Hashable, deadline: float, *, partial: bool = False
    ) -> None:
        """`deadline` is in seconds of time.monotonic(); `key` tells sorts of question apart whose latencies differ.

        With `partial` it waits for every group until the deadline; without, it ends with the first that fails.
        """
        self.groups = groups
        self.deadline = deadline
        self.finished = False
        self._budgets, self._key, self._partial = budgets, key, partial
        self._loop = asyncio.get_running_loop()
        self._silent_at = 0.0  # who was asked before and has not answered by then is asked around
        self._timer: asyncio.TimerHandle | None = None
        self._tell: Callable[[], None] = _nobody_waits
        self._open = len(groups)  # groups without an answer or an error

    async def run(self) -> None:
        """Ask, and wait. Raises as `end` does."""
        finished: asyncio.Future[None] = self._loop.create_future()

        def tell() -> None:
            if not finished.done():
                finished.set_result(None)

        try:
            self.begin(tell)
            if not self.finished:
                await finished
        finally:
            self.stop()
        self.end()

    def begin(self, tell: Callable[[], None]) -> None:
        """Ask. `tell` is called once, when there is nothing more to wait for, unless that is so at the end of this."""
        now = time.monotonic()
        self._silent_at = (now + self.deadline) / 2
        look_at = min(now + LOOK_S, self._silent_at)
        self._budgets.retries.earn(len(self.groups))
        for group in self.groups:
            self._begin(group, look_at)
            if self.finished:
                break  # nobody would read what the others answer
        if not self.groups:
            self._finish()
        if not self.finished:
            self._tell = tell
            self._set_timer()

    def stop(self) -> None:
        """Wait for nothing more, and tell those who are at work still."""
        self.finished, self._tell = True, _nobody_waits
        if self._timer is not None:
            self._timer.cancel()
        probes = False
        for group in self.groups:
            if group.attempts:
                self._cancel(group, probes=not group.done)
                probes = probes or bool(group.attempts)
        if probes:
            left = self.deadline - time.monotonic()
            self._loop.call_later(max(0.0, left) + PROBE_GRACE_S, self._give_up_probes)

    def end(self) -> None:
        """Raise the first failure unless the caller takes parts; then the groups tell."""
        for group in self.groups:
            # What is wrong with the question is so for every shard, and no part of an answer makes up for it.
            if group.error is not None and (not self._partial or isinstance(group.error, UserError)):
                if isinstance(group.error, ShardsMissing):
                    group.error = ShardsMissing(f"{group.error}; ask again, or with partial for what is there")
                raise group.error

    # --------------------------------------------------------------------------------------------- choosing

    def _begin(self, group: Group, look_at: float) -> None:
        if len(group.nodes) == 1 and group.nodes[0].up:
            group.hedge_at = look_at  # another may have come by then
            self._send(group, group.nodes[0], "first")
            return
        node = self._choose(group)
        if node is None:
            self._fail(group, _missing(group))
            return
        self._budgets.of_shards(group).earn()
        if self._send(group, node, "first"):
            self._hedge_later(group)
            self._probe(group, node)

    def _hedge_later(self, group: Group) -> None:
        known = [n.latency(self._key).p95 for n in group.nodes if n.latency(self._key).count >= KNOWN_AFTER]
        # Not after the p95 of the replica that is asked: where it is the slow one, the other's is the better measure.
        delay = max(self._budgets.hedge_min_s, min(known) if known else SLOW_START_S)
        now = time.monotonic()
        group.hedge_at = now + delay
        if now < self._silent_at:
            group.hedge_at = min(group.hedge_at, self._silent_at)

    def _choose(self, group: Group) -> Node | None:
        """The node to ask next; None where there is none that was not tried."""
        if group.tried and group.holders is not None:
            group.nodes = group.holders(group.shards)  # some come back while a question is under way
        left = [node for node in group.nodes if node.up and node not in group.tried]
        # Where every replica is draining or ejected, one of them may still answer: better than none.
        candidates = [node for node in left if node.usable()] or left
        if not candidates:
            return None
        if len(candidates) == 1:
            return candidates[0]
        one, other = random.sample(candidates, 2) if len(candidates) > 2 else candidates
        now = time.monotonic()
        a, b = one.cost(self._key, now), other.cost(self._key, now)
        if a == b:
            return random.choice((one, other))
        return one if a < b else other

    def _probe(self, group: Group, chosen: Node) -> None:
        """Send a copy to a replica that would not be chosen, now and then, to see whether it recovered.

        A user's question must not be what a slow node is tried with.
        """
        now = time.monotonic()
        others = [node for node in group.nodes if node is not chosen and (node.usable() or node.returning(now))]
        if len(others) > 1:
            others.sort(key=lambda node: node.latency(self._key).heard())
        for node in others:
            latency = node.latency(self._key)
            # One that was ejected comes back by no other way, so that its copy needs no budget.
            if now - latency.heard() > PROBE_S and (
                node.returning(now) or self._budgets.of_shards(group).probes.take()
            ):
                latency.probed = now
                self._budgets.metrics.hedges("probe_sent").inc()
                self._send(group, node, "probe")

    # ---------------------------------------------------------------------------------------------- sending

    def _send(self, group: Group, node: Node, kind: str) -> bool:
        attempt = _Attempt(group, node, kind, time.monotonic())
        left_ms = max(0.1, (self.deadline - attempt.started) * 1e3)
        if kind != "probe":
            group.tried.append(node)
        try:
            attempt.request = node.ask(group.make, left_ms, functools.partial(self._replied, attempt))
        except NodeFailed as error:
            if kind == "first":
                self._again(group, error)
            return False
        if not node.in_flight or not node.overdue_at:
            node.overdue_at = attempt.started + node.latency(self._key).expected
        node.in_flight += 1
        group.attempts.append(attempt)
        return True

    def _replied(self, attempt: _Attempt, kind: Kind | None, payload: bytes, error: NodeFailed | None) -> None:
        if not attempt.awaited:
            return
        now = time.monotonic()
        group, node = attempt.group, attempt.node
        node.in_flight -= 1
        node.overdue_at = 0.0
        if attempt in group.attempts:
            group.attempts.remove(attempt)
        answer = None
        failure: VecsvcError | None = error
        if kind is group.expects:
            try:
                answer = remote.decode(group.expects, payload)
                group.check(answer)
            except ProtocolError as wrong:
                failure = wrong
        elif kind is not None:
            failure = _failure(group, node, kind, payload)
        if failure is not None:
            if kind is not None and isinstance(failure, _RETRIED):
                node.latency(self._key).failed()
                if isinstance(failure, NodeFailed | InternalError):
                    node.failed(str(failure))
            if not group.done and attempt.kind != "probe":
                self._again(group, failure)
            return
        node.answered(self._key, now - attempt.started, now)
        if group.done:
            return
        group.answer = answer
        if attempt.kind != "first":
            self._budgets.metrics.hedges(attempt.kind + "_won").inc()
        if group.attempts:
            self._outlived(group, now)
            self._cancel(group, probes=False)
        self._open -= 1
        if not self._open:
            self._finish()

    def _again(self, group: Group, failure: VecsvcError) -> None:
        """A node failed: wait for another that was asked, ask another, or give up."""
        now = time.monotonic()
        asked = [attempt for attempt in group.attempts if attempt.kind != "probe"]
        if any(now < self._silent_at or attempt.started >= self._silent_at for attempt in asked):
            return
        if isinstance(failure, _RETRIED) and now < self.deadline and not self.finished:
            while (node := self._choose(group)) is not None:
                if not self._budgets.retries.take():
                    break
                self._budgets.metrics.retries().inc()
                if self._send(group, node, "retry"):
                    self._hedge_later(group)
                    if self._timer is not None:
                        self._timer.cancel()
                        self._set_timer()
                    return
        if asked:
            return  # silent as they are, they may answer yet
        for probe in group.attempts:
            probe.kind = "retry"  # what was only a copy is all that is left
            return
        # A node that does not hold the version any more is as good as none.
        self._fail(group, _missing(group, str(failure)) if isinstance(failure, NodeFailed | NotReady) else failure)

    def _fail(self, group: Group, error: VecsvcError) -> None:
        group.error = error
        self._open -= 1
        if not self._open or not self._partial:
            self._finish()

    # ------------------------------------------------------------------------------------------------- time

    def _set_timer(self) -> None:
        due = self.deadline
        for group in self.groups:
            if 0.0 < group.hedge_at < due and not group.done:
                due = group.hedge_at
        self._timer = self._loop.call_later(max(0.0, due - time.monotonic()), self._tick)

    def _tick(self) -> None:
        now = time.monotonic()
        if now >= self.deadline:
            for group in self.groups:
                if not group.done:
                    names = ", ".join(node.name for node in group.tried)
                    group.error = DeadlineExceeded(
                        f"no answer within timeout_ms for {_shards(group)}, asked of {names}; allow more time"
                    )
                    self._outlived(group, now)
            self._finish()
            return
        for group in self.groups:
            if group.hedge_at and not group.done and now >= group.hedge_at:
                group.hedge_at = 0.0
                self._hedge(group, now)
        if not self.finished:
            self._set_timer()

    def _hedge(self, group: Group, now: float) -> None:
        """Ask another node as well, where one may be asked; and one more when half of what is then left has passed.

        Where there is none that was not asked, it looks again soon whether one has come.
        """
        self._outlived(group, now)
        budgets, silent = self._budgets.of_shards(group), now >= self._silent_at
        group.hedge_at = now + LOOK_S if silent else min(now + LOOK_S, self._silent_at)
        while (node := self._choose(group)) is not None and (silent or node.usable()):
            copy = next((attempt for attempt in group.attempts if attempt.node is node), None)
            if copy is not None:  # as a probe it is at work already for what would be asked again
                copy.kind = "hedge"
                group.tried.append(node)
                break
            if budgets.hedges.take():
                outcome = "sent"
            elif silent and budgets.silence.take():
                outcome = "silence"
            else:
                self._budgets.metrics.hedges("no_budget").inc()
                group.hedge_at = 0.0 if silent else self._silent_at
                return
            self._budgets.metrics.hedges(outcome).inc()
            if self._send(group, node, "hedge"):
                break
        else:
            return
        if len(group.tried) < len(group.nodes):
            group.hedge_at = (now + self.deadline) / 2

    def _outlived(self, group: Group, now: float) -> None:
        for attempt in group.attempts:
            attempt.node.latency(self._key).outlived(now - attempt.started)

    # ---------------------------------------------------------------------------------------------- the end

    def _cancel(self, group: Group, *, probes: bool) -> None:
        """Call back what is under way. A probe goes on once there is an answer: it is there to be timed."""
        for attempt in list(group.attempts):
            if attempt.kind != "probe" or probes:
                group.attempts.remove(attempt)
                attempt.awaited = False
                attempt.node.in_flight -= 1
                attempt.node.cancel(attempt.request)

    def _give_up_probes(self) -> None:
        """What a node never answers must not count as under way for ever."""
        now = time.monotonic()
        for group in self.groups:
            self._outlived(group, now)
            self._cancel(group, probes=True)

    def _finish(self) -> None:
        if not self.finished:
            self.finished = True
            self._tell()


def _nobody_waits() -> None:
    pass


def _failure(group: Group, node: Node, kind: Kind, payload: bytes) -> VecsvcError:
    """What an answer says that is not what was expected."""
    if kind is not Kind.FAILED:
        return ProtocolError(f"node {node.name} answered with {kind.name}, expected {group.expects.name}")
    try:
        return remote.raised(remote.decode(kind, payload))
    except ProtocolError as wrong:
        return wrong


def _shards(group: Group) -> str:
    numbers = ", ".join(map(str, group.shards[:10])) + ("..." if len(group.shards) > 10 else "")
    return f"shard{'s' if len(group.shards) > 1 else ''} {numbers}" if group.shards else "any shard"


def _missing(group: Group, why: str = "") -> ShardsMissing:
    return ShardsMissing(f"{_shards(group)}: {why or 'no node that is connected has it of this version'}")
