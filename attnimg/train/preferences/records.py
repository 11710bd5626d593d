"""Parse records of preference data by the type of their dataset.

A record becomes a prompt with two answers, the preferred one first, or for KTO with one answer and
a label. The types are axolotl's.
Source: axolotl 0.19.0, prompt_strategies/dpo, kto and orpo (2026-11-27)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any

from attnimg.config.schema import DatasetSpec, PreferenceFormat, is_chat, role_names
from attnimg.train.data.records import (
    Place,
    bad_record,
    require_column,
    require_text,
    shorten,
)

Message = Mapping[str, str]  # role and content


@dataclass(frozen=True, kw_only=True, slots=True)
class Preference:
    """A prompt with its answers.

    Attributes:
        prompt: a text, or messages for the chat template.
        answers: the preferred and the rejected answer; for KTO the only answer.
        desirable: for KTO, whether the answer is desirable.
        whole: whether an answer is all that the template writes after the prompt, not only its text
            and end.
    """

    prompt: str | tuple[Message, ...]
    answers: tuple[str, ...]
    desirable: bool | None = None
    whole: bool = False


Parse = Callable[[Mapping[str, Any], Place], Preference]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Style:
    """How a type writes a message: text before its role, between role and content, and after it."""

    before: str
    between: str
    end: str
    after: str

    def message(self, role: str, content: str) -> str:
        """Return a whole message."""
        return f"{self.before}{role}{self.between}{content}{self.end}{self.after}"

    @property
    def opening(self) -> str:
        """Return the opening of an answer."""
        return f"{self.before}assistant{self.between}"


_STYLES = {
    "chatml": _Style(before="<|im_start|>", between="\n", end="<|im_end|>", after="\n"),
    "llama3": _Style(
        before="<|start_header_id|>", between="<|end_header_id|>\n\n", end="<|eot_id|>", after=""
    ),
}
# Variant of a type -> the possible columns of the prompt; the first that a record has is read.
_PROMPTS = {
    "default": ("prompt", "input", "question", "instruction"),
    "argilla": ("instruction",),
    "icr": ("input",),
    "intel": ("question",),
    "prompt_pairs": ("prompt",),
    "ultra": ("prompt",),
}


def choose_preference_parser(spec: DatasetSpec, method: str) -> Parse:
    """Return the parser of a dataset type for a value of rl."""
    if not isinstance(spec.type, str) or spec.type.startswith("passthrough"):
        named = {} if spec.type is None or isinstance(spec.type, str) else spec.type.model_dump()
        found = PreferenceFormat(**{k: v for k, v in named.items() if v is not None})
        return partial(_described_label if method == "kto" else _described_pair, found)
    name, _, variant = spec.type.partition(".")
    if is_chat(spec):
        chats = {"argilla": _orpo_chat, "argilla_chat": _whole_chats}
        return partial(chats.get(variant, _chat), spec)
    if name == "zephyr":
        return _nectar
    style = _STYLES[name]
    if variant == "argilla_chat":
        return partial(_labeled_chat if method == "kto" else _first_turn, style)
    return partial(_labeled if method == "kto" else _pair, style, variant or "default")


def _described_pair(found: PreferenceFormat, record: Mapping[str, Any], place: Place) -> Preference:
    """Return the prompt and answers of a record with a mapping as type, or without a type."""
    columns = {
        "prompt": found.field_prompt or "prompt",
        "chosen": found.field_chosen or "chosen",
        "rejected": found.field_rejected or "rejected",
    }
    texts = _texts(record, columns, place)
    return Preference(
        prompt=_described_prompt(found, record, texts["prompt"], place),
        answers=(
            (found.chosen_format or "{chosen}").format(chosen=texts["chosen"]),
            (found.rejected_format or "{rejected}").format(rejected=texts["rejected"]),
        ),
    )


def _described_label(
    found: PreferenceFormat, record: Mapping[str, Any], place: Place
) -> Preference:
    columns = {
        "prompt": found.field_prompt or "prompt",
        "completion": found.field_completion or "completion",
    }
    texts = _texts(record, columns, place)
    answer = (found.completion_format or "{completion}").format(completion=texts["completion"])
    return Preference(
        prompt=_described_prompt(found, record, texts["prompt"], place),
        answers=(answer,),
        desirable=_label(record, found.field_label or "label", place),
    )


def _described_prompt(
    found: PreferenceFormat, record: Mapping[str, Any], prompt: str, place: Place
) -> str:
    system = record.get(found.field_system or "system") or ""
    text = require_text(system, found.field_system or "system", place)
    return (found.prompt_format or "{prompt}").format(prompt=prompt, system=text)


def _pair(style: _Style, variant: str, record: Mapping[str, Any], place: Place) -> Preference:
    """Return the prompt and answers of chatml and llama3, in their variants."""
    prompt = _styled_prompt(style, variant, record, place)
    answers = []
    for name in ("chosen", "rejected"):
        column = name
        if variant == "default" and name not in record and f"{name}_response" in record:
            column = f"{name}_response"
        value = require_column(record, column, place, needed=(column,), hint=_hint(place))
        if variant == "ultra":
            value = _message(value, 1, column, place)["content"]
        answers.append(require_text(value, column, place) + style.end)
    return Preference(prompt=prompt, answers=tuple(answers))


def _labeled(style: _Style, variant: str, record: Mapping[str, Any], place: Place) -> Preference:
    answer = _texts(record, {"completion": "completion"}, place)["completion"]
    return Preference(
        prompt=_styled_prompt(style, variant, record, place),
        answers=(answer + style.end,),
        desirable=_label(record, "label", place),
    )


def _styled_prompt(style: _Style, variant: str, record: Mapping[str, Any], place: Place) -> str:
    columns = _PROMPTS[variant]
    column = next((name for name in columns if name in record), columns[-1])
    question = _texts(record, {"prompt": column}, place)["prompt"]
    system = record.get("system")
    opening = style.message("system", require_text(system, "system", place)) if system else ""
    return opening + style.message("user", question) + style.opening


def _first_turn(style: _Style, record: Mapping[str, Any], place: Place) -> Preference:
    """Return the first turn of two conversations: later ones are not read, as in axolotl."""
    found = _columns(record, ("chosen", "rejected"), place)
    chats = [[_message(found[name], index, name, place) for index in (0, 1)] for name in found]
    _require_same_prompt(chats, tuple(found), place)
    return Preference(
        prompt=style.message("user", chats[0][0]["content"]) + style.opening,
        answers=tuple(answer["content"] + style.end for _, answer in chats),
    )


def _labeled_chat(style: _Style, record: Mapping[str, Any], place: Place) -> Preference:
    turns = list(_messages(_columns(record, ("completion",), place)["completion"],
                           "completion", place))  # fmt: skip
    _require_answer(turns, "completion", place)
    prompt = "".join(style.message(turn["role"], turn["content"]) for turn in turns[:-1])
    return Preference(
        prompt=prompt + style.opening,
        answers=(turns[-1]["content"] + style.end,),
        desirable=_label(record, "label", place),
    )


def _nectar(record: Mapping[str, Any], place: Place) -> Preference:
    """Return the prompt of a record of Nectar with the two answers that axolotl takes.

    They are the last two in the order of `rank`.
    """
    found = _columns(record, ("prompt", "answers"), place)
    answers = found["answers"]
    if not isinstance(answers, list) or len(answers) < 2:
        why = f"answers is {shorten(answers)}, needed two or more with rank and answer"
        raise bad_record(place, why=why, do="correct the record, or remove it")
    for item in answers:
        if not isinstance(item, dict) or not isinstance(item.get("rank"), int | float):
            why = f"an item of answers is {shorten(item)}, needed rank, a number, and answer"
            raise bad_record(place, why=why, do="correct the record, or remove it")
    ordered = sorted(answers, key=lambda item: float(item["rank"]))
    prompt = require_text(found["prompt"], "prompt", place)
    return Preference(
        prompt=f"<|system|>\n</s>\n<|user|>\n{prompt}</s>\n<|assistant|>\n",
        answers=tuple(
            require_text(ordered[index].get("answer"), "answer", place) for index in (-1, -2)
        ),
    )


def _chat(spec: DatasetSpec, record: Mapping[str, Any], place: Place) -> Preference:
    """Return messages with two answers: texts, messages, or lists that end with an answer."""
    names = (spec.field_messages or "messages", spec.field_chosen or "chosen",
             spec.field_rejected or "rejected")  # fmt: skip
    found = _columns(record, names, place)
    messages = found[names[0]]
    role, content = _message_keys(spec)
    if isinstance(messages, str):
        messages = [{role: "user", content: messages}]
    answers = []
    for name in names[1:]:
        value = found[name]
        last = [{role: "assistant", content: value}] if isinstance(value, str) else value
        last = [last] if isinstance(last, dict) else last
        turns = list(_messages(last, name, place, spec))
        _require_answer(turns, name, place)
        answers.append(turns[-1]["content"])
    prompt = tuple(_messages(messages, names[0], place, spec))
    return Preference(prompt=prompt, answers=tuple(answers))


def _whole_chats(spec: DatasetSpec, record: Mapping[str, Any], place: Place) -> Preference:
    """Return the messages before the last one, and the last of both conversations.

    Raises:
        AttnimgError: the conversations differ before the last message (bad-data); axolotl would
            take those of `chosen` as the prompt of both answers.
    """
    names = (spec.field_chosen or "chosen", spec.field_rejected or "rejected")
    found = _columns(record, names, place)
    chats = [list(_messages(found[name], name, place, spec)) for name in names]
    for name, turns in zip(names, chats, strict=True):
        _require_answer(turns, name, place)
    _require_same_prompt(chats, names, place)
    return Preference(
        prompt=tuple(chats[0][:-1]), answers=tuple(turns[-1]["content"] for turns in chats)
    )


def _orpo_chat(spec: DatasetSpec, record: Mapping[str, Any], place: Place) -> Preference:
    """Return the turns of `chosen` with the last of both conversations, and a system message."""
    names = (spec.field_chosen or "chosen", spec.field_rejected or "rejected")
    found = _columns(record, names, place)
    chats = [list(_messages(found[name], name, place, spec)) for name in names]
    for name, turns in zip(names, chats, strict=True):
        _require_answer(turns, name, place)
        if [turn["role"] for turn in turns] != ["user", "assistant"] * (len(turns) // 2):
            why = f"the roles in {name} are {', '.join(turn['role'] for turn in turns)}"
            why += "; needed user and assistant in turn"
            raise bad_record(place, why=why, do="correct the record, or remove it")
    if "prompt" not in record:
        _require_same_prompt(chats, names, place)
    turns = chats[0][:-1]
    if "prompt" in record:
        if len(turns) > 1:
            why = (
                "found the column prompt, which axolotl would write into each of several questions"
            )
            raise bad_record(place, why=why, do="remove the column prompt")
        prompt = require_text(record["prompt"], "prompt", place)
        turns = [{"role": "user", "content": prompt}]
    if system := record.get("system"):
        turns.insert(0, {"role": "system", "content": require_text(system, "system", place)})
    return Preference(
        prompt=tuple(turns), answers=tuple(chat[-1]["content"] for chat in chats), whole=True
    )


def _columns(record: Mapping[str, Any], names: Sequence[str], place: Place) -> dict[str, Any]:
    return {
        name: require_column(record, name, place, needed=names, hint=_hint(place)) for name in names
    }


def _texts(record: Mapping[str, Any], columns: Mapping[str, str], place: Place) -> dict[str, str]:
    """Return the texts of columns by their role."""
    found = _columns(record, list(columns.values()), place)
    return {name: require_text(found[column], column, place) for name, column in columns.items()}


def _hint(place: Place) -> str:
    return f"rename the columns, or set another {place.key}.type"


def _label(record: Mapping[str, Any], name: str, place: Place) -> bool:
    value = _columns(record, (name,), place)[name]
    if type(value) is bool or value in (0, 1):
        return bool(value)
    why = f"{name} is {shorten(value)}, needed true for a desirable answer, false for another"
    raise bad_record(place, why=why, do="write it as true or false, or remove the record")


def _message_keys(spec: DatasetSpec | None) -> tuple[str, str]:
    """Return the keys of a message's role and content."""
    if spec is None:
        return "role", "content"
    mappings = spec.message_property_mappings or {}
    return (
        mappings.get("role", spec.message_field_role or "role"),
        mappings.get("content", spec.message_field_content or "content"),
    )


