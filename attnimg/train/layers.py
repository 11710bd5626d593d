"""Use Liger's layers, optimizers with quantized states and qat in a run, once they are proven.

Whether Liger has them for the model is known from config.json; they are proven before the model is
loaded. On a CPU, where Liger's kernels can't run, the model's own layers do.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from attnimg import liger
from attnimg.config.schema import Config
from attnimg.errors import AttnimgError
from attnimg.facts import Finding, LayerOp, Machine
from attnimg.run_facts import (
    HubLayer,
    LayersTask,
    OptimizerTask,
    Problem,
    Proof,
    ProvenTask,
    QatTask,
)
from attnimg.selection.model_config import LANGUAGE_PARTS

# Key -> the op that it requests; liger_swiglu is the older name.
# Source: axolotl 0.19.0, integrations/liger/args.py, check_deprecated_swiglu (2026-11-27)
KEYS: Mapping[str, LayerOp] = {
    "liger_rope": "rope",
    "liger_rms_norm": "rms_norm",
    "liger_glu_activation": "glu_activation",
    "liger_swiglu": "glu_activation",
    "liger_layer_norm": "layer_norm",
}

# transformers' defaults. Source: transformers 5.22.2, training_args.py (2026-11-27)
_BETAS, _EPSILON = (0.9, 0.999), 1e-8

_SAME = "the model's own layers compute the same"


def requested_ops(config: Config) -> tuple[LayerOp, ...]:
    """Return the ops that a config requests."""
    return tuple(dict.fromkeys(op for key, op in KEYS.items() if getattr(config, key)))


def used_ops(config: Config, model_type: str, machine: Machine) -> tuple[LayerOp, ...]:
    """Return the requested ops that a run uses: those that Liger has for the model, on a GPU."""
    if not _runs_on(machine):
        return ()
    known = liger.known_types().get(model_type, ())
    return tuple(op for op in requested_ops(config) if op in known)


def _runs_on(machine: Machine) -> bool:
    """Return whether Liger's kernels run: on GPUs, or in Triton's interpreter, which is slow."""
    return machine.arch.vendor != "cpu" or os.environ.get("TRITON_INTERPRET") == "1"


def judge_layers(
    config: Config, raw: Mapping[str, Any], machine: Machine
) -> tuple[list[AttnimgError], list[Finding]]:
    """Return the errors and warnings about a run's liger keys.

    Args:
        config: the validated run.
        raw: the model's config.json.
        machine: of the run; None for its packages assumes that all are installed.
    """
    keys = [key for key in KEYS if getattr(config, key)]
    if not keys:
        return [], []
    if not _runs_on(machine):
        return [], [
            Finding(
                code="hint-not-used",
                key=keys[0],
                what=f"{' and '.join(keys)}: Liger's kernels run on GPUs only; {_SAME}, "
                "in more time and memory",
                do="set gradient_checkpointing: true or a smaller micro_batch_size if memory does "
                "not suffice",
            )
        ]
    types = list_types(raw)
    known = next((found for t in types if (found := liger.known_types().get(t))
                  is not None), None)  # fmt: skip
    off = f"remove {' and '.join(keys)}"
    if known is None:
        return [
            AttnimgError(
                f"Liger has no layers for {types[0]}",
                why=f"found {' and '.join(keys)}; needed a model type that liger-kernel "
                "knows, such as llama, qwen3 or gemma3_text",
                do=off,
                code="liger-unknown-model",
                key=keys[0],
            )
        ], []
    without = [key for key in keys if KEYS[key] not in known]
    warnings = []
    if without:
        warnings.append(
            Finding(
                code="hint-not-used",
                key=without[0],
                what=f"{' and '.join(without)} {'has' if len(without) == 1 else 'have'} no effect: "
                f"Liger has no such layer for {types[0]}; {_SAME}",
                do="remove it",
            )
        )
    if without != keys and machine.packages is not None and "liger-kernel" not in machine.packages:
        return [
            AttnimgError(
                f"{keys[0]} needs liger-kernel",
                why="found no package liger-kernel",
                do=f"pip install liger-kernel, use one of attnimg's GPU images, or {off}",
                code="not-installed",
                key=keys[0],
            )
        ], warnings
    return [], warnings


def list_types(raw: Mapping[str, Any]) -> list[str]:
    """Return the model type in a config.json, and that of its language model where it has one."""
    parts = (raw, *(raw.get(name) for name in LANGUAGE_PARTS))
    return [str(part.get("model_type")) for part in parts if isinstance(part, Mapping)]


def list_tasks(
    config: Config, problem: Problem, machine: Machine, *, build: Callable[[], Any]
) -> list[ProvenTask]:
    """Return what a run has to prove besides its attention and the layers of hub kernels.

    Args:
        config: the validated run.
        problem: has the precision and the rows of a batch.
        machine: of the run.
        build: returns the run's model without weights; None where it can't be built that way.

    Raises:
        AttnimgError: Liger is requested for a model that is not transformers' own, or can't be
            built without weights (code liger-unknown-model).
    """
    tasks: list[ProvenTask] = []
    if requested_ops(config) and _runs_on(machine):
        model = build()
        if not is_transformers_model(model) or model.config.model_type not in liger.known_types():
            raise AttnimgError(
                f"Liger's layers can't be proven for {config.base_model}",
                why="needed a model class of transformers that liger-kernel knows",
                do=f"remove {' and '.join(key for key in KEYS if getattr(config, key))}",
                code="liger-unknown-model",
                key=next(key for key in KEYS if getattr(config, key)),
            )
        tasks += [
            layers_task(model, op, problem)
            for op in used_ops(config, model.config.model_type, machine)
        ]
    if "8bit" in config.optimizer or "4bit" in config.optimizer:
        # Under autocast, full fine-tuning keeps some weights in float32, and trains adapters in it.
        tasks.append(
            OptimizerTask(
                optimizer=config.optimizer,
                dtype=problem.dtype,
                weight_decay=config.weight_decay,
                beta1=_BETAS[0] if config.adam_beta1 is None else config.adam_beta1,
                beta2=_BETAS[1] if config.adam_beta2 is None else config.adam_beta2,
                epsilon=_EPSILON if config.adam_epsilon is None else config.adam_epsilon,
            )
        )
    if config.qat:
        from attnimg.train.qat import qat_task

        tasks.append(qat_task(config.qat, dtype=problem.dtype))
    return tasks


def is_transformers_model(model: Any) -> bool:
    """Return whether a model and its config are of classes of transformers; None is not."""
    parts = (model, model.config) if model is not None else (model,)
    return all(type(part).__module__.startswith("transformers.") for part in parts)


def layers_task(
    model: Any, op: LayerOp, problem: Problem, *, hub: HubLayer | None = None
) -> LayersTask:
    """Return the task to prove some layers of a model of transformers."""
    model_class, config_class = (
        f"{type(part).__module__}:{type(part).__name__}" for part in (model, model.config)
    )
    return LayersTask(
        op=op,
        model_class=model_class,
        config_class=config_class,
        config=json.dumps(model.config.to_dict(), sort_keys=True),
        dtype=problem.dtype,
        autocast=problem.autocast,
        tokens=problem.rows * (problem.sequence_len or 1),
        hub=hub,
    )


def prove_run(
    config: Config,
    tasks: Sequence[ProvenTask],
    *,
    machine: Machine,
    log: Callable[[str], None],
) -> tuple[Proof, ...]:
    """Prove the layers, the optimizer and the rounding of a run, and log the results.

    Raises:
        AttnimgError: one is wrong, with the code of the first reason.
    """
    if not tasks:
        return ()
    from attnimg.pipeline import describe_proof
    from attnimg.verification.proofs import Setting
    from attnimg.verification.task_proofs import package_of, prove_tasks

    proofs = prove_tasks(tasks, setting=Setting.here(machine, os.environ), log=log)
    for task, proof in zip(tasks, proofs, strict=True):
        if proof.passed:
            log(describe_proof(proof))
            continue
        key = _key_of(task, config)
        do = {"optimizer": "set optimizer: adamw_torch_fused", "qat": "remove qat"}.get(
            key, f"set {key}: false"
        )
        found = "\n".join(f"found {reason.code}: {reason.text}" for reason in proof.reasons[:3])
        exact = {
            "optimizer": "the updates of exact states",
            "qat": "the outputs of the quantized layers, and gradients that pass through rounding",
        }.get(key, "the outputs and gradients of the model's own layers")
        publisher = package_of(task)
        kernel = proof.backend if key == "use_kernels" else f"{proof.backend} of {publisher}"
        raise AttnimgError(
            f"{kernel} failed its proof on this machine",
            why=f"{found}\nneeded: {exact}",
            do=f"{do}, and report it to {publisher}",
            code=proof.reasons[0].code,
            key=key,
            exit_code=1,
        )
    return tuple(proofs)


def _key_of(task: ProvenTask, config: Config) -> str:
    """Return the key of the config that requests what a task proves."""
    if isinstance(task, OptimizerTask):
        return "optimizer"
    if isinstance(task, QatTask):
        return "qat"
    if task.hub is not None:
        return "use_kernels"
    return next(key for key, op in KEYS.items() if op == task.op and getattr(config, key))


def replace_proven_layers(
    model: Any, ops: Sequence[LayerOp], *, log: Callable[[str], None]
) -> tuple[dict[str, str], list[Callable[[], None]]]:
    """Replace the layers of a loaded model, before an adapter is added.

    Returns:
        Op -> what was replaced, for the receipt; and functions that undo it for other models.

    Raises:
        AttnimgError: nothing was replaced for an op that was proven (code not-applied).
    """
    applied: dict[str, str] = {}
    undo: list[Callable[[], None]] = []
    for op in ops:
        replaced = liger.replace_layers(model, op)
        undo.append(replaced.undo)
        applied[op] = replaced.describe(model)
        if not (replaced.modules or replaced.functions):
            raise AttnimgError(
                f"liger_{op} was not applied",
                why=f"Liger's function changed no layer of {type(model).__name__}",
                do=f"set liger_{op}: false",
                code="not-applied",
                key=f"liger_{op}",
                exit_code=1,
            )
        log(f"liger_{op}: {applied[op]}")
    return applied, undo
