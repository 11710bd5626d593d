"""Refuse programs and libraries for a processor other than that of the image's platform.

The dynamic loader skips such a library, and Python raises "cannot open shared object file". It
comes from a wheel for another platform, or from a cross compiler without the right target. The
name of a wheel must have the platform too, since installers choose wheels by it. Machine code for
GPUs is checked by the gate `machine-code`.
"""

from __future__ import annotations

from collections.abc import Iterator

from packaging.utils import InvalidWheelFilename, parse_wheel_filename

from recipes.artifact.facts import Artifact, visible_elves
from recipes.artifact.linking import PROCESSORS
from recipes.gates import ExpectedContents, GateFinding

_GPUS = ("EM_CUDA", "EM_AMDGPU")


def check(artifact: Artifact, expected: ExpectedContents) -> tuple[GateFinding, ...]:
    """Compare the processor of each ELF file, and the name of each wheel, with the platform."""
    processor = PROCESSORS[expected.platform]
    needed = f"{processor.elf}, the processor of {expected.platform}"
    do = f"use its build for {processor.machine}, compile it for that, or remove it"
    found = [
        GateFinding(file.path, f"machine code for {elf.machine}", needed, do)
        for file, elf in visible_elves(artifact.files)
        # A file that can't be read is a finding of the gate `machine-code`.
        if elf.machine not in (*_GPUS, "unknown", processor.elf)
    ]
    if artifact.kind == "wheels":
        found += _check_names(artifact, processor.machine)
    return tuple(found)


def _check_names(artifact: Artifact, machine: str) -> Iterator[GateFinding]:
    """Yield a finding for each wheel whose name is invalid, or is for another platform."""
    for layer in artifact.layers:
        try:
            platforms = {tag.platform for tag in parse_wheel_filename(layer.name)[3]}
        except InvalidWheelFilename:
            needed = "NAME-VERSION-PYTHON-ABI-PLATFORM.whl"
            yield GateFinding(layer.name, "not the name of a wheel", needed, "build it again")
            continue
        wrong = sorted(p for p in platforms if p != "any" and not p.endswith(f"_{machine}"))
        if wrong:
            found = f"the platform {', '.join(wrong)} in its name"
            do = "build it for that platform: make wheels/NAME PLATFORM=..."
            yield GateFinding(layer.name, found, f"any, or one that ends with _{machine}", do)
