"""What is particular to faiss: any factory, settings that travel with the call, honest refusals, a GPU switch."""

from __future__ import annotations

import importlib
import types
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

import index_builders
from index_builders import faiss_index as builder
from index_builders.base import operating_points
from index_builders.gpu_lists import gpu_neighbours
from vecsvc import indexes
from vecsvc.errors import ArtifactDamaged, BackendMissing, InvalidParameter, InvalidVector, UnknownParameter
from vecsvc.exact_search import ExactSearch
from vecsvc.indexes import faiss_index
from vecsvc.types import METRICS, IndexSpec, Metric

RNG = np.random.default_rng(9)
VECTORS = RNG.standard_normal((1100, 16)).astype(np.float32)
QUERIES = RNG.standard_normal((25, 16)).astype(np.float32)
MASK = RNG.random(1100) < 0.3
# As embeddings are: many dimensions, of which fewer count. Codes of a bit a dimension need that.
_PLANE = RNG.standard_normal((10, 64))
WIDE = (RNG.standard_normal((1100, 10)) @ _PLANE + 0.3 * RNG.standard_normal((1100, 64))).astype(np.float32)
WIDE_QUERIES = (RNG.standard_normal((25, 10)) @ _PLANE + 0.3 * RNG.standard_normal((25, 64))).astype(np.float32)

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


# ------------------------------------------------------------------------------------------------- presets


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", builder.PRESETS)
def test_every_preset_reaches_95_percent_by_its_breadth_alone_saved_and_loaded(
    name: str, metric: Metric, tmp_path: Path
) -> None:
    built = build_preset(name, metric, WIDE)
    built.save(tmp_path)
    index = indexes.load(tmp_path, built.spec, vectors=WIDE)
    widest = settings(**operating_points(built.spec)[-1])
    truth = built._exact.search(WIDE_QUERIES, 10).distances[:, -1:] + 1e-4
    found = index.search(WIDE_QUERIES, 10, widest)
    assert (found.distances <= truth).mean() >= 0.95
    np.testing.assert_array_equal(found.labels, built.search(WIDE_QUERIES, 10, widest).labels)
    masked = index.search(WIDE_QUERIES, 10, widest, allowed=MASK)
    assert MASK[masked.labels].all()
    # What serves without a certificate is no accident of faiss' defaults either.
    assert (index.search(WIDE_QUERIES, 10).distances <= truth).mean() >= 0.25


def build_preset(name: str, metric: Metric = "ip", vectors: np.ndarray = VECTORS, **params: Any) -> Any:
    return index_builders.build(vectors, kind="faiss", metric=metric, params={"preset": name, **params}, num_threads=1)


def test_the_spec_keeps_the_presets_name_and_what_it_came_to() -> None:
    assert build_preset("ivf-pq-fast").spec.params == {
        "factory": "IVF16,PQ8x4fsr",
        "preset": "ivf-pq-fast",
        "device": "cpu",
        "k_factor": 5,
    }
    index = build_preset("hnsw-sq8", ef_construction=48, k_factor=3)
    assert index.spec.params["ef_construction"] == index._index.hnsw.efConstruction == 48
    assert index.spec.params["k_factor"] == index._k_factor == 3
    assert build("Flat").spec.params == {"factory": "Flat", "device": "cpu"}
    none = index_builders.build(VECTORS, kind="faiss", metric="ip", num_threads=1)
    assert none.spec.params == {"factory": "HNSW32", "device": "cpu", "ef_construction": 200}


@pytest.mark.parametrize("factory", ["HNSW8", "PCA4,HNSW8", "HNSW8_SQ8,RFlat", "PCA4,HNSW8,RFlat"])
def test_a_graph_is_built_broader_than_faiss_would(factory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    breadths = []
    tuned = builder._tuned

    def watched(index: Any, *others: Any) -> Any:
        params = tuned(index, *others)
        inner = index
        while not hasattr(inner, "hnsw"):
            inner = faiss.downcast_index(inner.base_index if hasattr(inner, "base_index") else inner.index)
        breadths.append(inner.hnsw.efConstruction)
        return params

    monkeypatch.setattr(builder, "_tuned", watched)
    assert build(factory=factory).spec.params["ef_construction"] == 200
    assert build(factory=factory, ef_construction=30).spec.params["ef_construction"] == 30
    assert breadths == [200, 30]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("dim", "used"), [(63, False), (64, True)])
