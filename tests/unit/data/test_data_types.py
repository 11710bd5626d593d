"""What each dataset type makes of a record: the text a model sees, and where its loss falls."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from attnimg.config.schema import Config
from attnimg.errors import AttnimgError
from attnimg.train.data import load_documents

Run = Callable[..., Config]
Write = Callable[..., str]

ALPACA = {"instruction": "Define zeal.", "input": "", "output": "A certain disorder."}
WITH_INPUT = {"instruction": "Define it.", "input": "zeal", "output": "A certain disorder."}
TALK = [
    {"role": "user", "content": "Define zeal."},
    {"role": "assistant", "content": "A disorder."},
    {"role": "user", "content": "Thanks."},
    {"role": "assistant", "content": "Go."},
]
SHAREGPT = [{"from": "human", "value": "Define zeal."}, {"from": "gpt", "value": "A disorder."}]
MAPPED = {"role": "from", "content": "value"}
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]"
    "{% else %} {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)


def one(config: Config, tokenizer: Any) -> tuple[str, str]:
    """The only document: its text, and the text of its tokens with loss."""
    documents = load_documents(config, tokenizer)
    assert len(documents.train) == 1
    row = documents.train[0]
    assert len(row["input_ids"]) == len(row["labels"])
    assert all(
        label in (-100, token) for token, label in zip(row["input_ids"], row["labels"], strict=True)
    )
    learnt = [label for label in row["labels"] if label != -100]
    return tokenizer.decode(row["input_ids"]), tokenizer.decode(learnt)


@pytest.mark.parametrize(
    ("type", "record", "prompt", "learnt"),
    [
        pytest.param(
            "alpaca", ALPACA,
            "Below is an instruction that describes a task. Write a response that appropriately "
            "completes the request.\n\n### Instruction:\nDefine zeal.\n\n### Response:\n",
            "A certain disorder.<|im_end|>", id="alpaca without input",
        ),
        pytest.param(
            "alpaca", WITH_INPUT,
            "Below is an instruction that describes a task, paired with an input that provides "
            "further context. Write a response that appropriately completes the request.\n\n"
            "### Instruction:\nDefine it.\n\n### Input:\nzeal\n\n### Response:\n",
            "A certain disorder.<|im_end|>", id="alpaca with input",
        ),
        pytest.param(
            "alpaca", {"instruction": "a", "output": "b", "id": 3},
            "Below is an instruction that describes a task. Write a response that appropriately "
            "completes the request.\n\n### Instruction:\na\n\n### Response:\n",
            "b<|im_end|>", id="alpaca without the input column, with another",
        ),
        pytest.param(
            "alpaca:chat", WITH_INPUT,
            "SYSTEM: Below is an instruction that describes a task, paired with an input that "
            "provides further context. Write a response that appropriately completes the request."
            "\nUSER: Define it.\nzeal\nASSISTANT:",
            "A certain disorder.<|im_end|>", id="alpaca:chat",
        ),
        pytest.param("completion", {"text": "In it."}, "", "In it.<|im_end|>", id="completion"),
        pytest.param("pretrain", {"text": "In it."}, "", "In it.<|im_end|>", id="pretrain"),
    ],
)  # fmt: skip
def test_only_the_completion_carries_loss(
    run_on: Run, json_lines: Write, tokenizer: Any,
    type: str, record: dict[str, Any], prompt: str, learnt: str,
) -> None:  # fmt: skip
    assert one(run_on(json_lines(record), type), tokenizer) == (prompt + learnt, learnt)


@pytest.mark.parametrize(
    ("record", "named"),
    [
        pytest.param(ALPACA, None, id="all columns are read"),
        pytest.param({**ALPACA, "id": None, "system": "", "history": []}, None, id="empty ones"),
        pytest.param({**ALPACA, "context": "A dictionary."}, "context", id="a context"),
        pytest.param({**ALPACA, "system_prompt": "s", "text": "t"}, "system_prompt, text",
                     id="a system prompt and the whole text"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("type", ["alpaca", "alpaca:chat"])
def test_columns_that_alpaca_does_not_read_are_named(
    run_on: Run, json_lines: Write, tokenizer: Any, type: str, record: Any, named: str | None
) -> None:
    documents = load_documents(run_on(json_lines(record), type), tokenizer)
    expected = (f"these columns have no effect: {named}",) if named else ()
    assert documents.warnings == expected


@pytest.mark.parametrize(("type", "record"), [("alpaca", ALPACA), ("chat_template", None)])
def test_train_on_inputs_puts_loss_on_every_token(
    run_on: Run, json_lines: Write, tokenizer: Any, type: str, record: dict[str, Any] | None
) -> None:
    text, learnt = one(
        run_on(json_lines(record or {"messages": TALK}), type, train_on_inputs=True), tokenizer
    )
    assert text == learnt


@pytest.mark.parametrize(
    ("record", "keys", "learnt"),
    [
        pytest.param(
            {"messages": TALK}, {}, "A disorder.<|im_end|>Go.<|im_end|>", id="every answer"
        ),
        pytest.param(
            {"messages": TALK}, {"spec_train_on_eos": "last"}, "A disorder.Go.<|im_end|>",
            id="the last end token alone",
        ),
        pytest.param(
            {"messages": TALK}, {"spec_train_on_eos": "none"}, "A disorder.Go.",
            id="no end token",
        ),
        pytest.param(
            {"messages": TALK}, {"spec_train_on_eos": "all"},
            "<|im_end|>A disorder.<|im_end|><|im_end|>Go.<|im_end|>", id="every end token",
        ),
        pytest.param(
            {"messages": TALK}, {"spec_roles_to_train": ["user"]},
            "Define zeal.<|im_end|>Thanks.<|im_end|>", id="the user's turns",
        ),
        pytest.param(
            {"conversations": SHAREGPT},
            {"spec_field_messages": "conversations", "spec_message_property_mappings": MAPPED},
            "A disorder.<|im_end|>", id="ShareGPT by mappings",
        ),
        pytest.param(
            {"conversations": SHAREGPT},
            {"spec_field_messages": "conversations", "spec_message_field_role": "from",
             "spec_message_field_content": "value", "spec_roles_to_train": ["gpt"]},
            "A disorder.<|im_end|>", id="ShareGPT by the older keys",
        ),
        pytest.param(
            {"messages": [{"role": "ask", "content": "x"}, {"role": "bot", "content": "y"}]},
            {"spec_roles": {"user": ["ask"], "assistant": ["bot"]}}, "y<|im_end|>",
            id="roles of other names",
        ),
        pytest.param(
            {"messages": TALK}, {"chat_template": "jinja", "chat_template_jinja": LLAMA2},
            "A disorder. <|im_end|>Go. <|im_end|>", id="a template written in the config",
        ),
        pytest.param(
            {"messages": TALK}, {"chat_template": "llama3", "eot_tokens": ["<|eot_id|>"]},
            "A disorder.<|eot_id|>Go.<|eot_id|>", id="a named template and its end token",
        ),
        pytest.param(
            {"messages": [{"role": "user", "content": "assistant"},
                          {"role": "assistant", "content": " user\n"}]}, {},
            " user\n<|im_end|>", id="contents that look like headers",
        ),
        pytest.param(
            {"messages": '[{"role": "user", "content": "x"}, '
                         '{"role": "assistant", "content": "y"}]'},
            {}, "y<|im_end|>", id="a conversation stored as JSON text",
        ),
    ],
)  # fmt: skip
def test_loss_falls_on_the_trained_turns(
    run_on: Run, json_lines: Write, tokenizer: Any,
    record: dict[str, Any], keys: dict[str, Any], learnt: str,
) -> None:  # fmt: skip
    config = run_on(json_lines(record), "chat_template", **keys)
    assert one(config, tokenizer)[1] == learnt


def test_a_conversation_is_what_the_chat_template_writes(
    run_on: Run, json_lines: Write, tokenizer: Any
) -> None:
    text, _ = one(run_on(json_lines({"messages": TALK}), "chat_template"), tokenizer)
    assert text == tokenizer.apply_chat_template(TALK, tokenize=False)


def test_the_system_message_opens_conversations_without_one(
    run_on: Run, json_lines: Write, tokenizer: Any
) -> None:
    config = run_on(
        json_lines({"messages": TALK}), "chat_template", default_system_message="Be brief."
    )
    text, learnt = one(config, tokenizer)
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
    assert "brief" not in learnt


@pytest.mark.parametrize(
    ("template", "why"),
    [
        pytest.param(
            "{{ messages | length }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n"
            "{% endfor %}", "depends on later turns", id="shows how many turns will come",
        ),
        pytest.param(
            "{% for m in messages | reverse %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
            "reorders turns", id="puts the last turn first",
        ),
        pytest.param(
            "{% for m in messages %}{{ m.content | upper }}\n{% endfor %}",
            "drops or repeats the content of message 1", id="rewrites what was said",
        ),
        pytest.param(
            "{% for m in messages[-1:] %}{{ m.content }}\n{% endfor %}",
            "drops or repeats the content of message 1", id="forgets the turns before",
        ),
        pytest.param(
            "{% for m in messages %}{{ m.content | replace('zeal', 'meal') }}\n{% endfor %}",
            "rewrites the content of message 1", id="rewrites one word",
        ),
        pytest.param(
            "{{ raise_exception('roles must alternate') }}", "roles must alternate",
            id="refuses the conversation itself",
        ),
    ],
)  # fmt: skip
def test_a_template_whose_turns_cannot_be_told_apart_is_refused(
    run_on: Run, json_lines: Write, tokenizer: Any, template: str, why: str
) -> None:
    config = run_on(json_lines({"messages": TALK}), "chat_template", chat_template_jinja=template)
    with pytest.raises(AttnimgError, match=why) as caught:
        load_documents(config, tokenizer)
    assert "chat template" in caught.value.what


def test_an_end_of_turn_that_is_no_token_is_trained_and_named(
    run_on: Run, json_lines: Write, tokenizer: Any
) -> None:
    path = json_lines({"messages": TALK})
    config = run_on(path, "chat_template", chat_template="llama3")
    assert one(config, tokenizer)[1] == "A disorder.<|eot_id|>Go.<|eot_id|>"
    assert "tokens: ['<|eot_id|>']" in load_documents(config, tokenizer).warnings[0]
    known = copy.deepcopy(tokenizer)
    known.add_tokens(["<|eot_id|>"])  # what the warning advises
    assert not load_documents(config, known).warnings
    assert not load_documents(run_on(path, "chat_template"), tokenizer).warnings


@pytest.mark.parametrize(
    ("record", "code", "why"),
    [
        pytest.param({"conversations": SHAREGPT}, "wrong-columns", "needed messages",
                     id="another column"),
        pytest.param({"messages": SHAREGPT}, "wrong-columns", "needed role and content",
                     id="other keys in the messages"),
        pytest.param({"messages": "hello"}, "bad-data", "needed a list", id="text for messages"),
        pytest.param({"messages": ["hello"]}, "bad-data", "message 1 is", id="text for a message"),
        pytest.param({"messages": [{"role": "narrator", "content": "x"}]}, "bad-data",
                     "'narrator', needed one of", id="an unknown role"),
        pytest.param({"messages": [{"role": "user", "content": None}]}, "bad-data",
                     "content of message 1 is null", id="no content"),
        pytest.param({"messages": TALK, "tools": [{"name": "f"}]}, "bad-value", "drops the tools",
                     id="tools that the template does not show"),
    ],
)  # fmt: skip
def test_records_that_are_no_conversation_are_refused_by_line(
    run_on: Run, json_lines: Write, tokenizer: Any, record: Any, code: str, why: str
) -> None:
    config = run_on(json_lines(record), "chat_template")
    with pytest.raises(AttnimgError, match=r"data.jsonl, line 1") as caught:
        load_documents(config, tokenizer)
    assert caught.value.code == code
    assert why in caught.value.why


def test_a_later_record_without_a_column_is_named_by_its_line(
    run_on: Run, json_lines: Write, tokenizer: Any
) -> None:
    config = run_on(json_lines(ALPACA, ALPACA, {"instruction": "x"}), "alpaca")
    with pytest.raises(AttnimgError, match=r"data.jsonl, line 3") as caught:
        load_documents(config, tokenizer)
    assert caught.value.code == "bad-data"


@pytest.mark.parametrize(
    ("own", "keys", "code"),
    [
        pytest.param(None, {}, "missing-key", id="none in tokenizer or config"),
        pytest.param("x", {"chat_template": "chatmi"}, "bad-value", id="a name nobody knows"),
        pytest.param("x", {"chat_template_jinja": "no.jinja"}, "file-missing", id="no such file"),
        pytest.param(
            None, {"chat_template": "tokenizer_default_fallback_chatml"}, None, id="the fallback"
        ),
    ],
)
def test_a_chat_template_must_be_found(
    run_on: Run, json_lines: Write, tokenizer: Any, monkeypatch: pytest.MonkeyPatch,
    own: str | None, keys: dict[str, str], code: str | None,
) -> None:  # fmt: skip
    monkeypatch.setattr(tokenizer, "chat_template", own)
    config = run_on(json_lines({"messages": TALK}), "chat_template", **keys)
    if code is None:
        assert "<|im_start|>user\n" in one(config, tokenizer)[0]
        return
    with pytest.raises(AttnimgError) as caught:
        load_documents(config, tokenizer)
    assert caught.value.code == code


def test_a_tokenizer_without_an_end_token_is_refused(
    run_on: Run, json_lines: Write, tokenizer: Any
) -> None:
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    with pytest.raises(AttnimgError, match="end-of-text"):
        load_documents(run_on(json_lines({"text": "x"})), endless)
