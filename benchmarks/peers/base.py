"""What recall_qps.py asks of a system: to be built, to be set to a point of its curve, to search, to be weighed."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np

Point: TypeAlias = Mapping[str, Any]  # search settings, like {"ef_search": 64}


class Searcher(Protocol):
    """An index that was built. `set` may be slow and is never timed; `search` is what the clock sees."""

    def set(self, point: Point, threads: int) -> None: ...

    def search(self, queries: np.ndarray, k: int) -> Any:
        """The labels of the k nearest of each query (n, dim), in whatever shape the library gives: (n, k) or (k,)."""
        ...

    def save(self, folder: Path) -> int:
        """Write the index into an empty folder. Returns bytes that no file shows, 0 nearly always."""
        ...


@dataclass(frozen=True)
class System:
    name: str
    package: str  # the distribution that must be installed
    build: Callable[[np.ndarray, str, int, Mapping[str, Any]], Searcher]  # vectors, metric, threads, params
    points: Callable[[Searcher], list[Point]]  # coarse, the cheapest first; refined where a recall asks for it
    params: Mapping[str, Any] = field(default_factory=dict)  # of the build
    ours: bool = False
    unit: bool = True  # under cosine it gets unit vectors and the inner product, made before the clock starts
    reranks: bool = False  # reads the raw vectors beside its own files
    note: str = ""

    def version(self) -> str | None:
        """Of the installed package; None where there is none, and then there is no claim about it."""
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return None


def between(low: Point, high: Point) -> Point | None:
    """The settings half way, on a log scale where they are integers; None where nothing lies between."""
    middle = dict(low)
    for name, value in low.items():
        other = high[name]
        if isinstance(value, float):
            middle[name] = (value + other) / 2
        elif isinstance(value, int) and isinstance(other, int):
            middle[name] = round((value * other) ** 0.5) if value > 0 else (value + other) // 2
    return None if middle in (dict(low), dict(high)) else middle


def knob(name: str, *values: float, **fixed: Any) -> Callable[[Searcher], list[Point]]:
    """Points that differ in one setting."""
    return lambda _: [{name: value, **fixed} for value in values]
