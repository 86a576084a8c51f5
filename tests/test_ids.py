"""Ids: the documented hash, look-up in both directions, damaged files refused."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from vecsvc import ids
from vecsvc.errors import ArtifactDamaged
from vecsvc.storage import write_array

TEXTS = [f"row-{i}-ü{'x' * (i % 7)}" for i in range(ids.BATCH_ROWS + 100)] + [""]
NUMBERS = [*range(-5, 300), ids.INT_MIN, ids.INT_MAX]


def write(folder: Path, values: list[Any], kind: pa.DataType) -> ids.IdColumn:
    array = pa.array(values, kind)
    with pa.ipc.new_file(str(folder / ids.IDS_FILE), pa.schema([("id", kind)])) as writer:
        for start in range(0, len(array), ids.BATCH_ROWS):
            piece = pa.concat_arrays([array.slice(start, ids.BATCH_ROWS)])
            writer.write_batch(pa.record_batch([piece], names=["id"]))
    write_array(folder / ids.LOOKUP_FILE, ids.lookup_table(ids.id_hashes(array)))
    return ids.IdColumn(folder, len(values), "int" if kind == pa.int64() else "str")


def test_the_hash_is_blake2b_of_utf8_or_int64_little_endian() -> None:
    assert ids.id_hash("ü") == int.from_bytes(hashlib.blake2b("ü".encode(), digest_size=8).digest(), "little")
    data = (-3).to_bytes(8, "little", signed=True)
    assert ids.id_hash(-3) == int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


@pytest.mark.parametrize(("values", "kind"), [(TEXTS[:500], pa.string()), (NUMBERS, pa.int64())])
def test_hashing_a_column_equals_hashing_each(values: list[Any], kind: pa.DataType) -> None:
    array = pa.array(["front", *values] if kind == pa.string() else [0, *values], kind).slice(1)
    assert ids.id_hashes(array).tolist() == [ids.id_hash(value) for value in values]


@pytest.mark.parametrize(("values", "kind"), [(TEXTS, pa.string()), (TEXTS[-500:], pa.string()), (NUMBERS, pa.int64())])
def test_labels_become_ids_and_ids_become_labels(tmp_path: Path, values: list[Any], kind: pa.DataType) -> None:
    column = write(tmp_path, values, kind)
    labels = [0, len(values) - 1, len(values) // 2, 0]
    assert column.of(labels) == [values[label] for label in labels]
    for label in (0, 1, len(values) - 2, len(values) - 1):
        assert column.label(values[label]) == label


def test_ids_of_another_type_or_range_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "i").mkdir()
    (tmp_path / "s").mkdir()
    numbers = write(tmp_path / "i", NUMBERS, pa.int64())
    texts = write(tmp_path / "s", TEXTS, pa.string())
    assert [numbers.label(x) for x in ("3", 2**80, 10**6)] == [None] * 3
    assert [texts.label(x) for x in (3, "row-", "x" * 1000)] == [None] * 3


def test_ids_whose_hashes_collide_are_told_apart(tmp_path: Path) -> None:
    column = write(tmp_path, ["a", "b", "c"], pa.string())
    wanted = np.uint64(ids.id_hash("b"))
    column._lookup = np.stack([np.array([wanted] * 3), np.array([0, 1, 2], dtype=np.uint64)])
    assert column.label("b") == 1


def test_a_file_of_other_length_or_type_is_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path, ["a", "b"], pa.string())
    with pytest.raises(ArtifactDamaged, match=r"id_lookup\.npy"):
        ids.IdColumn(tmp_path, 3, "str")
    with pytest.raises(ArtifactDamaged, match=r"ids\.arrow: expected int64"):
        ids.IdColumn(tmp_path, 2, "int")
    (tmp_path / ids.IDS_FILE).write_bytes(b"ARROW1")
    with pytest.raises(ArtifactDamaged, match=r"ids\.arrow: not a readable Arrow file"):
        ids.IdColumn(tmp_path, 2, "str")


@pytest.mark.parametrize("offsets", [[0, 3, 2, 4], [0, 1, 2, 2**30]], ids=["back", "beyond"])
def test_strings_that_lie_outside_their_bytes_are_refused(tmp_path: Path, offsets: list[int]) -> None:
    write(tmp_path, ["a", "b", "cd"], pa.string())
    data = (tmp_path / ids.IDS_FILE).read_bytes()
    whole, broken = (np.array(values, np.int32).tobytes() for values in ([0, 1, 2, 4], offsets))
    assert data.count(whole) == 1
    (tmp_path / ids.IDS_FILE).write_bytes(data.replace(whole, broken))
    with pytest.raises(ArtifactDamaged, match=r"ids\.arrow: has ids outside"):
        ids.IdColumn(tmp_path, 3, "str")


@pytest.mark.parametrize("kind", [pa.string(), pa.int64()], ids=str)
@pytest.mark.parametrize("claimed", [0, 8])
def test_buffers_that_are_shorter_than_their_column_are_refused(
    tmp_path: Path, kind: pa.DataType, claimed: int
) -> None:
    rows: list[Any] = [f"{i:04}" for i in range(500)] if kind == pa.string() else list(range(501))
    write(tmp_path, rows, kind)
    path = tmp_path / ids.IDS_FILE
    data = path.read_bytes()
    # A buffer is where it begins in the body, which is at 0 here, and its length.
    whole, broken = (struct.pack("<2q", 0, n) for n in (8 * 501 if kind == pa.int64() else 4 * 501, claimed))
    assert data.count(whole) == 1
    path.write_bytes(data.replace(whole, broken))
    with pytest.raises(ArtifactDamaged, match=r"ids\.arrow"):
        ids.IdColumn(tmp_path, len(rows), "int" if kind == pa.int64() else "str")


def test_ids_that_are_longer_than_usual_are_whole_in_a_column(tmp_path: Path) -> None:
    rows = [f"{i}" * 200 for i in range(100)]
    column = write(tmp_path, rows, pa.string())
    assert column.column(np.arange(100)[::-1]).to_pylist() == rows[::-1]


@pytest.mark.parametrize("whole", [True, False], ids=["int", "str"])
@pytest.mark.parametrize("n", [0, 1, 5, 900, 40_000])
def test_a_column_of_ids_is_their_list(tmp_path: Path, whole: bool, n: int) -> None:
    size = 2 * ids.BATCH_ROWS + 100
    rows: list[Any] = list(range(-5, size - 5)) if whole else [f"日本-{i}" if i else "" for i in range(size)]
    column = write(tmp_path, rows, pa.int64() if whole else pa.string())
    labels = np.random.default_rng(3).integers(0, size, n)
    made = column.column(labels)
    made.validate(full=True)
    assert made.type == (pa.int64() if whole else pa.string())
    assert made.to_pylist() == column.of(labels.tolist())
