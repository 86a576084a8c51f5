"""What a node's shard port is sent, well-formed or not, harms neither the node nor those who ask it properly."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import random
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from local_cluster import end, start, wait_until
from service import Service, corpora, index

from vecsvc import remote, shard_server
from vecsvc.catalog import Catalog
from vecsvc.config import ServeSettings
from vecsvc.engine import Engine
from vecsvc.errors import VecsvcError
from vecsvc.remote import Ask, Frames, Kind
from vecsvc.shard import Shard
from vecsvc.shard_answers import ANSWERS, part_now
from vecsvc.shard_server import ShardServer
from vecsvc.telemetry import Metrics
from vecsvc.types import Condition

CORPUS = corpora()["sharded"]
HELLO = remote.message(Kind.HELLO, 0, remote.Hello())


@pytest.fixture(scope="module")
def node() -> Iterator[Service]:
    found = start("serve", str(index("sharded")), shard_port=0, search_threads=2)
    found.wait_for("ready")
    yield found
    end(found)  # and its log holds no error


class Peer:
    """A connection to a shard port."""

    def __init__(self, node: Service) -> None:
        self.socket = socket.create_connection(("127.0.0.1", node.wait_for("listening")["shard_port"]), 20)
        self._frames = Frames(remote.OF_NODES, 1 << 26)
        self._found: list[tuple[Kind, int, bytes]] = []
        self._greeted = False

    def send(self, data: bytes) -> None:
        with contextlib.suppress(ConnectionError):
            self.socket.sendall(data)

    def next(self) -> tuple[Kind, int, Any] | None:
        """The next frame's message; None where the node closed. What it says unasked of its holdings is left out."""
        while not self._found:
            try:
                data = self.socket.recv(1 << 16)
            except ConnectionError:
                return None
            if not data:
                return None
            for one in self._frames.feed(data):
                if one[0] is not Kind.HOLDINGS or not self._greeted:
                    self._found.append(one)
                self._greeted |= one[0] is Kind.HOLDINGS
        kind, request, payload = self._found.pop(0)
        return kind, request, remote.decode(kind, payload)

    def reply(self, data: bytes) -> tuple[Kind, int, Any] | None:
        self.send(data)
        return self.next()

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()


@functools.cache
def digest() -> str:
    """Of the manifest, by which front doors name the version."""
    return hashlib.sha256((index("sharded") / "v1" / "manifest.json").read_bytes()).hexdigest()


def ask(**changed: Any) -> Ask:
    values: dict[str, Any] = {
        "index": "sharded",
        "digest": digest(),
        "dim": 8,
        "k": 3,
        "conditions": b"",
        "params": [],
        "exact": True,
        "max_visited": None,
        "rerank_depth": None,
        "of": 1,
        "partial": False,
        "include": [],
    }
    return Ask(**{**values, **changed})


def question(
    request: int = 1,
    shards: tuple[int, ...] = (0, 1, 2),
    timeout_ms: float = 20_000,
    vectors: np.ndarray = CORPUS.vectors[:1],
    **changed: Any,
) -> bytes:
    common = remote.Common.of(remote.encode_ask(ask(**changed)), vectors)
    return remote.search_frame(request, timeout_ms, shards, common)


def asked(**changed: Any) -> remote.Question:
    """What a node reads of it."""
    [(_, _, payload)] = remote.Frames(remote.OF_FRONT_DOORS, 1 << 20).feed(question(**changed))
    return remote.decode_search(payload)


