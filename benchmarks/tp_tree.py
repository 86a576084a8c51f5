"""What the papers claim of TP-trees, better than KD-trees and good neighbour lists, and of walks that restart.

A KD-forest is the same code with one axis a node (n_top_dims 1), drawn from as many, so that nothing else differs. A
walk without restarts is the same code with one round, through the same graph: on the data given, and on clusters so
far apart that the graph falls into parts. Restarts are those of the search; the graph was built with them.
"""

from __future__ import annotations

import copy
import time
from typing import Any

import numpy as np
from common import K, Task, load_task, parser, save, table

import index_builders
from index_builders.tp_tree import partition
from vecsvc import indexes, machine_code
from vecsvc.exact_search import ExactSearch
from vecsvc.indexes.nng_layout import ROUNDS, SEEDS
from vecsvc.types import Vectors

FORESTS = {"TP": 5, "TP, 8 axes": 8, "KD": 1}  # name -> n_top_dims
TREES = 8
MAX_CHECK = (256, 512, 1024, 2048, 4096, 8192, 16_384)
LEVELS = (0.3, 0.5, 0.7, 0.8, 0.9)  # recalls at which the vectors to compare are set against each other
REPEATS = 5

LIST_TREES = (1, 2, 4, 8, 16, 32)
LIST_LEAF = 800
LIST_LENGTHS = (16, 32)
LIST_ROWS = 1000  # rows whose lists are compared with the true ones
SAMPLES = 1000

EF_SEARCH = (16, 32, 64, 128, 256, 512, 1024)
FAR_DIM = 64
FAR_SPREAD = 0.3  # of a cluster, along each axis; their centres' is 1
SEED = 7


def forests(task: Task) -> dict[str, Any]:
    """Recall and time of each forest at equal max_check; the runs of the forests alternate."""
    built, rows = {}, []
    index_builders.build(task.base[:100], kind="tp_tree", metric="ip")  # compiles, where that was not done before
    for name, axes in FORESTS.items():
        started = time.perf_counter()
        params = {"n_trees": TREES, "n_top_dims": axes}
        index = index_builders.build(task.base, kind="tp_tree", metric="ip", params=params, num_threads=1, seed=SEED)
        seconds = time.perf_counter() - started
        built[name] = index
        rows.append([name, axes, seconds, root_gain(task.base, index._forest.nodes, axes)])  # type: ignore[attr-defined]
    head = ["forest", "axes", "build s", "variance at the root"]
    table(f"{TREES} trees, one thread; variance along a root's direction, 1 for the best axis", head, rows)

    times: dict[tuple[str, int], list[float]] = {}
    recalls: dict[tuple[str, int], float] = {}
    for _ in range(REPEATS):
        for check in MAX_CHECK:
            params = indexes.search_params("tp_tree", max_check=check)
            for name, index in built.items():
                started = time.perf_counter()
                found = index.search(task.queries, K, params)
                taken = (time.perf_counter() - started) / len(task.queries)
                times.setdefault((name, check), []).append(taken * 1e6)
                recalls[name, check] = task.recall(found.labels)
    lines = [
        [check, *(recalls[name, check] for name in built), *(float(np.median(times[name, check])) for name in built)]
        for check in MAX_CHECK
    ]
    head = ["max_check", *(f"{name} recall" for name in built), *(f"{name} us" for name in built)]
    table(f"recall@{K} at equal max_check, and time a query", head, lines)

    needed = {name: [checks_for(level, [recalls[name, c] for c in MAX_CHECK]) for level in LEVELS] for name in built}
    factors = [
        [level, *(needed[name][i] for name in built), needed["KD"][i] / needed["TP"][i]]
        for i, level in enumerate(LEVELS)
    ]
    head = ["recall", *(f"{name} compares" for name in built), "KD / TP"]
    table("vectors to compare for a recall, between the points measured", head, factors)
    return {"forests": rows, "equal_max_check": lines, "needed": factors}


def checks_for(level: float, recalls: list[float]) -> float:
    """max_check at which a recall is reached, on a log scale between two points measured; NaN beyond them."""
    if not recalls[0] <= level <= recalls[-1]:
        return float("nan")
    return float(2 ** np.interp(level, recalls, np.log2(MAX_CHECK)))


