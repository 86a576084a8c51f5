"""The use case at the front door: the same questions and answers as an engine's, over shards that other nodes hold."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeAlias, TypeVar

import msgspec
import numpy as np

from vecsvc import indexes, remote
from vecsvc.catalog import Served, by_model
from vecsvc.config import RouteSettings
from vecsvc.distance import score
from vecsvc.encoders.base import EncoderSpec, Role
from vecsvc.engine import Clock, Engine, check_question, check_vectors, cut_note, encoder_of
from vecsvc.errors import (
    DeadlineExceeded,
    InvalidParameter,
    InvalidRequest,
    NotReady,
    Overloaded,
    ProtocolError,
    ShardsMissing,
    UnknownId,
    UnknownIndex,
    UnknownParameter,
)
from vecsvc.fan_out import Group
from vecsvc.ids import id_hash
from vecsvc.remote import Ask, EmbeddedTexts, FoundRow, Kind, Part
from vecsvc.router import RoutedVersion, Router
from vecsvc.telemetry import Metrics
from vecsvc.types import (
    INCLUDES,
    BatchAnswer,
    Coverage,
    Embedded,
    Hit,
    Id,
    IdQuery,
    Query,
    SearchAnswer,
    SearchSettings,
    Stats,
    TextQuery,
    VectorQuery,
    Vectors,
)

T = TypeVar("T")

INLINE_HITS: Final = 4000  # more candidates than that are merged in a thread
MERGE_S: Final = 0.02  # of its deadline a question keeps so much back, to merge and answer: at most a tenth of it


class RoutedCatalog:
    """Which version of which index serves, in a front door's eyes."""

    def __init__(self, router: Router) -> None:
        self._router = router

    def names(self) -> list[str]:
        return sorted(self._router.serving)

    def get(self, name: str | None) -> RoutedVersion:
        """As `Catalog.get`. Raises UnknownIndex or NotReady."""
        serving = self._router.serving
        if name is None:
            if len(serving) == 1:
                return next(iter(serving.values()))
            if serving:
                names = ", ".join(f"/indexes/{n}/search" for n in self.names())
                raise UnknownIndex(f"several indexes are served, name one: {names}")
            raise NotReady(f"no index is ready: {self.problem()}")
        if name in serving:
            return serving[name]
        if name in self._router.problems:
            raise NotReady(f"index {name!r} is not ready: {self._router.problems[name]}")
        if not serving:
            raise NotReady(f"no index is ready: {self.problem()}")
        raise UnknownIndex(f"no index {name[:80]!r}; served are: {', '.join(self.names()) or 'none'}")

    def with_encoder(self, model: str | None) -> RoutedVersion:
        """As `Catalog.with_encoder`. Raises UnknownModel or NotReady."""
        serving = self._router.serving
        if not serving or (model is not None and model not in serving and model in self._router.problems):
            raise NotReady(f"no encoder is ready: {self.problem()}")
        specs = {name: one.encoder.spec for name, one in sorted(serving.items()) if one.encoder is not None}
        return serving[by_model(model, specs)]

    def problem(self) -> str:
        return self._router.problem()

    @property
    def problems(self) -> dict[str, str]:
        return self._router.problems

    def gauges(self, metrics: Metrics) -> None:
        for name, version in self._router.serving.items():
            metrics.version_info.labels(name, version.version).set(1)


