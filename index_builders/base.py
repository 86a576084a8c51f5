"""What every builder promises, and the table that names them.

A builder is a module that the entry-point group `vecsvc.index_builders` names. It has

    BuildParams               a frozen dataclass of `config.option`s
    build(...) -> Index       as BuilderModule says: the finished index, in memory

and where the kind has a knob of recall, `operating_points(spec)`: the search settings, the cheapest first,
among which the certificate measures recall and picks the default.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol, TypeAlias, cast

from index_builders.progress import no_progress
from vecsvc.config import make
from vecsvc.errors import InvalidParameter
from vecsvc.indexes.base import Index, check_build, import_kind
from vecsvc.types import METRICS, IndexSpec, Metric, StoredVectors

GROUP: Final = "vecsvc.index_builders"
EXACT_UP_TO: Final = 10_000  # vectors below which comparing all is fast enough for `auto`
TREE_UP_TO: Final = 12  # dimensions in which a KD-tree is exact and fast, and nng's codes cannot tell neighbours apart

Progress: TypeAlias = Callable[[int], None]  # told how many more rows are done


class BuilderModule(Protocol):
    BuildParams: type

    @staticmethod
    def build(
        vectors: StoredVectors, *, metric: Metric, params: Any, num_threads: int, seed: int, progress: Progress
    ) -> Index: ...


@functools.cache
def _table() -> dict[str, importlib.metadata.EntryPoint]:
    return {point.name: point for point in importlib.metadata.entry_points(group=GROUP)}


def module(kind: str) -> BuilderModule:
    return cast(BuilderModule, import_kind(_table(), kind, "auto"))


def choose(kind: str, size: int, dim: int, params: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """What `auto` means for vectors (size, dim): all compared while that is fast, then a tree or the graph."""
    if kind != "auto":
        return kind, dict(params)
    if params:
        raise InvalidParameter(f"kind auto takes no parameters, got {', '.join(params)}: name a kind")
    if size <= EXACT_UP_TO:
        return "exact", {}
    return ("kd_tree" if dim <= TREE_UP_TO else "nng"), {}


def build_params(kind: str, values: Mapping[str, Any]) -> Any:
    """The kind's frozen build dataclass, checked."""
    return make(module(kind).BuildParams, values, what=kind)


def build(
    vectors: StoredVectors,
    *,
    kind: str = "auto",
    metric: Metric = "cosine",
    params: Mapping[str, Any] | None = None,
    num_threads: int = 0,
    seed: int = 7,
    progress: Progress = no_progress,
) -> Index:
    """Build an index over rows (n, dim) of float32 or float16; labels follow their order.

    `num_threads` 0 means one a core; one thread and the same arguments give the same index.
    Raises UnknownKind, BackendMissing, UnknownParameter, InvalidParameter or DimensionMismatch.
    """
    check_build(vectors)
    if metric not in METRICS:
        raise InvalidParameter(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")
    kind, values = choose(kind, len(vectors), vectors.shape[1], params or {})
    return module(kind).build(
        vectors,
        metric=metric,
        params=build_params(kind, values),
        num_threads=num_threads or os.cpu_count() or 1,
        seed=seed,
        progress=progress,
    )


def operating_points(spec: IndexSpec) -> list[dict[str, Any]]:
    """Search settings worth measuring for this index, the cheapest first; one empty dict where there is no knob."""
    points = getattr(module(spec.kind), "operating_points", None)
    return points(spec) if points else [{}]
