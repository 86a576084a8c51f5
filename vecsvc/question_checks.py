"""What is checked of a question before anything is searched for, and what is kept of it on its way."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Final, Protocol, TypeVar

import numpy as np

from vecsvc.catalog import Plan, Served
from vecsvc.distance import check_vector
from vecsvc.errors import DimensionMismatch, InvalidParameter, InvalidRequest, UnknownParameter, listed
from vecsvc.manifest import Manifest
from vecsvc.types import MAX_ABS, Id, Query, SearchSettings, TextQuery, TookMs, VectorQuery, Vectors

E = TypeVar("E", covariant=True)

# What an answer may take in memory, by estimate: a hit, a stored field of it, and a value of its vector.
MAX_ANSWER_BYTES: Final = 1 << 28
_HIT_BYTES: Final = 256
_FIELD_BYTES: Final = 256
_VALUE_BYTES: Final = 32
INLINE_HITS: Final = 10_000  # longer answers are encoded in a thread
MAX_CANDIDATES: Final = 100_000  # of one query: k or rerank.depth, times k_factor


class HasEncoder(Protocol[E]):
    """A version of an index, here or elsewhere, that may take texts."""

    @property
    def name(self) -> str: ...
    @property
    def encoder(self) -> E | None: ...


@dataclass(slots=True)
class Clock:
    """Where the time of one question went, in seconds."""

    started: float  # time.perf_counter()
    deadline: float  # time.monotonic()
    queue: float = 0.0
    encode: float = 0.0
    search: float = 0.0
    rerank: float = 0.0

    def passed(self) -> bool:
        return time.monotonic() >= self.deadline

    def took_ms(self) -> TookMs:
        total = time.perf_counter() - self.started
        return TookMs(*map(milliseconds, (total, self.queue, self.encode, self.search, self.rerank)))


def count(query: Query) -> int:
    """How many questions there are in one."""
    if isinstance(query, VectorQuery):
        return len(query.vectors)
    return len(query.texts) if isinstance(query, TextQuery) else 1


def encoder_of(served: HasEncoder[E]) -> E:
    """What encodes the texts of an index. Raises InvalidRequest where nothing does."""
    if served.encoder is None:
        raise InvalidRequest(
            f"index {served.name!r} has no encoder, so it takes a vector or an id, no text: "
            "build it with --encoder, or serve with --encoder"
        )
    return served.encoder


def wrong_type(id: Id, kind: str) -> str:
    """What may be wrong with an id that is not found; "" where it is of the right type."""
    if isinstance(id, str) == (kind == "str"):
        return ""
    return ": its ids are texts, this is an integer" if kind == "str" else ": its ids are integers, this is a text"


def cut_note(cut: list[int], texts: int, max_tokens: int) -> str:
    if texts == 1:
        return f"the text was cut at {max_tokens} tokens"
    return f"cut at {max_tokens} tokens: texts {listed(cut)}"


def milliseconds(seconds: float) -> float:
    """To the microsecond, in a tenth of the time of round()."""
    return int(seconds * 1e6) / 1e3


def plan_of(served: Served, settings: SearchSettings, shards: int | None = None) -> Plan:
    """As `Served.plan`. Raises InvalidRequest where the kind does not know these settings."""
    try:
        return served.plan(settings, shards)
    except (UnknownParameter, InvalidParameter) as error:
        raise wrong_params(error) from error


def check_question(query: Query, settings: SearchSettings, manifest: Manifest) -> None:
    """Refuse a question that no shard of the index could answer, or whose answer would be too large."""
    if settings.probe_shards is not None and manifest.clusters is None:
        raise InvalidRequest(
            f"params.probe_shards is {settings.probe_shards}, and a hash spread the rows of index {manifest.name!r}, "
            "so that every shard has a part of every answer: leave it out, or build with --partition cluster"
        )
    for condition in settings.conditions:
        if condition.field not in manifest.fields:
            stored = ", ".join(manifest.fields) or "none"
            raise InvalidRequest(
                f"filter: {condition.field!r} is no stored field of {manifest.name!r}: {stored}; "
                "build-index --fields says which are"
            )
    hits = settings.k * count(query)
    hit_bytes = _HIT_BYTES
    if settings.include:
        if "fields" in settings.include:
            hit_bytes += _FIELD_BYTES * len(manifest.fields)
        if "vector" in settings.include:
            hit_bytes += _VALUE_BYTES * manifest.spec.dim
    if hits * hit_bytes > MAX_ANSWER_BYTES:
        raise InvalidRequest(
            f"the answer may have {hits} hits of some {hit_bytes} bytes, the limit is {MAX_ANSWER_BYTES} bytes: "
            "ask for a smaller k, fewer queries, or less in include"
        )
    wide = max(settings.k, settings.rerank_depth or 0) * (dict(settings.params).get("k_factor") or 1)
    if wide > MAX_CANDIDATES:
        raise InvalidRequest(f"k or rerank.depth times k_factor is {wide}, the limit is {MAX_CANDIDATES} candidates")


def check_vectors(vectors: Vectors, manifest: Manifest) -> None:
    """Refuse what the index cannot rank: another dimension, or values that no metric can."""
    check_dim(vectors, manifest)
    check_values(vectors, manifest)


def check_dim(vectors: Vectors, manifest: Manifest) -> None:
    spec = manifest.spec
    if vectors.shape[1] != spec.dim:
        raise DimensionMismatch(f"the vector has {vectors.shape[1]} values, index {manifest.name!r} has dim {spec.dim}")


def check_values(vectors: Vectors, manifest: Manifest) -> None:
    metric = manifest.spec.metric
    if len(vectors) == 1:
        check_vector(vectors[0], metric)
        return
    # Sums of squares within these bounds answer every question at once, as in check_vector: that of all vectors where
    # each shows at its first value that it is not zero, else that of each.
    if 0.0 < np.vdot(vectors, vectors) <= MAX_ABS and np.count_nonzero(vectors[:, 0]) == len(vectors):
        return
    squares = np.einsum("ij,ij->i", vectors, vectors)
    for row in np.flatnonzero(~((squares > 0.0) & (squares <= MAX_ABS))).tolist():
        check_vector(vectors[row], metric, f"vectors[{row}]")


def wrong_params(error: Exception) -> InvalidRequest:
    """What the kind of the index says of search settings, with those that every kind knows."""
    return InvalidRequest(f"params: {error}; every kind takes exact, max_visited and probe_shards")
