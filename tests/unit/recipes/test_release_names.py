"""How an image of a registry is named, what stands under the name, and who signed it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from attnimg.errors import AttnimgError
from recipes.release.command import pull, verify
from recipes.release.repository import Repository, parse_repository, read_registry
from recipes.release.signing import Signing, choose_signing
from recipes.release.transfer import find_tag, read_config, read_manifest

ROOT = Path(__file__).parents[3]
DIGEST = f"sha256:{'a' * 64}"
REMOTE, LOCAL = (
    parse_repository("registry.example.com/team"),
    parse_repository("127.0.0.1:1/rehearsal"),
)


@pytest.mark.parametrize(
    "image",
    [
        DIGEST.upper(),
        DIGEST[:-1],
        f"{DIGEST}\n",
        f"sha256:{'A' * 64}",
        f"sha512:{'a' * 64}",
        "",
        "a" * 129,
        "-x",
        "a;b",
        "$(id)",
    ],
)
def test_what_is_neither_a_digest_nor_a_tag_is_refused_before_anything_runs(image: str) -> None:
    env = {"REGISTRY": LOCAL.registry, "PATH": ""}
    for action in (partial(verify, tag="cpu"), pull):
        with pytest.raises(AttnimgError) as caught:
            action("cpu", image, root=ROOT, env=env)
        assert caught.value.code == "bad-reference"


@pytest.fixture
def registry_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], str]:
    """Return a function that makes a program skopeo print some bytes; it returns their digest."""

    def has(content: bytes) -> str:
        (tmp_path / "content").write_bytes(content)
        (tmp_path / "skopeo").write_text(f"#!/bin/sh\nexec cat {tmp_path}/content\n")
        (tmp_path / "skopeo").chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
        return f"sha256:{hashlib.sha256(content).hexdigest()}"

    return has


MANIFEST = {"config": {"digest": DIGEST}, "layers": [{"digest": DIGEST, "size": 1}]}


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_manifest_is_read_byte_for_byte(registry_has: Callable[[bytes], str], end: str) -> None:
    digest = registry_has(json.dumps(MANIFEST, indent=1).replace("\n", end).encode())
    assert read_manifest(LOCAL.at(digest), LOCAL) == (digest, MANIFEST)
    assert find_tag("cpu", LOCAL) == digest
    with pytest.raises(AttnimgError, match="has another image than it says"):
        read_manifest(LOCAL.at(DIGEST), LOCAL)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b'{"manifests": [{}, {}]}', "an index of 2 manifests"),
        (b"null", "no JSON object"),
        (b"<html>", "no JSON object"),
        (b"\xff", "no JSON object"),
        (b"[" * 100_000, "no JSON object"),
        (b"{}", "without the digest"),
        (b'{"config": {"digest": 1}, "layers": []}', "without the digest"),
        (f'{{"config": {{"digest": "{DIGEST}"}}}}'.encode(), "without the sizes"),
        (f'{{"config": {{"digest": "{DIGEST}"}}, "layers": [{{}}]}}'.encode(), "without the sizes"),
    ],
)
def test_what_is_no_manifest_of_an_image_is_refused(
    registry_has: Callable[[bytes], str], content: bytes, found: str
) -> None:
    with pytest.raises(AttnimgError) as caught:
        read_manifest(LOCAL.at(registry_has(content)), LOCAL)
    assert caught.value.code == "not-an-image"
    assert found in caught.value.why


def test_a_configuration_may_lack_labels_and_nothing_else(
    registry_has: Callable[[bytes], str],
) -> None:
    for content in (b"{}", b'{"config": null}', b'{"config": {"Labels": null}}'):
        config = read_config(LOCAL.at(DIGEST), LOCAL, registry_has(content))
        assert config["config"]["Labels"] == {}
    config = read_config(
        LOCAL.at(DIGEST), LOCAL, registry_has(b'{"config": {"Labels": {"a": ""}}}')
    )
    assert config["config"]["Labels"] == {"a": ""}
    for content in (b"null", b"<", b'{"config": {"Labels": 1}}'):
        with pytest.raises(AttnimgError, match="has another image"):
            read_config(LOCAL.at(DIGEST), LOCAL, registry_has(content))


# ---- keys ---------------------------------------------------------------------------------------


def chosen(
    folder: Path, *, sign: bool = True, repository: Repository = REMOTE, **env: str
) -> Signing:
    return choose_signing(read_registry(ROOT), repository, env=env, folder=folder, sign=sign)


PUBLIC = "-----BEGIN PUBLIC KEY-----\n"


@pytest.mark.parametrize("name", ["cosign.key", "my.pem", "key"])
def test_the_public_key_is_beside_the_private_one(tmp_path: Path, name: str) -> None:
    key = tmp_path / name
    key.touch()
    with pytest.raises(AttnimgError, match="COSIGN_PUBLIC_KEY does not name a key") as caught:
        chosen(tmp_path, COSIGN_KEY=str(key))
    assert caught.value.code == "no-key"
    public = key.with_suffix(".pub")
    public.write_text(PUBLIC)
    found = chosen(tmp_path, COSIGN_KEY=str(key))
    assert (found.key, found.public, found.text) == (str(key), str(public), f"key {public.name}")


def test_a_missing_file_of_a_key_is_named(tmp_path: Path) -> None:
    (tmp_path / "cosign.pub").write_text(PUBLIC)
    private, public = str(tmp_path / "cosign.key"), str(tmp_path / "cosign.pub")
    with pytest.raises(AttnimgError, match="COSIGN_KEY does not name a key"):
        chosen(tmp_path, COSIGN_KEY=private)
    # Who only verifies needs no private key.
    assert chosen(tmp_path, sign=False, COSIGN_KEY=private).public == public
    assert chosen(tmp_path, sign=False, COSIGN_PUBLIC_KEY=public).public == public
    with pytest.raises(AttnimgError, match="COSIGN_PUBLIC_KEY does not name a key"):
        chosen(tmp_path, sign=False, COSIGN_PUBLIC_KEY=str(tmp_path / "gone.pub"))


@pytest.mark.parametrize("uri", ["awskms:///alias/attnimg.key", "k8s://team/cosign", "gitlab://7"])
def test_a_key_elsewhere_verifies_under_its_own_name(tmp_path: Path, uri: str) -> None:
    found = chosen(tmp_path, COSIGN_KEY=uri)
    assert (found.key, found.public, found.text) == (uri, uri, f"key {uri}")


def test_a_key_in_a_variable_needs_its_public_key(tmp_path: Path) -> None:
    with pytest.raises(AttnimgError, match="COSIGN_PUBLIC_KEY does not name a key"):
        chosen(tmp_path, COSIGN_KEY="env://KEY")
    found = chosen(tmp_path, COSIGN_KEY="env://KEY", COSIGN_PUBLIC_KEY="env://PUBLIC")
    assert found.public == "env://PUBLIC"


@pytest.mark.parametrize(
    "content",
    [b"", b"-----BEGIN ENCRYPTED SIGSTORE PRIVATE KEY-----\n", b"\x00\xff" * 999, b"ssh-ed25519 A"],
    ids=["empty", "the private one", "binary", "of SSH"],
)
def test_a_file_that_has_no_public_key_is_refused(tmp_path: Path, content: bytes) -> None:
    public = tmp_path / "cosign.pub"
    public.write_bytes(content)
    with pytest.raises(AttnimgError, match="is not a public key") as caught:
        chosen(tmp_path, sign=False, COSIGN_PUBLIC_KEY=str(public))
    assert caught.value.code == "bad-key"


@pytest.mark.parametrize("kind", ["PUBLIC KEY", "RSA PUBLIC KEY"])
def test_every_public_key_is_taken(tmp_path: Path, kind: str) -> None:
    public = tmp_path / "cosign.pub"
    public.write_text(f"-----BEGIN {kind}-----\n")
    assert chosen(tmp_path, sign=False, COSIGN_PUBLIC_KEY=str(public)).public == str(public)


def test_who_only_verifies_a_rehearsal_makes_no_key(tmp_path: Path) -> None:
    """It would be another key than the image's, which then seems to be signed by somebody else."""
    with pytest.raises(AttnimgError, match="there is no key to verify with") as caught:
        chosen(tmp_path, sign=False, repository=LOCAL)
    assert caught.value.code == "no-key"
    assert not [*tmp_path.iterdir()]
    (tmp_path / "rehearsal.pub").write_text(PUBLIC)
    found = chosen(tmp_path, sign=False, repository=LOCAL)
    assert found.public == str(tmp_path / "rehearsal.pub")
