"""Test that keys without effect in a run are named, and that keys with an effect are not."""

from __future__ import annotations

from typing import Any

import pytest

from attnimg.config.schema import Config
from attnimg.config.without_effect import keys_without_effect

CHAT = {"path": "a.jsonl", "type": "chat_template"}
TEXT = {"path": "a.jsonl", "type": "completion"}
ADAM: dict[str, Any] = {"adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-6}


@pytest.mark.parametrize(
    ("keys", "unused"),
    [
        ({"lr_scheduler": "constant"}, None),
        ({"lr_scheduler": "constant", "warmup_steps": 0}, None),
        ({"lr_scheduler": "constant", "warmup_steps": 4}, "warmup_steps"),
        ({"lr_scheduler": "reduce_lr_on_plateau", "warmup_ratio": 0.1}, "warmup_ratio"),
        ({"lr_scheduler": "constant_with_warmup", "warmup_steps": 4}, None),
        ({"lr_scheduler": "constant_with_warmup", "lr_scheduler_kwargs": {"a": 1}},
         "lr_scheduler_kwargs"),
        ({"lr_scheduler": "inverse_sqrt", "lr_scheduler_kwargs": {"timescale": 9}}, None),
        *(({"optimizer": name, **ADAM}, " and ".join(ADAM))
          for name in ("adafactor", "sgd", "adagrad", "rmsprop")),
        *(({"optimizer": name, **ADAM}, "adam_epsilon") for name in ("lion_8bit", "lion_32bit")),
        *(({"optimizer": name, **ADAM}, None) for name in ("adamw_torch", "paged_adamw_8bit")),
        ({"optimizer": "sgd"}, None),
        ({"max_steps": 3, "num_epochs": 2}, "num_epochs"),
        ({"max_steps": 3}, None),
        ({"dataloader_prefetch_factor": 4}, "dataloader_prefetch_factor"),
        ({"dataloader_prefetch_factor": 4, "dataloader_num_workers": 1}, None),
        ({"loraplus_lr_embedding": 1e-5}, "loraplus_lr_embedding"),
        ({"loraplus_lr_embedding": 1e-5, "loraplus_lr_ratio": 4, "adapter": "lora"}, None),
        ({"weight_decay": 0.1, "loraplus_lr_ratio": 4, "adapter": "lora"}, "weight_decay"),
        ({"group_by_length": True, "sample_packing": True}, "group_by_length"),
        ({"group_by_length": True}, None),
        ({"num_epochs": 2}, None),
        ({"lora_r": 4, "peft_use_dora": True}, "lora_r and peft_use_dora"),
        ({"lora_r": 4, "adapter": "lora"}, None),
        ({"eval_batch_size": 2}, "eval_batch_size"),
        ({"eval_batch_size": 2, "val_set_size": 0.1}, None),
        ({"eval_sample_packing": True, "val_set_size": 0.1}, "eval_sample_packing"),
        ({"eval_sample_packing": True, "sample_packing": True, "val_set_size": 0.1}, None),
        ({"eval_sample_packing": False}, None),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": False}},
         "gradient_checkpointing_kwargs"),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": False},
          "gradient_checkpointing": True}, None),
        ({"torch_compile_mode": "default"}, "torch_compile_mode"),
        ({"torch_compile_mode": "default", "torch_compile": "auto"}, None),
        ({"save_strategy": "no", "save_total_limit": 2}, "save_total_limit"),
        ({"save_total_limit": 2}, None),
        ({"wandb_name": "n", "wandb_entity": "e"}, "wandb_entity and wandb_name"),
        ({"wandb_name": "n", "wandb_project": "p"}, None),
        ({"wandb_name": "n", "use_wandb": True}, None),
        ({"wandb_project": "p", "wandb_mode": "disabled"}, "wandb_project"),
        ({"wandb_mode": "offline"}, "wandb_mode"),
        ({"wandb_mode": "disabled"}, None),
        ({"mlflow_run_name": "n", "hf_mlflow_log_artifacts": True},
         "hf_mlflow_log_artifacts and mlflow_run_name"),
        ({"mlflow_run_name": "n", "mlflow_experiment_name": "e"}, None),
        ({"hub_strategy": "end", "hub_revision": "b"}, "hub_strategy and hub_revision"),
        ({"hub_strategy": "end", "hub_model_id": "m"}, None),
        ({"hub_strategy": "checkpoint", "hub_model_id": "m", "save_strategy": "no"},
         "hub_strategy"),
        ({"hub_strategy": "end", "hub_model_id": "m", "save_strategy": "no"}, None),
        ({"loss_watchdog_patience": 2}, "loss_watchdog_patience"),
        ({"loss_watchdog_patience": 2, "loss_watchdog_threshold": 5.0}, None),
        ({"fsdp_version": 2}, "fsdp_version"),
        ({"fsdp_version": 2, "fsdp_config": {"a": 1}}, None),
        ({"eot_tokens": ["x"], "chat_template": "chatml"}, "chat_template and eot_tokens"),
        ({"eot_tokens": ["x"], "chat_template": "chatml", "datasets": [TEXT, CHAT]}, None),
        ({"chat_template": "chatml", "chat_template_jinja": "x", "datasets": [CHAT]},
         "chat_template_jinja"),
        ({"chat_template": "jinja", "chat_template_jinja": "x", "datasets": [CHAT]}, None),
        ({"chat_template_jinja": "x", "datasets": [CHAT]}, None),
        ({"train_on_inputs": True}, "train_on_inputs"),
        ({"train_on_inputs": True, "datasets": [TEXT, CHAT]}, None),
    ],
    ids=str,
)  # fmt: skip
def test_a_key_that_the_run_does_not_read_is_named(
    keys: dict[str, Any], unused: str | None
) -> None:
    found = keys_without_effect(Config(**{"datasets": [TEXT], **keys}))
    verb = "have" if unused and " and " in unused else "has"
    assert [note.partition(", so that ")[2] for note in found] == (
        [f"{unused} {verb} no effect"] if unused else []
    )


