"""Call SageAttention as attnimg does, in each way that needs a Triton kernel of its own.

An entry's name depends on how Triton specializes the kernel's arguments: on their types, on which
numbers are divisible by 16 or equal to 1, and on those that SageAttention declares as constants:
head size and numbers of heads.
Letters: B batch, T tokens, H query heads, G key/value heads, D head size.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from precompiled.triton.stand_in import sage_without_cuda

# A kernel depends on T only by T % 16 and by the number of blocks of 64 and 128 tokens: whether it
# is 1 or 4, and whether it or G times it is divisible by 16. T - 1 is called too, for T % 16 != 0.
TOKENS = (64, 128, 192, 256, 320, 384, 512, 768, 1024, 2048)
Calls = Iterator[tuple[str, Callable[[], None]]]


def calls(asked: dict[str, Any], device: str, *, batch: int = 1, tokens: Any = None) -> Calls:
    """Yield each call of a set by name, to make in a process without a GPU.

    Args:
        asked: docker/images/IMAGE/triton_kernels.json.
        device: "sm_90".
        batch: B; the number of documents if the call is varlen.
        tokens: the lengths; None for those that compile every kernel.
    """
    sage_without_cuda(device)
    import sageattention

    from attnimg.backends.sage import sage_attention

    attention = sage_attention(
        "sage", dense=sageattention.sageattn, varlen=sageattention.sageattn_varlen
    )
    lengths = tokens or [length - less for length in TOKENS for less in (0, 1)]
    for head_dim, pairs in asked["heads"].items():
        for pair, dtype, causal, varlen in itertools.product(
            pairs, asked["dtypes"], asked["causal"], asked["varlen"]
        ):
            heads, kv_heads = (int(number) for number in pair.split("/"))
            kinds = ["causal" if causal else "full", "varlen" if varlen else "dense"]
            name = "-".join([f"d{head_dim}", f"h{heads}", f"g{kv_heads}", *kinds, dtype])
            yield name, partial(
                _attend, attention, int(head_dim), heads=heads, kv_heads=kv_heads, dtype=dtype,
                causal=causal, varlen=varlen, batch=batch, lengths=lengths,
            )  # fmt: skip


def _attend(
    attention: Any, head_dim: int, *, heads: int, kv_heads: int, dtype: str, causal: bool,
    varlen: bool, batch: int, lengths: list[int],
) -> None:  # fmt: skip
    """Attend over each length; q, k and v have the memory layout of transformers' models."""
    layer = SimpleNamespace(
        is_causal=causal, num_key_value_groups=heads // kv_heads, layer_idx=0, training=True
    )
    for length in lengths:
        q, k, v = (
            torch.zeros(batch, length, count, head_dim, dtype=getattr(torch, dtype)).transpose(1, 2)
            for count in (heads, kv_heads, kv_heads)
        )
        first = length // 3 if varlen else 0
        positions = torch.cat([torch.arange(first), torch.arange(length - first)])
        attention(
            layer, q, k, v, None, scaling=head_dim**-0.5, dropout=0.0, is_causal=causal,
            position_ids=positions.expand(batch, -1),
        )  # fmt: skip
