"""Raise for environment variables that break a run or contradict its config; silence libraries.

accelerate and transformers read settings from environment variables, which `accelerate launch`
exports, if their caller passes none. A variable that agrees with the config is allowed.

Source: accelerate 1.15.0 (utils/launch.py, accelerator.py, state.py, utils/dataclasses.py),
transformers 5.22.2 (training_args.py, distributed/fsdp.py), torch 2.13 (_dynamo/config.py,
_inductor/config.py, distributed/__init__.py), huggingface_hub 2.4.0 (constants.py), datasets 5.2.0
(config.py) and tqdm (utils.py, envwrap), each searched for os.environ and getenv (2026-11-27).
"""

from __future__ import annotations

import linecache
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from attnimg.config.schema import Config, trackers
from attnimg.errors import AttnimgError
from attnimg.machine.container import can_write
from attnimg.machine.threads import read_threads
from attnimg.redact import redact
from attnimg.run_facts import Problem

_TRUE = frozenset({"y", "yes", "t", "true", "on", "1"})

_FALSE = frozenset({"n", "no", "f", "false", "off", "0"})

_PRECISIONS = {"bfloat16": "bf16", "float16": "fp16"}

_LEVELS = logging.getLevelNamesMapping()

# Number of innermost stack frames of an error in which a library may have read the variable.
_INNERMOST_FRAMES = 3

_PACKAGE_FOLDER = str(Path(__file__).parents[1])

_VARIABLE = re.compile(r"\b[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+\b")


def _is_flag(text: str) -> bool:
    return text.lower() in _TRUE | _FALSE


def _is_count(text: str) -> bool:
    return text.isascii() and text.strip().isdigit()


def _are_threads(text: str) -> bool:
    return read_threads(text) is not None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


# Variables that a library reads, and that raise an error if it can't use them: the names, the
# needed value, and its test.
_PARSED: tuple[tuple[tuple[str, ...], str, Callable[[str], bool]], ...] = (
    (
        ("ACCELERATE_CPU_AFFINITY", "ACCELERATE_DEBUG_MODE", "ACCELERATE_ENABLE_RICH",
         "ACCELERATE_INIT_INCLUDE_BUFFERS", "FORK_LAUNCHED", "USE_TORCH_XLA"),
        "true or false",
        _is_flag,
    ),
    (
        ("PYTORCH_JIT",),
        "0 or 1",
        lambda text: text.lower() in ("0", "1", "0v", "1v", "true", "false", "yes", "no"),
    ),
    (
        ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT", "INDUCTOR_PROVENANCE",
         "TORCHDYNAMO_REPRO_LEVEL", "TORCHINDUCTOR_COMPILE_THREADS", "TORCH_COMPILE_DEBUG",
         "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"),
        "a whole number",
        _is_count,
    ),
    # torch would raise an AssertionError that does not name the variable.
    (
        ("TORCHINDUCTOR_CACHE_DIR",),
        "a folder that this user may write to",
        lambda text: can_write(Path(text)),
    ),
    (("OMP_NUM_THREADS",), "a number of threads, 1 or more", _are_threads),
    (
        ("HF_DATASETS_IN_MEMORY_MAX_SIZE", "TQDM_MAXINTERVAL", "TQDM_MININTERVAL",
         "TQDM_SMOOTHING"),
        "a number",
        _is_number,
    ),
    (
        ("TORCH_DISTRIBUTED_DEBUG",),
        "OFF, INFO or DETAIL",
        lambda text: text.upper() in ("OFF", "INFO", "DETAIL"),
    ),
    (
        ("ACCELERATE_LOG_LEVEL",),
        ", ".join(_LEVELS),
        lambda text: text.upper() in _LEVELS,
    ),
)  # fmt: skip


