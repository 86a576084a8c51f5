"""A node's part of an answer is believed only where its pieces fit together and can be ranked."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from vecsvc.errors import ProtocolError
from vecsvc.merging import check_part
from vecsvc.remote import Part, all_finite

INCLUDE = frozenset(("fields", "vector"))
DIM = 3


def floats(*values: float) -> bytes:
    return np.array(values, "<f4").tobytes()


PART = Part(
    counts=[2, 0, 1],
    distances=floats(0.5, 6e34, -0.25),  # as far as distances go: their squares have no place in float32
    rows=np.array([1, 2, 3], "<i8").tobytes(),
    ids=["a", "b", "c"],
    fields=[b"{}"] * 3,
    vectors=floats(*range(3 * DIM)),
    strategy="nng",
    visited=9,
    stopped=False,
    queue_s=0.0,
    search_s=0.001,
    rerank_s=0.0,
    explain=None,
)
DAMAGED: dict[str, dict[str, Any]] = {
    "a count too few": {"counts": [2, 1]},
    "a count below zero": {"counts": [4, -1, 0]},
    "more than k": {"counts": [0, 0, 3]},
    "half a distance": {"distances": PART.distances[:-2]},
    "a row too many": {"rows": PART.rows + bytes(8)},
    "an id too few": {"ids": ["a", "b"]},
    "no fields": {"fields": None},
    "no vectors": {"vectors": None},
    "a vector too short": {"vectors": PART.vectors[:-4] if PART.vectors else None},
    "NaN": {"distances": floats(0.5, np.nan, 1.0)},
    "infinitely far": {"distances": floats(0.5, np.inf, 1.0)},
    "infinitely near": {"distances": floats(-np.inf, 0.5, 1.0)},
    "a vector of NaN": {"vectors": floats(*[np.nan] * 9)},
    "no time": {"queue_s": float("nan")},
    "for ever": {"rerank_s": float("inf")},
}


def test_a_part_as_nodes_send_it_is_taken() -> None:
    check_part(3, 2, DIM, INCLUDE, PART)
    nothing = msgspec.structs.replace(PART, counts=[0], distances=b"", rows=b"", ids=[], fields=None, vectors=None)
    check_part(1, 2, DIM, frozenset(), nothing)
    with pytest.raises(ProtocolError):  # nobody asked for it, and it is no vector either
        check_part(1, 2, DIM, frozenset(), msgspec.structs.replace(nothing, vectors=b"abc"))


@pytest.mark.parametrize("n", [1, 2, 64, 65, 200])
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_one_value_that_is_no_number_is_seen_among_few_and_many(n: int, wrong: float) -> None:
    values = np.full(n, 3e38, "<f4")  # whose squares and sum have no place in float32
    assert all_finite(values.tobytes())
    values[n // 2] = wrong
    assert not all_finite(values.tobytes())


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED)
def test_a_part_that_does_not_fit_together_or_is_no_number_is_refused(damage: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        check_part(3, 2, DIM, INCLUDE, msgspec.structs.replace(PART, **damage))
