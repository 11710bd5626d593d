"""Build the prompt and the completion of a record: axolotl's named prompts, and those of a config.

The texts are axolotl's, since a model is prompted as it was trained. `make test/templates` compares
the tokens and labels with those of axolotl's own classes.
Source: axolotl 0.19.0, prompters.py, prompt_tokenizers.py, utils/data/wrappers.py and the modules
of prompt_strategies (2026-11-27)
"""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from attnimg.config.schema import PROMPT_STYLES, DatasetSpec, PromptFormat
from attnimg.train.data.records import Pair, Place, bad_record, require_column, require_text

# The type that a column of this name usually belongs to.
TYPE_OF_COLUMN = {
    "messages": "chat_template", "conversations": "chat_template", "instruction": "alpaca",
    "text": "completion", "segments": "input_output",
}  # fmt: skip

# Columns that other trainers insert before an instruction; most prompts do not include them.
UNSUPPORTED = ("system", "history")


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """How a record becomes a prompt and a completion.

    Names in braces are replaced: columns of the record in `instruction` and `outputs`; instruction,
    input and system in the others.

    Attributes:
        with_input: the prompt of a record with an input.
        without_input: the prompt of other records.
        instruction: the instruction.
        outputs: the completion; of several, the first one whose columns the record has.
        input: the column of the input.
        needs_input: whether a record must have that column, though it may be empty.
        is_list: whether the input is a list of texts.
        system: the column of a system message.
        needs_system: whether a record must have that column, though it may be empty.
        system_format: the text of a system message, before the prompt.
        default_system: the system message of records without that column.
        renamed: name in braces -> the column that it stands for, where they differ.
        ends: how many end tokens follow the completion.
        joined: whether prompt and completion are tokenized as one text.
    """

    with_input: str
    without_input: str
    instruction: str = "{instruction}"
    outputs: tuple[str, ...] = ("{output}",)
    input: str | None = "input"
    needs_input: bool = False
    is_list: bool = False
    system: str | None = None
    needs_system: bool = False
    system_format: str = ""
    default_system: str = ""
    renamed: Mapping[str, str] = field(default_factory=dict)
    ends: int = 1
    joined: bool = False

    @property
    def columns(self) -> frozenset[str]:
        """Return the columns that have an effect on the text."""
        prompts = {*_names(self.with_input), *_names(self.without_input)}
        found = {column for text in self.outputs for column in self.columns_in(text)}
        if "instruction" in prompts:
            found |= {*self.columns_in(self.instruction)}
        if self.input and "input" in prompts:
            found.add(self.input)
        if self.system and "system" in {*prompts, *_names(self.system_format)}:
            found.add(self.system)
        return frozenset(found)

    def columns_in(self, text: str) -> list[str]:
        """Return the columns that an instruction or a completion names."""
        return [self.renamed.get(name, name) for name in _names(text)]

    def fill(self, text: str, record: Mapping[str, Any], place: Place) -> str:
        """Return an instruction or a completion with the record's texts in it."""
        values = {name: self.renamed.get(name, name) for name in _names(text)}
        return text.format(
            **{name: require_text(record[c], c, place) for name, c in values.items()}
        )


def choose_prompt(spec: DatasetSpec) -> Prompt | None:
    """Return the prompt of a dataset entry; None for a type without one."""
    if isinstance(spec.type, PromptFormat):
        return _of_config(spec.type)
    return PROMPTS.get(spec.type) if isinstance(spec.type, str) else None


def parse_prompt(prompt: Prompt, record: Mapping[str, Any], place: Place) -> Pair | None:
    """Return the prompt and completion of a record; None without a completion.

    Raises:
        AttnimgError: a column is missing, or is not a text.
    """
    output = next(
        (text for text in prompt.outputs if record.keys() >= {*prompt.columns_in(text)}),
        prompt.outputs[0],
    )
    answer = prompt.columns_in(output)
    needed = [*prompt.columns_in(prompt.instruction), *answer]
    needed += [prompt.input] if prompt.needs_input and prompt.input else []
    needed += [prompt.system] if prompt.needs_system and prompt.system else []
    types = [name for column, name in TYPE_OF_COLUMN.items() if column in record]
    types = [name for name in types if PROMPTS.get(name) != prompt]
    hint = "rename the columns" + "".join(f", or set {place.key}.type: {n}" for n in types[:1])
    for name in needed:
        require_column(record, name, place, needed=needed, hint=hint)
    for name in UNSUPPORTED:
        if record.get(name) and name not in (prompt.system, *needed):
            why = f"found {name}, which the prompt of this type does not contain"
            do = f"write the records as conversations (type: chat_template), or remove {name}"
            raise bad_record(place, why=why, do=do)
    completion = prompt.fill(output, record, place)
    extra = _input(prompt, record, place)
    values = {
        "instruction": prompt.fill(prompt.instruction, record, place),
        "input": extra,
        "system": _system(prompt, record, place),
    }
    system = prompt.system_format.format(**values) if values["system"] else ""
    text = system + (prompt.with_input if extra else prompt.without_input).format(**values)
    used = {*prompt.columns, *UNSUPPORTED}
    unused = tuple(key for key, value in record.items() if key not in used and value is not None)
    # Only the reflection needs all of its parts.
    empty = prompt.joined and not all(record[name] for name in answer)
    return Pair(text, completion, unused) if completion.strip() and not empty else None


