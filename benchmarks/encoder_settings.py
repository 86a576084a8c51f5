"""How an encoder should be run: threads of a run x runs at once x spinning, alone and beside searches.

    python benchmarks/encoder_settings.py [--encoders DIR,DIR,...] [--rounds 15] [--threads 1,2] [--instances 1,2]

Everything runs in one process, as in the service. In each round every setting has its turn, for some fractions of a
second each; what is shown are medians over the rounds. Spinning is `off`, `run` (threads spin while they wait for
each other, and stop with the run: what `--encoder-spinning on` does), or `always` (onnxruntime's own default: they go
on spinning after the run). At the end stands what vecsvc chooses by its own short measurement. Let nothing else run.

query ms         one short query from text to vector, the next one at once
paced ms         the same with 5 ms between two; CPU ms is what the process computes for each, spinning included
busy ms          paced queries beside a thread that searches an nng index; `search` is how many searches it does, as a
                 share of what it does alone
texts/s          batches of 8 texts of some 43 tokens, so many at once as there are instances
busy texts/s     the same beside a searching thread, and what is left of its searches
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any, Final
from unittest import mock

import numpy as np
from common import save, table

import index_builders
from vecsvc import onnx_session
from vecsvc.encoders import default_encoder
from vecsvc.encoders.measure import LONGER, MAX_BATCH_TEXTS, SHORT, open_fastest, steps, texts_a_second
from vecsvc.encoders.onnx import OnnxEncoder, open_encoder
from vecsvc.onnx_session import usable_cores

PART_S: Final = 0.15  # of each measurement in a round
PAUSE_S: Final = 0.005  # between paced queries
SPINNING: Final = ("off", "run", "always")
ROWS, DIM = 10_000, 384


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cores = ",".join(map(str, steps(usable_cores())))
    parser.add_argument("--encoders", default=str(default_encoder()), help="folders, separated by commas")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", default=cores, help="threads of a run")
    parser.add_argument("--instances", default=cores, help="runs at once")
    parser.add_argument("--part-s", type=float, default=PART_S, help="seconds of each measurement in a round")
    options = parser.parse_args()
    search = searching()
    figures: dict[str, Any] = {}
    for folder in map(Path, options.encoders.split(",")):
        threads, instances = ([int(n) for n in given.split(",")] for given in (options.threads, options.instances))
        rows = compare(folder, threads, instances, options.rounds, options.part_s, search)
        table(
            f"{folder.resolve().name}: medians of {options.rounds} rounds",
            list(rows[0]),
            [list(r.values()) for r in rows],
        )
        encoder, choice = open_fastest(lambda t, spins, at=folder: open_encoder(at, num_threads=t, spinning=spins))
        encoder.close()
        spinning = "spinning" if choice.spinning else "not spinning"
        print(f"\nchosen: {choice.threads} threads, {spinning}, {choice.instances} at once")
        print("\n".join(f"  {line}" for line in choice.why.split("; ")))
        figures[folder.resolve().name] = {
            "settings": rows,
            "chosen": [choice.threads, choice.spinning, choice.instances],
        }
    save("encoder_settings", figures, libraries=("onnxruntime", "tokenizers"))


def compare(
    folder: Path, threads: list[int], instances: list[int], rounds: int, part_s: float, search: Callable[[], Any]
) -> list[dict[str, Any]]:
    """A row for each setting; with one thread there is nobody to spin for."""
    opened = {
        (count, spinning): opening(folder, count, spinning)
        for count in threads
        for spinning in (SPINNING if count > 1 else SPINNING[:1])
    }
    settings = [(*way, runs) for way in opened for runs in instances]
    found: dict[tuple[int, str, int], list[dict[str, float]]] = {setting: [] for setting in settings}
    alone: list[float] = []
    for _ in range(rounds + 1):
        with Neighbour(search) as neighbour:
            time.sleep(part_s)
        alone.append(neighbour.rate)
        for (count, spinning, runs), taken in found.items():
            taken.append(measure(opened[count, spinning], runs, part_s, search))
            time.sleep(2 * PAUSE_S)  # until the last one's threads have stopped spinning
    for encoder in opened.values():
        encoder.close()
    rows = []
    for (count, spinning, runs), taken in found.items():
        # The first round warms up.
        figures = {name: median(one[name] for one in taken[1:]) for name in taken[0]}
        for name in ("search", "left of search"):
            figures[name] /= median(alone[1:])
        rows.append({"threads": count, "spinning": spinning, "instances": runs, **figures})
    return rows


def measure(encoder: OnnxEncoder, runs: int, part_s: float, search: Callable[[], Any]) -> dict[str, float]:
    query_ms, _ = queries(encoder, part_s, 0.0)
    paced_ms, paced_cpu_ms = queries(encoder, part_s, PAUSE_S)
    with Neighbour(search) as beside_queries:
        beside_ms, _ = queries(encoder, part_s, PAUSE_S)
    batch = encoder.split([LONGER] * MAX_BATCH_TEXTS)
    texts_s = texts_a_second(encoder, batch, runs, part_s)
    with Neighbour(search) as beside_batches:
        beside_texts_s = texts_a_second(encoder, batch, runs, part_s)
    return {
        "query ms": query_ms,
        "paced ms": paced_ms,
        "CPU ms": paced_cpu_ms,
        "busy ms": beside_ms,
        "search": beside_queries.rate,
        "texts/s": texts_s,
        "busy texts/s": beside_texts_s,
        "left of search": beside_batches.rate,
    }


def queries(encoder: OnnxEncoder, part_s: float, pause_s: float) -> tuple[float, float]:
    """Median milliseconds of a query, and the process' processor milliseconds by query."""
    spent: list[float] = []
    processor, end = time.process_time(), time.perf_counter() + part_s
    while not spent or time.perf_counter() < end:
        before = time.perf_counter()
        encoder.run(encoder.split([SHORT]))
        spent.append(time.perf_counter() - before)
        if pause_s:
            time.sleep(pause_s)
    return median(spent) * 1e3, (time.process_time() - processor) / len(spent) * 1e3


