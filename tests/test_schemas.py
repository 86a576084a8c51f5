"""Requests: what is right decodes to values, what is wrong is refused with the place, the value and the remedy."""

from __future__ import annotations

import base64
import json
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pytest

from vecsvc import columns, schemas
from vecsvc.config import ServeSettings
from vecsvc.errors import InvalidRequest, MalformedRequest, RequestError
from vecsvc.types import (
    BatchAnswer,
    ColumnsAnswer,
    Coverage,
    Hit,
    IdQuery,
    SearchSettings,
    ServedIndex,
    Stats,
    TextQuery,
    TookMs,
    VectorQuery,
)

LIMITS = ServeSettings(max_k=100, max_batch=4, max_text_chars=20, max_filter_nodes=3, max_id_bytes=8)


def search(question: Any) -> tuple[Any, SearchSettings]:
    return schemas.parse_search(question if isinstance(question, bytes) else json.dumps(question).encode(), LIMITS)


def batch(question: Any) -> tuple[Any, SearchSettings]:
    return schemas.parse_batch(question if isinstance(question, bytes) else json.dumps(question).encode(), LIMITS)


def encoded(*values: float) -> dict[str, str]:
    return {"base64": base64.b64encode(np.array(values, dtype="<f4").tobytes()).decode()}


def test_a_vector_becomes_one_row_of_float32() -> None:
    query, settings = search({"vector": [1, 2.5, -3e-3]})
    assert isinstance(query, VectorQuery)
    assert query.vectors.dtype == np.float32 and query.vectors.tolist() == [[1, 2.5, np.float32(-3e-3)]]
    assert settings == SearchSettings(timeout_ms=LIMITS.timeout_ms)


def test_base64_is_the_same_vector() -> None:
    query, _ = search({"vector": encoded(1, 2.5, -3)})
    assert query.vectors.tolist() == [[1, 2.5, -3]]


def test_text_and_id_are_questions_too() -> None:
    assert search({"text": "words"})[0] == TextQuery(["words"])
    assert search({"id": "a"})[0] == IdQuery("a")
    assert search({"id": 7})[0] == IdQuery(7)


@pytest.mark.parametrize("name", ["k", "limit", "top_k", "topK"])
def test_k_has_the_names_that_users_of_other_services_type(name: str) -> None:
    assert search({"id": 1, name: 3})[1].k == 3


