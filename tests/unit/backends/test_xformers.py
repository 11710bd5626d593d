"""xFormers gets the mask object that a call means; its kernels themselves need a GPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from attention_cases import LAYER, draw, packed, plainly, same_document

from attnimg.backends.xformers import xformers_attention
from attnimg.errors import AttnimgError


class Mask:
    """One of xFormers' mask objects, with what it lets a query see."""

    def __init__(self, seen=None, *, local=None):
        self.seen, self.local = seen, local

    @classmethod
    def from_seqlens(cls, lengths_q, lengths_k=None):
        lengths_k = lengths_k or lengths_q
        return cls(
            torch.block_diag(*(cls.block(n, m) for n, m in zip(lengths_q, lengths_k, strict=True)))
        )

    @staticmethod
    def block(queries, keys):
        return torch.ones(queries, keys).tril(keys - queries)

    def make_local_attention(self, window):
        return Mask(self.seen - self.seen.tril(-window))


class Whole(Mask):
    @staticmethod
    def block(queries, keys):
        return torch.ones(queries, keys)


def xformers(*tensors, mask=None, **arguments):
    kinds = SimpleNamespace(
        BlockDiagonalMask=Whole,
        BlockDiagonalCausalMask=Mask,
        BlockDiagonalCausalFromBottomRightMask=Mask,
        LowerTriangularFromBottomRightMask=Mask,
    )

    def memory_efficient_attention(q, k, v, attn_bias, p, scale):
        assert p == 0.0
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        assert q.shape[1] == k.shape[1]
        seen = None if attn_bias is None or attn_bias.seen is None else attn_bias.seen.bool()
        if attn_bias is None:
            seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
        return plainly(q, k, v, seen=seen, scale=scale).to(q.dtype)

    ops = SimpleNamespace(
        fmha=SimpleNamespace(attn_bias=kinds),
        LowerTriangularMask=Mask,
        memory_efficient_attention=memory_efficient_attention,
    )
    return xformers_attention(ops)(LAYER, *tensors, mask, **arguments)[0]


@pytest.mark.parametrize(
    ("shape", "arguments", "seen"),
    [
        pytest.param({"rows": 2}, {}, same_document([13]), id="dense"),
        pytest.param({}, packed([6, 7]), same_document([6, 7]), id="packed"),
        pytest.param(
            {}, {"is_causal": False}, torch.ones(13, 13, dtype=torch.bool), id="both ways"
        ),
        pytest.param(
            {},
            {"sliding_window": 3} | packed([6, 7]),
            same_document([6, 7]) & ~same_document([6, 7]).tril(-3),
            id="a window in packed rows",
        ),
        pytest.param(
            {"rows": 2},
            {"sliding_window": 3},
            same_document([13]) & ~same_document([13]).tril(-3),
            id="a window in dense rows",
        ),
        pytest.param({"tokens": 3, "keys": 8}, {}, None, id="a cache"),
    ],
)
def test_xformers_gets_the_mask_that_a_call_means(shape, arguments, seen):
    q, k, v = draw(**shape)
    found = xformers(q, k, v, scaling=0.4, **arguments)
    assert (found - plainly(q, k, v, seen=seen, scale=0.4)).abs().max() < 1e-5


def test_xformers_refuses_a_window_to_both_sides():
    with pytest.raises(AttnimgError, match="no mask"):
        xformers(*draw(), scaling=0.4, sliding_window=3, is_causal=False)
