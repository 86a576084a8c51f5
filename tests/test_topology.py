"""Where nodes are is read from a file and from names; what is broken for a moment takes away nothing that was known."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from vecsvc import topology
from vecsvc.errors import ConfigError
from vecsvc.topology import Address, Discovery, read_topology


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_nodes_and_names_are_read_each_once_in_order(tmp_path: Path) -> None:
    file = write(tmp_path / "t.toml", 'nodes = ["b:2", "a:1", "b:2", "[::1]:3"]\ndns = ["shards.svc:8082"]')
    found = read_topology(file)
    assert found.nodes == (Address("b", 2), Address("a", 1), Address("::1", 3))
    assert found.names == (Address("shards.svc", 8082),)
    assert [str(address) for address in found.nodes] == ["b:2", "a:1", "[::1]:3"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "names no node"),
        ("nodes = []", "names no node"),
        ('nodes = ["a:1"', "t.toml"),
        ('node = ["a:1"]', "'node' is unknown; it takes nodes and dns"),
        ('nodes = "a:1"', "nodes must be a list"),
        ('nodes = ["a"]', "'a' is no host:port"),
        ('nodes = ["a:0"]', "'a:0' is no host:port"),
        ('nodes = ["a:65536"]', "no host:port"),
        ('nodes = ["a:1:2"]', "no host:port"),
        ('nodes = ["http://a:1"]', "no host:port"),
        ('nodes = ["a b:1"]', "no host:port"),
        ("nodes = [1]", "'1' is no host:port"),
        ('dns = [["a:1"]]', "no host:port"),
        ("nodes = " + "[" * 5000 + "]" * 5000, "t.toml"),
        ("#" * (topology.MAX_TOPOLOGY_BYTES + 1), "larger than"),
        ("nodes = [" + '"a:1",' * (topology.MAX_NODES + 1) + "]", "at most"),
    ],
    ids=range(16),
)
def test_a_wrong_file_is_refused_naming_it_and_what_is_wrong(tmp_path: Path, text: str, why: str) -> None:
    file = write(tmp_path / "t.toml", text)
    with pytest.raises(ConfigError, match=why) as raised:
        read_topology(file)
    assert str(file) in str(raised.value)


def test_what_is_no_file_and_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--config names a TOML file"):
        read_topology(tmp_path / "none.toml")
    with pytest.raises(ConfigError):
        read_topology(tmp_path)
    (tmp_path / "b.toml").write_bytes(b"nodes = ['\xff:1']")
    with pytest.raises(ConfigError):
        read_topology(tmp_path / "b.toml")


def test_a_file_that_changes_is_read_again_and_a_broken_one_changes_nothing(tmp_path: Path) -> None:
    file = write(tmp_path / "t.toml", 'nodes = ["a:1"]')

    async def check() -> None:
        discovery = Discovery(file)
        assert await discovery.look() == [Address("a", 1)]
        write(file, 'nodes = ["a:1", "b:2"]')
        assert await discovery.look() == [Address("a", 1), Address("b", 2)] and not discovery.problem
        write(file, "nodes = [half")
        assert await discovery.look() == [Address("a", 1), Address("b", 2)]
        assert "t.toml" in discovery.problem
        file.unlink()
        assert await discovery.look() == [Address("a", 1), Address("b", 2)] and "no file" in discovery.problem
        other = write(tmp_path / "new", 'nodes = ["c:3"]')
        os.replace(other, file)  # noqa: PTH105
        assert await discovery.look() == [Address("c", 3)] and not discovery.problem

    asyncio.run(check())


def test_every_address_of_a_name_is_a_node_and_a_silent_name_server_takes_none_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "t.toml", 'nodes = ["a:1"]\ndns = ["shards:8082", "more:8082"]')
    answers: dict[str, list[str] | Exception] = {"shards": ["10.0.0.2", "10.0.0.1"], "more": OSError("no such name")}

    async def check() -> None:
        async def getaddrinfo(host: str, port: int, **_: object) -> list[tuple[object, ...]]:
            await asyncio.sleep(0)
            found = answers[host]
            if isinstance(found, Exception):
                raise found
            return [(2, 1, 6, "", (address, port)) for address in found]

        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
        discovery = Discovery(file)
        assert await discovery.look() == [Address("a", 1), Address("10.0.0.1", 8082), Address("10.0.0.2", 8082)]
        assert "more:8082: cannot be resolved" in discovery.problem
        told = [discovery.problem]
        looking = asyncio.create_task(discovery.look())
        while not looking.done():
            await asyncio.sleep(0)
            told.append(discovery.problem)
        assert len(told) > 1 and set(told) == {told[0]}, "what is wrong is not taken back while it looks again"
        answers["shards"], answers["more"] = TimeoutError(), ["::1"]
        assert await discovery.look() == [
            Address("a", 1),
            Address("10.0.0.1", 8082),
            Address("10.0.0.2", 8082),
            Address("::1", 8082),
        ]
        assert "shards:8082" in discovery.problem
        answers["shards"] = ["10.0.0.3"]
        assert Address("10.0.0.1", 8082) not in await discovery.look() and not discovery.problem

    asyncio.run(check())


def test_a_name_of_this_machine_resolves(tmp_path: Path) -> None:
    discovery = Discovery(write(tmp_path / "t.toml", 'dns = ["localhost:8082"]'))
    found = asyncio.run(discovery.look())
    assert {address.host for address in found} & {"127.0.0.1", "::1"} and {address.port for address in found} == {8082}
