"""Writes data/digits.parquet: scikit-learn's 1,797 handwritten digits as vectors, with their labels."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from sklearn.datasets import load_digits

CORPUS = Path(__file__).parent / "digits.parquet"


def load() -> tuple[NDArray[np.float32], NDArray[np.int8]]:
    """The vectors (1797, 64), pixels from 0 to 16, and the labels (1797,)."""
    digits = load_digits()
    return digits.data.astype(np.float32), digits.target.astype(np.int8)


def write(path: Path = CORPUS) -> Path:
    vectors, labels = load()
    table = pa.table(
        {
            "id": pa.array([f"digit-{i:04d}" for i in range(len(vectors))]),
            "vector": pa.array(list(vectors), pa.list_(pa.float32(), 64)),
            "label": pa.array(labels),
        }
    )
    pq.write_table(table, path)
    return path


if __name__ == "__main__":
    print(f"wrote {write()}")
