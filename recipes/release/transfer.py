"""Copy images and manifest lists between folders and registries with skopeo, always by digest."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnimg.errors import AttnimgError
from recipes.release.programs import run
from recipes.release.repository import Repository

DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_OCI_INDEX = "application/vnd.oci.image.index.v1+json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Listed:
    """One image of a manifest list.

    Attributes:
        platform: "linux/arm64".
        digest: of its manifest.
        size: of its manifest, in bytes.
        media_type: of its manifest.
    """

    platform: str
    digest: str
    size: int
    media_type: str


def listed(digest: str, platform: str, repository: Repository) -> Listed:
    """Return an image of the registry as an entry of a manifest list.

    Raises:
        AttnimgError: as read_manifest; or its configuration is for another platform (code
            "other-platform").
    """
    _, text = _read_bytes(repository.at(digest), repository)
    _, manifest = read_manifest(repository.at(digest), repository)
    config = read_config(repository.at(digest), repository, manifest["config"]["digest"])
    found = platform_of(config)
    if found != platform:
        raise AttnimgError(
            f"{repository.at(digest)} is for another platform",
            why=f"found {found} in its configuration, needed {platform}",
            do=f"build it again for {platform}, and release it",
            code="other-platform",
            exit_code=1,
        )
    return Listed(
        platform=platform,
        digest=digest,
        size=len(text.encode(errors="surrogateescape")),
        media_type=str(manifest.get("mediaType") or _OCI_MANIFEST),
    )


def platform_of(config: Mapping[str, Any]) -> str:
    """Return the platform of an image by its configuration: "linux/amd64"."""
    return f"{config.get('os', 'unknown')}/{config.get('architecture', 'unknown')}"


def list_text(images: Iterable[Listed]) -> str:
    """Return the text of a manifest list: the same images give the same bytes, and one digest."""
    manifests = []
    for image in images:
        system, _, architecture = image.platform.partition("/")
        manifests.append(
            {
                "mediaType": image.media_type,
                "digest": image.digest,
                "size": image.size,
                "platform": {"architecture": architecture, "os": system},
            }
        )
    content = {"schemaVersion": 2, "mediaType": _OCI_INDEX, "manifests": manifests}
    return json.dumps(content, indent=1)


def push_list(images: Iterable[Listed], repository: Repository) -> str:
    """Push a manifest list of images that the registry has; return its digest.

    Raises:
        AttnimgError: the registry does not take it (code "registry").
    """
    text = list_text(images)
    digest = _sha256(text)
    if has(digest, repository):
        return digest
    with tempfile.TemporaryDirectory() as temporary:
        layout = Path(temporary) / "list"
        (layout / "blobs/sha256").mkdir(parents=True)
        (layout / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}', encoding="utf-8")
        (layout / "blobs/sha256" / digest.removeprefix("sha256:")).write_bytes(text.encode())
        entry = {"mediaType": _OCI_INDEX, "digest": digest, "size": len(text.encode())}
        index = {"schemaVersion": 2, "manifests": [entry]}
        (layout / "index.json").write_text(json.dumps(index), encoding="utf-8")
        tls = [f"--dest-tls-verify={not repository.loopback}".lower()]
        command = ["skopeo", "copy", "-q", "--preserve-digests", "--multi-arch=index-only", *tls]
        command += [f"oci:{layout}", f"docker://{repository.at(digest)}"]
        run(command, host=repository.host, writes=True)
    return digest


def read_list(reference: str, repository: Repository) -> tuple[str, dict[str, str]]:
    """Return the digest of a reference in the registry, and platform -> digest of its images.

    The platform of a single image is that of its configuration.

    Args:
        reference: REPOSITORY:TAG or REPOSITORY@DIGEST.
        repository: where it is.

    Raises:
        AttnimgError: there is none, or it is neither an image nor a list of images (code
            "not-an-image").
    """
    digest, text = _read_bytes(reference, repository)
    content = _parse(text)
    if not isinstance(content, dict) or not isinstance(content.get("manifests"), list):
        _, manifest = read_manifest(reference, repository)
        config = read_config(reference, repository, manifest["config"]["digest"])
        return digest, {platform_of(config): digest}
    found: dict[str, str] = {}
    for entry in content["manifests"]:
        platform = entry.get("platform") if isinstance(entry, dict) else None
        own = entry.get("digest") if isinstance(entry, dict) else None
        if not isinstance(platform, dict) or not DIGEST.fullmatch(str(own)):
            raise AttnimgError(
                f"{reference} is not a list of images",
                why="found an entry without a platform or the digest of a manifest",
                do="give the digest of one image, or correct REGISTRY",
                code="not-an-image",
                exit_code=1,
            )
        found[platform_of(platform)] = str(own)
    return digest, found


def push(layout: Path, digest: str, repository: Repository) -> None:
    """Push an OCI layout by its digest, under no tag; layers that are there are not sent again.

    Raises:
        AttnimgError: the registry does not take it (code "registry").
    """
    tls = [f"--dest-tls-verify={not repository.loopback}".lower()]
    command = ["skopeo", "copy", "--preserve-digests", *tls]
    command += [f"oci:{layout}", f"docker://{repository.at(digest)}"]
    run(command, host=repository.host, show=True, writes=True)


def pull(digest: str, repository: Repository, folder: Path) -> None:
    """Pull an image into an empty folder; skopeo compares the digest of everything it reads.

    Raises:
        AttnimgError: the registry has other bytes, or does not answer (code "registry").
    """
    remove(folder)
    tls = [f"--src-tls-verify={not repository.loopback}".lower()]
    command = ["skopeo", "copy", "-q", "--preserve-digests", *tls]
    run([*command, f"docker://{repository.at(digest)}", f"oci:{folder}"], host=repository.host)


def read_manifest(reference: str, repository: Repository) -> tuple[str, dict[str, Any]]:
    """Return the digest and the manifest of an image in the registry.

    Args:
        reference: REPOSITORY:TAG or REPOSITORY@DIGEST.
        repository: where it is.

    Raises:
        AttnimgError: there is none, its bytes are not those of the digest, or it is no manifest
            of one image (code "not-an-image").
    """
    digest, text = _read_bytes(reference, repository)
    manifest = _parse(text)
    if fault := _manifest_fault(manifest):
        raise AttnimgError(
            f"{reference} is not an image",
            why=f"found {fault}, needed the manifest of one image",
            do="give the digest of one image, or correct REGISTRY",
            code="not-an-image",
            exit_code=1,
        )
    return digest, manifest


def _read_bytes(reference: str, repository: Repository) -> tuple[str, str]:
    """Return the digest and the text of what the registry has under a name."""
    tls = f"--tls-verify={not repository.loopback}".lower()
    text = run(["skopeo", "inspect", "--raw", tls, f"docker://{reference}"], host=repository.host)
    digest = _sha256(text)
    asked = reference.partition("@")[2]
    if asked and asked != digest:
        raise _tampered(repository, f"found {digest} under {asked}")
    return digest, text


def _manifest_fault(manifest: Any) -> str:
    """Return what stands in place of the manifest of one image; empty if it is one."""
    if not isinstance(manifest, dict):
        return "something that is no JSON object"
    if isinstance(manifest.get("manifests"), list):
        return f"an index of {len(manifest['manifests'])} manifests"
    config, layers = manifest.get("config"), manifest.get("layers")
    if not isinstance(config, dict) or not DIGEST.fullmatch(str(config.get("digest"))):
        return "a manifest without the digest of a configuration"
    if not isinstance(layers, list) or not all(
        isinstance(layer, dict) and type(layer.get("size")) is int for layer in layers
    ):
        return "a manifest without the sizes of layers"
    return ""


def _parse(text: str) -> Any:
    """Return the value of JSON; None if it is something else."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _sha256(text: str) -> str:
    digest = hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()
    return f"sha256:{digest}"


