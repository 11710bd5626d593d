"""attnimg.attention computes what plain attention in float64 does, forward and backward."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import attnimg
from attnimg import functional

FIXTURES = Path(__file__).parents[2] / "fixtures"

KERNEL = "kernels-community/flash-attn2"
BACKENDS = ("auto", "sdpa", "eager", KERNEL)
# Backends without a soft cap: torch's own attention has no argument for it.
NO_SOFTCAP = ("sdpa",)


def plain(q, k, v, *, causal=True, window=None, softcap=None, scale=None, sinks=None):
    """Compute attention of (T, H, D) by the formula."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    scores = torch.einsum("thd,shd->hts", q, k) * (scale or q.shape[-1] ** -0.5)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    ahead = torch.arange(len(k)) - torch.arange(len(q))[:, None] - (len(k) - len(q))
    hidden = ahead > 0 if causal else torch.zeros_like(ahead, dtype=torch.bool)
    if window:
        hidden = hidden | (ahead.abs() >= window)
    scores = scores.masked_fill(hidden, float("-inf"))
    if sinks is not None:
        column = sinks[:, None, None].expand(-1, len(q), 1)
        weights = torch.cat([scores, column], -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return torch.einsum("hts,shd->thd", weights, v)


def draw(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def compare(call, reference, tensors, *, tolerance=2e-5):
    """Compare the output and the gradients of two functions of the same tensors."""
    results = []
    for function, dtype in ((call, None), (reference, torch.float64)):
        leaves = [x.detach().clone().to(dtype or x.dtype).requires_grad_() for x in tensors]
        out = function(*leaves)
        torch.manual_seed(1)
        gradient = torch.randn(out.shape, dtype=torch.float64).to(out.dtype)
        results.append([out, *torch.autograd.grad(out, leaves, gradient)])
    for found, expected in zip(*results, strict=True):
        assert found.shape == expected.shape
        torch.testing.assert_close(
            found.double(), expected.double(), rtol=tolerance, atol=tolerance
        )


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """Serve FlashAttention's stand-in, whose varlen function runs on a CPU."""
    torch.manual_seed(0)
    monkeypatch.setenv("LOCAL_KERNELS", f"{KERNEL}={FIXTURES / 'flash_attn2'}")
    functional._function.cache_clear()
    yield
    functional._function.cache_clear()


FEATURES = [
    pytest.param({}, id="causal"),
    pytest.param({"causal": False}, id="both-sides"),
    pytest.param({"window": 5}, id="window"),
    pytest.param({"window": 5, "causal": False}, id="window-on-both-sides"),
    pytest.param({"scale": 0.3}, id="scale"),
    pytest.param({"softcap": 3.0}, id="softcap"),
    pytest.param({"softcap": 3.0, "window": 4}, id="softcap-and-window"),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("features", FEATURES)
def test_rows_of_a_batch_are_plain_attention(backend, features):
    if "softcap" in features and backend in NO_SOFTCAP:
        with pytest.raises(attnimg.KernelError, match="softcap"):
            attnimg.attention(*(draw(1, 3, 2, 8) for _ in "qkv"), **features, backend=backend,
                              verify=False)  # fmt: skip
        return
    tensors = [draw(2, 17, 4, 16), draw(2, 17, 2, 16), draw(2, 17, 2, 16)]
    compare(
        lambda *x: attnimg.attention(*x, **features, backend=backend, verify=False),
        lambda *x: torch.stack([plain(*row, **features) for row in zip(*x, strict=True)]),
        tensors,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("features", FEATURES)
def test_packed_documents_are_computed_one_by_one(backend, features):
    if "softcap" in features and backend in NO_SOFTCAP:
        pytest.skip("sdpa has no argument for a soft cap: see the test above")
    lengths = [7, 1, 11, 2]
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    total = sum(lengths)
    tensors = [draw(total, 4, 16), draw(total, 2, 16), draw(total, 2, 8)]

    def reference(*x):
        documents = zip(*(y.split(lengths) for y in x), strict=True)
        return torch.cat([plain(*document, **features) for document in documents])

    compare(
        lambda *x: attnimg.attention(
            *x, **features, cu_seqlens=ends, backend=backend, verify=False
        ),
        reference,
        tensors,
    )


def test_sinks_learn():
    tensors = [draw(9, 4, 16), draw(9, 2, 16), draw(9, 2, 16), draw(4)]
    compare(
        lambda q, k, v, sinks: attnimg.attention(q, k, v, sinks=sinks, verify=False),
        lambda q, k, v, sinks: plain(q, k, v, sinks=sinks),
        tensors,
    )


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_fewer_queries_than_keys_are_the_last_ones(backend):
    tensors = [draw(3, 4, 16), draw(8, 2, 16), draw(8, 2, 16)]
    ends = {"cu_seqlens": torch.tensor([0, 3], dtype=torch.int32),
            "cu_seqlens_k": torch.tensor([0, 8], dtype=torch.int32)}  # fmt: skip
    compare(lambda *x: attnimg.attention(*x, **ends, backend=backend, verify=False), plain, tensors)


def test_bfloat16_stays_bfloat16():
    q, k, v = (draw(1, 33, 4, 64, dtype=torch.bfloat16) for _ in "qkv")
    out = attnimg.attention(q, k, v, verify=False)
    assert out.dtype == torch.bfloat16
    expected = plain(*(x[0].double() for x in (q, k, v)))
    torch.testing.assert_close(out[0].double(), expected, rtol=0.02, atol=0.02)


def test_a_kernel_that_would_cut_off_v_is_refused():
    q, k, v = draw(5, 4, 16), draw(5, 2, 16), draw(5, 2, 24)
    ends = torch.tensor([0, 5]).int()
    with pytest.raises(attnimg.AttnimgError, match="head_dim 24 of v and 16 of q"):
        attnimg.attention(q, k, v, cu_seqlens=ends, backend=KERNEL, verify=False)
    out = attnimg.attention(q, k, v, cu_seqlens=ends, backend="sdpa", verify=False)
    torch.testing.assert_close(out, plain(q, k, v), rtol=1e-5, atol=1e-5)


def test_a_backend_is_verified_before_its_first_call(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("ATTNIMG_CACHE", str(tmp_path))
    monkeypatch.delenv("LOCAL_KERNELS")
    with caplog.at_level("INFO", logger="attnimg"):
        attnimg.attention(*(draw(1, 5, 2, 8) for _ in "qkv"))
        attnimg.attention(*(draw(1, 9, 2, 8) for _ in "qkv"))
    assert caplog.text.count("proof: sdpa passed") == 1


WRONG = [
    ("q, k and v are not all", [(4, 8), (4, 8), (4, 8)], {}),
    ("do not match", [(1, 4, 2, 8), (1, 5, 2, 8), (1, 4, 2, 8)], {}),
    ("do not match", [(1, 4, 2, 8), (1, 4, 2, 16), (1, 4, 2, 8)], {}),
    ("not a multiple", [(1, 4, 3, 8), (1, 4, 2, 8), (1, 4, 2, 8)], {}),
    ("only for packed", [(1, 4, 2, 8)] * 3, {"cu_seqlens": torch.tensor([0, 4]).int()}),
    ("not int32", [(4, 2, 8)] * 3, {"cu_seqlens": torch.tensor([0, 4])}),
    ("needs cu_seqlens", [(4, 2, 8)] * 3, {"cu_seqlens_k": torch.tensor([0, 4]).int()}),
    ("from 0 to", [(4, 2, 8)] * 3, {"cu_seqlens": torch.tensor([0, 3]).int()}),
    ("no backend is called", [(4, 2, 8)] * 3, {"backend": "flash5"}),
]


@pytest.mark.parametrize(("text", "shapes", "arguments"), WRONG)
def test_tensors_that_do_not_match_are_refused(text, shapes, arguments):
    with pytest.raises(attnimg.AttnimgError, match=text):
        attnimg.attention(*(draw(*shape) for shape in shapes), **arguments, verify=False)


def test_float64_is_refused_with_the_dtypes_that_kernels_take():
    with pytest.raises(attnimg.AttnimgError, match="float32, float16 or bfloat16"):
        attnimg.attention(*(draw(1, 4, 2, 8, dtype=torch.float64) for _ in "qkv"), verify=False)
