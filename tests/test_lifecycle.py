"""From start to SIGTERM: no accepted request is lost, swaps are whole, overload is refused at once and passes."""

from __future__ import annotations

import contextlib
import functools
import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import service
from service import BINARY, DIM, JSON, Corpus, Reply, Service

from vecsvc.process import admit_nobody
from vecsvc.storage import IndexFolder, Lease

QUESTION = json.dumps({"vector": [1.0] * DIM, "k": 5}).encode()
# Every search takes longer, so that requests are in flight whenever something happens.
SLOW = """
import time, pathlib
from vecsvc.shard import Shard
search = Shard.search
Shard.search = lambda *a, **k: (time.sleep({seconds}), search(*a, **k))[1]
"""


class Clients:
    """Threads that ask all the time; what they met is in `outcomes`."""

    def __init__(
        self, running: Service, ask: Callable[[Service, threading.Event], Iterator[str]], threads: int
    ) -> None:
        self._running, self._ask = running, ask
        self.stop = threading.Event()
        self.outcomes: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._work) for _ in range(threads)]

    def _work(self) -> None:
        try:
            for outcome in self._ask(self._running, self.stop):
                with self._lock:
                    self.outcomes[outcome] += 1
        except Exception as error:
            self.outcomes[f"broken: {error!r}"] += 1

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop.set()
        for thread in self._threads:
            thread.join()


def outcome(reply: Reply) -> str:
    return "answered" if reply.status == 200 and len(reply.results) == 5 else f"failed: {reply}"


def kept_alive(running: Service, stop: threading.Event) -> Iterator[str]:
    """Uses a connection until the service says that it closes it, then makes a new one, until that is refused."""
    while not stop.is_set():
        with contextlib.closing(running.connect()) as connection:
            try:
                connection.connect()
            except ConnectionRefusedError:
                return
            except ConnectionResetError as error:
                yield lost(error)
                continue
            before = ""
            while not stop.is_set():
                try:
                    reply = service.ask(connection, "POST", "/search", QUESTION, JSON)
                except (ConnectionError, http.client.HTTPException) as error:
                    yield lost(error, before)
                    break
                before = "kept"
                yield outcome(reply)
                if reply.headers.get("connection") == "close":
                    break


def fresh(running: Service, stop: threading.Event) -> Iterator[str]:
    """A new connection for every question, until it is refused."""
    while not stop.is_set():
        try:
            yield outcome(running.ask("POST", "/search", QUESTION, {**JSON, "Connection": "close"}))
        except ConnectionRefusedError:
            return
        except (ConnectionError, http.client.HTTPException) as error:
            yield lost(error)


# Between the service's last look and the closing of the port, some ten microseconds, the kernel may still let
# somebody in, and resets him then. Nothing was accepted there by us.
RESET = "reset on a new connection"


def lost(error: Exception, before: str = "") -> str:
    return RESET if not before and isinstance(error, ConnectionResetError) else f"lost: {error!r}"


# ------------------------------------------------------------------------------------------------------ the end


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize(("ask", "threads"), [(kept_alive, 8), (fresh, 4)], ids=["kept alive", "fresh"])
def test_sigterm_under_load_loses_no_accepted_request(
    ask: Callable[[Service, threading.Event], Iterator[str]], threads: int, number: int
) -> None:
    prelude = SLOW.format(seconds=0.03) if number % 2 else ""
    with service.running(service.index("texts"), prelude) as running, Clients(running, ask, threads) as clients:
        while clients.outcomes["answered"] < 30:
            time.sleep(0.01)
        started = time.monotonic()
        assert running.stop() == 0
        assert time.monotonic() - started < 5
    assert clients.outcomes.pop(RESET, 0) <= 1
    assert clients.outcomes.keys() == {"answered"}, clients.outcomes


def test_a_long_answer_that_is_being_read_is_finished_before_the_end() -> None:
    rows = service.vectors(1024, seed=15, dim=16).tobytes()
    head = "POST /search/batch?k=100&timeout_ms=30000 HTTP/1.1\r\nHost: x\r\nContent-Type: application/octet-stream\r\n"
    with service.running(service.index("large"), shutdown_s=20) as running:
        with running.socket(timeout_s=20, receive_bytes=16_384) as sock:
            sock.sendall(f"{head}Content-Length: {len(rows)}\r\n\r\n".encode() + rows)
            received = sock.recv(4096)
            running.process.send_signal(signal.SIGTERM)
            for _ in range(10):
                time.sleep(0.05)
                received += sock.recv(4096)
            received += service.read_all(sock)
        assert running.process.wait(10) == 0
    top, _, body = received.partition(b"\r\n\r\n")
    assert b"Connection: close" in top or b"200 OK" in top
    assert [len(found) for found in json.loads(body)["results"]] == [100] * 1024


