"""What a user of the running service feels of its encoder: beside a bulk job, and after 100,000 texts.

    python benchmarks/encoder_serving.py [--encoder DIR] [--data DIR] [--texts 100000] [--plot memory.png]

lanes: latency of text queries to /search, one client, on an idle service and while two connections keep it busy with
lists of 256 texts to /embed. The vector cache is off.
memory: so many texts of random lengths through /embed, and the service's resident memory on the way.
"""

from __future__ import annotations

import argparse
import http.client
import json
import multiprocessing
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from common import Server, running, save, table, vecsvc, work_folder

from vecsvc.encoders import DEFAULT

LIST: Final = 256  # texts of one bulk request
CONNECTIONS: Final = 2
DOCUMENTS: Final = 2000
_WORDS: Final = [
    "vector",
    "search",
    "index",
    "query",
    "text",
    "file",
    "folder",
    "list",
    "copy",
    "move",
    "delete",
    "print",
    "number",
    "time",
    "date",
    "parse",
    "read",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default=DEFAULT, help="a folder; the one that comes with the package without")
    parser.add_argument("--data", type=Path, help="folder with peps.parquet and tldr_queries.parquet; made-up without")
    parser.add_argument("--queries", type=int, default=2000)
    parser.add_argument("--texts", type=int, default=100_000)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--serve", default="", help="more flags of vecsvc serve, separated by spaces")
    options = parser.parse_args()
    passages, queries = _texts(options.data)
    with work_folder(None) as folder:
        corpus = pa.table({"id": list(range(DOCUMENTS)), "text": passages[:DOCUMENTS]})
        pq.write_table(corpus, folder / "corpus.parquet")
        command = vecsvc("build-index", str(folder / "corpus.parquet"), "--out", str(folder / "out"))
        subprocess.run([*command, "--encoder", str(options.encoder)], check=True, capture_output=True)
        serve = vecsvc("serve", str(folder / "out"), "--port", "0", "--admin-port", "0", "--encoder-cache", "0")
        serve += options.serve.split()
        with running(serve) as server:
            figures = {"lanes": lanes(server, queries[: options.queries], passages)}
        with running(serve) as server:
            figures["memory"] = memory(server, options.texts)
    if options.plot:
        plot(figures["memory"], options.plot)
    save("encoder_serving", figures, libraries=("onnxruntime", "tokenizers"))


def _texts(data: Path | None) -> tuple[list[str], list[str]]:
    """Passages and queries."""
    rng = np.random.default_rng(7)
    if data is None:
        made = [" ".join(rng.choice(_WORDS, n)) for n in np.exp(rng.normal(3.0, 0.8, 20_000)).astype(int) + 2]
        return made, [" ".join(text.split()[:8]) for text in made]
    passages = pq.read_table(data / "peps.parquet")["text"].to_pylist()
    queries = pq.read_table(data / "tldr_queries.parquet")["query"].to_pylist()
    return [passages[i] for i in rng.permutation(len(passages))], [queries[i] for i in rng.permutation(len(queries))]


# ---------------------------------------------------------------------------------------------------- lanes


def lanes(server: Server, queries: list[str], passages: list[str]) -> list[dict[str, Any]]:
    """Milliseconds of text queries, idle and beside a bulk job, in turn: idle, busy, idle, busy."""
    spent: dict[str, list[float]] = {"idle": [], "beside a bulk job": []}
    done = dict.fromkeys(spent, 0.0)
    seconds = dict.fromkeys(spent, 0.0)
    ask(server.port, queries[:200])
    quarter = len(queries) // 2
    for turn in range(2):
        part = queries[turn * quarter : (turn + 1) * quarter]
        for name in spent:
            stop = multiprocessing.Event()
            jobs = [
                multiprocessing.Process(target=keep_busy, args=(server.port, passages, stop), daemon=True)
                for _ in range(CONNECTIONS if name != "idle" else 0)
            ]
            for job in jobs:
                job.start()
            if jobs:
                time.sleep(2.0)  # until the queue is full
            before, started = bulk_tokens(server), time.perf_counter()
            spent[name] += ask(server.port, part)
            seconds[name] += time.perf_counter() - started
            done[name] += bulk_tokens(server) - before
            stop.set()
            for job in jobs:
                job.join(timeout=60)
    idle = float(np.percentile(spent["idle"], 99))
    rows = [
        {
            "service": name,
            "p50 ms": float(np.percentile(times, 50)) * 1e3,
            "p99 ms": float(np.percentile(times, 99)) * 1e3,
            "p99, of idle": float(np.percentile(times, 99)) / idle,
            "bulk tokens/s": done[name] / seconds[name],
        }
        for name, times in spent.items()
    ]
    table(f"Text queries, one client, {len(spent['idle']):,} each", list(rows[0]), [list(r.values()) for r in rows])
    return rows


def ask(port: int, queries: list[str]) -> list[float]:
    """Seconds of each text query over one connection."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    bodies = [json.dumps({"text": query, "k": 10}).encode() for query in queries]
    spent = []
    for body in bodies:
        before = time.perf_counter()
        post(connection, "/search", body)
        spent.append(time.perf_counter() - before)
    connection.close()
    return spent


def bulk_tokens(server: Server) -> float:
    """Tokens that the service has encoded in its bulk lane so far, by its own count."""
    with urllib.request.urlopen(f"http://127.0.0.1:{server.admin_port}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return sum(
        float(n.split()[-1]) for n in lines if n.startswith("vecsvc_encoder_tokens_total") and 'lane="bulk"' in n
    )


def keep_busy(port: int, passages: list[str], stop: Any) -> None:
    """One list after the other, until told to stop."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    start = 0
    while not stop.is_set():
        part = [passages[(start + i) % len(passages)] for i in range(LIST)]
        start += LIST
        post(connection, "/embed", json.dumps({"inputs": part, "truncate": True}).encode())


def post(connection: http.client.HTTPConnection, path: str, body: bytes) -> bytes:
    connection.request("POST", path, body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    data = answer.read()
    if answer.status != 200:
        raise SystemExit(f"{path}: {answer.status} {data[:300]!r}")
    return data


# --------------------------------------------------------------------------------------------------- memory


def memory(server: Server, texts: int) -> list[dict[str, Any]]:
    """Resident memory after each 1/50 of the texts, whose lengths are spread from one word to beyond the limit."""
    rng = np.random.default_rng(7)
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    rows = [{"texts": 0, "resident MB": resident_mb(server)}]
    batch = 50
    for done in range(batch, texts + 1, batch):
        lengths = np.clip(np.exp(rng.normal(2.5, 1.2, batch)).astype(int), 1, 400)
        part = [" ".join(rng.choice(_WORDS, n)) for n in lengths]
        post(connection, "/embed", json.dumps({"inputs": part, "truncate": True}).encode())
        if done % max(batch, texts // 50 // batch * batch) == 0:
            rows.append({"texts": done, "resident MB": resident_mb(server)})
    connection.close()
    warm = rows[len(rows) // 5]["resident MB"]
    table(
        f"Resident memory over {texts:,} texts of random lengths",
        ["texts", "resident MB", "since a fifth"],
        [[f"{r['texts']:,}", r["resident MB"], r["resident MB"] - warm] for r in rows[:: max(1, len(rows) // 10)]],
    )
    return rows


def resident_mb(server: Server) -> float:
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) / 1e3


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([row["texts"] for row in rows], [row["resident MB"] for row in rows], color="#1f5fa8")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("texts encoded")
    axes.set_ylabel("resident memory, MB")
    axes.grid(alpha=0.3)
    figure.savefig(path)


if __name__ == "__main__":
    main()
