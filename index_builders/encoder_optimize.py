"""Makes an encoder faster and smaller, measures what that cost, and keeps it only within the stated loss."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal, get_args

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from index_builders.corpus import TEXT_COLUMN
from index_builders.corpus_files import find_files, open_parquet
from index_builders.encoder_compare import (
    Comparison,
    Loss,
    Sample,
    Speed,
    library_texts,
    measure_speed,
    read_sample,
)
from index_builders.encoder_folder import check_encoder, copy_files, new_encoder_folder, refuse_existing, write_json
from index_builders.onnx_rewrite import (
    Recipe,
    fuse,
    is_quantised,
    load_model,
    smooth,
    write_float16,
    write_int8,
    write_model,
    write_watched,
)
from vecsvc.encoders.base import EncoderSpec
from vecsvc.encoders.folder import CONFIGS, MODELS, OWN, TOKENIZER, OwnConfig, encoder_files, read_settings
from vecsvc.encoders.onnx import OnnxEncoder, open_encoder
from vecsvc.errors import EncoderError, InvalidParameter, MissingColumn
from vecsvc.machine_code import best_path
from vecsvc.onnx_session import runtime_version
from vecsvc.storage import delete_file

Precision = Literal["int8", "fp16", "fp32"]

# Half a point of recall is what a search engine notices; vectors beyond these angles are another model's.
MAX_LOSS: Final = 0.005
MIN_COSINE_MEAN: Final = 0.99
MIN_COSINE: Final = 0.95
MAX_TEXTS_READ: Final = 20_000
WATCHED_TEXTS: Final = 128  # queries, and as many documents, that show how large activations get

# What is tried in turn; the first that keeps the loss stays.
_FULL: Final = (Recipe(name="8 bits"), Recipe(name="8 bits, smoothed", smooth=True))
_REDUCED: Final = Recipe(name="7 bits of 8, smoothed", reduce_range=True, smooth=True)
_MIDDLE: Final = Recipe(
    name="7 bits of 8, smoothed, narrowing matrices left", reduce_range=True, smooth=True, narrow=False
)
_BLOCKS: Final = Recipe(name="8 bits in blocks", blocks=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizeSettings:
    precision: Precision = "int8"
    max_loss: float = MAX_LOSS  # of recall@10, from 0 to 1: more lets coarser and faster recipes pass
    min_cosine: float = MIN_COSINE_MEAN  # mean cosine to the original's vectors: less lets coarser recipes pass
    device: str = "cpu"  # where it is measured, and will run
    num_threads: int = 0  # of each measured run; 0 is one a core
    seed: int = 7  # of the sample

    def __post_init__(self) -> None:
        if self.precision not in get_args(Precision):
            raise InvalidParameter(f"precision must be one of {', '.join(get_args(Precision))}, got {self.precision!r}")
        for name, value in (("max_loss", self.max_loss), ("min_cosine", self.min_cosine)):
            if not 0 <= value <= 1:
                raise InvalidParameter(f"{name} must be between 0 and 1, got {value}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimized:
    """What was kept, and the figures; encoder.json has them under measured.optimize."""

    spec: EncoderSpec
    figures: dict[str, Any]


def optimize_encoder(
    source: Path,
    out: Path,
    settings: OptimizeSettings | None = None,
    *,
    texts: Sequence[str] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Optimized:
    """Write a faster copy of the encoder in `source` to the new folder `out`, which appears whole or not at all.

    `texts` are like those that will be encoded; docstrings of Python's library without. `say` hears what was tried.

    Raises EncoderError, with the figures of everything that was tried, where nothing stays within the loss, and
    where the model is quantised already or cannot be rewritten; CorpusError where the texts are too few.
    """
    asked = settings if settings is not None else OptimizeSettings()
    refuse_existing(out)
    files = encoder_files(source)
    if read_settings(source).cells is not None:
        raise EncoderError(f"{source}: its parts share their weights with the whole, so it cannot be rewritten alone")
    if asked.precision == "int8" and is_quantised(load_model(files[0])):
        raise EncoderError(f"{files[0]}: is quantised already; give the original to optimize")
    sample = read_sample(library_texts() if texts is None else texts, asked.seed)
    original = open_encoder(source, device=asked.device, num_threads=asked.num_threads)
    try:
        with new_encoder_folder(out) as staging:
            kept = [f for f in files if f.relative_to(source).as_posix() in (TOKENIZER, *CONFIGS)]
            copy_files(kept, source, staging)
            dim = read_settings(source).dim
            write_json(staging / OWN, OwnConfig(dim=dim))
            comparison = Comparison(original, sample)
            recipe, loss = _first_within(files[0], staging, comparison, asked, say)
            changed = open_encoder(staging, device=asked.device, num_threads=asked.num_threads)
            try:
                before, after = measure_speed([original, changed], sample)
            finally:
                changed.close()
            figures = _figures(asked, recipe, loss, before, after, sample, texts is None)
            figures["original"] = original.spec.fingerprint
            sizes = [sum(f.stat().st_size for f in found) for found in (files, encoder_files(staging))]
            figures["size_bytes_before"], figures["size_bytes_after"] = sizes
            delete_file(staging / OWN)
            write_json(staging / OWN, OwnConfig(dim=dim, measured={"optimize": figures}))
            spec = check_encoder(staging, out.name, full=False)
    finally:
        original.close()
    return Optimized(spec=spec, figures=figures)


def corpus_texts(path: str, column: str = TEXT_COLUMN) -> list[str]:
    """The first 20,000 texts of a Parquet corpus. Raises MissingColumn, or CorpusUnreadable, by name."""
    filesystem, _, files = find_files(path)
    texts: list[str] = []
    for info in files:
        with open_parquet(filesystem, info.path) as file:
            if column not in file.schema_arrow.names:
                raise MissingColumn(
                    f"{info.path}: has no column {column!r}; its columns: {', '.join(file.schema_arrow.names)}"
                )
            kind = file.schema_arrow.field(column).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise MissingColumn(f"{info.path}: column {column!r} is {kind}, not text; name another")
            for batch in file.iter_batches(4096, columns=[column]):
                texts += [text for text in batch.column(0).to_pylist() if isinstance(text, str)]
                if len(texts) >= MAX_TEXTS_READ:
                    return texts[:MAX_TEXTS_READ]
    return texts


def table(figures: dict[str, Any]) -> list[str]:
    """The figures as lines for people."""
    f = figures
    rows = [
        ("recall@10", f"{f['recall_before']:.4f}", f"{f['recall_after']:.4f}"),
        ("one query, ms", f"{f['query_ms_before']:.2f}", f"{f['query_ms_after']:.2f}"),
        (f"{f['batch_texts']} texts, ms", f"{f['batch_ms_before']:.1f}", f"{f['batch_ms_after']:.1f}"),
        ("size, MB", f"{f['size_bytes_before'] / 1e6:.1f}", f"{f['size_bytes_after'] / 1e6:.1f}"),
    ]
    return [
        f"{'':<16}{'before':>10}{'after':>10}",
        *(f"{name:<16}{before:>10}{after:>10}" for name, before, after in rows),
        f"cosine to the original: mean {f['cosine_mean']:.4f}, least {f['cosine_min']:.4f}; "
        f"{100 * f['overlap']:.1f} % of the first 10 are the same",
        f"{f['precision']}, {f['recipe']}; measured with {f['texts']:,} texts of {f['texts_from']} on {f['machine']}",
    ]


def _recipes(precision: str) -> list[Recipe]:
    if precision != "int8":
        return [Recipe(name="fused")]
    # Where the processor has VNNI nothing saturates, and the eighth bit is free.
    return [*(_FULL if best_path().endswith("vnni") else ()), _REDUCED, _MIDDLE, _BLOCKS]


def _first_within(
    model: Path, staging: Path, comparison: Comparison, asked: OptimizeSettings, say: Callable[[str], None]
) -> tuple[Recipe, Loss]:
    """Write models to the staging folder until one keeps the loss. Raises EncoderError where none does."""
    tried = []
    greatest: dict[str, NDArray[np.float32]] | None = None  # the same for all recipes: they are fused alike
    for recipe in _recipes(asked.precision):
        target = staging / MODELS[0]
        delete_file(target)
        fused = fuse(
            load_model(model),
            attention=not recipe.blocks,
            skip=asked.precision == "fp16",
            tanh=asked.precision == "int8",
        )
        if asked.precision == "fp32":
            write_model(fused.model, target)
        elif asked.precision == "fp16":
            write_float16(fused, target)
        else:
            if recipe.smooth:
                if greatest is None:
                    greatest = _greatest(fused.model, staging, comparison.sample, asked)
                smooth(fused.model, greatest)
            write_int8(fused.model, recipe, target)
        changed: OnnxEncoder = open_encoder(staging, device=asked.device, num_threads=asked.num_threads)
        try:
            loss = comparison.loss(changed)
        finally:
            changed.close()
        line = (
            f"{asked.precision}, {recipe.name}: recall@10 {loss.recall_before:.4f} -> {loss.recall_after:.4f}, "
            f"cosine mean {loss.cosine_mean:.4f}, least {loss.cosine_min:.4f}"
        )
        say(line)
        within = loss.recall_loss <= asked.max_loss and loss.cosine_mean >= asked.min_cosine
        if within and loss.cosine_min >= min(MIN_COSINE, asked.min_cosine):
            return recipe, loss
        tried.append(line)
    raise EncoderError(
        f"nothing stays within a loss of {asked.max_loss} in recall@10 and a mean cosine of {asked.min_cosine} "
        f"(least {min(MIN_COSINE, asked.min_cosine)}), so nothing was written; tried: {'; '.join(tried)}; "
        "allow more with --max-loss or --min-cosine, or take a higher --precision"
    )


def _greatest(model: Any, staging: Path, sample: Sample, asked: OptimizeSettings) -> dict[str, NDArray[np.float32]]:
    """The greatest absolute value of each channel of what products multiply, over some texts of the sample.

    Each text runs alone, because padding is not to count.
    """
    target = staging / MODELS[0]
    names = write_watched(model, target)
    if not names:  # for which onnxruntime would give everything
        delete_file(target)
        return {}
    greatest: dict[str, NDArray[np.float32]] = {}
    watched = open_encoder(staging, device=asked.device, num_threads=asked.num_threads)
    try:
        step = max(1, len(sample.queries) // WATCHED_TEXTS)
        texts = watched.split(sample.queries[::step], "query") + watched.split(sample.documents[::step], "passage")
        for tokens in texts:
            for name, found in zip(names, watched.outputs([tokens], names), strict=True):
                channels = np.abs(found).reshape(-1, found.shape[-1]).max(axis=0)
                greatest[name] = np.maximum(greatest.get(name, channels), channels)
    finally:
        watched.close()
        delete_file(target)
    return greatest


def _figures(
    asked: OptimizeSettings,
    recipe: Recipe,
    loss: Loss,
    before: Speed,
    after: Speed,
    sample: Sample,
    from_library: bool,
) -> dict[str, Any]:
    return {
        "precision": asked.precision,
        "recipe": recipe.name,
        **{name: round(value, 5) for name, value in asdict(loss).items()},
        "query_ms_before": round(before.query_ms, 3),
        "query_ms_after": round(after.query_ms, 3),
        "batch_ms_before": round(before.batch_ms, 2),
        "batch_ms_after": round(after.batch_ms, 2),
        "batch_texts": before.batch_texts,
        "texts": len(sample.queries),
        "texts_from": "Python's docstrings" if from_library else "the given corpus",
        "max_loss": asked.max_loss,
        "min_cosine": asked.min_cosine,
        "device": asked.device,
        "num_threads": asked.num_threads,
        "machine": f"{platform.machine()} {best_path()}",
        "onnxruntime": runtime_version(),
    }
