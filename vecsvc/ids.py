"""The users' names of rows: hashed for partition and look-up, stored as Arrow, read by label from the map."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, get_args

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from vecsvc import machine_code
from vecsvc.errors import ArtifactDamaged, InvalidRequest
from vecsvc.storage import open_array
from vecsvc.types import Id

IdType: TypeAlias = Literal["int", "str"]

IDS_FILE: Final = "ids.arrow"
LOOKUP_FILE: Final = "id_lookup.npy"  # (2, size) uint64: hashes in ascending order, and their labels
# Every record batch of a stored file but the last has so many rows, so that a label says where it is.
BATCH_ROWS: Final = 16_384


_USUAL: Final = 32  # bytes of an id for which there is room at once
_MOST: Final = 2**31 - 1  # bytes of strings that one Arrow column holds

_NO_HASH: Final = hashlib.blake2b(digest_size=8)  # copied, never updated: cheaper than to make one per id

INT_MIN: Final = -(2**63)
INT_MAX: Final = 2**63 - 1


def id_hash(id: Id) -> int:
    """The stable hash of an id, 0..2**64-1: the same in every process and version.

    blake2b(digest_size=8) of the UTF-8 id (an integer id as little-endian int64), read as a little-endian
    unsigned integer. Raises OverflowError for an integer beyond int64.
    """
    data = id.encode() if isinstance(id, str) else id.to_bytes(8, "little", signed=True)
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def id_hashes(ids: pa.Array) -> NDArray[np.uint64]:
    """What `id_hash` says of each id: (n,) for n integers or strings without nulls."""
    if pa.types.is_integer(ids.type):
        rows = ids.to_numpy().astype("<i8").view("V8").tolist()
    else:
        rows = ids.cast(pa.large_binary()).to_numpy(zero_copy_only=False).tolist()
    digests = []
    for row in rows:
        state = _NO_HASH.copy()
        state.update(row)
        digests.append(state.digest())
    return np.frombuffer(b"".join(digests), "<u8").astype(np.uint64, copy=False)


def lookup_table(hashes: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """What LOOKUP_FILE holds for the hashes (size,) in label order."""
    order = np.argsort(hashes, kind="stable")
    return np.stack([hashes[order], order.astype(np.uint64)])


def open_batches(path: Path, size: int) -> list[pa.RecordBatch]:
    """The record batches of a mapped Arrow IPC file of `size` rows, every one but the last of BATCH_ROWS."""
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
    except (OSError, pa.ArrowException) as error:
        raise ArtifactDamaged(f"{path}: not a readable Arrow file: {error}") from error
    full, rest = divmod(size, BATCH_ROWS)
    if [len(b) for b in batches] != [BATCH_ROWS] * full + ([rest] if rest else []):
        raise ArtifactDamaged(f"{path}: holds {sum(len(b) for b in batches)} rows, expected {size}")
    return batches


class IdColumn:
    """The ids of one shard, by label and back."""

    def __init__(self, folder: Path, size: int, id_type: IdType) -> None:
        self._lookup = open_array(folder / LOOKUP_FILE, np.uint64, (2, size))
        columns = [batch.column(0) for batch in open_batches(folder / IDS_FILE, size)]
        expected = pa.int64() if id_type == "int" else pa.string()
        if any(column.type != expected or column.null_count for column in columns):
            raise ArtifactDamaged(f"{folder / IDS_FILE}: expected {expected} without nulls")
        if not all(map(_is_sound, columns)):
            raise ArtifactDamaged(f"{folder / IDS_FILE}: has ids outside its bytes")
        self.id_type = id_type
        self._columns = columns  # whose bytes the views and addresses are of
        # Views into the map: going through Arrow's own scalars would cost ten times as much an id.
        self._views: list[Any] = [column.to_numpy() if id_type == "int" else string_views(column) for column in columns]
        parts = [[0 if part is None else part.address for part in column.buffers()[1:]] for column in columns]
        self._addresses = np.array(parts, np.int64)

    def of(self, labels: list[int]) -> list[Id]:
        """The ids of labels, in their order."""
        if self.id_type == "int":
            return [int(self._views[label // BATCH_ROWS][label % BATCH_ROWS]) for label in labels]
        views = self._views
        if len(views) == 1:
            [(offsets, data)] = views
            return [str(data[offsets[at] : offsets[at + 1]], "utf-8") for at in labels]
        found: list[Id] = []
        for label in labels:
            offsets, data = views[label // BATCH_ROWS]
            at = label % BATCH_ROWS
            found.append(str(data[offsets[at] : offsets[at + 1]], "utf-8"))
        return found

    def column(self, labels: NDArray[np.int64]) -> pa.Array:
        """The ids of labels (n,) as an Arrow column, in their order."""
        parts = self.take(labels)
        if self.id_type == "int":
            return pa.array(parts[0])
        return pa.StringArray.from_buffers(len(labels), *map(pa.py_buffer, parts))

    def take(self, labels: NDArray[np.int64]) -> tuple[NDArray[Any], ...]:
        """The ids of labels (n,), in their order, as Arrow lays them out.

        Integers (n,) int64; or where each string begins and ends (n + 1,) int32, and the bytes of all of them.
        Raises InvalidRequest where they are more than an Arrow column holds.
        """
        n, labels, take = len(labels), np.ascontiguousarray(labels), _kernel(self.id_type)
        if self.id_type == "int":
            found = np.empty(n, np.int64)
            take(id(labels), n, id(self._addresses), id(found))
            return (found,)
        offsets, data = np.empty(n + 1, np.int32), np.empty(min(_USUAL * n, _MOST), np.uint8)
        while True:
            length = take(id(labels), n, id(self._addresses), id(offsets), id(data), len(data))
            if length <= len(data):
                return offsets, data[:length]
            if length > _MOST:
                raise InvalidRequest(f"the ids of {n} hits take more than {_MOST} bytes in one column: ask for fewer")
            data = np.empty(length, np.uint8)

    def label(self, id: Id) -> int | None:
        """The label of an id; None where this shard does not have it."""
        if isinstance(id, str) != (self.id_type == "str"):
            return None
        if isinstance(id, int) and not INT_MIN <= id <= INT_MAX:
            return None
        wanted = np.uint64(id_hash(id))
        hashes, labels = self._lookup
        for at in range(int(np.searchsorted(hashes, wanted)), len(hashes)):
            if hashes[at] != wanted:
                return None
            label = int(labels[at])
            if self.of([label]) == [id]:
                return label
        return None


def load_kernels() -> None:
    """Make ready what `IdColumn.column` runs, which is compiled where it is not kept."""
    for id_type in get_args(IdType):
        _kernel(id_type)


def _kernel(id_type: IdType) -> machine_code.Kernel:
    if id_type == "int":
        return machine_code.load("vecsvc.id_kernels", "take_integers", 4)
    return machine_code.load("vecsvc.id_kernels", "take_strings", 6)


def _is_sound(column: pa.Array) -> bool:
    """Whether every id of a stored column lies inside the column's bytes, and the first at their beginning."""
    n, values, data = len(column), column.buffers()[1], column.buffers()[-1]
    if column.offset or not n:
        return not column.offset
    if not pa.types.is_string(column.type):
        return data is not None and data.size >= 8 * n
    if values is None or values.size < 4 * (n + 1):
        return False
    starts = np.frombuffer(values, np.int32, n + 1)
    inside = starts[0] >= 0 and starts[-1] <= (0 if data is None else data.size)
    return bool(inside and (starts[1:] >= starts[:-1]).all())


def string_views(column: pa.Array) -> tuple[memoryview, memoryview]:
    """Offsets and bytes of a string column that starts at its buffers' beginning, as every stored one does."""
    _, offsets, data = column.buffers()
    return memoryview(offsets).cast("i"), memoryview(data if data is not None else b"")
