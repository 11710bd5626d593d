"""Find the attention backends: the modules in this folder, and those of other packages.

A module has BACKEND, or a list BACKENDS. To add a backend, copy `flex_attention.py`, which calls
transformers' function, or `xformers.py`, which calls a kernel itself; fill in its needs and their
sources; then run `make render check`. Another package adds one by an entry point of the group
"attnimg.backends", whose object is a Backend or a list of them.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from dataclasses import replace
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pkgutil import iter_modules
from typing import NamedTuple, get_args

from attnimg.facts import Arch, Backend, LocalKernel, Machine, MaskKind, Needs, Packing, Rank

# The group of entry points by which other packages add backends.
GROUP = "attnimg.backends"

# Each backend is judged for every group of layers, so thousands of them would take minutes.
MOST_ADDED = 200

# org/name, then @revision, then :function. Source: transformers 5.22.2, modeling_utils.py.
HUB_PATH = r"(?!\.)[\w.-]+/(?!\.)[\w.-]+(@[^/:@\s]+)?(:[^/:@\s]+)?"

# The value that turns on the environment variable of a variant; any other value turns it off.
# Source: flash-attn, flash_attn_interface.py:11 (2026-11-25).
_ON = "TRUE"


@cache
def all_backends() -> tuple[Backend, ...]:
    """Return all backends except hub kernels, best general rank first."""
    found = [*_own_backends(), *added_backends().backends]
    return tuple(sorted(found, key=lambda backend: backend.rank))


def _own_backends() -> tuple[Backend, ...]:
    found: list[Backend] = []
    for name in (module.name for module in iter_modules(__path__)):
        if name[0] != "_" and name != "hub":
            module = import_module(f"{__name__}.{name}")
            found += module.BACKENDS if hasattr(module, "BACKENDS") else [module.BACKEND]
    return tuple(found)


class AddedBackends(NamedTuple):
    """The backends of other packages.

    Attributes:
        backends: those that can be used.
        problems: a sentence about each entry point that can't be used.
    """

    backends: tuple[Backend, ...]
    problems: tuple[str, ...]


@cache
def added_backends() -> AddedBackends:
    """Load the entry points of the group "attnimg.backends".

    An entry point that can't be used must not stop a run that does not need it, so it is reported
    as a warning.
    """
    backends: dict[str, Backend] = {}
    problems = []
    taken = {backend.name for backend in _own_backends()} | {"auto"}
    applied = {backend.applied_as for backend in _own_backends()}
    for point in sorted(entry_points(group=GROUP), key=lambda point: (point.name, point.value)):
        try:
            loaded = point.load()
            given = loaded if isinstance(loaded, list | tuple) else [loaded]
            if len(backends) + len(given) > MOST_ADDED:
                raise ValueError(
                    f"found {len(backends) + len(given):,} backends of other packages, needed at "
                    f"most {MOST_ADDED}"
                )
            for backend in given:
                others = {other.applied_as for other in backends.values()}
                _require_usable(backend, taken | backends.keys(), applied | others)
                source = point.module.partition(".")[0]
                backends[backend.name] = replace(backend, added_by=source)
        # The code of another package may raise anything, or end the process, as one does that finds
        # no GPU. The reason is kept and shown.
        except (Exception, SystemExit) as error:
            text = " ".join(str(error).split())
            problems.append(f"{point.name} = {point.value}: {type(error).__name__}: {text}")
    return AddedBackends(tuple(backends.values()), tuple(problems))


def _require_usable(
    backend: object, taken: Container[str], taken_applied: Container[str | None]
) -> None:
    """Raise unless an object of another package is a backend that can be applied.

    Args:
        backend: the object.
        taken: the names of other backends.
        taken_applied: their names in transformers: a second one would replace the first.
    """
    if not isinstance(backend, Backend):
        raise TypeError(f"found {type(backend).__name__}, needed attnimg.facts.Backend")
    if backend.name in taken:
        raise ValueError(f"found the name {backend.name}, which another backend has already")
    if re.fullmatch(r"[a-z][a-z0-9_]*", backend.name) is None:
        raise ValueError(f"found the name {backend.name!r}, needed a-z, 0-9 and _")
    applied = backend.applied_as or ""
    # transformers treats the first three specially; attnimg makes names of the others.
    words = ("flash", "sdpa", "flex", "attnimg_direct", "attnimg_router")
    if re.fullmatch(r"attnimg_[a-z0-9_]+", applied) is None or any(w in applied for w in words):
        raise ValueError(
            f"found applied_as {backend.applied_as!r}, needed a name of a-z, 0-9 and _ that begins "
            f"with attnimg_ and has none of {', '.join(words)} in it"
        )
    if applied in taken_applied:
        raise ValueError(f"another backend has applied_as {applied!r} already")
    if not callable(backend.load_function):
        raise TypeError("load_function is missing, or is no function")
    if not isinstance(backend.needs, Needs) or not all(isinstance(r, Rank) for r in backend.ranks):
        raise TypeError("needs is no attnimg.facts.Needs, or ranks has other things than Rank")
    ranks = (backend.rank, *(one.rank for one in backend.ranks))
    if not all(isinstance(rank, int) for rank in ranks):
        raise TypeError("a rank is not a whole number")
    for name, known in (("packing", get_args(Packing)), ("mask", get_args(MaskKind))):
        if (found := getattr(backend, name)) not in known:
            raise ValueError(f"found {name} {found!r}, needed one of {', '.join(known)}")


def is_hub_path(name: str) -> bool:
    """Return whether `name` has the form org/name[@rev][:fn]."""
    return re.fullmatch(HUB_PATH, name, re.ASCII) is not None


def hub_repo_name(path: str) -> str:
    """Return the org/name of a hub path, without its @rev and :fn."""
    return re.split("[@:]", path, maxsplit=1)[0]


def find_backend(name: str) -> Backend | None:
    """Return the backend that a config names; None for "auto" and for an unknown name."""
    for backend in all_backends():
        if backend.name == name:
            return backend
    if not is_hub_path(name):
        return None
    hub = import_module(f"{__name__}.hub")
    backend = hub.backend_for(name, hub_repo_name(name))
    assert isinstance(backend, Backend)
    return backend


def local_kernel_repo(
    backend: Backend, *, installed: Container[str], local_repos: Container[str]
) -> str | None:
    """Return the hub kernel that a backend runs from a folder in LOCAL_KERNELS; None for none.

    A hub kernel that the config names is loaded from that folder. A backend with a package uses the
    folder only if the package is not installed.

    Args:
        backend: the backend to run.
        installed: the installed distributions.
        local_repos: org/name of the hub kernels in LOCAL_KERNELS.
    """
    repo, packages = backend.hub_repo, [package for package, _, _ in backend.needs.packages]
    if repo is None or repo not in local_repos:
        return None
    named = repo == hub_repo_name(backend.name)
    return repo if named or not any(package in installed for package in packages) else None


def local_kernel(backend: Backend, machine: Machine) -> LocalKernel | None:
    """Return the folder in LOCAL_KERNELS that a backend uses on a machine; None for none."""
    local = {kernel.repo: kernel for kernel in machine.local_kernels}
    repo = local_kernel_repo(backend, installed=machine.packages or {}, local_repos=local)
    return None if repo is None else local[repo]


def kernel_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment variables that are set and select kernels of a package."""
    variants = (variant for backend in all_backends() for variant in backend.variants.values())
    names = {name for variant in variants for name in variant.variables}
    names |= {name for backend in all_backends() for name in backend.for_process}
    return {name: environment[name] for name in sorted(names) if name in environment}


