"""Remember proofs on the disk, so that only the first run on a machine pays for them.

A proof holds for one GPU, driver, set of library versions, kernel and geometry, and for this code:
all of that is its key. What may pass by itself (a timeout, a crash, memory) is not remembered.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path

from attnimg.facts import LocalKernel, Machine, Proof
from attnimg.prove.runner import Candidate, proof_from_json

_TRANSIENT = frozenset({"timeout", "crash", "oom", "import-error"})
# Larger files, compiled kernels, are told apart by size and time instead of content.
_HASHED_BYTES = 4 << 20


def cache_folder(environment: Mapping[str, str]) -> Path:
    """Give the folder of proofs: below ATTNIMG_CACHE, or below the user's cache folder."""
    named = environment.get("ATTNIMG_CACHE")
    if named:
        return Path(named) / "proofs"
    from platformdirs import user_cache_path

    return user_cache_path("attnimg") / "proofs"


def key_of(
    candidate: Candidate,
    *,
    machine: Machine,
    versions: Mapping[str, str],
    local: LocalKernel | None,
    variables: Mapping[str, str],
) -> str:
    """Hash all that a proof depends on.

    Args:
        candidate: the backend and its geometries.
        machine: where it runs.
        versions: of torch, transformers and all else that takes part.
        local: the folder that LOCAL_KERNELS serves for the backend.
        variables: those that are set and choose among a package's kernels.
    """
    parts = {
        "candidate": asdict(candidate),
        "gpu": [machine.gpu, machine.arch.name, machine.driver],
        "versions": dict(sorted(versions.items())),
        "attnimg": _hash_of(Path(__file__).parents[1], "**/*.py"),
        "kernel": _hash_of(Path(local.path), "**/*") if local else None,
        "variables": dict(sorted(variables.items())),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def read(folder: Path, key: str, *, say: Callable[[str], None]) -> Proof | None:
    """Read a proof; None when there is none, or its file is damaged, which is said."""
    path = folder / f"{key}.json"
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        say(f"note: {path} could not be read ({error}); proving again")
        return None
    try:
        return replace(proof_from_json(json.loads(text)), cached=True)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        say(f"note: {path} is damaged; proving again")
        return None


def write(folder: Path, key: str, proof: Proof, *, say: Callable[[str], None]) -> None:
    """Write a proof whole or not at all. A folder that can't be written costs time, no more."""
    if any(reason.code in _TRANSIENT for reason in proof.reasons):
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=folder, suffix=".part", delete=False, encoding="utf-8"
        ) as file:
            json.dump(asdict(proof), file)
        Path(file.name).replace(folder / f"{key}.json")
    except OSError as error:
        say(f"note: the proof could not be kept in {folder} ({error.strerror})")


def _hash_of(folder: Path, pattern: str) -> str:
    """Hash the files of a folder, by content or, where large, by size and time."""
    hashed = hashlib.sha256()
    for path in sorted(folder.glob(pattern)):
        if not path.is_file() or path.suffix == ".pyc":
            continue
        stat = path.stat()
        hashed.update(f"{path.relative_to(folder)}:{stat.st_size}:".encode())
        large = stat.st_size > _HASHED_BYTES
        hashed.update(str(stat.st_mtime_ns).encode() if large else path.read_bytes())
    return hashed.hexdigest()
