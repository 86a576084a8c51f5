"""A TCP proxy that can be told to be slow, to break, or to lie, so that what depends on it can be shown to cope.

As a process it hosts one proxy for each target, and takes its orders as lines of JSON; `Proxies` starts and orders it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import random
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

CHUNK = 65_536
QUEUED = 256  # chunks of one direction of a connection that wait to be sent on


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What a proxy does to the bytes. Answers flow from the target, questions to it."""

    delay_ms: float = 0.0  # every byte of an answer arrives so much later
    question_delay_ms: float = 0.0
    drip_bytes: int = 0  # answers come so many bytes at a time, ...
    drip_ms: float = 1.0  # ... with that pause between
    cut_after: int = -1  # reset the connection after so many bytes of answers from now on; -1 for never
    flip_every: int = 0  # flip one bit in every so many bytes of answers, on average; 0 for none
    garbage: bool = False  # answers are random bytes
    spare: int = 0  # chunks at the beginning of each connection's answers that are neither flipped nor garbage
    hole: bool = False  # read everything, pass on nothing
    refuse: bool = False  # reset every connection, and refuse new ones


class Proxy:
    """One port, whose connections go to `target`. Belongs to one event loop."""

    def __init__(self, host: str, port: int) -> None:
        self.target = (host, port)
        self.fault = Fault()
        self.port = 0
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._passed = 0  # bytes of answers since the fault was set

    async def listen(self) -> None:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", self.port, backlog=1024)
        self.port = self._server.sockets[0].getsockname()[1]

    async def set(self, fault: Fault) -> None:
        self.fault, self._passed = fault, 0
        if fault.refuse:
            if self._server is not None:
                self._server.close()
                self._server = None
        elif self._server is None:
            await self.listen()
        if fault.refuse or fault.cut_after == 0:
            self.cut()

    def cut(self) -> None:
        """Reset every connection now."""
        for writer in list(self._writers):
            writer.transport.abort()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        other: asyncio.StreamWriter | None = None
        try:
            if self.fault.hole:
                while await reader.read(CHUNK):
                    pass
                return
            back, other = await asyncio.open_connection(*self.target)
            self._writers.add(other)
            async with asyncio.TaskGroup() as pumps:
                pumps.create_task(self._pump(reader, other, answers=False))
                pumps.create_task(self._pump(back, writer, answers=True))
        except* OSError:
            pass
        finally:
            for one in (writer, other):
                if one is not None:
                    self._writers.discard(one)
                    one.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, answers: bool) -> None:
        """Read at once and send when it is due, so that a delay does not become a lack of throughput."""
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(QUEUED)
        sender = asyncio.ensure_future(self._send(queue, writer, answers))
        sender.add_done_callback(lambda done: done.cancelled() or done.exception())  # the reader's end is its too
        loop = asyncio.get_running_loop()
        try:
            while True:
                data = await reader.read(CHUNK)
                if not data:
                    # Half-open connections are of no use to the protocols that are tested here.
                    raise ConnectionResetError("closed")
                fault = self.fault
                delay_ms = fault.delay_ms if answers else fault.question_delay_ms
                await queue.put((loop.time() + delay_ms / 1e3, data))
                if sender.done():
                    sender.result()
        finally:
            # What was read before the end is still sent, unless the connection is to be broken.
            with contextlib.suppress(OSError, TimeoutError, asyncio.CancelledError):
                if not sender.done() and not self.fault.refuse:
                    async with asyncio.timeout(1.0):
                        await queue.join()
            sender.cancel()

    async def _send(
        self, queue: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter, answers: bool
    ) -> None:
        loop = asyncio.get_running_loop()
        for number in itertools.count():
            due, data = await queue.get()
            if due > loop.time():
                await asyncio.sleep(due - loop.time())
            try:
                fault = self.fault
                if fault.hole:
                    continue
                if answers:
                    await self._answer(data, writer, fault, number)
                else:
                    writer.write(data)
                    await writer.drain()
            finally:
                queue.task_done()

    async def _answer(self, data: bytes, writer: asyncio.StreamWriter, fault: Fault, number: int) -> None:
        if fault.garbage and number >= fault.spare:
            data = random.randbytes(len(data))
        elif fault.flip_every and number >= fault.spare:
            changed = bytearray(data)
            for at in range(len(changed)):
                if random.random() * fault.flip_every < 1.0:
                    changed[at] ^= 1 << random.randrange(8)
            data = bytes(changed)
        if fault.cut_after >= 0 and self._passed + len(data) > fault.cut_after:
            writer.write(data[: max(0, fault.cut_after - self._passed)])
            self._passed = 0
            await writer.drain()
            # Closed and not reset, so that the part arrives; the other pump then ends the connection.
            writer.close()
            raise ConnectionResetError("cut")
        self._passed += len(data)
        if fault.drip_bytes:
            for at in range(0, len(data), fault.drip_bytes):
                writer.write(data[at : at + fault.drip_bytes])
                await writer.drain()
                if self.fault is fault:
                    await asyncio.sleep(fault.drip_ms / 1e3)
        else:
            writer.write(data)
            await writer.drain()


class Proxies:
    """A process of proxies, one for each target, and its remote control. Any thread may order, one at a time."""

    def __init__(self, targets: Sequence[int] = ()) -> None:
        """`targets` are ports on 127.0.0.1."""
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--targets", ",".join(map(str, targets))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._lock = threading.Lock()
        self.ports: list[int] = self._reply()

    def set(self, number: int, **fault: Any) -> None:
        """From now on, whole: `set(0)` heals."""
        self._order({"proxy": number, "fault": asdict(Fault(**fault))})

    def heal(self) -> None:
        for number in range(len(self.ports)):
            self.set(number)

    def cut(self, number: int) -> None:
        """Reset the connections that are open now."""
        self._order({"proxy": number, "cut": True})

    def target(self, number: int, port: int) -> None:
        """New connections go there."""
        self._order({"proxy": number, "target": port})

    def close(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._process.wait(10)

    def _order(self, order: dict[str, Any]) -> None:
        with self._lock:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
            self._reply()

    def _reply(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())


async def _serve(targets: list[int]) -> None:
    proxies = [Proxy("127.0.0.1", target) for target in targets]
    for proxy in proxies:
        await proxy.listen()
    print(json.dumps([proxy.port for proxy in proxies]), flush=True)
    orders = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(orders), sys.stdin)
    while line := await orders.readline():
        order = json.loads(line)
        proxy = proxies[order["proxy"]]
        if "fault" in order:
            await proxy.set(Fault(**order["fault"]))
        if "target" in order:
            proxy.target = (proxy.target[0], order["target"])
        if "cut" in order:
            proxy.cut()
        print("true", flush=True)


def main() -> None:
    arguments = argparse.ArgumentParser(description="TCP proxies on 127.0.0.1, ordered by lines of JSON on stdin")
    arguments.add_argument("--targets", required=True, help="ports, separated by commas")
    targets = [int(port) for port in arguments.parse_args().targets.split(",") if port]
    asyncio.run(_serve(targets))


if __name__ == "__main__":
    main()
