"""What a gate is, what it finds, and what an artifact was meant to be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from recipes.artifact.facts import Artifact
from recipes.facts import Floor, Plan


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One reason why an artifact may not be shipped.

    Attributes:
        gate: who says so.
        file: the path at fault, or the layer, or the package.
        found: what is there.
        needed: what should be.
        do: the mend.
    """

    gate: str
    file: str
    found: str
    needed: str
    do: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Promise:
    """What an artifact is held to.

    Attributes:
        plan: the image's.
        torch_archs: the machine code of its torch; empty where that was not read.
        pins: package -> version, of everything that may be installed.
        floor: of the base; None where that is not known.
    """

    plan: Plan
    torch_archs: tuple[str, ...] = ()
    pins: Mapping[str, str]
    floor: Floor | None = None


def _always(artifact: Artifact, promise: Promise) -> str:
    return ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gate:
    """One gate: a pure function of an artifact and its promise.

    Attributes:
        name: as images/*.toml write it; its file's, with hyphens.
        judge: gives everything that speaks against the artifact; nothing when it passes.
        unjudged: says why this gate can't judge this artifact; empty when it can.
    """

    name: str
    judge: Callable[[Artifact, Promise], tuple[Finding, ...]]
    unjudged: Callable[[Artifact, Promise], str] = field(default=_always)
