"""Simulates the queues of shards, replicas and hedged calls; what capacity.py plans with.

One front door asks as vecsvc/fan_out.py does, by numbers that are imported from there: the better of two replicas by
latency, silence and calls in flight; a second call where the first is late; copies, as probes, to replicas that were
not asked for long; budgets for both; and who is not needed any more is called back. A replica runs as many searches as
it has threads, and the others wait in order of arrival. A call that waits when it is called back is never served; one
that has begun is worked off.

Not modelled: the time that messages and the front door itself take, deadlines, failures and retries, several front
doors that do not know of each other's calls, and searches that slow each other down. A replica that is gone stays so,
and a slow one stays slow. Budgets begin empty, where a front door's begins full: what is told is how a cluster is
that has run for long.

A loop that numba compiles, in some 3 s, takes events in order of time. A call takes less than a microsecond: 10,000
queries to 1,000 shards some 8 s. Units are milliseconds throughout.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from vecsvc.fan_out import HEDGE_BURST, PROBE_PART, PROBE_S
from vecsvc.node import KNOWN_AFTER, LEAST_WEIGHT, MEAN_OVER_S, MOST_WEIGHT, SAMPLES, SLOW_START_S, UNKNOWN_S

Times = NDArray[np.float64]  # milliseconds
Numbers = NDArray[np.int64]
Records = NDArray[Any]  # of one of the types below

WARM_UP = 0.1  # share of the queries that only fill the queues
MOST_CALLS = 60_000_000  # whose latencies are kept in memory, 4 bytes each


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """What is simulated. Service times come beside it."""

    shards: int
    rate_qps: float
    replicas: int = 2  # of each shard
    threads: int = 1  # searches that a replica runs at the same time; the others wait in order of arrival
    asked: int | None = None  # shards that a query asks, drawn at random for each; None for all
    two_choices: bool = True  # the better of two random replicas by latency and load; otherwise any
    hedge_budget: float = 0.05  # second calls and probes that each call pays for; 0 for none
    common_budget: bool = False  # of all shards together; otherwise each shard has its own
    hedge_quantile: float = 0.95  # of a replica's latest latencies: when a second call is sent
    hedge_min_ms: float = 1.0  # a second call is never sent before that
    down: int = 0  # replicas of every shard that are gone, and known to be
    slow_share: float = 0.0  # of all replicas, rounded up, drawn at random
    slow_ms: float = 0.0  # what a slow replica adds to a call; it is late, not busy

    @property
    def calls_a_query(self) -> int:
        return self.shards if self.asked is None else self.asked

    def load(self, mean_ms: float) -> float:
        """The share of a living replica's threads that is busy, hedges aside; 1 and more cannot be served."""
        calls_ms = self.rate_qps / 1000 * self.calls_a_query / self.shards
        return calls_ms * mean_ms / ((self.replicas - self.down) * self.threads)


@dataclass(frozen=True, slots=True)
class Outcome:
    latency_ms: Times  # (queries,) of those after the warm-up
    call_ms: NDArray[np.float32]  # (queries, calls a query) of the same
    hedges: int
    calls: int
    probes: int = 0  # copies to replicas that were not asked for long

    def quantiles(self) -> tuple[float, float, float]:
        p50, p99, p999 = np.quantile(self.latency_ms, (0.5, 0.99, 0.999))
        return float(p50), float(p99), float(p999)


