"""The walk through the graph of `nng`, and what stands around it: compiled by machine_code, never imported to serve.

A pool is an array of int64, sorted: the upper 32 bits are a distance, then the place, then one bit that says whether
its neighbours were looked at. One comparison orders two entries, and a move is one copy.
`nearest_allowed` and `gather` keep other things in its memory.
"""

from __future__ import annotations

import math

import numpy as np

from vecsvc.indexes.nng_layout import (
    ALLOWED,
    BIAS,
    BIAS_MOST,
    CENTRED,
    CHECKED,
    CHUNKS,
    COSINE,
    DEGREE,
    DEPTH,
    DIM,
    DISTANCES,
    EF,
    END,
    ENOUGH,
    EPOCH,
    EXACT,
    FIRST,
    FRESH,
    GRAPH,
    HIGH,
    HOPS,
    INDEX,
    INVERSE_NORMS,
    KEYS,
    L2,
    LABELS,
    LEFT,
    LOW,
    METRIC,
    N_PIVOTS,
    NEAR,
    ORDER,
    PIVOT_CODES,
    PIVOTS,
    PLACES,
    POOL,
    QUERIES,
    QUERY,
    QUERY_CODE,
    RANKED,
    ROUNDS,
    SCALE,
    SCAN,
    SEEDS,
    SEEN,
    SIZE,
    SPREAD,
    STOPPED,
    VECTORS,
    VECTORS_BY_PLACE,
    VECTORS_HALF,
    VISITED,
    VISITS,
    WAYS,
    WEIGHTS,
    WORK,
    K,
)
from vecsvc.kernels import (
    bits_of,
    data_of,
    dot_f16,
    dot_f32,
    get_f32,
    get_i8,
    get_i32,
    get_i64,
    get_u8,
    inlined,
    inlined_sum,
    nibble_dot,
    nibble_dots,
    prefetch,
    push,
    put_f32,
    put_i8,
    put_i32,
    put_i64,
    put_u8,
    replace_least,
    root,
    squares_f16,
    squares_f32,
)

ZERO_AT = 1 << 30  # keys are shifted by so much, so that they are positive
AHEAD = 64  # codes that are fetched before they are compared
ROWS_AHEAD = 6  # vectors, likewise
LONG = 256  # entries of a pool in which it pays to look for a place by halving
HEAD = 32  # lines of a vector that a walk, which wants many at once, asks for: the processor sees what follows
WHOLE = 1 << 30  # lines, more than any vector has
FAR = 1 << 40  # farther than any key
FARTHEST = (1 << 63) - 1  # than any entry of a pool
# How many standard deviations of what codes leave open may hide one of the nearest. The k-th best by both halves, from
# which it is counted, is itself the luckiest of many, by two of them where vectors lie densely.
SURE_UPPER = 3.0
SURE_BOTH = 5.0
MEASURED = 128  # allowed places that say how far halves of codes may mislead


# --------------------------------------------------------------------------------------------- the query


@inlined
def length_factor(index, query, dim, checked):
    """What the query is multiplied by before it is compared; 0 where somebody has to look at its values first.

    A float32 sum of squares within these bounds proves that every value is finite and small enough, and that not all
    are zero. `checked` says that somebody has looked.
    """
    squares = dot_f32(query, query, dim)
    if 1e-30 < squares <= 1e15:
        return 1.0 / root(float(squares)) if get_i64(index, METRIC) == COSINE else 1.0
    if not checked:
        return 0.0
    if get_i64(index, METRIC) != COSINE:
        return 1.0
    precise = 0.0
    for j in range(dim):
        value = np.float64(get_f32(query, j))
        precise += value * value
    return 1.0 / root(precise)


