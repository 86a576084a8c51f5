"""Builds kind `kd_tree` with scikit-learn, in one thread and without chance."""

from __future__ import annotations

from dataclasses import dataclass

from sklearn.neighbors import KDTree

from index_builders.base import Progress
from vecsvc.config import option
from vecsvc.indexes.base import params_dict
from vecsvc.indexes.kd_tree import KdTreeIndex, tree_points
from vecsvc.types import IndexSpec, Metric, StoredVectors


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildParams:
    leaf_size: int = option(
        40, "vectors in a box that is not halved again: more makes a smaller tree that compares more", low=1, high=10**6
    )


def build(
    vectors: StoredVectors, *, metric: Metric, params: BuildParams, num_threads: int, seed: int, progress: Progress
) -> KdTreeIndex:
    """The index over rows (n, dim), which the tree keeps in float64. Raises InvalidVector."""
    points, longest = tree_points(vectors, metric, progress)
    size, dim = vectors.shape
    spec = IndexSpec("kd_tree", dim, metric, size, params_dict(params))
    return KdTreeIndex(spec, KDTree(points, leaf_size=params.leaf_size), longest, vectors)