def simulate(cluster: Cluster, service_ms: Times, *, queries: int = 20_000, seed: int = 7) -> Outcome:
    """Poisson arrivals, all shards of a query asked at the same moment, its latency that of the last one.

    A search takes one of `service_ms`, drawn when it begins: what it keeps a thread busy, and no more. Raises
    ValueError for what cannot be simulated.
    """
    _check(cluster, service_ms, queries)
    rng = np.random.default_rng(seed)
    replicas = np.zeros(cluster.shards * cluster.replicas, REPLICA)
    replicas["mean"], replicas["p95"] = UNKNOWN_S * 1000, SLOW_START_S * 1000
    replicas["at"] = replicas["probed"] = -math.inf
    replicas["first"] = replicas["last"] = NONE
    slow = math.ceil(cluster.slow_share * len(replicas))
    replicas["late"][rng.permutation(len(replicas))[:slow]] = cluster.slow_ms
    arrivals = np.cumsum(rng.exponential(1000 / cluster.rate_qps, queries))
    call_ms = np.empty((queries, cluster.calls_a_query), np.float32)
    tally = np.zeros(1, TALLY)
    tally["free_call"] = tally["free_attempt"] = NONE
    rules = _Rules(
        replicas=cluster.replicas,
        up=cluster.replicas - cluster.down,
        threads=cluster.threads,
        two_choices=cluster.two_choices,
        budget=float(cluster.hedge_budget),
        most_saved=HEDGE_BURST * (cluster.shards if cluster.common_budget else 1),
        most_probes=float(cluster.shards if cluster.common_budget else 1),
        quantile=float(cluster.hedge_quantile),
        hedge_min=float(cluster.hedge_min_ms),
        service=np.array(service_ms, np.float64),
    )
    world = _World(
        replicas=replicas,
        latest=np.zeros((len(replicas), SAMPLES)),
        ranked=np.zeros(SAMPLES),
        saved=np.zeros(1 if cluster.common_budget else cluster.shards),
        spare=np.zeros(1 if cluster.common_budget else cluster.shards),
        calls=np.zeros(ROOM, CALL),
        attempts=np.zeros(ROOM, ATTEMPT),
        when=np.zeros(ROOM),
        what=np.zeros(ROOM, np.int64),
        tally=tally,
        call_ms=call_ms,
    )
    shards = np.arange(cluster.shards)
    while not _run(world, rules, rng, arrivals, shards):
        world = _with_room(world)
    kept = call_ms[int(queries * WARM_UP) :]
    hedges, probes = int(tally["hedges"][0]), int(tally["probes"][0])
    return Outcome(kept.max(axis=1).astype(np.float64), kept, hedges, call_ms.size, probes)


def _check(cluster: Cluster, service_ms: Times, queries: int) -> None:
    if not len(service_ms) or not np.isfinite(service_ms).all() or service_ms.min() < 0:
        raise ValueError("service times must be finite, not negative, and at least one")
    if not 1 <= cluster.calls_a_query <= cluster.shards:
        raise ValueError(f"a query must ask 1 to {cluster.shards} shards, not {cluster.calls_a_query}")
    if not 0 <= cluster.down < cluster.replicas:
        raise ValueError(f"{cluster.down} of {cluster.replicas} replicas cannot be gone: no answer would be whole")
    if cluster.threads < 1:
        raise ValueError(f"a replica must have at least one thread, not {cluster.threads}")
    if not 0 <= cluster.hedge_quantile < 1:
        raise ValueError(f"hedge_quantile must be 0 or more and less than 1, not {cluster.hedge_quantile}")
    if queries * cluster.calls_a_query > MOST_CALLS:
        raise ValueError(
            f"{queries} queries of {cluster.calls_a_query} calls are more than {MOST_CALLS:,}; take fewer queries"
        )


def on_one_machine(cluster: Cluster, service_ms: Times, cores: int, *, queries: int = 20_000, seed: int = 7) -> Outcome:
    """All nodes share `cores` cores: one queue for the calls of all shards, no replicas, no hedges.

    A small test cluster on one machine is this, whatever its processes are called.
    """
    asked = cluster.calls_a_query
    _check(replace(cluster, replicas=1, down=0), service_ms, queries)
    rng = np.random.default_rng(seed)
    arrivals = np.cumsum(rng.exponential(1000 / cluster.rate_qps, queries))
    drawn = service_ms[rng.integers(0, len(service_ms), (queries, asked))]
    free = [0.0] * cores
    latency = np.empty((queries, asked), np.float32)
    for query, now in enumerate(arrivals.tolist()):
        for call in range(asked):
            end = max(free[0], now) + drawn[query, call]
            heapq.heapreplace(free, end)
            latency[query, call] = end - now
    kept = latency[int(queries * WARM_UP) :]
    return Outcome(kept.max(axis=1).astype(np.float64), kept, 0, queries * asked)


# -------------------------------------------------------------------------------------- what needs no simulation


