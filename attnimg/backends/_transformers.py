"""Return a backend's attention function: through transformers, or by calling the kernel directly.

Every backend is called through transformers' attention interface:

    fn(module, query, key, value, attention_mask, *, scaling, dropout=0.0, sliding_window=None,
       softcap=None, s_aux=None, is_causal=None, cu_seq_lens_q=None, ..., position_ids=None)
    -> (output, weights or None)

query is (B, H, T, D), key (B, G, S, D), value (B, G, S, V), output (B, T, H, V). Backend.mask is
the kind of attention_mask. This file does not import torch.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from attnimg.backends import local_kernel_repo
from attnimg.backends._loading import (
    check_hub_kernel,
    hub_errors,
    import_kernel,
    kernel_error,
    load_error,
    load_hub_kernel,
    local_kernel_repos,
    locked_revision,
    unsupported_argument,
)
from attnimg.backends.flash_attention_2 import DENSE, VARLEN
from attnimg.errors import AttnimgError
from attnimg.facts import AttentionFunction, Backend
from attnimg.run_facts import Geometry, LayerGroup

if TYPE_CHECKING:
    from attnimg.backends._varlen import FlashKernel

# The prefix of the names of kernels that attnimg calls directly, although transformers could.
DIRECT = "attnimg_direct_"


def applied_form(
    backend: Backend, layers: Iterable[LayerGroup | Geometry], *, routed: bool = False
) -> Backend:
    """Return the form of a backend that a run applies to its layers, and that is verified for them.

    transformers calls most backends. attnimg calls a kernel directly in a router, and for models
    whose v has another head_dim than q and k, which transformers would pad.

    Args:
        backend: the backend that a plan chose.
        layers: all layers that run it.
        routed: whether a router between several backends calls it.
    """
    unpadded = backend.unpadded_v and any(_is_mla(layer) for layer in layers)
    if backend.load_function is not None or not (routed or unpadded):
        return backend
    return replace(
        backend,
        applied_as=f"{DIRECT}{backend.rank}",
        load_function=partial(direct_function, backend),
        mask="flash",
    )


def is_called_directly(backend: Backend) -> bool:
    """Return whether `attnimg.attention` calls a backend's kernel, and not transformers' function.

    eager and flex_attention need a mask, and their functions in transformers take one.
    """
    return backend.mask not in ("eager", "flex")


def _is_mla(layer: LayerGroup | Geometry) -> bool:
    """Return whether a layer has MLA's head sizes, which kernels are known to support unpadded."""
    return (layer.head_dim_qk, layer.head_dim_v) == (192, 128) and layer.heads == layer.kv_heads


def attention_function(backend: Backend, *, trusted: bool = False) -> AttentionFunction:
    """Load a backend's kernel, and return the function that computes its attention.

    Nothing is registered. Only hub kernels that the config names or that are in LOCAL_KERNELS are
    loaded, never one in place of a missing package.

    Args:
        backend: whose function to return.
        trusted: whether hub kernels of untrusted publishers may run (trust_remote_code).

    Raises:
        AttnimgError: the kernel is missing or broken.
    """
    if backend.load_function is not None:
        options = {"trusted": trusted} if backend.hub_repo else {}
        return backend.load_function(**options)
    if backend.family is not None or backend.hub_repo is not None:
        return flash_attention(backend, trusted=trusted)
    if backend.applied_as == "eager":
        return eager_attention
    return partial(native_attention, backend)


