"""A rough count of a language model's weights, from its config alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from attnimg.facts import LayerGroup
from attnimg.select.problem.fields import Fields


def count_parameters(
    fields: Fields, layers: Sequence[LayerGroup], *, weights: Literal["dense", "moe"] | None
) -> int | None:
    """Count embeddings, attention and MLP; norms and biases are left out.

    Args:
        fields: the model's config.
        layers: its groups of equal layers.
        weights: how the MLP is built; None where it is not known.

    Returns:
        The count, within 2 % of the model's own; None when a size is missing.
    """
    hidden, vocabulary = fields.whole("hidden_size"), fields.whole("vocab_size")
    count = sum(group.count for group in layers)
    mlps = _mlps(fields, count=count, weights=weights)
    if hidden is None or vocabulary is None or mlps is None:
        return None
    embeddings = vocabulary * hidden * (1 if fields.flag("tie_word_embeddings") else 2)
    attention = sum(g.count * _attention(fields, g, hidden=hidden) for g in layers)
    return embeddings + attention + mlps * hidden


def _attention(fields: Fields, group: LayerGroup, *, hidden: int) -> int:
    """Count the projections of one layer."""
    out = group.heads * group.head_dim_v * hidden
    q = group.heads * group.head_dim_qk
    latent = fields.whole("kv_lora_rank")
    if latent is None:
        return hidden * (q + group.kv_heads * (group.head_dim_qk + group.head_dim_v)) + out
    # MLA: keys and values come from a shared latent, queries from one of their own or directly.
    rotary = fields.whole("qk_rope_head_dim", minimum=0) or 0
    kv = hidden * (latent + rotary)
    kv += latent * group.heads * (group.head_dim_qk - rotary + group.head_dim_v)
    q_latent = fields.whole("q_lora_rank")
    return kv + out + (q * hidden if q_latent is None else q_latent * (hidden + q))


def _mlps(fields: Fields, *, count: int, weights: str | None) -> int | None:
    """Count the rows of length `hidden_size` of all MLPs: three matrices each, and the routers."""
    if weights is None:  # first: where it is not known, intermediate_size may be a list
        return None
    wide = fields.whole("intermediate_size")
    if wide is None:
        return None
    if weights == "dense":
        return count * 3 * wide
    experts = fields.whole("num_experts")
    if experts is None:
        return None
    narrow = fields.whole("moe_intermediate_size") or wide
    shared = fields.whole("n_shared_experts", minimum=0) or 0
    dense = min(fields.whole("first_k_dense_replace", minimum=0) or 0, count)
    routed = (experts + shared) * 3 * narrow + experts
    return dense * 3 * wide + (count - dense) * routed