def share_that_meets(slow: float, calls: int) -> float:
    """The share of queries with at least one slow call, where `slow` is the share of slow calls."""
    return 1 - (1 - slow) ** calls


def share_not_whole(availability: float, replicas: int, calls: int) -> float:
    """The share of queries that miss a shard: all its replicas gone at once, each by itself."""
    return -math.expm1(calls * math.log1p(-((1 - availability) ** replicas))) if availability < 1 else 0.0


def mean_wait_ms(rate_qps: float, mean_ms: float, threads: int) -> float:
    """Erlang's C: the mean wait for one of `threads` with exponential service (M/M/c)."""
    offered = rate_qps / 1000 * mean_ms
    if offered >= threads:
        return math.inf
    terms = [1.0]
    for n in range(1, threads + 1):
        terms.append(terms[-1] * offered / n)
    busy = terms[-1] / (1 - offered / threads)
    return busy / (sum(terms[:-1]) + busy) * mean_ms / (threads - offered)


# --------------------------------------------------------------------------------------------- what is compiled

NONE = -1
ROOM = 1024  # calls, attempts and events under way that there is room for at first; more is made when needed
END, LATE, DUE = 0, 1 << 32, 2 << 32  # kinds of event, beside the number of an attempt, an attempt, a call
NUMBER = (1 << 32) - 1
PROBE_MS = PROBE_S * 1000
SLOW_START_MS = SLOW_START_S * 1000
MEAN_OVER_MS = MEAN_OVER_S * 1000

REPLICA = np.dtype(
    [
        ("mean", np.float64),  # as a front door has it, and the next seven
        ("least", np.float64),
        ("overdue_at", np.float64),
        ("p95", np.float64),
        ("at", np.float64),  # when the last answer came
        ("probed", np.float64),
        ("count", np.int64),  # answers
        ("in_flight", np.int64),
        ("late", np.float64),  # what a slow one adds
        ("running", np.int64),  # searches
        ("first", np.int64),  # attempt that waits, and the last one
        ("last", np.int64),
    ],
    align=True,
)
CALL = np.dtype(
    [
        ("query", np.int32),
        ("column", np.int32),  # of the query's calls
        ("asked", np.float64),
        ("shard", np.int32),
        ("place", np.int32),  # in the shard, of the replica that was asked first
        ("attempts", np.int32),  # the latest one; of a free record, the next free one
        ("waits", np.bool_),  # for an answer
        ("due", np.bool_),  # the event of its second call is still to come
    ],
    align=True,
)
ATTEMPT = np.dtype(
    [
        ("started", np.float64),
        ("call", np.int32),  # NONE where that has its answer
        ("sibling", np.int32),  # of the same call, asked before; of a free record, the next free one
        ("replica", np.int32),
        ("before", np.int32),  # neighbours in the replica's queue
        ("after", np.int32),
        ("queued", np.bool_),
        ("probe", np.bool_),
        ("called_back", np.bool_),
    ],
    align=True,
)
TALLY = np.dtype(
    [
        ("query", np.int64),  # that is asked next
        ("column", np.int64),  # and its call
        ("events", np.int64),  # to come
        ("used_calls", np.int64),  # records that were ever in use
        ("used_attempts", np.int64),
        ("free_call", np.int64),  # the first of those that are in use no more
        ("free_attempt", np.int64),
        ("hedges", np.int64),
        ("probes", np.int64),
    ],
    align=True,
)


class _Rules(NamedTuple):
    replicas: int  # of a shard
    up: int  # of these, the first ones
    threads: int
    two_choices: bool
    budget: float
    most_saved: float
    most_probes: float
    quantile: float
    hedge_min: float
    service: Times


class _World(NamedTuple):
    """All that changes; replicas lie shard by shard, and what is under way has numbers that are used again."""

    replicas: Records
    latest: Times  # (replicas, SAMPLES) latencies
    ranked: Times  # (SAMPLES,) room to sort these
    saved: Times  # (shards,) or (1,) second calls that are paid for
    spare: Times  # and probes
    calls: Records
    attempts: Records
    when: Times  # a heap of events, the next one first
    what: Numbers
    tally: Records  # (1,)
    call_ms: NDArray[np.float32]


