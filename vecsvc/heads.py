"""What the heads of requests say, read by aiohttp's parser once and remembered: clients send the same ones again."""

from __future__ import annotations

import asyncio
import hashlib
from typing import Final

import msgspec
from aiohttp import HttpVersion11, hdrs
from aiohttp.base_protocol import BaseProtocol
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.http_parser import HttpRequestParser, RawRequestMessage

from vecsvc import schemas, schemas_embed
from vecsvc.access import KEY_HEADER, mark_of
from vecsvc.admission import Load
from vecsvc.config import HttpSettings
from vecsvc.door import presented
from vecsvc.errors import InvalidRequest
from vecsvc.types import SearchSettings

MAX_HEAD_BYTES: Final = 4096  # longer heads go the long way
MAX_REMEMBERED: Final = 1024  # heads; past that all are forgotten and read anew
STARTS: Final = (b"POST /", b"GET /")  # what messages begin with that are looked at

_END: Final = b"\r\n\r\n"
_JSON: Final = frozenset((schemas.JSON, f"{schemas.JSON}; charset=utf-8", f"{schemas.JSON};charset=utf-8"))


class Head(msgspec.Struct, frozen=True):
    """What a head means to the short way."""

    size: int  # bytes, with the empty line behind it
    length: int  # of the body, in bytes; -1 where the end of the message cannot be told from its head
    operation: str = ""  # the route; "" where the short way is not open to the message
    name: str | None = None  # the index that is asked
    load: Load = "none"
    path: str = ""
    settings: SearchSettings | None = None  # those of the URL, where the body is raw vectors; None for JSON
    arrow: bool = False  # whether a batch is to be answered as Arrow
    request_id: str | None = None
    key: bytes | None = None  # digest of the API key that it brings; the key itself is not kept


class Heads:
    """The heads that were seen, by their bytes."""

    def __init__(self, settings: HttpSettings, max_line_bytes: int) -> None:
        """`max_line_bytes` is what connections allow a line of a head."""
        self._settings, self._max_line_bytes = settings, max_line_bytes
        self._plain: dict[bytes, Head] = {}
        self._with_key: dict[bytes, Head] = {}  # by digest: no key stays in memory

    def of(self, data: bytes) -> Head | None:
        """What the head at the beginning of `data` says; None where it is not whole, or is no head."""
        end = data.find(_END, 0, MAX_HEAD_BYTES)
        if end < 0:
            return None
        raw = data[: end + len(_END)]
        found = self._plain.get(raw)
        return found if found is not None else self._look(raw)

    def _look(self, raw: bytes) -> Head | None:
        digest = hashlib.blake2b(raw, digest_size=16).digest()
        found = self._with_key.get(digest)
        if found is None:
            message = self._parsed(raw)
            if message is None:
                return None
            found = self._read(message, len(raw))
            if len(self._plain) + len(self._with_key) >= MAX_REMEMBERED:
                self._plain.clear()
                self._with_key.clear()
            if hdrs.AUTHORIZATION in message.headers or KEY_HEADER in message.headers:
                self._with_key[digest] = found
            else:
                self._plain[raw] = found
        return found

    def _parsed(self, raw: bytes) -> RawRequestMessage | None:
        """By a parser of its own: whatever this one thinks of the bytes, the connection's has not seen them yet."""
        loop = asyncio.get_running_loop()
        parser = HttpRequestParser(
            BaseProtocol(loop),
            loop,
            1 << 16,
            max_line_size=self._max_line_bytes,
            auto_decompress=False,
        )
        try:
            messages, upgraded, tail = parser.feed_data(raw)
        except HttpProcessingError:
            return None
        if len(messages) != 1 or upgraded or tail:
            return None
        message: RawRequestMessage = messages[0][0]
        return message

    def _read(self, message: RawRequestMessage, size: int) -> Head:
        headers = message.headers
        given = headers.get(hdrs.CONTENT_LENGTH, "0")
        if message.chunked or message.upgrade or not (given.isascii() and given.isdecimal() and len(given) < 16):
            return Head(size, -1)
        length = int(given)
        operation, name, load = _route(message.path)
        if (
            not operation
            or message.method != hdrs.METH_POST
            or message.version != HttpVersion11
            or message.should_close
            or message.compression is not None
            or hdrs.EXPECT in headers
            or hdrs.CONTENT_ENCODING in headers
        ):
            return Head(size, length)
        path, mark, _ = message.path.partition("?")
        settings = None
        kind = headers.get(hdrs.CONTENT_TYPE)
        if kind == schemas.BINARY:
            try:
                settings = schemas.url_settings(schemas.single(message.url.query), self._settings)
            except InvalidRequest:
                return Head(size, length)
        elif kind not in _JSON or mark:
            return Head(size, length)
        arrow = schemas.wants_arrow(headers.get(hdrs.ACCEPT, ""))
        request_id, key = headers.get("X-Request-Id"), presented(headers)
        return Head(size, length, operation, name, load, path, settings, arrow, request_id, mark_of(key))


def _route(target: str) -> tuple[str, str | None, Load]:
    """(operation, index, load) of a path; no operation where it is none of those that may be refused or answered."""
    rest = target.partition("?")[0]
    if rest == schemas_embed.OPENAI_PATH:
        return rest, None, "many"
    name, at = None, ""
    if rest.startswith("/indexes/"):
        # What is spelled with percent signs is found by nobody here, and is decoded on the long way.
        name, slash, rest = rest[len("/indexes/") :].partition("/")
        rest, at = slash + rest, "/indexes/{name}"
    if rest == "/search":
        return at + rest, name, "single"
    if rest in ("/search/batch", schemas_embed.TEI_PATH):
        return at + rest, name, "many"
    return "", None, "none"
