"""Answers over HTTP: the ids and the order that brute force gives, for every way to ask; errors in one shape."""

from __future__ import annotations

import base64
import datetime as dt
import json
import struct
import textwrap
import time
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import service
from numpy.typing import NDArray
from prometheus_client.parser import text_string_to_metric_families
from service import BINARY, DIM, GRAPH, JSON, Corpus, Reply, Service, corpora

from vecsvc.catalog import Served
from vecsvc.config import ServeSettings
from vecsvc.process import node
from vecsvc.storage import IndexFolder

NAMES = ("products", "numbers", "sharded", "squared", "near", "texts")
QUERIES = service.vectors(8, seed=11)
ALL = {"params": {"exact": True}}
WIDE = {"params": {"ef_search": 1000}} if GRAPH == "hnsw" else {}  # a graph search so broad that it misses nothing
only_graph = pytest.mark.skipif(GRAPH != "hnsw", reason="hnswlib is not installed")


@pytest.fixture(scope="module")
def every() -> Iterator[Service]:
    """Serves every index at once."""
    for name in corpora():
        service.index(name)
    with service.running(service.work_folder() / "all", reload_poll_s=0) as running:
        yield running


@pytest.fixture(scope="module")
def texts() -> Iterator[Service]:
    """Serves one index, that has an encoder."""
    with service.running(service.index("texts"), reload_poll_s=0) as running:
        yield running


def plain(vector: NDArray[np.float32]) -> list[float]:
    return [float(value) for value in vector]


def encoded(vector: NDArray[np.float32]) -> dict[str, str]:
    return {"base64": base64.b64encode(vector.astype("<f4").tobytes()).decode()}


def ids(answer: Any) -> list[Any]:
    return [hit["id"] for hit in answer["results"]]


def encode(text: str) -> NDArray[np.float32]:
    from vecsvc.encoders.onnx import open_encoder

    encoder = open_encoder(service.encoder_folder())
    try:
        found: NDArray[np.float32] = encoder.encode([text], "query")[0]
        return found
    finally:
        encoder.close()


# ------------------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize("settings", [ALL, WIDE, {"rerank": {"depth": 400}}], ids=["exact", "wide", "reranked"])
@pytest.mark.parametrize("name", NAMES)
def test_a_vector_gets_the_rows_in_the_order_of_brute_force(every: Service, name: str, settings: Any) -> None:
    if name == "numbers" and settings is WIDE:
        settings = {}
    corpus = corpora()[name]
    for query in QUERIES:
        answer = every.search(name, vector=plain(query), k=12, **settings)
        expected = corpus.nearest(query, 12)
        assert ids(answer) == [id for id, _ in expected]
        assert [hit["distance"] for hit in answer["results"]] == pytest.approx([d for _, d in expected], abs=1e-5)


@pytest.mark.parametrize("name", ["products", "texts"])
def test_default_settings_give_what_the_index_itself_gives(every: Service, name: str) -> None:
    folder = IndexFolder(service.index(name))
    served = Served(folder, "v1", ServeSettings())
    found = served.shards[0].index.search(QUERIES, 10, served.params)
    for query, labels in zip(QUERIES, found.labels, strict=True):
        assert ids(every.search(name, vector=plain(query))) == [corpora()[name].ids[label] for label in labels]
    served.retire()


@pytest.mark.parametrize("name", NAMES)
def test_base64_is_the_same_question_as_numbers(every: Service, name: str) -> None:
    for query in QUERIES:
        numbers, base = (every.search(name, vector=v, k=7) for v in (plain(query), encoded(query)))
        assert numbers["results"] == base["results"]


@pytest.mark.parametrize("name", NAMES)
def test_scores_say_greater_is_better_in_each_metric_s_own_way(every: Service, name: str) -> None:
    metric = corpora()[name].metric
    hits = every.search(name, vector=plain(QUERIES[0]), k=20)["results"]
    for hit in hits:
        expected = -hit["distance"] if metric == "l2" else 1.0 - hit["distance"]
        assert hit["score"] == pytest.approx(expected, abs=1e-6)
    assert [hit["score"] for hit in hits] == sorted((hit["score"] for hit in hits), reverse=True)


def test_a_text_is_encoded_and_answered_in_one_request(texts: Service) -> None:
    text = "stone river music"
    answer = texts.search(text=text, k=5, **ALL)
    assert ids(answer) == corpora()["texts"].ids_of(encode(text), 5)
    assert answer["encoder"] == "tiny" and answer["took_ms"]["encode"] > 0
    assert "encoder" not in texts.search(vector=plain(encode(text)), k=5)


def test_bytes_in_a_url_that_are_no_utf_8_are_refused(texts: Service) -> None:
    for path in ("/search?q=red%ff", "/indexes/texts/search?q=%C3", "/search?q=red&k=%80"):
        reply = texts.get(path)
        assert reply.status == 400 and "the URL escapes bytes that are no UTF-8, %" in reply.message
    assert texts.get("/search?q=caf%C3%A9+%EF%BF%BD+100%25").status == 200


def test_get_and_post_give_the_same_answer(texts: Service) -> None:
    text = "cloud & fire = 100% naïve 日本"
    posted = texts.search(text=text, k=5, params={"exact": True}, include=["fields", "vector"])
    query = urllib.parse.urlencode({"q": text, "k": 5, "exact": "true", "include": "fields,vector"})
    for path in ("/search", "/indexes/texts/search"):
        got = texts.get(f"{path}?{query}").json()
        assert got["results"] == posted["results"] and len(got["results"]) == 5
        assert got.keys() == posted.keys()


def test_with_one_index_both_paths_mean_it(texts: Service) -> None:
    assert texts.search(id="t-1")["results"] == texts.search("texts", id="t-1")["results"]


