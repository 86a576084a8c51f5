"""Several workers on one port are one service: they share the load, their numbers add up, a death is made up for."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import service
from service import JSON, Corpus, Service
from test_lifecycle import QUESTION, RESET, Clients, fresh, kept_alive

from vecsvc.config import ServeSettings
from vecsvc.errors import ConfigError
from vecsvc.storage import IndexFolder
from vecsvc.telemetry import Counted, Metrics, together
from vecsvc.worker_places import for_one
from vecsvc.workers import bind

WAIT_S = 20.0


def children(running: Service) -> list[int]:
    task = Path(f"/proc/{running.process.pid}/task/{running.process.pid}/children")
    return [int(pid) for pid in task.read_text().split()]


def ended(pids: list[int]) -> bool:
    """Whether all are gone, or wait for nothing but their parent's notice."""
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                return False
    return True


def wait_until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def asked_of_each(running: Service) -> list[Any]:
    """One answer of each worker: fresh connections until both were met, which is told by their request ids."""
    found: dict[str, Any] = {}
    end = time.monotonic() + WAIT_S
    while len(found) < 2:
        assert time.monotonic() < end
        reply = running.post("/search", QUESTION)
        found[reply.headers["x-request-id"].partition("-")[0]] = reply.json()
    return list(found.values())


@pytest.fixture(scope="module")
def folder() -> IndexFolder:
    return two_versions()


@functools.cache  # a module's tests may come back to a process that has left it meanwhile
def two_versions() -> IndexFolder:
    out = service.work_folder() / "for-workers"
    for number in (1, 2):
        corpus = Corpus([f"v{number}-{i}" for i in range(200)], service.vectors(200, seed=50 + number), [], "l2")
        service.build(corpus, out, "demo", f"v{number}", kind="exact", metric="l2")
    return IndexFolder(out / "demo")


@pytest.fixture(scope="module")
def pair(folder: IndexFolder) -> Iterator[Service]:
    with service.running(folder.path, workers=2, reload_poll_s=0) as running:
        running.expected = ["worker died"]
        yield running


# ------------------------------------------------------------------------------------------------------ one service


def test_both_workers_answer_alike_and_what_they_count_adds_up(pair: Service) -> None:
    before = pair.metric("vecsvc_requests_total", operation="/search", status="200")
    timed = pair.metric("vecsvc_request_seconds_count", operation="/search")
    first, second = asked_of_each(pair)
    assert first["results"] == second["results"] and first["index"] == second["index"]
    with Clients(pair, fresh, 2) as clients:
        wait_until(lambda: clients.outcomes["answered"] >= 20)
    assert clients.outcomes.keys() == {"answered"}
    after = pair.metrics()
    answered = after["vecsvc_requests_total", (("operation", "/search"), ("status", "200"))] - before
    assert answered >= clients.outcomes["answered"] + 2
    assert after["vecsvc_request_seconds_count", (("operation", "/search"),)] - timed == answered
    assert after["vecsvc_workers", ()] == 2 and after["vecsvc_ready", ()] == 1 and after["vecsvc_in_flight", ()] == 0
    assert after["vecsvc_index_info", (("index", "demo"), ("version", "v2"))] == 1


def test_rollback_and_reload_reach_both(pair: Service, folder: IndexFolder) -> None:
    rolled = pair.ask("POST", "/indexes/demo/rollback", admin=True).json()
    assert rolled == {"index": "demo", "from": "v2", "to": "v1", "problems": {}}
    assert [answer["index"]["version"] for answer in asked_of_each(pair)] == ["v1", "v1"]
    folder.serve("v2")
    assert pair.ask("POST", "/reload", admin=True).json() == {"changed": {"demo": "v2"}, "problems": {}}
    assert [answer["index"]["version"] for answer in asked_of_each(pair)] == ["v2", "v2"]


