"""An encoder's folder, laid out as Hugging Face and sentence-transformers write it: its files and what they say.

model.onnx or onnx/model.onnx       the network, with files of weights beside it where it names some
tokenizer.json                      how text becomes tokens
modules.json                        which steps follow the network (optional)
1_Pooling/config.json               how the vectors of the tokens become one (optional: mean)
sentence_bert_config.json           where texts are cut (optional: as tokenizer.json says, else at 256 tokens)
config_sentence_transformers.json   what is put before queries and passages (optional: nothing)
encoder.json                        what only vecsvc knows: dim, cells, measured (optional)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

import msgspec

from vecsvc.encoders.base import Role
from vecsvc.errors import ConfigError, EncoderError
from vecsvc.onnx_session import external_files
from vecsvc.storage import sha256
from vecsvc.tokenizer import MAX_TOKENS
from vecsvc.types import MAX_DIM

T = TypeVar("T")

MODELS: Final = ("model.onnx", "onnx/model.onnx")
TOKENIZER: Final = "tokenizer.json"
MODULES: Final = "modules.json"
POOLING: Final = "1_Pooling/config.json"
LENGTH: Final = "sentence_bert_config.json"
PROMPTS: Final = "config_sentence_transformers.json"
OWN: Final = "encoder.json"
CONFIGS: Final = (MODULES, POOLING, LENGTH, PROMPTS)
CELLS: Final = ("front", "step", "head")  # what they do is said in cellular.py

MAX_CONFIG_BYTES: Final = 1 << 20
MAX_ENCODER_BYTES: Final = 4 << 30

_POOLINGS: Final = {f"{name}{end}": name for name in ("mean", "cls", "max") for end in ("", "_token", "_tokens")}
# The names that sentence-transformers tries for each role, in its order.
_PROMPT_NAMES: Final[Mapping[Role, tuple[str, ...]]] = {"query": ("query",), "passage": ("document", "passage")}


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderSettings:
    """What the JSON files of an encoder folder say."""

    pooling: str = "mean"  # mean, cls or max
    normalize: bool = True
    max_tokens: int | None = None  # None where no file says
    lower_case: bool = False
    prompts: Mapping[str, str]  # role -> text, only where there is one
    extra_modules: tuple[str, ...] = ()  # steps that only the model itself could have done
    dim: int | None = None  # vectors are cut to so many values (Matryoshka), None leaves the model's
    cells: Mapping[str, Any] | None = None  # how a recurrent model is run step by step
    measured: Mapping[str, Any] | None = None  # figures for people; no part of what the encoder is


def encoder_files(folder: Path) -> list[Path]:
    """Exactly the files that the encoder is made of, the model first; copied with their places, they are it.

    Raises ConfigError where there is no such folder, EncoderError where a file is missing or all are too large.
    """
    model = find_model(folder)
    if model is None:
        raise EncoderError(f"{folder}: has no {' or '.join(MODELS)}; make it with vecsvc encoder import")
    if not (folder / TOKENIZER).is_file():
        raise EncoderError(f"{folder / TOKENIZER}: missing; it is what tokenizers' Tokenizer.save writes")
    models = (model, *cell_files(folder).values())
    # Models of one folder may share a file of weights.
    weights = dict.fromkeys(file for one in models for file in external_files(one))
    files = [*models, *weights, folder / TOKENIZER]
    files += [folder / config for config in (*CONFIGS, OWN) if (folder / config).is_file()]
    size = sum(file.stat().st_size for file in files)
    if size > MAX_ENCODER_BYTES:
        raise EncoderError(f"{folder}: the encoder has {size} bytes, at most {MAX_ENCODER_BYTES} are read")
    return files


def find_model(folder: Path) -> Path | None:
    """The model file, None where there is none. Raises ConfigError where there is no folder."""
    if not folder.is_dir():
        raise ConfigError(f"no encoder folder {folder}; give default, or what vecsvc encoder import has made")
    return next((folder / model for model in MODELS if (folder / model).is_file()), None)


def cell_files(folder: Path) -> dict[str, Path]:
    """The models that run the encoder's cells, in the order of CELLS; empty where encoder.json names none.

    Raises EncoderError where it does not name just these, or a file is not beside the model.
    """
    config = read_json(folder / OWN, OwnConfig)
    if config is None or config.cells is None:
        return {}
    if set(config.cells) != set(CELLS):
        raise EncoderError(f"{folder / OWN}: cells are {', '.join(sorted(config.cells))}, not {', '.join(CELLS)}")
    files = {}
    for cell in CELLS:
        name = config.cells[cell]
        if not isinstance(name, str) or Path(name).name != name or not (folder / name).is_file():
            raise EncoderError(f"{folder / OWN}: there is no file {name!r} beside it, the cell {cell}")
        files[cell] = folder / name
    return files


def hash_files(folder: Path, files: list[Path] | None = None) -> dict[str, str]:
    """The sha256 of each of the encoder's files, by its place in the folder. Raises as `encoder_files` does.

    `files` are those that `encoder_files` has just found.
    """
    found = files if files is not None else encoder_files(folder)
    try:
        return {file.relative_to(folder).as_posix(): sha256(file) for file in found}
    except OSError as error:
        raise EncoderError(f"{error.filename}: cannot be read: {error.strerror}; see to its owner and mode") from error


# ---------------------------------------------------------------------------------------------- settings


class _Module(msgspec.Struct):
    type: str
    path: str = ""


class _Length(msgspec.Struct):
    max_seq_length: Annotated[int, msgspec.Meta(ge=1, le=MAX_TOKENS)] | None = None
    do_lower_case: bool = False


class _Prompts(msgspec.Struct):
    prompts: dict[str, str | None] = {}
    default_prompt_name: str | None = None


class OwnConfig(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """encoder.json, the only file here whose shape is ours."""

    dim: Annotated[int, msgspec.Meta(ge=1, le=MAX_DIM)] | None = None
    cells: dict[str, Any] | None = None
    measured: dict[str, Any] | None = None


def read_settings(folder: Path) -> EncoderSettings:
    """What the folder's JSON files say. Raises EncoderError that names the file and what is wrong with it."""
    modules = read_json(folder / MODULES, list[_Module])
    # Older files say sentence_transformers.models.Pooling, newer ones have longer paths to the same name.
    steps = {module.type.rpartition(".")[2]: module.path for module in modules or ()}
    length = read_json(folder / LENGTH, _Length) or _Length()
    prompts = read_json(folder / PROMPTS, _Prompts) or _Prompts()
    own = read_json(folder / OWN, OwnConfig) or OwnConfig()
    found = {
        role: next((prompts.prompts[n] for n in (*names, prompts.default_prompt_name) if n in prompts.prompts), None)
        for role, names in _PROMPT_NAMES.items()
    }
    return EncoderSettings(
        pooling=_read_pooling(folder, steps, bool(prompts.prompts)),
        normalize="Normalize" in steps if modules is not None else True,
        max_tokens=length.max_seq_length,
        lower_case=length.do_lower_case,
        prompts={role: text for role, text in found.items() if text},
        extra_modules=tuple(step for step in steps if step not in ("Transformer", "Pooling", "Normalize")),
        dim=own.dim,
        cells=own.cells,
        measured=own.measured,
    )


