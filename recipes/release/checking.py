"""Verify a released image as a user would: from the registry alone, in an engine that has nothing.

The signature, every statement about it, that these agree with one another, and that the image can
be pulled by its digest and runs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attnimg.errors import AttnimgError
from recipes.release import transfer
from recipes.release.clean_engine import clean_engine
from recipes.release.place import Place
from recipes.release.programs import report, run
from recipes.release.publishable import OCI
from recipes.release.signing import KINDS, Signing, verify_signature, verify_statement

# It prints the release of torch inside.
_PROGRAM = "import attnimg, torch; print(torch.__version__)"


def check_released(
    digest: str,
    place: Place,
    signer: Signing,
    *,
    name: str,
    folder: Path,
    expected: Mapping[str, Path] | None = None,
) -> str:
    """Verify an image of a registry; return where it was pulled to.

    Args:
        digest: of the image.
        place: where it is.
        signer: with whose key or identity.
        name: of the image.
        folder: for the clean engine and what is pulled, both removed afterwards.
        expected: kind -> file that was attested, where this checkout has them.

    Raises:
        AttnimgError: something is missing, from another signer, about another image, or does not
            agree (codes "not-verified", "tampered", "registry").
    """
    manifest = transfer.read_manifest(place.at(digest), place)[1]
    image_id = manifest["config"]["digest"]
    verify_signature(digest, place, signer)
    report("  signature: verified")
    found = {kind: verify_statement(kind, digest, place, signer) for kind in KINDS}
    report(f"  statements: verified {', '.join(found)}")
    config = transfer.read_config(place.at(digest), place, image_id)
    labels = config.get("config", {}).get("Labels") or {}
    faults = [*disagreements(found, name=name, image_id=image_id, digest=digest, labels=labels)]
    for kind, path in (expected or {}).items():
        if path.exists() and json.loads(path.read_text(encoding="utf-8")) != found[kind]:
            faults.append(f"{kind}: the registry's is not {path}")
    if faults:
        raise AttnimgError(
            f"the statements about {place.at(digest)} do not agree with it",
            why="\n".join(faults),
            do=f"do not use it; if you made it, make release/{name} again",
            code="not-verified",
            exit_code=1,
        )
    return _run_clean(
        digest, place, image_id=image_id, torch=labels.get("attnimg.torch", ""), folder=folder
    )


def disagreements(
    found: Mapping[str, Any],
    *,
    name: str,
    image_id: str,
    digest: str,
    labels: Mapping[str, str],
) -> list[str]:
    """Return what the statements say otherwise than the image; none if all agree.

    Args:
        found: kind -> verified predicate.
        name: the image's name.
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


def _run_clean(digest: str, place: Place, *, image_id: str, torch: str, folder: Path) -> str:
    """Pull the image into an engine without any image and run it; return where that was."""
    reference = place.at(digest)
    with clean_engine(folder / "engine") as host:
        if not host:
            transfer.pull(digest, place, folder / "pulled")
            transfer.remove(folder / "pulled")
            text = "a clean folder, all digests compared; no second engine could be started"
            report(f"  pulled into {text}")
            return text
        env = {**os.environ, "DOCKER_HOST": host}
        run(["docker", "pull", "-q", reference], host=place.host, env=env)
        inspect = ["docker", "image", "inspect", "--format", "{{.Id}}", reference]
        if (pulled := run(inspect, host=place.host, env=env).strip()) not in (image_id, digest):
            raise _not_that(reference, f"found the ID {pulled}, needed {image_id}")
        command = ["docker", "run", "--rm", "--network=none", "--env=OMP_NUM_THREADS=1", reference]
        version = run([*command, "python", "-c", _PROGRAM], host=place.host, env=env).strip()
        if version.partition("+")[0] != torch:
            raise _not_that(reference, f"found torch {version}, needed {torch}, the label's")
    text = f"a clean engine, run there with torch {version}"
    report(f"  pulled into {text}")
    return text


def _not_that(reference: str, why: str) -> AttnimgError:
    return AttnimgError(
        f"{reference} is not the image that it says", why=why, do="do not use it", code="tampered",
        exit_code=1,
    )  # fmt: skip
