"""What the kernels of `nng` and their callers agree on: the slots of the blocks of addresses that they share.

A kernel takes two blocks of int64: one says where an index lies, the other where one search may work. Filling them
once saves each query the time of passing twenty arguments.
"""

from __future__ import annotations

from typing import Final

# --- where an index lies ---------------------------------------------------------------------------------
SIZE: Final = 0  # vectors
DIM: Final = 1
DEGREE: Final = 2  # slots of a row of the graph
CHUNKS: Final = 3  # lines of 64 bytes in a 4-bit code
GRAPH: Final = 4  # (size, degree) int32 places, -1 after the last
HIGH: Final = 5  # (size, chunks * 64) uint8: the upper halves of the 8-bit codes
LOW: Final = 6  # the lower halves
SCALE: Final = 7  # (3, dim) float32: mean, value of code 0, step
BIAS: Final = 8  # (size,) float32 added to what the codes say, 0 for none
BIAS_MOST: Final = 9  # address of a float32: the largest of |bias|
ORDER: Final = 10  # (size,) int32 label of each place
PLACES: Final = 11  # (size,) int32 place of each label
VECTORS: Final = 12  # rows for the exact comparison, 0 for none
VECTORS_HALF: Final = 13  # 1 for float16, 0 for float32
VECTORS_BY_PLACE: Final = 14  # 1 where row i belongs to place i, 0 where it belongs to label i
INVERSE_NORMS: Final = 15  # (size,) float32 by label, 0 where the vectors need no scaling
METRIC: Final = 16  # one of the three below
N_PIVOTS: Final = 17
PIVOTS: Final = 18  # (n_pivots,) int32 places
PIVOT_CODES: Final = 19  # (n_pivots, chunks * 64) uint8, their HIGH side by side
SPREAD: Final = 20  # address of a float32: the standard deviation of a value's 8-bit codes, the mean over the values
INDEX_SLOTS: Final = 21

L2: Final = 0
IP: Final = 1
COSINE: Final = 2

# --- where one search works ------------------------------------------------------------------------------
POOL: Final = 0  # (pool_size + 1,) int64
# (MAX_DEGREE + 4,) int32, places of the index all of them, also where nothing was put yet. A scan of what is allowed
# puts 72 there, and `lower_halves` MEASURED.
FRESH: Final = 1
SEEN: Final = 2  # (size,) uint8: the epoch in which a place was last met
EPOCH: Final = 3  # the current epoch itself, 1 to 255
QUERY: Final = 4  # (dim,) float32: the query as the vectors want it
CENTRED: Final = 5  # (dim,) float32: the query as the codes want it
QUERY_CODE: Final = 6  # (chunks * 128,) int8
WEIGHTS: Final = 7  # (chunks * 128,) float32: what single codes count, where there are no vectors
RANKED: Final = 8  # (SEEDS * ROUNDS + 1,) int64
KEYS: Final = 9  # (MAX_DEGREE + 4,) int32: the distances of what is in FRESH
NEAR: Final = 10  # (MAX_DEGREE + 1,) int64: entries for the pool
WORK_SLOTS: Final = 11

# --- what one call asks for; packed as nineteen int64, for each argument of its own costs a call 0.1 µs ------------
INDEX: Final = 0  # the blocks above
WORK: Final = 1
QUERIES: Final = 2  # (n, dim) float32; this and all other arrays by id(), see kernels.data_of
FIRST: Final = 3  # queries FIRST to END - 1 are answered
END: Final = 4
CHECKED: Final = 5  # a query whose values somebody has looked at, or -1
K: Final = 6
EF: Final = 7  # places of the pool; 0 compares all that is allowed as `nearest_allowed` does, -1 exactly
ENOUGH: Final = 8  # allowed places with which a filtered walk is content
DEPTH: Final = 9  # places that are compared exactly
ALLOWED: Final = 10  # (size,) bool by label, or 0
VISITS: Final = 11  # vectors that may be compared for one query
LABELS: Final = 12  # (n, k) int64
DISTANCES: Final = 13  # (n, k) float32
VISITED: Final = 14  # (n,) int64
STOPPED: Final = 15  # (n,) bool
HOPS: Final = 16  # (n,) int64
WAYS: Final = 17  # (n,) uint8, all 0: becomes SCAN or EXACT where that was done; 0 without a mask
LEFT: Final = 18  # labels that ALLOWED leaves
CALL_SLOTS: Final = 19

SCAN: Final = 1  # places in types.WAYS
EXACT: Final = 2

MAX_DEGREE: Final = 256
SEEDS: Final = 4  # pivots that a walk starts from, and as many that it goes on from where it is stuck
ROUNDS: Final = 4  # how often it may start, the first time included
