"""The checks that every kind shares, and the table that names the kinds."""

from __future__ import annotations

import numpy as np
import pytest

import index_builders
from index_builders import base as builders
from vecsvc import indexes
from vecsvc.errors import DimensionMismatch, InvalidParameter, InvalidVector, UnknownKind
from vecsvc.indexes import base
from vecsvc.indexes.exact import SearchParams
from vecsvc.types import IndexSpec

SPEC = IndexSpec("exact", 4, "l2", 10)
ONES = np.ones((2, 4), dtype=np.float32)


def test_our_kinds_stand_in_the_table_that_is_open_to_others() -> None:
    assert {"exact", "hnsw", "kd_tree", "faiss"} <= set(indexes.kinds())


def test_every_kind_has_both_sides() -> None:
    assert set(builders._table()) == set(base._table())
    for kind in ("exact", "hnsw", "kd_tree", "faiss"):
        assert base.module(kind).SearchParams()
        assert builders.module(kind).BuildParams()


def test_an_unknown_kind_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UnknownKind, match="'annoy' is no kind of index; known are exact, faiss, hnsw, kd_tree"):
        indexes.search_params("annoy")
    with pytest.raises(UnknownKind, match="'annoy'"):
        index_builders.build(ONES, kind="annoy")


def test_search_params_are_checked_and_frozen() -> None:
    params = indexes.search_params("hnsw", ef_search="128")
    assert params.ef_search == 128
    with pytest.raises(AttributeError):
        params.ef_search = 1
    with pytest.raises(InvalidParameter, match="hnsw: ef_search must be between 1 and 10000, got 0"):
        indexes.search_params("hnsw", ef_search=0)
    with pytest.raises(InvalidParameter, match="ef_search must be an integer, got True"):
        indexes.search_params("hnsw", ef_search=True)


def test_none_means_the_kinds_defaults() -> None:
    assert base.check_search(SPEC, ONES, 3, None, SearchParams, None) == SearchParams()


def test_large_values_pass_though_the_sum_of_all_overflows() -> None:
    base.check_search(SPEC, np.full((40_000, 4), 1e15, dtype=np.float32), 3, None, SearchParams, None)


def test_the_first_bad_value_is_named() -> None:
    bad = ONES.copy()
    bad[1, 3] = np.nan
    with pytest.raises(InvalidVector, match=r"queries\[1\]\[3\] is nan"):
        base.check_search(SPEC, bad, 3, None, SearchParams, None)


def test_padded_cuts_and_fills_to_k_places() -> None:
    labels, distances = np.array([[3, -1]]), np.array([[0.5, np.inf]], dtype=np.float32)
    assert base.padded(labels, distances, 1).labels.tolist() == [[3]]
    wide = base.padded(labels, distances, 4)
    assert wide.labels.tolist() == [[3, -1, -1, -1]]
    assert wide.distances.tolist() == [[0.5, np.inf, np.inf, np.inf]]
    assert (wide.visited.tolist(), wide.stopped.tolist()) == ([-1], [False])


@pytest.mark.parametrize("shape", [(0, 4), (4,), (3, 0), (2, 16_385)])
def test_vectors_of_an_unfit_shape_are_refused_by_the_builder(shape: tuple[int, ...]) -> None:
    with pytest.raises(DimensionMismatch, match=rf"vectors have shape \({shape[0]}"):
        index_builders.build(np.zeros(shape, dtype=np.float32), kind="exact")


def test_unfit_arguments_are_refused_by_the_builder() -> None:
    with pytest.raises(InvalidParameter, match="vectors are float64, expected float32 or float16"):
        index_builders.build(np.zeros((3, 4)), kind="exact")
    with pytest.raises(InvalidParameter, match="metric must be one of l2, ip, cosine, got 'manhattan'"):
        index_builders.build(ONES, kind="exact", metric="manhattan")  # type: ignore[arg-type]
    with pytest.raises(InvalidParameter, match="auto takes no parameters"):
        index_builders.build(ONES, params={"m": 8})


def test_auto_is_exact_while_that_is_fast() -> None:
    assert index_builders.build(ONES).spec.kind == "exact"
    assert builders.choose("auto", builders.EXACT_UP_TO + 1, 384, {}) == ("nng", {})
    assert builders.choose("auto", builders.EXACT_UP_TO + 1, builders.TREE_UP_TO, {}) == ("kd_tree", {})
