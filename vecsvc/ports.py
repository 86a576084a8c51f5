"""What guards each port: the TLS that the settings ask for, and a word where nothing does."""

from __future__ import annotations

import logging
import ssl
from typing import Final

from vecsvc.access import is_loopback
from vecsvc.config import HttpSettings, RouteSettings, ServeSettings
from vecsvc.errors import ConfigError
from vecsvc.tls import client_tls, server_tls

log: Final = logging.getLogger("vecsvc.server")


def http_tls(settings: HttpSettings) -> tuple[ssl.SSLContext | None, ssl.SSLContext | None]:
    """TLS of the public and of the admin port, whose callers name themselves by keys and need no certificate."""
    if not settings.tls_cert:
        if settings.tls_key or settings.tls_client_ca:
            raise ConfigError("tls_key and tls_client_ca are of no use without tls_cert")
        return None, None
    return (
        server_tls(settings.tls_cert, settings.tls_key, settings.tls_client_ca),
        server_tls(settings.tls_cert, settings.tls_key),
    )


def shard_tls(settings: ServeSettings) -> ssl.SSLContext | None:
    """TLS of the shard port: front doors show a certificate of the same authority."""
    if not _mutual(settings):
        if not is_loopback(settings.shard_host):
            remedy = "shard_tls_cert, or a network policy"
            log.warning("whoever reaches the shard port may ask", extra={"data": {"remedy": remedy}})
        return None
    return server_tls(settings.shard_tls_cert, settings.shard_tls_key, settings.shard_tls_ca)


def warn_if_open(settings: HttpSettings) -> None:
    hosts = [host for host in (settings.host, settings.admin_host) if not is_loopback(host)]
    if hosts and not settings.keys:
        remedy = "vecsvc keys new, and --keys"
        log.warning("whoever reaches the port may ask", extra={"data": {"hosts": hosts, "remedy": remedy}})


def nodes_tls(settings: RouteSettings) -> ssl.SSLContext | None:
    """TLS to the nodes. Whoever the authority signed is one: certificates name a service, not each of its pods."""
    if not _mutual(settings):
        return None
    return client_tls(settings.shard_tls_cert, settings.shard_tls_key, settings.shard_tls_ca, check_hostname=False)


def _mutual(settings: HttpSettings) -> bool:
    """Whether front doors and nodes show each other certificates. Raises ConfigError where half of it is set."""
    if not settings.shard_tls_cert:
        if settings.shard_tls_key or settings.shard_tls_ca:
            raise ConfigError("shard_tls_key and shard_tls_ca are of no use without shard_tls_cert")
        return False
    if not settings.shard_tls_ca:
        raise ConfigError(
            "shard_tls_ca is missing: the authority that signed the certificates of front doors and nodes"
        )
    return True
