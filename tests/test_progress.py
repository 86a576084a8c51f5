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


def test_what_the_first_few_took_tells_nothing_of_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(0, 1000, 10))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(now)))
    stream = io.StringIO()
    with progress.Phase("indexing", 20_000, stream) as phase:
        for rows in (15, 100, 85):
            phase(rows)
    first, second, third, _ = stream.getvalue().splitlines()
    assert "to go" not in first and "to go" not in second and "to go" in third


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_more_than_was_thought_is_counted_without_a_share(stream: io.StringIO) -> None:
    with progress.Phase("encoding", 10, stream, unit="texts") as phase:
        phase(11)
    assert "encoding: 11 texts, " in stream.getvalue() and "%" not in stream.getvalue()


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


def test_the_speed_and_the_time_to_go_are_of_this_run_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 10.0, 20.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    stream = io.StringIO()
    phase = progress.Phase("encoding", 20_000, stream, unit="texts", before=4_000)
    phase(1_000)
    assert stream.getvalue() == "encoding: 5,000 of 20,000 texts (25 %), 20.0 s, 50 texts/s, about 5 min to go\n"


@pytest.mark.parametrize(
    ("seconds", "shown"), [(3.4, "3 s"), (99, "99 s"), (150, "2 min"), (5_400, "90 min"), (9_000, "2.5 h")]
)
def test_times_to_go_come_in_words_of_their_size(seconds: float, shown: str) -> None:
    assert progress._duration(seconds) == shown
