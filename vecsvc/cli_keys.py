"""The commands of `vecsvc keys`: make, list and remove the keys of a file that `vecsvc serve --keys` reads."""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import click

from vecsvc.access import MAX_BURST, MAX_RATE_PER_S, MIN_RATE_PER_S, SCOPES, added, new_key, read_keys, removed
from vecsvc.errors import ConfigError, StorageError
from vecsvc.storage import Lease, foreign_errors, replace_file

TURN_WAIT_S: Final = 5.0  # for somebody else who changes the file

_file_option: Final = click.option(
    "--file", required=True, type=click.Path(path_type=Path, dir_okay=False), help="file of the keys"
)


@click.group()
def keys() -> None:
    """Say who may ask: API keys, of which only hashes are kept."""


@keys.command()
@click.argument("name")
@_file_option
@click.option("--scope", "scopes", multiple=True, type=click.Choice(SCOPES), help="repeatable  [default: read]")
@click.option("--rate", type=click.FloatRange(MIN_RATE_PER_S, MAX_RATE_PER_S), help="queries a second, on average")
@click.option("--burst", type=click.IntRange(1, MAX_BURST), help="queries at once; a second's worth otherwise")
@click.option("--expires", type=click.DateTime(["%Y-%m-%d"]), help="refused from that day on, UTC")
def new(
    name: str,
    file: Path,
    scopes: tuple[str, ...],
    rate: float | None,
    burst: int | None,
    expires: dt.datetime | None,
) -> None:
    """Make a key, print it once, and add its hash to FILE, which is made where it is missing."""
    key = new_key()
    until = expires.date() if expires is not None else None
    if until is not None and until <= dt.datetime.now(dt.UTC).date():
        raise ConfigError(
            f"--expires is {until.isoformat()}, so the key would be refused from the start; give a later day"
        )
    _change(
        file,
        lambda data: added(
            data, name, key, str(file), scopes=scopes or ("read",), rate_per_s=rate, burst=burst, expires=until
        ),
    )
    click.echo(key)
    click.echo(f"{name}: keep it now, it is shown nowhere else; services that read {file} take it at once", err=True)


@keys.command("list")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
def list_keys(file: Path) -> None:
    """Show the keys of FILE: what they may do, how much, and until when."""
    for key in read_keys(file):
        rate = f"{key.rate_per_s:g}/s, {key.burst} at once" if key.rate_per_s is not None else "no limit"
        until = f"until {key.expires.isoformat()}" if key.expires is not None else "for ever"
        gone = key.expires is not None and key.expires.timestamp() <= time.time()
        click.echo(f"{key.name}  {','.join(sorted(key.scopes))}  {rate}  {'expired' if gone else until}")


@keys.command()
@click.argument("name")
@_file_option
def remove(name: str, file: Path) -> None:
    """Take a key out of FILE: services refuse it within a second or two."""
    _change(file, lambda data: removed(data, name, str(file)))
    click.echo(f"{name} is removed")


def _change(file: Path, change: Callable[[bytes], bytes]) -> None:
    """Replace the file's content, one caller at a time, so that nobody's key is lost."""
    if not file.absolute().parent.is_dir():
        raise ConfigError(f"{file.absolute().parent} is no folder; make it first")
    end = time.monotonic() + TURN_WAIT_S
    while True:
        turn = Lease.take(file.absolute().parent, exclusive=True)
        if turn is not None:
            break
        if time.monotonic() >= end:
            raise StorageError(f"cannot write {file}: somebody else is changing it")
        time.sleep(0.05)
    try:
        with foreign_errors(file, "read", "nothing was changed"):
            before = file.read_bytes() if file.exists() else b""
        replace_file(file, change(before), private=True)
    finally:
        turn.release()
