"""No damaged file is served or even opened: it is refused by its name, and what served before serves on."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import faiss
import forked
import numpy as np
import onnxruntime
import pyarrow as pa
import pytest
import tokenizers
from corpora import (
    GRAPH,
    GRAPH_FILE,
    HAS_HNSWLIB,
    KINDS,
    answers,
    ask,
    build,
    check_version,
    make_vectors,
    opened,
    write_corpus,
)
from service import Service, started
from tiny_bert import write_tiny_bert

from vecsvc import manifest as manifest_module
from vecsvc.catalog import Catalog, Served
from vecsvc.config import ServeSettings
from vecsvc.errors import ArtifactDamaged, ArtifactError, ArtifactUnfit, EncoderMismatch, NotReady
from vecsvc.manifest import FORMAT_VERSION, read_manifest
from vecsvc.seal import MAX_MANIFEST_BYTES, sealed
from vecsvc.storage import IndexFolder
from vecsvc.types import TextQuery

WITH_ENCODER = GRAPH
WITH_CLUSTERS = "exact"
FLIPS = 20


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An --out folder with an index of each kind: two shards, stored fields, one with an encoder, one with clusters."""
    folder = tmp_path_factory.mktemp("artifacts")
    corpus = write_corpus(folder / "demo.parquet", n=60, dim=16)
    bert = write_tiny_bert(folder / "bert", dim=16)
    for kind in KINDS:
        encoder = str(bert) if kind == WITH_ENCODER else ""
        partition = "cluster" if kind == WITH_CLUSTERS else "hash"
        more: dict[str, Any] = {"shards": 2, "fields": "*", "encoder": encoder, "partition": partition}
        build(corpus, folder / "out", kind=kind, name=kind, version="v1", **more)
    return folder / "out"


@pytest.fixture
def no_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test if anything opens a file of an artifact but to hash it."""

    def loaded(*arguments: object, **named: object) -> NoReturn:
        pytest.fail(f"a damaged artifact was opened: {arguments}")

    for module, name in (
        (faiss, "read_index"),
        (onnxruntime, "InferenceSession"),
        (tokenizers.Tokenizer, "from_file"),
        (tokenizers.Tokenizer, "from_str"),
        (tokenizers.Tokenizer, "from_buffer"),
        (np, "load"),
        (pa.ipc, "open_file"),
        (pa, "memory_map"),
    ):
        monkeypatch.setattr(module, name, loaded)
    if HAS_HNSWLIB:
        monkeypatch.setattr("hnswlib.Index", loaded)


def open_version(artifacts: Path, kind: str, **settings: Any) -> Served:
    return Served(IndexFolder(artifacts / kind), "v1", ServeSettings(**settings))


def refused(artifacts: Path, kind: str, file: Path, **settings: Any) -> str:
    """The message with which the damaged version is refused; it must begin with the file's name."""
    with pytest.raises(ArtifactDamaged) as caught:
        open_version(artifacts, kind, **settings)
    message = str(caught.value)
    assert message.startswith(f"{file}: ") and "\n" not in message, message
    return message


def listed(artifacts: Path, kind: str) -> list[Path]:
    """Every file of the version, in the order of the manifest."""
    version = artifacts / kind / "v1"
    return [version / file.path for file in read_manifest(version).files()] + [version / "manifest.json"]


@contextlib.contextmanager
def restored(*files: Path) -> Iterator[bytes]:
    """The first file's bytes; in the end all files are as they were."""
    before = [file.read_bytes() for file in files]
    try:
        yield before[0]
    finally:
        for file, data in zip(files, before, strict=True):
            if file.is_dir():
                file.rmdir()
            file.unlink(missing_ok=True)
            file.write_bytes(data)


