#!/usr/bin/env python3
"""Build a stage of one image on the base of `make base`; needs the standard library only.

    docker/build.py NAME                    the image, as attnimg:NAME
    docker/build.py NAME-devel              the image with compilers, as attnimg:NAME-devel
    docker/build.py NAME --stage STAGE      that stage of the Dockerfile, as attnimg-STAGE:NAME;
                                            for one kernel with --kernel KERNEL
    docker/build.py NAME --wheels-to DIR    its kernels' wheels only, into DIR

Environment variables: WHEELS, a folder of wheels to use instead of compiling them; TRIM=1, for the
small builds of kernels; JOBS, the number of parallel compilers; TORCH_INDEX, a package index with
CPU builds of torch; PROGRESS, for docker.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

BAKE = Path("docker/docker-bake.json")
IMAGES = Path("attnimg/data/images.json")
# The end of the name of an image with compilers.
DEVEL = "-devel"
# Free disk that a build needs, in GB: 6 for the toolchain, the same again while it is written, and
# up to 10 for an image (2026-11-25).
NEEDED_GB = {"cpu": 6, "cuda": 25, "rocm": 25}


def fail(what: str, why: str, do: str) -> NoReturn:
    """Exit with an error: what happened, why, and what to do."""
    sys.exit(f"build: {what}\n  why: {why}\n  do:  {do}")


def read_targets(name: str) -> dict[str, dict[str, Any]]:
    """Return the targets of an image; exit if its recipe has no torch release."""
    targets = json.loads(BAKE.read_text())["target"]
    images = json.loads(IMAGES.read_text())["images"]
    if name not in images:
        fail(
            f"there is no image {name}",
            f"found no target of that name in {BAKE}",
            f"make help, or write recipes/images/{name}.toml and make render",
        )
    if torch := images[name]["unresolved"].get(f"images/{name}: torch"):
        fail(
            f"the image {name} can't be built yet",
            f"found no torch for it: {torch}",
            f"set torch in recipes/images/{name}.toml, then make lock",
        )
    return {key: target for key, target in targets.items() if key.partition("_")[0] == name}


def check_free_disk(name: str, accelerator: str) -> None:
    """Exit if the disk of the Docker engine has too little free space for the build."""
    command = ["docker", "info", "--format", "{{.DockerRootDir}}"]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode:
        fail(
            "no Docker engine is running",
            process.stderr.strip() or "docker info fails",
            "make engine",
        )
    root, needed = Path(process.stdout.strip()), NEEDED_GB[accelerator]
    # The folder of a remote engine is not on this machine: its free space is not known.
    free = shutil.disk_usage(root).free // 10**9 if root.exists() else needed
    if free < needed:
        fail(
            f"there is not enough free disk to build {name}",
            f"found {free} GB in {root}, needed {needed}",
            "docker builder prune, or docker image prune",
        )


def torch_wheel(version: str, name: str) -> str:
    """Fetch the CPU build of torch to a folder: the package index only has the CUDA build."""
    folder = Path("build/torch-wheel")
    pattern = f"torch-{version}+cpu-*.whl"
    if not any(folder.glob(pattern)):
        index = os.environ.get("TORCH_INDEX")
        where = ["--index-url", index] if index else []
        command = ["python3.11", "-m", "pip", "download", "-q", "--no-deps", *where]
        subprocess.run([*command, "-d", str(folder), f"torch=={version}"], check=False)
    if not any(folder.glob(pattern)):
        fail(
            f"there is no CPU build of torch {version}",
            "the package index of pip's configuration has none",
            f"make build/{name} TORCH_INDEX=<PyTorch's CPU index>",
        )
    return str(folder)


def contexts(
    name: str, targets: dict[str, dict[str, Any]], wheels: str
) -> Iterator[tuple[str, str, str]]:
    """Yield (target, context, place) for contexts that replace those of the bake file."""
    if targets[f"{name}_common"]["args"]["ACCELERATOR"] == "cpu":
        wheel = torch_wheel(targets[name]["labels"]["attnimg.torch"], name)
        yield from ((target, "torch-wheel", wheel) for target in targets)
    for target, content in targets.items():
        address, _, commit = content.get("contexts", {}).get("source", "").partition("#")
        tree = Path("build/sources") / f"{target.partition('_')[2]}-source-{commit}"
        if address and tree.is_dir():
            yield target, "source", str(tree)
    if wheels:
        if not (Path(wheels) / "manifest.json").is_file():
            fail(
                f"{wheels} is not a wheelhouse",
                "found no manifest.json in it",
                f"make wheels/{name}, or omit WHEELS to build them",
            )
        for target, content in targets.items():
            if "wheelhouse" in content.get("contexts", {}):
                yield target, "wheelhouse", wheels


def run(command: list[str], *, wheels_to: Path | None) -> int:
    """Run docker; replace older wheels after all new ones are complete."""
    if wheels_to is None:
        return subprocess.run(command, check=False).returncode
    part = wheels_to.with_name(f"{wheels_to.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    process = subprocess.run(
        [*command, f"--set={command[-1]}.output=type=local,dest={part}"], check=False
    )
    if process.returncode == 0:
        shutil.rmtree(wheels_to, ignore_errors=True)
        part.chmod(0o755)  # docker creates it for its own user only
        part.rename(wheels_to)
        print(f"wheels: {wheels_to} has " + ", ".join(sorted(p.name for p in wheels_to.iterdir())))
    return process.returncode


def main() -> None:
    """Build, and exit with docker's exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name")
    parser.add_argument("--stage", default="runtime")
    parser.add_argument("--kernel", default="", help="the stage of this kernel's build")
    parser.add_argument("--wheels-to", type=Path)
    parser.add_argument("--check", action="store_true", help="check only that the image exists")
    arguments = parser.parse_args()
    name, stage = arguments.name, "wheelhouse" if arguments.wheels_to else arguments.stage
    if name.endswith(DEVEL) and stage == "runtime":
        name, stage = name.removesuffix(DEVEL), "devel"
    targets = read_targets(name)
    if arguments.check:
        return
    if not (jobs := os.environ.get("JOBS", "1")).isdigit() or int(jobs) < 1:
        fail(f"JOBS is {jobs!r}", "needed a number of compilers, 1 or more", "make ... JOBS=2")
    # Stages with named contexts have a target of their own.
    target = name if stage == "runtime" else f"{name}_{arguments.kernel or stage}"
    settings = {}
    if target not in targets or arguments.kernel:
        target = target if arguments.kernel else f"{name}_common"
        settings[f"{target}.target"] = stage
    for bake_target, context, place in contexts(name, targets, os.environ.get("WHEELS", "")):
        settings[f"{bake_target}.contexts.{context}"] = place
    check_free_disk(name, targets[f"{name}_common"]["args"]["ACCELERATOR"])
    if stage not in ("runtime", "wheelhouse", "devel"):
        settings[f"{target}.tags"] = f"attnimg-{stage}:{name}"
    command = ["docker", "buildx", "bake", f"--progress={os.environ.get('PROGRESS', 'auto')}"]
    command += ["-f", str(BAKE)]
    for key, value in settings.items():
        command += ["--set", f"{key}={value}"]
    os.environ["BASE"] = "docker-image://attnimg-base:bookworm"
    sys.exit(run([*command, target], wheels_to=arguments.wheels_to))


if __name__ == "__main__":
    main()
