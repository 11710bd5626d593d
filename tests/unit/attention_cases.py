"""Attention calls that tests share: tensors, a layer, and the answer written plainly."""

from __future__ import annotations

from types import SimpleNamespace

LAYER = SimpleNamespace(is_causal=True, training=True)


def draw(rows=1, tokens=13, *, heads=4, kv_heads=2, size=8, size_v=None, keys=None, seed=0):
    """Draw q (B, H, T, D), k and v (B, G, S, D), float32 leaves."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    keys = keys or tokens
    shapes = (
        (rows, heads, tokens, size),
        (rows, kv_heads, keys, size),
        (rows, kv_heads, keys, size_v or size),
    )
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def plainly(q, k, v, *, seen=None, scale=None, softcap=None, sinks=None):
    """Attend with q (B, H, T, D) in float64; `seen` (T, S), default causal at the bottom right."""
    import torch

    q, k, v = (x.double() for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if seen is None:
        queries, keys = scores.shape[-2:]
        seen = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        column = sinks.double().reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = scores.softmax(-1)[..., : k.shape[2]]
    return (weights @ v).transpose(1, 2)


def same_document(lengths):
    """Return which tokens of packed documents attend to which, causally, bool (T, T)."""
    import torch

    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return (document[:, None] == document).tril()


def packed(lengths):
    """Return the keyword arguments of attention on a packed row."""
    import torch

    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    return {
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": max(lengths),
        "max_length_k": torch.tensor(max(lengths)),
    }


def gradients(out, leaves):
    """Return the gradients of a weighted sum of an output."""
    import torch

    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).reshape(out.shape)
    return torch.autograd.grad((out.double() * weights).sum(), leaves, retain_graph=True)
