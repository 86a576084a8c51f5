"""Grows one trinary-projection tree over rows of float32, float16 or int8: compiled by machine_code, never imported.

Wang et al., Trinary-Projection Trees for Approximate Nearest Neighbor Search, PAMI 36 (2014). A tree halves its rows
again and again, each time along the direction of largest variance among those that add and take away a few axes.

Rows keep their order inside a child, so that a pass over it goes through memory in one direction.
"""

from __future__ import annotations

import numpy as np

from vecsvc.indexes.tp_tree_layout import (
    AXES,
    CANDIDATES,
    COVARIANCE,
    DEVIATIONS,
    MAX_TOP_DIMS,
    MINUS,
    MOMENTS,
    NODE_SLOTS,
    PLUS,
    POWERS,
    SAMPLE,
    SIGNS,
    SPARE,
    STACK,
    STATE,
    TOP,
    TOP_VARIANCES,
    VALUES,
)
from vecsvc.kernels import (
    get_f16,
    get_f32,
    get_i8,
    get_i32,
    get_i64,
    inlined,
    prefetch,
    put_f32,
    put_i32,
    put_i64,
)

AHEAD = 16  # rows that are fetched before they are projected
ZERO = np.float32(0.0)


@inlined
def get_small(address, index):
    return np.float32(get_i8(address, index))


# ------------------------------------------------------------------------------------------------ chance


@inlined
def below(work, n):
    """A number from 0 to n - 1, n below 2^31, by the upper bits of a linear congruential generator modulo 2^64.

    The multiplier is that of MMIX: Knuth, The Art of Computer Programming, vol. 2, section 3.3.4.
    """
    state = get_i64(work, STATE) * 6364136223846793005 + 1442695040888963407
    put_i64(work, STATE, state)
    return (((state >> 33) & 0x7FFFFFFF) * n) >> 31


@inlined
def draw_sample(work, order, start, count, wanted):
    """Rows of a node, as many as wanted: one by chance of each of so many equal parts. How many they are."""
    sample = get_i64(work, SAMPLE)
    if count <= wanted:
        for i in range(count):
            put_i32(sample, i, get_i32(order, start + i))
        return count
    first = 0
    for i in range(wanted):
        end = (i + 1) * count // wanted
        put_i32(sample, i, get_i32(order, start + first + below(work, end - first)))
        first = end
    return wanted


# --------------------------------------------------------------------------------------------- direction


@inlined
def rank_axes(work, dim, sampled, wanted):
    """TOP begins with the axes of largest variance in the sample, at most `wanted`. How many have any."""
    sums = get_i64(work, MOMENTS) + (dim << 2)
    squares, top, variances = sums + (dim << 2), get_i64(work, TOP), get_i64(work, TOP_VARIANCES)
    size = 0
    for j in range(dim):
        total = get_f32(sums, j)
        variance = get_f32(squares, j) - total * (total / np.float32(sampled))
        if not variance > ZERO or (size == wanted and not variance > get_f32(variances, size - 1)):
            continue
        if size < wanted:
            size += 1
        at = size - 1
        while at > 0 and variance > get_f32(variances, at - 1):
            put_f32(variances, at, get_f32(variances, at - 1))
            put_i32(top, at, get_i32(top, at - 1))
            at -= 1
        put_f32(variances, at, variance)
        put_i32(top, at, j)
    return size


@inlined
def draw_axes(work, ranked, wanted):
    """Move axes to the beginning of TOP, by chance: the trees of a forest shall differ. How many."""
    top = get_i64(work, TOP)
    count = min(ranked, wanted)
    for i in range(count):
        j = i + below(work, ranked - i)
        chosen = get_i32(top, j)
        put_i32(top, j, get_i32(top, i))
        put_i32(top, i, chosen)
    return count


@inlined
def sign(plus, minus, i):
    return ((plus >> i) & 1) - ((minus >> i) & 1)


