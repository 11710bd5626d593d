"""Shifted sparse attention against LongLoRA's own code, written plainly, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from attention_cases import LAYER, draw, gradients, packed, plainly
from run_facts import a_geometry

from attnimg.backends import find_backend
from attnimg.backends import s2 as shifted_sparse
from attnimg.backends._transformers import attention_function
from attnimg.backends._varlen import read_call
from attnimg.backends.s2 import GroupKernel, group_kernels, shifted_attention
from attnimg.errors import AttnimgError
from attnimg.verification.candidate import prove_geometry
from attnimg.verification.reference import attend, shifted_keys

FIXTURES = Path(__file__).parents[2] / "fixtures"


def as_published(q, k, v, *, scale):
    """Shift half the heads by half a group, attend in groups, shift back.

    Within a group attention is causal in the rolled order. There the row's first tokens come after
    its last ones; LongLoRA's FlashAttention path keeps them apart, so that no token sees one that
    stands after it in the row.
    """
    tokens = q.shape[2]
    group = tokens // 4
    heads = q.shape[1]
    k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
    place = torch.arange(tokens)
    outs = []
    for head in range(heads):
        shift = group // 2 if head >= heads // 2 else 0
        rolled = place.roll(-shift)  # which token stands at each place
        stands = rolled.argsort()  # at which place each token stands
        seen = (stands[:, None] // group == stands // group) & (stands[:, None] >= stands)
        seen &= place[:, None] >= place
        one = [x[:, head : head + 1] for x in (q, k, v)]
        outs.append(plainly(*one, seen=seen, scale=scale))
    return torch.cat(outs, dim=2)


def s2(*tensors, **arguments):
    found, weights = attention_function(find_backend("s2"))(LAYER, *tensors, **arguments)
    assert weights is None
    return found


@pytest.mark.parametrize("tokens", [8, 16, 64])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_it_is_what_the_paper_says_forward_and_backward(tokens, kv_heads):
    q, k, v = draw(2, tokens, kv_heads=kv_heads)
    found, expected = s2(q, k, v, None, scaling=0.4), as_published(q, k, v, scale=0.4)
    assert (found - expected).abs().max() < 1e-5
    for one, other in zip(gradients(found, (q, k, v)), gradients(expected, (q, k, v)), strict=True):
        assert (one - other).abs().max() < 1e-4


@pytest.mark.parametrize("tokens", [1, 13, 64])
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 2), (5, 5)])
def test_groups_are_documents_of_flash_attention_where_it_is(monkeypatch, tokens, heads, kv_heads):
    q, k, v = draw(2, tokens, heads=heads, kv_heads=kv_heads)
    expected = s2(q, k, v, None, scaling=0.4)
    monkeypatch.setenv("LOCAL_KERNELS", f"kernels-community/flash-attn2={FIXTURES / 'flash_attn2'}")
    (kernel,) = group_kernels()
    rows = []

    def counted(*tensors, **arguments):
        rows.append(arguments["cu_seq_lens_q"].tolist())
        return kernel.function(*tensors, **arguments)

    attend = shifted_attention((replace(kernel, function=counted),))
    found = attend(LAYER, q, k, v, None, scaling=0.4)[0]
    assert (found - expected).abs().max() < 1e-5
    for one, other in zip(gradients(found, (q, k, v)), gradients(expected, (q, k, v)), strict=True):
        assert (one - other).abs().max() < 1e-4
    # Two rows of four groups; shifted, of five, of which the first and last are half ones.
    assert [len(bounds) - 1 for bounds in rows] == ([10] if heads == 1 else [8, 10])


def test_s2_takes_the_flash_attention_that_is_served(monkeypatch):
    monkeypatch.delenv("LOCAL_KERNELS", raising=False)
    assert group_kernels() == ()
    monkeypatch.setenv("LOCAL_KERNELS", f"kernels-community/flash-attn2={FIXTURES / 'flash_attn2'}")
    assert len(group_kernels()) == 1


@pytest.mark.parametrize(
    ("on_cpu", "has_dropout", "dropout", "takes"),
    [
        pytest.param(True, True, 0.1, True, id="one for the CPU that drops weights"),
        pytest.param(True, False, 0.0, True, id="one that can't, where none are dropped"),
        pytest.param(True, False, 0.1, False, id="one that can't, where they are"),
        pytest.param(False, True, 0.0, False, id="one for GPUs, on a CPU"),
    ],
)
def test_groups_go_to_a_kernel_that_can_run_them(on_cpu, has_dropout, dropout, takes):
    kernel = GroupKernel(function=plainly, on_cpu=on_cpu, has_dropout=has_dropout)
    features = frozenset({"dropout"})
    call = read_call("s2", LAYER, *draw(), None, features=features, dropout=dropout)
    assert kernel.supports(call) == takes


def test_a_flash_attention_that_does_not_load_is_said_and_left_out(monkeypatch, caplog):
    monkeypatch.setenv("LOCAL_KERNELS", f"kernels-community/flash-attn2={FIXTURES}")
    assert group_kernels() == ()
    assert "s2 does not use flash-attn" in caplog.text


@pytest.mark.parametrize("tokens", [16, 13])
def test_no_token_sees_a_later_one(tokens):
    q, k, v = draw(1, tokens)
    out = s2(q, k, v, None, scaling=0.4)
    for token in range(tokens):
        seen = torch.autograd.grad(out[0, token].sum(), (k, v), retain_graph=True)
        assert not any(gradient[:, :, token + 1 :].any() for gradient in seen)


def test_information_flows_between_groups_in_half_the_heads():
    q, k, v = draw(1, 16)
    out = s2(q, k, v, None, scaling=0.4)
    # Token 4 begins the second group of 4; the shifted heads have it with tokens 2 and 3.
    for head, sees_token_3 in ((0, False), (1, False), (2, True), (3, True)):
        (seen,) = torch.autograd.grad(out[0, 4, head].sum(), k, retain_graph=True)
        assert bool(seen[0, head // 2, 3].any()) == sees_token_3


@pytest.mark.parametrize("tokens", [1, 7, 13, 30])
def test_a_row_of_any_length_is_filled_up_and_cut_again(tokens):
    q, k, v = draw(1, tokens)
    filled = -tokens % 8
    whole = [torch.nn.functional.pad(x, (0, 0, 0, filled), value=9.0) for x in (q, k, v)]
    expected = as_published(*whole, scale=0.4)[:, :tokens]
    assert (s2(q, k, v, None, scaling=0.4) - expected).abs().max() < 1e-5


def test_padding_on_the_right_changes_no_token():
    q, k, v = draw(2, 16)
    is_token = torch.ones(2, 16, dtype=torch.bool)
    is_token[1, 11:] = False
    found = s2(q, k, v, is_token, scaling=0.4)
    assert torch.equal(found, s2(q, k, v, None, scaling=0.4))


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        pytest.param(packed([8, 8]), "s2-with-packing", id="packed documents"),
        pytest.param(
            {"position_ids": torch.tensor([[*range(8), *range(8)]])},
            "s2-with-packing",
            id="positions that start at 0 again",
        ),
        pytest.param({"is_causal": False}, "s2-batch", id="attention to both sides"),
        pytest.param({"sliding_window": 4}, "argument-not-honoured", id="a window"),
        pytest.param({"softcap": 30.0}, "argument-not-honoured", id="a soft cap"),
    ],
)
def test_what_can_not_be_grouped_is_refused(arguments, code):
    with pytest.raises(AttnimgError) as caught:
        s2(*draw(1, 16), None, scaling=0.4, **arguments)
    assert caught.value.code == code


def test_padding_on_the_left_and_a_cache_are_refused():
    is_token = torch.ones(1, 16, dtype=torch.bool)
    is_token[0, :2] = False
    with pytest.raises(AttnimgError, match="group"):
        s2(*draw(1, 16), is_token, scaling=0.4)
    with pytest.raises(AttnimgError, match="group"):
        s2(*draw(1, 4, keys=16), None, scaling=0.4)


@pytest.mark.parametrize("tokens", [1, 7, 16, 30, 64])
@pytest.mark.parametrize("heads", [1, 2, 4, 5])
def test_the_reference_of_its_proof_is_what_was_published(tokens, heads):
    q, k, v = (x.double() for x in draw(2, tokens, heads=heads, kv_heads=1))
    documents = torch.zeros(2, tokens, dtype=torch.int64)
    visible = shifted_keys(documents, heads=heads)
    found = attend(q, k, v, visible=visible, scale=0.4)
    whole = [torch.nn.functional.pad(x, (0, 0, 0, -tokens % 8)) for x in (q, k, v)]
    assert torch.allclose(found, as_published(*whole, scale=0.4)[:, :tokens], atol=1e-12)


def prove(function, *, dtype="float32", heads=4):
    backend = find_backend("s2")
    geometry = a_geometry(
        heads=heads, kv_heads=min(heads, 2), head_dim_qk=16, head_dim_v=16, sequence_len=100,
        dtype=dtype,
    )  # fmt: skip
    return prove_geometry(
        function,
        backend,
        geometry,
        device="cpu",
        references={},
        on_probe=lambda case: None,
        on_repeat=lambda: None,
    )


@pytest.mark.parametrize(("dtype", "heads"), [("float32", 4), ("float32", 1), ("bfloat16", 4)])
def test_its_proof_compares_outputs_and_gradients(dtype, heads):
    found = prove(attention_function(find_backend("s2")), dtype=dtype, heads=heads)
    assert found.reasons == []
    assert {figure.quantity for figure in found.figures} == {"out", "dq", "dk", "dv"}
    assert all(figure.allowed < 1 for figure in found.figures)
    assert found.cases > 50


def full_attention(*tensors, **arguments):
    return attention_function(find_backend("sdpa"))(*tensors, **arguments)


def not_shifted(monkeypatch):
    whole = shifted_sparse._attend_in_groups
    monkeypatch.setattr(
        shifted_sparse,
        "_attend_in_groups",
        lambda *tensors, **_: whole(*tensors, shifted=False, kernel=None),
    )


def leaking(monkeypatch):
    """Leave the row's ends in one group, as LongLoRA's path without FlashAttention does."""
    whole = shifted_sparse._attend_in_groups

    def grouped(call, q, k, v, *, shifted, **_):
        roll = q.shape[2] // 8 if shifted else 0
        out = whole(call, *(x.roll(-roll, dims=2) for x in (q, k, v)), shifted=False, kernel=None)
        return out.roll(roll, dims=2)

    monkeypatch.setattr(shifted_sparse, "_attend_in_groups", grouped)


def two_groups(monkeypatch):
    monkeypatch.setattr(shifted_sparse, "GROUPS", 2)


@pytest.mark.parametrize("fault", [not_shifted, leaking, two_groups], ids=lambda f: f.__name__)
def test_a_wrong_s2_fails_its_proof(monkeypatch, fault):
    fault(monkeypatch)
    found = prove(attention_function(find_backend("s2")))
    assert "numerics-fwd" in [reason.code for reason in found.reasons]


def test_full_attention_is_no_s2():
    reasons = prove(full_attention).reasons
    assert "numerics-fwd" in [reason.code for reason in reasons]
