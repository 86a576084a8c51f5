"""What is particular to KD-trees: exact under every metric, and no array reaches their C loops unchecked."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import index_builders
from vecsvc import indexes
from vecsvc.distance import exact_distances
from vecsvc.errors import ArtifactDamaged, ArtifactUnfit, InvalidParameter
from vecsvc.indexes import kd_tree
from vecsvc.types import METRICS, Limit, Metric

RNG = np.random.default_rng(8)
VECTORS = (RNG.standard_normal((900, 6)) * 10.0 ** RNG.uniform(-2, 2, (900, 1))).astype(np.float32)


def build(vectors: np.ndarray = VECTORS, metric: Metric = "l2", leaf_size: int = 20) -> Any:
    return index_builders.build(vectors, kind="kd_tree", metric=metric, params={"leaf_size": leaf_size})


def check(index: Any, vectors: np.ndarray, queries: np.ndarray, k: int) -> Any:
    found = index.search(queries, k)
    for row, query in enumerate(queries):
        distances = exact_distances(query, vectors, index.spec.metric)
        best = np.lexsort((np.arange(len(vectors)), distances))[:k]
        np.testing.assert_array_equal(found.labels[row], best)
        np.testing.assert_array_equal(found.distances[row], distances[best])
    return found


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("leaf_size", [1, 20, 5000])
def test_answers_are_exact_over_lengths_from_short_to_long(metric: Metric, leaf_size: int) -> None:
    queries = np.concatenate([VECTORS[:10], RNG.standard_normal((10, 6)).astype(np.float32) * np.float32(1e-3)])
    found = check(build(metric=metric, leaf_size=leaf_size), VECTORS, queries, 10)
    assert (found.visited == -1).sum() >= 15  # nearly all of them by the tree itself


@pytest.mark.parametrize("metric", METRICS)
def test_ties_that_run_on_are_settled_by_comparing_all(metric: Metric) -> None:
    vectors = np.concatenate([VECTORS[:200], np.repeat(VECTORS[:1], 100, axis=0), np.zeros((30, 6), dtype=np.float32)])
    found = check(build(vectors, metric), vectors, VECTORS[:3] * np.float32(2), 10)
    assert metric == "ip" or found.visited[0] == len(vectors)


def test_a_limit_leaves_ties_unsettled_and_says_so() -> None:
    vectors = np.concatenate([VECTORS[:200], np.repeat(VECTORS[:1], 100, axis=0)])
    found = build(vectors).search(VECTORS[:2], 10, limit=Limit(deadline=time.monotonic() - 1))
    assert found.stopped.tolist() == [True, False]
    assert (found.labels >= 0).all()
    assert (found.distances[0] == 0).all()


def test_a_zero_query_ties_with_everything_under_ip() -> None:
    found = check(build(metric="ip"), VECTORS, np.zeros((1, 6), dtype=np.float32), 5)
    assert found.labels[0].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("metric", METRICS)
def test_vectors_of_zeros_only_are_ties(metric: Metric) -> None:
    vectors = np.zeros((50, 6), dtype=np.float32)
    found = check(build(vectors, metric), vectors, VECTORS[:2], 4)
    assert found.labels.tolist() == [[0, 1, 2, 3]] * 2


def test_many_dimensions_are_slow_but_right() -> None:
    vectors = RNG.standard_normal((500, 200)).astype(np.float32)
    check(build(vectors, "cosine"), vectors, vectors[:5] + np.float32(0.1), 7)


def test_leaf_size_has_bounds() -> None:
    with pytest.raises(InvalidParameter, match="leaf_size must be between 1 and"):
        build(leaf_size=0)


# ------------------------------------------------------------------------------------------- damaged files


def edited(name: str, change: Callable[[np.ndarray], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        array = np.load(folder / name)
        result = change(array)
        np.save(folder / name, array if result is None else result)

    return edit


def put(*at: int, value: int) -> Callable[[np.ndarray], None]:
    def change(array: np.ndarray) -> None:
        array[at] = value

    return change


DAMAGE = {
    "order-repeats": (kd_tree.ORDER, put(0, value=5), "is no permutation of 0 to 899"),
    "order-beyond": (kd_tree.ORDER, put(3, value=10**9), "is no permutation"),
    "order-short": (kd_tree.ORDER, lambda a: a[:-1], "has shape"),
    "order-type": (kd_tree.ORDER, lambda a: a.astype(np.int32), "holds int32"),
    "nodes-end-beyond": (kd_tree.NODES, put(-1, 1, value=10**6), "do not share out 900 places"),
    "nodes-start-below": (kd_tree.NODES, put(0, 0, value=-8), "do not share out"),
    "nodes-last-not-leaf": (kd_tree.NODES, put(-1, 2, value=0), "do not share out"),
    "nodes-backwards": (kd_tree.NODES, put(3, 0, value=899), "do not share out"),
    "nodes-none": (kd_tree.NODES, lambda a: a[:0], "kd_tree_bounds.npy: has shape"),
    "nodes-columns": (kd_tree.NODES, lambda a: a[:, :3], "has shape"),
    "bounds-short": (kd_tree.BOUNDS, lambda a: a[:, :-1], "has shape"),
    "bounds-dim": (kd_tree.BOUNDS, lambda a: a[:, :, :-1], "has shape"),
}


@pytest.mark.parametrize("mmap", [True, False], ids=["mmapped", "loaded"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_arrays_are_refused_by_name(damage: str, mmap: bool, tmp_path: Path) -> None:
    name, change, shown = DAMAGE[damage]
    index = build()
    index.save(tmp_path)
    edited(name, change)(tmp_path)
    with pytest.raises(ArtifactDamaged, match=shown) as caught:
        indexes.load(tmp_path, index.spec, vectors=VECTORS, mmap=mmap)
    assert str(tmp_path) in str(caught.value)


def test_a_scikit_learn_that_lays_trees_out_differently_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = build()
    index.save(tmp_path)
    monkeypatch.setattr(kd_tree, "_NODE", np.dtype([("idx_start", "<i8"), ("rest", "V24")]))
    with pytest.raises(ArtifactUnfit, match="build the index again"):
        indexes.load(tmp_path, index.spec, vectors=VECTORS)


def test_no_file_holds_the_vectors_again(tmp_path: Path) -> None:
    build().save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [kd_tree.BOUNDS, kd_tree.NODES, kd_tree.ORDER]
