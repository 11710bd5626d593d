"""A call may draw random numbers, and must not set them back."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from attnimg.prove.seeding import drawn, is_set_back

CPU = torch.device("cpu")
STATE = torch.Generator().manual_seed(3).get_state()


@pytest.mark.parametrize(
    ("call", "set_back"),
    [
        pytest.param(lambda: None, False, id="nothing drawn"),
        pytest.param(lambda: torch.rand(3), False, id="a few drawn"),
        pytest.param(lambda: torch.rand(624), False, id="a block drawn"),
        pytest.param(lambda: torch.randn(5000), False, id="many drawn"),
        pytest.param(lambda: torch.randperm(1000), False, id="a permutation drawn"),
        pytest.param(lambda: torch.manual_seed(0), True, id="seeded"),
        pytest.param(lambda: (torch.manual_seed(0), torch.rand(9)), True, id="seeded, drawn"),
        pytest.param(lambda: torch.set_rng_state(STATE), True, id="another state"),
    ],
)
def test_going_on_is_told_from_going_back(call: Callable[[], object], set_back: bool) -> None:
    with torch.random.fork_rng([]):
        torch.manual_seed(7)
        before = drawn(CPU)
        call()
        assert is_set_back(before, CPU) == set_back


def test_seeding_with_the_runs_own_seed_is_seen() -> None:
    with torch.random.fork_rng([]):
        torch.manual_seed(7)
        before = drawn(CPU)
        torch.manual_seed(7)
        assert is_set_back(before, CPU)
