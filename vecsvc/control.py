"""What a parent and its worker processes tell each other: JSON, one line each, over a pair of sockets.

A worker learns what it is to serve from its standard input. Then it reports what it counted and what it lacks, and
takes orders; when the line ends, the other side is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any, Final, Literal, TypeVar

import msgspec

from vecsvc.telemetry import Counted

T = TypeVar("T")

REPORT_S: Final = 1.0  # so much of what a worker counted is lost at most when it is killed
MAX_LINE_BYTES: Final = 16 << 20  # of a report: some thousand time series have less
MAX_UNREAD_BYTES: Final = 1 << 20  # a parent that does not read gets no further reports
_PR_SET_PDEATHSIG: Final = 1  # of linux/prctl.h


class Handed(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker starts with. Numbers of files are those of sockets that it inherits."""

    number: int
    parent: int  # its process id
    path: list[str]  # where modules are found: those of the parent, and no others
    directory: str
    settings: dict[str, Any]
    ports: list[int]  # files of the listening sockets of the public port, one for each address
    admin: int  # file of the listening unix socket of its admin routes
    control: int  # file of this line
    successor: bool  # another process had these sockets before, and connections may wait in them


class Report(msgspec.Struct, frozen=True):
    """What a worker says about itself."""

    listening: bool
    problem: str  # why it is not ready; empty where it is
    counted: Counted


class Order(msgspec.Struct, frozen=True):
    do: Literal["drain", "end"]


def line(message: msgspec.Struct) -> bytes:
    return msgspec.json.encode(message) + b"\n"


def read(data: bytes, kind: type[T]) -> T:
    return msgspec.json.decode(data, type=kind)


def end_with(parent: int) -> None:
    """Let the kernel end this process when its parent ends, in whatever state its event loop may be."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)  # it ended before it could be watched


class Link:
    """A worker's end of the line."""

    def __init__(self, file: int, report: Callable[[], Report]) -> None:
        self._socket = socket.socket(fileno=file)
        self._report = report
        self._writer: asyncio.StreamWriter | None = None

    async def open(self, *, drain: Callable[[], None], end: Callable[[], None]) -> asyncio.Task[None]:
        """Take orders and report until the process ends. A parent that is gone is an order to end."""
        reader, self._writer = await asyncio.open_connection(sock=self._socket)
        return asyncio.create_task(self._talk(reader, {"drain": drain, "end": end}))

    async def _talk(self, reader: asyncio.StreamReader, orders: dict[str, Callable[[], None]]) -> None:
        reporting = asyncio.create_task(self._report_now_and_then())
        try:
            with contextlib.suppress(ConnectionError):
                while data := await reader.readline():
                    orders[read(data, Order).do]()
            orders["end"]()
        finally:
            reporting.cancel()

    async def _report_now_and_then(self) -> None:
        while True:
            self.report()
            await asyncio.sleep(REPORT_S)

    def report(self) -> None:
        """Tell how things are now."""
        if self._writer is not None and self._writer.transport.get_write_buffer_size() < MAX_UNREAD_BYTES:
            with contextlib.suppress(ConnectionError):
                self._writer.write(line(self._report()))
