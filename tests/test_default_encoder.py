"""The encoder that comes with the package is whole, small, and finds what plain English asks for."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from vecsvc.encoders import DEFAULT_FOLDER, default_encoder, encoder_path
from vecsvc.encoders.base import CANARY_TEXTS
from vecsvc.encoders.cellular import CellularEncoder, run_by_steps, with_cells
from vecsvc.encoders.folder import encoder_files
from vecsvc.encoders.onnx import OnnxEncoder, open_encoder

MAX_BYTES = 12_000_000

# A question, and the text that answers it; all other texts are wrong answers.
ASKED = {
    "how do I list the files of a directory": "Return a list containing the names of the entries in the folder.",
    "turn an object into json text": "Serialize a value to a JSON formatted string.",
    "wait for some seconds": "Suspend execution of the calling thread for the given number of seconds.",
    "remove a folder and everything in it": "Recursively delete a directory tree.",
    "what is the average of these numbers": "Return the arithmetic mean of the data.",
    "download a page from the web": "Open a URL and read the response over HTTP.",
    "make a password unreadable": "Derive a cryptographic hash of a secret with a salt.",
    "which day comes after today": "Represents a date; adding a timedelta gives a later day of the calendar.",
    "sort names alphabetically": "Return a new sorted list from the items of an iterable.",
    "compress a file": "Write data to a gzip archive.",
    "run a program and read what it prints": "Execute a child process and capture its standard output.",
    "pick one at random": "Choose a random element from a non-empty sequence.",
}


@pytest.fixture(scope="module")
def encoder() -> Iterator[OnnxEncoder]:
    encoder = open_encoder(default_encoder())
    yield encoder
    encoder.close()


def test_all_of_it_is_small_and_goes_into_the_package() -> None:
    files = [path for path in DEFAULT_FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MAX_BYTES
    assert {path.parent for path in files} == {DEFAULT_FOLDER}
    settings = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    assert settings["tool"]["setuptools"]["package-data"]["vecsvc.encoders.default"] == ["*"]
    assert set(encoder_files(DEFAULT_FOLDER)) < set(files)


def test_it_is_named_by_a_word_and_not_by_a_folder() -> None:
    assert encoder_path("default") == DEFAULT_FOLDER
    assert encoder_path("./default") == Path("default")


def test_its_card_says_what_it_was_made_from_and_how_good_it_is() -> None:
    card = (DEFAULT_FOLDER / "README.md").read_text()
    for word in ("all-MiniLM-L6-v2", "tldr-pages", "WordNet", "Apache-2.0", "CC BY 4.0", "recall@10"):
        assert word in card, word


def test_plain_questions_find_their_answers(encoder: OnnxEncoder) -> None:
    questions, answers = encoder.encode(list(ASKED), "query"), encoder.encode(list(ASKED.values()), "passage")
    scores = questions @ answers.T
    first = np.argmax(scores, axis=1) == np.arange(len(ASKED))
    assert first.sum() >= len(ASKED) - 3, [text for text, right in zip(ASKED, first, strict=True) if not right]


def test_vectors_have_unit_length_and_the_dimension_of_the_teacher(encoder: OnnxEncoder) -> None:
    vectors = encoder.encode([*CANARY_TEXTS, "", "🙂", "\x00", "ß" * 10_000])
    assert vectors.shape == (len(CANARY_TEXTS) + 4, 384)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-5)


def test_a_batch_gives_what_single_texts_give(encoder: OnnxEncoder) -> None:
    texts = [*ASKED, *ASKED.values()]
    singles = np.concatenate([encoder.encode([text]) for text in texts])
    np.testing.assert_allclose(encoder.encode(texts), singles, atol=1e-5)


def test_step_by_step_it_gives_the_same_vectors(encoder: OnnxEncoder) -> None:
    cellular = with_cells(open_encoder(default_encoder()), default_encoder())
    assert isinstance(cellular, CellularEncoder)
    tokens = cellular.split([*ASKED, *ASKED.values()])
    np.testing.assert_allclose(run_by_steps(cellular.stepper(), tokens), encoder.run(tokens), atol=1e-4)
    cellular.close()
