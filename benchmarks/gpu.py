"""The check to run where there is a GPU: the same answers as on the CPU, and what the GPU buys.

    python benchmarks/gpu.py --data DIR
    python benchmarks/gpu.py --cpu          # no GPU: runs the script itself, small, everything on the CPU

Each preset with a form for the GPU is built and searched on both; recall@10 may differ by TOLERATED. Then
`gpu_neighbours` is compared with exact search on a sample of rows. Exits with 1 where a check fails.
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

PRESETS = {"flat": {}, "ivf-flat": {"nprobe": 64}, "ivf-sq8": {"nprobe": 64}, "ivf-pq": {"nprobe": 64}}
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


def preset(name: str, task: Task, device: str, batches: tuple[int, ...], seconds: float) -> dict[str, Any]:
    """One preset built and opened on `device`: recall@10, build seconds and rates."""
    started = time.perf_counter()
    params = {"preset": name, "device": device}
    built = index_builders.build(task.base, kind="faiss", metric="ip", params=params)
    build_s = time.perf_counter() - started
    with work_folder(None) as folder:
        built.save(folder)
        index = indexes.load(folder, built.spec, vectors=task.base, device=device)
        settings = indexes.search_params("faiss", **PRESETS[name])
        recall = task.recall(index.search(task.queries, K, settings).labels)
        rates = {str(batch): rate(index, task.queries, settings, batch, seconds) for batch in batches}
    return {
        "preset": name,
        "factory": built.spec.params["factory"],
        "device": device,
        "recall": recall,
        "build_s": build_s,
        "qps": rates,
    }


def lists(task: Task, device: str) -> dict[str, Any]:
    """Seconds of all rows' neighbour lists, and the share of a sample's that exact search finds as near."""
    started = time.perf_counter()
    labels, _ = gpu_neighbours(task.base, LIST_K, "ip", device=device)
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
    for name in PRESETS:
        pair = [preset(name, task, device, batches, seconds) for device in ("cpu", other)]
        rows += pair
        if abs(pair[0]["recall"] - pair[1]["recall"]) > TOLERATED:
            failures.append(f"{name}: recall {pair[0]['recall']:.4f} on the CPU, {pair[1]['recall']:.4f} on {other}")
    shown = [[r["preset"], r["factory"], r["device"], r["recall"], r["build_s"], *r["qps"].values()] for r in rows]
    head = ["preset", "factory", "device", "recall@10", "build s", *(f"QPS by {batch:,}" for batch in batches)]
    table("presets", head, shown)
    graph = [lists(task, device) for device in ("cpu", other)]
    failures += [f"lists: recall {g['recall']:.4f} on {g['device']}" for g in graph if g["recall"] < LIST_FLOOR]
    table(f"{LIST_K} neighbours of every row", ["device", "seconds", "recall"], [list(g.values()) for g in graph])
    if not given.cpu:  # figures of a trial would look like a measurement
        save("gpu", {"task": task.name, "presets": rows, "lists": graph, "failures": failures})
    print("\n".join(f"FAILED {failure}" for failure in failures) or "every check passed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
