"""Test that templates by axolotl's names write its texts, and label the same tokens."""

from __future__ import annotations

from typing import Any

import pytest
from chat_labels import CALL, TOOL, answer, parse, tokenizer, user
from test_chat_templates import templates

from attnimg.config.dataset_rules import TEMPLATES_OF_AXOLOTL
from attnimg.errors import AttnimgError
from attnimg.train.data.chat import ChatEncoder
from attnimg.train.data.named_templates import NAMED, OF_TRL, named_template
from attnimg.train.data.records import Place

SYSTEM = {"role": "system", "content": " Be brief. "}
TALK = [user("Is it?"), answer("Yes."), user(" Go. "), answer("no 7\n")]
RECORDS: dict[str, Any] = {
    "one answer": {"messages": TALK[:2]},
    "two answers": {"messages": TALK},
    "system": {"messages": [SYSTEM, *TALK]},
    "tags": {"messages": [user("Is it?"), answer("<think>\nHm.\n</think>\n\nYes.")]},
    "weights": {"messages": [*TALK[:1], answer("no", weight=0), *TALK[2:]]},
    "users": {"messages": [{**TALK[0], "train": True}, *TALK[1:]]},
    "tools": {"messages": [user("Is it?"), {"role": "assistant", "tool_calls": [CALL]},
                           {"role": "tool", "name": "weather", "content": "7"}, answer("Yes.")],
              "tools": [TOOL]},
}  # fmt: skip
# Those without tools: a record with tools is refused.
WITHOUT_TOOLS = {"llama4", "falcon_h1"}


def encoded(template: str, tokens: Any, record: Any) -> Any:
    """Return the text, tokens and labels; None where the template is refused."""
    encode = ChatEncoder(tokens, template)
    try:
        ids, labels = encode([(Place("d", 1, "line", "datasets[0]"), parse(record))])[0]
    except AttnimgError:
        return None
    return tokens.decode(ids), ids, labels


@pytest.mark.parametrize("name", [*NAMED, *OF_TRL])
def test_a_named_template_labels_as_axolotl_s_does(name: str) -> None:
    ours, theirs = named_template(name), templates()[name]
    assert ours is not None
    tokens, compared = tokenizer("byte-level", (ours, theirs)), 0
    for kind, record in RECORDS.items():
        found, expected = encoded(ours, tokens, record), encoded(theirs, tokens, record)
        if kind == "tools" and name in WITHOUT_TOOLS:
            assert found is None
            continue
        assert found == expected, kind
        compared += found is not None
    assert compared >= 4


def test_each_template_of_axolotl_is_named_or_refused() -> None:
    assert {*NAMED, *OF_TRL} | TEMPLATES_OF_AXOLOTL == templates().keys()
    assert not TEMPLATES_OF_AXOLOTL & {*NAMED, *OF_TRL}