def answers(node: Service) -> None:
    """It does, as it should."""
    with Peer(node) as peer:
        kind, _, holdings = peer.reply(HELLO) or (None, 0, None)
        assert kind is Kind.HOLDINGS and holdings.held[0].index == "sharded"
        kind, request, part = peer.reply(question(7)) or (None, 0, None)
        assert (kind, request, part.ids) == (Kind.PART, 7, CORPUS.ids_of(CORPUS.vectors[0], 3))
    assert node.search(vector=[1.0] * 8)["coverage"]["shards_ok"] == 3


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        bytes(100),
        b"\xff" * 100,
        random.Random(1).randbytes(5000),
        struct.pack("<IBII", 0xFFFFFFFF, Kind.SEARCH, 1, 0),
        struct.pack("<IBII", remote.MAX_REQUEST_BYTES + 1, Kind.SEARCH, 1, 0),
        remote.frame(Kind.PART, 1, b"x"),
        remote.frame(Kind.FAILED, 1, b""),
        remote.frame(Kind.SEARCH, 1, b""),
        remote.frame(Kind.SEARCH, 1, b"x" * 500),
        remote.frame(Kind.FIND, 1, b"\xc1"),
        remote.frame(Kind.EMBED, 1, b""),
        remote.frame(Kind.HELLO, 1, b"\x93\x01\x02\x03"),
        lambda: question()[:-1] + b"?",
        remote.search_frame(1, 100.0, (0,), remote.Common.of(b"\x90\x1f\0\0" + b"\x91" * 8080, CORPUS.vectors[:1])),
    ],
    ids=range(15),
)
def test_what_is_no_message_ends_its_connection_and_no_other(node: Service, data: Any) -> None:
    with Peer(node) as good, Peer(node) as bad:
        assert good.reply(HELLO) is not None
        assert bad.reply(HELLO) is not None
        bad.send(data() if callable(data) else data)
        assert bad.next() is None
        kind, _, _ = good.reply(question()) or (None, 0, None)
        assert kind is Kind.PART
    answers(node)


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (lambda: question(index="none"), "not_ready"),
        (lambda: question(digest="v1"), "not_ready"),
        (lambda: question(index="../../etc"), "not_ready"),
        (lambda: question(shards=(0, 3)), "not_ready"),
        (lambda: question(dim=4), "dimension_mismatch"),
        (lambda: question(vectors=np.full(8, np.nan, "<f4")), "invalid_vector"),
        (lambda: question(vectors=np.zeros(8, "<f4")), "invalid_vector"),
        (lambda: question(vectors=np.ones(800_000, "<f4"), k=1000), "invalid"),
        (lambda: question(k=remote.MAX_K), "invalid"),
        (lambda: question(exact=False, params=[("boom", 1)]), "invalid"),
        (lambda: question(exact=False, params=[("ef_search", -1)]), "invalid"),
        (lambda: question(conditions=b'[["boom","$eq",1]]'), "invalid"),
        (lambda: question(conditions=b'[["part","$gt","x"]]'), "invalid"),
        (lambda: question(conditions=b'[["part","$eq",{}]]'), "protocol"),
        (lambda: question(conditions=b'[["part","$gt",[1]]]'), "protocol"),
        (lambda: question(conditions=b'[["part","$in",5]]'), "protocol"),
        (lambda: question(conditions=b'[["part","$in",[[]]]]'), "protocol"),
        (lambda: question(conditions=b'[["part","$boom",5]]'), "protocol"),
        (lambda: question(conditions=b"[["), "protocol"),
        (lambda: question(timeout_ms=0.001), "deadline_exceeded"),
        (lambda: remote.message(Kind.FIND, 1, remote.Find("sharded", "v1", "x")), "not_ready"),
        (lambda: remote.message(Kind.EMBED, 1, remote.Embed("sharded", digest(), ["x"], "query", 100.0)), "invalid"),
        (lambda: remote.message(Kind.EMBED, 1, remote.Embed("sharded", digest(), ["x"], "boom", 100.0)), "protocol"),
        (lambda: remote.message(Kind.DESCRIBE, 1, remote.Describe("none", "v1")), "not_ready"),
    ],
    ids=range(24),
)
def test_a_question_that_cannot_be_answered_is_told_why_and_the_connection_stays(
    node: Service, data: Callable[[], bytes], code: str
) -> None:
    with Peer(node) as peer:
        found = peer.reply(data())
        assert found is not None, "it was cut off"
        kind, request, failed = found
        assert (kind, request) == (Kind.FAILED, 1) and failed.code == code, failed
        assert (peer.reply(question(2)) or ("closed",))[0] is Kind.PART


