"""Slow, silent and flooding clients: each is ended in its time, and a good client beside them notices nothing."""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import service
from attacks import JSON_TYPE, assert_refused, head, parse
from service import JSON, Service

pytestmark = pytest.mark.alone

HEADER_S, BODY_S, WRITE_S, KEEPALIVE_S = 0.5, 0.6, 1.0, 1.0
SLACK_S = 1.0  # of the reaper's ticks, and of a busy machine


@pytest.fixture(scope="module")
def strict() -> Iterator[Service]:
    settings = {"header_timeout_s": HEADER_S, "body_timeout_s": BODY_S, "write_timeout_s": WRITE_S}
    settings |= {"max_query_bytes": 1 << 16, "max_body_bytes": 1 << 18, "max_buffered_bytes": 1 << 20}
    with service.running(
        service.index("large"), reload_poll_s=0, keepalive_s=KEEPALIVE_S, max_connections=50, **settings
    ) as running:
        yield running


@pytest.fixture
def beside(strict: Service) -> Iterator[None]:
    """A good client with one connection that asks all the time; it must not notice anything."""
    stop = threading.Event()
    problems: list[str] = []
    asked = itertools.count()

    def work() -> None:
        try:
            with contextlib.closing(strict.connect(timeout_s=5)) as connection:
                kept = None
                while not stop.is_set():
                    body = json.dumps({"vector": [1.0] * 16, "k": 3}).encode()
                    reply = service.ask(connection, "POST", "/search", body, JSON)
                    if reply.status != 200 or (kept is not None and connection.sock is not kept):
                        problems.append(f"{reply} after {next(asked)} answers")
                    kept = connection.sock
                    next(asked)
                    stop.wait(0.03)
        except Exception as error:
            problems.append(repr(error))

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    assert not problems and next(asked) > 1


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize(("path", "limit"), [("/search", 1 << 16), ("/search/batch", 1 << 18)])
def test_a_question_may_be_shorter_than_a_batch(strict: Service, path: str, limit: int, chunked: bool) -> None:
    question = {"vectors": [[1.0] * 16]} if "batch" in path else {"vector": [1.0] * 16}
    for size, status in ((limit, 200), (limit + 1, 413)):
        body = json.dumps(question).encode().ljust(size)
        with contextlib.closing(strict.connect()) as connection:
            parts = iter([body[:100], body[100:]]) if chunked else body
            connection.request("POST", path, parts, JSON, encode_chunked=chunked)
            response = connection.getresponse()
            assert response.status == status
            assert status == 200 or f"the limit here is {limit}" in response.read().decode()


@pytest.mark.parametrize("framing", [{"Content_Length": 200_000}, {"Transfer_Encoding": "chunked"}])
def test_bodies_that_are_held_back_do_not_fill_the_memory_of_others(strict: Service, framing: dict[str, Any]) -> None:
    """What was announced counts before it comes, but short questions are answered whatever others announce."""
    with contextlib.ExitStack() as stack:
        replies = []
        for _ in range(40):
            sock = stack.enter_context(strict.socket())
            sock.sendall(head("POST", "/search/batch", Content_Type=JSON_TYPE, **framing))
            sock.settimeout(0.02)
            with contextlib.suppress(TimeoutError):
                replies.append(parse(sock.recv(1 << 16)))
            if replies:
                break
        assert strict.post("/search", {"vector": [1.0] * 16}).status == 200
        assert replies and {reply.status for reply in replies} == {429}
        assert "max_buffered_bytes" in replies[0].message and replies[0].headers["retry-after"] == "1"
    body = json.dumps({"vectors": [[1.0] * 16]}).encode().ljust(200_000)
    end = time.monotonic() + 5
    while strict.post("/search/batch", body).status == 429:
        assert time.monotonic() < end
    assert strict.post("/search/batch", body).status == 200


def closed_after(sock: socket.socket, timeout_s: float) -> tuple[bytes, float]:
    """What still came, and how long it took until the service closed."""
    started = time.monotonic()
    sock.settimeout(timeout_s)
    return service.read_all(sock), time.monotonic() - started


