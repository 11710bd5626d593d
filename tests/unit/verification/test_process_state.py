"""Test that kernels that change the process are refused; usual library behaviour passes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from served_kernels import serve

from attnimg.verification import process_settings
from attnimg.verification.process_state import ProcessState, RunState

FIXTURES = Path(__file__).parents[2] / "fixtures"
SOURCE = FIXTURES / "wrong_kernels/state.py"
MEDIUM = "float32 matmul precision was ('highest', 'True'), is ('medium', 'True')"
# The fault of a kernel -> a part of the reason.
FAULTS = {
    "default dtype": "default dtype was torch.float32, is torch.float64",
    "default device": "default device was cpu, is meta",
    "matmul precision": MEDIUM,
    "new precision settings": "float32 matmul precision",
    "threads": "threads of torch",
    "flush-denormal": "flush-denormal was False, is True",
    "Python's seed": "random numbers of Python changed",
    "numpy's seed": "random numbers of numpy changed",
    "torch's seed": "torch's random numbers were seeded or rewound",
    "cwd": "working directory",
    "umask": "umask was 0022, is 0777",
    "SIGTERM ignored": "signal handler of SIGTERM",
    "SIGINT reset": "signal handler of SIGINT",
    "SIGTERM ignored in C": "ignored signals",
    "SIGTERM blocked": "blocked signals",
    "environment changed": "environment: HOME was changed",
    "environment unset": "environment: HF_HUB_OFFLINE was unset",
    "CUDA_VISIBLE_DEVICES": "environment: CUDA_VISIBLE_DEVICES was set",
    "warnings silenced": "warnings filters: the action for every warning is ignore",
    "warnings reset": "warnings filters",
    "deterministic": "deterministic algorithms",
    "anomaly": "anomaly detection",
    "gradients off": "gradient mode was True, is False",
    "environment in C": "environment: CUDA_VISIBLE_DEVICES was set",
    "rounding": "rounding mode of floating-point numbers",
    "softmax replaced": "torch.nn.functional: softmax was replaced",
    "saved tensors": "hooks of saved tensors was False, is True",
    "module hooks": "global module hooks",
    "an alarm": "timers",
    "files limited": "resource limits",
    "no garbage collection": "garbage collection",
    "exceptions unseen": "exception and display hooks of Python",
    "an optimizer's step replaced": "torch.optim.adamw.AdamW: step was replaced by code",
    "os.replace replaced": "os: replace was replaced by code of _wrong_",
    "a folder of modules put first": "sys.path: entries were removed or put first",
    "stderr elsewhere": "standard input, output and error",
    "stdin closed": "standard input, output and error",
    "processes spawned": "start method of multiprocessing was fork, is spawn",
    "arguments added": "sys.argv",
    "a module removed": "sys.modules: json was removed or replaced",
    "another module in its place": "sys.modules: json was removed or replaced",
    "an import hook put first": "sys.meta_path: a hook was removed or put first",
    "warnings of transformers off": "logging was (0, 30), is (0, 50)",
    "signals wake a pipe": "wakeup file of signals",
    "crashes unseen": "faulthandler",
    "tensors printed short": "print options of tensors",
    "new tensors not filled": "fill_uninitialized_memory was True, is False",
    "nothing compiled": "torch.compile was True, is False",
    "a handler of the root logger": "root logger",
    "the root logger's level": "root logger",
    "a logger of torch off": "logging: the logger torch was changed",
    "Module.__call__ set to another method": "module.Module: __call__ was replaced",
    "time set to another clock": "time: time was replaced by code of time",
    "a warning of autograd off": "torch._C._warn_on_accumulate_grad_stream_mismatch",
    "repeated warnings of torch": "torch._C._get_warnAlways was False, is True",
    "a file left": "files in the working folder added: 'left.txt'",
    "an operator of torch replaced": "registered kernels of torch's operators",
    "a dtype of torch replaced": "torch: bfloat16 was replaced",
    "a loss of transformers replaced": "LOSS_MAPPING: ForCausalLM was replaced by code",
    "Llama's norm replaced": "LlamaRMSNorm: forward was replaced by code of _wrong_",
    "errors of torch.compile hidden": "torch._dynamo.config.suppress_errors was changed",
    "less recursion": "limits of Python",
    "code in weights": "torch.load",
    "a group of its own": "process group and session",
    "default dtype later": "default dtype was torch.float32, is torch.float64",
    "matmul precision later": MEDIUM,
    "cwd later": "working directory",
    "Python's numbers": "random numbers of Python changed",
    "numpy's numbers": "random numbers of numpy changed",
    "umask later": "umask was 0022, is 0000",
    "umask from call 40 on": "umask was 0022, is 0000",
    "leaves files": "files left: ",
    "leaks files": "open files: ",
    "leaks threads": "threads: ",
    "leaks children": "children: ",
    "leaks memory": "memory: ",
    "leaks memory in evaluation": "memory: ",
    "leaks exit handlers": "exit handlers: ",
    "prints": "bytes of output: ",
    "filters": "warnings filters: ",
    "environment grows": "environment: WRONG_",
}
RIGHT = [
    "none",
    "right: a variable of its own",
    "right: logs by the root",
    "right: a logger of its own",
    "right: a cache of its own",
    "right: a log of its own",
    "right: compiles",
    "right: a filter of its own",
    "right: a folder of modules of its own",
    "right: setuptools, a compiler and an import hook of its own",
    "right: a thread of its own",
    "right: a file of its own",
    "right: an exit handler and a deeper recursion",
    "right: lazy",
    "right: keeps the last outputs",
    "right: a file for each call",
    "right: draws from torch",
]
NAMES = {fault: f"state/kernel-{number}" for number, fault in enumerate([*FAULTS, *RIGHT])}


@pytest.fixture(scope="module")
def reasons(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[str]]]:
    root = tmp_path_factory.mktemp("kernels")
    entries = [
        f"{name}={serve(root / name.partition('/')[2], fault, source=SOURCE)}"
        for fault, name in NAMES.items()
    ]
    environment = os.environ | {
        "LOCAL_KERNELS": ":".join(entries),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(FIXTURES), *sys.path]),
    }
    found = subprocess.run(
        [sys.executable, str(FIXTURES / "forked_proofs.py"), *NAMES.values()],
        env=environment, cwd=root, umask=0o022, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return dict(json.loads(line) for line in found.stdout.splitlines())


pytestmark = pytest.mark.timeout(600)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_kernel_that_changes_the_process_is_refused_by_name(
    reasons: dict[str, list[list[str]]], fault: str
) -> None:
    (code, text), *_ = reasons[NAMES[fault]]
    assert code == "process-state"
    assert FAULTS[fault] in text


@pytest.mark.parametrize("fault", RIGHT)
def test_usual_behaviour_of_libraries_on_import_and_in_first_calls_passes(
    reasons: dict[str, list[list[str]]], fault: str
) -> None:
    assert reasons[NAMES[fault]] == []


def test_a_hook_for_exceptions_of_the_cute_dsl_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """On import, and in its first call, each hook calls the one before."""
    monkeypatch.setattr(sys, "excepthook", lambda *_: None)
    before = ProcessState()
    library = ModuleType("cutlass.base_dsl.common")
    exec(_CUTE_DSL, vars(library))
    assert sys.excepthook is library.excepthook
    assert (before.changes(), before.replaced_code()) == ([], [])
    library._original_excepthook = print
    assert before.changes() == ["exception and display hooks of Python changed"]
    monkeypatch.setattr(sys, "excepthook", print)
    (text,) = before.replaced_code()
    assert text == "sys: excepthook was replaced by code of builtins"


def test_a_working_directory_that_is_renamed_stays_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "old").mkdir()
    monkeypatch.chdir(tmp_path / "old")
    run = RunState()
    (tmp_path / "old").rename(tmp_path / "new")
    assert run.changes() == []
    (tmp_path / "new").rmdir()
    assert run.changes() == []
    monkeypatch.chdir(tmp_path)
    (text,) = run.changes()
    assert text.startswith("working directory was ")


def test_a_sandbox_whose_status_has_few_lines_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As gVisor, whose /proc/self/status has neither Umask nor SigIgn."""
    monkeypatch.setattr(process_settings, "_status", lambda: {"CapEff": "0"})
    assert RunState().changes() == ProcessState().changes() == []


# Source: nvidia-cutlass-dsl 4.8.1, base_dsl/common.py and base_dsl/dsl.py (2026-11-28).
_CUTE_DSL = """
import sys
_original_excepthook = sys.excepthook
def _dsl_excepthook(*error):
    _original_excepthook(*error)
sys.excepthook = _dsl_excepthook
def first_call():
    global excepthook
    origin_excepthook = sys.excepthook
    def excepthook(*error):
        origin_excepthook(*error)
    sys.excepthook = excepthook
first_call()
"""
