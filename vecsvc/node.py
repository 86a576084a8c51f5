"""A node as a front door sees it: one connection to it, what it holds, how fast and how well it answers."""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
import ssl
import time
from collections.abc import Callable, Hashable
from typing import Final, cast

from vecsvc import remote
from vecsvc.config import RouteSettings
from vecsvc.errors import NodeFailed, ProtocolError
from vecsvc.remote import Holdings, Kind
from vecsvc.telemetry import Count, Spread
from vecsvc.tls import why_refused
from vecsvc.topology import Address

log: Final = logging.getLogger("vecsvc.router")

SAMPLES: Final = 64  # latencies from which the 95th percentile is taken
LEAST_WEIGHT: Final = 0.05  # of one sample in the mean, where many come
MOST_WEIGHT: Final = 0.5
MEAN_OVER_S: Final = 4.0  # time between samples over this is a sample's weight
KNOWN_AFTER: Final = 20  # samples before it is believed
MAX_KEYS: Final = 256  # sorts of question whose latency is told apart; past that the one not asked for longest goes
UNKNOWN_S: Final = 0.001  # what is believed of a node that was never asked
SLOW_START_S: Final = 0.05  # when to ask a second node while nothing is known yet
MAX_EJECT_S: Final = 30.0
MAX_BLAMED_S: Final = 1.0  # how slow a node is taken to be at most for failures that come fast
RECONNECT_S: Final = (0.05, 2.0)  # first and longest wait before a lost connection is tried again
STEADY_S: Final = 1.0  # a connection that held so long is tried again after the first wait
MAX_UNSENT_BYTES: Final = 64 << 20  # questions that a node has not read; past that others are asked

_LEFT: Final = "the front door asks it no more"
_NO_NODE: Final = "is that its --shard-port, and do both sides or neither have shard_tls_cert, of one authority?"

# Makes the frame of a request id and the milliseconds that are left for the answer.
Make = Callable[[int, float], bytes]

# Called once with an answer's kind and payload, or with the error that ended the wait for it.
Reply = Callable[[Kind | None, bytes, NodeFailed | None], None]


class Latency:
    """How long a node takes for one sort of question: a moving mean, and the 95th percentile of the last samples."""

    __slots__ = ("_ring", "at", "count", "least", "mean", "p95", "probed")

    def __init__(self) -> None:
        self.mean = UNKNOWN_S
        self.least = 0.0  # that a question took which was not answered; forgotten with the next answer
        self.p95 = SLOW_START_S
        self.count = 0
        self.at = 0.0  # time.monotonic() of the last sample
        self.probed = 0.0  # and of the last copy of a question that was sent to get one
        self._ring: list[float] = []

    def learn(self, seconds: float, now: float) -> None:
        # Where samples come one behind the other, each says little: a mean that followed them would send questions to
        # wait at one replica while another is free. One that comes after a while says what the replica is like now.
        weight = max(1.0 / (self.count + 1), min(MOST_WEIGHT, max(LEAST_WEIGHT, (now - self.at) / MEAN_OVER_S)))
        self.mean += weight * (seconds - self.mean)
        self.least = 0.0
        self.at = now
        ring = self._ring
        if len(ring) < SAMPLES:
            ring.append(seconds)
        else:
            ring[self.count % SAMPLES] = seconds
        self.count += 1
        if self.count >= KNOWN_AFTER and self.count % 8 == 0:
            self.p95 = sorted(ring)[int(0.95 * len(ring))]

    def heard(self) -> float:
        """When something was last done to know it: time.monotonic()."""
        return max(self.at, self.probed)

    def outlived(self, seconds: float) -> None:
        """A question that was not answered yet took at least so long."""
        self.least = max(self.least, seconds)

    @property
    def expected(self) -> float:
        """Seconds that the next question is thought to take."""
        return max(self.mean, self.least)

    def failed(self) -> None:
        """A failure comes fast, and must not make a node look better than one that works."""
        self.mean = max(self.mean, min(MAX_BLAMED_S, 2 * self.mean))


