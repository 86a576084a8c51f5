"""The node's end of the shard protocol: answers front doors from the versions that this process holds."""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
from typing import Any, Final, cast

import msgspec
import numpy as np

from vecsvc import remote, schemas
from vecsvc.catalog import Catalog, Served
from vecsvc.engine import Engine
from vecsvc.errors import ConfigError, DeadlineExceeded, Overloaded, ProtocolError, VecsvcError
from vecsvc.manifest import Manifest
from vecsvc.question_checks import encoder_of
from vecsvc.ranking import merge_top_k
from vecsvc.remote import Held, Holdings, Kind, Part
from vecsvc.shard import Found, Shard
from vecsvc.telemetry import LineBudget
from vecsvc.types import Id, VectorQuery

log: Final = logging.getLogger("vecsvc.shards")

MAX_FRONT_DOORS: Final = 256  # connections; one more is closed
MAX_WAITING: Final = 1024  # requests of one connection that are not answered yet
MAX_UNREAD_BYTES: Final = 256 << 20  # answers that a front door has not read; past that it is cut off
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
            self._server = await loop.create_server(lambda: _FrontDoor(self), host, port, ssl=tls, backlog=256)
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
        for connection in list(self.connections):
            connection.close(flush=True)


class _FrontDoor(asyncio.Protocol):
    """One connection of a front door."""

    def __init__(self, server: ShardServer) -> None:
        self._server = server
        self._frames = remote.Frames(remote.OF_FRONT_DOORS, remote.MAX_REQUEST_BYTES)
        self._transport: asyncio.Transport | None = None
        self._greeting: asyncio.TimerHandle | None = None
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
        self.close()  # who reads so little is gone

    def data_received(self, data: bytes) -> None:
        server, before = self._server, self._frames.held_bytes
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
        elif len(self.tasks) >= MAX_WAITING:
            self.send(remote.message(Kind.FAILED, request, _full()))
        elif request not in self.tasks:
            # Decoded here, so that bytes that cannot be read end the connection and not a task.
            asked = remote.decode_search(payload) if kind is Kind.SEARCH else remote.decode(kind, payload)
            task = asyncio.get_running_loop().create_task(self._answer(kind, request, asked))
            self.tasks[request] = task
            # Not at the end of the task's own work: one that is cancelled before it began never gets there.
            task.add_done_callback(lambda done: self._forget(request, done))

    async def _answer(self, kind: Kind, request: int, asked: Any) -> None:
        try:
            answered, answer = await _ANSWERS[kind](self._server, asked)
            self._reply(request, remote.message(answered, request, answer))
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


# ------------------------------------------------------------------------------------------------- answers


async def _search(server: ShardServer, asked: tuple[float, tuple[int, ...], remote.Ask]) -> tuple[Kind, Part]:
    timeout_ms, wanted, ask = asked
    settings, vectors = ask.settings(timeout_ms), ask.rows()
    served = _retained(server, ask.index, ask.digest)
    try:
        shards = served.some(wanted)
        search, found, clock = await server.engine.search_part(
            served, shards, VectorQuery(vectors), settings, of=ask.of
        )
        if any(part.stopped for part in found) and clock.passed() and not settings.partial:
            raise DeadlineExceeded("the search was cut short by the deadline")
        # Many hits take long enough to name to hold up the event loop.
        long = settings.k * len(vectors) > schemas.INLINE_HITS

        def make() -> Part:
            explain = search.explain(found) if "explain" in settings.include else None
            part = _part(shards, found, len(vectors), settings.k, settings.include)
            return msgspec.structs.replace(
                part, queue_s=clock.queue, search_s=clock.search, rerank_s=clock.rerank, explain=explain
            )

        return Kind.PART, await server.engine.in_thread(make) if long else make()
    finally:
        served.release()


