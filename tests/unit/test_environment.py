"""Test which environment variables a run refuses: unreadable ones, and others than the config."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from accelerate.utils.launch import prepare_simple_launcher_cmd_env
from advice import Values

from attnimg.config.schema import Config
from attnimg.errors import AttnimgError
from attnimg.facts import Arch
from attnimg.task import build_problem
from attnimg.train.environment import environment_error, require_agreement, require_parsable

CPU = Arch(name="x86_64", vendor="cpu", capability=None)
GPU = Arch(name="sm_90", vendor="nvidia", capability=(9, 0))
COMPILED = {"torch_compile": True}
FSDP: Values = {"fsdp": True}


def agree(environ: dict[str, str], keys: Values, arch: Arch) -> None:
    config = Config(base_model="m", learning_rate=1e-4, **{"torch_compile": False, **keys})
    problem = build_problem(config, model=None, dropout=0.0, arch=arch)
    require_agreement(environ, config, problem, cpu=arch.vendor == "cpu")


def names_unset(error: AttnimgError) -> list[str]:
    """Return the variables that the error says to unset."""
    assert error.code == "bad-environment"
    assert error.exit_code == 2
    _, _, names = error.do.partition("unset ")
    return names.split()


def refused(environ: dict[str, str], keys: Values, arch: Arch) -> AttnimgError:
    with pytest.raises(AttnimgError) as caught:
        agree(environ, keys, arch)
    for name, value in environ.items():
        assert f"found {name}={value}; needed: unset" in caught.value.why
    # Unset, as it says, the run is fine.
    left = {k: v for k, v in environ.items() if k not in names_unset(caught.value)}
    agree(left, keys, arch)
    return caught.value


@pytest.mark.parametrize(
    ("name", "value", "keys", "arch"),
    [
        ("ACCELERATE_MIXED_PRECISION", "bf16", {"bf16": False}, GPU),
        ("ACCELERATE_MIXED_PRECISION", "fp16", {"bf16": True}, GPU),
        ("ACCELERATE_MIXED_PRECISION", "bf16", {"bf16": "full"}, GPU),
        ("ACCELERATE_MIXED_PRECISION", "fp8", {}, GPU),
        ("ACCELERATE_MIXED_PRECISION", "", {}, GPU),
        ("ACCELERATE_FP8_BACKEND", "TE", {}, GPU),
        ("ACCELERATE_FP8_BACKEND", "x", {}, CPU),
        ("ACCELERATE_DYNAMO_BACKEND", "inductor", {}, GPU),
        ("ACCELERATE_DYNAMO_BACKEND", "x", {}, CPU),
        ("ACCELERATE_DYNAMO_BACKEND", "", {}, CPU),
        ("ACCELERATE_DYNAMO_BACKEND", "eager", COMPILED, GPU),
        ("ACCELERATE_DYNAMO_MODE", "max-autotune", COMPILED, GPU),
        ("ACCELERATE_DYNAMO_USE_FULLGRAPH", "true", COMPILED, GPU),
        ("ACCELERATE_DYNAMO_USE_FULLGRAPH", "x", {}, CPU),
        ("ACCELERATE_DYNAMO_USE_DYNAMIC", "1", COMPILED, GPU),
        ("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", "yes", COMPILED, GPU),
        ("TORCHDYNAMO_DISABLE", "1", COMPILED, GPU),
        ("TORCH_COMPILE_DISABLE", "1", COMPILED, GPU),
        ("ACCELERATE_USE_CPU", "true", {}, GPU),
        ("ACCELERATE_USE_CPU", "x", {}, CPU),
        ("ACCELERATE_TORCH_DEVICE", "cuda:1", {}, GPU),
        ("ACCELERATE_TORCH_DEVICE", "meta", {}, CPU),
        ("ACCELERATE_USE_DEEPSPEED", "true", {}, GPU),
        ("ACCELERATE_CONFIG_DS_FIELDS", "zero_stage", {"deepspeed": "ds.json"}, GPU),
        ("ACCELERATE_USE_FSDP", "true", {}, GPU),
        ("FSDP_CPU_RAM_EFFICIENT_LOADING", "true", FSDP, GPU),
        ("FSDP_CPU_RAM_EFFICIENT_LOADING", "false",
         {**FSDP, "fsdp_config": {"fsdp_cpu_ram_efficient_loading": True}}, GPU),
        ("FSDP_OFFLOAD_PARAMS", "true", FSDP, GPU),
        ("FSDP_OFFLOAD_PARAMS", "false", {"fsdp": "full_shard offload"}, GPU),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", FSDP, GPU),
        ("FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD", "true", FSDP, GPU),
        ("FSDP_IGNORED_MODULES", "lm_head", FSDP, GPU),
        ("ACCELERATE_USE_MEGATRON_LM", "true", {}, GPU),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", {}, GPU),
        ("ACCELERATE_USE_SAGEMAKER", "true", {}, GPU),
    ],
)  # fmt: skip
def test_a_variable_other_than_the_config_is_refused(
    name: str, value: str, keys: Values, arch: Arch
) -> None:
    assert names_unset(refused({name: value}, keys, arch)) == [name]


def test_all_contradictions_are_named_at_once() -> None:
    both = {"ACCELERATE_MIXED_PRECISION": "fp16", "ACCELERATE_USE_FSDP": "true"}
    error = refused(both, {"bf16": True}, GPU)
    assert names_unset(error) == list(both)
    assert "needed: unset or bf16 or no; the config has bf16 and fp16" in error.why


@pytest.mark.parametrize(
    ("environ", "keys", "arch"),
    [
        pytest.param({"ACCELERATE_MIXED_PRECISION": "bf16"}, {"bf16": True}, GPU, id="bf16"),
        pytest.param({"ACCELERATE_MIXED_PRECISION": "bf16"}, {"bf16": "auto"}, GPU, id="auto"),
        pytest.param({"ACCELERATE_MIXED_PRECISION": "fp16"}, {"fp16": True, "bf16": False}, GPU,
                     id="fp16"),
        pytest.param({"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_USE_DEEPSPEED": "true"},
                     {"bf16": True, "deepspeed": "ds.json"}, GPU, id="deepspeed"),
        pytest.param({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, COMPILED, GPU, id="compiled"),
        pytest.param({"ACCELERATE_DYNAMO_BACKEND": "eager", "ACCELERATE_DYNAMO_MODE": "default"},
                     {**COMPILED, "torch_compile_backend": "eager"}, GPU, id="its own backend"),
        pytest.param({"TORCH_COMPILE_DISABLE": "1"}, {}, GPU, id="nothing to compile"),
        pytest.param({"ACCELERATE_USE_CPU": "True"}, {}, CPU, id="a CPU"),
        pytest.param({"ACCELERATE_TORCH_DEVICE": "cpu"}, {}, CPU, id="the device of a CPU"),
        pytest.param(
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "false",
             "FSDP_CPU_RAM_EFFICIENT_LOADING": "true", "FSDP_ACTIVATION_CHECKPOINTING": "false"},
            {"fsdp": True, "fsdp_config": {"cpu_ram_efficient_loading": True}}, GPU, id="fsdp"),
        pytest.param({"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, {}, GPU, id="fsdp is not used"),
    ],
)  # fmt: skip
def test_a_variable_that_agrees_with_the_config_is_fine(
    environ: dict[str, str], keys: Values, arch: Arch
) -> None:
    agree(environ, keys, arch)


@pytest.mark.parametrize(
    ("options", "keys", "arch"),
    [
        pytest.param(["--cpu"], {}, CPU, id="on a CPU"),
        pytest.param([], {"bf16": True}, GPU, id="without options"),
        pytest.param(["--mixed_precision", "bf16"], {"bf16": True}, GPU, id="the same precision"),
        pytest.param(["--dynamo_backend", "inductor"], COMPILED, GPU, id="torch.compile"),
    ],
)
def test_what_accelerate_launch_exports_is_fine(
    options: list[str], keys: Values, arch: Arch, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        monkeypatch.delenv(name)
    counts = ["--num_cpu_threads_per_process", "1", "--num_machines", "1", "--num_processes", "1"]
    asked = launch_command_parser().parse_args([*counts, *options, "train.py"])
    # What _validate_launch_command sets where no option and no file of `accelerate config` does.
    asked.mixed_precision = asked.mixed_precision or "no"
    asked.dynamo_backend = asked.dynamo_backend or "no"
    asked.use_cpu = asked.cpu
    _, exported = prepare_simple_launcher_cmd_env(asked)
    assert "ACCELERATE_MIXED_PRECISION" in exported
    require_parsable(exported)
    agree(exported, keys, arch)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ACCELERATE_DEBUG_MODE", "x"), ("ACCELERATE_CPU_AFFINITY", ""), ("FORK_LAUNCHED", "2"),
        ("ACCELERATE_ENABLE_RICH", "x"), ("ACCELERATE_INIT_INCLUDE_BUFFERS", "x"),
        ("USE_TORCH_XLA", "auto"), ("PYTORCH_JIT", "x"), ("HF_HUB_DOWNLOAD_TIMEOUT", "x"),
        ("HF_HUB_ETAG_TIMEOUT", "1.5"), ("TORCHDYNAMO_REPRO_LEVEL", "x"),
        ("TORCHINDUCTOR_COMPILE_THREADS", "x"), ("TORCH_COMPILE_DEBUG", "x"),
        ("PMI_SIZE", "x"), ("OMP_NUM_THREADS", "x"), ("OMP_NUM_THREADS", "0"),
        ("OMP_NUM_THREADS", "4,"), ("OMP_NUM_THREADS", "-1"),
        ("HF_DATASETS_IN_MEMORY_MAX_SIZE", "x"), ("TQDM_MININTERVAL", "x"),
        ("TORCH_DISTRIBUTED_DEBUG", "x"), ("ACCELERATE_LOG_LEVEL", "x"),
        ("TORCHINDUCTOR_CACHE_DIR", "/dev/null/x"),
    ],
)  # fmt: skip
def test_a_value_that_a_library_cannot_use_is_refused(name: str, value: str) -> None:
    with pytest.raises(AttnimgError, match="cannot use") as caught:
        require_parsable({name: value, "PATH": "/bin"})
    assert f"found {name}={value}; needed" in caught.value.why
    assert names_unset(caught.value) == [name]


def test_values_that_libraries_can_read_are_fine() -> None:
    require_parsable({
        "ACCELERATE_DEBUG_MODE": "true", "ACCELERATE_CPU_AFFINITY": "0", "USE_TORCH_XLA": "NO",
        "PYTORCH_JIT": "1v", "HF_HUB_DOWNLOAD_TIMEOUT": "30", "OMP_NUM_THREADS": "16",
        "HF_DATASETS_IN_MEMORY_MAX_SIZE": "1e9", "TQDM_MININTERVAL": "0.5",
        "TORCH_DISTRIBUTED_DEBUG": "detail", "ACCELERATE_LOG_LEVEL": "warning",
        "TOKENIZERS_PARALLELISM": "x", "PMI_SIZE": "1",
    })  # fmt: skip
    require_parsable({"OMP_NUM_THREADS": "8,2"})
    require_parsable({"TORCHINDUCTOR_CACHE_DIR": f"{tempfile.gettempdir()}/new/inductor"})
    require_parsable(os.environ)


# Code of a library that reads a variable: attnimg's own lines are excluded by their folder.
READERS = {
    "the line": 'import os\nint(os.environ.get("SOME_LIMIT", 1))\n',
    "several lines": 'import os\nint(\n    os.environ.get("OTHER", os.environ["SOME_LIMIT"])\n)\n',
    "a function": 'import os\ndef flag_from_env(key):\n    return int(os.environ[key])\n\n'
                  'flag_from_env("SOME_LIMIT")\n',
    "the message": 'def f():\n    raise ValueError("SOME_LIMIT must be OFF")\n\nf()\n',
}  # fmt: skip


def raised_by(code: str, folder: Path) -> Exception:
    file = folder / "library.py"
    file.write_text(code)
    with pytest.raises(Exception) as caught:  # noqa: PT011  whatever the code raises
        exec(compile(code, str(file), "exec"), {})
    return caught.value


@pytest.mark.parametrize("reader", READERS)
def test_an_error_on_reading_a_variable_names_it(
    reader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_LIMIT", "x")
    error = raised_by(READERS[reader], tmp_path)
    found = environment_error(error, os.environ)
    assert found is not None
    assert "found SOME_LIMIT=x" in found.why
    assert names_unset(found) == ["SOME_LIMIT"]


@pytest.mark.parametrize(
    "code",
    [
        pytest.param('raise RuntimeError("an error; try CUDA_LAUNCH_BLOCKING=1")', id="advice"),
        pytest.param('raise ValueError("SOME_OTHER is wrong")', id="a variable that is not set"),
        pytest.param("int('x')", id="no variable"),
    ],
)
def test_other_errors_stay_faults(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "1")
    assert environment_error(raised_by(code, tmp_path), os.environ) is None


def test_a_command_words_what_fails_at_the_import_of_a_library(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "attnimg", "verify"], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"TORCH_LOGS": "nonsense"}, check=False, timeout=120,
    )  # fmt: skip
    assert (done.returncode, "do:  unset TORCH_LOGS" in done.stderr) == (2, True), done.stderr


def test_silenced_libraries_report_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations import integration_utils

    from attnimg.train.environment import silence_libraries

    monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_URL", "http://127.0.0.1:1")
    silence_libraries()
    assert not integration_utils.is_kubeflow_available()


# Prints whether bitsandbytes is imported by the libraries of every run, whether PEFT finds it after
# that, and the error of a weight that it quantizes.
LATE = """
import sys
from attnimg.train.environment import silence_libraries
silence_libraries()
from transformers import Trainer
from trl import SFTTrainer
early = "bitsandbytes" in sys.modules
from peft.import_utils import is_bnb_4bit_available
available = is_bnb_4bit_available()
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
weights = torch.randn(64, 64)
error = (dequantize_4bit(*quantize_4bit(weights, quant_type="nf4")) - weights).abs().max()
print(early, available, "bitsandbytes" in sys.modules, bool(0 < error < 1))
"""
# A package bitsandbytes that asks for the package kernels, as the real one does on some CPUs.
ASKS = """
try:
    import kernels
except ImportError:
    kernels = None
"""
USES = """
from attnimg.train.environment import silence_libraries
silence_libraries()
silence_libraries()
import bitsandbytes, kernels
print(bitsandbytes.kernels, kernels.__name__)
"""


def output(code: str, path: Path | None = None) -> str:
    """Run a program, with modules in a folder; return the last line that it prints."""
    paths = [str(path)] * (path is not None) + [str(Path(__file__).parents[2])]
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_bitsandbytes_is_imported_when_it_is_used() -> None:
    assert output(LATE) == "False True True True"


def test_bitsandbytes_gets_no_kernels_to_download(tmp_path: Path) -> None:
    (tmp_path / "bitsandbytes").mkdir()
    (tmp_path / "bitsandbytes/__init__.py").write_text(ASKS)
    assert output(USES, tmp_path) == "None kernels"
