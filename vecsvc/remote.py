"""The shard protocol: frames for both ends of a front door's connection to a node, and the messages in them.

A frame is a head of 13 bytes (payload length, kind, request id, CRC-32 of the payload; little-endian) and a payload,
which is MessagePack. A question for shards is the length of an Ask, the Ask, the vectors as they are, and at its end
what differs between the nodes that are asked (shard numbers, deadline), so that the rest is encoded and summed once for
all of them. Any number of requests share a connection, and are answered in any order; an answer carries its request's
id. Whoever sees bytes that are no frame closes the connection.
"""

from __future__ import annotations

import functools
import math
import struct
import zlib
from collections.abc import Iterator
from enum import IntEnum
from typing import Annotated, Any, Final, NamedTuple, TypeVar

import msgspec
import numpy as np

from vecsvc import errors
from vecsvc.errors import InternalError, ProtocolError, ServiceError, VecsvcError
from vecsvc.filters import OPERATORS
from vecsvc.types import INCLUDES, MAX_SHARDS, Condition, Id, Include, SearchSettings, ShardExplain, Vectors

T = TypeVar("T")

PROTOCOL: Final = 2  # rises when an older end would not understand
MAX_REQUEST_BYTES: Final = 64 << 20  # a batch of vectors fits by max_body_bytes
MAX_ANSWER_BYTES: Final = 512 << 20  # an answer is bounded by the engine's own limit on its size in memory
MAX_RETRY_S: Final = 3600.0  # a node that tells front doors to come later than that is not believed
MAX_K: Final = 1_000_000  # and of a rerank's depth; what a front door asks stays below by its own limits

FEW_BYTES: Final = 256  # of float32, which are looked at without NumPy
MAX_KNOWN_ASKS: Final = 1024  # what front doors say around their vectors is remembered: they say the same again
MAX_KNOWN_BYTES: Final = 512  # and longer ones are read anew each time

_HEAD: Final = struct.Struct("<IBII")
_LENGTH: Final = struct.Struct("<I")
_ASKED: Final = struct.Struct("<dH")


class Kind(IntEnum):
    """What a frame is. Those below 10 are sent by front doors."""

    HELLO = 1
    SEARCH = 2
    FIND = 3
    EMBED = 4
    DESCRIBE = 5
    CANCEL = 6
    PING = 7
    HOLDINGS = 10
    PART = 11
    FOUND = 12
    EMBEDDED = 13
    DESCRIPTION = 14
    PONG = 15
    FAILED = 16


class _Message(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """A payload: an array of its fields, so that names cost nothing."""


class Hello(_Message, frozen=True):
    protocol: int = PROTOCOL


class Held(_Message, frozen=True):
    """A version of an index that a node can answer from."""

    index: str
    version: str
    digest: str  # of the manifest: two versions of one name are not the same for that
    created: str
    current: bool  # False for a version before, which is kept while front doors still ask it
    shards: list[Annotated[int, msgspec.Meta(ge=0, lt=MAX_SHARDS)]]
    shards_total: Annotated[int, msgspec.Meta(ge=1, le=MAX_SHARDS)]


class Holdings(_Message, frozen=True):
    """What a node holds: the answer to Hello, and sent again whenever it changes."""

    protocol: int
    held: list[Held]
    draining: bool  # it finishes what it has, and wants nothing new
    problem: str  # why the node is not ready; empty where it is


class Ask(_Message, frozen=True):
    """What questions for some shards of a version have in common, apart from their vectors."""

    index: str
    digest: str  # names the version: of its manifest, so that two builds of one name are never taken for each other
    dim: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]
    k: Annotated[int, msgspec.Meta(ge=1, le=MAX_K)]
    conditions: bytes  # JSON, which alone carries numbers of any size; empty for none
    params: list[tuple[str, int]]
    exact: bool
    max_visited: Annotated[int, msgspec.Meta(ge=1, le=1 << 53)] | None
    rerank_depth: Annotated[int, msgspec.Meta(ge=1, le=MAX_K)] | None
    of: Annotated[int, msgspec.Meta(ge=1, le=1 << 32)]  # queries of the whole question, of which these may be a part
    partial: bool  # what was found by the deadline is better than nothing
    include: list[Include]

    @classmethod
    def made(cls, index: str, digest: str, dim: int, settings: SearchSettings, *, k: int, of: int) -> Ask:
        """What `settings` gives back; `k` may be more than that of the settings."""
        return cls(
            index=index,
            digest=digest,
            dim=dim,
            k=k,
            conditions=write_conditions(settings.conditions),
            params=list(settings.params),
            exact=settings.exact,
            max_visited=settings.max_visited,
            rerank_depth=settings.rerank_depth,
            of=of,
            partial=settings.partial,
            include=[name for name in INCLUDES if name in settings.include],
        )

    def settings(self, timeout_ms: float) -> SearchSettings:
        """Raises ProtocolError where the conditions cannot be read."""
        return SearchSettings(
            k=self.k,
            conditions=tuple(Condition(*one) for one in read_conditions(self.conditions)),
            params=tuple(self.params),
            exact=self.exact,
            max_visited=self.max_visited,
            rerank_depth=self.rerank_depth,
            timeout_ms=timeout_ms,
            partial=self.partial,
            include=frozenset(self.include),
        )