@inlined
def prepare(index, work, query, factor):
    """Bring a query (dim,) into the forms of the vectors and of the codes; the value of one unit of a product.

    The codes say x = zero + step * c, so that <q, x> = <q, zero> + sum of (q * step) * c: q * step is rounded to
    int8 with one scale, and what is constant in x is left out.
    """
    dim, chunks, scale = get_i64(index, DIM), get_i64(index, CHUNKS), get_i64(index, SCALE)
    mine, centred, code = get_i64(work, QUERY), get_i64(work, CENTRED), get_i64(work, QUERY_CODE)
    weights, steps = get_i64(work, WEIGHTS), scale + 8 * dim
    for j in range(dim):
        put_f32(mine, j, get_f32(query, j) * factor)
    if get_i64(index, METRIC) == L2:
        for j in range(dim):
            put_f32(centred, j, get_f32(mine, j) - get_f32(scale, j))
    else:
        for j in range(dim):
            put_f32(centred, j, get_f32(mine, j))
    # Of floats without a sign, the greatest is the one whose bits are the greatest integer, and integers vectorise.
    for j in range(dim):
        put_f32(weights, j, abs(get_f32(centred, j) * get_f32(steps, j)))
    greatest = np.int32(0)
    for j in range(dim):
        greatest = max(greatest, get_i32(weights, j))
    put_i32(weights, 0, greatest)
    unit = float(get_f32(weights, 0)) / 127.0
    if get_i64(index, BIAS) != 0:
        # The bias in units of a product has to stay far from the end of 32 bits.
        unit = max(unit, float(get_f32(get_i64(index, BIAS_MOST), 0)) / float(1 << 28))
    unit = max(unit, 1e-37)
    inverse = np.float32(1.0 / unit)
    for j in range(dim):
        scaled = get_f32(centred, j) * get_f32(steps, j) * inverse
        put_i8(code, j, np.int8(np.int32(scaled + math.copysign(np.float32(0.5), scaled))))
    for j in range(dim, chunks * 128):
        put_i8(code, j, np.int8(0))
    return unit


@inlined
def bias_factor(index, unit):
    """What brings the bias into units of 16 products; for l2, d = bias - 2 <q, x> + what is constant."""
    if get_i64(index, METRIC) == L2:
        return 1.0 / (32.0 * unit)
    return 0.0


# ---------------------------------------------------------------------------------------------- the pool


@inlined
def place_of(entry):
    return (entry & 0xFFFFFFFF) >> 1


@inlined
def insert(pool, size, capacity, entry):
    """Put an entry where it belongs; the last one falls out of a full pool. Its position, or -1 if it is too far."""
    if size == capacity:
        if entry >= get_i64(pool, size - 1):
            return -1
        size -= 1
    if size > LONG:
        low, left = 0, size
        while left > 0:
            half = left >> 1
            if get_i64(pool, low + half) < entry:
                low, left = low + half + 1, left - half - 1
            else:
                left = half
        for i in range(size, low, -1):
            put_i64(pool, i, get_i64(pool, i - 1))
        put_i64(pool, low, entry)
        return low
    at = size
    while at > 0:  # looking for its place and making room in one
        before = get_i64(pool, at - 1)
        if before < entry:
            break
        put_i64(pool, at, before)
        at -= 1
    put_i64(pool, at, entry)
    return at


@inlined
def next_epoch(index, work):
    """A number that no place was met under; after 255 of them the marks are wiped."""
    epoch = get_i64(work, EPOCH) + 1
    if epoch > 255:
        seen = get_i64(work, SEEN)
        for i in range(get_i64(index, SIZE)):
            put_u8(seen, i, 0)
        epoch = 1
    put_i64(work, EPOCH, epoch)
    return epoch


# ---------------------------------------------------------------------------------------------- the walk


@inlined
def fetch_lines(index, place, most):
    """Ask for up to so many lines of the vector of a place, where there is one."""
    vectors, width = get_i64(index, VECTORS), get_i64(index, DIM) * (2 if get_i64(index, VECTORS_HALF) else 4)
    if vectors != 0:
        row = vectors + (place if get_i64(index, VECTORS_BY_PLACE) else get_i32(get_i64(index, ORDER), place)) * width
        for line in range(min(most, (width + 63) >> 6)):
            prefetch(row + (line << 6))


@inlined
def fetch_vector(index, place):
    fetch_lines(index, place, WHOLE)


@inlined
def fetch_head(index, place):
    fetch_lines(index, place, HEAD)


@inlined
def exact_distance(index, query, place, label, dim):
    """The distance of the query to one of the vectors, as `distance.py` defines it."""
    row = place if get_i64(index, VECTORS_BY_PLACE) else label
    half, metric = get_i64(index, VECTORS_HALF), get_i64(index, METRIC)
    vector = get_i64(index, VECTORS) + row * dim * (2 if half else 4)
    if metric == L2:
        return squares_f16(vector, query, dim) if half else squares_f32(vector, query, dim)
    product = dot_f16(vector, query, dim) if half else dot_f32(vector, query, dim)
    norms = get_i64(index, INVERSE_NORMS)
    return 1.0 - (product * get_f32(norms, label) if norms != 0 else product)


