"""Test the running check: masks are read, parts of a call are chosen and compared."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from run_facts import a_backend, a_context
from torch.nn.attention.flex_attention import create_block_mask

from attnimg.run_facts import CallCheck
from attnimg.train.attention_check import AttentionCheck
from attnimg.verification import blocks, running_check
from attnimg.verification.blocks import NotComparable, choose_documents, read_mask_spans
from attnimg.verification.running_check import CallKind, call_again
from benchmarks import running_check as measured


def spans(first: torch.Tensor, last: torch.Tensor) -> list[tuple[int, int]]:
    return list(zip(first.tolist(), last.tolist(), strict=True))


# Two documents of 3 and 2, a window of 2, and a token of padding that sees nothing.
SEEN = torch.tensor(
    [[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0],
     [0, 0, 0, 1, 0, 0], [0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 0, 0]], dtype=torch.bool,
)  # fmt: skip
SPANS = [(0, 1), (0, 2), (1, 3), (3, 4), (3, 5), (5, 5)]
LOWEST = torch.finfo(torch.bfloat16).min


def block_mask() -> Any:
    return create_block_mask(
        lambda batch, head, query, key: SEEN[query, key] & (batch + head >= 0), 2, None, 6, 6,
        device="cpu",
    )  # fmt: skip


@pytest.mark.parametrize(
    "mask",
    [
        pytest.param(SEEN[None, None], id="of bools"),
        pytest.param(torch.stack([~SEEN, SEEN])[:, None], id="of each row"),
        pytest.param(
            torch.zeros(1, 1, 6, 6, dtype=torch.bfloat16).masked_fill(~SEEN, LOWEST), id="added"
        ),
        pytest.param(torch.zeros(1, 1, 6, 6).masked_fill(~SEEN, -torch.inf), id="added, inf"),
        pytest.param(block_mask(), id="of flex_attention"),
    ],
)
def test_a_mask_of_spans_is_read(mask: Any) -> None:
    assert spans(*read_mask_spans(mask, 1, n_tokens=6)) == SPANS


@pytest.mark.parametrize(
    ("mask", "why"),
    [
        (torch.eye(6).bool().flip(0) | torch.eye(6).bool(), "between two that a query sees"),
        (torch.arange(36.0).view(6, 6), "adds a bias"),
        ([[True]], "is a list"),
    ],
)
def test_other_masks_are_refused_with_a_reason(mask: Any, why: str) -> None:
    given = mask[None, None] if isinstance(mask, torch.Tensor) else mask
    with pytest.raises(NotComparable, match=why):
        read_mask_spans(given, 0, n_tokens=6)


def test_of_a_long_row_whole_documents_are_compared() -> None:
    ends = [0, 5, 9, 30, 32, 40]
    first = torch.cat([torch.full((b - a,), a) for a, b in pairwise(ends)])
    last = torch.arange(40) + 1
    found = {
        (part.start, part.stop)
        for seed in range(200)
        for part in [choose_documents(first, last, longest=10, rng=random.Random(seed))]
    }
    # The document of 21 tokens is longer than asked for, and stays whole.
    assert found == {(0, 9), (5, 9), (9, 30), (30, 40), (32, 40)}
    whole = choose_documents(first, last, longest=40, rng=random.Random(0))
    assert (whole.start, whole.stop) == (0, 40)


@pytest.mark.parametrize("fault", measured.FAULTS)
def test_a_fault_is_found_in_the_call_and_its_repetition(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measured, "WRONG_CHECKS", 3)
    monkeypatch.setattr(measured, "FAULTS", (fault,))
    assert measured.check_wrong_kernels() == {fault: {"checks": 3, "seen": 3, "stopped": 3}}


def test_right_calls_of_every_kernel_pass() -> None:
    """The first of the 10,000 that docs/measured/running-check.json counts."""
    found = measured.check_draws(range(70))
    assert (found["checks"], found["stopped"], found["doubtful"]) == (70, 0, 0), found["reasons"]
    assert all(0 < margin < 1 for margin in found["closest_to_its_bound"].values())
    assert found["skipped"] == {}


def a_call(**changes: Any) -> tuple[Any, measured.CallSpec]:
    spec = replace(
        measured.draw_spec(0), lengths=(40, 60), heads=8, kv_heads=4, window=None, values="spread",
        dtype="bfloat16", d_out=1.0, seed=1, **changes,
    )  # fmt: skip
    return measured.make_call(spec), spec


def test_heads_and_tokens_are_chosen_within_the_budgets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    call, spec = a_call()
    (all_heads,) = {figure.case for figure in measured.check(call, spec).figures}
    assert all_heads == "row 0, tokens 0 to 99, key heads 0 to 3"
    monkeypatch.setitem(running_check.PAIRS, "cpu", 1)
    cases = set()
    for seed in range(20):
        found = measured.check(call, replace(spec, seed=seed))
        assert not found.faults
        cases |= {figure.case for figure in found.figures}
    assert cases == {f"row 0, tokens 0 to 99, key heads {n} to {n}" for n in range(4)}
    monkeypatch.setattr(running_check, "RESULT_BYTES", 1)
    monkeypatch.setattr(running_check, "ENDS", 8)
    found = measured.check(call, spec)
    assert (found.faults, found.skipped) == ((), "")
    # A fault in the last tokens is seen there too.
    call.out[:, -3:] *= 2
    assert measured.check(call, spec).faults


def test_one_tile_and_many_give_the_same() -> None:
    call, _ = a_call()
    place = torch.arange(100)
    row = blocks.RowAttention(
        q=call.q[0], k=call.k[0], v=call.v[0], d_out=call.d_out[0].transpose(0, 1),
        first_T=torch.where(place < 40, 0, 40), last_T=place + 1, scale=0.3, softcap=5.0,
        sinks=torch.arange(8.0),
    )  # fmt: skip
    one, many = (
        blocks.block_reference(row, queries=[(0, 100)], keys=[(0, 100)], at_most_bytes=size)
        for size in (1 << 28, 1 << 18)
    )
    for name in ("out", "dq", "dk", "dv"):
        assert torch.allclose(getattr(one, name), getattr(many, name), rtol=1e-10), name


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"arguments": {"position_bias": 1}}, "position_bias"),
        ({"arguments": {"dropout": 0.1}}, "dropout 0.1"),
        ({"written": True}, "overwrote a tensor"),
        ({"k": torch.ones(1, 4, 7, 64)}, "queries and 7 keys"),
        ({"q": torch.full((1, 8, 100, 64), torch.nan)}, "q, k or v is NaN"),
    ],
)
def test_calls_that_can_not_be_compared_are_skipped_with_a_reason(
    change: dict[str, Any], why: str
) -> None:
    call, spec = a_call(head_dim=64)
    found = measured.check(replace(call, **change), spec)
    assert why in found.skipped
    assert not found.figures


def test_without_a_finite_gradient_the_output_is_compared() -> None:
    call, spec = a_call()
    call = replace(call, d_out=call.d_out * torch.inf)
    assert [figure.quantity for figure in measured.check(call, spec).figures] == ["out"]


def test_values_that_the_precision_can_not_represent_are_not_judged() -> None:
    """float16 has no number below 6e-8: most gradients are 0 in a right kernel too."""
    spec = replace(a_call()[1], dtype="float16")
    call = call_again(
        replace(measured.make_call(spec), d_out=torch.full((1, 100, 8, 128), 6e-8).half())
    )
    assert not call.gradients["dq"].all()
    found = measured.check(call, spec)
    assert (found.faults, found.skipped) == ((), "")


@pytest.mark.parametrize(
    ("name", "context", "dropout", "why"),
    [
        ("sdpa", {}, 0.0, ""),
        ("eager", {"checkpointing": True}, 0.0, ""),
        ("sdpa", {"compiled": True}, 0.0, "torch.compile fuses"),
        ("sdpa", {}, 0.1, "attention_dropout: 0.1 drops"),
        ("s2", {}, 0.0, "s2 attends within groups"),
        ("sage", {}, 0.0, "sage quantizes"),
        ("fp8", {}, 0.0, "fp8 quantizes"),
    ],
)
def test_runs_that_can_not_be_checked_print_the_reason(
    name: str, context: dict[str, Any], dropout: float, why: str
) -> None:
    found = running_check.reason_not_checked(
        [a_backend(name)], a_context(**context), dropout=dropout
    )
    assert found.startswith(why)
    assert bool(found) == bool(why)
    said: list[str] = []
    check = AttentionCheck(200, lambda *_: CallCheck(backend="", layer=0), why_not=found,
                           alternatives=(), log=said.append)  # fmt: skip
    check.report_schedule()
    reason = f"attention is not checked during training: {found}"
    assert said == [reason if why else "attention: one layer is checked every 200 steps "
                    "(attn_check_steps)"]  # fmt: skip


def test_checks_go_through_the_kinds_and_layers() -> None:
    sliding, full = (
        CallKind(4, 2, 16, 16, window, None, False) for window in (32, None)
    )  # fmt: skip
    check = AttentionCheck(1, lambda *_: CallCheck(backend="", layer=0), why_not="",
                           alternatives=(), log=print)  # fmt: skip
    check._kinds = [sliding, sliding, full, sliding, full]
    turns = []
    for turn in range(12):
        check._turn = turn
        turns.append(check._layer())
    assert turns == [0, 2, 1, 4, 3, 2, 0, 4, 1, 2, 3, 4]
