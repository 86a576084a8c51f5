"""Who may call what: keys, scopes and rates, in their file, at the door, and on the command line."""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import service
from click.testing import CliRunner
from local_cluster import end, start
from service import JSON, Reply, Service

from vecsvc import access, admission
from vecsvc.access import Key, Keyring, Scope, added, new_key, parse_keys, removed
from vecsvc.cli import cli
from vecsvc.config import RouteSettings, ServeSettings
from vecsvc.errors import ConfigError, Forbidden, RateLimited, Unauthorized
from vecsvc.front_door import FrontDoor
from vecsvc.process import node, serve
from vecsvc.router import Router
from vecsvc.server import Service as Handlers
from vecsvc.telemetry import Metrics

QUESTION = json.dumps({"id": "t-1", "k": 3}).encode()
HASH = "0" * 64


def write(path: Path, **keys: Any) -> dict[str, str]:
    """A file with new keys, each given by what `added` takes. Returns the keys themselves."""
    data, made = b"", {}
    for name, facts in keys.items():
        made[name] = new_key()
        data = added(data, name, made[name], **facts)
    path.write_bytes(data)
    path.chmod(0o600)
    return made


class Time:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


# ------------------------------------------------------------------------------------------------------ keys


def test_a_key_is_256_random_bits_and_only_its_hash_is_written(tmp_path: Path) -> None:
    assert new_key() != new_key() and len(new_key().removeprefix("vecsvc_")) == 43
    keys = write(tmp_path / "keys.toml", team={"scopes": ["read"]})
    text = (tmp_path / "keys.toml").read_text()
    assert keys["team"] not in text and hashlib.sha256(keys["team"].encode()).hexdigest() in text


def test_several_keys_hold_at_a_time_and_scopes_say_for_what(tmp_path: Path) -> None:
    keys = write(
        tmp_path / "keys.toml",
        old={"scopes": ["read"]},
        new={"scopes": ["read"]},
        ops={"scopes": ["admin"]},
        prometheus={"scopes": ["metrics"]},
    )
    ring = Keyring(tmp_path / "keys.toml")
    allowed: dict[str, set[Scope]] = {
        "old": {"read"},
        "new": {"read"},
        "ops": {"read", "metrics", "admin"},
        "prometheus": {"metrics"},
    }
    for name, key in keys.items():
        for scope in get_args(Scope):
            if scope in allowed[name]:
                assert ring.admit(key, scope).name == name
            elif scope != "open":
                with pytest.raises(Forbidden, match=f"key '{name}' has scope .*, this needs {scope}"):
                    ring.admit(key, scope)


@pytest.mark.parametrize(
    "presented", [None, "", "x", "vecsvc_", "\udcff", "é" * 50, "k" * 257, "k" * 1_000_000, "\x00"]
)
def test_what_is_no_key_is_turned_away(tmp_path: Path, presented: str | None) -> None:
    write(tmp_path / "keys.toml", team={"scopes": ["read"]})
    with pytest.raises(Unauthorized):
        Keyring(tmp_path / "keys.toml").admit(presented, "read")


def test_a_hash_is_no_key(tmp_path: Path) -> None:
    key = write(tmp_path / "keys.toml", team={"scopes": ["read"]})["team"]
    ring = Keyring(tmp_path / "keys.toml")
    for almost in (hashlib.sha256(key.encode()).hexdigest(), key[:-1], key + "=", key.upper(), f" {key}"):
        with pytest.raises(Unauthorized, match="not known"):
            ring.admit(almost, "read")


def test_an_expired_key_is_refused_from_its_moment_on(tmp_path: Path) -> None:
    key = write(tmp_path / "keys.toml", team={"scopes": ["read"], "expires": dt.date(2027, 1, 1)})["team"]
    now = Time()
    ring = Keyring(tmp_path / "keys.toml", now=now)
    now.now = dt.datetime(2026, 12, 31, 23, 59, 59, tzinfo=dt.UTC).timestamp()
    assert ring.admit(key, "read").name == "team"
    now.now += 1
    with pytest.raises(Unauthorized, match="key 'team' has expired at 2027-01-01"):
        ring.admit(key, "read")


