"""Layers without softmax attention: what they need, and whether packed documents mix in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from run_facts import a_problem
from transformers import AutoConfig, AutoModelForCausalLM

from attnimg.__main__ import run as attnimg
from attnimg.facts import Arch, Machine
from attnimg.run_facts import Model
from attnimg.selection.attention_shapes import read_model
from attnimg.selection.run_findings import check_other_layers, other_layer_kinds, other_layers
from attnimg.task import distributions

GRANITE = {"num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 4,
           "num_key_value_heads": 2}  # fmt: skip
FLA, CONV, SSM = "flash-linear-attention", "causal-conv1d", "mamba-ssm"


def machine(*packages: str) -> Machine:
    return Machine(
        arch=Arch(name="sm_90", vendor="nvidia", capability=(9, 0)),
        gpu="H100",
        packages=dict.fromkeys(packages, "1.0"),
    )


def model(type_: str, **fields: object) -> Model:
    return read_model({"model_type": type_} | GRANITE | fields)


def granite(*layers: str) -> Model:
    return model("granitemoehybrid", layer_types=[*layers])


@pytest.mark.parametrize(
    ("read", "kind", "count", "needs"),
    [
        pytest.param(model("qwen3_next"), "gated_delta_net", 3, (FLA, CONV), id="Qwen3-Next"),
        pytest.param(model("qwen3_5_text"), "gated_delta_net", 3, (FLA, CONV), id="Qwen3.5"),
        pytest.param(granite("mamba", "mamba", "attention", "mamba"), "mamba2", 3, (SSM, CONV),
                     id="Granite 4 H"),
        pytest.param(model("jamba"), "mamba", 4, (SSM, CONV), id="Jamba"),
        pytest.param(model("mamba2"), "mamba2_alone", 4, (SSM, CONV), id="no attention at all"),
        pytest.param(model("falcon_h1"), "mamba2_beside", 4, (SSM, CONV), id="beside attention"),
        pytest.param(model("lfm2", layer_types=["conv", "full_attention", "conv", "conv"]),
                     "short_convolution", 3, (CONV,), id="LFM2"),
    ],
)  # fmt: skip
def test_other_layers_are_named_counted_and_need_packages(
    read: Model, kind: str, count: int | None, needs: tuple[str, ...]
) -> None:
    (found,) = other_layers(read, machine())
    assert (found.kind, found.count, found.needs) == (kind, count, needs)
    assert found.missing == needs
    assert found.keeps_apart is (kind != "mamba2_alone")
    assert bool(found.modules) is found.keeps_apart


@pytest.mark.parametrize(
    "read",
    [
        pytest.param(model("llama"), id="no such type"),
        pytest.param(granite("attention", "attention", "attention", "attention"), id="none of it"),
        pytest.param(model("nemotron_x", layer_types=["mlp", "moe", "attention", "attention"]),
                     id="layers that look at one token"),
    ],
)  # fmt: skip
def test_models_without_them_pack_and_are_told_nothing(read: Model) -> None:
    problem = a_problem(model=read, dtype="bfloat16", packing=True)
    assert other_layers(read, machine()) == ()
    assert check_other_layers(problem, machine()) == ((), ())


@pytest.mark.parametrize(
    ("packing", "packages", "errors", "warnings"),
    [
        pytest.param(True, (), [], ["slow-layers"], id="packed without the packages"),
        pytest.param(True, (CONV,), [], ["slow-layers"], id="packed with one of them"),
        pytest.param(True, (FLA, CONV), [], [], id="packed with both: a batch has seq_idx"),
        pytest.param(False, (), [], ["slow-layers"], id="unpacked: correct and slow"),
        pytest.param(False, (FLA,), [], ["slow-layers"], id="one of two packages"),
        pytest.param(False, (FLA, CONV), [], [], id="unpacked with both"),
    ],
)
def test_missing_kernels_are_a_warning(
    packing: bool, packages: tuple[str, ...], errors: list[str], warnings: list[str]
) -> None:
    problem = a_problem(model=model("qwen3_next"), dtype="bfloat16", packing=packing)
    refused, told = check_other_layers(problem, machine(*packages))
    assert ([f.code for f in refused], [f.code for f in told]) == (errors, warnings)
    assert all(finding.do for finding in (*refused, *told))


@pytest.mark.parametrize("packages", [(), (SSM, CONV)])
def test_packing_is_refused_where_no_layer_can_be_called_by_document(
    packages: tuple[str, ...],
) -> None:
    problem = a_problem(model=model("mamba2"), dtype="bfloat16", packing=True)
    ((error,), told) = check_other_layers(problem, machine(*packages))
    assert (error.code, error.do, told) == (
        "packing-not-isolated", "set sample_packing: false", ()
    )  # fmt: skip
    unpacked = a_problem(model=model("mamba2"), dtype="bfloat16", packing=False)
    assert check_other_layers(unpacked, machine(*packages))[0] == ()


def test_kernels_that_isolate_documents_are_called_once() -> None:
    (found,) = other_layers(model("qwen3_next"), machine(FLA, CONV))
    assert (found.keeps_apart, found.modules) == (True, ())
    (found,) = other_layers(model("kimi_linear"), machine(FLA, CONV))
    assert (found.keeps_apart, bool(found.modules)) == (True, True)


def test_a_kind_that_nobody_here_knows_is_left_to_the_proof_on_the_model() -> None:
    read = model("brand_new", layer_types=["linear_attention", *["full_attention"] * 3])
    refused, told = check_other_layers(
        a_problem(model=read, dtype="bfloat16", packing=True), machine()
    )
    assert ([*refused], [finding.code for finding in told]) == ([], ["packing-unproven"])


def test_their_packages_are_looked_for_on_this_machine() -> None:
    assert {FLA, CONV, SSM} <= set(distributions())


def write(packing: str, type_: str = "qwen3_next") -> None:
    Path("model").mkdir()
    Path("model/config.json").write_text(json.dumps({"model_type": type_} | GRANITE))
    Path("d.jsonl").write_text('{"text": "a"}\n')
    Path("c.yaml").write_text(
        f"base_model: ./model\nlearning_rate: 1e-4\nsequence_len: 64\nsample_packing: {packing}\n"
        "datasets: [{path: d.jsonl, type: completion}]\n"
    )


def test_explain_names_them_and_keeps_the_choice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write("true")
    assert attnimg(["explain", "c.yaml", "--on", "h100", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["chosen"]["backend"] == "flash_attention_3"
    (layers,) = said["other_layers"]
    assert (layers["kind"], layers["count"], layers["keeps_apart"]) == ("gated_delta_net", 3, True)
    assert said["errors"] == []
    (warning,) = [found for found in said["warnings"] if found["code"] == "slow-layers"]
    assert "3 layers with Gated DeltaNet linear attention are called once" in warning["what"]
    assert "flash-linear-attention and causal-conv1d not installed" in warning["what"]
    attnimg(["explain", "c.yaml", "--on", "h100"])
    text = capsys.readouterr()
    assert "3 layers with Gated DeltaNet linear attention" in " ".join(text.out.split())
    assert "once per document" in text.err


def test_train_refuses_before_any_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write("true", "mamba2")  # the model's folder has no weights at all
    assert attnimg(["train", "c.yaml"]) == 2
    assert "packed documents would mix in 4 layers of mamba2" in capsys.readouterr().err


TINY: dict[str, dict[str, Any]] = {
    "qwen3_next": {"num_hidden_layers": 4, "head_dim": 16, "linear_num_key_heads": 2,
                   "linear_num_value_heads": 2, "linear_key_head_dim": 8,
                   "linear_value_head_dim": 8, "num_experts": 2, "num_experts_per_tok": 1,
                   "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    "kimi_linear": {"num_hidden_layers": 4, "head_dim": 16, "moe_intermediate_size": 16,
                    "num_experts": 2, "num_experts_per_token": 1, "kv_lora_rank": 8,
                    "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8},
    "bamba": {"num_hidden_layers": 2, "attn_layer_indices": [1], "mamba_n_heads": 4,
              "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8},
    "falcon_h1": {"num_hidden_layers": 2, "mamba_d_ssm": 64, "head_dim": 16, "mamba_n_heads": 4,
                  "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8,
                  "mamba_chunk_size": 8},
    "jamba": {"num_hidden_layers": 2, "attn_layer_period": 2, "attn_layer_offset": 1,
              "num_experts": 2, "mamba_d_state": 8, "mamba_dt_rank": 4,
              "use_mamba_kernels": False},
    "lfm2": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 32, "head_dim": 16},
}  # fmt: skip
SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2,
    "num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.mark.parametrize("type_", TINY)
def test_transformers_does_with_boundaries_what_the_table_says(type_: str) -> None:
    """Pack two documents, change the first: without kernels the second moves, or a call raises."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(type_, **SMALL, **TINY[type_])
    tiny = AutoModelForCausalLM.from_config(config, attn_implementation="eager").train()
    for weight in tiny.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.2)
    row = torch.randint(3, 64, (1, 16))
    other = row.clone()
    other[:, :7] = torch.randint(3, 64, (1, 7))
    position_ids = torch.cat([torch.arange(7), torch.arange(9)])[None]

    def second(tokens: torch.Tensor, **boundaries: torch.Tensor) -> torch.Tensor:
        out = tiny(input_ids=tokens, position_ids=position_ids, use_cache=False, **boundaries)
        return out.logits[:, 7:].detach()

    assert (second(row) - second(other)).abs().max() > 0.1
    kind = next(kind for kind in other_layer_kinds().values() if type_ in kind.types)
    given = {
        "seq_idx": torch.tensor([[0] * 7 + [1] * 9], dtype=torch.int32),
        "cu_seq_lens_q": torch.tensor([0, 7, 16], dtype=torch.int32),
        "cu_seqlens": torch.tensor([0, 7, 16], dtype=torch.int32),
    }
    for name in kind.batch:
        with pytest.raises(ValueError, match="can't keep packed sequences apart without"):
            second(row, **{name: given[name]})
    if not kind.batch:
        assert (second(row, **given) - second(other, **given)).abs().max() > 0.1
