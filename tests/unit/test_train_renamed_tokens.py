"""Test that added_tokens_overrides renames tokens, and that a model is trained with them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from attnimg.errors import AttnimgError
from attnimg.train.tokenizer import load_tokenizer

sys.path.append(str(Path(__file__).parents[1] / "fixtures"))
import tiny_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a model whose tokenizer has two reserved tokens."""
    place = tmp_path_factory.mktemp("reserved")
    tokenizer = tiny_run.make_tokenizer(place / "model")
    tokenizer.add_tokens(["<reserved_0>", "<reserved_1>"], special_tokens=True)
    tokenizer.save_pretrained(place / "model")
    return place


def load(folder: Path, names: dict[int, str], **keys: Any) -> Any:
    config = tiny_run.config_for(folder, added_tokens_overrides=names, **keys)
    return load_tokenizer(config, log=lambda _: None)


def test_a_renamed_token_keeps_its_id_and_is_one_token(folder: Path, tmp_path: Path) -> None:
    plain = AutoTokenizer.from_pretrained(folder / "model")
    number = plain.convert_tokens_to_ids("<reserved_0>")
    tokenizer = load(folder, {number: "<|call|>"})
    tokenizer.save_pretrained(tmp_path)
    for found in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        assert len(found) == len(plain)
        assert found.convert_ids_to_tokens(number) == "<|call|>"
        assert number in found("the sea<|call|>the ship")["input_ids"]
        assert found("the sea<|call|>")["input_ids"] != plain("the sea<|call|>")["input_ids"]
        assert "<reserved_0>" not in found.get_vocab()
        assert found.decode([number], skip_special_tokens=False) == "<|call|>"
        assert found("the sea")["input_ids"] == plain("the sea")["input_ids"]
    # As the other keys on tokens, it does not need trained embeddings: the row is there.
    assert len(load(folder, {number: "<|call|>"}, eot_tokens=["<|call|>"])) == len(plain)


def test_a_token_that_is_not_free_or_a_name_that_is_taken_is_refused(folder: Path) -> None:
    plain = AutoTokenizer.from_pretrained(folder / "model")
    first, second = plain.convert_tokens_to_ids(["<reserved_0>", "<reserved_1>"])
    wrong = [
        {5: "<|call|>"},  # in the model's vocabulary
        {plain.eos_token_id: "<|call|>"},
        {len(plain): "<|call|>"},
        {first: "<reserved_1>"},
        {first: plain.convert_ids_to_tokens(40)},
    ]
    for names in wrong:
        with pytest.raises(AttnimgError) as caught:
            load(folder, names)
        assert (caught.value.code, caught.value.key) == ("bad-value", "added_tokens_overrides")
    assert len(load(folder, {first: "<|call|>", second: "<|end|>"})) == len(plain)
