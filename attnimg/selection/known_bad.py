"""Read TOML rules about where backends are known to fail, and match them against a run.

The config key attn_known_bad names a file with further rules, which can be newer than the image. A
rule with the same id replaces the package's.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from datetime import date
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnimg.errors import AttnimgError
from attnimg.facts import Backend, Machine
from attnimg.files import data_file, read_regular
from attnimg.run_facts import KnownBad, Problem, Reason

if TYPE_CHECKING:
    from pydantic import TypeAdapter
    from pydantic_core import ErrorDetails

KEY = "attn_known_bad"
_LARGEST_FILE = 1 << 20


def load(named: str | None, *, today: date) -> tuple[KnownBad, ...]:
    """Return the package's rules and those of the user's file, without expired ones.

    Raises:
        AttnimgError: the user's file can't be read, or has an invalid rule.
    """
    own = data_file("known_bad.toml")
    rules = {rule.id: rule for rule in parse(own.read_text("utf-8"), place=str(own))}
    if named is not None:
        rules |= {rule.id: rule for rule in parse(_read(named), place=named)}
    return tuple(rule for rule in rules.values() if rule.expires is None or today < rule.expires)


def reasons_against(backend: Backend, machine: Machine, problem: Problem) -> Iterator[Reason]:
    """Yield a reason for each of the problem's rules that matches.

    Rules about versions are skipped where the versions of packages are not known.
    """
    for rule in problem.known_bad:
        if _matches(rule, backend, machine, problem):
            found = "seen here" if rule.status == "seen" else "reported, not seen here"
            text = f"{rule.id}: {rule.effect} ({found}, {rule.date}; {rule.link})"
            yield Reason(code="known-bad", text=text)


def parse(text: str, *, place: str) -> tuple[KnownBad, ...]:
    """Parse the rules of a file strictly, so that a typo can't disable a rule.

    Raises:
        AttnimgError: the text is invalid; the message has the place.
    """
    try:
        tables = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise _error(place, f"it is not TOML: {error}") from error
    rows = tables.pop("rule", [])
    if tables or not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        found = ", ".join(tables) or "rule"
        raise _error(place, f"found {found} at the top, needed tables [[rule]]")
    rules: dict[str, KnownBad] = {}
    for number, row in enumerate(rows, 1):
        rule = _rule(row, place=f"{place}, rule {number} ({row.get('id', 'no id')})")
        if rule.id in rules:
            raise _error(place, f"found two rules with the id {rule.id}")
        rules[rule.id] = rule
    return tuple(rules.values())


def _read(named: str) -> str:
    try:
        return read_regular(Path(named), at_most=_LARGEST_FILE).decode()
    except OSError as error:
        raise _error(named, f"it can't be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise _error(named, "it is not text") from error


def _rule(row: dict[str, Any], *, place: str) -> KnownBad:
    from packaging.specifiers import InvalidSpecifier, SpecifierSet
    from pydantic import ValidationError

    try:
        rule = _adapter().validate_python(row)
    except ValidationError as error:
        raise _error(place, "\n".join(map(_describe, error.errors()))) from error
    for name in ("id", "backends", "effect", "link"):
        if not getattr(rule, name):
            raise _error(place, f"found no {name}; it is required")
    for name in ("head_dim_qk", "head_dim_v"):
        low, high = getattr(rule, name) or (1, 1)
        if not 1 <= low <= high:
            raise _error(place, f"found {name} = {[low, high]}, needed [lowest, highest]")
    for name, versions in rule.packages.items():
        try:
            SpecifierSet(versions)
        except InvalidSpecifier as error:
            why = f'found packages.{name} = {versions!r}, needed versions such as ">=2.8,<2.9"'
            raise _error(place, why) from error
    return rule


def _describe(error: ErrorDetails) -> str:
    """Return the text of a pydantic error, in TOML's terms."""
    key = ".".join(str(part) for part in error["loc"] if part != "[key]")
    if error["type"] == "missing":
        return f"found no {key}; it is required"
    text = error["msg"].lower().replace("frozenset", "list").replace("tuple", "list")
    return f"found {key} = {error['input']!r}: {text}"


@cache
def _adapter() -> TypeAdapter[KnownBad]:
    """Return pydantic's validator for the dataclass KnownBad."""
    from pydantic import ConfigDict, TypeAdapter, with_config

    return TypeAdapter(with_config(ConfigDict(extra="forbid"))(KnownBad))


def _error(place: str, why: str) -> AttnimgError:
    return AttnimgError(
        "the rules on known-bad backends could not be read",
        why=f"{place}: {why}",
        do=f"correct the file, or remove {KEY}",
        code="known-bad-file",
        key=KEY,
    )


def _matches(rule: KnownBad, backend: Backend, machine: Machine, problem: Problem) -> bool:
    # The packed rows of a batch may be flattened into one for a kernel.
    rows = problem.rows if problem.packing else 1
    return (
        backend.name in rule.backends
        and (not rule.archs or machine.arch.name in rule.archs)
        and (not rule.dtypes or problem.dtype in rule.dtypes)
        and (problem.sequence_len or 0) * rows >= (rule.row_tokens_min or 0)
        and _versions_match(rule, machine)
        and _shapes_match(rule, problem)
    )


def _versions_match(rule: KnownBad, machine: Machine) -> bool:
    if not rule.packages:
        return True
    from packaging.specifiers import SpecifierSet
    from packaging.version import InvalidVersion

    for package, versions in rule.packages.items():
        found = machine.torch if package == "torch" else (machine.packages or {}).get(package)
        try:
            if found is None or not SpecifierSet(versions).contains(found, prereleases=True):
                return False
        except InvalidVersion:
            return False
    return True


def _shapes_match(rule: KnownBad, problem: Problem) -> bool:
    """Return whether a rule's features and sizes match the run, or one of its layers."""
    of_run = {
        "packing": problem.packing,
        "dropout": problem.dropout > 0,
        "training": problem.training,
        "compiled": problem.compiled,
    }
    used = {name for name, is_used in of_run.items() if is_used}
    sized = (rule.head_dim_qk, rule.head_dim_v, rule.heads_differ) != (None, None, None)
    if not sized and rule.features.keys() <= of_run.keys():
        return all((name in used) == value for name, value in rule.features.items())
    return any(
        all((name in used | layer.features) == value for name, value in rule.features.items())
        and _within(layer.head_dim_qk, rule.head_dim_qk)
        and _within(layer.head_dim_v, rule.head_dim_v)
        and rule.heads_differ in (None, layer.heads != layer.kv_heads)
        for layer in (problem.model.layers if problem.model else ())
    )


def _within(size: int, bounds: tuple[int, int] | None) -> bool:
    return bounds is None or bounds[0] <= size <= bounds[1]
