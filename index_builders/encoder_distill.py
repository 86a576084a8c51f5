"""Distils an encoder into a small and fast one: a CNN-LSTM learns the vectors that the teacher gives."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from index_builders.cnn_lstm_graph import write_cnn_lstm
from index_builders.cnn_lstm_train import Lesson, TokenLists, Training, import_torch, quantized, train
from index_builders.encoder_folder import new_encoder_folder, refuse_existing, write_json
from vecsvc.encoders.base import Encoder, EncoderSpec, unit_length
from vecsvc.encoders.folder import LENGTH, OWN, TOKENIZER, encoder_files
from vecsvc.encoders.onnx import open_encoder
from vecsvc.errors import CorpusError
from vecsvc.exact_search import ExactSearch
from vecsvc.storage import make_folder, open_array, write_array, write_file
from vecsvc.types import Vectors

PAD: Final = "[PAD]"
UNKNOWN: Final = "[UNK]"
CARD: Final = "README.md"
MIN_TEXTS: Final = 200
MAX_TEXTS: Final = 5_000_000
MAX_HELD_OUT: Final = 1000  # rows kept out of the training, to measure by
K: Final = 10  # of the recall that is measured
# Weight of a word that makes up the share p of all words: SIF / (SIF + p) (Arora et al. 2017, section 3).
SIF: Final = 1e-3
_ENCODED_AT_ONCE: Final = 4096
_TELL_EVERY_S: Final = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Student:
    """What the distilled encoder shall be."""

    vocabulary: int = 30_000  # tokens: more keep more words whole, at `width` bytes each
    width: int = 256  # numbers that a token has in the table: more tell more words apart
    max_tokens: int = 256  # texts are cut there
    training: Training = field(default_factory=Training)


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """How well the student stands in for its teacher, on rows that it did not learn from."""

    teacher: str
    texts: int  # learnt from, queries among them
    pairs: int  # of a query and its text, learnt from
    held_out: int
    cosine: float  # mean, between student's and teacher's vectors of what was held out
    cosine_min: float
    recall: float | None  # recall@K of a held-out query's own text among all texts; None without queries
    teacher_recall: float | None
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Rows:
    """Texts to learn from, and what a user would ask to find each; None where nobody said."""

    texts: list[str]
    queries: list[str | None]

    def take(self, positions: NDArray[np.int64]) -> Rows:
        return Rows([self.texts[i] for i in positions], [self.queries[i] for i in positions])

    def flat(self) -> tuple[list[str], NDArray[np.int64]]:
        """All texts, then all queries; and (p, 2) the positions among them of a query and its text."""
        asked = [i for i, query in enumerate(self.queries) if query is not None]
        pairs = np.array([(len(self.texts) + n, i) for n, i in enumerate(asked)], dtype=np.int64).reshape(-1, 2)
        return [*self.texts, *(query for query in self.queries if query is not None)], pairs


def distill(
    teacher_folder: Path,
    source: Path,
    out: Path,
    student: Student,
    *,
    text_column: str = "text",
    query_column: str = "query",
    cache: Path | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> tuple[EncoderSpec, Measured]:
    """Teach a CNN-LSTM the vectors that the encoder in `teacher_folder` gives to the texts of the Parquet file
    `source`, and write it to the new folder `out`, which appears whole or not at all.

    Where the file has queries, the student learns also to find the text of the same row. The teacher's vectors
    are kept in the folder `cache` where one is named, so that another try with the same texts starts at once.

    Raises ConfigError where `out` exists or there is no teacher, CorpusError that names the file and what is
    wrong with it, EncoderError, BackendMissing where torch, onnx or onnxruntime is not installed.
    """
    refuse_existing(out)
    import_torch()
    rows = read_rows(source, text_column, query_column)
    order = np.random.default_rng(student.training.seed).permutation(len(rows.texts))
    held = min(MAX_HELD_OUT, len(order) // 20)
    learnt, test = rows.take(order[held:]), rows.take(order[:held])
    teacher = open_encoder(teacher_folder)
    try:
        with new_encoder_folder(out) as staging:
            vectors = _learn(teacher, learnt, student, staging, cache, tell)
            spec, measured = _measure(teacher, learnt, test, vectors, staging, out.name)
            config = msgspec.json.decode((staging / OWN).read_bytes())
            config["measured"] = {"distill": msgspec.to_builtins(measured)}
            write_json(staging / OWN, config)
            write_file(staging / CARD, card(spec, measured, student).encode())
    finally:
        teacher.close()
    return spec, measured


def read_rows(source: Path, text_column: str, query_column: str) -> Rows:
    """The texts of a Parquet file, and their queries where it has such a column; rows without a text are left out.

    Raises CorpusError that names the file and what is missing.
    """
    try:
        file = pq.ParquetFile(source)
    except Exception as error:  # pyarrow raises OSErrors of its own and of the system
        raise CorpusError(f"{source}: is no readable Parquet file: {error}") from error
    with file:
        names = file.schema_arrow.names
        if text_column not in names:
            raise CorpusError(f"{source}: has no column {text_column!r}, only {', '.join(names)}")
        size = file.metadata.num_rows
        if not MIN_TEXTS <= size <= MAX_TEXTS:
            raise CorpusError(f"{source}: has {size} rows; an encoder is distilled from {MIN_TEXTS} to {MAX_TEXTS}")
        asked = query_column in names
        table = file.read(columns=[text_column, query_column] if asked else [text_column])
    texts = table[text_column].to_pylist()
    queries = table[query_column].to_pylist() if asked else [None] * len(texts)
    for name, values in ((text_column, texts), (query_column, queries)):
        wrong = next((value for value in values if value is not None and not isinstance(value, str)), None)
        if wrong is not None:
            raise CorpusError(f"{source}: column {name!r} holds {type(wrong).__name__}, expected texts")
    kept = [(text, query or None) for text, query in zip(texts, queries, strict=True) if text and text.strip()]
    if len(kept) < MIN_TEXTS:
        raise CorpusError(f"{source}: {len(kept)} rows have a text; an encoder is distilled from {MIN_TEXTS} or more")
    return Rows([text for text, _ in kept], [query for _, query in kept])


# -------------------------------------------------------------------------------------------------- learning


def _learn(
    teacher: Encoder, rows: Rows, student: Student, staging: Path, cache: Path | None, tell: Callable[[str], None]
) -> NDArray[np.float16]:
    """Write model and tokenizer into `staging`; returns the teacher's vectors of the rows' texts."""
    texts, pairs = rows.flat()
    tell(f"{len(rows.texts):,} texts, {len(pairs):,} of them with a query")
    tokenizer = train_tokenizer(texts, student.vocabulary)
    tokens = tokenize(tokenizer, texts, student.max_tokens)
    vectors = teach(teacher, texts, cache, tell)
    table, back = starting_table(teacher, tokenizer, tokens, student.width)
    lesson = Lesson(tokens=tokens, vectors=vectors, pairs=pairs, table=table, back=back)
    write_cnn_lstm(staging, quantized(train(lesson, student.training, tell)))
    write_file(staging / TOKENIZER, tokenizer.to_str().encode())
    write_json(staging / LENGTH, {"max_seq_length": student.max_tokens})
    return vectors[: len(rows.texts)]


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> Tokenizer:
    """A WordPiece tokenizer of the texts' own words, in lower case, without accents and special tokens."""
    tokenizer = Tokenizer(models.WordPiece(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=vocabulary, special_tokens=[PAD, UNKNOWN], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def tokenize(tokenizer: Tokenizer, texts: Sequence[str], max_tokens: int) -> TokenLists:
    """The texts' token ids, each cut at `max_tokens`; a text without any token has one, UNKNOWN."""
    parts: list[NDArray[np.int32]] = []
    unknown = [tokenizer.token_to_id(UNKNOWN)]
    for start in range(0, len(texts), _ENCODED_AT_ONCE):
        found = tokenizer.encode_batch_fast(texts[start : start + _ENCODED_AT_ONCE])
        parts += [np.array(one.ids[:max_tokens] or unknown, dtype=np.int32) for one in found]
    return TokenLists(np.concatenate(parts), np.cumsum([0, *map(len, parts)]))


def starting_table(teacher: Encoder, tokenizer: Tokenizer, tokens: TokenLists, width: int) -> tuple[Vectors, Vectors]:
    """Where the table starts, (vocabulary, width), and how a row leads back to the teacher's space, (width, dim).

    A token's row is the teacher's vector of the token alone in its principal components, long for rare words and
    short for frequent ones: a sum of such rows is a fair vector of a text before anything was learnt.
    """
    size = tokenizer.get_vocab_size()
    words = [str(tokenizer.id_to_token(i)).removeprefix("##") for i in range(size)]
    vectors = teacher.encode(words, "passage")
    counts = np.bincount(tokens.ids, minlength=size)
    weights = (SIF / (SIF + counts / max(1, counts.sum()))).astype(np.float32)[:, None]
    # What all words share says nothing about any of them.
    vectors = vectors - np.average(vectors, axis=0, weights=counts + 1).astype(np.float32)
    _, basis = np.linalg.eigh((vectors * weights).T @ vectors)
    basis = basis[:, ::-1][:, :width].astype(np.float32)
    return vectors @ basis * weights, np.ascontiguousarray(basis.T)


def teach(
    teacher: Encoder, texts: Sequence[str], cache: Path | None, tell: Callable[[str], None]
) -> NDArray[np.float16]:
    """The teacher's vectors (n, dim) of the texts, at unit length.

    They take the longest of all, so they are kept in the folder `cache`, under the hash of teacher and texts.
    """
    digest = hashlib.blake2b(teacher.spec.fingerprint.encode(), digest_size=16)
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    kept = cache / f"{digest.hexdigest()}.npy" if cache is not None else None
    shape = (len(texts), teacher.spec.dim)
    if kept is not None and kept.exists():
        return np.array(open_array(kept, np.float16, shape))
    vectors = np.empty(shape, dtype=np.float16)
    started = shown = time.perf_counter()
    # The longest first, so that what is said of the time to go errs on the safe side.
    order = np.argsort([-len(text) for text in texts], kind="stable")
    for start in range(0, len(texts), _ENCODED_AT_ONCE):
        rows = order[start : start + _ENCODED_AT_ONCE]
        vectors[rows] = unit_length(teacher.encode([texts[row] for row in rows], "passage"))
        now, done = time.perf_counter(), start + len(rows)
        if now - shown > _TELL_EVERY_S:
            shown, left = now, (now - started) / done * (len(texts) - done)
            tell(f"teacher: {done:,} of {len(texts):,} texts, at most {left:.0f} s to go")
    if kept is not None:
        make_folder(kept.parent)
        write_array(kept, vectors)
    return vectors


# -------------------------------------------------------------------------------------------------- measuring


def _measure(
    teacher: Encoder, learnt: Rows, test: Rows, taught: NDArray[np.float16], staging: Path, name: str
) -> tuple[EncoderSpec, Measured]:
    encoder = open_encoder(staging, name=name)
    try:
        texts, pairs = test.flat()
        expected, found = unit_length(teacher.encode(texts, "passage")), encoder.encode(texts, "passage")
        cosines = np.sum(expected * found, axis=1)
        recall = teacher_recall = None
        if len(pairs):
            # Held-out texts come first, so that the position of a query's own text is its number in the test.
            pool = encoder.encode(learnt.texts, "passage")
            recall = _recall(found, pairs, np.concatenate([found[: len(test.texts)], pool]))
            pool = taught.astype(np.float32)
            teacher_recall = _recall(expected, pairs, np.concatenate([expected[: len(test.texts)], pool]))
    finally:
        encoder.close()
    learnt_texts, learnt_pairs = learnt.flat()
    return encoder.spec, Measured(
        teacher=teacher.spec.name,
        texts=len(learnt_texts),
        pairs=len(learnt_pairs),
        held_out=len(test.texts),
        cosine=round(float(cosines.mean()), 4),
        cosine_min=round(float(cosines.min()), 4),
        recall=recall,
        teacher_recall=teacher_recall,
        size_bytes=sum(file.stat().st_size for file in encoder_files(staging)),
    )


def _recall(vectors: Vectors, pairs: NDArray[np.int64], pool: Vectors) -> float:
    """The share of queries whose own text is among the K nearest of the pool (n, dim)."""
    found = ExactSearch(pool, "ip").search(vectors[pairs[:, 0]], K).labels
    return round(float((found == pairs[:, 1:]).any(axis=1).mean()), 4)


def card(spec: EncoderSpec, measured: Measured, student: Student) -> str:
    """The model card: what it is, what it was made from, how good it is."""
    training = student.training
    recall = ""
    if measured.recall is not None:
        recall = (
            f"- recall@{K} of a held-out query's own text among all texts: {measured.recall:.3f}, "
            f"the teacher's {measured.teacher_recall:.3f}\n"
        )
    return f"""# {spec.name}

A text encoder: {student.vocabulary:,} word pieces in a table of int8 rows, a convolution over three of them, an LSTM in
each direction, means and maxima, one vector of {spec.dim} numbers at unit length. Texts are cut at {spec.max_tokens}
tokens.

Distilled from `{measured.teacher}` with `vecsvc encoder distill`, on {measured.texts:,} texts, among them
{measured.pairs:,} pairs of a query and its text; {training.bag_epochs} rounds over the table alone, {training.epochs}
over all, seed {training.seed}.

Measured on {measured.held_out:,} rows that it did not learn from:

- cosine to the teacher's vectors: mean {measured.cosine:.3f}, least {measured.cosine_min:.3f}
{recall}- {measured.size_bytes / 1e6:.1f} MB
"""
