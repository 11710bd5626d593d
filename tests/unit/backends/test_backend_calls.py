"""Every call of attnimg's own, on a CPU: right on dense, padded and packed rows, or refused."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from attention_cases import LAYER, draw, gradients, packed, plainly, same_document

from attnimg import application
from attnimg.backends import find_backend
from attnimg.backends._transformers import attention_function, direct_function
from attnimg.backends.varlen_attn import varlen_attention
from attnimg.errors import AttnimgError

FIXTURES = Path(__file__).parents[2] / "fixtures"


def varlen_stand_in(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, **groups):
    """Compute what torch's varlen_attn does, whose kernels need a GPU; old ones take no groups."""
    assert groups in ({}, {"enable_gqa": True})
    assert groups or k.shape[1] == q.shape[1]
    outs = []
    for i in range(len(cu_q) - 1):
        one = slice(cu_q[i], cu_q[i + 1])
        other = slice(cu_k[i], cu_k[i + 1])
        n, m = one.stop - one.start, other.stop - other.start
        assert n <= max_q
        assert m <= max_k
        ahead = torch.arange(m) - torch.arange(n)[:, None] - (m - n)
        left, right = window_size
        seen = torch.ones(n, m, dtype=torch.bool)
        seen &= ahead >= -left if left >= 0 else seen
        seen &= ahead <= right if right >= 0 else seen
        row = [x.transpose(0, 1)[None] for x in (q[one], k[other], v[other])]
        outs.append(plainly(*row, seen=seen, scale=scale)[0].to(q.dtype))
    return torch.cat(outs)


def varlen_stand_in_old(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size):
    return varlen_stand_in(q, k, v, cu_q, cu_k, max_q, max_k, scale=scale, window_size=window_size)


def varlen_with_groups(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa=False):
    groups = {"enable_gqa": True} if enable_gqa else {}
    return varlen_stand_in(
        q, k, v, cu_q, cu_k, max_q, max_k, scale=scale, window_size=window_size, **groups
    )


@pytest.fixture
def kernels(monkeypatch):
    """Serve the stand-ins: FlashAttention-2 as a hub kernel, SageAttention as a package."""
    served = ("kernels-community/flash-attn2", "org/unread")
    spec = ":".join(f"{name}={FIXTURES / 'flash_attn2'}" for name in served)
    monkeypatch.setenv("LOCAL_KERNELS", spec)
    monkeypatch.syspath_prepend(str(FIXTURES / "sage_stand_in"))
    with application.restore_registries():
        yield
    sys.modules.pop("sageattention", None)


CALLS = {
    "sdpa by document": lambda: direct_function(find_backend("sdpa")),
    "pinned sdpa": lambda: attention_function(find_backend("sdpa_flash")),
    "flash, called directly": lambda: direct_function(find_backend("flash_attention_2")),
    "flash through transformers": lambda: attention_function(find_backend("flash_attention_2")),
    "hub :fn": lambda: attention_function(
        find_backend("kernels-community/flash-attn2:flash_attn_varlen_func")
    ),
    "unread hub kernel": lambda: attention_function(find_backend("org/unread")),
    "varlen_attn": lambda: varlen_attention(varlen_with_groups),
    "varlen_attn of torch 2.11": lambda: varlen_attention(varlen_stand_in_old),
    "sage": lambda: attention_function(find_backend("sage")),
}
ROUNDS = {"sage": 0.15}  # int8 scores; gradients are exact
WINDOWS = set(CALLS) - {"pinned sdpa", "sage"}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(
    ("shape", "arguments"),
    [
        pytest.param({"rows": 2}, {}, id="two rows"),
        pytest.param({"kv_heads": 1}, {"scaling": 0.5}, id="one key head, a scale"),
        pytest.param({"kv_heads": 4}, {}, id="ungrouped heads"),
        pytest.param({"size": 16, "size_v": 8}, {}, id="v has a size of its own"),
    ],
)
def test_dense_rows_are_right_forward_and_backward(kernels, name, shape, arguments):
    if shape.get("size_v") and name == "pinned sdpa":
        pytest.skip("head-dim-v: torch's flash kernel takes v of the size of q and k")
    q, k, v = draw(**shape)
    arguments = {"scaling": q.shape[-1] ** -0.5} | arguments
    found, weights = CALLS[name]()(LAYER, q, k, v, None, dropout=0.0, **arguments)
    expected = plainly(q, k, v, scale=arguments["scaling"])
    assert weights is None
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < ROUNDS.get(name, 1e-5)
    for one, other in zip(gradients(found, (q, k, v)), gradients(expected, (q, k, v)), strict=True):
        assert (one - other).abs().max() < 1e-4


