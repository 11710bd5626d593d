"""Copy the image's precompiled kernels to the user's caches, and set the variables that name them.

docker/precompiled compiles them: a folder for each architecture, and a manifest.json with a
fingerprint of the software that they were compiled with. fingerprint.py computes the fingerprint of
this machine's software, and doctor.py reports why the kernels are not used.

A run sets the variables for itself; `python -m attnimg.machine.kernel_cache` prints them as shell
commands, which docker/entrypoint.sh runs for other programs. Notes are printed to stderr because
the shell reads stdout.

FlashAttention-4 creates a lock file beside each kernel that it loads. In the image's folder, which
is not writable, that would raise inside the attention call. The folder of this GPU is therefore
copied to a cache, and two variables name it. Both are read when flash_attn.cute is imported
(flash-attn-4 4.0.0b36, cache_utils.py, read 2026-11-25).

Triton names a cache entry by a hash of everything that it depends on, so that one folder can have
entries of several architectures, and unused ones do no harm. They are copied into the user's cache.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import stat
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from attnimg.backends import all_backends, conflicting_variables
from attnimg.errors import AttnimgError, bad_manifest
from attnimg.facts import Machine
from attnimg.files import cache_folder, check_private, make_private_folder, read_data
from attnimg.machine.fingerprint import ABSENT, fingerprint, triton_in_short
from attnimg.machine.probe import this_machine
from attnimg.run_facts import Reason

FOLDER = Path("/opt/attnimg/fa4")
TRITON_FOLDER = Path("/opt/attnimg/triton")
CACHE_ON = "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"
CACHE_AT = "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"
# They are compiled by CuTe DSL for CUDA 13, and need a driver for CUDA 13.
# Source: recipes/cuda.toml, 13.0.
_DRIVER_MAJOR = 580


@dataclass(frozen=True, kw_only=True, slots=True)
class ShippedKernels:
    """Precompiled kernels in the image, and the software that would use them.

    Attributes:
        key: a hash of `built`; for FlashAttention-4 part of the path of its cache folder.
        built: the software that they were compiled with: "python" or a package -> its version, a
            folder -> its hash.
        found: the same software as installed here.
        kernels: architecture, "sm_90" -> number of kernels.
        settings: variables that are set here and select other kernels or another folder.
    """

    key: str
    built: Mapping[str, str]
    found: Mapping[str, str]
    kernels: Mapping[str, int]
    settings: tuple[str, ...] = ()


def shipped_kernels(folder: Path = FOLDER) -> ShippedKernels | None:
    """Read the manifest of FlashAttention-4's kernels in the image; return None if it has none.

    Raises:
        AttnimgError: the manifest exists but can't be read (code "bad-image").
    """
    found = _read(folder, found=fingerprint, variables="flash_attention_4")
    if found is None:
        return None
    # The user has moved the cache or turned it off.
    off = [CACHE_ON] if os.environ.get(CACHE_ON, "1") != "1" else []
    elsewhere = [CACHE_AT] if found.key not in (os.environ.get(CACHE_AT) or found.key) else []
    return replace(found, settings=(*found.settings, *off, *elsewhere))


def shipped_triton(folder: Path = TRITON_FOLDER) -> ShippedKernels | None:
    """Read the manifest of SageAttention's Triton kernels in the image; return None if it has none.

    `built` has only the items of triton_in_short(): the others need half a gigabyte of reading.

    Raises:
        AttnimgError: the manifest exists but can't be read (code "bad-image").
    """
    found = _read(folder, found=triton_in_short, variables="triton")
    if found is None:
        return None
    built = {name: value for name, value in found.built.items() if name in found.found}
    return replace(found, built=built)


def _read(
    folder: Path, *, found: Callable[[], dict[str, str]], variables: str
) -> ShippedKernels | None:
    """Read a manifest.json; `variables` is a row of data/kernel_variables.toml."""
    manifest, names = folder / "manifest.json", read_data("kernel_variables.toml")[variables]
    try:
        raw = json.loads(manifest.read_text(encoding="utf-8"))
        key, built = raw["key"], dict(raw["fingerprint"])
        kernels = {arch: target["kernels"] for arch, target in raw["targets"].items()}
        wrong = [v for v in (key, *built.values()) if not isinstance(v, str)]
        if wrong := [*wrong, *(v for v in kernels.values() if not isinstance(v, int))]:
            raise TypeError(f"found {wrong[0]!r:.60} as a name, a version or a count")
        return ShippedKernels(
            key=key,
            built=built,
            found=found(),
            kernels=kernels,
            settings=tuple(name for name in names if name in os.environ),
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise bad_manifest(manifest, error) from error


def reasons_against_shipped(shipped: ShippedKernels, machine: Machine) -> tuple[Reason, ...]:
    """Return the reasons why FlashAttention-4 on an NVIDIA GPU does not use the image's kernels."""
    arch, others = machine.arch.name, machine.other_archs
    found = [*_other_gpu(shipped, (arch,))]
    if others:
        # A folder is for one architecture only, as some keys in it do not contain the architecture.
        text = f"GPUs differ: {arch} and {' '.join(others)}"
        found.append(Reason(code="kernels-mixed-gpus", text=text))
    major = (machine.driver or "").partition(".")[0]
    if major.isdecimal() and int(major) < _DRIVER_MAJOR:
        text = f"they need driver {_DRIVER_MAJOR} or newer, found {machine.driver}"
        found.append(Reason(code="kernels-driver", text=text))
    return (*found, *_other_packages(shipped))


