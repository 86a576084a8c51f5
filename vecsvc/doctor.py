"""Says what an installation can do, and which packages are in each other's way."""

from __future__ import annotations

import importlib.metadata
import platform
import re
from typing import Final

import msgspec

from vecsvc import __version__, indexes, machine_code
from vecsvc.errors import VecsvcError
from vecsvc.indexes.base import module
from vecsvc.manifest import cpu_description

# Packages that own the same module: the last one installed wins, and uninstalling one breaks the other.
_RIVALS: Final = {
    "faiss": ("faiss-cpu", "faiss-gpu", "faiss-gpu-cu12", "faiss-gpu-cuvs"),
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
}

_NOT_SHOWN: Final = ("bench", "bench-encoder", "dev")  # extras that the work itself never needs


class Report(msgspec.Struct):
    vecsvc: str
    python: str
    cpu: str
    kernels: str  # the instructions they are compiled to, and where they are kept
    kinds: dict[str, str]  # kind -> "ok", or what is missing and the remedy
    packages: dict[str, str]
    problems: list[str]

    def lines(self) -> list[str]:
        lines = [f"vecsvc {self.vecsvc}, Python {self.python}, {self.cpu}", f"kernels {self.kernels}"]
        lines += [f"kind {kind:<10}{state}" for kind, state in self.kinds.items()]
        lines += [f"package {name} {version}" for name, version in self.packages.items()]
        return lines + [f"PROBLEM: {problem}" for problem in self.problems]


def examine() -> Report:
    kinds = {}
    for kind in indexes.kinds():
        try:
            module(kind)
            kinds[kind] = "ok"
        except VecsvcError as error:
            kinds[kind] = str(error)
    names = dict.fromkeys([*_libraries(), *(name for rivals in _RIVALS.values() for name in rivals)])
    installed = {name: version for name in names if (version := _version(name)) is not None}
    problems = []
    for name, rivals in _RIVALS.items():
        both = [rival for rival in rivals if rival in installed]
        if len(both) > 1:
            problems.append(
                f"{' and '.join(both)} both own the module {name}: "
                f"pip uninstall -y {' '.join(both)} && pip install 'vecsvc[cpu]' (or 'vecsvc[gpu]')"
            )
    return Report(
        __version__,
        platform.python_version(),
        cpu_description()[0],
        f"for {machine_code.best_path()}, "
        + (f"not kept: {machine_code.reason()}" if machine_code.reason() else f"kept in {machine_code.folder()}"),
        kinds,
        installed,
        problems,
    )


def _libraries() -> list[str]:
    """What vecsvc asks for, extras included; nothing where it runs without having been installed."""
    try:
        wanted = importlib.metadata.requires("vecsvc") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    extras = [re.search(r"extra == [\"']([a-z-]+)", one) for one in wanted]
    return [
        re.split(r"[^A-Za-z0-9._-]", one, maxsplit=1)[0]
        for one, extra in zip(wanted, extras, strict=True)
        if extra is None or extra[1] not in _NOT_SHOWN
    ]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
