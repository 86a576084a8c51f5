"""Load over raw sockets that costs the client next to nothing: closed and open loop, every failure by its reason."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

MAX_WIRES = 900  # connections of one open loop, below a server's own limit; an arrival beyond waits for one

# Says what is wrong with the body of a good answer; None where nothing is.
Check = Callable[[int, bytes], str | None]


def post(path: str, body: bytes, kind: str = "application/json", *more: str) -> bytes:
    """A request as bytes."""
    head = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Type: {kind}", f"Content-Length: {len(body)}", *more]
    return "\r\n".join([*head, "", ""]).encode() + body


class Wire(asyncio.Protocol):
    """One keep-alive connection, one request at a time."""

    def __init__(self) -> None:
        self.closed = False
        self.used = False
        self._transport: asyncio.Transport | None = None
        self._buffer = b""
        self._needed = 0
        self._answer: asyncio.Future[tuple[int, bytes, bytes]] | None = None

    @classmethod
    async def to(cls, port: int) -> Wire:
        _, wire = await asyncio.get_running_loop().create_connection(cls, "127.0.0.1", port)
        return wire

    async def ask(self, data: bytes) -> tuple[int, bytes, bytes]:
        """(status, head, body). Raises ConnectionError."""
        assert self._transport is not None and self._answer is None
        if self.closed:
            raise ConnectionResetError("the kept connection was closed")
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(data)
        try:
            return await self._answer
        finally:
            self._answer, self.used = None, True

    def close(self) -> None:
        self.closed = True
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if len(self._buffer) < self._needed:
            return
        head, found, body = self._buffer.partition(b"\r\n\r\n")
        if not found:
            return
        at = head.lower().find(b"content-length: ")
        length = int(head[at + 16 :].split(b"\r\n", 1)[0])
        self._needed = len(head) + 4 + length
        if len(body) < length:
            return
        self._buffer, self._needed = b"", 0
        if b"onnection: close" in head:
            self.closed = True
        if self._answer is not None and not self._answer.done():
            self._answer.set_result((int(head[9:12]), head, body))

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(ConnectionResetError(f"broken off: {exc or 'closed'}"))


@dataclass
class Tally:
    """What came of the requests."""

    seconds: dict[str, list[float]] = field(default_factory=dict)  # by outcome: the status, or what broke
    at: dict[str, list[float]] = field(default_factory=dict)  # when each of them was due, since the start
    wire: dict[str, list[float]] = field(default_factory=dict)  # seconds since it was sent, be that later
    reasons: Counter[str] = field(default_factory=Counter)  # of everything that was no good answer
    elsewhere: int = 0  # asked again because a kept connection had been closed before it was used again

    def add(self, outcome: str, seconds: float, at: float, why: str = "", wire: float | None = None) -> None:
        self.seconds.setdefault(outcome, []).append(seconds)
        self.at.setdefault(outcome, []).append(at)
        self.wire.setdefault(outcome, []).append(seconds if wire is None else wire)
        if why:
            self.reasons[f"{outcome}: {why[:160]}"] += 1

    def count(self, outcome: str = "200") -> int:
        return len(self.seconds.get(outcome, ()))

    @property
    def total(self) -> int:
        return sum(map(len, self.seconds.values()))

    @property
    def failed(self) -> int:
        return self.total - self.count()

    def ms(self, percent: float, outcome: str = "200") -> float:
        """From when a request was due."""
        found = self.seconds.get(outcome)
        return float(np.percentile(found, percent)) * 1e3 if found else float("nan")

    def wire_ms(self, percent: float, outcome: str = "200") -> float:
        """From when it was sent: what the server took, where the client cannot keep up."""
        found = self.wire.get(outcome)
        return float(np.percentile(found, percent)) * 1e3 if found else float("nan")

    def late_ms(self, percent: float) -> float:
        """How much later than due requests were sent."""
        late = [
            s - w for outcome, found in self.seconds.items() for s, w in zip(found, self.wire[outcome], strict=True)
        ]
        return float(np.percentile(late, percent)) * 1e3 if late else float("nan")

    def within(self, seconds: float, outcome: str = "200") -> int:
        """How many were answered so long after the start."""
        pairs = zip(self.at.get(outcome, ()), self.seconds.get(outcome, ()), strict=True)
        return sum(at + took <= seconds for at, took in pairs)

    def counts(self) -> dict[str, int]:
        return {outcome: len(seconds) for outcome, seconds in sorted(self.seconds.items())}

    def tell(self) -> None:
        """Print every reason of a failure."""
        for reason, n in self.reasons.most_common(10):
            print(f"    {n} x {reason}")


def _why(body: bytes) -> str:
    try:
        error = json.loads(body)["error"]
        return f"{error['code']}: {error['message']}"
    except (ValueError, KeyError, TypeError):
        return repr(body[:100])


async def _one(wire: Wire, number: int, data: bytes, check: Check | None) -> tuple[str, str]:
    """(outcome, why) of one request."""
    try:
        status, _, body = await wire.ask(data)
    except (OSError, asyncio.CancelledError) as error:
        wire.close()
        if isinstance(error, asyncio.CancelledError):
            raise
        return "broken", str(error)
    if status != 200:
        return str(status), _why(body)
    wrong = check(number, body) if check is not None else None
    return ("wrong", wrong) if wrong else ("200", "")


async def closed_loop(
    ports: Sequence[int],
    requests: Sequence[bytes],
    stop: asyncio.Event | float,
    *,
    clients: int = 8,
    check: Check | None = None,
    tally: Tally | None = None,
) -> Tally:
    """Clients that ask one request after another until `stop`, or for so many seconds.

    Each connects to any of the ports that lets it in. A request on a kept connection that turns out to have been
    closed before is sent again on another, as every client of HTTP does; all else that breaks is a failure.
    """
    done = tally if tally is not None else Tally()
    began = time.perf_counter()

    def over() -> bool:
        return stop.is_set() if isinstance(stop, asyncio.Event) else time.perf_counter() - began >= stop

    async def connect() -> Wire:
        for port in random.sample(list(ports), len(ports)):
            try:
                return await Wire.to(port)
            except OSError:
                continue
        raise ConnectionRefusedError("no port lets anybody in")

    async def client(number: int) -> None:
        wire: Wire | None = None
        at = number
        while not over():
            at += clients
            which = at % len(requests)
            start = time.perf_counter()
            try:
                if wire is None or wire.closed:
                    wire = await connect()
            except OSError as error:
                done.add("refused", time.perf_counter() - start, start - began, str(error))
                await asyncio.sleep(0.01)
                continue
            kept = wire.used
            outcome, why = await _one(wire, which, requests[which], check)
            if outcome == "broken" and kept and why.endswith("closed"):
                done.elsewhere += 1
                continue
            done.add(outcome, time.perf_counter() - start, start - began, why)
        if wire is not None:
            wire.close()

    await asyncio.gather(*(client(number) for number in range(clients)))
    return done


async def open_loop(
    ports: Sequence[int],
    requests: Sequence[bytes],
    rate: float,
    seconds: float,
    *,
    check: Check | None = None,
    seed: int = 7,
    patience_s: float = 60.0,
    kept: list[Wire] | None = None,
) -> Tally:
    """Requests at random times, so many a second on average, whether or not those before were answered.

    Times count from when a request was due, so that a server that stalls cannot hide it. `kept` are connections to
    begin with, and gets those that are left.
    """
    chance = np.random.default_rng(seed)
    due = np.cumsum(chance.exponential(1.0 / rate, int(rate * seconds * 1.2) + 10))
    due = due[due < seconds]
    tally = Tally()
    idle: list[Wire] = kept if kept is not None else []
    slots = asyncio.Semaphore(MAX_WIRES)
    under_way: set[asyncio.Task[None]] = set()
    began = time.perf_counter()

    async def one(number: int, when: float) -> None:
        async with slots:
            wire: Wire | None = None
            while idle and (wire is None or wire.closed):
                wire = idle.pop()
            sent = time.perf_counter()
            try:
                if wire is None or wire.closed:
                    wire = await Wire.to(ports[number % len(ports)])
            except OSError as error:
                tally.add("refused", time.perf_counter() - began - when, when, str(error))
                return
            which = number % len(requests)
            try:
                async with asyncio.timeout(patience_s):
                    outcome, why = await _one(wire, which, requests[which], check)
            except TimeoutError:
                outcome, why = "no answer", f"within {patience_s:g} s"
            now = time.perf_counter()
            tally.add(outcome, now - began - when, when, why, now - sent)
            if wire.closed:
                wire.close()
            else:
                idle.append(wire)

    for number, when in enumerate(due.tolist()):
        wait = when - (time.perf_counter() - began)
        if wait > 0:
            await asyncio.sleep(wait)
        elif number % 64 == 0:
            await asyncio.sleep(0)  # late already; answers must be taken all the same
        task = asyncio.ensure_future(one(number, when))
        under_way.add(task)
        task.add_done_callback(under_way.discard)
    if under_way:
        await asyncio.wait(under_way)
    if kept is None:
        for wire in idle:
            wire.close()
    return tally


def run(main: Any) -> Any:
    """In uvloop's event loop."""
    import uvloop

    return uvloop.run(main)
