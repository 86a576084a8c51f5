"""Small indexes, built once a session, and a running `vecsvc serve` to ask: what the tests of the service share."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import datetime as dt
import functools
import http.client
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from forked import Forked
from numpy.typing import NDArray
from prometheus_client.parser import text_string_to_metric_families
from tiny_bert import write_tiny_bert

from index_builders.pipeline import build_index
from vecsvc.config import BuildSettings
from vecsvc.distance import exact_distances
from vecsvc.types import Id, Metric

DIM = 8
GRAPH = "hnsw" if importlib.util.find_spec("hnswlib") else "exact"  # hnswlib needs a compiler to be installed
WORDS = ["river", "mountain", "cloud", "water", "fire", "stone", "bread", "music", "house", "tree", "cat"]

JSON = {"Content-Type": "application/json"}
BINARY = {"Content-Type": "application/octet-stream"}
JSON_TYPE = "application/json; charset=utf-8"


# ------------------------------------------------------------------------------------------------- indexes


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Rows and what brute force says about them."""

    ids: list[Id]
    vectors: NDArray[np.float32]  # (n, dim)
    fields: list[dict[str, Any]]  # of each row, in Python's own types
    metric: Metric

    def nearest(
        self, query: Any, k: int, keep: Callable[[dict[str, Any]], bool] | None = None, without: Id | None = None
    ) -> list[tuple[Id, float]]:
        """(id, distance) of the k nearest rows, by (distance, row); fewer where fewer may be returned."""
        distances = exact_distances(np.asarray(query, dtype=np.float32), self.vectors, self.metric)
        rows = [i for i in range(len(self.ids)) if (keep is None or keep(self.fields[i])) and self.ids[i] != without]
        rows.sort(key=lambda i: (distances[i], i))
        return [(self.ids[i], float(distances[i])) for i in rows[:k]]

    def ids_of(self, query: Any, k: int, **which: Any) -> list[Id]:
        return [id for id, _ in self.nearest(query, k, **which)]


def vectors(n: int, seed: int, dim: int = DIM) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((n, dim)).astype(np.float32)


