"""The use case: a question in, an answer out. Encode, recall from every shard, merge, name the ids."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import msgspec
import numpy as np

from vecsvc import indexes
from vecsvc.catalog import Catalog, Plan, Served
from vecsvc.config import ServeSettings
from vecsvc.distance import check_vector, score
from vecsvc.encoders.base import EncoderSpec, Role
from vecsvc.errors import (
    DeadlineExceeded,
    DimensionMismatch,
    InvalidParameter,
    InvalidRequest,
    Overloaded,
    UnknownId,
    UnknownParameter,
)
from vecsvc.gather import Gather
from vecsvc.query_encoder import QueryEncoder
from vecsvc.ranking import merge_top_k
from vecsvc.shard import Found
from vecsvc.telemetry import Metrics
from vecsvc.types import (
    MAX_ABS,
    BatchAnswer,
    Columns,
    ColumnsAnswer,
    Condition,
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

log: Final = logging.getLogger("vecsvc.engine")

T = TypeVar("T")
A = TypeVar("A", SearchAnswer, BatchAnswer, ColumnsAnswer)

# Who takes a part of the answer waits so much beyond the deadline for the search to notice it and stop.
PARTIAL_GRACE_S: Final = 0.05
# What an answer may take in memory, by estimate: a hit, a stored field of it, and a value of its vector.
MAX_ANSWER_BYTES: Final = 1 << 28
_HIT_BYTES: Final = 256
_FIELD_BYTES: Final = 256
_VALUE_BYTES: Final = 32
SLICE: Final = 64  # queries of a batch between two looks at the deadline
MAX_NAMED: Final = 10  # texts that an answer names one by one
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
        self._pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="vecsvc-search")
        self._gather: Gather[_Search, SearchAnswer] = Gather(self._pool, run_together)
        self._in_flight = 0
        self._inline_s = settings.inline_ms / 1e3

    async def search(self, name: str | None, query: Query, settings: SearchSettings) -> SearchAnswer:
        """Answer one question. Raises what errors.py lists under RequestError and ServiceError."""
        return await self._answer(name, query, settings, SearchAnswer)

    async def search_batch(self, name: str | None, query: Query, settings: SearchSettings) -> BatchAnswer:
        """Answer many questions that share their settings."""
        return await self._answer(name, query, settings, BatchAnswer)

    async def search_columns(self, name: str | None, query: Query, settings: SearchSettings) -> ColumnsAnswer:
        """Answer many questions with columns over all hits, for those who want no `include`."""
        return await self._answer(name, query, settings, ColumnsAnswer)

    def search_now(self, name: str | None, query: VectorQuery, settings: SearchSettings) -> SearchAnswer | None:
        """Answer one question by its vector before anything else happens in the event loop.

        None where that may take longer than `inline_ms`, or nobody knows how long, or too many wait already.
        """
        if self._in_flight >= self._settings.max_in_flight:
            return None
        clock = Clock(time.perf_counter(), time.monotonic() + settings.timeout_ms / 1e3)
        served = self.retained(name)
        try:
            search = _Search(served, query, settings, clock, 1)
            seconds = search.plan.seconds
            if seconds is None or seconds > self._inline_s or not search.measurable:
                return None
            answer = search.run(SearchAnswer)
            search.plan.learn(clock.search + clock.rerank)
        finally:
            served.release()
        self._count(served, answer.stats, clock)
        return answer

    async def _answer(self, name: str | None, query: Query, settings: SearchSettings, kind: type[A]) -> A:
        clock = Clock(time.perf_counter(), time.monotonic() + settings.timeout_ms / 1e3)
        if self._in_flight >= self._settings.max_in_flight:
            raise Overloaded(f"{self._settings.max_in_flight} requests are in flight, the limit max_in_flight")
        served = self.retained(name)
        self._in_flight += 1
        # From here on `work` owns both until it ends: a caller whose deadline passes leaves a search behind
        # in its thread, and that still counts, and still reads the index.
        work = _Work(self, served)
        try:
            search = _Search(served, query, settings, clock, self._threads)
            if isinstance(query, TextQuery):
                await search.encode(query.texts)
            measurable, seconds = search.measurable, search.plan.seconds
            # A hop to a thread and back costs more than a search of a graph; a long search in the event loop
            # costs everybody. So a question goes to a thread until its like was measured to be short.
            if measurable and seconds is not None and seconds <= self._inline_s:
                answer = search.run(kind)
            elif kind is SearchAnswer and search.shares_work:
                answer = await self._gathered(work, search)
            else:
                grace_s = PARTIAL_GRACE_S if settings.partial else 0.0
                answer = await self._in_thread(work, lambda: search.run(kind), clock, grace_s)
            if measurable and not search.together:
                search.plan.learn(clock.search + clock.rerank)
        finally:
            work.leave()
        self._count(served, answer.stats, clock)
        return answer

    def _count(self, served: Served, stats: Stats, clock: Clock) -> None:
        self._metrics.search(served.name, stats.strategy).observe(clock.search)
        if stats.shortfall:
            self._metrics.shortfall(served.name).inc(stats.shortfall)

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
        if self._in_flight >= self._settings.max_in_flight:
            raise Overloaded(f"{self._settings.max_in_flight} requests are in flight, the limit max_in_flight")
        served = self.retained(name)
        self._in_flight += 1
        try:
            encoder = _encoder(served)
            check(encoder.spec)
            encoded = await encoder.encode(texts, role, deadline=time.monotonic() + timeout_ms / 1e3)
        finally:
            self._in_flight -= 1
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

    async def _in_thread(self, work: _Work, run: Callable[[], T], clock: Clock, grace_s: float) -> T:
        submitted = time.perf_counter()

        def timed() -> T:
            clock.queue += time.perf_counter() - submitted
            if time.monotonic() >= clock.deadline:
                raise DeadlineExceeded("the deadline passed while the request waited for a thread")
            return run()

        return await self._until(work, asyncio.get_running_loop().run_in_executor(self._pool, timed), clock, grace_s)

    async def _gathered(self, work: _Work, search: _Search) -> SearchAnswer:
        """The answer of a question that may share its run with others; each waits until its own deadline."""
        search.waits_since = time.perf_counter()
        future = asyncio.wrap_future(self._gather.submit(search.plan, search))
        return await self._until(work, future, search.clock, 0.0)

    async def _until(self, work: _Work, future: asyncio.Future[T], clock: Clock, grace_s: float) -> T:
        work.wait_for(future)
        try:
            async with asyncio.timeout(max(0.0, clock.deadline + grace_s - time.monotonic())):
                return await asyncio.shield(future)
        except TimeoutError as error:
            raise DeadlineExceeded("no answer within timeout_ms; ask for less, or allow more time") from error

    async def in_thread(self, run: Callable[[], T]) -> T:
        """Run something long of the service's own, outside admission."""
        return await asyncio.get_running_loop().run_in_executor(None, run)

    @property
    def in_flight(self) -> int:
        return self._in_flight

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


