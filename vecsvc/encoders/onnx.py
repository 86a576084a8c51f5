"""Text to vectors by an ONNX model, from a folder laid out as Hugging Face and sentence-transformers write it.

model.onnx or onnx/model.onnx       the network, with files of weights beside it where it names some
tokenizer.json                      how text becomes tokens
modules.json                        which steps follow the network (optional)
1_Pooling/config.json               how the vectors of the tokens become one (optional: mean)
sentence_bert_config.json           where texts are cut (optional: as tokenizer.json says, else at 256 tokens)
config_sentence_transformers.json   what is put before queries and passages (optional: nothing)
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar, get_args

import msgspec
import numpy as np
from numpy.typing import NDArray

from vecsvc.encoders.base import EncoderSpec, Role
from vecsvc.errors import ConfigError, EncoderError, InvalidParameter, InvalidRequest
from vecsvc.onnx_session import OnnxSession, external_files
from vecsvc.storage import sha256
from vecsvc.tokenizer import MAX_TOKENS, TextTokenizer, TokenBatch, Tokens
from vecsvc.types import MAX_DIM, Vectors

T = TypeVar("T")

MODELS: Final = ("model.onnx", "onnx/model.onnx")
TOKENIZER: Final = "tokenizer.json"
MODULES: Final = "modules.json"
POOLING: Final = "1_Pooling/config.json"
LENGTH: Final = "sentence_bert_config.json"
PROMPTS: Final = "config_sentence_transformers.json"
CONFIGS: Final = (MODULES, POOLING, LENGTH, PROMPTS)

MAX_CONFIG_BYTES: Final = 1 << 20
MAX_ENCODER_BYTES: Final = 4 << 30
# Tokens in one run of the model, padding included. On a CPU more was measured to be slower: what passes between
# the layers outgrows the cache, and texts of unlike length share a batch. The memory grows in proportion.
BATCH_TOKENS: Final = {"cpu": 2048, "cuda": 65_536}
WINDOW_TEXTS: Final = 8192  # texts that are tokenised, and sorted by length, at a time

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


class OnnxEncoder:
    """An encoder that an ONNX model and a tokenizer make up; see `open_encoder`. Any number of threads may encode."""

    spec: EncoderSpec

    def __init__(self, session: OnnxSession, tokenizer: TextTokenizer, spec: EncoderSpec) -> None:
        self.spec = spec
        self._session = session
        self._tokenizer = tokenizer
        self._output = _output(session)
        self._batch_tokens = BATCH_TOKENS[session.device]

    def encode(self, texts: Sequence[str], role: Role = "query") -> Vectors:
        """Vectors (n, dim) in the order of the texts, of unit length where the spec says so; (0, dim) for none.

        Texts beyond `max_tokens` are cut. Raises InvalidRequest, naming the text by its position, where one is
        no valid Unicode, and EncoderError where the model fails or was closed.
        """
        if isinstance(texts, str):
            raise InvalidRequest("texts must be a list of texts, got one text")
        if role not in get_args(Role):
            raise InvalidParameter(f"role must be one of {', '.join(get_args(Role))}, got {role!r}")
        vectors = np.empty((len(texts), self.spec.dim), dtype=np.float32)
        for start in range(0, len(texts), WINDOW_TEXTS):
            window = texts[start : start + WINDOW_TEXTS]
            tokens = self._tokenizer.split(window, prompt=self.spec.prompts.get(role, ""), first=start)
            for rows in _batches(tokens, self._batch_tokens):
                vectors[start + rows] = self._encode_batch([tokens[row] for row in rows])
        return vectors

    def split(self, texts: Sequence[str], role: Role = "query") -> list[Tokens]:
        """The tokens of each text, with the role's prompt before it, cut at `max_tokens`."""
        return self._tokenizer.split(texts, prompt=self.spec.prompts.get(role, ""))

    def close(self) -> None:
        self._session.close()

    def _encode_batch(self, tokens: Sequence[Tokens]) -> Vectors:
        batch = self._tokenizer.pad(tokens)
        [output] = self._session.run(_feed(self._session, batch), [self._output])
        vectors = pool(output, batch.mask, self.spec.pooling)
        if vectors.shape != (len(tokens), self.spec.dim) or not np.isfinite(vectors).all():
            raise EncoderError(
                f"encoder {self.spec.name!r}: the model gave {vectors.shape} for {len(tokens)} texts, "
                f"expected finite numbers of shape {(len(tokens), self.spec.dim)}"
            )
        return unit_length(vectors) if self.spec.normalize else vectors


def open_encoder(folder: Path, *, name: str | None = None, device: str = "cpu", num_threads: int = 0) -> OnnxEncoder:
    """Open the encoder in `folder`; its name is the folder's unless given. `num_threads` 0 means one a core.

    Raises ConfigError where there is no such folder, EncoderError that names the file where one is missing or
    wrong, BackendMissing where a library or the GPU is not there.
    """
    files = encoder_files(folder)
    settings = read_settings(folder)
    tokenizer = TextTokenizer(folder / TOKENIZER, settings.max_tokens, lower_case=settings.lower_case)
    session = OnnxSession(files[0], device=device, num_threads=num_threads)
    # The files do not say the dimension, and a model that cannot encode is better refused here than at a query.
    probe = tokenizer([""])
    [output] = session.run(_feed(session, probe), [_output(session)])
    pooling = settings.pooling if output.ndim == 3 else "none"
    if output.ndim not in (2, 3) or not 1 <= output.shape[-1] <= MAX_DIM:
        raise EncoderError(f"{files[0]}: its output has shape {output.shape}, expected (n, t, dim) or (n, dim)")
    if pooling != "none" and settings.extra_modules:
        raise EncoderError(
            f"{folder / MODULES}: {', '.join(settings.extra_modules)} is not supported; vecsvc knows Transformer, "
            "Pooling and Normalize: export the model with all its steps and the output sentence_embedding"
        )
    dim = int(output.shape[-1])
    spec = EncoderSpec(
        name=name if name is not None else folder.resolve().name,
        fingerprint=_fingerprint(folder, files, settings, pooling, tokenizer.max_tokens, dim),
        dim=dim,
        pooling=pooling,
        normalize=settings.normalize,
        max_tokens=tokenizer.max_tokens,
        prompts=dict(settings.prompts),
    )
    return OnnxEncoder(session, tokenizer, spec)


