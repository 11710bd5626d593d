"""Encode conversations with mistral-common, the tokenizer of Mistral's models without a template.

It writes tokens, not text: an answer begins after [/INST] or [/TOOL_RESULTS], and ends with the end
token. No text of a record is tokenized to one of these tokens.
Source: mistral-common 1.13.1, tokens/tokenizers/instruct.py (2026-11-27)
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from attnimg.errors import AttnimgError
from attnimg.train.data.conversations import arguments_as_text
from attnimg.train.data.records import (
    IGNORE_INDEX,
    Conversation,
    Parsed,
    Place,
    Turn,
    bad_record,
    unused_warning,
)

# Tokens after which the model answers.
OPENINGS = ("[/INST]", "[/TOOL_RESULTS]")

# Keys of a message that mistral-common reads.
_KEYS = frozenset({"tool_calls", "tool_call_id", "name", "reasoning_content"})


def describe_tokenizer(tokenizer: Any) -> str:
    """Return a text that identifies the tokenizer's file and the version of mistral-common."""
    content = Path(tokenizer.tokenizer.instruct_tokenizer.tokenizer.file_path).read_bytes()
    return f"mistral-common {version('mistral-common')} {hashlib.sha256(content).hexdigest()}"


class MistralEncoder:
    """Encode conversations; the turns of the assistant have loss.

    Args:
        tokenizer: transformers' MistralCommonBackend in finetuning mode.
        train_on_eos: which end tokens are trained; see ChatEncoder.
        train_on_inputs: whether every token is trained.
        system_message: inserted before conversations without a system turn; None for none.

    Raises:
        AttnimgError: the tokenizer has no tokens around answers (code bad-value).
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        train_on_eos: Literal["all", "turn", "last", "none"] = "turn",
        train_on_inputs: bool = False,
        system_message: str | None = None,
    ) -> None:
        self.tokenizer, self.train_on_eos = tokenizer, train_on_eos
        self.train_on_inputs, self.system_message = train_on_inputs, system_message
        self.warnings: dict[str, None] = {}
        vocabulary = tokenizer.get_vocab()
        self.openings = {vocabulary[token] for token in OPENINGS if token in vocabulary}
        if not self.openings:
            raise AttnimgError(
                "the tokenizer is too old for tokenizer_use_mistral_common",
                why=f"found no token {OPENINGS[0]}, after which the model answers",
                do="remove tokenizer_use_mistral_common",
                code="bad-value",
                key="tokenizer_use_mistral_common",
            )

    def __call__(self, batch: Sequence[tuple[Place, Parsed]]) -> list[tuple[list[int], list[int]]]:
        """Encode conversations to input_ids and labels.

        Raises:
            AttnimgError: mistral-common refuses a record, or does not write all of it (bad-data).
        """
        return [self._encode(place, parsed) for place, parsed in batch]

    def _encode(self, place: Place, parsed: Parsed) -> tuple[list[int], list[int]]:
        assert isinstance(parsed, Conversation), place
        turns = self._with_system_message(parsed.turns)
        self._require_supported(place, turns)
        ids = self._tokenize(place, turns, parsed.tools)
        self._warn_of_unused(parsed)
        answers = [turn for turn in turns if turn.role == "assistant"]
        spans = self._find_answers(ids)
        if len(spans) != len(answers):
            why = (
                f"found {len(answers)} messages of the assistant, of which mistral-common made "
                f"{len(spans)}; it joins messages that follow each other"
            )
            raise bad_record(place, why=why, do="join the messages of one role in the record")
        self._require_written(place, turns, ids)
        return ids, self._label(ids, spans, answers)

    def _with_system_message(self, turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
        if not self.system_message or turns[0].role in ("system", "developer"):
            return turns
        return (Turn("system", self.system_message), *turns)

    def _require_supported(self, place: Place, turns: Sequence[Turn]) -> None:
        """Raise for flags that can't be applied: on parts of a message, or on another role."""
        for number, turn in enumerate(turns, start=1):
            others = turn.role != "assistant" and (
                turn.train is True or (self.train_on_inputs and turn.train is False)
            )
            if turn.untrained or others:
                why = f"message {number} has its own flag on what is trained; needed none, or one "
                why += "on a whole message of the assistant"
                do = "remove the flag from the record, or tokenizer_use_mistral_common"
                raise bad_record(place, why=why, do=do)

    def _tokenize(
        self, place: Place, turns: Sequence[Turn], tools: Sequence[Mapping[str, Any]]
    ) -> list[int]:
        from mistral_common.exceptions import MistralCommonException

        try:
            ids = self.tokenizer.apply_chat_template(
                [_message(turn) for turn in turns],
                tools=[dict(tool) for tool in tools] or None,
                return_dict=False,
            )
        except (
            MistralCommonException, AssertionError, AttributeError, LookupError,
            NotImplementedError, TypeError, ValueError,
        ) as error:  # fmt: skip
            lines = str(error).splitlines() or [type(error).__name__]
            roles = ", ".join(turn.role for turn in turns)
            raise bad_record(
                place,
                why=f"mistral-common raises: {' '.join(lines[:2])}; the roles are {roles}",
                do="correct the record: user and assistant take turns, and the assistant is last",
            ) from None
        return list(ids)

    def _find_answers(self, ids: Sequence[int]) -> list[tuple[int, int]]:
        """Return each answer's first token, and its end token."""
        found, start = [], None
        for place, token in enumerate(ids):
            if token in self.openings:
                start = place + 1
            elif token == self.tokenizer.eos_token_id and start is not None:
                found.append((start, place))
                start = None
        return found

    def _require_written(self, place: Place, turns: Sequence[Turn], ids: list[int]) -> None:
        """Raise if a text of the record is not in the tokens."""
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        for number, turn in enumerate(turns, start=1):
            if "".join((turn.content or "").split()) not in "".join(text.split()):
                why = f"mistral-common does not write the content of message {number}"
                do = "correct the record, or remove tokenizer_use_mistral_common"
                raise bad_record(place, why=why, do=do)

    def _label(
        self, ids: list[int], spans: Sequence[tuple[int, int]], answers: Sequence[Turn]
    ) -> list[int]:
        labels = list(ids) if self.train_on_inputs else [IGNORE_INDEX] * len(ids)
        trained = [number for number, turn in enumerate(answers) if turn.train is not False]
        for number, (start, end) in enumerate(spans):
            is_trained = number in trained
            is_last = bool(trained) and number == trained[-1]
            with_end = self.train_on_eos == "all" or (
                is_trained
                and (self.train_on_eos == "turn" or (self.train_on_eos == "last" and is_last))
            )
            labels[start:end] = ids[start:end] if is_trained else [IGNORE_INDEX] * (end - start)
            labels[end] = ids[end] if with_end else IGNORE_INDEX
        return labels

    def _warn_of_unused(self, conversation: Conversation) -> None:
        keys = dict.fromkeys(key for turn in conversation.turns for key in turn.extra)
        unused = tuple(key for key in keys if key not in _KEYS)
        for what, names in (("columns", conversation.unused), ("message keys", unused)):
            if names:
                self.warnings[unused_warning(what, names)] = None


def _message(turn: Turn) -> dict[str, Any]:
    """Return a message in the form of the OpenAI API, which mistral-common reads."""
    message = arguments_as_text({k: v for k, v in turn.extra.items() if k in _KEYS})
    reasoning = message.pop("reasoning_content", None)
    content: Any = turn.content
    if reasoning:
        content = [{"type": "thinking", "thinking": reasoning, "closed": True}]
        content += [{"type": "text", "text": turn.content}] if turn.content else []
    return {"role": turn.role, **message, **({} if content is None else {"content": content})}
