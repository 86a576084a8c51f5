"""Distances over float32, float16, 8-bit and 4-bit codes, as LLVM instructions that numba's kernels are made of.

numba alone widens products of bytes to 64 bits, and knows neither VNNI nor prefetching nor float16: these are written
as LLVM's own instructions. Every function takes addresses (int64). Which instructions they become depends on the
path that is being generated for, see machine_code.PATHS; all paths give the same integers, and floats that differ
by the order of their sums.

A 4-bit plane keeps 128 values in 64 bytes, one cache line: byte i of a line holds value i in its low half and value
64 + i in its high half. A query for it keeps 128 int8 per line, in the same order. Such a line is called a chunk.

This module imports numba: only `machine_code` imports it, and only to compile.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F16, F32, F64 = ir.HalfType(), ir.FloatType(), ir.DoubleType()

_path = ["portable"]


@contextlib.contextmanager
def generating_for(path: str) -> Iterator[None]:
    """Functions that numba translates inside use the instructions of this path."""
    before, _path[0] = _path[0], path
    try:
        yield
    finally:
        _path[0] = before


def inlined(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that kernels are composed of; LLVM decides what becomes of it."""
    made: Callable[..., Any] = njit(error_model="numpy", nogil=True)(function)
    return made


def inlined_sum(function: Callable[..., Any]) -> Callable[..., Any]:
    """As `inlined`, for a sum of floats that may be added up in any order, which is what lets LLVM vectorise it."""
    made: Callable[..., Any] = njit(error_model="numpy", nogil=True, fastmath={"reassoc", "contract", "nsz"})(function)
    return made


# ------------------------------------------------------------------------------------------ instructions


def _external(builder: Any, name: str, result: Any, arguments: list[Any]) -> Any:
    known = builder.module.globals.get(name)
    return known or ir.Function(builder.module, ir.FunctionType(result, arguments), name)


def _splat(element: Any, lanes: int, value: float) -> Any:
    return ir.Constant(ir.VectorType(element, lanes), [ir.Constant(element, value)] * lanes)


def _load(builder: Any, address: Any, element: Any, lanes: int, align: int = 1) -> Any:
    kind = ir.VectorType(element, lanes) if lanes > 1 else element
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=align)


def _load_f32(builder: Any, address: Any, element: Any, lanes: int) -> Any:
    """Values of type `element`, float32 or float16, as float32."""
    if element is F32:
        return _load(builder, address, F32, lanes)
    wide = ir.VectorType(F32, lanes) if lanes > 1 else F32
    if _path[0] != "portable":
        return builder.fpext(_load(builder, address, F16, lanes), wide)
    # Processors without F16C would call a function for it. The exponent is moved to where float32 has it, and
    # one product with 2^112 makes up for the other bias, whether the value is normal or not; it has to be finite.
    whole = ir.VectorType(I32, lanes) if lanes > 1 else I32

    def constant(value: int) -> Any:
        return ir.Constant(whole, [value] * lanes if lanes > 1 else value)

    bits = builder.zext(_load(builder, address, I16, lanes), whole)
    magnitude = builder.bitcast(builder.shl(builder.and_(bits, constant(0x7FFF)), constant(13)), wide)
    power = ir.Constant(wide, [2.0**112] * lanes if lanes > 1 else 2.0**112)
    sign = builder.shl(builder.and_(bits, constant(0x8000)), constant(16))
    return builder.bitcast(builder.or_(builder.bitcast(builder.fmul(magnitude, power), whole), sign), wide)


def _plus(builder: Any, address: Any, offset: int) -> Any:
    return builder.add(address, ir.Constant(I64, offset)) if offset else address


