"""Writes a large made-up set that is about as hard as embeddings are: base.fbin and queries.fbin.

A Gaussian mixture of 2,000 centres is drawn in 30 dimensions and pushed through a fixed random network of two
layers to 128, so that the vectors lie on a curved sheet in their space. Measured at 1,000,000 rows: Levina and
Bickel's estimate of the intrinsic dimension is 24.2, 24.6 and 23.6 from the 10, 20 and 100 nearest rows of 150
queries; of a query's ten nearest rows a fifth come from its own centre, so the clusters are there and overlap.

    python data/mixture.py --rows 1000000 --out DIR
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

CENTRES = 2_000
LATENT = 30
HIDDEN = 256
DIM = 128
SPREAD = 1.2  # of a cluster, where the centres have 1
NOISE = 0.02  # off the sheet, where the vectors' values have about 1
BLOCK = 50_000
MODEL_SEED, BASE_SEED, QUERY_SEED = 7, 11, 13


def blocks(rows: int, seed: int) -> Iterator[NDArray[np.float32]]:
    """The rows (m, 128), block by block; the first rows of a larger set are those of a smaller one."""
    rng = np.random.default_rng(MODEL_SEED)
    centres = rng.standard_normal((CENTRES, LATENT), dtype=np.float32)
    first = rng.standard_normal((LATENT, HIDDEN), dtype=np.float32) / np.float32(np.sqrt(LATENT))
    second = rng.standard_normal((HIDDEN, DIM), dtype=np.float32) / np.float32(np.sqrt(HIDDEN))
    for number, start in enumerate(range(0, rows, BLOCK)):
        own = np.random.default_rng((seed, number))
        latent = centres[own.integers(0, CENTRES, BLOCK)]
        latent += np.float32(SPREAD) * own.standard_normal((BLOCK, LATENT), dtype=np.float32)
        vectors = np.tanh(latent @ first) @ second
        vectors += np.float32(NOISE) * own.standard_normal((BLOCK, DIM), dtype=np.float32)
        yield vectors[: rows - start]


def write(path: Path, rows: int, seed: int) -> Path:
    """One .fbin file: int32 rows, int32 dim, then the values."""
    with path.open("wb") as file:
        file.write(np.array([rows, DIM], dtype="<i4").tobytes())
        for block in blocks(rows, seed):
            file.write(np.ascontiguousarray(block, dtype="<f4").data)
    return path


def intrinsic_dimension(sample: NDArray[np.float32], rows: NDArray[np.float32], k: int = 20) -> float:
    """Levina and Bickel's maximum likelihood estimate over the k nearest rows of each sampled vector.

    Maximum likelihood estimation of intrinsic dimension, NIPS 2004, with the inverses averaged as MacKay and
    Ghahramani proposed. A sampled vector that is itself among the rows is left out.
    """
    norms = np.einsum("ij,ij->i", rows, rows)
    inverses = []
    for vector in sample:
        near = np.partition(norms - 2.0 * (rows @ vector), k + 1)[: k + 2] + vector @ vector
        distances = np.sqrt(np.sort(near[near > 1e-4])[:k])
        inverses.append(np.mean(np.log(distances[-1] / distances[:-1])))
    return float(1.0 / np.mean(inverses))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    for name, rows, seed in (("base", given.rows, BASE_SEED), ("queries", given.queries, QUERY_SEED)):
        print(f"wrote {write(given.out / f'{name}.fbin', rows, seed)}: {rows:,} x {DIM}")


if __name__ == "__main__":
    main()
