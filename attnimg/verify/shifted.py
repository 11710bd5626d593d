"""LongLoRA's shifted sparse attention, written out: what s2 is compared with.

It is full attention under another mask, one for each half of the heads; see oracle.attend.
Letters: B batch, T query tokens, S key tokens, H query heads.
"""

from __future__ import annotations

import torch
from torch import Tensor


def shifted_keys(documents: Tensor, *, heads: int) -> Tensor:
    """Tell which keys each query sees.

    A row is four groups, filled up at its end to whole half groups. The first half of the heads
    attends causally within groups. The others do the same after tokens were rolled back by half a
    group, which brings the row's first tokens to its end: there they see no token that stands
    after them in the row. Source: LongLoRA, llama_attn_replace.py: group_size_ratio, `shift` in
    forward_noflashattn for the roll, cu_q_lens in forward_flashattn for the row's two ends
    (github.com/dvlab-research/LongLoRA, 03ac8a5, read 2026-11-21).

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
        order = place.roll(-roll)  # which token stands at each place
        stands = torch.empty_like(place)
        stands[order] = place
        same_group = stands[:, None] // group == stands[None, :] // group
        behind = (stands[:, None] >= stands[None, :]) & (place[:, None] >= place[None, :])
        masks.append((same_group & behind)[:n_tokens, :n_tokens])
    of_token = documents >= 0
    return torch.stack(masks)[None] & (of_token[:, None, :, None] & of_token[:, None, None, :])
