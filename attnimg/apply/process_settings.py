"""Restore signal handlers, umask and working directory after a kernel was loaded.

A library may change these when it is imported. The proof refuses such kernels, but the proof may be
a kept one, and an import may behave differently in this process.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

# Signals that stop a run. Their handlers are always set again: Python does not see a handler that C
# code has set.
_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def process_settings_kept() -> Iterator[None]:
    """Restore signal handlers, the signal mask, umask and working directory after the block."""
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    directory = os.open(".", os.O_RDONLY | os.O_DIRECTORY)
    umask = os.umask(0o077)
    os.umask(umask)
    try:
        yield
    finally:
        os.umask(umask)
        os.fchdir(directory)
        os.close(directory)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        # Python lets only the main thread set handlers.
        if threading.current_thread() is threading.main_thread():
            _set(handlers)


def _set(handlers: Mapping[signal.Signals, Any]) -> None:
    for number, handler in handlers.items():
        # None: it was set by C code, and can't be set from here.
        changed = signal.getsignal(number) is not handler or number in _STOPPING
        if handler is not None and changed:
            # SIGKILL and SIGSTOP can't have a handler.
            with suppress(OSError):
                signal.signal(number, handler)
