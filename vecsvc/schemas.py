"""Bytes to checked requests, answers to bytes. What passes here is right, and nothing below checks it again.

Malformed bytes raise MalformedRequest (400); well-formed ones that are wrong raise InvalidRequest (422) with a
message that names the place, the value and what would be right. Unknown fields are refused by name.
"""

from __future__ import annotations

import functools
import re
import struct
from collections.abc import Iterator, Mapping
from typing import Any, Final, Literal, TypeVar, get_args, get_type_hints
from urllib.parse import unquote_to_bytes

import msgspec
import numpy as np
from msgspec import UNSET, Struct, UnsetType

from vecsvc import columns, filters, json_vectors
from vecsvc.config import HttpSettings
from vecsvc.errors import MAX_SHOWN, InvalidRequest, MalformedRequest, shown
from vecsvc.types import (
    DEFAULT_K,
    INCLUDES,
    MAX_DIM,
    MAX_SHARDS,
    BatchAnswer,
    ColumnsAnswer,
    Condition,
    Id,
    IdQuery,
    Include,
    Query,
    SearchSettings,
    TextQuery,
    VectorQuery,
    Vectors,
)

T = TypeVar("T")

JSON: Final = "application/json"
BINARY: Final = "application/octet-stream"
ARROW: Final = "application/vnd.apache.arrow.stream"

# Other names of k, which users of other services type first.
K_ALIASES: Final = ("limit", "top_k", "topK")
# Longer texts go by POST: a URL is held in memory whole, before anything in it can be checked.
MAX_URL_TEXT_CHARS: Final = 2000
_BODY_ONLY: Final = ("text", "vector", "id", "texts", "vectors", "filter", "params", "rerank")
MAX_PARAMS: Final = 64
EXPLAINED_BYTES: Final = 1 << 20  # a larger body is not decoded again for the sake of its error message
MAX_KNOWN_PLACES: Final = 256  # of bodies, for which is remembered what may stand there
_UNKNOWN_FIELD: Final = "Object contains unknown field `"
_ESCAPE: Final = re.compile(rb"\\(?:u([0-9a-fA-F]{4})|.)", re.DOTALL)
_STEP: Final = re.compile(r"\.(\w+)")  # of a path in a decoder's error: $.rerank.depth
_WEIGHT: Final = re.compile(r"q\s*=\s*(0(?:\.\d*)?|1(?:\.0*)?)")  # of a media type in an Accept header
_NOTHING: Final[frozenset[str]] = frozenset()


class Base64Vector(Struct, forbid_unknown_fields=True, frozen=True):
    """A vector as base64 of its little-endian float32 bytes."""

    base64: bytes


class RerankBody(Struct, forbid_unknown_fields=True, frozen=True):
    depth: int
    model: Literal["exact"] = "exact"


