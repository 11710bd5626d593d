"""Check that loading and calling a kernel does not change the state of the process.

A kernel may compute correct results and still affect the run: it may change a default of torch,
the working directory or a signal handler, or leave files open after each call. The checks:

- settings stay the same from before the import to the end: those of torch and its compilers,
  Python's and numpy's random numbers, Python's hooks and garbage collection, rounding, working
  directory, umask, rights, signals, timers, limits (process_settings.py and torch_settings.py; for
  torch's random numbers, see random_state.py);
- the functions of torch that models call are not replaced, nor is code of any loaded module (see
  loaded_code.py);
- standard input, output and error stay the same files, and no folder of modules or import hook is
  put before others;
- no module of Python, numpy or torch is removed or takes the place of another;
- existing environment variables keep their values, and none that other software reads is added. A
  library may set variables of its own on import or in its first calls;
- loggers of other packages stay as they are, and so does the root logger. A library may have
  loggers of its own;
- no file is added to the working folder or removed from it;
- no filter silences all warnings, and existing filters stay;
- open files, threads, child processes, memory, filters, created files and bytes of output may grow
  on import and in first calls, for caches, pools and compilers. Then the same call is repeated in
  ROUNDS rounds: what grows in every round is a leak.

In training, RunState compares the settings that attnimg and its packages leave as they are.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch

from attnimg.errors import signal_name
from attnimg.loaded_code import LoadedCode
from attnimg.run_facts import Reason
from attnimg.verification.process_settings import (
    environment,
    list_files,
    logger_states,
    read_settings,
)
from attnimg.verification.torch_settings import (
    compiler_settings,
    list_functions,
    replaced_functions,
)

# Calls per round, and rounds. They follow hundreds of probes, which have filled all caches.
CALLS, ROUNDS = 6, 3

# Growth of memory in a round that counts as a leak, as a share of the bytes that the calls return.
# The allocator's own growth is smaller.
_LEAK_SHARE = 0.1

# The smallest growth in a round that counts: glibc's allocator takes and returns memory in steps of
# this size.
_LEAK_BYTES = 64 << 10

# How many more files, threads or child processes than after the first probe are allowed: compilers
# start pools of them.
MAX_MORE = 128

# Prefixes of environment variables that are read by software other than the kernel's own library.
_READ_BY_OTHERS = (
    "ACCELERATE_", "ATTNIMG_", "CUBLAS_WORKSPACE_CONFIG", "CUDA_DEVICE_ORDER",
    "CUDA_LAUNCH_BLOCKING", "CUDA_VISIBLE_DEVICES", "FLASH_ATTENTION_DETERMINISTIC", "GROUP_RANK",
    "HF_", "HIP_VISIBLE_DEVICES", "HOME", "HTTP_PROXY", "HTTPS_PROXY", "LANG", "LC_",
    "LD_LIBRARY_PATH", "LD_PRELOAD", "LOCAL_KERNELS", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_",
    "MKL_", "NCCL_", "NVIDIA_TF32_OVERRIDE", "NVIDIA_VISIBLE_DEVICES", "OMP_", "PATH", "PYTHON",
    "PYTORCH_", "RANK", "ROCR_VISIBLE_DEVICES", "TMPDIR", "TORCH_ALLOW_TF32", "TOKENIZERS_",
    "TRANSFORMERS_", "TZ", "WANDB_", "WORLD_SIZE", "http_proxy", "https_proxy",
)  # fmt: skip

# Set by torch itself, when it first compiles or uses a GPU.
_SET_BY_TORCH = frozenset({"PYTORCH_NVML_BASED_CUDA_CHECK"})

_UNSET = object()

# What the trainer and its packages change while they train: data loaders, trackers, progress bars.
# The administrator of a machine may change priority, CPUs and limits of a process that runs.
_CHANGED_IN_RUNS = (
    "random numbers of Python", "random numbers of numpy", "exception and display hooks of Python",
    "sys.stdout, sys.stderr and print", "logging", "wakeup file of signals", "socket timeout",
    "priority", "CPU affinity", "resource limits", "scheduling", "oom_score_adj",
    "start method of multiprocessing", "registered kernels of torch's operators", "torch.load",
    "numpy's error state", "folder for temporary files", "decimal numbers", "faulthandler",
    "locale",
)  # fmt: skip
_SIGNALS_OF_RUNS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE}
_VARIABLES_OF_RUNS = (
    "CUDA_VISIBLE_DEVICES", "HOME", "LD_LIBRARY_PATH", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT",
    "OMP_NUM_THREADS", "PATH", "PYTHONPATH", "RANK", "TMPDIR", "WORLD_SIZE",
)  # fmt: skip

# The code that computes a step and saves its result.
_CODE_OF_RUNS = (
    "accelerate.accelerator", "accelerate.optimizer", "attnimg.train", "builtins", "json", "os",
    "peft.tuners", "safetensors", "torch._tensor", "torch.autograd", "torch.functional", "torch.nn",
    "torch.optim", "torch.utils.checkpoint", "transformers.loss", "transformers.masking_utils",
    "transformers.modeling_utils", "transformers.models", "transformers.optimization",
    "transformers.trainer", "transformers_modules", "trl.trainer",
)  # fmt: skip


class ProcessState:
    """The state of the process when the object was created."""

    def __init__(self) -> None:
        # First, since it imports transformers, which sets up logging.
        self._functions = list_functions()
        self._settings = read_settings()
        self._code = LoadedCode()
        self._folders = list(sys.path)
        self._hooks = list(sys.meta_path)
        self._modules = {
            name: loaded for name, loaded in sys.modules.items() if _is_shared_module(name)
        }
        self._environment = environment()
        self._filters = list(warnings.filters)
        self._loggers, self._compilers = logger_states(), compiler_settings()
        self._files = list_files()
        self._counts: dict[str, int] | None = None

    def changes(self) -> list[str]:
        """Return the names of the settings that changed, with details; [] if none did."""
        return [
            *_describe_changes(self._settings, read_settings()),
            *replaced_functions(self._functions),
            *self._environment_changes(),
            *self._filter_changes(),
            *self._import_changes(),
            *self._logging_changes(),
            *self._compiler_changes(),
            *self._file_changes(),
        ]

    def replaced_code(self) -> list[str]:
        """Return the code of loaded modules that code of another package replaced."""
        return self._code.replaced()

    def _logging_changes(self) -> Iterator[str]:
        now = logger_states()
        for name, before in self._loggers.items():
            if now.get(name) != before:
                yield f"logging: the logger {name} was changed"

    def _compiler_changes(self) -> Iterator[str]:
        now = compiler_settings()
        for name in sorted({*self._compilers, *now}):
            if self._compilers.get(name, _UNSET) != now.get(name, _UNSET):
                yield f"{name} was changed"

    def _file_changes(self) -> Iterator[str]:
        now = list_files()
        for verb, names in (("added", now - self._files), ("removed", self._files - now)):
            if names:
                found = ", ".join(sorted(names)[:3])
                yield f"files in the working folder {verb}: {found[:100]!r}"

    def _import_changes(self) -> Iterator[str]:
        if sys.path[: len(self._folders)] != self._folders:
            yield "sys.path: entries were removed or put first"
        # setuptools puts a hook first when it is imported, as compilers of kernels do.
        hooks = [x for x in sys.meta_path if x in self._hooks or not _is_of_setuptools(x)]
        if hooks[: len(self._hooks)] != self._hooks:
            yield "sys.meta_path: a hook was removed or put first"
        for name, loaded in self._modules.items():
            if sys.modules.get(name) is not loaded:
                yield f"sys.modules: {name} was removed or replaced"

    def count_changes(self) -> list[str]:
        """Return the counts that grew by more than MAX_MORE since the first call of this method."""
        counts = _counts()
        if self._counts is None:
            self._counts = counts
        return [
            f"{name}: {counts[name] - before} more than after the first probe"
            for name, before in self._counts.items()
            if counts[name] - before > MAX_MORE
        ]

    def _environment_changes(self) -> Iterator[str]:
        now = environment()
        for name in sorted({*self._environment, *now}):
            before, after = self._environment.get(name), now.get(name)
            if before == after or name in _SET_BY_TORCH:
                continue
            if before is None and not name.startswith(_READ_BY_OTHERS):
                continue
            # No values: they may be secret.
            verb = "set" if before is None else "unset" if after is None else "changed"
            yield f"environment: {name} was {verb}"

    def _filter_changes(self) -> Iterator[str]:
        lost = [entry for entry in self._filters if entry not in warnings.filters]
        if lost:
            yield f"warnings filters: {len(lost)} of {len(self._filters)} were removed"
        for entry in warnings.filters:
            action, message, category, module, line = entry
            whole = category is Warning and not (message or module or line)
            if whole and action in ("ignore", "error") and entry not in self._filters:
                yield f"warnings filters: the action for every warning is {action}"


class RunState:
    """The settings of a training process that nothing in the trainer changes between two steps.

    Reading and comparing them takes about 10 ms.
    """

    def __init__(self) -> None:
        self._functions = list_functions()
        self._code = LoadedCode(_CODE_OF_RUNS)
        self._settings = _run_settings()
        # Renaming or removing the folder changes its path; it stays the working directory.
        self._directory = _working_directory()
        # Closing a terminal changes them.
        self._terminals = frozenset(number for number in range(3) if os.isatty(number))

    def changes(self) -> list[str]:
        """Return the names of the settings that changed, with details; [] if none did."""
        after = _run_settings()
        if self._directory and self._directory == _working_directory():
            after["working directory"] = self._settings["working directory"]
        files = "standard input, output and error"
        for number in self._terminals:
            self._settings[files][number] = after[files][number]
        return [
            *_describe_changes(self._settings, after),
            *replaced_functions(self._functions),
            *self._code.replaced(),
        ]


def _working_directory() -> tuple[int, int] | None:
    """Return the identity of the working directory; None where the system does not show it."""
    try:
        found = Path().stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _run_settings() -> dict[str, Any]:
    found = read_settings()
    for name in _CHANGED_IN_RUNS:
        del found[name]
    for number in signal.valid_signals() - _SIGNALS_OF_RUNS:
        del found[f"signal handler of {signal_name(number)}"]
    variables = environment()
    for name in _VARIABLES_OF_RUNS:
        # No values: they may be secret.
        found[f"environment: {name}"] = _Hidden(variables.get(name))
    return found


class _Hidden:
    """A value that is compared and not shown."""

    def __init__(self, value: object) -> None:
        self._value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Hidden) and other._value == self._value

    __hash__ = None  # type: ignore[assignment]  # only compared

    def __repr__(self) -> str:
        return "one value"


def _describe_changes(before: dict[str, Any], after: dict[str, Any]) -> Iterator[str]:
    for name, value in before.items():
        now = after[name]
        if now == value:
            continue
        if isinstance(value, frozenset) and isinstance(now, frozenset):
            words = {"added": now - value, "removed": value - now}
            found = [f"{len(x)} {verb} ({min(map(str, x))})" for verb, x in words.items() if x]
            yield f"{name}: {', '.join(found)}"
        elif len(str(value)) > 80 or isinstance(value, _Hidden):
            yield f"{name} changed"
        else:
            yield f"{name} was {value}, is {now}"


def process_state_reason(changes: list[str], *, when: str) -> Reason:
    """Return the reason for a kernel that changed the process."""
    return Reason(code="process-state", text=f"{when}: {'; '.join(changes)}")


def leaks(call: Callable[[], int]) -> list[str]:
    """Repeat a call, and return which counts grow with each repetition.

    Args:
        call: makes a call of a shape that was called before, and returns the size of its results
            in bytes.
    """
    # Restricts garbage collection to objects of these calls: with all it would take 0.2 s each.
    gc.freeze()
    try:
        # Measured twice, since the heap may also grow for other reasons.
        return _leaks(call) and _leaks(call)
    finally:
        gc.unfreeze()


def _leaks(call: Callable[[], int]) -> list[str]:
    size = call()
    before, growth_per_round = _measure(), dict[str, list[int]]()
    variables = set(environment())
    for _ in range(ROUNDS):
        for _ in range(CALLS):
            call()
        after = _measure()
        for name, value in after.items():
            growth_per_round.setdefault(name, []).append(value - before[name])
        before = after
    least = {"memory": max(_LEAK_BYTES, int(_LEAK_SHARE * size * CALLS))}
    found = [
        f"{name}: {sum(growth)} more after {ROUNDS * CALLS} equal calls"
        for name, growth in growth_per_round.items()
        if min(growth) >= least.get(name, CALLS // 2)
    ]
    added = sorted(set(environment()) - variables)
    return found + [f"environment: {name} was set by a repeated call" for name in added]


def _is_shared_module(name: str) -> bool:
    package = name.partition(".")[0]
    return package in sys.stdlib_module_names or package in ("numpy", "torch")


def _is_of_setuptools(hook: object) -> bool:
    return type(hook).__module__.startswith(("_distutils_hack", "setuptools"))


def _counts() -> dict[str, int]:
    tasks = list(Path("/proc/self/task").iterdir())
    children = 0
    for task in tasks:
        try:
            children += len((task / "children").read_text(encoding="ascii").split())
        except OSError:  # the thread ended
            continue
    return {
        "open files": len(list(Path("/proc/self/fd").iterdir())),
        "threads": len(tasks),
        "children": children,
    }


@cache
def _created_files() -> set[str]:
    """Return the set of files and folders that Python code of this process creates from now on."""
    created: set[str] = set()

    def record(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            creates = isinstance(flags, int) and bool(flags & os.O_CREAT)
        else:
            path, creates = arguments[0] if arguments else None, event == "os.mkdir"
        if creates and isinstance(path, str | bytes):
            with suppress(OSError):  # the working folder was removed
                created.add(str(Path.cwd() / os.fsdecode(path)))

    sys.addaudithook(record)
    return created


def _measure() -> dict[str, int]:
    """Return the counts that a leaking call increases."""
    gc.collect()
    # Free memory is returned to the system, so that only memory in use is counted.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    memory = pages * os.sysconf("SC_PAGE_SIZE")
    if torch.cuda.is_available():
        memory += torch.cuda.memory_allocated()
    return {
        **_counts(),
        "memory": memory,
        "warnings filters": len(warnings.filters),
        "files left": sum(map(os.path.lexists, _created_files())),
        "exit handlers": atexit._ncallbacks(),
        "bytes of output": os.fstat(2).st_size,
    }