@inlined
def biased(bias, place, factor, product):
    """The key of a place, given the product of its codes."""
    key = ZERO_AT - product
    if bias != 0:
        key += int(get_f32(bias, place) * factor)
    return key


@inlined
def code_keys(index, work, places, count, keys, factor):
    """Put the distances of places (count,) int32 into keys (count,) int32, in units of 16 products.

    They are those of the upper halves of codes. Four are compared at a time: what is read and written beyond the last
    has to be places and room, too.
    """
    chunks, high, bias = get_i64(index, CHUNKS), get_i64(index, HIGH), get_i64(index, BIAS)
    code, row = get_i64(work, QUERY_CODE), chunks << 6
    for i in range(0, count, 4):
        a, b, c, d = get_i32(places, i), get_i32(places, i + 1), get_i32(places, i + 2), get_i32(places, i + 3)
        four = keys + (i << 2)
        nibble_dots(high + a * row, high + b * row, high + c * row, high + d * row, code, chunks, four)
        put_i32(four, 0, biased(bias, a, factor, get_i32(four, 0)))
        put_i32(four, 1, biased(bias, b, factor, get_i32(four, 1)))
        put_i32(four, 2, biased(bias, c, factor, get_i32(four, 2)))
        put_i32(four, 3, biased(bias, d, factor, get_i32(four, 3)))


@inlined
def fetch_code(index, place):
    chunks, bias = get_i64(index, CHUNKS), get_i64(index, BIAS)
    row = get_i64(index, HIGH) + place * (chunks << 6)
    for line in range(chunks):
        prefetch(row + (line << 6))
    if bias != 0:
        prefetch(bias + (place << 2))


@inlined
def vector_keys(index, work, places, count, keys, factor):
    """Put the distances of the vectors of places (count,) int32 into keys (count,), as int32 that order alike."""
    bias = get_i64(index, BIAS) if get_i64(index, METRIC) != L2 else 0
    for i in range(count):
        place = get_i32(places, i)
        label = get_i32(get_i64(index, ORDER), place)
        distance = exact_distance(index, get_i64(work, QUERY), place, label, get_i64(index, DIM))
        if bias != 0:
            distance += get_f32(bias, place) * factor
        bits = np.int64(bits_of(np.float32(distance)))
        # Those of negative floats order the other way round.
        put_i32(keys, i, bits if bits >= 0 else -(bits & 0x7FFFFFFF))


