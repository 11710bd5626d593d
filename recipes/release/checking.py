"""Verify a released image as a user would: from the registry alone, in an empty Docker engine.

Verified are the signature, every statement, that the statements agree with the image, and that the
image can be pulled by its digest and runs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnimg.errors import AttnimgError
from attnimg.selection.gpus_and_images import cpu_name
from recipes.release import transfer
from recipes.release.clean_engine import clean_engine, engine_variables
from recipes.release.programs import report, run
from recipes.release.publishable import OCI
from recipes.release.repository import Repository
from recipes.release.signing import KINDS, Signing, verify_signature, verify_statement

# It prints the release of torch inside.
_PROGRAM = "import attnimg, torch; print(torch.__version__)"


@dataclass(frozen=True, kw_only=True, slots=True)
class Verified:
    """An image whose signature and statements were verified.

    Attributes:
        digest: of its manifest.
        image_id: of its configuration.
        labels: of the image.
        size: of its compressed layers, in bytes.
        platform: of its configuration, "linux/amd64".
    """

    digest: str
    image_id: str
    labels: Mapping[str, str]
    size: int
    platform: str


def check_released(
    digest: str,
    repository: Repository,
    signer: Signing,
    *,
    name: str,
    folder: Path,
    expected: Mapping[str, Path] | None = None,
    platform: str = "",
) -> str:
    """Verify an image of a registry, pull it and run it; return where it was pulled to.

    Args:
        digest: of the image.
        repository: where it is.
        signer: with whose key or identity.
        name: of the image.
        folder: for the clean engine, removed afterwards.
        expected: kind -> file that was attested, where this checkout has them.
        platform: that of its entry in a manifest list; empty for any.

    Raises:
        AttnimgError: as verify_statements and run_clean; or it is for another platform than the
            list says (code "tampered").
    """
    found = verify_statements(digest, repository, signer, name=name, expected=expected)
    if platform not in ("", found.platform):
        raise _not_that(repository.at(digest), f"found {found.platform}, listed as {platform}")
    return run_clean(found, repository, folder=folder)


def verify_statements(
    digest: str,
    repository: Repository,
    signer: Signing,
    *,
    name: str,
    expected: Mapping[str, Path] | None = None,
) -> Verified:
    """Verify the signature and the statements of an image, and that these agree with it.

    Args:
        digest: of the image.
        repository: where it is.
        signer: with whose key or identity.
        name: of the image.
        expected: as in check_released.

    Raises:
        AttnimgError: something is missing, from another signer, about another image, or does not
            agree (codes "not-verified", "tampered"); the registry does not answer ("registry").
    """
    manifest = transfer.read_manifest(repository.at(digest), repository)[1]
    image_id = manifest["config"]["digest"]
    verify_signature(digest, repository, signer)
    report("  signature: verified")
    found = {kind: verify_statement(kind, digest, repository, signer) for kind in KINDS}
    report(f"  statements: verified {', '.join(found)}")
    config = transfer.read_config(repository.at(digest), repository, image_id)
    labels = config.get("config", {}).get("Labels") or {}
    faults = disagreements(
        found,
        name=name,
        platform=transfer.platform_of(config),
        image_id=image_id,
        digest=digest,
        labels=labels,
    )
    for kind, path in (expected or {}).items():
        if path.exists() and json.loads(path.read_text(encoding="utf-8")) != found[kind]:
            faults.append(f"{kind}: the registry's is not {path}")
    if faults:
        raise AttnimgError(
            f"the statements about {repository.at(digest)} do not agree with it",
            why="\n".join(faults),
            do=f"do not use it; if you made it, make release/{name} again",
            code="not-verified",
            exit_code=1,
        )
    size = sum(layer["size"] for layer in manifest["layers"])
    platform = transfer.platform_of(config)
    return Verified(digest=digest, image_id=image_id, labels=labels, size=size, platform=platform)


def disagreements(
    found: Mapping[str, Any],
    *,
    name: str,
    platform: str,
    image_id: str,
    digest: str,
    labels: Mapping[str, str],
) -> list[str]:
    """Return where the statements differ from the image; none if all agree.

    Args:
        found: kind -> verified predicate.
        name: the image's name.
        platform: that of its configuration.
        image_id: the digest of its configuration.
        digest: the digest of its manifest.
        labels: of the image.
    """
    faults = []

    def compare(what: str, value: object, wanted: object) -> None:
        if value != wanted:
            faults.append(f"{what}: found {value!r}, needed {wanted!r}")

    build = found["provenance"]["buildDefinition"]
    compare("title", labels.get(f"{OCI}.title"), f"attnimg:{name}")
    compare("provenance's image", build["externalParameters"]["image"], name)
    compare("provenance's platform", build["externalParameters"]["platform"], platform)
    compare("provenance's ID of the image", build["internalParameters"]["image"], image_id)
    if revision := labels.get(f"{OCI}.revision"):
        compare("provenance's revision", build["externalParameters"]["revision"], revision)
    compare("machine code's ID of the image", found["machine-code"]["image"], image_id)
    codes = {code for file in found["machine-code"]["files"] for code in file["codes"]}
    compare("machine code's summary", found["machine-code"]["codes"], sorted(codes))
    compare("VEX's subject", found["vex"]["@id"], f"urn:attnimg:vex:{digest}")
    component = found["cyclonedx"]["metadata"]["component"]
    compare("the SBOM's image", component.get("version"), image_id)
    if not found["cyclonedx"].get("components") or not found["spdx"].get("packages"):
        faults.append("an SBOM lists no package")
    return faults


def run_clean(image: Verified, repository: Repository, *, folder: Path) -> str:
    """Pull an image into an engine that has none, and run it; return where that was.

    Where no second engine can be started, or this machine has another platform, it is pulled into
    an empty folder, and not run.

    Raises:
        AttnimgError: it can't be pulled whole (codes "registry", "program"), or what arrives is
            another image (code "tampered").
    """
    reference = repository.at(image.digest)
    if image.platform != (here := f"linux/{cpu_name(os.uname().machine)}"):
        return _pull_only(image, repository, folder, why=f"it was not run: this machine is {here}")
    with clean_engine(folder / "engine", size=image.size) as engine:
        if not engine:
            why = "no second engine could be started"
            return _pull_only(image, repository, folder, why=why)

        def docker(*arguments: str) -> str:
            command, env = ["docker", *arguments], engine_variables(engine)
            return run(command, host=repository.host, env=env).strip()

        docker("pull", "-q", reference)
        pulled = docker("image", "inspect", "--format", "{{.Id}}", reference)
        # An engine with containerd's image store has the manifest's digest as the ID.
        if pulled not in (image.image_id, image.digest):
            raise _not_that(reference, f"found the ID {pulled}, needed {image.image_id}")
        options = ("--rm", "--network=none", "--env=OMP_NUM_THREADS=1")
        version = docker("run", *options, reference, "python", "-c", _PROGRAM)
        needed = image.labels.get("attnimg.torch", "")
        if version.partition("+")[0] != needed:
            raise _not_that(reference, f"found torch {version}, needed {needed}, the label's")
    text = f"a clean engine, run there with torch {version}"
    report(f"  pulled into {text}")
    return text


def _pull_only(image: Verified, repository: Repository, folder: Path, *, why: str) -> str:
    """Pull an image into an empty folder, and remove it; return where that was."""
    transfer.pull(image.digest, repository, folder / "pulled")
    transfer.remove(folder / "pulled")
    text = f"a clean folder, all digests compared; {why}"
    report(f"  pulled into {text}")
    return text


def _not_that(reference: str, why: str) -> AttnimgError:
    return AttnimgError(
        f"{reference} is not the expected image", why=why, do="do not use it", code="tampered",
        exit_code=1,
    )  # fmt: skip
