"""Every knob says its default, meaning and bounds where it is declared, and is read once into frozen values.

The same words serve on the command line (`--max-k 100`), in the environment (`VECSVC_MAX_K=100`), and in
`vecsvc.toml` (`[serve]`, `[route]` and `[build]` tables); what stands earlier in that list wins.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar, get_args, get_type_hints

from vecsvc.errors import ConfigError, InvalidParameter, UnknownParameter, VecsvcError
from vecsvc.types import MAX_SHARDS

T = TypeVar("T")
ENV_PREFIX: Final = "VECSVC_"


def option(
    default: Any,
    meaning: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
) -> Any:
    """A dataclass field that carries its meaning and bounds (both inclusive) for checks, --help and OpenAPI."""
    return dataclasses.field(
        default=default, metadata={"meaning": meaning, "low": low, "high": high, "choices": choices}
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpSettings:
    """What `vecsvc serve` and `vecsvc route` have in common: ports, limits of questions and connections, the log."""

    host: str = option("127.0.0.1", "address that /search listens on")
    port: int = option(8080, "port of /search; 0 lets the system choose", low=0, high=65_535)
    admin_host: str = option("127.0.0.1", "address that the admin port listens on")
    admin_port: int = option(
        8081,
        "port of /metrics and probes, in `serve` of reload and rollback too; 0 for any",
        low=0,
        high=65_535,
    )
    max_in_flight: int = option(
        64, "questions that are at work or wait for it; one more is refused with 429", low=1, high=100_000
    )
    max_bulk_in_flight: int = option(
        16, "the same for requests of more than 8 queries or texts, which have threads of their own", low=1, high=10_000
    )
    keys: str = option("", "file of the API keys, see `vecsvc keys`; empty for none, and everybody may ask")
    tls_cert: str = option("", "PEM file of the certificate chain of both HTTP ports; empty for no TLS")
    tls_key: str = option("", "PEM file of its private key; empty where tls_cert holds it too")
    tls_client_ca: str = option(
        "", "PEM file of the authorities whose clients may use the public port; empty for clients without certificate"
    )
    shard_tls_cert: str = option(
        "", "PEM file of the certificate chain between front doors and nodes, where both sides show one; empty for none"
    )
    shard_tls_key: str = option("", "PEM file of its private key; empty where shard_tls_cert holds it too")
    shard_tls_ca: str = option("", "PEM file of the authorities that signed the certificates of front doors and nodes")
    max_connections: int = option(1024, "open connections; one more is closed", low=1, high=1_000_000)
    timeout_ms: float = option(2000.0, "deadline of a request that names none", low=1, high=600_000)
    max_timeout_ms: float = option(30_000.0, "longest deadline a request may name", low=1, high=600_000)
    header_timeout_s: float = option(5.0, "a connection that sent no whole request head by then is closed", low=0.1)
    body_timeout_s: float = option(10.0, "a body that has not arrived by then is answered with 408", low=0.1)
    write_timeout_s: float = option(20.0, "a client that takes longer to read its answer is cut off", low=0.1)
    keepalive_s: float = option(75.0, "idle connections are closed after that", low=1, high=86_400)
    drain_s: float = option(0.0, "how long /readyz is red before the port closes at shutdown", low=0, high=600)
    shutdown_s: float = option(30.0, "how long requests in flight may take to end at shutdown", low=0, high=3600)
    max_query_bytes: int = option(1 << 20, "largest body of one question", low=1024, high=1 << 30)
    max_body_bytes: int = option(16 << 20, "largest body of a batch", low=1024, high=1 << 30)
    max_buffered_bytes: int = option(
        256 << 20, "bodies that are being read, altogether; more is refused with 429", low=1024, high=1 << 40
    )
    max_k: int = option(1000, "largest k", low=1, high=100_000)
    max_depth: int = option(10_000, "largest rerank depth", low=1, high=1_000_000)
    max_batch: int = option(1024, "most queries in one batch", low=1, high=100_000)
    max_text_chars: int = option(
        1_000_000,
        "longest query text; what the encoder does not read of it is cut, and the answer says so",
        low=1,
        high=1 << 30,
    )
    max_embed_texts: int = option(2048, "most texts in one request for embeddings", low=1, high=100_000)
    max_embed_chars: int = option(
        1 << 20, "longest text to embed; what the encoder does not read of it is cut", low=1, high=1 << 30
    )
    embed_timeout_ms: float = option(30_000.0, "deadline of a request for embeddings", low=1, high=600_000)
    max_id_bytes: int = option(512, "longest id in UTF-8 bytes", low=1, high=65_536)
    max_filter_nodes: int = option(64, "most conditions in one filter", low=1, high=10_000)
    max_filter_values: int = option(1024, "most values of one $in", low=1, high=1_000_000)
    log: str = option("errors", "which requests are logged", choices=("none", "errors", "all"))
    log_lines_per_s: int = option(
        100, "lines a second about failed requests; further ones are counted in one line", low=1, high=1_000_000
    )
    kernels: str = option("", "folder that keeps compiled kernels; empty for ~/.cache/vecsvc/kernels")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeSettings(HttpSettings):
    """What `vecsvc serve` can be told."""

    workers: int = option(
        1,
        "processes that serve the port side by side; limits hold for each, and so do caches and encoders",
        low=1,
        high=256,
    )
    encoder: str = option("", "folder of the encoder for queries, or `default`; empty for the one inside the artifact")
    encoder_provider: str = option(
        "", "what encoders run on, by onnxruntime's name: cpu, cuda, openvino, ...; empty for `device`"
    )
    encoder_threads: int = option(
        0, "threads of one run of an encoder; 0 for what a short measurement finds to be best", low=0, high=1024
    )
    encoder_instances: int = option(
        0,
        "runs of an encoder at the same time, which share its weights; of several that are padded, bulk requests leave "
        "one free; 0 for what the measurement finds to be best, or 1 where encoder_threads is given or batching is "
        "cellular",
        low=0,
        high=64,
    )
    encoder_spinning: str = option(
        "auto",
        "whether the threads of a run spin while they wait for each other: faster where cores are idle, and slower for "
        "all where they are not; auto for what the measurement finds to be best, or off where encoder_threads is given",
        choices=("auto", "off", "on"),
    )
    encoder_memory_mb: int = option(
        0,
        "most memory that an encoder's runs, all together, may take beside its weights; a run that needs more fails; "
        "0 for no limit",
        low=0,
        high=1 << 20,
    )
    encoder_stall_s: float = option(
        10.0, "an encoder whose run takes longer is taken for wedged, and opened anew", low=0.1, high=3600
    )
    encoder_batching: str = option(
        "padded",
        "how waiting texts share runs of a CNN-LSTM: padded to texts of like length, or cellular, where they join and "
        "leave between steps; other encoders are always padded",
        choices=("padded", "cellular"),
    )
    encoder_cache: int = option(4096, "vectors of query texts that are remembered; 0 for none", low=0, high=10_000_000)
    bulk_run_ms: float = option(
        5.0,
        "longest run of an encoder that is planned: so long may a query wait for a bulk request",
        low=0.1,
        high=1e4,
    )
    max_waiting_tokens: int = option(
        1 << 20,
        "tokens that wait for an encoder, of queries and of bulk requests each; more is refused with 429",
        low=1024,
        high=1 << 30,
    )
    device: str = option("cpu", "where indexes and encoders that can run on a GPU run", choices=("cpu", "cuda"))
    memory: str = option(
        "auto",
        "where index files are held: read into memory (ram), or mapped, so that the system may drop what is not used "
        "and processes share what is; auto is ram for one worker, mapped for several; vectors are always mapped, and "
        "some kinds always read",
        choices=("auto", "ram", "mapped"),
    )
    verify: str = option(
        "hash", "how files are checked before they are loaded; sizes always are", choices=("hash", "size")
    )
    reload_poll_s: float = option(
        1.0, "how often CURRENT is looked at for another version; 0 for never", low=0, high=3600
    )
    search_threads: int = option(0, "threads that search; 0 for the cores divided by the workers", low=0, high=1024)
    inline_ms: float = option(
        0.5, "searches that were measured to take less run in the event loop, others in a thread", low=0, high=100
    )
    shards: str = option("", "shards to open, such as `0,2-3`; empty for all")
    shard_host: str = option("127.0.0.1", "address that front doors are answered on")
    shard_port: int | None = option(
        None, "port that front doors are answered on; 0 lets the system choose; none for none", low=0, high=65_535
    )
    previous_version_s: float = option(
        30.0,
        "how long the version before is kept for front doors after the last of them asked it; without a shard port it "
        "goes at once",
        low=0,
        high=86_400,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteSettings(HttpSettings):
    """What `vecsvc route` can be told."""

    config: str = option("", "TOML file that says where the nodes are: nodes = [...] and dns = [...]")
    discover_s: float = option(2.0, "how often the file and the names in it are looked at", low=0.05, high=3600)
    connect_timeout_s: float = option(1.0, "a node that has not said what it holds by then is tried later", low=0.01)
    ping_s: float = option(0.5, "how often a node is asked whether it is alive", low=0.01, high=60)
    ping_timeout_s: float = option(1.0, "a node that has not answered by then is cut off", low=0.01, high=60)
    hedge_share: float = option(
        0.05,
        "questions that may be asked a second time, because the first takes long or to time a slow replica; with 0 "
        "only what is silent for half of its time, by retry_share",
        low=0,
        high=1,
    )
    hedge_min_ms: float = option(1.0, "a question is never asked a second time before that", low=0, high=10_000)
    retry_share: float = option(
        0.1,
        "questions that may be asked again because a node failed, or is silent for half of their time",
        low=0,
        high=1,
    )
    eject_failures: int = option(5, "failures in a row after which a node is left alone for a while", low=1, high=1000)
    eject_s: float = option(1.0, "for how long; doubled each time, up to 30 s", low=0.01, high=30)
    flip_wait_s: float = option(
        10.0, "a new version waits so long for the last nodes once every shard can serve it", low=0, high=3600
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildSettings:
    """What `vecsvc build-index` can be told."""

    out: str = option("./indexes", "folder of the indexes")
    name: str = option("", "name of the index; empty for the corpus file's stem")
    kind: str = option("auto", "kind of index: auto, exact, nng, tp_tree, hnsw, kd_tree, faiss, or a plug-in's")
    metric: str = option("cosine", "what near means", choices=("l2", "ip", "cosine"))
    shards: int = option(1, "parts the corpus is split into", low=1, high=MAX_SHARDS)
    shard: str = option("", "build this one shard alone, i/N with i from 0; needs --version, and publish merges them")
    partition: str = option(
        "hash",
        "how rows are spread over shards: by a hash of the id, or by nearness (cluster), so that a question with "
        "probe_shards need not ask all",
        choices=("hash", "cluster"),
    )
    border_share: float = option(
        0.1,
        "with --partition cluster: the share of the rows that may live in two shards, those nearest to a border; "
        "more buys recall where few shards are asked",
        low=0.0,
        high=1.0,
    )
    version: str = option("", "name of the version; empty for the time")
    encoder: str = option(
        "",
        "folder of the encoder for the text column and for queries, or `default`; empty for the default encoder "
        "where the corpus has texts and no vectors, else for none",
    )
    id_column: str = option("", "column of the ids; empty for `id`")
    vector_column: str = option("", "column of the vectors; empty for `vector`, `emb` or `embedding`")
    text_column: str = option("", "column of the texts; empty for `text`, where there are no vectors")
    fields: str = option("", "columns to store beside the vectors, separated by commas; `*` for all others")
    recall: float = option(0.95, "recall@10 that the default search settings shall reach", low=0.01, high=1.0)
    questions: str = option(
        "",
        "Parquet file of questions to measure recall with, vectors (`vector`, `emb`, `embedding`) or texts (`query`, "
        "`text`); empty for rows of the corpus, moved to where no row is",
    )
    certificate_queries: int = option(
        256, "questions that recall is measured with, drawn at random; 0 for no certificate", low=0, high=100_000
    )
    threads: int = option(0, "threads; 0 for one a core", low=0, high=1024)
    kernels: str = option("", "folder that keeps compiled kernels; empty for ~/.cache/vecsvc/kernels")
    seed: int = option(7, "seed of everything random", low=0, high=2**31 - 1)
    batch_rows: int = option(8192, "rows read at a time", low=1, high=1_000_000)


def shard_numbers(text: str) -> frozenset[int] | None:
    """What `0,2-3` names; None for the empty text, which means all. Raises ConfigError."""
    if not text:
        return None
    numbers: set[int] = set()
    for part in text.split(","):
        named = re.fullmatch(r"(\d{1,3})(?:-(\d{1,3}))?", part.strip())
        first, last = (int(named[1]), int(named[2] or named[1])) if named else (1, 0)
        if not first <= last < MAX_SHARDS:
            raise ConfigError(
                f"--shards takes numbers and ranges like 0,2-3, up to {MAX_SHARDS - 1}; got {text[:80]!r}"
            )
        numbers.update(range(first, last + 1))
    return frozenset(numbers)


@functools.cache
def field_types(cls: type) -> dict[str, type]:
    """The plain type of each declared option: `int | None` counts as int."""
    hints = get_type_hints(cls)
    return {name: next((t for t in get_args(h) if t is not type(None)), h) for name, h in hints.items()}


def make(
    cls: type[T],
    values: Mapping[str, Any],
    *,
    what: str,
    error: type[VecsvcError] = InvalidParameter,
    places: Mapping[str, str] | None = None,
) -> T:
    """Build the frozen dataclass `cls` from `values`, each checked for name, type and bounds.

    Texts are converted, so that a flag and an environment variable need no care of their own. `places` says where
    values come from, by name. Raises UnknownParameter or `error`, naming the place, the value and what would be right.
    """
    known = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    checked: dict[str, Any] = {}
    for name, value in values.items():
        if name not in known:
            names = ", ".join(known) or "no parameters"
            raise UnknownParameter(f"unknown parameter {name[:80]!r}; {what} knows: {names}")
        if value is None and known[name].default is None:
            continue  # said to be absent, as it is anyway
        place = (places or {}).get(name, f"{what}: {name}")
        checked[name] = _check(place, value, field_types(cls)[name], known[name].metadata, error)  # type: ignore[arg-type]
    return cls(**checked)


def _check(place: str, value: Any, kind: type, meta: Mapping[str, Any], error: type[VecsvcError]) -> Any:
    original = value
    if isinstance(value, str) and kind is not str:
        value = _from_text(value, kind)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not kind:
        raise error(f"{place} must be {_article(kind)}, got {original!r}")
    low, high, choices = meta.get("low"), meta.get("high"), meta.get("choices")
    if isinstance(value, float) and not math.isfinite(value):
        raise error(f"{place} must be finite, got {original!r}")
    if (low is not None and value < low) or (high is not None and value > high):
        raise error(f"{place} must be {_bounds(low, high)}, got {original!r}")
    if choices and value not in choices:
        raise error(f"{place} must be one of {', '.join(choices)}, got {original!r}")
    return value


def _from_text(text: str, kind: type) -> Any:
    if kind is bool:
        return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}.get(text.lower(), text)
    try:
        return kind(text)
    except ValueError:
        return text


def _article(kind: type) -> str:
    return {int: "an integer", float: "a number", bool: "true or false", str: "a text"}.get(kind, kind.__name__)


def _bounds(low: float | None, high: float | None) -> str:
    if low is not None and high is not None:
        return f"between {low:g} and {high:g}"
    return f"at least {low:g}" if low is not None else f"at most {high:g}"


def read_settings(
    cls: type[T], table: str, flags: Mapping[str, Any], environ: Mapping[str, str], file: Path | None = None
) -> T:
    """Flags over environment over the file's table over defaults. Flags that are None were not given.

    Raises ConfigError; an unknown name in the file or an unknown VECSVC_ variable is an error too,
    because a misspelt limit that silently does nothing is worse than a refusal.
    """
    values: dict[str, Any] = {}
    places: dict[str, str] = {}
    names = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    if file is not None:
        values.update(_read_table(file, table, names))
        places.update((name, f"{file}: [{table}] {name}") for name in values)
    for variable, text in environ.items():
        if not variable.startswith(ENV_PREFIX):
            continue
        name = variable.removeprefix(ENV_PREFIX).lower()
        if name in names:
            values[name], places[name] = text, variable
        elif name not in _ALL_NAMES:
            raise ConfigError(f"environment variable {variable} names no setting; unset it or mend its name")
    for name, value in flags.items():
        if value is not None:
            values[name], places[name] = value, f"--{name.replace('_', '-')}"
    try:
        return make(cls, values, what=f"[{table}]", error=ConfigError, places=places)
    except UnknownParameter as error:
        raise ConfigError(str(error)) from error


def _read_table(file: Path, table: str, names: set[str]) -> dict[str, Any]:
    try:
        document = tomllib.loads(file.read_text("utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"no settings file {file}") from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{file}: {error}") from error
    for key in document:
        if key not in _TABLES:
            raise ConfigError(f"{file}: [{key}] is no table; known are {', '.join(f'[{t}]' for t in _TABLES)}")
    section = document.get(table, {})
    if not isinstance(section, dict):
        raise ConfigError(f"{file}: {table} must be a table: write [{table}]")
    for key in section:
        if key not in names:
            raise ConfigError(f"{file}: [{table}] has no setting {key!r}; it knows: {', '.join(sorted(names))}")
    return section


_TABLES: Final[dict[str, type]] = {"serve": ServeSettings, "route": RouteSettings, "build": BuildSettings}
_ALL_NAMES: Final = frozenset(f.name for cls in _TABLES.values() for f in dataclasses.fields(cls))
