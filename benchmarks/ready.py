"""From starting `vecsvc serve` to a green /readyz: imports, hashing of every file, loading and a first query."""

from __future__ import annotations

import numpy as np
from common import load_task, parser, running, save, table, vecsvc, work_folder
from serving import build

RUNS = 7
TARGET_S = 2.0


def main() -> None:
    given = parser("Seconds from serve to ready").parse_args()
    task = load_task(given.data)
    with work_folder(given.work) as work:
        folder = build(task, "hnsw", work)
        times: dict[str, list[float]] = {"hash": [], "size": []}
        for _ in range(RUNS):
            for verify in times:
                command = vecsvc("serve", str(folder.path), "--port", "0", "--admin-port", "0", "--verify", verify)
                with running(command) as server:
                    times[verify].append(server.ready_s)
    rows = [[f"--verify {name}", float(np.median(t)), min(t), max(t)] for name, t in times.items()]
    table(f"seconds to ready, {task.base.shape[0]:,} x {task.base.shape[1]}, hnsw", ["", "median", "min", "max"], rows)
    middle = float(np.median(times["hash"]))
    print(f"\nready after {middle:.2f} s, target {TARGET_S} s: {'met' if middle <= TARGET_S else 'MISSED'}")
    save("ready", {"task": task.name, "seconds": times})


if __name__ == "__main__":
    main()
