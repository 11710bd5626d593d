"""Does the image fit the GPU, and the driver the image?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from attnimg.facts import Machine
from attnimg.machine.host_facts import Check
from attnimg.select.images import ImageFacts


def check_gpu(
    machine: Machine, *, image: ImageFacts | None, images: Mapping[str, ImageFacts]
) -> Iterator[Check]:
    """Judge GPU and driver; a wrong image is answered with the right tag."""
    if machine.driver_problem:
        yield Check(
            code="driver",
            status="fail",
            what=f"the GPU driver does not answer: {machine.driver_problem}",
            do="run nvidia-smi on the host; if it works there, start the container with --gpus all",
        )
        return
    if machine.arch.vendor == "cpu":
        yield _without_gpu(image)
        return
    yield _architecture(machine, image=image, images=images)
    if machine.other_archs:
        yield Check(
            code="mixed-gpus",
            status="warn",
            what=f"GPUs differ: {machine.arch.name} and {', '.join(machine.other_archs)}",
            do="choose alike ones with CUDA_VISIBLE_DEVICES",
        )
    if (driver := _driver(machine, image=image, images=images)) is not None:
        yield driver


def _without_gpu(image: ImageFacts | None) -> Check:
    if image is None or "cpu" in image.devices:
        return Check(code="gpu", status="ok", what="no GPU; this is judged as a CPU machine")
    return Check(
        code="gpu",
        status="fail",
        what=f"no GPU is visible, and attnimg:{image.name} is for {' '.join(image.devices)}",
        do="start the container with --gpus all (AMD: --device /dev/kfd --device /dev/dri), "
        "or run attnimg:cpu",
    )


def _architecture(
    machine: Machine, *, image: ImageFacts | None, images: Mapping[str, ImageFacts]
) -> Check:
    arch, shown = machine.arch.name, f"{machine.gpu} ({machine.arch.name})"
    if image is None or arch in image.devices:
        return Check(code="gpu", status="ok", what=shown)
    right = _right_images(arch, images)
    do = f"run {' or '.join(right)}" if right else "no image serves this GPU yet; run attnimg:cpu"
    if "cpu" in image.devices:
        what = f"attnimg:{image.name} does not use the {shown} that is here"
        return Check(code="gpu", status="warn", what=what, do=do)
    return Check(
        code="gpu",
        status="fail",
        what=f"attnimg:{image.name} has code for {' '.join(image.devices)}, the GPU is a {shown}",
        do=do,
    )


def _driver(
    machine: Machine, *, image: ImageFacts | None, images: Mapping[str, ImageFacts]
) -> Check | None:
    floor = image.driver_min if image else None
    if machine.driver is None:
        return None
    if image is None or floor is None or _numbers(machine.driver) >= _numbers(floor):
        return Check(code="driver", status="ok", what=f"driver {machine.driver}")
    others = [
        f"attnimg:{name}"
        for name, other in images.items()
        if machine.arch.name in other.devices
        and other.driver_min
        and _numbers(machine.driver) >= _numbers(other.driver_min)
    ]
    return Check(
        code="driver",
        status="fail",
        what=f"driver {machine.driver} is too old: attnimg:{image.name} needs {floor} or newer",
        do=f"update the host's driver{''.join(f', or run {other}' for other in others)}",
    )


def _right_images(arch: str, images: Mapping[str, ImageFacts]) -> list[str]:
    return [
        f"attnimg:{name}"
        for name, image in images.items()
        if arch in image.devices and image.channel == "stable"
    ]


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())
