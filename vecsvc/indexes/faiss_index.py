"""Kind `faiss`: any factory string of faiss, read side. faiss finds candidates; the shard's vectors say how near.

Factory strings: https://github.com/facebookresearch/faiss/wiki/The-index-factory
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import faiss as _faiss
import numpy as np
from numpy.typing import NDArray

from vecsvc.config import option
from vecsvc.distance import unit
from vecsvc.errors import ArtifactDamaged, BackendMissing, InvalidParameter, UnknownParameter, VecsvcError
from vecsvc.exact_search import TINY_NORM, ExactSearch, nearest
from vecsvc.indexes.base import check_search, empty, padded
from vecsvc.ranking import pad
from vecsvc.storage import new_file
from vecsvc.types import Distances, IndexSpec, Labels, Limit, Mask, Metric, Neighbors, StoredVectors, Vectors

faiss: Any = _faiss  # its stubs know only a part of it

FILE: Final = "faiss.index"
K_FACTOR: Final = 4  # candidates an answer, where the index keeps only codes and nobody asked for another number
GPU_MAX_K: Final = 2048  # faiss selects no more on a GPU, be it answers or cells
# A GPU has one byte a code, and kernels for these numbers of codes; above 48 its tables only fit as float16.
GPU_PQ_CODES: Final = (1, 2, 3, 4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 96)
READ_SLACK_BYTES: Final = 1 << 20

# Only the GPU wheel has the classes of the second kind.
_IVF: Final = tuple(getattr(faiss, name) for name in ("IndexIVF", "GpuIndexIVF") if hasattr(faiss, name))
# These keep the vectors as they are, so that their own distances will do.
_DIRECT: Final = frozenset(
    ("IndexFlat", "IndexFlatL2", "IndexFlatIP", "IndexHNSWFlat", "IndexIVFFlat", "GpuIndexFlat", "GpuIndexIVFFlat")
)
_ON_GPU: Final = frozenset(
    ("IndexFlat", "IndexFlatL2", "IndexFlatIP", "IndexIVFFlat", "IndexIVFPQ", "IndexIVFScalarQuantizer")
)
_GPU_SCALARS: Final = tuple(
    getattr(faiss.ScalarQuantizer, f"QT_{name}") for name in ("8bit", "8bit_uniform", "4bit", "4bit_uniform", "fp16")
)
_reading = threading.Lock()


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchParams:
    """None is what the index itself came with. A setting that the factory does not know is refused."""

    nprobe: int | None = option(
        None, "cells of an IVF index that are searched: more gives better recall, slower", low=1, high=1_000_000
    )
    ef_search: int | None = option(
        None, "breadth of the walk through an HNSW graph: more gives better recall, slower", low=1, high=10_000
    )
    k_factor: int | None = option(
        None, "candidates an answer that codes bring for exact comparison: more gives better recall", low=1, high=1000
    )


_SETTINGS: Final = tuple(field.name for field in dataclasses.fields(SearchParams))


def load(directory: Path, spec: IndexSpec, *, vectors: StoredVectors, mmap: bool, device: str) -> FaissIndex:
    """Open what `FaissIndex.save` wrote, on the GPU where `device` is cuda and the type has a form for it.

    Raises ArtifactDamaged, or BackendMissing where there is no GPU.
    """
    path = directory / FILE
    index = _read(path, mmap)
    have = (index.ntotal, index.d, index.metric_type)
    if have != (spec.size, spec.dim, metric_type(spec.metric)):
        raise ArtifactDamaged(
            f"{path}: holds {index.ntotal} vectors of dim {index.d} under metric {index.metric_type}, "
            f"expected {spec.size} of {spec.dim} under {metric_type(spec.metric)} ({spec.metric})"
        )
    if device == "cuda" and no_gpu_form(index) is None:
        return FaissIndex(spec, to_gpu(index), vectors, on_gpu=True)
    return FaissIndex(spec, index, vectors)


class FaissIndex:
    def __init__(self, spec: IndexSpec, index: Any, vectors: StoredVectors, *, on_gpu: bool = False) -> None:
        self.spec = spec
        self._index = index
        self._vectors = vectors
        self._exact = ExactSearch(vectors, spec.metric)
        self._on_gpu = on_gpu
        # A GPU's scratch memory serves one search at a time; on the CPU any number of threads may search.
        self._turn: contextlib.AbstractContextManager[Any] = threading.Lock() if on_gpu else contextlib.nullcontext()
        self._direct = type(index).__name__ in _DIRECT
        self._known = knobs(index)
        # A Refine in the factory brings more candidates by itself; codes alone need it done here.
        self._reranks = not self._direct and "k_factor" not in _native_knobs(index)
        self._selects = not on_gpu and _honours_selectors(index)
        self._k_factor = int(spec.params.get("k_factor", K_FACTOR))

    def search(
        self,
        queries: Vectors,
        k: int,
        params: SearchParams | None = None,
        *,
        allowed: Mask | None = None,
        limit: Limit | None = None,
        num_threads: int = 1,
    ) -> Neighbors:
        """As `base.Index.search` says. Where faiss cannot search with a mask, what it allows is compared exactly.

        faiss does not tell how many vectors it compared. Raises UnknownParameter, or InvalidParameter for
        more cells than a GPU selects.
        """
        settings: SearchParams = check_search(self.spec, queries, k, params, SearchParams, allowed)
        given = {name: value for name in _SETTINGS if (value := getattr(settings, name)) is not None}
        for name in given:
            if name not in self._known:
                known = ", ".join(self._known) or "no settings"
                raise UnknownParameter(
                    f"unknown parameter {name!r}; faiss {self.spec.params['factory']} knows: {known}"
                )
        if self._on_gpu and given.get("nprobe", 1) > GPU_MAX_K:
            raise InvalidParameter(f"nprobe is {given['nprobe']}; on a GPU it can be {GPU_MAX_K} at most")
        selector = None
        reachable = self.spec.size
        if allowed is not None:
            reachable = int(np.count_nonzero(allowed))
            if reachable == 0:
                return empty(len(queries), k)
            if self._selects:
                selector = faiss.IDSelectorBitmap(np.packbits(allowed, bitorder="little"))
        factor = given.get("k_factor", self._k_factor) if self._reranks else 1
        ask = min(k * factor, reachable)
        if (allowed is not None and selector is None) or (self._on_gpu and ask > GPU_MAX_K):
            return self._exact.search(queries, k, allowed=allowed, limit=limit)
        alive: list[Any] = []
        parameters = _parameters(self._index, given, selector, alive) if given or selector is not None else None
        sides = unit(queries) if self.spec.metric == "cosine" else queries
        faiss.omp_set_num_threads(num_threads)  # holds for the calling thread only
        with self._turn:
            values, labels = self._index.search(sides, ask, params=parameters)
        if self._direct:
            return _ordered(labels, values if self.spec.metric == "l2" else 1.0 - values, k)
        compared = self._compared(queries, labels, k)
        lost = labels[:, 0] < 0
        if lost.any():
            # To 4-bit codes under ip, everything is equally far from a query of zeros, and nothing comes back.
            zeros = np.flatnonzero(lost & ~queries.any(axis=1))
            exact = self._exact.search(queries[zeros], k, allowed=allowed, limit=limit)
            compared.labels[zeros], compared.distances[zeros] = exact.labels, exact.distances
        return compared

    def _compared(self, queries: Vectors, candidates: Labels, k: int) -> Neighbors:
        """The k nearest of each row of candidates (n, m), by the vectors themselves."""
        labels = np.empty((len(queries), k), dtype=np.int64)
        distances = np.empty((len(queries), k), dtype=np.float32)
        for i, query in enumerate(queries):
            found = candidates[i][candidates[i] >= 0]
            if len(found) > 2 * k:
                found = shortlist(query, found, k, self._vectors, self.spec.metric)
            labels[i], distances[i] = pad(*nearest(query, found, k, self._vectors, self.spec.metric), k)
        return padded(labels, distances, k)

    def save(self, directory: Path) -> None:
        """Always in its form for the CPU, so that a machine without a GPU can read it."""
        index = faiss.index_gpu_to_cpu(self._index) if self._on_gpu else self._index
        with new_file(directory / FILE) as file:
            # faiss' own files do not notice where the last bytes no longer fit on the disk; Python's do.
            faiss.write_index(index, faiss.PyCallbackIOWriter(file.write))

    def close(self) -> None:
        """Nothing to close: memory goes with the last reference, so that searches in flight end undisturbed."""


def metric_type(metric: Metric) -> int:
    """faiss' number of the metric; cosine is its inner product over unit vectors, made by us."""
    return int(faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT)