def test_moments_with_and_without_offset_are_understood() -> None:
    text = '[keys.{}]\nsha256 = "{}"\nscopes = ["read"]\nexpires = {}\n'
    moments = {
        "2027-01-01": "2027-01-01T00:00:00+00:00",
        "2027-01-01T12:00:00": "2027-01-01T12:00:00+00:00",
        "2027-01-01T12:00:00+02:00": "2027-01-01T10:00:00+00:00",
    }
    for given, meant in moments.items():
        [key] = parse_keys(text.format("a", HASH, given).encode(), "file")
        assert key.expires == dt.datetime.fromisoformat(meant)


def test_a_rate_lets_a_burst_through_and_then_so_many_a_second() -> None:
    key = Key("team", b"", frozenset({"read"}), rate_per_s=4.0, burst=6)
    for _ in range(6):
        key.take(100.0)
    with pytest.raises(RateLimited, match="key 'team' may ask 4 queries a second, and 6 at once") as refused:
        key.take(100.0)
    assert refused.value.retry_after_s == pytest.approx(0.25)
    with pytest.raises(RateLimited):
        key.take(100.2)
    key.take(100.0 + refused.value.retry_after_s)
    for _ in range(6):
        key.take(200.0)  # no more is saved up than the burst
    with pytest.raises(RateLimited):
        key.take(200.0)


def test_what_a_batch_holds_is_owed_by_the_requests_that_follow() -> None:
    key = Key("team", b"", frozenset({"read"}), rate_per_s=10.0)
    assert key.burst == 10
    key.take(0.0)
    key.owe(99)
    with pytest.raises(RateLimited) as refused:
        key.take(0.0)
    assert refused.value.retry_after_s == pytest.approx(9.1)
    key.take(9.2)


def test_a_slow_rate_still_lets_one_query_through_and_no_rate_lets_all() -> None:
    slow = Key("team", b"", frozenset({"read"}), rate_per_s=0.01)
    slow.take(0.0)
    with pytest.raises(RateLimited):
        slow.take(99.0)
    free = Key("team", b"", frozenset({"read"}))
    for _ in range(1000):
        free.take(0.0)
        free.owe(1000)


