"""Refuse a package whose version is not the locked one, or that is not in the lock file.

Every package of the image's lock file is installed, once, in that version, and no other package
is; a small (trimmed) build of a kernel is refused. A wheelhouse has each kernel that its image
builds, made from this recipe (its key), and its files have the hashes in SHA256SUMS.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from packaging.version import Version

from recipes.artifact.facts import Artifact, Distribution
from recipes.gates import Expected, Gate, GateFinding

_NAME = "pins"
# attnimg, and the packages of a new virtual environment; neither is in a lock file.
_OURS = "attnimg"
# The local version label of a small build, which is for tests and never published.
_TRIMMED = "trim"
_WHOLE = "build the whole wheel, without TRIM=1; a small build is for trying the way"


def check(artifact: Artifact, expected: Expected) -> tuple[GateFinding, ...]:
    """Compare what is installed with what is pinned, both ways."""
    if artifact.kind == "wheels":
        return (
            *_versions(artifact.distributions, _built(expected)),
            *_wheelhouse(artifact, expected),
        )
    return tuple(_versions(artifact.distributions, expected.pins))


def _built(expected: Expected) -> dict[str, str]:
    kernels = [step.kernel for step in expected.plan.steps if step.kernel.form != "wheel"]
    return {kernel.name: kernel.version for kernel in kernels}


def _versions(found: tuple[Distribution, ...], pins: Mapping[str, str]) -> Iterator[GateFinding]:
    """Compare packages with their pins; a local label, torch's +cpu, is not part of a pin."""
    do = "make lock and build again; nothing is installed by hand"
    seen: dict[str, Distribution] = {}
    for one in found:
        if one.name in seen:
            where = f"{seen[one.name].folder} and {one.folder}"
            yield _finding(one.name, where, "one installation", "install it once")
        seen[one.name] = one
        pin = pins.get(one.name)
        if pin is None and one.name != _OURS:
            yield _finding(one.name, f"version {one.version}", "no package that is not locked", do)
        elif pin is not None and not _same(one.version, pin):
            fix = _WHOLE if Version(one.version).local == _TRIMMED else do
            yield _finding(one.name, f"version {one.version}", f"{pin}, which is locked", fix)
    for name in sorted(set(pins) - set(seen)):
        yield _finding(name, "nothing installed", f"{pins[name]}, which is locked", do)


def _same(found: str, pin: str) -> bool:
    here, there = Version(found), Version(pin)
    labelled = here.public == there.public and there.local is None and here.local != _TRIMMED
    return here == there or labelled


def _wheelhouse(artifact: Artifact, expected: Expected) -> Iterator[GateFinding]:
    """Check a wheelhouse's hashes, ABI and keys."""
    again = f"make wheels/{expected.plan.image.name} from this checkout"
    for name, same in artifact.sums.items():
        if not same:
            yield _finding(name, "other bytes than SHA256SUMS says, or no sum", "the same", again)
    manifest = artifact.manifest or {}
    if manifest.get("abi") != expected.plan.abi:
        yield _finding("manifest.json", f"abi {manifest.get('abi')}", expected.plan.abi, again)
    listed = manifest.get("kernels")
    kernels = listed if isinstance(listed, list) else []
    named = (kernel for kernel in kernels if isinstance(kernel, dict))
    keys = {str(kernel.get("name")): kernel.get("key") for kernel in named}
    for step in expected.plan.steps:
        if step.kernel.form != "wheel" and keys.get(step.kernel.name) != step.key:
            found = f"key {keys.get(step.kernel.name)} of {step.kernel.name}"
            yield _finding("manifest.json", found, f"{step.key}, this recipe's", again)


def _finding(what: str, found: str, needed: str, do: str) -> GateFinding:
    return GateFinding(gate=_NAME, file=what, found=found, needed=needed, do=do)


GATE = Gate(name=_NAME, check=check)
