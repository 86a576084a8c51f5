"""Collects the nodes and weights of an ONNX model made in Python; every weight is checked by name and shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from vecsvc.errors import BackendMissing, EncoderError

if TYPE_CHECKING:
    import onnx

# LayerNormalization came with opset 17; every onnxruntime since 1.12 reads these two.
OPSET: Final = 17
IR_VERSION: Final = 8
MAX_GRAPH_BYTES: Final = (2 << 30) - (1 << 20)  # protobuf ends at 2 GiB

FLOAT: Final = 1  # onnx.TensorProto.FLOAT
INT64: Final = 7  # onnx.TensorProto.INT64


class Graph:
    """A model in the making. What flows between nodes is known by name; the same calls give the same bytes."""

    def __init__(self, weights: Mapping[str, NDArray[Any]]) -> None:
        self._onnx = import_onnx()
        self._weights = weights
        self._nodes: list[Any] = []
        self._initializers: dict[str, Any] = {}
        self._size_bytes = 0

    def has(self, prefix: str) -> bool:
        """Whether there are weights whose names begin so."""
        return any(name.startswith(prefix) for name in self._weights)

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        output = f"{kind}_{len(self._nodes)}"
        self._nodes.append(self._onnx.helper.make_node(kind, inputs, [output], name=output, **attributes))
        return output

    def value(self, value: float | list[int]) -> str:
        """A constant: float32 of no dimension, or int64 of one."""
        array = np.array(value, dtype=np.int64 if isinstance(value, list) else np.float32)
        return self.constant(f"value_{value}", array)

    def index(self, value: int) -> str:
        """An int64 constant of no dimension."""
        return self.constant(f"index_{value}", np.array(value, dtype=np.int64))

    def array(self, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """The weight of that name as float32. Raises EncoderError where it is missing or has another shape."""
        # The first BERT called the scale and shift of its normalisation gamma and beta.
        old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        array = self._weights.get(name, self._weights.get(old))
        if array is None:
            raise EncoderError(f"the weights lack {name}; there are {len(self._weights)} others")
        if array.shape != shape:
            raise EncoderError(f"weight {name} has shape {array.shape}, the config says {shape}")
        return array.astype(np.float32, copy=False)

    def weight(self, name: str, shape: tuple[int, ...], *, transposed: bool = False) -> str:
        array = self.array(name, shape)
        return self.constant(name, array.T if transposed else array)

    def linear(self, x: str, name: str, inner: int, outer: int) -> str:
        # torch keeps the matrix as (out, in) and multiplies by its transpose.
        product = self.op("MatMul", x, self.weight(f"{name}.weight", (outer, inner), transposed=True))
        return self.op("Add", product, self.weight(f"{name}.bias", (outer,)))

    def norm(self, x: str, name: str, size: int, epsilon: float) -> str:
        scale, shift = self.weight(f"{name}.weight", (size,)), self.weight(f"{name}.bias", (size,))
        return self.op("LayerNormalization", x, scale, shift, axis=-1, epsilon=epsilon)

    def constant(self, name: str, array: NDArray[Any]) -> str:
        """An initializer; the first of a name stays."""
        if name not in self._initializers:
            self._size_bytes += array.nbytes
            if self._size_bytes > MAX_GRAPH_BYTES:
                raise EncoderError(f"the weights have more than {MAX_GRAPH_BYTES} bytes, an ONNX file holds no more")
            self._initializers[name] = self._onnx.numpy_helper.from_array(np.ascontiguousarray(array), name)
        return name

    def finish(self, inputs: Sequence[str], output: str, name: str, size: int) -> onnx.ModelProto:
        """The model: `inputs` int64 (batch, sequence), `output` renamed to `name`, float32 (batch, sequence, size)."""
        helper = self._onnx.helper
        self._nodes.append(helper.make_node("Identity", [output], [name], name=name))
        graph = helper.make_graph(
            self._nodes,
            "bert",
            [helper.make_tensor_value_info(given, INT64, ["batch", "sequence"]) for given in inputs],
            [helper.make_tensor_value_info(name, FLOAT, ["batch", "sequence", size])],
            list(self._initializers.values()),
        )
        opset = helper.make_opsetid("", OPSET)
        # No version of ours goes in, or the same weights would get another fingerprint with every release.
        return helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION, producer_name="vecsvc")


def import_onnx() -> Any:
    try:
        import onnx
    except ImportError as error:
        raise BackendMissing("looking into a model needs onnx: pip install 'vecsvc[models]'") from error
    return onnx
