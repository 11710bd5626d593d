"""Find functions and classes of loaded modules that foreign code replaced.

A kernel runs in the process of the run, where its code may assign to any module: to
torch.optim.AdamW.step, os.replace, or the norm of a model's class. Then the run itself is wrong,
whatever attention computes. Libraries replace functions of their own package, as torch does when it
first compiles; only code of another package counts here.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Mapping
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

# Its globals are the functions of the FlashAttention kernel that transformers loaded last.
# Source: transformers 5.22.2, modeling_flash_attention_utils.py, lazy_import_flash_attention
# (2026-11-28).
_SLOTS = "transformers.modeling_flash_attention_utils"


class _Owner(NamedTuple):
    """A module or class.

    Attributes:
        name: its full name.
        attributes: its own ones, as they are now.
        before: those that were code when the object was created.
        bases: the classes whose attributes it inherits.
    """

    name: str
    attributes: Mapping[str, Any]
    before: Mapping[str, Any]
    bases: tuple[type, ...] = ()


class LoadedCode:
    """The functions and classes of all modules that were loaded when the object was created."""

    def __init__(self) -> None:
        self._owners = list(_list_owners())

    def replaced(self) -> list[str]:
        """Return what code of another package replaced since, "os: replace was replaced ..."."""
        return [
            f"{owner.name}: {name} was replaced by code of {by}"
            for owner in self._owners
            for name, now in _replacements(owner)
            if _package(by := _origin(now)) != _package(owner.name)
        ]


def _replacements(owner: _Owner) -> Iterator[tuple[str, Any]]:
    """Yield the attributes that changed, and those that now hide one of a base class."""
    for name, now in [*owner.attributes.items()]:
        if name in owner.before:
            if now is not owner.before[name]:
                yield name, now
        elif owner.bases and _is_code(now) and any(name in vars(base) for base in owner.bases):
            yield name, now


def _list_owners() -> Iterator[_Owner]:
    """Yield each loaded module, and each class that is defined in it."""
    for name, module in [*sys.modules.items()]:
        if not issubclass(type(module), ModuleType):
            continue
        code = _code_of(module)
        if name == _SLOTS:
            code = {key: x for key, x in code.items() if _package(_origin(x)) == _package(name)}
        yield _Owner(name, vars(module), code)
        for key, value in [*vars(module).items()]:
            if issubclass(type(value), type) and vars(value).get("__module__") == name:
                yield _Owner(f"{name}.{key}", vars(value), _code_of(value), value.__mro__[1:])


def _code_of(owner: Any) -> dict[str, Any]:
    return {name: value for name, value in [*vars(owner).items()] if _is_code(value)}


def _is_code(value: object) -> bool:
    # isinstance() would also ask the value's own __class__, which warns for a deprecated name.
    return issubclass(type(value), _CODE)


def _origin(value: Any) -> str:
    """Return the name of the module that code is from; functools.wraps() does not hide it."""
    for kinds, attribute in (*_WRAPPERS, *_WRAPPERS):
        if isinstance(value, kinds):
            value = getattr(value, attribute)
    own = getattr(value, "__globals__", {}).get("__name__")
    return str(own or getattr(value, "__module__", None) or type(value).__module__)


def _package(name: str) -> str:
    return name.partition(".")[0]
