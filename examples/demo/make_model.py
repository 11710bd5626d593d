"""Make the small untrained model of the demo: its tokenizer, its chat template, its weights.

    python examples/demo/make_model.py FOLDER

The same call writes the same bytes. The tokenizer is trained on examples/data, so that its few
thousand tokens fit the text; the model is a Llama of two million weights, wide and shallow
because that learns most in a few minutes on a CPU.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DATA = Path(__file__).parents[1] / "data"
VOCAB_SIZE = 2048
SEED = 42

# ChatML, the form of most open chat models: each turn between two tokens of its own.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def texts() -> Iterator[str]:
    """Yield every text of examples/data, in the order of the files."""
    for name in ("devils_dictionary.jsonl", "kjv.jsonl"):
        with (DATA / name).open(encoding="utf-8") as lines:
            for line in lines:
                yield "\n".join(json.loads(line).values())


def make_tokenizer() -> Any:
    """Train a byte-level BPE tokenizer; <|im_end|> ends a document and a turn."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        extra_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
    )


def make_model(tokenizer: Any) -> Any:
    """Draw the weights of a small Llama with grouped-query attention."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def main() -> None:
    """Write model and tokenizer to the folder named on the command line."""
    from transformers.utils import logging

    parser = argparse.ArgumentParser(description="Make the untrained model of the demo.")
    parser.add_argument("folder", type=Path, help="where to write it")
    folder = parser.parse_args().folder
    logging.disable_progress_bar()
    tokenizer = make_tokenizer()
    make_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
