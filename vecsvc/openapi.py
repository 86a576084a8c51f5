"""The OpenAPI 3.1 document of a running service: every route, type, bound and error, for the indexes it serves."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any, Final

import msgspec
import numpy as np
import pyarrow as pa

from vecsvc import __version__, indexes
from vecsvc.access import KEY_HEADER
from vecsvc.config import HttpSettings, field_types
from vecsvc.encoders.base import EncoderSpec
from vecsvc.filters import MAX_DEPTH, OPERATORS
from vecsvc.front_door import Described
from vecsvc.indexes.base import module
from vecsvc.openapi_embed import ANSWERS, ERRORS, VECTORS, embed_paths
from vecsvc.question_checks import MAX_ANSWER_BYTES
from vecsvc.schemas import ARROW, BINARY, JSON, MAX_URL_TEXT_CHARS, ErrorAnswer
from vecsvc.types import DEFAULT_K, INCLUDES, MAX_ABS, MAX_SHARDS, BatchAnswer, SearchAnswer

OPEN_PATHS: Final = ("/livez", "/readyz")  # that never ask for a key
_REF: Final = "#/components/schemas/{name}"

# Settings of the service are named in braces.
_ERRORS: Final = {
    400: "the bytes are not what they say they are",
    401: "no key, or none that holds",
    403: "the key may not do this",
    404: "no such index, model or id",
    408: "the body did not arrive within {body_timeout_s:g} s",
    413: "the body has more than {max_query_bytes} bytes, that of a batch more than {max_body_bytes}; or a text "
    "that may not be cut is too long",
    415: "the body has another type, or is compressed",
    422: "well-formed, but wrong: the message names the value and what would be right",
    429: "the key asks for more than its rate; or {max_in_flight} questions are in flight, or {max_bulk_in_flight} "
    "requests of more than 8, or {max_buffered_bytes} bytes of bodies, or {max_waiting_tokens} tokens wait for an "
    "encoder; see Retry-After",
    500: "the service failed",
    503: "not ready; the message says why",
    504: "the deadline timeout_ms passed; for embeddings that is {embed_timeout_ms:g} ms",
}

_MAX_FLOAT64: Final = 1.7976931348623157e308
_MIN_FLOAT32: Final = 1.401298464324817e-45  # smaller ones become zero
# Values become float32 before they are compared with MAX_ABS, which a little more than it still rounds down to.
_FIRST_TOO_LARGE: Final = float(
    (np.float64(np.float32(MAX_ABS)) + np.float64(np.nextafter(np.float32(MAX_ABS), np.float32(np.inf)))) / 2
)


class _Known(dict[str, Any]):
    """Settings by their names; a front door lacks those of what only its nodes do."""

    def __missing__(self, name: str) -> str:
        return "too many"


class IndexSummary(msgspec.Struct, frozen=True):
    name: str
    version: str
    kind: str
    metric: str
    dim: int
    size: int
    shards: int
    id_type: str
    fields: dict[str, str]
    encoder: str | None


class Encoding(msgspec.Struct, frozen=True):
    """How the encoder of an index reads texts."""

    max_tokens: int  # what is beyond is cut
    pooling: str
    normalize: bool
    prompts: dict[str, str]  # by role, query or passage: put before each text


class IndexDetail(IndexSummary, frozen=True):
    created: str
    params: dict[str, Any]
    search: dict[str, Any]
    certificate: dict[str, Any] | None
    encoding: Encoding | None


class IndexList(msgspec.Struct, frozen=True):
    indexes: list[IndexSummary]


class Status(msgspec.Struct, frozen=True):
    status: str


def index_summary(served: Described) -> IndexSummary:
    return IndexSummary(**_summary(served))


def index_detail(served: Described) -> IndexDetail:
    manifest, encoder = served.manifest, served.encoder
    return IndexDetail(
        **_summary(served),
        created=manifest.created,
        params=dict(manifest.spec.params),
        search=manifest.search,
        certificate=msgspec.to_builtins(manifest.certificate),
        encoding=_encoding(encoder.spec) if encoder is not None else None,
    )


def _encoding(spec: EncoderSpec) -> Encoding:
    return Encoding(spec.max_tokens, spec.pooling, spec.normalize, dict(spec.prompts))


def _summary(served: Described) -> dict[str, Any]:
    manifest = served.manifest
    return {
        "name": served.name,
        "version": served.version,
        "kind": manifest.spec.kind,
        "metric": manifest.spec.metric,
        "dim": manifest.spec.dim,
        "size": manifest.spec.size,
        "shards": len(manifest.shards),
        "id_type": manifest.id_type,
        "fields": manifest.fields,
        "encoder": served.encoder.spec.name if served.encoder else None,
    }


def document(served: Sequence[Described], settings: HttpSettings) -> dict[str, Any]:
    """What the service takes and answers now. Requests are described for each index: dim, fields, parameters."""
    _, components = msgspec.json.schema_components(
        [SearchAnswer, BatchAnswer, ErrorAnswer, IndexList, IndexDetail, Status, *ANSWERS], ref_template=_REF
    )
    paths: dict[str, Any] = {
        "/indexes": {"get": _get("The indexes that are served", "IndexList", "indexes", [500], settings)},
        "/indexes/{name}": {
            "get": {
                **_get("What an index is and was measured to do", "IndexDetail", "index", [404, 500, 503], settings),
                "parameters": [
                    {
                        "name": "name",
                        "in": "path",
                        "required": True,
                        "schema": {"enum": [s.name for s in served] or [""]},
                    }
                ],
            }
        },
        "/livez": {"get": _get("200 while the process answers", "Status", "livez", [500], settings)},
        "/readyz": {
            "get": _get("200 where every index serves the version it should", "Status", "readyz", [500, 503], settings)
        },
        "/openapi.json": {"get": _get("This document, OpenAPI 3.1", "Document", "openapi", [500], settings)},
    }
    components |= {"Document": {"type": "object"}, **VECTORS}
    paths |= embed_paths(served, settings, lambda answer, error: _responses(answer, ERRORS, settings, error_name=error))
    for one in served:
        prefix = f"Search_{one.name}"
        components |= _request_schemas(prefix, one, settings)
        paths |= _search_paths(f"/indexes/{one.name}", prefix, one, settings)
        if len(served) == 1:
            paths |= _search_paths("", prefix, one, settings)
    secured: dict[str, Any] = _secure(paths, settings) if settings.keys else {}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "vecsvc",
            "version": __version__,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {"schemas": components, **secured},
    }


def _secure(paths: dict[str, Any], settings: HttpSettings) -> dict[str, Any]:
    """Say of each operation that it asks for a key, and how it refuses; the two ways to send one."""
    schemes = {
        "bearer": {"type": "http", "scheme": "bearer"},
        "key": {"type": "apiKey", "in": "header", "name": KEY_HEADER},
    }
    for path, operations in paths.items():
        for operation in operations.values():
            operation["security"] = [] if path in OPEN_PATHS else [{name: []} for name in schemes]
            if path not in OPEN_PATHS:
                error = operation["responses"]["500"]["content"][JSON]["schema"]["$ref"].rpartition("/")[2]
                refused = _responses("Status", (401, 403, 429), settings, error_name=error)
                del refused["200"]
                operation["responses"] |= refused
    return {"securitySchemes": schemes}


def _get(summary: str, answer: str, operation: str, errors: Iterable[int], settings: HttpSettings) -> dict[str, Any]:
    return {"operationId": operation, "summary": summary, "responses": _responses(answer, errors, settings)}


def _responses(
    answer: str,
    errors: Iterable[int],
    settings: HttpSettings,
    *,
    arrow: bool = False,
    error_name: str = "ErrorAnswer",
) -> dict[str, Any]:
    content: dict[str, Any] = {JSON: {"schema": {"$ref": _REF.format(name=answer)}}}
    if arrow:
        meaning = "a row per hit: query, rank, id, score, distance; the rest in the schema's metadata `vecsvc`, as JSON"
        content[ARROW] = {"schema": {"type": "string", "format": "binary", "description": meaning}}
    error = {JSON: {"schema": {"$ref": _REF.format(name=error_name)}}}
    request_id = {"X-Request-Id": {"description": "yours, or one of ours", "schema": {"type": "string"}}}
    challenge = {"WWW-Authenticate": {"description": "the scheme, Bearer", "schema": {"type": "string"}}}
    retry = {
        "Retry-After": {"description": "seconds", "schema": {"type": "integer", "minimum": 1}},
        "Retry-After-Ms": {"description": "milliseconds", "schema": {"type": "integer", "minimum": 1}},
    }
    return {
        "200": {"description": "OK", "headers": request_id, "content": content},
        **{
            str(status): {
                "description": _ERRORS[status].format_map(_Known(asdict(settings))),
                "headers": request_id | (retry if status in (429, 503) else challenge if status == 401 else {}),
                "content": error,
            }
            for status in errors
        },
    }


def _search_paths(path: str, prefix: str, served: Described, settings: HttpSettings) -> dict[str, Any]:
    name = f"{prefix}_short" if not path else prefix
    dim = served.manifest.spec.dim
    errors = [400, 404, 408, 413, 415, 422, 429, 500, 503, 504]
    single = {JSON: {"schema": {"$ref": _REF.format(name=prefix)}}, BINARY: _rows(f"1x{dim}", "one row")}
    batch = {
        JSON: {"schema": {"$ref": _REF.format(name=f"{prefix}_batch")}},
        BINARY: _rows(str(dim), f"1 to {settings.max_batch} rows"),
    }
    paths: dict[str, Any] = {
        f"{path}/search": {
            "post": {
                "operationId": name,
                "summary": f"The rows of {served.name} nearest to a text, a vector or a row",
                "requestBody": {"required": True, "content": single},
                "responses": _responses("SearchAnswer", errors, settings),
            }
        },
        f"{path}/search/batch": {
            "post": {
                "operationId": f"{name}_batch",
                "summary": f"Many questions to {served.name} with the same settings",
                "requestBody": {"required": True, "content": batch},
                "responses": _responses("BatchAnswer", errors, settings, arrow=True),
            }
        },
    }
    if served.encoder is not None:
        paths[f"{path}/search"]["get"] = {
            "operationId": f"{name}_get",
            "summary": f"The rows of {served.name} nearest to a text",
            "parameters": [
                {"name": "q", "in": "query", "required": True, "schema": _text(settings, MAX_URL_TEXT_CHARS)},
                {"name": "k", "in": "query", "schema": _k(settings)},
                {"name": "timeout_ms", "in": "query", "schema": _timeout(settings)},
                {"name": "partial", "in": "query", "schema": {"type": "boolean"}},
                {
                    "name": "include",
                    "in": "query",
                    "style": "form",
                    "explode": False,
                    "schema": {"type": "array", "items": {"enum": list(INCLUDES)}, "minItems": 1},
                },
                {"name": "exact", "in": "query", "schema": {"type": "boolean"}},
                *(
                    {"name": name, "in": "query", "schema": schema}
                    for name, schema in _params(served)["properties"].items()
                    if name != "exact"
                ),
            ],
            "responses": _responses("SearchAnswer", [404, 422, 429, 500, 503, 504], settings),
        }
    return paths


def _rows(shape: str, what: str) -> dict[str, Any]:
    meaning = f"{what} of little-endian float32; the settings stand in the URL: ?k=10&timeout_ms=50&exact=true"
    return {
        "schema": {
            "type": "string",
            "format": f"float32-rows-{shape}",
            "contentMediaType": BINARY,
            "description": meaning,
        }
    }


def _request_schemas(prefix: str, served: Described, settings: HttpSettings) -> dict[str, Any]:
    """One schema a way to ask: exactly one of text, vector and id, so each closes its own list of fields."""
    common: dict[str, Any] = {
        "k": {**_k(settings), "description": "how many rows; limit, top_k and topK are other names of it"},
        "params": _params(served),
        "rerank": {
            "oneOf": [
                {"const": False},
                {
                    "type": "object",
                    "properties": {
                        "depth": {"type": "integer", "minimum": 1, "maximum": settings.max_depth},
                        "model": {"const": "exact"},
                    },
                    "required": ["depth"],
                    "additionalProperties": False,
                },
            ],
            "default": False,
        },
        "timeout_ms": _timeout(settings),
        "partial": {"type": "boolean", "default": False},
        "include": {
            "type": "array",
            "items": {"enum": list(INCLUDES)},
            "default": [],
            "description": f"answers that may take more than {MAX_ANSWER_BYTES} bytes in memory are refused beforehand",
        },
    }
    schemas: dict[str, Any] = {}
    ref = _REF.format(name=f"{prefix}_filter")
    filter_schema = _filter(ref, served, settings)
    if filter_schema is not None:
        schemas[f"{prefix}_filter"] = filter_schema
        common["filter"] = {"$ref": ref}
    vector = _vector(served)
    row_id: dict[str, Any] = (
        {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}
        if served.manifest.id_type == "int"
        else {
            "type": "string",
            "maxLength": settings.max_id_bytes,
            "description": f"at most {settings.max_id_bytes} bytes of UTF-8",
        }
    )
    single = {"vector": vector, "id": row_id}
    batch = {"vectors": {"type": "array", "items": vector, "minItems": 1, "maxItems": settings.max_batch}}
    if served.encoder is not None:
        single["text"] = _text(settings)
        batch["texts"] = {"type": "array", "items": _text(settings), "minItems": 1, "maxItems": settings.max_batch}
    schemas[prefix] = {"oneOf": [_closed(name, schema, common) for name, schema in single.items()]}
    schemas[f"{prefix}_batch"] = {"oneOf": [_closed(name, schema, common) for name, schema in batch.items()]}
    return schemas


def _closed(name: str, schema: dict[str, Any], common: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {name: schema, **common},
        "required": [name],
        "additionalProperties": False,
    }


def _vector(served: Described) -> dict[str, Any]:
    spec = served.manifest.spec
    numbers: dict[str, Any] = {
        "type": "array",
        "items": {"type": "number", "exclusiveMinimum": -_FIRST_TOO_LARGE, "exclusiveMaximum": _FIRST_TOO_LARGE},
        "minItems": spec.dim,
        "maxItems": spec.dim,
    }
    if spec.metric == "cosine":
        numbers["contains"] = {"anyOf": [{"minimum": _MIN_FLOAT32}, {"maximum": -_MIN_FLOAT32}]}
        numbers["description"] = "not all zeros, which would have no direction"
    encoded = {
        "type": "object",
        "properties": {
            "base64": {"type": "string", "format": f"float32-base64-{spec.dim}", "contentEncoding": "base64"}
        },
        "required": ["base64"],
        "additionalProperties": False,
    }
    return {"oneOf": [numbers, encoded]}


def _params(served: Described) -> dict[str, Any]:
    """What every kind takes, and the settings of the index's kind with their bounds."""
    cls = module(served.manifest.spec.kind).SearchParams
    properties: dict[str, Any] = {
        "exact": {"type": "boolean", "default": False, "description": "compare with every vector"},
        "max_visited": {"type": "integer", "minimum": 1, "maximum": 2**53, "description": "vectors to compare at most"},
    }
    if served.centroids is not None:
        properties["probe_shards"] = {
            "type": "integer",
            "minimum": 1,
            "maximum": MAX_SHARDS,
            "description": "ask so many shards, those nearest to the query; all of them unless it is given",
        }
    defaults = {**indexes.params_dict(cls()), **served.manifest.search}
    for field in dataclasses.fields(cls):
        schema: dict[str, Any] = {"type": "integer", "description": field.metadata.get("meaning", "")}
        if field_types(cls)[field.name] is not int:
            continue
        for bound, word in (("low", "minimum"), ("high", "maximum")):
            if field.metadata.get(bound) is not None:
                schema[word] = int(field.metadata[bound])
        if field.name in defaults:
            schema["default"] = defaults[field.name]
        properties[field.name] = schema
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _filter(ref: str, served: Described, settings: HttpSettings) -> dict[str, Any] | None:
    """Conditions on the stored fields; None where nothing is stored that could be compared."""
    properties: dict[str, Any] = {}
    for name, column in _stored_types(served).items():
        operand = _operand(column)
        if operand is not None:
            operators: dict[str, Any] = {operator: operand for operator in OPERATORS if operator != "$in"}
            operators["$in"] = {"type": "array", "items": operand, "maxItems": settings.max_filter_values}
            conditions = {
                "type": "object",
                "properties": operators,
                "additionalProperties": False,
                "minProperties": 1,
            }
            properties[name] = {"oneOf": [operand, conditions]}
    if not properties:
        return None
    # JSON Schema cannot count across levels, so these two bounds stand in words.
    bounds = f"at most {settings.max_filter_nodes} conditions in all, and {MAX_DEPTH} levels of $and"
    conjunction = {"type": "array", "items": {"$ref": ref}, "minItems": 1}
    return {
        "type": "object",
        "properties": {**properties, "$and": conjunction},
        "additionalProperties": False,
        "description": f"all must hold; {bounds}",
    }


