"""Test prompts of named types and of the config, labelled segments, and tokenized records.

`make test/templates` compares all of them with axolotl's own classes; these are the same texts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from attnimg.config import check_values
from attnimg.config.schema import PROMPT_TYPES, Config
from attnimg.errors import AttnimgError
from attnimg.train.data import load_documents
from attnimg.train.data.prompts import PROMPTS

Write = Callable[..., str]

ASK = {"instruction": "Is it?", "input": "zeal", "output": "Yes."}
TASK = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request."
)
SHORT = "Below is an instruction that describes a task. " + TASK.partition("context. ")[2]
IM_END = "<|im_end|>"


def trained_text(type: Any, record: Any, tokenizer: Any, write: Write, **keys: Any) -> Any:
    """Return the only document: the text before the trained part, and the trained part."""
    config = Config(datasets=[{"path": write(record), "type": type}], **keys)
    row = load_documents(config, tokenizer).train[0]
    trained = [label for label in row["labels"] if label != -100]
    text, part = tokenizer.decode(row["input_ids"]), tokenizer.decode(trained)
    return text.removesuffix(part), part


@pytest.mark.parametrize(
    ("type", "record", "prompt", "answer"),
    [
        ("alpaca:phi", ASK,
         f"<|system|>\n{TASK}<|end|>\n<|user|>\nIs it?<|end|>zeal<|assistant|>", "Yes."),
        ("alpaca:chatml", {**ASK, "input": ""},
         f"<|im_start|>system\n{SHORT}<|im_end|>\n<|im_start|>user\nIs it?<|im_end|>\n"
         "<|im_start|>assistant\n", "Yes."),
        ("alpaca_chat.load_no_prompt", ASK, "USER: Is it?\nzeal\nASSISTANT:", "Yes."),
        ("alpaca_w_system", {**ASK, "system": "Go."},
         "SYSTEM: Go.\nUSER: Is it?\nzeal\nASSISTANT:", "Yes."),
        ("alpaca_w_system.load_open_orca",
         {"system_prompt": "", "question": "Is it?", "response": "Yes."},
         "### Human:\nIs it?\n### Assistant:\n", "Yes."),
        ("orcamini", {"system_prompt": "Go.", "question": "Is it?", "response": "Yes."},
         "### System:\nGo.\n\n### User:\nIs it?\n\n### Response:\n", "Yes."),
        ("jeopardy", {"question": "Is it?", "category": "zeal", "answer": "a bat"},
         f"{TASK}\n\n### Instruction:\nIs it?\n\n### Input:\nzeal\n\n### Response:\n",
         "what is a bat"),
        ("explainchoice:chat",
         {"question": "Is it?", "choices": ["Yes", "no"], "explanation": "Yes."},
         "SYSTEM: Choose the answer that best answers the question. Explain your reasoning.\n\n"
         'USER: Is it?\n- "Yes"\n- "no"\nASSISTANT:', "Yes."),
        ("reflection", {**ASK, "input": "", "reflection": "Hm.", "corrected": "No."},
         "### Instruction:\nIs it?\n\n### Response:\n",
         "### Thought:\nYes.\n\n### Agent Reflection:\nHm.\n\n### Final Response:\nNo."),
        ("context_qa.load_v2", {"context": "c", "question": "Is it?", "answer": "Yes."},
         "Context: c\nQuestion: Is it?\n", "Answer: Yes."),
        ("metharme", {"prompt": "Is it?", "generation": "Yes."}, "Is it?", f"Yes.{IM_END * 2}"),
        ({}, ASK, "Is it? zeal ", "Yes."),
        ({"format": "[{instruction}] {{{input}}}", "no_input_format": "[{instruction}]"}, ASK,
         "[Is it?] {zeal}", "Yes."),
        ({"field_instruction": "a.b", "field_output": "c", "field_system": None,
          "system_prompt": "Go.", "system_format": "<{system}>"},
         {"a.b": "Is it?", "c": "Yes."}, "<Go.>Is it? ", "Yes."),
    ],
)  # fmt: skip
def test_prompts_are_axolotl_s(
    tokenizer: Any, json_lines: Write, type: Any, record: Any, prompt: str, answer: str
) -> None:
    assert trained_text(type, record, tokenizer, json_lines) == (prompt, answer + IM_END)


def test_every_prompt_has_a_type_and_every_type_a_prompt() -> None:
    assert sorted(PROMPTS) == sorted(PROMPT_TYPES)


@pytest.mark.parametrize(
    ("type", "record", "why"),
    [
        pytest.param("jeopardy", {"question": "a", "answer": "b"}, "needed question, answer, cat",
                     id="a missing column"),
        pytest.param("oasst", {"INSTRUCTION": 3, "RESPONSE": "b"}, "INSTRUCTION is 3, needed text",
                     id="a number"),
        pytest.param("explainchoice", {"question": "a", "choices": "b", "solution": "c"},
                     "needed a list of texts", id="no list"),
        pytest.param("gpteacher", {"instruction": "a", "response": "b", "system": "c"},
                     "found system", id="a system message that the prompt has not"),
        pytest.param({"system_prompt": "Go."}, {**ASK, "system": None}, "system is empty",
                     id="an empty system message beside a default one"),
        pytest.param("input_output", {"segments": [{"label": 1, "text": "a"}]},
                     "segment 1 is", id="a number as label"),
        pytest.param("input_output", {"segments": "a"}, "segments is", id="no segments"),
        pytest.param("input_output", {"segments": [{"label": True}]}, "segment 1 is null",
                     id="no text"),
        pytest.param(None, {"input_ids": [1, 2], "labels": [1]}, "2 input_ids and 1 labels",
                     id="a label too few"),
        pytest.param(None, {"input_ids": [1, 2.5], "labels": [1, 2]}, "needed a list of whole",
                     id="no whole number"),
        pytest.param(None, {"input_ids": [1, 9999], "labels": [1, 2]}, "found the token 9,999",
                     id="another vocabulary"),
        pytest.param(None, {"input_ids": [1, 2], "labels": [1, -1]}, "found the token -1",
                     id="a negative label"),
        pytest.param(None, {"input_ids": [1, 2], "labels": [1, 2], "attention_mask": [1, 0]},
                     "attention_mask has values other than 1", id="padding"),
    ],
)  # fmt: skip
def test_records_that_do_not_fit_are_refused_with_their_place(
    tokenizer: Any, json_lines: Write, type: Any, record: Any, why: str
) -> None:
    with pytest.raises(AttnimgError) as caught:
        trained_text(type, record, tokenizer, json_lines)
    assert why in caught.value.why
    assert "data.jsonl, line 1" in caught.value.what
    assert caught.value.code in ("bad-data", "wrong-columns")


def test_a_prompt_whose_last_token_has_a_part_of_the_answer_is_refused(json_lines: Write) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocab = {letter: number for number, letter in enumerate("#\n:IRTabcdeghilnopqrstuxz F?")}
    vocab |= {"\n#": len(vocab), "</s>": len(vocab) + 1}
    model = models.BPE(vocab, [("\n", "#")])
    joins = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), eos_token="</s>")
    record = {"instruction": "a", "output": "b", "reflection": "c", "corrected": "d"}
    with pytest.raises(AttnimgError, match="has a part of the completion"):
        trained_text("reflection", record, joins, json_lines)


def test_segments_are_trained_by_their_labels(tokenizer: Any, json_lines: Write) -> None:
    record = {"segments": [{"label": False, "text": "Is it? "}, {"label": True, "text": "Yes."},
                           {"label": False, "text": " Go."}]}  # fmt: skip
    config = Config(datasets=[{"path": json_lines(record), "type": "input_output"}])
    documents = load_documents(config, tokenizer)
    row = documents.train[0]
    assert tokenizer.decode(row["input_ids"]) == "Is it? Yes. Go."
    assert tokenizer.decode([n for n in row["labels"] if n != -100]) == "Yes."
    assert any("do not end with the end token '<|im_end|>'" in text for text in documents.warnings)
    assert trained_text("input_output", record, tokenizer, json_lines, train_on_inputs=True) == (
        "", "Is it? Yes. Go.",
    )  # fmt: skip


def test_tokenized_records_stay_as_they_are(tokenizer: Any, json_lines: Write) -> None:
    record = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "attention_mask": [1, 1, 1]}
    path = json_lines(record, {"input_ids": [], "labels": []})
    documents = load_documents(Config(datasets=[{"path": path}]), tokenizer)
    assert documents.train[:] == {"input_ids": [[5, 6, 7]], "labels": [[-100, 6, 7]]}
    assert (documents.figures[0].type, documents.figures[0].empty) == ("tokens", 1)


def test_an_input_that_the_format_does_not_name_is_named_in_a_warning(
    tokenizer: Any, json_lines: Write
) -> None:
    plain = {"format": "Q: {instruction}", "no_input_format": "Q: {instruction}"}
    for type, warned in ((plain, ("these columns have no effect: input",)), ({}, ())):
        config = Config(datasets=[{"path": json_lines(ASK), "type": type}])
        assert load_documents(config, tokenizer).warnings == warned


@pytest.mark.parametrize(
    ("type", "key", "code"),
    [
        pytest.param({"format": "{question}"}, ".format", "bad-value", id="another name"),
        pytest.param({"format": "{instruction.__class__}"}, ".format", "bad-value", id="attribute"),
        pytest.param({"format": "{instruction!r}"}, ".format", "bad-value", id="a conversion"),
        pytest.param({"format": "{instruction:>9}"}, ".format", "bad-value", id="a width"),
        pytest.param({"format": "{instruction"}, ".format", "bad-value", id="an open brace"),
        pytest.param({"no_input_format": "{input}"}, ".no_input_format", "bad-value", id="input"),
        pytest.param({"system_format": "{}"}, ".system_format", "bad-value", id="no name"),
        pytest.param({"fomat": "{instruction}"}, ".fomat", "unknown-key", id="a typo"),
        pytest.param({"format": 3}, ".format", "bad-value", id="a number"),
        pytest.param(3, "", "bad-value", id="no text"),
        pytest.param("alpacca", "", "bad-value", id="a type with a typo"),
        pytest.param("pygmalion", "", "unsupported-key", id="conversations"),
        pytest.param("creative_acr.load_revise", "", "unsupported-key", id="a long prompt"),
        pytest.param("bradley_terry.chat_template", "", "unsupported-key", id="a reward model"),
        pytest.param("ebft_pretrain.transform", "", "unsupported-key", id="other training"),
        pytest.param({"format": "{{x}} {instruction}", "system_prompt": ""}, None, "", id="right"),
        pytest.param({"field_system": None}, None, "", id="null"),
        pytest.param("oasst:chat", None, "", id="a style"),
        pytest.param(None, None, "", id="no type"),
    ],
)  # fmt: skip
def test_types_are_checked_by_their_values(type: Any, key: str | None, code: str) -> None:
    values = {"base_model": "m", "learning_rate": 1e-3, "datasets": [{"path": "d", "type": type}]}
    errors = check_values(values, file="c.yaml").errors
    found = [(error.key, error.code) for error in errors]
    assert found == ([] if key is None else [(f"datasets[0].type{key}", code)])
