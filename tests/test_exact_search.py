"""Exact search is exact where float32 products are not: ties, duplicates, far, huge, tiny and mapped data."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from vecsvc import blocks, exact_search
from vecsvc.distance import exact_distances, unit
from vecsvc.exact_search import ExactSearch, lower_bounds, row_norms
from vecsvc.types import METRICS, Limit, Metric

RNG = np.random.default_rng(3)
NORMAL = RNG.standard_normal((2000, 24)).astype(np.float32)


def hard_data() -> dict[str, np.ndarray]:
    far = NORMAL * 0.01 + 1000.0
    outlier = NORMAL.copy()
    outlier[7] *= 1e12
    many_ties = NORMAL[RNG.integers(0, 5, 2000)]
    tiny = NORMAL * np.float32(1e-25)
    tiny[5] = np.float32(1e-42)
    mixed = NORMAL * (10.0 ** RNG.uniform(-20, 14, (2000, 1))).astype(np.float32)
    mixed[3] = 0.0
    return {"far": far, "outlier": outlier, "many_ties": many_ties, "tiny": tiny, "mixed": mixed}


HARD = hard_data()


def truth(query: np.ndarray, rows: np.ndarray, metric: Metric, k: int, names: np.ndarray) -> np.ndarray:
    return names[np.lexsort((names, exact_distances(query, rows[names], metric)))][:k]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", HARD)
def test_answers_are_those_of_exact_distances_on_hard_data(name: str, metric: Metric) -> None:
    rows = HARD[name]
    queries = np.concatenate([rows[:4] * np.float32(1.01), rows[100:102], NORMAL[:2]])
    found = ExactSearch(rows, metric).search(queries, 10)
    for i, query in enumerate(queries):
        best = truth(query, rows, metric, 10, np.arange(len(rows)))
        np.testing.assert_array_equal(found.labels[i], best)
        np.testing.assert_array_equal(found.distances[i], exact_distances(query, rows[best], metric))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", HARD)
def test_no_exact_distance_is_below_its_lower_bound(name: str, metric: Metric) -> None:
    rows = HARD[name]
    queries = np.concatenate([rows[:6], NORMAL[:6]])
    sides = unit(queries) if metric == "cosine" else queries
    bounds = lower_bounds(sides, row_norms(queries), rows, row_norms(rows), metric)
    for query, row in zip(queries, bounds, strict=True):
        assert (exact_distances(query, rows, metric) >= row).all()


@pytest.mark.parametrize("metric", METRICS)
def test_the_answer_does_not_depend_on_batch_or_blocks(metric: Metric, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, queries = HARD["many_ties"], NORMAL[:40]
    whole = ExactSearch(rows, metric).search(queries, 7)
    monkeypatch.setattr(blocks, "MAX_BLOCK_ROWS", 37)
    monkeypatch.setattr(exact_search, "QUERY_BLOCK", 3)
    parts = ExactSearch(rows, metric)
    np.testing.assert_array_equal(parts.search(queries, 7).labels, whole.labels)
    for i in range(5):
        np.testing.assert_array_equal(parts.search(queries[i : i + 1], 7).labels[0], whole.labels[i])


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("share", [0.003, 0.4, 1.0])
def test_a_mask_is_a_smaller_array(metric: Metric, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "MAX_BLOCK_ROWS", 100)
    mask = RNG.random(2000) < share
    found = ExactSearch(NORMAL, metric).search(NORMAL[:3], 9, allowed=mask)
    names = np.flatnonzero(mask)
    for i in range(3):
        best = truth(NORMAL[i], NORMAL, metric, 9, names)
        np.testing.assert_array_equal(found.labels[i][: len(best)], best)
        assert (found.labels[i][len(best) :] == -1).all()
    assert (found.visited == len(names)).all()
    assert not found.stopped.any()


def test_zero_rows_have_cosine_distance_one() -> None:
    rows = np.concatenate([np.zeros((2, 24), dtype=np.float32), NORMAL[:3], -NORMAL[:3]])
    found = ExactSearch(rows, "cosine").search(NORMAL[:1], 8)
    assert found.distances[0][[list(found.labels[0]).index(label) for label in (0, 1)]].tolist() == [1.0, 1.0]


def test_max_visited_compares_the_first_rows_and_says_so() -> None:
    found = ExactSearch(NORMAL, "l2").search(NORMAL[:2], 5, limit=Limit(max_visited=300))
    assert found.visited.tolist() == [300, 300]
    assert found.stopped.all()
    np.testing.assert_array_equal(found.labels[1], truth(NORMAL[1], NORMAL, "l2", 5, np.arange(300)))
    whole = ExactSearch(NORMAL, "l2").search(NORMAL[:2], 5, limit=Limit(max_visited=2000))
    assert not whole.stopped.any()


def test_a_deadline_cuts_between_blocks_and_the_answer_is_of_what_was_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "MAX_BLOCK_ROWS", 100)
    looks = iter([False, False, False, True, True, True])
    monkeypatch.setattr(Limit, "expired", lambda self: next(looks))
    found = ExactSearch(NORMAL, "ip").search(NORMAL[:1], 5, limit=Limit(deadline=1.0))
    assert (found.visited.tolist(), found.stopped.tolist()) == ([300], [True])
    np.testing.assert_array_equal(found.labels[0], truth(NORMAL[0], NORMAL, "ip", 5, np.arange(300)))


def test_a_deadline_in_the_past_gives_nothing_and_says_so() -> None:
    found = ExactSearch(NORMAL, "l2").search(NORMAL[:1], 5, limit=Limit(deadline=time.monotonic() - 1))
    assert (found.labels == -1).all()
    assert (found.visited.tolist(), found.stopped.tolist()) == ([0], [True])


def test_a_deadline_reached_before_ties_are_settled_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = iter([False, True])
    monkeypatch.setattr(Limit, "expired", lambda self: next(looks))
    found = ExactSearch(HARD["many_ties"], "l2").search(NORMAL[:1], 5, limit=Limit(deadline=1.0))
    assert (found.visited.tolist(), found.stopped.tolist()) == ([2000], [True])
    assert (found.labels >= 0).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_mapped_rows_of_either_type_are_searched_block_by_block(
    dtype: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "MAX_BLOCK_BYTES", 4096)
    np.save(tmp_path / "v.npy", NORMAL.astype(dtype))
    mapped = np.load(tmp_path / "v.npy", mmap_mode="r")
    found = ExactSearch(mapped, "cosine").search(NORMAL[:2], 6)
    for i in range(2):
        np.testing.assert_array_equal(found.labels[i], truth(NORMAL[i], mapped, "cosine", 6, np.arange(2000)))
