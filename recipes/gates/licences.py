"""Refuse a package whose metadata have no licence.

The licences are those that each package states; they are listed in dist/NAME-licences.txt.
"""

from __future__ import annotations

from recipes.artifact.facts import Artifact
from recipes.gates import ExpectedContents, GateFinding


def check(artifact: Artifact, expected: ExpectedContents) -> tuple[GateFinding, ...]:
    """Find packages without a licence in their metadata."""
    return tuple(
        GateFinding(
            file=package.name,
            found=f"no licence in {package.folder}/METADATA",
            needed="License-Expression, License, or a classifier",
            do="read its source, and write its licence into recipes/allowed.toml",
        )
        for package in artifact.distributions
        if not package.licence
    )
