"""Show what a model writes: `python examples/demo/sample.py MODEL_FOLDER`."""

from __future__ import annotations

import os
import sys

PROMPTS = ("And the LORD said unto", "In the beginning", "Blessed are")
NEW_TOKENS = 28


def main(folder: str) -> None:
    """Print a continuation of each prompt, sampled with a fixed seed."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    for prompt in PROMPTS:
        torch.manual_seed(1)
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        written = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=True,
            temperature=0.7,
            pad_token_id=tokenizer.eos_token_id,
        )
        text = tokenizer.decode(written[0], skip_special_tokens=True)
        sys.stdout.write(f"    {' '.join(text.split())}\n")


if __name__ == "__main__":
    main(sys.argv[1])
