"""docs/runtimes.md agrees with what attnimg does in a container."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from attnimg.__main__ import COMMANDS
from attnimg.machine import container

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "runtimes.md").read_text(encoding="utf-8")
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8")


def test_the_pod_uses_the_image_s_folders_and_a_command() -> None:
    (manifest,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    spec = yaml.safe_load(manifest)["spec"]
    (pod,) = spec["containers"]
    assert pod["command"][0] == "attnimg"
    assert pod["command"][1] in COMMANDS
    mounts = {mount["name"]: mount["mountPath"] for mount in pod["volumeMounts"]}
    assert mounts["cache"] == re.search(r"ATTNIMG_CACHE=(\S+)", DOCKERFILE)[1]  # type: ignore[index]  # a match
    assert mounts["work"] == re.findall(r"^WORKDIR (\S+)$", DOCKERFILE, re.MULTILINE)[-1]
    assert set(mounts) == {volume["name"] for volume in spec["volumes"]}


def test_the_caches_are_listed() -> None:
    for name in container.CACHES.values():
        assert f"`{name}-1000`" in PAGE


@pytest.mark.parametrize(
    ("runtime", "flags"),
    [
        (container.DOCKER, ("--gpus all", "-v cache:/cache")),
        (container.PODMAN, ("--device nvidia.com/gpu=all", "nvidia-ctk cdi generate")),
        (container.APPTAINER, ("--nv", "--bind $HOME/attnimg-cache:/cache")),
        (container.ENROOT, ("--container-mounts=$HOME/attnimg-cache:/cache",)),
        (container.KUBERNETES, ("fsGroup", "nvidia.com/gpu")),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_the_options_are_those_that_doctor_names(
    runtime: container.Runtime, flags: tuple[str, ...]
) -> None:
    for flag in flags:
        assert flag in PAGE
        assert flag in runtime.gpu + runtime.volume
