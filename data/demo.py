"""The main job from end to end: a corpus, an index, a server, a few questions, answers as a person reads them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import digits
import numpy as np

from vecsvc.client import Client
from vecsvc.types import SearchAnswer

SHADES = " .:-=+*#%@"
ASKED = ("digit-0003", "digit-0042", "digit-1234")
K = 5


def picture(vector: list[float]) -> list[str]:
    """Eight lines of eight pixels, two characters each."""
    pixels = np.asarray(vector).reshape(8, 8)
    return ["".join(SHADES[min(9, int(p / 16 * 10))] * 2 for p in row) for row in pixels]


def vecsvc(*arguments: str) -> list[str]:
    return [sys.executable, "-c", "from vecsvc.cli import main; main()", *arguments]


@contextlib.contextmanager
def server(indexes: Path) -> Iterator[str]:
    """A running `vecsvc serve` on free ports, ready; stopped with SIGTERM at the end."""
    command = vecsvc("serve", str(indexes), "--port", "0", "--admin-port", "0")
    with tempfile.TemporaryFile("w+") as log, subprocess.Popen(command, stderr=log) as process:
        try:
            yield _wait_until_ready(process, log)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=30)


def _wait_until_ready(process: subprocess.Popen[bytes], log: object) -> str:
    deadline = time.monotonic() + 30
    url = ""
    while time.monotonic() < deadline and process.poll() is None:
        log.seek(0)  # type: ignore[attr-defined]
        for line in log.read().splitlines():  # type: ignore[attr-defined]
            event = json.loads(line)
            if event["message"] == "listening":
                url = f"http://{event['host']}:{event['port']}"
            if event["message"] == "ready":
                return url
        time.sleep(0.05)
    log.seek(0)  # type: ignore[attr-defined]
    sys.exit(f"the server did not get ready:\n{log.read()}")  # type: ignore[attr-defined]


def show(asked: str, query: list[float], label: int, answer: SearchAnswer) -> None:
    print(f"\nWhat looks like {asked}, a handwritten {label}?")
    columns = [picture(query)] + [picture(hit.vector or []) for hit in answer.results]
    heads = [f"{asked} ({label})"] + [f"{hit.id} ({(hit.fields or {})['label']})" for hit in answer.results]
    tails = ["query"] + [f"cosine {hit.score:.3f}" for hit in answer.results]
    print("   ".join(f"{head:<16}" for head in heads))
    for lines in zip(*columns, strict=True):
        print("   ".join(lines))
    print("   ".join(f"{tail:<16}" for tail in tails))
    right = sum((hit.fields or {})["label"] == label for hit in answer.results)
    print(f"{right} of {len(answer.results)} are a {label}, found in {answer.took_ms.total:.2f} ms")


def main() -> None:
    corpus = digits.write()
    vectors, labels = digits.load()
    print(f"wrote {corpus.relative_to(Path.cwd()) if corpus.is_relative_to(Path.cwd()) else corpus}")
    with tempfile.TemporaryDirectory() as folder:
        build = vecsvc("build-index", str(corpus), "--out", folder, "--fields", "label")
        print(f"\n$ vecsvc build-index data/corpus.parquet --out {folder} --fields label", flush=True)
        subprocess.run(build, check=True, env={**os.environ})
        print(f"\n$ vecsvc serve {folder}")
        with server(Path(folder)) as url, Client(url) as client:
            described = client.indexes()[0]
            print(f"{url} serves {described['name']}: {described['size']:,} x {described['dim']}, {described['kind']}")
            for asked in ASKED:
                row = int(asked.removeprefix("digit-"))
                answer = client.search(id=asked, k=K, include=["fields", "vector"])
                show(asked, vectors[row].tolist(), int(labels[row]), answer)
            sevens = client.search(id=ASKED[0], k=K, filter={"label": 7}, include=["fields"])
            names = ", ".join(f"{hit.id} ({hit.score:.3f})" for hit in sevens.results)
            print(f"\nThe sevens that look most like {ASKED[0]}, by the filter {{'label': 7}}: {names}")
    print("\nThe server has stopped. Build an index of your own: vecsvc build-index YOUR.parquet")


if __name__ == "__main__":
    main()
