"""Choose the chat template of a run: the tokenizer's, one by name, or one written in the config."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attnimg.config.schema import Config, DatasetSpec
from attnimg.errors import AttnimgError
from attnimg.files import read_regular

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

NAMED = {"chatml": CHATML, "llama3": LLAMA3}
FALLBACK = "tokenizer_default_fallback_"

# Published templates have up to 20 KiB.
_TEMPLATE_BYTES = 1 << 20


def choose_chat_template(
    config: Config, tokenizer: Any, *, spec: DatasetSpec | None = None, key: str = "datasets[0]"
) -> str | dict[str, str]:
    """Return the Jinja text of the template; what a dataset entry says goes before the run's own.

    A tokenizer may have several by name (Command-R, Mistral v0.3, Hermes): all of them are
    returned, and conversations with tools use "tool_use", all others "default".

    Args:
        config: names a template (chat_template) or holds one (chat_template_jinja).
        tokenizer: a transformers tokenizer; its own template is the default.
        spec: the dataset entry, which may name its own.
        key: the config key of that entry.

    Raises:
        AttnimgError: the name is not known, or nobody has a template.
    """
    if spec is not None and (spec.chat_template or spec.chat_template_jinja):
        name, jinja, where = spec.chat_template, spec.chat_template_jinja, f"{key}.chat_template"
    else:
        name, jinja, where = config.chat_template, config.chat_template_jinja, "chat_template"
    if jinja and name in (None, "jinja"):
        return _read_jinja(jinja, key=where + "_jinja")
    own = tokenizer.chat_template
    named = dict(own) if isinstance(own, Mapping) else {}
    if name in named:
        return str(named[name])
    if named and "default" not in named:
        own = None
    if name is None or name == "tokenizer_default":
        if own:
            return named or str(own)
        raise AttnimgError(
            "the tokenizer has no chat template",
            why=(f"found {', '.join(named)}" if named else "found none")
            + " in the tokenizer; a chat_template dataset needs a default one",
            do=f"set chat_template to one of {', '.join([*named, *NAMED])}, or write one in "
            "chat_template_jinja",
            code="missing-key",
            key=where,
        )
    if name.startswith(FALLBACK) and own:
        return named or str(own)
    plain = name.removeprefix(FALLBACK)
    if plain in NAMED:
        return NAMED[plain]
    choices = [*named, *NAMED, "tokenizer_default"]
    near = difflib.get_close_matches(plain, choices, n=1, cutoff=0.0)
    raise AttnimgError(
        f"unknown chat template {name!r}",
        why=f"{where} is {name}, needed one of {', '.join(choices)}, or jinja with "
        "chat_template_jinja",
        do=f"set {where}: {near[0] if own else next(iter(NAMED))}",
        code="bad-value",
        key=where,
    )


def _read_jinja(jinja: str, *, key: str) -> str:
    if not jinja.endswith((".jinja", ".jinja2")):
        return jinja
    path = Path(jinja).expanduser()
    try:
        return read_regular(path, at_most=_TEMPLATE_BYTES).decode()
    except FileNotFoundError:
        what, why = "not found", f"which is not a file under {Path.cwd()}"
    except OSError as error:
        what, why = "cannot be read", f"and {error.strerror}"
    except UnicodeDecodeError as error:
        what, why = "is not text", f"and its byte {error.start} is not valid UTF-8"
    raise AttnimgError(
        f"chat template {what}: {jinja}",
        why=f"{key} is {jinja}, {why}",
        do="correct the path, or write the template itself",
        code="file-missing",
        key=key,
    )
