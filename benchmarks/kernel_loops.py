"""The distances of vecsvc.kernels in the plainest loop there is: compiled by machine_code, for kernels.py to time.

Every function compares each of `queries` with each of `rows`, one row after the other, and returns the sum, so that
nothing can be left out. `step` and `side` are the bytes from row to row and from query to query.
"""

from __future__ import annotations

from vecsvc.kernels import byte_dot, dot_f16, dot_f32, get_i8, nibble_dot


def nibble_loop(rows, queries, n_rows, n_queries, step, side, width):  # type: ignore[no-untyped-def]
    """4-bit codes against int8; `width` counts lines of 64 bytes."""
    total = 0
    for q in range(n_queries):
        for i in range(n_rows):
            total += nibble_dot(rows + i * step, queries + q * side, width)
    return total


def byte_loop(rows, queries, n_rows, n_queries, step, side, width):  # type: ignore[no-untyped-def]
    """int8 against int8; `width` counts lines of 64 bytes."""
    total = 0
    for q in range(n_queries):
        shift = 0
        for j in range(width << 6):
            shift += 128 * get_i8(queries + q * side, j)
        for i in range(n_rows):
            total += byte_dot(rows + i * step, queries + q * side, width, shift)
    return total


def f32_loop(rows, queries, n_rows, n_queries, step, side, width):  # type: ignore[no-untyped-def]
    """float32 against float32; `width` counts values."""
    total = 0.0
    for q in range(n_queries):
        for i in range(n_rows):
            total += dot_f32(rows + i * step, queries + q * side, width)
    return int(total)


def f16_loop(rows, queries, n_rows, n_queries, step, side, width):  # type: ignore[no-untyped-def]
    """float16 against float32; `width` counts values."""
    total = 0.0
    for q in range(n_queries):
        for i in range(n_rows):
            total += dot_f16(rows + i * step, queries + q * side, width)
    return int(total)
