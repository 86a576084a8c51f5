"""What is particular to faiss: any factory, settings that travel with the call, honest refusals, a GPU switch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

import index_builders
from index_builders.base import operating_points
from vecsvc import indexes
from vecsvc.errors import ArtifactDamaged, BackendMissing, InvalidParameter, UnknownParameter
from vecsvc.indexes import faiss_index
from vecsvc.types import IndexSpec, Metric

RNG = np.random.default_rng(9)
VECTORS = RNG.standard_normal((1100, 16)).astype(np.float32)
QUERIES = RNG.standard_normal((25, 16)).astype(np.float32)
MASK = RNG.random(1100) < 0.3

# Factory -> what it knows, and settings that find nearly everything.
FACTORIES: dict[str, dict[str, int]] = {
    "Flat": {},
    "HNSW32": {"ef_search": 256},
    "IVF16,Flat": {"nprobe": 16},
    "SQ8": {"k_factor": 4},
    "HNSW32,SQ8": {"ef_search": 256, "k_factor": 4},
    "IVF16_HNSW8,SQfp16": {"nprobe": 16, "ef_search": 64, "k_factor": 4},
    "PCA12,IVF16,SQ8": {"nprobe": 16, "k_factor": 30},
    "PQ8x4fs": {"k_factor": 30},
    "IVF16,PQ8x4fs": {"nprobe": 16, "k_factor": 30},
    "PQ8x4fs,RFlat": {"k_factor": 30},
    "HNSW16,SQ8,Refine(SQfp16)": {"ef_search": 256, "k_factor": 4},
}


def build(factory: str, metric: Metric = "ip", vectors: np.ndarray = VECTORS, **params: Any) -> Any:
    return index_builders.build(
        vectors, kind="faiss", metric=metric, params={"factory": factory, **params}, num_threads=1
    )


def settings(**values: int) -> Any:
    return indexes.search_params("faiss", **values)


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
@pytest.mark.parametrize("factory", FACTORIES)
def test_every_factory_finds_nearly_all_with_exact_distances(factory: str, metric: Metric, tmp_path: Path) -> None:
    index = build(factory, metric)
    index.save(tmp_path)
    loaded = indexes.load(tmp_path, index.spec, vectors=VECTORS)
    generous = settings(**FACTORIES[factory])
    for allowed in (None, MASK):
        found = index.search(QUERIES, 10, generous, allowed=allowed)
        truth = index._exact.search(QUERIES, 10, allowed=allowed)
        assert (found.distances <= truth.distances[:, -1:] + 1e-4).mean() >= 0.95
        assert allowed is None or allowed[found.labels].all()
        np.testing.assert_array_equal(loaded.search(QUERIES, 10, generous, allowed=allowed).labels, found.labels)
        for row, query in enumerate(QUERIES):
            exact = faiss_index.nearest(query, found.labels[row], 10, VECTORS, metric)[1]
            np.testing.assert_allclose(found.distances[row], exact, atol=1e-4)


@pytest.mark.parametrize("factory", FACTORIES)
def test_a_setting_that_the_factory_does_not_know_is_refused_with_those_it_knows(factory: str) -> None:
    index = build(factory)
    known = FACTORIES[factory]
    for name in ("nprobe", "ef_search", "k_factor"):
        if name in known:
            index.search(QUERIES, 3, settings(**{name: 5}))
        else:
            with pytest.raises(
                UnknownParameter, match=f"'{name}'; faiss .* knows: {', '.join(known) or 'no settings'}"
            ):
                index.search(QUERIES, 3, settings(**{name: 5}))


def test_a_setting_left_out_keeps_the_indexs_own(tmp_path: Path) -> None:
    index = build("IVF16,SQ8")
    index._index.nprobe = 16
    index.save(tmp_path)
    loaded = indexes.load(tmp_path, index.spec, vectors=VECTORS)
    found = loaded.search(QUERIES, 10, settings(k_factor=8))
    np.testing.assert_array_equal(found.labels, loaded.search(QUERIES, 10, settings(nprobe=16, k_factor=8)).labels)
    assert (found.labels != loaded.search(QUERIES, 10, settings(nprobe=1, k_factor=8)).labels).any()
    assert loaded._index.nprobe == 16


def test_a_mask_keeps_the_indexs_own_breadth() -> None:
    index = build("IVF16,Flat")
    index._index.nprobe = 16
    found = index.search(QUERIES, 10, allowed=MASK)
    np.testing.assert_array_equal(found.labels, index._exact.search(QUERIES, 10, allowed=MASK).labels)


@pytest.mark.parametrize("factory", ["PQ8x4fs", "PQ8x4fs,RFlat"])
def test_types_that_refuse_masks_are_answered_exactly(factory: str) -> None:
    index = build(factory)
    found = index.search(QUERIES, 10, allowed=MASK)
    np.testing.assert_array_equal(found.labels, index._exact.search(QUERIES, 10, allowed=MASK).labels)
    assert (found.visited == MASK.sum()).all()


def test_more_candidates_an_answer_find_more() -> None:
    index = build("PQ4x4fs")
    truth = index._exact.search(QUERIES, 10).distances[:, -1:] + 1e-5
    hits = [(index.search(QUERIES, 10, settings(k_factor=f)).distances <= truth).mean() for f in (1, 6, 40)]
    assert hits[0] < hits[1] < hits[2]


# ----------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("factory", "metric", "shown"),
    [
        ("bogus", "l2", r"factory 'bogus' over 1100 vectors of dim 16: could not parse index string bogus"),
        ("", "l2", r"could not parse"),
        ("IVF16,PQ3", "l2", r"multiple of the number of subquantizers"),
        ("IVF2000,Flat", "l2", r"Number of training points \(1100\) should be at least .* clusters \(2000\)"),
        ("IDMap,Flat", "l2", r"add does not make sense with IndexIDMap"),
        ("HNSW16_PQ4", "cosine", r"faiss builds it for l2 only, not for cosine"),
        ("HNSW32,FlatPanorama8", "ip", r"'metric == METRIC_L2' failed"),
        ("NSG32,Flat", "l2", r"NSG does not always return; choose an HNSW factory"),
    ],
)
def test_a_factory_that_does_not_fit_is_refused_with_faiss_reason(factory: str, metric: Metric, shown: str) -> None:
    with pytest.raises(InvalidParameter, match=shown) as caught:
        build(factory, metric)
    assert ".cpp" not in str(caught.value)


def test_settings_have_bounds() -> None:
    with pytest.raises(InvalidParameter, match="nprobe must be between 1 and"):
        settings(nprobe=0)
    with pytest.raises(InvalidParameter, match="device must be one of cpu, cuda, got 'tpu'"):
        build("Flat", device="tpu")


@pytest.mark.parametrize("mmap", [True, False], ids=["mmapped", "loaded"])
def test_damaged_and_foreign_files_are_refused_by_name(tmp_path: Path, mmap: bool) -> None:
    index = build("Flat")
    path = tmp_path / faiss_index.FILE
    with pytest.raises(ArtifactDamaged, match=r"faiss\.index: missing"):
        indexes.load(tmp_path, index.spec, vectors=VECTORS, mmap=mmap)
    path.write_bytes(b"no index at all")
    with pytest.raises(ArtifactDamaged, match=r"faiss\.index: faiss cannot read it"):
        indexes.load(tmp_path, index.spec, vectors=VECTORS, mmap=mmap)
    path.unlink()
    index.save(tmp_path)
    for spec in (
        IndexSpec("faiss", 16, "ip", 1099),
        IndexSpec("faiss", 15, "ip", 1100),
        IndexSpec("faiss", 16, "l2", 1100),
    ):
        with pytest.raises(ArtifactDamaged, match=r"faiss\.index: holds 1100 vectors of dim 16 under metric 0"):
            indexes.load(tmp_path, spec, vectors=VECTORS, mmap=mmap)


# ---------------------------------------------------------------------------------------- operating points


@pytest.mark.parametrize(
    ("factory", "first", "last"),
    [
        ("HNSW32", {"ef_search": 16}, {"ef_search": 512}),
        ("HNSW32,SQ8", {"ef_search": 16}, {"ef_search": 512}),
        ("IVF16,Flat", {"nprobe": 1}, {"nprobe": 16}),
        ("OPQ8,IVF100,PQ8", {"nprobe": 1}, {"nprobe": 64}),
        ("PQ8", {"k_factor": 1}, {"k_factor": 64}),
        ("Flat", {}, {}),
    ],
)
def test_operating_points_turn_the_factorys_own_knob(factory: str, first: dict[str, int], last: dict[str, int]) -> None:
    points = operating_points(IndexSpec("faiss", 16, "l2", 1100, {"factory": factory, "device": "cpu"}))
    assert (points[0], points[-1]) == (first, last)


# -------------------------------------------------------------------------------------------------- device


def test_cuda_without_a_gpu_is_refused_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 0)
    with pytest.raises(BackendMissing, match=r"pip install 'vecsvc\[gpu\]'.*or choose device cpu"):
        build("IVF16,Flat", device="cuda")
    index = build("IVF16,Flat")
    index.save(tmp_path)
    with pytest.raises(BackendMissing, match="NVIDIA GPU"):
        indexes.load(tmp_path, index.spec, vectors=VECTORS, device="cuda")


def test_a_type_without_a_gpu_form_is_searched_on_the_cpu(tmp_path: Path) -> None:
    index = build("HNSW32")
    index.save(tmp_path)
    loaded = indexes.load(tmp_path, index.spec, vectors=VECTORS, device="cuda")
    np.testing.assert_array_equal(loaded.search(QUERIES, 5).labels, index.search(QUERIES, 5).labels)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A faiss that says it has a GPU and keeps its indexes on the CPU; returns what moved where."""
    moves: list[str] = []

    def moved(to: str, index: Any) -> Any:
        moves.append(to)
        return index

    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
    monkeypatch.setattr(faiss, "StandardGpuResources", object, raising=False)
    monkeypatch.setattr(faiss, "index_cpu_to_gpu", lambda r, n, index: moved("gpu", index), raising=False)
    monkeypatch.setattr(faiss, "index_gpu_to_cpu", lambda index: moved("cpu", index), raising=False)
    return moves


