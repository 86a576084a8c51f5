"""Rewrites ONNX models to do the same in less time: nodes fused, matrices in 8 bits, or all in float16."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from index_builders.onnx_graph import MAX_GRAPH_BYTES, import_onnx
from vecsvc.errors import BackendMissing, EncoderError
from vecsvc.storage import native_file, write_file

if TYPE_CHECKING:
    import onnx

BLOCK: Final = 32  # weights that share a scale where they are quantised by blocks
SKIP_EPSILON: Final = 1e-12  # of a SkipLayerNormalization that names none
MIN_TABLE_BYTES: Final = 1 << 16  # smaller tables of embeddings stay float32: nothing would be saved

# How much of what makes channels unlike goes from activations to weights: of all-MiniLM-L6-v2, .7 was best of .3 to .9.
SMOOTHING: Final = 0.7
MIN_CHANNEL: Final = 1e-5  # channels that are always smaller are as good as 0
# A channel that was silent in the sample may speak later: it is taken for this share of the usual one at least.
SILENT: Final = 0.03

_CONTRIB: Final = "com.microsoft"
_QUANTISED: Final = ("DynamicQuantizeLinear", "MatMulInteger", "QAttention", "MatMulNBits", "DequantizeLinear")
_MATRICES: Final = ("MatMul", "Attention")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One way to put a model's matrices into 8 bits, from the fastest to the most exact."""

    name: str
    # 7 bits of 8 for weights: without VNNI, sums of two products of 8 bits saturate.
    reduce_range: bool = False
    smooth: bool = False  # channels of activations made alike first, so that one scale fits all; see `smooth`
    narrow: bool = True  # whether matrices that narrow are quantised, too: what GELU gives them has outliers
    blocks: bool = False  # weights in blocks with scales of their own, activations by rows: exact, but not faster


def load_model(path: Path) -> onnx.ModelProto:
    """The model with its weights, wherever they lie. Raises EncoderError where it is damaged or too large."""
    onnx = import_onnx()
    try:
        model = onnx.load(str(path))
    except Exception as error:
        raise EncoderError(f"{path}: the model is not valid ONNX: {_one_line(error)}") from error
    if model.ByteSize() > MAX_GRAPH_BYTES:
        raise EncoderError(f"{path}: has {model.ByteSize()} bytes, at most {MAX_GRAPH_BYTES} can be rewritten")
    return model


def is_quantised(model: onnx.ModelProto) -> bool:
    return any(node.op_type in _QUANTISED for node in model.graph.node)


def fuse(model: onnx.ModelProto, *, attention: bool = True, skip: bool = False, tanh: bool = False) -> Any:
    """onnxruntime's OnnxModel of the same network: attention, normalisation and GELU are one node each where found.

    Quantising by blocks wants the matrices of attention by themselves. `skip` leaves the sum before a normalisation
    in one node with it, which GPUs want; on a CPU onnxruntime computes that node by single numbers, and five times
    slower than the two. `tanh` takes GELU by its approximation (Hendrycks and Gimpel 2016, section 2), which is off by
    5e-4 at most, far less than a step of 8 bits. The given model is used up.
    """
    with _translated("fuse"):
        from onnxruntime.transformers.fusion_options import FusionOptions
        from onnxruntime.transformers.optimizer import optimize_model

        options = FusionOptions("bert")
        options.enable_attention = attention
        options.enable_gelu_approximation = tanh
        options.enable_embed_layer_norm = False  # its table of words could not be quantised by rows
        # Level 0 is the fusions alone: what onnxruntime itself would change depends on this machine.
        fused = optimize_model(model, model_type="bert", optimization_options=options, opt_level=0)
        if not skip:
            _part_sums(fused.model)
        fused.topological_sort()
        for number, node in enumerate(fused.model.graph.node):
            node.name = node.name or f"node_{number}"  # by which quantising tells them apart
    opsets = {entry.domain for entry in fused.model.opset_import}
    if _CONTRIB not in opsets:
        fused.model.opset_import.append(import_onnx().helper.make_opsetid(_CONTRIB, 1))
    return fused


def _part_sums(model: onnx.ModelProto) -> None:
    """SkipLayerNormalization becomes its sums, and a LayerNormalization of them."""
    onnx = import_onnx()
    nodes = list(model.graph.node)
    del model.graph.node[:]
    for node in nodes:
        # Who wants the mean, the deviation or the sum as well is left as it is.
        if node.op_type != "SkipLayerNormalization" or any(node.output[1:]):
            model.graph.node.append(node)
            continue
        given, skipped, scale, *more = node.input
        shift, bias = [*more, "", ""][:2]
        name = node.output[0]
        # The bias first: where a product of integers came before, onnxruntime adds it within the product.
        for part, term in (("bias", bias), ("sum", skipped)):
            if term:
                added = f"{name}_{part}"
                model.graph.node.append(onnx.helper.make_node("Add", [given, term], [added], name=added))
                given = added
        # onnxruntime knows it in every opset, the standard from 17 on.
        inputs = [given, scale, shift] if shift else [given, scale]
        whole = onnx.helper.make_node("LayerNormalization", inputs, [name], name=node.name, axis=-1)
        epsilon = next((a.f for a in node.attribute if a.name == "epsilon"), SKIP_EPSILON)
        whole.attribute.append(onnx.helper.make_attribute("epsilon", epsilon))
        model.graph.node.append(whole)


