"""Frames are cut from any stream of bytes as they were put in, and what is no frame is refused, never believed."""

from __future__ import annotations

import random
import struct
import tracemalloc
import zlib
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vecsvc import errors, remote
from vecsvc.errors import InternalError, ProtocolError, VecsvcError
from vecsvc.remote import Ask, Common, Frames, Kind
from vecsvc.types import Condition

CONDITIONS = remote.write_conditions((Condition("year", "$gt", 2**70), Condition("a", "$in", ["é", None, 0.5])))
VECTORS = np.arange(6, dtype="<f4").reshape(3, 2)
ASK = Ask("it", "v1", 2, 3, CONDITIONS, [("ef", 7)], False, 9, 5, 3, False, [])


def cutter(max_bytes: int = 1 << 20) -> Frames:
    return Frames(frozenset(Kind), max_bytes)


def cut(data: bytes, sizes: list[int], frames: Frames) -> list[tuple[Kind, int, bytes]]:
    found, at = [], 0
    for size in [*sizes, len(data)]:
        found += list(frames.feed(data[at : at + size]))
        at += size
        if at >= len(data):
            break
    return found


@settings(deadline=None)
@given(
    sent=st.lists(st.tuples(st.sampled_from(Kind), st.integers(0, 2**32 - 1), st.binary(max_size=200)), max_size=8),
    sizes=st.lists(st.integers(1, 50), max_size=200),
)
def test_frames_come_out_as_they_were_put_in_however_the_stream_is_cut(
    sent: list[tuple[Kind, int, bytes]], sizes: list[int]
) -> None:
    data = b"".join(remote.frame(*one) for one in sent)
    frames = cutter()
    assert cut(data, sizes, frames) == sent
    assert frames.held_bytes == 0


def test_a_stream_of_single_bytes_is_held_once() -> None:
    sent = remote.frame(Kind.PART, 7, bytes(300_000))
    frames = cutter()
    tracemalloc.start()
    found: list[Any] = []
    for at in range(0, len(sent), 2):
        found += frames.feed(sent[at : at + 2])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found == [(Kind.PART, 7, bytes(300_000))] and peak < 5 * len(sent)


@settings(deadline=None)
@given(data=st.binary(max_size=300), at=st.integers(0, 400), bit=st.integers(0, 7))
def test_no_flipped_bit_goes_unseen(data: bytes, at: int, bit: int) -> None:
    """It is refused, or waits for more; only in the request's number a bit may change who is answered."""
    sent = bytearray(remote.frame(Kind.FOUND, 7, data))
    at %= len(sent)
    sent[at] ^= 1 << bit
    frames = Frames(remote.OF_NODES, 1 << 20)
    try:
        found = list(frames.feed(bytes(sent)))
    except ProtocolError:
        return
    assert all(payload == data for _, _, payload in found)
    assert not found or at in range(4, 9)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (struct.pack("<IBII", 2000, Kind.PART, 1, 0), "2000 bytes, the limit is 1000"),
        (struct.pack("<IBII", 0xFFFFFFFF, Kind.PART, 1, 0), "the limit is 1000"),
        (struct.pack("<IBII", 10, Kind.SEARCH, 1, 0), "kind 2, which nobody sends here"),
        (struct.pack("<IBII", 10, 255, 1, 0), "kind 255"),
        (struct.pack("<IBII", 2, Kind.PART, 1, zlib.crc32(b"no")) + b"on", "checksum"),
        (b"GET /search HTTP/1.1\r\nHost: x\r\n\r\n", "bytes, the limit is 1000; it begins as HTTP does, which --port"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "as an answer over HTTP does: its --shard-port is another"),
        (b"\x16\x03\x01\x02\x00" + bytes(60), "it begins as TLS does: one side has shard_tls_cert, the other not"),
    ],
)
def test_what_is_no_frame_is_refused_with_its_reason(data: bytes, why: str) -> None:
    with pytest.raises(ProtocolError, match=why):
        list(Frames(remote.OF_NODES, 1000).feed(data))


def test_a_head_that_announces_too_much_is_refused_before_any_of_it_arrives() -> None:
    frames = Frames(remote.OF_FRONT_DOORS, remote.MAX_REQUEST_BYTES)
    with pytest.raises(ProtocolError, match="limit"):
        list(frames.feed(struct.pack("<IBII", remote.MAX_REQUEST_BYTES + 1, Kind.SEARCH, 1, 0)))


def test_every_kind_that_one_side_sends_is_refused_by_that_side() -> None:
    assert set(Kind) == remote.OF_FRONT_DOORS | remote.OF_NODES and not remote.OF_FRONT_DOORS & remote.OF_NODES


def test_a_question_says_the_same_at_the_other_end() -> None:
    frame = remote.search_frame(5, 250.0, (0, 3, 4095), Common.of(remote.encode_ask(ASK), VECTORS))
    [(kind, request, payload)] = Frames(remote.OF_FRONT_DOORS, 1000).feed(frame)
    assert (kind, request) == (Kind.SEARCH, 5)
    timeout_ms, shards, ask, plain, vectors = remote.decode_search(payload)
    assert (timeout_ms, shards, ask, plain) == (250.0, (0, 3, 4095), ASK, None)
    assert vectors.tolist() == [[0, 1], [2, 3], [4, 5]]
    found = ask.settings(timeout_ms)
    assert (found.k, found.params, found.max_visited, found.timeout_ms) == (3, (("ef", 7),), 9, 250.0)
    assert found.conditions == (Condition("year", "$gt", 2**70), Condition("a", "$in", ["é", None, 0.5]))


