"""Test that the reference by blocks equals plain attention, in memory independent of the row."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attnimg.verification.blocks import BlockReference, RowAttention, document_spans
from attnimg.verification.blocks import block_reference as compute
from attnimg.verification.calls import visible_keys
from attnimg.verification.reference import attend

LENGTHS = (70, 1, 0, 45, 200, 3)
T = sum(LENGTHS)
QUERIES = [(0, 20), (65, 75), (100, 130), (300, T)]
KEYS = [(0, 16), (60, 80), (110, 140), (310, T)]


def block_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, d_out: torch.Tensor | None = None, *,
    cu_seqlens: torch.Tensor, queries: Any, keys: Any = (), window: int | None = None,
    causal: bool = True, at_most_bytes: int = 256 << 20, **options: Any,
) -> BlockReference:  # fmt: skip
    first, last = document_spans(cu_seqlens, torch.arange(q.shape[1]), window=window, causal=causal)
    row = RowAttention(q=q, k=k, v=v, d_out=d_out, first_T=first, last_T=last, **options)
    return compute(row, queries=queries, keys=keys, at_most_bytes=at_most_bytes)


def drawn(*, sinks: bool) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    found = {"q": draw(6, T, 8), "k": draw(2, T, 8), "v": draw(2, T, 5), "d_out": draw(6, T, 5)}
    return found | ({"sinks": draw(6)} if sinks else {})


@pytest.mark.parametrize("at_most_bytes", [1 << 28, 1 << 17], ids=["one tile", "many tiles"])
@pytest.mark.parametrize(
    ("window", "softcap", "sinks"),
    [(None, None, False), (37, None, False), (None, 3.0, False), (37, 3.0, True), (1, None, True)],
)
def test_it_equals_plain_attention_at_the_requested_tokens(
    window: int | None, softcap: float | None, sinks: bool, at_most_bytes: int
) -> None:
    given = drawn(sinks=sinks)
    d_out = given["d_out"]
    bounds = torch.tensor((0, *LENGTHS)).cumsum(0).int()
    found = block_reference(
        **given, cu_seqlens=bounds, queries=QUERIES, keys=KEYS, scale=0.4, window=window,
        softcap=softcap, at_most_bytes=at_most_bytes,
    )  # fmt: skip
    leaves = {n: x.clone().requires_grad_() for n, x in given.items() if n != "d_out"}
    documents = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))[None]
    out = attend(
        *(leaves[name][None] for name in "qkv"),
        visible=visible_keys(documents, places=torch.arange(T), window=window),
        scale=0.4, softcap=softcap,
        sinks=leaves["sinks"][:, None, None] if sinks else None,
    )  # fmt: skip
    gradients = torch.autograd.grad(out, list(leaves.values()), d_out.transpose(0, 1)[None])
    right = {f"d{name}": x for name, x in zip(leaves, gradients, strict=True)}
    at_queries, at_keys = (torch.cat([torch.arange(*s) for s in x]) for x in (QUERIES, KEYS))
    torch.testing.assert_close(found.out, out[0].transpose(0, 1)[:, at_queries])
    torch.testing.assert_close(found.dq, right["dq"][:, at_queries])
    torch.testing.assert_close(found.dk, right["dk"][:, at_keys])
    torch.testing.assert_close(found.dv, right["dv"][:, at_keys])


def test_without_causal_mask_a_query_sees_its_whole_document() -> None:
    given = drawn(sinks=False)
    bounds = torch.tensor((0, *LENGTHS)).cumsum(0)
    found = block_reference(
        given["q"], given["k"], given["v"], cu_seqlens=bounds, queries=[(0, T)], scale=0.4,
        causal=False,
    )  # fmt: skip
    k, v = (given[name].repeat_interleave(3, 0) for name in "kv")
    first = slice(0, LENGTHS[0])
    weights = (given["q"][:, first] @ k[:, first].transpose(-1, -2) * 0.4).softmax(-1)
    torch.testing.assert_close(found.out[:, first], weights @ v[:, first])
    assert found.dq is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_to_the_precision_of_the_run_is_as_far_off_as_plain_attention(
    dtype: torch.dtype,
) -> None:
    given = {name: x.to(dtype) for name, x in drawn(sinks=False).items()}
    bounds = torch.tensor((0, *LENGTHS)).cumsum(0)
    exact, rounded = (
        block_reference(
            **given, cu_seqlens=bounds, queries=[(0, T)], keys=[(0, T)], scale=0.4, dtype=wide,
            rounded_to=to,
        )
        for wide, to in ((torch.float64, None), (torch.float32, dtype))
    )  # fmt: skip
    leaves = [given[name].requires_grad_() for name in "qkv"]
    documents = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))[None]
    out = attend(
        *(x[None] for x in leaves), scale=0.4,
        visible=visible_keys(documents, places=torch.arange(T), window=None),
    )  # fmt: skip
    gradients = torch.autograd.grad(out, leaves, given["d_out"].transpose(0, 1)[None])
    plain = {"out": out[0].transpose(0, 1)} | dict(zip(("dq", "dk", "dv"), gradients, strict=True))
    for name, found in plain.items():
        right = getattr(exact, name)
        ours = (getattr(rounded, name) - right).abs().max()
        theirs = (found.double() - right).abs().max()
        assert 0.4 < ours / theirs < 1.5, (name, ours / theirs)


def test_padding_sees_nothing_and_is_seen_by_nobody() -> None:
    given, kept = drawn(sinks=False), T - 50
    bounds = torch.tensor([0, 70, kept])
    padded = block_reference(
        **given, cu_seqlens=bounds, queries=[(0, T)], keys=[(0, T)], scale=0.4
    )  # fmt: skip
    cut = {name: x[:, :kept] for name, x in given.items()}
    alone = block_reference(
        **cut, cu_seqlens=bounds, queries=[(0, kept)], keys=[(0, kept)], scale=0.4
    )
    for name in ("out", "dq", "dk", "dv"):
        found = getattr(padded, name)
        torch.testing.assert_close(found[:, :kept], getattr(alone, name))
        assert not found[:, kept:].any()