def _loop(builder: Any, count: Any, state: list[Any], body: Callable[[Any, list[Any]], list[Any]]) -> list[Any]:
    """`for i in range(count): state = body(i, state)`, as instructions; the final state."""
    start = builder.basic_block
    head = builder.append_basic_block("loop.head")
    inside = builder.append_basic_block("loop.body")
    after = builder.append_basic_block("loop.after")
    builder.branch(head)
    builder.position_at_end(head)
    at = builder.phi(I64)
    at.add_incoming(ir.Constant(I64, 0), start)
    held = []
    for value in state:
        phi = builder.phi(value.type)
        phi.add_incoming(value, start)
        held.append(phi)
    builder.cbranch(builder.icmp_signed("<", at, count), inside, after)
    builder.position_at_end(inside)
    new = body(at, held)
    end = builder.basic_block
    at.add_incoming(builder.add(at, ir.Constant(I64, 1)), end)
    for phi, value in zip(held, new, strict=True):
        phi.add_incoming(value, end)
    builder.branch(head)
    builder.position_at_end(after)
    return held


def _sum_i32(builder: Any, vector: Any) -> Any:
    lanes = vector.type.count
    return builder.call(_external(builder, f"llvm.vector.reduce.add.v{lanes}i32", I32, [vector.type]), [vector])


def _pairs(builder: Any, unsigned: Any, signed: Any) -> Any:
    """Sums (v16i16) of two products each of 32 pairs of bytes. They have to fit into int16: beyond, they saturate."""
    halves = ir.VectorType(I16, 16)
    multiply = _external(builder, "llvm.x86.avx2.pmadd.ub.sw", halves, [unsigned.type, signed.type])
    return builder.call(multiply, [unsigned, signed])


def _add_products(builder: Any, total: Any, a: Any, b: Any) -> Any:
    """total (v8i32) + the sums of neighbouring products of a and b (v16i16)."""
    halves = ir.VectorType(I16, 16)
    multiply = _external(builder, "llvm.x86.avx2.pmadd.wd", total.type, [halves, halves])
    return builder.add(total, builder.call(multiply, [a, b]))


def _dot_bytes(builder: Any, total: Any, unsigned: Any, signed: Any) -> Any:
    """total (v16i32 or v8i32) + the products of 64 or 32 pairs of bytes."""
    lanes = unsigned.type.count
    if _path[0] == "avx512-vnni":
        fused = _external(builder, "llvm.x86.avx512.vpdpbusd.512", total.type, [total.type, unsigned.type, signed.type])
        return builder.call(fused, [total, unsigned, signed])
    wide = ir.VectorType(I32, lanes)
    products = builder.mul(builder.zext(unsigned, wide), builder.sext(signed, wide))
    step = total.type.count
    for start in range(0, lanes, step):
        places = ir.Constant(ir.VectorType(I32, step), [ir.Constant(I32, start + i) for i in range(step)])
        total = builder.add(total, builder.shuffle_vector(products, products, places))
    return total


def _byte_width() -> tuple[int, int]:
    """(bytes taken at once, lanes of their sums)."""
    return (64, 16) if _path[0] == "avx512-vnni" else (32, 8)


def _nibble_products(builder: Any, query: Any, at: Any, lines: list[Any], totals: list[Any]) -> list[Any]:
    """To each of the totals, the products of chunk number `at` of its codes and of the query."""
    width, _ = _byte_width()
    mask, four = _splat(I8, width, 15), _splat(I8, width, 4)
    side = builder.add(query, builder.shl(at, ir.Constant(I64, 7)))
    pairs: list[Any] = [None] * len(lines)
    totals = list(totals)
    for offset in range(0, 64, width):
        first = _load(builder, _plus(builder, side, offset), I8, width)
        second = _load(builder, _plus(builder, side, 64 + offset), I8, width)
        for i, codes in enumerate(lines):
            line = builder.add(codes, builder.shl(at, ir.Constant(I64, 6)))
            packed = _load(builder, _plus(builder, line, offset), I8, width)
            for nibbles, values in ((builder.and_(packed, mask), first), (builder.lshr(packed, four), second)):
                if _path[0] != "avx2":
                    totals[i] = _dot_bytes(builder, totals[i], nibbles, values)
                    continue
                more = _pairs(builder, nibbles, values)  # below 16: eight of them fit
                pairs[i] = more if pairs[i] is None else builder.add(pairs[i], more)
    if _path[0] == "avx2":
        ones = _splat(I16, 16, 1)
        totals = [_add_products(builder, total, pair, ones) for total, pair in zip(totals, pairs, strict=True)]
    return totals


