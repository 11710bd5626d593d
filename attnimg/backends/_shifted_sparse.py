"""LongLoRA's shifted sparse attention: attend within groups, half the heads half a group further.

The group is a quarter of the row. The second half of the heads is rolled by half a group, so that
their last group joins the row's last tokens to its first, which come after them there and would see
the future. LongLoRA's FlashAttention path cuts that group into its two halves, the row's first half
group and its last, and so does this one; its path without FlashAttention leaves them together.
Every group is plain causal attention then.
Source: llama_attn_replace.py of the authors of arXiv 2309.12307: group_size_ratio, `shift` in
forward_noflashattn, cu_q_lens in forward_flashattn
(github.com/dvlab-research/LongLoRA, 03ac8a5, read 2026-11-21).

Letters: see arguments.py; P is T rounded up to a multiple of 8.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from attnimg.backends._arguments import Call, read_call
from attnimg.backends._exact import exact
from attnimg.backends._shifted_kernels import GroupKernel
from attnimg.errors import AttnimgError

# Groups in a row: group_size_ratio = 1/4.
GROUPS = 4


def attend_shifted(
    kernels: tuple[GroupKernel, ...],
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers asks; see attnimg.backends._attend.

    The first of `kernels` that takes the call's device, dtype and shape runs the groups, each of
    them a document; without one scaled_dot_product_attention does.

    A row whose length is no multiple of 8 is filled up at its end. Padding there changes no token
    before it, since nothing sees what comes after; nor does the batch's own padding on the right.

    Raises:
        AttnimgError: rows are packed, padded on the left, or part of a longer context.
    """
    dropout = frozenset({"dropout"})
    call = read_call("s2", module, query, key, value, mask, honours=dropout, **arguments)
    _check(call)
    tokens = call.q.shape[2]
    filled = -tokens % (2 * GROUPS)
    group = call.q.shape[1] // call.k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (call.k, call.v))
    q, k, v = (pad(x, (0, 0, 0, filled)) for x in (call.q, k, v))
    half = q.shape[1] // 2
    kernel = next((kernel for kernel in kernels if kernel.takes(call)), None)
    straight = _grouped(call, q[:, :half], k[:, :half], v[:, :half], shifted=False, kernel=kernel)
    shifted = _grouped(call, q[:, half:], k[:, half:], v[:, half:], shifted=True, kernel=kernel)
    out = straight.new_empty(*q.shape[:3], v.shape[-1])
    out[:, :half], out[:, half:] = straight, shifted
    return out[:, :, :tokens].transpose(1, 2).contiguous(), None


def _grouped(
    call: Call,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    shifted: bool,
    kernel: GroupKernel | None = None,
) -> Tensor:
    """Attend within groups; q, k, v (B, heads, P, D), gives (B, heads, P, V)."""
    from torch import cat

    if not q.shape[1]:  # of one head, the first half is none
        return v
    size = q.shape[2] // GROUPS
    half = size // 2
    if kernel is not None:
        # The row's first and last half group stand alone, as below.
        lengths = [half, *[size] * (GROUPS - 1), half] if shifted else [size] * GROUPS
        return kernel.attend_groups(call, q, k, v, lengths=lengths)
    if not shifted:
        return _within(call, q, k, v, size=size)
    parts = []
    # The row's first and last half group stand alone; between them are whole groups.
    for begin, end, length in ((0, half, half), (half, -half, size), (-half, None, half)):
        parts.append(_within(call, *(x[:, :, begin:end] for x in (q, k, v)), size=length))
    return cat(parts, dim=2)


def _within(call: Call, q: Tensor, k: Tensor, v: Tensor, *, size: int) -> Tensor:
    """Attend causally within stretches of `size` tokens."""
    rows, heads, tokens = q.shape[:3]
    q, k, v = (x.reshape(rows, heads * (tokens // size), size, x.shape[-1]) for x in (q, k, v))
    out = exact(q, k, v, scale=call.scale, causal=True, dropout=call.dropout)
    return out.reshape(rows, heads, tokens, -1)


def _check(call: Call) -> None:
    """Refuse what groups can't be made of."""
    tokens, keys = call.q.shape[2], call.k.shape[2]
    if tokens != keys:
        raise _refusal(f"{tokens} queries on {keys} keys: a cache", "as many keys as queries")
    if not call.causal:
        raise _refusal("attention to both sides", "a causal model")
    packed = call.bounds_q is not None and len(call.bounds_q) - 1 > call.q.shape[0]
    positions = call.position_ids
    if call.padding is None and positions is not None and positions.dim() == 2:
        packed = packed or bool((positions.diff(dim=-1) != 1).any())
    if packed:
        raise _refusal("packed documents", "one document a row", code="s2-with-packing")
    if call.padding is not None and bool((call.padding.diff(dim=-1) & call.padding[:, 1:]).any()):
        raise _refusal("padding on the left", "padding on the right, or none")


def _refusal(found: str, needed: str, *, code: str = "s2-batch") -> AttnimgError:
    return AttnimgError(
        "s2 can't group this batch",
        why=f"found {found}, needed {needed}",
        do="set attn_implementation: sdpa",
        code=code,
        key="attn_implementation",
        exit_code=1,
    )
