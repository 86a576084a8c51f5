"""Numbers out of JSON text, straight into float32, and back: compiled by machine_code, never imported to serve.

A decimal of up to 18 digits is an integer times a power of ten. As float64, that is off by at most three units of its
last place; rounded once more, to float32, it is the value that the correctly rounded float64 gives, unless it lies
so near the middle between two float32 that those few units decide. Such a number is left to the decoder, and so is
whatever is out of the ordinary, and whatever is no JSON.

The other way nine digits tell every float32 from its neighbours. They come from one product with a power of ten that
float64 has exactly, so the last of them may be off by one, a third at most of what means a neighbour.
"""

from __future__ import annotations

import numpy as np

from vecsvc.kernels import data_of, get_f32, get_f64, get_i64, get_u8, get_u64, inlined, put_f32, put_f64, put_u8

SPACE, PLUS, COMMA, MINUS, POINT, ZERO, OPEN, CLOSE, SMALL_E = 32, 43, 44, 45, 46, 48, 91, 93, 101
SPACES = 1 << SPACE | 1 << 9 | 1 << 10 | 1 << 13
MAX_DIGITS = 18  # so many fit into an int64
POWERS = 22  # powers of ten up to this one are float64 exactly
EXACT = 1 << 53  # integers up to here are float64 exactly
LOW_BITS = (1 << 29) - 1  # those that float32 has no room for
MIDDLE = 1 << 28
NEAR = 8  # units of the last place of a float64
HIGH, ZEROS, SIXES = np.uint64(0xF0F0F0F0F0F0F0F0), np.uint64(0x3030303030303030), np.uint64(0x0606060606060606)
PAIRS, LEFT, RIGHT = np.uint64(0x000000FF000000FF), np.uint64(1_000_000 << 32 | 100), np.uint64(10_000 << 32 | 1)
TEN, BYTE, TWO_BYTES, FOUR_BYTES = np.uint64(10), np.uint64(8), np.uint64(16), np.uint64(32)
WRITTEN = 9  # digits of a float32 that is written
FIRST = 10 ** (WRITTEN - 1)  # the least number of so many digits
FROM, BELOW = 1e-13, 1e9  # what is written here; the rest is left to the encoder
PLAIN = -5  # numbers with smaller powers of ten are written with an exponent
LOG2 = 0.30102999566398120  # to base 10
LEAST, MOST = 1.1754943508222875e-38, 3.4028234663852886e38  # the normal float32


@inlined
def after_space(at, end):
    """Where the next character stands that is no white space."""
    while at < end:
        character = get_u8(at, 0)
        if character > SPACE or not (SPACES >> character) & 1:
            break
        at += 1
    return at


@inlined
def after_item(at, end):
    """(the character behind an item, 0 where the text ends; where the next begins that is no white space)"""
    at = after_space(at, end)
    if at >= end:
        return 0, at
    return np.int64(get_u8(at, 0)), after_space(at + 1, end)


@inlined
def eight(at):
    """The value of eight digits, -1 where they are not eight: all at once, as bytes of one integer."""
    word = get_u64(at, 0)
    if (word & HIGH) != ZEROS or ((word + SIXES) & HIGH) != ZEROS:
        return np.int64(-1)
    word -= ZEROS
    word = word * TEN + (word >> BYTE)  # every other byte holds two digits
    pairs = (word & PAIRS) * LEFT + ((word >> TWO_BYTES) & PAIRS) * RIGHT
    return np.int64(pairs >> FOUR_BYTES)


@inlined
def digits(at, end, value):
    """(the address behind the digits at `at`, `value` with them behind it; -1 where they are too many)"""
    while at + 8 <= end and value < 10 ** (MAX_DIGITS - 8):
        more = eight(at)
        if more < 0:
            break
        value = 100_000_000 * value + more
        at += 8
    while at < end:
        digit = np.int64(get_u8(at, 0)) - ZERO
        if not 0 <= digit <= 9:
            break
        if value >= 10 ** (MAX_DIGITS - 1):
            return at, np.int64(-1)
        value = 10 * value + digit
        at += 1
    return at, value


@inlined
def number(at, end, out, powers, scratch):
    """Write the number that begins at `at` to `out`; the address behind it, 0 where it is left to the decoder."""
    negative = get_u8(at, 0) == MINUS
    first = at + negative
    at, value = digits(first, end, np.int64(0))
    if at == first or (at > first + 1 and get_u8(first, 0) == ZERO):
        return 0
    exponent = 0
    if at < end and get_u8(at, 0) == POINT and value >= 0:
        point = at + 1
        at, value = digits(point, end, value)
        exponent = point - at
        if exponent == 0:
            return 0
    if value < 0:
        return 0
    if at < end and (get_u8(at, 0) | 32) == SMALL_E:
        at += 1
        down = at < end and get_u8(at, 0) == MINUS
        first = at + (at < end and (down or get_u8(at, 0) == PLUS))
        at, given = digits(first, end, np.int64(0))
        if at == first or not 0 <= given < 1000:
            return 0
        exponent += -given if down else given
    if value == 0:
        put_f32(out, 0, np.float32(-0.0 if negative else 0.0))
        return at
    if exponent < -2 * POWERS or exponent > POWERS:
        return 0
    found = float(value)
    if exponent < -POWERS:
        found = found / get_f64(powers, POWERS) / get_f64(powers, -exponent - POWERS)
    elif exponent < 0:
        found /= get_f64(powers, -exponent)
    else:
        found *= get_f64(powers, exponent)
    if not LEAST <= found <= MOST:
        return 0
    if value > EXACT or exponent < -POWERS:
        put_f64(scratch, 0, found)
        if abs((get_i64(scratch, 0) & LOW_BITS) - MIDDLE) <= NEAR:
            return 0
    put_f32(out, 0, np.float32(-found if negative else found))
    return at


