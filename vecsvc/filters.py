"""The filter grammar of requests, checked against the stored fields and turned into a mask.

    {"year": 2024}                                   equality
    {"year": {"$gte": 2020, "$lt": 2024}}            $eq $ne $gt $gte $lt $lte, all of them hold
    {"lang": {"$in": ["de", "fr"]}}
    {"$and": [{...}, {...}]}

A row without a value matches nothing but `$ne`, as in MongoDB.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from vecsvc.errors import InvalidRequest, shown
from vecsvc.types import Condition, Mask

_ORDER: Final[dict[str, Callable[[Any, Any], bool]]] = {
    "$gt": operator.gt,
    "$gte": operator.ge,
    "$lt": operator.lt,
    "$lte": operator.le,
}
_ORDER_KERNELS: Final[dict[str, Callable[[Any, pa.Scalar], Any]]] = {
    "$gt": pc.greater,
    "$gte": pc.greater_equal,
    "$lt": pc.less,
    "$lte": pc.less_equal,
}
OPERATORS: Final = ("$eq", "$ne", *_ORDER, "$in")
MAX_DEPTH: Final = 8


def parse(filter: Mapping[str, Any], *, max_nodes: int, max_values: int) -> tuple[Condition, ...]:
    """The conditions that must all hold. Raises InvalidRequest, naming the place and what would be right."""
    return tuple(_Parser(max_nodes, max_values).walk(filter, 0))


class _Parser:
    """Walks a filter of a stranger's: every object and every condition counts, before it is looked into."""

    def __init__(self, max_nodes: int, max_values: int) -> None:
        self._max_nodes, self._max_values = max_nodes, max_values
        self._nodes = 0

    def walk(self, filter: Any, depth: int) -> Iterator[Condition]:
        if depth > MAX_DEPTH:
            raise InvalidRequest(f"filter is nested deeper than {MAX_DEPTH}")
        if not isinstance(filter, Mapping):
            raise InvalidRequest(f"filter must be an object of conditions, got {shown(filter)}")
        for key, value in filter.items():
            if key == "$and":
                if not isinstance(value, list) or not value:
                    raise InvalidRequest(f"filter: $and takes a list of at least one filter, got {shown(value)}")
                for part in value:
                    self._count()
                    yield from self.walk(part, depth + 1)
            elif key.startswith("$"):
                raise InvalidRequest(f"filter: {key!r} is no operator; known are $and, and {', '.join(OPERATORS)}")
            elif isinstance(value, Mapping):
                if not value:
                    raise InvalidRequest(f"filter: {key!r} has no condition; known are {', '.join(OPERATORS)}")
                for name, operand in value.items():
                    yield self._condition(key, name, operand)
            else:
                yield self._condition(key, "$eq", value)

    def _count(self) -> None:
        self._nodes += 1
        if self._nodes > self._max_nodes:
            raise InvalidRequest(f"filter has more than {self._max_nodes} conditions")

    def _condition(self, field: str, name: str, operand: Any) -> Condition:
        self._count()
        if name not in OPERATORS:
            raise InvalidRequest(f"filter: {name!r} of {field!r} is no operator; known are {', '.join(OPERATORS)}")
        values = operand if name == "$in" else [operand]
        if not isinstance(values, list):
            raise InvalidRequest(f"filter: $in of {field!r} takes a list, got {shown(operand)}")
        if len(values) > self._max_values:
            raise InvalidRequest(f"filter: $in of {field!r} has {len(values)} values, the limit is {self._max_values}")
        for value in values:
            if not isinstance(value, str | int | float | bool):
                raise InvalidRequest(
                    f"filter: {name} of {field!r} takes texts, numbers and booleans, got {shown(value)}"
                )
        return Condition(field, name, operand)


def evaluate(conditions: tuple[Condition, ...], fields: pa.Table) -> Mask:
    """The rows (size,) of the stored fields that meet every condition."""
    mask = np.ones(fields.num_rows, dtype=np.bool_)
    for condition in conditions:
        if condition.field not in fields.column_names:
            stored = ", ".join(fields.column_names) or "none"
            raise InvalidRequest(f"filter: {condition.field!r} is no stored field; stored are: {stored}")
        mask &= _rows(fields.column(condition.field), condition)
    mask.flags.writeable = False
    return mask


def _rows(column: pa.ChunkedArray, condition: Condition) -> NDArray[np.bool_]:
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    values = condition.value if condition.operator == "$in" else [condition.value]
    operands = _operands(column.type, condition.field, values)
    if not len(operands) and condition.operator in _ORDER:
        # An integer beyond every integer of the column: all rows with a value are on one side of it.
        side = _ORDER[condition.operator](0, condition.value)
        return _to_mask(pc.is_valid(column)) & side
    if column.type != operands.type:
        column = column.cast(operands.type, safe=False)
    if condition.operator in _ORDER:
        return _to_mask(_ORDER_KERNELS[condition.operator](column, operands[0]))
    rows = _to_mask(pc.is_in(column, value_set=operands))
    return ~rows if condition.operator == "$ne" else rows


def _to_mask(matches: Any) -> NDArray[np.bool_]:
    rows: NDArray[np.bool_] = pc.fill_null(matches, False).to_numpy()
    return rows


def _operands(kind: pa.DataType, field: str, values: list[Any]) -> pa.Array:
    """The operands in a type that the column can be cast to; integers that no value can equal are left out."""
    types = pa.types
    fits: Callable[[Any], bool]
    if types.is_boolean(kind):
        takes, target, fits = "true or false", pa.bool_(), lambda v: isinstance(v, bool)
    elif types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind):
        whole = types.is_integer(kind) and not any(isinstance(v, float) for v in values)
        target = (pa.uint64() if kind == pa.uint64() else pa.int64()) if whole else pa.float64()
        takes, fits = "a number", lambda v: isinstance(v, int | float) and not isinstance(v, bool)
    elif types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        takes, target, fits = "a text", pa.large_string(), lambda v: isinstance(v, str)
    elif types.is_temporal(kind) and not types.is_duration(kind):
        takes, target, fits = "a text like 2026-01-31T12:00:00", kind, lambda v: isinstance(v, str)
    else:
        raise InvalidRequest(f"filter: {field!r} holds {kind}, which cannot be compared")
    for value in values:
        if not fits(value):
            raise InvalidRequest(f"filter: {field!r} holds {kind}, which takes {takes}, got {shown(value)}")
    try:
        if types.is_temporal(kind):
            return pa.array(values, pa.string()).cast(kind)
        if types.is_integer(target):
            low, high = (0, 2**64) if target == pa.uint64() else (-(2**63), 2**63)
            values = [value for value in values if low <= value < high]
        elif types.is_floating(target):
            values = [float(value) for value in values]
        return pa.array(values, target)
    except (pa.ArrowException, ValueError, OverflowError) as error:
        raise InvalidRequest(
            f"filter: {field!r} holds {kind}, cannot read {shown(values[0] if len(values) == 1 else values)}"
        ) from error
