"""The main job from end to end: real texts, an index, a server, questions in plain English, hits to be read.

python data/demo.py                        # the default encoder
python data/demo.py --encoder DIR          # one of your own
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import docstrings

from vecsvc.client import Client
from vecsvc.types import SearchAnswer

QUESTIONS = (
    "how do I run a function later in another thread?",
    "parse a date from a string",
    "find the longest common part of two texts",
    "how much free space is left on the disk?",
    "pick a random item from a list",
    "ask for a password without showing it",
    "make all words begin with a capital letter",
)
FILTERED = ("average of many numbers", {"package": "numpy"})
LIKE = "json.dumps"
FIELDS = ("package", "kind", "signature", "title")
K = 3
NAME_WIDTH, WIDTH = 42, 118  # of a hit's name, and of a whole line
READY_S = 60


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


def _wait_until_ready(process: subprocess.Popen[bytes], log: IO[str]) -> str:
    deadline = time.monotonic() + READY_S
    url = ""
    while time.monotonic() < deadline and process.poll() is None:
        log.seek(0)
        for line in log.read().splitlines():
            event = json.loads(line)
            if event["message"] == "listening":
                url = f"http://{event['host']}:{event['port']}"
            if event["message"] == "ready":
                return url
        time.sleep(0.05)
    log.seek(0)
    sys.exit(f"the server did not get ready:\n{log.read()}")


def show(question: str, answer: SearchAnswer) -> None:
    """The question and its time, then a line for each hit: rank, score, name, first sentence."""
    took = answer.took_ms
    print(f"\n{question:<{WIDTH - 30}}{f'{took.total:.1f} ms, {took.encode:.1f} of it encoding':>30}")
    for rank, hit in enumerate(answer.results, start=1):
        title = str((hit.fields or {})["title"])
        line = f"  {rank}  {hit.score:.3f}  {hit.id:<{NAME_WIDTH}} {title}"
        print(line if len(line) <= WIDTH else line[: WIDTH - 3].rsplit(" ", 1)[0] + " ...")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", help="a folder, instead of the default encoder")
    parser.add_argument("--limit", type=int, help="so many documents, spread evenly over all")
    given = parser.parse_args()
    table = docstrings.read(packages=docstrings.SAMPLE, limit=given.limit)
    corpus = docstrings.write(docstrings.CORPUS, table)
    print(f"wrote {corpus.name}: {table.num_rows:,} docstrings of this Python's standard library and packages")
    with tempfile.TemporaryDirectory() as folder:
        options = ["--out", folder, "--fields", ",".join(FIELDS)]
        options += ["--encoder", given.encoder] if given.encoder else []
        print(f"\n$ vecsvc build-index data/{corpus.name} {' '.join(options)}", flush=True)
        subprocess.run(vecsvc("build-index", str(corpus), *options), check=True)
        print(f"\n$ vecsvc serve {folder}")
        with server(Path(folder)) as url, Client(url) as client:
            served = client.indexes()[0]
            print(f"{url} serves {served['name']}: {served['size']:,} x {served['dim']}, {served['kind']}")
            for question in QUESTIONS:
                show(question, client.search(text=question, k=K, include=["fields"]))
            question, allowed = FILTERED
            answer = client.search(text=question, k=K, filter=allowed, include=["fields"])
            show(f"{question}, with the filter {json.dumps(allowed)}", answer)
            # A sample that a limit thinned may lack it.
            like = LIKE if LIKE in table["id"].to_pylist() else table["id"][0].as_py()
            show(f"what is like {like}?", client.search(id=like, k=K, include=["fields"]))
    print("\nThe server has stopped. Build an index of your own texts: .venv/bin/vecsvc build-index YOUR.parquet")


if __name__ == "__main__":
    main()
