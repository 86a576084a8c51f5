"""Runs ONNX models: the only file of the running service that knows onnxruntime."""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from vecsvc.errors import BackendMissing, EncoderError, InvalidParameter

MAX_THREADS: Final = 1024
MIN_MEMORY_MB: Final = 8  # below this not even small models can run
MAX_MEMORY_MB: Final = 1 << 20

_SUFFIX: Final = "ExecutionProvider"
_CPU: Final = "CPU"
_CUDA: Final = "CUDA"
_DTYPES: Final = {"tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(float)": np.float32}
# What onnxruntime itself would fuse at a loss: on a CPU it computes a sum and its normalisation in one node by single
# numbers, and five times slower than apart (1.32; before, both took the same).
_SLOWER: Final = {_CPU + _SUFFIX: ("SkipLayerNormFusion",)}
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


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionSettings:
    """How a model runs; none of it changes a result by more than rounding."""

    # cpu, cuda, or what else this onnxruntime has, by its own name: openvino, CoreMLExecutionProvider, ...
    device: str = "cpu"
    num_threads: int = 0  # of one run; more shorten long runs, and take cores from others; 0 is one a core
    spinning: bool = False  # threads of a run spin while they wait for each other: less latency where cores are idle
    # Most memory that all runs may take together beside the weights; one that needs more fails alone. 0 is no ceiling.
    memory_mb: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.num_threads <= MAX_THREADS:
            raise InvalidParameter(f"num_threads must be between 0 and {MAX_THREADS}, got {self.num_threads}")
        if self.memory_mb and not MIN_MEMORY_MB <= self.memory_mb <= MAX_MEMORY_MB:
            raise InvalidParameter(
                f"memory_mb must be 0 or between {MIN_MEMORY_MB} and {MAX_MEMORY_MB}, got {self.memory_mb}"
            )


