"""Labels with the chat templates that axolotl's wheel brings, whatever they are."""

from __future__ import annotations

import os
import re
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from chat_labels import CALL, TOKENIZERS, TOOL, answer, learnt, tokenizer, user

from attnimg.errors import AttnimgError
from attnimg.train.data.chat import ChatEncoder

SYSTEM = {"role": "system", "content": "sysword"}
RESULT = {"role": "tool", "name": "weather", "tool_call_id": "abcdefghi", "content": "toolword"}
# A conversation, and the words that must be trained; no other may be.
CONVERSATIONS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "single": ({"messages": [user("userone"), answer("answone")]}, ["answone"]),
    "multi-turn": (
        {"messages": [user("userone"), answer("answone"), user("usertwo"), answer("answtwo")]},
        ["answone", "answtwo"],
    ),
    "system": ({"messages": [SYSTEM, user("userone"), answer("answone")]}, ["answone"]),
    "tags": (
        {"messages": [user("userone"), answer("<think>\nanswtwo\n</think>\n\nanswone")]},
        ["answone", "answtwo"],
    ),
    "weights": (
        {"messages": [user("userone"), answer("userthree", weight=0), user("usertwo"),
                      answer("answtwo")]},
        ["answtwo"],
    ),
    "tools": (
        {"messages": [user("userone"), {"role": "assistant", "tool_calls": [CALL]}, RESULT,
                      answer("answone")], "tools": [TOOL]},
        ["Paris", "answone"],
    ),
}  # fmt: skip
OTHERS = re.compile("user(one|two|three)|sysword|toolword")


@cache
def templates() -> dict[str, str]:
    wheels = list(Path(os.environ["WHEELS"]).glob("axolotl-*.whl"))
    if not wheels:
        pytest.skip("the folder WHEELS holds no axolotl: run `make test/templates`")
    with zipfile.ZipFile(wheels[0]) as archive:
        return {
            Path(name).stem: archive.read(name).decode()
            for name in archive.namelist()
            if "/chat_templates/templates/" in name and name.endswith(".jinja")
        }


def trained(name: str, tokens: str, record: dict[str, Any]) -> str | None:
    """What is trained with a template; None where it refuses the record, by its line."""
    every = templates()
    encode = ChatEncoder(tokenizer(tokens, tuple(every.values())), every[name])
    try:
        return "|".join(learnt(encode, record))
    except AttnimgError as error:
        return None if "data.jsonl, line 7" in str(error) else str(error)


@pytest.mark.parametrize("kind", CONVERSATIONS)
def test_each_template_trains_the_answers_alone_or_is_refused(kind: str) -> None:
    record, words = CONVERSATIONS[kind]
    refused = set[str]()
    for name in templates():
        for tokens in TOKENIZERS:
            text = trained(name, tokens, record)
            if text is None:
                refused.add(name)
                continue
            assert all(word in text for word in words), (name, tokens, text)
            assert not OTHERS.search(text), (name, tokens, text)
    assert len(templates()) >= 36
    # Some have no system role, drop reasoning or know no tools; all take a plain conversation.
    allowed = {"single": 0, "multi-turn": 0, "system": 4, "tags": 4, "weights": 0, "tools": 32}
    assert len(refused) <= allowed[kind], sorted(refused)