def _names(text: str) -> list[str]:
    """Return the names that a text has in braces."""
    return [name for _, name, _, _ in string.Formatter().parse(text) if name is not None]


def _input(prompt: Prompt, record: Mapping[str, Any], place: Place) -> str:
    value = record.get(prompt.input) if prompt.input else None
    if value is None:
        return ""
    if not prompt.is_list:
        return require_text(value, str(prompt.input), place)
    if not isinstance(value, list):
        why = f"{prompt.input} is {value!r}, needed a list of texts"
        raise bad_record(place, why=why, do="write it as a list of strings, or remove the record")
    texts = (require_text(item, f"an item of {prompt.input}", place) for item in value)
    return "\n".join(f'- "{text}"' for text in texts)


def _system(prompt: Prompt, record: Mapping[str, Any], place: Place) -> str:
    if prompt.system is None or prompt.system not in record:
        return prompt.default_system
    value = record[prompt.system]
    if not value and prompt.default_system:
        # Where a column is missing in some records only, Arrow fills it with null.
        why = f"{prompt.system} is empty, and {place.key}.type.system_prompt is set"
        do = f"write a text in {prompt.system}, or remove that column or system_prompt"
        raise bad_record(place, why=why, do=do)
    if value is None and prompt.system_format:
        return ""
    return require_text(value, prompt.system, place)


def _of_config(found: PromptFormat) -> Prompt:
    """Return the prompt that a config describes, with axolotl's defaults.

    Source: axolotl 0.19.0, prompt_strategies/user_defined.py, UserDefinedDatasetConfig (2026-11-27)
    """
    return Prompt(
        with_input=found.format or "{instruction} {input} ",
        without_input=found.no_input_format or "{instruction} ",
        renamed={
            "instruction": found.field_instruction or "instruction",
            "output": found.field_output or "output",
        },
        input=found.field_input or "input",
        system=found.field_system or "system",
        system_format=found.system_format or "{system}",
        default_system=found.system_prompt or "",
    )


# Stanford Alpaca's two prompts, unchanged.
# Source: https://deepwiki.com/tatsu-lab/stanford_alpaca/2.2-data-format-and-structure (2026-11-21)
_WITHOUT = "Below is an instruction that describes a task."
_WITH = f"{_WITHOUT[:-1]}, paired with an input that provides further context."
_REQUEST = "Write a response that appropriately completes the request."
# The tasks of alpaca_chat's other variants.
_USER = "Below is an instruction from a USER that describes a task"
_CONCISE = (
    f"{_USER}, paired with an input that provides further context. The ASSISTANT writes a response "
    "that concisely and appropriately completes the request.\n\n",
    f"{_USER}. The ASSISTANT writes a response that appropriately and concisely completes the "
    "request.\n\n",
)
_CHOOSE = "Choose the answer that best answers the question."
_EXPLAIN = f"{_CHOOSE} Explain your reasoning.\n"
_BE_CONCISE = f"{_CHOOSE} Be concise in your response.\n\n"
_FROM_CONTEXT = "Use the following contextual information to concisely answer the question.\n"
_NOT_IN_CONTEXT = (
    "The context provided does not contain any information about your inquiry. Therefore, I'm "
    "unable to answer your question based on the given context."
)
_SUMMARIZE = "USER: Summarize the following article as a TL;DR.\n{instruction}\n"
_IN_DEPTH = (
    "Answer the following question in a comprehensive, in-depth, and creative way. Additionally "
    "your response should be relevant, accurate, and free of any ambiguity."
)

# Style -> a system message, the prompt with an input, and the prompt without one.
_STYLES = {
    "instruct": (
        "{system}\n\n",
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
        "### Instruction:\n{instruction}\n\n### Response:\n",
    ),
    "chat": (
        "SYSTEM: {system}\n",
        "USER: {instruction}\n{input}\nASSISTANT:",
        "USER: {instruction}\nASSISTANT:",
    ),
    "chatml": (
        "<|im_start|>system\n{system}<|im_end|>\n",
        "<|im_start|>user\n{instruction}\n{input}<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>user\n{instruction}<|im_end|>\n<|im_start|>assistant\n",
    ),
    "phi": (
        "<|system|>\n{system}<|end|>\n",
        "<|user|>\n{instruction}<|end|>{input}<|assistant|>",
        "<|user|>\n{instruction}<|end|>\n<|assistant|>\n",
    ),
}


def _styled(
    style: str, with_task: str = f"{_WITH} {_REQUEST}", without_task: str | None = None
) -> Prompt:
    """Return a prompt in one of the styles, with a task for records with and without input."""
    system, with_input, without_input = _STYLES[style]
    if without_task is None:
        without_task = f"{_WITHOUT} {_REQUEST}" if with_task.startswith(_WITH) else with_task
    return Prompt(
        with_input=(system.format(system=with_task) if with_task else "") + with_input,
        without_input=(system.format(system=without_task) if without_task else "") + without_input,
    )


