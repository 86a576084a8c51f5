"""Where artifacts live, and the only file that writes them: whole or not at all, synced, renamed into place.

<out>/<name>/CURRENT               one line: the version that serves
<out>/<name>/HISTORY               a line for each version that came to serve, the last one last: what rollback follows
<out>/<name>/<version>/...         a published version; never changes
<out>/<name>/.staging-<version>/   a build at work, or what is left of one that died
<out>/<name>/.state-<version>      how far that build is
<out>/<name>/.trash-<version>/     a version that gc is deleting
<out>/<name>/.part-<version>-NNN/  one shard of a version that is built in parts, see parts.py; .state beside it

Who holds what: a builder holds an exclusive flock on its staging folder, whoever serves a version a shared one
on the version's folder, whoever changes CURRENT or HISTORY an exclusive one on the index's folder. The kernel drops
them when the process dies, so what nobody holds is free to go, and there is nothing to clean up by hand after a crash.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import mmap
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, Annotated, Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from vecsvc.errors import ArtifactDamaged, ConfigError, StorageError, UnknownVersion, VersionExists, listed
from vecsvc.seal import MAX_MANIFEST_BYTES, unsealed

CURRENT: Final = "CURRENT"
HISTORY: Final = "HISTORY"
MANIFEST: Final = "manifest.json"
STAGING: Final = ".staging-"
TRASH: Final = ".trash-"
STATE: Final = ".state-"
PART: Final = ".part-"

MAX_CURRENT_BYTES: Final = 256
MAX_HISTORY: Final = 100  # versions that the record of what served names
MAX_HISTORY_BYTES: Final = MAX_HISTORY * 256
# Parts that nobody holds wait for the others and for publishing, finished builds for `--resume`; what waits for longer
# was given up.
UNPUBLISHED_KEPT_S: Final = 7 * 86_400.0
TURN_WAIT_S: Final = 5.0  # changing CURRENT takes milliseconds; whoever holds it for longer is stuck

_GONE: Final = "-"  # before a version in the record whose name another one has taken
_SAFE: Final = "what serves is untouched"
_MEND_CURRENT: Final = "run vecsvc rollback"

_NAME: Final = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_VERSION: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def no_failpoint(point: str) -> None:
    """Called before every write, sync, rename and delete with its name. Tests put a killer in its place."""


failpoint: Callable[[str], None] = no_failpoint


# ------------------------------------------------------------------------------------------------ names


def check_name(name: str) -> str:
    """An index name that is safe as a folder and in a URL; anything else is refused, never repaired."""
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"index name {name[:80]!r} must be 1 to 64 of a-z, 0-9, _ and -, and start with a letter or digit"
        )
    return name


def check_version(version: str) -> str:
    if not _VERSION.fullmatch(version):
        raise ConfigError(
            f"version {version[:80]!r} must be 1 to 64 letters, digits, ., _ and -, and start with a letter or digit"
        )
    if version.removesuffix(".tmp") in (CURRENT, HISTORY):
        raise ConfigError(f"version {version!r}: that is the name of a file beside the versions; choose another")
    return version


# ----------------------------------------------------------------------------------------------- writing


@contextlib.contextmanager
def foreign_errors(path: Path, verb: str = "write", outcome: str = "nothing was published") -> Iterator[None]:
    """The border where the system's errors become ours."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"cannot {verb} {path}: {error.strerror or error}; {outcome}") from error


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around each write of a library that writes into one of `new_file`'s files."""
    with foreign_errors(path):
        failpoint(f"write {path.name}")
        yield


@contextlib.contextmanager
def new_file(path: Path, *, private: bool = False) -> Iterator[IO[bytes]]:
    """A file that did not exist, synced when the block ends. An error inside leaves it for gc, unpublished.

    What is `private` nobody else may write or read, whatever the umask says.
    """
    with foreign_errors(path):
        failpoint(f"create {path.name}")
        with open(path, "xb", opener=_for_its_owner if private else None) as file:
            yield file
            failpoint(f"write {path.name}")
            file.flush()
            failpoint(f"fsync {path.name}")
            os.fsync(file.fileno())