@inlined
def choose_direction(work, count):
    """AXES and SIGNS become the w in {-1, 0, 1}^count of largest w'Cw / w'w; how many axes it has.

    Coordinate-wise enumeration: every direction over the first axes is carried on with -1, 0 and 1 on the next
    one, which changes w'Cw by two sums. The first sign is +1, for -w is the same direction.
    """
    covariance, plus, minus, powers = (
        get_i64(work, COVARIANCE),
        get_i64(work, PLUS),
        get_i64(work, MINUS),
        get_i64(work, POWERS),
    )
    put_i32(plus, 0, 0)
    put_i32(minus, 0, 0)
    put_f32(powers, 0, ZERO)
    known, best, best_value = 1, 0, ZERO
    for j in range(count):
        row, new = covariance + j * (MAX_TOP_DIMS << 2), known
        for d in range(known):
            p, m = get_i32(plus, d), get_i32(minus, d)
            shared, axes = ZERO, 1
            for i in range(j):
                s = sign(p, m, i)
                shared += np.float32(s) * get_f32(row, i)
                axes += s & 1
            for s in range(1, -2 if d > 0 else 0, -2):
                power = get_f32(powers, d) + np.float32(2 * s) * shared + get_f32(row, j)
                put_i32(plus, new, p | (1 << j) if s > 0 else p)
                put_i32(minus, new, m if s > 0 else m | (1 << j))
                put_f32(powers, new, power)
                value = power / np.float32(axes)
                if value > best_value:
                    best, best_value = new, value
                new += 1
        known = new
    top, axes, signs = get_i64(work, TOP), get_i64(work, AXES), get_i64(work, SIGNS)
    size = 0
    for i in range(count):
        s = sign(get_i32(plus, best), get_i32(minus, best), i)
        if s != 0:
            put_i32(axes, size, get_i32(top, i))
            put_f32(signs, size, np.float32(s))
            size += 1
    return size


# ------------------------------------------------------------------------------------------------- split


@inlined
def select(work, values, count, target):
    """Reorder values so that `target` of them, none greater than any other, come first (Hoare's FIND)."""
    low, high = 0, count - 1
    while low < high:
        pivot = get_f32(values, low + below(work, high - low + 1))
        i, j = low, high
        while i <= j:
            while get_f32(values, i) < pivot:
                i += 1
            while get_f32(values, j) > pivot:
                j -= 1
            if i <= j:
                swapped = get_f32(values, i)
                put_f32(values, i, get_f32(values, j))
                put_f32(values, j, swapped)
                i += 1
                j -= 1
        if target <= j:
            high = j
        elif target >= i:
            low = i
        else:
            break


@inlined
def divide(work, order, start, count, first):
    """Share out a node's rows: the `first` of smallest projection, then the others. The threshold between them.

    It is a quantile and no mean, as the paper has it, so that every leaf is about as full as it may be.
    """
    values, spare = get_i64(work, VALUES), get_i64(work, SPARE)
    for i in range(count):
        put_f32(spare, i, get_f32(values, i))
    select(work, spare, count, first)
    bound, nearest, ties = get_f32(spare, first), get_f32(spare, 0), 0
    for i in range(first):
        nearest = max(nearest, get_f32(spare, i))
        ties += get_f32(spare, i) == bound
    left, right = 0, 0
    for i in range(count):
        row, value = get_i32(order, start + i), get_f32(values, i)
        goes = value < bound
        if value == bound and ties > 0:
            goes = True
            ties -= 1
        # Written to both sides, and kept on one: which it is cannot be foretold, so that a branch would cost more.
        put_i32(order, start + left, row)
        put_i32(spare, right, row)
        left += goes
        right += not goes
    for i in range(right):
        put_i32(order, start + first + i, get_i32(spare, i))
    return np.float32(0.5) * nearest + np.float32(0.5) * bound


# -------------------------------------------------------------------------------------------------- tree


