"""Find functions and classes of loaded modules that foreign code replaced.

A kernel runs in the process of the run, where its code may assign to any module: to
torch.optim.AdamW.step, os.replace, or the norm of a model's class. Then the run itself is wrong,
whatever attention computes. Libraries replace functions of their own package by new ones, as torch
does when it first compiles. What counts here is code of another package, and code of the same
package that was there before under another name (torch.softmax set to torch.sigmoid).
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, MethodDescriptorType, MethodType, ModuleType
from types import WrapperDescriptorType as SlotType
from typing import Any, NamedTuple

_CODE = (
    FunctionType, BuiltinFunctionType, MethodType, MethodDescriptorType, SlotType, staticmethod,
    classmethod, property, functools.partial, type,
)  # fmt: skip

# Wrappers of a function, and the attribute that has it.
_WRAPPERS = ((property, "fget"), ((staticmethod, classmethod, MethodType), "__func__"),
             (functools.partial, "func"))  # fmt: skip

# The CuTe DSL, in which FlashAttention-4 is written. On import and in its first call it puts a hook
# of its own before sys.excepthook, which it calls.
# Source: nvidia-cutlass-dsl 4.8.1, base_dsl/common.py:167 and base_dsl/dsl.py:462 (2026-11-28).
_CUTE_DSL = "cutlass.base_dsl."

# Its globals are the functions of the FlashAttention kernel that transformers loaded last.
# Source: transformers 5.22.2, modeling_flash_attention_utils.py, lazy_import_flash_attention
# (2026-11-28).
_SLOTS = "transformers.modeling_flash_attention_utils"


class _Owner(NamedTuple):
    """A module, a class, or a dict of one of these, such as transformers' losses by name.

    Attributes:
        name: its full name.
        attributes: its own ones, as they are now.
        before: those that were code when the object was created.
        size: how many attributes it had then.
        bases: the classes whose attributes it inherits.
    """

    name: str
    attributes: Mapping[str, Any]
    before: Mapping[str, Any]
    size: int
    bases: tuple[type, ...] = ()


class LoadedCode:
    """The functions and classes of all modules that were loaded when the object was created.

    Args:
        within: only modules with these names, and those below them; all by default.
    """

    def __init__(self, within: tuple[str, ...] = ()) -> None:
        modules = {name: x for name, x in [*sys.modules.items()] if _is_within(name, within)}
        self._names, self._only = frozenset(modules), bool(within)
        self._owners = list(_list_owners(modules))

    def replaced(self) -> list[str]:
        """Return what was replaced since: "os: replace was replaced by code of ..."."""
        found = [(owner, *change) for owner in self._owners for change in _replacements(owner)]
        known: set[int] = set()
        if found:
            known = {id(_unwrap(x)) for owner in self._owners for x in owner.before.values()}
        lines = [
            f"{owner.name}: {name} was replaced by code of {_origin(now)}"
            for owner, name, before, now in found
            if (_package(_origin(now)) != _package(owner.name) or _is_renamed(before, now, known))
            and not (owner.name == "sys" and name == "excepthook" and is_of_cute_dsl(now))
        ]
        return lines if self._only else lines + list(self._changed_since())

    def _changed_since(self) -> Iterator[str]:
        """Yield the changed code of modules that were loaded later, such as that of a model.

        Their packages were loaded before. Code in them is a replacement if it is of a package that
        was loaded since, and that no source file of theirs names. Modules that a compiler wrote
        into its cache are left out.
        """
        packages = {_package(name) for name in self._names}
        new_packages = {_package(name) for name in [*sys.modules]} - packages
        later = {
            name: x
            for name, x in [*sys.modules.items()]
            if name not in self._names and _package(name) in packages and _is_installed(name, x)
        }
        found: dict[tuple[str, str], list[tuple[str, str, str]]] = {}
        for owner in _list_owners(later):
            for name, value in owner.before.items():
                by = _origin(value)
                if _package(by) in new_packages:
                    pair = _package(owner.name), _package(by)
                    found.setdefault(pair, []).append((owner.name, name, by))
        for (package, foreign), lines in found.items():
            sources = (_source(later[name]) for name in later if _package(name) == package)
            if not any(re.search(rf"\b{re.escape(foreign)}\b", source) for source in sources):
                for owner_name, name, by in lines:
                    yield f"{owner_name}: {name} was replaced by code of {by}"


def is_of_cute_dsl(hook: object) -> bool:
    """Return whether a hook for exceptions is one of the CuTe DSL, which calls the one before."""
    return _origin(hook).startswith(_CUTE_DSL)


def _is_within(name: str, within: tuple[str, ...]) -> bool:
    return not within or any(name == one or name.startswith(f"{one}.") for one in within)


def _is_installed(name: str, module: ModuleType) -> bool:
    """Return whether a module is in the folder of its package."""
    folders = getattr(sys.modules.get(_package(name)), "__path__", [])
    file = str(getattr(module, "__file__", None) or "")
    return any(file.startswith(f"{folder}/") for folder in folders)


def _source(module: ModuleType) -> str:
    path = Path(getattr(module, "__file__", None) or "/")
    try:
        return path.read_text(encoding="utf-8", errors="replace") if path.suffix == ".py" else ""
    except OSError:
        return ""


def _replacements(owner: _Owner) -> Iterator[tuple[str, Any, Any]]:
    """Yield the attributes that changed, and those that now hide one of a base class."""
    attributes = owner.attributes
    for name, before in owner.before.items():
        now = attributes.get(name, before)
        if now is not before:
            yield name, before, now
    if not owner.bases or len(attributes) == owner.size:
        return
    for name, now in [*attributes.items()]:
        if name not in owner.before and _is_code(now):
            hidden = next((vars(base)[name] for base in owner.bases if name in vars(base)), None)
            if hidden is not None:
                yield name, hidden, now


def _is_renamed(before: Any, now: Any, known: set[int]) -> bool:
    """Return whether an attribute now has code that was known under another name."""
    return _unwrap(now) is not _unwrap(before) and id(_unwrap(now)) in known


def _list_owners(modules: Mapping[str, ModuleType]) -> Iterator[_Owner]:
    """Yield modules, the classes that are defined in them, and the dicts of both, each once."""
    seen: set[int] = set()
    for name, module in modules.items():
        if not issubclass(type(module), ModuleType):
            continue
        code = _code_of(module)
        if name == _SLOTS:
            code = {key: x for key, x in code.items() if _package(_origin(x)) == _package(name)}
        yield _Owner(name, vars(module), code, len(vars(module)))
        yield from _list_dicts(name, module, seen)
        for key, value in [*vars(module).items()]:
            if issubclass(type(value), type) and vars(value).get("__module__") == name:
                owner = f"{name}.{key}"
                size, bases = len(vars(value)), value.__mro__[1:]
                yield _Owner(owner, vars(value), _code_of(value), size, bases)
                yield from _list_dicts(owner, value, seen)


def _list_dicts(name: str, owner: Any, seen: set[int]) -> Iterator[_Owner]:
    """Yield the dicts with names as keys and code as values."""
    for key, value in [*vars(owner).items()]:
        is_dict = issubclass(type(value), dict) and not key.startswith("__")
        if is_dict and id(value) not in seen:
            seen.add(id(value))
            code = {of: x for of, x in [*dict.items(value)] if isinstance(of, str) and _is_code(x)}
            if code:
                yield _Owner(f"{name}.{key}", value, code, len(value))


def _code_of(owner: Any) -> dict[str, Any]:
    return {name: value for name, value in [*vars(owner).items()] if _is_code(value)}


def _is_code(value: object) -> bool:
    # isinstance() would also ask the value's own __class__, which warns for a deprecated name.
    return issubclass(type(value), _CODE)


def _origin(value: Any) -> str:
    """Return the name of the module that code is from; functools.wraps() does not hide it."""
    value = _unwrap(value)
    space = getattr(value, "__globals__", None)
    own = space.get("__name__") if isinstance(space, dict) else None
    return str(own or getattr(value, "__module__", None) or type(value).__module__)


def _unwrap(value: Any) -> Any:
    """Return the function in a property, a method or a partial function."""
    for kinds, attribute in (*_WRAPPERS, *_WRAPPERS):
        if isinstance(value, kinds):
            value = getattr(value, attribute)
    return value


def _package(name: str) -> str:
    return name.partition(".")[0]
