"""Trains a CNN-LSTM to give the vectors that a teacher gave: the only file that knows torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from vecsvc.errors import BackendMissing
from vecsvc.types import Vectors

# Temperature of the softmax over a batch's similarities: cosines differ by hundredths where it matters.
TEMPERATURE: Final = 0.05
_BAG_BATCH: Final = 1024  # texts a step while only the table learns
_BATCH: Final = 512  # texts or pairs a step while all learns


@dataclass(frozen=True, slots=True)
class TokenLists:
    """n lists of token ids, one after the other."""

    ids: NDArray[np.int32]  # of all lists
    starts: NDArray[np.int64]  # (n + 1,)

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.starts)

    def padded(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Ids (len(rows), t), 0 beyond each list's end, and the lengths; t is the longest length."""
        lengths = self.lengths[rows]
        columns = np.arange(int(lengths.max()))
        inside = columns < lengths[:, None]
        at = np.where(inside, self.starts[rows][:, None] + columns, 0)
        return np.where(inside, self.ids[at], 0).astype(np.int64), lengths


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesson:
    """What there is to learn from: texts with their teacher's vectors, and which of them belong together."""

    tokens: TokenLists
    vectors: NDArray[np.float16]  # (n, dim), unit length: the teacher's
    pairs: NDArray[np.int64]  # (p, 2) positions of a query and of the text that answers it
    table: Vectors  # (vocabulary, width): where the table starts
    back: Vectors  # (width, dim): how a sum of rows becomes a vector


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """How long and how hard to learn."""

    channels: int = 128  # of the convolution: more sees more of two and three words together, slower
    hidden: int = 128  # of each LSTM: more sees more of the order of words, slower
    bag_epochs: int = 8  # rounds over all texts while only the table learns: quick, and most of the quality
    epochs: int = 3  # rounds over all texts and pairs while all learns
    drop: float = 0.1  # share of the tokens left out at random, so that no word alone decides
    hard: float = 0.5  # weight of "this text answers this query" beside the teacher's opinion
    seed: int = 7


