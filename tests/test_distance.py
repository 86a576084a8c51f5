"""The definition of each metric holds at its edges, and fast forms stay close to it."""

from __future__ import annotations

import numpy as np
import pytest

from vecsvc.distance import approximate_distances, check_vector, exact_distances, score, unit
from vecsvc.errors import InvalidVector
from vecsvc.types import MAX_ABS, METRICS, Metric

RNG = np.random.default_rng(4)
ROWS = RNG.standard_normal((300, 33)).astype(np.float32)
QUERIES = RNG.standard_normal((9, 33)).astype(np.float32)


def test_distances_are_what_the_words_say() -> None:
    q, rows = np.array([1.0, 0.0], dtype=np.float32), np.array([[1, 0], [0, 2], [-3, 0], [0, 0]], dtype=np.float32)
    assert exact_distances(q, rows, "l2").tolist() == [0.0, 5.0, 16.0, 1.0]
    assert exact_distances(q, rows, "ip").tolist() == [0.0, 1.0, 4.0, 1.0]
    assert exact_distances(q, rows, "cosine").tolist() == [0.0, 1.0, 2.0, 1.0]


@pytest.mark.parametrize("metric", METRICS)
def test_a_pair_has_the_same_distance_whatever_stands_beside_it(metric: Metric) -> None:
    together = exact_distances(QUERIES[0], ROWS, metric)
    alone = np.concatenate([exact_distances(QUERIES[0], ROWS[i : i + 1], metric) for i in range(len(ROWS))])
    np.testing.assert_array_equal(together, alone)


@pytest.mark.parametrize("metric", METRICS)
def test_float16_rows_count_as_the_values_they_hold(metric: Metric) -> None:
    half = ROWS.astype(np.float16)
    np.testing.assert_array_equal(
        exact_distances(QUERIES[0], half, metric), exact_distances(QUERIES[0], half.astype(np.float32), metric)
    )


@pytest.mark.parametrize("metric", METRICS)
def test_products_are_close_to_exact_distances(metric: Metric) -> None:
    queries, rows = (unit(QUERIES), unit(ROWS)) if metric == "cosine" else (QUERIES, ROWS)
    fast = approximate_distances(queries, rows, metric, np.einsum("ij,ij->i", rows, rows))
    exact = np.stack([exact_distances(q, ROWS, metric) for q in QUERIES])
    np.testing.assert_allclose(fast, exact, atol=2e-4)
    assert metric != "l2" or (fast >= 0).all()


def test_unit_rows_have_length_one_however_long_they_were_and_zeros_stay() -> None:
    scales = np.array([1e-40, 1e-20, 1.0, 1e15, 0.0], dtype=np.float32)[:, None]
    lengths = np.linalg.norm(unit(ROWS[:5] * scales).astype(np.float64), axis=1)
    np.testing.assert_allclose(lengths, [1, 1, 1, 1, 0], atol=1e-5)
    assert unit(ROWS.astype(np.float16)).dtype == np.float32


def test_a_greater_score_is_better() -> None:
    distances = np.array([0.0, 0.5, 2.0], dtype=np.float32)
    assert score(distances, "l2").tolist() == [0.0, -0.5, -2.0]
    for metric in ("ip", "cosine"):
        assert score(distances, metric).tolist() == [1.0, 0.5, -1.0]  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 2 * MAX_ABS])
def test_what_cannot_be_ranked_is_refused_with_its_place_and_the_bound(value: float) -> None:
    vector = np.ones(4, dtype=np.float32)
    vector[2] = value
    with pytest.raises(InvalidVector, match=r"v\[2\] is .*finite and within ±1e\+15"):
        check_vector(vector, "l2", "v")


def test_what_can_be_ranked_passes() -> None:
    for metric in METRICS:
        check_vector(np.full(4, MAX_ABS, dtype=np.float32), metric)
        check_vector(np.full(4, 1e-40, dtype=np.float32), metric)
    check_vector(np.zeros(4, dtype=np.float32), "l2")
    with pytest.raises(InvalidVector, match="no direction"):
        check_vector(np.zeros(4, dtype=np.float32), "cosine")