@contextlib.contextmanager
def native_file(path: Path) -> Iterator[Path]:
    """For libraries that write by path: the path to write to, synced when the block ends."""
    with foreign_errors(path):
        failpoint(f"create {path.name}")
        # Libraries tell less than the system about a file that cannot be created.
        path.open("xb").close()
        failpoint(f"write {path.name}")
        yield path
        failpoint(f"fsync {path.name}")
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _for_its_owner(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def write_file(path: Path, data: bytes, *, private: bool = False) -> None:
    with new_file(path, private=private) as file:
        file.write(data)


def replace_file(path: Path, data: bytes, *, private: bool = False) -> None:
    """Change a file's content in one step that a crash cannot split."""
    aside = path.with_name(path.name + ".tmp")
    delete_file(aside)
    write_file(aside, data, private=private)
    rename(aside, path)


def make_folder(folder: Path, *, private: bool = False) -> None:
    """A folder and those above it, where they are missing; made durable, each in the one above it."""
    for missing in [f for f in (*reversed(folder.parents), folder) if not f.is_dir()]:
        with foreign_errors(missing):
            failpoint(f"make folder {missing.name}")
            missing.mkdir(0o700 if private else 0o777, exist_ok=True)
        sync_folder(missing.parent)


def rename(source: Path, target: Path) -> None:
    """Rename and make it durable: a rename without a synced folder may be forgotten by a power cut."""
    with foreign_errors(target):
        failpoint(f"rename {target.name}")
        source.rename(target)
    sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    with foreign_errors(folder, "sync", "a power cut may undo what was last renamed in it"):
        failpoint(f"fsync folder {folder.name}")
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class ArrayWriter:
    """Appends rows to an .npy file whose number of rows is not known before the end."""

    def __init__(self, path: Path, dtype: Any, row_shape: tuple[int, ...] = ()) -> None:
        self.path = path
        self.rows = 0
        self._dtype = np.dtype(dtype)
        self._row_shape = row_shape
        with foreign_errors(path):
            failpoint(f"create {path.name}")
            self._file = path.open("xb")
            self._header_size = self._write_header()

    def write(self, rows: NDArray[Any]) -> None:
        block = np.ascontiguousarray(rows, dtype=self._dtype)
        with foreign_errors(self.path):
            failpoint(f"write {self.path.name}")
            self._file.write(block.data)
        self.rows += len(block)

    def close(self) -> None:
        with foreign_errors(self.path):
            # NumPy's header leaves room for the first axis to grow, so it can be written again in place.
            self._file.seek(0)
            failpoint(f"write header {self.path.name}")
            if self._write_header() != self._header_size:
                raise StorageError(f"{self.path}: the header does not fit {self.rows} rows")
            self._file.flush()
            failpoint(f"fsync {self.path.name}")
            os.fsync(self._file.fileno())
            self._file.close()

    def abandon(self) -> None:
        """Close without keeping what was not written: on a full disk closing fails once more."""
        with contextlib.suppress(OSError):
            self._file.close()

    def _write_header(self) -> int:
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": (self.rows, *self._row_shape)}
        np.lib.format.write_array_header_1_0(self._file, header)
        return self._file.tell()


def write_array(path: Path, array: NDArray[Any]) -> None:
    writer = ArrayWriter(path, array.dtype, array.shape[1:])
    try:
        writer.write(array)
        writer.close()
    finally:
        writer.abandon()


# ----------------------------------------------------------------------------------------------- reading


def open_array(path: Path, dtype: Any, shape: tuple[int | None, ...], *, mmap: bool = True) -> NDArray[Any]:
    """The array of an .npy file, read-only, mapped where `mmap` allows it; None in `shape` means any length.

    Nothing is unpickled. Raises ArtifactDamaged where the file does not hold what was expected.
    """
    try:
        array = np.load(path, mmap_mode="r" if mmap and path.stat().st_size else None, allow_pickle=False)
    except Exception as error:  # NumPy lets through what Python's tokenizer says to a damaged header
        raise ArtifactDamaged(f"{path}: not a readable .npy file: {error}") from error
    if array.dtype not in [np.dtype(d) for d in (dtype if isinstance(dtype, tuple) else (dtype,))]:
        raise ArtifactDamaged(f"{path}: holds {array.dtype}, expected {dtype}")
    if len(array.shape) != len(shape) or any(
        want is not None and have != want for have, want in zip(array.shape, shape, strict=True)
    ):
        raise ArtifactDamaged(f"{path}: has shape {array.shape}, expected {shape}")
    if not array.flags.c_contiguous:  # kernels read the memory itself
        raise ArtifactDamaged(f"{path}: is in Fortran order, expected C order")
    plain: NDArray[Any] = array.view(np.ndarray)
    plain.flags.writeable = False
    return plain


def release_pages(array: NDArray[Any]) -> None:
    """Tell the system that a mapped array's pages are not needed now: a pass over a large file stays small."""
    base: Any = array
    while base is not None and not isinstance(base, mmap.mmap):
        base = getattr(base, "base", None)
    if base is not None:
        base.madvise(mmap.MADV_DONTNEED)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ------------------------------------------------------------------------------------------------- locks


class Lease:
    """An flock on a folder. The kernel ends it with the process, however that dies."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    @classmethod
    def take(cls, path: Path, *, exclusive: bool) -> Lease | None:
        """None where somebody else holds it, or the file is gone or was replaced meanwhile."""
        with foreign_errors(path, "lock", "nothing was changed"):
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                return None
            held = False
            try:
                fcntl.flock(descriptor, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
                held = os.path.samestat(os.fstat(descriptor), path.stat())
            except (BlockingIOError, FileNotFoundError):
                pass
            finally:
                if not held:
                    os.close(descriptor)
            return cls(descriptor) if held else None

    def share(self) -> None:
        """From exclusive to shared, without a moment in between in which another could take it."""
        fcntl.flock(self._descriptor, fcntl.LOCK_SH)

    def release(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def take_folder(folder: Path, held: str) -> Lease:
    """A folder for this process alone, made where it is missing. Raises VersionExists where somebody holds it."""
    while True:
        make_folder(folder)
        lease = Lease.take(folder, exclusive=True)
        if lease is not None:
            return lease
        # Between the two another build may have swept it away, as one that nobody holds.
        if folder.exists():
            raise VersionExists(held)


# ---------------------------------------------------------------------------------- versions of an index


def _line(history: list[str]) -> list[str]:
    """What a rollback walks back along: who comes to serve again takes back everything after his first time."""
    line: list[str] = []
    for version in history:
        if version in line:
            del line[line.index(version) + 1 :]
        else:
            line.append(version)
    return line


class _Refused(msgspec.Struct):
    """What is read here of a build's state, which is its builder's."""

    refused: bool = False


def _is_refused(state: Path) -> bool:
    try:
        return msgspec.json.decode(state.read_bytes(), type=_Refused).refused
    except (OSError, msgspec.MsgspecError):
        return False


def _given_up(folder: Path) -> bool:
    """Whether what a build left there was not gone on with for so long that nobody will; False where it is gone."""
    try:
        return folder.stat().st_mtime < time.time() - UNPUBLISHED_KEPT_S
    except FileNotFoundError:
        return False


def delete_unheld(folder: Path) -> bool:
    """Delete a folder that no living process holds; False where one does."""
    lease = Lease.take(folder, exclusive=True)
    if lease is None:
        return False
    try:
        delete_folder(folder)
    finally:
        lease.release()
    return True


@dataclass(frozen=True, slots=True)
class IndexFolder:
    """One index in an --out folder: its versions and which of them serves."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    def current(self) -> str | None:
        """The version that serves; None where nothing was published yet."""
        path = self.path / CURRENT
        try:
            if path.exists() and not path.is_file():
                raise ArtifactDamaged(f"{path}: is no file", remedy=_MEND_CURRENT)
            with path.open("rb") as file:
                text = file.read(MAX_CURRENT_BYTES).decode("ascii")
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            raise ArtifactDamaged(f"{path}: unreadable: {error}", remedy=_MEND_CURRENT) from error
        version = text.removesuffix("\n")
        if not _VERSION.fullmatch(version):
            raise ArtifactDamaged(f"{path}: {version[:80]!r} is no version", remedy=_MEND_CURRENT)
        return version

    def looks(self, version: str) -> int:
        """Another number when a file of a version was replaced, changed, added or deleted; reads none."""
        found = []
        for root, _, files in os.walk(self.path / version):
            for name in files:
                with contextlib.suppress(FileNotFoundError):
                    facts = Path(root, name).stat(follow_symlinks=False)
                    found.append((root, name, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns))
        return hash(tuple(sorted(found)))

    def nothing_serves(self) -> str:
        """What to do where no CURRENT is here."""
        there = listed(self.versions())
        if not there:
            return "nothing is published"
        return f"no version serves; let one of {there} serve: vecsvc rollback {self.path} --to VERSION"

    def versions(self) -> list[str]:
        """Published versions, the oldest first: by the time in their manifests, which a copy of the folder keeps."""
        found = []
        for folder in self.path.iterdir() if self.path.is_dir() else ():
            # Another process's gc may take a version away between the listing and the look at it.
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                if _VERSION.fullmatch(folder.name):
                    found.append((*_made(folder / MANIFEST), folder.name))
        return [name for *_, name in sorted(found)]

    def history(self) -> list[str]:
        """Versions in the order in which they came to serve, each as often as it did, also those that are gone since.

        CURRENT's is the last one, where that can be read and is here. Without a record, versions are taken to have
        served in the order of their making, up to CURRENT's if there is one.
        """
        try:
            current = self.current()
        except ArtifactDamaged:
            current = None
        served = self._recorded()
        if not served:
            versions = self.versions()
            served = versions[: versions.index(current)] if current in versions else versions
        if current is not None and served[-1:] != [current] and self._is_here(current):
            served.append(current)
        return served

    def before(self, version: str) -> list[str]:
        """What is here and was put to serve before `version`, the last of it first; also what was rolled back."""
        served = self.history()[::-1]
        earlier = served[served.index(version) :] if version in served else served
        return [other for other in dict.fromkeys(earlier) if other != version and self._is_here(other)]

    def _is_here(self, version: str) -> bool:
        return _VERSION.fullmatch(version) is not None and (self.path / version).is_dir()

    def _recorded(self) -> list[str]:
        """The record of what served; empty where there is none that can be read: no answer depends on it."""
        path = self.path / HISTORY
        try:
            if not path.is_file():
                return []
            with path.open("rb") as file:
                lines = file.read(MAX_HISTORY_BYTES).decode("ascii", "replace").split("\n")[:-1]
        except OSError:
            return []
        return [line for line in lines if _VERSION.fullmatch(line.lstrip(_GONE))]

    def _record(self, served: list[str]) -> None:
        """Write the record; of one that has grown long, what is oldest shrinks to the way back that it leaves."""
        if len(served) > MAX_HISTORY:
            half = MAX_HISTORY // 2
            served = _line(served[:-half])[-half:] + served[-half:]
        replace_file(self.path / HISTORY, "".join(f"{version}\n" for version in served).encode())

    def version(self, version: str) -> Path:
        if version not in self.versions():
            raise UnknownVersion(f"{self.name} has no version {version!r}; there are: {self._listed()}")
        return self.path / version

    def publish(self, staging: Path, version: str) -> None:
        """Move a finished staging folder into place. What serves stays: `serve` comes after."""
        target = self.path / version
        if target.exists():
            raise VersionExists(f"{target} exists, and a version is never written twice: choose another --version")
        for folder in sorted((f for f in staging.rglob("*") if f.is_dir()), reverse=True):
            sync_folder(folder)
        sync_folder(staging)
        if version in (recorded := self._recorded()):
            # One of that name was here before and is gone: what the record says is not about this one.
            gone = _GONE + version
            while gone in recorded:
                gone = _GONE + gone
            with self._turn(TURN_WAIT_S):
                self._record([gone if other == version else other for other in self._recorded()])
        rename(staging, target)

    def serve(self, version: str) -> None:
        """Point CURRENT at a published version, which gc cannot take away meanwhile."""
        lease = Lease.take(self.version(version), exclusive=False)
        if lease is None:
            raise UnknownVersion(f"{self.name} {version} is just being deleted; there are: {self._listed()}")
        try:
            with self._turn(TURN_WAIT_S):
                # The record first: one that is ahead of CURRENT is understood, one that lacks a version is not.
                served = self.history()
                if served[-1:] != [version]:
                    served.append(version)
                self._record(served)
                replace_file(self.path / CURRENT, f"{version}\n".encode())
        finally:
            lease.release()

    @contextlib.contextmanager
    def _turn(self, wait_s: float) -> Iterator[None]:
        """One process at a time changes CURRENT or HISTORY: two would write the same file aside."""
        end = time.monotonic() + wait_s
        while (lease := Lease.take(self.path, exclusive=True)) is None:
            if time.monotonic() >= end:
                raise StorageError(f"cannot write {self.path / CURRENT}: another process is changing it; try again")
            time.sleep(0.01)
        try:
            yield
        finally:
            lease.release()

    def rollback(self, to: str | None = None, check: Callable[[Path], object] = lambda folder: None) -> tuple[str, str]:
        """Serve `to`, or what served before CURRENT and was not itself rolled back. Returns (from, to).

        `check` sees its folder before anything is changed, and may refuse.
        """
        try:
            current = self.current()
        except ArtifactDamaged:
            current = None  # rolling back is also how a damaged CURRENT is mended
        if to is None:
            older = [version for version in _line(self.history()) if version != current and self._is_here(version)]
            if not older:
                others = [version for version in self.versions() if version != current]
                more = f"; say which of {listed(others)} is to serve (--to)" if others else ", and no other"
                raise UnknownVersion(f"{self.name} has no version before {current}{more}")
            to = older[-1]
        check(self.version(to))
        self.serve(to)
        return current or "none", to

    def gc(self, keep: int, *, refused: bool = False) -> list[str]:
        """Delete all but CURRENT and `keep` others, and what dead builds left; with `refused`, refused ones as well.

        What a rollback goes to stays first, then what served last, then what never did, the newest of it.

        A version that a process serves is never touched: its folder is flocked. Returns what went.
        """
        gone = []
        self._empty_trash()  # a version of the same name may be in it since a crash
        for version in self.surplus(keep):
            lease = Lease.take(self.path / version, exclusive=True)
            if lease is None:
                continue
            try:
                # Who puts a version to serve holds it meanwhile, so that from here on CURRENT cannot come to name it.
                if self.current() == version:
                    continue
                # A version vanishes in one step, so that a crash never leaves half of one to be served.
                rename(self.path / version, self.path / f"{TRASH}{version}")
            finally:
                lease.release()
            gone.append(version)
        self._empty_trash()
        return gone + self.sweep(refused=refused) + self._sweep_parts()

    def surplus(self, keep: int) -> list[str]:
        """Versions besides CURRENT's and `keep` others; after `gc` they are those that a process holds."""
        current, versions, history = self.current(), self.versions(), self.history()
        wanted = dict.fromkeys([*_line(history)[::-1], *history[::-1], *versions[::-1]])
        others = [version for version in wanted if version in versions and version != current]
        return sorted(others[keep:], key=versions.index)

    def _empty_trash(self) -> None:
        for folder in sorted(self.path.glob(f"{TRASH}*")):
            delete_folder(folder)

    def sweep(self, *, refused: bool = False) -> list[str]:
        """Delete what builds that died left behind; the folders of living builds are flocked.

        Unless `refused`, those stay for a week that were refused for their recall: `--resume` publishes them.
        """
        gone = []
        kept = () if refused else self.refused()
        for folder in sorted(self.path.glob(f"{STAGING}*")):
            if folder.name not in kept and delete_unheld(folder):
                gone.append(folder.name)
        for state in sorted(self.path.glob(f"{STATE}*")):
            if not (self.path / state.name.replace(STATE, STAGING, 1).removesuffix(".tmp")).exists():
                delete_file(state)
        for aside in (self.path / f"{CURRENT}.tmp", self.path / f"{HISTORY}.tmp"):
            if aside.exists():
                with self._turn(TURN_WAIT_S):
                    delete_file(aside)
        return gone

    def refused(self) -> list[str]:
        """The folders of builds that were refused for their recall within the last week."""
        return [
            folder.name
            for folder in sorted(self.path.glob(f"{STAGING}*"))
            if _is_refused(self.path / folder.name.replace(STAGING, STATE, 1)) and not _given_up(folder)
        ]

    def _sweep_parts(self) -> list[str]:
        """Delete parts of what was published meanwhile, and those that were given up."""
        gone = []
        for folder in sorted(f for f in self.path.glob(f"{PART}*-[0-9][0-9][0-9]") if f.is_dir()):
            version = folder.name.removeprefix(PART)[:-4]
            with contextlib.suppress(FileNotFoundError):
                if _given_up(folder) or (self.path / version / MANIFEST).exists():
                    gone += [folder.name] if delete_part(folder) else []
        for state in sorted(self.path.glob(f"{PART}*.state*")):
            if not state.with_name(state.name.partition(".state")[0]).exists():
                delete_file(state)
        return gone

    def _listed(self) -> str:
        return ", ".join(self.versions()) or "none"


def delete_part(folder: Path) -> bool:
    """Delete what one pod built, unless somebody holds it."""
    lease = Lease.take(folder, exclusive=True)
    if lease is None:
        return False
    try:
        delete_folder(folder)
        delete_file(folder.with_name(f"{folder.name}.state"))
    finally:
        lease.release()
    return True


class _Made(msgspec.Struct):
    created: Annotated[datetime, msgspec.Meta(tz=True)]


def _made(manifest: Path) -> tuple[float, int]:
    """When a version was made, to sort by: as its manifest says, or when the file was written where it is damaged."""
    state = manifest.stat()
    written = state.st_mtime_ns
    if stat.S_ISREG(state.st_mode) and state.st_size <= MAX_MANIFEST_BYTES:
        try:
            document = unsealed(manifest.read_bytes())
            if document is not None:
                return msgspec.json.decode(document, type=_Made).created.timestamp(), written
        except FileNotFoundError:
            raise
        except (OSError, msgspec.MsgspecError):
            pass  # whoever opens it will say what is wrong with it
    return written / 1e9, written


def delete_folder(folder: Path) -> None:
    """A folder with all that is in it; what another process deletes at the same time is no error."""
    for root, folders, files in os.walk(folder, topdown=False):
        for name in files:
            delete_file(Path(root, name))
        for name in folders:
            _delete_empty(Path(root, name))
    _delete_empty(folder)


def _delete_empty(folder: Path) -> None:
    if folder.is_symlink():
        delete_file(folder)
        return
    with foreign_errors(folder, "delete", _SAFE), contextlib.suppress(FileNotFoundError):
        failpoint(f"delete folder {folder.name}")
        folder.rmdir()


def delete_file(path: Path) -> None:
    with foreign_errors(path, "delete", _SAFE):
        failpoint(f"delete {path.name}")
        path.unlink(missing_ok=True)


def no_folder(directory: Path, wanted: str) -> str:
    """What a message says of a DIR that is not there."""
    if re.match(r"[a-z0-9]+:/", str(directory)):  # a Path has made one of its slashes
        address = re.sub(r":/+", "://", str(directory), count=1)
        return f"{address} is in an object store, which push, pull, publish and rollback reach; give a folder here"
    return f"{directory} is no folder; give {wanted}"


def index_folders(directory: Path, *, begun: bool = False) -> list[IndexFolder]:
    """The indexes that DIR means: itself where it is one, otherwise those in it, by name.

    With `begun`, also those of which there is no version yet, only what a build left. Raises ConfigError where there is
    none.
    """
    if not directory.is_dir():
        raise ConfigError(no_folder(directory, "the --out folder of vecsvc build-index, or one index in it"))
    directory = directory.absolute()  # `.` has no name

    def wanted(folder: Path) -> bool:
        return _is_index(folder) or (begun and _is_begun(folder))

    if wanted(directory):
        return [IndexFolder(directory)]
    with foreign_errors(directory, "read", "check that it may be read"):
        inside = [f for f in sorted(directory.iterdir()) if _NAME.fullmatch(f.name)]
    found = [IndexFolder(f) for f in inside if wanted(f)]
    if not found:
        started = [str(f) for f in (directory, *inside) if _is_begun(f)]
        parts = {str(f): sorted(part.name for part in f.glob(f"{PART}*-[0-9][0-9][0-9]")) for f in (directory, *inside)}
        for place, names in parts.items():
            if names:
                raise ConfigError(
                    f"{place} has no version yet, only shards of one ({listed(names)}): once all are built, "
                    f"vecsvc publish {place} --version VERSION"
                )
        if started:
            raise ConfigError(
                f"{listed(started)} has no version yet: a build or a pull is at work or died, or a build was refused "
                f"for its recall. Wait, run it again (a build with --resume), or delete what it left: "
                f"vecsvc gc {directory}, which leaves for a week what was refused"
            )
        raise ConfigError(f"{directory} holds no index; build one: vecsvc build-index CORPUS --out {directory}")
    return found


def _is_index(folder: Path) -> bool:
    try:
        if not folder.is_dir():
            return False
        versions = (f for f in folder.iterdir() if _VERSION.fullmatch(f.name))  # no staging of a first build
        return (folder / CURRENT).exists() or any((f / MANIFEST).is_file() for f in versions)
    except OSError:
        return False  # gone meanwhile, or not ours to read


def _is_begun(folder: Path) -> bool:
    """Whether a build of an index has left something here, or is at work."""
    try:
        return folder.is_dir() and any(f.name.startswith((STAGING, STATE, PART)) for f in folder.iterdir())
    except OSError:
        return False


def link_file(source: Path, target: Path) -> None:
    """The same bytes under another name, for a file that nobody changes; a copy where the file system has no links."""
    with foreign_errors(target):
        failpoint(f"link {target.name}")
        try:
            target.hardlink_to(source)
            return
        except FileExistsError:
            raise
        except OSError:
            pass  # the copy says what is wrong, if something else is
    copy_file(source, target)


def copy_file(source: Path, target: Path) -> None:
    """Copy a file into a staging folder, synced."""
    with source.open("rb") as reader, new_file(target) as writer:
        shutil.copyfileobj(reader, writer, 1 << 20)