class Part(_Message, frozen=True):
    """What some shards of a node found, merged: hits of each query one behind the other, by (distance, corpus row)."""

    counts: list[int]  # hits of each query
    distances: bytes  # float32 of every hit
    rows: bytes  # int64 corpus rows
    ids: list[Id]
    fields: list[bytes] | None  # JSON objects, where they were asked for
    vectors: bytes | None  # float32 rows, where they were asked for
    strategy: str
    visited: int
    stopped: bool
    queue_s: float
    search_s: float
    rerank_s: float
    explain: list[ShardExplain] | None


class Find(_Message, frozen=True):
    """Which vector has this id?"""

    index: str
    digest: str
    id: Id


class FoundRow(_Message, frozen=True):
    vector: bytes | None  # float32; None where this node's shards do not have the id


class Embed(_Message, frozen=True):
    index: str
    digest: str
    texts: list[str]
    role: str
    timeout_ms: float


class EmbeddedTexts(_Message, frozen=True):
    vectors: bytes  # (n, dim) float32
    tokens: list[int]
    truncated: list[bool]
    encoder: str
    queue_s: float
    encode_s: float


class Describe(_Message, frozen=True):
    index: str
    digest: str


class Description(_Message, frozen=True):
    """What a front door needs to know of a version: its manifest without lists of files."""

    manifest: bytes  # JSON
    schema: bytes  # Arrow schema of the stored fields, as an IPC message
    encoder: bytes  # JSON of the EncoderSpec of what encodes its queries; empty where it takes no text
    centroids: bytes | None  # float32 (shards, dim + 1), see nearest_shards; None where a hash spread the rows


class Failed(_Message, frozen=True):
    code: str
    message: str
    retry_after_s: float | None = None  # when it may go better; None where nobody can tell


MESSAGES: Final[dict[Kind, type[Any]]] = {
    Kind.HELLO: Hello,
    Kind.FIND: Find,
    Kind.EMBED: Embed,
    Kind.DESCRIBE: Describe,
    Kind.HOLDINGS: Holdings,
    Kind.PART: Part,
    Kind.FOUND: FoundRow,
    Kind.EMBEDDED: EmbeddedTexts,
    Kind.DESCRIPTION: Description,
    Kind.FAILED: Failed,
}
_SEARCH: Final = Kind.SEARCH
_EMPTY: Final = frozenset((Kind.CANCEL, Kind.PING, Kind.PONG))
_decoders: Final = {kind: msgspec.msgpack.Decoder(message) for kind, message in MESSAGES.items()}
_ask_decoder: Final = msgspec.msgpack.Decoder(Ask)
_Scalar = None | bool | int | float | str
_conditions_decoder: Final = msgspec.json.Decoder(list[tuple[str, str, _Scalar | list[_Scalar]]])
_encoder: Final = msgspec.msgpack.Encoder()


