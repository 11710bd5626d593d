"""Check whether this machine and this image are ready for a run, with pure functions."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from attnimg.backends import all_backends, conflicting_variables, find_backend, runs_on
from attnimg.facts import Machine
from attnimg.machine.container import DOCKER
from attnimg.machine.driver import driver_is_too_old, judge_driver
from attnimg.machine.host import WORKING_FOLDER, Folder, Host
from attnimg.machine.kernel_cache import (
    ShippedKernels,
    reasons_against_shipped,
    reasons_against_shipped_triton,
)
from attnimg.machine.network import judge_rdma
from attnimg.machine.threads import count_threads, read_threads
from attnimg.run_facts import Reason
from attnimg.selection.gpus_and_images import ImageFacts, image_text

Status = Literal["ok", "warn", "fail"]

# Packages that are named in one line.
_SHOWN = 8
_REBUILD = (
    "build the child image again from a fresh attnimg image, without another version of these; of "
    "those in /opt/added: start a new container, with an empty volume or none there"
)
_DO_ABOUT_KERNELS = {
    "kernels-arch": "run the image that is made for this GPU",
    "kernels-mixed-gpus": "select GPUs of one kind with CUDA_VISIBLE_DEVICES",
    "kernels-driver": "update the host's driver",
    "kernels-packages": "install the image's versions again, or use a fresh image",
    "kernels-settings": "unset them, unless they are meant",
}
_GIB = 1 << 30
# A checkpoint of a 7B model with its optimizer has under 1 GiB for LoRA, 80 GiB for full
# fine-tuning. With less than the first nothing can be saved, with less than the second little.
_DISK_FAIL, _DISK_WARN = 1 * _GIB, 20 * _GIB
# Without models from the hub, caches have some megabytes of proofs and compiled code (our choice).
_CACHE_FAIL = 16 << 20
# With Docker's default, 64 MiB, data loader workers and NCCL fail with a bus error.
# Source: https://github.com/NVIDIA/nccl/issues/290 (2026-11-21).
_SHM_WARN = 1 * _GIB


@dataclass(frozen=True, slots=True)
class Check:
    """The result of one check.

    Attributes:
        code: the subject of the check, "driver".
        status: "ok", "warn" or "fail".
        what: what was found, in one sentence.
        do: the fix; empty where there is nothing to fix.
    """

    code: str
    status: Status
    what: str
    do: str = ""


def check_machine(
    machine: Machine,
    host: Host,
    *,
    image: ImageFacts | None,
    images: Mapping[str, ImageFacts],
) -> tuple[Check, ...]:
    """Return the results of all checks.

    Args:
        machine: the GPU and its driver.
        host: the user, folders and packages.
        image: the image of this process; None outside an image.
        images: all images, to suggest the right one.
    """
    return (
        Check("image", "ok", _image_text(image)),
        *_check_gpu(machine, host, image, images),
        *_check_packages(host, image),
        *_check_shipped_kernels(machine, host),
        *check_variants(machine, host),
        *_check_network(machine, host),
        *_check_cpus(host),
        _check_user(host),
        *_check_folders(host),
        _check_shared_memory(host),
    )


def _image_text(image: ImageFacts | None) -> str:
    if image is None:
        return "this is not an attnimg image; only the machine is checked"
    revision = f", commit {image.revision}" if image.revision else ""
    return f"attnimg:{image.name}, version {image.version or 'unknown'}{revision}"


def _check_gpu(
    machine: Machine, host: Host, image: ImageFacts | None, images: Mapping[str, ImageFacts]
) -> Iterator[Check]:
    """Check GPU and driver; suggest the right tag for a wrong image."""
    if machine.driver_problem:
        what = f"the GPU driver does not answer: {machine.driver_problem}"
        do = f"run nvidia-smi on the host; if it works there, {(host.runtime or DOCKER).gpu}"
        yield Check("driver", "fail", what, do)
        return
    if machine.arch.vendor == "cpu":
        yield _check_absent_gpu(host, image)
        return
    starting = {
        name: other for name, other in images.items() if f"linux/{host.cpu}" in other.platforms
    }
    yield _check_architecture(machine, host, image, images, starting)
    if machine.other_archs:
        what = f"GPUs differ: {machine.arch.name} and {', '.join(machine.other_archs)}"
        yield Check("mixed-gpus", "warn", what, "select GPUs of one kind with CUDA_VISIBLE_DEVICES")
    if machine.arch.vendor == "nvidia" and host.cuda_error is not None:
        what = f"nvidia-smi works, but programs can't load the driver's library: {host.cuda_error}"
        do = (
            "give the container the driver's compute part: NVIDIA_DRIVER_CAPABILITIES="
            "compute,utility, or LD_LIBRARY_PATH with the folder of libcuda.so.1"
        )
        yield Check("libcuda", "fail", what, do)
    if machine.driver is not None:
        found = judge_driver(machine, image=image, images=starting)
        yield Check("driver", *found)


def _check_absent_gpu(host: Host, image: ImageFacts | None) -> Check:
    if image is None or "cpu" in image.devices:
        return Check("gpu", "ok", "no GPU; this is checked as a CPU machine")
    what = f"no GPU is visible, and attnimg:{image.name} is for {' '.join(image.devices)}"
    return Check("gpu", "fail", what, f"{(host.runtime or DOCKER).gpu}; or run attnimg:cpu")


def _check_architecture(
    machine: Machine,
    host: Host,
    image: ImageFacts | None,
    images: Mapping[str, ImageFacts],
    starting: Mapping[str, ImageFacts],
) -> Check:
    """Check that the image has code for the GPU; otherwise name an image that has it.

    Args:
        machine: with a GPU.
        host: its CPU.
        image: the image of this process; None outside an image.
        images: all images.
        starting: those of them that are built for this CPU.
    """
    arch, gpu = machine.arch.name, f"{machine.gpu} ({machine.arch.name})"
    with_code = [one for one in images.values() if arch in one.devices and one.channel == "stable"]
    right = [one for one in with_code if one.name in starting]
    if image is not None and arch in image.devices:
        return Check("gpu", "ok", gpu)
    names = " or ".join(image_text(one, f"linux/{host.cpu}") for one in right)
    if image is None:
        return Check("gpu", "ok", gpu + (f"; its image is {names}" if right else ""))
    do = "no image serves this GPU yet; run attnimg:cpu"
    if with_code:
        other = with_code[0]
        do = (
            f"attnimg:{other.name} has code for it, but is for {' '.join(other.platforms)}, and "
            f"this CPU is {host.cpu}; install torch and the kernels on this machine"
        )
    if right:
        too_old = all(driver_is_too_old(machine, other) for other in right)
        do = f"run {names}" + (" after an update of the driver (next line)" if too_old else "")
    if "cpu" in image.devices:
        what = f"attnimg:{image.name} does not use the GPU of this machine, {gpu}"
        return Check("gpu", "warn", what, do)
    what = f"attnimg:{image.name} has code for {' '.join(image.devices)}, the GPU is a {gpu}"
    return Check("gpu", "fail", what, do)


def _check_packages(host: Host, image: ImageFacts | None) -> Iterator[Check]:
    """Compare the installed packages with the manifest, and look for kernels that are shadowed."""
    if image is not None:
        yield from _compare_with_manifest(host, image)
        yield from _list_added(host, image)
    # Kernels that were only partly compiled (`make wheels/NAME TRIM=1`).
    if small := [
        f"{name} {text}" for name, text in host.installed.items() if text.endswith("+trim")
    ]:
        what = (
            f"only a part of {' and '.join(small)} was compiled: some precisions, head sizes and "
            "features are missing"
        )
        do = "build the image from whole wheels, without TRIM=1; a small one is not published"
        yield Check("trimmed", "warn", what, do)
    shadowing = [*_check_shadowing(host)]
    yield from shadowing
    if not shadowing:
        yield Check("shadowing", "ok", "no kernel package is hidden by another one")


def _compare_with_manifest(host: Host, image: ImageFacts) -> Iterator[Check]:
    differ = {
        name: f"{name} {version} -> {host.installed.get(name, 'gone')}"
        for name, version in image.packages.items()
        if host.installed.get(name) != version
    }
    fixed = [differ.pop(name) for name in sorted(image.fixed) if name in differ]
    if fixed:
        what = f"not what attnimg:{image.name} was built and tested with: {', '.join(fixed)}"
        yield Check("packages", "fail", what, _REBUILD)
    if differ:
        what = f"changed since attnimg:{image.name} was built: {', '.join(differ.values())}"
        do = (
            "run attnimg selftest, which tests whether they still work together; the image's "
            f"versions: pip install -c /etc/pip/tested.txt {' '.join(differ)}"
        )
        yield Check("packages", "warn", what, do)
    if not fixed and not differ:
        yield Check(
            "packages", "ok", f"all {len(image.packages)} packages have the versions of the image"
        )


def _list_added(host: Host, image: ImageFacts) -> Iterator[Check]:
    """List the packages that a child image or a user has added, which is allowed."""
    added = [
        f"{name} {version}"
        for name, version in sorted(host.installed.items())
        if name not in image.packages
    ]
    if added:
        shown = ", ".join(added[:_SHOWN])
        more = f" and {len(added) - _SHOWN} more" if len(added) > _SHOWN else ""
        yield Check("added", "ok", f"added to attnimg:{image.name}: {shown}{more}")
    if host.unused_packages:
        what = f"the packages in /opt/added are not used: {host.unused_packages}"
        do = "mount an empty volume there and install again, or write a Dockerfile"
        yield Check("added", "warn", what, do)


def _check_shadowing(host: Host) -> Iterator[Check]:
    # flash-attn's sdist has 20 files of an old FlashAttention-4, which overwrite flash-attn-4's.
    if host.cute_owners and host.cute_owners != ("flash-attn-4",):
        owners = " and ".join(host.cute_owners)
        what = f"flash_attn/cute/, the folder of FlashAttention-4, has files of {owners}"
        do = (
            "install a flash-attn wheel without flash_attn/cute (attnimg's images have one), "
            "then: pip install --force-reinstall --no-deps flash-attn-4"
        )
        yield Check("shadowing", "fail", what, do)
    for name, files in host.damaged.items():
        shown = ", ".join(files[:3]) + (f" and {len(files) - 3} more" if len(files) > 3 else "")
        do = f"pip install --force-reinstall --no-deps {name}, or a fresh image"
        yield Check("damaged", "fail", f"{name}: missing or not as installed: {shown}", do)
    for package, (first, *hidden) in host.shadows.items():
        what = f"{package} in {first} hides the one in {' and '.join(hidden)}"
        do = f"remove {first}/{package}, or remove {first} from PYTHONPATH"
        yield Check("shadowing", "fail", what, do)


def _check_shipped_kernels(machine: Machine, host: Host) -> Iterator[Check]:
    """Check whether the image's precompiled kernels are used, if it has any and there is a GPU."""
    if machine.arch.vendor != "nvidia":
        return
    if host.shipped_kernels:
        reasons = reasons_against_shipped(host.shipped_kernels, machine)
        yield _check_shipped("kernels", "FlashAttention-4", host.shipped_kernels, reasons, machine)
    sage = find_backend("sage")
    if host.shipped_triton and sage and runs_on(sage.needs, machine.arch):
        reasons = reasons_against_shipped_triton(host.shipped_triton, machine)
        yield _check_shipped(
            "Triton kernels", "SageAttention", host.shipped_triton, reasons, machine
        )