@pytest.mark.parametrize("name", NAMES)
def test_a_query_by_id_is_its_vector_s_query_without_its_own_row(every: Service, name: str) -> None:
    corpus = corpora()[name]
    for row in range(len(corpus.ids))[:20]:
        answer = every.search(name, id=corpus.ids[row], k=9, **ALL)
        assert ids(answer) == corpus.ids_of(corpus.vectors[row], 9, without=corpus.ids[row])


def test_a_query_by_id_with_a_filter_leaves_the_own_row_out_too(every: Service) -> None:
    corpus = corpora()["products"]
    row = next(i for i, fields in enumerate(corpus.fields) if fields["year"] == 2001)
    answer = every.search("products", id=corpus.ids[row], k=400, filter={"year": 2001})
    expected = corpus.ids_of(corpus.vectors[row], 400, keep=lambda f: f["year"] == 2001, without=corpus.ids[row])
    assert ids(answer) == expected and answer["stats"]["shortfall"] == 400 - len(expected)


@pytest.mark.parametrize(
    ("name", "id"),
    [("products", "no such"), ("products", "é"), ("products", ""), ("products", 5), ("numbers", 300), ("numbers", "5")],
)
def test_an_unknown_id_is_404_and_named(every: Service, name: str, id: Any) -> None:
    reply = every.post(f"/indexes/{name}/search", {"id": id})
    assert reply.status == 404 and repr(id) in reply.message and name in reply.message


@pytest.mark.parametrize("k", [1, 3, 60, 1000])
@pytest.mark.parametrize("word", ["k", "limit", "top_k", "topK"])
def test_k_is_how_many_come_back_where_so_many_exist(texts: Service, word: str, k: int) -> None:
    answer = texts.search(vector=plain(QUERIES[0]), **{word: k})
    assert len(answer["results"]) == min(k, 60)
    assert answer["stats"]["shortfall"] == max(0, k - 60)
    assert len(texts.get(f"/search?q=river&{word}={k}").results) == min(k, 60)


def test_ten_come_back_where_nobody_says_how_many(texts: Service) -> None:
    assert len(texts.search(text="river")["results"]) == 10


def test_equal_vectors_come_in_the_order_of_the_corpus_whatever_the_shards(every: Service) -> None:
    corpus = corpora()["sharded"]
    for row in range(5):
        answer = every.search("sharded", vector=plain(corpus.vectors[row]), k=4)
        assert ids(answer) == [f"s-{row + 100 * copy}" for copy in range(4)]
        assert answer["coverage"] == {"shards_ok": 3, "shards_total": 3, "degraded": []}


# ------------------------------------------------------------------------------------------------- filters


def at_least(name: str, value: Any) -> Callable[[dict[str, Any]], bool]:
    return lambda row: row[name] is not None and row[name] >= value


NOON = dt.datetime(2024, 1, 31, 13, 30)
UTC_NOON = dt.datetime(2024, 2, 3, 12, tzinfo=dt.UTC)

FILTERS: list[tuple[dict[str, Any], Callable[[dict[str, Any]], bool]]] = [
    ({}, lambda row: True),
    ({"year": 2001}, lambda row: row["year"] == 2001),
    ({"year": {"$eq": 2001}}, lambda row: row["year"] == 2001),
    ({"year": {"$gte": 2000, "$lt": 2010}}, lambda row: 2000 <= row["year"] < 2010),
    ({"year": {"$gt": 2000.5, "$lte": 2002.0}}, lambda row: row["year"] in (2001, 2002)),
    ({"year": {"$in": [1991, 2024, 3000]}}, lambda row: row["year"] in (1991, 2024)),
    ({"year": 2**64}, lambda row: False),
    ({"year": {"$lt": 2**64}}, lambda row: True),
    ({"price": {"$lt": 3.5}}, lambda row: row["price"] is not None and row["price"] < 3.5),
    ({"price": {"$ne": 0.125}}, lambda row: row["price"] != 0.125),
    ({"price": {"$in": []}}, lambda row: False),
    ({"lang": "日本"}, lambda row: row["lang"] == "日本"),
    ({"lang": {"$ne": "de"}}, lambda row: row["lang"] != "de"),
    ({"lang": {"$gte": "en"}}, at_least("lang", "en")),
    ({"lang": {"$in": ["de", "fr"]}}, lambda row: row["lang"] in ("de", "fr")),
    ({"flag": True}, lambda row: row["flag"] is True),
    ({"flag": {"$ne": False}}, lambda row: row["flag"] is not False),
    ({"day": "2024-02-29"}, lambda row: row["day"] == dt.date(2024, 2, 29)),
    ({"day": {"$gte": "2024-03-01"}}, at_least("day", dt.date(2024, 3, 1))),
    ({"made": {"$gte": "2024-01-31T13:30:00"}}, at_least("made", NOON)),
    ({"made": "2024-01-31T13:30:00"}, lambda row: row["made"] == NOON),
    ({"seen": {"$gte": "2024-02-03T12:00:00Z"}}, at_least("seen", UTC_NOON)),
    ({"seen": {"$gte": "2024-02-03T17:30:00+05:30"}}, at_least("seen", UTC_NOON)),
    (
        {"$and": [{"year": {"$gte": 2000}}, {"$and": [{"flag": True}]}]},
        lambda r: r["year"] >= 2000 and r["flag"] is True,
    ),
    (
        {"lang": "en", "flag": False, "year": {"$ne": 2000}},
        lambda r: r["lang"] == "en" and r["flag"] is False and r["year"] != 2000,
    ),
]


@pytest.mark.parametrize(("filter", "keep"), FILTERS, ids=[json.dumps(f, ensure_ascii=False) for f, _ in FILTERS])
def test_a_filter_keeps_what_python_would_keep_and_k_where_k_exist(
    every: Service, filter: Any, keep: Callable[[dict[str, Any]], bool]
) -> None:
    corpus = corpora()["products"]
    for query, k in ((QUERIES[0], 5), (QUERIES[1], 400)):
        answer = every.search("products", vector=plain(query), k=k, filter=filter, include=["fields"])
        expected = corpus.ids_of(query, k, keep=keep)
        assert ids(answer) == expected
        assert answer["stats"]["shortfall"] == k - len(expected)


