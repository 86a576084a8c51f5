"""Says what an encoder folder holds: what it makes of texts, its operators, figures; and how it runs best here."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from index_builders.encoder_optimize import table
from index_builders.onnx_graph import import_onnx
from vecsvc.encoders.folder import encoder_files, read_settings
from vecsvc.encoders.measure import open_fastest
from vecsvc.encoders.onnx import open_encoder
from vecsvc.errors import EncoderError


def describe(folder: Path) -> dict[str, Any]:
    """Every fact as JSON has it. Raises as open_encoder does."""
    encoder, choice = open_fastest(
        lambda threads, spinning: open_encoder(folder, num_threads=threads, spinning=spinning)
    )
    encoder.close()
    spec, settings = encoder.spec, read_settings(folder)
    files = encoder_files(folder)
    operators, types = _content(files[0])
    return {
        "name": spec.name,
        "fingerprint": spec.fingerprint,
        "dim": spec.dim,
        "pooling": spec.pooling,
        "normalize": spec.normalize,
        "max_tokens": spec.max_tokens,
        "prompts": dict(spec.prompts),
        "size_bytes": sum(file.stat().st_size for file in files),
        "weights_bytes": types,
        "operators": operators,
        "measured": dict(settings.measured or {}),
        "on_this_machine": asdict(choice),
    }


def lines(facts: dict[str, Any]) -> list[str]:
    """The same for people."""
    unit = "unit length" if facts["normalize"] else "not normalised"
    found = [
        f"{facts['name']}: dim {facts['dim']}, {facts['pooling']} pooling, {unit}, "
        f"at most {facts['max_tokens']} tokens",
        f"fingerprint {facts['fingerprint']}",
        *(f"{role} prompt: {text!r}" for role, text in facts["prompts"].items()),
        f"{facts['size_bytes'] / 1e6:.1f} MB; weights: "
        + ", ".join(f"{kind} {size / 1e6:.1f} MB" for kind, size in facts["weights_bytes"].items()),
        "operators: " + ", ".join(f"{count} {kind}" for kind, count in facts["operators"].items()),
    ]
    for name, figures in facts["measured"].items():
        try:
            shown = table(figures)
        except (KeyError, TypeError, ValueError):
            # Figures are free-form: others than optimize write theirs.
            shown = (
                [f"{key}: {value}" for key, value in figures.items()] if isinstance(figures, dict) else [str(figures)]
            )
        found += [f"measured by {name}:", *(f"  {line}" for line in shown)]
    choice = facts["on_this_machine"]
    found += [
        f"on this machine the CPU runs it best with --encoder-threads {choice['threads']} --encoder-instances "
        f"{choice['instances']} --encoder-spinning {'on' if choice['spinning'] else 'off'}:",
        *(f"  {line}" for line in choice["why"].split("; ")),
    ]
    return found


def _content(model: Path) -> tuple[dict[str, int], dict[str, int]]:
    """How often the model has each operator, and the bytes of its weights by their type; the most first."""
    onnx = import_onnx()
    try:
        graph = onnx.load(str(model), load_external_data=False).graph
    except Exception as error:
        raise EncoderError(f"{model}: the model is not valid ONNX: {' '.join(str(error).split())[:400]}") from error
    operators = Counter(node.op_type for node in graph.node)
    types: Counter[str] = Counter()
    for weight in graph.initializer:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(weight.data_type)
        count = 1
        for size in weight.dims:
            count *= size
        types[str(dtype)] += count * dtype.itemsize
    return dict(operators.most_common()), {kind: size for kind, size in types.most_common() if size}
