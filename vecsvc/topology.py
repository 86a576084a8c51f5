"""Where the nodes are: addresses from a file and from names, looked at again and again. What nodes hold they say."""

from __future__ import annotations

import asyncio
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from vecsvc.errors import ConfigError

MAX_TOPOLOGY_BYTES: Final = 1 << 20
MAX_NODES: Final = 4096
RESOLVE_TIMEOUT_S: Final = 5.0

_ADDRESS: Final = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]{1,253}):(\d{1,5})")


@dataclass(frozen=True, slots=True, order=True)
class Address:
    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Topology:
    nodes: tuple[Address, ...]  # each is a node
    names: tuple[Address, ...]  # every address that the name resolves to is a node


def read_topology(path: Path) -> Topology:
    """The file of `vecsvc route --config`. Raises ConfigError, naming the file and what is wrong in it."""
    try:
        if path.stat().st_size > MAX_TOPOLOGY_BYTES:
            raise ConfigError(f"{path}: larger than {MAX_TOPOLOGY_BYTES} bytes")
        document = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"no file {path}; --config names a TOML file with nodes = [...] or dns = [...]") from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: {error}") from error
    for key in document:
        if key not in ("nodes", "dns"):
            raise ConfigError(f"{path}: {key!r} is unknown; it takes nodes and dns, lists of host:port")
    found = Topology(_addresses(path, "nodes", document), _addresses(path, "dns", document))
    if not found.nodes and not found.names:
        raise ConfigError(f'{path}: names no node; write nodes = ["host:port"] or dns = ["name:port"]')
    return found


def _addresses(path: Path, key: str, document: dict[str, Any]) -> tuple[Address, ...]:
    given = document.get(key, [])
    if not isinstance(given, list) or len(given) > MAX_NODES:
        raise ConfigError(f"{path}: {key} must be a list of at most {MAX_NODES} texts host:port")
    return tuple(dict.fromkeys(address(one, f"{path}: {key}") for one in given))


def address(text: Any, where: str) -> Address:
    """`host:port` or `[ipv6]:port`. Raises ConfigError."""
    match = _ADDRESS.fullmatch(text) if isinstance(text, str) else None
    if match is None or not 0 < int(match[2]) < 65_536:
        raise ConfigError(f"{where}: {str(text)[:80]!r} is no host:port")
    return Address(match[1].strip("[]"), int(match[2]))


class Discovery:
    """The addresses of all nodes, as the file and the names say now."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigError where the file is not there or wrong; later such a file changes nothing."""
        self._path = path
        self._topology = read_topology(path)
        self._stamp = _stamp(path)
        self._resolved: dict[Address, tuple[Address, ...]] = {}
        self.problem = ""  # why the last look failed; what was known before stays

    async def look(self) -> list[Address]:
        problem = ""  # told when the look is over: names take their time
        stamp = _stamp(self._path)
        if stamp != self._stamp:
            try:
                self._topology, self._stamp = read_topology(self._path), stamp
            except ConfigError as error:
                problem = str(error)
        found = dict.fromkeys(self._topology.nodes)
        for name in self._topology.names:
            try:
                self._resolved[name] = await _resolve(name)
            except (OSError, TimeoutError, UnicodeError) as error:
                # A name server that fails for a moment must not take nodes away that are well.
                problem = f"{name}: cannot be resolved: {error}"
            found.update(dict.fromkeys(self._resolved.get(name, ())))
        self.problem = problem
        return list(found)[:MAX_NODES]


async def _resolve(name: Address) -> tuple[Address, ...]:
    async with asyncio.timeout(RESOLVE_TIMEOUT_S):
        infos = await asyncio.get_running_loop().getaddrinfo(name.host, name.port, proto=6)
    return tuple(sorted({Address(str(info[4][0]), int(info[4][1])) for info in infos}))


def _stamp(path: Path) -> tuple[int, int, int]:
    """Changes with the file; of one that is gone for a moment it is zeros."""
    try:
        found = path.stat()
    except OSError:
        return 0, 0, 0
    return found.st_mtime_ns, found.st_size, found.st_ino