def _grower(get, width):
    """The kernel `grow` for values that `get` reads as float32, of `width` bytes each."""

    @inlined
    def gather_moments(points, dim, work, sampled):
        """Sums of the sample's values and of their squares, less one row, so that far origins do no harm."""
        sample, moments = get_i64(work, SAMPLE), get_i64(work, MOMENTS)
        sums = moments + (dim << 2)
        squares = sums + (dim << 2)
        lines = (dim * width + 63) >> 6
        for j in range(dim):
            put_f32(moments, j, get(points, get_i32(sample, 0) * dim + j))
            put_f32(sums, j, ZERO)
            put_f32(squares, j, ZERO)
        for i in range(sampled):
            if i + 3 < sampled:
                ahead = points + get_i32(sample, i + 3) * dim * width
                for line in range(lines):
                    prefetch(ahead + (line << 6))
            row = points + get_i32(sample, i) * dim * width
            for j in range(dim):
                value = get(row, j) - get_f32(moments, j)
                put_f32(sums, j, get_f32(sums, j) + value)
                put_f32(squares, j, get_f32(squares, j) + value * value)

    @inlined
    def gather_covariance(points, dim, work, sampled, count):
        """COVARIANCE of the first axes of TOP over the sample, times its size."""
        sample, top, moments = get_i64(work, SAMPLE), get_i64(work, TOP), get_i64(work, MOMENTS)
        covariance, deviations = get_i64(work, COVARIANCE), get_i64(work, DEVIATIONS)
        for i in range(MAX_TOP_DIMS * MAX_TOP_DIMS):
            put_f32(covariance, i, ZERO)
        for i in range(sampled):
            row = points + get_i32(sample, i) * dim * width
            for a in range(count):
                axis = get_i32(top, a)
                mean = get_f32(moments, axis) + get_f32(moments, dim + axis) / np.float32(sampled)
                put_f32(deviations, a, get(row, axis) - mean)
            for a in range(count):
                line, value = covariance + a * (MAX_TOP_DIMS << 2), get_f32(deviations, a)
                for b in range(a + 1):
                    put_f32(line, b, get_f32(line, b) + value * get_f32(deviations, b))

    @inlined
    def project(points, dim, work, order, start, count, size):
        """VALUES of a node's rows along its direction of `size` axes."""
        values, axes, signs = get_i64(work, VALUES), get_i64(work, AXES), get_i64(work, SIGNS)
        for i in range(count):
            if i + AHEAD < count:
                ahead = points + get_i32(order, start + i + AHEAD) * dim * width
                for a in range(size):
                    prefetch(ahead + get_i32(axes, a) * width)
            row = points + get_i32(order, start + i) * dim * width
            total = ZERO
            for a in range(size):
                total += get_f32(signs, a) * get(row, get_i32(axes, a))
            # What is no number would lead the selection out of its array.
            put_f32(values, i, total if total == total else ZERO)

    def grow(points, n, dim, leaf_size, n_samples, top_dims, work, order, starts, nodes):
        """Grow a tree over `points` (n, dim). The number of its leaves, which is ceil(n / leaf_size).

        Writes `order` (n,) int32, and `starts` (leaves + 1,) int64: where in it each leaf begins. `nodes` (leaves - 1,
        top_dims + NODE_SLOTS) int32 is filled as tp_tree_layout says, with the root first; 0 for none.
        """
        stack, axes, signs = get_i64(work, STACK), get_i64(work, AXES), get_i64(work, SIGNS)
        for i in range(n):
            put_i32(order, i, i)
        put_i64(stack, 0, 0)
        put_i64(stack, 1, n)
        put_i64(stack, 2, -1)
        depth, known, leaves = 1, 0, 0
        while depth > 0:
            depth -= 1
            frame = stack + depth * 24
            start, count, link = get_i64(frame, 0), get_i64(frame, 1), get_i64(frame, 2)
            share = (count + leaf_size - 1) // leaf_size
            if link >= 0:
                put_i32(nodes, link, ~leaves if share == 1 else known)
            if share == 1:
                put_i64(starts, leaves, start)
                leaves += 1
                continue
            sampled = draw_sample(work, order, start, count, n_samples)
            gather_moments(points, dim, work, sampled)
            chosen = draw_axes(work, rank_axes(work, dim, sampled, CANDIDATES), top_dims)
            gather_covariance(points, dim, work, sampled, chosen)
            size = choose_direction(work, chosen)
            project(points, dim, work, order, start, count, size)
            first = count * (share // 2) // share
            threshold = divide(work, order, start, count, first)
            link = -1
            if nodes != 0:
                node = known * (top_dims + NODE_SLOTS)
                for a in range(top_dims):
                    code = 0
                    if a < size:
                        code = (get_i32(axes, a) + 1) * int(get_f32(signs, a))
                    put_i32(nodes, node + a, code)
                put_f32(nodes, node + top_dims, threshold)
                link = node + top_dims + 1
            known += 1
            # The second child goes below the first on the stack, so that leaves are met in their order.
            put_i64(frame, 0, start + first)
            put_i64(frame, 1, count - first)
            put_i64(frame, 2, link + 1 if link >= 0 else -1)
            put_i64(frame, 3, start)
            put_i64(frame, 4, first)
            put_i64(frame, 5, link)
            depth += 2
        put_i64(starts, leaves, n)
        return leaves

    return grow


tp_tree_grow_float32 = _grower(get_f32, 4)
tp_tree_grow_float16 = _grower(get_f16, 2)
tp_tree_grow_int8 = _grower(get_small, 1)
