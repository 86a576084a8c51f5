"""What the building of an `nng` graph spends its time with: compiled by machine_code, never imported to build.

Distances between vectors are squared Euclidean, over int8 codes in lines of 64 bytes: |a|² + |b|² - 2 <a, b>, in
units of the codes' step. They are the distances of the codes exactly, so that they never contradict each other. Where
codes blur neighbours they are of the float32 rows, and stand as the bits of a float32, which order as it does.
A candidate for a place is an int64: the distance in the upper 32 bits, then how far from that place it lies in their
order. So among duplicates each has others for neighbours, and edges lead through all of them.
"""

from __future__ import annotations

import numpy as np

from index_builders.nng_layout import AUGMENT, BYTES, LINES, ROWS, SHIFTS, SQUARES, STEP, WIDTH
from vecsvc.indexes.nng_kernels import (
    place_of,
    prepare,
    rank_by_codes,
    rank_by_vectors,
    walk_by_codes,
    walk_by_vectors,
)
from vecsvc.indexes.nng_layout import (
    CHUNKS,
    DIM,
    HIGH,
    L2,
    LOW,
    METRIC,
    POOL,
    QUERY,
    SCALE,
    VECTORS,
)
from vecsvc.kernels import (
    bits_of,
    byte_dot,
    data_of,
    float_of,
    get_f32,
    get_i32,
    get_i64,
    get_u8,
    inlined,
    prefetch,
    put_f32,
    put_i32,
    put_i64,
    put_u8,
    squares_f32,
)

FAR = (1 << 31) - 1


@inlined
def between(codes, a, b):
    """The squared distance of two places, as an integer that orders as it does; see `value_of`."""
    rows, augment = get_i64(codes, ROWS), get_i64(codes, AUGMENT)
    if rows != 0:
        width = get_i64(codes, WIDTH)
        exact = squares_f32(rows + a * width * 4, rows + b * width * 4, width)
        if augment != 0:
            beyond = get_f32(augment, a) - get_f32(augment, b)
            exact += beyond * beyond
        return np.int64(bits_of(np.float32(exact)))
    lines = get_i64(codes, LINES)
    bytes, squares, shifts = get_i64(codes, BYTES), get_i64(codes, SQUARES), get_i64(codes, SHIFTS)
    product = byte_dot(bytes + a * (lines << 6), bytes + b * (lines << 6), lines, get_i32(shifts, b))
    distance = get_i32(squares, a) + get_i32(squares, b) - 2 * product
    if augment != 0:
        apart = (get_f32(augment, a) - get_f32(augment, b)) / get_f32(get_i64(codes, STEP), 0)
        distance += int(min(1e9, apart * apart))
    return min(distance, FAR)


@inlined
def value_of(codes, distance):
    """What a distance is worth beside others."""
    return float(float_of(np.int32(distance))) if get_i64(codes, ROWS) != 0 else float(distance)


@inlined
def candidate_of(place, other, distance):
    apart = other - place
    return (distance << 32) | ((apart << 1) ^ (apart >> 63))


@inlined
def other_of(place, candidate):
    folded = candidate & 0xFFFFFFFF
    return place + ((folded >> 1) ^ -(folded & 1))


@inlined
def insert_once(pool, size, capacity, entry):
    """As `insert`, but an entry that is there already is not put in again."""
    if size == capacity and entry >= get_i64(pool, size - 1):
        return size
    low, high = 0, size
    while low < high:
        middle = (low + high) >> 1
        if get_i64(pool, middle) < entry:
            low = middle + 1
        else:
            high = middle
    if low < size and get_i64(pool, low) == entry:
        return size
    if size == capacity:
        size -= 1
    for i in range(size, low, -1):
        put_i64(pool, i, get_i64(pool, i - 1))
    put_i64(pool, low, entry)
    return size + 1


def nng_pair_leaf(codes, order, start, stop, lists, width, filled):
    """Offer every pair of the leaf order[start:stop] to the lists of both; `lists` (size, width) int64, sorted.

    `filled` (size,) int32 says how long each is. Leaves of one tree may be worked on at once: they share no place.
    """
    order, lists, filled = data_of(order), data_of(lists), data_of(filled)
    for i in range(start, stop):
        a = get_i32(order, i)
        mine, length = lists + a * width * 8, get_i32(filled, a)
        for j in range(start, i):
            b = get_i32(order, j)
            distance = between(codes, a, b)
            if length < width or distance <= get_i64(mine, length - 1) >> 32:
                length = insert_once(mine, length, width, candidate_of(a, b, distance))
            other, reach = lists + b * width * 8, get_i32(filled, b)
            if reach < width or distance <= get_i64(other, reach - 1) >> 32:
                put_i32(filled, b, insert_once(other, reach, width, candidate_of(b, a, distance)))
        put_i32(filled, a, length)
    return 0


