"""Fixtures of the data tests: a small real tokenizer, and a short way to write a config."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from attnimg.config.schema import Config

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content }}<|im_end|>\n{% endfor %}"
)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """A byte-level BPE tokenizer of about 300 tokens, with ChatML's special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["In the beginning was the Word.", "Define the word."], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        extra_special_tokens=["<|im_start|>"],
        chat_template=CHATML,
    )


@pytest.fixture
def json_lines(tmp_path: Path) -> Callable[..., str]:
    """Write records to a JSON Lines file and return its path."""

    def write(*records: object, name: str = "data.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return str(path)

    return write


@pytest.fixture
def run_on() -> Callable[..., Config]:
    """Configure a run on one dataset; keys of its entry begin with `spec_`."""

    def build(path: str | Path, type: str = "completion", **keys: Any) -> Config:
        entry = {key[5:]: keys.pop(key) for key in list(keys) if key.startswith("spec_")}
        return Config(datasets=[{"path": str(path), "type": type, **entry}], **keys)

    return build
