"""Train a tiny Llama on packed documents with accelerate, in a training loop of your own."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    ByT5Tokenizer,
    DataCollatorWithFlattening,
    LlamaConfig,
)

import attnimg

DATA = Path(__file__).parents[1] / "data" / "devils_dictionary.jsonl"


def main() -> None:
    """Train for 40 steps on 4 documents per step."""
    torch.manual_seed(0)
    tokenizer = ByT5Tokenizer()
    texts = [json.loads(line)["output"][:255] for line in DATA.open(encoding="utf-8")]
    examples = [{"input_ids": tokenizer(text)["input_ids"]} for text in texts[:160]]
    # It puts the documents of a batch into one row, with position_ids that start at 0 in each.
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    batches = DataLoader(examples, batch_size=4, collate_fn=collator)

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    choice = attnimg.select(config, packing=True, sequence_len=256, micro_batch_size=4)
    print(choice)

    with attnimg.use(choice):
        accelerator = Accelerator()
        model = AutoModelForCausalLM.from_config(config, attn_implementation=choice.implementation)
        model.to(accelerator.device)
        attnimg.check_packing(model, collator=collator)

        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
        for step, batch in enumerate(batches):
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            if step % 13 == 0:
                accelerator.print(f"step {step}: loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