def _part(shards: list[Shard], found: list[Found], n: int, k: int, include: frozenset[str]) -> Part:
    """The shards' answers merged: hits of each query by (distance, corpus row)."""
    counts: list[int] = []
    distances, rows, ids = [], [], list[Id]()
    fields: list[bytes] | None = [] if "fields" in include else None
    vectors: list[bytes] | None = [] if "vector" in include else None
    for row in range(n):
        if len(shards) == 1:
            labels = found[0].labels[row]
            kept = labels[labels >= 0]
            picked = [(shards[0], kept)]
            distances.append(found[0].distances[row][: len(kept)])
            rows.append(shards[0].rows[kept])
            ids += shards[0].ids.of(kept.tolist())
        else:
            parts = [
                (part.distances[row], np.where(part.labels[row] >= 0, shard.rows[part.labels[row]], -1))
                for shard, part in zip(shards, found, strict=True)
            ]
            which, position = merge_top_k(parts, k)
            distances.append(np.array([parts[w][0][p] for w, p in zip(which, position, strict=True)], np.float32))
            rows.append(np.array([parts[w][1][p] for w, p in zip(which, position, strict=True)], np.int64))
            picked = [(shards[w], found[w].labels[row, p : p + 1]) for w, p in zip(which, position, strict=True)]
            ids += [shard.ids.of(labels.tolist())[0] for shard, labels in picked]
        counts.append(len(rows[-1]))
        for shard, labels in picked if include else ():
            if fields is not None:
                stored = shard.fields.of(labels.tolist()) if shard.fields else [{}] * len(labels)
                fields += map(schemas.encode, stored)
            if vectors is not None:
                vectors += [np.asarray(shard.vectors[label], "<f4").tobytes() for label in labels]
    visited = [part.visited for part in found]
    return Part(
        counts=counts,
        distances=b"".join(part.astype("<f4", copy=False).tobytes() for part in distances),
        rows=b"".join(part.astype("<i8", copy=False).tobytes() for part in rows),
        ids=ids,
        fields=fields,
        vectors=b"".join(vectors) if vectors is not None else None,
        strategy=found[0].strategy if len({part.strategy for part in found}) == 1 else "mixed",
        visited=-1 if min(visited) < 0 else sum(visited),
        stopped=any(part.stopped for part in found),
        queue_s=0.0,
        search_s=0.0,
        rerank_s=0.0,
        explain=None,
    )


async def _find(server: ShardServer, asked: remote.Find) -> tuple[Kind, remote.FoundRow]:
    served = _retained(server, asked.index, asked.digest)
    try:
        for shard in served.shards:
            label = shard.ids.label(asked.id)
            if label is not None:
                return Kind.FOUND, remote.FoundRow(np.asarray(shard.vectors[label], "<f4").tobytes())
        return Kind.FOUND, remote.FoundRow(None)
    finally:
        served.release()


async def _embed(server: ShardServer, asked: remote.Embed) -> tuple[Kind, remote.EmbeddedTexts]:
    served = _retained(server, asked.index, asked.digest)
    try:
        if asked.role not in ("query", "passage"):
            raise ProtocolError(f"role is {asked.role[:80]!r}, expected query or passage")
        role: Any = asked.role
        encoder = encoder_of(served)
        made = await encoder.encode(asked.texts, role, deadline=time.monotonic() + asked.timeout_ms / 1e3)
    finally:
        served.release()
    vectors = made.vectors.astype("<f4", copy=False).tobytes()
    return Kind.EMBEDDED, remote.EmbeddedTexts(
        vectors, made.tokens, made.truncated, encoder.spec.name, made.queue_s, made.encode_s
    )


async def _describe(server: ShardServer, asked: remote.Describe) -> tuple[Kind, remote.Description]:
    served = _retained(server, asked.index, asked.digest)
    try:
        return Kind.DESCRIPTION, remote.Description(
            manifest=msgspec.json.encode(_without_files(served.manifest)),
            schema=served.stored.serialize().to_pybytes(),
            encoder=msgspec.json.encode(served.encoder.spec) if served.encoder is not None else b"",
            centroids=served.centroids.astype("<f4", copy=False).tobytes() if served.centroids is not None else None,
        )
    finally:
        served.release()


_ANSWERS: Final[dict[Kind, Any]] = {
    Kind.SEARCH: _search,
    Kind.FIND: _find,
    Kind.EMBED: _embed,
    Kind.DESCRIBE: _describe,
}


def _retained(server: ShardServer, index: str, digest: str) -> Served:
    """The version, kept open until the caller releases it: let_go may close it in its thread at any time."""
    while True:
        served = server.catalog.version(index, digest)
        served.retain()
        # What is still there after that was retained in time.
        if server.catalog.version(index, digest) is served:
            return served
        served.release()


def _without_files(manifest: Manifest) -> Manifest:
    replace = msgspec.structs.replace
    encoder = manifest.encoder
    return replace(
        manifest,
        shards=[replace(shard, files=[]) for shard in manifest.shards],
        encoder=replace(encoder, files=[], canaries=[]) if encoder is not None else None,
    )
