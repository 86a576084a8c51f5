"""How many nodes a corpus and a load take: sized by arithmetic, their latencies simulated.

python benchmarks/capacity.py --measure indexes/corpus --save profile.json     # measure a shard's searches, then plan
python benchmarks/capacity.py --profile profile.json                           # plan with what was measured before
python benchmarks/capacity.py --check cluster.json                             # simulated beside measured

A profile is JSON: {"service_ms": [...], "vectors": ..., "bytes_per_vector": ...}, the milliseconds of single searches
in a shard of so many vectors. What --check reads is JSON too, one object or a list of them, one for each load:
{"shards", "replicas", "rate_qps", "service_ms": [... that a search keeps a thread busy], "latency_ms": [... of
queries]} and, where they are known, "threads" (1; searches that a node runs at the same time), "cores" (of the one
machine that all nodes share; each has its own without), "overhead_ms" (0; what the front door and the network add to
a query), "hedge_budget" (0.05), "hedge_min_ms" (1).
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
from capacity_plan import Demand, FrontDoor, K, Node, Plan, Profile, plan
from cluster_model import Cluster, on_one_machine, share_not_whole, share_that_meets, simulate
from common import machine, table

R = TypeVar("R", bound="Profile | Run")
HIGHEST_LOAD = 0.95  # beyond, a queue has no length that a simulation could tell


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured of a small cluster at one load."""

    shards: int
    replicas: int
    rate_qps: float
    service_ms: list[float]
    latency_ms: list[float]
    threads: int = 1
    cores: int | None = None
    overhead_ms: float = 0.0
    hedge_budget: float = 0.05
    hedge_min_ms: float = 1.0
    what: str = ""


# ---------------------------------------------------------------------------------------------------- inputs


def read(path: Path, kind: type[R]) -> list[R]:
    """The file's object, or its list of them. Exits with one line where it is none."""
    try:
        found: Any = msgspec.json.decode(path.read_bytes(), type=list[kind] | kind)  # type: ignore[valid-type]
    except (OSError, msgspec.DecodeError) as error:
        sys.exit(f"{path}: {error}")
    found = found if isinstance(found, list) else [found]
    for one in found:
        lists = [one.service_ms] if isinstance(one, Profile) else [one.service_ms, one.latency_ms]
        if not all(times and all(t >= 0 and math.isfinite(t) for t in times) for times in lists):
            sys.exit(f"{path}: samples must be finite, not negative, and at least one")
    return found


def measure(directory: Path, queries: int, seed: int) -> Profile:
    """Time `Index.search` of the index in `directory`, one query at a time: its own rows, moved a little."""
    from vecsvc.catalog import Served
    from vecsvc.config import ServeSettings
    from vecsvc.storage import index_folders

    folder = index_folders(directory)[0]
    served = Served(folder, str(folder.current()), ServeSettings(encoder=""))
    shard, manifest = max(served.shards, key=lambda one: one.size), served.manifest
    rng = np.random.default_rng(seed)
    rows = np.asarray(shard.vectors[np.sort(rng.integers(0, shard.size, queries))], np.float32)
    rows += (0.05 * rows.std() * rng.standard_normal(rows.shape)).astype(np.float32)
    rng.shuffle(rows)
    took = []
    for query in np.ascontiguousarray(rows):
        started = time.perf_counter()
        shard.search(query[None], min(K, shard.size), served.params)
        took.append((time.perf_counter() - started) * 1000)
    each = manifest.bytes_per_vector
    return Profile(
        service_ms=took[queries // 10 :],  # the first ones warm the caches
        vectors=shard.size,
        bytes_per_vector=sum(msgspec.structs.astuple(each)) if each is not None else 0.0,
        dim=manifest.spec.dim,
        what=f"{folder.name}: {shard.size:,} x {manifest.spec.dim} {manifest.spec.kind} on {machine()['cpu']}",
    )


# ---------------------------------------------------------------------------------------------------- tables


def short(number: float) -> str:
    for size, letter in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:g}{letter}"
    return f"{number:g}"


