"""Runs a CNN-LSTM cell by cell, so that texts join and leave the batch between steps instead of awaiting the longest.

Cellular batching: Gao et al., "Low latency RNN inference with cellular batching", EuroSys 2018. There are three kinds
of cell, each a model of its own over the encoder's one file of weights (`index_builders/cnn_lstm_graph.py` writes
them, and says what goes in and out):

front   the table and the convolution; once a text, for several texts one behind the other, so nothing is padded
step    some steps of the LSTM, in both directions at once, for all texts inside; again and again
head    from the sums and maxima of the hidden values to the vector; once a text, as soon as its last step is done

The backward direction is an LSTM that reads the text from its end. It needs as many steps as the forward one, so one
run of the step cell does both, and a text has one position. A text is in a slot: a row of each array that follows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from vecsvc.encoders.base import CANARY_TEXTS, Encoder, EncoderSpec, Role, Stepper, unit_length
from vecsvc.encoders.folder import CELLS, cell_files
from vecsvc.errors import EncoderError, InvalidParameter
from vecsvc.onnx_session import OnnxSession, Port, SessionSettings
from vecsvc.tokenizer import Tokens
from vecsvc.types import Vectors

DEFAULT_SLOTS: Final = 32  # more texts share a run: cheaper steps up to a point, but each run takes longer
MAX_SLOTS: Final = 1024
DEFAULT_STEPS: Final = 8  # of the LSTM in one run: more costs fewer runs, but who arrives waits longer
MAX_STEPS: Final = 64
# Fewer steps than this would cost more to call than to compute.
MIN_STEPS: Final = 4
# Steps of all texts together that one run may do in any case: few texts take more steps each, for fewer runs.
FEW_STEPS: Final = 32
# Tokens in one run of the front cell, so that it does not hold up the steps of the texts inside.
FRONT_TOKENS: Final = 512
# Multiplications in one run of the step cell, some milliseconds of one core: large models take fewer steps at a time.
STEP_WORK: Final = 100_000_000
# What the texts inside keep of the front cell; models for long texts have fewer slots.
MAX_FEATURE_BYTES: Final = 64 << 20

# Largest difference to the model's vectors, of unit length, that the order of summation may make.
CELLS_TOLERANCE: Final = 1e-3

# Of each direction a slot keeps h and c of the last step, and the sum and the maximum of h so far, in this order.
_STATES: Final = 4
_MAX: Final = 3
_BELOW_ALL: Final = np.float32(-4)  # hidden values lie between -1 and 1: no maximum is found here


@dataclass(frozen=True, slots=True)
class Cells:
    """The opened cells. Any number of threads may run them at once."""

    front: OnnxSession
    step: OnnxSession
    head: OnnxSession
    directions: int  # 1 or 2
    channels: int  # C, what a step reads of a token
    hidden: int  # H, hidden values in each direction
    table: int  # D, width of the sum that goes past the steps
    dim: int  # E, of the vectors

    def close(self) -> None:
        for session in (self.front, self.step, self.head):
            session.close()


class CellularEncoder:
    """A `StepEncoder`: the encoder itself, and running batches that give the same vectors."""

    spec: EncoderSpec

    def __init__(
        self, encoder: Encoder, cells: Cells, *, slots: int = DEFAULT_SLOTS, steps: int = DEFAULT_STEPS
    ) -> None:
        """At most `slots` texts are inside a running batch; one run does at most `steps` steps of each of many."""
        if not 1 <= slots <= MAX_SLOTS:
            raise InvalidParameter(f"slots must be between 1 and {MAX_SLOTS}, got {slots}")
        if not 1 <= steps <= MAX_STEPS:
            raise InvalidParameter(f"steps must be between 1 and {MAX_STEPS}, got {steps}")
        if not encoder.spec.dim <= cells.dim:
            raise EncoderError(f"{cells.head.path}: gives {cells.dim} values, the encoder {encoder.spec.dim}")
        self.spec = encoder.spec
        self._encoder = encoder
        self._cells = cells
        self._slots = slots
        self._steps = steps

    def split(self, texts: Sequence[str], role: Role = "query") -> list[Tokens]:
        return self._encoder.split(texts, role)

    def run(self, tokens: Sequence[Tokens]) -> Vectors:
        return self._encoder.run(tokens)

    def encode(self, texts: Sequence[str], role: Role = "query") -> Vectors:
        return self._encoder.encode(texts, role)

    def stepper(self) -> CnnLstmStepper:
        return CnnLstmStepper(self._encoder, self._cells, slots=self._slots, steps=self._steps)

    def close(self) -> None:
        self._encoder.close()
        self._cells.close()


class CnnLstmStepper:
    """A running batch; see `Stepper`. It belongs to one thread."""

    def __init__(self, encoder: Encoder, cells: Cells, *, slots: int, steps: int) -> None:
        self._encoder = encoder
        self._cells = cells
        self._steps = steps
        self._max_tokens = encoder.spec.max_tokens
        self._slots = max(1, min(slots, MAX_FEATURE_BYTES // (4 * cells.channels * self._max_tokens)))
        # What a run reads beyond a text's end is not used, but it must be numbers.
        self._features = np.zeros((self._slots * self._max_tokens, cells.channels), dtype=np.float32)
        self._states = np.zeros((_STATES * cells.directions, self._slots, cells.hidden), dtype=np.float32)
        self._sums = np.zeros((self._slots, cells.table), dtype=np.float32)
        self._length = np.zeros(self._slots, dtype=np.intp)
        self._done = np.zeros(self._slots, dtype=np.intp)  # steps; the text is ready where they are its length
        self._free = list(range(self._slots))
        self._waiting: dict[int, Tokens] = {}  # by key, in the order in which they joined: the front cell is next
        self._running: dict[int, int] = {}  # key -> slot
        self._work = cells.directions * 4 * cells.hidden * (cells.channels + cells.hidden)  # of one step of a text

    def __len__(self) -> int:
        return len(self._waiting) + len(self._running)

    def room(self) -> int:
        return self._slots - len(self)

    def join(self, texts: Sequence[tuple[int, Tokens]]) -> None:
        if len(texts) > self.room():
            raise InvalidParameter(f"{len(texts)} texts cannot join, there is room for {self.room()}")
        for key, tokens in texts:
            if len(tokens) > self._max_tokens:
                raise InvalidParameter(f"a text has {len(tokens)} tokens, the encoder takes {self._max_tokens}")
            if key in self._waiting or key in self._running:
                raise InvalidParameter(f"key {key} is inside already")
            self._waiting[key] = tokens

    def drop(self, keys: Sequence[int]) -> None:
        """Keys that are not inside are passed over: their texts just got ready."""
        for key in keys:
            if self._waiting.pop(key, None) is None and key in self._running:
                self._free.append(self._running.pop(key))

    def step(self) -> list[tuple[int, NDArray[np.float32]]]:
        """One run of each cell at most: the front cell for texts that wait, some steps of all, heads of the ready."""
        ready = self._start()
        if not self._running:
            return ready
        keys = list(self._running)
        slots = np.fromiter(self._running.values(), dtype=np.intp, count=len(keys))
        self._advance(slots)
        done = np.flatnonzero(self._done[slots] == self._length[slots])
        if len(done):
            vectors = self._finish(slots[done])
            for place, vector in zip(done, vectors, strict=True):
                key = keys[place]
                self._free.append(self._running.pop(key))
                ready.append((key, vector))
        return ready

    def _start(self) -> list[tuple[int, NDArray[np.float32]]]:
        """Texts that wait go through the front cell into slots; those without any token are ready at once."""
        batch: dict[int, Tokens] = {}
        ready: list[tuple[int, NDArray[np.float32]]] = []
        total = -1
        for key, tokens in self._waiting.items():
            if not len(tokens):
                # Its one token is padding, which only the encoder knows, and no tokenizer of ours makes such texts.
                ready.append((key, self._encoder.run([tokens])[0]))
            elif batch and total + 1 + len(tokens) > FRONT_TOKENS:
                break
            else:
                batch[key] = tokens
                total += 1 + len(tokens)
        for key in (*batch, *(key for key, _ in ready)):
            del self._waiting[key]
        if batch:
            self._run_front(batch, total)
        return ready

    def _run_front(self, batch: Mapping[int, Tokens], total: int) -> None:
        ids = np.zeros((1, total), dtype=np.int64)
        mask = np.zeros((1, total), dtype=np.int64)
        members = np.zeros((len(batch), total), dtype=np.float32)
        places = []
        start = 0
        for row, tokens in enumerate(batch.values()):
            place = slice(start, start + len(tokens))
            ids[0, place], mask[0, place], members[row, place] = tokens.ids, 1, 1
            places.append(place)
            start = place.stop + 1  # one masked token stands between two texts
        feed: dict[str, NDArray[Any]] = {"input_ids": ids, "attention_mask": mask, "members": members}
        features, sums = self._cells.front.run(feed, ["features", "sums"])
        slots = [self._free.pop() for _ in batch]
        self._sums[slots] = sums
        self._states[:, slots] = 0
        self._states[_MAX::_STATES, slots] = _BELOW_ALL
        self._done[slots] = 0
        for (key, tokens), slot, place in zip(batch.items(), slots, places, strict=True):
            first = slot * self._max_tokens
            self._features[first : first + len(tokens)] = features[place]
            self._length[slot] = len(tokens)
            self._running[key] = slot

    def _advance(self, slots: NDArray[np.intp]) -> None:
        """Some steps of the texts in the slots (n,)."""
        done, length, first = self._done[slots], self._length[slots], slots * self._max_tokens
        left = length - done
        ahead = np.arange(self._choose_steps(left))[:, None]
        counts = np.minimum(left, len(ahead)).astype(np.int32)
        below = np.where(ahead < counts, np.float32(0), _BELOW_ALL)[:, None, :, None]
        feed: dict[str, NDArray[Any]] = {
            # Beyond a text's end is another's, and beyond the array its last row: not used either way.
            "x_forward": self._features.take(first + done + ahead, axis=0, mode="clip"),
            "lengths": counts,
            "below": below,
            "states": self._states.take(slots, axis=1),
        }
        if self._cells.directions == 2:
            feed["x_backward"] = self._features.take(first + left - 1 - ahead, axis=0, mode="clip")
        [states] = self._cells.step.run(feed, ["states_after"])
        self._states[:, slots] = states
        self._done[slots] = done + counts

    def _choose_steps(self, left: NDArray[np.intp]) -> int:
        """Steps of the next run, of texts that have `left` (n,) to go: until the first of them is ready."""
        most = max(self._steps, FEW_STEPS // len(left))
        steps = min(max(int(left.min()), MIN_STEPS), int(left.max()), most)
        return max(1, min(steps, STEP_WORK // (self._work * len(left))))

    def _finish(self, slots: NDArray[np.intp]) -> Vectors:
        """The vectors (n, dim) of the texts in the slots (n,), whose steps are all done."""
        feed = {
            "sums": self._sums[slots],
            "count": self._length[slots].astype(np.float32)[:, None],
            "states": self._states.take(slots, axis=1),
        }
        [output] = self._cells.head.run(feed, ["sentence_embedding"])
        if not np.isfinite(output).all():
            raise EncoderError(f"{self._cells.head.path}: gave values that are not finite")
        spec = self._encoder.spec
        vectors: Vectors = output[:, : spec.dim]
        return unit_length(vectors) if spec.normalize else vectors


def with_cells(
    encoder: Encoder,
    folder: Path,
    settings: SessionSettings | None = None,
    *,
    slots: int = DEFAULT_SLOTS,
    steps: int = DEFAULT_STEPS,
) -> Encoder:
    """The encoder of this folder as a `StepEncoder`, or as it is where the folder has no cells.

    Raises EncoderError, naming the file, where a cell is missing or is none, and where the cells give other vectors
    than the model: canary texts go through both.
    """
    files = cell_files(folder)
    if not files:
        return encoder
    cellular = CellularEncoder(encoder, open_cells(files, settings), slots=slots, steps=steps)
    canaries = encoder.split(CANARY_TEXTS)
    worst = float(np.abs(run_by_steps(cellular.stepper(), canaries) - encoder.run(canaries)).max())
    if not worst <= CELLS_TOLERANCE:
        raise EncoderError(
            f"{folder}: its cells give other vectors than its model, by {worst:.1e}; at most {CELLS_TOLERANCE:.0e} "
            "is rounding: write all of them anew from the same weights"
        )
    return cellular


def run_by_steps(stepper: Stepper, tokens: Sequence[Tokens]) -> Vectors:
    """The vectors (n, dim) of at least one text, in order, by a running batch that nobody else uses."""
    found: dict[int, NDArray[np.float32]] = {}
    come = 0
    while len(found) < len(tokens):
        joining = range(come, min(len(tokens), come + stepper.room()))
        stepper.join([(key, tokens[key]) for key in joining])
        come += len(joining)
        found |= dict(stepper.step())
    return np.stack([found[key] for key in range(len(tokens))])


def open_cells(files: Mapping[str, Path], settings: SessionSettings | None = None) -> Cells:
    """Open the cells, each by its name. Raises EncoderError, naming the file, where one is no cell."""
    front, step, head = (OnnxSession(files[cell], settings) for cell in CELLS)
    states, features = _port(step, "states", 3), _port(front, "features", 2)
    cells = Cells(
        front=front,
        step=step,
        head=head,
        directions=_size(step, states, 0) // _STATES,
        channels=_size(front, features, 1),
        hidden=_size(step, states, 2),
        table=_size(front, _port(front, "sums", 2), 1),
        dim=_size(head, _port(head, "sentence_embedding", 2), 1),
    )
    expected = {
        front: {"input_ids", "attention_mask", "members"},
        step: {"x_forward", "lengths", "below", "states", *(("x_backward",) if cells.directions == 2 else ())},
        head: {"sums", "count", "states"},
    }
    for session, inputs in expected.items():
        if set(session.inputs) != inputs:
            given, needed = ", ".join(session.inputs), ", ".join(sorted(inputs))
            raise EncoderError(f"{session.path}: is no cell: its inputs are {given}; expected {needed}")
    found = (
        (step, "x_forward", 2, cells.channels),
        (head, "sums", 1, cells.table),
        (head, "states", 0, _STATES * cells.directions),
        (head, "states", 2, cells.hidden),
    )
    for session, name, axis, size in found:
        if _size(session, session.inputs[name], axis) != size:
            raise EncoderError(f"{session.path}: {name} is {session.inputs[name].shape}, axis {axis} must be {size}")
    return cells


def _port(session: OnnxSession, name: str, rank: int) -> Port:
    port = session.outputs.get(name) or session.inputs.get(name)
    if port is None or len(port.shape) != rank:
        raise EncoderError(f"{session.path}: is no cell: expected {name} of {rank} dimensions")
    return port


def _size(session: OnnxSession, port: Port, axis: int) -> int:
    size = port.shape[axis]
    if not isinstance(size, int) or size < 1:
        raise EncoderError(f"{session.path}: is no cell: {port.name} is {port.shape}, axis {axis} must be fixed")
    return size