def test_every_setting_is_carried() -> None:
    _, settings = search(
        {
            "id": 1,
            "params": {"ef_search": 64, "exact": True, "max_visited": 9},
            "rerank": {"depth": 50, "model": "exact"},
            "timeout_ms": 5,
            "partial": True,
            "include": ["fields", "vector", "explain"],
            "filter": {"a": 1},
        }
    )
    assert (settings.params, settings.exact, settings.max_visited) == ((("ef_search", 64),), True, 9)
    assert (settings.rerank_depth, settings.timeout_ms, settings.partial) == (50, 5, True)
    assert settings.include == {"fields", "vector", "explain"}
    assert [(c.field, c.operator, c.value) for c in settings.conditions] == [("a", "$eq", 1)]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the body is empty"),
        (b"{", "the body is no JSON"),
        (b'\xef\xbb\xbf{"id": 1}', "the body is no JSON"),
        (b'{"text": "\xff"}', "the body is no JSON: byte 10 is no UTF-8: send UTF-8"),
        (b'{"text": "\\ud800"}', "no JSON: half of a pair, \\ud800, at byte 10: send valid Unicode"),
        (b'{"text": "\\ud83d\\ude00 \\ud83dx"}', "half of a pair, \\ud83d, at byte 23"),
        (b'{"text": "\\\\ud800 \\udc00"}', "half of a pair, \\udc00, at byte 18"),
        (b'{"text": "\\ud83d\\ude00 \\\\ud800', "the body is no JSON: Input data was truncated"),
        (b'{"vector": [NaN]}', "the body is no JSON"),
        (b'{"vector": [Infinity]}', "the body is no JSON"),
        (b'{"vector": [1e999]}', "the body is no JSON"),
        (b'{"id": 1} {"id": 2}', "the body is no JSON"),
        (b'{"filter": ' + b"[" * 100_000, "the body is no JSON"),
        (b'{"k": "x", "id": 1', "the body is no JSON"),
    ],
)
def test_bytes_that_are_no_json_are_malformed(body: bytes, message: str) -> None:
    with pytest.raises(MalformedRequest) as error:
        search(body)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("question", "message"),
    [
        (b"null", "the body: Expected `object`, got `null`"),
        (b"[]", "the body: Expected `object`, got `array`"),
        ({}, "exactly one of text, vector and id, got none"),
        ({"text": "a", "id": 1}, "got text and id"),
        ({"id": 1, "kk": 3}, "unknown field `kk`"),
        ({"id": 1, "lexical": True}, "unknown field `lexical`"),
        ({"id": 1, "mode": "hybrid"}, "unknown field `mode`"),
        ({"id": 1, "target_recall": 0.9}, "unknown field `target_recall`"),
        ({"id": 1, "rerank": {"depth": 5, "model": "bert"}}, "$.rerank.model: Invalid enum value 'bert'"),
        ({"id": 1, "rerank": True}, "rerank must be false"),
        ({"id": 1, "rerank": {"depth": 0}}, "rerank.depth must be an integer between 1 and 10000, got 0"),
        ({"id": 1, "k": "ten"}, '$.k: Expected `int`, got `str`; the value is "ten"'),
        ({"id": 1, "k": 1.5}, "$.k: Expected `int`, got `float`; the value is 1.5"),
        ({"id": 1, "k": True}, "$.k: Expected `int`, got `bool`; the value is true"),
        ({"id": 1, "k": None}, "$.k: Expected `int`, got `null`"),
        ({"id": 1, "k": 0}, "k must be an integer between 1 and 100, got 0"),
        ({"id": 1, "k": -1}, "got -1"),
        ({"id": 1, "k": 10**9}, "k must be an integer between 1 and 100, got 1000000000"),
        ({"id": 1, "k": 2**70}, "k"),
        ({"id": 1, "k": 5, "topK": 5}, "k and topK mean the same"),
        ({"id": True}, "$.id: Expected `int | str`, got `bool`"),
        ({"id": 1.5}, "$.id: Expected"),
        ({"id": "x" * 9}, "id has 9 bytes, the limit max_id_bytes is 8"),
        ({"text": ""}, "text is empty"),
        ({"text": " \n"}, "text is empty"),
        ({"text": "x" * 21}, "text has 21 characters, the limit max_text_chars is 20"),
        ({"text": 3}, "$.text: Expected `str`, got `int`; the value is 3"),
        ({"vector": []}, "vector has 0 values"),
        ({"vector": "1,2"}, "$.vector: Expected"),
        ({"vector": [1, "2"]}, '$.vector[1]: Expected `float`, got `str`; the value is "2"'),
        ({"vector": [1, None]}, "$.vector[1]: Expected `float`, got `null`"),
        ({"vector": [[1]]}, "$.vector[0]: Expected `float`, got `array`; the value is [1]"),
        ({"vector": [0.0] * 16_385}, "vector has 16385 values"),
        ({"vector": {"base64": "AAA"}}, "$.vector.base64: Invalid base64"),
        ({"vector": {"base64": "AA=="}}, "vector.base64 holds 1 bytes, expected 4 for each value"),
        ({"vector": {"base64": "AAAAAA==", "x": 1}}, "unknown field `x`"),
        ({"id": 1, "timeout_ms": 0}, "timeout_ms must be between 1 and 30000, got 0"),
        ({"id": 1, "timeout_ms": 1e9}, "got 1e+09"),
        ({"id": 1, "partial": 1}, "$.partial: Expected `bool`"),
        ({"id": 1, "include": ["everything"]}, "$.include[0]: Invalid enum value 'everything'"),
        ({"id": 1, "include": "fields"}, "$.include: Expected `array`"),
        ({"id": 1, "params": {"ef_search": "64"}}, 'params.ef_search must be an integer, got "64"'),
        ({"id": 1, "params": {"ef_search": True}}, "params.ef_search must be an integer, got true"),
        ({"id": 1, "params": {"exakt": True}}, "must be an integer, got true; only exact is true or false"),
        ({"id": 1, "params": {"exact": 1}}, "params.exact must be true or false, got 1"),
        ({"id": 1, "params": {"max_visited": 0}}, "params.max_visited must be an integer"),
        ({"id": 1, "filter": [1]}, "$.filter: Expected `object`, got `array`"),
        ({"id": 1, "filter": {"a": 1, "b": 1, "c": 1, "d": 1}}, "more than 3 conditions"),
    ],
)
def test_well_formed_but_wrong_is_refused_with_the_place_and_the_value(question: Any, message: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        search(question)
    assert message in str(error.value)
    assert len(str(error.value)) < 400


def test_a_batch_is_rows_of_one_length() -> None:
    query, _ = batch({"vectors": [[1, 2], encoded(3, 4)]})
    assert query.vectors.tolist() == [[1, 2], [3, 4]]
    assert batch({"texts": ["a", "b"]})[0] == TextQuery(["a", "b"])


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ({}, "exactly one of texts and vectors, got none"),
        ({"texts": ["a"], "vectors": [[1]]}, "got both"),
        ({"vectors": []}, "the batch has 0 queries, expected 1 to 4"),
        ({"texts": ["a"] * 5}, "the batch has 5 queries, expected 1 to 4"),
        ({"vectors": [[1, 2], [3]]}, "vectors[1] has 1 values, vectors[0] has 2"),
        ({"vectors": [1, 2]}, "$.vectors[0]: Expected"),
        ({"texts": ["a", ""]}, "texts[1] is empty"),
        ({"texts": ["a"], "id": 3}, "unknown field `id`"),
    ],
)
def test_a_wrong_batch_names_the_row(question: Any, message: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        batch(question)
    assert message in str(error.value)


def test_binary_rows_take_their_settings_from_the_url() -> None:
    rows = np.arange(6, dtype="<f4").reshape(2, 3)
    query, settings = schemas.parse_binary(rows.tobytes(), 3, {"k": "4", "ef_search": "9", "exact": "true"}, LIMITS)
    assert query == query and isinstance(query, VectorQuery) and np.array_equal(query.vectors, rows)
    assert (settings.k, settings.params, settings.exact) == (4, (("ef_search", 9),), True)


@pytest.mark.parametrize(
    ("body", "query", "message"),
    [
        (b"", {}, "the body is empty, expected rows of 3"),
        (b"x" * 13, {}, "the body has 13 bytes"),
        (b"x" * 60, {}, "the batch has 5 queries"),
        (b"x" * 12, {"k": "x"}, 'k must be an integer, got "x"'),
        (b"x" * 12, {"k": "1" * 30}, "k must be an integer"),
        (b"x" * 12, {"k": "٣"}, "k must be an integer"),
        (
            b"x" * 12,
            {"foo": "bar"},
            '?foo="bar": a question knows k, timeout_ms, partial, include, exact, max_visited, probe_shards, and other',
        ),
        (b"x" * 12, {"ef_search": "1.5"}, "settings are integers of the index's kind"),
        (b"x" * 12, {"include": "all"}, "include takes fields, vector, explain"),
        (b"x" * 12, {"timeout_ms": "nan"}, "timeout_ms must be between"),
        (b"x" * 12, {"partial": "yes"}, "partial must be true or false"),
        (b"x" * 12, {"k": "1", "limit": "1"}, "mean the same"),
    ],
)
def test_wrong_binary_requests_are_refused(body: bytes, query: dict[str, str], message: str) -> None:
    with pytest.raises(RequestError) as error:
        schemas.parse_binary(body, 3, query, LIMITS)
    assert message in str(error.value)


def test_get_takes_the_text_from_the_url() -> None:
    query, settings = schemas.parse_get({"q": "words", "k": "3", "include": "fields"}, LIMITS)
    assert query == TextQuery(["words"]) and settings.k == 3 and settings.include == {"fields"}
    with pytest.raises(InvalidRequest, match=r"\?q="):
        schemas.parse_get({"k": "3"}, LIMITS)


def answer() -> BatchAnswer:
    hits = [[Hit(1, 0.5, 0.5, {"when": object}), Hit(2, 0.25, 0.75)], [Hit(3, 1.0, 0.0)]]
    took = TookMs(1, 0, 0, 1, 0)
    return BatchAnswer(hits, took, Coverage(1, 1, []), Stats("exact", 3, 0), ServedIndex("demo", "v1"))


def test_an_answer_is_json_and_what_json_has_no_word_for_is_text() -> None:
    decoded = json.loads(schemas.encode(answer()))
    assert decoded["results"][1] == [{"id": 3, "score": 1.0, "distance": 0.0}]
    assert decoded["results"][0][0]["fields"] == {"when": "<class 'object'>"}
    assert msgspec.json.decode(schemas.encode(answer()), type=BatchAnswer).stats == Stats("exact", 3, 0)


def test_an_arrow_answer_has_a_row_a_hit() -> None:
    one = answer()
    parts = [columns.of_hits(first, [hits], whole=True, metric="ip") for first, hits in enumerate(one.results)]
    whole = ColumnsAnswer(parts, one.took_ms, one.coverage, one.stats, one.index)
    table = pa.ipc.open_stream(schemas.encode_arrow(whole)).read_all()
    rest = msgspec.json.decode(table.schema.metadata[b"vecsvc"], type=BatchAnswer)
    assert rest == msgspec.structs.replace(one, results=[])
    assert table.to_pydict()["query"] == [0, 0, 1]
    assert table.to_pydict()["rank"] == [0, 1, 0]
    assert table.to_pydict()["id"] == [1, 2, 3]
    assert table.to_pydict()["score"] == [0.5, 0.25, 1.0]
