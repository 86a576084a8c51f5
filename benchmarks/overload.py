"""What one node does when it is asked for several times what it can answer: goodput, refusals, memory, and afterwards.

python benchmarks/overload.py --data DIR --seconds 15       # the figures
python benchmarks/overload.py --data DIR --apart            # the node on one core, what asks it on another
python benchmarks/overload.py                               # a look whether it runs

On two cores the load that is too much for a node takes one of them from it, and the share of the peak that is left is
then not the node's doing; `--apart` measures the peak, too, on one core.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from common import K, Task, load_task, parser, save, table, vecsvc, work_folder, write_corpus
from load import Tally, Wire, closed_loop, open_loop, post, run
from nodes import Place

from vecsvc.encoders import DEFAULT

BATCH = 50
WINDOW_S = 0.5
NORMAL = 2.0  # a median of at most so many times the one before counts as normal
WORDS = ["river", "mountain", "cloud", "water", "fire", "stone", "bread", "music", "house", "tree", "cat", "letter"]


def texts(n: int, seed: int) -> list[str]:
    chance = np.random.default_rng(seed)
    return [" ".join(chance.choice(WORDS, 8)) + f" {seed}-{i}" for i in range(n)]


def build(task: Task, work: Path, n_texts: int, encoder: str) -> Path:
    """An index of vectors, and one of texts."""
    told = hashlib.sha256(encoder.encode()).hexdigest()[:8]
    out = work / f"overload-{len(task.base)}-{n_texts}-{told}"
    if not (out / "texts" / "CURRENT").exists():
        flags = ["--out", str(out), "--certificate-queries", "0", "--kind"]
        source = write_corpus(task.base, work / "overload.parquet")
        quiet: dict[str, Any] = {"check": True, "stdout": subprocess.DEVNULL}
        subprocess.run(
            vecsvc("build-index", str(source), *flags, "nng", "--name", "vectors", "--metric", "ip"), **quiet
        )
        pq.write_table(pa.table({"id": list(range(n_texts)), "text": texts(n_texts, 1)}), source)
        more = ["--name", "texts", "--encoder", encoder]
        subprocess.run(vecsvc("build-index", str(source), *flags, "nng", *more), **quiet)
        source.unlink()
    return out


def questions(task: Task) -> dict[str, list[bytes]]:
    """Requests of each sort; no text comes twice in a row, and nothing is remembered of them."""
    rows = task.queries.astype("<f4")
    tiled = np.concatenate([rows] * (1 + 20 * BATCH // len(rows)))
    batches = [tiled[i * BATCH : (i + 1) * BATCH] for i in range(20)]
    binary = "application/octet-stream"
    return {
        "texts": [post("/indexes/texts/search", json.dumps({"text": one, "k": K}).encode()) for one in texts(5000, 2)],
        f"batches of {BATCH}": [post(f"/indexes/vectors/search/batch?k={K}", b.tobytes(), binary) for b in batches],
        "vectors": [
            post("/indexes/vectors/search", json.dumps({"vector": row.tolist(), "k": K}).encode()) for row in rows
        ],
    }


class Memory:
    """The most memory that a node took while this block ran."""

    def __init__(self, node: Place) -> None:
        self._node, self._stop = node, threading.Event()
        self.before = self.most = node.rss_bytes()

    def __enter__(self) -> Memory:
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.1):
            self.most = max(self.most, self._node.rss_bytes())


def peak(port: int, requests: list[bytes], seconds: float) -> float:
    """Requests answered a second at best, by as many clients as it takes."""
    best = 0.0
    for clients in (4, 16, 48):
        tally = run(closed_loop([port], requests, seconds, clients=clients))
        best = max(best, tally.count() / seconds)
    return best


async def normal_again(port: int, requests: list[bytes], rate: float, p50_ms: float) -> tuple[float, Tally]:
    """Seconds until a window had no failure and a normal median; and all that was asked meanwhile."""
    began = time.perf_counter()
    kept: list[Wire] = []
    everything = Tally()
    for number in range(int(30 / WINDOW_S)):
        tally = await open_loop([port], requests, rate, WINDOW_S, kept=kept, seed=number)
        everything.reasons += tally.reasons
        if tally.total and not tally.failed and tally.ms(50) <= NORMAL * p50_ms:
            break
    for wire in kept:
        wire.close()
    return time.perf_counter() - began - WINDOW_S, everything


def overload(node: Place, name: str, requests: list[bytes], factor: float, seconds: float) -> dict[str, Any]:
    port = node.port
    best = peak(port, requests, max(1.0, seconds / 5))
    calm = run(open_loop([port], requests, 0.3 * best, max(1.0, seconds / 3)))
    run(open_loop([port], requests, factor * best, max(1.0, seconds / 5), seed=1))  # so that memory is warm
    with Memory(node) as memory:
        tally = run(open_loop([port], requests, factor * best, seconds))
    back_s, after = run(normal_again(port, requests, 0.3 * best, calm.ms(50)))
    good = tally.within(seconds) / seconds
    print(f"  {name} at {factor:g} x: {tally.counts()}; afterwards {dict(after.reasons) or 'no failure'}", flush=True)
    tally.tell()
    return {
        "load": f"{name}, {factor:g} x",
        "peak": best,
        "asked": tally.total / seconds,
        "late_ms": tally.late_ms(99),
        "goodput": good,
        "share": good / best,
        "answered_ms": [tally.ms(50), tally.ms(99)],
        "refused_ms": [tally.wire_ms(p, "429") for p in (50, 99, 100)] if tally.count("429") else None,
        "others": {outcome: n for outcome, n in tally.counts().items() if outcome not in ("200", "429")},
        "rss_mb": [memory.before / 1e6, memory.most / 1e6],
        "normal_after_s": max(0.0, back_s),
    }


def report(found: list[dict[str, Any]]) -> None:
    lines = []
    for one in found:
        refused = one["refused_ms"] or [float("nan")] * 3
        lines.append(
            [
                one["load"],
                one["peak"],
                one["asked"],
                one["late_ms"],
                one["goodput"],
                f"{one['share']:.0%}",
                *one["answered_ms"],
                *refused[:2],
                one["rss_mb"][1] - one["rss_mb"][0],
                one["normal_after_s"],
            ]
        )
    head = ["", "peak/s", "asked/s", "sent late, p99 ms", "good/s", "of peak", "p50 ms", "p99 ms"]
    table("overload, open loop", [*head, "429 p50", "429 p99", "RSS + MB", "normal after s"], lines)
    for one in found:
        if not one["load"].startswith("vectors"):
            refused = one["refused_ms"] or [0.0, 0.0, 0.0]
            for what, met in (
                (f"goodput {one['share']:.0%} of the peak, target 80 %", one["share"] >= 0.8),
                (f"99 % of refusals within {refused[1]:.1f} ms, target 10", refused[1] <= 10),
                (f"normal after {one['normal_after_s']:.1f} s, target 5", one["normal_after_s"] <= 5),
                ("nothing but answers, refusals and deadlines", set(one["others"]) <= {"504"}),
                (f"asked on time: sent at most {one['late_ms']:.1f} ms late at p99", one["late_ms"] <= 10),
            ):
                print(f"{one['load']}: {what}: {'met' if met else 'MISSED'}")


@contextlib.contextmanager
def on_cores(some: set[int] | None) -> Iterator[None]:
    """This process, and those that it starts meanwhile, keep to these cores; None for all that it had."""
    before = os.sched_getaffinity(0)
    if some is not None:
        os.sched_setaffinity(0, some)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextlib.contextmanager
def serving(directory: Path, *flags: str) -> Iterator[Place]:
    with tempfile.TemporaryDirectory() as logs:
        node = Place(["serve", str(directory), "--encoder-cache", "0", "--log", "none", *flags], Path(logs) / "log")
        try:
            node.start()
            node.wait("ready")
            yield node
        finally:
            node.stop()


def main() -> None:
    arguments = parser("One node under several times the load that it can take")
    arguments.add_argument("--seconds", type=float, default=2.0, help="how long each overload lasts")
    arguments.add_argument("--texts", type=int, default=2000, help="texts in the index of texts")
    arguments.add_argument("--encoder", default=DEFAULT, help="a folder; the one that comes with the package without")
    arguments.add_argument("--rows", type=int, help="only so many vectors")
    arguments.add_argument("--apart", action="store_true", help="the node on one core, what asks it on another")
    arguments.add_argument("--serve", nargs="*", default=[], help="more flags of vecsvc serve, without their dashes")
    read = arguments.parse_args()
    task = load_task(read.data)
    if read.rows:
        task = Task(task.name, task.base[: read.rows], task.queries, task.bounds)
    with work_folder(read.work) as work:
        directory = build(task, work, read.texts, read.encoder)
        asked = questions(task)
        found = []
        node_core, own_core = [{core} for core in sorted(os.sched_getaffinity(0))[:2]] if read.apart else (None, None)
        with contextlib.ExitStack() as stack:
            with on_cores(node_core):
                node = stack.enter_context(serving(directory, *(f"--{flag}" for flag in read.serve)))
            stack.enter_context(on_cores(own_core))
            for name, requests in asked.items():
                for factor in (1.5, 2.0) if name == "vectors" else (5.0,):
                    found.append(overload(node, name, requests, factor, read.seconds))
    report(found)
    how = {"serve": read.serve, "apart": read.apart, "encoder": read.encoder}
    save("overload", {"task": task.name, **how, "loads": found})


if __name__ == "__main__":
    main()
