"""Several processes serve one port: `vecsvc serve --workers N`.

Each worker has a listening socket of its own on the same port (SO_REUSEPORT), so that the kernel spreads connections
over them. The parent made the sockets and keeps them open: when a worker dies, connections wait in its socket until its
successor takes it over. Workers are fresh interpreters that open the same files; nothing is forked.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

from vecsvc import __version__
from vecsvc.config import ServeSettings
from vecsvc.errors import ConfigError
from vecsvc.ports import http_tls, needs_shard_port, warn_if_open
from vecsvc.telemetry import configure_logging
from vecsvc.worker_admin import Admin
from vecsvc.worker_places import Parent, Place

log: Final = logging.getLogger("vecsvc.workers")


def serve(directory: Path, settings: ServeSettings) -> None:
    """Serve a folder of indexes with `settings.workers` processes until SIGTERM or SIGINT.

    Raises ConfigError where a port cannot be had.
    """
    configure_logging()
    if settings.shard_port is not None:
        raise ConfigError(
            f"a node answers front doors with one process: leave out --workers {settings.workers} or --shard-port, and "
            "run a node for each core where one is too slow"
        )
    needs_shard_port(settings)
    code = asyncio.run(_run(directory, settings))
    if code:
        sys.exit(code)


async def _run(directory: Path, settings: ServeSettings) -> int:
    with tempfile.TemporaryDirectory(prefix="vecsvc-") as folder, contextlib.ExitStack() as held:
        ports = bind(settings.host, settings.port, settings.workers)
        for port in (port for group in ports for port in group):
            held.enter_context(port)
        parent = Parent(directory, settings, [Place(number, group, Path(folder)) for number, group in enumerate(ports)])
        admin = Admin(parent)
        _, admin_tls = http_tls(settings, parent.own)
        admin_port = await admin.listen(settings.admin_host, settings.admin_port, admin_tls)
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, parent.end)
        facts = {"version": __version__, "host": settings.host, "port": ports[0][0].getsockname()[1]}
        log.info("listening", extra={"data": {**facts, "admin_port": admin_port, "workers": settings.workers}})
        warn_if_open(settings)
        try:
            return await parent.run()
        finally:
            await admin.close()


def bind(host: str, port: int, workers: int) -> list[list[socket.socket]]:
    """For each worker a socket on each address of the host, all on one port. Raises ConfigError."""
    found: list[list[socket.socket]] = [[] for _ in range(workers)]
    try:
        addresses = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, address in dict.fromkeys(addresses):
            # The system would let two services share a port as two workers do: only the first look sees another.
            with _bound(family, kind, protocol, (address[0], port, *address[2:]), shared=False) as alone:
                port = alone.getsockname()[1]
            for group in found:
                group.append(_bound(family, kind, protocol, (address[0], port, *address[2:]), shared=True))
    except OSError as error:
        for made in (made for group in found for made in group):
            made.close()
        why = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
        raise ConfigError(f"cannot listen on {host}:{port}: {why}; choose another port") from error
    return found


def _bound(family: int, kind: int, protocol: int, address: tuple[Any, ...], *, shared: bool) -> socket.socket:
    made = socket.socket(family, kind, protocol)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        made.bind(address)
        if not shared:
            made.listen()  # two that only bound do not get in each other's way
    except BaseException:
        made.close()
        raise
    return made
