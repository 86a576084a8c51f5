"""Versions on disk: atomic publishing, rollback, gc that never touches what serves, names that never become paths."""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from vecsvc import storage
from vecsvc.errors import ArtifactDamaged, ConfigError, StorageError, UnknownVersion, VersionExists
from vecsvc.seal import sealed
from vecsvc.storage import IndexFolder, Lease

HOLD = """
import sys
from pathlib import Path
from vecsvc.storage import Lease
lease = Lease.take(Path(sys.argv[1]), exclusive=sys.argv[2] == "x")
print("held" if lease else "refused", flush=True)
sys.stdin.read()
"""


def publish(index: IndexFolder, version: str) -> None:
    staging = index.path / f"{storage.STAGING}{version}"
    staging.mkdir(parents=True)
    storage.write_file(staging / storage.MANIFEST, version.encode())
    index.publish(staging, version)
    index.serve(version)


@pytest.fixture
def index(tmp_path: Path) -> IndexFolder:
    index = IndexFolder(tmp_path / "demo")
    for version in ("v1", "v2", "v3"):
        publish(index, version)
    return index


def test_what_is_published_last_serves_and_versions_keep_their_order(index: IndexFolder) -> None:
    assert index.current() == "v3"
    assert index.versions() == ["v1", "v2", "v3"]
    assert (index.path / storage.CURRENT).read_bytes() == b"v3\n"


def test_a_version_is_never_written_twice(index: IndexFolder) -> None:
    with pytest.raises(VersionExists, match="v2 exists"):
        publish(index, "v2")
    assert (index.path / "v2" / storage.MANIFEST).read_bytes() == b"v2"


def test_rollback_goes_one_version_back_each_time(index: IndexFolder) -> None:
    assert index.rollback() == ("v3", "v2")
    assert index.rollback() == ("v2", "v1")
    with pytest.raises(UnknownVersion, match=r"no version before v1; say which of v2, v3 is to serve"):
        index.rollback()
    assert index.rollback("v3") == ("v1", "v3")
    with pytest.raises(UnknownVersion, match="no version 'v9'; there are: v1, v2, v3"):
        index.rollback("v9")


def test_rollback_never_goes_to_what_was_rolled_back(index: IndexFolder) -> None:
    assert index.rollback() == ("v3", "v2")
    publish(index, "v4")
    assert index.before("v4") == ["v2", "v3", "v1"]
    assert index.rollback() == ("v4", "v2") and index.rollback() == ("v2", "v1")
    assert index.rollback("v3") == ("v1", "v3") and index.rollback() == ("v3", "v1")
    assert index.history() == ["v1", "v2", "v3", "v2", "v4", "v2", "v1", "v3", "v1"]


def test_gc_keeps_the_way_back_then_what_served_last_then_what_never_did(index: IndexFolder) -> None:
    index.rollback("v1")
    publish(index, "v4")
    staging = index.path / f"{storage.STAGING}v5"
    staging.mkdir()
    storage.write_file(staging / storage.MANIFEST, b"v5")
    index.publish(staging, "v5")
    gone = [index.gc(keep) for keep in (3, 2, 1)]
    assert gone == [["v5"], ["v2"], ["v3"]] and index.rollback() == ("v4", "v1")


def test_what_served_is_followed_past_versions_that_are_gone(index: IndexFolder) -> None:
    shutil.rmtree(index.path / "v2")
    assert index.before("v3") == ["v1"] and index.rollback() == ("v3", "v1")


def test_a_rollback_does_not_go_to_what_was_rolled_back_though_where_it_went_is_gone(index: IndexFolder) -> None:
    index.rollback()
    publish(index, "v4")
    shutil.rmtree(index.path / "v2")
    assert index.rollback() == ("v4", "v1")


def test_a_name_that_comes_again_is_another_version(index: IndexFolder) -> None:
    for _ in range(3):
        shutil.rmtree(index.path / "v1")
        publish(index, "v1")
        assert index.rollback() == ("v1", "v3")
    assert index.rollback() == ("v3", "v2")


def test_what_was_put_to_serve_later_is_not_before(index: IndexFolder) -> None:
    assert index.before("v2") == ["v1"] and index.before("v1") == [] and index.before("v9") == ["v3", "v2", "v1"]