def _with_room(world: _World) -> _World:
    """A copy with twice the room for what is under way."""
    grown = ("calls", "attempts", "when", "what")
    return world._replace(**{name: np.concatenate([getattr(world, name)] * 2) for name in grown})


def _compiled(function: Callable[..., Any], **options: bool) -> Callable[..., Any]:
    """By numba, without its counts of references: one for each array of a tuple at each call took half of the time.

    So nothing may be allocated inside; all arrays are those of who calls.
    """
    made: Callable[..., Any] = numba.njit(error_model="numpy", _nrt=False, no_cfunc_wrapper=True, **options)(function)
    return made


def _inner(function: Callable[..., Any]) -> Callable[..., Any]:
    """What only compiled functions call: half of the time to compile went into ways in from Python."""
    return _compiled(function, no_cpython_wrapper=True)


@_compiled
def _run(world: _World, rules: _Rules, rng: np.random.Generator, arrivals: Times, shards: Numbers) -> bool:
    """Ask `shards` in order, or as many of them at random as a query has calls; whether it came to the end.

    It did not where more room is needed: it is to be called with more then, and goes on where it was.
    """
    tally = world.tally[0]
    asked = world.call_ms.shape[1]
    while True:
        if _is_full(world, rules):
            return False
        arrives = arrivals[tally.query] if tally.query < len(arrivals) else np.inf
        if tally.events and world.when[0] <= arrives:
            now = world.when[0]
            what = _pop(world)
            number = what & NUMBER  # below the kind
            if what >= DUE:
                _hedge(world, rules, rng, number, now)
            elif what >= LATE:
                _reply(world, rules, number, now)
            else:
                _end(world, rules, rng, number, now)
        elif tally.query < len(arrivals):
            column = tally.column
            if asked < len(shards):
                other = column + int(rng.random() * (len(shards) - column))
                shards[column], shards[other] = shards[other], shards[column]
            _ask(world, rules, rng, shards[column], arrives)
            tally.column += 1
            if tally.column == asked:
                tally.query, tally.column = tally.query + 1, 0
        else:
            return True


@_inner
def _is_full(world: _World, rules: _Rules) -> bool:
    """Whether the next event may want more room than is left: a call, an attempt at each replica, and their events."""
    tally = world.tally[0]
    full: bool = (
        tally.used_calls == len(world.calls)
        or tally.used_attempts + rules.up > len(world.attempts)
        or tally.events + rules.up + 1 > len(world.when)
    )
    return full


# The front door: what vecsvc/fan_out.py does.


@_inner
def _ask(world: _World, rules: _Rules, rng: np.random.Generator, shard: int, now: float) -> None:
    tally = world.tally[0]
    number = tally.free_call
    if number == NONE:
        number = tally.used_calls
        tally.used_calls += 1
    else:
        tally.free_call = world.calls[number].attempts
    place = _choose(world, rules, rng, shard, NONE, now)
    call = world.calls[number]
    call.query, call.column, call.asked = tally.query, tally.column, now
    call.shard, call.place, call.attempts = shard, place, NONE
    call.waits, call.due = True, rules.up > 1
    first = shard * rules.replicas
    _send(world, rules, rng, number, first + place, False, now)
    if rules.up == 1:
        return
    purse = shard % len(world.saved)  # the one of all shards, or its own
    world.saved[purse] = min(rules.most_saved, world.saved[purse] + (1 - PROBE_PART) * rules.budget)
    world.spare[purse] = min(rules.most_probes, world.spare[purse] + PROBE_PART * rules.budget)
    known = np.inf
    for other in range(first, first + rules.up):
        replica = world.replicas[other]
        if replica.count >= KNOWN_AFTER:
            known = min(known, replica.p95)
        if other == first + place or now - max(replica.at, replica.probed) <= PROBE_MS or world.spare[purse] < 1:
            continue
        world.spare[purse] -= 1
        replica.probed = now
        tally.probes += 1
        _send(world, rules, rng, number, other, True, now)
    delay = max(rules.hedge_min, known if known < np.inf else SLOW_START_MS)
    _push(world, now + delay, DUE | number)


