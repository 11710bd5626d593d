"""Find which keys each query of an attention call sees, as one span of keys for each query.

Documents, padding, causality and windows all give such a span. A mask that hides keys between two
visible ones, or adds a bias to the scores, does not.
Letters: T query and key tokens of a row.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from attnimg.backends._varlen import AttentionCall, packed_tokens

# Queries whose mask is read at a time.
_ROWS = 1024


class NotComparable(Exception):
    """Raised for a call that the reference can't compute; the message is the reason."""


def spans_of_mask(mask: Any, row: int, *, n_tokens: int) -> tuple[Tensor, Tensor]:
    """Return the first key that each query of a row sees, and the key behind the last one.

    Args:
        mask: the attention_mask of a call: (B or 1, 1, T, T), bool, True where a query sees a key,
            or a float that is added to the scores; or flex_attention's block mask.
        row: which of the batch.
        n_tokens: T.

    Raises:
        NotComparable: a query sees other keys than those of one span, or the mask adds a bias.
    """
    firsts, lasts = [], []
    for begin in range(0, n_tokens, _ROWS):
        seen = _seen(mask, row, begin, min(begin + _ROWS, n_tokens), n_tokens=n_tokens)
        some = seen.any(-1)
        first = seen.byte().argmax(-1)
        last = n_tokens - seen.flip(-1).byte().argmax(-1)
        if not ((last - first == seen.sum(-1)) | ~some).all():
            raise NotComparable("the attention mask hides keys between two that a query sees")
        place = torch.arange(begin, begin + len(seen), device=seen.device)
        firsts.append(torch.where(some, first, place))
        lasts.append(torch.where(some, last, place))
    return torch.cat(firsts), torch.cat(lasts)


def _seen(mask: Any, row: int, begin: int, end: int, *, n_tokens: int) -> Tensor:
    """Return which keys some queries see, bool (queries, T)."""
    if callable(mod := getattr(mask, "mask_mod", None)):
        device = mask.kv_num_blocks.device
        place = torch.arange(n_tokens, device=device)
        number = torch.tensor(row, device=device)
        found = mod(number, torch.zeros_like(number), place[begin:end, None], place[None])
        return torch.as_tensor(found).expand(end - begin, n_tokens)
    if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.shape[1] != 1:
        shape = tuple(getattr(mask, "shape", ()))
        raise NotComparable(f"the attention mask is a {type(mask).__name__} of the shape {shape}")
    part = mask[row if mask.shape[0] > 1 else 0, 0, begin:end, :n_tokens]
    if part.shape != (end - begin, n_tokens):
        raise NotComparable(f"the attention mask has the shape {tuple(mask.shape)}")
    if part.dtype == torch.bool:
        return part
    hidden = part <= torch.finfo(part.dtype).min / 2
    if ((part != 0) & ~hidden).any():
        raise NotComparable("the attention mask adds a bias to the scores")
    return ~hidden


def spans_of_arguments(read: AttentionCall, row: int) -> tuple[Tensor, Tensor]:
    """Return the first key that each query of a row sees, and the key behind the last one."""
    n_rows, n_tokens = read.q.shape[0], read.q.shape[2]
    place = torch.arange(n_tokens, device=read.q.device)
    if read.padding is not None:
        # The tokens of a row are contiguous; padding is before or after them.
        is_token = read.padding[row, -n_tokens:]
        begin = int(is_token.int().argmax()) if is_token.any() else 0
        first = torch.full_like(place, begin)
        last = torch.where(is_token, begin + is_token.sum(), begin)
    else:
        tokens = packed_tokens(read)
        ends = torch.arange(n_rows + 1, device=place.device) * n_tokens
        if tokens is not None:
            ends = tokens.cu_seqlens_q.long()
        of_row = place + row * n_tokens
        number = torch.searchsorted(ends, of_row, right=True).clamp(1, len(ends) - 1)
        first = (ends[number - 1] - row * n_tokens).clamp(min=0)
        last = (ends[number] - row * n_tokens).clamp(max=n_tokens)
        # Tokens after the last document are padding, and see nothing.
        last = torch.where(of_row < ends[-1], last, first)
    seen = last > first
    if read.causal:
        last = torch.minimum(last, place + 1)
    if read.window is not None:
        first = torch.maximum(first, place - read.window + 1)
        last = torch.minimum(last, place + read.window)
    return torch.where(seen, first, place), torch.where(seen, last, place)


def closed_part(first: Tensor, last: Tensor, *, longest: int | None, draw: random.Random) -> slice:
    """Choose tokens of a row that see no others: all, or as many whole documents as fit."""
    n_tokens = len(first)
    if longest is None or n_tokens <= longest:
        return slice(0, n_tokens)
    # A row can be cut where no later query sees an earlier key, and no earlier query a later key.
    place = torch.arange(n_tokens, device=first.device)
    oldest = first.flip(0).cummin(0).values.flip(0)
    newest = torch.nn.functional.pad(last.cummax(0).values[:-1], (1, 0))
    cuts = [*((oldest >= place) & (newest <= place)).nonzero().flatten().tolist(), n_tokens]
    at = draw.randrange(n_tokens)
    begin = max(cut for cut in cuts if cut <= at)
    fitting = [cut for cut in cuts if begin < cut <= begin + longest]
    return slice(begin, fitting[-1] if fitting else min(cut for cut in cuts if cut > begin))
