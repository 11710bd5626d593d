"""Prove backends for a run: from the disk where a proof is kept, else in a child process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from attnimg.backends import variables_that_choose
from attnimg.context import context_of
from attnimg.facts import Backend, Machine, Problem, Proof
from attnimg.prove import cache
from attnimg.prove.geometry import geometries_of, has_dense_entry, local_kernel_of
from attnimg.prove.runner import Candidate, run

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
            folder=cache.cache_folder(environment),
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
    versions = _versions(backends)
    keys = [
        cache.key_of(
            candidate,
            machine=machine,
            versions=versions[backend.name],
            local=local_kernel_of(backend, machine),
            variables=variables_that_choose(setting.environment),
        )
        for backend, candidate in zip(backends, candidates, strict=True)
    ]
    proofs = {}
    if folder is not None:
        kept = {key: cache.read(folder, key, say=say) for key in keys}
        proofs = {key: proof for key, proof in kept.items() if proof is not None}
    missing = {
        key: candidate for key, candidate in zip(keys, candidates, strict=True) if key not in proofs
    }
    if missing:
        device = "cpu" if machine.arch.vendor == "cpu" else "cuda"
        found = run(list(missing.values()), device=device, timeout_s=timeout_s, say=say)
        for key, proof in zip(missing, found, strict=True):
            proofs[key] = proof
            if folder is not None:
                cache.write(folder, key, proof, say=say)
    return [proofs[key] for key in keys]


def _candidate(backend: Backend, problem: Problem, setting: Setting, *, routed: bool) -> Candidate:
    geometries = geometries_of(
        problem,
        context_of(problem, backend),
        dense=not problem.packing or has_dense_entry(backend, setting.machine),
        deterministic=setting.environment.get("FLASH_ATTENTION_DETERMINISTIC") == "1",
        every_length=backend.unread or local_kernel_of(backend, setting.machine) is not None,
    )
    return Candidate(
        backend=backend.name, geometries=geometries, trusted=problem.trusted, routed=routed
    )


def _versions(backends: Sequence[Backend]) -> dict[str, dict[str, str]]:
    """Give the versions that each backend's proof depends on; "" for what is not installed."""
    needed = {
        backend.name: [*_LIBRARIES, *(package for package, _, _ in backend.needs.packages)]
        for backend in backends
    }
    installed = {
        name: _version(name) for name in {name for names in needed.values() for name in names}
    }
    return {backend: {name: installed[name] for name in names} for backend, names in needed.items()}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""
