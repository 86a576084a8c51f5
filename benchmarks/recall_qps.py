"""Recall against queries a second, of every kind of vecsvc and of the libraries beside it, in one run.

    python benchmarks/recall_qps.py --data DIR
    python benchmarks/recall_qps.py --data mixture:1000000 --systems "vecsvc hnsw,hnswlib M16"

How it counts: recall from the returned labels, with distances recomputed from the raw vectors. A first pass
measures each system's curve once and adds points until those around a recall lie close together. Then rounds
alternate: each measures every system's points around .90, .95 and .99 once (and for a moment the others, for the
plot), so that a slow minute of the machine hits everybody. "QPS at recall r" is interpolated between the two
points around r on a log scale, never extrapolated; ratios are taken within a round, and medians over the rounds
are reported. Every system runs in a process of its own; QPS, build time and bytes are those of one and the same
index. "peak" is the memory of the build above what the imports took, the vectors included. Under cosine the
libraries get unit vectors, made before the clock starts, while vecsvc is asked as its users ask it.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from common import RESULTS, machine, save, table, work_folder
from datasets import DataError, Dataset
from peers import systems
from peers.base import Point, System, between
from peers.kinds import SEED
from peers.worker import Worker, WorkerFailedError

TARGETS = (0.90, 0.95, 0.99)
CLOSE = 0.03  # two points around a recall may lie so far apart, and no farther
AIM = 0.015  # what the first pass tries for
ENOUGH = 0.998  # beyond this recall no further points are measured
REFERENCE = ("hnswlib M16", "hnswlib M32")
MAX_EXTRA = 6  # points added around one recall
SHOWN = 0.80  # points below this recall are not in the plot, and cost no time after the first pass
MIN_BATCH = 100  # queries of a batch, where a system is so slow that all would take too long
SWEEP_S, ROUND_S, SHORT_S, LIMIT_S = 10.0, 2.0, 0.25, 3600.0


@dataclass
class Measured:
    """One point of a curve, and what the rounds found there; lists have an entry a round."""

    params: Point
    recall: float
    batch_recall: float
    rows: int  # queries it was asked: all, but for very slow systems
    qps: list[float] = field(default_factory=list)
    p50_ms: list[float] = field(default_factory=list)
    p99_ms: list[float] = field(default_factory=list)
    batch_qps: list[float] = field(default_factory=list)


@dataclass
class Entrant:
    system: System
    worker: Worker
    built: dict[str, Any]
    curve: list[Measured] = field(default_factory=list)


# ------------------------------------------------------------------------------------- rules of counting


def bracket(recalls: Sequence[float], target: float) -> tuple[int, int] | None:
    """The first two neighbouring points of a curve with the target between them; None where there are none."""
    for i in range(len(recalls) - 1):
        if recalls[i] <= target <= recalls[i + 1]:
            return i, i + 1
    return None


def at_recall(recalls: Sequence[float], values: Sequence[float], target: float) -> float | None:
    """The value at a recall, on a log scale between the points around it; None where they lie too far apart."""
    pair = bracket(recalls, target)
    if pair is None:
        return None
    low, high = pair
    apart = recalls[high] - recalls[low]
    if apart > CLOSE + 1e-9 or not (values[low] > 0 and values[high] > 0):
        return None
    weight = 0.0 if apart == 0 else (target - recalls[low]) / apart
    return math.exp((1 - weight) * math.log(values[low]) + weight * math.log(values[high]))


def refined(points: Sequence[Point], measure: Callable[[Point], Measured]) -> list[Measured]:
    """The curve through the coarse points, with more of them where a recall to be read lies in a wide gap."""
    curve: list[Measured] = []
    for point in points:
        curve.append(measure(point))
        if curve[-1].recall >= ENOUGH:
            break
    for target in TARGETS:
        for _ in range(MAX_EXTRA):
            pair = bracket([m.recall for m in curve], target)
            if pair is None or curve[pair[1]].recall - curve[pair[0]].recall <= AIM:
                break
            middle = between(curve[pair[0]].params, curve[pair[1]].params)
            if middle is None:
                break
            curve.insert(pair[1], measure(middle))
    return curve


def chosen_points(curve: list[Measured]) -> list[Measured]:
    """The points that the rounds measure in full: those around a target, for one query and for batches."""
    chosen: list[int] = []
    for recalls in ([m.recall for m in curve], [m.batch_recall for m in curve]):
        for target in TARGETS:
            chosen += bracket(recalls, target) or ()
    # Without a knob there is nothing to interpolate, and its one point is worth knowing.
    return [curve[i] for i in sorted(set(chosen) or {len(curve) - 1})]


def per_round(curve: list[Measured], what: str, target: float) -> list[float]:
    """The interpolated value in each round; empty where the curve does not have it."""
    # Of neighbours in the whole curve that have the target between them, both are timed in full.
    timed = [m for m in curve if m.batch_qps]
    recalls = [m.batch_recall if what == "batch_qps" else m.recall for m in timed]
    rounds = len(timed[0].qps) if timed else 0
    values = [at_recall(recalls, [getattr(m, what)[i] for m in timed], target) for i in range(rounds)]
    return [value for value in values if value is not None]


def summary(entrants: list[Entrant]) -> dict[str, dict[str, Any]]:
    """By system and recall: values a round, their medians, and the median of the ratios to the better hnswlib."""
    found: dict[str, dict[str, Any]] = {}
    for entrant in entrants:
        found[entrant.system.name] = {
            f"{target:.2f}": {
                what: per_round(entrant.curve, what, target) for what in ("qps", "batch_qps", "p50_ms", "p99_ms")
            }
            for target in TARGETS
        }
    for at in (f"{target:.2f}" for target in TARGETS):
        for what in ("qps", "batch_qps"):
            peers = [found[name][at][what] for name in REFERENCE if name in found and found[name][at][what]]
            best = [max(values) for values in zip(*peers, strict=True)]
            for figures in found.values():
                own = figures[at][what]
                ratios = [value / other for value, other in zip(own, best, strict=True)] if own and best else []
                figures[at][f"{what}_x_hnswlib"] = ratios
    for figures in found.values():
        for values in figures.values():
            values["median"] = {what: statistics.median(v) if v else None for what, v in values.items()}
    return found


# ---------------------------------------------------------------------------------------------- measuring


def enter(system: System, folder: Path, data: Dataset, threads: int) -> Entrant:
    """Build the system and measure its curve once. Raises WorkerFailedError."""
    worker = Worker(system, folder, data.metric, data.k, threads, LIMIT_S)
    try:
        entrant = Entrant(system, worker, worker.call("build"))

        def measure(point: Point) -> Measured:
            labels = worker.call("labels", point, SWEEP_S)
            found = worker.call("batch_labels", point, len(labels))
            rows = len(labels)
            return Measured(dict(point), data.recall(labels), data.recall(found), rows)

        entrant.curve = refined(entrant.built["points"], measure)
    except BaseException:
        worker.close()
        raise
    print(f"  {system.name}: built in {entrant.built['build_s']:.1f} s, {len(entrant.curve)} points", flush=True)
    return entrant


def measure_round(entrants: list[Entrant], failed: dict[str, str]) -> None:
    for entrant in list(entrants):
        try:
            chosen = {id(point) for point in chosen_points(entrant.curve)}
            for point in entrant.curve:
                full = id(point) in chosen
                if not full and point.recall < SHOWN:
                    continue
                times = np.array(entrant.worker.call("single", point.params, ROUND_S if full else SHORT_S))
                point.qps.append(len(times) / float(times.sum()))
                point.p50_ms.append(float(np.median(times)) * 1e3)
                point.p99_ms.append(float(np.percentile(times, 99)) * 1e3)
                if full:
                    rows = min(point.rows, max(MIN_BATCH, int(ROUND_S * point.qps[-1])))
                    point.batch_qps.append(entrant.worker.call("batch", point.params, rows))
        except WorkerFailedError as error:
            failed[entrant.system.name] = str(error)
            entrants.remove(entrant)
            entrant.worker.close()


def run(data: Dataset, chosen: list[System], folder: Path, threads: int, rounds: int) -> dict[str, Any]:
    """Every figure of the run, as it goes into the JSON file."""
    np.save(folder / "base.npy", data.base)
    np.save(folder / "queries.npy", data.queries)
    missing = [system.name for system in chosen if system.version() is None]
    failed: dict[str, str] = {}
    entrants: list[Entrant] = []
    try:
        for system in chosen:
            if system.name in missing:
                continue
            try:
                entrants.append(enter(system, folder, data, threads))
            except WorkerFailedError as error:
                failed[system.name] = str(error)
        for number in range(rounds):
            measure_round(entrants, failed)
            print(f"  round {number + 1} of {rounds}", flush=True)
    finally:
        for entrant in entrants:
            entrant.worker.close()
    at = summary(entrants)
    n, dim = data.base.shape
    return {
        "task": {"name": data.name, "rows": n, "dim": dim, "queries": len(data.queries)},
        "metric": data.metric,
        "k": data.k,
        "threads": threads,
        "rounds": rounds,
        "seed": SEED,
        "not_installed": missing,
        "failed": failed,
        "systems": [
            {
                "name": entrant.system.name,
                "ours": entrant.system.ours,
                "version": entrant.system.version(),
                "params": dict(entrant.system.params),
                "note": entrant.system.note,
                "build_s": entrant.built["build_s"],
                "peak_bytes": entrant.built["peak_bytes"],
                "bytes_per_vector": entrant.built["index_bytes"] / n,
                "vectors_bytes_per_vector": entrant.built["vectors_bytes"] / n,
                "at": at[entrant.system.name],
                "points": [vars(point) for point in entrant.curve],
            }
            for entrant in entrants
        ],
    }


# ---------------------------------------------------------------------------------------------- reporting


def report(figures: dict[str, Any]) -> None:
    task, threads = figures["task"], figures["threads"]
    head = ["", "build s", "peak MB", "bytes/vector", *(f"QPS .{t * 100:.0f}" for t in TARGETS)]
    head += ["x .95", "x .99", "p99 ms .95", "batch .95", "batch .99"]
    rows = []
    for system in figures["systems"]:
        middle = {at: values["median"] for at, values in system["at"].items()}
        weight = f"{system['bytes_per_vector']:,.0f}"
        if system["vectors_bytes_per_vector"]:
            weight += f" + {system['vectors_bytes_per_vector']:,.0f}"
        row = [system["name"], f"{system['build_s']:,.1f}", f"{system['peak_bytes'] / 1e6:,.0f}", weight]
        row += [shown(middle[f"{t:.2f}"]["qps"], 0) for t in TARGETS]
        row += [shown(middle[at]["qps_x_hnswlib"], 2) for at in ("0.95", "0.99")]
        row += [shown(middle["0.95"]["p99_ms"], 3)]
        row += [shown(middle[at]["batch_qps"], 0) for at in ("0.95", "0.99")]
        rows.append(row)
    table(
        f"{task['name']}, {task['rows']:,} x {task['dim']}, {figures['metric']}, recall@{figures['k']}: one query at a "
        f"time on one thread; build and batch on {threads} threads; medians of {figures['rounds']} alternating rounds",
        head,
        rows,
    )
    print(
        "\nx: to the better of hnswlib M16 and M32 in the same round. a + b bytes: index, and the vectors it reranks."
    )
    for system in figures["systems"]:
        timed = [point for point in system["points"] if point["qps"]]
        if len(system["points"]) == 1 and timed:
            print(f"{system['name']}: {statistics.median(timed[0]['qps']):,.1f} QPS at recall {timed[0]['recall']:.4f}")
        if system["note"]:
            print(f"{system['name']}: {system['note']}")
    for name in figures["not_installed"]:
        print(f"{name}: not installed, no claim")
    for name, reason in figures["failed"].items():
        print(f"{name}: failed, no claim: {reason}")


def shown(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def pick(given: argparse.Namespace) -> list[System]:
    known = systems()
    names = [name.strip() for name in given.systems.split(",")] if given.systems else list(known)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise DataError(f"{unknown[0]!r} is no system; known are {', '.join(known)}")
    return [known[name] for name in names if known[name].ours or not given.only_kinds]


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="a folder, a file or mixture:ROWS, as datasets.py says; made-up without")
    parser.add_argument("--task", default="dev", help="of a folder with minilm/: dev or tldr_docs")
    parser.add_argument("--queries", type=Path, help="file of the queries, where --data is a file without them")
    parser.add_argument("--neighbors", type=Path, help="file of the true neighbours, .ivecs or in big-ann's layout")
    parser.add_argument("--metric", choices=datasets.METRICS, help="what the data ask for, else cosine")
    parser.add_argument("--systems", help="names from the table, with commas between; all without")
    parser.add_argument("--only-kinds", action="store_true", help="vecsvc alone")
    parser.add_argument("--limit", type=int, help="so many rows of the base")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="of builds and batches")
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for JSON, PNG and SVG")
    parser.add_argument("--work", type=Path, help="folder for the vectors while it runs; temporary without")
    parser.add_argument("--quick", action="store_true", help="10,000 rows, 500 queries, one round: to see it work")
    given = parser.parse_args(argv)
    if given.quick:
        given.limit, given.rounds = min(given.limit or 10_000, 10_000), 1
    return given


def main(argv: Sequence[str] | None = None) -> None:
    given = arguments(argv)
    try:
        chosen = pick(given)
        data = datasets.load(
            given.data,
            task=given.task,
            queries=given.queries,
            neighbors=given.neighbors,
            metric=given.metric,
            k=given.k,
            limit=given.limit,
            max_queries=500 if given.quick else datasets.MAX_QUERIES,
            cache=RESULTS / "truth",
        )
    except DataError as error:
        sys.exit(f"recall_qps: {error}")
    print(f"{data.name}: {data.base.shape[0]:,} x {data.base.shape[1]}, {len(data.queries):,} queries, {data.metric}")
    with work_folder(given.work) as folder:
        figures = run(data, chosen, folder, given.threads, given.rounds)
    report(figures)
    name = f"recall_qps-{''.join(c if c.isalnum() else '_' for c in data.name)}-{len(data.base)}"
    packages = sorted({system.package for system in chosen})
    path = save(name, figures, folder=given.out, libraries=packages)
    try:
        import plot
    except ImportError as error:
        print(f"no plot: {error.name} is missing: pip install 'vecsvc[bench]'")
    else:
        plot.draw({"machine": machine(packages), **figures}, path)


if __name__ == "__main__":
    main()
