"""Makes an encoder folder out of a Hugging Face one: copies an ONNX model, or converts BERT's weights without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from index_builders.bert_config import read_config
from index_builders.bert_graph import bert_graph
from index_builders.encoder_folder import check_encoder, copy_files, new_encoder_folder, refuse_existing, write_json
from index_builders.onnx_graph import MAX_GRAPH_BYTES
from vecsvc.encoders.base import EncoderSpec, Role
from vecsvc.encoders.folder import (
    CONFIGS,
    LENGTH,
    MODELS,
    MODULES,
    OWN,
    POOLING,
    PROMPTS,
    TOKENIZER,
    OwnConfig,
    encoder_files,
    find_model,
    read_json,
    read_settings,
)
from vecsvc.errors import BackendMissing, EncoderError, InvalidParameter
from vecsvc.storage import write_file
from vecsvc.tokenizer import DEFAULT_MAX_TOKENS, MAX_TOKENS, check_text
from vecsvc.types import MAX_DIM

CONFIG: Final = "config.json"
WEIGHTS: Final = "model.safetensors"
POOLINGS: Final = ("mean", "cls", "max")
MAX_PROMPT_CHARS: Final = 4096
_DTYPES: Final = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}
_STEP: Final = "sentence_transformers.models."


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportSettings:
    """What an import changes; None leaves what the source's files say."""

    max_tokens: int = DEFAULT_MAX_TOKENS  # texts are cut there, or earlier where the source's files say so
    layers: int | None = None  # only the first so many: less work and less quality; weights are converted then
    dim: int | None = None  # vectors are cut to so many values, for models that were trained for it (Matryoshka)
    pooling: str | None = None  # mean, cls or max
    normalize: bool | None = None
    prompts: Mapping[Role, str] = field(default_factory=dict)  # put before each text of the role; "" for none

    def __post_init__(self) -> None:
        if not 1 <= self.max_tokens <= MAX_TOKENS:
            raise InvalidParameter(f"max_tokens must be between 1 and {MAX_TOKENS}, got {self.max_tokens}")
        if self.dim is not None and not 1 <= self.dim <= MAX_DIM:
            raise InvalidParameter(f"dim must be between 1 and {MAX_DIM}, got {self.dim}")
        if self.pooling not in (None, *POOLINGS):
            raise InvalidParameter(f"pooling must be one of {', '.join(POOLINGS)}, got {self.pooling!r}")
        for role, prompt in self.prompts.items():
            if len(check_text(prompt, f"{role} prompt")) > MAX_PROMPT_CHARS:
                raise InvalidParameter(f"{role} prompt has {len(prompt)} characters, at most {MAX_PROMPT_CHARS} fit")


def import_encoder(source: Path, out: Path, settings: ImportSettings | None = None) -> EncoderSpec:
    """Write the encoder of the folder `source` to the new folder `out`, and return what it became.

    An ONNX model is copied with its tokenizer and settings; where there is none, or only some layers are wanted,
    model.safetensors of a BERT or a relative is converted. `out` appears whole or not at all.

    Raises ConfigError where there is no source or `out` exists, EncoderError that names the file and what is
    wrong with it, InvalidParameter where the model has not so many layers or values, BackendMissing where onnx,
    safetensors or onnxruntime is not installed.
    """
    asked = settings if settings is not None else ImportSettings()
    found = find_model(source)  # a folder that is not there is told before anything is made
    model = found if asked.layers is None else None
    refuse_existing(out)
    with new_encoder_folder(out) as staging:
        try:
            positions = MAX_TOKENS
            if model is None:
                data, positions = _convert(source, asked.layers)
                write_file(staging / MODELS[0], data)
                files = [source / TOKENIZER, *(source / name for name in CONFIGS if (source / name).is_file())]
            else:
                files = encoder_files(source)
            changed = _configs(source, asked, positions)
            copy_files([f for f in files if f.relative_to(source).as_posix() not in changed], source, staging)
            for name, content in changed.items():
                write_json(staging / name, content)
            spec = check_encoder(staging, out.name, full=model is None)
            if asked.pooling is not None and spec.pooling != asked.pooling:
                raise InvalidParameter(f"pooling {asked.pooling!r} was asked for, but {source}'s model pools itself")
        except EncoderError as error:
            # What is wrong with the copy is wrong with the original, and only that is still there to be mended.
            raise EncoderError(str(error).replace(str(staging), str(source))) from error
    return spec


