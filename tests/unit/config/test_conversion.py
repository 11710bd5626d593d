"""Convert configs of TRL, LLaMA-Factory and axolotl; each key is answered, and all advice helps."""

from __future__ import annotations

import dataclasses
import json
import random
import re
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from attnimg.config import check_values
from attnimg.config.conversion import Conversion, Trainer, convert_values, find_trainer
from attnimg.config.conversion.llama_factory_data import chat_template
from attnimg.config.conversion.tables import OF_TRL, key_table
from attnimg.config.conversion.write import config_yaml
from attnimg.config.read import parse_value, parse_yaml
from attnimg.config.schema import Config
from attnimg.errors import AttnimgError

TRL: dict[str, Any] = {"model_name_or_path": "org/model", "dataset_name": "chat.jsonl"}
LORA = {**TRL, "use_peft": True, "lora_target_modules": ["q_proj", "v_proj"]}
DPO = {**TRL, "beta": 0.2, "f_divergence_type": "reverse_kl"}
KTO = {**TRL, "beta": 0.2, "desirable_weight": 2.0}
ORPO = {**TRL, "beta": 0.2, "generate_during_eval": False}
PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
LABELED = {"prompt": "a", "completion": "b", "label": True}
FACTORY: dict[str, Any] = {
    "model_name_or_path": "org/model", "stage": "sft", "dataset": "alpaca", "template": "qwen",
    "dataset_dir": "data",
}  # fmt: skip
INFO: dict[str, Any] = {
    "alpaca": {"file_name": "alpaca.json"},
    "chats": {"file_name": "chats.json", "formatting": "sharegpt"},
    "tagged": {
        "file_name": "tagged.json",
        "formatting": "sharegpt",
        "columns": {"messages": "turns", "system": "task"},
        "tags": {"role_tag": "who", "content_tag": "says", "user_tag": "boss",
                 "assistant_tag": "bot"},
    },
    "corpus": {"file_name": "corpus.jsonl", "columns": {"prompt": "content"}},
    "pairs": {"file_name": "p.json", "ranking": True, "columns": {
        "prompt": "ask", "chosen": "good", "rejected": "bad"}},
    "pair_chats": {"file_name": "p.json", "ranking": True, "formatting": "sharegpt", "columns": {
        "messages": "conversations", "chosen": "good", "rejected": "bad"}},
    "labels": {"file_name": "p.json", "columns": {
        "prompt": "ask", "response": "said", "kto_tag": "ok"}},
    "label_chats": {"file_name": "p.json", "formatting": "sharegpt", "columns": {
        "messages": "conversations", "kto_tag": "ok"}},
    "unranked": {"file_name": "p.json", "columns": {"chosen": "good", "rejected": "bad"}},
    "tools": {"file_name": "t.json", "formatting": "sharegpt", "columns": {
        "messages": "conversations", "tools": "functions"}},
    "hub_chats": {"hf_hub_url": "org/chats", "formatting": "sharegpt"},
    "hub": {"hf_hub_url": "org/data", "subset": "en", "split": "test"},
    "images": {"file_name": "i.json", "columns": {"images": "images"}},
    "lost": {},
    "strange": {"file_name": "i.json", "formatting": "sharegpt2"},
    "no_answer": {"file_name": "i.json", "columns": {"prompt": "text"}},
}  # fmt: skip

SAMPLES: dict[str, Any] = {
    "messages": [{"role": "user", "content": "a"}], "conversations": [{"from": "x", "value": "a"}],
}  # fmt: skip


@pytest.fixture(autouse=True)
def _data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/dataset_info.json").write_text(json.dumps(INFO))


def convert(
    values: Mapping[str, Any],
    trainer: Trainer | None = None,
    *,
    columns: Collection[str] | None = ("messages",),
    first: Mapping[str, Any] | None = None,
    records: int | None = 10,
    format_of_data: Any = None,
) -> Conversion:
    if first is None:
        first = {name: SAMPLES.get(name, "a") for name in columns or ()}
    found = [first] * (records or 0) if first else []
    return convert_values(
        values, trainer=trainer or find_trainer(values), file="old.yaml",
        records=lambda _: found, format_of_data=format_of_data,
    )  # fmt: skip


def converted(values: Mapping[str, Any], **options: Any) -> dict[str, Any]:
    found = convert(values, **options)
    assert found.errors == ()
    assert parse_yaml(found.text, name="new.yaml") == found.values
    checked = check_values(dict(found.values), file="new.yaml")
    assert checked.errors == ()
    return dict(found.values)


def refused(values: Mapping[str, Any], **options: Any) -> dict[str, str]:
    return {error.key or "": error.do for error in convert(values, **options).errors}


def test_what_trl_does_by_default_is_written_out() -> None:
    found = converted(TRL)
    assert found == {
        "base_model": "org/model",
        "datasets": [{"path": "chat.jsonl", "type": "chat_template"}],
        "train_on_inputs": True,
        "sequence_len": 1024, "excess_length_strategy": "truncate",
        "micro_batch_size": 8, "num_epochs": 3.0, "learning_rate": 2e-5, "lr_scheduler": "linear",
        "bf16": False, "gradient_checkpointing": True,
        "logging_steps": 10, "save_strategy": "steps", "save_steps": 500,
    }  # fmt: skip


def test_what_llama_factory_does_by_default_is_written_out() -> None:
    found = converted(FACTORY)
    texts = found.pop("datasets")[0]["type"]
    assert found == {
        "base_model": "org/model", "special_tokens": {"eos_token": "<|im_end|>"},
        "sequence_len": 2048, "excess_length_strategy": "truncate",
        "micro_batch_size": 8, "num_epochs": 3.0, "learning_rate": 5e-5, "lr_scheduler": "linear",
        "bf16": False, "gradient_checkpointing": True, "adapter": "lora",
        "lora_target_linear": True,
        "logging_steps": 500, "save_strategy": "steps", "save_steps": 500,
    }  # fmt: skip
    assert texts["system_prompt"].startswith("You are Qwen")
    assert texts["format"] == (
        "<|im_start|>user\n{instruction}\n{input}<|im_end|>\n<|im_start|>assistant\n"
    )