@functools.cache
def corpora() -> dict[str, Corpus]:
    """What the indexes hold, by their names."""
    fields = [
        {
            "day": dt.date(2024, 1, 1) + dt.timedelta(days=i % 90),
            "flag": None if i % 7 == 0 else i % 2 == 0,
            "lang": None if i % 11 == 0 else ("de", "en", "fr", "日本")[i % 4],
            "made": dt.datetime(2024, 1, 31, 12) + dt.timedelta(minutes=i),
            "price": None if i % 13 == 0 else i / 8,
            "seen": dt.datetime(2024, 1, 31, 12, tzinfo=dt.UTC) + dt.timedelta(hours=i),
            "year": 1990 + i % 35,
        }
        for i in range(400)
    ]
    odd = ["../etc/passwd", "a b", 'say "hi"', "naïve", "日本", "x" * 200, "5", "\r\nSet-Cookie: a=b", "\x00", "%2e%2e"]
    words = np.random.default_rng(5)
    texts = [" ".join(words.choice(WORDS, 6)) for _ in range(60)]
    tied = vectors(100, seed=3)
    found = {
        "products": Corpus([*odd, *(f"p-{i}" for i in range(len(odd), 400))], vectors(400, seed=1), fields, "cosine"),
        "numbers": Corpus([-(2**63), 2**63 - 1, *range(2, 300)], vectors(300, seed=2), [{} for _ in range(300)], "ip"),
        # Every vector is there four times, so that nearly every answer has ties, across shards too.
        "sharded": Corpus(
            [f"s-{i}" for i in range(400)], np.tile(tied, (4, 1)), [{"part": i // 100} for i in range(400)], "cosine"
        ),
        "squared": Corpus([f"q-{i}" for i in range(300)], vectors(300, seed=4), [{} for _ in range(300)], "l2"),
        "near": Corpus(list(range(300)), vectors(300, seed=8), [{} for _ in range(300)], "ip"),
        "large": Corpus(list(range(20_000)), vectors(20_000, seed=6, dim=16), [], "l2"),
    }
    from vecsvc.encoders.onnx import open_encoder

    encoder = open_encoder(encoder_folder())
    found["texts"] = Corpus(
        [f"t-{i}" for i in range(60)],
        encoder.encode(texts, "passage"),
        [dict(sorted({**row, "text": text}.items())) for row, text in zip(fields[:60], texts, strict=True)],
        "cosine",
    )
    encoder.close()
    return found


@functools.cache
def work_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="vecsvc-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def encoder_folder() -> Path:
    return write_tiny_bert(work_folder() / "encoder" / "tiny", dim=DIM)


@functools.cache
def index(name: str) -> Path:
    """The folder of one of the `corpora`, built on the first call; all lie in one --out folder."""
    corpus = corpora()[name]
    options: dict[str, Any] = {"kind": GRAPH, "metric": corpus.metric}
    if corpus.fields:
        options["fields"] = ",".join(corpus.fields[0])
    if name in ("numbers", "large"):
        options["kind"] = "exact"
    if name == "sharded":
        options["shards"] = 3
    if name == "near":
        options |= {"shards": 4, "partition": "cluster", "border_share": 0.3}
    if name == "texts":
        options["encoder"] = str(encoder_folder())
    return build(corpus, work_folder() / "all", name, **options)


def build(corpus: Corpus, out: Path, name: str, version: str = "v1", **options: Any) -> Path:
    """Build an index of a corpus and publish it. Returns its folder."""
    columns: dict[str, Any] = {"id": corpus.ids}
    if options.get("encoder") is None:
        columns["vector"] = pa.FixedSizeListArray.from_arrays(corpus.vectors.reshape(-1), corpus.vectors.shape[1])
    if corpus.fields:
        columns |= {name: [row[name] for row in corpus.fields] for name in corpus.fields[0]}
    source = work_folder() / f"{out.name}-{name}-{version}.parquet"
    pq.write_table(pa.table(columns), source)
    settings = BuildSettings(out=str(out), name=name, version=version, certificate_queries=0, threads=1, **options)
    with open(os.devnull, "w") as silent:  # noqa: PTH123
        build_index(str(source), settings, stream=silent)
    source.unlink()
    return out / name


# ------------------------------------------------------------------------------------------------- service


@dataclasses.dataclass(frozen=True)
class Reply:
    status: int
    headers: dict[str, str]  # by their names in small letters
    body: bytes

    def json(self) -> Any:
        assert self.headers["content-type"] == JSON_TYPE, self
        return json.loads(self.body)

    @property
    def results(self) -> Any:
        assert self.status == 200, self
        return self.json()["results"]

    @property
    def message(self) -> str:
        """The message of an error, whose shape is checked on the way."""
        assert self.status >= 400, self
        document = self.json()
        assert list(document) == ["error"], self
        if self.status in (429, 503):
            milliseconds = document["error"].pop("retry_after_ms")
            assert 0 < milliseconds <= 1000 * int(self.headers["retry-after"]), self
        assert list(document["error"]) == ["code", "message"], self
        assert all(isinstance(value, str) and value for value in document["error"].values()), self
        message: str = document["error"]["message"]
        return message


@dataclasses.dataclass
class Service:
    process: Forked
    log_file: Path
    port: int = 0
    admin_port: int = 0
    expected: list[str] = dataclasses.field(default_factory=list)  # log messages of errors that are no surprise

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        *,
        admin: bool = False,
    ) -> Reply:
        """One request over a connection of its own."""
        with contextlib.closing(self.connect(admin=admin)) as connection:
            return ask(connection, method, path, body, headers)

    def connect(self, *, admin: bool = False, timeout_s: float = 30.0) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.admin_port if admin else self.port, timeout=timeout_s)

    def get(self, path: str, **headers: str) -> Reply:
        return self.ask("GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()})

    def post(self, path: str, question: Any, **headers: str) -> Reply:
        """POST JSON; bytes are taken for JSON already."""
        body = question if isinstance(question, bytes) else json.dumps(question).encode()
        return self.ask("POST", path, body, JSON | {name.replace("_", "-"): value for name, value in headers.items()})

    def search(self, index: str | None = None, /, **question: Any) -> Any:
        """The answer to a question that must be answered."""
        reply = self.post(f"/indexes/{index}/search" if index else "/search", question)
        assert reply.status == 200, reply
        return reply.json()

    def socket(self, timeout_s: float = 10.0, receive_bytes: int | None = None) -> socket.socket:
        made = socket.socket()
        made.settimeout(timeout_s)
        if receive_bytes is not None:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        made.connect(("127.0.0.1", self.port))
        return made

    def raw(self, *parts: bytes, shut: bool = False, timeout_s: float = 10.0) -> bytes:
        """Send bytes as they are and read until the service closes; b"" where it closes without a word."""
        with self.socket(timeout_s) as sock:
            with contextlib.suppress(ConnectionError):
                for number, part in enumerate(parts):
                    if number:
                        time.sleep(0.01)  # so that it arrives by itself
                    sock.sendall(part)
                if shut:
                    sock.shutdown(socket.SHUT_WR)
            return read_all(sock)

    def log(self) -> list[dict[str, Any]]:
        """The log's lines; each must be JSON."""
        return [json.loads(line) for line in self.log_file.read_text().split("\n")[:-1]]

    def metrics(self) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        """(name, sorted labels) -> value of every sample."""
        text = self.ask("GET", "/metrics", admin=True).body.decode()
        samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
        return {(sample.name, tuple(sorted(sample.labels.items()))): sample.value for sample in samples}

    def metric(self, name: str, **labels: str) -> float:
        return self.metrics().get((name, tuple(sorted(labels.items()))), 0.0)

    def rss_bytes(self) -> int:
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def open_files(self) -> int:
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def stop(self, timeout_s: float = 30.0) -> int:
        """SIGTERM; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout_s)

    def wait_for(self, message: str, timeout_s: float = 60.0) -> dict[str, Any]:
        """The first log line with that message."""
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            for line in self.log_file.read_text().splitlines(keepends=True):
                if line.endswith("\n") and f'"message": "{message}"' in line:
                    found: dict[str, Any] = json.loads(line)
                    return found
            if self.process.poll() is not None:
                break
            time.sleep(0.005)
        raise AssertionError(f"no {message!r} in the log:\n{self.log_file.read_text()}")


def ask(
    connection: http.client.HTTPConnection,
    method: str,
    path: str,
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
) -> Reply:
    connection.request(method, path, body, dict(headers or {}))
    response = connection.getresponse()
    return Reply(response.status, {name.lower(): value for name, value in response.getheaders()}, response.read())


def read_all(sock: socket.socket) -> bytes:
    found = b""
    with contextlib.suppress(ConnectionError):
        while part := sock.recv(1 << 16):
            found += part
    return found


def command(directory: Path, prelude: str = "", /, **settings: Any) -> list[str]:
    """`vecsvc serve` as a command; `prelude` is Python that runs before it, to make something slow or broken."""
    program = f"{prelude}\nfrom vecsvc.cli import main; main()"
    return [sys.executable, "-c", program, "serve", str(directory), *flags(settings)]


def flags(settings: Mapping[str, Any]) -> list[str]:
    return [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]


@contextlib.contextmanager
def started(directory: Path, prelude: str = "", /, **settings: Any) -> Iterator[Service]:
    """A service that listens, on ports of the system's choice, and may be loading still."""
    settings = {"port": 0, "admin_port": 0, **settings}
    with tempfile.NamedTemporaryFile(suffix=".log") as log:
        process = Forked(["serve", str(directory), *flags(settings)], {2: log.name}, prelude=prelude)
        service = Service(process, Path(log.name))
        try:
            listening = service.wait_for("listening")
            service.port, service.admin_port = listening["port"], listening["admin_port"]
            yield service
        finally:
            if process.poll() is None:
                process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                raise


@contextlib.contextmanager
def running(directory: Path, prelude: str = "", /, **settings: Any) -> Iterator[Service]:
    """A service that is ready. When the block ends, its log must hold JSON only, and no traceback."""
    with started(directory, prelude, **settings) as service:
        service.wait_for("ready")
        yield service
        assert_clean(service)
        service.stop()
        assert_clean(service)


# Says in the log which messages went the short way.
TOLD = """
import logging
from vecsvc.direct import Direct
answer = Direct.answer
def told(self, *message):
    made = answer(self, *message)
    logging.getLogger("way").info("short" if made is not None else "long")
    return made
Direct.answer = told
"""


def ways(running: Service) -> list[str]:
    return [line["message"] for line in running.log() if line["logger"] == "way"]


def plain(reply: Reply) -> tuple[int, dict[str, str], Any]:
    """A reply without what no two replies share."""
    headers = {
        name: value for name, value in reply.headers.items() if name not in ("date", "x-request-id", "content-length")
    }
    body = json.loads(reply.body)
    body.pop("took_ms", None)
    for shard in body.get("explain", ()):
        shard.pop("took_ms")
    return reply.status, headers, body


def at_once(running: Service, path: str, body: bytes, headers: dict[str, str]) -> Reply:
    """The reply to a question whose head and body are sent in one piece, as http.client does not."""
    fields = {"Host": "x", "Content-Length": str(len(body)), **headers}
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    with running.socket() as sock:
        sock.sendall(f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + body)
        response = http.client.HTTPResponse(sock)
        response.begin()
        received = {name.lower(): value for name, value in response.getheaders()}
        return Reply(response.status, received, response.read())


def post(question: bytes, path: str = "/search") -> bytes:
    """A question in JSON as one message."""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(question)}\r\n\r\n"
    )
    return head.encode() + question


def answers(sock: socket.socket, n: int) -> list[Any]:
    """The bodies of n answers that come one behind the other."""
    received, found = b"", []
    while len(found) < n:
        head, end, rest = received.partition(b"\r\n\r\n")
        length = int(re.search(rb"(?i)content-length: (\d+)", head)[1]) if end else 0  # type: ignore[index]
        if not end or len(rest) < length:
            part = sock.recv(1 << 16)
            assert part, received
            received += part
            continue
        assert head.startswith(b"HTTP/1.1 200"), head
        found.append(json.loads(rest[:length]))
        received = rest[length:]
    assert not received
    return found


def assert_clean(service: Service) -> None:
    """Nothing that was done to the service was a surprise to it."""
    surprises = [line for line in service.log() if "trace" in line or line["level"] in ("error", "critical")]
    bad = [line for line in surprises if line["message"] not in service.expected]
    assert not bad, bad