def walks_by(keys_of, fetch, side_by_side):
    """(rank_pivots, walk) that compare places by those keys; `side_by_side` where they are those of codes.

    The pivots' codes lie one behind the other, which is what makes ranking them cheap.
    """

    @inlined
    def rank_pivots(index, work, factor):
        """Compare the query with every pivot, whose codes lie side by side; RANKED begins with the nearest, sorted.

        As many are kept as the walk may ever start from. Returns how many those are.
        """
        chunks, total = get_i64(index, CHUNKS), get_i64(index, N_PIVOTS)
        codes, pivots, bias = get_i64(index, PIVOT_CODES), get_i64(index, PIVOTS), get_i64(index, BIAS)
        code, ranked, keys = get_i64(work, QUERY_CODE), get_i64(work, RANKED), get_i64(work, KEYS)
        size, row = 0, chunks << 6
        for first in range(0, total, 4):
            count, places = min(4, total - first), pivots + (first << 2)
            if side_by_side:
                a = codes + first * row
                b, c, d = a + min(1, count - 1) * row, a + min(2, count - 1) * row, a + (count - 1) * row
                nibble_dots(a, b, c, d, code, chunks, keys)
            else:
                keys_of(index, work, places, count, keys, factor)
            for i in range(count):
                place, key = get_i32(places, i), np.int64(get_i32(keys, i))
                if side_by_side:
                    key = biased(bias, place, factor, key)
                if insert(ranked, size, SEEDS * ROUNDS, (key << 32) | (place << 1)) >= 0 and size < SEEDS * ROUNDS:
                    size += 1
        return size

    @inlined
    def walk(index, work, ef, factor, pivots, max_visited):
        """Best-first search of the graph; the pool ends up with the `ef` nearest places that were met.

        Starts from the nearest of the `pivots` in RANKED. When every place of the pool was looked at, the walk is in a
        local optimum: it goes on from the next pivots, as long as one of them is nearer than the worst of the pool
        (Wang and Li, Query-Driven Iterated Neighborhood Graph Search for Large Scale Indexing, ACM MM 2012, section 3).
        Returns (size of the pool, places compared, whether max_visited cut it short, hops: places that were expanded).
        """
        degree, graph = get_i64(index, DEGREE), get_i64(index, GRAPH)
        pool, fresh, seen = get_i64(work, POOL), get_i64(work, FRESH), get_i64(work, SEEN)
        ranked, keys, near = get_i64(work, RANKED), get_i64(work, KEYS), get_i64(work, NEAR)
        epoch = next_epoch(index, work)
        size, offered, at, visited, stopped, hops = 0, 0, 0, get_i64(index, N_PIVOTS), 0, 0
        while True:
            if at >= size:
                end = min(offered + SEEDS, pivots)
                while offered < end:
                    entry = get_i64(ranked, offered)
                    offered += 1
                    place = place_of(entry)
                    if get_u8(seen, place) != epoch:
                        put_u8(seen, place, epoch)
                        position = insert(pool, size, ef, entry)
                        if position >= 0:
                            size += size < ef
                            at = min(at, position)
                if at >= size:
                    break
            if visited >= max_visited:
                stopped = 1
                break
            entry = get_i64(pool, at)
            put_i64(pool, at, entry | 1)
            hops += 1
            edges = graph + place_of(entry) * (degree << 2)
            following = at + 1
            while following < size and get_i64(pool, following) & 1:
                following += 1
            if following < size:
                probable = graph + place_of(get_i64(pool, following)) * (degree << 2)
                for line in range((degree + 15) >> 4):
                    prefetch(probable + (line << 6))
            # All neighbours are asked for before any is compared, so that they are on the way from memory together.
            # Which of them are new cannot be foreseen, so that nothing branches on it.
            count = 0
            for j in range(degree):
                place = get_i32(edges, j)
                if place < 0:
                    break
                fetch(index, place)
                put_i32(fresh, count, place)
                count += get_u8(seen, place) != epoch
                put_u8(seen, place, epoch)
            keys_of(index, work, fresh, count, keys, factor)
            # Nor can it be foreseen which are near enough: those are picked out before any is put into the pool.
            farthest, passed, best = get_i64(pool, size - 1) if size == ef else FARTHEST, 0, size
            for i in range(count):
                entry = (np.int64(get_i32(keys, i)) << 32) | (get_i32(fresh, i) << 1)
                put_i64(near, passed, entry)
                passed += entry < farthest
            for i in range(passed):
                position = insert(pool, size, ef, get_i64(near, i))
                if position >= 0:
                    size += size < ef
                    best = min(best, position)
            visited += count
            at = min(at, best)
            while at < size and get_i64(pool, at) & 1:
                at += 1
            if at < size:
                # Whatever is nearest now is very likely looked at next.
                edges = graph + place_of(get_i64(pool, at)) * (degree << 2)
                for line in range((degree + 15) >> 4):
                    prefetch(edges + (line << 6))
        return size, visited, stopped, hops

    return rank_pivots, walk


rank_by_codes, walk_by_codes = walks_by(code_keys, fetch_code, True)
rank_by_vectors, walk_by_vectors = walks_by(vector_keys, fetch_head, False)


@inlined
def whole(high, place, row, chunks, code, bias, factor):
    """The distance of a place in units of one product, by the upper halves of its codes."""
    key = -16 * np.int64(nibble_dot(high + place * row, code, chunks))
    if bias != 0:
        key += int(16.0 * get_f32(bias, place) * factor)
    return key


