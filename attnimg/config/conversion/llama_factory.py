"""Convert a config of `llamafactory-cli train` for the stages pt, sft, dpo and kto.

The meaning of each key is in data/convert/llama-factory.toml.
"""

from __future__ import annotations

from attnimg.config.conversion.draft import Draft, ReadRecords
from attnimg.config.conversion.llama_factory_data import convert_datasets, listed
from attnimg.config.conversion.llama_factory_preferences import STAGES, convert_preferences
from attnimg.config.conversion.training import convert_precision, convert_training

_ATTENTION = {"auto": None, "disabled": "eager", "sdpa": "sdpa", "fa2": "flash_attention_2",
              "fa3": "flash_attention_3"}  # fmt: skip


def convert_llama_factory(draft: Draft, *, file: str, records: ReadRecords) -> None:
    """Convert the keys of LLaMA-Factory whose value is not simply that of one of our keys.

    Args:
        draft: the conversion.
        file: the path of the config, beside which dataset_info.json may be.
        records: reads the records of a dataset.
    """
    stage, method = draft.get("stage"), draft.get("finetuning_type")
    if stage not in ("sft", "pt", *STAGES):
        draft.refuse("stage", why="attnimg trains the stages pt, sft, dpo and kto",
                     do="set stage: sft")  # fmt: skip
    if method not in ("lora", "full"):
        draft.refuse("finetuning_type", why="attnimg trains with lora, qlora or full",
                     do="set finetuning_type: lora, or full")  # fmt: skip
    draft.answer("stage")
    convert_preferences(draft)
    draft.put("base_model", draft.get("model_name_or_path"), "model_name_or_path")
    revision = draft.get("model_revision")
    draft.put("revision_of_model", None if revision == "main" else revision, "model_revision")
    if draft.old.get("do_train") is False:
        draft.refuse(
            "do_train", why="the config does not request training", do="set do_train: true"
        )
    name = str(draft.get("flash_attn"))
    if name in _ATTENTION:
        draft.put("attn_implementation", _ATTENTION[name], "flash_attn")
    else:
        draft.refuse("flash_attn", why=f"needed one of {', '.join(_ATTENTION)}",
                     do="set flash_attn: auto")  # fmt: skip
    _adapter(draft, lora=method == "lora")
    convert_training(draft)
    _schedule(draft)
    _precision(draft)
    draft.put("gradient_checkpointing", not draft.get("disable_gradient_checkpointing"),
              "disable_gradient_checkpointing", "gradient_checkpointing")  # fmt: skip
    _lengths(draft, stage=stage)
    convert_datasets(draft, file=file, records=records)


def _adapter(draft: Draft, *, lora: bool) -> None:
    bits = draft.get("quantization_bit")
    names = ("lora_rank", "lora_alpha", "lora_dropout", "lora_target", "additional_target",
             "use_rslora", "use_dora", "loraplus_lr_ratio", "loraplus_lr_embedding")  # fmt: skip
    if bits not in (None, 4, 8) or (bits and draft.get("quantization_method") != "bnb"):
        draft.refuse("quantization_bit", why="attnimg quantizes to 4 or 8 bits with bitsandbytes",
                     do="set quantization_bit: 4, and quantization_method: bnb")  # fmt: skip
    draft.answer("quantization_method", reason="" if bits else "nothing is quantized")
    if not lora:
        draft.answer("finetuning_type", reason="full: no adapter")
        for key in names:
            draft.answer(key, reason="finetuning_type is not lora, so it has no effect")
        return
    draft.put("adapter", "qlora" if bits == 4 else "lora", "finetuning_type", "quantization_bit")
    draft.put("load_in_8bit", True if bits == 8 else None, "quantization_bit")
    sources = ("quantization_type", "double_quantization")
    if bits == 4:
        kwargs = {
            "bnb_4bit_quant_type": draft.get("quantization_type"),
            "bnb_4bit_use_double_quant": bool(draft.get("double_quantization")),
        }
        draft.put("bnb_config_kwargs", kwargs, *sources)
    rank = draft.get("lora_rank")
    draft.put("lora_r", rank, "lora_rank")
    alpha = draft.get("lora_alpha") or (rank * 2 if type(rank) is int else None)
    draft.put("lora_alpha", alpha, "lora_alpha")
    draft.put("lora_dropout", draft.get("lora_dropout"), "lora_dropout")
    target = listed(draft.get("lora_target"))
    if target == ["all"]:
        draft.put("lora_target_linear", True, "lora_target")
    else:
        draft.put("lora_target_modules", target, "lora_target")
    draft.put("lora_modules_to_save", listed(draft.get("additional_target")), "additional_target")
    draft.put("peft_use_rslora", draft.get("use_rslora") or None, "use_rslora")
    draft.put("peft_use_dora", draft.get("use_dora") or None, "use_dora")
    ratio = draft.get("loraplus_lr_ratio")
    draft.put("loraplus_lr_ratio", ratio, "loraplus_lr_ratio")
    if ratio:
        draft.put("loraplus_lr_embedding", draft.get("loraplus_lr_embedding"),
                  "loraplus_lr_embedding")  # fmt: skip


