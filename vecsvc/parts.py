"""What one pod of a distributed build leaves: a shard, and all that the manifest needs to know of it.

<out>/<name>/.part-<version>-NNN/part.json     written last: until then there is no part
<out>/<name>/.part-<version>-NNN/shards/NNN/   what the version will hold of this shard
<out>/<name>/.part-<version>-NNN/encoder/      the encoder, where there is one; every pod has a copy of its own
<out>/<name>/.part-<version>-NNN.state         how far the build of the shard is

Pods share no file, so they cannot be in each other's way; publishing merges what they left.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final, Literal

import msgspec

from vecsvc.errors import ArtifactDamaged, ArtifactUnfit
from vecsvc.manifest import (
    FORMAT_VERSION,
    Certificate,
    CorpusEntry,
    EncoderEntry,
    FileEntry,
    Provenance,
    ShardEntry,
)
from vecsvc.seal import MAX_MANIFEST_BYTES, sealed, unsealed
from vecsvc.storage import PART, write_file
from vecsvc.types import MAX_SHARDS

PART_FILE: Final = "part.json"
MEND: Final = "build that shard again"

_FOLDER: Final = re.compile(re.escape(PART) + r"(.+)-(\d{3})")


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One shard of a version that is built in parts."""

    format_version: int
    name: str
    version: str
    number: int  # of the shard
    shards: int  # of the version
    settings: dict[str, Any]  # of the build, so far as they say what becomes of it; equal in all parts
    id_type: Literal["int", "str"]
    vector_dtype: Literal["float32", "float16"]
    fields: dict[str, str]
    shard: ShardEntry
    encoder: EncoderEntry | None
    corpus: CorpusEntry  # the whole corpus, which every pod reads
    provenance: Provenance
    certificate: Certificate | None  # of the shard by itself

    def files(self) -> list[FileEntry]:
        return self.shard.files + (self.encoder.files if self.encoder else [])


def part_folder(index: Path, version: str, number: int) -> Path:
    return index / f"{PART}{version}-{number:03d}"


def part_folders(index: Path, version: str) -> dict[int, Path]:
    """The folders of all parts of a version that were begun, by the shard's number."""
    found = {}
    for folder in sorted(index.glob(f"{PART}*")):
        named = _FOLDER.fullmatch(folder.name)
        if named is not None and named[1] == version and folder.is_dir():
            found[int(named[2])] = folder
    return found


def write_part(folder: Path, part: Part) -> None:
    write_file(folder / PART_FILE, encoded_part(part))


def encoded_part(part: Part) -> bytes:
    return sealed(msgspec.json.format(msgspec.json.encode(part), indent=2))


def read_part(folder: Path) -> Part | None:
    """None where the folder holds no finished part. Raises ArtifactDamaged or ArtifactUnfit, naming the file."""
    path = folder / PART_FILE
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file:
            data = file.read(MAX_MANIFEST_BYTES + 1)
    except OSError as error:
        raise ArtifactDamaged(f"{path}: {error.strerror}", remedy=MEND) from error
    return decoded_part(data, str(path))


def decoded_part(data: bytes, label: str) -> Part:
    document = unsealed(data)
    if document is None:
        raise ArtifactDamaged(f"{label}: is not what was written (its own digest differs)", remedy=MEND)
    try:
        part = msgspec.json.decode(document, type=Part)
    except msgspec.MsgspecError as error:
        raise ArtifactUnfit(f"{label}: {error}; build that shard again with this vecsvc") from error
    if part.format_version != FORMAT_VERSION:
        raise ArtifactUnfit(f"{label}: has format {part.format_version}, this vecsvc writes {FORMAT_VERSION}")
    if not 0 <= part.number < part.shards <= MAX_SHARDS:
        raise ArtifactDamaged(f"{label}: shard {part.number} of {part.shards} cannot be", remedy=MEND)
    prefixes = (f"shards/{part.number:03d}/", "encoder/")
    for file in part.files():
        if not file.path.startswith(prefixes) or ".." in file.path:
            raise ArtifactDamaged(f"{label}: {file.path[:120]!r} is no path inside the part", remedy=MEND)
    return part
