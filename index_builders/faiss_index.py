"""Builds kind `faiss` from a preset or any factory string: trained on a sample, filled block by block."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import faiss as _faiss
import numpy as np

from index_builders.base import Progress
from vecsvc.blocks import checked_blocks
from vecsvc.config import option
from vecsvc.distance import unit
from vecsvc.errors import InvalidParameter
from vecsvc.indexes.base import params_dict
from vecsvc.indexes.faiss_index import GPU_PQ_CODES, FaissIndex, knobs, metric_type, to_gpu, translated
from vecsvc.types import IndexSpec, Metric, StoredVectors, Vectors

faiss: Any = _faiss  # its stubs know only a part of it

FACTORY: Final = "HNSW32"  # where neither a factory nor a preset is named
# faiss' own breadth of 40 leaves a graph that needs two to three times the ef_search for a recall of .95: .884 at 32,
# where 100 gives .929 and 200 .953 (79,890 x 384 text embeddings), built in 9, 16 and 38 s.
EF_CONSTRUCTION: Final = 200
EF_SEARCH: Final = (16, 24, 32, 48, 64, 96, 128, 192, 256, 512)
K_FACTORS: Final = (1, 2, 4, 8, 16, 32, 64)
MAX_NPROBE: Final = 1024  # beyond that, comparing all is no slower
MIN_TRAINING_ROWS: Final = 100_000
MAX_TRAINING_BYTES: Final = 1 << 30  # of float32 rows, beyond the fewest that faiss wants
ROWS_A_CELL: Final = 256  # faiss' k-means looks at no more
MIN_ROWS_A_CELL: Final = 39  # with fewer, faiss warns that cells are ill placed
PQ_ROUNDS: Final = 10
PQ_ROWS_A_CENTRE: Final = 64
SUPER_KMEANS_DIM: Final = 64  # it looks at some dimensions first: it refuses fewer than 32, and gains with many
COARSE_GRAPH_CELLS: Final = 4096  # from here on, a graph finds the nearest cells faster than comparing all


# ---------------------------------------------------------------------------------------------- the presets


def cells(size: int, factor: float) -> int:
    """How many cells for so many rows: about factor * sqrt(size), a power of two, each with rows to train it."""
    return 1 << max(0, int(math.log2(max(1.0, min(factor * math.sqrt(size), size / MIN_ROWS_A_CELL)))))


def _ivf(size: int, factor: float, device: str) -> str:
    count = cells(size, factor)
    return f"IVF{count}_HNSW32" if count >= COARSE_GRAPH_CELLS and device == "cpu" else f"IVF{count}"


def fast_codes(dim: int) -> tuple[int, int]:
    """(dim to pad to, codes of 4 bits): two dimensions a code, a fraction of a byte each."""
    even = dim + dim % 2
    return even, even // 2


def byte_codes(dim: int) -> tuple[int, int]:
    """(dim to pad to, codes of 8 bits): as many as GPUs have too, up to one for four dimensions."""
    codes = max(m for m in GPU_PQ_CODES if m == 1 or 4 * m <= dim)
    return -(-dim // codes) * codes, codes


def _pad(dim: int, wide: int) -> str:
    return f"Pad{wide}," if wide > dim else ""


def _fast(size: int, dim: int, metric: Metric, device: str) -> str:
    wide, codes = fast_codes(dim)
    # Codes of what is left after the cell's centre are nearer, and cost nothing where the metric is a product.
    # For l2 they need a table for each cell, which was measured to take two thirds of the speed.
    return f"{_pad(dim, wide)}{_ivf(size, 2, device)},PQ{codes}x4fs{'' if metric == 'l2' else 'r'}"


def _bytes(size: int, dim: int, metric: Metric, device: str) -> str:
    wide, codes = byte_codes(dim)
    # np: no order of the codes for Hamming distances, which nobody asks for here and takes minutes to find.
    return f"{_pad(dim, wide)}{_ivf(size, 2, device)},PQ{codes}np"


@dataclass(frozen=True, slots=True)
class Preset:
    """A factory string as a rule of (size, dim, metric, device), and what else makes it good."""

    factory: Callable[[int, int, Metric, str], str]
    k_factor: int | None = None  # candidates an answer that its codes need for a recall of .95 at breadth alone


# Measured on 79,890 x 384 text embeddings. Cells that are scanned fast may be larger: 2 * sqrt(size) of them,
# 4 * sqrt(size) where whole vectors are compared.
PRESETS: Final = {
    "flat": Preset(lambda size, dim, metric, device: "Flat"),
    "ivf-flat": Preset(lambda size, dim, metric, device: f"{_ivf(size, 4, device)},Flat"),
    "ivf-sq8": Preset(lambda size, dim, metric, device: f"{_ivf(size, 4, device)},SQ8", k_factor=2),
    "ivf-pq": Preset(_bytes, k_factor=8),
    "ivf-pq-fast": Preset(_fast, k_factor=5),
    "rabitq": Preset(lambda size, dim, metric, device: f"{_ivf(size, 2, device)},RaBitQ", k_factor=8),
    "hnsw-sq8": Preset(lambda size, dim, metric, device: "HNSW32,SQ8", k_factor=2),
}


# ------------------------------------------------------------------------------------------------ the build


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildParams:
    factory: str | None = option(None, "what faiss shall build, as its index_factory spells it; else HNSW32")
    preset: str | None = option(None, "a factory chosen by the size and dim of the data", choices=tuple(PRESETS))
    device: str = option("cpu", "where it is trained and filled", choices=("cpu", "cuda"))
    ef_construction: int | None = option(
        None,
        "breadth at which an HNSW graph looks for neighbours: more gives better recall, slower; 200 unless given",
        low=1,
        high=10_000,
    )
    k_factor: int | None = option(
        None, "candidates an answer that codes bring for exact comparison, where a search names none", low=1, high=1000
    )


def resolved(params: BuildParams, size: int, dim: int, metric: Metric) -> BuildParams:
    """The same with the preset's choices filled in; what was given explicitly stays.

    Raises InvalidParameter for a factory and a preset at once.
    """
    if params.preset is None:
        return params if params.factory is not None else dataclasses.replace(params, factory=FACTORY)
    if params.factory is not None:
        raise InvalidParameter(f"factory {params.factory!r} and preset {params.preset!r} exclude each other: name one")
    preset = PRESETS[params.preset]
    return dataclasses.replace(
        params,
        factory=preset.factory(size, dim, metric, params.device),
        k_factor=preset.k_factor if params.k_factor is None else params.k_factor,
    )


def build(
    vectors: StoredVectors, *, metric: Metric, params: BuildParams, num_threads: int, seed: int, progress: Progress
) -> FaissIndex:
    """The index over rows (n, dim). `seed` draws the training sample; faiss' own seeds are fixed.

    Raises InvalidVector, InvalidParameter with faiss' reason where the factory does not fit the data, or
    BackendMissing where there is no GPU.
    """
    size, dim = vectors.shape
    params = resolved(params, size, dim, metric)
    factory = str(params.factory)
    what = f"factory {factory!r} over {size} vectors of dim {dim}"
    if params.preset is not None:
        what = f"preset {params.preset!r}, {what}"
    if "NSG" in factory:
        # Seen with 1.15.1: on some data with duplicates the build never ends, nor does a search for k > size.
        raise InvalidParameter(f"{what}: faiss' NSG does not always return; choose an HNSW factory")
    faiss.omp_set_num_threads(num_threads)
    with translated(what, InvalidParameter):
        index = faiss.index_factory(dim, factory, metric_type(metric))
        if index.metric_type != metric_type(metric):
            raise InvalidParameter(f"{what}: faiss builds it for l2 only, not for {metric}")
        params = _tuned(index, params, what)
        if not index.is_trained:
            rows = _training_rows(size, dim, _cells(index))
            index = to_gpu(index) if params.device == "cuda" else index
            index.train(_sample(vectors, rows, metric, np.random.default_rng(seed)))
        elif params.device == "cuda":
            index = to_gpu(index)
        for _, block in checked_blocks(vectors):
            index.add(unit(block) if metric == "cosine" else block)
            progress(len(block))
    if params.device == "cuda":
        index = faiss.index_gpu_to_cpu(index)
    return FaissIndex(IndexSpec("faiss", dim, metric, size, params_dict(params)), index, vectors)


def operating_points(spec: IndexSpec) -> list[dict[str, Any]]:
    """Values of the knob that counts most for this factory, the cheapest first."""
    index = faiss.index_factory(spec.dim, spec.params["factory"], metric_type(spec.metric))
    known = knobs(index)
    if "nprobe" in known:
        most = min(_cells(index), MAX_NPROBE)
        powers = [2**i for i in range(most.bit_length())]
        # Halfway steps too: the next power of two costs up to twice what is needed.
        return [{"nprobe": n} for n in sorted({*powers, *(3 * p // 2 for p in powers[1:-1])})]
    if "ef_search" in known:
        return [{"ef_search": breadth} for breadth in EF_SEARCH]
    return [{"k_factor": factor} for factor in K_FACTORS] if "k_factor" in known else [{}]


def _tuned(index: Any, params: BuildParams, what: str) -> BuildParams:
    """Set what a factory string cannot say; the parameters with what that became.

    Raises InvalidParameter for a parameter that means nothing to the factory.
    """
    inner = faiss.downcast_index(index)
    while isinstance(inner, (faiss.IndexPreTransform, faiss.IndexRefine)):
        inner = faiss.downcast_index(inner.index if isinstance(inner, faiss.IndexPreTransform) else inner.base_index)
    if isinstance(inner, faiss.IndexHNSW):
        breadth = EF_CONSTRUCTION if params.ef_construction is None else params.ef_construction
        inner.hnsw.efConstruction = breadth
        params = dataclasses.replace(params, ef_construction=breadth)
    elif params.ef_construction is not None:
        raise InvalidParameter(f"{what}: ef_construction is for HNSW factories; leave it out")
    cells = faiss.try_extract_index_ivf(index)
    if cells is not None and params.device == "cpu" and cells.d >= SUPER_KMEANS_DIM:
        # Finds the same cells with fewer products, those of the nearest centres first: 10 s instead of 19 for 4,096
        # cells of 79,890 x 384, 4 instead of 5 for 1,024, with the same recall.
        cells.cp.use_super_kmeans = True
    if params.k_factor is not None and "k_factor" not in knobs(index):
        raise InvalidParameter(f"{what}: k_factor is for codes, and this keeps whole vectors; leave it out")
    if params.preset is not None:
        # Without a certificate these serve: one cell or 16 steps, faiss' own, find little.
        if isinstance(inner, faiss.IndexIVF):
            inner.nprobe = max(1, inner.nlist // 8)
            if isinstance(inner, faiss.IndexIVFPQ) and inner.pq.nbits == 8:
                # faiss' own 25 rounds over 65,536 rows take ten times as long, and exact comparison hides the gain.
                inner.pq.cp.niter, inner.pq.cp.max_points_per_centroid = PQ_ROUNDS, PQ_ROWS_A_CENTRE
        elif isinstance(inner, faiss.IndexHNSW):
            inner.hnsw.efSearch = 64
    return params


def _cells(index: Any) -> int:
    ivf = faiss.try_extract_index_ivf(index)
    return int(ivf.nlist) if ivf is not None else 0


def _training_rows(size: int, dim: int, cells: int) -> int:
    wanted = max(MIN_TRAINING_ROWS, ROWS_A_CELL * cells)
    return min(size, wanted, max(MAX_TRAINING_BYTES // (4 * dim), MIN_ROWS_A_CELL * cells))


def _sample(vectors: StoredVectors, rows: int, metric: Metric, rng: np.random.Generator) -> Vectors:
    """So many rows drawn without repetition, in the form that the metric feeds to faiss.

    All rows are read, so that a bad one is named and not trained on.
    """
    chosen = np.sort(rng.choice(len(vectors), rows, replace=False))
    sample = np.empty((rows, vectors.shape[1]), dtype=np.float32)
    for start, block in checked_blocks(vectors):
        first, end = np.searchsorted(chosen, (start, start + len(block)))
        picked = block[chosen[first:end] - start]
        sample[first:end] = unit(picked) if metric == "cosine" else picked
    return sample
