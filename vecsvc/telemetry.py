"""What the service tells about itself: metrics in Prometheus' words, logs as one JSON object a line."""

from __future__ import annotations

import json
import logging
import sys
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Any, Final, Generic, TypeAlias, TypeVar

import msgspec
from prometheus_client import CollectorRegistry, Gauge, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.utils import floatToGoString

METRICS_CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
COUNTED_CONTENT_TYPE: Final = "application/vnd.vecsvc.counted+json"  # between the processes of one service

# Of several processes' gauges the sum is shown, but for these.
LEAST: Final = ("vecsvc_ready", "vecsvc_tls_valid_until_seconds")
MOST: Final = ("vecsvc_index_info",)

LEFT: Final = 499  # the status of requests whose client left before the answer, as proxies' logs have it

_SECONDS: Final = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0,
)  # fmt: skip
_SIZES: Final = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 1024.0)


class Count:
    """A counter of the event loop's own: without the lock and the calls that make Prometheus' fit for threads."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: float = 0

    def inc(self, by: int = 1) -> None:
        self.value += by


class Spread:
    """A histogram of seconds, in the same way."""

    __slots__ = ("counts", "total")
    bounds: tuple[float, ...] = _SECONDS

    def __init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


class Sizes(Spread):
    """A histogram of how many."""

    __slots__ = ()
    bounds = _SIZES


C = TypeVar("C", bound=Count | Spread)


class Family(Generic[C]):
    """One metric and its labelled children, made when they are first asked for."""

    def __init__(self, make: type[C], name: str, help: str, labels: tuple[str, ...]) -> None:
        self.name, self.help, self.labels = name, help, labels
        self.make: type[C] = make
        self.children: dict[tuple[str, ...], C] = {}

    def __call__(self, *labels: str) -> C:
        found = self.children.get(labels)
        if found is None:
            found = self.children[labels] = self.make()
        return found


def collected(counters: Iterable[Family[Count]], histograms: Iterable[Family[Spread]]) -> Iterator[Metric]:
    """What was counted, in prometheus_client's words."""
    for counter in counters:
        counted = CounterMetricFamily(counter.name, counter.help, labels=counter.labels)
        for labels, count in list(counter.children.items()):
            counted.add_metric(labels, count.value)
        yield counted
    for histogram in histograms:
        spread_out = HistogramMetricFamily(histogram.name, histogram.help, labels=histogram.labels)
        for labels, spread in list(histogram.children.items()):
            bounds = [*map(floatToGoString, spread.bounds), "+Inf"]
            buckets = list(zip(bounds, accumulate(spread.counts), strict=True))
            spread_out.add_metric(labels, buckets, spread.total)
        yield spread_out


Labels: TypeAlias = tuple[str, ...]


class Counted(msgspec.Struct, frozen=True):
    """What one process counted, by the names of its metrics: what can be added up with what others did."""

    counts: dict[str, list[tuple[Labels, float]]] = {}
    spreads: dict[str, list[tuple[Labels, list[int], float]]] = {}  # how many in each bucket, and their sum
    gauges: dict[str, list[tuple[Labels, float]]] = {}
    at: float = 0.0  # time.monotonic() seconds, which processes of one machine share

    def lasting(self) -> Counted:
        """What stays true when the process has ended."""
        return Counted(self.counts, self.spreads, at=self.at)


