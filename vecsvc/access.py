"""Who may call what: API keys with scopes, expiry and rates, from a file that is read anew when it changes.

    [keys.search-team]
    sha256 = "..."            # of the key, which stands nowhere
    scopes = ["read"]
    rate_per_s = 100          # optional; queries, on average
    burst = 200               # optional; queries at once
    expires = 2027-01-01      # optional; refused from then on, UTC

A key is 256 random bits, so a plain hash of it cannot be guessed back and needs neither salt nor stretching.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import hmac
import ipaddress
import logging
import math
import os
import re
import secrets
import stat
import time
import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, get_args

from vecsvc.errors import ConfigError, Forbidden, RateLimited, Unauthorized
from vecsvc.tls import FileWatch

log: Final = logging.getLogger("vecsvc.access")

# What a route asks of its caller: nothing, or a key with that scope. A key with `admin` may do everything.
Scope: TypeAlias = Literal["open", "read", "metrics", "admin"]
SCOPES: Final = tuple(scope for scope in get_args(Scope) if scope != "open")

KEY_HEADER: Final = "X-API-Key"  # or Authorization: Bearer
MAX_FILE_BYTES: Final = 1 << 18
MAX_KEYS: Final = 1000
MAX_KEY_CHARS: Final = 256  # longer ones are none of ours, and are not hashed
MIN_RATE_PER_S: Final = 0.01
MAX_RATE_PER_S: Final = 1e6
MAX_BURST: Final = 1_000_000

_PREFIX: Final = "vecsvc_"  # by which those who scan texts for secrets know what they found
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_FIELDS: Final = ("sha256", "scopes", "rate_per_s", "burst", "expires")


class Key:
    """One key of the file, and how much of its rate is left. Belongs to one event loop."""

    __slots__ = ("_at", "_left", "burst", "digest", "expires", "name", "rate_per_s", "scopes")

    def __init__(
        self,
        name: str,
        digest: bytes,
        scopes: frozenset[str],
        rate_per_s: float | None = None,
        burst: int | None = None,
        expires: dt.datetime | None = None,
    ) -> None:
        """Without `burst` a second's worth may come at once, and one query at least."""
        self.name, self.digest, self.scopes, self.expires = name, digest, scopes, expires
        self.rate_per_s = rate_per_s
        self.burst = burst if burst is not None else max(1, math.ceil(rate_per_s or 0))
        self._left, self._at = float(self.burst), -math.inf

    def check_scope(self, scope: Scope) -> None:
        if scope not in self.scopes and "admin" not in self.scopes:
            raise Forbidden(f"key {self.name!r} has scope {', '.join(sorted(self.scopes))}, this needs {scope}")

    def take(self, now: float) -> None:
        """Count one query at `now`, in seconds of a clock that only goes forward; RateLimited where none is left."""
        if self.rate_per_s is None:
            return
        self._left = min(float(self.burst), self._left + (now - self._at) * self.rate_per_s)
        self._at = now
        if self._left < 1.0:
            raise RateLimited(
                f"key {self.name!r} may ask {self.rate_per_s:g} queries a second, and {self.burst} at once",
                retry_after_s=(1.0 - self._left) / self.rate_per_s,
            )
        self._left -= 1.0

    def owe(self, queries: int) -> None:
        """Count what a request turned out to hold beyond its first query: later requests wait for it."""
        self._left -= queries

    def like(self, other: Key) -> bool:
        return (self.digest, self.rate_per_s, self.burst) == (other.digest, other.rate_per_s, other.burst)

    def go_on_from(self, before: Key) -> None:
        """Being read again is no fresh start."""
        self._left, self._at = before._left, before._at