@_inner
def _choose(world: _World, rules: _Rules, rng: np.random.Generator, shard: int, besides: int, now: float) -> int:
    """A living replica's place in the shard, never `besides`."""
    left = rules.up if besides == NONE else rules.up - 1
    one = int(rng.random() * left)
    other = int(rng.random() * (left - 1))
    other += other >= one
    if besides != NONE:
        one += one >= besides
        other += other >= besides
    if left == 1 or not rules.two_choices:
        return one
    first = shard * rules.replicas
    # Which one is drawn first is chance already, so that a tie needs no more of it.
    return one if _cost(world, first + one, now) <= _cost(world, first + other, now) else other


@_inner
def _cost(world: _World, number: int, now: float) -> float:
    """Node.cost of vecsvc/node.py."""
    replica = world.replicas[number]
    expected = max(replica.mean, replica.least)
    if replica.in_flight and replica.overdue_at:
        expected = max(expected, now - replica.overdue_at)
    return expected * (1 + replica.in_flight)


@_inner
def _hedge(world: _World, rules: _Rules, rng: np.random.Generator, number: int, now: float) -> None:
    """The second call of this one is due."""
    call = world.calls[number]
    call.due = False
    if not call.waits:
        _free_call(world, number)
        return
    attempt = call.attempts
    while attempt != NONE:
        _outlived(world, attempt, now)
        attempt = world.attempts[attempt].sibling
    place = _choose(world, rules, rng, call.shard, call.place, now)
    replica = call.shard * rules.replicas + place
    attempt = call.attempts
    while attempt != NONE:
        if world.attempts[attempt].replica == replica:  # as a probe it is at work already for what would be asked again
            world.attempts[attempt].probe = False
            return
        attempt = world.attempts[attempt].sibling
    purse = call.shard % len(world.saved)
    if world.saved[purse] < 1:
        return
    world.saved[purse] -= 1
    world.tally[0].hedges += 1
    _send(world, rules, rng, number, replica, False, now)


@_inner
def _reply(world: _World, rules: _Rules, number: int, now: float) -> None:
    """An attempt has reached the front door, where it is awaited still."""
    attempt = world.attempts[number]
    if not attempt.called_back:
        world.replicas[attempt.replica].in_flight -= 1
        world.replicas[attempt.replica].overdue_at = 0.0
        _learn(world, rules, attempt.replica, now - attempt.started, now)
        if attempt.call != NONE:
            call = world.calls[attempt.call]
            world.call_ms[call.query, call.column] = now - call.asked
            call.waits = False
            other = call.attempts
            while other != NONE:
                following = world.attempts[other].sibling
                if other != number:
                    _outlived(world, other, now)
                    _call_back(world, other)
                other = following
            if not call.due:
                _free_call(world, attempt.call)
    _free_attempt(world, number)


@_inner
def _call_back(world: _World, number: int) -> None:
    """Nobody waits for it any more, but that a probe goes on: it is there to be timed."""
    attempt = world.attempts[number]
    attempt.call = NONE
    if attempt.probe:
        return
    replica = world.replicas[attempt.replica]
    replica.in_flight -= 1
    if attempt.queued:
        _leave_queue(world, number)
        _free_attempt(world, number)
    else:
        attempt.called_back = True


@_inner
def _learn(world: _World, rules: _Rules, number: int, took: float, now: float) -> None:
    """Latency.learn of vecsvc/node.py."""
    replica, latest = world.replicas[number], world.latest[number]
    weight = max(1 / (replica.count + 1), min(MOST_WEIGHT, max(LEAST_WEIGHT, (now - replica.at) / MEAN_OVER_MS)))
    replica.mean += weight * (took - replica.mean)
    replica.least = 0.0
    replica.at = now
    latest[replica.count % SAMPLES] = took
    replica.count += 1
    if replica.count >= KNOWN_AFTER and replica.count % 8 == 0:
        n = min(replica.count, SAMPLES)
        for i in range(n):
            j = i
            while j and world.ranked[j - 1] > latest[i]:
                world.ranked[j] = world.ranked[j - 1]
                j -= 1
            world.ranked[j] = latest[i]
        replica.p95 = world.ranked[int(rules.quantile * n)]