def test_cudnn_gets_no_document_of_one_token_and_every_other_one():
    attend = attention_function(find_backend("sdpa_cudnn"))
    q, k, v = draw()
    singles = packed([1] * q.shape[2])
    found = attend(LAYER, q, k, v, None, scaling=0.4, **singles)[0]
    expected = plainly(q, k, v, seen=same_document([1] * q.shape[2]), scale=0.4)
    assert (found - expected).abs().max() < 1e-6
    for one, other in zip(gradients(found, (q, k, v)), gradients(expected, (q, k, v)), strict=True):
        assert (one - other).abs().max() < 1e-6
    # There is no cuDNN here: what is pinned to it raises.
    with pytest.raises(RuntimeError, match=r"No viable backend|No available kernel"):
        attend(LAYER, q, k, v, None, scaling=0.4, **packed([1, q.shape[2] - 1]))


@pytest.mark.parametrize("name", CALLS)
def test_packed_documents_are_right_and_isolated(kernels, name):
    lengths = [1, 5, 4, 3]
    q, k, v = draw()
    attend = partial(CALLS[name](), LAYER, scaling=0.4, **packed(lengths))
    found = attend(q, k, v, None)[0]
    expected = plainly(q, k, v, seen=same_document(lengths), scale=0.4)
    assert (found - expected).abs().max() < ROUNDS.get(name, 1e-5)
    for one, other in zip(gradients(found, (q, k, v)), gradients(expected, (q, k, v)), strict=True):
        assert (one - other).abs().max() < 1e-4
    changed = k.detach().clone()
    changed[:, :, :6] *= 3
    assert torch.equal(attend(q, changed, v, None)[0][:, 6:], found[:, 6:])
    assert not torch.equal(attend(q, changed, v, None)[0][:, :6], found[:, :6])


@pytest.mark.parametrize("name", sorted(set(CALLS) - {"flash through transformers"}))
def test_position_ids_alone_isolate_every_row_of_a_batch(kernels, name):
    q, k, v = draw(rows=2, tokens=6)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 0, 1, 2, 3, 4]])
    found = CALLS[name]()(LAYER, q, k, v, None, scaling=0.4, position_ids=positions)[0]
    for row, lengths in enumerate(([3, 3], [1, 5])):
        one = [x[row : row + 1] for x in (q, k, v)]
        expected = plainly(*one, seen=same_document(lengths), scale=0.4)
        assert (found[row] - expected[0]).abs().max() < ROUNDS.get(name, 1e-5)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("padding", ["left", "right"])
def test_padding_is_not_seen_and_comes_out_as_zeros(kernels, name, padding):
    q, k, v = draw(rows=2, tokens=6)
    is_token = torch.ones(2, 6, dtype=torch.bool)
    tokens = slice(2, 6) if padding == "left" else slice(0, 4)
    is_token[1] = False
    is_token[1, tokens] = True
    found = CALLS[name]()(LAYER, q, k, v, is_token, scaling=0.4)[0]
    alone = [x[1:, :, tokens] for x in (q, k, v)]
    expected = plainly(*alone, scale=0.4)
    assert (found[1:, tokens] - expected).abs().max() < ROUNDS.get(name, 1e-5)
    assert not found[1][~is_token[1]].any()
    assert (found[:1] - plainly(q[:1], k[:1], v[:1], scale=0.4)).abs().max() < 0.2


