"""The short way of a question: from the bytes of a connection to the bytes of the answer, past aiohttp.

Most of what an HTTP question costs is not the search: a parser's objects, a task, a route to look up, a request and a
response, and the way back through all of them. A question that came whole, by a vector, and whose like was measured to
take less than `inline_ms`, needs none of it: its head is known by its bytes (heads.py), its vector goes from the body's
text straight into float32, and the answer is written in the callback that brought the bytes; at a front door, in the
callback that brought the last shard's part. Other questions and batches that came whole have a task, and otherwise go
the same way. A message that there is no place for is refused in the same callback, before its body is looked at.
Whatever is out of the ordinary (a question that is wrong, a header that means something) is left to the long way, which
begins anew with the same bytes, so that rules are written once. A batch that is wrong is refused here: reading it anew
could cost more than a search.

This file, and no other, leans on what aiohttp keeps to itself. Where a version of it keeps other things, `usable` says
so, and all go the long way.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Callable
from email.utils import formatdate
from typing import Any, Final, TypeAlias

from aiohttp import StreamReader, hdrs, web
from aiohttp.http import RESPONSES, SERVER_SOFTWARE

from vecsvc import schemas
from vecsvc.access import Key
from vecsvc.admission import LARGE_BYTES, Budget
from vecsvc.config import HttpSettings
from vecsvc.door import DRAIN_BYTES, Door
from vecsvc.errors import InvalidRequest, MalformedRequest, Overloaded
from vecsvc.forms import Forms
from vecsvc.front_door import Backend, FrontDoor
from vecsvc.heads import MAX_HEAD_BYTES, STARTS, Head, Heads
from vecsvc.question_checks import count
from vecsvc.reaper import Reaper
from vecsvc.telemetry import LEFT, Metrics
from vecsvc.types import BatchAnswer, ColumnsAnswer, Query, SearchAnswer, SearchSettings, VectorQuery

log: Final = logging.getLogger("vecsvc.server")

HOLD_S: Final = 0.01  # so long may the rest of a message be under way; then it goes the long way
MAX_HELD_BYTES: Final = 1 << 20  # longer bodies go the long way at once: each piece of one that is held copies it
MAX_BEHIND_BYTES: Final = 65_536  # of what a client sends before it is answered; past that it is not read
_ANSWERED: Final = frozenset(at + path for at in ("", "/indexes/{name}") for path in ("/search", "/search/batch"))
LOST: Final = -1  # where one message ends and the next begins is known to aiohttp's parser alone

_HANDLER: Final = (
    *("_messages", "_waiter", "_paused", "_upgraded", "_payload_parser", "_close", "_force_close", "_request_count"),
    *("_request_factory", "_request_handler", "_keepalive_timeout", "_next_keepalive_close_time"),
    *("_buffer_paused", "_reading_paused", "_loop", "_current_request"),
)


# Takes the bytes of an answer, once; None where there will be none, and the connection ends.
Later: TypeAlias = Callable[[bytes | None], None]


def usable() -> bool:
    """Whether this aiohttp keeps what is needed here under the names that are known here."""
    slots = {name for base in web.RequestHandler.__mro__ for name in getattr(base, "__slots__", ())}
    methods = hasattr(web.RequestHandler, "finish_response") and hasattr(web.RequestHandler, "_process_keepalive")
    return (
        methods
        and slots.issuperset(_HANDLER)
        and {"_buffer", "_size", "_protocol", "total_bytes"} <= set(getattr(StreamReader, "__slots__", ()))
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


async def answer_batch(
    engine: Backend, name: str | None, query: Query, settings: SearchSettings, *, arrow: bool
) -> bytes:
    """The body of the answer to a batch, as Arrow or as JSON."""
    if arrow:
        return await engine.encoded(name, query, settings, ColumnsAnswer, schemas.encode_arrow)
    return await engine.encoded(name, query, settings, BatchAnswer, schemas.encode)


class Direct:
    """Answers messages in the event loop, or leaves them alone."""

    def __init__(
        self,
        engine: Backend,
        settings: HttpSettings,
        metrics: Metrics,
        door: Door,
        max_line_bytes: int,
        *,
        request_id: Callable[[str | None], str],
        open: Callable[[int], bool],
        reserve: Callable[[int], bool],
        release: Callable[[int], None],
        closes: Callable[[], bool],
        may_log: Callable[[], bool],
        refused: Callable[[Head, Exception, float, Key | None], tuple[int, dict[str, str], bytes]],
    ) -> None:
        """`open` says of a body's length whether it may go the short way now, `closes` whether connections end,
        `may_log` whether there is room for another line about a failure. `reserve` counts a body whose rest is on its
        way until `release`, or says that there is no room for it.

        `refused` tells what became of a message after so many seconds, and gives the status, the headers and the body
        of the answer.
        """
        self.heads = Heads(settings, max_line_bytes)
        self._forms = Forms(settings)
        self._engine, self._settings, self._request_id, self._open = engine, settings, request_id, open
        self._metrics, self._door, self._refused = metrics, door, refused
        self._reserve, self.release = reserve, release
        self.closes, self._may_log = closes, may_log
        self._second, self._date = 0, b""

    def crowded(self, head: Head) -> bool:
        """Whether the message had better wait a turn of the loop, until those before it have taken their places."""
        return self._engine.admission.crowded(head.load, head.length)

    def reserve(self, head: Head) -> bool:
        """Whether the rest of a message may be waited for here; a long body counts from now on, until `release`."""
        if head.length > LARGE_BYTES:
            if not self._takes(head):
                return False
            try:
                self._door.knock(head.key, "read")
            except Exception:
                return False
        return self._reserve(head.length)

    def _takes(self, head: Head) -> bool:
        """Whether a message with such a head may be answered here."""
        limits = self._settings
        most = limits.max_query_bytes if head.load == "single" else limits.max_body_bytes
        return head.operation in _ANSWERED and head.length <= most and self._open(head.length)

    def refusal(self, head: Head, reserved: int) -> bytes | None:
        """The answer to a message that there is no place for; None where there is one, or it is not that simple.

        `reserved` are bytes of its body that count already.
        """
        try:
            self._engine.admission.check(head.load, head.length)
        except Overloaded as error:
            if not self._open(head.length - reserved) or head.length > DRAIN_BYTES:
                return None
            try:
                key = self._door.knock(head.key, "read")
            except Exception:
                return None
            return self._failed(head, error, 0.0, key)
        return None

    def answer(self, head: Head, data: bytes, later: Later) -> bytes | Callable[[], object] | None:
        """The answer's bytes, head and body; None where the long way has to be gone.

        Where the answer takes a thread or other nodes, what calls the question off when its client leaves: until then
        `later` is called once with the answer's bytes.
        """
        started = time.perf_counter()
        if not self._takes(head):
            return None
        single = head.load == "single"
        body = data[head.size :]
        try:
            key = self._door.knock(head.key, "read")
            self._door.take(key)
        except Exception:
            return None
        try:
            found = (self._one if single else self._many)(head, body, started, key, later)
        except (MalformedRequest, InvalidRequest) as error:
            # A batch was read by what would read it on the long way, where it would be found wrong once more. What an
            # index says of a single vector has other words there.
            found = None if single else self._failed(head, error, time.perf_counter() - started, key)
        except Exception:
            found = None
        if found is None:
            self._door.give_back(key)
        if found is None or isinstance(found, bytes):
            return found
        return functools.partial(self._called_off, head, found, started)

    def _one(
        self, head: Head, body: bytes, started: float, key: Key | None, later: Later
    ) -> bytes | Callable[[], object] | None:
        """As `answer`, of one question; what is raised is met again on the long way."""
        engine, settings = self._engine, head.settings
        query: Query
        if settings is None:
            query, settings = self._forms.parse(body)
        else:
            dim = engine.catalog.get(head.name).manifest.spec.dim
            query = VectorQuery(schemas.rows_of(body, dim))
            if len(query.vectors) != 1:
                return None
        if type(query) is VectorQuery:
            if isinstance(engine, FrontDoor):

                def done(result: SearchAnswer | Exception) -> None:
                    later(self._told(head, result, started, key))

                if (stop := engine.search_soon(head.name, query, settings, done)) is not None:
                    return stop
            elif (answer := engine.search_now(head.name, query, settings)) is not None:
                return self._written(head, schemas.encode(answer), started)
        engine.catalog.get(head.name)  # a name that is none may be an encoded one
        return self._asked(head, query, settings, started, key, later)

    def _many(
        self, head: Head, body: bytes, started: float, key: Key | None, later: Later
    ) -> Callable[[], object] | None:
        """As `answer`, of a batch."""
        settings = head.settings
        dim = self._engine.catalog.get(head.name).manifest.spec.dim
        query: Query
        if settings is None:
            query, settings = schemas.parse_batch(body, self._settings)
        else:
            query = schemas.raw_batch(body, dim, self._settings)
        if head.arrow and settings.include:
            return None
        self._door.owe(key, count(query))
        return self._asked(head, query, settings, started, key, later)

    def _asked(
        self, head: Head, query: Query, settings: SearchSettings, started: float, key: Key | None, later: Later
    ) -> Callable[[], object]:
        """Answer in a task of its own, which costs little: what costs is aiohttp's request and response."""
        loop = asyncio.get_running_loop()
        task = loop.create_task(self._ask(head, query, settings, started, key, later))
        task.add_done_callback(functools.partial(_over, later, self._may_log))
        # Many may come in one turn of the loop, and none of them takes its place before the next (see `crowded`).
        budget = self._engine.admission.of(count(query))
        budget.coming += 1
        loop.call_soon(_came, budget)
        return task.cancel

    async def _ask(
        self, head: Head, query: Query, settings: SearchSettings, started: float, key: Key | None, later: Later
    ) -> None:
        """Send what becomes of a question, or of a batch."""
        result: SearchAnswer | bytes | Exception
        try:
            if head.load == "single":
                result = await self._engine.search(head.name, query, settings)
            else:
                result = await answer_batch(self._engine, head.name, query, settings, arrow=head.arrow)
        except Exception as error:
            result = error
        later(self._told(head, result, started, key))

    def _told(self, head: Head, result: SearchAnswer | bytes | Exception, started: float, key: Key | None) -> bytes:
        """The bytes of what a question came to that was not answered at once."""
        if not isinstance(result, Exception):
            try:
                return self._written(head, result if isinstance(result, bytes) else schemas.encode(result), started)
            except Exception as error:
                result = error
        return self._failed(head, result, time.perf_counter() - started, key)

    def _written(self, head: Head, body: bytes, started: float) -> bytes:
        """The bytes of an answer, counted."""
        headers = _ARROW_HEADERS if head.arrow and head.load == "many" else _JSON_HEADERS
        written = self._message(b"200 OK", headers % self._request_id(head.request_id).encode(), body)
        self._count(head, 200, started)
        return written

    def _called_off(self, head: Head, call_off: Callable[[], object], started: float) -> None:
        """The client left before its question was answered."""
        call_off()
        self._count(head, LEFT, started)

    def _count(self, head: Head, status: int, started: float) -> None:
        self._metrics.requests(head.operation, str(status)).inc()
        self._metrics.latency(head.operation).observe(time.perf_counter() - started)

    def _failed(self, head: Head, error: Exception, seconds: float, key: Key | None) -> bytes:
        status, headers, body = self._refused(head, error, seconds, key)
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        return self._message(f"{status} {RESPONSES[status][0]}".encode(), lines.encode(), body)

    def _message(self, status: bytes, lines: bytes, body: bytes) -> bytes:
        """The bytes of an answer; `lines` are its own headers."""
        now = int(time.time())
        if now != self._second:
            self._second = now
            self._date = f"{hdrs.DATE}: {formatdate(now, usegmt=True)}\r\n{hdrs.SERVER}: {SERVER_SOFTWARE}\r\n".encode()
        if self.closes():
            lines += _CLOSES
        return b"HTTP/1.1 %b\r\n%bContent-Length: %d\r\n%b\r\n%b" % (status, lines, len(body), self._date, body)