class Node:
    """One address. Its connection is made anew when it is lost, for as long as `run` runs."""

    def __init__(
        self,
        address: Address,
        settings: RouteSettings,
        changed: Callable[[], None],
        seconds: Spread,
        tls: ssl.SSLContext | None = None,
        *,
        ejections: Count | None = None,
        losses: Count | None = None,
    ) -> None:
        """`seconds` takes those of all answers; the counters are those of all nodes, be they there still or not."""
        self.address = address
        self.name = str(address)
        self._seconds = seconds
        self.holdings: Holdings | None = None  # None while it is not connected
        self.in_flight = 0
        # time.monotonic() when the first question that was asked after the last answer was due; 0 for none.
        self.overdue_at = 0.0
        self.problem = "not connected yet"
        self._settings, self._changed, self._tls = settings, changed, tls
        self._connection: _Connection | None = None
        self._greeting: _Connection | None = None  # one that was made, and has not said yet what it holds
        self._latencies: dict[Hashable, Latency] = {}
        self._failures = 0
        self._ejected_until = 0.0
        self._eject_s = settings.eject_s
        self.ejections = ejections if ejections is not None else Count()
        self.losses = losses if losses is not None else Count()

    # ----------------------------------------------------------------------------------------------- asking

    @property
    def up(self) -> bool:
        return self.holdings is not None

    def usable(self) -> bool:
        """Whether it should be asked where there is a choice."""
        return self.holdings is not None and not self.holdings.draining and not self._ejected_until

    def returning(self, now: float) -> bool:
        """Whether it was left alone for long enough to be tried with a copy of a question."""
        return self.holdings is not None and 0.0 < self._ejected_until <= now

    def cost(self, key: Hashable, now: float) -> float:
        """Seconds that one more question is thought to take; for comparison with other nodes."""
        expected = self.latency(key).expected
        if self.in_flight and self.overdue_at:
            # One that has just begun to hang is known by its silence before a second question is due. One that
            # answered what it was asked later does not hang, however long it takes for another question.
            expected = max(expected, now - self.overdue_at)
        return expected * (1 + self.in_flight)

    def ask(self, make: Make, left_ms: float, reply: Reply) -> int:
        """Send a frame, and return its request id. `reply` is called once, never at once."""
        if self._connection is None:
            raise NodeFailed(f"node {self.name} is not connected")
        return self._connection.ask(make, left_ms, reply)

    def cancel(self, request: int) -> None:
        """Nobody waits for that answer any more; its reply is not called."""
        if self._connection is not None:
            self._connection.cancel(request)

    def latency(self, key: Hashable) -> Latency:
        found = self._latencies.get(key)
        if found is None:
            if len(self._latencies) >= MAX_KEYS:
                del self._latencies[min(self._latencies, key=lambda known: self._latencies[known].heard())]
            found = self._latencies[key] = Latency()
        return found

    def answered(self, key: Hashable, seconds: float, now: float) -> None:
        """One of those questions, after so long; `now` is by time.monotonic()."""
        self.latency(key).learn(seconds, now)
        self._seconds.observe(seconds)
        self._failures = 0
        if self._ejected_until:
            self._ejected_until, self._eject_s = 0.0, self._settings.eject_s
            log.info("node returned", extra={"data": {"node": self.name}})

    def failed(self, why: str) -> None:
        """It failed by a fault of its own. Too many times in a row, and it is left alone for a while."""
        self._failures += 1
        if self._failures >= self._settings.eject_failures:
            self._failures = 0
            self._ejected_until = time.monotonic() + self._eject_s
            self.ejections.inc()
            log.warning("node ejected", extra={"data": {"node": self.name, "s": self._eject_s, "why": why[:300]}})
            self._eject_s = min(MAX_EJECT_S, 2 * self._eject_s)

    @property
    def state(self) -> str:
        if self.holdings is None:
            return "down"
        return "draining" if self.holdings.draining else "ejected" if self._ejected_until else "up"

    # ------------------------------------------------------------------------------------------------- life

    async def run(self) -> None:
        """Keep a connection until cancelled."""
        first, longest = RECONNECT_S
        wait = first
        try:
            while True:
                began = time.monotonic()
                try:
                    await self._connected()
                except (OSError, TimeoutError, NodeFailed) as error:
                    self._lost(error)
                except Exception as error:
                    log.exception("a bug of ours", extra={"data": {"node": self.name}})
                    self._lost(error)
                if time.monotonic() - began >= STEADY_S + self._settings.connect_timeout_s:
                    wait = first
                await asyncio.sleep(wait * random.uniform(0.5, 1.0))
                wait = min(longest, 2 * wait)
        finally:
            self.problem = _LEFT
            if self._connection is not None:
                self._connection.close(_LEFT)

    async def _connected(self) -> None:
        """Connect, and stay until the connection is lost. Raises what ended it."""
        settings = self._settings
        late = f"node {self.name} did not say what it holds within connect_timeout_s, {settings.connect_timeout_s:g} s"
        try:
            async with asyncio.timeout(settings.connect_timeout_s):
                connection = await self._greeted(late)
        except TimeoutError:
            raise TimeoutError(late) from None
        self._connection = connection
        for latency in self._latencies.values():
            latency.least = 0.0  # what was not answered before it came back says nothing about it now
        self.problem = ""
        log.info("node connected", extra={"data": {"node": self.name}})
        self._changed()
        try:
            while True:
                await asyncio.wait([connection.lost], timeout=settings.ping_s)
                if connection.lost.done():
                    return
                await connection.ping(settings.ping_timeout_s)
        except BaseException as error:
            why = str(error)
            if isinstance(error, asyncio.CancelledError):
                self.problem = why = _LEFT  # it is well, and nothing need be said
            connection.close(why)
            raise

    async def _greeted(self, late: str) -> _Connection:
        """A connection on which the node has said what it holds."""
        try:
            _, connection = await asyncio.get_running_loop().create_connection(
                lambda: _Connection(self.name, self._heard, self._ended),
                self.address.host,
                self.address.port,
                ssl=self._tls,
                # Certificates name the service, not the address of each of its nodes.
                server_hostname="" if self._tls is not None else None,
            )
        except ssl.SSLError as error:
            # Who shows a certificate has the right port, and one that is set.
            hint = "" if isinstance(error, ssl.SSLCertVerificationError) else f"; {_NO_NODE}"
            raise NodeFailed(f"node {self.name}: the handshake failed: {why_refused(error)}{hint}") from error
        except (ConnectionResetError, ConnectionAbortedError) as error:
            # Asyncio says nothing of its own about a node that hung up in the middle of the handshake.
            raise NodeFailed(f"node {self.name} broke off before it said what it holds; {_NO_NODE}") from error
        self._greeting = connection
        try:
            connection.hello()
            await connection.greeted
        except BaseException:
            connection.close(late)
            raise
        return connection

    def _heard(self, connection: _Connection, holdings: Holdings) -> None:
        if connection is not self._connection and connection is not self._greeting:
            return  # one that was given up
        if holdings != self.holdings:
            self.holdings = holdings
            if self._connection is not None:
                self._changed()

    def _ended(self, connection: _Connection, error: Exception) -> None:
        if connection is self._connection or connection is self._greeting:
            self._lost(error)

    def _lost(self, error: Exception) -> None:
        self._greeting = None
        why = str(error) or type(error).__name__
        was_up, left = self.holdings is not None, self.holdings is not None and self.holdings.draining
        self.holdings, self._connection = None, None
        if left:
            log.info("node left", extra={"data": {"node": self.name}})
        elif why != self.problem:
            log.warning("node lost" if was_up else "node not reached", extra={"data": {"node": self.name, "why": why}})
        self.problem = why
        if was_up and self.in_flight:
            # One that breaks off again and again over questions is no better than one that answers with failures.
            self.failed(why)
        if was_up:
            if not left:
                self.losses.inc()
            self._changed()


