"""Text to vectors by an ONNX model and a tokenizer, from a folder as `folder.py` describes it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, get_args

import msgspec
import numpy as np
from numpy.typing import NDArray

from vecsvc.encoders.base import EncoderSpec, Role, unit_length
from vecsvc.encoders.folder import MODULES, OWN, TOKENIZER, EncoderSettings, encoder_files, hash_files, read_settings
from vecsvc.errors import EncoderError, InvalidParameter, InvalidRequest
from vecsvc.onnx_session import OnnxSession, SessionSettings, device_name
from vecsvc.tokenizer import TextTokenizer, TokenBatch, Tokens
from vecsvc.types import MAX_DIM, Vectors

# Tokens in one run of the model, padding included. On a CPU more was measured to be slower: what passes between
# the layers outgrows the cache, and texts of unlike length share a batch. The memory grows in proportion.
BATCH_TOKENS: Final = 2048
GPU_BATCH_TOKENS: Final = 65_536
WINDOW_TEXTS: Final = 8192  # texts that are tokenised, and sorted by length, at a time

# What models call their inputs, and what a batch of tokens calls them.
_ARRAYS: Final = {"input_ids": "ids", "attention_mask": "mask", "token_type_ids": "type_ids"}


class OnnxEncoder:
    """An encoder that an ONNX model and a tokenizer make up; see `open_encoder`. Any number of threads may encode."""

    spec: EncoderSpec

    def __init__(self, session: OnnxSession, tokenizer: TextTokenizer, spec: EncoderSpec) -> None:
        self.spec = spec
        self._session = session
        self._tokenizer = tokenizer
        self._output = _output(session)
        self._batch_tokens = BATCH_TOKENS if device_name(session.settings.device) == "cpu" else GPU_BATCH_TOKENS

    def split(self, texts: Sequence[str], role: Role = "query") -> list[Tokens]:
        """The tokens of each text, with the role's prompt before it, cut at `max_tokens`.

        Raises InvalidRequest, naming the text by its position, where one is no valid Unicode.
        """
        return self._split(texts, role, 0)

    def run(self, tokens: Sequence[Tokens]) -> Vectors:
        """Vectors (n, dim) in the order of the texts, by one run of the model; (0, dim) for none."""
        if not tokens:
            return np.empty((0, self.spec.dim), dtype=np.float32)
        batch = self._tokenizer.pad(tokens)
        [output] = self._session.run(_feed(self._session, batch), [self._output])
        # Models trained so that the first values say the most (Kusupati et al. 2022, Matryoshka) may be cut to them.
        mask = batch.mask if len(tokens) > 1 else None
        vectors = np.ascontiguousarray(pool(output, mask, self.spec.pooling)[:, : self.spec.dim])
        if vectors.shape != (len(tokens), self.spec.dim):
            raise EncoderError(
                f"encoder {self.spec.name!r}: the model gave {vectors.shape} for {len(tokens)} texts, "
                f"expected {(len(tokens), self.spec.dim)}"
            )
        if not math.isfinite(np.vdot(vectors, vectors)):  # or beyond float32, as the sum of squares may be
            n, bad = len(tokens), int(np.count_nonzero(~np.isfinite(vectors).all(axis=1)))
            if bad:
                raise EncoderError(
                    f"encoder {self.spec.name!r}: the model gave no finite numbers for {bad} of {n} texts"
                )
        return unit_length(vectors) if self.spec.normalize else vectors

    def outputs(self, tokens: Sequence[Tokens], names: Sequence[str]) -> list[NDArray[Any]]:
        """What one run of the model gives under these names, as it is, texts padded to the longest."""
        return self._session.run(_feed(self._session, self._tokenizer.pad(tokens)), names)

    def last_token(self) -> tuple[str, int]:
        """The token with the greatest number, and that number; "" and 0 where the tokenizer knows none."""
        return self._tokenizer.last_token()

    def encode(self, texts: Sequence[str], role: Role = "query") -> Vectors:
        """Vectors (n, dim) in the order of the texts, of unit length where the spec says so; (0, dim) for none.

        Texts beyond `max_tokens` are cut. Raises InvalidRequest, naming the text by its position, where one is
        no valid Unicode, and EncoderError where the model fails or was closed.
        """
        if isinstance(texts, str):
            raise InvalidRequest("texts must be a list of texts, got one text")
        vectors = np.empty((len(texts), self.spec.dim), dtype=np.float32)
        for start in range(0, len(texts), WINDOW_TEXTS):
            tokens = self._split(texts[start : start + WINDOW_TEXTS], role, start)
            for rows in _batches(tokens, self._batch_tokens):
                vectors[start + rows] = self.run([tokens[row] for row in rows])
        return vectors

    def close(self) -> None:
        self._session.close()

    def _split(self, texts: Sequence[str], role: Role, first: int) -> list[Tokens]:
        if role not in get_args(Role):
            raise InvalidParameter(f"role must be one of {', '.join(get_args(Role))}, got {role!r}")
        return self._tokenizer.split(texts, prompt=self.spec.prompts.get(role, ""), first=first)


def open_encoder(
    folder: Path,
    *,
    name: str | None = None,
    device: str = "cpu",
    num_threads: int = 0,
    spinning: bool = False,
    memory_mb: int = 0,
    hashes: Mapping[str, str] | None = None,
) -> OnnxEncoder:
    """Open the encoder in `folder`; its name is the folder's unless given. For the rest see SessionSettings.

    `hashes` are those of its files where the caller has just read and checked them; otherwise they are read here.

    Raises ConfigError where there is no such folder, EncoderError that names the file where one is missing or
    wrong, BackendMissing where a library or the device is not there.
    """
    files = encoder_files(folder)
    # The files are hashed before onnxruntime sees one of them.
    hashes = hashes if hashes is not None else hash_files(folder, files)
    settings = read_settings(folder)
    tokenizer = TextTokenizer(folder / TOKENIZER, settings.max_tokens, lower_case=settings.lower_case)
    running = SessionSettings(device=device, num_threads=num_threads, spinning=spinning, memory_mb=memory_mb)
    session = OnnxSession(files[0], running)
    # The files do not say the dimension, and a model that cannot encode is better refused here than at a query.
    _check_inputs(session)
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
    width = int(output.shape[-1])
    dim = width if settings.dim is None else settings.dim
    if dim > width:
        raise EncoderError(f"{folder / OWN}: dim {dim} is more than the {width} values that the model gives")
    spec = EncoderSpec(
        name=name if name is not None else folder.resolve().name,
        fingerprint=_fingerprint(hashes, settings, pooling, tokenizer.max_tokens, dim),
        dim=dim,
        pooling=pooling,
        normalize=settings.normalize,
        max_tokens=tokenizer.max_tokens,
        prompts=dict(settings.prompts),
    )
    return OnnxEncoder(session, tokenizer, spec)


def _fingerprint(hashes: Mapping[str, str], settings: EncoderSettings, pooling: str, max_tokens: int, dim: int) -> str:
    facts: dict[str, Any] = {
        # Of encoder.json only what changes how texts are encoded counts: figures may be measured anew.
        "files": {name: found for name, found in hashes.items() if name != OWN},
        "settings": [dim, pooling, settings.normalize, max_tokens, settings.lower_case, dict(settings.prompts)],
    }
    if settings.cells is not None:
        facts["cells"] = settings.cells
    return hashlib.sha256(msgspec.json.encode(facts, order="deterministic")).hexdigest()


# ------------------------------------------------------------------------------------------------- maths


def pool(hidden: NDArray[Any], mask: NDArray[np.int64] | None, pooling: str) -> Vectors:
    """One vector (n, dim) per text from those of its tokens (n, t, dim); padding, where mask (n, t) is 0, is left out.

    Each row of the mask has a token; None where there is no padding. With pooling "none" `hidden` is (n, dim) already.
    """
    vectors: Vectors = hidden.astype(np.float32, copy=False)
    if pooling == "mean" and mask is not None:
        weights = mask.astype(np.float32)
        vectors = np.matmul(weights[:, None, :], vectors)[:, 0] / weights.sum(axis=1, keepdims=True)
    elif pooling == "mean":
        vectors = np.add.reduce(vectors, axis=1) / vectors.shape[1]
    elif pooling == "cls":
        vectors = vectors[:, 0]
    elif pooling == "max":
        if mask is not None:
            vectors = np.where(mask[:, :, None] > 0, vectors, np.float32(-np.inf))
        vectors = vectors.max(axis=1)
    return vectors


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


def _check_inputs(session: OnnxSession) -> None:
    unknown = [name for name in session.inputs if name not in _ARRAYS]
    if unknown or "input_ids" not in session.inputs:
        raise EncoderError(
            f"{session.path}: is no text encoder: its inputs are {', '.join(session.inputs)}; "
            f"input_ids is needed, and only {', '.join(_ARRAYS)} are known"
        )


def _feed(session: OnnxSession, batch: TokenBatch) -> dict[str, NDArray[np.int64]]:
    """The inputs that the model declares: not all know token types."""
    return {name: getattr(batch, _ARRAYS[name]) for name in session.inputs}


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
