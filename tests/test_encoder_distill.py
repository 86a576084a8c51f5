"""A distilled encoder opens, agrees with what was trained, and comes near its teacher; bad input is refused."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from index_builders import cnn_lstm_train
from index_builders.cnn_lstm_graph import write_cnn_lstm
from index_builders.cnn_lstm_train import Lesson, TokenLists, Training, quantized
from index_builders.encoder_distill import Student, distill, read_rows, train_tokenizer
from tests.tiny_bert import WORDS, write_tiny_bert
from vecsvc.cli import cli
from vecsvc.encoders.onnx import open_encoder
from vecsvc.errors import BackendMissing, ConfigError, CorpusError

torch = pytest.importorskip("torch", reason="pip install 'vecsvc[train]'")
QUICK = Training(channels=8, hidden=8, bag_epochs=3, epochs=1)


def write_texts(path: Path, n: int = 400) -> Path:
    rng = np.random.default_rng(7)
    words = WORDS.split()
    texts = [" ".join(rng.choice(words, rng.integers(3, 12))) for _ in range(n)]
    queries = [" ".join(text.split()[:3]) if i % 2 else None for i, text in enumerate(texts)]
    pq.write_table(pa.table({"text": texts, "query": queries}), path)
    return path


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bert(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def lesson() -> Lesson:
    rng = np.random.default_rng(7)
    lengths = rng.integers(1, 9, 60)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    vectors = rng.standard_normal((60, 12)).astype(np.float16)
    return Lesson(
        tokens=TokenLists(rng.integers(0, 50, starts[-1]).astype(np.int32), starts),
        vectors=vectors / np.linalg.norm(vectors, axis=1, keepdims=True).astype(np.float16),
        pairs=np.array([[1, 2], [3, 4], [5, 6]]),
        table=rng.standard_normal((50, 10)).astype(np.float32),
        back=rng.standard_normal((10, 12)).astype(np.float32),
    )


def test_the_written_model_gives_what_the_trained_one_gave(lesson: Lesson, tmp_path: Path) -> None:
    from vecsvc.onnx_session import OnnxSession

    torch.manual_seed(7)
    model = cnn_lstm_train._model(torch, lesson, QUICK)
    torch.nn.init.normal_(model.wh)
    weights = quantized(model.weights())
    with torch.no_grad():
        model.table.copy_(torch.from_numpy(weights["table_q"] * weights["table_scale"][:, None]))
        ids, lengths = lesson.tokens.padded(np.arange(60))
        expected = model(ids, lengths).numpy()
    write_cnn_lstm(tmp_path, weights, half=False)
    mask = (np.arange(ids.shape[1]) < lengths[:, None]).astype(np.int64)
    session = OnnxSession(tmp_path / "model.onnx")
    [found] = session.run({"input_ids": ids, "attention_mask": mask}, ["sentence_embedding"])
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_one_seed_gives_one_set_of_weights(lesson: Lesson) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        one, two = (cnn_lstm_train.train(lesson, QUICK, lambda line: None) for _ in range(2))
    finally:
        torch.set_num_threads(threads)
    assert all(np.array_equal(one[name], two[name]) for name in one)


def test_a_round_has_every_pair_and_every_other_text_once(lesson: Lesson) -> None:
    batches = cnn_lstm_train._plan(lesson, np.random.default_rng(7))
    texts = sorted(int(row) for batch in batches if batch.ndim == 1 for row in batch)
    pairs = sorted(tuple(map(int, pair)) for batch in batches if batch.ndim == 2 for pair in batch)
    assert texts == sorted(set(range(60)) - {1, 2, 3, 4, 5, 6})
    assert pairs == [(1, 2), (3, 4), (5, 6)]


def test_left_out_tokens_leave_the_others_in_their_order(lesson: Lesson) -> None:
    rows = np.arange(60)
    ids, lengths = cnn_lstm_train._dropped(lesson, rows, 0.5, np.random.default_rng(7))
    for row in rows:
        whole = lesson.tokens.ids[lesson.tokens.starts[row] : lesson.tokens.starts[row + 1]].tolist()
        kept = ids[row, : lengths[row]].tolist()
        assert kept
        rest = iter(whole)
        assert all(token in rest for token in kept)
        assert not ids[row, lengths[row] :].any()


def test_a_distilled_encoder_is_nearer_to_its_teacher_than_chance(teacher: Path, tmp_path: Path) -> None:
    source = write_texts(tmp_path / "texts.parquet")
    lines: list[str] = []
    student = Student(vocabulary=200, width=16, max_tokens=24, training=QUICK)
    spec, measured = distill(teacher, source, tmp_path / "out", student, cache=tmp_path / "cache", tell=lines.append)
    encoder = open_encoder(tmp_path / "out")
    assert (encoder.spec.fingerprint, encoder.spec.dim) == (spec.fingerprint, 32)
    encoder.close()
    assert measured.held_out == 20
    assert measured.recall is not None
    assert measured.cosine > 0.6
    config = msgspec.json.decode((tmp_path / "out" / "encoder.json").read_bytes())
    assert config["measured"]["distill"]["cosine"] == measured.cosine
    assert "Distilled from" in (tmp_path / "out" / "README.md").read_text()
    assert any("table, round 3/3" in line for line in lines)
    # The teacher's vectors were kept: another try begins with them.
    [kept] = (tmp_path / "cache").iterdir()
    before = kept.stat().st_mtime_ns
    distill(teacher, source, tmp_path / "again", student, cache=tmp_path / "cache")
    assert kept.stat().st_mtime_ns == before


def test_what_cannot_be_learnt_from_is_refused_by_name(teacher: Path, tmp_path: Path) -> None:
    few = write_texts(tmp_path / "few.parquet", 20)
    with pytest.raises(CorpusError, match=r"few\.parquet: has 20 rows; an encoder is distilled from 200"):
        distill(teacher, few, tmp_path / "out", Student())
    with pytest.raises(CorpusError, match="has no column 'body', only text, query"):
        read_rows(write_texts(tmp_path / "texts.parquet"), "body", "query")
    (tmp_path / "no.parquet").write_text("text")
    with pytest.raises(CorpusError, match=r"no\.parquet: is no readable Parquet file"):
        read_rows(tmp_path / "no.parquet", "text", "query")
    pq.write_table(pa.table({"text": list(range(300))}), tmp_path / "numbers.parquet")
    with pytest.raises(CorpusError, match="column 'text' holds int, expected texts"):
        read_rows(tmp_path / "numbers.parquet", "text", "query")
    with pytest.raises(ConfigError, match="exists, and an encoder is never overwritten"):
        distill(teacher, few, tmp_path, Student())
    assert not list(tmp_path.glob(".staging*"))


def test_without_torch_the_remedy_is_named(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(BackendMissing, match=r"pip install 'vecsvc\[train\]'"):
        distill(teacher, write_texts(tmp_path / "texts.parquet"), tmp_path / "out", Student())


def test_the_tokenizer_knows_no_special_tokens_and_no_capitals() -> None:
    tokenizer = train_tokenizer(["List the files", "of a folder"] * 50, 60)
    assert tokenizer.encode("LIST files").ids == tokenizer.encode("list files").ids
    assert tokenizer.num_special_tokens_to_add(False) == 0


def test_the_command_says_how_near_the_student_came(teacher: Path, tmp_path: Path) -> None:
    source = write_texts(tmp_path / "texts.parquet")
    flags = ["--vocabulary", "200", "--width", "16", "--max-tokens", "24", "--table-rounds", "1", "--rounds", "1"]
    command = ["encoder", "distill", "--teacher", str(teacher), "--texts", str(source), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(cli, [*command, *flags], catch_exceptions=False)
    assert done.exit_code == 0
    assert re.search(r"out: dim 32, 0\.\d MB, at most 24 tokens; cosine to \S+ \d\.\d{3} on 20 rows", done.output)
    assert "recall@10 of their queries" in done.output
    shown = CliRunner().invoke(cli, ["encoder", "info", str(tmp_path / "out")], catch_exceptions=False)
    assert "measured by distill:" in shown.output and "teacher_recall" in shown.output
