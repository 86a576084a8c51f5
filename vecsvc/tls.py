"""TLS for ports and clients, from PEM files that may be renewed while they are in use."""

from __future__ import annotations

import base64
import logging
import os
import re
import ssl
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from vecsvc.errors import ConfigError

log: Final = logging.getLogger("vecsvc.tls")

LOOK_S: Final = 1.0  # files are looked at no more often
MAX_PEM_BYTES: Final = 1 << 20

Refused = Callable[[str], None]  # called with why a handshake was refused


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


def server_tls(
    cert: str, key: str = "", client_ca: str = "", *, refused: Refused | None = None, quiet: bool = False
) -> RenewedContext:
    """TLS 1.2 or newer for a port, from PEM files; with `client_ca` only for clients that it signed.

    `cert` is the chain, the server's own certificate first; `key` its private key, empty where `cert` holds it too.
    Renewed files are used from the next connection on. Those before stay in force where they cannot be used, or where
    nothing but an expired certificate came; the log says so, unless `quiet`. `refused` hears of handshakes that this
    side refused, or the other with a reason. Raises ConfigError, naming the file.
    """
    told = None if refused is None else _telling(refused)

    def fill(context: ssl.SSLContext) -> None:
        _newer_than_1_1(context)
        if told is not None:
            context.sslobject_class = told
        _load_chain(context, cert, key)
        if client_ca:
            context.verify_mode = ssl.CERT_REQUIRED
            _load_ca(context, client_ca)

    return RenewedContext.make(ssl.PROTOCOL_TLS_SERVER, fill, cert, key, client_ca, quiet=quiet)


def client_tls(
    cert: str = "", key: str = "", ca: str = "", *, check_hostname: bool = True, refused: Refused | None = None
) -> RenewedContext:
    """TLS 1.2 or newer to a server that `ca` signed (empty: one that the system trusts), as `server_tls` in the rest.

    With `cert` the client names itself. The server's certificate must be for the name that is connected to, unless
    `check_hostname` is false: then anybody whom `ca` signed may be the server.
    """
    told = None if refused is None else _telling(refused)

    def fill(context: ssl.SSLContext) -> None:
        _newer_than_1_1(context)
        if told is not None:
            context.sslobject_class = told
        context.check_hostname = check_hostname
        if cert:
            _load_chain(context, cert, key)
        if ca:
            _load_ca(context, ca)
        else:
            context.load_default_certs(ssl.Purpose.SERVER_AUTH)

    return RenewedContext.make(ssl.PROTOCOL_TLS_CLIENT, fill, cert, key, ca)


class RenewedContext(ssl.SSLContext):
    """A context that, before each connection, looks whether its files were renewed.

    What is renewed is read into a context of its own and takes over whole: loading into one that is in use would
    leave it with half a pair where the certificate is replaced a moment before its key.
    """

    _fill: Callable[[ssl.SSLContext], None]
    _watch: FileWatch
    _cert: str
    _ca: Path
    _ca_seen: tuple[int, ...] | None
    _files: str
    _level: int  # of what is said of renewals
    _until: float | None
    _told: bool  # that it is over
    _current: ssl.SSLContext

    @classmethod
    def make(
        cls,
        protocol: ssl._SSLMethod,
        fill: Callable[[ssl.SSLContext], None],
        cert: str,
        key: str,
        ca: str,
        *,
        quiet: bool = False,
    ) -> RenewedContext:
        made = cls(protocol)
        named = [file for file in (cert, key, ca) if file]
        made._fill, made._watch, made._files = fill, FileWatch(*map(Path, named)), ", ".join(named)
        made._cert, made._ca, made._level = cert, Path(ca), logging.DEBUG if quiet else logging.WARNING
        made._ca_seen = _identity(made._ca)
        fill(made)
        made._current, made._until, made._told = made, _valid_until(cert), False
        made._tell_expired()
        return made

    def valid_until(self) -> float | None:
        """When the certificate in force ends, in seconds since 1970; None where there is none or it does not say."""
        self._newest()
        return self._until

    def _tell_expired(self) -> None:
        # Clients that do not look are served; those that do say what is wrong.
        if not self._told and _over(self._until):
            self._told = True
            log.log(self._level, "certificate expired", extra={"data": {"file": self._cert, "on": _day(self._until)}})

    def wrap_bio(self, *arguments: Any, **named: Any) -> ssl.SSLObject:
        current = self._newest()
        return super().wrap_bio(*arguments, **named) if current is self else current.wrap_bio(*arguments, **named)

    def wrap_socket(self, *arguments: Any, **named: Any) -> ssl.SSLSocket:
        current = self._newest()
        return super().wrap_socket(*arguments, **named) if current is self else current.wrap_socket(*arguments, **named)

    def _newest(self) -> ssl.SSLContext:
        if self._watch.changed():
            fresh, ca_seen = ssl.SSLContext(self.protocol), _identity(self._ca)
            try:
                self._fill(fresh)
                until = _valid_until(self._cert)
                # Whom an authority lets in is not held back by it.
                if _over(until) and self._until is not None and not _over(self._until) and ca_seen == self._ca_seen:
                    raise ConfigError(f"{self._cert}: expired on {_day(until)}; the one before is still valid")
            except ConfigError as error:
                log.log(self._level, "certificates not renewed", extra={"data": {"why": str(error)}})
            else:
                self._current, self._until, self._told, self._ca_seen = fresh, until, False, ca_seen
                facts = {"files": self._files} | ({"valid_until": _day(until)} if until is not None else {})
                log.log(min(self._level, logging.INFO), "certificates renewed", extra={"data": facts})
        self._tell_expired()
        return self._current


