"""Builds the ONNX model of a BERT, DistilBERT, RoBERTa or MPNet out of its weights, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from index_builders.bert_config import BertConfig, read_config
from index_builders.onnx_graph import FLOAT, Graph
from vecsvc.errors import EncoderError

if TYPE_CHECKING:
    import onnx

# Added to the scores of masked tokens: small enough for a weight of exactly 0, and float16 can hold it.
MASKED: Final = -10_000.0
# Distances beyond this share MPNet's last bucket (Raffel et al. 2020, T5, section 2.1).
MAX_DISTANCE: Final = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class _Names:
    """What a family calls the weights of a layer, all below `layer` with its number in it."""

    layer: str = "encoder.layer.{}."
    query: str = "attention.self.query"
    key: str = "attention.self.key"
    value: str = "attention.self.value"
    mixed: str = "attention.output.dense"
    attention_norm: str = "attention.output.LayerNorm"
    wide: str = "intermediate.dense"
    narrow: str = "output.dense"
    norm: str = "output.LayerNorm"


_BERT: Final = _Names()
_NAMES: Final = {
    "distilbert": _Names(
        layer="transformer.layer.{}.",
        query="attention.q_lin",
        key="attention.k_lin",
        value="attention.v_lin",
        mixed="attention.out_lin",
        attention_norm="sa_layer_norm",
        wide="ffn.lin1",
        narrow="ffn.lin2",
        norm="output_layer_norm",
    ),
    "mpnet": _Names(
        query="attention.attn.q",
        key="attention.attn.k",
        value="attention.attn.v",
        mixed="attention.attn.o",
        attention_norm="attention.LayerNorm",
    ),
}
# What a model with a head for another task puts before the names of its encoder.
_PREFIXES: Final = ("bert.", "distilbert.", "roberta.", "mpnet.")


def bert_graph(
    config: Mapping[str, Any], weights: Mapping[str, NDArray[Any]], *, layers: int | None = None
) -> onnx.ModelProto:
    """The ONNX model of a BERT (Devlin et al. 2018) or a relative, from its config.json and its weights by name.

    Inputs input_ids, attention_mask and, where the family knows them, token_type_ids, int64 (n, t); output
    last_hidden_state, float32 (n, t, hidden_size); n and t are free, t up to `read_config(config).positions`.
    Only the first `layers` layers are taken where it is given. Weights that are not needed, like a pooler's, are
    left out. The same arguments give the same bytes.

    Raises EncoderError where the config describes another architecture or a weight is missing or misshapen,
    InvalidParameter where there are not so many layers.
    """
    bert = read_config(config)
    graph = Graph({_plain(name): array for name, array in weights.items()})
    hidden = bert.hidden_size
    x = graph.norm(_embeddings(graph, bert), "embeddings.LayerNorm", hidden, bert.layer_norm_eps)
    # (n, t) of 1 and 0 becomes (n, 1, 1, t) of 0 and -10000, to be added to the scores of every head.
    # In two steps, because by them onnxruntime's fusions know an attention.
    mask = graph.op("Unsqueeze", graph.op("Unsqueeze", "attention_mask", graph.value([1])), graph.value([2]))
    mask = graph.op("Cast", mask, to=FLOAT)
    mask = graph.op("Mul", graph.op("Sub", graph.value(1.0), mask), graph.value(MASKED))
    if bert.relative_buckets:
        mask = graph.op("Add", mask, _relative_bias(graph, bert))
    kept = bert.kept_layers(layers)
    if layers is None and graph.has(_NAMES.get(bert.family, _BERT).layer.format(kept)):
        raise EncoderError(
            f"model config: num_hidden_layers is {kept}, and the weights have more; --layers {kept} takes so many"
        )
    for number in range(kept):
        x = _layer(graph, bert, number, x, mask)
    types = ("token_type_ids",) if bert.type_vocab_size > 1 else ()
    return graph.finish(("input_ids", "attention_mask", *types), x, "last_hidden_state", hidden)


def relative_buckets(size: int, buckets: int) -> NDArray[np.int64]:
    """The bucket of each distance -(size - 1) .. size - 1 from a token to the one that it looks at.

    Half of the buckets look back and half ahead; near distances have one each, far ones share them by their
    logarithm (Raffel et al. 2020, T5, section 2.1). float32, because at the edges of buckets it decides.
    """
    distance = np.arange(-(size - 1), size)
    half = buckets // 2
    near = half // 2
    far = np.maximum(np.abs(distance), 1).astype(np.float32)
    # MPNet divides by log(128 / 8) in double precision, what it divides is single.
    scaled = np.log(far / np.float32(near)) / np.float32(np.log(MAX_DISTANCE / near)) * np.float32(half - near)
    bucket = np.where(np.abs(distance) < near, np.abs(distance), np.minimum(near + scaled.astype(np.int64), half - 1))
    return bucket + np.where(distance > 0, half, 0)


def _plain(name: str) -> str:
    return next((name.removeprefix(prefix) for prefix in _PREFIXES if name.startswith(prefix)), name)


def _embeddings(graph: Graph, bert: BertConfig) -> str:
    """The sum of what a token is, where it stands, and which of two texts it is in."""
    hidden = bert.hidden_size
    table = graph.array("embeddings.position_embeddings.weight", (bert.max_position_embeddings, hidden))
    table = table[bert.first_position :]  # what stands before is for padding, whose positions nobody looks at
    types = None
    if bert.type_vocab_size:
        name, shape = "embeddings.token_type_embeddings.weight", (bert.type_vocab_size, hidden)
        if bert.type_vocab_size == 1:
            table = table + graph.array(name, shape)  # every token has it
        else:
            types = graph.op("Gather", graph.weight(name, shape), "token_type_ids")
    x = graph.op("Gather", graph.weight("embeddings.word_embeddings.weight", (bert.vocab_size, hidden)), "input_ids")
    if types is not None:
        x = graph.op("Add", x, types)
    length = graph.op("Gather", graph.op("Shape", "input_ids"), graph.value([1]), axis=0)
    positions = graph.constant("embeddings.position_embeddings.weight", table)
    return graph.op("Add", x, graph.op("Slice", positions, graph.value([0]), length, graph.value([0])))


def _relative_bias(graph: Graph, bert: BertConfig) -> str:
    """(1, heads, t, t): what MPNet adds to the scores for the distance between two tokens, in every layer alike."""
    size = bert.positions
    shape = (bert.relative_buckets, bert.num_attention_heads)
    by_bucket = graph.array("encoder.relative_attention_bias.weight", shape)
    by_distance = graph.constant("relative_bias", by_bucket[relative_buckets(size, bert.relative_buckets)])
    length = graph.op("Gather", graph.op("Shape", "input_ids"), graph.index(1), axis=0)
    place = graph.op("Range", graph.index(0), length, graph.index(1))
    distance = graph.op(
        "Sub",
        graph.op("Unsqueeze", graph.op("Add", place, graph.index(size - 1)), graph.value([0])),
        graph.op("Unsqueeze", place, graph.value([1])),
    )
    bias = graph.op("Transpose", graph.op("Gather", by_distance, distance), perm=[2, 0, 1])
    return graph.op("Unsqueeze", bias, graph.value([0]))


def _layer(graph: Graph, bert: BertConfig, number: int, x: str, mask: str) -> str:
    """Attention and feed-forward, each added to what came in and normalised (Vaswani et al. 2017, section 3.1)."""
    hidden, heads = bert.hidden_size, bert.num_attention_heads
    size = hidden // heads
    names = _NAMES.get(bert.family, _BERT)
    prefix = names.layer.format(number)

    def split(name: str, order: list[int]) -> str:
        y = graph.linear(x, prefix + name, hidden, hidden)
        return graph.op("Transpose", graph.op("Reshape", y, graph.value([0, 0, heads, size])), perm=order)

    query, key, value = (
        split(names.query, [0, 2, 1, 3]),
        split(names.key, [0, 2, 3, 1]),
        split(names.value, [0, 2, 1, 3]),
    )
    scores = graph.op("Div", graph.op("MatMul", query, key), graph.value(float(np.sqrt(size))))
    shares = graph.op("Softmax", graph.op("Add", scores, mask), axis=-1)
    y = graph.op("Transpose", graph.op("MatMul", shares, value), perm=[0, 2, 1, 3])
    y = graph.linear(graph.op("Reshape", y, graph.value([0, 0, hidden])), prefix + names.mixed, hidden, hidden)
    x = graph.norm(graph.op("Add", y, x), prefix + names.attention_norm, hidden, bert.layer_norm_eps)
    y = _activation(graph, bert.hidden_act, graph.linear(x, prefix + names.wide, hidden, bert.intermediate_size))
    y = graph.linear(y, prefix + names.narrow, bert.intermediate_size, hidden)
    return graph.norm(graph.op("Add", y, x), prefix + names.norm, hidden, bert.layer_norm_eps)


def _activation(graph: Graph, name: str, x: str) -> str:
    if name == "relu":
        return graph.op("Relu", x)
    if name == "gelu":
        inner = graph.op("Erf", graph.op("Div", x, graph.value(float(np.sqrt(2)))))
    else:
        # The approximation by tanh (Hendrycks and Gimpel 2016), which some models were trained with.
        cube = graph.op("Mul", graph.op("Mul", graph.op("Mul", x, x), x), graph.value(0.044715))
        inner = graph.op("Tanh", graph.op("Mul", graph.op("Add", x, cube), graph.value(float(np.sqrt(2 / np.pi)))))
    return graph.op("Mul", graph.op("Mul", x, graph.op("Add", inner, graph.value(1.0))), graph.value(0.5))
