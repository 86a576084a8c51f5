"""The node's end of the shard protocol: answers front doors from the versions that this process holds."""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
from typing import Any, Final, cast

import msgspec

from vecsvc import remote
from vecsvc.catalog import Catalog
from vecsvc.engine import Engine
from vecsvc.errors import (
    ConfigError,
    InvalidRequest,
    Overloaded,
    ProtocolError,
    VecsvcError,
)
from vecsvc.remote import Held, Holdings, Kind
from vecsvc.shard_answers import ANSWERS, part_now
from vecsvc.telemetry import LineBudget

log: Final = logging.getLogger("vecsvc.shards")

MAX_FRONT_DOORS: Final = 256  # connections; one more is closed
MAX_WAITING: Final = 1024  # requests of one connection that are not answered yet
MAX_UNREAD_BYTES: Final = 64 << 20  # answers that a front door has not read; meanwhile it gets no others
UNREAD_S: Final = 20.0  # a front door that does not read for so long is cut off
SILENT_S: Final = 300.0  # and one that says nothing for so long: they ping at least once a minute
MAX_UNFINISHED_BYTES: Final = 256 << 20  # parts of questions that have not arrived whole, of all front doors
GREET_S: Final = 5.0  # a connection that has not said HELLO by then is closed, and so takes nobody's place
TELL_S: Final = 0.25  # how often it is looked whether something changed that front doors should know
QUIET_S: Final = 0.25  # so long nothing must have been asked before the connections are closed
LOG_LINES_PER_S: Final = 10  # about connections that sent what nobody can read


class ShardServer:
    """What the connections of all front doors share. Belongs to one event loop."""

    def __init__(self, engine: Engine, catalog: Catalog) -> None:
        self.engine, self.catalog = engine, catalog
        self.connections: set[_FrontDoor] = set()
        self.draining = False
        self.asked_at = 0.0  # time.monotonic() of the last question
        self.unfinished_bytes = 0
        self._told = b""
        self._server: asyncio.Server | None = None
        self._lines = LineBudget(LOG_LINES_PER_S)

    def may_log(self) -> bool:
        """Whether there is room for another line about bytes that strangers sent."""
        return self._lines.take()

    async def listen(self, host: str, port: int, tls: ssl.SSLContext | None = None) -> int:
        """Answer front doors on that port, which comes back. Raises ConfigError where it cannot be had."""
        loop = asyncio.get_running_loop()
        try:
            # Before its handshake a connection is none that is counted here, so that has a limit of its own.
            secure: dict[str, Any] = {"ssl": tls, "ssl_handshake_timeout": GREET_S} if tls is not None else {}
            self._server = await loop.create_server(lambda: _FrontDoor(self), host, port, backlog=256, **secure)
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {host}:{port}: {error.strerror}; choose another --shard-port"
            ) from error
        return int(self._server.sockets[0].getsockname()[1])

    def holdings(self) -> Holdings:
        held = [
            Held(s.name, s.version, s.digest, s.manifest.created, current, s.numbers, len(s.manifest.shards))
            for s, current in self.catalog.held()
        ]
        return Holdings(remote.PROTOCOL, held, self.draining, self.catalog.problem())

    def tell(self) -> None:
        """Tell every front door what is held here, where that changed."""
        told = msgspec.msgpack.encode(self.holdings())
        if told != self._told:
            self._told = told
            for connection in self.connections:
                if connection.greeted:
                    connection.send(remote.frame(Kind.HOLDINGS, 0, told))

    async def watch(self) -> None:
        """Until cancelled: let go of versions that no front door asks for, and tell what changed."""
        while True:
            try:
                self.tell()
                if await self.engine.in_thread(self.catalog.let_go):
                    self.tell()
            except Exception:
                log.exception("a bug of ours")
            now = time.monotonic()
            for connection in list(self.connections):
                connection.look(now)
            await asyncio.sleep(TELL_S)

    def drain(self) -> None:
        """Tell front doors to ask others; what still comes is answered."""
        self.draining = True
        self.tell()

    async def finish(self, timeout_s: float) -> None:
        """Answer what front doors asked, and what was on its way when they were told; then close."""
        if self._server is not None:
            self._server.close()
        now = time.monotonic()
        end, quiet_since = now + timeout_s, now
        while now < end and now - quiet_since < QUIET_S:
            await asyncio.sleep(0.01)
            now = time.monotonic()
            if any(connection.tasks for connection in self.connections):
                quiet_since = now
            quiet_since = max(quiet_since, self.asked_at)
        for connection in list(self.connections):
            connection.close(flush=True)


