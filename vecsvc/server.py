"""HTTP: routes, the one error-to-status table, health, and every request's way in and out."""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import re
import secrets
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec
from aiohttp import hdrs, web

from vecsvc import ids, json_vectors, openapi, schemas, schemas_embed
from vecsvc.access import Key, Keyring
from vecsvc.admission import LARGE_BYTES
from vecsvc.catalog import Catalog
from vecsvc.config import HttpSettings
from vecsvc.direct import Direct, DirectHandler, answer_batch, arrived, usable
from vecsvc.door import CHALLENGE, Door, Handler, Route, invite, leave_body
from vecsvc.errors import (
    BodyTooLarge,
    DeadlineExceeded,
    Forbidden,
    InvalidRequest,
    MalformedRequest,
    NotReady,
    Overloaded,
    RequestTimeout,
    ServiceError,
    TextTooLong,
    Unauthorized,
    UnknownId,
    UnknownIndex,
    UnknownModel,
    UnknownVersion,
    UnsupportedMediaType,
    UserError,
    VecsvcError,
)
from vecsvc.front_door import Backend
from vecsvc.heads import Head
from vecsvc.manifest import check_whole
from vecsvc.question_checks import count
from vecsvc.reaper import Reaper
from vecsvc.server_embed import EmbedRoutes
from vecsvc.storage import index_folders
from vecsvc.telemetry import COUNTED_CONTENT_TYPE, LEFT, METRICS_CONTENT_TYPE, LineBudget, Metrics
from vecsvc.types import Query, SearchSettings

log: Final = logging.getLogger("vecsvc.server")

T = TypeVar("T")

# The one place that says which error is which status; the first class that fits wins.
STATUS: Final[tuple[tuple[type[VecsvcError], int], ...]] = (
    (MalformedRequest, 400),
    (Unauthorized, 401),
    (Forbidden, 403),
    (UnknownIndex, 404),
    (UnknownModel, 404),
    (UnknownId, 404),
    (UnknownVersion, 404),
    (RequestTimeout, 408),
    (BodyTooLarge, 413),
    (TextTooLong, 413),
    (UnsupportedMediaType, 415),
    (InvalidRequest, 422),
    (UserError, 422),
    (Overloaded, 429),
    (NotReady, 503),
    (DeadlineExceeded, 504),
    (VecsvcError, 500),
)
RETRY_AFTER_MS: Final = "Retry-After-Ms"  # where OpenAI's clients look first
RETRY_AFTER_S: Final = 1.0  # where the error does not know better
MAX_LINE_BYTES: Final = 32_768  # of a request line: room for the longest ?q= of percent-encoded UTF-8
REFUSAL_LINES_PER_S: Final = 10  # of requests that were not let in: they come in floods, and are no news
ADMIN_THREADS: Final = 4  # for reload and rollback alone, which so wait for no question

_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
_JSON: Final = "application/json; charset=utf-8"


