"""What every kind of index promises, for every metric and state, with brute force in float64 as the oracle."""

from __future__ import annotations

import functools
import importlib.metadata
import resource
import signal
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import index_builders
from index_builders import base as builders
from vecsvc import indexes
from vecsvc.config import option
from vecsvc.errors import (
    BackendMissing,
    DimensionMismatch,
    InvalidParameter,
    InvalidVector,
    StorageError,
    UnknownKind,
    UnknownParameter,
)
from vecsvc.indexes import base
from vecsvc.types import METRICS, WAYS, IndexSpec, Limit, Metric, Neighbors

SIZE, DIM, K = 640, 16, 10
STATES = ("built", "loaded", "mmapped")


class Case(NamedTuple):
    kind: str
    params: dict[str, Any]
    generous: dict[str, Any]  # search settings that must reach the recall floor
    hasty: dict[str, Any]
    exact: bool = False
    limits: bool = False  # honours a Limit
    rounding: float = 1e-4  # of distances, as a share of |q|² + |x|²; kinds that keep only codes say so in their spec


CASES = {
    "exact": Case("exact", {}, {}, {}, exact=True, limits=True),
    "hnsw": Case("hnsw", {}, {"ef_search": 256}, {"ef_search": 1}),
    "kd_tree": Case("kd_tree", {"leaf_size": 10}, {}, {}, exact=True),
    "tp_tree": Case("tp_tree", {"leaf_size": 10, "n_trees": 4}, {"max_check": 500}, {"max_check": 20}, limits=True),
    "nng": Case("nng", {"degree": 16}, {"ef_search": 256}, {"ef_search": 1}, limits=True),
    "nng_float16": Case(
        "nng", {"degree": 16, "rerank": "float16"}, {"ef_search": 256}, {"ef_search": 1}, limits=True, rounding=1e-3
    ),
    "nng_none": Case(
        "nng", {"degree": 16, "rerank": "none"}, {"ef_search": 256}, {"ef_search": 1}, limits=True, rounding=2e-2
    ),
    "faiss_Flat": Case("faiss", {"factory": "Flat"}, {}, {}),
    "faiss_HNSW32": Case("faiss", {"factory": "HNSW32"}, {"ef_search": 256}, {"ef_search": 1}),
    "faiss_IVF16_Flat": Case("faiss", {"factory": "IVF16,Flat"}, {"nprobe": 16}, {"nprobe": 1}),
    "faiss_IVF16_SQ8": Case(
        "faiss", {"factory": "IVF16,SQ8"}, {"nprobe": 16, "k_factor": 8}, {"nprobe": 2, "k_factor": 1}
    ),
    "faiss_ivf_pq_fast": Case(
        "faiss", {"preset": "ivf-pq-fast"}, {"nprobe": 16, "k_factor": 30}, {"nprobe": 2, "k_factor": 1}
    ),
}
BUILDS = [pytest.param(name, metric, id=f"{name}-{metric}") for name in CASES for metric in METRICS]


@functools.cache
def data(dtype: type = np.float32) -> np.ndarray:
    """Vectors of many lengths, among them duplicates beyond every kind's spare candidates, and one of zeros."""
    rng = np.random.default_rng(11)
    vectors = rng.standard_normal((SIZE, DIM)) * rng.uniform(0.5, 2.0, (SIZE, 1))
    vectors[100:160] = vectors[3]
    vectors[50] = 0.0
    return read_only(vectors.astype(dtype))


@functools.cache
def queries() -> np.ndarray:
    rng = np.random.default_rng(12)
    drawn = rng.standard_normal((28, DIM)).astype(np.float32)
    near = data()[[3, 40]] + rng.standard_normal((2, DIM)).astype(np.float32) * 0.01
    return read_only(np.concatenate([drawn, near, data()[[3, 77]]]).astype(np.float32))


def read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


def brute_force(points: np.ndarray, vectors: np.ndarray, metric: Metric) -> np.ndarray:
    """Distances (n, size) in float64, rounded once to float32."""
    q, x = points.astype(np.float64), vectors.astype(np.float64)
    if metric == "l2":
        return ((q[:, None, :] - x[None, :, :]) ** 2).sum(axis=2).astype(np.float32)
    if metric == "cosine":
        q = q / np.linalg.norm(q, axis=1, keepdims=True)
        lengths = np.linalg.norm(x, axis=1, keepdims=True)
        x = np.divide(x, lengths, out=np.zeros_like(x), where=lengths > 0)
    return (1.0 - q @ x.T).astype(np.float32)


