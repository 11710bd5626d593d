"""Test that conversations have mistral-common's own tokens, and that answers are trained."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.import_utils import (
    MISTRAL_COMMON_MIN_VERSION,
    is_mistral_common_available,
)

from attnimg.errors import AttnimgError
from attnimg.train.data import load_documents
from attnimg.train.distributed import StopFlag
from attnimg.train.tokenizer import load_tokenizer

sys.path.append(str(Path(__file__).parents[2] / "fixtures"))
import tiny_run
from tekken import write_tekken
from tiny_models import tiny_model

needs_package = pytest.mark.skipif(
    not is_mistral_common_available(),
    reason=f"mistral-common {MISTRAL_COMMON_MIN_VERSION} or later is not installed",
)

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Is [/INST] a token?"},
    {"role": "assistant", "content": "No."},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Yes."},
]
CALL = {"id": "abcdefghi", "type": "function",
        "function": {"name": "add", "arguments": {"a": 1}}}  # fmt: skip
TOOL = {"type": "function", "function": {"name": "add", "description": "d", "parameters": {
    "type": "object", "properties": {"a": {"type": "integer"}}}}}  # fmt: skip


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mistral")
    tokens = write_tekken(folder / "model")
    tiny_model("mistral", None, vocab_size=tokens).save_pretrained(folder / "model")
    return folder


def config_for(folder: Path, records: list[Any], place: Path, **keys: Any) -> Any:
    file = place / "data.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    entry = {"path": str(file), "type": "chat_template", **keys.pop("entry", {})}
    return tiny_run.config_for(
        folder, tokenizer_use_mistral_common=True, datasets=[entry], sequence_len=256, **keys
    )


def encoded(folder: Path, place: Path, record: Any, **keys: Any) -> tuple[Any, str, list[str]]:
    """Return the tokenizer, the whole text, and the texts that are trained."""
    config = config_for(folder, [record], place, shuffle_merged_datasets=False, **keys)
    tokenizer = load_tokenizer(config, log=lambda _: None)
    (row,) = load_documents(config, tokenizer).train
    parts: list[list[int]] = [[]]
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        if label == -100:
            parts.append([])
        else:
            assert label == token
            parts[-1].append(token)
    trained = [tokenizer.decode(part) for part in parts if part]
    return tokenizer, tokenizer.decode(row["input_ids"]), trained


@needs_package
@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        pytest.param({}, ["No.</s>", "Yes.</s>"], id="answers and their ends"),
        pytest.param({"entry": {"train_on_eos": "none"}}, ["No.", "Yes."], id="no ends"),
        pytest.param({"entry": {"train_on_eos": "last"}}, ["No.", "Yes.</s>"], id="the last end"),
        pytest.param({"entry": {"train_on_eos": "all"}}, ["No.</s>", "Yes.</s>"], id="all ends"),
    ],
)
def test_answers_are_trained(
    mistral: Path, tmp_path: Path, keys: dict[str, Any], expected: list[str]
) -> None:
    tokenizer, text, trained = encoded(mistral, tmp_path, {"messages": TALK}, **keys)
    assert trained == expected
    assert text == (
        "<s>[SYSTEM_PROMPT]Be brief.[/SYSTEM_PROMPT][INST]Is [/INST] a token?[/INST]No.</s>"
        "[INST]Sure?[/INST]Yes.</s>"
    )
    # Exactly what mistral-common writes for finetuning.
    own = tokenizer.apply_chat_template(TALK, return_dict=False)
    assert tokenizer.decode(own) == text


@needs_package
def test_all_tokens_are_trained_with_inputs(mistral: Path, tmp_path: Path) -> None:
    _, text, trained = encoded(mistral, tmp_path, {"messages": TALK}, train_on_inputs=True)
    assert trained == [text]


@needs_package
def test_a_default_system_message_is_written_where_a_record_has_none(
    mistral: Path, tmp_path: Path
) -> None:
    _, text, _ = encoded(
        mistral, tmp_path, {"messages": TALK[1:]}, default_system_message="Be kind."
    )
    assert text.startswith("<s>[SYSTEM_PROMPT]Be kind.[/SYSTEM_PROMPT][INST]")


@needs_package
def test_an_old_format_joins_the_system_message_with_a_question(tmp_path: Path) -> None:
    write_tekken(tmp_path / "model", version="v3")
    _, text, trained = encoded(tmp_path, tmp_path, {"messages": TALK})
    assert "[SYSTEM_PROMPT]" not in text
    assert "Be brief.\n\nSure?" in text
    assert trained == ["No.</s>", "Yes.</s>"]


@needs_package
def test_reasoning_and_tool_calls_are_part_of_the_answer(mistral: Path, tmp_path: Path) -> None:
    talk = [
        {"role": "user", "content": "1?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "2", "tool_call_id": "abcdefghi", "name": "add"},
        {"role": "assistant", "content": "It is 2.", "reasoning_content": "I added."},
    ]
    _, text, trained = encoded(mistral, tmp_path, {"messages": talk, "tools": [TOOL]})
    assert trained == ['[TOOL_CALLS]add[ARGS]{"a": 1}</s>', "[THINK]I added.[/THINK]It is 2.</s>"]
    assert "[AVAILABLE_TOOLS]" in text


@needs_package
@pytest.mark.parametrize(
    "messages",
    [
        pytest.param(TALK[:4], id="the user is last"),
        pytest.param([*TALK[:3], {"role": "assistant", "content": "Really."}], id="two answers"),
        pytest.param([{"role": "assistant", "content": "Hi."}], id="no question"),
        pytest.param([TALK[1], {"role": "assistant", "content": "No.", "weight": 0},
                      {"role": "critic", "content": "Bad."}], id="a role of nobody"),
    ],
)  # fmt: skip
def test_a_record_that_mistral_common_refuses_is_named(
    mistral: Path, tmp_path: Path, messages: list[Any]
) -> None:
    with pytest.raises(AttnimgError) as caught:
        encoded(mistral, tmp_path, {"messages": messages})
    assert caught.value.code == "bad-data"
    assert "data.jsonl" in caught.value.what
    encoded(mistral, tmp_path, {"messages": TALK[:3]})


@needs_package
def test_a_tiny_mistral_trains_and_saves_its_tokenizer(
    mistral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(
        mistral, [{"messages": TALK}] * 8, tmp_path, output_dir=str(tmp_path / "out"), max_steps=3,
        dataset_prepared_path=str(tmp_path / "kept"),
    )  # fmt: skip
    monkeypatch.setattr(
        tiny_run, "documents", lambda tokenizer, validation: load_documents(config, tokenizer)
    )
    tiny_run.train(config, stop=StopFlag())
    losses = [line["loss"] for line in tiny_run.lines(tmp_path / "out")]
    assert losses[-1] < losses[0]
    for name in ("out", "out/checkpoint-2"):
        saved = (tmp_path / name / "tekken.json").read_bytes()
        assert saved == (mistral / "model" / "tekken.json").read_bytes()


def test_without_the_package_the_line_to_install_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.utils import import_utils

    tiny_run.make_model(tmp_path / "model")
    monkeypatch.setattr(import_utils, "is_mistral_common_available", lambda: False)
    config = tiny_run.config_for(tmp_path, tokenizer_use_mistral_common=True)
    with pytest.raises(AttnimgError) as caught:
        load_tokenizer(config, log=lambda _: None)
    assert (caught.value.code, caught.value.key) == (
        "not-installed",
        "tokenizer_use_mistral_common",
    )
    assert caught.value.do.startswith(f"pip install 'mistral-common>={MISTRAL_COMMON_MIN_VERSION}'")
    load_tokenizer(tiny_run.config_for(tmp_path), log=lambda _: None)
