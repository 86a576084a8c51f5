"""What is particular to hnswlib: the breadth travels with the call, and its files and refusals are not trusted."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import index_builders
from index_builders.base import operating_points
from vecsvc import indexes
from vecsvc.distance import unit
from vecsvc.errors import ArtifactDamaged, InvalidParameter
from vecsvc.indexes import hnsw
from vecsvc.types import METRICS, IndexSpec, Metric

RNG = np.random.default_rng(6)
VECTORS = RNG.standard_normal((800, 12)).astype(np.float32)


def build(vectors: np.ndarray = VECTORS, metric: Metric = "l2", **params: Any) -> Any:
    return index_builders.build(vectors, kind="hnsw", metric=metric, params=params, num_threads=1)


def test_the_shared_breadth_is_never_touched_by_a_call() -> None:
    index = build()
    for breadth in (300, 16):
        index.search(VECTORS[:5], 3, indexes.search_params("hnsw", ef_search=breadth))
        assert index._index.ef == 1


def test_more_breadth_finds_more() -> None:
    vectors = RNG.standard_normal((4000, 32)).astype(np.float32)
    index = build(vectors, m=4, ef_construction=20)
    truth = index._exact.search(vectors[:100], 10).distances[:, -1:]
    hits = [
        (index.search(vectors[:100], 10, indexes.search_params("hnsw", ef_search=ef)).distances <= truth + 1e-4).mean()
        for ef in (10, 40, 400)
    ]
    assert hits[0] < hits[1] < hits[2]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_a_graph_that_falls_apart_still_answers_every_query(metric: Metric, masked: bool) -> None:
    vectors = np.concatenate([np.repeat(VECTORS[:1], 500, axis=0), VECTORS, np.repeat(VECTORS[1:2], 200, axis=0)])
    index = build(vectors, metric, m=2, ef_construction=4)
    allowed = np.arange(len(vectors)) % 2 == 0 if masked else None
    queries = np.concatenate([VECTORS[:3], VECTORS[400:403]])
    found = index.search(queries, 900, allowed=allowed)
    reachable = 750 if masked else 900
    assert (found.visited > 0).any()  # some query was compared with all
    assert (found.labels[:, :reachable] >= 0).all()
    for row, query in enumerate(queries):
        if found.visited[row] > 0:
            exact = index._exact.search(query[None], 900, allowed=allowed)
            np.testing.assert_array_equal(found.labels[row], exact.labels[0])


def test_queries_of_any_length_mean_the_same_under_cosine() -> None:
    index = build(metric="cosine")
    expected = index.search(VECTORS[:4], 5)
    for scale in (1e-37, 1e-12, 1e3, 1e14):
        found = index.search(VECTORS[:4] * np.float32(scale), 5)
        np.testing.assert_array_equal(found.labels, expected.labels)
        np.testing.assert_allclose(found.distances, expected.distances, atol=1e-5)
    np.testing.assert_allclose(hnsw._unit(VECTORS), unit(VECTORS), atol=1e-6)


def test_params_are_those_of_the_paper_and_bounded() -> None:
    assert build().spec.params == {"m": 16, "ef_construction": 200}
    assert operating_points(build().spec)[0] == {"ef_search": 16}
    with pytest.raises(InvalidParameter, match="m must be between 2 and 512, got 1"):
        build(m=1)


@pytest.mark.parametrize(
    ("spec", "shown"),
    [
        (IndexSpec("hnsw", 12, "l2", 799), "holds 800 vectors of 12 dimensions, expected 799 of 12"),
        (IndexSpec("hnsw", 8, "l2", 800), "holds 800 vectors of 12 dimensions, expected 800 of 8"),
    ],
)
def test_a_file_of_another_index_is_refused_by_name(tmp_path: Path, spec: IndexSpec, shown: str) -> None:
    build().save(tmp_path)
    with pytest.raises(ArtifactDamaged, match=rf"hnsw\.bin: {shown}"):
        indexes.load(tmp_path, spec, vectors=VECTORS)


def test_missing_short_and_cut_files_are_refused_by_name(tmp_path: Path) -> None:
    index = build()
    with pytest.raises(ArtifactDamaged, match=r"hnsw\.bin: No such file"):
        indexes.load(tmp_path, index.spec, vectors=VECTORS)
    index.save(tmp_path)
    whole = (tmp_path / "hnsw.bin").read_bytes()
    (tmp_path / "hnsw.bin").write_bytes(whole[:50])
    with pytest.raises(ArtifactDamaged, match=r"hnsw\.bin: has 50 bytes"):
        indexes.load(tmp_path, index.spec, vectors=VECTORS)
    (tmp_path / "hnsw.bin").write_bytes(whole[:-100])
    with pytest.raises(ArtifactDamaged, match=r"hnsw\.bin: hnswlib cannot read it"):
        indexes.load(tmp_path, index.spec, vectors=VECTORS)


def test_the_header_is_read_as_hnswlib_writes_it(tmp_path: Path) -> None:
    build(m=7, ef_construction=33).save(tmp_path)
    fields = struct.unpack("<6QiI3QdQ", (tmp_path / "hnsw.bin").read_bytes()[:96])
    assert (fields[1], fields[2], fields[10], fields[12]) == (800, 800, 7, 33)
