"""Brings versions from an object store to where they serve: checked while they come in, published as a build is."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from vecsvc.errors import ArtifactDamaged, ConfigError, StorageError, VecsvcError, VersionExists
from vecsvc.manifest import FileEntry, Manifest, check_files, parse_manifest
from vecsvc.seal import MAX_MANIFEST_BYTES
from vecsvc.storage import (
    CURRENT,
    MANIFEST,
    STAGING,
    IndexFolder,
    Lease,
    check_name,
    delete_file,
    delete_folder,
    make_folder,
    rename,
    sync_folder,
    take_folder,
    write_file,
)
from vecsvc.stores import Store
from vecsvc.transfer import Moved, current_in, indexes_in, move_all, total_bytes


def pull(
    source: str,
    out: Path,
    *,
    shards: frozenset[int] | None = None,
    again: bool = False,
    going_on: Callable[[], None] = lambda: None,
) -> list[Moved]:
    """Bring what CURRENT names in a store into the --out folder `out`, and let it serve there.

    `source` is an index in a store, or a place with several. With `shards`, only their files come, beside what all
    shards have in common. What is here already is brought again where it has another size than written, or with
    `again` another sha256. Raises ConfigError, UnknownVersion,
    VersionExists, ArtifactError or StorageError; what serves is untouched then.
    """
    return [_pull_one(index, out, shards, going_on, again=again) for index in indexes_in(source)]


def watch(
    source: str,
    out: Path,
    *,
    shards: frozenset[int] | None,
    every_s: float,
    keep: int,
    stop: threading.Event,
    say: Callable[[str], None],
    warn: Callable[[str], None],
) -> None:
    """Pull whenever CURRENT in the store changes, until `stop` is set; of older versions `keep` stay.

    What goes wrong is told to `warn` and tried again: the store may be away, or a version not there yet. Raises
    ConfigError.
    """

    def going_on() -> None:
        if stop.is_set():
            raise _StoppedError

    seen: dict[str, str] = {}
    said: list[str] = []
    while not stop.is_set():
        problems = []
        try:
            for index in indexes_in(source):
                # One that cannot be pulled must not keep the others from it.
                try:
                    version = current_in(index)
                    # A rollback here holds until the store moves on.
                    if seen.get(index.name) == version:
                        continue
                    moved = _pull_one(index, out, shards, going_on)
                    seen[index.name] = moved.version
                    say(moved.told())
                    gone = IndexFolder(out / index.name).gc(keep)
                    if gone:
                        say(f"{index.name}: deleted {', '.join(gone)}")
                except VecsvcError as error:
                    problems.append(str(error))
        except _StoppedError:
            return
        except ConfigError:
            raise
        except VecsvcError as error:
            problems.append(str(error))
        if problems and problems != said:
            warn(f"{'; '.join(problems)}; trying again every {every_s:g} s")
        said = problems
        stop.wait(every_s)


class _StoppedError(Exception):
    """Whoever pulls was told to end."""


def _pull_one(
    index: Store, out: Path, shards: frozenset[int] | None, going_on: Callable[[], None], *, again: bool = False
) -> Moved:
    folder, version = IndexFolder(out / check_name(index.name)), current_in(index)
    place, path = index.at(version), folder.path / version
    data = place.read(MANIFEST, MAX_MANIFEST_BYTES)
    if data is None:
        raise StorageError(
            f"{place.label(MANIFEST)}: missing, though {index.label(CURRENT)} names it; let another version serve: "
            f"vecsvc rollback {index.label()} --to VERSION"
        )
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
            files = _complete(place, manifest, data, path, wanted, staging, going_on, again=again)
            delete_folder(staging)
        else:
            files = manifest.files_of(wanted)
            _fetch(place, staging, files, going_on)
            _folders_of_kinds(staging, wanted)
            write_file(staging / MANIFEST, data)
            folder.publish(staging, version)
            lease.share()
        if folder.current() != version:
            folder.serve(version)
    finally:
        lease.release()
    return Moved(index.name, version, str(path), len(files), total_bytes(files))


def _complete(
    place: Store,
    manifest: Manifest,
    data: bytes,
    path: Path,
    wanted: list[int],
    staging: Path,
    going_on: Callable[[], None],
    *,
    again: bool,
) -> list[FileEntry]:
    """Add what is missing in a version that was pulled in part, each shard whole, and bring anew what is damaged.

    Whoever has a damaged file open keeps what it has: the new one takes its name.
    """
    lease = Lease.take(path, exclusive=False)
    if lease is None:
        raise StorageError(f"{path} is just being deleted; try again")
    try:
        if (path / MANIFEST).read_bytes() != data:
            raise VersionExists(f"{path} is another build than {place.label()}: delete it, or pull into another folder")
        missing = [number for number in wanted if not (path / f"shards/{number:03d}").is_dir()]
        here = [number for number in wanted if number not in missing]
        damaged = [file for file in manifest.files_of(here) if not _is_whole(path, file, hashes=again)]
        files = [file for number in missing for file in manifest.shards[number].files] + damaged
        _fetch(place, staging, files, going_on)
        _folders_of_kinds(staging, missing)
        for number in missing:
            sync_folder(staging / f"shards/{number:03d}/index")
            sync_folder(staging / f"shards/{number:03d}")
            rename(staging / f"shards/{number:03d}", path / f"shards/{number:03d}")
        for file in damaged:
            make_folder((path / file.path).parent)
            rename(staging / file.path, path / file.path)
    finally:
        lease.release()
    return files


def _is_whole(folder: Path, file: FileEntry, *, hashes: bool) -> bool:
    try:
        check_files(folder, [file], hashes=hashes)
    except ArtifactDamaged:
        return False
    return True


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
            if _is_whole(staging, file, hashes=True):
                return  # of a pull that died
            delete_file(target)
        make_folder(target.parent)
        digest = place.fetch(file.path, target, file.size_bytes, going_on)
        if target.stat().st_size != file.size_bytes or digest != file.sha256:
            delete_file(target)
            raise ArtifactDamaged(
                f"{place.label(file.path)}: what came has another size or sha256 than the manifest says",
                remedy="push it with --again",
            )

    move_all(fetch, files)


def _folders_of_kinds(staging: Path, numbers: Iterable[int]) -> None:
    """Kinds without files of their own have an empty folder."""
    for number in numbers:
        make_folder(staging / f"shards/{number:03d}/index")
