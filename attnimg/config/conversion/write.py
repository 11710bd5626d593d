"""Write a config as readable YAML: grouped into sections, with comments on the conversion."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from attnimg.config.read import FLOAT, parse_yaml
from attnimg.config.schema import Config
from attnimg.errors import AttnimgError, printable

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
    style = None
    # PyYAML ends a block that closes with an empty line by "...", the end of the document, and
    # changes Unicode's own line ends outside double quotes.
    if text.endswith("\n\n") or any(end in text for end in "\x85\u2028\u2029"):
        style = '"'
    elif "\n" in text and not text.startswith((" ", "\n")):
        style = "|"
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)
# The text "1e-4" needs quotes: it is a number where attnimg reads it.
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+0123456789."))


def config_yaml(
    values: Mapping[str, Any], *, head: str, comments: Mapping[str, str], added: Mapping[str, Any]
) -> str:
    """Return a config as YAML.

    Args:
        values: keys of the schema.
        head: a comment for the top of the file.
        comments: key -> the comment above it.
        added: keys that are the old trainer's defaults, with its name in the comment.

    Raises:
        RuntimeError: the text does not have these values, which is a fault of this module.
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
    text = "\n".join(lines) + "\n"
    _require_same(text, values)
    return text


def _require_same(text: str, values: Mapping[str, Any]) -> None:
    """Raise unless a text has the values; repr tells true from 1, and compares NaN."""
    try:
        found = parse_yaml(text, name="the new config")
    except AttnimgError as error:
        raise RuntimeError(f"the new config is not YAML: {error.why}") from error
    differing = [key for key, value in values.items() if repr(found.get(key)) != repr(value)]
    if differing or found.keys() != values.keys():
        raise RuntimeError(f"the new config has other values of {', '.join(differing)}")


def _comment(text: str) -> Iterator[str]:
    for line in textwrap.wrap(printable(text).replace("\n", " "), _WIDTH - 2):
        yield f"# {line}"
