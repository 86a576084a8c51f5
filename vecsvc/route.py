"""The life of a front door's process: from its ports and first nodes to SIGTERM."""

from __future__ import annotations

import asyncio
import gc
import logging
import ssl
import time
from typing import Final

import uvloop

from vecsvc import __version__
from vecsvc.config import RouteSettings
from vecsvc.errors import ConfigError
from vecsvc.front_door import FrontDoor
from vecsvc.process import allow_files, close_port, finish, http_tls, listen, stop_signal, warn_if_open
from vecsvc.router import Router
from vecsvc.server import Service
from vecsvc.telemetry import Metrics, configure_logging
from vecsvc.tls import client_tls

log: Final = logging.getLogger("vecsvc.server")


def route(settings: RouteSettings) -> None:
    """Serve what the nodes hold until SIGTERM or SIGINT. Raises ConfigError where a port or the file cannot be had."""
    configure_logging()
    allow_files(settings)
    uvloop.run(_run(settings))


async def _run(settings: RouteSettings) -> None:
    started = time.perf_counter()
    metrics = Metrics()
    router = Router(settings, metrics, _nodes_tls(settings))
    door = FrontDoor(router, settings, metrics)
    service = Service(door, settings, metrics)
    tls, admin_tls = http_tls(settings)
    runner, listener = await listen(service, service.app(), settings.host, settings.port, tls)
    admin, admin_listener = await listen(
        service, service.admin_app(), settings.admin_host, settings.admin_port, admin_tls
    )
    stop = stop_signal()
    port, admin_port = (server.sockets[0].getsockname()[1] for server in (listener, admin_listener))
    facts = {"version": __version__, "host": settings.host, "port": port, "admin_port": admin_port}
    log.info("listening", extra={"data": facts})
    warn_if_open(settings)
    keep = asyncio.create_task(router.run())
    reap = asyncio.create_task(service.reaper.run([runner, admin]))
    first = asyncio.create_task(_tell_ready(router, started))
    await stop.wait()
    service.draining = True
    log.info("draining", extra={"data": {"in_flight": door.in_flight}})
    await asyncio.sleep(settings.drain_s)
    await close_port(listener, service, runner, tls)
    await finish(service, runner)
    for task in (first, reap, keep):
        task.cancel()
    await asyncio.gather(first, reap, keep, return_exceptions=True)
    await runner.cleanup()
    admin_listener.close()
    await admin.cleanup()
    log.info("stopped")
    door.close()


def _nodes_tls(settings: RouteSettings) -> ssl.SSLContext | None:
    """TLS to the nodes. Whoever the authority signed is one: certificates name a service, not each of its pods."""
    if not settings.shard_tls_cert:
        if settings.shard_tls_key or settings.shard_tls_ca:
            raise ConfigError("shard_tls_key and shard_tls_ca are of no use without shard_tls_cert")
        return None
    if not settings.shard_tls_ca:
        raise ConfigError("shard_tls_ca is missing: the authority that signed the certificates of nodes")
    return client_tls(settings.shard_tls_cert, settings.shard_tls_key, settings.shard_tls_ca, check_hostname=False)


async def _tell_ready(router: Router, started: float) -> None:
    """Say once how long it took, and from then on let the garbage collector look at what is new only."""
    await router.ready.wait()
    log.info("first ready", extra={"data": {"up_s": round(time.perf_counter() - started, 3)}})
    gc.collect()
    gc.freeze()