def train(lesson: Lesson, how: Training, tell: Callable[[str], None]) -> dict[str, NDArray[Any]]:
    """The weights by the names that `cnn_lstm_graph.write_cnn_lstm` takes, the table still float32 as `table`.

    Texts are cut at nothing here: what is too long for the student was cut when it was tokenised. One thread and
    the same arguments give the same weights. Raises BackendMissing where torch is not installed.
    """
    torch = import_torch()
    torch.manual_seed(how.seed)
    rng = np.random.default_rng(how.seed)
    model = _model(torch, lesson, how)
    targets = torch.from_numpy(lesson.vectors)
    steps = how.bag_epochs * -(-len(targets) // _BAG_BATCH)
    optimizer, schedule = _optimizer(torch, model.bag_parameters(), 2e-3, steps)
    started = time.perf_counter()
    for epoch in range(how.bag_epochs):
        total, count = 0.0, 0
        for rows in _chunks(rng.permutation(len(targets)), _BAG_BATCH):
            loss = _copy_loss(torch, model.bag(*_dropped(lesson, rows, how.drop, rng)), targets[rows].float())
            total, count = total + _step(loss, optimizer, schedule), count + 1
        tell(f"table, round {epoch + 1}/{how.bag_epochs}: loss {total / count:.4f}, {_since(started)}")
    batches = _plan(lesson, rng)
    optimizer, schedule = _optimizer(torch, model.parameters(), 1e-3, how.epochs * len(batches))
    for epoch in range(how.epochs):
        total = 0.0
        batches = _plan(lesson, rng)
        for done, batch in enumerate(batches, 1):
            if batch.ndim == 1:
                out = model(*_dropped(lesson, batch, how.drop, rng))
                loss = _copy_loss(torch, out, targets[batch].float())
            else:
                loss = _pair_loss(torch, model, lesson, targets, batch, how, rng)
            total += _step(loss, optimizer, schedule)
            if done % 50 == 0 or done == len(batches):
                where = f"all, round {epoch + 1}/{how.epochs}: {done}/{len(batches)}"
                tell(f"{where}, loss {total / done:.4f}, {_since(started)}")
    weights: dict[str, NDArray[Any]] = model.weights()
    return weights


def _since(started: float) -> str:
    return f"{time.perf_counter() - started:.0f} s"


def _plan(lesson: Lesson, rng: np.random.Generator) -> list[NDArray[np.int64]]:
    """One round's batches in random order: (n, 2) of pairs, and rows of the texts that are in none, of like length."""
    order = rng.permutation(np.setdiff1d(np.arange(len(lesson.vectors)), lesson.pairs))
    # Sorted by length within a wide window: little padding, and still other company each round.
    windows = [w[np.argsort(lesson.tokens.lengths[w], kind="stable")] for w in _chunks(order, 32 * _BATCH)]
    batches = [rows for window in windows for rows in _chunks(window, _BATCH)]
    pairs = lesson.pairs[rng.permutation(len(lesson.pairs))]
    for window in _chunks(pairs, 8 * _BATCH):
        batches += _chunks(window[np.argsort(lesson.tokens.lengths[window[:, 1]], kind="stable")], _BATCH)
    batches = [batch for batch in batches if len(batch) > 1]
    return [batches[i] for i in rng.permutation(len(batches))]


def _chunks(rows: NDArray[np.int64], size: int) -> Iterator[NDArray[np.int64]]:
    return (rows[i : i + size] for i in range(0, len(rows), size))


def _dropped(
    lesson: Lesson, rows: NDArray[np.int64], drop: float, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The rows' tokens, padded, some left out; each keeps at least one."""
    ids, lengths = lesson.tokens.padded(rows)
    keep = (rng.random(ids.shape) >= drop) & (np.arange(ids.shape[1]) < lengths[:, None])
    keep[:, 0] |= ~keep.any(axis=1)
    order = np.argsort(~keep, axis=1, kind="stable")
    kept = np.take_along_axis(ids, order, axis=1)
    counts = keep.sum(axis=1)
    kept[np.arange(ids.shape[1]) >= counts[:, None]] = 0
    return kept[:, : int(counts.max())], counts


def _copy_loss(torch: Any, out: Any, target: Any) -> Any:
    """Distance to the teacher's vectors, and to how it ranks the batch (Tung and Mori 2019, similarity-preserving)."""
    cosine = 1 - (out * target).sum(1).mean()
    return 10 * cosine + _rank_loss(torch, out, out, target, target)


def _rank_loss(torch: Any, queries: Any, texts: Any, target_queries: Any, target_texts: Any) -> Any:
    wanted = torch.softmax(target_queries @ target_texts.T / TEMPERATURE, dim=1)
    got = torch.log_softmax(queries @ texts.T / TEMPERATURE, dim=1)
    return torch.nn.functional.kl_div(got, wanted, reduction="batchmean")


def _pair_loss(
    torch: Any, model: Any, lesson: Lesson, targets: Any, pairs: NDArray[np.int64], how: Training, rng: Any
) -> Any:
    queries = model(*_dropped(lesson, pairs[:, 0], how.drop, rng))
    texts = model(*_dropped(lesson, pairs[:, 1], how.drop, rng))
    target_queries, target_texts = targets[pairs[:, 0]].float(), targets[pairs[:, 1]].float()
    cosine = 2 - (queries * target_queries).sum(1).mean() - (texts * target_texts).sum(1).mean()
    scores = queries @ texts.T / TEMPERATURE
    right = torch.arange(len(pairs))
    contrast = torch.nn.functional.cross_entropy(scores, right) + torch.nn.functional.cross_entropy(scores.T, right)
    return 5 * cosine + _rank_loss(torch, queries, texts, target_queries, target_texts) + how.hard * contrast


def _optimizer(torch: Any, parameters: Any, rate: float, steps: int) -> tuple[Any, Any]:
    optimizer = torch.optim.Adam(parameters, lr=rate)
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps + 1, pct_start=0.1)


def _step(loss: Any, optimizer: Any, schedule: Any) -> float:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    schedule.step()
    return float(loss.detach())


def _model(torch: Any, lesson: Lesson, how: Training) -> Any:
    nn = torch.nn
    width, dim = lesson.back.shape

    class CnnLstm(nn.Module):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.from_numpy(lesson.table.copy()))
            self.we = nn.Parameter(torch.from_numpy(lesson.back.copy()))
            self.bias = nn.Parameter(torch.zeros(dim))
            self.conv = nn.Conv1d(width, how.channels, 3, padding=1)
            self.lstms = nn.ModuleList([nn.LSTM(how.channels, how.hidden, batch_first=True) for _ in range(2)])
            # Nothing at first: the sum of rows is good from the start, and the rest learns what it lacks.
            self.wh = nn.Parameter(torch.zeros(4 * how.hidden, dim))

        def bag_parameters(self) -> list[Any]:
            return [self.table, self.we, self.bias]

        def bag(self, ids: NDArray[np.int64], lengths: NDArray[np.int64]) -> Any:
            flat = torch.from_numpy(ids[np.arange(ids.shape[1]) < lengths[:, None]])
            starts = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)[:-1]]))
            mean = nn.functional.embedding_bag(flat, self.table, starts, mode="mean")
            return nn.functional.normalize(mean @ self.we + self.bias, dim=1)

        def forward(self, ids: NDArray[np.int64], lengths: NDArray[np.int64]) -> Any:
            n, t = ids.shape
            columns = np.arange(t)
            inside = torch.from_numpy(columns < lengths[:, None])[:, :, None]
            count = torch.from_numpy(lengths)[:, None].float()
            e = nn.functional.embedding(torch.from_numpy(ids), self.table) * inside
            c = torch.relu(self.conv(e.transpose(1, 2))).transpose(1, 2)
            # The backward LSTM reads each text from its own end, as sequence_lens makes ONNX' operator do.
            turned = torch.from_numpy(np.where(columns < lengths[:, None], lengths[:, None] - 1 - columns, columns))
            index = turned[:, :, None].expand(n, t, c.shape[2])
            h = torch.cat([self.lstms[0](c)[0], self.lstms[1](c.gather(1, index))[0]], dim=2)
            mean = (h * inside).sum(1) / count
            most = h.masked_fill(~inside, -2.0).amax(1)
            y = (e.sum(1) / count) @ self.we + torch.cat([mean, most], dim=1) @ self.wh + self.bias
            return nn.functional.normalize(y, dim=1)

        def weights(self) -> dict[str, NDArray[Any]]:
            def array(tensor: Any) -> NDArray[np.float32]:
                return np.ascontiguousarray(tensor.detach().numpy(), dtype=np.float32)

            def gates(tensor: Any) -> NDArray[np.float32]:
                # torch orders the gates i, f, g, o; ONNX i, o, f, c.
                i, f, g, o = np.split(array(tensor), 4)
                return np.concatenate([i, o, f, g])

            lstms = self.lstms
            return {
                "table": array(self.table),
                "conv_w": array(self.conv.weight),
                "conv_b": array(self.conv.bias),
                "lstm_w": np.stack([gates(one.weight_ih_l0) for one in lstms]),
                "lstm_r": np.stack([gates(one.weight_hh_l0) for one in lstms]),
                "lstm_b": np.stack([np.concatenate([gates(one.bias_ih_l0), gates(one.bias_hh_l0)]) for one in lstms]),
                "we": array(self.we),
                "wh": array(self.wh),
                "bias": array(self.bias),
            }

    return CnnLstm()


def quantized(weights: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """The weights with the table as int8 rows `table_q` (vocabulary, width) and their scales `table_scale`."""
    found = {name: array for name, array in weights.items() if name != "table"}
    table = weights["table"]
    scale = np.maximum(np.abs(table).max(axis=1), np.float32(1e-12)) / np.float32(127)
    found["table_q"] = np.rint(table / scale[:, None]).astype(np.int8)
    found["table_scale"] = scale.astype(np.float32)
    return found


def import_torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise BackendMissing("distilling an encoder needs torch: pip install 'vecsvc[train]'") from error
    return torch