def test_cells_are_trained_with_fewer_products_where_there_are_dimensions_enough(
    metric: Metric, dim: int, used: bool
) -> None:
    index = build("IVF16,Flat", metric, WIDE[:, :dim].copy())
    assert bool(faiss.try_extract_index_ivf(index._index).cp.use_super_kmeans) == used
    found = index.search(np.ascontiguousarray(WIDE_QUERIES[:, :dim]), 5, settings(nprobe=16))
    exact = ExactSearch(WIDE[:, :dim].copy(), metric).search(np.ascontiguousarray(WIDE_QUERIES[:, :dim]), 5)
    np.testing.assert_array_equal(found.labels, exact.labels)


def test_a_graph_that_only_finds_cells_is_left_as_faiss_builds_it() -> None:
    assert "ef_construction" not in build(factory="IVF4_HNSW8,Flat").spec.params


def test_a_default_k_factor_serves_where_a_search_names_none(tmp_path: Path) -> None:
    built = build("PQ4x4fs", k_factor=40)
    built.save(tmp_path)
    index = indexes.load(tmp_path, built.spec, vectors=VECTORS)
    expected = build("PQ4x4fs").search(QUERIES, 10, settings(k_factor=40))
    np.testing.assert_array_equal(index.search(QUERIES, 10).labels, expected.labels)
    assert (index.search(QUERIES, 10, settings(k_factor=1)).labels != expected.labels).any()


@pytest.mark.parametrize(
    ("params", "shown"),
    [
        ({"factory": "Flat", "preset": "flat"}, "factory 'Flat' and preset 'flat' exclude each other: name one"),
        ({"factory": "", "preset": "flat"}, "factory '' and preset 'flat' exclude"),
        ({"preset": "fast"}, "preset must be one of flat, ivf-flat, .*, got 'fast'"),
        ({"factory": "IVF4,Flat", "ef_construction": 80}, "ef_construction is for HNSW factories; leave it out"),
        ({"factory": "IVF4,Flat", "k_factor": 8}, "k_factor is for codes, and this keeps whole vectors; leave it out"),
        ({"preset": "flat", "k_factor": 8}, "preset 'flat', factory 'Flat' over 1100 .* leave it out"),
        ({"preset": "hnsw-sq8", "k_factor": 0}, "k_factor must be between 1 and 1000, got 0"),
    ],
)
def test_parameters_that_contradict_each_other_are_refused(params: dict[str, Any], shown: str) -> None:
    with pytest.raises(InvalidParameter, match=shown):
        index_builders.build(VECTORS, kind="faiss", metric="ip", params=params)


def test_too_few_vectors_for_a_preset_are_refused_by_its_name() -> None:
    with pytest.raises(InvalidParameter, match=r"preset 'ivf-pq-fast', factory 'IVF1,PQ8x4fsr' over 5 vectors"):
        build_preset("ivf-pq-fast", vectors=VECTORS[:5])


@pytest.mark.parametrize(
    ("size", "twice", "four"),
    [(1, 1, 1), (77, 1, 1), (78, 2, 2), (1100, 16, 16), (10_000, 128, 256), (79_890, 512, 1024), (1 << 20, 2048, 4096)],
)
def test_cells_are_a_power_of_two_near_a_multiple_of_the_root(size: int, twice: int, four: int) -> None:
    assert (builder.cells(size, 2), builder.cells(size, 4)) == (twice, four)
    assert builder.cells(size, 4) == 1 or builder.cells(size, 4) * builder.MIN_ROWS_A_CELL <= size


@pytest.mark.parametrize(
    ("dim", "fast", "whole"),
    [
        (1, (2, 1), (1, 1)),
        (3, (4, 2), (3, 1)),
        (25, (26, 13), (28, 4)),
        (128, (128, 64), (128, 32)),
        (300, (300, 150), (320, 64)),
        (384, (384, 192), (384, 96)),
        (1000, (1000, 500), (1056, 96)),
    ],
)
def test_codes_divide_the_padded_dim(dim: int, fast: tuple[int, int], whole: tuple[int, int]) -> None:
    assert (builder.fast_codes(dim), builder.byte_codes(dim)) == (fast, whole)
    assert fast[0] == 2 * fast[1]
    assert whole[0] % whole[1] == 0


