"""Build the JSON Schema of a config, with which editors complete keys and mark mistakes.

Types, ranges and defaults come from schema.py, the answers to axolotl's other keys from keys.toml,
texts and examples from data/config_keys.toml. `check` also checks combinations of keys, which the
schema does not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from attnimg.backends import HUB_PATH, all_backends
from attnimg.config import schema
from attnimg.config.attention import AUTO, LEGACY
from attnimg.config.keys import (
    COMPUTED,
    IN_SCHEMA,
    KeyAnswer,
    allowed_options,
    allowed_values,
    dataset_key_answers,
    key_answers,
    plugin_answers,
)
from attnimg.config.other_names import (
    EMPTY_IN_ENTRY_IS_UNSET,
    EMPTY_IS_UNSET,
    FALSE_IS_ZERO,
    OTHER_NAMES,
    ZERO_IS_UNSET,
)
from attnimg.config.qat_rules import IMPLEMENTED
from attnimg.config.rules import BNB_VALUES
from attnimg.config.schema import (
    DATASET_TYPES,
    PREFERENCE_METHODS,
    Config,
    preference_types,
)
from attnimg.files import read_data
from attnimg.redact import is_secret

Schema = dict[str, Any]

# Sections of data/config_keys.toml that do not have top-level keys.
OF_ENTRIES, EXAMPLES = "Entries of datasets", "Examples"

# A flag is true or false, also as YAML 1.1 writes it, which editors read as text; or 1 or 0.
_FLAG: Schema = {
    "type": ["boolean", "integer", "string"],
    "minimum": 0,
    "maximum": 1,
    "pattern": "^(yes|Yes|YES|no|No|NO|on|On|ON|off|Off|OFF)$",
}
_NUMBER_AS_TEXT: Schema = {
    "type": "string",
    "pattern": r"^\+?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?$",
}
# The names of constraints that pydantic leaves as they are where a function validates as well.
_LIMITS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}
# Values that turn a key of axolotl off; see KeyAnswer.applies.
_OFF: tuple[Any, ...] = (None, False, 0, "", [], {})


def config_schema() -> Schema:
    """Return the JSON Schema of a config (draft 2020-12)."""
    texts = read_data("config_keys.toml")
    examples = texts.pop(EXAMPLES)
    of_entries = texts.pop(OF_ENTRIES)
    of_keys = {key: text for section in texts.values() for key, text in section.items()}
    found = Config.model_json_schema(schema_generator=_Generator)
    parts = {name: _plain(part) for name, part in found["$defs"].items()}
    entry = parts["DatasetSpec"]
    known = {
        key: _described(_nullable(_plain(value)), of_keys[key], examples.get(key))
        for key, value in found["properties"].items()
        if key not in COMPUTED
    }
    _add_names(known)
    _add_qat(parts["Qat"])
    _add_unset(known)
    for key in ("base_model", "learning_rate"):
        known[key] = _without_null(known[key])
    entry["properties"] = {
        key: _described(_nullable(value), of_entries[key], examples["entry"].get(key))
        for key, value in entry["properties"].items()
    }
    entry["properties"]["path"] = _without_null(entry["properties"]["path"])
    for key in EMPTY_IN_ENTRY_IS_UNSET:
        entry["properties"][key] = _or(entry["properties"][key], "")
    entry["properties"] |= {
        key: {**_answer(answer), "enum": [None, False]}
        for key, answer in dataset_key_answers().items()
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "attnimg config",
        "description": "The config of a run. `attnimg check` also checks combinations of keys.",
        "type": "object",
        "properties": {**known, **_other_keys(known)},
        # Adapter keys of axolotl's plugins, which have no effect if they are false.
        "patternProperties": {_other_lora_keys(known): {"enum": [None, False]}},
        "additionalProperties": False,
        "required": ["base_model", "learning_rate"],
        "anyOf": [
            {"required": [key], "properties": {key: {"not": {"type": "null"}}}}
            for key in ("datasets", "pretraining_dataset")
        ],
        "$defs": parts,
    }


class _Generator(GenerateJsonSchema):
    """Adds what schema.py's own functions accept or refuse before a value is validated."""

    def function_before_schema(self, schema: Any) -> Schema:
        """Return what is accepted before a function converts it."""
        inner = super().function_before_schema(schema)
        change = _BEFORE.get(schema["function"]["function"])
        return change(inner) if change else inner

    def function_after_schema(self, schema: Any) -> Schema:
        """Return what a function accepts of the valid values."""
        inner = super().function_after_schema(schema)
        return {**inner, **_AFTER.get(schema["function"]["function"], {})}


