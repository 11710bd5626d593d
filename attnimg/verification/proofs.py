"""Prove backends for a run: read cached proofs, and make missing ones in a child process."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path

from attnimg.backends import kernel_variables, local_kernel
from attnimg.backends._loading import hub_folder
from attnimg.backends.flash_attention_2 import DENSE
from attnimg.context import build_context
from attnimg.distributions import version
from attnimg.facts import Backend, Machine
from attnimg.files import CachedHasher, cache_folder, read_checked, write_checked
from attnimg.run_facts import Geometry, LayerGroup, Problem, Proof, RunContext
from attnimg.selection.judge import with_effective_windows
from attnimg.verification.runner import Candidate, proof_from_json, run

# Packages that a proof depends on, besides those of the backend itself.
_LIBRARIES = ("torch", "transformers", "kernels", "triton")


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """The machine and environment that proofs are made for, and the cache.

    Attributes:
        machine: this machine.
        environment: os.environ; only ATTNIMG_CACHE, FLASH_ATTENTION_DETERMINISTIC and the variables
            in a backend's variants are used.
        folder: the cache of proofs; None for no cache.
    """

    machine: Machine
    environment: Mapping[str, str]
    folder: Path | None

    @staticmethod
    def here(machine: Machine, environment: Mapping[str, str]) -> Setting:
        """Return the setting of this process."""
        folder = cache_folder(environment)
        return Setting(machine=machine, environment=environment, folder=folder)


def prove(
    backends: Sequence[Backend],
    problem: Problem,
    *,
    setting: Setting,
    log: Callable[[str], None],
    routed: bool = False,
    timeout_s: float | None = None,
) -> list[Proof]:
    """Prove backends on the geometry of a problem.

    Args:
        backends: the backends to prove; each must fit the machine.
        problem: what attention has to do in the run.
        setting: the machine, the environment and the cache.
        log: called with each progress line, and with notes on unusable files of the cache.
        routed: whether a router calls them.
        timeout_s: seconds for one backend; None for the device's default.

    Returns:
        A proof for each backend, in the same order. An error of a kernel is a reason in its proof.
    """
    candidates = [_candidate(backend, problem, setting, routed=routed) for backend in backends]
    pairs = list(zip(backends, candidates, strict=True))
    return prove_candidates(
        candidates,
        keys=[partial(_key, backend, candidate, setting) for backend, candidate in pairs],
        bounded=[backend.k_forward is not None for backend in backends],
        setting=setting,
        log=log,
        timeout_s=timeout_s,
    )


def prove_candidates(
    candidates: Sequence[Candidate],
    *,
    keys: Sequence[Callable[[CachedHasher], str]],
    bounded: Sequence[bool],
    setting: Setting,
    log: Callable[[str], None],
    timeout_s: float | None = None,
) -> list[Proof]:
    """Read the proofs of candidates from the cache, and make the missing ones in a child process.

    Args:
        candidates: what to prove.
        keys: for each, a function that returns the key of its proof, or raises OSError where its
            files can't be read.
        bounded: for each, whether there is a bound for every figure.
        setting: the machine, the environment and the cache.
        log: called with each progress line, and with notes on unusable files of the cache.
        timeout_s: seconds for one candidate; None for the device's default.

    Returns:
        A proof for each candidate, in the same order.
    """
    folder = setting.folder
    before = _find_keys(keys, folder)
    proofs: dict[int, Proof] = {}
    for place, key in enumerate(before):
        if folder is not None and key is not None:
            name, has_bounds = candidates[place].backend, bounded[place]
            cached = read(folder, key, name=name, has_bounds=has_bounds, log=log)
            if cached is not None:
                proofs[place] = cached
    missing = [place for place in range(len(candidates)) if place not in proofs]
    if missing:
        device = "cpu" if setting.machine.arch.vendor == "cpu" else "cuda"
        left = [candidates[place] for place in missing]
        proofs |= zip(missing, run(left, device=device, timeout_s=timeout_s, log=log), strict=True)
        # Kernels that were downloaded by the proof have a key now. Where files changed during the
        # proof, it is not written.
        after = _find_keys(keys, folder)
        for place in missing:
            key = after[place]
            if folder is not None and key is not None and before[place] in (None, key):
                write(folder, key, proofs[place], log=log)
    return [proofs[place] for place in range(len(candidates))]


def _find_keys(
    keys: Sequence[Callable[[CachedHasher], str]], folder: Path | None
) -> list[str | None]:
    """Return the key of each proof; None without a cache, or where files can't be read."""
    if folder is None:
        return [None] * len(keys)
    hashes = CachedHasher(folder)
    found: list[str | None] = []
    for key in keys:
        try:
            found.append(key(hashes))
        except OSError:
            found.append(None)
    hashes.save()
    return found


