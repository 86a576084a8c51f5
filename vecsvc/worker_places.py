"""The processes of one service: each place has its sockets, and is filled again when the worker in it dies."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import signal
import socket
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable
from pathlib import Path
from typing import Final, NoReturn

from vecsvc.config import ServeSettings
from vecsvc.control import MAX_LINE_BYTES, Handed, Order, Report, line, read
from vecsvc.onnx_session import usable_cores
from vecsvc.telemetry import Counted, Metrics, together

log: Final = logging.getLogger("vecsvc.workers")

BACKLOG: Final = 1024  # connections that wait to be accepted by one worker
# A worker that lived shorter than HEALTHY_S is started again after a pause, which doubles from the one to the other.
HEALTHY_S: Final = 10.0
SHORTEST_PAUSE_S: Final = 0.1
LONGEST_PAUSE_S: Final = 30.0
END_S: Final = 5.0  # beyond drain_s and shutdown_s, for a worker to end; then it is killed
WRONG_SETTINGS: Final = 2  # the exit code of a worker that was told something impossible

_BOOT: Final = (
    "import json, sys; given = json.loads(sys.stdin.readline()); sys.path[:] = given['path']; "
    "from vecsvc.process import work; work(given)"
)


def for_one(settings: ServeSettings) -> ServeSettings:
    """The settings of each worker: what `auto` and 0 mean for several, so that they share memory and cores."""
    cores = max(1, usable_cores() // settings.workers)
    return dataclasses.replace(
        settings,
        workers=1,
        memory="mapped" if settings.memory == "auto" else settings.memory,
        search_threads=settings.search_threads or cores,
        # With a core for each there is nothing to measure; with more, each measures beside the others.
        encoder_threads=1 if settings.encoder_threads == 0 and cores == 1 else settings.encoder_threads,
    )


class Place:
    """One worker's place: its sockets stay, its processes come and go."""

    def __init__(self, number: int, ports: list[socket.socket], folder: Path) -> None:
        """With sockets that are bound already; that of the worker's admin routes lies in `folder`."""
        self.number, self.ports = number, ports
        self.admin_path = str(folder / f"{number}.sock")
        self.admin = socket.socket(socket.AF_UNIX)
        self.admin.bind(self.admin_path)
        for made in (*ports, self.admin):
            made.listen(BACKLOG)
        self.process: Process | None = None
        self.report: Report | None = None  # the last of the process that runs
        self.counted = Counted()  # the newest of what it counted, by report or by asking
        self.ended = asyncio.Event()  # set when the process that runs now has ended
        self._line: asyncio.StreamWriter | None = None
        self._unsaid: Order | None = None  # an order that came while a process was being started

    @property
    def listening(self) -> bool:
        return self.report is not None and self.report.listening

    @property
    def problem(self) -> str:
        """Why the worker is not ready; empty where it is."""
        if self.report is None or not self.report.listening:
            return f"worker {self.number} is being started"
        return f"worker {self.number}: {self.report.problem}" if self.report.problem else ""

    def learn(self, counted: Counted) -> None:
        """Reports and answers come by different ways, and the older may come later."""
        if counted.at >= self.counted.at:
            self.counted = counted

    def order(self, what: Order) -> None:
        """Tell the process; one that is just being started hears it first."""
        if self._line is not None:
            self._line.write(line(what))
        else:
            self._unsaid = what

    async def live(self, directory: Path, settings: ServeSettings, successor: bool, noticed: Callable[[], None]) -> int:
        """Start a process in this place and hear its reports until it has ended. Returns its exit code."""
        ours, theirs = socket.socketpair()
        with theirs, contextlib.ExitStack() as spare:
            spare.callback(ours.close)
            given = Handed(
                number=self.number,
                parent=os.getpid(),
                path=sys.path,
                directory=str(directory),
                settings=dataclasses.asdict(settings),
                ports=[port.fileno() for port in self.ports],
                admin=self.admin.fileno(),
                control=theirs.fileno(),
                successor=successor,
            )
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-c", _BOOT),
                stdin=PIPE,
                pass_fds=[*given.ports, given.admin, given.control],
                process_group=0,  # a terminal's signals go to the parent alone
            )
            spare.pop_all()
        self.process, self.ended = process, asyncio.Event()
        reader, self._line = await asyncio.open_connection(sock=ours, limit=MAX_LINE_BYTES)
        try:
            assert process.stdin is not None
            with contextlib.suppress(ConnectionError):
                process.stdin.write(line(given))
                await process.stdin.drain()
            process.stdin.close()
            if self._unsaid is not None:
                self.order(self._unsaid)
            with contextlib.suppress(ConnectionError):
                while data := await reader.readline():
                    self.report = read(data, Report)
                    self.learn(self.report.counted)
                    noticed()
            # The line ends with the process, but for what the system still does to it.
            async with asyncio.timeout(END_S):
                await process.wait()
        except Exception:
            log.exception("a worker cannot be understood", extra={"data": {"number": self.number}})
        finally:
            self._line.close()
            self._line, self.report = None, None
            self.ended.set()
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
        return await process.wait()


