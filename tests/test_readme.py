"""The README's commands are run as they stand, in their order."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from forked import Forked, run
from tiny_bert import write_tiny_bert

ROOT = Path(__file__).parents[1]
DEFAULT_ENCODER = ROOT / "vecsvc" / "encoders" / "default" / "model.onnx"
BLOCKS = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as the reader has it after the demo: data/ with a small text corpus, a few documents, a model."""
    (tmp_path / "data").mkdir()
    (tmp_path / "models").mkdir()
    shutil.copy(ROOT / "data" / "digits.py", tmp_path / "data")
    subprocess.run([sys.executable, "data/digits.py"], cwd=tmp_path, check=True, capture_output=True)
    write_sample_of_docstrings(tmp_path / "data" / "corpus.parquet")
    write_tiny_bert(tmp_path / "models" / "my-bert")
    write_tiny_bert(tmp_path / "models" / "tiny")
    texts = ["list the files of a folder", "copy a file", "read a vector", "search quickly"] * 5
    pq.write_table(pa.table({"id": np.arange(20), "text": texts}), tmp_path / "docs.parquet")
    return tmp_path


def write_sample_of_docstrings(path: Path) -> None:
    """A few rows with the columns of data/docstrings.py, which takes seconds to read the standard library."""
    ids = ["json.dumps", "json.loads", "datetime.datetime.strptime", "time.strptime", "time.sleep", "re.sub"]
    columns = {
        "id": ids,
        "package": [name.partition(".")[0] for name in ids],
        "kind": ["function"] * len(ids),
        "signature": ["(a)"] * len(ids),
        "title": [f"What {name} does." for name in ids],
        "text": [f"{name}: a document on how to list and read text {i}" for i, name in enumerate(ids)],
    }
    pq.write_table(pa.table(columns), path)


def with_encoder(words: list[str]) -> list[str]:
    """Where the default encoder was left out of the checkout, a tiny one stands in for it."""
    builds_on_text = words[:2] == ["vecsvc", "build-index"] and "data/corpus.parquet" in words
    return [*words, "--encoder", "models/tiny"] if builds_on_text and not DEFAULT_ENCODER.exists() else words


@pytest.fixture
def commands(folder: Path) -> Iterator[dict[str, str]]:
    """An environment in which `vecsvc` is ours and nothing is listening yet."""
    binaries = folder / "bin"
    binaries.mkdir()
    script = binaries / "vecsvc"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "from vecsvc.cli import main; main()" "$@"\n')
    script.chmod(0o755)
    yield {
        **os.environ,
        "PATH": f"{binaries}:{os.environ['PATH']}",
        "VECSVC_PORT": str(free_port()),
        "VECSVC_ADMIN_PORT": str(free_port()),
    }


@pytest.mark.timeout(300)
def test_every_command_of_the_readme_works_as_it_stands(folder: Path, commands: dict[str, str]) -> None:
    assert sum(command.startswith("vecsvc ") for command in COMMANDS) >= 15
    servers: list[Forked] = []
    ports = {"8080": commands["VECSVC_PORT"], "8081": commands["VECSVC_ADMIN_PORT"]}
    try:
        for command in COMMANDS:
            # The reader's ports may be taken here, so each stands for one that is free.
            line = re.sub(r"\b8[0-9]{3}\b", lambda found: ports.setdefault(found[0], str(free_port())), command)
            line = line.replace("localhost:", "127.0.0.1:")
            words = with_encoder(shlex.split(line))
            if words[:2] in (["vecsvc", "serve"], ["vecsvc", "route"]) and "--help" not in words:
                servers.append(Forked(words[1:], {2: os.devnull}, cwd=folder, env=commands))
                admin = words[words.index("--admin-port") + 1] if "--admin-port" in words else ports["8081"]
                wait_until_ready(admin, servers[-1])
                continue
            if words[0] == "curl":
                words.insert(1, "--fail-with-body")
            if ">" in words:
                words = ["sh", "-c", line]
            if words[0] == "vecsvc":
                done = run(*words[1:], cwd=folder, env=commands)
            else:
                done = subprocess.run(words, cwd=folder, env=commands, capture_output=True, text=True, timeout=60)
            assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
            if words[0] == "curl" and "/search" in line:
                hits = json.loads(done.stdout)["results"]
                assert len(hits) == 3
                if "/corpus/" in line:
                    assert all(hit["fields"]["package"] in ("datetime", "time") for hit in hits)
                else:
                    assert all(hit["fields"]["label"] in (3, 8) for hit in hits)
    finally:
        for server in servers:
            server.send_signal(signal.SIGTERM)
        assert [server.wait(timeout=30) for server in servers] == [0] * len(servers)


def wait_until_ready(port: str, server: Forked) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5):
                return
        except OSError:
            time.sleep(0.05)
    pytest.fail("the server of the README did not get ready")


def test_the_python_of_the_readme_is_the_client_as_it_is() -> None:
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    for snippet in snippets:
        compile(snippet, "README.md", "exec")
    assert any("from vecsvc.client import Client" in snippet for snippet in snippets)


def test_the_demo_runs_and_shows_hits(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "data", tmp_path / "data", ignore=shutil.ignore_patterns("*.parquet", "__pycache__"))
    options = ["--limit", "300"]
    if not DEFAULT_ENCODER.exists():
        options += ["--encoder", str(write_tiny_bert(tmp_path / "tiny"))]
    command = [sys.executable, "data/demo.py", *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "wrote corpus.parquet: 300 docstrings" in done.stdout and "The server has stopped" in done.stdout
    answers = re.findall(r"ms, [0-9.]+ of it encoding\n((?:  \d  -?\d\.\d{3}  \S+ .*\n){3})", done.stdout)
    assert len(answers) == 9
    # The one before the last was asked of numpy alone.
    assert len(re.findall(r"  numpy[.\w]* ", answers[-2])) == 3
