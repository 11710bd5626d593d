"""Ask a container registry which digest a tag has, and those of its platforms: HTTP API v2.

Source: https://github.com/opencontainers/distribution-spec, spec.md, and for tokens
https://distribution.github.io/distribution/spec/auth/token (2026-11-27). Base images are public: a
token is asked for without a login, as Docker Hub and ghcr.io give it.
"""

from __future__ import annotations

import hashlib
import json
import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from attnimg.errors import AttnimgError

_INDEXES = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
_MANIFESTS = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
# Docker Hub's name in references is not the host of its API.
_API_HOSTS = {"docker.io": "registry-1.docker.io"}
_LOOPBACK = re.compile(r"(localhost|127[.][\d.]+|\[::1\])(:\d+)?")
_PARAMETER = re.compile(r'(\w+)="([^"]*)"')
_SECONDS = 30


class UnreachableError(Exception):
    """The registry did not answer: no network, no such host, or a proxy without its CA."""


@dataclass(frozen=True, slots=True)
class TagDigests:
    """What a tag names.

    Attributes:
        digest: of the index of several platforms, or of the one manifest.
        platforms: platform -> digest of its manifest, sorted.
    """

    digest: str
    platforms: Mapping[str, str]


def resolve_tag(reference: str) -> TagDigests:
    """Return the digests that registry/name:tag has now.

    Raises:
        UnreachableError: the registry did not answer.
        AttnimgError: it has no such tag, asks for a login, or answers what is no image.
    """
    host, _, rest = reference.partition("/")
    name, _, tag = rest.rpartition(":")
    scheme = "http" if _LOOPBACK.fullmatch(host) else "https"
    api = f"{scheme}://{_API_HOSTS.get(host, host)}/v2/{name}"
    # The machine's own CAs: those of a proxy are there, and not in certifi's bundle.
    with httpx.Client(
        timeout=_SECONDS, follow_redirects=True, verify=ssl.create_default_context()
    ) as client:
        try:
            return _read_tag(client, api, tag, reference)
        except (httpx.TransportError, httpx.TooManyRedirects) as error:
            raise UnreachableError(f"{host}: {str(error) or type(error).__name__}") from error


def _read_tag(client: httpx.Client, api: str, tag: str, reference: str) -> TagDigests:
    answer = _get(client, f"{api}/manifests/{tag}", reference)
    digest = _checked_digest(answer, reference)
    content = _json(answer, reference)
    kind = answer.headers.get("content-type", "").partition(";")[0]
    if kind in _INDEXES:
        platforms = {
            _platform(entry.get("platform", {})): str(entry["digest"])
            for entry in content.get("manifests", ())
            # Attestations are manifests of the platform unknown/unknown.
            if entry.get("platform", {}).get("os", "unknown") != "unknown"
        }
    elif kind in _MANIFESTS:
        config = _json(
            _get(client, f"{api}/blobs/{content['config']['digest']}", reference), reference
        )
        platforms = {_platform(config): digest}
    else:
        raise _error(reference, f"it is {kind or 'of no type'}, not an image or an index of images")
    if not platforms:
        raise _error(reference, "its index has no image for any platform")
    return TagDigests(digest, dict(sorted(platforms.items())))


def _get(client: httpx.Client, address: str, reference: str) -> httpx.Response:
    """Get an address; where the registry asks for a token, get one and try again."""
    headers = {"Accept": ", ".join((*_INDEXES, *_MANIFESTS, "*/*"))}
    answer = client.get(address, headers=headers)
    challenge = answer.headers.get("www-authenticate", "")
    if answer.status_code == httpx.codes.UNAUTHORIZED and challenge.lower().startswith("bearer "):
        asked = dict(_PARAMETER.findall(challenge))
        token = client.get(
            asked.pop("realm", ""),
            params={key: value for key, value in asked.items() if key in ("service", "scope")},
        )
        if token.is_success:
            given = _json(token, reference)
            headers["Authorization"] = f"Bearer {given.get('token') or given.get('access_token')}"
            answer = client.get(address, headers=headers)
        else:
            answer = token
    if answer.is_success:
        return answer
    reasons = {
        401: "it asks for a login, or has no such image",
        403: "it refuses access, or has no such image",
        404: "it has no such tag",
        429: "it answers no more requests from this address for now",
    }
    status = f"{answer.status_code} {answer.reason_phrase}".strip()
    raise _error(reference, f"{reasons.get(answer.status_code, 'it reports an error')} ({status})")


def _checked_digest(answer: httpx.Response, reference: str) -> str:
    """Return the digest of a manifest's bytes; the registry's header must say the same."""
    digest = "sha256:" + hashlib.sha256(answer.content).hexdigest()
    named = answer.headers.get("docker-content-digest", digest)
    if named != digest:
        raise _error(reference, f"the bytes have {digest}, and the registry says {named}")
    return digest


def _json(answer: httpx.Response, reference: str) -> dict[str, Any]:
    try:
        content = json.loads(answer.content)
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise _error(reference, f"found no JSON object at {answer.url.copy_with(query=None)}")
    return content


def _platform(values: Mapping[str, Any]) -> str:
    """Return "linux/amd64"; the variant v8 is what every arm64 has, and is left out."""
    parts = [str(values.get(key, "")) for key in ("os", "architecture", "variant")]
    return "/".join(part for part in parts if part and (parts[1], part) != ("arm64", "v8"))


def _error(reference: str, why: str) -> AttnimgError:
    return AttnimgError(
        f"the registry has no digest of {reference}",
        why=why,
        do="correct `reference` in recipes/bases.toml; a base image must be public",
        code="no-digest",
        exit_code=1,
    )
