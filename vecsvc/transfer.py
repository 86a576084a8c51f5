"""What pushing and pulling have in common: where an index lies in a store, and files on their way.

In a store everything lies as in an --out folder:

<prefix>/<name>/CURRENT
<prefix>/<name>/<version>/manifest.json
<prefix>/<name>/<version>/part-NNN.json   of a version that is built in parts: one shard is there, with its encoder
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import msgspec

from vecsvc.errors import ConfigError, StorageError, UnknownVersion, listed
from vecsvc.manifest import FileEntry
from vecsvc.seal import MAX_MANIFEST_BYTES
from vecsvc.storage import CURRENT, MANIFEST, MAX_CURRENT_BYTES, check_name, check_version
from vecsvc.stores import Store

TRANSFERS: Final = 4  # files on their way at a time


class Moved(msgspec.Struct, frozen=True):
    """What a push or a pull did to one index."""

    name: str
    version: str
    place: str  # where it is now
    files: int  # that were on their way; 0 where all were there
    size_bytes: int  # of those

    def told(self) -> str:
        """In a line, for people."""
        brought = f"{self.files} files, {self.size_bytes / 1e6:.1f} MB" if self.files else "all was there"
        return f"{self.name} {self.version}: {brought}; now in {self.place}"


def index_store(target: str, name: str) -> Store:
    """Where an index lies in a store: the address itself where that ends in its name, otherwise below it.

    Raises ConfigError where it would hide others.
    """
    store = Store.open(target)
    index = store if store.name == name else store.at(check_name(name))
    # Who pulls from an address gets the index that it is, and would never see those below.
    if index is store:
        if store.read(CURRENT, MAX_CURRENT_BYTES) is None:
            others = [other for other in store.folders() if store.read(f"{other}/{CURRENT}", MAX_CURRENT_BYTES)]
            if others:
                raise ConfigError(
                    f"{store.label()} holds {listed(others)}, and by its name would be the index {name} itself: "
                    f"push to {store.label(name)}"
                )
    elif store.read(CURRENT, MAX_CURRENT_BYTES) is not None:
        raise ConfigError(f"{store.label()} is an index itself, and none can lie in it: push {name} elsewhere")
    return index


def indexes_in(source: str, version: str = "") -> list[Store]:
    """The indexes at an address: it is one, or those that lie right below it. Raises UnknownVersion where none is.

    An index has a CURRENT; one with `version` counts without, where that was lost.
    """

    def is_index(place: Store) -> bool:
        if place.read(CURRENT, MAX_CURRENT_BYTES) is not None:
            return True
        return bool(version) and place.read(f"{version}/{MANIFEST}", MAX_MANIFEST_BYTES) is not None

    store = Store.open(source)
    if is_index(store):
        return [store]
    found = [index for index in map(store.at, store.folders()) if is_index(index)]
    if not found:
        lost = versions_in(store)
        if lost:
            raise UnknownVersion(
                f"{store.label()} has no {CURRENT}; let one of {listed(lost)} serve: "
                f"vecsvc rollback {store.label()} --to VERSION"
            )
        raise UnknownVersion(f"{store.label()} holds no index; bring one there: vecsvc push DIR {store.label()}")
    return found


def versions_in(index: Store) -> list[str]:
    """The versions that lie there, by name."""
    return [name for name in index.folders() if index.read(f"{name}/{MANIFEST}", MAX_MANIFEST_BYTES) is not None]


def current_in(index: Store) -> str:
    """The version that serves there. Raises UnknownVersion or StorageError."""
    data = index.read(CURRENT, MAX_CURRENT_BYTES)
    if data is None:
        raise UnknownVersion(f"{index.label(CURRENT)}: missing")
    try:
        return check_version(data.decode("ascii").removesuffix("\n"))
    except (ConfigError, UnicodeDecodeError) as error:
        raise StorageError(f"{index.label(CURRENT)}: names no version: {error}") from error


def serves(index: Store) -> str | None:
    """As `current_in`; None where that cannot be told, which putting a version to serve mends."""
    try:
        return current_in(index)
    except (UnknownVersion, StorageError):
        return None


def move_all(work: Callable[[FileEntry], None], files: Sequence[FileEntry]) -> None:
    """Move files, some at a time; after the first that fails no other one begins."""
    with ThreadPoolExecutor(TRANSFERS, thread_name_prefix="vecsvc-transfer") as pool:
        futures = [pool.submit(work, file) for file in files]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def total_bytes(files: Iterable[FileEntry]) -> int:
    return sum(file.size_bytes for file in files)
