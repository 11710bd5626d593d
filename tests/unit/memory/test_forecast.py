"""Check the forecast of a run's memory: its parts, what fits, and the changes that make it fit."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import pytest

from attnimg.config import check_values
from attnimg.config.schema import Config, Optimizer
from attnimg.facts import Arch, Machine
from attnimg.memory.architecture import Architecture, read_architecture
from attnimg.memory.forecast import Forecast
from attnimg.memory.parts import OPTIMIZERS, optimizer_bytes, weight_bytes
from attnimg.memory.report import (
    MemoryReport,
    memory_dict,
    memory_line,
    memory_warning,
    report_memory,
)
from attnimg.memory.settings import RunSettings, read_settings
from attnimg.task import build_task

# The sizes of Llama 3.1 8B, as copies of its config.json have them; the original asks for a login
# (2026-11-27).
LLAMA_8B: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "vocab_size": 128256, "max_position_embeddings": 131072, "tie_word_embeddings": False,
}  # fmt: skip
KEYS: dict[str, Any] = {
    "base_model": "model", "datasets": [{"path": "d.jsonl", "type": "completion"}],
    "learning_rate": 1e-4, "sequence_len": 4096, "micro_batch_size": 4, "sample_packing": True,
}  # fmt: skip
MIXTRAL: dict[str, Any] = LLAMA_8B | {
    "model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2,
}  # fmt: skip
H100 = Machine(
    arch=Arch(name="sm_90", vendor="nvidia", capability=(9, 0)), gpu="H100", memory_bytes=80 * 10**9
)


def report(raw: Mapping[str, Any] = LLAMA_8B, machine: Machine = H100, **keys: Any) -> MemoryReport:
    values = KEYS | keys
    config = Config.model_validate(values)
    task = build_task(config, raw, machine)

    def accepts(changes: Mapping[str, Any]) -> bool:
        return check_values({**values, **changes}, file="run", on=machine.arch).ok

    return report_memory(
        config, raw, problem=task.problem, plan=task.choose(), machine=machine, is_valid=accepts
    )


def settings(**keys: Any) -> tuple[Architecture, RunSettings]:
    config = Config.model_validate(KEYS | keys)
    task = build_task(config, LLAMA_8B, H100)
    chosen = task.choose().chosen
    assert chosen is not None
    assert task.problem.model is not None
    model = read_architecture(LLAMA_8B, task.problem.model)
    run = read_settings(config, task.problem, H100, chosen.backend, vocabulary=32000)
    assert isinstance(model, Architecture)
    assert isinstance(run, RunSettings)
    return model, run


def test_every_optimizer_of_the_config_has_its_states() -> None:
    assert set(OPTIMIZERS) == set(get_args(Optimizer))


@pytest.mark.parametrize(
    ("optimizer", "least", "most"),
    [("adamw_torch_fused", 3.99, 4.01), ("adamw_8bit", 2.0, 2.6), ("sgd", 0, 0),
     ("lion_32bit", 3.99, 4.01), ("adafactor", 0.0, 0.01), ("paged_adamw_32bit", 8, 8)],
)  # fmt: skip
def test_an_optimizer_has_its_bytes_for_each_weight(
    optimizer: str, least: float, most: float
) -> None:
    model, run = settings(optimizer=optimizer)
    each = optimizer_bytes(model, run).total / model.parameters
    assert least <= each <= most


def test_weights_in_4_bits_have_scales_and_leave_the_embeddings_as_they_are() -> None:
    model, run = settings(adapter="qlora", load_in_4bit=True, lora_target_modules=["q_proj"])
    adapter = 32 * 8 * (4096 + 4096) * 4
    others = 2 * (2 * model.embeddings + model.small_weights)
    quantized = weight_bytes(model, run) - adapter - others
    # 4 bits, and for 64 of them a scale of 8 bits, and for 256 scales one of 32 bits.
    expected = model.linear_weights * (0.5 + 1 / 64 + 4 / 64 / 256)
    assert quantized == pytest.approx(expected, rel=1e-6)


def test_a_run_that_is_too_large_gets_three_changes_that_help() -> None:
    found = report()
    assert found.forecast.fits == "no"
    assert len(found.changes) == 3
    for change in found.changes:
        values = KEYS | dict(change.values)
        assert check_values(values, file="run", on=H100.arch).ok
        after = report(**change.values).forecast
        assert after.fits == "yes"
        assert after.high == change.bytes
    # The changes with the least effect come first, and none contains another.
    assert found.changes[0].values == {"gradient_checkpointing": True, "optimizer": "adamw_8bit"}
    warning = memory_warning(found)
    assert warning is not None
    assert "set gradient_checkpointing: true and optimizer: adamw_8bit" in warning.do


def test_smaller_batches_keep_the_rows_of_a_step() -> None:
    small = Machine(arch=H100.arch, gpu="H100", memory_bytes=30 * 10**9)
    found = report(machine=small, adapter="lora", lora_target_linear=True, micro_batch_size=16,
                   gradient_accumulation_steps=3, gradient_checkpointing=True)  # fmt: skip
    batches = [change.values for change in found.changes if "micro_batch_size" in change.values]
    assert batches
    for values in batches:
        assert values["micro_batch_size"] * values["gradient_accumulation_steps"] == 48


def test_a_run_that_fits_gets_no_warning_and_no_changes() -> None:
    found = report(adapter="lora", lora_target_linear=True, gradient_checkpointing=True)
    assert found.forecast.fits == "yes"
    assert memory_warning(found) is None
    assert found.changes == ()
    assert "it fits" in memory_line(found)


def test_no_change_contains_another_one() -> None:
    small = Machine(arch=H100.arch, gpu="L4", memory_bytes=24 * 10**9)
    found = report(machine=small, adapter="lora", lora_target_linear=True, lora_r=16,
                   micro_batch_size=2)  # fmt: skip
    sets = [change.values.items() for change in found.changes]
    assert len(sets) == 3
    assert not any(one < other for one in sets for other in sets)


def test_between_the_ends_of_the_range_a_run_may_fit_and_is_not_warned_about() -> None:
    middle = report().forecast
    between = Machine(arch=H100.arch, gpu="H100", memory_bytes=(middle.low + middle.high) // 2)
    found = report(machine=between)
    assert found.forecast.fits == "maybe"
    assert memory_warning(found) is None
    assert found.changes


def test_without_such_changes_the_gpus_that_hold_the_run_are_named() -> None:
    small = Machine(arch=H100.arch, gpu="H100", memory_bytes=2 * 10**9)
    found = report(machine=small, sequence_len=128, micro_batch_size=1,
                   adapter="qlora", load_in_4bit=True, gradient_checkpointing=True)  # fmt: skip
    assert found.forecast.fits == "no"
    assert found.changes == ()
    assert found.gpus
    warning = memory_warning(found)
    assert warning is not None
    assert found.gpus[0] in warning.do


@pytest.mark.parametrize(
    ("raw", "keys", "why"),
    [
        ({"model_type": "gpt2"}, {}, "gpt2"),
        (LLAMA_8B, {"fsdp": ["full_shard"]}, "fsdp"),
        (LLAMA_8B, {"rl": "dpo"}, "know rl"),
        (LLAMA_8B, {"torch_compile": True}, "torch.compile"),
        (LLAMA_8B, {"unfrozen_parameters": ["lm_head"]}, "unfrozen_parameters"),
        (MIXTRAL, {"adapter": "lora", "lora_target_linear": True}, "experts"),
        (LLAMA_8B, {"adapter": "lora", "lora_target_modules": ["c_attn"]}, "matches no layer"),
        (LLAMA_8B, {"adapter": "lora", "lora_target_modules": r".*layers\.1\..*q_proj"}, "single"),
        (LLAMA_8B | {"quantization_config": {"quant_method": "fp8"}}, {}, "quantized"),
    ],
    ids=[
        "type",
        "fsdp",
        "preferences",
        "compile",
        "frozen",
        "experts",
        "typo",
        "one layer",
        "quantized",
    ],
)
def test_what_is_not_understood_has_a_reason_instead_of_a_number(
    raw: dict[str, Any], keys: dict[str, Any], why: str
) -> None:
    found = report(raw, **keys)
    assert why in found.forecast.why
    said = memory_dict(found)
    assert said["parts"] is said["low"] is said["high"] is said["fits"] is None
    assert memory_warning(found) is None


def test_an_adapter_on_the_attention_of_a_model_with_experts_is_known() -> None:
    found = report(MIXTRAL, adapter="lora", lora_target_modules=["q_proj", "v_proj"])
    assert found.forecast.parts["weights"] > 46e9 * 2


def test_experts_in_16_bits_are_not_forecast_on_a_cpu() -> None:
    cpu = Machine(arch=Arch(name="cpu", vendor="cpu"), gpu="cpu", memory_bytes=64 * 10**9)
    assert "16 bits" in report(MIXTRAL, machine=cpu, bf16=True).forecast.why
    assert report(MIXTRAL, machine=cpu, bf16=False).forecast.parts


def test_files_with_other_weights_than_config_json_describes_give_no_number() -> None:
    config = Config.model_validate(KEYS)
    task = build_task(config, LLAMA_8B, H100)
    plan = task.choose()

    def forecast(stored: int) -> Forecast:
        return report_memory(
            config, LLAMA_8B, problem=task.problem, plan=plan, machine=H100,
            is_valid=lambda _: True, stored_weights=stored,
        ).forecast  # fmt: skip

    assert forecast(8_030_261_248).parts
    assert "8,030,261,248" in forecast(2_000_000_000).why


def test_explain_prints_the_forecast_for_a_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from attnimg.cli.explain import explain

    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    values = KEYS | {"base_model": str(tmp_path)}
    run = tmp_path / "run.yaml"
    run.write_text(json.dumps(values))
    with pytest.raises(SystemExit) as ended:
        explain(str(run), [], "h100", None, True)
    assert ended.value.code == 0  # a warning, not an error
    said = json.loads(capsys.readouterr().out)
    memory = said["memory"]
    assert memory["fits"] == "no"
    assert memory["available"] == 80 * 10**9
    middle = sum(memory["parts"].values())
    assert memory["low"] < middle < memory["high"]
    assert "memory-too-small" in {warning["code"] for warning in said["warnings"]}
    # Each change, applied literally, makes the run fit.
    for change in memory["changes"]:
        with pytest.raises(SystemExit):
            explain(str(run), [f"{key}={json.dumps(value)}" for key, value in
                               change["set"].items()], "h100", None, True)  # fmt: skip
        after = json.loads(capsys.readouterr().out)
        assert after["memory"]["fits"] == "yes"
        assert not math.isnan(after["memory"]["high"])
        assert not after["errors"]


class Lines:
    """Collect what a run reports."""

    def __init__(self) -> None:
        self.logged: list[str] = []
        self.warned: list[str] = []

    def log(self, text: str) -> None:
        self.logged.append(text)

    def warn(self, warnings: Any) -> None:
        self.warned += [warning.code for warning in warnings]


@pytest.mark.parametrize(
    ("memory_gb", "warned"), [(20, ["memory-too-small"]), (900, [])], ids=["small", "large"]
)
def test_train_prints_one_line_and_warns_where_the_run_does_not_fit(
    tmp_path: Path, memory_gb: int, warned: list[str]
) -> None:
    from attnimg.train.run import _forecast_memory

    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    config = Config.model_validate(KEYS | {"base_model": str(tmp_path)})
    machine = Machine(arch=H100.arch, gpu="H100", memory_bytes=memory_gb * 10**9)
    task = build_task(config, LLAMA_8B, machine)
    found: Any = Lines()
    _forecast_memory(config, task, task.choose(), found)
    assert len(found.logged) == 1
    assert found.logged[0].startswith("memory: ")
    assert found.warned == warned
