"""Rules on where backends are known to fail: read from TOML, and matched against a run.

They are data, so that they can be newer than the image: attn_known_bad names a file that is read
besides the one in the package. A rule of the same id replaces the package's.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from datetime import date
from importlib import resources
from pathlib import Path
from typing import Any, get_args

from attnimg.errors import AttnimgError
from attnimg.facts import Backend, DType, KnownBad, Machine, Problem, Reason
from attnimg.files import read_regular

KEY = "attn_known_bad"
_FEATURES = ("packing", "window", "softcap", "sinks", "dropout", "training", "compiled")
_LARGEST_FILE = 1 << 20
# What a rule may say: the type of each field, and whether it must be there.
_FIELDS: dict[str, tuple[type, bool]] = {
    "id": (str, True),
    "backends": (list, True),
    "effect": (str, True),
    "link": (str, True),
    "date": (date, True),
    "expires": (date, False),
    "status": (str, False),
    "packages": (dict, False),
    "archs": (list, False),
    "dtypes": (list, False),
    "head_dim_qk": (list, False),
    "head_dim_v": (list, False),
    "heads_differ": (bool, False),
    "features": (dict, False),
    "row_tokens_min": (int, False),
}
_TYPE_NAMES = {
    str: "a text",
    list: "a list",
    dict: "a table",
    date: "a date, such as 2026-11-21",
    bool: "true or false",
    int: "a whole number",
}


def load(named: str | None, *, today: date) -> tuple[KnownBad, ...]:
    """Read the package's rules and those of a file that the user names, without the expired.

    Raises:
        AttnimgError: the user's file can't be read, or holds something that is no rule.
    """
    own = resources.files("attnimg") / "data" / "known_bad.toml"
    rules = {rule.id: rule for rule in parse(own.read_text(encoding="utf-8"), place=str(own))}
    if named is not None:
        rules |= {rule.id: rule for rule in parse(_read(named), place=named)}
    day = today.isoformat()
    return tuple(rule for rule in rules.values() if rule.expires is None or day < rule.expires)


def reasons_against(backend: Backend, machine: Machine, problem: Problem) -> Iterator[Reason]:
    """Give a reason for each of the problem's rules that holds here.

    Where the versions of packages are not known, rules about versions are left out.
    """
    for rule in problem.known_bad:
        if _holds(rule, backend, machine, problem):
            found = "seen here" if rule.status == "seen" else "reported, not seen here"
            text = f"{rule.id}: {rule.effect} ({found}, {rule.date}; {rule.link})"
            yield Reason(code="known-bad", text=text)


def parse(text: str, *, place: str) -> tuple[KnownBad, ...]:
    """Read rules, refusing everything that is not understood: a typo must not disarm a rule.

    Raises:
        AttnimgError: with the place.
    """
    try:
        tables = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise _refusal(place, f"it is not TOML: {error}") from error
    rules = tables.pop("rule", [])
    if tables or not isinstance(rules, list) or not all(isinstance(rule, dict) for rule in rules):
        found = ", ".join(tables) or "rule"
        raise _refusal(place, f"found {found} at the top, needed tables [[rule]]")
    parsed = [
        _rule(values, place=f"{place}, rule {number} ({values.get('id', 'no id')})")
        for number, values in enumerate(rules, 1)
    ]
    ids = [rule.id for rule in parsed]
    if len(set(ids)) < len(ids):
        twice = next(name for name in ids if ids.count(name) > 1)
        raise _refusal(place, f"found two rules with the id {twice}")
    return tuple(parsed)


def _read(named: str) -> str:
    try:
        return read_regular(Path(named), at_most=_LARGEST_FILE).decode()
    except OSError as error:
        raise _refusal(named, f"it can't be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise _refusal(named, "it is not text") from error


def _rule(values: Mapping[str, Any], *, place: str) -> KnownBad:
    for name, value in values.items():
        if name not in _FIELDS:
            raise _refusal(place, f"found {name}, needed one of {', '.join(_FIELDS)}")
        needed = _FIELDS[name][0]
        if type(value) is not needed:
            raise _refusal(place, f"found {name} = {value!r}, needed {_TYPE_NAMES[needed]}")
    for name, (_, required) in _FIELDS.items():
        if required and not values.get(name):
            raise _refusal(place, f"{name} is missing or empty")
    _check_choices(values, place=place)
    _check_versions(values.get("packages", {}), place=place)
    return KnownBad(
        **{
            **values,
            **{name: str(values[name]) for name in ("date", "expires") if name in values},
            **{name: frozenset(values.get(name, ())) for name in ("backends", "archs", "dtypes")},
            **{
                name: tuple(values[name])
                for name in ("head_dim_qk", "head_dim_v")
                if name in values
            },
        }
    )


def _check_choices(values: Mapping[str, Any], *, place: str) -> None:
    """Check what the values themselves must be."""
    choices = {
        "dtypes": (values.get("dtypes", []), get_args(DType)),
        "status": ([values.get("status", "reported")], ("reported", "seen")),
        "features": (list(values.get("features", {})), _FEATURES),
    }
    for name, (found, allowed) in choices.items():
        for value in found:
            if value not in allowed:
                raise _refusal(place, f"found {value!r} in {name}, needed {', '.join(allowed)}")
    for name in ("backends", "archs"):
        if not all(isinstance(value, str) for value in values.get(name, [])):
            raise _refusal(place, f"found {values[name]!r}, needed texts in {name}")
    if not all(isinstance(value, bool) for value in values.get("features", {}).values()):
        raise _refusal(place, "found a feature that is neither true nor false")
    for name in ("head_dim_qk", "head_dim_v"):
        sizes = values.get(name, [1, 1])
        if [type(size) for size in sizes] != [int, int] or not 1 <= sizes[0] <= sizes[1]:
            raise _refusal(place, f"found {name} = {sizes}, needed [lowest, highest]")


def _check_versions(packages: Mapping[str, Any], *, place: str) -> None:
    if not packages:
        return
    from packaging.specifiers import InvalidSpecifier, SpecifierSet

    for name, versions in packages.items():
        try:
            SpecifierSet(versions)
        except (InvalidSpecifier, TypeError, AttributeError) as error:
            why = f'found {name} = {versions!r}, needed versions such as ">=2.8,<2.9"'
            raise _refusal(place, why) from error


def _holds(rule: KnownBad, backend: Backend, machine: Machine, problem: Problem) -> bool:
    if backend.name not in rule.backends:
        return False
    if rule.archs and machine.arch.name not in rule.archs:
        return False
    if rule.dtypes and problem.dtype not in rule.dtypes:
        return False
    # Packed rows of a batch may reach a kernel one after another, as one.
    rows = problem.rows if problem.packing else 1
    if rule.row_tokens_min and (problem.sequence_len or 0) * rows < rule.row_tokens_min:
        return False
    return _versions_match(rule, machine) and _shapes_match(rule, problem)


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
    """Tell whether a rule's features and sizes are those of the run, or of one of its layers."""
    run = {
        "packing": problem.packing,
        "dropout": problem.dropout > 0,
        "training": problem.training,
        "compiled": problem.compiled,
    }
    if any(run[name] != value for name, value in rule.features.items() if name in run):
        return False
    of_layers = {name: value for name, value in rule.features.items() if name not in run}
    sized = (rule.head_dim_qk, rule.head_dim_v, rule.heads_differ) != (None, None, None)
    if not of_layers and not sized:
        return True
    for layer in problem.model.layers if problem.model else ():
        used = {
            "window": layer.window is not None,
            "softcap": bool(layer.softcap),
            "sinks": layer.sinks,
        }
        if (
            all(used[name] == value for name, value in of_layers.items())
            and _within(layer.head_dim_qk, rule.head_dim_qk)
            and _within(layer.head_dim_v, rule.head_dim_v)
            and rule.heads_differ in (None, layer.heads != layer.kv_heads)
        ):
            return True
    return False


def _within(size: int, bounds: tuple[int, int] | None) -> bool:
    return bounds is None or bounds[0] <= size <= bounds[1]


def _refusal(place: str, why: str) -> AttnimgError:
    return AttnimgError(
        "the rules on known-bad backends could not be read",
        why=f"{place}: {why}",
        do=f"correct the file, or remove {KEY}",
        code="known-bad-file",
        key=KEY,
    )
