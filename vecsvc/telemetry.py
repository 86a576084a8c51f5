"""What the service tells about itself: metrics in Prometheus' words, logs as one JSON object a line."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any, Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

METRICS_CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS: Final = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0,
)  # fmt: skip


class Metrics:
    """Every metric of one service, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("vecsvc_requests", "Answered requests", ["operation", "status"], registry=self.registry)
        self.latency = Histogram(
            "vecsvc_request_seconds",
            "Seconds from the request's head to its answer",
            ["operation"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.search = Histogram(
            "vecsvc_search_seconds",
            "Seconds in the indexes of all shards",
            ["index", "strategy"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.in_flight = Gauge("vecsvc_in_flight", "Requests that search or wait to", registry=self.registry)
        self.shortfall = Counter(
            "vecsvc_shortfall_places", "Places of k that stayed empty", ["index"], registry=self.registry
        )
        self.ready = Gauge("vecsvc_ready", "1 where /readyz is green", registry=self.registry)
        self.version_info = Gauge(
            "vecsvc_index_info", "1 for the version that serves", ["index", "version"], registry=self.registry
        )
        self.swaps = Counter(
            "vecsvc_version_swaps", "Versions opened and put to serve", ["index"], registry=self.registry
        )
        self._children: dict[tuple[object, ...], Any] = {}

    def child(self, metric: Any, *labels: str) -> Any:
        """A labelled child, looked up once: `labels()` takes a lock and a tuple of texts each time."""
        key = (id(metric), *labels)
        found = self._children.get(key)
        if found is None:
            found = self._children[key] = metric.labels(*labels)
        return found

    def text(self) -> bytes:
        return generate_latest(self.registry)


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
