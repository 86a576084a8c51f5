"""The life of the serving process: from its ports and first versions to SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import functools
import gc
import logging
import os
import resource
import signal
import socket
import ssl
import struct
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

import msgspec
import threadpoolctl
import uvloop
from aiohttp import web

from vecsvc import __version__, machine_code
from vecsvc.catalog import Catalog
from vecsvc.config import HttpSettings, ServeSettings, make
from vecsvc.control import Handed, Link, Report, end_with
from vecsvc.engine import Engine
from vecsvc.errors import ConfigError, UserError, VecsvcError
from vecsvc.ports import http_tls, needs_shard_port, shard_tls, warn_if_open
from vecsvc.server import Connection, Service
from vecsvc.shard_server import ShardServer
from vecsvc.telemetry import Metrics, configure_logging

log: Final = logging.getLogger("vecsvc.server")

SPARE_FILES: Final = 1024  # open files besides connections: indexes, logs, libraries
SWITCH_S: Final = 0.001
BACKLOG: Final = 1024  # connections that wait to be accepted
GRACE_S: Final = 0.25  # for requests that were on their way when the port closed
GRACE_LOOKS: Final = 25  # in so many looks, one behind the other, none has come

_SO_ATTACH_FILTER: Final = 26  # Linux; Python has no name for it
# A program of the classic packet filter, over a TCP head: drop what has the SYN flag, pass the rest.
_NO_SYN: Final = ((0x30, 0, 0, 13), (0x45, 0, 1, 0x02), (0x06, 0, 0, 0), (0x06, 0, 0, 0xFFFFFFFF))


def serve(directory: Path, settings: ServeSettings, handed: Handed | None = None) -> None:
    """Serve a folder of indexes until SIGTERM or SIGINT. Raises ConfigError where a port cannot be had.

    One of several workers was `handed` its ports, and is ended by its parent.
    """
    configure_logging(worker=handed.number if handed is not None else None)
    machine_code.keep_in(Path(settings.kernels) if settings.kernels else None)
    allow_files(settings)
    # The event loop waits so long for a thread that works in Python: of Python's own 5 ms a query would feel each.
    sys.setswitchinterval(SWITCH_S)
    # Searches run side by side in threads; a matrix product that took every core would fight the others.
    with threadpoolctl.threadpool_limits(limits=1, user_api="blas"):
        uvloop.run(_run(directory, settings, handed))


def work(given: dict[str, Any]) -> None:
    """The whole life of a worker; `given` is what workers.py wrote to its standard input."""
    handed = msgspec.convert(given, Handed)
    end_with(handed.parent)
    for number in (signal.SIGTERM, signal.SIGINT):
        # Whoever signals a whole group means the service; the parent gets it too, and says what to do.
        signal.signal(number, signal.SIG_IGN)
    try:
        serve(Path(handed.directory), make(ServeSettings, handed.settings, what="[serve]"), handed)
    except VecsvcError as error:
        sys.stderr.write(f"vecsvc: {error}\n")
        sys.exit(2 if isinstance(error, UserError) else 1)


def allow_files(settings: HttpSettings) -> None:
    """A connection is an open file, and many systems allow 1024 of them to those who do not ask for more."""
    wanted = settings.max_connections + SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
        if allowed < wanted:
            log.warning("few files", extra={"data": {"allowed": allowed, "wanted": wanted, "remedy": "ulimit -n"}})


async def _run(directory: Path, settings: ServeSettings, handed: Handed | None = None) -> None:
    started = time.perf_counter()
    needs_shard_port(settings)
    catalog, engine, service = node(directory, settings)
    tls, admin_tls = http_tls(settings, service.metrics)
    machine_code.announce = functools.partial(_compiling, catalog)
    looked = asyncio.Event()
    runners: list[web.AppRunner] = []

    def report() -> Report:
        problem = catalog.problem() if looked.is_set() else "it is starting"
        return Report(len(runners) == 2, problem, service.metrics.counted())

    link = Link(handed.control, report) if handed is not None else None
    # A parent says it once for all its workers.
    note = log.info if link is None else log.debug
    talk: asyncio.Task[None] | None = None
    stop = stop_signal() if link is None else asyncio.Event()
    if link is not None:
        talk = await link.open(drain=stop.set, end=functools.partial(_exit, 1))
    tell = link.report if link is not None else lambda: None
    watching = functools.partial(_watch, service, settings, started, looked, note, tell)
    watch: asyncio.Task[None] | None = None
    if handed is not None and handed.successor:
        # Who waits in the socket since the last worker died is to be answered, not refused.
        watch = asyncio.create_task(watching())
        await _first(looked, stop)
    ports = [socket.socket(fileno=file) for file in handed.ports] if handed is not None else []
    runner, listeners = await listen(service, service.app(), settings.host, settings.port, tls, ports)
    runners.append(runner)
    admin_ports = [socket.socket(fileno=handed.admin)] if handed is not None else []
    admin, admin_listeners = await listen(
        service, service.admin_app(), settings.admin_host, settings.admin_port, admin_tls, admin_ports, public=False
    )
    runners.append(admin)
    shards = ShardServer(engine, catalog) if settings.shard_port is not None else None
    if link is None:
        port, admin_port = (made[0].sockets[0].getsockname()[1] for made in (listeners, admin_listeners))
        facts = {"version": __version__, "host": settings.host, "port": port, "admin_port": admin_port}
        if shards is not None and settings.shard_port is not None:
            secure = shard_tls(settings, service.metrics)
            facts["shard_port"] = await shards.listen(settings.shard_host, settings.shard_port, secure)
        log.info("listening", extra={"data": facts})
        warn_if_open(settings)
    tell()
    watch = watch or asyncio.create_task(watching())
    reap = asyncio.create_task(service.reaper.run(runners))
    holdings = asyncio.create_task(shards.watch()) if shards is not None else None
    await stop.wait()
    service.draining = True
    watch.cancel()
    catalog.draining = True
    note("draining", extra={"data": {"in_flight": service.engine.in_flight}})
    if shards is not None:
        shards.drain()
    await asyncio.sleep(settings.drain_s)
    await close_port(listeners, service, runner, tls)
    await finish(service, runner)
    if shards is not None and holdings is not None:
        await shards.finish(settings.shutdown_s)
        holdings.cancel()
    reap.cancel()
    await runner.cleanup()
    for listener in admin_listeners:
        listener.close()
    await admin.cleanup()
    tell()
    if talk is not None:
        talk.cancel()
    note("stopped")
    if service.at_work:
        # A thread cannot be told to stop, and holds nothing that would have to be saved.
        _exit(0)
    engine.close()
    catalog.close()


async def _first(*events: asyncio.Event) -> None:
    """Wait until one of them is set."""
    waits = [asyncio.ensure_future(event.wait()) for event in events]
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()


def node(directory: Path, settings: ServeSettings) -> tuple[Catalog, Engine, Service]:
    """What one process is made of that serves a folder of indexes."""
    metrics = Metrics()
    catalog = Catalog(directory, settings, metrics)
    engine = Engine(catalog, settings, metrics, settings.search_threads or os.cpu_count() or 1)
    return catalog, engine, Service(engine, settings, metrics, directory)


def stop_signal() -> asyncio.Event:
    """Set at the first SIGTERM or SIGINT; a second one ends the process."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _stop, stop)
    return stop