def nearest(distances: np.ndarray, k: int, allowed: np.ndarray | None = None) -> np.ndarray:
    """Labels (n, k) by (distance, label), -1 where there are no more."""
    names = np.arange(distances.shape[1]) if allowed is None else np.flatnonzero(allowed)
    found = np.full((len(distances), k), -1)
    for row, values in enumerate(distances):
        best = names[np.lexsort((names, values[names]))][:k]
        found[row, : len(best)] = best
    return found


def recall(labels: np.ndarray, truth: np.ndarray, distances: np.ndarray) -> float:
    bounds = np.take_along_axis(distances, truth[:, -1:], axis=1) + 1e-5
    hits = np.take_along_axis(distances, labels, axis=1) <= bounds
    return float(np.mean(hits & (labels >= 0)))


def build(name: str, metric: Metric, vectors: np.ndarray, **options: Any) -> base.Index:
    case = CASES[name]
    return index_builders.build(vectors, kind=case.kind, metric=metric, params=case.params, num_threads=1, **options)


@functools.cache
def _built(name: str, metric: Metric) -> base.Index:
    return build(name, metric, data())


@dataclass
class Opened:
    index: base.Index
    case: Case
    name: str
    metric: Metric
    distances: np.ndarray  # brute force over queries()
    generous: Any


OPENED = {
    name: [pytest.param((name, m, state), id=f"{name}-{m}-{state}") for m in METRICS for state in STATES]
    for name in CASES
}
OPENED_EXACT = [param for name, case in CASES.items() if case.exact for param in OPENED[name]]


@pytest.fixture(scope="module", params=[param for params in OPENED.values() for param in params])
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    name, metric, state = request.param
    index = _built(name, metric)
    if state != "built":
        folder = tmp_path_factory.mktemp("index")
        index.save(folder)
        index = indexes.load(folder, index.spec, vectors=data(), mmap=state == "mmapped")
    case = CASES[name]
    generous = indexes.search_params(case.kind, **case.generous)
    return Opened(index, case, name, metric, brute_force(queries(), data(), metric), generous)


def same(one: Neighbors, other: Neighbors) -> None:
    np.testing.assert_array_equal(one.labels, other.labels)
    np.testing.assert_array_equal(one.distances, other.distances)


# ------------------------------------------------------------------------------------------------ answers


def test_labels_are_unique_and_in_range(opened: Opened) -> None:
    for params in (None, opened.generous):
        found = opened.index.search(queries(), K, params)
        assert found.labels.shape == found.distances.shape == (len(queries()), K)
        assert (found.labels.dtype, found.distances.dtype) == (np.int64, np.float32)
        for row in found.labels:
            real = row[row >= 0]
            assert len(set(real.tolist())) == len(real)
            assert real.max() < SIZE


def test_distances_are_sorted_and_those_of_the_metric(opened: Opened) -> None:
    found = opened.index.search(queries(), K, opened.generous)
    assert (np.diff(found.distances, axis=1) >= 0).all()
    true = np.take_along_axis(opened.distances, found.labels, axis=1)
    lengths = (queries() ** 2).sum(axis=1)[:, None] + (data() ** 2).sum(axis=1)[found.labels]
    assert (np.abs(found.distances - true) <= opened.case.rounding * np.maximum(1.0, lengths)).all()


def test_recall_reaches_its_floor(opened: Opened) -> None:
    truth = nearest(opened.distances, K)
    found = opened.index.search(queries(), K, opened.generous)
    assert recall(found.labels, truth, opened.distances) >= 0.95


@pytest.mark.parametrize("opened", OPENED_EXACT, indirect=True)
def test_exact_kinds_return_what_brute_force_does_and_ties_go_to_the_smaller_label(opened: Opened) -> None:
    for k in (1, K, 55, SIZE):
        found = opened.index.search(queries(), k)
        np.testing.assert_array_equal(found.labels, nearest(opened.distances, k))


