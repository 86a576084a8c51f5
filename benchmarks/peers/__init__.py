"""The systems that stand side by side in recall_qps.py: every kind of vecsvc, and the libraries that others use.

`systems()` is the table; `base.py` says what a system is, and `worker.py` runs one in a process of its own.
"""

from __future__ import annotations

from peers.base import System
from peers.kinds import kinds
from peers.libraries import LIBRARIES


def systems() -> dict[str, System]:
    """Every system by its name, ours first; whether its package is installed is another question."""
    return {system.name: system for system in (*kinds(), *LIBRARIES)}


def find(name: str) -> System:
    return systems()[name]