def test_what_fields_say_can_be_asked_for_in_a_filter(every: Service) -> None:
    answer = every.search("products", id="p-100", k=1, include=["fields"])
    [hit] = answer["results"]
    for name, value in hit["fields"].items():
        found = (
            every.search("products", vector=plain(QUERIES[0]), k=400, filter={name: value})
            if value is not None
            else None
        )
        assert found is None or hit["id"] in ids(found), (name, value)


@pytest.mark.parametrize(
    ("filter", "message"),
    [
        ({"colour": "red"}, "'colour' is no stored field of 'products': day, flag, lang, made, price, seen, year"),
        ({"year": "2001"}, "'year' holds int64, which takes a number, got \"2001\""),
        ({"lang": 5}, "'lang' holds string, which takes a text, got 5"),
        ({"flag": 1}, "'flag' holds bool, which takes true or false, got 1"),
        ({"day": "tomorrow"}, "'day' holds date32[day], cannot read \"tomorrow\""),
        ({"made": "2024-01-31T13:30:00Z"}, "'made' holds timestamp[us], cannot read \"2024-01-31T13:30:00Z\""),
        ({"year": {"$near": 5}}, "'$near' of 'year' is no operator; known are $eq"),
        ({"$or": [{"year": 1}]}, "'$or' is no operator"),
        ({"year": None}, "takes texts, numbers and booleans, got null"),
    ],
)
def test_a_wrong_filter_is_422_and_says_what_would_be_right(every: Service, filter: Any, message: str) -> None:
    reply = every.post("/indexes/products/search", {"vector": plain(QUERIES[0]), "filter": filter})
    assert reply.status == 422 and message in reply.message


def test_a_filter_on_an_index_without_fields_says_so(every: Service) -> None:
    reply = every.post("/indexes/numbers/search", {"vector": plain(QUERIES[0]), "filter": {"a": 1}})
    assert reply.status == 422 and "'a' is no stored field of 'numbers': none" in reply.message


# ------------------------------------------------------------------------------------------------ settings


@only_graph
def test_breadth_buys_recall_and_travels_with_the_question(every: Service) -> None:
    corpus = corpora()["products"]

    def recall(ef_search: int) -> int:
        hits = 0
        for query in service.vectors(50, seed=12):
            answer = every.search(
                "products", vector=plain(query), k=1, params={"ef_search": ef_search}, include=["explain"]
            )
            assert answer["explain"][0]["params"] == {"ef_search": ef_search}
            hits += ids(answer) == corpus.ids_of(query, 1)
        return hits

    assert recall(1) < recall(400) == 50


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("products", {"nprobe": 5}, "params: unknown parameter 'nprobe'; hnsw knows: ef_search"),
        ("products", {"ef_search": 0}, "ef_search must be between 1 and 10000, got 0"),
        ("products", {"ef_search": 2**70}, "ef_search must be between 1 and 10000"),
        ("numbers", {"ef_search": 5}, "'ef_search'; exact knows: no parameters"),
        ("numbers", {"x" * 500: 5}, "exact knows: no parameters"),
    ],
)
@only_graph
def test_a_wrong_parameter_is_422_and_names_what_the_kind_knows(
    every: Service, name: str, params: Any, message: str
) -> None:
    reply = every.post(f"/indexes/{name}/search", {"vector": plain(QUERIES[0]), "params": params})
    assert reply.status == 422 and message in reply.message


def test_exact_compares_with_every_vector_and_says_so(every: Service) -> None:
    stats = every.search("products", vector=plain(QUERIES[0]), **ALL)["stats"]
    assert stats == {"strategy": "exact", "visited": 400, "shortfall": 0}


def test_probe_shards_asks_the_nearest_shards_in_every_way_of_asking(every: Service) -> None:
    question = {"vector": plain(QUERIES[0]), "k": 7}
    whole = every.search("near", **question)
    few = every.search("near", **question, params={"probe_shards": 2}, include=["explain"])
    assert (whole["coverage"]["shards_total"], few["coverage"]["shards_ok"], few["coverage"]["shards_total"]) == (
        4,
        2,
        2,
    )
    assert len(few["explain"]) == 2 and few["results"] != whole["results"]
    path = "/indexes/near/search/batch"
    binary = {"Content-Type": "application/octet-stream"}
    raw = every.ask("POST", f"{path}?k=7&probe_shards=2", np.float32(QUERIES[0]).tobytes(), binary)
    assert raw.json()["results"] == [few["results"]]
    assert every.search("near", **question, params={"probe_shards": 4})["results"] == whole["results"]


def test_probe_shards_is_refused_where_a_hash_spread_the_rows_and_out_of_its_bounds(every: Service) -> None:
    question = {"vector": plain(QUERIES[0]), "params": {"probe_shards": 2}}
    reply = every.post("/indexes/sharded/search", question)
    assert reply.status == 422 and "--partition cluster" in reply.message
    for value in (0, 257, True, "2", 1.5):
        reply = every.post("/indexes/near/search", {**question, "params": {"probe_shards": value}})
        assert reply.status == 422 and "params.probe_shards must be an integer between 1 and 256" in reply.message


def test_max_visited_cuts_the_search_and_the_answer_says_so(every: Service) -> None:
    answer = every.search("products", vector=plain(QUERIES[0]), k=5, params={"exact": True, "max_visited": 50})
    corpus = corpora()["products"]
    first = Corpus(corpus.ids[:50], corpus.vectors[:50], corpus.fields[:50], corpus.metric)
    assert ids(answer) == first.ids_of(QUERIES[0], 5)
    assert answer["stats"]["visited"] == 50 and answer["coverage"]["degraded"] == ["the search was cut short"]


def test_rerank_false_is_the_default(every: Service) -> None:
    assert every.search("products", vector=plain(QUERIES[0]), rerank=False)["took_ms"]["rerank"] < 0.05


