"""The versions that serve: opened, verified and warmed aside, swapped in whole, closed when nobody uses them."""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
import pyarrow as pa

from vecsvc import indexes
from vecsvc.config import ServeSettings, shard_numbers
from vecsvc.encoder_pool import EncoderPool, PooledEncoder
from vecsvc.encoders import DEFAULT, encoder_path
from vecsvc.encoders.base import EncoderSpec, check_canaries
from vecsvc.errors import (
    ArtifactDamaged,
    ArtifactUnfit,
    EncoderMismatch,
    NotReady,
    UnknownIndex,
    UnknownModel,
    VecsvcError,
    listed,
)
from vecsvc.manifest import CENTROIDS_FILE, Manifest, check_files, read_manifest, shards_here
from vecsvc.shard import Shard
from vecsvc.storage import MANIFEST, IndexFolder, Lease, index_folders, open_array
from vecsvc.telemetry import Metrics
from vecsvc.types import SearchSettings, ServedIndex, Vectors

log: Final = logging.getLogger("vecsvc.catalog")

S = TypeVar("S")

ENCODER_FOLDER: Final = "encoder"
MAX_PLANS: Final = 512  # settings remembered; past that all are forgotten and learnt anew
SLOW_IN_A_ROW: Final = 3  # so many slow questions are no accident
# At one of so many looks a question that is not much too long for the event loop is tried there. An odd number, for the
# short way and the long one look in turns.
TRIES: Final = 15
MAX_PREVIOUS: Final = 2  # versions before the one that serves, of an index, which front doors may still ask
SLICE: Final = 64  # queries of a batch between two looks at the deadline, however long they take
MAX_SLICE: Final = 1024  # and however quick they are: a slice costs some 150 us beside its searches
SLICE_S: Final = 0.01  # what it takes in between


class Plan:
    """The kind's search settings, and the measured seconds of one question; None until one was measured."""

    __slots__ = ("_asked", "_short", "_slow", "_tried", "params", "plain", "seconds", "slice")

    def __init__(self, params: Any) -> None:
        self.params = params
        self.seconds: float | None = None
        self.slice = SLICE  # queries of a batch between two looks at the deadline
        self.plain: bool | None = None  # see quick.is_plain; None until somebody asked
        self._short = False
        self._slow = 0  # questions in a row that took more than twice what is usual
        self._asked = 0  # since one that was not much too long was tried
        self._tried = False

    def learn(self, seconds: float) -> None:
        """What one question took. One or two that were held up count as twice what is usual, a third in full."""
        known, tried, self._tried = self.seconds, self._tried, False
        if known is None or (tried and seconds < known):
            self.seconds = seconds
            return
        self._slow = self._slow + 1 if seconds > 2.0 * known else 0
        if 0 < self._slow < SLOW_IN_A_ROW:
            seconds = 2.0 * known
        self.seconds = 0.9 * known + 0.1 * seconds

    def learn_slice(self, queries: int, seconds: float) -> None:
        """What so many queries of a batch took together: the next slice takes about SLICE_S, or is SLICE.

        It grows by no more than twice, for one that was quick by chance says little.
        """
        if queries >= SLICE:
            self.slice = max(SLICE, min(int(queries * SLICE_S / max(seconds, 1e-6)), 2 * self.slice, MAX_SLICE))

    def is_short(self, limit_s: float) -> bool:
        """Whether such questions take at most so long; those that did stay short up to twice as long.

        So what lies near the limit does not change its way with every other question. A search takes up to twice as
        long in a thread, which wakes on a cold core and waits for the interpreter: what seems up to twice too long
        there is tried now and then, and one that is not too long without a thread says more than those that were.
        """
        known = self.seconds
        if known is None:
            return False
        self._short = known <= (2.0 * limit_s if self._short else limit_s)
        if self._short or known > 2.0 * limit_s:
            return self._short
        self._asked = (self._asked + 1) % TRIES
        self._tried = self._asked == 0
        return self._tried


