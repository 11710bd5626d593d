"""Check that loading and calling a kernel does not change the state of the process.

A kernel may compute correct results and still affect the run: it may change a default of torch,
the working directory or a signal handler, or leave files open after each call. The checks:

- settings stay the same from before the import to the end: those of torch,
  Python's and numpy's random numbers, Python's hooks and garbage collection, rounding, working
  directory, umask, signals, timers, limits (for torch's random numbers, see is_rewound);
- the functions of torch that models call are not replaced, nor is code of any loaded module by
  that of another package (see loaded_code.py);
- standard input, output and error stay the same files, and no folder of modules or import hook is
  put before others;
- no module of Python, numpy or torch is removed or takes the place of another;
- existing environment variables keep their values, and none that other software reads is added. A
  library may set variables of its own on import or in its first calls;
- no filter silences all warnings, and existing filters stay;
- open files, threads, child processes, memory, filters and bytes of output may grow on import and
  in first calls, for caches, pools and compilers. Then the same call is repeated in ROUNDS rounds:
  what grows in every round is a leak.
"""

from __future__ import annotations

import atexit
import ctypes
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
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.modules import module

from attnimg.errors import signal_name
from attnimg.loaded_code import LoadedCode
from attnimg.run_facts import Reason

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

# With these variables, OpenMP binds the main thread to CPUs when it first starts other threads.
_BINDING = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")

_LIMITS = [value for name, value in vars(resource).items() if name.startswith("RLIMIT_")]


class ProcessState:
    """The state of the process when the object was created."""

    def __init__(self) -> None:
        # First, since it imports transformers, which sets up logging.
        self._functions = _functions()
        self._settings = _settings()
        self._code = LoadedCode()
        self._folders = list(sys.path)
        self._hooks = list(sys.meta_path)
        self._modules = {
            name: loaded for name, loaded in sys.modules.items() if _is_shared_module(name)
        }
        self._environment = _environment()
        self._filters = list(warnings.filters)
        self._counts: dict[str, int] | None = None

    def changes(self) -> list[str]:
        """Return the names of the settings that changed, with details; [] if none did."""
        after = _settings()
        return [
            *(
                f"{name} was {before}, is {after[name]}"
                if len(str(before)) <= 80
                else f"{name} changed"
                for name, before in self._settings.items()
                if after[name] != before
            ),
            *_replaced(self._functions),
            *self._environment_changes(),
            *self._filter_changes(),
            *self._import_changes(),
        ]

    def replaced_code(self) -> list[str]:
        """Return the code of loaded modules that code of another package replaced."""
        return self._code.replaced()

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
        now = _environment()
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
    environment = set(_environment())
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
    added = sorted(set(_environment()) - environment)
    return found + [f"environment: {name} was set by a repeated call" for name in added]


