"""Writes how many shards there are to the two places that must agree: the shards that serve, and the Job that builds.

python k8s/shards.py 8
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

MOST_SHARDS = 256  # what `vecsvc build-index --shards` takes
MOST_PODS = 32  # of the Job, at the same time

NOTE = "# Written by k8s/shards.py: to have more shards or fewer, run it again.\n"
HEAD = NOTE + "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\n"


def write(shards: int, root: Path) -> None:
    """Replace what an earlier run wrote below `root`, the folder k8s."""
    folder = root / "overlays" / "sharded" / "shards"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    names = [str(shard) for shard in range(shards)]
    (folder / "kustomization.yaml").write_text(HEAD + "resources:\n" + "".join(f'  - "{name}"\n' for name in names))
    for name in names:
        (folder / name).mkdir()
        (folder / name / "kustomization.yaml").write_text(
            f'{HEAD}resources:\n  - ../../../../shard\nnameSuffix: "-{name}"\n'
            f'labels:\n  - pairs:\n      vecsvc/shard: "{name}"\n    includeSelectors: true\n'
        )
    (root / "jobs" / "build" / "shards.yaml").write_text(
        f"{NOTE}apiVersion: batch/v1\nkind: Job\nmetadata:\n  name: vecsvc-build\nspec:\n"
        f"  completions: {shards}\n  parallelism: {min(shards, MOST_PODS)}\n"
        "  template:\n    spec:\n      initContainers:\n        - name: build\n          env:\n"
        f'            - {{name: SHARDS, value: "{shards}"}}\n'
    )


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("shards", type=int, help=f"how many, 1 to {MOST_SHARDS}")
    given = arguments.parse_args()
    if not 1 <= given.shards <= MOST_SHARDS:
        arguments.error(f"shards must be between 1 and {MOST_SHARDS}, got {given.shards}")
    write(given.shards, Path(__file__).parent)


if __name__ == "__main__":
    main()