@pytest.mark.parametrize("name", sorted(WINDOWS))
@pytest.mark.parametrize("documents", [[13], [6, 7]], ids=["one document", "packed"])
def test_a_window_counts_the_query_itself(kernels, name, documents):
    q, k, v = draw()
    arguments = packed(documents) if len(documents) > 1 else {}
    found = CALLS[name]()(LAYER, q, k, v, None, scaling=0.4, sliding_window=3, **arguments)[0]
    seen = same_document(documents) & ~same_document(documents).tril(-3)
    assert (found - plainly(q, k, v, seen=seen, scale=0.4)).abs().max() < 1e-5


@pytest.mark.parametrize("name", sorted(set(CALLS) - {"pinned sdpa", "sage"}))
def test_the_last_query_stands_at_the_last_key(kernels, name):
    q, k, v = draw(tokens=3, keys=8)
    found = CALLS[name]()(LAYER, q, k, v, None, scaling=0.4)[0]
    assert (found - plainly(q, k, v, scale=0.4)).abs().max() < 1e-5


@pytest.mark.parametrize("name", CALLS)
def test_one_query_sees_every_key(kernels, name):
    q, k, v = draw(tokens=1, keys=8)
    found = CALLS[name]()(LAYER, q, k, v, None, scaling=0.4)[0]
    assert (found - plainly(q, k, v, scale=0.4)).abs().max() < ROUNDS.get(name, 1e-5)


@pytest.mark.parametrize("name", CALLS)
def test_a_layer_that_looks_both_ways_is_asked(kernels, name):
    q, k, v = draw()
    found = CALLS[name]()(LAYER, q, k, v, None, scaling=0.4, is_causal=False)[0]
    everything = torch.ones(13, 13, dtype=torch.bool)
    expected = plainly(q, k, v, seen=everything, scale=0.4)
    assert (found - expected).abs().max() < ROUNDS.get(name, 1e-5)


@pytest.mark.parametrize("name", sorted(set(CALLS) - {"flash through transformers"}))
@pytest.mark.parametrize(
    "argument",
    [
        pytest.param({"s_aux": torch.ones(4)}, id="sinks"),
        pytest.param({"position_bias": torch.ones(1)}, id="a bias of positions"),
        pytest.param({"indices": torch.ones(1)}, id="sparse indices"),
        pytest.param({"never_heard_of": 1}, id="an argument nobody knows"),
        pytest.param({"output_attentions": True}, id="the weights"),
    ],
)
def test_what_it_cannot_honour_it_names(kernels, name, argument):
    q, k, v = draw()
    (word,) = {"s_aux": "sinks"}.get(next(iter(argument)), next(iter(argument))).split()
    with pytest.raises(AttnimgError, match="does not support an argument") as caught:
        CALLS[name]()(LAYER, q, k, v, None, scaling=0.4, **argument)
    assert word in caught.value.why


@pytest.mark.parametrize("name", ["flash, called directly", "unread hub kernel"])
def test_flash_caps_scores(kernels, name):
    q, k, v = draw()
    found = CALLS[name]()(LAYER, q, k, v, None, scaling=0.4, softcap=0.7)[0]
    assert (found - plainly(q, k, v, scale=0.4, softcap=0.7)).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["sdpa by document", "sage", "varlen_attn"])
def test_others_refuse_to_cap_them(kernels, name):
    with pytest.raises(AttnimgError) as caught:
        CALLS[name]()(LAYER, *draw(), None, scaling=0.4, softcap=0.7)
    assert "softcap: 0.7" in caught.value.why


def test_transformers_own_flash_path_refuses_sinks_which_it_would_drop(kernels):
    attend = attention_function(find_backend("flash_attention_2"))
    with pytest.raises(AttnimgError, match="does not support an argument"):
        attend(LAYER, *draw(), None, scaling=0.4, s_aux=torch.ones(4))


def test_choosing_imports_no_torch():
    import subprocess

    code = (
        "import sys, attnimg.selection.plan, attnimg.backends as b\n"
        "[b.find_backend(n) for n in ('auto', 'sage', 'org/kernel:fn')]\n"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
