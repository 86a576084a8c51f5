"""Between front door and nodes both sides show a certificate of one authority; without it nobody is answered."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import service
from certificates import Authority
from local_cluster import end, start, wait_until
from service import Service

from vecsvc import remote
from vecsvc.config import RouteSettings, ServeSettings
from vecsvc.errors import ConfigError
from vecsvc.ports import nodes_tls, shard_tls
from vecsvc.process import serve
from vecsvc.remote import Kind
from vecsvc.telemetry import Metrics
from vecsvc.tls import client_tls
from vecsvc.workers import serve as serve_workers


def files(authority: Authority, name: str) -> dict[str, str]:
    cert, key = authority.issue(name)
    return {"shard_tls_cert": cert, "shard_tls_key": key, "shard_tls_ca": authority.ca}


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ours"))


@pytest.fixture(scope="module")
def node(authority: Authority) -> Iterator[Service]:
    settings = {"admin_port": 0, "shard_port": 0, **files(authority, "node")}
    with service.running(service.index("numbers"), **settings) as running:
        yield running


@contextlib.contextmanager
def door_to(node: Service, folder: Path, **settings: Any) -> Iterator[Service]:
    port = node.wait_for("listening")["shard_port"]
    (folder / "route.toml").write_text(f"nodes = {json.dumps([f'127.0.0.1:{port}'])}")
    door = start("route", config=str(folder / "route.toml"), **settings)
    try:
        yield door
    finally:
        end(door)


def test_a_front_door_with_a_certificate_of_the_authority_is_answered(
    node: Service, authority: Authority, tmp_path: Path
) -> None:
    with door_to(node, tmp_path, **files(authority, "door")) as door:
        door.wait_for("ready")
        corpus = service.corpora()["numbers"]
        hits = door.search(vector=corpus.vectors[7].tolist(), k=5)["results"]
        assert [hit["id"] for hit in hits] == corpus.ids_of(corpus.vectors[7], 5)


@pytest.mark.parametrize("case", ["none", "a stranger's", "it trusts others"])
def test_a_front_door_without_one_reaches_no_node_and_says_so(
    node: Service, authority: Authority, tmp_path: Path, case: str
) -> None:
    stranger = Authority(tmp_path / "theirs", "theirs")
    settings = {
        "none": {},
        "a stranger's": {**files(stranger, "door"), "shard_tls_ca": authority.ca},
        "it trusts others": {**files(authority, "other-door"), "shard_tls_ca": stranger.ca},
    }[case]
    on_door, on_node = {
        "none": ("broke off", "wrong version number: what came is no TLS"),
        "a stranger's": ("broke off", "certificate verify failed: unable to get local issuer certificate"),
        "it trusts others": ("the handshake failed: certificate verify failed", ""),
    }[case]
    with door_to(node, tmp_path, **settings) as door:
        wait_until(lambda: "no node holds an index" in door.get("/readyz").message)
        why = door.wait_for("node not reached")["why"]
        # Of one that shows a certificate it is known that the port is right.
        assert on_door in why and ("do both sides or neither have shard_tls_cert" in why) == bool(on_node)
        if on_node:  # a front door that hangs up itself tells the node nothing
            wait_until(lambda: any(line.get("why") == on_node for line in node.log()))
            assert node.metric("vecsvc_tls_refused_handshakes_total", port="shard") > 0


def test_a_front_door_with_tls_and_a_node_without_say_so_on_both_sides(authority: Authority, tmp_path: Path) -> None:
    with (
        service.running(service.index("numbers"), admin_port=0, shard_port=0) as plain,
        door_to(plain, tmp_path, **files(authority, "door")) as door,
    ):
        assert "do both sides or neither have shard_tls_cert" in door.wait_for("node not reached")["why"]
        assert "it begins as TLS does: one side has shard_tls_cert" in plain.wait_for("front door cut off")["why"]


def test_how_long_certificates_are_valid_is_a_metric_on_both_sides(
    node: Service, authority: Authority, tmp_path: Path
) -> None:
    with door_to(node, tmp_path, **files(authority, "door")) as door:
        for running, port in ((node, "shard"), (door, "nodes")):
            left = running.metric("vecsvc_tls_valid_until_seconds", port=port) - time.time()
            assert 0 < left < 40 * 86_400


@pytest.mark.parametrize("workers", [1, 2])
def test_tls_for_front_doors_without_a_port_for_them_is_refused(authority: Authority, workers: int) -> None:
    settings = ServeSettings(port=0, admin_port=0, workers=workers, **files(authority, "lonely"))
    run = serve_workers if workers > 1 else serve
    with pytest.raises(ConfigError, match="shard_tls_cert is of no use without shard_port"):
        run(service.index("numbers"), settings)


def test_a_client_without_a_certificate_gets_no_holdings(node: Service, authority: Authority) -> None:
    port = node.wait_for("listening")["shard_port"]
    context = client_tls("", "", authority.ca, check_hostname=False)
    with (
        contextlib.suppress(ssl.SSLError, ConnectionError),
        socket.create_connection(("127.0.0.1", port), timeout=10) as plain,
        context.wrap_socket(plain) as secure,
    ):
        secure.sendall(remote.message(Kind.HELLO, 0, remote.Hello()))
        assert secure.recv(1) == b""


def test_half_of_the_settings_is_refused_with_what_is_missing(authority: Authority) -> None:
    given = files(authority, "half")
    for lacking in ({"shard_tls_ca": ""}, {"shard_tls_cert": ""}):
        wrong = {**given, **lacking}
        with pytest.raises(ConfigError, match=f"{next(iter(lacking))}"):
            shard_tls(ServeSettings(**wrong), Metrics())
        with pytest.raises(ConfigError, match=f"{next(iter(lacking))}"):
            nodes_tls(RouteSettings(**wrong), Metrics())
