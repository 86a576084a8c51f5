"""Texts that join and leave the running batch as they like get the vectors that a run of the whole model gives."""

from __future__ import annotations

import asyncio
import importlib
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tiny_cnn_lstm import cnn_lstm_weights, write_tiny_cnn_lstm

from index_builders.cnn_lstm_graph import BELOW_ALL, CELLS, CONFIG, MODEL, STATES, WEIGHTS, write_cnn_lstm
from vecsvc.batcher import Batcher, BatchSettings
from vecsvc.config import ServeSettings
from vecsvc.encoder_pool import EncoderPool
from vecsvc.encoder_workers import start_worker
from vecsvc.encoders import cellular
from vecsvc.encoders import folder as folder_module
from vecsvc.encoders.base import StepEncoder
from vecsvc.encoders.cellular import CellularEncoder, open_cells, with_cells
from vecsvc.encoders.folder import cell_files, encoder_files
from vecsvc.encoders.onnx import open_encoder
from vecsvc.errors import EncoderError, InvalidParameter
from vecsvc.lanes import LaneName
from vecsvc.onnx_session import SessionSettings
from vecsvc.telemetry import Metrics
from vecsvc.tokenizer import Tokens

MAX_TOKENS = 24
SETTINGS = SessionSettings(num_threads=1)


