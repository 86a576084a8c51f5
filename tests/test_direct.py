"""The short way answers what the long way would, to the letter, and leaves alone whatever is out of the ordinary."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import itertools
import json
import random
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import service
from aiohttp import web
from service import BINARY, DIM, JSON, JSON_TYPE, TOLD, Service, answers, at_once, plain, post, ways

from vecsvc import direct
from vecsvc.admission import LARGE_BYTES
from vecsvc.config import ServeSettings
from vecsvc.process import node
from vecsvc.server import Connection

VECTOR = [0.5] * DIM
QUESTION = json.dumps({"vector": VECTOR, "k": 5}).encode()
RAW = np.array(VECTOR, np.float32).tobytes()
LONG = "import vecsvc.server as s; s.usable = lambda: False"


@pytest.fixture(scope="module")
def short() -> Iterator[Service]:
    with service.running(service.index("products"), TOLD, inline_ms=100, reload_poll_s=0) as running:
        warm(running)
        yield running


@pytest.fixture(scope="module")
def long() -> Iterator[Service]:
    with service.running(service.index("products"), LONG, inline_ms=100, reload_poll_s=0) as running:
        warm(running)
        yield running


def warm(running: Service) -> None:
    """So that the likes of the questions below are known to be short."""
    for include in ([], ["fields"], ["vector", "explain"]):
        for k in (5, 10):
            for _ in range(2):
                running.search(vector=VECTOR, k=k, include=include)


def test_this_aiohttp_is_one_with_which_the_short_way_works() -> None:
    assert direct.usable()


SHORT: dict[str, tuple[str, bytes, dict[str, str]]] = {
    "json": ("/search", QUESTION, JSON),
    "json with a charset": ("/search", QUESTION, {"Content-Type": JSON_TYPE}),
    "base64": (
        "/search",
        json.dumps({"vector": {"base64": base64.b64encode(RAW).decode()}, "k": 5}).encode(),
        JSON,
    ),
    "named index": ("/indexes/products/search", QUESTION, JSON),
    "raw": ("/search", RAW, BINARY),
    "raw with settings": ("/search?k=5&timeout_ms=1000", RAW, BINARY),
    "raw, named index": ("/indexes/products/search?top_k=5", RAW, BINARY),
    "fields": ("/search?k=5&include=fields", RAW, BINARY),
    "all": ("/search", json.dumps({"vector": VECTOR, "k": 5, "include": ["vector", "explain"]}).encode(), JSON),
    "a request id": ("/search", QUESTION, {**JSON, "X-Request-Id": "mine"}),
    "a bad request id": ("/search", QUESTION, {**JSON, "X-Request-Id": "no good"}),
}
ODD: dict[str, tuple[str, str, bytes, dict[str, str]]] = {
    "an encoded name, by an id": ("POST", "/indexes/product%73/search", b'{"id": "p-20"}', JSON),
    "no such index, by an id": ("POST", "/indexes/none/search", b'{"id": "p-20"}', JSON),
    "no JSON": ("POST", "/search", b"{", JSON),
    "no field of ours": ("POST", "/search", b'{"vektor": []}', JSON),
    "a wrong dim": ("POST", "/search", b'{"vector": [1, 2]}', JSON),
    "no number": ("POST", "/search", np.full(DIM, np.nan, np.float32).tobytes(), BINARY),
    "two vectors": ("POST", "/search", RAW * 2, BINARY),
    "nothing": ("POST", "/search", b"", BINARY),
    "a broken vector": ("POST", "/search", RAW[:-1], BINARY),
    "k twice": ("POST", "/search?k=5&k=6", RAW, BINARY),
    "k is too large": ("POST", "/search?k=5000", RAW, BINARY),
    "settings in the URL of JSON": ("POST", "/search?k=5", QUESTION, JSON),
    "no such index": ("POST", "/indexes/none/search", QUESTION, JSON),
    "a name with a slash": ("POST", "/indexes/products/x/search", QUESTION, JSON),
    "an encoded name": ("POST", "/indexes/product%73/search", QUESTION, JSON),
    "another type": ("POST", "/search", QUESTION, {"Content-Type": "text/plain"}),
    "no type": ("POST", "/search", QUESTION, {}),
    "an encoding": ("POST", "/search", QUESTION, {**JSON, "Content-Encoding": "identity"}),
    "an expectation": ("POST", "/search", QUESTION, {**JSON, "Expect": "a miracle"}),
    "the last on its connection": ("POST", "/search", QUESTION, {**JSON, "Connection": "close"}),
    "another method": ("PUT", "/search", QUESTION, JSON),
    "another route": ("POST", "/searches", QUESTION, JSON),
}


@pytest.mark.parametrize(("path", "body", "headers"), SHORT.values(), ids=SHORT)
def test_the_short_way_answers_as_the_long_one_does(
    short: Service, long: Service, path: str, body: bytes, headers: dict[str, str]
) -> None:
    before = len(ways(short))
    replies = [at_once(running, path, body, headers) for running in (short, long)]
    assert plain(replies[0]) == plain(replies[1]) and replies[0].status == 200
    assert ways(short)[before:] == ["short"]
    given = headers.get("X-Request-Id", "")
    for reply in replies:
        made = reply.headers["x-request-id"]
        assert made == given if given == "mine" else re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]+", made)
        assert re.fullmatch(r"\w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT", reply.headers["date"])
        assert int(reply.headers["content-length"]) == len(reply.body)


@pytest.mark.parametrize(
    ("path", "body", "headers", "status"),
    [
        ("/search", b'{"id": "p-20"}', JSON, 200),
        ("/indexes/products/search", b'{"id": "p-20", "k": 3, "include": ["fields"]}', JSON, 200),
        ("/search", json.dumps({"vector": VECTOR, "filter": {"year": 2000}}).encode(), JSON, 200),
        ("/search?k=3&exact=true", RAW, BINARY, 200),
        ("/search", b'{"id": "nobody"}', JSON, 404),
        ("/search", b'{"text": "rivers"}', JSON, 422),
        ("/search", b'{"id": "p-20", "params": {"boom": 1}}', JSON, 422),
    ],
    ids=["id", "all of an id", "filter", "exact", "no such id", "a text and no encoder", "no such setting"],
)
def test_what_takes_a_task_is_answered_as_on_the_long_way(
    short: Service, long: Service, path: str, body: bytes, headers: dict[str, str], status: int
) -> None:
    before = len(ways(short))
    replies = [at_once(running, path, body, headers) for running in (short, long)]
    assert plain(replies[0]) == plain(replies[1]) and replies[0].status == status
    assert ways(short)[before:] == ["short"]


@pytest.mark.parametrize(("method", "path", "body", "headers"), ODD.values(), ids=ODD)
def test_what_is_odd_goes_the_long_way(
    short: Service, long: Service, method: str, path: str, body: bytes, headers: dict[str, str]
) -> None:
    before = len(ways(short))
    first, second = (running.ask(method, path, body, headers) for running in (short, long))
    assert plain(first) == plain(second)
    assert "short" not in ways(short)[before:]


MANY = np.array([VECTOR, VECTOR[::-1], [1.0, *VECTOR[1:]]], np.float32)
JSON_BATCH = json.dumps({"vectors": MANY.tolist(), "k": 5}).encode()
ARROW = {"Accept": "application/vnd.apache.arrow.stream"}
BATCHES: dict[str, tuple[str, bytes, dict[str, str], int]] = {
    "json": ("/search/batch", JSON_BATCH, JSON, 200),
    "raw": ("/search/batch?k=5", MANY.tobytes(), BINARY, 200),
    "named index": ("/indexes/products/search/batch?k=5", MANY.tobytes(), BINARY, 200),
    "fields": ("/search/batch?k=5&include=fields", MANY.tobytes(), BINARY, 200),
    "a filter": ("/search/batch", json.dumps({"vectors": [VECTOR], "filter": {"year": 2000}}).encode(), JSON, 200),
    "many hits": ("/search/batch?k=200", np.tile(MANY, (20, 1)).tobytes(), BINARY, 200),
    "arrow": ("/search/batch?k=5", MANY.tobytes(), {**BINARY, **ARROW}, 200),
    "json to arrow": ("/search/batch", json.dumps({"vectors": MANY.tolist()}).encode(), {**JSON, **ARROW}, 200),
    "texts and no encoder": ("/search/batch", b'{"texts": ["rivers", "a lake"], "k": 3}', JSON, 422),
    "a wrong dim": ("/search/batch", b'{"vectors": [[1, 2]]}', JSON, 422),
    "no number": ("/search/batch", np.full(DIM, np.nan, np.float32).tobytes(), BINARY, 422),
    "no such field": ("/search/batch", json.dumps({"vectors": [VECTOR], "filter": {"x": 1}}).encode(), JSON, 422),
}


@pytest.mark.parametrize(("path", "body", "headers", "status"), BATCHES.values(), ids=BATCHES)
def test_batches_are_answered_as_on_the_long_way(
    short: Service, long: Service, path: str, body: bytes, headers: dict[str, str], status: int
) -> None:
    before = len(ways(short))
    operation = "/indexes/{name}/search/batch" if "/indexes/" in path else "/search/batch"
    requests = [one.metric("vecsvc_requests_total", operation=operation, status=str(status)) for one in (short, long)]
    replies = [at_once(running, path, body, headers) for running in (short, long)]
    assert ways(short)[before:] == ["short"] and [reply.status for reply in replies] == [status] * 2
    if "Accept" in headers:
        assert len({reply.headers["content-type"] for reply in replies}) == 1
        first, second = (pa.ipc.open_stream(reply.body).read_all() for reply in replies)
        assert first.equals(second) and len(first) > 0
    else:
        assert plain(replies[0]) == plain(replies[1])
    for running, count in zip((short, long), requests, strict=True):
        assert running.metric("vecsvc_requests_total", operation=operation, status=str(status)) == count + 1


@pytest.mark.parametrize(
    ("path", "body", "headers"),
    [
        ("/search/batch", MANY.tobytes()[:-1], BINARY),
        ("/search/batch", b"", BINARY),
        ("/search/batch", b"", JSON),
        ("/search/batch", b'{"vectors": [[1]', JSON),
        ("/search/batch", b'{"vectors": []}', JSON),
        ("/search/batch", b'{"vectors": [[1], [1, 2]]}', JSON),
        ("/search/batch", b'{"vectors": [[1]], "texts": ["a"]}', JSON),
        ("/indexes/products/search/batch", b'{"vectors": [[1]], "boom": 1}', JSON),
        ("/indexes/products/search/batch", json.dumps({"vectors": [VECTOR], "k": 0}).encode(), JSON),
        ("/search/batch", np.zeros((2000, DIM), np.float32).tobytes(), BINARY),
    ],
    ids=range(10),
)
def test_a_batch_that_is_wrong_is_read_once_and_refused_in_the_words_of_the_long_way(
    short: Service, long: Service, path: str, body: bytes, headers: dict[str, str]
) -> None:
    def told(running: Service) -> list[dict[str, Any]]:
        names = ("status", "why", "path", "method")
        return [{name: line.get(name) for name in names} for line in running.log() if line["message"] == "request"][-1:]

    before = len(ways(short))
    first, second = (at_once(running, path, body, headers) for running in (short, long))
    assert plain(first) == plain(second) and 400 <= first.status < 500
    assert ways(short)[before:] == ["short"]
    assert told(short) == told(long) != []


@pytest.mark.parametrize(
    ("path", "body", "headers"),
    [
        ("/search/batch?include=fields", MANY.tobytes(), {**BINARY, **ARROW}),
        ("/search/batch?k=5", b'{"vectors": [[1]]}', JSON),
        ("/indexes/none/search/batch", MANY.tobytes(), BINARY),
        ("/indexes/none/search/batch", JSON_BATCH, JSON),
        ("/indexes//search/batch", JSON_BATCH, JSON),
        ("/indexes/%7Bx%7D/search/batch", JSON_BATCH, JSON),
    ],
)
def test_odd_batches_go_the_long_way(
    short: Service, long: Service, path: str, body: bytes, headers: dict[str, str]
) -> None:
    before = len(ways(short))
    first, second = (at_once(running, path, body, headers) for running in (short, long))
    assert plain(first) == plain(second) and first.status >= 400
    assert "short" not in ways(short)[before:]


def test_an_encoded_name_is_found_on_the_long_way(short: Service) -> None:
    before = len(ways(short))
    for body, headers in ((JSON_BATCH, JSON), (MANY.tobytes(), BINARY)):
        assert at_once(short, "/indexes/product%73/search/batch", body, headers).status == 200
    assert ways(short)[before:] == ["long", "long"]


def test_a_batch_that_comes_to_no_answer_ends_its_connection(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Nobody waits for ever where its task is cancelled from below, or fails by a bug of ours."""

    async def fails() -> None:
        raise KeyError("a bug")

    async def main() -> None:
        for what in (asyncio.sleep(0), fails()):
            told: list[bytes | None] = []
            task = asyncio.get_running_loop().create_task(what)
            task.add_done_callback(functools.partial(direct._over, told.append, lambda: True))
            await asyncio.wait([task])
            await asyncio.sleep(0)
            assert told == ([] if task.exception() is None else [None])
        told = []
        task = asyncio.get_running_loop().create_task(asyncio.sleep(9))
        task.add_done_callback(functools.partial(direct._over, told.append, lambda: True))
        task.cancel()
        await asyncio.wait([task])
        await asyncio.sleep(0)
        assert told == [None]

    asyncio.run(main())
    assert "a bug of ours" in caplog.text