def require_parsable(environ: Mapping[str, str]) -> None:
    """Raise unless libraries can parse the variables that they read numbers and choices from.

    Raises:
        AttnimgError: code bad-environment, also for an empty value.
    """
    found = [
        (name, environ[name], needed)
        for names, needed, is_valid in _PARSED
        for name in names
        if name in environ and not is_valid(environ[name])
    ]
    if found:
        raise AttnimgError(
            "the environment has values that a library cannot use",
            why="\n".join(f"found {name}={value}; needed {text}" for name, value, text in found),
            do=f"unset {' '.join(name for name, _, _ in found)}",
            code="bad-environment",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Run:
    """The facts that decide which values agree with a run: config, problem, and CPU or GPU."""

    config: Config
    problem: Problem
    cpu: bool

    @property
    def fsdp(self) -> dict[str, object] | None:
        """Return fsdp_config without the prefix of its keys; None if the run does not use FSDP."""
        if not (self.config.fsdp or self.config.fsdp_config):
            return None
        given = self.config.fsdp_config or {}
        return {name.removeprefix("fsdp_"): value for name, value in given.items()}


def _flag(value: object) -> frozenset[str]:
    return _TRUE if str(value).lower() in _TRUE else _FALSE


def _precisions(run: _Run) -> frozenset[str]:
    """Return "no", which `accelerate launch` exports by default, and the run's autocast dtype."""
    uses_cast = run.problem.autocast or run.config.deepspeed
    return frozenset({"no", *([_PRECISIONS.get(run.problem.dtype, "no")] if uses_cast else [])})


def _compilers(run: _Run) -> frozenset[str]:
    backend = run.config.torch_compile_backend or "inductor"
    return frozenset({"no", *([backend] if run.problem.compiled else [])})


def _compile_flag(run: _Run) -> frozenset[str]:
    """Return the flags that agree; without torch.compile, all do, since they have no effect."""
    return _FALSE if run.problem.compiled else _TRUE | _FALSE


def _fsdp_flag(key: str) -> Callable[[_Run], frozenset[str] | None]:
    return lambda run: None if run.fsdp is None else _flag(run.fsdp.get(key, False))


def _offload(run: _Run) -> frozenset[str] | None:
    if run.fsdp is None:
        return None
    return _flag(run.fsdp.get("cpu_offload", "offload" in str(run.config.fsdp)))


_COMPILE_KEYS = "the config has torch_compile, torch_compile_backend and torch_compile_mode"

_UNSUPPORTED = "attnimg does not support it"

# Name, the values in lower case that agree with a run (None: any), and what to use instead.
_ALLOWED: tuple[tuple[str, Callable[[_Run], Collection[str | None] | None], str], ...] = (
    ("ACCELERATE_MIXED_PRECISION", _precisions, "the config has bf16 and fp16"),
    ("ACCELERATE_FP8_BACKEND", lambda _: {"no"}, _UNSUPPORTED),
    ("ACCELERATE_DYNAMO_BACKEND", _compilers, _COMPILE_KEYS),
    ("ACCELERATE_DYNAMO_MODE",
     lambda run: {"default", run.config.torch_compile_mode} if run.problem.compiled else None,
     _COMPILE_KEYS),
    ("ACCELERATE_DYNAMO_USE_DYNAMIC", _compile_flag, _UNSUPPORTED),
    ("ACCELERATE_DYNAMO_USE_FULLGRAPH", _compile_flag, _UNSUPPORTED),
    ("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", _compile_flag, _UNSUPPORTED),
    ("TORCHDYNAMO_DISABLE", lambda run: {"0"} if run.problem.compiled else None, _COMPILE_KEYS),
    ("TORCH_COMPILE_DISABLE", lambda run: {"0"} if run.problem.compiled else None, _COMPILE_KEYS),
    ("ACCELERATE_USE_CPU", lambda run: _TRUE | _FALSE if run.cpu else _FALSE,
     "CUDA_VISIBLE_DEVICES= (empty) hides the GPUs"),
    ("ACCELERATE_TORCH_DEVICE", lambda run: {"cpu"} if run.cpu else (),
     "CUDA_VISIBLE_DEVICES chooses the GPU"),
    ("ACCELERATE_USE_DEEPSPEED", lambda run: _TRUE | _FALSE if run.config.deepspeed else _FALSE,
     "the config has deepspeed"),
    ("ACCELERATE_CONFIG_DS_FIELDS", lambda run: () if run.config.deepspeed else None,
     "the file that the key deepspeed names has its settings"),
    ("ACCELERATE_USE_FSDP", lambda run: _FALSE if run.fsdp is None else _TRUE | _FALSE,
     "the config has fsdp and fsdp_config"),
    ("FSDP_CPU_RAM_EFFICIENT_LOADING", _fsdp_flag("cpu_ram_efficient_loading"),
     "fsdp_config has cpu_ram_efficient_loading"),
    ("FSDP_OFFLOAD_PARAMS", _offload, "fsdp_config has cpu_offload"),
    ("FSDP_ACTIVATION_CHECKPOINTING", _fsdp_flag("activation_checkpointing"),
     "fsdp_config has activation_checkpointing"),
    ("FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD", lambda run: None if run.fsdp is None else _FALSE,
     _UNSUPPORTED),
    ("FSDP_IGNORED_MODULES", lambda run: None if run.fsdp is None else (), _UNSUPPORTED),
    ("ACCELERATE_USE_MEGATRON_LM", lambda _: _FALSE, _UNSUPPORTED),
    ("ACCELERATE_USE_PARALLELISM_CONFIG", lambda _: _FALSE, _UNSUPPORTED),
    ("ACCELERATE_USE_SAGEMAKER", lambda _: _FALSE, _UNSUPPORTED),
    ("DISABLE_MLFLOW_INTEGRATION", lambda run: _FALSE if "mlflow" in trackers(run.config) else None,
     "the config has use_mlflow"),
)  # fmt: skip


def require_agreement(
    environ: Mapping[str, str], config: Config, problem: Problem, *, cpu: bool
) -> None:
    """Raise unless the variables that alter a run agree with its config.

    Args:
        environ: os.environ.
        config: the run's config.
        problem: what attention has to do in the run: precision, torch.compile.
        cpu: whether the run is on a CPU.

    Raises:
        AttnimgError: code bad-environment.
    """
    run = _Run(config=config, problem=problem, cpu=cpu)
    found = []
    for name, allowed_values, advice in _ALLOWED:
        allowed = allowed_values(run)
        if name in environ and allowed is not None and environ[name].lower() not in allowed:
            text = f"found {name}={environ[name]}; needed: unset{_allowed_text(allowed)}; {advice}"
            found.append((name, text))
    if found:
        raise AttnimgError(
            "the environment contradicts the config",
            why="\n".join(text for _, text in found),
            do=f"unset {' '.join(name for name, _ in found)}",
            code="bad-environment",
        )


def _allowed_text(allowed: Collection[str | None]) -> str:
    """Return the values that agree, for a message; for a flag, only one of them."""
    if set(allowed) == _FALSE:
        return " or false"
    if set(allowed) == _TRUE:
        return " or true"
    names = sorted(value for value in allowed if value)
    return f" or {' or '.join(names)}" if names else ""


def environment_error(error: Exception, environ: Mapping[str, str]) -> AttnimgError | None:
    """Return the AttnimgError for an error of a library that read a variable; None for any other.

    These are ValueErrors whose message names the variable, and errors raised by a line of a library
    that reads it.
    """
    texts = [str(error)] if isinstance(error, ValueError) else []
    for frame in traceback.extract_tb(error.__traceback__)[-_INNERMOST_FRAMES:]:
        source = _source(frame)
        if re.search(r"environ|getenv|from_env", source) and not frame.filename.startswith(
            _PACKAGE_FOLDER
        ):
            texts.append(source)
    names = [name for name in dict.fromkeys(_VARIABLE.findall("\n".join(texts))) if name in environ]
    if not names:
        return None
    return AttnimgError(
        "a library cannot use a variable of the environment",
        why=redact(
            f"found {', '.join(f'{name}={environ[name]}' for name in names)}\n"
            f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
            environ,
        ),
        do=f"unset {' '.join(names)}",
        code="bad-environment",
    )


def _source(frame: traceback.FrameSummary) -> str:
    """Return all lines of the statement that a frame of a traceback was in."""
    first = frame.lineno or 0
    last = frame.end_lineno or first
    return "".join(linecache.getline(frame.filename, n) for n in range(first, last + 1))


def silence_libraries() -> None:
    """Turn off the progress bars, warnings and telemetry of libraries; errors are still printed.

    Call it before transformers is imported: the hub client reads its settings at import.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # where TRL has its ORPOTrainer
    # transformers would report to a Kubeflow server regardless of report_to.
    # Source: transformers 5.22.2, training_args.py, is_kubeflow_available (2026-11-27).
    os.environ["DISABLE_KUBEFLOW_INTEGRATION"] = "TRUE"
    # loss.png is drawn without a window; matplotlib raises on a backend that it does not know.
    os.environ["MPLBACKEND"] = "agg"
    # It would warn that the kernel, which it is not allowed to download, is missing.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    _import_bitsandbytes_late()
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # What they warn about is either checked before the run or reported in the plan.
    for name in ("accelerate", "torch.distributed", "kernels", "trl", "peft"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _import_bitsandbytes_late() -> None:
    """Import PEFT without bitsandbytes, which is then imported by what uses it, without kernels.

    Importing it takes more than a second of CPU. Only KappaTune, which computes with the weights of
    quantized layers and which attnimg does not use, needs it in peft.helpers.
    Source: peft 0.21.2, helpers.py, KappaTuneSelector (2026-11-28).
    """
    if "bitsandbytes" in sys.modules or find_spec("bitsandbytes") is None:
        return
    if not any(isinstance(finder, _BitsandbytesFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _BitsandbytesFinder())
    with _hidden("bitsandbytes"):
        import peft  # noqa: F401  imported only for the order


@contextmanager
def _hidden(package: str) -> Iterator[None]:
    """Make the import of a package fail in the block."""
    before = sys.modules.get(package)
    sys.modules[package] = None  # type: ignore[assignment]  # None makes its import fail
    try:
        yield
    finally:
        del sys.modules[package]
        if before is not None:
            sys.modules[package] = before


class _BitsandbytesFinder(MetaPathFinder):
    """Find bitsandbytes with a loader that hides the package kernels from it.

    On a CPU with avx512_bf16 it downloads kernels-community/quantization-bitsandbytes, which also
    computes in bfloat16 in a run of any precision; without it, bitsandbytes uses its own code.
    Source: bitsandbytes 0.50.2, backends/cpu/ops.py, has_avx512bf16 (2026-11-21).
    """

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        """Return the spec of bitsandbytes; None for all other modules."""
        if fullname != "bitsandbytes":
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _WithoutKernels(fullname, spec.loader.path)
        return spec


class _WithoutKernels(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        """Run the module; importing kernels fails meanwhile."""
        with _hidden("kernels"):
            super().exec_module(module)
