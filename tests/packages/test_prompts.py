"""Test that each dataset type has the tokens and labels of axolotl's classes, from its wheel.

`make test/templates` downloads axolotl, addict and colorama, 2 MB, and runs this.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
from chat_labels import PLACE, TOKENIZERS, tokenizer

from attnimg.config.schema import PROMPT_STYLES, PROMPT_TYPES, Config, DatasetSpec
from attnimg.train.data.sources import Source
from attnimg.train.data.types import choose_parser, make_encoder

# Type without its style -> records that have its columns.
RECORDS: dict[str, list[dict[str, Any]]] = {
    "alpaca": [
        {"instruction": "Is it so?", "input": "", "output": "Yes."},
        {"instruction": "Go {now}.", "input": "at  night", "output": " The king \n"},
        {"instruction": "a", "output": "no </s>"},
        {"instruction": "naïve", "input": None, "output": "안녕"},
    ],
    "gpteacher": [{"instruction": "Is it so?", "input": "x=1;", "response": "Yes."}],
    "oasst": [{"INSTRUCTION": "Is it so?", "RESPONSE": "Yes."}],
    "jeopardy": [
        {"question": "Who spoke?", "category": "night", "answer": "the king"},
        {"question": "Who spoke?", "category": None, "answer": "the king"},
    ],
    "explainchoice": [
        {"question": "Is it?", "choices": ["Yes", "no"], "solution": "Yes."},
        {"question": "Is it?", "choices": [], "explanation": "no"},
        {"question": "Is it?", "choices": ["Yes"], "solution": "Yes.", "explanation": "no"},
    ],
    "summarizetldr": [{"article": "The king spoke.", "summary": "king"}],
    "reflection": [
        {"instruction": "Is it?", "input": "", "output": "a", "reflection": "b", "corrected": "c"},
        {"instruction": "Is it?", "input": "x", "output": "a", "reflection": "b", "corrected": "c"},
    ],
    "alpaca_chat.load_qa": [{"question": "Is it?", "answer": "Yes."}],
    "alpaca_chat.load_camel_ai": [{"message_1": "Is it?", "message_2": "Yes."}],
    "alpaca_w_system": [
        {"system": "Be brief.", "instruction": "Is it?", "input": "x", "output": "Yes."},
        {"system": "", "instruction": "Is it?", "output": "Yes."},
        {"system": None, "instruction": "Is it?", "output": "Yes."},
    ],
    "alpaca_w_system.load_open_orca": [
        {"system_prompt": "Be brief.", "question": "Is it?", "response": "Yes."},
        {"system_prompt": "", "question": "Is it?", "response": "Yes."},
    ],
    "context_qa": [{"article": "The king spoke.", "question": "Is it?", "answer": "Yes."}],
    "context_qa.load_404": [{"article": "The king spoke.", "unanswerable_question": "Is it?"}],
    "context_qa.load_v2": [{"context": "The king.", "question": "Is it?", "answer": "Yes."}],
    "creative_acr.load_answer": [{"instruction": "Is it?", "revision": "Yes.", "answer": "no"}],
    "metharme": [
        {"prompt": "<|user|>Is it?<|model|>", "generation": "Yes."},
        {"prompt": "Is it?", "generation": "Yes.</s>"},
    ],
    "input_output": [
        {"segments": [{"label": False, "text": "<s>Is it?"}, {"label": True, "text": " Yes.</s>"}]},
        {"segments": [{"label": True, "text": "Go"}, {"label": False, "text": "."},
                      {"label": True, "text": " </s>"}]},
    ],
}  # fmt: skip
SAME_COLUMNS = {
    "concisechoice": "explainchoice", "alpaca_instruct": "alpaca", "alpaca_chat": "alpaca",
    "alpaca_instruct.load_no_prompt": "alpaca", "alpaca_chat.load_no_prompt": "alpaca",
    "alpaca_chat.load_concise": "alpaca", "alpaca_w_system.load_chat": "alpaca_w_system",
    "alpaca_w_system.load_instruct": "alpaca_w_system",
    "alpaca_w_system.load_open_orca_chatml": "alpaca_w_system.load_open_orca",
    "orcamini": "alpaca_w_system.load_open_orca",
}  # fmt: skip
FORMATS: dict[str, dict[str, str]] = {
    "defaults": {},
    "all keys": {
        "field_instruction": "ask", "field_input": "more", "field_output": "say",
        "field_system": "sys: a.b", "format": "[INST] {instruction} {{{input}}} [/INST]",
        "no_input_format": "[INST] {instruction} [/INST]", "system_format": "<<{system}>>\n",
        "system_prompt": "Be brief.",
    },
    "no input": {"format": "Q: {instruction}", "no_input_format": "Q: {instruction}"},
}  # fmt: skip
FORMAT_RECORDS: list[dict[str, Any]] = [
    {"instruction": "Is it?", "input": "x", "output": "Yes."},
    {"instruction": "Is it?", "input": "", "output": "Yes.", "system": "Go."},
    {"ask": "Is it?", "more": "x", "say": "Yes."},
    {"ask": "Is it?", "say": "Yes.", "sys: a.b": "Go."},
]


@dataclass
class Axolotl:
    """Modules of the wheel."""

    load: Callable[..., Any]
    tokenizers: Any
    prompters: Any

    def strategy(self, kind: str, tokens: Any, cfg: Any) -> Any:
        """Return the object that tokenizes records of a type, as utils/data/wrappers.py does."""
        name, _, style = kind.partition(":")
        makers = {
            "alpaca": ("AlpacaPrompter", "AlpacaPromptTokenizingStrategy"),
            "gpteacher": ("GPTeacherPrompter", "GPTeacherPromptTokenizingStrategy"),
            "oasst": ("AlpacaPrompter", "OpenAssistantPromptTokenizingStrategy"),
            "jeopardy": ("JeopardyPrompter", "JeopardyPromptTokenizingStrategy"),
            "summarizetldr": ("SummarizeTLDRPrompter", "SummarizeTLDRPromptTokenizingStrategy"),
            "reflection": ("ReflectAlpacaPrompter", "AlpacaReflectionPTStrategy"),
            "explainchoice": (
                "MultipleChoiceExplainPrompter", "AlpacaMultipleChoicePromptTokenizingStrategy"),
            "concisechoice": (
                "MultipleChoiceConcisePrompter", "AlpacaMultipleChoicePromptTokenizingStrategy"),
        }  # fmt: skip
        if name not in makers:
            return self.load(kind, tokens, cfg, {})
        prompter, strategy = makers[name]
        return getattr(self.tokenizers, strategy)(
            getattr(self.prompters, prompter)(style or None),
            tokens,
            cfg.train_on_inputs,
            cfg.sequence_len,
        )


@pytest.fixture(scope="module")
def axolotl(axolotl_modules: None) -> Axolotl:
    from axolotl import prompt_tokenizers, prompters
    from axolotl.prompt_strategies import load

    return Axolotl(load, prompt_tokenizers, prompters)


def with_start(kind: str) -> Any:
    """Return a tokenizer of this kind that starts each text with <s>."""
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    base = tokenizer(kind, ())
    start = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", base.convert_tokens_to_ids("<s>"))]
    )
    copied = type(base.backend_tokenizer).from_str(base.backend_tokenizer.to_str())
    old = copied.post_processor
    copied.post_processor = processors.Sequence([old, start]) if old else start
    return PreTrainedTokenizerFast(
        tokenizer_object=copied, pad_token="<pad>", unk_token="<unk>", bos_token="<s>",
        eos_token="</s>",
    )  # fmt: skip


def ours(type: Any, record: dict[str, Any], tokens: Any, *, inputs: bool) -> Any:
    spec = DatasetSpec(path="data.jsonl", type=type)
    config = Config(datasets=[spec], train_on_inputs=inputs)
    parsed = choose_parser(spec)(record, PLACE)
    assert parsed is not None
    encode = make_encoder(Source(key="datasets[0]", spec=spec, kind="files"), config, tokens)
    return encode([(PLACE, parsed)])[0]


def theirs(strategy: Any, record: dict[str, Any]) -> Any:
    found = strategy.tokenize_prompt(record)
    return list(found["input_ids"]), list(found["labels"])


@pytest.mark.parametrize("start", [False, True], ids=["no start token", "a start token"])
@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("inputs", [False, True], ids=["answers", "inputs too"])
def test_each_type_has_the_tokens_and_labels_of_axolotl(
    axolotl: Axolotl, kind: str, start: bool, inputs: bool
) -> None:
    tokens = with_start(kind) if start else tokenizer(kind, ())
    cfg = SimpleNamespace(train_on_inputs=inputs, sequence_len=2048)
    compared = 0
    for type in (*PROMPT_TYPES, "input_output"):
        name = type.partition(":")[0]
        strategy = axolotl.strategy(type, tokens, cfg)
        for record in RECORDS[SAME_COLUMNS.get(name, name)]:
            assert ours(type, record, tokens, inputs=inputs) == theirs(strategy, record), (
                type, record,
            )  # fmt: skip
            compared += 1
    assert compared > len(PROMPT_TYPES) + 5 * len(PROMPT_STYLES)


@pytest.mark.parametrize("keys", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_prompt_of_the_config_has_the_tokens_and_labels_of_axolotl(
    axolotl: Axolotl, kind: str, keys: dict[str, str]
) -> None:
    tokens = with_start(kind)
    cfg = SimpleNamespace(train_on_inputs=False, sequence_len=2048)
    strategy = axolotl.load("user_defined", tokens, cfg, keys)
    records = [record for record in FORMAT_RECORDS if keys.get("field_output", "output") in record]
    assert len(records) == 2
    for record in records:
        assert ours(keys, record, tokens, inputs=False) == theirs(strategy, record), record


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("start", [False, True], ids=["no start token", "a start token"])
def test_completion_has_the_tokens_of_axolotl(axolotl: Axolotl, kind: str, start: bool) -> None:
    tokens = with_start(kind) if start else tokenizer(kind, ())
    cfg = SimpleNamespace(train_on_inputs=False, sequence_len=2048)
    strategy = axolotl.load("completion", tokens, cfg, {})
    for text in ("The king spoke. ", "naïve\n\n안녕", "Yes.</s>", "<s>Yes."):
        (ids, labels) = ours("completion", {"text": text}, tokens, inputs=False)
        found = strategy.tokenize_prompt({"text": [text]})
        # attnimg does not repeat a start token that a text has already.
        repeated = start and text.startswith("<s>")
        assert [tokens.bos_token_id] * repeated + ids == found["input_ids"][0], text
        assert labels == ids
