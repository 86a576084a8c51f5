"""One shard: the contract of k where k exist, answered row by row, and encoders that hold nothing unhashed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_bert import write_tiny_bert

from index_builders.pipeline import build_index
from vecsvc import indexes
from vecsvc.catalog import Served
from vecsvc.config import BuildSettings, ServeSettings
from vecsvc.errors import ArtifactDamaged
from vecsvc.ids import BATCH_ROWS
from vecsvc.shard import FieldStore
from vecsvc.storage import IndexFolder


def built(tmp_path: Path, table: pa.Table, params: dict[str, str] | None = None, **settings: str) -> IndexFolder:
    pq.write_table(table, tmp_path / "corpus.parquet")
    build_index(str(tmp_path / "corpus.parquet"), BuildSettings(out=str(tmp_path / "out"), **settings), params)
    return IndexFolder(tmp_path / "out" / "corpus")


def test_a_query_that_comes_back_short_does_not_change_the_others_of_its_batch(tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    crowd = rng.standard_normal((2000, 8)).astype(np.float32)
    lonely = (100 + rng.standard_normal((3, 8)) * 0.01).astype(np.float32)  # a list of their own in the inverted file
    vectors = np.concatenate([crowd, lonely])
    table = pa.table({"id": np.arange(len(vectors)), "vector": list(vectors)})
    folder = built(tmp_path, table, {"factory": "IVF16,Flat"}, kind="faiss", metric="l2")
    served = Served(folder, str(folder.current()), ServeSettings())
    shard, params = served.shards[0], indexes.search_params("faiss", nprobe=1)
    batch = np.stack([crowd[0], lonely[0]])
    together, alone = shard.search(batch, 10, params), shard.search(batch[:1], 10, params)
    assert np.array_equal(together.labels[0], alone.labels[0]) and alone.strategy == "faiss"
    assert together.strategy == "mixed" and shard.search(batch[1:], 10, params).strategy == "exact"
    assert (together.labels[1] >= 0).all(), "the lonely one's list holds three, and ten exist"
    deep = shard.search(batch[:1], 3, params, rerank_depth=1000)
    assert deep.strategy == "faiss", "a pool that is not full is no reason to compare everything"
    served.retire()


def test_an_encoder_folder_with_a_file_that_was_never_hashed_is_refused_by_name(tmp_path: Path) -> None:
    encoder = write_tiny_bert(tmp_path / "encoder")
    table = pa.table({"id": [1, 2, 3], "text": ["list files", "copy a file", "read"]})
    folder = built(tmp_path, table, encoder=str(encoder))
    version = str(folder.current())
    Served(folder, version, ServeSettings()).retire()
    added = folder.path / version / "encoder" / "sentence_bert_config_2.json"
    added.write_text("{}")
    with pytest.raises(ArtifactDamaged, match=r"sentence_bert_config_2\.json: is not in the manifest"):
        Served(folder, version, ServeSettings())


def test_fields_read_from_the_mapped_bytes_are_what_arrow_says(tmp_path: Path) -> None:
    rows = 2 * BATCH_ROWS + 7
    numbers = range(rows)
    table = pa.table(
        {
            "text": [f"日本{i}" for i in numbers],
            "perhaps": [None if i % 7 == 0 else str(i) for i in numbers],
            "empty": [""] * rows,
            "whole": list(numbers),
            "large": pa.array([2**63 + i for i in numbers], pa.uint64()),
            "real": [i / 8 for i in numbers],
            "short": pa.array([i / 3 for i in numbers], pa.float32()),
            "flag": [i % 2 == 0 for i in numbers],
            "list": [[i, None] for i in numbers],
        }
    )
    with pa.ipc.new_file(str(tmp_path / "fields.arrow"), table.schema) as writer:
        for batch in table.combine_chunks().to_batches(max_chunksize=BATCH_ROWS):
            writer.write_batch(batch)
    labels = [0, 1, 7, BATCH_ROWS - 1, BATCH_ROWS, 2 * BATCH_ROWS, rows - 1]
    found = FieldStore(tmp_path / "fields.arrow", rows, dict.fromkeys(table.column_names, "")).of(labels)
    for label, fields in zip(labels, found, strict=True):
        expected = {name: table[name][label].as_py() for name in table.column_names}
        assert fields == expected
        assert [type(value) for value in fields.values()] == [type(value) for value in expected.values()]
