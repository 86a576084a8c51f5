"""What CURRENT names in a store is whole; what is pulled was checked, and what serves here is never in the way."""

from __future__ import annotations

import contextlib
import io
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import forked
import pytest
import s3
from corpora import answers, build, check_version, current_version, make_vectors, strays, write_corpus
from tiny_bert import write_tiny_bert

from index_builders.publish import publish_at, publish_in_store
from index_builders.shard_build import build_shard
from vecsvc import stores, transfer
from vecsvc.catalog import Catalog
from vecsvc.config import BuildSettings, ServeSettings, shard_numbers
from vecsvc.errors import (
    ArtifactDamaged,
    ConfigError,
    PartsDiffer,
    StorageError,
    UnknownVersion,
    VersionExists,
    VersionIncomplete,
)
from vecsvc.manifest import read_manifest
from vecsvc.pull import pull, watch
from vecsvc.push import push, push_part, rollback
from vecsvc.storage import IndexFolder, Lease
from vecsvc.stores import Store

BUCKET = "indexes"
QUERIES = make_vectors(3, 8, seed=5)
SETTINGS: dict[str, Any] = {"kind": "exact", "certificate_queries": 4, "shards": 3}  # few files: each is a request

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with s3.serving() as endpoint:
        with contextlib.closing(s3.client(endpoint)) as client:
            client.create_bucket(Bucket=BUCKET)
        yield endpoint