class _Connection(asyncio.Protocol):
    """Frames to and from a node; every request that is sent gets its reply called, even if the connection is lost."""

    def __init__(
        self, name: str, heard: Callable[[_Connection, Holdings], None], ended: Callable[[_Connection, Exception], None]
    ) -> None:
        self._name, self._heard, self._ended = name, heard, ended
        self._frames = remote.Frames(remote.OF_NODES, remote.MAX_ANSWER_BYTES)
        self._transport: asyncio.Transport | None = None
        self._replies: dict[int, Reply] = {}
        self._numbers = itertools.count(1)
        self._loop = asyncio.get_running_loop()
        self.greeted: asyncio.Future[None] = self._loop.create_future()
        self.lost: asyncio.Future[None] = self._loop.create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one by its methods only

    def hello(self) -> None:
        assert self._transport is not None
        self._transport.write(remote.message(Kind.HELLO, 0, remote.Hello()))

    def ask(self, make: Make, left_ms: float, reply: Reply) -> int:
        if self._transport is None:
            raise NodeFailed(f"node {self._name} is not connected")
        if self._transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
            raise NodeFailed(f"node {self._name} has not read {MAX_UNSENT_BYTES} bytes of questions")
        request = next(self._numbers) & 0xFFFFFFFF
        self._transport.write(make(request, left_ms))
        self._replies[request] = reply
        return request

    def cancel(self, request: int) -> None:
        if self._replies.pop(request, None) is not None and self._transport is not None:
            self._transport.write(remote.frame(Kind.CANCEL, request))

    async def ping(self, timeout_s: float) -> None:
        """Raises TimeoutError where no answer comes, NodeFailed where the connection is lost."""
        answered: asyncio.Future[None] = self._loop.create_future()

        def reply(kind: Kind | None, payload: bytes, error: NodeFailed | None) -> None:
            if not answered.done():
                if error is not None:
                    answered.set_exception(error)
                else:
                    answered.set_result(None)

        self.ask(lambda request, _: remote.frame(Kind.PING, request), timeout_s * 1e3, reply)
        try:
            async with asyncio.timeout(timeout_s):
                await answered
        except TimeoutError:
            raise TimeoutError(f"node {self._name} did not answer within ping_timeout_s, {timeout_s:g} s") from None

    def data_received(self, data: bytes) -> None:
        try:
            for kind, request, payload in self._frames.feed(data):
                if kind is Kind.HOLDINGS:
                    holdings = remote.decode(kind, payload)
                    if holdings.protocol != remote.PROTOCOL:
                        raise ProtocolError(
                            f"node {self._name} speaks protocol {holdings.protocol}, this front door {remote.PROTOCOL}"
                        )
                    self._heard(self, holdings)
                    if not self.greeted.done():
                        self.greeted.set_result(None)
                else:
                    reply = self._replies.pop(request, None)
                    if reply is not None:  # None for what was cancelled
                        reply(kind, payload, None)
        except ProtocolError as error:
            hint = "" if self.greeted.done() else f"; {_NO_NODE}"
            self.close(f"node {self._name}: {error}{hint}")

    def connection_lost(self, exc: Exception | None) -> None:
        why = str(exc or "it closed the connection")
        hint = "" if self.greeted.done() else f" before it said what it holds; {_NO_NODE}"
        self._end(NodeFailed(f"node {self._name} broke off: {why}{hint}"))

    def close(self, why: str) -> None:
        if self._transport is not None:
            self._transport.abort()
        self._end(NodeFailed(why))

    def _end(self, error: NodeFailed) -> None:
        if self.lost.done():
            return
        self._transport = None
        self.lost.set_result(None)
        # First the node is down, then its questions are asked elsewhere.
        self._ended(self, error)
        if not self.greeted.done():
            self.greeted.set_exception(error)
            self.greeted.exception()  # whoever waits is told; nobody need
        replies, self._replies = self._replies, {}
        for reply in replies.values():
            reply(None, b"", error)
