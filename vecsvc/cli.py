"""The command line: parse, call one function, print. Libraries are imported by the command that needs them."""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NoReturn

import click
import msgspec

from vecsvc import __version__
from vecsvc.cli_encoder import encoder, json_option
from vecsvc.cli_keys import keys
from vecsvc.config import BuildSettings, RouteSettings, ServeSettings, field_types, read_settings, shard_numbers
from vecsvc.errors import ArtifactDamaged, ConfigError, UserError, VecsvcError
from vecsvc.storage import IndexFolder, index_folders, no_folder

FEW_QUESTIONS: Final = 100  # of fewer a measured recall may be luck
SETTINGS_FILE: Final = Path("vecsvc.toml")  # read where it lies in the working folder

_settings_option: Final = click.option(
    "--settings",
    type=click.Path(path_type=Path, dir_okay=False),
    help="settings file; ./vecsvc.toml where there is one",
)


def main() -> NoReturn:
    """Errors end in one line with the remedy: exit code 2 for the user's mistake, 1 for ours."""
    try:
        cli.main(standalone_mode=False)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.Abort:
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except VecsvcError as error:
        click.echo(f"vecsvc: {error}", err=True)
        sys.exit(2 if isinstance(error, UserError) else 1)
    except BrokenPipeError:
        # Whoever read us has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    sys.exit(0)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(__version__, prog_name="vecsvc")
def cli() -> None:
    """Approximate nearest-neighbour vector search: build an index of a Parquet corpus, then serve it."""


