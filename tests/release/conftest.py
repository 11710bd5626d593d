"""Tests of a release to a registry on this machine; `make test/release` installs what they need.

The registry is Debian's docker-registry on a free port of 127.0.0.1. Most tests release a small
image, in milliseconds; test_release_cpu.py releases attnimg:cpu, as a person would.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from small_image import package, save

from recipes.artifact.code_list import list_machine_code
from recipes.artifact.layout import write_layout
from recipes.artifact.read import read_image
from recipes.read import read_recipes
from recipes.release import signing, transfer
from recipes.release.provenance import find_builder, provenance
from recipes.release.publishable import OCI
from recipes.release.repository import Repository, parse_repository, read_registry
from recipes.release.signing import KINDS, Signing
from recipes.release.vex import vex
from recipes.solve.plan import solve

ROOT = Path(__file__).parents[2]
TOOLS = ("skopeo", "cosign", "docker-registry")
RECIPES = read_recipes(ROOT)
PLAN = solve(RECIPES.images["cpu"], RECIPES)
MOMENT = "2026-11-27T00:00:00Z"
REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="session", autouse=True)
def tools() -> None:
    """The programs of a release."""
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        pytest.skip(f"{', '.join(missing)} is not installed; make test/release installs it")


@dataclass(frozen=True)
class LocalRegistry:
    """A running registry: its repository, and the folder where it keeps blobs."""

    repository: Repository
    folder: Path


@contextmanager
def running_registry(folder: Path, *, users: str = "") -> Iterator[LocalRegistry]:
    """Run a registry; `users` is the text of an htpasswd file, empty for no credentials."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings: dict[str, object] = {
        "version": "0.1",
        "log": {"level": "warn"},
        "storage": {"filesystem": {"rootdirectory": str(folder)}},
        "http": {"addr": f"127.0.0.1:{port}"},
    }
    own = folder.with_name(f"{folder.name}-settings")
    own.mkdir(parents=True, exist_ok=True)
    if users:
        (own / "users").write_text(users)
        settings["auth"] = {"htpasswd": {"realm": "test", "path": str(own / "users")}}
    # JSON is YAML.
    (own / "settings.yml").write_text(json.dumps(settings))
    with (own / "log").open("w") as log:
        server = subprocess.Popen(
            ["docker-registry", "serve", str(own / "settings.yml")], stdout=log, stderr=log
        )
    try:
        for _ in range(100):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/")
            except urllib.error.HTTPError:
                break  # it asks for credentials
            except OSError:
                time.sleep(0.1)
            else:
                break
        yield LocalRegistry(
            repository=parse_repository(f"127.0.0.1:{port}/rehearsal"), folder=folder
        )
    finally:
        server.terminate()
        server.wait()


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalRegistry]:
    """A registry for all tests."""
    with running_registry(tmp_path_factory.mktemp("registry")) as found:
        yield found


@pytest.fixture(scope="session")
def signer(registry: LocalRegistry, tmp_path_factory: pytest.TempPathFactory) -> Signing:
    """The key of the rehearsal."""
    return make_signer(registry.repository, tmp_path_factory.mktemp("key"))


def make_signer(repository: Repository, folder: Path) -> Signing:
    """Return a key pair of a rehearsal in a folder."""
    return signing.choose_signing(read_registry(ROOT), repository, env={}, folder=folder, sign=True)


@dataclass(frozen=True)
class Small:
    """A small image in an OCI layout.

    Attributes:
        layout: its folder.
        digest: of its manifest.
        predicates: kind -> file, of what is right to say about it.
    """

    layout: Path
    digest: str
    predicates: dict[str, Path]


MakeSmall = Callable[..., Small]


@pytest.fixture(scope="session")
def make_small(tmp_path_factory: pytest.TempPathFactory, registry: LocalRegistry) -> MakeSmall:
    """Make a small image with right statements: make_small(a text that tells it from others)."""
    tmp_path = tmp_path_factory.mktemp("small")

    def make(text: str, *, repository: Repository | None = None, arm64: bool = False) -> Small:
        folder = tmp_path / text
        folder.mkdir()
        labels = {f"{OCI}.title": "attnimg:cpu", f"{OCI}.revision": REVISION}
        archive = save(
            folder / "image.tar",
            {"etc/text": text, **package("one", "1.0")},
            config={"Labels": labels},
            architecture="arm64" if arm64 else "amd64",
        )
        blobs = folder / "layout/blobs/sha256"
        blobs.mkdir(parents=True)
        artifact = read_image(archive, log=lambda _: None, blobs=blobs)
        digest = write_layout(folder / "layout", artifact.layers, artifact.config)
        sbom = {
            "bomFormat": "CycloneDX",
            "specVersion": "1.6",
            "metadata": {"component": {"name": "attnimg:cpu", "version": artifact.image_id}},
            "components": [{"name": "one", "purl": "pkg:pypi/one@1.0"}],
        }
        contents = {
            "cyclonedx": sbom,
            "spdx": {"spdxVersion": "SPDX-2.3", "packages": [{"name": "one"}]},
            "machine-code": list_machine_code(artifact),
            "provenance": provenance(
                PLAN.others[0] if arm64 else PLAN, targets={}, locks={},
                base={"name": "base", "digest": ""},
                image_id=artifact.image_id, source="https://example.com/source",
                revision=REVISION, created=MOMENT, builder=find_builder({}), warnings=["a test"],
            ),
            "vex": vex(
                RECIPES.cves, sbom=sbom, repository=(repository or registry.repository).name,
                digest=digest, author="a test", moment=MOMENT,
            ),
        }  # fmt: skip
        files = {kind: folder / f"{kind}.json" for kind in contents}
        for kind, content in contents.items():
            files[kind].write_text(json.dumps(content))
        return Small(layout=folder / "layout", digest=digest, predicates=files)

    return make


def publish(small: Small, repository: Repository, signer: Signing) -> None:
    """Push and sign a small image, and attest everything about it."""
    transfer.push(small.layout, small.digest, repository)
    signing.sign(small.digest, repository, signer, notes={})
    for kind in KINDS:
        signing.attest(kind, small.predicates[kind], small.digest, repository, signer)


def blob_path(registry: LocalRegistry, digest: str) -> Path:
    """Return the file of a blob in the registry's folder."""
    name = digest.removeprefix("sha256:")
    return registry.folder / "docker/registry/v2/blobs/sha256" / name[:2] / name / "data"


def make(target: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a make target of this checkout, with .venv as it is."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    command = ["make", "-o", ".venv/ready", target]
    return subprocess.run(
        command, cwd=ROOT, env={**env, **variables}, capture_output=True, text=True, check=False
    )