# ------------------------------------------------------------------------------------------------ the others


def searching() -> Callable[[], Any]:
    """One search of an nng index, in one thread and without Python's lock for nearly all of its time."""
    rng = np.random.default_rng(7)
    vectors = rng.standard_normal((ROWS, DIM), dtype=np.float32)
    index = index_builders.build(vectors, kind="nng", metric="ip", num_threads=usable_cores(), seed=7)
    asked = itertools.cycle(rng.standard_normal((256, 1, DIM), dtype=np.float32))
    return lambda: index.search(next(asked), 10)


class Neighbour:
    """A thread that searches again and again while it is entered; `rate` is how many searches a second it did."""

    def __init__(self, search: Callable[[], Any]) -> None:
        self._search, self._stop, self._done = search, threading.Event(), 0
        self._thread = threading.Thread(target=self._work, daemon=True)
        self.rate = 0.0

    def __enter__(self) -> Neighbour:
        self._started = time.perf_counter()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.rate = self._done / (time.perf_counter() - self._started)

    def _work(self) -> None:
        while not self._stop.is_set():
            self._search()
            self._done += 1


def opening(folder: Path, threads: int, spinning: str) -> OnnxEncoder:
    with always_spinning() if spinning == "always" else contextlib.nullcontext():
        return open_encoder(folder, num_threads=threads, spinning=spinning == "run")


@contextlib.contextmanager
def always_spinning() -> Iterator[None]:
    """Sessions that are opened inside spin as onnxruntime's own do, which vecsvc has no setting for."""
    original = onnx_session._options

    def options(*given: Any) -> Any:
        made = original(*given)
        made.add_session_config_entry("session.intra_op.allow_spinning", "1")
        made.add_session_config_entry("session.force_spinning_stop", "0")
        return made

    with mock.patch.object(onnx_session, "_options", options):
        yield


if __name__ == "__main__":
    main()
