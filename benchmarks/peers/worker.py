"""Runs one system in a process of its own, so that libraries cannot disturb each other and memory can be counted.

Peers bring their own OpenMP, thread pools and log lines, and a crash in one must not end the run. Between
its turns a worker is stopped (SIGSTOP), so that no pool of it spins while another is measured.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

import peers
from peers.base import Point, Searcher, System
from vecsvc.distance import unit

WARM_ROWS = 2_000  # of the tiny index that a system is warmed with
WARM_QUERIES = 50
MIN_QUERIES = 100  # a slow system's loop ends after so many where its time is up
MIN_BATCH_S = 0.3  # a short batch is repeated until so much time is spent
MAX_BATCHES = 20
PR_SET_PDEATHSIG = 1


class WorkerFailedError(Exception):
    """The system cannot take part; the message says why."""


class Worker:
    """The parent's end. Every call waits for its answer and raises WorkerFailedError where there is none."""

    def __init__(self, system: System, folder: Path, metric: str, k: int, threads: int, limit_s: float) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._limit_s = limit_s
        self._process = context.Process(
            target=_serve, args=(theirs, system.name, folder, metric, k, threads), daemon=True
        )
        self._process.start()
        theirs.close()

    def call(self, what: str, *arguments: Any) -> Any:
        self._signal(signal.SIGCONT)
        try:
            self._pipe.send((what, arguments))
            if not self._pipe.poll(self._limit_s):
                raise WorkerFailedError(f"no answer to {what} within {self._limit_s:g} s")
            fine, answer = self._pipe.recv()
        except (EOFError, ConnectionError) as error:
            self._process.join(10)
            raise WorkerFailedError(f"its process ended during {what}, code {self._process.exitcode}") from error
        self._signal(signal.SIGSTOP)
        if not fine:
            raise WorkerFailedError(answer)
        return answer

    def close(self) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()
        self._process.close()

    def _signal(self, number: int) -> None:
        if self._process.pid is not None and self._process.is_alive():
            os.kill(self._process.pid, number)


# ------------------------------------------------------------------------------- in the worker's process


def _serve(pipe: Connection, name: str, folder: Path, metric: str, k: int, threads: int) -> None:
    # A stopped process would outlive a parent that was killed: Linux ends it with its parent.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        runner = _Runner(peers.find(name), folder, metric, k, threads)
        # Some libraries chat on both; what went wrong comes back over the pipe.
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        while True:
            what, arguments = pipe.recv()
            try:
                answer = True, getattr(runner, what)(*arguments)
            except Exception as error:  # whatever a library raises is an answer
                answer = False, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            pipe.send(answer)
    except (EOFError, KeyboardInterrupt):
        pass


class _Runner:
    def __init__(self, system: System, folder: Path, metric: str, k: int, threads: int) -> None:
        self._system, self._folder, self._k, self._threads = system, folder, k, threads
        self._unit = system.unit and metric == "cosine"
        self._metric = "ip" if self._unit else metric
        self._index: Searcher

    def build(self) -> dict[str, Any]:
        """Seconds, bytes and the points; memory above what was there after the imports, the vectors included."""
        self._queries = self._read("queries.npy")
        self._ones = [self._queries[i : i + 1] for i in range(len(self._queries))]
        # Imports, pools and compilers come before the clock and the memory are looked at.
        self._warm(np.array(np.load(self._folder / "base.npy", mmap_mode="r")[:WARM_ROWS]))
        before = _reset_peak()
        vectors = self._read("base.npy")
        with _threads(self._threads):
            started = time.perf_counter()
            self._index = self._make(vectors)
            build_s = time.perf_counter() - started
        peak = _status("VmHWM") - before
        with tempfile.TemporaryDirectory() as folder:
            beside = self._index.save(Path(folder))
            files = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
        return {
            "build_s": build_s,
            "peak_bytes": peak,
            "index_bytes": files + beside,
            "vectors_bytes": vectors.nbytes if self._system.reranks else 0,
            "points": [dict(point) for point in self._system.points(self._index)],
        }

    def labels(self, point: Point, budget_s: float) -> np.ndarray:
        """What single queries find (n, k), n fewer than all where time is up."""
        self._index.set(point, 1)
        rows: list[Any] = []
        with _threads(1):
            self._loop(self._ones, budget_s, rows)
        found = np.full((len(rows), self._k), -1, dtype=np.int64)
        for i, row in enumerate(rows):
            flat = np.asarray(row).reshape(-1)[: self._k].astype(np.int64)
            found[i, : len(flat)] = flat
        return found

    def single(self, point: Point, budget_s: float) -> list[float]:
        self._index.set(point, 1)
        with _threads(1):
            self._loop(self._ones[:WARM_QUERIES], budget_s / 10, [])
            return self._loop(self._ones, budget_s, [])

    def batch_labels(self, point: Point, rows: int) -> np.ndarray:
        self._index.set(point, self._threads)
        with _threads(self._threads):
            found = np.asarray(self._index.search(self._queries[:rows], self._k))
        return found.reshape(rows, -1).astype(np.int64)

    def batch(self, point: Point, rows: int) -> float:
        """Queries a second of whole batches over all threads."""
        self._index.set(point, self._threads)
        queries = self._queries[:rows]
        with _threads(self._threads):
            self._index.search(queries[: max(1, rows // 10)], self._k)
            started, calls = time.perf_counter(), 0
            while calls == 0 or (time.perf_counter() - started < MIN_BATCH_S and calls < MAX_BATCHES):
                self._index.search(queries, self._k)
                calls += 1
            return calls * rows / (time.perf_counter() - started)

    def _loop(self, ones: list[np.ndarray], budget_s: float, rows: list[Any]) -> list[float]:
        times: list[float] = []
        search, k, clock = self._index.search, self._k, time.perf_counter
        end = clock() + budget_s
        for query in ones:
            started = clock()
            row = search(query, k)
            finished = clock()
            times.append(finished - started)
            rows.append(row)
            if finished > end and len(times) >= min(MIN_QUERIES, len(ones)):
                break
        return times

    def _read(self, name: str) -> np.ndarray:
        array = np.load(self._folder / name)
        return unit(array) if self._unit else array

    def _make(self, vectors: np.ndarray) -> Searcher:
        return self._system.build(vectors, self._metric, self._threads, self._system.params)

    def _warm(self, few: np.ndarray) -> None:
        with contextlib.suppress(Exception):  # some cannot be trained on so few; the whole build will tell
            index = self._make(unit(few) if self._unit else few)
            index.set(self._system.points(index)[0], 1)
            for query in self._ones[:3]:
                index.search(query, min(self._k, len(few)))


@contextlib.contextmanager
def _threads(count: int) -> Any:
    """What NumPy's BLAS and OpenMP may use; the libraries' own pools are told by `Searcher.set`."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(count):
        yield


def _reset_peak() -> int:
    """Resident bytes now; the peak is counted from here on where the system lets us."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(name: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), 0)
