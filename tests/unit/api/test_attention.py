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


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_a_soft_cap_beside_sinks_is_refused_before_the_call(backend):
    tensors = [draw(1, 9, 4, 16) for _ in "qkv"]
    with pytest.raises(attnimg.KernelError) as caught:
        attnimg.attention(*tensors, softcap=3.0, sinks=draw(4), backend=backend, verify=False)
    assert caught.value.code == ("not-built" if backend == "auto" else "sinks")
    assert "eager" not in caught.value.do
    for alone in ({"softcap": 3.0}, {"sinks": draw(4)}):
        attnimg.attention(*tensors, **alone, backend=backend, verify=False)


def test_a_later_change_of_the_variable_counts(monkeypatch):
    tensors = [draw(1, 9, 4, 16) for _ in "qkv"]
    attnimg.attention(*tensors, verify=False)
    monkeypatch.setenv("ATTNIMG_BACKEND", "flash_attention_3")
    with pytest.raises(attnimg.KernelError, match="flash_attention_3 cannot be used here"):
        attnimg.attention(*tensors, verify=False)
    attnimg.attention(*tensors, backend="sdpa", verify=False)
    monkeypatch.delenv("ATTNIMG_BACKEND")
    attnimg.attention(*tensors, verify=False)


def test_sinks_learn():
    tensors = [draw(9, 4, 16), draw(9, 2, 16), draw(9, 2, 16), draw(4)]
    compare(
        lambda q, k, v, sinks: attnimg.attention(q, k, v, sinks=sinks, verify=False),
        lambda q, k, v, sinks: plain(q, k, v, sinks=sinks),
        tensors,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("features", [{}, {"causal": False}, {"window": 3, "causal": False}])
@pytest.mark.parametrize("lengths", [([4, 9, 0, 2], [2, 5, 3, 0]), ([0, 6], [0, 2]), ([0], [3])])
def test_queries_without_keys_are_zero(backend, features, lengths):
    queries, keys = lengths
    tensors = [draw(sum(queries), 4, 16), draw(sum(keys), 2, 16), draw(sum(keys), 2, 16)]
    ends = [torch.tensor([0, *each]).cumsum(0).int() for each in lengths]

    documents = zip(
        *(x.double().split(each) for x, each in zip(tensors, (queries, keys, keys), strict=True)),
        strict=True,
    )
    # The softmax of no scores is 0 / 0.
    expected = torch.cat([plain(*document, **features).nan_to_num() for document in documents])
    found = attnimg.attention(
        *tensors, **features, cu_seqlens=ends[0], cu_seqlens_k=ends[1], backend=backend,
        verify=False,
    )  # fmt: skip
    torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=2e-5)


def test_masked_queries_get_no_gradient():
    q, k, v = (draw(*shape).requires_grad_() for shape in ((5, 2, 8), (2, 2, 8), (2, 2, 8)))
    attnimg.attention(q, k, v, backend="eager", verify=False).sum().backward()
    assert not q.grad[:3].any()
    torch.testing.assert_close(v.grad, plain_values_gradient(q, k, v))


