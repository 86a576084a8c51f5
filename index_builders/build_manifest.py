"""Says what was built: the manifest of a finished staging folder, with its provenance and certificate."""

from __future__ import annotations

import platform
import resource
from dataclasses import replace
from datetime import UTC, datetime
from typing import Final

from index_builders.build_state import Ingested, Job
from index_builders.certify import Certifier
from vecsvc.errors import RecallMissed
from vecsvc.manifest import (
    CENTROIDS_FILE,
    FORMAT_VERSION,
    Clusters,
    Manifest,
    Provenance,
    ShardEntry,
    bytes_per_vector,
    cpu_description,
    library_versions,
)

_LIBRARIES: Final = (
    "vecsvc",
    "numpy",
    "pyarrow",
    "hnswlib",
    "faiss-cpu",
    "faiss-gpu",
    "scikit-learn",
    "tokenizers",
    "onnxruntime",
    "onnxruntime-gpu",
)


def make_manifest(job: Job, name: str, version: str, ingested: Ingested, certifier: Certifier) -> Manifest:
    shards = shard_entries(job, ingested)
    certificate, search = certifier.certificate(job.settings.recall)
    centroids = next((file for file in ingested.files if file.path == CENTROIDS_FILE), None)
    rows = ingested.corpus.rows
    return Manifest(
        format_version=FORMAT_VERSION,
        name=name,
        version=version,
        created=now(),
        spec=replace(shards[0].spec, size=rows),
        search=search,
        partition="hash" if centroids is None else "cluster",
        id_type=ingested.id_type,  # type: ignore[arg-type]
        vector_dtype=ingested.dtype,  # type: ignore[arg-type]
        fields=ingested.fields,
        shards=shards,
        encoder=ingested.encoder,
        corpus=ingested.corpus,
        provenance=provenance(job),
        certificate=certificate,
        bytes_per_vector=bytes_per_vector(shards, rows),
        clusters=None if centroids is None else Clusters(centroids, ingested.copies, certifier.probes(search)),
    )


def shard_entries(job: Job, ingested: Ingested) -> list[ShardEntry]:
    entries = []
    for number in ingested.sizes:
        indexed = job.state.indexed[number]
        files = [file for file in ingested.files if file.path.startswith(f"shards/{number:03d}/")]
        entries.append(ShardEntry(indexed.spec.size, indexed.spec, files + indexed.files))
    return entries


def provenance(job: Job) -> Provenance:
    cpu, features = cpu_description()
    return Provenance(
        python=platform.python_version(),
        libraries=library_versions(_LIBRARIES),
        cpu=cpu,
        cpu_features=features,
        seed=job.settings.seed,
        threads=job.threads,
        phases=job.state.phases,
        peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


def now() -> str:
    """As a manifest says when it was created: UTC, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def check_recall(manifest: Manifest) -> None:
    """Raises RecallMissed where the certificate misses its target."""
    certificate = manifest.certificate
    if certificate is not None and not certificate.reached:
        best = max(certificate.points, key=lambda point: point.recall - point.recall_error)
        raise RecallMissed(
            f"recall@{certificate.k} is {best.recall:.4f} ± {best.recall_error:.4f} at best: its lower end misses "
            f"the target of {certificate.target}; nothing was published. Try --param values that buy recall, or --kind "
            "exact; --resume without --require-recall publishes it as it is"
        )
