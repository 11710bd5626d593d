"""The checks (gates) of a finished image or wheelhouse: one file each, found automatically.

To add one, copy `glibc.py`, then `make render check`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pkgutil import iter_modules

from recipes.artifact.facts import Artifact
from recipes.facts import Base, ImagePlan


@dataclass(frozen=True, kw_only=True, slots=True)
class GateFinding:
    """One reason why an artifact may not be shipped.

    Attributes:
        gate: its name.
        file: the path at fault, or the layer, or the package.
        found: what is there.
        needed: what should be there.
        do: the fix.
    """

    gate: str
    file: str
    found: str
    needed: str
    do: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Expected:
    """What an artifact is checked against.

    Attributes:
        plan: of the image.
        torch_archs: the machine code of its torch; empty if that was not read.
        pins: package -> version, of everything that may be installed.
        floor: versions of the base's C and C++ libraries; None if they are not known.
    """

    plan: ImagePlan
    torch_archs: tuple[str, ...] = ()
    pins: Mapping[str, str]
    floor: Base | None = None


def _always(artifact: Artifact, expected: Expected) -> str:
    return ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gate:
    """One gate: a pure function of an artifact and its expected.

    Attributes:
        name: of its file, with hyphens.
        check: returns all findings; none if the artifact passes.
        skip_reason: returns why this gate can't check this artifact; empty if it can.
    """

    name: str
    check: Callable[[Artifact, Expected], tuple[GateFinding, ...]]
    skip_reason: Callable[[Artifact, Expected], str] = field(default=_always)


def gate_names() -> frozenset[str]:
    """Return the name of every gate, without importing one."""
    return frozenset(module.name.replace("_", "-") for module in iter_modules(__path__))


def all_gates() -> tuple[Gate, ...]:
    """Return the gates, sorted by name."""
    return tuple(gate_named(name) for name in sorted(gate_names()))


def gate_named(name: str) -> Gate:
    """Return the gate of that name."""
    gate = import_module(f"{__name__}.{name.replace('-', '_')}").GATE
    assert isinstance(gate, Gate)
    assert gate.name == name
    return gate


def gate_docs() -> dict[str, str]:
    """Return the description of each gate: the docstring of its file."""
    return {
        name: import_module(f"{__name__}.{name.replace('-', '_')}").__doc__ or ""
        for name in sorted(gate_names())
    }
