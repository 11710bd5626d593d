"""Install attention kernels from the GPU kit: from its wheels, else from source.

    python compile_kernels.py --kit build/gpu-kit --to DIR [--jobs N] [--keep DIR] NAME...

NAME is flash-attn, flash-attn-3, flash-attn-4, sageattention or xformers. DIR becomes a folder for
PYTHONPATH. Each change of state is one line of DIR/status.jsonl:

    {"kernel": "flash-attn", "state": "compiling", "seconds": 0.4, "error": null, "from": "source"}

States are compiling, installed and failed. A kernel is installed when its modules were imported;
if a wheel can't be imported, the source in the kit is compiled. The builds run in parallel, and
their compilers share N slots (compile_slot.py); logs are DIR/logs/NAME.log.

It needs only Python's standard library; compiling needs torch, nvcc, ninja and setuptools.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import threading
import time
import zipfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# What comes back from a lent machine is limited to files of this size (2026-11-26).
KEEP_BYTES = 16 << 20
# What one compiler may need, in GB: the backward pass of head size 256 (measured 2026-11-21).
JOB_GB = 6.5
# The words that name a cause, and those that only repeat that there was one.
_CAUSE = re.compile(
    r"error[: ]|undefined reference|cannot find -l|died due to signal|Killed|not found|No such file"
)
_ECHO = re.compile(
    r"subprocess-exited|Failed building wheel|build stopped|Error compiling objects|Traceback|"
    r"CalledProcessError|exit status|exit code|note: |\[\d+ lines of output\]|warning"
)


class KernelError(Exception):
    """A kernel can't be installed; the text says why."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """The settings of one run, for all its kernels.

    Attributes:
        kit: the kit's folder; the parts of FlashAttention-4 lie beside it.
        to: the folder for PYTHONPATH.
        jobs: compilers at one time.
        keep: where finished wheels are saved; None to save none.
        wheels: whether wheels of the kit are used.
        finished: of each kernel named, whether it is installed or failed.
    """

    kit: Path
    to: Path
    jobs: int
    keep: Path | None
    wheels: bool
    finished: Mapping[str, threading.Event]
    began: float = field(default_factory=time.monotonic)
    lock: threading.Lock = field(default_factory=threading.Lock)


def record(run: Run, kernel: str, state: str, *, error: str | None = None, **more: Any) -> None:
    """Append one change of state to status.jsonl."""
    line = {"kernel": kernel, "state": state, "seconds": round(time.monotonic() - run.began, 1)}
    text = json.dumps({**line, "error": error, **more})
    with run.lock:
        with (run.to / "status.jsonl").open("a") as file:
            file.write(text + "\n")
        print(text, flush=True)  # noqa: T201 - it is what a reader of the run follows


def last_useful_line(log: str) -> str:
    """Return the line of a build's output that names the cause; the last one where none does."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    causes = [line for line in lines if _CAUSE.search(line) and not _ECHO.search(line)]
    return (causes[0] if causes else lines[-1] if lines else "no output")[:400]


def parts_of(kit: Path, name: str) -> list[Path]:
    """Return the folders that hold a kernel: its own, or the parts beside the kit."""
    if name == "flash-attn-4":
        return sorted(kit.parent.glob(f"{kit.name}-fa4[a-z]"))
    return [kit / "kernels" / name]


def read_kernel(run: Run, name: str) -> tuple[dict[str, Any], list[Path]]:
    """Return the kit's facts on a kernel, and its folders.

    Raises:
        KernelError: the kit has no such kernel, or lacks a part of it.
    """
    folders = parts_of(run.kit, name)
    described = [folder / "kernel.json" for folder in folders if (folder / "kernel.json").is_file()]
    if not described:
        raise KernelError(f"the kit has no {name}: found no kernel.json for it")
    facts = json.loads(described[0].read_text())
    present = {folder.name for folder in folders}
    missing = [part for part in facts.get("parts", []) if part not in present]
    if missing:
        raise KernelError(f"the kit lacks {', '.join(missing)} beside {run.kit}")
    return facts, folders


