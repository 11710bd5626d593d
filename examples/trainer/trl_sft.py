"""Fine-tune a tiny Llama with TRL's SFTTrainer: packed rows, LoRA and AttnimgCallback."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, ByT5Tokenizer, LlamaConfig
from trl import SFTConfig, SFTTrainer

from attnimg import AttnimgCallback

DATA = Path(__file__).parents[1] / "data" / "devils_dictionary.jsonl"


def main(output_dir: str) -> None:
    """Train for 40 steps on 4 rows of up to 256 tokens per step."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    tokenizer = ByT5Tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    texts = load_dataset("json", data_files=str(DATA), split="train[:400]")
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_config(config),
        args=SFTConfig(
            output_dir=output_dir,
            packing=True,
            max_length=256,
            per_device_train_batch_size=4,
            max_steps=40,
            learning_rate=1e-2,
            bf16=False,
            logging_steps=13,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=texts.rename_column("output", "text").select_columns(["text"]),
        processing_class=tokenizer,
        peft_config=LoraConfig(target_modules="all-linear", modules_to_save=["lm_head"]),
        callbacks=[AttnimgCallback()],
    )
    trainer.train()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output-dir", default="outputs/trl_sft")
    main(parser.parse_args().output_dir)