def _check_shipped(
    kind: str, package: str, shipped: ShippedKernels, reasons: tuple[Reason, ...], machine: Machine
) -> Check:
    code, arch = kind.lower().replace(" ", "-"), machine.arch.name
    if shipped.settings:
        text = f"these variables are set: {', '.join(shipped.settings)}"
        reasons = (*reasons, Reason(code="kernels-settings", text=text))
    if not reasons:
        what = f"{package} finds its {kind} for {arch} compiled: {shipped.kernels[arch]}"
        return Check(code, "ok", what)
    what = (
        f"{package} does not use the {kind} compiled with the image; each is compiled at its first "
        f"call: {'; '.join(reason.text for reason in reasons)}"
    )
    do = dict.fromkeys(_DO_ABOUT_KERNELS[reason.code] for reason in reasons)
    return Check(code, "warn", what, "; ".join(do))


def check_variants(machine: Machine, host: Host) -> Iterator[Check]:
    """Yield which kernels run, for each installed package with several sets for AMD GPUs."""
    arch = machine.arch.name
    for backend in all_backends():
        variant = backend.variants.get(arch)
        if variant is None or backend.needs.packages[0][0] not in host.installed:
            continue
        kernels = f"{backend.needs.packages[0][0]}'s {variant.name} kernels"
        if against := conflicting_variables(backend, machine.arch, machine.variables):
            what = f"{backend.name} is refused on {arch}, where it runs {kernels}: "
            do = f"unset {against[0].partition('=')[0]}"
            yield Check("variant", "warn", f"{what}found {against[0]}", do)
        else:
            yield Check("variant", "ok", f"{backend.name} on {arch} runs {kernels}")