def _with_system_column(style: str, system_format: str) -> Prompt:
    prompt = _styled(style, "")
    return replace(prompt, system="system", needs_system=True, system_format=system_format)


def _question(prompt: Prompt, instruction: str, output: str) -> Prompt:
    """Return a prompt without input, whose instruction and completion have other columns."""
    return replace(prompt, instruction=instruction, outputs=(output,), input=None)


def _choices(prompt: Prompt) -> Prompt:
    return replace(
        prompt, instruction="{question}", outputs=("{solution}", "{explanation}"),
        input="choices", needs_input=True, is_list=True,
    )  # fmt: skip


def _with_styles(name: str, make: Callable[[str], Prompt]) -> dict[str, Prompt]:
    """Return the prompt of a type in each style: alpaca, alpaca:chat..."""
    styled = {f"{name}:{style}": make(style) for style in PROMPT_STYLES}
    return {name: styled[f"{name}:instruct"], **styled}


_CHAT = _styled("chat")
_CONCISE_CHAT = _styled("chat", *_CONCISE)
_ORCA = replace(
    _with_system_column("instruct", "### System:\n{system}\n"),
    with_input="",
    without_input="### Human:\n{instruction}\n### Assistant:\n",
)


def _orca(prompt: Prompt) -> Prompt:
    return replace(_question(prompt, "{question}", "{response}"), system="system_prompt")


# Dataset type -> its prompt.
PROMPTS: dict[str, Prompt] = {
    **_with_styles("alpaca", _styled),
    **_with_styles("gpteacher", lambda s: replace(_styled(s), outputs=("{response}",))),
    **_with_styles("oasst", lambda s: _question(_styled(s), "{INSTRUCTION}", "{RESPONSE}")),
    **_with_styles(
        "jeopardy",
        lambda s: replace(
            _question(_styled(s), "{question}", "what is {answer}"),
            input="category", needs_input=True,
        ),
    ),
    **_with_styles("explainchoice", lambda s: _choices(_styled(s, _EXPLAIN))),
    "concisechoice": _choices(
        Prompt(
            with_input=_BE_CONCISE + _STYLES["chat"][1],
            without_input=_BE_CONCISE + _STYLES["chat"][2],
        )
    ),
    "summarizetldr": _question(
        Prompt(with_input="", without_input=f"{_SUMMARIZE}ASSISTANT:"), "{article}", "{summary}"
    ),
    "reflection": Prompt(
        with_input=_STYLES["instruct"][1],
        without_input=_STYLES["instruct"][2],
        outputs=(
            "### Thought:\n{output}\n\n### Agent Reflection:\n{reflection}\n\n"
            "### Final Response:\n{corrected}",
        ),
        joined=True,
    ),
    "alpaca_instruct": _styled("instruct"),
    "alpaca_instruct.load_no_prompt": _styled("instruct", ""),
    "alpaca_chat": _CHAT,
    "alpaca_chat.load_concise": _CONCISE_CHAT,
    "alpaca_chat.load_qa": _question(_CONCISE_CHAT, "{question}", "{answer}"),
    "alpaca_chat.load_camel_ai": _question(_CONCISE_CHAT, "{message_1}", "{message_2}"),
    "alpaca_chat.load_no_prompt": _styled("chat", ""),
    "alpaca_w_system": _with_system_column("chat", _STYLES["chat"][0]),
    "alpaca_w_system.load_chat": _with_system_column("chat", _STYLES["chat"][0]),
    "alpaca_w_system.load_instruct": _with_system_column("instruct", _STYLES["instruct"][0]),
    "alpaca_w_system.load_open_orca": _orca(_ORCA),
    "alpaca_w_system.load_open_orca_chatml": _orca(
        _with_system_column("chatml", _STYLES["chatml"][0])
    ),
    "orcamini": replace(
        _orca(_ORCA),
        without_input="### System:\n{system}\n\n### User:\n{instruction}\n\n### Response:\n",
        system_format="",
    ),
    "context_qa": _question(
        _styled("chat", _FROM_CONTEXT), "{article}\n===\n{question}", "{answer}"
    ),
    "context_qa.load_404": _question(
        _styled("chat", _FROM_CONTEXT), "{article}\n===\n{unanswerable_question}", _NOT_IN_CONTEXT
    ),
    "context_qa.load_v2": _question(
        Prompt(with_input="", without_input="{instruction}"),
        "Context: {context}\nQuestion: {question}\n", "Answer: {answer}",
    ),
    "creative_acr.load_answer": _question(
        Prompt(with_input="", without_input=f"{_IN_DEPTH}\n{_STYLES['chat'][2]}"),
        "{instruction}", "{revision}",
    ),
    "metharme": replace(
        _question(Prompt(with_input="", without_input="{instruction}"), "{prompt}", "{generation}"),
        ends=3,
    ),
}  # fmt: skip
