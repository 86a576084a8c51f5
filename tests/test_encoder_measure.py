"""How an encoder is run is decided by stated rules from what was measured, in bounded time, and one session is kept."""

from __future__ import annotations

import dataclasses
import logging
import time
from pathlib import Path
from typing import Any

import pytest
from tiny_bert import write_tiny_bert
from tiny_cnn_lstm import write_tiny_cnn_lstm

from vecsvc.config import ServeSettings
from vecsvc.encoder_pool import EncoderPool
from vecsvc.encoders import measure as measuring
from vecsvc.encoders.base import StepEncoder
from vecsvc.encoders.measure import WHOLE_S, RunChoice, Timing, measure, open_fastest, pays, runs_at_once, steps
from vecsvc.encoders.onnx import open_encoder
from vecsvc.errors import EncoderError
from vecsvc.telemetry import Metrics
from vecsvc.worker_places import for_one

BASE = Timing(short_s=1.0, busy_s=1.2, texts_s={1: 100.0, 2: 190.0})


def timing(short_s: float = 1.0, busy_s: float = 1.2, **texts_s: float) -> Timing:
    return Timing(short_s, busy_s, {int(name[1:]): value for name, value in texts_s.items()})


# ------------------------------------------------------------------------------------------------- the rules


@pytest.mark.parametrize(
    ("after", "expected", "why"),
    [
        (timing(0.8, x1=190.0), True, "a faster query with as many texts"),
        (timing(0.8, x1=145.0), True, "a faster query for some texts less"),
        (timing(0.8, x1=140.0), False, "a faster query, but too many texts less where many wait"),
        (timing(0.9, x1=190.0), False, "hardly faster"),
        (timing(0.8, busy_s=1.6, x1=190.0), False, "faster only while cores are idle"),
        (timing(1.05, x1=250.0), True, "many more texts"),
        (timing(1.05, x1=150.0, x2=250.0), True, "many more texts with two runs at once"),
        (timing(1.2, x1=500.0), False, "a query must not get slower"),
        (timing(1.05, busy_s=1.6, x1=500.0), False, "nor where cores are busy"),
    ],
)
def test_more_threads_must_pay(after: Timing, expected: bool, why: str) -> None:
    assert pays(BASE, after) is expected, why


@pytest.mark.parametrize(
    ("texts_s", "expected"),
    [
        ({1: 100.0}, 1),
        ({1: 100.0, 2: 190.0}, 2),
        ({1: 100.0, 2: 120.0}, 2),
        ({1: 100.0, 2: 110.0}, 1),
        ({1: 100.0, 2: 190.0, 4: 360.0, 6: 380.0}, 4),
        ({1: 100.0, 2: 110.0, 4: 400.0}, 1),
    ],
)
def test_each_doubling_of_the_runs_at_once_must_bring_texts(texts_s: dict[int, float], expected: int) -> None:
    assert runs_at_once(texts_s) == expected


def test_steps_double_and_end_with_the_most() -> None:
    assert [steps(most) for most in (1, 2, 3, 4, 6, 16)] == [
        [1],
        [1, 2],
        [1, 2, 3],
        [1, 2, 4],
        [1, 2, 4, 6],
        [1, 2, 4, 8, 16],
    ]


# ------------------------------------------------------------------------------------------ what is kept


class FakeEncoder:
    """An opening of a made-up machine."""

    def __init__(self, machine: Machine, threads: int, spinning: bool) -> None:
        self.machine, self.way = machine, (threads, spinning)
        self.closed = False

    def split(self, texts: Any) -> Any:
        return texts

    def run(self, tokens: Any) -> Any:
        return tokens

    def close(self) -> None:
        self.closed = True