def _telling(refused: Refused) -> type[ssl.SSLObject]:
    """Sides of connections that say why a handshake failed: event loops keep that to themselves."""

    class Telling(ssl.SSLObject):
        def do_handshake(self) -> None:
            try:
                super().do_handshake()
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                raise
            except ssl.SSLError as error:
                refused(why_refused(error))
                raise

    return Telling


_WORDS: Final = {
    "wrong version number": "what came is no TLS",
    "http request": "what came is HTTP without TLS",
}


def why_refused(error: ssl.SSLError) -> str:
    """OpenSSL's reason in words, with what it found in the certificate."""
    reason = (error.reason or "").replace("_", " ").lower() or str(error)
    found = getattr(error, "verify_message", "") or _WORDS.get(reason, "")
    return f"{reason}: {found}" if found else reason


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
        raise ConfigError(f"{cert}{f' and {key}' if key else ''}: no certificate and private key in PEM") from error


def _load_ca(context: ssl.SSLContext, ca: str) -> None:
    _check_pem(ca)
    try:
        context.load_verify_locations(ca)
    except ssl.SSLError as error:
        raise ConfigError(f"{ca}: no certificates in PEM") from error


def _check_pem(file: str) -> None:
    """OpenSSL's own errors do not say which file they are about."""
    try:
        with open(file, "rb") as opened:  # noqa: PTH123
            size = os.fstat(opened.fileno()).st_size
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from error
    if size > MAX_PEM_BYTES:
        raise ConfigError(f"{file}: has {size} bytes, a PEM file may have {MAX_PEM_BYTES}")


# ------------------------------------------------------------------------------------------- how long it is valid

_CERTIFICATE: Final = re.compile(rb"-----BEGIN (?:X509 |TRUSTED )?CERTIFICATE-----(.+?)-----END ", re.DOTALL)
_SEQUENCE, _UTC_TIME, _GENERALIZED_TIME, _VERSION = 0x30, 0x17, 0x18, 0xA0


def _valid_until(cert: str) -> float | None:
    """Seconds since 1970 at which the first certificate of a PEM file ends; None where it does not say.

    Python's ssl tells that of peers' certificates only. OpenSSL has read the file before; what is left is the way to
    one field (RFC 5280, section 4.1): of the Certificate the TBSCertificate, and in that the Validity, which follows
    an optional version, the serial number, the algorithm and the issuer.
    """
    if not cert:
        return None
    try:
        found = _CERTIFICATE.search(Path(cert).read_bytes())
        if found is None:
            return None
        der = base64.b64decode(found[1])
        _, at, _ = _element(der, 0)
        _, at, _ = _element(der, at)
        tag, _, _ = _element(der, at)
        for _ in range(4 if tag == _VERSION else 3):
            at = _element(der, at)[2]
        tag, at, _ = _element(der, at)
        _, _, at = _element(der, at)
        kind, begin, end = _element(der, at)
        if tag != _SEQUENCE or kind not in (_UTC_TIME, _GENERALIZED_TIME):
            return None
        text = der[begin:end].decode("ascii")
        if kind == _UTC_TIME:  # section 4.1.2.5.1: years from 50 on are of the twentieth century
            text = ("19" if text >= "50" else "20") + text
        return datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC).timestamp()
    except (OSError, ValueError, IndexError):
        return None


def _element(der: bytes, at: int) -> tuple[int, int, int]:
    """Of the element of DER at a place its tag, and where its content begins and ends."""
    tag, length, begin = der[at], der[at + 1], at + 2
    if length >= 0x80:
        more = length - 0x80
        length, begin = int.from_bytes(der[begin : begin + more], "big"), begin + more
    return tag, begin, begin + length


def _over(until: float | None) -> bool:
    return until is not None and until <= time.time()


def _day(until: float | None) -> str:
    return "" if until is None else datetime.fromtimestamp(until, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
