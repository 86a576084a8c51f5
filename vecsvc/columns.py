"""Hits of many queries as Arrow record batches: an object for each column, none for each hit."""

from __future__ import annotations

import functools
from itertools import chain
from typing import Final

import numpy as np
import pyarrow as pa

from vecsvc.distance import score
from vecsvc.ids import IdColumn
from vecsvc.types import Distances, Hit, Labels, Metric

_KEPT_HITS: Final = 10_000  # of a batch whose `query` and `rank` are remembered: most are asked for again and again

_INT_IDS, _STRING_IDS = (
    pa.schema(
        [("query", pa.int32()), ("rank", pa.int32()), ("id", id), ("score", pa.float32()), ("distance", pa.float32())]
    )
    for id in (pa.int64(), pa.string())
)


def of_arrays(first: int, labels: Labels, distances: Distances, ids: IdColumn, metric: Metric) -> pa.RecordBatch:
    """What one shard found for queries that begin at `first`: labels and distances (n, k), empty places -1 and last."""
    n, k = labels.shape
    flat, found = labels.reshape(-1), distances.reshape(-1)
    query, rank = (_kept_places if n * k <= _KEPT_HITS else _places)(first, n, k)
    if min(labels[:, -1].tolist()) < 0:
        taken = np.flatnonzero(flat >= 0)
        flat, found, query, rank = flat[taken], found[taken], query.take(taken), rank.take(taken)
    schema = _INT_IDS if ids.id_type == "int" else _STRING_IDS
    columns = [query, rank, ids.column(flat), pa.array(score(found, metric)), pa.array(found)]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def of_hits(first: int, lists: list[list[Hit]], whole: bool, metric: Metric) -> pa.RecordBatch:
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
    schema = _INT_IDS if whole else _STRING_IDS
    return pa.RecordBatch.from_arrays(list(map(pa.array, columns, schema.types)), schema=schema)


def _places(first: int, n: int, k: int) -> tuple[pa.Array, pa.Array]:
    """The query and the rank of each of the k hits of n queries."""
    query, rank = np.divmod(np.arange(first * k, (first + n) * k, dtype=np.int32), np.int32(k))
    return pa.array(query), pa.array(rank)


_kept_places: Final = functools.lru_cache(maxsize=64)(_places)
