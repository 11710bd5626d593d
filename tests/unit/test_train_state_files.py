"""Test that states of optimizers, schedules and generators are read as they were written."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from attnimg.train import saved_states as state_files
from attnimg.train.checkpoint import FileHasher
from attnimg.train.saved_states import UnsupportedState, read_state, write_state


def write(folder: Path, name: str, state: object, *, step: int) -> None:
    """Write a state, and check that the hashes taken meanwhile are those of the files."""
    with FileHasher() as hashes:
        write_state(folder, name, state, step=step, hashes=hashes)
        paths = sorted(folder.glob(f"{name}-*.safetensors"))
        assert set(paths) == set(hashes._files), "each is hashed while others are written"
        for path, found in zip(paths, hashes.hash_all(paths), strict=True):
            assert found == hashlib.sha256(path.read_bytes()).hexdigest()


def same(found: Any, needed: Any) -> bool:
    """Return whether two states are equal, with their types, bit for bit."""
    if type(found) is not type(needed):
        return False
    if isinstance(needed, torch.Tensor):
        alike = found.dtype == needed.dtype and found.shape == needed.shape
        flat = (tensor.contiguous().flatten().view(torch.uint8) for tensor in (found, needed))
        return alike and torch.equal(*flat)
    if isinstance(needed, dict):
        return list(found) == list(needed) and all(same(found[key], needed[key]) for key in needed)
    if isinstance(needed, list | tuple):
        pairs = zip(found, needed, strict=False)
        return len(found) == len(needed) and all(same(*pair) for pair in pairs)
    return repr(found) == repr(needed)  # NaN equals NaN here


def optimizer(make: Callable[[Any], torch.optim.Optimizer]) -> torch.optim.Optimizer:
    """Return an optimizer after three steps."""
    torch.manual_seed(1)
    layer = torch.nn.Sequential(torch.nn.Linear(80, 64), torch.nn.Linear(64, 80))
    made = make(layer.parameters())
    for _ in range(3):
        layer(torch.randn(2, 80)).square().sum().backward()
        made.step()
    return made


def bitsandbytes(name: str) -> Callable[[Any], torch.optim.Optimizer]:
    def make(weights: Any) -> torch.optim.Optimizer:
        import bitsandbytes as bnb

        made: torch.optim.Optimizer = getattr(bnb.optim, name)(weights, lr=1e-2)
        return made

    return make


def adafactor(weights: Any) -> torch.optim.Optimizer:
    from transformers import Adafactor

    made: torch.optim.Optimizer = Adafactor(weights)
    return made


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda weights: torch.optim.AdamW(weights, lr=1e-2),
    "fused adamw": lambda weights: torch.optim.AdamW(weights, lr=1e-2, fused=True),
    "sgd": lambda weights: torch.optim.SGD(weights, lr=1e-2),
    "sgd with momentum": lambda weights: torch.optim.SGD(weights, lr=1e-2, momentum=0.9),
    "adagrad": lambda weights: torch.optim.Adagrad(weights),
    "rmsprop": lambda weights: torch.optim.RMSprop(weights, lr=1e-2),
    "adafactor": adafactor,
    "8-bit adamw of bitsandbytes": bitsandbytes("AdamW8bit"),
    "lion of bitsandbytes": bitsandbytes("Lion"),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("smallest", [state_files._SMALLEST, 6000], ids=["one file", "many"])
def test_the_state_of_an_optimizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, smallest: int
) -> None:
    monkeypatch.setattr(state_files, "_SMALLEST", smallest)
    made = optimizer(OPTIMIZERS[name])
    write(tmp_path, "optimizer", made.state_dict(), step=3)
    found = read_state(tmp_path, "optimizer", device="cpu")
    assert same(found, made.state_dict())
    again = optimizer(OPTIMIZERS[name])
    again.load_state_dict(found)
    assert same(again.state_dict(), made.state_dict())


def plateau(made: torch.optim.Optimizer) -> ReduceLROnPlateau:
    schedule = ReduceLROnPlateau(made, patience=0)
    for loss in (3.0, 4.0, float("inf")):
        schedule.step(loss)
    return schedule


SCHEDULES: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "a function": lambda made: LambdaLR(made, lambda step: 1 / (1 + step)),
    "reduce on plateau": plateau,
    "none seen yet": ReduceLROnPlateau,
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_state_of_a_schedule(tmp_path: Path, name: str) -> None:
    made = optimizer(OPTIMIZERS["adamw"])
    state = SCHEDULES[name](made).state_dict()
    write(tmp_path, "scheduler", state, step=3)
    assert same(read_state(tmp_path, "scheduler", device="cpu"), state)


@pytest.mark.parametrize(
    "state",
    [
        pytest.param({"a": {1: None, "1": True}}, id="keys of several types"),
        pytest.param([float("nan"), float("inf"), -0.0, 5e-324, 2**70, 0.1], id="odd numbers"),
        pytest.param({"tensor": 1, "dict": [], "tuple": ()}, id="the names that the format uses"),
        pytest.param({}, id="nothing"),
        pytest.param({"a": torch.tensor(3), "b": torch.zeros(0, 2)}, id="scalars and empty ones"),
        pytest.param({"a": torch.arange(6).reshape(2, 3).T}, id="a transposed view"),
        pytest.param({"a": torch.arange(9)[2:5], "b": torch.arange(9)[4:]}, id="slices"),
        pytest.param([torch.ones(3, dtype=dtype) for dtype in (torch.bfloat16, torch.bool,
                      torch.float8_e4m3fn, torch.uint8)], id="other dtypes"),
        pytest.param(random.getstate(), id="random states of Python"),
    ],
)  # fmt: skip
def test_states_of_every_kind(tmp_path: Path, state: Any) -> None:
    write(tmp_path, "state", state, step=0)
    assert same(read_state(tmp_path, "state", device="cpu"), state)


def test_a_tensor_of_several_names_is_written_once(tmp_path: Path) -> None:
    shared = torch.randn(1000)
    write(tmp_path, "state", {"a": shared, "b": [shared, shared]}, step=0)
    assert (tmp_path / "state-1.safetensors").stat().st_size < 2 * shared.nbytes
    found = read_state(tmp_path, "state", device="cpu")
    assert found["a"] is found["b"][0] is found["b"][1]


class Quantized(torch.Tensor):
    """A tensor of another class, as torchao's."""


@pytest.mark.parametrize(
    "value",
    [object(), Quantized([1.0]), torch.eye(2).to_sparse(), {1.5: 0}, print],
    ids=["object", "a tensor of another class", "sparse", "a fraction as key", "a function"],
)
def test_objects_other_than_plain_tensors_are_refused_before_anything_is_written(
    tmp_path: Path, value: object
) -> None:
    with pytest.raises(UnsupportedState):
        write(tmp_path, "state", {"a": torch.ones(2), "b": value}, step=0)
    assert not list(tmp_path.iterdir())
