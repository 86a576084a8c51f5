"""Measures faiss' presets: what a recall of .95 costs in time and bytes, one query at a time on one thread."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import K, Task, load_task, parser, save, table, work_folder

import index_builders
from index_builders.base import operating_points
from index_builders.faiss_index import PRESETS
from vecsvc import indexes
from vecsvc.errors import InvalidParameter
from vecsvc.types import METRICS

RUNS = 3
TARGET = 0.95


def measure(index: Any, params: Any, task: Task, count: int) -> tuple[float, float]:
    """(recall, queries a second): the median of RUNS passes over `count` queries, asked one by one."""
    passes, labels = [], np.empty((count, K), dtype=np.int64)
    for _ in range(RUNS):
        started = time.perf_counter()
        for i in range(count):
            labels[i] = index.search(task.queries[i : i + 1], K, params).labels
        passes.append(count / (time.perf_counter() - started))
    queries, bounds = task.queries, task.bounds
    task.queries, task.bounds = queries[:count], bounds[:count]
    try:
        return task.recall(labels), float(np.median(passes))
    finally:
        task.queries, task.bounds = queries, bounds


def preset_row(name: str, task: Task, metric: Any, count: int, folder: Path) -> dict[str, Any]:
    """Everything about one preset: the two settings on either side of TARGET, and what it costs to build and keep."""
    started = time.perf_counter()
    index = index_builders.build(task.base, kind="faiss", metric=metric, params={"preset": name}, num_threads=1)
    build_s = time.perf_counter() - started
    index.save(folder)
    size = sum(file.stat().st_size for file in folder.iterdir()) / len(task.base)
    points = []
    for point in operating_points(index.spec):
        recall, qps = measure(index, indexes.search_params("faiss", **point), task, count)
        points.append({"params": point, "recall": recall, "qps": qps})
        if recall >= TARGET + 0.015:
            break
    return {"preset": name, "params": dict(index.spec.params), "build_s": build_s, "bytes": size, "points": points[-2:]}


def main(arguments: list[str] | None = None) -> None:
    flags: argparse.ArgumentParser = parser(__doc__ or "")
    flags.add_argument("--metric", default="ip", choices=METRICS)
    flags.add_argument("--queries", type=int, default=1000)
    flags.add_argument("presets", nargs="*", default=list(PRESETS), help="all of them by default")
    given = flags.parse_args(arguments)
    task = load_task(given.data)
    rows = []
    for name in given.presets:
        with work_folder(None) as folder:
            try:
                row = preset_row(name, task, given.metric, min(given.queries, len(task.queries)), folder)
            except InvalidParameter as error:
                print(f"{name}: {error}", file=sys.stderr)
                continue
        rows.append(row)
        print(f"{name} done", file=sys.stderr)
    shown = []
    for r in rows:
        rates = " · ".join(f"{p['qps']:,.0f} @ {p['recall']:.3f} {p['params'] or ''}" for p in r["points"])
        shown.append([r["preset"], r["params"]["factory"], r["build_s"], round(r["bytes"]), rates])
    head = ["preset", "factory", "build s", "bytes a vector", "queries a second @ recall@10"]
    table(f"faiss presets, {task.name}, {len(task.base):,} x {task.base.shape[1]}, {given.metric}", head, shown)
    save("faiss_presets", {"metric": given.metric, "presets": rows})


if __name__ == "__main__":
    main()
