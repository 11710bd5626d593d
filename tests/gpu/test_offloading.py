"""Test that gradients are the same, bit by bit, with activations in CPU memory."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "fixtures"))
from offloaded import require_equal
from tiny_run import make_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "LoRA"])
@pytest.mark.parametrize("mode", [True, "legacy", "hidden_states"])
def test_offloading_leaves_gradients_as_they_are(
    tmp_path: Path, mode: object, adapter: bool
) -> None:
    make_model(tmp_path)
    require_equal(tmp_path, device="cuda", adapter=adapter, mode=mode)