class Metrics:
    """Every metric of one service, in a registry of its own. What is counted is counted in the event loop,
    but for replaced encoders, each in its keeper's thread."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Family(
            Count,
            "vecsvc_requests",
            f"Requests by the status of their answer; {LEFT} where the client left before it, or was cut off",
            ("operation", "status"),
        )
        self.latency = Family(
            Spread,
            "vecsvc_request_seconds",
            "Seconds from the request's head to its answer, or until its client left",
            ("operation",),
        )
        self.search = Family(
            Spread, "vecsvc_search_seconds", "Seconds in the indexes of all shards", ("index", "strategy")
        )
        self.truncated = Family(
            Count, "vecsvc_truncated_texts", "Texts to embed that were longer than the encoder reads", ("encoder",)
        )
        self.shortfall = Family(Count, "vecsvc_shortfall_places", "Places of k that stayed empty", ("index",))
        self.swaps = Family(Count, "vecsvc_version_swaps", "Versions opened and put to serve", ("index",))
        by_lane = ("encoder", "lane")
        self.encoder_run = Family(Spread, "vecsvc_encoder_run_seconds", "Seconds of a run of the encoder", by_lane)
        self.encoder_queue = Family(
            Spread, "vecsvc_encoder_queue_seconds", "Seconds that a request waited for its first run", by_lane
        )
        self.encoder_batch = Family(Sizes, "vecsvc_encoder_batch_texts", "Texts in a run of the encoder", by_lane)
        self.encoder_tokens = Family(Count, "vecsvc_encoder_tokens", "Tokens that were encoded", by_lane)
        self.encoder_failed = Family(
            Count, "vecsvc_encoder_failed_runs", "Runs that failed, at least in part", by_lane[:1]
        )
        self.cache_hits = Family(Count, "vecsvc_encoder_cache_hits", "Texts whose vector was remembered", by_lane[:1])
        self.cache_misses = Family(Count, "vecsvc_encoder_cache_misses", "Texts whose vector was not", by_lane[:1])
        self.encoder_replaced = Family(
            Count,
            "vecsvc_encoder_replacements",
            "Sessions that were wedged or failing, and were opened anew",
            by_lane[:1],
        )
        self.encoder_waiting = Gauge(
            "vecsvc_encoder_waiting_tokens", "Tokens that wait for the encoder", ["encoder"], registry=self.registry
        )
        self.in_flight = Gauge("vecsvc_in_flight", "Requests that search or wait to", registry=self.registry)
        self.tls_refused = Family(
            Count,
            "vecsvc_tls_refused_handshakes",
            "TLS handshakes that this side refused, or the other with a reason, by port: http, admin, shard, nodes; "
            "who hangs up or says nothing is not in it",
            ("port",),
        )
        self.tls_valid_until = Gauge(
            "vecsvc_tls_valid_until_seconds",
            "When the certificate in force ends, in seconds since 1970, by where it is shown: http, shard, nodes",
            ["port"],
            registry=self.registry,
        )
        self.ready = Gauge("vecsvc_ready", "1 where /readyz is green", registry=self.registry)
        self.version_info = Gauge(
            "vecsvc_index_info", "1 for the version that serves", ["index", "version"], registry=self.registry
        )
        self.registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """What prometheus_client asks a collector for."""
        yield from collected(self._counters(), self._histograms())

    def counted(self) -> Counted:
        """All that was counted so far, and the gauges as they were set last."""
        return Counted(
            {f.name: [(labels, count.value) for labels, count in list(f.children.items())] for f in self._counters()},
            {
                f.name: [(labels, spread.counts[:], spread.total) for labels, spread in list(f.children.items())]
                for f in self._histograms()
            },
            {name: _samples(gauge) for name, gauge in self._gauges().items()},
            time.monotonic(),
        )

    def show(self, counted: Counted) -> None:
        """Be what was counted elsewhere; metrics that are unknown here are left out."""
        for counter in self._counters():
            counter.children.clear()
            for labels, value in counted.counts.get(counter.name, ()):
                counter(*labels).value = value
        for histogram in self._histograms():
            histogram.children.clear()
            for labels, counts, total in counted.spreads.get(histogram.name, ()):
                spread = histogram(*labels)
                spread.counts, spread.total = counts, total
        for name, gauge in self._gauges().items():
            match counted.gauges.get(name):
                case None:
                    pass
                case [((), value)]:
                    gauge.set(value)
                case values:
                    gauge.clear()
                    for labels, value in values:
                        gauge.labels(*labels).set(value)

    def _counters(self) -> list[Family[Count]]:
        return [f for f in vars(self).values() if isinstance(f, Family) and not issubclass(f.make, Spread)]

    def _histograms(self) -> list[Family[Spread]]:
        return [f for f in vars(self).values() if isinstance(f, Family) and issubclass(f.make, Spread)]

    def _gauges(self) -> dict[str, Gauge]:
        return {next(iter(g.describe())).name: g for g in vars(self).values() if isinstance(g, Gauge)}

    def text(self) -> bytes:
        return generate_latest(self.registry)


def _samples(gauge: Gauge) -> list[tuple[Labels, float]]:
    return [(tuple(sample.labels.values()), sample.value) for metric in gauge.collect() for sample in metric.samples]


def together(parts: Sequence[Counted]) -> Counted:
    """What several processes counted, as one: counters and histograms add up, gauges as LEAST and MOST say."""
    counts: dict[str, dict[Labels, float]] = {}
    spreads: dict[str, dict[Labels, tuple[list[int], float]]] = {}
    gauges: dict[str, dict[Labels, float]] = {}
    for part in parts:
        for name, values in part.counts.items():
            known = counts.setdefault(name, {})
            for labels, value in values:
                known[labels] = known.get(labels, 0) + value
        for name, spread in part.spreads.items():
            seen = spreads.setdefault(name, {})
            for labels, buckets, total in spread:
                before, sum_before = seen.get(labels, ([0] * len(buckets), 0.0))
                seen[labels] = [a + b for a, b in zip(before, buckets, strict=True)], sum_before + total
        for name, values in part.gauges.items():
            shown = gauges.setdefault(name, {})
            for labels, value in values:
                if labels not in shown:
                    shown[labels] = value
                elif name in LEAST:
                    shown[labels] = min(shown[labels], value)
                elif name in MOST:
                    shown[labels] = max(shown[labels], value)
                else:
                    shown[labels] += value
    return Counted(
        {name: list(values.items()) for name, values in counts.items()},
        {name: [(labels, *both) for labels, both in values.items()] for name, values in spreads.items()},
        {name: list(values.items()) for name, values in gauges.items()},
    )


class LineBudget:
    """So many log lines a second, as many at once after a quiet one; counts those beyond. For one thread at a time."""

    def __init__(self, lines_per_s: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._lines_per_s, self._clock = lines_per_s, clock
        self._left, self._at = float(lines_per_s), clock()
        self.kept_back = 0

    def take(self) -> bool:
        """Whether a line may be logged now; where not, it is counted."""
        now = self._clock()
        self._left = min(float(self._lines_per_s), self._left + (now - self._at) * self._lines_per_s)
        self._at = now
        if self._left < 1.0:
            self.kept_back += 1
            return False
        self._left -= 1.0
        return True


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, and whatever came in `extra={"data": {...}}`."""

    def __init__(self, worker: int | None = None) -> None:
        """Of one of several processes the lines say which."""
        super().__init__()
        self._worker: dict[str, Any] = {} if worker is None else {"worker": worker}

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **self._worker,
        }
        line.update(getattr(record, "data", {}))
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        # In ASCII: what requests carry into the log can neither break its lines nor speak to a terminal.
        return json.dumps(line, default=str)


class _NotTheClientsFault(logging.Filter):
    """aiohttp logs a traceback for each connection that a client breaks; that is the client's affair."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.name == "aiohttp.server" and record.levelno < logging.CRITICAL and record.exc_info)


def configure_logging(level: int = logging.INFO, worker: int | None = None) -> None:
    """Send every log line of the process to stderr as JSON."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(worker))
    handler.addFilter(_NotTheClientsFault())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
