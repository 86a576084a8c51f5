"""The use case: a question in, an answer out. Encode, recall from every shard, merge, name the ids."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar

import msgspec
import numpy as np

from vecsvc import indexes
from vecsvc.admission import Admission, Budget
from vecsvc.catalog import Catalog, Plan, Served
from vecsvc.config import ServeSettings
from vecsvc.distance import check_vector, score
from vecsvc.encoders.base import EncoderSpec, Role
from vecsvc.errors import (
    DeadlineExceeded,
    DimensionMismatch,
    InvalidParameter,
    InvalidRequest,
    ShardsMissing,
    UnknownId,
    UnknownParameter,
    listed,
)
from vecsvc.manifest import Manifest
from vecsvc.ranking import merge_top_k, nearest_shards, queries_of_shards
from vecsvc.shard import Found, Shard, placed
from vecsvc.telemetry import Metrics
from vecsvc.types import (
    BatchAnswer,
    Coverage,
    Embedded,
    Hit,
    IdQuery,
    Limit,
    Query,
    SearchAnswer,
    SearchSettings,
    ShardExplain,
    Stats,
    TextQuery,
    TookMs,
    VectorQuery,
    Vectors,
)

T = TypeVar("T")
E = TypeVar("E", covariant=True)


class HasEncoder(Protocol[E]):
    """A version of an index, here or elsewhere, that may take texts."""

    @property
    def name(self) -> str: ...
    @property
    def encoder(self) -> E | None: ...


# Who takes a part of the answer waits so much beyond the deadline for the search to notice it and stop.
PARTIAL_GRACE_S: Final = 0.05
# What an answer may take in memory, by estimate: a hit, a stored field of it, and a value of its vector.
MAX_ANSWER_BYTES: Final = 1 << 28
_HIT_BYTES: Final = 256
_FIELD_BYTES: Final = 256
_VALUE_BYTES: Final = 32
SLICE: Final = 64  # queries of a batch between two looks at the deadline
MAX_CANDIDATES: Final = 100_000  # of one query: k or rerank.depth, times k_factor


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
        return TookMs(_ms(total), _ms(self.queue), _ms(self.encode), _ms(self.search), _ms(self.rerank))


class Engine:
    """Answers questions from a catalog, within admission and deadlines. Belongs to one event loop."""

    def __init__(self, catalog: Catalog, settings: ServeSettings, metrics: Metrics, threads: int) -> None:
        self.catalog = catalog
        self._settings = settings
        self._metrics = metrics
        self._threads = threads
        self.admission = Admission(settings.max_in_flight, settings.max_bulk_in_flight)
        self._pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="vecsvc-search")
        # Bulk waits for threads of its own, so that no question waits behind it; the cores are shared by the system.
        self._bulk_pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="vecsvc-bulk")
        self._inline_s = settings.inline_ms / 1e3

    async def search(self, name: str | None, query: Query, settings: SearchSettings) -> SearchAnswer:
        """Answer one question. Raises what errors.py lists under RequestError and ServiceError."""
        a = await self.search_batch(name, query, settings)
        return SearchAnswer(a.results[0], a.took_ms, a.coverage, a.stats, a.index, a.encoder, a.explain)

    async def search_batch(self, name: str | None, query: Query, settings: SearchSettings) -> BatchAnswer:
        """Answer many questions that share their settings."""
        clock = Clock(time.perf_counter(), time.monotonic() + settings.timeout_ms / 1e3)
        budget = self.admission.of(count(query))
        budget.check()
        served = self.retained(name)
        # From here on `work` owns both until it ends: a caller whose deadline passes leaves a search behind
        # in its thread, and that still counts, and still reads the index.
        work = _Work(budget, served)
        try:
            search = _Search(served, query, settings, clock, self._threads_for(budget))
            if isinstance(query, TextQuery):
                await search.encode(query.texts)
            measurable, seconds = search.measurable, search.plan.seconds
            # A hop to a thread and back costs more than a search of a graph; a long search in the event loop
            # costs everybody. So a question goes to a thread until its like was measured to be short.
            if measurable and seconds is not None and seconds <= self._inline_s:
                answer = search.run()
            else:
                answer = await self._in_thread(work, search.run, clock, PARTIAL_GRACE_S if settings.partial else 0.0)
            if measurable:
                search.plan.learn(clock.search + clock.rerank)
        finally:
            work.leave()
        stats = answer.stats
        self._metrics.search(served.name, stats.strategy).observe(clock.search)
        if stats.shortfall:
            self._metrics.shortfall(served.name).inc(stats.shortfall)
        return answer

    async def search_part(
        self, served: Served, shards: list[Shard], query: VectorQuery, settings: SearchSettings
    ) -> tuple[_Search, list[Found], Clock]:
        """What some shards of a version find, for a front door that merges it with what others do.

        The caller has retained `served`, and releases it. What comes back is read while that is so.
        """
        clock = Clock(time.perf_counter(), time.monotonic() + settings.timeout_ms / 1e3)
        budget = self.admission.of(count(query))
        budget.check()
        served.retain()
        work = _Work(budget, served)
        try:
            search = _Search(served, query, settings, clock, self._threads_for(budget), shards)
            seconds = search.plan.seconds
            if search.measurable and seconds is not None and seconds <= self._inline_s:
                found = search.find()
            else:
                found = await self._in_thread(work, search.find, clock, 0.0)
            if search.measurable:
                search.plan.learn(clock.search + clock.rerank)
        finally:
            work.leave()
        self._metrics.search(served.name, found[0].strategy).observe(clock.search)
        return search, found, clock

    async def embed(
        self,
        name: str | None,
        texts: list[str],
        *,
        role: Role,
        timeout_ms: float,
        check: Callable[[EncoderSpec], None] = lambda spec: None,
    ) -> Embedded:
        """The vectors that the encoder of an index makes of the texts.

        `check` sees the very encoder that will make them, and may refuse: the index may get another at any time.
        """
        budget = self.admission.of(len(texts))
        budget.check()
        served = self.retained(name)
        entered = budget.enter()
        try:
            encoder = encoder_of(served)
            check(encoder.spec)
            encoded = await encoder.encode(texts, role, deadline=time.monotonic() + timeout_ms / 1e3)
        finally:
            budget.leave(entered)
            served.release()
        return Embedded(encoded.vectors, encoded.tokens, encoded.truncated, encoder.spec.name)

    def retained(self, name: str | None) -> Served:
        """The version of `name` that serves, kept open until the caller releases it.

        A refresh in its thread may retire and close a version just before it is retained; but what is still in
        the catalog after that was retained in time.
        """
        while True:
            served = self.catalog.get(name)
            served.retain()
            if self.catalog.get(name) is served:
                return served
            served.release()

    def _threads_for(self, budget: Budget) -> int:
        """Batches that run side by side share the threads that one alone may have."""
        return max(1, self._threads // budget.in_flight) if budget is self.admission.bulk else self._threads

    async def _in_thread(self, work: _Work, run: Callable[[], T], clock: Clock, grace_s: float) -> T:
        submitted = time.perf_counter()

        def timed() -> T:
            clock.queue += time.perf_counter() - submitted
            if time.monotonic() >= clock.deadline:
                raise DeadlineExceeded("the deadline passed while the request waited for a thread")
            return run()

        pool = self._bulk_pool if work.budget is self.admission.bulk else self._pool
        future = asyncio.get_running_loop().run_in_executor(pool, timed)
        work.wait_for(future)
        try:
            async with asyncio.timeout(max(0.0, clock.deadline + grace_s - time.monotonic())):
                return await asyncio.shield(future)
        except asyncio.CancelledError:
            clock.deadline = 0.0  # nobody waits any more: what has not begun will not, what has ends at its next look
            raise
        except TimeoutError as error:
            raise DeadlineExceeded("no answer within timeout_ms; ask for less, or allow more time") from error

    async def in_thread(self, run: Callable[[], T]) -> T:
        """Run something long of the service's own, outside admission."""
        return await asyncio.get_running_loop().run_in_executor(None, run)

    @property
    def in_flight(self) -> int:
        return self.admission.in_flight

    def close(self) -> None:
        for pool in (self._pool, self._bulk_pool):
            pool.shutdown(wait=True, cancel_futures=True)