@pytest.fixture(autouse=True)
def environment(endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    s3.set_environment(endpoint, monkeypatch, tmp_path)
    return monkeypatch


@pytest.fixture(params=["s3", "folder"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The address of an empty store."""
    return f"s3://{BUCKET}/{uuid.uuid4().hex}" if request.param == "s3" else str(tmp_path / "store")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An --out folder with an index of two versions, an encoder in them."""
    folder = tmp_path_factory.mktemp("built")
    encoder = str(write_tiny_bert(folder / "bert", dim=8))
    for number, version in enumerate(("v1", "v2"), 1):
        corpus = write_corpus(folder / "demo.parquet", n=120, seed=number)
        build(corpus, folder / "out", version=version, encoder=encoder, **SETTINGS)
    return folder / "out"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "pulled"


def changed(store: str, path: str, change: Callable[[bytes], bytes | None]) -> None:
    """Change a file of a store behind everybody's back; None deletes it."""
    place = Store.open(store)
    data = place.read(path, 1 << 24)
    assert data is not None
    after = change(data)
    place.delete(path) if after is None else place.put(path, after)


# ------------------------------------------------------------------------------------------ push and pull


def test_what_was_pushed_is_pulled_byte_by_byte_and_answers_alike(built: Path, store: str, out: Path) -> None:
    pushed = push(built, store)
    assert (pushed.name, pushed.version) == ("demo", "v2") and pushed.files == len(
        read_manifest(built / "demo/v2").files()
    )
    [pulled] = pull(store, out)
    assert (pulled.files, pulled.size_bytes) == (pushed.files, pushed.size_bytes) and pulled.place == str(
        out / "demo/v2"
    )
    manifest = current_version(IndexFolder(out / "demo"))
    assert (out / "demo/v2/manifest.json").read_bytes() == (built / "demo/v2/manifest.json").read_bytes()
    assert manifest.version == "v2" and answers(out, QUERIES) == answers(built, QUERIES)
    assert not strays(IndexFolder(out / "demo"))


def test_an_address_may_name_the_index_or_where_indexes_lie(built: Path, store: str, out: Path) -> None:
    push(built / "demo", f"{store}/demo")
    assert [moved.name for moved in pull(f"{store}/demo", out / "a")] == ["demo"]
    assert [moved.name for moved in pull(store, out / "b")] == ["demo"]
    shutil.copytree(built / "demo", out / "more" / "other")
    push(out / "more", store, version="v1")
    assert [(moved.name, moved.version) for moved in pull(store, out / "b")] == [("demo", "v2"), ("other", "v1")]


def test_files_come_before_the_manifest_and_current_last(
    built: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    for name in ("put", "put_file"):
        method = getattr(Store, name)

        def watched(self: Store, path: str, *rest: Any, method: Any = method) -> None:
            method(self, path, *rest)
            written.append(self.label(path).partition("/demo/")[2])

        monkeypatch.setattr(Store, name, watched)
    push(built, store)
    files = {f"v2/{file.path}" for file in read_manifest(built / "demo/v2").files()}
    assert set(written[:-2]) == files and written[-2:] == ["v2/manifest.json", "CURRENT"]


def test_a_push_that_died_leaves_nothing_that_is_pulled_and_begins_anew(
    built: Path, store: str, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(built, store, version="v1")
    with monkeypatch.context() as dying:
        dying.setattr(Store, "put", lambda *_: (_ for _ in ()).throw(StorageError("died")))  # after the files
        with pytest.raises(StorageError, match="died"):
            push(built, store)
    assert [moved.version for moved in pull(store, out)] == ["v1"]
    assert push(built, store).files > 0
    assert [moved.version for moved in pull(store, out)] == ["v2"]


def test_what_is_there_already_is_not_sent_or_brought_again(built: Path, store: str, out: Path) -> None:
    push(built, store)
    assert pull(store, out)[0].files > 0
    assert push(built, store).files == 0 and pull(store, out)[0].files == 0
    assert push(built, store, version="v1").files > 0
    assert [moved.version for moved in pull(store, out)] == ["v1"]
    assert push(built, store, version="v2").files == 0, "a rollback of the store sends nothing"
    assert pull(store, out)[0].files == 0 and IndexFolder(out / "demo").current() == "v2"


def test_another_build_of_the_same_name_is_refused_in_both_directions(
    built: Path, store: str, out: Path, tmp_path: Path
) -> None:
    push(built, store)
    corpus = write_corpus(tmp_path / "demo.parquet", n=60, seed=9)
    build(corpus, tmp_path / "other", version="v2", **SETTINGS)
    with pytest.raises(VersionExists, match="v2 is another build of that name"):
        push(tmp_path / "other", store)
    with pytest.raises(VersionExists, match="is another build than"):
        pull(store, tmp_path / "other")
    check_version(tmp_path / "other/demo/v2")


def test_a_damaged_file_is_not_pushed(built: Path, store: str, tmp_path: Path) -> None:
    shutil.copytree(built, tmp_path / "out")
    file = tmp_path / "out/demo/v2/shards/001/vectors.npy"
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    with pytest.raises(StorageError, match=r"shards/001/vectors\.npy is not what its manifest says"):
        push(tmp_path / "out", store)
    file.write_bytes(b"short")
    with pytest.raises(ArtifactDamaged, match=r"shards/001/vectors\.npy"):
        push(tmp_path / "out", store)
    with pytest.raises(UnknownVersion, match="holds no index"):
        pull(store, tmp_path / "pulled")


# --------------------------------------------------------------------------------------------- damage


def flip(data: bytes) -> bytes:
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]


@pytest.mark.parametrize(
    ("path", "change"),
    [
        ("shards/001/vectors.npy", flip),
        ("shards/001/vectors.npy", lambda data: data + b"x" * 9),
        ("shards/001/rows.npy", lambda data: None),
        ("encoder/model.onnx", lambda data: data[:-1]),
    ],
)
def test_a_damaged_file_is_refused_by_name_and_what_serves_stays(
    built: Path, store: str, out: Path, path: str, change: Callable[[bytes], bytes | None]
) -> None:
    push(built, store, version="v1")
    pull(store, out)
    before = answers(out, QUERIES)
    push(built, store)
    changed(f"{store}/demo/v2", path, change)
    with pytest.raises((ArtifactDamaged, StorageError), match=f"demo/v2/{path}"):
        pull(store, out)
    folder = IndexFolder(out / "demo")
    assert (folder.current(), folder.versions()) == ("v1", ["v1"]) and answers(out, QUERIES) == before
    # Of one size the store cannot tell it from the right one, so that takes a push of everything.
    assert push(built, store).files == (0 if change is flip else 1)
    push(built, store, again=True)
    pull(store, out)
    assert current_version(folder).version == "v2" and not strays(folder)


@pytest.mark.parametrize(
    ("path", "change", "words"),
    [
        ("v2/manifest.json", flip, "is not what was written"),
        ("v2/manifest.json", lambda data: None, "missing, though"),
        ("CURRENT", lambda data: b"../../etc\n", "names no version"),
        ("CURRENT", lambda data: b"\xff\n", "names no version"),
        ("CURRENT", lambda data: b"v" * 300, "more than 256 bytes"),
        ("CURRENT", lambda data: b"v3\n", "missing, though"),
    ],
)
def test_a_damaged_manifest_or_current_is_refused_by_name(
    built: Path, store: str, out: Path, path: str, change: Callable[[bytes], bytes | None], words: str
) -> None:
    push(built, store)
    changed(f"{store}/demo", path, change)
    with pytest.raises((ArtifactDamaged, StorageError), match=words):
        pull(f"{store}/demo", out)
    assert not any(out.rglob("*.npy"))


def test_a_file_larger_than_its_manifest_says_is_not_read_to_its_end(
    built: Path, store: str, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(built, store)
    changed(f"{store}/demo/v2", "shards/000/rows.npy", lambda data: data + bytes(1 << 20))
    brought: list[int] = []
    monkeypatch.setattr(stores, "CHUNK_BYTES", 1 << 12)
    with pytest.raises(ArtifactDamaged, match=r"shards/000/rows\.npy"):
        pull(store, out, going_on=lambda: brought.append(1))
    whole = sum(file.size_bytes for file in read_manifest(built / "demo/v2").files())
    assert len(brought) * (1 << 12) < 2 * whole + (1 << 19)


def test_a_pull_that_died_goes_on_with_the_files_that_were_whole(
    built: Path, store: str, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(built, store)
    monkeypatch.setattr(transfer, "TRANSFERS", 1)
    fetch, fetched = Store.fetch, list[str]()

    def dying(self: Store, path: str, target: Path, *rest: Any) -> str:
        fetched.append(path)
        if len(fetched) == 8:
            target.write_bytes(b"half")
            raise KeyboardInterrupt
        return fetch(self, path, target, *rest)

    monkeypatch.setattr(Store, "fetch", dying)
    with pytest.raises(KeyboardInterrupt):
        pull(store, out)
    (out / "demo/.staging-v2/shards/stray").write_bytes(b"")
    before = list(fetched)
    pull(store, out)
    assert not set(before[:7]) & set(fetched[8:]) and before[7] in fetched[8:]
    assert current_version(IndexFolder(out / "demo")).version == "v2" and not strays(IndexFolder(out / "demo"))


# ---------------------------------------------------------------------------------------------- some shards


def test_only_the_files_of_the_shards_that_are_wanted_come(built: Path, store: str, out: Path) -> None:
    push(built, store)
    [moved] = pull(store, out, shards=frozenset({0, 2}))
    manifest = read_manifest(out / "demo/v2")
    here = {path.relative_to(out / "demo/v2").as_posix() for path in (out / "demo/v2").rglob("*") if path.is_file()}
    wanted = {file.path for file in manifest.files() if not file.path.startswith("shards/001/")}
    assert here == wanted | {"manifest.json"} and moved.files == len(wanted)
    assert len(manifest.shards) == 3 and any(path.startswith("encoder/") for path in here)
    assert pull(store, out, shards=frozenset({2}))[0].files == 0
    [more] = pull(store, out)
    assert more.files == len(manifest.files()) - len(wanted)
    check_version(out / "demo/v2")
    assert answers(out, QUERIES) == answers(built, QUERIES) and not strays(IndexFolder(out / "demo"))


def test_a_shard_that_is_added_appears_whole_or_not_at_all(built: Path, store: str, out: Path) -> None:
    push(built, store)
    pull(store, out, shards=frozenset({0}))
    changed(f"{store}/demo/v2", "shards/001/ids.arrow", flip)
    with pytest.raises(ArtifactDamaged, match=r"shards/001/ids\.arrow"):
        pull(store, out, shards=frozenset({0, 1}))
    assert sorted(path.name for path in (out / "demo/v2/shards").iterdir()) == ["000"]


def test_a_shard_that_there_is_not_is_refused_with_those_that_there_are(built: Path, store: str, out: Path) -> None:
    push(built, store)
    with pytest.raises(ConfigError, match="has shards 0 to 2, and no shard 7"):
        pull(store, out, shards=frozenset({0, 7}))


def test_clusters_bring_their_centroids_whatever_shards_are_wanted(store: str, out: Path, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "demo.parquet", n=90)
    build(corpus, tmp_path / "out", partition="cluster", **SETTINGS)
    push(tmp_path / "out", store)
    [moved] = pull(store, out, shards=frozenset({1}))
    assert (Path(moved.place) / "centroids.npy").is_file() and not (Path(moved.place) / "shards/000").exists()


def test_numbers_of_shards_are_numbers_and_ranges() -> None:
    assert shard_numbers("") is None
    assert shard_numbers("0") == {0} and shard_numbers("0,2-4,255") == {0, 2, 3, 4, 255}
    for text in (",", "a", "3-1", "0-256", "-1", "0;1", "1-", "9999999999"):
        with pytest.raises(ConfigError, match="--shards takes"):
            shard_numbers(text)


# ---------------------------------------------------------------------------------------- parts of a version


def one(corpus: Path, out: Path, number: int, **more: Any) -> None:
    given = {**SETTINGS, "out": str(out), "threads": 1, "version": "v1", "shard": f"{number}/3", **more}
    build_shard(str(corpus), BuildSettings(**given), stream=io.StringIO())


def test_nodes_without_a_common_disk_build_one_version_through_a_store(store: str, out: Path, tmp_path: Path) -> None:
    corpus, bert = write_corpus(tmp_path / "demo.parquet", n=90), write_tiny_bert(tmp_path / "bert", dim=8)
    for number in (1, 2, 0):
        with pytest.raises((VersionIncomplete, UnknownVersion)):
            publish_at(store, "v1")
        one(corpus, tmp_path / f"node-{number}", number, encoder=str(bert))
        moved = push_part(tmp_path / f"node-{number}", store, "v1", number)
        assert (moved.files > 4) == (number == 1), "the encoder is sent by the first alone"
        with pytest.raises(UnknownVersion, match="holds no index"):
            pull(store, out)
    label, manifest = publish_at(store, "v1")
    assert label.endswith("/demo/v1") and manifest.spec.size == 90
    pull(store, out)
    build(corpus, tmp_path / "whole", version="v1", encoder=str(bert), **SETTINGS)
    whole = current_version(IndexFolder(tmp_path / "whole/demo"))
    pulled = current_version(IndexFolder(out / "demo"))
    assert pulled == manifest and pulled.shards == whole.shards and pulled.encoder == whole.encoder
    assert answers(out, QUERIES) == answers(tmp_path / "whole", QUERIES)
    assert publish_at(store, "v1") == (label, manifest), "a repeated one changes nothing"
    assert not [name for name in Store.open(f"{store}/demo/v1").names() if name.startswith("part-")]
    with pytest.raises(VersionExists, match="is published already"):
        push_part(tmp_path / "node-1", store, "v1", 1)


def test_a_published_version_is_mended_by_who_built_the_shard_or_has_a_copy_of_it(store: str, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "demo.parquet", n=90)
    for number in range(3):
        one(corpus, tmp_path / "node", number)
        push_part(tmp_path / "node", store, "v1", number)
    publish_at(store, "v1")
    pull(store, tmp_path / "copy", shards=frozenset({1}))
    one(write_corpus(tmp_path / "demo-2.parquet", n=90, seed=9), tmp_path / "other", 1, name="demo")
    file = "shards/001/vectors.npy"
    whole = Store.open(f"{store}/demo/v1").read(file, 1 << 24)
    with pytest.raises(VersionExists, match="of another build than this shard 1"):
        push_part(tmp_path / "other", store, "v1", 1, again=True)
    for mend in (
        lambda: push_part(tmp_path / "node", store, "v1", 1, again=True),
        lambda: push(tmp_path / "copy", store, again=True),
    ):
        changed(f"{store}/demo/v1", file, flip)
        mend()
        assert Store.open(f"{store}/demo/v1").read(file, 1 << 24) == whole
        assert not [name for name in Store.open(f"{store}/demo/v1").names() if name.startswith("part-")]
    # What is damaged here does not take the place of what may be whole there.
    for place in (tmp_path / "copy/demo/v1", tmp_path / "node/demo/.part-v1-001"):
        (place / file).write_bytes(flip((place / file).read_bytes()))
    for mend in (
        lambda: push(tmp_path / "copy", store, again=True),
        lambda: push_part(tmp_path / "node", store, "v1", 1, again=True),
    ):
        with pytest.raises(ArtifactDamaged, match=file):
            mend()
        assert Store.open(f"{store}/demo/v1").read(file, 1 << 24) == whole
    shutil.rmtree(tmp_path / "copy")
    pull(store, tmp_path / "copy", shards=frozenset({1}))
    # What the copy does not have, it cannot mend.
    changed(f"{store}/demo/v1", "shards/002/vectors.npy", lambda data: data[:-1])
    with pytest.raises(StorageError, match=r"shards/002/vectors\.npy: has \d+ bytes"):
        push(tmp_path / "copy", store, again=True)
    with pytest.raises(VersionIncomplete, match=r"holds shards 1 of 3, and .* is not there yet"):
        push(tmp_path / "copy", f"{store}/elsewhere")


def test_a_damaged_copy_is_mended_from_the_store_and_a_service_takes_it(built: Path, store: str, out: Path) -> None:
    push(built, store)
    pull(store, out)
    folder, file = IndexFolder(out / "demo"), "shards/001/vectors.npy"
    whole = (out / "demo/v2" / file).read_bytes()
    catalog = Catalog(out, ServeSettings())
    (out / "demo/v2" / file).write_bytes(flip(whole))
    (out / "demo/v2/encoder/tokenizer.json").unlink()
    catalog.refresh()
    assert "tokenizer.json: missing" in catalog.problem()
    [moved] = pull(store, out)
    assert moved.files == 1, "of the right size it seems whole"
    catalog.refresh()
    assert f"{file}: sha256 is" in catalog.problem() and "vecsvc pull STORE DIR --again" in catalog.problem()
    [moved] = pull(store, out, again=True)
    assert moved.files == 1 and (out / "demo/v2" / file).read_bytes() == whole
    catalog.refresh()
    assert not catalog.problem() and catalog.names() == ["demo"]
    catalog.close()
    assert pull(store, out, again=True)[0].files == 0 and not strays(folder)


def test_a_damaged_manifest_in_a_store_is_mended(built: Path, store: str, out: Path) -> None:
    push(built, store)
    changed(f"{store}/demo/v2", "manifest.json", lambda data: data[:-5])
    with pytest.raises(VersionExists, match=r"v2/manifest\.json is damaged: mend it with --again"):
        push(built, store)
    push(built, store, again=True)
    pull(store, out)
    check_version(out / "demo/v2")


def test_no_index_hides_another_in_a_store(built: Path, store: str, tmp_path: Path) -> None:
    build(write_corpus(tmp_path / "other.parquet", n=20), tmp_path / "out", **SETTINGS)
    push(tmp_path / "out", f"{store}/demo")
    with pytest.raises(
        ConfigError, match=r"demo holds other, and by its name would be the index demo itself: push to "
    ):
        push(built, f"{store}/demo")
    push(built, f"{store}/demo/demo")
    assert [moved.name for moved in pull(f"{store}/demo", tmp_path / "all")] == ["demo", "other"]
    push(built, f"{store}/second")
    with pytest.raises(ConfigError, match="is an index itself, and none can lie in it"):
        push(tmp_path / "out", f"{store}/second/demo")


def test_an_older_version_serves_again_in_a_store_and_watchers_follow(built: Path, store: str, out: Path) -> None:
    push(built, store, version="v1")
    push(built, store)
    with pytest.raises(UnknownVersion, match=r"--to is missing: .* others than v2, which serves: v1$"):
        rollback(store, None)
    with pytest.raises(UnknownVersion, match="there is no v3"):
        rollback(store, "v3")
    with pytest.raises(ConfigError, match="must be 1 to 64"):
        rollback(store, "../v1")
    with watching(store, out):
        until(lambda: IndexFolder(out / "demo").current() == "v2")
        assert rollback(f"{store}/demo", "v1") == ("v2", "v1")
        until(lambda: IndexFolder(out / "demo").current() == "v1")
    with pytest.raises(VersionExists, match=r"vecsvc rollback .*demo --to v2"):
        publish_in_store(store, "v2", name="demo")
    changed(f"{store}/demo/v2", "shards/000/vectors.npy", lambda data: data[:-1])
    with pytest.raises(StorageError, match="push it with --again"):
        rollback(store, "v2")
    push(built, store, again=True)  # mends v2
    assert Store.open(f"{store}/demo").read("CURRENT", 100) == b"v1\n", "what is mended does not serve by that"
    # Neither a damaged nor a lost CURRENT is in the way.
    changed(f"{store}/demo", "CURRENT", lambda data: b"???")
    assert rollback(store, "v2") == ("none", "v2")
    changed(f"{store}/demo", "CURRENT", lambda data: None)
    with pytest.raises(UnknownVersion, match=r"has no CURRENT; let one of v1, v2 serve: vecsvc rollback .*demo --to"):
        pull(f"{store}/demo", out)
    with pytest.raises(VersionExists, match=r"vecsvc rollback .*demo --to v2"):
        publish_in_store(store, "v2", name="demo")
    assert rollback(store, "v1") == ("none", "v1")
    with pytest.raises(ConfigError, match="must be 1 to 64"):
        rollback(store, "")


def test_parts_in_a_store_that_are_damaged_missing_or_of_other_builds_are_not_published(
    store: str, tmp_path: Path
) -> None:
    corpus = write_corpus(tmp_path / "demo.parquet", n=90)
    for number in range(3):
        one(corpus, tmp_path / "node", number)
    with pytest.raises(VersionIncomplete, match="shard 5 of version v1 is not built"):
        push_part(tmp_path / "node", store, "v1", 5)
    for number in (0, 2):
        push_part(tmp_path / "node", store, "v1", number)
    with pytest.raises(VersionIncomplete, match=r"2 of 3 shards, missing: 1\."):
        publish_at(store, "v1")
    push_part(tmp_path / "node", store, "v1", 1)
    changed(f"{store}/demo/v1", "shards/001/vectors.npy", lambda data: data[:-1])
    with pytest.raises(StorageError, match=r"demo/v1/shards/001/vectors\.npy: has \d+ bytes, expected"):
        publish_at(store, "v1")
    push_part(tmp_path / "node", store, "v1", 1)
    changed(f"{store}/demo/v1", "part-001.json", flip)
    with pytest.raises(ArtifactDamaged, match=r"part-001\.json"):
        publish_at(store, "v1")
    one(corpus, tmp_path / "node", 1, seed=8)
    push_part(tmp_path / "node", store, "v1", 1)
    with pytest.raises(PartsDiffer, match="--seed is 7 and 8"):
        publish_at(f"{store}/demo", "v1")
    assert "CURRENT" not in Store.open(f"{store}/demo").names()


# --------------------------------------------------------------------------------------------------- watch


@contextlib.contextmanager
def watching(store: str, out: Path, **more: Any) -> Iterator[list[str]]:
    said: list[str] = []
    stop = threading.Event()
    given = {"shards": None, "every_s": 0.05, "keep": 1, **more}
    thread = threading.Thread(target=lambda: watch(store, out, stop=stop, say=said.append, warn=said.append, **given))
    thread.start()
    try:
        yield said
    finally:
        stop.set()
        thread.join(20)
        assert not thread.is_alive()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_watcher_follows_the_store_and_removes_what_nobody_needs(built: Path, store: str, out: Path) -> None:
    folder = IndexFolder(out / "demo")
    with watching(store, out, keep=0) as said:
        until(lambda: bool(said))
        assert "holds no index" in said[0] and "trying again every 0.05 s" in said[0]
        push(built, store, version="v1")
        until(lambda: folder.current() == "v1")
        lease = Lease.take(out / "demo/v1", exclusive=False)  # somebody serves it
        assert lease is not None
        push(built, store)
        until(lambda: folder.current() == "v2" and "v2" in said[-1])
        time.sleep(0.2)
        assert folder.versions() == ["v1", "v2"]
        lease.release()
        push(built, store, version="v1")
        until(lambda: folder.current() == "v1" and folder.versions() == ["v1"])
        assert len(said) < 10, "what is known already is not said again"
    check_version(out / "demo/v1")


def test_a_rollback_beside_a_watcher_holds_until_the_store_moves_on(built: Path, store: str, out: Path) -> None:
    folder = IndexFolder(out / "demo")
    push(built, store, version="v1")
    pull(store, out)
    push(built, store)
    with watching(store, out):
        until(lambda: folder.current() == "v2")
        folder.rollback("v1")
        time.sleep(0.3)
        assert folder.current() == "v1"


def test_a_watcher_outlives_a_damaged_version_and_takes_it_once_it_is_mended(
    built: Path, store: str, out: Path
) -> None:
    push(built, store, version="v1")
    with watching(store, out) as said:
        until(lambda: IndexFolder(out / "demo").current() == "v1")
        push(built, store)
        file = "shards/000/vectors.npy"
        changed(f"{store}/demo/v2", file, flip)
        until(lambda: IndexFolder(out / "demo").current() == "v2" or any(file in line for line in said))
        Store.open(f"{store}/demo/v2").put(file, (built / "demo/v2" / file).read_bytes())
        until(lambda: IndexFolder(out / "demo").current() == "v2")
    check_version(out / "demo/v2")


def test_sigterm_ends_a_watching_command_in_time(built: Path, store: str, out: Path) -> None:
    push(built, store)
    command = [sys.executable, "-c", "from vecsvc.cli import main; main()", "pull", store, str(out), "--watch", "60"]
    watcher = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert watcher.stdout is not None
    assert "demo v2: " in watcher.stdout.readline()
    watcher.send_signal(signal.SIGTERM)
    assert watcher.wait(timeout=20) == 0
    watcher.stdout.close()
    assert current_version(IndexFolder(out / "demo")).version == "v2"


# -------------------------------------------------------------------------------------------------- trouble


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("s3://", "s3://bucket/key"),
        ("gs://bucket/x", "a store is a local path or s3://bucket/key"),
        ("s3://key:hunter2@indexes/x", "AWS_ACCESS_KEY_ID"),
    ],
)
def test_addresses_that_cannot_be_are_refused_and_secrets_not_repeated(
    built: Path, out: Path, address: str, words: str
) -> None:
    for work in (lambda: push(built, address), lambda: pull(address, out)):
        with pytest.raises(ConfigError, match=words) as caught:
            work()
        assert "hunter2" not in str(caught.value)


def test_a_store_that_is_not_there_is_told_within_seconds(
    built: Path, out: Path, environment: pytest.MonkeyPatch
) -> None:
    environment.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    for work in (lambda: push(built, f"s3://{BUCKET}/x"), lambda: pull(f"s3://{BUCKET}/x", out)):
        with pytest.raises(StorageError, match=rf"s3://{BUCKET}/x.*AWS_ENDPOINT_URL") as caught:
            work()
        assert "\n" not in str(caught.value)


def test_a_bucket_that_is_not_there_is_told(built: Path, out: Path) -> None:
    with pytest.raises(StorageError, match="no-such-bucket"):
        push(built, "s3://no-such-bucket/x")
    with pytest.raises((StorageError, UnknownVersion), match="no-such-bucket"):
        pull("s3://no-such-bucket/x", out)


def test_a_version_that_another_process_pulls_is_left_to_it(built: Path, store: str, out: Path) -> None:
    push(built, store)
    (out / "demo/.staging-v2").mkdir(parents=True)
    lease = Lease.take(out / "demo/.staging-v2", exclusive=True)
    assert lease is not None
    with pytest.raises(VersionExists, match="v2 is being pulled or built by another process"):
        pull(store, out)
    lease.release()
    pull(store, out)


def test_verify_and_inspect_know_a_version_that_was_pulled_in_part(built: Path, store: str, out: Path) -> None:
    push(built, store)
    pull(store, out, shards=frozenset({1}))

    def said(*words: str) -> tuple[int, str]:
        done = forked.run(*words)
        return done.returncode, done.stdout + done.stderr

    code, text = said("verify", str(out))
    assert code == 0 and "are what was written; not here: shards 0, 2" in text
    assert '"damage":null' in said("inspect", str(out), "--versions", "--json")[1]
    (out / "demo/v2/shards/001/ids.arrow").unlink()
    code, text = said("verify", str(out))
    assert code == 1 and "shards/001/ids.arrow: missing" in text
