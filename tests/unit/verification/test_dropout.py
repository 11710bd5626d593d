"""Test that dropout of single weights passes, and that of whole queries or keys does not."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
from run_facts import a_backend, a_geometry

from attnimg.backends._transformers import attention_function
from attnimg.backends._varlen import FlashKernel
from attnimg.facts import AttentionFunction, Backend
from attnimg.verification.training_conditions import check_dropout

VARIANTS = Path(__file__).parents[2] / "fixtures/wrong_kernels/variants.py"
FLASH = a_backend("flash_attention_2")
SEEDS = 20


def variant(fault: str) -> AttentionFunction:
    source = VARIANTS.read_text(encoding="utf-8").replace('FAULT = "none"', f'FAULT = "{fault}"')
    module = ModuleType("variants")
    exec(compile(source, str(VARIANTS), "exec"), module.__dict__)
    return FlashKernel(
        backend="variants", dense=module.flash_attn_func, varlen=module.flash_attn_varlen_func
    )


def refused(function: AttentionFunction, backend: Backend, *, rate: float, size: int) -> list[str]:
    """Return the first fault of each seed that has one."""
    geometry = a_geometry(
        head_dim_qk=size, head_dim_v=size, dropout=rate, packing=size != 32, sequence_len=64
    )
    faults = [
        [*check_dropout(function, backend, geometry, device="cpu", seed=seed)]
        for seed in range(SEEDS)
    ]
    return [found[0].reason.text for found in faults if found]


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("size", [16, 32, 64])
@pytest.mark.parametrize("name", ["sdpa", "eager", "flash_attention_2"])
def test_right_dropout_passes_for_every_seed(name: str, size: int, rate: float) -> None:
    backend = a_backend(name)
    function = variant("none") if backend is FLASH else attention_function(backend, trusted=True)
    assert refused(function, backend, rate=rate, size=size) == []


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.3])
@pytest.mark.parametrize("whole", ["query", "key"])
def test_dropout_of_whole_queries_or_keys_is_refused(whole: str, rate: float) -> None:
    fault = "whole rows dropped" if whole == "query" else "whole keys dropped"
    found = refused(variant(fault), FLASH, rate=rate, size=64)
    assert len(found) >= SEEDS / 2
    assert any(f"the weights of a {whole} were dropped together" in text for text in found)
