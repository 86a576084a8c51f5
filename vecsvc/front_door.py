"""The use case at the front door: the same questions and answers as an engine's, over shards that other nodes hold."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeAlias, TypeVar

import numpy as np

from vecsvc import indexes, remote
from vecsvc.admission import Admission
from vecsvc.catalog import MAX_PLANS, Served, by_model, by_name
from vecsvc.config import RouteSettings
from vecsvc.encoders.base import EncoderSpec, Role
from vecsvc.engine import Engine
from vecsvc.errors import (
    DeadlineExceeded,
    InvalidParameter,
    InvalidRequest,
    NotReady,
    ProtocolError,
    ShardsMissing,
    UnknownId,
    UnknownParameter,
)
from vecsvc.fan_out import Group
from vecsvc.ids import id_hash
from vecsvc.merging import Merge, check_part
from vecsvc.question import columns_of
from vecsvc.question_checks import (
    Clock,
    check_question,
    check_vectors,
    count,
    encoder_of,
    wrong_params,
    wrong_type,
)
from vecsvc.ranking import nearest_shards, queries_of_shards
from vecsvc.remote import Ask, EmbeddedTexts, FoundRow, Kind, Part
from vecsvc.router import RoutedVersion, Router
from vecsvc.telemetry import Metrics
from vecsvc.types import (
    BatchAnswer,
    ColumnsAnswer,
    Embedded,
    Id,
    IdQuery,
    Query,
    SearchAnswer,
    SearchSettings,
    TextQuery,
    VectorQuery,
    Vectors,
)

T = TypeVar("T")

INLINE_PAIRS: Final = 500  # more queries times centroids are compared in a thread
INLINE_HITS: Final = 4000  # more candidates than that are merged in a thread
SPARE_BYTES: Final = 4096  # of a frame, for the shards that stand before a question
MERGE_S: Final = 0.02  # of its deadline a question keeps so much back, to merge and answer: at most a tenth of it
NODES_SHARE: Final = 0.95  # of what is then left, nodes may search so long, so that what they have arrives in time


class RoutedCatalog:
    """Which version of which index serves, in a front door's eyes."""

    def __init__(self, router: Router) -> None:
        self._router = router

    def names(self) -> list[str]:
        return sorted(self._router.serving)

    def get(self, name: str | None) -> RoutedVersion:
        """As `Catalog.get`. Raises UnknownIndex or NotReady."""
        serving, problems = self._router.serving, self._router.problems
        if not serving and name not in problems:
            raise NotReady(f"no index is ready: {self.problem()}")  # nobody knows yet which there are
        return by_name(name, serving, problems, self.problem)

    def with_encoder(self, model: str | None) -> RoutedVersion:
        """As `Catalog.with_encoder`. Raises UnknownModel or NotReady."""
        serving = self._router.serving
        specs = {name: one.encoder.spec if one.encoder is not None else None for name, one in sorted(serving.items())}
        return serving[by_model(model, specs, self._router.problems, self.problem)]

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
        self._router, self._metrics = router, metrics
        self._pool = ThreadPoolExecutor(thread_name_prefix="vecsvc-merge")
        self.admission = Admission(settings.max_in_flight, settings.max_bulk_in_flight)

    @property
    def in_flight(self) -> int:
        return self.admission.in_flight

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
        return (await self._ask(name, query, settings))[1]

    async def _ask(self, name: str | None, query: Query, settings: SearchSettings) -> tuple[RoutedVersion, BatchAnswer]:
        """The answer, and the version that it is from."""
        budget = self.admission.of(count(query))
        entered = budget.enter()
        try:
            clock = Clock(time.perf_counter(), time.monotonic() + settings.timeout_ms / 1e3)
            version = self.catalog.get(name)
            try:
                return version, await self._answer(version, query, settings, clock)
            except ShardsMissing:
                now = self.catalog.get(version.name)
                if now.digest == version.digest or clock.passed():
                    raise
                # The version went while the question was under way; what serves now answers it whole.
                return now, await self._answer(now, query, settings, clock)
        finally:
            budget.leave(entered)

    async def search_columns(self, name: str | None, query: Query, settings: SearchSettings) -> ColumnsAnswer:
        """Answer many questions with columns over all hits, for those who want no `include`."""
        version, a = await self._ask(name, query, settings)
        columns = columns_of(a.results, 0, version.manifest.id_type == "int", version.manifest.metric)
        return ColumnsAnswer(columns, a.took_ms, a.coverage, a.stats, a.index, a.encoder, a.explain)

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
        if clock.passed():
            raise DeadlineExceeded("the deadline passed before the shards were asked")
        # A row that is asked by its id takes a place that it is not given.
        k = settings.k + (0 if own is None else 1)
        if settings.probe_shards is not None and len(vectors) * version.total > INLINE_PAIRS:
            groups = await self.in_thread(lambda: self._groups(version, vectors, settings, k))
        else:
            groups = self._groups(version, vectors, settings, k)
        started = time.perf_counter()
        key = (version.name, settings.exact, settings.k > 100, len(vectors).bit_length())
        kept_s = min(MERGE_S, settings.timeout_ms / 1e4)
        await self._router.call(groups, key, clock.deadline - kept_s, partial=settings.partial)
        merge = Merge(version, groups, len(vectors), settings, own)
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

    def _groups(self, version: RoutedVersion, vectors: Vectors, settings: SearchSettings, k: int) -> list[Group]:
        """Whom to ask, and for which of the queries."""
        if settings.probe_shards is None or version.centroids is None:
            ask = _encode(version, vectors, settings, k, len(vectors))
            check = functools.partial(check_part, len(vectors), k, vectors.shape[1], settings.include)
            return [Group(version.name, *of, _framed(of[0], ask), Kind.PART, check) for of in version.groups]
        chosen = nearest_shards(vectors, version.centroids, settings.probe_shards, version.manifest.metric)
        nodes_of = {shard: nodes for shards, nodes in version.groups for shard in shards}
        groups = []
        for shard, queries in queries_of_shards(chosen).items():
            mine = vectors[queries]
            ask = _encode(version, mine, settings, k, len(vectors))
            check = functools.partial(check_part, len(mine), k, mine.shape[1], settings.include)
            groups.append(
                Group(
                    version.name,
                    (shard,),
                    nodes_of[shard],
                    _framed((shard,), ask),
                    Kind.PART,
                    check,
                    queries=queries.tolist(),
                )
            )
        return groups

    async def _find(self, version: RoutedVersion, id: Id, deadline: float) -> Vectors:
        """The vector of a row (1, dim). Raises UnknownId where every shard that may have it was asked."""
        if isinstance(id, str) != (version.manifest.id_type == "str"):
            kind = version.manifest.id_type
            raise UnknownId(f"index {version.name!r} has no id {id!r}{wrong_type(id, kind)}")
        chosen = version.groups
        if version.manifest.partition == "hash":
            home = id_hash(id) % version.total
            chosen = [group for group in chosen if home in group[0]]
        find = remote.Find(version.name, version.digest, id)
        size = 4 * version.manifest.spec.dim

        def check(found: FoundRow) -> None:
            if found.vector is not None and len(found.vector) != size:
                raise ProtocolError(f"a vector of {len(found.vector)} bytes, expected {size}")

        groups = [
            Group(
                version.name,
                shards,
                nodes,
                lambda request, _: remote.message(Kind.FIND, request, find),
                Kind.FOUND,
                check,
            )
            for shards, nodes in chosen
        ]
        await self._router.call(groups, "find", deadline, partial=True)
        for group in groups:
            if group.answer is not None and group.answer.vector is not None:
                return _floats(group.answer.vector).reshape(1, -1)
        for group in groups:
            if group.error is not None:
                raise group.error  # it may be there
        raise UnknownId(f"index {version.name!r} has no id {id!r}")

    async def _embed(self, version: RoutedVersion, texts: list[str], role: Role, deadline: float) -> EmbeddedTexts:
        """The vectors of texts, by the encoder of any node that holds the version: once for all shards."""
        spec = encoder_of(version).spec

        def make(request: int, left_ms: float) -> bytes:
            wanted = remote.Embed(version.name, version.digest, texts, role, left_ms)
            return remote.message(Kind.EMBED, request, wanted)

        def check(made: EmbeddedTexts) -> None:
            if len(made.vectors) != 4 * spec.dim * len(texts) or not len(made.tokens) == len(made.truncated) == len(
                texts
            ):
                raise ProtocolError(f"embeddings of {len(made.tokens)} texts, expected {len(texts)} of dim {spec.dim}")

        group = Group(version.name, (), version.nodes(), make, Kind.EMBEDDED, check)
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
        budget = self.admission.of(len(texts))
        entered = budget.enter()
        try:
            version = self.catalog.get(name)
            check(encoder_of(version).spec)
            made = await self._embed(version, texts, role, time.monotonic() + timeout_ms / 1e3)
        finally:
            budget.leave(entered)
        return Embedded(_floats(made.vectors).reshape(len(texts), -1), made.tokens, made.truncated, made.encoder)


def _encode(version: RoutedVersion, vectors: Vectors, settings: SearchSettings, k: int, of: int) -> bytes:
    """Raises InvalidRequest where no node would read so long a question."""
    ask = remote.encode_ask(Ask.made(version.name, version.digest, vectors, settings, k=k, of=of))
    if len(ask) > remote.MAX_REQUEST_BYTES - SPARE_BYTES:
        raise InvalidRequest(
            f"the question has {len(ask)} bytes, nodes take {remote.MAX_REQUEST_BYTES}: send fewer queries at once"
        )
    return ask


def _framed(shards: tuple[int, ...], ask: bytes) -> Callable[[int, float], bytes]:
    return lambda request, left_ms: remote.search_frame(request, left_ms * NODES_SHARE, shards, ask)


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
    if settings.params and settings.params not in version.accepted:
        try:
            indexes.search_params(manifest.spec.kind, **{**manifest.search, **dict(settings.params)})
        except (UnknownParameter, InvalidParameter) as error:
            raise wrong_params(error) from error
        if len(version.accepted) >= MAX_PLANS:
            version.accepted.clear()
        version.accepted.add(settings.params)
