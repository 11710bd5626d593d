"""Build xFormers' wheel for linux/arm64 and amd64, and compare them (`make test/arm64-kernel`).

Both go through the stages of docker/Dockerfile, for `hopper`. The wheel for arm64 has to pass the
gates for its platform and be refused for the other; its functions for the GPU are compared with
those of the wheel for amd64. Writes docs/measured/arm64.json, with the time of each build.
"""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import wheelhouse
from image import PLACE, PLATFORM, ROOT, bake, bases, merge_record, say, target_of

from recipes.artifact.cuobjdump import cuobjdump
from recipes.artifact.read import read_wheelhouse
from recipes.facts import ImagePlan
from recipes.gates import ExpectedContents, gate_named
from recipes.read import read_recipes
from recipes.solve.plan import solve

NAME, KERNEL, OWN = "hopper", "xformers", "linux/amd64"
# Those that judge a single wheel without an image; `symbols` looks for torch's libraries.
GATES = ("duplicates", "glibc", "licences", "machine-code", "processor", "secrets")


def build(target_platform: str) -> Path:
    """Build the kernel for a platform; return the folder of its wheel and report."""
    arch = target_platform.rpartition("/")[2]
    folder = PLACE / f"wheels-{arch}"
    shutil.rmtree(folder, ignore_errors=True)
    target = target_of(f"{NAME}_{KERNEL}", PLATFORM=target_platform)
    # Objects of their own: the time is that of all compilers.
    args = {**target["args"], "JOBS": "1", "OBJECTS": f"test-{arch}"}
    contexts = {**target.get("contexts", {}), **bases()}
    target |= {
        "context": str(ROOT), "platforms": [target_platform], "args": args, "contexts": contexts,
        "output": [f"type=local,dest={folder}"],
    }  # fmt: skip
    say(f"building {KERNEL} for {target_platform}; log: build/arm64/kernel-{arch}.log")
    seconds = bake(target, PLACE / f"kernel-{arch}.log")
    say(f"built in {seconds:.0f} s")
    return folder / "wheels"


def code_of(wheel: Path) -> Counter[bytes]:
    """Return the machine code of each GPU function in a wheel, and how often it is there.

    Not the names of the functions: nvcc puts its own process id into those of a file's own.
    """
    from elftools.elf.elffile import ELFFile

    program, found = cuobjdump(), Counter[bytes]()
    assert program is not None, "make setup installs it"
    with tempfile.TemporaryDirectory() as place, zipfile.ZipFile(wheel) as archive:
        for name in [name for name in archive.namelist() if name.endswith(".so")]:
            library = archive.extract(name, place)
            cubins = Path(tempfile.mkdtemp(dir=place))
            command = [str(program), "-xelf", "all", library]
            subprocess.run(command, cwd=cubins, check=True, capture_output=True)
            for path in sorted(cubins.iterdir()):
                with path.open("rb") as stream:
                    for section in ELFFile(stream).iter_sections():
                        if section.name.startswith(".text."):
                            found[section.data()] += 1
    return found


def judge(folder: Path, target_platform: str, plan: ImagePlan) -> dict[str, list[str]]:
    """Return what each gate finds in a wheelhouse, judged for a platform."""
    artifact = read_wheelhouse(folder, over=None, log=lambda _: None)
    expected = ExpectedContents(plan=plan, platform=target_platform, pins={}, base=plan.base)
    return {
        gate: [
            f"{found.file}: {found.found}" for found in gate_named(gate).check(artifact, expected)
        ]
        for gate in GATES
    }


def processor_of(wheel: Path) -> str:
    """Return the processors that file(1) names for the libraries of a wheel."""
    with tempfile.TemporaryDirectory() as place, zipfile.ZipFile(wheel) as archive:
        paths = [archive.extract(n, place) for n in archive.namelist() if n.endswith(".so")]
        done = subprocess.run(["file", "-b", *paths], capture_output=True, text=True, check=True)
    return " / ".join(sorted({line.split(",")[1].strip() for line in done.stdout.splitlines()}))


def main() -> None:
    """Build both, judge, compare, record; exit with 1 if something is not as it should be."""
    recipes = read_recipes(ROOT)
    plan = solve(recipes.images[NAME], recipes)
    record: dict[str, Any] = {
        "kernel": KERNEL, "image": NAME, "built_on": f"2 cores, {platform.machine()}, cross",
    }  # fmt: skip
    codes: dict[str, Counter[bytes]] = {}
    for target_platform in (PLATFORM, OWN):
        folder = build(target_platform)
        (wheel,) = folder.glob("*.whl")
        report = json.loads((folder / f"{KERNEL}.json").read_text(encoding="utf-8"))
        wheelhouse.write(folder, NAME, plan.abi)
        codes[target_platform] = code_of(wheel)
        record[target_platform] = {
            **report,
            "processor": processor_of(wheel),
            "gpu_functions": codes[target_platform].total(),
            "gpu_code_bytes": sum(len(code) * n for code, n in codes[target_platform].items()),
            "gates": judge(folder, target_platform, plan),
            "gates_for_the_other": judge(folder, OWN, plan)["processor"]
            if target_platform == PLATFORM
            else judge(folder, PLATFORM, plan)["processor"],
        }
    # Not all: for arm64, nvcc --dryrun shows options such as --unsigned_chars for device code too.
    record["equal_gpu_functions"] = (codes[PLATFORM] & codes[OWN]).total()
    merge_record("kernel", record)
    wrong = [
        f"{name}: {gate}: {found}"
        for name in (PLATFORM, OWN)
        for gate, found in record[name]["gates"].items()
        if found
    ]
    counts = {record[name]["gpu_functions"] for name in (PLATFORM, OWN)}
    wrong += [] if len(counts) == 1 and record["equal_gpu_functions"] else ["GPU code differs"]
    wrong += [
        f"{name}: it passes for the other platform too"
        for name in (PLATFORM, OWN)
        if not record[name]["gates_for_the_other"]
    ]
    if wrong:
        sys.exit("\n".join(["arm64: failed:", *wrong]))
    equal, functions = record["equal_gpu_functions"], record[OWN]["gpu_functions"]
    say(f"{equal} of {functions} GPU functions are equal byte for byte")


if __name__ == "__main__":
    main()
