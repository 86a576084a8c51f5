"""What is particular to `nng`: recall over awkward data, filters, limits, files. Brute force is the oracle."""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import index_builders
from vecsvc import indexes
from vecsvc.distance import exact_distances, unit
from vecsvc.errors import ArtifactDamaged, DimensionMismatch, InvalidParameter, InvalidVector
from vecsvc.indexes import nng
from vecsvc.indexes import nng_layout as at
from vecsvc.types import METRICS, WAYS, Limit, Metric, Neighbors

SIZE, N_QUERIES, K = 3000, 60, 10


@functools.cache
def rows(dim: int, size: int = SIZE + N_QUERIES) -> np.ndarray:
    """Clusters in a space of at most 16 dimensions, and a little noise in all; the last are queries."""
    rng = np.random.default_rng(dim)
    inner = min(dim, 16)
    points = rng.standard_normal((40, inner))[rng.integers(0, 40, size)] + 0.5 * rng.standard_normal((size, inner))
    spread = points @ rng.standard_normal((inner, dim)) / np.sqrt(inner) + 0.1 * rng.standard_normal((size, dim))
    made = spread.astype(np.float32)
    made.flags.writeable = False
    return made


def split(both: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return both[:-N_QUERIES], both[-N_QUERIES:]


def build(vectors: np.ndarray, metric: Metric = "l2", num_threads: int = 2, seed: int = 7, **params: Any) -> Any:
    return index_builders.build(vectors, kind="nng", metric=metric, params=params, num_threads=num_threads, seed=seed)


@functools.cache
def built(dim: int, metric: Metric = "l2", rerank: str = "vectors") -> Any:
    return build(split(rows(dim))[0], metric, rerank=rerank)


def search(index: Any, queries: np.ndarray, k: int = K, ef_search: int = 64, **options: Any) -> Neighbors:
    found: Neighbors = index.search(queries, k, indexes.search_params("nng", ef_search=ef_search), **options)
    return found


def distances_of(queries: np.ndarray, vectors: np.ndarray, metric: Metric) -> np.ndarray:
    return np.stack([exact_distances(query, vectors, metric) for query in queries])


def recall(found: Neighbors, distances: np.ndarray, allowed: np.ndarray | None = None) -> float:
    """The share of places that hold something no farther than the k-th nearest."""
    if allowed is not None:
        distances = np.where(allowed, distances, np.inf)
    k = min(found.labels.shape[1], distances.shape[1])
    bounds = np.partition(distances, k - 1, axis=1)[:, k - 1 : k]
    mine = np.take_along_axis(distances, np.maximum(found.labels[:, :k], 0), axis=1)
    with np.errstate(invalid="ignore"):
        return float(np.mean((found.labels[:, :k] >= 0) & (mine <= bounds + 1e-5 * np.abs(bounds) + 1e-37)))


def same(one: Neighbors, other: Neighbors) -> None:
    for field in ("labels", "distances", "visited", "stopped"):
        np.testing.assert_array_equal(getattr(one, field), getattr(other, field))


def check_form(found: Neighbors, k: int, size: int) -> None:
    """Labels are distinct and in range, distances sorted, short rows end in -1 at +inf."""
    assert found.labels.shape[1] == found.distances.shape[1] == k
    assert not np.isnan(found.distances).any()
    assert (found.distances[:, 1:] >= found.distances[:, :-1]).all()
    np.testing.assert_array_equal(found.labels < 0, np.isposinf(found.distances))
    for labels in found.labels:
        real = labels[labels >= 0]
        assert len(set(real.tolist())) == len(real) and real.max(initial=0) < size


# -------------------------------------------------------------------------------------------------- recall


@pytest.mark.parametrize("dim", [8, 100, 130, 384])
@pytest.mark.parametrize("metric", METRICS)
def test_recall_is_high_at_the_default_breadth_and_rises_with_it(metric: Metric, dim: int) -> None:
    vectors, queries = split(rows(dim))
    distances = distances_of(queries, vectors, metric)
    found = [search(built(dim, metric), queries, ef_search=ef) for ef in (10, 32, 64, 256)]
    reached = [recall(one, distances) for one in found]
    assert reached[2] >= 0.97 and reached[3] >= 0.98
    assert reached[0] < reached[1] <= reached[3]
    visited = [one.visited.mean() for one in found]
    assert visited == sorted(visited) and found[0].visited.min() > 0 and found[3].visited.max() < 3 * SIZE
    for one in found:
        check_form(one, K, SIZE)
        mine = np.take_along_axis(distances, one.labels, axis=1)
        lengths = (queries**2).sum(axis=1)[:, None] + (vectors**2).sum(axis=1)[one.labels]
        assert (np.abs(one.distances - mine) <= 1e-6 * np.maximum(2.0, lengths)).all()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("rerank", "floor", "error"), [("float16", 0.97, 1e-3), ("none", 0.85, 1e-2)])
def test_compressed_vectors_keep_recall_and_distances_to_their_precision(
    metric: Metric, rerank: str, floor: float, error: float
) -> None:
    for dim in (100, 384):
        vectors, queries = split(rows(dim))
        index = built(dim, metric, rerank)
        distances = distances_of(queries, vectors, metric)
        found = search(index, queries)
        check_form(found, K, SIZE)
        assert not index.spec.exact_distances and recall(found, distances) >= floor
        mine = np.take_along_axis(distances, found.labels, axis=1)
        lengths = np.ones(1) if metric == "cosine" else (queries**2).sum(axis=1)[:, None]
        assert np.quantile(np.abs(found.distances - mine) / lengths, 0.99) <= error
        if rerank == "none":
            assert (found.distances >= 0).all() or metric != "l2"


