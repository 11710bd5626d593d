"""Test that tokens and special_tokens get the ids and the flags that axolotl gives them.

tests/axolotl/test_tokens.py compares them with axolotl's own function.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerFast

from attnimg.errors import AttnimgError
from attnimg.train.tokenizer import load_tokenizer

sys.path.append(str(Path(__file__).parents[1] / "fixtures"))
import tiny_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a model whose tokenizer normalizes as Llama's, and drops capitals."""
    from tokenizers import Tokenizer, models, normalizers, trainers

    place = tmp_path_factory.mktemp("tokens")
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁"), normalizers.Lowercase()]
    bpe.normalizer = normalizers.Sequence(steps)
    bpe.train_from_iterator(
        tiny_run.sentences(50),
        trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"]),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken("<turn>", rstrip=True, special=True)]}
    )
    tokenizer.save_pretrained(place / "model")
    return place


def load(folder: Path, **keys: Any) -> Any:
    return load_tokenizer(tiny_run.config_for(folder, **keys), log=lambda _: None)


def test_ids_follow_axolotls_order_not_the_configs(folder: Path) -> None:
    first = len(AutoTokenizer.from_pretrained(folder / "model"))
    found = load(
        folder,
        special_tokens={
            "additional_special_tokens": ["<x>", "<y>"], "pad_token": "<pad>", "eos_token": "<end>",
        },
        tokens=["<a>", "<x>"],
    )  # fmt: skip
    wanted = ["<end>", "<pad>", "<a>", "<x>", "<y>"]
    assert [found.convert_tokens_to_ids(text) for text in wanted] == [*range(first, first + 5)]
    assert (found.eos_token, found.pad_token) == ("<end>", "<pad>")
    special = set(found.all_special_tokens)
    assert {"<end>", "<pad>", "<x>", "<y>", "<turn>"} <= special
    assert "<a>" not in special
    assert found.decode(found("the<a>sea<x>").input_ids, skip_special_tokens=True).count("<") == 1


@pytest.mark.parametrize("key", ["tokens", "special_tokens"])
def test_a_token_is_found_before_the_text_is_normalized(
    folder: Path, tmp_path: Path, key: str
) -> None:
    value: Any = ["<New>"] if key == "tokens" else {"eos_token": "<New>"}
    found = load(folder, **{key: value})
    found.save_pretrained(tmp_path)
    for tokenizer in (found, AutoTokenizer.from_pretrained(tmp_path)):
        number = tokenizer.convert_tokens_to_ids("<New>")
        the, sea = tokenizer("the").input_ids, tokenizer("sea").input_ids
        assert tokenizer("the<New>sea").input_ids == [*the, number, *sea]
        assert number not in tokenizer("the<new>sea").input_ids


def test_a_token_that_the_tokenizer_has_gets_axolotls_flags(folder: Path) -> None:
    plain = AutoTokenizer.from_pretrained(folder / "model")
    assert plain("<turn>  sea").input_ids == plain("<turn>sea").input_ids
    found = load(folder, special_tokens={"additional_special_tokens": ["<turn>"]})
    assert len(found) == len(plain)
    assert found("<turn>  sea").input_ids != found("<turn>sea").input_ids


@pytest.mark.parametrize("place", [16, 100, 2000, None], ids=str)
def test_a_damaged_file_of_a_tokenizer_is_an_error_in_words(
    folder: Path, tmp_path: Path, place: int | None
) -> None:
    shutil.copytree(folder, tmp_path / "run")
    file = tmp_path / "run/model/tokenizer.json"
    whole = file.read_bytes()
    if place is None:
        assert load(tmp_path / "run")
        return
    file.write_bytes(whole[:place] + b"null{" + whole[place:])
    with pytest.raises(AttnimgError) as caught:
        load(tmp_path / "run")
    assert (caught.value.code, caught.value.key) == ("bad-model", "base_model")
