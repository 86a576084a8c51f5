"""The functions that kernels are made of say what NumPy does, whichever instructions they become."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import index_builders
from index_builders.nng import halves
from vecsvc import indexes, machine_code
from vecsvc.types import METRICS, Metric

HERE = machine_code.best_path()
PATHS = machine_code.PATHS[machine_code.PATHS.index(HERE) :]
ARITIES = {
    "nibbles": 3, "four_nibbles": 4, "bytes_": 4, "dot32": 4, "dot16": 4, "squares32": 4, "squares16": 4,
    "widen": 3, "roots": 3, "first_after_fetching": 2, "address": 1,
}  # fmt: skip
DIMS = (*range(1, 131), 384, 1000)


@pytest.fixture(params=PATHS)
def kernel(request: pytest.FixtureRequest) -> Callable[[str], machine_code.Kernel]:
    return lambda name: machine_code.load("kernels_for_tests", name, ARITIES[name], request.param)


def at(array: np.ndarray) -> int:
    return int(array.ctypes.data)


def unaligned(array: np.ndarray) -> np.ndarray:
    """A read-only copy at an odd address."""
    raw = np.empty(array.nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64 + 1
    raw[start : start + array.nbytes] = array.view(np.uint8).reshape(-1)
    copy = np.frombuffer(raw.data, np.uint8, array.nbytes, start)
    copy.flags.writeable = False
    assert copy.ctypes.data % 2 == 1
    return copy


# ----------------------------------------------------------------------------------------------- integers


def nibble_cases(chunks: int) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(chunks)
    n = 128 * chunks
    extremes = [
        (np.full(n, code), np.full(n, value)) for code, value in itertools.product((0, 1, 15), (-128, -1, 0, 127))
    ]
    random = [(rng.integers(0, 16, n), rng.integers(-128, 128, n)) for _ in range(5)]
    single = [(np.eye(1, n, i, dtype=int)[0] * 15, rng.integers(-128, 128, n)) for i in (0, 63, 64, 127, n - 1)]
    return extremes + random + single


@pytest.mark.parametrize("chunks", [1, 2, 3, 4, 5])
def test_products_of_4_bit_codes_are_those_of_integers(
    kernel: Callable[[str], machine_code.Kernel], chunks: int
) -> None:
    for codes, query in nibble_cases(chunks):
        high, low = halves((codes * 16)[None]), halves(codes[None])
        assert not high[1].any() and not low[0].any()
        signed = query.astype(np.int8)
        expected = int(codes @ query)
        assert kernel("nibbles")(at(high[0]), at(signed), chunks) == expected
        packed, side = unaligned(low[1]), unaligned(signed)
        assert kernel("nibbles")(at(packed), at(side), chunks) == expected


@pytest.mark.parametrize("chunks", [1, 2, 3, 4, 5])
def test_products_of_four_codes_at_once_are_those_of_each(
    kernel: Callable[[str], machine_code.Kernel], chunks: int
) -> None:
    rng = np.random.default_rng(chunks)
    codes = rng.integers(0, 256, (4, 64 * chunks)).astype(np.uint8)
    query = unaligned(rng.integers(-128, 128, 128 * chunks).astype(np.int8))
    rows = [unaligned(codes[i]) for i in (2, 0, 3, 1)]
    sums = np.full(5, 7, np.int32)
    assert kernel("four_nibbles")(at(np.array([at(row) for row in rows])), at(query), chunks, at(sums)) == 0
    assert sums.tolist() == [kernel("nibbles")(at(row), at(query), chunks) for row in rows] + [7]


@pytest.mark.parametrize("lines", [1, 2, 3, 4, 5, 256])
def test_products_of_bytes_are_those_of_integers(kernel: Callable[[str], machine_code.Kernel], lines: int) -> None:
    rng = np.random.default_rng(lines)
    n = 64 * lines
    cases = [(np.full(n, a), np.full(n, b)) for a, b in itertools.product((-128, -1, 0, 127), (-127, -1, 0, 127))]
    cases += [(rng.integers(-128, 128, n), rng.integers(-127, 128, n)) for _ in range(5)]
    for left, right in cases:
        expected, shift = int(left @ right), 128 * int(right.sum())
        a, b = left.astype(np.int8), right.astype(np.int8)
        assert kernel("bytes_")(at(a), at(b), lines, shift) == expected
        a, b = unaligned(a), unaligned(b)
        assert kernel("bytes_")(at(a), at(b), lines, shift) == expected


# ------------------------------------------------------------------------------------------------- floats


@pytest.mark.parametrize("name", ["dot32", "dot16", "squares32", "squares16"])
def test_sums_are_those_of_float64_but_for_rounding(kernel: Callable[[str], machine_code.Kernel], name: str) -> None:
    rng = np.random.default_rng(1)
    out = np.empty(1, np.float32)
    for dim in DIMS:
        a = rng.standard_normal(dim).astype(np.float16 if name.endswith("16") else np.float32)
        b = rng.standard_normal(dim).astype(np.float32)
        wide = a.astype(np.float64), b.astype(np.float64)
        terms = (wide[0] - wide[1]) ** 2 if name.startswith("squares") else wide[0] * wide[1]
        for left, right in ((a, b), (unaligned(a), unaligned(b))):
            kernel(name)(at(left), at(right), dim, at(out))
            assert abs(float(out[0]) - terms.sum()) <= 1e-5 * np.abs(terms).sum(), dim


@pytest.mark.parametrize("name", ["dot32", "squares32"])
def test_nan_and_infinity_come_through_a_sum(kernel: Callable[[str], machine_code.Kernel], name: str) -> None:
    out = np.empty(1, np.float32)
    for dim, place, value in itertools.product((1, 16, 70, 200), (0, -1), (np.nan, np.inf, -np.inf, 1e30)):
        a, b = np.ones(dim, np.float32), np.full(dim, 2, np.float32)
        a[place] = value
        b[place] = value if name == "dot32" else 0.0
        kernel(name)(at(a), at(b), dim, at(out))
        assert not out[0] <= 1e15


def test_every_finite_float16_is_the_float32_of_the_same_value(kernel: Callable[[str], machine_code.Kernel]) -> None:
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    finite = every[np.isfinite(every)]
    out = np.empty(len(finite), np.float32)
    kernel("widen")(at(finite), len(finite), at(out))
    np.testing.assert_array_equal(out, finite.astype(np.float32))


def test_roots_are_exact_to_the_last_bit(kernel: Callable[[str], machine_code.Kernel]) -> None:
    values = np.array([0, 1, 2, 3, 10**6, 10**12 + 7, 2**52], np.int64)
    out = np.empty(len(values), np.int64)
    kernel("roots")(at(values), len(values), at(out))
    np.testing.assert_array_equal(out, (np.sqrt(values.astype(np.float64)) * 1024).astype(np.int64))


# ------------------------------------------------------------------------------------------------- arrays


def test_the_data_of_any_array_is_found_from_its_identity(kernel: Callable[[str], machine_code.Kernel]) -> None:
    arrays: list[np.ndarray] = [np.ones(3), np.zeros((4, 5), np.float32)[2:], np.arange(9)[::2], np.empty(0)]
    arrays[0].flags.writeable = False
    for array in arrays:
        assert kernel("address")(id(array)) == array.ctypes.data


def test_a_map_is_found_and_prefetching_where_nothing_is_does_no_harm(
    kernel: Callable[[str], machine_code.Kernel], tmp_path: Any
) -> None:
    np.save(tmp_path / "a.npy", np.array([7, 8], np.float32))
    mapped = np.load(tmp_path / "a.npy", mmap_mode="r")
    for far in (0, 1, -64, 2**62):
        assert kernel("first_after_fetching")(id(mapped), far) == 7


# ------------------------------------------------------------------------------------- whole kernels of nng


def clustered(n: int, dim: int) -> np.ndarray:
    rng = np.random.default_rng(6)
    centres = rng.standard_normal((30, dim))
    return (centres[rng.integers(0, 30, n)] + 0.6 * rng.standard_normal((n, dim))).astype(np.float32)


ROWS = clustered(1550, 130)
VECTORS, QUERIES = ROWS[:1500], ROWS[1500:]


@pytest.mark.parametrize("path", PATHS[1:])
@pytest.mark.parametrize("rerank", ["vectors", "float16", "none"])
@pytest.mark.parametrize("metric", METRICS)
def test_every_path_gives_the_same_labels_and_nearly_the_same_distances(
    metric: Metric, rerank: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = indexes.search_params("nng", ef_search=48)
    mask = np.arange(1500) % 3 > 0
    found = []
    index: Any = index_builders.build(VECTORS, kind="nng", metric=metric, params={"rerank": rerank})
    for wanted in (HERE, path):
        monkeypatch.setattr(machine_code, "best_path", lambda wanted=wanted: wanted)
        opened = type(index)(index.spec, index.parts, VECTORS, mmap=True)
        found.append([opened.search(QUERIES, 10, params, allowed=allowed) for allowed in (None, mask)])
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one.distances, other.distances, rtol=1e-4, atol=1e-4)
        # Where rounding decides between two that are as far, either may come first.
        assert np.mean(one.labels == other.labels) >= 0.99


@pytest.mark.parametrize("path", PATHS[1:])
@pytest.mark.parametrize("metric", METRICS)
def test_every_path_builds_the_same_graph(metric: Metric, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Any] = []
    for wanted in (HERE, path):
        monkeypatch.setattr(machine_code, "best_path", lambda wanted=wanted: wanted)
        built.append(index_builders.build(VECTORS, kind="nng", metric=metric))
    one, other = (index.parts for index in built)
    for name in ("high", "low", "scale", "order", "graph", "pivots"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
