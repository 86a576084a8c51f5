"""Makes an encoder folder out of a Hugging Face one: copies an ONNX model, or converts BERT's weights without torch."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from index_builders.bert_config import read_config
from index_builders.bert_graph import bert_graph
from index_builders.onnx_graph import MAX_GRAPH_BYTES, import_onnx
from vecsvc.encoders.base import CANARY_TEXTS, EncoderSpec
from vecsvc.encoders.folder import (
    CONFIGS,
    LENGTH,
    MODELS,
    TOKENIZER,
    encoder_files,
    find_model,
    read_json,
    read_settings,
)
from vecsvc.encoders.onnx import open_encoder
from vecsvc.errors import BackendMissing, ConfigError, EncoderError, InvalidParameter, StorageError
from vecsvc.storage import (
    STAGING,
    copy_file,
    delete_folder,
    make_folder,
    rename,
    sync_folder,
    write_file,
)
from vecsvc.tokenizer import DEFAULT_MAX_TOKENS, MAX_TOKENS

if TYPE_CHECKING:
    import onnx

CONFIG: Final = "config.json"
WEIGHTS: Final = "model.safetensors"
_DTYPES: Final = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}


def import_encoder(source: Path, out: Path, *, max_tokens: int = DEFAULT_MAX_TOKENS) -> EncoderSpec:
    """Write the encoder of the folder `source` to the new folder `out`, and return what it became.

    An ONNX model is copied with its tokenizer and settings; otherwise model.safetensors of a BERT is converted.
    Texts are cut at `max_tokens`, or earlier where the source's settings or its positions end. `out` appears
    whole or not at all.

    Raises ConfigError where there is no source or `out` exists, EncoderError that names the file and what is
    wrong with it, BackendMissing where onnx, safetensors or onnxruntime is not installed.
    """
    if not 1 <= max_tokens <= MAX_TOKENS:
        raise InvalidParameter(f"max_tokens must be between 1 and {MAX_TOKENS}, got {max_tokens}")
    model = find_model(source)
    if out.exists() or out.is_symlink():
        raise ConfigError(f"{out} exists, and an encoder is never overwritten: choose another folder")
    staging = out.with_name(f"{STAGING}{out.name}-{os.getpid()}")
    make_folder(out.parent)
    try:
        make_folder(staging)
        positions = max_tokens
        if model is None:
            proto, positions = _convert(source)
            write_file(staging / MODELS[0], proto.SerializeToString())
            files = [source / TOKENIZER, *(source / name for name in CONFIGS if (source / name).is_file())]
        else:
            files = encoder_files(source)
        _copy([file for file in files if file != source / LENGTH], source, staging)
        _write_length(source, staging, min(max_tokens, positions))
        spec = _check(staging, out.name, full=model is None)
        for folder in (*(f for f in staging.iterdir() if f.is_dir()), staging):
            sync_folder(folder)
        rename(staging, out)
    except BaseException as error:
        with contextlib.suppress(StorageError):
            delete_folder(staging)
        if isinstance(error, EncoderError):
            # What is wrong with the copy is wrong with the original, and only that is still there to be mended.
            raise EncoderError(str(error).replace(str(staging), str(source))) from error
        raise
    return spec


def _convert(source: Path) -> tuple[onnx.ModelProto, int]:
    """The model of a folder of safetensors, and how many positions it has."""
    for name in (CONFIG, WEIGHTS, TOKENIZER):
        if not (source / name).is_file():
            raise EncoderError(
                f"{source / name}: missing; an encoder is made from {MODELS[0]} and {TOKENIZER}, "
                f"or from {CONFIG}, {WEIGHTS} and {TOKENIZER}"
            )
    config = read_json(source / CONFIG, dict[str, Any]) or {}
    try:
        bert = read_config(config)
        model = bert_graph(config, read_safetensors(source / WEIGHTS))
    except EncoderError as error:
        raise EncoderError(f"{source}: {error}") from error
    return model, bert.max_position_embeddings


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


def _copy(files: list[Path], source: Path, staging: Path) -> None:
    for file in files:
        target = staging / file.relative_to(source)
        make_folder(target.parent)
        copy_file(file, target)


def _write_length(source: Path, staging: Path, max_tokens: int) -> None:
    """The length is settled at import, so that nothing but the folder decides it later."""
    stated = read_settings(source).max_tokens
    content = read_json(source / LENGTH, dict[str, Any]) or {}
    content["max_seq_length"] = max_tokens if stated is None else min(stated, max_tokens)
    write_file(staging / LENGTH, msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n")


def _check(staging: Path, name: str, *, full: bool) -> EncoderSpec:
    """Refuse what onnx calls wrong, or what cannot encode a text as long as its settings allow.

    The full check infers every shape, which it cannot where others put operators of their own.
    """
    model = find_model(staging)
    checker = import_onnx().checker
    try:
        # By its path, so that files of weights beside the model are looked at, too.
        checker.check_model(str(model), full_check=full)
    except Exception as error:
        raise EncoderError(f"{name}: the model is not valid ONNX: {' '.join(str(error).split())[:400]}") from error
    encoder = open_encoder(staging, name=name)
    try:
        encoder.encode([*CANARY_TEXTS, ""])
        try:
            encoder.encode(["a b " * encoder.spec.max_tokens])
        except EncoderError as error:
            raise EncoderError(f"max_tokens {encoder.spec.max_tokens} is too long for the model: {error}") from error
    finally:
        encoder.close()
    return encoder.spec
