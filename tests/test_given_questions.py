"""`--questions`: recall is measured with what the user asks, and the settings that serve are chosen by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from corpora import GRAPH, build, make_vectors, write_corpus
from tiny_bert import write_tiny_bert

from index_builders.given_questions import read_questions
from index_builders.publish import publish
from index_builders.shard_build import build_shard
from vecsvc import indexes
from vecsvc.cli import cli
from vecsvc.config import BuildSettings
from vecsvc.encoders.onnx import open_encoder
from vecsvc.errors import BadRow, ConfigError, CorpusError, CorpusUnreadable, MissingColumn, PartsDiffer
from vecsvc.exact_search import ExactSearch
from vecsvc.ranking import recall
from vecsvc.types import Vectors

DIM = 8


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.parquet", n=600)


def write(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def vectors_file(path: Path, vectors: Vectors, name: str = "vector") -> Path:
    return write(path, **{name: pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])})


@pytest.mark.parametrize("shards", [1, 3])
def test_the_certificate_is_of_these_questions(corpus: Path, tmp_path: Path, shards: int) -> None:
    asked = make_vectors(50, DIM, seed=91)
    file = vectors_file(tmp_path / "asked.parquet", asked, "emb")
    settings = {"kind": GRAPH, "metric": "l2", "shards": shards, "questions": str(file)}
    result = build(corpus, tmp_path / "out", certificate_queries=1000, **settings)
    certificate = result.manifest.certificate
    assert certificate is not None and certificate.queries == 50
    assert certificate.method == f"questions of {file}; exact distances; ties are no errors"
    stored = [np.load(Path(result.path) / f"shards/{n:03d}/vectors.npy") for n in range(shards)]
    bounds = ExactSearch(np.concatenate(stored), "l2").search(asked, 10).distances[:, 9]
    for point in certificate.points:
        params = indexes.search_params(GRAPH, **point.params)
        found = [
            indexes.load(Path(result.path) / f"shards/{n:03d}/index", entry.spec, vectors=stored[n]).search(
                asked, 10, params
            )
            for n, entry in enumerate(result.manifest.shards)
        ]
        distances = np.sort(np.concatenate([part.distances for part in found], axis=1), axis=1)[:, :10]
        assert point.recall == pytest.approx(recall(distances, bounds).mean(), abs=1e-3)
    # Questions of one's own may be answered by less than the kind's defaults.
    assert result.manifest.search == certificate.points[0].params == {"ef_search": 16}


def test_some_are_drawn_over_all_files(corpus: Path, tmp_path: Path) -> None:
    asked = make_vectors(300, DIM, seed=92)
    folder = tmp_path / "asked"
    folder.mkdir()
    for number in range(3):
        vectors_file(folder / f"{number}.parquet", asked[100 * number : 100 * (number + 1)])
    drawn = read_questions(str(folder), "l2", DIM, 60, seed=5)
    assert isinstance(drawn, np.ndarray) and drawn.shape == (60, DIM)
    at = [int(np.flatnonzero((asked == row).all(axis=1))[0]) for row in drawn]
    assert at == sorted(set(at)) and at[0] < 100 and at[-1] >= 200
    again = read_questions(str(folder), "l2", DIM, 60, seed=5)
    assert np.array_equal(again, drawn)
    whole = read_questions(str(folder), "l2", DIM, 10_000, seed=5)
    assert np.array_equal(whole, asked)


def test_texts_are_encoded_as_queries(tmp_path: Path) -> None:
    encoder = write_tiny_bert(tmp_path / "bert", dim=16)
    corpus = write(
        tmp_path / "texts.parquet", id=[f"t{i}" for i in range(40)], text=[f"word {i} of it" for i in range(40)]
    )
    asked = write(tmp_path / "asked.parquet", query=["word 3 of it", "word 17", "none of it", ""])
    result = build(corpus, tmp_path / "out", encoder=str(encoder), questions=str(asked), kind="exact")
    certificate = result.manifest.certificate
    assert certificate is not None and (certificate.queries, certificate.points[0].recall) == (4, 1.0)
    opened = open_encoder(encoder, name="bert", num_threads=1)
    vectors = opened.encode(["a question"], "query")
    opened.close()
    with pytest.raises(BadRow, match="its vector has 5 values, those of the index have 16; give vectors of"):
        build(
            corpus,
            tmp_path / "out",
            encoder=str(encoder),
            questions=str(vectors_file(tmp_path / "5.parquet", make_vectors(2, 5))),
        )
    by_vector = vectors_file(tmp_path / "vectors.parquet", vectors)
    again = build(corpus, tmp_path / "again", encoder=str(encoder), questions=str(by_vector), kind="exact")
    assert again.manifest.certificate is not None and again.manifest.certificate.queries == 1


def test_parts_are_measured_with_the_same_questions(corpus: Path, tmp_path: Path) -> None:
    file = vectors_file(tmp_path / "asked.parquet", make_vectors(20, DIM, seed=93))
    for number in range(2):
        settings = BuildSettings(
            out=str(tmp_path / "out"), name="demo", version="v1", shard=f"{number}/2", questions=str(file), kind="exact"
        )
        build_shard(str(corpus), settings)
    _, manifest = publish(tmp_path / "out", "v1")
    assert manifest.certificate is not None and manifest.certificate.queries == 20
    assert manifest.certificate.method.startswith(f"each shard by itself: questions of {file};")


def test_parts_that_were_asked_other_questions_do_not_fit_wherever_their_files_lie(
    corpus: Path, tmp_path: Path
) -> None:
    def part(number: int, file: Path, version: str) -> None:
        settings = BuildSettings(
            out=str(tmp_path / "out"),
            name="demo",
            version=version,
            shard=f"{number}/2",
            questions=str(file),
            kind="exact",
        )
        build_shard(str(corpus), settings)

    one, other = (vectors_file(tmp_path / f"{seed}.parquet", make_vectors(20, DIM, seed=seed)) for seed in (1, 2))
    copy = tmp_path / "copy.parquet"
    copy.write_bytes(one.read_bytes())
    part(0, one, "v1")
    part(1, copy, "v1")
    assert publish(tmp_path / "out", "v1")[1].certificate is not None
    part(0, one, "v2")
    part(1, other, "v2")
    with pytest.raises(PartsDiffer, match="the sha256 of its --questions"):
        publish(tmp_path / "out", "v2")


def test_what_cannot_be_asked_is_refused_before_the_work_begins(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    good = make_vectors(3, DIM, seed=94)
    bad = good.copy()
    bad[1, 2] = np.nan
    cases: list[tuple[Path, type[Exception], str]] = [
        (tmp_path / "none.parquet", CorpusUnreadable, "no such file"),
        (write(tmp_path / "a.parquet", question=["x"]), MissingColumn, "neither vectors .* nor texts .*'question'"),
        (write(tmp_path / "b.parquet", query=["x"]), ConfigError, "are texts, and the index has no encoder"),
        (write(tmp_path / "c.parquet", query=[1, 2]), CorpusError, "must be strings, they are int64"),
        (write(tmp_path / "d.parquet", vector=["x"]), CorpusError, "must be lists of float16"),
        (
            vectors_file(tmp_path / "e.parquet", make_vectors(3, 5)),
            BadRow,
            r"row 0 of e.parquet: its vector has 5 values",
        ),
        (vectors_file(tmp_path / "f.parquet", bad), BadRow, r"row 1 of f.parquet: its vector\[2\] is nan"),
        (vectors_file(tmp_path / "g.parquet", good[:0]), CorpusError, "has no rows"),
        (
            write(tmp_path / "h.parquet", vector=[good[0].tolist(), None]),
            BadRow,
            "row 1 of h.parquet: its vector is null",
        ),
        (
            write(tmp_path / "i.parquet", vector=[good[0].tolist(), [1.0]]),
            BadRow,
            "row 1 of i.parquet: .* has 1 values",
        ),
    ]
    for file, error, message in cases:
        with pytest.raises(error, match=message):
            build(corpus, out, questions=str(file))
    with pytest.raises(ConfigError, match="let --certificate-queries be more than 0"):
        build(corpus, out, questions=str(vectors_file(tmp_path / "j.parquet", good)), certificate_queries=0)
    assert not out.exists()


def test_the_command_line_says_what_recall_was_measured_with(corpus: Path, tmp_path: Path) -> None:
    file = vectors_file(tmp_path / "asked.parquet", make_vectors(20, DIM, seed=95))
    out = str(tmp_path / "out")
    given = CliRunner().invoke(cli, ["build-index", str(corpus), "--out", out, "--questions", str(file)])
    assert given.exit_code == 0 and f"(20 questions of {file})" in given.output and "give 100 or more" in given.output
    shown = CliRunner().invoke(cli, ["inspect", out])
    assert f"of 20 questions of {file}, target" in shown.output
    moved = CliRunner().invoke(cli, ["build-index", str(corpus), "--out", out])
    assert "(256 moved rows of the corpus)" in moved.output
