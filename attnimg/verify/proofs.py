"""Prove backends for a run: from the disk where a proof is kept, else in a child process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from attnimg.backends import local_kernel, variables_that_choose
from attnimg.backends._loading import hub_folder
from attnimg.content_hashes import ContentHashes, cache_folder
from attnimg.context import context_of
from attnimg.facts import Backend, Machine, Problem, Proof
from attnimg.verify import cache
from attnimg.verify.geometry import geometries_of, has_dense_entry
from attnimg.verify.runner import Candidate, run

# Of these a proof depends besides the packages of the backend itself.
_LIBRARIES = ("torch", "transformers", "kernels", "triton")


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """Where and for what proofs are made.

    Attributes:
        machine: this one.
        environment: os.environ; ATTNIMG_CACHE, FLASH_ATTENTION_DETERMINISTIC and what a backend's
            variants name count.
        folder: where proofs are kept; None to keep none.
    """

    machine: Machine
    environment: Mapping[str, str]
    folder: Path | None

    @staticmethod
    def here(machine: Machine, environment: Mapping[str, str]) -> Setting:
        """Give the setting of this process."""
        return Setting(
            machine=machine,
            environment=environment,
            folder=cache_folder(environment),
        )


def prove(
    backends: Sequence[Backend],
    problem: Problem,
    *,
    setting: Setting,
    say: Callable[[str], None],
    routed: bool = False,
    timeout_s: float | None = None,
) -> list[Proof]:
    """Prove backends on the geometry of a problem.

    Args:
        backends: what to prove; each must fit the machine.
        problem: what the run has to do.
        setting: where.
        say: told what is run, and what is odd about the cache.
        routed: whether a router calls them.
        timeout_s: seconds for one backend; None for the device's default.

    Returns:
        A proof for each backend, in the same order. What a kernel does is never raised here.
    """
    machine, folder = setting.machine, setting.folder
    candidates = [_candidate(backend, problem, setting, routed=routed) for backend in backends]
    keys = _keys(backends, candidates, setting=setting)
    proofs: dict[int, Proof] = {}
    for place, key in enumerate(keys):
        if folder is not None and key is not None:
            kept = cache.read(folder, key, backend=backends[place], say=say)
            if kept is not None:
                proofs[place] = kept
    missing = [place for place in range(len(backends)) if place not in proofs]
    if missing:
        device = "cpu" if machine.arch.vendor == "cpu" else "cuda"
        asked = [candidates[place] for place in missing]
        proofs |= zip(missing, run(asked, device=device, timeout_s=timeout_s, say=say), strict=True)
        if folder is not None:
            # Kernels downloaded meanwhile have a key now; files changed meanwhile were not proven.
            after = _keys(backends, candidates, setting=setting)
            for place in missing:
                key = after[place]
                if key is not None and keys[place] in (None, key):
                    cache.write(folder, key, proofs[place], say=say)
    return [proofs[place] for place in range(len(backends))]


def _keys(
    backends: Sequence[Backend], candidates: Sequence[Candidate], *, setting: Setting
) -> list[str | None]:
    """Return the key of each proof; None where the kernel's files can't be read."""
    if setting.folder is None:
        return [None] * len(backends)
    hashes = ContentHashes(setting.folder)
    keys: list[str | None] = []
    for backend, candidate in zip(backends, candidates, strict=True):
        try:
            content = _content(
                backend, machine=setting.machine, trusted=candidate.trusted, hashes=hashes
            )
        except OSError:
            keys.append(None)
            continue
        keys.append(
            cache.key_of(
                candidate,
                machine=setting.machine,
                versions=_versions(backend),
                content=content,
                variables=variables_that_choose(setting.environment),
            )
        )
    hashes.save()
    return keys


def content_of(backend: Backend, *, setting: Setting, trusted: bool) -> dict[str, str] | None:
    """Return hashes of all files that compute a backend's attention; None where some are unknown.

    Args:
        backend: one that fits the machine.
        setting: its folder has the cache of file hashes.
        trusted: whether the user set trust_remote_code.

    Returns:
        One hash for each kind of file: "attnimg", and "torch", "kernel" or names of packages.
    """
    hashes = ContentHashes(setting.folder)
    try:
        found = _content(backend, machine=setting.machine, trusted=trusted, hashes=hashes)
    except OSError:
        return None
    hashes.save()
    return found


def _content(
    backend: Backend, *, machine: Machine, trusted: bool, hashes: ContentHashes
) -> dict[str, str]:
    """Return the hashes of all files that compute a backend's attention.

    Raises:
        OSError: some of them are not known, or can't be read.
    """
    content = {"attnimg": hashes.of_folder(Path(__file__).parents[1])}
    packages = [package for package, _, _ in backend.needs.packages]
    for package in packages:
        found = hashes.of_package(package)
        if found is None:
            raise OSError(f"{package} does not list its files")
        content[package] = found
    if (local := local_kernel(backend, machine)) is not None:
        content["kernel"] = hashes.of_folder(Path(local.path))
    elif backend.hub_repo is not None and backend.name.startswith(backend.hub_repo):
        content["kernel"] = hashes.of_folder(hub_folder(backend.name, trusted=trusted))
    elif not packages:
        content["torch"] = hashes.of_torch()
    return content


def _candidate(backend: Backend, problem: Problem, setting: Setting, *, routed: bool) -> Candidate:
    geometries = geometries_of(
        problem,
        context_of(problem, backend),
        dense=not problem.packing or has_dense_entry(backend, setting.machine),
        deterministic=setting.environment.get("FLASH_ATTENTION_DETERMINISTIC") == "1",
        every_length=backend.unreviewed or local_kernel(backend, setting.machine) is not None,
    )
    return Candidate(
        backend=backend.name, geometries=geometries, trusted=problem.trusted, routed=routed
    )


def _versions(backend: Backend) -> dict[str, str]:
    """Return the versions that a backend's proof depends on; "" for what is not installed."""
    names = [*_LIBRARIES, *(package for package, _, _ in backend.needs.packages)]
    return {name: _version(name) for name in names}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""
