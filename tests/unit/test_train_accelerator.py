"""Test that settings in accelerator_config reach accelerate."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1] / "fixtures"))
from tiny_engine import make_engine, make_session
from tiny_models import tiny_model


@pytest.mark.parametrize("on", [True, False])
def test_settings_reach_accelerate(tmp_path: Path, on: bool) -> None:
    settings: dict[str, Any] = {
        "non_blocking": on, "gradient_accumulation_kwargs": {"sync_each_batch": on},
        "even_batches": False, "split_batches": None,
    }  # fmt: skip
    session = make_session(
        tmp_path, model=tiny_model("llama", "eager"), accelerator_config=settings
    )
    accelerator = make_engine(session).accelerator
    assert accelerator.non_blocking is on
    assert accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False) is on
    assert accelerator.even_batches is True
    assert accelerator.split_batches is False
