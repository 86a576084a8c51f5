"""Selection and merging: ties go to the smaller label, empty places and repeats are dropped."""

from __future__ import annotations

import numpy as np
import pytest

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
    assert recall(np.stack([distances(2 + 5e-6, 2), distances(1 + 5e-5, 0)]), bounds).tolist() == [1.0, 0.5]
