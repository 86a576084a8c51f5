"""Draws what capacity.py works out: nodes by corpus, latency by shards asked and by load; as PNG and SVG."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")

from capacity_plan import Plan
from cluster_model import Cluster, simulate
from matplotlib.figure import Figure

COLOURS = ("#d1004b", "#0057d9", "#00875a", "#f07800")
ASKED = (1, 4, 16, 64, 256)
LOADS = (0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9)


def draw(plans: list[Plan], stem: Path, queries: int, seed: int) -> list[Path]:
    figure = Figure(figsize=(15, 4.6), dpi=130, facecolor="white", layout="constrained")
    nodes, asked, load = figure.subplots(1, 3)
    rate = max(one.demand.rate_qps for one in plans)
    for colour, share in zip(COLOURS, dict.fromkeys(one.demand.share for one in plans), strict=False):
        points = [(one.demand.vectors, one.nodes) for one in plans if one.demand.share == share]
        points = [p for p, one in zip(points, (o for o in plans if o.demand.share == share), strict=True)
                  if one.demand.rate_qps == rate]  # fmt: skip
        nodes.plot(*zip(*sorted(points), strict=True), "o-", color=colour, label=f"{share:.0%} of the shards asked")
    nodes.set(xscale="log", yscale="log", xlabel="vectors", ylabel="nodes", title=f"Nodes for {rate:,.0f} queries/s")
    service_ms = plans[0].service_ms
    mean_ms = float(service_ms.mean())
    base = Cluster(shards=1, replicas=4, rate_qps=4 * 0.4 * 1000 / mean_ms)
    for colour, (name, budget) in zip(COLOURS, (("hedged", 0.05), ("without hedges", 0.0)), strict=False):
        found = []
        for count in ASKED:
            cluster = replace(base, shards=count, hedge_budget=budget, slow_share=0.01, slow_ms=20 * mean_ms)
            found.append(simulate(cluster, service_ms, queries=queries, seed=seed).quantiles())
        for values, dashes, quantile in zip(
            np.transpose(found), ("-", "--", ":"), ("p50", "p99", "p99.9"), strict=True
        ):
            asked.plot(ASKED, values, dashes, color=colour, label=f"{quantile} {name}")
    asked.set(xscale="log", yscale="log", xlabel="shards asked", ylabel="ms", title="1 % of replicas late, load 40 %")
    ways = (("two choices, hedged", True, 0.05), ("two choices", True, 0.0), ("any replica", False, 0.0))
    for colour, (name, two, budget) in zip(COLOURS, ways, strict=False):
        p99 = []
        for busy in LOADS:
            cluster = replace(base, shards=16, rate_qps=4 * busy * 1000 / mean_ms, two_choices=two, hedge_budget=budget)
            p99.append(simulate(cluster, service_ms, queries=queries, seed=seed).quantiles()[1])
        load.plot([100 * busy for busy in LOADS], p99, "o-", color=colour, label=name)
    load.set(yscale="log", xlabel="% of the replicas' threads busy", ylabel="p99, ms", title="16 shards of 4 replicas")
    for axes in (nodes, asked, load):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    paths = [stem.with_suffix(suffix) for suffix in (".png", ".svg")]
    for path in paths:
        figure.savefig(path)
    return paths