def test_reranking_replaces_the_distances_by_exact_ones(every: Service) -> None:
    corpus = corpora()["squared"]
    answer = every.search("squared", vector=plain(QUERIES[0]), k=5, rerank={"depth": 300})
    assert [(hit["id"], hit["distance"]) for hit in answer["results"]] == corpus.nearest(QUERIES[0], 5)


def test_hits_carry_only_what_was_asked_for(every: Service) -> None:
    corpus = corpora()["products"]
    query = plain(QUERIES[0])
    bare = every.search("products", vector=query, k=3)
    assert all(hit.keys() == {"id", "score", "distance"} for hit in bare["results"]) and "explain" not in bare
    full = every.search("products", vector=query, k=3, include=["vector", "fields", "explain"])
    assert [(h["id"], h["distance"]) for h in full["results"]] == [(h["id"], h["distance"]) for h in bare["results"]]
    for hit in full["results"]:
        row = corpus.ids.index(hit["id"])
        assert np.array_equal(np.array(hit["vector"], dtype=np.float32), corpus.vectors[row])
        assert hit["fields"] == json.loads(json.dumps(corpus.fields[row], default=iso))
    [explained] = full["explain"]
    assert explained["shard"] == 0 and explained["size"] == 400 and explained["strategy"] == GRAPH
    assert explained["allowed"] is None and explained["took_ms"] > 0


def iso(value: Any) -> str:
    text: str = value.isoformat()
    return text.replace("+00:00", "Z")


def test_explain_has_a_part_for_every_shard(every: Service) -> None:
    answer = every.search("sharded", vector=plain(QUERIES[0]), filter={"part": 1}, include=["explain"])
    assert [part["shard"] for part in answer["explain"]] == [0, 1, 2]
    assert sum(part["size"] for part in answer["explain"]) == 400
    assert sum(part["allowed"] for part in answer["explain"]) == 100


def test_the_answer_says_which_version_of_which_index_gave_it_and_how_long_it_took(every: Service) -> None:
    answer = every.search("squared", vector=plain(QUERIES[0]))
    assert answer["index"] == {"name": "squared", "version": "v1"}
    took = answer["took_ms"]
    assert took.keys() == {"total", "queue", "encode", "search", "rerank"}
    assert took["total"] >= took["search"] > 0
    assert answer.keys() == {"results", "took_ms", "coverage", "stats", "index"}


def test_the_deadline_is_kept_and_named(every: Service) -> None:
    rows = service.vectors(1024, seed=13, dim=16).tobytes()
    reply = every.ask("POST", "/indexes/large/search/batch?exact=true&timeout_ms=1", rows, BINARY)
    assert reply.status == 504 and "timeout_ms" in reply.message
    assert every.search("products", vector=plain(QUERIES[0]), timeout_ms=5000)["results"]


# ------------------------------------------------------------------------------------------ batch and binary


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_of_vectors_is_its_queries_one_by_one(every: Service, name: str) -> None:
    rows = [plain(QUERIES[0]), *(encoded(query) for query in QUERIES[1:])]
    question = {"k": 6, "include": ["fields", "vector"]}
    batch = every.post(f"/indexes/{name}/search/batch", {"vectors": rows, **question}).json()
    singles = [every.search(name, vector=plain(query), **question) for query in QUERIES]
    assert batch["results"] == [single["results"] for single in singles]
    assert batch["stats"]["shortfall"] == 0


def test_odd_and_long_texts_are_answered_and_leave_the_others_of_their_batch_alone(texts: Service) -> None:
    odd = ["🦀🦀", "a\x00b", "\x01\x02 \x1f", "river " * 1300, "\u202e right to left"]
    filter = {"year": {"$lt": 2000}}
    batch = texts.post("/search/batch", {"texts": ["river", *odd, "river"], "k": 4, "filter": filter}).json()
    assert [len(found) for found in batch["results"]] == [4] * 7
    alone = texts.search(text="river", k=4, filter=filter)["results"]
    for found in (batch["results"][0], batch["results"][-1]):
        assert [hit["id"] for hit in found] == [hit["id"] for hit in alone]
    for text in odd:
        assert len(texts.search(text=text, k=4)["results"]) == 4


def test_a_batch_of_texts_is_its_queries_one_by_one(texts: Service) -> None:
    asked = ["river", "stone fire", "a house and a tree", "日本"]
    batch = texts.post("/search/batch", {"texts": asked, "k": 4}).json()
    assert batch["encoder"] == "tiny"
    for text, found in zip(asked, batch["results"], strict=True):
        single = texts.search(text=text, k=4)["results"]
        assert [hit["id"] for hit in found] == [hit["id"] for hit in single]


def test_binary_rows_take_their_settings_from_the_url(every: Service) -> None:
    posted = every.post(
        "/indexes/products/search/batch",
        {"vectors": [plain(q) for q in QUERIES], "k": 4, "params": {"exact": True}, "include": ["fields"]},
    )
    raw = every.ask(
        "POST", "/indexes/products/search/batch?top_k=4&exact=true&include=fields", QUERIES.tobytes(), BINARY
    )
    assert raw.results == posted.results and len(raw.results) == len(QUERIES)


def test_one_binary_row_is_a_question(every: Service, texts: Service) -> None:
    query = QUERIES[3]
    expected = every.search("texts", vector=plain(query), k=3)["results"]
    for where, path in ((every, "/indexes/texts/search?k=3"), (texts, "/search?k=3")):
        assert where.ask("POST", path, query.tobytes(), BINARY).results == expected
    two = texts.ask("POST", "/search", QUERIES[:2].tobytes(), BINARY)
    assert two.status == 422 and "/search/batch" in two.message


@only_graph
def test_a_parameter_of_the_kind_may_stand_in_the_url(every: Service) -> None:
    path = "/indexes/products/search?ef_search=7&include=explain"
    reply = every.ask("POST", path, QUERIES[0].tobytes(), BINARY)
    assert reply.json()["explain"][0]["params"] == {"ef_search": 7}


