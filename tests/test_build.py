"""A build publishes exactly its corpus, says truly what it is, and never touches what serves before it is done."""

from __future__ import annotations

import errno
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from corpora import (
    GRAPH,
    GRAPH_FILE,
    HAS_HNSWLIB,
    KINDS,
    answers,
    ask,
    build,
    check_version,
    current_version,
    file_hashes,
    make_ids,
    make_texts,
    make_vectors,
    opened,
    strays,
    write_corpus,
)
from tiny_bert import write_tiny_bert

from index_builders import base, certify, index_shards
from index_builders.corpus import Corpus
from vecsvc import cli, indexes, storage
from vecsvc.encoders.onnx import open_encoder
from vecsvc.errors import (
    BadRow,
    ConfigError,
    InvalidParameter,
    RecallMissed,
    StorageError,
    UnknownKind,
    UnknownParameter,
    VersionExists,
)
from vecsvc.exact_search import ExactSearch
from vecsvc.ids import BATCH_ROWS
from vecsvc.manifest import Manifest, OperatingPoint
from vecsvc.storage import STAGING, UNPUBLISHED_KEPT_S, IndexFolder
from vecsvc.types import IdQuery, TextQuery

needs_hnswlib = pytest.mark.skipif(not HAS_HNSWLIB, reason="hnswlib is not installed: it needs a compiler")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "demo.parquet")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], None]:
    """failing("create vectors.npy", 1): the failpoint of that name raises when it is met the n-th time."""

    def fail(point: str, nth: int = 1) -> None:
        met = 0

        def hook(name: str) -> None:
            nonlocal met
            met += name == point
            if name == point and met == nth:
                raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(storage, "failpoint", hook)

    return fail


def shard_rows(version: Path, shard: int) -> list[tuple[Any, int, Any]]:
    """(id, corpus row, vector) by label, read without vecsvc."""
    folder = version / "shards" / f"{shard:03d}"
    with pa.ipc.open_file(str(folder / "ids.arrow")) as reader:
        ids = reader.read_all().column("id").to_pylist()
    rows, vectors = np.load(folder / "rows.npy"), np.load(folder / "vectors.npy")
    assert len(ids) == len(rows) == len(vectors)
    return list(zip(ids, rows.tolist(), vectors, strict=True))


def everything(version: Path, shards: int) -> list[tuple[Any, int, Any]]:
    return [row for shard in range(shards) for row in shard_rows(version, shard)]