class CommonBody(Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """The fields that one question and many have in common."""

    k: int | UnsetType = UNSET
    limit: int | UnsetType = UNSET
    top_k: int | UnsetType = UNSET
    topK: int | UnsetType = UNSET
    filter: dict[str, Any] | UnsetType = UNSET
    params: dict[str, Any] | UnsetType = UNSET
    rerank: RerankBody | bool = False
    timeout_ms: float | UnsetType = UNSET
    partial: bool = False
    include: list[Include] | UnsetType = UNSET


class SearchBody(CommonBody, frozen=True, kw_only=True):
    text: str | UnsetType = UNSET
    vector: list[float] | Base64Vector | UnsetType = UNSET
    id: Id | UnsetType = UNSET


class BatchBody(CommonBody, frozen=True, kw_only=True):
    texts: list[str] | UnsetType = UNSET
    vectors: list[list[float] | Base64Vector] | UnsetType = UNSET


class _SearchText(CommonBody, frozen=True, kw_only=True):
    """SearchBody, with the vector's own text left where it is."""

    text: str | UnsetType = UNSET
    vector: msgspec.Raw | UnsetType = UNSET
    id: Id | UnsetType = UNSET


class _BatchText(CommonBody, frozen=True, kw_only=True):
    """BatchBody, in the same way."""

    texts: list[str] | UnsetType = UNSET
    vectors: msgspec.Raw | UnsetType = UNSET


_search_decoder: Final = msgspec.json.Decoder(SearchBody)
_search_text_decoder: Final = msgspec.json.Decoder(_SearchText)
_batch_decoder: Final = msgspec.json.Decoder(BatchBody)
_batch_text_decoder: Final = msgspec.json.Decoder(_BatchText)
_encoder: Final = msgspec.json.Encoder(enc_hook=str)


# ----------------------------------------------------------------------------------------------- requests


def parse_search(body: bytes, limits: HttpSettings) -> tuple[Query, SearchSettings]:
    """A JSON question. Exactly one of `text`, `vector` and `id` must be there."""
    wire = decode(_search_text_decoder, body)
    settings = _settings(wire, limits)
    given = [name for name in ("text", "vector", "id") if getattr(wire, name) is not UNSET]
    if len(given) != 1:
        raise InvalidRequest(f"give exactly one of text, vector and id, got {' and '.join(given) or 'none'}")
    if wire.vector is not UNSET:
        row = json_vectors.vector(wire.vector)
        if row is None:
            row = _vector(decode(_search_decoder, body).vector, "vector")  # type: ignore[arg-type]
        return VectorQuery(_sized(row, "vector")), settings
    if wire.text is not UNSET:
        return TextQuery([_text(wire.text, "text", limits)]), settings
    return IdQuery(_id(wire.id, limits)), settings  # type: ignore[arg-type]


def vector_text(body: bytes) -> bytes | None:
    """The text of a JSON question's vector, as it stands there; None where there is none, or no question."""
    try:
        found = _search_text_decoder.decode(body).vector
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    return bytes(found) if found is not UNSET else None


def parse_batch(body: bytes, limits: HttpSettings) -> tuple[Query, SearchSettings]:
    """A JSON batch. Exactly one of `texts` and `vectors` must be there."""
    wire = decode(_batch_text_decoder, body)
    settings = _settings(wire, limits)
    if (wire.texts is UNSET) == (wire.vectors is UNSET):
        raise InvalidRequest(f"give exactly one of texts and vectors, got {'none' if wire.texts is UNSET else 'both'}")
    if wire.texts is not UNSET:
        _check_batch(len(wire.texts), limits)
        return TextQuery([_text(text, f"texts[{i}]", limits) for i, text in enumerate(wire.texts)]), settings
    matrix = json_vectors.vectors(wire.vectors) if wire.vectors is not UNSET else None
    if matrix is not None:
        _check_batch(len(matrix), limits)
        return VectorQuery(_sized(matrix, "vectors[0]")), settings
    vectors = decode(_batch_decoder, body).vectors
    assert vectors is not UNSET
    _check_batch(len(vectors), limits)
    rows = [_vector(vector, f"vectors[{i}]") for i, vector in enumerate(vectors)]
    for i, row in enumerate(rows):
        if row.shape != rows[0].shape:
            raise InvalidRequest(f"vectors[{i}] has {row.shape[1]} values, vectors[0] has {rows[0].shape[1]}")
    return VectorQuery(np.concatenate(rows)), settings


def parse_binary(body: bytes, dim: int, query: Mapping[str, str], limits: HttpSettings) -> tuple[Query, SearchSettings]:
    """Rows of little-endian float32, with the settings in the URL: `?k=10&ef_search=64`."""
    settings = url_settings(query, limits)
    return raw_batch(body, dim, limits), settings


def raw_batch(body: bytes, dim: int, limits: HttpSettings) -> VectorQuery:
    """The queries of a body of raw vectors."""
    if not body:
        raise InvalidRequest(f"the body is empty, expected rows of {dim} little-endian float32")
    if len(body) % (4 * dim):
        raise InvalidRequest(
            f"the body has {len(body)} bytes, expected a multiple of {4 * dim}: rows of {dim} little-endian float32"
        )
    vectors = rows_of(body, dim)
    _check_batch(len(vectors), limits)
    return VectorQuery(vectors)


def rows_of(body: bytes, dim: int) -> Vectors:
    """The rows (n, dim) where they lie in the body: read-only, and not copied where the machine is little-endian."""
    return np.frombuffer(body, dtype="<f4").reshape(-1, dim).astype(np.float32, copy=False)


def wants_arrow(accept: str) -> bool:
    """Whether an Accept header names Arrow, and weighs it no less than JSON; media types have no case."""
    accept = accept.lower()
    if ARROW not in accept:
        return False
    weights: dict[str, float] = {}
    for part in accept.split(","):
        kind, *parameters = (word.strip() for word in part.split(";"))
        weighed = [found for found in map(_WEIGHT.fullmatch, parameters) if found]
        weights[kind] = float(weighed[0][1]) if weighed else 1.0
    json = next((weights[kind] for kind in (JSON, "application/*", "*/*") if kind in weights), 0.0)
    arrow = weights.get(ARROW, 0.0)
    return arrow > 0.0 and arrow >= json


def check_escapes(query: str) -> None:
    """Refuse the part of a URL behind its ? where it escapes bytes that are no UTF-8, lest others stand for them."""
    if "%" in query:
        try:
            unquote_to_bytes(query).decode()
        except UnicodeDecodeError as error:
            raise MalformedRequest(
                f"the URL escapes bytes that are no UTF-8, %{error.object[error.start]:02X}: send valid Unicode"
            ) from error


def single(query: Mapping[str, str]) -> dict[str, str]:
    """A URL's query; a name that comes twice is refused instead of losing one of its values."""
    found: dict[str, str] = {}
    for name, value in query.items():
        if name in found:
            raise InvalidRequest(f"?{name[:MAX_SHOWN]} is given twice")
        found[name] = value
    return found


def parse_get(query: Mapping[str, str], limits: HttpSettings) -> tuple[Query, SearchSettings]:
    """A question in the URL: `?q=words&k=10`."""
    if "q" not in query:
        raise InvalidRequest("give the text as ?q=...; by an id or a vector ask by POST")
    rest = {name: value for name, value in query.items() if name != "q"}
    if len(query["q"]) > MAX_URL_TEXT_CHARS:
        raise InvalidRequest(
            f"q has {len(query['q'])} characters, the limit is {MAX_URL_TEXT_CHARS}; POST longer texts"
        )
    return TextQuery([_text(query["q"], "q", limits)]), url_settings(rest, limits)


def decode(decoder: msgspec.json.Decoder[T], body: bytes) -> T:
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _explain(error, body, decoder.type) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _malformed(error, body) from error


def _malformed(error: Exception, body: bytes) -> MalformedRequest:
    if not body:
        return MalformedRequest("the body is empty, expected a JSON object")
    why = "it is nested too deep" if isinstance(error, RecursionError) else str(error)
    if isinstance(error, UnicodeDecodeError):  # whose place is one within a text
        try:
            body.decode()
        except UnicodeDecodeError as found:
            return MalformedRequest(f"the body is no JSON: byte {found.start} is no UTF-8: send UTF-8")
    lone = _lone_surrogate(body) if len(body) <= EXPLAINED_BYTES else None
    if lone is not None:
        escape = body[lone : lone + 6].decode()
        return MalformedRequest(f"the body is no JSON: half of a pair, {escape}, at byte {lone}: send valid Unicode")
    if re.search(rb"\b(NaN|Infinity)\b", body):
        why += "; JSON has no NaN and no Infinity, and neither may a vector hold"
    return MalformedRequest(f"the body is no JSON: {why}")


def _lone_surrogate(body: bytes) -> int | None:
    """Where the body escapes half of a UTF-16 pair, which the decoder takes for an end that came too soon."""
    high = None  # where the half of a pair that was just seen begins
    for escape in _ESCAPE.finditer(body):
        code = int(escape[1], 16) if escape[1] else 0
        if high is not None and not (escape.start() == high + 6 and 0xDC00 <= code <= 0xDFFF):
            return high
        if high is None and 0xDC00 <= code <= 0xDFFF:
            return escape.start()
        high = escape.start() if 0xD800 <= code <= 0xDBFF else None
    return high


def _explain(error: msgspec.ValidationError, body: bytes, kind: Any) -> MalformedRequest | InvalidRequest:
    """The decoder says where and what was expected; this adds what is known there, and the value that was found."""
    message, _, path = str(error).rpartition(" - at `")
    unknown = str(error).startswith(_UNKNOWN_FIELD)
    if not message or (unknown and not message.endswith("`")):  # a name that looks like a place is none
        message, path = str(error), ""
    path = path.removesuffix("`")
    if len(body) > EXPLAINED_BYTES:
        return InvalidRequest(f"{path or 'the body'}: {message}")
    try:
        value = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as malformed:
        return _malformed(malformed, body)
    known = _known(kind, tuple(_STEP.findall(path)), unknown)
    message += f"; known are: {known}" if known else ""
    if not path:
        got = f"; the value is {shown(value)}" if not isinstance(value, dict) else ""
        return InvalidRequest(f"the body: {message}{got}")
    try:
        for step in path.removeprefix("$").replace("[", ".").replace("]", "").split(".")[1:]:
            value = value[int(step)] if isinstance(value, list) else value[step]
    except (KeyError, IndexError, ValueError, TypeError):
        return InvalidRequest(f"{path}: {message}")
    return InvalidRequest(f"{path}: {message}; the value is {shown(value)}")


@functools.lru_cache(MAX_KNOWN_PLACES)  # the hints of a type are found anew each time
def _known(kind: Any, names: tuple[str, ...], fields: bool) -> str:
    """The words that a body of that type may have at the place of these names, or the `fields` of the object there."""
    leaves = [*_leaves(kind)]
    for name in names:
        hints = [get_type_hints(leaf) for leaf in leaves if _is_struct(leaf)]
        leaves = [leaf for found in hints if name in found for leaf in _leaves(found[name])]
    if fields:
        return ", ".join(field.name for leaf in leaves if _is_struct(leaf) for field in msgspec.structs.fields(leaf))
    return ", ".join(leaf for leaf in leaves if isinstance(leaf, str))


def _leaves(kind: Any) -> Iterator[Any]:
    """What a type is made of: the members of unions and lists, and the words of literals."""
    inner = get_args(kind)
    if not inner:
        yield kind
    for one in inner:
        yield from _leaves(one)


def _is_struct(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Struct)


def _settings(wire: CommonBody, limits: HttpSettings) -> SearchSettings:
    depth, timeout_ms = None, limits.timeout_ms
    params = _NO_PARAMS
    conditions: tuple[Condition, ...] = ()
    if wire.rerank is not False:
        if wire.rerank is True:
            raise InvalidRequest('rerank must be false or {"depth": n}, got true')
        depth = _between("rerank.depth", wire.rerank.depth, 1, limits.max_depth)
    if wire.params is not UNSET:
        params = _params(wire.params)
    if wire.filter is not UNSET:
        conditions = _conditions(wire.filter, limits)
    if wire.timeout_ms is not UNSET:
        timeout_ms = _timeout(wire.timeout_ms, limits)
    return SearchSettings(
        k=_k(wire, limits),
        conditions=conditions,
        params=params.own,
        exact=params.exact,
        max_visited=params.max_visited,
        probe_shards=params.probe_shards,
        rerank_depth=depth,
        timeout_ms=timeout_ms,
        partial=wire.partial,
        include=frozenset(wire.include) if wire.include is not UNSET else _NOTHING,
    )


def _conditions(filter: Mapping[str, Any], limits: HttpSettings) -> tuple[Condition, ...]:
    try:
        return filters.parse(filter, max_nodes=limits.max_filter_nodes, max_values=limits.max_filter_values)
    except RecursionError as error:  # the decoder just managed it, and showing it in a message did not
        raise MalformedRequest("filter is nested too deep") from error


def _k(wire: CommonBody, limits: HttpSettings) -> int:
    if wire.k is not UNSET and wire.limit is UNSET and wire.top_k is UNSET and wire.topK is UNSET:
        return _between("k", wire.k, 1, limits.max_k)
    given = {name: getattr(wire, name) for name in ("k", *K_ALIASES) if getattr(wire, name) is not UNSET}
    if not given:
        return min(DEFAULT_K, limits.max_k)
    if len(given) > 1:
        raise InvalidRequest(f"{' and '.join(given)} mean the same; give one")
    [(name, value)] = given.items()
    return _between(name, value, 1, limits.max_k)


class _Params(Struct, frozen=True, gc=False):
    """What every kind knows, apart from the settings of its own; those are checked against the index."""

    exact: bool = False
    max_visited: int | None = None
    probe_shards: int | None = None
    own: tuple[tuple[str, int], ...] = ()


_NO_PARAMS: Final = _Params()


def _params(params: Mapping[str, Any]) -> _Params:
    if len(params) > MAX_PARAMS:
        raise InvalidRequest(f"params has {len(params)} settings, no kind knows more than {MAX_PARAMS}")
    exact, max_visited, probe_shards, own = False, None, None, []
    for name, value in params.items():
        if name == "exact":
            if not isinstance(value, bool):
                raise InvalidRequest(f"params.exact must be true or false, got {shown(value)}")
            exact = value
        elif name == "max_visited":
            max_visited = _between("params.max_visited", value, 1, 2**53)
        elif name == "probe_shards":
            probe_shards = _between("params.probe_shards", value, 1, MAX_SHARDS)
        elif type(value) is int:
            own.append((name, value))
        else:
            only = "; only exact is true or false" if isinstance(value, bool) else ""
            raise InvalidRequest(f"params.{name[:MAX_SHOWN]} must be an integer, got {shown(value)}{only}")
    return _Params(exact, max_visited, probe_shards, tuple(own))


def _timeout(timeout_ms: float, limits: HttpSettings) -> float:
    if not 1 <= timeout_ms <= limits.max_timeout_ms:
        raise InvalidRequest(f"timeout_ms must be between 1 and {limits.max_timeout_ms:g}, got {timeout_ms:g}")
    return timeout_ms


def _between(name: str, value: Any, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        raise InvalidRequest(f"{name} must be an integer between {low} and {high}, got {shown(value)}")
    return int(value)


def _vector(wire: list[float] | Base64Vector, name: str) -> Vectors:
    """One row (1, n). Values beyond float32 become infinite here, and are refused with the others by name."""
    if isinstance(wire, Base64Vector):
        if len(wire.base64) % 4:
            raise InvalidRequest(f"{name}.base64 holds {len(wire.base64)} bytes, expected 4 for each value")
        row = np.frombuffer(wire.base64, dtype="<f4").astype(np.float32, copy=False)
    else:
        # Packing is three times as fast as np.array on a list.
        row = np.frombuffer(struct.pack(f"{len(wire)}f", *wire), dtype=np.float32)
    return _sized(row.reshape(1, -1), name)


def _sized(rows: Vectors, name: str) -> Vectors:
    if not 1 <= rows.shape[1] <= MAX_DIM:
        raise InvalidRequest(f"{name} has {rows.shape[1]} values, expected 1 to {MAX_DIM}")
    return rows


def _text(text: str, name: str, limits: HttpSettings) -> str:
    if not text.strip():
        raise InvalidRequest(f"{name} is empty")
    if len(text) > limits.max_text_chars:
        raise InvalidRequest(f"{name} has {len(text)} characters, the limit max_text_chars is {limits.max_text_chars}")
    return text


def _id(id: Id, limits: HttpSettings) -> Id:
    if isinstance(id, str) and len(id.encode()) > limits.max_id_bytes:
        raise InvalidRequest(f"id has {len(id.encode())} bytes, the limit max_id_bytes is {limits.max_id_bytes}")
    if isinstance(id, int) and not -(2**63) <= id < 2**63:
        raise InvalidRequest(f"id must be within int64, got {shown(id)}")
    return id


def _check_batch(n: int, limits: HttpSettings) -> None:
    if not 1 <= n <= limits.max_batch:
        raise InvalidRequest(f"the batch has {n} queries, expected 1 to {limits.max_batch}")


_URL_WORDS: Final = ("k", "timeout_ms", "partial", "include", "exact", "max_visited", "probe_shards")


def url_settings(query: Mapping[str, str], limits: HttpSettings) -> SearchSettings:
    """Settings of a URL: the same words, as text; those that are no words of ours are the kind's own."""
    body: dict[str, Any] = {}
    params: dict[str, Any] = {}
    for name, text in query.items():
        if name in ("k", *K_ALIASES):
            body[name] = _whole(name, text)
        elif name == "timeout_ms":
            body[name] = _number(name, text)
        elif name == "partial":
            body[name] = _flag(name, text)
        elif name == "include":
            body[name] = text.split(",")
            for part in body[name]:
                if part not in INCLUDES:
                    raise InvalidRequest(f"include takes {', '.join(INCLUDES)}, got {shown(part)}")
        elif name == "exact":
            params[name] = _flag(name, text)
        elif name in _BODY_ONLY:
            raise InvalidRequest(f"{name} cannot stand in a URL; POST it as {JSON}")
        elif text.removeprefix("-").isdigit():
            params[name] = _whole(name, text)
        else:
            raise InvalidRequest(
                f"?{name[:MAX_SHOWN]}={shown(text)}: a question knows {', '.join(_URL_WORDS)}, "
                "and other settings are integers of the index's kind"
            )
    return _settings(CommonBody(**body, params=params if params else UNSET), limits)


def _whole(name: str, text: str) -> int:
    if not text.removeprefix("-").isascii() or not text.removeprefix("-").isdigit() or len(text) > 18:
        raise InvalidRequest(f"{name} must be an integer, got {shown(text)}")
    return int(text)


def _number(name: str, text: str) -> float:
    try:
        if not text.isascii() or "_" in text or text != text.strip():
            raise ValueError("only Python would call it a number")
        return float(text)
    except ValueError as error:
        raise InvalidRequest(f"{name} must be a number, got {shown(text)}") from error


def _flag(name: str, text: str) -> bool:
    if text not in ("true", "false"):
        raise InvalidRequest(f"{name} must be true or false, got {shown(text)}")
    return text == "true"


# ------------------------------------------------------------------------------------------------ answers


def encode(answer: Any) -> bytes:
    """JSON. Arrow values that JSON has no word for come as texts."""
    return _encoder.encode(answer)


def encode_arrow(answer: ColumnsAnswer) -> bytes:
    """An Arrow IPC stream with a row per hit: query, rank, id, score, distance.

    The rest of the answer is in the schema's metadata, `vecsvc`, as JSON.
    """
    return columns.stream(answer.results, encode(BatchAnswer([], *msgspec.structs.astuple(answer)[1:])))


class ErrorDetail(Struct, frozen=True, omit_defaults=True):
    code: str
    message: str
    retry_after_ms: int | UnsetType = UNSET  # where it passes: 429 and 503


class ErrorAnswer(Struct, frozen=True):
    error: ErrorDetail


def encode_error(code: str, message: str, retry_after_ms: int | UnsetType = UNSET) -> bytes:
    return _encoder.encode(ErrorAnswer(ErrorDetail(code, message, retry_after_ms)))
