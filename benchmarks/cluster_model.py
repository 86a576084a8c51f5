"""Simulates the queues of shards, replicas and hedged calls; what capacity.py plans with.

Time goes from query to query, and each step is an array operation over all shards: a cluster of 1,000 shards costs
some 0.2 ms a query. Units are milliseconds throughout.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Times = NDArray[np.float64]  # milliseconds
Numbers = NDArray[np.int64]

BLOCK = 64  # queries whose service times are drawn at once, and after which the hedge's delay is set anew
LEARN = 0.3  # weight of the last call in what a front door has seen of a replica
FORGET = 0.94  # of that, kept from block to block: a replica that was slow is tried again after some thousand queries
WARM_UP = 0.1  # share of the queries that only fill the queues
MOST_SAVED = 10  # hedges that a quiet time may save up: what is saved without end is spent when there is no room for it
MOST_CALLS = 60_000_000  # that are kept in memory, 4 bytes each


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """What is simulated. Service times come beside it."""

    shards: int
    rate_qps: float
    replicas: int = 2  # of each shard
    threads: int = 1  # searches that a replica runs at the same time; the others wait in order of arrival
    asked: int | None = None  # shards that a query asks, drawn at random for each; None for all
    two_choices: bool = True  # the better of two random replicas; otherwise any
    hedge_budget: float = 0.05  # second calls that each call pays for; 0 for none
    common_budget: bool = False  # of all shards together; otherwise each shard has its own
    hedge_quantile: float = 0.95  # of the latest calls' latencies: when a second call is sent
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
    call_ms: Times  # (queries, calls a query), float32
    hedges: int
    calls: int

    def quantiles(self) -> tuple[float, float, float]:
        p50, p99, p999 = np.quantile(self.latency_ms, (0.5, 0.99, 0.999))
        return float(p50), float(p99), float(p999)


def simulate(cluster: Cluster, service_ms: Times, *, queries: int = 20_000, seed: int = 7) -> Outcome:
    """Poisson arrivals, all shards of a query asked at the same moment, its latency that of the last one.

    A replica takes calls in order of arrival. A front door is taken to know the work that waits at a replica, and
    what it has seen of it. A hedged call takes the earlier answer; the other one is worked off all the same, because
    a search that has begun is too short to be stopped. Raises ValueError for what cannot be simulated.
    """
    asked = cluster.calls_a_query
    _check(cluster, service_ms, queries)
    rng = np.random.default_rng(seed)
    state = _State(cluster, rng)
    arrivals = np.cumsum(rng.exponential(1000 / cluster.rate_qps, queries))
    latency = np.empty((queries, asked), np.float32)
    pending: deque[tuple[float, int, Numbers, Numbers, Numbers]] = deque()  # due, query, its calls, shards, places
    delay = math.inf
    everyone = np.arange(cluster.shards)
    drawn = np.empty((0, asked))
    for query, now in enumerate(arrivals):
        while pending and pending[0][0] <= now:
            _hedge(state, pending.popleft(), arrivals, latency, service_ms)
        if query % BLOCK == 0:
            drawn = service_ms[rng.integers(0, len(service_ms), (BLOCK, asked))]
            state.seen *= FORGET
            if query and cluster.hedge_budget > 0 and state.up > 1:
                quantile = float(np.quantile(latency[query - BLOCK : query], cluster.hedge_quantile))
                delay = max(cluster.hedge_min_ms, quantile)
        shards = everyone if asked == cluster.shards else rng.permutation(cluster.shards)[:asked]
        places = state.choose(shards, now)
        state.pay(shards)
        took = state.run(shards, places, now, drawn[query % BLOCK])
        latency[query] = took
        late = np.flatnonzero(took > delay)
        if len(late):
            pending.append((now + delay, query, late, shards[late], places[late]))
            if len(pending) > 1 and pending[-2][0] > pending[-1][0]:
                # The delay has become shorter: the queue stays in order of time.
                pending = deque(sorted(pending, key=lambda one: one[0]))
    while pending:
        _hedge(state, pending.popleft(), arrivals, latency, service_ms)
    kept = latency[int(queries * WARM_UP) :]
    return Outcome(kept.max(axis=1).astype(np.float64), kept, int(state.hedged.sum()), queries * asked)


def _check(cluster: Cluster, service_ms: Times, queries: int) -> None:
    if not len(service_ms) or not np.isfinite(service_ms).all() or service_ms.min() < 0:
        raise ValueError("service times must be finite, not negative, and at least one")
    if not 1 <= cluster.calls_a_query <= cluster.shards:
        raise ValueError(f"a query must ask 1 to {cluster.shards} shards, not {cluster.calls_a_query}")
    if not 0 <= cluster.down < cluster.replicas:
        raise ValueError(f"{cluster.down} of {cluster.replicas} replicas cannot be gone: no answer would be whole")
    if queries * cluster.calls_a_query > MOST_CALLS:
        raise ValueError(
            f"{queries} queries of {cluster.calls_a_query} calls are more than {MOST_CALLS:,}; take fewer queries"
        )


class _State:
    """When each thread of each replica is free, and what front doors have seen of the replica."""

    def __init__(self, cluster: Cluster, rng: np.random.Generator) -> None:
        shards, replicas = cluster.shards, cluster.replicas
        self.free = np.zeros((shards, replicas, cluster.threads))
        self.seen = np.zeros((shards, replicas))
        self.extra = np.zeros((shards, replicas))
        slow = math.ceil(cluster.slow_share * self.extra.size)
        self.extra.reshape(-1)[rng.permutation(self.extra.size)[:slow]] = cluster.slow_ms
        self.up = replicas - cluster.down  # the last ones are gone
        self.two_choices = cluster.two_choices
        self.budget, self.common_budget = cluster.hedge_budget, cluster.common_budget
        self.saved, self.hedged = np.zeros(shards), np.zeros(shards)  # second calls that are paid for, and were sent
        self.rng = rng

    def choose(self, shards: Numbers, now: float, besides: Numbers | None = None) -> Numbers:
        """One living replica for each shard, never the one in `besides`."""
        first, second = self.rng.random((2, len(shards)))
        if besides is None:
            a = (first * self.up).astype(np.int64)
            b = (a + 1 + (second * (self.up - 1)).astype(np.int64)) % self.up
        else:
            a = (besides + 1 + (first * (self.up - 1)).astype(np.int64)) % self.up
            b = (besides + 1 + (second * (self.up - 1)).astype(np.int64)) % self.up
        if not self.two_choices or self.up == 1:
            return a
        worse = self._expected(shards, a, now) > self._expected(shards, b, now)
        return np.where(worse, b, a)

    def _expected(self, shards: Numbers, places: Numbers, now: float) -> Times:
        waits: Times = np.maximum(self.free[shards, places].min(axis=1) - now, 0.0)
        return waits + self.seen[shards, places]

    def pay(self, shards: Numbers) -> None:
        """One call to each of these shards pays for a share of a second one."""
        most = MOST_SAVED * (len(self.saved) if self.common_budget else 1)
        if self.common_budget:
            self.saved[0] = min(self.saved[0] + self.budget * len(shards), most)
        else:
            self.saved[shards] = np.minimum(self.saved[shards] + self.budget, most)

    def spend(self, shards: Numbers) -> Numbers:
        """Which of these late calls may be sent a second time; they are paid for."""
        if self.common_budget:
            some = self.rng.permutation(len(shards))[: int(self.saved[0])]
            self.saved[0] -= len(some)
        else:
            some = np.flatnonzero(self.saved[shards] >= 1)
            self.saved[shards[some]] -= 1
        self.hedged[shards[some]] += 1
        return some

    def run(self, shards: Numbers, places: Numbers, now: float, service: Times) -> Times:
        """Queue one call at each shard. Returns how long each takes, waiting included."""
        threads = self.free[shards, places].argmin(axis=1)
        ends = np.maximum(self.free[shards, places, threads], now) + service
        self.free[shards, places, threads] = ends
        extra = self.extra[shards, places]
        # What a replica does when nothing waits: the queue itself is known.
        self.seen[shards, places] += LEARN * (service + extra - self.seen[shards, places])
        took: Times = ends - now + extra
        return took


def _hedge(
    state: _State,
    due: tuple[float, int, Numbers, Numbers, Numbers],
    arrivals: Times,
    latency: NDArray[np.float32],
    service_ms: Times,
) -> None:
    """Send second calls as far as the budget goes."""
    when, query, calls, shards, places = due
    some = state.spend(shards)
    calls, shards, places = calls[some], shards[some], places[some]
    if not len(calls):
        return
    service = service_ms[state.rng.integers(0, len(service_ms), len(calls))]
    others = state.choose(shards, when, besides=places)
    took = when - arrivals[query] + state.run(shards, others, when, service)
    latency[query, calls] = np.minimum(latency[query, calls], took)


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
