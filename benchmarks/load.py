"""Load over raw sockets that costs the client next to nothing: closed and open loop, every failure by its reason."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

MAX_BURST = 32  # requests that are sent before answers are looked at
MAX_WIRES = 900  # connections of one open loop, below a server's own limit; an arrival beyond waits for one

# Says what is wrong with the body of a good answer; None where nothing is.
Check = Callable[[int, bytes], str | None]


def post(path: str, body: bytes, kind: str = "application/json", *more: str) -> bytes:
    """A request as bytes."""
    head = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Type: {kind}", f"Content-Length: {len(body)}", *more]
    return "\r\n".join([*head, "", ""]).encode() + body


# Called once with what came: (status, head, body), or the error that ended the wait for it.
Done = Callable[[tuple[int, bytes, bytes] | Exception], None]


class Wire(asyncio.Protocol):
    """One keep-alive connection, one request at a time."""

    def __init__(self) -> None:
        self.closed = False
        self.used = False
        self._transport: asyncio.Transport | None = None
        self._buffer = b""
        self._needed = 0
        self._done: Done | None = None

    @classmethod
    async def to(cls, port: int) -> Wire:
        _, wire = await asyncio.get_running_loop().create_connection(cls, "127.0.0.1", port)
        return wire

    def begin(self, data: bytes, done: Done) -> None:
        """Send a request; `done` is called when its answer is whole, without a task or a future in between."""
        assert self._transport is not None and self._done is None and not self.closed
        self._done = done
        self._transport.write(data)

    async def ask(self, data: bytes) -> tuple[int, bytes, bytes]:
        """(status, head, body). Raises ConnectionError."""
        if self.closed:
            raise ConnectionResetError("the kept connection was closed")
        answer: asyncio.Future[tuple[int, bytes, bytes]] = asyncio.get_running_loop().create_future()

        def done(came: tuple[int, bytes, bytes] | Exception) -> None:
            if answer.done():
                return
            if isinstance(came, Exception):
                answer.set_exception(came)
            else:
                answer.set_result(came)

        self.begin(data, done)
        try:
            return await answer
        finally:
            self._done, self.used = None, True

    def close(self) -> None:
        self.closed = True
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer = self._buffer + data if self._buffer else data
        if len(buffer) < self._needed:
            return
        end = buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        head = buffer[:end]
        at = head.find(b"Content-Length: ")
        at = at if at >= 0 else head.lower().find(b"content-length: ")
        length = int(head[at + 16 :].split(b"\r\n", 1)[0])
        self._needed = end + 4 + length
        if len(buffer) < self._needed:
            return
        self._buffer, self._needed = b"", 0
        if b"onnection: close" in head:
            self.closed = True
        self._tell((int(head[9:12]), head, buffer[end + 4 :]))

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        self._tell(ConnectionResetError(f"broken off: {exc or 'closed'}"))

    def _tell(self, came: tuple[int, bytes, bytes] | Exception) -> None:
        done, self._done, self.used = self._done, None, True
        if done is not None:
            done(came)


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


def _outcome(came: tuple[int, bytes, bytes] | Exception, number: int, check: Check | None) -> tuple[str, str]:
    """(outcome, why) of one request."""
    if isinstance(came, Exception):
        return "broken", str(came)
    status, _, body = came
    if status != 200:
        return str(status), _why(body)
    wrong = check(number, body) if check is not None else None
    return ("wrong", wrong) if wrong else ("200", "")


async def _one(wire: Wire, number: int, data: bytes, check: Check | None) -> tuple[str, str]:
    """(outcome, why) of one request."""
    try:
        came: tuple[int, bytes, bytes] | Exception = await wire.ask(data)
    except (OSError, asyncio.CancelledError) as error:
        wire.close()
        if isinstance(error, asyncio.CancelledError):
            raise
        came = error
    return _outcome(came, number, check)


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
    times = due[due < seconds].tolist()
    tally = Tally()
    idle: list[Wire] = kept if kept is not None else []
    waiting: deque[int] = deque()  # numbers of those that are due, while every connection is taken
    wires = len(idle)
    left = len(times)
    over = asyncio.Event()
    connecting: set[asyncio.Task[None]] = set()
    began = time.perf_counter()

    def finish(number: int, outcome: str, why: str, sent: float | None = None) -> None:
        nonlocal left
        now = time.perf_counter()
        tally.add(outcome, now - began - times[number], times[number], why, now - sent if sent is not None else None)
        left -= 1
        if not left:
            over.set()

    def send(number: int, wire: Wire) -> None:
        which, sent = number % len(requests), time.perf_counter()

        def done(came: tuple[int, bytes, bytes] | Exception) -> None:
            nonlocal wires
            finish(number, *_outcome(came, which, check), sent)
            if wire.closed:
                wires -= 1
                wire.close()
                if waiting:
                    launch(waiting.popleft())
            elif waiting:
                send(waiting.popleft(), wire)
            else:
                idle.append(wire)

        wire.begin(requests[which], done)

    async def connect(number: int) -> None:
        nonlocal wires
        try:
            wire = await Wire.to(ports[number % len(ports)])
        except OSError as error:
            wires -= 1
            finish(number, "refused", str(error))
        else:
            send(number, wire)

    def launch(number: int) -> None:
        nonlocal wires
        while idle:
            wire = idle.pop()
            if not wire.closed:
                send(number, wire)
                return
            wires -= 1
        if wires >= MAX_WIRES:
            waiting.append(number)
            return
        wires += 1
        task = asyncio.ensure_future(connect(number))
        connecting.add(task)
        task.add_done_callback(connecting.discard)

    number = 0
    while number < len(times):
        now = time.perf_counter() - began
        burst = 0
        while number < len(times) and times[number] <= now and burst < MAX_BURST:
            launch(number)
            number += 1
            burst += 1
        # Answers must be taken all the same where it is late already.
        await asyncio.sleep(max(0.0, times[number] - now) if number < len(times) else 0.0)
    if left:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                await over.wait()
    for _ in range(left):
        tally.add("no answer", patience_s, seconds, f"within {patience_s:g} s")
    if kept is None:
        for wire in idle:
            wire.close()
    return tally


def run(main: Any) -> Any:
    """In uvloop's event loop."""
    import uvloop

    return uvloop.run(main)
