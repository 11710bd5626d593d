"""What is stated about a released image: its origin, its machine code, its vulnerabilities."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from small_image import package, save

from attnimg.errors import AttnimgError
from recipes.artifact.code_list import list_machine_code
from recipes.artifact.facts import Artifact, Elf, File
from recipes.artifact.layout import write_layout
from recipes.artifact.read import read_image
from recipes.facts import Cve
from recipes.read import read_recipes
from recipes.release.checking import disagreements
from recipes.release.provenance import LAPTOP, find_builder, provenance
from recipes.release.publishable import OCI
from recipes.release.transfer import layout_manifest
from recipes.release.vex import vex
from recipes.solve.plan import solve_all

ROOT = Path(__file__).parents[3]
RECIPES = read_recipes(ROOT)
PLANS = {plan.image.name: plan for plan in solve_all(RECIPES)}
COMMIT = "0123456789abcdef0123456789abcdef01234567"
DIGEST, IMAGE_ID = f"sha256:{'a' * 64}", f"sha256:{'b' * 64}"
SOURCE = "https://example.com/attnimg"


def origin(image: str, revision: str = COMMIT, warnings: tuple[str, ...] = ()) -> dict[str, Any]:
    plan = PLANS[image]
    names = (f"torch-{plan.lock}", f"toolchain-{plan.lock}", image)
    paths = [f"requirements/images/{name}.txt" for name in names]
    return provenance(
        plan,
        targets=json.loads((ROOT / "docker/docker-bake.json").read_text().replace("${ARCH}", ""))[
            "target"
        ],
        locks={path: (ROOT / path).read_text() for path in paths if (ROOT / path).exists()},
        base={"name": "python:3.11-slim-bookworm", "digest": DIGEST},
        image_id=IMAGE_ID,
        source=SOURCE,
        revision=revision,
        created="2026-11-27T00:00:00Z",
        builder=find_builder({}),
        warnings=warnings,
    )


def test_the_provenance_names_every_source_with_its_hash() -> None:
    build = origin("hopper")["buildDefinition"]
    parts = build["resolvedDependencies"]
    digests = {part.get("uri", part.get("name")): part.get("digest") for part in parts}
    assert digests[f"git+{SOURCE}@{COMMIT}"] == {"gitCommit": COMMIT}
    assert digests["docker:python:3.11-slim-bookworm"] == {"sha256": "a" * 64}
    torch = [part for part in parts if part.get("uri") == "pkg:pypi/torch@2.14.1"]
    assert torch
    assert all(len(part["digest"]["sha256"]) == 64 for part in torch)
    for step in PLANS["hopper"].steps:
        kernel = step.kernel
        if kernel.form == "git":
            repository, _, commit = kernel.source.partition("@")
            uri = f"git+https://github.com/{repository}@{commit}"
            assert digests[uri] == {"gitCommit": commit}
        else:
            name, _, version = kernel.source.partition("==")
            assert digests[f"pkg:pypi/{name}@{version}"] == {"sha256": kernel.sha256}
        for path in kernel.submodules.values():
            assert any(path.partition("@")[2] in str(uri) for uri in digests)
        for patch in kernel.patches:
            listed = f"recipes/patches/{kernel.name}/{patch.name}" in digests
            assert listed == (not patch.name.startswith("trim/"))
    assert all(part.get("digest") for part in parts)


def test_the_provenance_has_the_recipe_the_arguments_and_the_builder() -> None:
    found = origin("hopper")
    build = found["buildDefinition"]
    assert build["externalParameters"] == {
        "image": "hopper",
        "recipe": "recipes/images/hopper.toml",
        "platform": "linux/amd64",
        "source": SOURCE,
        "revision": COMMIT,
    }
    assert build["internalParameters"]["image"] == IMAGE_ID
    arguments = build["internalParameters"]["buildArgs"]
    assert arguments["hopper_common"]["LOCK"] == PLANS["hopper"].lock
    assert arguments["hopper_flash-attn"]["KERNEL"] == "flash-attn"
    assert not [target for target in arguments if not target.startswith("hopper")]
    assert build["internalParameters"]["kernelKeys"]["flash-attn"]
    assert found["runDetails"]["builder"]["id"] == LAPTOP
    frontier = origin("ampere-frontier")["buildDefinition"]["externalParameters"]
    assert (ROOT / frontier["recipe"]).is_file()


def test_the_provenance_of_a_rehearsal_says_so_and_that_of_a_release_does_not() -> None:
    assert "rehearsal" not in origin("cpu")["buildDefinition"]["internalParameters"]
    found = origin("cpu", f"{COMMIT}-dirty", ("label created: found none",))["buildDefinition"]
    assert found["internalParameters"]["rehearsal"] == ["label created: found none"]
    assert found["resolvedDependencies"][0]["annotations"] == {"state": "dirty"}
    assert found["externalParameters"]["revision"] == f"{COMMIT}-dirty"


def test_the_builder_of_a_workflow_is_the_workflow() -> None:
    env = {
        "GITHUB_SERVER_URL": "https://github.com",
        "GITHUB_WORKFLOW_REF": "a/b/.github/workflows/release.yml@refs/tags/v1",
        "GITHUB_REPOSITORY": "a/b",
        "GITHUB_RUN_ID": "7",
        "GITHUB_RUN_ATTEMPT": "2",
    }
    builder = find_builder(env)
    assert builder.id == "https://github.com/a/b/.github/workflows/release.yml@refs/tags/v1"
    assert builder.run == "https://github.com/a/b/actions/runs/7/attempts/2"


@pytest.mark.parametrize(
    "env",
    [
        {"GITHUB_RUN_ID": "7"},
        {"GITHUB_RUN_ID": "7"}
        | dict.fromkeys(("GITHUB_SERVER_URL", "GITHUB_WORKFLOW_REF", "GITHUB_REPOSITORY"), ""),
    ],
)
def test_a_run_that_is_half_known_is_no_builder(env: dict[str, str]) -> None:
    with pytest.raises(AttnimgError, match="GITHUB_WORKFLOW_REF") as caught:
        find_builder(env)
    assert "unset GITHUB_RUN_ID" in caught.value.do
    assert find_builder({"GITHUB_RUN_ID": ""}).id == find_builder({}).id == LAPTOP


# ---- vulnerabilities ----------------------------------------------------------------------------

CVE = Cve(
    id="CVE-2026-1", package="flash_attn", version="2.8.3", status="not_affected",
    justification="vulnerable_code_not_present", reason="read", expires=date(2027, 1, 1),
)  # fmt: skip
REPOSITORY = "registry.example.com:5000/team/attnimg"


def say(
    *cves: Cve, purls: tuple[str, ...] = ("pkg:pypi/torch@2.13.0",), day: str = "2026-11-27"
) -> dict[str, Any]:
    return vex(
        cves, sbom={"components": [{"purl": purl} for purl in purls]}, repository=REPOSITORY,
        digest=DIGEST, author=SOURCE, moment=f"{day}T00:00:00Z",
    )  # fmt: skip


def test_a_vulnerability_of_an_installed_package_is_stated_with_its_reason() -> None:
    (found,) = say(CVE, purls=("pkg:pypi/flash-attn@2.8.3",))["statements"]
    (product,) = found["products"]
    assert product["@id"] == (
        f"pkg:oci/attnimg@sha256%3A{'a' * 64}"
        "?repository_url=registry.example.com%3A5000/team/attnimg"
    )
    assert product["subcomponents"] == [{"@id": "pkg:pypi/flash-attn@2.8.3"}]
    assert (found["status"], found["justification"], found["impact_statement"]) == (
        "not_affected",
        "vulnerable_code_not_present",
        "read",
    )


def test_a_vulnerability_of_a_package_that_the_image_lacks_is_stated_as_that() -> None:
    (found,) = say(CVE, purls=("pkg:pypi/torch@2.13.0%2Bcpu", "pkg:deb/debian/flash-attn@2.8.3"))[
        "statements"
    ]
    assert (found["status"], found["justification"]) == ("not_affected", "component_not_present")


@pytest.mark.parametrize(
    ("status", "field"),
    [
        ("affected", "action_statement"),
        ("fixed", "status_notes"),
        ("under_investigation", "status_notes"),
    ],
)
def test_the_reason_stands_in_the_field_of_its_status(status: Any, field: str) -> None:
    cve = replace(CVE, status=status, justification="")
    (found,) = say(cve, purls=("pkg:pypi/flash_attn@2.8.3",))["statements"]
    assert found[field] == "read"
    assert "justification" not in found


def test_a_package_of_debian_is_found_by_its_version() -> None:
    cve = replace(CVE, package="deb:base-files", version="12.4+deb12u15")
    purl = "pkg:deb/debian/base-files@12.4%2Bdeb12u15?arch=amd64&distro=debian-12"
    (found,) = say(cve, purls=(purl,))["statements"]
    assert found["products"][0]["subcomponents"] == [
        {"@id": "pkg:deb/debian/base-files@12.4%2Bdeb12u15"}
    ]


@pytest.mark.parametrize(
    ("purl", "why"),
    [
        ("pkg:pypi/flash-attn", "the image has it without a version"),
        ("pkg:pypi/flash-attn@2.8.4", "is for flash_attn 2.8.3, the image has 2.8.4"),
    ],
)
def test_an_answer_that_does_not_hold_is_refused(purl: str, why: str) -> None:
    with pytest.raises(AttnimgError) as caught:
        say(CVE, purls=(purl,))
    assert why in caught.value.why
    say(CVE, purls=("pkg:pypi/flash-attn@2.8.3",))


@pytest.mark.parametrize(
    ("purl", "stated"),
    [
        ("pkg:deb/ubuntu/libc6@2.3", "pkg:deb/ubuntu/libc6@2.3"),
        ("pkg:deb/debian/libc6@1%3A2.3+b1?arch=amd64", "pkg:deb/debian/libc6@1%3A2.3%2Bb1"),
        ("pkg:deb/debian/libc6@1:2.3%2Bb1#x", "pkg:deb/debian/libc6@1:2.3%2Bb1"),
        ("pkg:deb/libc6@2.3", "pkg:deb/libc6@2.3"),
    ],
)
def test_a_package_is_found_in_each_spelling_of_its_url(purl: str, stated: str) -> None:
    version = "2.3" if purl.endswith("@2.3") else "1:2.3+b1"
    cve = replace(CVE, package="deb:libc6", version=version, status="affected", justification="")
    (found,) = say(cve, purls=(purl,))["statements"]
    assert found["status"] == "affected"
    assert found["products"][0]["subcomponents"] == [{"@id": stated}]


def test_every_installed_version_needs_the_answer() -> None:
    right, other = "pkg:pypi/flash-attn@2.8.3", "pkg:pypi/flash-attn@2.8.4"
    for purls in ((right, other), (other, right)):
        with pytest.raises(AttnimgError, match=r"the image has 2\.8\.4"):
            say(CVE, purls=purls)
    (found,) = say(CVE, purls=(right, right))["statements"]
    assert found["products"][0]["subcomponents"] == [{"@id": right}]


def of_sbom(*components: dict[str, Any]) -> dict[str, Any]:
    return vex(
        (CVE,), sbom={"components": components}, repository=REPOSITORY, digest=DIGEST,
        author=SOURCE, moment="2026-11-27T00:00:00Z",
    )  # fmt: skip


@pytest.mark.parametrize("purl", [{}, {"purl": None}, {"purl": "flash-attn"}, {"purl": "pkg:x"}])
def test_a_package_without_a_package_url_is_not_taken_for_absent(purl: dict[str, Any]) -> None:
    with pytest.raises(AttnimgError, match="without a package URL"):
        of_sbom({"type": "library", "name": "Flash_Attn", "version": "2.8.3", **purl})
    # Other packages may lack one; files and the system are no packages.
    torch = {"type": "library", "name": "torch", "version": "2.13.0", **purl}
    file = {"type": "file", "name": "flash-attn", **purl}
    (found,) = of_sbom(torch, file)["statements"]
    assert found["justification"] == "component_not_present"


@pytest.mark.parametrize("components", [(), ({"type": "file", "name": "/etc/passwd"},)])
def test_an_sbom_without_packages_says_nothing_about_an_image(components: Any) -> None:
    with pytest.raises(AttnimgError, match="lists no package"):
        of_sbom(*components)


def test_two_answers_to_one_question_are_refused_and_those_on_two_packages_agree() -> None:
    again = replace(CVE, package="Flash-Attn", status="affected", justification="")
    with pytest.raises(AttnimgError, match="two answers"):
        say(CVE, again)
    other = replace(CVE, package="torch", version="2.13.0", status="affected", justification="")
    absent, present = say(CVE, other)["statements"]
    (subject,) = absent["products"]
    assert subject["subcomponents"] == [{"@id": "pkg:pypi/flash-attn"}]
    assert (absent["status"], present["status"]) == ("not_affected", "affected")


def test_the_vulnerability_of_flash_attention_is_answered() -> None:
    (cve,) = [one for one in RECIPES.cves if one.id == "CVE-2026-31253"]
    assert cve.version == RECIPES.kernels["flash-attn"].version
    assert "weights_only" in cve.reason


# ---- machine code, the image as it is pushed, and whether all statements agree -------------------


def small(folder: Path) -> tuple[Artifact, str]:
    labels = {"Labels": {f"{OCI}.title": "attnimg:cpu"}}
    archive = save(
        folder / "image.tar", {"etc/text": "x" * 5000}, package("one", "1.0"), config=labels
    )
    blobs = folder / "layout/blobs/sha256"
    blobs.mkdir(parents=True)
    artifact = read_image(archive, log=lambda _: None, blobs=blobs)
    return artifact, write_layout(folder / "layout", artifact.layers, artifact.config)


def test_the_layout_has_the_checked_layers_and_the_configuration_byte_for_byte(
    tmp_path: Path,
) -> None:
    artifact, digest = small(tmp_path)
    found, manifest, config = layout_manifest(tmp_path / "layout")
    assert found == digest
    assert [layer["size"] for layer in manifest["layers"]] == [
        layer.zstd_bytes for layer in artifact.layers
    ]
    assert manifest["config"]["digest"] == artifact.image_id
    assert config == json.loads(artifact.config)
    for path in (tmp_path / "layout/blobs/sha256").iterdir():
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name
    # Without a folder the same sizes and digests are measured, and nothing is kept.
    again = read_image(tmp_path / "image.tar", log=lambda _: None)
    assert again.layers == artifact.layers


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder, layer: (folder / "index.json").unlink(),
        lambda folder, layer: (folder / "index.json").write_text("{"),
        lambda folder, layer: (folder / "index.json").write_text('{"manifests": []}'),
        lambda folder, layer: layer.unlink(),
        lambda folder, layer: layer.write_bytes(b"cut"),
    ],
    ids=["no index", "half an index", "an empty index", "no layer", "half a layer"],
)
def test_a_layout_that_is_not_whole_is_refused(tmp_path: Path, damage: Callable) -> None:
    artifact, _ = small(tmp_path)
    folder = tmp_path / "layout"
    damage(folder, folder / "blobs/sha256" / artifact.layers[0].digest.removeprefix("sha256:"))
    with pytest.raises(AttnimgError) as caught:
        layout_manifest(folder)
    assert caught.value.code == "no-layout"
    assert caught.value.do.startswith("make gate/")


def test_the_list_of_machine_code_has_every_library_with_its_code(tmp_path: Path) -> None:
    def library(path: str, *codes: str, visible: bool = True) -> File:
        elf = Elf(machine="EM_X86_64", codes=frozenset(codes))
        return File(path=path, layer=0, bytes=1, mode=0o644, visible=visible, digest=path, elf=elf)

    artifact, _ = small(tmp_path)
    owned = "opt/venv/lib/python3.11/site-packages/one/k.so"
    one = replace(artifact.distributions[0], files=frozenset({owned}))
    files = (
        library(owned, "sm_90a", "sm_80"),
        library("lib/c.so"),
        library("gone.so", "sm_70", visible=False),
    )
    found = list_machine_code(replace(artifact, files=files, distributions=(one,)))
    assert found["image"] == artifact.image_id
    assert found["codes"] == ["sm_80", "sm_90a"]
    assert [(f["path"], f["package"], f["codes"]) for f in found["files"]] == [
        ("lib/c.so", "", []),
        (owned, "one", ["sm_80", "sm_90a"]),
    ]


RIGHT: dict[str, Any] = {
    "provenance": provenance(
        PLANS["cpu"], targets={}, locks={}, base={"name": "base", "digest": ""}, image_id=IMAGE_ID,
        source=SOURCE, revision=COMMIT, created="", builder=find_builder({}), warnings=(),
    ),
    "machine-code": {"image": IMAGE_ID, "codes": ["sm_80"], "files": [{"codes": ["sm_80"]}]},
    "vex": say(CVE),
    "cyclonedx": {
        "metadata": {"component": {"version": IMAGE_ID}}, "components": [{"name": "one"}],
    },
    "spdx": {"packages": [{"name": "one"}]},
}  # fmt: skip
LABELS = {f"{OCI}.title": "attnimg:cpu", f"{OCI}.revision": COMMIT}


def disagreeing(change: Callable[[dict[str, Any]], object]) -> list[str]:
    said = copy.deepcopy(RIGHT)
    change(said)
    return disagreements(said, name="cpu", image_id=IMAGE_ID, digest=DIGEST, labels=LABELS)


def test_right_statements_agree_with_the_image() -> None:
    assert disagreeing(lambda said: None) == []


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda said: said["machine-code"].update(image=DIGEST), "machine code's ID"),
        (lambda said: said["machine-code"].update(codes=[]), "machine code's summary"),
        (lambda said: said["vex"].update({"@id": "urn:attnimg:vex:other"}), "VEX's subject"),
        (lambda said: said["cyclonedx"].update(components=[]), "lists no package"),
        (lambda said: said["spdx"].update(packages=[]), "lists no package"),
        (
            lambda said: said["cyclonedx"]["metadata"]["component"].update(version=DIGEST),
            "the SBOM's image",
        ),
        (
            lambda said: said["provenance"]["buildDefinition"]["externalParameters"].update(
                revision="f" * 40
            ),
            "provenance's revision",
        ),
        (
            lambda said: said["provenance"]["buildDefinition"]["externalParameters"].update(
                image="hopper"
            ),
            "provenance's image",
        ),
        (
            lambda said: said["provenance"]["buildDefinition"]["internalParameters"].update(
                image=DIGEST
            ),
            "provenance's ID of the image",
        ),
    ],
)
def test_a_statement_about_something_else_does_not_agree(
    change: Callable[[dict[str, Any]], object], found: str
) -> None:
    (fault,) = disagreeing(change)
    assert fault.startswith(found) or found in fault
