"""Millions of queries at full rate with version swaps among them: memory and open files of one node, over time.

python benchmarks/soak.py --data DIR --queries 5000000 --swaps 20        # the figures
python benchmarks/soak.py                                                # a look whether it runs
"""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from cluster import build, unmixed
from common import RESULTS, K, Task, load_task, parser, save, table, work_folder
from load import Tally, closed_loop, post, run
from nodes import Place

from vecsvc.storage import IndexFolder

BATCH = 50
MIX = {"json": 6, "raw": 3, "batch": 1}  # requests of each sort, of ten
CLIENTS = 8
SAMPLES = 200


def requests(task: Task) -> tuple[list[bytes], list[int]]:
    """Mixed requests, and how many queries each holds."""
    rows = np.concatenate([task.queries.astype("<f4")] * (1 + 1000 // len(task.queries)))
    sorts = [sort for sort, share in MIX.items() for _ in range(share)]
    binary = "application/octet-stream"
    made, queries = [], []
    for at in range(1000):
        match sorts[at % len(sorts)]:
            case "json":
                body = {"vector": rows[at].tolist(), "k": K, "include": ["fields"]}
                made.append(post("/search", json.dumps(body).encode()))
            case "raw":
                made.append(post(f"/search?k={K}&include=fields", rows[at].tobytes(), binary))
            case _:
                some = rows[at % len(rows) :][:BATCH]
                made.append(post(f"/search/batch?k={K}", some.tobytes(), binary))
                queries.append(len(some))
                continue
        queries.append(1)
    return made, queries


async def soak(
    node: Place, folder: IndexFolder, asked: tuple[list[bytes], list[int]], total: int, swaps: int
) -> tuple[Tally, list[dict[str, Any]]]:
    made, per_request = asked
    stop = asyncio.Event()
    tally = Tally()
    done = 0
    samples: list[dict[str, Any]] = []
    swapped = 0
    began = time.perf_counter()

    def check(number: int, body: bytes) -> str | None:
        """Counts, and looks closely at one answer of fifty."""
        nonlocal done
        done += per_request[number]
        tally.seconds.get("200", []).clear()  # or the client's own memory would grow
        tally.at.get("200", []).clear()
        tally.wire.get("200", []).clear()
        if done % 50 == 0 and per_request[number] == 1:
            return unmixed(number, body)
        return None

    async def watch() -> None:
        nonlocal swapped
        while done < total:
            if len(samples) * total <= done * SAMPLES:
                samples.append(
                    {
                        "s": time.perf_counter() - began,
                        "queries": done,
                        "rss_mb": node.rss_bytes() / 1e6,
                        "files": node.open_files(),
                        "swaps": swapped,
                    }
                )
            if done * (swaps + 1) >= total * (swapped + 1) and swapped < swaps:
                folder.rollback("v2" if folder.current() == "v1" else "v1")
                swapped += 1
            await asyncio.sleep(0.02)
        stop.set()

    watching = asyncio.ensure_future(watch())
    await closed_loop([node.port], made, stop, clients=CLIENTS, check=check, tally=tally)
    await watching
    return tally, samples


def plot(samples: list[dict[str, Any]], path: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        print("no picture: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(8, 5))
    queries = [sample["queries"] / 1e6 for sample in samples]
    above.plot(queries, [sample["rss_mb"] for sample in samples])
    above.set_ylabel("RSS, MB")
    above.set_ylim(bottom=0)
    below.plot(queries, [sample["files"] for sample in samples])
    below.set_ylabel("open files")
    below.set_ylim(bottom=0)
    below.set_xlabel("million queries")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    print(f"picture: {path}")


def report(tally: Tally, samples: list[dict[str, Any]]) -> dict[str, Any]:
    shown = samples[:: max(1, len(samples) // 20)]
    table(
        "one node, full rate",
        ["queries", "s", "RSS MB", "open files", "swaps"],
        [[f"{s['queries']:,}", s["s"], s["rss_mb"], s["files"], s["swaps"]] for s in shown],
    )
    print(f"{samples[-1]['queries'] / samples[-1]['s']:,.0f} queries/s; failed: {tally.failed}")
    tally.tell()
    # The first fifth warms caches and pools; a version that was just swapped out is still open for a moment.
    fifth = max(1, len(samples) // 5)
    parts = samples[fifth : 2 * fifth] or samples, samples[-fifth:]
    early, late = (float(np.median([sample["rss_mb"] for sample in part])) for part in parts)
    files = [float(np.median([sample["files"] for sample in part])) for part in parts]
    for what, met in (
        (f"RSS {early:.1f} MB in the second fifth, {late:.1f} in the last", late <= 1.03 * early),
        (f"open files {files[0]:.0f} in the second fifth, {files[1]:.0f} in the last", files[0] == files[1]),
        ("no failed request", not tally.failed),
    ):
        print(f"{what}: {'met' if met else 'MISSED'}")
    return {"rss_mb": [early, late], "files": files, "failed": tally.failed, "reasons": dict(tally.reasons)}


def main() -> None:
    arguments = parser("Memory and open files of one node over millions of queries and version swaps")
    arguments.add_argument("--queries", type=int, default=20_000)
    arguments.add_argument("--swaps", type=int, default=4)
    arguments.add_argument("--rows", type=int, help="only so many vectors")
    arguments.add_argument("--serve", nargs="*", default=[], help="more flags of vecsvc serve, without their dashes")
    read = arguments.parse_args()
    task = load_task(read.data)
    if read.rows:
        task = Task(task.name, task.base[: read.rows], task.queries, task.bounds)
    with work_folder(read.work) as work, tempfile.TemporaryDirectory() as logs:
        folder = build(task, work, 1)
        flags = [f"--{flag}" for flag in read.serve]
        node = Place(["serve", str(folder.path.parent), "--reload-poll-s", "0.2", *flags], Path(logs) / "log")
        try:
            node.start()
            node.wait("ready")
            tally, samples = run(soak(node, folder, requests(task), read.queries, read.swaps))
        finally:
            node.stop()
    found = report(tally, samples)
    save("soak", {"task": task.name, "queries": read.queries, "swaps": read.swaps, **found, "samples": samples})
    plot(samples, RESULTS / "soak.png")


if __name__ == "__main__":
    main()
