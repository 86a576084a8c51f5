"""Brings versions into an object store: files first, then the manifest, then CURRENT.

So what CURRENT names is whole at every moment. Of two who change one CURRENT, the last one wins: pyarrow knows no
conditional writes. A version that is built in parts comes shard by shard, from whoever built it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from vecsvc.errors import ConfigError, StorageError, UnknownVersion, VersionExists, VersionIncomplete, listed
from vecsvc.manifest import FileEntry, Manifest, check_files, parse_manifest, read_manifest, shards_here
from vecsvc.parts import MEND, Part, decoded_part, encoded_part, part_folder, read_part
from vecsvc.seal import MAX_MANIFEST_BYTES, unsealed
from vecsvc.storage import CURRENT, MANIFEST, Lease, check_version, index_folders
from vecsvc.stores import Store
from vecsvc.transfer import Moved, index_store, indexes_in, move_all, serves, total_bytes, versions_in

_PART: Final = re.compile(r"part-(\d{3})\.json")


def push(directory: Path, target: str, *, version: str = "", again: bool = False) -> Moved:
    """Copy a version of the index in `directory` into a store, where it serves from then on.

    Without `version` it is the one that serves here. Of one that is there already only files of another size are sent,
    or with `again` all, to mend it: a store tells no hashes, so a push that died begins anew, too. What is mended does
    not come to serve by that. A copy of some shards brings those, of a version that is there. Raises ConfigError,
    UnknownVersion, VersionExists, VersionIncomplete, ArtifactDamaged or StorageError.
    """
    folders = index_folders(directory)
    if len(folders) > 1:
        raise ConfigError(f"{directory} holds several indexes, name one: {', '.join(str(f.path) for f in folders)}")
    [folder] = folders
    version = version or folder.current() or ""
    if not version:
        raise UnknownVersion(f"{folder.path}: {folder.nothing_serves()}, or name one with --version")
    path, index = folder.version(version), index_store(target, folder.name)
    lease = Lease.take(path, exclusive=False)
    if lease is None:
        raise UnknownVersion(f"{folder.name} {version} is just being deleted")
    try:
        manifest = read_manifest(path)
        data = (path / MANIFEST).read_bytes()
        there = index.read(f"{version}/{MANIFEST}", MAX_MANIFEST_BYTES)
        here = shards_here(path, manifest)
        if there is None and len(here) < len(manifest.shards):
            raise VersionIncomplete(
                f"{path} holds shards {listed(here)} of {len(manifest.shards)}, and {index.label(version)} is not "
                "there yet: push it from a copy that has them all"
            )
        files = manifest.files_of(here)
        if there is not None and not again:
            sizes = index.at(version).sizes()
            files = [file for file in files if sizes.get(file.path) != file.size_bytes]
        if there is not None and there != data:
            if unsealed(there) is not None:
                raise VersionExists(f"{index.label(version)} is another build of that name: push under another version")
            if not again:
                raise VersionExists(f"{index.label(f'{version}/{MANIFEST}')} is damaged: mend it with --again")
        # What is there and may be whole is not replaced by what is damaged here.
        check_files(path, files, hashes=there is not None)
        _send(path, index.at(version), files)
        if len(here) < len(manifest.shards):
            check_sizes(index.at(version), manifest.files())
    finally:
        lease.release()
    if there != data:
        index.put(f"{version}/{MANIFEST}", data)
    if there is None or not again:
        serve(index, version)
    return Moved(folder.name, version, index.label(version), len(files), total_bytes(files))


def push_part(directory: Path, target: str, version: str, shard: int, *, again: bool = False) -> Moved:
    """Copy one shard of a version that is built in parts into a store, where `publish` finds it.

    With `again` also into a version that was published of it. Raises VersionIncomplete where that shard is not built,
    and what `push` raises.
    """
    directory = directory.absolute()
    candidates = [directory, *(sorted(directory.iterdir()) if directory.is_dir() else [])]
    folders = [part_folder(folder, check_version(version), shard) for folder in candidates]
    found = [folder for folder in folders if folder.is_dir()]
    if len(found) > 1:
        raise ConfigError(f"{directory} holds several indexes, name one: {', '.join(str(f.parent) for f in found)}")
    lease = Lease.take(found[0], exclusive=True) if found else None
    missing = VersionIncomplete(
        f"shard {shard} of version {version} is not built in {directory}, or is just being built: "
        f"vecsvc build-index CORPUS --shard {shard}/N --version {version}"
    )
    if lease is None:
        if any((folder / version / MANIFEST).is_file() for folder in candidates):
            raise ConfigError(f"version {version} is published in {directory}, shards and all: push it without --shard")
        raise missing
    try:
        part = read_part(found[0])
        if part is None:
            raise missing
        index = index_store(target, part.name)
        place = index.at(version)
        check_files(found[0], part.files(), hashes=False, remedy=MEND)
        published = place.read(MANIFEST, MAX_MANIFEST_BYTES)
        if published is not None:
            if not again:
                raise VersionExists(
                    f"{place.label()} is published already: build under another --version, or mend it with --again"
                )
            files = _of_published(part, parse_manifest(published, place.label(MANIFEST)), place)
            check_files(found[0], files, remedy=MEND)
            _send(found[0], place, files)
            return Moved(part.name, version, place.label(), len(files), total_bytes(files))
        files = list(part.shard.files)
        if part.encoder is not None and not _has_encoder(place, part):
            files += part.encoder.files
        # First the word that this shard is there goes, then its files change.
        place.delete(_part_file(shard))
        _send(found[0], place, files)
        place.put(_part_file(shard), encoded_part(part))
    finally:
        lease.release()
    return Moved(part.name, version, place.label(_part_file(shard)), len(files), total_bytes(files))


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
            raise StorageError(f"{place.label(file.path)}: {have}, expected {file.size_bytes}; push it with --again")


def rollback(target: str, to: str | None) -> tuple[str, str]:
    """Let a version that lies whole in a store serve there; those who watch it follow. Returns (from, to).

    What served before is recorded in folders only, so `to` must be given. Raises ConfigError, UnknownVersion,
    ArtifactError or StorageError; nothing is changed then.
    """
    wanted = check_version(to) if to is not None else ""
    indexes = indexes_in(target, wanted)
    if len(indexes) > 1:
        names = ", ".join(index.label() for index in indexes)
        raise ConfigError(f"{target} holds several indexes, name one: {names}")
    [index] = indexes
    before = serves(index)
    data = index.read(f"{wanted}/{MANIFEST}", MAX_MANIFEST_BYTES) if wanted else None
    if data is None:
        others = listed([name for name in versions_in(index) if name != before]) or "none"
        what = f"there is no {wanted}" if wanted else "--to is missing: a store does not record what served before"
        raise UnknownVersion(f"{index.label()}: {what}; others than {before or 'none'}, which serves: {others}")
    check_sizes(index.at(wanted), parse_manifest(data, index.label(f"{wanted}/{MANIFEST}")).files())
    serve(index, wanted)
    return before or "none", wanted


def serve(index: Store, version: str) -> None:
    index.put(CURRENT, f"{version}\n".encode())


def _part_file(shard: int) -> str:
    return f"part-{shard:03d}.json"


def _of_published(part: Part, manifest: Manifest, place: Store) -> list[FileEntry]:
    """The files of a part that are those of a version. Raises VersionExists where it is of another build."""
    mine = manifest.shards[part.number].files if part.number < len(manifest.shards) else []
    if mine != part.shard.files:
        raise VersionExists(f"{place.label()} is published already, of another build than this shard {part.number}")
    # Their canaries differ in the last bits where other processors computed them.
    encoders = [one.files if one is not None else [] for one in (part.encoder, manifest.encoder)]
    return [*mine, *(encoders[0] if encoders[0] == encoders[1] else [])]


def _has_encoder(place: Store, part: Part) -> bool:
    """Whether another shard brought the same encoder."""
    sizes = place.sizes("encoder")
    files = part.encoder.files if part.encoder is not None else []
    same = any(other.encoder is not None and other.encoder.files == files for other in parts_in(place))
    return same and all(sizes.get(file.path.removeprefix("encoder/")) == file.size_bytes for file in files)


def _send(folder: Path, place: Store, files: Sequence[FileEntry]) -> None:
    def send(file: FileEntry) -> None:
        place.put_file(file.path, folder / file.path, file.size_bytes, file.sha256)

    move_all(send, files)
    if files:
        check_sizes(place, files)
