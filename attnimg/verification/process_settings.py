"""Read the settings of Python and of the process that a kernel must not change."""

from __future__ import annotations

import ctypes
import decimal
import faulthandler
import gc
import inspect
import locale
import logging
import multiprocessing
import os
import random
import resource
import signal
import socket
import sys
import tempfile
import threading
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np

from attnimg.errors import signal_name
from attnimg.loaded_code import is_of_cute_dsl
from attnimg.verification.torch_settings import torch_settings

# With these variables, OpenMP binds the main thread to CPUs when it first starts other threads.
_BINDING = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")

_LIMITS = [value for name, value in vars(resource).items() if name.startswith("RLIMIT_")]

# Python's default recursion limit.
_RECURSION = 1000

# The lines of /proc/self/status on what the process may do.
_RIGHTS = ("Uid", "Gid", "Groups", "CapEff", "CapPrm", "CapBnd", "NoNewPrivs", "Seccomp",
           "THP_enabled")  # fmt: skip

# A logger whose handler torch removes when it first compiles.
_CHANGED_BY_TORCH = frozenset({"torch.__trace"})


def read_settings() -> dict[str, Any]:
    """Return the settings that a kernel must not change, by name."""
    status = _status()
    numpy_state: Any = np.random.get_state()
    found: dict[str, Any] = torch_settings() | {
        "random numbers of Python": random.getstate(),
        "random numbers of numpy": (numpy_state[1].tobytes(), *numpy_state[2:]),
        "numpy's error state": np.geterr(),
        "rounding mode of floating-point numbers": _rounding(),
        "garbage collection": (gc.isenabled(), gc.get_threshold()),
        "exception and display hooks of Python": (
            _exception_hook(),
            threading.excepthook,
            sys.unraisablehook,
            sys.displayhook,
        ),
        "trace and profile functions of Python": (
            sys.gettrace(),
            sys.getprofile(),
            threading.gettrace(),
            threading.getprofile(),
        ),
        "limits of Python": (
            # A higher limit is allowed; torch's compiler needs it.
            min(sys.getrecursionlimit(), _RECURSION),
            sys.get_int_max_str_digits(),
            threading.stack_size(),
            getattr(sys, "tracebacklimit", None),
        ),
        "bytecode files of Python": (sys.dont_write_bytecode, sys.pycache_prefix),
        "folder for temporary files": tempfile.gettempdir(),
        "decimal numbers": (decimal.getcontext().prec, decimal.getcontext().rounding),
        "sys.stdout, sys.stderr and print": (
            *(sys.stdout, sys.stderr, print),
            *(getattr(stream, "encoding", None) for stream in (sys.stdout, sys.stderr)),
            *(getattr(stream, "errors", None) for stream in (sys.stdout, sys.stderr)),
        ),
        "logging": (
            logging.root.manager.disable,
            logging.getLogger("transformers").getEffectiveLevel(),
        ),
        "root logger": _root_logging(),
        "sys.argv": list(sys.argv),
        "faulthandler": faulthandler.is_enabled(),
        "wakeup file of signals": _wakeup_file(),
        "locale": locale.setlocale(locale.LC_ALL),
        "socket timeout": (socket.getdefaulttimeout(),),
        "standard input, output and error": [_file(number) for number in range(3)],
        "thread switch interval": sys.getswitchinterval(),
        "dlopen flags": sys.getdlopenflags(),
        # The first one is the default, which is only stored once something asks for it.
        "start method of multiprocessing": multiprocessing.get_start_method(allow_none=True)
        or multiprocessing.get_all_start_methods()[0],
        "working directory": _directory(),
        # os.umask only returns the umask when it sets another.
        "umask": status.get("Umask"),
        "blocked signals": frozenset(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
        # signal.getsignal misses the signals that C code ignores.
        "ignored signals": status.get("SigIgn"),
        "users, groups and capabilities": [status.get(name) for name in _RIGHTS],
        "process group and session": (os.getpgrp(), os.getsid(0)),
        "scheduling": (os.sched_getscheduler(0), _read_own("timerslack_ns")),
        "oom_score_adj": _read_own("oom_score_adj"),
        "timers": tuple(
            signal.getitimer(kind)[0] > 0
            for kind in (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF)
        ),
        "priority": os.getpriority(os.PRIO_PROCESS, 0),
        "CPU affinity": _cpus(),
        "resource limits": [resource.getrlimit(kind) for kind in _LIMITS],
    }
    for number in sorted(signal.valid_signals()):
        found[f"signal handler of {signal_name(number)}"] = signal.getsignal(number)
    return found


def _exception_hook() -> object:
    """Return the hook for exceptions, without the CuTe DSL's, which call the one before them."""
    hook: Any = sys.excepthook
    while isinstance(hook, FunctionType) and is_of_cute_dsl(hook):
        names = inspect.getclosurevars(hook)
        before = {**names.globals, **names.nonlocals}
        hook = before.get("origin_excepthook", before.get("_original_excepthook"))
    return hook


def _wakeup_file() -> int:
    """Return the file descriptor of signal.set_wakeup_fd; -1 for none, or in another thread."""
    if threading.current_thread() is not threading.main_thread():
        return -1
    # Python only returns it when it sets another.
    number = signal.set_wakeup_fd(-1)
    if number != -1:
        signal.set_wakeup_fd(number)
    return number


def environment() -> dict[str, str]:
    """Return the environment variables, including those set by C code, which os.environ lacks."""
    entries = ctypes.POINTER(ctypes.c_char_p).in_dll(ctypes.CDLL(None), "environ")
    found, place = dict[str, str](), 0
    # A null pointer after clearenv() was called.
    while entries and (entry := entries[place]) is not None:
        name, _, value = os.fsdecode(entry).partition("=")
        found[name] = value
        place += 1
    return found


def _file(number: int) -> tuple[int, int] | None:
    """Return the identity of an open file; None where it is closed."""
    try:
        found = os.fstat(number)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _rounding() -> tuple[bool, bool]:
    """Return whether additions round upward, and whether they round downward."""
    one, little = 1.0, 2.0**-60
    return one + little > one, one - little < one


def _cpus() -> frozenset[int] | None:
    """Return the CPUs that this thread may run on; None if OpenMP is set to bind threads."""
    if any(name in os.environ for name in _BINDING):
        return None
    return frozenset(os.sched_getaffinity(0))


def _directory() -> str:
    try:
        return str(Path.cwd())
    except OSError as error:  # it was removed
        return f"none: {error.strerror}"


def _status() -> dict[str, str]:
    """Return what Linux shows of this process; a sandbox such as gVisor has fewer lines."""
    text = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace")
    return {name: value.strip() for name, _, value in (x.partition(":") for x in text.splitlines())}


def _read_own(name: str) -> str | None:
    """Return a value of this process; None where Linux does not show it."""
    try:
        return Path("/proc/self", name).read_text(encoding="ascii")
    except OSError:
        return None


def _root_logging() -> tuple[Any, ...]:
    """Return the state of logging that all loggers share.

    The handler that logging.warning() adds where there is none is left out: it writes to stderr, as
    logging does without a handler.
    """
    root = logging.root
    handlers = [x for x in root.handlers if not _is_default_handler(x)]
    return (
        *(root.level, root.disabled, tuple(map(_describe_handler, handlers)), list(root.filters)),
        *(logging.raiseExceptions, logging.lastResort, logging.getLogRecordFactory()),
        *(logging.getLoggerClass(), logging.getLevelName(logging.WARNING)),
    )


def _is_default_handler(handler: logging.Handler) -> bool:
    formatter = handler.formatter
    return (
        type(handler) is logging.StreamHandler
        and handler.stream is sys.stderr
        and not handler.level
        and not handler.filters
        and (formatter is None or formatter._fmt == logging.BASIC_FORMAT)
    )


def _describe_handler(handler: logging.Handler) -> tuple[Any, ...]:
    return id(handler), handler.level, tuple(map(id, handler.filters))


def logger_states() -> dict[str, tuple[Any, ...]]:
    """Return the state of each logger, by name."""
    return {
        name: (
            *(logger.level, logger.disabled, logger.propagate),
            tuple(map(_describe_handler, logger.handlers)),
            tuple(map(id, logger.filters)),
        )
        for name, logger in [*logging.root.manager.loggerDict.items()]
        if isinstance(logger, logging.Logger) and name not in _CHANGED_BY_TORCH
    }


def list_files() -> frozenset[str]:
    """Return the names of the files in the working folder, without those of caches."""
    try:
        names = [path.name for path in Path().iterdir()]
    except OSError:
        return frozenset()
    return frozenset(x for x in names if not x.startswith((".", "__pycache__", "torch_compile_")))
