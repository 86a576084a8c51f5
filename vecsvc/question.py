"""One question against one version: what each shard finds, merged, its rows named."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat
from typing import Any, TypeVar

import msgspec
import numpy as np

from vecsvc import columns, indexes
from vecsvc.catalog import Served
from vecsvc.distance import score
from vecsvc.errors import (
    DeadlineExceeded,
    ShardsMissing,
    UnknownId,
    listed,
)
from vecsvc.nearest import nearest
from vecsvc.question_checks import (
    Clock,
    check_dim,
    check_question,
    check_values,
    cut_note,
    encoder_of,
    plan_of,
    wrong_type,
)
from vecsvc.ranking import nearest_shards, queries_of_shards
from vecsvc.shard import Found, Shard, placed
from vecsvc.types import (
    BatchAnswer,
    ColumnsAnswer,
    Coverage,
    Hit,
    IdQuery,
    Limit,
    Query,
    SearchAnswer,
    SearchSettings,
    ShardExplain,
    Stats,
    TextQuery,
    VectorQuery,
    Vectors,
)

A = TypeVar("A", SearchAnswer, BatchAnswer, ColumnsAnswer)


class Search:
    """One question against one version, checked against what that version holds; a batch's values when it is run."""

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
        self.together = False  # it shared its run with others, whose time is no measure of its own
        self.waits_since = 0.0  # time.perf_counter() when it was sent to a thread
        self.plan = plan_of(served, settings, len(shards) if shards is not None else None)
        if shards is None and not served.whole and not settings.partial:
            held = ", ".join(map(str, served.numbers))
            raise ShardsMissing(
                f"this process holds shards {held} of {len(served.manifest.shards)}: "
                "ask a front door, or with partial for what is here"
            )
        check_question(query, settings, served.manifest)
        if isinstance(query, VectorQuery):
            check_dim(query.vectors, served.manifest)
            if len(query.vectors) == 1:
                check_values(query.vectors, served.manifest)
        elif isinstance(query, TextQuery):
            encoder_of(served)

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
            and not (settings.conditions or settings.partial or settings.rerank_depth or settings.probe_shards)
            and "explain" not in settings.include
            and (settings.exact or all(getattr(shard.index, "shares_work", False) for shard in self.shards))
        )

    def find(self) -> list[Found]:
        """What each shard finds for the vectors of the question, all of them."""
        assert self.vectors is not None
        self._check_batch()
        before = time.perf_counter()
        slices: list[list[Found]] = []
        for start, queries in self._parts(self.vectors):
            if self._is_too_late(start, len(self.vectors)):
                slices.append([_nothing(part, len(queries)) for part in slices[0]])
            else:
                slices.append([self._ask(shard, queries, {}) for shard in self.shards])
                self._learn_slice(len(queries), slices[-1])
        found = slices[0]
        if len(slices) > 1:
            found = [_joined(parts) for parts in zip(*slices, strict=True)]
        self.clock.rerank = sum(part.rerank_s for part in found)
        self.clock.search = time.perf_counter() - before - self.clock.rerank
        return found

    def run(self, kind: type[A]) -> A:
        """The answer, in the shape that is asked for: `kind`'s results, and what all shapes have in common."""
        clock = self.clock
        own: dict[int, int] = {}  # shard -> label of the row that a query by id leaves out
        if self.vectors is not None:
            queries = self.vectors
            self._check_batch()
        else:
            assert isinstance(self.query, IdQuery)
            own = self._find(self.query)
            first = next(shard for shard in self.shards if shard.number in own)
            label = own[first.number]
            queries = np.asarray(first.vectors[label : label + 1], dtype=np.float32)
        if time.monotonic() >= clock.deadline:
            raise DeadlineExceeded("the deadline passed before the search began; allow more by timeout_ms")
        before = time.perf_counter()
        if kind is SearchAnswer:
            found = self.recall(queries, own)
            [results] = self._name(found, 1)
            hits = len(results)
        else:
            found, results, hits = self._slices(queries, own, kind)
        if self.settings.rerank_depth is not None:
            clock.rerank = sum(part.rerank_s for part in found if part is not None)
        clock.search = time.perf_counter() - before - clock.rerank
        return self._answer(found, results, len(queries), hits, kind)

    def _check_batch(self) -> None:
        """The values of many vectors are read in the thread that reads them anyway, not in the event loop."""
        if isinstance(self.query, VectorQuery) and len(self.query.vectors) > 1:
            check_values(self.query.vectors, self.served.manifest)

    def _parts(self, queries: Vectors) -> Iterator[tuple[int, Vectors]]:
        """Slices of a batch, each as long as its plan knows by then, and where they begin."""
        start = 0
        while start < len(queries):
            some = queries[start : start + self.plan.slice]
            yield start, some
            start += len(some)

    def _learn_slice(self, queries: int, found: Sequence[Found | None]) -> None:
        self.plan.learn_slice(queries, sum(part.took_s + part.rerank_s for part in found if part is not None))

    def answer_from(self, found: Sequence[Found | None]) -> SearchAnswer:
        """The answer of one query that was searched for already."""
        [results] = self._name(found, 1)
        return self._answer(found, results, 1, len(results), SearchAnswer)

    def _slices(self, queries: Vectors, own: dict[int, int], kind: type[A]) -> tuple[list[Found | None], Any, int]:
        """What was found for all queries, in parts between which the deadline is looked at; results and hits."""
        found: list[Found | None] = []
        lists: list[list[Hit]] = []
        parts: list[columns.HitColumns] = []
        for start, some in self._parts(queries):
            if start and self._is_too_late(start, len(queries)):
                found = [part if part is None else msgspec.structs.replace(part, stopped=True) for part in found]
                lists += [[] for _ in range(start, len(queries))]
                break
            part = self.recall(some, own)
            self._learn_slice(len(some), part)
            if kind is ColumnsAnswer:
                parts.append(self._columns(part, start, len(some)))
            else:
                lists += self._name(part, len(some))
            found = [_either(a, b) for a, b in zip(found, part, strict=True)] if found else part
        if kind is ColumnsAnswer:
            return found, parts, sum(part.rows for part in parts)
        return found, lists, sum(map(len, lists))

    def _is_too_late(self, done: int, of: int) -> bool:
        """Whether queries after the first `done` stay unanswered. Raises DeadlineExceeded where parts are not taken."""
        if time.monotonic() < self.clock.deadline:
            return False
        if not done or not self.settings.partial:
            raise DeadlineExceeded(
                f"the deadline passed after {done} of {of} queries; ask fewer at once, or allow more by timeout_ms"
            )
        return True

    def recall(self, queries: Vectors, own: dict[int, int]) -> list[Found | None]:
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
        if not self.served.whole:
            held = listed(self.served.numbers)
            raise ShardsMissing(f"id {query.id!r} is in none of the shards {held} that are held here: ask a front door")
        kind = self.served.manifest.id_type
        raise UnknownId(f"index {self.served.name!r} has no id {query.id!r}{wrong_type(query.id, kind)}")

    def _columns(self, found: Sequence[Found | None], first: int, n: int) -> columns.HitColumns:
        """Merge the shards' answers of n queries that begin at `first`; of one shard without an object for each hit."""
        manifest, part = self.served.manifest, found[0]
        if len(self.shards) == 1 and part is not None:
            return columns.of_arrays(first, part.labels, part.distances, self.shards[0].ids, manifest.metric)
        return columns.of_hits(first, self._name(found, n), manifest.id_type == "int", manifest.metric)

    def _name(self, found: Sequence[Found | None], n: int) -> list[list[Hit]]:
        """Merge the shards' answers and turn labels into hits."""
        shards, metric = self.shards, self.served.manifest.metric
        part = found[0]
        if len(shards) == 1 and part is not None and not self.settings.include:
            # The common case, without the steps that it does not need: one shard's order is the answer's.
            ids, answers = shards[0].ids, []
            for labels, scores, distances in zip(
                part.labels.tolist(), score(part.distances, metric).tolist(), part.distances.tolist(), strict=True
            ):
                while labels and labels[-1] < 0:
                    labels.pop()
                # `map` ends with the shortest: places that stayed empty become no hits.
                answers.append(list(map(Hit, ids.of(labels), scores, distances)))
            return answers
        asked = [(shard, part) for shard, part in zip(shards, found, strict=True) if part is not None]
        if not asked:
            return [[] for _ in range(n)]
        return [self._merge(asked, row) for row in range(n)]

    def _merge(self, asked: list[tuple[Shard, Found]], row: int) -> list[Hit]:
        include = self.settings.include
        shards, parts = zip(*asked, strict=True)
        best = nearest(shards, parts, row, self.settings.k)
        scores = score(best.distances, self.served.manifest.metric).tolist()
        fields: Iterable[dict[str, Any] | None] = repeat(None)
        vectors: Iterable[list[float] | None] = repeat(None)
        rows = [(shards[at], label) for at, label in zip(best.which, best.labels, strict=True)] if include else []
        if "fields" in include:
            fields = [shard.fields.of([label])[0] if shard.fields else {} for shard, label in rows]
        if "vector" in include:
            vectors = [shard.vectors[label].tolist() for shard, label in rows]
        # `map` ends with the shortest.
        return list(map(Hit, best.ids, scores, best.distances.tolist(), fields, vectors))

    def _answer(self, found: Sequence[Found | None], results: Any, queries: int, hits: int, kind: type[A]) -> A:
        served, settings = self.served, self.settings
        asked = [part for part in found if part is not None]
        if not asked:
            raise ShardsMissing(
                f"shards {listed(sorted(self.wanted))} would be asked, and this process holds "
                f"{listed(served.numbers)} of {len(served.manifest.shards)}: ask a front door"
            )
        degraded = []
        if self.cut:
            degraded.append(cut_note(self.cut, queries, encoder_of(served).spec.max_tokens))
        total = len(self.wanted) if self.wanted else len(served.manifest.shards)
        if len(asked) < total:
            wanted = self.wanted if self.wanted else set(range(total))
            degraded.append(f"shards that are not held here: {listed(sorted(wanted - set(served.numbers)))}")
        if any(part.stopped for part in asked):
            degraded.append("the search was cut short")
            if not settings.partial and self.clock.passed():
                raise DeadlineExceeded("no full answer within timeout_ms; allow more time, or ask with partial")
        strategy, visited = asked[0].strategy, asked[0].visited
        for part in asked[1:]:
            strategy = strategy if part.strategy == strategy else "mixed"
            visited = -1 if min(visited, part.visited) < 0 else visited + part.visited
        encoder = served.encoder if isinstance(self.query, TextQuery) else None
        return kind(
            results,
            self.clock.took_ms(),
            Coverage(len(asked), total, degraded),
            Stats(strategy, visited, settings.k * queries - hits),
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


def _joined(parts: tuple[Found, ...]) -> Found:
    """Slices of a batch as one."""
    return msgspec.structs.replace(
        functools.reduce(_total, parts),
        labels=np.concatenate([part.labels for part in parts]),
        distances=np.concatenate([part.distances for part in parts]),
    )


def _nothing(like: Found, n: int) -> Found:
    """n queries that there was no time for."""
    k = like.labels.shape[1]
    return msgspec.structs.replace(
        like,
        labels=np.full((n, k), -1, dtype=np.int64),
        distances=np.full((n, k), np.inf, dtype=np.float32),
        visited=min(like.visited, 0),
        hops=min(like.hops, 0),
        stopped=True,
        took_s=0.0,
        rerank_s=0.0,
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
