"""Logs that machines read line by line, metrics with units and bounded labels."""

from __future__ import annotations

import io
import json
import logging
import math
import re
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import pytest
import service
from prometheus_client.parser import text_string_to_metric_families
from service import BINARY, JSON, Service

from vecsvc.telemetry import METRICS_CONTENT_TYPE, JsonFormatter, LineBudget, Metrics, configure_logging

QUESTION = {"vector": [1.0] * service.DIM}


@pytest.fixture(scope="module")
def chatty() -> Iterator[Service]:
    with service.running(service.index("texts"), log="all", reload_poll_s=0) as running:
        yield running


def families(running: Service) -> dict[str, Any]:
    text = running.ask("GET", "/metrics", admin=True).body.decode()
    return {family.name: family for family in text_string_to_metric_families(text)}


# --------------------------------------------------------------------------------------------------------- logs


@pytest.fixture
def logger() -> Iterator[tuple[logging.Logger, io.StringIO]]:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    made = logging.Logger("vecsvc.test")
    made.addHandler(handler)
    yield made, stream
    handler.close()


@pytest.mark.parametrize(
    "value",
    [
        'quotes " and \\ strokes',
        "two\nlines\r\nand\x0bmore\x0c\x1c\x85\u2028\u2029",
        "\x00\x1b[31m\x9b0m\x7f",
        "日本 naïve 🙂",
        "\ud800 alone",
        "x" * 100_000,
        {"deep": [1, {"er": None}]},
        object,
        b"bytes",
    ],
)
def test_whatever_is_logged_is_one_line_of_ascii_json(logger: tuple[logging.Logger, io.StringIO], value: Any) -> None:
    log, stream = logger
    log.info("told %s", "something", extra={"data": {"value": value}})
    text = stream.getvalue()
    assert text.endswith("\n") and len(text.splitlines()) == 1 and text.isascii()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", text), "nothing that a terminal would obey"
    line = json.loads(text)
    assert (line["level"], line["logger"], line["message"]) == ("info", "vecsvc.test", "told something")
    assert line["value"] == (value if isinstance(value, str | dict) else str(value))
    assert abs(datetime.fromisoformat(line["time"]).timestamp() - datetime.now().timestamp()) < 5


def test_a_traceback_is_a_field_of_its_line(logger: tuple[logging.Logger, io.StringIO]) -> None:
    log, stream = logger
    try:
        raise ValueError("what went\nwrong")
    except ValueError:
        log.exception("failed")
    [text] = stream.getvalue().splitlines()
    line = json.loads(text)
    assert line["level"] == "error" and line["trace"].endswith("ValueError: what went\nwrong")