# ------------------------------------------------------------------------------------- what is published


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("ids", ["str", "int"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_version_holds_exactly_the_corpus(tmp_path: Path, out: Path, shards: int, ids: Any, dtype: Any) -> None:
    corpus = write_corpus(tmp_path / "demo.parquet", ids=ids, dtype=dtype)
    result = build(corpus, out, shards=shards, fields="label,at", batch_rows=77)
    held = everything(Path(result.path), shards)
    names, vectors = make_ids(300, ids), make_vectors(300, 8).astype(dtype)
    assert sorted(row for _, row, _ in held) == list(range(300))
    assert all(id == names[row] for id, row, _ in held)
    assert all(v.dtype == dtype and v.tobytes() == vectors[row].tobytes() for _, row, v in held)
    manifest = check_version(Path(result.path))
    assert (manifest.spec.size, manifest.spec.dim, len(manifest.shards)) == (300, 8, shards)
    assert (manifest.id_type, manifest.vector_dtype) == (ids, dtype)
    assert manifest.fields == {"label": "int8", "at": "timestamp[us]"}
    assert not strays(IndexFolder(out / "demo"))


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("ids", ["str", "int"])
def test_every_row_is_in_exactly_the_shard_of_its_hash(tmp_path: Path, out: Path, shards: int, ids: Any) -> None:
    result = build(write_corpus(tmp_path / "demo.parquet", ids=ids), out, shards=shards)
    for shard in range(shards):
        rows = shard_rows(Path(result.path), shard)
        for id, _, _ in rows:
            data = id.encode() if isinstance(id, str) else id.to_bytes(8, "little", signed=True)
            digest = hashlib.blake2b(data, digest_size=8).digest()
            assert int.from_bytes(digest, "little") % shards == shard
        assert [row for _, row, _ in rows] == sorted(row for _, row, _ in rows), "labels follow the corpus"


FIELDS: dict[str, pa.Array] = {
    "uint64": pa.array([2**64 - 1, 0, None], pa.uint64()),
    "double": pa.array([1e-300, None, -0.5], pa.float64()),
    "half": pa.array(np.array([1.5, 2, 3], np.float16)),
    "bool": pa.array([True, None, False]),
    "string": pa.array(["", "naïve 東京", None]),
    "large": pa.array(["a", None, "b"], pa.large_string()),
    "binary": pa.array([b"\0\xff", b"", None]),
    "dictionary": pa.array(["red", "blue", "red"]).dictionary_encode(),
    "dictionary_null": pa.array([None, "blue", "red"]).dictionary_encode(),
    "nanoseconds": pa.array([1_700_000_000_123_456_789, None, -1], pa.timestamp("ns", tz="UTC")),
    "times": pa.array(
        [[{"at": 1_700_000_000_123_456_789}], None, [{"at": -1}]],
        pa.list_(pa.struct([("at", pa.timestamp("ns", tz="UTC"))])),
    ),
    "date": pa.array([date(2024, 2, 29), None, date(1, 1, 1)]),
    "decimal": pa.array([Decimal("12345678901234567890.12"), None, Decimal("-0.01")], pa.decimal128(30, 2)),
    "list": pa.array([["a", None], [], None], pa.list_(pa.string())),
    "struct": pa.array([{"x": 1, "y": "b"}, None, {"x": None, "y": "c"}]),
    "null": pa.array([None, None, None], pa.null()),
}


@pytest.mark.parametrize("shards", [1, 2])
def test_stored_fields_come_back_by_value_in_their_types(tmp_path: Path, out: Path, shards: int) -> None:
    more = {name: pa.concat_arrays([values] * 10) for name, values in FIELDS.items()}
    corpus = write_corpus(tmp_path / "demo.parquet", n=30, more=more)
    result = build(corpus, out, shards=shards, fields="*", batch_rows=7)
    wanted = pq.read_table(corpus)
    plain = {f.name: f.type.value_type if pa.types.is_dictionary(f.type) else f.type for f in wanted.schema}
    stored = {name: str(kind) for name, kind in plain.items() if name not in ("id", "vector")}
    assert current_version(IndexFolder(out / "demo")).fields == stored
    for shard in range(shards):
        rows = [row for _, row, _ in shard_rows(Path(result.path), shard)]
        with pa.ipc.open_file(str(Path(result.path) / f"shards/{shard:03d}/fields.arrow")) as reader:
            table = reader.read_all()
        for name in stored:
            column = wanted.column(name).combine_chunks().cast(plain[name]).take(pa.array(rows))
            assert table.column(name).type == plain[name]
            assert table.column(name).combine_chunks().equals(column), name
    with opened(out) as engine:
        hits = ask(engine, make_vectors(30, 8), k=1, include=frozenset(["fields"])).results
    assert [hit.id for [hit] in hits] == make_ids(30, "str")
    expected = wanted.drop_columns(["id", "vector", "nanoseconds", "times"]).to_pylist()
    # Python's own times end at microseconds.
    nanoseconds = ["2023-11-14T22:13:20.123456789Z", None, "1969-12-31T23:59:59.999999999Z"] * 10
    for [hit], fields, moment in zip(hits, expected, nanoseconds, strict=True):
        assert hit.fields is not None and list(hit.fields) == list(stored), "in the order of the corpus"
        assert (hit.fields.pop("nanoseconds"), hit.fields.pop("times")) == (moment, moment and [{"at": moment}])
        assert hit.fields == fields


def test_shards_of_several_batches_keep_ids_fields_and_vectors_together(tmp_path: Path, out: Path) -> None:
    n = 2 * BATCH_ROWS + 5000  # in two shards: a batch and a bit each
    corpus = write_corpus(tmp_path / "demo.parquet", n=n, dim=2)
    build(corpus, out, shards=2, kind="exact", fields="text", certificate_queries=0)
    texts, vectors = make_texts(n), make_vectors(n, 2)
    rows = np.random.default_rng(7).choice(n, 50, replace=False)
    with opened(out) as engine:
        assert all(shard.size > BATCH_ROWS for shard in engine.catalog.get(None).shards)
        found = ask(engine, vectors[rows], k=1, include=frozenset(["fields", "vector"])).results
        assert [hits[0].id for hits in found] == [f"row-{row:04d}" for row in rows]
        assert [hits[0].fields for hits in found] == [{"text": texts[row]} for row in rows]
        assert np.array_equal(np.array([hits[0].vector for hits in found], np.float32), vectors[rows])
        near = ask(engine, IdQuery(f"row-{rows[0]:04d}"), k=3).results[0]
        assert len(near) == 3 and f"row-{rows[0]:04d}" not in [hit.id for hit in near]


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
def test_answers_do_not_depend_on_the_number_of_shards(tmp_path: Path, metric: str) -> None:
    vectors = make_vectors(300, 8)
    vectors[100:200] = vectors[:100]  # ties, which corpus order settles
    table = pa.table({"id": make_ids(300, "str"), "vector": list(vectors)})
    pq.write_table(table, tmp_path / "demo.parquet")
    queries = np.concatenate([make_vectors(20, 8, seed=1), vectors[:5]])
    for shards in (1, 3, 7):
        build(tmp_path / "demo.parquet", tmp_path / f"out{shards}", shards=shards, kind="exact", metric=metric)
    one = answers(tmp_path / "out1", queries, k=20)
    truth = ExactSearch(vectors, metric).search(queries, 20)  # type: ignore[arg-type]
    assert [[id for id, _ in row] for row in one] == [[f"row-{i:04d}" for i in row] for row in truth.labels]
    assert answers(tmp_path / "out3", queries, k=20) == one
    assert answers(tmp_path / "out7", queries, k=20) == one


def test_a_thorough_graph_search_finds_the_same_ids_in_three_shards_as_in_one(corpus: Path, tmp_path: Path) -> None:
    queries = make_vectors(20, 8, seed=1)
    for shards in (1, 3):
        build(corpus, tmp_path / f"out{shards}", shards=shards, kind=GRAPH)
    one, three = (
        [{id for id, _ in row} for row in answers(tmp_path / f"out{n}", queries, k=10, params={"ef_search": 300})]
        for n in (1, 3)
    )
    assert one == three


def test_texts_become_the_vectors_of_the_encoder_that_travels_with_them(tmp_path: Path, out: Path) -> None:
    folder = write_tiny_bert(tmp_path / "bert", dim=16)
    corpus = write_corpus(tmp_path / "demo.parquet", n=40, dim=0)
    result = build(corpus, out, encoder=str(folder), shards=2, batch_rows=16)
    encoder = open_encoder(folder, num_threads=1)
    vectors = encoder.encode(make_texts(40), "passage")
    for id, row, vector in everything(Path(result.path), 2):
        assert id == f"row-{row:04d}" and np.allclose(vector, vectors[row], atol=1e-5)
    entry = current_version(IndexFolder(out / "demo")).encoder
    assert entry is not None and entry.dim == 16 and entry.fingerprint == encoder.spec.fingerprint
    for file in entry.files:
        original = folder / Path(file.path).relative_to("encoder")
        assert (Path(result.path) / file.path).read_bytes() == original.read_bytes()
    assert {Path(f.path).name for f in entry.files} >= {"model.onnx", "tokenizer.json", "config.json", "modules.json"}
    (folder / "model.onnx").unlink()  # nothing outside the version is needed any more
    with opened(out) as engine:
        answer = ask(engine, TextQuery(["red cat", "music river"]), k=5)
    assert answer.encoder == "bert"
    queries = encoder.encode(["red cat", "music river"], "query")
    truth = ExactSearch(vectors, "cosine").search(queries, 5).labels
    assert [[hit.id for hit in hits] for hits in answer.results] == [[f"row-{i:04d}" for i in row] for row in truth]
    encoder.close()


def test_a_corpus_with_vectors_and_an_encoder_keeps_its_vectors_and_takes_texts_as_queries(
    tmp_path: Path, out: Path
) -> None:
    corpus = write_corpus(tmp_path / "demo.parquet", dim=16)
    result = build(corpus, out, encoder=str(write_tiny_bert(tmp_path / "bert", dim=16)))
    vectors = make_vectors(300, 16)
    assert all(np.array_equal(vector, vectors[row]) for _, row, vector in everything(Path(result.path), 1))
    with opened(out) as engine:
        assert len(ask(engine, TextQuery(["red cat"])).results[0]) == 5


def test_one_row_makes_an_index_that_answers(tmp_path: Path, out: Path) -> None:
    for kind in KINDS:
        result = build(write_corpus(tmp_path / "demo.parquet", n=1), out, kind=kind, name=kind)
        assert result.manifest.certificate is None and result.manifest.search == {}
        [[(id, _)]] = answers(out / kind, make_vectors(1, 8, seed=1))
        assert id == "row-0000"


# ----------------------------------------------------------------------------------------- what it says


def test_the_manifest_says_what_was_built_from_what(corpus: Path, out: Path) -> None:
    manifest = build(corpus, out, kind=GRAPH, shards=2, seed=11, version="v1", metric="ip").manifest
    assert (manifest.name, manifest.version, manifest.partition) == ("demo", "v1", "hash")
    assert (manifest.spec.kind, manifest.spec.metric, manifest.spec.size) == (GRAPH, "ip", 300)
    defaults = {
        "hnsw": {"m": 16, "ef_construction": 200},
        "faiss": {"factory": "HNSW32", "device": "cpu", "ef_construction": 200},
    }
    assert manifest.spec.params == defaults[GRAPH]
    assert sum(shard.size for shard in manifest.shards) == 300
    assert manifest.corpus.sha256 == hashlib.sha256(corpus.read_bytes()).hexdigest()
    assert (manifest.corpus.path, manifest.corpus.rows) == (str(corpus), 300)
    schema = pq.read_schema(corpus)
    assert manifest.corpus.columns == {field.name: str(field.type) for field in schema}
    created = datetime.strptime(manifest.created, "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=UTC)
    assert abs((datetime.now(UTC) - created).total_seconds()) < 60
    provenance = manifest.provenance
    assert (provenance.seed, provenance.threads) == (11, 1)
    assert provenance.libraries["numpy"] == np.__version__ and {"vecsvc", "pyarrow", "onnxruntime"} <= set(
        provenance.libraries
    )
    assert set(provenance.phases) == {"ingest", "index", "certify"}
    assert all(phase.wall_s >= 0 and phase.cpu_s >= 0 for phase in provenance.phases.values())
    assert 10 << 20 < provenance.peak_rss_bytes < 1 << 40
    assert check_version(out / "demo" / "v1") == manifest, "what build_index returns is what it wrote"


def test_several_files_have_the_hash_that_sha256sum_makes_of_their_list(tmp_path: Path, out: Path) -> None:
    folder = tmp_path / "parts"
    write_corpus(folder / "a.parquet", n=20)
    table = pq.read_table(folder / "a.parquet")
    pq.write_table(table.set_column(0, "id", pa.array([f"b{i}" for i in range(20)])), folder / "b.parquet")
    manifest = build(folder, out).manifest
    files = ("a.parquet", "b.parquet")
    sums = "".join(f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in files)
    assert manifest.name == "parts" and manifest.spec.size == 40
    assert manifest.corpus.sha256 == hashlib.sha256(sums.encode()).hexdigest()


def recalls(version: Path, manifest: Manifest, queries: int, seed: int) -> list[float]:
    """Recall of every certified operating point, by brute force in float64 over the published files."""
    vectors = [np.load(version / f"shards/{n:03d}/vectors.npy") for n in range(len(manifest.shards))]
    everything = np.concatenate(vectors).astype(np.float64)
    everything /= np.linalg.norm(everything, axis=1, keepdims=True)
    rows = [np.load(version / f"shards/{n:03d}/rows.npy") for n in range(len(manifest.shards))]
    place = np.argsort(np.concatenate(rows))  # of each row of the corpus
    rng = np.random.default_rng(seed)
    sampled = place[np.sort(rng.choice(len(everything), queries, replace=False))]
    first = rng.integers(0, len(everything), queries)
    one, other = place[first], place[(first + rng.integers(1, len(everything), queries)) % len(everything)]
    loaded = [
        indexes.load(version / f"shards/{n:03d}/index", entry.spec, vectors=vectors[n])
        for n, entry in enumerate(manifest.shards)
    ]
    starts = np.cumsum([0] + [len(v) for v in vectors])
    assert manifest.certificate is not None
    found = []
    for point in manifest.certificate.points:
        params = indexes.search_params(manifest.spec.kind, **point.params)
        hits = 0
        for row, a, b in zip(sampled, one, other, strict=True):
            away = np.linalg.norm(everything - everything[row], axis=1)
            away[row] = np.inf
            along = everything[a] - everything[b]
            query = everything[row] + away.min() * along / (np.linalg.norm(along) or 1.0)
            distances = 1 - everything @ query / np.linalg.norm(query)
            labels = [index.search(query[None].astype(np.float32), 10, params).labels[0] for index in loaded]
            merged = np.concatenate([part[part >= 0] + start for part, start in zip(labels, starts, strict=False)])
            hits += int(np.sum(np.sort(distances[merged])[:10] <= np.sort(distances)[9] + 1e-5))
        found.append(hits / (10 * queries))
    return found


@pytest.fixture(scope="module")
def poor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus that a graph of few links finds hard."""
    return write_corpus(tmp_path_factory.mktemp("poor") / "poor.parquet", n=2000, dim=48, fields=False)


POOR = {"m": 2, "ef_construction": 4}


@needs_hnswlib
@pytest.mark.parametrize("target", [0.3, 0.6, 0.8])
def test_the_certificate_is_what_brute_force_measures_and_picks_the_cheapest_settings_that_keep_the_target(
    poor: Path, out: Path, target: float
) -> None:
    result = build(poor, out, POOR, kind="hnsw", shards=2, certificate_queries=40, recall=target)
    certificate = result.manifest.certificate
    assert certificate is not None and (certificate.k, certificate.queries, certificate.target) == (10, 40, target)
    points = certificate.points
    assert [point.params["ef_search"] for point in points] == [16, 32, 64, 128, 256, 512]
    measured = recalls(Path(result.path), result.manifest, 40, seed=7)
    assert [point.recall for point in points] == pytest.approx(measured, abs=2e-3)
    assert all(0 < p.latency_ms < 1e4 and 0 <= p.recall_error < 0.5 for p in points)
    default = indexes.search_params("hnsw").ef_search

    def good(point: OperatingPoint) -> bool:
        return point.recall - point.recall_error >= target and point.params["ef_search"] >= default

    assert certificate.reached == any(map(good, points))
    assert result.manifest.search == next((p.params for p in points if good(p)), points[-1].params)


@needs_hnswlib
def test_settings_beyond_those_that_miss_nothing_are_not_measured_where_one_shard_is_all(
    corpus: Path, out: Path
) -> None:
    """Never fewer than the kind's defaults; with several shards, nobody knows at one what others miss."""
    for shards, last in ((1, 64), (2, 512)):
        certificate = build(corpus, out, kind="hnsw", shards=shards).manifest.certificate
        assert certificate is not None and certificate.reached
        assert certificate.points[-1].params["ef_search"] == last and certificate.points[-1].recall == 1.0


@needs_hnswlib
def test_a_target_that_was_not_reached_is_said(poor: Path, out: Path) -> None:
    result = build(poor, out, POOR, kind="hnsw", certificate_queries=40, recall=1.0)
    certificate = result.manifest.certificate
    assert certificate is not None and not certificate.reached
    assert result.manifest.search == certificate.points[-1].params == {"ef_search": 512}
    assert check_version(Path(result.path)).certificate == certificate


@needs_hnswlib
def test_a_target_that_is_required_and_missed_publishes_nothing_until_it_is_resumed_without(
    poor: Path, out: Path
) -> None:
    build(poor, out, kind="exact", certificate_queries=40, require_recall=True, name="demo", version="v1")
    wanted = {"kind": "hnsw", "certificate_queries": 40, "recall": 1.0, "name": "demo", "version": "v2"}
    for resume in (False, True):
        with pytest.raises(
            RecallMissed, match=r"at best: its lower end misses the target of 1.0; nothing was published"
        ) as caught:
            build(poor, out, POOR, require_recall=True, resume=resume, **wanted)
    assert "--resume without --require-recall publishes it" in str(caught.value)
    folder = IndexFolder(out / "demo")
    assert folder.versions() == ["v1"] and folder.current() == "v1"
    assert folder.gc(keep=0) == [], "it waits for --resume"
    assert build(poor, out, POOR, resume=True, **wanted).resumed == ["everything but publishing"]
    assert folder.current() == "v2" and not strays(folder)


@needs_hnswlib
def test_a_build_that_was_refused_for_its_recall_is_given_up_after_a_week(poor: Path, out: Path) -> None:
    wanted = {"kind": "hnsw", "certificate_queries": 40, "recall": 1.0, "name": "demo", "version": "v1"}
    with pytest.raises(RecallMissed):
        build(poor, out, POOR, require_recall=True, **wanted)
    folder = IndexFolder(out / "demo")
    [staging] = out.glob(f"demo/{STAGING}*")
    assert folder.gc(keep=0) == []
    assert folder.refused() == [staging.name]
    told = CliRunner().invoke(cli.cli, ["gc", str(out)]).output
    assert told.splitlines() == [
        "demo: deleted nothing",
        f"demo: left {staging.name}, refused for its recall: build-index --resume without --require-recall "
        "publishes it, gc --refused deletes it",
    ]
    before = time.time() - UNPUBLISHED_KEPT_S - 60
    os.utime(staging, (before, before))
    assert folder.gc(keep=0) == [staging.name]
    assert not strays(folder)


@needs_hnswlib
def test_the_next_build_leaves_what_was_refused_before_and_gc_deletes_it_when_told(poor: Path, out: Path) -> None:
    wanted = {"kind": "hnsw", "certificate_queries": 40, "recall": 1.0, "name": "demo"}
    with pytest.raises(RecallMissed):
        build(poor, out, POOR, require_recall=True, version="v1", **wanted)
    folder = IndexFolder(out / "demo")
    [staging] = folder.refused()
    build(poor, out, POOR, version="v2", **wanted)
    assert folder.current() == "v2" and folder.refused() == [staging]
    assert build(poor, out, POOR, resume=True, version="v1", **wanted).resumed == ["everything but publishing"]
    with pytest.raises(RecallMissed):
        build(poor, out, POOR, require_recall=True, version="v3", **wanted)
    with pytest.raises(RecallMissed):  # without --resume it begins anew
        build(poor, out, POOR, require_recall=True, version="v3", **wanted)
    told = CliRunner().invoke(cli.cli, ["gc", str(out), "--keep", "5", "--refused"]).output
    assert told == f"demo: deleted {STAGING}v3\n"
    assert sorted(folder.versions()) == ["v1", "v2"] and not strays(folder)


def test_where_nothing_reaches_the_target_the_cheapest_of_the_best_is_chosen() -> None:
    points = [
        OperatingPoint(params={"ef_search": breadth}, recall=recall, recall_error=0.01, latency_ms=1.0, visited=1.0)
        for breadth, recall in ((8, 0.9), (64, 0.9), (128, 0.96), (256, 0.96))
    ]
    assert certify.choose(points, 0.99, "nng") == (points[2], False)
    assert certify.choose(points[:2], 0.99, "nng") == (points[1], False), "not below the kind's defaults"
    assert certify.choose(points[:1], 0.99, "nng") == (points[0], False)
    assert certify.choose(points, 0.95, "nng") == (points[2], True)


def test_one_row_says_why_its_recall_was_not_measured(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": [1], "vector": [[1.0, 2.0]]}), tmp_path / "one.parquet")
    command = ["build-index", str(tmp_path / "one.parquet"), "--out", str(tmp_path / "out")]
    assert "recall was not measured: one row is all there is to find" in CliRunner().invoke(cli.cli, command).output
    none = CliRunner().invoke(cli.cli, [*command, "--certificate-queries", "0"]).output
    assert "recall was not measured" in none


def test_a_recall_that_nobody_measures_cannot_be_required(corpus: Path, out: Path) -> None:
    with pytest.raises(ConfigError, match="--require-recall needs a certificate"):
        build(corpus, out, certificate_queries=0, require_recall=True)
    assert not out.exists()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
def test_an_easy_corpus_is_certified_at_full_recall(corpus: Path, out: Path, kind: str, metric: str) -> None:
    certificate = build(corpus, out, kind=kind, metric=metric, shards=2).manifest.certificate
    assert certificate is not None and certificate.reached and certificate.points[-1].recall == 1.0


def test_without_queries_there_is_no_certificate(corpus: Path, out: Path) -> None:
    manifest = build(corpus, out, kind=GRAPH, certificate_queries=0).manifest
    assert manifest.certificate is None and manifest.search == {}
    assert len(answers(out, make_vectors(1, 8))[0]) == 5


@pytest.mark.parametrize("kind", KINDS)
def test_one_thread_and_one_seed_give_the_same_files(corpus: Path, tmp_path: Path, kind: str) -> None:
    first, second = (
        build(corpus, tmp_path / f"{rows}", kind=kind, shards=2, fields="*", batch_rows=rows).manifest
        for rows in (50, 299)
    )
    assert file_hashes(first) == file_hashes(second) and len(file_hashes(first)) >= 10
    assert [p.recall for p in first.certificate.points] == [p.recall for p in second.certificate.points]  # type: ignore[union-attr]


@needs_hnswlib
def test_another_seed_gives_another_graph(corpus: Path, tmp_path: Path) -> None:
    first, second = (file_hashes(build(corpus, tmp_path / f"{s}", kind="hnsw", seed=s).manifest) for s in (7, 8))
    assert [path for path in first if first[path] != second[path]] == ["shards/000/index/hnsw.bin"]


def test_auto_is_exact_up_to_ten_thousand_and_nng_above(tmp_path: Path) -> None:
    ten = write_corpus(tmp_path / "ten.parquet", n=10_000, dim=16, fields=False)
    more = write_corpus(tmp_path / "more.parquet", n=10_001, dim=16, fields=False)
    flat = write_corpus(tmp_path / "flat.parquet", n=10_001, dim=2, fields=False)
    kinds = {
        (name, shards): build(source, tmp_path / f"{name}{shards}", shards=shards, certificate_queries=0).manifest.spec
        for name, source, shards in (("ten", ten, 1), ("more", more, 1), ("more", more, 2), ("flat", flat, 1))
    }
    # A shard is what gets searched, so its size is what counts.
    expected = {("ten", 1): "exact", ("more", 1): "nng", ("more", 2): "exact", ("flat", 1): "kd_tree"}
    assert {at: spec.kind for at, spec in kinds.items()} == expected


# -------------------------------------------------------------------------------------- what is refused


def untouched(out: Path, before: Any) -> bool:
    """Whether what serves in `out` is whole and answers as before."""
    current_version(IndexFolder(out / "demo"))
    return answers(out, make_vectors(3, 8, seed=1)) == before


def test_the_name_is_the_files_stem_unless_given(corpus: Path, out: Path) -> None:
    assert Path(build(corpus, out).path).parent == out / "demo"
    assert Path(build(corpus, out, name="other_1").path).parent == out / "other_1"
    assert Path(build(f"{corpus.parent}/*.parquet", out, name="glob").path).parent == out / "glob"


@pytest.mark.parametrize("stem", ["My Corpus", "ünïcode", "UPPER", "-x", "x" * 65])
def test_a_stem_that_is_no_name_is_refused_with_the_remedy(tmp_path: Path, out: Path, stem: str) -> None:
    corpus = write_corpus(tmp_path / f"{stem}.parquet")
    with pytest.raises(ConfigError, match="give one with --name"):
        build(corpus, out)
    assert not out.exists()


@pytest.mark.parametrize("name", ["../x", "a/b", "..", ".", "A", "x y", "%2e", ".hidden"])
def test_a_name_that_is_no_name_is_refused(corpus: Path, out: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="index name"):
        build(corpus, out, name=name)
    assert not out.exists()


def test_a_version_can_be_named_and_is_never_written_twice(corpus: Path, out: Path) -> None:
    result = build(corpus, out, version="v1")
    hashes = {path: path.stat() for path in Path(result.path).rglob("*")}
    assert Path(result.path).name == "v1"
    for resume in (False, True):
        with pytest.raises(VersionExists, match="v1 exists, and a version is never written twice"):
            build(corpus, out, version="v1", seed=8, resume=resume)
    assert {path: path.stat() for path in Path(result.path).rglob("*")} == hashes
    for version in ("../v2", "v 2", ".v2", ""):
        if version:
            with pytest.raises(ConfigError, match="version"):
                build(corpus, out / "none", version=version)
    assert not (out / "none").exists()
    assert IndexFolder(out / "demo").versions() == ["v1"]


def test_versions_that_nobody_names_are_new_each_time(corpus: Path, out: Path) -> None:
    built = [Path(build(corpus, out, seed=seed).path).name for seed in range(3)]
    assert len(set(built)) == 3 and IndexFolder(out / "demo").versions() == built
    assert IndexFolder(out / "demo").current() == built[-1]


@pytest.mark.parametrize(
    ("settings", "params", "error", "message"),
    [
        ({"kind": "hsnw"}, {}, UnknownKind, "'hsnw' is no kind of index; known are auto, exact, faiss, hnsw, kd_tree"),
        ({"kind": "kd_tree"}, {"m": "8"}, UnknownParameter, "unknown parameter 'm'; kd_tree knows: leaf_size"),
        ({"kind": "kd_tree"}, {"leaf_size": "0"}, InvalidParameter, "leaf_size must be between 1 and 1e.06, got '0'"),
        ({"kind": "kd_tree"}, {"leaf_size": "many"}, InvalidParameter, "leaf_size must be an integer, got 'many'"),
        ({"kind": "auto"}, {"m": "8"}, InvalidParameter, "auto takes no parameters"),
        ({"kind": "exact"}, {"m": "8"}, UnknownParameter, "exact knows: no parameters"),
    ],
)
def test_what_the_index_step_would_refuse_is_refused_before_anything_is_written(
    corpus: Path, out: Path, settings: dict[str, Any], params: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        build(corpus, out, params, **settings)
    assert not out.exists()


def test_a_build_that_is_refused_leaves_what_serves_and_the_next_one_works(tmp_path: Path, out: Path) -> None:
    corpus = write_corpus(tmp_path / "demo.parquet")
    build(corpus, out, version="v1")
    before = answers(out, make_vectors(3, 8, seed=1))
    nan = pq.read_table(corpus)
    vectors = make_vectors(300, 8)
    vectors[200, 3] = np.nan
    pq.write_table(nan.set_column(1, "vector", pa.array(list(vectors))), tmp_path / "nan.parquet")
    few = write_corpus(tmp_path / "few.parquet", n=3)
    bert = str(write_tiny_bert(tmp_path / "bert", dim=16))
    with pytest.raises(BadRow, match=r"row 200 \(id 'row-0200'\): its vector\[3\] is nan"):
        build(tmp_path / "nan.parquet", out, name="demo", version="v2", shards=2, batch_rows=64)
    assert untouched(out, before)
    with pytest.raises(ConfigError, match=r"bert gives dim 16, the corpus' vectors have 8"):
        build(corpus, out, version="v2", encoder=bert)
    assert untouched(out, before)
    with pytest.raises(ConfigError, match=r"3 rows leave . of 8 shards empty: use fewer --shards"):
        build(few, out, name="demo", version="v2", shards=8)
    assert untouched(out, before)
    with pytest.raises(ConfigError, match="no encoder folder"):
        build(corpus, out, version="v2", encoder=str(tmp_path / "none"))
    assert untouched(out, before)
    assert IndexFolder(out / "demo").versions() == ["v1"]
    build(corpus, out, version="v2")
    assert untouched(out, before) and IndexFolder(out / "demo").current() == "v2"
    assert not strays(IndexFolder(out / "demo"))


# ------------------------------------------------------------------------------------- what is resumed

# A step that fails (its failpoint, and the how manyeth of that name), and what an earlier build then had done.
STEPS = [
    ("create vectors.npy", 2, []),
    (f"create {GRAPH_FILE}", 1, ["ingest"]),
    (f"create {GRAPH_FILE}", 2, ["ingest", "index of shard 0"]),
    ("create manifest.json", 1, ["ingest", "index of shard 0", "index of shard 1"]),
    ("fsync manifest.json", 1, ["everything but publishing"]),
    ("rename v1", 1, ["everything but publishing"]),
    ("create CURRENT.tmp", 1, ["everything but serving"]),
    ("rename CURRENT", 1, ["everything but serving"]),
]


@pytest.mark.parametrize(("point", "nth", "done"), STEPS)
@pytest.mark.parametrize("named", [True, False])
def test_an_interrupted_build_goes_on_after_its_last_whole_step(
    corpus: Path,
    tmp_path: Path,
    out: Path,
    failing: Callable[[str, int], None],
    monkeypatch: pytest.MonkeyPatch,
    point: str,
    nth: int,
    done: list[str],
    named: bool,
) -> None:
    settings = {"kind": GRAPH, "shards": 2, "fields": "label", "version": "v1"}
    whole = build(corpus, tmp_path / "whole", **settings)
    failing(point, nth)
    with pytest.raises(StorageError, match="Input/output error"):
        build(corpus, out, **settings)
    assert IndexFolder(out / "demo").current() is None
    monkeypatch.setattr(storage, "failpoint", storage.no_failpoint)
    read, built = [], []
    read_batches, base_build = Corpus.read_batches, base.build
    monkeypatch.setattr(Corpus, "read_batches", lambda self, n, **k: read.append(n) or read_batches(self, n, **k))
    monkeypatch.setattr(base, "build", lambda *a, **b: built.append(a) or base_build(*a, **b))
    if not named:
        del settings["version"]
    result = build(corpus, out, resume=True, **settings)
    assert result.resumed == done
    assert len(read) == (0 if done else 1), "the corpus is read again only where it has to be"
    assert len(built) == (2 - sum("index" in step for step in done) if "everything" not in " ".join(done) else 0)
    if named or done:
        assert Path(result.path).name == "v1"
    assert file_hashes(result.manifest) == file_hashes(whole.manifest)
    assert file_hashes(current_version(IndexFolder(out / "demo"))) == file_hashes(whole.manifest)
    assert answers(out, make_vectors(3, 8, seed=1)) == answers(tmp_path / "whole", make_vectors(3, 8, seed=1))
    assert not strays(IndexFolder(out / "demo"))


def test_a_failure_while_certifying_costs_no_index(corpus: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(certify.Certifier, "certificate", lambda self, target: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            build(corpus, out, kind=GRAPH, shards=2)
    assert build(corpus, out, kind=GRAPH, shards=2, resume=True).resumed == [
        "ingest",
        "index of shard 0",
        "index of shard 1",
    ]


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
@pytest.mark.parametrize(
    ("file", "done"),
    [
        ("shards/001/vectors.npy", []),
        (f"shards/000/index/{GRAPH_FILE}", ["ingest", "index of shard 1"]),
        ("manifest.json", ["ingest", "index of shard 0", "index of shard 1"]),
    ],
)
def test_a_resumed_build_trusts_no_file_that_is_not_what_was_written(
    corpus: Path,
    out: Path,
    failing: Callable[[str, int], None],
    monkeypatch: pytest.MonkeyPatch,
    file: str,
    done: list[str],
    damage: str,
) -> None:
    failing("rename v1", 1)
    with pytest.raises(StorageError):
        build(corpus, out, kind=GRAPH, shards=2, version="v1")
    monkeypatch.setattr(storage, "failpoint", storage.no_failpoint)
    path = out / "demo" / ".staging-v1" / file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    if damage == "delete":
        path.unlink()
    else:
        path.write_bytes(data if damage == "flip" else data[:-1])
    assert build(corpus, out, kind=GRAPH, shards=2, version="v1", resume=True).resumed == done
    current_version(IndexFolder(out / "demo"))


@pytest.mark.parametrize("what", ["corpus", "rows", "seed", "kind", "params", "shards", "recall", "fields", "encoder"])
def test_a_build_of_something_else_is_not_resumed(
    tmp_path: Path, out: Path, failing: Callable[[str, int], None], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    corpus = write_corpus(tmp_path / "demo.parquet", n=60, dim=16)
    bert = write_tiny_bert(tmp_path / "bert", dim=16)
    settings: dict[str, Any] = {"kind": GRAPH, "shards": 2, "encoder": str(bert)}
    params, other_params = ({"m": m} if GRAPH == "hnsw" else {"factory": f"HNSW{m}"} for m in ("8", "9"))
    failing("create manifest.json", 1)
    with pytest.raises(StorageError):
        build(corpus, out, params, **settings)
    monkeypatch.setattr(storage, "failpoint", storage.no_failpoint)
    others = {
        "seed": {"seed": 8},
        "kind": {"kind": "exact"},
        "shards": {"shards": 3},
        "recall": {"recall": 0.9},
        "fields": {"fields": "label"},
    }
    if what == "corpus":
        write_corpus(corpus, n=61, dim=16, seed=8)
    elif what == "rows":  # of the same size, with the same ids
        write_corpus(corpus, n=60, dim=16, seed=8)
        os.utime(corpus, ns=(1, 1))
    elif what == "encoder":
        write_tiny_bert(bert, dim=16, seed=8)
        os.utime(bert / "model.onnx", ns=(1, 1))
    elif what == "params":
        params = other_params
    settings.update(others.get(what, {}))
    result = build(corpus, out, {} if what == "kind" else params, resume=True, **settings)
    assert result.resumed == []
    seed, n = (8, 61 if what == "corpus" else 60) if what in ("corpus", "rows") else (7, 60)
    vectors = make_vectors(n, 16, seed)
    shards = settings["shards"]
    held = everything(Path(result.path), shards)
    assert len(held) == n and all(np.array_equal(vector, vectors[row]) for _, row, vector in held)
    folder = IndexFolder(out / "demo")
    folder.gc(keep=0)
    assert not strays(folder)


def test_a_build_without_resume_sweeps_what_the_dead_left(
    corpus: Path, out: Path, failing: Callable[[str, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    failing("create manifest.json", 1)
    with pytest.raises(StorageError):
        build(corpus, out, version="v1")
    monkeypatch.setattr(storage, "failpoint", storage.no_failpoint)
    folder = IndexFolder(out / "demo")
    assert any(".staging-v1" in name for name in strays(folder))
    assert build(corpus, out, version="v2").resumed == []
    assert not strays(folder) and folder.versions() == ["v2"]


@pytest.mark.parametrize("resume", [False, True])
def test_a_living_build_is_neither_swept_nor_resumed_by_another(
    corpus: Path, out: Path, monkeypatch: pytest.MonkeyPatch, resume: bool
) -> None:
    folder = IndexFolder(out / "demo")
    inner: list[str] = []

    def meanwhile(point: str) -> None:
        if point == "create manifest.json" and not inner:
            inner.append("started")
            with pytest.raises(VersionExists, match="being built by another process"):
                build(corpus, out, version="v1", seed=9, resume=resume)
            inner.append(build(corpus, out, resume=resume, version="v2").path)
            folder.gc(keep=0)

    monkeypatch.setattr(storage, "failpoint", meanwhile)
    result = build(corpus, out, version="v1")
    assert len(inner) == 2 and Path(inner[1]).name == "v2"
    assert folder.versions() == ["v2", "v1"] or folder.versions() == ["v1", "v2"]
    assert folder.current() == "v1", "who ends last serves"
    for version in ("v1", "v2"):
        check_version(folder.path / version)
    assert file_hashes(result.manifest) == file_hashes(check_version(folder.path / "v2"))
    assert not strays(folder)


def test_what_cannot_be_read_back_is_not_published(corpus: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that does not notice a full disk leaves a short file, with a hash to match."""
    build(corpus, out, version="v1", kind=GRAPH)
    before = answers(out, make_vectors(3, 8, seed=1))
    file_entries = index_shards.file_entries

    def cut(folder: Path, paths: list[Path]) -> Any:
        for path in paths:
            if path.name == GRAPH_FILE:
                path.write_bytes(path.read_bytes()[:-100])
        return file_entries(folder, paths)

    with monkeypatch.context() as broken:
        broken.setattr(index_shards, "file_entries", cut)
        with pytest.raises(StorageError, match=f"cannot be read back: .*{GRAPH_FILE}"):
            build(corpus, out, version="v2", kind=GRAPH)
    assert untouched(out, before) and IndexFolder(out / "demo").versions() == ["v1"]
    assert build(corpus, out, version="v2", kind=GRAPH, resume=True).resumed == ["ingest"]


@pytest.fixture(autouse=True)
def no_failpoint_is_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    yield
    monkeypatch.undo()
    assert storage.failpoint is storage.no_failpoint