def cuts_and_flips(data: bytes, seed: int) -> Iterator[tuple[str, bytes]]:
    yield "one byte less", data[:-1]
    yield "half", data[: len(data) // 2]
    yield "empty", b""
    yield "one byte more", data + b"\0"
    rng = np.random.default_rng(seed)
    for bit in rng.choice(8 * len(data), min(FLIPS, 8 * len(data)), replace=False).tolist():
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        yield f"bit {bit}", bytes(flipped)


@pytest.mark.parametrize("kind", KINDS)
def test_every_file_with_any_damage_is_refused_by_name_before_anything_opens_it(
    artifacts: Path, kind: str, no_loader: None
) -> None:
    files = listed(artifacts, kind)
    assert len(files) >= 11 and (kind != WITH_ENCODER or any(file.name == "model.onnx" for file in files))
    for number, file in enumerate(files):
        with restored(file) as data:
            for _, damaged in cuts_and_flips(data, seed=number):
                file.write_bytes(damaged)
                refused(artifacts, kind, file)
            file.unlink()
            refused(artifacts, kind, file)
            file.mkdir()
            refused(artifacts, kind, file)
            file.rmdir()
            os.mkfifo(file)
            refused(artifacts, kind, file)
    check_version(artifacts / kind / "v1")


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_replaced_by_a_link_to_the_same_bytes_is_refused(
    artifacts: Path, kind: str, no_loader: None, tmp_path: Path
) -> None:
    for file in listed(artifacts, kind)[:-1]:
        with restored(file):
            moved = shutil.move(file, tmp_path / file.name)
            file.symlink_to(moved)
            assert "symbolic link" in refused(artifacts, kind, file)
    check_version(artifacts / kind / "v1")


@pytest.mark.parametrize("kind", KINDS)
def test_files_that_two_shards_have_swapped_are_refused(artifacts: Path, kind: str, no_loader: None) -> None:
    pairs = [
        (file, Path(str(file).replace("/000/", "/001/"))) for file in listed(artifacts, kind) if "/000/" in str(file)
    ]
    assert len(pairs) >= 5
    for first, second in pairs:
        with restored(first, second) as data:
            assert data != second.read_bytes()
            first.write_bytes(second.read_bytes())
            second.write_bytes(data)
            refused(artifacts, kind, first)
    check_version(artifacts / kind / "v1")


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_are_checked_even_where_hashes_are_not(artifacts: Path, kind: str, no_loader: None) -> None:
    for file in listed(artifacts, kind):
        with restored(file) as data:
            for damaged in (data[:-1], data + b"\0", b""):
                file.write_bytes(damaged)
                refused(artifacts, kind, file, verify="size")
            file.unlink()
            refused(artifacts, kind, file, verify="size")


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_array_header_is_refused_even_where_hashes_are_not_compared(artifacts: Path, kind: str) -> None:
    """verify=size is the operator's choice: a flipped bit may pass, but what NumPy says to it is not ours to show."""
    for number, file in enumerate(file for file in listed(artifacts, kind) if file.suffix == ".npy"):
        with restored(file) as data:
            for _, damaged in cuts_and_flips(data[:128], seed=number):
                if len(damaged) == 128:
                    file.write_bytes(damaged + data[128:])
                    with contextlib.suppress(ArtifactError):
                        open_version(artifacts, kind, verify="size").retire()


def test_a_whole_version_opens(artifacts: Path) -> None:
    for kind in KINDS:
        served = open_version(artifacts, kind)
        assert len(served.shards) == 2 and (served.encoder is not None) == (kind == WITH_ENCODER)
        served.retire()


def test_a_file_that_the_disk_cannot_read_is_refused_by_name(
    artifacts: Path, no_loader: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = listed(artifacts, "exact")[2]
    sha256 = manifest_module.sha256

    def failing(path: Path) -> str:
        if path == file:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return sha256(path)

    monkeypatch.setattr(manifest_module, "sha256", failing)
    assert "cannot be read: Input/output error; serve another version" in refused(artifacts, "exact", file)


def test_a_missing_version_is_refused_by_name(artifacts: Path) -> None:
    with pytest.raises(NotReady, match="exact/v9: missing"):
        Served(IndexFolder(artifacts / "exact"), "v9", ServeSettings())


@pytest.mark.parametrize("sort", ["folder", "pipe", "huge", "link to nowhere"])
def test_a_current_that_is_no_file_of_one_line_is_refused_by_name(artifacts: Path, sort: str) -> None:
    folder = IndexFolder(artifacts / "exact")
    folder.serve("v1")
    current = folder.path / "CURRENT"
    with restored(current):
        current.unlink()
        if sort == "folder":
            current.mkdir()
        elif sort == "pipe":
            os.mkfifo(current)
        elif sort == "huge":
            with current.open("wb") as file:
                file.truncate(1 << 40)
        else:
            current.symlink_to(artifacts / "nowhere")
        if sort == "link to nowhere":
            assert folder.current() is None
        else:
            with pytest.raises(ArtifactDamaged, match=r"/exact/CURRENT: .*run vecsvc rollback"):
                folder.current()
    assert folder.current() == "v1"


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"v1", b"v1\n\n", b"../v1\n", b"v1\0\n", b"\xff\xfe", b"v" * 65 + b"\n", b"v9\n"]
)
def test_a_damaged_current_serves_nothing_but_what_it_names_and_rollback_mends_it(
    artifacts: Path, content: bytes
) -> None:
    folder = IndexFolder(artifacts / "exact")
    folder.serve("v1")
    (folder.path / "CURRENT").write_bytes(content)
    catalog = Catalog(folder.path, ServeSettings())
    catalog.refresh()
    if content == b"v1":  # a missing end of line is no doubt about the version
        assert not catalog.problem()
    else:
        assert catalog.names() == [] and ("CURRENT" in catalog.problem() or "v9" in catalog.problem())
        folder.rollback()
        catalog.refresh()
        assert catalog.names() == ["exact"] and not catalog.problem()
    catalog.close()
    assert folder.current() == "v1"


