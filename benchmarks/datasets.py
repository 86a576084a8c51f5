"""Reads what people benchmark with, checks it, and knows the true distance of every query's k-th nearest.

DIR                      minilm/NAME.f16.npy: task "dev", or "tldr_docs" alone
DIR                      VectorDBBench: train.parquet (id, emb), test.parquet, neighbors.parquet (id, neighbors_id);
                         train.parquet may be shuffle_train.parquet, and either in pieces, train-00-of-10.parquet
DIR                      base.EXT and queries.EXT (or query.EXT), EXT one of those below
FILE.hdf5                ann-benchmarks: train, test, neighbors; attribute distance, euclidean or angular
FILE.parquet             a corpus with vectors (vector, emb or embedding), queries by --queries
FILE.fvecs .bvecs        rows of an int32 dim and its values; queries by --queries
FILE.fbin .u8bin .i8bin  int32 rows, int32 dim, values; queries by --queries
mixture:ROWS             made by data/mixture.py
(nothing)                made-up clusters

Published neighbours of .EXT files are used where they lie beside them, named as the queries or the base are, with
groundtruth or gt in the place of that word: .ivecs with .fvecs and .bvecs, .ibin with the others. --neighbors names a
file that is called otherwise.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from common import ROUNDING

from vecsvc.distance import exact_distances
from vecsvc.errors import StorageError
from vecsvc.exact_search import ExactSearch
from vecsvc.storage import delete_file, make_folder, rename, write_file
from vecsvc.types import METRICS, Metric

COLUMNS = ("vector", "emb", "embedding")
BINARY = {".fbin": "<f4", ".u8bin": "u1", ".i8bin": "i1"}
VECS = {".fvecs": "<f4", ".bvecs": "u1"}
NEIGHBORS = {**dict.fromkeys(VECS, ".ivecs"), **dict.fromkeys(BINARY, ".ibin")}  # by what the base ends in
MAX_DIM = 16_384
BLOCK = 1_024  # rows of a Parquet file that are in memory twice
BUFFER_BYTES = 1 << 20  # of a Parquet file, read ahead
MAX_QUERIES = 2_000
CHECKED_QUERIES = 16  # whose given neighbours are compared with our own
DISTANCES: dict[str, Metric] = {"angular": "cosine", "euclidean": "l2"}


class DataError(Exception):
    """One line that names the value and the remedy."""


@dataclass
class Dataset:
    name: str
    base: np.ndarray  # (n, dim) float32
    queries: np.ndarray  # (q, dim) float32
    metric: Metric
    k: int
    bounds: np.ndarray  # (q,) distance of the k-th nearest, float32

    def recall(self, labels: np.ndarray) -> float:
        """The share of k places filled by a row as near as the k-th nearest, over the first len(labels) queries.

        Distances are recomputed from the vectors, so that ties are no errors and reported distances do not
        matter; a row that is named twice counts once.
        """
        hits = 0
        for query, bound, row in zip(self.queries, self.bounds, labels, strict=False):
            named = np.unique(row[row >= 0])
            hits += int(np.sum(exact_distances(query, self.base[named], self.metric) <= bound + ROUNDING))
        return hits / (len(labels) * min(self.k, len(self.base)))


@dataclass
class Raw:
    """What a file holds, before a metric and a k are chosen."""

    name: str
    base: np.ndarray
    queries: np.ndarray
    metric: Metric | None = None  # what the file asks for
    neighbors: np.ndarray | None = None  # (q, at least k) rows of base, the true ones
    published: Path | None = None  # neighbours that lie beside, perhaps of other rows or under another metric


def load(
    data: str | None,
    *,
    task: str = "dev",
    queries: Path | None = None,
    neighbors: Path | None = None,
    metric: Metric | None = None,
    k: int = 10,
    limit: int | None = None,
    max_queries: int = MAX_QUERIES,
    cache: Path | None = None,
) -> Dataset:
    """The data with its ground truth, computed where it is missing and kept in `cache`. Raises DataError.

    `neighbors` is a file of it, .ivecs or in big-ann's layout, which has to fit.
    """
    raw = read(data, task, queries)
    for what, array in (("base", raw.base), ("queries", raw.queries)):
        if array.ndim != 2 or len(array) == 0 or not np.isfinite(array).all():
            raise DataError(f"{raw.name}: {what} of shape {array.shape} has no rows or values that are not finite")
    if raw.base.shape[1] != raw.queries.shape[1]:
        raise DataError(
            f"{raw.name}: base has dim {raw.base.shape[1]}, queries {raw.queries.shape[1]}: name queries that fit"
        )
    metric = metric or raw.metric or "cosine"
    if metric not in METRICS:
        raise DataError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")
    base, asked = raw.base, raw.queries[:max_queries]
    known, published = None if raw.neighbors is None else raw.neighbors[:max_queries], neighbors or raw.published
    if limit is not None and limit < len(base):
        if neighbors is not None:
            raise DataError(f"{neighbors}: holds neighbours among {len(base)} rows, not among {limit}: leave one out")
        base, known, published = base[:limit], None, None
    if k < 1 or k > len(base):
        raise DataError(f"k must be from 1 to {len(base)}, the rows there are, got {k}")
    base = np.ascontiguousarray(base, dtype=np.float32)
    asked = np.ascontiguousarray(asked, dtype=np.float32)
    bounds = None
    if published is not None:
        try:
            bounds = _given(published.name, base, asked, metric, k, read_neighbors(published, len(raw.queries), k))
        except DataError as error:
            if neighbors is not None:
                raise
            # They are often those of a larger base or of another metric: what is computed is right in any case.
            print(f"{error}; not used, the true neighbours are computed")
    if bounds is None:
        bounds = truth(raw.name, base, asked, metric, k, known, cache)
    return Dataset(raw.name, base, asked, metric, k, bounds)


def read(data: str | None, task: str, queries: Path | None) -> Raw:
    """The rows of base and queries, whatever they are stored as."""
    if data is None:
        return _clusters()
    if made := re.fullmatch(r"mixture:([\d_]+)", data):
        return _mixture(int(made[1]))
    path = Path(data)
    if path.is_dir():
        return _folder(path, task)
    if not path.is_file():
        raise DataError(f"{data}: no such file or folder; known are a folder, a file, or mixture:ROWS")
    if path.suffix in (".hdf5", ".h5"):
        return _hdf5(path)
    reader = _reader(path)
    beside = queries or _beside(path)
    if beside is None:
        raise DataError(f"{path}: holds no queries: name a file of them with --queries")
    return Raw(path.stem, reader(path), _reader(beside)(beside), published=_published(path, beside))


def truth(
    name: str,
    base: np.ndarray,
    queries: np.ndarray,
    metric: Metric,
    k: int,
    neighbors: np.ndarray | None,
    cache: Path | None,
) -> np.ndarray:
    """The k-th smallest distance of each query (q,): from given neighbours where they hold, else from all rows."""
    if neighbors is not None and neighbors.ndim == 2 and neighbors.shape[1] >= k and len(neighbors) == len(queries):
        return _given(name, base, queries, metric, k, neighbors)
    key = hashlib.blake2b(f"{metric} {k} {base.shape} {queries.shape}".encode(), digest_size=16)
    key.update(base.data)
    key.update(queries.data)
    file = None if cache is None else cache / f"truth-{key.hexdigest()}.npz"
    if file is not None and (kept := _kept(file, len(queries))) is not None:
        return kept
    bounds = np.asarray(ExactSearch(base, metric).search(queries, k).distances[:, -1])
    if file is not None:
        _keep(file, bounds)
    return bounds


def _kept(file: Path, queries: int) -> np.ndarray | None:
    """The bounds (queries,) in a file of the cache; None where there is none, or one that is not whole."""
    # zipfile and NumPy raise nearly everything there is over damaged bytes, and the remedy is always the same.
    with contextlib.suppress(Exception), np.load(io.BytesIO(file.read_bytes()), allow_pickle=False) as kept:
        bounds = np.asarray(kept["bounds"])
        if bounds.shape == (queries,) and bounds.dtype == np.float32:
            return bounds
    return None


def _keep(file: Path, bounds: np.ndarray) -> None:
    """Put bounds into the cache, whole or not at all; a full disk costs the next run the time to compute them."""
    packed = io.BytesIO()
    np.savez(packed, bounds=bounds)
    aside = file.with_name(f".{file.name}.{os.getpid()}")  # another process may be at the same data
    try:
        make_folder(file.parent)
        delete_file(aside)
        write_file(aside, packed.getvalue())
        rename(aside, file)
    except StorageError as error:
        print(f"the true neighbours are not kept for the next run: {error}")
        with contextlib.suppress(StorageError):
            delete_file(aside)


def _given(
    name: str, base: np.ndarray, queries: np.ndarray, metric: Metric, k: int, neighbors: np.ndarray
) -> np.ndarray:
    neighbors = neighbors[: len(queries)]
    beyond = neighbors[(neighbors < 0) | (neighbors >= len(base))]
    if len(beyond):
        raise DataError(f"{name}: its neighbours name row {beyond[0]}, the base has {len(base)} rows")
    found = [
        np.sort(exact_distances(query, base[row], metric))[k - 1] for query, row in zip(queries, neighbors, strict=True)
    ]
    bounds = np.asarray(found, dtype=np.float32)
    checked = slice(0, CHECKED_QUERIES)
    ours = ExactSearch(base, metric).search(queries[checked], k).distances[:, -1]
    wrong = np.flatnonzero(np.abs(bounds[checked] - ours) > 1e-4 * np.maximum(1.0, np.abs(ours)))
    if len(wrong):
        at = int(wrong[0])
        raise DataError(
            f"{name}: neighbour {k} of query {at} lies at {bounds[at]:g}, and our own at {ours[at]:g} under {metric}: "
            "give the --metric that the file was made with"
        )
    return bounds


# ----------------------------------------------------------------------------------------------- folders


def _folder(path: Path, task: str) -> Raw:
    if (path / "minilm").is_dir():
        return _minilm(path / "minilm", task)
    if train := _train_files(path):
        return _vectordbbench(path, train)
    for suffix in (*BINARY, *VECS, ".parquet"):
        base = path / f"base{suffix}"
        if base.is_file() and (queries := _beside(base)) is not None:
            reader = _reader(base)
            return Raw(path.name, reader(base), reader(queries), published=_published(base, queries))
    raise DataError(
        f"{path}: holds neither minilm/, nor train.parquet and test.parquet, nor base.EXT and queries.EXT "
        f"with EXT one of {', '.join(s[1:] for s in (*BINARY, *VECS))}, parquet"
    )


def _minilm(folder: Path, task: str) -> Raw:
    parts = {"dev": ("peps", "tldr_docs"), "tldr_docs": ("tldr_docs",)}
    if task not in parts:
        raise DataError(f"task must be one of {', '.join(parts)}, got {task!r}")
    arrays = []
    for name in (*parts[task], "tldr_queries"):
        file = folder / f"{name}.f16.npy"
        try:
            arrays.append(np.load(file, allow_pickle=False).astype(np.float32))
        except (OSError, ValueError) as error:
            raise DataError(f"{file}: not a readable .npy file: {error}") from error
        arrays[-1] /= np.linalg.norm(arrays[-1], axis=1, keepdims=True)
    return Raw(task, np.concatenate(arrays[:-1]), arrays[-1][::16], "ip")


def _train_files(folder: Path) -> list[Path]:
    """VectorDBBench's training vectors in their order; [] where there are none.

    The plain ones come before the shuffled ones, a whole file before pieces. Raises DataError where pieces are missing.
    """
    for name in ("train", "shuffle_train"):
        whole = folder / f"{name}.parquet"
        if whole.is_file():
            return [whole]
        pieces: dict[int, Path] = {}
        counts = set()
        for path in folder.glob(f"{name}-*.parquet"):
            if match := re.fullmatch(rf"{name}-(\d{{1,4}})-of-(\d{{1,4}})", path.stem):
                pieces[int(match[1])] = path
                counts.add(int(match[2]))
        if len(counts) > 1:
            several = " and ".join(str(count) for count in sorted(counts))
            raise DataError(f"{folder}: has pieces of {name} out of {several}: keep those of one number")
        if counts:
            count = counts.pop()
            missing = [f"{name}-{i:02}-of-{count:02}.parquet" for i in range(count) if i not in pieces]
            if missing:
                raise DataError(f"{folder}: has {count - len(missing)} of {count} pieces: fetch {', '.join(missing)}")
            return [pieces[i] for i in range(count)]
    return []


def _vectordbbench(folder: Path, train: list[Path]) -> Raw:
    test, file = folder / "test.parquet", folder / "neighbors.parquet"
    base, queries = _parquet_rows(*train), _parquet_rows(test)
    ids, tested = _parquet_ids(*train), _parquet_ids(test)
    if not file.is_file() or ids is None or tested is None:
        return Raw(folder.name, base, queries)
    table = _parquet(file, ("id", "neighbors_id"))
    by_query = dict(zip(table["id"].to_pylist(), table["neighbors_id"].to_pylist(), strict=True))
    try:
        chosen = [by_query[int(name)] for name in tested]
    except KeyError as error:
        raise DataError(f"{file}: id {error} is not in it: fetch the files of one data set") from None
    width = min(len(row) for row in chosen)
    named = np.array([row[:width] for row in chosen], dtype=np.int64)
    return Raw(folder.name, base, queries, "cosine", _rows_of(named, ids, file))


def _rows_of(named: np.ndarray, ids: np.ndarray, file: Path) -> np.ndarray:
    """Where in `ids` (n,) each of the ids is that `file` names, whatever the shape. Raises DataError."""
    order = np.argsort(ids, kind="stable")
    twice = np.flatnonzero(np.diff(ids[order]) == 0)
    if len(twice):
        raise DataError(f"{file.parent}: id {ids[order[twice[0]]]} stands for two vectors: fetch the pieces again")
    rows = order[np.minimum(np.searchsorted(ids, named, sorter=order), len(ids) - 1)]
    strange = named[ids[rows] != named]
    if len(strange):
        raise DataError(f"{file}: id {strange[0]} is in no other file: fetch the files of one data set")
    return rows


def _beside(base: Path) -> Path | None:
    """The queries that stand beside a base file under the names people use."""
    for word in ("queries", "query", "test"):
        other = base.with_name(re.sub("base|train|corpus", word, base.name))
        if other != base and other.is_file():
            return other
    return None


def _published(base: Path, queries: Path) -> Path | None:
    """The true neighbours that stand beside queries or base under the names people use."""
    for file, words in ((queries, "queries|query|test"), (base, "base|train|corpus")):
        for word in ("groundtruth", "gt"):
            stem = re.sub(words, word, file.stem)
            other = file.with_name(stem + NEIGHBORS.get(base.suffix, ""))
            if stem != file.stem and base.suffix in NEIGHBORS and other.is_file():
                return other
    return None


# ------------------------------------------------------------------------------------------------- files


def _reader(path: Path) -> Callable[[Path], np.ndarray]:
    if path.suffix in BINARY:
        return read_bin
    if path.suffix in VECS:
        return read_vecs
    if path.suffix == ".parquet":
        return _parquet_rows
    known = ", ".join((*BINARY, *VECS, ".parquet", ".hdf5"))
    raise DataError(f"{path}: ends in {path.suffix!r}, which is none of {known}")


def read_bin(path: Path) -> np.ndarray:
    """big-ann's layout: int32 rows, int32 dim, then the values; mapped, not read."""
    dtype = np.dtype(BINARY[path.suffix])
    size = path.stat().st_size
    if size < 8:
        raise DataError(f"{path}: has {size} bytes, too few for a header: fetch it again")
    rows, dim = (int(value) for value in np.fromfile(path, "<i4", 2))
    if rows < 1 or not 1 <= dim <= MAX_DIM or size != 8 + rows * dim * dtype.itemsize:
        raise DataError(
            f"{path}: the header says {rows} x {dim}, which is not what {size} bytes of {path.suffix[1:]} hold: "
            "fetch it again"
        )
    return np.memmap(path, dtype, "r", offset=8, shape=(rows, dim))


