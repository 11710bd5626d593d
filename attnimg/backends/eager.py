"""Define the backend eager: matrix products and softmax in PyTorch, on every device."""

from typing import Any

from attnimg.facts import Backend, Needs


def eager_attention(
    module: Any, query: Any, key: Any, *others: Any, **arguments: Any
) -> tuple[Any, Any]:
    """Call transformers' eager attention, with softcap or sinks if the arguments have them."""
    from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward as with_softcap
    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward as with_sinks
    from transformers.models.llama.modeling_llama import eager_attention_forward as plain

    from attnimg.backends._transformers import dropped, layer_of

    layer = layer_of(module, query, key)
    layer.sinks = sinks = arguments.pop("s_aux", None)
    if sinks is not None and arguments.get("softcap"):
        raise dropped("eager", "softcap together with s_aux")
    arguments.setdefault("dropout", 0.0)
    if arguments.get("scaling") is None:
        arguments["scaling"] = query.shape[-1] ** -0.5
    function = with_softcap if arguments.get("softcap") else plain
    if sinks is not None:
        function = with_sinks
    found: tuple[Any, Any] = function(layer, query, key, *others, **arguments)
    return found


BACKEND = Backend(
    name="eager",
    rank=90,
    rank_why="takes every model, and stores all attention scores of a row",
    rank_source="transformers 5.22.2, eager_attention_forward (2026-11-26)",
    summary="plain PyTorch attention",
    packing="mask",
    needs_dtype_cast=False,
    applied_as="eager",
    mask="eager",
    needs=Needs(),
)