def json_rows(text, length, out, powers):
    """Write the numbers of a JSON array, or of an array of arrays of the same length, to `out`.

    `text` and `out` are the addresses of arrays (see data_of): `length` bytes, and float32 with room for every second
    of them and three more. `powers` is where 10^0 to 10^22 are as float64.
    Returns how many numbers there are, and above 32 bits how many inner arrays, 0 where there are none. -1 where the
    text is anything else, JSON or not.
    """
    text, out = data_of(text), data_of(out)
    end = text + length
    scratch = out + 4 * (length // 2 + 1)
    at = after_space(text, end)
    if at >= end or get_u8(at, 0) != OPEN:
        return -1
    at = after_space(at + 1, end)
    nested = at < end and get_u8(at, 0) == OPEN
    rows, total, width = 0, 0, -1
    while True:
        if nested:
            if at >= end or get_u8(at, 0) != OPEN:
                return -1
            at = after_space(at + 1, end)
        before = total
        while True:
            if at >= end:
                return -1
            if get_u8(at, 0) != MINUS and not ZERO <= get_u8(at, 0) <= ZERO + 9:
                return -1
            at = number(at, end, out + 4 * total, powers, scratch)
            if at == 0:
                return -1
            total += 1
            sign, at = after_item(at, end)
            if sign == CLOSE:
                break
            if sign != COMMA:
                return -1
        if not nested:
            break
        if width >= 0 and total - before != width:
            return -1
        width = total - before
        rows += 1
        sign, at = after_item(at, end)
        if sign == CLOSE:
            break
        if sign != COMMA:
            return -1
    if at < end:
        return -1
    return rows << 32 | total


@inlined
def put_digits(value, count, at):
    """Write `value` with so many digits to `at`; the address behind them, zeros at their end left out but for one."""
    kept = np.int64(0)
    for place in range(count - 1, -1, -1):
        tens = value // np.uint32(10)
        digit = value - tens * np.uint32(10)
        value = tens
        if digit != 0 and kept == 0:
            kept = place + 1
        put_u8(at, place, np.uint8(ZERO + digit))
    return at + max(kept, 1)


@inlined
def put_number(value, at, powers):
    """Write a float32 to `at`; the address behind it, 0 where it is left to the encoder."""
    size = abs(np.float64(value))
    if size == 0.0:
        put_f64(at, 0, np.float64(value))
        if get_i64(at, 0) < 0:  # -0.0 is told from 0.0 by its bits alone
            put_u8(at, 0, MINUS)
            at += 1
        put_u8(at, 0, ZERO)
        put_u8(at, 1, POINT)
        put_u8(at, 2, ZERO)
        return at + 3
    if not FROM <= size < BELOW:
        return 0
    if value < 0:
        put_u8(at, 0, MINUS)
        at += 1
    put_f64(at, 0, size)
    power = np.int64(np.floor(((get_i64(at, 0) >> 52) - 1023) * LOG2))  # of ten, or one too small
    scaled = size * get_f64(powers, WRITTEN - 1 - power)
    if scaled >= 10 * FIRST:
        power += 1
        scaled = size * get_f64(powers, WRITTEN - 1 - power)
    whole = np.int64(scaled + 0.5)
    if whole >= 10 * FIRST:
        whole = np.int64(FIRST)
        power += 1
    number = np.uint32(whole)
    if power >= 0:
        before = np.uint32(1)
        for _ in range(WRITTEN - 1 - power):
            before *= np.uint32(10)
        high = number // before
        for place in range(power, -1, -1):
            tens = high // np.uint32(10)
            put_u8(at, place, np.uint8(ZERO + high - tens * np.uint32(10)))
            high = tens
        put_u8(at, power + 1, POINT)
        if power == WRITTEN - 1:
            put_u8(at, power + 2, ZERO)
            return at + power + 3
        return put_digits(number % before, WRITTEN - 1 - power, at + power + 2)
    if power >= PLAIN:
        put_u8(at, 0, ZERO)
        put_u8(at, 1, POINT)
        at += 2
        for _ in range(-1 - power):
            put_u8(at, 0, ZERO)
            at += 1
        return put_digits(number, WRITTEN, at)
    put_u8(at, 0, np.uint8(ZERO + number // np.uint32(FIRST)))
    put_u8(at, 1, POINT)
    at = put_digits(number % np.uint32(FIRST), WRITTEN - 1, at + 2)
    put_u8(at, 0, SMALL_E)
    put_u8(at, 1, MINUS)
    put_u8(at, 2, np.uint8(ZERO + -power // 10))
    put_u8(at, 3, np.uint8(ZERO + -power % 10))
    return at + 4


def json_text(values, count, out, powers):
    """Write `count` float32 as a JSON array to `out`; its bytes, -1 where a number is left to the encoder.

    `values` and `out` are the addresses of arrays (see data_of); `out` has room for 17 bytes a number and ten more.
    `powers` is where 10^0 to 10^22 are as float64.
    """
    values, out = data_of(values), data_of(out)
    put_u8(out, 0, OPEN)
    at = out + 1
    for i in range(count):
        if i > 0:
            put_u8(at, 0, COMMA)
            at += 1
        at = put_number(get_f32(values, i), at, powers)
        if at == 0:
            return -1
    put_u8(at, 0, CLOSE)
    return at + 1 - out