class Parent:
    """Keeps every place filled until it is told to stop."""

    def __init__(self, directory: Path, settings: ServeSettings, places: list[Place]) -> None:
        self.places = places
        self.settings = settings
        self.metrics = Metrics()  # shows what is counted by all
        self.own = Metrics()  # counts what no worker sees
        self.deaths = 0
        self.stop = asyncio.Event()
        self._directory = directory
        self._gone = Counted()  # what workers that died had counted
        self._started = time.perf_counter()
        self._ready = False
        self._code = 0

    @property
    def draining(self) -> bool:
        return self.stop.is_set()

    def problem(self) -> str:
        """Why not every worker is ready; empty where they are."""
        return "; ".join(filter(None, (place.problem for place in self.places)))

    def counted(self) -> Counted:
        """What all workers counted, those that died included, and their parent."""
        return together([self._gone, self.own.counted().lasting(), *(place.counted for place in self.places)])

    async def run(self) -> int:
        """Start all, and end all when `stop` is set. Returns the exit code."""
        keeping = [asyncio.create_task(self._keep(place)) for place in self.places]
        await self.stop.wait()
        log.info("draining")
        for place in self.places:
            for port in place.ports:
                port.close()  # from here on the port is the worker's alone, and closes with it
            place.order(Order("drain"))
        _, late = await asyncio.wait(keeping, timeout=self.settings.drain_s + self.settings.shutdown_s + END_S)
        for place in self.places:
            if late and place.process is not None and place.process.returncode is None:
                log.error("worker killed", extra={"data": {"number": place.number, "why": "it did not end in time"}})
                place.process.kill()
        await asyncio.gather(*keeping)
        log.info("stopped")
        return self._code

    async def _keep(self, place: Place) -> None:
        """Fill a place again and again, with pauses where that does not help."""
        settings, pause, lives = for_one(self.settings), 0.0, 0
        while not self.draining:
            born, lives = time.monotonic(), lives + 1
            try:
                code = await place.live(self._directory, settings, lives > 1, self._noticed)
            except OSError as error:
                code, why = 1, f"it cannot be started: {error}"
            else:
                why = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            self._gone = together([self._gone, place.counted.lasting()])
            place.counted = Counted(at=time.monotonic())
            if code == WRONG_SETTINGS and lives == 1:
                # It said in one line what is wrong, and another would say the same.
                self._code = code
                self.stop.set()
            if self.stop.is_set():
                self._code = self._code or (1 if code else 0)
                return
            lived = time.monotonic() - born
            pause = 0.0 if lived > HEALTHY_S else min(max(2 * pause, SHORTEST_PAUSE_S), LONGEST_PAUSE_S)
            self.deaths += 1
            self._ready = False
            facts = {"number": place.number, "why": why, "lived_s": round(lived, 3), "again_in_s": pause}
            log.error("worker died", extra={"data": facts})
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.stop.wait(), pause)

    def _noticed(self) -> None:
        """Say when the last worker became ready; those that are not say why themselves."""
        ready = not self.problem()
        if ready and not self._ready and not self.draining:
            log.info("ready", extra={"data": {"up_s": round(time.perf_counter() - self._started, 3)}})
        self._ready = ready

    def end(self) -> None:
        """Once: drain every worker. Twice: end them at once."""
        if self.stop.is_set():
            self._end_at_once()
        self.stop.set()

    def _end_at_once(self) -> NoReturn:
        log.info("stopped at once")
        for place in self.places:
            if place.process is not None and place.process.returncode is None:
                place.process.kill()
        logging.shutdown()
        os._exit(1)
