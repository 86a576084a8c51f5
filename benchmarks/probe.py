"""How much of an answer few shards hold: recall@10 against the share of shards asked, clusters beside a hash.

Shards are searched exactly, so that what is missing was in a shard that nobody asked. Clusters are measured with no,
some and more rows living in two shards; "rows" is what the shards that were asked hold, in parts of the corpus: the
price of borders is there. A hash spreads every answer evenly, so that asking half of the shards finds half of it.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, K, Task, load_task, machine, parser, save, table, work_folder, write_corpus

from index_builders.pipeline import build_index
from vecsvc.catalog import Served
from vecsvc.config import BuildSettings, ServeSettings
from vecsvc.exact_search import ExactSearch
from vecsvc.ranking import nearest_shards
from vecsvc.storage import IndexFolder

SHARDS = 16
BORDER_SHARES = (0.0, 0.1, 0.2)
COLOURS = {"hash": "#66788a", "clusters, 0 %": "#0057d9", "clusters, 10 %": "#d1004b", "clusters, 20 %": "#f07800"}


def served(corpus: Path, work: Path, partition: str, border_share: float, shards: int) -> tuple[Served, float]:
    """The opened index, and the seconds that finding its clusters took."""
    name = f"{partition}-{shards}-{round(100 * border_share)}"
    folder = IndexFolder(work / "indexes" / name)
    version = folder.current()
    if version is None:
        settings = BuildSettings(
            out=str(folder.path.parent),
            name=name,
            kind="exact",
            shards=shards,
            partition=partition,
            border_share=border_share,
            certificate_queries=0,
        )
        version = build_index(str(corpus), settings, stream=io.StringIO()).manifest.version
    opened = Served(folder, version, ServeSettings())
    phase = opened.manifest.provenance.phases.get("cluster")
    return opened, phase.wall_s if phase is not None else 0.0


def curve(index: Served, task: Task, seed: int = 7) -> list[dict[str, float]]:
    """Recall where each query asks its 1, 2, ... shards: the nearest ones, or where there are none some by chance."""
    shards, count = index.shards, len(task.queries)
    distances, rows = [], []
    for shard in shards:
        found = ExactSearch(shard.vectors, index.manifest.metric).search(task.queries, min(K, shard.size))
        distances.append(found.distances)
        rows.append(shard.rows[found.labels])
    if index.centroids is not None:
        order = nearest_shards(task.queries, index.centroids, len(shards), index.manifest.metric)
    else:
        order = np.tile(np.random.default_rng(seed).permutation(len(shards)), (count, 1))
    place = np.argsort(order, axis=1)
    sizes = np.array([shard.size for shard in shards])
    points = []
    for n in range(1, len(shards) + 1):
        asked = [np.where(place[:, [s]] < n, distances[s], np.inf) for s in range(len(shards))]
        labels = nearest_rows(np.concatenate(asked, axis=1), np.concatenate(rows, axis=1))
        held = float((sizes * (place < n)).sum(axis=1).mean()) / len(task.base)
        points.append({"shards": n, "share": n / len(shards), "rows": held, "recall": task.recall(labels)})
    return points


def nearest_rows(distances: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The K nearest rows (q, K) of each query; one that two shards found counts once, -1 where there is none."""
    labels = np.full((len(rows), K), -1, dtype=np.int64)
    for i, (near, names) in enumerate(zip(distances, rows, strict=True)):
        best = [int(names[at]) for at in np.argsort(near, kind="stable")[: 2 * K] if np.isfinite(near[at])]
        unique = list(dict.fromkeys(best))[:K]
        labels[i, : len(unique)] = unique
    return labels


def draw(figures: dict[str, Any], beside: Path) -> list[Path]:
    """The curves as PNG and SVG beside the JSON file; nothing where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is missing: pip install 'vecsvc[bench]'")
        return []
    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.2), dpi=150, facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    for system in figures["systems"]:
        points, name = system["points"], system["name"]
        style = {"color": COLOURS.get(name, "#333333"), "marker": "o", "markersize": 3.5}
        axes.plot([p["share"] for p in points], [p["recall"] for p in points], label=name, **style)
    axes.set(xlabel="share of the shards that are asked", ylabel=f"recall@{K}", xlim=(0, 1), ylim=(0, 1.01))
    axes.grid(alpha=0.25)
    axes.legend(loc="lower right", frameon=False, title="rows spread by (and living in two shards)")
    about = f"{figures['shards']} shards of {figures['rows']:,} x {figures['dim']}, {figures['task']}"
    axes.set_title(f"{about}\n{machine()['cpu']}", fontsize=9)
    paths = [beside.with_suffix(suffix) for suffix in (".png", ".svg")]
    for path in paths:
        figure.savefig(path)
    return paths


def main() -> None:
    arguments = parser("What few shards find")
    arguments.add_argument("--shards", type=int, default=SHARDS)
    arguments.add_argument("--results", type=Path, default=RESULTS, help="folder for the JSON and the plot")
    given = arguments.parse_args()
    task = load_task(given.data)
    wanted = [("hash", "hash", 0.0)]
    wanted += [(f"clusters, {round(100 * share)} %", "cluster", share) for share in BORDER_SHARES]
    systems = []
    with work_folder(given.work) as work:
        corpus = write_corpus(task.base, work / "probe.parquet")
        for name, partition, share in wanted:
            index, cluster_s = served(corpus, work, partition, share, given.shards)
            sizes = [shard.size for shard in index.shards]
            systems.append(
                {
                    "name": name,
                    "points": curve(index, task),
                    "cluster_s": cluster_s,
                    "growth": sum(sizes) / len(task.base) - 1,
                    "largest": max(sizes) * len(sizes) / len(task.base),
                }
            )
            index.retire()
    about = f"{given.shards} shards of {len(task.base):,} x {task.base.shape[1]}, {task.name}"
    head = ["shards asked", *(f"{s['name']}: recall" for s in systems), *(f"{s['name']}: rows" for s in systems[1:])]
    rows = []
    for at in range(given.shards):
        points = [system["points"][at] for system in systems]
        share = f"{points[0]['shards']} ({points[0]['share']:.0%})"
        rows.append([share, *(p["recall"] for p in points), *(f"{p['rows']:.1%}" for p in points[1:])])
    table(about, head, rows)
    head = ["rows spread by", "more rows", "largest shard / mean", "finding clusters, s"]
    table(about, head, [[s["name"], f"{s['growth']:.1%}", s["largest"], s["cluster_s"]] for s in systems])
    facts = {"task": task.name, "rows": len(task.base), "dim": task.base.shape[1], "shards": given.shards}
    figures = {**facts, "systems": systems}
    draw(figures, save("probe", figures, folder=given.results))


if __name__ == "__main__":
    main()