# --------------------------------------------------------------------------- manifests that were resealed


def reseal(version: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change what the manifest says, and give it the digest that makes it look whole."""
    path = version / "manifest.json"
    facts = json.loads(path.read_bytes())
    del facts["manifest_sha256"]
    change(facts)
    path.write_bytes(sealed(json.dumps(facts, indent=2).encode()))


@pytest.fixture
def resealed(artifacts: Path, tmp_path: Path) -> Callable[[str, Callable[[dict[str, Any]], None]], IndexFolder]:
    def make(kind: str, change: Callable[[dict[str, Any]], None]) -> IndexFolder:
        shutil.copytree(artifacts / kind, tmp_path / kind, dirs_exist_ok=True)
        reseal(tmp_path / kind / "v1", change)
        return IndexFolder(tmp_path / kind)

    return make


Resealed = Callable[[str, Callable[[dict[str, Any]], None]], IndexFolder]


def test_resealing_itself_is_no_damage(resealed: Resealed) -> None:
    for kind in KINDS:
        Served(resealed(kind, lambda facts: None), "v1", ServeSettings()).retire()


@pytest.mark.parametrize("version", [0, FORMAT_VERSION + 1, 2**40])
def test_another_format_is_unfit_and_both_are_named(resealed: Resealed, no_loader: None, version: int) -> None:
    folder = resealed(GRAPH, lambda facts: facts.update(format_version=version, from_the_future={"unknown": []}))
    with pytest.raises(ArtifactUnfit, match=f"manifest.json: has format {version}, this vecsvc reads {FORMAT_VERSION}"):
        Served(folder, "v1", ServeSettings())


@pytest.mark.parametrize(
    "path",
    [
        "../../../../etc/passwd", "/etc/passwd", "shards/000/../../../v2/x", "shards/000/..", "encoder/../../x", "",
        "manifest.json", "shards/000/a/b/c/d", "shards/000/.hidden", "shards/000/a\n", "shards/000/a\0b", "shards\\000",
    ],
)  # fmt: skip
def test_a_path_that_leaves_the_version_is_refused(resealed: Resealed, no_loader: None, path: str) -> None:
    folder = resealed("exact", lambda facts: facts["shards"][0]["files"][0].update(path=path))
    with pytest.raises(ArtifactDamaged, match="is no path inside an artifact"):
        Served(folder, "v1", ServeSettings())


def set_spec(facts: dict[str, Any], **values: Any) -> None:
    """Lie about the whole index and all its shards alike."""
    facts["spec"].update(values)
    for shard in facts["shards"]:
        shard["spec"].update(values)


def grow(facts: dict[str, Any], by: int) -> None:
    for shard in facts["shards"]:
        shard["size"] += by
        shard["spec"]["size"] += by
        facts["spec"]["size"] += by


def shard_pop(facts: dict[str, Any]) -> None:
    facts["spec"]["size"] -= facts["shards"].pop()["size"]


# Lies that some reader must notice, whatever the kind.
LIES: dict[str, Callable[[dict[str, Any]], object]] = {
    "dim more": lambda facts: set_spec(facts, dim=17),
    "dim less": lambda facts: set_spec(facts, dim=8),
    "dim zero": lambda facts: set_spec(facts, dim=0),
    "dim huge": lambda facts: set_spec(facts, dim=2**40),
    "dim of the whole": lambda facts: facts["spec"].update(dim=8),
    "dim of a shard": lambda facts: facts["shards"][1]["spec"].update(dim=8),
    "kind of a shard": lambda facts: facts["shards"][1]["spec"].update(kind="other"),
    "metric of a shard": lambda facts: facts["shards"][1]["spec"].update(metric="l2"),
    "size more": lambda facts: grow(facts, 1),
    "size less": lambda facts: grow(facts, -1),
    "size negative": lambda facts: grow(facts, -100),
    "size huge": lambda facts: grow(facts, 2**40),
    "size of a spec": lambda facts: facts["shards"][0]["spec"].update(size=1),
    "sizes that add up": lambda facts: [s.update(size=s["size"] + 1 - 2 * n) for n, s in enumerate(facts["shards"])],
    "no shards": lambda facts: facts.update(shards=[]),
    "shards in another order": lambda facts: facts["shards"].reverse(),
    "ids of another type": lambda facts: facts.update(id_type="int"),
    "a field too many": lambda facts: facts["fields"].update(none="int8"),
    "a field less": lambda facts: facts["fields"].popitem(),
    "search settings": lambda facts: facts.update(search={"nonsense": 1}),
    "search settings out of bounds": lambda facts: facts.update(search={"ef_search": -5}),
    "a metric": lambda facts: set_spec(facts, metric="hamming"),
    "no kind": lambda facts: facts["spec"].pop("kind"),
    "an unknown key": lambda facts: facts.update(more=1),
    "a type": lambda facts: facts.update(shards={}),
    "hash of a file": lambda facts: facts["shards"][0]["files"][0].update(sha256="0" * 64),
    "size of a file": lambda facts: facts["shards"][0]["files"][0].update(size_bytes=-1),
    "a file that is not there": lambda facts: facts["shards"][0]["files"][0].update(path="shards/000/none"),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_manifest_that_lies_is_refused_when_its_version_is_opened(resealed: Resealed, kind: str) -> None:
    for lie, change in LIES.items():
        with pytest.raises(ArtifactError) as caught:
            Served(resealed(kind, change), "v1", ServeSettings()).retire()
            pytest.fail(f"nobody noticed: {lie}")
        assert "/v1" in str(caught.value) and "\n" not in str(caught.value), lie


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_another_kind_are_refused(resealed: Resealed, kind: str) -> None:
    for other in KINDS:
        folder = resealed(kind, lambda facts: set_spec(facts, kind=other, params={}) or facts.update(search={}))  # noqa: B023
        if other not in (kind, "exact"):  # exact has no files of its own
            with pytest.raises(ArtifactError):
                Served(folder, "v1", ServeSettings())


def test_an_unknown_kind_is_a_problem_that_names_the_known_ones(resealed: Resealed) -> None:
    folder = resealed("exact", lambda facts: set_spec(facts, kind="oracle"))
    catalog = Catalog(folder.path, ServeSettings())
    catalog.refresh()
    assert "'oracle' is no kind of index; known are exact, faiss, hnsw, kd_tree, nng, tp_tree" in catalog.problem()
    catalog.close()


def test_a_manifest_too_large_to_be_one_is_not_read(resealed: Resealed) -> None:
    folder = resealed("exact", lambda facts: None)
    with (folder.path / "v1" / "manifest.json").open("r+b") as file:
        file.truncate(MAX_MANIFEST_BYTES + 1)
    with pytest.raises(ArtifactDamaged, match=r"manifest.json: larger than \d+ bytes"):
        Served(folder, "v1", ServeSettings())


def test_an_encoder_with_other_weights_is_refused_and_both_are_named(artifacts: Path, tmp_path: Path) -> None:
    other = write_tiny_bert(tmp_path / "other-bert", dim=16, seed=8)
    with pytest.raises(EncoderMismatch, match=r"'other-bert' is not 'bert', which the index was built with"):
        open_version(artifacts, WITH_ENCODER, encoder=str(other))
    narrow = write_tiny_bert(tmp_path / "narrow", dim=8)
    with pytest.raises(EncoderMismatch, match=f"'narrow' gives dim 8, index '{WITH_ENCODER}' has dim 16"):
        open_version(artifacts, WITH_ENCODER, encoder=str(narrow))
    same = write_tiny_bert(tmp_path / "same", dim=16)
    with opened(artifacts / WITH_ENCODER, encoder=str(same)) as engine:
        assert ask(engine, TextQuery(["red cat"])).encoder == "same"


# ------------------------------------------------------------------------------ through a running service


@pytest.fixture
def serve() -> Iterator[Callable[..., Service]]:
    """Starts services, which may be loading still; all are ended with the test."""
    with contextlib.ExitStack() as stack:
        yield lambda directory, **settings: stack.enter_context(
            started(directory, reload_poll_s=0.05, search_threads=1, **settings)
        )


def until(what: Callable[[], Any], service: Service, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, f"waited in vain:\n{service.log_file.read_text()[-4000:]}"
        time.sleep(0.02)


def found(service: Service) -> tuple[str, list[Any]]:
    """The version and the ids of an answer."""
    answer = service.search(vector=make_vectors(1, 8, seed=3)[0].tolist(), k=3)
    return answer["index"]["version"], [hit["id"] for hit in answer["results"]]


def wait_until_ready(service: Service, version: str) -> None:
    until(lambda: service.get("/readyz").status == 200 and found(service)[0] == version, service)


def wait_for_problem(service: Service, *words: str) -> None:
    def red() -> bool:
        reply = service.get("/readyz")
        return reply.status == 503 and all(word in reply.message for word in words)

    until(red, service)
    assert service.get("/livez").status == 200


def kill(service: Service) -> None:
    service.process.kill()
    service.process.wait()


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def vecsvc(*arguments: str) -> subprocess.CompletedProcess[str]:
    return forked.run(*arguments)


def publish_damaged(corpus: Path, out: Path, version: str, file: str) -> None:
    """A second version whose file was damaged on its way: there is no moment at which it was whole and served."""
    build(corpus, out / "aside", kind=GRAPH, name="demo", version=version)
    damaged = out / "demo" / version
    shutil.move(out / "aside" / "demo" / version, damaged)
    shutil.rmtree(out / "aside")
    flip(damaged / file)
    IndexFolder(out / "demo").serve(version)


def test_a_service_keeps_answering_from_the_version_before_a_damaged_one_until_rollback_and_after_a_kill(
    tmp_path: Path, serve: Callable[..., Service]
) -> None:
    corpus, out = write_corpus(tmp_path / "demo.parquet", n=60), tmp_path / "out"
    build(corpus, out, kind=GRAPH, version="v1")
    [expected] = answers(out, make_vectors(1, 8, seed=3), k=3)
    ids = [id for id, _ in expected]
    service = serve(out)
    wait_until_ready(service, "v1")
    for number, file in enumerate((f"shards/000/index/{GRAPH_FILE}", "shards/000/vectors.npy", "manifest.json"), 2):
        publish_damaged(corpus, out, f"v{number}", file)
        wait_for_problem(service, f"/demo/v{number}/{file}")
        assert found(service) == ("v1", ids)
        done = vecsvc("rollback", str(out), "--to", "v1")
        assert (done.returncode, done.stderr) == (0, "") and f"v{number} -> v1" in done.stdout
        wait_until_ready(service, "v1")
        assert found(service) == ("v1", ids)
    verified = vecsvc("verify", str(out))
    assert verified.returncode == 1 and len(verified.stderr.splitlines()) == 3 and "demo v1: " in verified.stdout
    build(corpus, out, kind="exact", version="v5")
    wait_until_ready(service, "v5")
    kill(service)  # the kernel lets go of what it held
    assert IndexFolder(out / "demo").gc(0) == ["v1", "v2", "v3", "v4"]
    again = serve(out)
    wait_until_ready(again, "v5")
    assert found(again) == ("v5", ids)


def test_a_service_that_starts_on_a_damaged_version_stays_up_and_says_why(
    tmp_path: Path, serve: Callable[..., Service]
) -> None:
    corpus, out = write_corpus(tmp_path / "demo.parquet", n=60), tmp_path / "out"
    build(corpus, out, version="v1")
    publish_damaged(corpus, out, "v2", "shards/000/ids.arrow")
    service = serve(out)
    wait_for_problem(service, "/demo/v2/shards/000/ids.arrow", "sha256")
    reply = service.get("/search?q=x")
    assert reply.status == 503 and "ids.arrow" in reply.message
    assert IndexFolder(out / "demo").rollback() == ("v2", "v1")
    wait_until_ready(service, "v1")


def test_a_service_with_another_encoder_is_not_ready_and_names_both(
    tmp_path: Path, serve: Callable[..., Service]
) -> None:
    out = tmp_path / "out"
    bert, other = (write_tiny_bert(tmp_path / name, dim=8, seed=seed) for name, seed in (("bert", 7), ("other", 8)))
    build(write_corpus(tmp_path / "demo.parquet", n=60), out, encoder=str(bert), version="v1")
    service = serve(out, encoder=other)
    wait_for_problem(service, "'other' is not 'bert'", "canary cosine")
    assert service.get("/search?q=x").status == 503
    kill(service)
    service = serve(out)
    wait_until_ready(service, "v1")
    assert service.search(text="red cat")["encoder"] == "bert"
