"""An event loop whose clock runs only while it waits, so that a test of timeouts takes no time and depends on none."""

from __future__ import annotations

import asyncio
import selectors
import types
from collections.abc import Coroutine
from typing import Any, TypeVar

import pytest

T = TypeVar("T")


class _Selector(selectors.SelectSelector):
    """Instead of waiting for files it moves the clock on."""

    loop: VirtualLoop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        assert timeout is not None, "everybody waits, and nothing will ever happen"
        self.loop.now += timeout
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self.now = 1000.0
        selector = _Selector()
        selector.loop = self
        super().__init__(selector)

    def time(self) -> float:
        return self.now

    def close(self) -> None:
        super().close()


def run(made: Coroutine[Any, Any, T], monkeypatch: pytest.MonkeyPatch, *modules: types.ModuleType) -> T:
    """Run until done; the modules' `time.monotonic()` is the loop's clock meanwhile."""
    loop = VirtualLoop()
    for module in modules:
        monkeypatch.setattr(module, "time", types.SimpleNamespace(monotonic=loop.time))
    try:
        return loop.run_until_complete(made)
    finally:
        loop.close()