def test_the_admin_port_refuses_as_that_of_one_process_does(pair: Service) -> None:
    refused = [
        ("GET", "/nothing", {}, 404),
        ("PUT", "/metrics", {}, 405),
        ("POST", "/reload?now=1", {}, 422),
        ("POST", "/reload", {"Origin": "http://page"}, 422),
        ("POST", "/indexes/none/rollback", {}, 404),
        ("POST", "/indexes/demo/rollback?to=v9", {}, 404),
        ("POST", "/indexes/..%2fdemo/rollback", {}, 404),
        ("POST", "/search", {}, 404),
    ]
    for method, path, headers, status in refused:
        reply = pair.ask(method, path, headers=headers, admin=True)
        assert (reply.status, bool(reply.message)) == (status, True), path
    assert pair.ask("PUT", "/metrics", admin=True).headers["allow"] == "GET"
    assert pair.ask("GET", "/livez", admin=True).json() == {"status": "alive"}
    assert pair.ask("GET", "/readyz", admin=True).json() == {"status": "ready"}
    # A body says nothing here, and is not waited for.
    with socket.create_connection(("127.0.0.1", pair.admin_port), WAIT_S) as sock:
        sock.sendall(b"POST /reload HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n")
        assert sock.recv(1 << 16).startswith(b"HTTP/1.1 200")


# ------------------------------------------------------------------------------------------------------ deaths


def test_a_killed_worker_is_replaced_and_new_connections_and_numbers_go_on(pair: Service) -> None:
    wait_until(lambda: pair.ask("GET", "/readyz", admin=True).status == 200)
    asked_of_each(pair)
    counted = pair.metric("vecsvc_requests_total", operation="/search", status="200")
    deaths = pair.metric("vecsvc_worker_deaths_total")
    victim = children(pair)[0]
    os.kill(victim, signal.SIGKILL)
    # Some of these wait in the socket of the dead one, until the next takes it over.
    for _ in range(12):
        assert pair.post("/search", QUESTION).status == 200
    assert pair.metric("vecsvc_requests_total", operation="/search", status="200") >= counted
    wait_until(lambda: pair.ask("GET", "/readyz", admin=True).status == 200)
    assert victim not in children(pair) and len(children(pair)) == 2
    asked_of_each(pair)
    assert pair.metric("vecsvc_worker_deaths_total") == deaths + 1
    assert pair.metric("vecsvc_requests_total", operation="/search", status="200") >= counted + 14
    died = [line for line in pair.log() if line["message"] == "worker died"][-1]
    assert died["why"] == "signal SIGKILL" and died["again_in_s"] <= 0.1


def test_while_a_worker_is_missing_the_service_is_alive_and_not_ready(pair: Service) -> None:
    wait_until(lambda: pair.ask("GET", "/readyz", admin=True).status == 200)
    os.kill(children(pair)[0], signal.SIGKILL)
    wait_until(lambda: pair.metric("vecsvc_workers") == 1)
    red = pair.ask("GET", "/readyz", admin=True)
    assert red.status == 503 and "is being started" in red.message and red.headers["retry-after"] == "1"
    assert pair.ask("GET", "/livez", admin=True).status == 200
    assert pair.metric("vecsvc_ready") == 0
    # A reload waits for the one that is being started, so that it reaches every worker.
    assert pair.ask("POST", "/reload", admin=True).json() == {"changed": {}, "problems": {}}
    wait_until(lambda: pair.ask("GET", "/readyz", admin=True).status == 200)


def test_workers_end_with_their_parent(folder: IndexFolder) -> None:
    with service.started(folder.path, workers=2) as running:
        running.wait_for("ready")
        workers = children(running)
        running.process.kill()
        running.process.wait()
        wait_until(lambda: ended(workers))

        def refused() -> bool:
            try:
                socket.create_connection(("127.0.0.1", running.port), WAIT_S).close()
            except ConnectionError:
                return True
            return False

        wait_until(refused)  # a process that is gone may have threads that are not, for a moment


