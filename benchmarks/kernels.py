"""Nanoseconds that one distance costs: our kernels on every path, NumPy's product, numkong's through a pointer.

All compare one row after the other. Ours are inlined into the loop, as they are into the walk of nng; a function
behind a pointer is called for each distance and hands its result back through memory. On an Intel Xeon (Sapphire
Rapids) at 384 values, on a machine that others used too:

- 4-bit codes with int8: 3.5 ns by VNNI, 6 by AVX2, 55 portably. numkong, which has 4-bit with 4-bit: 6.
- int8: 4.3 by VNNI, numkong 8.7; by AVX2 13 on an AMD EPYC of the Zen 3 class.
- float32: 12 by AVX-512 and 17 by AVX2, NumPy 16. numkong sums in float64, which is more precise, and takes 50.
- float16: 14 for half the bytes, numkong 23; NumPy has no fast product of them.

Rows and queries begin at a cache line, as an index's do. 16 bytes after one, float32 took 23 ns instead of 12, and was
slower than NumPy; 4-bit codes 4.2 instead of 3.4.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
from common import parser, save, table
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from vecsvc import machine_code
from vecsvc.indexes.nng import aligned

try:
    import numkong
except ImportError:
    numkong = None

DIMS = (128, 384, 768)
ROWS = 1000
BLOCK_BYTES = 1 << 20  # rows stay within this, and so within the L2 cache of any processor of today
QUERIES = 64
PASSES = 30  # the fastest counts: nothing but this loop ever makes it faster
LINE = 64  # bytes of a cache line, the unit of the kernels for codes
ENTRY = ("rows", "queries", "n_rows", "n_queries", "step", "side", "width")  # what a loop is given

Loop = Callable[..., float]


@dataclass(frozen=True, slots=True)
class Case:
    """What is compared with what, and the sum over all pairs, by which every contender is checked.

    Both begin at a cache line: loads of 64 bytes that span two of them take twice as long, see the top.
    """

    rows: NDArray[Any]  # (n, bytes or values), C-contiguous
    queries: NDArray[Any]
    width: int  # as the loop counts it
    total: float

    def nanoseconds(self, loop: Loop) -> float:
        """What `loop` takes for one of the pairs, after it was checked against `total`."""
        found, pairs = self.run(loop), len(self.rows) * len(self.queries)
        if abs(found - self.total) > 1.0 + 1e-3 * pairs:
            raise AssertionError(f"the products sum to {found}, expected {self.total}")
        best = np.inf
        for _ in range(PASSES):
            started = time.perf_counter_ns()
            self.run(loop)
            best = min(best, time.perf_counter_ns() - started)
        return float(best) / pairs

    def run(self, loop: Loop) -> float:
        rows, queries = self.rows, self.queries
        return loop(
            rows.ctypes.data,
            queries.ctypes.data,
            len(rows),
            len(queries),
            rows.strides[0],
            queries.strides[0],
            self.width,
        )


def product_ns(rows: NDArray[Any], queries: NDArray[Any]) -> float:
    """NumPy's product of the rows with one query after the other, on one thread."""
    best = np.inf
    with threadpool_limits(1):
        for _ in range(PASSES):
            started = time.perf_counter_ns()
            for query in queries:
                rows @ query
            best = min(best, time.perf_counter_ns() - started)
            if best > 1e8:  # without BLAS it is so slow that noise does not matter
                break
    return float(best) / (len(rows) * len(queries))


def pointer_loop(dtype: str, result: type[np.generic]) -> Loop | None:
    """The same loop around numkong's function for `dtype`, called through its address; None where there is none."""
    if numkong is None:
        return None
    try:
        address = numkong.pointer_to_dot(dtype)
    except LookupError:
        return None
    dot = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)(address)
    into = np.zeros(1, result)

    @numba.njit(nogil=True)  # type: ignore[untyped-decorator]
    def loop(rows, queries, n_rows, n_queries, step, side, width, out):  # type: ignore[no-untyped-def]
        total = 0.0
        for q in range(n_queries):
            for i in range(n_rows):
                dot(rows + i * step, queries + q * side, width, out.ctypes.data)
                total += out[0]
        return total

    return lambda *arguments: float(loop(*arguments, into))


def our_loops(name: str) -> dict[str, Loop]:
    """`name` of kernel_loops for each path that this processor has."""
    paths = machine_code.PATHS[machine_code.PATHS.index(machine_code.best_path()) :]
    return {path: machine_code.load("kernel_loops", name, len(ENTRY), path) for path in paths}