def test_who_weighs_json_more_than_arrow_gets_json(every: Service) -> None:
    json, arrow = "application/json", "application/vnd.apache.arrow.stream"
    for accept, kind in (
        (f"text/plain, {arrow}; q=0", json),
        (f"text/plain, {arrow}; q=0.5", arrow),
        (f"{arrow};q=0.5, {json}", json),
        (f"{arrow};q=0.5, */*", json),
        (f"{arrow};q=0.5, {json};q=0.2, */*", arrow),
        (f"{json}, {arrow}", arrow),
        (f"{arrow};q=2", arrow),
    ):
        reply = every.ask("POST", "/indexes/large/search/batch", QUERIES.tobytes(), {**BINARY, "Accept": accept})
        assert (reply.status, reply.headers["content-type"].partition(";")[0]) == (200, kind)


@pytest.mark.parametrize("name", ["products", "numbers"])
@pytest.mark.parametrize(
    "accept", ["application/vnd.apache.arrow.stream", "text/html, Application/Vnd.Apache.Arrow.Stream"]
)
def test_an_arrow_answer_has_the_hits_of_the_json_answer(every: Service, name: str, accept: str) -> None:
    path = f"/indexes/{name}/search/batch?k=5"
    hits = every.ask("POST", path, QUERIES.tobytes(), BINARY).results
    reply = every.ask("POST", path, QUERIES.tobytes(), {**BINARY, "Accept": accept})
    assert reply.status == 200 and reply.headers["content-type"] == "application/vnd.apache.arrow.stream"
    rows = pa.ipc.open_stream(reply.body).read_all().to_pylist()
    expected = [
        {"query": number, "rank": rank, **hit} for number, found in enumerate(hits) for rank, hit in enumerate(found)
    ]
    assert [{**row, "score": None, "distance": None} for row in rows] == [
        {**row, "score": None, "distance": None} for row in expected
    ]
    assert [row["distance"] for row in rows] == pytest.approx([row["distance"] for row in expected], abs=1e-6)


def test_an_arrow_answer_without_hits_keeps_its_columns(every: Service) -> None:
    question = {"vectors": [plain(QUERIES[0])], "k": 3, "filter": {"year": 1}}
    empty, full = (arrow(every, "products", {**question, "filter": filter}) for filter in ({"year": 1}, {}))
    assert (empty.num_rows, full.num_rows) == (0, 3) and empty.schema.equals(full.schema)


def arrow(every: Service, name: str, question: Any) -> pa.Table:
    accept = "application/vnd.apache.arrow.stream"
    reply = every.post(f"/indexes/{name}/search/batch", question, Accept=accept)
    assert (reply.status, reply.headers["content-type"]) == (200, accept)
    return pa.ipc.open_stream(reply.body).read_all()


def test_an_arrow_answer_has_no_room_for_fields_and_says_so(every: Service) -> None:
    question = {"vectors": [plain(QUERIES[0])], "include": ["fields"]}
    reply = every.post("/indexes/products/search/batch", question, Accept="application/vnd.apache.arrow.stream")
    assert reply.status == 422 and "include" in reply.message


def test_an_arrow_answer_says_what_it_is_worth_in_its_metadata(every: Service) -> None:
    question = {"vectors": [plain(QUERIES[0])], "k": 500, "params": {"exact": True, "max_visited": 50}}
    table = arrow(every, "numbers", question)
    about = json.loads(table.schema.metadata[b"vecsvc"])
    assert about["index"] == {"name": "numbers", "version": "v1"} and about["results"] == []
    assert about["stats"] == {"strategy": "exact", "visited": 50, "shortfall": 450}
    assert about["coverage"]["degraded"] == ["the search was cut short"]


def test_a_long_answer_is_whole(every: Service) -> None:
    rows = service.vectors(200, seed=14, dim=16)
    for accept in ("application/json", "application/vnd.apache.arrow.stream"):
        path = "/indexes/large/search/batch?k=200&timeout_ms=20000"
        reply = every.ask("POST", path, rows.tobytes(), {**BINARY, "Accept": accept})
        assert reply.status == 200
        if accept == "application/json":
            assert [len(found) for found in reply.results] == [200] * 200
        else:
            assert pa.ipc.open_stream(reply.body).read_all().num_rows == 40_000


# ------------------------------------------------------------------------------------------- several indexes


def test_indexes_are_listed_with_what_a_client_must_know(every: Service) -> None:
    listed = {one["name"]: one for one in every.get("/indexes").json()["indexes"]}
    assert list(listed) == sorted([*NAMES, "large"])
    assert listed["products"] == {
        "name": "products",
        "version": "v1",
        "kind": GRAPH,
        "metric": "cosine",
        "dim": DIM,
        "size": 400,
        "shards": 1,
        "id_type": "str",
        "fields": {
            "day": "date32[day]",
            "flag": "bool",
            "lang": "string",
            "made": "timestamp[us]",
            "price": "double",
            "seen": "timestamp[us, tz=UTC]",
            "year": "int64",
        },
        "encoder": None,
    }
    assert (listed["sharded"]["shards"], listed["numbers"]["id_type"], listed["texts"]["encoder"]) == (3, "int", "tiny")


@pytest.mark.parametrize("name", NAMES)
def test_one_index_is_described(every: Service, name: str) -> None:
    reply = every.get(f"/indexes/{name}").json()
    assert reply["name"] == name and reply.keys() >= {"created", "params", "search", "certificate"}
    reads = {"max_tokens": 24, "pooling": "mean", "normalize": True, "prompts": {}}
    assert reply["encoding"] == (reads if reply["encoder"] else None)


@pytest.mark.parametrize("path", ["/indexes/nothing", "/indexes/nothing/search", "/indexes/nothing/search/batch"])
def test_an_unknown_index_is_404_and_names_those_that_are_served(every: Service, path: str) -> None:
    question = {"vectors": [[1.0]]} if path.endswith("batch") else {"vector": [1.0]}
    reply = every.get(path) if path.endswith("nothing") else every.post(path, question)
    assert reply.status == 404
    assert "'nothing'" in reply.message and all(name in reply.message for name in NAMES)


