"""The life of a front door's process: from its ports and first nodes to SIGTERM."""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from pathlib import Path
from typing import Final

import uvloop

from vecsvc import __version__, json_vectors, machine_code
from vecsvc.config import RouteSettings
from vecsvc.front_door import FrontDoor
from vecsvc.ports import http_tls, nodes_tls, warn_if_open
from vecsvc.process import allow_files, close_port, finish, listen, stop_signal
from vecsvc.router import Router
from vecsvc.server import Service
from vecsvc.telemetry import Metrics, configure_logging

log: Final = logging.getLogger("vecsvc.server")


def route(settings: RouteSettings) -> None:
    """Serve what the nodes hold until SIGTERM or SIGINT. Raises ConfigError where a port or the file cannot be had."""
    configure_logging()
    machine_code.keep_in(Path(settings.kernels) if settings.kernels else None)
    machine_code.announce = lambda what: log.info("compiling", extra={"data": {"what": what}})
    allow_files(settings)
    uvloop.run(_run(settings))


async def _run(settings: RouteSettings) -> None:
    started = time.perf_counter()
    metrics = Metrics()
    router = Router(settings, metrics, nodes_tls(settings, metrics))
    door = FrontDoor(router, settings, metrics)
    service = Service(door, settings, metrics)
    tls, admin_tls = http_tls(settings, metrics)
    await door.in_thread(json_vectors.load)
    runner, listeners = await listen(service, service.app(), settings.host, settings.port, tls)
    admin, admin_listeners = await listen(
        service, service.admin_app(), settings.admin_host, settings.admin_port, admin_tls, public=False
    )
    stop = stop_signal()
    port, admin_port = (made[0].sockets[0].getsockname()[1] for made in (listeners, admin_listeners))
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
    await close_port(listeners, service, runner, tls)
    await finish(service, runner)
    for task in (first, reap, keep):
        task.cancel()
    await asyncio.gather(first, reap, keep, return_exceptions=True)
    await runner.cleanup()
    for listener in admin_listeners:
        listener.close()
    await admin.cleanup()
    log.info("stopped")
    door.close()


async def _tell_ready(router: Router, started: float) -> None:
    """Say once how long it took, and from then on let the garbage collector look at what is new only."""
    await router.ready.wait()
    log.info("first ready", extra={"data": {"up_s": round(time.perf_counter() - started, 3)}})
    gc.collect()
    gc.freeze()
