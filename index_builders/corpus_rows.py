"""Checks the rows of a corpus: what cannot be indexed is refused with its number, its id and the remedy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vecsvc.errors import BadRow
from vecsvc.types import MAX_ABS, Metric, StoredVectors

MAX_ID_BYTES: Final = 512  # longest id in UTF-8 bytes; what the service accepts unless told otherwise


@dataclass(slots=True)
class Rows:
    """Where some rows lie in the corpus, for the messages about them."""

    first: int  # corpus row of the first
    file: str  # empty where there is but one
    ids: Any = None  # None as long as the ids themselves are in doubt

    def place(self, i: int) -> str:
        return f"row {self.first + i}" + (f" of {self.file}" if self.file else "")

    def bad(self, i: int, problem: str) -> BadRow:
        place = self.place(i)
        if self.ids is not None:
            shown = repr(self.ids[i].as_py())
            place += f" (id {shown if len(shown) <= 80 else shown[:77] + '...'})"
        return BadRow(f"{place}: {problem}")


def _first(mask: pa.BooleanArray) -> int:
    return int(np.argmax(mask.to_numpy(zero_copy_only=False)))


def no_nulls(column: pa.Array, what: str, rows: Rows) -> pa.Array:
    if column.null_count:
        raise rows.bad(_first(column.is_null()), f"its {what} is null; drop the row, or fill it in")
    return column


def valid(column: pa.Array, what: str, rows: Rows) -> pa.Array:
    """Refuse what is not as its type says: Parquet's readers take UTF-8 on trust."""
    if damage := _damage(column):
        i = next((i for i in range(len(column)) if _damage(column.take(pa.array([i])))), 0)
        raise rows.bad(i, f"its {what} is damaged ({damage}); write it again, texts as UTF-8") from damage
    return column


def _damage(column: pa.Array) -> Exception | None:
    try:
        column.validate(full=True)
    except pa.ArrowInvalid as error:
        return error  # type: ignore[no-any-return]
    return None


def strings(column: pa.Array, what: str, rows: Rows) -> pa.Array:
    """(n,) of a string type, without nulls."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_string_view(column.type):
        column = column.cast(pa.large_string())  # Arrow cannot do much with views yet
    return valid(no_nulls(column, what, rows), what, rows)


def checked_ids(column: pa.Array, rows: Rows) -> pa.Array:
    """(n,) int64 or string, without nulls."""
    if pa.types.is_integer(column.type):
        try:
            return no_nulls(column, "id", rows).cast(pa.int64())
        except pa.ArrowInvalid as error:
            i = int(np.argmax(column.to_numpy() > np.iinfo(np.int64).max))
            raise rows.bad(i, f"its id {column[i]} is beyond int64; cast the ids to int64 or string") from error
    column = strings(column, "id", rows)
    lengths = pc.binary_length(column).to_numpy()
    if lengths.max() > MAX_ID_BYTES:
        i = int(np.argmax(lengths > MAX_ID_BYTES))
        raise rows.bad(
            i, f"its id {column[i].as_py()[:40]!r}... has {lengths[i]} bytes; ids have at most {MAX_ID_BYTES}"
        )
    return column.cast(pa.string())


def checked_vectors(column: pa.Array, dim: int, metric: Metric, rows: Rows) -> StoredVectors:
    """(n, dim) float32 or float16, every value finite and within MAX_ABS, without a copy where possible."""
    no_nulls(column, "vector", rows)
    if not pa.types.is_fixed_size_list(column.type):
        lengths = np.diff(column.offsets.to_numpy())
        if (lengths != dim).any():
            i = int(np.argmax(lengths != dim))
            raise rows.bad(i, f"its vector has {lengths[i]} values, that of row 0 has {dim}; drop or mend the row")
    flat = column.flatten()
    if flat.null_count:
        at = _first(flat.is_null())
        raise rows.bad(at // dim, f"its vector[{at % dim}] is null; drop or mend the row")
    values = flat.to_numpy().reshape(-1, dim)
    with np.errstate(invalid="ignore"):  # a NaN that signals is a NaN
        if not _bounded(values):
            wide = values.astype(np.float64)
            i, j = np.argwhere(~(np.abs(wide) <= MAX_ABS))[0].tolist()
            raise rows.bad(
                i,
                f"its vector[{j}] is {wide[i, j]:g}; it must be finite and within ±{MAX_ABS:g}; drop or mend the row",
            )
    vectors: StoredVectors = values.astype(np.float32) if values.dtype == np.float64 else values
    if metric == "cosine":
        suspects = np.flatnonzero(vectors[:, 0] == 0)
        zeros = suspects[~vectors[suspects].any(axis=1)]
        if len(zeros):
            raise rows.bad(
                int(zeros[0]), "its vector is all zeros, which has no direction; drop the row, or use --metric l2 or ip"
            )
    return vectors


def _bounded(values: StoredVectors) -> bool:
    if values.dtype == np.float16:
        # NumPy compares float16 slowly. Without its sign, all but inf and NaN lies below the pattern of inf.
        return bool((values.view(np.uint16) & 0x7FFF).max() < 0x7C00)
    return bool(values.max() <= MAX_ABS and values.min() >= -MAX_ABS)  # NaN comes through both
