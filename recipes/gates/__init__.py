"""The checks (gates) of a finished image or wheelhouse: one file each, found automatically.

A gate's file has a function `check`, which returns all findings, and may have `skip_reason`, which
returns why the gate can't check an artifact. To add one, copy `glibc.py`, then `make render check`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pkgutil import iter_modules

from recipes.artifact.facts import Artifact
from recipes.facts import Base, ImagePlan


@dataclass(frozen=True, slots=True)
class GateFinding:
    """One reason why an artifact may not be shipped.

    Attributes:
        file: the path, or the layer, or the package.
        found: its content or state.
        needed: what is allowed instead.
        do: the fix.
    """

    file: str
    found: str
    needed: str
    do: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpectedContents:
    """What an artifact is compared with.

    Attributes:
        plan: of the image.
        platform: what the artifact is for, "linux/amd64".
        torch_archs: the machine code of its torch; empty if that was not read.
        pins: package -> version, of everything that may be installed.
        base: versions of the base's C and C++ libraries; None if they are not known.
        fixed: packages that an image made FROM this one may not replace.
    """

    plan: ImagePlan
    platform: str
    torch_archs: tuple[str, ...] = ()
    pins: Mapping[str, str]
    base: Base | None = None
    fixed: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True, slots=True)
class Gate:
    """One gate: pure functions of an artifact and what is expected of it.

    Attributes:
        name: of its file, with hyphens.
        description: the docstring of its file.
        check: returns all findings; none if the artifact passes.
        skip_reason: returns why this gate can't check this artifact; empty if it can.
    """

    name: str
    description: str
    check: Callable[[Artifact, ExpectedContents], tuple[GateFinding, ...]]
    skip_reason: Callable[[Artifact, ExpectedContents], str]


def gate_names() -> frozenset[str]:
    """Return the name of every gate, without importing one."""
    return frozenset(module.name.replace("_", "-") for module in iter_modules(__path__))


def all_gates() -> tuple[Gate, ...]:
    """Return the gates, sorted by name."""
    return tuple(gate_named(name) for name in sorted(gate_names()))


def gate_named(name: str) -> Gate:
    """Return the gate of that name."""
    module = import_module(f"{__name__}.{name.replace('-', '_')}")
    return Gate(
        name=name,
        description=module.__doc__ or "",
        check=module.check,
        skip_reason=getattr(module, "skip_reason", lambda *_: ""),
    )
