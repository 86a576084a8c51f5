"""Brings versions into an object store, and from there to where they serve: push, pull, and pull again.

In a store everything lies as in an --out folder. A version is pushed files first, then its manifest, then CURRENT, so
that what CURRENT names is whole at every moment; who pulls checks each file against the manifest while it comes in,
and publishes as a build does. Of two who change one CURRENT, the last one wins: pyarrow knows no conditional writes.

<prefix>/<name>/CURRENT
<prefix>/<name>/<version>/manifest.json
<prefix>/<name>/<version>/part-NNN.json   of a version that is built in parts: one shard is there, with its encoder
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import msgspec

from vecsvc.errors import (
    ArtifactDamaged,
    ConfigError,
    StorageError,
    UnknownVersion,
    VecsvcError,
    VersionExists,
    VersionIncomplete,
)
from vecsvc.manifest import FileEntry, Manifest, check_files, parse_manifest, read_manifest
from vecsvc.parts import Part, decoded_part, encoded_part, part_folder, read_part
from vecsvc.seal import MAX_MANIFEST_BYTES
from vecsvc.storage import (
    CURRENT,
    MANIFEST,
    MAX_CURRENT_BYTES,
    STAGING,
    IndexFolder,
    Lease,
    check_name,
    check_version,
    delete_file,
    delete_folder,
    index_folders,
    make_folder,
    rename,
    sync_folder,
    take_folder,
    write_file,
)
from vecsvc.stores import Store
from vecsvc.types import MAX_SHARDS

TRANSFERS: Final = 4  # files on their way at a time

_PART: Final = re.compile(r"part-(\d{3})\.json")


class Moved(msgspec.Struct, frozen=True):
    """What a push or a pull did to one index."""

    name: str
    version: str
    place: str  # where it is now
    files: int  # that were on their way; 0 where all were there
    size_bytes: int  # of those


# ---------------------------------------------------------------------------------------------------- push


def push(directory: Path, target: str, *, version: str = "") -> Moved:
    """Copy a version of the index in `directory` into a store, where it serves from then on.

    Without `version` it is the one that serves here. One that is there already is not sent again; a push that died
    begins anew, for a store tells no hashes. Raises ConfigError, UnknownVersion, VersionExists, ArtifactDamaged or
    StorageError.
    """
    folders = index_folders(directory)
    if len(folders) > 1:
        raise ConfigError(f"{directory} holds several indexes, name one: {', '.join(str(f.path) for f in folders)}")
    [folder] = folders
    version = version or folder.current() or ""
    path, index = folder.version(version), index_store(target, folder.name)
    lease = Lease.take(path, exclusive=False)
    if lease is None:
        raise UnknownVersion(f"{folder.name} {version} is just being deleted")
    try:
        manifest = read_manifest(path)
        data = (path / MANIFEST).read_bytes()
        there = index.read(f"{version}/{MANIFEST}", MAX_MANIFEST_BYTES)
        files = manifest.files() if there is None else []
        if there is not None and there != data:
            raise VersionExists(f"{index.label(version)} is another build of that name: push under another version")
        check_files(path, files, hashes=False)
        _send(path, index.at(version), files)
    finally:
        lease.release()
    if there is None:
        index.put(f"{version}/{MANIFEST}", data)
    serve(index, version)
    return Moved(folder.name, version, index.label(version), len(files), _bytes(files))


def push_part(directory: Path, target: str, version: str, shard: int) -> Moved:
    """Copy one shard of a version that is built in parts into a store, where `publish` finds it.

    Raises VersionIncomplete where that shard is not built, and what `push` raises.
    """
    directory = directory.absolute()
    candidates = [directory, *(sorted(directory.iterdir()) if directory.is_dir() else [])]
    folders = [part_folder(folder, check_version(version), shard) for folder in candidates]
    found = [folder for folder in folders if folder.is_dir()]
    if len(found) > 1:
        raise ConfigError(f"{directory} holds several indexes, name one: {', '.join(str(f.parent) for f in found)}")
    lease = Lease.take(found[0], exclusive=True) if found else None
    part = read_part(found[0]) if lease is not None else None
    if lease is None or part is None:
        raise VersionIncomplete(
            f"shard {shard} of version {version} is not built in {directory}, or is just being built: "
            f"vecsvc build-index CORPUS --shard {shard}/N --version {version}"
        )
    try:
        index = index_store(target, part.name)
        place = index.at(version)
        if place.read(MANIFEST, MAX_MANIFEST_BYTES) is not None:
            raise VersionExists(f"{place.label()} is published already: build under another --version")
        check_files(found[0], part.files(), hashes=False)
        files = list(part.shard.files)
        if part.encoder is not None and not _has_encoder(place, part):
            files += part.encoder.files
        # First the word that this shard is there goes, then its files change.
        place.delete(_part_file(shard))
        _send(found[0], place, files)
        place.put(_part_file(shard), encoded_part(part))
    finally:
        lease.release()
    return Moved(part.name, version, place.label(_part_file(shard)), len(files), _bytes(files))


def parts_in(place: Store) -> list[Part]:
    """The parts of a version that lie in a store."""
    found = []
    for name in place.names():
        if _PART.fullmatch(name):
            data = place.read(name, MAX_MANIFEST_BYTES)
            if data is not None:
                found.append(decoded_part(data, place.label(name)))
    return found


def forget_parts(place: Store) -> None:
    """Their version is published: nobody needs them."""
    for name in place.names():
        if _PART.fullmatch(name):
            place.delete(name)


def check_sizes(place: Store, files: Iterable[FileEntry]) -> None:
    """Refuse the first file of a version in a store that is not there, or not whole."""
    sizes = place.sizes()
    for file in files:
        if sizes.get(file.path) != file.size_bytes:
            have = "is missing" if file.path not in sizes else f"has {sizes[file.path]} bytes"
            raise StorageError(f"{place.label(file.path)}: {have}, expected {file.size_bytes}; push it again")


def index_store(target: str, name: str) -> Store:
    """Where an index lies in a store: the address itself where that ends in its name, otherwise below it."""
    store = Store.open(target)
    return store if store.name == name else store.at(check_name(name))


def serve(index: Store, version: str) -> None:
    index.put(CURRENT, f"{version}\n".encode())


def _part_file(shard: int) -> str:
    return f"part-{shard:03d}.json"


def _has_encoder(place: Store, part: Part) -> bool:
    """Whether another shard brought the same encoder."""
    sizes = place.sizes("encoder")
    files = part.encoder.files if part.encoder is not None else []
    same = any(other.encoder is not None and other.encoder.files == files for other in parts_in(place))
    return same and all(sizes.get(file.path.removeprefix("encoder/")) == file.size_bytes for file in files)


def _send(folder: Path, place: Store, files: Sequence[FileEntry]) -> None:
    def send(file: FileEntry) -> None:
        place.put_file(file.path, folder / file.path, file.size_bytes, file.sha256)

    with ThreadPoolExecutor(TRANSFERS, thread_name_prefix="vecsvc-push") as pool:
        _all(pool, send, files)
    if files:
        check_sizes(place, files)


def _all(pool: ThreadPoolExecutor, work: Callable[[FileEntry], None], files: Sequence[FileEntry]) -> None:
    """Do them all; after the first that fails no other one begins."""
    futures = [pool.submit(work, file) for file in files]
    try:
        for future in futures:
            future.result()
    except BaseException:
        pool.shutdown(wait=True, cancel_futures=True)
        raise


def _bytes(files: Iterable[FileEntry]) -> int:
    return sum(file.size_bytes for file in files)


# ---------------------------------------------------------------------------------------------------- pull


def shard_numbers(text: str) -> frozenset[int] | None:
    """What `0,2-3` names; None for the empty text, which means all."""
    if not text:
        return None
    numbers: set[int] = set()
    for part in text.split(","):
        named = re.fullmatch(r"(\d{1,3})(?:-(\d{1,3}))?", part.strip())
        first, last = (int(named[1]), int(named[2] or named[1])) if named else (1, 0)
        if not first <= last < MAX_SHARDS:
            raise ConfigError(
                f"--shards takes numbers and ranges like 0,2-3, up to {MAX_SHARDS - 1}; got {text[:80]!r}"
            )
        numbers.update(range(first, last + 1))
    return frozenset(numbers)


def pull(
    source: str,
    out: Path,
    *,
    shards: frozenset[int] | None = None,
    going_on: Callable[[], None] = lambda: None,
) -> list[Moved]:
    """Bring what CURRENT names in a store into the --out folder `out`, and let it serve there.

    `source` is an index in a store, or a place with several. With `shards`, only their files come, beside what all
    shards have in common. What is here already is not brought again. Raises ConfigError, UnknownVersion,
    VersionExists, ArtifactError or StorageError; what serves is untouched then.
    """
    return [_pull_one(index, out, shards, going_on) for index in _indexes(source)]


def watch(
    source: str,
    out: Path,
    *,
    shards: frozenset[int] | None,
    every_s: float,
    keep: int,
    stop: threading.Event,
    say: Callable[[str], None],
) -> None:
    """Pull whenever CURRENT in the store changes, until `stop` is set; of older versions `keep` stay.

    What goes wrong is said and tried again: the store may be away, or a version not there yet. Raises ConfigError.
    """

    def going_on() -> None:
        if stop.is_set():
            raise _StoppedError

    seen: dict[str, str] = {}
    said = ""
    while not stop.is_set():
        try:
            for index in _indexes(source):
                version = _current(index)
                # A rollback here holds until the store moves on.
                if seen.get(index.name) == version:
                    continue
                moved = _pull_one(index, out, shards, going_on)
                seen[index.name], said = moved.version, ""
                say(told(moved))
                gone = IndexFolder(out / index.name).gc(keep)
                if gone:
                    say(f"{index.name}: deleted {', '.join(gone)}")
        except _StoppedError:
            return
        except ConfigError:
            raise
        except VecsvcError as error:
            if str(error) != said:
                said = str(error)
                say(f"{said}; trying again every {every_s:g} s")
        stop.wait(every_s)


def told(moved: Moved) -> str:
    brought = f"{moved.files} files, {moved.size_bytes / 1e6:.1f} MB" if moved.files else "all was there"
    return f"{moved.name} {moved.version}: {brought}; serves in {moved.place}"


class _StoppedError(Exception):
    """Whoever pulls was told to end."""


def _indexes(source: str) -> list[Store]:
    store = Store.open(source)
    if store.read(CURRENT, MAX_CURRENT_BYTES) is not None:
        return [store]
    found = [store.at(name) for name in store.folders()]
    found = [index for index in found if index.read(CURRENT, MAX_CURRENT_BYTES) is not None]
    if not found:
        raise UnknownVersion(f"{store.label()} holds no index; bring one there: vecsvc push DIR {store.label()}")
    return found


def _current(index: Store) -> str:
    data = index.read(CURRENT, MAX_CURRENT_BYTES)
    if data is None:
        raise UnknownVersion(f"{index.label(CURRENT)}: missing")
    try:
        return check_version(data.decode("ascii").removesuffix("\n"))
    except (ConfigError, UnicodeDecodeError) as error:
        raise StorageError(f"{index.label(CURRENT)}: names no version: {error}") from error


def _pull_one(index: Store, out: Path, shards: frozenset[int] | None, going_on: Callable[[], None]) -> Moved:
    folder, version = IndexFolder(out / check_name(index.name)), _current(index)
    place, path = index.at(version), folder.path / version
    data = place.read(MANIFEST, MAX_MANIFEST_BYTES)
    if data is None:
        raise StorageError(f"{place.label(MANIFEST)}: missing, though {index.label(CURRENT)} names it")
    manifest = parse_manifest(data, place.label(MANIFEST))
    wanted = sorted(shards) if shards is not None else list(range(len(manifest.shards)))
    if wanted[-1] >= len(manifest.shards):
        raise ConfigError(f"{place.label()} has shards 0 to {len(manifest.shards) - 1}, and no shard {wanted[-1]}")
    make_folder(folder.path)
    staging = folder.path / f"{STAGING}{version}"
    # Held while a version is completed, too: only one process at a time changes what is here of it.
    lease = take_folder(staging, f"version {version} is being pulled or built by another process: let it end")
    try:
        if path.exists():
            files = _complete(place, manifest, data, path, wanted, staging, going_on)
            delete_folder(staging)
        else:
            files = [*manifest.shared_files(), *(f for number in wanted for f in manifest.shards[number].files)]
            _fetch(place, staging, files, going_on)
            _folders_of_kinds(staging, wanted)
            write_file(staging / MANIFEST, data)
            folder.publish(staging, version)
            lease.share()
        if folder.current() != version:
            folder.serve(version)
    finally:
        lease.release()
    return Moved(index.name, version, str(path), len(files), _bytes(files))


def _complete(
    place: Store,
    manifest: Manifest,
    data: bytes,
    path: Path,
    wanted: list[int],
    staging: Path,
    going_on: Callable[[], None],
) -> list[FileEntry]:
    """Add the shards that are missing in a version that was pulled in part: each appears whole."""
    lease = Lease.take(path, exclusive=False)
    if lease is None:
        raise StorageError(f"{path} is just being deleted; try again")
    try:
        if (path / MANIFEST).read_bytes() != data:
            raise VersionExists(f"{path} is another build than {place.label()}: delete it, or pull into another folder")
        missing = [number for number in wanted if not (path / f"shards/{number:03d}").is_dir()]
        files = [file for number in missing for file in manifest.shards[number].files]
        _fetch(place, staging, files, going_on)
        _folders_of_kinds(staging, missing)
        for number in missing:
            sync_folder(staging / f"shards/{number:03d}/index")
            sync_folder(staging / f"shards/{number:03d}")
            rename(staging / f"shards/{number:03d}", path / f"shards/{number:03d}")
    finally:
        lease.release()
    return files


def _fetch(place: Store, staging: Path, files: Sequence[FileEntry], going_on: Callable[[], None]) -> None:
    """Bring the files that are not in the staging folder yet, and remove what is none of them."""
    listed = {file.path for file in files}
    for path in sorted(staging.rglob("*")):
        if path.is_symlink() or (not path.is_dir() and path.relative_to(staging).as_posix() not in listed):
            delete_file(path)

    def fetch(file: FileEntry) -> None:
        going_on()
        target = staging / file.path
        if target.exists():
            try:
                check_files(staging, [file])
                return  # of a pull that died
            except ArtifactDamaged:
                delete_file(target)
        make_folder(target.parent)
        digest = place.fetch(file.path, target, file.size_bytes, going_on)
        if target.stat().st_size != file.size_bytes or digest != file.sha256:
            delete_file(target)
            raise ArtifactDamaged(
                f"{place.label(file.path)}: what came has another size or sha256 than the manifest says; push it again"
            )

    with ThreadPoolExecutor(TRANSFERS, thread_name_prefix="vecsvc-pull") as pool:
        _all(pool, fetch, files)


def _folders_of_kinds(staging: Path, numbers: Iterable[int]) -> None:
    """Kinds without files of their own have an empty folder."""
    for number in numbers:
        make_folder(staging / f"shards/{number:03d}/index")
