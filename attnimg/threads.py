"""Compute in several threads, or in none where threads can't start."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any, TypeVar

_THREADS = 4

T = TypeVar("T")
R = TypeVar("R")


def in_threads(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Return the function's result for each item, in order.

    Args:
        function: releases the GIL for most of its time, as reading and hashing do.
        items: what it is called with.
    """
    items = list(items)
    if not _limited():
        try:
            with ThreadPoolExecutor(_THREADS) as pool:
                return list(pool.map(function, items))
        except RuntimeError as error:
            if "start new thread" not in str(error):
                raise
    return [function(item) for item in items]


def executor(threads: int, *, nice: int = 0) -> Executor:
    """Return a pool of threads; where they can't start, one that calls each function at once.

    Args:
        threads: how many, at most.
        nice: what is added to their nice value, 10 to leave a core to a thread that needs it.
    """
    if _limited():
        return _Caller()
    # On Linux the nice value is that of the thread that calls nice(2), not of its process.
    # Source: https://man7.org/linux/man-pages/man2/nice.2.html, "BUGS" (2026-11-27).
    return ThreadPoolExecutor(threads, initializer=os.nice, initargs=(nice,))


class _Caller(Executor):
    """Call each submitted function in the thread that submits it."""

    def submit(self, fn: Callable[..., R], /, *args: Any, **kwargs: Any) -> Future[R]:
        """Return the result, or the error, of a function that is called now."""
        future = Future[R]()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:  # raised by Future.result, as a thread's is
            future.set_exception(error)
        return future


def _limited() -> bool:
    """Return whether `ulimit -v` is set.

    Under it a new thread may fail before it reports that it runs, and threading.Thread.start() then
    waits for ever.
    Source: CPython 3.11, Lib/threading.py, Thread.start, self._started.wait() (2026-11-27).
    """
    return resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY
