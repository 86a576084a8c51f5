"""Kind `kd_tree`: scikit-learn's KD-tree, read side. Exact, and fast in few dimensions only.

A KD-tree halves the vectors along one axis after another, and skips the boxes that lie farther than what it
has found. Beyond some 20 dimensions hardly any box can be skipped: it then compares nearly everything, slower
than `exact` does. Bentley, Multidimensional binary search trees used for associative searching, CACM 18 (1975).

The tree knows Euclidean distance. For cosine it stands over unit vectors; for inner product over vectors with
one more dimension, which turns the largest product into the smallest distance: Bachrach et al., Speeding Up the
Xbox Recommender System Using a Euclidean Transformation for Inner-Product Spaces, RecSys 2014.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
import sklearn
from numpy.typing import NDArray
from sklearn.neighbors import KDTree

from vecsvc.blocks import checked_blocks
from vecsvc.errors import ArtifactDamaged, ArtifactUnfit
from vecsvc.exact_search import ExactSearch, nearest
from vecsvc.indexes.base import check_search, empty
from vecsvc.ranking import pad
from vecsvc.storage import open_array, write_array
from vecsvc.types import Distances, IndexSpec, Limit, Mask, Metric, Neighbors, StoredVectors, Vectors

ORDER: Final = "kd_tree_order.npy"  # (size,) int64: the labels, box by box
NODES: Final = "kd_tree_nodes.npy"  # (nodes, 4) int64: first place, end, whether a leaf, the bits of the radius
BOUNDS: Final = "kd_tree_bounds.npy"  # (2, nodes, tree's dim) float64: lowest and highest corner of each box

SPARE: Final = 8  # candidates asked for beyond k, so that a tie at the boundary is settled by the label
UNIT_ERROR: Final = 1e-11  # float64 rounding of the tree's distances, generously, up to MAX_DIM

_NODE: Final = np.dtype([("idx_start", "<i8"), ("idx_end", "<i8"), ("is_leaf", "<i8"), ("radius", "<f8")])

Points: TypeAlias = NDArray[np.float64]  # (n, dim) where the tree lives; (n, dim + 1) for ip
Lengths: TypeAlias = NDArray[np.float64]  # (n,)


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchParams:
    """Nothing to choose: every answer is exact."""


def load(directory: Path, spec: IndexSpec, *, vectors: StoredVectors, mmap: bool, device: str) -> KdTreeIndex:
    """Open what `KdTreeIndex.save` wrote: the tree's own points are made from `vectors` again, in float64.

    Raises ArtifactDamaged, naming the file, where the arrays would lead the tree's C loops astray, and
    ArtifactUnfit where this scikit-learn lays its trees out differently.
    """
    points, longest = tree_points(vectors, spec.metric)
    order = open_array(directory / ORDER, np.int64, (spec.size,), mmap=mmap)
    nodes = open_array(directory / NODES, np.int64, (None, 4), mmap=mmap)
    bounds = open_array(directory / BOUNDS, np.float64, (2, len(nodes), points.shape[1]), mmap=mmap)
    if not np.array_equal(np.sort(order), np.arange(spec.size)):
        raise ArtifactDamaged(f"{directory / ORDER}: is no permutation of 0 to {spec.size - 1}")
    _check_nodes(directory / NODES, nodes, spec.size)
    # A tree of one point tells how this scikit-learn keeps its state; ours goes in its place, unpickled.
    tree = KDTree(np.zeros((1, 1)), leaf_size=spec.params["leaf_size"])
    _, _, node_data, _, leaf_size, _, _, *rest = tree.__getstate__()
    if node_data.dtype != _NODE:
        raise ArtifactUnfit(
            f"{directory / NODES}: scikit-learn {sklearn.__version__} lays trees out differently: build the index again"
        )
    records = np.ascontiguousarray(nodes).view(_NODE).reshape(-1)
    tree.__setstate__((points, order, records, bounds, leaf_size, len(nodes).bit_length(), len(nodes), *rest))
    return KdTreeIndex(spec, tree, longest, vectors)


class KdTreeIndex:
    def __init__(self, spec: IndexSpec, tree: Any, longest: float, vectors: StoredVectors) -> None:
        self.spec = spec
        self._tree = tree
        self._longest = longest
        self._vectors = vectors
        self._exact = ExactSearch(vectors, spec.metric)

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
        """As `base.Index.search` says, in the calling thread. A mask is answered by comparing what it allows.

        The tree does not tell how many vectors it compared.
        """
        check_search(self.spec, queries, k, params, SearchParams, allowed)
        if allowed is not None:
            return self._exact.search(queries, k, allowed=allowed, limit=limit)
        answer = empty(len(queries), k)
        answer.visited[:] = -1
        if len(queries) == 0:
            return answer
        ask = min(k + SPARE, self.spec.size)
        lengths = _lengths(queries)
        sides: NDArray[Any] = queries if self.spec.metric == "l2" else _unit(queries, lengths)
        if self.spec.metric == "ip":
            sides = np.pad(sides, ((0, 0), (0, 1)))
        reached, found = self._tree.query(sides, k=ask)
        beyond = self._least_beyond(reached[:, -1], lengths)
        for i, query in enumerate(queries):
            labels, distances = nearest(query, found[i], k, self._vectors, self.spec.metric)
            if ask < self.spec.size and distances[-1] >= beyond[i]:
                # Equally near vectors go on beyond what was asked for: only comparing all settles it.
                exact = self._exact.search(queries[i : i + 1], k, limit=limit)
                answer.stopped[i] = exact.stopped[0]
                if not exact.stopped[0]:
                    labels, distances, answer.visited[i] = exact.labels[0], exact.distances[0], exact.visited[0]
            answer.labels[i], answer.distances[i] = pad(labels, distances, k)
        return answer

    def _least_beyond(self, reached: Lengths, lengths: Lengths) -> Distances:
        """Distances (n,) of the metric that no vector is below which is farther than `reached` (n,) in the tree."""
        squares = reached * reached
        if self.spec.metric == "l2":
            return (squares * (1.0 - UNIT_ERROR)).astype(np.float32)
        # For points of length 1, |q - x|² = 2 - 2<q, x>.
        scale = lengths * self._longest if self.spec.metric == "ip" else np.ones(len(squares))
        return (1.0 - scale * (1.0 - squares / 2) - UNIT_ERROR * (1.0 + scale)).astype(np.float32)

    def save(self, directory: Path) -> None:
        _, order, nodes, bounds = self._tree.get_arrays()
        write_array(directory / ORDER, order)
        write_array(directory / NODES, nodes.view(np.int64).reshape(-1, 4))
        write_array(directory / BOUNDS, bounds)

    def close(self) -> None:
        """Nothing to close: memory goes with the last reference, so that searches in flight end undisturbed."""


def tree_points(
    vectors: StoredVectors, metric: Metric, done: Callable[[int], None] = lambda rows: None
) -> tuple[Points, float]:
    """Where rows (size, dim) stand in the tree, and the length of the longest, which ip divides by.

    `done` is told how many more rows were read. Raises InvalidVector.
    """
    size, dim = vectors.shape
    points = np.empty((size, dim + (metric == "ip")))
    lengths = np.empty(size)
    for start, rows in checked_blocks(vectors):
        stop = start + len(rows)
        lengths[start:stop] = _lengths(rows)
        points[start:stop, :dim] = _unit(rows, lengths[start:stop]) if metric == "cosine" else rows
        done(len(rows))
    longest = float(lengths.max()) or 1.0
    if metric == "ip":
        points[:, :dim] /= longest
        points[:, dim] = np.sqrt(np.maximum(0.0, 1.0 - (lengths / longest) ** 2))
    return points, longest


def _lengths(rows: Vectors) -> Lengths:
    lengths: Lengths = np.sqrt(np.einsum("ij,ij->i", rows, rows, dtype=np.float64))
    return lengths


def _unit(rows: Vectors, lengths: Lengths) -> Points:
    """In float64, so that the tree's order is exact; rows of zeros stay zeros, nearer than they are to anything."""
    return rows / np.where(lengths > 0, lengths, 1.0)[:, None]


def _check_nodes(path: Path, nodes: NDArray[np.int64], size: int) -> None:
    """Every box's children share out its places between them, the root has all: so no walk leaves the arrays."""
    start, stop, leaf = nodes[:, 0], nodes[:, 1], nodes[:, 2]
    inner = np.flatnonzero(leaf == 0)
    left, right = 2 * inner + 1, 2 * inner + 2
    sound = (
        len(nodes) > 0
        and (start[0], stop[0]) == (0, size)
        and bool(np.all(start <= stop))
        and bool(np.all(right < len(nodes)))
        and np.array_equal(start[left], start[inner])
        and np.array_equal(stop[left], start[right])
        and np.array_equal(stop[right], stop[inner])
    )
    if not sound:
        raise ArtifactDamaged(f"{path}: its boxes do not share out {size} places")
