"""Hits of many queries as messages of an Arrow IPC stream: an object for each column, none for each hit."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import chain
from typing import Any, Final

import msgspec
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from vecsvc.distance import score
from vecsvc.ids import IdColumn
from vecsvc.types import Distances, Hit, Labels, Metric

# Of a message that serves as the form of others: few answers are larger, and so many forms are remembered.
_KEPT_HITS: Final = 10_000
_KEPT_BYTES: Final = 1 << 20  # of its strings
_KEPT_FORMS: Final = 16
_KEPT_HEADS: Final = 64
# So few sizes of messages differ, and one that was made serves the next: what stands in a head is filled up with blanks
# to a multiple of so many bytes, and the bytes of strings with zeros.
_ROOM: Final = 64
_NAME_ROOM: Final = 1024

# By whether ids are integers.
_SCHEMAS: Final = {
    whole: pa.schema(
        [("query", pa.int32()), ("rank", pa.int32()), ("id", id), ("score", pa.float32()), ("distance", pa.float32())]
    )
    for whole, id in ((True, pa.int64()), (False, pa.string()))
}
_END: Final = b"\xff\xff\xff\xff\x00\x00\x00\x00"  # of an Arrow stream: a message of no bytes


class HitColumns(msgspec.Struct, frozen=True, gc=False):
    """The hits of some queries: a record batch with a row a hit, as the message that it is in a stream."""

    rows: int
    whole: bool  # whether ids are integers
    message: bytearray | memoryview


def stream(parts: Sequence[HitColumns], rest: bytes) -> bytes:
    """An Arrow IPC stream of parts with ids of one type; `rest`, which is JSON, is in the schema's metadata."""
    room = -(-len(rest) // _ROOM) * _ROOM
    before, after = _head(parts[0].whole, room)
    return b"".join([before, rest.ljust(room), after, *[part.message for part in parts], _END])


def of_arrays(first: int, labels: Labels, distances: Distances, ids: IdColumn, metric: Metric) -> HitColumns:
    """What one shard found for queries that begin at `first`: labels and distances (n, k), empty places -1 and last."""
    (n, k), whole = labels.shape, ids.id_type == "int"
    flat, found = labels.reshape(-1), distances.reshape(-1)
    full = min(labels[:, -1].tolist()) >= 0
    names = ids.take(flat) if full and n * k <= _KEPT_HITS else ()
    if not names or names[-1].nbytes > _KEPT_BYTES:
        query, rank = _places(n, k)
        taken = np.flatnonzero(flat >= 0)
        flat, found, query, rank = flat[taken], found[taken], query[taken] + np.int32(first), rank[taken]
        return _written([query, rank, ids.column(flat), score(found, metric), found], whole)
    # Where no place is empty, messages of one shape are alike but for these columns, and need no Arrow to be made.
    room = (names[-1].nbytes // _NAME_ROOM + 1) * _NAME_ROOM
    message, at_query, *places = _form(n, k, whole, room)
    made = bytearray(message)
    for at, values in zip(places, (*names, score(found, metric), found), strict=True):
        np.frombuffer(made, values.dtype, len(values), at)[:] = values
    if first:
        query = np.frombuffer(made, np.int32, n * k, at_query)
        query += np.int32(first)
    return HitColumns(n * k, whole, made)


def of_hits(first: int, lists: list[list[Hit]], whole: bool, metric: Metric) -> HitColumns:
    """The hits of queries that begin at `first`; `whole` says whether ids are integers, which no hits do not tell."""
    counts = list(map(len, lists))
    distances = np.array([hit.distance for hit in chain(*lists)], np.float32)
    columns = [
        np.repeat(np.arange(first, first + len(lists), dtype=np.int32), counts),
        np.array(list(chain(*map(range, counts))), np.int32),
        [hit.id for hit in chain(*lists)],
        score(distances, metric),
        distances,
    ]
    return _written(columns, whole)


def _written(columns: Sequence[Any], whole: bool) -> HitColumns:
    schema = _SCHEMAS[whole]
    batch = pa.RecordBatch.from_arrays(list(map(pa.array, columns, schema.types)), schema=schema)
    return HitColumns(batch.num_rows, whole, memoryview(batch.serialize()))


@functools.lru_cache(_KEPT_HEADS)
def _head(whole: bool, room: int) -> tuple[bytes, bytes]:
    """What stands before and after `room` bytes of metadata in the message of the schema."""
    mark = b"<".ljust(room - 1, b"-") + b">"
    message = _SCHEMAS[whole].with_metadata({"vecsvc": mark}).serialize()
    before, after = message.to_pybytes().split(mark)
    return before, after


@functools.lru_cache(_KEPT_FORMS)
def _form(n: int, k: int, whole: bool, names_bytes: int) -> tuple[Any, ...]:
    """The message of k hits of each of n queries, the first of them 0.

    And where the queries, the ids (of strings where each begins, and their bytes, which there is room for), the scores
    and the distances stand in it.
    """
    rows = n * k
    ids = pa.array(np.zeros(rows, np.int64))
    if not whole:
        starts = np.zeros(rows + 1, np.int32)
        starts[-1] = names_bytes  # a writer leaves out what is in no string
        ids = pa.StringArray.from_buffers(rows, pa.py_buffer(starts), pa.py_buffer(bytes(names_bytes)))
    nothing = np.zeros(rows, np.float32)
    message = pa.py_buffer(bytes(_written([*_places(n, k), ids, nothing, nothing], whole).message))
    read = pa.ipc.read_record_batch(message, _SCHEMAS[whole])
    query, _, *others = (part for column in read.columns for part in column.buffers()[1:])
    return message.to_pybytes(), *(part.address - message.address for part in (query, *others))


def _places(n: int, k: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """The query and the rank of each of the k hits of n queries."""
    query, rank = np.divmod(np.arange(n * k, dtype=np.int32), np.int32(k))
    return query, rank
