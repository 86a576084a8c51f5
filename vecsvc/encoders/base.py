"""What every encoder promises: texts in, vectors out, and a fingerprint that says which encoder it was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, Protocol, TypeAlias

import numpy as np

from vecsvc.errors import EncoderMismatch
from vecsvc.tokenizer import Tokens
from vecsvc.types import Vectors

Role: TypeAlias = Literal["query", "passage"]

# Encoded at build time and again before serving: an encoder that changed gives itself away here.
CANARY_TEXTS: Final = (
    "vector search",
    "How do I list the files of a folder?",
    "The quick brown fox jumps over the lazy dog.",
    "naïve café, 東京, 1e-3, <b>markup</b> & more",
)
# int8 models differ this much between processors; another model differs by far more.
CANARY_COSINE: Final = 0.999


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderSpec:
    """What an encoder is. Two encoders with one fingerprint have the same files and settings."""

    name: str
    fingerprint: str  # sha256 over the model, the tokenizer and every setting below
    dim: int
    pooling: str  # mean, cls, max, or none where the model pools itself
    normalize: bool
    max_tokens: int
    prompts: Mapping[str, str]  # role -> text put before each input


class Encoder(Protocol):
    """Any number of threads may encode at once."""

    spec: EncoderSpec

    def split(self, texts: Sequence[str], role: Role = "query") -> list[Tokens]:
        """The tokens of each text, checked, with the role's prompt before it, cut at `max_tokens`."""
        ...

    def encode(self, texts: Sequence[str], role: Role = "query") -> Vectors:
        """Vectors (n, dim) of the texts, each cut at `max_tokens`. An empty text has a vector too."""
        ...

    def close(self) -> None: ...


def check_canaries(name: str, found: Vectors, built_name: str, expected: Vectors) -> None:
    """Raise EncoderMismatch, naming both, unless the canary vectors (n, dim) agree."""
    if found.shape != expected.shape:
        raise EncoderMismatch(
            f"encoder {name!r} has dim {found.shape[1]}, "
            f"the index was built with {built_name!r} of dim {expected.shape[1]}"
        )
    norms = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
    cosines = np.divide(np.sum(found * expected, axis=1), norms, out=np.zeros(len(found)), where=norms > 0)
    if len(cosines) and float(cosines.min()) < CANARY_COSINE:
        raise EncoderMismatch(
            f"encoder {name!r} is not {built_name!r}, which the index was built with: "
            f"canary cosine {float(cosines.min()):.4f}, at least {CANARY_COSINE} expected"
        )
