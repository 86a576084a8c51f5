"""What every kind of encoder promises, whatever is inside: the same vectors however texts are put together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_bert import vocabulary, write_tiny_bert

from vecsvc.encoders.base import CANARY_TEXTS, Encoder, StepEncoder
from vecsvc.encoders.onnx import open_encoder
from vecsvc.errors import EncoderError, InvalidParameter, InvalidRequest

# Kind -> what writes a small one of it into a folder. Whoever adds a kind of encoder adds it here.
KINDS: dict[str, Callable[[Path], Path]] = {"bert": write_tiny_bert}
TOLERANCE = 1e-5


@pytest.fixture(scope="module", params=list(KINDS))
def encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Encoder]:
    opened = open_encoder(KINDS[request.param](tmp_path_factory.mktemp("contract") / request.param), num_threads=1)
    yield opened
    opened.close()


def texts(n: int, seed: int = 7) -> list[str]:
    """Texts of all lengths, some of them longer than the encoder reads."""
    random = np.random.default_rng(seed)
    words = [word for word in vocabulary() if word.isalpha()]
    return [" ".join(random.choice(words, random.geometric(0.1))) for _ in range(n)]


def test_splitting_and_running_is_encoding(encoder: Encoder) -> None:
    some = texts(20)
    for role in ("query", "passage"):
        np.testing.assert_allclose(encoder.run(encoder.split(some, role)), encoder.encode(some, role), atol=TOLERANCE)


def test_a_batch_is_its_singles_in_any_order(encoder: Encoder) -> None:
    some = texts(40)
    singles = np.concatenate([encoder.run(encoder.split([text])) for text in some])
    np.testing.assert_allclose(encoder.encode(some), singles, atol=TOLERANCE)
    order = np.random.default_rng(7).permutation(len(some))
    np.testing.assert_allclose(encoder.run(encoder.split([some[i] for i in order])), singles[order], atol=TOLERANCE)


def test_vectors_are_finite_float32_of_the_dim_that_the_spec_says(encoder: Encoder) -> None:
    found = encoder.encode(["", " ", "\x00", "東京 😀", *CANARY_TEXTS])
    assert found.dtype == np.float32 and found.shape == (4 + len(CANARY_TEXTS), encoder.spec.dim)
    assert np.isfinite(found).all() and len(encoder.spec.fingerprint) == 64
    for none in (encoder.encode([]), encoder.run([])):
        assert none.shape == (0, encoder.spec.dim) and none.dtype == np.float32


def test_tokens_say_whether_a_text_was_cut(encoder: Encoder) -> None:
    tokens = encoder.split(["fox", "fox " * 10_000, "x" * 5_000_000])
    assert [one.truncated for one in tokens][:2] == [False, True] and tokens[2].truncated
    assert all(1 <= len(one) <= encoder.spec.max_tokens for one in tokens)
    special = len(encoder.split([""])[0])
    room = encoder.spec.max_tokens - special
    full, over = encoder.split(["fox " * room, "fox " * (room + 1)])
    assert len(full) == len(over) == encoder.spec.max_tokens and not full.truncated and over.truncated


def test_threads_get_what_one_thread_gets(encoder: Encoder) -> None:
    batches = [encoder.split(texts(6, seed)) for seed in range(24)]
    expected = [encoder.run(batch) for batch in batches]
    with ThreadPoolExecutor(8) as pool:
        for found, serial in zip(pool.map(encoder.run, batches), expected, strict=True):
            np.testing.assert_allclose(found, serial, atol=TOLERANCE)


def test_bad_input_is_refused_by_name(encoder: Encoder) -> None:
    for use in (encoder.split, encoder.encode):
        call: Callable[..., Any] = use
        with pytest.raises(InvalidRequest, match="text 1 has a lone surrogate"):
            call(["fox", "\ud800"])
        with pytest.raises(InvalidRequest, match="text 0 must be a text, got int"):
            call([1])
        with pytest.raises(InvalidParameter, match="role must be one of query, passage, got 'document'"):
            call(["fox"], "document")


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_closed_encoder_says_so(kind: str, tmp_path: Path) -> None:
    encoder = open_encoder(KINDS[kind](tmp_path / kind), num_threads=1)
    tokens = encoder.split(["fox"])
    encoder.close()
    encoder.close()
    with pytest.raises(EncoderError, match="closed"):
        encoder.run(tokens)


def test_steps_give_what_runs_give(encoder: Encoder) -> None:
    if not isinstance(encoder, StepEncoder):
        pytest.skip("it has no steps")
    tokens = encoder.split(texts(30))
    expected = encoder.run(tokens)
    stepper, waiting, found = encoder.stepper(), list(enumerate(tokens)), {}
    dropped = 7
    while waiting or len(stepper):
        room = min(stepper.room(), 3)
        if room and waiting:
            stepper.join(waiting[:room])
            if dropped in [key for key, _ in waiting[:room]]:
                stepper.drop([dropped])
            del waiting[:room]
        found.update(stepper.step())
    assert sorted(found) == [key for key in range(len(tokens)) if key != dropped]
    for key, vector in found.items():
        np.testing.assert_allclose(vector, expected[key], atol=TOLERANCE)
