"""Check the config of a run: YAML -> Config.

Only the config's values are read: no model, GPU, package, network or other file.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any, get_args

from pydantic import ValidationError

from attnimg.backends import backend_named
from attnimg.config import keys
from attnimg.config.attention import (
    AUTO,
    View,
    attention_findings,
    name_errors,
    replace_legacy_keys,
)
from attnimg.config.read import read_yaml, with_overrides
from attnimg.config.rules import value_errors
from attnimg.config.schema import Checked, Config, DatasetSpec, SpecialToken
from attnimg.errors import AttnimgError
from attnimg.facts import Arch, Backend, Finding

__all__ = ["check_file", "check_values", "parse_torch", "with_overrides"]

# 2.13, 2.13.0, 2.6.0a0, 2.12.0.dev20260101, 2.11.0+cu130.
_VERSION = re.compile(
    r"(\d{1,4})\.(\d{1,4})(\.\d+)*((a|b|rc)\d+)?(\.?dev\d+)?(\+[a-z\d.]+)?", re.ASCII
)
_WITHOUT_DEFAULT = ("base_model", "learning_rate", "datasets", "pretraining_dataset")
_DATASET_LISTS = ("datasets", "pretraining_dataset", "test_datasets")
# Keys of a dataset entry, and of special_tokens.
_NULLABLE = DatasetSpec.model_fields.keys() | set(get_args(SpecialToken))


def check_file(
    path: str, *, on: Arch | None = None, torch: str | None = None, overrides: tuple[str, ...] = ()
) -> Checked:
    """Check one file; all errors are in the result, none is raised.

    Args:
        path: a YAML file, as the user typed it.
        on: the GPU to check for; None skips the rules on GPUs.
        torch: the torch version to check for; None skips the rules on versions.
        overrides: key=value arguments; see with_overrides.
    """
    try:
        values = with_overrides(read_yaml(path), overrides)
    except AttnimgError as error:
        found = Finding(code=error.code, key=error.key, what=error.what, why=error.why, do=error.do)
        return Checked(
            file=path,
            on=on.name if on else None,
            config=None,
            requested=None,
            errors=(found,),
            warnings=(),
        )
    return check_values(values, file=path, on=on, torch=torch)


def check_values(
    values: dict[str, Any], *, file: str, on: Arch | None = None, torch: str | None = None
) -> Checked:
    """Check one mapping of config keys; see check_file."""
    present = {key: value for key, value in values.items() if value is not None}
    errors = [_computed(key) for key in keys.COMPUTED if key in present]
    values, found = replace_legacy_keys(
        {key: value for key, value in present.items() if key not in keys.COMPUTED}
    )
    name = values.pop("attn_implementation", None)
    bad_name = list(name_errors(name)) if name is not None else []
    config, bad_values = _validated(values)
    backend = backend_named(name) if isinstance(name, str) and not bad_name else None
    view = View(
        config=config,
        backend=backend,
        resolved=not bad_name and name != AUTO,
        on=on,
        torch=parse_torch(torch) if torch is not None else None,
    )
    errors += [row for row in found if row.why]
    rows = list(attention_findings(view))
    errors += [*bad_name, *_missing(values), *bad_values, *(row for row in rows if row.why)]
    failed = {(row.key or "").partition("[")[0] for row in bad_values}
    errors += value_errors(config, failed)
    errors += _unsupported(values, failed={error.key for error in errors})
    return Checked(
        file=file,
        on=on.name if on else None,
        config=config.model_copy(update=_flags(name, backend, bad=bool(bad_name))),
        requested=name if isinstance(name, str) else None,
        errors=tuple(errors),
        warnings=tuple(row for row in (*found, *rows) if not row.why),
    )


def parse_torch(version: str) -> tuple[int, int]:
    """Return the major and minor version of torch.

    Raises:
        AttnimgError: the text is not a version.
    """
    match = _VERSION.fullmatch(version)
    if match is None:
        raise AttnimgError(
            f"{version!r} is no torch version",
            why="found no MAJOR.MINOR, such as 2.13 or 2.13.0+cpu",
            do="pass --torch 2.13.0",
            code="bad-value",
        )
    return int(match[1]), int(match[2])


def _validated(values: dict[str, Any]) -> tuple[Config, list[Finding]]:
    """Return the config with the valid keys, and the errors of the others."""
    known = {key: _without_nulls(v) for key, v in values.items() if key in Config.model_fields}
    try:
        return Config.model_validate(known), []
    except ValidationError as error:
        found: dict[str, Finding] = {}
        for item in error.errors(include_url=False):
            wrong = _schema_finding(item)
            found.setdefault(wrong.key or "", wrong)
        bad = {str(item["loc"][0]) for item in error.errors(include_url=False)}
    rest = {key: value for key, value in known.items() if key not in bad}
    return Config.model_validate(rest), list(found.values())


def _schema_finding(item: Any) -> Finding:
    top, *rest = item["loc"]
    key, found = str(top), item["input"]
    if top in _DATASET_LISTS and rest and isinstance(rest[0], int):
        key = f"{top}[{rest[0]}]" + (f".{rest[1]}" if len(rest) > 1 else "")
    if item["type"] == "extra_forbidden":
        name = str(rest[-1])
        refused = keys.unsupported_dataset_keys().get(name)
        return _unsupported_key(key, found, do=refused.do) if refused else _unknown(key, name)
    if item["type"] == "missing":
        return _missing_key(key, "it has no default")
    message = item["msg"].removeprefix("Value error, ")
    has_default = key not in _WITHOUT_DEFAULT and not key.endswith(("]", ".path"))
    allowed = f"; {message[0].lower()}{message[1:]}"
    return Finding(
        code="bad-value",
        key=key,
        what=f"{key} has a value it cannot take",
        why=f"found {_short(found)}{allowed}",
        do=f"set {key} to such a value" + (", or remove it for its default" if has_default else ""),
    )


def _missing(values: dict[str, Any]) -> list[Finding]:
    found = []
    if "base_model" not in values:
        found.append(_missing_key("base_model", "it names the model: a folder or a hub name"))
    if "learning_rate" not in values:
        found.append(_missing_key("learning_rate", "there is no safe default; 2e-4 suits lora"))
    if not {"datasets", "pretraining_dataset"} & values.keys():
        found.append(_missing_key("datasets", "datasets or pretraining_dataset says what to learn"))
    return found


def _unsupported(values: dict[str, Any], *, failed: set[str | None]) -> list[Finding]:
    """Return errors about keys that are not implemented, unless they already have an error."""
    found = []
    for key, value in values.items():
        if key in failed:
            continue
        if key in Config.model_fields and key not in keys.IN_SCHEMA:
            continue
        if (refused := keys.unsupported_keys().get(key)) is not None:
            # 0, "" and an empty list turn a key off, as false does.
            if value and value not in refused.accepts:
                found.append(_unsupported_key(key, value, do=refused.do))
        elif key.startswith("lora_"):
            # Adapter keys of axolotl's plugins have no effect if they are false.
            if value is not False:
                found.append(replace(_unknown(key, key), code="unsupported-key"))
        else:
            found.append(_unknown(key, key))
    return found


def _computed(key: str) -> Finding:
    return Finding(
        code="computed-flag",
        key=key,
        what=f"{key} is computed, it cannot be set",
        why="it follows from attn_implementation",
        do=f"remove {key}",
    )


def _missing_key(key: str, why: str) -> Finding:
    do = f"add a line `{key}: ...`"
    return Finding(code="missing-key", key=key, what=f"{key} is missing", why=why, do=do)


def _unsupported_key(key: str, value: Any, *, do: str) -> Finding:
    return Finding(
        code="unsupported-key",
        key=key,
        what=f"{key} is not implemented",
        why=f"found {_short(value)}; attnimg knows the key from axolotl and does not do it",
        do=do,
    )


def _unknown(key: str, name: str) -> Finding:
    near = keys.nearest_key(name, dataset=key != name)
    return Finding(
        code="unknown-key",
        key=key,
        what=f"{key if key.isprintable() and key else repr(key)} is no key",
        why="neither attnimg nor axolotl knows it, and it would have no effect",
        do=f"did you mean {near}?" if near else "remove it; docs/config-keys.md lists the keys",
    )


def _flags(name: Any, backend: Backend | None, *, bad: bool) -> dict[str, Any]:
    unknown = bad or name == AUTO
    return {
        "attn_implementation": None if bad else name,
        "attn_supports_packing": None if unknown else bool(backend and backend.packing == "native"),
        "attn_uses_flash_lib": None if unknown else bool(backend and backend.uses_flash_lib),
        "attn_needs_dtype_cast": None if unknown else bool(backend and backend.needs_dtype_cast),
    }


def _without_nulls(value: Any) -> Any:
    """Return a value without nulls in dataset entries and special_tokens: null means absent."""
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    if isinstance(value, dict) and value.keys() & _NULLABLE:
        return {
            key: item
            for key, item in value.items()
            if item is not None and not (item is False and key in keys.unsupported_dataset_keys())
        }
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
