"""Hits as columns: the same whether they come as arrays of one shard or as hits that were merged."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from vecsvc import columns
from vecsvc.ids import BATCH_ROWS, IDS_FILE, LOOKUP_FILE, IdColumn, IdType, id_hashes, lookup_table
from vecsvc.types import Hit

SIZE = 50


def column_of(folder: Path, ids: pa.Array, id_type: IdType) -> IdColumn:
    with pa.ipc.new_file(str(folder / IDS_FILE), pa.schema([("id", ids.type)])) as writer:
        writer.write_table(pa.table({"id": ids}), max_chunksize=BATCH_ROWS)
    np.save(folder / LOOKUP_FILE, lookup_table(id_hashes(ids)))
    return IdColumn(folder, len(ids), id_type)


def read(*parts: columns.HitColumns) -> pa.Table:
    """What a client reads of an answer of these parts."""
    table = pa.ipc.open_stream(columns.stream(parts, b"{}")).read_all()
    assert json.loads(table.schema.metadata[b"vecsvc"]) == {}
    assert table.num_rows == sum(part.rows for part in parts)
    table.validate(full=True)
    return table.replace_schema_metadata(None)


@pytest.mark.parametrize("id_type", ["int", "str"])
@pytest.mark.parametrize("empty", [0, 1, 3])
def test_arrays_and_hits_make_the_same_columns(tmp_path: Path, id_type: IdType, empty: int) -> None:
    names = list(range(100, 100 + SIZE)) if id_type == "int" else [f"row-{number}é" for number in range(SIZE)]
    ids = column_of(tmp_path, pa.array(names), id_type)
    labels = np.array([[4, 0, 49], [7, 8, 9], [3, 1, 2]], np.int64)
    distances = np.sort(np.random.default_rng(3).random((3, 3), np.float32))
    labels[1, 3 - empty :], distances[1, 3 - empty :] = -1, np.inf
    hits = [
        [
            Hit(names[label], 1.0 - float(distance), float(distance))
            for label, distance in zip(*row, strict=True)
            if label >= 0
        ]
        for row in zip(labels, distances, strict=True)
    ]
    first = read(columns.of_arrays(64, labels, distances, ids, "ip"))
    assert first.num_rows == 9 - empty
    assert first.to_pydict()["query"] == [64] * 3 + [65] * (3 - empty) + [66] * 3
    assert first.to_pydict()["rank"] == [0, 1, 2, *range(3 - empty), 0, 1, 2]
    again = read(columns.of_hits(64, hits, id_type == "int", "ip"))
    assert again.schema == first.schema
    for name in first.schema.names:
        if name == "score":
            assert first[name].to_numpy() == pytest.approx(again[name].to_numpy(), abs=1e-7)
        else:
            assert first[name] == again[name]


def test_no_hits_at_all_have_the_type_of_the_ids() -> None:
    assert read(columns.of_hits(0, [[], []], True, "l2")).schema.field("id").type == pa.int64()
    assert read(columns.of_hits(0, [[]], False, "l2")).to_pydict()["id"] == []


def test_what_is_remembered_of_places_is_not_of_others(tmp_path: Path) -> None:
    ids = column_of(tmp_path, pa.array(range(SIZE)), "int")
    for n, k in ((2, 3), (3, 2), (6, 1), (2, 3)):
        found = read(columns.of_arrays(0, np.zeros((n, k), np.int64), np.zeros((n, k), np.float32), ids, "l2"))
        assert found["query"].to_pylist() == [query for query in range(n) for _ in range(k)]
        assert found["rank"].to_pylist() == [*range(k)] * n


@pytest.mark.parametrize("length", [2, 63, 64, 65, 127, 5000])
def test_what_stands_in_the_head_may_have_any_length(tmp_path: Path, length: int) -> None:
    ids = column_of(tmp_path, pa.array(range(SIZE)), "int")
    parts = [
        columns.of_arrays(first, np.full((2, 3), first, np.int64), np.zeros((2, 3), np.float32), ids, "l2")
        for first in (0, 2)
    ]
    rest = json.dumps("x" * (length - 2)).encode()
    table = pa.ipc.open_stream(columns.stream(parts, rest)).read_all()
    assert json.loads(table.schema.metadata[b"vecsvc"]) == "x" * (length - 2)
    assert (
        table["id"].to_pylist() == [0] * 6 + [2] * 6
        and table["query"].to_pylist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    )


def test_ids_of_no_bytes_and_of_few_bytes_more_or_less_have_one_form(tmp_path: Path) -> None:
    ids = column_of(tmp_path, pa.array(["", "a", "bcd"]), "str")
    columns._form.cache_clear()
    for labels in ([0, 0], [1, 2], [2, 0]):
        found = read(columns.of_arrays(0, np.array([labels], np.int64), np.zeros((1, 2), np.float32), ids, "l2"))
        assert found["id"].to_pylist() == [["", "a", "bcd"][label] for label in labels]
    assert columns._form.cache_info().misses == 1


@pytest.mark.parametrize("limit", ["_KEPT_HITS", "_KEPT_BYTES"])
def test_answers_too_large_to_be_remembered_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    ids = column_of(tmp_path, pa.array([f"row-{number}é" for number in range(SIZE)]), "str")
    labels = np.arange(12, dtype=np.int64)[::-1].reshape(4, 3)
    distances = np.random.default_rng(3).random((4, 3), np.float32)
    small = read(columns.of_arrays(7, labels, distances, ids, "cosine"))
    columns._form.cache_clear()
    monkeypatch.setattr(columns, limit, 11)
    assert read(columns.of_arrays(7, labels, distances, ids, "cosine")) == small
    assert columns._form.cache_info().currsize == 0
    assert small["id"].to_pylist() == [f"row-{number}é" for number in range(11, -1, -1)]


def test_what_was_written_stays_when_the_next_answer_of_its_shape_is(tmp_path: Path) -> None:
    ids = column_of(tmp_path, pa.array(range(SIZE)), "int")
    distances = np.zeros((2, 3), np.float32)
    one, other = (columns.of_arrays(0, np.full((2, 3), label, np.int64), distances, ids, "l2") for label in (1, 2))
    assert read(one)["id"].to_pylist() == [1] * 6 and read(other)["id"].to_pylist() == [2] * 6
