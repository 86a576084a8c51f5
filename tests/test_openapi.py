"""The OpenAPI document: valid, complete, and true of the running service, which Schemathesis tries to disprove."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import service
from service import Service

from vecsvc.access import added, new_key
from vecsvc.config import ServeSettings
from vecsvc.process import node
from vecsvc.server import STATUS

# Settings of requests, each with a value that stands nowhere else in the document.
BOUNDS = {
    "max_k": 901,
    "max_depth": 902,
    "max_batch": 903,
    "max_text_chars": 1904,
    "max_id_bytes": 905,
    "max_filter_nodes": 906,
    "max_filter_values": 907,
    "timeout_ms": 1908,
    "max_timeout_ms": 1909,
    "max_query_bytes": 9_100_001,
    "max_body_bytes": 9_100_002,
    "max_buffered_bytes": 9_100_003,
    "body_timeout_s": 911,
    "max_in_flight": 912,
    "max_bulk_in_flight": 917,
    "max_embed_texts": 913,
    "max_embed_chars": 1914,
    "embed_timeout_ms": 1915,
    "max_waiting_tokens": 1916,
}
# Settings of the process, of which a request knows nothing.
NOT_OF_REQUESTS = {
    *("host", "port", "admin_host", "admin_port", "encoder", "device", "verify", "reload_poll_s", "search_threads"),
    *("inline_ms", "max_connections", "header_timeout_s", "write_timeout_s", "keepalive_s", "drain_s", "shutdown_s"),
    *("log", "log_lines_per_s", "memory", "kernels", "bulk_run_ms", "encoder_provider", "encoder_threads"),
    *("keys", "tls_cert", "tls_key", "tls_client_ca", "shard_tls_cert", "shard_tls_key", "shard_tls_ca"),
    *("shards", "shard_host", "shard_port", "previous_version_s"),
    *(
        "encoder_instances",
        "encoder_spinning",
        "encoder_memory_mb",
        "encoder_stall_s",
        "encoder_batching",
        "encoder_cache",
        "workers",
    ),
}

HOOKS = r"""
import base64, collections, json, os, struct, zlib

import schemathesis
from hypothesis import strategies as st

LARGEST = struct.unpack("<f", struct.pack("<f", 1e15))[0]  # the largest float32 within MAX_ABS
FLOATS = st.floats(width=32, min_value=-LARGEST, max_value=LARGEST)
DIM = 8

def packed(n):
    return st.lists(FLOATS, min_size=n, max_size=n).filter(any).map(lambda row: struct.pack(f"<{n}f", *row))

schemathesis.openapi.format(f"float32-base64-{DIM}", packed(DIM).map(lambda row: base64.b64encode(row).decode()))
schemathesis.openapi.format(f"float32-rows-1x{DIM}", packed(DIM))
schemathesis.openapi.format(f"float32-rows-{DIM}", st.lists(packed(DIM), min_size=1, max_size=4).map(b"".join))
schemathesis.openapi.format("date-time-local", st.datetimes().map(lambda time: time.isoformat()))

def whole(value):
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    if isinstance(value, list):
        return [whole(part) for part in value]
    if isinstance(value, dict):
        return {name: whole(part) for name, part in value.items()}
    return value

@schemathesis.hook
def map_body(context, body):
    # JSON Schema calls 10.0 an integer. We do not, on purpose: whoever sends it has mixed something up.
    return whole(body)

def levels(filter):
    parts = filter.get("$and", []) if isinstance(filter, dict) else []
    return 1 + max(map(levels, parts), default=0) if isinstance(parts, list) else 1

@schemathesis.hook
def filter_body(context, body):
    # JSON Schema cannot count levels. The document states the bound in words.
    return not isinstance(body, dict) or levels(body.get("filter")) <= 8

@schemathesis.hook
def filter_case(context, case):
    # The filters of a batch are those of /search, where each of them is sent; here it is one in eight.
    body = case.body
    return (
        case.path != "/search/batch"
        or not isinstance(body, dict)
        or "filter" not in body
        or zlib.crc32(repr(body["filter"]).encode()) % 8 == 0
    )

