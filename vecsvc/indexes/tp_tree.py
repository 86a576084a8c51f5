"""Kind `tp_tree`: a forest of trinary-projection trees, read side. Small, built in seconds, slower than a graph.

Wang et al., Trinary-Projection Trees for Approximate Nearest Neighbor Search, PAMI 36 (2014). A node halves its
vectors along a sum and difference of a few axes, which costs a few additions; a search goes down all trees at once,
best first, and compares the vectors in the leaves that it comes to. The search itself is in tp_tree_kernels.py.

Trees know Euclidean distance. For cosine they stand over unit vectors; for inner product over vectors with one
more dimension, which turns the largest product into the smallest distance: Bachrach et al., Speeding Up the Xbox
Recommender System Using a Euclidean Transformation for Inner-Product Spaces, RecSys 2014.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from vecsvc import machine_code
from vecsvc.config import option
from vecsvc.errors import ArtifactDamaged
from vecsvc.indexes import tp_tree_layout as layout
from vecsvc.indexes.addresses import Block
from vecsvc.indexes.base import check_rows, check_search, empty
from vecsvc.storage import open_array, write_array
from vecsvc.types import IndexSpec, Limit, Mask, Metric, Neighbors, StoredVectors, Vectors

NODES: Final = "tp_tree_nodes.npy"  # (nodes, n_top_dims + 3) int32, as tp_tree_layout says
ORDER: Final = "tp_tree_order.npy"  # (n_trees, size) int32: the labels, leaf by leaf
STARTS: Final = "tp_tree_starts.npy"  # (leaves + 1,) int64: where a leaf begins in the trees' orders, one after another
INVERSE_NORMS: Final = "tp_tree_inverse_norms.npy"  # (size,) float32, cosine only: 1 / |x|, 0 for zeros

MAX_CHECK: Final = 1 << 30
BLOCK: Final = 32  # queries that one thread takes at a time
# What the slowest machine in mind looks at, to turn a deadline into a bound: places, and values of vectors.
PLACES_A_SECOND: Final = 2_000_000
VALUES_A_SECOND: Final = 500_000_000
NO_BOUND: Final = 1 << 60

METRICS: Final[dict[Metric, int]] = {"l2": layout.L2, "ip": layout.IP, "cosine": layout.COSINE}


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchParams:
    max_check: int = option(
        2048, "vectors compared: more gives better recall, slower; never less than k", low=1, high=MAX_CHECK
    )


@dataclass(frozen=True, slots=True)
class Forest:
    """The arrays of an index, as the files have them; children and leaves are counted through all trees."""

    nodes: NDArray[np.int32]
    order: NDArray[np.int32]
    starts: NDArray[np.int64]
    inverse_norms: NDArray[np.float32] | None

    def roots(self) -> NDArray[np.int32]:
        """(n_trees,) as children are written: trees have equally many nodes, and a tree of one leaf has none."""
        trees = np.arange(len(self.order))
        return np.asarray(trees * (len(self.nodes) // len(trees)) if len(self.nodes) else ~trees, dtype=np.int32)


def load(directory: Path, spec: IndexSpec, *, vectors: StoredVectors, mmap: bool, device: str) -> TpTreeIndex:
    """Open what `TpTreeIndex.save` wrote. Raises ArtifactDamaged, naming the file that would lead a search astray."""
    check_rows(spec, vectors)
    params, size = spec.params, spec.size
    for name, most in (("n_trees", 256), ("leaf_size", 10**6), ("n_top_dims", layout.MAX_TOP_DIMS)):
        if not isinstance(params.get(name), int) or not 1 <= params[name] <= most:
            raise ArtifactDamaged(f"{directory / NODES}: built with {name} {params.get(name)}, expected 1 to {most}")
    trees, leaves = params["n_trees"], -(-size // params["leaf_size"])
    nodes_shape = (trees * (leaves - 1), params["n_top_dims"] + layout.NODE_SLOTS)
    forest = Forest(
        nodes=open_array(directory / NODES, np.int32, nodes_shape, mmap=mmap),
        order=open_array(directory / ORDER, np.int32, (trees, size), mmap=mmap),
        starts=open_array(directory / STARTS, np.int64, (trees * leaves + 1,), mmap=mmap),
        inverse_norms=(
            open_array(directory / INVERSE_NORMS, np.float32, (size,), mmap=mmap) if spec.metric == "cosine" else None
        ),
    )
    _check_nodes(directory / NODES, forest.nodes, trees, leaves, spec.dim + (spec.metric == "ip"))
    _check_leaves(directory / STARTS, forest.starts, trees, size)
    for labels in forest.order:
        if labels.min() < 0 or labels.max() >= size or not np.bincount(labels, minlength=size).all():
            raise ArtifactDamaged(f"{directory / ORDER}: is no permutation of 0 to {size - 1} for each tree")
    norms = forest.inverse_norms
    if norms is not None and not (np.isfinite(norms).all() and norms.min() >= 0):
        raise ArtifactDamaged(f"{directory / INVERSE_NORMS}: holds what cannot be 1 / a length")
    return TpTreeIndex(spec, forest, vectors)


class TpTreeIndex:
    def __init__(self, spec: IndexSpec, forest: Forest, vectors: StoredVectors) -> None:
        """`forest` must have been checked: the search takes its word for what lies where."""
        self.spec = spec
        self._forest = forest
        self._search = machine_code.load("vecsvc.indexes.tp_tree_kernels", "tp_tree_search", 13)
        self._idle: deque[Workspace] = deque()
        self._block = Block(
            layout.FOREST_SLOTS,
            {
                layout.SIZE: spec.size,
                layout.DIM: spec.dim,
                layout.TREES: len(forest.order),
                layout.TOP_DIMS: forest.nodes.shape[1] - layout.NODE_SLOTS,
                layout.VECTORS_HALF: int(vectors.dtype == np.float16),
                layout.METRIC: METRICS[spec.metric],
            },
            {
                layout.NODES: forest.nodes,
                layout.ORDER: forest.order,
                layout.STARTS: forest.starts,
                layout.ROOTS: forest.roots(),
                layout.VECTORS: vectors,
                layout.INVERSE_NORMS: forest.inverse_norms,
            },
        )

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
        """As `base.Index.search` says. What a filter leaves out is passed by, and not counted as compared.

        A search goes on until it has compared max_check vectors, and at least k where there are k. A deadline
        becomes a bound of what may be looked at, before each query.
        """
        settings: SearchParams = check_search(self.spec, queries, k, params, SearchParams, allowed)
        found = empty(len(queries), k)
        there = self.spec.size if allowed is None else int(np.count_nonzero(allowed))
        if there == 0 or len(queries) == 0:
            return found
        task = _Task(
            np.ascontiguousarray(queries),
            None if allowed is None else np.ascontiguousarray(allowed),
            min(max(settings.max_check, k), there),
            limit,
            found,
        )
        step = 1 if limit is not None and limit.deadline is not None else BLOCK
        starts = iter(range(0, len(queries), step))
        if num_threads == 1 or len(queries) <= step:
            self._work(task, starts, step)
        else:
            with ThreadPoolExecutor(min(num_threads, -(-len(queries) // step))) as threads:
                for done in [threads.submit(self._work, task, starts, step) for _ in range(num_threads)]:
                    done.result()
        return found

    def _work(self, task: _Task, starts: Iterator[int], step: int) -> None:
        """Answer blocks of queries until there are no more: threads share the iterator, each next() is theirs alone."""
        k = task.found.labels.shape[1]
        try:
            work = self._idle.pop()
        except IndexError:
            work = Workspace(self._block, self._forest)
        work.make_room(min(k, self.spec.size))
        mask = 0 if task.allowed is None else task.allowed.ctypes.data
        for start in starts:
            part = slice(start, start + step)
            compared, met = task.bounds(self.spec.dim)
            self._search(
                self._block.address,
                work.address,
                task.queries[part].ctypes.data,
                len(task.queries[part]),
                k,
                task.goal,
                compared,
                met,
                mask,
                task.found.labels[part].ctypes.data,
                task.found.distances[part].ctypes.data,
                task.found.visited[part].ctypes.data,
                task.found.stopped[part].ctypes.data,
            )
        self._idle.append(work)

    def save(self, directory: Path) -> None:
        write_array(directory / NODES, self._forest.nodes)
        write_array(directory / ORDER, self._forest.order)
        write_array(directory / STARTS, self._forest.starts)
        if self._forest.inverse_norms is not None:
            write_array(directory / INVERSE_NORMS, self._forest.inverse_norms)

    def close(self) -> None:
        """Nothing to close: memory goes with the last reference, so that searches in flight end undisturbed."""


@dataclass(frozen=True, slots=True)
class _Task:
    """One call of search, which threads share."""

    queries: Vectors
    allowed: Mask | None
    goal: int  # vectors to compare for each query
    limit: Limit | None
    found: Neighbors

    def bounds(self, dim: int) -> tuple[int, int]:
        """(vectors, places of leaves) that the next query may compare and look at."""
        compared, met = NO_BOUND, NO_BOUND
        if self.limit is not None and self.limit.max_visited is not None:
            compared = self.limit.max_visited
        if self.limit is not None and self.limit.deadline is not None:
            left = max(0.0, self.limit.deadline - time.monotonic())
            met = int(min(left, 1e6) * min(PLACES_A_SECOND, VALUES_A_SECOND / dim))
        return compared, met


class Workspace:
    """Where one search at a time works: made once, and handed from search to search."""

    def __init__(self, index: Block, forest: Forest) -> None:
        """For the index of that block."""
        size, dim = int(index.values[layout.SIZE]), int(index.values[layout.DIM])
        arrays: dict[int, NDArray[Any]] = {
            # What waits are subtrees without a leaf in common, so that they are never more than the leaves.
            layout.QUEUE: np.empty(len(forest.starts), dtype=np.int64),
            layout.SEEN: np.zeros(size, dtype=np.uint8),
            layout.FRESH: np.empty(int(np.diff(forest.starts).max()), dtype=np.int32),
            layout.QUERY: np.empty(dim, dtype=np.float32),
            layout.SIDE: np.empty(dim + 1, dtype=np.float32),
            layout.BITS: np.empty(1, dtype=np.float32),
        }
        self._block = Block(layout.WORK_SLOTS, {}, arrays)
        self._room = 0
        self.address = self._block.address

    def make_room(self, k: int) -> None:
        """Let the answer have so many places."""
        if k > self._room:
            self._room = 2 * k
            self._block.put(layout.BEST, np.empty(self._room + 1, dtype=np.int64))


def _check_nodes(path: Path, nodes: NDArray[np.int32], trees: int, leaves: int, dim: int) -> None:
    """Every tree has each of its nodes but the root, and each of its leaves, once as a child: no walk goes astray."""
    if len(nodes) == 0:
        return
    top = nodes.shape[1] - layout.NODE_SLOTS
    if np.abs(nodes[:, :top].astype(np.int64)).max() > dim:
        raise ArtifactDamaged(f"{path}: names axes beyond {dim}")
    if not np.isfinite(np.ascontiguousarray(nodes[:, top + layout.THRESHOLD]).view(np.float32)).all():
        raise ArtifactDamaged(f"{path}: holds thresholds that are not finite")
    own = np.arange(len(nodes))[:, None]
    children = nodes[:, [top + layout.BELOW, top + layout.ABOVE]].astype(np.int64)
    inner = leaves - 1
    tree_of = np.where(children >= 0, children // inner, ~children // leaves)
    sound = bool(
        np.all((children < 0) | (children > own))
        and np.all(tree_of == own // inner)
        and len(np.unique(children)) == 2 * len(nodes)
        and children.max(initial=-1) < len(nodes)
        and children.min() >= -trees * leaves
    )
    if not sound:
        raise ArtifactDamaged(f"{path}: its nodes do not make {trees} trees of {leaves} leaves")


def _check_leaves(path: Path, starts: NDArray[np.int64], trees: int, size: int) -> None:
    """No leaf is empty, and each tree's leaves share out all places of its order."""
    leaves = (len(starts) - 1) // trees
    if not (np.diff(starts) > 0).all() or not np.array_equal(starts[::leaves], np.arange(trees + 1) * size):
        raise ArtifactDamaged(f"{path}: its leaves do not share out {size} places of each of {trees} trees")