def _key(backend: Backend, candidate: Candidate, setting: Setting, hashes: CachedHasher) -> str:
    machine, trusted = setting.machine, candidate.trusted
    return proof_key(
        candidate,
        machine=machine,
        versions=versions_of(package for package, _, _ in backend.needs.packages),
        content=_content(backend, machine=machine, trusted=trusted, hashes=hashes),
        variables=kernel_variables(setting.environment),
    )


def hash_files(backend: Backend, *, setting: Setting, trusted: bool) -> dict[str, str] | None:
    """Return hashes of all files that compute a backend's attention; None where some are unknown.

    Args:
        backend: a backend that fits the machine.
        setting: its folder also has the cache of file hashes.
        trusted: whether the user set trust_remote_code.

    Returns:
        One hash for each kind of file: "attnimg", and "torch", "kernel" or names of packages.
    """
    hashes = CachedHasher(setting.folder)
    try:
        found = _content(backend, machine=setting.machine, trusted=trusted, hashes=hashes)
    except OSError:
        return None
    hashes.save()
    return found


def _content(
    backend: Backend, *, machine: Machine, trusted: bool, hashes: CachedHasher
) -> dict[str, str]:
    """Return the hashes of all files that compute a backend's attention.

    Raises:
        OSError: some of them are not known, or can't be read.
    """
    content = {"attnimg": hashes.hash_folder(Path(__file__).parents[1])}
    packages = [package for package, _, _ in backend.needs.packages]
    for package in packages:
        found = hashes.hash_package(package)
        if found is None:
            raise OSError(f"{package} does not list its files")
        content[package] = found
    if backend.added_by is not None:
        content[backend.added_by] = hashes.hash_module(backend.added_by)
        content["torch"] = hashes.hash_torch()
    if (local := local_kernel(backend, machine)) is not None:
        content["kernel"] = hashes.hash_folder(Path(local.path))
    elif backend.hub_repo is not None and backend.name.startswith(backend.hub_repo):
        content["kernel"] = hashes.hash_folder(hub_folder(backend.name, trusted=trusted))
    elif not packages and backend.added_by is None:
        content["torch"] = hashes.hash_torch()
    return content


def _candidate(backend: Backend, problem: Problem, setting: Setting, *, routed: bool) -> Candidate:
    geometries = list_geometries(
        problem,
        build_context(problem, backend),
        dense=not problem.packing or has_dense_function(backend, setting.machine),
        deterministic=setting.environment.get("FLASH_ATTENTION_DETERMINISTIC") == "1",
        every_length=backend.unreviewed or local_kernel(backend, setting.machine) is not None,
    )
    return Candidate(
        backend=backend.name, geometries=geometries, trusted=problem.trusted, routed=routed
    )


def versions_of(packages: Iterable[str]) -> dict[str, str]:
    """Return the versions of the installed packages that a proof depends on."""
    versions: dict[str, str] = {}
    for name in (*_LIBRARIES, *packages):
        with suppress(metadata.PackageNotFoundError):
            versions[name] = version(name)
    return versions


_TRANSIENT = frozenset({"timeout", "crash", "oom", "import-error"})

# A proof has one figure for each quantity and a few lines of reasons.
_PROOF_BYTES = 1 << 20


