"""Ask a model of the demo for definitions: `python examples/demo/ask.py MODEL_FOLDER`."""

from __future__ import annotations

import os
import sys
import textwrap

QUESTIONS = ("Define admiration.", "Define omen.", "Define politeness.", "Define neighbor.")
NEW_TOKENS = 40
# No definition is longer; an untrained model repeats words until NEW_TOKENS.
LONGEST_LINE = 110


def main(folder: str) -> None:
    """Print the most probable answer to each question."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    for question in QUESTIONS:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        ).input_ids
        written = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        answer = tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
        text = textwrap.shorten(answer, LONGEST_LINE, placeholder=" ...")
        sys.stdout.write(f"    {question:20} {text}\n")


if __name__ == "__main__":
    main(sys.argv[1])