_UNSET = ["", False, 0]  # of keys that these values leave unset
_UNQUOTED_NO = (False, "No", "NO", "off", "Off", "OFF")  # an unquoted no is false to YAML 1.1
_PAIR = r"[^=,]*[^=,\s][^=,]*=[^,]*[^,\s][^,]*"  # name=value
_BEFORE: dict[Callable[..., Any], Callable[[Schema], Schema]] = {
    schema._to_bool: lambda _: dict(_FLAG),  # pydantic adds the default to it
    schema._to_learning_rate: lambda inner: {"anyOf": [inner, _NUMBER_AS_TEXT]},
    schema._unset_if_empty: lambda inner: {"anyOf": [inner, {"enum": _UNSET}]},
    schema._to_strategy: lambda inner: {"enum": [*inner["enum"], *_UNQUOTED_NO]},
    schema._to_arguments: lambda inner: {
        "anyOf": [
            inner,
            {"type": "string", "pattern": rf"^\s*({_PAIR})?(,({_PAIR}|\s*))*$"},
            {"enum": [False, 0, []]},
        ]
    },
    schema._to_tracker_list: lambda inner: {
        "anyOf": [inner, inner["items"], {"enum": ["none", *_UNSET]}]
    },
    schema._to_list: lambda inner: {"anyOf": [inner, inner["items"]]},
    schema._to_list_of_specs: lambda inner: {
        "anyOf": [inner, inner["items"], {"type": "string", "minLength": 1}]
    },
}
_AFTER: dict[Callable[..., Any], Schema] = {
    schema._check_repository: {"pattern": f"^{schema._REPOSITORY.pattern}$"},
    schema._require_lower_is_better: {"enum": [0, "no", *_UNQUOTED_NO]},
}


def _add_names(known: dict[str, Schema]) -> None:
    """Add what the rules of `check` say about the values of single keys."""
    tokens = known["special_tokens"]
    tokens["additionalProperties"] = _nullable(tokens["additionalProperties"])
    names: Schema = {"enum": [b.name for b in all_backends() if b.in_config]}
    hub: Schema = {"type": "string", "pattern": f"^(?:{HUB_PATH})$"}
    known["attn_implementation"] |= {
        "anyOf": [{"enum": [AUTO, *names["enum"], None]}, hub],
    }
    known["attn_implementation"].pop("type", None)
    known["attn_backends"]["additionalProperties"] = {"anyOf": [names, hub]}
    known["val_set_size"] = {
        key: value for key, value in known["val_set_size"].items() if key not in ("type", "minimum")
    } | {
        "anyOf": [
            {"type": "number", "minimum": 0, "exclusiveMaximum": 1},
            {"type": "integer", "minimum": 2},
            {"type": "null"},
        ]
    }
    known["added_tokens_overrides"]["propertyNames"] = {"pattern": "^[0-9]+$"}
    known["bnb_config_kwargs"].pop("propertyNames")
    known["bnb_config_kwargs"] |= {
        "properties": {name: {"enum": [*values]} for name, values in BNB_VALUES.items()},
        "additionalProperties": False,
    }


