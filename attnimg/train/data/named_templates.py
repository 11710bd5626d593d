"""Find the chat templates that a config names as axolotl does: short ones here, others in TRL.

Each writes the same text as axolotl's template of that name; `make test/templates` compares them.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

# Source: https://pytorch.org/torchtune/stable/generated/torchtune.data.ChatMLTemplate.html
# (2026-11-21)
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# Source: https://hexdocs.pm/langchain/LangChain.Utils.ChatTemplates.html, llama_3 (2026-11-21)
LLAMA3 = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
    "{{ message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"
    "{% endif %}"
)

# Llama 4 writes a first system message without the blanks around it.
LLAMA4 = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|header_start|>' + message['role'] + '<|header_end|>\\n\\n' }}"
    "{% if loop.first and message['role'] == 'system' %}{{ message['content'] | trim }}"
    "{% else %}{{ message['content'] }}{% endif %}"
    "{{ '<|eot|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|header_start|>assistant<|header_end|>\\n\\n' }}{% endif %}"
)

# Phi 3 opens the answer at the end of the user's turn.
PHI_3 = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('unknown role: ' + message['role']) }}{% endif %}"
    "{% if message['role'] != 'assistant' %}{{ '<|' + message['role'] + '|>\\n' }}{% endif %}"
    "{{ message['content'] + '<|end|>\\n' }}"
    "{% if message['role'] == 'user' %}{{ '<|assistant|>\\n' }}{% endif %}"
    "{% endfor %}"
)

PHI_35 = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)

DEEPSEEK_V2 = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'user' %}{{ '<\uff5cUser\uff5c>' + message['content'] }}"
    "{% else %}{{ '<\uff5cAssistant\uff5c>' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<\uff5cAssistant\uff5c>' }}{% endif %}"
)

NAMED = {
    "chatml": CHATML, "llama3": LLAMA3, "llama4": LLAMA4, "falcon_h1": "{{ bos_token }}" + CHATML,
    "nemotron_h": CHATML, "phi_3": PHI_3, "phi_35": PHI_35, "deepseek_v2": DEEPSEEK_V2,
}  # fmt: skip

# axolotl's name -> TRL's file. Source: trl 1.16, chat_templates (2026-11-27)
OF_TRL = {
    "aya": "cohere", "cohere": "cohere", "gemma": "gemma", "gemma3": "gemma3", "gemma3n": "gemma3",
    "gemma4": "gemma4_v4", "gemma4_unified": "gemma4_v4", "qwen_25": "qwen2_5", "qwen3": "qwen3",
    "qwen3_5": "qwen3",
}  # fmt: skip


def named_template(name: str) -> str | None:
    """Return the template of this name; None where there is none."""
    if name in NAMED:
        return NAMED[name]
    spec = find_spec("trl") if name in OF_TRL else None
    for folder in (spec.submodule_search_locations if spec else None) or ():
        file = Path(folder) / "chat_templates" / f"{OF_TRL[name]}.jinja"
        if file.is_file():
            return file.read_text(encoding="utf-8")
    return None
