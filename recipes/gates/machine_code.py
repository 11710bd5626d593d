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
from collections.abc import Iterable, Iterator, Mapping

from recipes.archs import can_run, device_name, sort_key
from recipes.artifact.facts import Artifact, Elf, visible_elves
from recipes.facts import ImagePlan, Step
from recipes.gates import ExpectedContents, GateFinding

# Folders of kernels that docker/precompiled compiled for one GPU.
_COMPILED = re.compile(r"opt/attnimg/(fa4|triton)/(sm_\d+)/")


def check(artifact: Artifact, expected: ExpectedContents) -> tuple[GateFinding, ...]:
    """Compare the machine code of each file with the plan."""
    owners = {path: one.name for one in artifact.distributions for path in one.files}
    files = [(file, elf, owners.get(file.path, "")) for file, elf in visible_elves(artifact.files)]
    # Package -> the code in its files, by path; "" for files of no package.
    codes: dict[str, dict[str, frozenset[str]]] = {}
    for file, elf, owner in files:
        codes.setdefault(owner, {})
        if elf.codes:
            codes[owner][file.path] = elf.codes
    installed = {one.name for one in artifact.distributions}
    steps = {
        step.kernel.name: step for step in expected.plan.steps if step.kernel.name in installed
    }
    findings = [finding for file, elf, _ in files for finding in _check_reading(file.path, elf)]
    for step in steps.values():
        findings += _find_missing(step, codes.get(step.kernel.name, {}))
    for owner, by_path in codes.items():
        for path, found in by_path.items():
            if owner in steps:
                findings += _find_extra(path, found, steps[owner])
            elif owner != "torch" or expected.plan.image.accelerator == "cpu":
                findings += _check_file(path, found, owner, expected.plan)
    if "torch" in codes:
        findings += _check_torch(frozenset().union(*codes["torch"].values()), expected)
    return tuple(findings)


def _check_reading(path: str, elf: Elf) -> Iterator[GateFinding]:
    """Find machine code that could not be read, or that two programs read differently."""
    for fault in elf.faults:
        yield GateFinding(path, fault, "machine code that can be listed", "build it again")
    # cuobjdump lists neither these kinds, nor the f of sm_100f, nor AMD's code.
    ours = {
        code.replace("f", "")
        for code in elf.section_codes
        if not code.startswith(("lto", "kind", "gfx"))
    }
    if elf.cuobjdump_codes is not None and elf.cuobjdump_codes != ours:
        yield GateFinding(
            path,
            f"{_text(ours)} by our reader, {_text(elf.cuobjdump_codes)} by cuobjdump",
            "the same from both",
            "fix recipes/artifact/fatbin.py",
        )


def _find_missing(step: Step, codes: Mapping[str, frozenset[str]]) -> Iterator[GateFinding]:
    """Find the architectures that a kernel lacks: all its files together must have each."""
    found = frozenset().union(*codes.values())
    name = step.kernel.name
    if lacking := set(step.codes) - found:
        needed = f"{_text(lacking)} too, which recipes/kernels/{name}.toml declares"
        do = f"build {name} for {' '.join(step.tokens)}"
        yield GateFinding(", ".join(codes) or name, _text(found), needed, do)


def _find_extra(path: str, codes: frozenset[str], step: Step) -> Iterator[GateFinding]:
    """Find machine code that a kernel's recipe does not declare."""
    name = step.kernel.name
    if extra := codes - set(step.codes):
        needed = f"{_text(step.codes)} only, which recipes/kernels/{name}.toml declares"
        yield GateFinding(path, f"{_text(extra)} too", needed, f"build {name} without it")


def _check_file(
    path: str, codes: frozenset[str], owner: str, plan: ImagePlan
) -> Iterator[GateFinding]:
    """Check a file that belongs neither to torch nor to a kernel."""
    if plan.image.accelerator == "cpu":
        yield GateFinding(path, _text(codes), "no GPU code in a cpu image", "prune it")
    elif place := _COMPILED.match(path):
        method, device = place.groups()
        steps = [step for step in plan.steps if _compiles(step, method)]
        declared = {
            _declared_code(step, arch)
            for step in steps
            for arch in step.archs
            if device_name(arch) == device
        }
        if codes != declared:
            recipe = " ".join(f"recipes/kernels/{step.kernel.name}.toml" for step in steps)
            needed = f"what {recipe or 'no recipe'} declares for {device}: {_text(declared)}"
            yield GateFinding(path, _text(codes), needed, "compile it again, for this GPU only")
    else:
        for arch in _unsupported_archs(path, owner, plan.image.archs, codes):
            do = f"prune it where no GPU of {plan.image.name} loads it, or build it for {arch}"
            yield GateFinding(path, _text(codes), f"code that {arch} runs", do)


def _compiles(step: Step, method: str) -> bool:
    """Return whether a kernel is compiled ahead of time by a method of docker/precompiled."""
    return (step.kernel.ahead_of_time if method == "fa4" else step.kernel.triton) is not None


def _declared_code(step: Step, arch: str) -> str:
    """Return the code of a kernel that is compiled ahead of time for an architecture."""
    ahead_of_time = step.kernel.ahead_of_time
    return ahead_of_time.targets[arch].code if ahead_of_time else step.kernel.archs[arch].code


def _unsupported_archs(
    path: str, owner: str, archs: tuple[str, ...], codes: frozenset[str]
) -> tuple[str, ...]:
    """Return the architectures that a file should support and does not.

    A package supports all of the image's. Kernels that were compiled ahead of time belong to no
    package, and support the architecture of their folder (sm_90), or any.
    """
    if owner:
        return tuple(arch for arch in archs if not _any_runs(arch, codes))
    folders = re.findall(r"(?:^|/)(sm_\d+[af]?|gfx[0-9a-f]+)(?=/)", path)
    wanted = tuple(folders[-1:]) or archs
    return () if any(_any_runs(arch, codes) for arch in wanted) else wanted


def _check_torch(codes: frozenset[str], expected: ExpectedContents) -> Iterator[GateFinding]:
    """Check torch as a whole: some of its libraries are for some architectures only."""
    if lacking := set(expected.torch_archs) - codes:
        needed = f"{_text(lacking)} too, as recipes/torch.toml says"
        do = "correct `archs` in recipes/torch.toml, or install the build that it describes"
        yield GateFinding("torch", _text(codes), needed, do)
    if expected.plan.image.accelerator != "cpu":
        for arch in expected.plan.image.archs:
            if not _any_runs(arch, codes):
                needed = f"code that {arch} runs"
                yield GateFinding("torch", _text(codes), needed, "use another build of torch")


def _any_runs(arch: str, codes: Iterable[str]) -> bool:
    return any(can_run(arch, code) for code in codes)


def _text(codes: Iterable[str]) -> str:
    return " ".join(sorted(codes, key=sort_key)) or "no GPU code"
