"""Attack with environments: variables, limits of resources, and a full /dev/shm."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from attacked import Attnimg, Outcome
from generated import held_against
from hypothesis import strategies as st

VARIABLES = {
    "RANK": ["0", "1", "abc", "-1", ""], "WORLD_SIZE": ["1", "2", "abc", "0", "99999999999"],
    "LOCAL_RANK": ["0", "7", "x"], "MASTER_ADDR": ["127.0.0.1", "nowhere.invalid", ""],
    "MASTER_PORT": ["0", "99999", "x"], "HOME": ["", "/nonexistent", "/dev/null"],
    "TMPDIR": ["/nonexistent", "/dev/null"], "LANG": ["C", "tr_TR.UTF-8"], "TERM": ["", "dumb"],
    "COLUMNS": ["0", "x", "1"], "NO_COLOR": ["1"], "ATTNIMG_CACHE": ["/dev/null", "/nonexistent/x"],
    "ATTNIMG_BACKEND": ["nope", "eager", "fp8", "\x1b[31m"], "LOCAL_KERNELS": ["x", "a=b", "a/b=/"],
    "HF_HOME": ["/dev/null"], "CUDA_VISIBLE_DEVICES": ["", "7", "x"], "TZ": ["Mars/X"],
    "ACCELERATE_MIXED_PRECISION": ["fp16", "x"], "ACCELERATE_DYNAMO_BACKEND": ["inductor", "x"],
    "PYTORCH_ENABLE_MPS_FALLBACK": ["x"], "USER": [""], "XDG_CACHE_HOME": ["/dev/null"],
}  # fmt: skip
LIMITS = {"AS": [1 << 29, 1 << 30, 2 << 30, 8 << 30], "NOFILE": [32, 64, 256],
          "FSIZE": [0, 1000, 100_000, 10**9], "STACK": [1 << 18, 1 << 20], "CORE": [0]}  # fmt: skip


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
                     ).fell_with_text  # fmt: skip

    held_against("environments", st.tuples(some_of(VARIABLES), some_of(LIMITS)), judge,
                 record=record_property)  # fmt: skip


def test_a_tiny_shared_memory_is_told(right: dict[str, Any], tmp_path: Path) -> None:
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
            assert (outcome.code, outcome.fell) == (code, ""), outcome.err
            assert ("dataloader_num_workers: 0" in outcome.err) == bool(workers)