@pytest.mark.parametrize("name", ["ivf-pq-fast", "ivf-pq", "rabitq"])
def test_a_dim_that_codes_do_not_divide_is_padded(name: str, tmp_path: Path) -> None:
    vectors = np.ascontiguousarray(VECTORS[:, :13])
    built = build_preset(name, "l2", vectors)
    built.save(tmp_path)
    index = indexes.load(tmp_path, built.spec, vectors=vectors)
    found = index.search(vectors[:20], 1, settings(**operating_points(built.spec)[-1]))
    np.testing.assert_array_equal(found.labels[:, 0], np.arange(20))


@pytest.mark.parametrize(
    ("name", "metric", "device", "factory"),
    [
        ("ivf-flat", "l2", "cpu", "IVF8192_HNSW32,Flat"),
        ("ivf-flat", "l2", "cuda", "IVF8192,Flat"),  # a GPU finds the cells by comparing all
        ("ivf-pq-fast", "cosine", "cpu", "IVF4096_HNSW32,PQ384x4fsr"),
        ("ivf-pq-fast", "l2", "cpu", "IVF4096_HNSW32,PQ384x4fs"),
        ("ivf-pq", "ip", "cuda", "IVF4096,PQ96np"),
        ("rabitq", "ip", "cpu", "IVF4096_HNSW32,RaBitQ"),
    ],
)
def test_millions_of_rows_find_their_cells_by_a_graph(name: str, metric: Metric, device: str, factory: str) -> None:
    params = builder.resolved(builder.BuildParams(preset=name, device=device), 5_000_000, 768, metric)
    assert params.factory == factory
    assert faiss.index_factory(768, factory, faiss_index.metric_type(metric)).d == 768


def test_the_training_sample_is_bounded() -> None:
    assert builder._training_rows(5000, 16, 32) == 5000
    assert builder._training_rows(10**7, 16, 1024) == 1024 * builder.ROWS_A_CELL
    assert builder._training_rows(10**7, 1024, 4096) == builder.MAX_TRAINING_BYTES // 4096
    assert builder._training_rows(10**7, 16_384, 4096) == 4096 * builder.MIN_ROWS_A_CELL


def test_the_tables_of_a_product_quantizer_may_be_larger_than_its_file(tmp_path: Path) -> None:
    vectors = RNG.standard_normal((1300, 64)).astype(np.float32)
    for metric in METRICS:
        (tmp_path / faiss_index.FILE).unlink(missing_ok=True)
        built = index_builders.build(
            vectors, kind="faiss", metric=metric, params={"factory": "IVF32,PQ64x8np"}, num_threads=1
        )
        built.save(tmp_path)
        assert (tmp_path / faiss_index.FILE).stat().st_size + faiss_index.READ_SLACK_BYTES < 32 * 64 * 256 * 4
        for mmap in (True, False):
            index: Any = indexes.load(tmp_path, built.spec, vectors=vectors, mmap=mmap)
            assert index._index.use_precomputed_table == built._index.use_precomputed_table
            np.testing.assert_array_equal(index.search(vectors[:9], 5).labels, built.search(vectors[:9], 5).labels)


def test_a_query_of_zeros_is_answered_by_4_bit_codes_too() -> None:
    index = build_preset("ivf-pq-fast", "ip")
    queries = QUERIES[:3].copy()
    queries[1] = 0.0
    found = index.search(queries, 5)
    np.testing.assert_array_equal(found.labels[1], np.arange(5))
    np.testing.assert_array_equal(found.distances[1], np.ones(5))
    np.testing.assert_array_equal(found.labels[2], index.search(queries[2:], 5).labels[0])


