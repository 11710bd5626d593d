"""Prepare the files that a GPU machine without a network needs: `make gpu-kit`.

    python tests/gpu/make_kit.py [--compile PYTHON3.12] [--to build/gpu-kit]

The kit has the wheels that attnimg needs and the machine lacks, and of each attention kernel the
source, trimmed to what can be compiled in minutes, or a wheel. FlashAttention-4, which is large, is
two folders beside it. With --compile, wheels of the kernels are built here, in hours of processor
time; without, the GPU machine compiles them. What is there already is left alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from recipes.facts import Kernel  # noqa: E402 - recipes is not installed
from recipes.read import read_recipes  # noqa: E402
from recipes.solve.sources import FOLDER as SOURCES  # noqa: E402

PATCHES = Path(__file__).parent / "patches"
# The lent machine: Python 3.12.3, torch 2.11.0 of CUDA 13.0, read 2026-11-17.
PYTHON, TORCH, ARCH = "3.12", "torch==2.11.0", "sm_90a"
# What it lacks of requirements/lock.txt, or may have too old. bitsandbytes, 60 MB, is left out.
LACKED = (
    "annotated-types",
    "datasets",
    "dill",
    "kernels",
    "liger-kernel",
    "multiprocess",
    "platformdirs",
    "pydantic",
    "pydantic-core",
    "tomlkit",
    "trl",
    "typing-extensions",
    "typing-inspection",
)
# FlashAttention-4's closure without what the machine has; versions are the hopper image's.
FA4 = (
    "apache-tvm-ffi",
    "flash-attn-4",
    "nvidia-cutlass-dsl",
    "nvidia-cutlass-dsl-libs-base",
    "nvidia-cutlass-dsl-libs-core",
    "quack-kernels",
    "torch-c-dlpack-ext",
)
# Headers that nvcc's own package does not have.
HEADERS = ("nvidia-cuda-cccl", "nvidia-cuda-crt", "nvidia-cuda-profiler-api")
FA4_LARGE = "nvidia-cutlass-dsl-libs-cu13"
# A line for xFormers without its library; see add_xformers.
XFORMERS_SET = "_built_with_cuda = True"
# pip matches the number exactly.
PLATFORMS = ("1_x86_64", "2014_x86_64", *(f"_2_{n}_x86_64" for n in (17, 24, 27, 28, 31, 34, 35)))
MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class KitBuild:
    """How a kernel is built for the kit.

    Attributes:
        kept: globs of the source files that the kit contains.
        imports: the modules that must be importable after the installation.
        cpu_seconds: of its build, estimated from single files; it orders the builds.
        env: differences from the recipe's trim.
    """

    kept: tuple[str, ...]
    imports: tuple[str, ...]
    cpu_seconds: int
    env: Mapping[str, str] = field(default_factory=dict)


BUILDS = {
    "flash-attn": KitBuild(
        kept=(
            "setup.py",
            "setup.cfg",
            "README.md",
            "LICENSE",
            "flash_attn/**/*.py",
            "csrc/flash_attn/*.cpp",
            "csrc/flash_attn/src/*.h",
            "csrc/flash_attn/src/*.cuh",
            "csrc/flash_attn/src/*_bf16_*.cu",
            "csrc/cutlass/include/**/*",
        ),
        imports=("flash_attn",),
        cpu_seconds=1800,
    ),
    "flash-attn-3": KitBuild(
        kept=(
            "README.md",
            "LICENSE",
            "AUTHORS",
            "hopper/*.py",
            "hopper/*.h",
            "hopper/*.hpp",
            "hopper/*.cpp",
            "hopper/*.cu",
            "hopper/instantiations/*_bf16_sm90.cu",
            "csrc/cutlass/include/**/*",
        ),
        imports=("flash_attn_interface",),
        cpu_seconds=1600,
        # Head size 256 is the one where FlashAttention-4 may be slower on Hopper.
        env={"FLASH_ATTENTION_DISABLE_HDIM256": "FALSE"},
    ),
    "sageattention": KitBuild(
        kept=(
            "setup.py",
            "pyproject.toml",
            "README.md",
            "LICENSE",
            "csrc/**/*",
            "sageattention/**/*",
        ),
        imports=("sageattention.sm90_compile", "sageattention._fused"),
        cpu_seconds=600,
        env={"EXT_PARALLEL": "2"},
    ),
}


def log(text: str) -> None:
    """Print the progress."""
    print(f"gpu-kit: {text}", flush=True)  # noqa: T201 - the target's output


def pinned(text: str, names: Iterable[str]) -> list[str]:
    """Return NAME==VERSION of each name, as a lock or a constraints file has it.

    Raises:
        SystemExit: a name is not in it.
    """
    found = dict(re.findall(r"^([a-z0-9._-]+)==([^\s\\;]+)", text, re.MULTILINE))
    if missing := [name for name in names if name not in found]:
        sys.exit(
            f"gpu-kit: {', '.join(missing)} is not in a lock file: fix LACKED or FA4 in make_kit.py"
        )
    return [f"{name}=={found[name]}" for name in names]


def wheel_name(requirement: str) -> str:
    """Return how the file name of a requirement's wheel begins."""
    name, version = requirement.split("==")
    return f"{name.replace('-', '_')}-{version}-"


