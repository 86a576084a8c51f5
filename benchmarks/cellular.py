"""Cellular batching against batches padded to the longest text, and against those of texts of like length.

    python benchmarks/cellular.py [--data DIR] [--encoder DIR]

Three ways to run one CNN-LSTM for one stream of queries: the arrivals are drawn once, and each way gets the same.

padded     what waits, in the order of arrival, at most --batch texts, padded to the longest of them
sorted     the oldest leads, and those of like length go with it, at most --tokens tokens with padding
cellular   texts join and leave the running batch between steps

One thread takes what has arrived, and runs the model; a query's latency is from when it was to arrive, so a queue
shows in full (open loop). Nobody else shares the process: no HTTP, no hand-over between threads, the same for all.
Capacity is the throughput of `sorted` with a queue that is never empty. Lengths are those of the texts of --data, a
folder with peps.parquet and tldr_queries.parquet, else made up, with a heavy tail; by classes, to see where it pays:
all of them, the shorter half, the longest tenth, and all alike. Without an encoder's folder, weights are random, and
there are two sizes, for the gain grows with the cost of a step.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow.parquet as pq
from common import RESULTS, machine, parser, save, table, work_folder
from tokenizers import Tokenizer, models, pre_tokenizers

from index_builders.cnn_lstm_graph import write_cnn_lstm
from vecsvc.encoder_workers import ALONE_TOKENS
from vecsvc.encoders.cellular import DEFAULT_SLOTS, DEFAULT_STEPS, CellularEncoder, with_cells
from vecsvc.encoders.folder import LENGTH, TOKENIZER
from vecsvc.encoders.onnx import open_encoder
from vecsvc.onnx_session import SessionSettings
from vecsvc.tokenizer import Tokens

LIBRARIES = ("onnxruntime", "onnx", "tokenizers")
LOADS = (0.5, 0.8, 0.95)
CLASSES = ("mixed", "short", "long", "alike")  # of the lengths of texts
SIZES = {"H=128": (30_000, 256, 128, 128, 384), "H=512": (30_000, 256, 512, 512, 384)}
MAX_TOKENS = 256
FEWEST = 200  # queries in one measurement, however slow
WAITING = 256  # texts that always wait while the peak throughput is measured
NEAR_TOKENS, NEAR_FACTOR = 16, 1.25  # texts of like length differ by no more than either


class Policy(Protocol):
    """A way to run the model: takes texts in, and does one run at a time."""

    def add(self, key: int, tokens: Tokens) -> None: ...

    def turn(self) -> Sequence[int]:
        """One run; the keys of the texts that got ready."""
        ...

    def __len__(self) -> int:
        """How many texts are waiting or inside."""
        ...


class Padded:
    def __init__(self, encoder: CellularEncoder, batch: int) -> None:
        self._encoder, self._batch = encoder, batch
        self._waiting: deque[tuple[int, Tokens]] = deque()

    def add(self, key: int, tokens: Tokens) -> None:
        self._waiting.append((key, tokens))

    def turn(self) -> Sequence[int]:
        batch = [self._waiting.popleft() for _ in range(min(self._batch, len(self._waiting)))]
        self._encoder.run([tokens for _, tokens in batch])
        return [key for key, _ in batch]

    def __len__(self) -> int:
        return len(self._waiting)


class Sorted:
    def __init__(self, encoder: CellularEncoder, budget: int) -> None:
        self._encoder, self._budget = encoder, budget
        self._waiting: dict[int, Tokens] = {}

    def add(self, key: int, tokens: Tokens) -> None:
        self._waiting[key] = tokens

    def turn(self) -> Sequence[int]:
        lead = len(next(iter(self._waiting.values())))
        most = max(lead + NEAR_TOKENS, int(lead * NEAR_FACTOR))
        least = min(lead - NEAR_TOKENS, int(lead / NEAR_FACTOR))
        batch: list[int] = []
        longest = lead
        for key, tokens in self._waiting.items():
            if least <= len(tokens) <= most and max(longest, len(tokens)) * (len(batch) + 1) <= self._budget:
                batch.append(key)
                longest = max(longest, len(tokens))
        batch = batch or [next(iter(self._waiting))]
        self._encoder.run([self._waiting.pop(key) for key in batch])
        return batch

    def __len__(self) -> int:
        return len(self._waiting)


class Cellular:
    """As the service does it: a short text that is all alone is run whole."""

    def __init__(self, encoder: CellularEncoder) -> None:
        self._encoder = encoder
        self._stepper = encoder.stepper()
        self._waiting: deque[tuple[int, Tokens]] = deque()

    def add(self, key: int, tokens: Tokens) -> None:
        self._waiting.append((key, tokens))

    def turn(self) -> Sequence[int]:
        if not len(self._stepper) and len(self._waiting) == 1 and len(self._waiting[0][1]) <= ALONE_TOKENS:
            key, tokens = self._waiting.popleft()
            self._encoder.run([tokens])
            return [key]
        joining = min(self._stepper.room(), len(self._waiting))
        if joining:
            self._stepper.join([self._waiting.popleft() for _ in range(joining)])
        return [key for key, _ in self._stepper.step()]

    def __len__(self) -> int:
        return len(self._waiting) + len(self._stepper)


def peak(policy: Policy, texts: Sequence[Tokens]) -> float:
    """Texts a second with a queue that is never empty until the last have come."""
    begun = time.perf_counter()
    come = 0
    while come < len(texts) or len(policy):
        while come < len(texts) and len(policy) < WAITING:
            policy.add(come, texts[come])
            come += 1
        policy.turn()
    return len(texts) / (time.perf_counter() - begun)


def latencies(policy: Policy, texts: Sequence[Tokens], arrivals: np.ndarray) -> np.ndarray:
    """Seconds from the arrival of each text, at `arrivals` seconds after the start, until its vector was there."""
    found = np.zeros(len(texts))
    begun = time.perf_counter()
    come = left = 0
    while left < len(texts):
        now = time.perf_counter() - begun
        while come < len(texts) and arrivals[come] <= now:
            policy.add(come, texts[come])
            come += 1
        if not len(policy):
            # A sleep is some tens of microseconds too long: the last of it is waited out awake.
            time.sleep(max(0.0, arrivals[come] - now - 0.0002))
            continue
        ready = policy.turn()
        now = time.perf_counter() - begun
        for key in ready:
            found[key] = now - arrivals[key]
        left += len(ready)
    return found


def read_lengths(data: Path | None, encoder: CellularEncoder, trained: bool) -> tuple[np.ndarray, str]:
    """Tokens of each text, and where they are from."""
    if data is None:
        drawn = np.random.default_rng(7).lognormal(2.9, 0.9, 20_000)
        return np.clip(drawn, 3, MAX_TOKENS).astype(int), "made up, lognormal"
    texts = []
    for name, column in (("peps", "text"), ("tldr_queries", "query")):
        texts += [text for text in pq.read_table(data / f"{name}.parquet").column(column).to_pylist()[::4] if text]
    if trained:
        return np.array([len(tokens) for tokens in encoder.split(texts)]), "peps and tldr queries, the encoder's tokens"
    words = pre_tokenizers.BertPreTokenizer()
    counts = np.array([len(words.pre_tokenize_str(text)) + 2 for text in texts])
    return np.clip(counts, 3, MAX_TOKENS), "peps and tldr queries, words and signs for want of a tokenizer"


def by_class(lengths: np.ndarray) -> dict[str, np.ndarray]:
    middle, high = np.percentile(lengths, [50, 90])
    return {
        "mixed": lengths,
        "short": lengths[lengths <= middle],
        "long": lengths[lengths >= high],
        "alike": np.array([int(middle)]),
    }


def draw(lengths: np.ndarray, count: int, words: int, random: np.random.Generator) -> list[Tokens]:
    chosen = random.choice(lengths, count)
    return [Tokens(random.integers(1, words, length).tolist(), [0] * int(length)) for length in chosen]


def open_it(folder: Path, options: argparse.Namespace) -> CellularEncoder:
    settings = SessionSettings(num_threads=options.threads)
    encoder = with_cells(
        open_encoder(folder, num_threads=options.threads), folder, settings, slots=options.slots, steps=options.steps
    )
    if not isinstance(encoder, CellularEncoder):
        sys.exit(f"{folder} has no cells: write it with vecsvc encoder distill")
    return encoder


def random_encoder(folder: Path, sizes: tuple[int, int, int, int, int]) -> Path:
    """An encoder of these sizes (V, D, C, H, E) whose weights are noise: as fast as a trained one."""
    words, width, channels, hidden, dim = sizes
    random = np.random.default_rng(7)

    def noise(*shape: int) -> np.ndarray:
        return (random.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)

    weights: dict[str, np.ndarray] = {
        "table_q": random.integers(-127, 128, (words, width)).astype(np.int8),
        "table_scale": np.full(words, 0.01, dtype=np.float32),
        "conv_w": noise(channels, width, 3),
        "conv_b": noise(channels),
        "lstm_w": noise(2, 4 * hidden, channels),
        "lstm_r": noise(2, 4 * hidden, hidden),
        "lstm_b": noise(2, 8 * hidden),
        "we": noise(width, dim),
        "wh": noise(4 * hidden, dim),
        "bias": noise(dim),
    }
    write_cnn_lstm(folder, weights)
    # No text is tokenised here, but a folder without a tokenizer is no encoder.
    vocabulary = {f"word{number}": number for number in range(words)}
    Tokenizer(models.WordLevel(vocabulary, unk_token="word0")).save(str(folder / TOKENIZER))
    (folder / LENGTH).write_text(f'{{"max_seq_length": {MAX_TOKENS}}}')
    return folder


def measure(
    policies: dict[str, Callable[[], Policy]], lengths: np.ndarray, options: argparse.Namespace
) -> dict[str, Any]:
    """Peak and latencies of each policy; rounds alternate between them, so that a disturbance meets all."""
    random = np.random.default_rng(options.seed)
    some = draw(lengths, FEWEST, options.words, random)
    for policy in policies.values():
        peak(policy(), some)
    count = max(FEWEST, int(options.seconds * peak(policies["sorted"](), some)))
    peaks: dict[str, list[float]] = {name: [] for name in policies}
    for _ in range(options.rounds):
        texts = draw(lengths, count, options.words, random)
        for name, policy in policies.items():
            peaks[name].append(peak(policy(), texts))
    best = {name: float(np.median(found)) for name, found in peaks.items()}
    figures: dict[str, Any] = {"queries": count, "peak_per_s": best, "loads": []}
    for load in LOADS:
        rate = load * best["sorted"]
        found: dict[str, list[np.ndarray]] = {name: [] for name in policies}
        for _ in range(options.rounds):
            texts = draw(lengths, count, options.words, random)
            arrivals = np.cumsum(random.exponential(1 / rate, len(texts)))
            for name, policy in policies.items():
                found[name].append(latencies(policy(), texts, arrivals))
        for name, parts in found.items():
            all_ms = 1000 * np.concatenate(parts)
            p50, p90, p99 = (float(value) for value in np.percentile(all_ms, [50, 90, 99]))
            figures["loads"].append(
                {"load": load, "policy": name, "per_s": rate, "p50_ms": p50, "p90_ms": p90, "p99_ms": p99}
            )
    return figures


def show(title: str, figures: dict[str, Any]) -> None:
    base = {one["load"]: one for one in figures["loads"] if one["policy"] == "padded"}
    rows = [
        [
            name,
            f"{one['load']:.0%}",
            f"{one['per_s']:,.0f}",
            *(one[column] for column in ("p50_ms", "p90_ms", "p99_ms")),
            f"{one['p90_ms'] / base[one['load']]['p90_ms']:.2f}",
            f"{figures['peak_per_s'][name]:,.0f}",
        ]
        for name in figures["peak_per_s"]
        for one in figures["loads"]
        if one["policy"] == name
    ]
    table(title, ["batching", "load", "per s", "p50 ms", "p90 ms", "p99 ms", "p90 / padded's", "peak per s"], rows)


def main() -> None:
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--encoder", type=Path, help="folder of a CNN-LSTM encoder; random weights without it")
    arguments.add_argument("--seconds", type=float, default=3, help="of one measurement at full capacity")
    arguments.add_argument("--rounds", type=int, default=3, help="measurements of each point")
    arguments.add_argument("--classes", nargs="*", default=list(CLASSES), choices=CLASSES)
    arguments.add_argument("--sizes", nargs="*", default=list(SIZES), choices=list(SIZES), help="of random weights")
    arguments.add_argument("--batch", type=int, default=32, help="most texts in a padded batch")
    arguments.add_argument("--tokens", type=int, default=1024, help="most tokens in a sorted batch, with padding")
    arguments.add_argument("--slots", type=int, default=DEFAULT_SLOTS)
    arguments.add_argument("--steps", type=int, default=DEFAULT_STEPS)
    arguments.add_argument("--threads", type=int, default=1, help="of one run")
    arguments.add_argument("--seed", type=int, default=7)
    arguments.add_argument("--out", type=Path, default=RESULTS)
    options = arguments.parse_args()
    results: dict[str, Any] = {}
    with work_folder(options.work) as work:
        folders = (
            {options.encoder.name: options.encoder}
            if options.encoder is not None
            else {size: random_encoder(work / size, SIZES[size]) for size in options.sizes}
        )
        for name, folder in folders.items():
            encoder = open_it(folder, options)
            options.words = Tokenizer.from_file(str(folder / TOKENIZER)).get_vocab_size()
            policies: dict[str, Callable[[], Policy]] = {
                "padded": lambda encoder=encoder: Padded(encoder, options.batch),
                "sorted": lambda encoder=encoder: Sorted(encoder, options.tokens),
                "cellular": lambda encoder=encoder: Cellular(encoder),
            }
            lengths, source = read_lengths(options.data, encoder, options.encoder is not None)
            for kind, chosen in by_class(lengths).items():
                if kind in options.classes:
                    figures = measure(policies, chosen, options)
                    spread = [int(value) for value in np.percentile(chosen, [1, 50, 90, 99])]
                    figures |= {"tokens_p1_p50_p90_p99": spread, "lengths": source}
                    results[f"{name} {kind}"] = figures
                    show(f"{name}, {kind} queries: {source}; 1, 50, 90, 99 % have at most {spread} tokens", figures)
            encoder.close()
    kept = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    save("cellular", {"options": kept, "results": results}, options.out, LIBRARIES)
    print(f"seed {options.seed}, {options.threads} threads a run, libraries {machine(LIBRARIES)['libraries']}")


if __name__ == "__main__":
    main()