def _schedule(draft: Draft) -> None:
    if draft.get("lr_scheduler_type") == "warmup_stable_decay":
        why = (
            "LLaMA-Factory keeps the rate for a third of the steps, whose number is not known here"
        )
        kwargs = draft.get("lr_scheduler_kwargs")
        if not (
            isinstance(kwargs, dict) and {"num_stable_steps", "num_decay_steps"} <= set(kwargs)
        ):
            do = "set lr_scheduler_kwargs with num_stable_steps and num_decay_steps"
            draft.refuse("lr_scheduler_type", why=why, do=do)


def _precision(draft: Draft) -> None:
    pure, adapter = bool(draft.get("pure_bf16")), draft.values.get("adapter")
    if pure and adapter:
        why = "attnimg keeps the weights of an adapter in float32"
        draft.refuse("pure_bf16", why=why, do="set bf16: true in place of pure_bf16")
    elif pure:
        draft.put("bf16", "full", "pure_bf16", "bf16")
        draft.answer("fp16", reason="pure_bf16 is true")
    else:
        draft.answer("pure_bf16", reason="false")
        convert_precision(draft, bf16=bool(draft.get("bf16")), weights="float32", sources=("bf16",))


def _lengths(draft: Draft, *, stage: str) -> None:
    length, neat = draft.get("cutoff_len"), bool(draft.get("neat_packing"))
    packing = draft.old.get("packing")
    packing = neat or (stage == "pt" if packing is None else packing)
    if stage in STAGES:
        for key in ("packing", "neat_packing", "train_on_prompt"):
            draft.answer(key, reason=f"the stage {stage} does not read it")
        neat = packing = False
    if packing and not neat:
        why = "documents in a row attend to each other; attnimg isolates documents"
        if stage == "pt":
            why += "; without packing, each document is a row"
        do = "set packing: false" + (", or neat_packing: true" if stage == "sft" else "")
        draft.refuse("packing", why=why, do=do)
    comment = "longer records are cut at the end; LLaMA-Factory also shortens prompts"
    if packing and type(length) is int:
        length -= 1
        comment = f"cutoff_len - 1, as LLaMA-Factory packs; {comment}"
    draft.put("sequence_len", length, "cutoff_len", comment=comment)
    draft.put("sample_packing", neat or None, "neat_packing", "packing")
    if neat:
        draft.comments["sample_packing"] = (
            "documents in a row do not attend to each other, as with neat_packing; rows are "
            "filled in another order"
        )
    draft.put("excess_length_strategy", "truncate")
    if stage not in STAGES:
        draft.put("train_on_inputs", bool(draft.get("train_on_prompt")), "train_on_prompt")
    streaming = draft.get("streaming")
    draft.put("streaming", streaming or None, "streaming")
    if streaming:
        draft.put("streaming_multipack_buffer_size", draft.get("buffer_size"), "buffer_size")
    else:
        draft.answer("buffer_size", reason="streaming is false")
    size = draft.get("val_size")
    draft.put("val_set_size", size or None, "val_size",
              reason="the documents are split differently from LLaMA-Factory")  # fmt: skip
    if draft.get("mix_strategy") != "concat":
        draft.refuse("mix_strategy", why="attnimg concatenates and shuffles datasets",
                     do="set mix_strategy: concat")  # fmt: skip
    draft.answer("mix_strategy")
