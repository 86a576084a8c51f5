"""One opened shard: its index, vectors, ids and fields. It alone decides when exact search serves better."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from vecsvc import filters, indexes
from vecsvc.distance import exact_distances
from vecsvc.errors import ArtifactDamaged, ArtifactUnfit
from vecsvc.exact_search import ExactSearch
from vecsvc.ids import BATCH_ROWS, IdColumn, IdType, open_batches, string_views
from vecsvc.manifest import INDEX_FOLDER, VECTORS_FILE, ShardEntry
from vecsvc.ranking import top_k
from vecsvc.storage import open_array
from vecsvc.types import WAYS, Condition, Distances, IndexSpec, Labels, Limit, Mask, Neighbors, StoredVectors, Vectors

ROWS_FILE: Final = "rows.npy"  # (size,) int64 corpus row of each label, ascending
FIELDS_FILE: Final = "fields.arrow"

# A filter that leaves few rows is answered by comparing them all. A walk of a graph with a filter costs in inverse
# proportion to the share that is allowed, comparing costs in proportion to the rows, so the two cross where the
# rows are a multiple of the square root of the size: 16 was measured with hnsw, see benchmarks/filtered.py. A kind
# that compares what is allowed by itself, and faster, has the attribute `compares_the_allowed`.
EXACT_ROOTS: Final = 16
EXACT_UP_TO_ROWS: Final = 1000  # so few are always compared


class Found(msgspec.Struct, frozen=True, gc=False):
    """What a shard found for n queries: k places a row, by (distance, label); empty ones are -1 at +inf."""

    labels: Labels  # (n, k)
    distances: Distances  # (n, k)
    visited: int  # over all queries; -1 where the library does not tell
    hops: int  # of the walks through a graph, over all queries; -1 where the kind does not tell
    stopped: bool  # a Limit cut some query short
    strategy: str
    allowed: int | None  # rows that the filter leaves
    took_s: float
    rerank_s: float


def placed(found: Found, rows: NDArray[np.intp], n: int) -> Found:
    """What was found for the queries `rows` of n, as an answer to all n: nothing for the others."""
    if len(rows) == n:
        return found
    labels = np.full((n, found.labels.shape[1]), -1, dtype=np.int64)
    distances = np.full(labels.shape, np.inf, dtype=np.float32)
    labels[rows], distances[rows] = found.labels, found.distances
    return msgspec.structs.replace(found, labels=labels, distances=distances)


class Shard:
    """The read side of `shards/NNN`. Any number of threads may use it at once."""

    def __init__(
        self,
        number: int,
        folder: Path,
        entry: ShardEntry,
        *,
        id_type: IdType,
        fields: dict[str, str],
        mmap: bool,
        device: str,
    ) -> None:
        """Open files that were checked before. Raises ArtifactDamaged or ArtifactUnfit."""
        self.number = number
        self.size = entry.size
        self.spec: IndexSpec = entry.spec
        shape = (entry.size, entry.spec.dim)
        self.vectors: StoredVectors = open_array(folder / VECTORS_FILE, (np.float32, np.float16), shape)
        self.rows: NDArray[np.int64] = open_array(folder / ROWS_FILE, np.int64, (entry.size,))
        self.ids = IdColumn(folder, entry.size, id_type)
        self.fields = FieldStore(folder / FIELDS_FILE, entry.size, fields) if fields else None
        self._exact = ExactSearch(self.vectors, entry.spec.metric)
        try:
            self.index = indexes.load(folder / INDEX_FOLDER, entry.spec, vectors=self.vectors, mmap=mmap, device=device)
        except (RuntimeError, ValueError, OSError, LookupError, TypeError, ArithmeticError) as error:
            raise ArtifactUnfit(f"{folder / INDEX_FOLDER}: cannot be loaded: {error}") from error
        few = max(EXACT_UP_TO_ROWS, EXACT_ROOTS * math.sqrt(self.size))
        self._exact_up_to = 0.0 if getattr(self.index, "compares_the_allowed", False) else few

    def search(
        self,
        queries: Vectors,
        k: int,
        params: Any,
        *,
        conditions: tuple[Condition, ...] = (),
        exact: bool = False,
        without: int | None = None,
        rerank_depth: int | None = None,
        limit: Limit | None = None,
        num_threads: int = 1,
    ) -> Found:
        """The k nearest rows of each query (n, dim) that meet the conditions, without the label `without`."""
        if without is not None and not conditions:
            # One more place and one row dropped is cheaper than a mask, about which hnswlib asks Python each time.
            found = self.search(
                queries, k + 1, params, exact=exact, rerank_depth=rerank_depth, limit=limit, num_threads=num_threads
            )
            return _dropped(found, without, k)
        started = time.perf_counter()
        mask, allowed = self._mask(conditions, without)
        reachable = self.size if allowed is None else allowed
        wanted = max(k, rerank_depth or 0)
        use_exact = exact or (mask is not None and reachable <= self._exact_up_to)

        strategy = "exact"
        if use_exact:
            neighbors = self._exact.search(queries, wanted, allowed=mask, limit=limit)
        else:
            neighbors = self.index.search(queries, wanted, params, allowed=mask, limit=limit, num_threads=num_threads)
            strategy = self.spec.kind if neighbors.ways is None else _strategy(neighbors.ways, self.spec.kind)
            # Where the index found fewer rows than there are, exact search fills in: k where k exist.
            short = _short(neighbors, min(k, reachable))
            if short:
                strategy = "exact" if len(short) == len(queries) else "mixed"
            for row in short:
                exactly = self._exact.search(queries[row : row + 1], wanted, allowed=mask, limit=limit)
                neighbors = _with_row(neighbors, row, exactly)
        labels, distances = neighbors.labels, neighbors.distances
        searched = time.perf_counter()
        if rerank_depth is not None:
            labels, distances = self._rerank(queries, labels, distances)
        return Found(
            labels=labels[:, :k],
            distances=distances[:, :k],
            visited=_total(neighbors.visited),
            hops=-1 if neighbors.hops is None else _total(neighbors.hops),
            stopped=bool(neighbors.stopped[0] if len(queries) == 1 else np.count_nonzero(neighbors.stopped)),
            strategy=strategy,
            allowed=allowed if conditions else None,
            took_s=searched - started,
            rerank_s=time.perf_counter() - searched,
        )

    def _mask(self, conditions: tuple[Condition, ...], without: int | None) -> tuple[Mask | None, int | None]:
        if not conditions:
            return None, None
        table = self.fields.table if self.fields else pa.table({})
        mask = filters.evaluate(conditions, table)
        if without is not None:
            mask = mask.copy()
            mask[without] = False
            mask.flags.writeable = False
        return mask, int(np.count_nonzero(mask))

    def _rerank(self, queries: Vectors, labels: Labels, distances: Distances) -> tuple[Labels, Distances]:
        """The same candidates with exact distances, in their order."""
        labels, distances = labels.copy(), distances.copy()
        for row, query in enumerate(queries):
            known = labels[row] >= 0
            found = labels[row][known]
            fresh = exact_distances(query, self.vectors[found], self.spec.metric)
            labels[row, : len(found)], distances[row, : len(found)] = top_k(fresh, len(found), found)
        return labels, distances

    def close(self) -> None:
        self.index.close()


def _total(visited: NDArray[np.int64]) -> int:
    if len(visited) == 1:
        return int(visited[0])
    counts = visited.tolist()
    return -1 if min(counts, default=0) < 0 else sum(counts)


def _strategy(ways: NDArray[np.uint8], kind: str) -> str:
    """What all queries did, in the words of Stats."""
    first = int(ways[0]) if len(ways) else 0
    if (ways != first).any():
        return "mixed"
    return WAYS[first] if first else kind


def _short(neighbors: Neighbors, reachable: int) -> list[int]:
    """The rows in which a place stayed empty although a vector is there for it, and no limit is to blame."""
    if reachable == 0:
        return []
    last, stopped = neighbors.labels[:, reachable - 1].tolist(), neighbors.stopped
    return [row for row, label in enumerate(last) if label < 0 and not stopped[row]]


def _with_row(neighbors: Neighbors, row: int, other: Neighbors) -> Neighbors:
    """The same answers, but for one row."""
    labels, distances = neighbors.labels.copy(), neighbors.distances.copy()
    visited, stopped = neighbors.visited.copy(), neighbors.stopped.copy()
    labels[row], distances[row] = other.labels[0], other.distances[0]
    visited[row], stopped[row] = other.visited[0], other.stopped[0]
    return Neighbors(labels, distances, visited, stopped, neighbors.hops, neighbors.ways)


def _dropped(found: Found, label: int, k: int) -> Found:
    """The first k places of each row without `label`."""
    order = np.argsort(found.labels == label, axis=1, kind="stable")[:, :k]
    return msgspec.structs.replace(
        found,
        labels=np.take_along_axis(found.labels, order, axis=1),
        distances=np.take_along_axis(found.distances, order, axis=1),
    )


class FieldStore:
    """The stored fields of one shard, read by row from the mapped file."""

    def __init__(self, path: Path, size: int, fields: dict[str, str]) -> None:
        self._batches = open_batches(path, size)
        self.table = pa.Table.from_batches(self._batches)
        if self.table.column_names != list(fields):
            raise ArtifactDamaged(f"{path}: holds {self.table.column_names}, expected {list(fields)}")
        self._readers = [[(name, _reader(batch.column(name))) for name in fields] for batch in self._batches]

    def of(self, labels: list[int]) -> list[dict[str, Any]]:
        """Name -> value of each label; a null is None."""
        found = []
        for label in labels:
            readers, at = self._readers[label // BATCH_ROWS], label % BATCH_ROWS
            found.append({name: read(at) for name, read in readers})
        return found


def _reader(column: pa.Array) -> Callable[[int], Any]:
    """What gives the value of a row: out of the mapped bytes where that is simple, which takes a fifth of the time."""
    kind = column.type
    if column.null_count == 0 and column.offset == 0:
        if pa.types.is_string(kind):
            offsets, data = string_views(column)
            return lambda at: str(data[offsets[at] : offsets[at + 1]], "utf-8")
        if kind in (pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32(), pa.float64()):
            # A memoryview's items are Python's own numbers.
            values = memoryview(column.to_numpy())
            return lambda at: values[at]
    return lambda at: _plain(column[at])


def _plain(value: pa.Scalar) -> Any:
    try:
        return value.as_py()
    except (ValueError, OverflowError):
        # Python's own times end at microseconds and at the year 9999; Arrow can spell more, one by one.
        if pa.types.is_struct(value.type):
            return {name: _plain(part) for name, part in value.items()}
        if pa.types.is_nested(value.type):
            return [_plain(part) for part in value.values]
        text = str(value.cast(pa.string()).as_py())
        return text.replace(" ", "T", 1) if pa.types.is_timestamp(value.type) else text
