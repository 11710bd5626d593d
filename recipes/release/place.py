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
_HOST = r"(localhost|[A-Za-z0-9-]+(\.[A-Za-z0-9-]+)+|[A-Za-z0-9.-]+(?=:)|\[[0-9a-fA-F:]+\])(:\d+)?"
_PART = r"[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*"
_REGISTRY = re.compile(rf"{_HOST}(/{_PART})+")


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
class Place:
    """Where images go.

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
    def repository(self) -> str:
        """The one repository of all images: their tags begin with the image's name."""
        return f"{self.registry}/attnimg"

    def at(self, digest: str) -> str:
        """Return the reference of an image by its digest."""
        return f"{self.repository}@{digest}"


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
            do=f"correct {FILE}; recipes/release/place.py explains each key",
            code="bad-recipe",
        ) from error
    parse_place(found.registry)
    return found


def find_place(root: Path, env: Mapping[str, str]) -> Place:
    """Return where to push to and pull from.

    Raises:
        AttnimgError: REGISTRY or registry.toml does not name a registry (code "bad-registry").
    """
    return parse_place(env.get("REGISTRY") or read_registry(root).registry)


def parse_place(text: str) -> Place:
    """Return a place from host[:port]/namespace; one slash at the end is accepted.

    Raises:
        AttnimgError: it is something else (code "bad-registry").
    """
    registry = text.strip().removesuffix("/")
    if not _REGISTRY.fullmatch(registry):
        raise AttnimgError(
            "the registry can't be used",
            why=f"found {text!r}, needed host[:port]/namespace in small letters, without https://",
            do="set REGISTRY=registry.example.com/team, or correct recipes/registry.toml",
            code="bad-registry",
        )
    return Place(registry=registry, loopback=_is_loopback(registry.partition("/")[0]))


def _is_loopback(host: str) -> bool:
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"
