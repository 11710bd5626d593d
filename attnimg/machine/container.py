"""Choose the folders and the GPU driver's files that this process uses, in any container runtime.

Docker, Podman, Kubernetes, enroot and Apptainer differ in the user, in the folders that are
writable and in the place of the driver, and most of them can bypass an image's entrypoint. Nothing
is therefore decided there. `attnimg` applies these settings when it starts; in an image,
attnimg_container.pth applies them at the start of every other Python program, and main() prints
them for docker/entrypoint.sh. They depend on the environment, the user and the file system only, so
that `docker exec` and a HEALTHCHECK get the same. docs/runtimes.md has the rules. With the folders,
other programs get the variables of OpenMP's threads (threads.py).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from attnimg.machine.threads import SET_HERE, THREAD_VARIABLES, set_threads, set_without_load

CACHE = "ATTNIMG_CACHE"
# Set with the folder that could not be used, so that a later process can still report it.
INSTEAD_OF = "ATTNIMG_CACHE_INSTEAD_OF"
# Set with what the variables were set for: the user, the CPUs of the mask, and LOCAL_WORLD_SIZE. A
# program with the same need not set them again (docker/image_files.py).
SET_FOR = "ATTNIMG_SET_FOR"
# Variables of caches -> the folder's name. A user has a folder NAME-UID of each: Hugging Face's
# library and compilers fail on files of another user, and what they load is run.
CACHES = {
    "HF_HOME": "huggingface",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TRITON_CACHE_DIR": "triton",
    "CUDA_CACHE_PATH": "cuda",
    "XDG_CACHE_HOME": "xdg",
    "MPLCONFIGDIR": "matplotlib",
}

# Where a runtime mounts the driver without adding it to the loader's folders. GKE's device plugin
# mounts /usr/local/nvidia; `apptainer --nv` mounts libraries in /.singularity.d/libs.
# Source: container-engine-accelerators 992db81, cmd/nvidia_gpu/nvidia_gpu.go, container-path;
# apptainer 917d665, action_script.sh (read 2026-11-27).
DRIVER_PROGRAMS = ("/usr/local/nvidia/bin",)
DRIVER_LIBRARIES = ("/usr/local/nvidia/lib64", "/usr/local/nvidia/lib", "/.singularity.d/libs")
# Folders that the dynamic linker searches on Debian and on other distributions, below the root.
# NVIDIA's runtimes mount the driver's libraries there, and run ldconfig.
LIBRARY_FOLDERS = ("usr/lib/x86_64-linux-gnu", "usr/lib/aarch64-linux-gnu", "usr/lib64", "usr/lib")
LIBCUDA = "libcuda.so.1"


# No dataclass: every Python of an image imports this module, and dataclasses takes as long as it.
class FolderSettings(NamedTuple):
    """What a process has to set.

    Attributes:
        variables: variables to set.
        folders: folders to create, which only this user may write to.
        tried: the folders that can't be used, if there is none for caches; otherwise empty.
    """

    variables: Mapping[str, str]
    folders: tuple[Path, ...] = ()
    tried: tuple[Path, ...] = ()


def choose_folders(
    environment: Mapping[str, str],
    *,
    uid: int,
    working_folder: Path,
    tmp: Path = Path("/tmp"),
    shm: Path = Path("/dev/shm"),
) -> FolderSettings:
    """Return the variables of caches, HOME and TMPDIR to set, and the folders to create.

    A variable of a cache that is set is kept. Relative paths, and ~ in ATTNIMG_CACHE, become
    absolute: a child process may have another working folder.

    Args:
        environment: the environment variables.
        uid: the user.
        working_folder: the current one.
        tmp: the folder for temporary files.
        shm: the folder of shared memory.
    """
    home, given = environment.get("HOME"), environment.get(CACHE)
    named = _absolute(given, home, working_folder) if given else None
    tmpdir = environment.get("TMPDIR")
    # Folders in which programs have their caches by default. HOME of an image is in its cache
    # volume: it is no better than the volume.
    standard = []
    if not named and (xdg := environment.get("XDG_CACHE_HOME")):
        standard.append(working_folder / xdg / "attnimg")
    if home and not (named and Path(home).is_relative_to(named)):
        standard.append(working_folder / home / ".cache" / "attnimg")
    candidates = [
        *([named] if named else []),
        *standard,
        working_folder / ".cache",
        *([working_folder / tmpdir / f"attnimg-{uid}"] if tmpdir else []),
        tmp / f"attnimg-{uid}",
        shm / f"attnimg-{uid}",
    ]
    base = next((path for path in candidates if why_unusable(path, uid) is None), None)
    if base is None:
        return FolderSettings({}, tried=tuple(candidates))
    variables: dict[str, str] = {}
    folders = []

    def use(variable: str, name: str, *, wanted: bool) -> None:
        folder = _own_folder(base, name, uid)
        if wanted:
            variables[variable] = str(folder)
        if variables.get(variable, environment.get(variable)) == str(folder):
            folders.append(folder)

    if base not in ([named] if named else standard):
        wanted = named or Path(home or "/") / ".cache"
        variables |= {CACHE: str(base), INSTEAD_OF: str(wanted)}
    elif named and not Path(given or "").is_absolute():
        variables[CACHE] = str(named)
    for variable, name in CACHES.items():
        # torch's default is in the temporary folder under USER, which is the same for all users of
        # an image.
        default = base in standard and (not named or variable != "TORCHINDUCTOR_CACHE_DIR")
        use(variable, name, wanted=variable not in environment and not default)
    use("HOME", "home", wanted=not home or not _is_home(Path(home), base, uid))
    if "HOME" not in variables and home and Path(home).is_relative_to(base):
        folders.append(Path(home))
    usable = can_write(working_folder / tmpdir if tmpdir else tmp)
    if tmpdir and not usable and can_write(tmp):
        variables["TMPDIR"], usable = str(tmp), True
    use("TMPDIR", "tmp", wanted=not usable)
    return FolderSettings(variables=variables, folders=tuple(folders))


def _absolute(text: str, home: str | None, working_folder: Path) -> Path:
    """Return an absolute path; ~ is HOME, as no shell has replaced it in `docker run -e`."""
    name, _, rest = text.partition("/")
    return working_folder / (Path(home) / rest if name == "~" and home else text)


def _is_home(home: Path, base: Path, uid: int) -> bool:
    """Return whether this user can use HOME; in the volume, it must not be another user's."""
    if home.is_relative_to(base) and os.path.lexists(home):
        return _is_own(home, uid)
    return can_write(home)


