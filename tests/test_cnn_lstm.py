"""The ONNX model of a CNN-LSTM gives what its formulas say, in any batch, out of files beside it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tiny_bert import vocabulary
from tiny_cnn_lstm import cnn_lstm_weights, reference, write_tiny_cnn_lstm

from index_builders.cnn_lstm_graph import CELLS, MODEL, WEIGHTS, CnnLstmSizes, write_cnn_lstm
from vecsvc.encoders.onnx import open_encoder
from vecsvc.errors import EncoderError
from vecsvc.onnx_session import OnnxSession, SessionSettings, external_files

SIZES = {"words": 50, "table": 16, "channels": 12, "hidden": 8, "dim": 20}
TEXTS = ["find text", "the quick brown fox jumps over the lazy dog", "", "list files of the folder"]


def padded(texts: list[list[int]], filler: int = 1) -> dict[str, np.ndarray]:
    ids = np.full((len(texts), max(map(len, texts))), filler, dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, : len(text)], mask[row, : len(text)] = text, 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize(
    "sizes", [SIZES, {"words": 300, "table": 256, "channels": 128, "hidden": 128, "dim": 384}], ids=["tiny", "real"]
)
def test_the_model_gives_what_the_formulas_say(tmp_path: Path, sizes: dict[str, int], directions: int) -> None:
    weights = cnn_lstm_weights(**sizes, directions=directions)
    assert write_cnn_lstm(tmp_path, weights) == CnnLstmSizes(**sizes, directions=directions)
    session = OnnxSession(tmp_path / MODEL, SessionSettings(num_threads=1))
    random = np.random.default_rng(3)
    texts = [random.integers(0, sizes["words"], length).tolist() for length in (1, 2, 3, 13, 13, 40)]
    [found] = session.run(padded(texts), ["sentence_embedding"])
    expected = np.stack([reference(weights, text) for text in texts])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    for row, text in enumerate(texts):
        [alone] = session.run(padded([text]), ["sentence_embedding"])
        np.testing.assert_allclose(found[row], alone[0], atol=1e-5)


def test_what_stands_in_the_padding_changes_nothing(tmp_path: Path) -> None:
    write_cnn_lstm(tmp_path, cnn_lstm_weights(**SIZES))
    session = OnnxSession(tmp_path / MODEL, SessionSettings(num_threads=1))
    [one] = session.run(padded([[3, 4], [5] * 30], filler=0), ["sentence_embedding"])
    [other] = session.run(padded([[3, 4], [5] * 30], filler=49), ["sentence_embedding"])
    assert np.array_equal(one, other)


def test_weights_as_float32_are_kept_to_the_last_bit(tmp_path: Path) -> None:
    weights = cnn_lstm_weights(**SIZES)
    weights["conv_w"] = weights["conv_w"] + np.float32(1e-5)
    write_cnn_lstm(tmp_path / "full", weights, half=False)
    write_cnn_lstm(tmp_path / "half", weights)
    assert (tmp_path / "half" / WEIGHTS).stat().st_size < (tmp_path / "full" / WEIGHTS).stat().st_size
    [found] = OnnxSession(tmp_path / "full" / MODEL).run(padded([[1, 2, 3]]), ["sentence_embedding"])
    np.testing.assert_allclose(found[0], reference(weights, [1, 2, 3]), atol=1e-6)


def test_every_model_of_the_folder_reads_the_one_file_of_weights(tmp_path: Path) -> None:
    write_tiny_cnn_lstm(tmp_path)
    for name in (MODEL, *CELLS.values()):
        assert external_files(tmp_path / name) == [tmp_path / WEIGHTS]
        # All that is large lies in the common file.
        assert (tmp_path / name).stat().st_size < 8000
        OnnxSession(tmp_path / name).close()
    assert json.loads((tmp_path / "encoder.json").read_text())["cells"] == CELLS


def test_the_same_weights_give_the_same_bytes_and_other_keys_of_the_config_stay(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/encoder.json").write_text('{"measured": {"recall": 0.5}}')
    for folder in ("a", "b"):
        write_tiny_cnn_lstm(tmp_path / folder)
    for name in (MODEL, WEIGHTS, *CELLS.values()):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    config = json.loads((tmp_path / "a/encoder.json").read_text())
    assert config == {"measured": {"recall": 0.5}, "cells": CELLS}


@pytest.mark.parametrize("directions", [1, 2])
def test_the_folder_opens_as_any_encoder(tmp_path: Path, directions: int) -> None:
    encoder = open_encoder(write_tiny_cnn_lstm(tmp_path, directions=directions))
    assert encoder.spec.dim == 20 and encoder.spec.pooling == "none" and encoder.spec.max_tokens == 24
    vectors = encoder.encode(TEXTS)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    weights = cnn_lstm_weights(len(vocabulary()), 16, 12, 8, 20, directions=directions)
    words = vocabulary()
    expected = reference(weights, [words[word] for word in ("[CLS]", "find", "text", "[SEP]")])
    np.testing.assert_allclose(vectors[0], expected, atol=1e-5)
    encoder.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": None}, "lack bias"),
        ({"wh": np.zeros((5, 20), np.float32)}, r"weight wh has shape \(5, 20\), the others say \(32, 20\)"),
        ({"table_q": np.zeros((50, 16), np.float32)}, "table_q has type float32"),
        ({"conv_b": np.full(12, np.nan, np.float32)}, "conv_b has values that are not finite"),
        ({"conv_b": np.full(12, 1e6, np.float32)}, "conv_b reaches 1e.06, too much for float16"),
        ({"extra": np.zeros(1, np.float32)}, "unknown weight extra"),
        ({"lstm_r": np.zeros((8, 8), np.float32)}, "weight lstm_r: expected an array of 3 dimensions"),
    ],
)
def test_a_weight_that_does_not_fit_is_named(tmp_path: Path, change: dict[str, np.ndarray], message: str) -> None:
    weights = {**cnn_lstm_weights(**SIZES), **change}
    with pytest.raises(EncoderError, match=message):
        write_cnn_lstm(tmp_path / "out", {name: array for name, array in weights.items() if array is not None})
    assert not (tmp_path / "out").exists()