def test_search_without_a_name_is_404_where_there_are_several_and_names_them(every: Service) -> None:
    for reply in (
        every.post("/search", {"vector": [1.0]}),
        every.get("/search?q=a"),
        every.post("/search/batch", {"vectors": [[1.0]]}),
        every.ask("POST", "/search", QUERIES[0].tobytes(), BINARY),
    ):
        assert reply.status == 404
        assert all(f"/indexes/{name}/search" in reply.message for name in NAMES)


def test_a_text_needs_an_index_with_an_encoder(every: Service) -> None:
    for reply in (every.post("/indexes/products/search", {"text": "a"}), every.get("/indexes/products/search?q=a")):
        assert reply.status == 422 and "has no encoder" in reply.message and "'products'" in reply.message


# ---------------------------------------------------------------------------------------- the edges of HTTP


@pytest.mark.parametrize("id", ["abc", "A-Z_0.9", "x" * 64])
def test_a_sane_request_id_is_echoed(texts: Service, id: str) -> None:
    assert texts.get("/livez", X_Request_Id=id).headers["x-request-id"] == id
    assert texts.post("/search", b"{", X_Request_Id=id).headers["x-request-id"] == id


@pytest.mark.parametrize("id", ["", "a b", "x" * 65, "a;b", "<script>", "é", None])
def test_another_request_id_is_replaced_by_a_new_one(texts: Service, id: str | None) -> None:
    headers = {} if id is None else {"X-Request-Id": id.encode().decode("latin-1")}
    first, second = (texts.ask("GET", "/livez", headers=headers).headers["x-request-id"] for _ in range(2))
    assert first != second and first != id and first.replace("-", "").isalnum()


def test_a_question_in_json_takes_no_settings_from_the_url(texts: Service) -> None:
    reply = texts.post("/search?k=3", {"text": "river"})
    assert reply.status == 422 and "body" in reply.message


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/search", "?q="),
        ("/search?k=3", "?q="),
        ("/search?q=", "q is empty"),
        ("/search?q=%20%09", "q is empty"),
        ("/search?q=a&k=0", "k must be an integer between 1 and 1000, got 0"),
        ("/search?q=a&k=1.5", 'k must be an integer, got "1.5"'),
        ("/search?q=a&k=", 'k must be an integer, got ""'),
        ("/search?q=a&k=1&k=2", "?k is given twice"),
        ("/search?q=a&q=b", "?q is given twice"),
        ("/search?q=a&k=1&limit=2", "k and limit mean the same"),
        ("/search?q=a&exact=1", "exact must be true or false"),
        ("/search?q=a&timeout_ms=0", "timeout_ms must be between 1 and 30000"),
        ("/search?q=a&timeout_ms=1_0", 'timeout_ms must be a number, got "1_0"'),
        ("/search?q=a&include=everything", "include takes fields, vector, explain"),
        ("/search?q=a&filter=x", "filter cannot stand in a URL; POST it as application/json"),
        ("/search?q=a&vector=1", "vector cannot stand in a URL"),
        ("/search?q=a&nonsense=5", "nonsense"),
        (f"/search?q={'a' * 2001}", "q has 2001 characters, the limit is 2000"),
    ],
)
def test_a_wrong_get_is_422_and_says_what_would_be_right(texts: Service, path: str, message: str) -> None:
    reply = texts.get(path)
    assert reply.status == 422 and message in reply.message


@pytest.mark.parametrize(
    "text", ["\x00", "\x01\x1b[31m\x7f", "😀🎉👩‍👩‍👧", "\u202e\ufeff fox", "river\x00cat"], ids=repr
)
def test_any_text_is_answered_and_nobody_beside_it_is_harmed(texts: Service, text: str) -> None:
    assert len(texts.search(text=text)["results"]) == 10
    batch = texts.post("/search/batch", {"texts": ["river", text, "cat"]}).json()["results"]
    assert [ids({"results": found}) for found in batch[::2]] == [ids(texts.search(text=t)) for t in ("river", "cat")]


def test_a_megabyte_of_text_is_cut_and_the_answer_says_so(texts: Service) -> None:
    long = ("river cat " * 100_000)[:1_000_000]
    answer = texts.search(text=long)
    assert len(answer["results"]) == 10 and answer["coverage"]["degraded"] == ["the text was cut at 24 tokens"]
    assert texts.search(text="river")["coverage"]["degraded"] == []
    reply = texts.post("/search/batch", {"texts": ["river", long, "cat"]}).json()
    assert reply["coverage"]["degraded"] == ["cut at 24 tokens: texts 1"]
    reply = texts.post("/search", rb'{"text": "half a pair: \ud83d"}')
    assert reply.status == 400


def test_a_wedged_encoder_turns_readyz_red_until_it_is_replaced() -> None:
    prelude = textwrap.dedent("""
        import threading
        from vecsvc.encoders.onnx import OnnxEncoder
        run, hung = OnnxEncoder.run, []
        def hang(self, tokens):
            if not hung and threading.current_thread().name.startswith("vecsvc-encoder-") and len(tokens[0]) > 15:
                hung.append(1)
                threading.Event().wait()
            return run(self, tokens)
        OnnxEncoder.run = hang
        from vecsvc.encoder_pool import PooledEncoder
        import time
        reopen = PooledEncoder._reopen
        PooledEncoder._reopen = lambda self: (time.sleep(1.5), reopen(self))[1]
    """)
    with service.running(service.index("texts"), prelude, encoder_stall_s=0.5, inline_ms=0) as running:
        assert len(running.search(text="river")["results"]) == 10
        running.expected.append("failed")
        reply = running.post("/search", {"text": "river " * 20, "timeout_ms": 20_000})
        assert reply.status == 500 and "took longer than encoder_stall_s, 0.5 s" in reply.message
        reply = running.get("/readyz")
        assert reply.status == 503 and "a run of encoder 'tiny' took longer than" in reply.message
        reply = running.post("/search", {"text": "cat"})
        assert reply.status == 503 and "encoder_stall_s" in reply.message
        assert len(running.search(id="t-1")["results"]) == 10, "what needs no encoder goes on"
        end = time.monotonic() + 20
        while running.get("/readyz").status != 200:
            assert time.monotonic() < end
            time.sleep(0.05)
        assert len(running.search(text="river " * 20)["results"]) == 10
        assert running.metric("vecsvc_encoder_replacements_total", encoder="tiny") == 1