def resolved(quantile: float, calls: int, samples: int) -> bool:
    """Whether so many samples of a call tell the quantile of the last of `calls` calls."""
    return (1 - quantile) / calls * samples >= 1


def sizes(plans: list[Plan]) -> None:
    rows = [
        [
            short(one.demand.vectors),
            short(one.demand.rate_qps),
            f"{one.demand.share:.0%}",
            f"{one.shards:,}",
            f"{one.replicas:,}",
            f"{one.nodes:,}",
            f"{one.memory_tb:,.1f}",
            f"{one.shard_cores:,}",
            f"{one.front_cores:,.0f}",
            f"{one.network_gbit:,.1f}",
            f"{one.load:.0%}",
            one.bound_by,
        ]
        for one in plans
    ]
    head = ["vectors", "queries/s", "asked", "shards", "replicas", "nodes", "memory TB", "cores"]
    head += ["front-door cores", "Gbit/s to shards", "load", "bound by"]
    table("By arithmetic: what it takes", head, rows)


VARIANTS: dict[str, dict[str, float]] = {
    "all is well": {},
    "no hedges": {"hedge_budget": 0.0},
    "late": {"slow_share": 0.01, "slow_ms": 100.0},
    "late, no hedges": {"slow_share": 0.01, "slow_ms": 100.0, "hedge_budget": 0.0},
    "one gone": {"down": 1},
}


def latencies(plans: list[Plan], queries: int, seed: int) -> list[dict[str, Any]]:
    """Each plan as it should be, and when things go wrong."""
    rows, figures = [], []
    for one in plans:
        cells: list[str] = [f"{short(one.demand.vectors)}, {short(one.demand.rate_qps)}/s, {one.demand.share:.0%}"]
        for name, changes in VARIANTS.items():
            cluster = one.cluster(**changes)
            load = cluster.load(float(one.service_ms.mean()))
            quantiles: dict[str, float] = {}
            if load < HIGHEST_LOAD:
                outcome = simulate(cluster, one.service_ms, queries=queries, seed=seed)
                quantiles = dict(zip(("p50", "p99", "p99.9"), outcome.quantiles(), strict=True))
                figures.append({"what": cells[0], "variant": name, "load": load, **quantiles})
                if not changes:
                    cells += [f"{load:.0%}", f"{outcome.hedges / outcome.calls:.1%}"]
            shown = quantiles if not changes else {"p99": quantiles.get("p99", math.inf)}
            for quantile, value in shown.items():
                told = resolved(float(quantile[1:]) / 100, one.asked, len(one.service_ms))
                cells.append("overloaded" if math.isinf(value) else f"{'' if told else '> '}{value:,.2f}")
        rows.append(cells)
    head = ["ms in shards and queues", "load", "hedged", "p50", "p99", "p99.9"]
    table(
        f"Simulated, {queries:,} queries each, seed {seed}; late: 1 % of the replicas, at least one, late by 100 ms; "
        "one gone: of every shard",
        [*head, *(f"p99 {name}" for name in list(VARIANTS)[1:])],
        rows,
    )
    print("> at least: so rare a call was not among the measured ones.")
    return figures


