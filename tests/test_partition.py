"""Rows spread by nearness: no shard too large, nothing lost or twice, and few shards hold most of an answer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import service
from corpora import (
    KINDS,
    answers,
    ask,
    build,
    current_version,
    file_hashes,
    make_vectors,
    opened,
    strays,
    write_corpus,
)
from numpy.typing import NDArray
from tiny_bert import write_tiny_bert

from index_builders import index_shards
from index_builders.clusters import BALANCE_SLACK, Clustering, Spreader, balanced_offsets, sample_size
from vecsvc.catalog import Served
from vecsvc.config import BuildSettings, ServeSettings, make
from vecsvc.distance import exact_distances
from vecsvc.engine import Engine
from vecsvc.errors import ConfigError, InvalidParameter, InvalidRequest
from vecsvc.manifest import CENTROIDS_FILE, Manifest, read_manifest, write_manifest
from vecsvc.ranking import nearest_shards, queries_of_shards
from vecsvc.storage import IndexFolder
from vecsvc.types import METRICS, IdQuery, Metric

ROWS, DIM, SHARDS = 600, 12, 5


def clumpy(n: int = ROWS, dim: int = DIM, seed: int = 7) -> NDArray[np.float32]:
    """Clusters of very different sizes, and lengths that differ, as real embeddings have them."""
    rng = np.random.default_rng(seed)
    middles = rng.standard_normal((12, dim))
    which = rng.choice(12, size=n, p=rng.dirichlet(np.full(12, 0.7)))
    rows = middles[which] + 0.3 * rng.standard_normal((n, dim))
    return np.asarray(rows * rng.lognormal(0, 0.3, (n, 1)), dtype=np.float32)


def write_rows(path: Path, rows: NDArray[np.float32]) -> Path:
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), rows.shape[1])
    pq.write_table(
        pa.table({"id": np.arange(len(rows)) * 3, "vector": vectors, "part": np.arange(len(rows)) % 4}), path
    )
    return path


def clusters(corpus: Path, out: Path, **settings: Any) -> Manifest:
    wanted = {"kind": "exact", "shards": SHARDS, "partition": "cluster", "fields": "part", "certificate_queries": 64}
    return build(corpus, out, name="demo", **{**wanted, **settings}).manifest


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("corpus") / "demo.parquet", clumpy())


@pytest.fixture(scope="module", params=METRICS)
def built(request: pytest.FixtureRequest, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp(request.param)
    clusters(corpus, out, metric=request.param, border_share=0.3)
    return out


@pytest.fixture
def engine(built: Path) -> Iterator[Engine]:
    with opened(built) as engine:
        yield engine


def nearest(rows: NDArray[np.float32], query: NDArray[np.float32], metric: Metric, k: int = 10) -> list[int]:
    """Ids of the nearest rows, by comparing all."""
    distances = exact_distances(query, rows, metric)
    return [3 * int(row) for row in np.lexsort((np.arange(len(rows)), distances))[:k]]


# ------------------------------------------------------------------------------------------ pure functions


@pytest.mark.parametrize("metric", METRICS)
def test_nearest_shards_are_those_that_brute_force_finds(metric: Metric) -> None:
    rng = np.random.default_rng(3)
    places, queries = clumpy(9, seed=1), clumpy(20, seed=2)
    offsets = rng.random(9).astype(np.float32)
    found = nearest_shards(queries, np.concatenate([places, offsets[:, None]], axis=1), 4, metric)
    assert found.shape == (20, 4) and found.dtype == np.int64
    for query, row in zip(queries, found, strict=True):
        if metric == "l2":
            distances = ((places.astype(np.float64) - query) ** 2).sum(axis=1) + offsets
        else:
            distances = 1 - places.astype(np.float64) @ (query / np.linalg.norm(query)) + offsets
        assert row.tolist() == np.argsort(distances, kind="stable")[:4].tolist()


def test_nearest_shards_are_all_where_there_are_fewer_and_ties_go_to_the_smaller_number() -> None:
    centroids = np.zeros((3, 5), dtype=np.float32)
    for metric in METRICS:
        assert nearest_shards(np.zeros((2, 4), np.float32), centroids, 7, metric).tolist() == [[0, 1, 2]] * 2


def test_nearest_shards_of_a_query_do_not_depend_on_its_batch() -> None:
    centroids = np.concatenate([clumpy(40, 33, seed=1), np.zeros((40, 1), np.float32)], axis=1)
    queries = clumpy(64, 33, seed=2)
    for metric in METRICS:
        batch = nearest_shards(queries, centroids, 40, metric)
        assert all(
            (nearest_shards(query[None], centroids, 40, metric) == batch[i]).all() for i, query in enumerate(queries)
        )


def test_every_query_is_asked_of_its_own_shards_and_each_shard_once() -> None:
    asking = queries_of_shards(np.array([[2, 0], [2, 5], [0, 5]]))
    assert {shard: rows.tolist() for shard, rows in asking.items()} == {0: [0, 2], 2: [0, 1], 5: [1, 2]}


def test_offsets_make_shards_of_very_different_clusters_about_equally_large() -> None:
    rows = clumpy(3000)
    places = rows[:8]
    distances = ((rows[:, None] - places) ** 2).sum(axis=2)
    before = np.bincount(np.argmin(distances, axis=1), minlength=8)
    offsets = balanced_offsets(distances, np.zeros(8, np.float32), steps=200)
    after = np.bincount(np.argmin(distances + offsets, axis=1), minlength=8)
    assert before.max() > 1.5 * 3000 / 8 and after.max() <= (1 + BALANCE_SLACK) * 3000 / 8


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("share", [0.0, 0.15, 1.0])
def test_no_shard_is_larger_than_its_room_and_copies_stay_within_their_share(metric: Metric, share: float) -> None:
    rows, shards = clumpy(2000), 7
    spreader = Spreader(Clustering(rows[::3], shards, metric, share, seed=1), len(rows), share)
    parts = [spreader.spread(rows[start : start + 300]) for start in range(0, len(rows), 300)]
    first, second = (np.concatenate(part) for part in zip(*parts, strict=True))
    assert np.bincount(first, minlength=shards).max() <= np.ceil((1 + BALANCE_SLACK) * len(rows) / shards)
    copied = second[second >= 0]
    assert (second != first).all() and len(copied) == spreader.copies <= share * len(rows)
    assert np.bincount(copied, minlength=shards).max(initial=0) <= share * (1 + BALANCE_SLACK) * len(rows) / shards + 1
    assert len(copied) >= 0.5 * share * len(rows)


def test_rows_that_find_their_shard_full_go_to_the_next_nearest_in_their_order() -> None:
    rows = np.concatenate([np.full((90, 2), [1.0, 0.0]), np.full((10, 2), [0.0, 1.0])]).astype(np.float32)
    clustering = Clustering(rows[[0, 95]], 2, "l2", 0.0, seed=1)
    one, many = (Spreader(clustering, len(rows), 0.0) for _ in range(2))
    whole = one.spread(rows)[0]
    assert one.capacity == 55 and np.bincount(whole).tolist() in ([55, 45], [45, 55])
    assert len(set(whole[:55])) == 1 and set(whole[55:90]) == {1 - whole[0]}
    parts = np.concatenate([many.spread(rows[start : start + 7])[0] for start in range(0, 100, 7)])
    assert parts.tolist() == whole.tolist()


def test_the_sample_is_bounded_whatever_the_shards_and_dimensions() -> None:
    assert sample_size(4, 128) == 4096
    for shards, dim in ((256, 16_384), (256, 1), (1, 16_384)):
        assert shards <= sample_size(shards, dim) and sample_size(shards, dim) * max(dim, shards) <= 1 << 26


# -------------------------------------------------------------------------------------------------- builds


def test_every_row_lives_in_one_shard_or_two_and_the_index_counts_it_once(built: Path) -> None:
    manifest = current_version(IndexFolder(built / "demo"))
    assert manifest.partition == "cluster" and manifest.clusters is not None
    sizes = [shard.size for shard in manifest.shards]
    assert manifest.spec.size == ROWS == manifest.corpus.rows
    assert sum(sizes) == ROWS + manifest.clusters.copies and 0 < manifest.clusters.copies <= 0.3 * ROWS
    assert max(sizes) <= np.ceil((1 + BALANCE_SLACK) * ROWS / SHARDS) * 1.3
    folder = built / "demo" / manifest.version
    rows = [np.load(folder / f"shards/{n:03d}/rows.npy") for n in range(SHARDS)]
    assert all((np.diff(mine) > 0).all() for mine in rows)
    counts = np.bincount(np.concatenate(rows), minlength=ROWS)
    assert set(counts) == {1, 2} and (counts == 2).sum() == manifest.clusters.copies
    each = manifest.bytes_per_vector
    assert each is not None and each.vectors * ROWS == pytest.approx(
        sum(file.size_bytes for file in manifest.files() if file.path.endswith("/vectors.npy")), rel=1e-3
    )
    assert not strays(IndexFolder(built / "demo"))


def test_all_shards_together_answer_as_one_shard_does(built: Path, corpus: Path, tmp_path: Path) -> None:
    metric = current_version(IndexFolder(built / "demo")).metric
    build(corpus, tmp_path, name="demo", kind="exact", metric=metric)
    queries = clumpy(30, seed=3)
    assert answers(built, queries, k=15) == answers(tmp_path, queries, k=15)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_finds_its_rows_when_all_shards_or_the_nearest_is_asked(
    kind: str, corpus: Path, tmp_path: Path
) -> None:
    clusters(corpus, tmp_path, kind=kind, metric="l2")
    rows = clumpy()
    with opened(tmp_path) as engine:
        for probe in (None, 1):
            found = ask(engine, rows[:20], k=1, probe_shards=probe)
            assert [hits[0].id for hits in found.results] == [3 * row for row in range(20)]


def test_a_query_by_id_leaves_its_row_out_of_both_shards_that_hold_it(engine: Engine) -> None:
    rows = clumpy()
    served = engine.catalog.get(None)
    counts = np.bincount(np.concatenate([shard.rows for shard in served.shards]))
    for row in (*np.flatnonzero(counts == 2)[:6], *np.flatnonzero(counts == 1)[:3]):
        for settings in ({}, {"conditions": ()}, {"exact": True}, {"probe_shards": SHARDS}):
            hits = ask(engine, IdQuery(3 * int(row)), k=10, **settings).results[0]
            expected = [id for id in nearest(rows, rows[row], served.manifest.metric, 11) if id != 3 * row][:10]
            assert [hit.id for hit in hits] == expected


def test_few_shards_hold_most_of_an_answer_and_what_is_asked_is_told(engine: Engine) -> None:
    rows, queries = clumpy(), clumpy(100, seed=11)
    metric = engine.catalog.get(None).manifest.metric
    shares = []
    for probe in range(1, SHARDS + 1):
        answer = ask(engine, queries[:1], k=10, probe_shards=probe, include=frozenset({"explain"}))
        assert (answer.coverage.shards_ok, answer.coverage.shards_total) == (probe, probe)
        assert answer.explain is not None and len({part.shard for part in answer.explain}) == probe
        assert answer.stats.visited == sum(part.size for part in answer.explain)
        found = ask(engine, queries, k=10, probe_shards=probe).results
        hits = [
            len({hit.id for hit in mine} & set(nearest(rows, q, metric)))
            for q, mine in zip(queries, found, strict=True)
        ]
        assert all(len({hit.id for hit in mine}) == len(mine) for mine in found)
        shares.append(sum(hits) / 1000)
    assert shares == sorted(shares) and shares[-1] == 1.0
    assert shares[1] > 0.75, "two of five shards by a hash would hold 0.4"


def test_each_query_of_a_batch_asks_its_own_shards(engine: Engine) -> None:
    queries = clumpy(150, seed=12)  # more than one slice of a batch
    served = engine.catalog.get(None)
    together = ask(engine, queries, k=7, probe_shards=2)
    alone = [ask(engine, query, k=7, probe_shards=2).results[0] for query in queries]
    assert together.results == alone
    assert served.centroids is not None
    asked = np.unique(nearest_shards(queries, served.centroids, 2, served.manifest.metric))
    assert together.coverage.shards_total == len(asked) > 2


def test_more_probes_than_shards_ask_all_of_them(engine: Engine) -> None:
    queries = clumpy(3, seed=13)
    found = ask(engine, queries, probe_shards=256)
    assert found.results == ask(engine, queries).results and found.coverage.shards_total == SHARDS


def test_a_hash_partition_refuses_probe_shards_and_says_what_would_take_it(corpus: Path, tmp_path: Path) -> None:
    build(corpus, tmp_path, name="demo", kind="exact", shards=2)
    with opened(tmp_path) as engine, pytest.raises(InvalidRequest, match=r"probe_shards is 1.*--partition cluster"):
        ask(engine, clumpy(1), probe_shards=1)


def test_the_certificate_says_what_fewer_shards_find(built: Path) -> None:
    manifest = current_version(IndexFolder(built / "demo"))
    assert manifest.clusters is not None and manifest.certificate is not None
    probes = manifest.clusters.probes
    assert [point.shards for point in probes] == [1, 2, 3, 4, 5]
    assert [point.recall for point in probes] == sorted(point.recall for point in probes)
    chosen = next(point for point in manifest.certificate.points if point.params == manifest.search)
    assert (probes[-1].recall, probes[-1].recall_error) == (chosen.recall, chosen.recall_error) == (1.0, 0.0)
    assert probes[1].recall > 0.75


def test_the_certificate_counts_a_row_of_two_shards_once(corpus: Path, tmp_path: Path) -> None:
    """Were copies counted twice, the tenth neighbour would come too early and recall would look better than it is."""
    points = {}
    for name, settings in {"one": {"shards": 1, "partition": "hash"}, "two": {"border_share": 1.0}}.items():
        params = {"n_trees": 1, "leaf_size": 8}
        made = build(corpus, tmp_path / name, params, **{**CERTIFIED, **settings}).manifest
        assert made.certificate is not None
        points[name] = made.certificate
    assert points["one"].queries == points["two"].queries == 100
    assert points["two"].points[-1].recall <= 1.0 and points["two"].k == 10


CERTIFIED: dict[str, Any] = {
    "kind": "tp_tree",
    "shards": 3,
    "partition": "cluster",
    "certificate_queries": 100,
    "metric": "l2",
}


def test_without_borders_nothing_lives_twice_and_without_a_certificate_nothing_is_promised(
    corpus: Path, tmp_path: Path
) -> None:
    manifest = clusters(corpus, tmp_path, border_share=0.0, certificate_queries=0)
    assert manifest.clusters is not None
    assert (manifest.clusters.copies, manifest.clusters.probes) == (0, [])
    assert sum(shard.size for shard in manifest.shards) == ROWS


def test_the_same_seed_makes_the_same_files_whatever_the_batches(corpus: Path, tmp_path: Path) -> None:
    made = [clusters(corpus, tmp_path / str(n), batch_rows=n) for n in (600, 37)]
    assert file_hashes(made[0]) == file_hashes(made[1])
    assert file_hashes(clusters(corpus, tmp_path / "other", seed=8)) != file_hashes(made[0])


def test_an_interrupted_build_goes_on_with_the_same_clusters(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = clusters(corpus, tmp_path / "whole")
    with monkeypatch.context() as dying:
        dying.setattr(index_shards, "_build", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            clusters(corpus, tmp_path / "out")
    manifest = clusters(corpus, tmp_path / "out", resume=True)
    assert file_hashes(manifest) == file_hashes(whole) and "cluster" in manifest.provenance.phases


def test_texts_are_clustered_by_their_vectors(tmp_path: Path) -> None:
    corpus, bert = write_corpus(tmp_path / "demo.parquet", n=120, dim=0), write_tiny_bert(tmp_path / "bert", dim=16)
    settings = {"shards": 3, "partition": "cluster", "encoder": str(bert), "fields": "label", "kind": "exact"}
    manifest = build(corpus, tmp_path / "out", **settings).manifest
    assert manifest.clusters is not None and manifest.spec.size == 120
    build(corpus, tmp_path / "one", **{**settings, "shards": 1, "partition": "hash"})
    queries = make_vectors(5, 16)
    assert answers(tmp_path / "out", queries) == answers(tmp_path / "one", queries)


def test_rows_that_are_all_alike_still_fill_every_shard(tmp_path: Path) -> None:
    corpus = write_rows(tmp_path / "demo.parquet", np.ones((60, 4), np.float32))
    manifest = clusters(corpus, tmp_path / "out", shards=3)
    assert min(shard.size for shard in manifest.shards) > 0
    hits = answers(tmp_path / "out", np.ones((1, 4), np.float32), k=60)[0]
    assert [id for id, _ in hits] == [3 * row for row in range(60)]


def test_one_shard_and_one_row_each_are_clusters_too(tmp_path: Path) -> None:
    rows = clumpy(4, 6)
    corpus = write_rows(tmp_path / "demo.parquet", rows)
    for shards in (1, 4):
        manifest = clusters(corpus, tmp_path / str(shards), shards=shards, border_share=0.0, metric="l2")
        assert sum(shard.size for shard in manifest.shards) == 4
        with opened(tmp_path / str(shards)) as engine:
            assert [hits[0].id for hits in ask(engine, rows, k=1, probe_shards=1).results] == [0, 3, 6, 9]


def test_fewer_rows_than_shards_are_refused_with_both_numbers(tmp_path: Path) -> None:
    corpus = write_rows(tmp_path / "demo.parquet", clumpy(3))
    with pytest.raises(ConfigError, match="3 rows cannot fill 5 shards"):
        clusters(corpus, tmp_path / "out")
    assert IndexFolder(tmp_path / "out" / "demo").versions() == []


def test_a_kind_may_work_out_other_params_for_each_shard(corpus: Path, tmp_path: Path) -> None:
    for partition in ("hash", "cluster"):
        out = tmp_path / partition
        build(corpus, out, {"preset": "ivf-flat"}, name="demo", kind="faiss", shards=4, partition=partition)
        manifest = current_version(IndexFolder(out / "demo"))
        assert manifest.certificate is not None and manifest.spec.params == manifest.shards[0].spec.params
        assert len(answers(out, clumpy(3, seed=2))[0]) == 5


def test_a_manifest_whose_clusters_do_not_fit_is_refused(corpus: Path, tmp_path: Path) -> None:
    version = clusters(corpus, tmp_path).version
    folder = tmp_path / "demo" / version
    manifest = read_manifest(folder)
    assert manifest.clusters is not None and manifest.clusters.file.path == CENTROIDS_FILE
    for change in (
        {"clusters": None},
        {"partition": "hash"},
        {"clusters": msgspec.structs.replace(manifest.clusters, copies=manifest.clusters.copies + 1)},
        {"clusters": msgspec.structs.replace(manifest.clusters, file=manifest.shards[0].files[0])},
        {"spec": replace(manifest.spec, size=manifest.spec.size + 1)},
    ):
        (folder / "manifest.json").unlink()
        write_manifest(folder, msgspec.structs.replace(manifest, **change))
        with pytest.raises(Exception, match=r"manifest\.json"):
            read_manifest(folder)


def test_bad_settings_are_refused_with_their_bounds(corpus: Path, tmp_path: Path) -> None:
    for name, value in (("partition", "random"), ("border_share", 1.5), ("border_share", -0.1)):
        with pytest.raises(InvalidParameter, match=name):
            make(BuildSettings, {name: value}, what="[build]")


def test_a_process_that_holds_none_of_the_probed_shards_says_which_it_would_ask() -> None:
    folder = service.index("near")
    served = Served(IndexFolder(folder), "v1", ServeSettings(shards="0"))
    assert served.centroids is not None
    [far] = nearest_shards(served.centroids[3:4, :-1], served.centroids, 1, served.manifest.metric).reshape(-1)
    assert far != 0
    vector = served.centroids[3, :-1].tolist()
    served.retire()
    question = {"vector": vector, "partial": True, "params": {"probe_shards": 1}}
    with service.running(folder, shards="0", inline_ms=100) as running:
        near = {**question, "vector": service.corpora()["near"].vectors[0].tolist(), "params": {"probe_shards": 4}}
        for _ in range(3):
            reply = running.post("/search", near)
            assert reply.status == 200 and reply.json()["coverage"]["shards_ok"] == 1
            reply = running.post("/search", question)
            assert reply.status == 503 and f"shards {far} would be asked" in reply.message