def _compiling(catalog: Catalog, what: str) -> None:
    """Called in the thread that loads an index, for each kernel that has to be compiled."""
    catalog.waits_for(what)  # first: who has read the line may ask /readyz at once
    log.info("compiling", extra={"data": {"what": what}})


def _stop(stop: asyncio.Event) -> None:
    """Once: end what is in flight, then the process. Twice: end the process."""
    if stop.is_set():
        log.info("stopped at once")
        _exit(1)
    stop.set()


def _exit(code: int) -> NoReturn:
    logging.shutdown()
    os._exit(code)


async def listen(
    service: Service,
    app: web.Application,
    host: str,
    port: int,
    tls: ssl.SSLContext | None,
    made: Sequence[socket.socket] = (),
    *,
    public: bool = True,
) -> tuple[web.AppRunner, list[asyncio.Server]]:
    """Serve `app` on a port, or on the sockets that somebody made for it; the admin port is not `public`."""
    # _finish waits for requests in flight; when that is over, aiohttp need not begin to wait anew.
    runner = web.AppRunner(app, shutdown_timeout=GRACE_S)
    await runner.setup()
    loop = asyncio.get_running_loop()

    def connection() -> Connection:
        return Connection(service, runner.server, public=public)

    listeners = []
    try:
        secure = _handshake(service, tls)
        for ready in made:
            if ready.family == socket.AF_UNIX:  # between the processes of one service
                listeners.append(await loop.create_unix_server(connection, sock=ready, backlog=BACKLOG))
            else:
                listeners.append(await loop.create_server(connection, sock=ready, backlog=BACKLOG, **secure))
        if not made:
            listeners.append(await loop.create_server(connection, host, port, backlog=BACKLOG, **secure))
    except OSError as error:
        await runner.cleanup()
        # asyncio puts words of its own around the system's.
        why = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
        unknown = isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL
        place = "address" if unknown else "port"
        raise ConfigError(f"cannot listen on {host}:{port}: {why}; choose another {place}") from error
    return runner, listeners


