"""A small cluster for benchmarks: nodes behind proxies of ours, and front doors; each is ended and started alone."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import vecsvc
from fault_proxy import Proxies
from prometheus_client.parser import text_string_to_metric_families


class Place:
    """Where a process of `vecsvc` runs, and runs again after it was ended."""

    def __init__(self, arguments: list[str], log: Path, first: str = "") -> None:
        """`first` is Python that the process runs before it begins."""
        self.arguments, self.log, self.first = arguments, log, first
        self.port = self.admin_port = self.shard_port = 0
        self.process: subprocess.Popen[bytes] | None = None
        self._from = 0  # where this process's part of the log begins

    def start(self) -> None:
        """Until it listens; the ports that it got stay its own."""
        self._from = self.log.stat().st_size if self.log.exists() else 0
        ports = ["--port", str(self.port), "--admin-port", str(self.admin_port)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(vecsvc(*self.arguments, *ports, first=self.first), stderr=log)
        facts = self.wait("listening")
        self.port, self.admin_port = facts["port"], facts["admin_port"]
        self.shard_port = facts.get("shard_port", 0)

    def wait(self, message: str, timeout_s: float = 300.0) -> dict[str, Any]:
        """The first line of its log with that message."""
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            with self.log.open("rb") as log:
                log.seek(self._from)
                for line in log.read().split(b"\n")[:-1]:
                    found: dict[str, Any] = json.loads(line)
                    if found["message"] == message:
                        return found
            if self.process is None or self.process.poll() is not None:
                break
            time.sleep(0.01)
        raise SystemExit(f"no {message!r} from {' '.join(self.arguments)}:\n{self.log.read_text()[-2000:]}")

    def stop(self, number: int = signal.SIGTERM) -> None:
        if self.process is not None:
            self.process.send_signal(number)
            self.process.wait(90)
            self.process = None

    def kill(self) -> None:
        self.stop(signal.SIGKILL)

    def cpu_s(self) -> float:
        """Processor seconds of every thread so far, as the kernel counts them in nanoseconds."""
        assert self.process is not None
        tasks = Path(f"/proc/{self.process.pid}/task").iterdir()
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9

    def rss_bytes(self) -> int:
        """Of the process and of its workers."""
        return sum(
            int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") for pid in self._pids()
        )

    def open_files(self) -> int:
        return sum(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in self._pids())

    def _pids(self) -> list[int]:
        assert self.process is not None
        own = self.process.pid
        children = Path(f"/proc/{own}/task/{own}/children").read_text().split()
        return [own, *map(int, children)]

    def metrics(self) -> dict[str, float]:
        """name{label=value,...} -> value"""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.admin_port}/metrics", timeout=10) as answer:
            families = list(text_string_to_metric_families(answer.read().decode()))
        return {
            f"{sample.name}{{{','.join(f'{k}={v}' for k, v in sorted(sample.labels.items()))}}}": sample.value
            for family in families
            for sample in family.samples
        }

    def nodes_up(self) -> int:
        return int(self.metrics().get("vecsvc_nodes{state=up}", 0))


class Cluster:
    """`replicas` nodes for each shard, and front doors that know their addresses by a file."""

    def __init__(
        self,
        directory: Path,
        shards: int,
        replicas: int,
        logs: Path,
        *,
        doors: int = 1,
        proxied: bool = True,
        first: str = "",
    ) -> None:
        self.shards, self.replicas = shards, replicas
        self.proxied = proxied
        self.nodes: list[Place] = []
        for shard in range(shards):
            for replica in range(replicas):
                serve = ["serve", str(directory), "--shards", str(shard), "--shard-port", "0", "--search-threads", "1"]
                self.nodes.append(Place(serve, logs / f"node-{shard}-{replica}.log", first))
        self.topology = logs / "nodes.toml"
        route = ["route", "--config", str(self.topology), "--max-in-flight", "1000"]
        self.doors = [Place(route, logs / f"door-{number}.log") for number in range(doors)]
        self.proxies = Proxies([1] * len(self.nodes)) if proxied else None

    @property
    def ports(self) -> list[int]:
        return [door.port for door in self.doors]

    def of(self, shard: int) -> list[int]:
        """The numbers of its nodes."""
        return [shard * self.replicas + replica for replica in range(self.replicas)]

    def start(self) -> None:
        for number in range(len(self.nodes)):
            self.start_node(number)
        ports = self.proxies.ports if self.proxies is not None else [node.shard_port for node in self.nodes]
        self.topology.write_text(f"nodes = {json.dumps([f'127.0.0.1:{port}' for port in ports])}\n")
        for door in self.doors:
            door.start()
        self.wait_whole()

    def start_node(self, number: int) -> None:
        node = self.nodes[number]
        node.start()
        if self.proxies is not None:
            self.proxies.target(number, node.shard_port)
        node.wait("ready")

    def wait_whole(self) -> None:
        """Until every front door sees every node."""
        end = time.monotonic() + 120
        while not all(door.nodes_up() == len(self.nodes) for door in self.doors):
            if time.monotonic() > end:
                raise SystemExit(f"nodes are missing: {[door.metrics() for door in self.doors]}")
            time.sleep(0.02)

    def wait_door(self, door: Place) -> None:
        door.wait("ready")

    def stop(self) -> None:
        for place in (*self.doors, *self.nodes):
            with contextlib.suppress(subprocess.TimeoutExpired):
                place.stop()
        if self.proxies is not None:
            self.proxies.close()


@contextlib.contextmanager
def cluster(directory: Path, shards: int, replicas: int, **more: Any) -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory() as logs:
        made = Cluster(directory, shards, replicas, Path(logs), **more)
        try:
            made.start()
            yield made
        finally:
            made.stop()