def plain_values_gradient(q, k, v):
    """Compute the gradient of v where only the last queries, as many as keys, see any."""
    leaf = v.detach().requires_grad_()
    plain(q[-len(k) :].detach(), k.detach(), leaf).sum().backward()
    return leaf.grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_window_counts_where_there_are_more_queries_than_keys(backend):
    q, k, v = draw(9, 2, 8), draw(3, 2, 8), draw(3, 2, 8)
    options = {"causal": False, "window": 7}
    out = attnimg.attention(q, k, v, **options, backend=backend, verify=False)
    # The first query stands 6 places before the first key.
    torch.testing.assert_close(out, plain(q, k, v, **options), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(out, plain(q, k, v, causal=False))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_does_not_change_the_dtype(backend):
    q, k, v = draw(1, 9, 2, 16), draw(1, 9, 2, 16), draw(1, 9, 2, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attnimg.attention(q, k, v, backend=backend, verify=False)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out[0], plain(q[0], k[0], v[0]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("learned", [True, False])
def test_sinks_alone_can_need_a_gradient(learned):
    q, k, v, sinks = draw(1, 9, 4, 16), draw(1, 9, 2, 16), draw(1, 9, 2, 16), draw(4)
    out = attnimg.attention(q, k, v, sinks=sinks.requires_grad_(learned), verify=False)
    expected = plain(q[0], k[0], v[0], sinks=sinks)
    torch.testing.assert_close(out[0], expected, rtol=1e-5, atol=1e-5)
    if learned:
        assert torch.autograd.grad(out.sum(), sinks)[0].any()


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


def test_a_backend_without_the_backward_pass_is_not_verified_in_vain(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("ATTNIMG_CACHE", str(tmp_path))
    monkeypatch.delenv("LOCAL_KERNELS")
    with caplog.at_level("INFO", logger="attnimg"):
        attnimg.attention(*(draw(1, 5, 2, 8) for _ in "qkv"), softcap=3.0)
    assert "failed" not in caplog.text
    assert "proof: eager passed" in caplog.text


WRONG = [
    ("q, k and v are not all", [(4, 8), (4, 8), (4, 8)], {}),
    ("do not match", [(1, 4, 2, 8), (1, 5, 2, 8), (1, 4, 2, 8)], {}),
    ("do not match", [(1, 4, 2, 8), (1, 4, 2, 16), (1, 4, 2, 8)], {}),
    ("not a multiple", [(1, 4, 3, 8), (1, 4, 2, 8), (1, 4, 2, 8)], {}),
    ("only for packed", [(1, 4, 2, 8)] * 3, {"cu_seqlens": torch.tensor([0, 4]).int()}),
    ("not int32", [(4, 2, 8)] * 3, {"cu_seqlens": torch.tensor([0, 4])}),
    ("needs cu_seqlens", [(4, 2, 8)] * 3, {"cu_seqlens_k": torch.tensor([0, 4]).int()}),
    ("from 0 to", [(4, 2, 8)] * 3, {"cu_seqlens": torch.tensor([0, 3]).int()}),
    ("decreases", [(8, 2, 8)] * 3, {"cu_seqlens": torch.tensor([0, 5, 3, 8]).int()}),
    (
        "different numbers of documents",
        [(8, 2, 8)] * 3,
        {"cu_seqlens": torch.tensor([0, 5, 8]).int(), "cu_seqlens_k": torch.tensor([0, 8]).int()},
    ),
    (
        "cu_seqlens_k is missing",
        [(8, 2, 8), (9, 2, 8), (9, 2, 8)],
        {"cu_seqlens": torch.tensor([0, 8]).int()},
    ),
    (
        "max_seqlen is less",
        [(8, 2, 8)] * 3,
        {"cu_seqlens": torch.tensor([0, 2, 8]).int(), "max_seqlen": 5},
    ),
    (
        "not on the device",
        [(4, 2, 8)] * 3,
        {"cu_seqlens": torch.zeros(2, dtype=torch.int32, device="meta")},
    ),
    ("not a tensor", [(4, 2, 8)] * 3, {"cu_seqlens": [0, 4]}),
    ("no heads", [(4, 0, 8)] * 3, {}),
    ("no heads", [(4, 2, 0), (4, 2, 0), (4, 2, 8)], {}),
    ("one logit a head", [(4, 2, 8)] * 3, {"sinks": torch.zeros(1)}),
    ("one logit a head", [(4, 2, 8)] * 3, {"sinks": torch.zeros(2, 1)}),
    ("all on one GPU or the CPU", [(4, 2, 8)] * 3, {"sinks": torch.zeros(2, device="meta")}),
    ("window is not", [(4, 2, 8)] * 3, {"window": 0}),
    ("window is not", [(4, 2, 8)] * 3, {"window": -1}),
    ("window is not", [(4, 2, 8)] * 3, {"window": 2.5}),
    ("softcap is not", [(4, 2, 8)] * 3, {"softcap": -1.0}),
    ("softcap is not", [(4, 2, 8)] * 3, {"softcap": float("inf")}),
    ("scale is not", [(4, 2, 8)] * 3, {"scale": -0.5}),
    ("dropout is not", [(4, 2, 8)] * 3, {"dropout": 1.0}),
    ("dropout is not", [(4, 2, 8)] * 3, {"dropout": float("nan")}),
    ("unknown backend", [(4, 2, 8)] * 3, {"backend": "flash5"}),
]


@pytest.mark.parametrize(("text", "shapes", "arguments"), WRONG)
def test_tensors_that_do_not_match_are_refused(text, shapes, arguments):
    with pytest.raises(attnimg.AttnimgError, match=text):
        attnimg.attention(*(draw(*shape) for shape in shapes), **arguments, verify=False)


def test_float64_is_refused_with_the_dtypes_that_kernels_take():
    with pytest.raises(attnimg.AttnimgError, match="float32, float16 or bfloat16"):
        attnimg.attention(*(draw(1, 4, 2, 8, dtype=torch.float64) for _ in "qkv"), verify=False)
