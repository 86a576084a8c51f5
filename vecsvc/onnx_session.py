"""Runs ONNX models: the only file of the running service that knows onnxruntime."""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from vecsvc.errors import BackendMissing, EncoderError, InvalidParameter

DEVICES: Final = ("cpu", "cuda")
MAX_THREADS: Final = 1024

_CPU: Final = "CPUExecutionProvider"
_CUDA: Final = "CUDAExecutionProvider"
_DTYPES: Final = {"tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(float)": np.float32}
# Levels of onnxruntime's log: what a session logs it also raises, but why CUDA did not load is only logged.
_ERRORS: Final = 3
_FATAL: Final = 4

# How protobuf writes the entry ("location", file name) of a weight that lies outside the model file.
_LOCATION: Final = re.compile(rb"\x0a\x08location\x12(?:([\x00-\x7f])|([\x80-\xff])([\x00-\x7f]))")
# What an artifact accepts as a file name: no folder, no `..`, nothing hidden.
_FILE_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,100}")


@dataclass(frozen=True, slots=True)
class Port:
    """An input or output of a model."""

    name: str
    type: str  # as onnxruntime spells it: tensor(int64), tensor(float)
    shape: tuple[int | str | None, ...]  # a name or None where the size is free


class OnnxSession:
    """One opened model. Any number of threads may run it at once."""

    inputs: Mapping[str, Port]
    outputs: Mapping[str, Port]

    def __init__(self, path: Path, *, device: str = "cpu", num_threads: int = 0) -> None:
        """Open the model file on `device` (cpu or cuda); `num_threads` 0 means one a core.

        Raises EncoderError, naming the file, where onnxruntime refuses it: damaged, an unknown operator,
        weights outside the model's folder. Raises BackendMissing where onnxruntime, or its CUDA, is not there.
        """
        if not 0 <= num_threads <= MAX_THREADS:
            raise InvalidParameter(f"num_threads must be between 0 and {MAX_THREADS}, got {num_threads}")
        onnxruntime = _import_onnxruntime()
        provider = _provider(onnxruntime, device)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _FATAL
        # Left to itself onnxruntime counts the machine's cores, also those that this process may not use.
        options.intra_op_num_threads = num_threads or usable_cores()
        options.inter_op_num_threads = 1
        # A thread that spins while it waits takes its core from the search that comes next.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.inter_op.allow_spinning", "0")
        # A pattern is kept for every shape of input ever seen, and texts come in hundreds of them.
        options.enable_mem_pattern = False
        try:
            # Its fallback would go on with the CPU when CUDA fails, and say so only on stdout.
            session = onnxruntime.InferenceSession(str(path), options, providers=[provider], enable_fallback=0)
        except Exception as error:  # onnxruntime's errors share no base of their own
            raise EncoderError(f"{path}: onnxruntime cannot open it: {_one_line(error)}") from error
        if provider not in session.get_providers():
            raise BackendMissing(
                "onnxruntime could not start CUDA: look for the driver with nvidia-smi, "
                "and for CUDA and cuDNN with pip install 'vecsvc[gpu]'"
            )
        self.path = path
        self.device = device
        self.inputs = {p.name: Port(p.name, p.type, tuple(p.shape)) for p in session.get_inputs()}
        self.outputs = {p.name: Port(p.name, p.type, tuple(p.shape)) for p in session.get_outputs()}
        self._session: Any = session

    def run(self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> list[NDArray[Any]]:
        """The named outputs, in order. Integers are converted to the width that the model declares.

        Raises EncoderError where the model fails, and after `close`.
        """
        session = self._session
        if session is None:
            raise EncoderError(f"{self.path}: the model was closed")
        feed = {name: self._as_declared(name, value) for name, value in inputs.items()}
        try:
            results: list[NDArray[Any]] = session.run(list(outputs), feed)
        except Exception as error:
            shapes = ", ".join(f"{name} {value.shape}" for name, value in feed.items())
            raise EncoderError(f"{self.path}: onnxruntime failed on {shapes}: {_one_line(error)}") from error
        return results

    def close(self) -> None:
        """Runs under way end well; the model's memory is freed after the last of them."""
        self._session = None

    def _as_declared(self, name: str, value: NDArray[Any]) -> NDArray[Any]:
        port = self.inputs.get(name)
        dtype = _DTYPES.get(port.type) if port else None
        return value if dtype is None else np.ascontiguousarray(value, dtype=dtype)


def external_files(path: Path) -> list[Path]:
    """The files beside a model that hold weights it does not hold itself; most models have none.

    Raises EncoderError where the model is missing, empty, or names a file that is not beside it.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            names = {_location(data, match) for match in _LOCATION.finditer(data)}
    except (OSError, ValueError) as error:
        raise EncoderError(f"{path}: no readable model: {error}") from error
    for name in sorted(names):
        if not _FILE_NAME.fullmatch(name):
            raise EncoderError(f"{path}: has weights in {name[:120]!r}; they must lie in a file beside the model")
    # A name that is no file is onnxruntime's to judge: metadata may have an entry called location as well.
    return [path.parent / name for name in sorted(names) if (path.parent / name).is_file()]


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _location(data: mmap.mmap, match: re.Match[bytes]) -> str:
    short, low, high = match.groups()
    size = short[0] if short else (low[0] & 0x7F) | high[0] << 7
    return data[match.end() : match.end() + size].decode("utf-8", "backslashreplace")


def _import_onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendMissing("encoders need onnxruntime: pip install 'vecsvc[cpu]'") from error
    onnxruntime.set_default_logger_severity(_ERRORS)
    onnxruntime.disable_telemetry_events()  # a service reports to nobody but its operator
    return onnxruntime


def _provider(onnxruntime: Any, device: str) -> str:
    if device not in DEVICES:
        raise InvalidParameter(f"device must be one of {', '.join(DEVICES)}, got {device!r}")
    if device == "cpu":
        return _CPU
    available = onnxruntime.get_available_providers()
    if _CUDA not in available:
        raise BackendMissing(
            f"device 'cuda' needs {_CUDA}, this onnxruntime has {', '.join(available)}: "
            "pip uninstall onnxruntime && pip install 'vecsvc[gpu]'"
        )
    if hasattr(onnxruntime, "preload_dlls"):
        # It finds the CUDA libraries that pip installed, and prints what it misses where --json is written.
        with contextlib.redirect_stdout(sys.stderr):
            onnxruntime.preload_dlls()
    return _CUDA


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:400]
