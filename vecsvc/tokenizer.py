"""Text to checked, truncated token arrays: what a model reads, made from nothing but a tokenizer.json file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from vecsvc.errors import EncoderError, InvalidRequest

DEFAULT_MAX_TOKENS: Final = 256
MAX_TOKENS: Final = 8192  # the memory of attention grows with the square of this
MAX_TOKENIZER_BYTES: Final = 64 << 20
# Text beyond this cannot matter before a normal text's tokens are full, so a huge one costs no more than a long one.
MAX_CHARS_PER_TOKEN: Final = 256

TokenArray: TypeAlias = NDArray[np.int64]  # (n, t), C-contiguous

_ONES: Final[TokenArray] = np.ones((1, MAX_TOKENS), dtype=np.int64)
_ONES.flags.writeable = False


class Tokens(msgspec.Struct, frozen=True):
    """The tokens of one text, special tokens included."""

    ids: list[int]
    type_ids: list[int]
    truncated: bool = False  # True where the text was longer, and its end is not among these

    def __len__(self) -> int:
        return len(self.ids)


class TokenBatch(msgspec.Struct, frozen=True):
    """n texts, padded on the right to the longest of them."""

    ids: TokenArray
    mask: TokenArray  # 1 where there is a token, 0 where there is padding
    type_ids: TokenArray


class TextTokenizer:
    """Any number of threads may use one at once."""

    def __init__(self, file: Path, max_tokens: int | None = None, *, lower_case: bool = False) -> None:
        """Load a tokenizer.json; None cuts where the file says, else at 256 tokens. The network is never touched.

        Raises EncoderError, naming the file, where it is missing, too large or wrong, or where `max_tokens`
        leaves no room for a token beside the special ones.
        """
        tokenizer = _load(file)
        if max_tokens is None:
            max_tokens = (tokenizer.truncation or {}).get("max_length", DEFAULT_MAX_TOKENS)
        special = tokenizer.num_special_tokens_to_add(False)
        # tokenizers does not cut at all where the special tokens alone are more than the limit.
        if not special < max_tokens <= MAX_TOKENS:
            raise EncoderError(f"{file}: max_tokens must be between {special + 1} and {MAX_TOKENS}, got {max_tokens}")
        self.max_tokens: int = max_tokens
        self._lower_case = lower_case
        self._pad_id = _pad_id(tokenizer)
        tokenizer.no_padding()  # the file may say "to 128 tokens, always", which makes a short query ten times slower
        tokenizer.enable_truncation(max_tokens, stride=0, strategy="longest_first", direction="right")
        self._tokenizer = tokenizer

    def __call__(self, texts: Sequence[str]) -> TokenBatch:
        """The texts as arrays (n, t); t is at least 1. Raises InvalidRequest as `split` does."""
        return self.pad(self.split(texts))

    def split(self, texts: Sequence[str], *, prompt: str = "", first: int = 0) -> list[Tokens]:
        """The tokens of the prompt and each text, cut at `max_tokens`, special tokens included.

        Raises InvalidRequest for the first text that is none, counting from `first`.
        """
        for at, text in enumerate(texts):
            if not (isinstance(text, str) and text.isascii()):
                check_text(text, f"text {first + at}")
        longest = self.max_tokens * MAX_CHARS_PER_TOKEN
        whole = [prompt + text for text in texts] if prompt else texts
        checked = [text[:longest] for text in whole]
        if self._lower_case:
            checked = [text.lower() for text in checked]
        try:
            # The fast one leaves out where in the text each token stood.
            found = self._tokenizer.encode_batch_fast(checked)
        except Exception as error:  # tokenizers raises plain Exception
            raise EncoderError(f"the tokenizer failed on texts {first} to {first + len(texts) - 1}: {error}") from error
        return [
            Tokens(one.ids, one.type_ids, len(text) > longest or self._overflows(one))
            for one, text in zip(found, whole, strict=True)
        ]

    def last_token(self) -> tuple[str, int]:
        """The token with the greatest number, and that number; "" and 0 where there is none."""
        numbers: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        return max(numbers.items(), key=lambda entry: entry[1], default=("", 0))

    def _overflows(self, found: Any) -> bool:
        # What was cut off is copied when it is looked at, so only full texts are looked at.
        return len(found) == self.max_tokens and bool(found.overflowing)

    def pad(self, tokens: Sequence[Tokens]) -> TokenBatch:
        """Arrays (n, t), t the longest of the batch and at least 1.

        A text without any token, special or not, becomes one padding token that counts: it has a vector, too.
        """
        if len(tokens) == 1 and len(tokens[0]):
            # Most queries come alone. What runs between two runs of a model finds the caches full of weights, where
            # each call of numpy takes some ten times as long as it does in a loop.
            [one] = tokens
            ids, type_ids = np.array([one.ids], dtype=np.int64), np.array([one.type_ids], dtype=np.int64)
            return TokenBatch(ids, _ONES[:, : ids.shape[1]], type_ids)
        shape = (len(tokens), max((len(one) for one in tokens), default=0) or 1)
        batch = TokenBatch(
            np.full(shape, self._pad_id, dtype=np.int64),
            np.zeros(shape, dtype=np.int64),
            np.zeros(shape, dtype=np.int64),
        )
        for row, one in enumerate(tokens):
            batch.ids[row, : len(one)] = one.ids
            batch.mask[row, : len(one) or 1] = 1
            batch.type_ids[row, : len(one)] = one.type_ids
        return batch


def check_text(text: str, name: str = "text") -> str:
    """The text, if it is one: Python texts can hold half a UTF-16 pair, which no UTF-8 and no tokenizer can.

    Raises InvalidRequest that calls it `name` and says where the trouble is.
    """
    if not isinstance(text, str):
        raise InvalidRequest(f"{name} must be a text, got {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"{name} has a lone surrogate {text[error.start]!a} at character {error.start}: send valid Unicode"
        ) from error
    return text


def _load(file: Path) -> Any:
    try:
        if file.stat().st_size > MAX_TOKENIZER_BYTES:
            raise EncoderError(f"{file}: larger than {MAX_TOKENIZER_BYTES} bytes")
        data = file.read_bytes()
    except OSError as error:
        raise EncoderError(f"{file}: {error.strerror}") from error
    try:
        return Tokenizer.from_buffer(data)
    except Exception as error:
        raise EncoderError(f"{file}: is no tokenizer: {error}") from error


def _pad_id(tokenizer: Any) -> int:
    """What stands in the masked places. Any known token would do, for no model looks there."""
    if tokenizer.padding:
        return int(tokenizer.padding["pad_id"])
    for token in ("[PAD]", "<pad>"):
        found = tokenizer.token_to_id(token)
        if found is not None:
            return int(found)
    return 0