def _add_qat(qat: Schema) -> None:
    """Add the pairs that qat simulates: the first have no activation_dtype."""
    properties = {key: _nullable(value) for key, value in qat["properties"].items()}
    inputs = [inputs for inputs, _ in IMPLEMENTED]
    properties["activation_dtype"] = {"enum": [*inputs[1:], None]}
    properties["weight_dtype"] = {"enum": list(dict.fromkeys(weight for _, weight in IMPLEMENTED))}
    qat |= {"properties": properties, "required": ["weight_dtype"]}


def _other_keys(known: Mapping[str, Schema]) -> dict[str, Schema]:
    """Return the schemas of all keys that schema.py does not have, or that keys.toml refuses."""
    found: dict[str, Schema] = {
        name: {
            **{k: v for k, v in known[key].items() if k != "default"},
            "description": f"Another name of {key}.",
            "deprecated": True,
        }
        for name, key in OTHER_NAMES.items()
    }
    for key, name in LEGACY.items():
        text = f"Write attn_implementation: {name} instead."
        found[key] = {"description": text, **_nullable(_FLAG), "deprecated": True}
    for key, answer in key_answers().items():
        if key in IN_SCHEMA:
            # rl is a key like others, some values of which are refused.
            named = any(isinstance(one, str) for one in answer.accepts)
            both = {"allOf": [{"enum": _values_without_effect(answer)}]}
            found[key] = {**known[key], **({} if named else _answer(answer)), **both}
        elif answer.answer == "refused":
            found[key] = _refused(answer)
        else:
            found[key] = _answer(answer)
            if allowed := allowed_values(key):
                found[key] |= {"type": ["string", "null"], "pattern": _in_any_case(allowed)}
            if options := allowed_options(key):
                mapping = {"type": "object", "propertyNames": {"enum": list(options)}}
                found[key]["anyOf"] = [mapping, {"enum": [None, False, 0, "", []]}]
            if is_secret(key, "x"):
                found[key]["not"] = {"type": "string", "minLength": 1}
    plugins = {name for name, one in plugin_answers().items() if one.answer != "refused"}
    names = {"enum": sorted(plugins)}
    found["plugins"] = {
        "description": "Axolotl's plugins whose work is done, or that only save time or memory.",
        "deprecated": True,
        "anyOf": [{"type": "array", "items": names}, names, {"enum": [None, False, 0, "", {}]}],
    }
    return found


def _answer(answer: KeyAnswer) -> Schema:
    """Return the schema of a key of axolotl that accepts any value, with its description."""
    return {
        "description": f"{answer.answer}: {answer.reason}. {answer.do[0].upper()}{answer.do[1:]}.",
        "deprecated": True,
    }


def _refused(answer: KeyAnswer) -> Schema:
    """Return the schema of a key that accepts only values that turn it off."""
    return {**_answer(answer), "enum": _values_without_effect(answer)}


def _values_without_effect(answer: KeyAnswer) -> list[Any]:
    values = [value for value in _OFF if value is None or not answer.applies(value)]
    # To Python, 1 equals true and 0 false.
    more = [item for item in (*answer.accepts, 1, True) if item in answer.accepts]
    return values + [item for item in more if repr(item) not in map(repr, values)]


def _in_any_case(names: Iterable[str]) -> str:
    """Return a pattern for names in small letters or capitals."""
    letters = ("".join(f"[{letter}{letter.upper()}]" for letter in name) for name in names)
    return f"^({'|'.join(letters)})$"


def _other_lora_keys(known: Mapping[str, Schema]) -> str:
    names = {name.removeprefix("lora_") for name in (*known, *key_answers())
             if name.startswith("lora_")}  # fmt: skip
    return f"^lora_(?!({'|'.join(sorted(names))})$)"