def test_equal_distances_come_in_the_order_of_labels(opened: Opened) -> None:
    found = opened.index.search(queries(), 40, opened.generous)
    ties = np.diff(found.distances, axis=1) == 0
    assert ties.any()
    assert (np.diff(found.labels, axis=1)[ties] > 0).all()


def test_k_beyond_size_pads(opened: Opened) -> None:
    found = opened.index.search(queries()[:3], SIZE + 7, opened.generous)
    assert found.labels.shape == (3, SIZE + 7)
    assert (found.labels[:, SIZE:] == -1).all()
    assert np.isposinf(found.distances[found.labels < 0]).all()
    real = found.labels >= 0
    assert (np.diff(real.astype(int), axis=1) <= 0).all()
    assert real[:, :K].all()
    if opened.case.exact:
        assert real[:, :SIZE].all()


def test_batch_equals_single(opened: Opened) -> None:
    batch = opened.index.search(queries(), K, opened.generous, num_threads=2)
    singles = [opened.index.search(queries()[i : i + 1], K, opened.generous) for i in range(len(queries()))]
    np.testing.assert_array_equal(batch.labels, np.concatenate([s.labels for s in singles]))
    np.testing.assert_allclose(batch.distances, np.concatenate([s.distances for s in singles]), rtol=0, atol=1e-5)


def test_no_queries_give_no_rows(opened: Opened) -> None:
    nothing = np.empty((0, DIM), dtype=np.float32)
    for mask in (None, np.ones(SIZE, dtype=bool)):
        found = opened.index.search(nothing, K, allowed=mask)
        assert (found.labels.shape, found.visited.shape, found.stopped.shape) == ((0, K), (0,), (0,))
        assert found.hops is None or found.hops.shape == (0,)


def test_nothing_is_stopped_where_there_is_no_limit(opened: Opened) -> None:
    found = opened.index.search(queries(), K)
    assert not found.stopped.any()
    assert ((found.visited == -1) | (found.visited > 0)).all()


def test_hops_are_told_for_every_query_or_for_none(opened: Opened) -> None:
    found = opened.index.search(queries(), K)
    assert (found.hops is not None) == (opened.case.kind == "nng")
    if found.hops is not None:
        assert found.hops.shape == (len(queries()),) and found.hops.dtype == np.int64
        assert (found.hops > 0).all() and (found.hops < found.visited).all()
        for row, query in enumerate(queries()):
            alone = opened.index.search(query[None], K)
            assert alone.hops is not None and alone.hops[0] == found.hops[row]


def test_ways_are_told_for_every_query_or_for_none(opened: Opened) -> None:
    assert opened.index.search(queries(), K).ways is None
    ways = opened.index.search(queries(), K, allowed=read_only(np.arange(SIZE) % 3 == 0)).ways
    assert (ways is not None) == (opened.case.kind == "nng")
    if ways is not None:
        assert ways.shape == (len(queries()),) and ways.dtype == np.uint8 and ways.max() < len(WAYS)


def test_a_limit_that_has_passed_is_told_or_changes_nothing(opened: Opened) -> None:
    found = opened.index.search(queries(), K, opened.generous, limit=Limit(deadline=time.monotonic() - 1))
    whole = opened.index.search(queries(), K, opened.generous)
    np.testing.assert_array_equal(found.labels[~found.stopped], whole.labels[~found.stopped])
    assert found.stopped.all() == opened.case.limits


# -------------------------------------------------------------------------------------------------- masks


def test_empty_mask_gives_no_labels(opened: Opened) -> None:
    found = opened.index.search(queries(), K, opened.generous, allowed=read_only(np.zeros(SIZE, dtype=bool)))
    assert (found.labels == -1).all()
    assert np.isposinf(found.distances).all()


@pytest.mark.parametrize("share", [0.5, 0.01])
def test_filtered_search_returns_only_allowed_labels(opened: Opened, share: float) -> None:
    mask = read_only(np.random.default_rng(13).random(SIZE) < share)
    found = opened.index.search(queries(), K, opened.generous, allowed=mask)
    real = found.labels >= 0
    assert mask[found.labels[real]].all()
    assert real.any(axis=1).all()
    assert np.isposinf(found.distances[~real]).all()
    if opened.case.exact:
        np.testing.assert_array_equal(found.labels, nearest(opened.distances, K, mask))


