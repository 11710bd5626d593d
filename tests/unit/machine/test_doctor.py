"""What `attnimg doctor` finds on machines that are not this one."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from attnimg.facts import Arch, Machine
from attnimg.machine import container
from attnimg.machine.doctor import Check, check_machine, check_variants
from attnimg.machine.fingerprint import RELEASE
from attnimg.machine.host import WORKING_FOLDER, Folder, Host, this_host
from attnimg.machine.kernel_cache import ShippedKernels
from attnimg.machine.network import Rdma
from attnimg.selection.gpus_and_images import ImageFacts, image_catalogue

GIB = 1 << 30
HOME = Folder(role="HOME", path="/cache/home", writable=True, free_bytes=500 * GIB)
WORK = Folder(role=WORKING_FOLDER, path="/workspace", writable=True, free_bytes=500 * GIB)
PACKAGES = {"torch": "2.14.1", "flash-attn": "2.8.3.post2", "rich": "15.0.0"}
HOST = Host(
    uid=1000,
    user="attnimg",
    account="attnimg",
    folders=(HOME, WORK),
    shm_bytes=8 * GIB,
    installed=PACKAGES,
    cute_owners=("flash-attn-4",),
    damaged={},
    shadows={},
)
BUILT = {
    "python": "3.11",
    RELEASE: "3.11.2",
    "quack-kernels": "0.6.5",
    "flash_attn/cute": "ab" * 32,
}
SHIPPED = ShippedKernels(key="0123", built=BUILT, found=BUILT, kernels={"sm_90": 200})
IMAGES = image_catalogue()
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
        for check in check_machine(machine, host, image=image, images=IMAGES)
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
            H100, CPU, "warn", "does not use", "run attnimg:hopper",
            id="cpu on an H100 names hopper",
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
            replace(HOST, unused_packages="they belong to user 7, this is user 1000"),
            "warn", "they belong to user 7", id="packages that are not used warn",
        ),
        pytest.param(
            replace(HOST, damaged={"flash-attn-4": ("a.py", "b.py", "c.py", "d.py")}),
            "fail", "and 1 more", id="changed files fail",
        ),
        pytest.param(
            replace(HOST, shadows={"flash_attn": ("/a", "/b")}),
            "fail", "/a hides the one in /b", id="a kernel in two folders fails",
        ),
        pytest.param(replace(HOST, user=None, uid=77), "fail", "77", id="a nameless user fails"),
        pytest.param(
            replace(HOST, user="attnimg", account="root", uid=0), "warn", "root (0)",
            id="root warns, also under another name in USER",
        ),
        pytest.param(
            replace(HOST, folders=(replace(HOME, writable=False), WORK)),
            "fail", "HOME", id="a HOME that can't be written fails",
        ),
        pytest.param(
            replace(HOST, folders=(HOME, replace(WORK, writable=False))),
            "warn", "/workspace", id="a working folder that can't be written warns",
        ),
        pytest.param(
            replace(HOST, folders=(HOME, replace(WORK, free_bytes=GIB // 2))),
            "fail", "0.5 GiB", id="no room for checkpoints fails",
        ),
        pytest.param(
            replace(HOST, folders=(replace(HOME, free_bytes=GIB // 2), WORK)),
            "warn", "0.5 GiB", id="a cache in shared memory is enough for a model from a folder",
        ),
        pytest.param(
            replace(HOST, folders=(replace(HOME, free_bytes=1 << 20), WORK)),
            "fail", "0.0 GiB", id="no room at all fails",
        ),
        pytest.param(
            replace(HOST, replaced_cache="/cache is not writable for user 7; caches are in /x"),
            "warn", "caches are in /x", id="a replaced cache folder warns",
        ),
        pytest.param(
            replace(HOST, unusable_folders=("/cache is not writable for user 7", "/tmp is full")),
            "fail", "/cache is not writable for user 7; /tmp is full",
            id="no folder for caches fails",
        ),
        pytest.param(
            replace(HOST, noexec=("/cache/triton-7",)), "warn", "noexec",
            id="a cache mounted with noexec warns",
        ),
        pytest.param(
            replace(HOST, cuda_error="OSError: libcuda.so.1: cannot open shared object file"),
            "fail", "cannot open", id="nvidia-smi without libcuda fails",
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
    assert all(check.do for check in found), "each finding has its fix"


def test_a_kernel_of_which_a_part_was_compiled_is_told_although_the_image_has_it() -> None:
    packages = {**PACKAGES, "flash-attn": "2.8.3.post2+trim"}
    host, image = replace(HOST, installed=packages), replace(HOPPER, packages=packages)
    (found,) = findings(host=host, image=image)
    assert (found.code, found.status) == ("trimmed", "warn")
    assert "flash-attn 2.8.3.post2+trim" in found.what
    assert "without TRIM=1" in found.do


def test_added_packages_are_listed_and_pass() -> None:
    names = {f"extra-{place}": "1.0" for place in range(10)}
    host = replace(HOST, installed={**PACKAGES, "einops": "0.8.2", **names})
    assert findings(host=host) == []
    (added,) = [
        check
        for check in check_machine(H100, host, image=HOPPER, images=IMAGES)
        if check.code == "added"
    ]
    assert added.status == "ok"
    assert "einops 0.8.2, extra-0 1.0" in added.what
    assert "and 3 more" in added.what


@pytest.mark.parametrize(
    ("name", "status"),
    [
        pytest.param("torch", "fail", id="torch"),
        pytest.param("triton", "fail", id="Triton"),
        pytest.param("nvidia-cudnn-cu13", "fail", id="a library of CUDA's"),
        pytest.param("quack-kernels", "fail", id="what a kernel pins"),
        pytest.param("urllib3", "warn", id="a security fix"),
        pytest.param("transformers", "warn", id="transformers"),
    ],
)
def test_another_version_fails_if_kernels_depend_on_it_and_warns_otherwise(
    name: str, status: str
) -> None:
    packages = {**PACKAGES, name: "1.0"}
    host, image = replace(HOST, installed={**packages, name: "2.0"}), HOPPER
    (found,) = findings(host=host, image=replace(image, packages=packages))
    assert (found.code, found.status) == ("packages", status)
    assert f"{name} 1.0 -> 2.0" in found.what


@pytest.mark.parametrize(
    ("host", "text"),
    [
        (HOST, "attnimg (1000)"),
        (replace(HOST, user="me"), "attnimg (1000)"),
        (
            replace(HOST, uid=4242, account=None),
            "user 4242, who is not in /etc/passwd; programs get the name attnimg",
        ),
    ],
    ids=["an entry", "another name in USER", "no entry"],
)
def test_a_user_is_named_as_the_system_does(host: Host, text: str) -> None:
    checks = check_machine(gpu("sm_90"), host, image=None, images={})
    assert text in [check.what for check in checks]


def test_of_two_versions_on_sys_path_the_first_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder, version in (("added", "2.0"), ("image", "1.0")):
        info = tmp_path / folder / f"twice-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: twice\nVersion: {version}\n")
    found = [str(tmp_path / folder) for folder in ("added", "image")]
    monkeypatch.setattr("sys.path", [*found, *sys.path])
    assert this_host().installed["twice"] == "2.0"


def test_in_the_cpu_image_an_old_driver_is_part_of_the_advice() -> None:
    machine = replace(gpu("sm_80", driver="550.54.15"), gpu="NVIDIA A100-SXM4-80GB")
    architecture, driver = findings(machine, image=CPU)
    assert architecture.do == "run attnimg:ampere after an update of the driver (next line)"
    assert driver.code == "driver"
    assert "attnimg:ampere needs 580.65.06 or newer" in driver.what
    assert "cuda-compat" in driver.do


@pytest.mark.parametrize(
    ("facts", "status", "what"),
    [
        pytest.param({"cpus": 8}, "ok", "8 CPUs; torch computes with 8 threads", id="no limit"),
        pytest.param(
            {"cpus": 8, "quota": 0.5}, "ok",
            "8 CPUs, of which the cgroup's quota allows 0.5; torch computes with 1 thread",
            id="docker run --cpus 0.5",
        ),
        pytest.param({"cpus": 1}, "ok", "1 CPU; torch computes with 1 thread", id="one CPU"),
        pytest.param({"cpus": 2, "quota": 4.0}, "ok", "2 threads", id="a quota above the CPUs"),
        pytest.param({"cpus": 2, "threads": "1"}, "ok", "with 1 thread", id="fewer by the user"),
        pytest.param(
            {"cpus": 2, "threads": "8"}, "warn", "with 8 threads", id="more than CPUs by the user"
        ),
        pytest.param(
            {"cpus": 4, "quota": 1.5, "threads": "4,2"}, "warn", "4 threads",
            id="more than the quota by the user",
        ),
        pytest.param({"cpus": 2, "threads": ""}, "ok", "with 2 threads", id="an empty number"),
        pytest.param({"cpus": 2, "threads": "0"}, "warn", "'0', which is no number", id="zero"),
        pytest.param({"cpus": 2, "threads": "abc"}, "warn", "'abc', which is no", id="a word"),
        pytest.param({"cpus": 2, "threads": "-1"}, "warn", "'-1', which is no", id="below zero"),
        pytest.param({"cpus": 2, "threads": "9" * 5000}, "warn", "99...99", id="5,000 digits"),
    ],
)  # fmt: skip
def test_threads_are_compared_with_the_cpus(
    facts: dict[str, object], status: str, what: str
) -> None:
    host = replace(HOST, **facts)  # type: ignore[arg-type]
    (check,) = (
        c for c in check_machine(NO_GPU, host, image=CPU, images=IMAGES) if c.code == "cpus"
    )
    assert check.status == status
    assert what in check.what
    assert bool(check.do) == (status != "ok")


def test_a_folder_whose_name_is_too_long_is_not_writable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", "/tmp/" + "a" * 300)
    monkeypatch.setenv("TRITON_CACHE_DIR", "/tmp/" + "a" * 255)
    writable = {folder.role: folder.writable for folder in this_host().folders}
    assert (writable["HF_HOME"], writable["TRITON_CACHE_DIR"]) == (False, True)


def test_a_folder_that_can_not_be_read_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    monkeypatch.setenv("HF_HOME", "relative")
    monkeypatch.setattr("sys.path", ["a" * 300, *sys.path])
    host = this_host()
    assert {folder.role: folder.path for folder in host.folders}[WORKING_FOLDER] == "/"
    assert not host.shadows


def test_the_network_is_checked_only_with_a_gpu() -> None:
    rdma = Rdma(adapters={"mlx5_0": "mlx5"}, device_files=False, library=True, locked_bytes=None)
    host = replace(HOST, rdma=rdma)
    (found,) = findings(host=host)
    assert (found.code, found.status) == ("network", "warn")
    assert "--device /dev/infiniband" in found.do
    assert findings(NO_GPU, host, image=CPU) == []


def test_one_fault_hides_no_other() -> None:
    host = replace(HOST, user=None, shm_bytes=None, cute_owners=("flash-attn",))
    codes = {check.code for check in findings(NO_GPU, host)}
    assert {"gpu", "user", "shm", "shadowing"} <= codes


def with_kernels(**facts: object) -> Host:
    return replace(HOST, shipped_kernels=replace(SHIPPED, **facts))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("machine", "host", "what", "do"),
    [
        pytest.param(
            H100, with_kernels(found={**BUILT, "python": "3.12"}),
            "python 3.11 -> 3.12", "fresh image", id="another Python",
        ),
        pytest.param(
            H100, with_kernels(found={**BUILT, RELEASE: "3.11.7"}),
            "python release 3.11.2 -> 3.11.7", "fresh image", id="another patch release of Python",
        ),
        pytest.param(
            H100, with_kernels(found={**BUILT, "quack-kernels": "0.6.6"}),
            "quack-kernels 0.6.5 -> 0.6.6", "fresh image", id="another quack",
        ),
        pytest.param(
            H100, with_kernels(found={**BUILT, "flash_attn/cute": "cd" * 32}),
            "flash_attn/cute abababababab -> cdcdcdcdcdcd", "fresh image", id="changed sources",
        ),
        pytest.param(
            H100, with_kernels(found={**BUILT, "quack-kernels": "absent"}),
            "-> absent", "fresh image", id="a package that is gone",
        ),
        pytest.param(
            gpu("sm_90", driver="575.51.03"), with_kernels(),
            "driver 580 or newer, found 575.51.03", "driver", id="a driver of CUDA 12",
        ),
        pytest.param(
            H100, with_kernels(kernels={"sm_100": 200}), "for sm_100, found sm_90", "image",
            id="another GPU's kernels",
        ),
        pytest.param(
            gpu("sm_90", other_archs=("sm_80",)), with_kernels(), "sm_90 and sm_80",
            "CUDA_VISIBLE_DEVICES", id="GPUs that differ",
        ),
        pytest.param(
            H100, with_kernels(settings=("FA_LOG_LEVEL",)), "are set: FA_LOG_LEVEL", "unset",
            id="a variable that asks for other kernels",
        ),
    ],
)  # fmt: skip
def test_shipped_kernels_that_are_missed(machine: Machine, host: Host, what: str, do: str) -> None:
    (found,) = (check for check in findings(machine, host, image=None) if check.code == "kernels")
    assert found.status == "warn"
    assert what in found.what
    assert do in found.do


@pytest.mark.parametrize(
    "host",
    [
        pytest.param(with_kernels(), id="the same of all"),
        pytest.param(
            with_kernels(built={name: BUILT[name] for name in BUILT if name != RELEASE}),
            id="a manifest from before Python's release was in it",
        ),
    ],
)
def test_shipped_kernels_that_are_found(host: Host) -> None:
    checks = check_machine(H100, host, image=HOPPER, images=IMAGES)
    (found,) = (check for check in checks if check.code == "kernels")
    assert found.status == "ok"
    assert "its kernels for sm_90 compiled: 200" in found.what


@pytest.mark.parametrize(
    ("machine", "host"),
    [
        pytest.param(H100, HOST, id="an image without such kernels"),
        pytest.param(NO_GPU, with_kernels(), id="no GPU"),
    ],
)
def test_of_shipped_kernels_nothing_is_said(machine: Machine, host: Host) -> None:
    checks = check_machine(machine, host, image=None, images=IMAGES)
    assert "kernels" not in {check.code for check in checks}


TRITON = {
    "python": "3.11",
    "triton": "3.8.0",
    "triton/*.py": "ab" * 32,
    "sageattention": "2.2.0",
    "sageattention/*.py": "ab" * 32,
    "bytes of triton/_C/libtriton.so": "505687320",
    "bytes of triton/backends/nvidia/bin/ptxas": "34931056",
}
SHIPPED_TRITON = ShippedKernels(
    key="0123", built=TRITON, found=TRITON, kernels={"sm_90": 122, "sm_89": 120}
)


def triton_check(machine: Machine = H100, **facts: object) -> Check:
    shipped = replace(SHIPPED_TRITON, **facts)  # type: ignore[arg-type]
    checks = check_machine(
        machine, replace(HOST, shipped_triton=shipped), image=None, images=IMAGES
    )
    (check,) = (check for check in checks if check.code == "triton-kernels")
    return check


@pytest.mark.parametrize(
    ("name", "here", "what"),
    [
        ("python", "3.12", "python 3.11 -> 3.12"),
        ("triton", "3.9.0", "triton 3.8.0 -> 3.9.0"),
        ("triton/*.py", "cd" * 32, "triton/*.py abababababab -> cdcdcdcdcdcd"),
        ("sageattention", "2.3.0", "sageattention 2.2.0 -> 2.3.0"),
        ("sageattention/*.py", "cd" * 32, "sageattention/*.py abababababab -> cdcdcdcdcdcd"),
        (
            "bytes of triton/_C/libtriton.so", "505687321",
            "bytes of triton/_C/libtriton.so 505687320 -> 505687321",
        ),
        (
            "bytes of triton/backends/nvidia/bin/ptxas", "absent",
            "bytes of triton/backends/nvidia/bin/ptxas 34931056 -> absent",
        ),
    ],
)  # fmt: skip
def test_triton_kernels_of_other_packages_are_missed(name: str, here: str, what: str) -> None:
    check = triton_check(found={**TRITON, name: here})
    assert check.status == "warn"
    assert check.what.endswith(f"compiled with another: {what}")
    assert "fresh image" in check.do


@pytest.mark.parametrize(
    ("machine", "facts", "what", "do"),
    [
        pytest.param(
            gpu("sm_86"), {}, "for sm_90 sm_89, found sm_86", "image", id="another GPU"
        ),
        pytest.param(
            gpu("sm_90", other_archs=("sm_86",)), {}, "found sm_86", "image", id="one of two GPUs"
        ),
        pytest.param(
            H100, {"settings": ("TRITON_DEBUG",)}, "are set: TRITON_DEBUG", "unset",
            id="a variable that asks for other kernels",
        ),
        pytest.param(
            H100, {"found": {**TRITON, "python": "3.12", "triton": "3.9.0"}},
            "python 3.11 -> 3.12; compiled with another: triton 3.8.0 -> 3.9.0", "fresh image",
            id="one reason hides no other",
        ),
    ],
)  # fmt: skip
def test_triton_kernels_that_are_missed(
    machine: Machine, facts: dict[str, object], what: str, do: str
) -> None:
    check = triton_check(machine, **facts)
    assert check.status == "warn"
    assert what in check.what
    assert do in check.do


def test_triton_kernels_that_are_found() -> None:
    for machine in (H100, gpu("sm_90", other_archs=("sm_89",)), gpu("sm_90", driver="575.51.03")):
        check = triton_check(machine)
        assert (check.status, check.do) == ("ok", "")
        assert check.what == "SageAttention finds its Triton kernels for sm_90 compiled: 122"


def test_of_triton_kernels_nothing_is_said_where_sageattention_does_not_run() -> None:
    host = replace(HOST, shipped_triton=replace(SHIPPED_TRITON, kernels={"sm_120": 90}))
    checks = check_machine(gpu("sm_100"), host, image=None, images=IMAGES)
    assert "triton-kernels" not in {check.code for check in checks}


def test_of_triton_kernels_nothing_is_said_without_a_gpu() -> None:
    host = replace(HOST, shipped_triton=SHIPPED_TRITON)
    checks = check_machine(NO_GPU, host, image=None, images=IMAGES)
    assert "triton-kernels" not in {check.code for check in checks}


@pytest.mark.parametrize(
    ("gpu", "variables", "status", "what"),
    [
        ("gfx1100", {}, "ok", "flash-attn's Triton kernels"),
        ("gfx942", {}, "ok", "flash-attn's CK kernels"),
        ("gfx1100", {"FLASH_ATTENTION_TRITON_AMD_ENABLE": "FALSE"}, "warn", "ENABLE=FALSE"),
    ],
)
def test_the_kernels_that_an_amd_gpu_runs_are_named(
    gpu: str, variables: dict[str, str], status: str, what: str
) -> None:
    machine = Machine(arch=Arch(name=gpu, vendor="amd"), gpu=gpu, variables=variables)
    host = replace(HOST, installed={"flash-attn": "2.8.3.post2"})
    (check,) = check_variants(machine, host)
    assert check.status == status
    assert what in check.what


@pytest.mark.parametrize(
    ("runtime", "gpu_flag", "volume_flag"),
    [
        pytest.param(None, "--gpus all", "-v cache:/cache", id="unknown"),
        pytest.param(container.DOCKER, "--gpus all", "-v cache:/cache", id="Docker"),
        pytest.param(container.PODMAN, "--device nvidia.com/gpu=all", "-v cache", id="Podman"),
        pytest.param(container.APPTAINER, "--nv", "--bind", id="Apptainer"),
        pytest.param(container.KUBERNETES, "nvidia.com/gpu in", "emptyDir", id="Kubernetes"),
        pytest.param(container.ENROOT, "98-nvidia.sh", "--container-mounts", id="enroot"),
    ],
)
def test_the_advice_has_the_options_of_the_container_runtime(
    runtime: container.Runtime | None, gpu_flag: str, volume_flag: str
) -> None:
    host = replace(HOST, runtime=runtime, folders=(replace(HOME, writable=False), WORK))
    without_gpu, without_cache = findings(NO_GPU, host)
    assert gpu_flag in without_gpu.do
    assert volume_flag in without_cache.do


ARM64 = replace(HOST, cpu="arm64")
GB200 = gpu("sm_100")


@pytest.mark.parametrize(
    ("machine", "host", "image", "text"),
    [
        pytest.param(
            GB200, ARM64, None, "its image is attnimg:blackwell, its linux/arm64 build",
            id="GB200, outside an image",
        ),
        pytest.param(GB200, HOST, None, "its image is attnimg:blackwell", id="B200"),
        pytest.param(
            GB200, ARM64, CPU, "run attnimg:blackwell, its linux/arm64 build",
            id="GB200, in the image for CPUs",
        ),
        pytest.param(
            H100, ARM64, CPU, "run attnimg:hopper, its linux/arm64 build", id="GH200"
        ),
        pytest.param(H100, HOST, CPU, "run attnimg:hopper", id="H100, in the image for CPUs"),
        pytest.param(
            gpu("sm_80"), ARM64, CPU,
            "attnimg:ampere has code for it, but is for linux/amd64, and this CPU is arm64",
            id="an A100 beside an arm64 CPU",
        ),
    ],
)  # fmt: skip
def test_the_image_of_this_cpu_is_named(
    machine: Machine, host: Host, image: ImageFacts | None, text: str
) -> None:
    found = check_machine(machine, host, image=image, images=IMAGES)
    (check,) = (check for check in found if check.code == "gpu")
    assert text in f"{check.what} {check.do}"
    assert ("linux/arm64 build" in f"{check.what} {check.do}") == ("linux/arm64 build" in text)


def test_an_image_for_another_cpu_decides_nothing_about_the_driver() -> None:
    old = gpu("sm_80", driver="550.54")
    found = check_machine(old, ARM64, image=CPU, images=IMAGES)
    (driver,) = (check for check in found if check.code == "driver")
    assert (driver.status, driver.do) == ("ok", "")


def test_the_cpu_of_this_host_is_read() -> None:
    assert this_host().cpu in {"amd64", "arm64"}
