"""`vecsvc` commands in processes of their own that need no second to import: forked from one that has done so."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["vecsvc.cli", "vecsvc.process", "vecsvc.route", "vecsvc.indexes.exact", "index_builders.pipeline", "aiohttp"]
)


def _vecsvc(arguments: list[str], prelude: str, files: dict[int, str], cwd: str, environ: dict[str, str]) -> None:
    """In the child: what a fresh interpreter would find, then the command."""
    for number, path in files.items():
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), number)
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(cwd)
    sys.argv = ["vecsvc", *arguments]
    exec(prelude, {"__name__": "__main__"})
    from vecsvc.cli import main

    main()


class Forked:
    """A command under way, with those methods of Popen that tests use."""

    def __init__(
        self,
        arguments: list[str],
        files: dict[int, str],
        *,
        prelude: str = "",
        cwd: Path | None = None,
        env: dict[str, str] | None = None,
    ) -> None:
        """`files` take what it writes to these descriptors; `prelude` is Python that runs before the command."""
        environ = dict(env if env is not None else os.environ)
        where = str(cwd if cwd is not None else Path.cwd())
        self._process = _context.Process(target=_vecsvc, args=(arguments, prelude, files, where, environ), daemon=True)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("vecsvc", timeout or 0.0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run(
    *arguments: str, cwd: Path | None = None, env: dict[str, str] | None = None, timeout_s: float = 60.0
) -> subprocess.CompletedProcess[str]:
    """What a `vecsvc` command prints, and its exit code; `env` is added to this process's own."""
    with tempfile.TemporaryDirectory() as folder:
        files = {1: f"{folder}/out", 2: f"{folder}/err"}
        process = Forked(list(arguments), files, cwd=cwd, env={**os.environ, **(env or {})})
        try:
            code = process.wait(timeout_s)
        finally:
            process.kill()
            texts = [Path(path).read_text() if Path(path).exists() else "" for path in files.values()]
            if process.returncode is None:
                sys.stderr.write("".join(texts))  # what it said before its time was up
    return subprocess.CompletedProcess(list(arguments), code, *texts)
