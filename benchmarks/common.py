"""What every benchmark shares: the data, honest timing, tables, and the machine they ran on."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vecsvc.exact_search import ExactSearch
from vecsvc.manifest import cpu_description, library_versions
from vecsvc.ranking import recall

RESULTS = Path(__file__).parent / "results"
LIBRARIES = ("vecsvc", "numpy", "hnswlib", "faiss-cpu", "aiohttp", "uvloop", "msgspec")
K = 10
ROUNDING = 1e-5  # of distances that were computed or published in float32


@dataclass
class Task:
    """Vectors, queries, and the true distances of each query's K nearest."""

    name: str
    base: np.ndarray  # (n, dim) float32, unit length
    queries: np.ndarray  # (q, dim) float32, unit length
    bounds: np.ndarray  # (q,) distance of the K-th nearest, metric ip

    def recall(self, labels: np.ndarray) -> float:
        """The share of returned labels (q, K) that are as near as the K-th nearest; ties are no errors."""
        found = np.full(labels.shape, np.inf, np.float32)
        for query, row, distances in zip(self.queries, labels, found, strict=True):
            distances[row >= 0] = 1.0 - self.base[row[row >= 0]] @ query
        return float(recall(found, self.bounds + ROUNDING).mean())


def parser(purpose: str) -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(description=purpose)
    arguments.add_argument("--data", type=Path, help="folder with minilm/NAME.f16.npy; made-up vectors without it")
    arguments.add_argument("--work", type=Path, help="folder for the indexes, kept for the next run; temporary without")
    return arguments


def load_task(data: Path | None) -> Task:
    """The task "dev": 79,890 x 384 embeddings of real text and 2,000 queries; made-up clusters without data."""
    if data is not None:
        read = lambda name: np.load(data / "minilm" / f"{name}.f16.npy").astype(np.float32)  # noqa: E731
        base = np.concatenate([read("peps"), read("tldr_docs")])
        queries, name = read("tldr_queries")[::16][:2000], "dev"
    else:
        rng = np.random.default_rng(7)
        centres = rng.standard_normal((400, 128))
        points = centres[rng.integers(0, 400, 21_000)] + 0.7 * rng.standard_normal((21_000, 128))
        base, queries, name = points[1000:].astype(np.float32), points[:1000].astype(np.float32), "made-up clusters"
    base /= np.linalg.norm(base, axis=1, keepdims=True)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    base, queries = np.ascontiguousarray(base), np.ascontiguousarray(queries)
    bounds = ExactSearch(base, "ip").search(queries, K).distances[:, -1]
    return Task(name, base, queries, bounds)


def write_corpus(vectors: np.ndarray, path: Path) -> Path:
    """The vectors as a Parquet corpus with ids `row-N`; one row group, as pyarrow writes by default."""
    flat = pa.array(vectors.reshape(-1))
    columns = {
        "id": pa.array([f"row-{i}" for i in range(len(vectors))]),
        "vector": pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1]),
    }
    pq.write_table(pa.table(columns), path, compression="none", use_dictionary=False)
    return path


@contextlib.contextmanager
def work_folder(given: Path | None) -> Iterator[Path]:
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def vecsvc(*arguments: str, first: str = "") -> list[str]:
    """The command; `first` is Python that runs before it."""
    return [sys.executable, "-c", f"{first}\nfrom vecsvc.cli import main; main()", *arguments]


@dataclass
class Server:
    process: subprocess.Popen[str]
    port: int
    admin_port: int
    ready_s: float  # from starting the process to a green /readyz

    def cpu_s(self) -> float:
        """Processor seconds of every thread of it and its workers so far, as the kernel counts them in nanoseconds."""
        nanoseconds, waiting = 0, [str(self.process.pid)]
        while waiting:
            for task in Path(f"/proc/{waiting.pop()}/task").iterdir():
                nanoseconds += int((task / "schedstat").read_text().split()[0])
                waiting += (task / "children").read_text().split()
        return nanoseconds / 1e9


@contextlib.contextmanager
def running(command: list[str]) -> Iterator[Server]:
    """A server that logs {"message": "listening", "port": ...} as JSON; ended with SIGTERM."""
    started = time.perf_counter()
    log = tempfile.NamedTemporaryFile("w+")  # noqa: SIM115
    process = subprocess.Popen(command, stderr=log, text=True)
    try:
        facts = _listening(process, Path(log.name))
        admin = facts.get("admin_port", facts["port"])
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{admin}/readyz", timeout=5):
                    break
            except OSError:
                if process.poll() is not None:
                    sys.exit(f"the server ended:\n{Path(log.name).read_text()}")
                time.sleep(0.005)
        yield Server(process, facts["port"], admin, time.perf_counter() - started)
    finally:
        process.terminate()
        process.wait(timeout=60)
        log.close()


def _listening(process: subprocess.Popen[str], log: Path) -> dict[str, Any]:
    while process.poll() is None:
        for line in log.read_text().splitlines():
            if '"listening"' in line:
                facts: dict[str, Any] = json.loads(line)
                return facts
        time.sleep(0.005)
    sys.exit(f"the server ended:\n{log.read_text()}")


def table(title: str, head: list[str], rows: list[list[Any]]) -> None:
    """Print one table, numbers to the right."""
    cells = [[f"{c:,.3f}" if isinstance(c, float) else str(c) for c in row] for row in rows]
    widths = [max(len(line[i]) for line in [head, *cells]) for i in range(len(head))]
    print(f"\n{title}")
    for line in [head, ["-" * width for width in widths], *cells]:
        print(
            "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        )


def machine(libraries: Sequence[str] = ()) -> dict[str, Any]:
    return {
        "cpu": cpu_description()[0],
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "libraries": library_versions(dict.fromkeys((*LIBRARIES, *libraries))),
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def save(name: str, figures: dict[str, Any], folder: Path = RESULTS, libraries: Sequence[str] = ()) -> Path:
    """Write the figures as JSON beside the tables, with the machine they were taken on."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(libraries), **figures}, indent=2) + "\n")
    print(f"\n{machine()['cpu']}, {os.cpu_count()} cores, Python {platform.python_version()}; figures in {path.name}")
    return path
