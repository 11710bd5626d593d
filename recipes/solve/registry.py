"""Ask a container registry which digest a tag has, and those of its platforms: HTTP API v2.

Source: https://github.com/opencontainers/distribution-spec, spec.md, and for tokens
https://distribution.github.io/distribution/spec/auth/token (2026-11-27). Base images are public: a
token is asked for without a login, as Docker Hub and ghcr.io give it.
"""

from __future__ import annotations

import hashlib
import re
import ssl
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Annotated, Literal, TypeVar

import httpx
from pydantic import Field, TypeAdapter, ValidationError

from attnimg.errors import AttnimgError
from recipes.facts import Digest

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
# The form of names and tags, and the largest manifest that a registry has to accept.
# Source: spec.md, "Pulling manifests" and "Pushing Manifests" (2026-11-27).
_REFERENCE = re.compile(
    r"([A-Za-z0-9.-]+(?::[0-9]{1,5})?|\[::1\](?::[0-9]{1,5})?)"
    r"/([a-z0-9]+(?:(?:[._]|__|-+|/)[a-z0-9]+)*):([A-Za-z0-9_][A-Za-z0-9._-]{0,127})"
)
_LARGEST = 4 * 2**20
_REDIRECTS = 5
_SECONDS = 30

_Kind = TypeVar("_Kind")
_Part = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
# Source: RFC 6750, section 2.1 (2026-11-27).
_TokenText = Annotated[str, Field(pattern=r"^[A-Za-z0-9._~+/-]*=*$")]


@dataclass(frozen=True, slots=True)
class _Platform:
    """Of an entry of an index, or in the config of an image; other keys are ignored."""

    os: _Part
    architecture: _Part
    variant: _Part | Literal[""] | None = None


@dataclass(frozen=True, slots=True)
class _Descriptor:
    digest: Digest
    platform: _Platform | None = None


@dataclass(frozen=True, slots=True)
class _Index:
    manifests: tuple[_Descriptor, ...]


@dataclass(frozen=True, slots=True)
class _Manifest:
    config: _Descriptor