@pytest.mark.parametrize("sphere", [False, True], ids=["clusters", "sphere"])
def test_the_longest_vectors_are_found_by_products_among_many_short_ones(sphere: bool) -> None:
    rng = np.random.default_rng(4)
    both = unit(rng.standard_normal((SIZE + N_QUERIES, 64)).astype(np.float32)) if sphere else rows(100)
    both = both * rng.lognormal(0, 1, (len(both), 1)).astype(np.float32)
    vectors, queries = split(both)
    found = search(build(vectors, "ip"), queries, ef_search=128)
    assert recall(found, distances_of(queries, vectors, "ip")) >= 0.95


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("islands", "apart", "ef_search", "degree"), [(600, 30, 64, 64), (150, 5, 64, 64), (30, 10, 64, 8)]
)
def test_every_vector_of_islands_far_apart_is_found(
    islands: int, apart: int, ef_search: int, degree: int, metric: Metric
) -> None:
    rng = np.random.default_rng(5)
    centres = np.repeat(rng.standard_normal((islands, 24)) * apart, SIZE // islands, axis=0)
    vectors = (centres + rng.standard_normal((SIZE, 24))).astype(np.float32)[rng.permutation(SIZE)]
    if metric == "ip":  # for which only vectors of one length are their own nearest
        vectors = unit(vectors)
    found = search(build(vectors, metric, degree=degree), vectors, 1, ef_search)
    assert np.mean(found.labels[:, 0] == np.arange(SIZE)) >= 0.99


# --------------------------------------------------------------------------------------------- what walks by


def tight(spread: float, size: int = 6000) -> np.ndarray:
    """Three clusters, in which a value's deviation is `spread` of that between them; the last rows are queries."""
    rng = np.random.default_rng(12)
    centres = rng.standard_normal((3, 40))[rng.integers(0, 3, size)]
    made: np.ndarray = (centres + spread * rng.standard_normal((size, 40))).astype(np.float32)
    return made


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("spread", [0.1, 0.01])
def test_neighbours_nearer_than_codes_can_tell_are_found(spread: float, metric: Metric) -> None:
    vectors, queries = split(tight(spread))
    index = build(vectors, metric)
    assert index.spec.params["walk"] == "vectors"
    found = search(index, queries)
    check_form(found, K, len(vectors))
    assert found.visited.mean() < len(vectors) / 2
    distances = distances_of(queries, vectors, metric)
    # An inner product's nearest in a cluster lie at its edge, where few edges lead.
    assert recall(found, distances) >= (0.9 if metric == "ip" else 0.97)
    if metric == "l2" and spread == 0.1:  # which is how it would be
        assert recall(search(build(vectors, metric, walk="codes"), queries), distances) < 0.6


@pytest.mark.parametrize("metric", METRICS)
def test_vectors_with_heavy_tails_keep_their_recall(metric: Metric) -> None:
    both = np.random.default_rng(13).standard_t(3, (6000, 40)).astype(np.float32)
    vectors, queries = split(both)
    found = search(build(vectors, metric), queries, ef_search=128)
    assert recall(found, distances_of(queries, vectors, metric)) >= 0.95


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("share", [0.5, 0.3])
def test_a_walk_by_vectors_honours_a_filter(share: float, metric: Metric) -> None:
    vectors, queries = split(tight(0.01, 12_000))
    index = build(vectors, metric, ef_construction=64)
    assert index.spec.params["walk"] == "vectors"
    allowed = np.random.default_rng(14).random(len(vectors)) < share
    found = search(index, queries, allowed=allowed)
    assert allowed[found.labels].all()
    assert (found.hops > 0).all() == (share == 0.5), "where fewer are allowed, all of them are compared"
    assert recall(found, distances_of(queries, vectors, metric), allowed) >= 0.95


@pytest.mark.parametrize("metric", METRICS)
def test_a_float16_copy_is_walked_where_it_tells_neighbours_apart_and_codes_do_not(metric: Metric) -> None:
    vectors, queries = split(tight(0.1))
    index = build(vectors, metric, rerank="float16")
    assert index.spec.params["walk"] == "vectors"
    assert recall(search(index, queries), distances_of(queries, vectors, metric)) >= 0.9
    huge, asked = vectors * np.float32(1e5), queries * np.float32(1e5)  # held at the ends of float16
    if metric == "l2":
        assert build(huge, metric, rerank="float16").spec.params["walk"] == "codes"
        assert build(huge, metric).spec.params["walk"] == "vectors"
        assert recall(search(build(huge, metric), asked), distances_of(asked, huge, metric)) >= 0.97


@pytest.mark.parametrize("metric", METRICS)
def test_one_row_astray_leaves_a_graph_drawn_by_vectors_as_it_is(metric: Metric) -> None:
    vectors, queries = split(tight(0.01))
    vectors = vectors.copy()
    vectors[7] = 1e4
    found = search(build(vectors, metric), queries)
    distances = distances_of(queries, vectors, metric)
    assert recall(found, distances) >= 0.9


@pytest.mark.parametrize("scale", [1e-18, 1e12])
def test_tight_clusters_of_any_scale_are_drawn_by_vectors(scale: float) -> None:
    vectors, queries = split(tight(0.01) * np.float32(scale))
    index = build(vectors, "l2")
    assert len(index.parts.pivots) < 400
    assert recall(search(index, queries), distances_of(queries, vectors, "l2")) >= 0.97


def test_half_of_a_corpus_in_tight_clusters_is_noticed_whatever_the_order_of_rows() -> None:
    vectors = rows(40, 6000).copy()
    vectors[::2] = tight(0.01, 3000) + 8
    assert build(vectors, "l2").spec.params["walk"] == "vectors"


@pytest.mark.parametrize("spread", [0.1, 0.01])
def test_lengths_that_rounding_leaves_matter_under_products_where_clusters_are_tight(spread: float) -> None:
    vectors, queries = split(unit(tight(spread)).astype(np.float16).astype(np.float32))
    found = search(build(vectors, "ip"), queries)
    assert recall(found, distances_of(queries, vectors, "ip")) >= 0.95


def test_few_rows_that_codes_cannot_tell_apart_are_walked_by_vectors() -> None:
    both = (1 + 0.001 * np.random.default_rng(15).standard_normal((120, 40))).astype(np.float32)
    both[0] = -50
    vectors, queries = both[:60], both[60:]
    assert recall(search(build(vectors, "l2"), queries), distances_of(queries, vectors, "l2")) >= 0.95


def test_duplicates_are_no_reason_to_draw_a_graph_by_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    def copied(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr("index_builders.nng._Codes.compare_rows", copied)
    vectors = np.repeat(rows(24)[:150], 20, axis=0)
    assert recall(search(build(vectors, "l2"), vectors[:40]), distances_of(vectors[:40], vectors, "l2")) == 1.0


def test_what_walks_by_is_what_was_asked_for_and_codes_where_they_do(tmp_path: Path) -> None:
    vectors, queries = split(rows(100))
    assert built(100).spec.params["walk"] == "codes"
    assert build(split(tight(0.1))[0], rerank="none").spec.params["walk"] == "codes"
    index = build(vectors, walk="vectors")
    assert index.spec.params["walk"] == "vectors"
    index.save(tmp_path)
    opened = indexes.load(tmp_path, index.spec, vectors=vectors)
    same(search(opened, queries), search(index, queries))
    assert recall(search(opened, queries), distances_of(queries, vectors, "l2")) >= 0.97
    with pytest.raises(InvalidParameter, match="walk 'vectors' needs vectors, but rerank is 'none'; choose"):
        build(vectors, walk="vectors", rerank="none")


@pytest.mark.parametrize("params", [{"walk": "hops"}, {"walk": "vectors", "rerank": "none"}, {"walk": 1}, {"walk": []}])
def test_an_index_that_says_it_is_walked_in_an_unknown_way_is_refused(
    params: dict[str, Any], saved: Any, tmp_path: Path
) -> None:
    spec, files = saved
    for file, content in files.items():
        (tmp_path / file).write_bytes(content)
    wrong = type(spec)(spec.kind, spec.dim, spec.metric, spec.size, {**spec.params, **params})
    with pytest.raises(ArtifactDamaged, match=re.escape(f"{nng.GRAPH}: walked by {params['walk']!r}")):
        indexes.load(tmp_path, wrong, vectors=rows(20)[:300])


def test_an_index_from_before_there_was_a_choice_is_walked_by_codes(saved: Any, tmp_path: Path) -> None:
    spec, files = saved
    for file, content in files.items():
        (tmp_path / file).write_bytes(content)
    params = {name: value for name, value in spec.params.items() if name != "walk"}
    old = type(spec)(spec.kind, spec.dim, spec.metric, spec.size, params)
    queries = rows(20)[-5:]
    same(
        search(indexes.load(tmp_path, old, vectors=rows(20)[:300]), queries),
        search(indexes.load(tmp_path, spec, vectors=rows(20)[:300]), queries),
    )


# ------------------------------------------------------------------------------------------- awkward data


def odd(name: str) -> np.ndarray:
    rng = np.random.default_rng(3)
    both = rows(32).copy()
    if name == "constant columns":
        both[:, 3], both[:, 9] = 5, 0
    elif name == "zeros":
        both[: SIZE // 5] = 0
    elif name == "one row astray":
        both[7] = 9e14
    elif name == "sparse":
        both *= rng.random(both.shape) < 0.2
    elif name == "integers":
        both = np.rint(both * 20)
    elif name == "bits":
        both = both > 0
    elif name == "far from the origin":
        both += 2
    elif name.startswith("times"):
        both *= np.float32(name.split()[1])
    return np.asarray(both, np.float32)


ODD = ["constant columns", "zeros", "one row astray", "sparse", "integers", "bits", "far from the origin"]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", [*ODD, "times 1e-15", "times 1e10", "times 1e14"])
def test_recall_holds_over_awkward_data(name: str, metric: Metric) -> None:
    vectors, queries = split(odd(name))
    found = search(build(vectors, metric), queries, ef_search=128)
    check_form(found, K, SIZE)
    # One huge row makes the differences between the others small beside the products' error.
    assert recall(found, distances_of(queries, vectors, metric)) >= (0.9 if name == "one row astray" else 0.95)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-20])
def test_vectors_near_the_end_of_float32_are_searched_as_far_as_distances_can_tell_them_apart(
    scale: float, metric: Metric
) -> None:
    vectors, queries = split(odd(f"times {scale}"))
    found = search(build(vectors, metric), queries)
    check_form(found, K, SIZE)
    if metric == "cosine" or (metric == "l2" and scale > 1e-19):
        assert recall(found, distances_of(queries, vectors, metric)) >= 0.95
    else:  # products and squares are nothing beside 1, or nothing at all
        assert (found.labels >= 0).all()
        np.testing.assert_allclose(found.distances, metric == "ip", atol=1e-30)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("decades", [3, 10])
def test_rows_of_every_scale_are_searched_without_harm(metric: Metric, decades: int) -> None:
    lengths = 10.0 ** np.random.default_rng(6).uniform(-decades, decades, (SIZE + N_QUERIES, 1))
    vectors, queries = split((rows(32) * lengths).astype(np.float32))
    found = search(build(vectors, metric), queries, ef_search=128)
    check_form(found, K, SIZE)
    # For l2, the graph's distances have 30 bits, in which short vectors are one where others are that much longer.
    least = {3: 0.9, 10: 0.5}[decades] if metric == "l2" else 0.95
    assert recall(found, distances_of(queries, vectors, metric)) >= least


@pytest.mark.parametrize("metric", METRICS)
def test_as_many_duplicates_as_are_asked_for_come_back(metric: Metric) -> None:
    rng = np.random.default_rng(8)
    equal = np.repeat(rng.standard_normal((1, 24)), 2000, axis=0).astype(np.float32)
    groups = np.repeat(rng.standard_normal((30, 24)), 100, axis=0).astype(np.float32)[rng.permutation(3000)]
    for vectors, k in ((equal, 10), (equal, 200), (groups, 10), (groups, 100)):
        index = build(vectors, metric)
        found = search(index, vectors[:20], k, 100)
        check_form(found, k, len(vectors))
        true = distances_of(vectors[:20], vectors, metric)
        np.testing.assert_allclose(found.distances, np.take_along_axis(true, found.labels, 1), atol=1e-4)
        assert recall(found, true) >= (0.9 if k == 100 else 1.0)
        # Duplicates that nothing led to would each be a pivot, and every query compares all of those.
        assert len(index.parts.pivots) < 400


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("size", "dim"), [(1, 1), (1, 7), (2, 1), (2, 5), (3, 16_384), (17, 16_384), (17, 1), (40, 3)])
def test_the_smallest_indexes_answer_with_all_they_have(size: int, dim: int, metric: Metric, tmp_path: Path) -> None:
    rng = np.random.default_rng(size)
    vectors, queries = (rng.standard_normal((n, dim)).astype(np.float32) for n in (size, 9))
    index = build(vectors, metric)
    index.save(tmp_path)
    for one in (index, indexes.load(tmp_path, index.spec, vectors=vectors)):
        for k in (1, size, size + 3):
            found = search(one, queries, k, 1)
            check_form(found, k, size)
            assert recall(found, distances_of(queries, vectors, metric)) == 1.0 or k == 1
            assert (found.labels[:, size:] == -1).all()


