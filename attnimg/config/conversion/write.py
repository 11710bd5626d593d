"""Write a config as readable YAML: grouped into sections, with comments on the conversion."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from attnimg.config.schema import Config
from attnimg.errors import printable

# The first key of each section of the schema, and what the section is called.
_SECTIONS = {
    "base_model": "Model", "attn_implementation": "Attention", "datasets": "Data",
    "micro_batch_size": "Optimization", "bf16": "Precision and memory", "adapter": "Adapter",
    "output_dir": "Logs, evaluation, checkpoints", "use_wandb": "Trackers and the hub",
    "fsdp": "Processes", "rl": "Preferences",
}  # fmt: skip
_WIDTH = 98


class _Dumper(yaml.SafeDumper):
    """Write texts of several lines as blocks, and items of lists indented."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        """Indent the items of a list below its key."""
        super().increase_indent(flow, indentless and flow)


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text and not text.startswith((" ", "\n")) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def config_yaml(
    values: Mapping[str, Any], *, head: str, comments: Mapping[str, str], added: Mapping[str, Any]
) -> str:
    """Return a config as YAML.

    Args:
        values: keys of the schema.
        head: a comment for the top of the file.
        comments: key -> the comment above it.
        added: keys that are the old trainer's defaults, with its name in the comment.
    """
    lines = [*_comment(head)]
    section = ""
    for name in Config.model_fields:
        section = _SECTIONS.get(name, section)
        if name not in values:
            continue
        if section:
            lines += ["", f"# {section}"]
            section = ""
        if name in comments:
            lines += _comment(comments[name])
        written = yaml.dump(
            {name: values[name]},
            Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=_WIDTH,
        ).rstrip("\n")  # fmt: skip
        if name in added and "\n" not in written:
            written += f"  # {added[name]}"
        lines.append(written)
    return "\n".join(lines) + "\n"


def _comment(text: str) -> Iterator[str]:
    for line in textwrap.wrap(printable(text).replace("\n", " "), _WIDTH - 2):
        yield f"# {line}"