def _check_network(machine: Machine, host: Host) -> Iterator[Check]:
    """Check whether NCCL can use this machine's RDMA adapters; nothing without a GPU."""
    if host.rdma is not None and machine.arch.vendor != "cpu":
        yield Check("network", *judge_rdma(host.rdma))


def _check_cpus(host: Host) -> Iterator[Check]:
    """Check that torch starts no more threads than there are usable CPUs."""
    if host.cpus is None:
        return
    what = f"{host.cpus} CPUs" if host.cpus > 1 else "1 CPU"
    usable = float(host.cpus)
    if host.quota is not None and host.quota < host.cpus:
        what, usable = f"{what}, of which the cgroup's quota allows {host.quota:g}", host.quota
    given = (host.threads or "").strip()
    number = read_threads(given) or count_threads(cpus=usable)
    shown = reprlib.repr(given)
    if given and read_threads(given) is None:
        # OpenMP's library then starts a thread for each CPU of the mask.
        what += f"; OMP_NUM_THREADS is {shown}, which is no number of threads, and is ignored"
        yield Check("cpus", "warn", what, f"unset OMP_NUM_THREADS, or set it to {number}")
        return
    what += f"; torch computes with {number} thread{'s' if number > 1 else ''}"
    if number > max(1.0, usable):
        yield Check("cpus", "warn", what, f"unset OMP_NUM_THREADS, which is {host.threads}")
    else:
        yield Check("cpus", "ok", what)


