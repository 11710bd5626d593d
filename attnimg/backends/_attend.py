"""One way to call every backend: as a function of transformers' attention interface.

    fn(module, query, key, value, attention_mask, *, scaling, dropout=0.0, sliding_window=None,
       softcap=None, s_aux=None, is_causal=None, cu_seq_lens_q=None, ..., position_ids=None)
    -> (output, weights or None)

query is (B, H, T, D), key (B, G, S, D), value (B, G, S, V), output (B, T, H, V). What
attention_mask is, Backend.mask says.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial

from attnimg.facts import AttentionFunction, Backend, Geometry, LayerGroup

# How names of kernels begin that attnimg calls itself where transformers could.
DIRECT = "attnimg_direct_"


def as_applied(
    backend: Backend, layers: Iterable[LayerGroup | Geometry], *, routed: bool = False
) -> Backend:
    """Give a backend as a run applies it to its layers, and as it is proven for them.

    Most are left to transformers. A router calls kernels itself, and so do models whose v is to
    reach the kernel with its own head size, which transformers would pad.

    Args:
        backend: what a plan chose.
        layers: all that run it.
        routed: whether a router between several backends calls it.
    """
    unpadded = backend.unpadded_v and any(_is_mla(layer) for layer in layers)
    if backend.load_attend is not None or not (routed or unpadded):
        return backend
    return replace(
        backend,
        applied_as=f"{DIRECT}{backend.rank}",
        load_attend=partial(direct_function, backend),
        mask="flash",
    )


def _is_mla(layer: LayerGroup | Geometry) -> bool:
    """Tell whether unpadded values reach a kernel that is known to take them, backward too."""
    return (layer.head_dim_qk, layer.head_dim_v) == (192, 128) and layer.heads == layer.kv_heads


def attention_function(backend: Backend, *, trusted: bool = False) -> AttentionFunction:
    """Give the function that computes a backend's attention, loading its kernel.

    Nothing is registered. Of the hub only kernels are loaded that the config named or that
    LOCAL_KERNELS serves: never one that stands in for a missing package.

    Args:
        backend: whose function to give.
        trusted: whether hub kernels of publishers the hub does not vouch for may run.

    Raises:
        AttnimgError: the kernel is missing or broken.
    """
    if backend.load_attend is not None:
        return backend.load_attend(trusted=trusted) if backend.hub_repo else backend.load_attend()
    if backend.family is not None or backend.hub_repo is not None:
        from attnimg.backends._transformers_flash import flash_attention

        return flash_attention(backend, trusted=trusted)
    from attnimg.backends._transformers_native import eager_attention, native_attention

    return eager_attention if backend.applied_as == "eager" else partial(native_attention, backend)


def direct_function(backend: Backend, *, trusted: bool = False) -> AttentionFunction:
    """Give the function that calls a backend's kernel itself, without transformers' own path.

    That path has one slot for all flash kernels, which it loads anew on each change, and pads v to
    the head size of q and k. The mask of each such function is that of "flash".

    Args:
        backend: whose function to give; sdpa and eager attend document by document, exactly.
        trusted: whether hub kernels of publishers the hub does not vouch for may run.

    Raises:
        AttnimgError: the kernel is missing or broken, or there is no such way to call it.
    """
    if backend.load_attend is not None:
        return attention_function(backend, trusted=trusted)
    if backend.applied_as in ("sdpa", "eager"):
        from attnimg.backends._exact import exact_attention

        return partial(exact_attention, backend.name)
    if backend.family is None:
        assert backend.hub_repo is not None, f"{backend.name} has a mask of its own"
        from attnimg.backends._hub_kernels import hub_attention

        return hub_attention(backend.name, trusted=trusted)
    from attnimg.backends._transformers_flash import flash_kernel

    return flash_kernel(backend, trusted=trusted).attend
