"""Right kernels with the noise of atomics pass, leaks laid over that noise do not."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial

import pytest
import torch
from noisy_proofs import FAMILIES, LEAKS, LOST_HEAD, NoisyShape, grid, load, prove_noisy
from run_facts import a_backend, a_geometry

from attnimg.backends._transformers import attention_function
from attnimg.backends._varlen import FlashKernel
from attnimg.verification import candidate
from attnimg.verification.calls import Probe, Result, call, draw_inputs
from attnimg.verification.candidate import EXTRA_CALLS, Findings, prove_geometry
from attnimg.verification.cases import CPU, Case, list_cases
from attnimg.verification.checks import Fault, check_isolated
from attnimg.verification.reference import TILE, difference_beyond_ulp, sum_order_bounds
from attnimg.verification.worker import prove_candidate

SMALL = NoisyShape(head_dim=64, group=4, dtype="bfloat16", packed=True, tile=64)
# 20 of the grid, with few heads: `make bench/proof-noise` runs 200 for each kind of noise.
FEW_HEADS = [s for s in grid() if s.packed and s.tile == 64 and s.head_dim * s.group <= 512]
SOME = [(FAMILIES[number % 3], FEW_HEADS[number % len(FEW_HEADS)]) for number in range(20)]


@pytest.fixture(scope="module")
def references() -> dict[object, object]:
    return {}


@pytest.mark.parametrize("autocast", [False, True], ids=["", "under autocast"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_right_kernel_with_the_noise_of_atomics_passes_all_probes(
    family: str, autocast: bool
) -> None:
    shape = replace(SMALL, group=1)
    found = prove_noisy(family, shape, references={}, sequence_len=64, autocast=autocast)
    assert (found.reasons, found.unrepeated) == ([], [])


@pytest.mark.parametrize(
    ("family", "shape"),
    SOME,
    ids=[f"{family}, D {s.head_dim}, {s.group} heads to one, {s.dtype}" for family, s in SOME],
)
def test_a_right_kernel_with_the_noise_of_atomics_is_isolated(
    family: str, shape: NoisyShape, references: dict[object, object]
) -> None:
    found = prove_noisy(family, shape, references=references, sequence_len=64, repeated_alone=True)
    assert found.reasons == []


@pytest.mark.parametrize("fault", [*LEAKS, LOST_HEAD])
def test_a_leak_under_the_noise_is_refused(fault: str, references: dict[object, object]) -> None:
    found = prove_noisy(
        "fa3", SMALL, references=references, sequence_len=64, fault=fault, repeated_alone=True
    )
    codes = {reason.code for reason in found.reasons}
    assert ("numerics-bwd" if fault == LOST_HEAD else "packing-not-isolated") in codes


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_noise_is_there_and_within_its_bound(family: str, dtype: str) -> None:
    # The smallest tiles that the bound allows for.
    module = load(family, fault="none", tile=TILE)
    function = FlashKernel(backend=family, dense=None, varlen=module.flash_attn_varlen_func)
    case, backend = _packed_case(dtype), a_backend("flash_attention_2")
    inputs = draw_inputs(case, device="cpu")
    first, second = (call(Probe(function, backend, case, inputs)) for _ in range(2))
    assert torch.equal(first.out, second.out)
    bound = sum_order_bounds(case, inputs)
    moves = {"dq"} if family == "fa2" else {"dq", "dk", "dv"}
    for name in ("dq", "dk", "dv"):
        one, other = first.gradients[name], second.gradients[name]
        assert one is not None
        assert other is not None
        if name not in moves or dtype == "float32":  # in half precision few roundings flip
            assert torch.equal(one, other) == (name not in moves)
        excess = difference_beyond_ulp(one, other).transpose(1, 2)
        assert (excess <= bound[name]).all()
        # And the bound is far below what the gradients are.
        assert bound[name].max() < 1e-2 * one.abs().max(), bound[name].max() / one.abs().max()


def test_plain_attention_with_a_soft_cap_passes_in_bfloat16() -> None:
    # tanh rounds to 1 at large scores, and the gradient of q to 0.
    backend = a_backend("eager")
    geometry = a_geometry(
        dtype="bfloat16", softcap=30.0, sequence_len=64, dense=False, packing=True
    )
    found = prove_geometry(
        attention_function(backend, trusted=True), backend, geometry, device="cpu", references={},
        on_probe=lambda _case: None, on_repeat=lambda: None,
    )  # fmt: skip
    assert found.reasons == []


def _packed_case(dtype: str = "bfloat16") -> Case:
    geometry = a_geometry(
        heads=8, kv_heads=2, head_dim_qk=32, head_dim_v=32, dtype=dtype, packing=True,
        sequence_len=64,
    )  # fmt: skip
    return next(case for case in list_cases(geometry, budget=CPU) if case.repeated)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("value", [1.0, 0.99, 3e-3, 0.0])
def test_one_unit_in_the_last_place_is_a_flip_and_two_are_not(
    dtype: torch.dtype, value: float
) -> None:
    one = torch.tensor([value], dtype=dtype)
    up = torch.nextafter(one, torch.full_like(one, 9))
    assert difference_beyond_ulp(one, up).item() == 0
    assert difference_beyond_ulp(one, torch.nextafter(up, torch.full_like(one, 9))).item() > 0


class Calls:
    """Results of calls whose dk is 1 plus what a test says, at the kept token."""

    def __init__(self, *values: float) -> None:
        out = torch.ones(1, 2, 1, 1)
        self.results = [
            Result(out=out, gradients={"dk": torch.full((1, 1, 2, 1), float(value))})
            for value in values
        ]


@pytest.mark.parametrize(
    ("before", "after", "isolated"),
    [
        pytest.param((1, 1), (1,), True, id="nothing moved"),
        pytest.param((1, 1), (1 + 1e-6,), False, id="exact before, moved after"),
        pytest.param((1, 1, 1, 1, 1 + 2e-6), (1 + 1e-6,), True, id="moves now and then"),
        pytest.param((1, 1 + 1e-6), (1 - 1e-6,), True, id="within the bound"),
        pytest.param((1, 1 + 1e-6), (1.01,), False, id="beyond the bound"),
        pytest.param((1, 1.01), (1.015,), True, id="within what repeats show"),
        pytest.param((1, 1.01), (1.03,), False, id="beyond what repeats show"),
        pytest.param((1, 1), (float("nan"),), False, id="NaN after"),
        pytest.param((1, float("nan")), (1.01,), False, id="NaN in a repeat"),
    ],
)
def test_isolation_is_judged_by_how_far_gradients_move_by_themselves(
    before: tuple[float, ...], after: tuple[float, ...], isolated: bool
) -> None:
    faults = list(
        check_isolated(
            _packed_case("float32"),
            before=Calls(*before).results,
            after=Calls(*after).results,
            unchanged=torch.tensor([[True, False]]),
            noise={"dk": torch.full((1, 2, 1, 1), 1e-5)},
        )
    )
    assert [fault.reason.code for fault in faults] == ([] if isolated else ["packing-not-isolated"])
    assert all(fault.noise_sensitive for fault in faults)


@pytest.mark.parametrize("share", [0.1, 1 / 3, 0.5])
def test_an_element_that_moves_in_some_calls_is_taken_for_noise(share: float) -> None:
    draws = random.Random(0)
    check = partial(
        check_isolated,
        _packed_case("float32"),
        unchanged=torch.tensor([[True, False]]),
        noise={"dk": torch.full((1, 2, 1, 1), 1e-5)},
    )

    def repeat(times: int) -> list[Result]:
        return Calls(*(1 + 1e-6 * (draws.random() < share) for _ in range(times))).results

    refused = 0
    for _ in range(2000):
        before, after = repeat(2), repeat(1)
        if any(check(before=before, after=after)):
            before, after = before + repeat(EXTRA_CALLS), after + repeat(EXTRA_CALLS)
            refused += any(check(before=before, after=after))
    assert refused == 0


NOISE = Fault("nondeterministic", "noise", noise_sensitive=True)
GROSS = Fault("numerics-fwd", "gross", noise_sensitive=False)


def prove_by(
    script: dict[int, Fault | Exception], monkeypatch: pytest.MonkeyPatch
) -> tuple[Findings, int]:
    """Prove sdpa with probes that find what a script says of their number; and count them."""
    geometry = a_geometry(heads=2, kv_heads=2, head_dim_qk=16, head_dim_v=16, sequence_len=64)
    few = list_cases(geometry, budget=CPU)[:4]
    monkeypatch.setattr(candidate, "list_cases", lambda *_args, **_named: few)
    runs = iter(range(1000))

    def probe(*_args: object, **_named: object) -> tuple[list[object], list[Fault]]:
        fault = script.get(next(runs))
        if isinstance(fault, Exception):
            raise fault
        return [], [fault] if fault else []

    monkeypatch.setattr(candidate, "_run_probe", probe)
    backend = a_backend("sdpa")
    found = prove_geometry(
        print, backend, geometry, device="cpu", references={}, on_probe=lambda _case: None,
        on_repeat=lambda: None,
    )  # fmt: skip
    return found, next(runs)


@pytest.mark.parametrize(
    ("script", "refused", "runs"),
    [
        pytest.param({}, False, 4, id="nothing found"),
        pytest.param({0: NOISE}, False, 4 + 2 + 2 * 4, id="found once: run again, then all again"),
        pytest.param({0: NOISE, 1: NOISE}, True, 4 + 1, id="seen twice in a probe"),
        pytest.param({0: NOISE, 1: ValueError()}, True, 4 + 1, id="or raises when run again"),
        pytest.param({0: NOISE, 2: NOISE}, True, 4 + 2, id="and at the last of its runs"),
        pytest.param({0: NOISE, 3: NOISE}, True, 4 + 4, id="seen in two probes"),
        pytest.param({0: NOISE, 9: NOISE}, True, 4 + 4 + 4, id="seen in the next proof"),
        pytest.param({0: NOISE, 13: GROSS}, True, 4 + 2 + 8, id="or the one after"),
        pytest.param({2: GROSS}, True, 4, id="what noise does not explain is believed at once"),
    ],
)
def test_what_noise_may_explain_is_believed_when_it_is_seen_again(
    script: dict[int, Fault | Exception], refused: bool, runs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, made = prove_by(script, monkeypatch)
    assert (bool(found.reasons), made) == (refused, runs)
    assert bool(found.unrepeated) == (bool(script) and not refused)


def test_a_kernel_that_is_wrong_now_and_then_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = prove_by({n: NOISE for n in range(0, 1000, 7)}, monkeypatch)
    assert found.reasons


def test_what_was_seen_once_is_noted_and_gets_new_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def prove(*_args: object, on_repeat: Callable[[], None], **_named: object) -> Findings:
        on_repeat()
        return Findings([], [], 3, [NOISE.reason])

    monkeypatch.setattr(candidate, "prove_geometry", prove)
    geometry = a_geometry(heads=2, kv_heads=2, head_dim_qk=16, head_dim_v=16, sequence_len=64)
    report = io.StringIO()
    proof = prove_candidate(
        {"backend": "sdpa", "geometries": [asdict(geometry)], "trusted": False, "routed": False},
        device="cpu",
        references={},
        report=report,
    )
    assert proof.passed
    assert proof.note == "found once, and not when run again: noise"
    messages = [json.loads(line) for line in report.getvalue().splitlines() if line]
    assert [message["again"] for message in messages if "again" in message] == ["sdpa"]


def test_an_output_that_another_document_moves_is_refused_bit_by_bit() -> None:
    first = Calls(1.0, 1.0).results
    moved = replace(first[0], out=first[0].out * (1 + 2**-23))
    faults: Iterator[Fault] = check_isolated(
        _packed_case("float32"), before=first, after=[moved],
        unchanged=torch.tensor([[True, False]]), noise={},
    )  # fmt: skip
    assert [fault.reason.code for fault in faults] == ["packing-not-isolated"]