@pytest.mark.parametrize("sent", [b"", b"P", b"POST /search HTTP/1.1\r\nHost: x\r\nContent-Ty"])
def test_a_connection_that_sends_no_whole_head_is_closed(strict: Service, beside: None, sent: bytes) -> None:
    with strict.socket() as sock:
        sock.sendall(sent)
        received, seconds = closed_after(sock, 10)
    assert received == b"" and HEADER_S * 0.8 < seconds < HEADER_S + SLACK_S


def test_a_head_that_drips_is_closed(strict: Service, beside: None) -> None:
    started = time.monotonic()
    with strict.socket() as sock, contextlib.suppress(ConnectionError):
        for byte in itertools.cycle(b"GET /livez HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 100):
            sock.sendall(bytes([byte]))
            time.sleep(0.05)
            if time.monotonic() - started > 10:
                break
    assert time.monotonic() - started < HEADER_S + SLACK_S


def test_silence_on_the_admin_port_is_closed_too(strict: Service) -> None:
    with socket.create_connection(("127.0.0.1", strict.admin_port)) as sock:
        received, seconds = closed_after(sock, 10)
    assert received == b"" and HEADER_S * 0.8 < seconds < HEADER_S + SLACK_S


CHUNKED = head(Content_Type=JSON_TYPE, Transfer_Encoding="chunked", Connection="keep-alive")
FLOODS = {
    "trailers": (CHUNKED + b"2\r\n{}\r\n0\r\n", b"X: " + b"y" * 1000 + b"\r\n"),
    "a chunk's extension": (CHUNKED + b"2;", b"a" * 65_536),
    "chunks of one byte": (CHUNKED, b"1\r\n \r\n" * 10_000),
    "blank lines": (b"", b"\r\n" * 30_000),
    "requests whose answers are not read": (b"", head("GET", "/openapi.json", Connection="keep-alive") * 500),
}


@pytest.mark.parametrize(("begin", "piece"), FLOODS.values(), ids=FLOODS)
def test_a_flood_on_one_connection_is_cut_off_and_fills_no_memory(
    strict: Service, beside: None, begin: bytes, piece: bytes
) -> None:
    before, started = strict.rss_bytes(), time.monotonic()
    with strict.socket(timeout_s=0.2) as sock:
        sock.sendall(begin)
        with contextlib.suppress(ConnectionError):
            while time.monotonic() - started < 10:
                with contextlib.suppress(TimeoutError):
                    sock.send(piece)
    assert time.monotonic() - started < 6
    assert strict.rss_bytes() - before < 48 << 20


@pytest.mark.parametrize("framing", [{"Content_Length": 1000}, {"Transfer_Encoding": "chunked"}])
@pytest.mark.parametrize("path", ["/search", "/search/batch"])
def test_a_body_that_drips_is_408(strict: Service, beside: None, framing: dict[str, Any], path: str) -> None:
    started = time.monotonic()
    with strict.socket() as sock:
        sock.sendall(head("POST", path, Content_Type=JSON_TYPE, Connection="keep-alive", **framing))
        sock.settimeout(0.05)
        received = b""
        while time.monotonic() - started < 10:
            with contextlib.suppress(TimeoutError):
                received = sock.recv(1 << 16)
                break
            sock.sendall(b"1\r\n \r\n" if "Transfer_Encoding" in framing else b" ")
        assert BODY_S * 0.8 < time.monotonic() - started < BODY_S + SLACK_S
        assert_refused(parse(received), 408, f"body_timeout_s, {BODY_S:g} s")
        assert parse(received).headers["connection"] == "close"


def test_a_body_that_never_comes_is_408(strict: Service, beside: None) -> None:
    with strict.socket() as sock:
        sock.sendall(head(Content_Type="application/octet-stream", Content_Length=64))
        sock.settimeout(10)
        started = time.monotonic()
        reply = parse(sock.recv(1 << 16))
    assert_refused(reply, 408, "body_timeout_s")
    assert time.monotonic() - started < BODY_S + SLACK_S


def test_an_idle_connection_is_closed_after_its_time(strict: Service, beside: None) -> None:
    with strict.socket() as sock:
        sock.sendall(head("GET", "/livez", Connection="keep-alive"))
        received, seconds = closed_after(sock, 10)
    assert parse(received).status == 200
    assert KEEPALIVE_S * 0.8 < seconds < KEEPALIVE_S + 1 + SLACK_S


def large_question() -> bytes:
    """Some 12 MB of answer."""
    rows = service.vectors(1024, seed=15, dim=16).tobytes()
    path = "/search/batch?k=150&timeout_ms=30000"
    return head("POST", path, Content_Type="application/octet-stream", Content_Length=len(rows)) + rows


def slow_reader(strict: Service, read: Callable[[socket.socket], None]) -> float:
    """Seconds from the first byte of the answer until the service cut the connection."""
    with strict.socket(timeout_s=20, receive_bytes=4096) as sock:
        sock.sendall(large_question())
        assert sock.recv(12) == b"HTTP/1.1 200"
        started = time.monotonic()
        while time.monotonic() - started < 15:
            try:
                read(sock)
            except ConnectionError:
                return time.monotonic() - started
        raise AssertionError("the service still waits for a reader that does not read")


def test_a_reader_that_does_not_read_is_cut_off_and_its_answer_is_not_kept(strict: Service) -> None:
    def nothing(sock: socket.socket) -> None:
        time.sleep(0.05)
        sock.send(b" ")  # to notice the cut

    # The heap's high water may rise in one round (how many answers lie side by side in it is chance), not in each.
    before = strict.rss_bytes()
    grown = []
    for _ in range(5):
        with ThreadPoolExecutor(5) as pool:
            for seconds in pool.map(lambda _: slow_reader(strict, nothing), range(5)):
                assert seconds < WRITE_S + SLACK_S + 2
        after = strict.rss_bytes()
        grown.append(after - before)
        before = after
        if len(grown) > 1 and grown[-1] < 40 << 20:
            break
    assert grown[-1] < 40 << 20, f"five answers of 12 MB each: {grown}"


def test_a_reader_that_sips_is_cut_off_too(strict: Service, beside: None) -> None:
    def sip(sock: socket.socket) -> None:
        time.sleep(0.05)
        if not sock.recv(1000):
            raise ConnectionResetError

    assert slow_reader(strict, sip) < WRITE_S + SLACK_S + 1


def test_a_reader_of_a_large_answer_that_reads_gets_all_of_it(strict: Service, beside: None) -> None:
    received = strict.raw(large_question(), timeout_s=30)
    # Counted and not parsed: that would hold up the good client, which has a second between two questions.
    assert received.startswith(b"HTTP/1.1 200") and received.count(b'"distance"') == 150 * 1024


def test_more_connections_than_allowed_are_closed_and_the_client_that_works_is_spared(
    strict: Service, beside: None
) -> None:
    files = strict.open_files()
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(strict.socket()) for _ in range(300)]
        end = time.monotonic() + HEADER_S  # before silence alone closes them
        while strict.open_files() - files > 60 and time.monotonic() < end:
            time.sleep(0.02)
        assert strict.open_files() - files <= 60
        assert strict.get("/livez").status == 200
        for sock in idle[:200]:
            received, _ = closed_after(sock, 5)
            assert received == b""
    end = time.monotonic() + 5
    while strict.open_files() > files + 3 and time.monotonic() < end:
        time.sleep(0.02)
    assert strict.open_files() <= files + 3


def test_connections_that_were_closed_are_forgotten(strict: Service) -> None:
    """Nothing is kept of a thousand clients that came and went, by whatever door."""
    files, settled = strict.open_files(), 0
    for number in range(1000):
        with strict.socket() as sock:
            if number % 3:
                sock.sendall(head("GET", "/livez"))
            if number % 3 == 2:
                sock.recv(100)
        if number == 500:
            settled = strict.rss_bytes()
    time.sleep(HEADER_S)
    assert strict.open_files() <= files + 3
    assert strict.rss_bytes() - settled < 8 << 20
