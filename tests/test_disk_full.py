"""A full disk ends a build in one line, wherever it fills up; nothing short is ever published."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forked
import pytest
from corpora import (
    GRAPH,
    GRAPH_FILE,
    KINDS,
    answers,
    build,
    check_version,
    file_hashes,
    make_vectors,
    strays,
    write_corpus,
)
from tiny_bert import write_tiny_bert

from vecsvc.errors import StorageError
from vecsvc.storage import IndexFolder

PAGE = 4096
QUERIES = make_vectors(3, 16, seed=3)


class Disk:
    """A file system in memory whose size can be set."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(path)], capture_output=True, text=True
        )
        if done.returncode:
            path.rmdir()
            pytest.skip(f"mounting a tmpfs is not permitted here: {done.stderr.strip()}")

    def used(self) -> int:
        status = os.statvfs(self.path)
        return (status.f_blocks - status.f_bfree) * status.f_frsize

    def resize(self, size: int) -> None:
        pages = -(-size // PAGE)
        subprocess.run(["mount", "-o", f"remount,size={pages * PAGE}", str(self.path)], check=True)

    def unmount(self) -> None:
        # Lazily: an index that was mapped may live until the garbage collector comes by.
        subprocess.run(["umount", "--lazy", str(self.path)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    disk = Disk(tmp_path / "disk")
    yield disk
    disk.unmount()


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Two corpora of the same ids and other vectors, and an encoder. Their files fill several pages each."""
    folder = tmp_path_factory.mktemp("corpora")
    old, new = (write_corpus(folder / f"{seed}.parquet", n=1500, dim=16, seed=seed) for seed in (1, 2))
    return old, new, write_tiny_bert(folder / "bert", dim=16)


def settings(kind: str, bert: Path) -> dict[str, Any]:
    encoder = str(bert) if kind == "exact" else ""
    return {"kind": kind, "name": "demo", "shards": 2, "fields": "text", "encoder": encoder}


def sizes(disk: Disk, before: int, manifest: Any) -> list[int]:
    """Sizes at which the disk is full inside of each file of a build: at its beginning, middle and last page.

    The state of the build, and what comes last, take a few pages more: those are tried one by one.
    """
    encoder = manifest.encoder.files if manifest.encoder else []
    files = [file for shard in manifest.shards for file in shard.files]
    ordered = sorted([*files, *encoder], key=lambda file: "/index/" in file.path)
    found, at = [], before
    for file in ordered:
        pages = -(-file.size_bytes // PAGE)
        found += [at + PAGE * full for full in sorted({0, pages // 2, pages - 1})]
        at += PAGE * pages
    return found + [at + PAGE * more for more in range(16)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_disk_that_fills_up_in_any_file_publishes_nothing_and_what_served_serves(
    disk: Disk, corpora: tuple[Path, Path, Path], tmp_path: Path, kind: str
) -> None:
    old, new, bert = corpora
    given = settings(kind, bert)
    out = disk.path / "out"
    build(old, out, version="old", **given)
    whole = build(new, tmp_path / "whole", version="new", **given).manifest
    before, after = answers(out, QUERIES), answers(tmp_path / "whole", QUERIES)
    folder = IndexFolder(out / "demo")
    full: list[str] = []
    for size in sizes(disk, disk.used(), whole):
        disk.resize(size)
        try:
            build(new, out, version="new", **given)
        except StorageError as error:
            message = str(error)
            assert "\n" not in message and str(out) in message, message
            assert "No space left on device" in message or "read back" in message or "bytes fit" in message, message
            full.append(message)
            assert folder.current() == "old"
            assert folder.versions() == ["old"] or folder.versions() == ["old", "new"]
        for version in folder.versions():
            check_version(folder.path / version)
        assert answers(out, QUERIES) == (before if folder.current() == "old" else after)
        disk.resize(64 << 20)
        if folder.current() == "new":
            folder.rollback("old")
        folder.gc(0)
        assert folder.versions() == ["old"] and not strays(folder)
    names = ["vectors.npy", "ids.arrow", "fields.arrow"]
    # What was encoded lies there twice until the shards have it. Where that fitted, the manifest fits in its place,
    # unless an index came between.
    names += ["HISTORY"] if kind == "exact" else ["manifest.json"]
    names += {
        "exact": ["model.onnx"],
        "hnsw": ["hnsw.bin"],
        "kd_tree": ["kd_tree_bounds.npy"],
        "tp_tree": ["tp_tree_order.npy"],
        "nng": ["nng_graph.npy"],
        "faiss": ["faiss.index"],
    }[kind]
    for name in names:
        assert any(name in message for message in full), (name, sorted(set(full)))
    assert file_hashes(build(new, out, version="new", **given).manifest) == file_hashes(whole)
    assert answers(out, QUERIES) == after


def test_on_the_command_line_a_full_disk_is_one_line_and_exit_code_1(
    disk: Disk, corpora: tuple[Path, Path, Path]
) -> None:
    old, new, _ = corpora
    out = disk.path / "out"

    vecsvc = forked.run
    flags = ["--out", str(out), "--name", "demo", "--shards", "2", "--certificate-queries", "8", "--fields", "text"]
    build(old, out, version="old", kind=GRAPH, name="demo")
    before, empty = answers(out, QUERIES), disk.used()
    cases = [(9, GRAPH, "npy"), (32, GRAPH, "arrow"), (100, GRAPH, GRAPH_FILE), (100, "faiss", "faiss.index")]
    for more, kind, file in cases:
        disk.resize(empty + more * PAGE)
        done = vecsvc("build-index", str(new), "--kind", kind, "--version", "new", *flags)
        lines = done.stderr.splitlines()
        assert done.returncode == 1 and done.stdout == "", done.stderr
        assert [line.startswith("vecsvc: ") for line in lines] == [False] * (len(lines) - 1) + [True], done.stderr
        assert "Traceback" not in done.stderr and file in lines[-1] and str(out) in lines[-1], lines[-1]
        assert IndexFolder(out / "demo").versions() == ["old"] and answers(out, QUERIES) == before
    disk.resize(64 << 20)
    done = vecsvc("build-index", str(new), "--kind", "faiss", "--version", "new", "--resume", *flags)
    assert done.returncode == 0 and "resumed: ingest was done before" in done.stdout, done.stderr
    assert vecsvc("verify", str(out)).returncode == 0 and vecsvc("gc", str(out), "--keep", "0").returncode == 0
    assert IndexFolder(out / "demo").versions() == ["new"] and not strays(IndexFolder(out / "demo"))
