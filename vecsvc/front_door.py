"""The use case at the front door: the same questions and answers as an engine's, over shards that other nodes hold."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias, TypeVar, cast

import numpy as np

from vecsvc import columns, indexes, remote
from vecsvc.admission import Admission
from vecsvc.asked import Asked
from vecsvc.catalog import MAX_PLANS, Served, by_model, by_name, models
from vecsvc.config import RouteSettings
from vecsvc.encoders.base import EncoderSpec, Role
from vecsvc.engine import Engine
from vecsvc.errors import (
    DeadlineExceeded,
    InvalidParameter,
    NotReady,
    ProtocolError,
    ShardsMissing,
    UnknownId,
    UnknownParameter,
)
from vecsvc.fan_out import Call, Group
from vecsvc.ids import id_hash
from vecsvc.manifest import Manifest
from vecsvc.question import A
from vecsvc.question_checks import (
    INLINE_HITS,
    Clock,
    check_question,
    check_vectors,
    count,
    encoder_of,
    wrong_params,
    wrong_type,
)
from vecsvc.remote import EmbeddedTexts, FoundRow, Kind
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

# What becomes of a question: its answer, or why there is none.
Done: TypeAlias = Callable[[SearchAnswer | Exception], None]


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
        return self._router.serving[by_model(model, self._specs(), self._router.problems, self.problem)]

    def models(self) -> dict[str, EncoderSpec]:
        """As `Catalog.models`. Raises NotReady."""
        return models(self._specs(), self._router.problems, self.problem)

    def _specs(self) -> dict[str, EncoderSpec | None]:
        serving = sorted(self._router.serving.items())
        return {name: one.encoder.spec if one.encoder is not None else None for name, one in serving}

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
        self.router, self.metrics = router, metrics
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
        return _single(await self.search_batch(name, query, settings))

    def search_soon(
        self, name: str | None, query: VectorQuery, settings: SearchSettings, done: Done
    ) -> Callable[[], None] | None:
        """Ask the shards one question by its vector, and return what calls that off.

        Otherwise `done` is called once and later, without a task, with the answer or with the error; it may not raise.
        None where it is not that simple. Raises as `search` does where the shards need not be asked.
        """
        if self.admission.single.full:
            return None
        clock = Clock(time.perf_counter(), time.monotonic() + settings.timeout_ms / 1e3)
        version = self.catalog.get(name)
        _check(version, query, settings)
        soon = _Soon(self, Asked(version, query.vectors, settings, clock), done)
        return soon.stop if soon.begin() else None

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
                moved = self.moved(version, clock)
                if moved is None:
                    raise
                return moved, await self._answer(moved, query, settings, clock)
        finally:
            budget.leave(entered)

    def moved(self, version: RoutedVersion, clock: Clock) -> RoutedVersion | None:
        """What serves now, where the version went while a question was under way, which that answers whole."""
        now = self.router.serving.get(version.name)
        return now if now is not None and now.digest != version.digest and not clock.passed() else None

    async def encoded(
        self, name: str | None, query: Query, settings: SearchSettings, kind: type[A], encode: Callable[[A], bytes]
    ) -> bytes:
        """As `Engine.encoded`."""
        version, a = await self._ask(name, query, settings)

        def make() -> bytes:
            return encode(_as(kind, a, version.manifest))

        long = settings.k * len(a.results) > INLINE_HITS
        return await self.in_thread(make) if long else make()

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
            raise DeadlineExceeded("the deadline passed before the shards were asked; allow more by timeout_ms")
        asked = Asked(version, vectors, settings, clock, own=own, was_text=isinstance(query, TextQuery), cut=cut)
        if asked.is_long_to_route:
            await self.in_thread(asked.find_groups)
        else:
            asked.find_groups()
        await asked.call(self.router).run()
        hits = await self.in_thread(asked.hits) if asked.is_long_to_merge else asked.hits()
        return asked.answer(hits, self.router, self.metrics)

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
            if found.vector is not None and not remote.all_finite(found.vector):
                raise ProtocolError("a vector that is not finite")

        groups = [
            Group(
                version.name,
                shards,
                nodes,
                lambda request, _: remote.message(Kind.FIND, request, find),
                Kind.FOUND,
                version.holders,
                check,
            )
            for shards, nodes in chosen
        ]
        await self.router.call(groups, "find", deadline, partial=True)
        for group in groups:
            if group.answer is not None and group.answer.vector is not None:
                return _floats(group.answer.vector).reshape(1, -1)
        for group in groups:
            error = group.error
            if isinstance(error, ShardsMissing | DeadlineExceeded):
                # `partial` is of no help: without the vector there is nothing to ask the other shards.
                why = f"{error}; id {id!r} may be there, so that its vector is not known"
                raise type(error)(why, retry_after_s=error.retry_after_s) from error
            if error is not None:
                raise error
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
            if not remote.all_finite(made.vectors):
                raise ProtocolError("embeddings that are not finite")

        group = Group(version.name, (), version.nodes(), make, Kind.EMBEDDED, version.holders, check)
        key = ("embed", version.name, len(texts).bit_length())
        # That parts would do is said of what is searched, and there are none of a vector.
        await self.router.call([group], key, deadline, partial=True)
        if group.error is not None:
            raise group.error
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


class _Soon:
    """A question under way without a task, which holds a place in admission until it ends."""

    def __init__(self, door: FrontDoor, asked: Asked, done: Done) -> None:
        self._door, self._asked, self._done = door, asked, done
        self._entered: float | None = None
        self._call: Call | None = None
        self._moved = False  # it was asked again, of another version

    def begin(self) -> bool:
        """Ask the shards; False where that, or the answer, would hold up the event loop. Raises InvalidRequest."""
        if self._asked.is_long_to_route:
            return False
        self._asked.find_groups()
        if self._asked.is_long_to_merge:
            return False
        self._entered = self._door.admission.single.enter()
        try:
            self._go()
        except BaseException:
            self.stop()
            raise
        return True

    def _go(self) -> None:
        self._call = call = self._asked.call(self._door.router)
        call.begin(self._ended)
        if call.finished:
            # No node could be asked. Whoever began this is not to be told before it has begun.
            asyncio.get_running_loop().call_soon(self._ended)

    def _ended(self) -> None:
        """Nothing may be raised from here: it is called where a node's answer arrives."""
        call = self._call
        if call is None:
            return  # called off
        result: SearchAnswer | Exception
        try:
            call.stop()
            try:
                call.end()
                result = _single(self._asked.answer(self._asked.hits(), self._door.router, self._door.metrics))
            except ShardsMissing as error:
                moved = self._door.moved(self._asked.version, self._asked.clock)
                if moved is not None and not self._moved:
                    self._ask_again(moved)
                    return
                result = error
        except Exception as error:
            result = error
        self._leave()
        self._done(result)

    def _ask_again(self, version: RoutedVersion) -> None:
        """Raises what `version` has against the question."""
        self._moved = True
        before = self._asked
        _check(version, VectorQuery(before.vectors), before.settings)
        self._asked = Asked(version, before.vectors, before.settings, before.clock)
        self._asked.find_groups()
        self._go()

    def stop(self) -> None:
        """Nobody waits for the answer any more."""
        if self._call is not None:
            self._call.stop()
        self._leave()

    def _leave(self) -> None:
        self._call = None
        if self._entered is not None:
            self._door.admission.single.leave(self._entered)
            self._entered = None


def _single(a: BatchAnswer) -> SearchAnswer:
    return SearchAnswer(a.results[0], a.took_ms, a.coverage, a.stats, a.index, a.encoder, a.explain)


def _as(kind: type[A], a: BatchAnswer, manifest: Manifest) -> A:
    """The answer in the shape that is asked for."""
    answer: Any = a
    if cast(type, kind) is ColumnsAnswer:
        hits = columns.of_hits(0, a.results, manifest.id_type == "int", manifest.metric)
        answer = ColumnsAnswer([hits], a.took_ms, a.coverage, a.stats, a.index, a.encoder, a.explain)
    return cast(A, answer)


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
