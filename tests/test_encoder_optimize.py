"""An optimized encoder stays near its original, says how near, and is not written where it is too far."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from tiny_bert import WORDS, write_json, write_tiny_bert, write_tiny_source
from tokenizers import Tokenizer

from index_builders import encoder_optimize as module
from index_builders.encoder_compare import Comparison, Loss, Sample, library_texts, measure_speed, read_sample
from index_builders.encoder_info import describe, lines
from index_builders.encoder_optimize import OptimizeSettings, corpus_texts, optimize_encoder
from index_builders.onnx_rewrite import (
    MIN_TABLE_BYTES,
    Recipe,
    fuse,
    load_model,
    smooth,
    write_int8,
    write_model,
    write_watched,
)
from vecsvc import cli, storage
from vecsvc.encoders.folder import read_settings
from vecsvc.encoders.onnx import open_encoder
from vecsvc.errors import (
    BackendMissing,
    ConfigError,
    CorpusError,
    CorpusUnreadable,
    EncoderError,
    InvalidParameter,
    MissingColumn,
    StorageError,
)


def made_up_texts(count: int = 80) -> list[str]:
    random, words = np.random.default_rng(7), WORDS.split()
    return [" ".join(random.choice(words, size=12)) for _ in range(count)]


TEXTS = made_up_texts()


def quick(**settings: Any) -> OptimizeSettings:
    return OptimizeSettings(num_threads=1, **settings)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bert(tmp_path_factory.mktemp("encoder") / "tiny", dim=64)


def operators(folder: Path) -> set[str]:
    return {node.op_type for node in onnx.load(str(folder / "model.onnx")).graph.node}


# -------------------------------------------------------------------------------------------- what is kept


@pytest.mark.parametrize(
    ("precision", "expected"),
    [
        ("int8", {"QAttention", "MatMulInteger", "LayerNormalization"}),
        ("fp16", {"Attention", "BiasGelu", "SkipLayerNormalization"}),
        ("fp32", {"Attention", "BiasGelu", "LayerNormalization"}),
    ],
)
def test_an_optimized_encoder_agrees_with_its_original_and_says_so(
    folder: Path, tmp_path: Path, precision: Any, expected: set[str]
) -> None:
    heard: list[str] = []
    settings = quick(precision=precision, max_loss=0.1)
    done = optimize_encoder(folder, tmp_path / "out", settings, texts=TEXTS, say=heard.append)
    assert expected <= operators(tmp_path / "out") and len(heard) == 1
    original, changed = open_encoder(folder), open_encoder(tmp_path / "out")
    cosines = np.sum(original.encode(TEXTS) * changed.encode(TEXTS), axis=1)
    assert cosines.min() > 0.99 and done.spec == changed.spec
    assert changed.spec.fingerprint != original.spec.fingerprint == done.figures["original"]
    assert (changed.spec.dim, changed.spec.max_tokens) == (original.spec.dim, original.spec.max_tokens)
    figures = dict(read_settings(tmp_path / "out").measured or {})["optimize"]
    assert figures == done.figures
    assert figures["precision"] == precision and figures["texts"] == 80 and figures["cosine_mean"] > 0.99
    assert figures["query_ms_before"] > 0 and figures["size_bytes_before"] > 0
    assert figures["recall_before"] - figures["recall_after"] <= 0.1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_next_recipe_is_tried_where_one_loses_too_much(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cosines = iter([0.5, 0.98, 0.999])

    def loss(self: Comparison, changed: object) -> Loss:
        found = next(cosines)
        return Loss(cosine_min=0.96, cosine_mean=found, recall_before=0.5, recall_after=0.5, overlap=1.0)

    monkeypatch.setattr(module, "best_path", lambda: "avx2")
    monkeypatch.setattr(Comparison, "loss", loss)
    done = optimize_encoder(folder, tmp_path / "out", quick(), texts=TEXTS)
    assert done.figures["recipe"] == "8 bits in blocks"
    assert "MatMulNBits" in operators(tmp_path / "out")


def test_eight_whole_bits_are_tried_first_where_nothing_saturates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "best_path", lambda: "avx512-vnni")
    assert [recipe.reduce_range for recipe in module._recipes("int8")] == [False, False, True, True, False]
    monkeypatch.setattr(module, "best_path", lambda: "avx2")
    assert module._recipes("int8")[0].reduce_range


def test_nothing_is_written_where_nothing_stays_within_the_loss(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        EncoderError, match=r"nothing stays within a loss of 0\.005 .* tried: int8, .*; int8, .*--max-loss"
    ):
        optimize_encoder(folder, tmp_path / "out", quick(min_cosine=1.0), texts=TEXTS)
    assert list(tmp_path.iterdir()) == []


def test_a_crash_anywhere_leaves_no_encoder(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for point in (
        "create model.onnx",
        "fsync model.onnx",
        "write encoder.json.tmp",
        "rename encoder.json",
        "rename out",
    ):

        def fail(at: str, point: str = point) -> None:
            if at == point:
                raise OSError(28, "No space left on device")

        monkeypatch.setattr(storage, "failpoint", fail)
        with pytest.raises(StorageError, match="No space left on device"):
            optimize_encoder(folder, tmp_path / "out", quick(precision="fp32", max_loss=1), texts=TEXTS)
        assert list(tmp_path.iterdir()) == []


def test_prompts_and_dim_stay_with_the_encoder(folder: Path, tmp_path: Path) -> None:
    source = write_tiny_bert(tmp_path / "source", dim=64)
    write_json(source / "encoder.json", {"dim": 16, "measured": {"before": {"x": 1}}})
    write_json(source / "config_sentence_transformers.json", {"prompts": {"query": "query "}})
    spec = optimize_encoder(source, tmp_path / "out", quick(max_loss=1, min_cosine=0), texts=TEXTS).spec
    assert spec.dim == 16 and spec.prompts == {"query": "query "}
    assert list(read_settings(tmp_path / "out").measured or {}) == ["optimize"]


# ------------------------------------------------------------------------------------------------ refused


def test_what_cannot_be_optimized_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    optimize_encoder(folder, tmp_path / "int8", quick(max_loss=1, min_cosine=0), texts=TEXTS)
    with pytest.raises(EncoderError, match=r"int8/model\.onnx: is quantised already; give the original"):
        optimize_encoder(tmp_path / "int8", tmp_path / "out", quick(), texts=TEXTS)
    with pytest.raises(ConfigError, match="int8 exists"):
        optimize_encoder(folder, tmp_path / "int8", quick(), texts=TEXTS)
    with pytest.raises(ConfigError, match="no encoder folder"):
        optimize_encoder(tmp_path / "nowhere", tmp_path / "out", quick(), texts=TEXTS)
    with pytest.raises(CorpusError, match="of 3 texts 3 are different and have 8 words; at least 64 are needed"):
        optimize_encoder(folder, tmp_path / "out", quick(), texts=TEXTS[:3])
    cells = write_tiny_bert(tmp_path / "cells")
    for part in ("front", "step", "head"):
        shutil.copy(cells / "model.onnx", cells / f"{part}.onnx")
    write_json(cells / "encoder.json", {"cells": {part: f"{part}.onnx" for part in ("front", "step", "head")}})
    with pytest.raises(EncoderError, match="its parts share their weights"):
        optimize_encoder(cells, tmp_path / "out", quick(), texts=TEXTS)
    damaged = write_tiny_bert(tmp_path / "damaged")
    (damaged / "model.onnx").write_bytes(b"junk")
    with pytest.raises(EncoderError, match=r"damaged/model\.onnx: the model is not valid ONNX"):
        optimize_encoder(damaged, tmp_path / "out", quick(), texts=TEXTS)
    with pytest.raises(EncoderError, match=r"damaged/model\.onnx: onnxruntime cannot open it"):
        describe(damaged)
    assert not (tmp_path / "out").exists()


def test_settings_out_of_bounds_are_refused_by_name() -> None:
    with pytest.raises(InvalidParameter, match="precision must be one of int8, fp16, fp32, got 'int4'"):
        quick(precision="int4")
    with pytest.raises(InvalidParameter, match=r"max_loss must be between 0 and 1, got 2"):
        quick(max_loss=2)


@pytest.mark.parametrize("library", ["onnx", "onnxruntime.transformers.optimizer"])
def test_a_missing_library_names_the_remedy(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(BackendMissing, match=r"pip install 'vecsvc\[models\]'"):
        optimize_encoder(folder, tmp_path / "out", quick(), texts=TEXTS)
    assert list(tmp_path.iterdir()) == []


def test_torch_is_not_needed(folder: Path, tmp_path: Path) -> None:
    script = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None; from pathlib import Path;"
        "from index_builders.onnx_rewrite import *;"
        "model = fuse(load_model(Path(sys.argv[1]) / 'model.onnx')).model;"
        "write_int8(model, Recipe(name='x', reduce_range=True), Path(sys.argv[2]))"
    )
    target = tmp_path / "model.onnx"
    done = subprocess.run([sys.executable, "-c", script, str(folder), str(target)], capture_output=True, text=True)
    assert done.returncode == 0 and target.is_file(), done.stderr


# ------------------------------------------------------------------------------------------- the rewriting


def test_rows_of_embeddings_keep_a_scale_each(tmp_path: Path) -> None:
    table = np.random.default_rng(7).standard_normal((500, 64)).astype(np.float32)
    table *= np.logspace(-3, 2, 500, dtype=np.float32)[:, None]
    table[3] = 0
    assert table.nbytes >= MIN_TABLE_BYTES
    helper = onnx.helper
    graph = helper.make_graph(
        [helper.make_node("Gather", ["words", "input_ids"], ["found"], name="look")],
        "rows",
        [helper.make_tensor_value_info("input_ids", 7, ["n", "t"])],
        [helper.make_tensor_value_info("found", 1, ["n", "t", 64])],
        [onnx.numpy_helper.from_array(table, "words")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    write_int8(model, Recipe(name="x", blocks=True), tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").stat().st_size < table.nbytes / 3
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    [found] = session.run(None, {"input_ids": np.arange(500)[None]})
    half_a_step = np.abs(table).max(axis=1, keepdims=True) / 127 / 2
    assert (np.abs(found[0] - table) <= half_a_step * 1.001).all()


def test_blocks_give_a_text_the_same_vector_alone_and_in_a_batch(folder: Path, tmp_path: Path) -> None:
    copy = write_tiny_bert(tmp_path / "copy", dim=64)
    (copy / "model.onnx").unlink()
    fused = fuse(load_model(folder / "model.onnx"), attention=False)
    write_int8(fused.model, Recipe(name="x", blocks=True), copy / "model.onnx")
    encoder = open_encoder(copy)
    together = encoder.encode(TEXTS)
    alone = np.concatenate([encoder.encode([text]) for text in TEXTS[:10]])
    np.testing.assert_allclose(together[:10], alone, atol=1e-5)
    assert np.sum(together * open_encoder(folder).encode(TEXTS), axis=1).min() > 0.999


def test_narrowing_matrices_can_be_left_as_they_are(folder: Path, tmp_path: Path) -> None:
    left = []
    for narrow in (True, False):
        target = tmp_path / f"{narrow}.onnx"
        write_int8(fuse(load_model(folder / "model.onnx")).model, Recipe(name="x", narrow=narrow), target)
        left.append(sum(node.op_type == "MatMul" for node in onnx.load(str(target)).graph.node))
    assert left == [0, 2]  # one a layer


def test_sums_stay_in_one_node_with_their_normalisation_only_where_asked(folder: Path, tmp_path: Path) -> None:
    copies = [write_tiny_bert(tmp_path / name, dim=64) for name in ("together", "apart")]
    found = []
    for copy, skip in zip(copies, (True, False), strict=True):
        (copy / "model.onnx").unlink()
        write_model(fuse(load_model(folder / "model.onnx"), skip=skip).model, copy / "model.onnx")
        assert ("SkipLayerNormalization" in operators(copy)) is skip
        found.append(open_encoder(copy, num_threads=1).encode(TEXTS))
    np.testing.assert_allclose(found[0], found[1], atol=1e-5)


def unlike_channels(model: onnx.ModelProto) -> None:
    """Make one channel of what every layer hands on forty times as great as the others."""
    weights = {weight.name: weight for weight in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "LayerNormalization":
            gamma = onnx.numpy_helper.to_array(weights[node.input[1]]).copy()
            gamma[5] *= 40
            weights[node.input[1]].CopyFrom(onnx.numpy_helper.from_array(gamma, node.input[1]))


def test_smoothing_changes_nothing_until_bits_are_few_and_then_keeps_more(folder: Path, tmp_path: Path) -> None:
    def opened(name: str) -> Any:
        return open_encoder(copies[name], num_threads=1)

    copies = {name: write_tiny_bert(tmp_path / name, dim=64) for name in ("plain", "smooth", "8 bits", "8 smooth bits")}
    for copy in copies.values():
        (copy / "model.onnx").unlink()
    models = [fuse(load_model(folder / "model.onnx")).model for _ in range(2)]
    for model in models:
        unlike_channels(model)
    plain, smoothed = models
    names = write_watched(plain, copies["plain"] / "model.onnx")
    assert len(names) == 8  # four products a layer
    watched = opened("plain")
    found = [watched.outputs([tokens], names) for tokens in watched.split(TEXTS)]
    greatest = {
        name: np.max([np.abs(one[i]).max(axis=(0, 1)) for one in found], axis=0) for i, name in enumerate(names)
    }
    smooth(smoothed, greatest)
    write_model(smoothed, copies["smooth"] / "model.onnx")
    wanted = watched.encode(TEXTS)
    np.testing.assert_allclose(opened("smooth").encode(TEXTS), wanted, atol=1e-4)
    nearness = {}
    for name, model in (("8 bits", plain), ("8 smooth bits", smoothed)):
        write_int8(model, Recipe(name="x", reduce_range=True), copies[name] / "model.onnx")
        nearness[name] = np.sum(opened(name).encode(TEXTS) * wanted, axis=1).mean()
    assert 1 - nearness["8 smooth bits"] < 0.5 * (1 - nearness["8 bits"])


def one_product(tmp_path: Path, weight: np.ndarray, name: str = "") -> onnx.ModelProto:
    helper = onnx.helper
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name=name), helper.make_node("Identity", ["y"], ["out"])],
        "product",
        [helper.make_tensor_value_info("x", 1, ["n", weight.shape[0]])],
        [helper.make_tensor_value_info("out", 1, ["n", weight.shape[1]])],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_a_channel_that_was_silent_in_the_sample_may_speak_later(tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    weight, rows = rng.standard_normal((64, 32)).astype(np.float32), rng.standard_normal((8, 64)).astype(np.float32)
    model = one_product(tmp_path, weight)  # nodes need no names
    seen = np.abs(rows).max(axis=0)
    seen[9], rows[:, 9], rows[3, 9] = 0, 0, 1
    smooth(model, {"x": seen})
    write_int8(model, Recipe(name="x", reduce_range=True), tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    [found] = session.run(None, {"x": rows})
    wanted = rows @ weight
    cosines = (found * wanted).sum(axis=1) / np.linalg.norm(found, axis=1) / np.linalg.norm(wanted, axis=1)
    assert cosines.min() > 0.999


# ------------------------------------------------------------------------------------------- the comparison


def test_an_encoder_loses_nothing_against_itself_and_everything_against_another(folder: Path, tmp_path: Path) -> None:
    comparison = Comparison(open_encoder(folder), read_sample(TEXTS))
    same = comparison.loss(open_encoder(folder))
    assert same.recall_loss == 0 and same.overlap == 1 and same.cosine_min > 0.99999
    other = comparison.loss(open_encoder(write_tiny_bert(tmp_path / "other", dim=64, seed=8)))
    assert other.overlap < 0.5 and other.cosine_mean < 0.9


def test_a_sample_asks_the_first_sentence_for_the_rest() -> None:
    texts = [f"Read the file number {n}. It returns its bytes, and raises." for n in range(70)]
    sample = read_sample(texts)
    assert sample.queries[0].startswith("Read the file number") and sample.documents[0].startswith("It returns")
    assert len(sample.queries) == len(sample.documents) == 70
    plain = read_sample([f"one two three four five six seven eight {n} ten" for n in range(70)])
    assert plain.queries[0] == "one two three four five" and plain.documents[0].startswith("six seven eight")
    many = read_sample([f"{n} " + "word " * 9 for n in range(3000)])
    assert len(many.queries) == 1024 == len(set(many.queries))


def test_pythons_own_docstrings_are_a_sample_that_every_machine_has() -> None:
    texts = library_texts()
    assert len(read_sample(texts).queries) == 1024
    assert any("import" in text for text in texts)


def test_speeds_are_medians_taken_in_turns() -> None:
    order: list[str] = []
    now = [0.0]

    class Fake:
        def __init__(self, name: str, ms: float) -> None:
            self.name, self.ms = name, ms

        def encode(self, texts: Sequence[str], role: str = "query") -> None:
            order.append(self.name)
            now[0] += self.ms / 1e3 * len(texts)

    sample = Sample(queries=["q"] * 40, documents=["d"] * 40)
    fakes: list[Any] = [Fake("a", 2), Fake("b", 1)]
    before, after = measure_speed(fakes, sample, rounds=3, clock=lambda: now[0])
    assert order == ["a", "a", "b", "b"] * 4
    assert (before.query_ms, after.query_ms) == (pytest.approx(2), pytest.approx(1))
    assert (before.batch_ms, after.batch_ms, before.batch_texts) == (pytest.approx(64), pytest.approx(32), 32)


def test_texts_of_a_corpus_are_read_by_column_up_to_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "corpus.parquet"
    pq.write_table(pa.table({"text": ["a", None, "b", "c"], "n": [1, 2, 3, 4]}), file)
    assert corpus_texts(str(file)) == ["a", "b", "c"]
    monkeypatch.setattr(module, "MAX_TEXTS_READ", 2)
    assert corpus_texts(str(file)) == ["a", "b"]
    with pytest.raises(MissingColumn, match=r"has no column 'words'; its columns: text, n"):
        corpus_texts(str(file), "words")
    with pytest.raises(MissingColumn, match=r"column 'n' is int64, not text"):
        corpus_texts(str(file), "n")
    with pytest.raises(CorpusUnreadable, match="there is no such file"):
        corpus_texts(str(tmp_path / "none.parquet"))


# ---------------------------------------------------------------------------------------- the command line


def test_import_optimize_and_info_from_the_command_line(tmp_path: Path) -> None:
    write_tiny_source(tmp_path / "source", dim=64)
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "corpus.parquet")
    run = CliRunner().invoke
    out, fast = str(tmp_path / "out"), str(tmp_path / "fast")
    options = ["--layers", "1", "--dim", "24", "--query-prompt", "query ", "--no-normalize", "--max-tokens", "16"]
    made = run(cli.cli, ["encoder", "import", str(tmp_path / "source"), "--out", out, *options])
    assert made.exit_code == 0 and "dim 24, mean pooling, not normalised, at most 16 tokens" in made.output
    assert "less than" not in made.output
    longer = run(cli.cli, ["encoder", "import", str(tmp_path / "source"), "--out", f"{out}-long"])
    assert longer.exit_code == 0 and "less than" not in longer.output, "nobody asked for 256"
    asked = ["encoder", "import", str(tmp_path / "source"), "--out", f"{out}-asked", "--max-tokens", "99"]
    assert f"{tmp_path}/source allows 24 tokens, less than --max-tokens 99" in run(cli.cli, asked).output
    asked = ["--texts", str(tmp_path / "corpus.parquet"), "--max-loss", "1", "--threads", "1"]
    done = run(cli.cli, ["encoder", "optimize", out, "--out", fast, *asked])
    assert done.exit_code == 0, done.exception
    assert "before" in done.output and "recall@10" in done.output and "one query, ms" in done.output
    facts = json.loads(run(cli.cli, ["encoder", "info", fast, "--json"]).output)
    assert (facts["dim"], facts["max_tokens"], facts["prompts"]) == (24, 16, {"query": "query "})
    assert facts["operators"]["MatMulInteger"] >= 3 and facts["weights_bytes"]["int8"] > 0
    assert facts["measured"]["optimize"]["precision"] == "int8"
    shown = run(cli.cli, ["encoder", "info", fast]).output
    assert run(cli.cli, ["encoder", "info", "default"]).output.startswith("default: dim 384")
    assert "fast: dim 24" in shown and "query prompt: 'query '" in shown and "measured by optimize" in shown


def test_a_build_refuses_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    encoder = write_tiny_bert(tmp_path / "encoder")
    tokenizer = Tokenizer.from_file(str(encoder / "tokenizer.json"))
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save(str(encoder / "tokenizer.json"))
    pq.write_table(pa.table({"id": list(range(len(TEXTS))), "text": TEXTS}), tmp_path / "corpus.parquet")
    asked = ["build-index", str(tmp_path / "corpus.parquet"), "--out", str(tmp_path / "out"), "--encoder", str(encoder)]
    refused = CliRunner().invoke(cli.cli, asked)
    assert isinstance(refused.exception, EncoderError)
    assert "encoder/tokenizer.json: token '<extra>' has the number" in str(refused.exception)


def test_a_loss_beyond_the_bound_is_exit_code_1_in_one_line(folder: Path, tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "corpus.parquet")
    command = [sys.executable, "-c", "from vecsvc.cli import main; main()", "encoder", "optimize", str(folder)]
    options = [
        "--out",
        str(tmp_path / "out"),
        "--texts",
        str(tmp_path / "corpus.parquet"),
        "--min-cosine",
        "1",
        "--threads",
        "1",
    ]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=100)
    assert done.returncode == 1 and done.stdout == ""
    last = done.stderr.splitlines()[-1]
    assert last.startswith("vecsvc: nothing stays within a loss of 0.005") and "cosine mean" in last
    assert not (tmp_path / "out").exists()


def test_figures_of_another_shape_are_shown_as_they_are(tmp_path: Path) -> None:
    folder = write_tiny_bert(tmp_path / "tiny")
    write_json(folder / "encoder.json", {"measured": {"distill": {"recall": 0.4}, "note": 3}})
    shown = lines(describe(folder))
    assert "measured by distill:" in shown and "  recall: 0.4" in shown and "  3" in shown