@pytest.mark.parametrize("metric", METRICS)
def test_vectors_of_zeros_only_are_ties(metric: Metric) -> None:
    found = search(build(np.zeros((500, 5), np.float32), metric), rows(5)[:4], 7)
    check_form(found, 7, 500)
    assert (found.labels >= 0).all()
    true = distances_of(rows(5)[:4], np.zeros((7, 5)), metric)
    np.testing.assert_allclose(found.distances, true, rtol=1e-6)


# ------------------------------------------------------------------------------------------------- breadth


@pytest.mark.parametrize(("k", "ef"), [(100, 10), (500, 64), (SIZE, 1), (SIZE + 50, 64), (1, 1), (1, 10_000)])
def test_any_k_goes_with_any_breadth(k: int, ef: int) -> None:
    vectors, queries = split(rows(100))
    found = search(built(100), queries[:10], k, ef)
    check_form(found, k, SIZE)
    true = distances_of(queries[:10], vectors, "l2")
    if k > 1 or ef > 1:
        assert recall(found, true) >= 0.95
    assert (found.labels[:, SIZE:] == -1).all()


# ------------------------------------------------------------------------------------------------- filters


def masks(vectors: np.ndarray, query: np.ndarray) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(9)
    order = np.argsort(exact_distances(query, vectors, "l2"))
    near, far, ring = (np.zeros(len(vectors), bool) for _ in range(3))
    near[order[: len(order) // 2]], far[order[len(order) // 2 :]], ring[order[300:400]] = True, True, True
    shares = {f"{share:%}": rng.random(len(vectors)) < share for share in (0.5, 0.1, 0.01)}
    few = np.zeros(len(vectors), bool)
    few[rng.choice(len(vectors), 4, replace=False)] = True
    return {**shares, "four": few, "near": near, "far": far, "ring": ring, "all": np.ones(len(vectors), bool)}


def test_one_long_row_does_not_spoil_the_codes_of_all_others() -> None:
    vectors, queries = split(rows(64).copy())
    vectors[5] *= 1e6
    found = search(build(vectors, "ip"), queries, ef_search=128)
    assert recall(found, distances_of(queries, vectors, "ip")) >= 0.95


@pytest.mark.parametrize("kind", ["nng", "tp_tree"])
def test_an_index_is_not_opened_over_vectors_of_another(kind: str, tmp_path: Path) -> None:
    vectors, _ = split(rows(8))
    index = index_builders.build(vectors, kind=kind, metric="l2")
    index.save(tmp_path)
    for other in (vectors[:10], vectors.astype(np.float64)):
        with pytest.raises(DimensionMismatch, match=r"the index was built over \(3000, 8\)"):
            indexes.load(tmp_path, index.spec, vectors=other)


@pytest.mark.alone
def test_a_batch_ends_soon_after_its_deadline() -> None:
    _, queries = split(rows(100))
    asked = np.repeat(queries, 40, axis=0)
    found = search(built(100), asked, ef_search=2000, limit=Limit(deadline=time.monotonic() + 0.02))
    assert found.stopped.any() and not found.stopped.all()


@pytest.mark.parametrize("way", ["compare", "scan", "walk"])
@pytest.mark.parametrize("metric", METRICS)
def test_filters_leave_k_where_k_exist_and_the_nearest_of_them(
    metric: Metric, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way != "compare":
        monkeypatch.setattr(nng, "COMPARE_UP_TO", 0)
    monkeypatch.setattr(nng, "SCAN_A_PLACE", 0.5 if way == "walk" else SIZE)
    vectors, queries = split(rows(100))
    index = built(100, metric)
    reached = []
    for query in queries[:12]:
        true = exact_distances(query, vectors, metric)[None]
        for mask in masks(vectors, query).values():
            mask.flags.writeable = False
            found = search(index, query[None], allowed=mask)
            check_form(found, K, SIZE)
            real = found.labels[0][found.labels[0] >= 0]
            assert mask[real].all() and len(real) == min(K, mask.sum())
            assert found.visited[0] > 0 and not found.stopped[0]
            if way != "walk":
                assert WAYS[found.ways[0]] == ("exact" if mask.sum() <= nng.COMPARE_UP_TO else "scan")
            if len(real) == K:
                reached.append(recall(found, true, mask))
    assert np.mean(reached) >= 0.98 and np.mean(np.array(reached) >= 0.9) >= 0.95


def test_a_walk_that_finds_nothing_allowed_compares_all_that_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nng, "SCAN_A_PLACE", 0.1)
    monkeypatch.setattr(nng, "COMPARE_UP_TO", 0)
    vectors, queries = split(rows(100))
    order = np.argsort(exact_distances(queries[0], vectors, "l2"))
    mask = np.zeros(SIZE, bool)
    mask[order[-700:]] = True
    found = search(built(100), queries[:1], ef_search=10, allowed=mask)
    assert found.labels[0, 0] in order[-700:][:3] and 700 < found.visited[0] < SIZE + 700
    assert WAYS[found.ways[0]] == "scan" and found.hops[0] > 0


SHAPES: dict[str, Callable[[np.random.Generator, tuple[int, int]], np.ndarray]] = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "rectified": lambda rng, shape: np.maximum(rng.standard_normal(shape) - 1, 0),
    "counts": lambda rng, shape: rng.poisson(1.0, shape),
    "bits": lambda rng, shape: rng.integers(0, 2, shape),
}


@functools.cache
def dense(shape: str, metric: Metric, rerank: str) -> Any:
    """So many vectors around one centre that codes cannot tell neighbours apart at the edge of a mask."""
    vectors = SHAPES[shape](np.random.default_rng(5), (12_000, 48)).astype(np.float32)
    return vectors, build(vectors, metric, rerank=rerank, ef_construction=16, n_trees=2)


def scanned(shape: str, metric: Metric, rerank: str, sign: float, share: float, far: bool) -> float:
    """Recall over ten queries, each with a mask of what is far from it, or of anything."""
    vectors, index = dense(shape, metric, rerank)
    rng = np.random.default_rng(6)
    reached = []
    for query in sign * SHAPES[shape](rng, (10, 48)).astype(np.float32):
        true = exact_distances(query, vectors, metric)
        mask = true >= np.quantile(true, 1 - share) if far else rng.random(len(true)) < share
        found = search(index, query[None], allowed=mask)
        check_form(found, K, len(vectors))
        assert WAYS[found.ways[0]] == "scan" and mask[found.labels[0]].all()
        reached.append(recall(found, true[None], mask))
    return float(np.mean(reached))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("rerank", "floor"), [("vectors", 0.98), ("float16", 0.85)])
