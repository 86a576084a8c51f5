"""Broken, hostile and slow clients: each gets the status it earned and a message that names the value, and the
next good request is answered. Never a 5xx, never a hang, never a traceback in the log."""

from __future__ import annotations

import base64
import contextlib
import gzip
import http.client
import json
import random
import socket
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import service
from attacks import JSON_TYPE, assert_refused, head, parse
from service import BINARY, DIM, JSON, Reply, Service, corpora

GOOD = {"vector": [0.5, -0.25, 1, 0, 0, 0, 0, 0.125], "k": 3}
VECTOR = "[" + ",".join(["1"] * DIM) + "]"
MAX_BODY = 8 << 20


@pytest.fixture(scope="module")
def target() -> Iterator[Service]:
    limits = {"max_query_bytes": MAX_BODY, "max_body_bytes": MAX_BODY}
    with service.running(service.index("texts"), reload_poll_s=0, **limits) as running:
        yield running


@pytest.fixture(autouse=True)
def the_next_good_request_is_answered(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever a test did to the target, the client beside it keeps its connection and gets its answer."""
    if "target" not in request.fixturenames:
        yield
        return
    running: Service = request.getfixturevalue("target")
    with contextlib.closing(running.connect(timeout_s=5)) as beside:
        assert_good(beside)
        kept = beside.sock
        yield
        assert_good(beside)
        assert beside.sock is kept


def assert_good(connection: http.client.HTTPConnection) -> None:
    reply = service.ask(connection, "POST", "/search", json.dumps(GOOD).encode(), JSON)
    expected = corpora()["texts"].ids_of(GOOD["vector"], 3)
    assert [hit["id"] for hit in reply.results] == expected


# --------------------------------------------------------------------------------------------- JSON bodies

V = VECTOR
NAN_BYTES = base64.b64encode(struct.pack("<8f", *[float("nan")] * 8)).decode()

BODIES: list[tuple[str, str | bytes, int, str]] = [
    ("empty", b"", 400, "the body is empty"),
    ("blank", b"  \n", 400, "no JSON"),
    ("null", "null", 422, "Expected `object`, got `null`"),
    ("list", "[]", 422, "Expected `object`, got `array`"),
    ("number", "5", 422, "Expected `object`, got `int`"),
    ("text", '"river"', 422, "Expected `object`, got `str`"),
    ("empty object", "{}", 422, "exactly one of text, vector and id, got none"),
    ("cut", '{"vector": [1, 2', 400, "no JSON"),
    ("trailing", f'{{"vector": {V}}} x', 400, "no JSON"),
    ("two documents", f'{{"vector": {V}}}{{"vector": {V}}}', 400, "no JSON"),
    ("comment", f'{{"vector": {V} /* yes */}}', 400, "no JSON"),
    ("trailing comma", f'{{"vector": {V},}}', 400, "no JSON"),
    ("single quotes", f"{{'vector': {V}}}", 400, "no JSON"),
    ("byte order mark", b"\xef\xbb\xbf" + json.dumps(GOOD).encode(), 400, "no JSON"),
    ("UTF-16", json.dumps(GOOD).encode("utf-16"), 400, "no JSON"),
    ("bad UTF-8", b'{"text": "\xff\xfe"}', 400, "no JSON"),
    ("overlong UTF-8", b'{"text": "\xc0\xaf"}', 400, "no JSON"),
    ("UTF-8 surrogate", b'{"text": "\xed\xa0\x80"}', 400, "no JSON"),
    ("lone surrogate", r'{"text": "\ud800"}', 400, "no JSON"),
    ("lone surrogate in a filter", r'{"text": "a", "filter": {"lang": "\udc00"}}', 400, "no JSON"),
    ("control character", b'{"text": "a\x01"}', 400, "no JSON"),
    ("NUL", b'{"text": "a\x00"}', 400, "no JSON"),
    ("binary", bytes(range(256)), 400, "no JSON"),
    ("form", b"text=river&k=3", 400, "no JSON"),
    ("duplicate keys that disagree with the type", '{"k": 3, "k": "3", "text": "a"}', 422, "$.k"),
    ("unknown field", f'{{"vector": {V}, "K": 3}}', 422, "unknown field `K`; known are: k, limit, top_k"),
    ("unknown field of rerank", f'{{"vector": {V}, "rerank": {{"dept": 3}}}}', 422, "known are: depth, model"),
    ("unknown model", f'{{"vector": {V}, "rerank": {{"depth": 9, "model": "x"}}}}', 422, "known are: exact; the value"),
    ("unknown include", f'{{"vector": {V}, "include": ["id"]}}', 422, "known are: fields, vector, explain; the value"),
    ("a field like a place", f'{{"vector": {V}, "a - at `$.rerank": 1}}', 422, "the body: Object contains unknown"),
    ("unknown field, long", f'{{"vector": {V}, "{"x" * 300}": 3}}', 422, "unknown field"),
    ("prototype", f'{{"vector": {V}, "__proto__": 3}}', 422, "unknown field `__proto__`"),
    ("lexical is not built yet", '{"text": "a", "mode": "lexical"}', 422, "unknown field `mode`"),
    ("two questions", f'{{"vector": {V}, "text": "a"}}', 422, "got text and vector"),
    # numbers
    ("NaN", '{"vector": [NaN,1,1,1,1,1,1,1]}', 400, "no JSON"),
    ("Infinity", '{"vector": [Infinity,1,1,1,1,1,1,1]}', 400, "no JSON"),
    ("-Infinity", '{"vector": [-Infinity,1,1,1,1,1,1,1]}', 400, "no JSON"),
    ("1e999", '{"vector": [1e999,1,1,1,1,1,1,1]}', 400, "no JSON"),
    ("1e39", '{"vector": [1,1,1e39,1,1,1,1,1]}', 422, "vector[2] is inf; values must be finite and within"),
    ("-1e39", '{"vector": [1,1,-1e39,1,1,1,1,1]}', 422, "vector[2] is -inf"),
    ("1e16", '{"vector": [1,1,1,1,1,1,1,1e16]}', 422, "vector[7] is 1e+16; values must be finite and within ±1e+15"),
    ("2**70", f'{{"vector": [{2**70},1,1,1,1,1,1,1]}}', 422, "vector[0] is 1.18059e+21"),
    ("400 digits", f'{{"vector": [{"9" * 400},1,1,1,1,1,1,1]}}', 422, "$.vector[0]: Number out of range"),
    ("5000 digits", f'{{"vector": [{"9" * 5000},1,1,1,1,1,1,1]}}', 400, "out of range"),
    ("zeros under cosine", '{"vector": [0,0,0,0,0,0,0,0]}', 422, "vector is all zeros"),
    ("-0 under cosine", '{"vector": [-0,-0.0,0,0,0,0,0,0e5]}', 422, "vector is all zeros"),
    ("too small for float32", '{"vector": [1e-46,1e-300,5e-324,0,0,0,0,0]}', 422, "vector is all zeros"),
    ("leading zero", '{"vector": [01,1,1,1,1,1,1,1]}', 400, "no JSON"),
    ("hexadecimal", '{"vector": [0x1,1,1,1,1,1,1,1]}', 400, "no JSON"),
    ("plus", '{"vector": [+1,1,1,1,1,1,1,1]}', 400, "no JSON"),
    ("bare point", '{"vector": [.5,1,1,1,1,1,1,1]}', 400, "no JSON"),
    (
        "text for a number",
        '{"vector": ["1",1,1,1,1,1,1,1]}',
        422,
        '$.vector[0]: Expected `float`, got `str`; the value is "1"',
    ),
    ("bool for a number", '{"vector": [true,1,1,1,1,1,1,1]}', 422, "$.vector[0]: Expected `float`, got `bool`"),
    ("null for a number", '{"vector": [null,1,1,1,1,1,1,1]}', 422, "$.vector[0]: Expected `float`, got `null`"),
    ("no values", '{"vector": []}', 422, "vector has 0 values"),
    ("one value too few", '{"vector": [1,1,1,1,1,1,1]}', 422, "the vector has 7 values, index 'texts' has dim 8"),
    ("one value too many", '{"vector": [1,1,1,1,1,1,1,1,1]}', 422, "the vector has 9 values, index 'texts' has dim 8"),
    ("20000 values", json.dumps({"vector": [1] * 20_000}), 422, "vector has 20000 values, expected 1 to 16384"),
    ("a number for a vector", '{"vector": 1}', 422, "$.vector: Expected `object | array`, got `int`"),
    ("a text for a vector", f'{{"vector": "{V}"}}', 422, "$.vector: Expected `object | array`, got `str`"),
    ("rows for a vector", f'{{"vector": [{V}]}}', 422, "$.vector[0]: Expected `float`, got `array`"),
    # base64
    ("base64 with a space", '{"vector": {"base64": "AACA PwAA"}}', 422, "base64"),
    ("base64 with a newline", '{"vector": {"base64": "AACAPw\\n=="}}', 422, "base64"),
    ("base64 of URLs", json.dumps({"vector": {"base64": "_" * 43 + "="}}), 422, "Invalid base64"),
    ("base64 without its end", '{"vector": {"base64": "AACAP"}}', 422, "Invalid base64"),
    ("base64 of nothing", '{"vector": {"base64": ""}}', 422, "vector has 0 values"),
    (
        "base64 of float64",
        json.dumps({"vector": {"base64": base64.b64encode(struct.pack("<8d", *range(8))).decode()}}),
        422,
        "16 values",
    ),
    ("base64 of 33 bytes", json.dumps({"vector": {"base64": base64.b64encode(b"\0" * 33).decode()}}), 422, "33 bytes"),
    ("base64 of NaN", json.dumps({"vector": {"base64": NAN_BYTES}}), 422, "vector[0] is nan"),
    ("base64 is a list", '{"vector": {"base64": [1]}}', 422, "$.vector.base64: Expected `bytes`"),
    ("base64 and more", '{"vector": {"base64": "AAAA", "dtype": "f8"}}', 422, "unknown field `dtype`"),
    # k and settings
    *(
        (f"k {k}", f'{{"text": "a", "k": {k}}}', 422, "k")
        for k in ("0", "-1", "1000000000", str(2**70), "1.5", "1e2", "true", '"3"', "null", "[3]", "{}")
    ),
    ("k and limit", '{"text": "a", "k": 3, "limit": 3}', 422, "k and limit mean the same"),
    ("timeout_ms 0", '{"text": "a", "timeout_ms": 0}', 422, "timeout_ms must be between 1 and 30000, got 0"),
    ("timeout_ms negative", '{"text": "a", "timeout_ms": -5}', 422, "got -5"),
    ("timeout_ms of a year", '{"text": "a", "timeout_ms": 3e10}', 422, "got 3e+10"),
    ("include all", '{"text": "a", "include": ["all"]}', 422, "Invalid enum value 'all'"),
    ("params with a list", '{"text": "a", "params": {"ef_search": [64]}}', 422, "params.ef_search must be an integer"),
    ("params null", '{"text": "a", "params": {"max_visited": null}}', 422, "params.max_visited must be an integer"),
    ("params with a path", '{"text": "a", "params": {"../x": 1}}', 422, "'../x'"),
    ("rerank true", '{"text": "a", "rerank": true}', 422, "rerank must be false"),
    (
        "rerank by a model from outside",
        '{"text": "a", "rerank": {"depth": 5, "model": "http://evil/m"}}',
        422,
        "Invalid enum",
    ),
    ("an encoder from outside", '{"text": "a", "encoder": "http://evil/m"}', 422, "unknown field `encoder`"),
    # ids and texts
    ("id true", '{"id": true}', 422, "$.id: Expected `int | str`, got `bool`"),
    ("id 1.5", '{"id": 1.5}', 422, "$.id"),
    ("id of 4000 digits", f'{{"id": {"9" * 4000}}}', 422, "id must be within int64"),
    ("id too long", json.dumps({"id": "x" * 513}), 422, "id has 513 bytes, the limit max_id_bytes is 512"),
    ("id too long in bytes", json.dumps({"id": "日" * 171}), 422, "id has 513 bytes"),
    ("id unknown", '{"id": "nobody"}', 404, "has no id 'nobody'"),
    ("id of 512 bytes", json.dumps({"id": "x" * 512}), 404, "has no id 'xxx"),
    ("id with a header", r'{"id": "x\r\nSet-Cookie: a=b\r\n\r\n<script>"}', 404, r"'x\r\nSet-Cookie: a=b"),
    ("id with an escape sequence", '{"id": "\\u001b[31m\\u009b0m"}', 404, r"'\x1b[31m\x9b0m'"),
    ("text empty", '{"text": ""}', 422, "text is empty"),
    ("text blank", '{"text": " \\t\\u00a0\\u2028"}', 422, "text is empty"),
    (
        "text too long",
        json.dumps({"text": "x" * 1_000_001}),
        422,
        "text has 1000001 characters, the limit max_text_chars is 1000000",
    ),
    ("text a list", '{"text": ["a"]}', 422, "$.text: Expected `str`, got `array`"),
    # filters
    ("filter a list", '{"text": "a", "filter": [1]}', 422, "$.filter: Expected `object`, got `array`"),
    ("filter unknown field", '{"text": "a", "filter": {"no": 1}}', 422, "'no' is no stored field"),
    ("filter with code", '{"text": "a", "filter": {"$where": "sleep(9)"}}', 422, "'$where' is no operator"),
    ("filter with a regular expression", '{"text": "a", "filter": {"lang": {"$regex": "(a+)+$"}}}', 422, "'$regex'"),
    (
        "filter of 65 conditions",
        json.dumps({"text": "a", "filter": {"$and": [{"year": i} for i in range(65)]}}),
        422,
        "more than 64 conditions",
    ),
    (
        "filter of 9 levels",
        '{"text": "a", "filter": ' + '{"$and": [' * 9 + "{}" + "]}" * 9 + "}",
        422,
        "nested deeper than 8",
    ),
    (
        "filter with a million values",
        json.dumps({"text": "a", "filter": {"year": {"$in": [7] * 1_000_000}}}),
        422,
        "$in of 'year' has 1000000 values, the limit is 1024",
    ),
    ("filter with a huge number", f'{{"text": "a", "filter": {{"price": {"9" * 400}}}}}', 422, "cannot read"),
    # nesting
    *(
        (f"{what} 100000 deep", start + "[" * 100_000, 400, "no JSON")
        for what, start in (
            ("body", ""),
            ("filter", '{"text": "a", "filter": {"a": '),
            ("params", '{"text": "a", "params": {"a": '),
        )
    ),
    ("closed nesting", '{"filter": {"a": ' + "[" * 100_000 + "]" * 100_000 + "}}", 400, "nested too deep"),
    ("nested objects", '{"filter": ' + '{"$and": [' * 50_000 + "]}" * 50_000 + "}", 400, "nested too deep"),
]


@pytest.mark.parametrize(("body", "status", "message"), [b[1:] for b in BODIES], ids=[b[0] for b in BODIES])
def test_a_bad_body_gets_its_status_and_a_message_that_names_the_value(
    target: Service, body: str | bytes, status: int, message: str
) -> None:
    data = body.encode() if isinstance(body, str) else body
    assert_refused(target.post("/search", data), status, message)
    if status == 400:
        assert target.post("/search/batch", data).status == 400


BATCHES: list[tuple[str, str, int, str]] = [
    ("empty object", "{}", 422, "exactly one of texts and vectors, got none"),
    ("both", f'{{"texts": ["a"], "vectors": [{V}]}}', 422, "got both"),
    ("no rows", '{"vectors": []}', 422, "the batch has 0 queries, expected 1 to 1024"),
    ("no texts", '{"texts": []}', 422, "the batch has 0 queries"),
    ("1025 texts", json.dumps({"texts": ["a"] * 1025}), 422, "the batch has 1025 queries"),
    ("ragged", f'{{"vectors": [{V}, [1, 2]]}}', 422, "vectors[1] has 2 values, vectors[0] has 8"),
    ("one wrong dim", '{"vectors": [[1, 2], [3, 4]]}', 422, "the vector has 2 values, index 'texts' has dim 8"),
    ("a zero row", f'{{"vectors": [{V}, [0,0,0,0,0,0,0,0]]}}', 422, "vectors[1] is all zeros"),
    ("an infinite row", f'{{"vectors": [{V}, [1,1,1,1,1,1,1,1e39]]}}', 422, "vectors[1][7] is inf"),
    ("a bad row", f'{{"vectors": [{V}, "x"]}}', 422, "$.vectors[1]"),
    ("flat", f'{{"vectors": {V}}}', 422, "$.vectors[0]"),
    ("bad base64", f'{{"vectors": [{V}, {{"base64": "AAA"}}]}}', 422, "$.vectors[1].base64"),
    ("an empty text", '{"texts": ["a", "b", " "]}', 422, "texts[2] is empty"),
    ("a long text", json.dumps({"texts": ["a", "x" * 1_000_001]}), 422, "texts[1] has 1000001 characters"),
    ("an id", '{"id": "t-1"}', 422, "unknown field `id`"),
]


@pytest.mark.parametrize(("body", "status", "message"), [b[1:] for b in BATCHES], ids=[b[0] for b in BATCHES])
def test_a_bad_batch_names_the_row(target: Service, body: str, status: int, message: str) -> None:
    assert_refused(target.post("/search/batch", body.encode()), status, message)


@pytest.mark.parametrize(
    "vector",
    [
        [1e-45] * DIM,
        [1e-45, -1e-45, 0, 0, 0, 0, 0, 0],
        [1e-40, 3e-39, -2e-41, 1e-45, 0, 0, 0, 1e-38],
        [1e-30, 1, 0, 0, 0, 0, 0, -1],
        [1e15, -1e15, 1e15, 1, 1, 1e-15, 0, 0],
        [1e15] * DIM,
        [-0.0, 1, -0.0, 0, 0, 0, 0, 0],
        [2**53, -(2**49), 1, 0, 0, 0, 0, 0],
    ],
)
@pytest.mark.parametrize("params", [{}, {"exact": True}], ids=["index", "exact"])
def test_extreme_vectors_within_the_bounds_are_answered_as_brute_force_does(
    target: Service, vector: list[float], params: Any
) -> None:
    if max(map(abs, vector)) > 1e15:
        assert_refused(target.post("/search", {"vector": vector}), 422, "within ±1e+15")
        return
    answer = target.search(vector=vector, k=60, params=params)
    expected = dict(corpora()["texts"].nearest(np.array(vector, dtype=np.float32), 60))
    assert {hit["id"] for hit in answer["results"]} == expected.keys()
    for hit in answer["results"]:
        assert hit["distance"] == pytest.approx(expected[hit["id"]], abs=1e-5)


def test_of_duplicate_keys_the_last_counts(target: Service) -> None:
    assert len(target.post("/search", b'{"text": "river", "k": 1, "k": 4}').results) == 4


def test_more_rows_than_there_are_come_back_as_all_there_are(target: Service) -> None:
    assert len(target.search(text="river", k=1000)["results"]) == 60


@pytest.mark.parametrize(
    "question",
    [
        '{"text": "a", "filter": {"a": %s}}',
        '{"text": "a", "filter": {"a": {"$in": %s}}}',
        '{"text": "a", "filter": {"$and": %s}}',
        '{"text": "a", "params": {"a": %s}}',
        '{"text": "a", "k": %s}',
        '{"id": %s}',
        '{"vector": %s}',
        "%s",
    ],
)
def test_nesting_of_every_depth_around_the_interpreter_s_limit_is_refused(target: Service, question: str) -> None:
    with contextlib.closing(target.connect()) as connection:
        for depth in [*range(1, 20), *range(880, 1040)]:
            body = (question % ("[" * depth + "]" * depth)).encode()
            reply = service.ask(connection, "POST", "/search", body, JSON)
            assert reply.status in (400, 422) and len(reply.message) < 1000, depth


# ------------------------------------------------------------------------------------------ types and codings


@pytest.mark.parametrize(
    "type",
    [
        None,
        "",
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "application/jsonx",
        "application/octet-streams",
        "application/vnd.api+json",
        "text/json",
        "json",
        "*/*",
        "application/json, application/octet-stream",
        "\x80\xff",
        "a" * 5000,
    ],
)
def test_another_content_type_is_415_and_named(target: Service, type: str | None) -> None:
    body = json.dumps(GOOD).encode()
    raw = head(Content_Length=len(body)).removesuffix(b"\r\n")
    if type is not None:
        raw += b"Content-Type: " + type.encode("latin-1") + b"\r\n"
    reply = parse(target.raw(raw + b"\r\n" + body))
    assert_refused(reply, 415, "expected application/json or application/octet-stream")
    assert repr((type or "").encode("latin-1").decode("utf-8", "surrogateescape")[:80]) in reply.message


@pytest.mark.parametrize("type", ["application/json", "Application/JSON; charset=utf-8", "application/json;x=y"])
def test_parameters_and_case_of_the_content_type_do_not_matter(target: Service, type: str) -> None:
    assert target.ask("POST", "/search", json.dumps(GOOD).encode(), {"Content-Type": type}).status == 200


def test_a_multipart_upload_is_415(target: Service) -> None:
    body = b'--x\r\nContent-Disposition: form-data; name="f"; filename="a"\r\n\r\nhello\r\n--x--\r\n'
    reply = target.ask("POST", "/search", body, {"Content-Type": "multipart/form-data; boundary=x"})
    assert_refused(reply, 415, "multipart/form-data")


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "zstd", "identity", "gzip, gzip", "nonsense"])
@pytest.mark.parametrize("body", [gzip.compress(json.dumps(GOOD).encode(), mtime=0), b"no gzip at all", b""])
def test_a_coded_body_is_415_whatever_is_in_it(target: Service, coding: str, body: bytes) -> None:
    reply = target.ask("POST", "/search", body, {**JSON, "Content-Encoding": coding})
    assert_refused(reply, 415, "Content-Encoding")


def test_a_gzip_bomb_is_415_and_does_not_go_off(target: Service) -> None:
    bomb = gzip.compress(b"\0" * (200 << 20), 9, mtime=0)
    before = target.rss_bytes()
    for headers in ({}, {"Transfer-Encoding": "chunked"}):
        data = b"%x\r\n%s\r\n0\r\n\r\n" % (len(bomb), bomb) if headers else bomb
        length = None if headers else len(bomb)
        named = {**headers, "Content_Type": JSON_TYPE, "Content_Encoding": "gzip", "Content_Length": length}
        assert_refused(parse(target.raw(head(**named) + data)), 415, "Content-Encoding")
    assert target.rss_bytes() - before < 32 << 20


# ------------------------------------------------------------------------------------------------ binary bodies


ROW = np.arange(1, DIM + 1, dtype="<f4")


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/search", b"", "the body is empty, expected rows of 8"),
        ("/search", ROW.tobytes()[:-1], "the body has 31 bytes, expected a multiple of 32: rows of 8 little-endian"),
        ("/search", ROW.tobytes() + b"\0", "the body has 33 bytes"),
        ("/search", ROW.astype("<f8").tobytes(), "float64 is not read, send float32"),
        ("/search", ROW.tobytes() * 3, "it holds more than one vector; send batches to /search/batch"),
        ("/search", np.ones(7, "<f4").tobytes(), "the body has 28 bytes"),
        ("/search", np.zeros(8, "<f4").tobytes(), "vector is all zeros"),
        ("/search", np.full(8, np.nan, "<f4").tobytes(), "vector[0] is nan"),
        ("/search", np.array([1, 1, 1, 1, 1, 1, -np.inf, 1], "<f4").tobytes(), "vector[6] is -inf"),
        ("/search", np.full(8, 1e30, "<f4").tobytes(), "vector[0] is 1e+30"),
        ("/search", b"\x00\x01\xff\xff" * 8, "vector[0] is nan"),
        ("/search/batch", b"", "the body is empty"),
        ("/search/batch", ROW.tobytes() * 2 + b"\0\0", "the body has 66 bytes"),
        ("/search/batch", ROW.tobytes() * 1025, "the batch has 1025 queries, expected 1 to 1024"),
        ("/search/batch", ROW.tobytes() + np.zeros(8, "<f4").tobytes(), "vectors[1] is all zeros"),
        ("/search/batch", ROW.tobytes() + np.full(8, np.nan, "<f4").tobytes(), "vectors[1][0] is nan"),
        ("/search?k=0", ROW.tobytes(), "k must be an integer between 1 and 1000, got 0"),
        ("/search?k=3&k=4", ROW.tobytes(), "?k is given twice"),
        ("/search?k=3&topK=4", ROW.tobytes(), "k and topK mean the same"),
        ("/search?filter=x", ROW.tobytes(), "filter cannot stand in a URL"),
        ("/search?unheard_of=1", ROW.tobytes(), "unheard_of"),
        ("/search?k=%00", ROW.tobytes(), "k must be an integer"),
        ("/search?k=%F0%9F%98%80", ROW.tobytes(), "k must be an integer"),
        ("/search?k=" + "9" * 4000, ROW.tobytes(), "k must be an integer"),
        ("/search?%ff%fe=1", ROW.tobytes(), "no parameters" if service.GRAPH == "exact" else "hnsw knows"),
        ("/search?timeout_ms=inf", ROW.tobytes(), "timeout_ms must be between"),
    ],
)
def test_bad_binary_rows_are_422_and_say_what_would_be_right(
    target: Service, path: str, body: bytes, message: str
) -> None:
    assert_refused(target.ask("POST", path, body, BINARY), 422, message)


def test_big_endian_rows_are_other_numbers_and_no_accident(target: Service) -> None:
    """Nothing in the bytes says how they are meant, so they are read as they must be: refused or answered, no more."""
    reply = target.ask("POST", "/search", ROW.astype(">f4").tobytes(), BINARY)
    assert reply.status in (200, 422)


# ------------------------------------------------------------------------------------------------ size and framing

BODY = json.dumps(GOOD).encode()


@pytest.mark.alone
@pytest.mark.parametrize(
    ("raw", "status", "message"),
    [
        (head(Content_Type=JSON_TYPE, Content_Length=99999999999), 413, "99999999999 bytes, the limit here is 8388608"),
        (head(Content_Type=JSON_TYPE, Content_Length=MAX_BODY + 1), 413, f"the limit here is {MAX_BODY}"),
        (head(Content_Type=JSON_TYPE, Content_Length=2**63), 413, "9223372036854775808 bytes"),
        (head(Content_Type=JSON_TYPE, Content_Length=10**30), 400, "Content-Length"),
        (head(Content_Type=JSON_TYPE, Content_Length=-1), 400, "Content-Length"),
        (head(Content_Type=JSON_TYPE, Content_Length="5x"), 400, "Content-Length"),
        (head(Content_Type=JSON_TYPE, Content_Length="0x10"), 400, "Content-Length"),
        (head(Content_Type=JSON_TYPE, Content_Length="1_0"), 400, "Content-Length"),
        (head(Content_Type=JSON_TYPE, Content_Length="+5"), 400, "Content-Length"),
        (head(Content_Type=JSON_TYPE, Content_Length="", content_length="7"), 400, "Content-Length"),
        (head(Content_Type=JSON_TYPE, Content_Length=5, content_length=6) + b"{}{}{}", 400, "Content-Length"),
        (head(Content_Type=JSON_TYPE, Content_Length=5, Transfer_Encoding="chunked") + b"0\r\n\r\n", 400, "Transfer"),
        (head(Content_Type=JSON_TYPE, Transfer_Encoding="chunked") + b"ZZ\r\n{}\r\n0\r\n\r\n", 400, "chunk size"),
        (head(Content_Type=JSON_TYPE, Transfer_Encoding="chunked") + b"-1\r\n{}\r\n0\r\n\r\n", 400, "chunk size"),
        (head(Content_Type=JSON_TYPE, Transfer_Encoding="chunked") + b"F" * 17 + b"\r\n{}\r\n", 400, "Chunk size"),
        (head(Content_Type=JSON_TYPE, Transfer_Encoding="chunked") + b"2\r\n{}xx\r\n0\r\n\r\n", 400, ""),
        (head(Content_Type=JSON_TYPE, Transfer_Encoding="cow, chunked") + b"0\r\n\r\n", 400, ""),
        (head(Content_Type=JSON_TYPE, Transfer_Encoding="chunked, cow") + b"0\r\n\r\n", 400, ""),
        (head(Content_Type=JSON_TYPE, Content_Length=10) + BODY, 400, ""),
    ],
)
def test_bodies_of_impossible_length_are_refused_at_once(
    target: Service, raw: bytes, status: int, message: str
) -> None:
    started = time.monotonic()
    with target.socket() as sock:
        sock.sendall(raw)
        reply = parse(sock.recv(1 << 16))
    assert_refused(reply, status, message)
    assert time.monotonic() - started < 1


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_over_the_limit_is_413_and_one_at_the_limit_is_read(target: Service, chunked: bool) -> None:
    def send(size: int) -> Reply:
        body = BODY.ljust(size)  # blanks after the document are JSON
        parts = iter([body[i : i + 65_536] for i in range(0, size, 65_536)])
        with contextlib.closing(target.connect(timeout_s=20)) as connection:
            connection.request("POST", "/search", parts if chunked else body, JSON, encode_chunked=chunked)
            response = connection.getresponse()
            headers = {name.lower(): value for name, value in response.getheaders()}
            return Reply(response.status, headers, response.read())

    assert send(MAX_BODY).status == 200
    try:
        reply = send(MAX_BODY + 65_536)
    except (BrokenPipeError, ConnectionResetError):
        assert chunked  # the service hung up while the client was still sending
    else:
        assert_refused(reply, 413, f"the limit here is {MAX_BODY}")


def test_an_endless_body_is_413_and_not_kept(target: Service) -> None:
    before = target.rss_bytes()
    sent = 0
    with target.socket() as sock:

        def send() -> None:
            nonlocal sent
            with contextlib.suppress(OSError):
                while sent < 256 << 20:
                    sock.sendall(b"10000\r\n" + b" " * 65_536 + b"\r\n")
                    sent += 65_536

        sock.sendall(head(Content_Type=JSON_TYPE, Transfer_Encoding="chunked"))
        thread = threading.Thread(target=send)
        thread.start()
        reply = parse(sock.recv(1 << 16))
        sock.shutdown(socket.SHUT_RDWR)
        thread.join()
    assert_refused(reply, 413, f"the limit here is {MAX_BODY}")
    assert sent < 64 << 20
    assert target.rss_bytes() - before < 4 * MAX_BODY


@pytest.mark.parametrize("cut", [1, 20, len(BODY) - 1])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_client_that_leaves_in_the_middle_of_its_body_disturbs_nobody(
    target: Service, cut: int, chunked: bool
) -> None:
    framing: dict[str, Any] = {"Transfer_Encoding": "chunked"} if chunked else {"Content_Length": len(BODY)}
    data = b"%x\r\n" % len(BODY) if chunked else b""
    with target.socket() as sock:
        sock.sendall(head(Content_Type=JSON_TYPE, **framing) + data + BODY[:cut])
        if cut % 2:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # leave with a reset


@pytest.mark.parametrize("after", [b"", b"POST", head()[:-1], head(Content_Type=JSON_TYPE, Content_Length=5) + b"{"])
def test_a_client_that_stops_sending_gets_nothing_or_a_refusal(target: Service, after: bytes) -> None:
    raw = target.raw(after, shut=True, timeout_s=5)
    assert raw == b"" or parse(raw).status in (400, 408)


def test_a_length_that_is_too_long_waits_no_longer_than_the_client(target: Service) -> None:
    assert target.raw(head(Content_Type=JSON_TYPE, Content_Length=len(BODY) + 1) + BODY, shut=True) == b""


def test_half_closing_after_a_whole_request_is_no_error(target: Service) -> None:
    raw = target.raw(head(Content_Type=JSON_TYPE, Content_Length=len(BODY)) + BODY, shut=True)
    assert raw == b"" or parse(raw).status == 200


def test_a_body_in_many_small_chunks_is_read(target: Service) -> None:
    chunks = b"".join(b"1\r\n%c\r\n" % letter for letter in BODY)
    raw = target.raw(head(Content_Type=JSON_TYPE, Transfer_Encoding="chunked") + chunks + b"0\r\nX-Trailer: 1\r\n\r\n")
    assert parse(raw).status == 200


def test_a_request_byte_by_byte_is_read(target: Service) -> None:
    with target.socket() as sock:
        for byte in head(Content_Type=JSON_TYPE, Content_Length=len(BODY)) + BODY:
            sock.sendall(bytes([byte]))
        assert parse(service.read_all(sock)).status == 200


def test_pipelined_requests_are_answered_in_their_order(target: Service) -> None:
    raw = b""
    for number in range(50):
        body = json.dumps({"id": f"nobody-{number}"}).encode()
        raw += head(Content_Type=JSON_TYPE, Content_Length=len(body), Connection="keep-alive") + body
    replies = target.raw(raw + head("GET", "/livez"))
    assert [f"nobody-{number}'" in replies.decode() for number in range(50)] == [True] * 50
    order = [replies.index(b"nobody-%d'" % number) for number in range(50)]
    assert order == sorted(order) and replies.endswith(b'{"status":"alive"}')


def test_what_follows_a_refused_body_is_not_taken_for_a_request(target: Service) -> None:
    """A body that is not read may hold a request; whoever put it there must not get an answer to it."""
    smuggled = head("GET", "/indexes")
    for headers in ({"Content_Type": "text/plain"}, {"Content_Type": JSON_TYPE, "Content_Encoding": "gzip"}):
        raw = target.raw(head(Content_Length=len(smuggled), Connection="keep-alive", **headers) + smuggled)
        assert parse(raw).status == 415 and raw.count(b"HTTP/1.1") == 1
    raw = target.raw(
        head("PUT", Content_Length=len(smuggled), Connection="keep-alive") + smuggled + head("GET", "/livez")
    )
    assert raw.count(b"HTTP/1.1") == 2 and raw.endswith(b'{"status":"alive"}')


def test_expect_100_continue_is_granted_and_other_expectations_are_417(target: Service) -> None:
    with target.socket() as sock:
        sock.sendall(head(Content_Type=JSON_TYPE, Content_Length=len(BODY), Expect="100-continue"))
        assert sock.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(BODY)
        assert parse(service.read_all(sock)).status == 200
    reply = parse(target.raw(head(Content_Type=JSON_TYPE, Content_Length=len(BODY), Expect="200-maybe") + BODY))
    assert_refused(reply, 417, "'200-maybe'")


def test_a_body_that_is_too_large_is_refused_before_it_is_continued(target: Service) -> None:
    with target.socket() as sock:
        sock.sendall(head(Content_Type=JSON_TYPE, Content_Length=10**10, Expect="100-continue"))
        received = sock.recv(1 << 16)
        while b"413" not in received:
            received += sock.recv(1 << 16)


# ------------------------------------------------------------------------------------------------ heads and paths


@pytest.mark.parametrize(
    "raw",
    [
        b"\r\n\r\n\r\nnonsense\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(60)) + b"\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: x\r\nA\0b: c\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: x\r\nAb: c\0d\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: x\r\nAb : c\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: x\r\n: c\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: x\r\nno colon\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: x\r\nA: b\r\n folded\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n",
        b"GET /livez HTTP/1.1\r\n\r\n",
        b"GET /livez HTTP/9.9\r\nHost: x\r\n\r\n",
        b"GET /li vez HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /livez\0 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /indexes/\xc3\xa9 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"G\xc3\x89T /livez HTTP/1.1\r\nHost: x\r\n\r\n",
        b"FOO /livez HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /livez?" + b"x" * 40_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: x\r\nA: " + b"x" * 9_000 + b"\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: x\r\n" + b"x" * 9_000 + b": a\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: x\r\n" + b"".join(b"X%d: 1\r\n" % i for i in range(1000)) + b"\r\n",
    ],
    ids=lambda raw: repr(raw[:40]),
)
def test_what_is_no_http_is_400_in_json_and_the_connection_closes(target: Service, raw: bytes) -> None:
    assert_refused(parse(target.raw(raw)), 400, "this is no HTTP request: ")


@pytest.mark.parametrize("path", ["/search", "/search/batch", "/indexes", "/indexes/texts", "/livez", "/openapi.json"])
@pytest.mark.parametrize("method", ["HEAD", "OPTIONS", "TRACE", "PUT", "DELETE", "PATCH", "CONNECT", "PROPFIND"])
def test_other_methods_are_405_with_allow(target: Service, method: str, path: str) -> None:
    if method == "CONNECT":
        assert_refused(parse(target.raw(head(method, "x:80"))), 404, "CONNECT")
        return
    reply = parse(target.raw(head(method, path)).replace(b"\r\n\r\n", b"\r\n\r\n", 1))
    assert reply.status == 405 and set(reply.headers["allow"].split(",")) <= {"GET", "POST"}
    if method != "HEAD":
        assert f"{method} {path}" in reply.message
    else:
        assert reply.body == b""


NAMES = [
    "..",
    "../texts",
    "..%2ftexts",
    "%2e%2e%2f%2e%2e%2fetc%2fpasswd",
    "%252e%252e%252f",
    "..%5c..%5cwindows",
    "%2fetc%2fpasswd",
    "texts%00",
    "%00",
    "texts%0d%0aSet-Cookie:%20a=b",
    "texts%20",
    "TEXTS",
    "t%C3%A9xts",
    "%ED%A0%80",
    "%FF%FE",
    "%EF%BC%8E%EF%BC%8E",  # full-width dots
    "x" * 255,
    "x" * 256,
    "x" * 8000,
    "~root",
    "$HOME",
    "{name}",
    "v1",
    "texts%2fv1",
    ".staging-v1",
    "CURRENT",
    ";ls",
    "a%27%20or%201=1",
    "%3Cscript%3E",
]


@pytest.mark.parametrize("name", NAMES, ids=[name[:30] for name in NAMES])
@pytest.mark.parametrize("tail", ["", "/search", "/search/batch"])
def test_a_name_from_outside_is_looked_up_and_never_a_path(target: Service, name: str, tail: str) -> None:
    if tail:
        question = {"vectors": [GOOD["vector"]]} if tail.endswith("batch") else GOOD
        body = json.dumps(question).encode()
        raw = target.raw(
            head("POST", f"/indexes/{name}{tail}", Content_Type=JSON_TYPE, Content_Length=len(body)) + body
        )
    else:
        raw = target.raw(head("GET", f"/indexes/{name}"))
    reply = parse(raw)
    assert_refused(reply, 404, "")
    assert "set-cookie" not in reply.headers and b"root:" not in raw


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/", 404),
        ("//", 404),
        ("/search/", 404),
        ("/search//batch", 404),
        ("/./livez", 404),
        ("/indexes/../livez", 404),
        ("/LIVEZ", 404),
        ("/indexes/", 404),
        ("/indexes//search", 404),
        ("/favicon.ico", 404),
        ("/admin", 404),
        ("/metrics", 404),
        ("*", 400),
        ("http://elsewhere/livez", 200),
        ("/livez?" + "a=b&" * 2000, 200),
        ("/livez#fragment", 200),
        ("/%", 404),
        ("/%zz", 404),
    ],
)
def test_odd_paths_have_one_meaning(target: Service, path: str, status: int) -> None:
    reply = parse(target.raw(head("GET", path)))
    assert reply.status == status
    assert status == 200 or reply.message


@pytest.mark.parametrize("id", ["a\r\nX: y", "a\nX: y", "%0d%0aX:y", "a\x00b", "\x1b[31m", "x" * 5000, '"', "é"])
def test_a_request_id_is_echoed_only_where_it_is_harmless(target: Service, id: str) -> None:
    raw = head("GET", "/livez").removesuffix(b"\r\n") + b"X-Request-Id: " + id.encode() + b"\r\n\r\n"
    received = target.raw(raw)
    reply = parse(received)
    assert "x" not in reply.headers and reply.headers.get("x-request-id") != id
    assert reply.status in (200, 400)


def test_hundreds_of_random_mutations_of_a_request_get_an_answer_or_are_hung_up_on(target: Service) -> None:
    chance = random.Random(7)
    whole = head(Content_Type=JSON_TYPE, Content_Length=len(BODY)) + BODY
    statuses = set()
    for number in range(250):
        raw = bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            at = chance.randrange(len(raw))
            match chance.randrange(4):
                case 0:
                    raw[at] = chance.randrange(256)
                case 1:
                    del raw[at : at + chance.randint(1, 9)]
                case 2:
                    raw[at:at] = chance.choice(
                        [b"\0", b"\r\n", b"\n", b"-1", b"99999999", b"[" * 50, b'"', b"\xff", b"%00"]
                    )
                case 3:
                    start = chance.randrange(len(raw))
                    raw[at:at] = raw[start : start + chance.randint(1, 30)]
        received = target.raw(bytes(raw), b"", shut=True, timeout_s=5)
        if received:
            # A mutation may have made two requests of one.
            status = parse(received.replace(b"HTTP/1.1 100 Continue\r\n\r\n", b"")).status
            assert status < 500, (number, bytes(raw))
            statuses.add(status)
    assert statuses >= {200, 400, 404, 415, 422}