def has(digest: str, repository: Repository) -> bool:
    """Return whether the registry has an image.

    Raises:
        AttnimgError: it does not answer.
    """
    return _digest_of(repository.at(digest), repository) is not None


def read_config(reference: str, repository: Repository, image_id: str) -> dict[str, Any]:
    """Return the configuration of an image in the registry.

    Raises:
        AttnimgError: its bytes are not those of its digest, `image_id` (code "tampered").
    """
    tls = f"--tls-verify={not repository.loopback}".lower()
    command = ["skopeo", "inspect", "--config", "--raw", tls, f"docker://{reference}"]
    text = run(command, host=repository.host)
    if (found := _sha256(text)) != image_id:
        raise _tampered(repository, f"found {found} under {image_id}")
    config = _parse(text)
    settings = config.get("config") if isinstance(config, dict) else None
    labels = settings.get("Labels") if isinstance(settings, dict) else None
    if not isinstance(config, dict) or not isinstance(labels, dict | None):
        raise _tampered(repository, f"found no configuration of an image under {image_id}")
    # Both may be null, as if they were absent.
    return {**config, "config": {**(settings or {}), "Labels": labels or {}}}


def find_tag(tag: str, repository: Repository) -> str | None:
    """Return the digest that a tag names; None if there is no such tag.

    Raises:
        AttnimgError: the registry does not answer.
    """
    return _digest_of(f"{repository.name}:{tag}", repository)