class _Work:
    """Holds a place in admission and a version open until both the caller and its thread are done."""

    def __init__(self, engine: Engine, served: Served) -> None:
        self._engine, self._served = engine, served
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
        self._engine._in_flight -= 1
        self._served.release()


class _Search:
    """One question against one version, checked against what that version holds."""

    def __init__(self, served: Served, query: Query, settings: SearchSettings, clock: Clock, num_threads: int) -> None:
        self.served, self.query, self.settings, self.clock = served, query, settings, clock
        self.num_threads = num_threads
        self.vectors: Vectors | None = query.vectors if isinstance(query, VectorQuery) else None
        self.cut: list[int] = []  # texts that were longer than the encoder reads
        self.together = False  # it shared its run with others, whose time is no measure of its own
        self.waits_since = 0.0  # time.perf_counter() when it was sent to a thread
        self.plan = _plan(served, settings)
        _check_fields(settings.conditions, served)
        _check_size(query, settings, served)
        if isinstance(query, VectorQuery):
            _check_vectors(query.vectors, served)
        elif isinstance(query, TextQuery):
            _encoder(served)

    @property
    def measurable(self) -> bool:
        """True for questions that cost about the same as others with their settings."""
        return self.vectors is not None and len(self.vectors) == 1

    @property
    def shares_work(self) -> bool:
        """True where many such questions cost less in one search than one by one, and are answered the same."""
        settings = self.settings
        return (
            self.measurable
            and not (settings.conditions or settings.partial or settings.rerank_depth)
            and "explain" not in settings.include
            and (settings.exact or all(getattr(shard.index, "shares_work", False) for shard in self.served.shards))
        )

    def run(self, kind: type[A]) -> A:
        """The answer, in the shape that is asked for: `kind`'s results, and what all shapes have in common."""
        served, clock = self.served, self.clock
        own: tuple[int, int] | None = None  # shard and label of the row that a query by id leaves out
        if self.vectors is not None:
            queries = self.vectors
        else:
            assert isinstance(self.query, IdQuery)
            own = self._find(self.query)
            queries = np.asarray(served.shards[own[0]].vectors[own[1] : own[1] + 1], dtype=np.float32)
        if time.monotonic() >= clock.deadline:
            raise DeadlineExceeded("the deadline passed before the search began")
        before = time.perf_counter()
        if kind is SearchAnswer:
            found = self.recall(queries, own)
            [results] = self._name(found, 1)
            hits = len(results)
        else:
            found, results, hits = self._slices(queries, own, kind)
        clock.rerank = sum(part.rerank_s for part in found) if self.settings.rerank_depth is not None else 0.0
        clock.search = time.perf_counter() - before - clock.rerank
        return self._answer(found, results, len(queries), hits, kind)

    def answer_from(self, found: list[Found]) -> SearchAnswer:
        """The answer of one query that was searched for already."""
        [results] = self._name(found, 1)
        return self._answer(found, results, 1, len(results), SearchAnswer)

    def _slices(self, queries: Vectors, own: tuple[int, int] | None, kind: type[A]) -> tuple[list[Found], Any, int]:
        """What was found for all queries, in parts between which the deadline is looked at; results and hits."""
        found: list[Found] = []
        lists: list[list[Hit]] = []
        columns: list[Columns] = []
        for start in range(0, len(queries), SLICE):
            if start and time.monotonic() >= self.clock.deadline:
                raise DeadlineExceeded(f"the deadline passed after {start} of {len(queries)} queries")
            some = queries[start : start + SLICE]
            part = self.recall(some, own)
            if kind is ColumnsAnswer:
                columns.append(self._columns(part, start))
            else:
                lists += self._name(part, len(some))
            found = list(map(_sum, found, part)) if found else part
        if kind is ColumnsAnswer:
            joined = _joined(columns)
            return found, joined, len(joined.distances)
        return found, lists, sum(map(len, lists))

    def recall(self, queries: Vectors, own: tuple[int, int] | None) -> list[Found]:
        """What each shard finds for a slice of the queries."""
        settings = self.settings
        limit = Limit(settings.max_visited, self.clock.deadline)
        return [
            shard.search(
                queries,
                settings.k,
                self.plan.params,
                conditions=settings.conditions,
                exact=settings.exact,
                without=own[1] if own is not None and own[0] == shard.number else None,
                rerank_depth=settings.rerank_depth,
                limit=limit,
                num_threads=self.num_threads if len(queries) > 1 else 1,
            )
            for shard in self.served.shards
        ]

    async def encode(self, texts: list[str]) -> None:
        """From here on the question is one by vectors."""
        encoded = await _encoder(self.served).encode(texts, "query", deadline=self.clock.deadline)
        self.vectors = encoded.vectors
        self.clock.queue += encoded.queue_s
        self.clock.encode = encoded.encode_s
        self.cut = [at for at, cut in enumerate(encoded.truncated) if cut]

    def _find(self, query: IdQuery) -> tuple[int, int]:
        for shard in self.served.shards:
            label = shard.ids.label(query.id)
            if label is not None:
                return shard.number, label
        raise UnknownId(f"index {self.served.name!r} has no id {query.id!r}")

    def _columns(self, found: list[Found], first: int) -> Columns:
        """Merge the shards' answers of queries that begin at `first`, without an object for each hit."""
        shards, metric = self.served.shards, self.served.manifest.metric
        whole = self.served.manifest.id_type == "int"
        if len(shards) == 1:
            labels, distances = found[0].labels, found[0].distances
            places = labels >= 0
            query, rank = np.nonzero(places)
            flat = distances[places]
            ids = shards[0].ids.column(labels[places])
            return Columns(query + first, rank, [ids], whole, score(flat, metric), flat)
        lists = self._name(found, len(found[0].labels))
        hits = [hit for one in lists for hit in one]
        counts = [len(one) for one in lists]
        flat = np.array([hit.distance for hit in hits], np.float32)
        return Columns(
            np.repeat(np.arange(first, first + len(lists)), counts),
            np.concatenate([np.arange(count) for count in counts]),
            [[hit.id for hit in hits]],
            whole,
            score(flat, metric),
            flat,
        )

    def _name(self, found: list[Found], n: int) -> list[list[Hit]]:
        """Merge the shards' answers and turn labels into hits."""
        shards, k, metric = self.served.shards, self.settings.k, self.served.manifest.metric
        if len(shards) == 1 and not self.settings.include:
            # The common case, without the steps that it does not need: one shard's order is the answer's.
            part, ids = found[0], shards[0].ids
            answers = []
            for labels, scores, distances in zip(
                part.labels.tolist(), score(part.distances, metric).tolist(), part.distances.tolist(), strict=True
            ):
                while labels and labels[-1] < 0:
                    labels.pop()
                # `map` ends with the shortest: places that stayed empty become no hits.
                answers.append(list(map(Hit, ids.of(labels), scores, distances)))
            return answers
        return [self._merge(found, row, k) for row in range(n)]

    def _merge(self, found: list[Found], row: int, k: int) -> list[Hit]:
        shards, metric, include = self.served.shards, self.served.manifest.metric, self.settings.include
        parts = []
        for shard, part in zip(shards, found, strict=True):
            labels = part.labels[row]
            parts.append((part.distances[row], np.where(labels >= 0, shard.rows[labels], -1)))
        which, position = merge_top_k(parts, k)
        hits = []
        for number, at in zip(which.tolist(), position.tolist(), strict=True):
            shard, part = shards[number], found[number]
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

    def _answer(self, found: list[Found], results: Any, queries: int, hits: int, kind: type[A]) -> A:
        served, settings = self.served, self.settings
        degraded = []
        if self.cut:
            degraded.append(_cut_note(self.cut, queries, _encoder(served).spec.max_tokens))
        if found[0].stopped or (len(found) > 1 and any(part.stopped for part in found)):
            degraded.append("the search was cut short")
            if not settings.partial and time.monotonic() >= self.clock.deadline:
                raise DeadlineExceeded("no full answer within timeout_ms; allow more time, or ask with partial")
        strategy, visited = found[0].strategy, found[0].visited
        for part in found[1:]:
            strategy = strategy if part.strategy == strategy else "mixed"
            visited = -1 if min(visited, part.visited) < 0 else visited + part.visited
        encoder = served.encoder if isinstance(self.query, TextQuery) else None
        return kind(
            results,
            self.clock.took_ms(),
            Coverage(len(found), len(served.shards), degraded),
            Stats(strategy, visited, settings.k * queries - hits),
            served.id,
            encoder.spec.name if encoder is not None else None,
            self._explain(found) if "explain" in settings.include else None,
        )

    def _explain(self, found: list[Found]) -> list[ShardExplain]:
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
            for shard, part in zip(self.served.shards, found, strict=True)
        ]