SEEN = collections.Counter()

@schemathesis.hook
def after_call(context, case, response):
    SEEN[f"{case.method} {case.path} {case.media_type} {response.status_code}"] += 1
    with open(os.environ["SEEN"], "w") as file:
        json.dump(SEEN, file)
"""

# 504 is how the service keeps timeout_ms, which starts at 1 ms; every other 5xx is a failure.
CONFIG = """
[checks.not_a_server_error]
expected-statuses = ["2xx", "3xx", "4xx", "504"]
"""


@pytest.fixture(scope="module")
def bounded() -> Iterator[Service]:
    with service.running(service.index("texts"), **BOUNDS) as running:
        yield running


@pytest.fixture(scope="module")
def document(bounded: Service) -> Any:
    return bounded.get("/openapi.json").json()


def test_the_document_is_valid_openapi_3_1(document: Any) -> None:
    assert document["openapi"].startswith("3.1")
    openapi_spec_validator = pytest.importorskip("openapi_spec_validator")
    openapi_spec_validator.OpenAPIV31SpecValidator(document).validate()


def test_documents_of_several_indexes_and_of_none_are_valid_too() -> None:
    openapi_spec_validator = pytest.importorskip("openapi_spec_validator")
    for name in service.corpora():
        service.index(name)
    with service.running(service.work_folder() / "all") as running:
        several = running.get("/openapi.json").json()
    openapi_spec_validator.OpenAPIV31SpecValidator(several).validate()
    assert "/search" not in several["paths"] and "/indexes/squared/search" in several["paths"]
    assert "get" not in several["paths"]["/indexes/squared/search"], "an index without encoder takes no text"
    prelude = "import time, vecsvc.catalog as c; c.Catalog.refresh = lambda *a, **k: time.sleep(1) or []"
    with service.started(service.index("texts"), prelude) as loading:
        openapi_spec_validator.OpenAPIV31SpecValidator(loading.get("/openapi.json").json()).validate()


@pytest.mark.parametrize("name", BOUNDS)
def test_every_bound_of_requests_is_stated(document: Any, name: str) -> None:
    text = json.dumps(document)
    assert re.search(rf"(?<![\d.]){BOUNDS[name]}(\.0)?(?![\d.]*\d)", text), f"{name} is nowhere in the document"


def test_every_setting_is_either_a_stated_bound_or_no_concern_of_requests() -> None:
    names = {field.name for field in dataclasses.fields(ServeSettings)}
    assert names == set(BOUNDS) | NOT_OF_REQUESTS


def test_every_route_is_in_the_document_and_every_path_has_a_route(document: Any) -> None:
    app = node(service.index("texts"), ServeSettings())[2].app()
    routes = {(route.method, route.resource.canonical) for route in app.router.routes() if route.resource}
    paths = {
        (method.upper(), path.replace("/indexes/texts/", "/indexes/{name}/"))
        for path, operations in document["paths"].items()
        for method in operations
    }
    assert paths == routes


def test_every_error_of_a_request_is_documented(document: Any) -> None:
    statuses = {str(status) for _, status in STATUS} - {"401", "403"} | {"200"}
    assert set(document["paths"]["/search"]["post"]["responses"]) == statuses
    for operations in document["paths"].values():
        for operation in operations.values():
            for status, response in operation["responses"].items():
                assert "X-Request-Id" in response["headers"]
                assert ("Retry-After" in response["headers"]) == (status in ("429", "503"))
                assert ("Retry-After-Ms" in response["headers"]) == (status in ("429", "503"))


@pytest.fixture(scope="module")
def key_and_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    key, file = new_key(), tmp_path_factory.mktemp("keys") / "keys.toml"
    file.write_bytes(added(b"", "test", key, scopes=["read"]))
    file.chmod(0o600)
    return key, file


def test_where_keys_are_asked_for_the_document_says_how_and_of_which_routes(key_and_file: tuple[str, Path]) -> None:
    key, file = key_and_file
    handlers = node(service.index("texts"), ServeSettings(keys=str(file)))[2]
    handlers.app()
    declared = {(route.method.lower(), route.path): route.scope for route in handlers.routes.values()}
    with service.running(service.index("texts"), keys=file) as running:
        document = running.get("/openapi.json", Authorization=f"Bearer {key}").json()
    schemes = document["components"]["securitySchemes"]
    assert schemes == {
        "bearer": {"type": "http", "scheme": "bearer"},
        "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
    }
    statuses = {str(status) for _, status in STATUS} | {"200"}
    assert set(document["paths"]["/search"]["post"]["responses"]) == statuses
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            scope = declared[method, path.replace("/indexes/texts/", "/indexes/{name}/")]
            assert operation["security"] == ([] if scope == "open" else [{"bearer": []}, {"key": []}])
            asked = {"401", "403", "429"} & set(operation["responses"])
            assert asked == (set() if scope == "open" else {"401", "403", "429"}), path
            if scope != "open":
                assert "WWW-Authenticate" in operation["responses"]["401"]["headers"]
    openapi_spec_validator = pytest.importorskip("openapi_spec_validator")
    openapi_spec_validator.OpenAPIV31SpecValidator(document).validate()


def test_where_no_keys_are_asked_for_the_document_does_not_speak_of_them(document: Any) -> None:
    assert "securitySchemes" not in document["components"]
    assert not any("security" in operation for path in document["paths"].values() for operation in path.values())


def test_defaults_in_the_document_are_the_defaults_of_the_service(bounded: Service, document: Any) -> None:
    schema = document["components"]["schemas"]["Search_texts"]["oneOf"][0]["properties"]
    assert len(bounded.search(id="t-1")["results"]) == schema["k"]["default"]
    explained = bounded.search(id="t-1", include=["explain"])["explain"][0]["params"]
    assert explained == {
        name: param["default"]
        for name, param in schema["params"]["properties"].items()
        if "default" in param and name != "exact"
    }


@pytest.mark.timeout(240)
def test_schemathesis_finds_nothing(tmp_path: Path) -> None:
    """Phases examples, coverage and fuzzing, all checks, against the index that has every kind of field."""
    (tmp_path / "hooks.py").write_text(HOOKS)
    (tmp_path / "schemathesis.toml").write_text(CONFIG)
    seen_file = tmp_path / "seen.json"
    # The document cannot count conditions over several levels either, so that bound is out of reach here.
    # And it draws texts of every allowed length, which for the million of the default takes it minutes.
    limits = {"max_filter_nodes": 10_000, "max_text_chars": 8192, "max_embed_chars": 8192}
    with service.running(service.index("texts"), **limits) as running:
        command = [
            *(sys.executable, "-m", "schemathesis.cli", "run", f"{running.url}/openapi.json"),
            *("--phases", "examples,coverage,fuzzing", "--checks", "all", "--max-examples", "16", "--seed", "7"),
            *("--generation-database", "none", "--continue-on-failure"),
            # The same handlers again, under the name of the index.
            *("--exclude-path-regex", "^/indexes/[a-z]+/(search|embed)"),
        ]
        environ = {**os.environ, "SCHEMATHESIS_HOOKS": "hooks", "PYTHONPATH": str(tmp_path), "SEEN": str(seen_file)}
        run = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    seen = json.loads(seen_file.read_text())
    for answered in (
        *("POST /search application/json 200", "POST /search application/octet-stream 200"),
        *("POST /search/batch application/json 200", "POST /search/batch application/octet-stream 200"),
        *("POST /v1/embeddings application/json 200", "POST /v1/embeddings application/json 422"),
        *("POST /embed application/json 200", "POST /embed application/json 422"),
        *("GET /search None 200", "POST /search application/json 422", "POST /search/batch application/json 422"),
    ):
        assert seen.get(answered, 0) > 0, f"{answered} never happened: {seen}"
