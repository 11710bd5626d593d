"""Refuse a package whose metadata have no licence.

The licences are those that each package states; they are listed in dist/NAME-licences.txt.
"""

from __future__ import annotations

from recipes.artifact.facts import Artifact
from recipes.gates import Expected, Gate, GateFinding

_NAME = "licences"


def check(artifact: Artifact, expected: Expected) -> tuple[GateFinding, ...]:
    """Find packages without a licence in their metadata."""
    return tuple(
        GateFinding(
            gate=_NAME,
            file=one.name,
            found=f"no licence in {one.folder}/METADATA",
            needed="License-Expression, License, or a classifier",
            do="read its source, and say in recipes/allowed.toml what its licence is",
        )
        for one in artifact.distributions
        if not one.licence
    )


GATE = Gate(name=_NAME, check=check)