@intrinsic  # type: ignore[untyped-decorator]
def nibble_dot(typing: Any, codes: Any, query: Any, chunks: Any) -> Any:
    """The sum (int32) of 4-bit codes times int8: `chunks` lines of 64 bytes against 128 int8 each."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        codes, query, chunks = arguments
        zero = _splat(I32, _byte_width()[1], 0)

        def body(at: Any, totals: list[Any]) -> list[Any]:
            return _nibble_products(builder, query, at, [codes], totals)

        return _sum_i32(builder, _loop(builder, chunks, [zero], body)[0])

    return types.int32(types.int64, types.int64, types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def nibble_dots(typing: Any, a: Any, b: Any, c: Any, d: Any, query: Any, chunks: Any, out: Any) -> Any:
    """Four of `nibble_dot` at once: `out` (4,) int32 becomes the sums for the codes a, b, c, d."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        *codes, query, chunks, out = arguments
        lanes = _byte_width()[1]

        def body(at: Any, totals: list[Any]) -> list[Any]:
            return _nibble_products(builder, query, at, codes, totals)

        def picked(left: Any, right: Any, places: list[int]) -> Any:
            kind = ir.VectorType(I32, len(places))
            return builder.shuffle_vector(left, right, ir.Constant(kind, [ir.Constant(I32, at) for at in places]))

        def folded(left: Any, right: Any, step: int) -> Any:
            """In each block of 2 * step lanes: the first half of left's plus the second, then the same of right's."""
            first = [i - i % step if i % (2 * step) < step else lanes + i - i % step - step for i in range(lanes)]
            first = [at + i % step for i, at in enumerate(first)]
            return builder.add(picked(left, right, first), picked(left, right, [at + step for at in first]))

        totals = _loop(builder, chunks, [_splat(I32, lanes, 0)] * 4, body)
        # Four lanes in a row become parts of the four sums, so that they are added up together.
        whole = folded(folded(totals[0], totals[2], 2), folded(totals[1], totals[3], 2), 1)
        for half in (8, 4)[lanes == 8 :]:
            lower, upper = list(range(half)), list(range(half, 2 * half))
            whole = builder.add(picked(whole, whole, lower), picked(whole, whole, upper))
        builder.store(whole, builder.inttoptr(out, whole.type.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7), generate


@intrinsic  # type: ignore[untyped-decorator]
def byte_dot(typing: Any, left: Any, right: Any, lines: Any, shift: Any) -> Any:
    """The sum (int32) of left times right, both int8 in `lines` of 64 bytes, none of right's -128.

    `shift` is 128 times the sum of right: VNNI multiplies bytes without a sign with bytes that have one, so that 128
    is added to left there, and taken out of the sum again.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        left, right, lines, shift = arguments
        width, lanes = _byte_width()

        def body(at: Any, totals: list[Any]) -> list[Any]:
            offset = builder.shl(at, ir.Constant(I64, 6))
            total = totals[0]
            for step in range(0, 64, width):
                a = _load(builder, _plus(builder, builder.add(left, offset), step), I8, width)
                b = _load(builder, _plus(builder, builder.add(right, offset), step), I8, width)
                if _path[0] == "avx2":
                    # |a| * (b with the sign of a): the sum of two such products is at most 2 * 128 * 127.
                    size = _external(builder, "llvm.abs.v32i8", a.type, [a.type, ir.IntType(1)])
                    sign = _external(builder, "llvm.x86.avx2.psign.b", a.type, [a.type, a.type])
                    a, b = builder.call(size, [a, ir.Constant(ir.IntType(1), 0)]), builder.call(sign, [b, a])
                    total = _add_products(builder, total, _pairs(builder, a, b), _splat(I16, 16, 1))
                else:
                    total = _dot_bytes(builder, total, builder.xor(a, _splat(I8, width, -128)), b)
            return [total]

        total = _sum_i32(builder, _loop(builder, lines, [_splat(I32, lanes, 0)], body)[0])
        return total if _path[0] == "avx2" else builder.sub(total, builder.trunc(shift, I32))

    return types.int32(types.int64, types.int64, types.int64, types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def bits_of(typing: Any, value: Any) -> Any:
    """The bits (int32) of a float32. Of floats without a sign they order as the floats do."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], I32)

    return types.int32(types.float32), generate


@intrinsic  # type: ignore[untyped-decorator]
def float_of(typing: Any, bits: Any) -> Any:
    """The float32 of these bits (int32)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], F32)

    return types.float32(types.int32), generate


def _float_sum(left: Any, squares: bool) -> Any:
    """An intrinsic (a, b, dim) -> float32: the sum of a * b, or of (a - b)², with a of type `left` and b float32."""
    size = {F16: 1, F32: 2}[left]
    lanes, unroll = 16, 4

    @intrinsic  # type: ignore[untyped-decorator]
    def sums(typing: Any, a: Any, b: Any, dim: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            a, b, dim = arguments
            vector = ir.VectorType(F32, lanes)

            def step(at: Any, total: Any, width: int) -> Any:
                x = _load_f32(builder, builder.add(a, builder.shl(at, ir.Constant(I64, size))), left, width)
                y = _load(builder, builder.add(b, builder.shl(at, ir.Constant(I64, 2))), F32, width)
                if squares:
                    x = y = builder.fsub(x, y)
                if width > 1 and _path[0] != "portable":
                    fused = _external(builder, f"llvm.fma.v{lanes}f32", vector, [vector] * 3)
                    return builder.call(fused, [x, y, total])
                return builder.fadd(total, builder.fmul(x, y))

            zero = _splat(F32, lanes, 0.0)
            blocks = builder.sdiv(dim, ir.Constant(I64, lanes * unroll))

            def block(at: Any, totals: list[Any]) -> list[Any]:
                first = builder.mul(at, ir.Constant(I64, lanes * unroll))
                return [step(_plus(builder, first, i * lanes), total, lanes) for i, total in enumerate(totals)]

            totals = _loop(builder, blocks, [zero] * unroll, block)
            done = builder.mul(blocks, ir.Constant(I64, lanes * unroll))
            rest = builder.sdiv(builder.sub(dim, done), ir.Constant(I64, lanes))

            def vectors(at: Any, one: list[Any]) -> list[Any]:
                return [step(builder.add(done, builder.mul(at, ir.Constant(I64, lanes))), one[0], lanes)]

            first = _loop(builder, rest, [totals[0]], vectors)[0]
            whole = builder.fadd(builder.fadd(first, totals[1]), builder.fadd(totals[2], totals[3]))
            reduce = _external(builder, f"llvm.vector.reduce.fadd.v{lanes}f32", F32, [F32, vector])
            total = builder.call(reduce, [ir.Constant(F32, -0.0), whole], fastmath=("reassoc",))
            seen = builder.add(done, builder.mul(rest, ir.Constant(I64, lanes)))

            def single(at: Any, one: list[Any]) -> list[Any]:
                return [step(builder.add(seen, at), one[0], 1)]

            return _loop(builder, builder.sub(dim, seen), [total], single)[0]

        return types.float32(types.int64, types.int64, types.int64), generate

    return sums


dot_f32 = _float_sum(F32, squares=False)
dot_f16 = _float_sum(F16, squares=False)
squares_f32 = _float_sum(F32, squares=True)
squares_f16 = _float_sum(F16, squares=True)


@intrinsic  # type: ignore[untyped-decorator]
def prefetch(typing: Any, address: Any) -> Any:
    """Ask for the cache line at an address, without waiting for it. Any address is harmless.

    It comes into the second level of cache: the first has room for some two dozen lines on their way, the second
    for many more.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = I8.as_pointer()
        fetch = _external(builder, "llvm.prefetch.p0", ir.VoidType(), [pointer, I32, I32, I32])
        hints = [ir.Constant(I32, value) for value in (0, 2, 1)]  # to read, to the second level, data
        builder.call(fetch, [builder.inttoptr(arguments[0], pointer), *hints])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def root(typing: Any, value: Any) -> Any:
    """The square root of a float64, as an instruction: `math.sqrt` would be a call."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        double = ir.DoubleType()
        return builder.call(_external(builder, "llvm.sqrt.f64", double, [double]), arguments)

    return types.float64(types.float64), generate


def _access(element: Any, kind: Any) -> tuple[Any, Any]:
    """(get, put) of one value at an address."""

    @intrinsic  # type: ignore[untyped-decorator]
    def get(typing: Any, address: Any, index: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            pointer = builder.inttoptr(arguments[0], element.as_pointer())
            return builder.load(builder.gep(pointer, [arguments[1]]))

        return kind(types.int64, types.int64), generate

    @intrinsic  # type: ignore[untyped-decorator]
    def put(typing: Any, address: Any, index: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            pointer = builder.inttoptr(arguments[0], element.as_pointer())
            builder.store(arguments[2], builder.gep(pointer, [arguments[1]]))
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, kind), generate

    return get, put


@inlined
def data_of(array):  # type: ignore[no-untyped-def]
    """The address of a NumPy array's data, given that of the array: `id(array)` costs nothing, `array.ctypes` 1 µs.

    It is the word behind the two of every Python object (PyArrayObject_fields in NumPy's ndarraytypes.h, which is
    part of its stable ABI); machine_code checks that this holds before it loads anything.
    """
    return get_i64(array, 2)


get_u8, put_u8 = _access(I8, types.uint8)
get_i8, put_i8 = _access(I8, types.int8)
get_i32, put_i32 = _access(I32, types.int32)
get_i64, put_i64 = _access(I64, types.int64)
get_u64, _ = _access(I64, types.uint64)
get_f32, put_f32 = _access(F32, types.float32)
get_f64, put_f64 = _access(F64, types.float64)


@intrinsic  # type: ignore[untyped-decorator]
def get_f16(typing: Any, address: Any, index: Any) -> Any:
    """One float16 as float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, index = arguments
        return _load_f32(builder, builder.add(address, builder.shl(index, ir.Constant(I64, 1))), F16, 1)

    return types.float32(types.int64, types.int64), generate


# ----------------------------------------------------------------------------------------------- heaps


@inlined
def push(heap, size, entry):  # type: ignore[no-untyped-def]
    """Put an int64 into a binary heap of `size` of them, the least first."""
    at = size
    while at > 0:
        parent = (at - 1) >> 1
        above = get_i64(heap, parent)
        if above <= entry:
            break
        put_i64(heap, at, above)
        at = parent
    put_i64(heap, at, entry)


@inlined
def replace_least(heap, size, entry):  # type: ignore[no-untyped-def]
    """Put an int64 into a heap of `size` of them, in the place of the least."""
    at, child = 0, 1
    while child < size:
        if child + 1 < size and get_i64(heap, child + 1) < get_i64(heap, child):
            child += 1
        if get_i64(heap, child) >= entry:
            break
        put_i64(heap, at, get_i64(heap, child))
        at, child = child, 2 * child + 1
    put_i64(heap, at, entry)
