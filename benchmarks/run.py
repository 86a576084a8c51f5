"""Runs every benchmark one after the other: `python benchmarks/run.py [--data DIR] [--work DIR]`."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

SCRIPTS = ("kernels.py", "tp_tree.py", "serving.py", "ready.py", "filtered.py", "probe.py", "build.py", "recall_qps.py")
# These know --data alone; encoder.py cannot do without.
ENCODER_SCRIPTS = ("encoder.py", "encoder_serving.py", "cellular.py")


def main() -> None:
    for script in SCRIPTS:
        own = [a for a in sys.argv[1:] if a != "--big" or script == "build.py"]
        run(script, own)
    data = [value for flag, value in itertools.pairwise(sys.argv) if flag == "--data"]
    for script in ENCODER_SCRIPTS if data else ENCODER_SCRIPTS[1:]:
        run(script, ["--data", data[0]] if data else [])


def run(script: str, arguments: list[str]) -> None:
    print(f"\n=== {script}", flush=True)
    subprocess.run([sys.executable, str(Path(__file__).parent / script), *arguments], check=True)


if __name__ == "__main__":
    main()
