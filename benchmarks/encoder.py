"""How fast and how good encoders are: ours beside PyTorch, onnxruntime as it comes, and sentence-transformers.

    python benchmarks/encoder.py --data DIR [--model DIR] [--encoders DIR,DIR,...] [--docstrings FILE] [--parts ...]

--model is the original's Hugging Face folder (safetensors, tokenizer.json): the framework and sentence-transformers
open it. --encoders are folders of ours, the first of them the original's plain conversion, by which the others are
measured. --data has tldr_docs.parquet, tldr_queries.parquet and peps.parquet. --docstrings is what data/docstrings.py
writes; only the packages that the default encoder has not learnt from are used of it.

latency: one short query from text to vector on one core, everyone in turn, medians over rounds; and in the quietest
round of each, because what neighbours take of a shared machine comes and goes within seconds.
quality: recall@10 of the one right document, all test queries of tldr, and first sentences of docstrings.
bulk: texts a second over paragraphs of the PEPs, all cores, everyone in turn, medians over rounds.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any, Final

import numpy as np
import pyarrow.parquet as pq
from common import machine, save, table
from numpy.typing import NDArray

from index_builders.bulk_encode import CALL_TEXTS
from vecsvc.encoders import default_encoder
from vecsvc.encoders.onnx import OnnxEncoder, open_encoder
from vecsvc.exact_search import ExactSearch
from vecsvc.onnx_session import usable_cores
from vecsvc.types import Vectors

PARTS: Final = ("latency", "quality", "bulk")
LIBRARIES: Final = ("onnxruntime", "tokenizers", "torch", "transformers", "sentence-transformers", "optimum-onnx")
K: Final = 10
# Eleven words; 13 tokens with the two special ones that a BERT puts around them.
QUERY: Final = "how do i list all of the files in a folder"
# Kept out of what the default encoder learnt from: see data/encoder_texts.py.
UNSEEN: Final = ("bokeh", "celery", "networkx", "redis", "scrapy", "xarray")
MIN_REST: Final = 60

Encode = Callable[[list[str]], Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="without it the framework and sentence-transformers are left out")
    parser.add_argument(
        "--encoders",
        default=str(default_encoder()),
        help="folders of ours, separated by commas; the default one without",
    )
    parser.add_argument("--docstrings", type=Path)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--texts", type=int, default=2000, help="PEP paragraphs of the bulk part")
    options = parser.parse_args()
    folders = [Path(folder) for folder in options.encoders.split(",")]
    figures: dict[str, Any] = {}
    for part in options.parts.split(","):
        if part not in PARTS:
            sys.exit(f"--parts takes {', '.join(PARTS)}, got {part!r}")
    if "latency" in options.parts:
        figures["latency"] = latency(options.model, folders, options.rounds)
    if "quality" in options.parts:
        figures["quality"] = quality(options.data, options.docstrings, folders)
    if "bulk" in options.parts:
        figures["bulk"] = bulk(options.data, options.model, folders, options.texts, options.rounds)
    save("encoder", figures, libraries=LIBRARIES)


# --------------------------------------------------------------------------------------------------- latency


def latency(model: Path | None, folders: list[Path], rounds: int) -> list[dict[str, Any]]:
    """Milliseconds of one short query, everyone on one core."""
    if hasattr(os, "sched_setaffinity"):
        cores = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {min(cores)})
    encoders = [open_encoder(folder, num_threads=1) for folder in folders]
    systems: dict[str, Encode] = {}
    if model is not None:
        systems |= {
            "PyTorch eager": torch_eager(model, 1),
            "sentence-transformers, ONNX": sentence_transformers_onnx(model, 1),
        }
    systems["onnxruntime as it comes"] = plain_onnxruntime(folders[0], 1)
    systems |= {f"vecsvc {encoder.spec.name}": _query(encoder) for encoder in encoders}
    found = alternate({name: (lambda e=encode: e([QUERY])) for name, encode in systems.items()}, rounds, 40)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)
    base = found["PyTorch eager" if model is not None else "onnxruntime as it comes"]
    rows = [
        {
            "system": name,
            "ms": median(seconds) * 1e3,
            "times faster": median(base) / median(seconds),
            "quietest ms": min(seconds) * 1e3,
            "quietest, times faster": min(base) / min(seconds),
            "tokens": _tokens(encoders, name),
        }
        for name, seconds in found.items()
    ]
    _show("One query, one core: text to vector", rows)
    return rows


def _query(encoder: OnnxEncoder) -> Encode:
    """As the service does it: tokens, then one run."""
    return lambda texts: encoder.run(encoder.split(texts, "query"))


def _tokens(encoders: list[OnnxEncoder], name: str) -> int:
    encoder = next((e for e in encoders if name == f"vecsvc {e.spec.name}"), encoders[0])
    return len(encoder.split([QUERY])[0])


def alternate(systems: dict[str, Callable[[], Any]], rounds: int, calls: int) -> dict[str, list[float]]:
    """Each system's median call of each round, in seconds; every round has everyone in turn."""
    for call in systems.values():
        for _ in range(min(calls, 10)):
            call()
    found: dict[str, list[float]] = {name: [] for name in systems}
    for _ in range(rounds):
        for name, call in systems.items():
            spent = []
            for _ in range(calls):
                before = time.perf_counter()
                call()
                spent.append(time.perf_counter() - before)
            found[name].append(median(spent))
    return found