def direct_function(backend: Backend, *, trusted: bool = False) -> AttentionFunction:
    """Return a function that calls a backend's kernel directly, without transformers.

    transformers keeps one flash implementation loaded at a time, and pads v to the head_dim of q
    and k. The mask of the returned function is of the kind "flash".

    Args:
        backend: whose function to return; that of sdpa and eager is exact attention, one document
            at a time.
        trusted: whether hub kernels of untrusted publishers may run (trust_remote_code).

    Raises:
        AttnimgError: the kernel is missing or broken, or can't be called directly.
    """
    if backend.load_function is not None:
        return attention_function(backend, trusted=trusted)
    if backend.applied_as in ("sdpa", "eager"):
        from attnimg.backends._exact import exact_attention

        return exact_attention(backend.name)
    if backend.family is not None:
        return flash_kernel(backend, trusted=trusted)
    from attnimg.backends.hub import hub_attention

    assert backend.hub_repo is not None, f"{backend.name} has a mask of its own"
    return hub_attention(backend.name, trusted=trusted)


def native_attention(
    backend: Backend, module: Any, query: Any, key: Any, *others: Any, **arguments: Any
) -> tuple[Any, Any]:
    """Call the function that transformers registers for sdpa or flex_attention."""
    from transformers import AttentionInterface

    if arguments.get("s_aux") is not None and "sinks" not in backend.needs.features:
        raise dropped_argument(backend.name, "s_aux")
    function = AttentionInterface()[backend.applied_as]
    layer = build_layer(module, query, key)
    found: tuple[Any, Any] = function(layer, query, key, *others, **arguments)
    return found


def eager_attention(
    module: Any, query: Any, key: Any, *others: Any, **arguments: Any
) -> tuple[Any, Any]:
    """Call transformers' eager attention, with softcap or sinks if the arguments have them."""
    from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward as with_softcap
    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward as with_sinks
    from transformers.models.llama.modeling_llama import eager_attention_forward as plain

    layer = build_layer(module, query, key)
    layer.sinks = sinks = arguments.pop("s_aux", None)
    assert sinks is None or not arguments.get("softcap"), "Needs.exclusive of eager refuses both"
    arguments.setdefault("dropout", 0.0)
    if arguments.get("scaling") is None:
        arguments["scaling"] = query.shape[-1] ** -0.5
    function = with_softcap if arguments.get("softcap") else plain
    if sinks is not None:
        function = with_sinks
    found: tuple[Any, Any] = function(layer, query, key, *others, **arguments)
    return found


def build_layer(module: Any, query: Any, key: Any) -> Any:
    """Return an object with the attributes of an attention layer that transformers reads."""
    from torch import nn

    # transformers casts float32 queries to the precision of the layer's first nn.Linear.
    same_dtype = nn.Linear(1, 1, device="meta", dtype=query.dtype)
    return SimpleNamespace(
        num_key_value_groups=query.shape[1] // key.shape[1],
        is_causal=getattr(module, "is_causal", True),
        training=getattr(module, "training", False),
        layer_idx=getattr(module, "layer_idx", None),
        head_dim=query.shape[-1],
        modules=getattr(module, "modules", lambda: iter([same_dtype])),
    )


def dropped_argument(backend: str, argument: str) -> AttnimgError:
    """Return the error for an argument that transformers would drop silently."""
    why = f"found {argument}; the kernel has no such argument, and transformers would drop it"
    return unsupported_argument(backend, why)


def flash_attention(backend: Backend, *, trusted: bool) -> AttentionFunction:
    """Return transformers' flash attention function, called as a model would call it."""
    from transformers import modeling_flash_attention_utils as flash
    from transformers.integrations.flash_attention import flash_attention_forward

    name = flash_name(backend)
    load_flash(name, trusted=trusted)
    parameters = inspect.signature(flash._flash_varlen_fn).parameters
    has_sinks = "s_aux" in parameters or "learnable_sink" in parameters
    has_window = "window_size" in parameters

    def attention(
        module: Any, query: Any, key: Any, *others: Any, **arguments: Any
    ) -> tuple[Any, Any]:
        # transformers silently drops these two if the kernel has no such argument.
        if arguments.get("s_aux") is not None and not has_sinks:
            raise dropped_argument(backend.name, "s_aux")
        if arguments.get("sliding_window") and not has_window:
            raise dropped_argument(backend.name, "sliding_window")
        layer = build_layer(module, query, key)
        # transformers reads the implementation from the layer's config.
        layer.config = SimpleNamespace(_attn_implementation=name)
        found: tuple[Any, Any] = flash_attention_forward(layer, query, key, *others, **arguments)
        return found

    return attention


