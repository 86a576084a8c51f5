"""Builds one shard of a version, so that many machines can build one index: `build-index --shard i/N --version V`.

Each has a folder of its own, which it alone locks, and writes into no other: what it leaves is a part (see
vecsvc.parts), whole once its last file is there. `publish` makes a version of all of them.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import msgspec

from index_builders.build_manifest import provenance, shard_entries
from index_builders.build_state import Job, State, begun, build_key, read_state, shared_settings, whole
from index_builders.index_shards import index_shards
from index_builders.ingest import ingest
from index_builders.pipeline import prepare
from vecsvc.config import BuildSettings
from vecsvc.errors import ConfigError, VecsvcError, VersionExists
from vecsvc.manifest import FORMAT_VERSION
from vecsvc.parts import PART_FILE, Part, part_folder, read_part, write_part
from vecsvc.storage import delete_file, take_folder
from vecsvc.types import MAX_SHARDS


class PartResult(msgspec.Struct, frozen=True):
    path: str
    part: Part
    resumed: list[str]  # steps that an earlier build had done


def build_shard(
    source: str,
    settings: BuildSettings,
    params: Mapping[str, Any] | None = None,
    *,
    resume: bool = False,
    stream: TextIO | None = None,
) -> PartResult:
    """Build the shard that `settings.shard` names, of a version that all its builders call alike; publishes nothing.

    With `resume`, what an earlier build of this shard left is gone on with; without, it is replaced. Builders of
    other shards are left alone. Raises UserError, StorageError or BackendMissing.
    """
    number, settings = _one_of(settings)
    corpus, folder, encoder_folder, questions = prepare(source, settings, params or {})
    if (folder.path / settings.version).exists():
        raise VersionExists(f"version {settings.version} is published already: choose another --version")
    place = part_folder(folder.path, settings.version, number)
    state_path = place.with_name(f"{place.name}.state")
    key = build_key(corpus, settings, params or {}, encoder_folder, questions)
    held = f"shard {number} of version {settings.version} is being built or published by another process: let it end"
    lease = take_folder(place, held)
    try:
        _refuse_another_split(place, settings)
        state = read_state(state_path, key) if resume else None
        job = Job(
            corpus=corpus,
            settings=settings,
            params=params or {},
            encoder_folder=encoder_folder,
            staging=place,
            state_path=state_path,
            state=state or State(key),
            stream=stream,
            questions=questions,
            only=number,
        )
        if state is None:
            delete_file(place / PART_FILE)  # first, so that there is never a part without its files
        with begun(job, fresh=state is None):
            return _run(job, folder.name, number)
    finally:
        lease.release()


def _refuse_another_split(place: Path, settings: BuildSettings) -> None:
    """A finished shard of another number of shards is somebody's work: it is not replaced without a word."""
    try:
        part = read_part(place)
    except VecsvcError:
        return  # what is damaged is built anew
    if part is not None and part.shards != settings.shards:
        raise VersionExists(
            f"{place} holds shard {part.number} of {part.shards}, and --shard says {settings.shard}: choose another "
            "--version, or delete that folder"
        )


def _one_of(settings: BuildSettings) -> tuple[int, BuildSettings]:
    """The number that `--shard i/N` names, and settings whose number of shards is N."""
    named = re.fullmatch(r"(\d{1,3})/(\d{1,3})", settings.shard)
    number, shards = (int(named[1]), int(named[2])) if named else (0, 0)
    if not number < shards <= MAX_SHARDS:
        raise ConfigError(f"--shard must be i/N with i from 0 to N-1 and N up to {MAX_SHARDS}, got {settings.shard!r}")
    if settings.shards not in (1, shards):
        raise ConfigError(f"--shard {settings.shard} is one of {shards} shards, and --shards says {settings.shards}")
    if not settings.version:
        raise ConfigError("--shard needs --version: it is what the shards of one index have in common")
    if settings.partition != "hash":
        raise ConfigError(
            f"--shard takes --partition hash, got {settings.partition}: where clusters lie, and who has room, only a "
            "build of the whole corpus knows; leave --shard out, or spread the rows by a hash"
        )
    return number, dataclasses.replace(settings, shards=shards)


def _run(job: Job, name: str, number: int) -> PartResult:
    done = _finished(job)
    if done is not None:
        job.resumed.append("everything")
        return PartResult(str(job.staging), done, job.resumed)
    ingested = ingest(job)
    certifier = index_shards(job, ingested)
    part = Part(
        format_version=FORMAT_VERSION,
        name=name,
        version=job.settings.version,
        number=number,
        shards=job.settings.shards,
        settings=shared_settings(job.settings, job.params, job.questions),
        id_type=ingested.id_type,  # type: ignore[arg-type]
        vector_dtype=ingested.dtype,  # type: ignore[arg-type]
        fields=ingested.fields,
        shard=shard_entries(job, ingested)[0],
        encoder=ingested.encoder,
        corpus=ingested.corpus,
        provenance=provenance(job),
        certificate=certifier.certificate(job.settings.recall)[0],
    )
    write_part(job.staging, part)
    return PartResult(str(job.staging), part, job.resumed)


def _finished(job: Job) -> Part | None:
    """What an earlier build left where it had come to its end; otherwise the part goes before its files change."""
    try:
        part = read_part(job.staging)
    except VecsvcError:
        part = None
    if part is not None and whole(job.staging, part.files()):
        return part
    delete_file(job.staging / PART_FILE)
    return None
