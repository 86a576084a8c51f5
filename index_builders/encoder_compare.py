"""Says what a changed encoder lost against the original: angles between their vectors, recall, speed."""

from __future__ import annotations

import ast
import re
import statistics
import sysconfig
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from vecsvc.encoders.base import CANARY_TEXTS, Encoder
from vecsvc.errors import CorpusError
from vecsvc.types import Vectors

K: Final = 10
MIN_TEXTS: Final = 64  # below this a recall says nothing
MAX_TEXTS: Final = 1024  # a sample's recall is within about 0.3 points of the whole's then
MAX_TEXT_CHARS: Final = 4000
BATCH_TEXTS: Final = 32
ROUNDS: Final = 15  # runs of which the median is taken

_MIN_WORDS: Final = 8
_SENTENCE_END: Final = re.compile(r"(?<=[.!?])\s+|\n\s*\n")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Questions and the documents that answer them: texts cut in two, documents[i] is what queries[i] looks for."""

    queries: Sequence[str]
    documents: Sequence[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """What changed. A recall is the share of queries whose own document is among the first 10."""

    cosine_min: float
    cosine_mean: float
    recall_before: float
    recall_after: float
    overlap: float  # the share of the original's first 10 documents that are still among the first 10

    @property
    def recall_loss(self) -> float:
        return self.recall_before - self.recall_after


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    query_ms: float  # one short query
    batch_ms: float  # some documents of the sample
    batch_texts: int


def read_sample(texts: Sequence[str], seed: int = 7) -> Sample:
    """At most 1,024 of the texts, each cut behind its first sentence, or in the middle where it has but one.

    Raises CorpusError where fewer than 64 texts have the words for it.
    """
    whole = list(dict.fromkeys(text for text in texts if len(text.split()) >= _MIN_WORDS))
    if len(whole) < MIN_TEXTS:
        raise CorpusError(
            f"of {len(texts)} texts {len(whole)} are different and have {_MIN_WORDS} words; "
            f"at least {MIN_TEXTS} are needed to measure recall"
        )
    chosen = np.random.default_rng(seed).permutation(len(whole))[:MAX_TEXTS]
    pairs = [_cut(whole[at][:MAX_TEXT_CHARS]) for at in sorted(chosen)]
    return Sample(queries=[query for query, _ in pairs], documents=[document for _, document in pairs])


def library_texts() -> list[str]:
    """Docstrings of every second module of Python's own library: English that every machine has; none is imported."""
    found = []
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[::2]:  # more would be left out of a sample
        try:
            tree = ast.parse(file.read_bytes())
        except (OSError, SyntaxError, ValueError):
            continue  # some interpreters leave sources out, or keep broken ones for tests
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = ast.get_docstring(node)
                if text is not None:
                    found.append(text)
    return found


class Comparison:
    """Holds what the original makes of a sample, and compares others with it."""

    def __init__(self, original: Encoder, sample: Sample) -> None:
        self.sample = sample
        self._queries = original.encode(sample.queries, "query")
        self._documents = original.encode(sample.documents, "passage")
        self._first = _first(self._queries, self._documents)

    def loss(self, changed: Encoder) -> Loss:
        queries = changed.encode(self.sample.queries, "query")
        documents = changed.encode(self.sample.documents, "passage")
        first = _first(queries, documents)
        own = np.arange(len(queries))[:, None]
        cosines = np.concatenate([_cosines(queries, self._queries), _cosines(documents, self._documents)])
        shared = [len(np.intersect1d(a, b)) for a, b in zip(first, self._first, strict=True)]
        return Loss(
            cosine_min=float(cosines.min()),
            cosine_mean=float(cosines.mean()),
            recall_before=float((self._first == own).any(axis=1).mean()),
            recall_after=float((first == own).any(axis=1).mean()),
            overlap=float(np.mean(shared)) / first.shape[1],
        )


def measure_speed(
    encoders: Sequence[Encoder],
    sample: Sample,
    *,
    rounds: int = ROUNDS,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Speed]:
    """The medians of each encoder, measured in turns, so that what else the machine does falls on all alike."""
    query, batch = [CANARY_TEXTS[1]], list(sample.documents[:BATCH_TEXTS])
    taken: list[tuple[list[float], list[float]]] = [([], []) for _ in encoders]
    for number in range(rounds + 1):
        for encoder, times in zip(encoders, taken, strict=True):
            for texts, seconds in zip((query, batch), times, strict=True):
                start = clock()
                encoder.encode(texts)
                if number:  # the first round warms up
                    seconds.append(clock() - start)
    return [
        Speed(query_ms=1e3 * statistics.median(q), batch_ms=1e3 * statistics.median(b), batch_texts=len(batch))
        for q, b in taken
    ]


def _cut(text: str) -> tuple[str, str]:
    parts = _SENTENCE_END.split(text.strip(), maxsplit=1)
    if len(parts) == 2 and min(len(part.split()) for part in parts) >= 3:
        return parts[0], parts[1]
    words = text.split()
    return " ".join(words[: len(words) // 2]), " ".join(words[len(words) // 2 :])


def _first(queries: Vectors, documents: Vectors) -> np.ndarray[tuple[int, int], np.dtype[np.intp]]:
    """(n, k): the positions of the k documents with the largest cosine, in no order."""
    scores = _unit(queries) @ _unit(documents).T
    k = min(K, scores.shape[1])
    found: np.ndarray[tuple[int, int], np.dtype[np.intp]] = np.argpartition(-scores, k - 1, axis=1)[:, :k]
    return found


def _cosines(a: Vectors, b: Vectors) -> Vectors:
    cosines: Vectors = np.sum(_unit(a) * _unit(b), axis=1)
    return cosines


def _unit(vectors: Vectors) -> Vectors:
    unit: Vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.float32(1e-12))
    return unit