def _stored_types(served: Described) -> dict[str, pa.DataType]:
    return {field.name: field.type for field in served.stored}


def _operand(kind: pa.DataType) -> dict[str, Any] | None:
    """What a stored value is compared with: the same words as in an answer's fields."""
    types = pa.types
    if types.is_dictionary(kind):
        kind = kind.value_type
    if types.is_boolean(kind):
        return {"type": "boolean"}
    if types.is_integer(kind):
        return {"type": "number"}
    if types.is_floating(kind) or types.is_decimal(kind):
        return {"type": "number", "minimum": -_MAX_FLOAT64, "maximum": _MAX_FLOAT64}
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return {"type": "string"}
    if types.is_date(kind):
        return {"type": "string", "format": "date"}
    if types.is_timestamp(kind) and kind.tz is not None:
        return {"type": "string", "format": "date-time", "description": f"in {kind.unit} at the finest"}
    if types.is_timestamp(kind):
        return {"type": "string", "format": "date-time-local", "description": f"in {kind.unit}, without an offset"}
    if types.is_time(kind):
        return {"type": "string", "format": "time-local", "description": f"in {kind.unit} at the finest"}
    return None


def _k(settings: HttpSettings) -> dict[str, Any]:
    return {"type": "integer", "minimum": 1, "maximum": settings.max_k, "default": min(DEFAULT_K, settings.max_k)}


def _timeout(settings: HttpSettings) -> dict[str, Any]:
    return {"type": "number", "minimum": 1, "maximum": settings.max_timeout_ms, "default": settings.timeout_ms}


def _text(settings: HttpSettings, most: int | None = None) -> dict[str, Any]:
    longest = min(settings.max_text_chars, most or settings.max_text_chars)
    return {"type": "string", "minLength": 1, "maxLength": longest, "pattern": r"\S"}