class Served:
    """One opened version. It stays open until it is retired and its last user has let go."""

    def __init__(
        self, folder: IndexFolder, version: str, settings: ServeSettings, encoders: EncoderPool | None = None
    ) -> None:
        """Verify and open a version, and answer one query with it. Without a pool its encoder is its own.

        Raises ArtifactDamaged, ArtifactUnfit or EncoderMismatch; nothing stays open then.
        """
        path = folder.path / version
        lease = Lease.take(path, exclusive=False)
        if lease is None:
            raise NotReady(f"{path}: missing, or just being deleted")
        self.name, self.version = folder.name, version
        self.id = ServedIndex(folder.name, version)
        self._lease = lease
        self._users = 0
        self.closed = False
        self._plans: dict[tuple[object, ...], Plan] = {}
        self._retired = False
        self._lock = threading.Lock()
        self.shards: list[Shard] = []  # those that this process opens
        self.asked_at = time.monotonic()  # when a front door last named this version
        self.centroids: Vectors | None = None  # of all shards, see nearest_shards; None where a hash spread the rows
        self.encoder: PooledEncoder | None = None
        self._encoders = encoders if encoders is not None else EncoderPool(settings, Metrics())
        self._encoder_folder = encoder_path(settings.encoder) if settings.encoder else path / ENCODER_FOLDER
        try:
            self.manifest = read_manifest(path)
            self.digest = hashlib.sha256((path / MANIFEST).read_bytes()).hexdigest()
            self.numbers = _chosen(self.manifest, settings.shards, path)
            others = {f"shards/{n:03d}/" for n in range(len(self.manifest.shards)) if n not in self.numbers}
            files = [file for file in self.manifest.files() if not file.path.startswith(tuple(others))]
            here = shards_here(path, self.manifest)
            absent = [n for n in self.numbers if n not in here]
            if absent:
                raise ArtifactDamaged(
                    f"{path}: shards {listed(absent)} are not here",
                    remedy=f"serve what is with --shards {','.join(map(str, here))}, or pull the others",
                )
            check_files(path, files, hashes=settings.verify == "hash")
            self._open(path, settings)
        except BaseException:
            self._close()
            raise

    def _open(self, path: Path, settings: ServeSettings) -> None:
        manifest = self.manifest
        for number in self.numbers:
            self.shards.append(
                Shard(
                    number,
                    path / "shards" / f"{number:03d}",
                    manifest.shards[number],
                    id_type=manifest.id_type,
                    fields=manifest.fields,
                    mmap=settings.memory == "mapped",
                    device=settings.device,
                )
            )
        if manifest.clusters is not None:
            shape = (len(manifest.shards), manifest.spec.dim + 1)
            self.centroids = open_array(path / CENTROIDS_FILE, np.float32, shape, mmap=False)
        try:
            self.params: Any = indexes.search_params(manifest.spec.kind, **manifest.search)
        except VecsvcError as error:
            raise ArtifactUnfit(f"{path / MANIFEST}: search: {error}") from error
        self._open_encoder(path, manifest, settings)
        # The first query pays for page faults and lazy set-up, so it is ours and not a user's.
        for shard in self.shards:
            if shard.size:
                query = np.asarray(shard.vectors[:1], dtype=np.float32)
                if manifest.metric != "cosine" or query.any():
                    shard.search(query, min(10, shard.size), self.params)

    def _open_encoder(self, path: Path, manifest: Manifest, settings: ServeSettings) -> None:
        built, folder = manifest.encoder, self._encoder_folder
        if not settings.encoder:
            if built is None:
                return
            _refuse_unlisted(path, folder, manifest)
        name = folder.name if settings.encoder or built is None else built.name
        self.encoder = self._encoders.take(folder, name)
        spec = self.encoder.spec
        if spec.dim != manifest.spec.dim:
            raise EncoderMismatch(
                f"encoder {spec.name!r} gives dim {spec.dim}, index {manifest.name!r} has dim {manifest.spec.dim}"
            )
        if built is not None:
            found = self.encoder.encode_now([c.text for c in built.canaries])
            expected = np.array([c.vector for c in built.canaries], dtype=np.float32)
            check_canaries(spec.name, found, built.name, expected)

    @property
    def whole(self) -> bool:
        """Whether this process holds every shard of the index."""
        return len(self.shards) == len(self.manifest.shards)

    @property
    def stored(self) -> pa.Schema:
        """The stored fields and their Arrow types."""
        fields = self.shards[0].fields
        return fields.table.schema if fields is not None else pa.schema([])

    def some(self, wanted: Iterable[int]) -> list[Shard]:
        """The shards of these numbers. Raises NotReady where this process does not hold one."""
        held = {shard.number: shard for shard in self.shards}
        try:
            return [held[number] for number in wanted]
        except KeyError as error:
            names = ", ".join(map(str, self.numbers))
            raise NotReady(f"shard {error} of {self.name!r} is not held here, only {names}") from error

    def plan(self, settings: SearchSettings, shards: int | None = None) -> Plan:
        """What these settings mean for this version, and what a question with them costs so many of its shards.

        `shards` is None for all that are held here.

        Raises UnknownParameter or InvalidParameter.
        """
        if settings.conditions:
            return Plan(self._search_params(settings.params))
        # What a question costs depends on these, and not on how long its caller would wait.
        key = (
            settings.params,
            settings.k,
            settings.exact,
            settings.max_visited,
            settings.probe_shards,
            settings.rerank_depth,
            settings.include,
            shards,
        )
        found = self._plans.get(key)
        if found is None:
            found = Plan(self._search_params(settings.params))
            if len(self._plans) >= MAX_PLANS:
                self._plans.clear()
            self._plans[key] = found
        return found

    def _search_params(self, values: tuple[tuple[str, int], ...]) -> Any:
        if not values:
            return self.params
        return indexes.search_params(self.manifest.spec.kind, **{**self.manifest.search, **dict(values)})

    def retain(self) -> bool:
        """Keep it open until `release`; False where it is closed, and then the catalog has it no more."""
        with self._lock:
            if self.closed:
                return False
            self._users += 1
            return True

    def release(self) -> None:
        with self._lock:
            self._users -= 1
            last = self._may_close()
        if last:
            self._close()

    def retire(self) -> None:
        """No new users will come; close with the last one."""
        with self._lock:
            self._retired = True
            idle = self._may_close()
        if idle:
            self._close()

    def _may_close(self) -> bool:
        """True for the one caller that is to close; called with the lock held."""
        if not self._retired or self._users or self.closed:
            return False
        self.closed = True
        return True

    def _close(self) -> None:
        for shard in self.shards:
            shard.close()
        if self.encoder is not None:
            self._encoders.release(self.encoder, self._encoder_folder)
            self.encoder = None
        self._lease.release()


