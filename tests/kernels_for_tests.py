"""Ways into the functions of vecsvc/kernels.py, for tests: compiled by machine_code, one kernel for each."""

from __future__ import annotations

import math

from vecsvc.kernels import (
    byte_dot,
    data_of,
    dot_f16,
    dot_f32,
    get_f16,
    get_f32,
    get_i64,
    nibble_dot,
    nibble_dots,
    prefetch,
    put_f32,
    put_i64,
    root,
    squares_f16,
    squares_f32,
)


def nibbles(codes, query, chunks):  # type: ignore[no-untyped-def]
    return nibble_dot(codes, query, chunks)


def four_nibbles(rows, query, chunks, out):  # type: ignore[no-untyped-def]
    a, b, c, d = get_i64(rows, 0), get_i64(rows, 1), get_i64(rows, 2), get_i64(rows, 3)
    nibble_dots(a, b, c, d, query, chunks, out)
    return 0


def bytes_(left, right, lines, shift):  # type: ignore[no-untyped-def]
    return byte_dot(left, right, lines, shift)


def dot32(a, b, dim, out):  # type: ignore[no-untyped-def]
    put_f32(out, 0, dot_f32(a, b, dim))
    return 0


def dot16(a, b, dim, out):  # type: ignore[no-untyped-def]
    put_f32(out, 0, dot_f16(a, b, dim))
    return 0


def squares32(a, b, dim, out):  # type: ignore[no-untyped-def]
    put_f32(out, 0, squares_f32(a, b, dim))
    return 0


def squares16(a, b, dim, out):  # type: ignore[no-untyped-def]
    put_f32(out, 0, squares_f16(a, b, dim))
    return 0


def widen(halves, count, out):  # type: ignore[no-untyped-def]
    for i in range(count):
        put_f32(out, i, get_f16(halves, i))
    return 0


def roots(values, count, out):  # type: ignore[no-untyped-def]
    for i in range(count):
        put_i64(out, i, int(root(float(get_i64(values, i))) * 1024.0))
    return 0


def first_after_fetching(array, far):  # type: ignore[no-untyped-def]
    prefetch(data_of(array))
    prefetch(far)
    return int(get_f32(data_of(array), 0))


def address(array):  # type: ignore[no-untyped-def]
    return data_of(array)


def stranger(value):  # type: ignore[no-untyped-def]
    return int(math.gamma(float(value)))