def test_the_longest_text_fits_into_a_url_however_it_is_written(texts: Service) -> None:
    for letter in ("a", "é", "日", "\U0001d518"):
        assert len(texts.get(f"/search?q={urllib.parse.quote(letter * 2000)}&k=1").results) == 1


PUBLIC = (
    *("/indexes", "/indexes/texts", "/openapi.json", "/search", "/search/batch", "/indexes/texts/search"),
    *("/v1/embeddings", "/v1/models", "/v1/models/texts", "/embed", "/indexes/texts/embed"),
)
ADMIN = ("/metrics", "/reload", "/indexes/texts/rollback")


def test_the_public_port_has_no_admin_routes_and_the_admin_port_no_others(texts: Service) -> None:
    for method in ("GET", "POST"):
        for path in ADMIN:
            assert texts.ask(method, path).status == 404
        for path in PUBLIC:
            assert texts.ask(method, path, admin=True).status == 404
    for path in ("/livez", "/readyz"):
        assert texts.ask("GET", path).status == texts.ask("GET", path, admin=True).status == 200


def test_no_route_has_been_forgotten_in_that_list() -> None:
    _, _, handlers = node(service.index("texts"), ServeSettings())
    public, admin = (
        {route.resource.canonical.replace("{name}", "texts") for route in app.router.routes() if route.resource}
        for app in (handlers.app(), handlers.admin_app())
    )
    assert public == {*PUBLIC, "/indexes/texts/search/batch", "/livez", "/readyz"}
    assert admin == {*ADMIN, "/livez", "/readyz"}


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "HEAD"])
def test_another_method_is_405_and_says_which_are_allowed(texts: Service, method: str) -> None:
    for path, allowed in (("/search", "GET,POST"), ("/search/batch", "POST"), ("/indexes", "GET"), ("/livez", "GET")):
        reply = texts.ask(method, path)
        assert (reply.status, reply.headers["allow"]) == (405, allowed)
        assert method == "HEAD" or f"{method} {path}" in reply.message


def test_every_error_is_json_of_one_shape(every: Service) -> None:
    replies = [
        every.get("/nothing"),
        every.get("/indexes/nothing"),
        every.ask("PUT", "/indexes"),
        every.post("/search", b"{"),
        every.post("/indexes/products/search", {"k": 0, "id": "a"}),
        every.ask("POST", "/search", b"x", {"Content-Type": "text/plain"}),
        every.ask("POST", "/reload", headers={"Origin": "http://elsewhere"}, admin=True),
        every.ask("POST", "/search", b"x" * 100, {**JSON, "Content-Encoding": "gzip"}),
        every.ask("POST", "/search", b"{}", {**JSON, "Expect": "tea"}),
        every.ask("GET", "/nothing", admin=True),
    ]
    assert [reply.status for reply in replies] == [404, 404, 405, 400, 422, 415, 422, 415, 417, 404]
    assert all(reply.message for reply in replies)


# --------------------------------------------------------------------------------------------- the admin port


def test_metrics_are_prometheus_text_and_its_counters_move(every: Service) -> None:
    reply = every.ask("GET", "/metrics", admin=True)
    assert reply.status == 200 and reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert list(text_string_to_metric_families(reply.body.decode()))
    search = {"operation": "/indexes/{name}/search", "status": "200"}
    refused = {"operation": "/indexes/{name}/search", "status": "422"}
    before = [every.metric("vecsvc_requests_total", **labels) for labels in (search, refused)]
    seconds = every.metric("vecsvc_search_seconds_count", index="products", strategy="exact")
    missing = every.metric("vecsvc_shortfall_places_total", index="products")
    every.search("products", vector=plain(QUERIES[0]), k=500, **ALL)
    every.post("/indexes/products/search", {"vector": [1]})
    after = [every.metric("vecsvc_requests_total", **labels) for labels in (search, refused)]
    assert after == [before[0] + 1, before[1] + 1]
    assert every.metric("vecsvc_search_seconds_count", index="products", strategy="exact") == seconds + 1
    assert every.metric("vecsvc_shortfall_places_total", index="products") == missing + 100
    assert every.metric("vecsvc_in_flight") == 0 and every.metric("vecsvc_ready") == 1
    assert every.metric("vecsvc_index_info", index="products", version="v1") == 1


@pytest.fixture
def versions(tmp_path: Any) -> Iterator[tuple[Service, IndexFolder]]:
    """A service of an index with three versions, v3 of which serves; nothing is looked at unless it is told."""
    for number in (1, 2, 3):
        corpus = Corpus([f"v{number}-{i}" for i in range(20)], service.vectors(20, seed=20 + number), [], "l2")
        service.build(corpus, tmp_path, "demo", f"v{number}", kind="exact", metric="l2")
    with service.running(tmp_path, reload_poll_s=0) as running:
        yield running, IndexFolder(tmp_path / "demo")


def served(running: Service) -> tuple[str, str]:
    """The version that the answer names, and the one that its ids are of."""
    answer = running.search(vector=[0.0] * DIM, k=5)
    [version] = {hit["id"].split("-")[0] for hit in answer["results"]}
    return answer["index"]["version"], version


