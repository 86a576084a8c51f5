"""Writes what a shard owns, batch by batch: vectors, corpus rows, ids and stored fields."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from index_builders.corpus import Corpus
from vecsvc.errors import VecsvcError
from vecsvc.ids import BATCH_ROWS, IDS_FILE, LOOKUP_FILE, lookup_table
from vecsvc.manifest import VECTORS_FILE
from vecsvc.shard import FIELDS_FILE, ROWS_FILE
from vecsvc.storage import ArrayWriter, make_folder, new_file, write_array, writing


class ShardWriter:
    """Writes what a shard owns, batch by batch: vectors, corpus rows, ids and stored fields."""

    def __init__(self, folder: Path, corpus: Corpus) -> None:
        self.folder = folder
        self.size = 0
        self.dim = 0
        self.dtype = ""
        self._stack = contextlib.ExitStack()
        self._vectors: ArrayWriter | None = None
        self._hashes: list[NDArray[np.uint64]] = []
        make_folder(folder)
        self._rows = ArrayWriter(folder / ROWS_FILE, np.int64)
        try:
            ids = pa.schema([("id", pa.int64() if corpus.id_type == "int" else pa.string())])
            self._ids = ArrowWriter(self._stack, folder / IDS_FILE, ids)
            self._fields = (
                ArrowWriter(self._stack, folder / FIELDS_FILE, stored_schema(corpus)) if len(corpus.fields) else None
            )
        except BaseException:
            self.__exit__()
            raise

    def write(
        self, rows: NDArray[np.int64], hashes: NDArray[np.uint64], vectors: Any, ids: pa.Array, fields: Any
    ) -> None:
        if self._vectors is None:
            self.dim, self.dtype = vectors.shape[1], str(vectors.dtype)
            self._vectors = ArrayWriter(self.folder / VECTORS_FILE, vectors.dtype, (self.dim,))
        self._vectors.write(vectors)
        self._rows.write(rows)
        self._hashes.append(hashes)
        self._ids.write(pa.record_batch([ids], names=["id"]))
        if self._fields is not None:
            self._fields.write(fields)
        self.size += len(rows)

    def finish(self) -> None:
        """Write the ends of the files and sync them."""
        if self._vectors is None:
            return
        self._vectors.close()
        self._rows.close()
        self._ids.finish()
        if self._fields is not None:
            self._fields.finish()
        self._stack.close()
        write_array(self.folder / LOOKUP_FILE, lookup_table(np.concatenate(self._hashes)))

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._rows.abandon()
        if self._vectors is not None:
            self._vectors.abandon()
        with contextlib.suppress(VecsvcError, pa.ArrowException, ValueError):
            self._stack.close()


def stored_schema(corpus: Corpus) -> pa.Schema:
    """The stored fields in their own types; dictionaries as what they hold, for theirs may differ by batch."""
    kinds = [pa.field(f.name, f.type.value_type if pa.types.is_dictionary(f.type) else f.type) for f in corpus.fields]
    return pa.schema(kinds)


class ArrowWriter:
    """Writes an Arrow IPC file whose record batches, but for the last, all have BATCH_ROWS rows."""

    def __init__(self, stack: contextlib.ExitStack, path: Path, schema: pa.Schema) -> None:
        self._path = path
        file = stack.enter_context(new_file(path))
        self._writer = stack.enter_context(pa.ipc.new_file(file, schema))
        self._pending = pa.table({name: [] for name in schema.names}, schema=schema)

    def write(self, batch: pa.RecordBatch) -> None:
        rows = pa.Table.from_batches([batch]).cast(self._pending.schema)
        self._pending = pa.concat_tables([self._pending, rows])
        while self._pending.num_rows >= BATCH_ROWS:
            self._emit(self._pending.slice(0, BATCH_ROWS))
            self._pending = self._pending.slice(BATCH_ROWS)

    def finish(self) -> None:
        if self._pending.num_rows:
            self._emit(self._pending)

    def _emit(self, rows: pa.Table) -> None:
        with writing(self._path):
            self._writer.write_batch(rows.combine_chunks().to_batches()[0])
