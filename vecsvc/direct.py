"""The short way of a question by its vector: from the bytes of a connection to the bytes of the answer, in one step.

Most of what an HTTP question costs is not the search: a task, a route to look up, a request and a response object, and
the way back through all of them. A question that came whole, by a vector, and whose like was measured to take less than
`inline_ms`, needs none of it. aiohttp's parser has read it, as any other; what it asks is answered here and written at
once. Whatever is out of the ordinary (an error, a limit, a filter, a header that means something) is left to the long
way, which begins anew with the same message, so that rules are written once.

This file, and no other, leans on what aiohttp keeps to itself. Where a version of it keeps other things, `usable` says
so, and all go the long way.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from email.utils import formatdate
from typing import Any, Final

from aiohttp import HttpVersion11, StreamReader, hdrs, web
from aiohttp.http import SERVER_SOFTWARE
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.http_parser import RawRequestMessage

from vecsvc import schemas
from vecsvc.config import HttpSettings
from vecsvc.door import Door
from vecsvc.engine import Engine
from vecsvc.reaper import Reaper
from vecsvc.telemetry import Metrics
from vecsvc.types import Query, SearchSettings, VectorQuery

HOLD_S: Final = 0.01  # so long may a body come behind its head; then its message goes the long way
MAX_HELD_BYTES: Final = 65_536  # longer bodies go the long way at once, where they are counted
MAX_REMEMBERED: Final = 512  # queries of URLs whose settings are known; past that all are forgotten and read anew

_HANDLER: Final = (
    *("_parser", "_messages", "_waiter", "_paused", "_upgraded", "_payload_parser", "_close", "_force_close"),
    *("_request_count", "_keepalive_timeout", "_next_keepalive_close_time", "_reading_paused"),
)
_MESSAGE: Final = ("method", "path", "version", "headers", "should_close", "upgrade", "chunked", "compression", "url")
_JSON: Final = frozenset((schemas.JSON, f"{schemas.JSON}; charset=utf-8", f"{schemas.JSON};charset=utf-8"))


def usable() -> bool:
    """Whether this aiohttp keeps what is needed here under the names that are known here."""
    return (
        all(hasattr(web.RequestHandler, name) for name in _HANDLER)
        and {"_buffer", "_size", "_protocol", "total_bytes"} <= set(getattr(StreamReader, "__slots__", ()))
        and all(hasattr(RawRequestMessage, name) for name in _MESSAGE)
    )


def arrived(content: StreamReader) -> bytes | None:
    """The whole body, where all of it is there and nobody waits for more; None where it is not that simple.

    Reading through the stream would have the parser look for more, which costs as much as all the rest of reading.
    """
    if type(content) is not StreamReader or not content.is_eof() or content.exception() is not None:
        return None
    if content.total_bytes != content._size or content._protocol._reading_paused:
        return None
    return b"".join(content._buffer)


class Direct:
    """Answers messages in the event loop, or leaves them alone."""

    def __init__(
        self,
        engine: Engine,
        settings: HttpSettings,
        metrics: Metrics,
        door: Door,
        *,
        request_id: Callable[[str | None], str],
        open: Callable[[], bool],
    ) -> None:
        """`open` says for each message whether it may go the short way now."""
        self._engine, self._settings, self._request_id, self._open = engine, settings, request_id, open
        self._metrics, self._door = metrics, door
        self._remembered: dict[str, SearchSettings] = {}
        self._parsed: tuple[bytes, Query, SearchSettings] | None = None
        self._second, self._fixed = 0, b""

    def may(self, message: RawRequestMessage) -> bool:
        """Whether its head lets a message go the short way."""
        path, headers = message.path, message.headers
        return (
            path.startswith(("/search", "/indexes/"))
            and message.method == hdrs.METH_POST
            and message.version == HttpVersion11
            and not (message.should_close or message.chunked or message.upgrade)
            and message.compression is None
            and hdrs.EXPECT not in headers
            and hdrs.CONTENT_ENCODING not in headers
            and self._open()
        )

    def answer(self, message: RawRequestMessage, body: bytes) -> bytes | None:
        """The answer's bytes, head and body; None where the long way has to be gone."""
        started = time.perf_counter()
        target, mark, url_query = message.path.partition("?")
        name, operation = None, target
        if target != "/search":
            if not (target.startswith("/indexes/") and target.endswith("/search")):
                return None
            # What has a percent sign or a slash in it is no index, and is refused the long way.
            name, operation = target[9:-7], "/indexes/{name}/search"
        if not self.may(message) or len(body) > self._settings.max_query_bytes:
            return None
        if self._engine.admission.single.full:
            return None  # it will be refused, and what it asks need not be known for that
        headers = message.headers
        kind = headers.get(hdrs.CONTENT_TYPE)
        try:
            key = self._door.knock(headers, "read")
            query: Query
            if kind in _JSON and not mark:
                query, settings = schemas.parse_search(body, self._settings)
                if type(query) is not VectorQuery:
                    return None
            elif kind == schemas.BINARY:
                settings = self._of_url(url_query, message)
                dim = self._engine.catalog.get(name).manifest.spec.dim
                if len(body) != 4 * dim:
                    return None
                query = VectorQuery(schemas.rows_of(body, dim))
            else:
                return None
            self._door.take(key)
        except Exception:
            return None
        try:
            answer = self._engine.search_now(name, query, settings)
        except Exception:
            self._door.give_back(key)
            return None
        if answer is None:
            self._door.give_back(key)
            if kind in _JSON:
                self._parsed = body, query, settings
            return None
        data = schemas.encode(answer)
        head = b"HTTP/1.1 200 OK\r\n%bX-Request-Id: %b\r\nContent-Length: %d\r\n\r\n" % (
            self._headers(),
            self._request_id(headers.get("X-Request-Id")).encode(),
            len(data),
        )
        self._metrics.requests(operation, "200").inc()
        self._metrics.latency(operation).observe(time.perf_counter() - started)
        return head + data

    def parsed(self, body: bytes) -> tuple[Query, SearchSettings] | None:
        """What this very body was found to ask, where it was just left to the long way; only once."""
        known, self._parsed = self._parsed, None
        return known[1:] if known is not None and known[0] is body else None

    def _of_url(self, url_query: str, message: RawRequestMessage) -> SearchSettings:
        """The settings in a URL. Clients write the same ones again and again."""
        known = self._remembered.get(url_query)
        if known is None:
            known = schemas.url_settings(schemas.single(message.url.query), self._settings)
            if len(self._remembered) >= MAX_REMEMBERED:
                self._remembered.clear()
            self._remembered[url_query] = known
        return known

    def _headers(self) -> bytes:
        """Those that change once a second."""
        now = int(time.time())
        if now != self._second:
            date = formatdate(now, usegmt=True)
            self._second = now
            self._fixed = (
                f"{hdrs.CONTENT_TYPE}: {schemas.JSON}; charset=utf-8\r\n"
                f"{hdrs.DATE}: {date}\r\n{hdrs.SERVER}: {SERVER_SOFTWARE}\r\n"
            ).encode()
        return self._fixed


