"""What nodes found, as one answer: each part checked, all parts merged by (distance, corpus row)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import repeat
from operator import itemgetter
from typing import Any, Final, TypeAlias

import msgspec
import numpy as np

from vecsvc.distance import score
from vecsvc.errors import DeadlineExceeded, Overloaded, ProtocolError, ShardsMissing, VecsvcError
from vecsvc.fan_out import Group
from vecsvc.question_checks import Clock, cut_note
from vecsvc.remote import Part, all_finite
from vecsvc.router import RoutedVersion
from vecsvc.types import BatchAnswer, Coverage, Hit, Id, SearchSettings, Stats

# (distance, corpus row, id, the part that it is from, its place there)
_Candidate: TypeAlias = "tuple[float, int, Id, _Opened, int]"
_by_distance_and_row: Final = itemgetter(0, 1)


def check_part(n: int, k: int, dim: int, include: frozenset[str], part: Part) -> None:
    """A node's answer is foreign bytes: what does not fit together, or is no number, is an error of that node."""
    hits = sum(part.counts)
    fits = (
        len(part.counts) == n
        and min(part.counts) >= 0
        and max(part.counts) <= k
        and len(part.distances) == 4 * hits
        and len(part.rows) == 8 * hits
        and len(part.ids) == hits
        and (len(part.fields) == hits if part.fields is not None else "fields" not in include)
        and (len(part.vectors) == 4 * dim * hits if part.vectors is not None else "vector" not in include)
    )
    if not fits:
        raise ProtocolError(f"an answer of {hits} hits whose parts do not fit together")
    # Stored vectors and questions are within MAX_ABS, so no distance is infinite, and places that stay empty do not
    # travel: one such hit would be the best or the last of every answer, and JSON has no word for it.
    if not (all_finite(part.distances) and (part.vectors is None or all_finite(part.vectors))):
        raise ProtocolError(f"an answer of {hits} hits, some of them at no finite distance or with no finite vector")
    if not math.isfinite(part.queue_s + part.search_s + part.rerank_s):
        raise ProtocolError("an answer that took no finite time")