def _messages(
    value: Any, name: str, place: Place, spec: DatasetSpec | None = None
) -> Iterator[dict[str, str]]:
    """Yield the messages of a column, with the roles of the chat template."""
    if not isinstance(value, list) or not value:
        why = f"{name} is {shorten(value)}, needed a list of messages"
        raise bad_record(place, why=why, do="write messages with role and content")
    role, content = _message_keys(spec)
    roles = role_names(spec) if spec is not None else None
    for item in value:
        if not isinstance(item, dict) or not {role, content} <= item.keys():
            why = f"a message in {name} is {shorten(item)}, needed the keys {role} and {content}"
            raise bad_record(place, why=why, do="write messages with role and content")
        written = require_text(item[role], role, place)
        if roles is not None and written not in roles:
            why = f"a message in {name} has the role {written}, needed one of {', '.join(roles)}"
            do = f"add the role to {place.key}.roles"
            raise bad_record(place, why=why, do=do)
        yield {
            "role": roles[written] if roles else written,
            "content": require_text(item[content], content, place),
        }


def _message(value: Any, index: int, name: str, place: Place) -> dict[str, str]:
    """Return one message of a list that has at least two."""
    found = list(_messages(value, name, place))
    if len(found) < 2:
        why = f"{name} has 1 message, needed a question and its answer"
        raise bad_record(place, why=why, do="correct the record, or remove it")
    return found[index]


def _require_answer(turns: Sequence[Message], name: str, place: Place) -> None:
    if turns[-1]["role"] != "assistant":
        why = f"{name} ends with a message of the role {turns[-1]['role']}, needed assistant"
        raise bad_record(place, why=why, do="correct the record, or remove it")


def _require_same_prompt(
    chats: Sequence[Sequence[Message]], names: Sequence[str], place: Place
) -> None:
    """Raise unless two conversations are the same before their last message (bad-data).

    Blanks around a text are ignored.
    """
    prompts = [[(turn["role"], turn["content"].strip()) for turn in chat[:-1]] for chat in chats]
    for number, (first, second) in enumerate(zip_longest(*prompts), 1):
        if first != second:
            texts = [shorten(": ".join(turn)) if turn else "missing" for turn in (first, second)]
            why = (
                f"message {number} is {texts[0]} in {names[0]}, and {texts[1]} in {names[1]}; "
                "needed two answers to the same messages"
            )
            raise bad_record(place, why=why, do="correct the record, or remove it")