@_inner
def _outlived(world: _World, number: int, now: float) -> None:
    attempt = world.attempts[number]
    replica = world.replicas[attempt.replica]
    replica.least = max(replica.least, now - attempt.started)


# The replicas.


@_inner
def _send(
    world: _World, rules: _Rules, rng: np.random.Generator, call: int, place: int, probe: bool, now: float
) -> None:
    tally = world.tally[0]
    number = tally.free_attempt
    if number == NONE:
        number = tally.used_attempts
        tally.used_attempts += 1
    else:
        tally.free_attempt = world.attempts[number].sibling
    attempt, replica = world.attempts[number], world.replicas[place]
    attempt.started, attempt.replica = now, place
    attempt.probe, attempt.called_back = probe, False
    attempt.call, attempt.sibling = call, world.calls[call].attempts
    world.calls[call].attempts = number
    if not replica.in_flight or not replica.overdue_at:
        replica.overdue_at = now + max(replica.mean, replica.least)
    replica.in_flight += 1
    if replica.running < rules.threads:
        replica.running += 1
        _begin(world, rules, rng, number, now)
        return
    attempt.queued, attempt.before, attempt.after = True, replica.last, NONE
    if replica.last == NONE:
        replica.first = number
    else:
        world.attempts[replica.last].after = number
    replica.last = number


@_inner
def _begin(world: _World, rules: _Rules, rng: np.random.Generator, number: int, now: float) -> None:
    world.attempts[number].queued = False
    service = rules.service[int(rng.random() * len(rules.service))]
    _push(world, now + service, END | number)


@_inner
def _end(world: _World, rules: _Rules, rng: np.random.Generator, number: int, now: float) -> None:
    """A search is done: the next one begins, and the answer goes its way."""
    place = world.attempts[number].replica
    replica = world.replicas[place]
    following = replica.first
    if following == NONE:
        replica.running -= 1
    else:
        _leave_queue(world, following)
        _begin(world, rules, rng, following, now)
    if replica.late > 0:
        _push(world, now + replica.late, LATE | number)
    else:
        _reply(world, rules, number, now)


@_inner
def _leave_queue(world: _World, number: int) -> None:
    attempt = world.attempts[number]
    replica = world.replicas[attempt.replica]
    if attempt.before == NONE:
        replica.first = attempt.after
    else:
        world.attempts[attempt.before].after = attempt.after
    if attempt.after == NONE:
        replica.last = attempt.before
    else:
        world.attempts[attempt.after].before = attempt.before


# What is under way, and what comes next.


@_inner
def _free_call(world: _World, number: int) -> None:
    world.calls[number].attempts = world.tally[0].free_call
    world.tally[0].free_call = number


@_inner
def _free_attempt(world: _World, number: int) -> None:
    world.attempts[number].sibling = world.tally[0].free_attempt
    world.tally[0].free_attempt = number


@_inner
def _push(world: _World, when: float, what: int) -> None:
    place = world.tally[0].events
    world.tally[0].events += 1
    while place:
        above = (place - 1) >> 1
        if not _is_before(when, what, world.when[above], world.what[above]):
            break
        world.when[place], world.what[place] = world.when[above], world.what[above]
        place = above
    world.when[place], world.what[place] = when, what


@_inner
def _pop(world: _World) -> int:
    first: int = world.what[0]
    world.tally[0].events -= 1
    left = world.tally[0].events
    when, what = world.when[left], world.what[left]
    place = 0
    while 2 * place + 1 < left:
        below = 2 * place + 1
        if below + 1 < left and _is_before(
            world.when[below + 1], world.what[below + 1], world.when[below], world.what[below]
        ):
            below += 1
        if not _is_before(world.when[below], world.what[below], when, what):
            break
        world.when[place], world.what[place] = world.when[below], world.what[below]
        place = below
    world.when[place], world.what[place] = when, what
    return first


@_inner
def _is_before(when: float, what: int, other_when: float, other_what: int) -> bool:
    """At the same moment an answer is before the second call that it makes needless."""
    return when < other_when or (when == other_when and what < other_what)
