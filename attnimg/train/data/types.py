"""What each dataset type asks of a record, and the texts or turns it makes of it.

Pure: a record in, a parsed record out, or an error that names the record. Tokens come later.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from attnimg.config.schema import DatasetSpec, is_chat, is_text
from attnimg.train.data.conversations import parse_turns
from attnimg.train.data.parsed import Pair, Parse, column, text
from attnimg.train.data.records import Place, bad_record

# The type that a column of this name usually belongs to.
FITTING = {
    "messages": "chat_template", "conversations": "chat_template", "instruction": "alpaca",
    "text": "completion",
}  # fmt: skip

# Stanford Alpaca's two prompts; models are asked in the very words they were trained on.
# Source: https://deepwiki.com/tatsu-lab/stanford_alpaca/2.2-data-format-and-structure (2026-11-21)
PREAMBLE = "Below is an instruction that describes a task"
WITH_INPUT = f"{PREAMBLE}, paired with an input that provides further context."
REQUEST = "Write a response that appropriately completes the request."

# What other trainers put before an instruction.
CONTEXT = ("system", "history")


def parser(spec: DatasetSpec) -> Parse:
    """Return the function that turns a record into texts or turns, None for an empty record."""
    if is_chat(spec):
        return partial(parse_turns, spec)
    if is_text(spec):
        return partial(_running_text, spec.field or spec.text_column or "text")
    return partial(_alpaca, _chat_prompt if spec.type == "alpaca:chat" else _instruct_prompt)


def _alpaca(
    prompt: Callable[[str, str], str], record: Mapping[str, Any], place: Place
) -> Pair | None:
    fitting = [name for column, name in FITTING.items() if column in record and name != "alpaca"]
    hint = "rename the columns" + "".join(f", or set {place.key}.type: {n}" for n in fitting[:1])
    needed = ("instruction", "output")
    instruction, output = (
        text(column(record, name, place, needed=needed, hint=hint), name, place) for name in needed
    )
    _refuse_context(record, place)
    extra = record.get("input")
    extra = "" if extra is None else text(extra, "input", place)
    used = (*needed, "input", *CONTEXT)
    unused = tuple(key for key, value in record.items() if key not in used and value is not None)
    return Pair(prompt(instruction, extra), output, unused) if output.strip() else None


def _refuse_context(record: Mapping[str, Any], place: Place) -> None:
    """Refuse what other trainers put before an instruction: alpaca's prompt has no place for it."""
    for name in CONTEXT:
        if record.get(name):
            raise bad_record(
                place,
                why=f"found {name}, which the alpaca prompt does not contain",
                do=f"write the records as conversations (type: chat_template), or drop {name}",
            )


def _instruct_prompt(instruction: str, extra: str) -> str:
    if extra:
        return (
            f"{WITH_INPUT} {REQUEST}\n\n"
            f"### Instruction:\n{instruction}\n\n### Input:\n{extra}\n\n### Response:\n"
        )
    return f"{PREAMBLE}. {REQUEST}\n\n### Instruction:\n{instruction}\n\n### Response:\n"


def _chat_prompt(instruction: str, extra: str) -> str:
    """Axolotl's `alpaca:chat`: the same words as plain SYSTEM, USER and ASSISTANT lines."""
    if extra:
        return f"SYSTEM: {WITH_INPUT} {REQUEST}\nUSER: {instruction}\n{extra}\nASSISTANT:"
    return f"SYSTEM: {PREAMBLE}. {REQUEST}\nUSER: {instruction}\nASSISTANT:"


def _running_text(field: str, record: Mapping[str, Any], place: Place) -> Pair | None:
    texts = {key: value for key, value in record.items() if isinstance(value, str)}
    longest = max(texts, key=lambda key: len(texts[key]), default=None)
    hint = "name the text column: `field: ...`"
    if longest is not None:
        hint = f"name the text column: `field: {json.dumps(longest, ensure_ascii=False)}`"
    whole = text(column(record, field, place, needed=(field,), hint=hint), field, place)
    return Pair(None, whole) if whole.strip() else None
