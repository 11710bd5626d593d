"""Test the chat templates that a config may name: what they render, and which tokens have loss."""

from __future__ import annotations

from typing import Any

import pytest
from chat_labels import CALL, TOKENIZERS, TOOL, answer, learnt, tokenizer, user
from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from attnimg.train.data.chat import ChatEncoder
from attnimg.train.data.chat_templates import named_templates

BAR = "\N{FULLWIDTH VERTICAL LINE}"
# What each renders for a system message, a question and its answer.
RENDERED = {
    "alpaca": "<s>S\n\n### Instruction:\nQ\n\n### Response:\nA</s>",
    "chatml": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n"
    "<|im_start|>assistant\nA<|im_end|>\n",
    "cohere": "<s><|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>S<|END_OF_TURN_TOKEN|>"
    "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>Q<|END_OF_TURN_TOKEN|>"
    "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>A<|END_OF_TURN_TOKEN|>",
    "deepseek_v2": f"<s>S\n\n<{BAR}User{BAR}>Q<{BAR}Assistant{BAR}>A</s>",
    "exaone": "[|system|]S[|endofturn|]\n[|user|]Q\n[|assistant|]A[|endofturn|]\n",
    "falcon_h1": "<s><|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n"
    "<|im_start|>assistant\nA<|im_end|>\n",
    "gemma3": "<s><start_of_turn>user\nS\n\nQ<end_of_turn>\n<start_of_turn>model\nA<end_of_turn>\n",
    "gemma4": "<s><|turn>system\nS<turn|>\n<|turn>user\nQ<turn|>\n<|turn>model\nA<turn|>\n",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nQ<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|>",
    "llama4": "<s><|header_start|>system<|header_end|>\n\nS<|eot|>"
    "<|header_start|>user<|header_end|>\n\nQ<|eot|>"
    "<|header_start|>assistant<|header_end|>\n\nA<|eot|>",
    "phi_3": "<s><|system|>\nS<|end|>\n<|user|>\nQ<|end|>\n<|assistant|>\nA<|end|>\n",
    "phi_35": "<|system|>\nS<|end|>\n<|user|>\nQ<|end|>\n<|assistant|>\nA<|end|>\n",
    "qwen3": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n"
    "<|im_start|>assistant\n<think>\n\n</think>\n\nA<|im_end|>\n",
}
RENDERED |= {"nemotron_h": RENDERED["chatml"], "qwen_25": RENDERED["chatml"]}
RENDERED |= {"gemma3n": RENDERED["gemma3"], "gemma4_unified": RENDERED["gemma4"]}
RENDERED |= {"qwen3_5": RENDERED["qwen3"]}
SYSTEM = {"role": "system", "content": "S"}
# These take any role, as axolotl's do.
ANY_ROLE = {"chatml", "llama3"}


def render(name: str, messages: list[dict[str, Any]], **options: Any) -> str:
    texts, _ = render_jinja_template(
        [messages],
        chat_template=named_templates()[name],
        bos_token="<s>",
        eos_token="</s>",
        **options,
    )
    return str(texts[0])


@pytest.mark.parametrize("name", named_templates())
def test_a_template_renders_its_format(name: str) -> None:
    messages = [SYSTEM, user("Q"), answer("A")]
    if name == "gemma":
        with pytest.raises(TemplateError, match="System role not supported"):
            render(name, messages)
        assert render(name, messages[1:]) == RENDERED["gemma3"].replace("S\n\n", "")
        return
    assert render(name, messages) == RENDERED[name]
    begin = render(name, messages[:2], add_generation_prompt=True)
    assert (
        RENDERED[name]
        .replace("<think>\n\n</think>\n\n", "")
        .startswith(begin.removesuffix("<|channel>thought\n<channel|>"))
    )


@pytest.mark.parametrize("name", named_templates())
def test_the_answers_alone_have_loss(name: str) -> None:
    record = {"messages": [user("userone"), answer("answone"), user("usertwo"), answer("answtwo")]}
    for tokens in TOKENIZERS:
        every = tuple(named_templates().values())
        text = "|".join(learnt(ChatEncoder(tokenizer(tokens, every), every_named(name)), record))
        assert "answone" in text
        assert "answtwo" in text
        assert "user" not in text.replace("<|start_header_id|>user", "")


def every_named(name: str) -> str:
    return named_templates()[name]


@pytest.mark.parametrize("name", sorted(named_templates().keys() - ANY_ROLE))
def test_what_a_template_cannot_render_is_an_error(name: str) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    with pytest.raises(TemplateError, match="has no tools"):
        render(name, [user("Q"), call])
    with pytest.raises(TemplateError, match="has no tools"):
        render_jinja_template([[user("Q")]], tools=[TOOL], chat_template=every_named(name))
    image = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Q"}]}
    with pytest.raises(TemplateError, match="only text is supported, found image"):
        render(name, [image, answer("A")])


def test_parts_of_text_are_joined() -> None:
    parts = {
        "role": "user",
        "content": [{"type": "text", "text": "Q"}, {"type": "text", "text": "R"}],
    }
    assert "QR" in render("qwen3", [parts, answer("A")])
