"""Test options that are passed on to PyTorch and transformers: right ones pass, wrong ones not."""

from __future__ import annotations

import resource
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from attnimg.config import check_values
from attnimg.config.schema import Config
from attnimg.errors import AttnimgError
from attnimg.facts import Arch, Machine
from attnimg.train.arguments import try_options
from attnimg.train.check import check_inputs, check_limits

CPU = Machine(arch=Arch(name="cpu", vendor="cpu"), gpu="cpu", packages={})
COMPILED = {"torch_compile": True}
CHECKPOINTED = {"gradient_checkpointing": True}


def scheduled(name: str, **arguments: object) -> dict[str, Any]:
    return {"lr_scheduler": name, "lr_scheduler_kwargs": arguments}


RIGHT = {
    "no arguments": {},
    "restarts": scheduled("cosine_with_restarts", num_cycles=3),
    "a power": scheduled("polynomial", power=2.0, lr_end=1e-8),
    "a decay": scheduled("warmup_stable_decay", num_decay_steps=3, decay_type="cosine"),
    "a lowest rate": scheduled("cosine_with_min_lr", min_lr=1e-6),
    "a plateau": scheduled("reduce_lr_on_plateau", factor=0.5, patience=2),
    "a time scale": scheduled("inverse_sqrt", timescale=100),
    "half a cosine and a lowest rate": {
        "cosine_min_lr_ratio": 0.1, **scheduled("cosine", num_cycles=0.5)},
    "a backend": {**COMPILED, "torch_compile_backend": "aot_eager"},
    "a mode": {**COMPILED, "torch_compile_mode": "reduce-overhead"},
    "a backend that is not used": {"torch_compile_backend": "nope"},
    "reentrant": {**CHECKPOINTED, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "not reentrant": {**CHECKPOINTED, "gradient_checkpointing_kwargs": {
        "use_reentrant": False, "preserve_rng_state": False}},
}  # fmt: skip
WRONG = {
    "an unknown argument": scheduled("cosine", nope=1),
    "a text": scheduled("cosine_with_restarts", num_cycles="many"),
    "an end above the start": scheduled("polynomial", lr_end=5),
    "an unknown decay": scheduled("warmup_stable_decay", num_decay_steps=3, decay_type="nope"),
    "two lowest rates": scheduled("cosine_with_min_lr", min_lr=1e-6, min_lr_rate=0.1),
    "a factor above 1": scheduled("reduce_lr_on_plateau", factor=5),
    "no time scale": scheduled("inverse_sqrt", timescale=0),
    "what is not an argument": scheduled("linear", optimizer=1),
    "an unknown backend": {**COMPILED, "torch_compile_backend": "nope"},
    "an unknown mode": {**COMPILED, "torch_compile_mode": "nope"},
    "an unknown keyword": {**CHECKPOINTED, "gradient_checkpointing_kwargs": {"nope": 1}},
}


def config(**keys: Any) -> Config:
    return Config(learning_rate=1e-3, **keys)


@pytest.mark.parametrize("keys", RIGHT.values(), ids=RIGHT)
def test_right_options_pass(keys: dict[str, Any]) -> None:
    try_options(config(**keys))


@pytest.mark.parametrize("keys", WRONG.values(), ids=WRONG)
def test_wrong_options_are_refused_by_key(keys: dict[str, Any]) -> None:
    with pytest.raises(AttnimgError) as caught:
        try_options(config(**keys))
    assert caught.value.key in keys
    assert caught.value.code == "bad-value"


@pytest.mark.parametrize("key", ["dataloader_num_workers", "dataset_num_proc", "dataset_processes"])
def test_more_processes_than_a_machine_runs_are_refused(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    check_limits(config(**{key: 32}), CPU)
    with pytest.raises(AttnimgError, match=f"{key}: 33") as caught:
        check_limits(config(**{key: 33}), CPU)
    assert caught.value.do == f"set {key}: 8"
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    check_limits(config(**{key: 16}), CPU)


BOUNDS = {
    "dataloader_num_workers": (1024, 1025),
    "dataset_num_proc": (1024, 1025),
    "adam_beta1": (0.0, 1.0),
    "adam_beta2": (0.9999, 1.0),
    "micro_batch_size": (2**20, 2**20 + 1),
    "eval_batch_size": (2**20, 2**20 + 1),
}


@pytest.mark.parametrize("key", BOUNDS)
def test_numbers_out_of_range_are_bad_values(key: str) -> None:
    right, wrong = BOUNDS[key]
    given = {"base_model": "m", "learning_rate": 1e-3, "datasets": [{"path": "x"}]}
    assert check_values({**given, key: right}, file="x.yaml").ok
    errors = check_values({**given, key: wrong}, file="x.yaml").errors
    assert [(error.code, error.key) for error in errors] == [("bad-value", key)]


@pytest.mark.parametrize("key", ["base_model", "output_dir", "tokenizer_config", "attn_known_bad"])
def test_a_path_that_no_file_system_takes_is_a_bad_value(key: str) -> None:
    given = {"base_model": "m", "learning_rate": 1e-3, "datasets": [{"path": "x"}]}
    assert check_values({**given, key: "a/" + "x" * 255}, file="x.yaml").ok
    for path in ("x" * 256, "a/" * 2048, "a\0b"):
        errors = check_values({**given, key: path}, file="x.yaml").errors
        assert [(error.code, error.key) for error in errors] == [("bad-value", key)]


def test_a_path_below_nobody_s_home_is_refused() -> None:
    keys = {"base_model": "m", "output_dir": "~no-such-user/out"}
    with pytest.raises(AttnimgError, match="~no-such-user/out"):
        check_inputs(config(**keys), CPU)


def test_an_address_space_that_torch_fills_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in (resource.RLIM_INFINITY, 3 << 30):
        monkeypatch.setattr("resource.getrlimit", lambda _, limit=limit: (limit, limit))
        check_limits(config(), CPU)
    monkeypatch.setattr("resource.getrlimit", lambda _: ((3 << 30) - 1, resource.RLIM_INFINITY))
    with pytest.raises(AttnimgError, match="ulimit -v"):
        check_limits(config(), CPU)


def test_workers_whose_batches_do_not_fit_in_shared_memory_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keys = {"dataloader_num_workers": 4, "micro_batch_size": 8, "sequence_len": 8192}
    docker = SimpleNamespace(f_blocks=64 << 20, f_bfree=64 << 20, f_bavail=64 << 20, f_frsize=1)
    monkeypatch.setattr("os.statvfs", lambda _: docker)
    check_limits(config(**keys), CPU)
    docker.f_bavail = 8 << 20
    with pytest.raises(AttnimgError, match="/dev/shm") as caught:
        check_limits(config(**keys), CPU)
    assert caught.value.key == "dataloader_num_workers"
    check_limits(config(**{**keys, "dataloader_num_workers": 0}), CPU)
    docker.f_bavail = 14 << 20
    check_limits(config(**keys), CPU)
    with pytest.raises(AttnimgError, match="/dev/shm") as caught:
        check_limits(config(**{**keys, "dataloader_prefetch_factor": 4}), CPU)
    assert "4 batches" in caught.value.why


def test_the_checks_before_a_run_import_nothing_heavy() -> None:
    heavy = ["torch", "transformers", "trl", "accelerate", "bitsandbytes"]
    code = (
        "import sys, attnimg.train.check, attnimg.train.run; "
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