# --------------------------------------------------------------------------------------------------- quality


def quality(data: Path, docstrings: Path | None, folders: list[Path]) -> list[dict[str, Any]]:
    """recall@10 of the one right document."""
    documents = pq.read_table(data / "tldr_docs.parquet").to_pydict()
    asked = pq.read_table(data / "tldr_queries.parquet").to_pydict()
    position = {id: row for row, id in enumerate(documents["id"])}
    test = [row for row, page in enumerate(asked["page"]) if zlib.crc32(page.encode()) % 5 == 0]
    tasks = {
        "tldr": (
            documents["text"],
            [asked["query"][row] for row in test],
            np.array([position[asked["id"][row]] for row in test]),
        )
    }
    if docstrings is not None:
        tasks["docstrings"] = unseen_docstrings(docstrings)
    rows: list[dict[str, Any]] = []
    for folder in folders:
        encoder = open_encoder(folder)
        row: dict[str, Any] = {"encoder": encoder.spec.name, "dim": encoder.spec.dim}
        for name, (texts, queries, right) in tasks.items():
            row[f"{name} recall@10"] = recall(encoder, texts, queries, right)
            row["of the first"] = row[f"{name} recall@10"] / (rows[0] if rows else row)[f"{name} recall@10"]
            row[f"{name}, of the first"] = row.pop("of the first")
        rows.append(row)
        encoder.close()
    sizes = ", ".join(f"{name}: {len(q):,} queries, {len(t):,} documents" for name, (t, q, _) in tasks.items())
    _show(f"Quality ({sizes})", rows)
    return rows


def unseen_docstrings(path: Path) -> tuple[list[str], list[str], NDArray[np.int64]]:
    """Documents, queries, and which document each query asks for: first sentences ask for what follows them."""
    found: dict[str, str] = {}
    for entry in pq.read_table(path).to_pylist():
        title, body = entry["title"], entry["text"].partition(": ")[2]
        rest = body[len(title) :].strip() if body.startswith(title) else ""
        if entry["package"] in UNSEEN and len(rest) >= MIN_REST:
            found.setdefault(title, rest)
    return list(found.values()), list(found), np.arange(len(found))


def recall(encoder: OnnxEncoder, texts: list[str], queries: list[str], right: NDArray[np.int64]) -> float:
    base: Vectors = encoder.encode(texts, "passage")
    found = ExactSearch(base, "ip").search(encoder.encode(queries, "query"), K).labels
    return float((found == right[:, None]).any(axis=1).mean())


