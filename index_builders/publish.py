"""Makes a version of the parts that many machines built: all there, all of one build, their certificates merged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import msgspec

from index_builders.build_manifest import check_recall, now
from index_builders.build_state import empty
from index_builders.certify import choose
from vecsvc.errors import ConfigError, PartsDiffer, UnknownVersion, VersionExists, VersionIncomplete
from vecsvc.manifest import (
    FORMAT_VERSION,
    Certificate,
    Manifest,
    OperatingPoint,
    Phase,
    Provenance,
    bytes_per_vector,
    check_files,
    encoded_manifest,
    parse_manifest,
    read_manifest,
    write_manifest,
)
from vecsvc.parts import MEND, Part, part_folders, read_part
from vecsvc.push import check_sizes, forget_parts, parts_in, serve
from vecsvc.seal import MAX_MANIFEST_BYTES
from vecsvc.storage import (
    MANIFEST,
    PART,
    STAGING,
    IndexFolder,
    Lease,
    check_name,
    check_version,
    delete_part,
    link_file,
    make_folder,
    take_folder,
)
from vecsvc.stores import Store
from vecsvc.transfer import serves

METHOD: Final = "each shard by itself: {}; the least of the shards' recalls, the sum of their latencies and comparisons"
PUSHED: Final = "part-[0-9][0-9][0-9].json"
MAX_NAMED: Final = 20  # shards that a message names one by one


def publish_at(place: str, version: str, *, name: str = "", require_recall: bool = False) -> tuple[str, Manifest]:
    """Publish the parts in a folder where they were built, or in a store where `vecsvc push --shard` brought them."""
    check_version(version)
    if "://" in place or any(Path(place).glob(f"{version}/{PUSHED}")) or any(Path(place).glob(f"*/{version}/{PUSHED}")):
        return publish_in_store(place, version, name=name, require_recall=require_recall)
    path, manifest = publish(Path(place), version, name=name, require_recall=require_recall)
    return str(path), manifest


def publish(directory: Path, version: str, *, name: str = "", require_recall: bool = False) -> tuple[Path, Manifest]:
    """Publish a version of the parts in `directory`, an index's folder or the one that it lies in, and serve it.

    What served before serves until the last step. A publishing that died can be repeated; one that had come to its
    end changes nothing. Raises UserError, ArtifactError or StorageError.
    """
    check_version(version)
    folder = _index_folder(directory, version, name)
    found = part_folders(folder.path, version)
    if (folder.path / version).exists():
        return _published(folder, version, list(found.values()))
    leases: list[Lease] = []
    try:
        for number, place in found.items():
            lease = Lease.take(place, exclusive=True)
            if lease is None:
                raise VersionExists(
                    f"shard {number} of version {version} is still being built: publish when it is done"
                )
            leases.append(lease)
        parts = {number: read_part(place) for number, place in found.items()}
        manifest = merge([part for part in parts.values() if part is not None], folder.name, version)
        for part in parts.values():
            if part is not None:
                check_files(found[part.number], part.files(), hashes=False, remedy=MEND)
        if require_recall:
            check_recall(manifest)
        _make_version(folder, manifest, found)
    finally:
        for lease in leases:
            lease.release()
    for place in found.values():
        delete_part(place)
    return folder.path / version, manifest


def publish_in_store(
    target: str, version: str, *, name: str = "", require_recall: bool = False
) -> tuple[str, Manifest]:
    """Publish a version of the parts that `vecsvc push --shard` brought into a store; of the shards nothing is read.

    `target` is the index's place in the store or the one that it lies in. Raises what `publish` does.
    """
    index = _index_in_store(Store.open(target), check_version(version), name)
    place = index.at(version)
    parts = parts_in(place)
    data = place.read(MANIFEST, MAX_MANIFEST_BYTES)
    if data is not None:
        if parts:  # of a publishing that died after its version was whole
            serve(index, version)
            forget_parts(place)
        elif serves(index) != version:
            raise VersionExists(
                f"{place.label()} was published before, and no parts are left; serve it: "
                f"vecsvc rollback {index.label()} --to {version}"
            )
        return place.label(), parse_manifest(data, place.label(MANIFEST))
    try:
        manifest = merge(parts, index.name, version)
    except VersionIncomplete as error:
        raise VersionIncomplete(
            f"{error}, and bring it: vecsvc push DIR {index.label()} --version {version} --shard I"
        ) from error
    check_sizes(place, manifest.files())
    if require_recall:
        check_recall(manifest)
    place.put(MANIFEST, encoded_manifest(manifest))
    serve(index, version)
    forget_parts(place)
    return place.label(), manifest


def _index_in_store(store: Store, version: str, name: str) -> Store:
    if name:
        return store if store.name == name else store.at(check_name(name))
    candidates = [store, *(store.at(folder) for folder in store.folders())]
    having = [index for index in candidates if index.names(version)]
    if len(having) == 1:
        return having[0]
    if having:
        raise ConfigError(f"{store.label()} holds several indexes with a version {version}: name one with --name")
    raise UnknownVersion(
        f"{store.label()} holds no part of a version {version}; bring them there: "
        f"vecsvc push DIR {store.label()} --version {version} --shard 0"
    )


def _make_version(folder: IndexFolder, manifest: Manifest, parts: dict[int, Path]) -> None:
    """The parts' files under the version's names: linked, so that a death on the way costs no part anything."""
    staging = folder.path / f"{STAGING}{manifest.version}"
    lease = take_folder(staging, f"version {manifest.version} is being published by another process: let it end")
    try:
        empty(staging)
        first = parts[min(parts)]
        for number, shard in enumerate(manifest.shards):
            for file in shard.files:
                _link(parts[number] / file.path, staging / file.path)
            make_folder(staging / "shards" / f"{number:03d}" / "index")  # of kinds without files of their own
        for file in manifest.shared_files():
            _link(first / file.path, staging / file.path)
        write_manifest(staging, manifest)
        read_manifest(staging)  # what cannot be read back is not published
        folder.publish(staging, manifest.version)
        lease.share()
        folder.serve(manifest.version)
    finally:
        lease.release()


def _link(source: Path, target: Path) -> None:
    make_folder(target.parent)
    link_file(source, target)


def _published(folder: IndexFolder, version: str, left: list[Path]) -> tuple[Path, Manifest]:
    """The rest of a publishing that died after its version was whole; a repeated one finds nothing to do."""
    path = folder.path / version
    manifest = read_manifest(path)
    if left:
        folder.serve(version)
        for place in left:
            delete_part(place)
    elif folder.current() != version:
        raise VersionExists(
            f"version {version} was published before, and no parts are left; serve it: "
            f"vecsvc rollback {folder.path} --to {version}"
        )
    return path, manifest


def _index_folder(directory: Path, version: str, name: str) -> IndexFolder:
    """The folder in which the parts of a version lie, or the version itself."""
    directory = directory.absolute()
    if name:
        return IndexFolder(directory / check_name(name))
    candidates = [directory, *(sorted(f for f in directory.iterdir() if f.is_dir()) if directory.is_dir() else [])]
    having = [f for f in candidates if part_folders(f, version)]
    having = having or [f for f in candidates if not f.name.startswith(".") and (f / version / MANIFEST).is_file()]
    if len(having) == 1:
        return IndexFolder(having[0])
    if having:
        raise ConfigError(f"{directory} holds several indexes with parts of version {version}: name one with --name")
    begun = sorted({f.name.removeprefix(PART)[:-4] for c in candidates for f in c.glob(f"{PART}*-[0-9][0-9][0-9]")})
    raise UnknownVersion(
        f"{directory} holds no part of a version {version}; there are parts of: {', '.join(begun) or 'none'}. "
        f"Build them: vecsvc build-index CORPUS --shard 0/N --version {version}"
    )


# --------------------------------------------------------------------------------------------------- merging


def merge(parts: Sequence[Part], name: str, version: str) -> Manifest:
    """The manifest of a version whose shards are these parts.

    Raises VersionIncomplete where one is missing, PartsDiffer where they are not of one build; both name it.
    """
    parts = sorted(parts, key=lambda part: part.number)
    if not parts:
        raise VersionIncomplete(
            f"no shard of version {version} is finished; build them: vecsvc build-index --shard 0/N"
        )
    _check_alike(parts, name, version)
    first = parts[0]
    missing = sorted({*range(first.shards)} - {part.number for part in parts})
    if missing:
        shown = ", ".join(map(str, missing[:MAX_NAMED])) + (", ..." if len(missing) > MAX_NAMED else "")
        raise VersionIncomplete(
            f"version {version} has {len(parts)} of {first.shards} shards, missing: {shown}. Build what is missing: "
            f"vecsvc build-index CORPUS --name {name} --shard {missing[0]}/{first.shards} --version {version}"
        )
    rows = sum(part.shard.size for part in parts)
    if rows != first.corpus.rows:
        raise PartsDiffer(f"the shards hold {rows} rows, the corpus {first.corpus.rows}: build them all again")
    shards = [part.shard for part in parts]
    certificate, search = _certificate(parts)
    return Manifest(
        format_version=FORMAT_VERSION,
        name=name,
        version=version,
        created=now(),
        spec=replace(first.shard.spec, size=rows),
        search=search,
        partition="hash",
        id_type=first.id_type,
        vector_dtype=first.vector_dtype,
        fields=first.fields,
        shards=shards,
        encoder=first.encoder,
        corpus=first.corpus,
        provenance=_provenance([part.provenance for part in parts]),
        certificate=certificate,
        bytes_per_vector=bytes_per_vector(shards, rows),
    )


def _check_alike(parts: Sequence[Part], name: str, version: str) -> None:
    first = parts[0]
    for part in parts:
        if (part.name, part.version) != (name, version):
            raise PartsDiffer(f"shard {part.number} is of {part.name} {part.version}, not of {name} {version}")
        for what, here, there in _facts(first, part):
            if here != there:
                raise PartsDiffer(
                    f"shards {first.number} and {part.number} are not of one build: {what} is {_shown(here)} and "
                    f"{_shown(there)}; build one of them again"
                )


def _facts(a: Part, b: Part) -> list[tuple[str, Any, Any]]:
    """What two parts of one build have in common: (what, of a, of b), the likeliest mistakes first."""
    names = sorted({*a.settings, *b.settings} - {"questions"})
    libraries = sorted({*a.provenance.libraries, *b.provenance.libraries})
    return [
        ("the number of shards", a.shards, b.shards),
        ("the corpus' sha256", a.corpus.sha256, b.corpus.sha256),
        ("the corpus' rows", a.corpus.rows, b.corpus.rows),
        *((f"--{name.replace('_', '-')}", a.settings.get(name), b.settings.get(name)) for name in names),
        ("the sha256 of its --questions", a.settings.get("questions") or "none", b.settings.get("questions") or "none"),
        ("the encoder", _encoder(a), _encoder(b)),
        *(
            (f"the version of {name}", a.provenance.libraries.get(name), b.provenance.libraries.get(name))
            for name in libraries
        ),
        ("Python", a.provenance.python, b.provenance.python),
        ("the type of ids", a.id_type, b.id_type),
        ("the type of vectors", a.vector_dtype, b.vector_dtype),
        ("the stored fields", a.fields, b.fields),
        ("the dimension", a.shard.spec.dim, b.shard.spec.dim),
        ("the kind", a.shard.spec.kind, b.shard.spec.kind),
    ]


def _encoder(part: Part) -> tuple[str, dict[str, str]] | None:
    """Vectors of canary texts may differ in their last bits from processor to processor, files may not."""
    if part.encoder is None:
        return None
    return part.encoder.fingerprint, {file.path: file.sha256 for file in part.encoder.files}


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _certificate(parts: Sequence[Part]) -> tuple[Certificate | None, dict[str, Any]]:
    """At each operating point that all shards know, the least of their recalls; and the settings to search with."""
    measured = [part.certificate for part in parts if part.certificate is not None]
    if not measured:
        return None, {}
    points = []
    for params in [point.params for point in measured[0].points]:
        same = [point for certificate in measured for point in certificate.points if point.params == params]
        if len(same) == len(measured):
            least = min(same, key=lambda point: (point.recall, -point.recall_error))
            points.append(
                OperatingPoint(
                    params=params,
                    recall=least.recall,
                    recall_error=least.recall_error,
                    latency_ms=round(sum(point.latency_ms for point in same), 4),
                    visited=-1 if min(p.visited for p in same) < 0 else round(sum(p.visited for p in same), 1),
                )
            )
    target = measured[0].target
    given = bool(parts[0].settings.get("questions"))
    chosen, reached = choose(points, target, "" if given else parts[0].shard.spec.kind)
    certificate = Certificate(
        k=min(certificate.k for certificate in measured),
        queries=measured[0].queries if given else sum(certificate.queries for certificate in measured),
        method=METHOD.format(measured[0].method),
        target=target,
        reached=reached,
        points=points,
    )
    return certificate, dict(chosen.params)


def _provenance(parts: Sequence[Provenance]) -> Provenance:
    """Of all machines together: the longest wall time, the sum of processor time, what all processors have."""
    names = list(dict.fromkeys(name for part in parts for name in part.phases))
    phases = {}
    for name in names:
        spent = [part.phases[name] for part in parts if name in part.phases]
        phases[name] = Phase(max(p.wall_s for p in spent), round(sum(p.cpu_s for p in spent), 3))
    return msgspec.structs.replace(
        parts[0],
        cpu="; ".join(dict.fromkeys(part.cpu for part in parts)),
        cpu_features=[f for f in parts[0].cpu_features if all(f in part.cpu_features for part in parts)],
        threads=max(part.threads for part in parts),
        phases=phases,
        peak_rss_bytes=max(part.peak_rss_bytes for part in parts),
    )
