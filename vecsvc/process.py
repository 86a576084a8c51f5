"""The life of the serving process: from its ports and first versions to SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import logging
import os
import resource
import signal
import socket
import ssl
import sys
import time
from pathlib import Path
from typing import Any, Final, NoReturn

import threadpoolctl
import uvloop
from aiohttp import web

from vecsvc import __version__, machine_code
from vecsvc.access import is_loopback
from vecsvc.catalog import Catalog
from vecsvc.config import HttpSettings, ServeSettings
from vecsvc.engine import Engine
from vecsvc.errors import ConfigError
from vecsvc.server import Connection, Service
from vecsvc.shard_server import ShardServer
from vecsvc.telemetry import Metrics, configure_logging
from vecsvc.tls import server_tls

log: Final = logging.getLogger("vecsvc.server")

SPARE_FILES: Final = 1024  # open files besides connections: indexes, logs, libraries
SWITCH_S: Final = 0.001
GRACE_S: Final = 0.25  # for requests that were on their way when the port closed


def serve(directory: Path, settings: ServeSettings) -> None:
    """Serve a folder of indexes until SIGTERM or SIGINT. Raises ConfigError where a port cannot be had."""
    configure_logging()
    machine_code.keep_in(Path(settings.kernels) if settings.kernels else None)
    allow_files(settings)
    # The event loop waits so long for a thread that works in Python: of Python's own 5 ms a query would feel each.
    sys.setswitchinterval(SWITCH_S)
    # Searches run side by side in threads; a matrix product that took every core would fight the others.
    with threadpoolctl.threadpool_limits(limits=1, user_api="blas"):
        uvloop.run(_run(directory, settings))


def allow_files(settings: HttpSettings) -> None:
    """A connection is an open file, and many systems allow 1024 of them to those who do not ask for more."""
    wanted = settings.max_connections + SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
        if allowed < wanted:
            log.warning("few files", extra={"data": {"allowed": allowed, "wanted": wanted, "remedy": "ulimit -n"}})


async def _run(directory: Path, settings: ServeSettings) -> None:
    started = time.perf_counter()
    catalog, engine, service = node(directory, settings)
    tls, admin_tls = http_tls(settings)
    machine_code.announce = functools.partial(_compiling, catalog)
    runner, listener = await listen(service, service.app(), settings.host, settings.port, tls)
    admin, admin_listener = await listen(
        service, service.admin_app(), settings.admin_host, settings.admin_port, admin_tls
    )
    stop = stop_signal()
    port, admin_port = (server.sockets[0].getsockname()[1] for server in (listener, admin_listener))
    facts = {"version": __version__, "host": settings.host, "port": port, "admin_port": admin_port}
    shards: ShardServer | None = None
    if settings.shard_port is not None:
        shards = ShardServer(engine, catalog)
        facts["shard_port"] = await shards.listen(settings.shard_host, settings.shard_port, shard_tls(settings))
    log.info("listening", extra={"data": facts})
    warn_if_open(settings)
    watch = asyncio.create_task(_watch(service, settings, started))
    reap = asyncio.create_task(service.reaper.run([runner, admin]))
    tell = asyncio.create_task(shards.watch()) if shards is not None else None
    await stop.wait()
    service.draining = True
    log.info("draining", extra={"data": {"in_flight": service.engine.in_flight}})
    if shards is not None:
        shards.drain()
    await asyncio.sleep(settings.drain_s)
    await close_port(listener, service, runner, tls)
    await finish(service, runner)
    if shards is not None and tell is not None:
        await shards.finish(settings.shutdown_s)
        tell.cancel()
    reap.cancel()
    watch.cancel()
    await runner.cleanup()
    admin_listener.close()
    await admin.cleanup()
    log.info("stopped")
    if service.at_work:
        # A thread cannot be told to stop, and holds nothing that would have to be saved.
        _exit(0)
    engine.close()
    catalog.close()


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
    log.info("compiling", extra={"data": {"what": what}})
    catalog.waits_for(what)


def _stop(stop: asyncio.Event) -> None:
    """Once: end what is in flight, then the process. Twice: end the process."""
    if stop.is_set():
        log.info("stopped at once")
        _exit(1)
    stop.set()


def _exit(code: int) -> NoReturn:
    logging.shutdown()
    os._exit(code)


def http_tls(settings: HttpSettings) -> tuple[ssl.SSLContext | None, ssl.SSLContext | None]:
    """TLS of the public and of the admin port, whose callers name themselves by keys and need no certificate."""
    if not settings.tls_cert:
        if settings.tls_key or settings.tls_client_ca:
            raise ConfigError("tls_key and tls_client_ca are of no use without tls_cert")
        return None, None
    return (
        server_tls(settings.tls_cert, settings.tls_key, settings.tls_client_ca),
        server_tls(settings.tls_cert, settings.tls_key),
    )


def shard_tls(settings: ServeSettings) -> ssl.SSLContext | None:
    """TLS of the shard port: front doors show a certificate of the same authority."""
    if not settings.shard_tls_cert:
        if settings.shard_tls_key or settings.shard_tls_ca:
            raise ConfigError("shard_tls_key and shard_tls_ca are of no use without shard_tls_cert")
        if not is_loopback(settings.shard_host):
            remedy = "shard_tls_cert, or a network policy"
            log.warning("whoever reaches the shard port may ask", extra={"data": {"remedy": remedy}})
        return None
    if not settings.shard_tls_ca:
        raise ConfigError("shard_tls_ca is missing: the authority that signed the certificates of front doors")
    return server_tls(settings.shard_tls_cert, settings.shard_tls_key, settings.shard_tls_ca)


def warn_if_open(settings: HttpSettings) -> None:
    hosts = [host for host in (settings.host, settings.admin_host) if not is_loopback(host)]
    if hosts and not settings.keys:
        remedy = "vecsvc keys new, and --keys"
        log.warning("whoever reaches the port may ask", extra={"data": {"hosts": hosts, "remedy": remedy}})


async def listen(
    service: Service, app: web.Application, host: str, port: int, tls: ssl.SSLContext | None
) -> tuple[web.AppRunner, asyncio.Server]:
    # _finish waits for requests in flight; when that is over, aiohttp need not begin to wait anew.
    runner = web.AppRunner(app, shutdown_timeout=GRACE_S)
    await runner.setup()
    loop = asyncio.get_running_loop()
    try:
        listener = await loop.create_server(
            lambda: Connection(service, runner.server), host, port, backlog=1024, **_handshake(service, tls)
        )
    except OSError as error:
        await runner.cleanup()
        # asyncio puts words of its own around the system's.
        why = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
        raise ConfigError(f"cannot listen on {host}:{port}: {why}; choose another port") from error
    return runner, listener


def _handshake(service: Service, tls: ssl.SSLContext | None) -> dict[str, Any]:
    """Before its handshake a connection is none that the reaper knows, so that has a limit of its own."""
    return {"ssl": tls, "ssl_handshake_timeout": service.settings.header_timeout_s} if tls is not None else {}


async def close_port(
    listener: asyncio.Server, service: Service, runner: web.AppRunner, tls: ssl.SSLContext | None
) -> None:
    """Close the port, and take in whom the kernel let in already: for a client, that is to be accepted."""
    held = [socket.socket(fileno=os.dup(port.fileno())) for port in listener.sockets]
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


async def _watch(service: Service, settings: ServeSettings, started: float) -> None:
    """Open what there is, then look for new versions now and then."""
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
            log.info("ready", extra={"data": {"up_s": round(time.perf_counter() - started, 3)}})
        told = problem
        if not settings.reload_poll_s:
            return
        await asyncio.sleep(settings.reload_poll_s)


async def finish(service: Service, runner: web.AppRunner) -> None:
    """Wait for requests in flight, and for those that were on their way when the port closed."""
    now = time.monotonic()
    end, quiet_since = now + service.settings.shutdown_s, now
    while now < end and now - quiet_since < GRACE_S:
        await asyncio.sleep(0.01)
        now = time.monotonic()
        if runner.server is not None and not service.reaper.quiet(runner.server.connections):
            quiet_since = now
