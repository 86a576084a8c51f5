"""TLS: certificates that are checked on both sides and renewed without a restart."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import logging
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import service
from service import Service

from vecsvc import tls
from vecsvc.access import added, new_key
from vecsvc.client import AsyncClient, Client
from vecsvc.config import ServeSettings
from vecsvc.errors import ConfigError, ServiceError, Unauthorized
from vecsvc.process import serve
from vecsvc.tls import client_tls, server_tls

pytest.importorskip("cryptography")
from certificates import Authority  # it needs the package
from cryptography import x509

QUERY = service.vectors(1, seed=80)[0]


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are looked at each time, not once a second."""
    monkeypatch.setattr(tls, "LOOK_S", 0.0)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


# ----------------------------------------------------------------------------------------------------- TLS


def shake(server: ssl.SSLContext, client: ssl.SSLContext, name: str = "localhost") -> tuple[str, str]:
    """A whole handshake in memory, with a byte each way; the version, and the serial number that the client saw."""
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ours = server.wrap_bio(up, down, server_side=True)
    theirs = client.wrap_bio(down, up, server_hostname=name)

    def step(act: object) -> bool:
        try:
            act()  # type: ignore[operator]
        except ssl.SSLWantReadError:
            return False
        return True

    done = [False, False]
    while not all(done):
        done = [done[0] or step(theirs.do_handshake), done[1] or step(ours.do_handshake)]
    # With TLS 1.3 a client learns only now that its certificate was not wanted.
    ours.write(b"x")
    assert theirs.read(1) == b"x"
    seen = theirs.getpeercert()
    assert seen is not None
    return theirs.version() or "", str(seen["serialNumber"])


def test_both_sides_know_each_other_by_the_same_authority(authority: Authority) -> None:
    server = server_tls(*authority.issue("server"), authority.ca)
    client = client_tls(*authority.issue("client"), authority.ca)
    assert shake(server, client)[0] == "TLSv1.3"
    assert shake(server, client, "127.0.0.1")[0] == "TLSv1.3"
    client.maximum_version = ssl.TLSVersion.TLSv1_2
    assert shake(server, client)[0] == "TLSv1.2"


def test_older_versions_are_not_spoken(authority: Authority) -> None:
    for context in (server_tls(*authority.issue("server")), client_tls(ca=authority.ca)):
        assert context.minimum_version == ssl.TLSVersion.TLSv1_2


def test_a_client_without_certificate_or_with_another_s_is_turned_away(authority: Authority, tmp_path: Path) -> None:
    server = server_tls(*authority.issue("server"), authority.ca)
    with pytest.raises(ssl.SSLError, match="PEER_DID_NOT_RETURN_A_CERTIFICATE"):
        shake(server, client_tls(ca=authority.ca))
    with pytest.raises(ssl.SSLError, match="CERTIFICATE_VERIFY_FAILED"):
        shake(server, client_tls(*Authority(tmp_path).issue("client"), authority.ca))
    with pytest.raises(ssl.SSLError, match="CERTIFICATE_VERIFY_FAILED"):
        shake(server, client_tls(*authority.issue("late", days=-1), authority.ca))


def test_a_server_of_another_authority_or_name_is_not_spoken_to(authority: Authority, tmp_path: Path) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match="verify failed"):
        shake(server_tls(*Authority(tmp_path).issue("server")), client_tls(ca=authority.ca))
    server = server_tls(*authority.issue("server"))
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        shake(server, client_tls(ca=authority.ca), "elsewhere")
    assert shake(server, client_tls(ca=authority.ca, check_hostname=False), "elsewhere")[0] == "TLSv1.3"
    with pytest.raises(ssl.SSLCertVerificationError, match="verify failed"):
        shake(server, client_tls())


def test_the_key_may_lie_in_the_certificate_s_file(authority: Authority, tmp_path: Path) -> None:
    cert, key = authority.issue("server")
    both = tmp_path / "both.pem"
    both.write_bytes(Path(key).read_bytes() + Path(cert).read_bytes())
    assert shake(server_tls(str(both)), client_tls(ca=authority.ca))[0] == "TLSv1.3"


