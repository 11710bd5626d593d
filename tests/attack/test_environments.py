"""Attack with environments: variables, limits of resources, and a full /dev/shm."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from attacked import Attnimg, Outcome, put_inputs
from generated import try_cases
from hypothesis import strategies as st

VARIABLES = {
    "RANK": ["0", "1", "abc", "-1", ""], "WORLD_SIZE": ["1", "2", "abc", "0", "99999999999"],
    "LOCAL_RANK": ["0", "7", "x"], "MASTER_ADDR": ["127.0.0.1", "nowhere.invalid", ""],
    "MASTER_PORT": ["0", "99999", "x"], "HOME": ["", "/nonexistent", "/dev/null"],
    "TMPDIR": ["/nonexistent", "/dev/null"], "LANG": ["C", "tr_TR.UTF-8"], "TERM": ["", "dumb"],
    "COLUMNS": ["0", "x", "1"], "NO_COLOR": ["1"], "ATTNIMG_CACHE": ["/dev/null", "/nonexistent/x"],
    "ATTNIMG_BACKEND": ["nope", "eager", "fp8", "\x1b[31m"], "LOCAL_KERNELS": ["x", "a=b", "a/b=/"],
    "HF_HOME": ["/dev/null"], "CUDA_VISIBLE_DEVICES": ["", "7", "x"], "TZ": ["Mars/X"],
    "PYTORCH_ENABLE_MPS_FALLBACK": ["x"], "USER": [""], "XDG_CACHE_HOME": ["/dev/null"],
    "ACCELERATE_MIXED_PRECISION": ["no", "bf16", "fp16", "fp8", "x", ""],
    "ACCELERATE_DYNAMO_BACKEND": ["NO", "inductor", "eager", "x", ""],
    "ACCELERATE_DYNAMO_MODE": ["default", "x"], "ACCELERATE_DYNAMO_USE_DYNAMIC": ["False", "x"],
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": ["true", "x"],
    "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": ["1", "x"],
    "ACCELERATE_TORCH_DEVICE": ["cpu", "cuda:1", "meta", "x", ""],
    "ACCELERATE_USE_CPU": ["True", "False", "x"], "ACCELERATE_DEBUG_MODE": ["true", "x"],
    "ACCELERATE_USE_SAGEMAKER": ["true", "x"], "ACCELERATE_USE_DEEPSPEED": ["true", "x", ""],
    "ACCELERATE_USE_FSDP": ["true", "false", "x"], "FSDP_OFFLOAD_PARAMS": ["true", "x"],
    "FSDP_VERSION": ["1", "x"], "FSDP_CPU_RAM_EFFICIENT_LOADING": ["true", "x"],
    "ACCELERATE_USE_MEGATRON_LM": ["true", "x"], "MEGATRON_LM_TP_DEGREE": ["2", "x"],
    "ACCELERATE_USE_PARALLELISM_CONFIG": ["true", "x"], "PARALLELISM_CONFIG_TP_SIZE": ["2", "x"],
    "ACCELERATE_FP8_BACKEND": ["NO", "AO", "TE", "MSAMP", "x"], "FP8_MARGIN": ["x"],
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ["4", "x"], "ACCELERATE_CPU_AFFINITY": ["1", "x"],
    "ACCELERATE_ENABLE_RICH": ["1", "x"], "ACCELERATE_LOG_LEVEL": ["debug", "x"],
    "ACCELERATE_INIT_INCLUDE_BUFFERS": ["x"], "ACCELERATE_CONFIG_DS_FIELDS": ["x"],
    "ACCELERATE_BYPASS_DEVICE_MAP": ["true", "x"], "FORK_LAUNCHED": ["1", "x"],
    "PMI_SIZE": ["1", "2", "x"], "OMPI_COMM_WORLD_SIZE": ["2", "x"], "PMI_RANK": ["1", "x"],
    "MV2_COMM_WORLD_SIZE": ["x"], "LOCAL_WORLD_SIZE": ["0", "x"], "GROUP_RANK": ["x"],
    "TORCHELASTIC_RUN_ID": ["x"], "KUBEFLOW_TRAINER_SERVER_URL": ["http://127.0.0.1:1", "x"],
    "SM_FRAMEWORK_PARAMS": ["x"], "SM_HP_MP_PARAMETERS": ["x"], "USE_TORCH_XLA": ["x"],
    "TRANSFORMERS_VERBOSITY": ["x"], "DATASETS_VERBOSITY": ["x"], "HF_HUB_VERBOSITY": ["x"],
    "USE_HUB_KERNELS": ["no", "x"], "HF_HUB_OFFLINE": ["x"], "HF_ENDPOINT": ["nonsense"],
    "HF_HUB_DOWNLOAD_TIMEOUT": ["5", "x"], "HF_HUB_ETAG_TIMEOUT": ["x", ""],
    "HF_DATASETS_IN_MEMORY_MAX_SIZE": ["x"], "HF_DATASETS_CACHE": ["/dev/null"],
    "HF_HUB_CACHE": ["/dev/null"], "HF_MODULES_CACHE": ["/dev/null"], "HF_TOKEN": ["x y"],
    "OMP_NUM_THREADS": ["2", "1,2", "0", "-1", "x"], "MKL_NUM_THREADS": ["x"],
    "PYTORCH_ALLOC_CONF": ["nonsense"], "TORCH_LOGS": ["nonsense"], "PYTORCH_JIT": ["0", "x"],
    "TORCH_DISTRIBUTED_DEBUG": ["INFO", "x"], "TORCH_FORCE_WEIGHTS_ONLY_LOAD": ["x"],
    "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": ["1"], "TORCH_COMPILE_DISABLE": ["1"],
    "TORCHDYNAMO_DISABLE": ["1", "x"], "TORCHDYNAMO_REPRO_LEVEL": ["x"],
    "TORCHINDUCTOR_COMPILE_THREADS": ["x"], "TORCHINDUCTOR_CACHE_DIR": ["/dev/null"],
    "TORCH_COMPILE_DEBUG": ["x"], "CUBLAS_WORKSPACE_CONFIG": ["x"], "NCCL_DEBUG": ["x"],
    "TOKENIZERS_PARALLELISM": ["x"], "RAYON_NUM_THREADS": ["x"], "ARROW_IO_THREADS": ["x"],
    "TQDM_MININTERVAL": ["x"], "TQDM_DISABLE": ["x"], "MPLBACKEND": ["x", "qtagg"],
    "MPLCONFIGDIR": ["/dev/null"], "KERNELS_CACHE": ["/dev/null"], "WANDB_MODE": ["offline"],
    "HTTPS_PROXY": ["nonsense"], "FSSPEC_FILE": ["x"], "BNB_CUDA_VERSION": ["x"], "CI": ["1"],
}  # fmt: skip
# Files of 0.1 MB: smaller than the model, and larger than what a run prints, which goes to a file.
LIMITS = {"AS": [1 << 29, 1 << 30, 2 << 30, 8 << 30], "NOFILE": [32, 64, 256],
          "FSIZE": [100_000, 10**9], "STACK": [1 << 18, 1 << 20], "CORE": [0]}  # fmt: skip


def some_of(choices: dict[str, list[Any]]) -> st.SearchStrategy[dict[str, Any]]:
    names = st.lists(st.sampled_from(sorted(choices)), max_size=2, unique=True)
    return names.flatmap(
        lambda chosen: st.fixed_dictionaries({n: st.sampled_from(choices[n]) for n in chosen})
    )


def test_environments(
    train: Callable[..., Outcome], record_property: Callable[[str, Any], None]
) -> None:
    def judge(case: tuple[dict[str, str], dict[str, int]]) -> str:
        environ, limits = case
        return train(options={"environ": environ, "limits": limits}, save_strategy="steps",
                     ).fault_with_text  # fmt: skip

    try_cases("environments", st.tuples(some_of(VARIABLES), some_of(LIMITS)), judge,
                 record=record_property, count=10)  # fmt: skip


def test_a_tiny_shared_memory_is_told(right: dict[str, Any], home: Path, tmp_path: Path) -> None:
    put_inputs(tmp_path, home)
    small = ["unshare", "-m", "sh", "-c", "mount -t tmpfs -o size=64k tmpfs /dev/shm; exec \"$@\"",
             "sh"]  # fmt: skip
    allowed = subprocess.run([*small, "true"], capture_output=True, text=True, check=False)
    if allowed.returncode:
        pytest.skip(f"no right to mount a small /dev/shm: {allowed.stderr.strip()}")
    with Attnimg(prefix=small) as attnimg:
        for workers, code in ((2, 2), (0, 0)):
            keys = {**right, "dataloader_num_workers": workers, "output_dir": f"out-{workers}"}
            (tmp_path / "run.yaml").write_text(yaml.safe_dump(keys))
            outcome = attnimg.run(["train", "run.yaml"], folder=tmp_path)
            assert (outcome.code, outcome.fault) == (code, ""), outcome.err
            assert ("dataloader_num_workers: 0" in outcome.err) == bool(workers)