def root_gain(base: Vectors, nodes: np.ndarray, axes: int) -> float:
    """The mean variance along the roots' directions, as a multiple of that along the best single axis."""
    gains = []
    for root in nodes[:: len(nodes) // TREES]:
        codes = root[:axes][root[:axes] != 0]
        signs = np.sign(codes).astype(np.float32)
        gains.append(np.var(base[:, np.abs(codes) - 1] @ signs) / len(codes))
    return float(np.mean(gains) / base.var(axis=0).max())


def lists(task: Task) -> dict[str, Any]:
    """Recall of neighbour lists of sampled rows: all pairs inside each leaf, over more and more trees."""
    rng = np.random.default_rng(SEED)
    chosen = np.sort(rng.choice(len(task.base), LIST_ROWS, replace=False))
    longest = max(LIST_LENGTHS)
    # Unit vectors: the nearest by product are the nearest by distance. The row itself comes first, or ties with it.
    bounds = ExactSearch(task.base, "ip").search(task.base[chosen], longest + 1).distances
    figures = []
    for name in ("TP", "KD"):
        best = np.full((LIST_ROWS, longest), np.inf, dtype=np.float32)
        known = np.full((LIST_ROWS, longest), -1, dtype=np.int64)
        seconds, compared = 0.0, np.zeros(LIST_ROWS)
        for tree in range(1, max(LIST_TREES) + 1):
            started = time.perf_counter()
            order, starts = partition(
                task.base, leaf_size=LIST_LEAF, n_samples=SAMPLES, n_top_dims=FORESTS[name], rng=rng
            )
            seconds += time.perf_counter() - started
            place = np.empty(len(order), dtype=np.int64)
            place[order] = np.arange(len(order))
            leaf_of = np.searchsorted(starts, place[chosen], side="right") - 1
            for i, (row, leaf) in enumerate(zip(chosen, leaf_of, strict=True)):
                mates = order[starts[leaf] : starts[leaf + 1]]
                mates = mates[(mates != row) & ~np.isin(mates, known[i])]
                compared[i] += starts[leaf + 1] - starts[leaf] - 1
                distances = np.concatenate([best[i], 1.0 - task.base[mates] @ task.base[row]])
                names = np.concatenate([known[i], mates])
                kept = np.argsort(distances, kind="stable")[:longest]
                best[i], known[i] = distances[kept], names[kept]
            if tree in LIST_TREES:
                reached = [float(np.mean(best[:, :n] <= bounds[:, n : n + 1] + 1e-5)) for n in LIST_LENGTHS]
                figures.append([f"{name} {tree}", *reached, seconds, float(compared.mean())])
    head = ["trees", *(f"recall, lists of {n}" for n in LIST_LENGTHS), "partition s", "pairs a row"]
    table(f"neighbour lists from all pairs inside leaves of {LIST_LEAF}, {LIST_ROWS} rows sampled", head, figures)
    return {"lists": figures}


def far_apart(rows: int = 20_000, clusters: int = 20, between: int = 8, queries: int = 1000) -> Task:
    """Unit vectors in clusters that no edge joins, and queries that lie between several of them.

    Clusters of more than ef_construction vectors have all their neighbours inside. The nearest of a query are in more
    clusters than a walk's first pivots are, which is where going on from the next ones may matter.
    """
    rng = np.random.default_rng(SEED)
    centres = rng.standard_normal((clusters, FAR_DIM))
    base = centres[rng.integers(0, clusters, rows)] + FAR_SPREAD * rng.standard_normal((rows, FAR_DIM))
    asked = np.stack([centres[rng.permutation(clusters)[:between]].mean(axis=0) for _ in range(queries)])
    asked += 0.3 * FAR_SPREAD * rng.standard_normal(asked.shape)
    base, asked = ((a / np.linalg.norm(a, axis=1, keepdims=True)).astype(np.float32) for a in (base, asked))
    bounds = ExactSearch(base, "ip").search(asked, K).distances[:, -1]
    return Task(f"{clusters} clusters far apart", base, asked, bounds)


def restarts(task: Task) -> dict[str, Any]:
    """What a walk finds and costs that goes on from the next pivots where it is stuck, and one that ends there."""
    params: dict[str, Any] = {"walk": "codes"}  # of which there is a copy that does not restart
    restarting = index_builders.build(task.base, kind="nng", metric="ip", params=params, num_threads=1, seed=SEED)
    once = copy.copy(restarting)
    once._search = machine_code.load("walk_once_kernels", "nng_search", 1)  # type: ignore[attr-defined]
    lines = []
    for breadth in EF_SEARCH:
        settings = indexes.search_params("nng", ef_search=breadth)
        found = [index.search(task.queries, K, settings) for index in (restarting, once)]
        figures = [[task.recall(n.labels), float(n.visited.mean()), float(n.hops.mean())] for n in found]
        changed = float((found[0].hops != found[1].hops).mean())
        lines.append([breadth, *(value for pair in zip(*figures, strict=True) for value in pair), changed])
    parts, pivots = graph_parts(restarting.parts.graph), len(restarting.parts.pivots)  # type: ignore[attr-defined]
    head = ["ef_search", f"recall@{K}", "without", "visited", "without", "hops", "without", "queries restarted"]
    table(
        f"{task.name}, a graph of {parts} parts and {pivots} pivots: walks from {SEEDS} pivots that restart up to "
        f"{ROUNDS - 1} times, and without",
        head,
        lines,
    )
    return {"parts": parts, "pivots": pivots, "walks": lines}


def graph_parts(graph: np.ndarray) -> int:
    """How many parts of a graph (n, degree), -1 after the last edge, no edge joins."""
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import connected_components

    size, degree = graph.shape
    edges = graph.reshape(-1) >= 0
    ends = graph.reshape(-1)[edges], np.repeat(np.arange(size), degree)[edges]
    return int(connected_components(csr_matrix((np.ones(len(ends[0]), np.int8), ends), (size, size)), False)[0])


def main() -> None:
    given = parser(__doc__.splitlines()[0]).parse_args()
    task = load_task(given.data)
    print(f"{task.name}: {task.base.shape[0]:,} x {task.base.shape[1]}, {len(task.queries):,} queries, seed {SEED}")
    figures = {"task": task.name, "seed": SEED, **forests(task), **lists(task)}
    figures["restarts"] = {one.name: restarts(one) for one in (task, far_apart())}
    save("tp_tree", figures, libraries=("numba", "llvmlite", "scipy"))


if __name__ == "__main__":
    main()
