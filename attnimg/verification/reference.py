"""Compute plain attention in any precision, step by step: the reference of every backend.

No fused kernel and none of torch's attention functions is used, so that the reference can't have
the same fault as these.
Letters: B batch, T query tokens, S key tokens, H query heads, G key heads, D head size of q and k,
E head size of v.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from attnimg.facts import Pattern
from attnimg.verification.calls import Inputs, Result, visible_keys
from attnimg.verification.cases import Case
from attnimg.verification.rounding import UNIT


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    visible: Tensor,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    keep: Tensor | None = None,
) -> Tensor:
    """Compute attention step by step in the precision of the inputs.

    Args:
        q: queries, (B, H, T, D).
        k: keys, (B, G, S, D), H a multiple of G.
        v: values, (B, G, S, E).
        visible: which keys a query may see, bool, (B, 1, T, S).
        scale: factor on q @ k.
        softcap: scores become softcap * tanh(scores / softcap).
        sinks: a logit of each head and query that joins the softmax and has no value,
            broadcastable to (B, H, T, 1).
        keep: factors on the attention weights, such as those of dropout, (B, H, T, S).

    Returns:
        (B, T, H, E). A query that sees no key gets zeros.
    """
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.matmul(q, k.transpose(-1, -2)) * scale
    weights = attention_weights(scores, visible=visible, softcap=softcap, sinks=sinks)
    if keep is not None:
        weights = weights * keep
    return torch.matmul(weights, v).transpose(1, 2)


def attention_weights(
    scores: Tensor, *, visible: Tensor, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """Return the softmax of scaled scores, (B, H, T, S); see `attend` for the arguments."""
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, -torch.inf)
    # Subtracting a constant changes neither a softmax nor its gradient, so the maximum needs no
    # gradient. With sinks it gets one, as in eager attention: it consists of the rounding errors of
    # all other gradients. Source: transformers 5.22.2, modeling_gpt_oss.py,
    # eager_attention_forward (2026-11-27).
    if sinks is None:
        highest = scores.detach().amax(-1, keepdim=True)
    else:
        highest = torch.maximum(scores.max(-1, keepdim=True).values, sinks)
    highest = highest.masked_fill(highest == -torch.inf, 0.0)
    weights = torch.exp(scores - highest)
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks - highest)
    return weights / total.masked_fill(total == 0, 1.0)


def shifted_keys(documents: Tensor, *, heads: int) -> Tensor:
    """Return which keys each query sees under LongLoRA's shifted groups.

    A row has four groups, and is padded at its end to a multiple of half a group. The first half of
    the heads attends causally within groups. The other half does the same after the tokens were
    rolled back by half a group, which moves the row's first tokens to its end: there they see no
    token that comes after them in the row. Source: LongLoRA, llama_attn_replace.py:
    group_size_ratio, `shift` in forward_noflashattn for the roll, cu_q_lens in forward_flashattn
    for the row's two ends (github.com/dvlab-research/LongLoRA, 03ac8a5, read 2026-11-21).

    Args:
        documents: 0 for a token, below 0 for padding, int, (B, S).
        heads: H.

    Returns:
        Bool, (B, H, T, S), with as many queries as keys.
    """
    n_tokens = documents.shape[1]
    n_filled = -(-n_tokens // 8) * 8
    group = n_filled // 4
    place = torch.arange(n_filled, device=documents.device)
    masks = []
    for head in range(heads):
        roll = group // 2 if head >= heads // 2 else 0
        order = place.roll(-roll)  # the token at each position
        stands = torch.empty_like(place)
        stands[order] = place
        same_group = stands[:, None] // group == stands[None, :] // group
        behind = (stands[:, None] >= stands[None, :]) & (place[:, None] >= place[None, :])
        masks.append((same_group & behind)[:n_tokens, :n_tokens])
    of_token = documents >= 0
    return torch.stack(masks)[None] & (of_token[:, None, :, None] & of_token[:, None, None, :])


def reference(
    case: Case,
    inputs: Inputs,
    *,
    dtype: torch.dtype,
    pattern: Pattern = "full",
    keep: Tensor | None = None,
) -> Result:
    """Compute plain attention in a given precision, at the compared rows only.

    Args:
        case: the probe.
        inputs: its tensors.
        dtype: float64 for the exact result, the run's own dtype to measure its rounding.
        pattern: which keys queries see; "shifted" needs equally many queries and keys, not packed.
        keep: factors on the attention weights, (B, H, T, S).
    """
    leaves = {name: x.requires_grad_() for name, x in _leaves(inputs, dtype=dtype).items()}
    out = _plain_output(case, inputs, leaves, pattern=pattern, keep=keep)
    d_out = inputs.d_out[:, inputs.rows].to(dtype)
    found = torch.autograd.grad(out, list(leaves.values()), d_out)
    gradients: dict[str, Tensor | None] = dict(zip(leaves, found, strict=True))
    terms = None
    if inputs.sinks is not None:
        terms = found[-1].squeeze(-1)
        gradients["dsinks"] = terms.sum((0, 2))
    return Result(out=out.detach(), gradients=gradients, dsinks_terms=terms)


def _leaves(inputs: Inputs, *, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return gradient name -> q, k, v or the sinks of each query, in a given precision."""
    leaves = {"dq": inputs.q, "dk": inputs.k, "dv": inputs.v}
    if inputs.sinks is not None:
        shape = (len(inputs.q), -1, len(inputs.rows), 1)
        leaves["dsinks"] = inputs.sinks[:, None, None].expand(shape)
    return {name: leaf.detach().to(dtype) for name, leaf in leaves.items()}