def savings(plans: list[Plan]) -> None:
    """What asking fewer shards saves, beside the same demand with all of them."""
    whole = {(one.demand.vectors, one.demand.rate_qps): one for one in plans if one.demand.share == 1}
    rows = []
    for one in plans:
        all_asked = whole.get((one.demand.vectors, one.demand.rate_qps))
        if all_asked is None or one is all_asked:
            continue
        rows.append(
            [
                f"{short(one.demand.vectors)}, {short(one.demand.rate_qps)}/s, {one.demand.share:.0%}",
                f"{all_asked.nodes:,} -> {one.nodes:,}",
                f"{one.nodes / all_asked.nodes:.0%}",
                f"{all_asked.front_cores:,.0f} -> {one.front_cores:,.0f}",
                f"{all_asked.network_gbit:,.0f} -> {one.network_gbit:,.0f}",
                f"{share_that_meets(0.01, all_asked.asked):.0%} -> {share_that_meets(0.01, one.asked):.0%}",
            ]
        )
    if rows:
        head = ["asking some", "nodes", "of all", "front-door cores", "Gbit/s", "meet 1 % slow calls"]
        table("By arithmetic: what asking the nearest shards of a corpus partitioned by cluster saves", head, rows)
        print("What it costs is recall, and that shards near popular questions need more replicas: measure both.")


def fan_out(plans: list[Plan], availability: float) -> None:
    counts = sorted({1, 4, 20, 100, 400, *(one.asked for one in plans)})
    rows = [
        [
            f"{count:,}",
            f"{share_that_meets(0.01, count):.1%}",
            f"{share_that_meets(0.001, count):.1%}",
            *(f"{share_not_whole(availability, replicas, count):.2e}" for replicas in (1, 2, 3)),
        ]
        for count in counts
    ]
    head = ["shards asked", "meet 1 % slow calls", "meet 0.1 %"]
    head += [f"not whole, {n} replica{'s' if n > 1 else ''}" for n in (1, 2, 3)]
    table(f"By arithmetic: what asking many costs, nodes up {availability:.2%} of the time", head, rows)


def check(runs: list[Run], queries: int, seed: int) -> list[dict[str, Any]]:
    """Simulated beside measured, for each load."""
    rows, figures = [], []
    for run in runs:
        cluster = Cluster(
            shards=run.shards,
            replicas=run.replicas,
            threads=run.threads,
            rate_qps=run.rate_qps,
            hedge_budget=run.hedge_budget if run.replicas > 1 else 0.0,
            hedge_min_ms=run.hedge_min_ms,
        )
        service = np.asarray(run.service_ms)
        if run.cores is None:
            outcome = simulate(cluster, service, queries=queries, seed=seed)
        else:
            outcome = on_one_machine(cluster, service, run.cores, queries=queries, seed=seed)
        simulated = np.quantile(outcome.latency_ms + run.overhead_ms, (0.5, 0.99))
        measured = np.quantile(np.asarray(run.latency_ms), (0.5, 0.99))
        ratios = simulated / measured
        name = run.what or f"{run.shards} x {run.replicas} at {run.rate_qps:g}/s"
        pairs = zip(simulated, measured, ratios, strict=True)
        rows.append([name, *(f"{x:,.2f}" if i < 2 else f"{x:.2f}" for cells in pairs for i, x in enumerate(cells))])
        figures.append({"what": name, "simulated": simulated.tolist(), "measured": measured.tolist()})
    head = ["cluster", "p50 ms simulated", "measured", "ratio", "p99 ms simulated", "measured", "ratio"]
    table("Simulated beside measured", head, rows)
    return figures


# ------------------------------------------------------------------------------------------------------ main


def numbers(text: str) -> list[float]:
    return [float(word) for word in text.split(",")]