@pytest.mark.parametrize("share", [0.5, 0.25])
def test_of_what_is_far_from_the_query_and_dense_the_nearest_are_found(
    metric: Metric, rerank: str, floor: float, share: float
) -> None:
    assert scanned("normal", metric, rerank, 1.0, share, far=True) >= floor


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["alike", "opposite"])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_that_are_not_spread_evenly_cost_a_filter_no_recall(shape: str, sign: float, metric: Metric) -> None:
    assert scanned(shape, metric, "vectors", sign, 0.25, far=False) >= 0.98


@pytest.mark.parametrize("metric", METRICS)
def test_a_filter_that_leaves_only_vectors_unlike_all_others_keeps_its_recall(metric: Metric) -> None:
    rng = np.random.default_rng(11)
    dense_rows = rng.random(20_000) < 0.12
    active = np.where(dense_rows[:, None], 0.9, 0.06)
    vectors = (rng.random((20_000, 64)) * (rng.random((20_000, 64)) < active)).astype(np.float32)
    vectors[:, 0] += 1e-3  # none is all zeros
    index = build(vectors, metric, ef_construction=16, n_trees=2)
    reached = []
    for row in np.flatnonzero(dense_rows)[:10]:
        query = vectors[row] + 0.01
        found = search(index, query[None], allowed=dense_rows)
        assert WAYS[found.ways[0]] == "scan"
        reached.append(recall(found, exact_distances(query, vectors, metric)[None], dense_rows))
    assert np.mean(reached) >= 0.98


