"""Parse and encode records by the type of their dataset.

A type has a parser, which turns a record into a pair of texts or a conversation, or raises with the
record's place, and an encoder, which turns the parsed records into tokens and labels.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from attnimg.config.schema import Config, DatasetSpec, is_chat, is_text
from attnimg.errors import AttnimgError
from attnimg.train.data.chat import ChatEncoder
from attnimg.train.data.chat_mistral import MistralEncoder
from attnimg.train.data.chat_templates import choose_chat_template
from attnimg.train.data.conversations import parse_turns, trained_roles
from attnimg.train.data.records import (
    IGNORE_INDEX,
    Pair,
    Parsed,
    Place,
    bad_record,
    require_column,
    require_text,
    unused_warning,
)
from attnimg.train.data.sources import Source

# The type that a column of this name usually belongs to.
TYPE_OF_COLUMN = {
    "messages": "chat_template", "conversations": "chat_template", "instruction": "alpaca",
    "text": "completion",
}  # fmt: skip

# Stanford Alpaca's two prompts, unchanged: a model should be prompted as it was trained.
# Source: https://deepwiki.com/tatsu-lab/stanford_alpaca/2.2-data-format-and-structure (2026-11-21)
WITHOUT_INPUT = "Below is an instruction that describes a task."

WITH_INPUT = f"{WITHOUT_INPUT[:-1]}, paired with an input that provides further context."

REQUEST = "Write a response that appropriately completes the request."

# Columns that other trainers insert before an instruction; alpaca's prompt does not include them.
UNSUPPORTED = ("system", "history")


def choose_parser(spec: DatasetSpec) -> Callable[[Mapping[str, Any], Place], Parsed | None]:
    """Return the parser of a dataset type; it returns None for an empty record."""
    if is_chat(spec):
        return partial(parse_turns, spec)
    if is_text(spec):
        return partial(_parse_text, spec.field or spec.text_column or "text")
    return partial(_parse_alpaca, _chat_prompt if spec.type == "alpaca:chat" else _instruct_prompt)


def make_encoder(source: Source, config: Config, tokenizer: Any) -> Encoder:
    """Return the encoder that turns a source's records into tokens.

    Raises:
        AttnimgError: the tokenizer has no end token, or no chat template where one is needed.
    """
    spec = source.spec
    if is_chat(spec) and config.tokenizer_use_mistral_common:
        return MistralEncoder(
            tokenizer,
            train_on_eos=spec.train_on_eos or "turn",
            train_on_inputs=config.train_on_inputs,
            system_message=config.default_system_message,
        )
    if is_chat(spec):
        return ChatEncoder(
            tokenizer,
            choose_chat_template(config, tokenizer, spec=spec, key=source.key),
            trained_roles=trained_roles(spec),
            train_on_eos=spec.train_on_eos or "turn",
            train_on_inputs=config.train_on_inputs,
            eot_tokens=tuple(config.eot_tokens or ()),
            system_message=config.default_system_message,
        )
    if tokenizer.eos_token_id is None:
        what = "the tokenizer has no end-of-text token"
        why = (
            f"found none; {spec.type} ends each document with it, so that the model learns to stop"
        )
        do = 'set one: `special_tokens: {eos_token: "</s>"}`'
        raise AttnimgError(what, why=why, do=do, code="missing-key", key="special_tokens")
    return PairEncoder(tokenizer, config.train_on_inputs)


def _parse_alpaca(
    prompt: Callable[[str, str], str], record: Mapping[str, Any], place: Place
) -> Pair | None:
    """Return the prompt and completion of an alpaca record; None without a completion."""
    types = [
        name for column, name in TYPE_OF_COLUMN.items() if column in record and name != "alpaca"
    ]
    hint = "rename the columns" + "".join(f", or set {place.key}.type: {n}" for n in types[:1])
    needed = ("instruction", "output")
    instruction, output = (
        require_text(require_column(record, name, place, needed=needed, hint=hint), name, place)
        for name in needed
    )
    for name in UNSUPPORTED:
        if record.get(name):
            why = f"found {name}, which the alpaca prompt does not contain"
            do = f"write the records as conversations (type: chat_template), or remove {name}"
            raise bad_record(place, why=why, do=do)
    extra = record.get("input")
    extra = "" if extra is None else require_text(extra, "input", place)
    used = (*needed, "input", *UNSUPPORTED)
    unused = tuple(key for key, value in record.items() if key not in used and value is not None)
    return Pair(prompt(instruction, extra), output, unused) if output.strip() else None


def _instruct_prompt(instruction: str, extra: str) -> str:
    task = WITH_INPUT if extra else WITHOUT_INPUT
    extra = f"### Input:\n{extra}\n\n" if extra else ""
    return f"{task} {REQUEST}\n\n### Instruction:\n{instruction}\n\n{extra}### Response:\n"


def _chat_prompt(instruction: str, extra: str) -> str:
    """Return the prompt of axolotl's `alpaca:chat`: plain SYSTEM, USER and ASSISTANT lines."""
    task = WITH_INPUT if extra else WITHOUT_INPUT
    extra = f"{extra}\n" if extra else ""
    return f"SYSTEM: {task} {REQUEST}\nUSER: {instruction}\n{extra}ASSISTANT:"


