"""A question to many nodes ends by its deadline with one answer a group, whatever the nodes do; chosen, hedged, retried
within budgets."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import random
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import pytest
import virtual_time
from prometheus_client import CollectorRegistry

from vecsvc import fan_out, node, remote
from vecsvc.config import RouteSettings
from vecsvc.errors import (
    DeadlineExceeded,
    InvalidRequest,
    NodeFailed,
    Overloaded,
    ProtocolError,
    ShardsMissing,
    UserError,
    VecsvcError,
)
from vecsvc.fan_out import Budget, Budgets, Call, Group
from vecsvc.merging import check_part
from vecsvc.node import KNOWN_AFTER, LEAST_WEIGHT, MEAN_OVER_S, MOST_WEIGHT, UNKNOWN_S, Latency, Node
from vecsvc.remote import FoundRow, Held, Holdings, Kind, Part
from vecsvc.route_metrics import RouteMetrics
from vecsvc.telemetry import Spread
from vecsvc.topology import Address

HELD = Held("it", "v1", "d", "2026", True, [0], 1)
READY = Holdings(remote.PROTOCOL, [HELD], False, "")


class FakeTransport:
    """The wire of a node's connection: what is written goes to the node's script, frame by frame."""

    def __init__(self, fake: FakeNode) -> None:
        self._fake, self._frames = fake, remote.Frames(remote.OF_FRONT_DOORS, remote.MAX_REQUEST_BYTES)
        self.closed = False

    def write(self, data: bytes) -> None:
        if not self.closed:
            for kind, request, payload in self._frames.feed(data):
                self._fake.take(kind, request, payload)

    def get_write_buffer_size(self) -> int:
        return 0

    def abort(self) -> None:
        self.closed = True

    close = abort


class FakeNode:
    """A Node of ours with its real connection, but for the wire; `script` says how it answers a question."""

    def __init__(self, name: str, settings: RouteSettings, script: Callable[[FakeNode, int, bytes], None]) -> None:
        self.node = Node(Address(name, 1), settings, lambda: None, Spread())
        self.script = script
        self.asked = 0
        self.cancelled: list[int] = []
        self.connect()

    def connect(self, holdings: Holdings = READY) -> None:
        self.connection = node._Connection(self.node.name, self.node._heard, self.node._ended)
        self.transport = FakeTransport(self)
        self.connection.connection_made(self.transport)  # type: ignore[arg-type]
        self.node.holdings, self.node._connection, self.node.problem = holdings, self.connection, ""

    def lose(self) -> None:
        self.transport.closed = True
        self.connection.connection_lost(ConnectionResetError("reset"))

    def take(self, kind: Kind, request: int, payload: bytes) -> None:
        if kind is Kind.CANCEL:
            self.cancelled.append(request)
        else:
            self.asked += 1
            self.script(self, request, payload)

    def say(self, delay: float, data: bytes) -> None:
        """So much later, unless the connection is lost by then."""
        connection = self.connection

        def send() -> None:
            if not connection.lost.done():
                connection.data_received(data)

        asyncio.get_running_loop().call_later(delay, send)

    def found(self, delay: float, request: int, payload: bytes) -> None:
        """Answer with what was asked."""
        self.say(delay, remote.message(Kind.FOUND, request, FoundRow(remote.decode(Kind.FIND, payload).id.encode())))

    def failed(self, delay: float, request: int, code: str) -> None:
        self.say(delay, remote.message(Kind.FAILED, request, remote.Failed(code, f"{code} at {self.node.name}")))

    @property
    def waiting(self) -> int:
        return len(self.connection._replies)


def answering(delay: float) -> Callable[[FakeNode, int, bytes], None]:
    return lambda fake, request, payload: fake.found(delay, request, payload)


def failing(code: str, delay: float = 0.001) -> Callable[[FakeNode, int, bytes], None]:
    return lambda fake, request, payload: fake.failed(delay, request, code)


def silent(fake: FakeNode, request: int, payload: bytes) -> None:
    pass


def check(answer: FoundRow) -> None:
    if not answer.vector:
        raise ProtocolError("an empty answer")


def group(number: int, fakes: list[FakeNode]) -> Group:
    def make(request: int, left_ms: float) -> bytes:
        assert left_ms > 0
        return remote.message(Kind.FIND, request, remote.Find("it", "v1", f"shard {number}"))

    return Group("it", (number,), [fake.node for fake in fakes], make, Kind.FOUND, check=check)


def budgets(settings: RouteSettings) -> Budgets:
    return Budgets.of(settings, RouteMetrics(CollectorRegistry(), list, list))


def hedged(shared: Budgets, outcome: str = "sent") -> float:
    return shared.metrics.hedges(outcome).value


Run = Callable[[Coroutine[Any, Any, None]], None]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    return lambda made: virtual_time.run(made, monkeypatch, fan_out, node)


def now() -> float:
    return asyncio.get_running_loop().time()


# ------------------------------------------------------------------------------------------------- the model


async def _one_run(seed: int) -> None:
    """Many questions at once to nodes that do anything, and come and go."""
    chance = random.Random(seed)
    random.seed(seed)
    settings = RouteSettings(
        hedge_share=chance.choice((0.0, 0.05, 1.0)),
        retry_share=chance.choice((0.0, 0.1, 1.0)),
        eject_failures=chance.choice((1, 3, 5)),
        eject_s=chance.choice((0.05, 1.0)),
    )
    shared = budgets(settings)
    loop = asyncio.get_running_loop()

    def anything(fake: FakeNode, request: int, payload: bytes) -> None:
        delay = chance.choice((0.0, 0.001, 0.01, 0.1, 1.0)) * chance.random()
        match chance.randrange(24 if fake.node.name < "n3" else 12):
            case 0:
                fake.failed(delay, request, chance.choice(("overloaded", "internal", "not_ready", "deadline_exceeded")))
            case 1:
                fake.failed(delay, request, "invalid")
            case 2:
                fake.say(delay, remote.frame(Kind.FOUND, request, b"\xc1"))
            case 3:
                fake.say(delay, remote.frame(Kind.PONG, request))
            case 4:
                fake.say(delay, remote.message(Kind.FOUND, request, FoundRow(None)))
            case 5:
                fake.say(delay, bytes(40))  # a frame of kind 0: the connection ends
            case 6:
                pass
            case 7:
                loop.call_later(delay, lose, fake)
                loop.call_later(delay + chance.random(), back, fake)
            case _:
                fake.found(delay, request, payload)
                if chance.random() < 0.05:
                    fake.found(delay, request, payload)  # twice

    def lose(fake: FakeNode) -> None:
        if not fake.connection.lost.done():
            fake.lose()

    def back(fake: FakeNode) -> None:
        if fake.connection.lost.done():
            fake.connect(Holdings(remote.PROTOCOL, [HELD], chance.random() < 0.1, ""))

    fakes = [FakeNode(f"n{i}", settings, anything) for i in range(chance.randint(1, 6))]
    groups_begun = 0

    async def question(number: int) -> None:
        nonlocal groups_begun
        await asyncio.sleep(chance.random() * 3)
        partial = chance.random() < 0.3
        groups = [
            group(shard, chance.sample(fakes, min(len(fakes), chance.choice((0, 1, 2, 2, 2, 3, 3)) if partial else 2)))
            for shard in range(chance.randint(1, 4))
        ]
        deadline = now() + chance.choice((0.01, 0.2, 1.0))
        groups_begun += len(groups)
        call = Call(groups, shared, chance.randrange(2), deadline, partial=partial)
        task = asyncio.ensure_future(call.run())
        if chance.random() < 0.1:
            loop.call_later(chance.random() * 0.1, task.cancel)
        raised: BaseException | None = None
        try:
            await task
        except (VecsvcError, asyncio.CancelledError) as error:
            raised = error
        assert now() <= deadline + 1e-6
        for one in groups:
            assert one.answer is None or one.error is None
            if one.answer is not None:
                assert one.answer.vector == f"shard {one.shards[0]}".encode()
            assert all(attempt.kind == "probe" for attempt in one.attempts)
        if raised is None:
            assert all(one.done for one in groups)
            assert partial or all(one.answer is not None for one in groups)
        elif not isinstance(raised, asyncio.CancelledError):
            assert not partial or isinstance(raised, UserError)
            assert raised in [one.error for one in groups]

    outcomes = await asyncio.gather(*(question(number) for number in range(60)), return_exceptions=True)
    for outcome in outcomes:
        if outcome is not None:
            raise outcome
    await asyncio.sleep(10)
    for fake in fakes:
        assert fake.node.in_flight == 0, fake.node.name
        assert fake.waiting == 0, fake.node.name
    first = groups_begun + 1e-6
    assert hedged(shared) <= settings.hedge_share * first + (fan_out.HEDGE_BURST if settings.hedge_share else 0)
    retries = settings.retry_share * first
    assert shared.metrics.retries().value <= retries + (fan_out.RETRY_BURST if settings.retry_share else 0)
    assert hedged(shared, "silence") <= retries + (4 * fan_out.SILENCE_BURST if settings.retry_share else 0)


@pytest.mark.parametrize("seed", range(60))
def test_a_question_ends_in_time_with_one_answer_a_group_whatever_nodes_do(run: Run, seed: int) -> None:
    run(_one_run(seed))


# ---------------------------------------------------------------------------------------------- one by one


async def ask(groups: list[Group], shared: Budgets, timeout_s: float = 1.0, *, partial: bool = False) -> None:
    await Call(groups, shared, "key", now() + timeout_s, partial=partial).run()


async def learn(fake: FakeNode, seconds: float, times: int = KNOWN_AFTER + 8) -> None:
    """As if it had answered so often, each time after so long."""
    for _ in range(times):
        fake.node.latency("key").learn(seconds, now())


def unread(*_: Any) -> int:
    """Stands for `Node.ask` of a node that takes nothing more."""
    raise NodeFailed("it has not read what it was asked before")


def pair(settings: RouteSettings, first: Any, second: Any) -> tuple[FakeNode, FakeNode]:
    return FakeNode("a", settings, first), FakeNode("b", settings, second)


def test_a_second_replica_is_asked_after_the_95th_percentile_and_the_loser_is_cancelled(run: Run) -> None:
    async def check_it() -> None:
        settings = RouteSettings()
        shared = budgets(settings)
        slow, fast = pair(settings, answering(0.5), answering(0.002))
        await learn(slow, 0.010)
        await learn(fast, 0.030)  # so that it is not asked first
        began = now()
        one = group(0, [slow, fast])
        await ask([one], shared)
        assert one.answer is not None
        assert now() - began == pytest.approx(0.012)
        assert len(slow.cancelled) == 1 and hedged(shared) == hedged(shared, "hedge_won") == 1
        assert slow.node.in_flight == fast.node.in_flight == slow.waiting == fast.waiting == 0

    run(check_it())


def test_a_second_replica_is_asked_where_the_first_could_not_even_be_sent_the_question(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def check_it() -> None:
        settings = RouteSettings()
        shared = budgets(settings)
        slow, fast = pair(settings, answering(0.5), answering(0.002))
        full = FakeNode("c", settings, silent)
        for fake in (slow, fast, full):
            await learn(fake, 0.010)
        monkeypatch.setattr(full.node, "ask", unread)
        monkeypatch.setattr(fan_out.random, "sample", lambda nodes, n: [full.node, full.node])
        monkeypatch.setattr(fan_out.random, "choice", lambda pair: slow.node if slow.node in pair else pair[0])
        began = now()
        one = group(0, [full, slow, fast])
        await ask([one], shared)
        assert one.answer is not None and slow.asked == fast.asked == 1
        assert now() - began == pytest.approx(0.012)

    run(check_it())


def test_hedges_stay_within_their_budget_however_slow_a_replica_is(run: Run) -> None:
    async def check_it() -> None:
        settings = RouteSettings(hedge_share=0.05)
        shared = budgets(settings)
        alone = [answering(0.3), answering(0.3)]
        fakes = list(pair(settings, *alone))
        for fake in fakes:
            await learn(fake, 0.001)
            fake.node.latency("key").at = now()
        n = 1000
        for _ in range(n):
            for fake in fakes:  # both believed to be fast again, so that each question would like to be hedged
                fake.node.latency("key").p95 = 0.001
            await ask([group(0, fakes)], shared)
        extra = hedged(shared) + hedged(shared, "probe_sent")
        assert 0.05 * n <= extra <= 0.05 * n + fan_out.HEDGE_BURST
        assert hedged(shared, "no_budget") >= n - extra - 1
        assert sum(fake.asked for fake in fakes) == n + extra

    run(check_it())


def spent(shared: Budgets, one: Group) -> None:
    """Leave nothing for second questions that are only late."""
    while shared.of_shards(one).hedges.take():
        pass


@pytest.mark.parametrize(("retry_share", "hedge_share"), [(0.1, 0.0), (0.1, 0.05), (0.0, 0.0)])
def test_a_replica_that_is_silent_for_half_the_time_is_asked_around(
    run: Run, retry_share: float, hedge_share: float
) -> None:
    async def check_it() -> None:
        settings = RouteSettings(retry_share=retry_share, hedge_share=hedge_share)
        shared = budgets(settings)
        hole, fast = pair(settings, silent, answering(0.002))
        one = group(0, [hole, fast])
        spent(shared, one)
        await learn(hole, 0.001)
        await learn(fast, 0.010)  # so that it is not asked first
        began = now()
        if retry_share:
            await ask([one], shared)
            assert one.answer is not None and now() - began == pytest.approx(0.502)
            assert hedged(shared, "hedge_won") == hedged(shared, "silence") == hedged(shared, "no_budget") == 1
        else:
            with pytest.raises(DeadlineExceeded):
                await ask([one], shared)
            assert hedged(shared, "no_budget") == 2
        assert hedged(shared) == shared.metrics.retries().value == 0
        assert hole.node.latency("key").expected > 0.4 and hole.node.state == "up"

    run(check_it())


def test_a_short_question_is_asked_again_at_half_its_time_though_replicas_are_usually_slower(run: Run) -> None:
    async def check_it() -> None:
        settings = RouteSettings()
        shared = budgets(settings)
        hole, fast = pair(settings, silent, answering(0.020))
        await learn(hole, 0.060)
        await learn(fast, 0.070)
        began = now()
        one = group(0, [hole, fast])
        await ask([one], shared, 0.050)
        assert one.answer is not None and now() - began == pytest.approx(0.045)
        assert hedged(shared) == 1 and hedged(shared, "silence") == 0  # there is room for what is only late

    run(check_it())


def test_where_two_replicas_are_silent_a_third_is_asked(run: Run) -> None:
    async def check_it() -> None:
        settings = RouteSettings()
        shared = budgets(settings)
        fakes = [FakeNode("a", settings, silent), FakeNode("b", settings, silent), FakeNode("c", settings, silent)]
        for fake in fakes:
            await learn(fake, 0.010)  # just now, so that none needs a copy
        began = now()
        with pytest.raises(DeadlineExceeded):
            await ask([group(0, fakes)], shared)
        assert now() - began == pytest.approx(1.0)
        assert [fake.asked for fake in fakes] == [1, 1, 1] and hedged(shared) == 2

    run(check_it())


def test_a_replica_that_refuses_is_asked_around_though_a_silent_one_was_asked_before(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def check_it() -> None:
        monkeypatch.setattr(fan_out.random, "sample", lambda nodes, n: nodes[:n])
        settings = RouteSettings()
        shared = budgets(settings)
        fakes = [FakeNode("a", settings, silent), FakeNode("b", settings, failing("overloaded"))]
        fakes.append(FakeNode("c", settings, answering(0.002)))
        for fake, seconds in zip(fakes, (0.010, 0.020, 0.700), strict=True):
            await learn(fake, seconds, KNOWN_AFTER - 1)  # too few to know when to ask another
        one = group(0, fakes)
        spent(shared, one)
        began = now()
        await ask([one], shared)
        assert one.answer is not None and now() - began == pytest.approx(0.503)
        assert hedged(shared, "silence") == shared.metrics.retries().value == 1

    run(check_it())


def test_a_silent_replica_is_asked_around_past_one_that_could_not_be_sent_the_question(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def check_it() -> None:
        settings = RouteSettings()
        shared = budgets(settings)
        monkeypatch.setattr(fan_out.random, "sample", lambda nodes, n: nodes[:n])
        (hole, full), fast = pair(settings, silent, silent), FakeNode("c", settings, answering(0.002))
        for fake, seconds in ((hole, 0.001), (full, 0.002), (fast, 0.003)):
            await learn(fake, seconds)
        monkeypatch.setattr(full.node, "ask", unread)
        one = group(0, [hole, full, fast])
        spent(shared, one)
        began = now()
        await ask([one], shared)
        assert one.answer is not None and now() - began <= 0.51

    run(check_it())


def test_slow_shards_leave_the_budget_of_failures_alone(run: Run) -> None:
    async def check_it() -> None:
        settings = RouteSettings()
        shared = budgets(settings)
        slow = pair(settings, answering(0.6), answering(0.6))
        n = 500
        for _ in range(n):
            await ask([group(0, list(slow))], shared)
        assert shared.metrics.retries().value == 0
        most = (settings.retry_share + settings.hedge_share) * n + fan_out.SILENCE_BURST + fan_out.HEDGE_BURST
        assert sum(fake.asked for fake in slow) <= n + most + 1
        first, second = pair(settings, silent, answering(0.002))
        await learn(second, 0.5)  # so that the other is asked first
        tasks = [asyncio.create_task(ask([group(1, [first, second])], shared)) for _ in range(200)]
        await asyncio.sleep(0.001)
        first.lose()
        await asyncio.gather(*tasks)

    run(check_it())


def test_copies_leave_the_budget_of_late_answers_alone(run: Run) -> None:
    async def check_it() -> None:
        settings = RouteSettings(hedge_share=0.05)
        shared = budgets(settings)
        slow, fast = pair(settings, answering(0.300), answering(0.001))
        await learn(slow, 0.300)
        await learn(fast, 0.001)
        own = shared.of_shards(group(0, [slow, fast]))
        for _ in range(300):  # few questions: one in two seconds, each of which would like to be copied
            await ask([group(0, [slow, fast])], shared)
            await asyncio.sleep(2.0)
        assert slow.asked == hedged(shared, "probe_sent") == 1 + int(299 * 0.05 * fan_out.PROBE_PART)
        assert own.hedges.take(), "none of it was spent"

    run(check_it())


def test_a_copy_under_way_becomes_the_second_question(run: Run) -> None:
    async def check_it() -> None:
        settings = RouteSettings()
        shared = budgets(settings)
        late, other = pair(settings, answering(0.5), answering(0.040))
        await learn(late, 0.010)
        await learn(other, 0.050)
        await asyncio.sleep(fan_out.PROBE_S + 0.1)
        one = group(0, [late, other])
        began = now()
        await ask([one], shared)
        assert one.answer is not None and now() - began == pytest.approx(0.040)
        assert late.asked == other.asked == 1 and len(late.cancelled) == 1
        assert (hedged(shared), hedged(shared, "probe_sent"), hedged(shared, "hedge_won")) == (0, 1, 1)

    run(check_it())


def test_a_copy_under_way_does_not_keep_a_better_replica_from_being_asked(run: Run) -> None:
    async def check_it() -> None:
        settings = RouteSettings()
        shared = budgets(settings)
        first, slow, third = (
            FakeNode(n, settings, s) for n, s in zip("abc", (answering(0.5), silent, answering(0.002)), strict=True)
        )
        await learn(slow, 0.300)
        await asyncio.sleep(fan_out.PROBE_S + 0.1)
        await learn(first, 0.010)
        await learn(third, 0.020)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                fan_out.random, "sample", lambda nodes, n: [node for node in nodes if node is not slow.node][:n]
            )
            began = now()
            await ask([group(0, [first, slow, third])], shared)
        assert now() - began == pytest.approx(0.012) and (first.asked, slow.asked, third.asked) == (1, 1, 1)
        assert hedged(shared, "probe_sent") == hedged(shared) == 1

    run(check_it())


def test_a_failing_replica_is_left_alone_and_comes_back_by_a_copy_of_a_question(run: Run) -> None:
    for share in (0.05, 0.0):

        async def check_it(share: float = share) -> None:
            settings = RouteSettings(eject_failures=3, eject_s=1.0, hedge_share=share)
            shared = budgets(settings)
            bad, good = pair(settings, failing("internal", 0.0001), answering(0.01))
            for _ in range(40):
                await ask([group(0, [bad, good])], shared)
            assert bad.node.state == "ejected" and bad.node.ejections.value == 1
            asked = bad.asked
            for _ in range(20):
                await ask([group(0, [bad, good])], shared)
            assert bad.asked == asked
            await asyncio.sleep(1.1)
            await ask([group(0, [bad, good])], shared)
            await asyncio.sleep(0.1)
            assert bad.asked == asked + 1 and bad.node.state == "ejected"  # the copy failed too
            bad.script = answering(0.001)
            await asyncio.sleep(1.1)
            one = group(0, [bad, good])
            await ask([one], shared)
            await asyncio.sleep(0.1)
            assert one.answer is not None and bad.node.state == "up"

        run(check_it())


def test_a_replica_that_breaks_off_over_questions_is_left_alone_too(run: Run) -> None:
    async def check_it() -> None:
        settings = RouteSettings(eject_failures=3)
        shared = budgets(settings)

        def breaks(fake: FakeNode, request: int, payload: bytes) -> None:
            fake.say(0.0001, bytes(40))

        bad, good = pair(settings, breaks, answering(0.01))
        for _ in range(40):
            one = group(0, [bad, good])
            await ask([one], shared)
            assert one.answer is not None
            if bad.connection.lost.done():
                bad.connect()
        assert bad.node.state == "ejected" and bad.asked < 10

    run(check_it())


def test_a_replica_whose_hits_are_no_numbers_counts_as_failed_and_another_answers(run: Run) -> None:
    def hits(*distances: float) -> Callable[[FakeNode, int, bytes], None]:
        found = np.array(distances, "<f4").tobytes()
        rows = bytes(8 * len(distances))
        part = Part([len(distances)], found, rows, [*range(len(distances))], None, None, "x", 0, False, 0, 0, 0, None)
        return lambda fake, request, payload: fake.say(0.001, remote.message(Kind.PART, request, part))

    async def check_it() -> None:
        settings = RouteSettings(eject_failures=1)
        shared = budgets(settings)
        bad, good = pair(settings, hits(0.25, float("nan")), hits(0.25, 0.5))
        good.node.latency("key").learn(1.0, now())  # so that the bad one is asked first
        for _ in range(10):
            one = group(0, [bad, good])
            one.expects, one.check = Kind.PART, functools.partial(check_part, 1, 2, 8, frozenset())
            await ask([one], shared)
            assert np.isfinite(np.frombuffer(one.answer.distances, "<f4")).all()
        assert bad.node.state == "ejected" and bad.asked == 1

    run(check_it())


def test_where_every_replica_is_ejected_or_draining_one_is_asked_all_the_same(run: Run) -> None:
    async def check_it() -> None:
        settings = RouteSettings(eject_failures=1)
        a, b = pair(settings, failing("internal"), answering(0.001))
        b.node.holdings = Holdings(remote.PROTOCOL, [HELD], True, "")
        a.node.failed("why")
        assert (a.node.state, b.node.state) == ("ejected", "draining")
        one = group(0, [a, b])
        await ask([one], budgets(settings))
        assert one.answer is not None

    run(check_it())


@pytest.mark.parametrize("code", ["overloaded", "internal", "not_ready", "node_failed"])
def test_what_another_replica_may_answer_is_asked_there(run: Run, code: str) -> None:
    async def check_it() -> None:
        settings = RouteSettings()
        shared = budgets(settings)
        for _ in range(20):
            one = group(0, list(pair(settings, failing(code), answering(0.001))))
            await ask([one], shared)
            assert one.answer is not None
        assert 0 < shared.metrics.retries().value < 20

    run(check_it())


def test_a_replica_that_refuses_fast_does_not_draw_the_questions_to_it(run: Run) -> None:
    async def check_it() -> None:
        settings = RouteSettings(retry_share=0.1)
        shared = budgets(settings)
        full, free = pair(settings, failing("overloaded", 0.0001), answering(0.01))
        await learn(free, 0.01)
        await learn(full, 0.01)
        for _ in range(3000):
            await ask([group(0, [full, free])], shared)
        assert shared.metrics.retries().value < 20 and full.asked < 0.1 * free.asked

    run(check_it())


def test_what_is_the_questions_fault_is_asked_once_and_told_in_the_nodes_words(run: Run) -> None:
    async def check_it() -> None:
        settings = RouteSettings()
        shared = budgets(settings)
        fakes = pair(settings, failing("invalid"), failing("invalid"))
        with pytest.raises(InvalidRequest, match=r"^invalid at [ab]:1$"):
            await ask([group(0, list(fakes))], shared)
        assert shared.metrics.retries().value == 0

    run(check_it())


def test_retries_stay_within_their_budget_and_then_a_failure_is_told(run: Run) -> None:
    async def check_it() -> None:
        settings = RouteSettings(retry_share=0.1, eject_failures=1000)
        shared = budgets(settings)
        a, b = pair(settings, failing("overloaded"), failing("overloaded"))
        n = 2000
        for _ in range(n):
            with pytest.raises(Overloaded):
                await ask([group(0, [a, b])], shared)
        assert 0.1 * n <= shared.metrics.retries().value <= 0.1 * n + fan_out.RETRY_BURST

    run(check_it())


def test_a_shard_without_a_node_fails_at_once_and_nobody_is_asked(run: Run) -> None:
    async def check_it() -> None:
        settings = RouteSettings()
        (fake,) = (FakeNode("a", settings, answering(0.001)),)
        began = now()
        with pytest.raises(ShardsMissing, match="shard 0: no node that is connected has it of this version"):
            await ask([group(0, []), group(1, [fake])], budgets(settings))
        assert now() == began and fake.asked == 0
        fake.lose()
        with pytest.raises(ShardsMissing, match="shard 1"):
            await ask([group(1, [fake])], budgets(settings))

    run(check_it())


def test_replicas_that_lost_the_version_are_as_good_as_none(run: Run) -> None:
    async def check_it() -> None:
        settings = RouteSettings()
        with pytest.raises(ShardsMissing, match="not_ready at"):
            await ask([group(0, list(pair(settings, *[failing("not_ready")] * 2)))], budgets(settings))

    run(check_it())


def test_who_takes_a_part_gets_what_there_is_by_the_deadline(run: Run) -> None:
    async def check_it() -> None:
        settings = RouteSettings(hedge_share=0.0)
        makes: list[Any] = [answering(0.2), failing("overloaded"), silent]
        fakes = [FakeNode(f"n{at}", settings, make) for at, make in enumerate(makes)]
        groups = [group(at, [fake]) for at, fake in enumerate(fakes)] + [group(3, [])]
        began = now()
        await ask(groups, budgets(settings), 0.5, partial=True)
        assert now() - began == pytest.approx(0.5)
        assert groups[0].answer is not None
        errors = [type(one.error) for one in groups[1:]]
        assert errors == [Overloaded, DeadlineExceeded, ShardsMissing]
        assert "shard 2" in str(groups[2].error) and "n2:1" in str(groups[2].error)
        assert [fake.node.in_flight for fake in fakes] == [0, 0, 0] and len(fakes[2].cancelled) == 1

    run(check_it())


def test_a_lost_connection_asks_the_other_replica_at_once(run: Run) -> None:
    async def check_it() -> None:
        settings = RouteSettings(hedge_share=0.0)
        dying, other = pair(settings, silent, answering(0.001))
        other.node.latency("key").learn(1.0, now())  # so that the dying one is asked first
        asyncio.get_running_loop().call_later(0.1, dying.lose)
        began = now()
        one = group(0, [dying, other])
        await ask([one], budgets(settings))
        assert one.answer is not None and now() - began == pytest.approx(0.101)

    run(check_it())


def test_a_question_that_began_with_one_replica_finds_another_that_came(run: Run) -> None:
    async def check_it(timeout_s: float, comes: float, took: float) -> None:
        settings = RouteSettings()
        hole, back = pair(settings, silent, answering(0.002))
        one = group(0, [hole])
        one.holders = lambda shards: [hole.node, *([back.node] if now() - began >= comes else [])]
        began = now()
        await ask([one], budgets(settings), timeout_s)
        assert one.answer is not None and now() - began == pytest.approx(took)

    for timeout_s, comes, took in ((1.0, 0.0, 0.052), (1.0, 0.28, 0.302), (1.0, 0.66, 0.702), (0.06, 0.0, 0.032)):
        run(check_it(timeout_s, comes, took))


def test_a_question_whose_only_replica_is_lost_finds_another_that_came(run: Run) -> None:
    async def check_it() -> None:
        settings = RouteSettings()
        shared = budgets(settings)
        lost, back = pair(settings, silent, answering(0.002))
        one = group(0, [lost])
        one.holders = lambda shards: [fake.node for fake in (lost, back) if fake.node.up]
        began = now()
        asyncio.get_running_loop().call_later(0.02, lost.lose)
        await ask([one], shared)
        assert one.answer is not None and now() - began == pytest.approx(0.022)
        assert shared.metrics.retries().value == 1

    run(check_it())


def test_a_question_whose_only_replica_is_silent_ends_in_time(run: Run) -> None:
    async def check_it() -> None:
        settings = RouteSettings()
        hole = FakeNode("a", settings, silent)
        one = group(0, [hole])
        one.holders = lambda shards: [hole.node]
        began = now()
        with pytest.raises(DeadlineExceeded):
            await ask([one], budgets(settings))
        assert now() - began == pytest.approx(1.0) and hole.asked == 1

    run(check_it())


def test_a_node_that_reads_nothing_is_not_sent_more(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    async def check_it() -> None:
        settings = RouteSettings()
        stuck, other = pair(settings, silent, answering(0.001))
        other.node.latency("key").learn(1.0, now())
        monkeypatch.setattr(FakeTransport, "get_write_buffer_size", lambda self: node.MAX_UNSENT_BYTES + 1)
        with pytest.raises(ShardsMissing, match="has not read"):
            await ask([group(0, [stuck, other])], budgets(settings))
        assert stuck.asked == other.asked == stuck.node.in_flight == other.node.in_flight == 0

    run(check_it())


def test_load_goes_to_the_faster_replica_and_a_draining_one_gets_none(run: Run) -> None:
    async def check_it() -> None:
        settings = RouteSettings(hedge_share=0.0)
        slow, fast = pair(settings, answering(0.1), answering(0.001))
        await learn(slow, 0.1)
        await learn(fast, 0.001)
        for _ in range(100):
            await ask([group(0, [slow, fast])], budgets(settings))
        assert (slow.asked, fast.asked) == (0, 100)
        fast.node.holdings = Holdings(remote.PROTOCOL, [HELD], True, "")
        await ask([group(0, [slow, fast])], budgets(settings))
        assert (slow.asked, fast.asked) == (1, 100)

    run(check_it())


def test_a_replica_that_hangs_draws_few_questions_where_none_may_be_asked_twice(run: Run) -> None:
    async def check_it() -> None:
        settings = RouteSettings(retry_share=0.0)
        shared = budgets(settings)
        one, other = pair(settings, answering(0.001), answering(0.010))
        await learn(one, 0.001)
        await learn(other, 0.010)
        lost = 0

        async def question() -> None:
            nonlocal lost
            try:
                await ask([group(0, [one, other])], shared)
            except DeadlineExceeded:
                lost += 1

        async def questions() -> None:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(400):
                    shared.of_shards(group(0, [])).hedges = Budget(0.0, 0.0)
                    tasks.create_task(question())
                    await asyncio.sleep(0.005)

        one.script = silent
        await questions()
        assert 1 <= lost <= 3
        one.script = answering(0.001)
        await questions()  # a copy shows that it is well
        assert lost <= 3
        other.script = silent
        await questions()
        assert lost <= 6

    run(check_it())


def test_a_node_that_owes_an_answer_costs_at_least_what_it_is_overdue(run: Run) -> None:
    async def check_it() -> None:
        settings = RouteSettings()
        fake = FakeNode("a", settings, silent)
        await learn(fake, 0.010)
        node = fake.node

        def costs() -> float:
            return node.cost("key", now()) / (1 + node.in_flight)

        waiting = [asyncio.create_task(ask([group(0, [fake])], budgets(settings)))]
        await asyncio.sleep(0.005)
        assert costs() == pytest.approx(0.010)
        waiting.append(asyncio.create_task(ask([group(0, [fake])], budgets(settings))))
        await asyncio.sleep(0.035)
        assert node.in_flight == 2 and costs() == pytest.approx(0.030)  # since the first of them was due
        fake.script = answering(0.001)
        waiting.append(asyncio.create_task(ask([group(0, [fake])], budgets(settings))))
        await asyncio.sleep(0.005)
        assert node.in_flight == 2 and costs() < 0.011  # it answers, be it not these
        fake.script = silent
        waiting.append(asyncio.create_task(ask([group(0, [fake])], budgets(settings))))
        await asyncio.sleep(0.040)
        assert costs() > 0.029
        for one in waiting:
            one.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        assert node.in_flight == 0 and node.cost("key", now() + 10) == node.latency("key").expected

    run(check_it())


def test_a_draining_replica_is_asked_where_the_other_is_silent_for_half_the_time(run: Run) -> None:
    async def check_it() -> None:
        settings = RouteSettings()
        hole, leaving = pair(settings, silent, answering(0.002))
        await learn(hole, 0.001)
        await learn(leaving, 0.001)
        leaving.node.holdings = Holdings(remote.PROTOCOL, [HELD], True, "")
        began = now()
        one = group(0, [hole, leaving])
        await ask([one], budgets(settings))
        assert one.answer is not None and now() - began == pytest.approx(0.502)

    run(check_it())


def test_where_all_replicas_hang_another_that_comes_is_soon_found(run: Run) -> None:
    async def check_it() -> None:
        settings = RouteSettings()
        shared = budgets(settings)
        one, other = pair(settings, silent, silent)
        came = FakeNode("c", settings, answering(0.001))
        asked = group(0, [one, other])
        asked.holders = lambda shards: [f.node for f in (one, other, *([came] if now() - began >= 0.2 else []))]
        began = now()
        await ask([asked], shared)
        assert asked.answer is not None and 0.2 <= now() - began < 0.26

    run(check_it())


def kept(check_it: Callable[[Node, asyncio.Task[None]], Coroutine[Any, Any, None]]) -> None:
    """Run `check_it` with a node that is connected by a socket, and the task that keeps it."""

    class Answering(asyncio.Protocol):
        def connection_made(self, transport: Any) -> None:
            transport.write(remote.message(Kind.HOLDINGS, 0, READY))

    async def with_node() -> None:
        server = await asyncio.get_running_loop().create_server(Answering, "127.0.0.1", 0)
        connected = asyncio.Event()
        one = Node(Address("127.0.0.1", server.sockets[0].getsockname()[1]), RouteSettings(), connected.set, Spread())
        one.latency("key").outlived(1.0)
        keeping = asyncio.create_task(one.run())
        await asyncio.wait_for(connected.wait(), 10)
        await check_it(one, keeping)
        keeping.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await keeping
        server.close()

    asyncio.run(with_node())


def test_a_node_that_is_asked_no_more_is_not_told_of_as_lost(caplog: pytest.LogCaptureFixture) -> None:
    async def check_it(one: Node, keeping: asyncio.Task[None]) -> None:
        keeping.cancel()
        with pytest.raises(asyncio.CancelledError):
            await keeping
        assert not one.up and one.problem == "the front door asks it no more"

    with caplog.at_level("INFO", logger="vecsvc.router"):
        kept(check_it)
    assert [record.message for record in caplog.records] == ["node connected"]


def test_what_a_node_did_not_answer_is_forgotten_when_it_comes_back() -> None:
    async def check_it(one: Node, _: asyncio.Task[None]) -> None:
        assert one.latency("key").expected == UNKNOWN_S

    kept(check_it)


def test_latency_is_a_moving_mean_and_the_95th_percentile_of_the_last_samples() -> None:
    latency = Latency()
    for at in range(128):
        latency.learn((at % 100) / 1e3, float(at))
    last = sorted((at % 100) / 1e3 for at in range(64, 128))
    assert latency.p95 == last[60] and latency.at == 127.0 and latency.count == 128
    for at in range(64):
        latency.learn(0.005, 128.0 + at)
    assert latency.p95 == 0.005 and latency.mean == pytest.approx(0.005, rel=1e-3)


def test_a_question_that_was_not_answered_is_remembered_until_the_next_answer() -> None:
    latency = Latency()
    latency.learn(0.005, 1.0)
    latency.outlived(1.0)
    latency.outlived(0.5)
    assert latency.expected == 1.0 and latency.mean == 0.005
    latency.learn(0.005, 2.0)
    assert latency.expected == latency.mean == 0.005


def test_one_sample_of_many_weighs_little_and_one_after_a_while_much() -> None:
    latency = Latency()
    for at, seconds in enumerate((0.004, 0.006, 0.008)):
        latency.learn(seconds, 100.0 + at / 1e3)
    assert latency.mean == pytest.approx(0.006)  # of the first few, their mean
    for at in range(200):
        latency.learn(0.010, 101.0 + at / 1e3)
    assert latency.mean == pytest.approx(0.010, rel=1e-3)
    latency.learn(0.110, 101.2)
    assert latency.mean == pytest.approx(0.010 + LEAST_WEIGHT * 0.100, rel=1e-3)
    latency.learn(0.010, 101.2 + MEAN_OVER_S / 4)
    assert latency.mean == pytest.approx(0.010 + 0.75 * LEAST_WEIGHT * 0.100, rel=1e-3)
    before = latency.mean
    latency.learn(0.110, 200.0)
    assert latency.mean == pytest.approx(before + MOST_WEIGHT * (0.110 - before))


def test_a_budget_is_a_share_of_what_was_done_and_a_burst() -> None:
    budget = Budget(0.25, 3.0)
    assert [budget.take() for _ in range(4)] == [True, True, True, False]
    for _ in range(4):
        budget.earn()
    assert [budget.take(), budget.take()] == [True, False]
    for _ in range(1000):
        budget.earn()
    assert [budget.take() for _ in range(4)] == [True, True, True, False]
    none = Budget(0.0, 3.0)
    none.earn()
    assert not none.take()
