"""From a corpus to a published version: ingest, index, certify, write the manifest, publish.

Everything happens in a staging folder that nobody serves. How far it is stands in a state file beside it, which
is replaced after each step: a build that died goes on after its last whole step, or is swept away.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import resource
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, TextIO

import msgspec
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from index_builders import base, bulk_encode
from index_builders.bulk_encode import EncodedTexts, encode_corpus
from index_builders.certify import Certifier
from index_builders.corpus import Batch, Corpus, open_corpus
from index_builders.progress import Phase as Shown
from index_builders.shard_writer import ShardWriter, stored_schema
from vecsvc.config import BuildSettings
from vecsvc.encoders import default_encoder, encoder_path
from vecsvc.encoders.base import CANARY_TEXTS, Encoder
from vecsvc.encoders.folder import encoder_files
from vecsvc.encoders.onnx import open_encoder
from vecsvc.errors import (
    ArtifactError,
    ConfigError,
    CorpusError,
    RecallMissed,
    StorageError,
    UserError,
    VecsvcError,
    VersionExists,
)
from vecsvc.manifest import (
    FORMAT_VERSION,
    INDEX_FOLDER,
    VECTORS_FILE,
    Canary,
    CorpusEntry,
    EncoderEntry,
    FileEntry,
    Manifest,
    Phase,
    Provenance,
    ShardEntry,
    bytes_per_vector,
    check_files,
    cpu_description,
    file_entries,
    library_versions,
    read_manifest,
    write_manifest,
)
from vecsvc.storage import (
    MANIFEST,
    STAGING,
    STATE,
    IndexFolder,
    Lease,
    check_name,
    check_version,
    copy_file,
    delete_file,
    delete_folder,
    make_folder,
    open_array,
    replace_file,
)
from vecsvc.types import MAX_DIM, IndexSpec, Metric

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


class _Ingested(msgspec.Struct):
    """What the first step left: enough to go on without the corpus."""

    sizes: list[int]
    dim: int
    dtype: str
    files: list[FileEntry]
    corpus: CorpusEntry
    id_type: str
    fields: dict[str, str]
    encoder: EncoderEntry | None


class _Indexed(msgspec.Struct):
    spec: IndexSpec
    files: list[FileEntry]


class _State(msgspec.Struct):
    key: str  # what is built from what; only the same build may go on
    ingested: _Ingested | None = None
    indexed: dict[int, _Indexed] = {}
    phases: dict[str, Phase] = {}


class BuildResult(msgspec.Struct, frozen=True):
    path: str
    manifest: Manifest
    resumed: list[str]  # steps that an earlier build had done


def build_index(
    source: str,
    settings: BuildSettings,
    params: Mapping[str, Any] | None = None,
    *,
    resume: bool = False,
    require_recall: bool = False,
    stream: TextIO | None = None,
) -> BuildResult:
    """Build an index of the corpus at `source` and publish it; what served before serves until the last step.

    With `resume`, an interrupted build of the same corpus with the same settings goes on after its last whole
    step; without, what it left is deleted. With `require_recall`, an index whose certificate misses the target is left
    unpublished, to be resumed. Raises UserError, StorageError, BackendMissing or RecallMissed.
    """
    corpus = open_corpus(
        source,
        id_column=settings.id_column,
        vector_column=settings.vector_column,
        text_column=settings.text_column,
        fields=settings.fields,
        metric=_metric(settings),
    )
    folder = IndexFolder(Path(settings.out) / _name(source, settings))
    if settings.version:
        check_version(settings.version)
    encoder_folder = _encoder_folder(corpus, settings)
    if require_recall and not settings.certificate_queries:
        raise ConfigError("--require-recall needs a certificate: let --certificate-queries be more than 0")
    # What the index step would refuse is refused now, and not after hours of encoding.
    base.build_params(*base.choose(settings.kind, corpus.rows, corpus.dim or MAX_DIM, params or {}))
    make_folder(folder.path)
    key = _key(corpus, settings, params or {}, encoder_folder)
    if not resume:
        folder.sweep()
    version = settings.version or (resume and _interrupted(folder, key)) or _free_version(folder)
    if (folder.path / version).exists():
        if resume and _read_state(folder.path / f"{STATE}{version}", key) is not None:
            return _serve_published(folder, version)
        raise VersionExists(
            f"{folder.path / version} exists, and a version is never written twice: choose another --version"
        )
    build = _Build(folder, version, key, corpus, encoder_folder, settings, params or {}, stream)
    try:
        return build.run(require_recall)
    except UserError:
        build.discard()
        raise
    finally:
        build.close()


class _Build:
    """One build: its staging folder, its state, and the steps in their order."""

    def __init__(
        self,
        folder: IndexFolder,
        version: str,
        key: str,
        corpus: Corpus,
        encoder_folder: Path | None,
        settings: BuildSettings,
        params: Mapping[str, Any],
        stream: TextIO | None,
    ) -> None:
        self.folder, self.version, self.corpus, self.settings, self.params = folder, version, corpus, settings, params
        self.encoder_folder, self.stream = encoder_folder, stream
        self.threads = settings.threads or os.cpu_count() or 1
        self.staging = folder.path / f"{STAGING}{version}"
        self.resumed: list[str] = []
        self._state_path = folder.path / f"{STATE}{version}"
        self._encoded = self.staging / bulk_encode.FOLDER  # no part of the version
        self._encoder: Encoder | None = None
        lease = None
        while lease is None:
            make_folder(self.staging)
            lease = Lease.take(self.staging, exclusive=True)
            # Between the two another build may have swept it away, as one that nobody holds.
            if lease is None and self.staging.exists():
                raise VersionExists(f"version {version} is being built by another process: choose another --version")
        self._lease = lease
        try:
            state = _read_state(self._state_path, key)
            self.state = state or _State(key)
            if state is None:
                _empty(self.staging)
                self._save()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self._encoder is not None:
            self._encoder.close()
        self._lease.release()

    def discard(self) -> None:
        """Leave nothing: what was refused will be built from another corpus, or with other settings."""
        if self.staging.exists():
            delete_folder(self.staging)
        _forget(self._state_path)

    def run(self, require_recall: bool) -> BuildResult:
        manifest = self._finished()
        if manifest is None:
            ingested = self._ingest()
            if self._encoded.exists():
                delete_folder(self._encoded)
            manifest = self._manifest(ingested, self._index(ingested))
            write_manifest(self.staging, manifest)
        if require_recall:
            _check_recall(manifest)
        self.folder.publish(self.staging, self.version)
        # Whoever serves may open it from now on, and gc may not delete it before CURRENT names it.
        self._lease.share()
        self.folder.serve(self.version)
        _forget(self._state_path)
        return BuildResult(str(self.folder.path / self.version), manifest, self.resumed)

    def _finished(self) -> Manifest | None:
        """What an earlier build left that died between its manifest and publishing; None where none is whole."""
        if not (self.staging / MANIFEST).exists():
            return None
        try:
            manifest = read_manifest(self.staging)
            check_files(self.staging, manifest.files())
        except VecsvcError:
            delete_file(self.staging / MANIFEST)
            return None
        self.resumed.append("everything but publishing")
        return manifest

    # --------------------------------------------------------------------------------------------- ingest

    def _ingest(self) -> _Ingested:
        done = self.state.ingested
        if done is not None and _whole(self.staging, done.files):
            self.resumed.append("ingest")
            return done
        self.state.ingested, self.state.indexed = None, {}
        _empty(self.staging, but=self._encoded)
        encoder = self._open_encoder()
        encoded = self._encode(encoder) if encoder is not None and not self.corpus.has_vectors else None
        with self._phase("ingest"):
            folders = [self.staging / "shards" / f"{n:03d}" for n in range(self.settings.shards)]
            with contextlib.ExitStack() as stack:
                writers = [stack.enter_context(ShardWriter(folder, self.corpus)) for folder in folders]
                with Shown("reading", self.corpus.rows, self.stream) as shown:
                    for batch in self.corpus.read_batches(self.settings.batch_rows, checked=encoded is not None):
                        n = len(batch.hashes)
                        vectors = batch.vectors if encoded is None else encoded.of(batch.first_row, n)
                        self._write(writers, batch, vectors)
                        shown(n)
                for writer in writers:
                    writer.finish()
            # Arrow keeps what it read with for the next read, which does not come.
            pa.default_memory_pool().release_unused()
            sizes = [writer.size for writer in writers]
            if min(sizes) == 0:
                raise ConfigError(
                    f"{self.corpus.rows} rows leave {sizes.count(0)} of {len(sizes)} shards empty: use fewer --shards"
                )
            entry = self._write_encoder(encoder)
            files = [path for path in self.staging.rglob("*") if path.is_file() and path.parent != self._encoded]
            ingested = _Ingested(
                sizes=sizes,
                dim=writers[0].dim,
                dtype=writers[0].dtype,
                files=file_entries(self.staging, files),
                corpus=CorpusEntry(self.corpus.path, sum(sizes), self.corpus.columns, self.corpus.sha256()),
                id_type=self.corpus.id_type,
                fields={field.name: str(field.type) for field in stored_schema(self.corpus)},
                encoder=entry,
            )
        self.state.ingested = ingested
        self._save()
        return ingested

    def _write(self, writers: list[ShardWriter], batch: Batch, vectors: Any) -> None:
        rows = np.arange(batch.first_row, batch.first_row + len(batch.hashes), dtype=np.int64)
        if len(writers) == 1:
            writers[0].write(rows, batch.hashes, vectors, batch.ids, batch.fields)
            return
        shard_of = batch.hashes % np.uint64(len(writers))
        for number, writer in enumerate(writers):
            mine = np.flatnonzero(shard_of == number)
            if len(mine):
                fields = batch.fields.take(pa.array(mine)) if batch.fields is not None else None
                writer.write(rows[mine], batch.hashes[mine], vectors[mine], batch.ids.take(pa.array(mine)), fields)

    def _encode(self, encoder: Encoder) -> EncodedTexts:
        """The vectors of all texts; those that an earlier build made are not made again."""
        with self._phase("encode"):
            encoded, rows = EncodedTexts(self.staging, encoder.spec.dim), self.corpus.rows
            if encoded.rows:
                self.resumed.append(f"encoding of {encoded.rows:,} of {rows:,} texts")
            if encoded.rows < rows:
                # Whoever encoded a part had looked at every row before.
                batches = self.corpus.read_batches(self.settings.batch_rows, checked=encoded.rows > 0)
                with Shown("encoding", rows, self.stream, unit="texts", before=encoded.rows) as shown:
                    encode_corpus(
                        encoder, batches, encoded, metric=_metric(self.settings), threads=self.threads, progress=shown
                    )
        return encoded

    def _open_encoder(self) -> Encoder | None:
        if self.encoder_folder is not None and self._encoder is None:
            folder = self.encoder_folder
            threads = bulk_encode.run_threads(self.threads)
            self._encoder = open_encoder(folder, name=folder.resolve().name, num_threads=threads)
            dim = self._encoder.spec.dim
            if self.corpus.dim is not None and dim != self.corpus.dim:
                raise ConfigError(
                    f"encoder {folder} gives dim {dim}, the corpus' vectors have {self.corpus.dim}: "
                    "name the encoder that made them"
                )
        return self._encoder

    def _write_encoder(self, encoder: Encoder | None) -> EncoderEntry | None:
        """The encoder goes into the version: text in, answer out needs no second artifact."""
        if encoder is None or self.encoder_folder is None:
            return None
        source, target = self.encoder_folder, self.staging / "encoder"
        paths = []
        for file in encoder_files(source):
            copy = target / file.relative_to(source)
            make_folder(copy.parent)
            copy_file(file, copy)
            paths.append(copy)
        spec = encoder.spec
        vectors = encoder.encode(CANARY_TEXTS, "query")
        return EncoderEntry(
            name=spec.name,
            fingerprint=spec.fingerprint,
            dim=spec.dim,
            pooling=spec.pooling,
            normalize=spec.normalize,
            max_tokens=spec.max_tokens,
            prompts=dict(spec.prompts),
            canaries=[Canary(t, v.tolist()) for t, v in zip(CANARY_TEXTS, vectors, strict=True)],
            files=file_entries(self.staging, paths),
        )

    # ---------------------------------------------------------------------------------------------- index

    def _index(self, ingested: _Ingested) -> Certifier:
        metric = _metric(self.settings)
        kind, params = base.choose(self.settings.kind, max(ingested.sizes), ingested.dim, self.params)
        certifier = Certifier(self._vectors(ingested), metric, self.settings.certificate_queries, self.settings.seed)
        for number, size in enumerate(ingested.sizes):
            folder = self.staging / "shards" / f"{number:03d}" / INDEX_FOLDER
            done = self.state.indexed.get(number)
            if done is not None and _whole(self.staging, done.files):
                self.resumed.append(f"index of shard {number}")
                with self._phase("certify"):
                    index = certifier.load(number, folder, done.spec)
                    certifier.measure(number, index, self.threads)
                    index.close()
                continue
            if folder.exists():
                delete_folder(folder)
            make_folder(folder)
            with (
                self._phase("index"),
                Shown(f"indexing {number + 1}/{len(ingested.sizes)}", size, self.stream) as shown,
            ):
                index = base.build(
                    certifier.vectors[number],
                    kind=kind,
                    metric=metric,
                    params=params,
                    num_threads=self.threads,
                    seed=self.settings.seed,
                    progress=shown,
                )
                index.save(folder)
                spec = index.spec
                index.close()
                del index
            files = file_entries(self.staging, [path for path in folder.rglob("*") if path.is_file()])
            with self._phase("certify"):
                # Some libraries do not notice a full disk. What will be served is what is read, so it is measured.
                try:
                    written = certifier.load(number, folder, spec)
                except ArtifactError as error:
                    raise StorageError(
                        f"what was written cannot be read back: {error}; nothing was published"
                    ) from error
                self.state.indexed[number] = _Indexed(spec, files)
                self._save()
                certifier.measure(number, written, self.threads)
                written.close()
        return certifier

    def _vectors(self, ingested: _Ingested) -> list[NDArray[Any]]:
        return [
            open_array(
                self.staging / "shards" / f"{number:03d}" / VECTORS_FILE, np.dtype(ingested.dtype), (size, ingested.dim)
            )
            for number, size in enumerate(ingested.sizes)
        ]

    # ------------------------------------------------------------------------------------------- manifest

    def _manifest(self, ingested: _Ingested, certifier: Certifier) -> Manifest:
        specs = [self.state.indexed[number].spec for number in range(len(ingested.sizes))]
        certificate, search = certifier.certificate(self.settings.recall)
        cpu, features = cpu_description()
        shards = []
        for number, spec in enumerate(specs):
            prefix = f"shards/{number:03d}/"
            files = [f for f in ingested.files if f.path.startswith(prefix)] + self.state.indexed[number].files
            shards.append(ShardEntry(spec.size, spec, files))
        return Manifest(
            format_version=FORMAT_VERSION,
            name=self.folder.name,
            version=self.version,
            created=datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            spec=replace(specs[0], size=sum(ingested.sizes)),
            search=search,
            partition="hash",
            id_type=ingested.id_type,  # type: ignore[arg-type]
            vector_dtype=ingested.dtype,  # type: ignore[arg-type]
            fields=ingested.fields,
            shards=shards,
            encoder=ingested.encoder,
            corpus=ingested.corpus,
            provenance=Provenance(
                python=platform.python_version(),
                libraries=library_versions(_LIBRARIES),
                cpu=cpu,
                cpu_features=features,
                seed=self.settings.seed,
                threads=self.threads,
                phases=self.state.phases,
                peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            ),
            certificate=certificate,
            bytes_per_vector=bytes_per_vector(shards),
        )

    @contextlib.contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        spent = self.state.phases.get(name, Phase(0.0, 0.0))
        self.state.phases[name] = Phase(
            round(spent.wall_s + time.perf_counter() - wall, 3), round(spent.cpu_s + time.process_time() - cpu, 3)
        )

    def _save(self) -> None:
        replace_file(self._state_path, msgspec.json.encode(self.state))


def _encoder_folder(corpus: Corpus, settings: BuildSettings) -> Path | None:
    """Texts need an encoder, and get the default one where none is named; vectors need none."""
    if settings.encoder:
        return encoder_path(settings.encoder)
    if corpus.has_vectors:
        return None
    try:
        return default_encoder()
    except ConfigError as error:
        raise CorpusError(
            f"{corpus.path} has texts and no vectors: name an encoder with --encoder DIR ({error})"
        ) from error


def _check_recall(manifest: Manifest) -> None:
    certificate = manifest.certificate
    if certificate is not None and not certificate.reached:
        best = max(certificate.points, key=lambda point: point.recall - point.recall_error)
        raise RecallMissed(
            f"recall@{certificate.k} is {best.recall:.4f} ± {best.recall_error:.4f} at best, which misses the target "
            f"of {certificate.target}; nothing was published. Try --param values that buy recall, or --kind exact; "
            "--resume without --require-recall publishes it as it is"
        )


def _metric(settings: BuildSettings) -> Metric:
    return settings.metric  # type: ignore[return-value]  # one of the choices, checked by config


def _name(source: str, settings: BuildSettings) -> str:
    if settings.name:
        return check_name(settings.name)
    parts = [part for part in source.rstrip("/").split("/") if not set(part) & set("*?[")]  # a glob's folder
    stem = parts[-1].removesuffix(".parquet") if parts else ""
    try:
        return check_name(stem)
    except ConfigError as error:
        raise ConfigError(f"{error}; give one with --name") from error


def _key(corpus: Corpus, settings: BuildSettings, params: Mapping[str, Any], encoder_folder: Path | None) -> str:
    """Two builds with one key make the same index from the same corpus."""
    same = {n: v for n, v in asdict(settings).items() if n not in ("out", "version", "threads", "batch_rows")}
    encoder = [
        (file.name, file.stat().st_size, file.stat().st_mtime_ns)
        for file in (encoder_files(encoder_folder) if encoder_folder is not None else ())
    ]
    # Parts of other windows would not fit together.
    windows = [bulk_encode.WINDOW_ROWS, bulk_encode.CALL_TEXTS]
    facts = [FORMAT_VERSION, windows, corpus.identity(), encoder, same, dict(params)]
    return hashlib.sha256(msgspec.json.encode(facts, order="deterministic")).hexdigest()


def _serve_published(folder: IndexFolder, version: str) -> BuildResult:
    """The rest of a build that died between publishing its version and its last step."""
    path = folder.path / version
    manifest = read_manifest(path)
    check_files(path, manifest.files())
    folder.serve(version)
    _forget(folder.path / f"{STATE}{version}")
    return BuildResult(str(path), manifest, ["everything but serving"])


def _forget(state: Path) -> None:
    """The version serves already: where its state cannot be deleted, that is left to gc."""
    with contextlib.suppress(StorageError):
        delete_file(state)


def _interrupted(folder: IndexFolder, key: str) -> str | None:
    """The version of a dead build with this key; it may have died as late as before its version served."""
    for path in sorted(folder.path.glob(f"{STATE}*")):
        version = path.name.removeprefix(STATE)
        if path.name.endswith(".tmp") or _read_state(path, key) is None:
            continue
        for place, exclusive in ((f"{STAGING}{version}", True), (version, False)):
            lease = Lease.take(folder.path / place, exclusive=exclusive)
            if lease is not None:
                lease.release()
                return version
    return None


def _read_state(path: Path, key: str) -> _State | None:
    try:
        state = msgspec.json.decode(path.read_bytes(), type=_State)
    except (OSError, msgspec.MsgspecError):
        return None
    return state if state.key == key else None


def _free_version(folder: IndexFolder) -> str:
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    taken: Callable[[str], bool] = lambda v: (folder.path / v).exists() or (folder.path / f"{STAGING}{v}").exists()  # noqa: E731
    version, number = stamp, 2
    while taken(version):
        version, number = f"{stamp}-{number}", number + 1
    return version


def _whole(folder: Path, files: list[FileEntry]) -> bool:
    try:
        check_files(folder, files)
    except VecsvcError:
        return False
    return True


def _empty(staging: Path, but: Path | None = None) -> None:
    for path in sorted(staging.iterdir()):
        if path != but:
            delete_folder(path) if path.is_dir() else delete_file(path)