class FrontDoor:
    """Answers questions from nodes, within admission and deadlines. Belongs to one event loop."""

    def __init__(self, router: Router, settings: RouteSettings, metrics: Metrics) -> None:
        self.catalog = RoutedCatalog(router)
        self._router, self._settings, self._metrics = router, settings, metrics
        self._pool = ThreadPoolExecutor(thread_name_prefix="vecsvc-merge")
        self._in_flight = 0

    @property
    def in_flight(self) -> int:
        return self._in_flight

    def retained(self, name: str | None) -> RoutedVersion:
        return self.catalog.get(name)

    async def in_thread(self, run: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, run)

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    async def search(self, name: str | None, query: Query, settings: SearchSettings) -> SearchAnswer:
        """Answer one question. Raises what errors.py lists under RequestError and ServiceError."""
        a = await self.search_batch(name, query, settings)
        return SearchAnswer(a.results[0], a.took_ms, a.coverage, a.stats, a.index, a.encoder, a.explain)

    async def search_batch(self, name: str | None, query: Query, settings: SearchSettings) -> BatchAnswer:
        """Answer many questions that share their settings."""
        self._admit()
        try:
            clock = Clock(time.perf_counter(), time.monotonic() + settings.timeout_ms / 1e3)
            version = self.catalog.get(name)
            try:
                return await self._answer(version, query, settings, clock)
            except ShardsMissing:
                now = self.catalog.get(version.name)
                if now.digest == version.digest or clock.passed():
                    raise
                # The version went while the question was under way; what serves now answers it whole.
                return await self._answer(now, query, settings, clock)
        finally:
            self._in_flight -= 1

    def _admit(self) -> None:
        if self._in_flight >= self._settings.max_in_flight:
            raise Overloaded(f"{self._settings.max_in_flight} requests are in flight, the limit max_in_flight")
        self._in_flight += 1

    async def _answer(
        self, version: RoutedVersion, query: Query, settings: SearchSettings, clock: Clock
    ) -> BatchAnswer:
        _check(version, query, settings)
        cut: list[int] = []
        own: Id | None = None
        if isinstance(query, TextQuery):
            made = await self._embed(version, query.texts, "query", clock.deadline)
            vectors = _floats(made.vectors).reshape(len(query.texts), -1)
            clock.queue, clock.encode = made.queue_s, made.encode_s
            cut = [at for at, was_cut in enumerate(made.truncated) if was_cut]
        elif isinstance(query, IdQuery):
            own = query.id
            vectors = await self._find(version, own, clock.deadline)
        else:
            vectors = query.vectors
        check_vectors(vectors, version.manifest)
        groups = self._groups(version, vectors, settings, 0 if own is None else 1)
        started = time.perf_counter()
        key = (version.name, settings.exact, settings.k > 100, len(vectors).bit_length())
        # A node that stops at its deadline needs a moment for its answer to arrive, and we need one to merge it.
        kept_s = min(MERGE_S, settings.timeout_ms / 1e4)
        await self._router.call(groups, key, clock.deadline - kept_s, partial=settings.partial)
        merge = _Merge(version, groups, vectors, settings, own)
        if settings.k * len(groups) * len(vectors) > INLINE_HITS:
            hits = await self.in_thread(merge.hits)
        else:
            hits = merge.hits()
        parts: list[Part] = [group.answer for group in groups if group.answer is not None]
        queued = max((part.queue_s for part in parts), default=0.0)
        clock.queue += queued
        clock.rerank = max((part.rerank_s for part in parts), default=0.0)
        clock.search = max(0.0, time.perf_counter() - started - queued - clock.rerank)
        answer = merge.answer(hits, parts, clock, isinstance(query, TextQuery), cut)
        self._metrics.search(version.name, answer.stats.strategy).observe(clock.search)
        if answer.stats.shortfall:
            self._metrics.shortfall(version.name).inc(answer.stats.shortfall)
        if answer.coverage.shards_ok < answer.coverage.shards_total:
            self._router.metrics.partial(version.name).inc()
        return answer

    def _groups(self, version: RoutedVersion, vectors: Vectors, settings: SearchSettings, more: int) -> list[Group]:
        ask = remote.encode_ask(
            Ask(
                index=version.name,
                version=version.version,
                dim=vectors.shape[1],
                vectors=vectors.astype("<f4", copy=False).tobytes(),
                k=settings.k + more,
                conditions=remote.write_conditions(settings.conditions),
                params=list(settings.params),
                exact=settings.exact,
                max_visited=settings.max_visited,
                rerank_depth=settings.rerank_depth,
                include=[name for name in INCLUDES if name in settings.include],
            )
        )
        n, k, dim = len(vectors), settings.k + more, vectors.shape[1]

        def check(part: Part) -> None:
            _check_part(part, n, k, dim, settings)

        def made(shards: tuple[int, ...]) -> Callable[[int, float], bytes]:
            return lambda request, left_ms: remote.search_frame(request, left_ms, shards, ask)

        return [Group(shards, nodes, made(shards), Kind.PART, check) for shards, nodes in version.groups]

    async def _find(self, version: RoutedVersion, id: Id, deadline: float) -> Vectors:
        """The vector of a row (1, dim). Raises UnknownId where every shard that may have it was asked."""
        if isinstance(id, str) != (version.manifest.id_type == "str"):
            raise UnknownId(f"index {version.name!r} has no id {id!r}")
        chosen = version.groups
        if version.manifest.partition == "hash":
            home = id_hash(id) % version.total
            chosen = [group for group in chosen if home in group[0]]
        find = remote.Find(version.name, version.version, id)
        size = 4 * version.manifest.spec.dim

        def check(found: FoundRow) -> None:
            if found.vector is not None and len(found.vector) != size:
                raise ProtocolError(f"a vector of {len(found.vector)} bytes, expected {size}")

        groups = [
            Group(shards, nodes, lambda request, _: remote.message(Kind.FIND, request, find), Kind.FOUND, check)
            for shards, nodes in chosen
        ]
        await self._router.call(groups, "find", deadline)
        for group in groups:
            if group.answer is not None and group.answer.vector is not None:
                return _floats(group.answer.vector).reshape(1, -1)
        raise UnknownId(f"index {version.name!r} has no id {id!r}")

    async def _embed(self, version: RoutedVersion, texts: list[str], role: Role, deadline: float) -> EmbeddedTexts:
        """The vectors of texts, by the encoder of any node that holds the version: once for all shards."""
        spec = encoder_of(version).spec

        def make(request: int, left_ms: float) -> bytes:
            wanted = remote.Embed(version.name, version.version, texts, role, left_ms)
            return remote.message(Kind.EMBED, request, wanted)

        def check(made: EmbeddedTexts) -> None:
            if len(made.vectors) != 4 * spec.dim * len(texts) or not len(made.tokens) == len(made.truncated) == len(
                texts
            ):
                raise ProtocolError(f"embeddings of {len(made.tokens)} texts, expected {len(texts)} of dim {spec.dim}")

        group = Group((), version.nodes(), make, Kind.EMBEDDED, check)
        key = ("embed", version.name, len(texts).bit_length())
        await self._router.call([group], key, deadline)
        made = group.answer
        assert isinstance(made, EmbeddedTexts)
        return made

    async def embed(
        self,
        name: str | None,
        texts: list[str],
        *,
        role: Role,
        timeout_ms: float,
        check: Callable[[EncoderSpec], None] = lambda spec: None,
    ) -> Embedded:
        """As `Engine.embed`."""
        self._admit()
        try:
            version = self.catalog.get(name)
            check(encoder_of(version).spec)
            made = await self._embed(version, texts, role, time.monotonic() + timeout_ms / 1e3)
        finally:
            self._in_flight -= 1
        return Embedded(_floats(made.vectors).reshape(len(texts), -1), made.tokens, made.truncated, made.encoder)