def run_together(searches: list[_Search]) -> list[SearchAnswer | Exception]:
    """Answer questions that share version and settings in one search; each has its own answer or error.

    The search may take as long as the latest deadline: who has to go earlier is not waiting any more when it ends.
    """
    now, began = time.monotonic(), time.perf_counter()
    answers: dict[int, SearchAnswer | Exception] = {}
    going: dict[int, _Search] = {}
    for place, search in enumerate(searches):
        search.clock.queue += began - search.waits_since
        if now < search.clock.deadline:
            going[place] = search
        else:
            answers[place] = DeadlineExceeded("the deadline passed while the request waited for a thread")
    if len(going) > 1:
        try:
            answers |= _together(going)
        except Exception:
            log.exception("a search for several failed", extra={"data": {"questions": len(going)}})
    for place, search in going.items():
        if place not in answers:
            try:
                answers[place] = search.run(SearchAnswer)
            except Exception as error:
                answers[place] = error
    return [answers[place] for place in range(len(searches))]


def _together(going: dict[int, _Search]) -> dict[int, SearchAnswer | Exception]:
    before = time.perf_counter()
    vectors = np.concatenate([search.vectors for search in going.values() if search.vectors is not None])
    last = max(going.values(), key=lambda search: search.clock.deadline)
    found = last.recall(vectors, None)
    seconds = time.perf_counter() - before
    answers: dict[int, SearchAnswer | Exception] = {}
    for row, (place, search) in enumerate(going.items()):
        search.together, search.clock.search = True, seconds
        try:
            answers[place] = search.answer_from([_row(part, row) for part in found])
        except DeadlineExceeded as error:
            answers[place] = error
    return answers


