"""What generation with the trained model needs: its chat template, and where it stops."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1] / "fixtures"))
from tiny_run import config_for, make_model, make_tokenizer, run

from attnimg.train.data.named_templates import CHATML, LLAMA3
from attnimg.train.tokenizer import end_token_notes, use_trained_template

OWN = "{{ bos_token }}{% for m in messages %}{{ m.role + m.content }}{% endfor %}"
NAMED = {"default": OWN, "tool_use": CHATML}


def chat(**keys: Any) -> dict[str, Any]:
    return {"path": "made-here", "type": "chat_template", **keys}


@pytest.mark.parametrize(
    ("own", "keys", "saved", "warned"),
    [
        pytest.param(None, {"chat_template": "chatml"}, CHATML, None, id="the one by name"),
        pytest.param(OWN, {"chat_template": "chatml"}, CHATML, None, id="not the tokenizer's"),
        pytest.param(OWN, {"chat_template_jinja": "{{ 1 }}"}, "{{ 1 }}", None, id="the config's"),
        pytest.param(OWN, {"datasets": [chat(chat_template="llama3")]}, LLAMA3, None,
                     id="the entry's"),
        pytest.param(OWN, {}, OWN, None, id="the tokenizer's"),
        pytest.param(NAMED, {}, NAMED, None, id="all of the tokenizer's"),
        pytest.param(NAMED, {"chat_template": "tool_use"}, CHATML, None, id="one of them"),
        pytest.param(OWN, {"datasets": [chat(), chat(chat_template="llama3")]}, OWN, "datasets[0]",
                     id="of several the first one's"),
        pytest.param(OWN, {"datasets": [chat(chat_template="llama3"), chat()],
                           "chat_template": "chatml"}, CHATML, "datasets[1]",
                     id="of several the run's"),
        pytest.param(OWN, {"datasets": [chat()], "test_datasets": [chat(chat_template="llama3")]},
                     OWN, None, id="not that of test_datasets"),
        pytest.param(OWN, {"datasets": [{"path": "x", "type": "completion"}]}, OWN, None,
                     id="the tokenizer's for text"),
    ],
)  # fmt: skip
def test_the_template_that_wrote_the_data_is_saved(
    tmp_path: Path, own: Any, keys: dict[str, Any], saved: Any, warned: str | None
) -> None:
    tokenizer = make_tokenizer(tmp_path)
    tokenizer.chat_template = own
    notes = use_trained_template(config_for(tmp_path, **{"datasets": [chat()], **keys}), tokenizer)
    assert tokenizer.chat_template == saved
    assert [warned in note for note in notes] == ([True] if warned else [])


def test_a_run_saves_the_template_that_it_trained(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    make_model(tmp_path / "model")
    keys = {"datasets": [chat()], "chat_template": "chatml", "max_steps": 1, "save_steps": 1}
    run(tmp_path, tmp_path / "out", engine={"attention": "eager"}, **keys)
    for folder in (tmp_path / "out", tmp_path / "out" / "checkpoint-1"):
        assert AutoTokenizer.from_pretrained(folder).chat_template == CHATML


@pytest.mark.parametrize(
    ("ends", "named", "warns"),
    [
        pytest.param(["<turn>"] * 3, None, True, id="a token that is no end token"),
        pytest.param(["<turn>"] * 3, [1, 2], True, id="nor one of the model's"),
        pytest.param(["</s>"] * 3, None, False, id="the tokenizer's end token"),
        pytest.param(["<turn>"] * 3, "<turn>", False, id="the model's only one"),
        pytest.param(["<turn>"] * 3, ["<turn>"], False, id="one of the model's"),
        pytest.param(["</s>", "</s>", "<turn>"], None, False, id="fewer than half"),
        pytest.param(["day"] * 3, None, False, id="text, as where no end is trained"),
    ],
)
def test_an_end_that_generation_does_not_stop_at_is_told(
    tmp_path: Path, ends: list[str], named: Any, warns: bool
) -> None:
    from datasets import Dataset

    tokenizer = make_tokenizer(tmp_path)
    tokenizer.add_tokens(["<turn>"])

    def number(token: Any) -> Any:
        return tokenizer.encode(token)[-1] if isinstance(token, str) else token

    stops = [number(token) for token in named] if isinstance(named, list) else number(named)
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=stops))
    labels = [[-100, 7, number(end), -100] for end in ends]
    notes = end_token_notes(Dataset.from_dict({"labels": labels}), tokenizer, model)
    assert [f"special_tokens: {{eos_token: {json.dumps('<turn>')}}}" in n for n in notes] == (
        [True] if warns else []
    )