Backend: TypeAlias = Engine | FrontDoor  # whoever answers what came over HTTP
Described: TypeAlias = Served | RoutedVersion  # a version that serves, here or elsewhere


def _floats(data: bytes) -> Vectors:
    return np.frombuffer(data, "<f4").astype(np.float32, copy=False)


def _check(version: RoutedVersion, query: Query, settings: SearchSettings) -> None:
    """Refuse here what every shard would refuse."""
    manifest = version.manifest
    check_question(query, settings, manifest)
    if isinstance(query, VectorQuery):
        check_vectors(query.vectors, manifest)
    elif isinstance(query, TextQuery):
        encoder_of(version)
    if settings.params:
        try:
            indexes.search_params(manifest.spec.kind, **{**manifest.search, **dict(settings.params)})
        except (UnknownParameter, InvalidParameter) as error:
            raise InvalidRequest(f"params: {error}; every kind takes exact and max_visited") from error


def _check_part(part: Part, n: int, k: int, dim: int, settings: SearchSettings) -> None:
    """A node's answer is foreign bytes: what does not fit together is an error of that node."""
    hits = sum(part.counts)
    fits = (
        len(part.counts) == n
        and all(0 <= count <= k for count in part.counts)
        and len(part.distances) == 4 * hits
        and len(part.rows) == 8 * hits
        and len(part.ids) == hits
        and (part.fields is not None and len(part.fields) == hits if "fields" in settings.include else True)
        and (part.vectors is not None and len(part.vectors) == 4 * dim * hits if "vector" in settings.include else True)
    )
    if not fits:
        raise ProtocolError(f"an answer of {hits} hits whose parts do not fit together")