def _check_user(host: Host) -> Check:
    """Check whether the user has a name, which torch.compile needs."""
    if host.user is None:
        what = f"user {host.uid} has no name: torch.compile stops with a KeyError of getpwuid"
        do = "set USER and LOGNAME, for example -e USER=me -e LOGNAME=me"
        return Check("user", "fail", what, do)
    if host.uid == 0:
        name = host.account or host.user
        what = f"{name} (0): files that root writes to a mounted folder belong to root"
        return Check("user", "warn", what, "start the container with --user $(id -u):$(id -g)")
    if host.account is None:
        what = f"user {host.uid}, who is not in /etc/passwd; programs get the name {host.user}"
        return Check("user", "ok", what)
    return Check("user", "ok", f"{host.account} ({host.uid})")


def _check_folders(host: Host) -> Iterator[Check]:
    """Check whether HOME, the caches and the working folder are usable and have free space.

    Folders with the same result share a line, as the caches are mostly on one volume.
    """
    alike: dict[Check, list[str]] = {}
    for folder in host.folders:
        name = f"{folder.role} ({folder.path or 'not set'})"
        alike.setdefault(_check_folder(folder, host), []).append(name)
    for check, names in alike.items():
        yield Check(check.code, check.status, f"{', '.join(names)}: {check.what}", check.do)
    if host.unusable_folders:
        what = f"no folder for caches and temporary files: {'; '.join(host.unusable_folders)}"
        yield Check("cache", "fail", what, (host.runtime or DOCKER).volume)
    if host.replaced_cache is not None:
        yield Check("cache", "warn", host.replaced_cache, (host.runtime or DOCKER).volume)
    if host.noexec:
        what = (
            f"{' and '.join(host.noexec)}: mounted with noexec, so that torch.compile and Triton "
            "can't load what they compile there"
        )
        yield Check("noexec", "warn", what, "mount it with exec: --tmpfs /cache:exec,mode=1777")


def _check_folder(folder: Folder, host: Host) -> Check:
    if not folder.writable:
        what = f"not writable for user {host.uid}"
        if folder.role == WORKING_FOLDER:
            # output_dir may be elsewhere, so this is only a warning.
            do = "mount a folder that this user may write to: -v $PWD:/workspace"
            return Check("folder", "warn", what, do)
        return Check("folder", "fail", what, (host.runtime or DOCKER).volume)
    if folder.free_bytes is None:
        return Check("folder", "ok", "writable")
    free = f"{folder.free_bytes / _GIB:.1f} GiB free"
    if folder.free_bytes >= _DISK_WARN:
        return Check("folder", "ok", f"writable, {free}")
    # How much of a cache a run needs depends on its model: for one from a folder, almost nothing.
    needed, least = "a model from the hub", _CACHE_FAIL
    if folder.role == WORKING_FOLDER:
        needed, least = "a checkpoint", _DISK_FAIL
    status: Status = "fail" if folder.free_bytes < least else "warn"
    what = f"{free}, {needed} may need more"
    return Check("disk", status, what, "mount a larger volume there")


def _check_shared_memory(host: Host) -> Check:
    if host.shm_bytes is not None and host.shm_bytes >= _SHM_WARN:
        return Check("shm", "ok", f"/dev/shm {host.shm_bytes / _GIB:.1f} GiB")
    size = "absent" if host.shm_bytes is None else f"{host.shm_bytes / (1 << 20):.0f} MiB"
    what = f"/dev/shm is {size}; data loader workers and runs on several GPUs need more"
    return Check("shm", "warn", what, "start the container with --shm-size=8g, or with --ipc=host")
