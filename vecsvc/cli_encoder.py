"""The commands of `vecsvc encoder`: parse, call one function, print."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import click
import msgspec
from click.core import ParameterSource

from vecsvc.encoders import encoder_path

json_option: Final = click.option("--json", "as_json", is_flag=True, help="print JSON, for machines")


@click.group()
def encoder() -> None:
    """Bring an encoder of your own."""


@encoder.command("import")
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="the new folder")
@click.option(
    "--max-tokens",
    default=256,
    type=click.IntRange(1, 8192),
    help="texts are cut there, or where the source allows fewer",
)
@click.option("--layers", type=click.IntRange(1), help="only the first layers, of safetensors: faster, less exact")
@click.option("--dim", type=click.IntRange(1, 16_384), help="only the first values, of a Matryoshka model")
@click.option("--pooling", type=click.Choice(["mean", "cls", "max"]), help="of tokens; as the source says otherwise")
@click.option("--normalize/--no-normalize", default=None, help="unit length or not; as the source says otherwise")
@click.option("--query-prompt", help="put before every query, as in 'query: ' of E5")
@click.option("--passage-prompt", help="put before every text of a corpus, as in 'passage: ' of E5")
def encoder_import(
    source: Path, out: Path, query_prompt: str | None, passage_prompt: str | None, **settings: Any
) -> None:
    """Make an encoder folder of a Hugging Face folder: its ONNX model, or a BERT's safetensors converted."""
    from index_builders.encoder_import import ImportSettings, import_encoder

    prompts = {"query": query_prompt, "passage": passage_prompt}
    settings["prompts"] = {role: prompt for role, prompt in prompts.items() if prompt is not None}
    spec = import_encoder(source, out, ImportSettings(**settings))
    click.echo(
        f"{out}: dim {spec.dim}, {spec.pooling} pooling, {'unit length' if spec.normalize else 'not normalised'}, "
        f"at most {spec.max_tokens} tokens, fingerprint {spec.fingerprint[:16]}"
    )
    asked = click.get_current_context().get_parameter_source("max_tokens") is not ParameterSource.DEFAULT
    if asked and spec.max_tokens < settings["max_tokens"]:
        click.echo(
            f"{source} allows {spec.max_tokens} tokens, less than --max-tokens {settings['max_tokens']}", err=True
        )


@encoder.command("distill")
@click.option("--teacher", required=True, type=click.Path(path_type=Path), help="folder of the encoder to learn from")
@click.option("--texts", required=True, type=click.Path(path_type=Path), help="Parquet file of texts to learn with")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="the new folder")
@click.option("--text-column", default="text", help="column of the texts")
@click.option("--query-column", default="query", help="column of what would be asked for the text; may be missing")
@click.option(
    "--cache", type=click.Path(path_type=Path), help="folder that keeps the teacher's vectors for another try"
)
@click.option("--vocabulary", default=30_000, type=click.IntRange(100, 200_000), help="word pieces that it knows")
@click.option("--width", default=256, type=click.IntRange(8, 1024), help="numbers that it keeps of each, a byte each")
@click.option("--max-tokens", default=256, type=click.IntRange(1, 8192), help="texts are cut there")
@click.option("--table-rounds", default=8, type=click.IntRange(0, 1000), help="rounds over the texts, the table alone")
@click.option("--rounds", default=3, type=click.IntRange(0, 1000), help="rounds over the texts, the whole network")
@click.option("--seed", default=7, type=click.IntRange(0, 2**31 - 1), help="seed of everything random")
@json_option
def encoder_distill(
    teacher: Path,
    texts: Path,
    out: Path,
    text_column: str,
    query_column: str,
    cache: Path | None,
    vocabulary: int,
    width: int,
    max_tokens: int,
    table_rounds: int,
    rounds: int,
    seed: int,
    as_json: bool,
) -> None:
    """Teach a small and fast encoder what another one knows: a CNN-LSTM learns the teacher's vectors."""
    from index_builders.cnn_lstm_train import Training
    from index_builders.encoder_distill import Student, distill

    student = Student(
        vocabulary=vocabulary,
        width=width,
        max_tokens=max_tokens,
        training=Training(bag_epochs=table_rounds, epochs=rounds, seed=seed),
    )
    spec, measured = distill(
        teacher,
        texts,
        out,
        student,
        text_column=text_column,
        query_column=query_column,
        cache=cache,
        tell=lambda line: click.echo(line, err=True),
    )
    if as_json:
        click.echo(msgspec.json.encode(measured))
        return
    click.echo(
        f"{out}: dim {spec.dim}, {measured.size_bytes / 1e6:.1f} MB, at most {spec.max_tokens} tokens; "
        f"cosine to {measured.teacher} {measured.cosine:.3f} on {measured.held_out} rows that it did not learn from"
    )
    if measured.recall is not None:
        click.echo(f"recall@10 of their queries {measured.recall:.3f}, the teacher's {measured.teacher_recall:.3f}")


@encoder.command("optimize")
@click.argument("source", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="the new folder")
@click.option("--precision", default="int8", type=click.Choice(["int8", "fp16", "fp32"]), help="fp16 is for GPUs")
@click.option("--max-loss", default=0.005, type=click.FloatRange(0, 1), help="of recall@10 on the sample")
@click.option(
    "--min-cosine",
    default=0.99,
    type=click.FloatRange(0, 1),
    help="mean cosine to the original's vectors; no text below the lesser of this and .95",
)
@click.option("--texts", help="Parquet corpus of texts like yours to measure with; Python's docstrings otherwise")
@click.option("--text-column", default="text", help="its column")
@click.option("--device", default="cpu", help="where it is measured, and will run: cpu, cuda")
@click.option("--threads", "num_threads", default=0, type=click.IntRange(0, 1024), help="of a run; 0 for one a core")
@json_option
def encoder_optimize(
    source: Path, out: Path, texts: str | None, text_column: str, as_json: bool, **settings: Any
) -> None:
    """Make a faster copy of the encoder in DIR, and keep it only where it loses little. Exit code 1 otherwise."""
    from index_builders.encoder_optimize import OptimizeSettings, corpus_texts, optimize_encoder, table

    asked = OptimizeSettings(**settings)
    given = None if texts is None else corpus_texts(texts, text_column)
    done = optimize_encoder(
        encoder_path(str(source)), out, asked, texts=given, say=lambda line: click.echo(line, err=True)
    )
    if as_json:
        click.echo(msgspec.json.encode(done.figures))
        return
    for line in table(done.figures):
        click.echo(line)
    click.echo(f"{out}: fingerprint {done.spec.fingerprint[:16]}")


@encoder.command("info")
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@json_option
def encoder_info(directory: Path, as_json: bool) -> None:
    """Show what the encoder in DIR is, and what was measured of it."""
    from index_builders.encoder_info import describe, lines

    facts = describe(encoder_path(str(directory)))
    if as_json:
        click.echo(msgspec.json.encode(facts))
        return
    for line in lines(facts):
        click.echo(line)
