"""What `build-index` costs beside the library it calls: wall time against hnswlib's own, and peak memory."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import load_task, parser, save, table, vecsvc, work_folder, write_corpus

RUNS = 3
M, EF_CONSTRUCTION, THREADS = 16, 200, 2
BIG = (1_000_000, 128)

# The library alone: vectors in memory, the same parameters and threads, and its file written at the end.
HNSWLIB = """
import sys, time, numpy as np, hnswlib
vectors = np.load(sys.argv[1])
started = time.perf_counter()
index = hnswlib.Index("ip", vectors.shape[1])
index.init_index(len(vectors), M=int(sys.argv[2]), ef_construction=int(sys.argv[3]), random_seed=7)
index.add_items(vectors, np.arange(len(vectors)), num_threads=int(sys.argv[4]))
index.save_index(sys.argv[5])
print(time.perf_counter() - started)
"""

# A build in a process whose peak is counted from after the imports on.
PEAK = """
import json, sys
from pathlib import Path
import numpy, pyarrow.parquet, hnswlib, faiss, sklearn.neighbors
from index_builders.pipeline import build_index
import index_builders.hnsw, index_builders.faiss_index, index_builders.exact
from vecsvc.config import BuildSettings
def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
options = json.loads(sys.argv[1])
build_index(sys.argv[2], BuildSettings(**options["settings"]), options["params"])
print(json.dumps({"before": before, "peak": status("VmHWM")}))
"""


def wall_times(corpus: Path, vectors: np.ndarray, work: Path) -> dict[str, list[float]]:
    array = work / "vectors.npy"
    np.save(array, vectors)
    times: dict[str, list[float]] = {"vecsvc build-index": [], "hnswlib alone": []}
    alone = [
        sys.executable,
        "-c",
        HNSWLIB,
        str(array),
        str(M),
        str(EF_CONSTRUCTION),
        str(THREADS),
        str(work / "hnsw.bin"),
    ]
    ours = [
        "build-index",
        str(corpus),
        "--out",
        str(work / "timed"),
        "--name",
        "timed",
        "--kind",
        "hnsw",
        "--metric",
        "ip",
    ]
    ours += ["--threads", str(THREADS), "--param", f"m={M}", "--param", f"ef_construction={EF_CONSTRUCTION}"]
    for _ in range(RUNS):
        started = time.perf_counter()
        subprocess.run(vecsvc(*ours), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        times["vecsvc build-index"].append(time.perf_counter() - started)
        done = subprocess.run(alone, check=True, capture_output=True, text=True)
        times["hnswlib alone"].append(float(done.stdout))
    return times


def peak(corpus: Path, work: Path, kind: str, params: dict[str, Any]) -> tuple[int, float]:
    """Bytes above those after the imports, and the seconds the build took."""
    settings = {"out": str(work / "peak"), "name": "peak", "kind": kind, "metric": "ip", "threads": THREADS}
    started = time.perf_counter()
    command = [sys.executable, "-c", PEAK, json.dumps({"settings": settings, "params": params}), str(corpus)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    facts = json.loads(done.stdout)
    return facts["peak"] - facts["before"], time.perf_counter() - started


def big_corpus(work: Path) -> Path:
    path = work / "big.parquet"
    if not path.exists():
        rng = np.random.default_rng(7)
        centres = rng.standard_normal((4000, BIG[1]), dtype=np.float32)
        vectors = centres[rng.integers(0, len(centres), BIG[0])]
        vectors += 0.7 * rng.standard_normal(BIG, dtype=np.float32)
        write_corpus(vectors, path)
    return path


def main() -> None:
    arguments = parser("Cost of build-index")
    arguments.add_argument("--big", action="store_true", help="also the 1,000,000 x 128 corpora, some ten minutes")
    given = arguments.parse_args()
    task = load_task(given.data)
    with work_folder(given.work) as work:
        corpus = write_corpus(task.base, work / "build.parquet")
        times = wall_times(corpus, task.base, work)
        middle = {name: float(np.median(values)) for name, values in times.items()}
        ratio = middle["vecsvc build-index"] / middle["hnswlib alone"]
        rows = [[name, middle[name], min(times[name]), max(times[name])] for name in times]
        table(
            f"wall seconds, {task.base.shape[0]:,} x {task.base.shape[1]}, hnsw, {THREADS} threads",
            ["", "median", "min", "max"],
            rows,
        )
        print(f"\nratio {ratio:.3f}, target 1.15: {'met' if ratio <= 1.15 else 'MISSED'}")
        cases = [(corpus, task.base.shape, "hnsw", {"m": M, "ef_construction": EF_CONSTRUCTION})]
        if given.big:
            big = big_corpus(work)
            cases += [(big, BIG, "hnsw", {"m": M, "ef_construction": EF_CONSTRUCTION})]
            cases += [(big, BIG, "faiss", {"factory": "IVF1024,Flat"})]
        rows, peaks = [], []
        for path, shape, kind, params in cases:
            size = 4 * shape[0] * shape[1]
            used, seconds = peak(path, work, kind, params)
            peaks.append({"shape": shape, "kind": kind, "params": params, "bytes": used, "times_vectors": used / size})
            met = "met" if used / size <= 2.5 else "MISSED"
            rows.append(
                [f"{shape[0]:,} x {shape[1]} {kind} {params}", size / 1e6, used / 1e6, used / size, met, seconds]
            )
        head = ["peak memory after imports", "vectors MB", "peak MB", "ratio", "target 2.5", "build s"]
        table("memory of a build", head, rows)
    save("build", {"task": task.name, "wall_s": times, "ratio": ratio, "peaks": peaks})


if __name__ == "__main__":
    main()
