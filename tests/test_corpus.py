"""Promises of the corpus reader: what it reads, what it refuses and how it says so, and what it costs."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.parquet.encryption as pe
import pytest

import index_builders.corpus as corpus_module
from index_builders.corpus import Batch, Corpus, open_corpus
from index_builders.corpus_rows import MAX_ID_BYTES
from vecsvc.errors import BadRow, CorpusError, CorpusUnreadable, MissingColumn, VecsvcError
from vecsvc.ids import id_hash, id_hashes
from vecsvc.types import MAX_ABS, MAX_DIM

F32 = pa.list_(pa.float32())


def write(path: Path, columns: dict[str, Any], **options: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, **options)
    return str(path)


def rows_of(n: int = 4, dim: int = 2, first: int = 0) -> dict[str, Any]:
    """A small corpus with string ids r0, r1, ... and the vectors (1, 2), (3, 4), ..."""
    vectors = np.arange(1, n * dim + 1, dtype=np.float32).reshape(n, dim)
    return {"id": [f"r{first + i}" for i in range(n)], "vector": pa.array(list(vectors), F32)}


def load(source: str, batch_rows: int = 3, metric: Any = "l2", **options: Any) -> tuple[Corpus, list[Batch]]:
    corpus = open_corpus(source, metric=metric, **options)
    return corpus, list(corpus.read_batches(batch_rows))


def vectors_of(batches: list[Batch]) -> np.ndarray:
    return np.concatenate([batch.vectors for batch in batches if batch.vectors is not None])


def ids_of(batches: list[Batch]) -> list[Any]:
    return [id for batch in batches for id in batch.ids.to_pylist()]


def refusal(kind: type[VecsvcError], source: str, *words: str, **options: Any) -> str:
    """The one line of the error that opening and reading ends in; it holds every word."""
    with pytest.raises(kind) as caught:
        load(source, **options)
    message = str(caught.value)
    assert type(caught.value) is kind
    assert "\n" not in message
    for word in words:
        assert word in message, message
    return message


# ------------------------------------------------------------------------------------------------ hashes


def test_the_hash_of_an_id_is_blake2b_of_its_utf8_or_its_little_endian_int64() -> None:
    assert id_hash("a") == int.from_bytes(hashlib.blake2b(b"a", digest_size=8).digest(), "little")
    assert id_hash("é") == int.from_bytes(hashlib.blake2b("é".encode(), digest_size=8).digest(), "little")
    assert id_hash(-2) == int.from_bytes(hashlib.blake2b(b"\xfe" + b"\xff" * 7, digest_size=8).digest(), "little")
    assert id_hash(7) != id_hash("7")
    # Taken from `b2sum -l 64`. Shards are chosen by it: another value would lose the rows of every older index.
    assert id_hash("doc-1") == 0x41F5345F287AF456
    assert id_hash(1) == 0xFD0529B07BBC0433


@pytest.mark.parametrize("kind", [pa.int64(), pa.int16(), pa.string(), pa.large_string()], ids=str)
def test_hashes_of_an_array_are_those_of_its_ids(kind: pa.DataType) -> None:
    ids: list[Any] = [0, 1, -1, 300, -32768] if pa.types.is_integer(kind) else ["", "a", "é\0x", "r" * 600, " "]
    array = pa.array([ids[0], *ids, ids[0]], kind)[1:-1]  # a slice, so that its offset is not 0
    hashes = id_hashes(array)
    assert hashes.dtype == np.uint64
    assert hashes.tolist() == [id_hash(id) for id in ids]
    assert id_hashes(array[:0]).shape == (0,)


# ----------------------------------------------------------------------------------------------- reading


def test_a_corpus_says_what_it_holds_before_it_is_read(tmp_path: Path) -> None:
    columns = {**rows_of(), "year": pa.array([1, 2, 3, 4], pa.int16()), "text": ["a", "b", "c", "d"]}
    source = write(tmp_path / "c.parquet", columns)
    corpus = open_corpus(source, metric="cosine", fields="year")
    assert (corpus.path, corpus.rows, corpus.id_type, corpus.dim) == (source, 4, "str", 2)
    assert (corpus.has_vectors, corpus.vector_dtype) == (True, "float32")
    assert corpus.fields == pa.schema([("year", pa.int16())])
    assert corpus.columns == {
        "id": "string",
        "vector": "list<element: float>",
        "year": "int16",
        "text": "string",
    }


def test_batches_carry_rows_in_order_with_number_id_hash_vector_and_fields(tmp_path: Path) -> None:
    source = write(tmp_path / "c.parquet", {**rows_of(7), "year": list(range(7))})
    corpus, batches = load(source, 3, fields="year")
    assert [batch.first_row for batch in batches] == [0, 3, 6]
    assert ids_of(batches) == [f"r{i}" for i in range(7)]
    assert np.concatenate([b.hashes for b in batches]).tolist() == [id_hash(f"r{i}") for i in range(7)]
    assert np.array_equal(vectors_of(batches), np.arange(1, 15, dtype=np.float32).reshape(7, 2))
    assert all(b.fields is not None and b.fields.schema == corpus.fields and b.texts is None for b in batches)
    assert pa.Table.from_batches([b.fields for b in batches])["year"].to_pylist() == list(range(7))
    assert all(b.vectors is not None and b.vectors.flags.c_contiguous for b in batches)


def test_a_corpus_can_be_read_again(tmp_path: Path) -> None:
    corpus, batches = load(write(tmp_path / "c.parquet", rows_of()))
    assert ids_of(list(corpus.read_batches(100))) == ids_of(batches)


def test_no_fields_are_none(tmp_path: Path) -> None:
    corpus, batches = load(write(tmp_path / "c.parquet", rows_of()))
    assert len(corpus.fields) == 0
    assert [b.fields for b in batches] == [None, None]


LISTS = {
    "list": lambda value: pa.list_(value),
    "large_list": lambda value: pa.large_list(value),
    "fixed_size_list": lambda value: pa.list_(value, 3),
}


@pytest.mark.parametrize("container", LISTS)
@pytest.mark.parametrize(("value", "dtype"), [("float16", "float16"), ("float32", "float32"), ("float64", "float32")])
def test_vectors_of_every_list_and_float_arrive_as_float32_or_float16(
    tmp_path: Path, container: str, value: str, dtype: str
) -> None:
    expected = np.random.default_rng(7).standard_normal((10, 3)).astype(value)
    column = pa.array(list(expected), LISTS[container](getattr(pa, value)()))
    source = write(tmp_path / "c.parquet", {"id": list(range(10)), "vector": column})
    corpus, batches = load(source, 4, "cosine")
    assert (corpus.vector_dtype, corpus.dim) == (dtype, 3)
    assert vectors_of(batches).dtype == np.dtype(dtype)
    assert np.array_equal(vectors_of(batches), expected.astype(dtype))


@pytest.mark.parametrize("seed", range(12))
def test_content_does_not_depend_on_batches_row_groups_files_or_list_type(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    n, dim = int(rng.integers(1, 400)), int(rng.integers(1, 9))
    kind = [pa.float16(), pa.float32(), pa.float64()][seed % 3]
    container = [pa.list_(kind), pa.large_list(kind), pa.list_(kind, dim)][int(rng.integers(3))]
    vectors = rng.standard_normal((n, dim)).astype({16: np.float16, 32: np.float32, 64: np.float64}[kind.bit_width])
    ids = [f"id{i}" for i in rng.permutation(n)] if seed % 2 else rng.permutation(n).tolist()
    tags = [None if rng.random() < 0.2 else [int(x) for x in range(rng.integers(4))] for _ in range(n)]
    columns = {"id": pa.array(ids), "vector": pa.array(list(vectors), container), "tags": pa.array(tags)}
    if seed % 4 == 1:
        columns["id"] = columns["id"].dictionary_encode()
    table = pa.table(columns)
    cuts = sorted({0, n, *rng.integers(0, n + 1, size=int(rng.integers(0, 4))).tolist()})
    for i, (start, end) in enumerate(itertools.pairwise(cuts)):
        pq.write_table(
            table[start:end],
            tmp_path / f"{i}.parquet",
            row_group_size=int(rng.integers(1, n + 1)),
            data_page_size=int(rng.integers(16, 4096)),
            use_dictionary=bool(rng.integers(2)),
            data_page_version=str(rng.choice(["1.0", "2.0"])),
            compression=str(rng.choice(["none", "snappy", "zstd"])),
            write_page_checksum=bool(rng.integers(2)),
        )
    batch_rows = int(rng.integers(1, n + 10))
    corpus, batches = load(str(tmp_path), batch_rows, "cosine", fields="*")
    assert corpus.rows == n
    assert all(1 <= len(b.ids) <= batch_rows for b in batches)
    assert [b.first_row for b in batches] == np.cumsum([0, *(len(b.ids) for b in batches)])[:-1].tolist()
    assert ids_of(batches) == ids
    assert all(len(b.ids) == len(b.hashes) == len(b.vectors) == b.fields.num_rows for b in batches)  # type: ignore
    expected = vectors if kind == pa.float16() else vectors.astype(np.float32)
    assert np.array_equal(vectors_of(batches), expected)
    assert pa.Table.from_batches([b.fields for b in batches])["tags"].to_pylist() == tags


def test_rows_of_many_dimensions_come_fewer_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_module, "MAX_BATCH_BYTES", 100)
    _, batches = load(write(tmp_path / "c.parquet", rows_of(9, dim=8)), 1000)
    assert [len(b.ids) for b in batches] == [3, 3, 3]
    monkeypatch.setattr(corpus_module, "MAX_BATCH_BYTES", 1)
    _, batches = load(write(tmp_path / "c.parquet", rows_of(2, dim=8)), 1000)
    assert [len(b.ids) for b in batches] == [1, 1]


@pytest.mark.parametrize(
    ("column", "expected", "kind"),
    [
        (pa.array([3, 1], pa.uint8()), [3, 1], "int"),
        (pa.array([2**63 - 1, 0], pa.uint64()), [2**63 - 1, 0], "int"),
        (pa.array([-(2**63), 1], pa.int64()), [-(2**63), 1], "int"),
        (pa.array(["b", ""], pa.large_string()), ["b", ""], "str"),
        (pa.array(["b", "é\n"], pa.string_view()), ["b", "é\n"], "str"),
        (pa.array(["b", "a"]).dictionary_encode(), ["b", "a"], "str"),
        (pa.array(["é" * (MAX_ID_BYTES // 2), "a"]), ["é" * (MAX_ID_BYTES // 2), "a"], "str"),
    ],
    ids=lambda value: str(value.type) if isinstance(value, pa.Array) else "",
)
def test_ids_of_every_integer_and_string_type_arrive_as_int64_or_string(
    tmp_path: Path, column: pa.Array, expected: list[Any], kind: str
) -> None:
    corpus, batches = load(write(tmp_path / "c.parquet", {**rows_of(2), "id": column}))
    assert corpus.id_type == kind
    assert {b.ids.type for b in batches} == {pa.int64() if kind == "int" else pa.string()}
    assert ids_of(batches) == expected
    assert batches[0].hashes.tolist() == [id_hash(id) for id in expected]


def test_texts_are_read_where_there_are_no_vectors_and_may_be_empty(tmp_path: Path) -> None:
    for i, kind in enumerate([pa.string(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())]):
        column = pa.array(["é", "", "c", ""], kind)
        corpus, batches = load(write(tmp_path / f"{i}.parquet", {"id": [1, 2, 3, 4], "text": column}), metric="cosine")
        assert (corpus.has_vectors, corpus.dim, corpus.vector_dtype) == (False, None, None)
        assert [b.texts for b in batches] == [["é", "", "c"], [""]]
        assert all(b.vectors is None for b in batches)


def test_a_bad_row_of_a_text_corpus_is_refused_before_the_first_batch(tmp_path: Path) -> None:
    source = write(tmp_path / "c.parquet", {"id": [1, 2, 3, 1], "text": ["a"] * 4})
    with pytest.raises(BadRow, match=r"row 3 \(id 1\)"):
        next(open_corpus(source, metric="l2").read_batches(1))


# ----------------------------------------------------------------------------------------------- columns


@pytest.mark.parametrize(
    ("names", "options", "chosen"),
    [
        (["vector", "emb", "embedding"], {}, "vector"),
        (["embedding", "emb"], {}, "emb"),
        (["embedding"], {}, "embedding"),
        (["vector", "emb", "other"], {"vector_column": "other"}, "other"),
    ],
)
def test_the_vector_column_is_the_named_one_or_the_first_known_name(
    tmp_path: Path, names: list[str], options: dict[str, str], chosen: str
) -> None:
    columns = {name: pa.array([[float(i)]], F32) for i, name in enumerate(names)}
    _, batches = load(write(tmp_path / "c.parquet", {"id": [1], **columns}), **options)
    assert vectors_of(batches).tolist() == [[names.index(chosen)]]


def test_named_columns_for_ids_and_texts(tmp_path: Path) -> None:
    source = write(tmp_path / "c.parquet", {"id": [None], "key": ["k"], "text": [None], "body": ["b"]})
    _, batches = load(source, id_column="key", text_column="body")
    assert (ids_of(batches), batches[0].texts) == (["k"], ["b"])


def test_vectors_win_over_texts(tmp_path: Path) -> None:
    source = write(tmp_path / "c.parquet", {**rows_of(1), "text": [None]})
    corpus, batches = load(source, text_column="text")
    assert corpus.has_vectors
    assert batches[0].texts is None


def test_star_stores_all_but_ids_and_vectors_in_their_types(tmp_path: Path) -> None:
    columns = {
        **rows_of(2),
        "text": ["a", "b"],
        "score": pa.array([1, None], pa.decimal128(5, 2)),
        "lang": pa.array(["de", None]).dictionary_encode(),
        "when": pa.array([1, 2], pa.timestamp("ms", "UTC")),
        "nested.name": [{"x": [1]}, None],
    }
    corpus, batches = load(write(tmp_path / "c.parquet", columns), fields="*")
    expected = pa.table(columns).drop(["id", "vector"])
    assert corpus.fields.names == ["text", "score", "lang", "when", "nested.name"]
    assert corpus.fields.field("when").type == pa.timestamp("ms", "UTC")
    assert pa.types.is_dictionary(corpus.fields.field("lang").type)
    assert pa.Table.from_batches([b.fields for b in batches]).to_pylist() == expected.to_pylist()


def test_fields_may_have_reserved_names_and_be_named_twice(tmp_path: Path) -> None:
    columns = {"key": [1], "id": ["x"], "emb": pa.array([[1.0]], F32), "vector": [5], "key.x": [6]}
    source = write(tmp_path / "c.parquet", columns)
    options = {"id_column": "key", "vector_column": "emb"}
    _, batches = load(source, fields=" vector,id ,key.x, vector,", **options)
    assert batches[0].fields is not None
    assert batches[0].fields.to_pylist() == [{"vector": 5, "id": "x", "key.x": 6}]
    corpus, _ = load(source, fields="key,emb", **options)
    assert corpus.fields.names == ["key", "emb"]


@pytest.mark.parametrize(
    ("options", "missing"),
    [
        ({"id_column": "key"}, "'key'"),
        ({"vector_column": "v"}, "'v'"),
        ({"text_column": "body"}, "'body'"),
        ({"fields": "year,nope"}, "'nope'"),
        ({"fields": "*,year"}, "'*'"),
    ],
)
def test_a_named_column_that_is_missing_is_refused_with_those_that_exist(
    tmp_path: Path, options: dict[str, str], missing: str
) -> None:
    source = write(tmp_path / "c.parquet", {**rows_of(1), "year": [1]})
    refusal(MissingColumn, source, "c.parquet", f"no column {missing}", "'id', 'vector', 'year'", "--", **options)


def test_a_corpus_without_ids_or_without_vectors_and_texts_is_refused(tmp_path: Path) -> None:
    vector = {"vector": pa.array([[1.0]], F32)}
    refusal(MissingColumn, write(tmp_path / "a.parquet", vector), "no column 'id'", "it has 'vector'", "--id-column")
    message = refusal(MissingColumn, write(tmp_path / "b.parquet", {"id": [1], "x": [1]}), "vector, emb, embedding")
    assert "'id', 'x'" in message
    assert "--text-column" in message


def test_a_column_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array([1]), pa.array([2]), pa.array([[1.0]], F32)], ["id", "id", "vector"])
    pq.write_table(table, tmp_path / "c.parquet")
    refusal(CorpusError, str(tmp_path / "c.parquet"), "more than one column 'id'")


@pytest.mark.parametrize(
    ("column", "words"),
    [
        (pa.array([1.5]), "double"),
        (pa.array([True]), "bool"),
        (pa.array([b"x"]), "binary"),
        (pa.array([[1]]), "list"),
        (pa.array([b"x"]).dictionary_encode(), "dictionary<values=binary"),
    ],
    ids=str,
)
def test_ids_of_other_types_are_refused_with_the_remedy(tmp_path: Path, column: pa.Array, words: str) -> None:
    source = write(tmp_path / "c.parquet", {**rows_of(1), "id": column})
    refusal(CorpusError, source, "'id'", "integers or strings", words, "cast")


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.int8()),
        pa.list_(pa.decimal128(5, 2)),
        pa.list_(pa.list_(pa.float32())),
        pa.list_view(pa.float32()),
        pa.float32(),
        pa.string(),
    ],
    ids=str,
)
def test_vectors_of_other_types_are_refused_with_the_remedy(tmp_path: Path, kind: pa.DataType) -> None:
    source = write(tmp_path / "c.parquet", {"id": [1], "vector": pa.array([None], kind)})
    refusal(CorpusError, source, "'vector'", str(kind).split("<")[0], "float32", "cast")


def test_texts_of_other_types_are_refused_with_the_remedy(tmp_path: Path) -> None:
    source = write(tmp_path / "c.parquet", {"id": [1], "text": [b"x"]})
    refusal(CorpusError, source, "'text'", "must be strings", "binary", "cast")


# -------------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize("files", [1, 2], ids=["one-file", "two-files"])
@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("id", pa.array(["a", "b", "c", "d", None]), ["its id is null"]),
        ("id", pa.array([1, 2, 3, 4, None]), ["its id is null"]),
        ("id", pa.array(["a", "b", "c", "d", None]).dictionary_encode(), ["its id is null"]),
        ("id", pa.array([1, 2, 3, 4, 2**63], pa.uint64()), ["9223372036854775808", "int64", "cast"]),
        ("id", pa.array(["a", "b", "c", "d", "é" * 257]), ["514 bytes", "512"]),
        ("vector", pa.array([[1, 2]] * 4 + [None], F32), ["id 'r4'", "its vector is null"]),
        ("vector", pa.array([[1, 2]] * 4 + [None], pa.list_(pa.float32(), 2)), ["id 'r4'", "its vector is null"]),
        ("vector", pa.array([[1, 2]] * 4 + [[1, None]], F32), ["id 'r4'", "vector[1] is null"]),
        ("vector", pa.array([[1, 2]] * 4 + [[None, 1]], pa.list_(pa.float32(), 2)), ["id 'r4'", "vector[0] is null"]),
        ("vector", pa.array([[1, 2]] * 4 + [[1]], F32), ["id 'r4'", "1 values", "row 0 has 2"]),
        ("vector", pa.array([[1, 2]] * 4 + [[]], pa.large_list(pa.float32())), ["id 'r4'", "0 values", "row 0 has 2"]),
        ("vector", pa.array([[1, 2]] * 4 + [[1, float("nan")]], F32), ["id 'r4'", "vector[1] is nan"]),
        ("vector", pa.array([[1, 2]] * 4 + [[float("inf"), 1]], F32), ["id 'r4'", "vector[0] is inf"]),
        ("vector", pa.array([[1, 2]] * 4 + [[1, -2e15]], F32), ["id 'r4'", "vector[1] is -2e+15", "1e+15"]),
        ("vector", pa.array([[1, 2]] * 4 + [[1, 1e300]], pa.list_(pa.float64())), ["vector[1] is 1e+300"]),
        ("vector", pa.array([[1, 2]] * 4 + [[1, float("nan")]], pa.list_(pa.float64())), ["vector[1] is nan"]),
        (
            "vector",
            pa.array([np.ones(2, np.float16)] * 4 + [np.array([1, -np.inf], np.float16)], pa.list_(pa.float16())),
            ["vector[1] is -inf"],
        ),
        (
            "vector",
            pa.array([np.ones(2, np.float16)] * 4 + [np.array([np.nan, 1], np.float16)], pa.list_(pa.float16())),
            ["vector[0] is nan"],
        ),
        ("vector", pa.array([[1, 2]] * 4 + [[0, -0.0]], F32), ["id 'r4'", "all zeros", "--metric l2"]),
        ("vector", pa.array([[1, 2]] * 4 + [[0, 1e-300]], pa.list_(pa.float64())), ["all zeros"]),
        ("text", pa.array(["a", "b", "", "d", None]), ["id 'r4'", "its text is null"]),
    ],
)
def test_a_bad_row_is_refused_with_its_number_its_file_its_id_and_a_remedy(
    tmp_path: Path, name: str, values: pa.Array, words: list[str], files: int
) -> None:
    columns: dict[str, Any] = {"id": [f"r{i}" for i in range(5)], "vector": pa.array([[1, 2]] * 5, F32)}
    if name == "text":
        del columns["vector"]
    table = pa.table({**columns, name: values})
    pq.write_table(table, tmp_path / "c.parquet") if files == 1 else None
    for i in range(files if files > 1 else 0):
        pq.write_table(table[3 * i : 3 + 3 * i], tmp_path / f"part-{i}.parquet")
    message = refusal(BadRow, str(tmp_path), *words, batch_rows=2, metric="cosine")
    assert message.startswith("row 4 of part-1.parquet" if files > 1 else "row 4")
    assert "drop" in message or "cast" in message or "at most" in message


def test_zero_vectors_have_a_place_under_l2_and_ip(tmp_path: Path) -> None:
    source = write(tmp_path / "c.parquet", {"id": [1, 2], "vector": pa.array([[0, 0], [0, 1]], F32)})
    for metric in ("l2", "ip"):
        assert vectors_of(load(source, metric=metric)[1]).tolist() == [[0, 0], [0, 1]]


def test_values_at_the_bound_are_read_and_a_signalling_nan_is_refused(tmp_path: Path) -> None:
    column = pa.array([[MAX_ABS, -MAX_ABS, 1e-30]], pa.list_(pa.float64()))
    assert vectors_of(load(write(tmp_path / "a.parquet", {"id": [1], "vector": column}))[1]).shape == (1, 3)
    signalling = np.array([0x7FA00000, 0], np.uint32).view(np.float32)
    source = write(tmp_path / "b.parquet", {"id": [1], "vector": pa.array([signalling], F32)})
    refusal(BadRow, source, "vector[0] is nan")


@pytest.mark.parametrize("kind", ["list", "fixed_size_list"])
@pytest.mark.parametrize("dim", [0, MAX_DIM + 1])
def test_dimensions_out_of_bounds_are_refused_when_the_corpus_is_opened(tmp_path: Path, dim: int, kind: str) -> None:
    value = pa.list_(pa.float32(), dim) if kind == "fixed_size_list" else F32
    column = pa.array([np.ones(dim, np.float32)] * 2, value)
    source = write(tmp_path / "c.parquet", {"id": ["a", "b"], "vector": column})
    with pytest.raises(BadRow, match=rf"row 0 \(id 'a'\): its vector has {dim} values; a vector has 1 to 16384"):
        open_corpus(source, metric="l2")


def test_the_largest_dimension_is_read(tmp_path: Path) -> None:
    source = write(tmp_path / "c.parquet", {"id": [1], "vector": pa.array([np.ones(MAX_DIM, np.float32)], F32)})
    assert load(source)[0].dim == MAX_DIM


def test_a_first_row_without_vector_or_id_is_refused(tmp_path: Path) -> None:
    refusal(BadRow, write(tmp_path / "a.parquet", {"id": ["x"], "vector": pa.array([None], F32)}), "row 0 (id 'x')")
    columns = {"id": pa.array([None], pa.string()), "vector": pa.array([[1]], F32)}
    refusal(BadRow, write(tmp_path / "b.parquet", columns), "row 0: its id is null")
    refusal(BadRow, str(tmp_path), "row 0 of a.parquet (id 'x'): its vector is null")


@pytest.mark.parametrize("name", ["id", "text", "field"])
def test_strings_that_are_no_utf8_are_refused(tmp_path: Path, name: str) -> None:
    offsets = pa.py_buffer(np.array([0, 1, 2, 3, 4], np.int32))
    damaged = pa.Array.from_buffers(pa.string(), 4, [None, offsets, pa.py_buffer(b"abc\xff")])
    columns = {"id": ["r0", "r1", "r2", "r3"], "text": ["a"] * 4, "field": ["a"] * 4, name: damaged}
    source = write(tmp_path / "c.parquet", columns)
    message = refusal(BadRow, source, "UTF", name, batch_rows=2, fields="field")
    assert message.startswith("row 3")


def test_a_long_id_is_shortened_and_a_strange_one_kept_on_its_line(tmp_path: Path) -> None:
    columns = {"id": ["a\nb" + "x" * 400], "vector": pa.array([[float("nan")]], F32)}
    message = refusal(BadRow, write(tmp_path / "c.parquet", columns), "a\\nb")
    assert len(message) < 250


# ---------------------------------------------------------------------------------------- repeated ids


@pytest.mark.parametrize("ids", [["a", "b", "c", "d", "b"], [1, 2, 3, 4, 2]], ids=["str", "int"])
def test_a_repeated_id_is_refused_with_both_rows(tmp_path: Path, ids: list[Any]) -> None:
    source = write(tmp_path / "c.parquet", {**rows_of(5), "id": ids})
    for batch_rows in (1, 2, 100):
        refusal(BadRow, source, f"row 4 (id {ids[1]!r}): row 1 has that id", "drop or rename", batch_rows=batch_rows)


def test_an_id_repeated_in_another_file_is_refused_with_both_files(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", rows_of(4))
    write(tmp_path / "b.parquet", rows_of(4, first=3))
    refusal(BadRow, str(tmp_path), "row 4 of b.parquet (id 'r3'): row 3 of a.parquet has that id")


def test_different_ids_that_share_a_hash_are_no_repetition(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_module, "id_hashes", lambda ids: id_hashes(ids) % np.uint64(3))
    monkeypatch.setattr(corpus_module, "MAX_SUSPECTS", 2)
    source = write(tmp_path / "c.parquet", rows_of(20))
    assert len(ids_of(load(source)[1])) == 20
    repeated = {**rows_of(20), "id": [f"r{i % 19}" for i in range(20)]}
    refusal(BadRow, write(tmp_path / "d.parquet", repeated), "row 19 (id 'r0'): row 0 has that id")


# ------------------------------------------------------------------------------------------------- files


def test_a_folder_is_every_parquet_file_below_it_by_name(tmp_path: Path) -> None:
    names = ["b.parquet", "a.parquet", "sub/deep/c.parquet", ".hidden.parquet", ".git/x.parquet", "b.parquet.bak"]
    for i, name in enumerate(names):
        write(tmp_path / "corpus" / name, rows_of(1, first=i))
    (tmp_path / "corpus/notes.txt").write_text("no corpus")
    for source in (str(tmp_path / "corpus"), str(tmp_path / "corpus") + "/"):
        corpus, batches = load(source)
        assert ids_of(batches) == ["r1", "r0", "r2"]
        assert [b.first_row for b in batches] == [0, 1, 2]
        assert corpus.rows == 3


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.parquet", ["a1", "a2", "b"]),
        ("a?.parquet", ["a1", "a2"]),
        ("a[2-9].*", ["a2"]),
        ("*/*.parquet", ["x/a", "y/a"]),
        ("**/a.parquet", ["x/a", "x/z/a", "y/a"]),
        ("**/*.parquet", ["a1", "a2", "b", "x/a", "x/z/a", "y/a"]),
        ("x/**", ["x/a", "x/z/a"]),
        ("[xy]/a.parquet", ["x/a", "y/a"]),
    ],
)
def test_a_glob_is_the_files_it_matches_by_name(tmp_path: Path, pattern: str, expected: list[str]) -> None:
    for name in ["a1", "a2", "b", "x/a", "x/z/a", "y/a", ".hidden"]:
        write(tmp_path / f"{name}.parquet", {"id": [name], "vector": pa.array([[1]], F32)})
    assert ids_of(load(f"{tmp_path}/{pattern}")[1]) == expected


def test_a_relative_path_and_a_name_with_glob_signs_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a[1]*.parquet", rows_of())
    monkeypatch.chdir(tmp_path)
    for source in ("a[1]*.parquet", "*.parquet", "."):
        assert load(source)[0].rows == 4


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for source in (f"{tmp_path}/nope.parquet", f"{tmp_path}/nope/*/c.parquet", "/dev/null"):
        refusal(CorpusUnreadable, source, source, "check the path")
    refusal(CorpusUnreadable, f"{tmp_path}/empty", "no *.parquet file in", "empty")
    refusal(CorpusUnreadable, f"{tmp_path}/*.parquet", "no file matches")
    for source in ("gs://bucket/key", ""):
        refusal(CorpusUnreadable, source, repr(source), "a local path or s3://bucket/key")


def test_a_corpus_without_rows_is_refused_and_files_without_rows_are_not(tmp_path: Path) -> None:
    empty = {"id": pa.array([], pa.string()), "vector": pa.array([], F32)}
    write(tmp_path / "a.parquet", empty)
    refusal(CorpusError, str(tmp_path), "no rows")
    write(tmp_path / "b.parquet", rows_of())
    write(tmp_path / "c.parquet", empty)
    assert ids_of(load(str(tmp_path))[1]) == ["r0", "r1", "r2", "r3"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: b"id,vector\n1,2\n",
        lambda data: data[:-10],
        lambda data: data[: len(data) // 2],
        lambda data: data[:4] + bytes(200) + data[204:],
        lambda data: data[:-60] + bytes(40) + data[-20:],
    ],
    ids=["empty", "csv", "cut-short", "half", "zeroed-page", "zeroed-footer"],
)
def test_a_damaged_file_is_refused_by_name_and_the_cause_is_kept(tmp_path: Path, damage: Any) -> None:
    write(tmp_path / "a.parquet", rows_of())
    path = Path(write(tmp_path / "b.parquet", rows_of(100, first=10), use_dictionary=False, write_page_checksum=True))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CorpusUnreadable, match=r"b\.parquet.*Parquet file") as caught:
        load(str(tmp_path))
    assert isinstance(caught.value.__cause__, pa.ArrowException | OSError)
    assert "\n" not in str(caught.value)


def test_a_flipped_bit_is_found_where_pages_carry_checksums(tmp_path: Path) -> None:
    source = Path(write(tmp_path / "c.parquet", rows_of(500, 8), compression="none", write_page_checksum=True))
    data = bytearray(source.read_bytes())
    data[len(data) // 2] ^= 1
    source.write_bytes(data)
    refusal(CorpusUnreadable, str(source), "CRC")


class _Kms(pe.KmsClient):  # type: ignore[misc]
    def wrap_key(self, key_bytes: bytes, master_key_identifier: str) -> str:
        return key_bytes.hex()

    def unwrap_key(self, wrapped_key: str, master_key_identifier: str) -> bytes:
        return bytes.fromhex(wrapped_key)


@pytest.mark.parametrize("plaintext_footer", [False, True])
def test_an_encrypted_file_is_refused(tmp_path: Path, plaintext_footer: bool) -> None:
    factory = pe.CryptoFactory(lambda config: _Kms())
    config = pe.EncryptionConfiguration(
        footer_key="f", column_keys={"c": ["id", "vector.list.element"]}, plaintext_footer=plaintext_footer
    )
    properties = factory.file_encryption_properties(pe.KmsConnectionConfig(), config)
    table = pa.table(rows_of())
    with pq.ParquetWriter(tmp_path / "c.parquet", table.schema, encryption_properties=properties) as writer:
        writer.write_table(table)
    refusal(CorpusUnreadable, str(tmp_path / "c.parquet"), "c.parquet", "unencrypted")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "c.parquet", rows_of())
    Path(source).chmod(0)
    refusal(CorpusUnreadable, source, "c.parquet", "Permission denied")


@pytest.mark.parametrize(
    ("second", "error", "words"),
    [
        ({"id": [9], "vector": pa.array([[1, 2]], F32)}, CorpusError, ["'id' is int64", "string"]),
        (
            {"id": ["x"], "vector": pa.array([[1, 2]], pa.list_(pa.float64()))},
            CorpusError,
            ["'vector' is list<element: double>", "list<element: float>"],
        ),
        ({"id": ["x"], "emb": pa.array([[1, 2]], F32)}, MissingColumn, ["no column 'vector'"]),
        (
            {"id": ["x"], "vector": pa.array([[1, 2]], F32), "year": ["1999"]},
            CorpusError,
            ["'year' is string", "int64"],
        ),
    ],
)
def test_files_that_do_not_fit_are_refused_with_file_column_and_both_types(
    tmp_path: Path, second: dict[str, Any], error: type[CorpusError], words: list[str]
) -> None:
    write(tmp_path / "a.parquet", {**rows_of(), "year": [1, 2, 3, 4], "only": [1, 2, 3, 4]})
    write(tmp_path / "b.parquet", {"year": [1], **second})
    with pytest.raises(error) as caught:
        open_corpus(str(tmp_path), metric="l2", fields="year")
    for word in ["b.parquet", "a.parquet", "one schema", *words]:
        assert word in str(caught.value)


def test_files_may_differ_in_what_is_not_used_in_metadata_and_in_nullability(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {**rows_of(1), "year": [1], "only": [1]})
    schema = pa.schema(
        [pa.field("year", pa.int64(), nullable=False), pa.field("vector", F32), pa.field("id", pa.string())],
        metadata={"pandas": "{}"},
    )
    pq.write_table(pa.table([[2], [[1, 2]], ["x"]], schema=schema), tmp_path / "b.parquet")
    corpus, batches = load(str(tmp_path), fields="year")
    assert [b.fields.schema.equals(corpus.fields, check_metadata=True) for b in batches if b.fields] == [True, True]
    assert list(corpus.columns) == ["id", "vector", "year", "only"]


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "c.parquet", rows_of(4))
    corpus = open_corpus(source, metric="l2")
    reading = corpus.read_batches(2)
    next(reading)
    write(tmp_path / "c.parquet", rows_of(5))
    with pytest.raises(CorpusUnreadable, match="was changed"):
        list(reading)
    with pytest.raises(CorpusUnreadable, match="was changed"):
        list(corpus.read_batches(2))
    Path(source).unlink()
    with pytest.raises(CorpusUnreadable):
        list(corpus.read_batches(2))
    with pytest.raises(CorpusUnreadable):
        corpus.sha256()


# ------------------------------------------------------------------------------------------ fingerprints


def test_sha256_is_what_sha256sum_says_and_identity_changes_with_the_files(tmp_path: Path) -> None:
    path = tmp_path / "corpus" / "b.parquet"
    corpus = open_corpus(write(path, rows_of()), metric="l2")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert corpus.sha256() == digest == open_corpus(str(path.parent), metric="l2").sha256()
    assert corpus.identity() == open_corpus(str(path.parent), metric="l2").identity()

    other = Path(write(path.parent / "a" / "z.parquet", rows_of(first=4)))
    both = open_corpus(str(path.parent), metric="l2")
    lines = f"{hashlib.sha256(other.read_bytes()).hexdigest()}  a/z.parquet\n{digest}  b.parquet\n"
    assert both.sha256() == hashlib.sha256(lines.encode()).hexdigest()
    assert open_corpus(f"{path.parent}/**/*.parquet", metric="l2").sha256() == both.sha256()

    before = both.identity()
    assert before != corpus.identity()
    assert open_corpus(str(path.parent), metric="l2").identity() == before
    os.utime(other, ns=(1, 1))
    assert open_corpus(str(path.parent), metric="l2").identity() != before


# ------------------------------------------------------------------------------------------------ memory

_MEASURE = """
import json, sys
from index_builders.corpus import open_corpus