def all_finite(data: bytes) -> bool:
    """Whether these float32, which another process sent, are numbers that can be ranked."""
    if len(data) <= FEW_BYTES:  # too few for what a call of NumPy's costs
        return math.isfinite(sum(struct.unpack(f"<{len(data) // 4}f", data)))  # of float32, so that none overflows
    values = np.frombuffer(data, "<f4")
    # A finite sum of squares answers for all of them at half the price, and is nearly always there.
    return math.isfinite(np.vdot(values, values)) or bool(np.isfinite(values).all())


def frame(kind: Kind, request: int, payload: bytes = b"") -> bytes:
    return _HEAD.pack(len(payload), kind, request, zlib.crc32(payload)) + payload


def message(kind: Kind, request: int, value: Any) -> bytes:
    """A frame that holds the message."""
    return frame(kind, request, _encoder.encode(value))


def encode_ask(ask: Ask) -> bytes:
    """What stands before the vectors, which begin at a multiple of their size."""
    encoded = _encoder.encode(ask)
    return b"".join((_LENGTH.pack(len(encoded)), encoded, bytes(-len(encoded) % 4)))


class Common(NamedTuple):
    """What the payloads of one question have in common, and the checksum of that."""

    data: bytes
    checksum: int

    @classmethod
    def of(cls, ask: bytes, vectors: Vectors) -> Common:
        """`ask` is what `encode_ask` made, for vectors (n, dim)."""
        data = ask + vectors.astype("<f4", copy=False).tobytes()
        return cls(data, zlib.crc32(data))


def search_frame(request: int, timeout_ms: float, shards: tuple[int, ...], asked: Common) -> bytes:
    n = len(shards)
    tail = struct.pack(f"<{n}HdH", *shards, timeout_ms, n)
    size = len(asked.data) + len(tail)
    return b"".join((_HEAD.pack(size, _SEARCH, request, zlib.crc32(tail, asked.checksum)), asked.data, tail))


def write_conditions(conditions: tuple[Condition, ...]) -> bytes:
    return msgspec.json.encode([(c.field, c.operator, c.value) for c in conditions]) if conditions else b""


def read_conditions(data: bytes) -> list[tuple[str, str, Any]]:
    """Raises ProtocolError."""
    if not data:
        return []
    try:
        found = _conditions_decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"a filter that cannot be read: {error}") from error
    for _, operator, value in found:
        if operator not in OPERATORS or (operator == "$in") != isinstance(value, list):
            raise ProtocolError(f"a filter with operator {operator[:80]!r} and a {type(value).__name__}")
    return found


class Question(NamedTuple):
    """What a front door asks."""

    timeout_ms: float  # from now
    shards: tuple[int, ...]
    ask: Ask
    plain: SearchSettings | None  # those of the Ask but for the deadline; None where it has conditions
    vectors: Vectors  # (n, ask.dim), read-only


