"""Sizes a cluster by arithmetic: shards from memory, replicas from the rate."""

from __future__ import annotations

import math
from dataclasses import dataclass

import msgspec
import numpy as np
from cluster_model import Cluster, Times

MOST_SIMULATED_REPLICAS = 8  # of a shard: more of them at the same load each wait no longer
FEWEST_REPLICAS = 2
K = 10
HIT_BYTES = 24  # of an answer on its way from a shard to the front door: distance, row, id
CALL_BYTES = 200  # of a question's and an answer's heads; the vector comes on top


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured of one shard."""

    service_ms: list[float]
    vectors: int
    bytes_per_vector: float
    dim: int = 384
    what: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """What is bought, and how full it may be."""

    memory_gib: float
    cores: int
    filled: float = 0.8  # of the memory
    busy: float = 0.5  # of the cores, at the rate that is planned for
    versions: int = 2  # held at once while a new one is rolled out


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontDoor:
    """Processor time of a front door; the defaults are what it is allowed to take, not what was measured."""

    query_us: float = 150.0
    call_us: float = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    vectors: float
    rate_qps: float
    share: float = 1.0  # of the shards that a query asks


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    demand: Demand
    shards: int
    asked: int
    replicas: int
    service_ms: Times
    bound_by: str
    memory_tb: float
    shard_cores: int
    front_cores: float
    network_gbit: float
    load: float

    @property
    def nodes(self) -> int:
        return self.shards * self.replicas

    def cluster(self, replicas: int | None = None, **changes: float) -> Cluster:
        """What is simulated of it: all shards, with as many replicas as tell the waiting times."""
        simulated = min(self.replicas, MOST_SIMULATED_REPLICAS) if replicas is None else replicas
        rate = self.demand.rate_qps * simulated / self.replicas
        threads = self.shard_cores // self.nodes
        return Cluster(
            shards=self.shards,
            asked=self.asked,
            replicas=simulated,
            threads=threads,
            rate_qps=rate,
            **changes,  # type: ignore[arg-type]
        )


def plan(demand: Demand, profile: Profile, node: Node, front: FrontDoor) -> Plan:
    """Arithmetic: as many shards as memory asks for, as many replicas as the rate does."""
    size_bytes = demand.vectors * profile.bytes_per_vector * node.versions
    shards = max(1, math.ceil(size_bytes / (node.memory_gib * 2**30 * node.filled)))
    asked = max(1, math.ceil(shards * demand.share))
    # A walk of a graph grows as the logarithm of the vectors.
    grown = max(1.0, math.log(max(2.0, demand.vectors / shards)) / math.log(max(2, profile.vectors)))
    service_ms = np.asarray(profile.service_ms) * grown
    busy_cores = demand.rate_qps * asked / shards * float(service_ms.mean()) / 1000
    needed = math.ceil(busy_cores / (node.cores * node.busy))
    replicas = max(FEWEST_REPLICAS, needed)
    answer_bytes = CALL_BYTES + 4 * profile.dim + K * HIT_BYTES
    return Plan(
        demand=demand,
        shards=shards,
        asked=asked,
        replicas=replicas,
        service_ms=service_ms,
        bound_by="searching" if needed > FEWEST_REPLICAS else "memory" if shards > 1 else "two replicas",
        memory_tb=shards * replicas * node.memory_gib * 2**30 / 1e12,
        shard_cores=shards * replicas * node.cores,
        front_cores=demand.rate_qps * (front.query_us + front.call_us * asked) / 1e6 / node.busy,
        network_gbit=demand.rate_qps * asked * answer_bytes * 8 / 1e9,
        load=busy_cores / (node.cores * replicas),
    )