def test_a_plain_question_is_answered_at_once_and_alike(node: Service) -> None:
    """Once its like was measured to be short, of one shard or several. What is not plain takes the long way."""

    def long(asked: Any) -> Any:
        return asyncio.run(ANSWERS[Kind.SEARCH](engine, asked))[1]

    def timeless(part: Any) -> Any:
        return msgspec.structs.replace(part, queue_s=0.0, search_s=0.0, rerank_s=0.0)

    catalog = Catalog(index("sharded"), ServeSettings())
    engine = Engine(catalog, ServeSettings(inline_ms=1000), Metrics(), threads=1)
    catalog.refresh()
    try:
        for shards in ((0,), (1,), (2,), (2, 0), (0, 1, 2)):
            for k in (1, 3, 10):
                one = asked(shards=shards, exact=False, k=k)
                part = long(one)
                assert timeless(part_now(engine, one)) == timeless(part) and len(part.ids) == k
        odd: list[dict[str, Any]] = [
            {"conditions": remote.write_conditions((Condition("year", "$gt", 0),))},
            {"include": ["fields"]},
            {"rerank_depth": 10},
            {"max_visited": 5},
            {"exact": True},
            {"of": 2},
            {"vectors": CORPUS.vectors[:2]},
            {"k": 100_000},
            {"vectors": np.zeros(7, "<f4"), "dim": 7},
            {"digest": "another"},
            {"shards": (0, 7)},
            {"shards": (7,)},
        ]
        for changed in odd:
            one = asked(**{"shards": (0,), "exact": False, **changed})
            with contextlib.suppress(VecsvcError):
                long(one)
            assert part_now(engine, one) is None, changed
    finally:
        engine.close()
        catalog.close()


def test_rows_are_found_by_id_of_any_sort_and_what_is_no_row_is_none(node: Service) -> None:
    with Peer(node) as peer:
        for id in ("s-5", "none", "", 5, -(2**63), "x" * 100_000):
            kind, _, found = peer.reply(remote.message(Kind.FIND, 1, remote.Find("sharded", digest(), id))) or (
                None,
                0,
                None,
            )
            assert kind is Kind.FOUND
            assert (found.vector is not None) == (id == "s-5")


def test_a_question_that_comes_byte_by_byte_is_answered(node: Service) -> None:
    with Peer(node) as peer:
        for byte in HELLO + question(3):
            peer.send(bytes([byte]))
        kinds = [(peer.next() or (None,))[0] for _ in range(2)]
        assert kinds == [Kind.HOLDINGS, Kind.PART]


def test_thousands_of_questions_at_once_are_answered_or_refused_one_by_one(node: Service) -> None:
    before = node.rss_bytes()
    with Peer(node) as peer:
        n = 5000
        data = b"".join(question(number) for number in range(1, n + 1))
        sender = threading.Thread(target=peer.send, args=(data,))
        sender.start()
        found: dict[int, Kind] = {}
        for _ in range(n):
            kind, request, message = peer.next() or (None, 0, None)
            assert kind is Kind.PART or (kind is Kind.FAILED and message.code == "overloaded"), message
            found[request] = kind
        sender.join()
        assert len(found) == n and Kind.PART in found.values()
    answers(node)
    assert node.rss_bytes() - before < 64 << 20


def test_cancelled_questions_leave_nothing_behind(node: Service) -> None:
    """Of more than may wait at once, so that one that stayed would be felt."""
    with Peer(node) as peer:
        n = 2 * shard_server.MAX_WAITING
        for number in range(1, n + 1):
            peer.send(question(number) + remote.frame(Kind.CANCEL, number))
        peer.send(remote.frame(Kind.PING, n + 1))
        while (found := peer.next()) is not None and found[0] is not Kind.PONG:
            pass
        assert (peer.reply(question(n + 2)) or (None,))[0] is Kind.PART
    answers(node)