def by_name(name: str | None, serving: Mapping[str, S], problems: Mapping[str, str], problem: Callable[[], str]) -> S:
    """What serves under that name; None means the only one. Raises UnknownIndex, or NotReady with the problem."""
    if name is None:
        if len(serving) == 1:
            [only] = serving.values()
            return only
        if serving:
            names = ", ".join(f"/indexes/{n}/search" for n in sorted(serving))
            raise UnknownIndex(f"several indexes are served, name one: {names}")
        raise NotReady(f"no index is ready: {problem()}")
    if name in serving:
        return serving[name]
    if name in problems:
        raise NotReady(f"index {name!r} is not ready: {problems[name]}")
    raise UnknownIndex(f"no index {name[:80]!r}; served are: {', '.join(sorted(serving)) or 'none'}")


def by_model(
    model: str | None,
    encoders: Mapping[str, EncoderSpec | None],
    problems: Mapping[str, str],
    problem: Callable[[], str],
) -> str:
    """The index whose encoder `model` means; `encoders` are those of all indexes that serve, by their sorted names.

    Raises UnknownModel, or NotReady with the problem.
    """
    if not encoders or (model is not None and model not in encoders and model in problems):
        raise NotReady(f"no encoder is ready: {problem()}")
    having = {name: spec for name, spec in encoders.items() if spec is not None}
    if not having:
        raise UnknownModel("no index that is served has an encoder: build one with --encoder")
    found = [name for name in having if model == name]
    found = found or [name for name, spec in having.items() if model == spec.name]
    if not found and model in (None, DEFAULT):
        found = list(having)
    different = len({having[name].fingerprint for name in found})
    if different == 1:
        return found[0]
    names = ", ".join(dict.fromkeys([*having, *(spec.name for spec in having.values())]))
    if found:
        raise UnknownModel(f"{different} encoders are served, name the index of one: {', '.join(found)}")
    raise UnknownModel(f"no model {(model or '')[:80]!r}; there are: {names}")


def models(
    encoders: Mapping[str, EncoderSpec | None], problems: Mapping[str, str], problem: Callable[[], str]
) -> dict[str, EncoderSpec]:
    """Every name of a model that `by_model` takes, and the encoder that it means: the names of indexes first.

    Raises NotReady, as that does, where nothing serves yet.
    """
    if not encoders:
        raise NotReady(f"no encoder is ready: {problem()}")
    having = {name: spec for name, spec in encoders.items() if spec is not None}
    named = dict(having)
    for spec in having.values():
        if len({one.fingerprint for one in having.values() if one.name == spec.name}) == 1:
            named.setdefault(spec.name, spec)
    if len({spec.fingerprint for spec in having.values()}) == 1:
        named.setdefault(DEFAULT, next(iter(having.values())))
    return {name: spec for name, spec in named.items() if name in having or name not in problems}


