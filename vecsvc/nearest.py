"""What several shards found for one query, as one list of rows: the closest first, each once, by their names."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from vecsvc.ranking import merge_top_k
from vecsvc.shard import Found, Shard
from vecsvc.types import Distances, Id, Neighbors


class Nearest(msgspec.Struct, frozen=True, gc=False):
    """The rows nearest to a query, by (distance, corpus row); empty places are left out."""

    ids: list[Id]
    distances: Distances
    rows: NDArray[np.int64]  # of the corpus
    which: list[int]  # the place in the list of shards of each one's
    labels: list[int]  # and the label there


def nearest(shards: Sequence[Shard], found: Sequence[Found | Neighbors], query: int, k: int) -> Nearest:
    """The k nearest rows of one of the queries, of which each of the shards found as many places."""
    if len(shards) == 1:
        labels, distances = found[0].labels[query], found[0].distances[query]
        if labels[-1] < 0:
            labels = labels[labels >= 0]
            distances = distances[: len(labels)]
        named = labels.tolist()
        return Nearest(shards[0].ids.of(named), distances, shards[0].rows[labels], [0] * len(named), named)
    labels = np.concatenate([part.labels[query] for part in found])
    distances = np.concatenate([part.distances[query] for part in found])
    rows = np.concatenate([shard.rows[part.labels[query]] for shard, part in zip(shards, found, strict=True)])
    rows[labels < 0] = -1
    order = merge_top_k(distances, rows, k)
    which: list[int] = (order // found[0].labels.shape[1]).tolist()
    chosen: list[int] = labels[order].tolist()
    # Each shard names its rows at once, in the order in which they are taken from it below.
    own: list[list[int]] = [[] for _ in shards]
    for at, label in zip(which, chosen, strict=True):
        own[at].append(label)
    names = [iter(shard.ids.of(some)) for shard, some in zip(shards, own, strict=True)]
    return Nearest([next(names[at]) for at in which], distances[order], rows[order], which, chosen)