def _came(budget: Budget) -> None:
    """The task that was made before this was called for has begun, and taken its place."""
    budget.coming -= 1


def _over(later: Later, may_log: Callable[[], bool], task: asyncio.Task[None]) -> None:
    """A question's task is over. Where it was cancelled, or failed by a bug, who waits must not wait for ever."""
    error = None if task.cancelled() else task.exception()
    if error is not None and may_log():
        log.error("a bug of ours", exc_info=error)
    if error is not None or task.cancelled():
        later(None)


_CLOSES: Final = b"Connection: close\r\n"
_JSON_HEADERS: Final = f"{hdrs.CONTENT_TYPE}: {schemas.JSON}; charset=utf-8\r\nX-Request-Id: %b\r\n".encode()
_ARROW_HEADERS: Final = f"{hdrs.CONTENT_TYPE}: {schemas.ARROW}\r\nX-Request-Id: %b\r\n".encode()


class DirectHandler(web.RequestHandler):
    """aiohttp's connection, but a message that `direct` answers at once never reaches its parser."""

    __slots__ = (
        *("_behind", "_call_off", "_direct", "_drop", "_finished"),
        *("_held", "_left", "_reaper", "_release", "_reserved"),
    )

    def __init__(self, server: web.Server | None, *, direct: Direct | None, reaper: Reaper, **options: Any) -> None:
        super().__init__(server, loop=asyncio.get_running_loop(), **options)  # type: ignore[arg-type]
        self._direct, self._reaper = direct, reaper
        self._held = b""  # a message whose rest is on its way
        self._release: asyncio.TimerHandle | None = None
        self._reserved = 0  # bytes of its body, where they are counted
        self._finished = 0  # messages that had come when the last answer of the long way was written
        self._drop = 0  # bytes to come of a body that nobody will read
        self._left = 0  # bytes to come of a message that goes the long way, or LOST
        self._call_off: Callable[[], object] | None = None  # ends the question whose answer comes later
        self._behind = b""  # what came meanwhile

    def data_received(self, data: bytes) -> None:
        self._take(data)

    async def finish_response(self, *message: Any) -> Any:
        """As aiohttp's, which does not say afterwards that a message is answered and its task on the way back."""
        done = await super().finish_response(*message)
        self._finished = self._request_count
        return done

    def _process_keepalive(self) -> None:
        if self._call_off is not None:
            # aiohttp sees a connection that waits for messages, and this one waits for an answer.
            self._next_keepalive_close_time = self._loop.time() + self._keepalive_timeout
        super()._process_keepalive()

    def _is_coming_back(self) -> bool:
        """Whether all that came is answered, and the connection's task is about to wait for more."""
        finished = self._current_request is None and 0 < self._request_count == self._finished
        return finished and self._waiter is None and not self._messages

    def _hold_a_turn(self, data: bytes) -> None:
        self._held = data
        self._loop.call_soon(self._again)

    def _again(self) -> None:
        """With what was held a turn ago."""
        data, self._held = self._held, b""
        if data:
            self._take(data, again=True)

    def _take(self, data: bytes, *, again: bool = False) -> None:
        direct = self._direct
        if direct is None or not data:
            super().data_received(data)
            return
        if self._call_off is not None or self._behind:
            # Answers go out in the order of the questions, so whoever sends more has to wait.
            self._behind += data
            if len(self._behind) > MAX_BEHIND_BYTES and self.transport is not None:
                self.transport.pause_reading()
            return
        if self._drop:
            dropped, self._drop = self._drop, max(0, self._drop - len(data))
            data = data[dropped:]
            if not data:
                return
        if self._left:
            self._left = max(self._left - len(data), LOST) if self._left > 0 else LOST
            super().data_received(data)
            return
        if self._held:
            data, self._held = self._held + data, b""
        head = direct.heads.of(data) if data.startswith(STARTS) else None
        if head is None:
            if self._idle() and len(data) < MAX_HEAD_BYTES and data.startswith(STARTS):
                self._hold(data)
            else:
                self._the_long_way(data, None)
            return
        size = head.size + head.length
        missing = size - len(data)  # below zero where more came behind it
        short = bool(head.operation) and missing >= -MAX_BEHIND_BYTES
        if short and self._is_coming_back() and not again:
            # Its client was faster than its task, which waits for messages again a turn of the loop later. On the long
            # way this one would find the next as little free, and so on: for as long as there is too much to do.
            self._hold_a_turn(data)
            return
        if short and self._idle():
            refusal = direct.refusal(head, self._reserved)
            if refusal is not None:
                self._drop = max(missing, 0)
                self._behind = data[size:]
                self._answered(refusal)
                return
            if missing <= 0 and direct.crowded(head):
                self._hold_a_turn(data)
                return
            if missing <= 0:
                self._free()
                answer = direct.answer(head, data[:size], self._later)
                if answer is not None:
                    self._behind = data[size:]
                if isinstance(answer, bytes):
                    self._answered(answer)
                    return
                if answer is not None:
                    self._call_off = answer
                    self._reaper.asked(self)
                    return
            elif head.length <= MAX_HELD_BYTES and (self._reserved or direct.reserve(head)):
                # Many clients send head and body by themselves, the one right behind the other, and long bodies come
                # in pieces.
                self._reserved = head.length
                self._hold(data)
                return
        self._the_long_way(data, head)

    def _answered(self, answer: bytes) -> None:
        self._free()
        self._request_count += 1
        self._next_keepalive_close_time = self._loop.time() + self._keepalive_timeout
        self._reaper.answered(self)
        assert self.transport is not None and self._direct is not None
        self.transport.write(answer)
        if self._direct.closes():
            self.transport.close()
        if self._behind:
            self._loop.call_soon(self._go_on)

    def _later(self, answer: bytes | None) -> None:
        """The answer to the question that was asked last; called where a node's arrives, so nothing is raised."""
        self._call_off = None
        transport = self.transport
        if answer is None or transport is None or transport.is_closing():
            self._reaper.left(self)
            if transport is not None and not transport.is_closing():
                transport.close()
            return
        self._answered(answer)

    def _go_on(self) -> None:
        """With what came behind the message that is answered now."""
        data, self._behind = self._behind, b""
        if self.transport is not None and not self.transport.is_closing():
            if len(data) > MAX_BEHIND_BYTES:
                self.transport.resume_reading()
            self.data_received(data)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._held = self._behind = b""  # its rest will not come
        self._free()
        if self._call_off is not None:
            self._call_off()
            self._call_off = None
        self._reaper.left(self)
        factory, handler = self._request_factory, self._request_handler
        super().connection_lost(exc)
        if self._messages:
            # Its task was woken for a message, and makes a request of it without a look whether anybody is there still.
            self._request_factory, self._request_handler = factory, handler

    def _idle(self) -> bool:
        """Whether nothing is worked on, and an answer may be written now."""
        waiter, transport = self._waiter, self.transport
        # Without a waiter a request is worked on, whose answer comes first, or the connection's task has not begun.
        free = self._request_count == 0 if waiter is None else not waiter.done()
        return free and not (
            self._messages
            or self._paused  # the client does not read
            or self._buffer_paused
            or self._upgraded
            or self._payload_parser is not None
            or self._close
            or self._force_close
            or transport is None
            or transport.is_closing()
        )

    def _hold(self, data: bytes) -> None:
        self._held = data
        if self._release is None:  # the time is that of all its parts
            self._release = self._loop.call_later(HOLD_S, self._let_go)

    def _free(self) -> None:
        if self._release is not None:
            self._release.cancel()
            self._release = None
        if self._reserved and self._direct is not None:
            self._direct.release(self._reserved)
            self._reserved = 0

    def _let_go(self) -> None:
        """Send what is held the long way, where the rest may take its time."""
        self._free()
        if self._held:
            assert self._direct is not None
            data, self._held = self._held, b""
            self._the_long_way(data, self._direct.heads.of(data))

    def _the_long_way(self, data: bytes, head: Head | None) -> None:
        """To aiohttp's parser, which is where a message begins; and know where this one ends."""
        self._free()
        if head is not None and head.length >= 0:
            self._left = max(head.size + head.length - len(data), LOST)
        else:
            self._left = LOST
        super().data_received(data)