def test_a_build_on_the_gpu_comes_back_to_the_cpu(gpu: list[str], tmp_path: Path) -> None:
    index = build("IVF16,SQ8", device="cuda")
    assert gpu == ["gpu", "cpu"]
    index.save(tmp_path)
    assert gpu == ["gpu", "cpu"]
    with pytest.raises(InvalidParameter, match="IndexHNSWFlat has no form for the GPU"):
        build("HNSW32", device="cuda")


def test_on_the_gpu_masks_and_large_k_are_answered_exactly(gpu: list[str], tmp_path: Path) -> None:
    vectors = RNG.standard_normal((3000, 16)).astype(np.float32)
    built = build("PCA8,IVF4,Flat", vectors=vectors)
    built.save(tmp_path)
    index: Any = indexes.load(tmp_path, built.spec, vectors=vectors, device="cuda")
    np.testing.assert_array_equal(index.search(QUERIES, 5).labels, built.search(QUERIES, 5).labels)
    mask = np.arange(3000) % 2 == 0
    assert (index.search(QUERIES, 5, allowed=mask).visited == 1500).all()
    assert (index.search(QUERIES, 600).visited == 3000).all()
    (tmp_path / "again").mkdir()
    index.save(tmp_path / "again")
    assert gpu == ["gpu", "cpu"]