def _specs(served: Mapping[str, Served]) -> dict[str, EncoderSpec | None]:
    # Looked at once each: a version that retires meanwhile lets go of its encoder.
    encoders = {name: one.encoder for name, one in sorted(served.items())}
    return {name: encoder.spec if encoder is not None else None for name, encoder in encoders.items()}


def _chosen(manifest: Manifest, wanted: str, path: Path) -> list[int]:
    """The numbers of the shards to open."""
    total = len(manifest.shards)
    chosen = shard_numbers(wanted)
    found = sorted(chosen) if chosen is not None else list(range(total))
    if found[-1] >= total:
        raise ArtifactUnfit(f"{path}: has shards 0 to {total - 1}, --shards asks for {found[-1]}")
    return found


def _refuse_unlisted(path: Path, folder: Path, manifest: Manifest) -> None:
    """An encoder's folder is opened by what lies in it, so nothing may lie there that was not hashed."""
    listed = {entry.path for entry in manifest.files()}
    for file in sorted(folder.rglob("*")):
        if not file.is_dir() and file.relative_to(path).as_posix() not in listed:
            raise ArtifactDamaged(f"{file}: is not in the manifest", remedy="delete it")


class Catalog:
    """Which version of which index serves. One thread refreshes; any number look up."""

    def __init__(self, directory: Path, settings: ServeSettings, metrics: Metrics | None = None) -> None:
        self._directory = directory
        self.encoders = EncoderPool(settings, metrics if metrics is not None else Metrics())
        self._settings = settings
        self._served: dict[str, Served] = {}
        self._previous: dict[str, list[Served]] = {}  # versions before, the newest last, kept for front doors
        self._keep_previous_s = settings.previous_version_s if settings.shard_port is not None else 0.0
        # index -> version that could not be opened, how its files looked, and why
        self._failed: dict[str, tuple[str, int, str]] = {}
        self._refreshing = threading.Lock()
        self.draining = False  # set from outside when the process is to end
        self._looked = False  # whether a refresh has come to its end
        self.problems: dict[str, str] = {"vecsvc": "nothing is loaded yet"}

    def names(self) -> list[str]:
        return sorted(self._served)

    def get(self, name: str | None) -> Served:
        """The version of `name` that serves; None means the only index. Raises UnknownIndex or NotReady."""
        if not self._looked and name not in self._served:
            # Nobody knows yet which indexes there are, and a client would take that for ever.
            which = "no index is ready" if name is None else f"index {name[:80]!r} is not ready"
            raise NotReady(f"{which}: {self.problem()}")
        return by_name(name, self._served, self.problems, self.problem)

    def version(self, name: str, digest: str) -> Served:
        """The version of an index whose manifest has that digest, be it the one that serves or one before.

        Raises NotReady where it is not here.
        """
        current = self._served.get(name)
        for served in ([current] if current is not None else []) + self._previous.get(name, []):
            if served.digest == digest:
                served.asked_at = time.monotonic()
                return served
        raise NotReady(f"index {name[:80]!r} has no version {digest[:12]!r} here")

    def held(self) -> list[tuple[Served, bool]]:
        """Every version that can be asked, and whether it is the one that serves."""
        current = [(served, True) for served in self._served.values()]
        return current + [(served, False) for versions in self._previous.values() for served in versions]

    def let_go(self) -> bool:
        """Close versions before that nobody asked for so long. True where one went."""
        now, went = time.monotonic(), False
        if not self._refreshing.acquire(blocking=False):
            return False  # a refresh is under way, which may take long, and does this when it ends
        try:
            for name, versions in list(self._previous.items()):
                kept = [s for s in versions[-MAX_PREVIOUS:] if now - s.asked_at < self._keep_previous_s]
                self._previous = {**self._previous, name: kept}
                for served in versions:
                    if served not in kept:
                        served.retire()
                        went = True
        finally:
            self._refreshing.release()
        return went

    def with_encoder(self, model: str | None) -> Served:
        """The index whose encoder `model` means; None means the only encoder that is served.

        A model is named by an index, by its encoder's name where that means one encoder, or `default` where only
        one encoder is served. Raises UnknownModel, naming what there is, or NotReady.
        """
        served = self._served
        return served[by_model(model, _specs(served), self.problems, self.problem)]

    def models(self) -> dict[str, EncoderSpec]:
        """Every name that `with_encoder` takes, and the encoder that it means. Raises NotReady."""
        return models(_specs(self._served), self.problems, self.problem)

    def problem(self) -> str:
        """Why the service is not ready; empty where it is."""
        problems = {one.spec.name: one.problem for one in self.encoders.encoders() if one.problem}
        return "; ".join(f"{name}: {problem}" for name, problem in (*self.problems.items(), *problems.items()))

    def refresh(self, *, again: bool = False) -> list[tuple[str, str]]:
        """Open what CURRENT names and swap it in. Returns (index, version) of what is new.

        While it is `draining`, what serves stays: nobody would use what is new for long.
        A version that cannot be served is not tried again until CURRENT names another, its files change, or `again`;
        what served before goes on serving, and `problems` says why.
        """
        with self._refreshing:
            changed: list[tuple[str, str]] = []
            known = self._served.keys()
            problems: dict[str, str] = {}
            try:
                folders = index_folders(self._directory)
            except VecsvcError as error:
                folders, problems["vecsvc"] = [], str(error)
            for folder in folders:
                try:
                    if self._refresh_one(folder, again):
                        changed.append((folder.name, self._served[folder.name].version))
                except VecsvcError as error:
                    problems[folder.name] = str(error)
            for name in self._served.keys() - {folder.name for folder in folders}:
                problems[name] = "its folder is gone; the version that was open still serves"
            self.problems, self._looked = problems, True
            # What serves is ready by now, and need not wait for what is only kept.
            for folder in folders:
                if folder.name in self._served.keys() - known:
                    self._open_before(folder, self._served[folder.name].version)
        self.let_go()
        return changed

    def waits_for(self, what: str) -> None:
        """Say what the first refresh is busy with. A later one goes on beside what serves, so that is no problem."""
        if not self._looked:
            self.problems = {"vecsvc": what}

    def _refresh_one(self, folder: IndexFolder, again: bool) -> bool:
        version = folder.current()
        if version is None:
            raise NotReady(f"{folder.path}: {folder.nothing_serves()}")
        before = self._served.get(folder.name)
        if before is not None and self.draining:
            return False
        if before is not None and before.version == version:
            self._failed.pop(folder.name, None)
            return False
        failed, looked, why = self._failed.get(folder.name, ("", 0, ""))
        looks = folder.looks(version)  # before it is opened, so that no change is missed
        if (failed, looked) == (version, looks) and not again:
            raise ArtifactUnfit(why)
        try:
            served = Served(folder, version, self._settings, self.encoders)
        except NotReady:
            raise  # that passes: the next look may go better
        except VecsvcError as error:
            self._failed[folder.name] = (version, looks, str(error))
            log.error("cannot serve", extra={"data": {"index": folder.name, "version": version, "why": str(error)}})
            raise
        except (MemoryError, OSError) as error:
            raise NotReady(f"{folder.path / version}: {type(error).__name__}: {error}") from error
        except Exception as error:
            # A bug of ours or of a library: the others still serve, and /readyz says why this one does not.
            why = f"{folder.path / version}: {type(error).__name__}: {error}"
            self._failed[folder.name] = (version, looks, why)
            log.exception("cannot serve", extra={"data": {"index": folder.name, "version": version}})
            raise ArtifactUnfit(why) from error
        self._failed.pop(folder.name, None)
        if before is not None:
            # First kept, then replaced: a front door must find it at any moment.
            before.asked_at = time.monotonic()
            self._previous = {**self._previous, folder.name: [*self._previous.get(folder.name, []), before]}
        self._served = {**self._served, folder.name: served}
        return True

    def _open_before(self, folder: IndexFolder, version: str) -> None:
        """At start a node opens versions before too: front doors may still be on one, and have no other node."""
        older = folder.before(version)[:MAX_PREVIOUS] if self._keep_previous_s else []
        kept = []
        for before in reversed(older):
            try:
                kept.append(Served(folder, before, self._settings, self.encoders))
            except (VecsvcError, MemoryError, OSError) as error:
                log.info("not kept", extra={"data": {"index": folder.name, "version": before, "why": str(error)}})
            else:
                log.info("kept", extra={"data": {"index": folder.name, "version": before}})
        if kept:
            self._previous = {**self._previous, folder.name: kept}

    def gauges(self, metrics: Metrics) -> None:
        """Set what is looked up when metrics are asked for."""
        for encoder in self.encoders.encoders():
            metrics.encoder_waiting.labels(encoder.spec.name).inc(encoder.batcher.waiting_tokens)
        for name, served in self._served.items():
            metrics.version_info.labels(name, served.version).set(1)

    def close(self) -> None:
        held, self._served, self._previous = self.held(), {}, {}
        for served, _ in held:
            served.retire()