def read_vecs(path: Path) -> np.ndarray:
    """The layout of SIFT1M: each row an int32 dim and its values; mapped, not read."""
    dtype = np.dtype(VECS.get(path.suffix, "<i4"))
    size = path.stat().st_size
    dim = int(np.fromfile(path, "<i4", 1)[0]) if size >= 4 else 0
    record = 4 + dim * dtype.itemsize
    if not 1 <= dim <= MAX_DIM or size % record:
        raise DataError(
            f"{path}: the first row says dim {dim}, which does not divide {size} bytes of {path.suffix[1:]}: "
            "fetch it again"
        )
    rows = np.memmap(path, np.dtype([("dim", "<i4"), ("values", dtype, (dim,))]), "r")
    wrong = np.flatnonzero(rows["dim"] != dim)
    if len(wrong):
        raise DataError(f"{path}: row {wrong[0]} says dim {rows['dim'][wrong[0]]}, the first {dim}: fetch it again")
    return np.asarray(rows["values"])


def read_neighbors(path: Path, queries: int, k: int) -> np.ndarray:
    """The true neighbours (queries, at least k) in a file: .ivecs, or big-ann's .ibin.

    That is int32 queries, int32 neighbours of each, all rows of the base, and then all distances. Raises DataError.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if path.suffix == ".ivecs":
        found = read_vecs(path)
        rows, width = found.shape
    else:
        size = path.stat().st_size
        rows, width = (int(value) for value in np.fromfile(path, "<i4", 2)) if size >= 8 else (0, 0)
        if rows < 1 or not 1 <= width <= MAX_DIM or size != 8 + rows * width * 8:
            raise DataError(
                f"{path}: the header says {rows} x {width}, which is not what {size} bytes of ibin hold: fetch it again"
            )
        found = np.memmap(path, "<i4", "r", offset=8, shape=(rows, width))
    if rows != queries or width < k:
        raise DataError(f"{path}: has {width} neighbours of {rows} queries, expected {k} or more of {queries}")
    return found


def _hdf5(path: Path) -> Raw:
    try:
        import h5py
    except ImportError:
        raise DataError(f"{path}: reading HDF5 needs h5py: pip install h5py") from None
    try:
        with h5py.File(path, "r") as file:
            missing = [name for name in ("train", "test") if name not in file]
            if missing:
                raise DataError(f"{path}: has no {' and no '.join(missing)}; ann-benchmarks' files have both")
            said = file.attrs.get("distance", "")
            said = said.decode() if isinstance(said, bytes) else str(said)
            if said and said not in DISTANCES:
                raise DataError(f"{path}: distance is {said!r}, known are {', '.join(DISTANCES)}")
            neighbors = np.asarray(file["neighbors"], dtype=np.int64) if "neighbors" in file else None
            train, test = (np.asarray(file[name], dtype=np.float32) for name in ("train", "test"))
    except OSError as error:
        raise DataError(f"{path}: not a readable HDF5 file: {error}; fetch it again") from error
    return Raw(path.stem, train, test, DISTANCES.get(said), neighbors)


def _parquet(path: Path, columns: tuple[str, ...]) -> pa.Table:
    names = _parquet_schema(path).names
    missing = [name for name in columns if name not in names]
    if missing:
        raise DataError(f"{path}: has no column {missing[0]!r}, only {', '.join(names)}")
    try:
        return pq.read_table(path, columns=list(columns))
    except (OSError, pa.ArrowInvalid) as error:
        raise _unreadable(path, error) from error


def _parquet_schema(path: Path) -> pa.Schema:
    try:
        return pq.read_schema(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(f"{path}: not a readable Parquet file: {' '.join(str(error).split())[:200]}")


def _parquet_ids(*paths: Path) -> np.ndarray | None:
    """The ids (n,) of files that follow each other; None where they are not integers."""
    found = []
    for path in paths:
        schema = _parquet_schema(path)
        if "id" not in schema.names or not pa.types.is_integer(schema.field("id").type):
            return None
        found.append(_parquet(path, ("id",))["id"])
    if any(ids.null_count for ids in found):
        return None
    return np.concatenate([np.asarray(ids, dtype=np.int64) for ids in found])


def _parquet_rows(*paths: Path) -> np.ndarray:
    """The vectors (n, dim) of files that follow each other, with a block of them in memory twice and no more."""
    columns, rows = [], 0
    for path in paths:
        names = _parquet_schema(path).names
        column = next((name for name in COLUMNS if name in names), None)
        if column is None:
            raise DataError(f"{path}: has none of the columns {', '.join(COLUMNS)}, only {', '.join(names)}")
        columns.append(column)
        rows += pq.read_metadata(path).num_rows
    vectors, at = np.empty((rows, 0), dtype=np.float32), 0
    for path, column in zip(paths, columns, strict=True):
        for block in _blocks(path, column):
            lengths = [] if block.null_count else np.unique(np.asarray(block.value_lengths())).tolist()
            expected = vectors.shape[1] or max(lengths, default=0)
            if not expected or lengths != [expected]:
                raise DataError(
                    f"{path}: the rows of {column!r} are empty or of several lengths, expected one dim for all"
                    + (f", {expected} as before" if at else "")
                )
            if not at:
                vectors = np.empty((rows, expected), dtype=np.float32)
            vectors[at : at + len(block)] = np.asarray(block.flatten()).reshape(len(block), expected)
            at += len(block)
    if not at:
        raise DataError(f"{paths[0]}: holds no vectors: name a file with rows")
    return vectors


def _blocks(path: Path, column: str) -> Iterator[pa.Array]:
    try:
        # Left to itself, pyarrow holds a whole row group, which is often the whole file.
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=BUFFER_BYTES) as file:
            for batch in file.iter_batches(BLOCK, columns=[column]):
                if len(batch):
                    yield batch.column(0)
    except (OSError, pa.ArrowInvalid) as error:
        raise _unreadable(path, error) from error


# ----------------------------------------------------------------------------------------------- made up


def _mixture(rows: int) -> Raw:
    sys.path.insert(0, str(Path(__file__).parents[1] / "data"))
    import mixture

    if rows < 1:
        raise DataError(f"mixture:{rows} has no rows: ask for some, as in mixture:100000")
    base = np.concatenate(list(mixture.blocks(rows, mixture.BASE_SEED)))
    queries = np.concatenate(list(mixture.blocks(MAX_QUERIES, mixture.QUERY_SEED)))
    return Raw(f"mixture {rows:,}", base, queries, "l2")


def _clusters(rows: int = 20_000, queries: int = 1_000, dim: int = 128) -> Raw:
    rng = np.random.default_rng(7)
    centres = rng.standard_normal((400, dim))
    points = centres[rng.integers(0, len(centres), rows + queries)]
    points = (points + 0.7 * rng.standard_normal(points.shape)).astype(np.float32)
    return Raw("made-up clusters", points[queries:], points[:queries], "cosine")
