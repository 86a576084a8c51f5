"""Questions that a user gave to measure recall with: vectors or texts of a Parquet file, some of them drawn."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

import msgspec
import numpy as np
import pyarrow as pa

from index_builders.corpus import VECTOR_COLUMNS, check_strings, vector_value_bytes
from index_builders.corpus_files import find_files, label_of, open_parquet
from index_builders.corpus_rows import Rows, checked_vectors, no_nulls, strings
from vecsvc.distance import check_vector
from vecsvc.encoders.onnx import open_encoder
from vecsvc.errors import ConfigError, CorpusError, MissingColumn
from vecsvc.types import Metric, Vectors

TEXT_COLUMNS: Final = ("query", "text")  # the first that the file has, where it has no vectors
BATCH_ROWS: Final = 4096


@dataclass(frozen=True, slots=True)
class Questions:
    path: str  # as the user gave it
    vectors: Vectors  # (n, dim)
    digest: str  # of what was drawn: the same on every machine, where encoders round otherwise


def open_questions(
    source: str, *, metric: Metric, dim: int | None, n: int, seed: int, encoder_folder: Path | None, num_threads: int
) -> Questions:
    """Up to n questions drawn from a file of them; texts are encoded here, before any work that could be lost.

    `dim` is that of the corpus, None where its texts get theirs from the encoder. Raises UserError.
    """
    if encoder_folder is None:
        assert dim is not None  # a corpus of texts has an encoder
        drawn = read_questions(source, metric, dim, n, seed)
        if isinstance(drawn, list):
            raise ConfigError(
                f"the questions in {source} are texts, and the index has no encoder: name it with --encoder, or give "
                f"vectors ({', '.join(VECTOR_COLUMNS)})"
            )
        return Questions(source, drawn, _digest(drawn.tobytes()))
    encoder = open_encoder(encoder_folder, name=encoder_folder.resolve().name, num_threads=num_threads)
    try:
        drawn = read_questions(source, metric, dim or encoder.spec.dim, n, seed)
        if not isinstance(drawn, list):
            return Questions(source, drawn, _digest(drawn.tobytes()))
        vectors = encoder.encode(drawn, "query")
    finally:
        encoder.close()
    for text, vector in zip(drawn, vectors, strict=True):
        check_vector(vector, metric, f"{source}: the encoder's vector of the question {text[:80]!r}")
    return Questions(source, vectors, _digest(msgspec.json.encode(drawn)))


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def read_questions(source: str, metric: Metric, dim: int, n: int, seed: int) -> Vectors | list[str]:
    """Up to n questions drawn from a Parquet file, a folder or a glob, local or s3://; the others are not looked at.

    `dim` is that of the index. Raises CorpusUnreadable, MissingColumn, BadRow with file and row, or CorpusError where
    there are none.
    """
    filesystem, root, found = find_files(source)
    lengths, column = [], ""
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
                row += len(part)
        first += length
    return np.concatenate(vectors) if column in VECTOR_COLUMNS else texts


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
    dim: int,
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
        if length != dim:
            problem = f"its {name} has {length} values, those of the index have {dim}"
            raise place.bad(0, f"{problem}; give vectors of one encoder")
        vectors.append(np.asarray(checked_vectors(one, length, metric, place), np.float32))
