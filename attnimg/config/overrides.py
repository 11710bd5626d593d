"""Set config keys from the command line: learning_rate=1e-4, datasets.0.path=x.jsonl."""

from __future__ import annotations

from typing import Any

from attnimg.config.read import parse_value
from attnimg.errors import AttnimgError


def with_overrides(values: dict[str, Any], overrides: tuple[str, ...]) -> dict[str, Any]:
    """Set keys of a config.

    Args:
        values: the YAML's mapping; not changed.
        overrides: "key=value"; the value is YAML, a dotted key nests, a number indexes a list.

    Raises:
        AttnimgError: an argument is not key=value, or nests into something that holds no keys.
    """
    result: Any = dict(values)
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise AttnimgError(
                f"{text!r} is not key=value",
                why="after the config come settings such as learning_rate=1e-4",
                do="write it as key=value, without blanks around the =",
                code="bad-value",
            )
        result = _with(result, key.strip().split("."), parse_value(value), whole=text)
    assert isinstance(result, dict)
    return result


def _with(node: Any, parts: list[str], value: Any, *, whole: str) -> Any:
    """Copy `node` with the value at the path `parts` replaced."""
    if not parts:
        return value
    part, *rest = parts
    if node is None or isinstance(node, dict):
        return {**(node or {}), part: _with((node or {}).get(part), rest, value, whole=whole)}
    if isinstance(node, list) and part.isascii() and part.isdigit() and int(part) < len(node):
        copy = list(node)
        copy[int(part)] = _with(node[int(part)], rest, value, whole=whole)
        return copy
    kind = f"a list of {len(node)}" if isinstance(node, list) else repr(node)
    raise AttnimgError(
        f"{whole!r} does not fit the config",
        why=f"found {kind} where {part!r} should lie",
        do="check the key against the config file",
        code="bad-value",
    )
