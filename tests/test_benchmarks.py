"""The benchmarks count as they say: readers, recall, interpolation, comparison, and a whole run on few vectors."""

from __future__ import annotations

import importlib.util
import json
import struct
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpora import HAS_HNSWLIB, make_vectors
from numpy.typing import NDArray

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import common  # noqa: E402
import compare  # noqa: E402
import datasets  # noqa: E402
import probe  # noqa: E402
import recall_qps  # noqa: E402
import tp_tree  # noqa: E402
from datasets import DataError, Dataset  # noqa: E402
from peers.base import between  # noqa: E402

import index_builders  # noqa: E402
from vecsvc import indexes  # noqa: E402

N, DIM, Q = 60, 6, 5


@pytest.mark.parametrize("script", sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py")))
def test_every_script_finds_what_it_imports(script: str) -> None:
    try:
        importlib.import_module(script)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("faiss", "hnswlib", "matplotlib", "onnxruntime", "tokenizers"):
            raise  # those are of extras, which need not be here


@pytest.fixture(scope="module")
def base() -> NDArray[np.float32]:
    return make_vectors(N, DIM)


@pytest.fixture(scope="module")
def queries() -> NDArray[np.float32]:
    return make_vectors(Q, DIM, seed=8)


def nearest(base: NDArray[np.float32], queries: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    return np.argsort(((queries[:, None] - base[None]) ** 2).sum(axis=2), axis=1)[:, :k]


def write_bin(path: Path, rows: NDArray[Any]) -> Path:
    path.write_bytes(struct.pack("<2i", *rows.shape) + rows.tobytes())
    return path


def write_vecs(path: Path, rows: NDArray[Any]) -> Path:
    path.write_bytes(b"".join(struct.pack("<i", len(row)) + row.tobytes() for row in rows))
    return path


def write_parquet(path: Path, rows: NDArray[np.float32], column: str = "emb", first_id: int = 0) -> Path:
    names = pa.array(np.arange(first_id, first_id + len(rows)))
    pq.write_table(pa.table({"id": names, column: pa.array(list(rows), pa.list_(pa.float32()))}), path)
    return path


# ----------------------------------------------------------------------------------------------- readers


def test_fbin_fvecs_and_parquet_hold_what_was_written(
    tmp_path: Path, base: NDArray[np.float32], queries: NDArray[np.float32]
) -> None:
    for write, suffix in ((write_bin, ".fbin"), (write_vecs, ".fvecs"), (write_parquet, ".parquet")):
        folder = tmp_path / suffix[1:]
        folder.mkdir()
        write(folder / f"base{suffix}", base)
        write(folder / f"query{suffix}", queries)
        for data in (folder, folder / f"base{suffix}"):
            found = datasets.load(str(data), metric="l2", k=3)
            assert np.array_equal(found.base, base) and np.array_equal(found.queries, queries)
            assert found.recall(nearest(base, queries, 3)) == 1.0


@pytest.mark.parametrize(("suffix", "dtype"), [(".u8bin", "u1"), (".i8bin", "i1"), (".bvecs", "u1")])
def test_bytes_are_read_as_the_numbers_they_are(tmp_path: Path, suffix: str, dtype: str) -> None:
    rows = np.random.default_rng(7).integers(0, 120, (30, 4)).astype(dtype)
    write = write_vecs if suffix == ".bvecs" else write_bin
    found = datasets.load(
        str(write(tmp_path / f"a{suffix}", rows)), queries=write(tmp_path / f"b{suffix}", rows[:3]), metric="l2", k=2
    )
    assert np.array_equal(found.base, rows.astype(np.float32)) and len(found.queries) == 3


@pytest.mark.parametrize("column", ["vector", "emb", "embedding"])
def test_a_corpus_takes_its_queries_from_another_file(
    tmp_path: Path, base: NDArray[np.float32], queries: NDArray[np.float32], column: str
) -> None:
    corpus = write_parquet(tmp_path / "docs.parquet", base, column)
    with pytest.raises(DataError, match=r"holds no queries: name a file of them with --queries"):
        datasets.load(str(corpus))
    asked = write_parquet(tmp_path / "asked.parquet", queries)
    assert np.array_equal(datasets.load(str(corpus), queries=asked).queries, queries)


def test_vectordbbench_neighbours_are_named_by_id(
    tmp_path: Path, base: NDArray[np.float32], queries: NDArray[np.float32]
) -> None:
    write_parquet(tmp_path / "train.parquet", base, first_id=1000)
    write_parquet(tmp_path / "test.parquet", queries, first_id=5)
    order = np.arange(Q)[::-1]  # the files need not have the same order
    near = nearest(base, queries, 4) + 1000
    pq.write_table(
        pa.table({"id": order + 5, "neighbors_id": pa.array(list(near[order]))}), tmp_path / "neighbors.parquet"
    )
    raw = datasets.read(str(tmp_path), "dev", None)
    assert raw.neighbors is not None and np.array_equal(raw.neighbors, near - 1000)
    assert datasets.load(str(tmp_path), metric="l2", k=4).recall(near - 1000) == 1.0
    with pytest.raises(DataError, match="give the --metric that the file was made with"):
        datasets.load(str(tmp_path), metric="ip", k=4)
    pq.write_table(pa.table({"id": order + 5, "neighbors_id": pa.array(list(near))}), tmp_path / "neighbors.parquet")
    with pytest.raises(DataError, match="neighbour 4 of query"):
        datasets.load(str(tmp_path), metric="l2", k=4)


@pytest.mark.parametrize("name", ["train", "shuffle_train"])
def test_vectordbbench_pieces_are_one_base_in_the_order_of_their_numbers(
    tmp_path: Path, base: NDArray[np.float32], queries: NDArray[np.float32], name: str
) -> None:
    write_parquet(tmp_path / "test.parquet", queries)
    names = np.random.default_rng(7).permutation(N) + 1000  # as of shuffled vectors
    for number, rows in enumerate(np.array_split(np.arange(N), 11)):
        vectors = pa.array(list(base[rows]), pa.list_(pa.float32()))
        pq.write_table(pa.table({"id": names[rows], "emb": vectors}), tmp_path / f"{name}-{number:02}-of-11.parquet")
    near = nearest(base, queries, 4)
    pq.write_table(
        pa.table({"id": np.arange(Q), "neighbors_id": pa.array(list(names[near]))}), tmp_path / "neighbors.parquet"
    )
    found = datasets.load(str(tmp_path), metric="l2", k=4)
    assert np.array_equal(found.base, base) and found.recall(near) == 1.0
    raw = datasets.read(str(tmp_path), "dev", None)
    assert raw.neighbors is not None and np.array_equal(raw.neighbors, near)
    for number in (3, 10):
        (tmp_path / f"{name}-{number:02}-of-11.parquet").unlink()
    with pytest.raises(DataError, match=f"has 9 of 11 pieces: fetch {name}-03-of-11.parquet, {name}-10-of-11.parquet"):
        datasets.load(str(tmp_path))
    write_parquet(tmp_path / f"{name}-00-of-02.parquet", base)
    with pytest.raises(DataError, match=f"has pieces of {name} out of 2 and 11: keep those of one number"):
        datasets.load(str(tmp_path))


def test_vectordbbench_plain_vectors_come_before_shuffled_ones_and_a_whole_file_before_pieces(
    tmp_path: Path, base: NDArray[np.float32], queries: NDArray[np.float32]
) -> None:
    write_parquet(tmp_path / "test.parquet", queries)
    stems = ("shuffle_train-00-of-01", "shuffle_train", "train-00-of-01", "train")
    for rows, stem in enumerate(stems, 10):
        write_parquet(tmp_path / f"{stem}.parquet", base[:rows])
        assert len(datasets.load(str(tmp_path)).base) == rows


def test_vectordbbench_ids_that_do_not_fit_are_named(
    tmp_path: Path, base: NDArray[np.float32], queries: NDArray[np.float32]
) -> None:
    def neighbours(first_query: int, row: list[int]) -> None:
        table = {"id": np.arange(Q) + first_query, "neighbors_id": pa.array([row] * Q)}
        pq.write_table(pa.table(table), tmp_path / "neighbors.parquet")

    write_parquet(tmp_path / "test.parquet", queries)
    for number, first_id in enumerate((0, 30)):
        write_parquet(tmp_path / f"train-0{number}-of-02.parquet", base[:30], first_id=first_id)
    for name in (-1, 60, 2**60):
        neighbours(0, [3, name])
        with pytest.raises(DataError, match=f"id {name} is in no other file: fetch the files of one data set"):
            datasets.load(str(tmp_path))
    neighbours(1, [3, 4])
    with pytest.raises(DataError, match="id 0 is not in it: fetch the files of one data set"):
        datasets.load(str(tmp_path))
    neighbours(0, [3, 4])
    write_parquet(tmp_path / "train-01-of-02.parquet", base[30:], first_id=29)
    with pytest.raises(DataError, match="id 29 stands for two vectors: fetch the pieces again"):
        datasets.load(str(tmp_path))
    write_parquet(tmp_path / "train-01-of-02.parquet", make_vectors(30, DIM + 1), first_id=30)
    with pytest.raises(DataError, match=r"train-01-of-02.*'emb'.*expected one dim for all, 6 as before"):
        datasets.load(str(tmp_path))


@pytest.mark.parametrize("fixed", [False, True])
def test_a_parquet_file_is_read_in_blocks_whatever_its_lists_and_row_groups(
    tmp_path: Path, base: NDArray[np.float32], monkeypatch: pytest.MonkeyPatch, fixed: bool
) -> None:
    monkeypatch.setattr(datasets, "BLOCK", 7)
    lists = pa.list_(pa.float64(), DIM) if fixed else pa.list_(pa.float64())
    pq.write_table(pa.table({"vector": pa.array(list(base), lists)}), tmp_path / "a.parquet", row_group_size=25)
    blocks = [len(block) for block in datasets._blocks(tmp_path / "a.parquet", "vector")]
    assert sum(blocks) == N and max(blocks) <= 7
    assert np.array_equal(datasets._parquet_rows(tmp_path / "a.parquet"), base)
    ragged = pa.table({"vector": [[1.0, 2.0]] * 7 + [[1.0]] * 7})
    pq.write_table(ragged, tmp_path / "b.parquet")
    with pytest.raises(DataError, match="empty or of several lengths, expected one dim for all, 2 as before"):
        datasets._parquet_rows(tmp_path / "b.parquet")
    for rows in ([None] * 8, [[1.0, 2.0], None], [[]]):
        pq.write_table(pa.table({"vector": pa.array(rows, pa.list_(pa.float32()))}), tmp_path / "c.parquet")
        with pytest.raises(DataError, match=r"empty or of several lengths, expected one dim for all$"):
            datasets._parquet_rows(tmp_path / "c.parquet")
    pq.write_table(ragged.slice(0, 0), tmp_path / "c.parquet")
    with pytest.raises(DataError, match="holds no vectors: name a file with rows"):
        datasets._parquet_rows(tmp_path / "c.parquet")


# ---------------------------------------------------------------------------------- published neighbours


def write_ibin(path: Path, rows: NDArray[np.int64]) -> Path:
    """big-ann's layout: all ids, then all distances."""
    path.write_bytes(struct.pack("<2i", *rows.shape) + rows.astype("<i4").tobytes() + bytes(4 * rows.size))
    return path


def write_ivecs(path: Path, rows: NDArray[np.int64]) -> Path:
    return write_vecs(path, rows.astype("<i4"))


PUBLISHED = [
    ("sift_base.fvecs", "sift_query.fvecs", "sift_groundtruth.ivecs"),
    ("base.fvecs", "queries.fvecs", "groundtruth.ivecs"),
    ("base.10K.fbin", "query.public.10K.fbin", "groundtruth.public.10K.ibin"),
    ("base.10K.fbin", "query.public.10K.fbin", "gt.10K.ibin"),
]


@pytest.mark.parametrize(("rows", "asked", "published"), PUBLISHED)
def test_published_neighbours_are_used_and_no_others_computed(
    tmp_path: Path,
    base: NDArray[np.float32],
    queries: NDArray[np.float32],
    monkeypatch: pytest.MonkeyPatch,
    rows: str,
    asked: str,
    published: str,
) -> None:
    write, write_near = (write_vecs, write_ivecs) if rows.endswith("vecs") else (write_bin, write_ibin)
    write(tmp_path / rows, base)
    write(tmp_path / asked, queries)
    near = nearest(base, queries, 9)
    write_near(tmp_path / published, near)

    def computed(*_: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr(datasets, "truth", computed)
    for max_queries in (Q, 2):
        found = datasets.load(str(tmp_path / rows), queries=tmp_path / asked, metric="l2", k=4, max_queries=max_queries)
        assert len(found.queries) == max_queries and found.recall(near[:max_queries, :4]) == 1.0


def test_neighbours_that_are_named_have_to_fit(
    tmp_path: Path, base: NDArray[np.float32], queries: NDArray[np.float32], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, asked = write_bin(tmp_path / "base.fbin", base), write_bin(tmp_path / "asked.fbin", queries)
    near = nearest(base, queries, 9)
    named = write_ibin(tmp_path / "deep_new_groundtruth.public.bin", near)

    def load(neighbors: Path, **options: Any) -> datasets.Dataset:
        return datasets.load(str(rows), queries=asked, neighbors=neighbors, metric="l2", k=4, **options)

    with monkeypatch.context() as alone:
        alone.setattr(datasets, "truth", None)
        assert load(named).recall(near[:, :4]) == 1.0
    with pytest.raises(DataError, match="expected 4 or more of 5"):
        load(write_ibin(tmp_path / "few.bin", near[:-1]))
    with pytest.raises(DataError, match=r"none\.bin: no such file"):
        load(tmp_path / "none.bin")
    with pytest.raises(DataError, match="neighbours among 60 rows, not among 20"):
        load(named, limit=20)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("few queries", "has 9 neighbours of 4 queries, expected 4 or more of 5"),
        ("few neighbours", "has 3 neighbours of 5 queries, expected 4 or more of 5"),
        ("another base", "name row 60, the base has 60 rows"),
        ("another metric", "give the --metric that the file was made with"),
        ("cut off", "which"),
        ("a header alone", "which"),
        ("nothing", "which"),
    ],
)
@pytest.mark.parametrize("suffix", ["fvecs", "fbin"])
def test_published_neighbours_that_do_not_fit_are_named_and_the_true_ones_computed(
    tmp_path: Path,
    base: NDArray[np.float32],
    queries: NDArray[np.float32],
    capsys: pytest.CaptureFixture[str],
    suffix: str,
    damage: str,
    said: str,
) -> None:
    write, write_near = (write_vecs, write_ivecs) if suffix == "fvecs" else (write_bin, write_ibin)
    write(tmp_path / f"base.{suffix}", base)
    write(tmp_path / f"query.{suffix}", queries)
    near = nearest(base, queries, 9)
    file = tmp_path / ("groundtruth.ivecs" if suffix == "fvecs" else "groundtruth.ibin")
    if damage == "few queries":
        write_near(file, near[:-1])
    elif damage == "few neighbours":
        write_near(file, near[:, :3])
    elif damage == "another base":
        write_near(file, np.where(near == near[-1, -1], N, near))
    elif damage == "another metric":
        write_near(file, np.argsort(queries @ base.T, axis=1)[:, :9])
    else:
        whole = write_near(file, near).read_bytes()
        file.write_bytes(whole[: {"cut off": len(whole) - 5, "a header alone": 8, "nothing": 0}[damage]])
    found = datasets.load(str(tmp_path), metric="l2", k=4)
    assert found.recall(near[:, :4]) == 1.0 and found.recall(near[:, 4:8]) == 0.0
    printed = capsys.readouterr().out
    assert said in printed and file.name in printed and printed.endswith("not used, the true neighbours are computed\n")
    assert datasets.load(str(tmp_path), metric="l2", k=4, limit=30).bounds.shape == (Q,)
    assert capsys.readouterr().out == ""


def test_hdf5_says_its_metric(tmp_path: Path, base: NDArray[np.float32], queries: NDArray[np.float32]) -> None:
    h5py = pytest.importorskip("h5py")
    path = tmp_path / "made-euclidean.hdf5"
    with h5py.File(path, "w") as file:
        file["train"], file["test"], file["neighbors"] = base, queries, nearest(base, queries, 3).astype(np.int32)
        file.attrs["distance"] = "euclidean"
    found = datasets.load(str(path), k=3)
    assert found.metric == "l2" and np.array_equal(found.base, base)
    with h5py.File(path, "a") as file:
        file.attrs["distance"] = "jaccard"
    with pytest.raises(DataError, match="'jaccard', known are angular, euclidean"):
        datasets.load(str(path))
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(DataError, match="not a readable HDF5 file"):
        datasets.load(str(path))


def test_minilm_folders_give_dev_or_the_documents_alone(tmp_path: Path) -> None:
    (tmp_path / "minilm").mkdir()
    for name, rows in (("peps", 30), ("tldr_docs", 20), ("tldr_queries", 33)):
        np.save(tmp_path / "minilm" / f"{name}.f16.npy", make_vectors(rows, 8).astype(np.float16))
    dev, alone = (datasets.load(str(tmp_path), task=task) for task in ("dev", "tldr_docs"))
    assert (len(dev.base), len(alone.base), len(dev.queries), dev.metric) == (50, 20, 3, "ip")
    with pytest.raises(DataError, match="task must be one of dev, tldr_docs, got 'prod'"):
        datasets.load(str(tmp_path), task="prod")


@pytest.mark.parametrize("head", [b"", b"\1\0\0\0", struct.pack("<2i", 2**31 - 1, 4096), struct.pack("<2i", -1, 4)])
def test_headers_that_do_not_fit_the_file_are_refused(tmp_path: Path, head: bytes) -> None:
    for suffix in (".fbin", ".u8bin", ".fvecs", ".bvecs"):
        path = tmp_path / f"base{suffix}"
        path.write_bytes(head + bytes(10))
        with pytest.raises(DataError, match="fetch it again") as caught:
            (datasets.read_bin if suffix.endswith("bin") else datasets.read_vecs)(path)
        assert "\n" not in str(caught.value) and path.name in str(caught.value)


def test_a_row_of_another_length_is_named(tmp_path: Path) -> None:
    rows = make_vectors(3, 4).tobytes()
    path = tmp_path / "base.fvecs"
    path.write_bytes(b"".join(struct.pack("<i", dim) + rows[:16] for dim in (4, 4, 5)))
    with pytest.raises(DataError, match="row 2 says dim 5, the first 4"):
        datasets.read_vecs(path)


def test_damaged_parquet_unknown_names_and_wrong_values_are_one_line(tmp_path: Path, base: NDArray[np.float32]) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match="not a readable Parquet file"):
        datasets.load(str(tmp_path / "a.parquet"), queries=tmp_path / "a.parquet")
    pq.write_table(pa.table({"id": [1], "words": ["x"]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match="none of the columns vector, emb, embedding, only id, words"):
        datasets.load(str(tmp_path / "b.parquet"), queries=tmp_path / "b.parquet")
    with pytest.raises(DataError, match="no such file or folder"):
        datasets.load(str(tmp_path / "none"))
    (tmp_path / "c.csv").write_text("1,2")
    with pytest.raises(DataError, match=r"'.csv', which is none of"):
        datasets.load(str(tmp_path / "c.csv"), queries=tmp_path / "c.csv")
    corpus = write_parquet(tmp_path / "d.parquet", base)
    with pytest.raises(DataError, match="k must be from 1 to 60"):
        datasets.load(str(corpus), queries=corpus, k=61)
    with pytest.raises(DataError, match="base has dim 6, queries 4"):
        datasets.load(str(corpus), queries=write_parquet(tmp_path / "e.parquet", make_vectors(2, 4)))
    with pytest.raises(DataError, match="not finite"):
        datasets.load(str(corpus), queries=write_parquet(tmp_path / "f.parquet", base * np.float32(np.inf)))


def test_truth_is_kept_by_content_metric_and_k(tmp_path: Path, base: NDArray[np.float32]) -> None:
    corpus, cache = write_parquet(tmp_path / "a.parquet", base), tmp_path / "cache"
    first = datasets.load(str(corpus), queries=corpus, metric="l2", cache=cache)
    for metric, k, limit in (("l2", 10, None), ("l2", 5, None), ("ip", 10, None), ("l2", 10, 30)):
        datasets.load(str(corpus), queries=corpus, metric=metric, k=k, limit=limit, cache=cache)  # type: ignore[arg-type]
    files = list(cache.iterdir())
    assert len(files) == 4
    for file in files:
        np.savez(file, bounds=np.full(N, 42.0, dtype=np.float32))
    assert datasets.load(str(corpus), queries=corpus, metric="l2", cache=cache).bounds[0] == 42.0 != first.bounds[0]
    for file in files:
        np.savez(file, bounds=np.zeros(3))
    again = datasets.load(str(corpus), queries=corpus, metric="l2", cache=cache)
    assert np.array_equal(again.bounds, first.bounds)


def test_a_damaged_kept_truth_is_as_good_as_none(tmp_path: Path) -> None:
    bounds, file = np.arange(4, dtype=np.float32), tmp_path / "cache" / "truth.npz"
    datasets._keep(file, bounds)
    assert [path.name for path in file.parent.iterdir()] == ["truth.npz"]
    assert np.array_equal(datasets._kept(file, 4), bounds)
    assert datasets._kept(file, 5) is None and datasets._kept(tmp_path / "none.npz", 4) is None
    whole = file.read_bytes()
    for at in range(len(whole)):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
        kept = datasets._kept(file, 4)
        assert kept is None or np.array_equal(kept, bounds)
        file.write_bytes(whole[:at])
        assert datasets._kept(file, 4) is None
    np.save(tmp_path / "array.npy", bounds)
    file.write_bytes((tmp_path / "array.npy").read_bytes())
    assert datasets._kept(file, 4) is None
    np.savez(file, other=bounds)
    assert datasets._kept(file, 4) is None


def test_a_truth_that_cannot_be_kept_is_told_and_leaves_nothing_behind(
    tmp_path: Path, base: NDArray[np.float32], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, data: bytes) -> None:
        path.write_bytes(data[:10])
        raise datasets.StorageError("no space left")

    monkeypatch.setattr(datasets, "write_file", full)
    bounds = datasets.truth("", base, base, "l2", 3, None, tmp_path / "cache")
    assert bounds.shape == (N,) and not list((tmp_path / "cache").iterdir())
    assert "not kept for the next run: no space left" in capsys.readouterr().out


def test_the_mixture_is_the_same_in_every_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "data"))
    mixture = importlib.import_module("mixture")
    monkeypatch.setattr(mixture, "BLOCK", 500)
    path = mixture.write(tmp_path / "base.fbin", 1200, mixture.BASE_SEED)
    few = np.concatenate(list(mixture.blocks(700, mixture.BASE_SEED)))
    assert datasets.read_bin(path).shape == (1200, 128)
    assert np.array_equal(datasets.read_bin(path)[:700], few)
    line = np.linspace(-30, 30, 2000, dtype=np.float32)[:, None] * np.ones((1, 5), dtype=np.float32)
    assert 0.8 < mixture.intrinsic_dimension(line[990:1010], line) < 1.3


# ------------------------------------------------------------------------------------- rules of counting


def test_recall_counts_ties_as_hits_and_a_row_once() -> None:
    base = np.array([[1, 0], [1, 0], [1, 0], [0, 1]], dtype=np.float32)
    query = np.array([[1, 0]], dtype=np.float32)
    data = Dataset("ties", base, query, "l2", 2, np.zeros(1, dtype=np.float32))
    recalls = {
        labels: data.recall(np.array([labels])) for labels in ((0, 1), (2, 1), (0, 3), (1, 1), (0, -1), (-1, -1))
    }
    assert recalls == {(0, 1): 1.0, (2, 1): 1.0, (0, 3): 0.5, (1, 1): 0.5, (0, -1): 0.5, (-1, -1): 0.0}


def test_qps_at_a_recall_is_interpolated_on_a_log_scale_and_never_extrapolated() -> None:
    # Half way between 10,000 and 2,500 on a log scale is 5,000.
    assert recall_qps.at_recall([0.94, 0.96], [10_000, 2_500], 0.95) == pytest.approx(5_000)
    assert recall_qps.at_recall([0.94, 0.97], [8_000, 1_000], 0.95) == pytest.approx(4_000)
    assert recall_qps.at_recall([0.95, 0.97], [8_000, 1_000], 0.95) == pytest.approx(8_000)
    assert recall_qps.at_recall([0.93, 0.95], [8_000, 1_000], 0.95) == pytest.approx(1_000)
    assert recall_qps.at_recall([0.93, 0.961], [8_000, 1_000], 0.95) is None  # .031 apart
    assert recall_qps.at_recall([0.96, 0.97], [8_000, 1_000], 0.95) is None
    assert recall_qps.at_recall([0.90, 0.94], [8_000, 1_000], 0.95) is None
    assert recall_qps.at_recall([1.0], [8_000], 1.0) is None
    assert recall_qps.at_recall([], [], 0.95) is None


def test_a_wide_gap_around_a_recall_gets_more_points() -> None:
    asked: list[int] = []

    def measure(point: Any) -> recall_qps.Measured:
        asked.append(point["ef"])
        recall = 1 - 1 / (0.8 * point["ef"])
        return recall_qps.Measured(point, recall, recall, 2000)

    curve = recall_qps.refined([{"ef": ef} for ef in (5, 20, 100, 400, 10_000, 20_000)], measure)
    assert [m.params["ef"] for m in curve] == sorted(asked) and 20_000 not in asked
    recalls = [m.recall for m in curve]
    for target in recall_qps.TARGETS:
        low, high = recall_qps.bracket(recalls, target)  # type: ignore[misc]
        assert recalls[high] - recalls[low] <= recall_qps.CLOSE
    assert between({"ef": 10}, {"ef": 11}) is None
    assert between({"ef": 10, "rerank": 20}, {"ef": 40, "rerank": 20}) == {"ef": 20, "rerank": 20}
    assert between({"epsilon": 0.0}, {"epsilon": 0.1}) == {"epsilon": pytest.approx(0.05)}


def entrant(name: str, qps: list[list[float]], recalls: tuple[float, ...] = (0.94, 0.96)) -> Any:
    curve = [
        recall_qps.Measured({}, recall, recall, 10, qps=values, p50_ms=values, p99_ms=values, batch_qps=values)
        for recall, values in zip(recalls, qps, strict=True)
    ]
    return types.SimpleNamespace(system=types.SimpleNamespace(name=name), curve=curve)


def test_ratios_are_taken_within_the_rounds_to_the_better_hnswlib() -> None:
    found = recall_qps.summary(
        [
            entrant("hnswlib M16", [[100, 50, 300], [100, 50, 300]]),
            entrant("hnswlib M32", [[80, 100, 200], [80, 100, 200]]),
            entrant("mine", [[200, 100, 600], [200, 100, 600]]),
            entrant("far", [[1, 1, 1], [2, 2, 2]], (0.90, 0.96)),
        ]
    )
    assert found["mine"]["0.95"]["qps_x_hnswlib"] == pytest.approx([2.0, 1.0, 2.0])
    assert found["mine"]["0.95"]["median"]["qps"] == pytest.approx(200)
    assert found["mine"]["0.95"]["median"]["qps_x_hnswlib"] == pytest.approx(2.0)
    assert found["mine"]["0.99"]["median"]["qps"] is None
    assert found["far"]["0.95"]["qps"] == [] and found["far"]["0.95"]["median"]["qps_x_hnswlib"] is None


# ------------------------------------------------------------------------------------------- comparison


def result(qps: list[float], build_s: float = 10.0, weight: float = 600.0) -> dict[str, Any]:
    system = {
        "name": "vecsvc hnsw",
        "at": {"0.95": {"qps": qps, "qps_x_hnswlib": [], "batch_qps": [], "batch_qps_x_hnswlib": []}},
        "build_s": build_s,
        "bytes_per_vector": weight,
        "vectors_bytes_per_vector": 0.0,
    }
    machine = {"cpu": "a", "cores": 2, "python": "3.11", "libraries": {"numpy": "2.0"}}
    return {"machine": machine, "task": {}, "metric": "ip", "k": 10, "threads": 2, "systems": [system]}


def test_compare_flags_what_is_beyond_the_noise_of_the_rounds() -> None:
    flags = lambda a, b: {c.what: c.flag for c in compare.changes(a, b)}  # noqa: E731
    steady, shaky = [100.0, 101.0, 99.0], [100.0, 120.0, 85.0]
    assert flags(result(steady), result([90.0, 91.0, 89.0]))["QPS .95"] == "WORSE"
    assert flags(result(steady), result([120.0, 121.0, 119.0]))["QPS .95"] == "better"
    assert flags(result(shaky), result([90.0, 91.0, 89.0]))["QPS .95"] == ""
    assert flags(result(steady), result([98.0, 98.0, 98.0]))["QPS .95"] == ""  # the least noise there is
    assert flags(result(steady), result(steady, build_s=13.0, weight=640.0)) == {
        "QPS .95": "", "build s": "WORSE", "bytes/vector": "WORSE"
    }  # fmt: skip
    assert flags(result(steady), result(steady, build_s=12.0, weight=500.0))["bytes/vector"] == "better"


def test_compare_shows_times_where_both_runs_have_them_and_less_is_better(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new, without = (result([100.0]) for _ in range(3))
    old["systems"][0]["at"]["0.95"] |= {"p50_ms": [0.0512, 0.0512], "p99_ms": [0.1, 0.12, 0.11]}
    new["systems"][0]["at"]["0.95"] |= {"p50_ms": [0.04], "p99_ms": [0.2, 0.2, 0.2]}
    flags = {change.what: change.flag for change in compare.changes(old, new)}
    assert flags == {"QPS .95": "", "p50 ms .95": "", "p99 ms .95": "WORSE", "build s": "", "bytes/vector": ""}
    new["systems"][0]["at"]["0.95"]["p50_ms"] *= 2  # what was measured once is a matter of luck
    assert {change.what: change.flag for change in compare.changes(old, new)}["p50 ms .95"] == "better"
    assert {change.what for change in compare.changes(old, without)} == {"QPS .95", "build s", "bytes/vector"}
    old["systems"][0]["at"]["0.95"]["p99_ms"] = [0.15, 0.12, 0.21]  # as far apart as the runs are
    assert {change.what: change.flag for change in compare.changes(old, new)}["p99 ms .95"] == ""
    for name, figures in (("a", old), ("b", new)):
        (tmp_path / f"{name}.json").write_text(json.dumps(figures))
    compare.main([str(tmp_path / "a.json"), str(tmp_path / "b.json")])
    line = next(line for line in capsys.readouterr().out.splitlines() if "p50 ms .95" in line)
    assert line.split()[-5:] == ["0.0512", "0.04", "0.78", "±3%", "better"]


def test_compare_ends_with_1_where_something_is_worse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, figures in (("a", result([100.0])), ("b", result([50.0]))):
        (tmp_path / f"{name}.json").write_text(json.dumps(figures))
    assert compare.main([str(tmp_path / "a.json"), str(tmp_path / "a.json")]) == 0
    assert compare.main([str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 1
    assert "WORSE" in capsys.readouterr().out
    (tmp_path / "c.json").write_text("[]")
    with pytest.raises(SystemExit, match="no result of recall_qps"):
        compare.main([str(tmp_path / "a.json"), str(tmp_path / "c.json")])


# --------------------------------------------------------------------------------------------- whole runs


@pytest.mark.skipif(not HAS_HNSWLIB, reason="needs hnswlib")
def test_a_whole_run_prints_the_table_and_writes_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    vectors = make_vectors(2300, 32)
    write_bin(tmp_path / "base.fbin", vectors[300:])
    write_bin(tmp_path / "queries.fbin", vectors[:300])
    monkeypatch.setattr(recall_qps, "RESULTS", tmp_path / "results")
    chosen = ["--systems", "vecsvc exact,vecsvc hnsw,hnswlib M16"]
    out = ["--out", str(tmp_path / "out"), "--rounds", "1", "--metric", "cosine"]
    recall_qps.main(["--data", str(tmp_path), *chosen, *out])
    printed = capsys.readouterr().out
    assert "x: to the better of hnswlib" in printed and "vecsvc exact:" in printed
    [file] = (tmp_path / "out").glob("*.json")
    figures = json.loads(file.read_text())
    systems = {system["name"]: system for system in figures["systems"]}
    assert set(systems) == {"vecsvc exact", "vecsvc hnsw", "hnswlib M16"} and not figures["failed"]
    assert [point["recall"] for point in systems["vecsvc exact"]["points"]] == [1.0]
    assert systems["vecsvc exact"]["vectors_bytes_per_vector"] == 4 * 32
    at = systems["vecsvc hnsw"]["at"]["0.95"]["median"]
    assert at["qps"] > 0 and at["qps_x_hnswlib"] > 0 and at["p99_ms"] > 0 and at["batch_qps"] > 0
    assert {"cpu", "libraries", "when"} <= set(figures["machine"]) and figures["seed"] == 7
    assert compare.main([str(file), str(file)]) == 0
    pytest.importorskip("matplotlib")
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in file.with_suffix(".svg").read_text()


def test_a_system_that_fails_or_is_missing_is_listed_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = recall_qps.systems()
    missing = recall_qps.System("gone", "no-such-package", table["hnswlib M16"].build, table["hnswlib M16"].points)
    vectors = make_vectors(220, 7)  # no product codes of two dimensions fit 7
    bounds = np.zeros(20, dtype=np.float32)
    data = Dataset("odd", vectors[20:], vectors[:20], "l2", 5, bounds)
    chosen = [missing, table["faiss IVF fastscan"], table["vecsvc exact"]]
    figures = recall_qps.run(data, chosen, tmp_path, 1, 1)
    assert figures["not_installed"] == ["gone"] and [s["name"] for s in figures["systems"]] == ["vecsvc exact"]
    assert "do not fit dim 7" in figures["failed"]["faiss IVF fastscan"]
    recall_qps.report(figures)
    printed = capsys.readouterr().out
    assert "gone: not installed, no claim" in printed and "faiss IVF fastscan: failed, no claim" in printed


def test_unknown_systems_and_bad_data_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="'vecsvc magic' is no system; known are"):
        recall_qps.main(["--systems", "vecsvc magic"])
    with pytest.raises(SystemExit, match="no such file or folder"):
        recall_qps.main(["--data", "/nowhere/at/all"])


# ----------------------------------------------------------------------------------------- ann-benchmarks


@pytest.fixture
def entry(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """benchmarks/ann_benchmarks/module.py as ann-benchmarks imports it, with a stand-in for its base class."""
    names = ("ann_benchmarks", "ann_benchmarks.algorithms", "ann_benchmarks.algorithms.base")
    for name in (*names, "ann_benchmarks.algorithms.vecsvc", "ann_benchmarks.algorithms.base.module"):
        module = types.ModuleType(name)
        module.__path__ = []  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["ann_benchmarks.algorithms.base.module"].BaseANN = type("BaseANN", (), {})  # type: ignore[attr-defined]
    name = "ann_benchmarks.algorithms.vecsvc.module"
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / "ann_benchmarks" / "module.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("metric", "ours"), [("angular", "cosine"), ("euclidean", "l2")])
def test_the_ann_benchmarks_class_answers_as_that_harness_asks(entry: Any, metric: str, ours: Any) -> None:
    vectors = make_vectors(420, 12)
    kind = "hnsw" if HAS_HNSWLIB else "faiss"
    algorithm = entry.Vecsvc(metric, {"kind": kind, "params": {"m": 8} if HAS_HNSWLIB else {}})
    algorithm.fit(vectors[20:].astype(np.float64))
    algorithm.set_query_arguments(200)
    bounds = datasets.truth("", vectors[20:], vectors[:20], ours, 5, None, None)
    data = Dataset("", vectors[20:], vectors[:20], ours, 5, bounds)
    found = np.array([algorithm.query(query, 5) for query in vectors[:20]])
    assert data.recall(found) > 0.98
    algorithm.batch_query(vectors[:20], 5)
    assert np.array_equal(np.array(algorithm.get_batch_results()), found)
    assert algorithm.get_additional()["ef_search"] == 200
    assert str(algorithm).startswith(f"vecsvc-{kind}(") and "ef_search=200" in str(algorithm)
    algorithm.done()


def test_the_ann_benchmarks_class_refuses_what_it_does_not_know(entry: Any) -> None:
    with pytest.raises(ValueError, match="metric 'hamming' is not known; known are angular, euclidean"):
        entry.Vecsvc("hamming")
    with pytest.raises(ValueError, match="'knid' is not known"):
        entry.Vecsvc("angular", {"knid": "hnsw"})
    with pytest.raises(Exception, match="'magic' is no kind of index"):
        entry.Vecsvc("angular", {"kind": "magic"})


def test_probing_is_measured_for_a_hash_and_for_clusters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(7)
    middles = rng.standard_normal((9, DIM))
    points = (middles[rng.integers(0, 9, 420)] + 0.2 * rng.standard_normal((420, DIM))).astype(np.float32)
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    base, queries = np.ascontiguousarray(points[20:]), np.ascontiguousarray(points[:20])
    bounds = np.sort(1 - queries @ base.T, axis=1)[:, common.K - 1]
    monkeypatch.setattr(probe, "load_task", lambda data: common.Task("few", base, queries, bounds))
    monkeypatch.setattr(sys, "argv", ["probe.py", "--shards", "3", "--results", str(tmp_path)])
    probe.main()
    figures = json.loads((tmp_path / "probe.json").read_text())
    curves = {system["name"]: system["points"] for system in figures["systems"]}
    assert list(curves) == ["hash", "clusters, 0 %", "clusters, 10 %", "clusters, 20 %"]
    for points in curves.values():
        recalls = [point["recall"] for point in points]
        assert recalls == sorted(recalls) and recalls[-1] == 1.0 and len(recalls) == 3
    assert curves["clusters, 0 %"][0]["recall"] > 0.6 > curves["hash"][0]["recall"]
    assert curves["clusters, 20 %"][2]["rows"] > 1.1 and curves["hash"][2]["rows"] == 1.0


def test_a_walk_without_restarts_misses_what_lies_in_other_parts_of_the_graph(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tp_tree, "EF_SEARCH", (16, 1024))
    task = tp_tree.far_apart(rows=3200, clusters=8, queries=100)
    figures = tp_tree.restarts(task)
    assert figures["parts"] == 8 and "a graph of 8 parts" in capsys.readouterr().out
    for _, *pairs, _ in figures["walks"]:
        assert all(restarting >= once for restarting, once in zip(pairs[::2], pairs[1::2], strict=True))
    # A pool of 1024 is not full after the 400 of one part: the walk goes on, where it may.
    breadth, recall, recall_once, visited, visited_once, hops, hops_once, changed = figures["walks"][-1]
    assert recall > recall_once and visited > visited_once and hops > hops_once and changed > 0.5
    # The index that users get is built and searched as before: the copy has kernels of its own.
    params = {"walk": "codes"}
    index = index_builders.build(task.base, kind="nng", metric="ip", params=params, num_threads=1, seed=tp_tree.SEED)
    found = index.search(task.queries, common.K, indexes.search_params("nng", ef_search=breadth))
    assert float(found.hops.mean()) == hops