@pytest.mark.parametrize("metric", METRICS)
def test_the_shortlist_keeps_every_one_of_the_nearest(metric: Metric) -> None:
    rng = np.random.default_rng(4)
    vectors = rng.standard_normal((400, 24)).astype(np.float32)
    vectors[50:90] = vectors[7]
    far = vectors + np.float32(1000.0)
    tiny, huge = vectors * np.float32(1e-20), vectors * np.float32(1e15 / np.abs(vectors).max())
    zeros = vectors.copy()
    zeros[::3] = 0.0
    for rows in (vectors, vectors.astype(np.float16), far, tiny, huge, zeros):
        kept = 0
        for query in (rows[7], rows[8], rng.standard_normal(24)):
            query = query.astype(np.float32)
            short = faiss_index.shortlist(query, np.arange(400), 10, rows, metric)
            labels, distances = faiss_index.nearest(query, short, 10, rows, metric)
            truth = faiss_index.nearest(query, np.arange(400), 10, rows, metric)
            np.testing.assert_array_equal(labels, truth[0])
            np.testing.assert_array_equal(distances, truth[1])
            kept += len(short)
        assert rows is not vectors or kept < 100  # it does leave most of them out


# ---------------------------------------------------------------------------------------- operating points


def test_operating_points_are_half_a_power_of_two_apart() -> None:
    points = operating_points(IndexSpec("faiss", 16, "l2", 1100, {"factory": "IVF16,Flat", "device": "cpu"}))
    assert [point["nprobe"] for point in points] == [1, 2, 3, 4, 6, 8, 12, 16]


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
    monkeypatch.setattr(faiss, "GpuClonerOptions", types.SimpleNamespace, raising=False)
    monkeypatch.setattr(
        faiss,
        "index_cpu_to_gpu",
        lambda resources, number, index, options: moved(
            "gpu, tables of float16" if options.useFloat16 else "gpu", index
        ),
        raising=False,
    )
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


def test_a_gpu_selects_only_so_many_cells(gpu: list[str], tmp_path: Path) -> None:
    built = build("IVF16,Flat")
    built.save(tmp_path)
    index = indexes.load(tmp_path, built.spec, vectors=VECTORS, device="cuda")
    index.search(QUERIES, 5, settings(nprobe=2048))
    with pytest.raises(InvalidParameter, match="nprobe is 2049; on a GPU it can be 2048 at most"):
        index.search(QUERIES, 5, settings(nprobe=2049))


@pytest.mark.parametrize(
    ("name", "moves"),
    [
        ("flat", ["gpu", "cpu"]),
        ("ivf-flat", ["gpu", "cpu"]),
        ("ivf-sq8", ["gpu", "cpu"]),
        ("ivf-pq", ["gpu, tables of float16", "cpu"]),
        ("ivf-pq-fast", "IndexIVFPQFastScan has no form for the GPU: choose device cpu, or"),
        ("rabitq", "IndexIVFRaBitQ has no form for the GPU"),
        ("hnsw-sq8", "IndexHNSWSQ has no form for the GPU"),
    ],
)
def test_presets_go_to_the_gpu_or_say_why_not(gpu: list[str], name: str, moves: list[str] | str) -> None:
    if isinstance(moves, str):
        with pytest.raises(InvalidParameter, match=moves):
            build_preset(name, device="cuda")
    else:
        build_preset(name, device="cuda")
        assert gpu == moves


@pytest.mark.parametrize(
    ("factory", "shown"),
    [
        ("IVF16,PQ8x6np", r"PQ8x6 has no form for the GPU, which takes 8 bits and \(1, 2, 3, "),
        ("PCA10,IVF16,PQ10np", "PQ10x8 has no form for the GPU"),
        ("IVF16_HNSW8,Flat", "IndexIVFFlat has no form for the GPU with cells found by IndexHNSWFlat"),
        ("IVF16,SQ6", "takes SQ8, SQ4 and SQfp16"),
    ],
)
def test_what_the_gpus_forms_leave_out_is_refused_before_it_gets_there(
    gpu: list[str], factory: str, shown: str
) -> None:
    with pytest.raises(InvalidParameter, match=shown):
        build(factory, device="cuda")
    assert gpu == []