def test_lines_about_bugs_of_ours_stay_within_log_lines_per_s(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> bytes:
        raise KeyError("a bug")

    monkeypatch.setattr(direct.Direct, "_told", fails)

    async def main() -> None:
        made = node(service.index("products"), ServeSettings(log_lines_per_s=3))[2]
        await made.refresh()
        wires = [Wire() for _ in range(20)]
        runner = web.AppRunner(made.app())
        await runner.setup()
        for wire in wires:
            connection = Connection(made, runner.server)
            connection.connection_made(wire)
            connection.data_received(post(b'{"id": "p-20"}'))
        async with asyncio.timeout(20):
            while not all(wire.closed for wire in wires):  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        await runner.cleanup()

    asyncio.run(main())
    assert 3 <= caplog.text.count("a bug of ours") < 20


def test_a_batch_whose_client_leaves_is_called_off(short: Service) -> None:
    body = json.dumps({"vectors": [VECTOR] * 64, "k": 1000, "params": {"exact": True}}).encode()

    def counted() -> float:
        statuses = ("200", "429", "499")
        return sum(short.metric("vecsvc_requests_total", operation="/search/batch", status=one) for one in statuses)

    before = counted()
    for _ in range(10):
        with short.socket() as sock:
            sock.sendall(post(body, "/search/batch"))
    end = time.monotonic() + 20
    while short.metric("vecsvc_in_flight") and time.monotonic() < end:
        time.sleep(0.05)
    assert short.metric("vecsvc_in_flight") == 0
    assert short.ask("POST", "/search", QUESTION, JSON).status == 200
    assert counted() == before + 10


def test_what_takes_its_place_for_a_moment_keeps_nobody_out() -> None:
    """More texts in one turn than there are places, each answered at once from what is remembered of it."""
    with service.running(service.index("texts"), TOLD, max_in_flight=4, inline_ms=100, reload_poll_s=0) as running:
        asked = post(b'{"text": "a river", "k": 3}')
        with contextlib.ExitStack() as stack:
            sockets = [stack.enter_context(running.socket()) for _ in range(40)]
            for _ in range(3):
                for sock in sockets:
                    sock.sendall(asked)
                    answers(sock, 1)
            running.process.send_signal(signal.SIGSTOP)
            for sock in sockets:
                sock.sendall(asked)
            running.process.send_signal(signal.SIGCONT)
            assert {int(sock.recv(1 << 16)[9:12]) for sock in sockets} == {200}


def test_a_connection_whose_answer_takes_longer_than_keepalive_is_kept() -> None:
    slow = (
        TOLD + "import time; import vecsvc.schemas as s; e = s.encode; s.encode = lambda a: (time.sleep(2.5), e(a))[1]"
    )
    settings = {"keepalive_s": 1, "max_timeout_ms": 500, "timeout_ms": 500, "reload_poll_s": 0}
    with service.running(service.index("products"), slow, **settings) as running, running.socket() as sock:
        for _ in range(2):
            sock.sendall(post(json.dumps({"vectors": [VECTOR], "include": ["fields"]}).encode(), "/search/batch"))
            [found] = answers(sock, 1)
            assert len(found["results"]) == 1


@pytest.mark.parametrize("n", [40])
def test_no_more_are_let_in_than_there_are_places_for(n: int) -> None:
    """Of many that come in one turn of the loop, before any of them has taken its place."""
    with service.running(service.index("products"), TOLD, max_in_flight=4, reload_poll_s=0) as running:
        asked = post(json.dumps({"id": "p-20", "params": {"exact": True}}).encode())
        with contextlib.ExitStack() as stack:
            sockets = [stack.enter_context(running.socket()) for _ in range(n)]
            for sock in sockets:
                sock.sendall(WHOLE)
                answers(sock, 1)
            before = len(ways(running))
            running.process.send_signal(signal.SIGSTOP)
            for sock in sockets:
                sock.sendall(asked)
            running.process.send_signal(signal.SIGCONT)
            statuses = [int(sock.recv(1 << 16)[9:12]) for sock in sockets]
        assert set(statuses) == {200, 429} and statuses.count(200) >= 4
        # Those that are refused are so at once: no task was made to find out.
        assert len(ways(running)[before:]) == statuses.count(200)


def test_both_ways_count_alike(short: Service) -> None:
    labels = {"operation": "/search", "status": "200"}
    requests, timed = short.metric("vecsvc_requests_total", **labels), "vecsvc_request_seconds_count"
    seconds, searches = (
        short.metric(timed, operation="/search"),
        short.metric("vecsvc_search_seconds_count", index="products", strategy=service.GRAPH),
    )
    for _ in range(3):
        assert short.ask("POST", "/search", QUESTION, JSON).status == 200
    assert short.metric("vecsvc_requests_total", **labels) == requests + 3
    assert short.metric(timed, operation="/search") == seconds + 3
    counted = short.metric("vecsvc_search_seconds_count", index="products", strategy=service.GRAPH)
    assert counted == searches + 3


WHOLE = post(QUESTION)


@pytest.mark.parametrize(
    "pieces",
    [
        [WHOLE, WHOLE, WHOLE],
        [WHOLE * 3],
        [WHOLE + WHOLE[:40], WHOLE[40:], WHOLE],
        [WHOLE[:30], WHOLE[30:-10], WHOLE[-10:] + WHOLE, WHOLE],
        [WHOLE, WHOLE[:-1], WHOLE[-1:] + WHOLE],
        [WHOLE[:-5], b"", WHOLE[-5:], WHOLE, WHOLE],
    ],
    ids=["one by one", "at once", "one and a bit", "in pieces", "a byte late", "later than is waited for"],
)
def test_answers_keep_the_order_of_questions_however_they_arrive(short: Service, pieces: list[bytes]) -> None:
    with short.socket() as sock:
        for piece in pieces:
            sock.sendall(piece)
            time.sleep(0.02)
        found = answers(sock, 3)
    assert found[0]["results"] == found[1]["results"] == found[2]["results"]


def test_several_messages_behind_a_question_keep_their_connection_on_the_short_way(short: Service) -> None:
    """Behind one with a task, behind one without, behind a batch that is wrong."""
    asked = [post(b'{"id": "p-20", "k": 3}'), WHOLE, WHOLE, post(b'{"vectors": []}', "/search/batch"), WHOLE]
    data = b"".join(asked)
    before = len(ways(short))
    found = replies(short, [(data, 0.0), (WHOLE * 3, 0.02), (WHOLE, 0.02)], 9)
    assert [status for status, _ in found] == [200, 200, 200, 422] + [200] * 5
    assert [len(body["results"]) for status, body in found if status == 200] == [3] + [5] * 7
    assert ways(short)[before:] == ["short"] * 9


def test_more_behind_a_question_than_is_read_is_answered_in_order(short: Service) -> None:
    n = 3 * direct.MAX_BEHIND_BYTES // len(WHOLE)
    with short.socket() as sock:
        sender = threading.Thread(target=sock.sendall, args=(post(b'{"id": "p-20", "k": 3}') + WHOLE * n,))
        sender.start()
        found = answers(sock, n + 1)
        sender.join()
    assert [len(one["results"]) for one in found] == [3] + [5] * n


def test_a_question_behind_a_slow_one_waits_for_its_turn(short: Service) -> None:
    """The slow one goes the long way, to a thread; what follows on the connection must not overtake it."""
    slow = json.dumps({"vector": VECTOR, "k": 400, "params": {"exact": True}}).encode()
    with short.socket() as sock:
        sock.sendall(post(slow))
        sock.sendall(WHOLE)
        first, second = answers(sock, 2)
    assert len(first["results"]) == 400 and len(second["results"]) == 5


@pytest.mark.alone
def test_a_body_may_come_behind_its_head(short: Service) -> None:
    """As http.client and others send it. Whether it came in time is up to the machine; the answer is the same."""
    before, head = len(ways(short)), len(WHOLE) - len(QUESTION)
    with short.socket() as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(20):
            sock.sendall(WHOLE[:head])
            sock.sendall(WHOLE[head:])
            [answer] = answers(sock, 1)
            assert len(answer["results"]) == 5
    assert "short" in ways(short)[before:]


def test_a_body_that_breaks_off_is_no_question(short: Service) -> None:
    received = short.raw(WHOLE[:-3], shut=True)
    assert b"HTTP/1.1 200" not in received
    assert short.post("/search", QUESTION).status == 200


def test_what_is_no_http_behind_a_good_question_is_refused_in_our_words(short: Service) -> None:
    received = short.raw(WHOLE, b"nonsense\r\n\r\n")
    first, _, second = received.partition(b'"version":"v1"}}')
    assert first.startswith(b"HTTP/1.1 200") and b" 400 Bad Request\r\n" in second.partition(b"\n")[0] + b"\n"
    assert b"this is no HTTP request" in second


def test_a_connection_of_the_short_way_is_kept_and_closed_as_any_other() -> None:
    settings: dict[str, Any] = {"keepalive_s": 1, "header_timeout_s": 0.5, "reload_poll_s": 0, "inline_ms": 100}
    with service.running(service.index("products"), TOLD, **settings) as running:
        warm(running)
        with running.socket() as sock:
            for _ in range(4):
                sock.sendall(WHOLE)
                answers(sock, 1)
                time.sleep(0.6)  # longer than a head may take, and twice that is longer than it is kept
            assert ways(running)[-4:].count("short") >= 3
            started = time.monotonic()
            assert service.read_all(sock) == b"" and time.monotonic() - started < 4


def test_while_it_drains_the_answer_says_that_the_connection_closes() -> None:
    with service.running(service.index("products"), TOLD, drain_s=60, inline_ms=100) as running:
        warm(running)
        with contextlib.closing(running.connect()) as kept:
            assert service.ask(kept, "POST", "/search", QUESTION, JSON).status == 200
            running.process.send_signal(signal.SIGTERM)
            running.wait_for("draining")
            last = service.ask(kept, "POST", "/search", QUESTION, JSON)
            assert last.status == 200 and last.headers["connection"] == "close"
        assert running.stop() == 1


def test_where_every_request_is_logged_all_go_the_long_way() -> None:
    with service.running(service.index("products"), TOLD, log="all", inline_ms=100) as running:
        warm(running)
        assert "short" not in ways(running)
        assert running.ask("POST", "/search", QUESTION, {**JSON, "X-Request-Id": "told"}).status == 200
        assert [line for line in running.log() if line.get("request_id") == "told"]


BATCH = json.dumps({"vectors": [VECTOR] * 20, "k": 2}).encode()
CHUNKED = b"POST /search HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
MESSAGES: dict[str, bytes] = {
    "question": WHOLE,
    "raw": post(RAW, "/search?k=4").replace(b"/json", b"/octet-stream"),
    "id": post(b'{"id": "p-20"}'),
    "no JSON": post(b"POST "),
    "wrong": post(b'{"vector": [1]}'),
    "get": b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n",
    "get with a body": b"GET /livez HTTP/1.1\r\nHost: x\r\nContent-Length: 12\r\n\r\nPOST /search ",
    "batch": post(BATCH, "/search/batch"),
    "chunked": CHUNKED + b"%x\r\n%b\r\n0\r\n\r\n" % (len(QUESTION), QUESTION),
    "other method": WHOLE.replace(b"POST", b"PUT", 1),
}
MESSAGES["get with a body"] = MESSAGES["get with a body"][:-1]  # 12 bytes, as it says


def replies(running: Service, pieces: list[tuple[bytes, float]], n: int) -> list[tuple[int, Any]]:
    """Status and body of n answers to bytes that are sent in pieces, each after a pause."""
    found: list[tuple[int, Any]] = []
    with running.socket() as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece, pause_s in pieces:
            time.sleep(pause_s)
            sock.sendall(piece)
        received = b""
        while len(found) < n:
            head, end, rest = received.partition(b"\r\n\r\n")
            length = int(re.search(rb"(?i)content-length: (\d+)", head)[1]) if end else 0  # type: ignore[index]
            if end and len(rest) >= length:
                body = json.loads(rest[:length])
                body.pop("took_ms", None)
                found.append((int(head[9:12]), body))
                received = rest[length:]
                continue
            part = sock.recv(1 << 16)
            assert part, (found, received)
            received += part
        assert not received
    return found


@pytest.mark.parametrize("seed", range(16))
def test_messages_in_any_order_and_in_any_pieces_are_answered_as_on_the_long_way(
    short: Service, long: Service, seed: int
) -> None:
    chance = random.Random(seed)
    names = [chance.choice([*MESSAGES, "question", "question", "raw"]) for _ in range(12)]
    data = b"".join(MESSAGES[name] for name in names)
    # Half of the connections are polite, one message a piece; the others break anywhere.
    cuts = {len(b"".join(MESSAGES[name] for name in names[:i])) for i in range(1, len(names))}
    if seed % 2:
        cuts = {chance.randrange(1, len(data)) for _ in range(8)} | set(chance.sample(sorted(cuts), 4))
    ends = [0, *sorted(cuts), len(data)]
    pieces = [(data[a:b], chance.choice((0.0, 0.001, 0.012))) for a, b in itertools.pairwise(ends)]
    first, second = (replies(running, pieces, len(names)) for running in (short, long))
    assert first == second, names
    assert [status for status, _ in first].count(200) >= 1


@pytest.mark.alone
def test_after_a_long_message_questions_go_the_short_way_again(short: Service) -> None:
    body = json.dumps({"vectors": [VECTOR] * 500, "k": 2, "include": []}).encode()
    batch = post(body, "/search/batch")
    pieces = [(batch[:1000], 0.0), (batch[1000:20_000], 0.02), (batch[20_000:], 0.02), (WHOLE, 0.3), (WHOLE, 0.3)]
    before = ways(short).count("short")
    assert [status for status, _ in replies(short, pieces, 3)] == [200, 200, 200]
    assert ways(short).count("short") == before + 2
    before = ways(short).count("short")
    assert [s for s, _ in replies(short, [(MESSAGES["chunked"], 0.0), (WHOLE, 0.05)], 2)] == [200, 200]
    assert ways(short).count("short") == before, "where a chunked body ends is known to aiohttp's parser alone"


class Wire(asyncio.Transport):
    """A connection that takes everything."""

    def __init__(self) -> None:
        super().__init__()
        self.closed = False

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    abort = close

    def write(self, data: Any) -> None: ...

    def get_write_buffer_size(self) -> int:
        return 0


@pytest.mark.parametrize("message", [b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n", WHOLE[:-5]], ids=["whole", "in part"])
def test_a_client_that_leaves_before_its_message_was_looked_at_is_no_surprise(message: bytes) -> None:
    async def leave() -> None:
        made = node(service.index("products"), ServeSettings())[2]
        runner = web.AppRunner(made.app())
        await runner.setup()
        connection = Connection(made, runner.server)
        connection.connection_made(Wire())
        await asyncio.sleep(0)
        task, waiter = connection._task_handler, connection._waiter
        assert task is not None and waiter is not None
        connection.data_received(message)
        if connection._held:
            connection._let_go()  # as when its time is up
        assert waiter.done()
        connection.connection_lost(None)
        await asyncio.wait([task], timeout=5)
        assert task.done() and (task.cancelled() or task.exception() is None)
        await runner.cleanup()

    asyncio.run(leave())


def test_a_long_body_in_pieces_goes_the_short_way_and_counts_until_it_is_whole(short: Service) -> None:
    body = json.dumps({"vectors": [VECTOR] * 50, "k": 2}).encode() + b" " * LARGE_BYTES
    message = post(body, "/search/batch")
    assert len(body) > LARGE_BYTES
    before = ways(short).count("short")
    pieces = [(message[:50_000], 0.0), (message[50_000:90_000], 0.0), (message[90_000:], 0.0)]
    assert [status for status, _ in replies(short, pieces, 1)] == [200]
    assert ways(short).count("short") == before + 1

    async def count(room: int) -> list[int]:
        made = node(service.index("products"), ServeSettings(max_buffered_bytes=room))[2]
        runner = web.AppRunner(made.app())
        await runner.setup()
        connection = Connection(made, runner.server)
        connection.connection_made(Wire())
        await asyncio.sleep(0)
        connection.data_received(message[:50_000])
        counted = [made._buffered]
        connection.data_received(message[50_000:60_000])
        counted.append(made._buffered)
        connection.connection_lost(None)
        await asyncio.sleep(0)
        await runner.cleanup()
        return [*counted, made._buffered]

    assert asyncio.run(count(len(body))) == [len(body), len(body), 0]
    assert asyncio.run(count(len(body) - 1)) == [0, 0, 0], "there was no room, and it went the long way"
    message = message.replace(b"/search/batch", b"/embed", 1)
    assert asyncio.run(count(len(body)))[0] == 0, "what would not be answered here is not held"


# ------------------------------------------------------------------------------------------------------- columns


@pytest.mark.parametrize("name", ["products", "numbers", "sharded"])
@pytest.mark.parametrize(("rows", "k"), [(1, 3), (100, 7), (3, 500)])
def test_an_arrow_answer_holds_what_the_json_answer_holds(name: str, rows: int, k: int) -> None:
    body = service.vectors(rows, seed=70).tobytes()
    with everything() as running:
        path = f"/indexes/{name}/search/batch?k={k}"
        as_json = running.ask("POST", path, body, BINARY).json()
        reply = running.ask("POST", path, body, {**BINARY, "Accept": "application/vnd.apache.arrow.stream"})
    assert reply.headers["content-type"] == "application/vnd.apache.arrow.stream"
    table = pa.ipc.open_stream(reply.body).read_all()
    hits = [(i, rank, hit) for i, found in enumerate(as_json["results"]) for rank, hit in enumerate(found)]
    assert table["query"].to_pylist() == [i for i, _, _ in hits]
    assert table["rank"].to_pylist() == [rank for _, rank, _ in hits]
    assert table["id"].to_pylist() == [hit["id"] for _, _, hit in hits]
    for column in ("score", "distance"):
        assert table[column].to_pylist() == [hit[column] for _, _, hit in hits]
    rest = json.loads(table.schema.metadata[b"vecsvc"])
    assert rest["results"] == [] and rest["coverage"] == as_json["coverage"] and rest["index"] == as_json["index"]
    assert rest["stats"]["shortfall"] == as_json["stats"]["shortfall"] == rows * k - len(hits)


_everything: list[Service] = []


@contextlib.contextmanager
def everything() -> Iterator[Service]:
    """One service of three indexes for all of the above."""
    yield _everything[0]


@pytest.fixture(scope="module", autouse=True)
def _of_three() -> Iterator[None]:
    for name in ("products", "numbers", "sharded"):
        service.index(name)
    with service.running(service.work_folder() / "all", reload_poll_s=0) as running:
        _everything[:] = [running]
        yield


def test_the_short_way_is_of_the_public_port_alone() -> None:
    question = json.dumps({"vector": [1.0] + [0.0] * (service.DIM - 1), "k": 3}).encode()
    with service.running(service.index("numbers"), inline_ms=100) as running:
        for _ in range(3):
            assert running.ask("POST", "/search", question, JSON).status == 200
        assert running.ask("POST", "/search", question, JSON, admin=True).status == 404
