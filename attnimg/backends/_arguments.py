"""Read what a model passes to its attention: every argument is honoured or refused, none dropped.

Letters: B batch, T query tokens, S key tokens, H query heads, G key heads, D head size of q and k,
V head size of v.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from attnimg.errors import AttnimgError

# Arguments that models pass through and that do not change what attention computes.
# Source: call sites of 348 modeling files of transformers 5.22.2 (2026-11-21).
_HARMLESS = frozenset(
    {
        "cache_position", "deterministic", "labels", "logits_to_keep", "num_items_in_batch",
        "output_attentions", "output_hidden_states", "output_router_logits", "position_embeddings",
        "return_dict", "seq_idx", "shift_labels", "skip_logits", "use_cache", "use_return_dict",
    }
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """One call of attention, every argument accounted for.

    Attributes:
        backend: who is called, for errors.
        q: queries, (B, H, T, D).
        k: keys, (B, G, S, D).
        v: values, (B, G, S, V).
        scale: factor on q @ k.
        causal: whether keys to the right of a query are hidden; the last query stands at the last
            key.
        window: how many keys a query sees, its own included; without `causal` as many again to
            the right. None for all.
        softcap: scores become softcap * tanh(scores / softcap); None for none.
        sinks: a logit a head that joins the softmax, (H,); None for none.
        dropout: share of the weights that is dropped.
        padding: True where a token is none of the padding, (B, S); None without padding.
        bounds_q: where documents begin and end in the flattened queries, int32 (documents + 1,);
            None when the rows are not packed.
        bounds_k: the same in the keys.
        longest_q: the longest document's queries.
        longest_k: the longest document's keys.
        position_ids: (B, T); begin anew where a packed document does. None when not given.
    """

    backend: str
    q: Any
    k: Any
    v: Any
    scale: float
    causal: bool
    window: int | None
    softcap: float | None
    sinks: Any
    dropout: float
    padding: Any
    bounds_q: Any
    bounds_k: Any
    longest_q: int | None
    longest_k: int | None
    position_ids: Any


def read_call(
    backend: str,
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any,
    *,
    honours: frozenset[str],
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Any = None,
    position_ids: Any = None,
    cu_seq_lens_q: Any = None,
    cu_seq_lens_k: Any = None,
    max_length_q: Any = None,
    max_length_k: Any = None,
    **others: Any,
) -> Call:
    """Read one call of transformers' attention interface.

    Args:
        backend: its name.
        module: the model's attention layer.
        query: (B, H, T, D).
        key: (B, G, S, D).
        value: (B, G, S, V).
        attention_mask: None, or True where a token is none of the padding, (B, S).
        honours: which of "window", "softcap", "sinks", "dropout" the backend can do.
        scaling: factor on the scores; None means D ** -0.5.
        dropout: share of the weights to drop.
        is_causal: None takes the layer's own.
        sliding_window: how many keys a query sees.
        softcap: cap of the scores.
        s_aux: sink logits, (H,).
        position_ids: (B, T).
        cu_seq_lens_q: bounds of packed documents.
        cu_seq_lens_k: the same of the keys; None means those of the queries.
        max_length_q: longest document, an int or a tensor of one number.
        max_length_k: the same of the keys.
        others: whatever else the model passes.

    Raises:
        AttnimgError: an argument would change the result and the backend can't honour it.
    """
    window = sliding_window if sliding_window and sliding_window < key.shape[2] else None
    asked = {"window": window, "softcap": softcap, "sinks": s_aux, "dropout": dropout}
    for feature, found in asked.items():
        if feature not in honours and (found is not None and not _is_zero(found)):
            raise _refusal(backend, feature, found)
    for name, found in others.items():
        if found is not None and name not in _HARMLESS:
            raise _refusal(backend, name, found)
    if others.get("output_attentions"):
        raise _refusal(backend, "output_attentions", True)
    if attention_mask is not None and attention_mask.dim() != 2:
        raise _refusal(backend, "attention_mask", attention_mask)
    bounds_k = cu_seq_lens_q if cu_seq_lens_k is None else cu_seq_lens_k
    return Call(
        backend=backend,
        q=query,
        k=key,
        v=value,
        scale=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        causal=bool(getattr(module, "is_causal", True) if is_causal is None else is_causal),
        window=window,
        softcap=softcap or None,
        sinks=s_aux,
        dropout=dropout,
        padding=None if attention_mask is None else attention_mask.bool(),
        bounds_q=cu_seq_lens_q,
        bounds_k=bounds_k,
        longest_q=_whole(max_length_q, cu_seq_lens_q),
        longest_k=_whole(max_length_k, bounds_k),
        position_ids=position_ids,
    )


def _whole(length: Any, bounds: Any) -> int | None:
    """Give a longest length as an int; without one, read it off the bounds."""
    if bounds is None:
        return None
    return int(bounds.diff().max() if length is None else length)


def _is_zero(value: Any) -> bool:
    return isinstance(value, int | float) and value == 0


def _refusal(backend: str, argument: str, found: Any) -> AttnimgError:
    shape = getattr(found, "shape", None)
    shown = f"a tensor of shape {tuple(shape)}" if shape is not None else repr(found)
    return AttnimgError(
        f"{backend} cannot honour an argument of this model's attention",
        why=f"found {argument}: {shown}; {backend} would have to drop it, and be wrong",
        do="set attn_implementation: eager, or another backend that `attnimg explain` shows to fit",
        code="argument-not-honoured",
        key="attn_implementation",
        exit_code=1,
    )
