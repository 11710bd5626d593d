"""Test that errors of the API name its arguments, and that their advice helps as written."""

from __future__ import annotations

import ast
import re
from itertools import chain

import pytest
import torch
from advice import ROOT, advice_in
from tiny_models import tiny_model

import attnimg
from attnimg.api.advice import api_words, config_words, in_api_words

CONFIG = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64,
          "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
LEAKS = CONFIG | {"model_type": "opt"}
MIXED = CONFIG | {"model_type": "mamba2", "state_size": 16}

REFUSED = [
    pytest.param(CONFIG, {"backend": "flash_attention_3"}, id="a backend of another GPU"),
    pytest.param(CONFIG, {"backend": "fa2", "on": "a100"}, id="a short name"),
    pytest.param(CONFIG, {"backend": "fp8", "packing": True}, id="a kernel without boundaries"),
    pytest.param(CONFIG, {"dtype": "bfloat16", "on": "t4"}, id="a precision that the GPU lacks"),
    pytest.param(CONFIG, {"backend": "sdpa", "backends": {"full": "eager"}}, id="two choices"),
    pytest.param(LEAKS, {"backend": "sdpa", "packing": True}, id="a mask without boundaries"),
    pytest.param(MIXED, {"packing": True}, id="layers that mix documents"),
]
ARGUMENT = re.compile(r"(\w+)=(\"[^\"]*\"|\w+)")


@pytest.mark.parametrize(("model", "arguments"), REFUSED)
def test_the_advice_helps_when_it_is_passed(model, arguments):
    with pytest.raises(attnimg.AttnimgError) as caught:
        attnimg.select(model, **arguments)
    do = caught.value.do
    edits = [{name: ast.literal_eval(value)} for name, value in ARGUMENT.findall(do)]
    if "leave backend out" in do:
        edits.append({"backend": "auto"})
    assert edits, do
    for edit in edits:
        attnimg.select(model, **(arguments | edit))


def test_an_error_of_attention_names_its_argument():
    q = torch.randn(1, 8, 2, 16)
    with pytest.raises(attnimg.KernelError, match="cannot be used here") as caught:
        attnimg.attention(q, q, q, backend="flash_attention_3", verify=False)
    assert 'pass backend="sdpa"' in caught.value.do
    assert caught.value.key == "backend"


def test_an_error_of_the_packing_check_names_arguments():
    model = tiny_model("llama", "sdpa")
    model.model.layers[0].register_forward_hook(
        lambda _module, _inputs, output: output + output.mean(1, keepdim=True)
    )
    with pytest.raises(attnimg.PackingLeak) as caught:
        attnimg.check_packing(model)
    assert caught.value.do.startswith("pass packing=False, or pass backend=")
    assert caught.value.key == "packing"


def test_warnings_name_arguments():
    choice = attnimg.select(CONFIG, packing=True, sequence_len=65536, on="t4", backend="sdpa")
    (warning,) = [w for w in choice.warnings if w.code == "quadratic-memory"]
    assert "pass checkpointing=True" in warning.do
    assert "set " not in warning.do


def test_a_caller_with_a_config_keeps_its_keys():
    with config_words(), pytest.raises(attnimg.KernelError) as caught:
        attnimg.select(CONFIG, backend="flash_attention_3")
    assert caught.value.do == "set attn_implementation: sdpa, which fits"
    assert caught.value.key == "attn_implementation"


def test_a_variable_keeps_its_name(monkeypatch):
    monkeypatch.setenv("ATTNIMG_BACKEND", "flash_attention_3")
    with pytest.raises(attnimg.KernelError) as caught:
        attnimg.select(CONFIG)
    assert caught.value.do == "set ATTNIMG_BACKEND=sdpa, which fits, or unset ATTNIMG_BACKEND"


WRITTEN = {
    "set attn_implementation: a/b-c@v1:fn, or remove x": 'pass backend="a/b-c@v1:fn", or remove x',
    "set sample_packing: false, or attn_implementation: flash_attention_2 or sdpa":
        'pass packing=False, or backend="flash_attention_2" or "sdpa"',
    "set sample_packing: false and micro_batch_size: 1, or report it":
        "pass packing=False and micro_batch_size=1, or report it",
    "set attn_implementation: sdpa or report it": 'pass backend="sdpa" or report it',
    "set attn_implementation to a backend that fits": "pass as backend a backend that fits",
    "remove attn_backends: auto tries the next one": "leave backends out: auto tries the next one",
    "load it with attn_implementation=choice.implementation":
        "load it with attn_implementation=choice.implementation",
}  # fmt: skip


@pytest.mark.parametrize(("written", "expected"), WRITTEN.items())
def test_advice_is_translated(written, expected):
    assert in_api_words(written) == expected


def test_all_advice_that_the_api_can_raise_is_translated():
    folders = ("api", "application", "backends", "selection", "verification")
    files = [*chain(*((ROOT / name).rglob("*.py") for name in folders)), ROOT / "pipeline.py"]
    texts = [text for path in files for text in advice_in(path)]
    assert len(texts) > 40
    for text in texts:
        translated = in_api_words(text)
        assert not re.search(r"\b(attn_\w+|sample_packing|bf16)\b(?!=)", translated), translated
        assert not re.search(r"\b(?!HF_)\w+: (true|false|\d)", translated), translated


def test_other_errors_pass_unchanged():
    with pytest.raises(KeyError, match="attn_implementation"), api_words():
        raise KeyError("attn_implementation")
