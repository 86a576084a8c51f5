"""What every encoder promises: texts in, vectors out, and a fingerprint that says which encoder it was.

`Encoder` is enough for the batcher: it gathers waiting texts into runs of the model, one after the other. A recurrent
encoder may also be a `StepEncoder`: then texts join and leave its running batch between steps. Either way the batcher
keeps the queues, lanes, deadlines, cancellations and errors; an encoder knows nothing of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from vecsvc.errors import EncoderError, EncoderMismatch
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
# Between these a sum of squares in float32 is neither too coarse nor too large.
_SQUARES: Final = (1e-30, 1e38)


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
    """Any number of threads may use one at once."""

    spec: EncoderSpec

    def split(self, texts: Sequence[str], role: Role = "query") -> list[Tokens]:
        """The tokens of each text: checked, with the role's prompt before it, cut at `max_tokens`.

        Raises InvalidRequest, naming the text by its position, where one is no valid Unicode.
        """
        ...

    def run(self, tokens: Sequence[Tokens]) -> Vectors:
        """Vectors (n, dim), in order, by one run of the model; the caller bounds and sorts what goes into it.

        Raises EncoderError where the model fails or was closed.
        """
        ...

    def encode(self, texts: Sequence[str], role: Role = "query") -> Vectors:
        """Vectors (n, dim) of any number of texts, in order, by as many runs as it takes: the way of a build.

        An empty text has a vector too.
        """
        ...

    def close(self) -> None:
        """Runs under way end well, later ones raise EncoderError. May be called twice."""
        ...


class Stepper(Protocol):
    """A running batch that texts join and leave between steps. It belongs to one thread.

    The batcher calls it in this order, again and again: `drop` for texts whose callers went away, `join` for waiting
    texts while `room` allows, `step`. Keys are the batcher's, and mean nothing here. After an error of `join` or
    `step` the batcher throws the stepper away, asks the encoder for a fresh one, and runs the texts again elsewhere.
    """

    def room(self) -> int:
        """How many texts may join now; with none inside it is at least 1."""
        ...

    def join(self, texts: Sequence[tuple[int, Tokens]]) -> None:
        """Take in texts, at most `room()` of them, each under a key that no text inside has."""
        ...

    def drop(self, keys: Sequence[int]) -> None:
        """Let texts go whose vectors nobody waits for any more."""
        ...

    def step(self) -> list[tuple[int, NDArray[np.float32]]]:
        """Do some milliseconds of work at most; the key and the vector (dim,) of each text that got ready.

        With texts inside, a bounded number of steps makes each of them ready.
        """
        ...

    def __len__(self) -> int:
        """How many texts are inside."""
        ...


@runtime_checkable
class StepEncoder(Encoder, Protocol):
    """An encoder whose batch runs step by step. Its `run` is used where there is but one text, and gives the same."""

    def stepper(self) -> Stepper:
        """A new, empty running batch; several may be in use at once, each by a thread of its own."""
        ...


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
            f"canary cosine {float(cosines.min()):.4f}, at least {CANARY_COSINE} expected; leave out --encoder for the "
            "index's own, or build the index with this one"
        )


def unit_length(vectors: Vectors) -> Vectors:
    """The vectors (n, dim) at length 1; a zero vector stays zero."""
    if len(vectors) == 1:  # as most queries come; see TextTokenizer.pad
        square = float(np.vdot(vectors, vectors))
        if _SQUARES[0] < square < _SQUARES[1]:
            one: Vectors = vectors / math.sqrt(square)
            return one
    norms = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    unit: Vectors = np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0, casting="same_kind")
    return unit


def run_checked(encoder: Encoder, tokens: Sequence[Tokens]) -> Vectors:
    """One run for somebody elsewhere, whose errors are EncoderErrors whatever the encoder is made of.

    Where a model lies, and what the library that runs it says, is for the log: callers are told only to look there,
    and whoever calls this finds it in the error's cause.
    """
    name = encoder.spec.name
    try:
        vectors = encoder.run(tokens)
    except Exception as error:
        raise EncoderError(f"encoder {name!r} failed on this; the service's log says why") from error
    if vectors.shape != (len(tokens), encoder.spec.dim):
        raise EncoderError(f"encoder {name!r} gave {vectors.shape}, expected {(len(tokens), encoder.spec.dim)}")
    return vectors