def test_filtered_search_reaches_the_recall_floor(opened: Opened) -> None:
    mask = np.random.default_rng(14).random(SIZE) < 0.5
    found = opened.index.search(queries(), K, opened.generous, allowed=mask)
    assert recall(found.labels, nearest(opened.distances, K, mask), opened.distances) >= 0.95


# ------------------------------------------------------------------------------------- sameness and safety


def test_saving_and_loading_changes_no_answer(opened: Opened) -> None:
    mask = np.random.default_rng(15).random(SIZE) < 0.5
    built = _built(opened.name, opened.metric)
    same(opened.index.search(queries(), K), built.search(queries(), K))
    same(
        opened.index.search(queries(), K, opened.generous, allowed=mask),
        built.search(queries(), K, opened.generous, allowed=mask),
    )


def test_an_opened_index_saves_the_files_it_was_opened_from(opened: Opened, tmp_path: Path) -> None:
    for folder, index in (("one", _built(opened.name, opened.metric)), ("two", opened.index)):
        (tmp_path / folder).mkdir()
        index.save(tmp_path / folder)
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_read_only_inputs_stay_unchanged(opened: Opened) -> None:
    mask = read_only(np.arange(SIZE) % 2 == 0)
    before = queries().copy(), mask.copy()
    opened.index.search(queries(), K, opened.generous, allowed=mask)
    np.testing.assert_array_equal(queries(), before[0])
    np.testing.assert_array_equal(mask, before[1])
    np.testing.assert_array_equal(data(), data.__wrapped__())


def test_eight_threads_with_different_params_equal_the_serial_answers(opened: Opened) -> None:
    index, case = opened.index, opened.case
    hasty = indexes.search_params(case.kind, **case.hasty)
    mask = np.arange(SIZE) % 3 > 0
    calls = [(params, allowed) for params in (hasty, opened.generous) for allowed in (None, mask)]
    serial = [index.search(queries(), K, params, allowed=allowed) for params, allowed in calls]

    def work(turn: int) -> None:
        for step in range(4):
            which = (turn + step) % len(calls)
            params, allowed = calls[which]
            same(index.search(queries(), K, params, allowed=allowed), serial[which])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))


# -------------------------------------------------------------------------------------------------- errors


def test_wrong_dim_is_refused_with_both_shapes(opened: Opened) -> None:
    with pytest.raises(DimensionMismatch, match=rf"\(5, 4\), the index has dim {DIM}"):
        opened.index.search(np.zeros((5, 4), dtype=np.float32), K)
    with pytest.raises(DimensionMismatch, match=rf"\({DIM},\)"):
        opened.index.search(np.zeros(DIM, dtype=np.float32), K)


@pytest.mark.parametrize(("value", "shown"), [(np.nan, "nan"), (-np.inf, "-inf"), (1e30, r"1e\+30")])
def test_values_that_cannot_be_ranked_are_refused_with_their_place(opened: Opened, value: float, shown: str) -> None:
    bad = queries()[:3].copy()
    bad[1, 5] = value
    with pytest.raises(InvalidVector, match=rf"queries\[1\]\[5\] is {shown}; values must be finite and within ±1e\+15"):
        opened.index.search(bad, K)


def test_a_number_too_large_for_float32_is_refused(opened: Opened) -> None:
    bad = queries()[:1].copy()
    with np.errstate(over="ignore"):
        bad[0, 0] = np.float64(1e39).astype(np.float32)
    with pytest.raises(InvalidVector, match=r"queries\[0\]\[0\] is inf"):
        opened.index.search(bad, K)


def test_queries_of_another_type_are_refused(opened: Opened) -> None:
    with pytest.raises(InvalidParameter, match="float64, expected float32"):
        opened.index.search(queries().astype(np.float64), K)


@pytest.mark.parametrize("k", [0, -1, True, 2.0])
def test_k_that_is_no_positive_integer_is_refused_by_name(opened: Opened, k: Any) -> None:
    with pytest.raises(InvalidParameter, match=f"k must be an integer of at least 1, got {k}"):
        opened.index.search(queries(), k)


def test_params_of_another_type_are_refused(opened: Opened) -> None:
    with pytest.raises(InvalidParameter, match=f"{opened.case.kind} takes vecsvc.*SearchParams, got builtins.dict"):
        opened.index.search(queries(), K, {"ef_search": 10})


