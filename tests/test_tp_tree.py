"""What is particular to trinary-projection trees: how they divide, what a search compares, and no array unchecked."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import index_builders
from index_builders.tp_tree import grow, partition
from vecsvc import indexes, machine_code
from vecsvc.distance import exact_distances
from vecsvc.errors import ArtifactDamaged, InvalidParameter
from vecsvc.indexes import tp_tree
from vecsvc.indexes import tp_tree_layout as layout
from vecsvc.types import METRICS, Limit, Metric, Neighbors

RNG = np.random.default_rng(9)
CENTRES = RNG.standard_normal((40, 24)).astype(np.float32)
POINTS = (CENTRES[RNG.integers(0, 40, 1500)] + 0.4 * RNG.standard_normal((1500, 24))).astype(np.float32)
VECTORS, QUERIES = POINTS[:1400] * RNG.uniform(0.5, 2, (1400, 1)).astype(np.float32), POINTS[1400:]
DTYPES = (np.float32, np.float16, np.int8)


def points(dtype: type, rows: np.ndarray = POINTS) -> np.ndarray:
    made = np.clip(rows * 25, -127, 127).astype(dtype) if dtype is np.int8 else rows.astype(dtype)
    made.flags.writeable = False
    return made


def divided(rows: np.ndarray, leaf_size: int = 32, seed: int = 3, top: int = 5) -> tuple[np.ndarray, np.ndarray]:
    return partition(rows, leaf_size=leaf_size, n_samples=200, n_top_dims=top, rng=np.random.default_rng(seed))


def build(vectors: np.ndarray = VECTORS, metric: Metric = "l2", num_threads: int = 2, **params: int) -> Any:
    params = {"leaf_size": 20, "n_trees": 4, **params}
    return index_builders.build(vectors, kind="tp_tree", metric=metric, params=params, num_threads=num_threads)


def search(index: Any, max_check: int, queries: np.ndarray = QUERIES, k: int = 10, **options: Any) -> Neighbors:
    found: Neighbors = index.search(queries, k, indexes.search_params("tp_tree", max_check=max_check), **options)
    return found


def recall(found: Neighbors, vectors: np.ndarray, metric: Metric, queries: np.ndarray = QUERIES) -> float:
    hits = []
    for query, labels in zip(queries, found.labels, strict=True):
        distances = exact_distances(query, vectors, metric)
        hits.append(distances[labels] <= np.sort(distances)[len(labels) - 1] + 1e-5)
    return float(np.mean(hits))


# ------------------------------------------------------------------------------------------------- division


@pytest.mark.parametrize("leaf_size", [1, 7, 32, 1499, 1500, 4000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_leaves_share_out_all_rows_and_are_as_full_as_they_may_be(dtype: type, leaf_size: int) -> None:
    order, starts = divided(points(dtype), leaf_size)
    assert (order.dtype, starts.dtype) == (np.int32, np.int64)
    np.testing.assert_array_equal(np.sort(order), np.arange(1500))
    assert (len(starts) - 1, starts[0], starts[-1]) == (-(-1500 // leaf_size), 0, 1500)
    sizes = np.diff(starts)
    assert sizes.min() >= 1 and sizes.max() <= leaf_size
    for start, stop in itertools.pairwise(starts):
        assert (np.diff(order[start:stop]) > 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_leaves_hold_neighbours(dtype: type) -> None:
    rows = points(dtype)
    order, starts = divided(rows)
    leaf = np.empty(1500, dtype=int)
    leaf[order] = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    wide = rows.astype(np.float32)
    squares = ((wide[:300, None] - wide) ** 2).sum(axis=2)
    squares[np.arange(300), np.arange(300)] = np.inf
    # By chance it would be one of fifty.
    assert np.mean(leaf[squares.argmin(axis=1)] == leaf[:300]) > 0.3


def test_the_seed_decides_the_tree_also_where_threads_grow_several() -> None:
    rows = points(np.float32)
    with ThreadPoolExecutor(4) as threads:
        grown = list(threads.map(lambda seed: divided(rows, seed=seed)[0], [3, 3, 4, 3, 4, 5]))
    for one, other in ((0, 1), (0, 3), (2, 4)):
        np.testing.assert_array_equal(grown[one], grown[other])
    assert not np.array_equal(grown[0], grown[2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_processors_grow_the_same_tree(dtype: type, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, expected = points(dtype), divided(points(dtype))
    for path in machine_code.PATHS[machine_code.PATHS.index(machine_code.best_path()) :]:
        monkeypatch.setattr(machine_code, "best_path", lambda path=path: path)
        order, starts = divided(rows)
        np.testing.assert_array_equal(order, expected[0])
        np.testing.assert_array_equal(starts, expected[1])


@pytest.mark.parametrize("dim", [1, 2, 5, 8])
@pytest.mark.parametrize("far", [0.0, 300.0])
def test_the_direction_is_the_one_of_largest_variance_that_signs_can_make(dim: int, far: float) -> None:
    rng = np.random.default_rng(dim)
    rows = (rng.standard_normal((600, dim)) @ rng.standard_normal((dim, dim)) + far).astype(np.float32)
    order, starts, nodes = grow(rows, leaf_size=400, n_samples=600, n_top_dims=dim, rng=rng)
    covariance = np.cov(rows.astype(np.float64).T).reshape(dim, dim)
    signs = np.zeros(dim)
    codes = nodes[0, :dim][nodes[0, :dim] != 0]
    signs[np.abs(codes) - 1] = np.sign(codes)
    reached = signs @ covariance @ signs / (signs @ signs)
    every = [np.array(w) for w in itertools.product((-1, 0, 1), repeat=dim) if any(w)]
    assert reached >= covariance.diagonal().max() * (1 - 1e-5)
    assert reached >= max(w @ covariance @ w / (w @ w) for w in every) * (1 - 1e-5)
    projected = rows @ signs.astype(np.float32)
    threshold = nodes[0, dim : dim + 1].view(np.float32)[0]
    assert projected[order[: starts[1]]].max() <= threshold <= projected[order[starts[1] :]].min()
    assert nodes[0, dim + 1 :].tolist() == [~0, ~1]


def test_one_axis_makes_a_kd_tree() -> None:
    nodes = build(n_top_dims=1)._forest.nodes
    assert nodes.shape[1] == 1 + layout.NODE_SLOTS
    assert set(nodes[:, 0].tolist()) <= set(range(1, 25))


@pytest.mark.parametrize(
    "rows",
    [
        np.zeros((100, 3), dtype=np.float32),
        np.ones((100, 1), dtype=np.float16),
        np.arange(100, dtype=np.int8)[:, None],
        np.repeat(np.eye(4, dtype=np.float32) * np.float32(1e15), 25, axis=0),
        np.eye(100, 5, dtype=np.float32) * np.float32(1e-30),
        np.full((100, 2), np.nan, dtype=np.float32),
    ],
    ids=["zeros", "constant", "one-dim", "huge-duplicates", "tiny", "nan"],
)
def test_rows_that_hardly_differ_are_shared_out_all_the_same(rows: np.ndarray) -> None:
    order, starts = divided(rows, leaf_size=8)
    np.testing.assert_array_equal(np.sort(order), np.arange(100))
    assert len(starts) == 14 and np.diff(starts).max() <= 8


def test_points_that_no_tree_can_stand_over_are_refused() -> None:
    for rows in (POINTS.astype(np.float64), POINTS.T, POINTS[0], POINTS[:0]):
        with pytest.raises(InvalidParameter, match="points"):
            divided(rows)
    with pytest.raises(InvalidParameter, match="leaf_size 0"):
        divided(POINTS, leaf_size=0)
    with pytest.raises(InvalidParameter, match="n_top_dims must be between 1 and 8, got 9"):
        divided(POINTS, top=9)


# --------------------------------------------------------------------------------------------------- search


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("metric", METRICS)
def test_recall_rises_with_max_check_and_is_whole_when_all_are_compared(metric: Metric, dtype: type) -> None:
    vectors = VECTORS.astype(dtype)
    index = build(vectors, metric)
    reached = []
    for max_check in (20, 100, 400, 1400):
        found = search(index, max_check)
        reached.append(recall(found, vectors, metric))
        assert (found.visited == max_check).all() and not found.stopped.any()
        true = np.stack([exact_distances(q, vectors[i], metric) for q, i in zip(QUERIES, found.labels, strict=True)])
        np.testing.assert_allclose(found.distances, true, rtol=1e-4, atol=1e-4)
    assert reached == sorted(reached)
    assert reached[1] > 0.35 and reached[3] == 1.0


def test_more_trees_reach_more_at_the_same_max_check() -> None:
    few, many = (recall(search(build(n_trees=trees), 100), VECTORS, "l2") for trees in (1, 16))
    assert many > few


def test_at_least_k_are_compared_and_never_more_than_there_are() -> None:
    assert search(build(), 1, k=25).visited.tolist() == [25] * 100
    found = search(build(VECTORS[:30]), 10_000, k=50)
    assert found.visited.tolist() == [30] * 100
    assert (found.labels[:, 30:] == -1).all() and np.isposinf(found.distances[:, 30:]).all()


@pytest.mark.parametrize("metric", METRICS)
def test_vectors_that_hardly_differ_are_found_in_the_order_of_labels(metric: Metric) -> None:
    for vectors in (np.ones((90, 3)), np.ones((50, 1)), np.ones((1, 24)), np.eye(60, 7)):
        vectors = vectors.astype(np.float32)
        queries = np.ones((3, vectors.shape[1]), dtype=np.float32)
        found = search(build(vectors, metric), 1000, queries, k=len(vectors))
        for query, labels in zip(queries, found.labels, strict=True):
            distances = exact_distances(query, vectors, metric)
            np.testing.assert_array_equal(labels, np.lexsort((np.arange(len(vectors)), distances.round(5))))


def test_vectors_of_zeros_are_at_cosine_distance_1_and_tiny_ones_are_not() -> None:
    vectors = np.concatenate([VECTORS[:50], np.zeros((2, 24), dtype=np.float32), VECTORS[:50] * np.float32(1e-25)])
    found = search(build(vectors, "cosine"), 1000, VECTORS[:1], k=102)
    assert found.distances[0][np.isin(found.labels[0], [50, 51])].tolist() == [1.0, 1.0]
    assert set(found.labels[0, :2].tolist()) == {0, 52}


@pytest.mark.parametrize("share", [0.5, 0.05, 0.003])
@pytest.mark.parametrize("metric", METRICS)
def test_a_mask_is_passed_by_and_not_compared(metric: Metric, share: float) -> None:
    mask = np.random.default_rng(1).random(1400) < share
    count = int(mask.sum())
    found = search(build(metric=metric), 40, allowed=mask)
    assert found.visited.tolist() == [min(count, 40)] * 100
    assert mask[found.labels[found.labels >= 0]].all()
    assert ((found.labels >= 0).sum(axis=1) == min(count, 10)).all()
    whole = search(build(metric=metric), 1400, allowed=mask)
    assert whole.visited.tolist() == [count] * 100
    allowed = np.flatnonzero(mask)
    for query, distances in zip(QUERIES, whole.distances, strict=True):
        nearest = np.sort(exact_distances(query, VECTORS[allowed], metric))[:10]
        np.testing.assert_allclose(distances[: len(nearest)], nearest, rtol=1e-4, atol=1e-4)


def test_limits_cut_a_search_short_and_it_says_so() -> None:
    index = build()
    found = search(index, 500, limit=Limit(max_visited=60))
    assert found.stopped.all() and (found.visited == 60).all()
    assert not search(index, 60, limit=Limit(max_visited=60)).stopped.any()
    found = search(index, 500, limit=Limit(deadline=time.monotonic() - 1), num_threads=2)
    assert found.stopped.all() and (found.labels == -1).all() and (found.visited == 0).all()
    assert not search(index, 500, limit=Limit(deadline=time.monotonic() + 60)).stopped.any()
    # A mask that leaves nothing near would otherwise have all leaves looked at.
    none_near = np.zeros(1400, dtype=bool)
    none_near[-1] = True
    soon = search(index, 500, limit=Limit(deadline=time.monotonic() + 1e-5), allowed=none_near)
    assert soon.stopped.any()


def test_threads_and_used_workspaces_change_no_answer() -> None:
    index = build()
    many = np.concatenate([QUERIES] * 4)
    whole = search(index, 100, many)
    for threads in (2, 5):
        again = search(index, 100, many, num_threads=threads)
        np.testing.assert_array_equal(whole.labels, again.labels)
        np.testing.assert_array_equal(whole.distances, again.distances)
    # The marks of labels met are wiped after 255 searches; these were 1,200 in one workspace or another.
    np.testing.assert_array_equal(whole.labels[:100], whole.labels[300:])
    for i in (0, 57):
        np.testing.assert_array_equal(search(index, 100, many[i : i + 1]).labels[0], whole.labels[i])


@pytest.mark.parametrize("metric", METRICS)
def test_all_processors_find_the_same(metric: Metric, monkeypatch: pytest.MonkeyPatch) -> None:
    for vectors in (VECTORS, VECTORS.astype(np.float16)):
        expected = search(build(vectors, metric), 200)
        for path in machine_code.PATHS[machine_code.PATHS.index(machine_code.best_path()) + 1 :]:
            with monkeypatch.context() as patched:
                patched.setattr(machine_code, "best_path", lambda path=path: path)
                found = search(build(vectors, metric), 200)
            np.testing.assert_allclose(found.distances, expected.distances, rtol=1e-4, atol=1e-4)
            assert np.mean(found.labels == expected.labels) > 0.99


def test_the_number_of_threads_changes_no_tree(tmp_path: Path) -> None:
    for threads in (1, 3):
        (tmp_path / str(threads)).mkdir()
        build(metric="ip", num_threads=threads).save(tmp_path / str(threads))
    for name in (tp_tree.NODES, tp_tree.ORDER, tp_tree.STARTS):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "3" / name).read_bytes()


def test_parameters_have_bounds() -> None:
    for name, value in (("n_trees", 0), ("leaf_size", 0), ("n_samples", 1), ("n_top_dims", 9)):
        with pytest.raises(InvalidParameter, match=f"{name} must be between"):
            build(**{name: value})
    many = np.broadcast_to(np.zeros(1, dtype=np.float32), (2**23, 1))
    with pytest.raises(InvalidParameter, match="leaves, fewer than 2147483648 can be counted"):
        build(many, n_trees=256, leaf_size=1)


# ------------------------------------------------------------------------------------------- damaged files


def edited(name: str, change: Callable[[np.ndarray], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        array = np.load(folder / name)
        result = change(array)
        np.save(folder / name, array if result is None else result)

    return edit


def put(*at: int, value: float) -> Callable[[np.ndarray], None]:
    def change(array: np.ndarray) -> None:
        array[at] = value

    return change


NAN_BITS = int(np.array(np.nan, dtype=np.float32).view(np.int32))
DAMAGE = {
    "nodes-axis-beyond": (tp_tree.NODES, put(5, 0, value=25), "names axes beyond 24"),
    "nodes-axis-below": (tp_tree.NODES, put(5, 1, value=-(2**31)), "names axes beyond 24"),
    "nodes-threshold": (tp_tree.NODES, put(0, 5, value=NAN_BITS), "thresholds that are not finite"),
    "nodes-child-beyond": (tp_tree.NODES, put(-1, 6, value=10**6), "do not make 4 trees of 70 leaves"),
    "nodes-child-below": (tp_tree.NODES, put(-1, 6, value=-(10**6)), "do not make 4 trees"),
    "nodes-circle": (tp_tree.NODES, put(1, 6, value=0), "do not make 4 trees"),
    "nodes-self": (tp_tree.NODES, put(0, 6, value=0), "do not make 4 trees"),
    "nodes-twice": (tp_tree.NODES, put(0, 6, value=2), "do not make 4 trees"),
    "nodes-other-tree": (tp_tree.NODES, put(0, 6, value=80), "do not make 4 trees"),
    "nodes-short": (tp_tree.NODES, lambda a: a[:-1], "has shape"),
    "nodes-columns": (tp_tree.NODES, lambda a: a[:, :-1], "has shape"),
    "order-repeats": (tp_tree.ORDER, put(2, 0, value=5), "is no permutation of 0 to 1399"),
    "order-beyond": (tp_tree.ORDER, put(3, 3, value=10**9), "is no permutation"),
    "order-below": (tp_tree.ORDER, put(3, 3, value=-1), "is no permutation"),
    "order-type": (tp_tree.ORDER, lambda a: a.astype(np.int64), "holds int64"),
    "starts-backwards": (tp_tree.STARTS, put(3, value=10**6), "do not share out 1400 places"),
    "starts-beyond": (tp_tree.STARTS, put(-1, value=10**6), "do not share out 1400 places"),
    "starts-below": (tp_tree.STARTS, put(0, value=-1), "do not share out"),
    "starts-across": (tp_tree.STARTS, lambda a: a + (a == 1400), "do not share out"),
    "norms-infinite": (tp_tree.INVERSE_NORMS, put(3, value=np.inf), "cannot be 1 / a length"),
    "norms-negative": (tp_tree.INVERSE_NORMS, put(3, value=-1), "cannot be 1 / a length"),
    "norms-short": (tp_tree.INVERSE_NORMS, lambda a: a[:-1], "has shape"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, bytes]]:
    folder = tmp_path_factory.mktemp("saved")
    index = build(metric="cosine")
    index.save(folder)
    return index.spec, {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("mmap", [True, False], ids=["mmapped", "loaded"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_arrays_are_refused_by_name(damage: str, mmap: bool, saved: Any, tmp_path: Path) -> None:
    spec, files = saved
    for file, content in files.items():
        (tmp_path / file).write_bytes(content)
    name, change, shown = DAMAGE[damage]
    indexes.load(tmp_path, spec, vectors=VECTORS, mmap=mmap)
    edited(name, change)(tmp_path)
    with pytest.raises(ArtifactDamaged, match=shown) as caught:
        indexes.load(tmp_path, spec, vectors=VECTORS, mmap=mmap)
    assert name in str(caught.value)


def test_a_missing_file_is_named(saved: Any, tmp_path: Path) -> None:
    spec, files = saved
    for file, content in files.items():
        if file != tp_tree.STARTS:
            (tmp_path / file).write_bytes(content)
    with pytest.raises(ArtifactDamaged, match=tp_tree.STARTS):
        indexes.load(tmp_path, spec, vectors=VECTORS)