def _settings() -> dict[str, Any]:
    """Return the settings that a kernel must not change, by name."""
    numpy_state: Any = np.random.get_state()
    found: dict[str, Any] = _torch_settings() | {
        "random numbers of Python": random.getstate(),
        "random numbers of numpy": (numpy_state[1].tobytes(), *numpy_state[2:]),
        "floating-point errors of numpy": np.geterr(),
        "rounding of floating-point numbers": _rounding(),
        "garbage collection": (gc.isenabled(), gc.get_threshold()),
        "hooks of Python": (
            sys.excepthook,
            threading.excepthook,
            sys.unraisablehook,
            sys.gettrace(),
            sys.getprofile(),
        ),
        "output of Python": (sys.stdout, sys.stderr, print),
        "logging": (
            logging.root.manager.disable,
            logging.getLogger("transformers").getEffectiveLevel(),
        ),
        "arguments of Python": list(sys.argv),
        "handler of crashes": faulthandler.is_enabled(),
        "file that signals write to": _wakeup_file(),
        "locale": locale.setlocale(locale.LC_ALL),
        "timeout of sockets": (socket.getdefaulttimeout(),),
        "standard input, output and error": [_file(number) for number in range(3)],
        "seconds between switches of threads": sys.getswitchinterval(),
        "flags of dlopen": sys.getdlopenflags(),
        # The first one is the default, which is only stored once something asks for it.
        "start method of processes": multiprocessing.get_start_method(allow_none=True)
        or multiprocessing.get_all_start_methods()[0],
        "working directory": _directory(),
        # os.umask only returns the umask when it sets another.
        "umask": _status("Umask"),
        "signals blocked": frozenset(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
        # signal.getsignal misses the signals that C code ignores.
        "signals ignored": _status("SigIgn"),
        "timers": tuple(
            signal.getitimer(kind)[0] > 0
            for kind in (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF)
        ),
        "priority": os.getpriority(os.PRIO_PROCESS, 0),
        "CPUs": _cpus(),
        "resource limits": [resource.getrlimit(kind) for kind in _LIMITS],
    }
    for number in sorted(signal.valid_signals()):
        found[f"signal handler of {signal_name(number)}"] = signal.getsignal(number)
    return found


def _wakeup_file() -> int:
    """Return the descriptor that each signal writes to; -1 for none, or outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        return -1
    # Python only returns it when it sets another.
    number = signal.set_wakeup_fd(-1)
    if number != -1:
        signal.set_wakeup_fd(number)
    return number


def _is_shared_module(name: str) -> bool:
    package = name.partition(".")[0]
    return package in sys.stdlib_module_names or package in ("numpy", "torch")


def _is_of_setuptools(hook: object) -> bool:
    return type(hook).__module__.startswith(("_distutils_hack", "setuptools"))


def _environment() -> dict[str, str]:
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


def _status(name: str) -> str:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(line.split()[1] for line in lines if line.startswith(f"{name}:"))


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
        "exit handlers": atexit._ncallbacks(),
        "bytes of output": os.fstat(2).st_size,
    }


# The CPU's generator is a Mersenne Twister, which generates this many words at a time.
_BLOCK = 624

# Blocks that a call without dropout may draw on the CPU: 640 000 numbers, far more than a kernel
# needs for a seed or a rotation.
_BLOCKS = 1024

# The position of these words in the generator's state, 8 bytes each. Source: torch 2.13.0,
# aten/src/ATen/CPUGeneratorImpl.cpp, CPUGeneratorImplStateLegacy: seed, left and seeded, next,
# state[624] (2026-11-26).
_WORDS = slice(3 * 8, (3 + _BLOCK) * 8)


def draw_and_read_states(device: torch.device) -> dict[str, Tensor]:
    """Draw a number from each generator, so that seeding changes its state; return the states."""
    torch.rand(())
    if device.type == "cuda":
        torch.rand((), device=device)
    return _states(device)


def is_rewound(before: dict[str, Tensor], device: torch.device) -> bool:
    """Return whether a call seeded a generator or set it to an earlier state.

    Drawing numbers is allowed: some kernels reserve random numbers, or draw a seed of their own.
    """
    after = _states(device)
    if not _is_ahead(before["cpu"], after["cpu"]):
        return True
    if "cuda" not in before:
        return False
    # A seed and an offset.
    (seed, offset), (seed_after, offset_after) = (
        states["cuda"].view(torch.int64).tolist() for states in (before, after)
    )
    return bool(seed != seed_after or offset_after < offset)


def _is_ahead(before: Tensor, after: Tensor) -> bool:
    """Return whether the CPU's generator gets from one state to the other only by drawing."""
    if torch.equal(before, after):
        return True
    replay = torch.Generator()
    replay.set_state(before)
    for _ in range(_BLOCKS):
        if torch.equal(replay.get_state()[_WORDS], after[_WORDS]):
            # In the same block: it is ahead if no more words are left than before.
            return _left(after) <= _left(replay.get_state())
        # Each number takes one word.
        torch.rand(_left(replay.get_state()), generator=replay)
    return False


def _left(state: Tensor) -> int:
    """Return how many words of its block a CPU generator has left, 1 to 624."""
    return int(state[8:12].view(torch.int32).item())


def _states(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


# Replaced by torch itself: torch._dynamo wraps it when it is first imported.
_REPLACED_BY_TORCH = frozenset({"manual_seed"})


def _torch_settings() -> dict[str, Any]:
    """Return the settings of torch that a kernel must not change, by name."""
    return {
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "float32 matmul precision": _precision(),
        "reduced precision in float16 sums": (
            torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction
        ),
        "reduced precision in bfloat16 sums": (
            torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
        ),
        "deterministic algorithms": (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.backends.cudnn.deterministic,
        ),
        "cuDNN benchmark": torch.backends.cudnn.benchmark,
        "libraries in use": (torch.backends.cudnn.enabled, torch.backends.mkldnn.enabled),
        "kernels of scaled_dot_product_attention": (
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
            torch.backends.cuda.cudnn_sdp_enabled(),
        ),
        "gradient mode": torch.is_grad_enabled(),
        "anomaly detection": torch.is_anomaly_enabled(),
        "threads of autograd": torch._C._is_multithreading_enabled(),
        "hooks of saved tensors": (
            torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        ),
        "modes of torch": (
            torch._C._len_torch_function_stack(),
            torch._C._len_torch_dispatch_stack(),
        ),
        "hooks of all modules": tuple(
            len(hooks)
            for hooks in (
                module._global_forward_pre_hooks,
                module._global_forward_hooks,
                module._global_backward_pre_hooks,
                module._global_backward_hooks,
            )
        ),
        "autocast": tuple(
            (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in ("cpu", "cuda")
        ),
        "printing of tensors": vars(torch._tensor_str.PRINT_OPTS).copy(),
        "filling of new tensors": torch.utils.deterministic.fill_uninitialized_memory,
        "torch.compile": _compiles(),
        "cache of autocast": torch.is_autocast_cache_enabled(),
        "sharing of tensors": torch.multiprocessing.get_sharing_strategy(),
        "threads of torch": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "flush-denormal": _flushes_denormals(),
    }


def _precision() -> tuple[str, ...]:
    """Return the precision of float32 products: from torch's old settings, or new ones if set."""
    try:
        return (torch.get_float32_matmul_precision(), str(torch.backends.cudnn.allow_tf32))
    # torch raises when the old settings are read and contradict the new ones.
    except RuntimeError:
        parts = (
            torch.backends.cuda.matmul,
            torch.backends.cudnn.conv,
            torch.backends.mkldnn.matmul,
        )
        return tuple(str(getattr(part, "fp32_precision", None)) for part in parts)


def _compiles() -> bool:
    """Return whether torch.compile compiles; torch reads the variable when it is first used."""
    config = sys.modules.get("torch._dynamo.config")
    disabled = os.environ.get("TORCH_COMPILE_DISABLE", "0") == "1"
    return not (disabled if config is None else config.disable)


def _flushes_denormals() -> bool:
    """Return whether this thread's arithmetic replaces denormal numbers by 0."""
    smallest = torch.full((1,), 1e-310, dtype=torch.float64, device="cpu")
    return bool((smallest * 1.0 == 0).item())


def _functions() -> list[tuple[str, Mapping[str, Any], str, Any]]:
    """Return the functions of torch, and transformers' attention functions.

    Those of torch are all in torch and torch.nn.functional, tensor methods, and forward of torch.nn
    modules. Each has its owner's name, the owner's values, its own name, and itself.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    owners: list[tuple[str, Mapping[str, Any]]] = [
        ("torch", vars(torch)),
        ("torch.nn.functional", vars(torch.nn.functional)),
        ("torch.Tensor", vars(torch.Tensor)),
        ("attention of transformers", ALL_ATTENTION_FUNCTIONS._global_mapping),
    ]
    functions = [
        (owner, values, name, value)
        for owner, values in owners
        for name, value in values.items()
        if inspect.isroutine(value) and not name.startswith("_") and name not in _REPLACED_BY_TORCH
    ]
    return functions + [
        (f"torch.nn.{name}", vars(kind), "forward", vars(kind)["forward"])
        for name, kind in vars(torch.nn).items()
        if inspect.isclass(kind) and "forward" in vars(kind)
    ]


def _replaced(functions: list[tuple[str, Mapping[str, Any], str, Any]]) -> list[str]:
    """Return the names of the functions that were replaced since they were listed."""
    return [
        f"{owner}: {name} was replaced"
        for owner, values, name, value in functions
        if values.get(name) is not value
    ]