def usable_wheels(folders: list[Path]) -> list[Path]:
    """Return the wheels that this Python supports, by their tags."""
    cpython = f"cp{sys.version_info.major}{sys.version_info.minor}"

    def fits(wheel: Path) -> bool:
        parts = wheel.stem.split("-")
        if len(parts) < 5:  # no wheel's name
            return False
        python, abi = parts[-3:-1]
        return abi == "none" or abi == "abi3" or cpython in python.split(".")

    return [wheel for folder in folders for wheel in sorted(folder.glob("*.whl")) if fits(wheel)]


def unpack(wheels: list[Path], archives: list[Path], *, into: Path) -> None:
    """Unpack wheels, and one tar archive that was cut into pieces, side by side.

    pip's --target replaces a whole folder, and flash_attn is one of two distributions.
    """
    into.mkdir(parents=True, exist_ok=True)
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as opened:
            opened.extractall(into)
    if archives:
        joined = into.with_suffix(".tar.xz")
        with joined.open("wb") as whole:
            for piece in sorted(archives, key=lambda path: path.name):
                with piece.open("rb") as part:
                    shutil.copyfileobj(part, whole)
        with tarfile.open(joined) as opened:
            opened.extractall(into, filter="data")
        joined.unlink()
    for data in list(into.glob("*.data")):
        for scheme in ("purelib", "platlib"):
            if (data / scheme).is_dir():
                merge(data / scheme, into)
        shutil.rmtree(data)


def merge(source: Path, target: Path) -> None:
    """Move a tree into another, its metadata last: whoever sees a version can import it."""
    target.mkdir(parents=True, exist_ok=True)
    for entry in sorted(source.iterdir(), key=lambda path: path.name.endswith(".dist-info")):
        if entry.is_dir() and (target / entry.name).is_dir():
            merge(entry, target / entry.name)
        else:
            entry.replace(target / entry.name)


def read_path_files(folder: Path) -> None:
    """Make Python read the .pth files of a folder of PYTHONPATH, as it does in site-packages."""
    if any(folder.glob("*.pth")):
        text = (
            "import site\nfrom pathlib import Path\n\nsite.addsitedir(str(Path(__file__).parent))\n"
        )
        (folder / "sitecustomize.py").write_text(text)