def flash_kernel(backend: Backend, *, trusted: bool) -> FlashKernel:
    """Return the kernel of a member of the flash family, for direct calls.

    Raises:
        AttnimgError: it is missing or broken.
    """
    from attnimg.backends._varlen import FlashKernel

    name = flash_name(backend)
    if backend.module is not None and name == backend.applied_as:
        package = backend.needs.packages[0][0]
        module = import_kernel(backend.module, backend=backend.name, package=package)
    else:
        module = load_hub_kernel(name, trusted=trusted)
    return FlashKernel(
        backend=backend.name,
        dense=getattr(module, DENSE, None),
        varlen=getattr(module, VARLEN, None),
        unpadded_v=backend.unpadded_v,
    )


def flash_name(backend: Backend) -> str:
    """Return the name under which transformers loads a member of the flash family.

    That is the backend's name where its package is installed, else the hub kernel in LOCAL_KERNELS.
    A hub path without a revision gets that of kernels.lock: org/name@<commit>.

    Raises:
        AttnimgError: there is neither, so that transformers would download a kernel; or
            kernels.lock can't be read.
    """
    from transformers import modeling_flash_attention_utils as flash

    name = backend.applied_as or backend.name
    if backend.module is None:
        if "@" in name or name in local_kernel_repos():
            return name
        commit = locked_revision(name)
        return f"{name}@{commit}" if commit else name
    package = backend.needs.packages[0][0]
    # transformers calls a package available only where it can run: flash-attn needs a GPU.
    available = getattr(flash, f"is_flash_attn_{name.removeprefix('flash_attention_')}_available")
    installed = {package} if available() else set[str]()
    local = local_kernel_repo(backend, installed=installed, local_repos=local_kernel_repos())
    if installed or local is not None:
        return local or name
    raise kernel_error(
        f"{backend.name} does not load",
        why=f"package {package} is not installed, and the config does not name the hub kernel "
        f"{backend.hub_repo}",
        do=f"install {package}, or set attn_implementation: {backend.hub_repo}",
        code="not-installed",
    )


def load_flash(name: str, *, trusted: bool) -> None:
    """Load a flash implementation as the one that transformers uses.

    Args:
        name: its name in transformers, or a hub path.
        trusted: whether kernels of untrusted publishers may run (trust_remote_code).

    Raises:
        AttnimgError: it is missing or broken, or its signature is invalid.
    """
    from transformers import modeling_flash_attention_utils as flash

    from attnimg.backends._varlen import without_autocast

    from_hub = "/" in name
    if from_hub:
        with hub_errors(name, trusted=trusted):
            check_hub_kernel(name, trusted=trusted)
    if flash._loaded_implementation == name and flash._flash_varlen_fn is None:
        # After a failed load transformers treats the name as loaded, and the first forward pass
        # raises KeyError. Source: transformers 5.18 to 5.22.2 (2026-11-21).
        flash._loaded_implementation = None
    before = flash._loaded_implementation
    try:
        flash.lazy_import_flash_attention(name, allow_all_kernels=trusted)
    # The import of a kernel may raise any exception. The message is kept.
    except Exception as error:
        flash._loaded_implementation = before
        repo = name.partition("@")[0]
        raise load_error(repo, error, do="fix or reinstall the kernel") from error
    # Only hub kernels may be written with torch operations; the packages' kernels are compiled.
    for slot in ("_flash_fn", "_flash_varlen_fn") if from_hub else ():
        function = getattr(flash, slot)
        if function is not None and not hasattr(function, "runs_without_autocast"):
            setattr(flash, slot, without_autocast(function))
