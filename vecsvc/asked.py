"""A question by vectors at a front door: whom it asks, and the answer that is made of what they find."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import Final

from vecsvc import remote
from vecsvc.errors import InvalidRequest
from vecsvc.fan_out import Call, Group
from vecsvc.merging import Merge, check_part
from vecsvc.question_checks import Clock
from vecsvc.ranking import nearest_shards, queries_of_shards
from vecsvc.remote import Ask, Common, Kind, Part
from vecsvc.router import RoutedVersion, Router
from vecsvc.telemetry import Metrics
from vecsvc.types import BatchAnswer, Hit, Id, SearchSettings, Vectors

INLINE_PAIRS: Final = 500  # more queries times centroids are compared in a thread
INLINE_HITS: Final = 4000  # more candidates than that are merged in a thread
KNOWN_ASKS: Final = 1024  # questions whose encoded settings are remembered
SPARE_BYTES: Final = 4096  # of a frame, for the shards that stand before a question
MERGE_S: Final = 0.02  # of its deadline a question keeps so much back, to merge and answer: at most a tenth of it
NODES_SHARE: Final = 0.95  # of what is then left, nodes may search so long, so that what they have arrives in time


class Asked:
    """Checked vectors (n, dim) for one version: `find_groups`, then a `call`, then its `hits`, then the `answer`."""

    def __init__(
        self,
        version: RoutedVersion,
        vectors: Vectors,
        settings: SearchSettings,
        clock: Clock,
        *,
        own: Id | None = None,
        was_text: bool = False,
        cut: Sequence[int] = (),
    ) -> None:
        """`own` is the id of a row that is left out; `cut` are those of the texts that were too long."""
        self.version, self.vectors, self.settings, self.clock = version, vectors, settings, clock
        self._own, self._was_text, self._cut = own, was_text, list(cut)
        # A row that is asked by its id takes a place that it is not given.
        self._k = settings.k + (0 if own is None else 1)
        self._began = 0.0
        self.groups: list[Group] = []
        # It reads the list when the call is over; whoever fills it must not put another in its place.
        self._merge = Merge(version, self.groups, len(vectors), settings, own)

    @property
    def is_long_to_route(self) -> bool:
        """Whether finding the groups would hold up the event loop."""
        return self.settings.probe_shards is not None and len(self.vectors) * self.version.total > INLINE_PAIRS

    @property
    def is_long_to_merge(self) -> bool:
        """Whether merging the hits would; known once there are groups."""
        return self.settings.k * len(self.groups) * len(self.vectors) > INLINE_HITS

    def find_groups(self) -> None:
        """Find out whom to ask, and for which of the queries. Raises InvalidRequest where that is too much to send."""
        version, vectors, settings = self.version, self.vectors, self.settings
        ask = _ask if settings.conditions else _known_ask
        head = ask(version.name, version.digest, vectors.shape[1], settings, self._k, len(vectors))
        if settings.probe_shards is None or version.centroids is None:
            common, check = self._common(head, vectors), self._check(len(vectors))
            for shards, nodes in version.groups:
                framed = functools.partial(_framed, shards, common)
                self.groups.append(Group(version.name, shards, nodes, framed, Kind.PART, version.holders, check))
            return
        chosen = nearest_shards(vectors, version.centroids, settings.probe_shards, version.manifest.metric)
        nodes_of = {shard: nodes for shards, nodes in version.groups for shard in shards}
        for shard, queries in queries_of_shards(chosen).items():
            framed = functools.partial(_framed, (shard,), self._common(head, vectors[queries]))
            check = self._check(len(queries))
            nodes, asked = nodes_of[shard], queries.tolist()
            self.groups.append(
                Group(version.name, (shard,), nodes, framed, Kind.PART, version.holders, check, queries=asked)
            )

    @staticmethod
    def _common(head: bytes, vectors: Vectors) -> Common:
        """Raises InvalidRequest where no node would read so long a question."""
        common = Common.of(head, vectors)
        if len(common.data) > remote.MAX_REQUEST_BYTES - SPARE_BYTES:
            raise InvalidRequest(
                f"the question has {len(common.data)} bytes, nodes take {remote.MAX_REQUEST_BYTES}: "
                "send fewer queries at once"
            )
        return common

    def _check(self, n: int) -> Callable[[Part], None]:
        return functools.partial(check_part, n, self._k, self.vectors.shape[1], self.settings.include)

    def call(self, router: Router) -> Call:
        """What asks the groups."""
        settings = self.settings
        key = (self.version.name, settings.exact, settings.k > 100, len(self.vectors).bit_length())
        kept_s = min(MERGE_S, settings.timeout_ms / 1e4)
        self._began = time.perf_counter()
        return Call(self.groups, router.budgets, key, self.clock.deadline - kept_s, partial=settings.partial)

    def hits(self) -> list[list[Hit]]:
        """Those of each query, merged, when the call is over."""
        return self._merge.hits()

    def answer(self, hits: list[list[Hit]], router: Router, metrics: Metrics) -> BatchAnswer:
        """Raises Overloaded, DeadlineExceeded or ShardsMissing where there is nothing to answer."""
        clock, name = self.clock, self.version.name
        queued = 0.0
        for group in self.groups:
            part: Part | None = group.answer
            if part is not None:
                queued = max(queued, part.queue_s)
                clock.rerank = max(clock.rerank, part.rerank_s)
        clock.queue += queued
        clock.search = max(0.0, time.perf_counter() - self._began - queued - clock.rerank)
        answer = self._merge.answer(hits, clock, self._was_text, self._cut)
        metrics.search(name, answer.stats.strategy).observe(clock.search)
        if answer.stats.shortfall:
            metrics.shortfall(name).inc(answer.stats.shortfall)
        if answer.coverage.shards_ok < answer.coverage.shards_total:
            router.metrics.partial(name).inc()
        return answer


def _ask(index: str, digest: str, dim: int, settings: SearchSettings, k: int, of: int) -> bytes:
    return remote.encode_ask(Ask.made(index, digest, dim, settings, k=k, of=of))


# Conditions may hold lists, which are no keys; and they change from question to question.
_known_ask: Final = functools.lru_cache(KNOWN_ASKS)(_ask)


def _framed(shards: tuple[int, ...], common: Common, request: int, left_ms: float) -> bytes:
    return remote.search_frame(request, left_ms * NODES_SHARE, shards, common)
