"""Progress: a bar on a terminal, plain lines elsewhere, the end always said."""

from __future__ import annotations

import io

import pytest

from index_builders import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_elsewhere_than_on_a_terminal_a_phase_ends_in_one_plain_line() -> None:
    stream = io.StringIO()
    with progress.Phase("reading", 2000, stream) as phase:
        for _ in range(4):
            phase(500)
    [line] = stream.getvalue().splitlines()
    assert line.startswith("reading: 2,000 of 2,000 rows (100 %)") and "\r" not in line


def test_a_terminal_sees_a_bar_that_fills(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(100))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(now)))
    stream = Terminal()
    with progress.Phase("indexing", 4, stream) as phase:
        for _ in range(4):
            phase(1)
    shown = stream.getvalue().split("\r")
    assert (
        "[######.................." in shown[1]
        and "to go" in shown[2]
        and "[########################] 4/4" in shown[-1]
    )


def test_an_unknown_total_is_counted_all_the_same() -> None:
    stream = io.StringIO()
    with progress.Phase("copying", None, stream, unit="files") as phase:
        phase(3)
    assert stream.getvalue().startswith("copying: 3 files, ")


def test_an_error_is_not_announced_as_an_end() -> None:
    stream = io.StringIO()
    with pytest.raises(ValueError, match="row 3"), progress.Phase("reading", 10, stream):
        raise ValueError("row 3")
    assert stream.getvalue() == ""
