"""From a corpus to what its shards own: texts encoded, rows spread over the shards, the encoder copied."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import threadpoolctl

from index_builders import bulk_encode
from index_builders.build_state import Ingested, Job, empty, whole
from index_builders.bulk_encode import EncodedTexts, encode_corpus
from index_builders.clusters import Clustering, Spreader, sample_size
from index_builders.corpus import Batch, Corpus
from index_builders.encoder_folder import check_belongs
from index_builders.progress import Phase as Shown
from index_builders.shard_writer import ShardWriter, stored_schema
from vecsvc.encoders.base import CANARY_TEXTS, Encoder
from vecsvc.encoders.folder import encoder_files
from vecsvc.encoders.onnx import open_encoder
from vecsvc.errors import ConfigError
from vecsvc.manifest import CENTROIDS_FILE, Canary, CorpusEntry, EncoderEntry, file_entries
from vecsvc.storage import copy_file, delete_folder, make_folder, write_array
from vecsvc.types import StoredVectors


def ingest(job: Job) -> Ingested:
    """Write vectors, ids, rows and fields of every shard, unless an earlier build had written them."""
    done = job.state.ingested
    encoded_folder = job.staging / bulk_encode.FOLDER  # no part of the version
    if done is not None and whole(job.staging, done.files):
        job.resumed.append("ingest")
    else:
        job.state.ingested, job.state.indexed = None, {}
        empty(job.staging, but=encoded_folder)
        with _opened_encoder(job) as encoder:
            encoded = _encode(job, encoder) if encoder is not None and not job.corpus.has_vectors else None
            spreader = _learn_clusters(job, encoded) if job.settings.partition == "cluster" else None
            with job.phase("ingest"):
                done = _write_shards(job, encoder, encoded, spreader)
        job.state.ingested = done
        job.save()
    if encoded_folder.exists():
        delete_folder(encoded_folder)
    return done


def _learn_clusters(job: Job, encoded: EncodedTexts | None) -> Spreader:
    """Where the shards are, from a first pass over the vectors; written into the version for who asks them."""
    settings, rows = job.settings, job.corpus.rows
    if rows < settings.shards:
        raise ConfigError(f"{rows} rows cannot fill {settings.shards} shards: use fewer --shards")
    with job.phase("cluster"):
        dim = job.corpus.dim or (encoded.dim if encoded is not None else 0)
        rng = np.random.default_rng(settings.seed)
        wanted = np.sort(rng.choice(rows, size=min(rows, sample_size(settings.shards, dim)), replace=False))
        sample = np.empty((len(wanted), dim), dtype=np.float32)
        with Shown("sampling", rows, job.stream) as shown:
            for first_row, vectors in _vectors_of(job, encoded):
                mine = slice(*np.searchsorted(wanted, (first_row, first_row + len(vectors))))
                sample[mine] = vectors[wanted[mine] - first_row]
                shown(len(vectors))
        with threadpoolctl.threadpool_limits(limits=job.threads):
            clustering = Clustering(
                sample, settings.shards, job.metric, border_share=settings.border_share, seed=settings.seed
            )
        write_array(job.staging / CENTROIDS_FILE, clustering.centroids(dim))
    return Spreader(clustering, rows, settings.border_share)


def _vectors_of(job: Job, encoded: EncodedTexts | None) -> Iterator[tuple[int, StoredVectors]]:
    """Every vector of the corpus once, in order: (first row, vectors (n, dim))."""
    if encoded is not None:
        for start in range(0, encoded.rows, bulk_encode.WINDOW_ROWS):
            yield start, encoded.of(start, min(bulk_encode.WINDOW_ROWS, encoded.rows - start))
        return
    for batch in job.corpus.read_batches(job.settings.batch_rows):
        assert batch.vectors is not None
        yield batch.first_row, batch.vectors


def _write_shards(
    job: Job, encoder: Encoder | None, encoded: EncodedTexts | None, spreader: Spreader | None
) -> Ingested:
    corpus = job.corpus
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(ShardWriter(job.shard_folder(number), corpus)) for number in job.numbers]
        done = 0
        with Shown("reading", corpus.rows, job.stream) as shown:
            for batch in _batches(job, checked=encoded is not None, progress=shown):
                n = len(batch.hashes)
                if not n:
                    continue  # none of these rows is ours
                vectors = batch.vectors if encoded is None else encoded.of(done, n)
                _spread(writers, batch, vectors, spreader)
                done += n
        for writer in writers:
            writer.finish()
    # Arrow keeps what it read with for the next read, which does not come.
    pa.default_memory_pool().release_unused()
    sizes = [writer.size for writer in writers]
    if min(sizes) == 0:
        some = f"{sizes.count(0)} of {len(sizes)} shards" if job.only is None else f"shard {job.only}"
        raise ConfigError(f"{corpus.rows} rows leave {some} empty: use fewer --shards")
    entry = _write_encoder(job, encoder)
    encoded_folder = job.staging / bulk_encode.FOLDER
    files = [path for path in job.staging.rglob("*") if path.is_file() and path.parent != encoded_folder]
    return Ingested(
        sizes=dict(zip(job.numbers, sizes, strict=True)),
        copies=spreader.copies if spreader is not None else 0,
        dim=writers[0].dim,
        dtype=writers[0].dtype,
        files=file_entries(job.staging, files),
        corpus=CorpusEntry(corpus.path, corpus.rows, corpus.columns, corpus.sha256()),
        id_type=corpus.id_type,
        fields={field.name: str(field.type) for field in stored_schema(corpus)},
        encoder=entry,
    )


def _batches(job: Job, *, checked: bool, progress: Callable[[int], None] = lambda rows: None) -> Iterator[Batch]:
    """The rows of the shards that are built, in the order of the corpus; every row is read and looked at."""
    for batch in job.corpus.read_batches(job.settings.batch_rows, checked=checked):
        mine = batch
        if job.only is not None:
            mine = batch.only(np.flatnonzero(batch.hashes % np.uint64(job.settings.shards) == job.only))
        yield mine
        progress(len(batch.hashes))


def _spread(writers: list[ShardWriter], batch: Batch, vectors: Any, spreader: Spreader | None) -> None:
    rows = batch.corpus_rows()
    if len(writers) == 1:
        writers[0].write(rows, batch.hashes, vectors, batch.ids, batch.fields)
        return
    if spreader is None:
        first = second = (batch.hashes % np.uint64(len(writers))).astype(np.int64)
    else:
        first, second = spreader.spread(vectors)
    for number, writer in enumerate(writers):
        mine = np.flatnonzero((first == number) | (second == number))
        if len(mine):
            fields = batch.fields.take(pa.array(mine)) if batch.fields is not None else None
            writer.write(rows[mine], batch.hashes[mine], vectors[mine], batch.ids.take(pa.array(mine)), fields)


# ------------------------------------------------------------------------------------------------ encoder


@contextlib.contextmanager
def _opened_encoder(job: Job) -> Iterator[Encoder | None]:
    """The encoder of the build, fit for the corpus; None where it has none."""
    folder = job.encoder_folder
    if folder is None:
        yield None
        return
    encoder = open_encoder(folder, name=folder.resolve().name, num_threads=bulk_encode.run_threads(job.threads))
    try:
        check_belongs(encoder, folder)
        _check_dim(encoder, folder, job.corpus)
        yield encoder
    finally:
        encoder.close()


def _check_dim(encoder: Encoder, folder: Path, corpus: Corpus) -> None:
    dim = encoder.spec.dim
    if corpus.dim is not None and dim != corpus.dim:
        raise ConfigError(
            f"encoder {folder} gives dim {dim}, the corpus' vectors have {corpus.dim}: name the encoder that made them"
        )


def _encode(job: Job, encoder: Encoder) -> EncodedTexts:
    """The vectors of all texts; those that an earlier build made are not made again."""
    with job.phase("encode"):
        encoded, rows = EncodedTexts(job.staging, encoder.spec.dim), job.corpus.rows
        if job.only is not None:
            rows = -(-rows // job.settings.shards)  # about: only reading the corpus would tell
        if encoded.rows:
            job.resumed.append(f"encoding of {encoded.rows:,} of {rows:,} texts")
        if encoded.rows < rows or job.only is not None:
            # Whoever encoded a part had looked at every row before.
            batches = _batches(job, checked=encoded.rows > 0)
            with Shown("encoding", rows, job.stream, unit="texts", before=encoded.rows) as shown:
                encode_corpus(encoder, batches, encoded, metric=job.metric, threads=job.threads, progress=shown)
    return encoded


def _write_encoder(job: Job, encoder: Encoder | None) -> EncoderEntry | None:
    """The encoder goes into the version: text in, answer out needs no second artifact."""
    if encoder is None or job.encoder_folder is None:
        return None
    source, target = job.encoder_folder, job.staging / "encoder"
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
        files=file_entries(job.staging, paths),
    )
