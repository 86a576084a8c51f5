"""Sets two results of recall_qps.py side by side: `python benchmarks/compare.py A.json B.json`.

QPS and times move with the machine's mood, so a change counts where it is larger than what was seen between the rounds
of either run. "x hnswlib" was taken within the rounds and survives a slow day. Exits 1 where B is worse than A.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import table

LEAST_NOISE = 0.03  # rounds of one run resemble each other more than two runs do
MEASURED_ONCE = 0.25  # a build, or a single round: how much it moves by itself is not known
BYTES = 0.01


@dataclass
class Change:
    system: str
    what: str
    before: float
    after: float
    noise: float  # a relative change within it means nothing
    more_is_better: bool

    @property
    def ratio(self) -> float:
        return self.after / self.before if self.before else float("inf")

    @property
    def flag(self) -> str:
        if abs(self.ratio - 1) <= self.noise:
            return ""
        return "better" if (self.ratio > 1) == self.more_is_better else "WORSE"


def noise(*runs: Sequence[float]) -> float:
    """The widest relative distance from a run's median to one of its rounds."""
    if min(map(len, runs)) < 2:
        return MEASURED_ONCE
    widest = [max(abs(value / statistics.median(run) - 1) for value in run) for run in runs if run]
    return max([LEAST_NOISE, *widest])


def changes(before: dict[str, Any], after: dict[str, Any]) -> Iterator[Change]:
    """Every figure that both runs have."""
    later = {system["name"]: system for system in after["systems"]}
    for old in before["systems"]:
        new = later.get(old["name"])
        if new is None:
            continue
        for at in old["at"]:
            for what, name, more_is_better in (
                ("qps", "QPS", True),
                ("qps_x_hnswlib", "x hnswlib", True),
                ("p50_ms", "p50 ms", False),
                ("p99_ms", "p99 ms", False),
                ("batch_qps", "batch QPS", True),
                ("batch_qps_x_hnswlib", "batch x hnswlib", True),
            ):
                a, b = old["at"][at].get(what), new["at"].get(at, {}).get(what)
                if a and b:
                    middle = statistics.median(a), statistics.median(b)
                    yield Change(old["name"], f"{name} {at[1:]}", *middle, noise(a, b), more_is_better)
        yield Change(old["name"], "build s", old["build_s"], new["build_s"], MEASURED_ONCE, False)
        weights = [s["bytes_per_vector"] + s["vectors_bytes_per_vector"] for s in (old, new)]
        if all(weights):
            yield Change(old["name"], "bytes/vector", *weights, BYTES, False)


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What else differs between the runs, and may explain a change."""
    found = []
    for name in ("task", "metric", "k", "threads"):
        if before[name] != after[name]:
            found.append(f"{name}: {before[name]} and {after[name]}")
    for name in ("cpu", "cores", "python"):
        if before["machine"][name] != after["machine"][name]:
            found.append(f"{name}: {before['machine'][name]} and {after['machine'][name]}")
    old, new = (run["machine"]["libraries"] for run in (before, after))
    found += [
        f"{name}: {old.get(name)} and {new.get(name)}"
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    ]
    names = [{system["name"] for system in run["systems"]} for run in (before, after)]
    found += [f"{name}: in one run only" for name in sorted(names[0] ^ names[1])]
    return found


def read(path: Path) -> dict[str, Any]:
    try:
        figures: dict[str, Any] = json.loads(path.read_text())
        figures["systems"], figures["machine"]["libraries"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        sys.exit(f"compare: {path} is no result of recall_qps.py ({type(error).__name__}: {error})")
    return figures


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    given = parser.parse_args(argv)
    before, after = read(given.before), read(given.after)
    found = list(changes(before, after))
    rows = [
        [f"{c.system}  {c.what}", figure(c.before), figure(c.after), f"{c.ratio:.2f}", f"±{c.noise:.0%}", c.flag]
        for c in found
    ]
    table(f"{given.before.name} and {given.after.name}", ["", "A", "B", "B/A", "noise", ""], rows)
    for line in differences(before, after):
        print(f"differs: {line}")
    worse = [change for change in found if change.flag == "WORSE"]
    print(f"\n{len(worse)} of {len(found)} figures are worse beyond the noise" if found else "\nnothing in common")
    return 1 if worse else 0


def figure(value: float) -> str:
    """Three digits at least, for times in ms are small."""
    return f"{value:,.0f}" if value >= 100 else f"{value:,.2f}" if value >= 1 else f"{value:.3g}"


if __name__ == "__main__":
    sys.exit(main())
