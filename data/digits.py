"""Writes data/digits.parquet: scikit-learn's 1,797 handwritten digits as vectors, with their labels.

And data/digits-questions.parquet: every seventh of them moved by one pixel, to measure recall with.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from sklearn.datasets import load_digits

CORPUS = Path(__file__).parent / "digits.parquet"
QUESTIONS = Path(__file__).parent / "digits-questions.parquet"


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


def write_questions(path: Path = QUESTIONS) -> Path:
    images = load()[0][::7].reshape(-1, 8, 8)
    vectors = np.roll(images, 1, axis=2).reshape(-1, 64)
    pq.write_table(pa.table({"vector": pa.array(list(vectors), pa.list_(pa.float32(), 64))}), path)
    return path


if __name__ == "__main__":
    print(f"wrote {write()} and {write_questions()}")