class Machine:
    """Opens encoders whose timings are made up, by threads and spinning."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, timings: dict[tuple[int, bool], Timing]) -> None:
        self.timings = timings
        self.opened: list[FakeEncoder] = []
        self.now = 0.0
        self.at_once: list[list[int]] = []  # how many runs each opening is measured with

        def made_up(encoder: FakeEncoder, at_once: Any, *_: Any) -> Timing:
            self.at_once.append(list(at_once))
            return timings[encoder.way]

        monkeypatch.setattr(measuring, "measure", made_up)

    def open(self, threads: int, spinning: bool) -> Any:
        if (threads, spinning) not in self.timings:
            raise EncoderError(f"no opening with {threads} threads")
        self.opened.append(FakeEncoder(self, threads, spinning))
        return self.opened[-1]

    def choose(self, cores: int, **given: Any) -> RunChoice:
        encoder, choice = open_fastest(self.open, cores=cores, clock=lambda: self.now, **given)
        assert [one for one in self.opened if not one.closed] == [encoder]
        assert encoder.way == (choice.threads, choice.spinning)
        return choice


def kept(choice: RunChoice) -> tuple[int, int, bool]:
    return choice.threads, choice.instances, choice.spinning


SLOWER = timing(1.5, 1.5, x1=90.0)


def test_runs_at_once_are_taken_where_threads_do_not_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, {(1, False): BASE, (2, False): SLOWER, (2, True): SLOWER})
    choice = machine.choose(2)
    assert kept(choice) == (1, 2, False)
    assert choice.why == (
        "1 thread: 1000.00 ms a query, 1200.00 beside busy threads, 190 texts/s with 2 runs at once; "
        "2 threads: 1500.00 ms a query, 1500.00 beside busy threads, 90 texts/s with 1 run at once; "
        "2 spinning threads: 1500.00 ms a query, 1500.00 beside busy threads, 90 texts/s with 1 run at once"
    )


def test_threads_double_while_that_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    timings = {
        (1, False): timing(1.0, x1=100.0, x2=190.0, x4=350.0),
        (2, False): timing(0.6, x1=170.0, x2=330.0),
        (4, False): timing(0.58, x1=300.0),
        (2, True): timing(0.58, x1=170.0, x2=330.0),
    }
    machine = Machine(monkeypatch, timings)
    assert kept(machine.choose(8)) == (2, 2, False)
    assert [one.way for one in machine.opened] == list(timings), "8 threads were not tried once 4 did not pay"


def test_threads_spin_only_where_that_pays_beside_busy_threads_too(monkeypatch: pytest.MonkeyPatch) -> None:
    timings = {(1, False): BASE, (2, False): SLOWER, (2, True): timing(0.5, 1.0, x1=180.0)}
    assert kept(Machine(monkeypatch, timings).choose(2)) == (2, 1, True)
    timings[2, True] = timing(0.5, 2.0, x1=180.0)
    assert kept(Machine(monkeypatch, timings).choose(2)) == (1, 2, False)


def test_what_is_given_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = timing(0.5, 1.0, x1=180.0)
    machine = Machine(monkeypatch, {(1, False): BASE, (2, False): fast, (2, True): fast})
    assert kept(machine.choose(2, spinning=False)) == (2, 1, False)
    assert [one.way for one in machine.opened] == [(1, False), (2, False)]
    assert machine.at_once == [[1, 2], [1]]
    machine.opened.clear()
    assert kept(machine.choose(2, spinning=True)) == (2, 1, True)
    assert [one.way for one in machine.opened] == [(1, False), (2, True)]
    machine.opened.clear()
    assert kept(machine.choose(1)) == (1, 1, False) and len(machine.opened) == 1


def test_given_runs_at_once_are_those_that_threads_are_compared_by(monkeypatch: pytest.MonkeyPatch) -> None:
    timings = {way: Timing(1.0, 1.0, {5: 100.0}) for way in ((1, False), (2, False), (2, True))}
    machine = Machine(monkeypatch, timings)
    assert kept(machine.choose(2, instances=5)) == (1, 5, False)
    assert machine.at_once == [[5]] * 3


def test_nothing_more_is_opened_when_the_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = timing(0.5, 1.0, x1=180.0, x2=180.0)
    machine = Machine(monkeypatch, {(1, False): BASE, (2, False): fast})
    opening = machine.open

    def slowly(threads: int, spinning: bool) -> Any:
        machine.now += WHOLE_S
        return opening(threads, spinning)

    monkeypatch.setattr(machine, "open", slowly)
    choice = machine.choose(8)
    assert kept(choice) == (2, 1, False), "what takes long to open wins by threads, too"
    assert len(machine.opened) == 2 and choice.why.endswith(
        "4 threads were not tried after 1 s; spinning was not tried after 1 s"
    )


def test_another_opening_that_fails_is_no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, {(1, False): BASE})
    choice = machine.choose(2)
    assert kept(choice) == (1, 2, False)
    assert "; 2 threads: no opening with 2 threads; 2 spinning threads: no opening" in choice.why


def test_where_the_first_opening_cannot_run_none_is_left_open(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, {(1, False): BASE})

    def fails(*_: Any) -> Timing:
        raise EncoderError("no run")

    monkeypatch.setattr(measuring, "measure", fails)
    with pytest.raises(EncoderError, match="no run"):
        machine.choose(2)
    assert [one.closed for one in machine.opened] == [True]


# ------------------------------------------------------------------------------------------ real encoders


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bert(tmp_path_factory.mktemp("encoder") / "tiny")


def test_measuring_ends_in_time_however_slow_a_run_is(folder: Path) -> None:
    encoder = open_encoder(folder, num_threads=1)
    now = [0.0]

    def clock() -> float:
        now[0] += 100.0
        return now[0]

    runs = 0
    original = encoder.run

    def count(tokens: Any) -> Any:
        nonlocal runs
        runs += 1
        return original(tokens)

    encoder.run = count  # type: ignore[method-assign]
    found = measure(encoder, [1, 2], 2, encoder.split(["a text"] * 3), clock)
    assert (found.short_s, found.busy_s) == (100.0, 100.0)
    assert runs <= 7, "two to warm up, and one for each figure of each run"
    encoder.close()


def test_a_measured_encoder_says_how_it_runs_and_why(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "vecsvc.encoder")
    pool = EncoderPool(ServeSettings(), Metrics())
    encoder = pool.take(folder, "tiny")
    choice = encoder.choice
    assert choice.instances == encoder.batcher.settings.workers >= 1
    [record] = [record for record in caplog.records if record.message == "encoder opened"]
    assert record.data == {"encoder": "tiny", **dataclasses.asdict(choice)}  # type: ignore[attr-defined]
    pool.release(encoder, folder)


def test_runs_that_a_memory_ceiling_does_not_hold_are_left_out(folder: Path) -> None:
    encoder = open_encoder(folder, num_threads=1)
    original, inside, most = encoder.run, [0], [0]

    def bounded(tokens: Any) -> Any:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        try:
            if len(tokens) > 2 or inside[0] > 1:
                raise EncoderError("no memory")
            time.sleep(0.005)
            return original(tokens)
        finally:
            inside[0] -= 1

    encoder.run = bounded  # type: ignore[method-assign]
    batch = measuring._batch(encoder, time.perf_counter)
    assert 1 <= len(batch) <= 2
    found = measure(encoder, [1, 2, 4], 2, batch)
    assert list(found.texts_s) == [1] and most[0] == 2
    encoder.close()


def test_a_batch_that_texts_join_is_one_unless_told_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def noted(*arguments: Any, **given: Any) -> Any:
        asked.append(given["instances"])
        return open_fastest(*arguments, **given)

    monkeypatch.setattr("vecsvc.encoder_pool.open_fastest", noted)
    folder = write_tiny_cnn_lstm(tmp_path / "cells")
    pool = EncoderPool(ServeSettings(encoder_batching="cellular"), Metrics())
    encoder = pool.take(folder, "cells")
    assert isinstance(encoder.batcher.encoder, StepEncoder)
    assert encoder.choice.instances == 1 and asked == [1]
    pool.release(encoder, folder)


def test_given_threads_mean_one_run_at_a_time_unless_told_otherwise(folder: Path) -> None:
    for given, expected in [({}, (3, 1, False)), ({"encoder_instances": 2, "encoder_spinning": "on"}, (3, 2, True))]:
        pool = EncoderPool(ServeSettings(encoder_threads=3, **given), Metrics())
        encoder = pool.take(folder, "tiny")
        assert kept(encoder.choice) == expected and encoder.choice.why == "encoder_threads is given"
        pool.release(encoder, folder)


def test_workers_with_a_core_each_measure_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vecsvc.worker_places.usable_cores", lambda: 4)
    assert for_one(ServeSettings(workers=4)).encoder_threads == 1
    assert for_one(ServeSettings(workers=2)).encoder_threads == 0
    assert for_one(ServeSettings(workers=4, encoder_threads=3)).encoder_threads == 3
