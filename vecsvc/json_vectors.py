"""Vectors out of JSON text and into it, without a Python object for each number, and without Python's lock."""

from __future__ import annotations

from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from vecsvc import machine_code
from vecsvc.types import Vectors

_POWERS: Final = np.array([float(f"1e{i}") for i in range(23)])
_POWERS_AT: Final = int(_POWERS.ctypes.data)
_loaded: Final[list[machine_code.Kernel]] = []  # what reads, and what writes
_MORE: Final = 4  # places that the reading kernel needs beyond one for every second byte
_BYTES: Final = 17  # a number takes no more, its comma included, ...
_ENDS: Final = 10  # ... and the array no more besides


def vector(text: msgspec.Raw | bytes) -> Vectors | None:
    """The numbers of a JSON array as float32, one row (1, n).

    Each value is what `numpy.float32(float(digits))` is. None where the text is anything else, JSON or not, or some
    number needs more care than it gets here; then `msgspec.json` has to look at it.
    """
    found, rows = _read(text)
    return None if found is None or rows else found.reshape(1, -1)


def vectors(text: msgspec.Raw) -> Vectors | None:
    """The numbers of a JSON array of m arrays of n numbers (m, n), as `vector` has them."""
    found, rows = _read(text)
    return None if found is None or not rows else found.reshape(rows, -1)


def _read(text: msgspec.Raw | bytes) -> tuple[Vectors | None, int]:
    """All numbers, and how many inner arrays they are from."""
    if not _loaded:
        return None, 0  # nobody waits until it is compiled
    data = np.frombuffer(text, np.uint8)
    size = len(data)
    out = np.empty(size // 2 + _MORE, np.float32)
    found = _loaded[0](id(data), size, id(out), _POWERS_AT)
    return (None, 0) if found < 1 else (out[: found & 0xFFFFFFFF], found >> 32)


def text(row: NDArray[np.float32]) -> bytes:
    """The values of a row (n,) as a JSON array, by which each is found again to the bit."""
    if _loaded:
        values = np.ascontiguousarray(row, np.float32)
        out = np.empty(_BYTES * len(values) + _ENDS, np.uint8)
        size = _loaded[1](id(values), len(values), id(out), _POWERS_AT)
        if size > 0:
            return out[:size].tobytes()
    return msgspec.json.encode(row.tolist())


def load() -> None:
    """Make ready what reads and writes the text, compiled where it is not kept. Until then `msgspec.json` has to do."""
    if not _loaded:
        kernels = [machine_code.load("vecsvc.json_kernels", name, 4) for name in ("json_rows", "json_text")]
        _loaded.extend(kernels)
