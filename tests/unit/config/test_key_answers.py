"""Test the answers to axolotl's keys: none is unknown, and each answer is the one of its table."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from attnimg.config import check_values
from attnimg.config.attention import LEGACY
from attnimg.config.keys import (
    COMPUTED,
    allowed_options,
    allowed_values,
    dataset_key_answers,
    key_answers,
    plugin_answers,
)
from attnimg.config.other_names import OTHER_NAMES
from attnimg.config.schema import Config, DatasetSpec

ROOT = Path(__file__).parents[3]
RECORD = json.loads((ROOT / "docs/measured/axolotl_keys.json").read_text(encoding="utf-8"))
RUN: dict[str, Any] = {
    "base_model": "org/model",
    "learning_rate": 1e-4,
    "datasets": [{"path": "data.jsonl", "type": "alpaca"}],
}
LIGER = "axolotl.integrations.liger.LigerPlugin"
ACCEPTED = sorted(key for key, found in key_answers().items() if found.answer != "refused")
# A key that changes what is learned must never be a hint: these words of axolotl's schema do.
LEARNED = (
    "learning_rate", "lr", "loss", "scheduler", "warmup", "epochs", "alpha", "rank", "dropout",
    "seed", "weight_decay", "beta", "mask", "template", "neftune", "pose", "quant", "fp8", "nvfp4",
)  # fmt: skip


def answers(**keys: Any) -> tuple[list[str], list[str]]:
    """Return the codes of the errors and of the warnings for a run with some keys."""
    found = check_values({**RUN, **keys}, file="c.yaml")
    return [error.code for error in found.errors], [one.code for one in found.warnings]


def test_every_key_of_axolotl_has_an_answer() -> None:
    known = (
        Config.model_fields.keys()
        | key_answers().keys()
        | LEGACY.keys()
        | {*COMPUTED, *OTHER_NAMES}
    )
    assert {*RECORD["keys"], *RECORD["examples_keys"]} - known == {"plugins"}
    entries = DatasetSpec.model_fields.keys() | dataset_key_answers().keys()
    assert {*RECORD["dataset_keys"], *RECORD["examples_dataset_keys"]} <= entries


def test_no_key_has_two_answers() -> None:
    assert not DatasetSpec.model_fields.keys() & dataset_key_answers().keys()
    assert not LEGACY.keys() & key_answers().keys()


@pytest.mark.parametrize("key", ACCEPTED)
def test_an_accepted_key_is_a_warning_that_says_why_and_what_to_do(key: str) -> None:
    value = (allowed_values(key) or (True,))[0]
    if options := allowed_options(key):
        value = {options[0]: True}
    found = check_values({**RUN, "micro_batch_size": 2, key: value}, file="c.yaml")
    assert found.ok
    if True in key_answers()[key].accepts:
        assert not found.warnings
        return
    (warning,) = found.warnings
    assert (warning.code, warning.key) == (key_answers()[key].answer, key)
    assert key in warning.what
    assert key_answers()[key].reason in warning.what
    assert warning.do == key_answers()[key].do


@pytest.mark.parametrize(
    ("key", "value", "codes"),
    [
        ("expert_backend", "nonsense", (["bad-value"], [])),
        ("expert_backend", "ScatterMoE", ([], ["hint-not-used"])),
        ("expert_backend", "builtin", ([], [])),
        ("moe_grouped_backend", "dequant", (["bad-value"], [])),
        ("moe_grouped_backend", "auto", ([], ["hint-not-used"])),
        ("torch_compile_options", {"emulate_precision_casts": True}, (["bad-value"], [])),
        ("torch_compile_options", ["shape_padding"], (["bad-value"], [])),
        ("torch_compile_options", {"shape_padding": True}, ([], ["hint-not-used"])),
        ("torch_compile_options", {}, ([], [])),
        ("eval_max_new_tokens", 128, ([], ["hint-not-used"])),
        ("generation_temperature", 0.7, ([], ["hint-not-used"])),
        ("generate_samples", True, (["unsupported-key"], [])),
    ],
)
def test_a_value_that_axolotl_refuses_is_refused(
    key: str, value: object, codes: tuple[list[str], list[str]]
) -> None:
    assert answers(**{key: value}) == codes


@pytest.mark.parametrize(
    ("keys", "contradicting"),
    [
        ({"expert_backend": "sonicmoe", "use_scattermoe": True}, ["use_scattermoe"]),
        ({"expert_backend": "ScatterMoE", "use_sonicmoe": True}, ["use_sonicmoe"]),
        ({"expert_backend": "eager", "use_scattermoe": True, "use_sonicmoe": True},
         ["use_scattermoe", "use_sonicmoe"]),
        ({"use_scattermoe": True, "use_sonicmoe": 1}, ["use_sonicmoe"]),
        ({"expert_backend": "ScatterMoE", "use_scattermoe": True, "use_sonicmoe": False}, []),
        ({"expert_backend": "sonicmoe", "use_scattermoe": False}, []),
        ({"expert_backend": None, "use_scattermoe": True, "use_sonicmoe": None}, []),
        ({"expert_backend": "nonsense", "use_scattermoe": True}, ["expert_backend"]),
    ],
)  # fmt: skip
def test_two_kernels_for_the_experts_contradict_each_other_as_in_axolotl(
    keys: dict[str, Any], contradicting: list[str]
) -> None:
    errors = check_values({**RUN, **keys}, file="c.yaml").errors
    assert [(error.code, error.key) for error in errors] == [
        ("bad-value", key) for key in contradicting
    ]


@pytest.mark.parametrize(
    ("keys", "named", "absent"),
    [
        ({}, ("gradient_checkpointing: true", "sequence_len", "qlora"), ("micro_batch_size",)),
        ({"micro_batch_size": 4, "gradient_checkpointing": True},
         ("micro_batch_size", "adapter: qlora"), ("gradient_checkpointing", "sequence_len")),
        ({"adapter": "qlora", "gradient_checkpointing": True}, ("a smaller sequence_len",),
         ("gradient_checkpointing", "qlora", "micro_batch_size")),
    ],
)  # fmt: skip
def test_a_hint_advises_nothing_that_the_config_has(
    keys: dict[str, Any], named: tuple[str, ...], absent: tuple[str, ...]
) -> None:
    (warning,) = check_values({**RUN, **keys, "tiled_mlp": True}, file="c.yaml").warnings
    assert all(text in warning.do for text in named)
    assert not any(text in warning.do for text in absent)


def test_what_a_hint_advises_is_a_valid_setting() -> None:
    advice = {found.do for found in (*key_answers().values(), *plugin_answers().values())
              if found.answer == "hint-not-used"}  # fmt: skip
    settings = {pair for text in advice for pair in re.findall(r"(\w+): (\w+)", text)}
    assert {"gradient_checkpointing", "adapter"} <= {key for key, _ in settings}
    for key, value in settings:
        assert answers(**{key: yaml.safe_load(value)})[0] == [], key


@pytest.mark.parametrize("off", [None, False, 0, "", []])
def test_a_key_that_is_turned_off_is_accepted_in_silence(off: object) -> None:
    for key in ("tiled_mlp", "cut_cross_entropy", "use_eaft", "plugins"):
        assert answers(**{key: off}) == ([], []), key


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("save_safetensors", False), ("peft_autocast_adapter_dtype", False),
        ("peft_ensure_weight_tying", False), ("ddp_broadcast_buffers", False),
    ],
)  # fmt: skip
def test_a_value_that_turns_other_keys_off_is_refused_where_it_has_a_meaning(
    key: str, value: object
) -> None:
    assert answers(**{key: value}) == (["unsupported-key"], [])
    assert answers(**{key: None}) == ([], [])
    if key != "peft_ensure_weight_tying":
        assert answers(**{key: True}) == ([], [])


def test_false_for_a_tokenizer_that_is_always_fast_is_not_silent() -> None:
    assert answers(tokenizer_use_fast=False) == ([], ["done-otherwise"])
    assert answers(selective_checkpointing={}) == ([], ["hint-not-used"])


def test_values_with_a_meaning_are_of_known_keys_and_not_also_without_effect() -> None:
    table = tomllib.loads((ROOT / "attnimg/data/keys.toml").read_text(encoding="utf-8"))
    assert table["means"].keys() <= key_answers().keys()
    assert not [
        key
        for key, found in key_answers().items()
        if set(map(repr, found.means)) & set(map(repr, found.accepts))
    ]


# They change which documents are in a step, how many steps there are, or the precision of adapters.
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sample_packing_group_size", 1000), ("sample_packing_bin_size", 8),
        ("sample_packing_eff_est", 0.9), ("sample_packing_seq_len_multiplier", 4),
        ("total_num_tokens", 100000), ("sample_packing_sequentially", True),
        ("curriculum_sampling", True), ("multipack_real_batches", True),
        ("dataloader_drop_last", True), ("fp32_norms", True),
    ],
)  # fmt: skip
def test_a_key_that_changes_the_data_or_precision_of_a_step_is_refused(
    key: str, value: object
) -> None:
    assert answers(**{key: value}) == (["unsupported-key"], [])
    assert answers(**{key: None}) == ([], [])


def test_the_dropout_that_axolotls_fused_mlp_leaves_out_is_named() -> None:
    (warning,) = check_values({**RUN, "lora_mlp_kernel": True}, file="c.yaml").warnings
    assert "lora_dropout acts on down_proj too" in warning.what


def test_no_hint_is_named_like_a_key_that_changes_what_is_learned() -> None:
    hints = [key for key, found in key_answers().items() if found.answer == "hint-not-used"]
    parts = {key: set(key.split("_")) for key in hints}
    assert not {key for key, words in parts.items() if words & set(LEARNED)}


def test_each_plugin_has_its_own_answer() -> None:
    expected: dict[str, tuple[list[str], list[str]]] = {
        "done-otherwise": ([], ["done-otherwise"]),
        "hint-not-used": ([], ["hint-not-used"]),
        "refused": (["unsupported-key"], []),
    }
    for name, found in plugin_answers().items():
        assert answers(plugins=[name]) == expected[found.answer], name
    assert answers(plugins=LIGER) == ([], ["done-otherwise"])
    assert answers(plugins=[LIGER, LIGER]) == ([], ["done-otherwise"])


@pytest.mark.parametrize("value", [{"a": 1}, [1], [None], 3, [[LIGER]]])
def test_plugins_that_are_no_names_are_refused(value: object) -> None:
    assert answers(plugins=value) == (["bad-value"], [])


def test_a_plugin_that_nobody_knows_is_refused_by_name() -> None:
    found = check_values({**RUN, "plugins": [LIGER, "my.Plugin"]}, file="c.yaml")
    ((error,), (warning,)) = found.errors, found.warnings
    assert (error.code, error.key) == ("unsupported-key", "plugins")
    assert "my.Plugin" in error.what
    assert LIGER in warning.what


@pytest.mark.parametrize("key", ["step_separator", "train_on_last_step_only"])
def test_keys_of_axolotls_other_datasets_are_not_called_unknown(key: str) -> None:
    entry = {"path": "data.jsonl", "type": "alpaca", key: "x"}
    assert answers(datasets=[entry]) == (["unsupported-key"], [])