def knobs(index: Any) -> list[str]:
    """Which of SearchParams' fields mean something for this index."""
    native = _native_knobs(index)
    return native if type(index).__name__ in _DIRECT or "k_factor" in native else [*native, "k_factor"]


def no_gpu_form(index: Any) -> str | None:
    """Why faiss has no form of this index for a GPU; None where it has one."""
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        return no_gpu_form(index.index)
    name = type(index).__name__
    if name not in _ON_GPU:
        return f"{name} has no form for the GPU"
    if isinstance(index, faiss.IndexIVF):
        coarse = faiss.downcast_index(index.quantizer)
        if not isinstance(coarse, faiss.IndexFlat):
            return f"{name} has no form for the GPU with cells found by {type(coarse).__name__}"
    if name == "IndexIVFPQ" and (index.pq.nbits != 8 or index.pq.M not in GPU_PQ_CODES):
        return f"PQ{index.pq.M}x{index.pq.nbits} has no form for the GPU, which takes 8 bits and {GPU_PQ_CODES} codes"
    if name == "IndexIVFScalarQuantizer" and index.sq.qtype not in _GPU_SCALARS:
        return "the scalar quantizer has no form for the GPU, which takes SQ8, SQ4 and SQfp16"
    return None


def to_gpu(index: Any) -> Any:
    """The index on the first GPU. Raises BackendMissing, or InvalidParameter for a type without a GPU form."""
    if not hasattr(faiss, "StandardGpuResources") or faiss.get_num_gpus() == 0:
        raise BackendMissing(
            "device cuda needs an NVIDIA GPU and faiss built for it: pip uninstall faiss-cpu, then "
            "pip install 'vecsvc[gpu]'; or choose device cpu"
        )
    if refusal := no_gpu_form(index):
        raise InvalidParameter(f"{refusal}: choose device cpu, or a factory such as IVF1024,Flat or IVF1024,PQ32")
    options = faiss.GpuClonerOptions()
    # Builds of faiss with cuVS would use it unasked, and it has other limits than those that are checked here.
    options.use_cuvs = False
    # Tables of float16 fit twice the codes into a GPU's fast memory. Vectors kept whole stay float32: their
    # distances are answers, while what comes of codes is compared again.
    inner = faiss.downcast_index(index.index) if isinstance(index, faiss.IndexPreTransform) else index
    options.useFloat16 = isinstance(inner, faiss.IndexIVFPQ)
    with translated("faiss cannot move the index to the GPU", InvalidParameter):
        return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index, options)