def import_fault(run: Run, modules: list[str], *, beside: Path) -> str | None:
    """Return why the modules can't be imported by a new Python, None where they can."""
    paths = [str(beside), str(run.to), os.environ.get("PYTHONPATH", "")]
    command = [sys.executable, "-c", f"import {', '.join(modules)}"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else done.stderr.strip().splitlines()[-1][:400]


def install(run: Run, facts: dict[str, Any], wheels: list[Path], archives: list[Path]) -> None:
    """Unpack a kernel, import it, and move it into the folder for PYTHONPATH.

    Raises:
        KernelError: a module can't be imported.
    """
    staging = run.to / ".staging" / facts["name"]
    shutil.rmtree(staging, ignore_errors=True)
    unpack(wheels, archives, into=staging)
    read_path_files(staging)
    # A kernel that lies in another's package is imported where both are.
    if facts.get("inside"):
        merge(staging, run.to)
        staging.mkdir(parents=True, exist_ok=True)
    fault = import_fault(run, facts["imports"], beside=staging)
    if fault is not None:
        raise KernelError(fault)
    merge(staging, run.to)
    shutil.rmtree(staging, ignore_errors=True)


def cuda_home() -> Path:
    """Return the CUDA toolkit's folder: torch's, which may be that of a shim, or the usual one.

    Raises:
        KernelError: neither has a compiler.
    """
    from torch.utils.cpp_extension import CUDA_HOME

    places = [Path(place).resolve() for place in (CUDA_HOME, "/usr/local/cuda") if place]
    with_nvcc = [place for place in places if (place / "bin/nvcc").is_file()]
    if not with_nvcc:
        raise KernelError(f"there is no bin/nvcc in {' or '.join(map(str, places))}")
    return max(with_nvcc, key=lambda place: (place / "include/cuda_runtime.h").is_file())


def toolchain(run: Run) -> dict[str, str]:
    """Return the environment of a build: compilers in slots, headers and libraries that torch has.

    Raises:
        KernelError: there is no nvcc, or Python has no headers.
    """
    cuda = cuda_home()
    headers = Path(sysconfig.get_paths()["include"])
    if not (headers / "Python.h").is_file():
        raise KernelError(f"there is no Python.h in {headers}: the headers of Python are needed")
    packages = Path(sysconfig.get_paths()["purelib"]) / "nvidia/cu13"
    made = run.to / ".toolchain"
    with run.lock:
        if not made.is_dir():
            partial = made.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            # Where the toolkit is a compiler and little else, its headers are those of the kit.
            unpack(sorted((run.kit / "headers").glob("*.whl")), [], into=partial / "headers")
            # SageAttention links with the driver's library, of which a build has a stand-in. The
            # function it calls is in it: a linker may leave out a library that gives it nothing.
            stub = ["gcc", "-shared", "-x", "c", "-", "-o", str(partial / "libcuda.so")]
            stub.append("-Wl,-soname,libcuda.so.1")
            code = "void cuTensorMapEncodeTiled(void) {}"
            subprocess.run(stub, input=code, text=True, check=True, capture_output=True)
            _make_executable(HERE / "compile_slot.py", partial / "nvcc")
            if (packages / "lib/libcudart.so.13").is_file():
                (partial / "libcudart.so").symlink_to(packages / "lib/libcudart.so.13")
            (partial / "slots").mkdir()
            partial.rename(made)
    # cuBLAS and others are in pip packages where the toolkit is small.
    folders = [packages, cuda, made / "headers/nvidia/cu13"]
    includes = [folder / name for folder in folders for name in ("include", "include/cccl")]
    return {
        **os.environ,
        "CUDA_HOME": str(cuda),
        "CPATH": os.pathsep.join(str(path) for path in includes if path.is_dir()),
        "LIBRARY_PATH": str(made),
        # ninja is a script of this Python's.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "LDFLAGS": "-Wl,-s",
        "PYTORCH_NVCC": str(made / "nvcc"),
        "SLOT_NVCC": str(cuda / "bin/nvcc"),
        "SLOTS": str(made / "slots"),
        "SLOT_COUNT": str(run.jobs),
        "MAX_JOBS": str(run.jobs),
    }


def _make_executable(script: Path, path: Path) -> None:
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{script}" "$@"\n')
    path.chmod(0o755)


def compile_wheel(run: Run, facts: dict[str, Any], source: Path, *, rank: int) -> Path:
    """Build a kernel's wheel from its source; objects of an earlier run are used again.

    Raises:
        KernelError: the build failed.
    """
    env = {**toolchain(run), **facts["env"], "SLOT_RANK": str(rank)}
    work = run.to / ".work" / facts["name"]
    if not work.is_dir():
        partial = work.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        with tarfile.open(source) as opened:
            opened.extractall(partial, filter="data")
        partial.rename(work)
    wheels = run.to / ".wheels" / facts["name"]
    shutil.rmtree(wheels, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation"]
    command += ["--no-index", f"--wheel-dir={wheels}", str(work / facts["directory"])]
    (run.to / "logs").mkdir(exist_ok=True)
    log = run.to / "logs" / f"{facts['name']}.log"
    with log.open("w") as output:
        # In this process group: whoever ends the run by its group ends its compilers.
        done = subprocess.run(
            command, env=env, stdout=output, stderr=subprocess.STDOUT, check=False
        )
    if done.returncode:
        raise KernelError(last_useful_line(log.read_text(errors="replace")))
    return next(wheels.glob("*.whl"))


def installed_before(run: Run, facts: dict[str, Any]) -> bool:
    """Return whether an earlier run into this folder installed a kernel that can be imported."""
    status = run.to / "status.jsonl"
    lines = map(json.loads, status.read_text().splitlines() if status.is_file() else [])
    states = [line["state"] for line in lines if line["kernel"] == facts["name"]]
    if states[-1:] != ["installed"]:
        return False
    return import_fault(run, facts["imports"], beside=run.to) is None


def provide(run: Run, name: str, *, rank: int) -> None:
    """Install one kernel, and record how that went; a failure of one ends no other."""
    try:
        facts, folders = read_kernel(run, name)
        for other in facts.get("after", []):
            if other in run.finished:
                run.finished[other].wait()
        if installed_before(run, facts):
            record(run, name, "installed", **{"from": "an earlier run"})
            return
        wheels = usable_wheels(folders) if run.wheels else []
        archives = [path for folder in folders for path in folder.glob("*.tar.xz.[0-9]")]
        sources = [path for folder in folders for path in folder.glob("source.tar.xz")]
        fault = "the kit has no wheel for this Python"
        if wheels:
            try:
                install(run, facts, wheels, archives)
            except KernelError as error:
                fault = str(error)
            else:
                record(run, name, "installed", **{"from": "wheel"})
                return
        if not sources:
            raise KernelError(f"{fault}, and no source")
        record(run, name, "compiling", error=fault if wheels else None, **{"from": "source"})
        wheel = compile_wheel(run, facts, sources[0], rank=rank)
        if run.keep is not None and wheel.stat().st_size < KEEP_BYTES:
            run.keep.mkdir(parents=True, exist_ok=True)
            # A lent machine hands back no file with a + in its name.
            shutil.copy(wheel, run.keep / wheel.name.replace("+", "_"))
        install(run, facts, [wheel], [])
        record(run, name, "installed", **{"from": "source"}, wheel_bytes=wheel.stat().st_size)
    except KernelError as error:
        record(run, name, "failed", error=str(error))
    except Exception as error:
        # The machine is another one than this was written on: whatever it is, it is recorded.
        record(run, name, "failed", error=f"{type(error).__name__}: {error}"[:400])
    finally:
        run.finished[name].set()


def jobs_that_fit() -> int:
    """Return how many compilers the processors and the memory take, three processors left free."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    return max(1, min(len(os.sched_getaffinity(0)) - 3, int(free / (JOB_GB * 1e9))))


def order(run: Run, names: list[str]) -> list[str]:
    """Return the kernels, the quickest to finish first."""

    def seconds(name: str) -> float:
        try:
            facts, folders = read_kernel(run, name)
        # Its turn records what is wrong with it; the others are compiled all the same.
        except (KernelError, ValueError, OSError):
            return 0.0
        wheels = run.wheels and usable_wheels(folders)
        return 0.0 if wheels else float(facts.get("cpu_seconds", 0.0))

    return sorted(names, key=seconds)


def main(arguments: list[str]) -> int:
    """Install the named kernels; return the number of failures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+", metavar="NAME")
    parser.add_argument(
        "--kit", type=Path, required=True, help="the folder that make gpu-kit wrote"
    )
    parser.add_argument("--to", type=Path, required=True, help="the folder for PYTHONPATH")
    parser.add_argument("--jobs", type=int, help="compilers at one time")
    parser.add_argument("--keep", type=Path, help="save finished wheels under 16 MiB here")
    parser.add_argument("--compile", action="store_true", help="compile, whatever wheels there are")
    options = parser.parse_args(arguments)
    to = options.to.resolve()
    to.mkdir(parents=True, exist_ok=True)
    run = Run(
        kit=options.kit.resolve(),
        to=to,
        jobs=options.jobs or jobs_that_fit(),
        keep=options.keep,
        wheels=not options.compile,
        finished={name: threading.Event() for name in options.names},
    )
    before = (to / "status.jsonl").stat().st_size if (to / "status.jsonl").is_file() else 0
    names = order(run, options.names)
    # Each kernel waits for its own compilers: there is a thread for each.
    with ThreadPoolExecutor(len(names)) as pool:
        for rank, name in enumerate(names):
            pool.submit(provide, run, name, rank=rank)
    with (to / "status.jsonl").open() as file:
        file.seek(before)
        return sum(json.loads(line)["state"] == "failed" for line in file)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
