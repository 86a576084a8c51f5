"""What an artifact holds: manifest.json written, read and checked. Every file is hashed before it is loaded.

The manifest ends in its own digest, so that one flipped bit anywhere in a version, the manifest included,
is refused by the name of the file it sits in.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Literal

import msgspec

from vecsvc.errors import MEND_VERSION, ArtifactDamaged, ArtifactUnfit
from vecsvc.seal import MAX_MANIFEST_BYTES, sealed, unsealed
from vecsvc.storage import MANIFEST, sha256, write_file
from vecsvc.types import MAX_DIM, MAX_SHARDS, IndexSpec, Metric

# Rises when what was built before cannot be read any more. Within a format, fields are only added, each with a default,
# so that every manifest of the format is read; tests/golden holds one of each. A field that is newer than the reader
# is refused, for it may matter.
FORMAT_VERSION: Final = 1

VECTORS_FILE: Final = "vectors.npy"  # (size, dim) float32 or float16, as the corpus gave them
INDEX_FOLDER: Final = "index"  # what the kind wrote
CENTROIDS_FILE: Final = "centroids.npy"  # (shards, dim + 1) float32, see ranking.nearest_shards

_PATH: Final = re.compile(r"centroids\.npy|(shards/\d{3,4}|encoder)(/[A-Za-z0-9][A-Za-z0-9._-]{0,100}){1,2}")


class FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    path: str  # inside the version's folder
    size_bytes: int
    sha256: str


class ShardEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    size: int
    spec: IndexSpec
    files: list[FileEntry]


class Canary(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    text: str
    vector: list[float]  # what the encoder of the build made of it


class EncoderEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    fingerprint: str
    dim: int
    pooling: str
    normalize: bool
    max_tokens: int
    prompts: dict[str, str]
    canaries: list[Canary]
    files: list[FileEntry]  # the encoder itself, in encoder/


class CorpusEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    path: str
    rows: int
    columns: dict[str, str]  # name -> Arrow type, of every column the corpus has
    sha256: str  # of the file, or of the lines `<sha256>  <name>` where it is several


class Phase(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    wall_s: float
    cpu_s: float


class Provenance(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    python: str
    libraries: dict[str, str]
    cpu: str
    cpu_features: list[str]
    seed: int
    threads: int
    phases: dict[str, Phase]
    peak_rss_bytes: int


class OperatingPoint(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    params: dict[str, Any]
    recall: float
    recall_error: float  # half the width of the 95 % interval
    latency_ms: float  # median of single queries, one thread, on the building machine
    visited: float  # mean; -1 where the library does not tell


class Certificate(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    k: int
    queries: int
    method: str
    target: float
    reached: bool
    points: list[OperatingPoint]


class ProbePoint(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is found where each query asks its nearest shards only, at the default search settings."""

    shards: int
    recall: float
    recall_error: float  # half the width of the 95 % interval


class Clusters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How rows were spread by nearness."""

    file: FileEntry  # centroids.npy
    copies: int  # rows that live in a second shard too, so the shards' sizes add up to more than the index's
    probes: list[ProbePoint]  # the fewest shards first; empty without a certificate


class BytesPerVector(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a vector takes on disk, over all shards; the encoder belongs to none."""

    index: float  # the kind's files: what a search walks
    vectors: float  # vectors.npy
    rest: float  # ids, rows, stored fields


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    format_version: int
    name: str
    version: str
    created: str  # UTC, ISO 8601; versions are ordered by it
    spec: IndexSpec  # of the whole index: its size counts different rows, its params are those of the first shard
    search: dict[str, Any]  # search settings for requests that name none
    partition: Literal["hash", "cluster"]
    id_type: Literal["int", "str"]
    vector_dtype: Literal["float32", "float16"]
    fields: dict[str, str]  # stored fields: name -> Arrow type
    shards: list[ShardEntry]
    encoder: EncoderEntry | None
    corpus: CorpusEntry
    provenance: Provenance
    certificate: Certificate | None
    bytes_per_vector: BytesPerVector | None = None  # read_manifest works it out where a build did not say it yet
    clusters: Clusters | None = None  # where the partition is `cluster`

    def files(self) -> list[FileEntry]:
        return self.files_of(range(len(self.shards)))

    def files_of(self, shards: Iterable[int]) -> list[FileEntry]:
        """The files that whoever opens these shards needs."""
        return [file for number in shards for file in self.shards[number].files] + self.shared_files()

    def shared_files(self) -> list[FileEntry]:
        """What belongs to no shard, and whoever opens one of them needs too."""
        return (self.encoder.files if self.encoder else []) + ([self.clusters.file] if self.clusters else [])

    @property
    def metric(self) -> Metric:
        return self.spec.metric


