"""Test which values of preference training are refused, and that right ones are accepted."""

from __future__ import annotations

from typing import Any

import pytest

from attnimg.config import check_values
from attnimg.config.schema import preference_types
from attnimg.config.without_effect import keys_without_effect

PAIRS = {"path": "a.jsonl", "type": "chatml.intel"}
DPO, KTO = {"rl": "dpo"}, {"rl": "kto", "micro_batch_size": 2}
ORPO = {"rl": "orpo", "datasets": [{"path": "a.jsonl", "type": "chat_template.argilla"}]}

# What is wrong, and the code and the key of its only error.
WRONG: dict[str, tuple[dict[str, Any], str, str]] = {
    "rewards": ({"rl": "grpo", "datasets": [{"path": "a", "type": "completion"}]},
                "unsupported-key", "rl"),
    "capitals": ({"rl": "DPO", "datasets": [{"path": "a", "type": "completion"}]},
                 "unsupported-key", "rl"),
    "a beta without rl": ({"rl_beta": 0.1, "datasets": [{"path": "a", "type": "completion"}]},
                          "bad-value", "rl_beta"),
    "losses of dpo for ipo": ({"rl": "ipo", "dpo_loss_type": ["hinge"]},
                              "bad-value", "dpo_loss_type"),
    "an unknown loss": (DPO | {"dpo_loss_type": ["sigmoids"]}, "bad-value", "dpo_loss_type"),
    "two weights of one loss": (DPO | {"dpo_loss_type": ["hinge"], "dpo_loss_weights": [1, 2]},
                                "bad-value", "dpo_loss_weights"),
    "smoothing of sigmoid": (DPO | {"dpo_label_smoothing": 0.1},
                             "bad-value", "dpo_label_smoothing"),
    "a beta of 0": (DPO | {"rl_beta": 0}, "bad-value", "rl_beta"),
    "weights of kto for dpo": (DPO | {"kto_desirable_weight": 2}, "bad-value",
                               "kto_desirable_weight"),
    "two weights of orpo": (ORPO | {"orpo_alpha": 0.1, "rl_beta": 0.2}, "bad-value", "orpo_alpha"),
    "one row of kto": ({"rl": "kto"}, "bad-value", "micro_batch_size"),
    "one row of kto evaluated": (KTO | {"eval_batch_size": 1, "val_set_size": 0.1},
                                 "bad-value", "eval_batch_size"),
    "loss on prompts": (DPO | {"train_on_inputs": True}, "bad-value", "train_on_inputs"),
    "shards of weights": (DPO | {"deepspeed": "zero2.json"}, "bad-value", "deepspeed"),
    "labels for dpo": (DPO | {"datasets": [PAIRS | {"type": "chatml.argilla"}]},
                       "unsupported-key", "datasets[0].type"),
    "pairs for kto": (KTO | {"datasets": [PAIRS | {"type": "chat_template.default"}]},
                      "unsupported-key", "datasets[0].type"),
    "an unread column": (DPO | {"datasets": [PAIRS | {"field_chosen": "x"}]},
                         "bad-value", "datasets[0].field_chosen"),
    "a column of kto for dpo": (
        DPO | {"datasets": [{"path": "a", "type": {"field_label": "x"}}]},
        "bad-value", "datasets[0].type.field_label"),
    "a name that is not filled": (
        DPO | {"datasets": [{"path": "a", "type": {"chosen_format": "{answer}"}}]},
        "bad-value", "datasets[0].type.chosen_format"),
    "pairs without rl": ({}, "unsupported-key", "datasets[0].type"),
    "an older beta": (DPO | {"dpo_beta": 0.1}, "unsupported-key", "dpo_beta"),
}  # fmt: skip

RIGHT: dict[str, dict[str, Any]] = {
    "dpo": DPO | {"rl_beta": 0.2},
    "several losses": DPO | {"dpo_loss_type": ["sigmoid", "sft"], "dpo_loss_weights": [1, 0.5]},
    "smoothing of robust": DPO | {"dpo_loss_type": ["robust"], "dpo_label_smoothing": 0.1},
    "no smoothing": DPO | {"dpo_label_smoothing": 0},
    "weighted pairs": DPO | {"dpo_use_weighting": True},
    "ipo": {"rl": "ipo"},
    "kto": KTO | {"kto_desirable_weight": 0.2, "kto_undesirable_weight": 1},
    "orpo": ORPO | {"orpo_alpha": 0.1},
    "no type": DPO | {"datasets": [{"path": "a"}]},
    "a mapping": DPO | {"datasets": [{"path": "a", "type": {
        "field_system": "s", "prompt_format": "{system} {prompt}", "field_chosen": "good"}}]},
    "a mapping of one column": DPO | {"datasets": [{"path": "a", "type": {"field_system": "s"}}]},
    "columns of messages": DPO | {"chat_template": "chatml", "datasets": [
        {"path": "a", "type": "chat_template.default", "field_messages": "talk",
         "field_chosen": "good", "field_rejected": "bad", "roles": {"user": ["asker"]},
         "message_property_mappings": {"role": "from", "content": "value"}}]},
    "no rl": {"rl": False, "datasets": [{"path": "a", "type": "completion"}]},
    "an adapter, evaluated": DPO | {"adapter": "qlora", "val_set_size": 0.1,
                                    "excess_length_strategy": "truncate",
                                    "gradient_checkpointing": True},
}  # fmt: skip


def check(given: dict[str, Any]) -> Any:
    values = {"base_model": "m", "learning_rate": 1e-4, "datasets": [PAIRS], **given}
    return check_values(values, file="x.yaml")


@pytest.mark.parametrize("name", WRONG)
def test_wrong_values_are_refused(name: str) -> None:
    given, code, key = WRONG[name]
    assert [(error.code, error.key) for error in check(given).errors] == [(code, key)]


@pytest.mark.parametrize("name", RIGHT)
def test_right_values_are_accepted(name: str) -> None:
    assert check(RIGHT[name]).errors == ()


@pytest.mark.parametrize("rl", ["dpo", "ipo", "orpo", "kto"])
def test_every_type_of_a_method_is_accepted(rl: str) -> None:
    for type_ in preference_types(rl):
        given = {"rl": rl, "micro_batch_size": 2, "datasets": [{"path": "a", "type": type_}]}
        assert check(given).errors == (), type_


def test_hints_are_accepted_with_a_warning() -> None:
    hints = {"precompute_ref_log_probs": True, "dpo_padding_free": True}
    found = check(DPO | hints | {"dpo_use_liger_kernel": True})
    assert found.errors == ()
    assert {warning.key: warning.code for warning in found.warnings} == {
        **dict.fromkeys(hints, "hint-not-used"), "dpo_use_liger_kernel": "done-otherwise"
    }  # fmt: skip


def test_what_has_no_effect_is_said() -> None:
    found = check(DPO | {"adapter": "lora", "lora_dropout": 0.1, "dataset_num_proc": 2})
    said = " ".join(keys_without_effect(found.config))
    assert "lora_dropout" in said
    assert "dataset_num_proc" in said
    assert not keys_without_effect(check(DPO).config)