def test_silent_and_half_open_connections_take_nothing_from_others(node: Service) -> None:
    files = node.open_files()
    half = question()[:40]
    peers = [Peer(node) for _ in range(100)]
    for peer in peers:
        peer.send(half)
    answers(node)
    for peer in peers:
        peer.socket.close()
    wait_until(lambda: node.open_files() <= files + 2, lambda: (files, node.open_files()))


def test_damaged_messages_with_a_right_checksum_are_no_surprise(node: Service) -> None:
    chance = random.Random(11)
    kinds = {
        Kind.SEARCH: question(conditions=b'[["part","$gt",5]]', include=["fields", "vector", "explain"]),
        Kind.FIND: remote.message(Kind.FIND, 1, remote.Find("sharded", digest(), "s-5")),
        Kind.EMBED: remote.message(Kind.EMBED, 1, remote.Embed("sharded", digest(), ["x"], "query", 100.0)),
        Kind.DESCRIBE: remote.message(Kind.DESCRIBE, 1, remote.Describe("sharded", digest())),
    }
    peer = Peer(node)
    for number in range(1500):
        kind = chance.choice(list(kinds))
        payload = bytearray(kinds[kind][13:])
        for _ in range(chance.randint(1, 3)):
            match chance.randrange(3):
                case 0:
                    payload[chance.randrange(len(payload))] = chance.randrange(256)
                case 1:
                    payload[chance.randrange(len(payload))] ^= 1 << chance.randrange(8)
                case _:
                    del payload[chance.randrange(len(payload))]
        peer.send(struct.pack("<IBII", len(payload), kind, number + 1, zlib.crc32(payload)) + payload)
        if number % 10 == 9:
            peer.send(remote.frame(Kind.PING, 0))
            while (found := peer.next()) is not None and found[0] is not Kind.PONG:
                pass
            if found is None:
                peer.socket.close()
                peer = Peer(node)
    peer.socket.close()
    answers(node)


def test_lines_about_what_strangers_send_are_few(node: Service) -> None:
    def lines() -> int:
        return sum(line["message"] == "front door cut off" for line in node.log())

    before, began = lines(), time.monotonic()
    for _ in range(200):
        with Peer(node) as peer:
            peer.send(b"\xff" * 20)
            assert peer.next() is None
    took_s = time.monotonic() - began
    assert lines() - before <= shard_server.LOG_LINES_PER_S * (took_s + 2)


# ----------------------------------------------------------------------------------------------- in this process


def serving(check: Callable[[ShardServer, int], Coroutine[Any, Any, None]]) -> None:
    """Run with a shard server of our own, whose insides can be looked at."""

    async def run() -> None:
        settings = ServeSettings(search_threads=1, inline_ms=0.0, shard_port=0)
        catalog = Catalog(index("sharded"), settings)
        catalog.refresh()
        engine = Engine(catalog, settings, Metrics(), threads=1)
        server = ShardServer(engine, catalog)
        port = await server.listen("127.0.0.1", 0)
        try:
            await check(server, port)
        finally:
            await server.finish(5.0)
            engine.close()
            catalog.close()

    asyncio.run(run())


