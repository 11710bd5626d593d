"""Write docs/config-keys.md: every key of a config, its values, its default and what it does."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from typing import Any

from attnimg.config.attention import LEGACY
from attnimg.config.json_schema import EXAMPLES, OF_ENTRIES
from attnimg.config.keys import COMPUTED, dataset_key_answers, key_answers, plugin_answers
from attnimg.config.other_names import OTHER_NAMES
from attnimg.config.schema import Config, DatasetSpec
from attnimg.errors import AttnimgError
from recipes.files import NOTICE
from recipes.pages import markdown_table

TEXTS = "attnimg/data/config_keys.toml"
# Limits at or above this only protect libraries from absurd numbers.
_NO_LIMIT = 1024
_HEAD = ("key", "value", "default", "what it does")

_INTRO = """# Config keys

A config is one YAML file with axolotl's keys. `attnimg check config.yaml` lists every mistake in
it, without a GPU, a model or a network. A key on the command line replaces the one in the file; a
name with dots is a nested key:

```bash
attnimg check config.yaml learning_rate=1e-4 datasets.0.path=more.jsonl
attnimg train config.yaml learning_rate=1e-4 datasets.0.path=more.jsonl
```

The smallest config that trains:

```yaml
base_model: outputs/demo/untrained
datasets:
  - path: examples/data/devils_dictionary.jsonl
    type: alpaca
learning_rate: 1e-3
```

More of them are in `examples/`: `lora.yaml`, `qlora.yaml`, `chat.yaml`, `dpo.yaml`,
`pretrain.yaml`. An editor with the YAML language server (VS Code's YAML extension has it, Neovim
and others can use it) shows these texts, completes keys and marks mistakes, if the first line of a
config names the JSON Schema that `attnimg schema > attnimg.schema.json` writes:

```yaml
# yaml-language-server: $schema=attnimg.schema.json
```

`check` also checks combinations of keys, which an editor does not. A mistake looks like this:

```
$ attnimg check wrong.yaml
no  wrong.yaml  -  2 errors
  error alias-rejected: fa2 is an alias of flash_attention_2
    why: found an alias, needed the backend's full name
    do:  write attn_implementation: flash_attention_2
  error unknown-key: sample_packin is not a known key
    why: neither attnimg nor axolotl knows it, and it would have no effect
    do:  did you mean sample_packing?
```

"""

_ATTENTION = """`attn_implementation` ([why this backend](why-this-backend.md)) is one of:

| value | what it is |
| --- | --- |
| `auto`, or no such key | the best-ranked backend that fits and passes its proof |
| `flash_attention_2`, `flash_attention_3` | the family; this one alone: `attn_strict` |
| `flash_attention_4` | FlashAttention-4 |
| `sdpa`, `eager` | PyTorch's own; packed documents are isolated by a mask, which is slower |
| `flex_attention` | PyTorch FlexAttention |
| `xformers` | xFormers' memory-efficient attention |
| `sage`, `fp8` | 8-bit attention; `fp8` has no backward pass, so it can't train |
| `s2` | shifted sparse attention of LongLoRA, for LLaMA, without packing |
| `org/name[@rev][:fn]` | a kernel of the Hugging Face hub, only when it is named |

A named backend is used or refused; it is never replaced, and nothing is downloaded that the config
does not name.

"""

_OUTRO = """
## Environment variables

