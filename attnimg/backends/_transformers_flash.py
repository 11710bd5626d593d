"""FlashAttention as transformers runs it: its one slot, what stands in for a package, its traps."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

from attnimg.backends._flash import FlashKernel, without_autocast
from attnimg.backends._hub_kernels import (
    check_hub_kernel,
    hub_error,
    load_hub_kernel,
    served_locally,
)
from attnimg.backends._hub_signatures import locked_revision
from attnimg.backends._imports import broken_kernel, import_kernel
from attnimg.backends._transformers_native import dropped, layer_of
from attnimg.errors import AttnimgError
from attnimg.facts import AttentionFunction, Backend

# Where the flash family's packages have their functions.
# Source: transformers 5.22.2, modeling_flash_attention_utils.py, _lazy_imports (2026-11-21).
_FLASH_MODULES = {
    "flash_attention_2": "flash_attn",
    "flash_attention_3": "flash_attn_interface",
    "flash_attention_4": "flash_attn.cute",
}


def flash_kernel(backend: Backend, *, trusted: bool) -> FlashKernel:
    """Return the kernel of a member of the flash family, past transformers' own path.

    Raises:
        AttnimgError: it is missing or broken.
    """
    module = _flash_module(backend, trusted=trusted)
    return FlashKernel(
        backend=backend.name,
        dense=getattr(module, "flash_attn_func", None),
        varlen=getattr(module, "flash_attn_varlen_func", None),
        unpadded_v=backend.unpadded_v,
    )


def _flash_module(backend: Backend, *, trusted: bool) -> Any:
    """Import a flash package, or the hub kernel that LOCAL_KERNELS serves in its place."""
    name = flash_name(backend)
    if name not in _FLASH_MODULES:
        return load_hub_kernel(name, trusted=trusted)
    package = backend.needs.packages[0][0]
    return import_kernel(_FLASH_MODULES[name], backend=backend.name, package=package)


def flash_name(backend: Backend) -> str:
    """Return the name under which transformers loads a member of the flash family.

    That is its own where the package is installed, else the hub kernel that LOCAL_KERNELS serves. A
    hub path without a revision gets that of kernels.lock: org/name@<commit>.

    Raises:
        AttnimgError: neither is there, and transformers would download a kernel.
    """
    from transformers import modeling_flash_attention_utils as flash

    name = backend.applied_as or backend.name
    available = {
        "flash_attention_2": flash.is_flash_attn_2_available,
        "flash_attention_3": flash.is_flash_attn_3_available,
        "flash_attention_4": flash.is_flash_attn_4_available,
    }
    if name not in available:
        return _pinned(name)
    if available[name]():
        return name
    fallback = str(flash.FLASH_ATTN_KERNEL_FALLBACK[name])
    if fallback in served_locally():
        return fallback
    package = backend.needs.packages[0][0]
    raise AttnimgError(
        f"{backend.name} does not load",
        why=f"package {package} is not installed; {fallback} is not taken without being named",
        do=f"install {package}, or set attn_implementation: {fallback}",
        code="not-installed",
        key="attn_implementation",
        exit_code=1,
    )


def _pinned(path: str) -> str:
    """Add to a hub path the revision of kernels.lock, unless the user wrote one."""
    if "/" not in path or "@" in path or path in served_locally():
        return path
    try:
        commit = locked_revision(path)
    except ValueError as error:  # a lock file that is not kernels' own
        raise broken_kernel(
            path, error, do="run `kernels lock`, which writes kernels.lock again"
        ) from error
    return f"{path}@{commit}" if commit else path


def load_flash(name: str, *, trusted: bool = False) -> None:
    """Load a flash implementation into transformers' one slot for it.

    Args:
        name: transformers' name of it, or a hub path.
        trusted: whether kernels of publishers the hub does not vouch for may run.

    Raises:
        AttnimgError: it is missing, wrongly signed or broken.
    """
    from transformers import modeling_flash_attention_utils as flash

    repo, _, revision = name.partition("@")
    if "/" in repo:
        try:
            check_hub_kernel(repo, revision=revision or None, trusted=trusted)
        except AttnimgError:
            raise
        # The hub's client raises anything: offline, no such kernel, no such revision.
        except Exception as error:
            raise hub_error(name, error, trusted=trusted) from error
    if flash._loaded_implementation == name and flash._flash_varlen_fn is None:
        # What a load that failed leaves behind: the same name is then taken for loaded, and the
        # first forward pass raises KeyError. Source: transformers 5.18 to 5.22.2 (2026-11-21).
        flash._loaded_implementation = None
    before = flash._loaded_implementation
    try:
        flash.lazy_import_flash_attention(name, allow_all_kernels=trusted)
    # Foreign kernels raise anything while they are imported. The reason is kept.
    except Exception as error:
        flash._loaded_implementation = before
        raise broken_kernel(
            name.partition("@")[0], error, do="fix or reinstall the kernel"
        ) from error
    # The packages' own kernels are compiled, and are called as transformers calls them.
    for slot in ("_flash_fn", "_flash_varlen_fn") if "/" in repo else ():
        function = getattr(flash, slot)
        if function is not None and not hasattr(function, "runs_without_autocast"):
            setattr(flash, slot, without_autocast(function))


def flash_attention(backend: Backend, *, trusted: bool) -> AttentionFunction:
    """Call transformers' flash path as a model of that implementation would."""
    from transformers import modeling_flash_attention_utils as flash
    from transformers.integrations.flash_attention import flash_attention_forward

    name = flash_name(backend)
    load_flash(name, trusted=trusted)
    takes = inspect.signature(flash._flash_varlen_fn).parameters
    has_sinks = "s_aux" in takes or "learnable_sink" in takes
    has_window = "window_size" in takes

    def attend(
        module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **arguments: Any
    ) -> tuple[Any, Any]:
        # transformers drops these two where the kernel has no such argument.
        if arguments.get("s_aux") is not None and not has_sinks:
            raise dropped(backend.name, "s_aux")
        if arguments.get("sliding_window") and not has_window:
            raise dropped(backend.name, "sliding_window")
        layer = layer_of(module, query, key)
        # The path reads the implementation off the layer's config.
        layer.config = SimpleNamespace(_attn_implementation=name)
        found: tuple[Any, Any] = flash_attention_forward(
            layer, query, key, value, attention_mask, **arguments
        )
        return found

    return attend