def reasons_against_shipped_triton(shipped: ShippedKernels, machine: Machine) -> tuple[Reason, ...]:
    """Return the reasons why Triton compiles kernels again on a machine with NVIDIA GPUs."""
    # One folder has the kernels of several architectures, whose names differ.
    archs = (machine.arch.name, *machine.other_archs)
    return (*_other_gpu(shipped, archs), *_other_packages(shipped))


def _other_gpu(shipped: ShippedKernels, archs: tuple[str, ...]) -> Iterator[Reason]:
    if missing := [arch for arch in archs if arch not in shipped.kernels]:
        text = f"they are for {' '.join(shipped.kernels)}, found {' '.join(missing)}"
        yield Reason(code="kernels-arch", text=text)


def _other_packages(shipped: ShippedKernels) -> Iterator[Reason]:
    for name, built in shipped.built.items():
        here = shipped.found.get(name, ABSENT)
        if here != built:
            # 12 characters of a hash; versions are shorter.
            text = f"compiled with another: {name} {built[:12]} -> {here[:12]}"
            yield Reason(code="kernels-packages", text=text)


TRITON_CACHE = "TRITON_CACHE_DIR"


def use_shipped_kernels(machine: Machine) -> None:
    """Set the variables for this process and its children; call it before importing flash_attn."""
    os.environ.update(settings_for(machine, os.environ))


def settings_for(machine: Machine, environment: Mapping[str, str]) -> dict[str, str]:
    """Copy the kernels for this machine, and return the variables to set.

    Raises:
        AttnimgError: the manifest of the image's kernels can't be read.
    """
    settings = variant_settings(machine, environment) | fa4_settings(machine, environment)
    return settings | triton_settings(machine, environment)