@dataclass(frozen=True, slots=True)
class _Token:
    token: _TokenText | None = None
    access_token: _TokenText | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Answer:
    """What an address answered; its own is without the query."""

    status: int
    reason: str
    headers: httpx.Headers
    content: bytes
    address: str


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
        AttnimgError: it has no such tag, asks for a login, or answers what is no image; or the
            reference has another form.
    """
    parts = _REFERENCE.fullmatch(reference)
    if parts is None:
        raise _error(reference, f"found {reference!r}, needed registry/name:tag, without a digest")
    host, name, tag = parts.groups()
    scheme = "http" if _LOOPBACK.fullmatch(host) else "https"
    api = f"{scheme}://{_API_HOSTS.get(host, host)}/v2/{name}"
    # The machine's own CAs: those of a proxy are there, and not in certifi's bundle.
    with httpx.Client(timeout=_SECONDS, verify=ssl.create_default_context()) as client:
        return _read_tag(client, api, tag, reference)


def _read_tag(client: httpx.Client, api: str, tag: str, reference: str) -> TagDigests:
    answer = _get(client, f"{api}/manifests/{tag}", reference)
    digest = _checked_digest(answer, reference)
    kind = answer.headers.get("content-type", "").partition(";")[0]
    if kind in _INDEXES:
        platforms = {
            _name(entry.platform): entry.digest
            # Of two images for one platform an engine takes the first.
            for entry in reversed(_parse(_Index, answer, reference).manifests)
            # Attestations are manifests of the platform unknown/unknown.
            if entry.platform is not None and entry.platform.os != "unknown"
        }
    elif kind in _MANIFESTS:
        wanted = _parse(_Manifest, answer, reference).config.digest
        blob = _get(client, f"{api}/blobs/{wanted}", reference)
        if (found := _checked_digest(blob, reference)) != wanted:
            raise _error(reference, f"its config has {found}, and its manifest says {wanted}")
        platforms = {_name(_parse(_Platform, blob, reference)): digest}
    else:
        raise _error(reference, f"it is {kind or 'of no type'}, not an image or an index of images")
    if not platforms:
        raise _error(reference, "its index has no image for any platform")
    return TagDigests(digest, dict(sorted(platforms.items())))


def _get(client: httpx.Client, address: str, reference: str) -> _Answer:
    """Get an address; where the registry asks for a token, get one and try again."""
    headers = {"Accept": ", ".join((*_INDEXES, *_MANIFESTS, "*/*"))}
    answer = _fetch(client, address, reference, headers=headers)
    challenge = answer.headers.get("www-authenticate", "")
    if answer.status == httpx.codes.UNAUTHORIZED and challenge.lower().startswith("bearer "):
        asked = dict(_PARAMETER.findall(challenge))
        params = {key: value for key, value in asked.items() if key in ("service", "scope")}
        token = _fetch(client, asked.get("realm", ""), reference, params=params)
        if httpx.codes.is_success(token.status):
            given = _parse(_Token, token, reference)
            if not (text := given.token or given.access_token):
                raise _error(reference, f"found no token at {token.address}")
            headers["Authorization"] = f"Bearer {text}"
            answer = _fetch(client, address, reference, headers=headers)
        else:
            answer = token
    if httpx.codes.is_success(answer.status):
        return answer
    reasons = {
        401: "it asks for a login, or has no such image",
        403: "it refuses access, or has no such image",
        404: "it has no such tag",
        429: "it answers no more requests from this address for now",
    }
    status = f"{answer.status} {answer.reason}".strip()
    raise _error(reference, f"{reasons.get(answer.status, 'it reports an error')} ({status})")


def _fetch(
    client: httpx.Client,
    address: str,
    reference: str,
    *,
    headers: Mapping[str, str] | None = None,
    params: Mapping[str, str] | None = None,
) -> _Answer:
    """Get an address, and at most _LARGEST bytes from it."""
    try:
        url = httpx.URL(address).copy_merge_params(dict(params or {}))
        if (url.port or 0) > 65535:
            raise httpx.InvalidURL(f"found the port {url.port}, needed at most 65535")
        request = client.build_request("GET", url, headers=headers)
        for _ in range(_REDIRECTS + 1):
            with closing(client.send(request, stream=True)) as response:
                if response.next_request is None:
                    return _Answer(
                        status=response.status_code,
                        reason=response.reason_phrase,
                        headers=response.headers,
                        content=_read_body(response, reference),
                        address=str(response.url.copy_with(query=None)),
                    )
                request = response.next_request
    except (httpx.InvalidURL, httpx.UnsupportedProtocol, UnicodeError, OverflowError) as error:
        raise _error(reference, f"it names the address {address!r}: {error}") from error
    except httpx.TransportError as error:
        host = url.netloc.decode("ascii")
        raise UnreachableError(f"{host}: {str(error) or type(error).__name__}") from error
    except httpx.DecodingError as error:
        raise _error(reference, f"the answer of {address} can't be read: {error}") from error
    raise _error(reference, f"it redirects more than {_REDIRECTS} times")


def _read_body(response: httpx.Response, reference: str) -> bytes:
    content = b""
    for part in response.iter_bytes():
        content += part
        if len(content) > _LARGEST:
            raise _error(reference, f"the answer has more than {_LARGEST} bytes")
    return content


def _checked_digest(answer: _Answer, reference: str) -> str:
    """Return the digest of an answer's bytes; the registry's header must say the same."""
    digest = "sha256:" + hashlib.sha256(answer.content).hexdigest()
    named = answer.headers.get("docker-content-digest", digest)
    if named != digest:
        raise _error(reference, f"the bytes have {digest}, and the registry says {named}")
    return digest


def _parse(kind: type[_Kind], answer: _Answer, reference: str) -> _Kind:
    """Return the JSON of an answer as one of the classes above."""
    try:
        return TypeAdapter(kind).validate_json(answer.content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the answer"
        found = f"found no JSON object at {answer.address}"
        if where != "the answer":
            found = f"found {str(first['input'])[:80]!r} for {where} at {answer.address}"
        raise _error(reference, f"{found}: {first['msg']}") from error


def _name(platform: _Platform) -> str:
    """Return "linux/amd64"; the variant v8 is what every arm64 has, and is left out."""
    parts = [platform.os, platform.architecture, platform.variant or ""]
    return "/".join(part for part in parts if part and (parts[1], part) != ("arm64", "v8"))


def _error(reference: str, why: str) -> AttnimgError:
    return AttnimgError(
        f"the registry has no digest of {reference}",
        why=why,
        do="correct `reference` in recipes/bases.toml; a base image must be public",
        code="no-digest",
        exit_code=1,
    )
