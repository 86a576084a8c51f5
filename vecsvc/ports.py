"""What guards each port: the TLS that the settings ask for, and a word where nothing does."""

from __future__ import annotations

import logging
import math
import ssl
from typing import Final

from vecsvc.access import is_loopback
from vecsvc.config import HttpSettings, RouteSettings, ServeSettings
from vecsvc.errors import ConfigError
from vecsvc.telemetry import LineBudget, Metrics
from vecsvc.tls import Refused, RenewedContext, client_tls, server_tls

log: Final = logging.getLogger("vecsvc.server")

LOG_LINES_PER_S: Final = 10  # about refused handshakes, of each port; the metric counts those left out as well


def http_tls(settings: HttpSettings, metrics: Metrics) -> tuple[ssl.SSLContext | None, ssl.SSLContext | None]:
    """TLS of the public and of the admin port, whose callers name themselves by keys and need no certificate."""
    if not settings.tls_cert:
        if settings.tls_key or settings.tls_client_ca:
            raise ConfigError("tls_key and tls_client_ca are of no use without tls_cert")
        return None, None
    cert, key = settings.tls_cert, settings.tls_key
    public = server_tls(cert, key, settings.tls_client_ca, refused=_refused(metrics, "http"))
    admin = server_tls(cert, key, refused=_refused(metrics, "admin"), quiet=True)  # the same files
    return _shown(metrics, "http", public), admin


def shard_tls(settings: ServeSettings, metrics: Metrics) -> ssl.SSLContext | None:
    """TLS of the shard port: front doors show a certificate of the same authority."""
    if not _mutual(settings):
        if not is_loopback(settings.shard_host):
            remedy = "shard_tls_cert, or a network policy"
            log.warning("whoever reaches the shard port may ask", extra={"data": {"remedy": remedy}})
        return None
    cert, key, ca = settings.shard_tls_cert, settings.shard_tls_key, settings.shard_tls_ca
    return _shown(metrics, "shard", server_tls(cert, key, ca, refused=_refused(metrics, "shard")))


def needs_shard_port(settings: ServeSettings) -> None:
    """Raises ConfigError where TLS is asked for between front doors and a node that none can reach."""
    if _mutual(settings) and settings.shard_port is None:
        raise ConfigError("shard_tls_cert is of no use without shard_port")


def warn_if_open(settings: HttpSettings) -> None:
    hosts = [host for host in (settings.host, settings.admin_host) if not is_loopback(host)]
    if hosts and not settings.keys:
        remedy = "vecsvc keys new, and --keys"
        log.warning("whoever reaches the port may ask", extra={"data": {"hosts": hosts, "remedy": remedy}})


def nodes_tls(settings: RouteSettings, metrics: Metrics) -> ssl.SSLContext | None:
    """TLS to the nodes. Whoever the authority signed is one: certificates name a service, not each of its pods."""
    if not _mutual(settings):
        return None
    cert, key, ca = settings.shard_tls_cert, settings.shard_tls_key, settings.shard_tls_ca
    count = metrics.tls_refused("nodes")  # why is told of each node
    return _shown(metrics, "nodes", client_tls(cert, key, ca, check_hostname=False, refused=lambda why: count.inc()))


def _refused(metrics: Metrics, port: str) -> Refused:
    count, lines = metrics.tls_refused(port), LineBudget(LOG_LINES_PER_S)

    def refused(why: str) -> None:
        count.inc()
        if lines.take():
            left_out, lines.kept_back = lines.kept_back, 0
            more = {"lines_left_out": left_out} if left_out else {}
            log.warning("handshake refused", extra={"data": {"port": port, "why": why, **more}})

    return refused


def _shown(metrics: Metrics, port: str, context: RenewedContext) -> RenewedContext:
    """The context; its certificate's end is among the metrics, read when they are and not when somebody connects."""
    if context.valid_until() is not None:
        metrics.tls_valid_until.labels(port).set_function(lambda: context.valid_until() or math.nan)
    return context


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
