"""Refuse GPU machine code that is not what the recipe declares.

A kernel's files have code for the architectures of its recipe and no other: a missing one means "no
kernel image is available" on a supported GPU, an extra one is never run, and PTX hides that machine
code is missing. torch has the architectures of recipes/torch.toml. Any other file with GPU code has
some for every architecture of the image. Below /opt/attnimg, the kernels that were compiled ahead
of time into a folder sm_90 have the code that the kernel's recipe declares for 9.0, and no other.
An image for `cpu` has no GPU code.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from recipes.artifact.facts import Artifact, File
from recipes.facts import Step
from recipes.gates import Expected, Gate, GateFinding
from recipes.solve.rules import device_name

_NAME = "machine-code"
# Where docker/precompiled leaves what it compiled, and for which GPU.
_COMPILED = re.compile(r"opt/attnimg/(fa4|triton)/(sm_\d+)/")
_CODE = re.compile(r"(sm|compute|lto)_(\d+)(\d)([af]?)")


def check(artifact: Artifact, expected: Expected) -> tuple[GateFinding, ...]:
    """Compare the machine code of each file with the plan."""
    owners = {path: one.name for one in artifact.distributions for path in one.files}
    steps = {step.kernel.name: step for step in expected.plan.steps}
    found: dict[str, list[File]] = {}
    for file in artifact.files:
        if file.visible and file.elf:
            found.setdefault(owners.get(file.path, ""), []).append(file)
    faults = [*_check_reading(artifact), *_find_missing(artifact, steps, found)]
    for owner, files in found.items():
        for file in files:
            if file.elf and file.elf.codes:
                faults += _check_file(file, owner=owner, step=steps.get(owner), expected=expected)
    if "torch" in found:
        faults += _check_torch(found["torch"], expected)
    return tuple(faults)


def _check_reading(artifact: Artifact) -> Iterator[GateFinding]:
    """Find machine code that could not be read, or that two programs read differently."""
    for file in artifact.files:
        if not file.visible or file.elf is None:
            continue
        for fault in file.elf.faults:
            yield _finding(file.path, fault, "machine code that can be listed", "build it again")
        ours = {code.replace("f", "") for code in file.elf.sectioned if not code.startswith("gfx")}
        ours = {code for code in ours if not code.startswith(("lto", "kind"))}
        if file.elf.cuobjdump_codes is not None and file.elf.cuobjdump_codes != ours:
            yield _finding(
                file.path,
                f"{_text(ours)} by our reader, {_text(file.elf.cuobjdump_codes)} by cuobjdump",
                "the same from both",
                "fix recipes/artifact/fatbin.py",
            )


def _find_missing(
    artifact: Artifact, steps: Mapping[str, Step], found: Mapping[str, list[File]]
) -> Iterator[GateFinding]:
    """Find kernels that lack an architecture: all files of one together must have each."""
    there = {one.name for one in artifact.distributions}
    for name, step in steps.items():
        files = [file for file in found.get(name, []) if file.elf and file.elf.codes]
        has = {code for file in files if file.elf for code in file.elf.codes}
        lacks = set(step.codes) - has
        if name in there and lacks:
            where = ", ".join(file.path for file in files) or name
            need = f"{_text(lacks)} too, which recipes/kernels/{name}.toml declares"
            yield _finding(where, _text(has), need, f"build {name} for {' '.join(step.tokens)}")


def _check_file(
    file: File, *, owner: str, step: Step | None, expected: Expected
) -> Iterator[GateFinding]:
    """Check one file that has machine code."""
    image = expected.plan.image
    codes = file.elf.codes if file.elf else frozenset()
    if step is not None:
        if extra := codes - set(step.codes):
            need = f"{_text(step.codes)} alone, which recipes/kernels/{owner}.toml declares"
            yield _finding(file.path, f"{_text(extra)} too", need, f"build {owner} without it")
    elif image.accelerator == "cpu":
        yield _finding(file.path, _text(codes), "no GPU code in a cpu image", "prune it")
    elif place := _COMPILED.match(file.path):
        made_by = [step for step in expected.plan.steps if _compiles_into(place[1], step)]
        declared = {
            _declared_code(step, arch)
            for step in made_by
            for arch in step.archs
            if device_name(arch) == place[2]
        }
        if codes != declared:
            recipe = " ".join(f"recipes/kernels/{step.kernel.name}.toml" for step in made_by)
            need = f"what {recipe or 'no recipe'} declares for {place[2]}: {_text(declared)}"
            yield _finding(file.path, _text(codes), need, "compile it again, with no other")
    elif owner != "torch":
        for arch in _unsupported_archs(file.path, owner, image.archs, codes):
            do = f"prune it where no GPU of {image.name} loads it, or build it for {arch}"
            yield _finding(file.path, _text(codes), f"code that {arch} runs", do)


def _compiles_into(folder: str, step: Step) -> bool:
    """Return whether a kernel is compiled ahead of time into a folder of /opt/attnimg."""
    return (step.kernel.ahead_of_time if folder == "fa4" else step.kernel.triton) is not None


def _declared_code(step: Step, arch: str) -> str:
    """Return the code that a kernel's entries have for an architecture of its recipe."""
    asked = step.kernel.ahead_of_time
    return asked.targets[arch].code if asked else step.kernel.archs[arch].code


