"""What a query costs over HTTP: processor time and latency beside a bare application and `Index.search` itself."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from common import K, Server, Task, load_task, parser, running, save, table, vecsvc, work_folder, write_corpus

from vecsvc import indexes
from vecsvc.catalog import Served
from vecsvc.config import ServeSettings
from vecsvc.storage import IndexFolder

ROUNDS = 7
QUERIES = 2000  # a round
BATCH = 100  # vectors of one batch
BATCHES = 40  # a round
TARGET_RECALL = {"nng": 0.97, "hnsw": 0.95}
BODIES = ("json", "raw")
WORKERS = (1, 2)

# What is promised of one query: the reference application's, so many times the search's, and some microseconds.
CPU_TIMES, CPU_MORE_US = 1.15, 20.0
P50_TIMES, P50_MORE_US = 1.3, 40.0
BATCH_TIMES = 1.3  # of a batch as Arrow: so many times the search of the batch


@dataclass(frozen=True)
class Chosen:
    """The index that is asked, and at which breadth."""

    folder: IndexFolder
    index: indexes.Index
    ef_search: int
    recall: float

    def search(self, queries: np.ndarray) -> np.ndarray:
        params = indexes.search_params(self.index.spec.kind, ef_search=self.ef_search)
        return self.index.search(queries, K, params, num_threads=1).labels


def request(path: str, body: bytes, content_type: str, *more: str) -> bytes:
    head = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Type: {content_type}", f"Content-Length: {len(body)}"]
    return "\r\n".join([*head, *more, "", ""]).encode() + body


def question(vector: np.ndarray, body: str, ef_search: int) -> bytes:
    if body == "raw":
        return request(f"/search?k={K}&ef_search={ef_search}", vector.tobytes(), "application/octet-stream")
    asked = {"vector": [float(x) for x in vector], "k": K, "params": {"ef_search": ef_search}}
    return request("/search", json.dumps(asked).encode(), "application/json")


class Connection:
    """A raw keep-alive socket: the client costs next to nothing."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def ask(self, data: bytes) -> bytes:
        self._socket.sendall(data)
        received = self._socket.recv(65_536)
        head, _, body = received.partition(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        while len(body) < length:
            body += self._socket.recv(65_536)
        if not head.startswith(b"HTTP/1.1 200"):
            sys.exit(f"unexpected answer: {received[:400]!r}")
        return body


def build(task: Task, kind: str, work: Path) -> IndexFolder:
    folder = IndexFolder(work / f"serving-{kind}-{task.name.split()[0]}")
    if folder.current() is None:
        corpus = write_corpus(task.base, work / "serving.parquet")
        command = ["build-index", str(corpus), "--out", str(work), "--name", folder.name, "--kind", kind]
        subprocess.run(vecsvc(*command, "--metric", "ip"), check=True)
    return folder


def choose(task: Task, folder: IndexFolder) -> Chosen:
    """The smallest breadth that reaches the target on these queries."""
    index = Served(folder, str(folder.current()), ServeSettings()).shards[0].index
    for ef_search in (16, 24, 32, 40, 48, 64, 80, 96, 128, 192, 256):
        chosen = Chosen(folder, index, ef_search, 0.0)
        recall = task.recall(chosen.search(task.queries))
        if recall >= TARGET_RECALL[index.spec.kind]:
            return Chosen(folder, index, ef_search, recall)
    sys.exit("no ef_search reaches the recall")


def search_seconds(chosen: Chosen, queries: np.ndarray) -> list[float]:
    """Of `Index.search` with one query at a time."""
    params = indexes.search_params(chosen.index.spec.kind, ef_search=chosen.ef_search)
    times = []
    for query in queries:
        started = time.perf_counter()
        chosen.index.search(query[None], K, params)
        times.append(time.perf_counter() - started)
    return times


def single(task: Task, chosen: Chosen, ours: Server, body: str) -> tuple[dict[str, list[float]], int]:
    """Figures of each round in microseconds, and how many answers name what `Index.search` finds.

    Servers and the index take turns, so that a slow spell hits all.
    """
    asked = [question(query, body, chosen.ef_search) for query in task.queries]
    connection = Connection(ours.port)
    found = [[hit["id"] for hit in json.loads(connection.ask(data))["results"]] for data in asked]
    same = sum(
        got == [f"row-{label}" for label in want] for got, want in zip(found, chosen.search(task.queries), strict=True)
    )
    size = str(len(connection.ask(asked[0])))
    plain = [sys.executable, str(Path(__file__).parent / "reference_app.py"), "--size", size, "--body", body]
    searching = [*plain, "--index", str(chosen.folder.path), "--ef-search", str(chosen.ef_search)]
    figures: dict[str, list[float]] = {}
    with running(plain) as bare, running(searching) as least:
        servers = {
            "vecsvc": (ours, connection),
            "reference": (bare, Connection(bare.port)),
            "least": (least, Connection(least.port)),
        }
        for round_number in range(ROUNDS + 1):  # the first is thrown away
            for name, (server, kept) in servers.items():
                times, before = [], server.cpu_s()
                for number in range(QUERIES):
                    started = time.perf_counter()
                    kept.ask(asked[number % len(asked)])
                    times.append(time.perf_counter() - started)
                if round_number:
                    figures.setdefault(f"{name} cpu", []).append((server.cpu_s() - before) / QUERIES * 1e6)
                    figures.setdefault(f"{name} p50", []).append(float(np.median(times)) * 1e6)
                    figures.setdefault(f"{name} p99", []).append(float(np.percentile(times, 99)) * 1e6)
            times = search_seconds(chosen, task.queries)
            if round_number:
                figures.setdefault("search mean", []).append(float(np.mean(times)) * 1e6)
                figures.setdefault("search p50", []).append(float(np.median(times)) * 1e6)
    return figures, same


def report(body: str, workers: int, figures: dict[str, list[float]], same: int, queries: int) -> None:
    middle = {name: float(np.median(values)) for name, values in figures.items()}
    cpu_target = middle["reference cpu"] + CPU_TIMES * middle["search mean"] + CPU_MORE_US
    p50_target = middle["reference p50"] + P50_TIMES * middle["search p50"] + P50_MORE_US
    table(
        f"{body}, {workers} worker{'s' if workers > 1 else ''}: µs a query, medians of alternating rounds, one client "
        "on a raw socket",
        ["", "server CPU", "p50", "p99"],
        [
            ["vecsvc", middle["vecsvc cpu"], middle["vecsvc p50"], middle["vecsvc p99"]],
            ["reference application", middle["reference cpu"], middle["reference p50"], middle["reference p99"]],
            ["the same with Index.search", middle["least cpu"], middle["least p50"], middle["least p99"]],
            ["Index.search in a loop", middle["search mean"], middle["search p50"], "-"],
            ["target", cpu_target, p50_target, "-"],
        ],
    )
    print(f"ids equal to those of Index.search in process: {same} of {queries} answers")
    verdict("server CPU", middle["vecsvc cpu"], cpu_target)
    verdict("p50", middle["vecsvc p50"], p50_target)


def verdict(what: str, value: float, target: float) -> None:
    print(f"{what}: {value:,.1f} µs, target {target:,.1f} µs: {'met' if value <= target else 'MISSED'}")


def batches(task: Task, chosen: Chosen, ours: Server) -> dict[str, list[float]]:
    """A batch of raw vectors answered as Arrow, and the search of the same batch, in microseconds."""
    starts = range(0, len(task.queries) - BATCH + 1, BATCH)
    rows = [np.ascontiguousarray(task.queries[start : start + BATCH]) for start in starts]
    path = f"/search/batch?k={K}&ef_search={chosen.ef_search}"
    accept = "Accept: application/vnd.apache.arrow.stream"
    asked = [request(path, batch.tobytes(), "application/octet-stream", accept) for batch in rows]
    connection = Connection(ours.port)
    first = pa.ipc.open_stream(connection.ask(asked[0])).read_all()
    if first["id"].to_pylist() != [f"row-{label}" for label in chosen.search(rows[0]).reshape(-1)]:
        sys.exit("the batch does not hold what Index.search finds")
    figures: dict[str, list[float]] = {}
    for round_number in range(ROUNDS + 1):
        times, alone, before = [], [], ours.cpu_s()
        for number in range(BATCHES):
            started = time.perf_counter()
            connection.ask(asked[number % len(asked)])
            times.append(time.perf_counter() - started)
        cpu = ours.cpu_s() - before
        for number in range(BATCHES):
            started = time.perf_counter()
            chosen.search(rows[number % len(rows)])
            alone.append(time.perf_counter() - started)
        if round_number:
            figures.setdefault("batch p50", []).append(float(np.median(times)) * 1e6)
            figures.setdefault("batch cpu", []).append(cpu / BATCHES * 1e6)
            figures.setdefault("search p50", []).append(float(np.median(alone)) * 1e6)
    return figures


def report_batches(figures: dict[str, list[float]]) -> None:
    middle = {name: float(np.median(values)) for name, values in figures.items()}
    table(
        f"{BATCH} raw vectors answered as Arrow, one search thread: µs a batch",
        ["", "server CPU", "p50"],
        [
            ["vecsvc", middle["batch cpu"], middle["batch p50"]],
            ["Index.search of the batch, one thread", "-", middle["search p50"]],
        ],
    )
    verdict("batch", middle["batch p50"], BATCH_TIMES * middle["search p50"])


def main() -> None:
    arguments = parser("Cost of one /search over HTTP")
    arguments.add_argument("--kind", choices=tuple(TARGET_RECALL), default="nng", help="kind of index")
    given = arguments.parse_args()
    task = load_task(given.data)
    figures: dict[str, dict[str, list[float]]] = {}
    with work_folder(given.work) as work:
        chosen = choose(task, build(task, given.kind, work))
        print(
            f"task {task.name}: {task.base.shape}, {given.kind}, ef_search {chosen.ef_search}, "
            f"recall@{K} {chosen.recall:.4f}"
        )
        serve = ["serve", str(chosen.folder.path), "--port", "0", "--admin-port", "0"]
        for workers in WORKERS:
            with running(vecsvc(*serve, "--workers", str(workers))) as ours:
                for body in BODIES:
                    figures[f"{body}, {workers}"], same = single(task, chosen, ours, body)
                    report(body, workers, figures[f"{body}, {workers}"], same, len(task.queries))
        with running(vecsvc(*serve, "--search-threads", "1")) as ours:
            figures["batch"] = batches(task, chosen, ours)
            report_batches(figures["batch"])
    facts = {"task": task.name, "kind": given.kind, "ef_search": chosen.ef_search, "recall": chosen.recall}
    save("serving" if given.kind == "nng" else f"serving-{given.kind}", {**facts, "us": figures})


if __name__ == "__main__":
    main()