class Keyring:
    """The keys of a file. A broken new file leaves those before in force, and the log says why."""

    def __init__(
        self, path: Path, clock: Callable[[], float] = time.monotonic, now: Callable[[], float] = time.time
    ) -> None:
        """Raises ConfigError where the file cannot be used; `now` is the time of day, for expiry."""
        self._path, self._clock, self._now = path, clock, now
        self._watch = FileWatch(path, clock=clock)
        self._keys = {key.digest: key for key in read_keys(path)}
        self._tell("keys")

    def admit(self, presented: str | None, scope: Scope) -> Key:
        """The key that somebody presents. Raises Unauthorized or Forbidden."""
        return self.admit_marked(mark_of(presented), scope)

    def admit_marked(self, mark: bytes | None, scope: Scope) -> Key:
        """The key with that digest, see `mark_of`."""
        if self._watch.changed():
            self._reread()
        if mark is None:
            raise Unauthorized("a key is needed: send Authorization: Bearer KEY, or X-API-Key: KEY")
        found = self._keys.get(mark)
        # How long the look-up takes tells of the hash at most, from which no key can be made.
        if found is None or not hmac.compare_digest(found.digest, mark):
            raise Unauthorized("the key is not known here")
        if found.expires is not None and self._now() >= found.expires.timestamp():
            raise Unauthorized(f"key {found.name!r} has expired at {found.expires.isoformat()}")
        found.check_scope(scope)
        return found

    def take(self, key: Key) -> None:
        """Count one query of a key; RateLimited where it has none left."""
        key.take(self._clock())

    def _reread(self) -> None:
        try:
            keys = {key.digest: key for key in read_keys(self._path)}
        except ConfigError as error:
            log.warning("keys not read", extra={"data": {"why": str(error), "in_force": len(self._keys)}})
            return
        for digest, key in keys.items():
            before = self._keys.get(digest)
            if before is not None and key.like(before):
                key.go_on_from(before)
        self._keys = keys
        self._tell("keys changed")

    def _tell(self, what: str) -> None:
        facts: dict[str, Any] = {"file": str(self._path), "keys": sorted(k.name for k in self._keys.values())}
        if self._keys:
            log.info(what, extra={"data": facts})
        else:
            facts["remedy"] = "nobody may ask: vecsvc keys new NAME --file FILE"
            log.warning(what, extra={"data": facts})


def mark_of(presented: str | None) -> bytes | None:
    """What is kept of a key that somebody presents: its digest, b"" of what is too long to be one; None of none."""
    if not presented:
        return None
    return digest_of(presented) if len(presented) <= MAX_KEY_CHARS else b""


def digest_of(key: str) -> bytes:
    # What is no valid text in a header came as surrogates, and is somebody's mistake or attack.
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def new_key() -> str:
    return _PREFIX + secrets.token_urlsafe(32)


