"""What a front door makes of what its nodes hold, without nodes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from vecsvc import router as router_module
from vecsvc.config import RouteSettings
from vecsvc.errors import NodeFailed
from vecsvc.node import Node
from vecsvc.remote import PROTOCOL, Held, Holdings
from vecsvc.router import RoutedVersion, Router
from vecsvc.telemetry import Metrics, Spread
from vecsvc.topology import Address


def held(index: str, version: str = "v1") -> Held:
    return Held(index, version, f"digest of {index} {version}", "2026-01-01T00:00:00Z", True, [0], 1)


class Stub:
    """Stands for a RoutedVersion."""

    def __init__(self, of: Held) -> None:
        self.name, self.version, self.digest, self.total = of.index, of.version, of.digest, 1
        self.groups: list[Any] = [((0,), [])]

    def regroup(self, nodes: Any) -> None: ...

    def keep(self, nodes: Any) -> None: ...

    def missing(self) -> list[int]:
        return []


class Made:
    def __init__(self, tmp_path: Path, nodes: int) -> None:
        file = tmp_path / "route.toml"
        file.write_text('nodes = ["127.0.0.1:1"]\n')
        settings = RouteSettings(config=str(file), flip_wait_s=0.0)
        self.router = Router(settings, Metrics())
        self.nodes = [Node(Address(f"node-{i}", 1), settings, lambda: None, Spread()) for i in range(nodes)]
        for node in self.nodes:
            self.router._nodes[node.address] = node, asyncio.get_running_loop().create_task(asyncio.sleep(0))

    def hold(self, *of: Held, node: int | None = None) -> None:
        for number, one in enumerate(self.nodes):
            if node is None or number == node:
                one.holdings = Holdings(PROTOCOL, list(of), False, "")


def run(check: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await check()

    asyncio.run(main())


def test_who_holds_shards_is_found_anew_though_others_share_nodes_now(tmp_path: Path) -> None:
    async def check() -> None:
        a, b, c = Made(tmp_path, 3).nodes
        version = RoutedVersion.__new__(RoutedVersion)  # without a description: who holds it is all that matters
        version.name, version.version, version.digest, version.total = "it", "v1", "d", 3

        def hold(node: Node, *shards: int) -> None:
            node.holdings = Holdings(PROTOCOL, [Held("it", "v1", "d", "2026", True, list(shards), 3)], False, "")

        hold(a, 0, 1, 2)
        version.regroup([a, b, c])
        assert version.groups == [((0, 1, 2), [a])]
        hold(b, 0, 1)
        hold(c, 2)
        version.regroup([a, b, c])
        assert version.holders((0, 1, 2)) == [a] and version.holders((0, 1)) == version.holders((1,)) == [a, b]
        assert version.holders((2,)) == [a, c] and set(version.holders(())) == {a, b, c}
        a.holdings = None
        version.regroup([a, b, c])
        assert version.holders((0, 1, 2)) == [] and version.holders((2,)) == [c]

    run(check)


def test_an_index_that_no_node_has_is_forgotten_once_they_had_time_to_open_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr(router_module.time, "monotonic", lambda: clock[0])

    async def check() -> None:
        made = Made(tmp_path, 2)
        router = made.router
        router.serving = {name: Stub(held(name)) for name in ("kept", "gone")}  # type: ignore[misc]
        made.hold(held("kept"), held("gone"))
        router._settle()
        made.hold(held("kept"))
        router._settle()
        clock[0] += router_module.FIRST_WAIT_S / 2
        made.nodes[1].holdings = None  # a node that is away may have it
        router._settle()
        clock[0] += router_module.FIRST_WAIT_S
        made.hold(held("kept"))
        router._settle()
        assert set(router.serving) == {"kept", "gone"}
        made.nodes[0].holdings = Holdings(PROTOCOL, [held("kept")], False, "opening gone")
        clock[0] += router_module.FIRST_WAIT_S  # one that opens its indexes still, may have it soon
        router._settle()
        made.hold(held("kept"))
        router._settle()
        assert set(router.serving) == {"kept", "gone"}
        clock[0] += router_module.FIRST_WAIT_S
        router._settle()
        assert set(router.serving) == {"kept"} and not router.problems
        made.hold(held("kept"), held("gone"))
        router._settle()
        assert set(router._flips) == {"gone"}, "it comes back like any other"
        for task in router._flips.values():
            task.cancel()

    run(check)


def test_a_node_that_describes_nothing_delays_its_own_index_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def check() -> None:
        made = Made(tmp_path, 1)
        router = made.router
        asked: list[str] = []

        async def flip(offer: Any) -> None:
            asked.append(offer.index)
            if offer.index == "hangs":
                await asyncio.sleep(60)
            if offer.index == "fails":
                raise NodeFailed("it broke off")
            router.serving = {**router.serving, offer.index: Stub(offer.held)}  # type: ignore[dict-item]

        monkeypatch.setattr(router, "_flip", flip)
        made.hold(held("fails"), held("hangs"), held("works"))
        for _ in range(3):
            router._settle()
            await asyncio.sleep(0.01)
        router._settle()
        assert set(router.serving) == {"works"}
        assert asked.count("hangs") == asked.count("works") == 1, "nobody is asked again before he answered"
        assert asked.count("fails") >= 3 and "it broke off" in router.problems["fails"]
        assert "no version serves yet" in router.problems["hangs"] and "works" not in router.problems
        for task in router._flips.values():
            task.cancel()

    run(check)


def test_a_front_door_that_starts_while_a_shard_is_gone_serves_what_there_is_after_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr(router_module.time, "monotonic", lambda: clock[0])

    async def check() -> None:
        made = Made(tmp_path, 1)
        router = made.router
        half = Held("half", "v1", "digest", "2026-01-01T00:00:00Z", True, [0], 2)
        made.hold(half)
        router._settle()
        clock[0] += router_module.FIRST_WAIT_S - 0.1
        router._settle()
        assert not router._flips and router.problem() == "half: no node for shards 1"
        clock[0] += 0.2
        router._settle()
        assert set(router._flips) == {"half"}
        router._flips.pop("half").cancel()
        # One that comes whole meanwhile is not kept waiting for.
        made.hold(half, held("whole"))
        router._settle()
        assert set(router._flips) == {"half", "whole"}
        for task in router._flips.values():
            task.cancel()

    run(check)


def test_a_version_that_went_while_it_was_asked_for_does_not_serve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def check() -> None:
        made = Made(tmp_path, 1)
        router = made.router

        class Empty(Stub):
            def missing(self) -> list[int]:
                return [0]

        async def describe(offer: Any) -> None:
            made.hold(held("it", "v1"))

        monkeypatch.setattr(router, "_describe", describe)
        monkeypatch.setattr(router_module, "RoutedVersion", lambda of, description: Empty(of))
        made.hold(held("it", "v2"))
        router._settle()
        await asyncio.sleep(0.01)
        assert not router.serving and "'v2' of 'it' went while it was asked for" in router._refusals["it"]
        made.hold()
        router._settle()
        assert not router._refusals, "nobody speaks of an index that is not there"

    run(check)
