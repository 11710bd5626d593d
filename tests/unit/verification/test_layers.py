"""Test the proofs of fused layers: right ones pass under a GPU's rounding, wrong ones do not."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from liger_in_torch import WRONG, in_torch
from tiny_models import tiny_config

from attnimg import liger
from attnimg.facts import Arch, DType, Machine
from attnimg.run_facts import LayersTask
from attnimg.verification.layers import TaskResult, prove_layers
from attnimg.verification.proofs import Setting
from attnimg.verification.task_proofs import prove_tasks

FIXTURES = Path(__file__).parents[2] / "fixtures"
CLASSES = {"llama": "Llama", "gemma2": "Gemma2", "qwen3": "Qwen3", "phi3": "Phi3",
           "mixtral": "Mixtral"}  # fmt: skip
PRECISIONS = [("float32", False), ("float16", True), ("bfloat16", True), ("bfloat16", False)]
# In the largest ones dweight sums as many rows as a small batch has tokens.
TOKENS = 512


def task(op: Any, model_type: str = "llama", *, dtype: DType = "float32", autocast: bool = False,
         tokens: int = TOKENS) -> LayersTask:  # fmt: skip
    config = tiny_config(model_type)
    module = f"transformers.models.{model_type}"
    name = CLASSES[model_type]
    return LayersTask(
        op=op,
        model_class=f"{module}.modeling_{model_type}:{name}ForCausalLM",
        config_class=f"{module}.configuration_{model_type}:{name}Config",
        config=json.dumps(config.to_dict()),
        dtype=dtype,
        autocast=autocast,
        tokens=tokens,
    )


def prove(one: LayersTask, wrong: str = "") -> TaskResult:
    with in_torch(wrong):
        return prove_layers(one, device="cpu", on_case=lambda _: None)


@pytest.mark.parametrize(("dtype", "autocast"), PRECISIONS)
@pytest.mark.parametrize(
    ("op", "model_type"),
    [("rms_norm", "llama"), ("rms_norm", "gemma2"), ("rms_norm", "qwen3"),
     ("glu_activation", "llama"), ("glu_activation", "gemma2"), ("glu_activation", "phi3"),
     ("rope", "llama"), ("rope", "gemma2")],
)  # fmt: skip
def test_right_layers_pass_in_every_precision(
    op: str, model_type: str, dtype: DType, autocast: bool
) -> None:
    found = prove(task(op, model_type, dtype=dtype, autocast=autocast))
    assert found.reasons == []
    # Noise must stay well below the bounds: another seed, another GPU.
    assert max(figure.error / figure.allowed for figure in found.figures) < 0.8


@pytest.mark.parametrize(("dtype", "autocast"), PRECISIONS)
@pytest.mark.parametrize("wrong", [name for name in WRONG if "precision" not in name])
def test_a_wrong_layer_is_refused_in_every_precision(
    wrong: str, dtype: DType, autocast: bool
) -> None:
    op, _ = WRONG[wrong]
    of = "gemma2" if "offset" in wrong else "llama"
    tokens = 1600 if "1,000" in wrong else TOKENS
    found = prove(task(op, of, dtype=dtype, autocast=autocast, tokens=tokens), wrong)
    assert found.reasons, wrong
    assert found.reasons[0].text.startswith(f"{op}: ")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("wrong", [name for name in WRONG if "precision" in name])
def test_sums_in_low_precision_are_refused(wrong: str, dtype: DType) -> None:
    # As in linkedin/Liger-Kernel#512: the gradient looks right, and the loss diverges in the end.
    assert prove(task("rms_norm", dtype=dtype), wrong).reasons


def test_a_model_with_another_activation_is_refused() -> None:
    # Liger's function replaces the activation of a loaded model without looking at its config.
    one = task("glu_activation")
    config = json.loads(one.config) | {"hidden_act": "gelu"}
    other = LayersTask(**{**{k: getattr(one, k) for k in one.__slots__},
                          "config": json.dumps(config)})  # fmt: skip
    assert prove(one).reasons == []
    assert prove(other).reasons[0].code == "numerics-fwd"


def experts(model: Any) -> list[str]:
    return [name for name, _ in model.named_modules() if name.endswith(".experts")]


@pytest.mark.parametrize(("dtype", "autocast"), PRECISIONS)
def test_the_experts_of_the_model_pass_and_others_do_not(
    monkeypatch: pytest.MonkeyPatch, dtype: DType, autocast: bool
) -> None:
    # Liger's experts need a GPU; these are the model's own, and the same with the gate left out.
    def replace(model: Any, _op: Any) -> liger.Replaced:
        return liger.Replaced(modules=tuple(experts(model)))

    def replace_wrong(model: Any, op: Any) -> liger.Replaced:
        for name in experts(model):
            model.get_submodule(name).act_fn = torch.nn.Identity()
        return replace(model, op)

    one = task("glu_activation", "mixtral", dtype=dtype, autocast=autocast)
    monkeypatch.setattr(liger, "replace_layers", replace)
    right = prove(one)
    assert (right.reasons, right.cases) == ([], 12 if autocast else 6)
    assert {figure.quantity.split()[-1] for figure in right.figures} == {
        "out", "dx", "drouting", "dgate_up_proj", "ddown_proj"}  # fmt: skip
    monkeypatch.setattr(liger, "replace_layers", replace_wrong)
    assert prove(one).reasons[0].code == "numerics-fwd"


def test_what_memory_leaves_out_is_noted() -> None:
    one = task("rms_norm", tokens=1 << 16)
    assert prove(one).note == (
        "LlamaRMSNorm proven with 32768 of 65536 tokens: limited by CPU time"
    )


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Setting:
    """Return the setting of a machine whose child processes interpret Liger's own kernels."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    paths = [FIXTURES / "interpreted", FIXTURES, *os.environ.get("PYTHONPATH", "").split(":")]
    monkeypatch.setenv("PYTHONPATH", ":".join(map(str, filter(None, paths))))
    machine = Machine(arch=Arch(name="cpu", vendor="cpu"), gpu="CPU", packages=None)
    return Setting(machine=machine, environment=os.environ, folder=None)


def test_liger_s_own_kernels_pass_and_a_wrong_one_is_refused(
    interpreted: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = Setting(machine=interpreted.machine, environment=os.environ, folder=tmp_path)
    tasks = [task("rms_norm", tokens=8), task("glu_activation", "gemma2", tokens=8),
             task("rope", tokens=8)]  # fmt: skip
    log: list[str] = []
    proofs = prove_tasks(tasks, setting=setting, log=log.append)
    assert [(proof.backend, proof.reasons, proof.cached) for proof in proofs] == [
        ("liger_rms_norm", (), False), ("liger_glu_activation", (), False),
        ("liger_rope", (), False),
    ]  # fmt: skip
    again = prove_tasks(tasks, setting=setting, log=log.append)
    assert [proof.cached for proof in again] == [True] * 3
    monkeypatch.setenv("WRONG_LIGER", "negated")
    (wrong,) = prove_tasks(tasks[:1], setting=interpreted, log=log.append)
    assert wrong.reasons[0].code == "numerics-bwd"
    assert "rms_norm: LlamaRMSNorm, 8 tokens, float32, contiguous: dx" in wrong.reasons[0].text