class OnnxSession:
    """One opened model. Any number of threads may run it at once."""

    inputs: Mapping[str, Port]
    outputs: Mapping[str, Port]

    def __init__(self, path: Path, settings: SessionSettings | None = None) -> None:
        """Open the model file as the settings say; without any, on the CPU with a thread a core.

        Raises EncoderError, naming the file, where onnxruntime refuses it: damaged, an unknown operator,
        weights outside the model's folder. Raises BackendMissing where onnxruntime, or the device, is not there.
        """
        settings = settings if settings is not None else SessionSettings()
        onnxruntime = _import_onnxruntime()
        provider = find_provider(settings.device, onnxruntime)
        options = _options(onnxruntime, settings)
        try:
            with _ceiling(onnxruntime, settings, provider, options):
                # Its fallback would go on with the CPU when the device fails, and say so only on stdout.
                session = onnxruntime.InferenceSession(
                    str(path),
                    options,
                    providers=[(provider, _provider_options(settings, provider))],
                    enable_fallback=0,
                    disabled_optimizers=_SLOWER.get(provider, ()),
                )
        except Exception as error:  # onnxruntime's errors share no base of their own
            raise EncoderError(f"{path}: onnxruntime cannot open it: {_one_line(error)}") from error
        if provider not in session.get_providers():
            remedy = (
                "look for the driver with nvidia-smi, and for CUDA and cuDNN with pip install 'vecsvc[gpu]'"
                if provider == _CUDA + _SUFFIX
                else f"its libraries are missing, or there is no such device; {_CPU.lower()} works everywhere"
            )
            raise BackendMissing(f"onnxruntime could not start {provider.removesuffix(_SUFFIX)}: {remedy}")
        self.path = path
        self.settings = settings
        self.inputs = {p.name: Port(p.name, p.type, tuple(p.shape)) for p in session.get_inputs()}
        self.outputs = {p.name: Port(p.name, p.type, tuple(p.shape)) for p in session.get_outputs()}
        self._session: Any = session
        self._dtypes = {p.name: _DTYPES[p.type] for p in self.inputs.values() if p.type in _DTYPES}

    def run(self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> list[NDArray[Any]]:
        """The named outputs, in order. Integers are converted to the width that the model declares.

        Raises EncoderError where the model fails, and after `close`.
        """
        session = self._session
        if session is None:
            raise EncoderError(f"{self.path}: the model was closed")
        dtypes = self._dtypes
        feed = {
            name: np.ascontiguousarray(value, dtype=dtypes[name]) if name in dtypes else value
            for name, value in inputs.items()
        }
        try:
            results: list[NDArray[Any]] = session.run(list(outputs), feed)
        except Exception as error:
            shapes = ", ".join(f"{name} {value.shape}" for name, value in feed.items())
            raise EncoderError(f"{self.path}: onnxruntime failed on {shapes}: {_one_line(error)}") from error
        return results

    def close(self) -> None:
        """Runs under way end well; the model's memory is freed after the last of them."""
        self._session = None


def runtime_version() -> str:
    """onnxruntime's version. Raises BackendMissing where it is not there."""
    return str(_import_onnxruntime().__version__)


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


def device_name(device: str) -> str:
    """The short name of a device that may be given by onnxruntime's full one: cpu for CPUExecutionProvider."""
    return device.lower().removesuffix(_SUFFIX.lower())


def find_provider(device: str, onnxruntime: Any = None) -> str:
    """onnxruntime's full name of the device. Raises BackendMissing where this onnxruntime does not have it."""
    onnxruntime = onnxruntime if onnxruntime is not None else _import_onnxruntime()
    available = onnxruntime.get_available_providers()
    wanted = device_name(device)
    found = next((name for name in available if name.lower() == wanted + _SUFFIX.lower()), None)
    if found is None:
        names = ", ".join(name.removesuffix(_SUFFIX).lower() for name in available)
        remedy = "pip uninstall onnxruntime && pip install 'vecsvc[gpu]'" if wanted == "cuda" else "name one of these"
        raise BackendMissing(f"device {device[:80]!r} is not in this onnxruntime, which has {names}: {remedy}")
    if found == _CUDA + _SUFFIX and hasattr(onnxruntime, "preload_dlls"):
        # It finds the CUDA libraries that pip installed, and prints what it misses where --json is written.
        with contextlib.redirect_stdout(sys.stderr):
            onnxruntime.preload_dlls()
    return str(found)


def _options(onnxruntime: Any, settings: SessionSettings) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _FATAL
    # Left to itself onnxruntime counts the machine's cores, also those that this process may not use.
    options.intra_op_num_threads = settings.num_threads or usable_cores()
    options.inter_op_num_threads = 1
    # Threads that spin while they wait burn a core that searches need, for some microseconds less a run. Where that
    # was found to pay they stop with the run: left alone they spin for milliseconds more, until the next query.
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if settings.spinning else "0")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    # A pattern is kept for every shape of input ever seen, and texts come in hundreds of them.
    options.enable_mem_pattern = False
    return options


_environment: Final = threading.Lock()  # held while the process' allocator is one session's, until that has taken it


@contextlib.contextmanager
def _ceiling(onnxruntime: Any, settings: SessionSettings, provider: str, options: Any) -> Iterator[None]:
    """Give the session that is opened inside an arena of its own with a ceiling.

    A session's own arena has none. One that is registered with the process may have one; a session keeps what it
    found there, and the next registration replaces it for later sessions only.
    """
    if not settings.memory_mb or provider == _CUDA + _SUFFIX:
        yield
        return
    with _environment:
        where = onnxruntime.OrtMemoryInfo(
            "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
        )
        # Grown by what is asked for, not by powers of two, which would reach the ceiling half empty.
        arena = {"max_mem": settings.memory_mb << 20, "arena_extend_strategy": 1}
        arena |= {"initial_chunk_size_bytes": -1, "max_dead_bytes_per_chunk": -1}
        onnxruntime.create_and_register_allocator(where, onnxruntime.OrtArenaCfg(arena))
        options.add_session_config_entry("session.use_env_allocators", "1")
        yield


def _provider_options(settings: SessionSettings, provider: str) -> dict[str, str]:
    if provider == _CUDA + _SUFFIX and settings.memory_mb:
        return {"gpu_mem_limit": str(settings.memory_mb << 20), "arena_extend_strategy": "kSameAsRequested"}
    return {}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:400]