def arguments() -> argparse.ArgumentParser:
    known = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = known.add_mutually_exclusive_group(required=True)
    source.add_argument("--measure", type=Path, metavar="DIR", help="an index, whose searches are timed now")
    source.add_argument("--profile", type=Path, metavar="FILE", help="what --save wrote")
    source.add_argument("--check", type=Path, metavar="FILE", help="compare with a measured cluster, and end")
    known.add_argument("--save", type=Path, metavar="FILE", help="write what --measure found")
    known.add_argument("--vectors", type=numbers, default=[1e9, 1e11], help="1e9,1e11")
    known.add_argument("--rates", type=numbers, default=[1e3, 1e6], help="queries a second: 1e3,1e6")
    known.add_argument("--shares", type=numbers, default=[1.0, 0.1, 0.05], help="of shards that a query asks: 1,.1,.05")
    known.add_argument("--bytes-per-vector", type=float, help="another one than the profile's")
    known.add_argument("--memory-gib", type=float, default=128, help="of a node")
    known.add_argument("--cores", type=int, default=16, help="of a node")
    known.add_argument("--busy", type=float, default=0.5, help="share of a node's cores that may be busy")
    known.add_argument("--versions", type=int, default=2, help="held at once during a roll-out")
    known.add_argument("--availability", type=float, default=0.999, help="of a node")
    known.add_argument("--front-query-us", type=float, default=FrontDoor().query_us, help="a front door's, for a query")
    known.add_argument("--front-call-us", type=float, default=FrontDoor().call_us, help="and for each shard asked")
    known.add_argument("--queries", type=int, default=10_000, help="simulated for each row, or measured")
    known.add_argument("--seed", type=int, default=7)
    known.add_argument("--out", type=Path, help="write capacity.json, and .png and .svg where matplotlib is installed")
    return known


def main() -> None:
    given = arguments().parse_args()
    if given.check:
        figures = check(read(given.check, Run), given.queries, given.seed)
        write(given.out, {"check": figures})
        return
    if given.measure:
        profile = measure(given.measure, given.queries, given.seed)
        if given.save:
            given.save.write_bytes(msgspec.json.encode(profile))
    else:
        profile = read(given.profile, Profile)[0]
    if given.bytes_per_vector is not None:
        profile = msgspec.structs.replace(profile, bytes_per_vector=given.bytes_per_vector)
    node = Node(memory_gib=given.memory_gib, cores=given.cores, busy=given.busy, versions=given.versions)
    front = FrontDoor(query_us=given.front_query_us, call_us=given.front_call_us)
    demands = [
        Demand(vectors=vectors, rate_qps=rate, share=share)
        for vectors in given.vectors
        for rate in given.rates
        for share in given.shares
    ]
    plans = [plan(demand, profile, node, front) for demand in demands]
    samples = np.asarray(profile.service_ms)
    print(
        f"{profile.what or 'profile'}: a search takes {samples.mean():.3f} ms, p99 {np.quantile(samples, 0.99):.3f} "
        f"({len(samples):,} samples), {profile.bytes_per_vector:g} bytes a vector\n"
        f"a node: {node.memory_gib:g} GiB, {node.filled:.0%} full with {node.versions} versions, {node.cores} cores "
        f"busy to {node.busy:.0%}, each as fast as if alone; a larger shard takes longer by the logarithm of its size"
    )
    sizes(plans)
    savings(plans)
    fan_out(plans, given.availability)
    figures = latencies(plans, given.queries, given.seed)
    write(given.out, {"plans": [row(one) for one in plans], "simulated": figures}, plans, given.queries, given.seed)


def row(one: Plan) -> dict[str, Any]:
    names = ("shards", "asked", "replicas", "nodes", "memory_tb", "shard_cores", "front_cores", "network_gbit", "load")
    demand = {"vectors": one.demand.vectors, "rate_qps": one.demand.rate_qps, "share": one.demand.share}
    return {**demand, **{name: getattr(one, name) for name in names}, "bound_by": one.bound_by}


def write(
    out: Path | None, figures: dict[str, Any], plans: list[Plan] | None = None, queries: int = 0, seed: int = 7
) -> None:
    if out is None:
        return
    out.mkdir(parents=True, exist_ok=True)
    (out / "capacity.json").write_bytes(msgspec.json.format(msgspec.json.encode({"machine": machine(), **figures})))
    if plans:
        try:
            from capacity_plot import draw
        except ImportError as error:
            print(f"no pictures: {error.name} is not installed")
            return
        draw(plans, out / "capacity", queries, seed)


if __name__ == "__main__":
    main()
