"""Memory quadratic in the row: the formula against what autograd keeps, and when it is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from run_facts import a_problem
from transformers import AutoConfig, AutoModelForCausalLM

from attnimg.__main__ import run as attnimg
from attnimg.facts import Arch, DType, Machine
from attnimg.run_facts import LayerGroup, Model, Problem
from attnimg.selection.plan import choose
from attnimg.selection.run_findings import WARN_FROM, memory_warning, quadratic_memory

TOKENS, HEADS, LAYERS = 256, 4, 2
CPU = Machine(arch=Arch(name="cpu", vendor="cpu"), gpu="cpu", packages={}, torch="2.13.0")
T4 = Machine(arch=Arch(name="sm_75", vendor="nvidia", capability=(7, 5)), gpu="NVIDIA T4")


def problem(dtype: DType = "float32", tokens: int = TOKENS, **more: object) -> Problem:
    group = LayerGroup(count=LAYERS, heads=HEADS, kv_heads=HEADS, head_dim_qk=16, head_dim_v=16)
    return a_problem(
        model=Model(type="llama", layers=(group,)), dtype=dtype, sequence_len=tokens, **more
    )  # type: ignore[arg-type]  # a table's cell


def kept(implementation: str, dtype: torch.dtype) -> int:
    """Count the bytes of tensors of T x T that autograd keeps in a packed forward pass."""
    config = AutoConfig.for_model(
        "llama", vocab_size=32, hidden_size=HEADS * 16, intermediate_size=32,
        num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=HEADS,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation=implementation, dtype=dtype
    ).train()
    seen: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape[-2:] == (TOKENS, TOKENS):
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    half = torch.arange(TOKENS // 2)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(
            input_ids=torch.ones(1, TOKENS, dtype=torch.int64),
            position_ids=torch.cat([half, half])[None],
            use_cache=False,
        )
    assert out.logits.requires_grad
    return sum(seen.values())


@pytest.mark.parametrize("name", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_formula_is_what_autograd_keeps(name: str, dtype: DType) -> None:
    run = problem(dtype, packing=True)
    found = quadratic_memory(choose(name, CPU, run), run)
    assert found is not None
    assert found.total == LAYERS * found.layer
    assert kept(name, getattr(torch, dtype)) == found.total


@pytest.mark.parametrize(
    ("name", "machine", "run", "quadratic"),
    [
        ("eager", CPU, problem(), True),
        ("eager", CPU, problem(packing=True), True),
        ("sdpa", CPU, problem(packing=True), True),
        ("sdpa", CPU, problem(), False),
        ("xformers", T4, problem("float16", packing=True), False),
    ],
)
def test_only_what_holds_pairs_of_tokens_is_quadratic(
    name: str, machine: Machine, run: Problem, quadratic: bool
) -> None:
    assert (quadratic_memory(choose(name, machine, run), run) is not None) == quadratic


@pytest.mark.parametrize(
    ("tokens", "memory", "says"),
    [
        pytest.param(1024, None, None, id="short rows"),
        pytest.param(8192, None, "1.5 GiB per layer", id="a long row"),
        pytest.param(8192, 2 << 30, "likely out of memory", id="all layers together"),
        pytest.param(8192, 1 << 30, "will run out of memory", id="one layer alone"),
    ],
)
def test_it_is_told_from_a_gibibyte_on(tokens: int, memory: int | None, says: str | None) -> None:
    run = problem("float16", tokens, packing=True)
    warning = memory_warning(choose("eager", T4, run), run, memory_bytes=memory)
    assert (warning is None) == (says is None)
    if warning is not None and says is not None:
        assert says in warning.what
        assert warning.do.startswith("set attn_implementation: xformers, or reduce sequence_len")
    assert WARN_FROM == 1 << 30


def test_checkpointing_keeps_one_layer_and_is_advised_only_where_it_is_off() -> None:
    for checkpointing in (False, True):
        run = problem("float16", 8192, packing=True, checkpointing=checkpointing)
        warning = memory_warning(choose("eager", T4, run), run, memory_bytes=2 << 30)
        assert warning is not None
        assert ("likely out of memory" in warning.what) == (not checkpointing)
        assert ("set gradient_checkpointing: true" in warning.do) == (not checkpointing)


def test_explain_tells_it_in_text_and_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    Path("model/config.json").write_text('{"model_type": "gpt_oss"}')
    Path("c.yaml").write_text(
        "base_model: ./model\nlearning_rate: 1e-4\nsequence_len: 8192\nsample_packing: true\n"
        "datasets: [{path: d.jsonl, type: completion}]\n"
    )
    attnimg(["explain", "c.yaml", "--on", "t4", "--json"])
    said = json.loads(capsys.readouterr().out)
    (warning,) = [w for w in said["warnings"] if w["code"] == "quadratic-memory"]
    # 64 heads of 8192 x 8192 tokens: 4 bytes of softmax, 2 of its copy in float16.
    assert said["quadratic_memory"]["layer"] == 64 * 8192 * 8192 * 6
    assert "24.0 GiB per layer" in warning["what"]
    assert "8192 x 8192 tokens, 1 row)" in warning["what"]
    assert "more than the 14.9 GiB of this GPU" in warning["what"]
    attnimg(["explain", "c.yaml", "--on", "t4"])
    assert "quadratic in the row" in capsys.readouterr().err
    attnimg(["explain", "c.yaml", "--on", "h100", "--json"])
    said = json.loads(capsys.readouterr().out)
    assert said["quadratic_memory"] is None
    assert said["warnings"] == []
