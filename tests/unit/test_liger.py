"""Test the liger keys: what is refused and warned about, and what Liger replaces in a model."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import liger_kernel
import pytest
from liger_in_torch import in_torch
from tiny_models import tiny_model

from attnimg import liger
from attnimg.config import check_values
from attnimg.config.schema import Config
from attnimg.errors import AttnimgError
from attnimg.facts import Arch, Machine
from attnimg.run_facts import LayersTask, OptimizerTask, Problem, Reason
from attnimg.run_facts import Proof as OneProof
from attnimg.train import layers
from attnimg.verification import task_proofs

RUN: dict[str, Any] = {
    "base_model": "org/model", "learning_rate": 1e-3,
    "datasets": [{"path": "data.jsonl", "type": "completion"}],
}  # fmt: skip
ALL = {"liger_rope": True, "liger_rms_norm": True, "liger_glu_activation": True}
CPU = Machine(arch=Arch(name="cpu", vendor="cpu"), gpu="CPU", packages={})
SM_90 = Arch(name="sm_90", vendor="nvidia", capability=(9, 0))
H100 = Machine(arch=SM_90, gpu="H100", packages={"liger-kernel": "0.8.5"})
PROBLEM = Problem(model=None, dtype="bfloat16", packing=True, dropout=0.0, rows=2, sequence_len=64,
                  autocast=True, compiled=False, checkpointing=False)  # fmt: skip
BARE = Machine(arch=SM_90, gpu="H100", packages={})


def config(**keys: Any) -> Config:
    return Config.model_validate(RUN | keys)


def judge(machine: Machine, model_type: str = "llama", **keys: Any) -> tuple[list[str], list[Any]]:
    errors, warnings = layers.judge_layers(config(**keys), {"model_type": model_type}, machine)
    assert all(error.do and error.why for error in errors)
    return [error.code for error in errors], [(one.code, one.key) for one in warnings]


def test_check_accepts_axolotl_s_keys() -> None:
    plugin = {"plugins": ["axolotl.integrations.liger.LigerPlugin"]}
    found = check_values({**RUN, **ALL, **plugin, "liger_layer_norm": True}, file="x.yaml")
    assert found.errors == ()
    found = check_values({**RUN, "liger_rms_norm_gated": True}, file="x.yaml")
    assert ([e.code for e in found.errors], [w.code for w in found.warnings]) == (
        [], ["hint-not-used"])  # fmt: skip


def test_liger_has_no_gated_norm() -> None:
    """As data/keys.toml says of liger_rms_norm_gated; axolotl's kernel for Qwen3.5 is its own."""
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    functions = set(MODEL_TYPE_TO_APPLY_LIGER_FN.values())
    names = {name for function in functions for name in inspect.signature(function).parameters}
    assert "rms_norm" in names
    assert not [name for name in names if "gate" in name]
    (folder,) = {Path(found).parent for found in [inspect.getfile(liger_kernel)]}
    classes = [line for path in folder.rglob("*.py") for line in path.read_text().splitlines()
               if line.startswith("class ") and "Norm" in line]  # fmt: skip
    assert classes
    assert not [line for line in classes if "Gated" in line]


@pytest.mark.parametrize(
    ("keys", "codes"),
    [
        pytest.param({"liger_swiglu": True}, [], id="the older name alone"),
        pytest.param({"liger_swiglu": True, "liger_glu_activation": False}, ["bad-value"],
                     id="both names"),
        pytest.param({"liger_rope": "yes"}, ["bad-value"], id="no boolean"),
    ],
)  # fmt: skip
def test_values_are_checked(keys: dict[str, Any], codes: list[str]) -> None:
    assert [error.code for error in check_values(RUN | keys, file="x.yaml").errors] == codes


def test_a_gpu_with_liger_uses_it_without_a_warning() -> None:
    assert judge(H100, **ALL) == ([], [])
    assert layers.used_ops(config(**ALL), "llama", H100) == ("rope", "rms_norm", "glu_activation")
    assert judge(H100, "gemma3", **ALL) == ([], [])
    assert judge(BARE, liger_rope=False) == ([], [])


