"""Computes every row's nearest neighbours on a GPU, for builders of graphs that begin with such lists."""

from __future__ import annotations

from typing import Any, Final

import faiss as _faiss
import numpy as np
from numpy.typing import NDArray

from index_builders.base import Progress
from index_builders.progress import no_progress
from vecsvc.blocks import checked_blocks
from vecsvc.distance import unit
from vecsvc.errors import InvalidParameter
from vecsvc.indexes.faiss_index import GPU_MAX_K, metric_type, to_gpu, translated
from vecsvc.types import Distances, Labels, Metric, StoredVectors, Vectors

faiss: Any = _faiss  # its stubs know only a part of it

DEVICE_BYTES: Final = 4 << 30  # of float32 rows that are compared with at a time


def gpu_neighbours(
    vectors: StoredVectors,
    k: int,
    metric: Metric,
    *,
    device: str = "cuda",
    device_bytes: int = DEVICE_BYTES,
    progress: Progress = no_progress,
) -> tuple[Labels, Distances]:
    """The k nearest other rows of each row (n, dim): labels and distances (n, min(k, n - 1)), the closest first.

    The rows lie on the device in parts of at most `device_bytes`, and all rows are asked of each part, block
    by block; the answers take 12 * n * k bytes here. Distances are float32 products: what is nearer than that
    rounding may stand in the wrong order. `device` cpu does the same on the CPU.
    Raises InvalidVector, InvalidParameter or BackendMissing.
    """
    size, dim = vectors.shape
    keep = min(k, size - 1)
    if keep < 1 or keep >= GPU_MAX_K:
        raise InvalidParameter(
            f"k is {k} for {size} rows; it must be from 1 to {GPU_MAX_K - 1}, and the rows 2 or more"
        )
    labels = np.full((size, keep), -1, dtype=np.int64)
    distances = np.full((size, keep), np.inf, dtype=np.float32)
    step = max(1, device_bytes // (4 * dim))
    for first in range(0, size, step):
        last = min(first + step, size)
        with translated("faiss cannot compare all rows", InvalidParameter):
            part = faiss.IndexFlat(dim, metric_type(metric))
            part = to_gpu(part) if device == "cuda" else part
            for _, block in checked_blocks(vectors[first:last]):
                part.add(unit(block) if metric == "cosine" else block)
            for start, block in checked_blocks(vectors):
                rows = slice(start, start + len(block))
                values, found = part.search(_side(block, metric), min(keep + 1, last - first))
                _merge(labels[rows], distances[rows], found + first, values if metric == "l2" else 1.0 - values, start)
                progress(len(block) if last == size else 0)
    return labels, distances


def _side(block: Vectors, metric: Metric) -> Vectors:
    return unit(block) if metric == "cosine" else block


def _merge(labels: Labels, distances: Distances, found: NDArray[np.int64], values: Distances, first_row: int) -> None:
    """Put the best of both into (labels, distances) (m, keep), in place; a row is no neighbour of itself."""
    own = found == np.arange(first_row, first_row + len(found))[:, None]
    names = np.concatenate([labels, found], axis=1)
    both = np.concatenate([distances, np.where(own, np.float32(np.inf), values)], axis=1)
    # Its own label must not fill a place that nothing else took.
    names[np.isposinf(both)] = -1
    order = np.lexsort((names, both))[:, : labels.shape[1]]
    labels[:] = np.take_along_axis(names, order, axis=1)
    distances[:] = np.take_along_axis(both, order, axis=1)