def test_a_crash_between_the_record_and_current_leaves_the_way_back(
    index: IndexFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dying(point: str) -> None:
        if point == "rename CURRENT":
            raise KeyboardInterrupt

    monkeypatch.setattr(storage, "failpoint", dying)
    with pytest.raises(KeyboardInterrupt):
        publish(index, "v4")
    monkeypatch.undo()
    assert index.current() == "v3" and index.history()[-2:] == ["v4", "v3"]
    assert index.rollback() == ("v3", "v2")


@pytest.mark.parametrize("name", ["CURRENT", "HISTORY", "CURRENT.tmp", "HISTORY.tmp"])
def test_a_version_is_not_named_as_the_files_beside_it(name: str) -> None:
    with pytest.raises(ConfigError, match="name of a file beside the versions"):
        storage.check_version(name)


def test_a_current_changed_by_hand_or_a_crash_before_it_was_written_counts_for_what_it_says(index: IndexFolder) -> None:
    (index.path / storage.CURRENT).write_bytes(b"v2\n")
    assert index.before("v2") == ["v3", "v1"] and index.rollback() == ("v2", "v1")


@pytest.mark.parametrize("content", [None, b"", b"\xff\n", b"../v1\n" * 6000, b"v1"])
def test_where_nothing_can_be_read_of_what_served_versions_served_in_the_order_of_their_making(
    index: IndexFolder, content: bytes | None
) -> None:
    record = index.path / storage.HISTORY
    record.unlink()
    if content is None:
        record.mkdir()
    else:
        record.write_bytes(content)
    assert index.history() == ["v1", "v2", "v3"] and index.before("v3") == ["v2", "v1"]
    if content is None:
        record.rmdir()
    assert index.rollback() == ("v3", "v2")
    assert record.read_bytes() == b"v1\nv2\nv3\nv2\n"


def test_a_pipe_in_the_place_of_the_record_holds_nobody_up(index: IndexFolder) -> None:
    (index.path / storage.HISTORY).unlink()
    os.mkfifo(index.path / storage.HISTORY)
    assert index.rollback() == ("v3", "v2") and (index.path / storage.HISTORY).is_file()


def test_the_record_of_what_served_is_bounded_and_keeps_the_way_back(index: IndexFolder) -> None:
    index.rollback()
    publish(index, "v4")
    for _ in range(storage.MAX_HISTORY):
        index.serve("v2")
        index.serve("v4")
    assert len((index.path / storage.HISTORY).read_bytes().split()) <= storage.MAX_HISTORY
    assert index.rollback() == ("v4", "v2") and index.rollback() == ("v2", "v1")


@pytest.mark.parametrize("content", [b"", b"../v1\n", b"v9\nv1\n", b"\xff\xfe\n"])
def test_a_damaged_current_is_refused_by_name_and_mended_by_rollback(index: IndexFolder, content: bytes) -> None:
    (index.path / storage.CURRENT).write_bytes(content)
    with pytest.raises(ArtifactDamaged, match="CURRENT"):
        index.current()
    assert index.rollback() == ("none", "v3")


def test_gc_keeps_current_and_the_newest(index: IndexFolder) -> None:
    publish(index, "v4")
    index.rollback("v1")
    assert index.gc(keep=1) == ["v2", "v3"]
    assert index.versions() == ["v1", "v4"]
    assert sorted(p.name for p in index.path.iterdir()) == ["CURRENT", storage.HISTORY, "v1", "v4"]


def test_gc_never_touches_what_another_process_serves(index: IndexFolder) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(index.path / "v1"), "s"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        assert index.gc(keep=0) == ["v2"]
        holder.kill()
        holder.wait()
        assert index.gc(keep=0) == ["v1"]  # the kernel let go of it


def test_sweep_deletes_dead_builds_and_leaves_living_ones(index: IndexFolder) -> None:
    dead, living = (index.path / f"{storage.STAGING}{name}" for name in ("dead", "living"))
    for folder in (dead, living):
        (folder / "shards").mkdir(parents=True)
        (index.path / folder.name.replace(storage.STAGING, storage.STATE)).write_bytes(b"{}")
    lease = Lease.take(living, exclusive=True)
    assert lease is not None
    assert index.sweep() == [dead.name]
    assert sorted(p.name for p in index.path.glob(".*")) == [f"{storage.STAGING}living", f"{storage.STATE}living"]
    lease.release()


def test_leases_are_shared_or_exclusive_and_turn_from_one_to_the_other(tmp_path: Path) -> None:
    first = Lease.take(tmp_path, exclusive=True)
    assert first is not None
    assert Lease.take(tmp_path, exclusive=False) is None
    first.share()
    second = Lease.take(tmp_path, exclusive=False)
    assert second is not None
    assert Lease.take(tmp_path, exclusive=True) is None
    first.release()
    first.release()
    second.release()
    assert Lease.take(tmp_path / "gone", exclusive=False) is None


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "A", "a b", "a\0", "%2e%2e", "x" * 65, "-a", "ä", "a\n", ".hidden"]
)
def test_names_that_are_no_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="index name"):
        storage.check_name(name)
    if name not in ("A",):
        with pytest.raises(ConfigError, match="version"):
            storage.check_version(name)


def test_a_folder_without_indexes_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="build one: vecsvc build-index"):
        storage.index_folders(tmp_path)
    with pytest.raises(ConfigError, match="is no folder"):
        storage.index_folders(tmp_path / "none")


def test_a_directory_means_itself_or_the_indexes_in_it(index: IndexFolder) -> None:
    assert storage.index_folders(index.path) == [index]
    assert storage.index_folders(index.path.parent) == [index]


