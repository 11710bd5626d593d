"""Train a tiny Llama on packed documents with transformers' Trainer and AttnimgCallback."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

from transformers import (
    AutoModelForCausalLM,
    ByT5Tokenizer,
    DataCollatorWithFlattening,
    LlamaConfig,
    Trainer,
    TrainingArguments,
)

from attnimg import AttnimgCallback

DATA = Path(__file__).parents[1] / "data" / "devils_dictionary.jsonl"


def main(output_dir: str) -> None:
    """Train for 40 steps on 4 documents per step."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    tokenizer = ByT5Tokenizer()
    texts = [json.loads(line)["output"][:255] for line in DATA.open(encoding="utf-8")]
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    trainer = Trainer(
        model=AutoModelForCausalLM.from_config(config),
        args=TrainingArguments(
            output_dir=output_dir,
            per_device_train_batch_size=4,
            max_steps=40,
            learning_rate=3e-3,
            logging_steps=13,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=[{"input_ids": tokenizer(text)["input_ids"]} for text in texts[:160]],
        # It puts the documents of a batch into one row, with position_ids that start at 0 in each.
        data_collator=DataCollatorWithFlattening(return_flash_attn_kwargs=True),
        callbacks=[AttnimgCallback(sequence_len=256)],
    )
    trainer.train()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output-dir", default="outputs/transformers_trainer")
    main(parser.parse_args().output_dir)
