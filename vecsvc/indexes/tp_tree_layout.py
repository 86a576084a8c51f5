"""What the kernels of `tp_tree` and their callers agree on: the form of a node, and the slots of blocks of addresses.

A node is one row of int32. First come its signed axes: axis + 1 where the axis is added, -(axis + 1) where it is
taken away, 0 for none; then the bits of its float32 threshold, then its two children. A child from 0 on is a
node, one below 0 is the leaf ~child. A projection below the threshold belongs to the first child.
"""

from __future__ import annotations

from typing import Final

MAX_TOP_DIMS: Final = 8  # signed axes of a node at most: (3^8 - 1) / 2 = 3,280 directions are looked at
CANDIDATES: Final = 15  # axes of largest variance that a node's are drawn from, however many it has
DIRECTIONS: Final = (3**MAX_TOP_DIMS - 1) // 2
MAX_DEPTH: Final = 40  # a tree halves at most 2^31 rows

# --- a node, after its signed axes -----------------------------------------------------------------------
THRESHOLD: Final = 0
BELOW: Final = 1
ABOVE: Final = 2
NODE_SLOTS: Final = 3

# --- where a tree grows ----------------------------------------------------------------------------------
STATE: Final = 0  # the state of the random numbers itself
VALUES: Final = 1  # (n,) float32: projections of a node's rows, in their order
SPARE: Final = 2  # (n,) float32 to select in, then int32 for the rows of the second child
MOMENTS: Final = 3  # (3, dim) float32: a row of the sample, sums, sums of squares, both less that row
SAMPLE: Final = 4  # (n_samples,) int32 rows
TOP: Final = 5  # (CANDIDATES,) int32 axes
TOP_VARIANCES: Final = 6  # the same number of float32
COVARIANCE: Final = 7  # (MAX_TOP_DIMS, MAX_TOP_DIMS) float32
DEVIATIONS: Final = 8  # (MAX_TOP_DIMS,) float32
SIGNS: Final = 9  # (MAX_TOP_DIMS,) float32
AXES: Final = 10  # (MAX_TOP_DIMS,) int32
PLUS: Final = 11  # (DIRECTIONS + 1,) int32: a bit for every axis that a direction adds
MINUS: Final = 12  # the same for those it takes away
POWERS: Final = 13  # (DIRECTIONS + 1,) float32: w'Cw
STACK: Final = 14  # (MAX_DEPTH, 3) int64: first place, rows, where to write who this is (-1 for nowhere)
GROW_SLOTS: Final = 15

# --- where a forest lies ---------------------------------------------------------------------------------
SIZE: Final = 0  # vectors
DIM: Final = 1
TREES: Final = 2
TOP_DIMS: Final = 3  # signed axes of a node
NODES: Final = 4  # (nodes, TOP_DIMS + NODE_SLOTS) int32, of all trees
ORDER: Final = 5  # (trees * size,) int32 labels, leaf by leaf
STARTS: Final = 6  # (leaves + 1,) int64: where a leaf of all trees begins in ORDER
ROOTS: Final = 7  # (trees,) int32, as children are
VECTORS: Final = 8  # (size, dim)
VECTORS_HALF: Final = 9  # 1 for float16, 0 for float32
INVERSE_NORMS: Final = 10  # (size,) float32, for cosine
METRIC: Final = 11  # one of the three below
FOREST_SLOTS: Final = 12

L2: Final = 0
IP: Final = 1
COSINE: Final = 2

# --- where one search works ------------------------------------------------------------------------------
QUEUE: Final = 0  # (leaves + 1,) int64: a heap of subtrees that wait
SEEN: Final = 1  # (size,) uint8: the epoch in which a label was last met
EPOCH: Final = 2  # the current epoch itself, 1 to 255
FRESH: Final = 3  # (rows of the largest leaf,) int32
QUERY: Final = 4  # (dim,) float32: the query as the vectors want it
SIDE: Final = 5  # (dim + 1,) float32: the query as the trees want it
BEST: Final = 6  # (k + 1,) int64: distance and label in one number, sorted
BITS: Final = 7  # (1,) float32, read as int32
WORK_SLOTS: Final = 8