def _described(value: Schema, text: str, example: Any = None) -> Schema:
    """Return a schema with a description, without the marks of Markdown, and an example.

    Without an example, it is the default, the first of the possible values, or true.
    """
    plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text).replace("`", "")
    if example is None:
        flags = [True] if "boolean" in value.get("type", ()) else []
        found = [value.get("default"), *value.get("enum", flags)]
        example = next((one for one in found if one is not None), None)
    shown = {} if example is None else {"examples": [example]}
    return {"description": plain, **value, **shown}


def _plain(node: Any) -> Any:
    """Return a schema without titles and null defaults, with the names of draft 2020-12."""
    if isinstance(node, list):
        return [_plain(item) for item in node]
    if not isinstance(node, dict):
        return node
    if "oneOf" in node:  # the type of an entry: a name or a prompt
        types = (preference_types(method) for method in PREFERENCE_METHODS)
        names = dict.fromkeys((*DATASET_TYPES, *chain.from_iterable(types)))
        node = {**node, "anyOf": [{"enum": [*names]}, *node["oneOf"][1:]]}
        del node["oneOf"]
    found = {}
    for name, value in node.items():
        if name in ("title", "discriminator") and not isinstance(value, dict):
            continue
        if name == "default" and value is None:
            continue
        if name == "properties":
            found[name] = {key: _plain(one) for key, one in value.items()}
        elif name != "description":
            found[_LIMITS.get(name, name)] = value if name == "default" else _plain(value)
    return _joined(found)


def _joined(node: Schema) -> Schema:
    """Return a schema in which alternatives that contain alternatives are one list."""
    if "anyOf" not in node:
        return node
    options: list[Schema] = []
    for option in node["anyOf"]:
        inner = option["anyOf"] if option.keys() == {"anyOf"} else [option]
        options += [one for one in inner if one not in options]
    rest = {name: value for name, value in node.items() if name != "anyOf"}
    if len(options) == 2 and {"type": "null"} in options:
        (other,) = (one for one in options if one != {"type": "null"})
        return _nullable({**other, **rest})
    return {**rest, "anyOf": options}


def _add_unset(known: dict[str, Schema]) -> None:
    """Add the values that turn a key off, as null does."""
    for keys, values in (
        (EMPTY_IS_UNSET, ("",)),
        (ZERO_IS_UNSET, (0, False)),
        (FALSE_IS_ZERO, (False,)),
        (("tokens",), ({},)),
    ):
        for key in keys:
            known[key] = _or(known[key], *values)


# Parts of a schema that only describe it.
_TEXTS = ("description", "default", "examples", "deprecated", "title")


def _or(node: Schema, *values: object) -> Schema:
    """Return a schema that accepts these values as well."""
    texts = {name: node[name] for name in _TEXTS if name in node}
    rest = {name: part for name, part in node.items() if name not in _TEXTS}
    options = rest["anyOf"] if rest.keys() == {"anyOf"} else [rest]
    return {"anyOf": [*options, {"enum": list(values)}], **texts}


def _nullable(node: Schema) -> Schema:
    """Return a schema that accepts null as well: to `check`, such a key is absent."""
    if "anyOf" in node:
        options = node["anyOf"]
        return {**node, "anyOf": options + [{"type": "null"}] * ({"type": "null"} not in options)}
    if "$ref" in node:
        return {"anyOf": [node, {"type": "null"}]}
    found = dict(node)
    if "enum" in node and None not in node["enum"]:
        found["enum"] = [*node["enum"], None]
    if "const" in node:
        found["enum"] = [found.pop("const"), None]
    if "type" in node:
        types = node["type"] if isinstance(node["type"], list) else [node["type"]]
        found["type"] = types if "null" in types else [*types, "null"]
    return found


def _without_null(node: Schema) -> Schema:
    """Return a schema of a key that must be set."""
    found = dict(node)
    if "anyOf" in node:
        found["anyOf"] = [one for one in node["anyOf"] if one != {"type": "null"}]
    elif "null" in node.get("type", ()):
        types = [one for one in node["type"] if one != "null"]
        found["type"] = types[0] if len(types) == 1 else types
    return found