def _digest_of(reference: str, repository: Repository) -> str | None:
    try:
        return _read_bytes(reference, repository)[0]
    except AttnimgError as error:
        if error.code == "no-image":
            return None
        raise


def tag(digest: str, name: str, repository: Repository) -> None:
    """Add a tag to an image or a manifest list in the registry, without changing a byte of it.

    Raises:
        AttnimgError: the registry does not take it (code "registry").
    """
    tls = f"{not repository.loopback}".lower()
    # index-only: the images of a list are already in the same repository.
    command = ["skopeo", "copy", "-q", "--preserve-digests", "--multi-arch=index-only"]
    command += [f"--src-tls-verify={tls}", f"--dest-tls-verify={tls}"]
    run(
        [*command, f"docker://{repository.at(digest)}", f"docker://{repository.name}:{name}"],
        host=repository.host,
        writes=True,
    )


def layout_manifest(layout: Path) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Return the digest, the manifest and the configuration of an OCI layout.

    Raises:
        AttnimgError: it is not there, or not whole (code "no-layout").
    """
    try:
        index = json.loads((layout / "index.json").read_text(encoding="utf-8"))
        digest = index["manifests"][0]["digest"]
        manifest = json.loads(_blob(layout, digest).read_bytes())
        config = json.loads(_blob(layout, manifest["config"]["digest"]).read_bytes())
        for layer in manifest["layers"]:
            if _blob(layout, layer["digest"]).stat().st_size != layer["size"]:
                raise ValueError(f"{layer['digest']} has another size")
    except (OSError, ValueError, KeyError, IndexError) as error:
        name = layout.name.removesuffix(".oci")
        raise AttnimgError(
            f"there is no image to push in {layout}",
            why=f"{type(error).__name__}: {error}",
            do=f"make gate/{name}, which writes it",
            code="no-layout",
        ) from error
    return digest, manifest, config


def _tampered(repository: Repository, why: str) -> AttnimgError:
    return AttnimgError(
        f"the registry {repository.host} has another image than it says",
        why=why,
        do="do not use this image; report it to the operator of the registry",
        code="tampered",
        exit_code=1,
    )


def _blob(layout: Path, digest: str) -> Path:
    if not DIGEST.fullmatch(digest):
        raise ValueError(f"{digest} is not a digest")
    return layout / "blobs/sha256" / digest.removeprefix("sha256:")


def remove(folder: Path) -> None:
    """Remove a folder of an image, if it is there."""
    shutil.rmtree(folder, ignore_errors=True)