def _options(cls: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A flag for every setting of `cls`, with its meaning, bounds and default in --help."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        for field in reversed(dataclasses.fields(cls)):
            meta = field.metadata
            # The type is checked by config, with the words that it has for files and environment too.
            command = click.option(
                f"--{field.name.replace('_', '-')}",
                metavar=_metavar(cls, field.name, meta["choices"]),
                default=None,
                help=f"{meta['meaning']}  [default: {field.default if field.default != '' else 'none'}]",
            )(command)
        return command

    return decorate


def _metavar(cls: type, name: str, choices: tuple[str, ...]) -> str:
    return "|".join(choices) if choices else {int: "N", float: "X"}.get(field_types(cls).get(name, str), "TEXT")


def _read(cls: type, table: str, flags: dict[str, Any], settings: Path | None) -> Any:
    file = settings if settings is not None else SETTINGS_FILE if SETTINGS_FILE.exists() else None
    return read_settings(cls, table, flags, os.environ, file)


# ------------------------------------------------------------------------------------------------ building


@cli.command("build-index")
@click.argument("corpus")
@_options(BuildSettings)
@click.option("--param", "params", multiple=True, metavar="KEY=VALUE", help="build parameter of the kind; repeatable")
@click.option("--resume", is_flag=True, help="go on with an interrupted build of the same corpus and settings")
@click.option("--require-recall", is_flag=True, help="publish nothing that misses --recall, and end with exit code 1")
@_settings_option
@json_option
def build_index(
    corpus: str,
    params: tuple[str, ...],
    resume: bool,
    require_recall: bool,
    settings: Path | None,
    as_json: bool,
    **flags: Any,
) -> None:
    """Build an index of CORPUS and publish it.

    CORPUS is a Parquet file, a folder or a glob, local or s3://, with a column of ids and one of vectors or texts.
    """
    from index_builders.pipeline import build_index as build

    read = _read(BuildSettings, "build", flags, settings)
    _keep_kernels(read)
    if read.shard:
        _build_shard(corpus, read, params, resume, require_recall, as_json)
        return
    result = build(corpus, read, _pairs(params), resume=resume, require_recall=require_recall)
    if as_json:
        click.echo(msgspec.json.encode(result))
        return
    manifest = result.manifest
    for step in result.resumed:
        click.echo(f"resumed: {step} was done before")
    spent = ", ".join(f"{name} {phase.wall_s:.1f} s" for name, phase in manifest.provenance.phases.items())
    _print_built(manifest, spent)
    click.echo(f"published {result.path}")
    click.echo(f"serve it: vecsvc serve {Path(result.path).parent}")


def _build_shard(
    corpus: str, read: BuildSettings, params: tuple[str, ...], resume: bool, require_recall: bool, as_json: bool
) -> None:
    from index_builders.shard_build import build_shard

    if require_recall:
        raise ConfigError("--require-recall is asked of the whole index: give it to vecsvc publish")
    result = build_shard(corpus, read, _pairs(params), resume=resume)
    if as_json:
        click.echo(msgspec.json.encode(result))
        return
    part = result.part
    for step in result.resumed:
        click.echo(f"resumed: {step} was done before")
    click.echo(f"shard {part.number} of {part.shards}, {part.shard.size:,} of {part.corpus.rows:,} rows: {result.path}")
    click.echo(f"when all {part.shards} are built: vecsvc publish {Path(result.path).parent} --version {part.version}")


def _print_built(manifest: Any, spent: str) -> None:
    certificate = manifest.certificate
    click.echo(
        f"{manifest.spec.size:,} x {manifest.spec.dim} {manifest.metric}, {_kind(manifest)}, "
        f"{len(manifest.shards)} shard{'s' if len(manifest.shards) > 1 else ''}: {spent}"
    )
    if certificate is None:
        why = "one row is all there is to find" if manifest.spec.size == 1 else "--certificate-queries is 0"
        click.echo(f"recall was not measured: {why}")
        return
    chosen = next(point for point in certificate.points if point.params == manifest.search)
    click.echo(
        f"recall@{certificate.k} {chosen.recall:.4f} ± {chosen.recall_error:.4f} at "
        f"{_settings_text(chosen.params)}, {chosen.latency_ms:.2f} ms a query ({certificate.queries} "
        f"{_questions_text(certificate.method)})"
    )
    if certificate.queries < FEW_QUESTIONS:
        click.echo(f"so few questions say little of others: give {FEW_QUESTIONS} or more", err=True)
    if not certificate.reached:
        click.echo(
            f"the target of {certificate.target} was not reached: try --param values that buy recall, or --kind exact",
            err=True,
        )


@cli.command()
@click.argument("place", metavar="DIR|STORE")
@click.option("--version", required=True, help="the version whose shards were built by build-index --shard")
@click.option("--name", default="", help="which index, where DIR holds parts of several")
@click.option("--require-recall", is_flag=True, help="publish nothing that misses its target, and end with exit code 1")
@json_option
def publish(place: str, version: str, name: str, require_recall: bool, as_json: bool) -> None:
    """Make a version of the shards that were built one by one, and serve it.

    DIR is the --out folder of the builds or the index in it. STORE, s3://bucket/prefix or a folder, is where `push
    --shard` brought the shards.
    """
    from index_builders.publish import publish_at

    path, manifest = publish_at(place, version, name=name, require_recall=require_recall)
    if as_json:
        click.echo(msgspec.json.encode({"path": path, "manifest": manifest}))
        return
    spent = ", ".join(f"{name} {phase.wall_s:.1f} s" for name, phase in manifest.provenance.phases.items())
    _print_built(manifest, f"the slowest shard took {spent}")
    click.echo(f"published {path}")


def _keep_kernels(settings: BuildSettings | ServeSettings) -> None:
    """Where compiled kernels are kept, and that it is said when one has to be compiled."""
    from vecsvc import machine_code

    machine_code.keep_in(Path(settings.kernels) if settings.kernels else None)
    machine_code.announce = lambda line: click.echo(line, err=True)


def _pairs(params: tuple[str, ...]) -> dict[str, str]:
    found: dict[str, str] = {}
    for pair in params:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ConfigError(f"--param takes KEY=VALUE, got {pair!r}")
        found[key] = value
    return found


def _kind(manifest: Any) -> str:
    params = ", ".join(f"{key}={value}" for key, value in manifest.spec.params.items())
    return f"{manifest.spec.kind} ({params})" if params else str(manifest.spec.kind)


def _questions_text(method: str) -> str:
    """What recall was measured with, in a few words; the manifest says it in full."""
    source = method.removeprefix("each shard by itself: ").partition(";")[0]
    if source.startswith("questions of "):
        return source
    return "moved rows of the corpus" if "each moved by" in source else "rows of the corpus"


def _settings_text(params: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in params.items()) or "every vector compared"


# ------------------------------------------------------------------------------------------------- serving


@cli.command()
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@_options(ServeSettings)
@_settings_option
def serve(directory: Path, settings: Path | None, **flags: Any) -> None:
    """Serve the indexes in DIR over HTTP until SIGTERM."""
    read = _read(ServeSettings, "serve", flags, settings)
    if not directory.is_dir():
        raise ConfigError(
            no_folder(directory, "the --out folder of vecsvc build-index, or make it where a version is still to come")
        )
    shard_numbers(read.shards)  # what is no list of numbers now never will be
    if read.encoder or read.encoder_provider or read.encoder_memory_mb:
        from vecsvc.encoder_pool import check_encoder

        check_encoder(read)
    if read.workers > 1:
        from vecsvc.workers import serve as run
    else:
        from vecsvc.process import serve as run
    run(directory, read)


@cli.command()
@_options(RouteSettings)
@_settings_option
def route(settings: Path | None, **flags: Any) -> None:
    """Be the front door of nodes that `vecsvc serve --shard-port` answers on: the same REST, over all shards."""
    from vecsvc.route import route as run

    read = _read(RouteSettings, "route", flags, settings)
    if not read.config:
        raise ConfigError('--config is missing: a TOML file with nodes = ["host:port"] or dns = ["name:port"]')
    run(read)


@cli.command()
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("text", required=False)
@click.option("-k", default=10, help="how many rows")
@click.option("--id", "row_id", help="search what is near this row instead of a text")
@click.option("--vector", help="search this vector instead: numbers separated by commas")
@click.option("--filter", "condition", metavar="JSON", help="""only rows that meet it: '{"year": {"$gte": 2020}}'""")
@click.option("--param", "params", multiple=True, metavar="KEY=VALUE", help="search setting of the kind; repeatable")
@click.option("--index", help="which index, where DIR holds several")
@click.option("--encoder", help="folder of the encoder, where the index holds none")
@json_option
def search(
    directory: Path,
    text: str | None,
    k: int,
    row_id: str | None,
    vector: str | None,
    condition: str | None,
    params: tuple[str, ...],
    index: str | None,
    encoder: str | None,
    as_json: bool,
) -> None:
    """Ask the index in DIR one question, without a server."""
    from vecsvc.local import ask
    from vecsvc.tokenizer import check_text

    if text is not None:
        check_text(text, "TEXT")
    _keep_kernels(_read(ServeSettings, "serve", {}, None))
    question = {
        "text": text,
        "id": row_id,
        "vector": None if vector is None else _numbers(vector),
        "k": k,
        "filter": None if condition is None else _json(condition),
        "params": {name: _plain(value) for name, value in _pairs(params).items()} or None,
    }
    given = {name: value for name, value in question.items() if value is not None}
    answer = ask(directory, given, index=index, encoder=encoder)
    if as_json:
        click.echo(msgspec.json.encode(answer, enc_hook=str))
        return
    for rank, hit in enumerate(answer.results, 1):
        fields = "  ".join(f"{_shown(name)}={_value(value)}" for name, value in (hit.fields or {}).items())
        click.echo(f"{rank:>3}  {hit.score:8.4f}  {_shown(str(hit.id))}  {fields}".rstrip())
    stats = answer.stats
    for word in answer.coverage.degraded:
        click.echo(word, err=True)
    click.echo(f"{len(answer.results)} hits in {answer.took_ms.total:.2f} ms ({stats.strategy})", err=True)


def _value(value: Any) -> str:
    """A stored field's value: a text in quotes, the rest as in JSON."""
    if isinstance(value, str):
        return _shown(repr(value[:70]))
    return _shown(msgspec.json.encode(value, enc_hook=str).decode()[:70])


def _shown(text: str) -> str:
    """Other people's text on a terminal: what is no character to read is spelled out."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _numbers(text: str) -> list[float]:
    try:
        values = [float(value) for value in text.strip().removeprefix("[").removesuffix("]").split(",")]
    except ValueError as error:
        raise ConfigError(f"--vector takes numbers separated by commas: {error}") from error
    if not all(map(math.isfinite, values)):
        raise ConfigError(f"--vector takes finite numbers, got {text[:80]!r}")
    return values


def _json(text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ConfigError(f"--filter takes JSON: {error}") from error


def _plain(text: str) -> Any:
    """The value of a search setting; what is none stays a text, and is refused with its name."""
    if text in ("true", "false"):
        return text == "true"
    return int(text) if text.removeprefix("-").isdecimal() and len(text) < 20 else text


# ------------------------------------------------------------------------------------------------ versions


@cli.command()
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "--versions",
    is_flag=True,
    help="list the versions instead: when they were made, which serves, whether files have another size than written; "
    "a list of damaged ones is a list, exit code 0: vecsvc verify tells by its exit code",
)
@json_option
def inspect(directory: Path, versions: bool, as_json: bool) -> None:
    """Show what the indexes in DIR are: kind, size, parameters, certificate, provenance."""
    from vecsvc.manifest import read_manifest

    shown: dict[str, Any] = {}
    for folder in index_folders(directory):
        if versions:
            shown[folder.name] = [_version(folder, name) for name in folder.versions()]
            continue
        current = folder.current()
        if current is None:
            click.echo(f"{folder.name}: {folder.nothing_serves()}", err=True)
        else:
            shown[folder.name] = msgspec.to_builtins(read_manifest(folder.version(current)))
    if as_json:
        click.echo(msgspec.json.encode(shown))
        return
    for name, facts in shown.items():
        if versions:
            for version in facts:
                damage = f"  {version['damage']}" if version["damage"] else ""
                mark = "  <- serves" if version["serves"] else ""
                click.echo(f"{name}  {version['version']}  {version['created'] or 'no date'}{mark}{damage}")
        else:
            _print_manifest(name, facts)


def _version(folder: IndexFolder, name: str) -> dict[str, Any]:
    """What a list of versions says of one: `damage` is what the manifest and the sizes of its files show."""
    from vecsvc.manifest import check_sizes_here, read_manifest

    created, damage = None, None
    try:
        serves = folder.current() == name
    except ArtifactDamaged:
        serves = False  # a rollback mends it, and this list is where to find the version to roll back to
    try:
        manifest = read_manifest(folder.path / name)
        created = manifest.created  # also said where files are damaged
        check_sizes_here(folder.path / name, manifest)
    except VecsvcError as error:
        damage = str(error)
    return {"version": name, "created": created, "serves": serves, "damage": damage}


def _print_manifest(name: str, facts: dict[str, Any]) -> None:
    spec, corpus, certificate = facts["spec"], facts["corpus"], facts["certificate"]
    files = [file for shard in facts["shards"] for file in shard["files"]]
    files += facts["encoder"]["files"] if facts["encoder"] else []
    size, each = sum(file["size_bytes"] for file in files), facts["bytes_per_vector"]
    vectors, params = f"{spec['size']:,} x {spec['dim']} {facts['vector_dtype']}", spec["params"] or ""
    encoder = facts["encoder"]
    rows = {
        "version": f"{facts['version']}, created {facts['created']}",
        "index": f"{vectors}, {spec['metric']}, {spec['kind']} {params}",
        "shards": f"{len(facts['shards'])}, {len(files)} files, {size / 1e6:.1f} MB",
        "a vector": f"{each['index']:g} bytes of index, {each['vectors']:g} of vectors, {each['rest']:g} of the rest",
        "ids": facts["id_type"],
        "fields": ", ".join(f"{field}: {kind}" for field, kind in facts["fields"].items()) or "none",
        "encoder": f"{encoder['name']} ({encoder['fingerprint'][:16]})" if encoder else "none",
        "corpus": f"{corpus['path']}, {corpus['rows']:,} rows, sha256 {corpus['sha256'][:16]}",
        "search": _settings_text(facts["search"]),
    }
    click.echo(name)
    for key, value in rows.items():
        click.echo(f"  {key:<10}{value}".rstrip())
    if certificate:
        measured = f"{certificate['queries']} {_questions_text(certificate['method'])}"
        click.echo(f"  recall@{certificate['k']} of {measured}, target {certificate['target']}:")
        for point in certificate["points"]:
            mark = "  <- default" if point["params"] == facts["search"] else ""
            click.echo(
                f"    {_settings_text(point['params']):<24} recall {point['recall']:.4f} ± {point['recall_error']:.4f}"
                f"  {point['latency_ms']:.3f} ms{mark}"
            )
    if facts["clusters"]:
        share = facts["clusters"]["copies"] / spec["size"]
        click.echo(f"  clusters, {share:.1%} of the rows in two shards; recall with so many probe_shards:")
        for point in facts["clusters"]["probes"]:
            click.echo(f"    {point['shards']:<24} recall {point['recall']:.4f} ± {point['recall_error']:.4f}")


@cli.command()
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--version", help="one version; every one otherwise")
def verify(directory: Path, version: str | None) -> None:
    """Compare every file of the indexes in DIR with its manifest. Exit code 1 where one differs.

    Of a version that was pulled in part, the shards that are here.
    """
    from vecsvc.manifest import check_files, read_manifest, shards_here

    bad = 0
    for folder in index_folders(directory):
        for name in [version] if version else folder.versions():
            path = folder.version(name)
            try:
                manifest = read_manifest(path)
                here = shards_here(path, manifest)
                files = manifest.files_of(here)
                check_files(path, files)
            except VecsvcError as error:
                bad += 1
                click.echo(f"{folder.name} {name}: {error}", err=True)
            else:
                away = sorted({*range(len(manifest.shards))} - {*here})
                note = f"; not here: shards {', '.join(map(str, away))}" if away else ""
                click.echo(f"{folder.name} {name}: {len(files)} files and the manifest are what was written{note}")
    sys.exit(1 if bad else 0)


@cli.command()
@click.argument("directory", metavar="DIR")
@click.option("--to", help="the version to serve; otherwise what served before, less what was rolled back")
def rollback(directory: str, to: str | None) -> None:
    """Serve an earlier version of the index in DIR, a folder or, with --to, s3://bucket/prefix/NAME.

    Where its manifest or the size of a file shows that it is damaged, nothing is changed and the exit code is 1; vecsvc
    verify reads the files whole.
    """
    from vecsvc.manifest import check_whole

    if "://" in directory:
        from vecsvc.push import rollback as in_store

        before, after = in_store(directory, to)
    else:
        before, after = _one(Path(directory)).rollback(to, check_whole)
    if before == after:
        click.echo(f"{after} serves already")
    else:
        click.echo(f"{before} -> {after}; running services follow on their own")


@cli.command()
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--keep", default=1, type=click.IntRange(0), help="versions to keep besides the one that serves")
@click.option("--refused", is_flag=True, help="builds that were refused for their recall, too")
def gc(directory: Path, keep: int, refused: bool) -> None:
    """Delete old versions of the indexes in DIR, and what dead builds left. Never what serves.

    Of the others stays first what a rollback goes to, then what served last, then what never did, the newest of it.
    A build that was refused for its recall stays for a week: --resume without --require-recall publishes it.
    """
    for folder in index_folders(directory, begun=True):
        gone = folder.gc(keep, refused=refused)
        click.echo(f"{folder.name}: deleted {', '.join(gone) if gone else 'nothing'}")
        held = folder.surplus(keep)
        if held:
            click.echo(f"{folder.name}: left {', '.join(held)}, which a process holds")
        for left in folder.refused():
            click.echo(
                f"{folder.name}: left {left}, refused for its recall: build-index --resume without --require-recall "
                "publishes it, gc --refused deletes it"
            )


def _one(directory: Path) -> IndexFolder:
    folders = index_folders(directory)
    if len(folders) > 1:
        raise ConfigError(f"{directory} holds several indexes, name one: {', '.join(str(f.path) for f in folders)}")
    return folders[0]


# ----------------------------------------------------------------------------------------------- object stores


@cli.command()
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("target", metavar="STORE")
@click.option("--version", default="", help="the version to push; the one that serves otherwise")
@click.option("--shard", type=click.IntRange(0), help="only this shard, built by build-index --shard; needs --version")
@click.option(
    "--again",
    is_flag=True,
    help="send every file, also where one of its size is there: mends a version that is there, and lets none serve",
)
@json_option
def push(directory: Path, target: str, version: str, shard: int | None, again: bool, as_json: bool) -> None:
    """Copy an index in DIR into STORE, s3://bucket/prefix or a folder, and let it serve there.

    In STORE it lies as in DIR, under its name. With --shard nothing serves before vecsvc publish STORE.
    """
    from vecsvc import push as pushing

    if shard is not None and not version:
        raise ConfigError("--shard needs --version: it is what the shards of one index have in common")
    if shard is None:
        moved = pushing.push(directory, target, version=version, again=again)
    else:
        moved = pushing.push_part(directory, target, version, shard, again=again)
    click.echo(msgspec.json.encode(moved) if as_json else moved.told())


@cli.command()
@click.argument("source", metavar="STORE")
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--shards", default="", metavar="0,2-3", help="only these shards; all otherwise")
@click.option("--watch", type=click.FloatRange(min=0.1), metavar="SECONDS", help="pull new versions too, until SIGTERM")
@click.option("--keep", type=click.IntRange(0), help="with --watch: versions to keep besides what serves  [default: 1]")
@click.option("--again", is_flag=True, help="compare every file that is here by its sha256: mends a damaged copy")
@json_option
def pull(
    source: str, directory: Path, shards: str, watch: float | None, keep: int | None, again: bool, as_json: bool
) -> None:
    """Bring the indexes in STORE into the folder DIR, checked, and let them serve there.

    STORE is s3://bucket/prefix or a folder that holds indexes, or one index in it.
    """
    from vecsvc import pull as pulling

    numbers = shard_numbers(shards)
    if watch is None:
        if keep is not None:
            raise ConfigError("--keep is for --watch: vecsvc gc DIR deletes old versions")
        moved = pulling.pull(source, directory, shards=numbers, again=again)
        click.echo(msgspec.json.encode(moved) if as_json else "\n".join(one.told() for one in moved))
        return
    import signal
    import threading

    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    if again:
        raise ConfigError("--again is for one pull, without --watch")

    def warn(text: str) -> None:
        click.echo(text, err=True)

    keep = 1 if keep is None else keep
    pulling.watch(source, directory, shards=numbers, every_s=watch, keep=keep, stop=stop, say=click.echo, warn=warn)


# ----------------------------------------------------------------------------------------------- the others


@cli.command()
@json_option
def doctor(as_json: bool) -> None:
    """Say what this installation can do, and what is wrong with it. Exit code 1 where something is."""
    from vecsvc.doctor import examine

    _keep_kernels(_read(ServeSettings, "serve", {}, None))
    report = examine()
    if as_json:
        click.echo(msgspec.json.encode(report))
    else:
        for line in report.lines():
            click.echo(line)
    sys.exit(1 if report.problems else 0)


cli.add_command(encoder)
cli.add_command(keys)
