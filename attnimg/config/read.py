"""Read a YAML file, and key=value arguments of the command line, into one mapping."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from attnimg.errors import AttnimgError
from attnimg.files import read_regular
from attnimg.redact import redact

MAX_BYTES = 1_000_000
# A YAML file of 1 MB without aliases has fewer nodes.
_MAX_NODES = 500_000
# libyaml's composer recurses in C, where a stack overflow kills the process. A config needs only
# three levels.
_MAX_DEPTH = 50
# No key needs longer numbers, and Python refuses to print very long ones.
_MAX_BITS = 256

# In YAML 1.1 a float needs a dot, so 1e-4 would be a string. Here it is a float.
FLOAT = re.compile(
    r"""[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
    |[0-9][0-9_]*[eE][-+]?[0-9]+
    |\.[0-9_]+(?:[eE][-+]?[0-9]+)?
    |\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)

# The beginning of a setting; the keys of nested values are separated by dots.
_SETTING = re.compile(r"\s*[\w-]+(\.[\w-]+)*\s*=")


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]  # in C if available
    """Load YAML 1.1 with safe tags only; 1e-4 is a number, dates are strings."""

    yaml_implicit_resolvers = {  # noqa: RUF012  the base class's own attribute
        first: [
            (tag, regexp)
            for tag, regexp in resolvers
            if tag not in ("tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp")
        ]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Return the value of a node; raise an error with its place if its tag does not match."""
        try:
            value = super().construct_object(node, deep=deep)
        except yaml.YAMLError:
            raise
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            text = f"{_node_text(node)} does not match its tag {node.tag}"
            raise yaml.constructor.ConstructorError(None, None, text, node.start_mark) from error
        if isinstance(value, bytes):
            text = "found !!binary, needed text"
        elif isinstance(value, int) and value.bit_length() > _MAX_BITS:
            text = f"found a number of {value.bit_length()} bits, needed at most {_MAX_BITS}"
        else:
            return value
        raise yaml.constructor.ConstructorError(None, None, text, node.start_mark)


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+0123456789."))


class _Duplicate(yaml.YAMLError):
    def __init__(self, key: str, first: yaml.Mark, again: yaml.Mark) -> None:
        super().__init__(key)
        self.key, self.first, self.again = key, first, again


def read_yaml(path: str) -> dict[str, Any]:
    """Read one file.

    Args:
        path: a YAML file of at most 1 MB.

    Returns:
        Its top-level mapping; keys that are not strings are converted to their YAML text.

    Raises:
        AttnimgError: with one of the codes file-missing, too-large, not-text, yaml-syntax,
            duplicate-key, empty, not-a-mapping.
    """
    return parse_yaml(_read_text(path), name=path)


def parse_yaml(text: str, *, name: str) -> dict[str, Any]:
    """Parse the text of one file; see read_yaml."""
    value = _construct(text, name=name)
    if value is None:
        what = f"{name} is empty"
        why = "found no value, needed a mapping of keys"
        do = "start from examples/lora.yaml"
        raise AttnimgError(what, why=why, do=do, code="empty")
    if not isinstance(value, dict):
        what = f"{name} is not a mapping"
        why = f"found {type(value).__name__} at the top level, needed a mapping of keys"
        do = "write each setting as `key: value`, with a space after the colon"
        raise AttnimgError(what, why=why, do=do, code="not-a-mapping")
    return {_key_text(key): item for key, item in value.items()}


def _key_text(key: object) -> str:
    if isinstance(key, str):
        return key
    return "null" if key is None else str(key).lower()


def parse_value(text: str, *, name: str = "the value") -> Any:
    """Parse the value of a `key=value` argument as YAML.

    Args:
        text: the value; errors do not quote it, since it may be a secret.
        name: its name in errors.

    Raises:
        AttnimgError: it is not YAML.
    """
    return _construct(text, name=name)


def split_settings(arguments: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """Return the files and the key=value settings among a command's arguments."""
    settings = tuple(text for text in arguments if _is_setting(text))
    return [text for text in arguments if text not in settings], settings


def _is_setting(text: str) -> bool:
    """Return whether an argument is key=value, and not the name of a file."""
    return _SETTING.match(text) is not None and not os.path.lexists(text)


def with_overrides(values: dict[str, Any], overrides: tuple[str, ...]) -> dict[str, Any]:
    """Return a config with some keys set.

    Args:
        values: the mapping from the YAML file; it is not changed.
        overrides: "key=value". The value is YAML; dots in the key separate the keys of nested
            mappings and the indices of lists.

    Raises:
        AttnimgError: an argument is not key=value, or its key does not exist in a nested value.
    """
    result: Any = dict(values)
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            what = f"{redact(text)!r} is not key=value"
            why = "needed a setting such as learning_rate=1e-4 after the config"
            do = "write it as key=value, without spaces around the ="
            raise AttnimgError(what, why=why, do=do, code="bad-value")
        key = key.strip()
        new = parse_value(value, name=f"the value of {key}")
        result = _replace(result, key.split("."), new, setting=key)
    assert isinstance(result, dict)
    return result


def _replace(node: Any, parts: list[str], value: Any, *, setting: str) -> Any:
    """Return a copy of `node` with the value at the path `parts` replaced."""
    if not parts:
        return value
    part, *rest = parts
    if node is None or isinstance(node, dict):
        return {
            **(node or {}),
            part: _replace((node or {}).get(part), rest, value, setting=setting),
        }
    if isinstance(node, list) and part.isascii() and part.isdigit() and int(part) < len(node):
        copy = list(node)
        copy[int(part)] = _replace(node[int(part)], rest, value, setting=setting)
        return copy
    kind = f"a list of {len(node)}" if isinstance(node, list) else f"a {type(node).__name__}"
    what = f"the key {setting!r} does not fit the config"
    why = f"found {kind}, needed a value that has the key {part!r}"
    do = "correct the key so that it names a value of the config file"
    raise AttnimgError(what, why=why, do=do, code="bad-value")


def _read_text(path: str) -> str:
    try:
        raw = read_regular(Path(path), at_most=MAX_BYTES)
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno == errno.EFBIG:
            what = f"{path} is too large for a config"
            why = f"found more than {MAX_BYTES:,} bytes, needed at most that many"
            do = "pass the YAML config, not a dataset or a checkpoint"
            raise AttnimgError(what, why=why, do=do, code="too-large") from error
        if _is_setting(path):
            what = f"{path.partition('=')[0]}=... is a setting, not a config"
            why = "needed a YAML file before the settings"
            do = f"write the config's path before {path.partition('=')[0]}=..."
            raise AttnimgError(what, why=why, do=do, code="file-missing") from error
        reason = getattr(error, "strerror", None) or str(error)
        what = f"{path} cannot be read"
        why = f"{reason[0].lower()}{reason[1:]}"
        do = "check the path; inside a container, the folder must be mounted (-v)"
        raise AttnimgError(what, why=why, do=do, code="file-missing") from error
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _not_text(path, f"byte {error.start} is not valid UTF-8") from error
    if "\0" in text:
        raise _not_text(path, f"byte {raw.index(0)} is NUL")
    return text


def _not_text(path: str, why: str) -> AttnimgError:
    return AttnimgError(
        f"{path} is not text",
        why=f"{why}, needed UTF-8 text",
        do="pass the YAML config; save it as UTF-8",
        code="not-text",
    )


def _construct(text: str, *, name: str) -> Any:
    try:
        _check_depth(text)
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _check_aliases(node, name=name)
            _check_duplicates(node, loader)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except _Duplicate as error:
        what = f"{name} has the key {error.key} twice"
        why = f"found at {_place(error.first)} and {_place(error.again)}, needed once"
        do = "remove one of the two lines"
        raise AttnimgError(what, why=why, do=do, code="duplicate-key", key=error.key) from error
    except yaml.reader.ReaderError as error:
        raise _not_text(name, f"character {error.position} is {error.reason}") from error
    except yaml.MarkedYAMLError as error:
        raise _syntax(name, error) from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        what = f"{name} is not YAML"
        why = str(error)
        do = "check the value against docs/config-keys.md"
        raise AttnimgError(what, why=why, do=do, code="yaml-syntax") from error


def _syntax(name: str, error: yaml.MarkedYAMLError) -> AttnimgError:
    mark = error.problem_mark or error.context_mark
    problem = str(error.problem or error.context)
    tab = "'\\t'" in problem
    return AttnimgError(
        f"{name} is not YAML" + (f": {_place(mark)}" if mark else ""),
        why=problem + (f" ({error.context})" if error.context and error.problem else ""),
        do="indent with spaces: YAML does not allow tabs"
        if tab
        else "correct that line; check its indentation",
        code="yaml-syntax",
    )


def _place(mark: yaml.Mark) -> str:
    return f"line {mark.line + 1}, column {mark.column + 1}"


def _node_text(node: yaml.Node) -> str:
    return repr(node.value)[:40] if isinstance(node, yaml.ScalarNode) else "a list or mapping"


def _check_duplicates(root: yaml.Node, loader: _Loader) -> None:
    """Raise for a duplicate key, before merges (<<) add keys that a mapping may override."""
    seen: set[int] = set()
    waiting = [root]
    while waiting:
        node = waiting.pop()
        if id(node) in seen or isinstance(node, yaml.ScalarNode):
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting += node.value
            continue
        places: dict[object, yaml.Mark] = {}
        for key, value in node.value:
            waiting += [key, value]
            if isinstance(key, yaml.ScalarNode):
                merge = key.tag == "tag:yaml.org,2002:merge"
                found = key.value if merge else loader.construct_object(key)
                if found in places:
                    raise _Duplicate(key.value, places[found], key.start_mark)
                places[found] = key.start_mark


def _check_depth(text: str) -> None:
    """Raise for deep nesting; it reads YAML events, for which the parser does not recurse."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > _MAX_DEPTH:
            raise yaml.composer.ComposerError(
                problem=f"nested more than {_MAX_DEPTH} levels deep",
                problem_mark=event.start_mark,  # type: ignore[arg-type]  # yaml has two types of marks
            )


def _check_aliases(root: yaml.Node, *, name: str) -> None:
    """Raise for aliases that expand to too many values, or that contain themselves."""
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()

    def size(node: yaml.Node) -> int:
        if isinstance(node, yaml.ScalarNode):
            return 1
        if id(node) in open_nodes:
            raise yaml.constructor.ConstructorError(
                None, None, "an anchor contains itself", node.start_mark
            )
        if id(node) not in sizes:
            open_nodes.add(id(node))
            children = node.value
            if isinstance(node, yaml.MappingNode):
                children = [part for pair in node.value for part in pair]
            sizes[id(node)] = 1 + sum(size(child) for child in children)
            open_nodes.discard(id(node))
        return sizes[id(node)]

    if (total := size(root)) > _MAX_NODES:
        what = f"{name} is too large for a config"
        why = f"its aliases (*name) expand to {total:.3g} values, needed at most {_MAX_NODES:,}"
        do = "write the values without anchors and aliases"
        raise AttnimgError(what, why=why, do=do, code="too-large")