def nng_take_lists(codes, neighbours, given, order, places, lists, width, filled, start, stop):
    """Make the lists of the places start to stop out of neighbours (size, given) int64, by label, -1 after the last."""
    neighbours, order, places = data_of(neighbours), data_of(order), data_of(places)
    lists, filled = data_of(lists), data_of(filled)
    for place in range(start, stop):
        label = get_i32(order, place)
        length = 0
        for j in range(given):
            neighbour = get_i64(neighbours, label * given + j)
            if neighbour < 0:
                break
            other = get_i32(places, neighbour)
            entry = candidate_of(place, other, between(codes, place, other))
            length = insert_once(lists + place * width * 8, length, width, entry)
        put_i32(filled, place, length)
    return 0


@inlined
def prune(codes, place, candidates, count, edges, degree, slack):
    """Choose edges of a place among `count` sorted candidates: those to which no chosen one is nearer than the place.

    "Nearer" counts distances between neighbours `slack` times, so that more stay than the relative neighbourhood
    graph has (Subramanya et al., DiskANN, NeurIPS 2019, algorithm 2). Returns how many were chosen.
    """
    chosen = 0
    for i in range(count):
        candidate = get_i64(candidates, i)
        other, distance = other_of(place, candidate), candidate >> 32
        if distance == 0 and chosen >= degree >> 1:
            continue  # Duplicates do not take all the edges: somebody has to lead away from them.
        occluded, far = False, value_of(codes, distance)
        for j in range(chosen):
            if slack * value_of(codes, between(codes, get_i32(edges, j), other)) < far:
                occluded = True
                break
        if not occluded:
            put_i32(edges, chosen, other)
            chosen += 1
            if chosen == degree:
                break
    return chosen


@inlined
def end_row(edges, chosen, degree):
    for i in range(chosen, degree):
        put_i32(edges, i, -1)


def nng_choose(codes, lists, width, filled, graph, degree, slack_percent, start, stop):
    """Edges of the places start to stop out of their lists; `graph` (size, degree) int32."""
    lists, filled, graph = data_of(lists), data_of(filled), data_of(graph)
    for place in range(start, stop):
        edges = graph + place * degree * 4
        count = get_i32(filled, place)
        chosen = prune(codes, place, lists + place * width * 8, count, edges, degree, slack_percent / 100.0)
        end_row(edges, chosen, degree)
    return 0


def nng_count_in(graph, size, degree, counts):
    """How many edges lead to each place: counts[place + 1], int64."""
    graph, counts = data_of(graph), data_of(counts)
    for i in range(size * degree):
        place = get_i32(graph, i)
        if place >= 0:
            put_i64(counts, place + 1, get_i64(counts, place + 1) + 1)
    return 0


def nng_fill_in(graph, size, degree, ends, sources):
    """Where those edges come from: `ends` holds where each place's sources start, and is moved to their ends."""
    graph, ends, sources = data_of(graph), data_of(ends), data_of(sources)
    for place in range(size):
        for j in range(degree):
            target = get_i32(graph, place * degree + j)
            if target < 0:
                break
            end = get_i64(ends, target)
            put_i32(sources, end, place)
            put_i64(ends, target, end + 1)
    return 0


def nng_link(codes, graph, degree, starts, sources, slack_percent, pool, room, linked, linked_degree, start, stop):
    """Give the places start to stop their edges and those that lead to them; where that is too many, prune again.

    `pool` has room for `room` candidates, the nearest of which are considered.
    """
    graph, starts, sources, linked = data_of(graph), data_of(starts), data_of(sources), data_of(linked)
    pool = data_of(pool)
    for place in range(start, stop):
        count = 0
        for j in range(degree):
            other = get_i32(graph, place * degree + j)
            if other < 0:
                break
            count = insert_once(pool, count, room, candidate_of(place, other, between(codes, place, other)))
        for i in range(get_i64(starts, place), get_i64(starts, place + 1)):
            other = get_i32(sources, i)
            count = insert_once(pool, count, room, candidate_of(place, other, between(codes, place, other)))
        edges = linked + place * linked_degree * 4
        if count <= linked_degree:
            for i in range(count):
                put_i32(edges, i, other_of(place, get_i64(pool, i)))
            end_row(edges, count, linked_degree)
        else:
            end_row(edges, prune(codes, place, pool, count, edges, linked_degree, slack_percent / 100.0), linked_degree)
    return 0


