"""Kernels that came compiled with the image are found on this GPU: a first call compiles nothing.

Outside an image that has such kernels for this GPU, it is skipped.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from attnimg.backends import find_backend, runs_on
from attnimg.facts import Machine
from attnimg.machine import probe
from attnimg.machine.kernel_cache import (
    CACHE_AT,
    CACHE_ON,
    reasons_against_shipped,
    reasons_against_shipped_triton,
    settings_for,
    shipped_kernels,
    shipped_triton,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

# A call of Llama 3.1 8B's layer, dense or packed, forward and backward, as a run makes it.
CALL = """
import sys
from types import SimpleNamespace

import torch

from attnimg.backends._transformers import attention_function
from attnimg.backends import find_backend

name, packed = sys.argv[1], sys.argv[2] == "packed"
q, k, v = (
    torch.randn(1, heads, 512, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    for heads in (32, 8, 8)
)
bounds = torch.tensor([0, 320, 512], device="cuda", dtype=torch.int32)
documents = {
    "cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 320, "max_length_k": 320,
}
layer = SimpleNamespace(is_causal=True, training=True)
attend = attention_function(find_backend(name))
out = attend(layer, q, k, v, None, scaling=128**-0.5, **(documents if packed else {}))[0]
out.sum().backward()
torch.cuda.synchronize()
"""


@pytest.fixture(scope="module")
def machine() -> Machine:
    return probe.this_machine(())


def compiled_by(name: str, kind: str, machine: Machine, folder: Path, pattern: str) -> set[str]:
    """Make the call in a process whose caches were filled at its start; name what was added."""
    own = {"ATTNIMG_CACHE": str(folder), "TRITON_CACHE_DIR": str(folder / "triton")}
    chosen = {CACHE_AT, CACHE_ON}
    environment = {key: value for key, value in os.environ.items() if key not in chosen} | own
    environment |= settings_for(machine, environment)
    before = {str(path) for path in folder.rglob(pattern)}
    subprocess.run([sys.executable, "-c", CALL, name, kind], env=environment, check=True)
    return {str(path) for path in folder.rglob(pattern)} - before


@pytest.mark.parametrize("kind", ["dense", "packed"])
def test_flash_attention_4_compiles_nothing(kind: str, machine: Machine, tmp_path: Path) -> None:
    shipped = shipped_kernels()
    if shipped is None:
        pytest.skip("no kernels of FlashAttention-4 came with this installation")
    if against := reasons_against_shipped(shipped, machine):
        pytest.skip("; ".join(reason.text for reason in against))
    assert not compiled_by("flash_attention_4", kind, machine, tmp_path, "*.o")


@pytest.mark.parametrize("kind", ["dense", "packed"])
def test_sageattention_has_triton_compile_nothing(
    kind: str, machine: Machine, tmp_path: Path
) -> None:
    sage, shipped = find_backend("sage"), shipped_triton()
    if shipped is None or sage is None or not runs_on(sage.needs, machine.arch):
        pytest.skip("no Triton kernels for this GPU came with this installation")
    if against := reasons_against_shipped_triton(shipped, machine):
        pytest.skip("; ".join(reason.text for reason in against))
    assert not compiled_by("sage", kind, machine, tmp_path, "*.cubin")
