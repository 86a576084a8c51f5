"""Writes the ONNX models of a CNN-LSTM encoder: the whole network, and its cells, all over one file of weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from index_builders.encoder_folder import write_json
from index_builders.onnx_graph import IR_VERSION, OPSET, import_onnx
from vecsvc.errors import EncoderError
from vecsvc.storage import make_folder, replace_file

if TYPE_CHECKING:
    import onnx

MODEL: Final = "model.onnx"
WEIGHTS: Final = "weights.bin"
CONFIG: Final = "encoder.json"
# The parts that cellular batching runs one after another; vecsvc/encoders/cellular.py is their reader.
CELLS: Final = {"front": "front.onnx", "step": "step.onnx", "head": "head.onnx"}
# What a slot of cellular batching keeps of each direction, (1, n, H) each, in this order.
STATES: Final = ("h", "c", "sum", "max")

KERNEL: Final = 3  # tokens that the convolution sees at once
ALIGNMENT: Final = 64  # bytes; where an array may begin in the file of weights
# Added to the hidden values of padding, which lie between -1 and 1: no maximum is found there.
BELOW_ALL: Final = -4.0

_FLOAT: Final = 1  # onnx.TensorProto.FLOAT
_INT32: Final = 6  # onnx.TensorProto.INT32
_INT64: Final = 7  # onnx.TensorProto.INT64


@dataclass(frozen=True, slots=True, kw_only=True)
class CnnLstmSizes:
    words: int  # V
    table: int  # D, width of the table
    channels: int  # C, width of the convolution
    hidden: int  # H, width of the LSTM in each direction
    directions: int  # 1 reads forward, 2 also backward
    dim: int  # E, of the vectors


def write_cnn_lstm(folder: Path, weights: Mapping[str, NDArray[Any]], *, half: bool = True) -> CnnLstmSizes:
    """Write model.onnx, weights.bin, the cells beside them, and the key "cells" of encoder.json.

    The network, for n texts of up to t tokens, padded on the right, mask (n, t) 1 for tokens:

        e = table_q[ids] * table_scale[ids] * mask                        (n, t, D)
        c = relu(conv1d(e; conv_w, kernel 3, padding 1) + conv_b)         (n, t, C)
        h = LSTM(c), forward, with two directions also backward           (n, t, 2H)
        y = mean(e) @ we + [mean(h); max(h)] @ wh + bias                  (n, E), over the real tokens
        sentence_embedding = y / |y|                                      (n, E), float32

    Weights by name: table_q (V, D) int8; table_scale (V,); conv_w (C, D, 3); conv_b (C,); lstm_w (d, 4H, C),
    lstm_r (d, 4H, H), lstm_b (d, 8H) as ONNX orders the gates, i, o, f, c, with d directions; we (D, E);
    wh (2dH, E), bias (E,). `half` keeps all but the table and its scales as float16, half as large; they are
    float32 again once the model is open. The same arguments give the same bytes.

    Raises EncoderError, naming the weight, where one is missing, misshapen or not finite.
    """
    sizes = read_sizes(weights)
    store = _Store(weights, half)
    models = {MODEL: _whole(store, sizes)}
    models |= {
        CELLS["front"]: _front(store, sizes),
        CELLS["step"]: _step(store, sizes),
        CELLS["head"]: _head(store, sizes),
    }
    make_folder(folder)
    for name, model in models.items():
        replace_file(folder / name, model.SerializeToString())
    replace_file(folder / WEIGHTS, bytes(store.data))
    config = folder / CONFIG
    content = msgspec.json.decode(config.read_bytes()) if config.is_file() else {}
    write_json(config, {**content, "cells": CELLS})
    return sizes


def read_sizes(weights: Mapping[str, NDArray[Any]]) -> CnnLstmSizes:
    """What the shapes of the weights say. Raises EncoderError that names the first weight that does not fit."""
    ranks = {"table_q": 2, "conv_w": 3, "lstm_r": 3, "we": 2}
    for name, rank in ranks.items():
        if name not in weights or weights[name].ndim != rank or not weights[name].size:
            found = weights[name].shape if name in weights else "nothing"
            raise EncoderError(f"weight {name}: expected an array of {rank} dimensions, got {found}")
    (words, table), channels = weights["table_q"].shape, weights["conv_w"].shape[0]
    directions, _, hidden = weights["lstm_r"].shape
    dim = weights["we"].shape[1]
    expected = {
        "table_q": (words, table),
        "table_scale": (words,),
        "conv_w": (channels, table, KERNEL),
        "conv_b": (channels,),
        "lstm_w": (directions, 4 * hidden, channels),
        "lstm_r": (directions, 4 * hidden, hidden),
        "lstm_b": (directions, 8 * hidden),
        "we": (table, dim),
        "wh": (2 * directions * hidden, dim),
        "bias": (dim,),
    }
    for name, shape in expected.items():
        if name not in weights:
            raise EncoderError(f"the weights lack {name}; there are {', '.join(sorted(weights))}")
        array = weights[name]
        if array.shape != shape:
            raise EncoderError(f"weight {name} has shape {array.shape}, the others say {shape}")
        if (name == "table_q") != (array.dtype == np.int8):
            raise EncoderError(f"weight {name} has type {array.dtype}, expected int8 for table_q, floats for the rest")
        if not np.isfinite(array).all():
            raise EncoderError(f"weight {name} has values that are not finite")
    unknown = sorted(set(weights) - set(expected))
    if unknown:
        raise EncoderError(f"unknown weight {unknown[0]}; a CNN-LSTM has {', '.join(expected)}")
    if directions not in (1, 2):
        raise EncoderError(f"weight lstm_r has {directions} directions, an LSTM reads in 1 or 2")
    return CnnLstmSizes(words=words, table=table, channels=channels, hidden=hidden, directions=directions, dim=dim)


# -------------------------------------------------------------------------------------------------- models


def _whole(store: _Store, sizes: CnnLstmSizes) -> onnx.ModelProto:
    graph = _Graph(store)
    mask, e, c = _embed_and_convolve(graph)
    lengths = graph.op("Cast", graph.op("ReduceSum", "attention_mask", graph.value([1]), keepdims=0), to=_INT32)
    states = graph.op(
        "LSTM",
        graph.op("Transpose", c, perm=[2, 0, 1]),
        *(graph.weight(name) for name in ("lstm_w", "lstm_r", "lstm_b")),
        lengths,
        hidden_size=sizes.hidden,
        direction="bidirectional" if sizes.directions == 2 else "forward",
    )  # (t, d, n, H), zero beyond a text's length
    width = sizes.directions * sizes.hidden
    states = graph.op("Reshape", graph.op("Transpose", states, perm=[2, 0, 1, 3]), graph.value([0, 0, width]))
    # The mask picks the first or the second: one operator instead of two for the same arithmetic.
    below = graph.op("Gather", graph.value([BELOW_ALL, 0.0]), mask)
    largest = graph.op("ReduceMax", graph.op("Add", states, below), axes=[1], keepdims=0)
    sums = graph.op("ReduceSum", graph.op("Concat", e, states, axis=2), graph.value([1]), keepdims=0)
    count = graph.op("ReduceSum", graph.op("Cast", mask, to=_FLOAT), graph.value([1]), keepdims=0)
    _finish(graph, sums, count, largest)
    return graph.model("cnn_lstm", _TEXTS, {"sentence_embedding": (_FLOAT, ["batch", sizes.dim])})


def _front(store: _Store, sizes: CnnLstmSizes) -> onnx.ModelProto:
    """n texts to what the steps read of them, (t, C), and the sums of their tokens' vectors, (n, D).

    The texts stand one behind the other as a single one of t tokens, input_ids and attention_mask (1, t), with one
    masked token between neighbours: to the convolution that is the zero beyond the end, and nothing else is padded.
    `members` (n, t) is 1 where a token belongs to a text.
    """
    graph = _Graph(store)
    _, e, c = _embed_and_convolve(graph)
    first = graph.value([0])
    graph.op("Squeeze", graph.op("Transpose", c, perm=[0, 2, 1]), first, output="features")
    graph.op("Squeeze", graph.op("MatMul", "members", e), first, output="sums")
    inputs: _Ports = {name: (_INT64, [1, "tokens"]) for name in _TEXTS}
    inputs["members"] = (_FLOAT, ["batch", "tokens"])
    outputs: _Ports = {
        "features": (_FLOAT, ["tokens", sizes.channels]),
        "sums": (_FLOAT, ["batch", sizes.table]),
    }
    return graph.model("cnn_lstm_front", inputs, outputs)


def _step(store: _Store, sizes: CnnLstmSizes) -> onnx.ModelProto:
    """The next k tokens of n texts, of which `lengths` count: states (4d, n, H) before to states after.

    x_forward (k, n, C) are the next tokens, x_backward (k, n, C) the next ones from the end, last first, so both
    directions are an LSTM that reads forward, and a text needs as many steps of the one as of the other.
    `below` (k, 1, n, 1) is 0 where a token counts and BELOW_ALL where not.
    """
    graph = _Graph(store)
    names = ("x_forward", "x_backward")[: sizes.directions]
    parts = [f"{name}_before_{number}" for number in range(sizes.directions) for name in STATES]
    graph.node("Split", ["states"], parts, axis=0)
    after: list[str] = []
    for number, name in enumerate(names):
        hidden, cell, total, largest = parts[4 * number : 4 * number + 4]
        every, hidden_after, cell_after = (f"{part}_after_{number}" for part in ("every", "h", "c"))
        weights = [graph.weight(weight, row=number) for weight in ("lstm_w", "lstm_r", "lstm_b")]
        graph.node(
            "LSTM",
            [name, *weights, "lengths", hidden, cell],
            [every, hidden_after, cell_after],
            hidden_size=sizes.hidden,
            direction="forward",
        )
        total = graph.op("Add", total, graph.op("ReduceSum", every, graph.value([0]), keepdims=0))
        found = graph.op("ReduceMax", graph.op("Add", every, "below"), axes=[0], keepdims=0)
        after += [hidden_after, cell_after, total, graph.op("Max", largest, found)]
    graph.op("Concat", *after, axis=0, output="states_after")
    states: _Port = (_FLOAT, [len(STATES) * sizes.directions, "batch", sizes.hidden])
    inputs: _Ports = {name: (_FLOAT, ["steps", "batch", sizes.channels]) for name in names}
    inputs |= {"lengths": (_INT32, ["batch"]), "below": (_FLOAT, ["steps", 1, "batch", 1]), "states": states}
    return graph.model("cnn_lstm_step", inputs, {"states_after": states})


def _head(store: _Store, sizes: CnnLstmSizes) -> onnx.ModelProto:
    """What is left of n texts after their last step, to their vectors (n, E)."""
    graph = _Graph(store)
    parts = [f"{name}_{number}" for number in range(sizes.directions) for name in STATES]
    graph.node("Split", ["states"], parts, axis=0)
    rows = {part: graph.op("Squeeze", part, graph.value([0])) for part in parts if part.startswith(("sum", "max"))}
    sums = graph.op("Concat", "sums", *(row for part, row in rows.items() if part.startswith("sum")), axis=1)
    largest = [row for part, row in rows.items() if part.startswith("max")]
    _finish(graph, sums, "count", *largest)
    inputs: _Ports = {
        "sums": (_FLOAT, ["batch", sizes.table]),
        "count": (_FLOAT, ["batch", 1]),
        "states": (_FLOAT, [len(STATES) * sizes.directions, "batch", sizes.hidden]),
    }
    return graph.model("cnn_lstm_head", inputs, {"sentence_embedding": (_FLOAT, ["batch", sizes.dim])})


def _embed_and_convolve(graph: _Graph) -> tuple[str, str, str]:
    """Names of the mask (n, t, 1), int64; of e (n, t, D), zero where there is padding; and of c (n, C, t)."""
    mask = graph.op("Unsqueeze", "attention_mask", graph.value([2]))
    scale = graph.op("Gather", graph.weight("table_scale"), "input_ids")
    # What follows a text's end must be zero, for the convolution at its last token looks there.
    scale = graph.op("Mul", scale, graph.op("Cast", mask, to=_FLOAT))
    words = graph.op("Cast", graph.op("Gather", graph.weight("table_q"), "input_ids"), to=_FLOAT)
    e = graph.op("Mul", words, scale)
    # onnxruntime makes one operator of these two.
    c = graph.op(
        "Conv",
        graph.op("Transpose", e, perm=[0, 2, 1]),
        graph.weight("conv_w"),
        graph.weight("conv_b"),
        kernel_shape=[KERNEL],
        pads=[KERNEL // 2, KERNEL // 2],
    )
    return mask, e, graph.op("Relu", c)


def _finish(graph: _Graph, sums: str, count: str, *largest: str) -> None:
    """Sums (n, D + dH) over `count` (n, 1) tokens, and maxima, dH together, to vectors of unit length."""
    pooled = graph.op("Concat", graph.op("Div", sums, count), *largest, axis=1)
    y = graph.op("Gemm", pooled, graph.weight("head_w"), graph.weight("bias"))
    graph.op("LpNormalization", y, axis=1, p=2, output="sentence_embedding")


# ------------------------------------------------------------------------------------------------- writing

_Port = tuple[int, list[int | str]]
_Ports = dict[str, _Port]
_TEXTS: Final[_Ports] = {name: (_INT64, ["batch", "sequence"]) for name in ("input_ids", "attention_mask")}


class _Store:
    """The file of weights, and where in it each array lies."""

    def __init__(self, weights: Mapping[str, NDArray[Any]], half: bool) -> None:
        arrays = {
            "table_q": weights["table_q"],
            # A column, so that what is gathered from it multiplies the rows of the table as it is.
            "table_scale": weights["table_scale"].astype(np.float32)[:, None],
            **{name: weights[name] for name in ("conv_w", "conv_b", "lstm_w", "lstm_r", "lstm_b")},
            "head_w": np.concatenate([weights["we"], weights["wh"]]),
            "bias": weights["bias"],
        }
        self.places: dict[str, tuple[int, NDArray[Any]]] = {}
        self.data = bytearray()
        for name, array in arrays.items():
            if not name.startswith("table_"):
                largest = float(np.abs(array).max())
                if half and largest > float(np.finfo(np.float16).max):
                    raise EncoderError(f"weight {name} reaches {largest:g}, too much for float16: pass half=False")
                array = array.astype(np.float16 if half else np.float32)
            self.data += bytes(-len(self.data) % ALIGNMENT)
            self.places[name] = (len(self.data), array)
            self.data += np.ascontiguousarray(array).tobytes()


class _Graph:
    """Collects the nodes of one model over the common file of weights. What flows between nodes is known by name."""

    def __init__(self, store: _Store) -> None:
        self._onnx = import_onnx()
        self._store = store
        self._nodes: list[Any] = []
        self._initializers: dict[str, Any] = {}

    def op(self, kind: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        name = f"{kind}_{len(self._nodes)}" if output is None else output
        self.node(kind, inputs, [name], **attributes)
        return name

    def node(self, kind: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> None:
        self._nodes.append(self._onnx.helper.make_node(kind, inputs, outputs, name=outputs[0], **attributes))

    def value(self, value: list[int] | list[float]) -> str:
        """A constant of one dimension: int64 or float32."""
        name = f"value_{value}"
        array = np.array(value, dtype=np.int64 if isinstance(value[0], int) else np.float32)
        self._initializers[name] = self._onnx.numpy_helper.from_array(array, name)
        return name

    def weight(self, name: str, row: int | None = None) -> str:
        """A weight as float32, the table as it is; of a `row` only that, with its first dimension kept as 1."""
        offset, array = self._store.places[name]
        key = name
        if row is not None:
            offset, array, key = offset + row * array[0].nbytes, array[row : row + 1], f"{name}_{row}"
        if key not in self._initializers:
            tensor = self._onnx.TensorProto(name=key, dims=array.shape)
            tensor.data_type = self._onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
            tensor.data_location = self._onnx.TensorProto.EXTERNAL
            for entry, value in (("location", WEIGHTS), ("offset", offset), ("length", array.nbytes)):
                tensor.external_data.add(key=entry, value=str(value))
            self._initializers[key] = tensor
        # A constant that onnxruntime computes once, when it opens the model.
        return self.op("Cast", key, to=_FLOAT) if array.dtype == np.float16 else key

    def model(self, name: str, inputs: _Ports, outputs: _Ports) -> onnx.ModelProto:
        helper = self._onnx.helper
        graph = helper.make_graph(
            self._nodes,
            name,
            [helper.make_tensor_value_info(port, *what) for port, what in inputs.items()],
            [helper.make_tensor_value_info(port, *what) for port, what in outputs.items()],
            list(self._initializers.values()),
        )
        opset = helper.make_opsetid("", OPSET)
        # No version of ours goes in, or the same weights would get another fingerprint with every release.
        return helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION, producer_name="vecsvc")
