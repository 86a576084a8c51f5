"""The libraries beside us, each with the settings that its users know it by.

Every class imports its library when it is built, so that the table can be read without any of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from peers.base import Point, Searcher, System, knob

BREADTHS = (10, 12, 14, 17, 20, 24, 29, 35, 42, 50, 60, 72, 86, 104, 125, 150, 180, 216, 260, 310, 375, 450, 540, 800)
EPSILONS = (0.0, 0.02, 0.04, 0.06, 0.08, 0.1, 0.12, 0.15, 0.18, 0.22, 0.26, 0.3, 0.35, 0.4, 0.5)
SEED = 7


class Hnswlib:
    def __init__(self, vectors: np.ndarray, metric: str, threads: int, params: Mapping[str, Any]) -> None:
        import hnswlib

        self._index = hnswlib.Index("l2" if metric == "l2" else "ip", vectors.shape[1])
        self._index.init_index(len(vectors), M=params["m"], ef_construction=params["ef_construction"], random_seed=SEED)
        self._index.add_items(vectors, np.arange(len(vectors)), num_threads=threads)

    def set(self, point: Point, threads: int) -> None:
        self._index.set_ef(point["ef"])
        self._index.set_num_threads(threads)

    def search(self, queries: np.ndarray, k: int) -> Any:
        return self._index.knn_query(queries, k)[0]

    def save(self, folder: Path) -> int:
        self._index.save_index(str(folder / "index"))
        return 0


class Faiss:
    """Any factory string; `{cells}` and `{codes}` in it become what suits the data."""

    def __init__(self, vectors: np.ndarray, metric: str, threads: int, params: Mapping[str, Any]) -> None:
        import faiss

        self._faiss: Any = faiss
        n, dim = vectors.shape
        if "{codes}" in params["factory"] and dim % 2:
            raise ValueError(f"product codes of two dimensions each do not fit dim {dim}")
        cells = 2 ** max(2, round(np.log2(2 * np.sqrt(n))))
        factory = params["factory"].format(cells=cells, codes=dim // 2)
        faiss.omp_set_num_threads(threads)
        kind = faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT
        self._index = self._faiss.index_factory(dim, factory, kind)
        graph = getattr(self._index, "hnsw", None)
        if graph is not None:
            graph.efConstruction = params["ef_construction"]
        self._index.train(vectors)
        self._index.add(vectors)
        self.factory, self.cells = factory, cells

    def set(self, point: Point, threads: int) -> None:
        self._faiss.omp_set_num_threads(threads)
        space = self._faiss.ParameterSpace()
        for name, value in point.items():
            space.set_index_parameter(self._index, name, value)

    def search(self, queries: np.ndarray, k: int) -> Any:
        return self._index.search(queries, k)[1]

    def save(self, folder: Path) -> int:
        self._faiss.write_index(self._index, str(folder / "index"))
        return 0


def cells(searcher: Searcher) -> list[Point]:
    """nprobe up to 512 or all cells; ten candidates an answer are compared exactly."""
    assert isinstance(searcher, Faiss)
    steps = [n for n in (1, 2, 3, 4, 6, 8, 11, 16, 22, 32, 45, 64, 90, 128, 180, 256, 512) if n <= searcher.cells]
    return [{"nprobe": n, "k_factor_rf": 10} for n in steps]


class Usearch:
    def __init__(self, vectors: np.ndarray, metric: str, threads: int, params: Mapping[str, Any]) -> None:
        from usearch.index import Index

        self._index = Index(
            ndim=vectors.shape[1],
            metric="l2sq" if metric == "l2" else "ip",
            dtype=params["dtype"],
            connectivity=params["m"],
            expansion_add=params["ef_construction"],
        )
        self._index.add(np.arange(len(vectors)), vectors, threads=threads)

    def set(self, point: Point, threads: int) -> None:
        self._index.expansion_search = point["ef"]
        self._threads = threads

    def search(self, queries: np.ndarray, k: int) -> Any:
        return self._index.search(queries, k, threads=self._threads).keys

    def save(self, folder: Path) -> int:
        self._index.save(str(folder / "index"))
        return 0


class Svs:
    """Intel's Scalable Vector Search: a Vamana graph over float32."""

    def __init__(self, vectors: np.ndarray, metric: str, threads: int, params: Mapping[str, Any]) -> None:
        import svs

        settings = svs.VamanaBuildParameters(
            graph_max_degree=params["degree"],
            window_size=params["window"],
            alpha=1.2 if metric == "l2" else 0.95,
        )
        kind = svs.DistanceType.L2 if metric == "l2" else svs.DistanceType.MIP
        self._index = svs.Vamana.build(settings, vectors, kind, num_threads=threads)

    def set(self, point: Point, threads: int) -> None:
        self._index.search_window_size = point["window"]
        if self._index.num_threads != threads:
            self._index.num_threads = threads

    def search(self, queries: np.ndarray, k: int) -> Any:
        return self._index.search(queries, k)[0]

    def save(self, folder: Path) -> int:
        self._index.save(*(str(folder / part) for part in ("config", "graph", "data")))
        return 0