def _configs(source: Path, asked: ImportSettings, positions: int) -> dict[str, Any]:
    """The files of settings that become others than the source's, by name."""
    found = read_settings(source)
    length = read_json(source / LENGTH, dict[str, Any]) or {}
    limits = (asked.max_tokens, positions, found.max_tokens)
    # The length is settled at import, so that nothing but the folder decides it later.
    changed: dict[str, Any] = {LENGTH: {**length, "max_seq_length": min(n for n in limits if n is not None)}}
    if asked.pooling is not None:
        changed[POOLING] = {"pooling_mode": asked.pooling}
    if asked.pooling is not None or asked.normalize is not None:
        unit = found.normalize if asked.normalize is None else asked.normalize
        steps = ["Transformer", "Pooling", *found.extra_modules, *(["Normalize"] if unit else [])]
        paths = {"Transformer": "", "Pooling": str(Path(POOLING).parent)}
        changed[MODULES] = [
            {"idx": at, "name": str(at), "path": paths.get(step, f"{at}_{step}"), "type": _STEP + step}
            for at, step in enumerate(steps)
        ]
        changed.setdefault(POOLING, {"pooling_mode": found.pooling})
    if asked.prompts:
        prompts: dict[str, str] = dict(found.prompts)
        prompts.update((role, text) for role, text in asked.prompts.items())
        # sentence-transformers calls a passage document.
        names = {"query": prompts.get("query", ""), "document": prompts.get("passage", "")}
        changed[PROMPTS] = {"prompts": names, "default_prompt_name": None}
    own = {key: value for key in ("dim", "cells") if (value := getattr(found, key)) is not None}
    if asked.dim is not None:
        own["dim"] = asked.dim
    # Figures were measured of the source as it was.
    if own or (source / OWN).is_file():
        changed[OWN] = OwnConfig(**own)
    return changed


def _convert(source: Path, layers: int | None) -> tuple[bytes, int]:
    """The model file made of a folder of safetensors, and how many positions it has."""
    for name in (CONFIG, WEIGHTS, TOKENIZER):
        if not (source / name).is_file():
            weights = f"{CONFIG}, {WEIGHTS} and {TOKENIZER}"
            if layers is not None:
                raise EncoderError(f"{source / name}: missing; layers are cut where a model is made from {weights}")
            raise EncoderError(
                f"{source / name}: missing; an encoder is made from {MODELS[0]} and {TOKENIZER}, or from {weights}"
            )
    config = read_json(source / CONFIG, dict[str, Any]) or {}
    try:
        bert = read_config(config)
        model = bert_graph(config, read_safetensors(source / WEIGHTS), layers=layers)
    except EncoderError as error:
        raise EncoderError(f"{source}: {error}") from error
    return model.SerializeToString(), bert.positions


def read_safetensors(file: Path) -> dict[str, NDArray[Any]]:
    """Every floating-point array of a safetensors file by its name; bfloat16 becomes float32."""
    try:
        import safetensors
    except ImportError as error:
        raise BackendMissing("importing an encoder needs safetensors: pip install 'vecsvc[models]'") from error
    size = file.stat().st_size
    if size > MAX_GRAPH_BYTES:
        raise EncoderError(f"{file}: has {size} bytes, at most {MAX_GRAPH_BYTES} can be converted")
    try:
        # safetensors' own reader for NumPy does not know bfloat16.
        entries: list[tuple[str, Any]] = safetensors.deserialize(file.read_bytes())  # type: ignore[no-untyped-call]
    except Exception as error:
        raise EncoderError(f"{file}: is no safetensors file: {error}") from error
    arrays: dict[str, NDArray[Any]] = {}
    for name, entry in entries:
        if entry["dtype"] == "BF16":
            # A bfloat16 is the upper half of a float32.
            array = (np.frombuffer(entry["data"], "<u2").astype(np.uint32) << 16).view(np.float32)
        elif entry["dtype"] in _DTYPES:
            array = np.frombuffer(entry["data"], _DTYPES[entry["dtype"]])
        else:
            continue
        arrays[name] = array.reshape(entry["shape"])
    return arrays
