"""What a query costs over HTTP: processor time and latency beside a bare application and `Index.search` itself."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from common import K, Server, Task, load_task, parser, running, save, table, vecsvc, work_folder, write_corpus

from vecsvc import indexes
from vecsvc.catalog import Served
from vecsvc.config import ServeSettings
from vecsvc.storage import IndexFolder

ROUNDS = 7
QUERIES = 2000  # a round
TARGET_RECALL = 0.95


def request(vector: np.ndarray, ef_search: int | None) -> bytes:
    question: dict[str, object] = {"vector": [float(x) for x in vector], "k": K}
    if ef_search is not None:
        question["params"] = {"ef_search": ef_search}
    body = json.dumps(question).encode()
    head = [
        "POST /search HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
    ]
    return "\r\n".join([*head, "", ""]).encode() + body


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


def build(task: Task, work: Path) -> IndexFolder:
    folder = IndexFolder(work / f"serving-{task.name.split()[0]}")
    if folder.current() is None:
        corpus = write_corpus(task.base, work / "serving.parquet")
        build = ["build-index", str(corpus), "--out", str(work), "--name", folder.name, "--kind", "hnsw"]
        subprocess.run(vecsvc(*build, "--metric", "ip"), check=True)
    return folder


def choose_ef(task: Task, index: indexes.Index) -> tuple[int, float]:
    """The smallest breadth that reaches the target on these queries."""
    for ef_search in (16, 24, 32, 40, 48, 64, 80, 96, 128, 192, 256):
        recall = task.recall(index.search(task.queries, K, indexes.search_params("hnsw", ef_search=ef_search)).labels)
        if recall >= TARGET_RECALL:
            return ef_search, recall
    sys.exit("no ef_search reaches the recall")


def search_seconds(index: indexes.Index, queries: np.ndarray, ef_search: int) -> list[float]:
    params = indexes.search_params("hnsw", ef_search=ef_search)
    times = []
    for query in queries:
        started = time.perf_counter()
        index.search(query[None], K, params)
        times.append(time.perf_counter() - started)
    return times


def main() -> None:
    arguments = parser("Cost of one /search over HTTP").parse_args()
    task = load_task(arguments.data)
    with work_folder(arguments.work) as work:
        folder = build(task, work)
        served = Served(folder, str(folder.current()), ServeSettings())
        index = served.shards[0].index
        ef_search, recall = choose_ef(task, index)
        print(f"task {task.name}: {task.base.shape}, hnsw, ef_search {ef_search}, recall@{K} {recall:.4f}")
        requests = [request(query, ef_search) for query in task.queries]
        expected = index.search(task.queries, K, indexes.search_params("hnsw", ef_search=ef_search)).labels
        with running(vecsvc("serve", str(folder.path), "--port", "0", "--admin-port", "0")) as ours:
            connection = Connection(ours.port)
            answers = [json.loads(connection.ask(data)) for data in requests]
            ids = [[hit["id"] for hit in answer["results"]] for answer in answers]
            same = sum(got == [f"row-{label}" for label in want] for got, want in zip(ids, expected, strict=True))
            size = len(connection.ask(requests[0]))
            plain = [sys.executable, str(Path(__file__).parent / "reference_app.py"), "--size", str(size)]
            searching = [*plain, "--index", str(folder.path), "--ef-search", str(ef_search)]
            with running(plain) as bare, running(searching) as least:
                servers = {
                    "vecsvc": (ours, connection),
                    "reference": (bare, Connection(bare.port)),
                    "least": (least, Connection(least.port)),
                }
                figures = measure(task, index, ef_search, requests, servers)
    report(task, recall, ef_search, same, figures)


def measure(
    task: Task,
    index: indexes.Index,
    ef_search: int,
    requests: list[bytes],
    servers: dict[str, tuple[Server, Connection]],
) -> dict[str, list[float]]:
    """Figures of each round in microseconds; servers and the index take turns, so that a slow spell hits all."""
    figures: dict[str, list[float]] = {}
    for round_number in range(ROUNDS + 1):  # the first is thrown away
        chosen = [requests[i % len(requests)] for i in range(QUERIES)]
        for name, (server, connection) in servers.items():
            times, before = [], server.cpu_s()
            for data in chosen:
                started = time.perf_counter()
                connection.ask(data)
                times.append(time.perf_counter() - started)
            if round_number:
                figures.setdefault(f"{name} cpu", []).append((server.cpu_s() - before) / len(chosen) * 1e6)
                figures.setdefault(f"{name} p50", []).append(float(np.median(times)) * 1e6)
                figures.setdefault(f"{name} p99", []).append(float(np.percentile(times, 99)) * 1e6)
        times = search_seconds(index, task.queries, ef_search)
        if round_number:
            figures.setdefault("search mean", []).append(float(np.mean(times)) * 1e6)
            figures.setdefault("search p50", []).append(float(np.median(times)) * 1e6)
    return figures


def report(task: Task, recall: float, ef_search: int, same: int, figures: dict[str, list[float]]) -> None:
    middle = {name: float(np.median(values)) for name, values in figures.items()}
    cpu_target = middle["reference cpu"] + 1.15 * middle["search mean"] + 30
    p50_target = middle["reference p50"] + 1.3 * middle["search p50"] + 60
    table(
        "µs a query, medians of alternating rounds, one client on a raw socket",
        ["", "server CPU", "p50", "p99"],
        [
            ["vecsvc", middle["vecsvc cpu"], middle["vecsvc p50"], middle["vecsvc p99"]],
            ["reference application", middle["reference cpu"], middle["reference p50"], middle["reference p99"]],
            ["the same with Index.search", middle["least cpu"], middle["least p50"], middle["least p99"]],
            ["Index.search in a loop", middle["search mean"], middle["search p50"], "-"],
            ["target", cpu_target, p50_target, "-"],
        ],
    )
    print(f"\nids equal to those of Index.search in process: {same} of {len(task.queries)} answers")
    for name, value, target in (
        ("server CPU", middle["vecsvc cpu"], cpu_target),
        ("p50", middle["vecsvc p50"], p50_target),
    ):
        print(f"{name}: {value:.1f} µs, target {target:.1f} µs: {'met' if value <= target else 'MISSED'}")
    save("serving", {"task": task.name, "ef_search": ef_search, "recall": recall, "same_ids": same, "us": figures})


if __name__ == "__main__":
    main()