class _Merge:
    """The nodes' parts as one answer: by (distance, corpus row), each row once."""

    def __init__(
        self,
        version: RoutedVersion,
        groups: list[Group],
        vectors: Vectors,
        settings: SearchSettings,
        own: Id | None,
    ) -> None:
        self.version, self.groups, self.vectors, self.settings, self.own = version, groups, vectors, settings, own

    def hits(self) -> list[list[Hit]]:
        parts = [group.answer for group in self.groups if group.answer is not None]
        if not parts:
            return [[] for _ in range(len(self.vectors))]
        opened = [_Opened(part, self.vectors.shape[1]) for part in parts]
        return [self._one([part.take(row) for part in opened]) for row in range(len(self.vectors))]

    def _one(self, parts: list[list[tuple[float, int, Id, _Opened, int]]]) -> list[Hit]:
        k, own = self.settings.k, self.own
        # Each list is in order already, which Python's sort sees. A row near the border of two clusters may come twice.
        candidates = sorted((hit for part in parts for hit in part), key=_order)
        kept: list[tuple[float, int, Id, _Opened, int]] = []
        seen: set[int] = set()
        for hit in candidates:
            if hit[1] not in seen and hit[2] != own:
                kept.append(hit)
                seen.add(hit[1])
                if len(kept) == k:
                    break
        distances = np.array([hit[0] for hit in kept], dtype=np.float32)
        scores = score(distances, self.version.manifest.metric).tolist()
        if not self.settings.include:
            return [Hit(hit[2], points, hit[0]) for hit, points in zip(kept, scores, strict=True)]
        return [
            Hit(id, points, distance, part.fields(at), part.vector(at))
            for (distance, _, id, part, at), points in zip(kept, scores, strict=True)
        ]

    def answer(
        self, hits: list[list[Hit]], parts: list[Part], clock: Clock, was_text: bool, cut: list[int]
    ) -> BatchAnswer:
        version, settings = self.version, self.settings
        degraded = []
        encoder = version.encoder
        if cut and encoder is not None:
            degraded.append(cut_note(cut, len(hits), encoder.spec.max_tokens))
        if any(part.stopped for part in parts):
            degraded.append("the search was cut short")
        errors = [group.error for group in self.groups if group.error is not None]
        if errors and not parts:
            if all(isinstance(error, DeadlineExceeded) for error in errors):
                raise DeadlineExceeded(f"no shard answered within timeout_ms: {errors[0]}")
            raise ShardsMissing(f"no shard of {version.name!r} answered: {errors[0]}")
        degraded += map(str, errors)
        ok = sum(len(group.shards) for group in self.groups if group.answer is not None)
        total = sum(len(group.shards) for group in self.groups)
        strategies = {part.strategy for part in parts}
        visited = [part.visited for part in parts]
        explain = None
        if "explain" in settings.include:
            explain = [one for part in parts for one in part.explain or ()]
        return BatchAnswer(
            hits,
            clock.took_ms(),
            Coverage(ok, total, degraded),
            Stats(
                strategies.pop() if len(strategies) == 1 else "mixed",
                -1 if min(visited) < 0 else sum(visited),
                settings.k * len(hits) - sum(map(len, hits)),
            ),
            version.id,
            encoder.spec.name if was_text and encoder is not None else None,
            sorted(explain, key=lambda one: one.shard) if explain is not None else None,
        )


def _order(hit: tuple[float, int, Id, _Opened, int]) -> tuple[float, int]:
    return hit[0], hit[1]


class _Opened:
    """A part whose bytes are lists, read query by query."""

    def __init__(self, part: Part, dim: int) -> None:
        self._part, self._dim = part, dim
        self._distances: list[float] = np.frombuffer(part.distances, "<f4").tolist()
        self._rows: list[int] = np.frombuffer(part.rows, "<i8").tolist()
        self._starts = [0]
        for count in part.counts:
            self._starts.append(self._starts[-1] + count)

    def take(self, query: int) -> list[tuple[float, int, Id, _Opened, int]]:
        """(distance, row, id, this, place) of each hit."""
        start, end = self._starts[query], self._starts[query + 1]
        return [
            (distance, row, id, self, at)
            for distance, row, id, at in zip(
                self._distances[start:end],
                self._rows[start:end],
                self._part.ids[start:end],
                range(start, end),
                strict=True,
            )
        ]

    def fields(self, at: int) -> Any:
        """The stored fields as the node wrote them, which go into the answer as they are."""
        return msgspec.Raw(self._part.fields[at]) if self._part.fields is not None else None

    def vector(self, at: int) -> list[float] | None:
        if self._part.vectors is None:
            return None
        size = 4 * self._dim
        found: list[float] = np.frombuffer(self._part.vectors[at * size : (at + 1) * size], "<f4").tolist()
        return found