def test_arrays_are_appended_and_read_back_read_only(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    writer = storage.ArrayWriter(path, np.float32, (3,))
    rows = np.arange(30_000, dtype=np.float32).reshape(-1, 3)
    for start in range(0, len(rows), 777):
        writer.write(rows[start : start + 777])
    writer.close()
    read = storage.open_array(path, np.float32, (None, 3))
    assert np.array_equal(read, rows) and not read.flags.writeable
    storage.release_pages(read)
    assert np.array_equal(read, rows)
    base = read
    while base is not None and not isinstance(base, mmap.mmap):
        base = base.base
    assert base is not None, "the array is mapped"


@pytest.mark.parametrize(
    ("dtype", "shape", "message"),
    [(np.float64, (2, 3), "holds float32"), (np.float32, (3, 3), "has shape"), (np.float32, (6,), "has shape")],
)
def test_an_array_that_is_not_what_was_expected_is_refused(
    tmp_path: Path, dtype: type, shape: tuple[int, ...], message: str
) -> None:
    storage.write_array(tmp_path / "a.npy", np.zeros((2, 3), dtype=np.float32))
    with pytest.raises(ArtifactDamaged, match=message):
        storage.open_array(tmp_path / "a.npy", dtype, shape)


def test_a_pickled_array_is_not_unpickled(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ArtifactDamaged, match=r"a\.npy"):
        storage.open_array(tmp_path / "a.npy", np.float32, (1,))


def test_an_error_of_the_disk_becomes_one_line_with_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(point: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage, "failpoint", full)
    with pytest.raises(StorageError, match=r"cannot write .*/a: No space left on device"):
        storage.write_file(tmp_path / "a", b"x")


def dated(index: IndexFolder, **times: str) -> None:
    """Versions whose manifests say when they were made, on a disk whose times say the contrary."""
    for number, (version, created) in enumerate(times.items()):
        file = index.path / version / storage.MANIFEST
        file.write_bytes(sealed(b'{\n  "created": "' + created.encode() + b'"\n}'))
        os.utime(file, (1e9 - number, 1e9 - number))


def test_a_copy_that_lost_the_files_times_keeps_the_order_of_versions(index: IndexFolder, tmp_path: Path) -> None:
    dated(index, v3="2026-01-01T00:00:00Z", v1="2026-01-01T00:00:00.250Z", v2="2026-01-01T01:00:01+01:00")
    (index.path / storage.CURRENT).write_bytes(b"v2\n")
    (index.path / storage.HISTORY).unlink()
    copy = IndexFolder(shutil.copytree(index.path, tmp_path / "copy", copy_function=shutil.copyfile))
    for folder in (index, copy):
        assert folder.versions() == ["v3", "v1", "v2"] and folder.rollback() == ("v2", "v1")
        assert folder.gc(keep=0) == ["v3", "v2"]


@pytest.mark.parametrize("damage", ["truncated", "a bit in its date", "no date", "no time zone", "unreadable"])
def test_a_damaged_manifest_is_ordered_by_its_file_and_stands_in_nobodys_way(index: IndexFolder, damage: str) -> None:
    dated(index, v1="2026-01-01T00:00:00Z", v2="2026-01-02T00:00:00Z", v3="2026-01-03T00:00:00Z")
    file = index.path / "v2" / storage.MANIFEST
    data = file.read_bytes()
    file.write_bytes(
        {
            "truncated": data[:-1],
            "a bit in its date": data.replace(b"2026", b"6026"),
            "no date": sealed(b'{\n  "created": "yesterday"\n}'),
            "no time zone": sealed(b'{\n  "created": "0001-01-01T00:00:00"\n}'),
        }.get(damage, data)
    )
    if damage == "unreadable":
        file.unlink()
        os.mkfifo(file)
    os.utime(file, (4e9, 4e9))
    (index.path / storage.HISTORY).unlink()
    assert index.versions() == ["v1", "v3", "v2"]
    assert index.rollback() == ("v3", "v1") and index.gc(keep=1) == ["v2"]


def test_replacing_a_file_survives_what_an_earlier_crash_left(tmp_path: Path) -> None:
    (tmp_path / "a.tmp").write_bytes(b"half")
    storage.replace_file(tmp_path / "a", b"whole")
    assert (tmp_path / "a").read_bytes() == b"whole" and not (tmp_path / "a.tmp").exists()


def test_gc_after_a_rollback_keeps_the_way_back_and_not_what_was_rolled_away_from(index: IndexFolder) -> None:
    index.rollback()
    assert index.gc(keep=1) == ["v3"]
    assert index.versions() == ["v1", "v2"] and index.rollback() == ("v2", "v1")


def test_an_array_in_fortran_order_is_not_what_a_kernel_reads(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.asfortranarray(np.ones((3, 4), np.float32)))
    for mapped in (True, False):
        with pytest.raises(ArtifactDamaged, match=r"a\.npy: is in Fortran order"):
            storage.open_array(tmp_path / "a.npy", np.float32, (3, 4), mmap=mapped)
