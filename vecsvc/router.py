"""Which nodes there are, which version of each index serves, and who is asked for its shards.

A front door answers every question from one version. It goes over to another only when every shard of it has a node
that serves it, and waits a while for the last replicas; whoever began with the version before ends with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import ssl
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import pyarrow as pa

from vecsvc import remote
from vecsvc.config import RouteSettings
from vecsvc.encoders.base import EncoderSpec
from vecsvc.errors import MAX_LISTED, NodeFailed, ProtocolError, VecsvcError, listed
from vecsvc.fan_out import Budgets, Call, Group
from vecsvc.manifest import Manifest
from vecsvc.node import Node
from vecsvc.remote import Description, Held, Kind
from vecsvc.route_metrics import RouteMetrics
from vecsvc.telemetry import Metrics
from vecsvc.topology import Address, Discovery
from vecsvc.types import MAX_SHARDS, ServedIndex, Vectors

log: Final = logging.getLogger("vecsvc.router")

MAX_INDEXES: Final = 1024
DESCRIBE_TIMEOUT_S: Final = 5.0
FIRST_WAIT_S: Final = 10.0  # a new front door waits so long for the last shards before it answers without them


class RemoteEncoder:
    """What encodes the queries of an index, somewhere else."""

    def __init__(self, spec: EncoderSpec) -> None:
        self.spec = spec
        self.problem = ""


class RoutedVersion:
    """A version of an index as a front door knows it: what it is, and which nodes hold which of its shards."""

    def __init__(self, held: Held, description: Description) -> None:
        """Raises ProtocolError where the description makes no sense."""
        self.name, self.version, self.digest = held.index, held.version, held.digest
        self.id = ServedIndex(held.index, held.version)
        try:
            self.manifest = msgspec.json.decode(description.manifest, type=Manifest)
            self.stored: pa.Schema = pa.ipc.read_schema(pa.py_buffer(description.schema))
            spec = msgspec.json.decode(description.encoder, type=EncoderSpec) if description.encoder else None
        except (msgspec.MsgspecError, pa.ArrowException, OSError) as error:
            raise ProtocolError(f"version {held.version!r} of {held.index!r} is described wrongly: {error}") from error
        self.encoder = RemoteEncoder(spec) if spec is not None else None
        self.total = len(self.manifest.shards)
        self.centroids: Vectors | None = None
        if description.centroids is not None:
            shape = self.total, self.manifest.spec.dim + 1
            if len(description.centroids) != 4 * shape[0] * shape[1]:
                raise ProtocolError(f"{len(description.centroids)} bytes are no centroids of shape {shape}")
            self.centroids = np.frombuffer(description.centroids, "<f4").reshape(shape)
        self.accepted: set[tuple[tuple[str, int], ...]] = set()  # search settings that the kind was found to know
        self.groups: list[tuple[tuple[int, ...], list[Node]]] = []  # shards that the same nodes hold, and these nodes
        self._holders: list[list[Node]] = []  # of each shard

    def regroup(self, nodes: Iterable[Node]) -> None:
        """Look anew at who holds what. Questions under way keep their groups of shards, and ask `holders`."""
        holders: list[list[Node]] = [[] for _ in range(self.total)]
        for node in nodes:
            held = holding(node, self.name, self.version, self.digest)
            for shard in held.shards if held is not None else ():
                if shard < self.total:
                    holders[shard].append(node)
        self._holders = holders
        groups: dict[tuple[int, ...], tuple[list[int], list[Node]]] = {}
        for shard, found in enumerate(holders):
            groups.setdefault(tuple(sorted(map(id, found))), ([], found))[0].append(shard)
        self.groups = [(tuple(shards), found) for shards, found in groups.values()]

    def keep(self, nodes: Iterable[Node]) -> None:
        """Tell nodes that went over to another version that this one is still asked for, be it seldom."""
        wanted = remote.Describe(self.name, self.digest)
        for node in nodes:
            held = holding(node, self.name, self.version, self.digest)
            if held is not None and not held.current:
                with contextlib.suppress(NodeFailed):
                    node.ask(lambda request, _: remote.message(Kind.DESCRIBE, request, wanted), 0.0, _ignore)

    def holders(self, shards: tuple[int, ...]) -> list[Node]:
        """The nodes that hold all of these shards; of none, every node that holds some."""
        if not shards:
            return self.nodes()
        first, *others = (self._holders[shard] for shard in shards)
        return [node for node in first if all(node in nodes for nodes in others)]

    def nodes(self) -> list[Node]:
        """Every node that holds some shard."""
        return list({id(node): node for _, nodes in self.groups for node in nodes}.values())

    def missing(self) -> list[int]:
        """Shards that no node holds."""
        return [shard for shards, nodes in self.groups if not nodes for shard in shards]

    def release(self) -> None:
        """Nothing is open here; it is what versions in this process are asked to do."""


def _ignore(kind: Kind | None, payload: bytes, error: NodeFailed | None) -> None:
    pass


def holding(node: Node, index: str, version: str, digest: str) -> Held | None:
    for held in node.holdings.held if node.holdings is not None else ():
        if held.index == index and held.version == version and held.digest == digest:
            return held
    return None


class Router:
    """The nodes, and what serves. Belongs to one event loop."""

    def __init__(self, settings: RouteSettings, metrics: Metrics, tls: ssl.SSLContext | None = None) -> None:
        """Raises ConfigError where the file of nodes is wrong."""
        self._settings, self._tls = settings, tls
        self._discovery = Discovery(Path(settings.config))
        self._nodes: dict[Address, tuple[Node, asyncio.Task[None]]] = {}
        self.serving: dict[str, RoutedVersion] = {}
        self._first_seen: float | None = None  # when a node was first seen to hold something
        # Of each index, the digests of versions that wait, and the shards that nobody serves.
        self._waiting: dict[str, dict[str, list[int]]] = {}
        self._since: dict[tuple[str, str, str], float] = {}  # version -> since when every shard of it can be served
        self._flips: dict[str, asyncio.Task[None]] = {}  # of each index, the description that is under way
        self._refusals: dict[str, str] = {}  # of each index, why the last one failed
        self._gone_since: dict[str, float] = {}  # since when all nodes are there, and none has the index
        self._changed = asyncio.Event()
        self.ready = asyncio.Event()  # set once all questions could be answered
        self._problems: dict[str, str] = {"vecsvc": "no node was reached yet"}
        self._answerable = False  # whether some shard of some index has a node
        self.metrics = RouteMetrics(
            metrics.registry,
            lambda: [n.state for n in self.nodes()],
            lambda: [(name, len(version.missing())) for name, version in self.serving.items()],
        )
        self.budgets = Budgets.of(settings, self.metrics)

    def nodes(self) -> list[Node]:
        return [node for node, _ in self._nodes.values()]

    def problem(self) -> str:
        """Why questions should go to another front door; empty where they should not.

        A shard that is gone is gone for all front doors: were they all to call themselves unready, nobody would be
        there to say what is missing, to answer in part, or to answer from other indexes.
        """
        waited = self._first_seen is not None and time.monotonic() - self._first_seen >= FIRST_WAIT_S
        if self._answerable and (self.ready.is_set() or waited):
            return ""
        return self.told(self._problems) or "not every node was asked yet"

    @property
    def problems(self) -> dict[str, str]:
        return self._problems

    async def call(self, groups: list[Group], key: Any, deadline: float, *, partial: bool = False) -> None:
        await Call(groups, self.budgets, key, deadline, partial=partial).run()

    # ------------------------------------------------------------------------------------------------- life

    async def run(self) -> None:
        """Keep the nodes and the versions up to date until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._discover())
            tasks.create_task(self._settle_forever())

    async def _discover(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while True:
                try:
                    found = set(await self._discovery.look())
                    for address in found - self._nodes.keys():
                        seconds = self.metrics.shard(str(address))
                        node = Node(
                            address,
                            self._settings,
                            self._changed.set,
                            seconds,
                            self._tls,
                            ejections=self.metrics.ejections(),
                            losses=self.metrics.losses(),
                        )
                        self._nodes[address] = node, loop.create_task(node.run())
                    for address in self._nodes.keys() - found:
                        node, task = self._nodes.pop(address)
                        task.cancel()
                        self.metrics.forget(node.name)
                        log.info("node gone from the topology", extra={"data": {"node": node.name}})
                        self._changed.set()
                except Exception:
                    log.exception("a bug of ours")  # what is known stays, and the next look may go better
                await asyncio.sleep(self._settings.discover_s)
        finally:
            for task in [*(task for _, task in self._nodes.values()), *self._flips.values()]:
                task.cancel()

    async def _settle_forever(self) -> None:
        while True:
            # A flip may be due by time alone, so it looks now and then even where nothing changed.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(1.0, max(0.05, self._settings.flip_wait_s))):
                    await self._changed.wait()
            self._changed.clear()
            try:
                self._settle()
            except Exception:
                log.exception("a bug of ours")

    def _settle(self) -> None:
        """Choose what serves from what the nodes hold now."""
        nodes = self.nodes()
        problems: dict[str, str] = {}
        offers = _offers(nodes)
        if offers and self._first_seen is None:
            self._first_seen = time.monotonic()
        names = sorted({offer.index for offer in offers} | self.serving.keys())[:MAX_INDEXES]
        for name in self._refusals.keys() - set(names):
            del self._refusals[name]
        for key in self._since.keys() - {(o.index, o.version, o.digest) for o in offers}:
            del self._since[key]
        for name in names:
            mine = [offer for offer in offers if offer.index == name]
            wanted = self._choose(name, mine)
            if wanted is None:
                self._refusals.pop(name, None)
            elif name not in self._flips:
                # By itself: a node that does not describe what it holds delays its own index, and no other.
                self._flips[name] = task = asyncio.get_running_loop().create_task(self._flip(wanted))
                task.add_done_callback(functools.partial(self._flipped, name))
            if name in self._refusals:
                problems[name] = self._refusals[name]
            if self._is_gone(name, mine):
                continue
            serving = self.serving.get(name)
            self._tell_waiting(name, serving, mine)
            if serving is not None:
                serving.regroup(nodes)
                serving.keep(nodes)
                missing = serving.missing()
                if missing:
                    problems[name] = f"no node for shards {listed(missing)} of {serving.total}"
            elif name not in problems:
                least = min((offer.missing for offer in mine), key=len)
                problems[name] = f"no node for shards {listed(least)}" if least else "no version serves yet"
        if not self.serving and not problems:
            why = "; ".join(f"{node.name}: {node.problem or 'holds nothing'}" for node in nodes[:MAX_LISTED])
            problems["vecsvc"] = f"no node holds an index: {why or 'the topology names none'}"
        if self._discovery.problem:
            problems["topology"] = self._discovery.problem
        if problems != self._problems:
            level = logging.WARNING if problems else logging.INFO
            log.log(level, "not whole" if problems else "ready", extra={"data": {"why": self.told(problems)}})
        self._problems = problems
        self._answerable = any(nodes for version in self.serving.values() for _, nodes in version.groups)
        if not problems:
            self.ready.set()

    def _flipped(self, name: str, task: asyncio.Task[None]) -> None:
        """What became of a flip. One that failed is tried again at the next look, and not at once."""
        self._flips.pop(name, None)
        error = None if task.cancelled() else task.exception()
        if error is None:
            self._refusals.pop(name, None)
            self._changed.set()
        elif isinstance(error, VecsvcError):
            self._refusals[name] = str(error)
        else:
            log.error("a bug of ours", exc_info=error)

    def _is_gone(self, name: str, offers: list[_Offer]) -> bool:
        """Forget an index that no node has, though all of them are there: it was deleted, and is asked for in vain.

        A node that opens its indexes still, or cannot, says so, and one that was just begun is waited for.
        """
        nodes = self.nodes()
        if offers or not nodes or not all(n.usable() and n.holdings and not n.holdings.problem for n in nodes):
            self._gone_since.pop(name, None)
            return False
        since = self._gone_since.setdefault(name, time.monotonic())
        if time.monotonic() - since < FIRST_WAIT_S:
            return False
        del self._gone_since[name]
        self.serving = {other: version for other, version in self.serving.items() if other != name}
        log.info("index gone", extra={"data": {"index": name}})
        return True

    def _tell_waiting(self, name: str, serving: RoutedVersion | None, offers: list[_Offer]) -> None:
        """Say once of a version what keeps it from serving."""
        before, waiting = self._waiting.pop(name, {}), {}
        for offer in offers:
            if offer.current and offer.missing and (serving is None or offer.digest != serving.digest):
                waiting[offer.digest] = offer.missing
                if before.get(offer.digest) != offer.missing:
                    facts = {"index": name, "version": offer.version, "shards": listed(offer.missing)}
                    log.info("a version waits for shards", extra={"data": facts})
        if waiting:
            self._waiting[name] = waiting

    @staticmethod
    def told(problems: dict[str, str]) -> str:
        return "; ".join(f"{name}: {why}" for name, why in problems.items())

    def _choose(self, name: str, offers: list[_Offer]) -> _Offer | None:
        """The version to go over to; None where the present one stays."""
        now = time.monotonic()
        serving = self.serving.get(name)
        whole = [offer for offer in offers if not offer.missing]
        for offer in offers:
            key = (offer.index, offer.version, offer.digest)
            if offer.missing:
                self._since.pop(key, None)
            else:
                self._since.setdefault(key, now)
        if not whole:
            return self._least_missing(offers, now) if serving is None else None
        # What its nodes call current comes before what they only keep; then the newest.
        best = max(whole, key=lambda offer: (offer.current_everywhere, offer.created, offer.version))
        if serving is None:
            return best
        if (best.version, best.digest) == (serving.version, serving.digest):
            return None
        present = next((o for o in whole if (o.version, o.digest) == (serving.version, serving.digest)), None)
        if present is None:
            return best
        if not best.current_everywhere:
            return None
        waited = now - self._since[best.index, best.version, best.digest]
        return best if best.on_all_nodes or waited >= self._settings.flip_wait_s else None

    def _least_missing(self, offers: list[_Offer], now: float) -> _Offer | None:
        """What a front door serves that starts while a shard is gone; None while that may still come."""
        current = [offer for offer in offers if offer.current]
        if not current or self._first_seen is None or now - self._first_seen < FIRST_WAIT_S:
            return None
        return max(current, key=lambda offer: (-len(offer.missing), offer.created, offer.version))

    async def _flip(self, offer: _Offer) -> None:
        description = await self._describe(offer)
        version = RoutedVersion(offer.held, description)
        version.regroup(self.nodes())
        if len(version.missing()) > len(offer.missing):
            raise NodeFailed(f"version {offer.version!r} of {offer.index!r} went while it was asked for")
        before = self.serving.get(offer.index)
        self.serving = {**self.serving, offer.index: version}
        self.metrics.flips(offer.index).inc()
        facts = {"index": offer.index, "version": offer.version, "before": before.version if before else None}
        log.info("serving", extra={"data": facts})

    async def _describe(self, offer: _Offer) -> Description:
        group = Group(
            offer.index,
            (),
            [n for n in self.nodes() if holding(n, offer.index, offer.version, offer.digest)],
            lambda request, left_ms: remote.message(Kind.DESCRIBE, request, remote.Describe(offer.index, offer.digest)),
            Kind.DESCRIPTION,
        )
        await self.call([group], "describe", time.monotonic() + DESCRIBE_TIMEOUT_S)
        if not isinstance(group.answer, Description):
            raise NodeFailed(f"version {offer.version!r} of {offer.index!r} was not described")
        return group.answer


class _Offer:
    """A version that nodes hold, all of it or in part."""

    def __init__(self, held: Held) -> None:
        self.held = held
        self.index, self.version, self.digest, self.created = held.index, held.version, held.digest, held.created
        self._shards: set[int] = set()
        self._current: set[int] = set()  # shards that some node serves as its current version
        self.on_all_nodes = True  # whether every node that holds the index holds this version as its current one

    def add(self, held: Held) -> None:
        self._shards.update(held.shards)
        if held.current:
            self._current.update(held.shards)

    @property
    def current(self) -> bool:
        """Whether some node serves it as its current version."""
        return bool(self._current)

    @property
    def missing(self) -> list[int]:
        return [shard for shard in range(self.held.shards_total) if shard not in self._shards]

    @property
    def current_everywhere(self) -> bool:
        return len(self._current) >= self.held.shards_total


def _offers(nodes: list[Node]) -> list[_Offer]:
    found: dict[tuple[str, str, str], _Offer] = {}
    having: dict[str, list[tuple[Node, Held]]] = {}
    for node in nodes:
        for held in node.holdings.held if node.holdings is not None and not node.holdings.draining else ():
            if not 1 <= held.shards_total <= MAX_SHARDS:
                continue
            offer = found.setdefault((held.index, held.version, held.digest), _Offer(held))
            offer.add(held)
            if held.current:
                having.setdefault(held.index, []).append((node, held))
    for offer in found.values():
        offer.on_all_nodes = all(
            (held.version, held.digest) == (offer.version, offer.digest) for _, held in having.get(offer.index, [])
        )
    return list(found.values())
