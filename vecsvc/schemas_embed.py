"""Requests for embeddings in OpenAI's shape and in TEI's, and answers and errors in the same.

Neither shape has a word for what we know in roles: a query and a passage may have different prompts. OpenAI's gets
`input_type` for it, TEI's has `prompt_name`; both mean a query unless told, so that a vector from here finds what
the same text finds in /search.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import msgspec
import numpy as np
from msgspec import UNSET, Struct, UnsetType

from vecsvc import json_vectors
from vecsvc.config import HttpSettings
from vecsvc.encoders.base import EncoderSpec, Role
from vecsvc.errors import InvalidRequest, shown
from vecsvc.question_checks import MAX_ANSWER_BYTES
from vecsvc.schemas import decode, encode_error
from vecsvc.types import Embedded

OPENAI_PATH: Final = "/v1/embeddings"
TEI_PATH: Final = "/embed"
MODELS_PATH: Final = "/v1/models"

# What one value of a vector takes in memory until its answer is sent: a Python float with its JSON, or base64.
_FLOAT_BYTES: Final = 56
_BASE64_BYTES: Final = 16

PROMPT_NAMES: Final[dict[str, Role]] = {"query": "query", "passage": "passage", "document": "passage"}


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedRequest:
    """A request in either shape, checked as far as it can be without the encoder."""

    texts: list[str]
    role: Role = "query"
    model: str | None = None  # None where the path names the index, or only one encoder is served
    dimensions: int | None = None
    base64: bool = False
    normalize: bool | None = None  # None for what the encoder gives
    truncate: bool = True


class OpenAIBody(Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    input: str | list[Any]
    model: str
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | UnsetType = UNSET
    user: str | UnsetType = UNSET
    input_type: Role = "query"


class TeiBody(Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    inputs: str | list[Any]
    normalize: bool = True
    truncate: bool | None = None
    truncation_direction: Literal["Right", "right", "Left", "left"] = "Right"
    prompt_name: str | None = None
    dimensions: int | None = None


_openai_decoder: Final = msgspec.json.Decoder(OpenAIBody)
_tei_decoder: Final = msgspec.json.Decoder(TeiBody)


# ----------------------------------------------------------------------------------------------- requests


def parse_openai(body: bytes, limits: HttpSettings) -> EmbedRequest:
    wire = decode(_openai_decoder, body)
    return EmbedRequest(
        texts=_texts(wire.input, "input", limits),
        role=wire.input_type,
        model=wire.model,
        dimensions=None if wire.dimensions is UNSET else wire.dimensions,
        base64=wire.encoding_format == "base64",
    )


def parse_tei(body: bytes, limits: HttpSettings) -> EmbedRequest:
    wire = decode(_tei_decoder, body)
    if wire.truncation_direction.lower() != "right":
        raise InvalidRequest("truncation_direction must be right: texts are cut at their end, never at their beginning")
    prompt = "query" if wire.prompt_name is None else wire.prompt_name
    if prompt not in PROMPT_NAMES:
        raise InvalidRequest(f"prompt_name must be one of {', '.join(PROMPT_NAMES)}, got {shown(prompt)}")
    return EmbedRequest(
        texts=_texts(wire.inputs, "inputs", limits),
        role=PROMPT_NAMES[prompt],
        dimensions=wire.dimensions,
        normalize=wire.normalize,
        truncate=bool(wire.truncate),
    )


def check_encoder(asked: EmbedRequest, spec: EncoderSpec) -> None:
    """Raise InvalidRequest for what this encoder cannot do, or what would fill the memory."""
    if asked.dimensions is not None and asked.dimensions != spec.dim:
        raise InvalidRequest(
            f"dimensions must be {spec.dim}, got {asked.dimensions}: encoder {spec.name!r} gives no others"
        )
    if asked.normalize is False and spec.normalize:
        raise InvalidRequest(f"normalize must be true: encoder {spec.name!r} gives vectors of unit length only")
    size = len(asked.texts) * spec.dim * (_BASE64_BYTES if asked.base64 else _FLOAT_BYTES)
    if size > MAX_ANSWER_BYTES:
        raise InvalidRequest(
            f"the answer would take {size} bytes, the limit is {MAX_ANSWER_BYTES}: send fewer texts at a time"
            + ("" if asked.base64 else ", or ask for base64")
        )


def _texts(given: str | list[Any], name: str, limits: HttpSettings) -> list[str]:
    if isinstance(given, str):
        return [_text(given, name, limits)]
    if not 1 <= len(given) <= limits.max_embed_texts:
        raise InvalidRequest(f"{name} has {len(given)} texts, expected 1 to {limits.max_embed_texts}")
    return [_text(text, f"{name}[{i}]", limits) for i, text in enumerate(given)]


def _text(text: Any, name: str, limits: HttpSettings) -> str:
    tokens = text if isinstance(text, list) else [text]
    if tokens and all(type(token) is int for token in tokens):
        # LangChain's OpenAIEmbeddings sends tokens of OpenAI's own vocabulary, which mean nothing to another model.
        raise InvalidRequest(
            f"{name} must be a text, got token ids: those of one tokenizer mean nothing to another, so send texts "
            "(in LangChain's OpenAIEmbeddings: check_embedding_ctx_length=False)"
        )
    if not isinstance(text, str):
        raise InvalidRequest(f"{name} must be a text, got {shown(text)}")
    if not text.strip():
        raise InvalidRequest(f"{name} is empty")
    if len(text) > limits.max_embed_chars:
        raise InvalidRequest(
            f"{name} has {len(text)} characters, the limit max_embed_chars is {limits.max_embed_chars}"
        )
    return text


# ------------------------------------------------------------------------------------------------ answers


class OpenAIEmbedding(Struct, frozen=True):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str  # numbers, or base64 of little-endian float32


class _Embedding(Struct, frozen=True):
    """As OpenAIEmbedding, whose numbers are text already."""

    object: Literal["embedding"]
    index: int
    embedding: msgspec.Raw | str


class OpenAIUsage(Struct, frozen=True):
    prompt_tokens: int
    total_tokens: int


class OpenAIAnswer(Struct, frozen=True):
    object: Literal["list"]
    data: list[OpenAIEmbedding]
    model: str
    usage: OpenAIUsage


class OpenAIModel(Struct, frozen=True):
    """OpenAI's fields, and what one wants to know of an encoder."""

    id: str
    object: Literal["model"]
    created: int  # in seconds since 1970; 0, for a name may come to mean another encoder
    owned_by: str
    encoder: str
    dimensions: int
    max_tokens: int  # of a text; what is beyond is cut


