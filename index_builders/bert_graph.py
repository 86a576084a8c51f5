"""Builds the ONNX model of a BERT out of its weights, without torch: embeddings, attention, feed-forward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from vecsvc.errors import BackendMissing, EncoderError

if TYPE_CHECKING:
    import onnx

MODEL_TYPES: Final = ("bert",)
ACTIVATIONS: Final = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu")

# LayerNormalization came with opset 17; every onnxruntime since 1.12 reads these two.
OPSET: Final = 17
IR_VERSION: Final = 8
MAX_GRAPH_BYTES: Final = (2 << 30) - (1 << 20)  # protobuf ends at 2 GiB

# Added to the scores of masked tokens: small enough for a weight of exactly 0, and float16 can hold it.
MASKED: Final = -10_000.0

_FLOAT: Final = 1  # onnx.TensorProto.FLOAT
_INT64: Final = 7  # onnx.TensorProto.INT64
_Size: TypeAlias = Annotated[int, msgspec.Meta(ge=1)]


def bert_graph(config: Mapping[str, Any], weights: Mapping[str, NDArray[Any]]) -> onnx.ModelProto:
    """The ONNX model of a BERT (Devlin et al. 2018), from its config.json and its weights by their names.

    Inputs input_ids, attention_mask and token_type_ids, int64 (n, t); output last_hidden_state, float32
    (n, t, hidden_size); n and t are free, t up to max_position_embeddings. The names may begin with "bert.";
    weights that are not needed, like a pooler's, are left out. The same arguments give the same bytes.

    Raises EncoderError where the config describes another architecture, or a weight is missing or misshapen.
    """
    bert = read_config(config)
    graph = _Graph(weights)
    hidden = bert.hidden_size
    type_ids = graph.op(
        "Gather",
        graph.weight("embeddings.token_type_embeddings.weight", (bert.type_vocab_size, hidden)),
        "token_type_ids",
    )
    word = graph.op("Gather", graph.weight("embeddings.word_embeddings.weight", (bert.vocab_size, hidden)), "input_ids")
    length = graph.op("Gather", graph.op("Shape", "input_ids"), graph.value([1]), axis=0)
    table = graph.weight("embeddings.position_embeddings.weight", (bert.max_position_embeddings, hidden))
    position = graph.op("Slice", table, graph.value([0]), length, graph.value([0]))
    x = graph.op("Add", graph.op("Add", word, type_ids), position)
    x = graph.norm(x, "embeddings.LayerNorm", hidden, bert.layer_norm_eps)
    # (n, t) of 1 and 0 becomes (n, 1, 1, t) of 0 and -10000, to be added to the scores of every head.
    mask = graph.op("Cast", graph.op("Unsqueeze", "attention_mask", graph.value([1, 2])), to=_FLOAT)
    mask = graph.op("Mul", graph.op("Sub", graph.value(1.0), mask), graph.value(MASKED))
    for number in range(bert.num_hidden_layers):
        x = _layer(graph, bert, f"encoder.layer.{number}.", x, mask)
    return graph.finish(x, hidden)


class BertConfig(msgspec.Struct):
    hidden_size: _Size
    num_hidden_layers: _Size
    num_attention_heads: _Size
    intermediate_size: _Size
    vocab_size: _Size
    max_position_embeddings: _Size
    type_vocab_size: _Size = 2
    layer_norm_eps: float = 1e-12
    hidden_act: str = "gelu"
    position_embedding_type: str | None = "absolute"
    is_decoder: bool = False


def _layer(graph: _Graph, bert: BertConfig, prefix: str, x: str, mask: str) -> str:
    """Attention and feed-forward, each added to what came in and normalised (Vaswani et al. 2017, section 3.1)."""
    hidden, heads = bert.hidden_size, bert.num_attention_heads
    size = hidden // heads

    def split(name: str, order: list[int]) -> str:
        y = graph.linear(x, f"{prefix}attention.self.{name}", hidden, hidden)
        return graph.op("Transpose", graph.op("Reshape", y, graph.value([0, 0, heads, size])), perm=order)

    query, key, value = split("query", [0, 2, 1, 3]), split("key", [0, 2, 3, 1]), split("value", [0, 2, 1, 3])
    scores = graph.op("Div", graph.op("MatMul", query, key), graph.value(float(np.sqrt(size))))
    shares = graph.op("Softmax", graph.op("Add", scores, mask), axis=-1)
    y = graph.op("Transpose", graph.op("MatMul", shares, value), perm=[0, 2, 1, 3])
    y = graph.linear(
        graph.op("Reshape", y, graph.value([0, 0, hidden])), f"{prefix}attention.output.dense", hidden, hidden
    )
    x = graph.norm(graph.op("Add", y, x), f"{prefix}attention.output.LayerNorm", hidden, bert.layer_norm_eps)
    y = _activation(
        graph, bert.hidden_act, graph.linear(x, f"{prefix}intermediate.dense", hidden, bert.intermediate_size)
    )
    y = graph.linear(y, f"{prefix}output.dense", bert.intermediate_size, hidden)
    return graph.norm(graph.op("Add", y, x), f"{prefix}output.LayerNorm", hidden, bert.layer_norm_eps)


def _activation(graph: _Graph, name: str, x: str) -> str:
    if name == "relu":
        return graph.op("Relu", x)
    if name == "gelu":
        inner = graph.op("Erf", graph.op("Div", x, graph.value(float(np.sqrt(2)))))
    else:
        # The approximation by tanh (Hendrycks and Gimpel 2016), which some models were trained with.
        cube = graph.op("Mul", graph.op("Mul", graph.op("Mul", x, x), x), graph.value(0.044715))
        inner = graph.op("Tanh", graph.op("Mul", graph.op("Add", x, cube), graph.value(float(np.sqrt(2 / np.pi)))))
    return graph.op("Mul", graph.op("Mul", x, graph.op("Add", inner, graph.value(1.0))), graph.value(0.5))


class _Graph:
    """Collects the nodes and weights of a model. What flows between nodes is known by name."""

    def __init__(self, weights: Mapping[str, NDArray[Any]]) -> None:
        self._onnx = import_onnx()
        self._weights = {name.removeprefix("bert."): array for name, array in weights.items()}
        self._nodes: list[Any] = []
        self._initializers: dict[str, Any] = {}
        self._size_bytes = 0

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        output = f"{kind}_{len(self._nodes)}"
        self._nodes.append(self._onnx.helper.make_node(kind, inputs, [output], name=output, **attributes))
        return output

    def value(self, value: float | list[int]) -> str:
        """A constant: float32 of no dimension, or int64 of one."""
        array = np.array(value, dtype=np.int64 if isinstance(value, list) else np.float32)
        return self._initializer(f"value_{value}", array)

    def weight(self, name: str, shape: tuple[int, ...], *, transposed: bool = False) -> str:
        # The first BERT called the scale and shift of its normalisation gamma and beta.
        old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        array = self._weights.get(name, self._weights.get(old))
        if array is None:
            raise EncoderError(f"the weights lack {name}; there are {len(self._weights)} others")
        if array.shape != shape:
            raise EncoderError(f"weight {name} has shape {array.shape}, the config says {shape}")
        array = array.astype(np.float32, copy=False)
        return self._initializer(name, array.T if transposed else array)

    def linear(self, x: str, name: str, inner: int, outer: int) -> str:
        # torch keeps the matrix as (out, in) and multiplies by its transpose.
        product = self.op("MatMul", x, self.weight(f"{name}.weight", (outer, inner), transposed=True))
        return self.op("Add", product, self.weight(f"{name}.bias", (outer,)))

    def norm(self, x: str, name: str, size: int, epsilon: float) -> str:
        scale, shift = self.weight(f"{name}.weight", (size,)), self.weight(f"{name}.bias", (size,))
        return self.op("LayerNormalization", x, scale, shift, axis=-1, epsilon=epsilon)

    def finish(self, output: str, size: int) -> onnx.ModelProto:
        helper = self._onnx.helper
        self._nodes.append(helper.make_node("Identity", [output], ["last_hidden_state"], name="last_hidden_state"))
        names = ("input_ids", "attention_mask", "token_type_ids")
        graph = helper.make_graph(
            self._nodes,
            "bert",
            [helper.make_tensor_value_info(name, _INT64, ["batch", "sequence"]) for name in names],
            [helper.make_tensor_value_info("last_hidden_state", _FLOAT, ["batch", "sequence", size])],
            list(self._initializers.values()),
        )
        opset = helper.make_opsetid("", OPSET)
        # No version of ours goes in, or the same weights would get another fingerprint with every release.
        return helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION, producer_name="vecsvc")

    def _initializer(self, name: str, array: NDArray[Any]) -> str:
        if name not in self._initializers:
            self._size_bytes += array.nbytes
            if self._size_bytes > MAX_GRAPH_BYTES:
                raise EncoderError(f"the weights have more than {MAX_GRAPH_BYTES} bytes, an ONNX file holds no more")
            self._initializers[name] = self._onnx.numpy_helper.from_array(np.ascontiguousarray(array), name)
        return name


def read_config(config: Mapping[str, Any]) -> BertConfig:
    kind = config.get("model_type")
    if kind not in MODEL_TYPES:
        raise EncoderError(
            f"model_type is {kind!r}; {', '.join(MODEL_TYPES)} can be converted, others need an onnx/model.onnx"
        )
    try:
        bert = msgspec.convert(dict(config), BertConfig)
    except msgspec.ValidationError as error:
        raise EncoderError(f"model config: {error}") from error
    if bert.hidden_size % bert.num_attention_heads:
        raise EncoderError(
            f"model config: {bert.num_attention_heads} heads do not divide hidden_size {bert.hidden_size}"
        )
    if bert.hidden_act not in ACTIVATIONS:
        raise EncoderError(f"model config: hidden_act must be one of {', '.join(ACTIVATIONS)}, got {bert.hidden_act!r}")
    if bert.position_embedding_type not in (None, "absolute") or bert.is_decoder:
        raise EncoderError("model config: only encoders with absolute position embeddings can be converted")
    return bert


def import_onnx() -> Any:
    try:
        import onnx
    except ImportError as error:
        raise BackendMissing("importing an encoder needs onnx: pip install 'vecsvc[models]'") from error
    return onnx
