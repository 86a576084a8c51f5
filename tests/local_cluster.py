"""A cluster on this machine: real nodes behind proxies that can be told to fail, front doors, load that is checked."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import os
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from forked import Forked
from service import JSON, Corpus, Service, ask, assert_clean

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from fault_proxy import Proxies


def start(*arguments: str, prelude: str = "", **settings: Any) -> Service:
    """Start a command of `vecsvc` that listens, on ports of the system's choice. It may not be ready yet.

    `prelude` is Python that runs before it.
    """
    descriptor, log = tempfile.mkstemp(suffix=".log")
    os.close(descriptor)
    settings = {"port": 0, "admin_port": 0, **settings}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    service = Service(Forked([*arguments, *flags], {2: log}, prelude=prelude), Path(log))
    listening = service.wait_for("listening")
    service.port, service.admin_port = listening["port"], listening["admin_port"]
    return service


def end(service: Service, *, kill: bool = False) -> None:
    """Stop it where it still runs, and look at its log."""
    if service.process.poll() is None:
        service.process.kill() if kill else service.process.terminate()
        service.process.wait(30)
    if not kill:
        assert_clean(service)
    service.log_file.unlink(missing_ok=True)


@dataclasses.dataclass
class Member:
    """A node's place in the cluster: the process there may change, its address for front doors does not."""

    cluster: Cluster
    number: int  # of its proxy
    shards: str
    service: Service | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.cluster.proxies.ports[self.number]}"

    @property
    def running(self) -> Service:
        assert self.service is not None, "it does not run"
        return self.service

    def start(self, **settings: Any) -> None:
        directory = self.cluster.directory
        wanted = {"shard_port": 0, "shards": self.shards, **self.cluster.node_settings, **settings}
        self.service = start("serve", str(directory), **wanted)
        self.cluster.proxies.target(self.number, self.service.wait_for("listening")["shard_port"])

    def wait_ready(self) -> None:
        self.running.wait_for("ready")

    def stop(self) -> None:
        """As Kubernetes does: SIGTERM, and wait."""
        end(self.running)
        self.service = None

    def kill(self) -> None:
        self.running.process.kill()
        self.running.process.wait(30)
        self.running.log_file.unlink()
        self.service = None

    def fail(self, **fault: Any) -> None:
        self.cluster.proxies.set(self.number, **fault)


class Cluster:
    """Nodes, and front doors that know them by a file."""

    def __init__(self, directory: Path, shards: list[str], *, doors: int = 1, **node_settings: Any) -> None:
        """A node for each of `shards`, which says what it opens."""
        self.directory, self.node_settings = directory, node_settings
        self.proxies = Proxies([1] * len(shards))
        self.members = [Member(self, number, which) for number, which in enumerate(shards)]
        self.topology = Path(tempfile.mkdtemp()) / "nodes.toml"
        self.write_topology()
        self.doors: list[Service] = []
        self._n_doors = doors

    def write_topology(self, members: list[Member] | None = None) -> None:
        """Whole or not at all, as Kubernetes writes a mounted file."""
        addresses = [member.address for member in (self.members if members is None else members)]
        new = self.topology.with_suffix(".new")
        new.write_text(f"nodes = {json.dumps(addresses)}\n")
        new.replace(self.topology)

    def of(self, shard: str) -> list[Member]:
        return [member for member in self.members if member.shards == shard]

    def start(self) -> None:
        for member in self.members:
            member.start()
        for _ in range(self._n_doors):
            self.add_door()
        for member in self.members:
            member.wait_ready()
        for door in self.doors:
            door.wait_for("ready")

    def add_door(self, **settings: Any) -> Service:
        wanted = {"discover_s": 0.1, "flip_wait_s": 2.0, "ping_timeout_s": 5.0, "connect_timeout_s": 5.0, **settings}
        door = start("route", f"--config={self.topology}", **wanted)
        self.doors.append(door)
        return door

    @property
    def door(self) -> Service:
        return self.doors[0]

    def heal(self) -> None:
        """Everything runs, and nothing fails."""
        self.proxies.heal()
        self.write_topology()
        for member in self.members:
            if member.service is None or member.service.process.poll() is not None:
                member.start()
        for member in self.members:
            member.wait_ready()
        for door in self.doors:
            wait_until(lambda door=door: nodes(door)["up"] == len(self.members), lambda door=door: nodes(door))

    def close(self) -> None:
        self.proxies.heal()
        for door in self.doors:
            end(door)
        for member in self.members:
            if member.service is not None:
                end(member.service)
        self.proxies.close()
        self.topology.unlink()
        self.topology.parent.rmdir()