def test_vectors_beyond_the_ends_of_the_codes_are_found_behind_a_filter() -> None:
    rng = np.random.default_rng(12)
    vectors = rng.standard_normal((15_000, 48)).astype(np.float32)
    query = rng.standard_normal(48).astype(np.float32)
    far = rng.choice(15_000, 18, replace=False)
    vectors[far] = 8 * query + rng.standard_normal((18, 48))
    index = build(vectors, "ip", ef_construction=16, n_trees=2)
    mask = rng.random(15_000) < 0.2
    mask[far] = True
    found = search(index, query[None], allowed=mask)
    assert WAYS[found.ways[0]] == "scan"
    assert recall(found, exact_distances(query, vectors, "ip")[None], mask) >= 0.9


def test_more_time_never_makes_a_filtered_answer_worse() -> None:
    """The mask leaves the few nearest, which the walk finds, and much that is far: what is left to compare is cut."""
    vectors = np.random.default_rng(3).standard_normal((12_000, 32)).astype(np.float32)
    index = build(vectors, ef_construction=32, n_trees=2)
    query = np.random.default_rng(4).standard_normal((1, 32)).astype(np.float32)
    true = exact_distances(query[0], vectors, "l2")
    order = np.argsort(true)
    mask = np.zeros(len(vectors), bool)
    mask[order[:20]] = mask[order[4_000:]] = True
    bounds = (1200, 2000, 4000, 6000, 9000, 20_000)
    found = [search(index, query, allowed=mask, limit=Limit(max_visited=bound)) for bound in bounds]
    reached = [recall(one, true[None], mask) for one in found]
    assert reached == sorted(reached) and reached[-1] == 1.0
    stopped = [bool(one.stopped[0]) for one in found]
    assert stopped[0] and not stopped[-1] and stopped == sorted(stopped, reverse=True)