def _plain_output(
    case: Case,
    inputs: Inputs,
    leaves: dict[str, Tensor],
    *,
    pattern: Pattern,
    keep: Tensor | None = None,
) -> Tensor:
    """Return the output of plain attention at the compared rows; see `reference`."""
    places = inputs.rows + (inputs.k.shape[2] - inputs.q.shape[2])
    if pattern == "shifted":
        visible = shifted_keys(inputs.documents, heads=inputs.q.shape[1])[:, :, inputs.rows]
    else:
        visible = visible_keys(inputs.documents, places=places, window=case.geometry.window)
    return attend(
        leaves["dq"].index_select(2, inputs.rows),
        leaves["dk"],
        leaves["dv"],
        visible=visible,
        scale=inputs.scale,
        softcap=case.geometry.softcap,
        sinks=leaves.get("dsinks"),
        keep=keep,
    )


def scale_derivative(case: Case, inputs: Inputs, *, pattern: Pattern, exact: Result) -> Tensor:
    """Return d(output) / d(log scale) at the compared rows."""
    step = 1e-4
    steeper = replace(inputs, scale=inputs.scale * (1 + step))
    leaves = _leaves(inputs, dtype=torch.float64)
    return (_plain_output(case, steeper, leaves, pattern=pattern) - exact.out) / step


TILE = 16


def sum_order_bounds(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """Return a bound on gradient changes by the order of sums: 2 n u A, (B, T, heads, D), float32.

    Args:
        case: a packed probe, short enough for all its rows to be compared.
        inputs: its tensors.
    """
    q, k, v, scores, weights = _attention(case, inputs)
    group = inputs.q.shape[1] // inputs.k.shape[1]
    d_out = inputs.d_out.float().transpose(1, 2)
    out = weights @ v
    (d_scores,) = torch.autograd.grad(out, scores, d_out)
    weights, out = weights.detach(), out.detach()
    rounding = torch.finfo(inputs.q.dtype).eps + v.shape[-1] * UNIT
    both = d_out.abs() @ v.abs().transpose(-1, -2) + (d_out * out).abs().sum(-1, keepdim=True)
    d_scores = (d_scores.abs() + weights * rounding * both) * inputs.scale
    sizes = {
        "dq": d_scores @ k.abs(),
        "dk": d_scores.transpose(-1, -2) @ q.abs(),
        "dv": weights.transpose(-1, -2) @ d_out.abs(),
    }
    # A document may begin within a block, which makes one more.
    blocks = -(-max(case.lengths) // TILE) + 1
    for name in ("dk", "dv"):
        sizes[name] = sizes[name].unflatten(1, (-1, group)).sum(2)
    terms = {"dq": blocks, "dk": blocks * group, "dv": blocks * group}
    return {name: 2 * terms[name] * UNIT * size.transpose(1, 2) for name, size in sizes.items()}


def _attention(case: Case, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return float32 q, k, v of each query head, scores that require gradients, and weights."""
    group = inputs.q.shape[1] // inputs.k.shape[1]
    q, k, v = (x.detach().float() for x in (inputs.q, inputs.k, inputs.v))
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    places = torch.arange(q.shape[2], device=q.device)
    scores = (q @ k.transpose(-1, -2) * inputs.scale).requires_grad_()
    weights = attention_weights(
        scores,
        visible=visible_keys(inputs.documents, places=places, window=case.geometry.window),
        softcap=case.geometry.softcap,
        sinks=None if inputs.sinks is None else inputs.sinks.detach().float()[:, None, None],
    )
    return q, k, v, scores, weights


def difference_beyond_ulp(one: Tensor, other: Tensor) -> Tensor:
    """Return by how much two rounded values differ beyond one unit in the last place, float64."""
    kind = torch.finfo(one.dtype)
    wide, other_wide = one.double(), other.double()
    _, exponent = torch.frexp(torch.maximum(wide.abs(), other_wide.abs()))
    # frexp's mantissa is below 1, so the exponent is one larger than that of the leading bit.
    ulp = torch.ldexp(torch.full_like(wide, kind.eps), exponent - 1).clamp_min(kind.eps * kind.tiny)
    return ((wide - other_wide).abs() - ulp).clamp_min(0.0)