def _parse_text(field: str, record: Mapping[str, Any], place: Place) -> Pair | None:
    """Return the text of a record; None for a blank one."""
    texts = {key: value for key, value in record.items() if isinstance(value, str)}
    longest = max(texts, key=lambda key: len(texts[key]), default=None)
    hint = "name the text column: `field: ...`"
    if longest is not None:
        hint = f"name the text column: `field: {json.dumps(longest, ensure_ascii=False)}`"
    text = require_text(
        require_column(record, field, place, needed=(field,), hint=hint), field, place
    )
    return Pair(None, text) if text.strip() else None


Tokens = tuple[list[int], list[int]]  # input_ids and labels, equally long


@dataclass(frozen=True, slots=True)
class PairEncoder:
    """Encode a prompt and its completion separately, so that generation has the same prompt tokens.

    Attributes:
        tokenizer: a transformers tokenizer; its start and end tokens are added to the pair.
        train_on_inputs: whether prompts are trained.
        warnings: on columns without effect in the records encoded so far.
    """

    tokenizer: Any
    train_on_inputs: bool
    warnings: dict[str, None] = field(default_factory=dict)

    def __call__(self, batch: Sequence[tuple[Place, Parsed]]) -> list[Tokens]:
        """Encode pairs: [start] prompt completion [end]; texts without prompt the same way."""
        pairs = [parsed for _, parsed in batch if isinstance(parsed, Pair)]
        unused = dict.fromkeys(pair.unused for pair in pairs if pair.unused)
        self.warnings.update((unused_warning("columns", names), None) for names in unused)
        opening, ending = self._added_tokens()
        prompts = iter(self._tokenize([pair.prompt for pair in pairs if pair.prompt is not None]))
        encoded = []
        for pair, answer in zip(pairs, self._tokenize([p.completion for p in pairs]), strict=True):
            # A text may already begin with the tokens that would be added.
            if pair.prompt is None and answer[: len(opening)] == opening:
                answer = answer[len(opening) :]
            if answer[-len(ending) :] == ending:
                answer = answer[: -len(ending)]
            completion = [*answer, *ending]
            prompt = [*opening, *next(prompts)] if pair.prompt is not None else opening
            trained = self.train_on_inputs or pair.prompt is None
            mask = prompt if trained else [IGNORE_INDEX] * len(prompt)
            encoded.append((prompt + completion, mask + completion))
        return encoded

    def _added_tokens(self) -> tuple[list[int], list[int]]:
        """Return the tokens that are added before and after a text; the end token is the last."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        encoded = self.tokenizer("a", verbose=False)["input_ids"]
        (alone,) = self._tokenize(["a"])
        start = next(
            (n for n in range(len(encoded)) if alone and encoded[n : n + len(alone)] == alone),
            int(bos is not None and encoded[:1] == [bos]),  # a vocabulary without the letter
        )
        ending = encoded[start + len(alone) :]
        return encoded[:start], ending if ending[-1:] == [eos] else [*ending, eos]

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        # verbose: the warning about the model's longest sequence; sequence_len is checked later.
        encoded = self.tokenizer(texts, add_special_tokens=False, verbose=False)
        return list(encoded["input_ids"])


Encoder = ChatEncoder | MistralEncoder | PairEncoder
