"""Memory that a library got moves to huge pages where the system has them, and stays what it was."""

from __future__ import annotations

import mmap
import platform
import re
from pathlib import Path

import numpy as np
import pytest

from vecsvc import huge_pages as module
from vecsvc.huge_pages import HUGE, huge_pages

SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")
RELEASE = tuple(int(part) for part in re.findall(r"\d+", platform.release())[:2])


def huge_kb() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("AnonHugePages")))


@pytest.mark.skipif(
    RELEASE < (6, 1) or not SWITCH.exists() or "[never]" in SWITCH.read_text(), reason="a system without huge pages"
)
def test_what_is_allocated_inside_lies_in_huge_pages_and_keeps_its_content() -> None:
    outside = mmap.mmap(-1, 4 * HUGE, flags=mmap.MAP_PRIVATE)
    outside.write(b"a" * len(outside))
    before = huge_kb()
    with huge_pages():
        inside = mmap.mmap(-1, 9 * HUGE, flags=mmap.MAP_PRIVATE)
        inside.write(b"b" * len(inside))
        array = np.full(HUGE, 7.0)
    assert huge_kb() - before >= 7 * HUGE >> 10
    assert inside[:] == b"b" * len(inside) and outside[:] == b"a" * len(outside) and (array == 7.0).all()


def test_nothing_happens_where_memory_cannot_be_listed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "_MAPS", tmp_path / "none")
    monkeypatch.setattr(module, "_advise", lambda start, size: pytest.fail("advised"))
    with huge_pages():
        np.full(HUGE, 7.0)


def test_an_error_inside_comes_out() -> None:
    with pytest.raises(KeyError), huge_pages():
        raise KeyError
