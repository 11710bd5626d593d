"""Use layers of hub kernels in a run (use_kernels), after their proof.

config.json shows which layers a model has. They are proven before the model is loaded. On a CPU,
only kernels of LOCAL_KERNELS can run, since transformers maps none for training on CPUs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from attnimg.config.schema import Config
from attnimg.errors import AttnimgError, bad_value
from attnimg.facts import Finding, LocalKernel, Machine
from attnimg.files import CachedHasher, cache_folder
from attnimg.hub_layers import (
    OFF,
    KnownLayer,
    find_hub_layer,
    known_layers,
    layers_left,
    replace_layers,
)
from attnimg.run_facts import HubLayer, LayersTask, Problem
from attnimg.train.layers import is_transformers_model, layers_task, list_types

_SAME = "the model's own layers compute the same"


def requested_layers(config: Config) -> tuple[KnownLayer, ...]:
    """Return the kinds of layers for which a config requests hub kernels.

    With torch_compile there are none, since the kernels do not support it; with liger_rms_norm,
    Liger replaces RMSNorm.
    """
    if not config.use_kernels or config.torch_compile:
        return ()
    return tuple(
        layer for layer in known_layers() if layer.op != "rms_norm" or not config.liger_rms_norm
    )


def used_layers(config: Config, types: Sequence[str], machine: Machine) -> tuple[KnownLayer, ...]:
    """Return the requested kinds of layers that the model types have and the machine can run."""
    return tuple(
        layer
        for layer in requested_layers(config)
        if layer.types & set(types) and _runs_on(layer, machine)
    )


def _local(layer: KnownLayer, machine: Machine) -> LocalKernel | None:
    """Return the folder that LOCAL_KERNELS names for a layer's kernel; None for none."""
    return next((local for local in machine.local_kernels if local.repo == layer.repo), None)


def _runs_on(layer: KnownLayer, machine: Machine) -> bool:
    """Return whether a machine runs a kernel: by the build of a local one, else by the mapping."""
    local, vendor = _local(layer, machine), machine.arch.vendor
    return vendor in layer.vendors if local is None else vendor == local.vendor


def judge_hub_layers(
    config: Config, raw: Mapping[str, Any], machine: Machine
) -> tuple[list[AttnimgError], list[Finding]]:
    """Return the errors and warnings about a run's key use_kernels.

    Args:
        config: the validated run.
        raw: the model's config.json.
        machine: machine of the run; packages None means that all are installed.
    """
    requested, types = requested_layers(config), list_types(raw)
    if not requested:
        return [], []
    fitting = [layer for layer in requested if layer.types & set(types)]
    if not fitting:
        what = f"use_kernels has no effect: the hub has no layer that replaces one of {types[0]}"
        return [], [_hint(f"{what} for training; {_SAME}", "remove use_kernels")]
    errors: list[AttnimgError] = []
    warnings: list[Finding] = []
    idle = [layer for layer in fitting if not _runs_on(layer, machine)]
    for layer in idle:
        local = _local(layer, machine)
        if local is not None and machine.arch.vendor != "cpu":
            wrong = AttnimgError(
                f"the folder of {layer.repo} in LOCAL_KERNELS can't be used here",
                why=f"found a kernel built for {local.vendor}, needed {machine.arch.vendor}",
                do=f"name a folder that has a build for this GPU, or {OFF}",
                code="local-kernel",
                key="use_kernels",
            )
            return [wrong], []
    if idle:
        names = " and ".join(f"{layer.name} ({layer.repo})" for layer in idle)
        what = f"use_kernels has no kernel for training {names} on {machine.arch.name}"
        do = f"remove use_kernels; LOCAL_KERNELS={idle[0].repo}=/path names one that was built"
        warnings.append(_hint(f"{what}; {_SAME}, but slower", f"{do} for this device"))
    packages = machine.packages
    if idle != fitting and packages is not None and "kernels" not in packages:
        errors.append(
            AttnimgError(
                "use_kernels needs the library kernels",
                why="found no package kernels",
                do=f"pip install kernels, use one of attnimg's images, or {OFF}",
                code="not-installed",
                key="use_kernels",
            )
        )
    return errors, warnings


def _hint(what: str, do: str) -> Finding:
    return Finding(code="hint-not-used", key="use_kernels", what=what, do=do)


def list_hub_tasks(
    config: Config,
    problem: Problem,
    machine: Machine,
    *,
    build: Callable[[], Any],
    log: Callable[[str], None],
) -> list[LayersTask]:
    """Return the layers of hub kernels that a run has to prove; download the kernels.

    Args:
        config: the validated run.
        problem: names the precision and the rows of a batch.
        machine: of the run.
        build: returns the run's model without weights; None if it can't be built without them.
        log: prints a line.

    Raises:
        AttnimgError: a kernel is not on this machine and can't be downloaded; or the model is not
            transformers' own.
    """
    if not any(_runs_on(layer, machine) for layer in requested_layers(config)):
        return []
    model = build()
    if not is_transformers_model(model):
        raise bad_value(
            "use_kernels",
            f"use_kernels can't be proven for {config.base_model}",
            why="needed a model class of transformers, since the kernels replace only its layers",
            do=OFF,
        )
    types = list_types(model.config.to_dict())
    present = {getattr(type(module), "kernel_layer_name", None) for module in model.modules()}
    hasher = CachedHasher(cache_folder(os.environ))
    tasks = []
    for layer in used_layers(config, types, machine):
        if layer.name not in present:
            log(f"use_kernels: {type(model).__name__} has no {layer.name} here")
            continue
        hub = find_hub_layer(
            layer,
            local=_local(layer, machine),
            trusted=bool(config.trust_remote_code),
            hash_folder=hasher.hash_folder,
        )
        log(f"use_kernels: {layer.name} from {describe_kernel(hub)}")
        tasks.append(layers_task(model, layer.op, problem, hub=hub))
    hasher.save()
    return tasks


def describe_kernel(hub: HubLayer) -> str:
    """Return where a layer comes from: "org/name:Layer at COMMIT (sha256 ...)"."""
    place = f"in {hub.folder}" if hub.revision is None else f"at {hub.revision}"
    return f"{hub.repo}:{hub.layer} {place} (sha256 {hub.files[:12]})"


def kernel_record(hub: HubLayer) -> dict[str, str]:
    """Return what identifies a kernel in receipts, checkpoints and the comparison of ranks."""
    return {"kernel": hub.files, "revision": hub.revision or "local"}


def replace_by_hub_layers(
    model: Any, hubs: Sequence[HubLayer], *, device: str, log: Callable[[str], None]
) -> dict[str, dict[str, str]]:
    """Replace the layers of a loaded model by proven ones, before an adapter is added.

    Returns:
        "org/name:Layer" -> what it replaced, and kernel_record, for the receipt.

    Raises:
        AttnimgError: nothing was replaced by a kernel that was proven (code not-applied).
    """
    applied: dict[str, dict[str, str]] = {}
    for hub in hubs:
        replaced = replace_layers(model, hub, device=device)
        name, found = f"{hub.repo}:{hub.layer}", replaced.describe(model)
        applied[name] = {"layers": found, **kernel_record(hub)}
        if not replaced.modules:
            raise AttnimgError(
                f"use_kernels was not applied: {name}",
                why=f"the library kernels replaced no {hub.name} of {type(model).__name__}",
                do=OFF,
                code="not-applied",
                key="use_kernels",
                exit_code=1,
            )
        log(f"use_kernels: {name} computes {found}")
    if hubs and (left := layers_left(model)):
        log(f"use_kernels: the model itself computes {', '.join(left)}")
    return applied
