"""Vectors that are read straight out of JSON text are those that a decoder and NumPy make of it, to the bit."""

from __future__ import annotations

import ctypes
import json
import mmap
from collections.abc import Callable, Iterator

import msgspec
import numpy as np
import pytest

from vecsvc import json_vectors, machine_code, schemas
from vecsvc.config import HttpSettings
from vecsvc.types import VectorQuery

HERE = machine_code.best_path()
LIMITS = HttpSettings()
Read = Callable[[str], np.ndarray | None]


@pytest.fixture(params=machine_code.PATHS[machine_code.PATHS.index(HERE) :], autouse=True)
def _path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything here holds on each path that this processor has."""
    kernels = [machine_code.load("vecsvc.json_kernels", name, 4, request.param) for name in ("json_rows", "json_text")]
    monkeypatch.setattr(json_vectors, "_loaded", kernels)


def vector(text: str) -> np.ndarray | None:
    return json_vectors.vector(msgspec.Raw(text.encode()))


def vectors(text: str) -> np.ndarray | None:
    return json_vectors.vectors(msgspec.Raw(text.encode()))


def decoded(text: str) -> np.ndarray:
    return np.array(json.loads(text, parse_int=float), np.float64).astype(np.float32)


def same(found: np.ndarray | None, text: str) -> bool:
    """Bit for bit, so that -0.0 is not 0.0."""
    return found is not None and found.shape[0] == 1 and found.tobytes() == decoded(text).tobytes()


def texts_of(values: np.ndarray) -> Iterator[str]:
    """The same numbers in the spellings of several languages."""
    yield json.dumps(values.tolist())
    for form in ("%.9g", "%.6f", "%.3e", "%.17g", "%.17E"):
        yield "[" + ",".join(form % value for value in values) + "]"
    yield "[\n  " + ",\n\t".join(map(repr, values.tolist())) + " \r\n]"


@pytest.mark.parametrize("exponent", range(-14, 16))
def test_numbers_of_every_size_and_spelling(exponent: int) -> None:
    rng = np.random.default_rng(exponent + 100)
    wide = rng.standard_normal(300) * 10.0**exponent
    for values in (wide, wide.astype(np.float32).astype(np.float64)):
        for text in texts_of(values):
            long = max(len(number.strip(" -")) for number in text.strip("[] \r\n").split(",")) > 17 and "." in text
            found = vector(text)
            assert same(found, text) or (found is None and long and exponent > 10), text


@pytest.mark.parametrize(
    "text",
    [
        "[0]", "[-0]", "[0.0]", "[-0.0]", "[0e5]", "[0E-400]", "[1]", "[-1]", "[10]", "[1e0]", "[1E+5]", "[1e-5]",
        "[1e00005]", "[9007199254740993]", "[0.30000001192092896]",
        "[123456789]", "[12345678]", "[1234567]", "[0.12345678]", "[0.1234567]", "[0.00000001]", "[100000000.00000001]",
        "[999999999999999999]", "[12345678e15]", "[3e-37]",
        "[ 1 , 2 ]", " [1]", "[1] ", "[1e-22]", "[1.5e22]", "[1e-7]", "[1.2345678901234567e-07]",
    ],
)  # fmt: skip
def test_numbers_at_the_edges(text: str) -> None:
    assert same(vector(text), text)


@pytest.mark.parametrize(
    "text",
    [
        "[]", "[[]]", "{}", "null", "1", '"1"', '["1"]', "[null]", "[true]", "[1,null]", '{"base64":""}',
        "[[1]]", "[[1],[2]]", "[1e99999]",
        "[1234567890123456789]", "[0.1234567890123456789]", "[1e39]", "[-1e39]", "[1e-39]", "[1e400]", "[1e-400]",
        "", "[", "[1", "[1,", "[1 2]", "[1,,2]", "[1,]", "[,1]", "[1]]", "[1][", "[01]", "[-01]", "[00]", "[-]", "[+1]",
        "[.5]", "[1.]", "[1.e5]", "[1e]", "[1e+]", "[1e-]", "[1 .5]", "[1. 5]", "[- 1]", "[1e 5]", "[--1]", "[1-2]",
        "[0x10]", "[1_000]", "[1;2]", "[1\x0b]", "[1\x00]", "[\x0c1]", "[1,\x1f2]", "[1\u00a0]", "[NaN]", "[Infinity]",
        "[3.4028235677973366e38]", "[1.17549435e-38]", "[1.1754944e-38]", "[3.4028234e38]", "[3e-40]",
    ],
)  # fmt: skip
def test_what_is_no_plain_vector_is_left_to_the_decoder(text: str) -> None:
    assert vector(text) is None


def test_numbers_in_the_middle_between_two_are_never_guessed() -> None:
    rng = np.random.default_rng(5)
    below = (rng.standard_normal(3000) * 10.0 ** rng.integers(-8, 8, 3000)).astype(np.float32)
    middle = (below.astype(np.float64) + np.nextafter(below, np.float32(np.inf)).astype(np.float64)) / 2
    read = 0
    for value in middle.tolist():
        for digits in range(9, 26):
            text = f"[{value:.{digits}g}]"
            found = vector(text)
            assert found is None or same(found, text), text
            read += found is not None
    assert read > 20_000, "what has few digits, or is clear of the middle, is read here"


def test_rows_are_read_at_once() -> None:
    matrix = np.random.default_rng(6).standard_normal((50, 33)).astype(np.float32)
    text = json.dumps(matrix.astype(float).tolist())
    found = vectors(text)
    assert found is not None and found.dtype == np.float32 and (found == matrix).all()
    assert vector(text) is None
    [row] = vectors("[ [1,2] ]")  # type: ignore[misc]
    assert row.tolist() == [1, 2]


@pytest.mark.parametrize(
    "text", ["[1]", "[]", "[[]]", "[[1],[]]", "[[1],[1,2]]", "[[1,2],[1]]", "[[1],2]", "[[[1]]]", '[[1],{"base64":""}]']
)
def test_rows_of_other_shapes_are_left_to_the_decoder(text: str) -> None:
    assert vectors(text) is None


@pytest.mark.parametrize("text", ["[1.25,-3e-5,123456789.123456789]", "[[1,2],[3,4e1]]", "[ 1 ,\n2 ]"])
def test_nothing_behind_the_text_is_read(text: str) -> None:
    """Each beginning of it stands at the very end of what may be read: a look beyond would end this process."""
    page = mmap.PAGESIZE
    area = mmap.mmap(-1, 2 * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(start + page), page, 0) == 0
    for size in range(1, len(text) + 1):
        piece = text[:size].encode()
        area[page - size : page] = piece
        view = np.frombuffer((ctypes.c_uint8 * size).from_address(start + page - size), np.uint8)
        found, _ = json_vectors._read(view)  # type: ignore[arg-type]
        assert (found is not None) == (size == len(text)), piece
    libc.mprotect(ctypes.c_void_p(start + page), page, mmap.PROT_READ | mmap.PROT_WRITE)


def test_a_question_is_the_same_whoever_reads_its_vector() -> None:
    for text in ("[0.25, -1e-3]", "[1234567890123456789012, 1]", "[0.1234567890123456789, 1e-44]"):
        query, settings = schemas.parse_search(f'{{"k": 3, "vector": {text}}}'.encode(), LIMITS)
        assert isinstance(query, VectorQuery) and same(query.vectors, text) and settings.k == 3
        query, _ = schemas.parse_batch(f'{{"vectors": [{text}, {text}]}}'.encode(), LIMITS)
        assert isinstance(query, VectorQuery) and query.vectors.shape == (2, 2)
        assert same(query.vectors[:1], text) and same(query.vectors[1:], text)


def test_until_the_kernel_is_there_the_decoder_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    body = b'{"vector": [0.1, 2], "k": 3}'
    before, _ = schemas.parse_search(body, LIMITS)
    monkeypatch.setattr(json_vectors, "_loaded", [])
    assert vector("[0.1, 2]") is None
    after, _ = schemas.parse_search(body, LIMITS)
    assert isinstance(before, VectorQuery) and isinstance(after, VectorQuery)
    assert before.vectors.tobytes() == after.vectors.tobytes()


# ---------------------------------------------------------------------------------------------- into text


def written(values: np.ndarray) -> np.ndarray:
    text = json_vectors.text(values)
    assert text == b"".join(text.split()) and text[:1] + text[-1:] == b"[]"
    return decoded(text.decode())


@pytest.mark.parametrize("exponent", range(-44, 38, 3))
def test_what_is_written_is_read_as_the_same_number(exponent: int) -> None:
    values = (np.random.default_rng(exponent + 100).standard_normal(3000) * 10.0**exponent).astype(np.float32)
    assert written(values).tobytes() == values.tobytes()


def test_numbers_beside_powers_of_ten_and_two_are_written_right() -> None:
    powers = [float(f"1e{n}") for n in range(-13, 9)] + [2.0**n for n in range(-43, 30)]
    middle = np.array(powers, np.float32)
    near = [np.nextafter(middle, np.float32(side)) for side in (0, np.inf)]
    values = np.concatenate([middle, *near])
    values = np.concatenate([values, -values, np.array([0.0, -0.0], np.float32)])
    for value in values:
        assert written(value[None]).tobytes() == value.tobytes()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.5, "0.5"),
        (-1, "-1.0"),
        (123456, "123456.0"),
        (-1234.5, "-1234.5"),
        (0.1, "0.100000001"),
        (3 / 2**16, "0.0000457763672"),
        (2.0**-20, "9.53674316e-07"),
        (0, "0.0"),
    ],
)
def test_numbers_are_written_as_people_write_them(value: float, expected: str) -> None:
    assert json_vectors.text(np.array([value], np.float32)).decode() == f"[{expected}]"


def test_rows_that_are_no_plain_numbers_are_left_to_the_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    assert json_vectors.text(np.array([], np.float32)) == b"[]"
    assert json_vectors.text(np.array([1e30, 0.5], np.float32)) == msgspec.json.encode([float(np.float32(1e30)), 0.5])
    strided = np.arange(12, dtype=np.float32)[::3]
    assert json_vectors.text(strided) == b"[0.0,3.0,6.0,9.0]"
    monkeypatch.setattr(json_vectors, "_loaded", [])
    assert json_vectors.text(np.array([0.5], np.float32)) == b"[0.5]"
