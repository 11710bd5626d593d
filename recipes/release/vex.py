"""Write which known vulnerabilities do not affect an image, and why: OpenVEX, from cves.toml.

Source: https://github.com/openvex/spec, OPENVEX-SPEC.md 0.2.0 (2026-11-27).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import quote, unquote

from packaging.utils import canonicalize_name

from attnimg.errors import AttnimgError
from recipes.facts import Cve

_PURL = re.compile(r"pkg:/*([A-Za-z0-9.+-]+)/((?:[^/@]+/)*)([^/@]+)(?:@(.*))?")
# The types of a component of CycloneDX that may be a package; others are files, or the system.
_PACKAGES = ("application", "framework", "library")
CONTEXT = "https://openvex.dev/ns/v0.2.0"
# Status -> the field that holds the reason.
_REASON = {
    "not_affected": "impact_statement",
    "affected": "action_statement",
    "fixed": "status_notes",
    "under_investigation": "status_notes",
}


def vex(
    cves: Iterable[Cve],
    *,
    sbom: Mapping[str, Any],
    repository: str,
    digest: str,
    author: str,
    moment: str,
) -> dict[str, Any]:
    """Return the document; whether an answer has expired is checked before (recipes/cves.py).

    Args:
        cves: every entry of cves.toml, also those about packages that the image does not have.
        sbom: the CycloneDX SBOM of the image.
        repository: of the image in the registry.
        digest: of its manifest.
        author: who states it.
        moment: when, as RFC 3339.

    Raises:
        AttnimgError: an answer is for another version than the image has, or contradicts another;
            the SBOM doesn't tell whether the image has the package (code "no-vex").
    """
    installed = _installed(sbom)
    name = repository.rpartition("/")[2]
    product = (
        f"pkg:oci/{name}@{quote(digest, safe='')}?repository_url={quote(repository, safe='/')}"
    )
    statements, faults, answered = [], [], set()
    if not installed:
        faults.append("the SBOM lists no package: it doesn't tell which packages the image has")
    for cve in cves:
        kind = "deb" if cve.package.startswith("deb:") else "pypi"
        package = canonicalize_name(cve.package.removeprefix("deb:"))
        if (cve.id, kind, package) in answered:
            faults.append(f"{cve.id}: it has two answers for {cve.package}, needed one")
        answered.add((cve.id, kind, package))
        if ("", package) in installed:
            faults.append(f"{cve.id}: the SBOM has {cve.package} without a package URL of a type")
        versions = installed.get((kind, package), {})
        faults += [
            f"{cve.id}: its answer is for {cve.package} {cve.version}, the image has "
            f"{version or 'it without a version'}"
            for version in versions.values()
            if version != cve.version
        ]
        absent = f"pkg:{'deb/debian' if kind == 'deb' else kind}/{quote(package, safe='')}"
        statements.append(_statement(cve, product, absent, list(versions)))
    if faults:
        raise AttnimgError(
            "the image has vulnerabilities without an answer",
            why="\n".join(faults),
            do="read the advisory and the package again, and correct recipes/cves.toml",
            code="no-vex",
            exit_code=1,
        )
    return {
        "@context": CONTEXT,
        "@id": f"urn:attnimg:vex:{digest}",
        "author": author,
        "timestamp": moment,
        "version": 1,
        "statements": statements,
    }


def _statement(cve: Cve, product: str, absent: str, purls: list[str]) -> dict[str, Any]:
    """Return one statement, on the package URLs in the image; on `absent` if it has none."""
    subject = {
        "vulnerability": {"name": cve.id},
        "products": [
            {"@id": product, "subcomponents": [{"@id": purl} for purl in purls or [absent]]}
        ],
    }
    if not purls:
        return {
            **subject,
            "status": "not_affected",
            "justification": "component_not_present",
            "impact_statement": f"the image has no {cve.package}",
        }
    return {
        **subject,
        "status": cve.status,
        **({"justification": cve.justification} if cve.justification else {}),
        _REASON[cve.status]: cve.reason,
    }


def _installed(sbom: Mapping[str, Any]) -> dict[tuple[str, str], dict[str, str]]:
    """Return the packages of an SBOM: (type, name) -> package URL -> version.

    The type is pypi, deb (of any distribution)...; it is empty where the SBOM has none.
    """
    found: dict[tuple[str, str], dict[str, str]] = {}
    for component in sbom.get("components") or []:
        purl = component.get("purl")
        # Without the qualifiers: it names the package on every architecture.
        url = re.split(r"[?#]", purl)[0] if isinstance(purl, str) else ""
        if match := _PURL.fullmatch(url):
            kind, space, name, version = match.groups(default="")
            # The SBOM's own spelling is what scanners compare; purl demands %2B for a plus sign.
            url = f"pkg:{kind.lower()}/{space}{name}@{version}".replace("+", "%2B")
            kind, name, version = kind.lower(), unquote(name), unquote(version)
        elif component.get("type", "library") in _PACKAGES:
            kind, name = "", str(component.get("name", ""))
            url, version = name, str(component.get("version", ""))
        else:
            continue
        found.setdefault((kind, str(canonicalize_name(name))), {})[url] = version
    return found