@inlined
def gather(index, work, allowed, max_visited):
    """Put every allowed label's place into the pool, in no order; (size of the pool, whether max_visited cut it)."""
    pool, places = get_i64(work, POOL), get_i64(index, PLACES)
    total, size, label = get_i64(index, SIZE), 0, 0
    while label < total:
        if label + 8 <= total and get_i64(allowed + label, 0) == 0:
            label += 8
            continue
        for _ in range(min(8, total - label)):
            if get_u8(allowed, label):
                if size >= max_visited:
                    return size, 1
                put_i64(pool, size, get_i32(places, label) << 1)
                size += 1
            label += 1
    return size, 0


# -------------------------------------------------------------------------------------------- the answer


@inlined
def keep_allowed(index, work, size, allowed):
    """Drop the places of the pool that the mask leaves out; how many stay."""
    pool, order = get_i64(work, POOL), get_i64(index, ORDER)
    kept = 0
    for i in range(size):
        entry = get_i64(pool, i)
        if get_u8(allowed, get_i32(order, place_of(entry))):
            put_i64(pool, kept, entry)
            kept += 1
    return kept


@inlined
def refine(index, work, size, factor):
    """Order the first `size` of the pool by both halves of the codes, in units of one product; in place."""
    chunks, low, bias = get_i64(index, CHUNKS), get_i64(index, LOW), get_i64(index, BIAS)
    pool, code = get_i64(work, POOL), get_i64(work, QUERY_CODE)
    row = chunks << 6
    for i in range(-AHEAD, size):
        if i + AHEAD < size:
            ahead = low + place_of(get_i64(pool, i + AHEAD)) * row
            for line in range(chunks):
                prefetch(ahead + (line << 6))
        if i < 0:
            continue
        entry = get_i64(pool, i)
        place = place_of(entry)
        coarse = (entry >> 32) - ZERO_AT
        fine = 0
        if bias != 0:
            # The bias was rounded to units of 16 products: it is taken out and put back finer.
            shift = get_f32(bias, place) * factor
            coarse -= int(shift)
            fine = int(16.0 * shift)
        key = ZERO_AT + 16 * coarse + fine - nibble_dot(low + place * row, code, chunks)
        insert(pool, i, size, (key << 32) | (place << 1))


@inlined
def weigh(index, work):
    """Make the float32 weights of single codes, and what is the same for all."""
    dim, chunks, scale = get_i64(index, DIM), get_i64(index, CHUNKS), get_i64(index, SCALE)
    centred, weights = get_i64(work, CENTRED), get_i64(work, WEIGHTS)
    constant, squares = 0.0, 0.0
    for j in range(dim):
        value = get_f32(centred, j)
        zero = get_f32(scale, dim + j)
        if get_i64(index, METRIC) == L2:
            zero -= get_f32(scale, j)
        constant += float(value) * zero
        squares += float(value) * value
        put_f32(weights, j, value * get_f32(scale, 2 * dim + j))
    for j in range(dim, chunks * 128):
        put_f32(weights, j, np.float32(0.0))
    return squares - 2.0 * constant if get_i64(index, METRIC) == L2 else 1.0 - constant


@inlined_sum
def weighted(high, low, weights, chunks):
    """The sum of weights (chunks * 128,) times the 8-bit codes of a row."""
    total = np.float32(0.0)
    for chunk in range(chunks):
        first = chunk << 7
        for i in range(64):
            upper, lower = get_u8(high, (chunk << 6) + i), get_u8(low, (chunk << 6) + i)
            total += get_f32(weights, first + i) * np.float32((upper & 15) * 16 + (lower & 15))
            total += get_f32(weights, first + 64 + i) * np.float32((upper >> 4) * 16 + (lower >> 4))
    return total


@inlined
def code_distance(index, work, place, constant):
    """The distance to what a place's codes stand for, without rounding the query."""
    chunks, bias = get_i64(index, CHUNKS), get_i64(index, BIAS)
    row = place * (chunks << 6)
    product = weighted(get_i64(index, HIGH) + row, get_i64(index, LOW) + row, get_i64(work, WEIGHTS), chunks)
    if bias != 0:
        return max(0.0, constant + get_f32(bias, place) - 2.0 * product)
    return constant - product


@inlined
def closer(distance, label, labels, distances, i):
    other = get_f32(distances, i)
    return distance < other or (distance == other and label < get_i64(labels, i))


@inlined
def constant_part(index, work):
    """What code_distance wants to know beside the weights, which are made here; without meaning for vectors."""
    return weigh(index, work) if get_i64(index, VECTORS) == 0 else 0.0


