"""What a filter costs: where exact search overtakes hnsw's walk, and what nng finds under masks of every sort.

The first table sets shard.EXACT_ROOTS. The second has the masks that are hard on a graph: those that leave only what
is near the query or near another one, and those that leave only what is far from it, where a walk meets nothing that
is allowed. At the edge of the last vectors lie most densely: the first ten of 79,890 x 384 embeddings differ by 2e-5 at
half of them, far below what 4-bit (7e-3) and 8-bit codes (6e-4) can tell apart. "too far" is by how much the answers
are farther than the true ones on average.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from common import ROUNDING, K, Task, load_task, parser, save, table, work_folder
from numpy.typing import NDArray
from serving import build

import index_builders
from vecsvc import indexes
from vecsvc.catalog import Served
from vecsvc.config import ServeSettings
from vecsvc.exact_search import ExactSearch
from vecsvc.types import Mask, Neighbors

SHARES = (0.5, 0.25, 0.1, 0.05, 0.02, 0.01)
NNG_SHARES = (0.5, 0.3, 0.2, 0.1, 0.01, 0.001)
QUERIES = 100
EF_SEARCH = 64


def median_ms(search: Callable[[np.ndarray], object], queries: np.ndarray) -> float:
    times = []
    for query in queries:
        started = time.perf_counter()
        search(query[None])
        times.append(time.perf_counter() - started)
    return float(np.median(times)) * 1e3


def hnsw_rows(task: Task, served: Served) -> list[list[Any]]:
    """[share, rows allowed, ms of the walk, its recall, ms of exact search], the same random mask for all queries."""
    rng = np.random.default_rng(7)
    rows: list[list[Any]] = []
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
    return rows


# What of the products with the vectors (n, size), one row for each query, a sort of mask lets through first.
MASKS: dict[str, Callable[[NDArray[np.float32], np.random.Generator], NDArray[np.float32]]] = {
    "random": lambda products, rng: rng.random(products.shape, dtype=np.float32),
    "nearest": lambda products, rng: products,
    "nearest to another": lambda products, rng: np.roll(products, len(products) // 2, axis=0),
    "farthest": lambda products, rng: -products,
}


def _only(labels: NDArray[np.int64], size: int) -> Mask:
    mask = np.zeros(size, dtype=np.bool_)
    mask[labels] = True
    return mask


def answers(search: Callable[[np.ndarray, Mask], Neighbors], task: Task, masks: list[Mask]) -> tuple[list[Any], float]:
    """(an answer for each mask, asked with the query of the same place; median ms)."""
    found, times = [], []
    for query, mask in zip(task.queries, masks, strict=False):
        started = time.perf_counter()
        found.append(search(query[None], mask))
        times.append(time.perf_counter() - started)
    return found, float(np.median(times)) * 1e3


def is_complete(found: Neighbors, mask: Mask, wanted: int) -> bool:
    """Whether `wanted` different labels came back, and each of them is allowed."""
    labels = found.labels[0][found.labels[0] >= 0]
    return len(np.unique(labels)) == len(labels) == wanted and bool(mask[labels].all())


def nng_rows(task: Task, index: indexes.Index) -> list[list[Any]]:
    """Each query with a mask of its own; the cells are those of the head in `main`."""
    rng = np.random.default_rng(7)
    exact = ExactSearch(task.base, "ip")
    params = indexes.search_params("nng", ef_search=EF_SEARCH)
    count = min(QUERIES, len(task.queries))
    products = task.queries[:count] @ task.base.T
    rows: list[list[Any]] = []
    for name, scores in MASKS.items():
        order = scores(products, rng)
        for share in NNG_SHARES:
            allowed = max(1, round(share * len(task.base)))
            masks = [_only(np.argpartition(-row, allowed - 1)[:allowed], len(row)) for row in order]
            found, ms = answers(lambda q, m: index.search(q, K, params, allowed=m), task, masks)
            truth, exact_ms = answers(lambda q, m: exact.search(q, K, allowed=m), task, masks)
            wanted = min(K, allowed)
            ours, best = (np.concatenate([x.distances for x in side])[:, :wanted] for side in (found, truth))
            recall = float(np.mean(ours <= best[:, -1:] + ROUNDING))
            # A place that was not filled is infinitely far, and shows.
            too_far = f"{float(np.mean(ours) - np.mean(best)):z.5f}"
            complete = all(is_complete(f, m, wanted) for f, m in zip(found, masks, strict=True))
            visited = float(np.median([f.visited[0] for f in found])) / len(task.base)
            full = "yes" if complete else "NO"
            rows.append([f"{name} {share:.1%}", allowed, recall, too_far, ms, exact_ms, ms / exact_ms, visited, full])
    return rows


def main() -> None:
    given = parser("Exact search or a filtered walk").parse_args()
    task = load_task(given.data)
    what = f"ef_search {EF_SEARCH}, {task.base.shape[0]:,} x {task.base.shape[1]}"
    with work_folder(given.work) as work:
        folder = build(task, "hnsw", work)
        rows = hnsw_rows(task, Served(folder, str(folder.current()), ServeSettings()))
    table(f"one filtered query, hnsw {what}", ["allowed", "rows", "walk ms", "walk recall", "exact ms"], rows)
    nng = nng_rows(task, index_builders.build(task.base, kind="nng", metric="ip"))
    head = ["allowed", "rows", "recall", "too far", "nng ms", "exact ms", "nng / exact", "compared", "all K"]
    table(f"one filtered query, each with its own mask, nng {what}", head, nng)
    save("filtered", {"task": task.name, "rows": rows, "nng": nng})


if __name__ == "__main__":
    main()
