"""What the service tells about itself: metrics in Prometheus' words, logs as one JSON object a line."""

from __future__ import annotations

import json
import logging
import sys
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any, Final, Generic, TypeVar, cast

from prometheus_client import CollectorRegistry, Gauge, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.utils import floatToGoString

METRICS_CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS: Final = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0,
)  # fmt: skip
_SIZES: Final = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 1024.0)


class Count:
    """A counter of the event loop's own: without the lock and the calls that make Prometheus' fit for threads."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0

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
        self._make: type[C] = make
        self.children: dict[tuple[str, ...], C] = {}

    def __call__(self, *labels: str) -> C:
        found = self.children.get(labels)
        if found is None:
            found = self.children[labels] = self._make()
        return found


class Metrics:
    """Every metric of one service, in a registry of its own. What is counted is counted in the event loop,
    but for replaced encoders, each in its keeper's thread."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Family(Count, "vecsvc_requests", "Answered requests", ("operation", "status"))
        self.latency = Family(
            Spread, "vecsvc_request_seconds", "Seconds from the request's head to its answer", ("operation",)
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
        self.ready = Gauge("vecsvc_ready", "1 where /readyz is green", registry=self.registry)
        self.version_info = Gauge(
            "vecsvc_index_info", "1 for the version that serves", ["index", "version"], registry=self.registry
        )
        self.registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """What prometheus_client asks a collector for."""
        for counter in (
            self.requests,
            self.shortfall,
            self.swaps,
            self.encoder_tokens,
            self.encoder_failed,
            self.cache_hits,
            self.cache_misses,
            self.encoder_replaced,
            self.truncated,
        ):
            counted = CounterMetricFamily(counter.name, counter.help, labels=counter.labels)
            for labels, count in list(counter.children.items()):
                counted.add_metric(labels, count.value)
            yield counted
        timed = (self.latency, self.search, self.encoder_run, self.encoder_queue)
        histograms: list[Family[Spread]] = [*timed, cast("Family[Spread]", self.encoder_batch)]
        for histogram in histograms:
            spread_out = HistogramMetricFamily(histogram.name, histogram.help, labels=histogram.labels)
            for labels, spread in list(histogram.children.items()):
                bounds = [*map(floatToGoString, spread.bounds), "+Inf"]
                buckets = list(zip(bounds, accumulate(spread.counts), strict=True))
                spread_out.add_metric(labels, buckets, spread.total)
            yield spread_out

    def text(self) -> bytes:
        return generate_latest(self.registry)


class LineBudget:
    """So many log lines a second, as many at once after a quiet one; counts those beyond. Belongs to one event loop."""

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

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
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


def configure_logging(level: int = logging.INFO) -> None:
    """Send every log line of the process to stderr as JSON."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    handler.addFilter(_NotTheClientsFault())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