def download(requirements: list[str], to: Path) -> None:
    """Download the wheels of Python 3.12 that are not there, and remove other versions."""
    to.mkdir(parents=True, exist_ok=True)
    names = {requirement: wheel_name(requirement) for requirement in requirements}
    for path in to.glob("*.whl"):
        if not path.name.startswith(tuple(names.values())):
            path.unlink()
    wanted = [one for one, start in names.items() if not list(to.glob(f"{start}*.whl"))]
    if not wanted:
        return
    log(f"downloading {', '.join(wanted)}")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", f"--dest={to}"]
    command += ["--only-binary=:all:", f"--python-version={PYTHON}", "--implementation=cp"]
    command += [f"--platform=manylinux{platform}" for platform in PLATFORMS]
    subprocess.run([*command, *wanted], check=True)


def pack(tree: Path, kept: Iterable[str], to: Path, *, machine_code: bool = False) -> None:
    """Write the files of a tree that match a glob into a .tar.xz, the same bytes each time."""
    filters = [{"id": lzma.FILTER_X86}] if machine_code else []
    filters.append({"id": lzma.FILTER_LZMA2, "preset": 9})
    files = {path for glob in kept for path in tree.glob(glob) if path.is_file()}

    def plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
        entry.mtime = entry.uid = entry.gid = 0
        entry.uname = entry.gname = ""
        return entry

    with (
        lzma.open(to, "wb", filters=filters) as packed,
        tarfile.open(fileobj=packed, mode="w|") as tar,
    ):
        for path in sorted(files):
            tar.add(path, path.relative_to(tree).as_posix(), filter=plain)


def environment(kernel: Kernel, build: KitBuild) -> dict[str, str]:
    """Return the variables that build a kernel for Hopper alone, trimmed."""
    recipe = kernel.build["cuda"]
    variable = {recipe.arch_variable: kernel.archs[ARCH].token} if recipe.arch_variable else {}
    return {**recipe.env, **(kernel.trim.env if kernel.trim else {}), **build.env, **variable}


def patches_of(kernel: Kernel, root: Path) -> list[Path]:
    """Return the patches of a kernel in their order: the recipe's, its trim's, the kit's."""
    recipe = root / "recipes/patches" / kernel.name
    folders = [recipe, recipe / "trim", PATCHES / kernel.name]
    return [patch for folder in folders for patch in sorted(folder.glob("*.patch"))]


