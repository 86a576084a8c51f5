"""A question is read the same whether the words around its vector were seen before or not."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from vecsvc import forms, json_vectors, schemas
from vecsvc.config import HttpSettings
from vecsvc.errors import VecsvcError
from vecsvc.forms import Forms
from vecsvc.types import MAX_DIM, VectorQuery

LIMITS = HttpSettings()

AROUND = [
    '{"vector":@}',
    '{"vector": @, "k": 3}',
    '{"k":3,"vector":@}',
    ' { "k" : 3 ,\n"vector"\t:@ } ',
    '{"vector":@,"include":["fields"],"filter":{"lang":{"$in":["a","b"]}}}',
    '{"filter":{"a":"]"},"vector":@}',
    '{"v\\u0065ctor":@}',
    '{"vector":@,"k":0}',
    '{"vector":@,"k":3,"k":4}',
    '{"vector":@,"vector":[9,9]}',
    '{"vector":[9,9],"vector":@}',
    '{"vector":@,"vector":[0]}',
    '{"vector":@,"text":"[1]"}',
    '{"text":"@"}',
    '{"text":"@","vector":[9,9]}',
    '{"include":@,"vector":[9,9]}',
    '{"filter":{"a":{"$in":@}},"vector":[9,9]}',
    '{"filter":{"vector":@},"vector":[9,9]}',
    '{"vector":{"base64":"AACAPw=="},"include":@}',
    '{"vector":[@]}',
    '{"vector":@',
    '{"vector":@}}',
    '{"vector":@} x',
    '"vector":@}',
    '{"vektor":@}',
    '@',
    '{"id":@}',
]  # fmt: skip

VALUES = [
    "[1,2]", "[ 1.5 , -2e-3 ]", "[0.1]", "[]", "[[1,2]]", "[1,2],[3]", "[1,]", "[01]", "[1 2]", "[1", "1]", "1", "null",
    '["fields"]', '["a"]', '["[1]"]', "[NaN]", "[1e999]", "[1234567890123456789012, 1]", "[1e-46]", "[1],\"k\":[2]",
    "[1]}", "[1.]", "[1,\x0b2]", "[1,\n2]", "[true]", '[1,"2"]',
]  # fmt: skip


@pytest.fixture(params=["kernel", "decoder"], autouse=True)
def _reader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what is compiled, and before it is there."""
    if request.param == "kernel":
        json_vectors.load()
    else:
        monkeypatch.setattr(json_vectors, "_loaded", [])


def read(parse: Any, body: bytes) -> Any:
    try:
        query, settings = parse(body)
    except VecsvcError as error:
        return type(error), str(error)
    if isinstance(query, VectorQuery):
        return query.vectors.shape, query.vectors.dtype, query.vectors.tobytes(), settings
    return query, settings


def plainly(body: bytes) -> Any:
    return read(lambda data: schemas.parse_search(data, LIMITS), body)


@pytest.mark.parametrize("around", AROUND)
def test_no_form_changes_what_a_question_means(around: str) -> None:
    """Whatever was seen first, and whatever comes then in its place."""
    bodies = [around.replace("@", value).encode() for value in VALUES]
    expected = [plainly(body) for body in bodies]
    for first in range(len(bodies)):
        known = Forms(LIMITS)
        for at in (first, *range(len(bodies))):
            assert read(known.parse, bodies[at]) == expected[at], (bodies[first], bodies[at])


def test_forms_do_not_mix() -> None:
    """All questions of this file at one memory, each twice."""
    bodies = [a.replace("@", v).encode() for a, v in itertools.product(AROUND, VALUES)]
    known = Forms(LIMITS)
    for body in bodies + bodies:
        assert read(known.parse, body) == plainly(body), body


def test_a_form_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    json_vectors.load()
    known, calls = Forms(LIMITS), []
    real = schemas.parse_search
    monkeypatch.setattr(forms.schemas, "parse_search", lambda *given: calls.append(given) or real(*given))
    for number in range(5):
        query, settings = known.parse(f'{{"vector": [{number}.5, 1], "k": 7}}'.encode())
        assert isinstance(query, VectorQuery)
        assert query.vectors.tolist() == [[number + 0.5, 1.0]] and settings.k == 7
    assert len(calls) == 1
    known.parse(b'{"vector": [0.5, 1], "k": 8}')
    assert len(calls) == 2


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms, "MAX_REMEMBERED", 4)
    known = Forms(LIMITS)
    for k in range(1, 30):
        assert read(known.parse, f'{{"vector": [1], "k": {k}}}'.encode())[-1].k == k
        assert len(known._known) <= 4
    long = f'{{"vector": [1], "filter": {{"a": "{"x" * forms.MAX_FORM_BYTES}"}}}}'.encode()
    known = Forms(LIMITS)
    assert read(known.parse, long) == plainly(long) and not known._known


def test_a_vector_that_is_too_long_is_refused_each_time() -> None:
    known = Forms(LIMITS)
    known.parse(b'{"vector": [1]}')
    body = b'{"vector": [%s]}' % b",".join([b"1"] * (MAX_DIM + 1))
    for _ in range(2):
        assert read(known.parse, body) == plainly(body)


def test_random_bytes_around_a_known_form() -> None:
    """One byte of a known question changed, left out or doubled."""
    rng = np.random.default_rng(8)
    body = b'{"k": 3, "vector": [0.25, -1e-3, 17], "include": ["fields"]}'
    known = Forms(LIMITS)
    known.parse(body)
    for _ in range(4000):
        at = int(rng.integers(len(body)))
        put = bytes([int(rng.choice(np.frombuffer(b'[]{}",:0129.e+- \t\x00\x0b\xff\\vkx', np.uint8)))])
        kind = int(rng.integers(3))
        changed = body[:at] + (put, b"", put + body[at : at + 1])[kind] + body[at + 1 :]
        assert read(known.parse, changed) == plainly(changed), changed