def is_loopback(host: str) -> bool:
    """Whether a port on `host` is reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


# -------------------------------------------------------------------------------------------------- the file


def read_keys(path: Path) -> list[Key]:
    """The keys of a file. Raises ConfigError, naming the file and what would be right."""
    try:
        with path.open("rb") as file:
            facts = os.fstat(file.fileno())
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"keys: {path}: {error.strerror}; vecsvc keys new makes a file") from error
    # Hashes may be read without harm, though nobody needs to; who may write them can let himself in.
    if facts.st_mode & stat.S_IWOTH:
        raise ConfigError(f"keys: everybody may write {path}: chmod 600 {path}")
    if facts.st_mode & stat.S_IROTH:
        log.warning("everybody may read the keys' hashes", extra={"data": {"remedy": f"chmod 600 {path}"}})
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"keys: {path} has more than {MAX_FILE_BYTES} bytes")
    return parse_keys(data, str(path))


def parse_keys(data: bytes, source: str) -> list[Key]:
    """The keys that a file holds; `source` is what its errors call it."""
    try:
        document = tomllib.loads(data.decode("utf-8"))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"keys: {source}: {error}") from error
    tables = document.pop("keys", {})
    if document or not isinstance(tables, dict):
        raise ConfigError(f"keys: {source}: {next(iter(document), 'keys')!r} is unknown; write [keys.NAME]")
    if len(tables) > MAX_KEYS:
        raise ConfigError(f"keys: {source} has {len(tables)} keys, the limit is {MAX_KEYS}")
    keys = [_key(name, table, f"keys: {source}: [keys.{name[:64]}]") for name, table in tables.items()]
    seen: dict[bytes, str] = {}
    for key in keys:
        if key.digest in seen:
            raise ConfigError(f"keys: {source}: {seen[key.digest]} and {key.name} are the same key; remove one")
        seen[key.digest] = key.name
    return keys


def _key(name: str, table: Any, where: str) -> Key:
    _check_name(name, where)
    if not isinstance(table, dict):
        raise ConfigError(f"{where}: must be a table")
    for field in table:
        if field not in _FIELDS:
            raise ConfigError(f"{where}: {field[:80]!r} is unknown; known are: {', '.join(_FIELDS)}")
    digest = table.get("sha256")
    if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
        raise ConfigError(f"{where}: sha256 must be 64 of 0-9 and a-f, the SHA-256 of the key")
    return Key(
        name,
        bytes.fromhex(digest),
        _scopes(table.get("scopes"), where),
        _number(table, "rate_per_s", MIN_RATE_PER_S, MAX_RATE_PER_S, where),
        _whole(table, "burst", 1, MAX_BURST, where),
        _expires(table.get("expires"), where),
    )


def _check_name(name: str, where: str) -> None:
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{where}: a name has 1 to 64 of a-z, 0-9, _ and -, and starts with a letter or digit")


def _scopes(given: Any, where: str) -> frozenset[str]:
    if not isinstance(given, list) or not given or not all(scope in SCOPES for scope in given):
        raise ConfigError(f"{where}: scopes must be a list of {', '.join(SCOPES)}, got {str(given)[:80]}")
    return frozenset(given)


def _number(table: Mapping[str, Any], name: str, low: float, high: float, where: str) -> float | None:
    value = table.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ConfigError(f"{where}: {name} must be between {low:g} and {high:g}, got {str(value)[:80]}")
    return float(value)


def _whole(table: Mapping[str, Any], name: str, low: int, high: int, where: str) -> int | None:
    value = _number(table, name, low, high, where)
    if value is None:
        return None
    if "rate_per_s" not in table or value != int(value):
        raise ConfigError(f"{where}: {name} must be an integer, beside a rate_per_s")
    return int(value)


def _expires(given: Any, where: str) -> dt.datetime | None:
    if given is None:
        return None
    if isinstance(given, dt.datetime):
        return given if given.tzinfo is not None else given.replace(tzinfo=dt.UTC)
    if isinstance(given, dt.date):
        return dt.datetime(given.year, given.month, given.day, tzinfo=dt.UTC)
    raise ConfigError(f"{where}: expires must be a date like 2027-01-01, without quotes, got {str(given)[:80]!r}")


def added(
    data: bytes,
    name: str,
    key: str,
    source: str = "the file",
    *,
    scopes: Iterable[str],
    rate_per_s: float | None = None,
    burst: int | None = None,
    expires: dt.date | None = None,
) -> bytes:
    """The file's content with another key at its end; `source` is what errors call the file.

    Raises ConfigError where that would be no good file.
    """
    _check_name(name, f"keys: {name[:80]!r}")
    if any(name == known.name for known in parse_keys(data, source)):
        raise ConfigError(f"there is a key {name!r} already; remove it first, or rotate under another name")
    lines = [f"[keys.{name}]", f'sha256 = "{digest_of(key).hex()}"']
    lines.append(f"scopes = [{', '.join(f'{chr(34)}{scope}{chr(34)}' for scope in dict.fromkeys(scopes))}]")
    lines += [f"rate_per_s = {rate_per_s!r}"] if rate_per_s is not None else []
    lines += [f"burst = {burst}"] if burst is not None else []
    lines += [f"expires = {expires.isoformat()}"] if expires is not None else []
    before = data.rstrip() + b"\n\n" if data.strip() else b""
    made = before + "\n".join(lines).encode() + b"\n"
    parse_keys(made, source)
    return made


def removed(data: bytes, name: str, source: str = "the file") -> bytes:
    """The file's content without one key; what else is written in it stays as it is."""
    before = {key.name: key.digest for key in parse_keys(data, source)}
    if before.pop(name, None) is None:
        raise ConfigError(f"there is no key {name[:80]!r}; there are: {', '.join(before) or 'none'}")
    lines = data.decode().splitlines(keepends=True)
    heads = [at for at, line in enumerate(lines) if line.lstrip().startswith("[")]
    start = next((at for at in heads if re.match(rf"\s*\[\s*keys\s*\.\s*{name}\s*\]", lines[at])), None)
    if start is not None:
        end = next((at for at in heads if at > start), len(lines))
        made = "".join(lines[:start] + lines[end:]).strip().encode() + b"\n"
        if {key.name: key.digest for key in parse_keys(made, source)} == before:
            return made
    raise ConfigError(f"key {name!r} is not written as a table [keys.{name}]; remove it by hand")