def test_every_key_of_the_old_config_is_answered() -> None:
    values = {**LORA, "packing": True, "ddp_backend": "gloo", "shuffle_dataset": True,
              "lora_r": None, "bf16": True}  # fmt: skip
    found = convert(values)
    assert [answer.key for answer in found.answers] == list(values)
    answers = {answer.key: answer.answer for answer in found.answers}
    assert answers["ddp_backend"] == "hint-not-used"
    assert answers["shuffle_dataset"] == "done-otherwise"
    assert {answer.answer for answer in found.answers if answer.to} == {"done"}


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "LoRA of TRL": (LORA, {"adapter": "lora", "lora_r": 16, "lora_alpha": 32,
                           "lora_dropout": 0.05, "bf16": True}),
    "QLoRA of TRL": (
        {**LORA, "load_in_4bit": True, "torch_dtype": "bfloat16",
         "bnb_4bit_quant_storage": "uint8"},
        {"adapter": "qlora", "bnb_config_kwargs": {
            "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": False,
            "bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_quant_storage": "uint8"}}),
    "weights in 8 bits": ({**LORA, "load_in_8bit": True}, {"load_in_8bit": True}),
    "bfloat16 weights": ({**TRL, "dtype": "bfloat16"}, {"bf16": True}),
    "DeepSpeed keeps float32 weights": ({**TRL, "deepspeed": "z3.json"}, {"bf16": True}),
    "float16": ({**TRL, "fp16": True}, {"fp16": True, "bf16": False}),
    "the older name of max_length": ({**TRL, "max_seq_length": 77}, {"sequence_len": 77}),
    "packing": ({**TRL, "packing": True}, {"sample_packing": True,
                                           "excess_length_strategy": "truncate"}),
    "bfd_split": ({**TRL, "packing": True, "packing_strategy": "bfd_split"},
                  {"excess_length_strategy": "split"}),
    "answers alone": ({**TRL, "assistant_only_loss": True}, {"train_on_inputs": False}),
    "an evaluation in steps of logging_steps": (
        {**TRL, "eval_strategy": "steps", "logging_steps": 7},
        {"eval_steps": 7, "eval_batch_size": 8, "eval_strategy": "steps", "test_datasets":
            [{"path": "chat.jsonl", "type": "chat_template", "split": "test"}]}),
    "datasets in a list": (
        {"model_name_or_path": "m", "test_split_size": 0.1, "datasets": [
            {"path": "a.jsonl", "split": "train"}, {"path": "json", "data_files": "b.jsonl"}]},
        {"val_set_size": 0.1, "datasets": [
            {"path": "a.jsonl", "type": "chat_template"},
            {"path": "json", "data_files": "b.jsonl", "type": "chat_template"}]}),
    "a warmup ratio": ({**TRL, "warmup_ratio": 0.1}, {"warmup_ratio": 0.1}),
    "warmup steps before a ratio": ({**TRL, "warmup_ratio": 0.1, "warmup_steps": 5},
                                    {"warmup_steps": 5}),
    "arguments as JSON text": (
        {**TRL, "lr_scheduler_type": "cosine_with_min_lr",
         "lr_scheduler_kwargs": '{"min_lr": 1e-6}'},
        {"lr_scheduler": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-6}}),
    "trackers": ({**TRL, "report_to": ["wandb", "tensorboard"], "run_name": "me"},
                 {"use_wandb": True, "use_tensorboard": True, "wandb_name": "me"}),
    "the hub": ({**TRL, "push_to_hub": True, "hub_model_id": "me/it"},
                {"hub_model_id": "me/it", "hub_strategy": "every_save"}),
    "YAML's no": ({**TRL, "save_strategy": False, "eval_strategy": False}, {"save_strategy": "no"}),
    "one name is a pattern": ({**LORA, "lora_target_modules": ["all-linear"]},
                              {"lora_target_modules": "all-linear"}),
    "a template": ({**TRL, "chat_template_path": "t.jinja"},
                   {"chat_template": "jinja", "chat_template_jinja": "t.jinja"}),
    "torch.compile by its backend": ({**TRL, "torch_compile_backend": "inductor"},
                                     {"torch_compile": True, "torch_compile_backend": "inductor"}),
    "full fine-tuning of LLaMA-Factory": ({**FACTORY, "finetuning_type": "full", "bf16": True},
                                          {"bf16": False, "lora_r": None, "adapter": None}),
    "pure bfloat16": ({**FACTORY, "finetuning_type": "full", "pure_bf16": True}, {"bf16": "full"}),
    "alpha is twice the rank": ({**FACTORY, "lora_rank": 32}, {"lora_r": 32, "lora_alpha": 64}),
    "targets with commas": ({**FACTORY, "lora_target": "q_proj, v_proj"},
                            {"lora_target_modules": ["q_proj", "v_proj"]}),
    "QLoRA of LLaMA-Factory": ({**FACTORY, "quantization_bit": 4}, {"adapter": "qlora",
        "bnb_config_kwargs": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}}),
    "neat packing": ({**FACTORY, "neat_packing": True, "cutoff_len": 100},
                     {"sample_packing": True, "sequence_len": 99}),
    "the prompt is trained": ({**FACTORY, "train_on_prompt": True}, {"train_on_inputs": True}),
    "no checkpointing": ({**FACTORY, "disable_gradient_checkpointing": True},
                         {"gradient_checkpointing": False}),
    "FlashAttention": ({**FACTORY, "flash_attn": "fa2"},
                       {"attn_implementation": "flash_attention_2"}),
    "sharegpt": ({**FACTORY, "dataset": "chats"}, {"datasets": [
        {"path": "data/chats.json", "type": "chat_template", "field_messages": "conversations",
         "message_property_mappings": {"role": "from", "content": "value"}}]}),
    "sharegpt with other names": ({**FACTORY, "dataset": "tagged"}, {"datasets": [
        {"path": "data/tagged.json", "type": "chat_template", "field_messages": "turns",
         "message_property_mappings": {"role": "who", "content": "says"},
         "roles": {"user": ["boss"], "assistant": ["bot"]}, "field_system": "task"}]}),
    "the tokenizer's template": (
        {k: v for k, v in FACTORY.items() if k != "template"} | {"dataset": "chats"},
        {"chat_template": None, "special_tokens": None}),
    "plain text": ({**FACTORY, "stage": "pt", "packing": False, "dataset": "corpus"}, {
        "datasets": [{"path": "data/corpus.jsonl", "type": "completion", "field": "content"}]}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_values_become(name: str) -> None:
    values, expected = CASES[name]
    found = converted(values)
    assert {key: found.get(key) for key in expected} == expected


@pytest.mark.parametrize(
    "text",
    ["Be brief.\n\n", "a\n\n\n", "\n\n", "a\n", "a", "a\n ", "a \nb\n\n", "\ta\n\n", "1e-4",
     "2026-11-27", "null", "\U0001f600\n\n", "a\u2028b\x85\n\n", "# a\n\n", "...\n", "---\na\n\n"],
)  # fmt: skip
def test_any_text_is_read_again_as_it_was(text: str) -> None:
    found = converted({**FACTORY, "dataset": "chats, alpaca", "default_system": text})
    assert found["datasets"][1]["type"]["system_prompt"] == text
    old = {"base_model": "m", "learning_rate": 1e-4, "datasets": [{"path": "a", "type": "alpaca"}],
           "micro_batch_size": 1, "chat_template_jinja": f"{{{{ messages }}}}{text}"}  # fmt: skip
    found_of_axolotl = convert({**old, "chat_template": "jinja"}, "axolotl")
    assert found_of_axolotl.errors == ()
    assert parse_yaml(found_of_axolotl.text, name="new.yaml") == found_of_axolotl.values


@pytest.mark.parametrize("template", ["alpaca", "vicuna", "chatml", "llama3", "phi", "phi4"])
def test_each_template_is_written_as_yaml(template: str) -> None:
    converted({**FACTORY, "dataset": "alpaca, chats", "template": template})


def test_a_text_that_would_be_read_as_something_else_is_a_fault(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert "# a" in config_yaml({"base_model": "m"}, head="a", comments={}, added={})
    monkeypatch.setattr(yaml, "dump", lambda *_, **__: "base_model: 1")
    with pytest.raises(RuntimeError, match="other values of base_model"):
        config_yaml({"base_model": "m"}, head="a", comments={}, added={})
    monkeypatch.setattr(yaml, "dump", lambda *_, **__: "a: |+\n...\nb")
    with pytest.raises(RuntimeError, match="not YAML"):
        config_yaml({"base_model": "m"}, head="a", comments={}, added={})


def test_characters_outside_the_bmp_stay(tmp_path: Path) -> None:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    values = {**FACTORY, "dataset": "chats", "default_system": 'Be "kind" \U0001f600\\ \u2028{{ x'}
    text = converted(values)["chat_template_jinja"]
    found = ImmutableSandboxedEnvironment().from_string(text).render(
        messages=[{"role": "user", "content": "\U0001f680"}]
    )  # fmt: skip
    assert found.startswith(f"<|im_start|>system\n{values['default_system']}<|im_end|>")
    assert "\U0001f680" in found


def test_max_samples_are_the_first_records_of_a_longer_dataset() -> None:
    values = {**FACTORY, "max_samples": 5}
    assert converted(values)["datasets"][0]["split"] == "train[:5]"
    assert "split" not in converted(values, records=5)["datasets"][0]
    hub = converted({**values, "dataset": "hub"}, records=None)["datasets"][0]
    assert (hub["path"], hub["name"], hub["split"]) == ("org/data", "en", "test[:5]")


@pytest.mark.parametrize(
    ("columns", "options", "expected"),
    [
        (["text"], {}, {"type": "completion"}),
        (["body"], {"dataset_text_field": "body"}, {"type": "completion", "field": "body"}),
        (["conversations"], {}, {
            "type": "chat_template", "field_messages": "conversations",
            "message_property_mappings": {"role": "from", "content": "value"}}),
        (["prompt", "completion"], {}, {"type": {
            "field_instruction": "prompt", "field_output": "completion",
            "format": "{instruction}", "no_input_format": "{instruction}"}}),
    ],
)  # fmt: skip
def test_the_columns_of_trl_decide_on_the_type(
    columns: list[str], options: dict[str, Any], expected: dict[str, Any]
) -> None:
    found = converted({**TRL, **options}, columns=columns)
    assert found["datasets"] == [{"path": "chat.jsonl", **expected}]
    if "completion" in columns:
        whole = converted({**TRL, "completion_only_loss": False}, columns=columns)
        assert (found.get("train_on_inputs"), whole["train_on_inputs"]) == (None, True)


def test_a_dataset_that_is_not_here_needs_its_format() -> None:
    assert "--dataset-format" in refused(TRL, columns=None)["dataset_name"]
    assert "dataset_text_field" in refused(TRL, columns=["text2"])["dataset_name"]
    assert converted({**TRL, "dataset_text_field": "text2"}, columns=["text2"])
    both = {"messages": SAMPLES["messages"], "text": "a"}
    assert "messages" in refused(TRL, first=both, format_of_data="text")["dataset_name"]
    assert converted(TRL, first=both, format_of_data="messages") == converted(TRL)
    found = converted(TRL, columns=None, format_of_data="prompt-completion")
    assert found["datasets"][0]["type"]["field_output"] == "completion"
    assert converted({**TRL, "dataset_text_field": "body"}, columns=None)["datasets"] == [
        {"path": "chat.jsonl", "type": "completion", "field": "body"}
    ]


CHAT = {"messages": SAMPLES["messages"]}


@pytest.mark.parametrize("column", [
    "chat_template_kwargs", "image", "images", "input_ids", "labels", "seq_lengths",
    "assistant_masks", "completion_mask", "chosen", "rejected", "prompt", "system",
])  # fmt: skip
def test_a_column_that_trl_reads_otherwise_is_refused(column: str) -> None:
    assert "dataset_name" in refused(TRL, first={**CHAT, column: {"enable_thinking": False}})
    later = convert_values(
        TRL, trainer="trl", file="old.yaml", records=lambda _: [CHAT, {**CHAT, column: [1]}]
    )
    assert [error.key for error in later.errors] == ["dataset_name"]
    assert converted(TRL, first={**CHAT, column: None}) == converted(TRL)


def test_columns_that_neither_reads_are_kept() -> None:
    assert converted(TRL, first={**CHAT, "tools": "[]", "id": 7, "text": "a"}) == converted(TRL)
    pair = {"prompt": "a", "completion": "b", "score": 1, "messages": CHAT["messages"]}
    assert converted(TRL, first=pair) == converted(TRL, columns=["prompt", "completion"])
    other = {**CHAT, "conversations": [{"role": "user", "content": "b"}]}
    assert converted(TRL, first=other) == converted(TRL)
    other = {**CHAT, "conversations": SAMPLES["conversations"]}
    assert converted(TRL, first=other) == converted(TRL, columns=["conversations"])


@pytest.mark.parametrize("first", [
    {"prompt": CHAT["messages"], "completion": CHAT["messages"]},
    {"prompt": "a", "completion": CHAT["messages"]},
    {"messages": "[]"},
    {"messages": [{"from": "a", "value": "b"}]},
    {"messages": []},
    {"conversations": [{"role": "a", "content": "b"}]},
    {"text": ["a"]},
    {"text": 5},
])  # fmt: skip
def test_the_values_of_the_first_record_decide_too(first: dict[str, Any]) -> None:
    assert "messages" in refused(TRL, first=first)["dataset_name"]


@pytest.mark.parametrize("most", [0, -1, 0.5, "5", True])
def test_max_samples_that_are_no_number_of_records(most: Any) -> None:
    assert "max_samples" in refused({**FACTORY, "max_samples": most})


def test_an_input_without_an_instruction_is_refused() -> None:
    alone = {"instruction": "", "input": "a", "output": "b"}
    assert "instruction" in refused(FACTORY, first=alone)["dataset"]
    for right in ({**alone, "instruction": "c"}, {**alone, "input": ""}, {"instruction": "a"}):
        assert converted(FACTORY, first=right) == converted(FACTORY)


# What can't be converted, and the key that is named. The advice is applied to the old config.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "the layers that PEFT chooses": ({**TRL, "use_peft": True}, "lora_target_modules"),
    "label smoothing": ({**TRL, "label_smoothing_factor": 0.1}, "label_smoothing_factor"),
    "another optimizer": ({**TRL, "optim": "galore_adamw"}, "optim"),
    "another schedule": ({**TRL, "lr_scheduler_type": "greedy"}, "lr_scheduler_type"),
    "a schedule without its argument": (
        {**TRL, "lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_type"),
    "another loss": ({**TRL, "loss_type": "dft"}, "loss_type"),
    "packing that mixes documents": (
        {**TRL, "packing": True, "packing_strategy": "wrapped"}, "packing_strategy"),
    "the end of long documents": ({**TRL, "truncation_mode": "keep_end"}, "truncation_mode"),
    "documents of any length": ({**TRL, "max_length": None}, "max_length"),
    "evaluation in packed rows alone": (
        {**TRL, "eval_packing": True, "eval_strategy": "epoch"}, "eval_packing"),
    "a tokenizer as the template": ({**TRL, "chat_template_path": "org/t"}, "chat_template_path"),
    "float16 weights": ({**TRL, "dtype": "float16"}, "dtype"),
    "weights in the file's precision": ({**TRL, "dtype": "auto"}, "dtype"),
    "no such precision": ({**TRL, "dtype": "int8"}, "dtype"),
    "two precisions": ({**TRL, "fp16": True, "bf16": True}, "fp16"),
    "FlashAttention in float32": (
        {**TRL, "attn_implementation": "flash_attention_2"}, "attn_implementation"),
    "FlashAttention in float32 of LLaMA-Factory": (
        {**FACTORY, "finetuning_type": "full", "bf16": True, "flash_attn": "fa2"}, "flash_attn"),
    "quantized full fine-tuning": ({**TRL, "load_in_4bit": True}, "load_in_4bit"),
    "model_init_kwargs": ({**TRL, "model_init_kwargs": {"a": 1}}, "model_init_kwargs"),
    "offloading without checkpointing": (
        {**TRL, "activation_offloading": True, "gradient_checkpointing": False},
        "activation_offloading"),
    "a share of the steps": ({**TRL, "save_steps": 0.1}, "save_steps"),
    "another metric": ({**TRL, "metric_for_best_model": "bleu"}, "metric_for_best_model"),
    "documents in their order": (
        {**TRL, "train_sampling_strategy": "sequential"}, "train_sampling_strategy"),
    "the hub without a name": ({**TRL, "push_to_hub": True}, "push_to_hub"),
    "a part of a dataset": (
        {"model_name_or_path": "m", "test_split_size": 0.1,
         "datasets": [{"path": "a", "fraction": 0.5}]}, "datasets"),
    "datasets that are no list": (
        {"model_name_or_path": "m", "test_split_size": 0.1, "datasets": {"path": "a"}}, "datasets"),
    "no datasets": ({"model_name_or_path": "m", "packing_strategy": "bfd"}, "dataset_name"),
    "arguments that are no mapping": (
        {**TRL, "lr_scheduler_kwargs": "[1]"}, "lr_scheduler_kwargs"),
    "another loss of DPO": ({**DPO, "ld_alpha": 0.5}, "ld_alpha"),
    "dropout of DPO": ({**DPO, "disable_dropout": False}, "disable_dropout"),
    "the end of long pairs": ({**DPO, "truncation_mode": "keep_end"}, "truncation_mode"),
    "pairs of any length": ({**DPO, "max_length": None}, "max_length"),
    "another loss of KTO": ({**KTO, "loss_type": "apo_zero_unpaired"}, "loss_type"),
    "another order of KTO": (
        {**KTO, "train_sampling_strategy": "random"}, "train_sampling_strategy"),
    "answers of a length of ORPO": (
        {**DPO, "max_completion_length": 5, "loss_weights": None}, "max_completion_length"),
    "variables": ({**TRL, "env": {"A": 1}}, "env"),
    "an older name and its present one": (
        {**TRL, "max_seq_length": 5, "max_length": 6}, "max_seq_length"),
    "an unknown key": ({**TRL, "max_lenght": 5}, "max_lenght"),
    "a key nobody knows": ({**TRL, "wubble": 5}, "wubble"),
    "a stage of rewards": ({**FACTORY, "stage": "rm"}, "stage"),
    "a loss without a reference": (
        {**FACTORY, "stage": "dpo", "dataset": "pairs", "pref_loss": "orpo"}, "pref_loss"),
    "SimPO": ({**FACTORY, "stage": "dpo", "dataset": "pairs", "pref_loss": "simpo"}, "pref_loss"),
    "a loss that is no name": (
        {**FACTORY, "stage": "dpo", "dataset": "pairs", "pref_loss": {"ipo": 1}}, "pref_loss"),
    "another part of the loss": (
        {**FACTORY, "stage": "dpo", "dataset": "pairs", "pref_ftx": 0.5}, "pref_ftx"),
    "pairs without a template": (
        {**{k: v for k, v in FACTORY.items() if k != "template"}, "stage": "dpo",
         "dataset": "pairs"}, "dataset"),
    "no pairs": ({**FACTORY, "stage": "dpo"}, "dataset"),
    "pairs that are not ranked": ({**FACTORY, "stage": "dpo", "dataset": "unranked"}, "dataset"),
    "pairs in supervised fine-tuning": ({**FACTORY, "dataset": "pairs"}, "dataset"),
    "conversations with labels": ({**FACTORY, "stage": "kto", "dataset": "label_chats"}, "dataset"),
    "freeze": ({**FACTORY, "finetuning_type": "freeze"}, "finetuning_type"),
    "no training": ({**FACTORY, "do_train": False}, "do_train"),
    "an unknown attention": ({**FACTORY, "flash_attn": "fa9"}, "flash_attn"),
    "other quantizations": ({**FACTORY, "quantization_bit": 3}, "quantization_bit"),
    "pure_bf16 with an adapter": ({**FACTORY, "pure_bf16": True}, "pure_bf16"),
    "packing without isolation": ({**FACTORY, "packing": True}, "packing"),
    "packing in pretraining": ({**FACTORY, "stage": "pt", "dataset": "corpus"}, "packing"),
    "interleaved datasets": ({**FACTORY, "mix_strategy": "interleave_under"}, "mix_strategy"),
    "the last turn alone": ({**FACTORY, "mask_history": True}, "mask_history"),
    "a template with reasoning": ({**FACTORY, "template": "qwen3"}, "template"),
    "an unknown template": ({**FACTORY, "template": "nobody", "dataset": "chats"}, "template"),
    "records without a template": (
        {k: v for k, v in FACTORY.items() if k != "template"}, "dataset"),
    "end tokens in a prompt": ({**FACTORY, "template": "zephyr"}, "dataset"),
    "a stable rate": ({**FACTORY, "lr_scheduler_type": "warmup_stable_decay",
                       "lr_scheduler_kwargs": {"num_decay_steps": 2}}, "lr_scheduler_type"),
    "images": ({**FACTORY, "dataset": "alpaca,images"}, "dataset"),
    "an unknown dataset": ({**FACTORY, "dataset": "alpaca,nobody"}, "dataset"),
    "a dataset without a file": ({**FACTORY, "dataset": "lost"}, "dataset"),
    "an unknown formatting": ({**FACTORY, "dataset": "strange"}, "dataset"),
    "records without an answer": ({**FACTORY, "dataset": "no_answer"}, "dataset"),
    "text with a prompt": ({**FACTORY, "stage": "pt", "packing": False}, "dataset"),
    "no datasets of LLaMA-Factory": (
        {k: v for k, v in FACTORY.items() if k != "dataset"}, "dataset"),
    "a remote folder": ({**FACTORY, "dataset_dir": "REMOTE:org/data"}, "dataset_dir"),
    "no such folder": ({**FACTORY, "dataset_dir": "nowhere"}, "dataset_dir"),
    "a secret": ({**FACTORY, "hf_hub_token": "hf_abcdefghijklmnopq"}, "hf_hub_token"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_train_something_else_is_refused(name: str) -> None:
    values, key = REFUSED[name]
    found = convert(values)
    assert key in {error.key for error in found.errors}
    assert {answer.key for answer in found.answers} == set(values)
    assert "hf_abcdefghijklmnopq" not in repr(found.errors) + repr(found.answers)


AXOLOTL: dict[str, Any] = {
    "base_model": "m", "learning_rate": 1e-4, "datasets": [{"path": "a", "type": "alpaca"}],
    "micro_batch_size": 1,
}  # fmt: skip
SECRET = "s3cr3t-and-long"
SECRETS: dict[str, tuple[dict[str, Any], str]] = {
    "a variable": ({**TRL, "env": {"WANDB_API_KEY": SECRET}}, "env"),
    "a token of a model": (
        {**TRL, "model_init_kwargs": {"token": SECRET, "url": f"https://bob:{SECRET}@h"}},
        "model_init_kwargs"),
    "a token of a dataset": (
        {"model_name_or_path": "m", "test_split_size": 0.1,
         "datasets": [{"path": "a.jsonl", "token": SECRET}]}, "datasets"),
    "a password in a path": (
        {"model_name_or_path": "m", "test_split_size": 0.1,
         "datasets": [{"path": f"https://bob:{SECRET}@h/a.jsonl"}]}, "datasets"),
    "a password in the model's path": (
        {**TRL, "model_name_or_path": f"https://bob:{SECRET}@h"}, "model_name_or_path"),
    "an argument of the schedule": (
        {**TRL, "lr_scheduler_type": "cosine_with_min_lr",
         "lr_scheduler_kwargs": {"min_lr": 0.1, "token": SECRET}}, "lr_scheduler_kwargs"),
    "arguments as JSON text": (
        {**TRL, "lr_scheduler_type": "cosine_with_min_lr",
         "lr_scheduler_kwargs": f'{{"min_lr": 0.1, "token": "{SECRET}"}}'}, "lr_scheduler_kwargs"),
    "an unknown key": ({**TRL, "my_api_key": SECRET}, "my_api_key"),
    "a password of digits": ({**TRL, "hub_token": 8374620918}, "hub_token"),
    "a token": ({**TRL, "hub_token": SECRET}, "hub_token"),
    "LLaMA-Factory's token": ({**FACTORY, "hf_hub_token": SECRET}, "hf_hub_token"),
    "LLaMA-Factory's targets": ({**FACTORY, "additional_target": [f"https://u:{SECRET}@h"]},
                                "additional_target"),
    "axolotl's variable": ({**AXOLOTL, "env": {"WANDB_API_KEY": SECRET}}, "env"),
    "axolotl's dataset": (
        {**AXOLOTL, "datasets": [{"path": f"s3://k:{SECRET}@b/x", "type": "alpaca"}]}, "datasets"),
    "axolotl's unknown key": ({**AXOLOTL, "wubble": {"hub_token": SECRET}}, "wubble"),
}  # fmt: skip


@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_is_refused_and_never_shown(name: str) -> None:
    values, key = SECRETS[name]
    found = convert(values, None if "axolotl" not in name else "axolotl")
    assert SECRET not in repr(found)
    assert "8374620918" not in repr(found)
    assert any(re.split(r"[.\[]", error.key or "")[0] == key for error in found.errors)
    assert found.text == ""


def test_texts_that_only_look_like_secrets_are_kept() -> None:
    system = "Write to bob@example.com. Your token budget: 5. {json} [https://example.com/a?b=c]"
    found = converted({**FACTORY, "dataset": "chats", "default_system": system})
    assert system in found["chat_template_jinja"]
    tokens = converted({**TRL, "eos_token": "<|im_end|>", "hub_token": None})
    assert tokens["special_tokens"] == {"eos_token": "<|im_end|>"}
    path = "https://example.com/data.jsonl"
    found = converted({**TRL, "dataset_name": path}, columns=["text"])
    assert found["datasets"][0]["path"] == path


def test_what_depends_on_an_unknown_format_is_not_done() -> None:
    values = {**TRL, "assistant_only_loss": True, "dataset_text_field": "text"}
    for options in ({"columns": None}, {"columns": ["body"]}):
        given = values if options["columns"] else {**TRL, "assistant_only_loss": True}
        found = convert(given, **options)
        answers = {answer.key: answer.answer for answer in found.answers}
        assert answers["assistant_only_loss"] == "refused"
        assert {error.key for error in found.errors} == {"dataset_name"}
    answers = {one.key: one.answer for one in convert({**TRL, "assistant_only_loss": True}).answers}
    assert answers["assistant_only_loss"] == "done"


def test_null_that_is_written_is_not_called_a_default() -> None:
    (error,) = convert({**TRL, "max_length": None}).errors
    assert error.why.startswith("found null; ")
    (error,) = convert({**TRL, "use_peft": True}).errors
    assert error.why.startswith("TRL's default is null; ")


def edits(do: str, key: str) -> list[dict[str, Any]]:
    """Return the edits of the old config that advice names: keys to set, or null to remove."""
    found = []
    do = do.partition(", if ")[0].partition(", or those ")[0]
    if do.startswith("remove"):
        do = re.split(r": |, and ", do)[0]
    do = re.sub(r"remove it\b", f"remove {key}", do)
    for part in re.split(r", or |; or ", do):
        edit: dict[str, Any] = {}
        for clause in re.split(r",? and (?=\w+:)|, (?=\w+:)", part):
            if match := re.fullmatch(
                r"(?:remove|keep bf16 or) (\w+)(?: in place of (\w+))?", clause
            ):
                edit[match[1]] = None
            elif match := re.fullmatch(
                r"(?:set |add `)?(\w+): (.+?)`?(?: in place of (\w+))?", clause
            ):
                edit[match[1]] = parse_value(match[2])
                edit |= {match[3]: None} if match[3] else {}
        if edit:
            found.append(edit)
    return found


# Advice on files, names and option that only the user knows.
BY_HAND = {
    "a tokenizer as the template", "model_init_kwargs", "a part of a dataset",
    "datasets that are no list", "no datasets", "arguments that are no mapping", "variables",
    "an unknown key", "images", "no pairs", "pairs that are not ranked",
    "pairs in supervised fine-tuning", "conversations with labels", "an unknown dataset",
    "a dataset without a file", "an unknown formatting", "records without an answer",
    "text with a prompt", "no datasets of LLaMA-Factory", "a remote folder", "no such folder",
    "end tokens in a prompt", "documents of any length", "a share of the steps", "a stable rate",
    "the hub without a name", "pairs of any length",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(REFUSED.keys() - BY_HAND))
def test_the_advice_helps(name: str) -> None:
    values, key = REFUSED[name]
    do = next(error.do for error in convert(values).errors if error.key == key)
    alternatives = edits(do, key)
    assert alternatives, do
    for edit in alternatives:
        changed = {k: v for k, v in {**values, **edit}.items() if v is not None}
        assert key not in refused(changed, trainer=convert(values).trainer), (do, edit)


def test_the_template_of_a_conversation_is_that_of_llama_factory() -> None:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment()
    environment.globals["raise_exception"] = lambda text: pytest.fail(text)
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
            {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]  # fmt: skip
    system = {"role": "system", "content": "s"}
    templates = key_table("llama-factory").templates

    def render(name: str, *messages: Any) -> str:
        template = environment.from_string(chat_template(templates[name]))
        return template.render(messages=messages, bos_token="<s>", eos_token="</s>")

    turns = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>\n"
    both = turns.format("a", "b") + turns.format("c", "d")
    assert render("chatml", *chat) == both
    assert render("qwen", system, *chat) == f"<|im_start|>system\ns<|im_end|>\n{both}"
    assert render("qwen", *chat).startswith("<|im_start|>system\nYou are Qwen, created")
    assert render("llama3", *chat[:2]) == (
        "<s><|start_header_id|>user<|end_header_id|>\n\na<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nb<|eot_id|>"
    )
    assert render("zephyr", system, *chat[:2]) == (
        "<|system|>\ns</s><|user|>\na</s><|assistant|>\nb</s>"
    )


def test_what_trls_scripts_for_preferences_do_is_written_out() -> None:
    shared = {
        "base_model": "org/model", "datasets": [{"path": "chat.jsonl"}], "rl_beta": 0.2,
        "sequence_len": 1024, "excess_length_strategy": "truncate",
        "micro_batch_size": 8, "num_epochs": 3.0, "learning_rate": 1e-6, "lr_scheduler": "linear",
        "bf16": False, "gradient_checkpointing": True,
        "logging_steps": 10, "save_strategy": "steps", "save_steps": 500,
    }  # fmt: skip
    assert converted(DPO, first=PAIR) == {**shared, "rl": "dpo"}
    assert converted(ORPO, first=PAIR) == {**shared, "rl": "orpo"}
    assert converted(KTO, first=LABELED) == {
        **shared, "rl": "kto", "kto_desirable_weight": 2.0, "kto_undesirable_weight": 1.0,
        "shuffle_merged_datasets": False,
    }  # fmt: skip
    losses = {"loss_type": ["robust", "sft"], "loss_weights": [1.0, 0.5], "label_smoothing": 0.1}
    found = converted({**DPO, **losses, "use_weighting": False, "pad_token": "<p>"}, first=PAIR)
    assert (found["dpo_loss_type"], found["dpo_loss_weights"]) == (["robust", "sft"], [1.0, 0.5])
    assert (found["dpo_label_smoothing"], found["special_tokens"]) == (0.1, {"pad_token": "<p>"})
    assert "dpo_label_smoothing" not in converted({**DPO, "label_smoothing": 0.1}, first=PAIR)
    assert converted({**DPO, "loss_type": "ipo"}, first=PAIR)["dpo_loss_type"] == ["ipo"]


def test_the_stages_of_preferences_of_llama_factory_are_converted() -> None:
    values = {**FACTORY, "stage": "dpo", "dataset": "pairs", "pref_beta": 0.2}
    found = converted(values)
    assert {key: found[key] for key in ("rl", "rl_beta", "learning_rate", "adapter")} == {
        "rl": "dpo", "rl_beta": 0.2, "learning_rate": 5e-5, "adapter": "lora",
    }  # fmt: skip
    (entry,) = found["datasets"]
    assert entry["type"] == {
        "field_prompt": "ask", "field_chosen": "good", "field_rejected": "bad", "prompt_format":
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant."
        "<|im_end|>\n<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n",
    }  # fmt: skip
    assert converted({**values, "pref_loss": "ipo"})["dpo_loss_type"] == ["ipo"]
    assert converted({**values, "max_samples": 5})["datasets"][0]["split"] == "train[:5]"
    system = converted({**values, "default_system": "{a}"})["datasets"][0]["type"]
    assert system["prompt_format"].startswith("<|im_start|>system\n{{a}}<|im_end|>")
    chats = converted({**values, "dataset": "pair_chats"})
    assert chats["datasets"] == [{
        "path": "data/p.json", "type": "chat_template.default", "field_messages": "conversations",
        "message_property_mappings": {"role": "from", "content": "value"},
        "field_chosen": "good", "field_rejected": "bad",
    }]  # fmt: skip
    assert chats["chat_template"] == "jinja"
    labels = {**values, "stage": "kto", "dataset": "labels", "kto_chosen_weight": 1.5}
    found = converted(labels)
    assert (found["rl"], found["kto_desirable_weight"]) == ("kto", 1.5)
    assert found["datasets"][0]["type"].items() >= {
        "field_prompt": "ask", "field_completion": "said", "field_label": "ok"
    }.items()  # fmt: skip


def test_losses_without_a_reference_are_refused_by_name() -> None:
    values = {**FACTORY, "stage": "dpo", "dataset": "pairs", "pref_beta": 0.2}

    def why(loss: str) -> str:
        (error,) = convert({**values, "pref_loss": loss}).errors
        assert error.key == "pref_loss"
        return error.why

    assert "LLaMA-Factory's has only the chosen answers" in why("orpo")
    assert "without a reference, with the margin simpo_gamma" in why("simpo")
    assert "needed one of sigmoid, hinge, ipo" in why("kto_pair")
    # What the reason of orpo says about the converted config.
    found = converted({**values, "pref_loss": "sigmoid"})
    assert check_values({**found, "rl": "orpo"}, file="config").ok


def test_texts_that_pairs_do_not_have_here_are_refused() -> None:
    info = {"ranking": True, "file_name": "p.json", "columns": {
        "query": "more", "chosen": "good", "rejected": "bad"}}  # fmt: skip
    Path("data/dataset_info.json").write_text(json.dumps({"pairs": info}))
    values = {**FACTORY, "stage": "dpo", "dataset": "pairs"}
    pair = {"instruction": "a", "good": "b", "bad": "c"}
    assert "more" in refused(values, first={**pair, "more": "x"})["dataset"]
    assert "columns" in refused(values, records=None)["dataset"]
    assert converted(values, first={**pair, "more": ""}) == converted(values, first=pair)


@pytest.mark.parametrize("value", [{"a": 1}, [1], 1, True])
@pytest.mark.parametrize(
    ("stage", "name", "part", "field"),
    [
        ("dpo", "pairs", "columns", "system"), ("dpo", "pairs", "columns", "chosen"),
        ("kto", "labels", "columns", "kto_tag"), ("sft", "tagged", "columns", "tools"),
        ("sft", "tagged", "tags", "role_tag"), ("pt", "corpus", "columns", "prompt"),
    ],
)  # fmt: skip
def test_a_column_of_llama_factory_is_a_name(
    stage: str, name: str, part: str, field: str, value: Any
) -> None:
    entry = {**INFO[name], part: {**INFO[name][part], field: value}}
    Path("data/dataset_info.json").write_text(json.dumps({name: entry}))
    values = {**FACTORY, "stage": stage, "dataset": name, "packing": False}
    if stage == "pt":
        values.pop("template")
    assert "dataset_info.json" in refused(values)["dataset"]
    entry[part][field] = None if field in ("system", "tools") else INFO[name][part][field]
    Path("data/dataset_info.json").write_text(json.dumps({name: entry}))
    assert "dataset" not in refused(values)


def test_columns_that_llama_factory_does_not_read_are_turned_off() -> None:
    chat = {"conversations": SAMPLES["conversations"]}
    values = {**FACTORY, "dataset": "chats"}
    plain = converted(values, first=chat)["datasets"][0]
    assert not plain.keys() & {"field_system", "field_tools"}
    both = converted(values, first={**chat, "system": "s", "tools": "[]"})["datasets"][0]
    assert both == {**plain, "field_system": "(none)", "field_tools": "(none)"}
    hub = converted({**values, "dataset": "hub_chats"}, records=None)["datasets"][0]
    assert (hub["field_system"], hub["field_tools"]) == ("(none)", "(none)")
    tools = {**values, "dataset": "tools"}
    assert "tools" in refused(tools, first={**chat, "functions": "[]"})["dataset"]
    assert refused(tools, records=None)["dataset"]
    assert converted(tools, first={**chat, "functions": ""})["datasets"][0]["path"] == "data/t.json"


TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    ("values", "first", "expected"),
    [
        (DPO, {"prompt": TURNS[:1], "chosen": TURNS[1:], "rejected": TURNS[1:]},
         {"type": "chat_template.default", "field_messages": "prompt"}),
        (DPO, {"chosen": TURNS, "rejected": TURNS}, {"type": "chat_template.argilla_chat"}),
        (DPO, {"chosen": "a", "rejected": "b"}, None),
        (DPO, {**PAIR, "system": "s"}, None),
        (DPO, {**PAIR, "images": []}, None),
        (DPO, LABELED, None),
        (ORPO, {"chosen": TURNS, "rejected": TURNS}, None),
        (KTO, PAIR, None),
        (KTO, {"prompt": TURNS[:1], "completion": TURNS[1:], "label": True}, None),
    ],
)  # fmt: skip
def test_the_columns_decide_on_the_type_of_preferences(
    values: dict[str, Any], first: dict[str, Any], expected: dict[str, Any] | None
) -> None:
    if expected is None:
        assert set(refused(values, first=first)) == {"dataset_name"}
    else:
        assert converted(values, first=first)["datasets"] == [{"path": "chat.jsonl", **expected}]


def test_preferences_that_are_not_here_need_their_format() -> None:
    assert "--dataset-format text" in refused(DPO, columns=None)["dataset_name"]
    assert converted(DPO, columns=None, format_of_data="text") == converted(DPO, first=PAIR)
    chats = converted(DPO, columns=None, format_of_data="messages")
    assert chats["datasets"][0]["type"] == "chat_template.default"
    assert refused(KTO, columns=None, format_of_data="messages")


def test_datasets_of_several_formats_are_refused_by_name() -> None:
    values = {"model_name_or_path": "m", "datasets": [{"path": "a"}, {"path": "b"}]}
    kinds = {"a": CHAT, "b": {"text": "c"}}
    found = convert_values(
        values, trainer="trl", file="old.yaml", records=lambda entry: [kinds[entry["path"]]]
    )
    (error,) = found.errors
    assert (error.key, "a has messages, b has text" in error.why) == ("datasets", True)
    kinds["b"] = CHAT
    found = convert_values(
        values, trainer=find_trainer(values), file="old.yaml",
        records=lambda entry: [kinds[entry["path"]]],
    )  # fmt: skip
    assert [entry["path"] for entry in found.values["datasets"]] == ["a", "b"]


def test_epochs_are_not_written_beside_steps() -> None:
    for values in (TRL, FACTORY):
        assert "num_epochs" in converted(values)
        assert "num_epochs" not in converted({**values, "max_steps": 5})
        found = convert({**values, "max_steps": 5, "num_train_epochs": 2})
        assert (found.values["max_steps"], "num_epochs" in found.values) == (5, False)
        (answer,) = [one for one in found.answers if one.key == "num_train_epochs"]
        assert "max_steps takes precedence" in answer.reason
        assert converted({**values, "max_steps": -1})["num_epochs"] == 3


def test_the_trainer_is_found_from_its_keys() -> None:
    assert find_trainer(TRL) == "trl"
    for values, trainer in ((DPO, "trl-dpo"), (KTO, "trl-kto"), (ORPO, "trl-orpo")):
        assert find_trainer(values) == trainer
    assert find_trainer({"model_name_or_path": "m", "datasets": []}) == "trl"
    assert find_trainer({"model_name_or_path": "m", "datasets": [], "wubble": 1}) == "trl"
    assert find_trainer(FACTORY) == "llama-factory"
    assert find_trainer({"base_model": "m", "datasets": []}) == "axolotl"
    # No key is TRL's alone, but neither of the others has them all.
    assert find_trainer({"model_name_or_path": "m", "datasets": [], "max_length": 8}) == "trl"
    for values, names in (
        ({"model_name_or_path": "m", "learning_rate": 1}, "TRL or LLaMA-Factory"),
        ({"stage": "sft", "use_peft": True}, "TRL or LLaMA-Factory"),
        ({"wubble": 1}, "TRL or LLaMA-Factory or axolotl"),
        ({**TRL, "beta": 0.2}, "TRL's DPO or TRL's KTO or TRL's ORPO"),
    ):
        with pytest.raises(AttnimgError, match="not clear") as caught:
            find_trainer(values)
        assert caught.value.code == "ambiguous-config"
        assert names.split(" or ")[0] in caught.value.what


def test_axolotls_older_names_become_the_present_ones() -> None:
    old = {"base_model": "m", "learning_rate": 1e-4, "flash_attention": True, "sdp_attention": True,
           "eager_attention": False, "evaluation_strategy": "epoch", "val_set_size": 0.1,
           "dataset_processes": 2, "batch_size": 8, "micro_batch_size": 2, "lora_mlp_kernel": True,
           "bfloat16": True, "unfrozen_parameters": None,
           "datasets": [{"path": "a.jsonl", "type": "alpaca"}]}  # fmt: skip
    found = convert(old)
    assert found.errors == ()
    assert found.values == {
        "base_model": "m", "learning_rate": 1e-4, "attn_implementation": "flash_attention_2",
        "eval_strategy": "epoch", "val_set_size": 0.1, "dataset_num_proc": 2,
        "gradient_accumulation_steps": 4, "micro_batch_size": 2, "bf16": True,
        "datasets": [{"path": "a.jsonl", "type": "alpaca"}],
    }  # fmt: skip
    answers = {answer.key: answer.answer for answer in found.answers}
    assert set(answers) == set(old)
    assert answers["lora_mlp_kernel"] == "hint-not-used"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        before = check_values(old, file="old.yaml").config
    after = check_values(dict(found.values), file="new.yaml").config
    assert before is not None
    assert after is not None
    known = set(Config.model_fields) - {"dataset_processes", "dataset_num_proc"}
    assert {k: getattr(before, k) for k in known} == {k: getattr(after, k) for k in known}


def test_axolotls_refusals_are_those_of_check() -> None:
    assert "add a line" in refused({"base_model": "m"}, trainer="axolotl")["learning_rate"]


FOREIGN = [
    None,
    True,
    -1,
    0.5,
    float("nan"),
    "",
    "a[/red]\x1b[31m",
    [],
    [1],
    {},
    {"a": {"b": 1}},
    "no",
]


STARTS: list[tuple[Trainer, dict[str, Any]]] = [
    *((trainer, TRL) for trainer in OF_TRL),
    ("axolotl", {"base_model": "m"}),
    ("llama-factory", FACTORY),
    ("llama-factory", {**FACTORY, "stage": "dpo", "dataset": "pairs"}),
    ("llama-factory", {**FACTORY, "stage": "kto", "dataset": "labels"}),
]


@pytest.mark.parametrize(("trainer", "start"), STARTS)
def test_any_value_is_converted_or_refused(trainer: Trainer, start: dict[str, Any]) -> None:
    draw = random.Random(trainer)
    known = [*Config.model_fields, "flash_attention", "plugins"]
    if trainer != "axolotl":
        known = [*key_table(trainer).keys, *key_table(trainer).renamed]
    for key in known:
        values = {**start, key: draw.choice(FOREIGN), draw.choice(known): draw.choice(FOREIGN)}
        found = convert(values, trainer)
        assert {answer.key for answer in found.answers} == set(values)
        if not found.errors:
            assert parse_yaml(found.text, name="x") == found.values
            assert not check_values(dict(found.values), file="x").errors


@pytest.mark.parametrize("trainer", OF_TRL)
@pytest.mark.filterwarnings("ignore:.*experimental")
def test_the_table_has_the_keys_and_defaults_of_the_installed_trl(trainer: Trainer) -> None:
    from transformers import TrainingArguments
    from trl import (
        DatasetMixtureConfig,
        DPOConfig,
        KTOConfig,
        ModelConfig,
        ScriptArguments,
        SFTConfig,
    )
    from trl.experimental.orpo import ORPOConfig

    script = {"trl": SFTConfig, "trl-dpo": DPOConfig, "trl-kto": KTOConfig, "trl-orpo": ORPOConfig}
    keys = key_table(trainer).keys
    own = {**fields(TrainingArguments)}
    for kind in (ScriptArguments, ModelConfig, DatasetMixtureConfig, script[trainer]):
        own |= fields(kind)
    assert {key for key, entry in keys.items() if not entry.removed} == own.keys()
    found = {key: keys[key].default for key in own if key != "optim"}
    assert found == {key: value for key, value in own.items() if key != "optim"}
    assert own["optim"] == "adamw_torch_fused"


def fields(kind: type) -> dict[str, Any]:
    found = {}
    for field in dataclasses.fields(kind):
        if field.init:
            default = field.default if field.default is not dataclasses.MISSING else None
            found[field.name] = getattr(default, "value", default)
    return found


@pytest.mark.parametrize("trainer", [*OF_TRL, "llama-factory"])
def test_each_key_that_is_done_names_our_keys(trainer: Trainer) -> None:
    for key, entry in key_table(trainer).keys.items():
        assert set(entry.to) <= Config.model_fields.keys(), key
        if entry.answer == "done":
            assert entry.to or entry.how, key
        else:
            assert entry.reason, key
            assert entry.do or entry.answer == "done-otherwise", key
