"""Blocks of addresses, by which kernels find the arrays that they work on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Block:
    """Numbers and addresses for a kernel, and the arrays that the addresses are of: these live as long as it does."""

    def __init__(self, slots: int, numbers: Mapping[int, int], arrays: Mapping[int, NDArray[Any] | None]) -> None:
        """Where an array is None, its address is 0."""
        self.values = np.zeros(slots, np.int64)
        self.address = int(self.values.ctypes.data)
        self._arrays: dict[int, NDArray[Any]] = {}
        for slot, number in numbers.items():
            self.values[slot] = number
        for slot, array in arrays.items():
            if array is not None:
                self.put(slot, array)

    def put(self, slot: int, array: NDArray[Any]) -> None:
        self._arrays[slot] = np.ascontiguousarray(array)
        self.values[slot] = self._arrays[slot].ctypes.data