def _handshake(service: Service, tls: ssl.SSLContext | None) -> dict[str, Any]:
    """Before its handshake a connection is none that the reaper knows, so that has a limit of its own."""
    return {"ssl": tls, "ssl_handshake_timeout": service.settings.header_timeout_s} if tls is not None else {}


async def close_port(
    listeners: list[asyncio.Server], service: Service, runner: web.AppRunner, tls: ssl.SSLContext | None
) -> None:
    """Close the port, and take in whom the kernel let in already: for a client, that is to be accepted."""
    held = [socket.socket(fileno=os.dup(port.fileno())) for listener in listeners for port in listener.sockets]
    for port in held:
        admit_nobody(port)
    for listener in listeners:
        listener.close()
    waiting: list[socket.socket] = []
    for port in held:
        with port, contextlib.suppress(OSError):
            port.setblocking(False)
            while True:
                waiting.append(port.accept()[0])
    loop, options = asyncio.get_running_loop(), _handshake(service, tls)
    taken = [loop.connect_accepted_socket(lambda: Connection(service, runner.server), c, **options) for c in waiting]
    await asyncio.gather(*taken, return_exceptions=True)  # who fails to shake hands is no concern of the others


def admit_nobody(port: socket.socket) -> bool:
    """Have the kernel drop whoever would connect from now on, and let those in who are half-way.

    Who came between the last look and the close would be reset with a question on its way, and nobody may ask a POST
    again. One that is dropped asks again after a second, by then at a closed port, which sends it elsewhere. False
    where the system cannot do that, and it is as without.
    """
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in _NO_SYN))
    program = struct.pack("HL", len(_NO_SYN), ctypes.addressof(code))
    if port.family not in (socket.AF_INET, socket.AF_INET6) or sys.platform != "linux":
        return False
    try:
        port.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)
    except OSError:
        return False
    return True


async def _watch(
    service: Service,
    settings: ServeSettings,
    started: float,
    looked: asyncio.Event,
    note: Callable[..., None],
    report: Callable[[], None],
) -> None:
    """Open what there is, then look for new versions now and then. `report` is called where that changed something."""
    told = ""
    while True:
        try:
            changed = await service.refresh()
        except Exception:
            # Whatever went wrong, what serves goes on serving, and the next look may go better.
            log.exception("refresh failed")
            changed = []
        if changed:
            # What was just opened stays for long: the garbage collector need not walk it again and again.
            gc.collect()
            gc.freeze()
        problem = service.catalog.problem()
        if problem and problem != told:
            log.warning("not ready", extra={"data": {"why": problem}})
        elif not problem and (changed or told):
            note("ready", extra={"data": {"up_s": round(time.perf_counter() - started, 3)}})
        news = problem != told or not looked.is_set()
        looked.set()
        if news:
            report()
        told = problem
        if not settings.reload_poll_s:
            return
        await asyncio.sleep(settings.reload_poll_s)


async def finish(service: Service, runner: web.AppRunner) -> None:
    """Wait for requests in flight, and for those that were on their way when the port closed.

    Looks are counted, not time: one that comes late, because the process had no processor, has not read what came
    meanwhile.
    """
    end, quiet = time.monotonic() + service.settings.shutdown_s, 0
    while time.monotonic() < end and quiet < GRACE_LOOKS:
        await asyncio.sleep(GRACE_S / GRACE_LOOKS)
        connections = runner.server.connections if runner.server is not None else []
        quiet = quiet + 1 if service.reaper.quiet(connections) else 0
