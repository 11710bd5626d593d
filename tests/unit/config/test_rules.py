"""Test that `check` finds everything that `train` refuses on values alone, and all at once."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import attnimg
from attnimg.config import check_values, keys
from attnimg.config.schema import Config
from attnimg.facts import Finding

TRAIN = Path(attnimg.__file__).parent / "train"
TEXT = {"path": "a.jsonl", "type": "completion"}
CHAT = {"path": "a.jsonl", "type": "chat_template"}
ALPACA = {"path": "a.jsonl", "type": "alpaca"}
LORA, QLORA = {"adapter": "lora"}, {"adapter": "qlora"}
DECAY = {"lr_scheduler": "warmup_stable_decay"}


def errors(**given: Any) -> tuple[Finding, ...]:
    values = {"base_model": "m", "learning_rate": 1e-4, "datasets": [TEXT], **given}
    return check_values(values, file="x.yaml").errors


def chat(**keys: Any) -> dict[str, Any]:
    return {"datasets": [CHAT | keys]}


# What is wrong: the config, and the code and the key of its only error.
WRONG: dict[str, tuple[dict[str, Any], str, str]] = {
    "a tracker that is turned on and off": (
        {"report_to": ["wandb"], "use_wandb": False}, "bad-value", "report_to"),
    "a tracker that attnimg does not have": (
        {"report_to": ["wandb", "comet_ml"]}, "bad-value", "report_to"),
    "all trackers": ({"report_to": "all"}, "bad-value", "report_to"),
    "a class that transformers does not have": (
        {"model_type": "MambaLMHeadModel"}, "not-causal-lm", "model_type"),
    "a class of another task": (
        {"model_type": "LlamaForSequenceClassification"}, "not-causal-lm", "model_type"),
    "a class without a task": ({"model_type": "LlamaModel"}, "not-causal-lm", "model_type"),
    "a class that loads any task": ({"model_type": "AutoModel"}, "not-causal-lm", "model_type"),
    "a tokenizer that transformers does not have": (
        {"tokenizer_type": "NoSuchTokenizer"}, "bad-value", "tokenizer_type"),
    "a model as the tokenizer": (
        {"tokenizer_type": "LlamaForCausalLM"}, "bad-value", "tokenizer_type"),
    "another kind of model": (
        {"model_config": {"model_type": "llama"}}, "bad-value", "model_config"),
    "two ways to say when to evaluate": (
        {"eval_steps": 1, "evals_per_epoch": 1, "val_set_size": 0.1},
        "bad-value", "evals_per_epoch"),
    "two ways to say when to save": (
        {"save_steps": 1, "saves_per_epoch": 1}, "bad-value", "saves_per_epoch"),
    "steps under strategy epoch": (
        {"save_steps": 1, "save_strategy": "epoch"}, "bad-value", "save_strategy"),
    "evaluations an epoch under strategy no": (
        {"evals_per_epoch": 1, "eval_strategy": "no", "val_set_size": 0.1},
        "bad-value", "eval_strategy"),
    "steps of evaluations without data": ({"eval_steps": 5}, "bad-value", "eval_steps"),
    "a strategy of evaluations without data": (
        {"eval_strategy": "epoch"}, "bad-value", "eval_strategy"),
    "early stopping without data": (
        {"early_stopping_patience": 2}, "bad-value", "early_stopping_patience"),
    "early stopping where data is turned off": (
        {"early_stopping_patience": 2, "eval_steps": 2, "val_set_size": 0},
        "bad-value", "early_stopping_patience"),
    "early stopping without evaluations": (
        {"early_stopping_patience": 2, "val_set_size": 0.1, "eval_strategy": "no"},
        "bad-value", "eval_strategy"),
    "a plateau without evaluations": (
        {"lr_scheduler": "reduce_lr_on_plateau", "val_set_size": 0.1, "eval_strategy": "no"},
        "bad-value", "eval_strategy"),
    "a plateau without data": (
        {"lr_scheduler": "reduce_lr_on_plateau"}, "bad-value", "lr_scheduler"),
    "a size and documents for validation": (
        {"val_set_size": 0.1, "test_datasets": [TEXT]}, "bad-value", "val_set_size"),
    "all documents for validation": ({"val_set_size": 1}, "bad-value", "val_set_size"),
    "half a document for validation": ({"val_set_size": 2.5}, "bad-value", "val_set_size"),
    "a cosine's minimum on a line": (
        {"cosine_min_lr_ratio": 0.1, "lr_scheduler": "linear"},
        "bad-value", "cosine_min_lr_ratio"),
    "a quadratic warmup on a line": (
        {"lr_quadratic_warmup": True, "lr_scheduler": "linear"},
        "bad-value", "lr_quadratic_warmup"),
    "a lowest rate on a line": (
        {"eta_min": 1e-6, "lr_scheduler": "linear"}, "bad-value", "eta_min"),
    "two lowest rates": (
        {"eta_min": 1e-6, "cosine_min_lr_ratio": 0.1}, "bad-value", "eta_min"),
    "a lowest rate above the highest": ({"eta_min": 1e-3}, "bad-value", "eta_min"),
    "a constant end without a lowest rate": (
        {"cosine_constant_lr_ratio": 0.8}, "bad-value", "cosine_constant_lr_ratio"),
    "a constant end at a rate of zero": (
        {"cosine_constant_lr_ratio": 0.8, "cosine_min_lr_ratio": 0.0},
        "bad-value", "cosine_constant_lr_ratio"),
    "a quadratic warmup and a lowest rate": (
        {"lr_quadratic_warmup": True, "cosine_min_lr_ratio": 0.1},
        "bad-value", "cosine_min_lr_ratio"),
    "arguments that a constant end does not read": (
        {"cosine_min_lr_ratio": 0.1, "cosine_constant_lr_ratio": 0.8,
         "lr_scheduler_kwargs": {"num_cycles": 1}}, "bad-value", "lr_scheduler_kwargs"),
    "one and a half steps of warmup": ({"warmup_steps": 1.5}, "bad-value", "warmup_steps"),
    "noise below zero": ({"neftune_noise_alpha": -1}, "bad-value", "neftune_noise_alpha"),
    "the best model without data": (
        {"load_best_model_at_end": True}, "bad-value", "load_best_model_at_end"),
    "the best model without evaluations": (
        {"load_best_model_at_end": True, "val_set_size": 0.1, "eval_strategy": "no"},
        "bad-value", "eval_strategy"),
    "the best model without checkpoints": (
        {"load_best_model_at_end": True, "val_set_size": 0.1, "save_strategy": "no"},
        "bad-value", "save_strategy"),
    "the best checkpoint without data": (
        {"save_strategy": "best"}, "bad-value", "save_strategy"),
    "the best checkpoint in an interval": (
        {"save_strategy": "best", "save_steps": 5, "val_set_size": 0.1},
        "bad-value", "save_strategy"),
    "the model of another metric": (
        {"load_best_model_at_end": True, "val_set_size": 0.1, "metric_for_best_model": "bleu"},
        "bad-value", "metric_for_best_model"),
    "the highest loss": (
        {"load_best_model_at_end": True, "val_set_size": 0.1, "greater_is_better": True},
        "bad-value", "greater_is_better"),
    "LoRA+ without an adapter": ({"loraplus_lr_ratio": 16}, "bad-value", "loraplus_lr_ratio"),
    "two rates of embeddings": (
        {"embedding_lr": 1e-5, "embedding_lr_scale": 0.5}, "bad-value", "embedding_lr_scale"),
    "a rate of embeddings with LoRA+": (
        LORA | {"embedding_lr": 1e-5, "loraplus_lr_ratio": 16}, "bad-value", "embedding_lr"),
    "an optimizer of axolotl": ({"optimizer": "muon"}, "bad-value", "optimizer"),
    "a schedule of axolotl": ({"lr_scheduler": "rex"}, "bad-value", "lr_scheduler"),
    "an optimizer of nobody": ({"optimizer": "adamm"}, "bad-value", "optimizer"),
    "a share of the run above 1": ({"save_steps": 1.5}, "bad-value", "save_steps"),
    "a number in quotes": ({"adam_epsilon": "1e-8"}, "bad-value", "adam_epsilon"),
    "two warmups": ({"warmup_steps": 5, "warmup_ratio": 0.1}, "bad-value", "warmup_ratio"),
    "no steps and a share of warmup": (
        {"warmup_steps": 0, "warmup_ratio": 0.1}, "bad-value", "warmup_ratio"),
    "a schedule without its argument": (DECAY, "bad-value", "lr_scheduler_kwargs"),
    "a cosine without its minimum": (
        {"lr_scheduler": "cosine_with_min_lr", "lr_scheduler_kwargs": {"num_cycles": 1}},
        "bad-value", "lr_scheduler_kwargs"),
    "an unknown schedule": ({"lr_scheduler": "cosin"}, "bad-value", "lr_scheduler"),
    "an unknown optimizer": ({"optimizer": "adam"}, "bad-value", "optimizer"),
    "4 bit without an adapter": ({"load_in_4bit": True}, "bad-value", "load_in_4bit"),
    "4 and 8 bit": (
        LORA | {"load_in_4bit": True, "load_in_8bit": True}, "bad-value", "load_in_8bit"),
    "qlora in 8 bit": ({"adapter": "qlora", "load_in_8bit": True}, "bad-value", "load_in_8bit"),
    "LoRA on the output layer": (
        LORA | {"lora_target_modules": ["q_proj", "lm_head"]},
        "bad-value", "lora_target_modules"),
    "LoRA on the output layer alone": (
        LORA | {"lora_target_modules": "lm_head"}, "bad-value", "lora_target_modules"),
    "a template beside mistral-common": (
        {"tokenizer_use_mistral_common": True, "chat_template": "chatml", "datasets": [CHAT]},
        "bad-value", "chat_template"),
    "an entry's template beside mistral-common": (
        {"tokenizer_use_mistral_common": True, **chat(chat_template="chatml")},
        "bad-value", "datasets[0].chat_template"),
    "layers of an expression": (
        LORA | {"peft_layers_to_transform": [0], "lora_target_modules": ".*q_proj"},
        "bad-value", "peft_layers_to_transform"),
    "layers of full names": (
        LORA | {"peft_layers_to_transform": [0], "lora_target_modules": ["self_attn.q_proj"]},
        "bad-value", "peft_layers_to_transform"),
    "ranks by no expression": (
        LORA | {"lora_rank_pattern": {"q_proj(": 4}}, "bad-value", "lora_rank_pattern"),
    "a list of layers without numbers": (
        LORA | {"peft_layers_pattern": ["layers"]}, "bad-value", "peft_layers_pattern"),
    "an adapter that starts with changes of the model": (
        LORA | {"peft_init_lora_weights": "pissa"}, "bad-value", "peft_init_lora_weights"),
    "new tokens for mistral-common": (
        {"tokenizer_use_mistral_common": True, "tokens": ["<a>"]}, "bad-value", "tokens"),
    "other roles in mistral-common": (
        {"tokenizer_use_mistral_common": True, **chat(roles_to_train=["user"])},
        "bad-value", "datasets[0].roles_to_train"),
    "an argument that the optimizer does not read": (
        {"optimizer": "adamw_torch", "optim_args": {"momentum": 0.9}}, "bad-value", "optim_args"),
    "an argument that is a key": (
        {"optimizer": "sgd", "optim_args": "momentum=0.9,weight_decay=0.1"},
        "bad-value", "optim_args"),
    "an argument of another type": (
        {"optimizer": "sgd", "optim_args": {"momentum": "high"}}, "bad-value", "optim_args"),
    "a number for a flag": (
        {"optimizer": "rmsprop", "optim_args": {"centered": 1}}, "bad-value", "optim_args"),
    "arguments that are no pairs": (
        {"optimizer": "sgd", "optim_args": "momentum"}, "bad-value", "optim_args"),
    "nesterov without momentum": (
        {"optimizer": "sgd", "optim_args": {"nesterov": True}}, "bad-value", "optim_args"),
    "two groups of one name": (
        {"lr_groups": [{"name": "a", "modules": ["q_proj"], "lr": 1e-5}] * 2},
        "bad-value", "lr_groups"),
    "a group without modules": (
        {"lr_groups": [{"name": "a", "modules": [], "lr": 1e-5}]}, "bad-value", "lr_groups"),
    "rates of groups and of B": (
        LORA | {"lr_groups": [{"name": "a", "modules": ["q_proj"], "lr": 1e-5}],
                "loraplus_lr_ratio": 16}, "bad-value", "lr_groups"),
    "float16 without loss scaling": (
        {"float16": True, "bf16": False}, "unsupported-key", "float16"),
    "batches split over processes": (
        {"accelerator_config": {"split_batches": True}}, "bad-value", "accelerator_config"),
    "a setting that accelerate lacks": (
        {"accelerator_config": {"even": True}}, "bad-value", "accelerator_config"),
    "steps of accelerate": (
        {"accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 2}}},
        "bad-value", "accelerator_config"),
    "a synchronization that is no flag": (
        {"accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": 2}}},
        "bad-value", "accelerator_config"),
    "renamed tokens in mistral-common": (
        {"tokenizer_use_mistral_common": True, "added_tokens_overrides": {5: "<a>"}},
        "bad-value", "added_tokens_overrides"),
    "a renamed token that is no number": (
        {"added_tokens_overrides": {"first": "<a>"}}, "bad-value", "added_tokens_overrides"),
    "experts without 4 bits": (
        LORA | {"quantize_moe_experts": True}, "bad-value", "quantize_moe_experts"),
    "quantized experts that are sharded": (
        QLORA | {"quantize_moe_experts": True, "fsdp": ["full_shard"]},
        "bad-value", "quantize_moe_experts"),
    "weights beside an adapter": (
        LORA | {"unfrozen_parameters": ["^lm_head"]}, "bad-value", "unfrozen_parameters"),
    "weights by no expression": (
        {"unfrozen_parameters": ["^lm_head("]}, "bad-value", "unfrozen_parameters"),
    "rows from the end to the start": (
        {"unfrozen_parameters": ["^lm_head.weight$[5:2]"]}, "bad-value", "unfrozen_parameters"),
    "weights under reentrant checkpoints": (
        {"unfrozen_parameters": ["^lm_head"],
         "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        "bad-value", "unfrozen_parameters"),
    "rows of sharded weights": (
        {"unfrozen_parameters": ["^lm_head.weight$[:5]"], "fsdp": ["full_shard"]},
        "bad-value", "unfrozen_parameters"),
    "rows of partitioned weights": (
        {"unfrozen_parameters": ["^lm_head.weight$[:5]"], "deepspeed": "zero3.json"},
        "bad-value", "unfrozen_parameters"),
    "an adapter on random weights": (
        LORA | {"reinit_weights": True}, "bad-value", "reinit_weights"),
    "a type of 4 bits that is not known": (
        QLORA | {"bnb_config_kwargs": {"bnb_4bit_quant_type": "nf5"}},
        "bad-value", "bnb_config_kwargs"),
    "a flag of 4 bits that is a number": (
        QLORA | {"bnb_config_kwargs": {"bnb_4bit_use_double_quant": 1}},
        "bad-value", "bnb_config_kwargs"),
    "an unknown argument of 4 bits": (
        QLORA | {"bnb_config_kwargs": {"bnb_4bit_quant_kind": "nf4"}},
        "bad-value", "bnb_config_kwargs"),
    "weights that stay in mxfp4": (
        LORA | {"model_quantization_config": "Mxfp4Config"},
        "bad-value", "model_quantization_config_kwargs"),
    "an unknown quantization": (
        {"model_quantization_config": "GPTQConfig"}, "bad-value", "model_quantization_config"),
    "arguments of no quantization": (
        {"model_quantization_config_kwargs": {"dequantize": True}},
        "bad-value", "model_quantization_config_kwargs"),
    "an unknown way to compute experts": (
        {"experts_implementation": "deep_ep"}, "bad-value", "experts_implementation"),
    "fields of the model by both names": (
        {"model_config": {"a": 1}, "overrides_of_model_config": {"a": 2}},
        "bad-value", "model_config"),
    "fields of the model in a list": ({"model_config": ["a"]}, "bad-value", "model_config"),
    "offloading without checkpoints": (
        {"activation_offloading": "legacy"}, "bad-value", "activation_offloading"),
    "offloading in a backward pass inside another": (
        {"gradient_checkpointing": "offload",
         "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        "bad-value", "gradient_checkpointing_kwargs"),
    "offloading to the moon": (
        {"gradient_checkpointing": True, "activation_offloading": "moon"},
        "bad-value", "activation_offloading"),
    "two precisions": ({"fp16": True, "bf16": True}, "bad-value", "fp16"),
    "two kinds of data": ({"pretraining_dataset": [TEXT]}, "bad-value", "pretraining_dataset"),
    "a typo of a type": (
        {"datasets": [{"path": "a", "type": "alpacca"}]}, "bad-value", "datasets[0].type"),
    "a typo of the type of the second test set": (
        {"test_datasets": [TEXT, {"path": "a", "type": "chat"}]},
        "bad-value", "test_datasets[1].type"),
    "no dataset": ({"datasets": None}, "missing-key", "datasets"),
    "a typo beside a good role": (
        chat(roles={"coder": ["bot"]}, roles_to_train=["assistant", "usr"]),
        "bad-value", "datasets[0].roles_to_train"),
    "a typo of a role": (chat(roles_to_train=["asistant"]),
                         "bad-value", "datasets[0].roles_to_train"),
    "no split's words": (
        {"datasets": [TEXT | {"split": "train[a:"}]}, "bad-value", "datasets[0].split"),
    "jinja without a template": (
        {"chat_template": "jinja", "datasets": [CHAT]}, "bad-value", "chat_template"),
    "an entry's jinja without a template": (
        {**chat(chat_template="jinja"), "chat_template_jinja": "{{ x }}"},
        "bad-value", "datasets[0].chat_template"),
    "an unknown template": (
        {"chat_template": "nonsense", "datasets": [CHAT]}, "bad-value", "chat_template"),
    "an entry's unknown template": (
        {"datasets": [CHAT, CHAT | {"chat_template": "nonsense"}]},
        "bad-value", "datasets[1].chat_template"),
    "a template in place of a name": (
        {"chat_template": "{{ messages }}", "datasets": [CHAT]}, "bad-value", "chat_template"),
    "a file in place of a name": (
        {"chat_template": "a.jinja", "datasets": [CHAT]}, "bad-value", "chat_template"),
    "a private field of the model": (
        {"model_config": {"_name_or_path": "a"}}, "bad-value", "model_config"),
    "the backend by a private field": (
        {"model_config": {"_attn_implementation": "eager"}}, "bad-value", "model_config"),
    "the precision as a field of the model": (
        {"model_config": {"dtype": "float16"}}, "bad-value", "model_config"),
    "a token as a field of the model": (
        {"model_config": {"eos_token_id": 3}}, "bad-value", "model_config"),
    "a system message without conversations": (
        {"default_system_message": "Be brief."}, "bad-value", "default_system_message"),
    "a system message for alpaca": (
        {"default_system_message": "Be brief.", "datasets": [CHAT, ALPACA]},
        "unsupported-key", "default_system_message"),
}  # fmt: skip

# What is right, and close to it.
RIGHT: dict[str, dict[str, Any]] = {
    "a share of the run": {"save_steps": 0.5, "eval_steps": 0.25, "val_set_size": 0.1},
    "steps and no times an epoch": {"eval_steps": 1, "evals_per_epoch": 0, "val_set_size": 0.1},
    "strategy no of saving": {"save_strategy": "no"},
    "strategy no of evaluating": {"eval_strategy": "no", "val_set_size": 0.1},
    "steps under strategy steps": {"save_steps": 5, "save_strategy": "steps"},
    "early stopping with documents": {"early_stopping_patience": 2, "test_datasets": [TEXT]},
    "a plateau with documents": {"lr_scheduler": "reduce_lr_on_plateau", "val_set_size": 8},
    "a cosine's minimum": {"cosine_min_lr_ratio": 0.0},
    "offloading": {
        "gradient_checkpointing": True,
        "activation_offloading": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    },
    "the older offloading": {"gradient_checkpointing": "offload"},
    "no offloading": {"activation_offloading": False},
    "no warmup": {"warmup_steps": 0},
    "a share of warmup": {"warmup_ratio": 0.1},
    "the best model": {
        "load_best_model_at_end": True,
        "val_set_size": 0.1,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
    },
    "the best checkpoint": {"save_strategy": "best", "val_set_size": 0.1},
    "LoRA+": LORA | {"loraplus_lr_ratio": 16, "loraplus_lr_embedding": "1e-5"},
    "a rate of embeddings": {"embedding_lr": 1e-5},
    "no best model": {"load_best_model_at_end": False, "save_strategy": "no"},
    "a share of warmup as steps": {"warmup_steps": 0.1},
    "a lowest rate": {"eta_min": 1e-6},
    "a quadratic warmup": {"lr_quadratic_warmup": True, "cosine_min_lr_ratio": 0.0},
    "a constant end": {"cosine_constant_lr_ratio": 0.8, "cosine_min_lr_ratio": 0.1},
    "what is off, on a line": {
        "lr_scheduler": "linear",
        "lr_quadratic_warmup": False,
        "cosine_constant_lr_ratio": 0,
    },
    "a schedule with its argument": DECAY | {"lr_scheduler_kwargs": {"num_decay_steps": 3}},
    "4 bit with an adapter": {"adapter": "qlora", "load_in_4bit": True},
    "mistral-common": {"tokenizer_use_mistral_common": True, **chat(roles_to_train=["gpt"])},
    "mistral-common for other types": {"tokenizer_use_mistral_common": True, "datasets": [ALPACA]},
    "a template without mistral-common": {
        "tokenizer_use_mistral_common": False,
        "chat_template": "chatml",
        "datasets": [CHAT],
    },
    "layers of all linear layers": LORA
    | {"peft_layers_to_transform": [0], "lora_target_modules": "all-linear"},
    "some layers": LORA
    | {
        "peft_layers_to_transform": [0, 3],
        "peft_layers_pattern": "layers",
        "peft_init_lora_weights": "gaussian",
        "lora_rank_pattern": {"q_proj": 4},
    },
    "quantized experts": QLORA | {"quantize_moe_experts": True},
    "quantized experts that are trained": QLORA
    | {
        "quantize_moe_experts": True,
        "lora_target_linear": True,
        "lora_target_parameters": ["experts.down_proj"],
    },
    "arguments of an optimizer": {
        "optimizer": "sgd",
        "optim_args": {"momentum": 0.9, "nesterov": True, "dampening": 0},
    },
    "arguments of an optimizer as text": {
        "optimizer": "rmsprop",
        "optim_args": "momentum=0.9, alpha = 0.5,centered=True",
    },
    "no arguments of an optimizer": {"optim_args": ""},
    "random rounding": {
        "optimizer": "adamw_torch_8bit",
        "optim_args": {"bf16_stochastic_round": True},
    },
    "rates of groups": {
        "lr_groups": [
            {"name": "attention", "modules": ["q_proj", "k_proj"], "lr": "1e-5"},
            {"name": "mlp", "modules": ["up_proj"], "lr": 1e-6},
        ]
    },
    "float16 beside fp16": {"float16": True, "fp16": True, "bf16": False},
    "float16 beside bf16": {"float16": True},
    "settings of accelerate": {
        "accelerator_config": {
            "gradient_accumulation_kwargs": {"sync_each_batch": True},
            "split_batches": False,
            "dispatch_batches": None,
            "even_batches": False,
            "non_blocking": True,
        }
    },
    "renamed tokens": {"added_tokens_overrides": {128041: "<a>", "128042": "<b>"}},
    "quantized experts in 8 bits": LORA | {"quantize_moe_experts": True, "load_in_8bit": True},
    "weights and rows": {
        "unfrozen_parameters": ["^lm_head.weight$[:5]", "model.layers.2[0-9]+.mlp"],
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    },
    "weights without rows, sharded": {
        "unfrozen_parameters": "^lm_head.weight$",
        "fsdp": ["full_shard"],
    },
    "random weights": {"reinit_weights": True},
    "a class that chooses": {"model_type": "AutoModelForCausalLM"},
    "a class of text": {"model_type": "LlamaForCausalLM", "tokenizer_type": "LlamaTokenizer"},
    "a class of images and text": {"model_type": "Llama4ForConditionalGeneration"},
    "a tokenizer by its earlier name": {"tokenizer_type": "CodeLlamaTokenizerFast"},
    "a tokenizer that needs a package": {"tokenizer_type": "BartphoTokenizer"},
    "the base of tokenizers": {"tokenizer_type": "PreTrainedTokenizerFast"},
    "no class": {"model_type": "", "tokenizer_type": ""},
    "arguments of 4 bits": QLORA
    | {
        "bnb_config_kwargs": {
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_quant_type": "fp4",
            "bnb_4bit_compute_dtype": "float32",
        }
    },
    "mxfp4 that is dequantized": {
        "model_quantization_config": "Mxfp4Config",
        "model_quantization_config_kwargs": {"dequantize": True},
    },
    "a way to compute experts": {"experts_implementation": "batched_mm"},
    "fields of the model": {"model_config": {"output_router_logits": True}},
    "weights that are no layers": LORA | {"lora_target_parameters": ["experts.down_proj"]},
    "the output layer saved whole": LORA
    | {"lora_target_modules": ["q_proj"], "lora_modules_to_save": ["lm_head"]},
    "a regular expression": LORA | {"lora_target_modules": r".*(?<!lm_head)_proj"},
    "names of roles in records": chat(roles_to_train=["gpt", "user"]),
    "roles of the entry, and their names": chat(
        roles={"coder": ["bot"]}, roles_to_train=["coder", "bot"]
    ),
    "no role": chat(roles_to_train=[]),
    "roles that alpaca does not read": {"datasets": [ALPACA | {"roles_to_train": ["usr"]}]},
    "a template by name": chat(chat_template="llama3"),
    "one of a tokenizer's templates": chat(chat_template="tool_use"),
    "the tokenizer's template": chat(chat_template="tokenizer_default_fallback_chatml"),
    "a template that no dataset uses": {"chat_template": "nonsense"},
    "a template in an entry": chat(chat_template="jinja", chat_template_jinja="{{ messages }}"),
    "a template in a file": {"chat_template_jinja": "a.jinja", "datasets": [CHAT]},
    "fields of the model's layers": {
        "model_config": {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}
    },
    "jinja that is not used": {"chat_template": "jinja"},
    "jinja with a template": {"chat_template": "jinja", "chat_template_jinja": "x", **chat()},
    "a system message": {"default_system_message": "Be brief.", "datasets": [CHAT, TEXT]},
    "a dataset for pretraining": {"datasets": None, "pretraining_dataset": "a.jsonl"},
    "a type that follows from the data": {"datasets": [{"path": "a.jsonl"}]},
}


@pytest.mark.parametrize("name", WRONG)
def test_what_train_refuses_on_values_is_refused_by_check(name: str) -> None:
    values, code, key = WRONG[name]
    (found,) = errors(**values)
    assert (found.code, found.key) == (code, key)
    assert found.what
    assert found.why
    assert found.do


# Keys without effect: the config, and the keys that `check` warns of.
UNUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "evaluations an epoch without data": ({"evals_per_epoch": 1}, ["evals_per_epoch"]),
    "evaluations where data is turned off": (
        {"evals_per_epoch": 4, "val_set_size": 0, "eval_strategy": "steps"},
        ["evals_per_epoch", "eval_strategy"]),
    "steps where data is turned off": ({"eval_steps": 4, "val_set_size": 0.0}, ["eval_steps"]),
    "evaluations with data": ({"evals_per_epoch": 4, "val_set_size": 0.1}, []),
    "evaluations with documents": ({"evals_per_epoch": 4, "test_datasets": [TEXT]}, []),
    "no evaluations": ({"evals_per_epoch": 0, "val_set_size": 0, "eval_strategy": "no"}, []),
    "an adapter that starts without an effect": (
        {"adapter": "lora", "peft_init_lora_weights": False}, ["peft_init_lora_weights"]),
    "a rounding that never begins": (
        {"qat": {"weight_dtype": "int4", "fake_quant_after_n_steps": 9}, "max_steps": 9}, ["qat"]),
    "a rounding that begins": (
        {"qat": {"weight_dtype": "int4", "fake_quant_after_n_steps": 8}, "max_steps": 9}, []),
    "a rounding from the first step": ({"qat": {"weight_dtype": "int4"}, "max_steps": 9}, []),
    "the default of an adapter": ({"adapter": "lora", "peft_init_lora_weights": True}, []),
}  # fmt: skip


@pytest.mark.parametrize("name", UNUSED)
def test_check_warns_of_keys_without_effect(name: str) -> None:
    values, unused = UNUSED[name]
    values = {"base_model": "m", "learning_rate": 1e-4, "datasets": [TEXT], **values}
    found = check_values(values, file="x.yaml")
    assert found.ok
    assert [(warning.code, warning.key) for warning in found.warnings] == [
        ("without-effect", key) for key in unused
    ]


def test_a_wrong_val_set_size_is_not_taken_for_none() -> None:
    values = {"base_model": "m", "learning_rate": 1e-4, "datasets": [TEXT],
              "val_set_size": "much", "evals_per_epoch": 2}  # fmt: skip
    assert check_values(values, file="x.yaml").warnings == ()


@pytest.mark.parametrize("name", RIGHT)
def test_right_values_pass(name: str) -> None:
    assert errors(**RIGHT[name]) == ()


def test_another_name_of_a_key_sets_it() -> None:
    values = {
        "base_model": "m",
        "learning_rate": 1e-4,
        "datasets": [TEXT],
        "model_config": {"num_hidden_layers": 2},
        "type_of_model": "LlamaForCausalLM",
    }
    found = check_values(values, file="x").config
    assert found is not None
    assert found.overrides_of_model_config == {"num_hidden_layers": 2}
    assert found.model_type == "LlamaForCausalLM"


def test_an_experts_kernel_that_is_not_used_is_a_hint() -> None:
    given = {"base_model": "m", "learning_rate": 1e-4, "datasets": [TEXT]}
    for name, codes in (("scattermoe", ["hint-not-used"]), ("eager", [])):
        found = check_values({**given, "experts_implementation": name}, file="x")
        assert found.ok
        assert [warning.code for warning in found.warnings] == codes


def test_all_errors_are_found_at_once() -> None:
    names = ["two ways to say when to save", "steps of evaluations without data", "two warmups",
             "a cosine's minimum on a line", "4 bit without an adapter", "two precisions",
             "no split's words", "a system message without conversations"]  # fmt: skip
    wrong = [WRONG[name] for name in names]
    values = {key: value for found_, _, _ in wrong for key, value in found_.items()}
    found = [(error.code, error.key) for error in errors(**values)]
    assert Counter(found) == Counter((code, key) for _, code, key in wrong)


@pytest.mark.parametrize(
    ("values", "first", "do"),
    [
        ({"optimizer": "lion_pytorch"}, "lion_8bit", "set optimizer: lion_8bit"),
        ({"optimizer": "adamw_apex_fused"}, "adamw_torch_fused",
         "set optimizer: adamw_torch_fused"),
        ({"optimizer": "muon"}, "", "set optimizer: adamw_torch_fused"),
        ({"lr_scheduler": "one_cycle"}, "cosine", "set lr_scheduler: cosine"),
        ({"bf16": "half"}, "", "set bf16: auto"),
        ({"special_tokens": {"pad": "x"}}, "pad_token",
         "write pad_token in place of pad in special_tokens"),
        ({"weight_decay": "0.1"}, "", "set weight_decay: 0.1, without quotes"),
        ({"sample_packing": "true"}, "", "set sample_packing: true, without quotes"),
        ({"weight_decay": "much"}, "", "set weight_decay to a valid value"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_answered_with_the_nearest_one(
    values: dict[str, Any], first: str, do: str
) -> None:
    (found,) = errors(**values)
    assert f"needed one of {first}" in found.why or not first
    assert found.do.startswith(do)


def test_a_value_of_a_key_that_takes_flags_lists_them() -> None:
    (found,) = errors(bf16="half")
    assert "true, false" in found.why


@pytest.mark.parametrize("dataset_list", ["datasets", "test_datasets"])
def test_an_error_in_an_entry_hides_no_other(dataset_list: str) -> None:
    entries = [{"path": "a", "type": "sharegpt", "conversation": "chatml", "split": "train["},
               {"path": "b", "type": "bradley_terry.llama3"}, {"path": "c", "type": "nonsense"},
               {"type": "completion"}, CHAT | {"roles": 3, "roles_to_train": ["usr"]},
               {"path": "d", "type": {"unknown": 1}, "shards": "two"},
               CHAT | {"roles_to_train": ["usr"], "zzz": 1}]  # fmt: skip
    found = {error.key for error in errors(**{dataset_list: entries}, val_set_size=1)}
    assert found >= {f"{dataset_list}{key}" for key in (
        "[0].conversation", "[0].type", "[0].split", "[1].type", "[2].type", "[3].path",
        "[4].roles", "[5].type.unknown", "[5].shards", "[6].roles_to_train",
        "[6].zzz")}  # fmt: skip
    # Roles that the entry may define are not known where they have no valid value.
    assert f"{dataset_list}[4].roles_to_train" not in found


def test_a_system_message_without_conversations_is_found_beside_unknown_keys() -> None:
    entries = [{"path": "a", "type": "sharegpt", "conversation": "chatml"},
               {"path": "b", "type": "nonsense"}]  # fmt: skip
    found = {error.key for error in errors(datasets=entries, default_system_message="x")}
    assert found >= {"datasets[0].conversation", "datasets[0].type", "datasets[1].type",
                     "default_system_message"}  # fmt: skip


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"val_set_size": "much", "eval_steps": 5}, "val_set_size"),
        ({"adapter": "lorra", "load_in_4bit": True}, "adapter"),
        ({"lr_scheduler": "cosin", "cosine_min_lr_ratio": 0.1}, "lr_scheduler"),
        ({"datasets": 3, "default_system_message": "Be brief."}, "datasets"),
    ],
)
def test_a_wrong_value_is_not_taken_for_an_absent_one(values: dict[str, Any], key: str) -> None:
    (found,) = errors(**values)
    assert (found.code, found.key) == ("bad-value", key)


SPLITS = (
    "train", "a.b", "train[:3]", "train[-5:]", "train[10%:20%]", "train[:1_000] + test",
    "train[:100%](closest)", "train[:50%](pct1_dropremainder)", "validation+test", "train[:]",
    "train[", "train[a:", "train[3]", "train test", "+", "train+", "train[:101%]",
    "train[:5](closest)", "train[:50%](up)", "a-b", "train[::2]", "train[:-101%]", "train[1%:5]",
    f"train[:{'9' * 5000}%]",
)  # fmt: skip


@pytest.mark.parametrize("split", SPLITS, ids=range(len(SPLITS)))
def test_a_split_is_judged_as_datasets_judges_it(split: str) -> None:
    import datasets

    try:
        datasets.ReadInstruction.from_spec(split)
    except ValueError:
        right = False
    else:
        right = True
    assert (errors(datasets=[TEXT | {"split": split}]) == ()) is right


# What each refusal of attnimg/train needs besides the values of the config. A refusal is named by
# its function, and by its code or the function that builds it; x2 where there are two.
NEEDS = {
    "model": """
        _check_loaded bad_model, _empty_group bad_value, _freeze_rows bad_value,
        _load_errors bad_model, _load_errors pickled-weights, _no_match bad_value,
        _no_weight bad_value, _not_causal_error not-causal-lm, _quantization_error
        quantized-checkpoint, _refuse_embeddings bad_value, _refused_field bad_value,
        _require_adapter _quantization_error x4, _require_layers bad_value,
        _require_patterns bad_value, _require_scale _quantization_error x3,
        _resize_embeddings bad_value, _unknown_field _refused_field, _unknown_names
        bad_value, _untrained_error bad-value, add_adapter
        bad_value, _require_field _refused_field x2, _require_field _unknown_field,
        _require_effect _refused_field x3, _refused_values _refused_field, require_tied
        _refused_field, unfit_fields bad_value, _check_loaded unfit_fields, _load_errors
        unfit_fields, create_optimizer_with_rates
        _empty_group, freeze_except _no_weight, judge_hub_layers local-kernel, judge_layers
        liger-unknown-model, judge_positions positions-short, judge_quantization
        _quantization_error x4, list_hub_tasks bad_value, list_tasks liger-unknown-model,
        require_causal_type _not_causal_error,
        require_embeddings _untrained_error, require_experts bad_value, require_finite
        weights-not-finite, require_known_weights _quantization_error x2,
        require_modules_to_save _unknown_names, require_trainable AttnimgError,
        require_trained_tokens _untrained_error, require_trained_weights bad_value,
        require_fitting_layers bad_value x4,
        resolve_parameters _unknown_names, resolve_parameters bad_value, resolve_targets
        _no_match, resolve_targets _unknown_names
    """,
    "added tokens": """
        _not_free bad_value, _rename_tokens _not_free, _rename_tokens bad_value
    """,
    "a saved adapter": """
        _find_folder bad-model, _read_settings _unreadable, _require_adaptable_loss bad_value,
        _unfit bad_value, _unreadable bad-model, load_saved_weights _unfit x2,
        require_same_layers bad_value, with_saved_adapter _unreadable, with_saved_adapter
        bad_value x2
    """,
    "tokenizer": """
        __init__ bad-value x2, _load_mistral not-installed, _require_single_tokens
        bad-value, _tokenizer_errors bad-model, choose_chat_template bad-value,
        choose_chat_template missing-key, load_tokenizer bad-model, make_encoder bad-value,
        make_encoder missing-key
    """,
    "data": """
        __call__ _template_error, __call__ bad_record x2, _answer bad_record, _completions
        bad_record, _cut_documents bad_file, _encode bad_record, _fit bad_file, _gather_rows
        bad-data, _input bad_record, _label bad_record, _load_part _no_documents,
        _local_file bad-value, _local_file bad_file, _locate _not_found, _message
        bad_record, _messages bad_record x3, _missing_type missing-key, _nectar bad_record
        x2, _no_documents empty-dataset, _orpo_chat bad_record x2, _reasoning bad_record,
        _refuse_media bad_record, _refuse_unpackable bad-data, _render bad_record,
        _require_answer bad_record, _require_supported bad_record, _require_written
        bad_record, _role bad_record x2, _split_validation bad-value, _system bad_record,
        _template_error bad-value, _template_error bad_file, _tokenize bad_record, _turn
        bad_record x5, _whole_answer bad_record, _with_system_column bad_record, bad_file
        bad-data, bad_record AttnimgError, find_sources _missing_type, find_sources
        empty-dataset, make missing-key, make_on_disk not-writable, parse_prompt bad_record,
        parse_segments bad_record x2, parse_tokens bad_record x3, parse_turns bad_record,
        read_content bad_record, read_flag bad_record x2, read_records bad_file x2,
        read_records bad_record, read_tool_calls bad_record, read_tools bad_record,
        read_trained_parts bad_record x3, require_column bad_record, require_text
        bad_record, split_thinking bad_record, _require_same_prompt bad_record,
        equal_answers bad_file, preference_warnings bad_file
    """,
    "files": """
        _check_options bad-value, _check_reachable file-missing, _check_reachable
        hub-unreachable, _check_size bad-data, _conversion_error pickled-weights,
        _find_files _not_found, _find_files bad-value, _folder_source bad-value,
        _folder_source file-missing, hash_files bad_model, _load _conversion_error x2,
        _load _unreadable, _load unsupported-key, _no_checkpoint no-checkpoint, _not_empty
        output-dir-not-empty, _not_found file-missing, _output_dir_error AttnimgError,
        _paths_in bad_file, _read_jinja file-missing, _readme_splits bad-value,
        _require_checkpoint _no_checkpoint, _require_files bad_model, _require_shards
        bad_model x2, _require_weights bad_model, _require_writable _output_dir_error,
        _require_writable _not_writable, _not_writable _output_dir_error,
        _require_no_other_file _output_dir_error,
        _resume_from_named _not_empty, _resume_from_named damaged_error, _resume_from_named
        output-dir-not-empty, _resume_from_newest damaged_error, _resume_point
        _no_checkpoint, _unreadable bad_file, _unreadable file-missing, bad_model bad-model,
        check_file_type bad-value, check_file_type bad_file x2, check_model_files bad_model
        x3, check_output_dir _no_checkpoint, check_output_dir _not_empty, check_regular
        bad_file, damaged_error damaged-checkpoint, find_rows bad-value, find_rows
        empty-dataset, find_source bad_file, folder_splits bad-value x2, load_errors
        damaged-checkpoint, load_saved bad_file, require_safetensors pickled-weights,
        require_same_identity resume-differs, require_steps resume-past-end, split_names
        bad-value, stream_hub _unreadable, stream_hub bad-value
    """,
    "machine": """
        _check_home_paths bad_value, _check_optimizer bad_value, _check_processes bad_value,
        _check_shared_memory out-of-memory, check_limits AttnimgError, check_limits
        bad_value
    """,
    "packages": """
        _check_compile bad_value, _check_optimizer not-installed, _require_packages
        _quantization_error, _try_checkpointing bad_value, _try_schedule bad_value,
        check_limits not-installed, create_optimizer_with_rates bad_value, find_class
        bad_value, judge_hub_layers not-installed, judge_layers not-installed,
        require_package not-installed, require_package_of_qat not-installed, require_versions
        trainer-not-installed
    """,
    "a server and its login": """
        _require_mlflow_server unavailable, _require_wandb_login tracker-unavailable,
        _require_wandb_login unavailable, create_repository hub_unavailable, hub_unavailable
        hub-unavailable, on_train_begin unavailable, push_model hub_unavailable, require_hub
        hub_unavailable x4, unavailable tracker-unavailable
    """,
    "environment": """
        _check_address_space bad-environment, _open_store bad-environment,
        _require_device bad-environment,
        _require_context context-differs,
        environment_error bad-environment, require_agreement bad-environment, require_group
        bad-environment, require_parsable bad-environment
    """,
    "processes": """
        _acquire_lock output-dir-busy, _check_other_rank rank-lost, _check_other_rank
        rank-mismatch, _lost_rank_error rank-lost, _wait_for_all_ranks _lost_rank_error x3,
        lost_rank_errors _lost_rank_error, require_same_on_all_ranks rank-mismatch
    """,
    "the run": """
        _exits_as_errors exited, _get_grad_norm _not_finite_error, _high_loss_error loss-too-high,
        _loss_differs_error loss-differs, _maybe_log_save_evaluate _high_loss_error,
        _model_raised_error model-raised, _not_finite_error not-finite, _raise_changes
        process-state, _record_results
        _wrong_kernel_error, _run_engine out-of-memory, _wrong_kernel_error
        kernel-wrong-at-run, check_log_probs loss-differs, compute_likelihood
        _loss_differs_error, prove_run AttnimgError, replace_by_hub_layers not-applied,
        replace_proven_layers not-applied, require_equal _loss_differs_error, require_equal
        _model_raised_error, run _model_raised_error, on_pre_optimizer_step not-applied,
        simulate_quantization not-applied,
        write_errors AttnimgError
    """,
}


def test_found_of_the_schema_that_are_refused_by_name_are_listed() -> None:
    assert keys.key_answers().keys() & Config.model_fields.keys() == keys.IN_SCHEMA


ERRORS = ("AttnimgError", "KernelError")


def functions_in(path: Path) -> list[ast.FunctionDef]:
    tree = ast.parse(path.read_text("utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def refusals() -> Counter[str]:
    """Return the refusals in the source of train, with their number in each function."""
    functions = [node for path in sorted(TRAIN.rglob("*.py")) for node in functions_in(path)]
    builders = {
        function.name
        for function in [*functions, *functions_in(TRAIN.parent / "errors.py")]
        if isinstance(function.returns, ast.Name) and function.returns.id in ERRORS
    }
    found = Counter[str]()
    for function in functions:
        for node in ast.walk(function):
            if not isinstance(node, ast.Call):
                continue
            called = node.func
            name = called.id if isinstance(called, ast.Name) else ""
            if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name):
                name = called.attr if called.value.id == "self" else ""
            if name in ERRORS or name in builders:
                codes = [k.value for k in node.keywords if k.arg == "code"]
                code = codes[0].value if codes and isinstance(codes[0], ast.Constant) else name
                found[f"{function.name} {code}"] += 1
    return found


def test_each_refusal_of_train_needs_more_than_values() -> None:
    known = Counter[str]()
    for place in ",".join(NEEDS.values()).split(","):
        name, _, count = " ".join(place.split()).partition(" x")
        known[name] += int(count or 1)
    unknown = refusals() - known
    assert not unknown, "what does it need? On values alone it belongs to attnimg/config/rules.py"
    assert not known - refusals(), "these are no longer in the source"
