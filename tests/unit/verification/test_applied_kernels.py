"""A proof runs the very function that training will run for that problem."""

from __future__ import annotations

import inspect
import io
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from run_facts import a_backend, a_geometry

from attnimg import application
from attnimg.backends._transformers import applied_form, attention_function
from attnimg.backends._varlen import FlashKernel
from attnimg.facts import Backend
from attnimg.run_facts import Geometry, LayerGroup, Proof

FLASH_4 = "kernels-community/flash-attn4"
STAND_IN = Path(__file__).parents[2] / "fixtures/flash_attn2"
# A kernel that takes MLA's values, and none that were padded to the size of q and k: as
# FlashAttention-4's for Blackwell, which refuses (192, 192).
STRICT = """
def unpadded(function):
    @functools.wraps(function)
    def attend(q, k, v, *more, **named):
        assert v.shape[-1] == 128, f"v arrived padded to {v.shape[-1]}"
        return function(q, k, v, *more, **named)
    return attend

flash_attn_func = unpadded(flash_attn_func)
flash_attn_varlen_func = unpadded(flash_attn_varlen_func)
"""
PLAIN = a_geometry(heads=4, kv_heads=2, head_dim_qk=16, head_dim_v=16, sequence_len=64)
MLA = a_geometry(heads=2, kv_heads=2, head_dim_qk=192, head_dim_v=128, sequence_len=64)


@pytest.fixture(autouse=True)
def kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    build = tmp_path / "build/torch-cpu"
    build.mkdir(parents=True)
    metadata = (STAND_IN / "build/torch-cpu/metadata.json").read_text(encoding="utf-8")
    (build / "metadata.json").write_text(metadata.replace("flash_attn2", "strict_flash_attn4"))
    source = (STAND_IN / "build/torch-cpu/__init__.py").read_text(encoding="utf-8")
    source = source.replace("import torch\n", "import functools\n\nimport torch\n", 1)
    (build / "__init__.py").write_text(source + STRICT)
    monkeypatch.setenv("LOCAL_KERNELS", f"{FLASH_4}={tmp_path}")
    with application.restore_registries():
        yield


def proven(name: str, geometry: Geometry, *, routed: bool = False) -> Proof:
    """Prove in this process what a child would prove."""
    from attnimg.verification.worker import prove_candidate

    candidate = {
        "backend": name, "geometries": [asdict(geometry)], "trusted": False, "routed": routed
    }  # fmt: skip
    return prove_candidate(candidate, device="cpu", references={}, report=io.StringIO())


def test_values_of_another_size_are_proven_unpadded_as_they_are_trained() -> None:
    assert proven("flash_attention_4", MLA).reasons == ()


@pytest.mark.parametrize(
    ("name", "routed", "function"),
    [
        pytest.param(
            "sdpa", True, "_exact.exact_kernel", id="a router's sdpa is exact, by document"
        ),
        pytest.param("eager", True, "_exact.exact_kernel", id="and so is its eager"),
        pytest.param("sdpa", False, "_transformers.build_layer", id="sdpa alone is transformers'"),
    ],
)
@pytest.mark.parametrize("packing", [True, False], ids=["packed", "single"])
def test_what_a_router_calls_is_what_is_proven(
    monkeypatch: pytest.MonkeyPatch, name: str, routed: bool, function: str, packing: bool
) -> None:
    geometry = a_geometry(**(asdict(PLAIN) | {"packing": packing}))
    assert proven(name, geometry, routed=routed).passed

    def reached(*_tensors: Any, **_arguments: Any) -> Any:
        raise RuntimeError("reached")

    monkeypatch.setattr(f"attnimg.backends.{function}", reached)
    assert "reached" in str(proven(name, geometry, routed=routed).reasons)


def layer(size: int, size_v: int, *, kv_heads: int = 4) -> LayerGroup:
    return LayerGroup(count=1, heads=4, kv_heads=kv_heads, head_dim_qk=size, head_dim_v=size_v)


@pytest.mark.parametrize(
    ("name", "layers", "routed", "direct"),
    [
        ("flash_attention_4", (layer(192, 128),), False, True),
        ("flash_attention_4", (layer(128, 128), layer(192, 128)), False, True),
        ("flash_attention_4", (layer(192, 128, kv_heads=2),), False, False),
        ("flash_attention_4", (layer(128, 128),), False, False),
        ("flash_attention_4", (), False, False),
        ("flash_attention_4", (layer(128, 128),), True, True),
        ("flash_attention_2", (layer(192, 128),), False, False),
        ("flash_attention_2", (layer(64, 64),), True, True),
        ("sdpa", (layer(64, 64),), True, True),
        ("sdpa", (layer(64, 64),), False, False),
        pytest.param("sage", (layer(64, 64),), True, False, id="sage is called directly anyway"),
    ],
)
def test_one_function_decides_how_a_backend_is_called(
    name: str, layers: tuple[LayerGroup, ...], routed: bool, direct: bool
) -> None:
    backend = a_backend(name)
    found: Backend = applied_form(backend, layers, routed=routed)
    assert (found != backend) == direct
    assert found.mask == ("flash" if direct else backend.mask)


def test_what_apply_registers_is_what_that_function_gives() -> None:
    from transformers import AttentionInterface

    backend = a_backend("flash_attention_4")
    layers = (layer(192, 128),)
    registered = AttentionInterface()[application.load_and_register(backend, layers=layers)]
    found = attention_function(applied_form(backend, layers))
    for function in (registered, found):
        kernel = inspect.unwrap(function)
        assert isinstance(kernel, FlashKernel)
        assert (kernel.backend, kernel.unpadded_v) == ("flash_attention_4", True)


def test_a_row_that_is_shortened_on_a_cpu_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    from attnimg.verification import candidate
    from attnimg.verification.cases import CPU

    little = replace(CPU, all_heads_scores=4 * 150**2)
    monkeypatch.setattr(candidate, "device_budget", lambda *_args, **_named: little)
    geometry = a_geometry(**(asdict(PLAIN) | {"sequence_len": 200}))
    proof = proven("sdpa", geometry)
    assert proof.passed
    assert proof.note == "proven with all heads up to 150 of 200 tokens: limited by CPU time"


def test_torchs_own_kernel_passes_where_float32_rounds_the_scale() -> None:
    # A head_dim of 16 or 64 has a power of 2 for a scale, and hides it.
    shape = a_geometry(heads=8, kv_heads=2, head_dim_qk=32, head_dim_v=32, sequence_len=64)
    assert proven("sdpa", shape).reasons == ()
