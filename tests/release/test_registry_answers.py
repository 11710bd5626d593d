"""What a registry answers is told in plain words: it is down, it wants credentials, it is full."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import MakeSmall, Small, make_signer, running_registry

from attnimg.errors import AttnimgError
from recipes.release import signing, transfer
from recipes.release.repository import Repository, parse_repository

# User "someone", password "secret".
USERS = "someone:$2y$05$c4WoMPo3SXsafkva.HHa6uXQZWr7oboPiC2bT/r7q1BB8I2s0BRqC\n"


@pytest.fixture(scope="module")
def small(make_small: MakeSmall) -> Small:
    return make_small("for other registries")


def answers(
    repository: Repository, small: Small, folder: Path
) -> Iterator[tuple[AttnimgError, bool]]:
    """Yield the error of each program that talks to the registry, and whether it writes there."""
    signer = make_signer(repository, folder)
    calls: tuple[tuple[Callable[[], object], bool], ...] = (
        (lambda: transfer.push(small.layout, small.digest, repository), True),
        (lambda: transfer.find_tag("cpu", repository), False),
        (lambda: signing.sign(small.digest, repository, signer, notes={}), True),
        (lambda: signing.verify_signature(small.digest, repository, signer), False),
    )
    for call, writes in calls:
        with pytest.raises(AttnimgError) as caught:
            call()
        yield caught.value, writes


def test_a_registry_that_is_down_is_told(small: Small, tmp_path: Path) -> None:
    with running_registry(tmp_path / "registry") as running:
        repository = running.repository
    for error, writes in answers(repository, small, tmp_path):
        assert error.what == f"the registry {repository.host} can't be reached"
        assert "connection refused" in error.why
        assert ("it continues" in error.do) == writes


def test_a_registry_that_wants_credentials_is_told(small: Small, tmp_path: Path) -> None:
    with running_registry(tmp_path / "registry", users=USERS) as running:
        for error, writes in answers(running.repository, small, tmp_path):
            assert error.what == f"the registry {running.repository.host} refuses the credentials"
            assert error.do.startswith(f"docker login {running.repository.host}")
            assert ("push" in error.do) == writes


def test_a_registry_with_a_full_disk_is_told_and_continues(small: Small, tmp_path: Path) -> None:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False).returncode:
        pytest.skip("a small disk can't be mounted: that needs root")
    try:
        with running_registry(folder) as running:
            filler = folder / "filler"
            filler.write_bytes(b"0" * 60_000)
            with pytest.raises(AttnimgError) as caught:
                transfer.push(small.layout, small.digest, running.repository)
            assert "its disk may be full" in caught.value.what
            assert "free space there" in caught.value.do
            filler.unlink()
            transfer.push(small.layout, small.digest, running.repository)
            assert transfer.has(small.digest, running.repository)
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_tag_that_does_not_exist_is_no_error(small: Small, tmp_path: Path) -> None:
    with running_registry(tmp_path / "registry") as running:
        assert transfer.find_tag("cpu", running.repository) is None
        transfer.push(small.layout, small.digest, running.repository)
        assert transfer.find_tag("cpu", running.repository) is None
        transfer.tag(small.digest, "cpu", running.repository)
        assert transfer.find_tag("cpu", running.repository) == small.digest


def test_a_missing_program_is_told(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(AttnimgError, match="skopeo is not installed") as caught:
        transfer.push(small.layout, small.digest, parse_repository("127.0.0.1:1/rehearsal"))
    assert "docker/release_tools.sh" in caught.value.do
