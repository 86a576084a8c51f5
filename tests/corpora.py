"""Small corpora, and the few lines around a build and a question that several test files share."""

from __future__ import annotations

import asyncio
import importlib.util
import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from index_builders.pipeline import BuildResult, build_index
from vecsvc.catalog import Catalog
from vecsvc.config import BuildSettings, ServeSettings
from vecsvc.engine import Engine
from vecsvc.manifest import Manifest, check_files, read_manifest
from vecsvc.storage import IndexFolder
from vecsvc.telemetry import Metrics
from vecsvc.types import BatchAnswer, Id, Query, SearchSettings, VectorQuery

# hnswlib needs a compiler to be installed; the promises of a graph hold without it, for faiss' own.
HAS_HNSWLIB = importlib.util.find_spec("hnswlib") is not None
GRAPH, GRAPH_FILE = ("hnsw", "hnsw.bin") if HAS_HNSWLIB else ("faiss", "faiss.index")
KINDS = ("exact", "kd_tree", "tp_tree", "nng", "faiss", *(("hnsw",) if HAS_HNSWLIB else ()))

WORDS = ("red", "green", "blue", "cat", "tree", "house", "water", "fire", "stone", "music", "river", "cloud")
EPOCH_US = 1_700_000_000_000_000


def make_vectors(n: int, dim: int, seed: int = 7) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((n, dim)).astype(np.float32)


def make_ids(n: int, ids: Literal["str", "int"]) -> list[Id]:
    return [f"row-{i:04d}" for i in range(n)] if ids == "str" else [1_000_003 * i - 500 for i in range(n)]


def make_texts(n: int) -> list[str]:
    return [f"{WORDS[i % 12]} {WORDS[i // 12 % 12]} {WORDS[i // 144 % 12]} {i}" for i in range(n)]


def write_corpus(
    path: Path,
    n: int = 300,
    dim: int = 8,
    ids: Literal["str", "int"] = "str",
    fields: bool = True,
    seed: int = 7,
    *,
    dtype: Literal["float32", "float16"] = "float32",
    more: Mapping[str, pa.Array] | None = None,
) -> Path:
    """A Parquet file of n rows: id, vector (none where dim is 0), label (int8), text, at (timestamp), and `more`."""
    columns: dict[str, Any] = {"id": pa.array(make_ids(n, ids))}
    if dim:
        flat = make_vectors(n, dim, seed).astype(dtype).reshape(-1)
        columns["vector"] = pa.FixedSizeListArray.from_arrays(pa.array(flat), dim)
    if fields or not dim:
        columns["label"] = pa.array((np.arange(n) % 10).astype(np.int8))
        columns["text"] = pa.array(make_texts(n))
        columns["at"] = pa.array(EPOCH_US + 1_000_001 * np.arange(n), type=pa.timestamp("us"))
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({**columns, **(more or {})}), path)
    return path


def build(source: Path | str, out: Path, params: Mapping[str, Any] | None = None, **settings: Any) -> BuildResult:
    """`build_index` with what suits tests, unless `settings` says otherwise: one thread, few certificate queries."""
    flags = {name: settings.pop(name, False) for name in ("resume", "require_recall")}
    wanted = {"out": str(out), "threads": 1, "certificate_queries": 8, **settings}
    return build_index(str(source), BuildSettings(**wanted), params, **flags, stream=io.StringIO())


def check_version(path: Path) -> Manifest:
    """What `vecsvc verify` does."""
    manifest = read_manifest(path)
    check_files(path, manifest.files())
    return manifest


def current_version(folder: IndexFolder) -> Manifest:
    """The version that serves, verified."""
    version = folder.current()
    assert version is not None
    return check_version(folder.version(version))


def strays(folder: IndexFolder) -> list[str]:
    """Every file and folder of an index that no published version, CURRENT or HISTORY accounts for."""
    known = {folder.path / "CURRENT", folder.path / "HISTORY"}
    for version in folder.versions():
        path = folder.path / version
        files = [path / file.path for file in read_manifest(path).files()] + [path / "manifest.json"]
        known.update(files, *(file.parents for file in files))
        # Kinds without files of their own have an empty folder.
        known.update(path.glob("shards/*/index"))
    return [str(path.relative_to(folder.path)) for path in folder.path.rglob("*") if path not in known]


@contextmanager
def opened(directory: Path, **settings: Any) -> Iterator[Engine]:
    """An engine over what serves in `directory`, everything of it ready."""
    serve = ServeSettings(**{"search_threads": 1, "encoder_threads": 1, **settings})
    catalog = Catalog(directory, serve)
    engine = Engine(catalog, serve, Metrics(), threads=1)
    try:
        catalog.refresh()
        assert not catalog.problem(), catalog.problem()
        yield engine
    finally:
        engine.close()
        catalog.close()


def ask(
    engine: Engine, query: Query | NDArray[Any], k: int = 5, name: str | None = None, **settings: Any
) -> BatchAnswer:
    """One batch of questions."""
    if isinstance(query, np.ndarray):
        query = VectorQuery(np.atleast_2d(query).astype(np.float32))
    if "params" in settings:
        settings["params"] = tuple(settings["params"].items())
    wanted = SearchSettings(k=k, **{"timeout_ms": 30_000.0, **settings})
    return asyncio.run(engine.search_batch(name, query, wanted))


def answers(directory: Path, queries: NDArray[Any], k: int = 5, **settings: Any) -> list[list[tuple[Id, float]]]:
    """What serves in `directory` says to each query: (id, distance), the nearest first."""
    with opened(directory) as engine:
        return [[(hit.id, hit.distance) for hit in hits] for hits in ask(engine, queries, k, **settings).results]


def file_hashes(manifest: Manifest) -> dict[str, str]:
    return {file.path: file.sha256 for file in manifest.files()}
