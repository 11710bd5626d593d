"""Keep proofs on the disk, so that only the first run on a machine pays for them.

A proof is valid for one GPU, driver, set of library versions, geometry, content of the kernel's
files, and version of this code: they make up its key. Failures that may be temporary (a timeout, a
crash, too little memory) are not kept. Reading a proof checks the owner of its file, its key, its
backend and its figures again.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path

from attnimg.facts import Backend, Machine, Proof
from attnimg.files import read_private, write_private
from attnimg.verify.runner import Candidate, proof_from_json

_TRANSIENT = frozenset({"timeout", "crash", "oom", "import-error"})
# A proof has one figure for each quantity and a few lines of reasons.
_PROOF_BYTES = 1 << 20


def key_of(
    candidate: Candidate,
    *,
    machine: Machine,
    versions: Mapping[str, str],
    content: Mapping[str, str],
    variables: Mapping[str, str],
) -> str:
    """Hash all that a proof depends on.

    Args:
        candidate: the backend and its geometries.
        machine: where it runs.
        versions: of torch, transformers and all else that takes part.
        content: hashes of the files that compute the attention, by their kind.
        variables: those that are set and choose among a package's kernels.
    """
    parts = {
        "candidate": asdict(candidate),
        "gpu": [machine.gpu, machine.arch.name, machine.driver],
        "versions": dict(sorted(versions.items())),
        "content": dict(sorted(content.items())),
        "variables": dict(sorted(variables.items())),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def read(folder: Path, key: str, *, backend: Backend, say: Callable[[str], None]) -> Proof | None:
    """Read a proof; None when there is none, or when it is not valid, which is printed."""
    path = folder / f"{key}.json"
    try:
        kept = json.loads(read_private(path, at_most=_PROOF_BYTES))
        proof = proof_from_json(kept["proof"])
        if kept["key"] != key or proof.backend != backend.name:
            raise ValueError("it was made for another key or backend")
        _require_valid(proof, has_bounds=backend.k_forward is not None)
    except FileNotFoundError:
        return None
    except OSError as error:
        say(f"note: {path} is not used, as {error.strerror or error}; proving again")
        return None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        say(f"note: {path} is damaged; proving again")
        return None
    return replace(proof, cached=True)


def write(folder: Path, key: str, proof: Proof, *, say: Callable[[str], None]) -> None:
    """Write a proof whole or not at all. A folder that can't be written to only costs time."""
    if any(reason.code in _TRANSIENT for reason in proof.reasons):
        return
    text = json.dumps({"key": key, "proof": asdict(proof)})
    try:
        write_private(folder / f"{key}.json", text.encode())
    except OSError as error:
        say(f"note: the proof could not be kept in {folder}: {error.strerror or error}")


def _require_valid(proof: Proof, *, has_bounds: bool) -> None:
    """Raise unless a proof has values of the right types, and figures within their bounds.

    Args:
        proof: what was read.
        has_bounds: whether the backend has a bound for each figure; a quantizing one has none for
            gradients.

    Raises:
        ValueError, TypeError: this code did not write it.
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
