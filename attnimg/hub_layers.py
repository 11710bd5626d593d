"""Replace layers of a loaded model by layers of hub kernels, with the library `kernels`.

Only the layers in data/hub_layers.toml are replaced, each by its name, so attention keeps the
selected backend. A kernel comes from LOCAL_KERNELS, kernels.lock, the cache or
the hub, pinned by its commit. verification/layers.py proves the layers of a run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from attnimg.backends._loading import (
    LOCK_FILE,
    check_hub_kernel,
    hub_errors,
    kernel_error,
    locked_revision,
    only_own_code,
)
from attnimg.facts import LayerOp, LocalKernel
from attnimg.files import read_data
from attnimg.liger import Replaced
from attnimg.run_facts import HubLayer

OFF = "set use_kernels: false"


@dataclass(frozen=True, kw_only=True, slots=True)
class KnownLayer:
    """A kind of layer that a hub kernel replaces.

    Attributes:
        name: transformers' name for it.
        op: what it computes.
        repo: the kernel's org/name.
        layer: the class in the kernel.
        version: the kernel's major version.
        vendors: vendors of the GPUs that transformers maps it for.
        types: model types that have such layers.
    """

    name: str
    op: LayerOp
    repo: str
    layer: str
    version: int
    vendors: frozenset[str]
    types: frozenset[str]


@cache
def known_layers() -> tuple[KnownLayer, ...]:
    """Return the kinds of layers that hub kernels replace."""
    return tuple(
        KnownLayer(
            name=name,
            **{**row, "vendors": frozenset(row["vendors"]), "types": frozenset(row["types"])},
        )
        for name, row in read_data("hub_layers.toml").items()
    )


def find_hub_layer(
    known: KnownLayer,
    *,
    local: LocalKernel | None,
    trusted: bool,
    hash_folder: Callable[[Path], str],
) -> HubLayer:
    """Return a layer of a kernel, with the hash of its files; download it if it is not local.

    The kernel's code is not run.

    Args:
        known: the kind of layer.
        local: the folder that LOCAL_KERNELS names for the kernel; None for none.
        trusted: whether the user set trust_remote_code.
        hash_folder: returns the hash of a folder's files.

    Raises:
        AttnimgError: the kernel is not on this machine and can't be downloaded, or is not trusted.
    """
    with hub_errors(known.repo, trusted=trusted, otherwise=OFF):
        if local is not None:
            folder, revision = Path(local.path), None
        else:
            found = check_hub_kernel(
                known.repo, trusted=trusted, version=known.version, otherwise=OFF
            )
            assert found.folder is not None
            # SNAPSHOT/build/VARIANT, where a snapshot is named by its commit.
            folder, revision = found.folder, found.folder.parents[1].name
        return HubLayer(
            name=known.name,
            op=known.op,
            repo=known.repo,
            layer=known.layer,
            revision=revision,
            folder=str(folder),
            files=hash_folder(folder),
            trusted=trusted,
        )


def load_layer(hub: HubLayer) -> Any:
    """Load a kernel, and return the class of its layer.

    Raises:
        AttnimgError: the kernel does not load, or its layer has no backward pass.
    """
    with (
        hub_errors(hub.repo, trusted=hub.trusted, otherwise=OFF),
        only_own_code(hub.repo, otherwise=OFF),
    ):
        layer = _repository(hub).load()
    if not getattr(layer, "has_backward", True):
        raise kernel_error(
            f"{hub.repo}:{hub.layer} can't be trained with",
            why="found has_backward = False in the kernel's layer; needed a backward pass",
            do=OFF,
            code="no-backward",
        )
    return layer


def replace_layers(model: Any, hub: HubLayer, *, device: str) -> Replaced:
    """Replace all layers of one kind in a model.

    Args:
        model: a transformers model, before PEFT wraps it.
        hub: the kernel's layer.
        device: the type of the run's device, "cpu" or "cuda".

    Returns:
        A description of the replaced layers. A kernel's layer has no state: it computes with the
        weights and settings of the model's own layer.

    Raises:
        AttnimgError: the kernel does not load, or its layer has no backward pass.
    """
    import kernels
    import torch

    load_layer(hub)
    if device == "cuda" and torch.version.hip is not None:
        device = "rocm"
    mapping = {hub.name: {device: {kernels.Mode.TRAINING: _repository(hub)}}}
    names = [name for name, module in model.named_modules() if _is(module, hub.name)]
    with (
        hub_errors(hub.repo, trusted=hub.trusted, otherwise=OFF),
        kernels.use_kernel_mapping(mapping, inherit_mapping=False),
    ):
        for name in names:
            kernels.kernelize(
                model.get_submodule(name),
                mode=kernels.Mode.TRAINING,
                device=device,
                use_fallback=False,
            )
    replaced = tuple(name for name in names if _is_replaced(model, name))
    for name in replaced:
        model.get_submodule(name).register_forward_hook(_copy_gradient)
    return Replaced(modules=replaced)


def _copy_gradient(_module: Any, _inputs: Any, output: Any) -> None:
    """Copy the gradient of a layer's output before the layer's backward pass overwrites it.

    LigerRMSNorm of the hub always writes the gradient of its input over that of its output, which a
    residual still needs where a norm follows a layer, as in olmo2 (linkedin/Liger-Kernel#370).
    Source: huggingface/kernels-community, liger-kernels/torch-ext/liger_kernels/layers.py, in_place
    (2026-11-27)
    """
    if output.requires_grad:
        output.register_hook(lambda gradient: gradient.clone())


def _is(module: Any, name: str) -> bool:
    """Return whether a module is a layer of a kind that still runs its own class's code."""
    return getattr(type(module), "kernel_layer_name", None) == name and "forward" not in vars(
        module
    )


def _is_replaced(model: Any, name: str) -> bool:
    """Return whether kernelize replaced a layer; DISABLE_KERNEL_MAPPING turns this off."""
    module = model.get_submodule(name)
    forward = vars(module).get("forward")
    return forward is not None and forward.__func__ is not type(module).forward


def _repository(hub: HubLayer) -> Any:
    """Return the kernel as the library `kernels` takes it, pinned."""
    import kernels

    if hub.revision is None:
        return kernels.LocalLayerRepository(Path(hub.folder), layer_name=hub.layer)
    if locked_revision(hub.repo) == hub.revision:
        # The lock file also has the revisions of the kernels that this one depends on.
        return kernels.LockedLayerRepository(
            hub.repo, lockfile=LOCK_FILE, layer_name=hub.layer, trust_remote_code=hub.trusted
        )
    return kernels.LayerRepository(
        hub.repo, layer_name=hub.layer, revision=hub.revision, trust_remote_code=hub.trusted
    )


def layers_left(model: Any) -> tuple[str, ...]:
    """Return transformers' names of a model's layers and functions that are not replaced."""
    known = {layer.name for layer in known_layers()}
    found: set[str] = set()
    for module in model.modules():
        parts = [module, *vars(module).get("_kernel_funcs", {}).values()]
        found |= {getattr(type(part), "kernel_layer_name", "") for part in parts}
    return tuple(sorted(found - known - {""}))
