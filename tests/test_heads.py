"""What is remembered of heads is what aiohttp's parser says of them, and no key is among it."""

from __future__ import annotations

import asyncio
import gc

import pytest

from vecsvc import heads, schemas
from vecsvc.access import digest_of
from vecsvc.config import HttpSettings
from vecsvc.heads import Head, Heads
from vecsvc.types import SearchSettings

JSON = f"Content-Type: {schemas.JSON}"
RAW = f"Content-Type: {schemas.BINARY}"


def head(line: str, *fields: str) -> bytes:
    return "\r\n".join([line, "Host: x", *fields, "", ""]).encode()


def read(raw: bytes, known: Heads | None = None) -> Head | None:
    async def look() -> Head | None:
        return (known or Heads(HttpSettings(), 32_768)).of(raw)

    return asyncio.run(look())


def post(path: str, *fields: str) -> Head:
    found = read(head(f"POST {path} HTTP/1.1", *fields))
    assert found is not None
    return found


def test_a_question_is_known_by_its_head() -> None:
    raw = head("POST /search HTTP/1.1", JSON, "Content-Length: 12")
    assert read(raw + b"the body and more") == Head(len(raw), 12, "/search", None, "single", "/search")


@pytest.mark.parametrize(
    ("path", "operation", "name", "load"),
    [
        ("/search", "/search", None, "single"),
        ("/search/batch", "/search/batch", None, "many"),
        ("/embed", "/embed", None, "many"),
        ("/v1/embeddings", "/v1/embeddings", None, "many"),
        ("/indexes/a/search", "/indexes/{name}/search", "a", "single"),
        ("/indexes/a/search/batch", "/indexes/{name}/search/batch", "a", "many"),
        ("/indexes/a/embed", "/indexes/{name}/embed", "a", "many"),
        ("/indexes/a/v1/embeddings", "", None, "none"),
        ("/indexes/a", "", None, "none"),
        ("/indexes//search", "/indexes/{name}/search", "", "single"),
        ("/searches", "", None, "none"),
        ("/search/", "", None, "none"),
        ("//search", "", None, "none"),
        ("/indexes/a/b/search", "", None, "none"),
        ("/livez", "", None, "none"),
    ],
)
def test_routes(path: str, operation: str, name: str | None, load: str) -> None:
    found = post(path, JSON, "Content-Length: 2")
    assert (found.operation, found.name, found.load) == (operation, name, load)


def test_settings_of_a_url_are_read_once() -> None:
    found = post("/search?k=3&timeout_ms=50", RAW, "Content-Length: 4")
    assert found.settings == SearchSettings(k=3, timeout_ms=50) and found.path == "/search"
    for wrong in ("k=0", "k=3&k=4", "vector=1", "k=x"):
        assert not post(f"/search?{wrong}", RAW, "Content-Length: 4").operation
    assert not post("/search?k=3", JSON, "Content-Length: 4").operation, "JSON has its settings in the body"


@pytest.mark.parametrize(
    "field",
    ["Connection: close", "Expect: 100-continue", "Content-Encoding: gzip", "Content-Encoding: identity"],
)
def test_what_means_something_goes_the_long_way_but_its_end_is_known(field: str) -> None:
    found = post("/search", JSON, "Content-Length: 7", field)
    assert not found.operation and found.length == 7


@pytest.mark.parametrize("kind", ["text/plain", "application/json; charset=latin-1", "APPLICATION/JSON"])
def test_other_types_go_the_long_way(kind: str) -> None:
    assert not post("/search", f"Content-Type: {kind}", "Content-Length: 7").operation


def test_other_methods_and_versions_go_the_long_way() -> None:
    for line in ("GET /search HTTP/1.1", "PUT /search HTTP/1.1", "POST /search HTTP/1.0"):
        found = read(head(line, JSON, "Content-Length: 2"))
        assert found is not None and not found.operation and found.length == 2


def test_where_the_end_of_a_message_is_not_in_its_head_it_is_not_guessed() -> None:
    assert post("/search", JSON, "Transfer-Encoding: chunked").length == -1
    assert read(head("POST /search HTTP/1.1", JSON, "Connection: upgrade", "Upgrade: websocket")) is None
    assert post("/search", JSON).length == 0


@pytest.mark.parametrize(
    "raw",
    [
        b"POST /search HTTP/1.1\r\nHost: x\r\n",
        b"",
        b"nonsense\r\n\r\n",
        b"POST /search HTTP/9.9\r\nHost: x\r\n\r\n",
        head("POST /search HTTP/1.1", "Content-Length: 1", "Content-Length: 2"),
        head("POST /search HTTP/1.1", "Content-Length: -1"),
        head("POST /search HTTP/1.1", "Content-Length: 1x"),
        head("POST /search HTTP/1.1", "Content-Length: 1", "Transfer-Encoding: chunked"),
        head("POST /search HTTP/1.1", "No colon"),
        b"POST /search HTTP/1.1\nContent-Length: 3\r\n\r\n",
        head("POST /search HTTP/1.1", "X: " + "x" * heads.MAX_HEAD_BYTES),
    ],
)
def test_what_is_no_head_of_one_message_is_none_here(raw: bytes) -> None:
    assert read(raw) is None


def test_the_same_head_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    known = Heads(HttpSettings(), 32_768)
    made: list[bytes] = []
    look = Heads._parsed
    monkeypatch.setattr(Heads, "_parsed", lambda self, raw: made.append(raw) or look(self, raw))
    for fields in ([JSON], [JSON, "X-API-Key: one"]):
        raw = head("POST /search HTTP/1.1", *fields, "Content-Length: 2")
        assert read(raw + b"{}", known) is read(raw + b"[]", known)
    assert len(made) == 2
    for number in range(heads.MAX_REMEMBERED + 10):
        read(head("POST /search HTTP/1.1", JSON, f"Content-Length: {number}"), known)
    assert len(known._plain) + len(known._with_key) <= heads.MAX_REMEMBERED


@pytest.mark.parametrize(
    "field", ["X-API-Key: {}", "Authorization: Bearer {}", "X-API-Key:\r\nAuthorization: Bearer {}"]
)
@pytest.mark.parametrize(
    ("line", "more"),
    [
        ("POST /search HTTP/1.1", [JSON, "Content-Length: 2"]),
        ("GET /indexes HTTP/1.1", []),
        ("POST /search HTTP/1.1", ["Content-Type: text/plain", "Content-Length: 2"]),
        ("POST /search HTTP/1.1", [JSON, "Transfer-Encoding: chunked"]),
        ("POST /search?k=0 HTTP/1.1", [RAW, "Content-Length: 4"]),
        ("POST /search HTTP/1.1", [JSON, "Content-Length: 2", "Connection: close"]),
        ("POST /elsewhere HTTP/1.1", [JSON, "Content-Length: 2"]),
    ],
)
def test_of_a_key_nothing_is_kept_but_its_digest(line: str, more: list[str], field: str) -> None:
    key = "vecsvc_" + "".join(map(str, range(40)))
    known = Heads(HttpSettings(), 32_768)
    found = read(head(line, *more, field.format(key)), known)
    assert found is not None and len(known._plain) + len(known._with_key) == 1
    if found.operation and not field.startswith("X-API-Key:\r"):
        assert found.key == digest_of(key)
    kept = [known._plain, known._with_key]
    while kept:
        one = kept.pop()
        assert key not in str(one) and key.encode() not in bytes(repr(one), "utf-8")
        kept += [other for other in gc.get_referents(one) if isinstance(other, (dict, list, tuple, str, bytes, Head))]
