"""Compute in several threads, or in none where threads can't start."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

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
    # Under `ulimit -v` a new thread may fail before it reports that it runs, and
    # threading.Thread.start() then waits for ever.
    # Source: CPython 3.11, Lib/threading.py, Thread.start, self._started.wait() (2026-11-27).
    limited = resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY
    if not limited:
        try:
            with ThreadPoolExecutor(_THREADS) as pool:
                return list(pool.map(function, items))
        except RuntimeError as error:
            if "start new thread" not in str(error):
                raise
    return [function(item) for item in items]
