"""Best-first search of a forest of `tp_tree`: compiled by machine_code, never imported to serve.

The queue and the answer are arrays of int64: the upper half is a float32 in a form that integers are ordered by, the
lower half says whose it is. One comparison orders two entries, ties included.
"""

from __future__ import annotations

import numpy as np

from vecsvc.indexes.tp_tree_layout import (
    ABOVE,
    BELOW,
    BEST,
    BITS,
    COSINE,
    DIM,
    EPOCH,
    FRESH,
    INVERSE_NORMS,
    L2,
    METRIC,
    NODE_SLOTS,
    NODES,
    ORDER,
    QUERY,
    QUEUE,
    ROOTS,
    SEEN,
    SIDE,
    SIZE,
    STARTS,
    THRESHOLD,
    TOP_DIMS,
    TREES,
    VECTORS,
    VECTORS_HALF,
)
from vecsvc.kernels import (
    dot_f16,
    dot_f32,
    get_f32,
    get_i32,
    get_i64,
    get_u8,
    inlined,
    prefetch,
    push,
    put_f32,
    put_i32,
    put_i64,
    put_u8,
    replace_least,
    squares_f16,
    squares_f32,
)

AHEAD = 4  # rows that are fetched before they are compared
ZERO, ONE = np.float32(0.0), np.float32(1.0)


# --------------------------------------------------------------------------------------------- the query


@inlined
def prepare(index, work, query):
    """Bring a query (dim,) into the forms of the vectors and of the trees, which stand over unit vectors but for l2."""
    dim, metric = get_i64(index, DIM), get_i64(index, METRIC)
    mine, side = get_i64(work, QUERY), get_i64(work, SIDE)
    scale = 1.0
    if metric != L2:
        # Divided by the largest first, so that squares neither overflow nor vanish.
        largest, squares = 0.0, 0.0
        for j in range(dim):
            largest = max(largest, abs(get_f32(query, j)))
        if largest > 0.0:
            for j in range(dim):
                squares += (get_f32(query, j) / largest) ** 2
            scale = 1.0 / (largest * squares**0.5)
    for j in range(dim):
        value = get_f32(query, j)
        put_f32(side, j, value * scale)
        put_f32(mine, j, value * scale if metric == COSINE else value)
    put_f32(side, dim, ZERO)


@inlined
def next_epoch(index, work):
    """A number that no label was met under; after 255 of them the marks are wiped."""
    epoch = get_i64(work, EPOCH) + 1
    if epoch > 255:
        seen = get_i64(work, SEEN)
        for i in range(get_i64(index, SIZE)):
            put_u8(seen, i, 0)
        epoch = 1
    put_i64(work, EPOCH, epoch)
    return epoch


# --------------------------------------------------------------------------------------------- the queue


@inlined
def entry_of(work, value, name):
    """`value` (float32) and `name` (32 bits) as one number that is ordered by value, then by name."""
    bits = get_i64(work, BITS)
    put_f32(bits, 0, value + ZERO)  # which makes 0 of -0, whose bits are others
    ordered = int(get_i32(bits, 0))
    if ordered < 0:
        ordered ^= 0x7FFFFFFF
    return (ordered << 32) | (name & 0xFFFFFFFF)


@inlined
def pop(queue, size):
    """The least of `size` entries; the others are a heap again."""
    least = get_i64(queue, 0)
    replace_least(queue, size - 1, get_i64(queue, size - 1))
    return least


@inlined
def next_leaf(index, work, size):
    """Take the subtree of least priority and go down in it to a leaf: (leaf, entries that wait now).

    What is passed by on the way waits with the priority of its parent and the squared distance to the hyperplane
    between. No bound of the distance, for directions are not orthogonal: it only says what to look at first.
    """
    nodes, top = get_i64(index, NODES), get_i64(index, TOP_DIMS)
    queue, side, bits = get_i64(work, QUEUE), get_i64(work, SIDE), get_i64(work, BITS)
    entry = pop(queue, size)
    size -= 1
    put_i32(bits, 0, entry >> 32)
    priority = get_f32(bits, 0)
    at = entry & 0xFFFFFFFF
    if at >= 0x80000000:
        at -= 0x100000000
    while at >= 0:
        node = nodes + at * ((top + NODE_SLOTS) << 2)
        total, axes = ZERO, 0
        for a in range(top):
            code = get_i32(node, a)
            if code == 0:
                break
            total += get_f32(side, code - 1) if code > 0 else -get_f32(side, -code - 1)
            axes += 1
        away = total - get_f32(node, top + THRESHOLD)
        below, above = get_i32(node, top + BELOW), get_i32(node, top + ABOVE)
        far = priority + away * away / np.float32(max(axes, 1))
        push(queue, size, entry_of(work, far, above if away < ZERO else below))
        size += 1
        at = int(below if away < ZERO else above)
    return ~at, size


# -------------------------------------------------------------------------------------------- comparison


@inlined
def insert(best, size, capacity, entry):
    """Put an entry where it belongs in a sorted array, if it is not too far. How many there are now."""
    if size == capacity:
        if entry >= get_i64(best, size - 1):
            return size
        size -= 1
    low, high = 0, size
    while low < high:
        middle = (low + high) >> 1
        if get_i64(best, middle) < entry:
            low = middle + 1
        else:
            high = middle
    for i in range(size, low, -1):
        put_i64(best, i, get_i64(best, i - 1))
    put_i64(best, low, entry)
    return size + 1


@inlined
def collect(index, work, leaf, epoch, allowed, most):
    """FRESH becomes those of a leaf that are allowed and were not met before, at most so many. How many they are."""
    order, seen, fresh = get_i64(index, ORDER), get_i64(work, SEEN), get_i64(work, FRESH)
    starts, count = get_i64(index, STARTS), 0
    for i in range(get_i64(starts, leaf), get_i64(starts, leaf + 1)):
        label = get_i32(order, i)
        if get_u8(seen, label) == epoch or count >= most:
            continue
        put_u8(seen, label, epoch)
        if allowed == 0 or get_u8(allowed, label):
            put_i32(fresh, count, label)
            count += 1
    return count


@inlined
def compare(index, work, count, found, k):
    """Compare the query with the rows of FRESH. How many entries BEST has now."""
    dim, half, metric = get_i64(index, DIM), get_i64(index, VECTORS_HALF), get_i64(index, METRIC)
    vectors, norms = get_i64(index, VECTORS), get_i64(index, INVERSE_NORMS)
    fresh, best, query = get_i64(work, FRESH), get_i64(work, BEST), get_i64(work, QUERY)
    width = dim * (2 if half else 4)
    lines = (width + 63) >> 6
    for i in range(min(AHEAD, count)):
        row = vectors + get_i32(fresh, i) * width
        for line in range(lines):
            prefetch(row + (line << 6))
    for i in range(count):
        if i + AHEAD < count:
            row = vectors + get_i32(fresh, i + AHEAD) * width
            for line in range(lines):
                prefetch(row + (line << 6))
        label = int(get_i32(fresh, i))
        row = vectors + label * width
        if metric == L2:
            distance = squares_f16(row, query, dim) if half else squares_f32(row, query, dim)
        else:
            product = dot_f16(row, query, dim) if half else dot_f32(row, query, dim)
            distance = ONE - (product * get_f32(norms, label) if metric == COSINE else product)
        found = insert(best, found, k, entry_of(work, distance, label))
    return found


@inlined
def answer(work, found, k, labels, distances):
    """Write what BEST holds as a row of k places; the empty ones are -1 at +inf."""
    best = get_i64(work, BEST)
    for i in range(found):
        entry = get_i64(best, i)
        bits = entry >> 32
        put_i32(distances, i, bits if bits >= 0 else bits ^ 0x7FFFFFFF)
        put_i64(labels, i, entry & 0xFFFFFFFF)
    for i in range(found, k):
        put_f32(distances, i, np.float32(np.inf))
        put_i64(labels, i, -1)


def tp_tree_search(
    index, work, queries, n, k, goal, most_compared, most_met, allowed, labels, distances, visited, stopped
):
    """Answer n queries (n, dim) float32: labels (n, k) int64, distances (n, k) float32, visited (n,), stopped (n,).

    Compares `goal` vectors, which is at most as many as there are (as `allowed` (size,) marks, where it is not 0).
    Stops before, and says so, where `most_compared` were compared or `most_met` were looked at, leaf by leaf.
    """
    dim, trees, roots = get_i64(index, DIM), get_i64(index, TREES), get_i64(index, ROOTS)
    starts, queue = get_i64(index, STARTS), get_i64(work, QUEUE)
    reach = min(goal, most_compared)
    for i in range(n):
        prepare(index, work, queries + i * dim * 4)
        epoch = next_epoch(index, work)
        for t in range(trees):
            push(queue, t, entry_of(work, ZERO, get_i32(roots, t)))
        size, compared, met, found = trees, 0, 0, 0
        while size > 0 and compared < reach and met < most_met:
            leaf, size = next_leaf(index, work, size)
            met += get_i64(starts, leaf + 1) - get_i64(starts, leaf)
            count = collect(index, work, leaf, epoch, allowed, reach - compared)
            found = compare(index, work, count, found, k)
            compared += count
        answer(work, found, k, labels + i * k * 8, distances + i * k * 4)
        put_i64(visited, i, compared)
        put_u8(stopped, i, compared < goal)
    return n