class DirectHandler(web.RequestHandler):
    """aiohttp's connection, but a message that `direct` answers at once never becomes a request."""

    __slots__ = ("_direct", "_held", "_reaper", "_release")

    def __init__(self, server: web.Server | None, *, direct: Direct | None, reaper: Reaper, **options: Any) -> None:
        super().__init__(server, loop=asyncio.get_running_loop(), **options)  # type: ignore[arg-type]
        self._direct, self._reaper = direct, reaper
        self._held: tuple[RawRequestMessage, StreamReader] | None = None  # the body of a message that is on its way
        self._release: asyncio.TimerHandle | None = None

    def data_received(self, data: bytes) -> None:
        waiter, transport, parser = self._waiter, self.transport, self._parser
        if (
            self._direct is None
            or waiter is None  # a request is worked on, and its answer comes first
            or waiter.done()
            or self._messages
            or self._paused  # the client does not read
            or self._upgraded
            or self._payload_parser is not None
            or self._close
            or self._force_close
            or transport is None
            or transport.is_closing()
            or parser is None
        ):
            self._let_go()
            super().data_received(data)
            return
        try:
            messages, upgraded, tail = parser.feed_data(data)
        except HttpProcessingError as error:
            self._let_go()
            self._the_long_way(data, error, ([], False, b""))
            return
        held = self._take()
        if held is not None:
            messages = [held, *messages]
        if len(messages) == 1 and not upgraded:
            message, payload = messages[0]
            body = arrived(payload)
            if body is not None:
                answer = self._direct.answer(message, body)
                if answer is not None:
                    parser.message_consumed()
                    self._request_count += 1
                    self._next_keepalive_close_time = self._loop.time() + self._keepalive_timeout
                    self._reaper.answered(self)
                    transport.write(answer)
                    return
            elif held is None and not payload.is_eof() and self._direct.may(message) and _short(message):
                # Many clients send head and body by themselves, the one right behind the other.
                self._held = message, payload
                self._release = self._loop.call_later(HOLD_S, self._let_go)
                return
        self._the_long_way(data, None, (messages, upgraded, tail))

    def connection_lost(self, exc: BaseException | None) -> None:
        self._take()
        super().connection_lost(exc)

    def _take(self) -> tuple[RawRequestMessage, StreamReader] | None:
        """What is held, which is held no longer."""
        held, self._held = self._held, None
        if self._release is not None:
            self._release.cancel()
            self._release = None
        return held

    def _let_go(self) -> None:
        """Send what is held the long way, where a body may take its time."""
        held = self._take()
        if held is not None:
            self._the_long_way(b"", None, ([held], False, b""))

    def _the_long_way(self, data: bytes, error: HttpProcessingError | None, found: tuple[Any, bool, bytes]) -> None:
        parser = self._parser
        self._parser = _Again(error, found)  # type: ignore[assignment]
        try:
            super().data_received(data)
        finally:
            self._parser = parser


def _short(message: RawRequestMessage) -> bool:
    length = message.headers.get(hdrs.CONTENT_LENGTH, "")
    return length.isdecimal() and len(length) < 9 and int(length) <= MAX_HELD_BYTES


class _Again:
    """Stands for the parser where it has parsed already."""

    __slots__ = ("_error", "_found")

    def __init__(self, error: HttpProcessingError | None, found: tuple[Any, bool, bytes]) -> None:
        self._error, self._found = error, found

    def feed_data(self, data: bytes) -> tuple[Any, bool, bytes]:
        if self._error is not None:
            raise self._error
        return self._found
