"""Every backend that fits this GPU: right forward and backward, dense and packed, and it trains.

    pytest tests/gpu

What does not fit is skipped with the reasons of the plan.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "unit"))
from attention_cases import LAYER, draw, gradients, packed, plainly, same_document
from run_facts import a_context, a_problem
from tiny_models import tiny_model

from attnimg import application
from attnimg.backends import all_backends, find_backend
from attnimg.backends._transformers import attention_function
from attnimg.machine import probe
from attnimg.run_facts import LayerGroup, Model
from attnimg.selection.plan import choose
from attnimg.task import distributions
from attnimg.train.rows import PackedCollator, PaddedCollator
from attnimg.verification.isolation import check_isolation
from attnimg.verification.reference import shifted_keys

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = [backend.name for backend in all_backends() if backend.name != "eager"]
# These take another mask than that of the padding; the models below build it for them.
OF_TRANSFORMERS = {"sdpa", "flex_attention"}


def fitting(name, *, is_packed):
    """Return a backend that fits a bf16 Llama here, or skip with the plan's reasons."""
    group = LayerGroup(count=2, heads=4, kv_heads=2, head_dim_qk=64, head_dim_v=64)
    problem = a_problem(
        model=Model(type="llama", layers=(group,)),
        dtype="bfloat16",
        packing=is_packed,
        forward_only_ok=True,
    )
    found = choose(name, probe.this_machine(distributions()), problem, strict=True)
    verdict = next(verdict for verdict in found.verdicts if verdict.backend.name == name)
    if not verdict.fits:
        pytest.skip("; ".join(f"{reason.code}: {reason.text}" for reason in verdict.reasons))
    return find_backend(name)


def error(found, right):
    return (found.double() - right.double()).abs().max().item()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("lengths", [[320], [1, 127, 192]], ids=["dense", "packed"])
def test_it_is_as_right_as_its_pattern_written_plainly_in_bf16(name, lengths):
    backend = fitting(name, is_packed=len(lengths) > 1)
    if name in OF_TRANSFORMERS or backend.k_backward is None:
        pytest.skip(f"{name} is tested in models")
    arguments = packed(lengths) if len(lengths) > 1 else {}
    leaves = [
        x.detach().to(DEVICE, torch.bfloat16).requires_grad_()
        for x in draw(tokens=sum(lengths), size=64)
    ]
    on_gpu = {
        key: value.to(DEVICE) if torch.is_tensor(value) and value.dim() else value
        for key, value in arguments.items()
    }
    found = attention_function(backend)(LAYER, *leaves, None, scaling=0.125, **on_gpu)[0]
    seen = same_document(lengths).to(DEVICE)
    if backend.pattern == "shifted":
        one_document = torch.zeros(1, sum(lengths), dtype=torch.int64, device=DEVICE)
        seen = shifted_keys(one_document, heads=4)
    right = plainly(*leaves, seen=seen, scale=0.125)
    k, v = (x.repeat_interleave(2, dim=1) for x in leaves[1:])
    scores = (leaves[0] @ k.transpose(-1, -2) * 0.125).masked_fill(~seen, float("-inf"))
    plain = (scores.softmax(-1) @ v).transpose(1, 2)
    if backend.k_forward is not None:
        assert error(found, right) <= backend.k_forward * error(plain, right) + 1e-5
    of_found, of_right, of_plain = (gradients(out, leaves) for out in (found, right, plain))
    for one, other, bound in zip(of_found, of_right, of_plain, strict=True):
        assert one.any()
        assert error(one, other) <= backend.k_backward * error(bound, other) + 1e-4


def twenty_losses(backend, *, is_packed):
    with application.restore_registries():
        model = tiny_model("llama", application.load_and_register(backend), hidden_size=256).to(
            DEVICE, torch.bfloat16
        )
        application.require_applied(model, backend)
        padding_free = backend.packing == "native"
        if is_packed:
            assert check_isolation(
                model, implementation=backend.name, context=a_context(padding_free=padding_free)
            ).isolated
        collate = PackedCollator(pad_token_id=0, seq_idx=False, padding_free=padding_free)
        if not is_packed:
            collate = PaddedCollator(pad_token_id=0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        generator = torch.Generator().manual_seed(0)
        losses = []
        for _ in range(20):
            ids = torch.randint(3, 128, (96,), generator=generator).tolist()
            row = {"input_ids": ids, "labels": ids}
            if is_packed:
                row["document_lengths"] = [10, 50, 36]
            batch = {
                key: value.to(DEVICE) if torch.is_tensor(value) else value
                for key, value in collate([row]).items()
            }
            loss = model(**batch, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("is_packed", [True, False], ids=["packed", "dense"])
def test_twenty_steps_lose_what_sdpa_loses(name, is_packed):
    backend = fitting(name, is_packed=is_packed)
    losses = twenty_losses(backend, is_packed=is_packed)
    if name == "s2":
        assert losses[-1] < losses[0]
        return
    expected = twenty_losses(find_backend("sdpa"), is_packed=is_packed)
    # bf16 keeps 3 digits, and 20 steps spread what it drops.
    assert losses == pytest.approx(expected, abs=0.1)
