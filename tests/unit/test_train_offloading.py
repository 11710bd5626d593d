"""Test that activations are offloaded by TRL where a GPU would, and nowhere on a CPU.

Here TRL's offloader treats the CPU as the GPU: it copies the same tensors at the same places, to
memory that is not pinned. tests/gpu/test_offloading.py runs it on a GPU.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from trl.models import activation_offloading as trl_offloading

from attnimg.config.schema import Config
from attnimg.task import cpu_warnings
from attnimg.train.offloading import offload_activations

sys.path.append(str(Path(__file__).parents[1] / "fixtures"))
from offloaded import require_equal
from tiny_run import CPU, losses, make_model, run


class Stream(torch.cpu.Stream):
    """torch's stream of a CPU, with the one method of a GPU's that it lacks."""

    def synchronize(self) -> None:
        pass


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Make TRL treat the CPU as the GPU; return the shapes of the tensors that it moves."""
    shapes: list[tuple[int, ...]] = []

    def empty_like(x: torch.Tensor, *, pin_memory: bool, **options: Any) -> torch.Tensor:
        shapes.append(tuple(x.shape))
        return torch.empty(x.shape, dtype=x.dtype)

    class Torch:
        """torch, with another empty_like."""

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

    fake = Torch()
    fake.empty_like = empty_like  # type: ignore[attr-defined]
    monkeypatch.setattr(trl_offloading, "torch", fake)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_: torch.device("cpu"))
    monkeypatch.setattr(torch.cpu, "Stream", Stream)
    monkeypatch.setattr(torch.cpu, "current_stream", Stream)
    monkeypatch.setattr(torch.cpu, "empty_cache", lambda: None, raising=False)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)
    return shapes


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "LoRA"])
@pytest.mark.parametrize("mode", [True, "legacy", "disk", "hidden_states"])
def test_offloading_leaves_gradients_as_they_are(
    tmp_path: Path, copied: list[tuple[int, ...]], mode: object, adapter: bool
) -> None:
    make_model(tmp_path)
    require_equal(tmp_path, device="cpu", adapter=adapter, mode=mode)
    assert copied.count((2, 64, 64)) >= 4, "the inputs of two layers in two steps"


def test_a_cpu_has_nothing_to_offload(tmp_path: Path) -> None:
    config = Config(gradient_checkpointing="offload")
    assert isinstance(offload_activations(None, config, CPU), nullcontext)
    (warning,) = cpu_warnings(config, CPU)
    assert (warning.code, warning.key) == ("hint-not-used", "gradient_checkpointing")
    make_model(tmp_path / "model")
    run(tmp_path, tmp_path / "with", gradient_checkpointing="offload", max_steps=2)
    run(tmp_path, tmp_path / "without", gradient_checkpointing=True, max_steps=2)
    assert losses(tmp_path / "with") == losses(tmp_path / "without")
