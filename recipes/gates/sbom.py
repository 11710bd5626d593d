"""Refuse an image in which syft finds other Python packages than the lock file has.

syft's list of everything in the image, Debian's packages too, is written to dist/NAME-sbom.json in
the CycloneDX format.
"""

from __future__ import annotations

from recipes.artifact.facts import Artifact
from recipes.gates import ExpectedContents, GateFinding


def skip_reason(artifact: Artifact, expected: ExpectedContents) -> str:
    """Return why there is no list of syft's to compare with; empty if there is one."""
    if artifact.kind == "wheels":
        return "a wheelhouse is not an image"
    return "" if artifact.sbom is not None else "syft is not installed: make setup"


def check(artifact: Artifact, expected: ExpectedContents) -> tuple[GateFinding, ...]:
    """Compare syft's Python packages with the lock file, both ways."""
    installed = artifact.sbom or {}
    pins = {"attnimg": installed.get("attnimg", "of this checkout"), **expected.pins}
    findings = []
    for name in sorted(installed.keys() | pins.keys()):
        found, pin = installed.get(name), pins.get(name)
        # syft keeps a local label, torch's +cpu; a pin has none.
        if found is None or pin is None or found.partition("+")[0] != pin.partition("+")[0]:
            findings.append(
                GateFinding(
                    file=name,
                    found=found or "nothing",
                    needed=f"version {pin}" if pin else "no package that is not locked",
                    do="make lock and build again",
                )
            )
    return tuple(findings)
