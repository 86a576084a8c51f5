"""Reads a Parquet corpus in bounded batches, and refuses once, at the door, every row that cannot be indexed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Final, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from index_builders.corpus_files import CorpusFile, damaged, find_files, foreign_errors, label_of, open_parquet
from index_builders.corpus_rows import Rows, checked_ids, checked_vectors, no_nulls, strings, valid
from vecsvc.errors import CorpusError, CorpusUnreadable, MissingColumn
from vecsvc.ids import id_hashes
from vecsvc.types import MAX_DIM, Id, Metric, StoredVectors

ID_COLUMN: Final = "id"
VECTOR_COLUMNS: Final = ("vector", "emb", "embedding")  # the first that the corpus has
TEXT_COLUMN: Final = "text"

MAX_BATCH_BYTES: Final = 16 << 20  # vectors of one batch: rows of many dimensions come fewer at a time
READ_AHEAD_BYTES: Final = 8 << 20  # shared by the columns that are read; on S3 a buffer is a request
MAX_SUSPECTS: Final = 1024  # ids held at a time while equal hashes are told from equal ids


@dataclass(frozen=True, slots=True)
class Batch:
    """Checked rows of a corpus, one after the other. `vectors` or `texts` is set, never both."""

    first_row: int  # corpus row of the first, counted from 0 over all files
    ids: pa.Array  # (n,) int64 or string, no nulls
    hashes: NDArray[np.uint64]  # (n,) see id_hash
    vectors: StoredVectors | None  # (n, dim) float32 or float16, C-contiguous, read-only where it is Parquet's buffer
    texts: list[str] | None  # n texts, some perhaps empty
    fields: pa.RecordBatch | None  # the stored fields in their original types; None where none are stored
    rows: NDArray[np.int64] | None = None  # (n,) corpus rows of a batch that was thinned out; None where all are there

    def corpus_rows(self) -> NDArray[np.int64]:
        """Their rows (n,) in the corpus, ascending."""
        if self.rows is not None:
            return self.rows
        return np.arange(self.first_row, self.first_row + len(self.hashes), dtype=np.int64)

    def only(self, keep: NDArray[np.intp]) -> Batch:
        """The rows at the places `keep`, ascending."""
        return Batch(
            first_row=self.first_row,
            ids=self.ids.take(pa.array(keep)),
            hashes=self.hashes[keep],
            vectors=None if self.vectors is None else self.vectors[keep],
            texts=None if self.texts is None else [self.texts[i] for i in keep.tolist()],
            fields=None if self.fields is None else self.fields.take(pa.array(keep)),
            rows=self.corpus_rows()[keep],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """A corpus whose files and columns were found and fit each other; rows are checked as they are read."""

    path: str  # as the user gave it
    rows: int
    columns: dict[str, str]  # name -> Arrow type, every column the corpus has
    id_type: Literal["int", "str"]
    dim: int | None  # None in a corpus of texts
    vector_dtype: Literal["float32", "float16"] | None  # None in a corpus of texts
    fields: pa.Schema  # of Batch.fields, empty where none are stored
    _metric: Metric
    _filesystem: Any
    _files: tuple[CorpusFile, ...]
    _used: _Columns

    @property
    def has_vectors(self) -> bool:
        return self._used.vector is not None

    def read_batches(self, batch_rows: int, *, checked: bool = False) -> Iterator[Batch]:
        """All rows in order, at most `batch_rows` at a time, fewer where vectors are long or a file ends.

        Memory stays within a few batches, however large the files and their row groups are. Repeated ids
        are found after the last batch: what was read counts only when the iterator has ended. Texts are all
        looked at before the first batch comes, unless an earlier pass `checked` them.
        Raises BadRow with the row's number, id and remedy, CorpusUnreadable where the storage or a file fails.
        """
        if not self.has_vectors and not checked:
            # Encoding takes hours. What the last row will be refused for is better said before than after.
            for _ in self._checked(batch_rows):
                pass
        yield from self._checked(batch_rows)

    def identity(self) -> str:
        """A sha256 that changes with the files' names, sizes and times: cheap, for resuming a build."""
        lines = [f"{file.name}\t{file.size}\t{file.mtime_ns}\n" for file in self._files]
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def sha256(self) -> str:
        """Of the file where it is one; of several, of the lines `<sha256>  <relative name>` in order.

        That is what `sha256sum` prints. Reads everything once. Raises CorpusUnreadable.
        """
        hashes = []
        for file in self._files:
            with foreign_errors(file.label), self._filesystem.open_input_stream(file.path, compression=None) as stream:
                digest = hashlib.sha256()
                while chunk := stream.read(READ_AHEAD_BYTES):
                    digest.update(chunk)
            hashes.append(digest.hexdigest())
        if len(hashes) == 1:
            return hashes[0]
        lines = [f"{digest}  {file.name}\n" for digest, file in zip(hashes, self._files, strict=True)]
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def _checked(self, batch_rows: int) -> Iterator[Batch]:
        used = self._used
        if self.dim is not None:
            batch_rows = min(batch_rows, max(1, MAX_BATCH_BYTES // (self.dim * used.value_bytes)))
        hashes: list[NDArray[np.uint64]] = []
        for rows, part in self._record_batches(batch_rows, list(used.types)):
            ids = rows.ids = checked_ids(part.column(used.id), rows)
            vectors = texts = fields = None
            if self.dim is not None:
                vectors = checked_vectors(part.column(used.vector), self.dim, self._metric, rows)
            else:
                texts = strings(part.column(used.text), "text", rows).to_pylist()
            if self.fields:
                columns = [valid(part.column(name), f"field {name!r}", rows) for name in self.fields.names]
                fields = pa.RecordBatch.from_arrays(columns, schema=self.fields)
            hashes.append(id_hashes(ids))
            yield Batch(rows.first, ids, hashes[-1], vectors, texts, fields)
        self._refuse_repeated_ids(np.concatenate(hashes))

    def _record_batches(self, batch_rows: int, names: list[str]) -> Iterator[tuple[Rows, pa.RecordBatch]]:
        for file in self._files:
            self._check_unchanged(file)
            row = file.first_row
            with open_parquet(self._filesystem, file.path, max(1 << 16, READ_AHEAD_BYTES // len(names))) as parquet:
                # Without threads the reader holds one column's pages at a time, and is as fast.
                for part in parquet.iter_batches(batch_rows, columns=names, use_threads=False):
                    if part.num_rows:
                        yield Rows(row, file.name if len(self._files) > 1 else ""), part
                    row += part.num_rows
            self._check_unchanged(file)
            if row != file.first_row + file.rows:
                raise damaged(file, row - file.first_row)

    def _check_unchanged(self, file: CorpusFile) -> None:
        with foreign_errors(file.label):
            info = self._filesystem.get_file_info(file.path)
        if (info.size, info.mtime_ns) != (file.size, file.mtime_ns):
            raise CorpusUnreadable(f"{file.label} was changed while it was read: start again once it is complete")

    def _refuse_repeated_ids(self, hashes: NDArray[np.uint64]) -> None:
        hashes.sort()
        suspects = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])
        # Two ids may share a hash by chance, so the ids are read again before a row is accused.
        for start in range(0, len(suspects), MAX_SUSPECTS):
            seen: dict[Id, Rows] = {}
            for rows, part in self._record_batches(1 << 16, [self._used.id]):
                rows.ids = checked_ids(part.column(self._used.id), rows)
                for i in np.flatnonzero(np.isin(id_hashes(rows.ids), suspects[start : start + MAX_SUSPECTS])).tolist():
                    this = Rows(rows.first + i, rows.file)
                    first = seen.setdefault(rows.ids[i].as_py(), this)
                    if first is not this:
                        raise rows.bad(i, f"{first.place(0)} has that id already; drop or rename one of the two")


def open_corpus(
    source: str,
    *,
    id_column: str = "",
    vector_column: str = "",
    text_column: str = "",
    fields: str = "",
    metric: Metric,
) -> Corpus:
    """Find the files and columns of a corpus; of the rows only one is read, for the dimension.

    `source` is a Parquet file, a folder (every *.parquet in and below it) or a glob (`**` crosses folders),
    local or s3://bucket/key; files are taken in the order of their names, hidden ones are not. S3 is reached
    as the AWS_* environment says; ?region=, endpoint_override= and scheme= after the address win over it.
    An empty column name means the default: `id`; `vector`, `emb` or `embedding`; where there are no vectors,
    `text`. `fields` are the columns to store, "a,b", or "*" for all but the ids and the vectors.

    Raises CorpusUnreadable, MissingColumn, or CorpusError for columns of the wrong type, files that do not
    fit each other, and a corpus without rows.
    """
    filesystem, root, found = find_files(source)
    files: list[CorpusFile] = []
    schema = used = None
    rows = 0
    for info in found:
        with open_parquet(filesystem, info.path) as parquet:
            here, length = parquet.schema_arrow, parquet.metadata.num_rows
        label = label_of(filesystem, info.path)
        if schema is None or used is None:
            schema = here
            used = _choose_columns(here, label, id_column, vector_column, text_column, fields)
        else:
            _check_same(here, label, used.types, files[0].label)
        name = str(PurePosixPath(info.path).relative_to(root))
        files.append(CorpusFile(info.path, label, name, info.size, info.mtime_ns, rows, length))
        rows += length
    if schema is None or used is None or rows == 0:
        raise CorpusError(f"{source} has no rows: an index needs at least one")
    dim = None
    if used.vector is not None:
        first = next(file for file in files if file.rows)
        dim = _first_dim(filesystem, first, used, used.vector, Rows(0, first.name if len(files) > 1 else ""))
    return Corpus(
        path=source,
        rows=rows,
        columns={name: str(kind) for name, kind in zip(schema.names, schema.types, strict=True)},
        id_type="int" if pa.types.is_integer(used.types[used.id]) else "str",
        dim=dim,
        vector_dtype=None if used.vector is None else "float16" if used.value_bytes == 2 else "float32",
        # Metadata and nullability may differ from file to file, and say nothing about the values.
        fields=pa.schema([pa.field(name, used.types[name]) for name in used.fields]),
        _metric=metric,
        _filesystem=filesystem,
        _files=tuple(files),
        _used=used,
    )


@dataclass(frozen=True, slots=True)
class _Columns:
    """What is read of a corpus."""

    id: str
    vector: str | None
    text: str | None  # None where there are vectors
    fields: tuple[str, ...]
    types: dict[str, Any]  # name -> Arrow type of all of these
    value_bytes: int  # size of one stored value of a vector; 0 without vectors


def _choose_columns(
    schema: pa.Schema, label: str, id_column: str, vector_column: str, text_column: str, fields: str
) -> _Columns:
    names: list[str] = schema.names
    listed = ", ".join(map(repr, names[:50])) + (", ..." if len(names) > 50 else "")

    def existing(name: str, flag: str) -> str:
        if name not in names:
            raise MissingColumn(f"{label} has no column {name!r}; it has {listed}: name the right one with {flag}")
        return name

    id_ = existing(id_column or ID_COLUMN, "--id-column")
    default = next((name for name in VECTOR_COLUMNS if name in names), None)
    vector = existing(vector_column, "--vector-column") if vector_column else default
    text = existing(text_column, "--text-column") if text_column else TEXT_COLUMN
    if vector is None and text not in names:
        raise MissingColumn(
            f"{label} has neither vectors ({', '.join(VECTOR_COLUMNS)}) nor texts ({TEXT_COLUMN}); it has {listed}: "
            "name the column with --vector-column or --text-column"
        )
    if fields.strip() == "*":
        stored = [name for name in names if name not in (id_, vector)]
    else:
        stored = [existing(name.strip(), "--fields") for name in fields.split(",") if name.strip()]
    types = _types(schema, label, [id_, text if vector is None else vector, *stored])

    _check_type(types[id_], f"ids in column {id_!r}", "integers or strings", integers=True)
    value_bytes = 0
    if vector is None:
        check_strings(types[text], text)
    else:
        value_bytes = vector_value_bytes(types[vector], vector)
    return _Columns(id_, vector, None if vector else text, tuple(dict.fromkeys(stored)), types, value_bytes)


def _types(schema: pa.Schema, label: str, names: list[str]) -> dict[str, Any]:
    for name in names:
        if schema.names.count(name) > 1:
            raise CorpusError(f"{label} has more than one column {name!r}: rename all but one")
    return {name: schema.field(name).type for name in names}


def _check_type(kind: Any, what: str, wanted: str, integers: bool = False) -> None:
    is_type = pa.types
    plain = kind.value_type if is_type.is_dictionary(kind) else kind
    strings = is_type.is_string(plain) or is_type.is_large_string(plain) or is_type.is_string_view(plain)
    if not strings and not (integers and is_type.is_integer(kind)):
        raise CorpusError(f"{what} must be {wanted}, they are {kind}: cast the column, or name another one")


def check_strings(kind: Any, name: str) -> None:
    """Raises CorpusError where a column of texts is none."""
    _check_type(kind, f"texts in column {name!r}", "strings")


def vector_value_bytes(kind: Any, name: str) -> int:
    """The size of one value in a column of vectors. Raises CorpusError where it is none."""
    is_type = pa.types
    if is_type.is_list(kind) or is_type.is_large_list(kind) or is_type.is_fixed_size_list(kind):
        for is_float, value_bytes in ((is_type.is_float16, 2), (is_type.is_float32, 4), (is_type.is_float64, 8)):
            if is_float(kind.value_type):
                return value_bytes
    raise CorpusError(
        f"vectors in column {name!r} must be lists of float16, float32 or float64, they are {kind}: "
        "cast the column to list<float32>, or name another one with --vector-column"
    )


def _check_same(schema: pa.Schema, label: str, wanted: dict[str, Any], first_label: str) -> None:
    missing = [name for name in wanted if name not in schema.names]
    if missing:
        raise MissingColumn(f"{label} has no column {missing[0]!r}, {first_label} has: write all files with one schema")
    for name, kind in _types(schema, label, list(wanted)).items():
        if kind != wanted[name]:
            raise CorpusError(
                f"{label}: column {name!r} is {kind}, in {first_label} it is {wanted[name]}: "
                "write all files with one schema"
            )


def _first_dim(filesystem: Any, file: CorpusFile, used: _Columns, vector: str, rows: Rows) -> int:
    """The dimension that row 0 sets for all others."""
    fixed = pa.types.is_fixed_size_list(used.types[vector])
    names = [used.id] if fixed else [used.id, vector]  # Arrow cannot read fixed-size lists of no values
    with open_parquet(filesystem, file.path) as parquet:
        part = next(parquet.iter_batches(1, columns=names, use_threads=False), None)
    if part is None or not part.num_rows:
        raise damaged(file, 0)
    rows.ids = checked_ids(part.column(used.id), rows)
    dim = used.types[vector].list_size if fixed else len(no_nulls(part.column(vector), "vector", rows)[0])
    if not 1 <= dim <= MAX_DIM:
        raise rows.bad(0, f"its vector has {dim} values; a vector has 1 to {MAX_DIM}")
    return dim