@pytest.mark.parametrize(
    ("entry", "keys", "unused"),
    [
        (CHAT | {"field": "x", "text_column": "y"}, {}, ["field", "text_column"]),
        (TEXT | {"field": "x"}, {}, []),
        (TEXT | {"text_column": "x"}, {}, []),
        (TEXT | {"field": "x", "text_column": "y"}, {}, ["text_column"]),
        (TEXT | {"train_on_eos": "none"}, {}, ["train_on_eos"]),
        (TEXT | {"type": "alpaca", "roles_to_train": ["user"], "field": "x"}, {},
         ["field", "roles_to_train"]),
        (CHAT | {"train_on_eos": "none", "roles_to_train": ["user"], "field_messages": "m"}, {},
         []),
        (CHAT | {"roles_to_train": ["user"]}, {"train_on_inputs": True}, ["roles_to_train"]),
        (CHAT | {"message_field_role": "r", "message_field_content": "c"}, {}, []),
        (CHAT | {"message_field_role": "r", "message_property_mappings": {"role": "x"}}, {},
         ["message_field_role"]),
        (CHAT | {"message_field_role": "r", "message_property_mappings": {"content": "x"}}, {},
         []),
        (CHAT | {"chat_template": "chatml", "chat_template_jinja": "x"}, {},
         ["chat_template_jinja"]),
        (CHAT | {"chat_template": "jinja", "chat_template_jinja": "x"}, {}, []),
    ],
    ids=str,
)  # fmt: skip
def test_a_key_of_a_dataset_that_its_type_does_not_read_is_named(
    entry: dict[str, Any], keys: dict[str, Any], unused: list[str]
) -> None:
    (note,) = keys_without_effect(Config(datasets=[entry], **keys)) or ("",)
    assert note.partition(", so that ")[2].split(" ha")[0] == " and ".join(
        f"datasets[0].{name}" for name in unused
    )