def _own_folder(base: Path, name: str, uid: int) -> Path:
    """Return base/NAME-UID, or base/NAME if that is this user's: earlier images wrote there."""
    old = base / name
    return old if os.path.lexists(old) and _is_own(old, uid) else base / f"{name}-{uid}"


def _is_own(path: Path, uid: int) -> bool:
    """Return whether a path is a folder of this user that not everybody can write to."""
    try:
        found = path.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == uid and not found.st_mode & stat.S_IWOTH


def why_unusable(base: Path, uid: int) -> str | None:
    """Return why a folder can't have the caches of this user; None if it can.

    Everybody may create folders in an image's /cache, also with another user's number.
    """
    if not can_write(base):
        return "is not writable"
    names = [base] if base.name.endswith(f"-{uid}") else []
    names += [base / f"{name}-{uid}" for name in (*CACHES.values(), "home", "tmp")]
    for path in names:
        if os.path.lexists(path) and not _is_own(path, uid):
            return f"has {path.name}, a folder of another user or one that all may write to,"
    return None


def can_write(path: Path) -> bool:
    """Return whether this user can write to a folder, or create it."""
    try:
        nearest = nearest_existing(path)
        longest = os.pathconf(nearest, "PC_NAME_MAX")
        missing = path.absolute().relative_to(nearest).parts
        return (
            nearest.is_dir()
            and os.access(nearest, os.W_OK | os.X_OK)
            and all(len(os.fsencode(name)) <= longest for name in missing)
        )
    except OSError:  # a name that is too long, or a folder that this user can't read
        return False


def nearest_existing(path: Path) -> Path:
    """Return a path, or the nearest folder above it that exists.

    Raises:
        OSError: a name that is too long, or a folder that this user can't read.
    """
    nearest = path.absolute()
    while True:
        try:
            nearest.lstat()
        except (FileNotFoundError, NotADirectoryError):
            nearest = nearest.parent
        else:
            return nearest


def replaced_cache(environment: Mapping[str, str]) -> str | None:
    """Return a sentence on the cache folder that is used instead of another; None otherwise."""
    if (named := environment.get(INSTEAD_OF)) is None:
        return None
    why = why_unusable(Path(named), os.geteuid()) or "was not usable"
    return f"{named} {why} for user {os.geteuid()}; caches are in {environment.get(CACHE)}"


class Runtime(NamedTuple):
    """A program that starts containers.

    Attributes:
        name: its name.
        gpu: what makes the GPU visible.
        volume: what gives a user a cache folder.
    """

    name: str
    gpu: str
    volume: str


DOCKER = Runtime(
    name="Docker",
    gpu="start the container with --gpus all (AMD: --device /dev/kfd --device /dev/dri)",
    volume="mount a volume that this user may write to: -v cache:/cache",
)
PODMAN = Runtime(
    name="Podman",
    gpu="run nvidia-ctk cdi generate on the host, and start the container with "
    "--device nvidia.com/gpu=all (AMD: --device /dev/kfd --device /dev/dri)",
    volume="mount a volume that this user may write to: -v cache:/cache",
)
APPTAINER = Runtime(
    name="Apptainer",
    gpu="start it with --nv (AMD: --rocm)",
    volume="bind a folder of yours: --bind $HOME/attnimg-cache:/cache",
)
KUBERNETES = Runtime(
    name="Kubernetes",
    gpu="request nvidia.com/gpu in resources.limits of the container",
    volume="mount a volume at /cache, an emptyDir for example, with fsGroup in securityContext",
)
ENROOT = Runtime(
    name="enroot",
    gpu="request GPUs of Slurm (--gpus); the node needs enroot's hook 98-nvidia.sh",
    volume="mount a folder of yours: --container-mounts=$HOME/attnimg-cache:/cache",
)


