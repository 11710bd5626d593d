"""A call may draw random numbers, and must not seed or rewind the generators."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from attnimg.verification.random_state import draw_and_read_states, is_rewound

CPU = torch.device("cpu")
STATE = torch.Generator().manual_seed(3).get_state()


@pytest.mark.parametrize(
    ("call", "rewound"),
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
def test_seeding_is_found_and_drawing_passes(call: Callable[[], object], rewound: bool) -> None:
    with torch.random.fork_rng([]):
        torch.manual_seed(7)
        before = draw_and_read_states(CPU)
        call()
        assert is_rewound(before, CPU) == rewound


def test_seeding_with_the_seed_of_the_run_is_found() -> None:
    with torch.random.fork_rng([]):
        torch.manual_seed(7)
        before = draw_and_read_states(CPU)
        torch.manual_seed(7)
        assert is_rewound(before, CPU)
