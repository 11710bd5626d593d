"""Refuse a package whose version is not the locked one, or that is not in the lock file.

Every package of the image's lock file is installed, once, in that version, and no other package
is; a small (trimmed) build of a kernel is refused. A wheelhouse has each kernel that its image
builds, made from this recipe (its key), and its files have the hashes in SHA256SUMS.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from packaging.version import InvalidVersion, Version

from recipes.artifact.facts import Artifact, Distribution
from recipes.facts import ImagePlan
from recipes.gates import ExpectedContents, GateFinding

# The local version label of a small build, which is for tests and never published.
_TRIMMED = "trim"


def check(artifact: Artifact, expected: ExpectedContents) -> tuple[GateFinding, ...]:
    """Compare the installed packages with the pins, both ways."""
    if artifact.kind != "wheels":
        return tuple(_check_versions(artifact.distributions, expected.pins))
    kernels = [step.kernel for step in expected.plan.steps if step.kernel.form != "wheel"]
    pins = {kernel.name: kernel.version for kernel in kernels}
    return (
        *_check_versions(artifact.distributions, pins, image=expected.plan.image.name),
        *_check_wheelhouse(artifact, expected.plan),
    )


def _check_versions(
    installed: tuple[Distribution, ...], pins: Mapping[str, str], *, image: str = ""
) -> Iterator[GateFinding]:
    """Compare packages with pins; `image`: that of a wheelhouse, to which wheels can be added."""
    do = "make lock and build again; install nothing by hand"
    seen: dict[str, Distribution] = {}
    for package in installed:
        name, version = package.name, package.version
        if name in seen:
            places = f"{seen[name].folder} and {package.folder}"
            yield GateFinding(name, places, "one installation", "install it once")
        seen[name] = package
        if name in pins and not _equal(version, pins[name]):
            trimmed = version.endswith(f"+{_TRIMMED}")
            fix = "build the whole wheel, without TRIM=1; a small build is for tests"
            needed = f"{pins[name]}, which is locked"
            yield GateFinding(name, f"version {version}", needed, fix if trimmed else do)
        # attnimg itself is in no lock file.
        elif name not in pins and name != "attnimg":
            yield GateFinding(name, f"version {version}", "no package that is not locked", do)
    for name in sorted(pins.keys() - seen.keys()):
        add = f"make wheels/{image} KERNEL={name}" if image else do
        yield GateFinding(name, "nothing installed", f"{pins[name]}, which is locked", add)


def _equal(found: str, pin: str) -> bool:
    """Return whether versions are equal; a local label, torch's +cpu, is not part of a pin."""
    try:
        ours, locked = Version(found), Version(pin)
    except InvalidVersion:
        return False
    labelled = ours.public == locked.public and locked.local is None and ours.local != _TRIMMED
    return ours == locked or labelled


def _check_wheelhouse(artifact: Artifact, plan: ImagePlan) -> Iterator[GateFinding]:
    """Check a wheelhouse's hashes, ABI and keys."""
    do = f"make wheels/{plan.image.name} from this checkout"
    for name, equal in artifact.sums.items():
        if not equal:
            yield GateFinding(name, "a hash that is not in SHA256SUMS", "that hash", do)
    manifest = artifact.manifest or {}
    if manifest.get("abi") != plan.abi:
        yield GateFinding("manifest.json", f"abi {manifest.get('abi')}", plan.abi, do)
    listed = manifest.get("kernels")
    kernels = listed if isinstance(listed, list) else []
    keys = {str(one.get("name")): one.get("key") for one in kernels if isinstance(one, dict)}
    for step in plan.steps:
        # A missing kernel was found above.
        if step.kernel.form != "wheel" and keys.get(step.kernel.name, step.key) != step.key:
            found = f"key {keys.get(step.kernel.name)} of {step.kernel.name}"
            yield GateFinding("manifest.json", found, f"{step.key}, this recipe's", do)