@pytest.mark.parametrize("k", [1, 10, 3000, 6000])
def test_many_answers_are_in_order_whatever_the_order_of_labels(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nng, "SCAN_A_PLACE", 12_000)
    values = np.sort(np.random.default_rng(8).random(12_000))
    for first in (values, values[::-1]):
        rows = np.zeros((len(values), 8), np.float32)
        rows[:, 0] = first  # labels are in the order of distances, or against it
        index = build(rows, ef_construction=16, n_trees=2)
        query = np.zeros((1, 8), np.float32)
        mask = np.arange(len(rows)) % 2 == 0
        found = search(index, query, k, allowed=mask)
        check_form(found, k, len(rows))
        assert recall(found, exact_distances(query[0], rows, "l2")[None], mask) >= 0.99


@pytest.mark.parametrize(("rerank", "way"), [("vectors", "exact"), ("float16", "scan"), ("none", "scan")])
def test_a_search_says_how_each_query_was_answered(rerank: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, queries = split(rows(100))
    index = built(100, "l2", rerank)
    assert search(index, queries).ways is None
    few, most = np.arange(SIZE) < 300, np.arange(SIZE) % 10 > 0
    assert {WAYS[at] for at in search(index, queries, allowed=few).ways} == {way}
    monkeypatch.setattr(nng, "COMPARE_UP_TO", 0)
    assert {WAYS[at] for at in search(index, queries, allowed=few).ways} == {"scan"}
    monkeypatch.setattr(nng, "SCAN_A_PLACE", 0.1)
    assert {WAYS[at] for at in search(index, queries, allowed=most).ways} == {"own"}


def test_masks_that_are_strided_or_at_odd_addresses_are_honoured() -> None:
    _, queries = split(rows(100))
    plain = np.random.default_rng(2).random(SIZE) < 0.3
    expected = search(built(100), queries, allowed=plain)
    strided = np.repeat(plain, 2)[::2]
    shifted = np.zeros(SIZE + 1, bool)[1:]
    shifted[:] = plain
    shifted.flags.writeable = False
    for mask in (strided, shifted):
        same(search(built(100), queries, allowed=mask), expected)


# -------------------------------------------------------------------------------------------------- limits


def test_a_bound_on_visits_cuts_and_says_so() -> None:
    vectors, queries = split(rows(100))
    index = built(100)
    whole = search(index, queries, ef_search=256)
    cut = search(index, queries, ef_search=256, limit=Limit(max_visited=300))
    assert cut.stopped.all() and (cut.visited < whole.visited).all()
    assert cut.visited.max() <= 300 + index.parts.graph.shape[1]
    check_form(cut, K, SIZE)
    assert recall(cut, distances_of(queries, vectors, "l2")) > 0.3
    loose = search(index, queries, ef_search=256, limit=Limit(max_visited=SIZE * 3))
    same(loose, whole)
    for limit in (Limit(max_visited=0), Limit(deadline=time.monotonic() - 1)):
        found = search(index, queries, limit=limit)
        assert found.stopped.all() and (found.labels[:, 0] >= 0).all()
    assert not search(index, queries, limit=Limit(deadline=time.monotonic() + 1000)).stopped.any()


def test_a_broader_search_makes_more_hops_and_a_comparison_of_all_makes_none() -> None:
    _, queries = split(rows(100))
    narrow, broad = (search(built(100), queries, ef_search=ef).hops for ef in (16, 128))
    assert (narrow >= 16).all() and (broad >= 128).all() and (broad > narrow).all()
    assert not search(built(100), queries, allowed=np.arange(SIZE) < 100).hops.any()
    assert not search(built(100), queries, allowed=np.zeros(SIZE, bool)).hops.any()


def test_a_bound_on_visits_cuts_the_comparing_of_what_a_filter_leaves() -> None:
    _, queries = split(rows(100))
    mask = np.arange(SIZE) % 2 == 0
    cut = search(built(100), queries, allowed=mask, limit=Limit(max_visited=500))
    assert cut.stopped.all() and cut.visited.max() <= 500 + 64 + 8
    assert mask[cut.labels[cut.labels >= 0]].all()
    assert search(built(100), queries, allowed=mask, limit=Limit(deadline=time.monotonic() - 1)).stopped.all()
    assert not search(built(100), queries, allowed=mask, limit=Limit(max_visited=SIZE)).stopped.any()


# -------------------------------------------------------------------------------------------------- sameness


@pytest.mark.parametrize("metric", METRICS)
def test_the_seed_decides_the_index_and_the_threads_do_not(metric: Metric, tmp_path: Path) -> None:
    vectors = split(rows(100))[0]
    saved = []
    for name, threads, seed in (("a", 1, 7), ("b", 2, 7), ("c", 4, 7), ("d", 1, 8)):
        (tmp_path / name).mkdir()
        build(vectors, metric, threads, seed).save(tmp_path / name)
        saved.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert saved[0] == saved[1] == saved[2]
    assert saved[0][nng.GRAPH] != saved[3][nng.GRAPH]


def test_more_searches_than_a_workspace_has_epochs_answer_as_the_first() -> None:
    vectors, queries = split(rows(100))
    index = build(vectors)
    first = search(index, queries)
    for _ in range(10):  # 600 walks, and marks are wiped after 255
        same(search(index, queries), first)
    assert len(index._idle) == 1
    for row in range(60):
        np.testing.assert_array_equal(search(index, queries[row : row + 1]).labels[0], first.labels[row])


def test_eight_threads_with_different_breadths_equal_the_serial_answers() -> None:
    _, queries = split(rows(100))
    index = built(100)
    mask = np.arange(SIZE) % 3 > 0
    calls = [
        {"ef_search": ef, "k": k, "allowed": allowed}
        for ef, k in ((1, 1), (20, 10), (300, 50), (64, 400))
        for allowed in (None, mask)
    ]
    serial = [search(index, queries, **call) for call in calls]  # type: ignore[arg-type]

    def work(turn: int) -> None:
        for step in range(8):
            which = (3 * turn + step) % len(calls)
            same(search(index, queries, **calls[which]), serial[which])  # type: ignore[arg-type]

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))