def count_rows(row_bytes: int) -> int:
    return min(ROWS, BLOCK_BYTES // row_bytes)


def lines(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """4-bit codes (n, dim) as vecsvc.kernels keeps them (n, dim / 2), and dim is a multiple of 128."""
    halves = codes.reshape(len(codes), -1, 2, LINE)
    return aligned(halves[:, :, 0] | halves[:, :, 1] << 4).reshape(len(codes), -1)


def four_bit(dim: int, rng: np.random.Generator) -> dict[str, float]:
    codes = rng.integers(0, 16, (count_rows(dim // 2), dim), dtype=np.uint8)
    queries = aligned(rng.integers(-127, 128, (QUERIES, dim), dtype=np.int8))
    total = float((codes.astype(np.float64) @ queries.T.astype(np.float64)).sum())
    case = Case(lines(codes), queries, dim // 128, total)
    found = {f"4-bit x int8, {path}": case.nanoseconds(loop) for path, loop in our_loops("nibble_loop").items()}
    if peer := pointer_loop("uint4", np.uint32):
        # numkong multiplies 4-bit values with 4-bit values, of two neighbours in a byte.
        other = rng.integers(0, 16, (QUERIES, dim), dtype=np.uint8)
        total = float((codes.astype(np.float64) @ other.T.astype(np.float64)).sum())
        pack = lambda values: aligned(values[:, 0::2] | values[:, 1::2] << 4)  # noqa: E731
        found["4-bit x 4-bit, numkong"] = Case(pack(codes), pack(other), dim, total).nanoseconds(peer)
    return found


def eight_bit(dim: int, rng: np.random.Generator) -> dict[str, float]:
    rows = aligned(rng.integers(-128, 128, (count_rows(dim), dim), dtype=np.int8))
    queries = aligned(rng.integers(-127, 128, (QUERIES, dim), dtype=np.int8))
    wide = rows.astype(np.float64), queries.T.astype(np.float64)
    ours = Case(rows, queries, dim // LINE, float((wide[0] @ wide[1]).sum()))
    found = {f"int8, {path}": ours.nanoseconds(loop) for path, loop in our_loops("byte_loop").items()}
    if peer := pointer_loop("int8", np.int32):
        found["int8, numkong"] = Case(rows, queries, dim, float((wide[0] @ wide[1]).sum())).nanoseconds(peer)
    # NumPy would sum int8 in int8.
    found["int8, NumPy as int32"] = product_ns(aligned(rows.astype(np.int32)), aligned(queries.astype(np.int32)))
    return found


def floats(dim: int, rng: np.random.Generator, dtype: type[np.floating[Any]]) -> dict[str, float]:
    name = np.dtype(dtype).name
    size = np.dtype(dtype).itemsize
    rows = aligned(rng.standard_normal((count_rows(dim * size), dim)).astype(dtype))
    queries = aligned(rng.standard_normal((QUERIES, dim)).astype(dtype).astype(np.float32))
    case = Case(rows, queries, dim, float((rows.astype(np.float64) @ queries.T.astype(np.float64)).sum()))
    loops = our_loops("f32_loop" if size == 4 else "f16_loop")
    found = {f"{name}, {path}": case.nanoseconds(loop) for path, loop in loops.items()}
    # numkong sums float32 in float64, and takes a float16 query for float16 rows.
    narrow = aligned(queries.astype(dtype))
    if peer := pointer_loop(name, np.float64 if size == 4 else np.float32):
        found[f"{name}, numkong"] = Case(rows, narrow, dim, case.total).nanoseconds(peer)
    found[f"{name}, NumPy"] = product_ns(rows, narrow)
    return found


def main() -> None:
    parser("Nanoseconds per distance").parse_args()
    figures: dict[str, dict[int, float]] = {}
    for dim in DIMS:
        rng = np.random.default_rng(7)
        parts = [four_bit(dim, rng), eight_bit(dim, rng), floats(dim, rng, np.float32), floats(dim, rng, np.float16)]
        for part in parts:
            for name, ns in part.items():
                figures.setdefault(name, {})[dim] = ns
    title = f"nanoseconds a distance, rows within {BLOCK_BYTES >> 20} MiB, one thread"
    head = ["row x query, by", *(f"{dim} values" for dim in DIMS)]
    table(title, head, [[name, *(by_dim[dim] for dim in DIMS)] for name, by_dim in figures.items()])
    save("kernels", {"ns": figures}, libraries=("numba", "llvmlite", "numkong"))


if __name__ == "__main__":
    main()
