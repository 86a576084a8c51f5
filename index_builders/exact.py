"""Builds kind `exact`: there is nothing to build, only rows to check."""

from __future__ import annotations

from dataclasses import dataclass

from index_builders.base import Progress
from vecsvc.blocks import checked_blocks
from vecsvc.indexes.exact import ExactIndex
from vecsvc.types import IndexSpec, Metric, StoredVectors


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildParams:
    """Nothing to choose."""


def build(
    vectors: StoredVectors, *, metric: Metric, params: BuildParams, num_threads: int, seed: int, progress: Progress
) -> ExactIndex:
    """The index over rows (n, dim), which it keeps and does not copy. Raises InvalidVector."""
    for _, rows in checked_blocks(vectors):
        progress(len(rows))
    return ExactIndex(IndexSpec("exact", vectors.shape[1], metric, len(vectors)), vectors)