async def until(happens: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not happens():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


def test_a_cancelled_question_is_not_searched_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    go, begun = threading.Event(), 0
    search = Shard.search

    def slow(*arguments: Any, **more: Any) -> Any:
        nonlocal begun
        begun += 1
        assert go.wait(30)
        return search(*arguments, **more)

    async def check(server: ShardServer, port: int) -> None:
        nonlocal begun
        monkeypatch.setattr(Shard, "search", slow)
        begun = 0
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        for number in range(1, 6):
            writer.write(question(number, shards=(0,)))
        await until(lambda: begun == 1 and server.engine.in_flight == 5)
        # One is searched and four wait for the only thread; nobody wants four of the five.
        for number in range(1, 5):
            writer.write(remote.frame(Kind.CANCEL, number))
        await until(lambda: sum(len(c.tasks) for c in server.connections) == 1)
        go.set()
        await until(lambda: server.engine.in_flight == 0)
        assert begun == 2
        writer.close()

    serving(check)


def test_what_a_lost_front_door_asked_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()
    search = Shard.search

    def slow(*arguments: Any, **more: Any) -> Any:
        assert go.wait(30)
        return search(*arguments, **more)

    async def check(server: ShardServer, port: int) -> None:
        monkeypatch.setattr(Shard, "search", slow)
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(question(1) + question(2) + question(3)[:50])
        await until(lambda: server.engine.in_flight == 2)
        assert server.unfinished_bytes == 50
        writer.transport.abort()
        await until(lambda: not server.connections)
        assert server.unfinished_bytes == 0
        go.set()
        await until(lambda: server.engine.in_flight == 0)

    serving(check)


def test_who_does_not_say_hello_is_shown_out_and_who_comes_too_many_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_server, "GREET_S", 0.3)
    monkeypatch.setattr(shard_server, "MAX_FRONT_DOORS", 3)

    async def check(server: ShardServer, port: int) -> None:
        greeted, greeting = await asyncio.open_connection("127.0.0.1", port)
        greeting.write(HELLO)
        silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
        await until(lambda: len(server.connections) == 3)
        more, writer = await asyncio.open_connection("127.0.0.1", port)
        with contextlib.suppress(ConnectionError):
            assert await more.read() == b""
        writer.close()
        await until(lambda: len(server.connections) == 1)
        assert next(iter(server.connections)).greeted
        await greeted.readexactly(13)
        for _, one in (*silent, (None, greeting)):
            one.close()

    serving(check)


def test_parts_of_questions_have_a_bound_over_all_front_doors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_server, "MAX_UNFINISHED_BYTES", 100_000)

    async def check(server: ShardServer, port: int) -> None:
        writers = []
        for _ in range(4):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(HELLO + struct.pack("<IBII", 10_000_000, Kind.SEARCH, 1, 0) + bytes(40_000))
            await writer.drain()
            writers.append(writer)
        await until(lambda: len(server.connections) <= 2)
        await until(lambda: server.unfinished_bytes <= 100_000)
        for writer in writers:
            writer.transport.abort()
        await until(lambda: server.unfinished_bytes == 0)

    serving(check)


def test_front_doors_are_told_what_changes(tmp_path: Path) -> None:
    async def check(server: ShardServer, port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        frames = Frames(remote.OF_NODES, 1 << 20)
        heard: list[remote.Holdings] = []

        async def listen() -> None:
            while data := await reader.read(1 << 16):
                for kind, _, payload in frames.feed(data):
                    assert kind is Kind.HOLDINGS
                    heard.append(remote.decode(kind, payload))

        listening = asyncio.ensure_future(listen())
        writer.write(HELLO)
        await until(lambda: len(heard) == 1)
        assert [(h.index, h.version, h.current, h.shards, h.shards_total) for h in heard[0].held] == [
            ("sharded", "v1", True, [0, 1, 2], 3)
        ]
        assert not heard[0].draining and not heard[0].problem
        server.drain()
        await until(lambda: heard[-1].draining)
        await server.finish(5.0)
        await listening
        writer.close()

    serving(check)


def test_a_message_is_an_array_so_that_an_older_end_sees_that_it_does_not_understand() -> None:
    longer = msgspec.msgpack.encode([*msgspec.to_builtins(remote.Hello()), "more"])
    with pytest.raises(remote.ProtocolError):
        remote.decode(Kind.HELLO, longer)
