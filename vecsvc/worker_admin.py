"""The admin port of several workers: asks each, and answers for all.

A request is passed on as it came, to a unix socket on which each worker serves its own admin routes, so that whoever
may not ask one process may not ask all of them either.
"""

from __future__ import annotations

import asyncio
import logging
import re
import ssl
from collections.abc import Iterable, Mapping
from typing import Any, Final

import aiohttp
import msgspec
import yarl
from aiohttp import hdrs, web
from prometheus_client import Gauge
from prometheus_client.core import CounterMetricFamily

from vecsvc.errors import ConfigError, NotReady
from vecsvc.reaper import Reaper
from vecsvc.telemetry import COUNTED_CONTENT_TYPE, METRICS_CONTENT_TYPE, Counted
from vecsvc.worker_places import Parent, Place

log: Final = logging.getLogger("vecsvc.workers")

PROBE_S: Final = 5.0  # for a worker to say how it is
RETRY_AFTER_MS: Final = 1000  # for a worker to come back
STARTING_S: Final = 30.0  # for one that is just being started to hear of a reload
_JSON: Final = "application/json; charset=utf-8"
_ROLLBACK: Final = re.compile(r"/indexes/[^/?]+/rollback(\?.*)?")
# Of one connection, and set anew for the other.
_OF_ONE_HOP: Final = frozenset(
    name.lower()
    for name in (hdrs.CONNECTION, hdrs.CONTENT_LENGTH, hdrs.TRANSFER_ENCODING, hdrs.EXPECT, hdrs.DATE, hdrs.SERVER)
)


