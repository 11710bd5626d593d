"""Prove Liger's layers and optimizers with quantized states on this machine, for suite.py."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import suite_adapters as adapters

from attnimg import liger
from attnimg.run_facts import LayersTask, OptimizerTask, Proof
from attnimg.verification.proofs import Setting
from attnimg.verification.task_proofs import package_of, prove_tasks, task_name

# Sizes of Llama 3.1 8B, Gemma 2 9B, Qwen 3 8B and Mixtral 8x7B, which are the defaults of most.
SIZES: dict[str, dict[str, int]] = {
    "llama": {"hidden_size": 4096, "intermediate_size": 14336, "num_key_value_heads": 8},
    "gemma2": {"hidden_size": 3584, "intermediate_size": 14336},
    "qwen3": {"hidden_size": 4096, "intermediate_size": 12288, "num_key_value_heads": 8},
    "mixtral": {},
}


def layers(unit: dict[str, Any], stage: Callable[[str], None]) -> dict[str, Any]:
    """Prove all layers of a model, or one optimizer, and return the figures."""
    machine = adapters.this_machine()
    tasks = _tasks(unit)
    package = package_of(tasks[0])
    if machine.arch.vendor == "cpu" and package == "liger-kernel":
        return _not_here("needs-gpu", "Liger's kernels run on GPUs only")
    if machine.arch.vendor == "cpu" and unit.get("optimizer", "").startswith("paged_"):
        return _not_here("needs-gpu", "paged memory is CUDA's")
    if machine.packages is not None and not _is_installed(package):
        return _not_here("not-installed", f"needs {package}")
    stage("proving")
    setting = Setting(machine=machine, environment=os.environ, folder=None)
    made = prove_tasks(tasks, setting=setting, log=lambda _text: None)
    refused = [proof for proof in made if not proof.passed]
    return {
        "state": "failed" if refused else "passed",
        "code": refused[0].reasons[0].code if refused else "",
        "text": "; ".join(reason.text for proof in refused for reason in proof.reasons)[:900],
        "values": {"proven": [task_name(task) for task in tasks],
                   "proof_seconds": [round(proof.seconds, 2) for proof in made],
                   "figures": [_figure(proof) for proof in made],
                   "notes": [proof.note for proof in made if proof.note]},
    }  # fmt: skip


def _tasks(unit: dict[str, Any]) -> list[LayersTask | OptimizerTask]:
    if "optimizer" in unit:
        return [OptimizerTask(optimizer=unit["optimizer"], dtype=unit["dtype"], weight_decay=0.1,
                              beta1=0.9, beta2=0.95, epsilon=1e-8)]  # fmt: skip
    from transformers import AutoConfig, AutoModelForCausalLM

    name = unit["model_type"]
    config = AutoConfig.for_model(name, num_hidden_layers=2, **SIZES[name])
    model_class = AutoModelForCausalLM._model_mapping[type(config)]
    return [
        LayersTask(
            op=op,
            model_class=f"{model_class.__module__}:{model_class.__name__}",
            config_class=f"{type(config).__module__}:{type(config).__name__}",
            config=json.dumps(config.to_dict()),
            dtype=unit["dtype"],
            autocast=unit["dtype"] != "float32",
            tokens=unit["tokens"],
        )
        for op in liger.known_types()[name]
    ]


def _is_installed(package: str) -> bool:
    from importlib.util import find_spec

    return find_spec(package.replace("-", "_")) is not None


def _figure(proof: Proof) -> list[str]:
    return [f"{f.quantity} {f.error:.1e} of {f.allowed:.1e}" for f in proof.figures]


def _not_here(code: str, text: str) -> dict[str, Any]:
    return {"state": "not here", "code": code, "text": text}
