"""Makes a CNN-LSTM encoder small enough for tests, and computes in NumPy what its model has to give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tiny_bert import MAX_TOKENS, tiny_tokenizer, vocabulary, write_json

from index_builders.cnn_lstm_graph import write_cnn_lstm

Weights = Mapping[str, NDArray[Any]]


def cnn_lstm_weights(
    words: int, table: int, channels: int, hidden: int, dim: int, *, directions: int = 2, seed: int = 7
) -> dict[str, NDArray[Any]]:
    """Random weights, already rounded as float16 rounds them, large enough that every part moves the vectors."""
    random = np.random.default_rng(seed)

    def draw(*shape: int, inner: int = 1) -> NDArray[np.float32]:
        return (random.standard_normal(shape) / np.sqrt(inner)).astype(np.float16).astype(np.float32)

    return {
        "table_q": random.integers(-127, 128, (words, table)).astype(np.int8),
        "table_scale": (random.random(words) / 40).astype(np.float32),
        "conv_w": draw(channels, table, 3, inner=3 * table),
        "conv_b": draw(channels),
        "lstm_w": draw(directions, 4 * hidden, channels, inner=channels),
        "lstm_r": draw(directions, 4 * hidden, hidden, inner=hidden),
        "lstm_b": draw(directions, 8 * hidden),
        "we": draw(table, dim, inner=table),
        "wh": draw(2 * directions * hidden, dim, inner=directions * hidden),
        "bias": draw(dim, inner=10),
    }


def write_tiny_cnn_lstm(folder: Path, *, directions: int = 2, seed: int = 7) -> Path:
    """Write an encoder folder that open_encoder reads: dim 20, unit length, 24 tokens, with cells."""
    folder.mkdir(parents=True, exist_ok=True)
    write_cnn_lstm(folder, cnn_lstm_weights(len(vocabulary()), 16, 12, 8, 20, directions=directions, seed=seed))
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": MAX_TOKENS, "do_lower_case": False})
    return folder


def reference(weights: Weights, ids: Sequence[int]) -> NDArray[np.float64]:
    """The vector (E,) of one text: the formulas of write_cnn_lstm in float64, one token after another."""
    e = weights["table_q"][ids].astype(np.float64) * weights["table_scale"][ids].astype(np.float64)[:, None]
    around = np.concatenate([0 * e[:1], e, 0 * e[:1]])
    taps = np.stack([around[i : i + 3] for i in range(len(e))])  # (t, 3, D)
    c = np.maximum(np.einsum("tkd,cdk->tc", taps, weights["conv_w"].astype(np.float64)) + weights["conv_b"], 0)
    h = np.concatenate(
        [
            _lstm(c, *(weights[name][0].astype(np.float64) for name in ("lstm_w", "lstm_r", "lstm_b"))),
            *(
                _lstm(c[::-1], *(weights[name][1].astype(np.float64) for name in ("lstm_w", "lstm_r", "lstm_b")))[::-1]
                for _ in range(len(weights["lstm_w"]) - 1)
            ),
        ],
        axis=1,
    )
    pooled = np.concatenate([h.mean(axis=0), h.max(axis=0)])
    y = e.mean(axis=0) @ weights["we"] + pooled @ weights["wh"] + weights["bias"]
    vector: NDArray[np.float64] = y / np.linalg.norm(y)
    return vector


def _lstm(
    x: NDArray[np.float64], w: NDArray[np.float64], r: NDArray[np.float64], b: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Hidden states (t, H) of an LSTM (Hochreiter and Schmidhuber 1997) with ONNX's order of gates."""
    hidden = r.shape[1]
    h, c = np.zeros(hidden), np.zeros(hidden)
    states = np.empty((len(x), hidden))
    for t, row in enumerate(x):
        i, o, f, g = np.split(w @ row + r @ h + b[: 4 * hidden] + b[4 * hidden :], 4)
        c = _sigmoid(f) * c + _sigmoid(i) * np.tanh(g)
        h = _sigmoid(o) * np.tanh(c)
        states[t] = h
    return states


def _sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    result: NDArray[np.float64] = 1 / (1 + np.exp(-x))
    return result
