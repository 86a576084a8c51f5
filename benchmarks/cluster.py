"""What a front door costs, and what its clients feel while nodes are killed, slowed, lost, restarted and rolled over.

python benchmarks/cluster.py --data DIR --work DIR                     # everything: some 20 minutes
python benchmarks/cluster.py --rows 4000 --seconds 1 --restarts 1      # a look whether it runs
python benchmarks/cluster.py --parts adg                               # cost, a shard gone, input for capacity.py

a  one query at a time: beside the slowest shard alone, and one process that holds all; processor time
b  SIGKILL of one replica under load
c  one replica slowed by 100 ms: p99 beside that of a healthy cluster
d  a whole shard gone, or hanging: statuses and times, with and without `partial`
e  everything restarted, one after the other, under load
f  versions rolled out and back under load
g  service times of shards and latencies of queries at stated rates, as JSON for benchmarks/capacity.py --check
h  the same of nodes that sleep through a search: a cluster whose nodes do not share this machine's processors
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from common import RESULTS, K, Task, load_task, parser, running, save, table, vecsvc, work_folder
from load import Tally, Wire, closed_loop, open_loop, post, run
from nodes import Cluster, Place, cluster

from vecsvc import remote
from vecsvc.storage import IndexFolder
from vecsvc.types import SearchSettings

NAME = "rows"
ROUNDS = 5
SLOWED_MS = 100.0
CLIENTS = 8


class Bench:
    """The index in two versions, the questions, and what was found so far."""

    def __init__(self, arguments: Any, task: Task, work: Path) -> None:
        self.shards, self.replicas, self.seconds = arguments.shards, arguments.replicas, arguments.seconds
        self.restarts, self.rates = arguments.restarts, arguments.rates
        self.queries = task.queries
        self.folder = build(task, work, self.shards)
        self.figures: dict[str, Any] = {}
        self.requests = self.asking()

    def asking(self, **more: Any) -> list[bytes]:
        return [post("/search", _body(query, **more)) for query in self.queries]


def _body(query: np.ndarray, **more: Any) -> bytes:
    return json.dumps({"vector": [float(x) for x in query], "k": K, **more}).encode()


def build(task: Task, work: Path, shards: int) -> IndexFolder:
    """Versions v1 and v2 with the same vectors; a stored field says which one a row is of."""
    folder = IndexFolder(work / f"cluster-{len(task.base)}-{shards}" / NAME)
    for number in (2, 1):
        if f"v{number}" in folder.versions():
            continue
        rows = len(task.base)
        columns = {
            "id": pa.array([f"row-{i}" for i in range(rows)]),
            "vector": pa.FixedSizeListArray.from_arrays(pa.array(task.base.reshape(-1)), task.base.shape[1]),
            "of": pa.array(np.full(rows, number, np.int32)),
        }
        source = work / f"cluster-{number}.parquet"
        pq.write_table(pa.table(columns), source, compression="none", use_dictionary=False)
        flags = ["--out", str(folder.path.parent), "--name", NAME, "--version", f"v{number}", "--kind", "nng"]
        flags += ["--metric", "ip", "--shards", str(shards), "--fields", "of", "--certificate-queries", "0"]
        subprocess.run(vecsvc("build-index", str(source), *flags), check=True, stdout=subprocess.DEVNULL)
        source.unlink()
    return folder


def whole(number: int, body: bytes) -> str | None:
    """Every answer has all places and all shards."""
    answer = json.loads(body)
    coverage = answer["coverage"]
    if len(answer["results"]) != K or coverage["shards_ok"] != coverage["shards_total"]:
        return f"{len(answer['results'])} results, {coverage}"
    return None


def unmixed(number: int, body: bytes) -> str | None:
    answer = json.loads(body)
    found = {f"v{hit['fields']['of']}" for hit in answer["results"]}
    if found != {answer["index"]["version"]}:
        return f"an answer of {answer['index']['version']} holds rows of {sorted(found)}"
    return whole(number, body)


def row(name: str, tally: Tally) -> list[Any]:
    return [name, tally.total, tally.failed, tally.elsewhere, tally.ms(50), tally.ms(99), tally.ms(100)]


HEAD = ["", "requests", "failed", "asked again", "p50 ms", "p99 ms", "max ms"]


def tell(bench: Bench, part: str, title: str, tallies: dict[str, Tally], **more: Any) -> None:
    table(title, HEAD, [row(name, tally) for name, tally in tallies.items()])
    for tally in tallies.values():
        tally.tell()
    bench.figures[part] = {
        **{
            name: {"outcomes": t.counts(), "ms": {p: t.ms(p) for p in (50, 95, 99, 100)}, "reasons": dict(t.reasons)}
            for name, t in tallies.items()
        },
        **more,
    }


def target(what: str, met: bool) -> None:
    print(f"{what}: {'met' if met else 'MISSED'}")


# --------------------------------------------------------------------------------------------------- a: cost


async def _alone(port: int, requests: Sequence[bytes], check: Any = None) -> np.ndarray:
    """Seconds of each request, one at a time. Raises SystemExit where one fails."""
    wire = await Wire.to(port)
    times = []
    for number, data in enumerate(requests):
        began = time.perf_counter()
        status, _, body = await wire.ask(data)
        times.append(time.perf_counter() - began)
        wrong = check(number, body) if check is not None else None
        if status != 200 or wrong:
            raise SystemExit(f"{status} {wrong or body[:300]!r}")
    wire.close()
    return np.array(times)


def cost(bench: Bench) -> None:
    directory = bench.folder.path.parent
    partial = bench.asking(partial=True)
    figures: dict[str, list[float]] = {}
    all_shards = vecsvc("serve", str(directory), "--port", "0", "--admin-port", "0", "--search-threads", "1")
    with cluster(directory, bench.shards, 1, proxied=False) as made, running(all_shards) as one:
        door = made.doors[0]
        for number in range(ROUNDS + 1):  # the first is thrown away
            found: dict[str, float] = {}
            before = door.cpu_s(), sum(node.cpu_s() for node in made.nodes)
            times = run(_alone(door.port, bench.requests, whole if number == 0 else None))
            n = len(times)
            found["door cpu"] = (door.cpu_s() - before[0]) / n
            found["nodes cpu"] = (sum(node.cpu_s() for node in made.nodes) - before[1]) / n
            found["door p50"], found["door p99"] = np.percentile(times, (50, 99)).tolist()
            cpu = sum(node.cpu_s() for node in made.nodes)
            each = np.array([run(_alone(node.port, partial)) for node in made.nodes])
            found["http cpu"] = (sum(node.cpu_s() for node in made.nodes) - cpu) / n
            found["slowest p50"], found["slowest p99"] = np.percentile(each.max(axis=0), (50, 99)).tolist()
            found["shard p50"] = float(np.percentile(each, 50, axis=1).max())
            cpu = one.cpu_s()
            times = run(_alone(one.port, bench.requests))
            found["one cpu"] = (one.cpu_s() - cpu) / n
            found["one p50"], found["one p99"] = np.percentile(times, (50, 99)).tolist()
            if number:
                for name, value in found.items():
                    figures.setdefault(name, []).append(value * 1e6)
    us = {name: float(np.median(values)) for name, values in figures.items()}
    table(
        f"a: µs a query, one at a time, {bench.shards} shards; medians of {ROUNDS} alternating rounds",
        ["", "p50", "p99", "CPU"],
        [
            ["front door", us["door p50"], us["door p99"], us["door cpu"]],
            ["its nodes", "-", "-", us["nodes cpu"]],
            ["the slowest shard of each query, asked alone over HTTP", us["slowest p50"], us["slowest p99"], "-"],
            ["the slowest shard's node", us["shard p50"], "-", us["http cpu"] / bench.shards],
            ["one process that holds all", us["one p50"], us["one p99"], us["one cpu"]],
        ],
    )
    adds, limit = us["door p50"] - us["shard p50"], 60 * bench.shards + 150
    target(f"adds {adds:.0f} µs at p50 to its slowest shard, target 800", adds <= 800)
    target(f"front door's CPU {us['door cpu']:.0f} µs a query, target {limit}", us["door cpu"] <= limit)
    bench.figures["a"] = {"us": figures, "adds_us": adds}


# ------------------------------------------------------------------------------------------------- b to f


async def under_load(
    bench: Bench, made: Cluster, happens: Any, requests: list[bytes] | None = None, check: Any = whole
) -> Tally:
    """Load while `happens` runs in a thread, and a moment before and after."""
    stop = asyncio.Event()
    load = asyncio.ensure_future(
        closed_loop(made.ports, requests or bench.requests, stop, clients=CLIENTS, check=check)
    )
    await asyncio.sleep(bench.seconds / 4)
    try:
        await asyncio.to_thread(happens)
        await asyncio.sleep(bench.seconds / 4)
    finally:
        stop.set()
    return await load


def killed(bench: Bench, made: Cluster) -> None:
    def happens() -> None:
        for number in (0, 1):
            made.nodes[number].kill()
            time.sleep(bench.seconds / 4)
            made.start_node(number)
            made.wait_whole()

    tally = run(under_load(bench, made, happens))
    tell(bench, "b", "b: one replica killed with SIGKILL, then the other", {"killed": tally})
    target("no failed request", tally.failed == 0)


def slowed(bench: Bench, made: Cluster) -> None:
    assert made.proxies is not None
    capacity = run(closed_loop(made.ports, bench.requests, bench.seconds / 2, clients=CLIENTS))
    rate = 0.3 * capacity.count() / (bench.seconds / 2)
    tallies: dict[str, Tally] = {}
    for name, ms in (("healthy", 0.0), ("one slowed", SLOWED_MS), ("healthy again", 0.0)):
        made.proxies.set(0, delay_ms=ms)
        before = made.doors[0].metrics()
        tallies[name] = run(open_loop(made.ports, bench.requests, rate, bench.seconds * 2, check=whole))
        after = made.doors[0].metrics()
        asked = bench.shards * tallies[name].total
        extra = sum(
            after.get(f"vecsvc_hedges_total{{outcome={outcome}}}", 0.0)
            - before.get(f"vecsvc_hedges_total{{outcome={outcome}}}", 0.0)
            for outcome in ("sent", "probe_sent")
        )
        print(f"{name}: {extra:.0f} of {asked} shard questions asked twice ({extra / asked:.2%})")
    title = f"c: one of {len(made.nodes)} nodes slowed by {SLOWED_MS:g} ms, open loop at {rate:.0f} queries/s"
    tell(bench, "c", title, tallies, rate_qps=rate)
    healthy, slow = tallies["healthy"].ms(99), tallies["one slowed"].ms(99)
    target(f"p99 {slow:.2f} ms, target {1.5 * healthy:.2f} (1.5 x healthy)", slow <= 1.5 * healthy)


def gone(bench: Bench, made: Cluster) -> None:
    assert made.proxies is not None
    timeout_ms, n = 500.0, min(50, len(bench.queries))
    asked = {
        "whole": [post("/search", _body(q, timeout_ms=timeout_ms)) for q in bench.queries[:n]],
        "partial": [post("/search", _body(q, timeout_ms=timeout_ms, partial=True)) for q in bench.queries[:n]],
    }

    def truthful(number: int, body: bytes) -> str | None:
        coverage = json.loads(body)["coverage"]
        fine = coverage["shards_ok"] == bench.shards - 1 and coverage["degraded"]
        return None if fine else f"coverage {coverage}"

    async def ask(requests: list[bytes], check: Any) -> Tally:
        return await open_loop(made.ports, requests, 20.0, n / 20.0, check=check)

    tallies: dict[str, Tally] = {}
    last = bench.shards - 1
    for what, name in itertools.product(("gone", "hanging"), asked):
        for number in made.of(last):
            if what == "gone":
                made.nodes[number].kill()
            else:
                made.proxies.set(number, delay_ms=20_000)
        if what == "gone":
            time.sleep(0.5)
        tallies[f"{what}, {name}"] = run(ask(asked[name], truthful))
        for number in made.of(last):
            made.proxies.set(number)
            made.proxies.cut(number)
            if what == "gone":
                made.start_node(number)
        made.wait_whole()
    lines = []
    for name, tally in tallies.items():
        slowest = max(max(seconds) for seconds in tally.seconds.values()) * 1e3
        lines.append([name, json.dumps(tally.counts()), slowest])
        tally.tell()
    table(f"d: shard {last} gone or hanging, timeout_ms {timeout_ms:g}", ["", "statuses", "slowest ms"], lines)
    allowed = [{"503"}, {"200"}, {"503", "504"}, {"200"}]
    right = all(set(t.counts()) <= s for t, s in zip(tallies.values(), allowed, strict=True))
    target("503 or 504, or truthful partial answers", right)
    target(f"within timeout + 50 ms ({timeout_ms + 50:g} ms)", all(line[2] <= timeout_ms + 50 for line in lines))
    bench.figures["d"] = {name: {"outcomes": t.counts(), "reasons": dict(t.reasons)} for name, t in tallies.items()}
    bench.figures["d"]["slowest_ms"] = {line[0]: line[2] for line in lines}


def restarted(bench: Bench, made: Cluster) -> None:
    def restart(place: Place) -> None:
        place.stop()
        if place in made.doors:
            place.start()
            place.wait("ready")
        else:
            made.start_node(made.nodes.index(place))
        made.wait_whole()

    def happens() -> None:
        for number in range(bench.restarts):
            for place in (*made.nodes, *made.doors):
                restart(place)
            print(f"  round {number + 1} of {bench.restarts}", flush=True)

    tally = run(under_load(bench, made, happens))
    title = f"e: {len(made.nodes)} nodes and {len(made.doors)} front doors restarted {bench.restarts} times"
    tell(bench, "e", title, {"rolling restart": tally}, asked_again=tally.elsewhere)
    target("no failed request", tally.failed == 0)


def rolled(bench: Bench, made: Cluster) -> None:
    flips = f"vecsvc_version_flips_total{{index={NAME}}}"
    before = sum(door.metrics().get(flips, 0) for door in made.doors)

    def happens() -> None:
        for number in range(6):
            wanted = "v2" if bench.folder.current() == "v1" else "v1"
            bench.folder.rollback(wanted)
            # Nodes look each at its own time, so that for a while some have it and some do not.
            end = time.monotonic() + 60
            while any(_serving(door) != wanted for door in made.doors) and time.monotonic() < end:
                time.sleep(0.05)
            print(f"  {wanted} serves ({number + 1} of 6)", flush=True)

    tally = run(under_load(bench, made, happens, bench.asking(include=["fields"]), unmixed))
    count = sum(door.metrics().get(flips, 0) for door in made.doors) - before
    tell(bench, "f", f"f: versions rolled out and back, {count:.0f} flips of front doors", {"roll-out": tally})
    target("no mixed answer and no failed request", tally.failed == 0 and count > 0)


def _serving(door: Place) -> str:
    for name, value in door.metrics().items():
        if name.startswith("vecsvc_index_info") and value:
            return name.split("version=")[1].rstrip("}").split(",")[0]
    return ""


# --------------------------------------------------------------------------------- g: input of the simulator


class ShardClient(asyncio.Protocol):
    """Asks a node as a front door does, one question at a time."""

    def __init__(self) -> None:
        self._frames = remote.Frames(remote.OF_NODES, remote.MAX_ANSWER_BYTES)
        self.answer: asyncio.Future[tuple[Any, bytes]] = asyncio.get_running_loop().create_future()
        self.number = 0  # of the question whose answer is awaited; what a node holds has 0

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        transport.write(remote.message(remote.Kind.HELLO, 0, remote.Hello()))

    def data_received(self, data: bytes) -> None:
        for kind, number, payload in self._frames.feed(data):
            # A node tells what it holds now and then, unasked.
            if number == self.number and not self.answer.done():
                self.answer.set_result((kind, payload))

    async def ask(self, shard: int, digest: str, query: np.ndarray) -> tuple[float, float]:
        """Seconds of one shard call, and those of its search."""
        ask = remote.Ask.made(NAME, digest, len(query), SearchSettings(k=K), k=K, of=1)
        asked = remote.Common.of(remote.encode_ask(ask), query)
        self.answer = asyncio.get_running_loop().create_future()
        self.number += 1
        began = time.perf_counter()
        self.transport.write(remote.search_frame(self.number, 10_000.0, (shard,), asked))
        kind, payload = await self.answer
        seconds = time.perf_counter() - began
        if kind is not remote.Kind.PART:
            raise SystemExit(f"a node answered {kind.name}: {payload[:200]!r}")
        return seconds, remote.decode(kind, payload).search_s


async def _service_s(bench: Bench, made: Cluster, requests: int) -> np.ndarray:
    """Seconds of so many calls to each shard, one at a time, and of their searches: (calls, 2)."""
    found = []
    for shard in range(bench.shards):
        port = made.nodes[made.of(shard)[0]].shard_port
        _, client = await asyncio.get_running_loop().create_connection(ShardClient, "127.0.0.1", port)
        _, payload = await client.answer
        [digest] = [held.digest for held in remote.decode(remote.Kind.HOLDINGS, payload).held if held.current]
        found += [await client.ask(shard, digest, query) for query in bench.queries[:requests]]
        client.transport.abort()
    return np.array(found)


# Nodes of g share the processors, and what they wait for is mostly those: of queues and hedges that tells little. A
# node of h is busy for a time that is drawn from a log-normal distribution, and asleep.
MEDIAN_S, SIGMA, MOST_S = 0.008, 0.6, 0.1
SLEEPING = f"""
import math, random, time
from vecsvc.shard import Shard
drawn, search = random.Random(), Shard.search
def asleep(*arguments, **named):
    time.sleep(min({MOST_S}, drawn.lognormvariate(math.log({MEDIAN_S}), {SIGMA})))
    return search(*arguments, **named)