class Service:
    """HTTP for one process, be it an engine over a folder of indexes or a front door: handlers and what they share."""

    def __init__(
        self, engine: Backend, settings: HttpSettings, metrics: Metrics, directory: Path | None = None
    ) -> None:
        """`directory` is the folder whose versions can be reloaded and rolled back; a front door has none."""
        self.settings = settings
        self.metrics = metrics
        self.engine = engine
        self.catalog = engine.catalog
        self.reaper = Reaper(settings)
        self.door = Door(Keyring(Path(settings.keys)) if settings.keys else None, self.engine.admission)
        self.embed_routes = EmbedRoutes(self.engine, settings, self.metrics, self._read, self.door)
        self.routes: dict[web.AbstractRoute, Route] = {}  # what each route of its applications declares
        self.draining = False
        self._loading: set[asyncio.Future[Any]] = set()  # threads that look for versions to open
        self._buffered = 0  # bytes of bodies that are being read
        self._directory = directory
        self._id_prefix = secrets.token_hex(4)
        self._counter = itertools.count(1)
        self._log_all = settings.log == "all"
        self._log_errors = settings.log != "none"
        self._lines = LineBudget(settings.log_lines_per_s)
        self._refusal_lines = LineBudget(min(REFUSAL_LINES_PER_S, settings.log_lines_per_s))
        self._admin_threads = ThreadPoolExecutor(ADMIN_THREADS, thread_name_prefix="vecsvc-admin")
        self.direct: Direct | None = None
        if usable():
            self.direct = Direct(
                engine,
                settings,
                self.metrics,
                self.door,
                MAX_LINE_BYTES,
                request_id=self._named,
                open=self._short_way_is_open,
                reserve=self._reserve,
                release=self._release,
                closes=lambda: self.draining,
                may_log=self.may_log,
                refused=self._refused,
            )

    # -------------------------------------------------------------------------------------- applications

    def app(self) -> web.Application:
        """The public routes."""
        return self._app(
            self.settings.max_body_bytes,
            [
                Route("POST", "/search", "read", "single", self._search),
                Route("GET", "/search", "read", "single", self._get_search),
                Route("POST", "/search/batch", "read", "many", self._batch),
                Route("GET", "/indexes", "read", "none", self._indexes),
                Route("GET", "/indexes/{name}", "read", "none", self._index),
                Route("POST", "/indexes/{name}/search", "read", "single", self._search),
                Route("GET", "/indexes/{name}/search", "read", "single", self._get_search),
                Route("POST", "/indexes/{name}/search/batch", "read", "many", self._batch),
                Route("GET", "/openapi.json", "read", "none", self._openapi),
                *self.embed_routes.routes(),
            ],
        )

    def admin_app(self) -> web.Application:
        """The routes of the admin port."""
        routes = [Route("GET", "/metrics", "metrics", "none", self._metrics)]
        if self._directory is not None:
            routes += [
                Route("POST", "/reload", "admin", "none", self._reload),
                Route("POST", "/indexes/{name}/rollback", "admin", "none", self._rollback),
            ]
        return self._app(65_536, routes)

    def _app(self, max_body_bytes: int, routes: list[Route]) -> web.Application:
        app = web.Application(client_max_size=max_body_bytes, middlewares=[self._border])
        probes = [
            Route("GET", "/livez", "open", "none", self._livez),
            Route("GET", "/readyz", "open", "none", self._readyz),
        ]
        for route in [*routes, *probes]:
            added = app.router.add_route(route.method, route.path, route.handler, expect_handler=_expect)
            self.routes[added] = route
        return app

    # ------------------------------------------------------------------------------------------ the border

    @web.middleware
    async def _border(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Every request comes in and goes out here: its id, its errors as JSON, its metrics and its log line."""
        started = time.perf_counter()
        self.reaper.begin(request)
        why = ""
        route = self.routes.get(request.match_info.route)
        resource = request.match_info.route.resource
        operation = resource.canonical if resource is not None else "unknown"
        request_id = self._named(request.headers.get("X-Request-Id"))
        data = {"request_id": request_id, "method": request.method, "path": request.path[:200]}
        try:
            # Where no route fits there is nothing to be let in to, and the handler says so.
            if route is not None:
                self.door.admit(request, route)
            response = await handler(request)
        except web.HTTPException as error:
            why = error.reason
            message = f"{error.reason}: {request.method} {request.path[:200]}"
            response = _error(error.status, _code(error.reason), message, request.path)
            leave_body(request, response)
            if hdrs.ALLOW in error.headers:
                response.headers[hdrs.ALLOW] = error.headers[hdrs.ALLOW]
        except ConnectionError:
            self._note(operation, LEFT, time.perf_counter() - started, data, self.door.key(request), "")
            raise
        except Exception as error:
            status, why, headers, body = self._explain(error, request.path)
            response = web.Response(status=status, body=body, headers=headers)
            if isinstance(error, VecsvcError):
                leave_body(request, response)
                if isinstance(error, BodyTooLarge | UnsupportedMediaType) or request.content.exception() is not None:
                    # What is left of the body would be taken for the next request.
                    response.force_close()
        finally:
            self.reaper.end(request)
        response.headers["X-Request-Id"] = request_id
        if self.draining:
            response.force_close()
        # aiohttp lets a handler go on when its client has left.
        status = response.status if request.transport is not None else LEFT
        self._note(operation, status, time.perf_counter() - started, data, self.door.key(request), why)
        return response

    def _explain(self, error: Exception, path: str) -> tuple[int, str, dict[str, str], bytes]:
        """The status of an error, what the log says of it, and its answer; of what is our fault the log tells more."""
        if isinstance(error, VecsvcError):
            why = str(error)
            status = next(status for kind, status in STATUS if isinstance(error, kind))
            if status == 500 and self.may_log():
                log.error("failed", exc_info=error)
            return status, why, *_error_parts(status, error.code, why, path, _retry_after_s(error))
        if self.may_log():
            log.error("a bug of ours", exc_info=error, extra={"data": {"path": path}})
        parts = _error_parts(500, "internal", "the service failed; its log says why", path, None)
        return 500, f"{type(error).__name__}: {error}", *parts

    def _note(
        self, operation: str, status: int, seconds: float, data: dict[str, Any], key: Key | None, why: str
    ) -> None:
        """Count a request that is over, and log it where that is asked for or it failed."""
        self.metrics.requests(operation, str(status)).inc()
        self.metrics.latency(operation).observe(seconds)
        lines = self._refusal_lines if status in (401, 403, 429) else self._lines
        if self._log_all or (why and self._log_errors and self.may_log(lines)):
            data = {**data, "status": status, "ms": round(seconds * 1e3, 3)}
            if key is not None:
                data["key"] = key.name
            log.info("request", extra={"data": {**data, "why": why} if why else data})

    def _named(self, given: str | None) -> str:
        """The id of a request: its own, where it has a good one."""
        if given is not None and _REQUEST_ID.fullmatch(given):
            return given
        return f"{self._id_prefix}-{next(self._counter):x}"

    def _refused(
        self, head: Head, error: Exception, seconds: float, key: Key | None
    ) -> tuple[int, dict[str, str], bytes]:
        """What the border does where a message finds no answer: the status, the headers and the body of its error."""
        status, why, headers, body = self._explain(error, head.path)
        request_id = self._named(head.request_id)
        data = {"request_id": request_id, "method": "POST", "path": head.path[:200]}
        self._note(head.operation, status, seconds, data, key, why)
        return status, {**headers, "X-Request-Id": request_id}, body

    def _short_way_is_open(self, length: int) -> bool:
        """Whether a message with so long a body may go the short way, past the border, where nobody is told of it."""
        return not (self.draining or self._log_all) and self._has_room(length)

    def _has_room(self, length: int) -> bool:
        """Whether a body of so many bytes may be read beside those that are being read."""
        # max_connections bounds small ones. A few who announce much and send nothing must not keep them out.
        return length <= LARGE_BYTES or self._buffered + length <= self.settings.max_buffered_bytes

    def _reserve(self, length: int) -> bool:
        """Count a body as being read until `_release`, where there is room for it."""
        if not self._has_room(length):
            return False
        self._buffered += _counted(length)
        return True

    def _release(self, length: int) -> None:
        self._buffered -= _counted(length)

    def refuse(self, why: str) -> web.Response:
        """The answer to bytes that are no HTTP, and so never became a request."""
        self.metrics.requests("unknown", "400").inc()
        if self._log_errors and (self._log_all or self.may_log()):
            log.info("request", extra={"data": {"status": 400, "why": why}})
        response = _error(400, MalformedRequest.code, why)
        response.force_close()
        return response

    def may_log(self, lines: LineBudget | None = None) -> bool:
        """Whether there is room for another line about a failed request; those left out are told a second later."""
        lines = lines if lines is not None else self._lines
        if lines.take():
            return True
        if lines.kept_back == 1:
            asyncio.get_running_loop().call_later(1.0, self._tell_kept_back, lines)
        return False

    def _tell_kept_back(self, lines: LineBudget) -> None:
        limit = "log_lines_per_s" if lines is self._lines else "REFUSAL_LINES_PER_S"
        log.warning("lines left out", extra={"data": {"lines": lines.kept_back, "limit": limit}})
        lines.kept_back = 0

    async def _read(self, request: web.Request, limit: int) -> bytes:
        """The whole body, within its limits of size and time; `limit` is that of this route."""
        if request.content_type != schemas.JSON:
            # aiohttp takes a missing or broken type for BINARY.
            given = request.headers.get(hdrs.CONTENT_TYPE, "")
            if given.partition(";")[0].strip().lower() != schemas.BINARY:
                raise UnsupportedMediaType(
                    f"Content-Type is {given[:80]!r}, expected {schemas.JSON} or {schemas.BINARY}: send a header, "
                    f"with curl -H 'Content-Type: {schemas.JSON}'"
                )
        elif "?" in request.raw_path:
            raise InvalidRequest("the settings of a JSON question stand in its body, not in the URL")
        if hdrs.CONTENT_ENCODING in request.headers:
            raise UnsupportedMediaType("compressed bodies are not taken; send it without Content-Encoding")
        length = request.content_length
        if length is not None and length > limit:
            raise BodyTooLarge(f"the body has {length} bytes, the limit here is {limit}")
        declared = length
        if declared is None:
            # Until the end of such a body nobody knows how long it is, so it counts as the longest from the start.
            declared, request = limit, request.clone(client_max_size=limit)
        if not self._has_room(declared):
            raise Overloaded(f"{self._buffered} bytes of bodies are being read, the limit is max_buffered_bytes")
        if not request.content.is_eof():
            self.reaper.await_body(request)
        elif length is not None and (whole := arrived(request.content)) is not None:
            return whole
        self._buffered += _counted(declared)
        try:
            await invite(request)
            if request.transport is None:
                raise ConnectionResetError("the client went away before its body was read")
            return await request.read()
        except web.HTTPRequestEntityTooLarge as error:
            raise BodyTooLarge(f"the body is larger than allowed, the limit here is {limit}") from error
        except web.RequestPayloadError as error:
            raise MalformedRequest(f"the body ended early: {error}") from error
        finally:
            self._release(declared)

    # -------------------------------------------------------------------------------------------- handlers

    async def _search(self, request: web.Request) -> web.Response:
        name = request.match_info.get("name")
        body = await self._read(request, self.settings.max_query_bytes)
        if request.content_type == schemas.JSON:
            query, settings = schemas.parse_search(body, self.settings)
        else:
            query, settings = self._binary(name, body, request)
            if len(body) != 4 * (dim := self._dim(name)):
                hint = "; float64 is not read, send float32" if len(body) == 8 * dim else ""
                raise InvalidRequest(
                    f"the body has {len(body)} bytes, one vector of dim {dim} has {4 * dim}: it holds more than one "
                    f"vector; send batches to {request.path}/batch{hint}"
                )
        answer = await self.engine.search(name, query, settings)
        return _json(schemas.encode(answer))

    async def _get_search(self, request: web.Request) -> web.Response:
        schemas.check_escapes(request.rel_url.raw_query_string)
        query, settings = schemas.parse_get(schemas.single(request.query), self.settings)
        answer = await self.engine.search(request.match_info.get("name"), query, settings)
        return _json(schemas.encode(answer))

    async def _batch(self, request: web.Request) -> web.Response:
        name = request.match_info.get("name")
        body = await self._read(request, self.settings.max_body_bytes)
        if request.content_type == schemas.JSON:
            query, settings = schemas.parse_batch(body, self.settings)
        else:
            query, settings = self._binary(name, body, request)
        arrow = schemas.wants_arrow(request.headers.get(hdrs.ACCEPT, ""))
        if arrow and settings.include:
            raise InvalidRequest("Arrow answers hold ids, scores and distances; ask for include as JSON")
        self.door.owe(self.door.key(request), count(query))
        data = await answer_batch(self.engine, name, query, settings, arrow=arrow)
        return web.Response(body=data, headers={hdrs.CONTENT_TYPE: schemas.ARROW if arrow else _JSON})

    def _binary(self, name: str | None, body: bytes, request: web.Request) -> tuple[Query, SearchSettings]:
        return schemas.parse_binary(body, self._dim(name), schemas.single(request.query), self.settings)

    def _dim(self, name: str | None) -> int:
        return self.catalog.get(name).manifest.spec.dim

    async def _indexes(self, request: web.Request) -> web.Response:
        listed = [openapi.index_summary(self.catalog.get(name)) for name in self.catalog.names()]
        return _json(schemas.encode({"indexes": listed}))

    async def _index(self, request: web.Request) -> web.Response:
        return _json(schemas.encode(openapi.index_detail(self.catalog.get(request.match_info["name"]))))

    async def _openapi(self, request: web.Request) -> web.Response:
        served = [self.engine.retained(name) for name in self.catalog.names()]
        try:
            return _json(msgspec.json.encode(openapi.document(served, self.settings)))
        finally:
            for one in served:
                one.release()

    async def _livez(self, request: web.Request) -> web.Response:
        return _json(b'{"status":"alive"}')

    async def _readyz(self, request: web.Request) -> web.Response:
        why = "shutting down" if self.draining else self.catalog.problem()
        if why:
            raise NotReady(why)
        return _json(b'{"status":"ready"}')

    async def _metrics(self, request: web.Request) -> web.Response:
        self._look_at_gauges()
        if request.headers.get(hdrs.ACCEPT) == COUNTED_CONTENT_TYPE:
            # The parent of several workers asks, which adds up.
            return web.Response(
                body=schemas.encode(self.metrics.counted()), headers={hdrs.CONTENT_TYPE: COUNTED_CONTENT_TYPE}
            )
        return web.Response(body=self.metrics.text(), headers={hdrs.CONTENT_TYPE: METRICS_CONTENT_TYPE})

    def _look_at_gauges(self) -> None:
        self.metrics.in_flight.set(self.engine.in_flight)
        self.metrics.ready.set(0 if self.draining or self.catalog.problem() else 1)
        self.metrics.encoder_waiting.clear()
        self.metrics.version_info.clear()
        self.catalog.gauges(self.metrics)

    async def _reload(self, request: web.Request) -> web.Response:
        """Look at CURRENT now, and try again what could not be opened."""
        _no_page(request)
        _only(schemas.single(request.query))
        changed = await self.refresh(again=True)
        return _json(schemas.encode({"changed": dict(changed), "problems": self.catalog.problems}))

    async def _rollback(self, request: web.Request) -> web.Response:
        """Serve the version before, or `?to=VERSION`."""
        _no_page(request)
        name, to = request.match_info["name"], _only(schemas.single(request.query), "to").get("to")
        assert self._directory is not None, "a front door has no such route"
        folders = {folder.name: folder for folder in index_folders(self._directory)}
        if name not in folders:
            raise UnknownIndex(f"no index {name[:80]!r}; there are: {', '.join(folders)}")
        before, after = await self._as_admin(lambda: folders[name].rollback(to, check_whole))
        await self.refresh(again=True)
        return _json(schemas.encode({"index": name, "from": before, "to": after, "problems": self.catalog.problems}))

    async def _as_admin(self, run: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._admin_threads, run)

    @property
    def at_work(self) -> bool:
        """True where a thread still searches or opens a version."""
        return bool(self.engine.in_flight or self._loading)

    async def refresh(self, *, again: bool = False) -> list[tuple[str, str]]:
        catalog = self.catalog
        assert isinstance(catalog, Catalog), "a front door looks at its nodes, not at folders"

        def refresh() -> list[tuple[str, str]]:
            json_vectors.load()
            ids.load_kernels()
            return catalog.refresh(again=again)

        look = asyncio.ensure_future(self._as_admin(refresh))
        self._loading.add(look)
        look.add_done_callback(self._loading.discard)
        changed = await asyncio.shield(look)  # whoever waited may go, the thread stays at work
        for name, version in changed:
            self.metrics.swaps(name).inc()
            log.info("serving", extra={"data": {"index": name, "version": version}})
        return changed


class Connection(DirectHandler):
    """aiohttp's connection, but what it cannot read is refused in our words and without a traceback in the log."""

    __slots__ = ("_service",)

    def __init__(self, service: Service, server: web.Server | None, *, public: bool = True) -> None:
        """Questions have their short way on the public port alone: on the admin port there is no such route."""
        super().__init__(
            server,
            direct=service.direct if public else None,
            reaper=service.reaper,
            keepalive_timeout=service.settings.keepalive_s,
            access_log=None,
            max_line_size=MAX_LINE_BYTES,
            auto_decompress=False,  # compressed bodies are refused, so there is no bomb to go off
        )
        self._service = service

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        if isinstance(exc, ConnectionError):
            raise exc  # nobody is there to be answered
        if request.writer.output_size > 0:
            raise ConnectionError("the answer had begun, there is no room for another")
        if status == 400:
            return self._service.refuse(f"this is no HTTP request: {' '.join((message or '').split())[:200]}")
        if self._service.may_log():
            log.error("a bug of ours", exc_info=exc)
        return _error(500, "internal", "the service failed; its log says why")


def _no_page(request: web.Request) -> None:
    """A browser says which page sends a request; no page has any business on the admin port."""
    if hdrs.ORIGIN in request.headers:
        raise InvalidRequest(f"requests of web pages are refused here, Origin is {request.headers[hdrs.ORIGIN][:80]!r}")


def _counted(length: int) -> int:
    """What a body counts of max_buffered_bytes while it is read."""
    return length if length > LARGE_BYTES else 0


def _json(body: bytes) -> web.Response:
    return web.Response(body=body, headers={hdrs.CONTENT_TYPE: _JSON})


def _error(status: int, code: str, message: str, path: str = "", retry_after_s: float | None = None) -> web.Response:
    headers, body = _error_parts(status, code, message, path, retry_after_s)
    return web.Response(status=status, body=body, headers=headers)


def _error_parts(
    status: int, code: str, message: str, path: str, retry_after_s: float | None
) -> tuple[dict[str, str], bytes]:
    """An error in the shape that the callers of `path` expect; what passes says when to come again."""
    headers: dict[str, str] = {hdrs.CONTENT_TYPE: _JSON}
    retry_after_ms: int | None = None
    if status in (429, 503):
        seconds = retry_after_s if retry_after_s is not None else RETRY_AFTER_S
        retry_after_ms = max(1, math.ceil(seconds * 1e3))
        headers[hdrs.RETRY_AFTER] = str(math.ceil(retry_after_ms / 1e3))
        headers[RETRY_AFTER_MS] = str(retry_after_ms)
    elif status == 401:
        headers[hdrs.WWW_AUTHENTICATE] = CHALLENGE
    return headers, schemas_embed.error_body(path, status, code, message, retry_after_ms)


def _retry_after_s(error: VecsvcError) -> float | None:
    return error.retry_after_s if isinstance(error, ServiceError) else None


def _code(reason: str) -> str:
    return reason.lower().replace(" ", "_")


def _only(query: dict[str, str], *known: str) -> dict[str, str]:
    for name in query:
        if name not in known:
            raise InvalidRequest(f"?{name[:80]} is unknown here; known are: {', '.join(known) or 'none'}")
    return query


async def _expect(request: web.Request) -> web.StreamResponse | None:
    """A refusal of what is expected beyond the one thing that HTTP knows; `invite` grants that, once it is wanted."""
    if request.headers[hdrs.EXPECT].lower() != "100-continue":
        message = f"Expect is {request.headers[hdrs.EXPECT][:80]!r}, expected 100-continue"
        return _error(417, "expectation_failed", message, request.path)
    return None