def write_model(model: onnx.ModelProto, file: Path) -> None:
    write_file(file, model.SerializeToString())


def write_float16(fused: Any, file: Path) -> None:
    """Weights and sums in float16, inputs and outputs as they were."""
    with _translated("convert"):
        fused.convert_float_to_float16(keep_io_types=True, use_symbolic_shape_infer=True)
    write_model(fused.model, file)


def write_watched(model: onnx.ModelProto, file: Path) -> list[str]:
    """Write the model so that it gives what its products multiply by weights, too; the names of these outputs."""
    onnx = import_onnx()
    names = sorted({node.input[0] for node in _products(model)})
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    known = {output.name for output in watched.graph.output}
    for name in names:
        if name not in known:
            watched.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    write_model(watched, file)
    return names


def smooth(model: onnx.ModelProto, greatest: Mapping[str, NDArray[np.float32]]) -> None:
    """Divide each channel of what products multiply by a factor, and multiply its row of the weights by it.

    `greatest` has the greatest absolute value of each channel (inner,), by the name that `write_watched` gave. What
    flows between layers has a few channels far greater than all others, and one scale of 8 bits for all of them
    leaves little to the others; weights, with a scale for each column, can carry some of that (Xiao et al.,
    SmoothQuant, ICML 2023, section 4).
    """
    onnx = import_onnx()
    graph = model.graph
    weights = {weight.name: weight for weight in graph.initializer}
    products = {node.input[1] for node in _products(model)}
    nodes = list(graph.node)
    del graph.node[:]
    for node in nodes:
        if len(node.input) > 1 and node.input[1] in products:
            weight = weights[node.input[1]]
            matrix = onnx.numpy_helper.to_array(weight)
            seen = greatest[node.input[0]]
            usual = float(np.median(seen[seen > MIN_CHANNEL])) if (seen > MIN_CHANNEL).any() else 0.0
            activations = np.maximum(seen, max(MIN_CHANNEL, SILENT * usual))
            rows = np.maximum(np.abs(matrix).max(axis=1), MIN_CHANNEL)
            factor = activations**SMOOTHING / rows ** (1 - SMOOTHING)
            factor = (factor / np.exp(np.log(factor).mean())).astype(np.float32)
            weight.CopyFrom(onnx.numpy_helper.from_array(matrix * factor[:, None], weight.name))
            name = f"{weight.name}_smooth"
            graph.initializer.append(onnx.numpy_helper.from_array(1 / factor, f"{name}_factor"))
            graph.node.append(onnx.helper.make_node("Mul", [node.input[0], f"{name}_factor"], [name], name=name))
            node.input[0] = name
        graph.node.append(node)