def test_a_cpu_warns_that_the_keys_are_not_used() -> None:
    assert judge(CPU, **ALL) == ([], [("hint-not-used", "liger_rope")])
    assert layers.used_ops(config(**ALL), "llama", CPU) == ()


def test_what_liger_lacks_is_a_warning_or_an_error_by_name() -> None:
    assert judge(H100, "qwen3_5", **ALL) == ([], [("hint-not-used", "liger_rope")])
    assert judge(H100, "llama", liger_layer_norm=True) == (
        [], [("hint-not-used", "liger_layer_norm")])  # fmt: skip
    assert judge(H100, "bloom", **ALL) == (["liger-unknown-model"], [])
    assert judge(BARE, **ALL) == (["not-installed"], [])
    # Nothing is needed where nothing would be used.
    assert judge(BARE, liger_layer_norm=True) == ([], [("hint-not-used", "liger_layer_norm")])


def test_a_run_proves_what_it_uses() -> None:
    model = tiny_model("qwen3")
    run = config(**ALL, optimizer="adamw_8bit", weight_decay=0.1)
    found = layers.list_tasks(run, PROBLEM, H100, build=lambda: model)
    assert [task_proofs.task_name(task) for task in found] == [
        "liger_rope", "liger_rms_norm", "liger_glu_activation", "adamw_8bit"]  # fmt: skip
    one = found[0]
    assert isinstance(one, LayersTask)
    assert one.model_class == "transformers.models.qwen3.modeling_qwen3:Qwen3ForCausalLM"
    assert (one.tokens, one.dtype, one.autocast) == (128, "bfloat16", True)
    assert isinstance(found[3], OptimizerTask)
    assert found[3].weight_decay == 0.1
    assert layers.list_tasks(config(**ALL), PROBLEM, CPU, build=lambda: model) == []


@pytest.mark.parametrize("build", [lambda: None, lambda: SimpleNamespace(config=SimpleNamespace())])
def test_a_model_that_is_not_transformers_own_is_refused(build: Any) -> None:
    with pytest.raises(AttnimgError) as caught:
        layers.list_tasks(config(**ALL), PROBLEM, H100, build=build)
    assert caught.value.code == "liger-unknown-model"


@pytest.mark.parametrize(("name", "key"), [("liger_glu_activation", "liger_swiglu"),
                                           ("adamw_8bit", "optimizer")])  # fmt: skip
def test_a_failed_proof_names_the_key(monkeypatch: pytest.MonkeyPatch, name: str, key: str) -> None:
    reason = Reason(code="numerics-bwd", text="dgate is 0.1 off")
    task: Any = (
        OptimizerTask(optimizer=name, dtype="float32", weight_decay=0, beta1=0.9, beta2=0.9,
                      epsilon=1e-8)
        if key == "optimizer"
        else LayersTask(op="glu_activation", model_class="", config_class="", config="",
                        dtype="float32", autocast=False, tokens=1)
    )  # fmt: skip
    proof = OneProof(backend=name, reasons=(reason,))
    monkeypatch.setattr(task_proofs, "prove_tasks", lambda *_, **__: [proof])
    run = config(liger_swiglu=True, optimizer="adamw_8bit")
    with pytest.raises(AttnimgError) as caught:
        layers.prove_run(run, [task], machine=CPU, log=lambda _: None)
    assert (caught.value.key, caught.value.code, caught.value.exit_code) == (key, "numerics-bwd", 1)
    wanted = {"liger_swiglu": "set liger_swiglu: false",
              "optimizer": "set optimizer: adamw_torch_fused"}  # fmt: skip
    assert (caught.value.do or "").startswith(wanted[key])


