"""What each metric means, in NumPy: the only definition. Smaller is closer.

l2 is the squared Euclidean distance, ip is `1 - <q, x>`, cosine is `1 - cos(q, x)`.
"""

from __future__ import annotations

import numpy as np

from vecsvc.errors import InvalidVector
from vecsvc.types import MAX_ABS, Distances, Metric, StoredVectors, Vectors


def exact_distances(query: Vectors, rows: StoredVectors, metric: Metric) -> Distances:
    """Distances (m,) of one query (dim,) to rows (m, dim), each pair by itself.

    The sums run in float64 over one row at a time, so that a pair has the same distance whatever stands
    beside it: a matrix product rounds by the shape of its blocks, and would make ties a matter of luck.
    Zero vectors have the cosine distance 1.
    """
    x = rows.astype(np.float64)
    q = query.astype(np.float64)
    if metric == "l2":
        x -= q
        return np.asarray(np.sum(x * x, axis=1), dtype=np.float32)
    if metric == "cosine":
        norms = np.sqrt(np.sum(x * x, axis=1)) * np.sqrt(np.sum(q * q))
        x *= q
        cosines = np.divide(np.sum(x, axis=1), norms, out=np.zeros(len(x)), where=norms > 0)
        return np.asarray(np.maximum(1.0 - cosines, 0.0), dtype=np.float32)  # rounding makes some cosines exceed 1
    x *= q
    return np.asarray(1.0 - np.sum(x, axis=1), dtype=np.float32)


def approximate_distances(queries: Vectors, rows: Vectors, metric: Metric, squared_norms: Vectors) -> Distances:
    """Distances (n, m) by one matrix product: fast, and rounded to about 1e-6 of |q|² + |x|².

    For cosine, `queries` and `rows` are unit vectors already. `squared_norms` (m,) is read for l2 only.
    """
    products: Distances = queries @ rows.T
    if metric == "l2":
        products *= -2.0
        products += squared_norms
        products += np.einsum("ij,ij->i", queries, queries)[:, None]
        np.maximum(products, 0.0, out=products)
    else:
        np.subtract(1.0, products, out=products)
    return products


def unit(vectors: StoredVectors) -> Vectors:
    """Rows scaled to length 1, as float32; rows of zeros stay zeros.

    Divided by their largest entry first, so that neither huge nor tiny rows overflow or vanish.
    """
    raw = np.asarray(vectors, dtype=np.float32)
    largest = np.max(np.abs(raw), axis=-1, keepdims=True, initial=0.0)
    x: Vectors = np.divide(raw, largest, out=np.zeros_like(raw), where=largest > 0)
    norms = np.sqrt(np.einsum("...j,...j->...", x, x))[..., None]
    np.divide(x, norms, out=x, where=norms > 0)
    return x


def score(distances: Distances, metric: Metric) -> Distances:
    """Greater is better: the similarity for ip and cosine, the negative squared distance for l2."""
    return (0.0 if metric == "l2" else 1.0) - distances


def check_vector(vector: Vectors, metric: Metric, what: str = "vector") -> None:
    """Refuse what no metric can rank: NaN, infinities, values whose squares overflow, zero under cosine."""
    # A sum of squares within these bounds answers every question at once, and is nearly always there.
    if 0.0 < np.vdot(vector, vector) <= MAX_ABS:
        return
    largest = float(np.max(np.abs(vector), initial=0.0))  # NaN and inf come through max
    if not largest <= MAX_ABS:
        at = int(np.argmax(~(np.abs(vector) <= MAX_ABS)))
        raise InvalidVector(
            f"{what}[{at}] is {float(vector.reshape(-1)[at]):g}; values must be finite and within ±{MAX_ABS:g}"
        )
    if metric == "cosine" and largest == 0.0:
        raise InvalidVector(f"{what} is all zeros, which has no direction: cosine cannot rank by it")
