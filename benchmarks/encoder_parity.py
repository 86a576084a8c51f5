"""Shows that a converted encoder gives the vectors of the original: cosines against embeddings that another made.

    python benchmarks/encoder_parity.py --model DIR --data DIR

--model is an all-MiniLM-L6-v2 folder with model.safetensors. --data has tldr_docs.parquet, peps.parquet (column
`text`) and tldr_queries.parquet (column `query`), and minilm/NAME.f16.npy: row i is the embedding of row i, mean
pooling, unit length, at most 256 tokens. Exits 1 where any cosine is below 0.999.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from index_builders.encoder_import import import_encoder
from vecsvc.encoders.base import Role
from vecsvc.encoders.onnx import OnnxEncoder, open_encoder
from vecsvc.manifest import cpu_description, library_versions

FILES: Final[tuple[tuple[str, str, Role], ...]] = (
    ("tldr_docs", "text", "passage"),
    ("tldr_queries", "query", "query"),
    ("peps", "text", "passage"),
)
MIN_COSINE: Final = 0.999
RESULTS: Final = Path(__file__).parent / "results" / "encoder_parity.json"
LIBRARIES: Final = ("vecsvc", "onnxruntime", "onnx", "tokenizers", "safetensors", "numpy")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=2000, help="rows sampled over the three files")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--threads", type=int, default=0, help="0 for one a core")
    args = parser.parse_args()

    random = np.random.default_rng(args.seed)
    counts = [args.rows // len(FILES) + (i < args.rows % len(FILES)) for i in range(len(FILES))]
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        spec = import_encoder(args.model, Path(folder) / "encoder")
        import_s = time.perf_counter() - started
        encoder = open_encoder(Path(folder) / "encoder", num_threads=args.threads)
        rows = [
            measure(encoder, args.data, *file, count, random)
            for file, count in zip(FILES, counts, strict=True)
            if count
        ]
        encoder.close()

    print(f"{'file':<14}{'rows':>7}{'min':>13}{'p1':>13}{'mean':>13}{'texts/s':>10}")
    for row in rows:
        print(f"{row['file']:<14}{row['rows']:>7}", end="")
        print(f"{row['min']:>13.8f}{row['p1']:>13.8f}{row['mean']:>13.8f}{row['texts_per_s']:>10.0f}")
    passed = all(row["min"] >= MIN_COSINE for row in rows)
    cpu, features = cpu_description()
    versions = {"python": platform.python_version(), **library_versions(LIBRARIES)}
    print(f"\ncosine to the reference; {'all' if passed else 'NOT all'} are at least {MIN_COSINE}; seed {args.seed}")
    print(f"import {import_s:.1f} s; dim {spec.dim}, {spec.pooling} pooling, at most {spec.max_tokens} tokens")
    print(f"{cpu}, {os.cpu_count()} cores; " + ", ".join(f"{k} {v}" for k, v in versions.items()))

    result = {
        "benchmark": "encoder_parity",
        "seed": args.seed,
        "min_cosine": MIN_COSINE,
        "passed": passed,
        "import_s": round(import_s, 3),
        "fingerprint": spec.fingerprint,
        "files": rows,
        "machine": {"cpu": cpu, "cores": os.cpu_count(), "features": features, "threads": args.threads},
        "versions": versions,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    return 0 if passed else 1


def measure(
    encoder: OnnxEncoder, data: Path, name: str, column: str, role: Role, count: int, random: np.random.Generator
) -> dict[str, Any]:
    """Cosines of `count` sampled rows of one file to their reference."""
    reference = np.load(data / "minilm" / f"{name}.f16.npy", mmap_mode="r")
    rows = np.sort(random.choice(len(reference), min(count, len(reference)), replace=False))
    texts = read_rows(data / f"{name}.parquet", column, rows)
    started = time.perf_counter()
    vectors = encoder.encode(texts, role)
    seconds = time.perf_counter() - started
    # In float64, because float32 cannot tell 1 - 1e-8 from 1; the reference is unit length only as far as float16 goes.
    found, expected = vectors.astype(np.float64), reference[rows].astype(np.float64)
    cosines = np.sum(found * expected, axis=1) / np.linalg.norm(found, axis=1) / np.linalg.norm(expected, axis=1)
    return {
        "file": name,
        "rows": len(rows),
        "min": float(cosines.min()),
        "p1": float(np.quantile(cosines, 0.01)),
        "mean": float(cosines.mean()),
        "texts_per_s": len(rows) / seconds,
    }


def read_rows(file: Path, column: str, rows: NDArray[np.integer[Any]]) -> list[str]:
    """The texts at the sorted positions `rows`: nothing but them is kept while the column goes by."""
    texts: list[str] = []
    first = 0
    for batch in pq.ParquetFile(file).iter_batches(columns=[column]):
        inside = rows[(rows >= first) & (rows < first + len(batch))] - first
        texts += batch.column(0).take(inside).to_pylist()
        first += len(batch)
    if len(texts) != len(rows):
        raise SystemExit(f"{file} has {first} rows, its reference has row {int(rows[-1])}")
    return texts


if __name__ == "__main__":
    sys.exit(main())