def variant_settings(machine: Machine, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that select a package's kernels for this GPU.

    A variable that is already set is kept; a note is printed if it is wrong.
    """
    settings: dict[str, str] = {}
    arch = machine.arch.name
    for backend in all_backends():
        if (variant := backend.variants.get(arch)) is None:
            continue
        for setting in conflicting_variables(backend, machine.arch, environment):
            kernels = f"{backend.name} runs its {variant.name} kernels"
            _note(f"{setting} is set; on {arch} {kernels}: unset it")
        unset = {name: v for name, v in variant.variables.items() if name not in environment}
        settings.update(unset)
    return settings


def fa4_settings(
    machine: Machine, environment: Mapping[str, str], *, shipped: Path = FOLDER
) -> dict[str, str]:
    """Copy FlashAttention-4's kernels to the user's cache, and return the variables to set.

    Args:
        machine: the GPU and its driver.
        environment: the environment variables; those for FlashAttention-4's own cache are kept.
        shipped: the folder of the image's kernels.

    Returns:
        Variable -> value; none if the image has no kernels for this machine, or if the user has
        set the variables.

    Raises:
        AttnimgError: the image's manifest can't be read.
    """
    if machine.arch.vendor != "nvidia" or {CACHE_ON, CACHE_AT} & set(environment):
        return {}
    kernels = shipped_kernels(shipped)
    if kernels is None or reasons_against_shipped(kernels, machine):
        return {}
    source = shipped / machine.arch.name
    name = Path(kernels.key) / f"{machine.arch.name}-{_hash_cpu_features()}"
    # The temporary folder is used if the cache is on a volume with another user's folders.
    folders = [cache_folder(environment, "flash-attn-4"), *_temporary_folders("flash-attn-4")]
    for folder in folders:
        if _copy_folder(source, folder / name):
            return {CACHE_ON: "1", CACHE_AT: str(folder / name)}
    tried = ", ".join(map(str, folders))
    _note(f"FlashAttention-4 compiles its kernels again: no private, writable folder in {tried}")
    return {}


def _temporary_folders(name: str) -> Iterator[Path]:
    """Yield this user's folder with a name in the temporary folder, if there is one."""
    try:
        yield Path(tempfile.gettempdir()) / f"attnimg-{name}-{os.getuid()}"
    except FileNotFoundError:  # there is no temporary folder that this user can write to
        return


def _copy_folder(source: Path, target: Path) -> bool:
    """Copy a folder atomically for this user; other processes may do the same concurrently.

    Returns:
        Whether the copy exists and is writable, and no other user can change it.
    """
    temporary = None
    try:
        # Its files are loaded as code, so no other user may be able to change them.
        for folder in (target.parents[1], target.parent):
            make_private_folder(folder)
        if not target.exists():
            temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
            for path in source.rglob("*.o"):
                copy = temporary / path.relative_to(source)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)
            try:
                temporary.rename(target)
            except OSError:  # another process has made the same copy first
                if not target.is_dir():
                    raise
        check_private(target.lstat(), is_kind=stat.S_ISDIR)
        return os.access(target, os.W_OK)
    except OSError:  # not writable, or the disk is full
        return False
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _hash_cpu_features(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Return a hash of this CPU's features, which psutil does not read.

    The files that FlashAttention-4 adds to its cache are compiled for the CPU, but its cache keys
    don't contain it: if machines share a volume, older CPUs would fail with an illegal instruction.
    """
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    words = sorted(flags.partition(":")[2].split())
    return hashlib.sha256(" ".join(words).encode()).hexdigest()[:8]


def triton_settings(
    machine: Machine, environment: Mapping[str, str], *, shipped: Path = TRITON_FOLDER
) -> dict[str, str]:
    """Copy the missing entries for this machine's GPUs to Triton's cache.

    Returns:
        Another TRITON_CACHE_DIR if this user can't write to the one that is set, where Triton
        would raise when it compiles a kernel. Otherwise nothing.
    """
    archs = (machine.arch.name, *machine.other_archs)
    sources = [shipped / arch for arch in archs if (shipped / arch).is_dir()]
    if machine.arch.vendor != "nvidia" or not sources:
        return {}
    home = environment.get("TRITON_HOME") or environment.get("HOME") or str(Path.home())
    named = Path(environment.get(TRITON_CACHE) or Path(home) / ".triton" / "cache").absolute()
    if all(_copy_triton_entries(source, named) for source in sources):
        return {}
    others = [*_temporary_folders("triton")]
    for own in others:
        if all(_copy_triton_entries(source, own, private=True) for source in sources):
            _note(f"Triton can't write {named}; its cache is {own}")
            return {TRITON_CACHE: str(own)}
    tried = " or ".join(map(str, (named, *others)))
    _note(f"Triton compiles its kernels again: no room in {tried}")
    return {}


def _copy_triton_entries(source: Path, target: Path, *, private: bool = False) -> bool:
    """Copy each entry of a folder to Triton's cache; return False if it can't be written.

    Triton finds an entry by its group file, which has the paths of the other files. It is therefore
    written last, with the paths of this folder. Concurrent processes write the same content (triton
    3.8.0, runtime/cache.py, read 2026-11-25).
    """
    try:
        if private:  # its files are run, so no other user may be able to change them
            make_private_folder(target)
        target.mkdir(parents=True, exist_ok=True)
        if not os.access(target, os.W_OK):
            return False
        for entry in source.iterdir():
            files = {path.name: str(target / entry.name / path.name) for path in entry.iterdir()}
            (metadata,) = (name for name in files if name.endswith(".json"))
            group = target / entry.name / f"__grp__{metadata}"
            if _has_all_files(group):
                continue
            group.parent.mkdir(exist_ok=True)
            for name in files:
                _write_atomically(group.with_name(name), (entry / name).read_bytes())
            _write_atomically(group, json.dumps({"child_paths": files}).encode())
    except OSError:  # not writable, or the disk is full
        return False
    return True


def _has_all_files(group: Path) -> bool:
    """Return whether all files in a group exist; they may not if the cache was moved."""
    try:
        paths = json.loads(group.read_bytes())["child_paths"].values()
        return all(Path(path).exists() for path in paths)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return False


def _write_atomically(path: Path, content: bytes) -> None:
    """Write a file through a temporary one, so that no other process reads a part of it."""
    part = path.with_name(f"tmp.attnimg_{os.getpid()}_{threading.get_ident()}_{path.name}")
    try:
        part.write_bytes(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _note(text: str) -> None:
    """Print a note to stderr, as the entrypoint does."""
    print(f"attnimg: {text}", file=sys.stderr)  # noqa: T201


def main() -> None:
    """Print the variables to set, as shell commands."""
    try:
        settings = settings_for(this_machine(()), os.environ)
    except AttnimgError as error:
        print(error, file=sys.stderr)  # noqa: T201 - stdout is read by the shell
        return
    for name, value in settings.items():
        print(f"export {name}={shlex.quote(value)}")  # noqa: T201 - what this is for


if __name__ == "__main__":
    main()
