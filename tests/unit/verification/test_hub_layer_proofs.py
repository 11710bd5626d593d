"""Test the proofs of layers of hub kernels, with kernels that the library `kernels` loads."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from served_kernels import serve
from tiny_models import tiny_config

from attnimg.facts import Arch, DType, LocalKernel, Machine
from attnimg.files import CachedHasher
from attnimg.hub_layers import find_hub_layer, known_layers
from attnimg.run_facts import HubLayer, LayersTask
from attnimg.verification.layers import TaskResult, prove_layers
from attnimg.verification.proofs import Setting
from attnimg.verification.task_proofs import prove_tasks

SOURCE = Path(__file__).parents[2] / "fixtures/hub_norms/kernel.py"
CLASSES = {"llama": "Llama", "qwen3": "Qwen3", "qwen3_5_text": "Qwen3_5", "qwen3_next": "Qwen3Next"}
PRECISIONS = [("float32", False), ("float16", True), ("bfloat16", True), ("bfloat16", False)]
NORM_FAULTS = [
    "dx lacks its second term", "dweight is one percent too large", "epsilon is left out",
    "the last columns are left out", "the input is overwritten", "dweight is missing",
    "the gradient is missing", "the backward pass is missing", "a call without gradients is wrong",
]  # fmt: skip
GATE_FAULTS = ["dgate is exchanged", "the gate has another activation", *NORM_FAULTS[2:4]]


def hub(folder: Path, name: str, fault: str = "none") -> HubLayer:
    """Serve a kernel with a fault, and return its layer."""
    (known,) = (layer for layer in known_layers() if layer.name == name)
    if not folder.exists():
        serve(folder, fault, source=SOURCE)
    local = LocalKernel(repo=known.repo, path=str(folder), vendor="cpu", version="1", exports=None)
    hashes = CachedHasher(None)
    return find_hub_layer(known, local=local, trusted=False, hash_folder=hashes.hash_folder)


def task(
    layer: HubLayer, model_type: str = "llama", *, dtype: DType = "float32", autocast: bool = False
) -> LayersTask:
    config = tiny_config(model_type)
    module = f"transformers.models.{model_type.removesuffix('_text')}"
    base = type(config).__module__.rpartition(".")[0]
    name = CLASSES[model_type]
    assert base == module
    return LayersTask(
        op=layer.op,
        model_class=f"{module}.modeling_{module.rpartition('.')[2]}:{name}ForCausalLM",
        config_class=f"{type(config).__module__}:{type(config).__name__}",
        config=json.dumps(config.to_dict()), dtype=dtype, autocast=autocast, tokens=256, hub=layer,
    )  # fmt: skip


def prove(one: LayersTask) -> TaskResult:
    return prove_layers(one, device="cpu", on_case=lambda _: None)


@pytest.mark.parametrize(("dtype", "autocast"), PRECISIONS)
@pytest.mark.parametrize(("name", "model_type"), [
    ("RMSNorm", "llama"), ("RMSNorm", "qwen3"), ("RMSNormGated", "qwen3_next")])  # fmt: skip
def test_a_right_kernel_passes_in_every_precision(
    tmp_path: Path, name: str, model_type: str, dtype: DType, autocast: bool
) -> None:
    found = prove(task(hub(tmp_path / "right", name), model_type, dtype=dtype, autocast=autocast))
    assert found.reasons == []
    assert max(figure.error / figure.allowed for figure in found.figures) < 0.8
    inputs = {figure.quantity.split()[-1] for figure in found.figures}
    assert inputs == {"out", "dx", "dweight", *(["dgate"] if "Gated" in name else [])}


@pytest.mark.parametrize(("dtype", "autocast"), PRECISIONS)
@pytest.mark.parametrize(("name", "fault"), [
    *(("RMSNorm", fault) for fault in NORM_FAULTS),
    *(("RMSNormGated", fault) for fault in GATE_FAULTS)])  # fmt: skip
def test_a_wrong_kernel_is_refused_in_every_precision(
    tmp_path: Path, name: str, fault: str, dtype: DType, autocast: bool
) -> None:
    of = "qwen3_next" if "Gated" in name else "llama"
    one = task(hub(tmp_path / "wrong", name, fault), of, dtype=dtype, autocast=autocast)
    if fault == "the backward pass is missing":
        with pytest.raises(Exception, match="has_backward"):
            prove(one)
        return
    found = prove(one)
    assert found.reasons, fault
    assert found.reasons[0].text.startswith(one.op)


def test_proofs_in_a_child_name_the_kernel_and_are_kept_for_its_files(tmp_path: Path) -> None:
    machine = Machine(arch=Arch(name="cpu", vendor="cpu"), gpu="CPU", packages=None)
    setting = Setting(machine=machine, environment=os.environ, folder=tmp_path / "cache")

    def proofs(folder: str, fault: str) -> list[Any]:
        one = task(hub(tmp_path / folder, "RMSNorm", fault))
        return prove_tasks([one], setting=setting, log=lambda _: None)

    (right,) = proofs("right", "none")
    assert (right.backend, right.passed) == ("kernels-community/liger-kernels:LigerRMSNorm", True)
    assert proofs("right", "none")[0].cached
    # Another content at the same place.
    source = tmp_path / "right/build/torch-cpu/__init__.py"
    source.write_text(source.read_text().replace('FAULT = "none"', 'FAULT = "no such"'))
    assert not proofs("right", "none")[0].cached
    faults = ("the backward pass is missing", "torch's generator is seeded")
    wrong = [task(hub(tmp_path / fault, "RMSNorm", fault)) for fault in faults]
    found = prove_tasks(wrong, setting=setting, log=lambda _: None)
    assert [[reason.code for reason in proof.reasons] for proof in found] == [
        ["no-backward"], ["process-state"]]  # fmt: skip
