"""The OpenAPI 3.1 document of a running service: every route, type, bound and error, for the indexes it serves."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, Final

import msgspec
import pyarrow as pa

from vecsvc import __version__, indexes
from vecsvc.catalog import Served
from vecsvc.config import ServeSettings, field_types
from vecsvc.filters import OPERATORS
from vecsvc.indexes.base import module
from vecsvc.schemas import ARROW, BINARY, JSON, ErrorAnswer
from vecsvc.types import DEFAULT_K, INCLUDES, MAX_ABS, BatchAnswer, SearchAnswer

_REF: Final = "#/components/schemas/{name}"

_ERRORS: Final = {
    400: "the bytes are not what they say they are",
    404: "no such index, or no such id",
    408: "the body did not arrive in time",
    413: "the body is too large",
    415: "the body has another type, or is compressed",
    422: "well-formed, but wrong: the message names the value and what would be right",
    429: "too many requests are in flight; try again after Retry-After",
    500: "the service failed",
    503: "not ready; the message says why",
    504: "the deadline passed",
}


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


class IndexDetail(IndexSummary, frozen=True):
    created: str
    params: dict[str, Any]
    search: dict[str, Any]
    certificate: dict[str, Any] | None


class IndexList(msgspec.Struct, frozen=True):
    indexes: list[IndexSummary]


class Status(msgspec.Struct, frozen=True):
    status: str


def index_summary(served: Served) -> IndexSummary:
    return IndexSummary(**_summary(served))


def index_detail(served: Served) -> IndexDetail:
    manifest = served.manifest
    return IndexDetail(
        **_summary(served),
        created=manifest.created,
        params=dict(manifest.spec.params),
        search=manifest.search,
        certificate=msgspec.to_builtins(manifest.certificate),
    )


def _summary(served: Served) -> dict[str, Any]:
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


def document(served: list[Served], settings: ServeSettings) -> dict[str, Any]:
    """What the service takes and answers now. Requests are described for each index: dim, fields, parameters."""
    _, components = msgspec.json.schema_components(
        [SearchAnswer, BatchAnswer, ErrorAnswer, IndexList, IndexDetail, Status], ref_template=_REF
    )
    paths: dict[str, Any] = {
        "/indexes": _get("The indexes that are served", "IndexList", "indexes", [500]),
        "/indexes/{name}": {
            "get": {
                **_get("One index: what it is and what it was measured to do", "IndexDetail", "index", [404, 500, 503])[
                    "get"
                ],
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
        "/livez": _get("200 while the process answers", "Status", "livez", [500]),
        "/readyz": _get("200 where every index serves the version it should", "Status", "readyz", [500, 503]),
        "/openapi.json": {
            "get": {
                "operationId": "openapi",
                "summary": "This document",
                "responses": {"200": {"description": "OpenAPI 3.1", "content": {JSON: {"schema": {"type": "object"}}}}},
            }
        },
    }
    for one in served:
        prefix = f"Search_{one.name}"
        components |= _request_schemas(prefix, one, settings)
        paths |= _search_paths(f"/indexes/{one.name}", prefix, one, settings)
        if len(served) == 1:
            paths |= _search_paths("", prefix, one, settings)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "vecsvc",
            "version": __version__,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {"schemas": components},
    }


def _get(summary: str, answer: str, operation: str, errors: Iterable[int]) -> dict[str, Any]:
    return {"get": {"operationId": operation, "summary": summary, "responses": _responses(answer, errors)}}


def _responses(answer: str, errors: Iterable[int], arrow: bool = False) -> dict[str, Any]:
    content: dict[str, Any] = {JSON: {"schema": {"$ref": _REF.format(name=answer)}}}
    if arrow:
        content[ARROW] = {"schema": {"type": "string", "format": "binary"}}
    error = {JSON: {"schema": {"$ref": _REF.format(name="ErrorAnswer")}}}
    return {
        "200": {"description": "OK", "content": content},
        **{str(status): {"description": _ERRORS[status], "content": error} for status in errors},
    }


def _search_paths(path: str, prefix: str, served: Served, settings: ServeSettings) -> dict[str, Any]:
    name = f"{prefix}_short" if not path else prefix
    dim = served.manifest.spec.dim
    errors = [400, 404, 408, 413, 415, 422, 429, 500, 503, 504]
    single = {
        JSON: {"schema": {"$ref": _REF.format(name=prefix)}},
        BINARY: {"schema": {"type": "string", "format": f"float32-rows-1x{dim}", "contentMediaType": BINARY}},
    }
    batch = {
        JSON: {"schema": {"$ref": _REF.format(name=f"{prefix}_batch")}},
        BINARY: {"schema": {"type": "string", "format": f"float32-rows-{dim}", "contentMediaType": BINARY}},
    }
    paths: dict[str, Any] = {
        f"{path}/search": {
            "post": {
                "operationId": name,
                "summary": f"The rows of {served.name} nearest to a text, a vector or a row",
                "requestBody": {"required": True, "content": single},
                "responses": _responses("SearchAnswer", errors),
            }
        },
        f"{path}/search/batch": {
            "post": {
                "operationId": f"{name}_batch",
                "summary": f"Many questions to {served.name} with the same settings",
                "requestBody": {"required": True, "content": batch},
                "responses": _responses("BatchAnswer", errors, arrow=True),
            }
        },
    }
    if served.encoder is not None:
        paths[f"{path}/search"]["get"] = {
            "operationId": f"{name}_get",
            "summary": f"The rows of {served.name} nearest to a text",
            "parameters": [
                {"name": "q", "in": "query", "required": True, "schema": _text(settings)},
                {"name": "k", "in": "query", "schema": _k(settings)},
                {"name": "timeout_ms", "in": "query", "schema": _timeout(settings)},
                {"name": "partial", "in": "query", "schema": {"type": "boolean"}},
                {"name": "exact", "in": "query", "schema": {"type": "boolean"}},
                *(
                    {"name": name, "in": "query", "schema": schema}
                    for name, schema in _params(served)["properties"].items()
                    if name != "exact"
                ),
            ],
            "responses": _responses("SearchAnswer", [404, 422, 429, 500, 503, 504]),
        }
    return paths


def _request_schemas(prefix: str, served: Served, settings: ServeSettings) -> dict[str, Any]:
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
        "include": {"type": "array", "items": {"enum": list(INCLUDES)}, "default": []},
    }
    filter_schema = _filter(served, settings)
    schemas: dict[str, Any] = {}
    if filter_schema is not None:
        schemas[f"{prefix}_filter"] = filter_schema
        common["filter"] = {"$ref": _REF.format(name=f"{prefix}_filter")}
    vector = _vector(served)
    row_id: dict[str, Any] = (
        {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}
        if served.manifest.id_type == "int"
        else {"type": "string", "maxLength": settings.max_id_bytes // 4}
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


def _vector(served: Served) -> dict[str, Any]:
    spec = served.manifest.spec
    numbers: dict[str, Any] = {
        "type": "array",
        "items": {"type": "number", "minimum": -MAX_ABS, "maximum": MAX_ABS},
        "minItems": spec.dim,
        "maxItems": spec.dim,
    }
    if spec.metric == "cosine":
        numbers["contains"] = {"not": {"const": 0}}
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


def _params(served: Served) -> dict[str, Any]:
    """`exact` and `max_visited`, and the settings of the index's kind with their bounds."""
    cls = module(served.manifest.spec.kind).SearchParams
    properties: dict[str, Any] = {
        "exact": {"type": "boolean", "default": False, "description": "compare with every vector"},
        "max_visited": {"type": "integer", "minimum": 1, "maximum": 2**53, "description": "vectors to compare at most"},
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


def _filter(served: Served, settings: ServeSettings) -> dict[str, Any] | None:
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
    conjunction = {
        "type": "array",
        "items": {"type": "object", "properties": dict(properties), "additionalProperties": False},
        "minItems": 1,
        "maxItems": 4,
    }
    return {"type": "object", "properties": {**properties, "$and": conjunction}, "additionalProperties": False}


def _stored_types(served: Served) -> dict[str, pa.DataType]:
    fields = served.shards[0].fields
    return {field.name: field.type for field in fields.table.schema} if fields is not None else {}


def _operand(kind: pa.DataType) -> dict[str, Any] | None:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_boolean(kind):
        return {"type": "boolean"}
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return {"type": "number"}
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return {"type": "string"}
    if pa.types.is_timestamp(kind):
        return {"type": "string", "format": "date-time"}
    if pa.types.is_date(kind):
        return {"type": "string", "format": "date"}
    return None


def _k(settings: ServeSettings) -> dict[str, Any]:
    return {"type": "integer", "minimum": 1, "maximum": settings.max_k, "default": min(DEFAULT_K, settings.max_k)}


def _timeout(settings: ServeSettings) -> dict[str, Any]:
    return {"type": "number", "minimum": 1, "maximum": settings.max_timeout_ms, "default": settings.timeout_ms}


def _text(settings: ServeSettings) -> dict[str, Any]:
    return {"type": "string", "minLength": 1, "maxLength": settings.max_text_chars, "pattern": r"\S"}
