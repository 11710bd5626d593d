"""Every keyword that attnimg passes to a kernel is one that the kernel's package has.

The kernels' own signatures stand in for them, read from their packages; see test_needs.py.
"""

from __future__ import annotations

import inspect
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from attention_cases import LAYER, draw, packed
from packages import constants, read, stand_in

from attnimg.backends import backend_named
from attnimg.backends._varlen import FlashKernel
from attnimg.backends.fp8 import fp8_attention
from attnimg.backends.xformers import xformers_attention

FLASH = [
    pytest.param("flash_attn", "flash_attn/flash_attn_interface.py", "flash_attention_2", id="FA2"),
    pytest.param("flash_attn_4", "flash_attn/cute/interface.py", "flash_attention_4", id="FA4"),
]


@pytest.mark.parametrize(("distribution", "path", "name"), FLASH)
@pytest.mark.parametrize("is_packed", [True, False], ids=["packed", "single"])
def test_flash_gets_each_argument_under_its_own_name(
    distribution: str, path: str, name: str, is_packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLASH_ATTENTION_DETERMINISTIC", "1")
    seen: dict[str, Any] = {}

    def answer(passed: dict[str, Any]) -> Any:
        seen.update(passed)
        return passed["q"], None

    source = read(distribution, path)
    entries = [
        stand_in(source, entry, answer) for entry in ("flash_attn_func", "flash_attn_varlen_func")
    ]
    kernel = FlashKernel(backend=name, dense=entries[0], varlen=entries[1])
    found = backend_named(name)
    assert found is not None
    features = found.needs.features
    keywords = {"window": {"sliding_window": 5}, "softcap": {"softcap": 30.0}}
    keywords["sinks"] = {"s_aux": torch.zeros(4)}
    keywords["dropout"] = {"dropout": 0.1}
    arguments = {k: v for feature in features for k, v in keywords[feature].items()}
    if is_packed:
        arguments |= packed((5, 8))
    kernel(LAYER, *draw(), None, scaling=0.5, **arguments)
    assert (seen["softmax_scale"], seen["causal"], seen["deterministic"]) == (0.5, True, True)
    assert seen["window_size"] == (4, 4)
    assert seen["softcap"] == 30.0
    assert ("learnable_sink" in seen) == ("sinks" in features)
    assert seen.get("dropout_p", 0.0) == (0.1 if "dropout" in features else 0.0)
    if is_packed:
        assert seen["cu_seqlens_q"].tolist() == seen["cu_seqlens_k"].tolist() == [0, 5, 13]
        assert (seen["max_seqlen_q"], seen["max_seqlen_k"]) == (8, 8)


def test_fp8_gets_each_argument_under_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def answer(passed: dict[str, Any]) -> Any:
        seen.update(passed)
        return passed["query"]

    source = read("torchao", "torchao/prototype/attention/shared_utils/attention.py")
    kernel = stand_in(source, "_fp8_sdpa", answer)
    for name in ("activate_flash_attention_impl", "restore_flash_attention_impl"):
        monkeypatch.setattr(torch.nn.attention, name, lambda *_: None)
    fp8_attention(kernel)(LAYER, *draw(), None, scaling=0.5)
    assert (seen["is_causal"], seen["scale"], seen["attn_mask"]) == (True, 0.5, None)
    entry = read("torchao", "torchao/prototype/attention/fp8_fa3/attention.py")
    assert "fp8_fa3_sdpa = partial(_fp8_sdpa, backend_name='FA3')".replace("'", '"') in entry


def test_xformers_gets_each_argument_under_its_own_name() -> None:
    seen: dict[str, Any] = {}

    def answer(passed: dict[str, Any]) -> Any:
        seen.update(passed)
        return passed["query"]

    source = read("xformers", "xformers/ops/fmha/__init__.py")
    ops = SimpleNamespace(
        memory_efficient_attention=stand_in(source, "memory_efficient_attention", answer),
        LowerTriangularMask=lambda: "causal",
    )
    xformers_attention(ops)(LAYER, *draw(), None, scaling=0.5, dropout=0.1)
    assert (seen["attn_bias"], seen["p"], seen["scale"]) == ("causal", 0.1, 0.5)


@pytest.mark.parametrize(
    "mask",
    ["LowerTriangularMask", "BlockDiagonalMask", "BlockDiagonalCausalMask",
     "BlockDiagonalCausalFromBottomRightMask", "BlockDiagonalCausalLocalAttentionMask"],
)  # fmt: skip
def test_xformers_trains_with_each_mask_that_is_used(mask: str) -> None:
    attn_bias = read("xformers", "xformers/ops/fmha/attn_bias.py")
    assert f"class {mask}(" in attn_bias
    for kernel in ("cutlass", "flash"):
        text = read("xformers", f"xformers/ops/fmha/{kernel}.py")
        forward, backward = (
            set(re.findall(r"\w+", constants(text, direction)["SUPPORTED_ATTN_BIAS_TYPES"]))
            for direction in ("FwOp", "BwOp")
        )
        assert mask in forward
        # flash's backward pass takes what the forward one does, except what it lists.
        assert (mask in backward) != ("difference" in backward), kernel


@pytest.mark.parametrize(
    ("file", "name", "arguments"),
    [
        ("load.py", "get_kernel", {"revision": "r", "version": None, "trust_remote_code": True}),
        ("load.py", "get_locked_kernel", {"lockfile": "l", "trust_remote_code": True}),
        ("install.py", "install_kernel", {"revision": None, "version": 1, "local_files_only": True,
                                          "trust_remote_code": True}),
    ],
)  # fmt: skip
def test_kernels_takes_what_is_passed(file: str, name: str, arguments: dict[str, Any]) -> None:
    function = stand_in(read("kernels", f"kernels/{file}"), name, lambda passed: passed)
    found = function("org/name", **arguments)
    assert {key: found[key] for key in arguments} == arguments


def test_torch_has_varlen_attn_with_the_arguments_in_that_order() -> None:
    from torch.nn.attention.varlen import varlen_attn

    names = list(inspect.signature(varlen_attn).parameters)
    assert names[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert {"scale", "window_size", "enable_gqa"} <= set(names)
