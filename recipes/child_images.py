"""Find which layers and files of a child image are its own: one that is built FROM attnimg:NAME.

The gates check child images too (`make gate/NAME CHILD=IMAGE`). What the child adds is only listed.
They refuse another torch or kernel than the image's, a fault in the image's own files, and a secret
in a file that is not part of a package.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from attnimg.errors import AttnimgError
from recipes.artifact.facts import Artifact
from recipes.gates import GateFinding

CHILD = "child"
# The last step of docker/Dockerfile that writes into an image runs this file.
_LAST_STEP = "/image_files.py"


def mark_child(artifact: Artifact) -> Artifact:
    """Return the artifact with the layers above attnimg's image named CHILD.

    Raises:
        AttnimgError: its history has no attnimg image (code "no-child").
    """
    steps = [place for place, layer in enumerate(artifact.layers) if _LAST_STEP in layer.made_by]
    if not steps:
        raise AttnimgError(
            f"{artifact.source} is not built FROM an attnimg image",
            why=f"its history has no step that runs {_LAST_STEP}; a squashed image has lost it",
            do="give `docker save` of an image that is built FROM attnimg:NAME",
            code="no-child",
        )
    layers = tuple(
        replace(layer, name=CHILD) if place > steps[-1] else layer
        for place, layer in enumerate(artifact.layers)
    )
    return replace(artifact, layers=layers)


def replaced_files(artifact: Artifact, fixed: frozenset[str]) -> Iterator[GateFinding]:
    """Yield a finding for each package of `fixed` of which the child has files of its own."""
    above = {
        file.path
        for file in artifact.files
        if artifact.layers[file.layer].name == CHILD and file.visible and file.kind != "folder"
    }
    for package in artifact.distributions:
        # Python writes .pyc files when a step of the child imports the package.
        changed = sorted(path for path in package.files & above if not path.endswith(".pyc"))
        if package.name in fixed and changed:
            yield GateFinding(
                package.name,
                f"{len(changed)} of its files in a layer of the child, such as {changed[0]}",
                f"the image's own {package.name}, which its kernels are built for",
                "install without it: PIP_CONSTRAINT=/etc/pip/constraint.txt, which the image sets",
            )


def is_childs_own(
    finding: GateFinding, *, gate: str, artifact: Artifact, fixed: frozenset[str]
) -> bool:
    """Return whether a finding is about files that the child has added, and is only listed."""
    if finding.file in fixed:
        return False
    if gate == "secrets":  # packages have keys for their tests, as tornado does
        return any(finding.file in package.files for package in artifact.distributions)
    images_own = {
        file.path
        for file in artifact.files
        if file.visible and artifact.layers[file.layer].name != CHILD
    }
    # The gate machine-code names all files of a kernel in one finding.
    return images_own.isdisjoint(finding.file.split(", "))
