"""The check to run where there is a GPU: the same answers as on the CPU, and what the GPU buys.

    python benchmarks/gpu.py --data DIR [--metric l2]
    python benchmarks/gpu.py --cpu          # no GPU: runs the script itself, small, everything on the CPU

Each preset of faiss with a form for the GPU is built and searched on both, and nng with lists from either; recall@10
may differ by TOLERATED. Then `gpu_neighbours` is compared with exact search on a sample of rows. Exits with 1 where a
check fails. Vectors are of unit length, for which all metrics have the same neighbours.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import faiss
import numpy as np
from common import K, Task, load_task, parser, save, table, work_folder

import index_builders
from index_builders.gpu_lists import gpu_neighbours
from vecsvc import indexes
from vecsvc.exact_search import ExactSearch
from vecsvc.types import METRICS, Metric

# (kind, build parameters, search settings)
BUILDS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "flat": ("faiss", {"preset": "flat"}, {}),
    "ivf-flat": ("faiss", {"preset": "ivf-flat"}, {"nprobe": 64}),
    "ivf-sq8": ("faiss", {"preset": "ivf-sq8"}, {"nprobe": 64}),
    "ivf-pq": ("faiss", {"preset": "ivf-pq"}, {"nprobe": 64}),
    "nng": ("nng", {}, {"ef_search": 64}),
}
BATCHES = (1, 100, 10_000)
TOLERATED = 0.002
LIST_K, LIST_SAMPLE, LIST_FLOOR = 32, 500, 0.999
SECONDS = 2.0  # that a rate is measured for, at least; once where one batch takes longer
SMALL = 3000  # rows and queries with --cpu


def has_gpu() -> bool:
    """faiss-cpu knows the question too, and says 0."""
    return hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0


def rate(index: Any, queries: np.ndarray, params: Any, batch: int, seconds: float) -> float:
    """Queries a second in batches of `batch`, repeated where there are fewer; the first call is not timed."""
    block = np.ascontiguousarray(np.resize(queries, (max(batch, 100), queries.shape[1])))
    index.search(block[:batch], K, params)
    done, started = 0, time.perf_counter()
    while done == 0 or time.perf_counter() - started < seconds:
        first = done % (len(block) - batch + 1)
        index.search(block[first : first + batch], K, params)
        done += batch
    return done / (time.perf_counter() - started)


def measured(
    name: str, task: Task, metric: Metric, device: str, batches: tuple[int, ...], seconds: float
) -> dict[str, Any]:
    """One index built and opened on `device`: recall@10, build seconds and rates."""
    kind, params, settings = BUILDS[name]
    started = time.perf_counter()
    built = index_builders.build(task.base, kind=kind, metric=metric, params={**params, "device": device})
    build_s = time.perf_counter() - started
    with work_folder(None) as folder:
        built.save(folder)
        index = indexes.load(folder, built.spec, vectors=task.base, device=device)
        asked = indexes.search_params(kind, **settings)
        recall = task.recall(index.search(task.queries, K, asked).labels)
        rates = {str(batch): rate(index, task.queries, asked, batch, seconds) for batch in batches}
    return {
        "index": name,
        "built as": built.spec.params.get("factory", kind),
        "device": device,
        "recall": recall,
        "build_s": build_s,
        "qps": rates,
    }


def lists(task: Task, metric: Metric, device: str) -> dict[str, Any]:
    """Seconds of all rows' neighbour lists, and the share of a sample's that exact search finds as near."""
    started = time.perf_counter()
    labels, _ = gpu_neighbours(task.base, LIST_K, metric, device=device)
    seconds = time.perf_counter() - started
    rows = np.sort(np.random.default_rng(7).choice(len(task.base), min(LIST_SAMPLE, len(task.base)), replace=False))
    truth = ExactSearch(task.base, "ip").search(task.base[rows], LIST_K + 1)
    hits = 0
    for row, names, distances in zip(rows, truth.labels, truth.distances, strict=True):
        bound = distances[names != row][:LIST_K].max() + 1e-5
        hits += int(np.sum(1.0 - task.base[labels[row]] @ task.base[row] <= bound))
    return {"device": device, "seconds": seconds, "recall": hits / (len(rows) * LIST_K)}


def main(arguments: list[str] | None = None) -> int:
    flags = parser(__doc__ or "")
    flags.add_argument("--metric", choices=METRICS, default="ip")
    flags.add_argument("--cpu", action="store_true", help="run the script on the CPU, small: a test of itself")
    given = flags.parse_args(arguments)
    if not given.cpu and not has_gpu():
        print("no GPU that faiss can use: nothing was measured (--cpu tries the script itself)")
        return 0
    task, batches, seconds, other = load_task(given.data), BATCHES, SECONDS, "cuda"
    if given.cpu:
        bounds = ExactSearch(task.base[:SMALL], "ip").search(task.queries[:100], K).distances[:, -1]
        task = Task(f"{task.name}, small", task.base[:SMALL], task.queries[:100], bounds)
        batches, seconds, other = (1, 100, 1000), 0.0, "cpu"
    print(f"{task.name}: {len(task.base):,} x {task.base.shape[1]}; cpu against {other}")
    rows, failures = [], []
    for name in BUILDS:
        pair = [measured(name, task, given.metric, device, batches, seconds) for device in ("cpu", other)]
        rows += pair
        if abs(pair[0]["recall"] - pair[1]["recall"]) > TOLERATED:
            failures.append(f"{name}: recall {pair[0]['recall']:.4f} on the CPU, {pair[1]['recall']:.4f} on {other}")
    shown = [[r["index"], r["built as"], r["device"], r["recall"], r["build_s"], *r["qps"].values()] for r in rows]
    head = ["index", "built as", "device", "recall@10", "build s", *(f"QPS by {batch:,}" for batch in batches)]
    table(f"indexes, {given.metric}", head, shown)
    graph = [lists(task, given.metric, device) for device in ("cpu", other)]
    failures += [f"lists: recall {g['recall']:.4f} on {g['device']}" for g in graph if g["recall"] < LIST_FLOOR]
    table(f"{LIST_K} neighbours of every row", ["device", "seconds", "recall"], [list(g.values()) for g in graph])
    if not given.cpu:  # figures of a trial would look like a measurement
        save("gpu", {"task": task.name, "metric": given.metric, "indexes": rows, "lists": graph, "failures": failures})
    print("\n".join(f"FAILED {failure}" for failure in failures) or "every check passed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