class _Work:
    """Holds a place in admission and a version open until both the caller and its thread are done."""

    def __init__(self, budget: Budget, served: Served) -> None:
        self.budget, self._served = budget, served
        self._entered = budget.enter()
        self._future: asyncio.Future[Any] | None = None

    def wait_for(self, future: asyncio.Future[Any]) -> None:
        self._future = future

    def leave(self) -> None:
        if self._future is not None and not self._future.done():
            self._future.add_done_callback(self._end)
        else:
            self._end(self._future)

    def _end(self, future: asyncio.Future[Any] | None) -> None:
        if future is not None and not future.cancelled():
            future.exception()  # nobody else will ask for it
        self.budget.leave(self._entered)
        self._served.release()


class _Search:
    """One question against one version, checked against what that version holds."""

    def __init__(
        self,
        served: Served,
        query: Query,
        settings: SearchSettings,
        clock: Clock,
        num_threads: int,
        shards: list[Shard] | None = None,
    ) -> None:
        self.shards = shards if shards is not None else served.shards
        self.served, self.query, self.settings, self.clock = served, query, settings, clock
        self.num_threads = num_threads
        self.vectors: Vectors | None = query.vectors if isinstance(query, VectorQuery) else None
        self.cut: list[int] = []  # texts that were longer than the encoder reads
        self.wanted: set[int] = set()  # shards that some query probes; empty where all are asked
        self.plan = _plan(served, settings)
        if shards is None and not served.whole and not settings.partial:
            held = ", ".join(map(str, served.numbers))
            raise ShardsMissing(
                f"this process holds shards {held} of {len(served.manifest.shards)}: "
                "ask a front door, or with partial for what is here"
            )
        check_question(query, settings, served.manifest)
        if isinstance(query, VectorQuery):
            check_vectors(query.vectors, served.manifest)
        elif isinstance(query, TextQuery):
            encoder_of(served)

    @property
    def measurable(self) -> bool:
        """True for questions that cost about the same as others with their settings."""
        return self.vectors is not None and len(self.vectors) == 1

    def find(self) -> list[Found]:
        """What each shard finds for the vectors of the question, all of them."""
        assert self.vectors is not None
        before = time.perf_counter()
        slices = []
        for start in range(0, len(self.vectors), SLICE):
            if time.monotonic() >= self.clock.deadline:
                raise DeadlineExceeded(f"the deadline passed after {start} of {len(self.vectors)} queries")
            queries = self.vectors[start : start + SLICE]
            slices.append([self._ask(shard, queries, {}) for shard in self.shards])
        found = slices[0]
        if len(slices) > 1:
            found = [_joined(parts) for parts in zip(*slices, strict=True)]
        self.clock.rerank = sum(part.rerank_s for part in found)
        self.clock.search = time.perf_counter() - before - self.clock.rerank
        return found

    def run(self) -> BatchAnswer:
        clock = self.clock
        own: dict[int, int] = {}  # shard -> label of the row that a query by id leaves out
        if self.vectors is not None:
            queries = self.vectors
        else:
            assert isinstance(self.query, IdQuery)
            own = self._find(self.query)
            first = next(shard for shard in self.shards if shard.number in own)
            label = own[first.number]
            queries = np.asarray(first.vectors[label : label + 1], dtype=np.float32)
        if time.monotonic() >= clock.deadline:
            raise DeadlineExceeded("the deadline passed before the search began")
        before = time.perf_counter()
        found = self._recall(queries[:SLICE], own)
        hits = self._name(found, min(SLICE, len(queries)))
        for start in range(SLICE, len(queries), SLICE):
            if time.monotonic() >= clock.deadline:
                raise DeadlineExceeded(f"the deadline passed after {start} of {len(queries)} queries")
            part = self._recall(queries[start : start + SLICE], own)
            hits += self._name(part, len(queries[start : start + SLICE]))
            found = [_either(a, b) for a, b in zip(found, part, strict=True)]
        clock.rerank = sum(part.rerank_s for part in found if part is not None)
        clock.search = time.perf_counter() - before - clock.rerank
        return self._answer(found, hits)

    def _recall(self, queries: Vectors, own: dict[int, int]) -> list[Found | None]:
        """What each shard finds for a slice of the queries; None where none of them asks it."""
        served, probe = self.served, self.settings.probe_shards
        if probe is None or served.centroids is None:
            return [self._ask(shard, queries, own) for shard in self.shards]
        asking = queries_of_shards(nearest_shards(queries, served.centroids, probe, served.manifest.metric))
        self.wanted |= asking.keys()
        found: list[Found | None] = []
        for shard in self.shards:
            rows = asking.get(shard.number)
            part = None if rows is None else placed(self._ask(shard, queries[rows], own), rows, len(queries))
            found.append(part)
        return found

    def _ask(self, shard: Shard, queries: Vectors, own: dict[int, int]) -> Found:
        settings = self.settings
        return shard.search(
            queries,
            settings.k,
            self.plan.params,
            conditions=settings.conditions,
            exact=settings.exact,
            without=own.get(shard.number),
            rerank_depth=settings.rerank_depth,
            limit=Limit(settings.max_visited, self.clock.deadline),
            num_threads=self.num_threads if len(queries) > 1 else 1,
        )

    async def encode(self, texts: list[str]) -> None:
        """From here on the question is one by vectors."""
        encoded = await encoder_of(self.served).encode(texts, "query", deadline=self.clock.deadline)
        self.vectors = encoded.vectors
        self.clock.queue += encoded.queue_s
        self.clock.encode = encoded.encode_s
        self.cut = [at for at, cut in enumerate(encoded.truncated) if cut]

    def _find(self, query: IdQuery) -> dict[int, int]:
        """Shard -> label of a row; near a border a row lives in two shards."""
        found = {shard.number: label for shard in self.shards if (label := shard.ids.label(query.id)) is not None}
        if found:
            return found
        raise UnknownId(f"index {self.served.name!r} has no id {query.id!r}")

    def _name(self, found: list[Found | None], n: int) -> list[list[Hit]]:
        """Merge the shards' answers and turn labels into hits."""
        shards, k, metric = self.shards, self.settings.k, self.served.manifest.metric
        part = found[0]
        if len(shards) == 1 and part is not None and not self.settings.include:
            # The common case, without the steps that it does not need: one shard's order is the answer's.
            ids = shards[0].ids
            answers = []
            for row in range(n):
                labels = part.labels[row].tolist()
                while labels and labels[-1] < 0:
                    labels.pop()
                distances = part.distances[row]
                answers.append(list(map(Hit, ids.of(labels), score(distances, metric).tolist(), distances.tolist())))
            return answers
        asked = [(shard, part) for shard, part in zip(shards, found, strict=True) if part is not None]
        return [self._merge(asked, row, k) for row in range(n)]

    def _merge(self, asked: list[tuple[Shard, Found]], row: int, k: int) -> list[Hit]:
        metric, include = self.served.manifest.metric, self.settings.include
        parts = []
        for shard, part in asked:
            labels = part.labels[row]
            parts.append((part.distances[row], np.where(labels >= 0, shard.rows[labels], -1)))
        which, position = merge_top_k(parts, k)
        hits = []
        for number, at in zip(which.tolist(), position.tolist(), strict=True):
            shard, part = asked[number]
            labels = [int(part.labels[row, at])]
            distance = part.distances[row, at : at + 1]
            hits.append(
                Hit(
                    id=shard.ids.of(labels)[0],
                    score=float(score(distance, metric)[0]),
                    distance=float(distance[0]),
                    fields=(shard.fields.of(labels)[0] if shard.fields else {}) if "fields" in include else None,
                    vector=shard.vectors[labels[0]].tolist() if "vector" in include else None,
                )
            )
        return hits

    def _answer(self, found: list[Found | None], hits: list[list[Hit]]) -> BatchAnswer:
        served, settings = self.served, self.settings
        asked = [part for part in found if part is not None]
        degraded = []
        if self.cut:
            degraded.append(cut_note(self.cut, len(hits), encoder_of(served).spec.max_tokens))
        wanted = self.wanted if self.wanted else set(range(len(served.manifest.shards)))
        missing = sorted(wanted - set(served.numbers))
        if missing:
            degraded.append(f"shards that are not held here: {listed(missing)}")
        if any(part.stopped for part in asked):
            degraded.append("the search was cut short")
            if not settings.partial and time.monotonic() >= self.clock.deadline:
                raise DeadlineExceeded("no full answer within timeout_ms; allow more time, or ask with partial")
        strategy, visited = asked[0].strategy, asked[0].visited
        for part in asked[1:]:
            strategy = strategy if part.strategy == strategy else "mixed"
            visited = -1 if min(visited, part.visited) < 0 else visited + part.visited
        encoder = served.encoder if isinstance(self.query, TextQuery) else None
        return BatchAnswer(
            hits,
            self.clock.took_ms(),
            Coverage(len(wanted) - len(missing), len(wanted), degraded),
            Stats(strategy, visited, settings.k * len(hits) - sum(map(len, hits))),
            served.id,
            encoder.spec.name if encoder is not None else None,
            self.explain(found) if "explain" in settings.include else None,
        )

    def explain(self, found: Sequence[Found | None]) -> list[ShardExplain]:
        return [
            ShardExplain(
                shard=shard.number,
                size=shard.size,
                strategy=part.strategy,
                params=indexes.params_dict(self.plan.params),
                allowed=part.allowed,
                visited=part.visited,
                hops=part.hops,
                took_ms=round(part.took_s * 1e3, 3),
            )
            for shard, part in zip(self.shards, found, strict=True)
            if part is not None
        ]


