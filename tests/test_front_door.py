"""A front door answers as one process over all shards would: results, formats, and errors."""

from __future__ import annotations

import base64
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from local_cluster import cluster, end, start, wait_until
from service import BINARY, GRAPH, JSON, Corpus, Service, build, corpora, encoder_folder, vectors, work_folder

# ---------------------------------------------------------------------------------- the same as one process


@functools.cache
def sharded_folder() -> Path:
    """Every sort of corpus, in three shards each."""
    out = work_folder() / "sharded"
    for name in ("products", "numbers", "sharded", "texts"):
        corpus = corpora()[name]
        options: dict[str, Any] = {"kind": GRAPH, "metric": corpus.metric, "shards": 3}
        if corpus.fields[0]:
            options["fields"] = ",".join(corpus.fields[0])
        if name == "texts":
            options["encoder"] = str(encoder_folder())
        build(corpus, out, name, **options)
    return out


@pytest.fixture(scope="module")
def both() -> Iterator[tuple[Service, Service]]:
    """A front door over nodes that hold different shards, some the same; and one process that holds all."""
    settings = {"encoder_threads": 1}
    with cluster(sharded_folder(), ["0-1", "1-2", "2"], **settings) as made:
        alone = start("serve", str(sharded_folder()), **settings)
        alone.wait_for("ready")
        try:
            yield made.door, alone
        finally:
            end(alone)


def without_times(answer: Any) -> Any:
    answer = {name: value for name, value in answer.items() if name != "took_ms"}
    if "explain" in answer:
        answer["explain"] = [{**one, "took_ms": 0} for one in answer["explain"]]
    return answer


def same(both: tuple[Service, Service], path: str, question: Any, status: int = 200) -> Any:
    door, alone = (service.post(path, question) for service in both)
    assert (door.status, alone.status) == (status, status), (question, door, alone)
    found, expected = without_times(door.json()), without_times(alone.json())
    assert found == expected
    return found


def near(corpus: Corpus, row: int) -> list[float]:
    return [float(x) for x in corpus.vectors[row] * 2 + 0.05]


@pytest.mark.parametrize("name", ["products", "numbers", "sharded", "texts"])
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"k": 1},
        {"k": 100},
        {"k": 1000},
        {"params": {"exact": True}},
        {"include": ["explain"]},
        {"include": ["fields", "vector"]},
        {"rerank": {"depth": 50}},
        {"timeout_ms": 20_000, "partial": True},
        {"params": {"ef_search": 200}} if GRAPH == "hnsw" else {},
    ],
    ids=str,
)
def test_an_answer_is_that_of_one_process_over_all_shards(
    both: tuple[Service, Service], name: str, more: dict[str, Any]
) -> None:
    corpus = corpora()[name]
    for row in (0, 17, 59):
        found = same(both, f"/indexes/{name}/search", {"vector": near(corpus, row), **more})
        k = more.get("k", 10)
        assert [hit["id"] for hit in found["results"]] == corpus.ids_of(near(corpus, row), k)
        assert found["coverage"] == {"shards_ok": 3, "shards_total": 3, "degraded": []}


@pytest.mark.parametrize(
    "condition",
    [
        {"year": 1995},
        {"year": {"$gte": 2000, "$lt": 2010}},
        {"lang": {"$in": ["de", "日本"]}},
        {"flag": True},
        {"flag": {"$ne": True}},
        {"price": {"$gt": 10.5}},
        {"day": {"$gte": "2024-02-01"}},
        {"made": {"$lt": "2024-01-31T13:00:00"}},
        {"seen": {"$gt": "2024-02-05T00:00:00Z"}},
        {"$and": [{"year": {"$gt": 1995}}, {"lang": "en"}]},
        {"year": 1},
    ],
    ids=str,
)
def test_a_filtered_answer_is_that_of_one_process(both: tuple[Service, Service], condition: dict[str, Any]) -> None:
    corpus = corpora()["products"]
    question = {"vector": near(corpus, 3), "filter": condition, "include": ["fields"]}
    same(both, "/indexes/products/search", question)
    same(both, "/indexes/products/search", {**question, "params": {"exact": True}, "k": 100})


def test_a_question_by_id_leaves_the_row_out_whichever_shard_holds_it(both: tuple[Service, Service]) -> None:
    for name in ("products", "numbers", "sharded"):
        corpus = corpora()[name]
        for row in (*range(12), 57, 299):
            found = same(both, f"/indexes/{name}/search", {"id": corpus.ids[row], "k": 7})
            expected = corpus.ids_of(corpus.vectors[row], 7, without=corpus.ids[row])
            assert [hit["id"] for hit in found["results"]] == expected


