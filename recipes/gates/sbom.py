"""Refuse an image in which syft finds other Python packages than the lock file has.

syft's list of everything in the image, Debian's packages too, is written to dist/NAME-sbom.json in
the CycloneDX format.
"""

from __future__ import annotations

from recipes.artifact.facts import Artifact
from recipes.gates import Expected, Gate, GateFinding

_NAME = "sbom"
_OURS = "attnimg"


def skip_reason(artifact: Artifact, expected: Expected) -> str:
    """Return why there is no list of syft's to compare with; empty if there is one."""
    if artifact.kind == "wheels":
        return "a wheelhouse is no image"
    return "" if artifact.sbom is not None else "syft is not installed: make setup"


def check(artifact: Artifact, expected: Expected) -> tuple[GateFinding, ...]:
    """Compare syft's Python packages with the lock file, both ways."""
    found = artifact.sbom or {}
    faults = []
    for name in sorted(set(found) ^ (set(expected.pins) | {_OURS})):
        there = f"{found[name]}" if name in found else "nothing"
        need = (
            f"{expected.pins[name]}, as locked"
            if name in expected.pins
            else "nothing: no lock has it"
        )
        faults.append(_finding(name, there, need))
    for name in sorted(set(found) & set(expected.pins)):
        # syft keeps a local label, torch's +cpu; a pin has none.
        if found[name].partition("+")[0] != expected.pins[name].partition("+")[0]:
            faults.append(_finding(name, found[name], f"{expected.pins[name]}, as locked"))
    return tuple(faults)


def _finding(name: str, found: str, needed: str) -> GateFinding:
    return GateFinding(
        gate=_NAME, file=name, found=found, needed=needed, do="make lock and build again"
    )


GATE = Gate(name=_NAME, check=check, skip_reason=skip_reason)