def count(query: Query) -> int:
    """How many questions there are in one."""
    if isinstance(query, VectorQuery):
        return len(query.vectors)
    return len(query.texts) if isinstance(query, TextQuery) else 1


def _joined(parts: tuple[Found, ...]) -> Found:
    """Slices of a batch as one."""
    return msgspec.structs.replace(
        functools.reduce(_total, parts),
        labels=np.concatenate([part.labels for part in parts]),
        distances=np.concatenate([part.distances for part in parts]),
    )


def _either(a: Found | None, b: Found | None) -> Found | None:
    return _total(a, b) if a is not None and b is not None else a if b is None else b


def _total(a: Found, b: Found) -> Found:
    """What two slices of a batch took together; their labels were named already."""
    return msgspec.structs.replace(
        b,
        visited=-1 if min(a.visited, b.visited) < 0 else a.visited + b.visited,
        hops=-1 if min(a.hops, b.hops) < 0 else a.hops + b.hops,
        stopped=a.stopped or b.stopped,
        strategy=a.strategy if a.strategy == b.strategy else "mixed",
        took_s=a.took_s + b.took_s,
        rerank_s=a.rerank_s + b.rerank_s,
    )


def encoder_of(served: HasEncoder[E]) -> E:
    """What encodes the texts of an index. Raises InvalidRequest where nothing does."""
    if served.encoder is None:
        raise InvalidRequest(
            f"index {served.name!r} has no encoder, so it takes a vector or an id, no text: "
            "build it with --encoder, or serve with --encoder"
        )
    return served.encoder


def cut_note(cut: list[int], texts: int, max_tokens: int) -> str:
    if texts == 1:
        return f"the text was cut at {max_tokens} tokens"
    return f"cut at {max_tokens} tokens: texts {listed(cut)}"


def _ms(seconds: float) -> float:
    """To the microsecond, in a tenth of the time of round()."""
    return int(seconds * 1e6) / 1e3


def _plan(served: Served, settings: SearchSettings) -> Plan:
    try:
        return served.plan(settings)
    except (UnknownParameter, InvalidParameter) as error:
        raise InvalidRequest(f"params: {error}; every kind takes exact, max_visited and probe_shards") from error


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
            raise InvalidRequest(f"filter: {condition.field!r} is no stored field of {manifest.name!r}: {stored}")
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
    spec = manifest.spec
    if vectors.shape[1] != spec.dim:
        raise DimensionMismatch(f"the vector has {vectors.shape[1]} values, index {manifest.name!r} has dim {spec.dim}")
    if len(vectors) == 1:
        check_vector(vectors[0], spec.metric)
    else:
        for row, vector in enumerate(vectors):
            check_vector(vector, spec.metric, f"vectors[{row}]")
