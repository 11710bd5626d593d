"""What `attnimg doctor` finds on machines that are not this one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from attnimg.doctor import examine
from attnimg.facts import Arch, Machine
from attnimg.host_facts import WORKING_FOLDER, Check, Folder, Host, Shadow
from attnimg.images import ImageFacts, catalogue

GIB = 1 << 30
HOME = Folder(role="HOME", path="/cache/home", writable=True, free_bytes=500 * GIB)
WORK = Folder(role=WORKING_FOLDER, path="/workspace", writable=True, free_bytes=500 * GIB)
PACKAGES = {"torch": "2.14.1", "flash-attn": "2.8.3.post2", "rich": "15.0.0"}
HOST = Host(
    uid=1000,
    user="attnimg",
    home="/cache/home",
    folders=(HOME, WORK),
    shm_bytes=8 * GIB,
    installed=PACKAGES,
    cute_owners=("flash-attn-4",),
    damaged={},
    shadows=(),
)
IMAGES = catalogue()
HOPPER: ImageFacts = replace(IMAGES["hopper"], packages=PACKAGES)
CPU = replace(IMAGES["cpu"], packages=PACKAGES)


def gpu(name: str, *, driver: str = "590.10", **facts: object) -> Machine:
    digits = name.removeprefix("sm_")
    arch = Arch(name=name, vendor="nvidia", capability=(int(digits[:-1]), int(digits[-1])))
    return Machine(arch=arch, gpu="NVIDIA GPU", driver=driver, **facts)  # type: ignore[arg-type]


NO_GPU = Machine(arch=Arch(name="cpu", vendor="cpu"), gpu="cpu")
H100 = gpu("sm_90")


def findings(
    machine: Machine = H100, host: Host = HOST, *, image: ImageFacts | None = HOPPER
) -> list[Check]:
    return [
        check
        for check in examine(machine, host, image=image, images=IMAGES)
        if check.status != "ok"
    ]


@pytest.mark.parametrize(
    ("machine", "image"),
    [
        pytest.param(H100, HOPPER, id="hopper on an H100"),
        pytest.param(NO_GPU, CPU, id="cpu without a GPU"),
        pytest.param(NO_GPU, None, id="no image, no GPU"),
        pytest.param(H100, None, id="no image, a GPU"),
    ],
)
def test_nothing_is_wrong(machine: Machine, image: ImageFacts | None) -> None:
    assert findings(machine, image=image) == []


@pytest.mark.parametrize(
    ("machine", "image", "status", "what", "do"),
    [
        pytest.param(
            gpu("sm_100"), HOPPER, "fail", "sm_100", "attnimg:blackwell",
            id="hopper on a B200 names blackwell",
        ),
        pytest.param(
            gpu("sm_86"), HOPPER, "fail", "sm_86", "attnimg:ampere",
            id="hopper on an A10G names ampere",
        ),
        pytest.param(
            gpu("sm_70"), HOPPER, "fail", "sm_70", "attnimg:cpu",
            id="a GPU that no image serves is told",
        ),
        pytest.param(
            H100, CPU, "warn", "does not use", "attnimg:hopper", id="cpu on an H100 names hopper",
        ),
        pytest.param(
            NO_GPU, HOPPER, "fail", "no GPU is visible", "--gpus all", id="a GPU image needs a GPU",
        ),
        pytest.param(
            gpu("sm_90", driver="535.104"), HOPPER, "fail", "535.104 is too old", "update",
            id="an old driver is refused with the floor",
        ),
        pytest.param(
            gpu("sm_90", driver_problem="NVML: version mismatch"), HOPPER, "fail", "mismatch",
            "nvidia-smi", id="a driver that fails is quoted",
        ),
        pytest.param(
            gpu("sm_90", other_archs=("sm_80",)), HOPPER, "warn", "sm_80", "CUDA_VISIBLE_DEVICES",
            id="GPUs that differ are told",
        ),
    ],
)  # fmt: skip
def test_gpu_and_driver(
    machine: Machine, image: ImageFacts, status: str, what: str, do: str
) -> None:
    (found,) = findings(machine, image=image)
    assert found.status == status
    assert what in found.what
    assert do in found.do


@pytest.mark.parametrize(
    ("host", "status", "what"),
    [
        pytest.param(
            replace(HOST, installed={**PACKAGES, "torch": "2.12.1"}),
            "fail", "torch 2.14.1 -> 2.12.1", id="another torch fails",
        ),
        pytest.param(
            replace(HOST, installed={"torch": "2.14.1", "rich": "15.0.0"}),
            "fail", "flash-attn 2.8.3.post2 -> gone", id="a kernel that is gone fails",
        ),
        pytest.param(
            replace(HOST, installed={**PACKAGES, "rich": "16.0.0"}),
            "warn", "rich 15.0.0 -> 16.0.0", id="another rich warns",
        ),
        pytest.param(
            replace(HOST, installed={**PACKAGES, "einops": "1"}), None, "",
            id="a package more is nobody's business",
        ),
        pytest.param(
            replace(HOST, cute_owners=("flash-attn", "flash-attn-4")),
            "fail", "flash-attn and flash-attn-4", id="two owners of flash_attn/cute fail",
        ),
        pytest.param(
            replace(HOST, damaged={"flash-attn-4": ("a.py", "b.py", "c.py", "d.py")}),
            "fail", "and 1 more", id="changed files fail",
        ),
        pytest.param(
            replace(HOST, shadows=(Shadow(package="flash_attn", folders=("/a", "/b")),)),
            "fail", "/a hides the one in /b", id="a kernel in two folders fails",
        ),
        pytest.param(replace(HOST, user=None, uid=77), "fail", "77", id="a nameless user fails"),
        pytest.param(replace(HOST, user="root", uid=0), "warn", "root", id="root warns"),
        pytest.param(
            replace(HOST, folders=(replace(HOME, writable=False), WORK)),
            "fail", "HOME", id="a HOME that can't be written fails",
        ),
        pytest.param(
            replace(HOST, folders=(HOME, replace(WORK, writable=False))),
            "warn", "/workspace", id="a working folder that can't be written warns",
        ),
        pytest.param(
            replace(HOST, folders=(replace(HOME, free_bytes=GIB // 2), WORK)),
            "fail", "0.5 GiB", id="no room fails",
        ),
        pytest.param(
            replace(HOST, folders=(replace(HOME, free_bytes=5 * GIB), WORK)),
            "warn", "5.0 GiB", id="little room warns",
        ),
        pytest.param(replace(HOST, shm_bytes=64 << 20), "warn", "64 MiB", id="Docker's shm warns"),
        pytest.param(replace(HOST, shm_bytes=None), "warn", "absent", id="no shm warns"),
    ],
)  # fmt: skip
def test_host_and_packages(host: Host, status: str | None, what: str) -> None:
    found = findings(host=host)
    assert [check.status for check in found] == ([status] if status else [])
    assert all(what in check.what for check in found)
    assert all(check.do for check in found), "each finding has its mend"


def test_a_kernel_of_which_a_part_was_compiled_is_told_although_the_image_has_it() -> None:
    packages = {**PACKAGES, "flash-attn": "2.8.3.post2+trim"}
    host, image = replace(HOST, installed=packages), replace(HOPPER, packages=packages)
    (found,) = findings(host=host, image=image)
    assert (found.code, found.status) == ("trimmed", "warn")
    assert "flash-attn 2.8.3.post2+trim" in found.what
    assert "without TRIM=1" in found.do


def test_one_fault_hides_no_other() -> None:
    host = replace(HOST, user=None, shm_bytes=None, cute_owners=("flash-attn",))
    codes = {check.code for check in findings(NO_GPU, host)}
    assert {"gpu", "user", "shm", "shadowing"} <= codes
