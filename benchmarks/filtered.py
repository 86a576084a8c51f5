"""Where comparing the allowed rows overtakes walking a graph with a filter: it sets shard.EXACT_ROOTS."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from common import K, load_task, parser, save, table, work_folder
from serving import build

from vecsvc import indexes
from vecsvc.catalog import Served
from vecsvc.config import ServeSettings
from vecsvc.exact_search import ExactSearch

SHARES = (0.5, 0.25, 0.1, 0.05, 0.02, 0.01)
QUERIES = 100
EF_SEARCH = 64


def median_ms(search: Callable[[np.ndarray], object], queries: np.ndarray) -> float:
    times = []
    for query in queries:
        started = time.perf_counter()
        search(query[None])
        times.append(time.perf_counter() - started)
    return float(np.median(times)) * 1e3


def main() -> None:
    given = parser("Exact search or a filtered walk").parse_args()
    task = load_task(given.data)
    rng = np.random.default_rng(7)
    rows = []
    with work_folder(given.work) as work:
        folder = build(task, work)
        served = Served(folder, str(folder.current()), ServeSettings())
        index, exact = served.shards[0].index, ExactSearch(served.shards[0].vectors, "ip")
        params = indexes.search_params("hnsw", ef_search=EF_SEARCH)
        for share in SHARES:
            mask = rng.random(len(task.base)) < share
            queries = task.queries[:QUERIES]
            walk = median_ms(lambda q, m=mask: index.search(q, K, params, allowed=m), queries)  # type: ignore[misc]
            scan = median_ms(lambda q, m=mask: exact.search(q, K, allowed=m), queries)  # type: ignore[misc]
            found, truth = index.search(queries, K, params, allowed=mask), exact.search(queries, K, allowed=mask)
            recall = float(np.mean(found.distances <= truth.distances[:, -1:] + 1e-5))
            rows.append([f"{share:.0%}", int(mask.sum()), walk, recall, scan])
    head = ["allowed", "rows", "walk ms", "walk recall", "exact ms"]
    table(f"one filtered query, hnsw ef_search {EF_SEARCH}, {task.base.shape[0]:,} x {task.base.shape[1]}", head, rows)
    save("filtered", {"task": task.name, "rows": rows})


if __name__ == "__main__":
    main()