@pytest.fixture
def damaged(authority: Authority, tmp_path: Path) -> Iterator[dict[str, str]]:
    cert, key = authority.issue("server")
    (tmp_path / "empty.pem").touch()
    (tmp_path / "long.pem").write_bytes(Path(cert).read_bytes() + b"\n" * tls.MAX_PEM_BYTES)
    yield {
        "cert": cert,
        "key": key,
        "ca": authority.ca,
        "other": authority.issue("other")[1],
        "encrypted": authority.encrypted_key("encrypted.pem"),
        "missing": str(tmp_path / "missing.pem"),
        "empty": str(tmp_path / "empty.pem"),
        "long": str(tmp_path / "long.pem"),
        "folder": str(tmp_path),
        "": "",
    }


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (("missing", "key", ""), r"missing\.pem: No such file"),
        (("cert", "missing", ""), r"missing\.pem: No such file"),
        (("cert", "key", "missing"), r"missing\.pem: No such file"),
        (("folder", "key", ""), "Is a directory"),
        (("cert", "other", ""), r"other-key\.pem: is not the private key of .*server-cert\.pem"),
        (("cert", "encrypted", ""), r"encrypted\.pem: the private key is encrypted"),
        (("cert", "", ""), r"server-cert\.pem: no certificate and private key in PEM"),
        (("empty", "key", ""), r"empty\.pem and .*server-key\.pem: no certificate"),
        (("cert", "key", "empty"), r"empty\.pem: no certificates in PEM"),
        (("long", "key", ""), r"long\.pem: has [0-9]+ bytes, a PEM file may have 1048576"),
        (("", "key", ""), "no certificate is named"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(
    damaged: dict[str, str], files: tuple[str, str, str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        server_tls(*(damaged[name] for name in files))


def test_renewed_certificates_are_used_from_the_next_connection_on(tmp_path: Path, at_once: None) -> None:
    before = Authority(tmp_path)
    server = server_tls(*before.issue("server"), before.ca)
    client = client_tls(*before.issue("client"), before.ca)
    first, again = shake(server, client)[1], shake(server, client)[1]
    assert first == again
    before.issue("server")
    second = shake(server, client)[1]
    assert second != first
    # Another authority altogether: both sides read all their files anew.
    after = Authority(tmp_path)
    after.issue("server"), after.issue("client")
    assert shake(server, client)[1] not in (first, second)


def test_half_renewed_certificates_leave_those_before_in_force(
    tmp_path: Path, at_once: None, caplog: pytest.LogCaptureFixture
) -> None:
    authority = Authority(tmp_path)
    cert, key = authority.issue("server")
    server, client = server_tls(cert, key), client_tls(ca=authority.ca)
    first = shake(server, client)[1]
    old_key = Path(key).read_bytes()
    authority.issue("server")
    new_key = Path(key).read_bytes()
    Path(key).write_bytes(old_key)  # the certificate is new, and its key has not come yet
    with caplog.at_level(logging.INFO, "vecsvc.tls"):
        assert shake(server, client)[1] == shake(server, client)[1] == first
        assert [r.message for r in caplog.records] == ["certificates not renewed"]
        Path(key).unlink()
        assert shake(server, client)[1] == first
        Path(key).write_bytes(new_key)
        assert shake(server, client)[1] != first
    assert [r.message for r in caplog.records] == ["certificates not renewed"] * 2 + ["certificates renewed"]


@pytest.mark.parametrize("days", [-1, 30, 365 * 40])  # the last is past 2049: another form of time
def test_the_end_of_a_certificate_is_told(authority: Authority, tmp_path: Path, days: int) -> None:
    cert, key = authority.issue("until", days=days)
    chain = tmp_path / "chain.pem"  # the server's own comes first, others and the key lie about it
    chain.write_bytes(Path(key).read_bytes() + Path(cert).read_bytes() + Path(authority.ca).read_bytes())
    until = x509.load_pem_x509_certificate(Path(cert).read_bytes()).not_valid_after_utc.timestamp()
    assert server_tls(str(chain)).valid_until() == until
    assert client_tls(cert, key, authority.ca).valid_until() == until
    assert client_tls(ca=authority.ca).valid_until() is None
    for word in ("X509 CERTIFICATE", "TRUSTED CERTIFICATE"):  # as OpenSSL reads them, too
        other = tmp_path / "other.pem"
        other.write_bytes(Path(cert).read_bytes().replace(b"CERTIFICATE", word.encode()))
        assert tls._valid_until(str(other)) == until


def test_a_certificate_of_unknown_form_is_none_whose_end_is_told(tmp_path: Path) -> None:
    file = tmp_path / "any.pem"
    begin, end = b"-----BEGIN CERTIFICATE-----\n", b"\n-----END CERTIFICATE-----\n"
    for inside in (b"", b"MA==", b"MAA=", b"MIIB", b"////", b"MAcwBQIDAQAB", "ü".encode()):
        file.write_bytes(begin + inside + end)
        assert tls._valid_until(str(file)) is None


def test_an_expired_certificate_is_told_at_the_start_and_none_takes_the_place_of_a_valid_one(
    tmp_path: Path, at_once: None, caplog: pytest.LogCaptureFixture
) -> None:
    authority = Authority(tmp_path)
    cert, key = authority.issue("server", days=-1)
    with caplog.at_level(logging.INFO, "vecsvc.tls"):
        server = server_tls(cert, key, authority.ca)
        assert [(r.message, r.data["file"]) for r in caplog.records] == [("certificate expired", cert)]  # type: ignore[attr-defined]
        caplog.clear()
        expired = server.valid_until()
        authority.issue("server")
        valid = server.valid_until()
        assert expired is not None and valid is not None and expired < time.time() < valid
        authority.issue("server", days=-1)
        assert server.valid_until() == valid
        client = client_tls(*authority.issue("client"), ca=authority.ca)
        assert shake(server, client)
        [renewed, kept] = caplog.records
        assert (renewed.message, kept.message) == ("certificates renewed", "certificates not renewed")
        assert "server-cert.pem: expired on " in kept.data["why"]  # type: ignore[attr-defined]
        # Whom an authority lets in is not held back: it may be that somebody was shut out.
        caplog.clear()
        Authority(tmp_path)
        with pytest.raises(ssl.SSLError):
            shake(server, client)
    assert server.valid_until() == tls._valid_until(cert)
    told = [r.message for r in caplog.records]
    assert told == ["certificates renewed", "certificate expired", "certificates renewed"], "the last is the client's"


def test_why_a_handshake_failed_is_told(authority: Authority, tmp_path: Path) -> None:
    told: list[str] = []
    server = server_tls(*authority.issue("server"), authority.ca, refused=told.append)
    for client in (
        client_tls(ca=authority.ca),
        client_tls(*Authority(tmp_path).issue("client"), authority.ca),
        client_tls(*authority.issue("late", days=-1), authority.ca),
    ):
        with pytest.raises(ssl.SSLError):
            shake(server, client)
    shake(server, client_tls(*authority.issue("client"), authority.ca))
    assert told == [
        "peer did not return a certificate",
        "certificate verify failed: certificate signature failure",
        "certificate verify failed: certificate has expired",
    ]


def test_files_are_looked_at_once_a_second_at_most(tmp_path: Path) -> None:
    now = 100.0
    file = tmp_path / "file"
    watch = tls.FileWatch(file, clock=lambda: now)
    file.write_text("new")
    assert not watch.changed()
    now += tls.LOOK_S
    assert watch.changed() and not watch.changed()
    now += tls.LOOK_S
    assert not watch.changed()
    file.unlink()
    now += tls.LOOK_S
    assert watch.changed()


# ------------------------------------------------------------------------------------------------- the service


@pytest.fixture(scope="module")
def secured(authority: Authority) -> Iterator[Service]:
    """Asks for a certificate on its public port."""
    cert, key = authority.issue("service")
    settings = {"tls_cert": cert, "tls_key": key, "tls_client_ca": authority.ca, "header_timeout_s": 1}
    with service.started(service.index("squared"), **settings) as running:
        running.wait_for("ready")
        yield running
        service.assert_clean(running)
        assert running.stop() == 0


def url(running: Service) -> str:
    return f"https://127.0.0.1:{running.port}"


def test_both_clients_speak_tls_and_show_their_certificate(secured: Service, authority: Authority) -> None:
    named: Any = {"ca": authority.ca, "cert": authority.issue("client")}
    with Client(url(secured), **named) as client:
        assert client.ready() and len(client.search(vector=QUERY, k=3).results) == 3
        assert len(client.search_batch(vectors=service.vectors(500, seed=2), k=3).results) == 500

    async def ask() -> int:
        async with AsyncClient(url(secured), **named) as client:
            assert await client.ready()
            return len((await client.search(vector=QUERY, k=3)).results)

    assert asyncio.run(ask()) == 3


def test_who_shows_no_certificate_or_trusts_nobody_gets_no_answer(
    secured: Service, authority: Authority, tmp_path: Path
) -> None:
    begun = len(secured.log())
    strangers: list[dict[str, Any]] = [
        {"ca": authority.ca},
        {"ca": authority.ca, "cert": Authority(tmp_path).issue("client")},
        {"cert": authority.issue("client")},
    ]
    for stranger in strangers:
        with Client(url(secured), **stranger) as client, pytest.raises(ServiceError, match="no answer"):
            client.indexes()
    # A request in clear on the port gets nothing that could be taken for an answer.
    assert secured.raw(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n") == b""
    told = [line["why"] for line in secured.log()[begun:] if line["message"] == "handshake refused"]
    assert list(dict.fromkeys(told)) == [
        "peer did not return a certificate",
        "certificate verify failed: certificate signature failure",
        "tlsv1 alert unknown ca",
        "http request: what came is HTTP without TLS",
    ]


def test_the_admin_port_speaks_tls_and_asks_for_no_certificate(secured: Service, authority: Authority) -> None:
    context = client_tls(ca=authority.ca)
    connection = http.client.HTTPSConnection("127.0.0.1", secured.admin_port, timeout=10, context=context)
    with contextlib.closing(connection):
        assert service.ask(connection, "GET", "/readyz").status == 200
        shown = service.ask(connection, "GET", "/metrics").body
    assert b"vecsvc_in_flight" in shown and b'vecsvc_tls_valid_until_seconds{port="http"}' in shown
    assert b'vecsvc_tls_refused_handshakes_total{port="http"}' in shown


def test_a_connection_that_shakes_no_hands_is_closed(secured: Service) -> None:
    with secured.socket() as sock:
        assert service.read_all(sock) == b""


def test_a_certificate_that_is_renewed_is_shown_without_a_restart(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    cert, key = authority.issue("service")
    context = client_tls(ca=authority.ca)

    def serial(running: Service) -> str:
        with (
            socket.create_connection(("127.0.0.1", running.port), timeout=10) as sock,
            context.wrap_socket(sock, server_hostname="localhost") as shaken,
        ):
            shown = shaken.getpeercert()
            assert shown is not None
            return str(shown["serialNumber"])

    with service.started(service.index("squared"), tls_cert=cert, tls_key=key) as running:
        running.wait_for("ready")
        with Client(url(running), ca=authority.ca) as client:
            assert client.ready()
            before = serial(running)
            authority.issue("service")
            end = time.monotonic() + 10
            while serial(running) == before:
                assert time.monotonic() < end
                time.sleep(0.05)
            assert running.wait_for("certificates renewed")["files"] == f"{cert}, {key}"
            assert [line["message"] for line in running.log()].count("certificates renewed") == 1
            assert client.ready(), "a connection that was open goes on"
        service.assert_clean(running)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tls_cert": "missing.pem"}, "missing.pem: No such file"),
        ({"tls_key": "key.pem"}, "of no use without tls_cert"),
        ({"tls_client_ca": "ca.pem"}, "of no use without tls_cert"),
    ],
)
def test_a_service_does_not_start_with_files_it_cannot_use(settings: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        serve(service.index("squared"), ServeSettings(port=0, admin_port=0, **settings))


@pytest.mark.parametrize("make", [Client, AsyncClient])
@pytest.mark.parametrize(
    ("address", "options", "message"),
    [
        ("http://127.0.0.1:1", {"ca": "ca.pem"}, "ca and cert are for https://"),
        ("http://127.0.0.1:1", {"cert": "cert.pem"}, "ca and cert are for https://"),
        ("https://127.0.0.1:1", {"ca": "missing.pem"}, "missing.pem: No such file"),
        ("https://127.0.0.1:1", {"cert": ("missing.pem", "key.pem")}, "missing.pem: No such file"),
        ("http://127.0.0.1:1", {"api_key": "a\nb"}, "characters that no key has"),
        ("http://127.0.0.1:1", {"api_key": "schlüssel"}, "characters that no key has"),
    ],
)
def test_a_client_says_at_once_what_it_cannot_use(
    make: Any, address: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make(address, **options)


@pytest.mark.parametrize("workers", [1, 2])
def test_metrics_know_of_a_renewal_though_nobody_connects(tmp_path: Path, workers: int) -> None:
    authority = Authority(tmp_path)
    cert, key = authority.issue("service", days=2)
    context = client_tls(ca=authority.ca)

    def until(running: Service) -> float:
        connection = http.client.HTTPSConnection("127.0.0.1", running.admin_port, timeout=10, context=context)
        with contextlib.closing(connection):
            text = service.ask(connection, "GET", "/metrics").body.decode()
        [line] = [line for line in text.splitlines() if line.startswith("vecsvc_tls_valid_until_seconds{")]
        return float(line.split()[1])

    with service.started(service.index("squared"), workers=workers, tls_cert=cert, tls_key=key) as running:
        running.wait_for("ready")
        assert until(running) - time.time() < 3 * 86_400
        authority.issue("service", days=90)
        end = time.monotonic() + 20
        while until(running) - time.time() < 80 * 86_400:
            assert time.monotonic() < end
            time.sleep(0.1)


def test_slow_clients_are_cut_off_under_tls_as_without(authority: Authority) -> None:
    """Heads and bodies that drip, and answers of some megabytes that are not read."""
    cert, key = authority.issue("service")
    context = client_tls(ca=authority.ca)
    limits = {"header_timeout_s": 0.5, "body_timeout_s": 0.5, "write_timeout_s": 0.5}
    rows = service.vectors(1024, seed=15, dim=16).tobytes()
    post = "POST /search/batch?k=150&timeout_ms=30000 HTTP/1.1\r\nHost: x\r\nContent-Type: application/octet-stream\r\n"
    question = f"{post}Content-Length: {len(rows)}\r\n\r\n".encode() + rows
    with service.started(service.index("large"), tls_cert=cert, tls_key=key, **limits) as running:
        running.wait_for("ready")

        def connect() -> ssl.SSLSocket:
            return context.wrap_socket(running.socket(timeout_s=20, receive_bytes=4096), server_hostname="localhost")

        with connect() as sock:
            sock.sendall(b"GET / HT")
            assert sock.recv(100) == b""
        with connect() as sock:
            sock.sendall(question[:-100])
            assert sock.recv(100).startswith(b"HTTP/1.1 408")
        with connect() as sock:
            sock.sendall(question)
            assert sock.recv(12) == b"HTTP/1.1 200"
            end = time.monotonic() + 15
            with pytest.raises((OSError, ssl.SSLError)):
                while time.monotonic() < end:
                    time.sleep(0.05)
                    sock.send(b" ")  # to notice the cut
            assert time.monotonic() < end
        service.assert_clean(running)


def test_several_workers_ask_for_keys_and_speak_tls_on_both_ports(authority: Authority, tmp_path: Path) -> None:
    cert, key = authority.issue("service")
    team, ops = new_key(), new_key()
    data = added(b"", "team", team, scopes=["read"])
    (tmp_path / "keys.toml").write_bytes(added(data, "ops", ops, scopes=["admin"]))
    (tmp_path / "keys.toml").chmod(0o600)
    settings = {"workers": 2, "keys": tmp_path / "keys.toml", "tls_cert": cert, "tls_key": key}
    with service.started(service.index("squared"), **settings) as running:
        running.wait_for("ready")
        with Client(url(running), ca=authority.ca, api_key=team) as client:
            assert len(client.search(vector=QUERY, k=3).results) == 3
        with Client(url(running), ca=authority.ca) as client, pytest.raises(Unauthorized):
            client.search(vector=QUERY)
        context = client_tls(ca=authority.ca)
        with socket.create_connection(("127.0.0.1", running.admin_port), timeout=10) as sock:
            sock.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
            service.read_all(sock)
        connection = http.client.HTTPSConnection("127.0.0.1", running.admin_port, timeout=10, context=context)
        with contextlib.closing(connection):
            headers = {"X-API-Key": ops}
            shown = service.ask(connection, "GET", "/metrics", headers=headers).body
            # What the parent refuses on its own port counts as well, and once.
            assert b'vecsvc_tls_refused_handshakes_total{port="admin"} 1.0' in shown
            assert b'vecsvc_tls_valid_until_seconds{port="http"}' in shown
            for method, path, presented, status in (
                ("GET", "/livez", None, 200),
                ("GET", "/metrics", None, 401),
                ("GET", "/metrics", team, 403),
                ("GET", "/metrics", ops, 200),
                ("POST", "/reload", team, 403),
                ("POST", "/reload", ops, 200),
                ("POST", "/indexes/squared/rollback", None, 401),
            ):
                headers = {"X-API-Key": presented} if presented is not None else {}
                assert service.ask(connection, method, path, headers=headers).status == status, (path, presented)