def peak_bytes():
    with open("/proc/self/status") as status:
        return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))

before = peak_bytes()
batches = open_corpus(sys.argv[1], metric="cosine", fields=sys.argv[2]).read_batches(int(sys.argv[3]))
rows = sum(len(batch.ids) for batch in batches)
print(json.dumps([rows, peak_bytes() - before]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("container", ["list", "fixed_size_list"])
def test_memory_is_bounded_by_the_batch_and_not_by_the_row_group(tmp_path: Path, container: str) -> None:
    n, dim = 200_000, 128
    flat = pa.array(np.random.default_rng(7).standard_normal(n * dim, dtype=np.float32))
    column = (
        pa.ListArray.from_arrays(pa.array(np.arange(0, n * dim + 1, dim, dtype=np.int32)), flat)
        if container == "list"
        else pa.FixedSizeListArray.from_arrays(flat, dim)
    )
    source = write(tmp_path / "c.parquet", {"id": np.arange(n), "vector": column, "year": np.arange(n)})
    assert pq.read_metadata(source).num_row_groups == 1
    # The reader runs in a process of its own: the peak of this one is that of the table above.
    command = [sys.executable, "-c", _MEASURE, source, "year", "2048"]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[1]
    )
    rows, grown_bytes = json.loads(done.stdout)
    assert rows == n
    assert grown_bytes < n * dim * 4 * 0.6  # 102 MB of vectors; about 40 MB were measured
