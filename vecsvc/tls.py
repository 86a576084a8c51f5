"""TLS for ports and clients, from PEM files that may be renewed while they are in use."""

from __future__ import annotations

import logging
import os
import ssl
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from vecsvc.errors import ConfigError

log: Final = logging.getLogger("vecsvc.tls")

LOOK_S: Final = 1.0  # files are looked at no more often
MAX_PEM_BYTES: Final = 1 << 20


class FileWatch:
    """Tells when one of its files was replaced or changed, without a thread or a timer: whoever uses them asks."""

    def __init__(self, *paths: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._paths, self._clock = paths, clock
        self._seen = self._look()
        self._next = clock() + LOOK_S

    def changed(self) -> bool:
        """True once for each change. Two threads that ask at the same time may both be told: that does no harm."""
        now = self._clock()
        if now < self._next:
            return False
        self._next = now + LOOK_S
        found = self._look()
        changed, self._seen = found != self._seen, found
        return changed

    def _look(self) -> list[tuple[int, ...] | None]:
        return [_identity(path) for path in self._paths]


def _identity(path: Path) -> tuple[int, ...] | None:
    try:
        facts = path.stat()
    except OSError:
        return None
    return facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns


# ----------------------------------------------------------------------------------------------------- TLS


def server_tls(cert: str, key: str = "", client_ca: str = "") -> ssl.SSLContext:
    """TLS 1.2 or newer for a port, from PEM files; with `client_ca` only for clients that it signed.

    `cert` is the chain, the server's own certificate first; `key` its private key, empty where `cert` holds it too.
    Renewed files are used from the next connection on; where they cannot be, those before stay in force and the log
    says why. Raises ConfigError, naming the file.
    """

    def fill(context: ssl.SSLContext) -> None:
        _newer_than_1_1(context)
        _load_chain(context, cert, key)
        if client_ca:
            context.verify_mode = ssl.CERT_REQUIRED
            _load_ca(context, client_ca)

    return _Renewed.make(ssl.PROTOCOL_TLS_SERVER, fill, cert, key, client_ca)


def client_tls(cert: str = "", key: str = "", ca: str = "", *, check_hostname: bool = True) -> ssl.SSLContext:
    """TLS 1.2 or newer to a server that `ca` signed (empty: one that the system trusts), as `server_tls` in the rest.

    With `cert` the client names itself. The server's certificate must be for the name that is connected to, unless
    `check_hostname` is false: then anybody whom `ca` signed may be the server.
    """

    def fill(context: ssl.SSLContext) -> None:
        _newer_than_1_1(context)
        context.check_hostname = check_hostname
        if cert:
            _load_chain(context, cert, key)
        if ca:
            _load_ca(context, ca)
        else:
            context.load_default_certs(ssl.Purpose.SERVER_AUTH)

    return _Renewed.make(ssl.PROTOCOL_TLS_CLIENT, fill, cert, key, ca)


class _Renewed(ssl.SSLContext):
    """A context that, before each connection, looks whether its files were renewed.

    What is renewed is read into a context of its own and takes over whole: loading into one that is in use would
    leave it with half a pair where the certificate is replaced a moment before its key.
    """

    _fill: Callable[[ssl.SSLContext], None]
    _watch: FileWatch
    _files: str
    _current: ssl.SSLContext

    @classmethod
    def make(cls, protocol: ssl._SSLMethod, fill: Callable[[ssl.SSLContext], None], *files: str) -> _Renewed:
        made = cls(protocol)
        named = [file for file in files if file]
        made._fill, made._watch, made._files = fill, FileWatch(*map(Path, named)), ", ".join(named)
        fill(made)
        made._current = made
        return made

    def wrap_bio(self, *arguments: Any, **named: Any) -> ssl.SSLObject:
        current = self._newest()
        return super().wrap_bio(*arguments, **named) if current is self else current.wrap_bio(*arguments, **named)

    def wrap_socket(self, *arguments: Any, **named: Any) -> ssl.SSLSocket:
        current = self._newest()
        return super().wrap_socket(*arguments, **named) if current is self else current.wrap_socket(*arguments, **named)

    def _newest(self) -> ssl.SSLContext:
        if self._watch.changed():
            fresh = ssl.SSLContext(self.protocol)
            try:
                self._fill(fresh)
            except ConfigError as error:
                log.warning("certificates not renewed", extra={"data": {"why": str(error)}})
            else:
                self._current = fresh
                log.info("certificates renewed", extra={"data": {"files": self._files}})
        return self._current


def _newer_than_1_1(context: ssl.SSLContext) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_2


def _load_chain(context: ssl.SSLContext, cert: str, key: str) -> None:
    if not cert:
        raise ConfigError("no certificate is named; give the PEM file of the chain")
    for file in dict.fromkeys((cert, key or cert)):
        _check_pem(file)

    def refuse() -> str:
        # Without it OpenSSL would ask at the terminal.
        raise ConfigError(f"{key or cert}: the private key is encrypted; give one without a password")

    try:
        context.load_cert_chain(cert, key or None, password=refuse)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ConfigError(f"{key or cert}: is not the private key of {cert}") from error
        raise ConfigError(
            f"{cert}{f' and {key}' if key else ''}: no certificate and private key in PEM ({error.reason})"
        ) from error


def _load_ca(context: ssl.SSLContext, ca: str) -> None:
    _check_pem(ca)
    try:
        context.load_verify_locations(ca)
    except ssl.SSLError as error:
        raise ConfigError(f"{ca}: no certificates in PEM ({error.reason})") from error


def _check_pem(file: str) -> None:
    """OpenSSL's own errors do not say which file they are about."""
    try:
        with open(file, "rb") as opened:  # noqa: PTH123
            size = os.fstat(opened.fileno()).st_size
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from error
    if size > MAX_PEM_BYTES:
        raise ConfigError(f"{file}: has {size} bytes, a PEM file may have {MAX_PEM_BYTES}")