def _row(found: Found, row: int) -> Found:
    """What one of several queries found; each compared as many vectors as any other."""
    n = len(found.labels)
    return msgspec.structs.replace(
        found,
        labels=found.labels[row : row + 1],
        distances=found.distances[row : row + 1],
        visited=found.visited // n if found.visited >= 0 else -1,
        hops=found.hops // n if found.hops >= 0 else -1,
    )


def _joined(parts: list[Columns]) -> Columns:
    if len(parts) == 1:
        return parts[0]
    return Columns(
        np.concatenate([part.query for part in parts]),
        np.concatenate([part.rank for part in parts]),
        [ids for part in parts for ids in part.ids],
        parts[0].whole,
        np.concatenate([part.scores for part in parts]),
        np.concatenate([part.distances for part in parts]),
    )


def _sum(a: Found, b: Found) -> Found:
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


def _encoder(served: Served) -> QueryEncoder:
    if served.encoder is None:
        raise InvalidRequest(
            f"index {served.name!r} has no encoder, so it takes a vector or an id, no text: "
            "build it with --encoder, or serve with --encoder"
        )
    return served.encoder


def _cut_note(cut: list[int], texts: int, max_tokens: int) -> str:
    if texts == 1:
        return f"the text was cut at {max_tokens} tokens"
    more = f" and {len(cut) - MAX_NAMED} more" if len(cut) > MAX_NAMED else ""
    return f"cut at {max_tokens} tokens: texts {', '.join(map(str, cut[:MAX_NAMED]))}{more}"


