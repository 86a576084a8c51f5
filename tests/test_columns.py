"""Hits as columns: the same whether they come as arrays of one shard or as hits that were merged."""

from __future__ import annotations

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
    first = columns.of_arrays(64, labels, distances, ids, "ip")
    assert first.num_rows == 9 - empty
    assert first.to_pydict()["query"] == [64] * 3 + [65] * (3 - empty) + [66] * 3
    assert first.to_pydict()["rank"] == [0, 1, 2, *range(3 - empty), 0, 1, 2]
    again = columns.of_hits(64, hits, id_type == "int", "ip")
    assert again.schema == first.schema
    for name in first.schema.names:
        if name == "score":
            assert first[name].to_numpy() == pytest.approx(again[name].to_numpy(), abs=1e-7)
        else:
            assert first[name] == again[name]


def test_no_hits_at_all_have_the_type_of_the_ids() -> None:
    assert columns.of_hits(0, [[], []], True, "l2").schema.field("id").type == pa.int64()
    assert columns.of_hits(0, [[]], False, "l2").to_pydict()["id"] == []


def test_what_is_remembered_of_places_is_not_of_others(tmp_path: Path) -> None:
    ids = column_of(tmp_path, pa.array(range(SIZE)), "int")
    for n, k in ((2, 3), (3, 2), (6, 1), (2, 3)):
        found = columns.of_arrays(0, np.zeros((n, k), np.int64), np.zeros((n, k), np.float32), ids, "l2")
        assert found["query"].to_pylist() == [query for query in range(n) for _ in range(k)]
        assert found["rank"].to_pylist() == [*range(k)] * n