# ------------------------------------------------------------------------------------------------------ the end


@pytest.mark.parametrize(("ask", "threads"), [(kept_alive, 6), (fresh, 4)], ids=["kept alive", "fresh"])
def test_sigterm_under_load_loses_no_accepted_request(
    folder: IndexFolder, ask: Callable[[Service, threading.Event], Iterator[str]], threads: int
) -> None:
    with service.running(folder.path, workers=2) as running, Clients(running, ask, threads) as clients:
        wait_until(lambda: clients.outcomes["answered"] >= 50)
        workers = children(running)
        assert running.stop() == 0
        assert ended(workers)
    assert clients.outcomes.pop(RESET, 0) <= 2
    assert clients.outcomes.keys() == {"answered"}, clients.outcomes


def test_it_drains_as_one_process_does_and_a_second_sigterm_ends_it(folder: IndexFolder) -> None:
    with service.started(folder.path, workers=2, drain_s=60) as running:
        running.wait_for("ready")
        workers = children(running)
        with contextlib.closing(running.connect()) as kept:
            assert service.ask(kept, "POST", "/search", QUESTION, JSON).status == 200
            running.process.send_signal(signal.SIGTERM)
            running.wait_for("draining")
            for admin in (True, False):
                red = running.ask("GET", "/readyz", admin=admin)
                wait_until(lambda admin=admin: running.ask("GET", "/readyz", admin=admin).status == 503)
                assert red.status in (200, 503)
            assert running.metric("vecsvc_ready") == 0
            last = service.ask(kept, "POST", "/search", QUESTION, JSON)
            assert last.status == 200 and last.headers["connection"] == "close"
        # Who signals the whole group of processes, means the service and not the workers.
        for pid in workers:
            os.kill(pid, signal.SIGTERM)
        assert running.post("/search", QUESTION).status == 200
        assert running.stop() == 1
        wait_until(lambda: ended(workers))


# ------------------------------------------------------------------------------------------------------ the start


@pytest.mark.parametrize("taken", ["port", "admin_port"])
@pytest.mark.parametrize("shared", [False, True], ids=["alone", "shared"])
def test_a_port_that_is_taken_is_one_line_and_exit_code_2(folder: IndexFolder, taken: str, shared: bool) -> None:
    with socket.socket() as holder:
        if shared:  # as another service with several workers holds it
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        ports = {"port": 0, "admin_port": 0, taken: port}
        second = subprocess.run(
            service.command(folder.path, workers=2, **ports), capture_output=True, text=True, timeout=30
        )
    assert second.returncode == 2 and second.stdout == ""
    assert second.stderr.splitlines()[-1].startswith(f"vecsvc: cannot listen on 127.0.0.1:{port}: ")
    assert len(second.stderr.splitlines()) == 1


def test_a_worker_that_finds_its_settings_wrong_ends_the_service(folder: IndexFolder) -> None:
    """A worker never gets settings that the parent did not check, but what they name may be wrong for it alone."""
    prelude = (
        "import vecsvc.worker_places as places\n"
        "places._BOOT = places._BOOT.replace('work(given)', \"given['settings']['max_k'] = 0; work(given)\")"
    )
    process = subprocess.run(
        service.command(folder.path, prelude, workers=2, port=0, admin_port=0), stderr=subprocess.PIPE, timeout=60
    )
    assert process.returncode == 2
    assert b"vecsvc: [serve]: max_k must be between 1 and 100000, got 0\n" in process.stderr


def test_workers_that_die_at_once_are_started_with_growing_pauses(folder: IndexFolder) -> None:
    prelude = "import vecsvc.worker_places as places; places._BOOT = 'import sys; sys.exit(3)'"
    with service.started(folder.path, prelude, workers=2) as running:
        wait_until(lambda: sum(line["message"] == "worker died" for line in running.log()) >= 6)
        pauses = [line["again_in_s"] for line in running.log() if line.get("number") == 0]
        assert pauses[:3] == [0.1, 0.2, 0.4]
        assert running.ask("GET", "/livez", admin=True).status == 200
        assert running.ask("GET", "/metrics", admin=True).status == 503
        assert running.stop() in (0, 1)  # as it met a worker that died, or none at all


