"""The shared words of vecsvc, as types: everything that passes between modules is spelled here."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Final, Literal, TypeAlias, get_args

import msgspec
import numpy as np
from numpy.typing import NDArray

Vectors: TypeAlias = NDArray[np.float32]  # (n, dim), C-contiguous, may be a read-only map
StoredVectors: TypeAlias = NDArray[np.floating[Any]]  # (size, dim) float32 or float16, usually a read-only map
Labels: TypeAlias = NDArray[np.int64]  # positions 0..size-1 inside a shard; -1 where a row is short
Distances: TypeAlias = NDArray[np.float32]  # smaller is closer; +inf where a row is short
Mask: TypeAlias = NDArray[np.bool_]  # (size,), True where a label may be returned, read-only
Metric: TypeAlias = Literal["l2", "ip", "cosine"]
Id: TypeAlias = int | str  # the user's name for a row, unique in an index

METRICS: Final[tuple[Metric, ...]] = get_args(Metric)

# Squared distances of vectors within this bound stay far from the end of float32 (3.4e38) up to MAX_DIM.
MAX_ABS: Final = 1e15
MAX_DIM: Final = 16_384
MAX_SHARDS: Final = 256  # of an index
DEFAULT_K: Final = 10


# How a query was answered: in the kind's own way, or by comparing all that may be returned, by their codes or rounded
# copies ("scan") or by the vectors themselves ("exact"). Kernels write the places.
WAYS: Final = ("own", "scan", "exact")

# What is made once a query is a msgspec struct: it takes a fifth of a frozen dataclass' time.


class Neighbors(msgspec.Struct, frozen=True, gc=False):
    """What a search found: n rows of k places, the closest first; short rows end in -1 at +inf."""

    labels: Labels  # (n, k)
    distances: Distances  # (n, k)
    visited: NDArray[np.int64]  # (n,) how many vectors were compared; -1 where the library does not tell
    stopped: NDArray[np.bool_]  # (n,) True where a Limit cut the search short
    # (n,) at how many places of a graph the neighbours were looked at; None where there is no graph, or it is not told.
    hops: NDArray[np.int64] | None = None
    ways: NDArray[np.uint8] | None = None  # (n,) places in WAYS; None where every query went the kind's own


class Limit(msgspec.Struct, frozen=True, gc=False):
    """Cuts a search short; the answer says so in `stopped`. Kinds that cannot be cut ignore it."""

    max_visited: int | None = None  # vectors compared per query
    deadline: float | None = None  # time.monotonic() seconds

    def expired(self) -> bool:
        return self.deadline is not None and time.monotonic() >= self.deadline


@dataclass(frozen=True, slots=True)
class IndexSpec:
    """What an index is: enough to load it and to explain it."""

    kind: str
    dim: int
    metric: Metric
    size: int
    params: Mapping[str, Any] = field(default_factory=dict)  # what it was built with
    # False where answers carry the distances of compressed codes instead of those of the vectors.
    exact_distances: bool = True


Include: TypeAlias = Literal["fields", "vector", "explain"]
INCLUDES: Final[tuple[Include, ...]] = get_args(Include)


@dataclass(frozen=True, slots=True)
class Condition:
    """One comparison of a stored field: `operator` is one of filters.OPERATORS."""

    field: str
    operator: str
    value: Any


class SearchSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Everything of a question but the question itself, checked."""

    k: int = DEFAULT_K
    conditions: tuple[Condition, ...] = ()  # of the filter; all must hold
    params: tuple[tuple[str, int], ...] = ()  # search settings of the kind; empty for its default
    exact: bool = False  # compare with every vector instead of walking the index
    max_visited: int | None = None
    probe_shards: int | None = None  # ask so many, the nearest ones; None for all
    rerank_depth: int | None = None  # so many candidates get exact distances before the best k are kept
    timeout_ms: float = 2000.0
    partial: bool = False  # answer from the shards that are there
    include: frozenset[str] = frozenset()


class VectorQuery(msgspec.Struct, frozen=True):
    vectors: Vectors  # (n, dim): n questions with the same settings


class TextQuery(msgspec.Struct, frozen=True):
    texts: list[str]


class IdQuery(msgspec.Struct, frozen=True):
    """What is near a row of the index, without that row."""

    id: Id


Query: TypeAlias = VectorQuery | TextQuery | IdQuery


class Embedded(msgspec.Struct, frozen=True):
    """What an encoder made of n texts, in their order."""

    vectors: Vectors  # (n, dim)
    tokens: list[int]  # of each text: what the model read, prompt and special tokens included
    truncated: list[bool]  # True where a text had more than the encoder reads
    encoder: str


# Answers are msgspec structs whose fields are the JSON's: they are made and encoded in C, once per hit.


class Hit(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    id: Id
    score: float  # greater is better
    distance: float  # smaller is closer
    fields: dict[str, Any] | None = None
    vector: list[float] | None = None


class TookMs(msgspec.Struct, frozen=True, gc=False):
    total: float
    queue: float  # waiting for a thread, or for the encoder
    encode: float
    search: float
    rerank: float


class Coverage(msgspec.Struct, frozen=True):
    shards_ok: int
    shards_total: Annotated[
        int, msgspec.Meta(description="shards that were asked: all, or with probe_shards the nearest of some query")
    ]
    degraded: Annotated[
        list[str],
        msgspec.Meta(description="what was missing or cut short: a search, or a text longer than its encoder reads"),
    ]


class Stats(msgspec.Struct, frozen=True, gc=False):
    # How candidates were found: the kind's name, "scan" or "exact" as in WAYS, "mixed" where shards or queries differ.
    strategy: str
    visited: int  # vectors compared; -1 where the library does not tell
    shortfall: int  # places of the k that stayed empty


class ShardExplain(msgspec.Struct, frozen=True):
    """How one shard found its part, on request."""

    shard: int
    size: int
    strategy: str
    params: dict[str, Any]
    allowed: int | None  # rows that the filter leaves; None without a filter
    visited: int
    hops: int  # places of a graph whose neighbours were looked at; -1 where the kind does not tell
    took_ms: float


class ServedIndex(msgspec.Struct, frozen=True):
    name: str
    version: str


class SearchAnswer(msgspec.Struct, frozen=True, omit_defaults=True):
    results: list[Hit]
    took_ms: TookMs
    coverage: Coverage
    stats: Stats
    index: ServedIndex
    encoder: str | None = None  # what encoded the query, where it was a text
    explain: list[ShardExplain] | None = None


class BatchAnswer(msgspec.Struct, frozen=True, omit_defaults=True):
    """`results[i]` are the hits of query i; `stats` sums over the queries."""

    results: list[list[Hit]]
    took_ms: TookMs
    coverage: Coverage
    stats: Stats
    index: ServedIndex
    encoder: str | None = None
    explain: list[ShardExplain] | None = None


class ColumnsAnswer(msgspec.Struct, frozen=True, omit_defaults=True):
    """As BatchAnswer, for those who take columns."""

    results: list[Any]  # HitColumns as columns.py makes them, one behind the other
    took_ms: TookMs
    coverage: Coverage
    stats: Stats
    index: ServedIndex
    encoder: str | None = None
    explain: list[ShardExplain] | None = None
