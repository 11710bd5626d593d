"""Test that replaced code of loaded modules is found, and that what libraries do is accepted."""

from __future__ import annotations

import functools
import importlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from served_kernels import serve
from transformers import modeling_flash_attention_utils as flash
from transformers.loss import loss_utils
from transformers.models.llama import modeling_llama

from attnimg.application.registry import load_and_register
from attnimg.backends import find_backend
from attnimg.errors import KernelError
from attnimg.loaded_code import LoadedCode

STATE = Path(__file__).parents[1] / "fixtures/wrong_kernels/state.py"


def foreign(*_: object, **__: object) -> None:
    """Stand for code of a kernel."""


# What is assigned, to which attribute of what, and what is said of it.
REPLACED: dict[str, tuple[object, str, Callable[[], object], str]] = {
    "a function": (os, "replace", lambda: foreign, "os: replace"),
    "a class": (json, "JSONDecoder", lambda: KernelError, "json: JSONDecoder"),
    "a method": (
        torch.optim.Optimizer, "zero_grad", lambda: foreign,
        "torch.optim.optimizer.Optimizer: zero_grad",
    ),
    "a method that a class inherits": (
        torch.optim.AdamW, "step", lambda: foreign, "torch.optim.adamw.AdamW: step",
    ),
    "an operator that a class inherits": (
        torch.Tensor, "__matmul__", lambda: foreign, "torch.Tensor: __matmul__",
    ),
    "a function that names another module": (
        json, "dumps", lambda: functools.wraps(json.dumps)(lambda *_: foreign()), "json: dumps",
    ),
    "a partial function": (
        json, "loads", lambda: functools.partial(foreign, json.loads), "json: loads",
    ),
    "a function by another of its package": (
        torch.nn.functional, "softmax", lambda: torch.nn.functional.log_softmax,
        "torch.nn.functional: softmax",
    ),
    "a method by one of its class": (
        torch.nn.Module, "__call__", lambda: torch.nn.Module._call_impl,
        "torch.nn.modules.module.Module: __call__",
    ),
    "a partial function of the same package": (
        torch, "softmax", lambda: functools.partial(torch.sigmoid), "torch: softmax",
    ),
    "a property": (torch.Tensor, "device", lambda: property(foreign), "torch.Tensor: device"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REPLACED)
def test_code_that_another_package_replaced_is_named(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    owner, name, made, says = REPLACED[kind]
    loaded, value = LoadedCode(), made()
    assert loaded.replaced() == []
    monkeypatch.setattr(owner, name, value, raising=False)
    (text,) = loaded.replaced()
    assert text.startswith(f"{says} was replaced by code of ")


def test_what_libraries_do_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    def attend(*_: Any) -> None:
        return None

    # The kernel that an earlier run of this process loaded.
    monkeypatch.setattr(flash, "_flash_fn", foreign)
    loaded = LoadedCode()
    # As torch._dynamo, by a new function within the package.
    monkeypatch.setattr(torch, "manual_seed", torch._disable_dynamo(torch.manual_seed))
    monkeypatch.setattr(torch, "a_new_name", foreign, raising=False)
    monkeypatch.setattr(torch.optim.AdamW, "a_new_name", foreign, raising=False)
    monkeypatch.setattr(flash, "_flash_fn", attend)
    monkeypatch.setitem(sys.modules, "a_new_module", ModuleType("a_new_module"))
    assert loaded.replaced() == []


def test_a_function_in_a_dict_that_another_package_replaced_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded = LoadedCode()
    monkeypatch.setitem(loss_utils.LOSS_MAPPING, "a new name", foreign)
    assert loaded.replaced() == []
    monkeypatch.setitem(loss_utils.LOSS_MAPPING, "ForCausalLM", foreign)
    (text,) = loaded.replaced()
    assert "LOSS_MAPPING: ForCausalLM was replaced by code of " in text


def test_code_of_a_module_that_is_loaded_later_is_compared_with_its_source(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The kernel and the helpers are new packages; the source of an installed one names helpers."""
    (tmp_path / "installed").mkdir()
    (tmp_path / "installed/__init__.py").write_text("")
    (tmp_path / "installed/model.py").write_text("from helpers import attend\nclass Norm: pass\n")
    (tmp_path / "helpers.py").write_text("def attend(): pass\n")
    (tmp_path / "a_kernel.py").write_text("def norm(self, x): return x\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("installed", "installed.model", "helpers", "a_kernel"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    importlib.import_module("installed")
    loaded = LoadedCode()
    model, kernel = importlib.import_module("installed.model"), importlib.import_module("a_kernel")
    assert loaded.replaced() == []
    model.Norm.forward = kernel.norm
    assert loaded.replaced() == ["installed.model.Norm: forward was replaced by code of a_kernel"]


def test_a_kernel_that_replaces_code_of_the_run_is_refused_where_the_run_loads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proof may have been stored before the kernel changed."""
    norm = modeling_llama.LlamaRMSNorm
    monkeypatch.setattr(norm, "forward", norm.forward)  # set again after the test
    entries = []
    for name, fault in (("wrong-0", "Llama's norm replaced"), ("right-0", "none")):
        serve(tmp_path / name, fault, source=STATE)
        entries.append(f"loaded/{name}={tmp_path / name}")
    monkeypatch.setenv("LOCAL_KERNELS", ":".join(entries))
    wrong, right = find_backend("loaded/wrong-0"), find_backend("loaded/right-0")
    assert wrong is not None
    assert right is not None
    assert load_and_register(right, trusted=True)
    with pytest.raises(KernelError, match="loaded/wrong-0 changes the process that it") as caught:
        load_and_register(wrong, trusted=True)
    assert caught.value.code == "process-state"
    assert "modeling_llama.LlamaRMSNorm: forward was replaced" in caught.value.why
    assert caught.value.do == "set attn_implementation: sdpa"
