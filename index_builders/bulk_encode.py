"""Encodes the texts of a corpus with all cores, and keeps what is done where a build that dies can go on from it.

<staging>/encoded/<place of the first>-<sha256>.npy   the vectors of WINDOW_ROWS texts, in the order of the corpus

A part appears whole, by rename, and its name carries the hash of its bytes: what a resumed build may trust is said
by the folder alone. Windows are counted over what is encoded, not over batches or files, and every run of the model
has the same texts however many threads there are: a build that was resumed makes the same vectors as one that was
not, also where an encoder quantises by what is in a run.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from index_builders.corpus import Batch
from vecsvc.distance import check_vector
from vecsvc.encoders.base import Encoder
from vecsvc.errors import BadRow, EncoderError, InvalidVector, VecsvcError
from vecsvc.storage import (
    ArrayWriter,
    delete_file,
    foreign_errors,
    make_folder,
    open_array,
    rename,
    sha256,
)
from vecsvc.types import Id, Metric, Vectors

FOLDER: Final = "encoded"
WINDOW_ROWS: Final = 4096  # texts that are sorted by length, and made durable, together: what a crash may cost
CALL_TEXTS: Final = 256  # texts of one call of the encoder: a thread's piece of work
# Cores that one run of the model uses; the others run other texts meanwhile. 0: all cores, one run after the other.
RUN_THREADS: Final = 1

_PART: Final = re.compile(r"(\d{12})-([0-9a-f]{64})\.npy")
_UNFINISHED: Final = "part.npy.tmp"


@dataclass(frozen=True, slots=True)
class Window:
    """Consecutive texts of what is encoded, whatever batches they came in."""

    first: int  # place of the first among all that are encoded: its row, where that is the whole corpus
    texts: list[str]
    ids: list[Id]
    rows: list[int]  # of the corpus


def run_threads(threads: int) -> int:
    """Threads of one run of the model, of `threads` in all: what the encoder is to be opened with."""
    return min(threads, RUN_THREADS) if RUN_THREADS else threads


def windows(batches: Iterable[Batch]) -> Iterator[Window]:
    """The texts of the batches, WINDOW_ROWS at a time; the last may have fewer."""
    first, texts, ids, rows = 0, list[str](), list[Id](), list[int]()
    for batch in batches:
        texts += batch.texts or []
        ids += batch.ids.to_pylist()
        rows += batch.corpus_rows().tolist()
        while len(texts) >= WINDOW_ROWS:
            yield Window(first, texts[:WINDOW_ROWS], ids[:WINDOW_ROWS], rows[:WINDOW_ROWS])
            first, rows = first + WINDOW_ROWS, rows[WINDOW_ROWS:]
            texts, ids = texts[WINDOW_ROWS:], ids[WINDOW_ROWS:]
    if texts:
        yield Window(first, texts, ids, rows)


class EncodedTexts:
    """The folder with what was encoded so far, and then the vectors of all rows."""

    def __init__(self, staging: Path, dim: int) -> None:
        """What lies there and is no whole part goes."""
        self._folder = staging / FOLDER
        self.dim = dim
        # Place of the first text -> file and rows. Parts are opened when they are read: each map keeps a descriptor.
        self._parts: dict[int, tuple[Path, int]] = {}
        make_folder(self._folder)
        for path in sorted(self._folder.iterdir()):
            named = _PART.fullmatch(path.name)
            # A file that cannot be read now may be read later: only what is known to be no part goes.
            with foreign_errors(path, "read"):
                whole = named is not None and sha256(path) == named[2]
            if named is None or not whole:
                delete_file(path)
            else:
                self._parts[int(named[1])] = path, len(self._open(path))

    def _open(self, path: Path) -> Vectors:
        return open_array(path, np.float32, (None, self.dim))

    @property
    def rows(self) -> int:
        return sum(rows for _, rows in self._parts.values())

    def has(self, window: Window) -> bool:
        part = self._parts.get(window.first)
        return part is not None and part[1] == len(window.texts)

    def add(self, window: Window, vectors: Vectors) -> None:
        aside = self._folder / _UNFINISHED
        writer = ArrayWriter(aside, np.float32, (self.dim,))
        try:
            writer.write(vectors)
            writer.close()
        finally:
            writer.abandon()
        path = self._folder / f"{window.first:012d}-{sha256(aside)}.npy"
        rename(aside, path)
        self._parts[window.first] = path, len(vectors)

    def of(self, first: int, n: int) -> Vectors:
        """The vectors (n, dim) of consecutive texts, all of which were added."""
        found: list[NDArray[Any]] = []
        row, end = first, first + n
        while row < end:
            start = row - row % WINDOW_ROWS
            part = self._open(self._parts[start][0])
            found.append(np.array(part[row - start : end - start]))
            row += len(found[-1])
        return np.concatenate(found)


def encode_corpus(
    encoder: Encoder,
    batches: Iterable[Batch],
    into: EncodedTexts,
    *,
    metric: Metric,
    threads: int,
    progress: Callable[[int], None],
) -> None:
    """Encode what is not in `into` yet. Raises BadRow with row and id where a vector cannot be ranked."""
    workers = max(1, threads // run_threads(threads))
    ahead = 1 + -(-2 * workers * CALL_TEXTS // WINDOW_ROWS)  # windows at work: enough that no thread waits
    pool = ThreadPoolExecutor(workers, thread_name_prefix="vecsvc-encode")
    pending: deque[tuple[Window, list[_Call]]] = deque()

    def finish() -> None:
        window, calls = pending.popleft()
        vectors = np.empty((len(window.texts), encoder.spec.dim), dtype=np.float32)
        for rows, call in calls:
            try:
                vectors[rows] = call.result()
            except EncoderError as error:
                raise _blamed(encoder, window, rows, error) from error
            progress(len(rows))
        _check(window, vectors, metric)
        into.add(window, vectors)

    try:
        for window in windows(batches):
            if into.has(window):
                continue
            pending.append((window, _submit(pool, encoder, window)))
            while len(pending) >= ahead:
                finish()
        while pending:
            finish()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_Call = tuple[NDArray[np.intp], "Future[Vectors]"]


def _submit(pool: ThreadPoolExecutor, encoder: Encoder, window: Window) -> list[_Call]:
    """Texts of like length go together, the longest first, so that little is padded and no long run comes last."""
    order = np.argsort([-len(text) for text in window.texts], kind="stable")
    calls = []
    for start in range(0, len(order), CALL_TEXTS):
        rows = order[start : start + CALL_TEXTS]
        calls.append((rows, pool.submit(encoder.encode, [window.texts[row] for row in rows], "passage")))
    return calls


def _blamed(encoder: Encoder, window: Window, rows: NDArray[np.intp], error: EncoderError) -> VecsvcError:
    """The error that names a row whose text the encoder fails on; `error` where it fails on all, or on none alone."""
    failed: BadRow | None = None
    works = False
    for row in rows.tolist():
        try:
            encoder.encode([window.texts[row]], "passage")
            works = True
        except EncoderError as alone:
            failed = failed or BadRow(f"{_place(window, row)}: the encoder fails on its text: {alone}")
        if works and failed is not None:
            return failed
    return error


def _place(window: Window, row: int) -> str:
    return f"row {window.rows[row]} (id {window.ids[row]!r})"


def _check(window: Window, vectors: Vectors, metric: Metric) -> None:
    for row, vector in enumerate(vectors):
        try:
            check_vector(vector, metric)
        except InvalidVector as error:
            raise BadRow(
                f"{_place(window, row)}: of its text the encoder made a vector that cannot be ranked: {error}"
            ) from error