@pytest.fixture(scope="module", params=[2, 1], ids=["two-directions", "one-direction"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_cnn_lstm(tmp_path_factory.mktemp("encoder"), directions=request.param)


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The texts of these tests are so short that single ones would be done in one run."""
    monkeypatch.setattr(cellular, "FEW_STEPS", 1)


@pytest.fixture
def encoder(folder: Path) -> Iterator[CellularEncoder]:
    yield from opened(folder)


def opened(folder: Path, *, slots: int = 8, steps: int = 4) -> Iterator[CellularEncoder]:
    plain = open_encoder(folder, num_threads=1)
    encoder = with_cells(plain, folder, SETTINGS, slots=slots, steps=steps)
    assert isinstance(encoder, CellularEncoder)
    yield encoder
    encoder.close()


def texts(count: int, seed: int) -> list[Tokens]:
    """Random tokens; most texts are short, some as long as they may be."""
    random = np.random.default_rng(seed)
    lengths = np.minimum(random.geometric(0.15, count), MAX_TOKENS)
    return [Tokens(random.integers(1, 100, length).tolist(), [0] * int(length)) for length in lengths]


def check(encoder: CellularEncoder, tokens: list[Tokens], found: dict[int, np.ndarray]) -> None:
    for key, vector in found.items():
        np.testing.assert_allclose(vector, encoder.run([tokens[key]])[0], atol=1e-5, err_msg=f"text {key}")


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(("slots", "steps"), [(1, 1), (3, 4), (8, 16)])
def test_any_schedule_of_arrivals_gives_the_vectors_of_the_plain_run(
    folder: Path, slots: int, steps: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    for encoder in opened(folder, slots=slots, steps=steps):
        tokens = texts(40, seed)
        stepper = encoder.stepper()
        found: dict[int, np.ndarray] = {}
        arrived = joined = rounds = 0
        while len(found) < len(tokens):
            arrived = min(len(tokens), arrived + int(random.poisson(1.5)))
            new = list(range(joined, min(arrived, joined + stepper.room())))
            stepper.join([(key, tokens[key]) for key in new])
            joined += len(new)
            for key, vector in stepper.step():
                assert key not in found
                found[key] = vector
            assert len(stepper) == joined - len(found) and stepper.room() == slots - len(stepper)
            rounds += 1
            assert rounds < 40 * MAX_TOKENS * 2
        check(encoder, tokens, found)


def test_a_short_text_that_comes_later_is_ready_before_a_long_one(encoder: CellularEncoder) -> None:
    stepper = encoder.stepper()
    long, short = Tokens([5] * MAX_TOKENS, [0] * MAX_TOKENS), Tokens([6, 7], [0, 0])
    stepper.join([(1, long)])
    assert stepper.step() == []
    stepper.join([(2, short)])
    assert [key for key, _ in stepper.step()] == [2]
    order = [2]
    while len(stepper):
        order += [key for key, _ in stepper.step()]
    assert order == [2, 1]


def test_texts_that_are_dropped_leave_room_and_the_others_unharmed(encoder: CellularEncoder) -> None:
    tokens = texts(24, 5)
    stepper = encoder.stepper()
    stepper.join([(key, tokens[key]) for key in range(8)])
    stepper.drop([0, 1])  # before their first step
    assert stepper.room() == 2
    found = dict(stepper.step())
    inside = [key for key in range(2, 8) if key not in found]
    stepper.drop(inside[:2])  # between two steps
    gone = {0, 1, *inside[:2]}
    stepper.drop([99, *found])  # not inside: passed over
    joined = list(range(8, 8 + stepper.room()))
    stepper.join([(key, tokens[key]) for key in joined])
    while len(stepper):
        found |= dict(stepper.step())
    assert set(found) == {*range(8), *joined} - gone
    check(encoder, tokens, found)
    assert stepper.room() == 8


def test_more_texts_than_slots_are_refused_and_none_of_them_is_taken(encoder: CellularEncoder) -> None:
    stepper = encoder.stepper()
    tokens = texts(9, 3)
    with pytest.raises(InvalidParameter, match="9 texts cannot join, there is room for 8"):
        stepper.join(list(enumerate(tokens)))
    assert len(stepper) == 0
    stepper.join(list(enumerate(tokens[:8])))
    assert stepper.room() == 0
    with pytest.raises(InvalidParameter, match="there is room for 0"):
        stepper.join([(8, tokens[8])])


def test_a_text_that_is_too_long_or_has_a_key_that_is_inside_is_refused(encoder: CellularEncoder) -> None:
    stepper = encoder.stepper()
    with pytest.raises(InvalidParameter, match="25 tokens, the encoder takes 24"):
        stepper.join([(1, Tokens([1] * 25, [0] * 25))])
    stepper.join([(1, Tokens([1], [0]))])
    with pytest.raises(InvalidParameter, match="key 1 is inside already"):
        stepper.join([(1, Tokens([1], [0]))])


def test_a_text_without_any_token_has_the_vector_of_the_plain_run(encoder: CellularEncoder) -> None:
    tokens = [Tokens([], []), Tokens([4, 5], [0, 0])]
    stepper = encoder.stepper()
    stepper.join(list(enumerate(tokens)))
    found = dict(stepper.step())
    assert set(found) == {0, 1} and len(stepper) == 0
    check(encoder, tokens, found)


def test_an_error_harms_one_running_batch_and_no_other(folder: Path) -> None:
    for encoder in opened(folder):
        tokens = texts(4, 9)
        broken, sound = encoder.stepper(), encoder.stepper()
        broken.join([(0, Tokens([10_000], [0]))])  # no such word in the table
        sound.join(list(enumerate(tokens)))
        with pytest.raises(EncoderError, match=r"front\.onnx"):
            broken.step()
        found = {}
        while len(sound):
            found |= dict(sound.step())
        check(encoder, tokens, found)
        fresh = encoder.stepper()
        fresh.join([(0, tokens[0])])
        assert fresh.room() == 7


def test_many_texts_go_through_the_front_cell_in_bounded_runs(
    encoder: CellularEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cellular, "FRONT_TOKENS", 30)
    tokens = [Tokens([3] * MAX_TOKENS, [0] * MAX_TOKENS) for _ in range(3)]
    stepper = encoder.stepper()
    stepper.join(list(enumerate(tokens)))
    runs = []
    front = stepper._cells.front.run
    monkeypatch.setattr(
        stepper._cells.front, "run", lambda feed, names: runs.append(feed["input_ids"].shape) or front(feed, names)
    )
    found = {}
    while len(stepper):
        found |= dict(stepper.step())
    assert runs == [(1, MAX_TOKENS)] * 3
    check(encoder, tokens, found)


def test_a_large_model_takes_fewer_steps_at_a_time(encoder: CellularEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = texts(6, 4)
    counts = {}
    for work in (1, 10**9):
        monkeypatch.setattr(cellular, "STEP_WORK", work)
        stepper = encoder.stepper()
        stepper.join(list(enumerate(tokens)))
        found, counts[work] = {}, 0
        while len(stepper):
            found |= dict(stepper.step())
            counts[work] += 1
        check(encoder, tokens, found)
    assert counts[1] == max(len(one) for one in tokens) > counts[10**9]


def test_few_texts_take_more_steps_at_a_time(encoder: CellularEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cellular, "FEW_STEPS", 2 * MAX_TOKENS)
    tokens = [Tokens([5] * MAX_TOKENS, [0] * MAX_TOKENS), Tokens([6] * MAX_TOKENS, [0] * MAX_TOKENS)]
    stepper = encoder.stepper()
    stepper.join(list(enumerate(tokens)))
    found = dict(stepper.step())
    assert set(found) == {0, 1}
    check(encoder, tokens, found)


def test_models_for_long_texts_have_fewer_slots(encoder: CellularEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cellular, "MAX_FEATURE_BYTES", 3 * 4 * 12 * MAX_TOKENS)
    assert encoder.stepper().room() == 3
    monkeypatch.setattr(cellular, "MAX_FEATURE_BYTES", 1)
    assert encoder.stepper().room() == 1


def test_through_the_batcher_only_guilty_and_cancelled_requests_get_no_vectors(folder: Path) -> None:
    """Requests of both lanes come at random, some leave, some have a word that the table lacks."""

    async def request(batcher: Batcher, tokens: list[Tokens], lane: LaneName, wait_s: float) -> np.ndarray:
        await asyncio.sleep(wait_s)
        return (await batcher.encode(tokens, time.monotonic() + 60, lane)).vectors

    async def run(encoder: CellularEncoder) -> None:
        random = np.random.default_rng(11)
        batcher = Batcher(encoder, BatchSettings(inline_s=0.0, workers=2), start_worker)
        wanted = [texts(int(random.integers(1, 12)), seed) for seed in range(60)]
        for number in (20, 40):
            wanted[number][0] = Tokens([10_000], [0])
        lanes: list[LaneName] = ["bulk" if len(tokens) > 6 else "interactive" for tokens in wanted]
        tasks = [
            asyncio.create_task(request(batcher, tokens, lane, float(random.random()) / 20))
            for tokens, lane in zip(wanted, lanes, strict=True)
        ]
        await asyncio.sleep(0.02)
        for task in tasks[::7]:
            task.cancel()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        for number, (tokens, outcome) in enumerate(zip(wanted, found, strict=True)):
            if number in (20, 40):
                assert isinstance(outcome, EncoderError), number
            elif isinstance(outcome, np.ndarray):
                np.testing.assert_allclose(outcome, [encoder.run([one])[0] for one in tokens], atol=1e-5)
            else:
                assert isinstance(outcome, asyncio.CancelledError) and number % 7 == 0
        batcher.close()

    for encoder in opened(folder):
        asyncio.run(run(encoder))


@pytest.mark.parametrize("batching", ["padded", "cellular"])
def test_the_setting_chooses_how_the_service_runs_the_encoder(folder: Path, batching: str) -> None:
    pool = EncoderPool(ServeSettings(encoder_batching=batching, encoder_threads=1, inline_ms=0), Metrics())
    encoder = pool.take(folder, "tiny")
    assert isinstance(encoder.batcher.encoder, CellularEncoder) is (batching == "cellular")
    words = ["find text", "the quick brown fox jumps over the lazy dog", "", "list files"]
    found = asyncio.run(encoder.encode(words, deadline=time.monotonic() + 60))
    np.testing.assert_allclose(found.vectors, open_encoder(folder).encode(words), atol=1e-5)
    pool.release(encoder, folder)


def test_it_is_a_step_encoder_that_encodes_like_the_one_inside(encoder: CellularEncoder) -> None:
    assert isinstance(encoder, StepEncoder)
    texts = ["find text", "the quick brown fox"]
    assert np.array_equal(encoder.encode(texts), open_encoder(encoder._cells.front.path.parent).encode(texts))
    encoder.close()
    encoder.close()
    stepper = encoder.stepper()
    stepper.join([(1, Tokens([1], [0]))])
    with pytest.raises(EncoderError, match="closed"):
        stepper.step()


def test_the_benchmark_runs_every_query_once_in_each_way(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    bench = importlib.import_module("cellular")
    tokens = texts(50, 6)
    for encoder in opened(folder):
        for policy in (bench.Padded(encoder, 8), bench.Sorted(encoder, 64), bench.Cellular(encoder)):
            ready: list[int] = []
            for start in (0, 20):
                for key in range(start, start + 20 + start // 2):
                    policy.add(key, tokens[key])
                ready += policy.turn()
            while len(policy):
                ready += policy.turn()
            assert sorted(ready) == list(range(50))
        found = bench.latencies(bench.Cellular(encoder), tokens, np.linspace(0, 0.05, 50))
        assert (found > 0).all()


@pytest.mark.parametrize(("slots", "steps"), [(0, 8), (1025, 8), (8, 0), (8, 65)])
def test_slots_and_steps_have_bounds(folder: Path, slots: int, steps: int) -> None:
    with pytest.raises(InvalidParameter, match="must be between 1 and"):
        next(opened(folder, slots=slots, steps=steps))


def test_the_writer_and_the_reader_of_cells_agree() -> None:
    assert tuple(CELLS) == folder_module.CELLS
    assert len(STATES) == cellular._STATES and STATES[cellular._MAX] == "max" and BELOW_ALL == cellular._BELOW_ALL


def test_the_cells_belong_to_the_encoder_and_to_its_fingerprint(folder: Path, tmp_path: Path) -> None:
    names = [MODEL, *CELLS.values(), WEIGHTS, "tokenizer.json", "sentence_bert_config.json", CONFIG]
    assert encoder_files(folder) == [folder / name for name in names]
    copy = shutil.copytree(folder, tmp_path / folder.name)
    before = open_encoder(copy).spec.fingerprint
    assert before == open_encoder(folder).spec.fingerprint
    (copy / "step.onnx").write_bytes((copy / "step.onnx").read_bytes().replace(b"cnn_lstm_step", b"cnn_lstm_stop"))
    assert open_encoder(copy).spec.fingerprint != before


def test_a_folder_without_cells_gives_its_encoder_as_it_is(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "encoder.json").unlink()
    encoder = open_encoder(copy)
    assert with_cells(encoder, copy) is encoder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"front": "missing.onnx"}, "there is no file 'missing.onnx' beside it, the cell front"),
        ({"front": "../front.onnx"}, "there is no file '../front.onnx' beside it"),
        ({"front": 3}, "there is no file 3 beside it"),
        ({"other": "front.onnx"}, "cells are front, head, other, step, not front, step, head"),
        ({"step": "front.onnx"}, r"front\.onnx: is no cell: expected states of 3 dimensions"),
        ({"head": "model.onnx"}, r"model\.onnx: is no cell: its inputs are input_ids, attention_mask; expected count"),
    ],
)
def test_cells_that_are_none_are_named(folder: Path, tmp_path: Path, change: dict[str, object], message: str) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "encoder.json").write_text(json.dumps({"cells": {**CELLS, **change}}))
    with pytest.raises(EncoderError, match=message):
        with_cells(open_encoder(folder), copy)


def test_cells_of_another_size_are_named(folder: Path, tmp_path: Path) -> None:
    write_cnn_lstm(tmp_path, cnn_lstm_weights(100, 16, 12, 6, 20))
    files = {**cell_files(folder), "step": tmp_path / CELLS["step"]}
    with pytest.raises(EncoderError, match=r"head\.onnx: states is .*, axis . must be"):
        open_cells(files)


def test_cells_of_other_weights_are_refused_by_their_vectors(folder: Path, tmp_path: Path) -> None:
    directions = 2 if "x_backward" in (folder / "step.onnx").read_bytes().decode("latin-1") else 1
    other = write_tiny_cnn_lstm(tmp_path / "other", directions=directions, seed=8)
    with pytest.raises(EncoderError, match="its cells give other vectors than its model"):
        with_cells(open_encoder(folder), other)


def test_weights_outside_the_folder_are_refused(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    step = (copy / "step.onnx").read_bytes()
    (copy / "step.onnx").write_bytes(step.replace(b"weights.bin", b"../some.bin"))
    with pytest.raises(EncoderError, match="must lie in a file beside the model"):
        encoder_files(copy)
