"""The short way of a plain question finds, over one shard or several, to the bit what the long way finds."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpora import build, make_vectors, opened

from vecsvc import remote
from vecsvc.catalog import Served
from vecsvc.distance import score
from vecsvc.engine import Engine
from vecsvc.errors import DimensionMismatch, InvalidVector
from vecsvc.question import Search
from vecsvc.question_checks import Clock
from vecsvc.ranking import nearest_shards
from vecsvc.remote import Kind
from vecsvc.shard_answers import ANSWERS, part_now
from vecsvc.types import METRICS, Hit, Metric, SearchAnswer, SearchSettings, VectorQuery

ROWS = 240
QUERIES = make_vectors(5, 8, seed=91)
KS = (1, 7, 25)
CLUSTERS = {"shards": 4, "partition": "cluster", "border_share": 0.4}  # which share rows near their borders
INDEXES: dict[str, dict[str, Any]] = {
    **{f"one-{metric}": {"metric": metric, "shards": 1} for metric in METRICS},
    **{f"hashed-{metric}": {"metric": metric, "shards": 3} for metric in METRICS},
    **{f"clusters-{metric}": {"metric": metric, **CLUSTERS} for metric in METRICS},
    # The distances are those of codes, and a row that is in two shards has another code in each.
    "codes-l2": {"metric": "l2", "params": {"rerank": "none"}, **CLUSTERS},
}


@pytest.fixture(scope="module", params=INDEXES)
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """Of an index in which each vector is there three times, so that answers have ties."""
    out: Path = tmp_path_factory.mktemp("quick")
    ids = [f"row-{row}" for row in range(ROWS)] if "l2" in request.param else list(range(ROWS))
    flat = np.tile(make_vectors(ROWS // 3, 8, seed=90), (3, 1)).reshape(-1)
    pq.write_table(pa.table({"id": ids, "vector": pa.FixedSizeListArray.from_arrays(flat, 8)}), out / "c.parquet")
    build(out / "c.parquet", out / "all", kind="nng", certificate_queries=0, **INDEXES[request.param])
    with opened(out / "all", inline_ms=100) as engine:
        yield engine


def asked(served: Served, query: VectorQuery, probe: int | None) -> list[int]:
    if probe is None or served.centroids is None:
        return served.numbers
    numbers: list[int] = nearest_shards(query.vectors, served.centroids, probe, served.manifest.metric)[0].tolist()
    return numbers


def merged(served: Served, query: VectorQuery, numbers: list[int], k: int) -> list[Hit]:
    """What each shard finds, merged by hand."""
    metric: Metric = served.manifest.metric
    places = []
    for number in numbers:
        shard = served.shards[number]
        found = shard.index.search(query.vectors, k, served.params)
        for label, distance in zip(found.labels[0].tolist(), found.distances[0].tolist(), strict=True):
            places.append((distance, int(shard.rows[label]), shard.ids.of([label])[0]))
    hits: dict[int, Hit] = {}
    for distance, row, id in sorted(places):
        hits.setdefault(row, Hit(id, float(score(np.array([distance], np.float32), metric)[0]), distance))
    return list(hits.values())[:k]


def test_a_plain_question_is_answered_alike_both_ways_and_as_each_shard_says(engine: Engine) -> None:
    served = engine.catalog.get(None)
    probes = [None] if served.centroids is None else [None, 1, 2, 3, 9]
    twice = 0
    for k in KS:
        for probe in probes:
            settings = SearchSettings(k=k, probe_shards=probe)
            plan = served.plan(settings)
            plan.learn(0.0)
            for row in range(len(QUERIES)):
                query = VectorQuery(QUERIES[row : row + 1])
                numbers = asked(served, query, probe)
                long = Search(served, query, settings, Clock(0.0, time.monotonic() + 60), 1).run(SearchAnswer)
                quick = engine.search_now(None, query, settings)
                assert quick is not None and plan.plain
                assert msgspec.structs.replace(quick, took_ms=long.took_ms) == long
                assert quick.results == merged(served, query, numbers, k) and len(quick.results) == k
                assert (quick.coverage.shards_ok, quick.coverage.shards_total) == (len(numbers), len(numbers))
                rows = [set(served.shards[number].rows.tolist()) for number in numbers]
                twice += len(set().union(*rows)) < sum(map(len, rows))
    assert (twice > 0) == (served.centroids is not None), "rows that lie in two of the shards were among them"


def test_a_nodes_part_of_a_plain_question_is_alike_both_ways(engine: Engine) -> None:
    served = engine.catalog.get(None)
    dim = QUERIES.shape[1]
    some = [served.numbers, served.numbers[::2]]

    async def ask() -> None:
        for k in KS:
            question = remote.Ask.made(served.name, served.digest, dim, SearchSettings(k=k), k=k, of=1)
            for numbers in some:
                for row in range(len(QUERIES)):
                    common = remote.Common.of(remote.encode_ask(question), QUERIES[row : row + 1])
                    frame = remote.search_frame(1, 60_000.0, tuple(numbers), common)
                    [(_, _, payload)] = remote.Frames(remote.OF_FRONT_DOORS, 1 << 20).feed(frame)
                    asked = remote.decode_search(payload)
                    _, long = await ANSWERS[Kind.SEARCH](engine, asked)
                    quick = part_now(engine, asked)
                    assert quick is not None and len(quick.ids) == k
                    times = {"queue_s": long.queue_s, "search_s": long.search_s, "rerank_s": long.rerank_s}
                    assert msgspec.structs.replace(quick, **times) == long

    asyncio.run(ask())


def test_what_is_not_plain_or_comes_too_late_is_left_to_the_long_way(engine: Engine) -> None:
    served = engine.catalog.get(None)
    query = VectorQuery(QUERIES[:1])
    late = SearchSettings(timeout_ms=0.0)
    served.plan(late).learn(0.0)
    assert engine.search_now(None, query, late) is None and served.plan(late).plain, "the next one may be in time"
    for changed in ({"k": ROWS}, {"max_visited": 5}, {"exact": True}, {"rerank_depth": 30}):
        settings = SearchSettings(**changed)
        served.plan(settings).learn(0.0)
        long = Search(served, query, settings, Clock(0.0, time.monotonic() + 60), 1).run(SearchAnswer)
        quick = engine.search_now(None, query, settings)
        assert quick is not None and msgspec.structs.replace(quick, took_ms=long.took_ms) == long
        assert served.plan(settings).plain is ("k" in changed and len(served.shards) == 1)


def test_a_wrong_vector_is_refused_before_shards_are_chosen_by_it(engine: Engine) -> None:
    served = engine.catalog.get(None)
    settings = SearchSettings(probe_shards=None if served.centroids is None else 2)
    served.plan(settings).learn(0.0)
    wrong = (np.full((1, 8), np.nan, np.float32), np.full((1, 8), 3e38, np.float32), np.ones((1, 7), np.float32))
    for vector, error in zip(wrong, (InvalidVector, InvalidVector, DimensionMismatch), strict=True):
        with pytest.raises(error):
            engine.search_now(None, VectorQuery(vector), settings)
