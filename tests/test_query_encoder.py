"""Encoders that serve: remembered vectors, sharing, memory, and what happens to one that is no good."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_bert import write_tiny_bert

from vecsvc.batcher import BatchSettings
from vecsvc.config import ServeSettings
from vecsvc.encoder_keeper import MAX_FAILURES
from vecsvc.encoder_pool import EncoderPool, PooledEncoder
from vecsvc.encoders.base import CANARY_TEXTS
from vecsvc.encoders.onnx import open_encoder
from vecsvc.errors import BackendMissing, EncoderError, InvalidParameter, NotReady
from vecsvc.onnx_session import SessionSettings, find_provider
from vecsvc.query_encoder import MAX_CACHED_CHARS, Encoded, QueryEncoder
from vecsvc.telemetry import Metrics
from vecsvc.tokenizer import Tokens

NAME = "tiny"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bert(tmp_path_factory.mktemp("encoder") / NAME)


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / NAME))


def ask(encoder: QueryEncoder, texts: Sequence[str], role: Any = "query", seconds: float = 20.0) -> Encoded:
    return asyncio.run(encoder.encode(texts, role, deadline=time.monotonic() + seconds))


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


# -------------------------------------------------------------------------------------------------- the cache


@pytest.fixture
def cached(folder: Path) -> Iterator[tuple[QueryEncoder, Metrics]]:
    metrics = Metrics()
    encoder = QueryEncoder(open_encoder(folder, num_threads=1), BatchSettings(), 3, metrics)
    yield encoder, metrics
    encoder.close()


def counts(metrics: Metrics) -> tuple[int, int]:
    return metrics.cache_hits(NAME).value, metrics.cache_misses(NAME).value


def test_a_remembered_query_is_the_same_vector_without_a_run(cached: tuple[QueryEncoder, Metrics]) -> None:
    encoder, metrics = cached
    first, again = ask(encoder, ["red fox"]), ask(encoder, ["red fox"])
    np.testing.assert_array_equal(first.vectors, again.vectors)
    assert counts(metrics) == (1, 1) and (first.tokens, first.truncated) == (again.tokens, again.truncated)
    assert metrics.encoder_tokens(NAME, "interactive").value == first.tokens[0]
    assert again.queue_s == 0
    mixed = ask(encoder, ["dog", "red fox", "cat"])
    singles = [ask(encoder, [text]).vectors[0] for text in ("dog", "red fox", "cat")]
    np.testing.assert_allclose(mixed.vectors, np.stack(singles), atol=1e-6)


def test_the_text_is_taken_exactly_and_the_role_counts(cached: tuple[QueryEncoder, Metrics]) -> None:
    encoder, metrics = cached
    for text in ("fox", "Fox", "fox "):
        ask(encoder, [text])
    assert counts(metrics) == (0, 3)
    ask(encoder, ["fox"], "passage")
    ask(encoder, ["fox"], "passage")
    assert counts(metrics) == (0, 3), "passages are not remembered"


def test_only_so_many_are_remembered_the_last_used_ones(cached: tuple[QueryEncoder, Metrics]) -> None:
    encoder, metrics = cached
    for text in ("a", "b", "c", "a", "d"):
        ask(encoder, [text])
    assert counts(metrics) == (1, 4)
    ask(encoder, ["a"])
    assert counts(metrics) == (2, 4)
    ask(encoder, ["b"])
    assert counts(metrics) == (2, 5)
    ask(encoder, ["x" * (MAX_CACHED_CHARS + 1)])
    ask(encoder, ["x" * (MAX_CACHED_CHARS + 1)])
    assert counts(metrics) == (2, 7), "long texts are not"


def test_0_remembers_nothing_and_counts_nothing(folder: Path) -> None:
    metrics = Metrics()
    encoder = QueryEncoder(open_encoder(folder, num_threads=1), BatchSettings(), 0, metrics)
    for _ in range(2):
        ask(encoder, ["fox"])
    assert counts(metrics) == (0, 0)
    assert metrics.encoder_tokens(NAME, "interactive").value == 6
    encoder.close()


def test_who_changes_an_answer_does_not_change_the_next_one(cached: tuple[QueryEncoder, Metrics]) -> None:
    encoder, _ = cached
    first = ask(encoder, ["fox", "dog"]).vectors
    kept = first.copy()
    first[:] = 0
    second = ask(encoder, ["fox", "dog"]).vectors
    np.testing.assert_array_equal(second, kept)
    second[:] = 0
    np.testing.assert_array_equal(ask(encoder, ["fox", "dog"]).vectors, kept)


# ------------------------------------------------------------------------------------------------------- texts


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("", False),
        (" \t\n", False),
        ("😀🎉👩‍👩‍👧", False),
        ("\x00", False),
        ("\x01\x02\x1b[31m\x7f", False),
        ("fox " * 250_000, True),
    ],
)
def test_every_text_has_a_finite_vector_and_a_cut_is_told(folder: Path, text: str, cut: bool) -> None:
    encoder = QueryEncoder(open_encoder(folder, num_threads=1), BatchSettings(), 0, Metrics())
    found = ask(encoder, [text])
    assert np.isfinite(found.vectors).all() and found.truncated == [cut]
    many = ask(encoder, ["fox", text, "dog"])
    np.testing.assert_allclose(many.vectors[1], found.vectors[0], atol=1e-5)
    assert many.truncated == [False, cut, False]
    encoder.close()


def test_many_texts_are_cut_into_runs_and_come_in_their_order(folder: Path) -> None:
    metrics = Metrics()
    encoder = QueryEncoder(open_encoder(folder, num_threads=1), BatchSettings(run_s=1e-6), 0, metrics)
    texts = [f"fox {i} " * (i % 9) for i in range(200)]
    found = ask(encoder, texts, "passage")
    np.testing.assert_allclose(found.vectors, encoder.encode_now(texts), atol=1e-5)
    sizes = metrics.encoder_batch(NAME, "bulk")
    assert sizes.total == 200 and sum(sizes.counts) > 10
    encoder.close()


# ----------------------------------------------------------------------------------------------------- sharing


def pool(**settings: Any) -> tuple[EncoderPool, Metrics]:
    metrics = Metrics()
    return EncoderPool(ServeSettings(**{"encoder_threads": 1, **settings}), metrics), metrics


def test_indexes_with_the_same_encoder_share_it_until_the_last_lets_go(folder: Path, copy: Path) -> None:
    encoders, _ = pool()
    first, second = encoders.take(folder, NAME), encoders.take(copy, NAME)
    assert first is second
    other = encoders.take(folder, "another name")
    assert other is not first and len(encoders.encoders()) == 2
    encoders.release(first, folder)
    ask(first, ["fox"])
    encoders.release(second, copy)
    with pytest.raises(NotReady, match="encoder 'tiny' was closed"):
        ask(first, ["dog"])
    assert encoders.encoders() == [other]
    encoders.release(other, folder)


def test_another_encoder_of_the_same_name_is_not_shared(folder: Path, tmp_path: Path) -> None:
    encoders, _ = pool()
    other = write_tiny_bert(tmp_path / NAME, seed=8)
    first, second = encoders.take(folder, NAME), encoders.take(other, NAME)
    assert first is not second
    encoders.release(first, folder)
    encoders.release(second, other)


# -------------------------------------------------------------------------------------------- what is no good


class Trouble:
    """Makes the runs of an opened encoder hang, fail or give other vectors."""

    def __init__(self, encoder: PooledEncoder) -> None:
        self.model = encoder.batcher.encoder
        self.original = self.model.run
        self.mode = ""
        self.gate = threading.Event()
        self.model.run = self.run  # type: ignore[method-assign]

    def run(self, tokens: Sequence[Tokens]) -> Any:
        if self.mode == "hang":
            assert self.gate.wait(30)
        if self.mode == "fail":
            raise RuntimeError("the device is gone")
        return self.original(tokens)


def fresh(encoder: PooledEncoder, trouble: Trouble) -> Callable[[], bool]:
    return lambda: not encoder.problem and encoder.batcher.encoder is not trouble.model


@pytest.mark.parametrize("instances", [1, 2])
def test_a_wedged_session_is_told_replaced_and_ready_again(folder: Path, instances: int) -> None:
    encoders, metrics = pool(encoder_stall_s=0.5, inline_ms=0, encoder_instances=instances)
    encoder = encoders.take(folder, NAME)
    before = ask(encoder, ["fox"]).vectors
    trouble = Trouble(encoder)
    trouble.mode = "hang"
    with pytest.raises(EncoderError, match=r"a run of encoder 'tiny' took longer than encoder_stall_s, 0.5 s"):
        ask(encoder, ["dog"])
    until(fresh(encoder, trouble))
    np.testing.assert_allclose(ask(encoder, ["fox "]).vectors, before, atol=1e-6)
    assert metrics.encoder_replaced(NAME).value == 1
    trouble.gate.set()  # the old run ends at last, and nobody takes what it gave
    ask(encoder, ["cat"])
    encoders.release(encoder, folder)


def test_runs_that_fail_again_and_again_lead_to_a_new_session(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    encoders, metrics = pool(encoder_stall_s=5.0, inline_ms=0, encoder_cache=0)
    encoder = encoders.take(folder, NAME)
    trouble = Trouble(encoder)
    trouble.mode = "fail"
    for _ in range(MAX_FAILURES):
        with pytest.raises(EncoderError, match=r"^encoder 'tiny' failed on this; the service's log says why$"):
            ask(encoder, ["dog"])
        assert "the device is gone" in caplog.records[-1].data["why"]  # type: ignore[attr-defined]
    until(fresh(encoder, trouble))
    assert ask(encoder, ["dog"]).vectors.shape == (1, 32)
    assert metrics.encoder_replaced(NAME).value == 1
    encoders.release(encoder, folder)


def test_failures_that_were_the_texts_fault_replace_nothing(folder: Path) -> None:
    encoders, metrics = pool(encoder_stall_s=0.4, inline_ms=0, encoder_cache=0)
    encoder = encoders.take(folder, NAME)
    encoder.batcher.failures = MAX_FAILURES
    until(lambda: encoder.batcher.failures == 0)
    assert not encoder.problem and metrics.encoder_replaced(NAME).value == 0
    encoders.release(encoder, folder)


def test_a_file_that_changed_is_not_given_to_a_native_library_again(copy: Path) -> None:
    encoders, _ = pool(encoder_stall_s=0.4, inline_ms=0)
    encoder = encoders.take(copy, NAME)
    trouble = Trouble(encoder)
    model = copy / "model.onnx"
    whole = model.read_bytes()
    model.write_bytes(whole[:-1] + b"\xff")
    trouble.mode = "hang"
    with pytest.raises(EncoderError):
        ask(encoder, ["dog"])
    until(lambda: "opening it anew failed" in encoder.problem)
    assert "model.onnx: is not the file that the encoder was opened with" in encoder.problem
    with pytest.raises(NotReady, match="took longer than encoder_stall_s"):
        ask(encoder, ["cat"])
    model.write_bytes(whole)
    until(fresh(encoder, trouble))
    ask(encoder, ["cat"])
    trouble.gate.set()
    encoders.release(encoder, copy)


# ------------------------------------------------------------------------------------------ devices and memory


def test_a_provider_is_named_as_onnxruntime_names_it_in_any_spelling() -> None:
    for name in ("cpu", "CPU", "CPUExecutionProvider"):
        assert find_provider(name) == "CPUExecutionProvider"
    with pytest.raises(BackendMissing, match=r"device 'openvino2' is not in this onnxruntime, which has .*cpu"):
        find_provider("openvino2")


@pytest.mark.parametrize("settings", [{"num_threads": -1}, {"num_threads": 1025}, {"memory_mb": 7}, {"memory_mb": -8}])
def test_session_settings_have_bounds(settings: dict[str, int]) -> None:
    with pytest.raises(InvalidParameter, match=f"{next(iter(settings))} must be"):
        SessionSettings(**settings)


def test_a_run_that_would_pass_the_memory_ceiling_fails_and_the_next_one_works(folder: Path) -> None:
    encoder = open_encoder(folder, num_threads=1, memory_mb=8)
    small = encoder.split(["vector search"])
    before = encoder.run(small)
    large = encoder.split(["fox " * 30] * 1000)
    with pytest.raises(EncoderError, match=r"onnxruntime failed on input_ids \(1000, 24\)"):
        encoder.run(large)
    np.testing.assert_array_equal(encoder.run(small), before)
    free = open_encoder(folder, num_threads=1)
    assert free.run(large).shape == (1000, 32), "the ceiling of one session is not another's"
    np.testing.assert_allclose(encoder.run(small), free.run(small), atol=1e-6)
    encoder.close()
    free.close()


def test_memory_stays_below_the_ceiling_whatever_is_asked(folder: Path) -> None:
    program = """
        import sys
        from pathlib import Path
        import numpy as np
        from vecsvc.encoders.onnx import open_encoder
        from vecsvc.errors import EncoderError

        def rss_mb():
            return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20

        encoder = open_encoder(Path(sys.argv[1]), num_threads=1, memory_mb=16)
        before, failed = rss_mb(), 0
        texts = encoder.split(["fox " * 30])
        for n in (10, 100, 1000, 2000, 10, 300, 2000, 50):
            try:
                encoder.run(texts * n)
            except EncoderError:
                failed += 1
        print(failed, rss_mb() - before)
    """
    out = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(folder)], capture_output=True, text=True, check=True
    ).stdout.split()
    assert int(out[0]) >= 2 and float(out[1]) < 16 + 24, out


def test_the_canaries_are_learnt_when_an_encoder_is_opened(folder: Path) -> None:
    encoders, _ = pool()
    encoder = encoders.take(folder, NAME)
    np.testing.assert_allclose(encoder.golden, encoder.encode_now(CANARY_TEXTS), atol=1e-6)
    assert encoder.batcher.times.single(4) is not None
    encoders.release(encoder, folder)
