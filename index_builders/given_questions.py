"""Questions that a user gave to measure recall with: vectors or texts of a Parquet file, some of them drawn."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Final

import numpy as np
import pyarrow as pa

from index_builders.corpus import VECTOR_COLUMNS, check_strings, vector_value_bytes
from index_builders.corpus_files import find_files, label_of, open_parquet
from index_builders.corpus_rows import Rows, checked_vectors, no_nulls, strings
from vecsvc.errors import ConfigError, CorpusError, MissingColumn
from vecsvc.types import Metric, Vectors

TEXT_COLUMNS: Final = ("query", "text")  # the first that the file has, where it has no vectors
BATCH_ROWS: Final = 4096


@dataclass(frozen=True, slots=True)
class Given:
    """Either `vectors` or `texts`, which the index's encoder makes vectors of, is set."""

    path: str  # as the user gave it
    vectors: Vectors | None  # (n, dim)
    texts: list[str] | None


def read_questions(source: str, metric: Metric, dim: int | None, n: int, seed: int) -> Given:
    """Up to n questions drawn from a Parquet file, a folder or a glob, local or s3://; the others are not looked at.

    `dim` is that of the index, None where only its encoder knows. Raises CorpusUnreadable, MissingColumn, BadRow with
    file and row, or CorpusError where there are none.
    """
    filesystem, root, found = find_files(source)
    lengths, column, kind = [], "", None
    for info in found:
        with open_parquet(filesystem, info.path) as parquet:
            label, schema = label_of(filesystem, info.path), parquet.schema_arrow
            if not column:
                column = _column(schema.names, label)
            if column not in schema.names or schema.names.count(column) > 1:
                raise MissingColumn(f"{label} has no column {column!r}, or several: write all files with one schema")
            kind = schema.field(column).type
            if column in VECTOR_COLUMNS:
                vector_value_bytes(kind, column)
            else:
                check_strings(kind, column)
            lengths.append(parquet.metadata.num_rows)
    total = sum(lengths)
    if not total:
        raise CorpusError(f"{source} has no rows: give questions to measure recall with, or leave --questions out")
    wanted = np.sort(np.random.default_rng(seed).choice(total, size=min(n, total), replace=False))
    vectors: list[Vectors] = []
    texts: list[str] = []
    first = 0
    for info, length in zip(found, lengths, strict=True):
        label = str(PurePosixPath(info.path).relative_to(root))
        row = 0
        with open_parquet(filesystem, info.path) as parquet:
            for part in parquet.iter_batches(BATCH_ROWS, columns=[column], use_threads=False):
                drawn = wanted[(wanted >= first + row) & (wanted < first + row + len(part))] - first - row
                if len(drawn):
                    _take(part.column(0), drawn, Rows(row, label), column, metric, dim, vectors, texts)
                    dim = vectors[0].shape[1] if vectors else dim
                row += len(part)
        first += length
    if column in VECTOR_COLUMNS:
        return Given(source, np.concatenate(vectors), None)
    return Given(source, None, texts)


def _column(names: list[str], label: str) -> str:
    for name in (*VECTOR_COLUMNS, *TEXT_COLUMNS):
        if name in names:
            return name
    wanted = f"vectors ({', '.join(VECTOR_COLUMNS)}) nor texts ({', '.join(TEXT_COLUMNS)})"
    listed = ", ".join(map(repr, names[:50])) + (", ..." if len(names) > 50 else "")
    raise MissingColumn(f"{label} has neither {wanted}; it has {listed}: rename the column of the questions")


def _take(
    column: Any,
    drawn: Any,
    rows: Rows,
    name: str,
    metric: Metric,
    dim: int | None,
    vectors: list[Vectors],
    texts: list[str],
) -> None:
    """Add what is drawn of a batch to `vectors` or to `texts`."""
    for at in drawn.tolist():
        one, place = column.slice(at, 1), Rows(rows.first + at, rows.file)
        if name in TEXT_COLUMNS:
            texts += strings(one, name, place).to_pylist()
            continue
        if pa.types.is_list(one.type) or pa.types.is_large_list(one.type):
            length = len(no_nulls(one, name, place)[0])
        else:
            length = one.type.list_size
        if dim is not None and length != dim:
            raise place.bad(0, f"its {name} has {length} values, those of the index have {dim}")
        vectors.append(np.asarray(checked_vectors(one, length, metric, place), np.float32))
        dim = length


def need_encoder(given: Given, encoder: object | None) -> None:
    """Raises ConfigError where the questions are texts that nothing would encode."""
    if given.texts is not None and encoder is None:
        raise ConfigError(
            f"the questions in {given.path} are texts, and the index has no encoder: name it with --encoder, or give "
            f"vectors ({', '.join(VECTOR_COLUMNS)})"
        )