def proof_key(
    candidate: Candidate,
    *,
    machine: Machine,
    versions: Mapping[str, str],
    content: Mapping[str, str],
    variables: Mapping[str, str],
) -> str:
    """Return a hash of all that a proof depends on.

    Args:
        candidate: the backend and its geometries.
        machine: the machine that it runs on.
        versions: of torch, transformers and the other packages involved.
        content: hashes of the files that compute the attention, by their kind.
        variables: the environment variables that choose among a package's kernels, if set.
    """
    parts = {
        "candidate": asdict(candidate),
        "gpu": [machine.gpu, machine.arch.name, machine.driver],
        "versions": dict(sorted(versions.items())),
        "content": dict(sorted(content.items())),
        "variables": dict(sorted(variables.items())),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def read(
    folder: Path, key: str, *, name: str, has_bounds: bool, log: Callable[[str], None]
) -> Proof | None:
    """Read a proof; return None if there is none, or if it is not valid, which is logged.

    Args:
        folder: the cache.
        key: of the proof.
        name: what it was made for, such as a backend.
        has_bounds: as in _require_valid.
        log: called with a note.
    """
    path = folder / f"{key}.json"
    try:
        stored = read_checked(path, at_most=_PROOF_BYTES)
        proof = proof_from_json(stored["proof"])
        if stored["key"] != key or proof.backend != name:
            raise ValueError("it was made for another key or backend")
        _require_valid(proof, has_bounds=has_bounds)
    except FileNotFoundError:
        return None
    except OSError as error:
        log(f"note: {path} is not used ({error.strerror or error}); proving again")
        return None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        log(f"note: {path} is damaged; proving again")
        return None
    return replace(proof, cached=True)


def write(folder: Path, key: str, proof: Proof, *, log: Callable[[str], None]) -> None:
    """Write a proof atomically; if that fails, log a note: the next run proves again."""
    if any(reason.code in _TRANSIENT for reason in proof.reasons):
        return
    try:
        write_checked(folder / f"{key}.json", {"key": key, "proof": asdict(proof)})
    except OSError as error:
        log(f"note: the proof could not be saved in {folder}: {error.strerror or error}")


def _require_valid(proof: Proof, *, has_bounds: bool) -> None:
    """Raise unless a proof has values of the right types, and figures within their bounds.

    Args:
        proof: the proof that was read.
        has_bounds: whether the backend has a bound for each figure; a quantizing one has none for
            gradients.

    Raises:
        ValueError, TypeError: this program can't have written it.
    """
    for number in (proof.cases, proof.longest):
        if type(number) is not int or number < 0:
            raise ValueError(f"found {number!r}, needed a count")
    texts = [proof.note, *(figure.quantity for figure in proof.figures)]
    texts += [figure.case for figure in proof.figures]
    texts += [text for reason in proof.reasons for text in (reason.code, reason.text)]
    if not all(isinstance(text, str) for text in texts) or not math.isfinite(proof.seconds):
        raise TypeError("found a value of another type")
    if proof.reasons:
        return
    if not proof.figures or not proof.cases:
        raise ValueError("found a proof without cases or figures")
    for figure in proof.figures:
        within = figure.error <= figure.allowed  # False for NaN
        if not within or (has_bounds and not math.isfinite(figure.allowed)):
            raise ValueError(f"{figure.quantity} is beyond its bound")


# The heads to prove if the model's config is not available: grouped heads of a common size.
UNKNOWN_MODEL = (LayerGroup(count=1, heads=8, kv_heads=2, head_dim_qk=64, head_dim_v=64),)

# The shortest row to prove on, so that it has several tiles even if sequence_len is small.
SHORTEST_ROW = 64


def list_geometries(
    problem: Problem, context: RunContext, *, dense: bool, deterministic: bool, every_length: bool
) -> tuple[Geometry, ...]:
    """List the distinct geometries of a run.

    Args:
        problem: what attention has to do in the run; its layers and dropout are used.
        context: how the run calls its model.
        dense: whether to prove rows of one document as well.
        deterministic: whether gradients must repeat bit for bit.
        every_length: whether documents of each length are probed.
    """
    model = with_effective_windows(problem).model
    layers: Sequence[LayerGroup] = model.layers if model else ()
    geometries = (
        Geometry(
            heads=layer.heads,
            kv_heads=layer.kv_heads,
            head_dim_qk=layer.head_dim_qk,
            head_dim_v=layer.head_dim_v,
            window=layer.window,
            softcap=layer.softcap,
            sinks=layer.sinks,
            dtype=context.dtype,
            packing=context.packing,
            dropout=problem.dropout,
            sequence_len=max(context.sequence_len or 0, SHORTEST_ROW),
            dense=dense,
            deterministic=deterministic,
            rows=context.rows,
            autocast=context.autocast is not None,
            every_length=every_length,
        )
        for layer in layers or UNKNOWN_MODEL
    )
    return tuple(dict.fromkeys(geometries))


def has_dense_function(backend: Backend, machine: Machine) -> bool:
    """Return whether a backend takes rows of one document: some have only a varlen function."""
    local = local_kernel(backend, machine)
    return local is None or local.exports is None or DENSE in local.exports
