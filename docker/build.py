#!/usr/bin/env python3
"""Build a stage of one image; needs the standard library only.

    docker/build.py NAME                    the image, as attnimg:NAME
    docker/build.py NAME-devel              the image with compilers, as attnimg:NAME-devel
    docker/build.py NAME --stage STAGE      that stage of the Dockerfile, as attnimg-STAGE:NAME;
                                            for one kernel with --kernel KERNEL
    docker/build.py NAME --wheels-to DIR    the wheels of its kernels that DIR lacks, or of --kernel
                                            alone, merged into DIR one by one (kernel_wheels.py)
    docker/build.py NAME --to-cache         its kernels that CACHE lacks, or KERNEL alone, to CACHE;
                                            with --stage stack its shared layers

Environment variables: PLATFORM, such as linux/arm64, if it is not this machine's (platforms.py, as
for the names of its files and tags); WHEELS, a folder of wheels to use instead of compiling them;
TRIM=1, for the small builds of kernels; JOBS, the number of parallel compilers; TORCH_INDEX, an
index or a folder with the CPU or ROCm build of torch; BASE_IMAGE, another base (base_image.py);
CACHE, a registry with compiled kernels and layers (kernel_cache.py), and CACHE_WRITE=1 to write
layers to it; PROGRESS, for docker.
The labels of the image say which base and which commit were used.
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

import base_image
import kernel_cache
import kernel_wheels
import platforms
import rocm_wheels
import wheelhouse
from base_image import BAKE
from from_git import source_labels
from torch_wheel import refuse_unknown_wheel, torch_wheel

IMAGES = Path("attnimg/data/images.json")
# The end of the name of an image with compilers.
DEVEL = "-devel"
# Free disk that a build needs, in GB: up to 10 for an image; 6 for the toolchain, and the same
# again while it is written (2026-11-25), unless all kernels come from WHEELS or CACHE.
# AMD's compiler and libraries are 14 GB (the AUR's package of 7.2.0 says so; not built here).
NEEDED_GB = {"cpu": 6, "cuda": 25, "rocm": 60}
NEEDED_GB_WITH_WHEELS = 13


def fail(what: str, why: str, do: str) -> NoReturn:
    """Exit with an error: what happened, why, and what to do."""
    base_image.fail(what, why, do, program="build")


def read_targets(name: str) -> dict[str, dict[str, Any]]:
    """Return the targets of an image for PLATFORM; exit if there is no torch release for it."""
    images = json.loads(IMAGES.read_text())["images"]
    if name not in images:
        fail(
            f"there is no image {name}",
            f"found {name!r}; known: {', '.join(sorted(images))}",
            f"name one of these, or write recipes/images/{name}.toml and make render",
        )
    if torch := images[name]["unresolved"].get(f"images/{name}: torch"):
        fail(
            f"the image {name} can't be built yet",
            f"found no torch for it: {torch}",
            f"set torch in recipes/images/{name}.toml, then make lock",
        )
    platform = platforms.choose_platform(name, images[name]["platforms"])
    os.environ |= platforms.bake_variables(platform)
    targets = platforms.bake_targets(platform)
    own = {key: target for key, target in targets.items() if key.partition("_")[0] == name}
    if is_for(own, name, "rocm"):
        rocm_wheels.refuse_unknown_hashes(name)
    else:
        refuse_unknown_wheel(files_name(name, own))
    return own


def is_for(targets: dict[str, dict[str, Any]], name: str, accelerator: str) -> bool:
    """Return whether an image is for an accelerator."""
    return bool(targets[f"{name}_common"]["args"]["ACCELERATOR"] == accelerator)


def files_name(name: str, targets: dict[str, dict[str, Any]]) -> str:
    """Return the name of an image's own files for its platform: "hopper", "hopper-arm64"."""
    return str(targets[f"{name}_common"]["args"]["IMAGE"])


def needed_gb(name: str, targets: dict[str, dict[str, Any]]) -> int:
    """Return the free disk that the build of an image needs, with its kernels, in GB."""
    return NEEDED_GB[targets[f"{name}_common"]["args"]["ACCELERATOR"]]


