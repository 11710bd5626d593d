"""Write the inputs of the demo: 90 short definitions, a tokenizer, and an untrained model.

    python examples/demo/prepare.py FOLDER

The same call writes the same bytes. The model is a Llama of two million weights in two wide
layers, a shape that learns fast on a CPU; the tokenizer's vocabulary is learned from the whole
dictionary.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

DICTIONARY = Path(__file__).parents[1] / "data" / "devils_dictionary.jsonl"
# Words with a definition of one short paragraph that reads well today.
WORDS = """
    abatis, absurdity, accident, accuse, actually, adder, admiration, affliction, air,
    ambidextrous, antipathy, appetite, architect, armor, back, barometer, battle, befriend,
    bigot, bottle-nosed, commendation, consolation, degradation, deliberation, dependent,
    diaphragm, discriminate, distance, education, encomiast, envy, expostulation,
    freebooter, habeas corpus, happiness, hash, historian, husband, hypocrite, imagination,
    impenitence, improvidence, injury, irreligion, labor, lawyer, lecturer, lock-and-key,
    loquacity, magnet, mayonnaise, merchant, metropolis, minor, monday, more, neighbor,
    nobleman, nonsense, observatory, omen, opportunity, otherwise, pedestrian, phoenix,
    plagiarism, plaudits, plebiscite, poetry, politeness, predicament, prejudice,
    prescription, prevaricator, prophecy, rapacity, rational, radicalism, rear, reasonable,
    reconciliation, recreation, resident, restitutions, reverence, riot, scribbler, selfish,
    truce, wit
"""
VOCAB_SIZE = 2048
SEED = 42

# ChatML, the format of most open chat models: a token before and after each turn.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def read_dictionary() -> list[dict[str, str]]:
    """Return the records of the dictionary: instruction, input, output."""
    with DICTIONARY.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def chosen_definitions() -> list[dict[str, str]]:
    """Return the records of WORDS.

    Raises:
        ValueError: a word is not in the dictionary.
    """
    wanted = [f"Define {word.strip()}." for word in WORDS.replace("\n", " ").split(",")]
    records = {record["instruction"]: record for record in read_dictionary()}
    if missing := [text for text in wanted if text not in records]:
        raise ValueError(f"not in the dictionary: {missing}")
    return [records[text] for text in wanted]


def make_tokenizer() -> Any:
    """Return a byte-level BPE tokenizer; <|im_end|> ends a document and a turn."""
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
    texts = ("\n".join(record.values()) for record in read_dictionary())
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        extra_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
    )


def make_model(tokenizer: Any) -> Any:
    """Return a small Llama with grouped-query attention and random weights."""
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
    """Write the definitions, the tokenizer and the model to the folder of the command line."""
    from transformers.utils import logging

    parser = argparse.ArgumentParser(description="Write the inputs of the demo.")
    parser.add_argument("folder", type=Path, help="where to write it")
    folder = parser.parse_args().folder
    logging.disable_progress_bar()
    tokenizer = make_tokenizer()
    make_model(tokenizer).save_pretrained(folder / "untrained")
    tokenizer.save_pretrained(folder / "untrained")
    chats = [
        {
            "messages": [
                {"role": "user", "content": record["instruction"]},
                {"role": "assistant", "content": record["output"]},
            ]
        }
        for record in chosen_definitions()
    ]
    lines = "".join(json.dumps(chat, ensure_ascii=False) + "\n" for chat in chats)
    (folder / "definitions.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main()