@inlined
def swap(labels, distances, i, j):
    label, distance = get_i64(labels, i), get_f32(distances, i)
    put_i64(labels, i, get_i64(labels, j))
    put_f32(distances, i, get_f32(distances, j))
    put_i64(labels, j, label)
    put_f32(distances, j, distance)


@inlined
def sink(labels, distances, size):
    """Bring what is first in a heap of which the first is the farthest to where it belongs."""
    at, child = 0, 1
    while child < size:
        if child + 1 < size and closer(get_f32(distances, child), get_i64(labels, child), labels, distances, child + 1):
            child += 1
        if not closer(get_f32(distances, at), get_i64(labels, at), labels, distances, child):
            break
        swap(labels, distances, at, child)
        at, child = child, 2 * child + 1


@inlined
def settle(index, work, place, constant, k, found, labels, distances):
    """Put a place among the nearest of the answer, by (distance, label), if it is one; how many those are now.

    Until `put_in_order` they are a heap, so that no order of candidates makes it slow.
    """
    label = get_i32(get_i64(index, ORDER), place)
    if get_i64(index, VECTORS) != 0:
        distance = np.float32(exact_distance(index, get_i64(work, QUERY), place, label, get_i64(index, DIM)))
    else:
        distance = np.float32(code_distance(index, work, place, constant))
    if get_i64(index, METRIC) == COSINE:
        distance = max(distance, np.float32(0.0))  # rounding may put a vector nearer than itself
    if found == k:
        if closer(distance, label, labels, distances, 0):
            put_f32(distances, 0, distance)
            put_i64(labels, 0, label)
            sink(labels, distances, k)
        return k
    put_f32(distances, found, distance)
    put_i64(labels, found, label)
    at = found
    while at > 0:
        above = (at - 1) >> 1
        if not closer(get_f32(distances, above), get_i64(labels, above), labels, distances, at):
            break
        swap(labels, distances, at, above)
        at = above
    return found + 1


@inlined
def put_in_order(found, k, labels, distances):
    """The heap of an answer by (distance, label); a row that is short ends in -1 at +inf."""
    for size in range(found - 1, 0, -1):
        swap(labels, distances, 0, size)
        sink(labels, distances, size)
    for i in range(found, k):
        put_f32(distances, i, float("inf"))
        put_i64(labels, i, -1)


@inlined
def answer(index, work, size, k, depth, labels, distances):
    """Write the k nearest of the pool's first `depth` entries."""
    pool = get_i64(work, POOL)
    compared = min(size, depth)
    if get_i64(index, VECTORS) != 0 and not get_i64(index, VECTORS_BY_PLACE):
        for i in range(compared):  # where a vector lies has to be read before it can be fetched
            prefetch(get_i64(index, ORDER) + (place_of(get_i64(pool, i)) << 2))
    constant = constant_part(index, work)
    found = 0
    for i in range(-ROWS_AHEAD, compared):
        if i + ROWS_AHEAD < compared:
            fetch_vector(index, place_of(get_i64(pool, i + ROWS_AHEAD)))
        if i >= 0:
            found = settle(index, work, place_of(get_i64(pool, i)), constant, k, found, labels, distances)
    put_in_order(found, k, labels, distances)


@inlined
def ones(word):
    """How many of the eight bytes of a word are 1, the others being 0."""
    return np.int64((np.uint64(word) * np.uint64(0x0101010101010101)) >> np.uint64(56))


