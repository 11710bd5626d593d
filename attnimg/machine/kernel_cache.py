"""Make a GPU find the kernels compiled with the image, and the right set of a package's kernels.

A run sets the variables for itself; `python -m attnimg.machine.kernel_cache` prints them as shell
commands, which docker/entrypoint.sh runs for programs that are not attnimg's own. Notes go to
stderr, for the shell reads stdout.

FlashAttention-4 opens a lock file beside each kernel that it looks up: in the image's own folder,
which nobody may write, that would raise inside the attention call. So the folder of this GPU is
copied once to a cache, and two variables name it. Both are read when flash_attn.cute is imported
(flash-attn-4 4.0.0b36, cache_utils.py, read 2026-11-25).

Triton names an entry of its cache by all that it depends on, so entries of several architectures
may be in one folder, and a superfluous one is never loaded. They are copied into the user's cache.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

from attnimg.backends import all_backends, contrary_settings
from attnimg.content_hashes import cache_folder
from attnimg.errors import AttnimgError
from attnimg.facts import Machine
from attnimg.files import make_private_folder
from attnimg.machine.probe import this_machine
from attnimg.machine.shipped_kernels import (
    CACHE_AT,
    CACHE_ON,
    FOLDER,
    TRITON_FOLDER,
    reasons_against_shipped,
    shipped_kernels,
)

TRITON_CACHE = "TRITON_CACHE_DIR"


def use_shipped_kernels(machine: Machine) -> None:
    """Set the variables for this process and its children; call it before flash_attn's import."""
    os.environ.update(settings_for(machine, os.environ))


def settings_for(machine: Machine, environment: Mapping[str, str]) -> dict[str, str]:
    """Copy the kernels that fit, and return the variables to set.

    Raises:
        AttnimgError: the manifest of the image's kernels can't be read.
    """
    settings = variant_settings(machine, environment) | fa4_settings(machine, environment)
    return settings | triton_settings(machine, environment)


