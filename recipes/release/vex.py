"""Write which known vulnerabilities do not affect an image, and why: OpenVEX, from cves.toml.

Source: https://github.com/openvex/spec, OPENVEX-SPEC.md 0.2.0 (2026-11-27).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import date
from typing import Any
from urllib.parse import quote, unquote

from packaging.utils import canonicalize_name

from attnimg.errors import AttnimgError
from recipes.facts import Cve

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
    """Return the document.

    Args:
        cves: every entry of cves.toml, also those about packages that the image does not have.
        sbom: the CycloneDX SBOM of the image.
        repository: of the image in the registry.
        digest: of its manifest.
        author: who states it.
        moment: when, as RFC 3339.

    Raises:
        AttnimgError: an answer is for another version than the image has, or has expired
            (code "no-vex").
    """
    installed = _installed(sbom)
    name = repository.rpartition("/")[2]
    product = (
        f"pkg:oci/{name}@{quote(digest, safe='')}?repository_url={quote(repository, safe='/')}"
    )
    today = date.fromisoformat(moment[:10])
    statements, faults = [], []
    for cve in cves:
        kind = "deb/debian" if cve.package.startswith("deb:") else "pypi"
        package = canonicalize_name(cve.package.removeprefix("deb:"))
        version = installed.get((kind, package))
        if version not in (None, cve.version):
            faults.append(
                f"{cve.id}: its answer is for {cve.package} {cve.version}, the image has {version}"
            )
        if cve.expires < today:
            faults.append(f"{cve.id}: its answer expired on {cve.expires}")
        statements.append(_statement(cve, product, f"pkg:{kind}/{package}", version))
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


def _statement(cve: Cve, product: str, package: str, version: str | None) -> dict[str, Any]:
    """Return one statement; `version` is that in the image, None if it lacks the package."""
    if version is None:
        return {
            "vulnerability": {"name": cve.id},
            "products": [{"@id": product}],
            "status": "not_affected",
            "justification": "component_not_present",
            "impact_statement": f"the image has no {cve.package}",
        }
    return {
        "vulnerability": {"name": cve.id},
        "products": [{"@id": product, "subcomponents": [{"@id": f"{package}@{version}"}]}],
        "status": cve.status,
        **({"justification": cve.justification} if cve.justification else {}),
        _REASON[cve.status]: cve.reason,
    }


def _installed(sbom: Mapping[str, Any]) -> dict[tuple[str, str], str]:
    """Return the packages of an SBOM: (pypi or deb/debian, name) -> version."""
    found = {}
    for component in sbom.get("components", []):
        purl = str(component.get("purl", "")).partition("?")[0]
        kind, _, rest = purl.removeprefix("pkg:").rpartition("/")
        name, _, version = rest.partition("@")
        found[kind, str(canonicalize_name(unquote(name)))] = unquote(version)
    return found
