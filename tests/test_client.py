"""The Python clients against the running service: answers as our types, errors as our classes, connections renewed."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import service
from service import DIM, GRAPH, Service, corpora

from vecsvc import client as module
from vecsvc import errors, schemas
from vecsvc.access import added, new_key
from vecsvc.client import AsyncClient, Client
from vecsvc.types import BatchAnswer, SearchAnswer

QUERY = service.vectors(1, seed=80)[0]
BATCH = service.vectors(5, seed=81)


@pytest.fixture(scope="module")
def running() -> Iterator[Service]:
    for name in corpora():
        service.index(name)
    settings = {"reload_poll_s": 0, "keepalive_s": 1, "header_timeout_s": 1, "max_batch": 5}
    with service.running(service.work_folder() / "all", **settings) as started:
        yield started


class Sync:
    """An AsyncClient with the calls of a Client, so that both take the same tests."""

    def __init__(self, url: str, **options: Any) -> None:
        self._client = AsyncClient(url, **options)
        self._loop = asyncio.new_event_loop()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method: Callable[..., Awaitable[Any]] = getattr(self._client, name)
        return lambda *arguments, **named: self._loop.run_until_complete(method(*arguments, **named))

    def idle(self, seconds: float) -> None:
        self._loop.run_until_complete(asyncio.sleep(seconds))

    def __enter__(self) -> Sync:
        return self

    def __exit__(self, *error: object) -> None:
        self._loop.run_until_complete(self._client.close())
        self._loop.close()


CLIENTS: list[Any] = [Client, Sync]
both = pytest.mark.parametrize("make", CLIENTS, ids=["sync", "async"])


@pytest.fixture(params=CLIENTS, ids=["sync", "async"])
def client(request: pytest.FixtureRequest, running: Service) -> Iterator[Any]:
    with request.param(running.url) as made:
        yield made


def ids(answer: SearchAnswer) -> list[Any]:
    return [hit.id for hit in answer.results]


# ------------------------------------------------------------------------------------------------------ answers


def test_a_vector_a_text_and_an_id_are_answered_as_our_types(client: Any) -> None:
    for name in ("products", "numbers", "sharded", "squared"):
        answer = client.search(vector=QUERY, index=name, k=7, params={"exact": True})
        assert type(answer) is SearchAnswer and answer.index.name == name
        assert ids(answer) == corpora()[name].ids_of(QUERY, 7)
    assert len(client.search(text="river", index="texts", k=3).results) == 3
    own = corpora()["texts"]
    found = client.search(id="t-5", index="texts", k=3, params={"exact": True})
    assert ids(found) == own.ids_of(own.vectors[5], 3, without="t-5")


@pytest.mark.parametrize(
    "vector", [QUERY, QUERY.astype(np.float64), QUERY.tolist(), tuple(QUERY.tolist()), QUERY.astype(">f4")]
)
def test_a_vector_may_be_any_array(running: Service, vector: Any) -> None:
    with Client(running.url) as client:
        assert ids(client.search(vector=vector, index="squared", k=5)) == ids(
            client.search(vector=QUERY, index="squared", k=5)
        )


def test_every_setting_travels(client: Any) -> None:
    answer = client.search(
        vector=QUERY,
        index="products",
        k=4,
        filter={"year": {"$gte": 2000}},
        params={"exact": True},
        rerank={"depth": 50},
        timeout_ms=5000,
        partial=True,
        include=["fields", "vector", "explain"],
    )
    corpus = corpora()["products"]
    assert ids(answer) == corpus.ids_of(QUERY, 4, keep=lambda row: row["year"] >= 2000)
    hit = answer.results[0]
    assert hit.fields["year"] >= 2000 and np.allclose(hit.vector, corpus.vectors[corpus.ids.index(hit.id)])
    assert answer.explain[0].allowed < 400 and answer.stats.strategy == "exact"


def test_batches_are_answered_in_their_order(client: Any) -> None:
    answer = client.search_batch(
        vectors=BATCH, index="numbers", k=3, params={"exact": True}, include=["vector"], timeout_ms=9000, partial=False
    )
    assert type(answer) is BatchAnswer
    assert [[hit.id for hit in found] for found in answer.results] == [
        corpora()["numbers"].ids_of(query, 3) for query in BATCH
    ]
    assert all(hit.vector for found in answer.results for hit in found)
    texts = client.search_batch(
        texts=["river", "stone"], index="texts", k=2, filter={"year": 1995}, rerank={"depth": 9}
    )
    assert [len(found) for found in texts.results] == [2, 2]


def test_what_is_served_and_whether_it_is_ready(client: Any) -> None:
    assert client.ready() is True
    listed = {one["name"]: one for one in client.indexes()}
    assert listed.keys() == corpora().keys() and listed["products"]["kind"] == GRAPH


def test_a_client_may_stay_for_many_calls_on_one_connection(running: Service) -> None:
    with Client(running.url) as client:
        client.ready()
        kept = client._connection.sock
        for _ in range(20):
            client.search(vector=QUERY, index="squared")
            with pytest.raises(errors.InvalidRequest):
                client.search(vector=QUERY, index="squared", k=0)
        assert client._connection.sock is kept


def test_many_async_calls_at_once_share_a_few_connections(running: Service) -> None:
    async def main() -> list[SearchAnswer]:
        async with AsyncClient(running.url, max_connections=4) as client:
            return await asyncio.gather(*(client.search(vector=QUERY, index="squared", k=k) for k in range(1, 41)))

    assert [len(answer.results) for answer in asyncio.run(main())] == list(range(1, 41))


# ------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("question", "error", "message"),
    [
        ({"vector": QUERY, "index": "nothing"}, errors.UnknownIndex, "no index 'nothing'"),
        ({"vector": QUERY}, errors.UnknownIndex, "several indexes are served"),
        ({"vector": QUERY, "index": "../products"}, errors.UnknownIndex, "'../products'"),
        ({"vector": QUERY, "index": "é"}, errors.UnknownIndex, "'é'"),
        ({"id": "nobody", "index": "products"}, errors.UnknownId, "has no id 'nobody'"),
        ({"vector": QUERY[:-1], "index": "products"}, errors.DimensionMismatch, "7 values, index 'products' has dim 8"),
        ({"vector": QUERY * np.nan, "index": "products"}, errors.InvalidVector, "vector[0] is nan"),
        ({"vector": QUERY * 0, "index": "products"}, errors.InvalidVector, "all zeros"),
        ({"vector": QUERY, "index": "products", "k": 0}, errors.InvalidRequest, "k must be an integer"),
        ({"vector": QUERY, "index": "products", "filter": {"x": 1}}, errors.InvalidRequest, "no stored field"),
        ({"text": "a", "index": "products"}, errors.InvalidRequest, "has no encoder"),
        ({"index": "products"}, errors.InvalidRequest, "exactly one of text, vector and id"),
    ],
)
def test_errors_come_back_as_the_class_that_the_service_raised(
    client: Any, question: Any, error: type[errors.VecsvcError], message: str
) -> None:
    with pytest.raises(error) as raised:
        client.search(**question)
    assert type(raised.value) is error and message in str(raised.value)


@pytest.mark.parametrize("text", [b"hi", bytearray(b"hi")])
def test_bytes_are_no_text(client: Any, text: Any) -> None:
    """They would be sent in base64, and that be searched for."""
    for ask in (
        lambda: client.search(text=text, index="products"),
        lambda: client.search_batch(texts=["a", text], index="products"),
        lambda: client.embed([text]),
    ):
        with pytest.raises(errors.InvalidRequest, match="a text must be a str, got byte"):
            ask()


def test_half_a_character_is_refused_before_it_is_sent(client: Any) -> None:
    with pytest.raises(errors.InvalidRequest, match="a text has a lone surrogate at character 2"):
        client.search(text="ab\ud800", index="products")


def test_a_batch_that_is_too_large_is_named(client: Any) -> None:
    with pytest.raises(errors.InvalidRequest, match="the batch has 6 queries, expected 1 to 5"):
        client.search_batch(vectors=np.ones((6, DIM)), index="products")


@both
def test_a_key_travels_and_its_refusals_come_back_as_our_classes(make: Any, tmp_path: Path) -> None:
    file, keys = tmp_path / "keys.toml", {"team": new_key(), "slow": new_key(), "prometheus": new_key()}
    data = added(b"", "team", keys["team"], scopes=["read"])
    data = added(data, "slow", keys["slow"], scopes=["read"], rate_per_s=0.01)
    file.write_bytes(added(data, "prometheus", keys["prometheus"], scopes=["metrics"]))
    file.chmod(0o600)
    with service.running(service.index("squared"), keys=file) as guarded:
        with make(guarded.url, api_key=keys["team"]) as client:
            assert len(client.search(vector=QUERY).results) == 10 and client.indexes()
        for key, error in ((None, errors.Unauthorized), ("x", errors.Unauthorized), ("prometheus", errors.Forbidden)):
            with make(guarded.url, api_key=keys.get(key, key)) as client, pytest.raises(error):
                client.search(vector=QUERY)
        with make(guarded.url, api_key=keys["slow"]) as client:
            client.search(vector=QUERY)
            with pytest.raises(errors.RateLimited) as refused:
                client.search(vector=QUERY)
        assert 50 < refused.value.retry_after_s <= 100


@both
def test_a_service_that_is_not_ready_says_so(make: Any) -> None:
    slow = "import time, vecsvc.catalog as c; c.check_files = lambda *a, **k: time.sleep(60)"
    with service.started(service.index("texts"), slow) as loading, make(loading.url) as client:
        assert client.ready() is False
        with pytest.raises(errors.NotReady, match="not"):
            client.search(vector=QUERY)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@both
def test_a_service_that_is_not_there_is_a_service_error(make: Any) -> None:
    port = free_port()
    with make(f"http://127.0.0.1:{port}", timeout_s=5) as client:
        with pytest.raises(errors.ServiceError, match=f"no answer from .*127.0.0.1:{port}"):
            client.search(vector=QUERY)
        assert client.ready() is False


@contextlib.contextmanager
def answering(reply: bytes | None) -> Iterator[str]:
    """A server that reads a request, sends these bytes and hangs up; None for one that never answers."""
    done = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.05)

        def work() -> None:
            while not done.is_set():
                with contextlib.suppress(TimeoutError):
                    connection, _ = server.accept()
                    with connection:
                        connection.recv(1 << 16)
                        if reply is None:
                            done.wait()
                        else:
                            connection.sendall(reply)

        thread = threading.Thread(target=work)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.getsockname()[1]}"
        finally:
            done.set()
            thread.join()


@both
@pytest.mark.parametrize(
    "reply",
    [
        b"",
        b"nonsense\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{}",
        b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 5\r\n\r\n<htm>",
        b'HTTP/1.1 418 No\r\nContent-Length: 46\r\n\r\n{"error": {"code": "teapot", "message": "tea"}}',
    ],
    ids=["nothing", "nonsense", "cut", "another's error", "unknown code"],
)
def test_what_is_no_answer_of_ours_is_a_service_error(make: Any, reply: bytes) -> None:
    with answering(reply) as url, make(url, timeout_s=5) as client, pytest.raises(errors.ServiceError):
        client.search(vector=QUERY)


@both
def test_a_service_that_does_not_answer_in_time_is_a_service_error(make: Any) -> None:
    with answering(None) as url, make(url, timeout_s=0.3) as client:
        started = time.monotonic()
        with pytest.raises(errors.ServiceError):
            client.search(vector=QUERY)
        assert time.monotonic() - started < 2


@pytest.mark.parametrize("url", ["", "localhost:8080", "ftp://x", "http://", "127.0.0.1"])
def test_an_address_that_is_none_is_refused_with_the_remedy(url: str) -> None:
    with pytest.raises(errors.ConfigError, match="write http://host:port"):
        Client(url)


# --------------------------------------------------------------------------------------------------- connections


@both
def test_a_connection_that_the_service_closed_while_it_was_idle_is_renewed(running: Service, make: Any) -> None:
    with make(running.url) as client:
        client.search(vector=QUERY, index="squared")
        files = running.open_files()
        end = time.monotonic() + 10
        while running.open_files() >= files and time.monotonic() < end:
            time.sleep(0.05)  # the client notices nothing of it
        assert running.open_files() < files
        assert len(client.search(vector=QUERY, index="squared").results) == 10


@both
def test_a_client_outlives_the_service(make: Any) -> None:
    port = free_port()
    folder = service.index("squared")
    with make(f"http://127.0.0.1:{port}") as client:
        for _ in range(2):
            with service.running(folder, port=port):
                assert len(client.search(vector=QUERY).results) == 10
            with pytest.raises(errors.ServiceError):
                client.search(vector=QUERY)


def test_a_service_below_a_path_is_reached(running: Service) -> None:
    with Client(f"{running.url}/") as client:
        assert client.ready()
    with Client(f"{running.url}/below") as client, pytest.raises(errors.ServiceError, match="/below/indexes"):
        client.indexes()


def test_numbers_of_numpy_are_taken_and_what_is_no_vector_is_named(running: Service) -> None:
    with Client(running.url) as client:
        answer = client.search(
            id=np.str_("p-20"), k=np.int64(2), filter={"year": {"$lte": np.int64(3000)}}, index="products"
        )
        assert len(answer.results) == 2
        for asked, message in (
            ({"vector": "abc"}, "vector must be numbers, got 'abc'"),
            ({"vector": [[1.0]]}, r"vector must have one dimension, got shape \(1, 1\); send many with search_batch"),
            ({"id": "p-20", "filter": {"year": object()}}, "is object, which JSON has no place for"),
        ):
            with pytest.raises(errors.VecsvcError, match=message):
                client.search(index="products", **asked)  # type: ignore[arg-type]
        with pytest.raises(
            errors.VecsvcError, match=r"vectors must have shape \(n, dim\), got \(2,\); send one with search"
        ):
            client.search_batch(vectors=[1.0, 2.0], index="products")


def test_an_error_of_the_service_comes_in_its_own_words() -> None:
    body = schemas.encode_error("artifact_damaged", "f: cut; pull it again")
    with pytest.raises(errors.ArtifactDamaged) as caught:
        module._decode(500, body, dict)
    assert str(caught.value) == "f: cut; pull it again"
