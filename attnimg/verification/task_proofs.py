"""Prove layers, optimizer and fake quantizers of a run, or read their proofs from the cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from attnimg.files import CachedHasher
from attnimg.run_facts import LayersTask, OptimizerTask, Proof, ProvenTask, QatTask
from attnimg.verification.proofs import Setting, proof_key, read, versions_of, write
from attnimg.verification.runner import Candidate, run

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
    keys = [_key(candidate, setting) for candidate in candidates]
    proofs: dict[int, Proof] = {}
    for place, (candidate, key) in enumerate(zip(candidates, keys, strict=True)):
        if setting.folder is not None and key is not None:
            cached = read(setting.folder, key, name=candidate.backend, has_bounds=True, log=log)
            if cached is not None:
                proofs[place] = cached
    missing = [place for place in range(len(tasks)) if place not in proofs]
    if missing:
        device = "cpu" if setting.machine.arch.vendor == "cpu" else "cuda"
        made = run([candidates[place] for place in missing], device=device, log=log)
        for place, proof in zip(missing, made, strict=True):
            proofs[place] = proof
            # Where files changed during the proof, it is not written.
            if setting.folder and keys[place] and _key(candidates[place], setting) == keys[place]:
                write(setting.folder, str(keys[place]), proof, log=log)
    return [proofs[place] for place in range(len(tasks))]


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


def _key(candidate: Candidate, setting: Setting) -> str | None:
    """Return the key of a proof; None without a cache, or where files can't be read."""
    if setting.folder is None:
        return None
    hashes = CachedHasher(setting.folder)
    task = candidate.task
    assert task is not None
    name = package_of(task)
    hub = task.hub if isinstance(task, LayersTask) else None
    try:
        found = hashes.hash_folder(Path(hub.folder)) if hub else hashes.hash_package(name)
        content = {"attnimg": hashes.hash_folder(Path(__file__).parents[1])}
    except OSError:
        return None
    if not found:
        return None
    hashes.save()
    return proof_key(
        candidate,
        machine=setting.machine,
        versions=versions_of([] if hub else [name]),
        content=content | {name: found},
        variables={k: v for k, v in setting.environment.items() if k.startswith(_VARIABLES)},
    )
