"""Test chat templates by axolotl's names: their text, and names that are refused.

`make test/templates` compares all of them with axolotl's own.
"""

from __future__ import annotations

from typing import Any

import pytest

from attnimg.config import check_values
from attnimg.config.dataset_rules import CHAT_TEMPLATES
from attnimg.train.data.chat_templates import render_bounded
from attnimg.train.data.named_templates import NAMED, OF_TRL, named_template

TALK = [
    {"role": "system", "content": " Go. "},
    {"role": "user", "content": "Is it?"},
    {"role": "assistant", "content": "Yes."},
]
CHATML = "<|im_start|>system\n Go. <|im_end|>\n<|im_start|>user\nIs it?<|im_end|>\n<|im_start|>"


def rendered(name: str, messages: list[dict[str, str]], *, prompt: bool = False) -> str:
    template = named_template(name)
    assert template is not None
    return render_bounded(
        messages, template=template, add_generation_prompt=prompt, bos_token="<s>",
        eos_token="</s>", tools=None,
    )[0]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "prompt", "answer"),
    [
        ("chatml", f"{CHATML}assistant\n", "Yes.<|im_end|>\n"),
        ("nemotron_h", f"{CHATML}assistant\n", "Yes.<|im_end|>\n"),
        ("falcon_h1", f"<s>{CHATML}assistant\n", "Yes.<|im_end|>\n"),
        ("phi_3", "<s><|system|>\n Go. <|end|>\n<|user|>\nIs it?<|end|>\n<|assistant|>\n",
         "Yes.<|end|>\n"),
        ("phi_35", "<|system|>\n Go. <|end|>\n<|user|>\nIs it?<|end|>\n<|assistant|>\n",
         "Yes.<|end|>\n"),
        ("llama4", "<s><|header_start|>system<|header_end|>\n\nGo.<|eot|><|header_start|>user"
         "<|header_end|>\n\nIs it?<|eot|><|header_start|>assistant<|header_end|>\n\n",
         "Yes.<|eot|>"),
        ("deepseek_v2", "<s> Go. \n\n<\uff5cUser\uff5c>Is it?<\uff5cAssistant\uff5c>", "Yes.</s>"),
        ("gemma3", "<s><start_of_turn>user\n Go. \n\nIs it?<end_of_turn>\n<start_of_turn>model\n",
         "Yes.<end_of_turn>\n"),
    ],
)  # fmt: skip
def test_a_named_template_writes_its_text(name: str, prompt: str, answer: str) -> None:
    assert rendered(name, TALK[:2], prompt=True).strip() == prompt.strip()
    assert rendered(name, TALK).strip() == (prompt + answer).strip()


def test_every_name_has_a_template() -> None:
    for name in (*NAMED, *OF_TRL):
        talk = TALK[1:] if name == "gemma" else TALK
        assert "Yes." in rendered(name, talk), name
    assert named_template("no such name") is None


@pytest.mark.parametrize(
    ("name", "refused"), [("jamba", True), ("mistral_v1", True), ("gemma3", False), ("rag", False)]
)
@pytest.mark.parametrize("entry", [False, True])
def test_templates_of_axolotl_that_are_missing_are_refused_by_name(
    name: str, refused: bool, entry: bool
) -> None:
    spec: dict[str, Any] = {"path": "d", "type": "chat_template"}
    values = {"base_model": "m", "learning_rate": 1e-3, "datasets": [spec]}
    (spec if entry else values)["chat_template"] = name
    found = [(error.key, error.code) for error in check_values(values, file="c.yaml").errors]
    key = "datasets[0].chat_template" if entry else "chat_template"
    assert found == ([(key, "unsupported-key")] if refused else [])


def test_check_knows_the_names_of_all_templates() -> None:
    known = [name for name in CHAT_TEMPLATES if named_template(name) is not None]
    assert known == [*NAMED, *OF_TRL]