def test_readyz_is_red_while_it_drains_and_requests_are_still_answered() -> None:
    with service.running(service.index("texts"), drain_s=1) as running:
        with contextlib.closing(running.connect()) as kept:
            assert service.ask(kept, "POST", "/search", QUESTION, JSON).status == 200
            running.process.send_signal(signal.SIGTERM)
            running.wait_for("draining")
            reply = running.get("/readyz")
            assert reply.status == 503 and "shutting down" in reply.message and reply.headers["retry-after"] == "1"
            assert running.get("/livez").status == 200
            assert running.metric("vecsvc_ready") == 0
            last = service.ask(kept, "POST", "/search", QUESTION, JSON)
            assert last.status == 200 and last.headers["connection"] == "close"
            assert running.ask("POST", "/search", QUESTION, JSON).status == 200
        assert running.process.wait(10) == 0


def test_a_search_that_outlasts_shutdown_s_does_not_hold_the_process(tmp_path: Path) -> None:
    flag = tmp_path / "slow"
    prelude = SLOW.format(seconds=f"30 if pathlib.Path({str(flag)!r}).exists() else 0")
    with service.running(service.index("texts"), prelude, shutdown_s=0.5) as running:
        flag.touch()
        with running.socket() as sock:
            head = "POST /search HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            sock.sendall(f"{head}Content-Length: {len(QUESTION)}\r\n\r\n".encode() + QUESTION)
            while running.metric("vecsvc_in_flight") == 0:
                time.sleep(0.01)
            started = time.monotonic()
            assert running.stop() == 0 and time.monotonic() - started < 2.5


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_service_ends_at_once(number: signal.Signals) -> None:
    with (
        service.running(service.index("texts")) as running,
        contextlib.closing(running.connect()) as idle,
        running.socket(),
    ):
        assert service.ask(idle, "GET", "/livez").status == 200
        started = time.monotonic()
        running.process.send_signal(number)
        assert running.process.wait(5) == 0 and time.monotonic() - started < 1.5


def test_sigterm_while_a_version_is_being_opened_ends_at_once() -> None:
    slow = "import time, vecsvc.catalog as c; c.check_files = lambda *a, **k: time.sleep(60)"
    with service.started(service.index("texts"), slow) as running:
        time.sleep(0.2)
        started = time.monotonic()
        assert running.stop() == 0
        assert time.monotonic() - started < 1.5
        service.assert_clean(running)


def test_the_second_sigterm_ends_what_the_first_one_waits_for() -> None:
    with service.started(service.index("texts"), drain_s=60) as running:
        running.wait_for("ready")
        running.process.send_signal(signal.SIGTERM)
        running.wait_for("draining")
        started = time.monotonic()
        assert running.stop() == 1 and time.monotonic() - started < 1


# ------------------------------------------------------------------------------------------------------ the start


@pytest.mark.parametrize("taken", ["port", "admin_port"])
def test_a_port_that_is_taken_is_one_line_and_exit_code_2(taken: str) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        ports = {"port": 0, "admin_port": 0, taken: port}
        second = subprocess.run(
            service.command(service.index("texts"), **ports), capture_output=True, text=True, timeout=30
        )
    assert second.returncode == 2 and second.stdout == ""
    assert second.stderr == f"vecsvc: cannot listen on 127.0.0.1:{port}: Address already in use; choose another port\n"