# ------------------------------------------------------------------------------------------------------ bulk


def bulk(data: Path, model: Path | None, folders: list[Path], count: int, rounds: int) -> list[dict[str, Any]]:
    """Texts a second, all cores."""
    paragraphs = pq.read_table(data / "peps.parquet")["text"].to_pylist()
    texts = [paragraphs[i] for i in np.random.default_rng(7).permutation(len(paragraphs))[:count]]
    cores = usable_cores()
    systems: dict[str, Encode] = {}
    if model is not None:
        systems["sentence-transformers, ONNX"] = sentence_transformers_onnx(model, 0)
    for folder in folders:
        for name, runs in {"a core a run": cores, "all cores a run": 1}.items():
            systems[f"vecsvc {folder.resolve().name}, {name}"] = at_once(folder, runs, cores // runs)
    found = alternate({name: (lambda e=encode: e(texts)) for name, encode in systems.items()}, rounds, 1)
    times = {name: median(seconds) for name, seconds in found.items()}
    base = times[next(iter(systems))]
    rows = [
        {"system": name, "texts/s": count / seconds, f"of {next(iter(systems))}": base / seconds}
        for name, seconds in times.items()
    ]
    _show(f"Bulk: {count:,} paragraphs, {machine()['cores']} cores", rows)
    return rows


def at_once(folder: Path, runs: int, threads: int) -> Encode:
    """As a build does it: texts of like length go together, and so many runs at the same time."""
    encoder, pool = open_encoder(folder, num_threads=threads), ThreadPoolExecutor(runs)

    def encode(texts: list[str]) -> None:
        ordered = sorted(texts, key=len, reverse=True)
        calls = [ordered[start : start + CALL_TEXTS] for start in range(0, len(ordered), CALL_TEXTS)]
        list(pool.map(lambda part: encoder.encode(part, "passage"), calls))

    return encode


# ------------------------------------------------------------------------------------------------- the others


def torch_eager(model: Path, threads: int) -> Encode:
    """The framework without any optimisation: transformers' model in PyTorch, mean pooling, unit length."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    torch.set_num_threads(threads)
    tokenizer, network = AutoTokenizer.from_pretrained(model), AutoModel.from_pretrained(model).train(False)

    def encode(texts: list[str]) -> Any:
        with torch.no_grad():
            batch = tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
            hidden, mask = network(**batch).last_hidden_state, batch["attention_mask"][:, :, None]
            return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)

    return encode


def sentence_transformers_onnx(model: Path, threads: int) -> Encode:
    """sentence-transformers with its ONNX backend, exported by itself."""
    import onnxruntime
    from sentence_transformers import SentenceTransformer

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    encoder = SentenceTransformer(
        str(model), backend="onnx", model_kwargs={"session_options": options, "provider": "CPUExecutionProvider"}
    )
    encoder.max_seq_length = 256
    return lambda texts: encoder.encode(texts, batch_size=32, show_progress_bar=False)


def plain_onnxruntime(folder: Path, threads: int) -> Encode:
    """onnxruntime's own defaults around our conversion: tokenise, run, pool."""
    import onnxruntime
    from tokenizers import Tokenizer

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    names = [port.name for port in session.get_inputs()]

    def encode(texts: list[str]) -> Any:
        [found] = tokenizer.encode_batch(texts)
        feeds = {"input_ids": found.ids, "attention_mask": found.attention_mask, "token_type_ids": found.type_ids}
        [hidden] = session.run(None, {name: np.array([feeds[name]], dtype=np.int64) for name in names})
        vectors = hidden.mean(axis=1)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    return encode


def _show(title: str, rows: list[dict[str, Any]]) -> None:
    table(title, list(rows[0]), [list(row.values()) for row in rows])


if __name__ == "__main__":
    main()
