"""An opened encoder as the engine uses it: texts are checked, looked up, tokenised, and go through the batcher."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import Final, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from vecsvc.batcher import Batcher, BatchSettings, RunFacts
from vecsvc.encoder_workers import start_worker
from vecsvc.encoders.base import CANARY_TEXTS, Encoder, EncoderSpec, Role
from vecsvc.errors import DeadlineExceeded
from vecsvc.lanes import LaneName, cost
from vecsvc.telemetry import Metrics
from vecsvc.tokenizer import Tokens, check_text
from vecsvc.types import Vectors

INLINE_CHARS: Final = 2048  # more are tokenised in a thread: they would hold up the event loop
SLICE: Final = 64  # texts tokenised between two looks at the deadline
MAX_CACHED_CHARS: Final = 512  # longer texts hardly come twice, and would fill the memory
MAX_CACHED_TEXTS: Final = 16  # a longer list is a job, whose texts come once and would push out what people ask
WARM_UP_RUNS: Final = 3  # of each canary: what the first run costs is no measure of the others

Cached: TypeAlias = tuple[NDArray[np.float32], int, bool]  # vector (dim,), tokens, truncated


class Encoded(msgspec.Struct, frozen=True):
    """The vectors of n texts, and where the time went."""

    vectors: Vectors  # (n, dim)
    tokens: list[int]  # of each text: what the model read, prompt and special tokens included
    truncated: list[bool]  # True where a text had more than the encoder reads
    queue_s: float  # waiting for the model
    encode_s: float  # looking up, tokenising and running the model


class QueryEncoder:
    """One encoder with its queue and its cache. `encode` belongs to event loops, the rest to any thread."""

    spec: EncoderSpec

    def __init__(self, encoder: Encoder, settings: BatchSettings, cache_texts: int, metrics: Metrics) -> None:
        """`cache_texts` vectors of queries are remembered; 0 for none."""
        self.spec = encoder.spec
        self.batcher = Batcher(encoder, settings, start_worker, self._observe)
        self._cache: OrderedDict[tuple[Role, str], Cached] = OrderedDict()
        self._cache_texts = cache_texts
        self._metrics = metrics

    def warm_up(self) -> Vectors:
        """Encode the canary texts, learn what runs cost, and return their vectors (n, dim). For opening threads."""
        encoder = self.batcher.encoder
        tokens = encoder.split(CANARY_TEXTS)
        for _ in range(2):
            started = time.perf_counter()
            encoder.run(tokens)
        seconds = time.perf_counter() - started
        for times in {self.batcher.times, self.batcher.bulk_times}:  # which may be one
            times.learn(len(tokens), len(tokens) * max(map(cost, tokens)), seconds)
        for one in tokens * WARM_UP_RUNS:
            started = time.perf_counter()
            encoder.run([one])
            self.batcher.times.learn(1, cost(one), time.perf_counter() - started)
        return encoder.encode(CANARY_TEXTS)

    def encode_now(self, texts: Sequence[str]) -> Vectors:
        """The vectors (n, dim) of query texts, past the queue. For opening threads."""
        return self.batcher.encoder.encode(texts, "query")

    async def encode(
        self, texts: Sequence[str], role: Role = "query", *, deadline: float, lane: LaneName | None = None
    ) -> Encoded:
        """The vectors of the texts, in order. `deadline` is in seconds of time.monotonic(); for `lane` see Batcher.

        Raises InvalidRequest, naming the text by its position, where one is no valid Unicode, and as
        `Batcher.encode` does.
        """
        started = time.perf_counter()
        cache = self._cache
        cached = self._look_up(cache, texts, role)
        missing = [at for at, found in enumerate(cached) if found is None]
        if not missing:
            return _gather(cached, 0.0, time.perf_counter() - started)
        tokens = await self._split(texts, missing, role, deadline)
        done = await self.batcher.encode(tokens, deadline, lane)
        keeps = self._keeps(role, len(texts))
        if len(missing) == len(texts) and not keeps:
            return Encoded(
                done.vectors,
                [len(one) for one in tokens],
                [one.truncated for one in tokens],
                done.queue_s,
                time.perf_counter() - started - done.queue_s,
            )
        for at, one, vector in zip(missing, tokens, done.vectors, strict=True):
            cached[at] = (vector, len(one), one.truncated)
            if keeps and len(texts[at]) <= MAX_CACHED_CHARS:
                # A row would keep the vectors of its whole request alive.
                cache[role, texts[at]] = (vector.copy(), len(one), one.truncated)
        while len(cache) > self._cache_texts:
            cache.popitem(last=False)
        return _gather(cached, done.queue_s, time.perf_counter() - started - done.queue_s)

    def forget(self) -> None:
        """Remember nothing of what was encoded so far: the session that did it is trusted no more. For any thread."""
        # A new dictionary: callers in the event loop keep the one that they began with to themselves.
        self._cache = OrderedDict()

    @property
    def problem(self) -> str:
        """Why texts are not taken in; empty where they are."""
        return self.batcher.problem

    def close(self) -> None:
        self.batcher.close()

    def _keeps(self, role: Role, count: int) -> bool:
        # Passages are what an index is made of, and come once.
        return self._cache_texts > 0 and role == "query" and count <= MAX_CACHED_TEXTS

    def _look_up(
        self, cache: OrderedDict[tuple[Role, str], Cached], texts: Sequence[str], role: Role
    ) -> list[Cached | None]:
        if not self._keeps(role, len(texts)):
            return [None] * len(texts)
        found = [cache.get((role, text)) for text in texts]
        hits = 0
        for text, one in zip(texts, found, strict=True):
            if one is not None:
                cache.move_to_end((role, text))
                hits += 1
        self._metrics.cache_hits(self.spec.name).inc(hits)
        self._metrics.cache_misses(self.spec.name).inc(len(texts) - hits)
        return found

    async def _split(self, texts: Sequence[str], wanted: Sequence[int], role: Role, deadline: float) -> list[Tokens]:
        """The tokens of the wanted texts; what takes long is done in a thread."""
        encoder = self.batcher.encoder
        for at in wanted:
            check_text(texts[at], f"text {at}")  # below it would be named by its place in a slice
        if len(wanted) == 1 and len(texts[wanted[0]]) <= INLINE_CHARS:
            return encoder.split([texts[wanted[0]]], role)
        tokens: list[Tokens] = []
        loop = asyncio.get_running_loop()
        for start in range(0, len(wanted), SLICE):
            if time.monotonic() >= deadline:
                raise DeadlineExceeded(f"the deadline passed after {start} of {len(wanted)} texts were tokenised")
            part = [texts[at] for at in wanted[start : start + SLICE]]
            tokens += await loop.run_in_executor(None, encoder.split, part, role)
        return tokens

    def _observe(self, facts: RunFacts) -> None:
        metrics, name = self._metrics, self.spec.name
        metrics.encoder_run(name, facts.lane).observe(facts.seconds)
        metrics.encoder_batch(name, facts.lane).observe(facts.size)
        metrics.encoder_tokens(name, facts.lane).inc(facts.tokens)
        for seconds in facts.waited_s:
            metrics.encoder_queue(name, facts.lane).observe(seconds)
        if facts.failed:
            metrics.encoder_failed(name).inc()


def _gather(found: Sequence[Cached | None], queue_s: float, encode_s: float) -> Encoded:
    rows = [one for one in found if one is not None]
    vectors = np.stack([vector for vector, _, _ in rows]) if rows else np.empty((0, 0), dtype=np.float32)
    return Encoded(vectors, [tokens for _, tokens, _ in rows], [cut for _, _, cut in rows], queue_s, encode_s)