def test_a_mask_of_the_wrong_shape_or_type_is_refused(opened: Opened) -> None:
    for mask in (np.ones(SIZE - 1, dtype=bool), np.ones(SIZE, dtype=np.uint8)):
        with pytest.raises(InvalidParameter, match=rf"expected \({SIZE},\) of bool"):
            opened.index.search(queries(), K, allowed=mask)


def test_a_zero_query_is_refused_under_cosine_only(opened: Opened) -> None:
    zeros = np.zeros((1, DIM), dtype=np.float32)
    if opened.metric == "cosine":
        with pytest.raises(InvalidVector, match="all zeros"):
            opened.index.search(zeros, K)
    else:
        assert (opened.index.search(zeros, K, opened.generous).labels >= 0).all()


@pytest.mark.parametrize("name", CASES)
def test_unknown_params_are_refused_with_the_known_ones(name: str) -> None:
    kind = CASES[name].kind
    with pytest.raises(UnknownParameter, match=f"'ef'; {kind} knows: "):
        indexes.search_params(kind, ef=10)
    with pytest.raises(UnknownParameter, match=f"'ef'; {kind} knows: "):
        index_builders.build(data(), kind=kind, params={"ef": 10})


# ------------------------------------------------------------------------------------------------- builds


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(("name", "metric"), BUILDS)
def test_one_thread_and_one_seed_give_identical_files(name: str, metric: Metric, tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        build(name, metric, data(), seed=5).save(tmp_path / folder)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert files(tmp_path / "one") or name == "exact"


@pytest.mark.parametrize("missing", [1, 5000])
@pytest.mark.parametrize("name", [name for name in CASES if name != "exact"])
def test_a_disk_that_fills_up_is_noticed_to_the_last_byte(name: str, missing: int, tmp_path: Path) -> None:
    for folder in ("whole", "cut"):
        (tmp_path / folder).mkdir()
    index = _built(name, "l2")
    index.save(tmp_path / "whole")
    largest = max(len(content) for content in files(tmp_path / "whole").values())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest - missing, hard))
        with pytest.raises(StorageError, match=r"cannot write .*; nothing was published"):
            index.save(tmp_path / "cut")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


@pytest.mark.parametrize(("name", "metric"), BUILDS)
def test_float16_vectors_are_searched_as_what_they_say(name: str, metric: Metric, tmp_path: Path) -> None:
    vectors = data(np.float16)
    case = CASES[name]
    built = build(name, metric, vectors)
    built.save(tmp_path)
    loaded = indexes.load(tmp_path, built.spec, vectors=vectors)
    distances = brute_force(queries(), vectors, metric)
    params = indexes.search_params(case.kind, **case.generous)
    found = built.search(queries(), K, params)
    assert recall(found.labels, nearest(distances, K), distances) >= 0.95
    if case.exact:
        np.testing.assert_array_equal(found.labels, nearest(distances, K))
    same(found, loaded.search(queries(), K, params))


@pytest.mark.parametrize(("name", "metric"), BUILDS)
def test_vectors_are_read_from_a_mapped_file_and_every_row_is_reported(
    name: str, metric: Metric, tmp_path: Path
) -> None:
    np.save(tmp_path / "vectors.npy", data())
    mapped = np.load(tmp_path / "vectors.npy", mmap_mode="r").view(np.ndarray)
    done: list[int] = []
    index = build(name, metric, mapped, progress=done.append)
    assert sum(done) == SIZE
    same(index.search(queries(), K), _built(name, metric).search(queries(), K))


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("name", CASES)
def test_building_refuses_values_that_cannot_be_ranked(name: str, value: float) -> None:
    vectors = data().copy()
    vectors[17, 2] = value
    with pytest.raises(InvalidVector, match=r"vectors\[17\]\[2\] is .*; values must be finite"):
        build(name, "l2", vectors)