def test_configuring_twice_logs_once(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    try:
        configure_logging()
        configure_logging()
        logging.getLogger("anything").info("said")
        logging.getLogger("anything").debug("not said")
        logging.getLogger("aiohttp.server").error("a client hung up", exc_info=ConnectionResetError())
    finally:
        root.handlers[:], root.level = before
    [line] = capsys.readouterr().err.splitlines()
    assert json.loads(line)["message"] == "said"


def test_every_line_of_a_service_s_life_is_json(chatty: Service) -> None:
    chatty.search(**QUESTION)
    lines = chatty.log()
    messages = [line["message"] for line in lines]
    assert messages[:4] == ["listening", "encoder opened", "serving", "ready"]
    assert all({"time", "level", "logger", "message"} <= line.keys() for line in lines)


def test_a_request_s_line_says_what_came_and_what_went(chatty: Service) -> None:
    reply = chatty.post("/search", {"k": 0, "id": "a"}, X_Request_Id="req-1")
    assert reply.status == 422
    [line] = [line for line in chatty.log() if line.get("request_id") == "req-1"]
    assert (line["method"], line["path"], line["status"]) == ("POST", "/search", 422)
    assert line["why"] == reply.message and 0 < line["ms"] < 1000
    good = chatty.ask("POST", "/search", json.dumps(QUESTION).encode(), {**JSON, "X-Request-Id": "req-2"})
    [line] = [line for line in chatty.log() if line.get("request_id") == "req-2"]
    assert good.status == line["status"] == 200 and "why" not in line


@pytest.mark.parametrize(("log", "lines"), [("none", 0), ("errors", 3), ("all", 4)])
def test_the_setting_log_chooses_which_requests_are_logged(log: str, lines: int) -> None:
    with service.running(service.index("texts"), log=log, reload_poll_s=0) as running:
        running.search(**QUESTION)
        running.post("/search", b"{")
        running.get("/nothing")
        running.raw(b"nonsense\r\n\r\n")
        assert len([line for line in running.log() if line["message"] == "request"]) == lines


def test_what_a_client_sends_cannot_forge_a_line(chatty: Service) -> None:
    forged = '\n{"level": "error", "message": "forged"}\u2028{"message": "forged"}\x1b[2J'
    chatty.post("/search", {"id": forged})
    chatty.get("/indexes/%0A%7B%22message%22:%22forged%22%7D")
    text = chatty.log_file.read_text()
    assert "forged" in text and text.isascii() and "\x1b" not in text
    assert all(json.loads(line)["message"] != "forged" for line in text.splitlines())


# ------------------------------------------------------------------------------------------------------ metrics


def test_metrics_are_what_prometheus_reads(chatty: Service) -> None:
    chatty.search(**QUESTION)
    reply = chatty.ask("GET", "/metrics", admin=True)
    assert reply.headers["content-type"] == METRICS_CONTENT_TYPE
    found = families(chatty)
    assert {name: family.type for name, family in found.items()} == {
        "vecsvc_requests": "counter",
        "vecsvc_request_seconds": "histogram",
        "vecsvc_search_seconds": "histogram",
        "vecsvc_shortfall_places": "counter",
        "vecsvc_version_swaps": "counter",
        "vecsvc_truncated_texts": "counter",
        "vecsvc_encoder_run_seconds": "histogram",
        "vecsvc_encoder_queue_seconds": "histogram",
        "vecsvc_encoder_batch_texts": "histogram",
        "vecsvc_encoder_tokens": "counter",
        "vecsvc_encoder_failed_runs": "counter",
        "vecsvc_encoder_cache_hits": "counter",
        "vecsvc_encoder_cache_misses": "counter",
        "vecsvc_encoder_replacements": "counter",
        "vecsvc_encoder_waiting_tokens": "gauge",
        "vecsvc_in_flight": "gauge",
        "vecsvc_ready": "gauge",
        "vecsvc_index_info": "gauge",
        "vecsvc_tls_refused_handshakes": "counter",
        "vecsvc_tls_valid_until_seconds": "gauge",
    }


def test_names_have_units_and_helps(chatty: Service) -> None:
    chatty.search(**QUESTION)
    for name, family in families(chatty).items():
        assert re.fullmatch(r"vecsvc_[a-z]+(_[a-z]+)*", name) and family.documentation
        if family.type == "histogram":
            assert name.endswith(("_seconds", "_texts"))
        if family.type == "counter":
            assert all(sample.name.endswith(("_total", "_created")) for sample in family.samples)
        assert not re.search(r"_(ms|milliseconds|us|mb|kb|percent)(_|$)", name), "base units only"


def test_histograms_add_up(chatty: Service) -> None:
    for _ in range(5):
        chatty.search(**QUESTION)
    histograms = [family for family in families(chatty).values() if family.type == "histogram"]
    assert len(histograms) == 5
    for family in histograms:
        by_labels: dict[tuple[tuple[str, str], ...], list[Any]] = {}
        for sample in family.samples:
            labels = tuple(sorted((k, v) for k, v in sample.labels.items() if k != "le"))
            by_labels.setdefault(labels, []).append(sample)
        for samples in by_labels.values():
            buckets = [(float(s.labels["le"]), s.value) for s in samples if s.name.endswith("_bucket")]
            [count] = [s.value for s in samples if s.name.endswith("_count")]
            [total] = [s.value for s in samples if s.name.endswith("_sum")]
            assert buckets == sorted(buckets) and [n for _, n in buckets] == sorted(n for _, n in buckets)
            assert buckets[-1] == (math.inf, count)
            # A query that runs at once has waited for nothing.
            assert 0 < total < 60 or (total == 0 and family.name == "vecsvc_encoder_queue_seconds")


def test_a_budget_of_lines_refills_with_time_and_counts_what_it_keeps_back() -> None:
    now = [50.0]
    budget = LineBudget(3, lambda: now[0])
    assert [budget.take() for _ in range(5)] == [True, True, True, False, False] and budget.kept_back == 2
    now[0] += 0.5
    assert [budget.take(), budget.take()] == [True, False]
    now[0] += 1000  # a long silence saves up no more than a second's lines
    assert [budget.take() for _ in range(4)] == [True, True, True, False] and budget.kept_back == 4


@pytest.mark.parametrize("log", ["errors", "all", "none"])
def test_a_flood_of_bad_requests_is_counted_and_not_logged_line_by_line(log: str) -> None:
    with service.running(service.index("texts"), log=log, log_lines_per_s=1, reload_poll_s=0) as running:
        before = len(running.log())
        connection = running.connect()
        for _ in range(300):
            assert service.ask(connection, "GET", "/nowhere").status == 404
        connection.close()
        assert running.raw(b"nonsense\r\n\r\n").split(b" ", 2)[1] == b"400"
        if log == "errors":
            running.wait_for("lines left out")
        lines = [line for line in running.log()[before:] if line["message"] == "request"]
        told = [line["lines"] for line in running.log() if line["message"] == "lines left out"]
        assert running.metric("vecsvc_requests_total", operation="unknown", status="404") == 300
    if log == "errors":
        assert 1 <= len(lines) < 200 and told and sum(told) + len(lines) <= 301
    else:
        assert len(lines) == {"all": 301, "none": 0}[log] and not told


def test_an_observation_falls_into_the_buckets_that_are_not_below_it() -> None:
    metrics = Metrics()
    for seconds in (0.0, 0.0001, 0.00011, 0.3, 100.0):
        metrics.latency("/search").observe(seconds)
    text = metrics.text().decode()
    [family] = [f for f in text_string_to_metric_families(text) if f.name == "vecsvc_request_seconds"]
    buckets = {s.labels["le"]: s.value for s in family.samples if s.name.endswith("_bucket")}
    assert (buckets["0.0001"], buckets["0.00025"], buckets["0.25"], buckets["0.5"]) == (2, 3, 3, 4)
    assert (buckets["10.0"], buckets["+Inf"]) == (4, 5)
    [total] = [s.value for s in family.samples if s.name.endswith("_sum")]
    assert total == pytest.approx(100.30021)


def test_no_label_takes_what_a_client_sends(chatty: Service) -> None:
    """Whatever is asked, the number of time series stays what routes, statuses and indexes make of it."""
    for name in ("x", "y"):
        ask_everything(chatty, name)
    before = chatty.metrics().keys()
    for number in range(30):
        ask_everything(chatty, f"client-{number}")
    after = chatty.metrics()
    assert after.keys() == before
    assert not any("client-" in value for _, labels in after for _, value in labels)
    allowed = {"operation", "status", "index", "strategy", "version", "encoder", "lane", "le"}
    assert {label for _, labels in after for label, _ in labels} <= allowed
    operations = {value for _, labels in after for label, value in labels if label == "operation"}
    assert operations <= {
        *("/search", "/search/batch", "/indexes", "/indexes/{name}", "/indexes/{name}/search", "unknown"),
        *("/indexes/{name}/search/batch", "/openapi.json", "/livez", "/readyz"),
        *("/metrics", "/reload", "/indexes/{name}/rollback"),
    }


def ask_everything(running: Service, name: str) -> None:
    running.search(**QUESTION)
    running.get(f"/{name}")
    running.get(f"/indexes/{name}")
    running.get(f"/indexes/{name}/{name}")
    running.post(f"/indexes/{name}/search", QUESTION)
    running.post("/search", {"id": name})
    running.post("/search", {"text": name, "filter": {name: 1}})
    running.post("/search", {"text": name, "filter": {"text": name}, "params": {"exact": True}})
    running.post("/search", {name: 1})
    running.ask("POST", f"/search/batch?{name}=1", b"\0" * 32, BINARY)
    running.ask("PUT", f"/{name}")
    running.ask("GET", "/livez", headers={"X-Request-Id": name, "User-Agent": name})
    running.ask("POST", f"/indexes/{name}/rollback", admin=True)
    running.raw(f"{name}\r\n\r\n".encode())


def test_the_gauges_say_what_is_so_when_they_are_read(chatty: Service) -> None:
    assert chatty.metric("vecsvc_ready") == 1 and chatty.metric("vecsvc_in_flight") == 0
    info = [labels for name, labels in chatty.metrics() if name == "vecsvc_index_info"]
    assert info == [(("index", "texts"), ("version", "v1"))]