def nearly(one: Any, other: Any) -> bool:
    """Equal but for the last digits of numbers: what a text shares a run of the encoder with moves those."""
    if isinstance(one, float):
        return isinstance(other, float) and abs(one - other) < 1e-5
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(nearly(one[n], other[n]) for n in one)
    if isinstance(one, list):
        return isinstance(other, list) and len(one) == len(other) and all(map(nearly, one, other))
    return bool(one == other)


def test_a_text_is_encoded_once_and_answered_as_by_one_process(both: tuple[Service, Service]) -> None:
    def asked(path: str, question: Any) -> Any:
        door, alone = (without_times(service.post(path, question).json()) for service in both)
        assert nearly(door, alone), (door, alone)
        return door

    for text in ("river cloud", "stone " * 400):
        found = asked("/indexes/texts/search", {"text": text, "k": 5, "include": ["fields"]})
        assert found["encoder"] == "tiny" and len(found["results"]) == 5
    assert found["coverage"]["degraded"]
    asked("/indexes/texts/search/batch", {"texts": ["river", "fire bread", "music " * 300], "k": 3})
    door, alone = (service.get("/indexes/texts/search?q=house+tree&k=4") for service in both)
    assert nearly(without_times(door.json()), without_times(alone.json()))
    assert len(asked("/v1/embeddings", {"input": ["river", "cloud"], "model": "texts"})["data"]) == 2
    listed, alone_listed = (service.get("/v1/models").json() for service in both)
    assert listed == alone_listed and "texts" in {one["id"] for one in listed["data"]}


@pytest.mark.parametrize("k", [1, 10, 200])
@pytest.mark.parametrize("n", [1, 3, 70])
def test_a_batch_is_answered_as_by_one_process_in_every_format(both: tuple[Service, Service], n: int, k: int) -> None:
    corpus = corpora()["sharded"]
    rows = vectors(n, seed=9)
    found = same(both, "/indexes/sharded/search/batch", {"vectors": rows.tolist(), "k": k})
    assert [[hit["id"] for hit in hits] for hits in found["results"]] == [corpus.ids_of(row, k) for row in rows]
    encoded = [{"base64": base64.b64encode(row.tobytes()).decode()} for row in rows]
    assert same(both, "/indexes/sharded/search/batch", {"vectors": encoded, "k": k}) == found
    path = f"/indexes/sharded/search/batch?k={k}"
    raw = [without_times(service.ask("POST", path, rows.tobytes(), BINARY).json()) for service in both]
    assert raw == [found, found]
    accept = BINARY | {"Accept": "application/vnd.apache.arrow.stream"}
    tables = [pa.ipc.open_stream(s.ask("POST", path, rows.tobytes(), accept).body).read_all() for s in both]
    assert tables[0].equals(tables[1]) and tables[0].num_rows == n * k


def test_what_indexes_there_are_is_told_as_by_one_process(both: tuple[Service, Service]) -> None:
    for path in ("/indexes", "/indexes/products", "/indexes/texts", "/openapi.json", "/readyz", "/livez"):
        door, alone = (service.get(path) for service in both)
        told = [json.dumps(service.json(), sort_keys=True) for service in (door, alone)]
        # How many tokens may wait for an encoder only the node that has it knows.
        assert told[0].replace("too many tokens", "1048576 tokens") == told[1], path
        assert door.status == alone.status