def fingerprint(kernel: Kernel, build: KitBuild, patches: list[Path]) -> str:
    """Return a hash of the inputs of a kernel's part of the kit."""
    parts = [kernel.source, json.dumps(environment(kernel, build), sort_keys=True), repr(build)]
    text = "\n".join([*parts, *(patch.read_text() for patch in patches)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def source_of(kernel: Kernel, into: Path) -> Path | None:
    """Return a copy of a kernel's source in a folder, None where its git tree is not there."""
    tree = into / "tree"
    if kernel.form == "git":
        clone = ROOT / SOURCES / f"{kernel.name}-source-{kernel.source.partition('@')[2]}"
        if not clone.is_dir():
            return None
        shutil.copytree(clone, tree)
        return tree
    log(f"downloading the source of {kernel.name}")
    wanted = into / "wanted.txt"
    wanted.write_text(f"{kernel.source} --hash=sha256:{kernel.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary=:all:"]
    command += ["--no-build-isolation", "--require-hashes", f"--dest={into}", f"-r{wanted}"]
    # pip runs its setup.py for the name.
    env = {**os.environ, "FLASH_ATTENTION_SKIP_CUDA_BUILD": "TRUE"}
    subprocess.run(command, env=env, check=True)
    with tarfile.open(next(into.glob("*.tar.gz"))) as opened:
        opened.extractall(into / "unpacked", filter="data")
    next((into / "unpacked").iterdir()).rename(tree)
    return tree


def add_source(kernel: Kernel, build: KitBuild, folder: Path) -> bool:
    """Write a kernel's patched source and how it is built; return whether there was one."""
    patches = patches_of(kernel, ROOT)
    key = fingerprint(kernel, build, patches)
    described = folder / "kernel.json"
    if described.is_file() and json.loads(described.read_text())["key"] == key:
        return True
    shutil.rmtree(folder, ignore_errors=True)
    with tempfile.TemporaryDirectory() as made:
        tree = source_of(kernel, Path(made))
        if tree is None:
            return False
        for path in kernel.remove:
            shutil.rmtree(tree / path.path)
        for patch in patches:
            command = ["patch", "--strip=1", "--fuzz=0", "--forward", "-s", f"--input={patch}"]
            subprocess.run(command, cwd=tree, check=True)
        folder.mkdir(parents=True)
        log(f"packing the source of {kernel.name}")
        pack(tree, build.kept, folder / "source.tar.xz")
    facts = {
        "name": kernel.name,
        "version": kernel.version,
        "key": key,
        "directory": kernel.subdirectory or ".",
        "imports": build.imports,
        "cpu_seconds": build.cpu_seconds,
        "env": environment(kernel, build),
    }
    described.write_text(json.dumps(facts, indent=1) + "\n")
    return True


def add_xformers(kernel: Kernel, folder: Path) -> None:
    """Write xFormers' wheel without its library, which is one of CUDA 12 and can't be loaded.

    The kernels for attention are torch's own (cutlassF-pt, cutlassB-pt). Without the library every
    one is refused on a GPU all the same, "xFormers wasn't build with CUDA support", which goes by
    _built_with_cuda alone: the wheel sets it. An image compiles the library.
    Source: xformers 0.0.35, _cpp_lib.py and ops/fmha/common.py, not_supported_reasons; with this
    check passed, nothing stands against them for sm_90 and bfloat16 (2026-11-26).
    """
    start = wheel_name(kernel.source)
    facts = {
        "name": "xformers",
        "version": kernel.version,
        "imports": ["xformers.ops"],
        "env": {},
        "set": XFORMERS_SET,
    }
    text = json.dumps(facts, indent=1) + "\n"
    described = folder / "kernel.json"
    if described.is_file() and described.read_text() == text and list(folder.glob(f"{start}*.whl")):
        return
    shutil.rmtree(folder, ignore_errors=True)
    with tempfile.TemporaryDirectory() as made:
        download([kernel.source], Path(made))
        wheel = next(Path(made).glob("*.whl"))
        folder.mkdir(parents=True)
        target = folder / f"{start}py39-none-any.whl"
        with (
            zipfile.ZipFile(wheel) as old,
            zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new,
        ):
            for entry in old.infolist():
                if entry.filename == "xformers/_C.so":
                    continue
                read = old.read(entry)
                if entry.filename == "xformers/_cpp_lib.py":
                    assert b"\n_built_with_cuda = (" in read, "another xFormers: look at it again"
                    read += f"\n{XFORMERS_SET}\n".encode()
                new.writestr(entry, read)
    described.write_text(text)


def add_fa4(kit: Path) -> list[Path]:
    """Write FlashAttention-4 beside the kit, with its large library compressed and split in two."""
    folders = [kit.with_name(f"{kit.name}-fa4{letter}") for letter in "ab"]
    constraints = (ROOT / "docker/constraints/hopper.txt").read_text()
    small, (large,) = pinned(constraints, FA4), pinned(constraints, [FA4_LARGE])
    facts = {
        "name": "flash-attn-4",
        "version": small[FA4.index("flash-attn-4")].partition("==")[2],
        "library": large,
        "imports": ["flash_attn.cute"],
        "inside": "flash_attn",
        # Alone it makes flash_attn a namespace package, of which xFormers' import dies.
        "after": ["flash-attn"],
        "parts": [folder.name for folder in folders],
    }
    text = json.dumps(facts, indent=1) + "\n"
    described = folders[0] / "kernel.json"
    if not (described.is_file() and described.read_text() == text):
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        with tempfile.TemporaryDirectory(dir=kit.parent) as made:
            download([large], Path(made))
            wheel = next(Path(made).glob("*.whl"))
            tree = Path(made) / "tree"
            with zipfile.ZipFile(wheel) as opened:
                opened.extractall(tree)
            log("compressing FlashAttention-4's library, 237 MB, 5 minutes")
            packed = Path(made) / "library.tar.xz"
            pack(tree, ["**/*"], packed, machine_code=True)
            whole = packed.read_bytes()
        half = -(-len(whole) // 2)
        for number, folder in enumerate(folders):
            piece = whole[number * half : (number + 1) * half]
            (folder / f"library.tar.xz.{number}").write_bytes(piece)
    download(small, folders[0])
    described.write_text(text)
    return folders


def compile_here(kit: Path, python: str, names: list[str]) -> None:
    """Build the wheels of kernels with a Python 3.12 and the machine's torch, into the kit."""
    work = kit.with_name(f"{kit.name}-work")
    found = work / "bin/python"
    if not (work / "ready").is_file():
        log(f"making {work.name} with {TORCH}, 3 GB of downloads")
        subprocess.run([python, "-m", "venv", str(work)], check=True)
        tools = ["setuptools<82", "wheel", "ninja", "packaging", "einops", "psutil", "numpy"]
        subprocess.run([str(found), "-m", "pip", "install", "-q", TORCH, *tools], check=True)
        (work / "ready").touch()
    for name in names:
        folder = kit / "kernels" / name
        if list(folder.glob("*.whl")):
            continue
        log(f"compiling {name}; its log is {work.name}/to/logs/{name}.log")
        command = [str(found), str(Path(__file__).with_name("compile_kernels.py"))]
        command += [f"--kit={kit}", f"--to={work / 'to'}", f"--keep={folder}", "--compile", name]
        env = {**os.environ, "PATH": f"{work / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": ""}
        if jobs := os.environ.get("JOBS"):
            command.append(f"--jobs={jobs}")
        subprocess.run(command, env=env, check=False)
        # Its import may fail here, for the driver's library.
        if not list(folder.glob("*.whl")):
            log(f"{name} was not built here: the GPU machine will compile it from the source")


def sizes(folders: Iterable[Path]) -> dict[str, Any]:
    """Return the bytes of each file of the kit, by folder."""
    return {
        folder.name: {
            path.relative_to(folder).as_posix(): path.stat().st_size
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        for folder in folders
    }


def timed(text: str, step: Callable[[], Any]) -> Any:
    """Run a step; print its name and its seconds."""
    began = time.monotonic()
    done = step()
    log(f"{text}: {time.monotonic() - began:.0f} s")
    return done


def main(arguments: list[str]) -> None:
    """Prepare the kit, and print its contents."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--to", type=Path, default=ROOT / "build/gpu-kit")
    parser.add_argument("--compile", metavar="PYTHON", help="a Python 3.12 to build wheels with")
    options = parser.parse_args(arguments)
    kit = options.to.resolve()
    kernels = read_recipes(ROOT).kernels
    lock = (ROOT / "requirements/lock.txt").read_text()
    timed("wheels of attnimg's packages", lambda: download(pinned(lock, LACKED), kit / "wheels"))
    toolchain = (ROOT / "requirements/images/toolchain-2.14.1-cu130.txt").read_text()
    download(pinned(toolchain, HEADERS), kit / "headers")
    built = []
    for name, build in BUILDS.items():
        folder = kit / "kernels" / name
        if timed(name, lambda: add_source(kernels[name], build, folder)):  # noqa: B023 - runs at once
            built.append(name)
        else:
            log(f"{name} is left out: make sources/hopper first, from clones with FROM=DIR")
    timed("xformers", lambda: add_xformers(kernels["xformers"], kit / "kernels/xformers"))
    parts = timed("flash-attn-4", lambda: add_fa4(kit))
    if options.compile:
        timed("wheels of kernels", lambda: compile_here(kit, options.compile, built))
    for name, files in sizes([kit, *parts]).items():
        log(f"{name}: {sum(files.values()) / MIB:.1f} MiB")
        for path, size in files.items():
            log(f"  {path}: {size / MIB:.2f} MiB")


if __name__ == "__main__":
    main(sys.argv[1:])
