"""Versions are swapped under use without a question noticing, and what cannot be served is said, once."""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpora import ask, build, make_vectors, write_corpus

from vecsvc import catalog as catalog_module
from vecsvc.catalog import Catalog, Served
from vecsvc.config import ServeSettings
from vecsvc.engine import Engine
from vecsvc.errors import NotReady, UnknownIndex
from vecsvc.storage import IndexFolder, Lease
from vecsvc.telemetry import Metrics

QUERY = make_vectors(1, 8, seed=3)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An --out folder where `demo` has v1 and v2 of different corpora, and v1 serves."""
    for version, seed in (("v1", 1), ("v2", 2)):
        build(write_corpus(tmp_path / "demo.parquet", n=40, seed=seed), tmp_path / "out", version=version)
    IndexFolder(tmp_path / "out" / "demo").serve("v1")
    return tmp_path / "out"


@pytest.fixture
def folder(out: Path) -> IndexFolder:
    return IndexFolder(out / "demo")


@pytest.fixture
def catalog(out: Path) -> Iterator[Catalog]:
    catalog = Catalog(out, ServeSettings())
    yield catalog
    catalog.close()


@pytest.fixture
def engine(catalog: Catalog) -> Iterator[Engine]:
    engine = Engine(catalog, ServeSettings(), Metrics(), threads=1)
    yield engine
    engine.close()


def add(out: Path, name: str, version: str = "v1") -> IndexFolder:
    build(write_corpus(out.parent / "more.parquet", n=20), out, name=name, version=version)
    return IndexFolder(out / name)


def damage(folder: IndexFolder, version: str) -> None:
    with (folder.path / version / "shards/000/vectors.npy").open("r+b") as file:
        file.write(b"X")


def held(folder: IndexFolder, version: str) -> bool:
    """Whether somebody has the version open, as gc sees it."""
    lease = Lease.take(folder.path / version, exclusive=True)
    if lease is not None:
        lease.release()
    return lease is None


def nearest(served: Served) -> list[int]:
    labels: list[int] = served.shards[0].search(QUERY, 3, served.params).labels[0].tolist()
    return labels


# ------------------------------------------------------------------------------------------------ swapping


def test_what_current_names_is_opened_and_swapped_in(catalog: Catalog, folder: IndexFolder) -> None:
    assert catalog.refresh() == [("demo", "v1")]
    assert catalog.get("demo") is catalog.get(None) and catalog.get(None).version == "v1"
    assert catalog.refresh() == [], "nothing is new"
    folder.serve("v2")
    assert catalog.refresh() == [("demo", "v2")]
    assert catalog.get(None).version == "v2" and not catalog.problem()
    folder.rollback("v1")
    assert catalog.refresh() == [("demo", "v1")]


def test_a_version_in_use_stays_open_until_its_last_user_lets_go_and_then_gc_may_have_it(
    catalog: Catalog, engine: Engine, folder: IndexFolder
) -> None:
    catalog.refresh()
    first, second = engine.retained("demo"), engine.retained(None)
    assert first is second and first.version == "v1"
    before = nearest(first)
    folder.serve("v2")
    catalog.refresh()
    assert folder.gc(0) == [] and held(folder, "v1")
    assert nearest(first) == before
    first.release()
    assert folder.gc(0) == [] and nearest(second) == before
    second.release()
    assert not held(folder, "v1")
    assert folder.gc(0) == ["v1"]
    assert held(folder, "v2") and catalog.get(None).version == "v2"


def test_a_version_that_nobody_uses_is_closed_when_it_is_swapped_out(
    catalog: Catalog, engine: Engine, folder: IndexFolder
) -> None:
    catalog.refresh()
    engine.retained(None).release()
    assert held(folder, "v1"), "the one that serves stays open without users"
    folder.serve("v2")
    catalog.refresh()
    assert not held(folder, "v1")
    assert folder.gc(0) == ["v1"]
    assert nearest(catalog.get(None))


def test_a_swap_between_looking_up_and_keeping_is_not_noticed(
    catalog: Catalog, engine: Engine, folder: IndexFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog.refresh()
    get = catalog.get

    def and_swap(name: str | None) -> Served:
        found = get(name)
        if found.version == "v1":
            folder.serve("v2")
            catalog.refresh()
        return found

    monkeypatch.setattr(catalog, "get", and_swap)
    served = engine.retained("demo")
    assert served.version == "v2" and nearest(served)
    assert not held(folder, "v1")
    served.release()
    assert held(folder, "v2"), "the one that serves is not closed by its last user"


def test_questions_are_answered_whole_while_versions_are_swapped_and_collected(out: Path, folder: IndexFolder) -> None:
    """Every answer is that of one version, never of a closed one, and every version ends up closed."""
    settings = ServeSettings()
    catalog = Catalog(out, settings)
    catalog.refresh()
    engine = Engine(catalog, settings, Metrics(), threads=1)
    expected = {}
    for version in ("v2", "v1"):
        folder.serve(version)
        catalog.refresh()
        expected[version] = [hit.id for hit in ask(engine, QUERY).results[0]]
    assert expected["v1"] != expected["v2"]
    stop, swaps, failures = threading.Event(), [0], []

    def swap() -> None:
        while not stop.is_set():
            folder.serve("v1" if swaps[0] % 2 else "v2")
            catalog.refresh()
            swaps[0] += 1

    swapping = threading.Thread(target=swap)
    swapping.start()
    try:
        asked = 0
        while swaps[0] < 60:
            answer = ask(engine, QUERY, exact=bool(asked % 2))
            asked += 1
            if [hit.id for hit in answer.results[0]] != expected[answer.index.version]:
                failures.append(answer)
    finally:
        stop.set()
        swapping.join()
    assert not failures and asked > 20
    engine.close()
    catalog.close()
    assert not held(folder, "v1") and not held(folder, "v2")


def test_a_closed_catalog_lets_go_of_everything(catalog: Catalog, folder: IndexFolder) -> None:
    catalog.refresh()
    catalog.close()
    assert not held(folder, "v1") and catalog.names() == []


# ------------------------------------------------------------------------------------- what cannot be served


def test_before_the_first_look_nothing_is_ready(catalog: Catalog) -> None:
    assert catalog.problem() == "vecsvc: nothing is loaded yet"
    with pytest.raises(NotReady, match="index 'anything' is not ready: vecsvc: nothing is loaded yet"):
        catalog.get("anything")
    with pytest.raises(NotReady, match="no index is ready: vecsvc: nothing is loaded yet"):
        catalog.get(None)


def test_what_the_first_look_waits_for_is_the_problem_and_what_a_later_one_does_is_none(catalog: Catalog) -> None:
    catalog.waits_for("compiling kernel nng_search for avx2, some seconds")
    assert catalog.problem() == "vecsvc: compiling kernel nng_search for avx2, some seconds"
    catalog.refresh()
    assert catalog.problem() == ""
    catalog.waits_for("compiling kernel nng_search for avx2, some seconds")
    assert catalog.problem() == ""


def test_a_version_that_failed_is_not_tried_again_until_current_changes_or_somebody_asks(
    catalog: Catalog, folder: IndexFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    catalog.refresh()
    damage(folder, "v2")
    folder.serve("v2")
    tried: list[str] = []
    served = catalog_module.Served

    def counted(folder: IndexFolder, version: str, *others: Any) -> Served:
        tried.append(version)
        return served(folder, version, *others)

    monkeypatch.setattr(catalog_module, "Served", counted)
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            assert catalog.refresh() == []
            assert catalog.get("demo").version == "v1", "what served before goes on serving"
            assert catalog.problem().startswith("demo: ") and "v2/shards/000/vectors.npy" in catalog.problem()
    assert tried == ["v2"] and len(caplog.records) == 1
    catalog.refresh(again=True)
    assert tried == ["v2", "v2"] and "vectors.npy" in catalog.problem()
    folder.rollback("v1")
    assert catalog.refresh() == [] and catalog.problem() == "", "v1 never went away"
    assert tried == ["v2", "v2"]
    folder.serve("v2")
    catalog.refresh()
    assert tried == ["v2", "v2", "v2"], "CURRENT changed in between"


def test_a_mended_version_is_served_at_the_next_look(catalog: Catalog, folder: IndexFolder) -> None:
    file = folder.path / "v1" / "shards/000/vectors.npy"
    data = file.read_bytes()
    damage(folder, "v1")
    catalog.refresh()
    with pytest.raises(NotReady, match=r"index 'demo' is not ready: .*vectors\.npy"):
        catalog.get("demo")
    file.write_bytes(data)
    assert catalog.refresh() == [("demo", "v1")] and not catalog.problem()


def test_what_passes_is_tried_again_at_every_look(
    catalog: Catalog, folder: IndexFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = folder.path / "elsewhere"
    (folder.path / "v1").rename(moved)
    assert catalog.refresh() == [] and "v1: missing, or just being deleted" in catalog.problem()
    moved.rename(folder.path / "v1")
    with monkeypatch.context() as short:
        short.setattr(catalog_module, "Shard", lambda *a, **b: (_ for _ in ()).throw(MemoryError("no room")))
        assert catalog.refresh() == [] and "v1: MemoryError: no room" in catalog.problem()
    assert catalog.refresh() == [("demo", "v1")] and not catalog.problem()


def test_a_version_that_failed_is_closed_again(catalog: Catalog, folder: IndexFolder) -> None:
    damage(folder, "v1")
    catalog.refresh()
    assert not held(folder, "v1")


def test_a_bug_while_opening_is_a_problem_and_not_the_end(
    catalog: Catalog, folder: IndexFolder, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(out, "other")
    monkeypatch.setattr(catalog_module, "Shard", lambda *a, **b: (_ for _ in ()).throw(KeyError("oh")))
    assert catalog.refresh() == []
    assert "v1: KeyError: 'oh'" in catalog.problem() and catalog.problem().count("KeyError") == 2
    assert not held(folder, "v1")
    monkeypatch.undo()
    assert sorted(catalog.refresh(again=True)) == [("demo", "v1"), ("other", "v1")] and not catalog.problem()


# ------------------------------------------------------------------------------- indexes that come and go


def test_several_indexes_are_named_and_one_has_to_be_chosen(catalog: Catalog, out: Path) -> None:
    add(out, "other")
    assert sorted(catalog.refresh()) == [("demo", "v1"), ("other", "v1")]
    assert catalog.names() == ["demo", "other"]
    assert catalog.get("other").name == "other"
    with pytest.raises(
        UnknownIndex, match="several indexes are served, name one: /indexes/demo/search, /indexes/other/search"
    ):
        catalog.get(None)
    with pytest.raises(UnknownIndex, match="no index 'none'; served are: demo, other"):
        catalog.get("none")
    with pytest.raises(UnknownIndex, match=r"no index '\.\./demo'; served are: demo, other"):
        catalog.get("../demo")


def test_one_bad_index_does_not_keep_the_others_from_serving(catalog: Catalog, folder: IndexFolder, out: Path) -> None:
    add(out, "other")
    damage(folder, "v1")
    assert catalog.refresh() == [("other", "v1")]
    assert catalog.get("other").version == "v1" and catalog.get(None).name == "other"
    with pytest.raises(NotReady, match="'demo' is not ready"):
        catalog.get("demo")
    assert list(catalog.problems) == ["demo"]


def test_an_index_that_appears_is_served_and_one_that_goes_is_said(
    catalog: Catalog, folder: IndexFolder, out: Path
) -> None:
    catalog.refresh()
    other = add(out, "other")
    assert catalog.refresh() == [("other", "v1")] and not catalog.problem()
    before = nearest(catalog.get("other"))
    shutil.rmtree(other.path)
    assert catalog.refresh() == []
    assert catalog.problem() == "other: its folder is gone; the version that was open still serves"
    assert nearest(catalog.get("other")) == before
    add(out, "other", "v2")
    assert catalog.refresh() == [("other", "v2")] and not catalog.problem()


def test_a_folder_that_is_empty_gone_or_unpublished_is_a_problem_until_it_is_none(
    tmp_path: Path, folder: IndexFolder
) -> None:
    catalog = Catalog(tmp_path / "later", ServeSettings())
    catalog.refresh()
    assert "is no folder" in catalog.problem()
    (tmp_path / "later").mkdir()
    catalog.refresh()
    assert "holds no index; build one: vecsvc build-index" in catalog.problem()
    shutil.copytree(folder.path, tmp_path / "later" / "demo")
    (tmp_path / "later" / "demo" / "CURRENT").unlink()
    catalog.refresh()
    assert "no version serves; let one of " in catalog.problem()
    IndexFolder(tmp_path / "later" / "demo").serve("v2")
    assert catalog.refresh() == [("demo", "v2")] and not catalog.problem()
    catalog.close()


def test_a_catalog_of_one_index_folder_serves_that_index(folder: IndexFolder) -> None:
    catalog = Catalog(folder.path, ServeSettings())
    assert catalog.refresh() == [("demo", "v1")] and catalog.get("demo") is catalog.get(None)
    catalog.close()


def test_a_problem_with_current_does_not_hide_the_one_with_a_version(catalog: Catalog, folder: IndexFolder) -> None:
    damage(folder, "v1")
    catalog.refresh()
    why = catalog.problem()
    (folder.path / "CURRENT").write_bytes(b"?\n")
    catalog.refresh()
    assert "'?' is no version; run vecsvc rollback" in catalog.problem()
    folder.serve("v1")
    catalog.refresh()
    assert catalog.problem() == why and "vectors.npy" in why


def test_what_is_no_index_is_not_looked_into(catalog: Catalog, out: Path) -> None:
    for name in (".hidden", "UPPER", "a b"):
        shutil.copytree(out / "demo", out / name)
    (out / "file").touch()
    (out / "empty").mkdir()
    assert catalog.refresh() == [("demo", "v1")] and not catalog.problem()


def test_vectors_of_a_retired_version_can_still_be_read_by_who_holds_them(
    catalog: Catalog, folder: IndexFolder
) -> None:
    catalog.refresh()
    vectors = catalog.get(None).shards[0].vectors
    folder.serve("v2")
    catalog.refresh()
    assert folder.gc(0) == ["v1"]
    assert np.array_equal(vectors, make_vectors(40, 8, seed=1)), "a map outlives its file's name"


def test_a_node_that_starts_in_the_middle_of_a_roll_out_has_the_version_before_for_front_doors(
    out: Path, folder: IndexFolder
) -> None:
    folder.serve("v2")
    node = Catalog(out, ServeSettings(shard_port=0, previous_version_s=0.2))
    node.refresh()
    assert [(served.version, current) for served, current in node.held()] == [("v2", True), ("v1", False)]
    digest = node.held()[1][0].digest
    assert node.version("demo", digest).version == "v1"
    # Nobody asked for it so long, so it goes.
    end = time.monotonic() + 10
    while not node.let_go():
        assert time.monotonic() < end
        time.sleep(0.05)
    assert [served.version for served, _ in node.held()] == ["v2"] and not held(folder, "v1")
    node.close()


def test_a_node_that_starts_after_a_rollback_and_a_new_version_has_the_one_that_served_too(
    out: Path, folder: IndexFolder
) -> None:
    # v2 was rolled back, v1 served, and v3 came while the node was away.
    build(write_corpus(out.parent / "demo.parquet", n=40, seed=3), out, version="v3")
    folder.serve("v3")
    node = Catalog(out, ServeSettings(shard_port=0))
    node.refresh()
    assert [served.version for served, _ in node.held()] == ["v3", "v2", "v1"]
    node.close()


def test_without_a_shard_port_and_where_the_version_before_is_damaged_there_is_only_the_current_one(
    out: Path, folder: IndexFolder
) -> None:
    folder.serve("v2")
    plain = Catalog(out, ServeSettings())
    plain.refresh()
    assert [served.version for served, _ in plain.held()] == ["v2"]
    plain.close()
    damage(folder, "v1")
    node = Catalog(out, ServeSettings(shard_port=0))
    node.refresh()
    assert [served.version for served, _ in node.held()] == ["v2"] and not node.problem()
    node.close()


def test_while_indexes_are_opened_an_unknown_name_may_still_be_one_of_them(tmp_path: Path) -> None:
    """A client takes 404 for ever, and the only index so far for the only one."""
    corpus = write_corpus(tmp_path / "c.parquet", n=30)
    for name in ("a", "b"):
        build(corpus, tmp_path / "out", name=name, kind="exact")
    catalog = Catalog(tmp_path / "out", ServeSettings())
    refresh_one, seen = Catalog._refresh_one, []

    def slow(self: Catalog, folder: IndexFolder, again: bool) -> bool:
        changed = refresh_one(self, folder, again)
        for wanted in (None, "b", "c"):
            try:
                seen.append(catalog.get(wanted).name)
            except NotReady:
                seen.append("not ready")
        return changed

    with pytest.MonkeyPatch.context() as patching:
        patching.setattr(Catalog, "_refresh_one", slow)
        catalog.refresh()
    assert seen == ["not ready", "not ready", "not ready", "not ready", "b", "not ready"]
    for unknown in (None, "c"):
        with pytest.raises(UnknownIndex):
            catalog.get(unknown)
    catalog.close()