def test_reload_serves_what_current_names(versions: tuple[Service, IndexFolder]) -> None:
    running, folder = versions
    assert served(running) == ("v3", "v3")
    folder.serve("v1")
    assert served(running) == ("v3", "v3"), "nobody asked it to look"
    assert running.ask("POST", "/reload", admin=True).json() == {"changed": {"demo": "v1"}, "problems": {}}
    assert served(running) == ("v1", "v1")
    assert running.ask("POST", "/reload", admin=True).json() == {"changed": {}, "problems": {}}
    assert running.metric("vecsvc_index_info", index="demo", version="v1") == 1
    assert running.metric("vecsvc_index_info", index="demo", version="v3") == 0
    assert running.metric("vecsvc_version_swaps_total", index="demo") == 2


def test_rollback_serves_the_version_before_or_the_named_one(versions: tuple[Service, IndexFolder]) -> None:
    running, folder = versions

    def rollback(query: str = "", name: str = "demo") -> Reply:
        return running.ask("POST", f"/indexes/{name}/rollback{query}", admin=True)

    assert rollback().json() == {"index": "demo", "from": "v3", "to": "v2", "problems": {}}
    assert served(running) == ("v2", "v2") and folder.current() == "v2"
    assert rollback("?to=v1").json()["to"] == "v1"
    assert served(running) == ("v1", "v1")
    for query, status, message in (
        ("", 404, "demo has no version before v1; say which of v2, v3 is to serve (--to)"),
        ("?to=v9", 404, "demo has no version 'v9'; there are: v1, v2, v3"),
        ("?to=../../etc", 404, "no version '../../etc'"),
        ("?too=v2", 422, "?too is unknown here; known are: to"),
        ("?to=v2&to=v3", 422, "?to is given twice"),
    ):
        reply = rollback(query)
        assert reply.status == status and message in reply.message
    damaged = next((folder.path / "v3" / "shards").rglob("rows.npy"))
    damaged.write_bytes(damaged.read_bytes()[:-8])
    running.expected.append("failed")
    reply = rollback("?to=v3")
    assert reply.status == 500 and "rows.npy: has" in reply.message and folder.current() == "v1"
    unknown = rollback(name="other")
    assert unknown.status == 404 and "no index 'other'; there are: demo" in unknown.message
    assert served(running) == ("v1", "v1")


def test_a_version_that_cannot_be_served_leaves_the_one_before_and_readyz_says_why(
    versions: tuple[Service, IndexFolder],
) -> None:
    running, folder = versions
    file = next(iter((folder.path / "v2" / "shards" / "000").glob("vectors.npy")))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.chmod(0o644)
    file.write_bytes(data)
    folder.serve("v2")
    reloaded = running.ask("POST", "/reload", admin=True).json()
    assert reloaded["changed"] == {} and "vectors.npy" in reloaded["problems"]["demo"]
    assert served(running) == ("v3", "v3")
    for admin in (False, True):
        reply = running.ask("GET", "/readyz", admin=admin)
        assert reply.status == 503 and reply.headers["retry-after"] == "1" and "vectors.npy" in reply.message
        assert running.ask("GET", "/livez", admin=admin).status == 200
    assert running.metric("vecsvc_ready") == 0
    folder.serve("v1")
    running.ask("POST", "/reload", admin=True)
    assert running.get("/readyz").status == 200 and served(running) == ("v1", "v1")
    running.expected.append("cannot serve")


def test_before_anything_is_loaded_searches_are_503_with_retry_after() -> None:
    slow = "import time, vecsvc.catalog as c; c.check_files = lambda *a, **k: time.sleep(60)"
    with service.started(service.index("texts"), slow) as loading:
        for reply in (
            loading.get("/readyz"),
            loading.post("/search", {"vector": [1.0] * DIM}),
            loading.ask("POST", "/search", QUERIES[0].tobytes(), BINARY),
        ):
            assert reply.status == 503 and reply.headers["retry-after"] == "1" and "not" in reply.message
        assert loading.get("/livez").status == 200
        assert loading.get("/indexes").json() == {"indexes": []}
        assert loading.metric("vecsvc_ready") == 0


def test_a_service_that_compiles_kernels_says_so_where_it_is_not_ready(tmp_path: Path) -> None:
    done = tmp_path / "done"
    slow = f"""
import time, pathlib, vecsvc.shard as s
from vecsvc import machine_code
load = s.indexes.load
def compile_first(*a, **k):
    machine_code.announce("compiling kernel tree_search for avx2, some seconds")
    while not pathlib.Path({str(done)!r}).exists():
        time.sleep(0.01)
    return load(*a, **k)
s.indexes.load = compile_first
"""
    with service.started(service.index("texts"), slow) as loading:
        loading.wait_for("compiling")
        for reply in (loading.get("/readyz"), loading.post("/search", {"vector": [1.0] * DIM})):
            assert reply.status == 503 and "compiling kernel tree_search for avx2, some seconds" in reply.message
        done.touch()
        loading.wait_for("ready")
        assert loading.get("/readyz").status == 200


def test_too_many_at_once_are_429_with_retry_after() -> None:
    import threading

    slow = "import time; from vecsvc.shard import Shard; search = Shard.search\n"
    slow += "Shard.search = lambda *a, **k: (time.sleep(0.3), search(*a, **k))[1]"
    with service.running(service.index("texts"), slow, max_in_flight=1) as running:
        first: list[Reply] = []
        thread = threading.Thread(target=lambda: first.append(running.post("/search", {"id": "t-1"})))
        thread.start()
        while running.metric("vecsvc_in_flight") == 0:
            pass
        reply = running.post("/search", {"id": "t-1"})
        assert reply.status == 429 and reply.headers["retry-after"] == "1" and "max_in_flight" in reply.message
        thread.join()
        assert first[0].status == 200


def test_binary_rows_are_little_endian_whatever_the_machine(texts: Service) -> None:
    row = struct.pack("<8f", *plain(QUERIES[0]))
    assert (
        texts.ask("POST", "/search?k=3", row, BINARY).results == texts.search(vector=plain(QUERIES[0]), k=3)["results"]
    )
