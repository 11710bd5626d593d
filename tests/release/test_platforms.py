"""A tag names a list with the image of each platform that was verified, and of no other."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import (
    MOMENT,
    PLAN,
    RECIPES,
    REVISION,
    ROOT,
    LocalRegistry,
    MakeSmall,
    Small,
    publish,
    running_registry,
)  # fmt: skip

from attnimg.errors import AttnimgError
from recipes.facts import ImagePlan
from recipes.release import steps, transfer
from recipes.release.checking import check_released
from recipes.release.record import Record, read_record, write_record
from recipes.release.repository import Repository, read_registry
from recipes.release.signing import Signing

ARM64 = PLAN.others[0]
OTHER_COMMIT = "f" * 40


@pytest.fixture
def own(tmp_path: Path) -> Iterator[LocalRegistry]:
    """A registry of this test's own, since all tests give the same tags."""
    with running_registry(tmp_path / "registry") as found:
        yield found


@pytest.fixture(scope="session")
def both(make_small: MakeSmall) -> dict[str, Small]:
    """A small image for each platform."""
    return {
        "linux/amd64": make_small("for amd64"),
        "linux/arm64": make_small("for arm64", arm64=True),
    }


def verified(
    plan: ImagePlan, small: Small, repository: Repository, root: Path, *, revision: str = REVISION
) -> Record:
    """Push an image, and write the record of a release that has verified it."""
    transfer.push(small.layout, small.digest, repository)
    _, manifest, config = transfer.layout_manifest(small.layout)
    record = Record(
        image=plan.name, registry=repository.registry, image_id=manifest["config"]["digest"],
        digest=small.digest, reference=repository.at(small.digest), bytes=1, layers=(),
        labels=config["config"]["Labels"], version="0.2.0", revision=revision, started=MOMENT,
        rehearsal=("a test",), tests="tests/image",
    )  # fmt: skip
    for step in ("push", "test", "attest", "verify"):
        record = record.done(step, seconds=1)
    return write_record(record, root)


def promote(plan: ImagePlan, repository: Repository, root: Path) -> Record:
    return steps.promote(
        steps.Release(
            plan=plan, recipes=RECIPES, registry=read_registry(ROOT), repository=repository,
            root=root, rehearsal=True,
        )
    )  # fmt: skip


@pytest.mark.parametrize("plan", [PLAN, ARM64], ids=["amd64", "arm64"])
def test_both_platforms_are_one_list_whichever_is_promoted(
    own: LocalRegistry, both: dict[str, Small], tmp_path: Path, plan: ImagePlan
) -> None:
    for one in (PLAN, ARM64):
        verified(one, both[one.platform], own.repository, tmp_path)
    record = promote(plan, own.repository, tmp_path)
    digests = {platform: small.digest for platform, small in both.items()}
    assert (record.listed, record.left_out) == (digests, {})
    assert list(record.tags)[1] == "cpu"
    for tag, digest in record.tags.items():
        assert transfer.find_tag(tag, own.repository) == digest
        name = f"{own.repository.name}:{tag}"
        assert transfer.read_list(name, own.repository) == (digest, digests)
    # Both records have it, and a second promotion changes nothing.
    for one in (PLAN, ARM64):
        found = read_record(one.name, own.repository, tmp_path)
        assert found is not None
        assert (found.tags, found.listed) == (record.tags, record.listed)
    assert promote(plan, own.repository, tmp_path).tags == record.tags


@pytest.mark.parametrize("architecture", ["amd64", "arm64"])
def test_a_client_gets_the_image_of_its_platform(
    own: LocalRegistry, both: dict[str, Small], tmp_path: Path, architecture: str
) -> None:
    for one in (PLAN, ARM64):
        verified(one, both[one.platform], own.repository, tmp_path)
    promote(PLAN, own.repository, tmp_path)
    command = ["skopeo", "--override-arch", architecture, "inspect", "--config", "--raw"]
    command += ["--tls-verify=false", f"docker://{own.repository.name}:cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["architecture"] == architecture


def test_a_platform_that_was_not_verified_is_left_out_and_told(
    own: LocalRegistry,
    both: dict[str, Small],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    verified(PLAN, both["linux/amd64"], own.repository, tmp_path)
    record = promote(PLAN, own.repository, tmp_path)
    assert record.listed == {"linux/amd64": both["linux/amd64"].digest}
    _, err = capsys.readouterr()
    (why,) = record.left_out.values()
    assert "found no step in build/release/cpu-arm64-rehearsal.json, needed verify" in why
    assert "make push/cpu PLATFORM=linux/arm64" in why
    assert "warning: the tags have linux/amd64 only, without linux/arm64" in err
    # What others may have pinned does not become another list.
    verified(ARM64, both["linux/arm64"], own.repository, tmp_path)
    with pytest.raises(AttnimgError, match="is taken") as caught:
        promote(PLAN, own.repository, tmp_path)
    assert "another platform" in caught.value.why


def test_a_platform_of_another_commit_is_left_out(
    own: LocalRegistry, both: dict[str, Small], tmp_path: Path
) -> None:
    verified(PLAN, both["linux/amd64"], own.repository, tmp_path)
    verified(ARM64, both["linux/arm64"], own.repository, tmp_path, revision=OTHER_COMMIT)
    record = promote(PLAN, own.repository, tmp_path)
    assert list(record.listed) == ["linux/amd64"]
    assert f"commit {OTHER_COMMIT} in its record, needed 0.2.0" in record.left_out["linux/arm64"]


def test_an_image_of_another_platform_is_not_listed(
    own: LocalRegistry, both: dict[str, Small], tmp_path: Path
) -> None:
    verified(PLAN, both["linux/amd64"], own.repository, tmp_path)
    record = verified(ARM64, both["linux/amd64"], own.repository, tmp_path)
    assert record.image == "cpu-arm64"
    with pytest.raises(AttnimgError, match="is for another platform") as caught:
        promote(PLAN, own.repository, tmp_path)
    assert "found linux/amd64 in its configuration, needed linux/arm64" in caught.value.why
    assert transfer.find_tag("cpu", own.repository) is None


def test_a_list_is_verified_image_by_image(
    registry: LocalRegistry, signer: Signing, both: dict[str, Small], tmp_path: Path
) -> None:
    small, repository = both["linux/arm64"], registry.repository
    publish(small, repository, signer)
    # This machine has another platform, so it is pulled and not run.
    where = check_released(
        small.digest, repository, signer, name="cpu", folder=tmp_path, platform="linux/arm64"
    )
    assert "it was not run" in where
    with pytest.raises(AttnimgError, match="is not the expected image") as caught:
        check_released(
            small.digest, repository, signer, name="cpu", folder=tmp_path, platform="linux/amd64"
        )
    assert "found linux/arm64, listed as linux/amd64" in caught.value.why


def test_a_list_that_was_changed_in_the_registry_is_refused(
    own: LocalRegistry, both: dict[str, Small], tmp_path: Path
) -> None:
    for one in (PLAN, ARM64):
        verified(one, both[one.platform], own.repository, tmp_path)
    record = promote(PLAN, own.repository, tmp_path)
    digest = record.tags["cpu"]
    name = digest.removeprefix("sha256:")
    path = own.folder / "docker/registry/v2/blobs/sha256" / name[:2] / name / "data"
    path.write_bytes(path.read_bytes().replace(b'"arm64"', b'"riscv"'))
    with pytest.raises(AttnimgError) as caught:
        transfer.read_list(own.repository.at(digest), own.repository)
    assert caught.value.code in ("tampered", "registry")