@pytest.mark.parametrize(("name", "metric"), BUILDS)
def test_the_spec_says_what_was_built(name: str, metric: Metric) -> None:
    spec = _built(name, metric).spec
    assert (spec.kind, spec.dim, spec.metric, spec.size) == (CASES[name].kind, DIM, metric, SIZE)
    assert spec.exact_distances == (CASES[name].rounding <= 1e-4)
    assert {**spec.params, **CASES[name].params} == spec.params
    points = builders.operating_points(spec)
    assert points
    for point in points:
        _built(name, metric).search(queries()[:1], K, indexes.search_params(spec.kind, **point))


@pytest.mark.parametrize("name", ["exact", "hnsw", "kd_tree", "tp_tree", "faiss_Flat", "faiss_HNSW32"])
@pytest.mark.parametrize("metric", METRICS)
def test_an_index_of_one_vector_answers(name: str, metric: Metric, tmp_path: Path) -> None:
    vectors = data()[:1]
    built = build(name, metric, vectors)
    built.save(tmp_path)
    for index in (built, indexes.load(tmp_path, built.spec, vectors=vectors)):
        found = index.search(queries()[:2], 3)
        np.testing.assert_array_equal(found.labels, [[0, -1, -1]] * 2)


# ------------------------------------------------------------------------------------------- the open door


@pytest.fixture
def fresh_tables() -> Any:
    def clear() -> None:
        base._table.cache_clear()
        builders._table.cache_clear()

    clear()
    yield
    clear()


def test_a_kind_of_others_is_found_built_and_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fresh_tables: None
) -> None:
    @dataclass(frozen=True, slots=True, kw_only=True)
    class Params:
        shift: int = option(0, "added to every label", low=0, high=9)

    class FirstRow:
        def __init__(self, spec: IndexSpec) -> None:
            self.spec = spec

        def search(self, queries: np.ndarray, k: int, params: Any = None, **options: Any) -> Neighbors:
            params = base.check_search(self.spec, queries, k, params, Params, None)
            labels = np.full((len(queries), 1), params.shift, dtype=np.int64)
            return base.padded(labels, np.zeros((len(queries), 1), dtype=np.float32), k)

        def save(self, directory: Path) -> None: ...
        def close(self) -> None: ...

    reader, builder = types.ModuleType("their_reader"), types.ModuleType("their_builder")
    reader.SearchParams = builder.BuildParams = Params  # type: ignore[attr-defined]
    reader.load = lambda directory, spec, *, vectors, mmap, device: FirstRow(spec)  # type: ignore[attr-defined]
    builder.build = lambda vectors, *, metric, params, num_threads, seed, progress: FirstRow(  # type: ignore[attr-defined]
        IndexSpec("theirs", vectors.shape[1], metric, len(vectors), base.params_dict(params))
    )
    monkeypatch.setitem(sys.modules, "their_reader", reader)
    monkeypatch.setitem(sys.modules, "their_builder", builder)
    points = {
        base.GROUP: [importlib.metadata.EntryPoint("theirs", "their_reader", base.GROUP)],
        builders.GROUP: [importlib.metadata.EntryPoint("theirs", "their_builder", builders.GROUP)],
    }
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda *, group: points[group])

    assert indexes.kinds() == ["theirs"]
    built = index_builders.build(data(), kind="theirs", metric="l2", params={"shift": 2})
    assert isinstance(built, base.Index)
    assert builders.operating_points(built.spec) == [{}]
    loaded = indexes.load(tmp_path, built.spec, vectors=data())
    assert loaded.search(queries()[:1], 2, indexes.search_params("theirs", shift=3)).labels.tolist() == [[3, -1]]
    with pytest.raises(UnknownKind, match="'hnsw' is no kind of index; known are theirs"):
        indexes.load(tmp_path, IndexSpec("hnsw", DIM, "l2", SIZE), vectors=data())


@pytest.mark.parametrize(("kind", "library", "extra"), [("hnsw", "hnswlib", "hnsw"), ("faiss", "faiss", "cpu")])
def test_a_missing_library_is_named_with_the_command_that_brings_it(
    kind: str, library: str, extra: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for group in (base, builders):
        module = group.module(kind)
        monkeypatch.delitem(sys.modules, module.__name__)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, library, None)
    match = rf"kind '{kind}' needs {library}: pip install 'vecsvc\[{extra}\]'"
    with pytest.raises(BackendMissing, match=match):
        indexes.search_params(kind)
    with pytest.raises(BackendMissing, match=match):
        index_builders.build(data(), kind=kind)