def _read_pooling(folder: Path, steps: Mapping[str, str], prompted: bool) -> str:
    file = folder / POOLING
    config = read_json(file, dict[str, Any])
    if config is None:
        if "Pooling" in steps:
            # To fall back to the mean here would give wrong vectors for every model that pools otherwise.
            raise EncoderError(f"{file}: missing, though {MODULES} has a Pooling step at {steps['Pooling']!r}")
        return "mean"
    if prompted and config.get("include_prompt") is False:
        raise EncoderError(f"{file}: include_prompt false is not supported; prompts are pooled with the text")
    modes = [key.removeprefix("pooling_mode_") for key, on in config.items() if key.startswith("pooling_mode_") and on]
    if "pooling_mode" in config:
        modes = [str(config["pooling_mode"])]
    if len(modes) != 1 or modes[0] not in _POOLINGS:
        raise EncoderError(f"{file}: pooling must be one of mean, cls, max; got {' and '.join(modes) or 'none'}")
    return _POOLINGS[modes[0]]


def read_json(file: Path, kind: type[T]) -> T | None:
    """The file's JSON as a checked `kind`; None where there is no file. Raises EncoderError that names the file."""
    if not file.is_file():
        return None
    try:
        if file.stat().st_size > MAX_CONFIG_BYTES:
            raise EncoderError(f"{file}: larger than {MAX_CONFIG_BYTES} bytes")
        return msgspec.json.decode(file.read_bytes(), type=kind)
    except OSError as error:
        raise EncoderError(f"{file}: {error.strerror}") from error
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise EncoderError(f"{file}: {error}") from error