def _products(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The nodes that multiply activations by a float32 weight (inner, outer) that no other node uses."""
    onnx = import_onnx()
    users = Counter(name for node in model.graph.node for name in node.input)
    matrices = {
        weight.name
        for weight in model.graph.initializer
        if len(weight.dims) == 2 and weight.data_type == onnx.TensorProto.FLOAT
    }
    return [
        node
        for node in model.graph.node
        if node.op_type in _MATRICES and node.input[1] in matrices and users[node.input[1]] == 1
    ]


def write_int8(model: onnx.ModelProto, recipe: Recipe, file: Path) -> None:
    """Every matrix that is a weight in 8 bits by the recipe, and the tables of embeddings in 8 bits by rows."""
    _quantise_tables(model)
    if recipe.blocks:
        _quantise_blocks(model)
        write_model(model, file)
        return
    with _translated("quantise"), native_file(file):
        from onnxruntime.quantization import QuantType, quantize_dynamic

        quantize_dynamic(
            model,
            file,
            op_types_to_quantize=list(_MATRICES),
            per_channel=True,
            reduce_range=recipe.reduce_range,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=[] if recipe.narrow else _narrow(model),
            # Fused operators have no inference of types of their own; what flows between them is float32.
            extra_options={"MatMulConstBOnly": True, "DefaultTensorType": 1},
        )


def _narrow(model: onnx.ModelProto) -> list[str]:
    """The names of the products whose weight has fewer columns than rows."""
    shapes = {weight.name: tuple(weight.dims) for weight in model.graph.initializer}
    products = [(node.name, shapes.get(node.input[1], ())) for node in model.graph.node if node.op_type == "MatMul"]
    return [name for name, shape in products if len(shape) == 2 and shape[1] < shape[0]]


def _quantise_tables(model: onnx.ModelProto) -> None:
    """Rows of embeddings become int8 with a scale each, which loses less than one scale for all."""
    onnx = import_onnx()
    graph = model.graph
    weights = {weight.name: weight for weight in graph.initializer}
    nodes = list(graph.node)
    users: dict[str, int] = {}
    for node in nodes:
        for name in node.input:
            users[name] = users.get(name, 0) + 1
    del graph.node[:]
    for node in nodes:
        weight = weights.get(node.input[0]) if node.op_type == "Gather" else None
        by_rows = weight is not None and len(weight.dims) == 2 and weight.data_type == onnx.TensorProto.FLOAT
        axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
        if weight is None or not by_rows or axis != 0 or users[weight.name] > 1:
            graph.node.append(node)
            continue
        table = onnx.numpy_helper.to_array(weight)
        if table.nbytes < MIN_TABLE_BYTES:
            graph.node.append(node)
            continue
        scale = np.abs(table).max(axis=1, keepdims=True) / np.float32(127)
        codes = np.rint(np.divide(table, scale, out=np.zeros_like(table), where=scale > 0)).astype(np.int8)
        name = weight.name
        graph.initializer.remove(weight)
        graph.initializer.append(onnx.numpy_helper.from_array(codes, f"{name}_codes"))
        graph.initializer.append(onnx.numpy_helper.from_array(scale.astype(np.float32), f"{name}_scale"))
        for kind, inputs, output, attributes in (
            ("Gather", [f"{name}_codes", node.input[1]], "rows", {}),
            ("Cast", [f"{name}_rows"], "floats", {"to": onnx.TensorProto.FLOAT}),
            ("Gather", [f"{name}_scale", node.input[1]], "scales", {}),
        ):
            made = onnx.helper.make_node(kind, inputs, [f"{name}_{output}"], name=f"{name}_{output}", **attributes)
            graph.node.append(made)
        product = [f"{name}_floats", f"{name}_scales"]
        graph.node.append(onnx.helper.make_node("Mul", product, list(node.output), name=node.name))


def _quantise_blocks(model: onnx.ModelProto) -> None:
    """MatMul with a weight becomes MatMulNBits: 8 bits, 32 weights of a column share a scale, activations by rows."""
    onnx = import_onnx()
    graph = model.graph
    weights = {weight.name: weight for weight in graph.initializer}
    users = Counter(name for node in graph.node for name in node.input)
    for node in graph.node:
        weight = weights.get(node.input[1]) if node.op_type == "MatMul" and users[node.input[1]] == 1 else None
        if weight is None or len(weight.dims) != 2 or weight.dims[0] % BLOCK:
            continue
        matrix = onnx.numpy_helper.to_array(weight).astype(np.float32)
        inner, outer = matrix.shape
        blocks = matrix.T.reshape(outer, inner // BLOCK, BLOCK)
        scale = np.abs(blocks).max(axis=-1) / np.float32(127)
        scaled = np.divide(blocks, scale[..., None], out=np.zeros_like(blocks), where=scale[..., None] > 0)
        codes = (np.rint(scaled) + 128).astype(np.uint8)  # 128 stands for 0
        graph.initializer.remove(weights.pop(node.input[1]))
        graph.initializer.append(onnx.numpy_helper.from_array(codes, f"{weight.name}_codes"))
        graph.initializer.append(onnx.numpy_helper.from_array(scale, f"{weight.name}_scale"))
        node.op_type, node.domain = "MatMulNBits", _CONTRIB
        given = node.input[0]
        del node.input[:]
        node.input.extend([given, f"{weight.name}_codes", f"{weight.name}_scale"])
        # Level 4 lets the sums be of 8-bit integers, too.
        for key, value in (("K", inner), ("N", outer), ("bits", 8), ("block_size", BLOCK), ("accuracy_level", 4)):
            node.attribute.append(onnx.helper.make_attribute(key, value))


@contextlib.contextmanager
def _translated(verb: str) -> Iterator[None]:
    """The border where onnxruntime's tools keep their warnings to themselves, and their errors become ours."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    except ImportError as error:
        raise BackendMissing(f"optimizing an encoder needs {error.name}: pip install 'vecsvc[models]'") from error
    except EncoderError:
        raise
    except Exception as error:  # they share no base
        raise EncoderError(f"onnxruntime cannot {verb} the model: {_one_line(error)}") from error
    finally:
        logging.disable(before)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:400]
