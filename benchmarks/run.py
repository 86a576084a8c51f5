"""Runs every benchmark one after the other: `python benchmarks/run.py [--data DIR] [--work DIR]`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPTS = ("kernels.py", "tp_tree.py", "serving.py", "ready.py", "filtered.py", "build.py", "recall_qps.py")


def main() -> None:
    for script in SCRIPTS:
        print(f"\n=== {script}", flush=True)
        own = [a for a in sys.argv[1:] if a != "--big" or script == "build.py"]
        subprocess.run([sys.executable, str(Path(__file__).parent / script), *own], check=True)


if __name__ == "__main__":
    main()
