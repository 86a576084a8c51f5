"""Builds kind `faiss` from any factory string: trained on a sample, filled block by block."""

from __future__ import annotations

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
from vecsvc.indexes.faiss_index import FaissIndex, knobs, metric_type, to_gpu, translated
from vecsvc.types import IndexSpec, Metric, StoredVectors, Vectors

faiss: Any = _faiss  # its stubs know only a part of it

EF_SEARCH: Final = (16, 32, 64, 128, 256, 512)
K_FACTORS: Final = (1, 2, 4, 8, 16, 32, 64)
MAX_NPROBE: Final = 1024  # beyond that, comparing all is no slower
MIN_TRAINING_ROWS: Final = 100_000
ROWS_A_CELL: Final = 256  # faiss' k-means looks at no more


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildParams:
    factory: str = option("HNSW32", "what faiss shall build, as its index_factory spells it")
    device: str = option("cpu", "where it is trained and filled", choices=("cpu", "cuda"))


def build(
    vectors: StoredVectors, *, metric: Metric, params: BuildParams, num_threads: int, seed: int, progress: Progress
) -> FaissIndex:
    """The index over rows (n, dim). `seed` draws the training sample; faiss' own seeds are fixed.

    Raises InvalidVector, InvalidParameter with faiss' reason where the factory does not fit the data, or
    BackendMissing where there is no GPU.
    """
    size, dim = vectors.shape
    what = f"factory {params.factory!r} over {size} vectors of dim {dim}"
    if "NSG" in params.factory:
        # Seen with 1.15.1: on some data with duplicates the build never ends, nor does a search for k > size.
        raise InvalidParameter(f"{what}: faiss' NSG does not always return; choose an HNSW factory")
    faiss.omp_set_num_threads(num_threads)
    with translated(what, InvalidParameter):
        index = faiss.index_factory(dim, params.factory, metric_type(metric))
        if index.metric_type != metric_type(metric):
            raise InvalidParameter(f"{what}: faiss builds it for l2 only, not for {metric}")
        if not index.is_trained:
            rows = min(size, max(MIN_TRAINING_ROWS, ROWS_A_CELL * _cells(index)))
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
        return [{"nprobe": 2**i} for i in range(most.bit_length())]
    if "ef_search" in known:
        return [{"ef_search": breadth} for breadth in EF_SEARCH]
    return [{"k_factor": factor} for factor in K_FACTORS] if "k_factor" in known else [{}]


def _cells(index: Any) -> int:
    ivf = faiss.try_extract_index_ivf(index)
    return int(ivf.nlist) if ivf is not None else 0


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