def _unsupported_archs(
    path: str, owner: str, archs: tuple[str, ...], codes: frozenset[str]
) -> tuple[str, ...]:
    """Return the architectures that a file should support and does not.

    A package supports all of the image's. Kernels that were compiled ahead of time belong to no
    package, and support the architecture of their folder (sm_90), or any.
    """
    if owner:
        return tuple(arch for arch in archs if not any(can_run(arch, code) for code in codes))
    folders = re.findall(r"(?:^|/)(sm_\d+[af]?|gfx[0-9a-f]+)(?=/)", path)
    wanted = folders[-1:] or archs
    served = [arch for arch in wanted if any(can_run(arch, code) for code in codes)]
    return () if served else tuple(wanted)


def _check_torch(files: list[File], expected: Expected) -> Iterator[GateFinding]:
    """Check torch as a whole: some of its libraries are for some architectures only."""
    has = {code for file in files if file.elf for code in file.elf.codes}
    if lacks := set(expected.torch_archs) - has:
        do = "correct `archs` in recipes/torch.toml, or install the build that it describes"
        yield _finding("torch", _text(has), f"{_text(lacks)} too, as recipes/torch.toml says", do)
    if expected.plan.image.accelerator != "cpu":
        for arch in expected.plan.image.archs:
            if not any(can_run(arch, code) for code in has):
                yield _finding("torch", _text(has), f"code that {arch} runs", "take another torch")


def can_run(arch: str, code: str) -> bool:
    """Return whether a device runs a code: the same major and no newer minor; PTX, no newer.

    sm_90a runs on 9.0 only; sm_100f on 10.x. Source: CUDA C++ Programming Guide 13.0, 5.1.2,
    Feature Set Compiler Targets (2026-11-25).
    """
    here, there = _CODE.fullmatch(arch), _CODE.fullmatch(code)
    if here is None or there is None:
        return arch == code
    device, built = (int(here[2]), int(here[3])), (int(there[2]), int(there[3]))
    if there[4] == "a":
        return device == built
    if there[1] == "compute" and not there[4]:
        return device >= built
    return there[1] in ("sm", "compute") and device[0] == built[0] and device >= built


def _text(codes: object) -> str:
    names = (
        sorted(map(str, codes), key=_order) if isinstance(codes, set | frozenset | tuple) else []
    )
    return " ".join(names) or "no GPU code"


def _order(code: str) -> tuple[str, int, str]:
    match = _CODE.fullmatch(code)
    return (match[1], int(match[2] + match[3]), match[4]) if match else (code, 0, "")


def _finding(file: str, found: str, needed: str, do: str) -> GateFinding:
    return GateFinding(gate=_NAME, file=file, found=found, needed=needed, do=do)


GATE = Gate(name=_NAME, check=check)