def shards_here(folder: Path, manifest: Manifest) -> list[int]:
    """The shards whose files are in a version's folder: all, unless only some were pulled; what is damaged is here."""
    numbers = list(range(len(manifest.shards)))
    return [number for number in numbers if (folder / f"shards/{number:03d}").exists()] or numbers


def bytes_per_vector(shards: Sequence[ShardEntry], size: int) -> BytesPerVector:
    """Of an index of `size` different rows."""
    total = {"index": 0, "vectors": 0, "rest": 0}
    for shard in shards:
        for file in shard.files:
            inside = file.path.split("/", 2)[-1]
            part = "index" if inside.startswith(f"{INDEX_FOLDER}/") else "vectors" if inside == VECTORS_FILE else "rest"
            total[part] += file.size_bytes
    return BytesPerVector(**{part: round(size_bytes / size, 1) for part, size_bytes in total.items()})


def write_manifest(folder: Path, manifest: Manifest) -> None:
    write_file(folder / MANIFEST, encoded_manifest(manifest))


def encoded_manifest(manifest: Manifest) -> bytes:
    return sealed(msgspec.json.format(msgspec.json.encode(manifest), indent=2))


def read_manifest(folder: Path) -> Manifest:
    """Raises ArtifactDamaged or ArtifactUnfit, naming the file and what is wrong with it."""
    path = folder / MANIFEST
    if not path.is_file():  # anything else, a pipe say, might be read forever
        raise ArtifactDamaged(f"{path}: missing")
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise ArtifactDamaged(f"{path}: larger than {MAX_MANIFEST_BYTES} bytes")
        data = path.read_bytes()
    except OSError as error:
        raise ArtifactDamaged(f"{path}: {error.strerror}") from error
    return parse_manifest(data, path)


def parse_manifest(data: bytes, path: Path | str) -> Manifest:
    """What read_manifest says of the bytes of a file; `path` is its name in messages."""
    document = unsealed(data)
    if document is None:
        raise ArtifactDamaged(f"{path}: is not what was written (its own digest differs)")
    try:
        version = msgspec.json.decode(document, type=_Version).format_version
        if version != FORMAT_VERSION:
            raise ArtifactUnfit(
                f"{path}: has format {version}, this vecsvc reads {FORMAT_VERSION}: build the index again"
            )
        manifest = msgspec.json.decode(document, type=Manifest)
    except msgspec.MsgspecError as error:
        raise ArtifactUnfit(f"{path}: {error}") from error
    _check_sense(path, manifest)
    if manifest.bytes_per_vector is None:
        manifest = msgspec.structs.replace(
            manifest, bytes_per_vector=bytes_per_vector(manifest.shards, manifest.spec.size)
        )
    return manifest


class _Version(msgspec.Struct):
    format_version: int


