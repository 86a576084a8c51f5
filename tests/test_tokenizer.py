"""What text becomes before a model reads it."""

from __future__ import annotations

import json
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from tiny_bert import tiny_tokenizer, vocabulary
from tokenizers import Tokenizer, models, pre_tokenizers

from vecsvc import tokenizer as module
from vecsvc.errors import EncoderError, InvalidRequest
from vecsvc.tokenizer import MAX_TOKENS, TextTokenizer, check_text

PAD, UNK, CLS, SEP = 0, 1, 2, 3


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tiny_tokenizer().save(str(path))
    return path


@pytest.fixture(scope="module")
def tokenizer(file: Path) -> TextTokenizer:
    return TextTokenizer(file, 16)


def test_batch_is_padded_to_its_longest_text_whatever_the_file_says(file: Path, tokenizer: TextTokenizer) -> None:
    assert json.loads(file.read_text())["padding"]["strategy"] == {"Fixed": 128}
    word = vocabulary()
    batch = tokenizer(["vector search", "fox"])
    assert batch.ids.tolist() == [[CLS, word["vector"], word["search"], SEP], [CLS, word["fox"], SEP, PAD]]
    assert batch.mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert not batch.type_ids.any()
    for array in (batch.ids, batch.mask, batch.type_ids):
        assert array.dtype == np.int64
        assert array.shape == (2, 4)
        assert array.flags.c_contiguous


def test_max_tokens_counts_the_special_tokens(tokenizer: TextTokenizer) -> None:
    batch = tokenizer(["fox " * 14, "fox " * 15, "fox " * 1000])
    assert batch.ids.shape == (3, 16)
    assert (batch.ids == batch.ids[0]).all()
    assert batch.ids[0, -1] == SEP


def test_without_max_tokens_the_file_decides_and_else_256(file: Path, tmp_path: Path) -> None:
    assert TextTokenizer(file).max_tokens == 12
    free = tiny_tokenizer()
    free.no_truncation()
    free.save(str(tmp_path / "free.json"))
    assert TextTokenizer(tmp_path / "free.json").max_tokens == 256


def test_no_texts_and_empty_texts_have_arrays(tokenizer: TextTokenizer) -> None:
    assert tokenizer([]).ids.shape == (0, 1)
    assert tokenizer([""]).ids.tolist() == [[CLS, SEP]]


def test_a_text_without_tokens_keeps_one_that_counts(tmp_path: Path) -> None:
    bare = Tokenizer(models.WordPiece({"[UNK]": 0, "<pad>": 1, "fox": 2}, unk_token="[UNK]"))
    bare.pre_tokenizer = pre_tokenizers.Whitespace()
    bare.save(str(tmp_path / "bare.json"))
    batch = TextTokenizer(tmp_path / "bare.json")(["", "fox fox"])
    assert batch.ids.tolist() == [[1, 1], [2, 2]]
    assert batch.mask.tolist() == [[1, 0], [1, 1]]


def test_prompt_stands_before_each_text(tokenizer: TextTokenizer) -> None:
    with_prompt = tokenizer.split(["fox", ""], prompt="query: ")
    assert with_prompt == tokenizer.split(["query: fox", "query: "])


def test_lower_case_is_applied_where_the_settings_say_so(tmp_path: Path) -> None:
    cased = tiny_tokenizer()
    cased.normalizer = None
    cased.save(str(tmp_path / "cased.json"))
    assert UNK in TextTokenizer(tmp_path / "cased.json")(["FOX"]).ids
    assert UNK not in TextTokenizer(tmp_path / "cased.json", lower_case=True)(["FOX"]).ids


def test_lone_surrogate_is_refused_by_position_and_character(tokenizer: TextTokenizer) -> None:
    with pytest.raises(InvalidRequest, match=r"text 11 has a lone surrogate '\\ud83d' at character 4"):
        tokenizer.split(["fox", "fox \ud83d"], first=10)
    with pytest.raises(InvalidRequest, match="query has a lone surrogate"):
        check_text("\udfff", "query")
    assert check_text("a whole pair is fine: 😀")


def test_what_is_no_text_is_refused(tokenizer: TextTokenizer) -> None:
    with pytest.raises(InvalidRequest, match="text 1 must be a text, got NoneType"):
        tokenizer(["fox", None])  # type: ignore[list-item]


@pytest.mark.parametrize("text", ["\x00", "fox\x00fox", "\x01\x7f\u200b\ufeff", "\U0010ffff", "é\u0301" * 50, "\u202e"])
def test_strange_characters_are_tokens_like_others(tokenizer: TextTokenizer, text: str) -> None:
    assert 2 <= tokenizer([text]).ids.shape[1] <= 16


def test_a_huge_text_is_cut_before_it_is_tokenised(tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (tokenizer(["fox " * 5_000_000]).ids == tokenizer(["fox " * 20]).ids).all()
    monkeypatch.setattr(module, "MAX_CHARS_PER_TOKEN", 1)
    assert tokenizer(["fox " * 100]).ids.tolist() == tokenizer(["fox " * 4]).ids.tolist()


def test_max_tokens_needs_room_beside_the_special_tokens(file: Path) -> None:
    assert TextTokenizer(file, 3)(["fox fox"]).ids.shape == (1, 3)
    for bad in (2, 0, -1, MAX_TOKENS + 1):
        with pytest.raises(EncoderError, match=f"max_tokens must be between 3 and {MAX_TOKENS}, got {bad}"):
            TextTokenizer(file, bad)


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b"{'model'", b"\xff\xfe\x00", b'{"version": "1.0", "model": 3}']
)
def test_a_broken_file_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(EncoderError, match=r"tokenizer\.json: is no tokenizer: .+"):
        TextTokenizer(tmp_path / "tokenizer.json")


def test_a_missing_or_too_large_file_is_refused_by_name(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(EncoderError, match=r"none\.json: No such file"):
        TextTokenizer(tmp_path / "none.json")
    monkeypatch.setattr(module, "MAX_TOKENIZER_BYTES", 100)
    with pytest.raises(EncoderError, match=r"tokenizer\.json: larger than 100 bytes"):
        TextTokenizer(file)


def test_the_network_is_never_touched(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert TextTokenizer(file)(["fox"]).ids.shape == (1, 3)


def test_threads_get_what_one_thread_gets(tokenizer: TextTokenizer) -> None:
    texts = ["fox " * (i % 20) for i in range(64)]
    expected = [tokenizer([text]).ids.tolist() for text in texts]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda text: tokenizer([text]).ids.tolist(), texts)) == expected
