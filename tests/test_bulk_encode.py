"""Bulk encoding: what was encoded once is not encoded again, and the vectors are those of an undisturbed build."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpora import WORDS, build, current_version, file_hashes, make_texts, strays, write_corpus
from tiny_bert import write_tiny_bert

from index_builders import bulk_encode, ingest, pipeline
from index_builders.bulk_encode import EncodedTexts, encode_corpus, windows
from index_builders.corpus import Batch
from vecsvc import encoders, storage
from vecsvc.encoders.onnx import OnnxEncoder, open_encoder
from vecsvc.errors import BadRow, ConfigError, CorpusError, EncoderError, StorageError
from vecsvc.storage import IndexFolder

ROWS = 40


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bert(tmp_path_factory.mktemp("encoders") / "bert", dim=16)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three windows of 16, 16 and 8 texts, each encoded in calls of four."""
    monkeypatch.setattr(bulk_encode, "WINDOW_ROWS", 16)
    monkeypatch.setattr(bulk_encode, "CALL_TEXTS", 4)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "demo.parquet", n=ROWS, dim=0)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every passage that is encoded from now on."""
    seen: list[str] = []
    encode = OnnxEncoder.encode

    def watched(self: OnnxEncoder, texts: Sequence[str], role: Any = "query") -> Any:
        if role == "passage":
            seen.extend(texts)
        return encode(self, texts, role)

    monkeypatch.setattr(OnnxEncoder, "encode", watched)
    return seen


def batches(texts: list[str], *sizes: int) -> Iterator[Batch]:
    first = 0
    for size in sizes:
        ids = pa.array(range(first, first + size))
        yield Batch(first, ids, np.zeros(size, np.uint64), None, texts[first : first + size], None)
        first += size


def dying_at(point: str, nth: int) -> Callable[[str], None]:
    """A failpoint that ends the build as ctrl-C does, the nth time that one of that name is met."""
    met = itertools.count(1)

    def hook(name: str) -> None:
        if name.startswith(point) and next(met) == nth:
            raise KeyboardInterrupt

    return hook


# ------------------------------------------------------------------------------------------------ windows


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("sizes", [(40,), (16, 16, 8), (1,) * 40, (3, 30, 7), (39, 1)])
def test_windows_do_not_depend_on_the_batches(sizes: tuple[int, ...]) -> None:
    found = list(windows(batches(make_texts(40), *sizes)))
    assert [(window.first, len(window.texts)) for window in found] == [(0, 16), (16, 16), (32, 8)]
    assert [text for window in found for text in window.texts] == make_texts(40)
    assert [id for window in found for id in window.ids] == list(range(40))
    assert [row for window in found for row in window.rows] == list(range(40))


@pytest.mark.usefixtures("small")
def test_the_version_is_the_same_whatever_the_batches_the_files_and_the_threads(
    corpus: Path, tmp_path: Path, bert: Path
) -> None:
    table = pq.read_table(corpus)
    (tmp_path / "parts").mkdir()
    for number, part in enumerate((table.slice(0, 5), table.slice(5, 30), table.slice(35))):
        pq.write_table(part, tmp_path / "parts" / f"{number}.parquet")
    made = [
        file_hashes(build(source, tmp_path / f"out{i}", name="demo", shards=2, encoder=str(bert), **how).manifest)
        for i, (source, how) in enumerate(
            [(corpus, {}), (corpus, {"batch_rows": 7, "threads": 3}), (tmp_path / "parts", {"threads": 2})]
        )
    ]
    assert made[0] == made[1] == made[2]


@pytest.mark.usefixtures("small")
def test_texts_of_like_length_are_encoded_together_and_come_back_in_their_places(bert: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(7)
    texts = [" ".join(random.choice(WORDS, random.integers(1, 20))) for _ in range(40)]
    encoder = open_encoder(bert, num_threads=1)
    seen: list[list[int]] = []

    class Watched:
        spec = encoder.spec

        def encode(self, given: Sequence[str], role: Any = "query") -> Any:
            seen.append([len(text) for text in given])
            return encoder.encode(given, role)

    into = EncodedTexts(tmp_path, encoder.spec.dim)
    done: list[int] = []
    encode_corpus(Watched(), batches(texts, 40), into, metric="l2", threads=1, progress=done.append)  # type: ignore[arg-type]
    assert np.allclose(into.of(0, 40), encoder.encode(texts, "passage"), atol=1e-5)
    for first, n in ((0, 1), (15, 2), (10, 30), (39, 1)):
        assert np.array_equal(into.of(first, n), into.of(0, 40)[first : first + n])
    assert sum(done) == 40 and all(len(lengths) == 4 for lengths in seen)
    for start in (0, 4, 8):
        lengths = [length for call in seen[start : start + 4] for length in call]
        assert lengths == sorted(lengths, reverse=True), "the longest first, in each window"
    encoder.close()


@pytest.mark.parametrize(
    ("run", "threads", "session", "pool"), [(1, 2, 1, 2), (0, 2, 2, 1), (2, 4, 2, 2), (4, 1, 1, 1)]
)
def test_cores_can_run_other_texts_or_share_one_run(
    corpus: Path,
    tmp_path: Path,
    bert: Path,
    monkeypatch: pytest.MonkeyPatch,
    run: int,
    threads: int,
    session: int,
    pool: int,
) -> None:
    opened: list[int] = []
    pools: list[int] = []
    executor = bulk_encode.ThreadPoolExecutor

    def opens(*a: Any, num_threads: int, **b: Any) -> Any:
        opened.append(num_threads)
        return open_encoder(*a, num_threads=num_threads, **b)

    def starts(workers: int, **names: Any) -> Any:
        pools.append(workers)
        return executor(workers, **names)

    monkeypatch.setattr(bulk_encode, "RUN_THREADS", run)
    monkeypatch.setattr(ingest, "open_encoder", opens)
    monkeypatch.setattr(bulk_encode, "ThreadPoolExecutor", starts)
    build(corpus, tmp_path / "out", encoder=str(bert), threads=threads)
    assert (opened, pools) == ([session], [pool])


# ------------------------------------------------------------------------------------------------- resume


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("point", "nth", "kept"),
    [
        ("create part.npy.tmp", 1, 0),
        ("fsync part.npy.tmp", 2, 16),
        ("rename 0000", 3, 32),
        ("create vectors.npy", 1, 40),
        ("rename .state-v1", 2, 40),
    ],
)
def test_a_build_that_died_goes_on_and_encodes_nothing_twice(
    corpus: Path,
    tmp_path: Path,
    bert: Path,
    encoded: list[str],
    monkeypatch: pytest.MonkeyPatch,
    point: str,
    nth: int,
    kept: int,
) -> None:
    settings: dict[str, Any] = {"shards": 2, "encoder": str(bert), "version": "v1"}
    whole = build(corpus, tmp_path / "whole", **settings)
    with monkeypatch.context() as dying:
        dying.setattr(storage, "failpoint", dying_at(point, nth))
        with pytest.raises(KeyboardInterrupt):
            build(corpus, tmp_path / "out", **settings)
    encoded.clear()
    result = build(corpus, tmp_path / "out", resume=True, **settings)
    assert result.resumed == ([f"encoding of {kept} of 40 texts"] if kept else [])
    assert sorted(encoded) == sorted(make_texts(ROWS)[kept:])
    assert file_hashes(result.manifest) == file_hashes(whole.manifest)
    assert not strays(IndexFolder(tmp_path / "out" / "demo"))
    assert {"encode", "ingest"} <= set(result.manifest.provenance.phases)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "rename"])
def test_a_part_that_is_not_what_was_written_is_encoded_anew(
    corpus: Path, tmp_path: Path, bert: Path, encoded: list[str], monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    with monkeypatch.context() as dying:
        dying.setattr(storage, "failpoint", dying_at("create vectors.npy", 1))
        with pytest.raises(KeyboardInterrupt):
            build(corpus, tmp_path / "out", encoder=str(bert), version="v1")
    parts = sorted((tmp_path / "out" / "demo" / ".staging-v1" / "encoded").iterdir())
    assert [part.name[:12] for part in parts] == ["000000000000", "000000000016", "000000000032"]
    data = bytearray(parts[1].read_bytes())
    data[-3] ^= 4
    if damage in ("delete", "rename"):
        parts[1].rename(parts[1].with_name("part.npy.tmp")) if damage == "rename" else parts[1].unlink()
    else:
        parts[1].write_bytes(data if damage == "flip" else data[:-1])
    encoded.clear()
    result = build(corpus, tmp_path / "out", resume=True, encoder=str(bert), version="v1")
    assert result.resumed == ["encoding of 24 of 40 texts"] and sorted(encoded) == sorted(make_texts(ROWS)[16:32])
    current_version(IndexFolder(tmp_path / "out" / "demo"))


@pytest.mark.usefixtures("small")
def test_another_encoder_starts_anew(
    corpus: Path, tmp_path: Path, bert: Path, encoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as dying:
        dying.setattr(storage, "failpoint", dying_at("create vectors.npy", 1))
        with pytest.raises(KeyboardInterrupt):
            build(corpus, tmp_path / "out", encoder=str(bert), version="v1")
    encoded.clear()
    other = write_tiny_bert(tmp_path / "bert", dim=16, seed=8)
    assert build(corpus, tmp_path / "out", resume=True, encoder=str(other), version="v1").resumed == []
    assert sorted(encoded) == sorted(make_texts(ROWS))


def test_progress_tells_texts_a_second_and_what_was_there_before(
    corpus: Path, tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bulk_encode, "WINDOW_ROWS", 16)
    settings: dict[str, Any] = {"out": str(tmp_path / "out"), "encoder": str(bert), "threads": 1, "version": "v1"}
    with monkeypatch.context() as dying:
        dying.setattr(storage, "failpoint", dying_at("create part.npy.tmp", 3))
        with pytest.raises(KeyboardInterrupt):
            pipeline.build_index(str(corpus), pipeline.BuildSettings(**settings), stream=io.StringIO())
    clock = itertools.count(0.0, 3.0)
    stream = io.StringIO()
    with monkeypatch.context() as patient:
        patient.setattr("index_builders.progress.time.monotonic", lambda: next(clock))
        pipeline.build_index(str(corpus), pipeline.BuildSettings(**settings), resume=True, stream=stream)
    assert re.search(r"encoding: 40 of 40 texts \(100 %\), \d+\.0 s, [\d.]+ texts/s\n", stream.getvalue())


# ---------------------------------------------------------------------------------------- what is refused


@pytest.mark.usefixtures("small")
def test_a_text_whose_vector_cannot_be_ranked_is_refused_with_row_and_id(
    corpus: Path, tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = OnnxEncoder.encode

    def broken(self: OnnxEncoder, texts: Sequence[str], role: Any = "query") -> Any:
        vectors = encode(self, texts, role)
        vectors[[text == make_texts(ROWS)[21] for text in texts]] = 0
        return vectors

    monkeypatch.setattr(OnnxEncoder, "encode", broken)
    with pytest.raises(BadRow, match=r"row 21 \(id 'row-0021'\): of its text the encoder made .* all zeros"):
        build(corpus, tmp_path / "out", encoder=str(bert), version="v1")
    assert strays(IndexFolder(tmp_path / "out" / "demo")) == []


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("threads", [1, 3])
def test_an_encoder_that_fails_ends_the_build_and_keeps_what_was_whole(
    corpus: Path, tmp_path: Path, bert: Path, encoded: list[str], monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    encode, late = OnnxEncoder.encode, set(make_texts(ROWS)[32:])

    def failing(self: OnnxEncoder, texts: Sequence[str], role: Any = "query") -> Any:
        if role == "passage" and late.intersection(texts):
            raise EncoderError("the model fell over")
        return encode(self, texts, role)

    with monkeypatch.context() as broken:
        broken.setattr(OnnxEncoder, "encode", failing)
        with pytest.raises(EncoderError, match=r"^the model fell over$"):  # on all, so that no row is to blame
            build(corpus, tmp_path / "out", encoder=str(bert), version="v1", threads=threads)
    encoded.clear()
    build(corpus, tmp_path / "out", resume=True, encoder=str(bert), version="v1")
    assert sorted(encoded) == sorted(make_texts(ROWS)[32:])


@pytest.mark.usefixtures("small")
def test_a_text_that_the_encoder_fails_on_is_named_by_its_row(
    corpus: Path, tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = OnnxEncoder.encode

    def failing(self: OnnxEncoder, texts: Sequence[str], role: Any = "query") -> Any:
        if role == "passage" and make_texts(ROWS)[35] in texts:
            raise EncoderError("the model fell over")
        return encode(self, texts, role)

    monkeypatch.setattr(OnnxEncoder, "encode", failing)
    with pytest.raises(BadRow, match=r"row 35 \(id 'row-0035'\): the encoder fails on its text: the model fell over"):
        build(corpus, tmp_path / "out", encoder=str(bert))


def test_a_repeated_id_is_refused_before_anything_is_encoded(tmp_path: Path, bert: Path, encoded: list[str]) -> None:
    pq.write_table(pa.table({"id": ["a", "b", "a"], "text": ["red", "green", "blue"]}), tmp_path / "twice.parquet")
    with pytest.raises(BadRow, match="has that id already"):
        build(tmp_path / "twice.parquet", tmp_path / "out", encoder=str(bert))
    assert encoded == []


# ------------------------------------------------------------------------------------ the default encoder


def test_texts_without_an_encoder_get_the_default_one(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoders, "DEFAULT_FOLDER", write_tiny_bert(tmp_path / "default", dim=16))
    for number, how in enumerate(({}, {"encoder": "default"})):
        entry = build(corpus, tmp_path / f"out{number}", **how).manifest.encoder
        assert entry is not None and entry.name == "default"


def test_vectors_get_no_encoder_unless_one_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoders, "DEFAULT_FOLDER", write_tiny_bert(tmp_path / "default", dim=16))
    corpus = write_corpus(tmp_path / "demo.parquet", n=20, dim=16)
    assert build(corpus, tmp_path / "out").manifest.encoder is None
    assert build(corpus, tmp_path / "out", encoder="default").manifest.encoder is not None


def test_without_a_default_encoder_the_error_says_what_to_do(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoders, "DEFAULT_FOLDER", tmp_path / "none")
    with pytest.raises(CorpusError, match="has texts and no vectors: name an encoder with --encoder DIR"):
        build(corpus, tmp_path / "out")
    with pytest.raises(ConfigError, match="no default encoder in"):
        build(corpus, tmp_path / "out", encoder="default")
    assert not (tmp_path / "out").exists()


def test_parts_hold_no_files_open_and_are_not_deleted_where_they_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    done = bulk_encode.EncodedTexts(tmp_path, 4)
    for number in range(20):
        first = number * bulk_encode.WINDOW_ROWS
        done.add(bulk_encode.Window(first, ["a"], [first], [first]), np.full((1, 4), number, dtype=np.float32))
    again = bulk_encode.EncodedTexts(tmp_path, 4)
    assert again.rows == 20 and float(again.of(bulk_encode.WINDOW_ROWS, 1)[0, 0]) == 1.0
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 2

    def refuse(path: Path) -> str:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(bulk_encode, "sha256", refuse)
    with pytest.raises(StorageError, match="Too many open files"):
        bulk_encode.EncodedTexts(tmp_path, 4)
    assert len(list((tmp_path / bulk_encode.FOLDER).iterdir())) == 20
