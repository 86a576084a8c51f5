"""Many ids at once, out of the mapped batches into one Arrow column: compiled by machine_code, never imported to serve.

Labels come in the order of answers, so that each lies anywhere in the files: where the next ones lie is asked for
before the first is read.
"""

from __future__ import annotations

import numpy as np

from vecsvc.kernels import data_of, get_i32, get_i64, get_u8, inlined, prefetch, put_i32, put_i64, put_u8

BATCH_BITS = 14  # ids.BATCH_ROWS is two to this power
AHEAD = 16


@inlined
def at_of(label):
    """Where a label is in its batch."""
    return label & ((1 << BATCH_BITS) - 1)


def take_strings(labels, n, batches, offsets, data, room):
    """The strings of labels (n,) int64, one behind the other; how many bytes they have.

    `batches` holds two addresses for each batch, of its int32 offsets and of its bytes. `offsets` (n + 1,) int32 is
    written; `data` only where its `room` bytes are enough. Arrays are given as data_of wants them.
    """
    labels, batches, offsets, data = data_of(labels), data_of(batches), data_of(offsets), data_of(data)
    total = 0
    put_i32(offsets, 0, 0)
    for i in range(-AHEAD, n):
        if i + AHEAD < n:
            ahead = get_i64(labels, i + AHEAD)
            prefetch(get_i64(batches, 2 * (ahead >> BATCH_BITS)) + 4 * at_of(ahead))
        if i >= 0:
            label = get_i64(labels, i)
            batch, at = label >> BATCH_BITS, at_of(label)
            starts = get_i64(batches, 2 * batch)
            first = get_i32(starts, at)
            prefetch(get_i64(batches, 2 * batch + 1) + first)
            total += np.int64(get_i32(starts, at + 1)) - first
            put_i32(offsets, i + 1, total)  # without meaning where they become too many, and then nobody reads it
    if total > room:
        return total
    for i in range(n):
        label = get_i64(labels, i)
        batch = label >> BATCH_BITS
        first = get_i32(get_i64(batches, 2 * batch), at_of(label))
        source = get_i64(batches, 2 * batch + 1) + first
        start = get_i32(offsets, i)
        for j in range(get_i32(offsets, i + 1) - start):
            put_u8(data, start + j, get_u8(source, j))
    return total


def take_integers(labels, n, batches, out):
    """The int64 of labels (n,) int64; `batches` holds the address of each batch."""
    labels, batches, out = data_of(labels), data_of(batches), data_of(out)
    for i in range(-AHEAD, n):
        if i + AHEAD < n:
            ahead = get_i64(labels, i + AHEAD)
            prefetch(get_i64(batches, ahead >> BATCH_BITS) + 8 * at_of(ahead))
        if i >= 0:
            label = get_i64(labels, i)
            put_i64(out, i, get_i64(get_i64(batches, label >> BATCH_BITS), at_of(label)))
    return n