def conflicting_variables(backend: Backend, arch: Arch, variables: Mapping[str, str]) -> list[str]:
    """Return the variables that select kernels other than those that an architecture needs.

    Args:
        backend: its variants name the variables; "TRUE" turns each on, any other value off.
        arch: the architecture.
        variables: the environment variables that are set.

    Returns:
        NAME=value for each such variable.
    """
    variant = backend.variants.get(arch.name)
    return [
        f"{name}={variables[name]}"
        for name, value in (variant.variables if variant else {}).items()
        if name in variables and (variables[name] == _ON) != (value == _ON)
    ]


def runs_on(needs: Needs, arch: Arch) -> bool:
    """Return whether a backend has machine code for an architecture."""
    if arch.vendor not in needs.vendors:
        return False
    if arch.vendor == "amd":
        return not needs.gfx or arch.name in needs.gfx
    if arch.capability is None:
        return True
    if needs.capabilities:
        return arch.capability in needs.capabilities
    low, high = needs.capability_min or (0, 0), needs.capability_max or (999, 0)
    return low <= arch.capability <= high


def arch_mismatch(name: str, needs: Needs, arch: Arch) -> str:
    """Return what a backend, by its name or "", needs and what was found instead."""
    if arch.vendor == "cpu":
        return f"{name} needs a GPU of {needs.arch_text}; found none (CPU)".lstrip()
    return f"found {arch.name}, {name} needs {needs.arch_text}".replace("  ", " ")


def arch_code(needs: Needs, arch: Arch) -> str:
    """Return the error code for an architecture that a backend does not run on."""
    newer = (
        arch.capability is not None
        and needs.capability_max is not None
        and arch.capability > needs.capability_max
    )
    return "arch-mismatch" if newer else needs.arch_code
