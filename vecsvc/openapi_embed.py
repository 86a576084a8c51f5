"""The part of the OpenAPI document that tells of embeddings, for the encoders that are served."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, get_args

from vecsvc.catalog import models
from vecsvc.config import HttpSettings
from vecsvc.encoders.base import EncoderSpec, Role
from vecsvc.front_door import Described
from vecsvc.schemas import JSON
from vecsvc.schemas_embed import (
    MODELS_PATH,
    OPENAI_PATH,
    PROMPT_NAMES,
    TEI_PATH,
    OpenAIAnswer,
    OpenAIErrorAnswer,
    OpenAIModel,
    OpenAIModels,
    TeiErrorAnswer,
)

ANSWERS: Final = (OpenAIAnswer, OpenAIErrorAnswer, OpenAIModel, OpenAIModels, TeiErrorAnswer)
VECTORS: Final = {"TeiAnswer": {"type": "array", "items": {"type": "array", "items": {"type": "number"}}}}

ERRORS: Final = (400, 404, 408, 413, 415, 422, 429, 500, 503, 504)
_HEADERS: Final = {
    "X-Truncated": {"description": "how many of the texts were cut", "schema": {"type": "integer", "minimum": 0}},
    "Server-Timing": {"description": "milliseconds: read, embed, answer", "schema": {"type": "string"}},
}

Responses = Callable[[str, str], dict[str, Any]]  # (answer's schema, error's schema) -> the responses of an operation


def embed_paths(served: Sequence[Described], settings: HttpSettings, responses: Responses) -> dict[str, Any]:
    """The routes for the encoders that there are; none where there are none."""
    specs = {one.name: one.encoder.spec for one in served if one.encoder is not None}
    if not specs:
        return {}
    named = models(specs, {}, str)
    paths = {OPENAI_PATH: _operation("embeddings", "OpenAI's embeddings", _openai(named, settings), responses)}
    paths[MODELS_PATH] = {
        "get": {
            "operationId": "models",
            "summary": "what `model` may be in /v1/embeddings",
            "responses": responses("OpenAIModels", "OpenAIErrorAnswer"),
        }
    }
    paths[f"{MODELS_PATH}/{{name}}"] = {
        "get": {
            "operationId": "model",
            "summary": "one of them",
            "parameters": [{"name": "name", "in": "path", "required": True, "schema": {"enum": list(named)}}],
            "responses": responses("OpenAIModel", "OpenAIErrorAnswer"),
        }
    }
    if len({spec.fingerprint for spec in specs.values()}) == 1:
        spec = next(iter(specs.values()))
        paths[TEI_PATH] = _operation("embed", "text-embeddings-inference's /embed", _tei(spec, settings), responses)
    for name, spec in specs.items():
        summary = f"text-embeddings-inference's /embed, with the encoder of {name}"
        paths[f"/indexes/{name}{TEI_PATH}"] = _operation(f"embed_{name}", summary, _tei(spec, settings), responses)
    return paths


def _operation(operation: str, summary: str, schema: dict[str, Any], responses: Responses) -> dict[str, Any]:
    openai = operation == "embeddings"
    said = responses(*(("OpenAIAnswer", "OpenAIErrorAnswer") if openai else ("TeiAnswer", "TeiErrorAnswer")))
    said["200"]["headers"] = said["200"]["headers"] | _HEADERS
    return {
        "post": {
            "operationId": operation,
            "summary": summary,
            "requestBody": {"required": True, "content": {JSON: {"schema": schema}}},
            "responses": said,
        }
    }


def _openai(named: dict[str, EncoderSpec], settings: HttpSettings) -> dict[str, Any]:
    """One schema for each encoder: which dimensions there are depends on the model."""
    encoders = {spec.fingerprint: spec for spec in named.values()}
    schemas = []
    for fingerprint, spec in encoders.items():
        names = [name for name, one in named.items() if one.fingerprint == fingerprint]
        schemas.append(
            _closed(
                ["input", "model"],
                {
                    "input": _input(settings),
                    "model": {"enum": names, "description": "an index, or the name of its encoder"},
                    "encoding_format": {"enum": ["float", "base64"], "default": "float"},
                    "dimensions": {"const": spec.dim},
                    "user": {"type": "string", "description": "taken, and not used"},
                    "input_type": {
                        "enum": list(get_args(Role)),
                        "default": "query",
                        "description": "which of the encoder's prompts is put before the texts",
                    },
                },
            )
        )
    return schemas[0] if len(schemas) == 1 else {"oneOf": schemas}


def _tei(spec: EncoderSpec, settings: HttpSettings) -> dict[str, Any]:
    unit: dict[str, Any] = {"const": True} if spec.normalize else {"type": "boolean"}
    return _closed(
        ["inputs"],
        {
            "inputs": _input(settings),
            "normalize": {**unit, "default": True},
            "truncate": {
                "type": ["boolean", "null"],
                "default": False,
                "description": f"where false, a text of more than {spec.max_tokens} tokens is refused with 413",
            },
            "truncation_direction": {"enum": ["Right", "right"], "default": "Right"},
            "prompt_name": {"enum": [*PROMPT_NAMES, None], "default": "query"},
            "dimensions": {"enum": [spec.dim, None]},
        },
    )


def _input(settings: HttpSettings) -> dict[str, Any]:
    text = {"type": "string", "minLength": 1, "maxLength": settings.max_embed_chars, "pattern": r"\S"}
    return {"oneOf": [text, {"type": "array", "items": text, "minItems": 1, "maxItems": settings.max_embed_texts}]}


def _closed(required: list[str], properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
