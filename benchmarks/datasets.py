"""Reads what people benchmark with, checks it, and knows the true distance of every query's k-th nearest.

DIR                      minilm/NAME.f16.npy: task "dev", or "tldr_docs" alone
DIR                      VectorDBBench: train.parquet (id, emb), test.parquet, neighbors.parquet (id, neighbors_id)
DIR                      base.EXT and queries.EXT (or query.EXT), EXT one of those below
FILE.hdf5                ann-benchmarks: train, test, neighbors; attribute distance, euclidean or angular
FILE.parquet             a corpus with vectors (vector, emb or embedding), queries by --queries
FILE.fvecs .bvecs        rows of an int32 dim and its values; queries by --queries
FILE.fbin .u8bin .i8bin  int32 rows, int32 dim, values; queries by --queries
mixture:ROWS             made by data/mixture.py
(nothing)                made-up clusters
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vecsvc.distance import exact_distances
from vecsvc.exact_search import ExactSearch
from vecsvc.ranking import TOLERANCE
from vecsvc.types import METRICS, Metric

COLUMNS = ("vector", "emb", "embedding")
BINARY = {".fbin": "<f4", ".u8bin": "u1", ".i8bin": "i1"}
VECS = {".fvecs": "<f4", ".bvecs": "u1"}
MAX_DIM = 16_384
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
            hits += int(np.sum(exact_distances(query, self.base[named], self.metric) <= bound + TOLERANCE))
        return hits / (len(labels) * min(self.k, len(self.base)))


@dataclass
class Raw:
    """What a file holds, before a metric and a k are chosen."""

    name: str
    base: np.ndarray
    queries: np.ndarray
    metric: Metric | None = None  # what the file asks for
    neighbors: np.ndarray | None = None  # (q, at least k) rows of base, the true ones


def load(
    data: str | None,
    *,
    task: str = "dev",
    queries: Path | None = None,
    metric: Metric | None = None,
    k: int = 10,
    limit: int | None = None,
    max_queries: int = MAX_QUERIES,
    cache: Path | None = None,
) -> Dataset:
    """The data with its ground truth, computed where it is missing and kept in `cache`. Raises DataError."""
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
    neighbors = None if raw.neighbors is None else raw.neighbors[:max_queries]
    if limit is not None and limit < len(base):
        base, neighbors = base[:limit], None
    if k < 1 or k > len(base):
        raise DataError(f"k must be from 1 to {len(base)}, the rows there are, got {k}")
    base = np.ascontiguousarray(base, dtype=np.float32)
    asked = np.ascontiguousarray(asked, dtype=np.float32)
    bounds = truth(raw.name, base, asked, metric, k, neighbors, cache)
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
    return Raw(path.stem, reader(path), _reader(beside)(beside))


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
    if file is not None and file.is_file():
        with np.load(file, allow_pickle=False) as kept:
            if "bounds" in kept and kept["bounds"].shape == (len(queries),):
                return np.asarray(kept["bounds"], dtype=np.float32)
    bounds = np.asarray(ExactSearch(base, metric).search(queries, k).distances[:, -1])
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez(file, bounds=bounds)
    return bounds


def _given(
    name: str, base: np.ndarray, queries: np.ndarray, metric: Metric, k: int, neighbors: np.ndarray
) -> np.ndarray:
    if neighbors.min() < 0 or neighbors.max() >= len(base):
        raise DataError(f"{name}: its neighbours name row {neighbors.max()}, the base has {len(base)} rows")
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
    if (path / "train.parquet").is_file():
        return _vectordbbench(path)
    for suffix in (*BINARY, *VECS, ".parquet"):
        base = path / f"base{suffix}"
        if base.is_file() and (queries := _beside(base)) is not None:
            reader = _reader(base)
            return Raw(path.name, reader(base), reader(queries))
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


def _vectordbbench(folder: Path) -> Raw:
    ids, base = _parquet_rows(folder / "train.parquet")
    tested, queries = _parquet_rows(folder / "test.parquet")
    file = folder / "neighbors.parquet"
    if not file.is_file() or ids is None or tested is None:
        return Raw(folder.name, base, queries)
    table = _parquet(file, ("id", "neighbors_id"))
    position = {int(name): row for row, name in enumerate(ids)}
    by_query = dict(zip(table["id"].to_pylist(), table["neighbors_id"].to_pylist(), strict=True))
    try:
        chosen = [by_query[int(name)] for name in tested]
        width = min(len(row) for row in chosen)
        neighbors = np.array([[position[name] for name in row[:width]] for row in chosen])
    except KeyError as error:
        raise DataError(f"{file}: id {error} is not in the other files: fetch the three of one data set") from None
    return Raw(folder.name, base, queries, "cosine", neighbors)


def _beside(base: Path) -> Path | None:
    """The queries that stand beside a base file under the names people use."""
    for word in ("queries", "query", "test"):
        other = base.with_name(re.sub("base|train|corpus", word, base.name))
        if other != base and other.is_file():
            return other
    return None


# ------------------------------------------------------------------------------------------------- files


def _reader(path: Path) -> Callable[[Path], np.ndarray]:
    if path.suffix in BINARY:
        return read_bin
    if path.suffix in VECS:
        return read_vecs
    if path.suffix == ".parquet":
        return lambda file: _parquet_rows(file)[1]
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
    dtype = np.dtype(VECS[path.suffix])
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
    try:
        names = pq.read_schema(path).names
        missing = [name for name in columns if name not in names]
        if missing:
            raise DataError(f"{path}: has no column {missing[0]!r}, only {', '.join(names)}")
        return pq.read_table(path, columns=list(columns))
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{path}: not a readable Parquet file: {' '.join(str(error).split())[:200]}") from error


def _parquet_rows(path: Path) -> tuple[np.ndarray | None, np.ndarray]:
    """The ids where they are integers, and the vectors (n, dim)."""
    try:
        schema = pq.read_schema(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{path}: not a readable Parquet file: {' '.join(str(error).split())[:200]}") from error
    column = next((name for name in COLUMNS if name in schema.names), None)
    if column is None:
        raise DataError(f"{path}: has none of the columns {', '.join(COLUMNS)}, only {', '.join(schema.names)}")
    with_ids = "id" in schema.names and pa.types.is_integer(schema.field("id").type)
    table = _parquet(path, ("id", column) if with_ids else (column,))
    vectors = table[column].combine_chunks()
    lengths = np.unique(np.asarray(vectors.value_lengths())) if len(vectors) else np.array([])
    if vectors.null_count or len(lengths) != 1:
        raise DataError(f"{path}: the rows of {column!r} are empty or of several lengths, expected one dim for all")
    values = np.asarray(vectors.flatten(), dtype=np.float32).reshape(len(vectors), -1)
    return (np.asarray(table["id"]) if with_ids else None), values


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