VECTOR = [1.0] * 8
BAD: list[tuple[str, Any]] = [
    ("/search", {"vector": VECTOR}),
    ("/indexes/none/search", {"vector": VECTOR}),
    ("/indexes/products/search", {}),
    ("/indexes/products/search", b""),
    ("/indexes/products/search", b"{"),
    ("/indexes/products/search", b"[" * 10_000),
    ("/indexes/products/search", b'{"vector": [NaN]}'),
    ("/indexes/products/search", {"vector": [1.0] * 7}),
    ("/indexes/products/search", {"vector": [0.0] * 8}),
    ("/indexes/products/search", {"vector": [1e39] * 8}),
    ("/indexes/products/search", {"vector": [1e30] * 8}),
    ("/indexes/products/search", {"vector": VECTOR, "k": 0}),
    ("/indexes/products/search", {"vector": VECTOR, "k": 10**9}),
    ("/indexes/products/search", {"vector": VECTOR, "k": 2**70}),
    ("/indexes/products/search", {"vector": VECTOR, "limit": 2, "k": 2}),
    ("/indexes/products/search", {"vector": VECTOR, "id": "p-20"}),
    ("/indexes/products/search", {"vector": VECTOR, "boom": 1}),
    ("/indexes/products/search", {"vector": VECTOR, "timeout_ms": -1}),
    ("/indexes/products/search", {"vector": VECTOR, "params": {"boom": 1}}),
    ("/indexes/products/search", {"vector": VECTOR, "params": {"ef_search": -1}}),
    ("/indexes/products/search", {"vector": VECTOR, "params": {"ef_search": 2**70}}),
    ("/indexes/products/search", {"vector": VECTOR, "params": {"exact": 1}}),
    ("/indexes/products/search", {"vector": VECTOR, "params": {"max_visited": 0}}),
    ("/indexes/products/search", {"vector": VECTOR, "rerank": {"depth": 10**9}}),
    ("/indexes/products/search", {"vector": VECTOR, "include": ["boom"]}),
    ("/indexes/products/search", {"vector": VECTOR, "filter": {"boom": 1}}),
    ("/indexes/products/search", {"vector": VECTOR, "filter": {"year": {"$boom": 1}}}),
    ("/indexes/products/search", {"vector": VECTOR, "filter": {"year": "x"}}),
    ("/indexes/products/search", {"vector": VECTOR, "filter": {"year": 2**70}}),
    ("/indexes/products/search", {"vector": VECTOR, "filter": {"year": -(2**63) - 1}}),
    ("/indexes/products/search", {"vector": VECTOR, "filter": {"year": {"$in": [2**64]}}}),
    ("/indexes/products/search", {"vector": VECTOR, "filter": {"year": 1e300}}),
    ("/indexes/products/search", {"vector": VECTOR, "filter": {"day": "2024-13-01"}}),
    ("/indexes/products/search", {"vector": VECTOR, "filter": {"lang": "\ud800"}}),
    ("/indexes/products/search", {"vector": VECTOR, "filter": {"lang": {"$in": []}}}),
    ("/indexes/products/search", {"text": "river"}),
    ("/indexes/products/search", {"id": "none"}),
    ("/indexes/products/search", {"id": 5}),
    ("/indexes/products/search", {"id": 2**70}),
    ("/indexes/products/search", {"id": "x" * 1000}),
    ("/indexes/numbers/search", {"id": "5"}),
    ("/indexes/numbers/search", {"id": -5}),
    ("/indexes/texts/search", {"text": ""}),
    ("/indexes/products/search/batch", {"vectors": []}),
    ("/indexes/products/search/batch", {"vectors": [VECTOR, [1.0]]}),
    ("/indexes/products/search/batch", {"vectors": [VECTOR, [0.0] * 8]}),
    ("/indexes/products/search/batch", {"vectors": [VECTOR] * 2000}),
    ("/indexes/products/search/batch", {"vectors": [VECTOR] * 1000, "k": 1000, "include": ["fields", "vector"]}),
    ("/indexes/products/search/batch", {"texts": ["river"]}),
    ("/v1/embeddings", {"input": "x", "model": "none"}),
    ("/v1/embeddings", {"input": [], "model": "texts"}),
    ("/nowhere", {}),
]


@pytest.mark.parametrize(("path", "question"), BAD, ids=range(len(BAD)))
def test_a_bad_question_gets_the_status_and_words_of_one_process(
    both: tuple[Service, Service], path: str, question: Any
) -> None:
    door, alone = (service.post(path, question) for service in both)
    assert (door.status, without_times(door.json())) == (alone.status, without_times(alone.json()))


def test_other_bad_requests_get_the_same_answers_too(both: tuple[Service, Service]) -> None:
    def replies(method: str, path: str, body: bytes | None = None, **headers: str) -> list[tuple[int, Any]]:
        made = [service.ask(method, path, body, headers) for service in both]
        return [(reply.status, reply.json()) for reply in made]

    for door, alone in (
        replies("GET", "/indexes/products/search"),
        replies("GET", "/indexes/none"),
        replies("PUT", "/indexes/products/search", b"{}", **JSON),
        replies("POST", "/indexes/products/search", b"{}", **{"Content-Type": "text/plain"}),
        replies("POST", "/indexes/products/search?k=2", b"{}", **JSON),
        replies("POST", "/indexes/products/search", bytes(31), **BINARY),
        replies("POST", "/indexes/products/search", np.ones(16, "<f4").tobytes(), **BINARY),
        replies("POST", "/indexes/products/search", bytes(2 << 20), **JSON),
        replies(
            "POST",
            "/indexes/products/search/batch?include=fields",
            bytes(32),
            **BINARY,
            Accept="application/vnd.apache.arrow.stream",
        ),
    ):
        assert door == alone and door[0] >= 400


def test_a_front_door_has_no_folder_to_reload_or_roll_back(both: tuple[Service, Service]) -> None:
    door, _ = both
    for path in ("/reload", "/indexes/products/rollback"):
        assert door.ask("POST", path, admin=True).status == 404


def test_where_no_node_is_left_to_encode_a_text_partial_is_no_remedy() -> None:
    with cluster(sharded_folder(), ["0-2"], encoder_threads=1) as made:
        ask = functools.partial(made.door.post, "/indexes/texts/search", {"text": "a green parrot", "partial": True})
        wait_until(lambda: ask().status == 200, ask)
        made.members[0].kill()
        wait_until(lambda: ask().status == 503, ask)
        reply = ask()
    assert "no node that is connected has it" in reply.message and "partial" not in reply.message