def test_replaced_layers_train_the_same_with_lora_and_are_undone() -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers.models.llama import modeling_llama

    functions = dict(vars(modeling_llama))
    losses, gradients = [], []
    ids = torch.arange(3, 27).view(1, -1)
    for used in (False, True):
        model = tiny_model("llama")
        log: list[str] = []
        with in_torch():
            undo: list[Any] = []
            if used:
                applied, undo = layers.replace_proven_layers(
                    model, ("rope", "rms_norm", "glu_activation"), log=log.append
                )
                assert applied == {"rope": "apply_rotary_pos_emb", "rms_norm": "5 LlamaRMSNorm",
                                   "glu_activation": "2 LlamaMLP"}  # fmt: skip
                assert log[1] == "liger_rms_norm: 5 LlamaRMSNorm"
            torch.manual_seed(0)
            lora = LoraConfig(r=4, target_modules="all-linear", modules_to_save=["norm"],
                              init_lora_weights=False)  # fmt: skip
            trained = get_peft_model(model, lora)
            loss = trained(input_ids=ids, labels=ids).loss
            loss.backward()
            for function in undo:
                function()
        losses.append(loss.item())
        gradients.append({n: p.grad for n, p in trained.named_parameters() if p.requires_grad})
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], rtol=1e-3, atol=1e-6), name
    assert {k: v for k, v in vars(modeling_llama).items() if functions.get(k) is not v} == {}


@pytest.mark.parametrize("model_type", ["gemma2", "olmo2", "glm4", "qwen3"])
def test_the_gradients_of_whole_models_stay_the_same(model_type: str) -> None:
    # RMSNorm writes the gradient of its input over that of its output, which a residual may still
    # need (linkedin/Liger-Kernel#370): Liger's functions turn that off for such models.
    import torch

    ids = torch.arange(3, 43).view(2, 20)
    models = [tiny_model(model_type) for _ in range(2)]
    with in_torch():
        replaced = [liger.replace_layers(models[1], op) for op in liger.known_types()[model_type]]
        for model in models:
            model(input_ids=ids, labels=ids).loss.backward()
        for one in replaced:
            one.undo()
    for (name, own), (_, found) in zip(*(m.named_parameters() for m in models), strict=True):
        assert found.grad is not None, name
        off = (own.grad - found.grad).norm()
        assert off <= 1e-3 * own.grad.norm() + 1e-7, name


TABLE = """
import json, sys, torch, warnings
warnings.simplefilter("ignore")
from tiny_models import tiny_config
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
from attnimg import liger

found = {}
for name in sys.argv[1:]:
    config = tiny_config(name)
    kind = AutoModelForCausalLM
    if type(config) not in AutoModelForCausalLM._model_mapping:
        kind = AutoModelForImageTextToText
    with torch.device("meta"):
        model = kind.from_config(config)
    found[name] = []
    for op in ("rope", "rms_norm", "layer_norm", "glu_activation"):
        try:
            replaced = liger.replace_layers(model, op)
        except NotImplementedError:
            continue
        replaced.undo()
        if replaced.modules or replaced.functions:
            found[name].append(op)
print(json.dumps([found, sorted(MODEL_TYPE_TO_APPLY_LIGER_FN)]))
"""


def test_the_table_is_what_the_installed_package_replaces() -> None:
    names = ["llama", "gemma3", "mixtral", "deepseek_v3", "glm4", "qwen3_5", "nemotron"]
    paths = [str(Path(__file__).parents[1] / "fixtures"), *sys.path]
    done = subprocess.run(
        [sys.executable, "-c", TABLE, *names], capture_output=True, text=True, check=True,
        env={"PYTHONPATH": ":".join(filter(None, paths)), "OMP_NUM_THREADS": "1",
             "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    found, types = json.loads(done.stdout)
    known = liger.known_types()
    assert found == {name: sorted(known[name], key=found[name].index) for name in names}
    # pixtral is a vision tower without a language model.
    assert {*types} - {*known} == {"pixtral"}
    assert {*known} <= {*types}