class Reply(msgspec.Struct, frozen=True):
    """What a worker answered."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes

    def response(self, body: bytes | None = None, content_type: str | None = None) -> web.Response:
        """The same to the one who asked, with another body where one is given."""
        made = web.Response(status=self.status, body=self.body if body is None else body)
        for name, value in self.headers:
            made.headers.add(name, value)
        if content_type is not None:
            made.headers[hdrs.CONTENT_TYPE] = content_type
        return made


class Admin:
    """The parent's own port. Belongs to its event loop."""

    def __init__(self, parent: Parent) -> None:
        self._parent = parent
        self._reaper = Reaper(parent.settings)
        self._server = web.Server(self._handle, keepalive_timeout=parent.settings.keepalive_s, access_log=None)
        self._runner = web.ServerRunner(self._server)
        self._sessions = {
            place.number: aiohttp.ClientSession(connector=aiohttp.UnixConnector(place.admin_path, force_close=True))
            for place in parent.places
        }
        self._workers = Gauge("vecsvc_workers", "Worker processes that listen", registry=parent.metrics.registry)
        self._listener: asyncio.Server | None = None
        self._reaping: asyncio.Task[None] | None = None
        parent.metrics.registry.register(_Deaths(parent))

    async def listen(self, host: str, port: int, tls: ssl.SSLContext | None = None) -> int:
        """Returns the port. Raises ConfigError."""
        await self._runner.setup()
        limit = self._parent.settings.header_timeout_s
        secure: dict[str, Any] = {"ssl": tls, "ssl_handshake_timeout": limit} if tls is not None else {}
        try:
            self._listener = await asyncio.get_running_loop().create_server(self._server, host, port, **secure)
        except OSError as error:
            await self.close()
            raise ConfigError(f"cannot listen on {host}:{port}: {_why(error)}; choose another port") from error
        self._reaping = asyncio.create_task(self._reaper.run([self._runner]))
        made: int = self._listener.sockets[0].getsockname()[1]
        return made

    async def close(self) -> None:
        if self._listener is not None:
            self._listener.close()
        if self._reaping is not None:
            self._reaping.cancel()
        await self._runner.cleanup()
        for session in self._sessions.values():
            await session.close()

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        self._reaper.begin(request)
        try:
            response = await self._answer(request)
        except NotReady as error:
            response = _error(503, error.code, str(error))
        except Exception:
            log.exception("a bug of ours", extra={"data": {"path": request.path[:200]}})
            response = _error(500, "internal", "the service failed; its log says why")
        finally:
            self._reaper.end(request)
        if not request.content.is_eof():
            response.force_close()  # bodies mean nothing here, and are not waited for
        return response

    async def _answer(self, request: web.BaseRequest) -> web.Response:
        method, target = request.method, request.raw_path
        if (method, target) == ("GET", "/metrics"):
            return await self._metrics(request)
        if method == "GET" and target in ("/livez", "/readyz"):
            return await self._probe(request, target)
        if method == "POST" and target.partition("?")[0] == "/reload":
            return _joined(await self._ask(self._parent.places, request, STARTING_S))
        if method == "POST" and _ROLLBACK.fullmatch(target):
            first = self._one()
            reply = await self._pass_on(first, request)
            if reply.status != 200:
                return reply.response()
            # That changed what all shall serve, and the others are told to look.
            others = [place for place in self._parent.places if place is not first]
            return _joined([reply, *await self._ask(others, request, STARTING_S, target="/reload")])
        return (await self._pass_on(self._one(), request)).response()

    async def _metrics(self, request: web.BaseRequest) -> web.Response:
        """What all counted. A worker that cannot be asked just now is there with what it told last."""
        parent = self._parent
        listening = [place for place in parent.places if place.listening]
        accept = {str(hdrs.ACCEPT): COUNTED_CONTENT_TYPE}
        asked = await asyncio.gather(
            *(self._pass_on(place, request, PROBE_S, headers=accept) for place in listening), return_exceptions=True
        )
        replies = [reply for reply in asked if isinstance(reply, Reply)]
        for reply in replies:
            if reply.status != 200:
                return reply.response()
        if not replies:
            raise NotReady(parent.problem() or "no worker answers")
        for place, answer in zip(listening, asked, strict=True):
            if isinstance(answer, Reply):
                place.learn(msgspec.json.decode(answer.body, type=Counted))
        parent.metrics.show(parent.counted())
        if len(replies) < len(parent.places) or parent.draining:
            parent.metrics.ready.set(0)
        self._workers.set(len(listening))
        return replies[0].response(parent.metrics.text(), METRICS_CONTENT_TYPE)

    async def _probe(self, request: web.BaseRequest, target: str) -> web.Response:
        """Alive where every worker that listens answers; ready where there is one in every place, and it is."""
        parent = self._parent
        if target == "/readyz":
            if parent.draining:
                raise NotReady("shutting down")
            if any(not place.listening for place in parent.places):
                raise NotReady(parent.problem())
        listening = [place for place in parent.places if place.listening]
        replies = await self._ask(listening, request, PROBE_S)
        for reply in replies:
            if reply.status != 200:
                return reply.response()
        if replies:
            return replies[0].response()
        return web.Response(body=b'{"status":"alive"}', headers={hdrs.CONTENT_TYPE: _JSON})

    async def _ask(
        self, places: Iterable[Place], request: web.BaseRequest, starting_s: float, target: str | None = None
    ) -> list[Reply]:
        """The same question to several. Raises NotReady where one does not answer.

        Those that listen have as long as they need where the question opens versions, which may take minutes.
        """
        probe = starting_s == PROBE_S
        return await asyncio.gather(
            *(
                self._pass_on(place, request, starting_s if probe or not place.listening else None, target)
                for place in places
            )
        )

    def _one(self) -> Place:
        """A worker that can answer for all."""
        for place in self._parent.places:
            if place.listening:
                return place
        raise NotReady(self._parent.problem() or "no worker listens")

    async def _pass_on(
        self,
        place: Place,
        request: web.BaseRequest,
        timeout_s: float | None = None,
        target: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Reply:
        """Ask one worker what we were asked. Raises NotReady where it does not answer."""
        passed = [(n, v) for n, v in request.headers.items() if n.lower() not in _OF_ONE_HOP]
        if headers is not None:
            passed = [(n, v) for n, v in passed if n not in headers] + list(headers.items())
        url = yarl.URL(f"http://worker{target or request.raw_path}", encoded=True)
        asking = asyncio.create_task(self._ask_one(place, request.method, url, passed, timeout_s))
        waiting: set[asyncio.Task[Any]] = {asking}
        if place.listening:
            # The next one in its place would take the question over from its socket, but only when it listens.
            waiting.add(asyncio.create_task(place.ended.wait()))
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if not asking.done():
                raise NotReady(f"worker {place.number} died while it was asked")
            return asking.result()
        except (aiohttp.ClientError, OSError) as error:
            why = "does not answer" if isinstance(error, TimeoutError) else f"is gone: {_why(error)}"
            raise NotReady(place.problem or f"worker {place.number} {why}") from error
        finally:
            for task in waiting:
                task.cancel()

    async def _ask_one(
        self, place: Place, method: str, url: yarl.URL, headers: list[tuple[str, str]], timeout_s: float | None
    ) -> Reply:
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        async with self._sessions[place.number].request(
            method, url, headers=headers, timeout=timeout, allow_redirects=False
        ) as response:
            kept = [(n, v) for n, v in response.headers.items() if n.lower() not in _OF_ONE_HOP]
            return Reply(response.status, kept, await response.read())


class _Deaths:
    """Counted by the parent: no worker lives to count its own."""

    def __init__(self, parent: Parent) -> None:
        self._parent = parent

    def collect(self) -> Iterable[CounterMetricFamily]:
        counted = CounterMetricFamily("vecsvc_worker_deaths", "Workers that ended unasked")
        counted.add_metric([], self._parent.deaths)
        yield counted


def _joined(replies: list[Reply]) -> web.Response:
    """The answer of the first with what others changed or lack; where one failed, that one's."""
    for reply in replies:
        if reply.status != 200:
            return reply.response()
    whole: dict[str, Any] = msgspec.json.decode(replies[0].body)
    for reply in replies[1:]:
        other = msgspec.json.decode(reply.body)
        for name in ("changed", "problems"):
            if name in whole:
                whole[name] = {**whole[name], **other[name]}
    return replies[0].response(msgspec.json.encode(whole))


def _error(status: int, code: str, message: str) -> web.Response:
    error: dict[str, Any] = {"code": code, "message": message}
    headers = {hdrs.CONTENT_TYPE: _JSON}
    if status == 503:
        error["retry_after_ms"] = RETRY_AFTER_MS
        headers[hdrs.RETRY_AFTER] = str(RETRY_AFTER_MS // 1000)
    return web.Response(status=status, body=msgspec.json.encode({"error": error}), headers=headers)


def _why(error: Exception) -> str:
    return str(error) or type(error).__name__
