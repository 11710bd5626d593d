"""When a run logs, evaluates and saves, in steps; and what a machine can't do."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest

from attnimg.backends import find_backend
from attnimg.config.schema import Config, Optimizer, Scheduler
from attnimg.context import build_context
from attnimg.errors import AttnimgError
from attnimg.facts import Arch, Machine
from attnimg.task import build_problem
from attnimg.train.arguments import Schedule, plan_steps, training_arguments
from attnimg.train.check import check_limits

CPU = Machine(arch=Arch(name="cpu", vendor="cpu"), gpu="cpu", packages={})
T4 = Machine(arch=Arch(name="sm_75", vendor="nvidia", capability=(7, 5)), gpu="Tesla T4",
             packages={})  # fmt: skip
H100 = Machine(arch=Arch(name="sm_90", vendor="nvidia", capability=(9, 0)), gpu="H100")


def config(**keys: Any) -> Config:
    return Config.model_validate({"base_model": "m", "learning_rate": 1e-4, **keys})


def steps(**keys: Any) -> Schedule:
    return plan_steps(config(**keys), rows=100, world=1, validation=True)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        pytest.param({}, (100, 100), id="a row a step"),
        pytest.param({"micro_batch_size": 3}, (34, 34), id="the last batch may be short"),
        pytest.param({"micro_batch_size": 3, "gradient_accumulation_steps": 4}, (9, 9),
                     id="the last accumulation may be short"),
        pytest.param({"num_epochs": 2.5}, (100, 250), id="epochs may be fractions"),
        pytest.param({"max_steps": 7, "num_epochs": 3}, (100, 7), id="max_steps beats num_epochs"),
        pytest.param({"gradient_accumulation_steps": 500}, (1, 1), id="never less than one step"),
    ],
)  # fmt: skip
def test_steps_are_counted(keys: dict[str, Any], expected: tuple[int, int]) -> None:
    found = steps(**keys)
    assert (found.steps_per_epoch, found.total_steps) == expected


@pytest.mark.parametrize(
    ("keys", "evaluate", "save"),
    [
        pytest.param({}, ("epoch", None), ("epoch", None), id="once an epoch by default"),
        pytest.param({"evals_per_epoch": 4, "saves_per_epoch": 3}, ("steps", 25), ("steps", 34),
                     id="times an epoch become steps, rounded up"),
        pytest.param({"evals_per_epoch": 300}, ("steps", 1), ("epoch", None),
                     id="more often than steps is every step"),
        pytest.param({"eval_steps": 0.25, "save_steps": 0.5, "max_steps": 10}, ("steps", 3),
                     ("steps", 5), id="a share of the run, rounded up"),
        pytest.param({"eval_steps": 10, "save_steps": 20}, ("steps", 10), ("steps", 20),
                     id="steps stay steps"),
        pytest.param({"eval_strategy": "no", "save_strategy": "no"}, ("no", None), ("no", None),
                     id="no is no"),
    ],
)  # fmt: skip
def test_intervals(
    keys: dict[str, Any], evaluate: tuple[str, int | None], save: tuple[str, int | None]
) -> None:
    found = steps(**keys)
    assert (found.eval_strategy, found.eval_steps) == evaluate
    assert (found.save_strategy, found.save_steps) == save


def test_nothing_is_evaluated_without_validation() -> None:
    found = plan_steps(config(), rows=10, world=1, validation=False)
    assert (found.eval_strategy, found.eval_steps) == ("no", None)


@pytest.mark.parametrize(
    ("keys", "machine", "key", "code"),
    [
        pytest.param({"optimizer": "paged_adamw_8bit"}, CPU, "optimizer", "bad-value",
                     id="a paged optimizer on a CPU"),
        pytest.param({"optimizer": "adamw_torch_8bit"}, CPU, "optimizer", "not-installed",
                     id="torchao's optimizer without torchao"),
        pytest.param({"tf32": True}, T4, "tf32", "bad-value", id="tf32 on a T4"),
        pytest.param({"fsdp": ["full_shard"]}, CPU, "fsdp", "fsdp-needs-gpu", id="FSDP on a CPU"),
        pytest.param({"fsdp_config": {"version": 2}}, CPU, "fsdp", "fsdp-needs-gpu",
                     id="FSDP's config alone on a CPU"),
        pytest.param({"deepspeed": "z3.json"}, CPU, "deepspeed", "deepspeed-needs-gpu",
                     id="DeepSpeed on a CPU"),
        pytest.param({"deepspeed": "z3.json"}, T4, "deepspeed", "not-installed",
                     id="DeepSpeed that is not installed"),
    ],
)  # fmt: skip
def test_what_a_machine_lacks_is_refused(
    keys: dict[str, Any], machine: Machine, key: str, code: str
) -> None:
    with pytest.raises(AttnimgError) as caught:
        check_limits(config(**keys), machine)
    assert (caught.value.key, caught.value.code, caught.value.exit_code) == (key, code, 2)
    assert caught.value.why
    assert caught.value.do


def arguments(tmp_path: Path, machine: Machine = CPU, **keys: Any) -> dict[str, Any]:
    values = config(output_dir=str(tmp_path), **keys)
    sdpa = find_backend("sdpa")
    assert sdpa is not None
    task = build_problem(values, model=None, dropout=0.0, arch=machine.arch)
    return training_arguments(
        values,
        machine=machine,
        context=build_context(task, sdpa),
        schedule=steps(),
        sparse=False,
    )


@pytest.mark.parametrize(
    ("keys", "machine", "expected"),
    [
        pytest.param({"cosine_min_lr_ratio": 0.1}, CPU,
                     {"lr_scheduler_type": "cosine_with_min_lr",
                      "lr_scheduler_kwargs": {"min_lr_rate": 0.1}}, id="a cosine with a floor"),
        pytest.param({"warmup_ratio": 0.1}, CPU, {"warmup_steps": 0.1}, id="a share of warmup"),
        pytest.param({"warmup_steps": 10}, CPU, {"warmup_steps": 10.0}, id="steps of warmup"),
        pytest.param({"adam_beta1": 0, "adam_beta2": 0.5, "adam_epsilon": 1e-6}, CPU,
                     {"adam_beta1": 0.0, "adam_beta2": 0.5, "adam_epsilon": 1e-6},
                     id="Adam without momentum"),
        pytest.param({"optimizer": "paged_adamw"}, H100, {"optim": "paged_adamw_32bit"},
                     id="an optimizer by its other name"),
        pytest.param({"tf32": "auto"}, H100, {"tf32": True}, id="tf32 auto on an H100"),
        pytest.param({"tf32": "auto"}, T4, {"tf32": None}, id="tf32 auto on a T4"),
        pytest.param({"torch_compile": "auto"}, H100, {"torch_compile": True},
                     id="torch_compile auto on a GPU"),
        pytest.param({"torch_compile": "auto"}, CPU, {"torch_compile": False},
                     id="torch_compile auto on a CPU"),
        pytest.param({}, CPU, {"gradient_checkpointing": False, "bf16": False, "use_cpu": True,
                               "report_to": "none"}, id="TRL's defaults are not ours"),
        pytest.param({"dataloader_prefetch_factor": 4, "dataloader_num_workers": 2}, CPU,
                     {"dataloader_prefetch_factor": 4}, id="batches in advance"),
        pytest.param({"dataloader_prefetch_factor": 4}, CPU,
                     {"dataloader_prefetch_factor": None}, id="no workers for them"),
        pytest.param({"fsdp_config": {"a": 1}, "fsdp_version": 2}, H100,
                     {"fsdp": True, "fsdp_config": {"a": 1, "version": 2}}, id="FSDP goes through"),
    ],
)  # fmt: skip
def test_keys_become_arguments(
    tmp_path: Path, keys: dict[str, Any], machine: Machine, expected: dict[str, Any]
) -> None:
    found = arguments(tmp_path, machine, **keys)
    assert {name: found[name] for name in expected} == expected


def test_trl_takes_the_arguments(tmp_path: Path) -> None:
    from trl import SFTConfig

    SFTConfig(**arguments(tmp_path, val_set_size=0.1, adam_beta1=0.8, ddp_timeout=60))


def test_transformers_knows_every_optimizer_and_schedule(tmp_path: Path) -> None:
    from transformers.trainer_utils import SchedulerType
    from transformers.training_args import OptimizerNames

    for name in get_args(Optimizer):
        OptimizerNames(arguments(tmp_path, H100, optimizer=name)["optim"])
    for name in get_args(Scheduler):
        SchedulerType(arguments(tmp_path, H100, lr_scheduler=name)["lr_scheduler_type"])