def shortlist(query: Vectors, candidates: Labels, k: int, vectors: StoredVectors, metric: Metric) -> Labels:
    """Those of the labels `candidates` (m,) that may be among the k nearest; k <= m.

    A float32 product is a third of the time of exact distances, which sum in float64. It leaves out only what
    is farther than the k-th by more than the rounding of both (`exact_search.lower_bounds` has the source).
    """
    rows = np.asarray(vectors[candidates], dtype=np.float32)
    products = rows @ query
    squares = np.einsum("ij,ij->i", rows, rows)
    length, longest = math.sqrt(np.vdot(query, query)), math.sqrt(squares.max())
    if metric == "l2":
        values, scale = squares - 2.0 * products, (length + longest) ** 2
    elif metric == "ip":
        values, scale = -products, length * longest + 1.0  # distances around 1 are rounded themselves
    elif squares.min() < TINY_NORM:
        return candidates  # too short for a trustworthy direction in float32
    else:
        values, scale = -products / np.sqrt(squares), length
    margin = 2.0 * (len(query) + 8) * (float(np.finfo(np.float32).eps) * scale + float(np.finfo(np.float32).tiny))
    near: NDArray[np.bool_] = values <= np.partition(values, k - 1)[k - 1] + margin
    return np.asarray(candidates[near])


