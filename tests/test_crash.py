"""Whatever dies or fails, and at whatever step: what serves is whole, and the next run completes."""

from __future__ import annotations

import errno
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from corpora import (
    GRAPH,
    GRAPH_FILE,
    answers,
    build,
    check_version,
    current_version,
    file_hashes,
    make_vectors,
    strays,
    write_corpus,
)

from vecsvc import storage
from vecsvc.errors import StorageError, UnknownVersion
from vecsvc.storage import IndexFolder


@pytest.fixture
def fast(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: hundreds of builds sync thousands of files."""
    if os.access("/dev/shm", os.W_OK):
        with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
            yield Path(folder)
    else:
        yield tmp_path


def run(scenario: str, folder: Path) -> list[str]:
    """What the driver prints. Its own traceback is the message where a promise was broken."""
    driver = [sys.executable, str(Path(__file__).with_name("crash_driver.py")), scenario, str(folder)]
    done = subprocess.run(driver, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr[-6000:]
    points: list[str] = json.loads(done.stdout)
    return points


# Every sort of step that a build makes: each was a death.
BUILD_STEPS = {
    "make folder .staging-v3",
    "make folder shards",
    "make folder 000",
    "make folder 001",
    "make folder encoder",
    "make folder index",
    *(f"{step} {file}" for step in ("create", "write", "fsync") for file in (
        "rows.npy", "vectors.npy", "id_lookup.npy", "ids.arrow", "fields.arrow", GRAPH_FILE, "model.onnx",
        "tokenizer.json", "manifest.json", ".state-v3.tmp", "CURRENT.tmp",
    )),
    *(f"write header {file}" for file in ("rows.npy", "vectors.npy", "id_lookup.npy")),
    *(f"fsync folder {folder}" for folder in ("demo", "000", "001", "shards", "index", "encoder", ".staging-v3")),
    "rename .state-v3",
    "rename v3",
    "rename CURRENT",
    "delete .state-v3",
}  # fmt: skip


def test_every_step_on_disk_is_announced_and_all_is_synced_before_it_is_renamed(fast: Path) -> None:
    steps = run("announced_and_synced", fast)
    assert {step for step in BUILD_STEPS if step.startswith(("create", "make", "rename"))} <= set(steps)
    assert {"rename .trash-v1", f"delete {GRAPH_FILE}", "delete folder .trash-v1"} <= set(steps)
    assert {"make folder encoded", "create part.npy.tmp", "delete folder encoded"} <= set(steps)


def test_a_build_killed_at_any_step_leaves_what_serves_and_the_next_one_completes(fast: Path) -> None:
    points = run("kill_builds", fast)
    assert set(points) >= BUILD_STEPS
    assert points.index("fsync manifest.json") < points.index("rename v3") < points.index("rename CURRENT")


def test_a_build_of_texts_killed_at_any_step_of_encoding_encodes_nothing_twice(fast: Path) -> None:
    points = run("kill_text_builds", fast)
    steps = {re.sub(r"\d{12}-[0-9a-f]{64}", "PART", point) for point in points}
    assert steps >= {
        *("make folder encoded", "create part.npy.tmp", "write part.npy.tmp", "write header part.npy.tmp"),
        *("fsync part.npy.tmp", "rename PART.npy", "fsync folder encoded", "rename .state-v3"),
        *("delete PART.npy", "delete folder encoded"),
    }


def test_a_resumed_build_killed_at_any_step_can_be_resumed_again(fast: Path) -> None:
    points = run("kill_resumed_builds", fast)
    assert {"create manifest.json", "rename v3", "rename CURRENT"} <= set(points)
    assert not {"create vectors.npy", f"create {GRAPH_FILE}"} & set(points), "what was done is not done again"


def test_gc_killed_at_any_step_never_takes_what_serves_and_the_next_one_completes(fast: Path) -> None:
    points = run("kill_gc", fast)
    assert {"rename .trash-v1", "rename .trash-v2", "delete vectors.npy", "delete folder .trash-v2"} <= set(points)
    assert {"delete folder .staging-dead", "delete .state-dead", "delete CURRENT.tmp"} <= set(points)
    assert not {"rename .trash-v3", "delete CURRENT"} & set(points)


def test_a_rollback_killed_at_any_step_serves_the_one_or_the_other(fast: Path) -> None:
    assert {"write CURRENT.tmp", "rename CURRENT", "fsync folder demo"} <= set(run("kill_rollback", fast))


def test_a_builder_of_one_shard_killed_at_any_step_costs_no_other_shard_anything(fast: Path) -> None:
    points = run("kill_shard_builds", fast)
    steps = ("make folder .part-v3-001", "rename .part-v3-001.state", "create vectors.npy", "fsync part.json")
    assert set(points) >= set(steps) and points[-1] == "fsync part.json"


def test_a_publishing_killed_at_any_step_can_be_repeated(fast: Path) -> None:
    points = run("kill_publish", fast)
    assert points.index("link vectors.npy") < points.index("fsync manifest.json") < points.index("rename v3")
    assert points.index("rename CURRENT") < points.index("delete part.json")


def test_two_builds_at_once_disturb_each_other_at_no_step_dead_or_alive(fast: Path) -> None:
    assert {"make folder .staging-v3", "rename v3", "rename CURRENT"} <= set(run("two_builds", fast))


@pytest.mark.parametrize("how", ["build", "rollback"])
def test_gc_leaves_a_version_that_was_put_to_serve_after_it_looked_at_current(
    fast: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    corpus = write_corpus(fast / "demo.parquet", n=20)
    folder = IndexFolder(fast / "out" / "demo")
    for version in ("v1", "v2"):
        build(corpus, fast / "out", version=version)
    versions = IndexFolder.versions

    def listed(index: IndexFolder) -> list[str]:
        monkeypatch.setattr(IndexFolder, "versions", versions)
        build(corpus, fast / "out", version="v3") if how == "build" else folder.rollback("v1")
        return versions(index)

    monkeypatch.setattr(IndexFolder, "versions", listed)
    folder.gc(0)
    assert current_version(folder).version == ("v3" if how == "build" else "v1")


def test_a_version_that_gc_has_taken_cannot_be_put_to_serve(fast: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = write_corpus(fast / "demo.parquet", n=20)
    folder = IndexFolder(fast / "out" / "demo")
    for version in ("v1", "v2"):
        build(corpus, fast / "out", version=version)

    def meanwhile(point: str) -> None:
        if point == "rename .trash-v1":
            with pytest.raises(UnknownVersion, match="v1 is just being deleted"):
                folder.rollback("v1")

    monkeypatch.setattr(storage, "failpoint", meanwhile)
    assert folder.gc(0) == ["v1"]
    assert current_version(folder).version == "v2"


# ----------------------------------------------------------------------------------- failing, not dying


LAST_STEP = re.compile(r"delete \.state-v\d+")  # of a build


class Disk:
    """Stands in for the failpoint: the nth step fails as a disk does."""

    def __init__(self, nth: int) -> None:
        self.nth = nth
        self.points: list[str] = []

    def __call__(self, point: str) -> None:
        self.points.append(point)
        if len(self.points) == self.nth:
            code = (errno.EIO, errno.ENOSPC)[self.nth % 2]
            raise OSError(code, os.strerror(code))


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def fails_cleanly(monkeypatch: pytest.MonkeyPatch, nth: int, out: Path, work: Callable[[], Any]) -> str:
    """Do `work` with its nth step failing; returns that step's name, "" where there are fewer."""
    if nth == 1:
        gc.collect()  # what tests before this one left must not vanish in its middle
    disk, files = Disk(nth), open_files()
    with monkeypatch.context() as failing:
        failing.setattr(storage, "failpoint", disk)
        try:
            work()
        except StorageError as error:
            assert len(disk.points) >= nth
            message = str(error)
            assert "\n" not in message and str(out) in message, message
            assert os.strerror((errno.EIO, errno.ENOSPC)[nth % 2]) in message, message
            assert not LAST_STEP.fullmatch(disk.points[nth - 1])
        else:
            # The version serves by then: a state that cannot be deleted is gc's.
            assert len(disk.points) < nth or LAST_STEP.fullmatch(disk.points[nth - 1]), disk.points[nth - 1]
    if open_files() != files:
        gc.collect()
        assert open_files() == files, f"{disk.points[-1]} left a file open"
    return disk.points[nth - 1] if len(disk.points) >= nth else ""


def test_a_step_that_fails_ends_the_build_in_one_line_and_changes_nothing(
    fast: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"kind": GRAPH, "shards": 2, "fields": "label", "name": "demo"}
    old = write_corpus(fast / "old.parquet", n=40, seed=1)
    new = write_corpus(fast / "new.parquet", n=40, seed=2)
    queries = make_vectors(3, 8, seed=3)
    build(old, fast / "out", version="old", **settings)
    hashes = file_hashes(build(new, fast / "whole", version="new", **settings).manifest)
    before, after = answers(fast / "out", queries), answers(fast / "whole", queries)
    folder, met = IndexFolder(fast / "out" / "demo"), set()
    for nth in range(1, 1000):
        name = f"v{nth}"
        point = fails_cleanly(monkeypatch, nth, fast, lambda: build(new, fast / "out", version=name, **settings))  # noqa: B023
        if not point:
            break
        met.add(point.replace(name, "v3"))
        renamed = folder.current() == name
        assert renamed == (point in (f"delete .state-{name}", "fsync folder demo") and folder.current() != "old")
        for version in folder.versions():
            check_version(folder.path / version)
        assert answers(fast / "out", queries) == (after if renamed else before)
        if nth % 2:
            assert file_hashes(build(new, fast / "out", resume=True, **settings).manifest) == hashes
        folder.rollback("old")
        folder.gc(0)
        assert folder.versions() == ["old"] and not strays(folder)
    assert met >= {p for p in BUILD_STEPS if not any(f in p for f in ("encoder", "model.onnx", "tokenizer.json"))}


def test_a_step_that_fails_ends_gc_and_rollback_in_one_line_and_changes_nothing(
    fast: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = write_corpus(fast / "demo.parquet", n=20)
    folder = IndexFolder(fast / "out" / "demo")
    queries = make_vectors(3, 8, seed=3)
    for version in ("v0", "v1"):
        build(corpus, fast / "out", version=version)
    before = answers(fast / "out", queries)
    met = set()
    for work in (lambda: folder.gc(0), lambda: folder.rollback("v0")):
        for nth in range(1, 1000):
            folder.rollback("v1")
            folder.gc(1)
            dead = folder.path / ".staging-dead"
            dead.mkdir(exist_ok=True)
            (folder.path / ".state-dead").touch()
            (folder.path / "CURRENT.tmp").touch()
            point = fails_cleanly(monkeypatch, nth, fast, work)
            met.add(point)
            current_version(folder)
            assert answers(fast / "out", queries) == before
            if not point:
                break
            if "v0" not in folder.versions():
                build(corpus, fast / "out", version="v0")
        folder.rollback("v1")
        folder.gc(0)
        assert not strays(folder) and folder.versions() == ["v1"]
        build(corpus, fast / "out", version="v0")
    assert met >= {"rename .trash-v0", "delete folder .trash-v0", "delete .state-dead", "delete CURRENT.tmp"}
    assert met >= {"delete folder .staging-dead", "create CURRENT.tmp", "rename CURRENT", "fsync folder demo"}
