"""List the machine code of every ELF file of an image, with the file's hash.

It is the predicate of an attestation that every released image has: docs/releases.md describes it.
"""

from __future__ import annotations

from typing import Any

from recipes.artifact.facts import Artifact, visible_elves

# The type of the predicate; a new field that changes the meaning of others gets a new number.
TYPE = "urn:attnimg:machine-code:v1"


def list_machine_code(artifact: Artifact) -> dict[str, Any]:
    """Return the list, sorted by path: files that a container sees, those without GPU code too."""
    owners = {path: one.name for one in artifact.distributions for path in one.files}
    files = [
        {
            "path": file.path,
            "sha256": file.digest,
            "package": owners.get(file.path, ""),
            "machine": elf.machine,
            "codes": sorted(elf.codes),
        }
        for file, elf in visible_elves(artifact.files)
    ]
    codes = sorted({code for file in files for code in file["codes"]})
    return {
        "image": artifact.image_id,
        "codes": codes,
        "files": sorted(files, key=lambda file: str(file["path"])),
    }