def _check_sense(path: Path | str, manifest: Manifest) -> None:
    for file in manifest.files():
        if not _PATH.fullmatch(file.path) or ".." in file.path:
            raise ArtifactDamaged(f"{path}: {file.path[:120]!r} is no path inside an artifact")
    if not 1 <= manifest.spec.dim <= MAX_DIM:
        raise ArtifactDamaged(f"{path}: dim is {manifest.spec.dim}, expected 1 to {MAX_DIM}")
    clusters, size = manifest.clusters, manifest.spec.size
    if (clusters is None) != (manifest.partition == "hash"):
        raise ArtifactDamaged(f"{path}: the partition is {manifest.partition}, and clusters are {clusters}")
    if clusters is not None and (clusters.file.path != CENTROIDS_FILE or not 0 <= clusters.copies <= size):
        raise ArtifactDamaged(f"{path}: {clusters.file.path!r} with {clusters.copies} copies are no clusters")
    if not 1 <= len(manifest.shards) <= MAX_SHARDS:
        raise ArtifactDamaged(f"{path}: there are {len(manifest.shards)} shards, expected 1 to {MAX_SHARDS}")
    if sum(shard.size for shard in manifest.shards) != size + (clusters.copies if clusters else 0):
        raise ArtifactDamaged(f"{path}: the shards' sizes do not add up to {size}")
    for number, shard in enumerate(manifest.shards):
        if not all(file.path.startswith(f"shards/{number:03d}/") for file in shard.files):
            raise ArtifactDamaged(f"{path}: files of another shard stand under shard {number}")
        # Some kinds work out params from the number of vectors, so those may differ.
        same = replace(manifest.spec, size=shard.size, params=shard.spec.params)
        if shard.size < 1 or shard.spec != same:
            raise ArtifactDamaged(f"{path}: shard {number} is of {shard.spec}, the index of {manifest.spec}")


def file_entries(folder: Path, paths: Iterable[Path]) -> list[FileEntry]:
    ordered = sorted(paths)
    with ThreadPoolExecutor(max_workers=_hash_threads()) as pool:
        digests = list(pool.map(sha256, ordered))
    return [
        FileEntry(path=p.relative_to(folder).as_posix(), size_bytes=p.stat().st_size, sha256=digest)
        for p, digest in zip(ordered, digests, strict=True)
    ]


def check_whole(folder: Path) -> None:
    """Refuse a version whose manifest, or the size of a file that is here, shows that it is damaged."""
    check_sizes_here(folder, read_manifest(folder))


def check_sizes_here(folder: Path, manifest: Manifest) -> None:
    check_files(folder, manifest.files_of(shards_here(folder, manifest)), hashes=False)


def check_files(folder: Path, entries: Sequence[FileEntry], *, hashes: bool = True, remedy: str = MEND_VERSION) -> None:
    """Refuse the first file, in manifest order, that is not what was written. Sizes are always checked.

    Run this before any native library sees a file: hnswlib, faiss and onnxruntime crash or answer
    wrongly on damaged ones.
    """
    for entry in entries:
        path = folder / entry.path
        if path.is_symlink():
            raise ArtifactDamaged(f"{path}: is a symbolic link, which may point elsewhere tomorrow", remedy=remedy)
        if not path.is_file():
            raise ArtifactDamaged(f"{path}: missing", remedy=remedy)
        if path.stat().st_size != entry.size_bytes:
            raise ArtifactDamaged(
                f"{path}: has {path.stat().st_size} bytes, the manifest says {entry.size_bytes}", remedy=remedy
            )
    if not hashes:
        return
    with ThreadPoolExecutor(max_workers=_hash_threads()) as pool:
        for entry, digest in zip(entries, pool.map(lambda e: _digest(folder / e.path), entries), strict=True):
            if digest != entry.sha256:
                raise ArtifactDamaged(
                    f"{folder / entry.path}: sha256 is {digest[:16]}…, the manifest says {entry.sha256[:16]}…",
                    remedy=remedy,
                )


def _digest(path: Path) -> str:
    try:
        return sha256(path)
    except OSError as error:
        raise ArtifactDamaged(f"{path}: cannot be read: {error.strerror or error}") from error


def _hash_threads() -> int:
    return min(8, os.cpu_count() or 1)


def library_versions(names: Iterable[str]) -> dict[str, str]:
    return {name: version for name in names if (version := _version(name))}


@functools.cache
def _version(name: str) -> str:
    """Of an installed package; "" where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def cpu_description() -> tuple[str, list[str]]:
    """The processor's name and flags, where the system tells them."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine(), []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = [f for f in facts.get("flags", "").split() if f.startswith(("sse4", "avx", "fma", "f16c", "amx"))]
    return facts.get("model name", platform.machine()), flags
