"""The reference attention equals a slower one, written query by query, gradients included."""

from __future__ import annotations

import math

import pytest
import torch

from attnimg.verification.calls import visible_keys
from attnimg.verification.reference import attend

HEADS, KV_HEADS, SIZE, SIZE_V = 4, 2, 8, 6


def draw(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def query_by_query(q, k, v, *, documents, places, window, scale, softcap, sinks):
    """Attend with loops and math.exp; q (B, H, T, D)."""
    out = torch.zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[-1], dtype=torch.float64)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            group = h // (q.shape[1] // k.shape[1])
            for t, place in enumerate(places):
                logits = {}
                for s in range(k.shape[2]):
                    own = documents[b][s] == documents[b][place] >= 0
                    near = window is None or place - s < window
                    if own and s <= place and near:
                        logit = scale * float(q[b, h, t] @ k[b, group, s])
                        logits[s] = softcap * math.tanh(logit / softcap) if softcap else logit
                total = sum(math.exp(logit) for logit in logits.values())
                total += math.exp(sinks[h]) if sinks is not None else 0.0
                for s, logit in logits.items():
                    out[b, t, h] += math.exp(logit) / total * v[b, group, s]
    return out


@pytest.mark.parametrize(
    ("documents", "queries", "options"),
    [
        pytest.param([[0] * 9], 9, {}, id="causal"),
        pytest.param([[0] * 9], 4, {}, id="fewer queries than keys stand at the end"),
        pytest.param([[0] * 9], 1, {}, id="one query"),
        pytest.param([[0, 0, 0, 1, 2, 2, 2, 2, 3]], 9, {}, id="packed documents"),
        pytest.param([[0] * 9, [0] * 5 + [-1] * 4], 9, {}, id="padded rows"),
        pytest.param([[0] * 9], 9, {"window": 3}, id="a window"),
        pytest.param([[0] * 9], 9, {"window": 1}, id="each its own key"),
        pytest.param([[0] * 4 + [1] * 5], 9, {"window": 3}, id="packed, a window"),
        pytest.param([[0] * 9], 9, {"softcap": 0.7}, id="a soft cap"),
        pytest.param([[0] * 9], 9, {"sinks": True}, id="sinks"),
        pytest.param([[0] * 9], 9, {"scale": 2.0}, id="another scale"),
    ],
)
def test_it_equals_attention_query_by_query(documents, queries, options) -> None:
    n_rows, n_keys = len(documents), len(documents[0])
    q = draw(n_rows, HEADS, queries, SIZE)
    k, v = draw(n_rows, KV_HEADS, n_keys, SIZE), draw(n_rows, KV_HEADS, n_keys, SIZE_V)
    sinks = draw(HEADS) if options.get("sinks") else None
    window, scale = options.get("window"), options.get("scale", SIZE**-0.5)
    places = torch.arange(n_keys - queries, n_keys)
    visible = visible_keys(torch.tensor(documents), places=places, window=window)
    softcap = options.get("softcap")
    found = attend(
        q, k, v, visible=visible, scale=scale, softcap=softcap,
        sinks=None if sinks is None else sinks[:, None, None],
    )  # fmt: skip
    right = query_by_query(
        q, k, v, documents=documents, places=places.tolist(), window=window, scale=scale,
        softcap=softcap, sinks=sinks,
    )  # fmt: skip
    assert found.shape == (n_rows, queries, HEADS, SIZE_V)
    assert torch.allclose(found, right, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "sinks"),
    [({}, False), ({"softcap": 0.7}, False), ({}, True)],
    ids=["plain", "softcap", "sinks"],
)
def test_its_gradients_are_those_of_finite_differences(options, sinks) -> None:
    q, k, v = draw(1, HEADS, 5, 4), draw(1, KV_HEADS, 5, 4), draw(1, KV_HEADS, 5, 3)
    documents = torch.tensor([[0, 0, 1, 1, 1]])
    visible = visible_keys(documents, places=torch.arange(5), window=None)
    leaves = [q, k, v, draw(1, HEADS, 5, 1)] if sinks else [q, k, v]
    leaves = [x.requires_grad_() for x in leaves]

    def function(q, k, v, sinks=None):
        return attend(q, k, v, visible=visible, scale=0.6, sinks=sinks, **options)

    assert torch.autograd.gradcheck(function, leaves)


def test_scores_of_a_thousand_stay_finite() -> None:
    q, k, v = 400 * draw(1, 1, 6, SIZE), draw(1, 1, 6, SIZE), draw(1, 1, 6, SIZE)
    visible = visible_keys(torch.zeros(1, 6).int(), places=torch.arange(6), window=None)
    assert torch.isfinite(attend(q, k, v, visible=visible, scale=1.0)).all()


def test_dropped_weights_are_left_out() -> None:
    q, k, v = draw(1, 1, 3, 4), draw(1, 1, 3, 4), draw(1, 1, 3, 4)
    visible = visible_keys(torch.zeros(1, 3).int(), places=torch.arange(3), window=None)
    keep = torch.zeros(1, 1, 3, 3, dtype=torch.float64)
    assert not attend(q, k, v, visible=visible, scale=1.0, keep=keep).any()
