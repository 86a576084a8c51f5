"""The block of addresses by which the kernels that build `nng` find the vectors' int8 codes."""

from __future__ import annotations

from typing import Final

LINES: Final = 0  # lines of 64 bytes in a code
BYTES: Final = 1  # (size, lines * 64) int8
SQUARES: Final = 2  # (size,) int32: |a|²
SHIFTS: Final = 3  # (size,) int32: 128 times the sum of a code, which byte_dot wants to know
AUGMENT: Final = 4  # (size,) float32: the dimension that makes vectors equally long, for ip; 0 for none
STEP: Final = 5  # address of a float32: the step of the codes
ROWS: Final = 6  # (size, WIDTH) float32 by place, where the vectors themselves are compared; 0 where their codes are
WIDTH: Final = 7  # values of a row
CODE_SLOTS: Final = 8
