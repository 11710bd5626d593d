"""Test that the keys of a chat_template entry give axolotl's labels, from its wheel."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from chat_labels import PLACE, tokenizer

from attnimg.config.schema import Config, DatasetSpec
from attnimg.train.data.sources import Source
from attnimg.train.data.types import choose_parser, make_encoder

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}"
    "{{ message.content }}<|im_end|>\n{% endfor %}"
)
# Contents that have the same tokens alone as in a conversation, as axolotl assumes.
WORDS = ("Yes.", "Is it?", "The king", "spoke at", "night.", "Go.", "naïve", "안녕", "x=1;")
SETTINGS: list[dict[str, Any]] = [
    {},
    {"train_on_eos": "none"},
    {"train_on_eos": "last"},
    {"train_on_eos": "all"},
    {"train_on_eot": "none"},
    {"train_on_eot": "last"},
    {"train_on_eot": "all"},
    {"train_on_eos": "none", "train_on_eot": "turn"},
    {"roles_to_train": ["user"]},
    {"drop_system_message": True},
]


@pytest.fixture(scope="module")
def label(axolotl_modules: None) -> Callable[..., Any]:
    from axolotl.prompt_strategies.chat_template import load
    from axolotl.utils.dict import DictDefault

    def theirs(keys: dict[str, Any], record: dict[str, Any], tokens: Any) -> Any:
        cfg = DictDefault({"sequence_len": 4096, "train_on_inputs": False,
                           "eot_tokens": ["<|im_end|>"]})  # fmt: skip
        spec = {"chat_template_jinja": TEMPLATE, "chat_template": "jinja", **keys}
        found = load(tokens, cfg, DictDefault(spec)).tokenize_prompt(record)
        return list(found["input_ids"]), list(found["labels"])

    return theirs


def ours(keys: dict[str, Any], record: dict[str, Any], tokens: Any) -> Any:
    spec = DatasetSpec(path="d", type="chat_template", chat_template_jinja=TEMPLATE, **keys)
    parsed = choose_parser(spec)(record, PLACE)
    assert parsed is not None
    config = Config(datasets=[spec], eot_tokens=["<|im_end|>"])
    encode = make_encoder(Source(key="datasets[0]", spec=spec, kind="files"), config, tokens)
    return encode([(PLACE, parsed)])[0]


def talk(pick: random.Random, *, detail: bool) -> list[dict[str, Any]]:
    """Return turns with flags, and with parts of the answers that are trained or not."""
    turns = [{"role": "system", "content": "Be brief."}] if pick.random() < 0.3 else []
    for _ in range(pick.randint(1, 3)):
        for role in ("user", "assistant"):
            text = " ".join(pick.choices(WORDS, k=pick.randint(1, 6)))
            turn: dict[str, Any] = {"role": role, "content": text}
            if detail and role == "assistant":
                cuts = sorted(pick.sample(range(1, len(text)), k=min(3, len(text) - 1)))
                bounds = [0, *cuts, len(text)]
                turn["detail"] = [
                    {"begin_offset": a, "end_offset": b - 1, "train": pick.random() < 0.5}
                    for a, b in pairwise(bounds)
                    if pick.random() < 0.8
                ]
            elif pick.random() < 0.3:
                turn["use"] = pick.random() < 0.5
            turns.append(turn)
    return turns


@pytest.mark.parametrize("kind", ["byte-level", "byte-level, NFC"])
@pytest.mark.parametrize("keys", SETTINGS, ids=str)
def test_flags_and_ends_are_labelled_as_by_axolotl(
    label: Callable[..., Any], kind: str, keys: dict[str, Any]
) -> None:
    tokens, pick = tokenizer(kind, (TEMPLATE,)), random.Random(7)
    keys = {"message_field_training": "use", **keys}
    for _ in range(40):
        record = {"messages": talk(pick, detail=False)}
        assert ours(keys, record, tokens) == label(keys, record, tokens), record


@pytest.mark.parametrize("kind", ["byte-level", "byte-level, NFC"])
def test_parts_are_labelled_as_by_axolotl(label: Callable[..., Any], kind: str) -> None:
    tokens, pick = tokenizer(kind, (TEMPLATE,)), random.Random(7)
    keys = {"message_field_training_detail": "detail"}
    for _ in range(200):
        record = {"messages": talk(pick, detail=True)}
        assert ours(keys, record, tokens) == label(keys, record, tokens), record


@pytest.mark.parametrize("reasoning", [True, False])
@pytest.mark.parametrize("opening", ["<think>", "<reasoning>", "<|begin_of_thought|>"])
def test_reasoning_in_tags_is_labelled_as_by_axolotl(
    label: Callable[..., Any], opening: str, reasoning: bool
) -> None:
    tokens = tokenizer("byte-level", (TEMPLATE,))
    closing = opening.replace("<", "</", 1).replace("</|begin", "<|end")
    answer = f"{opening}\nThe king {closing}\n\nYes." if reasoning else "Yes."
    messages = [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": answer}]
    found = ours({"split_thinking": True}, {"messages": messages}, tokens)
    ids, labels = label({"split_thinking": True}, {"messages": messages}, tokens)
    assert found[0] == ids
    # attnimg also trains the tag that opens the reasoning, which the model generates.
    assert all(a == b for a, b in zip(found[1], labels, strict=True) if b != -100)
    assert "king" in tokens.decode(ids) or not reasoning
