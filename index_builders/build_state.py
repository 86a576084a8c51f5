"""How far a build is: written down beside its staging folder after each step, so that one that died can go on."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, TextIO

import msgspec

from index_builders import bulk_encode
from index_builders.corpus import Corpus
from index_builders.given_questions import Questions
from vecsvc.config import BuildSettings
from vecsvc.encoders.folder import encoder_files
from vecsvc.errors import StorageError, UserError, VecsvcError
from vecsvc.manifest import FORMAT_VERSION, CorpusEntry, EncoderEntry, FileEntry, Phase, check_files
from vecsvc.storage import STAGING, STATE, IndexFolder, Lease, delete_file, delete_folder, replace_file
from vecsvc.types import IndexSpec, Metric

# Settings that say where and how an index is built, and not what it becomes.
_HOW: Final = ("out", "version", "threads", "batch_rows", "kernels", "questions")  # by their digest
# What one pod of a distributed build may have otherwise than another: its shard, and where its copies of things lie.
_OWN: Final = ("name", "shard", "encoder", "border_share")


class Ingested(msgspec.Struct):
    """What the first step left: enough to go on without the corpus."""

    sizes: dict[int, int]  # of the shards, by number; a row that lives in two counts in both
    copies: int  # rows that live in two shards
    dim: int
    dtype: str
    files: list[FileEntry]
    corpus: CorpusEntry
    id_type: str
    fields: dict[str, str]
    encoder: EncoderEntry | None


class Indexed(msgspec.Struct):
    spec: IndexSpec
    files: list[FileEntry]


class State(msgspec.Struct):
    key: str  # what is built from what; only the same build may go on
    ingested: Ingested | None = None
    indexed: dict[int, Indexed] = {}
    phases: dict[str, Phase] = {}
    refused: bool = False  # for its recall, when all was done: gc leaves it to be resumed


@dataclass(slots=True)
class Job:
    """One build at work: what it is made of, where it writes, and how far it is."""

    corpus: Corpus
    settings: BuildSettings
    params: Mapping[str, Any]  # of the kind, as given
    encoder_folder: Path | None
    staging: Path
    state_path: Path
    state: State
    stream: TextIO | None  # where progress is shown; None for standard error
    questions: Questions | None = None  # that recall is measured with; None for rows of the corpus
    only: int | None = None  # the shard that is built; None for all of them
    resumed: list[str] = field(default_factory=list)  # steps that an earlier build had done

    @property
    def metric(self) -> Metric:
        return self.settings.metric  # type: ignore[return-value]  # one of the choices, checked by config

    @property
    def threads(self) -> int:
        return self.settings.threads or os.cpu_count() or 1

    @property
    def numbers(self) -> list[int]:
        """The shards that are built."""
        return list(range(self.settings.shards)) if self.only is None else [self.only]

    def shard_folder(self, number: int) -> Path:
        return self.staging / "shards" / f"{number:03d}"

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds what the block takes to the phase `name` of the provenance."""
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        spent = self.state.phases.get(name, Phase(0.0, 0.0))
        self.state.phases[name] = Phase(
            round(spent.wall_s + time.perf_counter() - wall, 3), round(spent.cpu_s + time.process_time() - cpu, 3)
        )

    def save(self) -> None:
        replace_file(self.state_path, msgspec.json.encode(self.state))

    def discard(self) -> None:
        """Leave nothing: what was refused will be built from another corpus, or with other settings."""
        if self.staging.exists():
            delete_folder(self.staging)
        forget(self.state_path)


@contextlib.contextmanager
def begun(job: Job, *, fresh: bool) -> Iterator[None]:
    """Around the steps of a build: a fresh one begins in an empty folder, one that is refused leaves nothing."""
    if fresh:
        empty(job.staging)
        job.save()
    try:
        yield
    except UserError:
        job.discard()
        raise


def build_key(
    corpus: Corpus,
    settings: BuildSettings,
    params: Mapping[str, Any],
    encoder_folder: Path | None,
    questions: Questions | None = None,
) -> str:
    """Two builds with one key make the same index from the same corpus."""
    same = {n: v for n, v in asdict(settings).items() if n not in _HOW}
    encoder = [
        (file.name, file.stat().st_size, file.stat().st_mtime_ns)
        for file in (encoder_files(encoder_folder) if encoder_folder is not None else ())
    ]
    # Parts of other windows would not fit together.
    windows = [bulk_encode.WINDOW_ROWS, bulk_encode.CALL_TEXTS]
    asked = questions.digest if questions is not None else ""
    facts = [FORMAT_VERSION, windows, corpus.identity(), encoder, same, dict(params), asked]
    return hashlib.sha256(msgspec.json.encode(facts, order="deterministic")).hexdigest()


def shared_settings(
    settings: BuildSettings, params: Mapping[str, Any], questions: Questions | None = None
) -> dict[str, Any]:
    """What all parts of one version must have been built with; corpus and encoder are told apart by their hashes."""
    same = {n: v for n, v in asdict(settings).items() if n not in _HOW + _OWN}
    return same | {"params": dict(params), "questions": questions.digest if questions is not None else ""}


def read_state(path: Path, key: str) -> State | None:
    """None where there is none, or one of another build."""
    try:
        state = msgspec.json.decode(path.read_bytes(), type=State)
    except (OSError, msgspec.MsgspecError):
        return None
    return state if state.key == key else None


def forget(state: Path) -> None:
    """The version serves already: where its state cannot be deleted, that is left to gc."""
    with contextlib.suppress(StorageError):
        delete_file(state)


def interrupted(folder: IndexFolder, key: str) -> str | None:
    """The version of a dead build with this key; it may have died as late as before its version served."""
    for path in sorted(folder.path.glob(f"{STATE}*")):
        version = path.name.removeprefix(STATE)
        if path.name.endswith(".tmp") or read_state(path, key) is None:
            continue
        for place, exclusive in ((f"{STAGING}{version}", True), (version, False)):
            lease = Lease.take(folder.path / place, exclusive=exclusive)
            if lease is not None:
                lease.release()
                return version
    return None


def free_version(folder: IndexFolder) -> str:
    """The time, with a number where that is taken."""
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    taken: Callable[[str], bool] = lambda v: (folder.path / v).exists() or (folder.path / f"{STAGING}{v}").exists()  # noqa: E731
    version, number = stamp, 2
    while taken(version):
        version, number = f"{stamp}-{number}", number + 1
    return version


def whole(folder: Path, files: list[FileEntry]) -> bool:
    try:
        check_files(folder, files)
    except VecsvcError:
        return False
    return True


def empty(staging: Path, but: Path | None = None) -> None:
    for path in sorted(staging.iterdir()):
        if path != but:
            delete_folder(path) if path.is_dir() else delete_file(path)