def check_built(name: str, reference: str) -> None:
    """Exit if the Docker engine does not have an image; docker run would ask docker.io for it."""
    try:
        process = subprocess.run(
            ["docker", "image", "inspect", "--format={{.Id}}", reference],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    except FileNotFoundError:
        fail("docker is not installed", "found no program docker on PATH", "make engine")
    error = process.stderr.strip()
    if process.returncode and "no such image" in error.lower():
        own = reference == f"attnimg:{name}{os.environ['TAG_END']}"
        fail(
            f"there is no image {reference}",
            "found no image of that name in the Docker engine",
            f"make build/{name}{platforms.of_make()}"
            if own
            else f"docker build -t {reference} FOLDER; its Dockerfile has FROM attnimg:{name}",
        )
    if process.returncode and "permission denied" in error.lower():
        do = 'sudo usermod -aG docker "$USER", and log in again'
        fail("this user may not use the Docker engine", error, do)
    if process.returncode:
        fail("no Docker engine is running", error or "docker image inspect fails", "make engine")


def check_free_disk(name: str, needed: int) -> None:
    """Exit if the disk of the Docker engine has too little free space for the build."""
    command = ["docker", "info", "--format", "{{.DockerRootDir}}"]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode:
        reason = process.stderr.strip() or "docker info fails"
        fail("no Docker engine is running", reason, "make engine")
    root = Path(process.stdout.strip())
    # The folder of a remote engine is not on this machine: its free space is not known.
    free = shutil.disk_usage(root).free // 10**9 if root.exists() else needed
    if free < needed:
        fail(
            f"there is not enough free disk to build {name}",
            f"found {free} GB in {root}, needed {needed}",
            "docker builder prune, or docker image prune",
        )


def contexts(
    name: str, targets: dict[str, dict[str, Any]], wheels: str
) -> Iterator[tuple[str, str, str]]:
    """Yield (target, context, place) for contexts that replace those of the bake file."""
    if is_for(targets, name, "cpu"):
        wheel = torch_wheel(name, files_name(name, targets))
        yield from ((target, "torch-wheel", str(wheel)) for target in targets)
    for target, content in targets.items():
        address, _, commit = content.get("contexts", {}).get("source", "").partition("#")
        tree = Path("build/sources") / f"{target.partition('_')[2]}-source-{commit}"
        if address and tree.is_dir():
            yield target, "source", str(tree)
    if wheels:
        check_wheels(name, files_name(name, targets), Path(wheels))
        for target, content in targets.items():
            if "wheelhouse" in content.get("contexts", {}):
                yield target, "wheelhouse", wheels


def rocm_settings(name: str, targets: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Fetch torch for ROCm; return where the targets have it, and lock files with its hashes."""
    folder, lock = rocm_wheels.rocm_wheels(name)
    settings = {f"{target}.contexts.torch-wheel": str(folder) for target in targets}
    if lock.endswith(rocm_wheels.UNVERIFIED):
        settings |= {f"{target}.args.LOCK": lock for target in targets}
    return settings


def check_wheels(name: str, files: str, wheels: Path) -> None:
    """Exit if a wheelhouse can't be installed in an image; the image's build checks it again.

    Args:
        name: the image.
        files: the name of its files for its platform.
        wheels: the wheelhouse.
    """
    if not (wheels / "manifest.json").is_file():
        fail(
            f"{wheels} is not a wheelhouse",
            "found no manifest.json in it",
            f"make wheels/{name}{platforms.of_make()}, or omit WHEELS to build them",
        )
    wanted = kernel_wheels.wanted_wheels(files, trim=False)
    if faults := wheelhouse.verify(wheels, wanted.abi, dict(wanted.keys)):
        lacking = [one for one in wanted.keys if f"the kernel {one} is missing" in faults]
        make = f"make wheels/{name}{platforms.of_make()}"
        one = f"{make} KERNEL={lacking[0]}, or " if lacking else ""
        fail(
            f"{wheels} can't be used for the image {name}",
            "\n       ".join(faults),
            f"{one}{make} for all that it lacks",
        )


def cached_kernels(name: str, targets: dict[str, dict[str, Any]], cache: str) -> dict[str, str]:
    """Return the kernels that the cache has; exit if it does not answer, or for a small build."""
    if os.environ.get("TRIM"):
        fail("the cache has no small builds", "found TRIM and CACHE", "set one of them")
    try:
        return kernel_cache.find_kernels(name, targets, cache)
    except kernel_cache.CacheError as error:
        fail(*error.args)


def fill_cache(
    name: str, targets: dict[str, dict[str, Any]], only: str, cache: str, bake: list[str]
) -> int:
    """Build the kernels that the cache lacks and push each when it is finished."""
    found = cached_kernels(name, targets, cache)
    for kernel in [only] if only else kernel_cache.kernel_names(name, targets):
        reference = kernel_cache.kernel_reference(name, kernel, targets, cache)
        if kernel in found:
            print(f"kernels: {reference} is in the cache")
            continue
        check_free_disk(name, needed_gb(name, targets))
        target = f"{name}_{kernel}"
        settings = [f"{target}.tags={reference}", f"{target}.output=type=registry"]
        command = [*bake, *(word for text in settings for word in ("--set", text)), target]
        if code := subprocess.run(command, check=False).returncode:
            return code
        print(f"kernels: pushed {reference}")
    return 0


def compile_wheels(
    name: str,
    targets: dict[str, dict[str, Any]],
    folder: Path,
    bake: list[str],
    *,
    only: str,
    found: dict[str, str],
) -> int:
    """Compile the kernels that a wheelhouse lacks, or `only` one, and merge each when it is done.

    Args:
        name: the image.
        targets: of the image.
        folder: the wheelhouse.
        bake: the docker command that builds a target, without the target.
        only: a kernel that is compiled again even if it is there; empty for those that are missing.
        found: kernel -> where CACHE has it, which is taken instead.
    """
    kernel_wheels.recover(folder)
    files = files_name(name, targets)
    wanted = kernel_wheels.wanted_wheels(files, trim=bool(os.environ.get("TRIM")))
    todo = [only] if only else kernel_wheels.missing_kernels(folder, wanted)
    for place, kernel in enumerate(todo, 1):
        print(f"wheels: {place} of {len(todo)}: {kernel}", flush=True)
        part = folder.with_name(f"{folder.name}.{kernel}.part")
        shutil.rmtree(part, ignore_errors=True)
        if kernel in found:
            command = ["docker", "buildx", "build", f"--output=type=local,dest={part}", "-"]
            text = f"FROM {found[kernel]}\n"
        else:
            check_free_disk(name, needed_gb(name, targets))
            target = f"{name}_{kernel}"
            command = [*bake, f"--set={target}.output=type=local,dest={part}", target]
            text = ""
        process = subprocess.run(command, input=text, text=True, check=False)
        if process.returncode:
            print(f"wheels: {kernel} failed; {folder} is unchanged", file=sys.stderr)
            return process.returncode
        _merge(folder, part / "wheels", wanted)
        shutil.rmtree(part)
    if not todo:
        print(f"wheels: {folder} has all {len(wanted.keys)} kernels", flush=True)
        if kernel_wheels.kept_kernels(folder, wanted)[1]:
            _merge(folder, None, wanted)
    if missing := kernel_wheels.missing_kernels(folder, wanted):
        make = f"make wheels/{name}{platforms.of_make()}"
        print(f"wheels: {folder} has no {', '.join(missing)} yet: {make}")
    return 0


def _merge(folder: Path, made: Path | None, wanted: kernel_wheels.Wanted) -> None:
    """Merge a finished wheel into a wheelhouse, and print what is in it."""
    try:
        dropped = kernel_wheels.merge(folder, made, wanted)
    except (kernel_wheels.MergeError, OSError) as error:
        make = f"make wheels/{wanted.image}{platforms.of_make()}"
        do = f"{make} again; what was finished before is in {folder}"
        fail("the new wheel can't be merged", str(error), do)
    for text in dropped:
        print(f"wheels: {text}", flush=True)
    print(
        f"wheels: {folder} has " + ", ".join(sorted(p.name for p in folder.glob("*.whl"))),
        flush=True,
    )


def main() -> None:
    """Build, and exit with docker's exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name")
    parser.add_argument("--stage", default="runtime")
    parser.add_argument("--kernel", default="", help="the stage of this kernel's build")
    parser.add_argument("--wheels-to", type=Path)
    parser.add_argument("--to-cache", action="store_true", help="push what CACHE lacks")
    parser.add_argument("--no-cache", action="store_true", help="use no layer of an earlier build")
    parser.add_argument("--check", action="store_true", help="check only that there is a recipe")
    parser.add_argument(
        "--built", metavar="IMAGE", help="check only that, and that the engine has this image"
    )
    arguments = parser.parse_args()
    # `make release` sets REGISTRY to where it pushes; bake would make it part of the image's tags.
    os.environ.pop("REGISTRY", None)
    name, stage = arguments.name, arguments.stage
    if name.endswith(DEVEL) and stage == "runtime":
        name, stage = name.removesuffix(DEVEL), "devel"
    targets = read_targets(name)
    kernels = kernel_cache.kernel_names(name, targets)
    to_cache = arguments.to_cache and stage == "runtime"
    kernels_only = bool(arguments.wheels_to or to_cache)
    if arguments.kernel not in ("", *kernels) or (kernels_only and not kernels):
        fail(
            f"there is no such kernel to build for {name}",
            f"found KERNEL={arguments.kernel!r}; built for it: {', '.join(kernels) or 'none'}",
            f"name one of these, or make build/{name}",
        )
    if arguments.built:
        check_built(arguments.name, arguments.built)
    if arguments.check or arguments.built:
        return
    if not (jobs := os.environ.get("JOBS", "1")).isdigit() or int(jobs) < 1:
        fail(f"JOBS is {jobs!r}", "needed a number of compilers, 1 or more", "make ... JOBS=2")
    cache = os.environ.get("CACHE", "")
    wheels = "" if kernels_only else os.environ.get("WHEELS", "")
    if arguments.to_cache and not cache:
        do = f"set CACHE=host/namespace, or make wheels/{name} for this machine"
        fail("no cache is given", "found no CACHE to push to", do)
    # Stages with named contexts have a target of their own.
    target = name if stage == "runtime" else f"{name}_{arguments.kernel or stage}"
    settings = {}
    if target not in targets or (arguments.kernel and not kernels_only):
        target = target if arguments.kernel else f"{name}_common"
        settings[f"{target}.target"] = stage
    if is_for(targets, name, "rocm"):
        settings |= rocm_settings(name, targets)
    for bake_target, context, place in contexts(name, targets, wheels):
        settings[f"{bake_target}.contexts.{context}"] = place
    found = cached_kernels(name, targets, cache) if cache and not (wheels or to_cache) else {}
    for bake_target, context, place in kernel_cache.replaced_contexts(name, targets, found):
        settings[f"{bake_target}.contexts.{context}"] = place
    if not kernels_only:
        needed = needed_gb(name, targets)
        if wheels or (cache and len(found) == len(kernels)):
            needed = min(needed, NEEDED_GB_WITH_WHEELS)
        check_free_disk(name, needed)
    if stage not in ("runtime", "devel"):
        settings[f"{target}.tags"] = f"attnimg-{stage}:{name}{os.environ['TAG_END']}"
    command = ["docker", "buildx", "bake", f"--progress={os.environ.get('PROGRESS', 'auto')}"]
    command += ["-f", str(BAKE), *(["--no-cache"] if arguments.no_cache else [])]
    for key, value in settings.items():
        command += ["--set", f"{key}={value}"]
    if cache and not kernels_only and target in (name, f"{name}_common"):
        write = arguments.to_cache or bool(os.environ.get("CACHE_WRITE"))
        command += kernel_cache.layer_settings(name, target, targets, cache, write=write)
    base = base_image.fetch_base()
    os.environ["BASE"] = base.context
    platform = os.environ["PLATFORM"]
    # Kernels are compiled by this machine's own programs, for whatever platform.
    if platform != platforms.own_platform() and not kernels_only:
        base = base_image.for_platform(base, platform)
        os.environ[f"BASE_{platform.rpartition('/')[2].upper()}"] = base.context
    os.environ |= {"BASE_NAME": base.name, "BASE_DIGEST": base.digest}
    os.environ |= source_labels(Path())
    if to_cache:
        sys.exit(fill_cache(name, targets, arguments.kernel, cache, command))
    if folder := arguments.wheels_to:
        only = arguments.kernel
        sys.exit(compile_wheels(name, targets, folder, command, only=only, found=found))
    sys.exit(subprocess.run([*command, target], check=False).returncode)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("build: interrupted; run the same command again to continue", file=sys.stderr)
        sys.exit(130)