def test_threads_of_one_batch_answer_as_one_does() -> None:
    vectors = split(rows(100))[0]
    same(search(built(100), vectors[:1000], num_threads=1), search(built(100), vectors[:1000], num_threads=4))


def test_queries_of_any_layout_are_read_as_what_they_say() -> None:
    _, queries = split(rows(100))
    expected = search(built(100), queries)
    wide = np.zeros((N_QUERIES, 200), np.float32)
    wide[:, ::2] = queries
    raw = np.zeros(queries.nbytes + 1, np.uint8)
    raw[1:] = queries.view(np.uint8).reshape(-1)
    unaligned = np.frombuffer(raw.data, np.float32, queries.size, 1).reshape(queries.shape)
    for other in (np.asfortranarray(queries), wide[:, ::2], queries[::-1][::-1], unaligned):
        same(search(built(100), other), expected)


# ------------------------------------------------------------------------------------------------- queries


@pytest.mark.parametrize("num_threads", [1, 4])
@pytest.mark.parametrize(("value", "shown"), [(np.nan, "nan"), (np.inf, "inf"), (-np.inf, "-inf"), (2e15, r"2e\+15")])
@pytest.mark.parametrize("metric", METRICS)
def test_a_query_that_cannot_be_ranked_is_named_and_the_index_goes_on(
    metric: Metric, value: float, shown: str, num_threads: int
) -> None:
    queries = split(rows(100))[0][:300].copy()
    index = built(100, metric)
    before = search(index, queries)
    waiting = len(index._idle)
    bad = queries.copy()
    bad[170, 99] = value
    with pytest.raises(InvalidVector, match=rf"queries\[170\]\[99\] is {shown}; values must be finite"):
        search(index, bad, num_threads=num_threads)
    assert len(index._idle) >= waiting
    same(search(index, queries), before)


def test_zero_queries_are_refused_by_their_row_under_cosine_only() -> None:
    vectors, queries = split(rows(100))
    queries = queries.copy()
    queries[[40, 50]] = 0
    with pytest.raises(InvalidVector, match=r"queries\[40\] is all zeros"):
        search(built(100, "cosine"), queries)
    for metric in ("l2", "ip"):
        found = search(built(100, metric), queries, ef_search=128)
        assert (found.labels >= 0).all()
        assert recall(found, distances_of(queries, vectors, metric)) >= 0.95


@pytest.mark.parametrize("scale", [1e-40, 1e-20, 1e-12, 1e5, 1e9, 1e14])
@pytest.mark.parametrize("metric", METRICS)
def test_queries_of_any_length_are_answered(metric: Metric, scale: float) -> None:
    vectors, queries = split(rows(100))
    queries = queries * np.float32(scale)
    found = search(built(100, metric), queries, ef_search=128)
    check_form(found, K, SIZE)
    assert (found.labels >= 0).all()
    # Squared distances of 1e18 leave float32 nothing of what lies between the vectors.
    if metric != "l2" or scale < 1:
        assert recall(found, distances_of(queries, vectors, metric)) >= (0.9 if scale == 1e-40 else 0.95)