def decode_search(payload: bytes) -> Question:
    """Raises ProtocolError."""
    try:
        [length] = _LENGTH.unpack_from(payload)
        timeout_ms, n = _ASKED.unpack_from(payload, len(payload) - _ASKED.size)
        if not 1 <= n <= MAX_SHARDS or not 0 < timeout_ms < 1e9:
            raise ProtocolError(f"a question for {n} shards within {timeout_ms:g} ms")
        start = _LENGTH.size + length + -length % 4
        end = len(payload) - _ASKED.size - 2 * n
        if start > end:
            raise ProtocolError(f"a question of {len(payload)} bytes whose parts do not fit into it")
        shards = struct.unpack_from(f"<{n}H", payload, end)
        encoded = payload[_LENGTH.size : _LENGTH.size + length]
        ask, plain = _known_ask(encoded) if length <= MAX_KNOWN_BYTES else _read_ask(encoded)
    except (struct.error, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"a question that cannot be read: {error}") from error
    size = end - start
    if not size or size % (4 * ask.dim):
        raise ProtocolError(f"a question whose {size} bytes are no rows of {ask.dim} float32")
    vectors = np.frombuffer(payload, "<f4", size // 4, start).reshape(-1, ask.dim)
    return Question(timeout_ms, shards, ask, plain, vectors)


def _read_ask(encoded: bytes) -> tuple[Ask, SearchSettings | None]:
    ask = _ask_decoder.decode(encoded)
    return ask, None if ask.conditions else ask.settings(0.0)


_known_ask: Final = functools.lru_cache(MAX_KNOWN_ASKS)(_read_ask)


def decode(kind: Kind, payload: bytes) -> Any:
    """The message of a payload, checked by its type. Raises ProtocolError."""
    if kind in _EMPTY:
        return None
    try:
        return _decoders[kind].decode(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"a {kind.name} that cannot be read: {error}") from error


class Frames:
    """Cuts a stream of bytes into frames; holds what is not whole yet."""

    def __init__(self, kinds: frozenset[Kind], max_bytes: int) -> None:
        self._kinds = {kind.value: kind for kind in kinds}
        self._max_bytes = max_bytes
        self._held = bytearray()
        self._needed = _HEAD.size

    @property
    def held_bytes(self) -> int:
        return len(self._held)

    def feed(self, data: bytes) -> Iterator[tuple[Kind, int, bytes]]:
        """(kind, request id, payload) of each frame that is whole now. Raises ProtocolError."""
        buffer = data
        if self._held:
            self._held += data
            if len(self._held) < self._needed:
                return
            buffer = bytes(self._held)
            self._held.clear()
        at, size = 0, len(buffer)
        while size - at >= _HEAD.size:
            length, number, request, checksum = _HEAD.unpack_from(buffer, at)
            if length > self._max_bytes:
                raise _no_frame(f"a frame of {length} bytes, the limit is {self._max_bytes}", buffer[at:])
            kind = self._kinds.get(number)
            if kind is None:
                raise _no_frame(f"a frame of kind {number}, which nobody sends here", buffer[at:])
            end = at + _HEAD.size + length
            if size < end:
                self._needed = _HEAD.size + length
                break
            payload = buffer[at + _HEAD.size : end]
            if zlib.crc32(payload) != checksum:
                raise ProtocolError("a frame whose checksum is wrong")
            at = end
            yield kind, request, payload
        else:
            self._needed = _HEAD.size
        if at < size:
            self._held += buffer[at:]


_OTHERS: Final = {
    b"\x16\x03": "as TLS does: one side has shard_tls_cert, the other not",
    b"GET ": "as HTTP does, which --port is for",
    b"POST": "as HTTP does, which --port is for",
    b"HTTP": "as an answer over HTTP does: its --shard-port is another",
}


def _no_frame(what: str, sent: bytes) -> ProtocolError:
    """With a word on what the bytes are where they are known."""
    begins = next((words for start, words in _OTHERS.items() if sent.startswith(start)), "")
    return ProtocolError(f"{what}; it begins {begins}" if begins else what)


OF_FRONT_DOORS: Final = frozenset(kind for kind in Kind if kind < Kind.HOLDINGS)
OF_NODES: Final = frozenset(kind for kind in Kind if kind >= Kind.HOLDINGS)


def _tree(cls: type[VecsvcError]) -> Iterator[type[VecsvcError]]:
    yield cls
    for child in cls.__subclasses__():
        yield from _tree(child)


# The class that says what a code means; the one highest in the tree where several share one.
_BY_CODE: Final[dict[str, type[VecsvcError]]] = {}
for _cls in _tree(VecsvcError):
    _BY_CODE.setdefault(_cls.code, _cls)
_BY_CODE["invalid"], _BY_CODE["internal"] = errors.InvalidRequest, InternalError


def failure(error: Exception) -> Failed:
    if isinstance(error, ServiceError):
        return Failed(error.code, str(error), error.retry_after_s)
    if isinstance(error, VecsvcError):
        return Failed(error.code, str(error))
    return Failed(InternalError.code, "the node failed; its log says why")


def raised(failed: Failed) -> VecsvcError:
    """The error that a node met, as the same class here."""
    cls = _BY_CODE.get(failed.code, InternalError)
    error = cls.told(failed.message)
    later = failed.retry_after_s
    if isinstance(error, ServiceError) and later is not None and 0.0 <= later <= MAX_RETRY_S:
        error.retry_after_s = later
    return error
