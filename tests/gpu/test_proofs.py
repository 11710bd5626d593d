"""Every backend that fits this GPU passes its proof: dense and packed, forward and backward.

Those that do not fit are skipped with the plan's reasons.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from run_facts import a_problem

from attnimg.backends import all_backends, find_backend
from attnimg.facts import Machine
from attnimg.machine import probe
from attnimg.run_facts import LayerGroup, Model
from attnimg.selection import plan
from attnimg.task import distributions
from attnimg.verification.proofs import Setting, prove

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

LAYERS = {
    "head_dim 64": LayerGroup(count=1, heads=8, kv_heads=2, head_dim_qk=64, head_dim_v=64),
    "head_dim 128, no groups": LayerGroup(
        count=1, heads=8, kv_heads=8, head_dim_qk=128, head_dim_v=128
    ),
    "head_dim 256, window": LayerGroup(
        count=1, heads=8, kv_heads=4, head_dim_qk=256, head_dim_v=256, window=1024
    ),
    "head_dim 128, softcap": LayerGroup(
        count=1, heads=8, kv_heads=4, head_dim_qk=128, head_dim_v=128, softcap=50.0
    ),
    "MLA, 192 and 128": LayerGroup(count=1, heads=4, kv_heads=4, head_dim_qk=192, head_dim_v=128),
}


@pytest.fixture(scope="module")
def machine() -> Machine:
    return probe.this_machine(distributions())


@pytest.mark.parametrize("packing", [False, True], ids=["single", "packed"])
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
@pytest.mark.parametrize("name", [backend.name for backend in all_backends()])
def test_it_passes(
    name: str, layer: LayerGroup, packing: bool, machine: Machine, tmp_path: Path
) -> None:
    problem = a_problem(
        model=Model(type="llama", layers=(layer,)),
        dtype=plan.training_dtype(bf16="auto", fp16=False, arch=machine.arch),
        packing=packing,
        sequence_len=4096,
    )
    verdict = next(
        v
        for v in plan.choose(name, machine, problem, strict=True).verdicts
        if v.backend.name == name
    )
    if not verdict.fits:
        pytest.skip("; ".join(f"{reason.code}: {reason.text}" for reason in verdict.reasons))
    backend = find_backend(name)
    assert backend is not None
    setting = Setting(machine=machine, environment=os.environ, folder=tmp_path)
    (proof,) = prove([backend], problem, setting=setting, log=print)
    assert proof.passed, proof.reasons
    assert proof.longest == 4096
