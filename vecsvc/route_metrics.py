"""What a front door tells about its nodes, beside the metrics that every service has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Final

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import GaugeMetricFamily, Metric

from vecsvc.telemetry import Count, Family, Spread, collected

_OUTCOMES: Final = ("sent", "silence", "no_budget", "probe_sent", "hedge_won", "retry_won", "probe_won")


class RouteMetrics:
    """Counted in the event loop; registers itself where the service's own metrics are."""

    def __init__(
        self,
        registry: CollectorRegistry,
        states: Callable[[], Iterable[str]],
        missing: Callable[[], Iterable[tuple[str, int]]],
    ) -> None:
        """`states` tells those of the nodes; `missing` indexes and lacking shards."""
        self._states, self._missing = states, missing
        self.shard = Family(
            Spread,
            "vecsvc_shard_seconds",
            "Seconds until a node answered, by node; what it did not answer, or not in time, is not in it",
            ("node",),
        )
        self.hedges = Family(
            Count,
            "vecsvc_hedges",
            "Questions that were asked a second time (sent; silence where that was for half of their time, past the "
            "budget of sent), had no budget for it (no_budget), were copied to see how "
            "a node does (probe_sent; a copy under way is the second question where one is due to that node), or were "
            "answered by another than the first node (hedge_won, retry_won, probe_won)",
            ("outcome",),
        )
        self.retries = Family(Count, "vecsvc_shard_retries", "Questions asked again because a node failed", ())
        self.ejections = Family(Count, "vecsvc_shard_ejections", "Times that a failing node was left alone", ())
        self.losses = Family(
            Count,
            "vecsvc_node_losses",
            "Connections to nodes that were lost, to those that answered no ping, too; none of those that took leave",
            (),
        )
        self.partial = Family(Count, "vecsvc_partial_answers", "Answers that lack shards", ("index",))
        self.flips = Family(Count, "vecsvc_version_flips", "Times that another version began to serve", ("index",))
        for outcome in _OUTCOMES:
            self.hedges(outcome)  # there from the beginning, or the rate of what is rare could not be told
        for counter in (self.retries, self.ejections, self.losses):
            counter()
        registry.register(self)

    def collect(self) -> Iterator[Metric]:
        yield from collected(
            (self.hedges, self.retries, self.ejections, self.losses, self.partial, self.flips), (self.shard,)
        )
        nodes = GaugeMetricFamily("vecsvc_nodes", "Nodes by state: up, ejected, draining, down", labels=["state"])
        for state, n in Counter({"up": 0, "ejected": 0, "draining": 0, "down": 0} | Counter(self._states())).items():
            nodes.add_metric([state], n)
        yield nodes
        missing = GaugeMetricFamily("vecsvc_shards_missing", "Shards that no node holds", labels=["index"])
        for index, number in self._missing():
            missing.add_metric([index], number)
        yield missing

    def forget(self, node: str) -> None:
        """A node that is no more leaves no label behind, so that pods that come and go do not add up."""
        self.shard.children.pop((node,), None)
