"""Read where images are published: recipes/registry.toml, or REGISTRY in its place."""

from __future__ import annotations

import ipaddress
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from attnimg.errors import AttnimgError
from recipes.facts import Strict

FILE = "recipes/registry.toml"
# Of OCI's distribution-spec, and a host as Docker recognizes it: with a dot or port, or localhost.
_LABEL = r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_HOST = re.compile(
    rf"(localhost|{_LABEL}(\.{_LABEL})+|{_LABEL}(?=:))(:(?P<port>[0-9]{{1,5}}))?", re.IGNORECASE
)
_PART = r"[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*"
_NAMESPACE = re.compile(rf"{_PART}(/{_PART})*")
_LONGEST = 255  # of a repository with its host, in characters


@dataclass(frozen=True, kw_only=True, slots=True)
class Signer(Strict):
    """Who signs published images: a workflow, on which refs, and who vouches for that.

    Attributes:
        workflow: its path in the repository.
        refs: a regular expression of the branches and tags on which it may run.
        issuer: of its identity's token.
    """

    workflow: str
    refs: str
    issuer: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Published(Strict):
    """One image that was pushed, with its immutable tag."""

    image: str
    tag: str
    digest: str
    day: date


@dataclass(frozen=True, kw_only=True, slots=True)
class Registry(Strict):
    """The content of registry.toml."""

    registry: str
    source: str
    signer: Signer
    published: tuple[Published, ...] = ()

    @property
    def identity(self) -> str:
        """The regular expression that a certificate's identity must match."""
        return f"^{re.escape(self.source)}/{re.escape(self.signer.workflow)}@{self.signer.refs}$"


@dataclass(frozen=True, kw_only=True, slots=True)
class Repository:
    """The repository of a registry where images go.

    Attributes:
        registry: host[:port]/namespace.
        loopback: whether it is on this machine, over HTTP: a rehearsal may go there.
    """

    registry: str
    loopback: bool

    @property
    def host(self) -> str:
        """The host, with its port."""
        return self.registry.partition("/")[0]

    @property
    def name(self) -> str:
        """The one repository of all images: their tags begin with the image's name."""
        return f"{self.registry}/attnimg"

    def at(self, digest: str) -> str:
        """Return the reference of an image by its digest."""
        return f"{self.name}@{digest}"


def read_registry(root: Path) -> Registry:
    """Read registry.toml.

    Raises:
        AttnimgError: it is not valid (code "bad-recipe").
    """
    try:
        values = tomllib.loads((root / FILE).read_text(encoding="utf-8"))
        found = TypeAdapter(Registry).validate_python(values)
    except (tomllib.TOMLDecodeError, ValidationError) as error:
        raise AttnimgError(
            f"{FILE} is not valid",
            why=str(error),
            do=f"correct {FILE}; recipes/release/repository.py explains each key",
            code="bad-recipe",
        ) from error
    parse_repository(found.registry)
    return found


def find_repository(root: Path, env: Mapping[str, str]) -> Repository:
    """Return where to push to and pull from.

    Raises:
        AttnimgError: REGISTRY or registry.toml does not name a registry (code "bad-registry").
    """
    return parse_repository(env.get("REGISTRY") or read_registry(root).registry)


def parse_repository(text: str) -> Repository:
    """Return the repository of host[:port]/namespace; one slash at the end is accepted.

    Raises:
        AttnimgError: it is something else (code "bad-registry").
    """
    host, _, namespace = text.strip().removesuffix("/").partition("/")
    # The name of a host is the same in capital letters; skopeo and Docker compare the text.
    repository = Repository(
        registry=f"{host.lower()}/{namespace}", loopback=_is_loopback(host.lower())
    )
    if fault := _fault(host, namespace) or _length_fault(repository):
        raise AttnimgError(
            "the registry can't be used",
            why=f"found {text[:_LONGEST]!r}: {fault}",
            do="set REGISTRY=registry.example.com/team, or correct recipes/registry.toml",
            code="bad-registry",
        )
    return repository


def _fault(host: str, namespace: str) -> str:
    """Return why this names no registry; empty if it does."""
    if host.startswith("["):
        return "skopeo and Docker take no IPv6 address in a name; needed a host name or IPv4"
    found = _HOST.fullmatch(host)
    if not found:
        return "needed host[:port]/namespace, the host with a dot or a port, without https://"
    if (port := found["port"]) is not None and not 1 <= int(port) <= 65535:
        return f"the port is {port}, needed 1 to 65535"
    if not namespace:
        return f"there is no namespace after the host, needed {host}/NAMESPACE"
    if not _NAMESPACE.fullmatch(namespace):
        return (
            f"the namespace is {namespace[:_LONGEST]!r}, needed small letters, digits, and "
            "between them . _ or -"
        )
    return ""


def _length_fault(repository: Repository) -> str:
    length = len(repository.name)
    if length <= _LONGEST:
        return ""
    return f"with /attnimg it has {length} characters, needed at most {_LONGEST}"


def _is_loopback(host: str) -> bool:
    name = host.partition(":")[0]
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"
