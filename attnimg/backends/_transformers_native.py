"""Attention that transformers brings along, called on any object in place of its layer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from attnimg.errors import AttnimgError
from attnimg.facts import Backend


def native_attention(
    backend: Backend,
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any,
    **arguments: Any,
) -> tuple[Any, Any]:
    """Call what transformers registers for a name, sdpa or flex_attention."""
    from transformers import AttentionInterface

    if arguments.get("s_aux") is not None and "sinks" not in backend.needs.features:
        raise dropped(backend.name, "s_aux")
    function = AttentionInterface()[backend.applied_as]
    layer = layer_of(module, query, key)
    found: tuple[Any, Any] = function(layer, query, key, value, attention_mask, **arguments)
    return found


def layer_of(module: Any, query: Any, key: Any) -> Any:
    """Give what transformers' functions read off an attention layer, which may be any object."""
    from torch import nn

    # float32 queries are cast to the precision of the layer's first linear map.
    same_dtype = nn.Linear(1, 1, device="meta", dtype=query.dtype)
    return SimpleNamespace(
        num_key_value_groups=query.shape[1] // key.shape[1],
        is_causal=getattr(module, "is_causal", True),
        training=getattr(module, "training", False),
        layer_idx=getattr(module, "layer_idx", None),
        head_dim=query.shape[-1],
        modules=getattr(module, "modules", lambda: iter([same_dtype])),
    )


def eager_attention(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **arguments: Any
) -> tuple[Any, Any]:
    """Call the plain attention of the model family whose arguments these are."""
    from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward as with_softcap
    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward as with_sinks
    from transformers.models.llama.modeling_llama import eager_attention_forward as plain

    layer = layer_of(module, query, key)
    layer.sinks = sinks = arguments.pop("s_aux", None)
    if sinks is not None and arguments.get("softcap"):
        raise dropped("eager", "softcap together with s_aux")
    arguments.setdefault("dropout", 0.0)
    if arguments.get("scaling") is None:
        arguments["scaling"] = query.shape[-1] ** -0.5
    function = plain
    if arguments.get("softcap"):
        function = with_softcap
    if sinks is not None:
        function = with_sinks
    found: tuple[Any, Any] = function(layer, query, key, value, attention_mask, **arguments)
    return found


def dropped(backend: str, argument: str) -> AttnimgError:
    """Give the error for an argument that transformers would drop without a word."""
    return AttnimgError(
        f"{backend} cannot honour an argument of this model's attention",
        why=f"found {argument}; it has no such argument, and transformers would drop it",
        do="set attn_implementation: eager, or another backend that `attnimg explain` shows to fit",
        code="argument-not-honoured",
        key="attn_implementation",
        exit_code=1,
    )