def variant_settings(machine: Machine, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that choose a package's kernels for this GPU.

    A variable that is set already stays; a note names a wrong one.
    """
    settings: dict[str, str] = {}
    arch = machine.arch.name
    for backend in all_backends():
        if (variant := backend.variants.get(arch)) is None:
            continue
        for setting in contrary_settings(backend, machine.arch, environment):
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
        machine: its GPU and driver.
        environment: names the cache; what it has on FlashAttention-4's own cache stays.
        shipped: the image's kernels.

    Returns:
        Variable -> value; none where the image has no kernels that fit, or the user chose.

    Raises:
        AttnimgError: the image's manifest can't be read.
    """
    if machine.arch.vendor != "nvidia" or {CACHE_ON, CACHE_AT} & set(environment):
        return {}
    kernels = shipped_kernels(shipped)
    if kernels is None or reasons_against_shipped(kernels, machine):
        return {}
    source = shipped / machine.arch.name
    name = Path(kernels.key) / f"{machine.arch.name}-{_cpu()}"
    # The temporary folder is for a volume whose folders another user made.
    folders = [cache_folder(environment, "flash-attn-4"), *_temporary("flash-attn-4")]
    for folder in folders:
        if _is_copied(source, folder / name):
            return {CACHE_ON: "1", CACHE_AT: str(folder / name)}
    tried = ", ".join(map(str, folders))
    _note(f"FlashAttention-4 compiles its kernels again: no private, writable folder in {tried}")
    return {}


def _temporary(name: str) -> Iterator[Path]:
    """Yield this user's folder of a name in the temporary folder, where there is one."""
    try:
        yield Path(tempfile.gettempdir()) / f"attnimg-{name}-{os.getuid()}"
    except FileNotFoundError:  # there is none that this user may write
        return


def _is_copied(source: Path, target: Path) -> bool:
    """Copy a folder as a whole for this user, while other processes may do the same.

    Returns:
        Whether the copy is there, is writable, and only this user can change it.
    """
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
            for path in source.rglob("*.o"):
                copy = temporary / path.relative_to(source)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)
            try:
                temporary.rename(target)
            except OSError:  # another process was first; its copy is as good
                if not target.is_dir():
                    raise
        # What is there is loaded and run: never from folders that another user can change.
        owners = {folder.stat().st_uid for folder in (target, *target.parents[:2])}
        return owners == {os.getuid()} and os.access(target, os.W_OK)
    except OSError:  # not writable, or no room
        return False
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _cpu(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Return a name for this kind of CPU, by its features, which psutil does not read.

    What FlashAttention-4 adds to its cache is compiled for the CPU it runs on, and no key tells: on
    a volume that several machines share, an older one would die of an illegal instruction.
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
    """Copy the entries for this machine's GPUs to Triton's cache, those that it lacks.

    Returns:
        Another TRITON_CACHE_DIR where this user can't write the one that is set: Triton would raise
        at the first kernel that it does not find there. Otherwise nothing.
    """
    archs = (machine.arch.name, *machine.other_archs)
    sources = [shipped / arch for arch in archs if (shipped / arch).is_dir()]
    if machine.arch.vendor != "nvidia" or not sources:
        return {}
    home = environment.get("TRITON_HOME") or environment.get("HOME") or str(Path.home())
    named = Path(environment.get(TRITON_CACHE) or Path(home) / ".triton" / "cache").absolute()
    if all(_is_merged(source, named) for source in sources):
        return {}
    others = [*_temporary("triton")]
    for own in others:
        # What is there is run: never from a folder that another user can change.
        if _is_private(own) and all(_is_merged(source, own) for source in sources):
            _note(f"Triton can't write {named}; its cache is {own}")
            return {TRITON_CACHE: str(own)}
    tried = " or ".join(map(str, (named, *others)))
    _note(f"Triton compiles its kernels again: no room in {tried}")
    return {}


def _is_private(folder: Path) -> bool:
    """Create a folder, or check an existing one; return whether only this user can write to it."""
    try:
        make_private_folder(folder)
    except OSError:
        return False
    return True


def _is_merged(source: Path, target: Path) -> bool:
    """Copy each entry of a folder to Triton's cache; return False where it can't be written.

    Its group file is what makes Triton see an entry, and names the others by their paths: it is
    written for this folder, and last. Other processes that do the same write the same (triton
    3.8.0, runtime/cache.py, read 2026-11-25).
    """
    try:
        target.mkdir(parents=True, exist_ok=True)
        if not os.access(target, os.W_OK):
            return False
        for entry in source.iterdir():
            files = {path.name: str(target / entry.name / path.name) for path in entry.iterdir()}
            (described,) = (name for name in files if name.endswith(".json"))
            group = target / entry.name / f"__grp__{described}"
            if _is_whole(group):
                continue
            group.parent.mkdir(exist_ok=True)
            for name in files:
                _put(group.with_name(name), (entry / name).read_bytes())
            _put(group, json.dumps({"child_paths": files}).encode())
    except OSError:  # not writable, or no room
        return False
    return True


def _is_whole(group: Path) -> bool:
    """Return whether all files that a group names are there: the cache may have been moved."""
    try:
        paths = json.loads(group.read_bytes())["child_paths"].values()
        return all(Path(path).exists() for path in paths)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return False


def _put(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all."""
    part = path.with_name(f"tmp.attnimg_{os.getpid()}_{threading.get_ident()}_{path.name}")
    try:
        part.write_bytes(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _note(text: str) -> None:
    """Print a note, where the entrypoint's own go."""
    print(f"attnimg: {text}", file=sys.stderr)  # noqa: T201


def main() -> None:
    """Print the variables for the shell that starts a program, if there are any to set."""
    try:
        settings = settings_for(this_machine(()), os.environ)
    except AttnimgError as error:
        print(error, file=sys.stderr)  # noqa: T201 - stdout is read by the shell
        return
    for name, value in settings.items():
        print(f"export {name}={shlex.quote(value)}")  # noqa: T201 - what this is for


if __name__ == "__main__":
    main()