class _FrontDoor(asyncio.Protocol):
    """One connection of a front door."""

    def __init__(self, server: ShardServer) -> None:
        self._server = server
        self._frames = remote.Frames(remote.OF_FRONT_DOORS, remote.MAX_REQUEST_BYTES)
        self._transport: asyncio.Transport | None = None
        self._greeting: asyncio.TimerHandle | None = None
        self._unread_since: float | None = None  # since when more than MAX_UNREAD_BYTES wait to be read
        self._heard_at = time.monotonic()
        self.tasks: dict[int, asyncio.Task[None]] = {}
        self.greeted = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one by its methods only
        self._transport.set_write_buffer_limits(high=MAX_UNREAD_BYTES)
        self._server.connections.add(self)
        self._greeting = asyncio.get_running_loop().call_later(GREET_S, self.close)
        if len(self._server.connections) > MAX_FRONT_DOORS:
            if self._server.may_log():
                log.warning("front door refused", extra={"data": {"limit": MAX_FRONT_DOORS}})
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.connections.discard(self)
        self._server.unfinished_bytes -= self._frames.held_bytes
        self._transport = None
        if self._greeting is not None:
            self._greeting.cancel()
        for task in self.tasks.values():
            task.cancel()

    def pause_writing(self) -> None:
        self._unread_since = time.monotonic()

    def resume_writing(self) -> None:
        self._unread_since = None

    def look(self, now: float) -> None:
        """End what hangs: a front door that does not read its answers, or that has been silent for long."""
        unread = self._unread_since is not None and now - self._unread_since > UNREAD_S
        if unread or (self.greeted and now - self._heard_at > SILENT_S):
            if self._server.may_log():
                why = "it does not read its answers" if unread else "it has been silent"
                log.warning("front door cut off", extra={"data": {"why": why}})
            self.close()

    def data_received(self, data: bytes) -> None:
        server, before = self._server, self._frames.held_bytes
        self._heard_at = time.monotonic()
        try:
            for kind, request, payload in self._frames.feed(data):
                self._take(kind, request, payload)
            if server.unfinished_bytes + self._frames.held_bytes - before > MAX_UNFINISHED_BYTES:
                raise ProtocolError(f"front doors sent parts of questions of more than {MAX_UNFINISHED_BYTES} bytes")
        except ProtocolError as error:
            if server.may_log():
                log.warning("front door cut off", extra={"data": {"why": str(error)[:300]}})
            self.close()
        finally:
            server.unfinished_bytes += self._frames.held_bytes - before

    def _take(self, kind: Kind, request: int, payload: bytes) -> None:
        if kind is Kind.PING:
            self.send(remote.frame(Kind.PONG, request))
        elif kind is Kind.CANCEL:
            task = self.tasks.get(request)
            if task is not None:
                task.cancel()
        elif kind is Kind.HELLO:
            remote.decode(kind, payload)
            self.greeted = True
            if self._greeting is not None:
                self._greeting.cancel()
            self.send(remote.message(Kind.HOLDINGS, request, self._server.holdings()))
        elif len(self.tasks) >= MAX_WAITING or self._unread_since is not None:
            self.send(remote.message(Kind.FAILED, request, _full()))
        elif request not in self.tasks:
            # Decoded here, so that bytes that cannot be read end the connection and not a task.
            asked = remote.decode_search(payload) if kind is Kind.SEARCH else remote.decode(kind, payload)
            self._server.asked_at = self._heard_at
            part = part_now(self._server.engine, asked) if kind is Kind.SEARCH else None
            if part is not None:
                self.send(remote.message(Kind.PART, request, part))
                return
            task = asyncio.get_running_loop().create_task(self._answer(kind, request, asked))
            self.tasks[request] = task
            # Not at the end of the task's own work: one that is cancelled before it began never gets there.
            task.add_done_callback(lambda done: self._forget(request, done))

    async def _answer(self, kind: Kind, request: int, asked: Any) -> None:
        try:
            answered, answer = await ANSWERS[kind](self._server.engine, asked)
            frame = remote.message(answered, request, answer)
            if len(frame) > remote.MAX_ANSWER_BYTES:
                raise InvalidRequest(
                    f"this node's part of the answer has {len(frame)} bytes, the limit is {remote.MAX_ANSWER_BYTES}: "
                    "ask for a smaller k, fewer queries, or less in include"
                )
            self._reply(request, frame)
        except asyncio.CancelledError:
            return  # nobody waits for it
        except VecsvcError as error:
            self._reply(request, remote.message(Kind.FAILED, request, remote.failure(error)))
        except Exception as error:
            log.exception("a bug of ours", extra={"data": {"kind": kind.name}})
            self._reply(request, remote.message(Kind.FAILED, request, remote.failure(error)))

    def _forget(self, request: int, task: asyncio.Task[None]) -> None:
        if self.tasks.get(request) is task:
            del self.tasks[request]

    def _reply(self, request: int, data: bytes) -> None:
        self.tasks.pop(request, None)  # its number may be used again from here on
        self.send(data)

    def send(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)

    def close(self, *, flush: bool = False) -> None:
        """At once, or when what was answered is sent."""
        if self._transport is not None:
            self._transport.close() if flush else self._transport.abort()


def _full() -> remote.Failed:
    return remote.failure(Overloaded(f"{MAX_WAITING} requests of this front door wait for an answer"))
