"""Blocks are bounded, whole, float32, and name the row that cannot be ranked."""

from __future__ import annotations

import numpy as np
import pytest

from vecsvc.blocks import MAX_BLOCK_BYTES, MAX_BLOCK_ROWS, block_rows, checked_blocks
from vecsvc.errors import InvalidVector
from vecsvc.types import MAX_DIM


def test_blocks_are_bounded_in_rows_and_bytes() -> None:
    assert block_rows(1) == MAX_BLOCK_ROWS
    assert 1 <= block_rows(MAX_DIM) * MAX_DIM * 4 <= MAX_BLOCK_BYTES


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_every_row_comes_once_in_order_as_float32(dtype: type) -> None:
    vectors = np.arange(3 * MAX_BLOCK_ROWS // 2 * 2).reshape(-1, 2) % 2000
    got = list(checked_blocks(vectors.astype(dtype)))
    assert [start for start, _ in got] == [0, MAX_BLOCK_ROWS]
    assert all(rows.dtype == np.float32 and rows.flags.c_contiguous for _, rows in got)
    np.testing.assert_array_equal(np.concatenate([rows for _, rows in got]), vectors)


@pytest.mark.parametrize("value", [np.nan, -np.inf, 2e15, -2e15])
def test_a_bad_row_is_named_by_its_number_in_the_whole(value: float) -> None:
    vectors = np.zeros((MAX_BLOCK_ROWS + 5, 2), dtype=np.float32)
    vectors[MAX_BLOCK_ROWS + 3, 1] = value
    with pytest.raises(InvalidVector, match=rf"vectors\[{MAX_BLOCK_ROWS + 3}\]\[1\] is "):
        list(checked_blocks(vectors))
