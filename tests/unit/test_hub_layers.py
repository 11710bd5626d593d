"""Test use_kernels: what is warned about and refused, and what a hub kernel replaces in a model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import transformers
from served_kernels import METADATA, serve
from tiny_models import tiny_model

from attnimg.config import check_values
from attnimg.config.schema import Config
from attnimg.errors import AttnimgError
from attnimg.facts import Arch, LocalKernel, Machine
from attnimg.hub_layers import find_hub_layer, known_layers, layers_left, replace_layers
from attnimg.run_facts import HubLayer, Problem
from attnimg.selection.model_types import read_causal_types
from attnimg.train import hub_layers
from attnimg.train.base_model import judge_base_model

SOURCE = Path(__file__).parents[1] / "fixtures/hub_norms/kernel.py"
LIGER, FLA = "kernels-community/liger-kernels", "kernels-community/fla"
RUN: dict[str, Any] = {
    "base_model": "org/model", "learning_rate": 1e-3,
    "datasets": [{"path": "data.jsonl", "type": "completion"}],
}  # fmt: skip
INSTALLED = {"kernels": "0.17.2", "liger-kernel": "0.8.5"}
SM_90 = Arch(name="sm_90", vendor="nvidia", capability=(9, 0))
H100 = Machine(arch=SM_90, gpu="H100", packages=INSTALLED)
AMD = Machine(arch=Arch(name="gfx942", vendor="amd"), gpu="MI300X", packages=INSTALLED)
BARE = Machine(arch=SM_90, gpu="H100", packages={})
PROBLEM = Problem(model=None, dtype="float32", packing=True, dropout=0.0, rows=2, sequence_len=64,
                  autocast=False, compiled=False, checkpointing=False)  # fmt: skip


def cpu(**vendors: Any) -> Machine:
    """Return a CPU with kernels in LOCAL_KERNELS: liger=vendor, fla=vendor."""
    return Machine(arch=Arch(name="cpu", vendor="cpu"), gpu="cpu", packages=INSTALLED,
                   local_kernels=served(**vendors))  # fmt: skip


def served(path: str = "/kernel", **vendors: Any) -> tuple[LocalKernel, ...]:
    repos = {"liger": LIGER, "fla": FLA}
    return tuple(LocalKernel(repo=repos[name], path=path, vendor=vendor, version="1", exports=None)
                 for name, vendor in vendors.items())  # fmt: skip


def judge(machine: Machine, *types: str, **keys: Any) -> tuple[list[str], list[str]]:
    config = Config.model_validate(RUN | {"use_kernels": True} | keys)
    raw = {"model_type": types[0]} | (
        {"text_config": {"model_type": types[1]}} if types[1:] else {}
    )
    errors, warnings = hub_layers.judge_hub_layers(config, raw, machine)
    assert all(error.do and error.why for error in errors)
    assert {one.code for one in warnings} <= {"hint-not-used"}
    return [error.code for error in errors], [one.what for one in warnings]


def used(machine: Machine, *types: str, **keys: Any) -> list[str]:
    config = Config.model_validate(RUN | {"use_kernels": True} | keys)
    return [layer.name for layer in hub_layers.used_layers(config, types, machine)]


def layer(folder: Path, name: str = "RMSNorm", fault: str = "none") -> HubLayer:
    (known,) = (known for known in known_layers() if known.name == name)
    serve(folder, fault, source=SOURCE)
    (local,) = served(path=str(folder), **{"fla" if "Gated" in name else "liger": "cpu"})
    return find_hub_layer(known, local=local, trusted=False, hash_folder=lambda _: "0" * 64)


# The table.
def test_the_table_is_transformers_mapping_for_training() -> None:
    from kernels import Mode
    from transformers.integrations.hub_kernels import get_kernel_mapping_transformers

    mapping = get_kernel_mapping_transformers()
    devices = {"nvidia": "cuda", "amd": "rocm"}
    for known in known_layers():
        entry = mapping[known.name]
        assert "cpu" not in entry
        for vendor, device in devices.items():
            repository = entry.get(device, {}).get(Mode.TRAINING)
            assert (repository is not None) == (vendor in known.vendors), (known.name, vendor)
            if repository is not None:
                assert (repository._repo_id, repository.layer_name, repository._version) == (
                    known.repo, known.layer, known.version)  # fmt: skip


def test_the_table_has_the_types_whose_models_have_such_layers() -> None:
    from transformers.models.auto.configuration_auto import (
        CONFIG_MAPPING_NAMES,
        model_type_to_module_name,
    )

    folder = Path(transformers.__file__).parent / "models"
    types = read_causal_types()
    languages = {*types.causal, *types.with_other_inputs, *types.multimodal}
    languages |= {name for name in CONFIG_MAPPING_NAMES if name.endswith("_text")}
    sources: dict[str, str] = {}
    found: dict[str, set[str]] = {known.name: set() for known in known_layers()}
    for type_ in languages & set(CONFIG_MAPPING_NAMES):
        module = model_type_to_module_name(type_)
        if module not in sources:
            files = (folder / module).glob("modeling_*.py")
            sources[module] = "".join(path.read_text() for path in files)
        for name in found:
            if re.search(rf'@use_kernel_forward_from_hub\("{name}"\)\nclass', sources[module]):
                found[name].add(type_)
    assert {known.name: set(known.types) for known in known_layers()} == found


# What is said before a run.
def test_check_accepts_the_key_and_its_value_is_strict() -> None:
    assert check_values(RUN | {"use_kernels": True}, file="x").warnings == ()
    assert [e.code for e in check_values(RUN | {"use_kernels": "yes"}, file="x").errors] == [
        "bad-value"]  # fmt: skip
    for key, named in (("torch_compile", "torch_compile"), ("liger_rms_norm", "RMSNorm")):
        (one,) = check_values(RUN | {"use_kernels": True, key: True}, file="x").warnings
        assert (one.code, one.key) == ("hint-not-used", "use_kernels")
        assert named in one.what


def test_a_gpu_uses_the_kernels_that_are_mapped_for_it() -> None:
    assert judge(H100, "llama") == ([], [])
    assert used(H100, "llama") == ["RMSNorm"]
    assert used(H100, "qwen3_next") == ["RMSNormGated"]
    assert used(H100, "olmo_hybrid") == ["RMSNorm", "RMSNormGated"]
    assert used(H100, "llava", "llama") == ["RMSNorm"]
    assert used(H100, "llama", use_kernels=False) == []
    assert used(H100, "llama", torch_compile=True) == []
    assert used(H100, "olmo_hybrid", liger_rms_norm=True) == ["RMSNormGated"]


def test_a_kernel_that_is_not_used_is_never_silent() -> None:
    errors, (said,) = judge(cpu(), "llama")
    assert (errors, LIGER in said) == ([], True)
    assert used(cpu(), "llama") == []
    assert judge(cpu(liger="nvidia"), "llama")[1] == [said]
    assert judge(cpu(liger="cpu"), "llama") == ([], [])
    assert used(cpu(liger="cpu"), "llama") == ["RMSNorm"]
    _, (partly,) = judge(cpu(liger="cpu"), "olmo_hybrid")
    assert "RMSNormGated" in partly
    assert "RMSNorm (" not in partly
    _, (amd,) = judge(AMD, "olmo_hybrid")
    assert (used(AMD, "olmo_hybrid"), "RMSNormGated" in amd) == (["RMSNorm"], True)
    _, (other,) = judge(H100, "gemma2")
    assert "no layer that replaces one of gemma2" in other
    assert judge(BARE, "llama") == (["not-installed"], [])
    wrong = Machine(arch=SM_90, gpu="H100", packages=INSTALLED, local_kernels=served(liger="cpu"))
    assert judge(wrong, "llama") == (["local-kernel"], [])


def test_explain_and_train_say_the_same() -> None:
    config = Config.model_validate(RUN | {"use_kernels": True})
    raw = {"model_type": "llama"}
    (said,) = (w for w in judge_base_model(config, raw, cpu())[1] if w.key == "use_kernels")
    assert said.code == "hint-not-used"


# What a run does.
def test_only_the_norms_of_a_model_are_replaced_and_it_computes_the_same(tmp_path: Path) -> None:
    import torch

    ids = torch.arange(3, 43).view(2, 20)
    models = [tiny_model("qwen3") for _ in range(2)]
    replaced = replace_layers(models[1], layer(tmp_path / "kernel"), device="cpu")
    norms = {name for name, module in models[1].named_modules() if "RMSNorm" in str(type(module))}
    assert set(replaced.modules) == norms
    # Attention's own functions and modules, the MLPs and the model are as they were.
    changed = {name for name, module in models[1].named_modules() if "forward" in vars(module)}
    assert changed == norms
    for module in models[1].modules():
        for function in vars(module).get("_kernel_funcs", {}).values():
            assert "forward" not in vars(function)
    assert layers_left(models[1]) == ("SiLU", "rotary_pos_emb")
    losses = []
    for model in models:
        model.train()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for (name, own), (_, found) in zip(*(m.named_parameters() for m in models), strict=True):
        assert found.grad is not None, name
        assert (own.grad - found.grad).norm() <= 1e-3 * own.grad.norm() + 1e-7, name
    # Evaluations use the proven kernel as well.
    models[1].eval()
    norm = models[1].get_submodule("model.norm")
    assert norm.forward.__func__.__qualname__ == "LigerRMSNorm.forward"


@pytest.mark.parametrize("model_type", ["olmo2", "glm4"])
def test_the_gradients_of_a_model_with_norms_after_its_layers_stay_the_same(
    tmp_path: Path, model_type: str
) -> None:
    import torch

    ids = torch.arange(3, 43).view(2, 20)
    models = [tiny_model(model_type) for _ in range(2)]
    assert replace_layers(models[1], layer(tmp_path / "kernel"), device="cpu").modules
    for model in models:
        model(input_ids=ids, labels=ids).loss.backward()
    for (name, own), (_, found) in zip(*(m.named_parameters() for m in models), strict=True):
        assert found.grad is not None, name
        assert (own.grad - found.grad).norm() <= 1e-3 * own.grad.norm() + 1e-7, name


def test_an_adapter_s_copy_of_a_norm_computes_with_its_own_weight(tmp_path: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model

    model = tiny_model("llama")
    replace_layers(model, layer(tmp_path / "kernel"), device="cpu")
    trained = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear",
                                               modules_to_save=["norm"]))  # fmt: skip
    ids = torch.arange(3, 27).view(1, -1)
    trained(input_ids=ids, labels=ids).loss.backward()
    copies = [p for n, p in trained.named_parameters() if "modules_to_save" in n]
    assert len(copies) == 5
    assert all(copy.grad is not None for copy in copies)


def test_a_kernel_without_a_backward_pass_is_refused_by_name(tmp_path: Path) -> None:
    one = layer(tmp_path / "kernel", fault="the backward pass is missing")
    with pytest.raises(AttnimgError) as caught:
        replace_layers(tiny_model("llama"), one, device="cpu")
    assert (caught.value.code, caught.value.do) == ("no-backward", "set use_kernels: false")
    assert f"{LIGER}:LigerRMSNorm" in caught.value.what


@pytest.mark.parametrize("text", ["raise OSError('libcudart')", "layers = None", "x = 1",
                                  "class layers:\n    class LigerRMSNorm: pass"])  # fmt: skip
def test_a_kernel_that_can_not_be_used_is_refused_by_name(tmp_path: Path, text: str) -> None:
    one = layer(tmp_path / "kernel")
    (tmp_path / "kernel/build/torch-cpu/__init__.py").write_text(text)
    with pytest.raises(AttnimgError) as caught:
        replace_layers(tiny_model("llama"), one, device="cpu")
    assert (caught.value.code, caught.value.exit_code) == ("import-error", 1)
    assert LIGER in caught.value.what
    assert (caught.value.do or "").endswith("or set use_kernels: false")


def test_a_kernel_that_replaces_nothing_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kernels.layer.layer._DISABLE_KERNEL_MAPPING", True)
    one = layer(tmp_path / "kernel")
    with pytest.raises(AttnimgError) as caught:
        hub_layers.replace_by_hub_layers(tiny_model("llama"), [one], device="cpu", log=print)
    assert caught.value.code == "not-applied"


def test_a_kernel_that_is_nowhere_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    known = known_layers()[0]
    with pytest.raises(AttnimgError) as caught:
        find_hub_layer(known, local=None, trusted=False, hash_folder=lambda _: "")
    error = caught.value
    assert (error.code, error.exit_code) == ("import-error", 1)
    assert error.what == f"{LIGER} does not load"
    assert error.do == (
        f"serve its folder by LOCAL_KERNELS={LIGER}=/path, or set use_kernels: false")  # fmt: skip


def test_a_kernel_of_the_cache_is_pinned_by_its_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    place = tmp_path / f"kernels--{LIGER.replace('/', '--')}"
    build = place / f"snapshots/{commit}/build/torch-cpu"
    build.mkdir(parents=True)
    (build / "metadata.json").write_text(json.dumps(METADATA | {"id": "_cached_norms"}))
    (build / "__init__.py").write_text(SOURCE.read_text())
    (place / "refs").mkdir()
    (place / "refs/v3").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("kernels.resolver.CACHE_DIR", str(tmp_path))
    found = find_hub_layer(known_layers()[0], local=None, trusted=False,
                           hash_folder=lambda folder: folder.name)  # fmt: skip
    assert (found.revision, found.folder, found.files) == (commit, str(build), "torch-cpu")
    assert hub_layers.kernel_record(found) == {"kernel": "torch-cpu", "revision": commit}
    model = tiny_model("llama")
    assert len(replace_layers(model, found, device="cpu").modules) == 5


def test_a_run_proves_the_layers_that_its_model_has(tmp_path: Path) -> None:
    serve(tmp_path / "kernel", "none", source=SOURCE)
    machine = Machine(arch=cpu().arch, gpu="cpu", packages=INSTALLED,
                      local_kernels=served(path=str(tmp_path / "kernel"), liger="cpu"))  # fmt: skip
    log: list[str] = []

    def tasks(build: Any, **keys: Any) -> list[Any]:
        config = Config.model_validate(RUN | {"use_kernels": True} | keys)
        return hub_layers.list_hub_tasks(config, PROBLEM, machine, build=build, log=log.append)

    (one,) = tasks(lambda: tiny_model("llama"))
    assert (one.op, one.hub.name, one.hub.revision) == ("rms_norm", "RMSNorm", None)
    assert re.search(rf"{LIGER}:LigerRMSNorm in .*kernel \(sha256 [0-9a-f]{{12}}\)", log[0])
    assert tasks(lambda: tiny_model("llama"), use_kernels=False) == []
    assert tasks(lambda: tiny_model("gemma2")) == []
    without = tiny_model("llama")
    for name, module in list(without.named_modules()):
        if "norm" in name:
            without.set_submodule(name, type(module).__base__())
    assert tasks(lambda: without) == []
    assert log[-1] == "use_kernels: LlamaForCausalLM has no RMSNorm here"
    with pytest.raises(AttnimgError) as caught:
        tasks(lambda: None)
    assert (caught.value.code, caught.value.key) == ("bad-value", "use_kernels")