def test_a_gpu_that_refuses_is_reported_in_one_line(gpu: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> Any:
        raise RuntimeError("Error in void* alloc() at /somewhere/Res.cpp:1: Error: 'err' failed: out of memory")

    monkeypatch.setattr(faiss, "index_cpu_to_gpu", full)
    with pytest.raises(InvalidParameter, match="cannot move the index to the GPU: out of memory"):
        faiss_index.to_gpu(faiss.IndexFlatL2(4))


# ----------------------------------------------------------------------------------- neighbours of every row


def lists_by_brute_force(vectors: np.ndarray, k: int, metric: Metric) -> np.ndarray:
    found = ExactSearch(vectors, metric).search(vectors.astype(np.float32), len(vectors))
    rows = [row[row != i][:k] for i, row in enumerate(found.labels)]
    return np.array(rows)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("metric", METRICS)
def test_neighbour_lists_are_those_of_brute_force_in_one_part_and_in_many(
    gpu: list[str], metric: Metric, device: str
) -> None:
    vectors = VECTORS[:300].astype(np.float16)
    truth = lists_by_brute_force(vectors, 8, metric)
    for device_bytes, parts in ((1 << 20, 1), (4 * 16 * 70, 5)):
        gpu.clear()
        done: list[int] = []
        labels, distances = gpu_neighbours(
            vectors, 8, metric, device=device, device_bytes=device_bytes, progress=done.append
        )
        assert gpu == ["gpu"] * (parts if device == "cuda" else 0)
        assert sum(done) == 300
        assert (labels.dtype, distances.dtype) == (np.int64, np.float32)
        assert (labels == truth).mean() > 0.999  # float32 may swap what is equally far but for rounding
        for row in range(0, 300, 29):
            exact = faiss_index.nearest(vectors[row].astype(np.float32), truth[row], 8, vectors, metric)[1]
            np.testing.assert_allclose(distances[row], exact, atol=1e-4)


def test_a_row_among_its_duplicates_is_no_neighbour_of_itself() -> None:
    vectors = np.repeat(VECTORS[:3], 20, axis=0)
    labels, _ = gpu_neighbours(vectors, 5, "l2", device="cpu", device_bytes=4 * 16 * 7)
    assert (labels != np.arange(60)[:, None]).all()
    assert (labels // 20 == np.arange(60)[:, None] // 20).all()
    assert all(len(set(row)) == 5 for row in labels.tolist())


def test_lists_are_never_longer_than_there_are_other_rows() -> None:
    labels, distances = gpu_neighbours(VECTORS[:4], 50, "ip", device="cpu")
    assert labels.shape == distances.shape == (4, 3)
    assert sorted(labels[2].tolist()) == [0, 1, 3]


def test_lists_that_cannot_be_are_refused() -> None:
    with pytest.raises(InvalidParameter, match="k is 0 for 1100 rows; it must be from 1 to 2047"):
        gpu_neighbours(VECTORS, 0, "l2", device="cpu")
    with pytest.raises(InvalidParameter, match="k is 5 for 1 rows"):
        gpu_neighbours(VECTORS[:1], 5, "l2", device="cpu")
    with pytest.raises(InvalidVector, match=r"vectors\[3\]\[2\] is nan"):
        gpu_neighbours(np.where(np.arange(1600).reshape(100, 16) == 50, np.nan, VECTORS[:100]), 5, "l2", device="cpu")
    if faiss.get_num_gpus() == 0:
        with pytest.raises(BackendMissing, match="device cuda needs an NVIDIA GPU"):
            gpu_neighbours(VECTORS, 5, "l2")


# ------------------------------------------------------------------------------------- the check for a GPU


def test_the_gpu_benchmark_runs_where_there_is_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    script = importlib.import_module("gpu")
    monkeypatch.setattr(script, "has_gpu", lambda: False)
    assert script.main([]) == 0
    assert "no GPU that faiss can use" in capsys.readouterr().out
    rng = np.random.default_rng(3)
    base = faiss_index.unit(rng.standard_normal((700, 16)))
    task = script.Task("tiny", base, base[:60], np.zeros(60))
    monkeypatch.setattr(script, "load_task", lambda data: task)
    assert script.main(["--cpu"]) == 0
    printed = capsys.readouterr().out
    assert "every check passed" in printed
    assert all(name in printed for name in script.BUILDS)