Shard.search = asleep
"""


def measured(bench: Bench) -> None:
    with cluster(bench.folder.path.parent, bench.shards, bench.replicas, proxied=False) as made:
        run(closed_loop(made.ports, bench.requests, bench.seconds / 2, clients=CLIENTS))  # warm
        peak = run(closed_loop(made.ports, bench.requests, bench.seconds, clients=CLIENTS)).count() / bench.seconds
        loads(bench, made, "g", bench.requests, peak, os.cpu_count())


def asleep(bench: Bench) -> None:
    requests = bench.requests[:1000]
    with cluster(bench.folder.path.parent, bench.shards, bench.replicas, proxied=False, first=SLEEPING) as made:
        run(closed_loop(made.ports, requests, bench.seconds, clients=1))  # warm
        peak = bench.replicas / float(run(_service_s(bench, made, requests=200))[:, 1].mean())
        loads(bench, made, "h", requests, peak, None)


def loads(bench: Bench, made: Cluster, part: str, requests: list[bytes], peak: float, cores: int | None) -> None:
    """What shards take when nothing waits, and queries at shares of the peak, beside each other in one file.

    Of nodes that share `cores` a call takes all that it takes; of others a thread is busy with the search alone.
    """
    runs, lines = [], []
    service = run(_service_s(bench, made, requests=len(requests)))[:, 0 if cores else 1] * 1e3
    alone = float(np.median(run(_alone(made.ports[0], requests)))) * 1e3
    slowest = np.random.default_rng(1).choice(service, (10_000, bench.shards)).max(axis=1)
    for share in bench.rates:
        rate = share * peak
        tally = run(open_loop(made.ports, requests, rate, bench.seconds * 2, check=whole))
        tally.tell()
        lines.append([f"{share:.0%} of peak, {rate:.0f}/s", tally.total, tally.failed, tally.ms(50), tally.ms(99)])
        runs.append(
            {
                "what": f"{bench.shards} x {bench.replicas}{' asleep' if cores is None else ''}, {share:.0%} of peak",
                "shards": bench.shards,
                "replicas": bench.replicas,
                "rate_qps": tally.total / (bench.seconds * 2),
                "service_ms": service.tolist(),
                "latency_ms": [seconds * 1e3 for seconds in tally.seconds.get("200", [])],
                "threads": 1,
                "cores": cores,
                "overhead_ms": max(0.0, alone - float(np.median(slowest))),
            }
        )
    table(f"{part}: open loop, peak {peak:.0f} queries/s", ["", "requests", "failed", "p50 ms", "p99 ms"], lines)
    print(f"a shard call alone: p50 {np.median(service):.3f} ms, p99 {np.percentile(service, 99):.3f} ms")
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"cluster-for-capacity{'-asleep' if cores is None else ''}.json"
    path.write_text(json.dumps(runs))
    print(f"for benchmarks/capacity.py --check: {path}")
    bench.figures[part] = {"peak_qps": peak, "runs": [{n: v for n, v in r.items() if "_ms" not in n} for r in runs]}


def main() -> None:
    arguments = parser("A front door and its nodes on one machine")
    arguments.add_argument("--parts", default="abcdefgh", help="which of a to h")
    arguments.add_argument("--shards", type=int, default=4)
    arguments.add_argument("--replicas", type=int, default=2)
    arguments.add_argument("--seconds", type=float, default=8.0, help="unit of time of the loads")
    arguments.add_argument("--restarts", type=int, default=20, help="rounds of e")
    arguments.add_argument(
        "--rates", type=float, nargs="+", default=[0.2, 0.5, 0.7], help="shares of the peak, for g and h"
    )
    arguments.add_argument("--rows", type=int, help="only so many vectors")
    read = arguments.parse_args()
    task = load_task(read.data)
    if read.rows:
        task = Task(task.name, task.base[: read.rows], task.queries[: min(200, read.rows)], task.bounds)
    with work_folder(read.work) as work:
        bench = Bench(read, task, work)
        print(f"task {task.name}: {task.base.shape}, nng, {read.shards} shards x {read.replicas} replicas")
        if "a" in read.parts:
            cost(bench)
        steps = {"b": killed, "c": slowed, "d": gone, "e": restarted, "f": rolled}
        if set(steps) & set(read.parts):
            with cluster(bench.folder.path.parent, bench.shards, bench.replicas, doors=2) as made:
                run(closed_loop(made.ports, bench.requests, bench.seconds / 2, clients=CLIENTS))  # warm
                for part, step in steps.items():
                    if part in read.parts:
                        step(bench, made)
        if "g" in read.parts:
            measured(bench)
        if "h" in read.parts:
            asleep(bench)
    save("cluster", {"task": task.name, "shards": read.shards, "replicas": read.replicas, **bench.figures})


if __name__ == "__main__":
    main()
