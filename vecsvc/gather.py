"""Questions that wait for a thread go together with those of their kind that wait too, as one batch.

There is no timer, and a question that finds a thread free goes alone and at once. One that has to wait lets others join
it until its turn comes: a matrix product reads all vectors once, for however many queries. Where a batch costs as much
as its parts, nothing is won, and nothing should be sent here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Executor, Future
from typing import Any, Final, Generic, TypeVar

Q = TypeVar("Q")
R = TypeVar("R")

MAX_TOGETHER: Final = 64  # questions in one run: the last to join waits for all of them


class Gather(Generic[Q, R]):
    """Hands questions to the threads of a pool, those that wait under the same key in one run."""

    def __init__(
        self, pool: Executor, run: Callable[[list[Q]], list[R | Exception]], limit: int = MAX_TOGETHER
    ) -> None:
        """`run` is called in a thread and gives each question its result, or its own error."""
        self._pool, self._run, self._limit = pool, run, limit
        self._lock = threading.Lock()  # held for a look-up, by the event loop and by threads that begin a run
        self._waiting: dict[Hashable, list[tuple[Q, Future[R]]]] = {}

    def submit(self, key: Hashable, question: Q) -> Future[R]:
        """What becomes of the question; it may be cancelled as long as it waits."""
        future: Future[R] = Future()
        with self._lock:
            waiting = self._waiting.get(key)
            if waiting is not None and len(waiting) < self._limit:
                waiting.append((question, future))
                return future
            batch = [(question, future)]
            self._waiting[key] = batch
        turn = self._pool.submit(self._go, key, batch)
        turn.add_done_callback(lambda turn: self._drop(key, batch) if turn.cancelled() else None)
        return future

    def _close(self, key: Hashable, batch: list[tuple[Q, Future[R]]]) -> None:
        """From here on nobody joins."""
        with self._lock:
            if self._waiting.get(key) is batch:
                del self._waiting[key]

    def _drop(self, key: Hashable, batch: list[tuple[Q, Future[R]]]) -> None:
        """The pool was closed before its turn came."""
        self._close(key, batch)
        for _, future in batch:
            future.cancel()

    def _go(self, key: Hashable, batch: list[tuple[Q, Future[R]]]) -> None:
        self._close(key, batch)
        going = [(question, future) for question, future in batch if future.set_running_or_notify_cancel()]
        if not going:
            return
        results: list[Any]
        try:
            results = self._run([question for question, _ in going])
            if len(results) != len(going):
                raise AssertionError(f"{len(going)} questions got {len(results)} results")
        except Exception as error:
            results = [error] * len(going)
        for (_, future), result in zip(going, results, strict=True):
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)