@contextlib.contextmanager
def translated(what: str, error_type: type[VecsvcError]) -> Iterator[None]:
    """The border where faiss' C++ exceptions become ours."""
    try:
        yield
    except RuntimeError as error:
        raise error_type(f"{what}: {reason(error)}") from error


def reason(error: RuntimeError) -> str:
    """What faiss says, without the C++ function and file that say it."""
    return re.sub(r"^Error in .*?\.(?:cpp|h|cu|cuh):\d+: (?:Error: '.*?' failed: )?", "", str(error), flags=re.DOTALL)


def _read(path: Path, mmap: bool) -> Any:
    if not path.is_file():
        raise ArtifactDamaged(f"{path}: missing")
    # The limit is the process's: another reader must not change it in between.
    with _reading, translated(f"{path}: faiss cannot read it", ArtifactDamaged):
        faiss.set_deserialization_vector_byte_limit(path.stat().st_size + READ_SLACK_BYTES)
        # The table that IVFPQ searches l2 with is no part of the file, and faiss holds it against the limit all the
        # same, for every metric: it is made here, after reading.
        flags = faiss.IO_FLAG_SKIP_PRECOMPUTE_TABLE | (faiss.IO_FLAG_MMAP_IFC if mmap else 0)
        index = faiss.read_index(str(path), flags)
        ivf = faiss.downcast_index(faiss.try_extract_index_ivf(index))
        if isinstance(ivf, faiss.IndexIVFPQ):
            ivf.precompute_table()
        return index


def _honours_selectors(index: Any) -> bool:
    """Whether nothing is found where nothing is allowed: some types refuse a selector, others forget it."""
    selector = faiss.IDSelectorBitmap(np.zeros(index.ntotal // 8 + 1, dtype=np.uint8))
    alive: list[Any] = []
    try:
        parameters = _parameters(index, {}, selector, alive)
        _, labels = index.search(np.zeros((1, index.d), dtype=np.float32), 1, params=parameters)
    except RuntimeError:
        return False
    return bool((labels < 0).all())


def _parameters(index: Any, given: dict[str, int], selector: Any, alive: list[Any]) -> Any:
    """faiss' settings of one search, nested as the index is; None where there is nothing to say.

    Their C++ objects point to each other and own nothing: `alive` keeps them, for as long as it lives.
    """
    index = faiss.downcast_index(index)
    made: Any
    if isinstance(index, faiss.IndexPreTransform):
        made = faiss.SearchParametersPreTransform(index_params=_parameters(index.index, given, selector, alive))
    elif isinstance(index, faiss.IndexRefine):
        made = faiss.IndexRefineSearchParameters(
            k_factor=given.get("k_factor", index.k_factor),
            base_index_params=_parameters(index.base_index, given, selector, alive),
        )
    elif isinstance(index, _IVF):
        made = faiss.SearchParametersIVF(nprobe=given.get("nprobe", index.nprobe), sel=selector)
        if "ef_search" in given:
            made.quantizer_params = _parameters(index.quantizer, given, None, alive)
    elif isinstance(index, faiss.IndexHNSW):
        made = faiss.SearchParametersHNSW(efSearch=given.get("ef_search", index.hnsw.efSearch), sel=selector)
    elif selector is not None:
        made = faiss.SearchParameters(sel=selector)
    else:
        return None
    alive.append(made)
    return made


def _native_knobs(index: Any) -> list[str]:
    """Which of SearchParams' fields faiss itself takes."""
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        return _native_knobs(index.index)
    if isinstance(index, faiss.IndexRefine):
        return [*_native_knobs(index.base_index), "k_factor"]
    if isinstance(index, _IVF):
        return ["nprobe", "ef_search"] if _coarse_graph(index) else ["nprobe"]
    return ["ef_search"] if isinstance(index, faiss.IndexHNSW) else []


def _coarse_graph(index: Any) -> bool:
    return isinstance(faiss.downcast_index(index.quantizer), faiss.IndexHNSW)


def _ordered(labels: Labels, distances: Distances, k: int) -> Neighbors:
    """Rows (n, m) by (distance, label), padded to k."""
    distances = np.where(labels >= 0, distances, np.float32(np.inf))
    order = np.lexsort((labels, distances))
    return padded(np.take_along_axis(labels, order, axis=1), np.take_along_axis(distances, order, axis=1), k)
