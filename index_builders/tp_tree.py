"""Builds kind `tp_tree`, and divides points into the leaves of one tree for whoever wants neighbours grouped."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from index_builders.base import Progress
from vecsvc import machine_code
from vecsvc.blocks import checked_blocks
from vecsvc.config import option
from vecsvc.errors import InvalidParameter
from vecsvc.exact_search import row_norms
from vecsvc.indexes import tp_tree_layout as layout
from vecsvc.indexes.addresses import Block
from vecsvc.indexes.base import params_dict
from vecsvc.indexes.tp_tree import Forest, TpTreeIndex
from vecsvc.types import IndexSpec, Metric, StoredVectors

MAX_CHECK: Final = (256, 512, 1024, 2048, 4096, 8192, 16_384, 32_768)
UNIT_TOLERANCE: Final = 1e-3  # rows of this length, but for so much, are divided as they are


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildParams:
    n_trees: int = option(
        8, "trees: more gives better recall at the same max_check, at 5 to 6 bytes a vector each", low=1, high=256
    )
    leaf_size: int = option(
        32, "vectors in a leaf at most: more makes smaller trees that compare more at a time", low=1, high=10**6
    )
    n_samples: int = option(
        1000, "vectors of a node that its direction is chosen by: more chooses better, slower", low=2, high=10**6
    )
    n_top_dims: int = option(
        5, "axes that a direction may add and take away; 1 makes a KD-forest", low=1, high=layout.MAX_TOP_DIMS
    )


def build(
    vectors: StoredVectors, *, metric: Metric, params: BuildParams, num_threads: int, seed: int, progress: Progress
) -> TpTreeIndex:
    """The index over rows (n, dim). The seed decides the trees, however many threads grow them.

    Raises InvalidVector, or InvalidParameter for more leaves than can be counted.
    """
    size, dim = vectors.shape
    leaves = -(-size // params.leaf_size)
    if params.n_trees * leaves >= 2**31:
        raise InvalidParameter(
            f"n_trees {params.n_trees} and leaf_size {params.leaf_size} make {params.n_trees * leaves} leaves, "
            f"fewer than {2**31} can be counted"
        )
    vectors = np.ascontiguousarray(vectors)
    points, inverse_norms = _tree_points(vectors, metric)
    order = np.empty((params.n_trees, size), dtype=np.int32)
    starts = np.empty(params.n_trees * leaves + 1, dtype=np.int64)
    nodes = np.empty((params.n_trees, leaves - 1, params.n_top_dims + layout.NODE_SLOTS), dtype=np.int32)

    def plant(tree: int, rng: np.random.Generator) -> None:
        order[tree], own_starts, nodes[tree] = grow(
            points,
            leaf_size=params.leaf_size,
            n_samples=params.n_samples,
            n_top_dims=params.n_top_dims,
            rng=rng,
        )
        starts[tree * leaves : (tree + 1) * leaves + 1] = own_starts + tree * size
        # Children are counted through all trees, so that what waits in a search needs no other name.
        children = nodes[tree, :, params.n_top_dims + layout.BELOW :]
        children += np.where(children >= 0, tree * (leaves - 1), -tree * leaves).astype(np.int32)

    chances = np.random.default_rng(seed).spawn(params.n_trees)
    with ThreadPoolExecutor(num_threads) as threads:
        for tree, done in enumerate([threads.submit(plant, *each) for each in enumerate(chances)]):
            done.result()
            progress((tree + 1) * size // params.n_trees - tree * size // params.n_trees)
    forest = Forest(nodes.reshape(-1, nodes.shape[2]), order, starts, inverse_norms)
    return TpTreeIndex(IndexSpec("tp_tree", dim, metric, size, params_dict(params)), forest, vectors)


def operating_points(spec: IndexSpec) -> list[dict[str, Any]]:
    """Vectors compared, from hasty to thorough."""
    return [{"max_check": check} for check in MAX_CHECK]


def _tree_points(vectors: StoredVectors, metric: Metric) -> tuple[StoredVectors, NDArray[np.float32] | None]:
    """Where rows (size, dim) stand in the trees, and 1 / |x| (size,) for cosine. Raises InvalidVector.

    They are the vectors themselves where that will do. Otherwise they are float16, which is ample for directions:
    for cosine of length 1, for ip of at most length 1 and with one more dimension that makes it 1.
    """
    size, dim = vectors.shape
    norms = np.empty(size, dtype=np.float32)
    for start, rows in checked_blocks(vectors):
        norms[start : start + len(rows)] = row_norms(rows) if metric != "l2" else 0.0
    # The inverse of a length at the end of float32 is brought back into it.
    inverse = np.minimum(
        np.divide(1.0, norms, out=np.zeros(size), where=norms > 0), float(np.finfo(np.float32).max)
    ).astype(np.float32)
    kept = inverse if metric == "cosine" else None
    if metric == "l2" or np.all(np.abs(norms - 1.0) <= UNIT_TOLERANCE):
        return vectors, kept
    longest = float(norms.max()) or 1.0
    points = np.empty((size, dim + (metric == "ip")), dtype=np.float16)
    for start, rows in checked_blocks(vectors):
        part = slice(start, start + len(rows))
        points[part, :dim] = rows * inverse[part, None] if metric == "cosine" else rows / np.float32(longest)
    if metric == "ip":
        points[:, dim] = np.sqrt(np.maximum(0.0, 1.0 - (norms / longest) ** 2))
    return points, kept


def partition(
    points: NDArray[Any], *, leaf_size: int, n_samples: int, n_top_dims: int, rng: np.random.Generator
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """One trinary-projection tree over finite points (n, dim), C-contiguous float32, float16 or int8: its leaves alone.

    Returns the rows (n,) leaf by leaf, and where each of the ceil(n / leaf_size) leaves begins, with n at the end.
    A leaf has from 1 to leaf_size rows, in ascending order. Runs in the calling thread, without the GIL; the same
    state of `rng` gives the same tree. Raises InvalidParameter for points that no tree can stand over.
    """
    order, starts, _ = grow(
        points, leaf_size=leaf_size, n_samples=n_samples, n_top_dims=n_top_dims, rng=rng, with_nodes=False
    )
    return order, starts


def grow(
    points: NDArray[Any],
    *,
    leaf_size: int,
    n_samples: int,
    n_top_dims: int,
    rng: np.random.Generator,
    with_nodes: bool = True,
) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int32]]:
    """As `partition`, and the nodes (leaves - 1, n_top_dims + NODE_SLOTS) as tp_tree_layout says, the root first."""
    if points.dtype not in (np.float32, np.float16, np.int8) or points.ndim != 2 or not points.flags.c_contiguous:
        raise InvalidParameter(
            f"points have shape {points.shape} of {points.dtype}, "
            "expected (n, dim), C-contiguous, of float32, float16 or int8"
        )
    n, dim = points.shape
    if not (0 < n < 2**31 and dim > 0 and leaf_size > 0 and n_samples > 1):
        raise InvalidParameter(
            f"{n} x {dim} points, leaf_size {leaf_size}, n_samples {n_samples}: "
            "each must be at least 1, n_samples 2, and points fewer than 2^31"
        )
    if not 1 <= n_top_dims <= layout.MAX_TOP_DIMS:
        raise InvalidParameter(f"n_top_dims must be between 1 and {layout.MAX_TOP_DIMS}, got {n_top_dims}")
    leaves = -(-n // leaf_size)
    order = np.empty(n, dtype=np.int32)
    starts = np.empty(leaves + 1, dtype=np.int64)
    nodes = np.zeros((leaves - 1 if with_nodes else 0, n_top_dims + layout.NODE_SLOTS), dtype=np.int32)
    work = Block(layout.GROW_SLOTS, {layout.STATE: int(rng.integers(2**62))}, _room(n, dim, min(n, n_samples)))
    kernel = machine_code.load("index_builders.tp_tree_kernels", f"tp_tree_grow_{points.dtype}", 10)
    addresses = (work.address, order.ctypes.data, starts.ctypes.data, nodes.ctypes.data if with_nodes else 0)
    kernel(points.ctypes.data, n, dim, leaf_size, n_samples, n_top_dims, *addresses)
    return order, starts, nodes


def _room(n: int, dim: int, sampled: int) -> dict[int, NDArray[Any]]:
    """What a tree needs to grow, by the slot that names it."""
    most, tries = layout.MAX_TOP_DIMS, layout.DIRECTIONS + 1
    return {
        layout.VALUES: np.empty(n, dtype=np.float32),
        layout.SPARE: np.empty(n, dtype=np.float32),
        layout.MOMENTS: np.empty((3, dim), dtype=np.float32),
        layout.SAMPLE: np.empty(sampled, dtype=np.int32),
        layout.TOP: np.empty(layout.CANDIDATES, dtype=np.int32),
        layout.TOP_VARIANCES: np.empty(layout.CANDIDATES, dtype=np.float32),
        layout.COVARIANCE: np.empty((most, most), dtype=np.float32),
        layout.DEVIATIONS: np.empty(most, dtype=np.float32),
        layout.SIGNS: np.empty(most, dtype=np.float32),
        layout.AXES: np.empty(most, dtype=np.int32),
        layout.PLUS: np.empty(tries, dtype=np.int32),
        layout.MINUS: np.empty(tries, dtype=np.int32),
        layout.POWERS: np.empty(tries, dtype=np.float32),
        layout.STACK: np.empty((layout.MAX_DEPTH, 3), dtype=np.int64),
    }
