"""Prove layers, optimizer and fake quantizers of a run, or read their proofs from the cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from attnimg.files import CachedHasher
from attnimg.run_facts import LayersTask, OptimizerTask, Proof, ProvenTask, QatTask
from attnimg.verification.proofs import Setting, proof_key, prove_candidates, versions_of
from attnimg.verification.runner import Candidate

# Prefixes of the environment variables that choose among kernels, or run them in an interpreter.
_VARIABLES = ("LIGER_", "TRITON_INTERPRET", "DISABLE_KERNEL_MAPPING", "USE_HUB_KERNELS")


def prove_tasks(
    tasks: Sequence[ProvenTask], *, setting: Setting, log: Callable[[str], None]
) -> list[Proof]:
    """Prove tasks in a child process.

    Args:
        tasks: layers, optimizers and fake quantizers.
        setting: the machine, the environment and the cache.
        log: called with each progress line, and with notes on unusable files of the cache.

    Returns:
        A proof for each task, in the same order; its `backend` is task_name.
    """
    candidates = [Candidate(backend=task_name(task), geometries=(), task=task) for task in tasks]
    keys = [
        partial(_key, candidate, task, setting)
        for candidate, task in zip(candidates, tasks, strict=True)
    ]
    bounded = [True] * len(tasks)
    return prove_candidates(candidates, keys=keys, bounded=bounded, setting=setting, log=log)


def task_name(task: ProvenTask) -> str:
    """Return the name of a task: a key such as "liger_rms_norm", the optimizer, the hub's layer."""
    if isinstance(task, OptimizerTask):
        return task.optimizer
    if isinstance(task, QatTask):
        return "qat"
    return f"{task.hub.repo}:{task.hub.layer}" if task.hub else f"liger_{task.op}"


def package_of(task: ProvenTask) -> str:
    """Return the distribution, or the hub's kernel, whose code a task proves."""
    if isinstance(task, LayersTask):
        return task.hub.repo if task.hub else "liger-kernel"
    if isinstance(task, QatTask):
        return "torchao"
    return "torchao" if task.optimizer.startswith("adamw_torch_") else "bitsandbytes"


def _key(candidate: Candidate, task: ProvenTask, setting: Setting, hashes: CachedHasher) -> str:
    """Return the key of a proof.

    Raises:
        OSError: some of the files are not known, or can't be read.
    """
    name = package_of(task)
    hub = task.hub if isinstance(task, LayersTask) else None
    found = hashes.hash_folder(Path(hub.folder)) if hub else hashes.hash_package(name)
    if not found:
        raise OSError(f"{name} is not installed, or does not list its files")
    return proof_key(
        candidate,
        machine=setting.machine,
        versions=versions_of([] if hub else [name]),
        content={"attnimg": hashes.hash_folder(Path(__file__).parents[1]), name: found},
        variables={k: v for k, v in setting.environment.items() if k.startswith(_VARIABLES)},
    )