@inlined
def decode(index, work, place):
    """Put the vector that a place's codes stand for into QUERY."""
    dim, chunks, scale, query = get_i64(index, DIM), get_i64(index, CHUNKS), get_i64(index, SCALE), get_i64(work, QUERY)
    high, low = get_i64(index, HIGH) + place * (chunks << 6), get_i64(index, LOW) + place * (chunks << 6)
    for j in range(dim):
        byte, shift = ((j >> 7) << 6) + (j & 63), (j & 64) >> 4
        code = ((get_u8(high, byte) >> shift) & 15) * 16 + ((get_u8(low, byte) >> shift) & 15)
        put_f32(query, j, get_f32(scale, dim + j) + get_f32(scale, 2 * dim + j) * code)


def refine_by(rank_pivots, walk, by_vectors):
    """A refinement whose walk compares in that way."""

    def refine(index, work, codes, ef, lists, width, filled, pool, slack_percent, graph, degree, start, stop):
        """Choose the edges of the places start to stop anew, among what a search of the graph for each one finds.

        The candidates are the `ef` places that the walk ends with, and those of its list. Returns how many vectors were
        compared on the way.
        """
        lists, filled, pool, graph = data_of(lists), data_of(filled), data_of(pool), data_of(graph)
        compared = 0
        lines, bytes = get_i64(codes, LINES), get_i64(codes, BYTES)
        augment = get_i64(codes, AUGMENT)
        for place in range(start, stop):
            if by_vectors:
                query, row = get_i64(work, QUERY), get_i64(index, VECTORS) + place * get_i64(index, DIM) * 4
                for j in range(get_i64(index, DIM)):
                    put_f32(query, j, get_f32(row, j))
                unit = 1.0 / 16.0
            else:
                decode(index, work, place)
                unit = prepare(index, work, get_i64(work, QUERY), np.float32(1.0))
            factor = 0.0
            if get_i64(index, METRIC) == L2:
                factor = 1.0 / (32.0 * unit)
            elif augment != 0:
                # Among vectors made equally long by one more dimension, the nearest have the greatest product.
                factor = -get_f32(augment, place) / (16.0 * unit)
            pivots = rank_pivots(index, work, factor)
            size, met, _, _ = walk(index, work, ef, factor, pivots, 1 << 60)
            compared += met
            found = get_i64(work, POOL)
            for i in range(size):
                place_found = place_of(get_i64(found, i))
                row = bytes + place_found * (lines << 6)
                if by_vectors:
                    row = get_i64(index, VECTORS) + place_found * get_i64(index, DIM) * 4
                for line in range(lines):  # of a row of floats its first quarter: the processor sees what follows
                    prefetch(row + (line << 6))
            room, count = ef + width, 0
            for i in range(size):
                other = place_of(get_i64(found, i))
                if other != place:
                    count = insert_once(pool, count, room, candidate_of(place, other, between(codes, place, other)))
            for i in range(get_i32(filled, place)):
                count = insert_once(pool, count, room, get_i64(lists + place * width * 8, i))
            edges = graph + place * degree * 4
            end_row(edges, prune(codes, place, pool, count, edges, degree, slack_percent / 100.0), degree)
        return compared

    return refine


nng_refine = refine_by(rank_by_codes, walk_by_codes, False)
nng_refine_vectors = refine_by(rank_by_vectors, walk_by_vectors, True)


def nng_reach(graph, degree, seeds, count, reached, queue):
    """Mark what can be reached from the seeds (count,) int32: reached (size,) bool. Returns how many were new."""
    graph, seeds, reached, queue = data_of(graph), data_of(seeds), data_of(reached), data_of(queue)
    tail = 0
    for i in range(count):
        place = get_i32(seeds, i)
        if not get_u8(reached, place):
            put_u8(reached, place, 1)
            put_i32(queue, tail, place)
            tail += 1
    head = 0
    while head < tail:
        edges = graph + get_i32(queue, head) * degree * 4
        head += 1
        for j in range(degree):
            place = get_i32(edges, j)
            if place < 0:
                break
            if not get_u8(reached, place):
                put_u8(reached, place, 1)
                put_i32(queue, tail, place)
                tail += 1
    return tail
