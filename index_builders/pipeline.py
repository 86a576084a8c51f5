"""From a corpus to a published version: ingest, index, certify, write the manifest, publish.

Everything happens in a staging folder that nobody serves. How far it is stands in a state file beside it, which
is replaced after each step: a build that died goes on after its last whole step, or is swept away.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import msgspec

from index_builders import base
from index_builders.build_manifest import check_recall, make_manifest
from index_builders.build_state import (
    Job,
    State,
    begun,
    build_key,
    forget,
    free_version,
    interrupted,
    read_state,
)
from index_builders.corpus import Corpus, open_corpus
from index_builders.given_questions import Questions, open_questions
from index_builders.index_shards import index_shards
from index_builders.ingest import ingest
from vecsvc.config import BuildSettings
from vecsvc.encoders import default_encoder, encoder_path
from vecsvc.errors import ConfigError, CorpusError, RecallMissed, VecsvcError, VersionExists
from vecsvc.manifest import Manifest, check_files, read_manifest, write_manifest
from vecsvc.storage import (
    MANIFEST,
    STAGING,
    STATE,
    IndexFolder,
    Lease,
    check_name,
    check_version,
    delete_file,
    make_folder,
    take_folder,
)
from vecsvc.types import MAX_DIM, Metric


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
    step; without, it begins anew, and what builds that died have left is deleted. With `require_recall`, an index whose
    certificate misses the target is left unpublished, to be resumed. Raises UserError, StorageError, BackendMissing or
    RecallMissed.
    """
    if require_recall and not settings.certificate_queries:
        raise ConfigError("--require-recall needs a certificate: let --certificate-queries be more than 0")
    corpus, folder, encoder_folder, questions = prepare(source, settings, params or {})
    key = build_key(corpus, settings, params or {}, encoder_folder, questions)
    if not resume:
        folder.sweep()
    version = settings.version or (resume and interrupted(folder, key)) or free_version(folder)
    state_path = folder.path / f"{STATE}{version}"
    if (folder.path / version).exists():
        if resume and read_state(state_path, key) is not None:
            return _serve_published(folder, version)
        raise VersionExists(
            f"{folder.path / version} exists, and a version is never written twice: choose another --version"
        )
    staging = folder.path / f"{STAGING}{version}"
    lease = take_folder(staging, f"version {version} is being built by another process: choose another --version")
    try:
        state = read_state(state_path, key) if resume else None
        if resume and state is None:
            (stream or sys.stderr).write(
                "nothing to resume: no build of this corpus with these settings was interrupted; this one begins anew\n"
            )
        job = Job(
            corpus=corpus,
            settings=settings,
            params=params or {},
            encoder_folder=encoder_folder,
            staging=staging,
            state_path=state_path,
            state=state or State(key),
            stream=stream,
            questions=questions,
        )
        with begun(job, fresh=state is None):
            return _run(job, folder, version, lease, require_recall)
    finally:
        lease.release()


def prepare(
    source: str, settings: BuildSettings, params: Mapping[str, Any]
) -> tuple[Corpus, IndexFolder, Path | None, Questions | None]:
    """Check all that can be checked before the work begins: the corpus, the folders of index and encoder, questions.

    Raises UserError.
    """
    metric: Metric = settings.metric  # type: ignore[assignment]  # one of the choices, checked by config
    corpus = open_corpus(
        source,
        id_column=settings.id_column,
        vector_column=settings.vector_column,
        text_column=settings.text_column,
        fields=settings.fields,
        metric=metric,
    )
    folder = IndexFolder(Path(settings.out) / _name(source, settings))
    if settings.version:
        check_version(settings.version)
    encoder_folder = _encoder_folder(corpus, settings)
    # What the index step would refuse is refused now, and not after hours of encoding.
    base.build_params(*base.choose(settings.kind, corpus.rows, corpus.dim or MAX_DIM, params))
    questions = None
    if settings.questions:
        if not settings.certificate_queries:
            raise ConfigError(
                "--questions measures recall: let --certificate-queries be more than 0, or leave --questions out"
            )
        questions = open_questions(
            settings.questions,
            metric=metric,
            dim=corpus.dim,
            n=settings.certificate_queries,
            seed=settings.seed,
            encoder_folder=encoder_folder,
            num_threads=settings.threads or os.cpu_count() or 1,
        )
    make_folder(folder.path)
    return corpus, folder, encoder_folder, questions


def _run(job: Job, folder: IndexFolder, version: str, lease: Lease, require_recall: bool) -> BuildResult:
    manifest = _finished(job)
    if manifest is None:
        ingested = ingest(job)
        manifest = make_manifest(job, folder.name, version, ingested, index_shards(job, ingested))
        write_manifest(job.staging, manifest)
    if require_recall:
        try:
            check_recall(manifest)
        except RecallMissed:
            job.state.refused = True
            job.save()
            raise
    folder.publish(job.staging, version)
    # Whoever serves may open it from now on, and gc may not delete it before CURRENT names it.
    lease.share()
    folder.serve(version)
    forget(job.state_path)
    return BuildResult(str(folder.path / version), manifest, job.resumed)


def _finished(job: Job) -> Manifest | None:
    """What an earlier build left that died between its manifest and publishing; None where none is whole."""
    if not (job.staging / MANIFEST).exists():
        return None
    try:
        manifest = read_manifest(job.staging)
        check_files(job.staging, manifest.files())
    except VecsvcError:
        delete_file(job.staging / MANIFEST)
        return None
    job.resumed.append("everything but publishing")
    return manifest


def _serve_published(folder: IndexFolder, version: str) -> BuildResult:
    """The rest of a build that died between publishing its version and its last step."""
    path = folder.path / version
    manifest = read_manifest(path)
    check_files(path, manifest.files())
    folder.serve(version)
    forget(folder.path / f"{STATE}{version}")
    return BuildResult(str(path), manifest, ["everything but serving"])


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


def _name(source: str, settings: BuildSettings) -> str:
    if settings.name:
        return check_name(settings.name)
    parts = [part for part in source.rstrip("/").split("/") if not set(part) & set("*?[")]  # a glob's folder
    stem = parts[-1].removesuffix(".parquet") if parts else ""
    try:
        return check_name(stem)
    except ConfigError as error:
        raise ConfigError(f"{error}; give one with --name") from error