class Scann:
    """One query has a call of its own in this library; a batch goes to as many threads as it was told."""

    def __init__(self, vectors: np.ndarray, metric: str, threads: int, params: Mapping[str, Any]) -> None:
        import scann

        name = "squared_l2" if metric == "l2" else "dot_product"
        self.leaves = max(1, min(params["leaves"], len(vectors) // 40))
        builder = scann.scann_ops_pybind.builder(vectors, 10, name)
        builder.set_n_training_threads(threads)
        builder.tree(num_leaves=self.leaves, num_leaves_to_search=10, training_sample_size=min(len(vectors), 250_000))
        builder.score_ah(2, anisotropic_quantization_threshold=0.2).reorder(params["reorder"])
        self._index = builder.build()
        self._reorder = params["reorder"]

    def set(self, point: Point, threads: int) -> None:
        self._index.set_num_threads(threads)
        self._threads = threads
        self._leaves = point["leaves"]

    def search(self, queries: np.ndarray, k: int) -> Any:
        if len(queries) == 1:
            return self._index.search(queries[0], k, self._reorder, self._leaves)[0]
        if self._threads == 1:
            return self._index.search_batched(queries, k, self._reorder, self._leaves)[0]
        return self._index.search_batched_parallel(queries, k, self._reorder, self._leaves)[0]

    def save(self, folder: Path) -> int:
        self._index.serialize(str(folder))
        return 0


def leaves(searcher: Searcher) -> list[Point]:
    assert isinstance(searcher, Scann)
    steps = (1, 2, 3, 4, 6, 8, 11, 16, 22, 32, 45, 64, 90, 128, 180, 256, 400)
    return [{"leaves": n} for n in steps if n <= searcher.leaves]


class Pynndescent:
    """Its fast path has one thread, for a batch too."""

    def __init__(self, vectors: np.ndarray, metric: str, threads: int, params: Mapping[str, Any]) -> None:
        import numba
        import pynndescent

        self._numba = numba
        self._index = pynndescent.NNDescent(
            vectors,
            metric="sqeuclidean" if metric == "l2" else "dot",
            n_neighbors=params["neighbors"],
            n_jobs=threads,
            random_state=SEED,
        )
        self._index.prepare()

    def set(self, point: Point, threads: int) -> None:
        self._numba.set_num_threads(threads)
        self._epsilon = point["epsilon"]

    def search(self, queries: np.ndarray, k: int) -> Any:
        return self._index.query(queries, k=k, epsilon=self._epsilon)[0]

    def save(self, folder: Path) -> int:
        # It has no file format but a pickle, so what a search reads is counted as it lies in memory.
        graph = self._index._search_graph
        arrays = [self._index._raw_data, graph.indptr, graph.indices]
        return sum(int(array.nbytes) for array in arrays)


LIBRARIES = (
    *(
        System(
            name=f"hnswlib M{m}",
            package="hnswlib",
            build=Hnswlib,
            points=knob("ef", *BREADTHS),
            params={"m": m, "ef_construction": 200},
        )
        for m in (16, 32)
    ),
    *(
        System(
            name=name,
            package="faiss-cpu",
            build=Faiss,
            points=knob("efSearch", *BREADTHS),
            params={"factory": factory, "ef_construction": 200},
        )
        for name, factory in (("faiss HNSW32_SQ8", "HNSW32_SQ8"), ("faiss HNSW16", "HNSW16"))
    ),
    System(
        name="faiss IVF fastscan",
        package="faiss-cpu",
        build=Faiss,
        points=cells,
        params={"factory": "IVF{cells},PQ{codes}x4fsr,RFlat"},
    ),
    *(
        System(
            name=f"usearch {dtype} M16",
            package="usearch",
            build=Usearch,
            points=knob("ef", *BREADTHS),
            params={"dtype": dtype, "m": 16, "ef_construction": 200},
            note=note,
        )
        for dtype, note in (("f16", ""), ("i8", "8 bits without a rerank, for vectors of length 1"))
    ),
    System(
        name="SVS Vamana R32",
        package="scalable-vs",
        build=Svs,
        points=knob("window", *BREADTHS),
        params={"degree": 32, "window": 200},
    ),
    System(
        name="ScaNN",
        package="scann",
        build=Scann,
        points=leaves,
        params={"leaves": 400, "reorder": 100},
    ),
    System(
        name="pynndescent",
        package="pynndescent",
        build=Pynndescent,
        points=knob("epsilon", *EPSILONS),
        params={"neighbors": 30},
        note="batch in one thread; bytes counted in memory",
    ),
)
