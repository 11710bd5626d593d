"""Check cves.toml: why a known vulnerability of a package does, or does not, affect the images.

An entry is called an answer. The scan (`make scan/NAME`) accepts a vulnerability with an answer
until the answer expires, and a release publishes all answers as VEX.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from datetime import date

from packaging.utils import canonicalize_name

from attnimg.errors import AttnimgError
from recipes.facts import Cve

# An answer is read again at least once a year.
LONGEST_DAYS = 366

# Source: https://github.com/openvex/spec, OPENVEX-SPEC.md 0.2.0 (2026-11-27).
_JUSTIFICATIONS = (
    "component_not_present",
    "vulnerable_code_not_present",
    "vulnerable_code_not_in_execute_path",
    "vulnerable_code_cannot_be_controlled_by_adversary",
    "inline_mitigations_already_exist",
)
# Packages of Debian are not in a lock file: `deb:libc6`.
_DEBIAN = re.compile(r"deb:[a-z0-9][a-z0-9.+-]+")
_ID = re.compile(r"(CVE-\d{4}-\d{4,}|GHSA(-[0-9a-z]{4}){3}|PYSEC-\d{4}-\d+)")


def refuse_wrong_cves(cves: Iterable[Cve], *, pins: Collection[tuple[str, str]]) -> None:
    """Check every entry of cves.toml, whatever the day is.

    Args:
        cves: the entries.
        pins: (package, version) of all images.

    Raises:
        AttnimgError: an entry is wrong, or about a package or version that no image has.
    """
    if faults := [fault for cve in cves for fault in _faults(cve, pins)]:
        raise AttnimgError(
            "recipes/cves.toml has wrong entries",
            why="\n".join(faults),
            do="correct the entry, or remove it with its package",
            code="bad-cve",
        )


def _faults(cve: Cve, pins: Collection[tuple[str, str]]) -> Iterator[str]:
    where = f"{cve.id} of {cve.package}"
    if not _ID.fullmatch(cve.id):
        yield f"{where}: found id {cve.id!r}, needed CVE-..., GHSA-... or PYSEC-..."
    if (cve.justification in _JUSTIFICATIONS) != (cve.status == "not_affected"):
        yield (
            f"{where}: found status {cve.status!r} with justification {cve.justification!r}; "
            f"not_affected needs one of {', '.join(_JUSTIFICATIONS)}, other statuses none"
        )
    if not cve.reason.strip():
        yield f"{where}: reason is empty"
    versions = {version for name, version in pins if name == canonicalize_name(cve.package)}
    if _DEBIAN.fullmatch(cve.package):
        return
    if not versions:
        yield f"{where}: no image has this package"
    elif cve.version not in versions:
        found = ", ".join(sorted(versions))
        yield f"{where}: the answer is for version {cve.version}, the images have {found}"


def refuse_expired(cves: Iterable[Cve], *, today: date) -> None:
    """Check that every answer is in force.

    Raises:
        AttnimgError: one has expired, or expires too late for an answer that is read again
            (code "expired-cve", exit code 1).
    """
    faults = []
    for cve in cves:
        days = (cve.expires - today).days
        if days < 0:
            faults.append(f"{cve.id} of {cve.package}: expired on {cve.expires}, today is {today}")
        elif days > LONGEST_DAYS:
            faults.append(
                f"{cve.id} of {cve.package}: expires in {days} days, needed at most {LONGEST_DAYS}"
            )
    if faults:
        raise AttnimgError(
            "an answer to a known vulnerability is not in force",
            why="\n".join(faults),
            do="read the advisory and the package again; write a new reason and `expires` into "
            "recipes/cves.toml, or bump the package (make bump) and remove the entry",
            code="expired-cve",
            exit_code=1,
        )


def answer_to(
    cves: Iterable[Cve], *, package: str, version: str, ids: Collection[str]
) -> Cve | None:
    """Return the entry for a reported vulnerability, by any of its names; None if there is none."""
    name = canonicalize_name(package)
    for cve in cves:
        if cve.id in ids and (canonicalize_name(cve.package), cve.version) == (name, version):
            return cve
    return None


def grype_config(cves: Iterable[Cve]) -> Mapping[str, object]:
    """Return the configuration with which grype leaves out what has an answer.

    Source: https://github.com/anchore/grype, "Specifying matches to ignore" (2026-11-27).
    """
    return {
        "ignore": [
            {
                "vulnerability": cve.id,
                "reason": f"{cve.status}, until {cve.expires}: {cve.reason}",
                "package": {
                    "name": cve.package.removeprefix("deb:"),
                    "version": cve.version,
                    "type": "deb" if cve.package.startswith("deb:") else "python",
                },
            }
            for cve in cves
        ]
    }
