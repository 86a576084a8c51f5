"""Selection and merging: ties go to the smaller label, empty places and repeats are dropped."""

from __future__ import annotations

import numpy as np
import pytest

from vecsvc.distance import exact_distances
from vecsvc.ranking import merge_top_k, pad, recall, top_k


def distances(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def test_top_k_orders_by_distance_then_label() -> None:
    labels, found = top_k(distances(3, 1, 2, 1, 1), 3)
    assert (labels.tolist(), found.tolist()) == ([1, 3, 4], [1, 1, 1])
    labels, _ = top_k(distances(3, 1, 2, 1, 1), 2, np.array([9, 8, 7, 6, 5]))
    assert labels.tolist() == [5, 6]


@pytest.mark.parametrize("k", [1, 7, 50, 80])
def test_top_k_is_a_stable_sort_cut_short(k: int) -> None:
    values = np.random.default_rng(1).integers(0, 9, 50).astype(np.float32)
    labels, found = top_k(values, k)
    order = np.argsort(values, kind="stable")[:k]
    np.testing.assert_array_equal(labels, order)
    np.testing.assert_array_equal(found, values[order])


def test_pad_fills_with_minus_one_at_infinity() -> None:
    labels, found = pad(np.array([4]), distances(0.5), 3)
    assert (labels.tolist(), found.tolist()) == ([4, -1, -1], [0.5, np.inf, np.inf])


def test_merge_takes_the_best_of_all_shards_and_ties_by_row() -> None:
    rows = np.array([10, 30, 50, 5, 20, 40])
    assert merge_top_k(distances(1, 2, 3, 1, 2, 4), rows, 4).tolist() == [3, 0, 4, 1]


def test_merge_drops_empty_places_and_counts_a_repeated_row_once_where_it_is_closest() -> None:
    rows = np.array([7, 9, -1, 7, 8, 9])
    assert merge_top_k(distances(1, 4, np.inf, 1, 2, 3), rows, 5).tolist() == [0, 4, 5]
    assert merge_top_k(distances(1, 4, np.inf, 1, 2, 3), rows, 2).tolist() == [0, 4]


def test_recall_counts_ties_as_hits() -> None:
    bounds = distances(2, 1)
    assert recall(np.stack([distances(1, 2), distances(1, 1)]), bounds).tolist() == [1.0, 1.0]
    assert recall(np.stack([distances(1, 3), distances(np.inf, np.inf)]), bounds).tolist() == [0.5, 0.0]
    assert recall(np.stack([distances(2 + 1e-6, 2), distances(1 + 5e-6, 0)]), bounds).tolist() == [1.0, 0.5]


@pytest.mark.parametrize("scale", [1e-4, 1e-2, 1.0, 1e4])
def test_recall_tells_neighbours_apart_however_near_they_are(scale: float) -> None:
    vectors = np.random.default_rng(1).standard_normal((400, 12)).astype(np.float32) * np.float32(scale)
    each = []
    for query in vectors[:20]:
        distances = np.sort(exact_distances(query, vectors, "l2"))
        # Of the ten nearest the fifth is missing, and the eleventh in its place.
        each.append(recall(np.delete(distances, 4)[None, :10], distances[9:10])[0])
    assert each == [0.9] * 20


def test_recall_forgives_rounding_and_ties() -> None:
    bounds = np.array([0.5, 0.0, -3.0], np.float32)
    found = np.stack([np.full(4, 0.5), np.full(4, 1e-14), np.full(4, -3.0)]).astype(np.float32)
    assert recall(found, bounds).tolist() == [1, 1, 1]
    found[0, 0], found[2, 0] = np.nextafter(np.float32(0.5), np.float32(1)), np.nextafter(np.float32(-3), np.float32(0))
    assert recall(found, bounds).tolist() == [1, 1, 1]
    found[:, 3] = np.inf
    assert recall(found, bounds).tolist() == [0.75, 0.75, 0.75]
