"""The short way at a front door: a question waits for its shards without a task, and is answered as on the long way."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from aiohttp import web
from local_cluster import Cluster, cluster, end, nodes, wait_until
from service import BINARY, DIM, JSON, TOLD, Reply, Service, answers, ask, at_once, index, plain, post, read_all, ways

from vecsvc import front_door
from vecsvc.access import added, new_key
from vecsvc.config import RouteSettings
from vecsvc.direct import DirectHandler
from vecsvc.errors import NodeFailed, ShardsMissing
from vecsvc.front_door import FrontDoor
from vecsvc.reaper import Reaper
from vecsvc.telemetry import Metrics
from vecsvc.types import BatchAnswer, Coverage, SearchSettings, ServedIndex, Stats, TookMs, VectorQuery

VECTOR = [0.5] * DIM
RAW = np.array(VECTOR, np.float32).tobytes()
PATIENT = 20_000.0


def question(**more: Any) -> bytes:
    return json.dumps({"vector": VECTOR, "k": 5, **more}).encode()


@pytest.fixture(scope="module")
def shared() -> Iterator[Cluster]:
    """Two nodes for the three shards, a front door that tells of its ways, and one whose only way is the long one."""
    with cluster(index("sharded"), ["0-1", "2"], doors=0) as made:
        made.add_door(prelude=TOLD)
        made.add_door(log="all")
        for door in made.doors:
            door.wait_for("ready")
        yield made


@pytest.fixture
def both(shared: Cluster) -> Iterator[Cluster]:
    yield shared
    shared.heal()
    for door in shared.doors:
        wait_until(lambda door=door: door.ask("POST", "/search", question(), JSON).status == 200)


def replies(both: Cluster, body: bytes, path: str = "/search", headers: dict[str, str] = JSON) -> list[Reply]:
    before = len(ways(both.door))
    found = [at_once(door, path, body, headers) for door in both.doors]
    assert ways(both.door)[before:] == ["short"]
    return found


def in_flight(door: Service) -> float:
    return door.metric("vecsvc_in_flight")


@pytest.mark.parametrize(
    ("path", "body", "headers"),
    [
        ("/search", question(), JSON),
        ("/indexes/sharded/search", question(k=100), JSON),
        ("/search?k=5", RAW, BINARY),
        ("/search", question(include=["vector", "fields"]), JSON),
        ("/search", question(include=["explain"], params={"exact": True}), JSON),
        ("/search", question(rerank={"depth": 50}, partial=True), JSON),
    ],
    ids=["json", "many", "raw", "fields", "explain", "rerank"],
)
def test_it_answers_as_the_long_way_does(both: Cluster, path: str, body: bytes, headers: dict[str, str]) -> None:
    short, long = replies(both, body, path, headers)
    assert plain(short) == plain(long) and short.status == 200
    assert json.loads(short.body)["coverage"] == {"shards_ok": 3, "shards_total": 3, "degraded": []}


def test_what_is_asked_by_a_text_or_an_id_has_a_task_and_what_is_wrong_goes_the_long_way(both: Cluster) -> None:
    before = len(ways(both.door))
    asked: list[Any] = [{"id": 3}, {"text": "rivers"}, {"vector": VECTOR[:-1]}, {"vector": VECTOR, "k": 10_000_000}]
    for one in asked:
        found = [plain(door.ask("POST", "/search", json.dumps(one).encode(), JSON)) for door in both.doors]
        assert found[0] == found[1], one
    assert ways(both.door)[before:] == ["short", "short", "long", "long"]


def test_keys_and_rates_hold_as_on_the_long_way(shared: Cluster, tmp_path: Path) -> None:
    """Of one question and of a batch, whose queries are all counted."""
    names = {"reader": {"scopes": ["read"]}, "meter": {"scopes": ["metrics"]}}
    limited = {f"slow{n}": {"scopes": ["read"], "rate_per_s": 0.01, "burst": 4} for n in range(2)}
    keys, data = {name: new_key() for name in (*names, *limited)}, b""
    for name, facts in (names | limited).items():
        data = added(data, name, keys[name], **facts)
    file = tmp_path / "keys.toml"
    file.write_bytes(data)
    file.chmod(0o600)
    batch = json.dumps({"vectors": [VECTOR] * 3, "k": 2}).encode()
    doors = [shared.add_door(keys=str(file), prelude=TOLD), shared.add_door(keys=str(file), log="all")]
    try:
        for door in doors:
            door.wait_for("ready")
        asked: list[tuple[str, bytes, str | None, int]] = [
            ("/search", question(), None, 401),
            ("/search", question(), "nobody", 401),
            ("/search", question(), "meter", 403),
            ("/search", question(), "reader", 200),
            ("/search/batch", batch, None, 401),
            ("/search/batch", batch, "meter", 403),
            ("/search/batch", batch, "reader", 200),
            ("/search", question(), "slow0", 200),
            ("/search/batch", batch, "slow0", 200),
            ("/search", question(), "slow0", 429),
            ("/search/batch", batch, "slow1", 200),
            ("/search", question(), "slow1", 200),
            ("/search/batch", batch, "slow1", 429),
        ]
        for path, body, name, status in asked:
            headers = {**JSON, **({"Authorization": f"Bearer {keys.get(name, 'nothing')}"} if name else {})}
            before = len(ways(doors[0]))
            found = [at_once(door, path, body, headers) for door in doors]
            assert [reply.status for reply in found] == [status] * 2, (path, name)
            assert (ways(doors[0])[before:] == ["short"]) == (status == 200)
            if status == 200:
                assert plain(found[0]) == plain(found[1])
            else:
                assert json.loads(found[0].body)["error"]["code"] == json.loads(found[1].body)["error"]["code"]
    finally:
        for door in doors:
            shared.doors.remove(door)
            end(door)


def test_a_shard_that_is_gone_is_said_as_on_the_long_way(both: Cluster) -> None:
    [last] = both.of("2")
    last.stop()
    for door in both.doors:
        wait_until(lambda door=door: nodes(door)["up"] == 1)
    short, long = replies(both, question())
    assert plain(short) == plain(long) and short.status == 503 and int(short.headers["retry-after"]) >= 1
    short, long = replies(both, question(partial=True))
    assert plain(short) == plain(long) and json.loads(short.body)["coverage"]["shards_ok"] == 2


def test_a_shard_that_hangs_ends_in_time(both: Cluster) -> None:
    both.of("2")[0].fail(delay_ms=60_000)
    began = time.monotonic()
    requests = both.door.metric("vecsvc_requests_total", operation="/search", status="504")
    short, long = replies(both, question(timeout_ms=300))
    assert short.status == long.status == 504 and time.monotonic() - began < 10
    assert json.loads(short.body)["error"]["code"] == json.loads(long.body)["error"]["code"] == "deadline_exceeded"
    assert both.door.metric("vecsvc_requests_total", operation="/search", status="504") == requests + 1
    told = [line for line in both.door.log() if line.get("status") == 504]
    assert told[-1]["path"] == "/search" and told[-1]["request_id"] == short.headers["x-request-id"]
    short, long = replies(both, question(timeout_ms=300, partial=True))
    assert json.loads(short.body)["coverage"]["shards_ok"] == 2
    assert in_flight(both.door) == 0


@pytest.mark.parametrize("pause_s", [0.0, 0.05], ids=["at once", "one by one"])
def test_answers_keep_the_order_of_questions(both: Cluster, pause_s: float) -> None:
    """What comes while the shards are asked waits, be it a question, half of one, or one for the long way."""
    both.of("2")[0].fail(delay_ms=150)
    messages = [
        post(question(k=1, timeout_ms=PATIENT)),
        post(question(k=2, timeout_ms=PATIENT)),
        post(json.dumps({"vector": VECTOR, "k": 3, "include": ["fields"], "timeout_ms": PATIENT}).encode()),
        post(json.dumps({"vectors": [VECTOR], "k": 4, "timeout_ms": PATIENT}).encode(), "/search/batch"),
        post(question(k=5, timeout_ms=PATIENT)),
    ]
    stream = b"".join(messages)
    with both.door.socket() as sock:
        for piece in [stream] if not pause_s else [stream[at : at + 211] for at in range(0, len(stream), 211)]:
            sock.sendall(piece)
            time.sleep(pause_s)
        found = answers(sock, 5)
    lists = [one["results"][0] if isinstance(one["results"][0], list) else one["results"] for one in found]
    assert [len(hits) for hits in lists] == [1, 2, 3, 4, 5]
    assert len({hits[0]["id"] for hits in lists}) == 1


def test_a_client_that_leaves_calls_its_question_off_and_is_counted_whichever_way_it_went(both: Cluster) -> None:
    """The long way does not notice before the question is over."""
    both.of("2")[0].fail(delay_ms=60_000)
    for door, timeout_ms in zip(both.doors, (PATIENT, 500.0), strict=True):
        labels = {"operation": "/search", "status": "499"}
        left = door.metric("vecsvc_requests_total", **labels)
        with door.socket() as sock:
            sock.sendall(post(question(timeout_ms=timeout_ms)))
            wait_until(lambda door=door: in_flight(door) == 1)
        wait_until(lambda door=door: in_flight(door) == 0, timeout_s=5)
        wait_until(lambda: door.metric("vecsvc_requests_total", **labels) == left + 1)  # noqa: B023


def test_a_client_that_sent_more_and_leaves_calls_its_question_off(both: Cluster) -> None:
    both.of("2")[0].fail(delay_ms=60_000)
    with both.door.socket() as sock:
        sock.sendall(post(question(timeout_ms=PATIENT)))
        wait_until(lambda: in_flight(both.door) == 1)
        sock.sendall(post(question(timeout_ms=PATIENT)) * 3)
    wait_until(lambda: in_flight(both.door) == 0, timeout_s=5)


def test_what_comes_behind_a_question_is_read_up_to_a_bound(both: Cluster) -> None:
    """A megabyte behind a slow question waits in the kernel, and is answered when its turn comes."""
    both.of("2")[0].fail(delay_ms=1_000)
    batch = json.dumps({"vectors": [VECTOR] * 9, "k": 1, "timeout_ms": PATIENT}).encode().ljust(1_000_000)
    with both.door.socket(timeout_s=30) as sock:
        sock.sendall(post(question(k=2, timeout_ms=PATIENT)))
        wait_until(lambda: in_flight(both.door) == 1)
        sender = threading.Thread(target=sock.sendall, args=(post(batch, "/search/batch"),))
        sender.start()
        first, second = answers(sock, 2)
        sender.join()
    assert len(first["results"]) == 2 and len(second["results"]) == 9


def test_a_client_that_leaves_as_its_answer_comes_is_forgotten() -> None:
    """Its transport closes already, and the loss of the connection is not told yet."""

    async def main() -> None:
        reaper = Reaper(RouteSettings(config="x"))
        server = web.Server(lambda request: asyncio.sleep(0, web.Response()))  # type: ignore[arg-type]
        handler = DirectHandler(server, direct=None, reaper=reaper)
        transport: Any = SimpleNamespace(is_closing=lambda: True, get_write_buffer_size=lambda: 0)
        handler.transport = transport
        called_off: list[int] = []
        handler._call_off = lambda: called_off.append(1)
        reaper.asked(handler)
        assert not reaper.quiet([])
        handler._later(b"too late")
        assert reaper.quiet([]) and not called_off

    asyncio.run(main())


def test_a_slow_question_outlives_the_limits_of_an_idle_connection(both: Cluster) -> None:
    door = both.add_door(prelude=TOLD, keepalive_s=1, header_timeout_s=0.5)
    door.wait_for("ready")
    try:
        both.of("2")[0].fail(delay_ms=3_000)
        with door.socket() as sock:
            sock.sendall(post(question(timeout_ms=PATIENT)))
            [answer] = answers(sock, 1)
            assert len(answer["results"]) == 5 and ways(door)[-1] == "short"
            began = time.monotonic()
            assert read_all(sock) == b"" and time.monotonic() - began < 4, "then it is idle"
    finally:
        both.doors.remove(door)
        end(door)


def test_what_was_asked_before_sigterm_is_answered(both: Cluster) -> None:
    door = both.add_door(prelude=TOLD)
    door.wait_for("ready")
    try:
        both.of("2")[0].fail(delay_ms=1_000)
        with door.socket() as sock, contextlib.closing(door.connect()) as kept:
            assert ask(kept, "POST", "/search", question(timeout_ms=PATIENT), JSON).status == 200
            sock.sendall(post(question(timeout_ms=PATIENT)))
            wait_until(lambda: in_flight(door) == 1)
            door.process.send_signal(signal.SIGTERM)
            door.wait_for("draining")
            received = read_all(sock)
            assert received.startswith(b"HTTP/1.1 200 OK") and b"\r\nConnection: close\r\n" in received
            assert ways(door)[-1] == "short"
        assert door.process.wait(20) == 0
    finally:
        both.doors.remove(door)
        end(door)


def test_a_full_front_door_refuses_at_once(both: Cluster) -> None:
    door = both.add_door(prelude=TOLD, max_in_flight=1)
    door.wait_for("ready")
    try:
        both.of("2")[0].fail(delay_ms=500)
        with door.socket() as first, door.socket() as second:
            first.sendall(post(question(timeout_ms=PATIENT)))
            wait_until(lambda: in_flight(door) == 1)
            began = time.monotonic()
            refused = at_once(door, "/search", question(), JSON)
            assert refused.status == 429 and time.monotonic() - began < 0.4
            answers(first, 1)
            second.sendall(post(question(timeout_ms=PATIENT)))
            answers(second, 1)
    finally:
        both.doors.remove(door)
        end(door)


class FakeCall:
    """Ends in the next round of the loop with what its version stands for."""

    def __init__(self, outcome: Any) -> None:
        self.outcome, self.finished, self.stopped = outcome, False, False

    def begin(self, tell: Any) -> None:
        asyncio.get_running_loop().call_soon(tell)

    def stop(self) -> None:
        self.stopped = True

    def end(self) -> None:
        if isinstance(self.outcome, Exception):
            raise self.outcome


class FakeAsked:
    """A question of a version that is its own outcome."""

    is_long_to_route = is_long_to_merge = False

    def __init__(self, version: Any, vectors: Any, settings: Any, clock: Any) -> None:
        self.version, self.vectors, self.settings, self.clock = version, vectors, settings, clock

    def find_groups(self) -> None: ...

    def call(self, router: Any) -> FakeCall:
        return FakeCall(self.version.outcome)

    def hits(self) -> list[Any]:
        return []

    def answer(self, *_: Any) -> BatchAnswer:
        if self.version.outcome == "a bug":
            raise ZeroDivisionError
        return BatchAnswer([[]], TookMs(0, 0, 0, 0, 0), Coverage(1, 1, []), Stats("x", 0, 0), self.version.id)


def outcomes(monkeypatch: pytest.MonkeyPatch, *versions: Any, calls_off: bool = False) -> tuple[list[Any], FrontDoor]:
    """What is told of a question where one version after the other serves, each the outcome of asking it."""
    monkeypatch.setattr(front_door, "Asked", FakeAsked)
    monkeypatch.setattr(front_door, "_check", lambda *_: None)
    made = [
        SimpleNamespace(name="it", digest=str(number), outcome=outcome, id=ServedIndex("it", str(number)))
        for number, outcome in enumerate(versions)
    ]
    told: list[Any] = []

    async def main() -> FrontDoor:
        router: Any = SimpleNamespace(serving={"it": made[0]}, problems={}, problem=lambda: "")
        door = FrontDoor(router, RouteSettings(config="x"), Metrics())
        query = VectorQuery(np.zeros((1, DIM), np.float32))
        stop = door.search_soon("it", query, SearchSettings(), told.append)
        assert stop is not None and not told and door.in_flight == 1
        for version in made[1:]:
            router.serving = {"it": version}
            await asyncio.sleep(0)
        if calls_off:
            stop()
        await asyncio.sleep(0.01)
        door.close()
        return door

    return told, asyncio.run(main())


def test_what_serves_when_a_version_went_answers_the_question_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = ShardsMissing("it went")
    [answer], door = outcomes(monkeypatch, gone, "fine")
    assert answer.index.version == "1" and door.in_flight == 0
    assert outcomes(monkeypatch, gone)[0] == [gone]
    assert outcomes(monkeypatch, gone, gone, "fine")[0] == [gone], "once is enough"
    assert outcomes(monkeypatch, NodeFailed("it broke off"), "fine")[0][0].args == ("it broke off",)


def test_an_error_of_ours_is_told_and_leaves_no_place_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    [error], door = outcomes(monkeypatch, "a bug")
    assert isinstance(error, ZeroDivisionError) and door.in_flight == 0


def test_of_a_question_that_was_called_off_nothing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    told, door = outcomes(monkeypatch, "fine", calls_off=True)
    assert not told and door.in_flight == 0