class OpenAIModels(Struct, frozen=True):
    object: Literal["list"]
    data: list[OpenAIModel]


def encode_models(models: Mapping[str, EncoderSpec]) -> bytes:
    return msgspec.json.encode(OpenAIModels("list", [_model(name, spec) for name, spec in models.items()]))


def encode_model(name: str, spec: EncoderSpec) -> bytes:
    return msgspec.json.encode(_model(name, spec))


def _model(name: str, spec: EncoderSpec) -> OpenAIModel:
    return OpenAIModel(name, "model", 0, "vecsvc", spec.name, spec.dim, spec.max_tokens)


def encode_openai(embedded: Embedded, *, as_base64: bool) -> bytes:
    rows = np.ascontiguousarray(embedded.vectors, dtype="<f4")
    data = (
        msgspec.json.encode(
            _Embedding(
                "embedding",
                index,
                base64.b64encode(row).decode() if as_base64 else msgspec.Raw(json_vectors.text(row)),
            )
        )
        for index, row in enumerate(rows)
    )
    tokens = sum(embedded.tokens)
    model, usage = msgspec.json.encode(embedded.encoder), msgspec.json.encode(OpenAIUsage(tokens, tokens))
    return b'{"object":"list","data":%b,"model":%b,"usage":%b}' % (_list(data), model, usage)


def encode_tei(embedded: Embedded) -> bytes:
    return _list(map(json_vectors.text, embedded.vectors))


def _list(rows: Iterable[bytes]) -> bytes:
    """A JSON list, made row by row: queries that come meanwhile would wait for the interpreter's lock otherwise."""
    return b"[%b]" % b",".join(rows)


# ------------------------------------------------------------------------------------------------- errors


class OpenAIErrorDetail(Struct, frozen=True):
    message: str
    type: str
    param: str | None  # the field to blame, where it is one
    code: str
    retry_after_ms: int | UnsetType = UNSET  # as in our own errors


class OpenAIErrorAnswer(Struct, frozen=True):
    error: OpenAIErrorDetail


class TeiErrorAnswer(Struct, frozen=True):
    error: str
    error_type: Literal["Unhealthy", "Backend", "Overloaded", "Validation"]
    retry_after_ms: int | UnsetType = UNSET


_PARAM: Final = re.compile(rf"(?:\$\.)?({'|'.join(OpenAIBody.__struct_fields__)})\b")


def error_body(path: str, status: int, code: str, message: str, retry_after_ms: int | None = None) -> bytes:
    """An error in the shape of what the path is like: OpenAI's, TEI's, or ours."""
    retry = UNSET if retry_after_ms is None else retry_after_ms
    if path in (OPENAI_PATH, MODELS_PATH) or path.startswith(f"{MODELS_PATH}/"):
        kind = "rate_limit_error" if status == 429 else "invalid_request_error" if status < 500 else "server_error"
        # Our messages begin with the field that they are about.
        found = _PARAM.match(message)
        param = "model" if code == "model_not_found" else found[1] if found else None
        return msgspec.json.encode(OpenAIErrorAnswer(OpenAIErrorDetail(message, kind, param, code, retry)))
    if path == TEI_PATH or (path.startswith("/indexes/") and path.endswith(TEI_PATH) and path.count("/") == 3):
        known: dict[int, Literal["Unhealthy", "Overloaded"]] = {503: "Unhealthy", 429: "Overloaded"}
        return msgspec.json.encode(
            TeiErrorAnswer(message, known.get(status) or ("Validation" if status < 500 else "Backend"), retry)
        )
    return encode_error(code, message, retry)
