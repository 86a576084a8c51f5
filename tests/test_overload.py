"""What is refused is refused by its head, says when to come again, and takes nobody else's place."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import service
from service import DIM, JSON, JSON_TYPE, Reply, Service
from test_attacks import head, parse
from test_engine import Spy, opened, run, until

from vecsvc import admission
from vecsvc.admission import FEW, LARGE_BYTES, Admission, Budget
from vecsvc.config import ServeSettings
from vecsvc.door import DRAIN_BYTES
from vecsvc.engine import Engine
from vecsvc.errors import DeadlineExceeded, Overloaded
from vecsvc.types import SearchSettings, VectorQuery

# While the file of its name is there, a search of that many queries waits: one, or more than one question may hold.
GATES = """
import time
from pathlib import Path
from vecsvc.shard import Shard
search = Shard.search
def gated(shard, queries, *arguments, **named):
    gate = Path({folder!r}) / ("single" if len(queries) <= 8 else "bulk")
    if gate.exists():
        gate.with_suffix(".held").touch()
        while gate.exists():
            time.sleep(0.002)
    return search(shard, queries, *arguments, **named)
Shard.search = gated
"""
WAIT_MS = 20_000


pytestmark = pytest.mark.alone


def vectors(n: int) -> bytes:
    return json.dumps({"vectors": [[1.0] * DIM] * n, "timeout_ms": WAIT_MS}).encode()


QUESTION = json.dumps({"id": "t-1", "timeout_ms": WAIT_MS}).encode()
BULK = vectors(FEW + 1)


class Gates:
    """Holds up searches of a service that has room for one question, for one batch, and for one search at a time."""

    def __init__(self, running: Service, folder: Path) -> None:
        self.running, self._folder = running, folder

    @contextlib.contextmanager
    def full(self, *lanes: str) -> Iterator[None]:
        """While the block runs, the one place of each lane is taken; whoever took it must be answered after."""
        replies: list[Reply] = []
        bodies = {"single": ("/search", QUESTION), "bulk": ("/search/batch", BULK)}
        threads = []
        for lane in lanes:
            (self._folder / lane).touch()
            held = self._folder / f"{lane}.held"
            held.unlink(missing_ok=True)
            path, body = bodies[lane]
            thread = threading.Thread(
                target=lambda path=path, body=body: replies.append(self.running.ask("POST", path, body, JSON))
            )
            thread.start()
            threads.append(thread)
            wait_for(held.exists)
        try:
            yield
        finally:
            for lane in lanes:
                (self._folder / lane).unlink()
            for thread in threads:
                thread.join()
        assert [reply.status for reply in replies] == [200] * len(lanes)
        wait_for(lambda: self.running.metric("vecsvc_in_flight") == 0)


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.fixture(scope="module")
def gates(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gates]:
    folder = tmp_path_factory.mktemp("gates")
    limits = {"max_in_flight": 1, "max_bulk_in_flight": 1, "search_threads": 1, "inline_ms": 0, "reload_poll_s": 0}
    with service.running(service.index("texts"), GATES.format(folder=str(folder)), **limits) as running:
        yield Gates(running, folder)


def head_only(running: Service, path: str, length: int | None = 100, **headers: Any) -> Reply:
    """The answer to a request of which only the head was sent."""
    framing = {"Content_Length": length} if length is not None else {"Transfer_Encoding": "chunked"}
    with running.socket() as sock:
        sock.sendall(head("POST", path, Content_Type=JSON_TYPE, Connection="keep-alive", **framing, **headers))
        received = sock.recv(1 << 16)
        while b"\r\n\r\n" not in received:
            received += sock.recv(1 << 16)
        return parse(received)


# ------------------------------------------------------------------------------------------------- refusals


def test_a_question_that_finds_no_place_is_refused_before_its_body_comes(gates: Gates) -> None:
    with gates.full("single"):
        for path in ("/search", "/indexes/texts/search"):
            refused = head_only(gates.running, path)
            assert refused.status == 429 and "1 requests are in flight, the limit max_in_flight" in refused.message
        refused = gates.running.post("/search", b"{ this is no JSON")
        assert refused.status == 429, "what will be refused is not looked at"
        assert gates.running.get("/search?q=river").status == 429
    assert gates.running.post("/search", b"{ this is no JSON").status == 400


@pytest.mark.parametrize("path", ["/search/batch", "/indexes/texts/search/batch", "/v1/embeddings", "/embed"])
@pytest.mark.parametrize("length", [LARGE_BYTES + 1, None], ids=["large", "unknown"])
def test_bulk_that_finds_no_place_is_refused_before_its_body_comes(gates: Gates, path: str, length: int | None) -> None:
    with gates.full("bulk"):
        refused = head_only(gates.running, path, length)
        assert refused.status == 429 and b"the limit max_bulk_in_flight" in refused.body
        assert int(refused.headers["retry-after"]) >= 1
        assert (refused.headers.get("connection") == "close") == (length is None)


def test_a_small_batch_is_read_before_it_is_known_to_be_bulk(gates: Gates) -> None:
    with gates.full("bulk"):
        assert gates.running.ask("POST", "/search/batch", vectors(FEW), JSON).status == 200
        refused = gates.running.ask("POST", "/search/batch", vectors(FEW + 1), JSON)
        assert refused.status == 429 and "the limit max_bulk_in_flight" in refused.message
    with gates.full("single", "bulk"):
        assert head_only(gates.running, "/search/batch").status == 429, "there is no place for it either way"


def test_a_connection_outlives_the_refusal_of_a_body_up_to_a_bound(gates: Gates) -> None:
    small, large = b" " * DRAIN_BYTES, b" " * (DRAIN_BYTES + 1)
    with gates.full("bulk"), gates.running.socket() as sock:
        question = head(
            "POST", "/search/batch", Content_Type=JSON_TYPE, Content_Length=len(small), Connection="keep-alive"
        )
        sock.sendall(question)
        assert sock.recv(1 << 16).startswith(b"HTTP/1.1 429")
        # What is left of it is read and dropped, and not taken for a request.
        sock.sendall(small + head("GET", "/livez", Connection="keep-alive"))
        assert sock.recv(1 << 16).startswith(b"HTTP/1.1 200")
        sock.sendall(
            head("POST", "/search/batch", Content_Type=JSON_TYPE, Content_Length=len(large), Connection="keep-alive")
        )
        assert b"Connection: close" in sock.recv(1 << 16)
        sock.sendall(large + head("GET", "/livez"))
        assert service.read_all(sock) == b""


def test_who_waits_to_be_asked_for_a_body_is_not_asked_where_it_is_refused(gates: Gates) -> None:
    with gates.full("single"):
        refused = head_only(gates.running, "/search", Expect="100-continue")
        assert refused.status == 429 and refused.headers["connection"] == "close"
    with gates.running.socket() as sock:
        sock.sendall(
            head("POST", "/search", Content_Type=JSON_TYPE, Content_Length=len(QUESTION), Expect="100-continue")
        )
        assert sock.recv(1 << 16) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(QUESTION)
        assert parse(service.read_all(sock)).status == 200


def test_a_refusal_says_when_to_come_again_by_what_requests_took_lately(gates: Gates) -> None:
    for _ in range(30):
        gates.running.ask("POST", "/search", QUESTION, JSON)
    with gates.full("single"):
        soon = gates.running.ask("POST", "/search", QUESTION, JSON)
        time.sleep(1.0)
    with gates.full("single"):
        later = gates.running.ask("POST", "/search", QUESTION, JSON)
    first, second = (reply.json()["error"]["retry_after_ms"] for reply in (soon, later))
    assert 1 <= first < second <= 30_000
    assert second >= 100, "one of the last ten took a second"
    for reply in (soon, later):
        assert int(reply.headers["retry-after"]) == -(-int(reply.headers["retry-after-ms"]) // 1000)


def test_errors_of_every_shape_say_when_to_come_again(gates: Gates) -> None:
    texts = ["river"] * (FEW + 1)
    with gates.full("bulk"):
        openai = gates.running.post("/v1/embeddings", {"model": "default", "input": texts})
        tei = gates.running.post("/embed", {"inputs": texts})
    assert openai.status == tei.status == 429
    assert openai.json()["error"]["retry_after_ms"] == int(openai.headers["retry-after-ms"])
    assert tei.json()["retry_after_ms"] == int(tei.headers["retry-after-ms"])
    assert "retry_after_ms" not in gates.running.post("/embed", {"inputs": []}).json()


def test_a_refusal_by_the_head_alone_is_the_long_ways_to_the_letter(gates: Gates) -> None:
    paths = ("/search", "/indexes/texts/search", "/search/batch", "/embed", "/indexes/texts/embed", "/v1/embeddings")
    with gates.full("single", "bulk"):
        time.sleep(Overloaded.retry_after_s + 0.1)  # until then the time to come again grows from one to the next
        for path in paths:
            # A header that means something keeps the second from the short way.
            short, long = (
                gates.running.ask("POST", path, b" " * (LARGE_BYTES + 1), {**JSON, "X-Request-Id": "mine", **more})
                for more in ({}, {"Content-Encoding": "identity"})
            )
            assert short.status == long.status == 429
            assert short.body == long.body
            assert {**short.headers, "date": ""} == {**long.headers, "date": ""}
            assert short.headers["x-request-id"] == "mine"


def test_the_rest_of_a_refused_body_is_dropped_in_whatever_pieces_it_comes(gates: Gates) -> None:
    body = b"POST /search HTTP/1.1\r\n\r\n" * 4000
    with gates.full("bulk"), gates.running.socket() as sock:
        for cut in (0, 1, 30_000, len(body) - 1):
            asked = head(
                "POST", "/search/batch", Content_Type=JSON_TYPE, Content_Length=len(body), Connection="keep-alive"
            )
            sock.sendall(asked + body[:cut])
            assert sock.recv(1 << 16).startswith(b"HTTP/1.1 429")
            for start in range(cut, len(body), 17_000):
                sock.sendall(body[start : start + 17_000])
                time.sleep(0.002)
        sock.sendall(head("GET", "/livez"))
        assert parse(service.read_all(sock)).status == 200


def test_refusals_are_counted_and_told_of_as_all_requests_are(gates: Gates) -> None:
    labels = {"operation": "/search", "status": "429"}
    before = gates.running.metric("vecsvc_requests_total", **labels)
    time.sleep(0.3)  # lines of refusals are rationed, and the tests before used up theirs
    with gates.full("single"):
        for number in range(30):
            assert (
                gates.running.ask("POST", "/search", b"{}", {**JSON, "X-Request-Id": f"flood-{number}"}).status == 429
            )
    assert gates.running.metric("vecsvc_requests_total", **labels) == before + 30
    told = [line for line in gates.running.log() if str(line.get("request_id")).startswith("flood-")]
    assert 1 <= len(told) < 30 and told[0]["status"] == 429 and "max_in_flight" in told[0]["why"]


# ----------------------------------------------------------------------------------------- budgets are separate


def test_a_full_bulk_budget_leaves_questions_alone(gates: Gates) -> None:
    with gates.full("bulk"):
        # One thread searches, and a batch holds one of its own.
        for _ in range(3):
            assert gates.running.ask("POST", "/search", QUESTION, JSON).status == 200
        assert gates.running.search(text="river")["results"]
        assert gates.running.post("/embed", {"inputs": ["river"] * FEW}).status == 200
        assert gates.running.post("/embed", {"inputs": ["river"] * (FEW + 1)}).status == 429


def test_questions_leave_bulk_its_place(gates: Gates) -> None:
    with gates.full("single"):
        assert gates.running.ask("POST", "/search/batch", BULK, JSON).status == 200
        assert gates.running.post("/embed", {"inputs": ["river"] * (FEW + 1)}).status == 200


def test_probes_and_administration_wait_for_nobody(gates: Gates) -> None:
    with gates.full("single", "bulk"):
        for admin in (False, True):
            for path in ("/livez", "/readyz"):
                assert gates.running.ask("GET", path, admin=admin).status == 200
        assert gates.running.metric("vecsvc_in_flight") == 2
        assert gates.running.ask("POST", "/reload", admin=True).json() == {"changed": {}, "problems": {}}
        rolled_back = gates.running.ask("POST", "/indexes/texts/rollback", admin=True)
        assert rolled_back.status == 404 and "version" in rolled_back.message
        assert gates.running.get("/indexes").status == gates.running.get("/openapi.json").status == 200


def test_a_flood_of_bulk_leaves_questions_answered(gates: Gates) -> None:
    stop = threading.Event()
    statuses: set[int] = set()

    def flood() -> None:
        with contextlib.closing(gates.running.connect()) as connection:
            while not stop.is_set():
                statuses.add(service.ask(connection, "POST", "/search/batch", BULK, JSON).status)

    threads = [threading.Thread(target=flood) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(50):
            assert gates.running.ask("POST", "/search", QUESTION, JSON).status == 200
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert statuses == {200, 429}


# ------------------------------------------------------------------------------------------- without HTTP


def test_a_budget_counts_and_refuses_and_gives_back() -> None:
    budget = Budget("max_in_flight", 2)
    assert budget.retry_after_s == 1.0, "before anything was measured"
    entered = [budget.enter(), budget.enter()]
    assert budget.full
    for refuse in (budget.check, budget.enter):
        with pytest.raises(Overloaded, match="2 requests are in flight, the limit max_in_flight"):
            refuse()
    budget.leave(entered[0])
    assert not budget.full and budget.in_flight == 1
    budget.enter()


def test_the_time_to_come_again_follows_what_requests_take_within_bounds() -> None:
    budget = Budget("max_in_flight", 1)
    for _ in range(100):
        budget.leave(budget.enter() - 0.25)
    assert budget.retry_after_s == pytest.approx(0.25, rel=0.2)
    for _ in range(100):
        budget.leave(budget.enter() - 1e6)
    assert budget.retry_after_s == admission.MAX_RETRY_S
    quick = Budget("max_in_flight", 1)
    quick.leave(quick.enter())
    assert quick.retry_after_s == admission.MIN_RETRY_S


def test_the_time_to_come_again_grows_while_no_place_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 100.0
    monkeypatch.setattr(admission.time, "perf_counter", lambda: clock)
    budget = Budget("max_in_flight", 2)
    entered = budget.enter()
    clock = 100.01
    budget.leave(entered)
    budget.enter()  # one that takes long, where there is room
    clock = 500.0
    entered = budget.enter()
    assert budget.retry_after_s == pytest.approx(0.01)
    clock = 500.5
    assert budget.retry_after_s == pytest.approx(0.5)
    clock = 501.5
    assert budget.retry_after_s == Overloaded.retry_after_s
    budget.leave(entered)
    budget.leave(clock - 0.01)
    assert budget.retry_after_s < 0.2


@pytest.mark.parametrize(
    ("single", "bulk", "load", "length", "refused"),
    [
        (True, True, "none", None, False),
        (True, False, "single", 10, True),
        (False, True, "single", LARGE_BYTES + 1, False),
        (True, False, "many", LARGE_BYTES + 1, False),
        (True, False, "many", 10, False),
        (False, True, "many", LARGE_BYTES, False),
        (False, True, "many", LARGE_BYTES + 1, True),
        (False, True, "many", None, True),
        (True, True, "many", 10, True),
    ],
)
def test_only_what_is_sure_to_be_refused_is_refused_by_its_head(
    single: bool, bulk: bool, load: Any, length: int | None, refused: bool
) -> None:
    admitting = Admission(1, 1)
    for budget, full in ((admitting.single, single), (admitting.bulk, bulk)):
        if full:
            budget.enter()
    if refused:
        with pytest.raises(Overloaded):
            admitting.check(load, length)
    else:
        admitting.check(load, length)


@pytest.mark.parametrize(
    ("single", "bulk", "load", "length", "crowded"),
    [
        (True, False, "single", LARGE_BYTES + 1, True),
        (False, True, "single", 10, False),
        (True, False, "many", 10, True),
        (True, False, "many", LARGE_BYTES + 1, False),
        (False, True, "many", 10, True),
        (False, True, "many", LARGE_BYTES + 1, True),
        (False, False, "many", 10, False),
    ],
)
def test_a_message_waits_a_turn_where_the_budget_is_crowded_that_it_may_take(
    single: bool, bulk: bool, load: Any, length: int, crowded: bool
) -> None:
    admitting = Admission(2, 2)
    for budget, coming in ((admitting.single, single), (admitting.bulk, bulk)):
        budget.enter()
        budget.coming = int(coming)
    assert admitting.crowded(load, length) == crowded


def test_bulk_begins_where_a_question_ends() -> None:
    admitting = Admission(1, 1)
    assert [admitting.of(n) is admitting.bulk for n in (1, FEW, FEW + 1, 1024)] == [False, False, True, True]
    meaning = ServeSettings.__dataclass_fields__["max_bulk_in_flight"].metadata["meaning"]
    assert f"more than {FEW} queries" in meaning


def batch(n: int = FEW + 1) -> VectorQuery:
    return VectorQuery(service.vectors(n, seed=51))


def test_a_batch_whose_deadline_passes_while_it_waits_for_a_thread_is_never_searched() -> None:
    async def ask(engine: Engine, spy: Spy) -> None:
        spy.gate.clear()
        first = asyncio.create_task(engine.search_batch(None, batch(), SearchSettings(timeout_ms=WAIT_MS)))
        await until(lambda: len(spy.threads) == 1)
        with pytest.raises(DeadlineExceeded):
            await engine.search_batch(None, batch(), SearchSettings(timeout_ms=20))
        # A question has threads of its own, although there is but one of each kind.
        question = asyncio.create_task(engine.search(None, batch(1), SearchSettings(timeout_ms=WAIT_MS)))
        await until(lambda: len(spy.threads) == 2)
        assert engine.admission.bulk.in_flight == 2, "it keeps its place until its turn has come"
        spy.gate.set()
        assert len((await first).results) == FEW + 1 and len((await question).results) == 10
        await until(lambda: engine.in_flight == 0)
        assert len(spy.threads) == 2

    with opened(service.index("products"), threads=1) as engine:
        run(ask(engine, Spy(engine)))


def test_batches_side_by_side_share_the_threads_of_one() -> None:
    asked: list[int] = []

    async def ask(engine: Engine, spy: Spy) -> None:
        searching = spy.search

        def search(*arguments: Any, num_threads: int = 1, **named: Any) -> Any:
            asked.append(num_threads)
            return searching(*arguments, num_threads=num_threads, **named)

        spy.search = search  # type: ignore[method-assign]
        await engine.search_batch(None, batch(), SearchSettings())
        spy.gate.clear()
        tasks = [
            asyncio.create_task(engine.search_batch(None, batch(), SearchSettings(timeout_ms=WAIT_MS)))
            for _ in range(6)
        ]
        await until(lambda: len(asked) == 5)
        spy.gate.set()
        await asyncio.gather(*tasks)

    with opened(service.index("products"), threads=4) as engine:
        run(ask(engine, Spy(engine)))
    assert asked == [4, 4, 2, 1, 1, 1, 1]


@pytest.mark.parametrize("bulk", [False, True])
def test_texts_whose_deadline_passed_are_never_encoded(bulk: bool) -> None:
    async def ask(engine: Engine) -> None:
        encoder = engine.catalog.get(None).encoder
        assert encoder is not None
        runs: list[Any] = []
        original = encoder.batcher.encoder.run
        gate = threading.Event()

        def slow(tokens: Any) -> Any:
            runs.append(tokens)
            assert gate.wait(20)
            return original(tokens)

        encoder.batcher.encoder.run = slow  # type: ignore[method-assign]
        texts = ["river"] * (FEW + 1 if bulk else 1)
        first = asyncio.create_task(engine.embed(None, ["one", "two"], role="passage", timeout_ms=WAIT_MS))
        await until(lambda: len(runs) == 1)
        with pytest.raises(DeadlineExceeded):
            await engine.embed(None, texts, role="passage", timeout_ms=20)
        gate.set()
        assert len((await first).vectors) == 2
        await until(lambda: engine.in_flight == 0)
        assert len(runs) == 1

    with opened(service.index("texts"), inline_ms=0, encoder_instances=1) as engine:
        run(ask(engine))
