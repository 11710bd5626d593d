"""Test that other names of keys are replaced, and refused where they contradict the key."""

from __future__ import annotations

from typing import Any

import pytest

from attnimg.config import check_values
from attnimg.config.other_names import (
    EMPTY_IS_UNSET,
    FALSE_IS_ZERO,
    OTHER_NAMES,
    ZERO_IS_UNSET,
)
from attnimg.config.schema import CheckResult, Config

VALUES = {"adam_eps": 1e-6, "bfloat16": True, "evaluation_strategy": "no", "gc_steps": 10,
          "model_config": {"rms_norm_eps": 1e-5}, "noisy_embedding_alpha": 5,
          "pretrain_multipack_buffer_size": 100,
          "type_of_model": "LlamaForCausalLM"}  # fmt: skip


def check(**keys: Any) -> CheckResult:
    values = {"base_model": "m", "learning_rate": 1e-4, "datasets": [{"path": "a"}], **keys}
    return check_values(values, file="x.yaml")


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_another_name_is_replaced(name: str) -> None:
    key = OTHER_NAMES[name]
    for keys in ({name: VALUES[name]}, {name: VALUES[name], key: VALUES[name]}):
        found = check(**keys)
        assert found.ok
        assert found.config is not None
        assert getattr(found.config, key) == VALUES[name]
    codes = [(warning.code, warning.key) for warning in found.warnings]
    assert codes == ([("done-otherwise", name)] if name == "adam_eps" else [])


@pytest.mark.parametrize(
    "keys",
    [
        {"adam_eps": 1e-6, "adam_epsilon": 1e-7},
        {"bfloat16": True, "bf16": False},
        {"evaluation_strategy": "epoch", "eval_strategy": "no", "val_set_size": 0.1},
        {"noisy_embedding_alpha": 5, "neftune_noise_alpha": 4},
        {"model_config": {"a": 1}, "overrides_of_model_config": {"a": 2}},
    ],
    ids=str,
)
def test_two_values_for_one_setting_are_refused(keys: dict[str, Any]) -> None:
    assert [(error.code, error.key) for error in check(**keys).errors] == [
        ("bad-value", next(iter(keys)))
    ]


@pytest.mark.parametrize("precision", ["full", "auto"])
def test_bfloat16_agrees_with_values_of_bf16(precision: str) -> None:
    found = check(bfloat16=True, bf16=precision)
    assert found.ok
    assert found.config is not None
    assert found.config.bf16 == ("full" if precision == "full" else True)
    assert check(bfloat16=False, bf16=True).ok


def test_a_wrong_value_is_an_error_of_its_own_key() -> None:
    for key in (*VALUES, "batch_size"):
        (error,) = check(**{key: ["much"]}).errors
        assert (error.code, error.key) == ("bad-value", key)


@pytest.mark.parametrize(
    ("keys", "steps"),
    [
        ({"batch_size": 8}, 8),
        ({"batch_size": 8, "micro_batch_size": 2}, 4),
        ({"batch_size": 4, "micro_batch_size": 4}, 1),
    ],
    ids=str,
)
def test_batch_size_sets_the_accumulation(keys: dict[str, Any], steps: int) -> None:
    found = check(**keys)
    assert found.config is not None
    assert (found.config.gradient_accumulation_steps, found.config.batch_size) == (steps, None)
    (warning,) = found.warnings
    assert (warning.code, warning.key) == ("done-otherwise", "batch_size")
    assert f"gradient_accumulation_steps: {steps}" in warning.do


@pytest.mark.parametrize(
    "keys",
    [
        {"batch_size": 6, "micro_batch_size": 4},
        {"batch_size": 2, "micro_batch_size": 4},
        {"batch_size": 4, "gradient_accumulation_steps": 4},
    ],
    ids=str,
)
def test_a_batch_size_that_does_not_fit_is_refused(keys: dict[str, Any]) -> None:
    assert [(error.code, error.key) for error in check(**keys).errors] == [
        ("bad-value", "batch_size")
    ]


@pytest.mark.parametrize("key", ["eval_strategy", "save_strategy", "evaluation_strategy"])
def test_an_unquoted_no_is_a_strategy(key: str) -> None:
    off, quoted = check(**{key: False}), check(**{key: "no"})
    assert off.ok
    assert off == quoted
    assert not check(**{key: True}).ok


UNSET = {
    **dict.fromkeys(sorted(EMPTY_IS_UNSET), ""),
    **dict.fromkeys(sorted(ZERO_IS_UNSET), 0),
    "tokens": {},
}


@pytest.mark.parametrize("key", UNSET)
def test_a_value_that_turns_a_key_off_in_axolotl_is_like_no_value(key: str) -> None:
    assert check(**{key: UNSET[key]}) == check()


@pytest.mark.parametrize("key", sorted(ZERO_IS_UNSET | FALSE_IS_ZERO))
def test_false_is_zero_for_a_number_that_it_turns_off(key: str) -> None:
    off, zero = check(**{key: False}), check(**{key: 0})
    assert off.ok
    assert off == zero
    assert [error.code for error in check(**{key: True}).errors] == ["bad-value"]


@pytest.mark.parametrize("key", ["name", "data_files", "ds_type", "text_column"])
def test_an_empty_text_in_a_dataset_entry_is_like_none(key: str) -> None:
    entry = {"path": "a", "type": "completion"}
    assert check(datasets=[{**entry, key: ""}]) == check(datasets=[entry])


def test_values_that_turn_nothing_off_are_refused() -> None:
    # axolotl trains with them, or raises, so that they are not the same as no value.
    for key in ("micro_batch_size", "sequence_len", "num_epochs", "logging_steps", "lora_r",
                "loss_watchdog_threshold", "embedding_lr"):  # fmt: skip
        assert [error.key for error in check(**{key: 0}).errors] == [key]
    for key in ("base_model", "output_dir", "optimizer", "attn_implementation"):
        assert [error.key for error in check(**{key: ""}).errors] == [key]
    assert Config.model_fields.keys() >= EMPTY_IS_UNSET | ZERO_IS_UNSET | FALSE_IS_ZERO
