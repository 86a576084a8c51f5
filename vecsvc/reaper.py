"""Ends what hangs on a connection: aiohttp has no limits of time for heads, bodies and readers."""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from collections.abc import Sequence
from typing import Any, Final

from aiohttp import StreamReader, web

from vecsvc.config import HttpSettings
from vecsvc.errors import RequestTimeout

TICK_S: Final = 0.25  # how often the reaper looks
_RESET: Final = struct.pack("ii", 1, 0)  # SO_LINGER: on, for 0 s


class Reaper:
    """Ends what hangs: silent connections, bodies that drip, clients that do not read. aiohttp has no such limits.

    One task looks at every connection a few times a second, so that a request costs no timer of its own.
    """

    def __init__(self, settings: HttpSettings) -> None:
        self._settings = settings
        self._since: dict[Any, float] = {}  # connection -> when it last did something whole
        self._served: set[Any] = set()  # connections that sent a whole request head before
        self._busy: set[Any] = set()
        self._bodies: dict[Any, tuple[float, StreamReader]] = {}
        self._writing: dict[Any, float] = {}  # connection -> when its answer was first seen waiting

    def begin(self, request: web.BaseRequest) -> None:
        self._busy.add(request.protocol)

    def end(self, request: web.BaseRequest) -> None:
        connection = request.protocol
        self._busy.discard(connection)
        self._bodies.pop(connection, None)
        self._served.add(connection)
        self._since[connection] = time.monotonic()

    def asked(self, connection: Any) -> None:
        """A whole request came that is answered a little later, past `begin` and `end`."""
        self._busy.add(connection)

    def answered(self, connection: Any) -> None:
        """It was answered, or came and was answered in one step."""
        self._busy.discard(connection)
        self._served.add(connection)
        self._since[connection] = time.monotonic()

    def left(self, connection: Any) -> None:
        """It was lost: nobody waits for an answer any more."""
        self._busy.discard(connection)

    def await_body(self, request: web.BaseRequest) -> None:
        self._bodies[request.protocol] = (time.monotonic(), request.content)

    def quiet(self, connections: list[Any]) -> bool:
        """True where no request is worked on, and no answer waits to be read."""
        return not self._busy and not any(c.transport and c.transport.get_write_buffer_size() for c in connections)

    async def run(self, runners: Sequence[web.BaseRunner]) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self.tick([c for runner in runners if runner.server is not None for c in runner.server.connections])

    def tick(self, connections: list[Any]) -> None:
        now, settings = time.monotonic(), self._settings
        live = set(connections)
        for known in (self._since, self._bodies, self._writing):
            for gone in known.keys() - live:
                del known[gone]
        self._served &= live
        for started, stream in list(self._bodies.values()):
            if now - started > settings.body_timeout_s:
                stream.set_exception(
                    RequestTimeout(f"the body did not arrive within body_timeout_s, {settings.body_timeout_s:g} s")
                )
        idle = [connection for connection in connections if connection not in self._busy]
        for connection in idle:
            since = self._since.setdefault(connection, now)
            limit = settings.keepalive_s + 1 if connection in self._served else settings.header_timeout_s
            if now - since > limit:
                connection.force_close()
        for connection in connections:
            transport = connection.transport
            if transport is None or not transport.get_write_buffer_size():
                self._writing.pop(connection, None)
            elif now - self._writing.setdefault(connection, now) > settings.write_timeout_s:
                # With a reset, or the kernel would go on with what it holds of the answer.
                transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                transport.abort()
        surplus = len(connections) - settings.max_connections
        if surplus > 0:
            # Those that never asked anything go first, so that a flood of them spares the clients that work.
            for connection in sorted(idle, key=lambda c: (c in self._served, self._since[c]))[:surplus]:
                connection.force_close()
