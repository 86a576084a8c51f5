"""BERT's relatives for tests: small configs, random weights by their published names, and forwards in NumPy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

HIDDEN, LAYERS, HEADS, WIDE, POSITIONS = 16, 3, 2, 24, 40
Array = NDArray[np.float64]

_SIZES = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": WIDE,
    "max_position_embeddings": POSITIONS,
    "hidden_act": "gelu",
}
_ROBERTA = {**_SIZES, "type_vocab_size": 1, "pad_token_id": 1, "layer_norm_eps": 1e-5}
CONFIGS: dict[str, dict[str, Any]] = {
    "bert": {**_SIZES, "type_vocab_size": 2, "layer_norm_eps": 1e-12},
    "distilbert": {
        "dim": HIDDEN,
        "n_layers": LAYERS,
        "n_heads": HEADS,
        "hidden_dim": WIDE,
        "max_position_embeddings": POSITIONS,
        "activation": "gelu",
    },
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "mpnet": {**_SIZES, "layer_norm_eps": 1e-12, "relative_attention_num_buckets": 32, "pad_token_id": 1},
}
# Where each family's first token stands in the table of positions.
FIRST = {"roberta": 2, "xlm-roberta": 2, "camembert": 2, "mpnet": 2}


def family_config(kind: str, vocabulary: int) -> dict[str, Any]:
    return {"model_type": kind, "vocab_size": vocabulary, **CONFIGS[kind]}


def layer_names(kind: str, number: int) -> dict[str, str]:
    """Role of a weight in a layer -> its name without .weight and .bias."""
    if kind == "distilbert":
        ours = ["attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin", "sa_layer_norm"]
        ours += ["ffn.lin1", "ffn.lin2", "output_layer_norm"]
        prefix = f"transformer.layer.{number}."
    else:
        prefix = f"encoder.layer.{number}."
        if kind == "mpnet":
            ours = [*(f"attention.attn.{name}" for name in "qkvo"), "attention.LayerNorm"]
        else:
            ours = [f"attention.self.{name}" for name in ("query", "key", "value")]
            ours += ["attention.output.dense", "attention.output.LayerNorm"]
        ours += ["intermediate.dense", "output.dense", "output.LayerNorm"]
    roles = ("query", "key", "value", "mixed", "attention_norm", "wide", "narrow", "norm")
    return {role: prefix + name for role, name in zip(roles, ours, strict=True)}


def family_weights(kind: str, vocabulary: int, seed: int = 7) -> dict[str, NDArray[np.float32]]:
    random = np.random.default_rng(seed)

    def draw(*shape: int, scale: float = 0.3) -> NDArray[np.float32]:
        return (scale * random.standard_normal(shape)).astype(np.float32)

    weights = {
        "embeddings.word_embeddings.weight": draw(vocabulary, HIDDEN, scale=1.0),
        "embeddings.position_embeddings.weight": draw(POSITIONS, HIDDEN),
        "embeddings.LayerNorm.weight": 1 + draw(HIDDEN),
        "embeddings.LayerNorm.bias": draw(HIDDEN),
    }
    types = CONFIGS[kind].get("type_vocab_size", 0)
    if types:
        weights["embeddings.token_type_embeddings.weight"] = draw(types, HIDDEN)
    if kind == "mpnet":
        weights["encoder.relative_attention_bias.weight"] = draw(32, HEADS, scale=1.0)
    shapes = {"wide": (WIDE, HIDDEN), "narrow": (HIDDEN, WIDE)}
    for number in range(LAYERS):
        for role, name in layer_names(kind, number).items():
            norm = role.endswith("norm")
            shape = (HIDDEN,) if norm else shapes.get(role, (HIDDEN, HIDDEN))
            weights[f"{name}.weight"] = draw(*shape) + np.float32(norm)
            weights[f"{name}.bias"] = draw(shape[0])
    return weights


def forward(kind: str, ids: list[int], weights: dict[str, NDArray[np.float32]], layers: int = LAYERS) -> Array:
    """Hidden states (t, hidden) of one text in float64, written from the papers, head by head, distance by distance."""
    w = {name: array.astype(np.float64) for name, array in weights.items()}
    epsilon = CONFIGS[kind].get("layer_norm_eps", 1e-12)

    def norm(x: Array, name: str) -> Array:
        centred = x - x.mean(-1, keepdims=True)
        return (
            centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon) * w[f"{name}.weight"] + w[f"{name}.bias"]
        )

    def linear(x: Array, name: str) -> Array:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    first = FIRST.get(kind, 0)
    x = w["embeddings.word_embeddings.weight"][ids]
    x = x + w["embeddings.position_embeddings.weight"][first : first + len(ids)]
    if "embeddings.token_type_embeddings.weight" in w:
        x = x + w["embeddings.token_type_embeddings.weight"][0]
    x = norm(x, "embeddings.LayerNorm")
    size = HIDDEN // HEADS
    for number in range(layers):
        names = layer_names(kind, number)
        query, key, value = (linear(x, names[role]) for role in ("query", "key", "value"))
        mixed = np.empty_like(x)
        for head in range(HEADS):
            part = slice(head * size, (head + 1) * size)
            scores = query[:, part] @ key[:, part].T / math.sqrt(size)
            if kind == "mpnet":
                bias = w["encoder.relative_attention_bias.weight"][:, head]
                for here in range(len(ids)):
                    for there in range(len(ids)):
                        scores[here, there] += bias[bucket(there - here)]
            shares = np.exp(scores - scores.max(-1, keepdims=True))
            mixed[:, part] = shares / shares.sum(-1, keepdims=True) @ value[:, part]
        x = norm(linear(mixed, names["mixed"]) + x, names["attention_norm"])
        wide = linear(x, names["wide"])
        wide = wide * 0.5 * (1 + np.vectorize(math.erf)(wide / math.sqrt(2)))
        x = norm(linear(wide, names["narrow"]) + x, names["norm"])
    return x


def bucket(distance: int) -> int:
    """MPNet's bucket of a distance: 16 a direction, 8 of them exact, the others by the logarithm up to 128."""
    side = 16 if distance > 0 else 0
    away = abs(distance)
    if away < 8:
        return side + away
    return side + min(15, 8 + int(math.log(away / 8) / math.log(16) * 8))
