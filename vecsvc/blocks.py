"""Goes over rows that memory should not hold twice: in bounded blocks, as float32, letting go of mapped pages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np

from vecsvc.distance import check_vector
from vecsvc.storage import release_pages
from vecsvc.types import MAX_ABS, StoredVectors, Vectors

MAX_BLOCK_ROWS: Final = 16_384
MAX_BLOCK_BYTES: Final = 32 << 20


def block_rows(dim: int) -> int:
    """Rows of `dim` float32 values that make one block."""
    return max(1, min(MAX_BLOCK_ROWS, MAX_BLOCK_BYTES // (4 * dim)))


def checked_blocks(vectors: StoredVectors) -> Iterator[tuple[int, Vectors]]:
    """Every row (size, dim) once, in order: (first row, rows (m, dim) as float32).

    The pages of a mapped file are let go after each block. Raises InvalidVector for NaN, infinities and
    values beyond MAX_ABS, naming the row; rows of zeros pass.
    """
    step = block_rows(vectors.shape[1])
    for start in range(0, len(vectors), step):
        rows = np.ascontiguousarray(vectors[start : start + step], dtype=np.float32)
        if not max(rows.max(), -rows.min()) <= MAX_ABS:  # NaN comes through both
            for row, vector in enumerate(rows, start):
                check_vector(vector, "ip", f"vectors[{row}]")
        yield start, rows
        release_pages(vectors)