@contextlib.contextmanager
def cluster(directory: Path, shards: list[str], **settings: Any) -> Iterator[Cluster]:
    made = Cluster(directory, shards, **settings)
    try:
        made.start()
        yield made
    finally:
        made.close()


def wait_until(
    happens: Callable[[], bool], told: Callable[[], Any] = lambda: "it did not happen", timeout_s: float = 60.0
) -> None:
    end = time.monotonic() + timeout_s
    while not happens():
        assert time.monotonic() < end, told()
        time.sleep(0.01)


def nodes(door: Service) -> dict[str, float]:
    """How many nodes are up, ejected, draining and down in the eyes of a front door."""
    found = door.metrics()
    return {labels[0][1]: value for (name, labels), value in found.items() if name == "vecsvc_nodes"}


# ---------------------------------------------------------------------------------------------------- load


@dataclasses.dataclass(frozen=True)
class Question:
    """A body to POST, and what its answer is checked with: an error's text, or nothing."""

    body: bytes
    wrong: Callable[[Any], str | None]


def questions(corpus: Corpus, n: int = 16, k: int = 5, **more: Any) -> list[Question]:
    """Vectors near rows of the corpus; their answers must be what brute force says."""
    made = []
    for row in range(n):
        vector = corpus.vectors[row * 7 % len(corpus.vectors)] * 1.5 + 0.01 * row
        expected = corpus.nearest(vector, k)
        body = json.dumps({"vector": [float(x) for x in vector], "k": k, **more}).encode()

        def wrong(answer: Any, expected: list[Any] = expected) -> str | None:
            found = [(hit["id"], hit["distance"]) for hit in answer["results"]]
            same = [id for id, _ in found] == [id for id, _ in expected]
            near = all(abs(a[1] - b[1]) < 1e-4 for a, b in zip(found, expected, strict=False))
            coverage = answer["coverage"]
            whole = coverage["shards_ok"] == coverage["shards_total"]
            return None if same and near and whole else f"found {found}, expected {expected}, {coverage}"

        made.append(Question(body, wrong))
    return made


class Load:
    """Clients that ask one question after another until told to stop; every answer is checked."""

    def __init__(
        self,
        doors: list[Service],
        asked: list[Question],
        *,
        clients: int = 3,
        path: str = "/search",
        pause_s: float = 0.0,
    ) -> None:
        self._doors, self._asked, self._path, self._pause_s = doors, asked, path, pause_s
        self.answered = 0
        self.failures: list[str] = []
        self.slowest_s = 0.0
        self.versions: Counter[str] = Counter()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(clients)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def wait(self, answers: int, timeout_s: float = 60.0) -> None:
        """Until so many more were answered."""
        wanted = self.answered + answers
        wait_until(lambda: self.answered >= wanted, lambda: f"{self.answered} of {wanted}: {self.failures}", timeout_s)

    def check(self) -> None:
        assert not self.failures, f"{len(self.failures)} of {self.answered} failed: {self.failures[:5]}"

    def _run(self, number: int) -> None:
        at = number
        connection: http.client.HTTPConnection | None = None
        while not self._stop.is_set():
            at += 1
            question = self._asked[at % len(self._asked)]
            began = time.monotonic()
            try:
                if connection is None:
                    connection = self._connect(number)
                reply = ask(connection, "POST", self._path, question.body, JSON)
                if reply.headers.get("connection") == "close":
                    connection.close()
                    connection = None
                if reply.status != 200:
                    self.failures.append(f"{reply.status} {reply.body[:300]!r}")
                else:
                    answer = json.loads(reply.body)
                    self.versions[answer["index"]["version"]] += 1
                    why = question.wrong(answer)
                    if why is not None:
                        self.failures.append(why)
            except (OSError, http.client.HTTPException) as error:
                self.failures.append(f"{type(error).__name__}: {error}")
                connection = None
            self.slowest_s = max(self.slowest_s, time.monotonic() - began)
            self.answered += 1
            if self._pause_s:
                time.sleep(self._pause_s)
        if connection is not None:
            connection.close()

    def _connect(self, number: int) -> http.client.HTTPConnection:
        """To any front door that lets it in, as a Service of Kubernetes would choose."""
        for door in (self._doors * 2)[number % len(self._doors) :][: len(self._doors)]:
            connection = door.connect()
            with contextlib.suppress(ConnectionRefusedError):
                connection.connect()
                return connection
        raise ConnectionRefusedError("no front door lets anybody in")