# ------------------------------------------------------------------------------------------------- files


def encoder_files(folder: Path) -> list[Path]:
    """Exactly the files that the encoder is made of, the model first; copied with their places, they are it.

    Raises ConfigError where there is no such folder, EncoderError where a file is missing or all are too large.
    """
    model = find_model(folder)
    if model is None:
        raise EncoderError(f"{folder}: has no {' or '.join(MODELS)}; make it with vecsvc encoder import")
    if not (folder / TOKENIZER).is_file():
        raise EncoderError(f"{folder / TOKENIZER}: missing; it is what tokenizers' Tokenizer.save writes")
    files = [model, *external_files(model), folder / TOKENIZER]
    files += [folder / config for config in CONFIGS if (folder / config).is_file()]
    size = sum(file.stat().st_size for file in files)
    if size > MAX_ENCODER_BYTES:
        raise EncoderError(f"{folder}: the encoder has {size} bytes, at most {MAX_ENCODER_BYTES} are read")
    return files


def find_model(folder: Path) -> Path | None:
    """The model file, None where there is none. Raises ConfigError where there is no folder."""
    if not folder.is_dir():
        raise ConfigError(f"no encoder folder {folder}")
    return next((folder / model for model in MODELS if (folder / model).is_file()), None)


def _fingerprint(
    folder: Path, files: Sequence[Path], settings: EncoderSettings, pooling: str, max_tokens: int, dim: int
) -> str:
    facts = {
        "files": {file.relative_to(folder).as_posix(): sha256(file) for file in files},
        "settings": [dim, pooling, settings.normalize, max_tokens, settings.lower_case, dict(settings.prompts)],
    }
    return hashlib.sha256(msgspec.json.encode(facts, order="deterministic")).hexdigest()


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


def read_settings(folder: Path) -> EncoderSettings:
    """What the folder's JSON files say. Raises EncoderError that names the file and what is wrong with it."""
    modules = read_json(folder / MODULES, list[_Module])
    # Older files say sentence_transformers.models.Pooling, newer ones have longer paths to the same name.
    steps = {module.type.rpartition(".")[2]: module.path for module in modules or ()}
    length = read_json(folder / LENGTH, _Length) or _Length()
    prompts = read_json(folder / PROMPTS, _Prompts) or _Prompts()
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


# ------------------------------------------------------------------------------------------------- maths


def pool(hidden: NDArray[Any], mask: NDArray[np.int64], pooling: str) -> Vectors:
    """One vector (n, dim) per text from those of its tokens (n, t, dim); padding, where mask (n, t) is 0, is left out.

    Each row of the mask has a token. With pooling "none" `hidden` is (n, dim) already.
    """
    vectors: Vectors = hidden.astype(np.float32, copy=False)
    if pooling == "mean":
        weights = mask.astype(np.float32)
        vectors = np.matmul(weights[:, None, :], vectors)[:, 0] / weights.sum(axis=1, keepdims=True)
    elif pooling == "cls":
        vectors = vectors[:, 0]
    elif pooling == "max":
        vectors = np.where(mask[:, :, None] > 0, vectors, np.float32(-np.inf)).max(axis=1)
    return vectors


def unit_length(vectors: Vectors) -> Vectors:
    """The vectors (n, dim) at length 1; a zero vector stays zero."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit: Vectors = np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0)
    return unit


def _batches(tokens: Sequence[Tokens], limit: int) -> Iterator[NDArray[np.intp]]:
    """Positions of texts of like length, the longest first, each batch within `limit` tokens, padding included."""
    lengths = np.array([max(1, len(one)) for one in tokens], dtype=np.intp)
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        count = max(1, limit // int(lengths[order[start]]))
        yield order[start : start + count]
        start += count


# ------------------------------------------------------------------------------------------------- model


def _feed(session: OnnxSession, batch: TokenBatch) -> dict[str, NDArray[np.int64]]:
    """The inputs that the model declares: not all know token types."""
    known = {"input_ids": batch.ids, "attention_mask": batch.mask, "token_type_ids": batch.type_ids}
    unknown = [name for name in session.inputs if name not in known]
    if unknown or "input_ids" not in session.inputs:
        raise EncoderError(
            f"{session.path}: is no text encoder: its inputs are {', '.join(session.inputs)}; "
            f"input_ids is needed, and only {', '.join(known)} are known"
        )
    return {name: known[name] for name in session.inputs}


def _output(session: OnnxSession) -> str:
    """The output with a text's vector where the model pools itself, else the one with its tokens' vectors."""
    ranks = {port.name: len(port.shape) for port in session.outputs.values()}
    if ranks.get("sentence_embedding") == 2 or len(ranks) == 1:
        return "sentence_embedding" if "sentence_embedding" in ranks else next(iter(ranks))
    # A pooler_output (n, dim) is BERT's head for another task, no vector to search by.
    for name, rank in ranks.items():
        if rank == 3:
            return name
    raise EncoderError(f"{session.path}: its outputs are {', '.join(ranks)}; expected last_hidden_state (n, t, dim)")
