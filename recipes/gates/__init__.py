"""The gates on a finished image or wheelhouse: one file each, found by being here.

To add one, copy `floor.py`; name it in the `gates` of images/*.toml; `make render check`.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from recipes.gate_facts import Gate


def gate_names() -> frozenset[str]:
    """Give the name of every gate, without importing one."""
    return frozenset(module.name.replace("_", "-") for module in iter_modules(__path__))


def all_gates() -> tuple[Gate, ...]:
    """Give the gates, by name."""
    return tuple(gate_named(name) for name in sorted(gate_names()))


def gate_named(name: str) -> Gate:
    """Give one of gate_names()."""
    gate = import_module(f"{__name__}.{name.replace('-', '_')}").GATE
    assert isinstance(gate, Gate)
    assert gate.name == name
    return gate


def docs() -> dict[str, str]:
    """Give each gate's description: the docstring of its file."""
    return {
        name: import_module(f"{__name__}.{name.replace('-', '_')}").__doc__ or ""
        for name in sorted(gate_names())
    }
