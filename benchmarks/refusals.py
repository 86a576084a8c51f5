"""What it costs the server to say no: processor time of each kind of refusal, and of the probe that says yes.

    python benchmarks/refusals.py [--refusals 2000] [--dim 384]

One client asks one connection after the other; the places are taken by a question and a batch that are held up. The
difference to /livez is what a refusal costs beyond HTTP itself.
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from common import Server, running, save, table, vecsvc, work_folder

from index_builders.pipeline import build_index
from vecsvc.access import added, new_key
from vecsvc.config import BuildSettings

BATCH: Final = 50
ROUNDS: Final = 5
ROWS: Final = 2000
HOLD_MS: Final = 600_000

# Searches wait while the file is there.
GATE: Final = """
import time
from pathlib import Path
from vecsvc.shard import Shard
search = Shard.search
def gated(*arguments, **named):
    while Path({gate!r}).exists():
        time.sleep(0.01)
    return search(*arguments, **named)
Shard.search = gated
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--refusals", type=int, default=2000, help="of each kind, in each round")
    parser.add_argument("--dim", type=int, default=384)
    options = parser.parse_args()
    with work_folder(None) as folder:
        figures = measure(folder, options.refusals, options.dim)
    rows = [[name, f"{middle:.1f}", f"{middle - figures['200 /livez']:+.1f}"] for name, middle in figures.items()]
    table("processor time of the server, µs", ["answer", "each", "beyond /livez"], rows)
    save("refusals", {"cpu_us": figures, "refusals": options.refusals, "dim": options.dim, "rounds": ROUNDS})


def measure(folder: Path, n: int, dim: int) -> dict[str, float]:
    """Median over the rounds of the microseconds that each kind of answer takes."""
    vectors = np.random.default_rng(7).standard_normal((ROWS, dim)).astype(np.float32)
    rows = pa.FixedSizeListArray.from_arrays(vectors.reshape(-1), dim)
    pq.write_table(pa.table({"id": range(ROWS), "vector": rows}), folder / "rows.parquet")
    settings = BuildSettings(out=str(folder / "out"), kind="exact", certificate_queries=0)
    build_index(str(folder / "rows.parquet"), settings, stream=sys.stderr)
    keys = {name: new_key() for name in ("team", "prometheus", "slow")}
    data = added(b"", "team", keys["team"], scopes=["read"])
    data = added(data, "prometheus", keys["prometheus"], scopes=["metrics"])
    (folder / "keys.toml").write_bytes(added(data, "slow", keys["slow"], scopes=["read"], rate_per_s=0.01))
    (folder / "keys.toml").chmod(0o600)
    gate = folder / "gate"
    one, many = {"vector": vectors[0].tolist()}, {"vectors": vectors[:BATCH].tolist()}
    team = {"X-API-Key": keys["team"]}
    kinds = {
        "200 /livez": (200, request("GET", "/livez")),
        "401 no key": (401, request("POST", "/search", json.dumps(one).encode())),
        "401 wrong key": (401, request("POST", "/search", json.dumps(one).encode(), {"X-API-Key": new_key()})),
        "403 question": (403, request("POST", "/search", json.dumps(one).encode(), {"X-API-Key": keys["prometheus"]})),
        "429 rate": (429, request("GET", "/indexes", b"", {"X-API-Key": keys["slow"]})),
        "429 question": (429, request("POST", "/search", json.dumps(one).encode(), team)),
        f"429 {BATCH} vectors": (429, request("POST", "/search/batch", json.dumps(many).encode(), team)),
        f"429 {BATCH} raw vectors": (
            429,
            request("POST", "/search/batch", vectors[:BATCH].tobytes(), team, "application/octet-stream"),
        ),
    }
    command = vecsvc("serve", str(folder / "out"), "--port=0", "--admin-port=0", f"--keys={folder / 'keys.toml'}")
    command[2] = GATE.format(gate=str(gate)) + command[2]
    command += ["--max-in-flight=1", "--max-bulk-in-flight=1", f"--max-timeout-ms={HOLD_MS}", "--reload-poll-s=0"]
    times: dict[str, list[float]] = {name: [] for name in kinds}
    with running(command) as server, full(server, gate, one, many, team):
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            ask(connection, request("GET", "/indexes", b"", {"X-API-Key": keys["slow"]}))  # its only query
        for _ in range(ROUNDS):
            for name, (status, sent) in kinds.items():
                times[name].append(cpu_us(server, sent, status, n))
    return {name: statistics.median(found) for name, found in times.items()}


@contextmanager
def full(server: Server, gate: Path, one: Any, many: Any, headers: dict[str, str]) -> Iterator[None]:
    """While the block runs, both places are taken."""
    gate.touch()
    held = []
    for path, question in (("/search", one), ("/search/batch", many)):
        sent = request("POST", path, json.dumps({**question, "timeout_ms": HOLD_MS}).encode(), headers)

        def hold(sent: bytes = sent) -> None:
            with socket.create_connection(("127.0.0.1", server.port)) as connection:
                ask(connection, sent)

        held.append(threading.Thread(target=hold))
        held[-1].start()
    time.sleep(0.5)
    try:
        yield
    finally:
        gate.unlink()
        for thread in held:
            thread.join()


def cpu_us(server: Server, sent: bytes, status: int, n: int) -> float:
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        before = server.cpu_s()
        for _ in range(n):
            found = ask(connection, sent)
            if found != status:
                raise SystemExit(f"expected {status}, got {found}")
        return (server.cpu_s() - before) / n * 1e6


def request(
    method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None, content: str = "application/json"
) -> bytes:
    lines = {"Host": "x", "Content-Type": content, "Content-Length": str(len(body)), **(headers or {})}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + body


def ask(connection: socket.socket, sent: bytes) -> int:
    """The status of the answer, which is read whole."""
    connection.sendall(sent)
    received = b""
    while b"\r\n\r\n" not in received:
        received += _more(connection)
    head, _, body = received.partition(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
    while len(body) < length:
        body += _more(connection)
    return int(head[9:12])


def _more(connection: socket.socket) -> bytes:
    received = connection.recv(1 << 16)
    if not received:
        raise SystemExit("the server closed the connection")
    return received


if __name__ == "__main__":
    main()
