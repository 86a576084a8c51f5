"""Builds the index of each shard over its vectors, and measures what was written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from index_builders import base
from index_builders.build_state import Indexed, Ingested, Job, whole
from index_builders.certify import Certifier
from index_builders.progress import Phase as Shown
from vecsvc.errors import ArtifactError, StorageError
from vecsvc.manifest import CENTROIDS_FILE, INDEX_FOLDER, VECTORS_FILE, file_entries
from vecsvc.shard import ROWS_FILE
from vecsvc.storage import delete_folder, make_folder, open_array
from vecsvc.types import IndexSpec, Vectors


def index_shards(job: Job, ingested: Ingested) -> Certifier:
    """Build every shard's index, unless an earlier build had, and measure each while it is in memory."""
    settings = job.settings
    kind, params = base.choose(settings.kind, _typical_size(job, ingested), ingested.dim, job.params)
    certifier = Certifier(
        _vectors(job, ingested),
        _rows(job, ingested),
        job.metric,
        settings.certificate_queries,
        settings.seed,
        centroids=_centroids(job, ingested),
        alone=job.only is None and settings.shards == 1,
        given=job.questions,
    )
    for place, number in enumerate(ingested.sizes):
        folder = job.shard_folder(number) / INDEX_FOLDER
        done = job.state.indexed.get(number)
        if done is not None and whole(job.staging, done.files):
            job.resumed.append(f"index of shard {number}")
            with job.phase("certify"):
                index = certifier.load(place, folder, done.spec)
                certifier.measure(place, index, job.threads)
                index.close()
            continue
        spec = _build(job, certifier.vectors[place], number, kind, params)
        files = file_entries(job.staging, [path for path in folder.rglob("*") if path.is_file()])
        with job.phase("certify"):
            # Some libraries do not notice a full disk. What will be served is what is read, so it is measured.
            try:
                written = certifier.load(place, folder, spec)
            except ArtifactError as error:
                raise StorageError(f"what was written cannot be read back: {error}; nothing was published") from error
            job.state.indexed[number] = Indexed(spec, files)
            job.save()
            certifier.measure(place, written, job.threads)
            written.close()
    return certifier


def _typical_size(job: Job, ingested: Ingested) -> int:
    """What `auto` goes by: who builds one shard knows of the others what the corpus tells, and must choose alike."""
    return max(ingested.sizes.values()) if job.only is None else -(-job.corpus.rows // job.settings.shards)


def _build(job: Job, vectors: NDArray[Any], number: int, kind: str, params: dict[str, Any]) -> IndexSpec:
    folder: Path = job.shard_folder(number) / INDEX_FOLDER
    if folder.exists():
        delete_folder(folder)
    make_folder(folder)
    title = f"indexing {number + 1}/{job.settings.shards}"
    with job.phase("index"), Shown(title, len(vectors), job.stream) as shown:
        index = base.build(
            vectors,
            kind=kind,
            metric=job.metric,
            params=params,
            num_threads=job.threads,
            seed=job.settings.seed,
            progress=shown,
        )
        index.save(folder)
        spec = index.spec
        index.close()
    return spec


def _vectors(job: Job, ingested: Ingested) -> list[NDArray[Any]]:
    return [
        open_array(job.shard_folder(number) / VECTORS_FILE, np.dtype(ingested.dtype), (size, ingested.dim))
        for number, size in ingested.sizes.items()
    ]


def _rows(job: Job, ingested: Ingested) -> list[NDArray[np.int64]]:
    return [
        open_array(job.shard_folder(number) / ROWS_FILE, np.int64, (size,)) for number, size in ingested.sizes.items()
    ]


def _centroids(job: Job, ingested: Ingested) -> Vectors | None:
    path = job.staging / CENTROIDS_FILE
    if not path.exists():
        return None
    return open_array(path, np.float32, (len(ingested.sizes), ingested.dim + 1), mmap=False)