@inlined
def lower_halves(index, work, allowed, left):
    """(mean, standard deviation) of what the upper halves of codes leave out of a product, in its units.

    Measured by some of what is allowed, evenly spread over it: lower halves of values that are mostly 0, as those of
    counts or of what a rectifier lets through, are nothing like uniform, and a filter may leave only such vectors.
    """
    chunks, low, total = get_i64(index, CHUNKS), get_i64(index, LOW), get_i64(index, SIZE)
    places, code, fresh = get_i64(index, PLACES), get_i64(work, QUERY_CODE), get_i64(work, FRESH)
    row, stride = chunks << 6, max(1, left // MEASURED)
    count, met, label = 0, 0, 0
    wanted = stride >> 1
    while label < total and count < MEASURED:
        if label + 8 <= total:
            more = ones(get_i64(allowed + label, 0))
            if met + more <= wanted:
                met += more
                label += 8
                continue
        for _ in range(min(8, total - label)):
            if get_u8(allowed, label):
                if met == wanted and count < MEASURED:
                    place = get_i32(places, label)
                    put_i32(fresh, count, place)
                    count += 1
                    wanted += stride
                    for line in range(chunks):
                        prefetch(low + place * row + (line << 6))
                met += 1
            label += 1
    sum_, squares = 0.0, 0.0
    for i in range(count):
        left_out = float(nibble_dot(low + get_i32(fresh, i) * row, code, chunks))
        sum_ += left_out
        squares += left_out * left_out
    mean = sum_ / max(1, count)
    return mean, root(max(0.0, squares / max(1, count) - mean * mean))


@inlined
def rounding(index, work):
    """The standard deviation of what both halves of codes are off by, in units of a product.

    Values and query were rounded to whole codes: each is off by a variance of 1/12, times the square of what it is
    multiplied by. Of codes that is how far they lie from their mean, for what is the same in all changes no order.
    """
    dim, chunks, code = get_i64(index, DIM), get_i64(index, CHUNKS), get_i64(work, QUERY_CODE)
    spread, squares = float(get_f32(get_i64(index, SPREAD), 0)), 0
    for j in range(chunks << 7):
        value = np.int64(get_i8(code, j))
        squares += value * value
    return root((float(squares) + dim * spread * spread) / 12.0)


@inlined
def keep_least(heap, size, k, key):
    """Keep the k least keys, turned round so that the greatest is the first of a heap; how many those are now."""
    if size < k:
        push(heap, size, -key)
        return size + 1
    if key < -get_i64(heap, 0):
        replace_least(heap, k, -key)
    return k


@inlined
def nearest_allowed(index, work, k, depth, factor, allowed, left, max_visited, labels, distances):
    """Answer with the k nearest of all allowed labels; (vectors compared, whether max_visited cut it).

    Each is compared by the upper halves of its codes; by both, if it may then still be one of the nearest; and exactly,
    if even so it may be. "May be" is one of the best 8 * DEPTH or DEPTH that were met, or within some deviations
    of what codes leave open. So a few hundred vectors are read where the nearest lie well apart, and thousands where
    they lie densely, as they do at the edge of a mask that leaves only what is far from the query; and what codes
    misrepresent, because it lies beyond their ends, is found where it stands out.
    POOL holds two heaps of bare distances, by both halves and by the upper ones.
    The mask is read eight labels at a time, so that a filter that leaves few costs little more than those few.
    """
    chunks, total = get_i64(index, CHUNKS), get_i64(index, SIZE)
    high, low, bias = get_i64(index, HIGH), get_i64(index, LOW), get_i64(index, BIAS)
    places, code = get_i64(index, PLACES), get_i64(work, QUERY_CODE)
    pool, fresh = get_i64(work, POOL), get_i64(work, FRESH)
    row = chunks << 6
    mean, deviation = lower_halves(index, work, allowed, left)
    left_out, by_upper, by_both = int(mean), int(SURE_UPPER * deviation), int(SURE_BOTH * rounding(index, work))
    constant = constant_part(index, work)
    coarse, breadth = pool + (depth << 3), 8 * depth
    broad, ranked, found, visited, label, worst = 0, 0, 0, 0, 0, FAR
    while label < total and visited < max_visited:
        count = 0
        while label < total and count < 64:
            if label + 8 <= total and get_i64(allowed + label, 0) == 0:
                label += 8
                continue
            for _ in range(min(8, total - label)):
                if get_u8(allowed, label):
                    place = get_i32(places, label)
                    put_i32(fresh, count, place)
                    count += 1
                    for line in range(chunks):
                        prefetch(high + place * row + (line << 6))
                label += 1
        visited += count
        near, limit = 0, worst + by_both + by_upper
        for i in range(count):
            place = get_i32(fresh, i)
            key = whole(high, place, row, chunks, code, bias, factor)
            broad = keep_least(coarse, broad, breadth, key)
            if key - left_out <= limit or broad < breadth or key <= -get_i64(coarse, 0):
                put_i32(fresh, near, place)
                near += 1
                for line in range(chunks):
                    prefetch(low + place * row + (line << 6))
        nearer = 0
        for i in range(near):
            place = get_i32(fresh, i)
            key = whole(high, place, row, chunks, code, bias, factor) - nibble_dot(low + place * row, code, chunks)
            if key <= worst + by_both:
                put_i32(fresh, nearer, place)
                nearer += 1
                fetch_vector(index, place)
                ranked = keep_least(pool, ranked, depth, key)
                if ranked == depth:
                    worst = -get_i64(pool, 0)
        for i in range(nearer):
            found = settle(index, work, get_i32(fresh, i), constant, k, found, labels, distances)
    put_in_order(found, k, labels, distances)
    return visited, visited < left


def search_by(rank_pivots, walk, by_codes):
    """A search whose walk compares in that way; `by_codes` says that both halves of the codes order better."""

    def search(call):
        """Answer some queries as the block of the call says.

        With a mask, EF is wide enough to hold what the mask will take away. Where fewer than ENOUGH allowed places
        are in the pool after the walk, the mask lies far from the query, and every allowed vector is compared after
        all, as `nearest_allowed` does. EF 0 does that at once, and EF -1 compares every allowed vector as those at the
        head of a pool are.
        Returns END, or the number of a query whose values have to be looked at before going on.
        """
        index, work, end = get_i64(call, INDEX), get_i64(call, WORK), get_i64(call, END)
        k, ef, depth, enough = get_i64(call, K), get_i64(call, EF), get_i64(call, DEPTH), get_i64(call, ENOUGH)
        max_visited, dim = get_i64(call, VISITS), get_i64(index, DIM)
        queries, allowed = data_of(get_i64(call, QUERIES)), get_i64(call, ALLOWED)
        labels, distances = data_of(get_i64(call, LABELS)), data_of(get_i64(call, DISTANCES))
        visited, stopped = data_of(get_i64(call, VISITED)), data_of(get_i64(call, STOPPED))
        hops = data_of(get_i64(call, HOPS))
        if allowed != 0:
            allowed = data_of(allowed)
        left, ways = get_i64(call, LEFT), get_i64(call, WAYS)
        if ways != 0:
            ways = data_of(ways)
        for i in range(get_i64(call, FIRST), end):
            query = queries + i * dim * 4
            factor = length_factor(index, query, dim, i == get_i64(call, CHECKED))
            if factor == 0.0:
                return i
            unit = prepare(index, work, query, factor)
            factor = bias_factor(index, unit)
            size, met, cut, steps = 0, 0, 0, 0
            if ef < 0:
                size, cut = gather(index, work, allowed, max_visited)
                answer(index, work, size, k, size, labels + i * k * 8, distances + i * k * 4)
                put_i64(visited, i, size)
                put_u8(stopped, i, cut)
                put_i64(hops, i, 0)
                original = get_i64(index, VECTORS) != 0 and get_i64(index, VECTORS_BY_PLACE) == 0
                put_u8(ways, i, EXACT if original else SCAN)
                continue
            if ef > 0:
                pivots = rank_pivots(index, work, factor)
                size, met, cut, steps = walk(index, work, ef, factor, pivots, max_visited)
                if allowed != 0:
                    size = keep_allowed(index, work, size, allowed)
            if allowed != 0 and size < enough and cut == 0 and size > 0 and max_visited - met < left:
                # What is left of the bound is not enough to compare all: what the walk found is better than a part.
                cut = 1
            if allowed != 0 and size < enough and cut == 0:
                more, cut = nearest_allowed(
                    index, work, k, depth, factor, allowed, left, max_visited - met, labels + i * k * 8,
                    distances + i * k * 4,
                )  # fmt: skip
                met += more
                put_u8(ways, i, SCAN)
            else:
                # What is this far down in the coarse order does not come into the first `depth` of the fine one.
                size = min(size, 4 * depth)
                if by_codes:
                    refine(index, work, size, factor)
                answer(index, work, size, k, depth, labels + i * k * 8, distances + i * k * 4)
            put_i64(visited, i, met)
            put_u8(stopped, i, cut)
            put_i64(hops, i, steps)
        return end

    return search


nng_search = search_by(rank_by_codes, walk_by_codes, True)
nng_search_vectors = search_by(rank_by_vectors, walk_by_vectors, False)