def test_what_stands_around_vectors_is_read_once_and_the_same() -> None:
    """Asks of any length, and vectors that begin where NumPy likes them to."""
    for length in (*range(1, 12), remote.MAX_KNOWN_BYTES, 5000):
        ask = msgspec.structs.replace(ASK, index="i" * length, conditions=b"")
        for number in range(3):
            payload = asked(9.0, 1, remote.encode_ask(ask), VECTORS + number)
            found = remote.decode_search(payload)
            assert found.ask == ask and found.plain == ask.settings(0.0) and found.shards == (0,)
            assert found.vectors.flags.aligned and (found.vectors == VECTORS + number).all()
    assert remote._known_ask.cache_info().hits > 0


def changed(**fields: Any) -> bytes:
    return remote.encode_ask(msgspec.structs.replace(ASK, **fields))


def asked(timeout_ms: float, n: int, ask: bytes, vectors: np.ndarray = VECTORS) -> bytes:
    return ask + vectors.tobytes() + bytes(2 * n) + struct.pack("<dH", timeout_ms, n)


def framed(encoded: bytes) -> bytes:
    """An Ask that is none."""
    return struct.pack("<I", len(encoded)) + encoded + bytes(-len(encoded) % 4)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        bytes(9),
        asked(100.0, 0, changed()),
        asked(0.0, 1, changed()),
        asked(-1.0, 1, changed()),
        asked(float("nan"), 1, changed()),
        asked(float("inf"), 1, changed()),
        asked(100.0, 5000, changed()),
        asked(100.0, 3, b""),
        asked(100.0, 1, b"\xc1"),
        asked(100.0, 1, framed(b"\xc1")),
        asked(100.0, 1, framed(b"")),
        asked(100.0, 1, changed() + b"x"),
        asked(100.0, 1, struct.pack("<I", 0xFFFFFFFF) + changed()),
        asked(100.0, 1, struct.pack("<I", len(changed())) + changed()[4:]),
        asked(100.0, 1, changed(dim=0)),
        asked(100.0, 1, changed(dim=-1)),
        asked(100.0, 1, changed(dim=2**40)),
        asked(100.0, 1, changed(dim=5)),
        asked(100.0, 1, changed(), np.zeros(0, "<f4")),
        asked(100.0, 1, changed(), np.zeros(7, np.uint8)),
        changed(),
        changed()[:12],
        asked(100.0, 1, changed(k=0)),
        asked(100.0, 1, changed(k=-3)),
        asked(100.0, 1, changed(k=2**60)),
        asked(100.0, 1, changed(max_visited=0)),
        asked(100.0, 1, changed(rerank_depth=-1)),
        asked(100.0, 1, changed(k="3")),
        asked(100.0, 1, changed(params=[("ef", 7.5)])),
        asked(100.0, 1, changed(conditions=[("year", "$gt")])),
        asked(100.0, 1, changed(include=["everything"])),
        asked(100.0, 1, framed(msgspec.msgpack.encode([1, 2, 3]))),
        asked(100.0, 1, framed(b"\x91" * 5000 + b"\xc0")),
    ],
    ids=range(34),
)
def test_a_question_that_makes_no_sense_is_refused(payload: bytes) -> None:
    with pytest.raises(ProtocolError):
        remote.decode_search(payload)


@pytest.mark.parametrize(
    "data", [b"{", b"[[1]]", b'[["year", "$boom", 1]]', b'[["year", "$gt"]]', b"[" * 5000, b"\xff"]
)
def test_a_filter_that_makes_no_sense_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        msgspec.structs.replace(ASK, conditions=data).settings(1.0)


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=400), kind=st.sampled_from(Kind))
def test_no_bytes_raise_anything_but_a_protocol_error(data: bytes, kind: Kind) -> None:
    try:
        if kind is Kind.SEARCH:
            remote.decode_search(data)
        else:
            remote.decode(kind, data)
    except ProtocolError:
        pass


def test_damaged_questions_are_refused_or_whole() -> None:
    """Where the checksum is right and a value is not: what comes out keeps its types and bounds."""
    chance = random.Random(3)
    good = asked(100.0, 2, changed())
    for _ in range(5000):
        data = bytearray(good)
        for _ in range(chance.randint(1, 4)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        try:
            timeout_ms, shards, ask, _, vectors = remote.decode_search(bytes(data))
        except ProtocolError:
            continue
        assert 0 < timeout_ms < 1e9 and 1 <= len(shards) <= remote.MAX_SHARDS
        assert vectors.shape[1] == ask.dim and 1 <= ask.k <= remote.MAX_K


def every_error(cls: type[VecsvcError] = VecsvcError) -> list[type[VecsvcError]]:
    return [cls, *(found for child in cls.__subclasses__() for found in every_error(child))]


@pytest.mark.parametrize("cls", every_error(), ids=lambda cls: cls.__name__)
def test_every_error_has_the_same_code_and_words_at_the_front_door(cls: type[VecsvcError]) -> None:
    error = cls("because of 5")
    raised = remote.raised(remote.failure(error))
    assert raised.code == cls.code and str(raised) == str(error) and "because of 5" in str(error)


def test_a_bug_of_a_node_is_told_without_its_details_and_an_unknown_code_is_one() -> None:
    assert remote.failure(KeyError("secret")) == remote.Failed("internal", "the node failed; its log says why")
    assert type(remote.raised(remote.failure(KeyError("secret")))) is InternalError
    assert type(remote.raised(remote.Failed("a code of tomorrow", "x"))) is InternalError
    assert type(remote.raised(remote.Failed("invalid", "x"))) is errors.InvalidRequest
