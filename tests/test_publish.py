"""One shard a machine: builders in nobody's way, and a version only of parts that are all there and of one build."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from corpora import GRAPH, answers, build, current_version, file_hashes, make_vectors, strays, write_corpus
from tiny_bert import write_tiny_bert

from index_builders import publish as publish_module
from index_builders import shard_build
from index_builders.certify import MOVED
from index_builders.publish import METHOD, merge, publish
from index_builders.shard_build import PartResult, build_shard
from vecsvc import parts as parts_module
from vecsvc import storage
from vecsvc.config import BuildSettings
from vecsvc.errors import (
    ArtifactDamaged,
    ArtifactUnfit,
    ConfigError,
    PartsDiffer,
    RecallMissed,
    StorageError,
    UnknownVersion,
    UserError,
    VersionExists,
    VersionIncomplete,
)
from vecsvc.manifest import OperatingPoint, read_manifest
from vecsvc.parts import Part, part_folder, part_folders, read_part
from vecsvc.storage import UNPUBLISHED_KEPT_S, IndexFolder, Lease

SHARDS = 3
SETTINGS: dict[str, Any] = {"kind": GRAPH, "fields": "label,text", "certificate_queries": 16, "name": "demo"}
QUERIES = make_vectors(5, 8, seed=9)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "demo.parquet", n=150)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def one(corpus: Path, out: Path, number: int, *, params: Any = None, resume: bool = False, **more: Any) -> PartResult:
    given = {"out": str(out), "threads": 1, "version": "v1", "shard": f"{number}/{SHARDS}", **SETTINGS, **more}
    return build_shard(str(corpus), BuildSettings(**given), params, resume=resume, stream=io.StringIO())


def all_parts(corpus: Path, out: Path, **more: Any) -> list[Part]:
    return [one(corpus, out, number, **more).part for number in range(SHARDS)]


# -------------------------------------------------------------------------------------------------- whole


def test_shards_that_were_built_one_by_one_make_the_version_that_one_build_makes(corpus: Path, out: Path) -> None:
    for number in (2, 0, 1):
        one(corpus, out, number)
        assert IndexFolder(out / "demo").versions() == [] and IndexFolder(out / "demo").current() is None
    path, manifest = publish(out, "v1")
    whole = build(corpus, out, version="v2", **{**SETTINGS, "shards": SHARDS}).manifest
    assert path == out / "demo" / "v1" and current_version(IndexFolder(out / "demo")).version == "v2"
    assert file_hashes(read_manifest(path)) == file_hashes(whole) == file_hashes(manifest)
    kept = ("spec", "partition", "id_type", "vector_dtype", "fields", "shards", "corpus", "bytes_per_vector", "search")
    assert [getattr(manifest, name) for name in kept] == [getattr(whole, name) for name in kept]
    second = answers(out, QUERIES)
    IndexFolder(out / "demo").rollback("v1")
    assert answers(out, QUERIES) == second and not strays(IndexFolder(out / "demo"))


def test_texts_are_encoded_by_the_builder_of_their_shard_alone(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus, bert = write_corpus(tmp_path / "texts.parquet", n=90, dim=0), write_tiny_bert(tmp_path / "bert", dim=8)
    from vecsvc.encoders.onnx import OnnxEncoder

    encode, encoded = OnnxEncoder.encode, []

    def watched(self: Any, texts: Any, role: Any = "query") -> Any:
        encoded.extend(texts if role == "passage" else ())
        return encode(self, texts, role)

    monkeypatch.setattr(OnnxEncoder, "encode", watched)
    sizes = [one(corpus, out, number, encoder=str(bert), batch_rows=7).part.shard.size for number in range(SHARDS)]
    assert len(encoded) == 90 == sum(sizes) and len(set(encoded)) == 90
    manifest = publish(out, "v1")[1]
    settings = {**SETTINGS, "shards": SHARDS, "encoder": str(bert), "version": "v2"}
    whole = build(corpus, out, **settings).manifest
    assert manifest.encoder == whole.encoder and manifest.encoder is not None
    assert {f.path for f in manifest.files()} == {f.path for f in whole.files()}
    rows = [np.load(out / "demo" / v / "shards/001/rows.npy").tolist() for v in ("v1", "v2")]
    vectors = [np.load(out / "demo" / v / "shards/001/vectors.npy") for v in ("v1", "v2")]
    assert rows[0] == rows[1] and np.allclose(*vectors, atol=1e-5)


def test_a_bad_vector_of_a_text_is_told_with_its_row_in_the_corpus(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus, bert = write_corpus(tmp_path / "texts.parquet", n=60, dim=0), write_tiny_bert(tmp_path / "bert", dim=8)
    from vecsvc.encoders.onnx import OnnxEncoder

    encode = OnnxEncoder.encode

    def broken(self: Any, texts: Any, role: Any = "query") -> Any:
        vectors = encode(self, texts, role)
        vectors[[text.endswith(" 41") for text in texts]] = np.nan
        return vectors

    monkeypatch.setattr(OnnxEncoder, "encode", broken)
    with pytest.raises(UserError, match=r"row 41 \(id 'row-0041'\)"):
        for number in range(SHARDS):
            one(corpus, out, number, encoder=str(bert))


def test_builders_of_all_shards_at_once_disturb_each_other_nowhere(corpus: Path, out: Path) -> None:
    with ThreadPoolExecutor(SHARDS) as pool:
        parts = list(pool.map(lambda number: one(corpus, out, number).part, range(SHARDS)))
    manifest = publish(out, "v1")[1]
    assert [shard.files for shard in manifest.shards] == [part.shard.files for part in parts]
    whole = build(corpus, out.parent / "whole", **{**SETTINGS, "shards": SHARDS}).manifest
    assert file_hashes(manifest) == file_hashes(whole) and not strays(IndexFolder(out / "demo"))


def test_the_certificate_is_the_least_of_the_shards_and_says_how_it_was_measured(corpus: Path, out: Path) -> None:
    parts = all_parts(corpus, out, kind="tp_tree", params={"n_trees": 1, "leaf_size": 8})
    manifest = merge(parts, "demo", "v1")
    merged = manifest.certificate
    assert merged is not None and merged.queries == 16 * SHARDS
    assert merged.method == METHOD.format(f"{MOVED}; exact distances; ties are no errors")
    for at, point in enumerate(merged.points):
        own = [part.certificate.points[at] for part in parts if part.certificate is not None]
        assert point.recall == min(one.recall for one in own)
        assert point.latency_ms == pytest.approx(sum(one.latency_ms for one in own), abs=1e-3)
        assert point.params == own[0].params
    chosen = next(point for point in merged.points if point.params == manifest.search)
    assert merged.reached == (chosen.recall - chosen.recall_error >= merged.target)


def test_one_weak_shard_decides_the_search_settings(corpus: Path, out: Path) -> None:
    parts = all_parts(corpus, out)
    certificate = parts[1].certificate
    assert certificate is not None

    def weak(point: OperatingPoint) -> OperatingPoint:
        return msgspec.structs.replace(point, recall=0.5 if point.params["ef_search"] < 256 else 1.0, recall_error=0.0)

    points = [weak(point) for point in certificate.points]
    parts[1] = msgspec.structs.replace(parts[1], certificate=msgspec.structs.replace(certificate, points=points))
    assert merge(parts, "demo", "v1").search == {"ef_search": 256}


def test_a_target_that_one_shard_misses_is_not_published_where_it_is_required(corpus: Path, out: Path) -> None:
    all_parts(corpus, out, kind="tp_tree", params={"n_trees": 1, "leaf_size": 8}, recall=1.0)
    for number, place in part_folders(out / "demo", "v1").items():
        part = read_part(place)
        assert part is not None and part.certificate is not None
        points = [msgspec.structs.replace(point, recall=0.9) for point in part.certificate.points]
        part = msgspec.structs.replace(part, certificate=msgspec.structs.replace(part.certificate, points=points))
        (place / "part.json").write_bytes(parts_module.encoded_part(part))
        assert number == part.number
    with pytest.raises(RecallMissed, match=r"0\.9000"):
        publish(out, "v1", require_recall=True)
    assert IndexFolder(out / "demo").versions() == []
    assert publish(out, "v1")[1].certificate is not None


def test_auto_chooses_one_kind_for_all_shards(corpus: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from index_builders import base

    monkeypatch.setattr(base, "EXACT_UP_TO", 50)  # one shard has more rows than that, another fewer
    monkeypatch.setattr(base, "TREE_UP_TO", 100)
    parts = all_parts(corpus, out, kind="auto")
    assert max(part.shard.size for part in parts) > 50 > min(part.shard.size for part in parts)
    assert {part.shard.spec.kind for part in parts} == {"exact"}


# ------------------------------------------------------------------------------------------------- missing


def test_missing_shards_are_named_and_nothing_is_published(corpus: Path, out: Path) -> None:
    build(corpus, out, version="v0", **SETTINGS)
    before = answers(out, QUERIES)
    one(corpus, out, 1)
    with pytest.raises(VersionIncomplete, match=r"1 of 3 shards, missing: 0, 2\. .*--shard 0/3 --version v1"):
        publish(out, "v1")
    assert IndexFolder(out / "demo").versions() == ["v0"] and answers(out, QUERIES) == before
    for number in (0, 2):
        one(corpus, out, number)
    publish(out / "demo", "v1")
    assert IndexFolder(out / "demo").versions() == ["v0", "v1"]


def test_a_version_without_parts_is_refused_and_those_that_there_are_named(corpus: Path, out: Path) -> None:
    with pytest.raises(UnknownVersion, match="no part of a version v1; there are parts of: none"):
        publish(out, "v1")
    one(corpus, out, 0, version="v-1")
    with pytest.raises(UnknownVersion, match="there are parts of: v-1"):
        publish(out, "v1")
    one(corpus, out, 0, version="v-1", name="other")
    with pytest.raises(ConfigError, match="several indexes with parts of version v-1"):
        publish(out, "v-1")
    with pytest.raises(VersionIncomplete, match="missing: 1, 2"):
        publish(out, "v-1", name="other")


def test_a_shard_that_is_still_being_built_is_named(corpus: Path, out: Path) -> None:
    all_parts(corpus, out)
    lease = Lease.take(part_folder(out / "demo", "v1", 1), exclusive=True)
    assert lease is not None
    with pytest.raises(VersionExists, match="shard 1 of version v1 is still being built"):
        publish(out, "v1")
    with pytest.raises(VersionExists, match="shard 1 of version v1 is being built or published"):
        one(corpus, out, 1)
    lease.release()
    publish(out, "v1")


DIFFERENT: dict[str, tuple[dict[str, Any], str]] = {
    "settings": ({"metric": "l2"}, "--metric is cosine and l2"),
    "a seed": ({"seed": 8}, "--seed is 7 and 8"),
    "fields": ({"fields": "label"}, "--fields is label,text and label"),
    "params": ({"params": {"ef_construction": 20}}, "--params is {} and {'ef_construction': 20}"),
    "a kind": ({"kind": "exact"}, f"--kind is {GRAPH} and exact"),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_parts_of_other_settings_are_refused_by_what_differs(corpus: Path, out: Path, what: str) -> None:
    different, words = DIFFERENT[what]
    all_parts(corpus, out)
    one(corpus, out, 1, **different)
    with pytest.raises(PartsDiffer) as caught:
        publish(out, "v1")
    assert f"shards 0 and 1 are not of one build: {words}" in str(caught.value)
    assert not IndexFolder(out / "demo").versions()


def test_parts_of_another_corpus_or_number_of_shards_are_refused(corpus: Path, out: Path) -> None:
    all_parts(corpus, out)
    one(write_corpus(corpus.with_name("other.parquet"), n=150, seed=8), out, 2)
    with pytest.raises(PartsDiffer, match="shards 0 and 2 are not of one build: the corpus' sha256"):
        publish(out, "v1")
    with pytest.raises(VersionExists, match="holds shard 2 of 3, and --shard says 2/4: choose another --version"):
        one(corpus, out, 2, shard="2/4")
    shutil.rmtree(part_folder(out / "demo", "v1", 2))
    one(corpus, out, 2, shard="2/4")
    with pytest.raises(PartsDiffer, match="shards 0 and 2 are not of one build: the number of shards is 3 and 4"):
        publish(out, "v1")


def test_a_copy_of_the_corpus_and_of_the_encoder_elsewhere_is_the_same(corpus: Path, out: Path, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    copy, bert = shutil.copy(corpus, tmp_path / "b" / "demo.parquet"), write_tiny_bert(tmp_path / "bert", dim=8)
    shutil.copytree(bert, tmp_path / "b" / "bert")
    one(corpus, out, 0, encoder=str(bert))
    one(copy, out, 1, encoder=str(tmp_path / "b" / "bert"), threads=2, batch_rows=10)
    one(corpus, out, 2, encoder=str(bert))
    publish(out, "v1")


def test_parts_with_another_encoder_or_of_other_libraries_are_refused(corpus: Path, out: Path, tmp_path: Path) -> None:
    parts = all_parts(corpus, out, encoder=str(write_tiny_bert(tmp_path / "bert", dim=8)))
    assert parts[1].encoder is not None
    files = [msgspec.structs.replace(parts[1].encoder.files[0], sha256="0" * 64), *parts[1].encoder.files[1:]]
    libraries = {**parts[1].provenance.libraries, "numpy": "1.0"}
    upgraded = msgspec.structs.replace(parts[1].provenance, libraries=libraries)
    changed = {
        "the encoder is": {"encoder": msgspec.structs.replace(parts[1].encoder, files=files)},
        "the encoder is .* and None": {"encoder": None},
        "the version of numpy is .* and 1.0": {"provenance": upgraded},
        "Python is": {"provenance": msgspec.structs.replace(parts[1].provenance, python="3.10.0")},
    }
    for words, change in changed.items():
        with pytest.raises(PartsDiffer, match=words):
            merge([parts[0], msgspec.structs.replace(parts[1], **change), parts[2]], "demo", "v1")
    canaries = [msgspec.structs.replace(canary, vector=[0.0] * 8) for canary in parts[1].encoder.canaries]
    rounded = msgspec.structs.replace(parts[1], encoder=msgspec.structs.replace(parts[1].encoder, canaries=canaries))
    assert merge([parts[0], rounded, parts[2]], "demo", "v1").encoder == parts[0].encoder


def test_rows_that_no_shard_has_are_noticed(corpus: Path, out: Path) -> None:
    parts = all_parts(corpus, out)
    parts[2] = msgspec.structs.replace(parts[2], shard=msgspec.structs.replace(parts[2].shard, size=1))
    with pytest.raises(PartsDiffer, match="rows, the corpus 150"):
        merge(parts, "demo", "v1")


# ------------------------------------------------------------------------------------------------- repeated


def test_a_repeated_builder_resumes_or_replaces_its_own_shard_only(corpus: Path, out: Path) -> None:
    all_parts(corpus, out)
    places = part_folders(out / "demo", "v1")
    before = {n: {p: p.stat().st_mtime_ns for p in place.rglob("*") if p.is_file()} for n, place in places.items()}
    assert one(corpus, out, 1, resume=True).resumed == ["everything"]
    assert one(corpus, out, 2).resumed == []
    after = {n: {p: p.stat().st_mtime_ns for p in place.rglob("*") if p.is_file()} for n, place in places.items()}
    assert (before[0], before[1]) == (after[0], after[1]) and before[2] != after[2]
    assert publish(out, "v1")[1].spec.size == 150


def test_an_interrupted_shard_goes_on_after_its_last_whole_step(
    corpus: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one(corpus, out, 0)
    with monkeypatch.context() as dying:
        dying.setattr(shard_build, "write_part", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            one(corpus, out, 1)
    with pytest.raises(VersionIncomplete, match="missing: 1, 2"):
        publish(out, "v1")
    assert one(corpus, out, 1, resume=True).resumed == ["ingest", "index of shard 1"]
    one(corpus, out, 2)
    whole = build(corpus, out.parent / "whole", **{**SETTINGS, "shards": SHARDS}).manifest
    assert file_hashes(publish(out, "v1")[1]) == file_hashes(whole)


def test_a_damaged_part_is_refused_by_name_and_built_again_by_its_builder(corpus: Path, out: Path) -> None:
    all_parts(corpus, out)
    place = part_folder(out / "demo", "v1", 1)
    (place / "shards/001/ids.arrow").write_bytes(b"short")
    with pytest.raises(ArtifactDamaged, match=r"part-v1-001/shards/001/ids\.arrow"):
        publish(out, "v1")
    assert one(corpus, out, 1, resume=True).resumed == []
    data = (place / "part.json").read_bytes()
    (place / "part.json").write_bytes(data.replace(b'"seed": 7', b'"seed": 8'))
    with pytest.raises(ArtifactDamaged, match=r"part-v1-001/part\.json: is not what was written"):
        publish(out, "v1")
    assert one(corpus, out, 1, resume=True).resumed == ["ingest", "index of shard 1"]
    publish(out, "v1")


@pytest.mark.parametrize(
    "change",
    [
        lambda facts: facts["shard"]["files"][0].update(path="../../../etc/passwd"),
        lambda facts: facts["shard"]["files"][0].update(path="shards/000/rows.npy"),
        lambda facts: facts.update(number=7),
        lambda facts: facts.update(format_version=99),
        lambda facts: facts.update(more=1),
    ],
)
def test_a_part_that_lies_is_refused(corpus: Path, out: Path, change: Callable[[Any], object]) -> None:
    one(corpus, out, 1)
    path = part_folder(out / "demo", "v1", 1) / "part.json"
    document = parts_module.unsealed(path.read_bytes())
    assert document is not None
    facts = json.loads(document)
    change(facts)
    path.write_bytes(parts_module.sealed(json.dumps(facts, indent=2).encode()))
    with pytest.raises((ArtifactDamaged, ArtifactUnfit), match=r"part\.json"):
        publish(out, "v1")


def test_a_publishing_that_is_repeated_changes_nothing(corpus: Path, out: Path) -> None:
    all_parts(corpus, out)
    first = publish(out, "v1")
    assert publish(out, "v1") == (first[0], read_manifest(first[0]))
    build(corpus, out, version="v2", **SETTINGS)
    with pytest.raises(VersionExists, match=r"rollback .*demo --to v1"):
        publish(out, "v1")
    with pytest.raises(VersionExists, match="version v1 is published already"):
        one(corpus, out, 0)
    assert IndexFolder(out / "demo").current() == "v2"


def test_a_publishing_that_died_before_current_can_be_repeated(
    corpus: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    all_parts(corpus, out)
    with monkeypatch.context() as dying:
        dying.setattr(IndexFolder, "serve", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            publish(out, "v1")
    assert IndexFolder(out / "demo").current() is None
    publish(out, "v1")
    assert current_version(IndexFolder(out / "demo")).version == "v1" and not strays(IndexFolder(out / "demo"))


def test_every_step_of_publishing_that_fails_leaves_parts_that_can_be_published(
    corpus: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    all_parts(corpus, out, fields="")
    met = 0
    for nth in range(1, 500):
        seen = 0

        def hook(point: str, nth: int = nth) -> None:
            nonlocal seen
            seen += 1
            if seen == nth:
                raise OSError(5, "Input/output error")

        copy = out.with_name("copy")
        shutil.copytree(out, copy)
        monkeypatch.setattr(storage, "failpoint", hook)
        try:
            publish(copy, "v1")
        except StorageError as error:
            assert "Input/output error" in str(error)
        monkeypatch.setattr(storage, "failpoint", storage.no_failpoint)
        folder = IndexFolder(copy / "demo")
        if seen >= nth:
            met = nth
            folder.sweep()  # as the next build of any version does
            publish(copy, "v1")
        assert folder.current() == "v1" and len(answers(copy, QUERIES)) == 5
        folder.gc(0)
        assert not strays(folder)
        shutil.rmtree(copy)
        if seen < nth:
            break
    assert met > 60


def test_a_file_system_without_links_gets_copies(corpus: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    all_parts(corpus, out)
    monkeypatch.setattr(Path, "hardlink_to", lambda *_: (_ for _ in ()).throw(PermissionError(1, "no links")))
    publish(out, "v1")
    assert current_version(IndexFolder(out / "demo")).version == "v1"


# ---------------------------------------------------------------------------------------------------- gc


def test_parts_wait_for_publishing_whatever_builds_and_gc_do_meanwhile(corpus: Path, out: Path) -> None:
    all_parts(corpus, out)
    build(corpus, out, version="v0", **SETTINGS)
    folder = IndexFolder(out / "demo")
    folder.gc(0)
    assert list(part_folders(out / "demo", "v1")) == [0, 1, 2]
    publish(out, "v1")
    assert part_folders(out / "demo", "v1") == {} and not strays(folder)


def test_gc_takes_parts_that_were_published_or_given_up_and_none_that_is_held(corpus: Path, out: Path) -> None:
    build(corpus, out, version="v1", **SETTINGS)
    folder, old = IndexFolder(out / "demo"), storage.time.time() - UNPUBLISHED_KEPT_S - 60
    for number in range(SHARDS):
        one(corpus, out, number, version="v2")
        place = part_folder(folder.path, "v2", number)
        if number:
            os.utime(place, (old, old))
    lease = Lease.take(part_folder(folder.path, "v2", 1), exclusive=True)
    assert lease is not None
    assert folder.gc(0) == [".part-v2-002"]
    lease.release()
    assert folder.gc(0) == [".part-v2-001"] and list(part_folders(folder.path, "v2")) == [0]
    build(corpus, out, version="v2", **SETTINGS)
    assert folder.gc(1) == [".part-v2-000"] and not strays(folder)


# ------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"shard": "3/3"}, "i from 0 to N-1"),
        ({"shard": "1"}, "must be i/N"),
        ({"shard": "-1/3"}, "must be i/N"),
        ({"shard": "0/0"}, "must be i/N"),
        ({"shard": "0/999"}, "N up to 256"),
        ({"shard": "0/3", "shards": 4}, "--shard 0/3 is one of 3 shards, and --shards says 4"),
        ({"version": ""}, "--shard needs --version"),
        ({"version": "../v"}, "version '../v'"),
        ({"partition": "cluster"}, "--partition hash, got cluster"),
    ],
)
def test_settings_that_cannot_be_are_refused(corpus: Path, out: Path, given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        one(corpus, out, 0, **given)
    assert words in str(caught.value)
    assert not out.exists() or not any(out.rglob("*.npy"))


def test_a_shard_that_gets_no_row_is_refused(tmp_path: Path, out: Path) -> None:
    corpus = write_corpus(tmp_path / "demo.parquet", n=2)
    with pytest.raises(ConfigError, match=r"2 rows leave shard \d+ empty: use fewer --shards"):
        for number in range(SHARDS):
            one(corpus, out, number)


def test_merging_nothing_is_refused() -> None:
    with pytest.raises(VersionIncomplete, match="no shard of version v1 is finished"):
        merge([], "demo", "v1")
    assert publish_module.MAX_NAMED > 0