class Merge:
    """The nodes' parts as one answer: by (distance, corpus row), each row once."""

    def __init__(
        self,
        version: RoutedVersion,
        groups: list[Group],
        n: int,
        settings: SearchSettings,
        own: Id | None,
    ) -> None:
        """Of `n` queries; `own` is the id of the row that is left out."""
        self.version, self.groups, self.n, self.settings, self.own = version, groups, n, settings, own

    def hits(self) -> list[list[Hit]]:
        distinct = self.own is None and self.version.manifest.clusters is None
        if self.n == 1 and distinct and not self.settings.include:
            return [self._nearest([group.answer for group in self.groups if group.answer is not None])]
        dim = self.version.manifest.spec.dim
        parts = [_Opened(g.answer, dim, g.queries) for g in self.groups if g.answer is not None]
        return [self._one([hit for part in parts for hit in part.take(query)]) for query in range(self.n)]

    def _nearest(self, parts: list[Part]) -> list[Hit]:
        """Those of one query of which nothing more is wanted: the common case, without an object for each candidate."""
        ids = [id for part in parts for id in part.ids]
        distances = np.frombuffer(b"".join([part.distances for part in parts]), "<f4")
        rows = np.frombuffer(b"".join([part.rows for part in parts]), "<i8")
        order = np.lexsort((rows, distances))[: self.settings.k]
        kept = distances[order]
        scores = score(kept, self.version.manifest.metric)
        return list(map(Hit, [ids[at] for at in order.tolist()], scores.tolist(), kept.tolist()))

    def _one(self, candidates: list[_Candidate]) -> list[Hit]:
        # Each part's are in order already, which Python's sort sees.
        candidates.sort(key=_by_distance_and_row)
        if self.own is None and self.version.manifest.clusters is None:
            kept = candidates[: self.settings.k]
        else:
            kept = self._distinct(candidates)
        distances = np.array([hit[0] for hit in kept], dtype=np.float32)
        scores = score(distances, self.version.manifest.metric).tolist()
        if not self.settings.include:
            return [Hit(hit[2], points, hit[0]) for hit, points in zip(kept, scores, strict=True)]
        return [
            Hit(id, points, distance, part.fields(at), part.vector(at))
            for (distance, _, id, part, at), points in zip(kept, scores, strict=True)
        ]

    def _distinct(self, candidates: list[_Candidate]) -> list[_Candidate]:
        """The first k of different rows: one near the border of two clusters may come twice."""
        kept: list[_Candidate] = []
        seen: set[int] = set()
        for hit in candidates:
            if hit[1] not in seen and hit[2] != self.own:
                kept.append(hit)
                seen.add(hit[1])
                if len(kept) == self.settings.k:
                    break
        return kept

    def answer(self, hits: list[list[Hit]], clock: Clock, was_text: bool, cut: list[int]) -> BatchAnswer:
        """Raises Overloaded, DeadlineExceeded or ShardsMissing where there is nothing to answer."""
        version, settings = self.version, self.settings
        degraded = []
        encoder = version.encoder
        if cut and encoder is not None:
            degraded.append(cut_note(cut, len(hits), encoder.spec.max_tokens))
        ok = total = visited = 0
        stopped = False
        strategies, errors = set(), []
        for group in self.groups:
            total += len(group.shards)
            part: Part | None = group.answer
            if part is not None:
                ok += len(group.shards)
                stopped = stopped or part.stopped
                strategies.add(part.strategy)
                visited = -1 if part.visited < 0 or visited < 0 else visited + part.visited
            elif group.error is not None:
                errors.append(group.error)
        if not strategies:
            raise self._nothing(errors)
        if stopped:
            degraded.append("the search was cut short")
        degraded += map(str, errors)
        explain = None
        if "explain" in settings.include:
            explain = [one for group in self.groups if group.answer is not None for one in group.answer.explain or ()]
            explain.sort(key=lambda one: one.shard)
        return BatchAnswer(
            hits,
            clock.took_ms(),
            Coverage(ok, total, degraded),
            Stats(
                strategies.pop() if len(strategies) == 1 else "mixed",
                visited,
                settings.k * len(hits) - sum(map(len, hits)),
            ),
            version.id,
            encoder.spec.name if was_text and encoder is not None else None,
            explain,
        )

    def _nothing(self, errors: list[VecsvcError]) -> VecsvcError:
        """What to say where no shard answered."""
        if all(isinstance(error, Overloaded) for error in errors):
            return errors[0]
        if all(isinstance(error, DeadlineExceeded) for error in errors):
            return DeadlineExceeded(f"no shard answered within timeout_ms: {errors[0]}")
        return ShardsMissing(f"no shard of {self.version.name!r} answered: {errors[0]}")


class _Opened:
    """A part whose bytes are lists, read query by query."""

    def __init__(self, part: Part, dim: int, queries: list[int] | None) -> None:
        """`queries` are those that it answers; None for all."""
        self._part, self._dim = part, dim
        self._place = {query: at for at, query in enumerate(queries)} if queries is not None else None
        self._distances: list[float] = np.frombuffer(part.distances, "<f4").tolist()
        self._rows: list[int] = np.frombuffer(part.rows, "<i8").tolist()
        self._starts = [0]
        for count in part.counts:
            self._starts.append(self._starts[-1] + count)

    def take(self, query: int) -> Iterable[_Candidate]:
        """Each hit."""
        at = query if self._place is None else self._place.get(query)
        if at is None:
            return ()
        here = range(self._starts[at], self._starts[at + 1])
        own = slice(here.start, here.stop)
        return zip(self._distances[own], self._rows[own], self._part.ids[own], repeat(self), here, strict=False)

    def fields(self, at: int) -> Any:
        """The stored fields as the node wrote them, which go into the answer as they are."""
        return msgspec.Raw(self._part.fields[at]) if self._part.fields is not None else None

    def vector(self, at: int) -> list[float] | None:
        if self._part.vectors is None:
            return None
        size = 4 * self._dim
        found: list[float] = np.frombuffer(self._part.vectors[at * size : (at + 1) * size], "<f4").tolist()
        return found