Variables of `accelerate launch`, such as `ACCELERATE_MIXED_PRECISION`, must agree with the config:
a different value is refused (`bad-environment`). Several processes:
`torchrun --nproc-per-node 2 -m attnimg train config.yaml`.
"""


def config_keys_page(text: str) -> str:
    """Write docs/config-keys.md.

    Args:
        text: of attnimg/data/config_keys.toml: section -> key -> what the key does.

    Raises:
        AttnimgError: a key of the schema has no text, or a text has no key (code "config-keys").
    """
    sections: dict[str, dict[str, str]] = tomllib.loads(text)
    del sections[EXAMPLES]
    _require_same(sections)
    parts = [f"<!-- {NOTICE} -->\n\n{_INTRO}"]
    for title, keys in sections.items():
        schema = (DatasetSpec if title == OF_ENTRIES else Config).model_json_schema()
        rows = [
            (f"`{key}`", _values(schema["properties"][key]), _default(schema, key), does)
            for key, does in keys.items()
        ]
        parts.append(f"## {title}\n\n{markdown_table(_HEAD, rows)}\n")
        parts += [_ATTENTION] if "attn_implementation" in keys else []
    return "".join((*parts, _other_keys(), _OUTRO))


def _require_same(sections: Mapping[str, Mapping[str, str]]) -> None:
    """Raise unless the texts are for exactly the keys of the schema."""
    for model, found in (
        (Config, [key for title in sections if title != OF_ENTRIES for key in sections[title]]),
        (DatasetSpec, [*sections.get(OF_ENTRIES, ())]),
    ):
        needed = set(model.model_fields) - set(COMPUTED)
        if differ := needed.symmetric_difference(found):
            raise AttnimgError(
                f"{TEXTS} does not describe the keys of {model.__name__}",
                why=f"without a text: {', '.join(sorted(needed.difference(found))) or '-'}; "
                f"without a key: {', '.join(sorted(differ - needed)) or '-'}",
                do=f"write one line for each key into {TEXTS}; make render",
                code="config-keys",
            )


def _values(schema: Mapping[str, Any]) -> str:
    """Return the accepted values of one key, from its JSON schema."""
    options = schema.get("anyOf") or schema.get("oneOf")
    if options is None:
        return _value(schema)
    return " or ".join(_values(one) for one in options if one.get("type") != "null")


def _value(schema: Mapping[str, Any]) -> str:
    if names := schema.get("enum", [schema["const"]] if "const" in schema else []):
        return ", ".join(f"`{name}`" for name in names)
    if "$ref" in schema:
        return "entries" if schema["$ref"].endswith("DatasetSpec") else "mapping"
    match schema.get("type"):
        case "boolean":
            return "`true`, `false`"
        case "integer" | "number" as kind:
            return f"{'whole ' if kind == 'integer' else ''}number {', '.join(_limits(schema))}"
        case "array":
            return f"list of {_values(schema['items'])}"
        case "object":
            return "mapping"
    return "text"


def _limits(schema: Mapping[str, Any]) -> Iterator[str]:
    for name, sign in (("gt", ">"), ("exclusiveMinimum", ">"), ("ge", ">="), ("minimum", ">="),
                       ("lt", "<"), ("exclusiveMaximum", "<"),
                       ("le", "<="), ("maximum", "<=")):  # fmt: skip
        limit = schema.get(name)
        if limit is not None and limit < _NO_LIMIT:
            yield f"{sign} {limit:g}"


def _default(schema: Mapping[str, Any], key: str) -> str:
    default = schema["properties"][key].get("default")
    if default is None:
        return "-"
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"


def _other_keys() -> str:
    """Write the tables of axolotl's keys that the schema does not have, by their answer."""
    others = ", ".join(f"`{name}` for `{key}`" for name, key in OTHER_NAMES.items())
    parts = [
        "## Other keys of axolotl\n\n"
        "Every key of axolotl 0.19 has one of four answers: it is done (the tables above), it is\n"
        "done by other means, it is a hint that is not used (it changes speed or memory and never\n"
        "what is learned), or it is refused by name. `null`, `false`, `0` and an empty text turn\n"
        "a key off and are accepted. A key that axolotl does not know either is an error\n"
        "(`unknown-key`) with the nearest known one. A key without effect in this run is named in\n"
        "a warning.\n\n"
        f"The older keys {', '.join(f'`{key}`' for key in LEGACY)} still work,\n"
        "with a warning that has the line to write instead.\n\n"
        f"These other names of keys work as well: {others}.\n\n"
    ]
    titles = {
        "done-otherwise": "### Done by other means (`done-otherwise`)",
        "hint-not-used": "### Hints that are not used (`hint-not-used`)",
        "refused": "### Refused (`unsupported-key`)",
    }
    for answer, title in titles.items():
        groups: dict[tuple[str, str], list[str]] = {}
        for names in (key_answers(), plugin_answers(), dataset_key_answers()):
            for name, found in names.items():
                if found.answer == answer:
                    groups.setdefault((found.reason, found.do), []).append(f"`{name}`")
        rows = ((reason, do, ", ".join(keys)) for (reason, do), keys in groups.items())
        parts.append(f"{title}\n\n{markdown_table(('why', 'what to do', 'keys'), rows)}\n")
    return "".join(parts)