def _ms(seconds: float) -> float:
    """To the microsecond, in a tenth of the time of round()."""
    return int(seconds * 1e6) / 1e3


def _plan(served: Served, settings: SearchSettings) -> Plan:
    try:
        return served.plan(settings)
    except (UnknownParameter, InvalidParameter) as error:
        raise InvalidRequest(f"params: {error}; every kind takes exact and max_visited") from error


def _check_fields(conditions: tuple[Condition, ...], served: Served) -> None:
    for condition in conditions:
        if condition.field not in served.manifest.fields:
            stored = ", ".join(served.manifest.fields) or "none"
            raise InvalidRequest(f"filter: {condition.field!r} is no stored field of {served.name!r}: {stored}")


def _check_size(query: Query, settings: SearchSettings, served: Served) -> None:
    hits = settings.k
    if isinstance(query, VectorQuery):
        hits *= len(query.vectors)
    elif isinstance(query, TextQuery):
        hits *= len(query.texts)
    hit_bytes = _HIT_BYTES
    if settings.include:
        if "fields" in settings.include:
            hit_bytes += _FIELD_BYTES * len(served.manifest.fields)
        if "vector" in settings.include:
            hit_bytes += _VALUE_BYTES * served.manifest.spec.dim
    if hits * hit_bytes > MAX_ANSWER_BYTES:
        raise InvalidRequest(
            f"the answer may have {hits} hits of some {hit_bytes} bytes, the limit is {MAX_ANSWER_BYTES} bytes: "
            "ask for a smaller k, fewer queries, or less in include"
        )
    wide = max(settings.k, settings.rerank_depth or 0) * (dict(settings.params).get("k_factor") or 1)
    if wide > MAX_CANDIDATES:
        raise InvalidRequest(f"k or rerank.depth times k_factor is {wide}, the limit is {MAX_CANDIDATES} candidates")


def _check_vectors(vectors: Vectors, served: Served) -> None:
    spec = served.manifest.spec
    if vectors.shape[1] != spec.dim:
        raise DimensionMismatch(f"the vector has {vectors.shape[1]} values, index {served.name!r} has dim {spec.dim}")
    if len(vectors) == 1:
        check_vector(vectors[0], spec.metric)
        return
    # Sums of squares within these bounds answer every question at once, as in check_vector.
    squares = np.einsum("ij,ij->i", vectors, vectors)
    for row in np.flatnonzero(~((squares > 0.0) & (squares <= MAX_ABS))).tolist():
        check_vector(vectors[row], spec.metric, f"vectors[{row}]")
