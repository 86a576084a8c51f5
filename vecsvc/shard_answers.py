"""What a node answers front doors: its shards' parts of a search, rows by id, encoded texts, what a version is."""

from __future__ import annotations

import time
from typing import Any, Final

import msgspec
import numpy as np

from vecsvc import remote, schemas
from vecsvc.catalog import Served
from vecsvc.engine import Engine
from vecsvc.errors import DeadlineExceeded, ProtocolError
from vecsvc.manifest import Manifest
from vecsvc.nearest import Nearest, nearest
from vecsvc.question_checks import INLINE_HITS, encoder_of
from vecsvc.remote import Kind, Part
from vecsvc.shard import Found, Shard
from vecsvc.types import VectorQuery


def part_now(engine: Engine, asked: remote.Question) -> Part | None:
    """The part of a plain question, before anything else happens; None where it takes the long way.

    Errors take it too, so that what is said of them is written once.
    """
    ask, settings = asked.ask, asked.plain
    if settings is None or ask.of != 1 or len(asked.vectors) != 1 or ask.include:
        return None
    try:
        served = _retained(engine, ask.index, ask.digest)
        try:
            shards = served.some(asked.shards)
            deadline = time.monotonic() + asked.timeout_ms / 1e3
            quick = engine.part_now(served, shards, VectorQuery(asked.vectors), settings, deadline)
            return _quick_part(shards[0].spec.kind, *quick) if quick is not None else None
        finally:
            served.release()
    except Exception:
        return None


def _quick_part(kind: str, best: Nearest, visited: int, seconds: float) -> Part:
    """What shards found for one query, in full."""
    return Part(
        counts=[len(best.ids)],
        distances=best.distances.astype("<f4", copy=False).tobytes(),
        rows=best.rows.astype("<i8", copy=False).tobytes(),
        ids=best.ids,
        fields=None,
        vectors=None,
        strategy=kind,
        visited=visited,
        stopped=False,
        queue_s=0.0,
        search_s=seconds,
        rerank_s=0.0,
        explain=None,
    )


async def _search(engine: Engine, asked: remote.Question) -> tuple[Kind, Part]:
    ask, vectors = asked.ask, asked.vectors
    settings = ask.settings(asked.timeout_ms)
    served = _retained(engine, ask.index, ask.digest)
    try:
        shards = served.some(asked.shards)
        search, found, clock = await engine.search_part(served, shards, VectorQuery(vectors), settings, of=ask.of)
        if any(part.stopped for part in found) and clock.passed() and not settings.partial:
            raise DeadlineExceeded("the search was cut short by the deadline")
        # Many hits take long enough to name to hold up the event loop.
        long = settings.k * len(vectors) > INLINE_HITS

        def make() -> Part:
            explain = search.explain(found) if "explain" in settings.include else None
            part = _part(shards, found, len(vectors), settings.k, settings.include)
            return msgspec.structs.replace(
                part, queue_s=clock.queue, search_s=clock.search, rerank_s=clock.rerank, explain=explain
            )

        return Kind.PART, await engine.in_thread(make) if long else make()
    finally:
        served.release()


def _part(shards: list[Shard], found: list[Found], n: int, k: int, include: frozenset[str]) -> Part:
    """The shards' answers merged: hits of each query by (distance, corpus row)."""
    each = [nearest(shards, found, query, k) for query in range(n)]
    fields: list[bytes] | None = [] if "fields" in include else None
    vectors: list[bytes] | None = [] if "vector" in include else None
    for best in each if include else ():
        for at, label in zip(best.which, best.labels, strict=True):
            shard = shards[at]
            if fields is not None:
                fields.append(schemas.encode(shard.fields.of([label])[0] if shard.fields else {}))
            if vectors is not None:
                vectors.append(np.asarray(shard.vectors[label], "<f4").tobytes())
    visited = [part.visited for part in found]
    return Part(
        counts=[len(best.ids) for best in each],
        distances=b"".join(best.distances.astype("<f4", copy=False).tobytes() for best in each),
        rows=b"".join(best.rows.astype("<i8", copy=False).tobytes() for best in each),
        ids=[id for best in each for id in best.ids],
        fields=fields,
        vectors=b"".join(vectors) if vectors is not None else None,
        strategy=found[0].strategy if len({part.strategy for part in found}) == 1 else "mixed",
        visited=-1 if min(visited) < 0 else sum(visited),
        stopped=any(part.stopped for part in found),
        queue_s=0.0,
        search_s=0.0,
        rerank_s=0.0,
        explain=None,
    )


async def _find(engine: Engine, asked: remote.Find) -> tuple[Kind, remote.FoundRow]:
    served = _retained(engine, asked.index, asked.digest)
    try:
        for shard in served.shards:
            label = shard.ids.label(asked.id)
            if label is not None:
                return Kind.FOUND, remote.FoundRow(np.asarray(shard.vectors[label], "<f4").tobytes())
        return Kind.FOUND, remote.FoundRow(None)
    finally:
        served.release()


async def _embed(engine: Engine, asked: remote.Embed) -> tuple[Kind, remote.EmbeddedTexts]:
    budget = engine.admission.of(len(asked.texts))
    entered = budget.enter()
    try:
        served = _retained(engine, asked.index, asked.digest)
        try:
            if asked.role not in ("query", "passage"):
                raise ProtocolError(f"role is {asked.role[:80]!r}, expected query or passage")
            role: Any = asked.role
            encoder = encoder_of(served)
            made = await encoder.encode(asked.texts, role, deadline=time.monotonic() + asked.timeout_ms / 1e3)
        finally:
            served.release()
    finally:
        budget.leave(entered)
    vectors = made.vectors.astype("<f4", copy=False).tobytes()
    return Kind.EMBEDDED, remote.EmbeddedTexts(
        vectors, made.tokens, made.truncated, encoder.spec.name, made.queue_s, made.encode_s
    )


async def _describe(engine: Engine, asked: remote.Describe) -> tuple[Kind, remote.Description]:
    served = _retained(engine, asked.index, asked.digest)
    try:
        return Kind.DESCRIPTION, remote.Description(
            manifest=msgspec.json.encode(_without_files(served.manifest)),
            schema=served.stored.serialize().to_pybytes(),
            encoder=msgspec.json.encode(served.encoder.spec) if served.encoder is not None else b"",
            centroids=served.centroids.astype("<f4", copy=False).tobytes() if served.centroids is not None else None,
        )
    finally:
        served.release()


ANSWERS: Final[dict[Kind, Any]] = {
    Kind.SEARCH: _search,
    Kind.FIND: _find,
    Kind.EMBED: _embed,
    Kind.DESCRIBE: _describe,
}


def _retained(engine: Engine, index: str, digest: str) -> Served:
    """The version, kept open until the caller releases it: let_go may close it in its thread at any time."""
    while not (served := engine.catalog.version(index, digest)).retain():
        pass
    return served


def _without_files(manifest: Manifest) -> Manifest:
    replace = msgspec.structs.replace
    encoder = manifest.encoder
    return replace(
        manifest,
        shards=[replace(shard, files=[]) for shard in manifest.shards],
        encoder=replace(encoder, files=[], canaries=[]) if encoder is not None else None,
    )