def test_what_auto_and_zero_mean_for_several() -> None:
    one = for_one(ServeSettings(workers=2))
    assert (one.memory, one.search_threads) == ("mapped", max(1, (os.cpu_count() or 1) // 2))
    given = for_one(ServeSettings(workers=2, memory="ram", search_threads=7, max_k=5))
    assert (given.memory, given.search_threads, given.max_k) == ("ram", 7, 5)


def test_each_worker_gets_a_socket_on_every_address_of_the_host() -> None:
    groups = bind("localhost", 0, 3)
    try:
        addresses = [{made.getsockname()[0] for made in group} for group in groups]
        assert len(groups) == 3 and addresses[0] == addresses[1] == addresses[2] <= {"127.0.0.1", "::1"}
        assert len({made.getsockname()[1] for group in groups for made in group}) == 1
    finally:
        for made in (made for group in groups for made in group):
            made.close()
    with pytest.raises(ConfigError, match=r"cannot listen on 192\.0\.2\.1:80"):
        bind("192.0.2.1", 80, 2)


# ------------------------------------------------------------------------------------------------------ adding up


def counted(requests: int, seconds: list[float], ready: int, in_flight: int, version: str) -> Counted:
    metrics = Metrics()
    metrics.requests("/search", "200").inc(requests)
    for second in seconds:
        metrics.latency("/search").observe(second)
    metrics.ready.set(ready)
    metrics.in_flight.set(in_flight)
    metrics.version_info.labels("demo", version).set(1)
    return metrics.counted()


def test_counters_and_histograms_add_up_and_gauges_say_what_is_so_of_all() -> None:
    parts = [counted(3, [0.2, 0.3], 1, 2, "v1"), counted(4, [0.2], 0, 5, "v2")]
    shown = Metrics()
    shown.show(together(parts))
    assert shown.requests("/search", "200").value == 7
    assert sum(shown.latency("/search").counts) == 3 and shown.latency("/search").total == pytest.approx(0.7)
    text = shown.text().decode()
    for line in (
        "vecsvc_ready 0.0",
        "vecsvc_in_flight 7.0",
        'vecsvc_index_info{index="demo",version="v1"} 1.0',
        'vecsvc_index_info{index="demo",version="v2"} 1.0',
        'vecsvc_request_seconds_bucket{le="0.25",operation="/search"} 2.0',
    ):
        assert line in text.splitlines()
    # Shown again they are what they are, and not added to what was shown before.
    shown.show(together([*parts, parts[0].lasting()]))
    assert shown.requests("/search", "200").value == 10 and "vecsvc_in_flight 7.0" in shown.text().decode()


def test_a_line_between_parent_and_worker_says_what_was_counted() -> None:
    from vecsvc import control

    report = control.Report(True, "", counted(1, [0.1], 1, 0, "v1"))
    assert control.read(control.line(report), control.Report) == report
    with pytest.raises(Exception, match="Invalid enum value"):
        control.read(json.dumps({"do": "dance"}).encode(), control.Order)


def test_a_worker_whose_parent_is_gone_is_ordered_to_end() -> None:
    from vecsvc import control

    async def run() -> list[str]:
        ours, theirs = socket.socketpair()
        told: list[str] = []
        link = control.Link(theirs.detach(), lambda: control.Report(True, "", Counted()))
        talk = await link.open(drain=lambda: told.append("drain"), end=lambda: told.append("end"))
        ours.sendall(control.line(control.Order("drain")))
        await asyncio.sleep(0.01)
        ours.close()
        await asyncio.wait_for(talk, WAIT_S)
        return told

    assert asyncio.run(run()) == ["drain", "end"]