# --------------------------------------------------------------------------------------------------- files


def put(*place: int, value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array[place] = value
        return array

    return change


def shape_and_type(name: str, dtype: type) -> dict[str, Any]:
    short = name.removeprefix("nng_").removesuffix(".npy")
    return {
        f"{short} shorter": (name, lambda a: a[:-1], "has shape"),
        f"{short} longer": (name, lambda a: np.concatenate([a, a[:1]]), "has shape"),
        f"{short} flat": (name, lambda a: a.reshape(-1) if a.ndim > 1 else a[:, None], "has shape"),
        f"{short} type": (name, lambda a: a.astype(dtype), "holds"),
        f"{short} empty": (name, lambda a: a[:0], "shape|holds 0"),
    }


DAMAGE: dict[str, Any] = {
    **shape_and_type(nng.GRAPH, np.int64),
    **shape_and_type(nng.HIGH, np.int8),
    **shape_and_type(nng.LOW, np.uint16),
    **shape_and_type(nng.SCALE, np.float64),
    **shape_and_type(nng.ORDER, np.uint32),
    **shape_and_type(nng.BIAS, np.float16),
    **shape_and_type(nng.VECTORS, np.float32),
    **{k: v for k, v in shape_and_type(nng.PIVOTS, np.int64).items() if "er" not in k},
    "graph columns": (nng.GRAPH, lambda a: a[:, :-1], "has shape"),
    "graph beyond": (nng.GRAPH, put(5, 3, value=300), "names places beyond 0 to 299"),
    "graph far below": (nng.GRAPH, put(299, 0, value=-(2**31)), "names places beyond"),
    "order beyond": (nng.ORDER, put(3, value=300), "names places beyond"),
    "order below": (nng.ORDER, put(3, value=-1), "names places beyond"),
    "order repeats": (nng.ORDER, lambda a: np.zeros_like(a), "is no permutation of 0 to 299"),
    "pivots beyond": (nng.PIVOTS, put(0, value=2**31 - 1), "names places beyond"),
    "pivots below": (nng.PIVOTS, put(0, value=-1), "names places beyond"),
    "pivots too many": (nng.PIVOTS, lambda a: np.zeros(nng.MAX_PIVOTS + 1, np.int32), "holds 65537 pivots"),
    "scale nan": (nng.SCALE, put(1, 5, value=np.nan), "not finite"),
    "bias infinite": (nng.BIAS, put(7, value=np.inf), "not finite"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, bytes]]:
    folder = tmp_path_factory.mktemp("saved")
    index = build(rows(20)[:300], rerank="float16")
    index.save(folder)
    return index.spec, {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("mmap", [True, False], ids=["mmapped", "loaded"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_arrays_are_refused_by_name(damage: str, mmap: bool, saved: Any, tmp_path: Path) -> None:
    spec, files = saved
    for file, content in files.items():
        (tmp_path / file).write_bytes(content)
    name, change, shown = DAMAGE[damage]
    indexes.load(tmp_path, spec, vectors=rows(20)[:300], mmap=mmap)
    np.save(tmp_path / name, change(np.load(tmp_path / name)))
    with pytest.raises(ArtifactDamaged, match=shown) as caught:
        indexes.load(tmp_path, spec, vectors=rows(20)[:300], mmap=mmap)
    assert str(caught.value).startswith(str(tmp_path / name))


@pytest.mark.parametrize("degree", [None, 0, at.MAX_DEGREE + 1, 10**9, "64", 64.0])
def test_a_degree_that_no_kernel_has_room_for_is_refused(degree: Any, saved: Any, tmp_path: Path) -> None:
    spec, files = saved
    for file, content in files.items():
        (tmp_path / file).write_bytes(content)
    np.save(tmp_path / nng.GRAPH, np.zeros((300, 257), np.int32))
    params = {**spec.params, "degree": degree}
    wrong = type(spec)(spec.kind, spec.dim, spec.metric, spec.size, params)
    with pytest.raises(ArtifactDamaged, match=rf"{nng.GRAPH}: built with degree {degree}, expected 1 to 256"):
        indexes.load(tmp_path, wrong, vectors=rows(20)[:300])


@pytest.mark.parametrize("missing", [nng.GRAPH, nng.LOW, nng.PIVOTS, nng.BIAS, nng.VECTORS])
def test_a_missing_file_is_named(missing: str, saved: Any, tmp_path: Path) -> None:
    spec, files = saved
    for file, content in files.items():
        if file != missing:
            (tmp_path / file).write_bytes(content)
    with pytest.raises(ArtifactDamaged, match=missing):
        indexes.load(tmp_path, spec, vectors=rows(20)[:300])


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("rerank", ["vectors", "none"])
@pytest.mark.parametrize(("dim", "share"), [(384, 0.55), (128, 0.9)])
def test_files_are_smaller_than_the_vectors(
    dim: int, share: float, rerank: str, metric: Metric, tmp_path: Path
) -> None:
    build(split(rows(dim))[0], metric, rerank=rerank, ef_construction=64, n_trees=2).save(tmp_path)
    saved = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert saved / (SIZE * dim * 4) <= share