@pytest.mark.skipif(sys.platform != "linux", reason="the filter is Linux'")
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_port_that_is_about_to_close_keeps_who_is_in_and_lets_nobody_in(host: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as port:
        address = port.getsockname()[:2]
        with socket.create_connection(address) as early:
            if not admit_nobody(port):
                pytest.skip("this kernel takes no packet filters")
            with pytest.raises(TimeoutError):
                socket.create_connection(address, timeout=0.2)
            port.settimeout(5.0)
            accepted, _ = port.accept()
            with accepted:
                early.sendall(b"question")
                assert accepted.recv(100) == b"question"
                accepted.sendall(b"answer")
                assert early.recv(100) == b"answer"
            port.setblocking(False)
            with pytest.raises(BlockingIOError):
                port.accept()


def test_a_second_service_of_the_same_folder_serves_beside_the_first() -> None:
    with service.running(service.index("texts")) as first, service.running(service.index("texts")) as second:
        assert first.search(id="t-1")["results"] == second.search(id="t-1")["results"]


# ------------------------------------------------------------------------------------------------------ swaps


@pytest.fixture(scope="module")
def folder() -> IndexFolder:
    return three_versions()


@functools.cache  # a module's tests may come back to a process that has left it meanwhile
def three_versions() -> IndexFolder:
    out = service.work_folder() / "swaps"
    for number in (1, 2, 3):
        rows = 2000 + number
        corpus = Corpus([f"v{number}-{i}" for i in range(rows)], service.vectors(rows, seed=30 + number), [], "l2")
        options = {"shards": 2} if number == 2 else {}
        service.build(corpus, out, "demo", f"v{number}", kind=service.GRAPH, metric="l2", **options)
    return IndexFolder(out / "demo")


def versions_agree(running: Service, stop: threading.Event) -> Iterator[str]:
    """Asks in all ways; an answer must be of the version it names, and of one only."""
    rows = service.vectors(6, seed=40)
    questions: list[tuple[str, bytes, dict[str, str]]] = [
        ("/search", json.dumps({"vector": rows[0].tolist(), "k": 20}).encode(), JSON),
        ("/search/batch?k=5", rows.tobytes(), BINARY),
        ("/search?k=7&exact=true", rows[1].tobytes(), BINARY),
        ("/openapi.json", b"", {}),
        ("/indexes", b"", {}),
    ]
    with contextlib.closing(running.connect()) as connection:
        while not stop.is_set():
            for path, body, headers in questions:
                reply = service.ask(connection, "POST" if body else "GET", path, body or None, headers)
                if reply.status != 200:
                    yield f"failed: {reply}"
                    continue
                document = reply.json()
                if "results" in document:
                    results = document["results"]
                    hits = [hit for found in results for hit in found] if isinstance(results[0], list) else results
                    of = {hit["id"].split("-")[0] for hit in hits}
                    named = document["index"]["version"]
                    yield named if of == {named} else f"mixed: {named} answers with {of}"


def locked(folder: IndexFolder) -> list[str]:
    """The versions that somebody holds."""
    held = []
    for version in folder.versions():
        lease = Lease.take(folder.path / version, exclusive=True)
        if lease is None:
            held.append(version)
        else:
            lease.release()
    return held


def test_who_drains_opens_no_new_version(folder: IndexFolder) -> None:
    folder.serve("v1")
    with service.started(folder.path, reload_poll_s=0.02, drain_s=60) as running:
        running.wait_for("ready")
        running.process.send_signal(signal.SIGTERM)
        running.wait_for("draining")
        folder.serve("v2")
        time.sleep(0.3)
        assert running.ask("POST", "/reload", admin=True).json()["changed"] == {}
        assert running.metric("vecsvc_index_info", index="demo", version="v2") == 0
        assert running.metric("vecsvc_index_info", index="demo", version="v1") == 1
        assert running.search(vector=[1.0] * 8)["index"]["version"] == "v1"


@pytest.mark.parametrize(("how", "swaps"), [("reload", 100), ("poll", 40)])
def test_swaps_under_load_are_whole_and_leave_nothing_behind(folder: IndexFolder, how: str, swaps: int) -> None:
    folder.serve("v1")
    poll_s = 0.005 if how == "poll" else 0
    with service.running(folder.path, reload_poll_s=poll_s) as running:

        def swap(number: int) -> None:
            version = f"v{number % 3 + 1}"
            folder.serve(version) if number % 2 else folder.rollback(version)
            if how == "reload":
                reply = running.ask("POST", "/reload", admin=True).json()
                assert reply["problems"] == {} and reply["changed"].get("demo") == version
                return
            end = time.monotonic() + 10
            while running.metric("vecsvc_index_info", index="demo", version=version) == 0:
                assert time.monotonic() < end
                time.sleep(0.002)

        settled = files = 0
        with Clients(running, versions_agree, 3) as clients:
            for number in range(1, swaps + 1):
                swap(number)
                if number == swaps // 2:
                    settled, files = running.rss_bytes(), running.open_files()
        assert clients.outcomes.keys() == {"v1", "v2", "v3"}, clients.outcomes
        assert min(clients.outcomes.values()) > 10
        assert running.metric("vecsvc_version_swaps_total", index="demo") >= swaps
        time.sleep(0.1)
        assert running.open_files() <= files + 2
        assert running.rss_bytes() - settled < 16 << 20
        assert locked(folder) == [folder.current()]
    assert locked(folder) == []


def test_a_request_that_began_with_a_version_ends_with_it_and_then_the_version_is_let_go(folder: IndexFolder) -> None:
    folder.serve("v1")
    with service.running(folder.path, SLOW.format(seconds=0.4), reload_poll_s=0) as running:
        answers: list[Any] = []
        asking = threading.Thread(target=lambda: answers.append(running.search(vector=[1.0] * DIM)))
        asking.start()
        while running.metric("vecsvc_in_flight") == 0:
            time.sleep(0.005)
        folder.serve("v3")
        reload = threading.Thread(target=lambda: running.ask("POST", "/reload", admin=True))
        reload.start()
        asking.join()
        assert answers[0]["index"]["version"] == "v1" and answers[0]["results"][0]["id"].startswith("v1-")
        reload.join()
        assert running.search(vector=[1.0] * DIM)["index"]["version"] == "v3"
        assert locked(folder) == ["v3"]


# ------------------------------------------------------------------------------------------- overload and deadlines


BATCH = json.dumps({"vectors": [[1.0] * 16] * 9}).encode()  # as few as are bulk


def long_batch(running: Service, timeout_ms: int = 30_000) -> Reply:
    """Some tenths of a second of exact search."""
    rows = service.vectors(1024, seed=15, dim=16).tobytes()
    path = f"/search/batch?k=50&exact=true&timeout_ms={timeout_ms}"
    return running.ask("POST", path, rows, BINARY)


@pytest.fixture(scope="module")
def narrow() -> Iterator[Service]:
    """Takes one question and one batch at a time."""
    limits = {"max_in_flight": 1, "max_bulk_in_flight": 1}
    with service.running(service.index("large"), reload_poll_s=0, **limits) as running:
        yield running


def wait_until_idle(running: Service) -> None:
    end = time.monotonic() + 10
    while running.metric("vecsvc_in_flight"):
        assert time.monotonic() < end
        time.sleep(0.005)


def test_overload_is_refused_within_milliseconds_and_passes(narrow: Service) -> None:
    replies: list[Reply] = []
    busy = threading.Thread(target=lambda: replies.append(long_batch(narrow)))
    busy.start()
    while narrow.metric("vecsvc_in_flight") == 0:
        time.sleep(0.001)
    refused, seconds = [], []
    with contextlib.closing(narrow.connect()) as connection:
        while busy.is_alive():
            started = time.monotonic()
            reply = service.ask(connection, "POST", "/search/batch", BATCH, JSON)
            seconds.append(time.monotonic() - started)
            if reply.status == 200:
                break
            refused.append(reply)
            assert narrow.get("/livez").status == narrow.get("/readyz").status == 200
    busy.join()
    assert replies[0].status == 200
    assert refused, "the search was over before anything could be refused"
    for reply in refused:
        assert reply.status == 429 and reply.headers["retry-after"] == "1"
        assert "1 requests are in flight, the limit max_bulk_in_flight" in reply.message
    assert sorted(seconds)[len(seconds) // 2] < 0.05
    wait_until_idle(narrow)
    assert narrow.search(id=1)["results"]
    assert narrow.metric("vecsvc_requests_total", operation="/search/batch", status="429") >= len(refused)


def test_a_deadline_ends_the_wait_and_the_search_still_counts_until_it_ends(narrow: Service) -> None:
    wait_until_idle(narrow)
    started = time.monotonic()
    reply = long_batch(narrow, timeout_ms=1)
    assert reply.status == 504 and "timeout_ms" in reply.message
    assert time.monotonic() - started < 0.5
    # The search that nobody waits for any more still has its place: others are refused, not queued behind it.
    after = narrow.post("/search/batch", BATCH)
    assert after.status in (200, 429) and narrow.get("/livez").status == 200
    wait_until_idle(narrow)
    assert narrow.search(id=1)["results"]


@pytest.mark.alone
def test_a_flood_of_clients_gets_answers_or_429_and_memory_stays(narrow: Service) -> None:
    def ask(running: Service, stop: threading.Event) -> Iterator[str]:
        with contextlib.closing(running.connect()) as connection:
            while not stop.is_set():
                reply = service.ask(
                    connection, "POST", "/search", json.dumps({"id": 1, "params": {"exact": True}}).encode(), JSON
                )
                yield str(reply.status)

    with Clients(narrow, ask, 16) as clients:
        time.sleep(0.7)
        settled = narrow.rss_bytes()
        time.sleep(0.7)
        with contextlib.closing(narrow.connect()) as connection:
            started = time.monotonic()
            assert service.ask(connection, "GET", "/livez").status == 200
            assert time.monotonic() - started < 0.5
    assert clients.outcomes.keys() == {"200", "429"}
    assert clients.outcomes["200"] > 50
    assert narrow.rss_bytes() - settled < 16 << 20


def test_partial_answers_come_back_at_the_deadline_and_say_that_they_are_partial(narrow: Service) -> None:
    """Where the deadline cuts an exact search of many blocks, `partial` takes what was found by then."""
    wait_until_idle(narrow)
    rows = service.vectors(1024, seed=15, dim=16).tobytes()
    for partial in ("true", "false"):
        reply = narrow.ask("POST", f"/search/batch?exact=true&timeout_ms=2&partial={partial}", rows, BINARY)
        assert reply.status in (200, 504)
        if partial == "false":
            assert reply.status == 504
        elif reply.status == 200:
            assert reply.json()["coverage"]["degraded"] == ["the search was cut short"]
        wait_until_idle(narrow)