def find_runtime(environment: Mapping[str, str], *, root: Path = Path("/")) -> Runtime | None:
    """Return what started the container of this process, by the marks that it leaves.

    enroot leaves none: an image in a Slurm job without another mark is taken for one of enroot's.
    """
    if "KUBERNETES_SERVICE_HOST" in environment:
        return KUBERNETES
    if {"APPTAINER_CONTAINER", "SINGULARITY_CONTAINER"} & set(environment):
        return APPTAINER
    if os.path.lexists(root / "run" / ".containerenv"):
        return PODMAN
    if os.path.lexists(root / ".dockerenv"):
        return DOCKER
    if "SLURM_JOB_ID" in environment and os.path.lexists(root / "opt" / "attnimg"):
        return ENROOT
    return None


def find_driver_program(name: str, path: str | None = None) -> str | None:
    """Return the path of a program of the driver, on PATH or where runtimes mount it."""
    import shutil  # not at each start of Python

    path = os.environ.get("PATH", os.defpath) if path is None else path
    return shutil.which(name, path=os.pathsep.join([path, *DRIVER_PROGRAMS]))


def library_path(environment: Mapping[str, str], *, root: Path = Path("/")) -> str | None:
    """Return LD_LIBRARY_PATH with the folder of libcuda; None if the loader finds it or none is.

    Args:
        environment: the environment variables.
        root: the root of the file system.
    """

    def having(folders: Iterable[str]) -> list[str]:
        # os.path, as Path.exists raises in a folder that this user can't read.
        return [name for name in folders if os.path.exists(root / name.lstrip("/") / LIBCUDA)]  # noqa: PTH110

    listed = [name for name in environment.get("LD_LIBRARY_PATH", "").split(":") if name]
    if having(listed) or having(LIBRARY_FOLDERS):
        return None
    found = having(DRIVER_LIBRARIES)
    return ":".join([*listed, *found]) if found else None


def apply(*, create: bool) -> FolderSettings:
    """Set the variables for this process and its children, and return the settings.

    Args:
        create: create all folders, so that only this user can write to them; otherwise only a
            temporary folder, as the programs that use the others create them.
    """
    settings = choose_folders(os.environ, uid=os.geteuid(), working_folder=working_folder())
    os.environ.update(settings.variables)
    for folder in settings.folders:
        if create or str(folder) == os.environ.get("TMPDIR"):
            # A full disk is reported by whoever writes to the folder.
            with suppress(OSError):
                folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                folder.mkdir(mode=0o700, exist_ok=True)
                # A program with another umask may have created it.
                if folder.stat().st_mode & stat.S_IWGRP:
                    folder.chmod(0o700)
    return settings


def working_folder() -> Path:
    """Return the current folder, or / if it was removed or can't be read."""
    try:
        return Path.cwd()
    except OSError:
        return Path("/")


def set_up_program() -> None:
    """Set the variables for a program that is not attnimg: folders, and OpenMP's threads."""
    apply(create=False)
    set_without_load(os.environ)
    _mark()


def _mark() -> None:
    processes = os.environ.get("LOCAL_WORLD_SIZE", "")
    os.environ[SET_FOR] = f"{os.geteuid()} {len(os.sched_getaffinity(0))} {processes}"


def require_folders(environment: Mapping[str, str]) -> None:
    """Raise unless there is a folder for caches and temporary files.

    Raises:
        AttnimgError: code no-folder.
    """
    if tried := unusable_folders(environment):
        from attnimg.errors import AttnimgError  # not at each start of Python

        raise AttnimgError(
            "there is no folder for caches and temporary files",
            why="\n".join(tried),
            do=(find_runtime(environment) or DOCKER).volume,
            code="no-folder",
        )


def unusable_folders(environment: Mapping[str, str]) -> tuple[str, ...]:
    """Return why each folder can't be used; empty if one can."""
    uid = os.geteuid()
    tried = choose_folders(environment, uid=uid, working_folder=working_folder()).tried
    return tuple(f"{path} {why_unusable(path, uid)} for user {uid}" for path in tried)


def main() -> None:
    """Print the variables to set as shell commands, and a note to stderr."""
    import shlex
    import sys

    apply(create=True)
    set_threads(os.environ)
    _mark()
    if (path := library_path(os.environ)) is not None:
        os.environ["LD_LIBRARY_PATH"] = path
    # All of them: attnimg_container.pth has set them for this process already.
    ours = (CACHE, INSTEAD_OF, SET_FOR, SET_HERE, *THREAD_VARIABLES, *CACHES)
    for name in (*ours, "HOME", "TMPDIR", "LD_LIBRARY_PATH"):
        if name in os.environ:
            print(f"export {name}={shlex.quote(os.environ[name])}")  # noqa: T201 - for the shell
    if (note := replaced_cache(os.environ)) is not None:
        print(f"attnimg: {note}", file=sys.stderr)  # noqa: T201 - stdout is read by the shell
