"""Compare tokenizers with those of axolotl's own function: ids, flags and special tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from axolotl.loaders.tokenizer import load_tokenizer as load_axolotls
from axolotl.utils.dict import DictDefault
from axolotl.utils.schemas.model import SpecialTokensConfig
from transformers import LlamaConfig, PreTrainedTokenizerFast

from attnimg.config.schema import Config
from attnimg.train.tokenizer import load_tokenizer

TEXTS = ["the sea", "<a>the<b> sea<c>", "a <A> the<x>sea<y>  the<turn>  sea<s></s><pad>", "x<end>"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a model whose tokenizer normalizes as Llama's, with reserved tokens."""
    from tokenizers import AddedToken, Tokenizer, models, normalizers, trainers

    place = tmp_path_factory.mktemp("tokens")
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁"), normalizers.Lowercase()]
    bpe.normalizer = normalizers.Sequence(steps)
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=special)
    bpe.train_from_iterator(["the sea and the ship", "a star on the road"], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken("<turn>", rstrip=True, special=True)]}
    )
    tokenizer.add_tokens(["<reserved_0>", "<reserved_1>"], special_tokens=True)
    tokenizer.save_pretrained(place)
    LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    ).save_pretrained(place)  # fmt: skip
    return place


@pytest.mark.parametrize(
    "keys",
    [
        pytest.param({}, id="no tokens"),
        pytest.param({"tokens": ["<a>", "<A>", "<b>"]}, id="tokens"),
        pytest.param({"tokens": ["sea", "<turn>"]}, id="tokens that the tokenizer has"),
        pytest.param({"special_tokens": {"pad_token": "<pad>"}}, id="a pad token"),
        pytest.param({"special_tokens": {"pad_token": "</s>"}}, id="an end token as pad token"),
        pytest.param({"special_tokens": {"unk_token": "<x>", "pad_token": "<pad>",
                                         "eos_token": "<end>", "bos_token": "<b>"}},
                     id="special tokens in another order"),
        pytest.param({"special_tokens": {"additional_special_tokens": ["<x>", "<turn>"]}},
                     id="additional special tokens"),
        pytest.param({"special_tokens": {"additional_special_tokens": ["<x>", "<y>"],
                                         "pad_token": "<pad>"}, "tokens": ["<a>", "<x>"]},
                     id="all of them"),
        pytest.param({"added_tokens_overrides": {"reserved": "<c>"}}, id="a renamed token"),
        pytest.param({"added_tokens_overrides": {"reserved": "<c>"}, "tokens": ["<a>"],
                      "special_tokens": {"eos_token": "<c>", "pad_token": "<pad>"}},
                     id="a renamed token as the end token"),
        pytest.param({"tokenizer_legacy": True, "tokenizer_type": "PreTrainedTokenizerFast"},
                     id="a class by name"),
    ],
)  # fmt: skip
def test_tokenizers_are_axolotls(folder: Path, tmp_path: Path, keys: dict[str, Any]) -> None:
    keys = dict(keys)
    if "added_tokens_overrides" in keys:
        plain = PreTrainedTokenizerFast.from_pretrained(folder)
        number = plain.convert_tokens_to_ids("<reserved_0>")
        keys["added_tokens_overrides"] = {number: "<c>"}
    given = dict(keys)
    if "special_tokens" in given:  # as axolotl's schema returns it
        model = SpecialTokensConfig(**given["special_tokens"])
        given["special_tokens"] = model.model_dump(exclude_none=True)
    cfg = DictDefault(base_model=str(folder), base_model_config=str(folder),
                      tokenizer_config=str(folder), output_dir=str(tmp_path), **given)  # fmt: skip
    wanted = load_axolotls(cfg)
    found = load_tokenizer(Config(base_model=str(folder), **keys), log=lambda _: None)
    assert found.get_vocab() == wanted.get_vocab()
    for text in TEXTS:
        assert found(text).input_ids == wanted(text).input_ids, text
    for name in ("bos_token", "eos_token", "unk_token"):
        assert getattr(found, name) == getattr(wanted, name)
    flags = {number: str(token.__getstate__())
             for number, token in found.added_tokens_decoder.items()}  # fmt: skip
    assert flags == {number: str(token.__getstate__())
                     for number, token in wanted.added_tokens_decoder.items()}  # fmt: skip
    if "pad_token" in keys.get("special_tokens", {}):
        assert found.pad_token == wanted.pad_token
