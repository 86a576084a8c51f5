"""The filter grammar: brute force over rows is the oracle for every operator and type."""

from __future__ import annotations

import datetime
import operator
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from vecsvc import filters
from vecsvc.errors import InvalidRequest

ROWS = 200
RNG = np.random.default_rng(7)
INTS = [None if i % 17 == 0 else int(RNG.integers(-5, 5)) for i in range(ROWS)]
FLOATS = [None if i % 13 == 0 else float(RNG.integers(-3, 3)) / 2 for i in range(ROWS)]
TEXTS = [None if i % 11 == 0 else str(RNG.choice(["a", "b", "ü", ""])) for i in range(ROWS)]
FLAGS = [None if i % 7 == 0 else bool(i % 2) for i in range(ROWS)]
DAYS = [None if i % 5 == 0 else datetime.date(2026, 1, 1 + i % 9) for i in range(ROWS)]
TABLE = pa.table(
    {
        "int8": pa.array(INTS, pa.int8()),
        "int64": pa.array(INTS, pa.int64()),
        "float": pa.array(FLOATS, pa.float32()),
        "text": pa.array(TEXTS),
        "category": pa.array(TEXTS).dictionary_encode(),
        "flag": pa.array(FLAGS),
        "day": pa.array(DAYS, pa.date32()),
        "time": pa.array(DAYS, pa.date32()).cast(pa.timestamp("us")),
        "list": pa.array([[1]] * ROWS),
        "natural": pa.array([i if i != 3 else 2**64 - 1 for i in range(ROWS)], pa.uint64()),
    }
)
PLAIN = {"$eq": operator.eq, "$gt": operator.gt, "$gte": operator.ge, "$lt": operator.lt, "$lte": operator.le}


def nested(depth: int) -> Any:
    filter: Any = {"int8": 1}
    for _ in range(depth):
        filter = {"$and": [filter]}
    return filter


def rows(filter: Any) -> list[int]:
    conditions = filters.parse(filter, max_nodes=64, max_values=64)
    mask = filters.evaluate(conditions, TABLE)
    assert mask.dtype == np.bool_ and mask.shape == (ROWS,) and not mask.flags.writeable
    return np.flatnonzero(mask).tolist()


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize(
    ("field", "column", "value"),
    [
        ("int8", INTS, 2),
        ("int64", INTS, -1),
        ("int64", INTS, 0.5),
        ("float", FLOATS, 1),
        ("float", FLOATS, 0.5),
        ("text", TEXTS, "b"),
        ("category", TEXTS, "ü"),
    ],
)
def test_comparisons_equal_brute_force_and_nulls_never_match(field: str, column: Any, value: Any, name: str) -> None:
    expected = [i for i, v in enumerate(column) if v is not None and PLAIN[name](v, value)]
    assert rows({field: {name: value}}) == expected
    if name == "$eq":
        assert rows({field: value}) == expected


@pytest.mark.parametrize(("field", "column", "value"), [("int8", INTS, 2), ("text", TEXTS, "b"), ("flag", FLAGS, True)])
def test_ne_is_everything_that_eq_is_not_rows_without_a_value_included(field: str, column: Any, value: Any) -> None:
    assert rows({field: {"$ne": value}}) == [i for i, v in enumerate(column) if v != value]


@pytest.mark.parametrize(
    ("field", "column", "values"),
    [
        ("int8", INTS, [1, 2, 300]),
        ("int64", INTS, [1, 2.0, 2**80]),
        ("float", FLOATS, [0.5, 1]),
        ("text", TEXTS, ["a", "ü"]),
        ("category", TEXTS, ["a"]),
        ("flag", FLAGS, [True]),
        ("text", TEXTS, []),
    ],
)
def test_in_equals_brute_force(field: str, column: Any, values: list[Any]) -> None:
    assert rows({field: {"$in": values}}) == [i for i, v in enumerate(column) if v is not None and v in values]


def test_days_and_times_compare_with_iso_texts() -> None:
    expected = [i for i, v in enumerate(DAYS) if v is not None and v >= datetime.date(2026, 1, 4)]
    assert rows({"day": {"$gte": "2026-01-04"}}) == expected
    assert rows({"time": {"$gte": "2026-01-04T00:00:00"}}) == expected


def test_conditions_of_one_object_and_of_and_all_hold() -> None:
    both = sorted(set(rows({"int8": {"$gt": 0}})) & set(rows({"text": "a"})))
    assert rows({"int8": {"$gt": 0}, "text": "a"}) == both
    assert rows({"$and": [{"int8": {"$gt": 0}}, {"$and": [{"text": "a"}]}]}) == both


def test_an_empty_filter_allows_every_row() -> None:
    assert rows({}) == list(range(ROWS))


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ({"int64": {"$lt": 2**70}}, [i for i, v in enumerate(INTS) if v is not None]),
        ({"int64": {"$gt": 2**70}}, []),
        ({"int64": {"$gt": -(2**70)}}, [i for i, v in enumerate(INTS) if v is not None]),
        ({"int64": 2**70}, []),
        ({"int64": {"$ne": 2**70}}, list(range(ROWS))),
        ({"natural": 2**64 - 1}, [3]),
        ({"natural": {"$gte": -1}}, list(range(ROWS))),
        ({"float": {"$lt": 2**70}}, [i for i, v in enumerate(FLOATS) if v is not None]),
    ],
)
def test_integers_beyond_the_column_compare_as_numbers_do(condition: Any, expected: list[int]) -> None:
    assert rows(condition) == expected


@pytest.mark.parametrize(
    ("filter", "message"),
    [
        ({"$or": []}, "'$or' is no operator"),
        ({"int8": {"$regex": "x"}}, "'$regex' of 'int8' is no operator"),
        ({"int8": {}}, "'int8' has no condition"),
        ({"int8": None}, "takes texts, numbers and booleans, got null"),
        ({"int8": [1]}, "got [1]"),
        ({"int8": "1"}, "'int8' holds int8, which takes a number, got \"1\""),
        ({"int8": True}, "takes a number, got true"),
        ({"text": 1}, "'text' holds string, which takes a text, got 1"),
        ({"flag": 1}, "takes true or false, got 1"),
        ({"day": "soon"}, "'day' holds date32[day], cannot read \"soon\""),
        ({"list": 1}, "'list' holds list<"),
        ({"int8": {"$in": 3}}, "$in of 'int8' takes a list, got 3"),
        ({"$and": {}}, "$and takes a list of at least one filter"),
        ({"$and": []}, "$and takes a list of at least one filter"),
        ({"$and": [3]}, "filter must be an object of conditions, got 3"),
        ({"none": 3}, "'none' is no stored field; stored are: int8"),
        ({"int8": {"$in": list(range(65))}}, "$in of 'int8' has 65 values, the limit is 64"),
        ({"$and": [{"int8": 1}] * 65}, "more than 64 conditions"),
        (nested(9), "nested deeper than 8"),
    ],
)
def test_a_wrong_filter_is_refused_with_the_place_and_the_value(filter: Any, message: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        rows(filter)
    assert message in str(error.value)
