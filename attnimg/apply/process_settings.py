"""Keep what a run relies on from a kernel that is loaded: signals, umask, working directory.

A library may set signal handlers or change the directory when it is imported. The proof refuses
kernels that do, in a process of its own; what is kept here holds where a proof was kept, or where
the import does something else in this process.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

# Signals by which a run is stopped, whose handlers are set again even if they look the same: one
# that C code set does not show in Python.
_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def process_settings_kept() -> Iterator[None]:
    """Set signal handlers, the signal mask, umask and working directory again after the block."""
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
        # Python allows no other thread to set them.
        if threading.current_thread() is threading.main_thread():
            _set(handlers)


def _set(handlers: Mapping[signal.Signals, Any]) -> None:
    for number, handler in handlers.items():
        # None: it was set by C code, and can't be set from here.
        changed = signal.getsignal(number) is not handler or number in _STOPPING
        if handler is not None and changed:
            # SIGKILL and SIGSTOP have none.
            with suppress(OSError):
                signal.signal(number, handler)
