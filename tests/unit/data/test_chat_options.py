"""Test the keys of a chat_template entry: reasoning, system messages, loss, ends of turns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from attnimg.config import check_values
from attnimg.config.schema import Config
from attnimg.config.without_effect import keys_without_effect
from attnimg.errors import AttnimgError
from attnimg.train.data import load_documents

Write = Callable[..., str]

USER, YES = {"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "Yes. Go."}
TALK = [USER, YES, USER, {"role": "assistant", "content": "No."}]
THINKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.thought %}<t>{{ m.thought }}</t>"
    "{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
)
LOUD = (
    "{% for m in messages %}{{ m.role }}{% if loud %}!{% endif %} {{ m.content }}{{ eos_token }}"
    "{% endfor %}"
)
TURNS = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}"
    "{{ '<|pad|>' if m.role == 'user' else '<|im_end|>' }}{% endfor %}"
)


def load(tokenizer: Any, write: Write, record: Any, **keys: Any) -> Any:
    record = {"messages": record} if isinstance(record, list) else record
    entry = {name[5:]: keys.pop(name) for name in list(keys) if name.startswith("spec_")}
    config = Config(datasets=[{"path": write(record), "type": "chat_template", **entry}], **keys)
    return load_documents(config, tokenizer)


def seen(tokenizer: Any, write: Write, record: Any, **keys: Any) -> tuple[str, list[str]]:
    """Return the text of the only document, and each run of tokens with loss."""
    row = load(tokenizer, write, record, **keys).train[0]
    parts, run = list[str](), list[int]()
    for label in (*row["labels"], -100):
        if label != -100:
            run.append(label)
        elif run:
            parts.append(tokenizer.decode(run))
            run = []
    return tokenizer.decode(row["input_ids"]), parts


@pytest.mark.parametrize(
    ("message", "keys"),
    [
        ({"cot": "Hm."}, {"spec_field_thinking": "cot"}),
        ({"thought": "Hm."}, {}),
        ({"thinking": "Hm."}, {}),
    ],
)
def test_reasoning_gets_the_template_s_name(
    tokenizer: Any, json_lines: Write, message: Any, keys: Any
) -> None:
    text, learnt = seen(
        tokenizer, json_lines, [USER, {**YES, **message}], chat_template_jinja=THINKS,
        spec_template_thinking_key="thought", **keys,
    )  # fmt: skip
    assert text.endswith("<|im_start|>assistant\n<t>Hm.</t>Yes. Go.<|im_end|>\n")
    assert "".join(learnt).endswith("Hm.</t>Yes. Go.<|im_end|>")


def test_reasoning_that_the_template_does_not_name_is_refused(
    tokenizer: Any, json_lines: Write
) -> None:
    with pytest.raises(AttnimgError, match="drops the reasoning of message 2"):
        load(tokenizer, json_lines, [USER, {**YES, "cot": "Hm."}], chat_template_jinja=THINKS,
             spec_field_thinking="cot")  # fmt: skip


@pytest.mark.parametrize(
    ("content", "reasoning", "answer"),
    [
        ("<think>\nHm.\n</think>\n\nYes.", "Hm.", "Yes."),
        ("<reasoning>Hm.</reasoning>Yes. ", "Hm.", "Yes. "),
        ("<|begin_of_thought|>Hm.<|end_of_thought|>\n<|begin_of_solution|> Yes.\n"
         "<|end_of_solution|>", "Hm.", "Yes."),
        ("Yes, </think> then.", None, "Yes, </think> then."),
    ],
)  # fmt: skip
def test_reasoning_in_tags_is_split_off(
    tokenizer: Any, json_lines: Write, content: str, reasoning: str | None, answer: str
) -> None:
    talk = [USER, {"role": "assistant", "content": content}]
    text, _ = seen(tokenizer, json_lines, talk, chat_template_jinja=THINKS,
                   spec_split_thinking=True, spec_template_thinking_key="thought")  # fmt: skip
    written = f"<t>{reasoning}</t>" if reasoning else ""
    assert text.endswith(f"<|im_start|>assistant\n{written}{answer}<|im_end|>\n")


def test_the_system_message_is_dropped_but_not_the_default_one(
    tokenizer: Any, json_lines: Write
) -> None:
    system = {"role": "system", "content": "Be brief."}
    record = {"messages": [system, USER, YES], "system": "Go."}
    plain, learnt = seen(tokenizer, json_lines, [USER, YES])
    dropped = seen(tokenizer, json_lines, record, spec_drop_system_message=True)
    assert dropped == (plain, learnt)
    text, _ = seen(tokenizer, json_lines, record, spec_drop_system_message=True,
                   default_system_message="Hm.")  # fmt: skip
    assert text == f"<|im_start|>system\nHm.<|im_end|>\n{plain}"
    documents = load(tokenizer, lambda *_: json_lines({"messages": [system]},
                     {"messages": [USER, YES]}), [], spec_drop_system_message=True)  # fmt: skip
    assert (documents.figures[0].empty, len(documents.train)) == (1, 1)


def test_columns_of_the_system_message_and_the_tools_have_names(
    tokenizer: Any, json_lines: Write
) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    record = {"messages": [USER, YES], "sys": "Go.", "functions": tools}
    template = "{{ tools }}" + THINKS
    text, _ = seen(tokenizer, json_lines, record, chat_template_jinja=template,
                   spec_field_system="sys", spec_field_tools="functions")  # fmt: skip
    assert text.startswith(
        "[{'type': 'function', 'function': {'name': 'f'}}]<|im_start|>system\nGo."
    )


def test_variables_reach_the_template_and_unread_ones_are_named(
    tokenizer: Any, json_lines: Write
) -> None:
    keys = {"chat_template_jinja": LOUD, "chat_template_kwargs": {"loud": True, "low": 1}}
    text, learnt = seen(tokenizer, json_lines, [USER, YES], **keys)
    assert text == "user! Is it?<|im_end|>assistant! Yes. Go.<|im_end|>"
    assert learnt == ["Yes. Go.<|im_end|>"]
    assert load(tokenizer, json_lines, [USER, YES], **keys).warnings == (
        "these chat_template_kwargs have no effect: low",
    )


@pytest.mark.parametrize(
    ("flags", "learnt"),
    [
        ((False, True), ["No.<|im_end|>"]),
        ((True, None), ["Yes. Go.<|im_end|>", "No.<|im_end|>"]),
        ((None, False), ["Yes. Go.<|im_end|>"]),
    ],
)
def test_a_key_of_the_record_decides_what_has_loss(
    tokenizer: Any, json_lines: Write, flags: Any, learnt: list[str]
) -> None:
    talk = [USER, {**TALK[1], "use": flags[0]}, USER, {**TALK[3], "use": flags[1]}]
    assert seen(tokenizer, json_lines, talk, spec_message_field_training="use")[1] == learnt


PARTS: list[tuple[Any, list[str]]] = [
    ([(0, 3, True), (4, 7, False)], ["Yes.", "<|im_end|>"]),
    ([(4, 7, True)], [" Go.<|im_end|>"]),
    ([(0, 3, False)], ["<|im_end|>"]),
    ([], []),
    ([(0, 7, True)], ["Yes. Go.<|im_end|>"]),
]


def detail(parts: list[tuple[int, int, bool]]) -> list[dict[str, Any]]:
    return [{"begin_offset": a, "end_offset": b, "train": train} for a, b, train in parts]


@pytest.mark.parametrize("inputs", [False, True])
@pytest.mark.parametrize(("parts", "learnt"), PARTS)
def test_parts_of_a_content_have_loss(
    tokenizer: Any, json_lines: Write, parts: Any, learnt: list[str], inputs: bool
) -> None:
    talk = [USER, {**YES, "detail": detail(parts)}]
    keys = {"spec_message_field_training_detail": "detail", "train_on_inputs": inputs}
    found = seen(tokenizer, json_lines, [*talk, *TALK[2:]], **keys)[1]
    if inputs:  # all else is trained
        assert found[0].startswith("<|im_start|>user\nIs it?<|im_end|>\n<|im_start|>assistant")
        inner = "".join(found).partition("assistant\n")[2].partition("\n<|im_start|>")[0]
        assert inner == "".join(learnt)
    else:
        assert found == [*learnt, "No.<|im_end|>"]


@pytest.mark.parametrize(
    ("eos", "eot", "learnt"),
    [
        ("turn", None, ["Yes. Go.<|im_end|>", "No.<|im_end|>"]),
        ("none", "all", ["<|pad|>", "Yes. Go.", "<|pad|>", "No."]),
        ("turn", "none", ["Yes. Go.<|im_end|>", "No.<|im_end|>"]),
        ("last", "none", ["Yes. Go.", "No.<|im_end|>"]),
        ("all", "turn", ["Yes. Go.<|im_end|>", "No.<|im_end|>"]),
    ],
)
@pytest.mark.parametrize("inputs", [False, True])
def test_tokens_that_end_turns_have_a_setting_of_their_own(
    tokenizer: Any, json_lines: Write, eos: str, eot: str | None, learnt: list[str], inputs: bool
) -> None:
    keys = {"spec_train_on_eos": eos, "spec_train_on_eot": eot, "train_on_inputs": inputs,
            "chat_template_jinja": TURNS, "eot_tokens": ["<|pad|>"]}  # fmt: skip
    text, found = seen(tokenizer, json_lines, TALK, **keys)
    if not inputs:
        assert found == learnt
        return
    ends = {"<|im_end|>": eos, "<|pad|>": eot or eos}
    for token, setting in ends.items():
        kept = {"none": 0, "last": 1}.get(setting, text.count(token))
        # A turn without a flag is trained with its end, in every role.
        assert "".join(found).count(token) == kept, token


def check(**keys: Any) -> list[tuple[str | None, str]]:
    datasets = [{"path": "d", "type": "chat_template", **spec} for spec in keys.pop("datasets")]
    values = {"base_model": "m", "learning_rate": 1e-3, "datasets": datasets, **keys}
    return [(error.key, error.code) for error in check_values(values, file="c.yaml").errors]


@pytest.mark.parametrize(
    ("spec", "keys", "key"),
    [
        ({"train_on_eot": "none"}, {}, "datasets[0].train_on_eot"),
        ({"train_on_eot": "last", "train_on_eos": "all"}, {"eot_tokens": ["x"]},
         "datasets[0].train_on_eot"),
        ({"train_on_eot": "none"}, {"eot_tokens": ["x"]}, None),
        ({"train_on_eot": "turn"}, {}, None),
        ({"field_thinking": "content"}, {}, "datasets[0].field_thinking"),
        ({"message_field_training": "a", "message_field_training_detail": "a"}, {},
         "datasets[0].message_field_training_detail"),
        ({"field_thinking": "thinking", "template_thinking_key": "thinking"}, {}, None),
        ({}, {"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs"),
        ({}, {"chat_template_kwargs": {"eos_token": "x"}}, "chat_template_kwargs"),
        ({}, {"chat_template_kwargs": {"enable_thinking": False}}, None),
        ({"shards": 2, "shards_idx": 2}, {}, "datasets[0].shards_idx"),
        ({"shards": 2, "shards_idx": 1}, {}, None),
        ({"shards": 0}, {}, None),
        ({"shards": True}, {}, "datasets[0].shards"),
        ({"drop_system_message": "yes"}, {}, "datasets[0].drop_system_message"),
        ({}, {"min_sample_len": -1}, "min_sample_len"),
        ({}, {"min_sample_len": 2}, None),
        ({}, {"dataset_exact_deduplication": 3}, "dataset_exact_deduplication"),
    ],
)  # fmt: skip
def test_values_are_checked(spec: Any, keys: Any, key: str | None) -> None:
    assert check(datasets=[spec], **keys) == ([(key, "bad-value")] if key else [])


def test_keys_without_effect_are_named() -> None:
    spec = {"path": "d", "type": "alpaca", "split_thinking": True, "drop_system_message": False,
            "shards_idx": 1, "preprocess_shards": 2}  # fmt: skip
    config = Config(datasets=[spec], shuffle_before_merging_datasets=True)
    assert [text.partition(" has no effect")[0] for text in keys_without_effect(config)] == [
        "there is one dataset, so that shuffle_before_merging_datasets",
        "datasets[0].type is alpaca, so that datasets[0].split_thinking",
        "datasets[0].shards is not set, so that datasets[0].shards_idx",
        "records are read in small batches in any case, so that datasets[0].preprocess_shards",
    ]