# ------------------------------------------------------------------------------------------------------ the file


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[keys", "Expected"),
        ("\xff", "codec|Invalid|Expected"),
        ("keys = 3", "'keys' is unknown; write \\[keys.NAME\\]"),
        ("[serve]\nport = 1", "'serve' is unknown; write \\[keys.NAME\\]"),
        ("[keys]\na = 3", "\\[keys.a\\]: must be a table"),
        ('[keys."A b"]', "a name has 1 to 64 of"),
        ('[keys."../x"]', "a name has 1 to 64 of"),
        ("[keys.a]\nscopes = ['read']", "sha256 must be 64 of 0-9 and a-f"),
        (f"[keys.a]\nsha256 = '{'F' * 64}'\nscopes = ['read']", "sha256 must be 64 of 0-9 and a-f"),
        ("[keys.a]\nsha256 = 5\nscopes = ['read']", "sha256 must be 64 of 0-9 and a-f"),
        (f"[keys.a]\nsha256 = '{HASH}'", "scopes must be a list of read, metrics, admin, got None"),
        (f"[keys.a]\nsha256 = '{HASH}'\nscopes = []", "scopes must be a list of"),
        (f"[keys.a]\nsha256 = '{HASH}'\nscopes = 'read'", "scopes must be a list of"),
        (f"[keys.a]\nsha256 = '{HASH}'\nscopes = ['open']", "scopes must be a list of"),
        (f"[keys.a]\nsha256 = '{HASH}'\nscopes = [['read']]", "scopes must be a list of"),
        (f"[keys.a]\nsha256 = '{HASH}'\nscopes = ['read']\nrate = 5", "'rate' is unknown; known are: sha256, scopes"),
        (f"[keys.a]\nsha256 = '{HASH}'\nscopes = ['read']\nrate_per_s = 0", "rate_per_s must be between 0.01 and"),
        (f"[keys.a]\nsha256 = '{HASH}'\nscopes = ['read']\nrate_per_s = nan", "rate_per_s must be between"),
        (f"[keys.a]\nsha256 = '{HASH}'\nscopes = ['read']\nrate_per_s = true", "rate_per_s must be between"),
        (f"[keys.a]\nsha256 = '{HASH}'\nscopes = ['read']\nburst = 5", "burst must be an integer, beside a rate_per_s"),
        (
            f"[keys.a]\nsha256 = '{HASH}'\nscopes = ['read']\nrate_per_s = 1\nburst = 1.5",
            "burst must be an integer, beside a rate_per_s",
        ),
        (f"[keys.a]\nsha256 = '{HASH}'\nscopes = ['read']\nexpires = '2027-01-01'", "a date like 2027-01-01, without"),
        (
            f"[keys.a]\nsha256 = '{HASH}'\nscopes = ['read']\n[keys.b]\nsha256 = '{HASH}'\nscopes = ['read']",
            "a and b are the same key; remove one",
        ),
        ("\n".join(f"[keys.k{i}]" for i in range(access.MAX_KEYS + 1)), "has 1001 keys, the limit is 1000"),
    ],
)
def test_a_broken_file_is_refused_and_says_what_would_be_right(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        parse_keys(text.encode("latin-1"), "the/file")
    assert "the/file" in str(refused.value)


def test_a_file_that_others_may_write_is_refused_and_one_they_may_read_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "keys.toml"
    write(file, team={"scopes": ["read"]})
    file.chmod(0o644)
    with caplog.at_level(logging.WARNING, "vecsvc.access"):
        assert len(access.read_keys(file)) == 1
    assert [record.message for record in caplog.records] == ["everybody may read the keys' hashes"]
    file.chmod(0o602)
    with pytest.raises(ConfigError, match=r"everybody may write .*keys\.toml: chmod 600"):
        access.read_keys(file)


def test_a_file_that_is_missing_or_too_long_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing\.toml: No such file"):
        Keyring(tmp_path / "missing.toml")
    with pytest.raises(ConfigError, match="Is a directory"):
        Keyring(tmp_path)
    (tmp_path / "long.toml").write_bytes(b"#" * (access.MAX_FILE_BYTES + 1))
    with pytest.raises(ConfigError, match=f"has more than {access.MAX_FILE_BYTES} bytes"):
        Keyring(tmp_path / "long.toml")


def test_a_changed_file_is_read_within_a_second(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file, clock = tmp_path / "keys.toml", Time()
    old = write(file, team={"scopes": ["read"]})["team"]
    ring = Keyring(file, clock)
    new = write(file, other={"scopes": ["read"]})["other"]
    ring.admit(old, "read")
    clock.now += 1.0
    with caplog.at_level(logging.INFO, "vecsvc.access"):
        assert ring.admit(new, "read").name == "other"
    assert [record.message for record in caplog.records] == ["keys changed"]
    with pytest.raises(Unauthorized):
        ring.admit(old, "read")
    file.write_bytes(b"")
    clock.now += 1.0
    with pytest.raises(Unauthorized):
        ring.admit(new, "read")
    told = caplog.records[-1]
    assert told.levelno == logging.WARNING and told.data["keys"] == [] and "nobody may ask" in told.data["remedy"]  # type: ignore[attr-defined]


@pytest.mark.parametrize("broken", [b"[keys", b"[keys.a]\nsha256 = 5", None])
def test_a_broken_new_file_leaves_the_old_keys_in_force_and_the_log_says_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, broken: bytes | None
) -> None:
    file, clock = tmp_path / "keys.toml", Time()
    key = write(file, team={"scopes": ["read"]})["team"]
    good = file.read_bytes()
    ring = Keyring(file, clock)
    file.unlink()
    if broken is not None:
        file.write_bytes(broken)
    with caplog.at_level(logging.INFO, "vecsvc.access"):
        for _ in range(5):
            clock.now += 1.0
            assert ring.admit(key, "read").name == "team"
    [told] = [record for record in caplog.records if record.message == "keys not read"]
    assert "keys.toml" in told.data["why"]  # type: ignore[attr-defined]
    file.unlink(missing_ok=True)
    file.write_bytes(added(good, "other", "x" * 50, scopes=["read"]))
    clock.now += 1.0
    assert ring.admit("x" * 50, "read").name == "other" and ring.admit(key, "read").name == "team"


def test_being_read_again_gives_no_key_a_fresh_burst(tmp_path: Path) -> None:
    file, clock = tmp_path / "keys.toml", Time()
    key = write(file, team={"scopes": ["read"], "rate_per_s": 0.01, "burst": 2})["team"]
    ring = Keyring(file, clock)
    for _ in range(2):
        ring.take(ring.admit(key, "read"))
    file.write_bytes(file.read_bytes() + b"\n# touched\n")
    clock.now += 1.0
    with pytest.raises(RateLimited):
        ring.take(ring.admit(key, "read"))


def test_removing_a_key_leaves_the_rest_of_the_file_as_it_is() -> None:
    data = b"# of the search team\n" + added(b"", "a", "x" * 40, scopes=["read"]) + b"# until spring\n"
    data = added(added(data, "b", "y" * 40, scopes=["admin"]), "c", "z" * 40, scopes=["read"])
    without = removed(data, "b")
    assert [key.name for key in parse_keys(without, "file")] == ["a", "c"]
    assert without.startswith(b"# of the search team\n[keys.a]") and b"# until spring" in without
    assert parse_keys(removed(removed(without, "a"), "c"), "file") == []
    with pytest.raises(ConfigError, match="there is no key 'x'; there are: a, b, c"):
        removed(data, "x")


def test_a_key_that_is_written_in_another_way_is_left_to_its_writer() -> None:
    data = f'keys = {{a = {{sha256 = "{HASH}", scopes = ["read"]}}}}'.encode()
    with pytest.raises(ConfigError, match="remove it by hand"):
        removed(data, "a")


# ------------------------------------------------------------------------------------------------------ commands


def run(*words: str) -> Any:
    return CliRunner().invoke(cli, ["keys", *words], catch_exceptions=True)


def test_the_commands_make_list_and_remove_keys(tmp_path: Path) -> None:
    file = str(tmp_path / "keys.toml")
    os.umask(os.umask(0o022))
    made = run("new", "search-team", "--file", file, "--rate", "50", "--expires", "2099-01-01")
    assert made.exit_code == 0 and "shown nowhere else" in made.stderr
    key = made.stdout.strip()
    assert (tmp_path / "keys.toml").stat().st_mode & 0o777 == 0o600
    assert Keyring(tmp_path / "keys.toml").admit(key, "read").rate_per_s == 50
    assert run("new", "ops", "--file", file, "--scope", "admin", "--scope", "metrics").exit_code == 0
    gone = run("new", "late", "--file", file, "--expires", "2020-01-01")
    assert gone.exit_code != 0 and "--expires is 2020-01-01, so the key would be refused" in str(gone.exception)
    expired = added(Path(file).read_bytes(), "old", new_key(), scopes=["read"], expires=dt.date(2020, 1, 1))
    Path(file).write_bytes(expired)
    assert run("list", file).stdout.splitlines() == [
        "search-team  read  50/s, 50 at once  until 2099-01-01T00:00:00+00:00",
        "ops  admin,metrics  no limit  for ever",
        "old  read  no limit  expired",
    ]
    assert run("remove", "search-team", "--file", file).exit_code == 0
    with pytest.raises(Unauthorized):
        Keyring(tmp_path / "keys.toml").admit(key, "read")
    assert (tmp_path / "keys.toml").stat().st_mode & 0o777 == 0o600
    assert sorted(path.name for path in tmp_path.iterdir()) == ["keys.toml"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("new", "ops"), "there is a key 'ops' already"),
        (("new", "No Name"), "a name has 1 to 64 of"),
        (("remove", "nobody"), "there is no key 'nobody'; there are: ops"),
    ],
)
def test_a_command_that_cannot_be_done_changes_nothing(tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    file = tmp_path / "keys.toml"
    write(file, ops={"scopes": ["admin"]})
    before = file.read_bytes()
    failed = run(*words, "--file", str(file))
    assert isinstance(failed.exception, ConfigError) and message in str(failed.exception)
    assert not failed.stdout and file.read_bytes() == before
    file.write_bytes(b"[half")
    assert f"keys: {file}: " in str(run(*words, "--file", str(file)).exception) or words[1] == "No Name"


def test_a_folder_that_is_missing_is_named(tmp_path: Path) -> None:
    failed = run("new", "ops", "--file", str(tmp_path / "none" / "keys.toml"))
    assert isinstance(failed.exception, ConfigError) and "none is no folder; make it first" in str(failed.exception)


# ------------------------------------------------------------------------------------------------------ the door


@pytest.fixture(scope="module")
def keys_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keys") / "keys.toml"


@pytest.fixture(scope="module")
def keys(keys_file: Path) -> dict[str, str]:
    return write(
        keys_file,
        team={"scopes": ["read"]},
        ops={"scopes": ["admin"]},
        prometheus={"scopes": ["metrics"]},
        gone={"scopes": ["admin"], "expires": dt.date(2020, 1, 1)},
        slow={"scopes": ["read"], "rate_per_s": 0.01, "burst": 3},
        owing={"scopes": ["read"], "rate_per_s": 0.01, "burst": 101},
        wrong={"scopes": ["read"], "rate_per_s": 0.01, "burst": 3},
    )


@pytest.fixture(scope="module")
def guarded(keys_file: Path, keys: dict[str, str]) -> Iterator[Service]:
    with service.running(service.index("texts"), keys=keys_file, reload_poll_s=0) as running:
        yield running


@pytest.fixture(scope="module")
def guarded_door(keys_file: Path, keys: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A front door that knows no nodes: who may ask is decided before it would need any."""
    nodes = tmp_path_factory.mktemp("route") / "nodes.toml"
    nodes.write_text('nodes = ["127.0.0.1:1"]\n')
    door = start("route", config=nodes, keys=keys_file)
    yield door
    end(door)


def handlers_of(what: str, tmp_path: Path) -> Handlers:
    if what == "node":
        return node(service.index("texts"), ServeSettings())[2]
    (tmp_path / "nodes.toml").write_text('nodes = ["127.0.0.1:1"]\n')
    settings, metrics = RouteSettings(config=str(tmp_path / "nodes.toml")), Metrics()
    return Handlers(FrontDoor(Router(settings, metrics, None), settings, metrics), settings, metrics)


@pytest.mark.parametrize("what", ["node", "front door"])
def test_every_route_of_every_application_declares_who_may_call_it(what: str, tmp_path: Path) -> None:
    handlers = handlers_of(what, tmp_path)
    apps = (handlers.app(), handlers.admin_app())
    routes = [route for app in apps for route in app.router.routes()]
    assert len(routes) > 15 and set(handlers.routes) == set(routes)
    for route in routes:
        declared = handlers.routes[route]
        assert declared.scope in get_args(Scope) and declared.load in get_args(admission.Load)
        assert (declared.method, declared.path) == (route.method, route.resource and route.resource.canonical)
    open_to_all = {declared.path for declared in handlers.routes.values() if declared.scope == "open"}
    assert open_to_all == {"/livez", "/readyz"}


@pytest.mark.parametrize("what", ["node", "front door"])
def test_no_route_answers_without_a_key_but_the_probes(
    what: str, keys: dict[str, str], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    running: Service = request.getfixturevalue("guarded" if what == "node" else "guarded_door")
    handlers = handlers_of(what, tmp_path)
    for admin, app in ((False, handlers.app()), (True, handlers.admin_app())):
        for route in app.router.routes():
            declared = handlers.routes[route]
            path = declared.path.replace("{name}", "texts")
            bare = running.ask(declared.method, path, b"{}", JSON, admin=admin)
            if declared.scope == "open":
                assert bare.status in (200, 503), path
                continue
            assert bare.status == 401 and bare.headers["www-authenticate"] == 'Bearer realm="vecsvc"', path
            for holder, scopes in {"team": {"read"}, "prometheus": {"metrics"}, "gone": set()}.items():
                headers = JSON | {"X-API-Key": keys[holder]}
                reply = running.ask(declared.method, path, b"{}", headers, admin=admin)
                expected = 401 if holder == "gone" else 403
                assert (reply.status == expected) == (declared.scope not in scopes), (path, holder, reply)


def test_refusals_have_the_shape_of_their_path(guarded: Service) -> None:
    assert "a key is needed" in guarded.get("/indexes").message
    assert guarded.get("/indexes").json()["error"]["code"] == "unauthorized"
    assert guarded.post("/v1/embeddings", {}).json()["error"]["type"] == "invalid_request_error"
    assert guarded.post("/embed", {}).json()["error_type"] == "Validation"


def with_key(guarded: Service, headers: dict[str, str]) -> Reply:
    return guarded.ask("POST", "/search", QUESTION, JSON | headers)


def test_a_key_is_sent_as_a_bearer_or_in_a_header_of_its_own(guarded: Service, keys: dict[str, str]) -> None:
    key = keys["team"]
    for headers in (
        {"Authorization": f"Bearer {key}"},
        {"Authorization": f"bearer   {key}"},
        {"X-API-Key": key},
        {"x-api-key": key, "Authorization": "Basic eDp5"},
    ):
        assert len(with_key(guarded, headers).results) == 3
    for headers in (
        {"Authorization": key},
        {"Authorization": f"Basic {key}"},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer "},
        {"X-API-Key": "", "Authorization": f"Bearer {key}"},
        {"X-API-Key": "wrong", "Authorization": f"Bearer {key}"},
        {"X-API-Key": key + "x"},
        {"X-API-Key": "\xff\xfe"},
    ):
        assert with_key(guarded, headers).status == 401
    assert guarded.get(f"/indexes?key={key}&api_key={key}").status == 401


def test_the_openai_client_s_key_is_ours(guarded: Service, keys: dict[str, str]) -> None:
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{guarded.url}/v1", api_key=keys["team"], max_retries=0) as client:
        assert len(client.embeddings.create(model="default", input="red").data) == 1
    client = openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="wrong", max_retries=0)
    with client, pytest.raises(openai.AuthenticationError):
        client.embeddings.create(model="default", input="red")


def test_paths_that_are_none_are_404_for_everybody(guarded: Service, keys: dict[str, str]) -> None:
    assert guarded.get("/nothing").status == 404
    assert guarded.ask("DELETE", "/search").status == 405
    assert guarded.get("/indexes/nothing").status == 401, "which indexes there are is not told to strangers"
    assert guarded.get("/indexes/nothing", X_API_Key=keys["team"]).status == 404


def test_the_rate_of_a_key_is_429_and_says_when_to_come_again(guarded: Service, keys: dict[str, str]) -> None:
    replies = [with_key(guarded, {"X-API-Key": keys["slow"]}) for _ in range(4)]
    assert [reply.status for reply in replies] == [200, 200, 200, 429]
    refused = replies[-1]
    error = refused.json()["error"]
    assert error["code"] == "rate_limited" and 50_000 < error["retry_after_ms"] <= 100_000
    assert int(refused.headers["retry-after"]) == -(-error["retry_after_ms"] // 1000)
    assert int(refused.headers["retry-after-ms"]) == error["retry_after_ms"]
    assert with_key(guarded, {"X-API-Key": keys["team"]}).status == 200, "the others have their own"


def test_a_wrong_question_counts_once(guarded: Service, keys: dict[str, str]) -> None:
    headers, body = JSON | {"X-API-Key": keys["wrong"]}, json.dumps({"vector": [1.0]}).encode()
    statuses = [guarded.ask("POST", "/search", body, headers).status for _ in range(4)]
    assert statuses == [422, 422, 422, 429]


def test_a_batch_counts_as_many_queries_as_it_has(guarded: Service, keys: dict[str, str]) -> None:
    headers = JSON | {"X-API-Key": keys["owing"]}
    rows, too_many = (json.dumps({"vectors": [[1.0] * service.DIM] * n}).encode() for n in (100, 102))
    never = guarded.ask("POST", "/search/batch", too_many, headers)
    assert never.status == 422 and "102 queries or texts" in never.message and "101 at once" in never.message
    assert guarded.ask("POST", "/search/batch", rows, headers).status == 200
    refused = guarded.ask("POST", "/search/batch", rows, headers)
    assert refused.status == 429 and refused.json()["error"]["retry_after_ms"] > 1000


def test_who_was_let_in_is_logged_by_name_and_no_key_ever_is(keys_file: Path, keys: dict[str, str]) -> None:
    with service.running(service.index("texts"), keys=keys_file, log="all") as running:
        with_key(running, {"Authorization": f"Bearer {keys['team']}"})
        with_key(running, {"Authorization": f"Bearer wrong-{keys['team']}"})
        running.get("/indexes", X_API_Key=keys["ops"])
        running.wait_for("request")
        end = time.monotonic() + 5
        while len(lines := [line for line in running.log() if line["message"] == "request"]) < 3:
            assert time.monotonic() < end
        assert [(line["status"], line.get("key")) for line in lines] == [(200, "team"), (401, None), (200, "ops")]
        text = running.log_file.read_text()
    assert not any(key in text for key in keys.values())


def test_failed_attempts_do_not_fill_the_log(keys_file: Path, keys: dict[str, str]) -> None:
    with service.running(service.index("texts"), keys=keys_file) as running:
        with contextlib.closing(running.connect()) as connection:
            for number in range(300):
                assert service.ask(connection, "GET", "/indexes", headers={"X-API-Key": str(number)}).status == 401
            refused = [line for line in running.log() if line.get("status") == 401]
            # There is room for what else fails.
            assert running.get("/indexes/nothing", X_API_Key=keys["team"]).status == 404
        left_out = running.wait_for("lines left out")
        assert len(refused) < 150 and left_out["limit"] == "REFUSAL_LINES_PER_S"
        assert any(line.get("status") == 404 for line in running.log())
        assert running.ask("GET", "/metrics", headers={"X-API-Key": keys["prometheus"]}, admin=True).status == 200


def test_keys_are_rotated_without_a_restart(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    old = write(file, old={"scopes": ["read"]})["old"]
    with service.running(service.index("texts"), keys=file) as running:
        new = run("new", "new", "--file", str(file)).stdout.strip()
        wait_for(lambda: with_key(running, {"X-API-Key": new}).status == 200)
        assert with_key(running, {"X-API-Key": old}).status == 200
        run("remove", "old", "--file", str(file))
        wait_for(lambda: with_key(running, {"X-API-Key": old}).status == 401)
        file.write_text("[keys")
        wait_for(
            lambda: (
                with_key(running, {"X-API-Key": new}).status == 200 and "keys not read" in running.log_file.read_text()
            )
        )
        assert with_key(running, {"X-API-Key": new}).status == 200 and running.get("/readyz").status == 200


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_service_does_not_start_with_a_broken_file(tmp_path: Path) -> None:
    (tmp_path / "keys.toml").write_text("[keys")
    with pytest.raises(ConfigError, match=r"keys\.toml: Expected"):
        serve(service.index("texts"), ServeSettings(keys=str(tmp_path / "keys.toml"), port=0, admin_port=0))


@pytest.mark.parametrize(("host", "loopback"), [("127.0.0.1", True), ("::1", True), ("localhost", True), ("", False)])
def test_what_only_this_machine_reaches_is_known(host: str, loopback: bool) -> None:
    assert access.is_loopback(host) == loopback
    assert not any(map(access.is_loopback, ("0.0.0.0", "::", "10.0.0.1", "example.org", "127.0.0.1.example.org")))


def test_serving_others_without_keys_is_told(keys_file: Path, keys: dict[str, str]) -> None:
    with service.running(service.index("texts"), host="0.0.0.0") as running:
        assert running.wait_for("whoever reaches the port may ask")["hosts"] == ["0.0.0.0"]
    with service.running(service.index("texts"), host="0.0.0.0", keys=keys_file) as running:
        assert not any("whoever reaches" in line["message"] for line in running.log())
