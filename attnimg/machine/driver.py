"""Check whether the GPU's driver is new enough for an image that serves the GPU."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

from attnimg.facts import Machine
from attnimg.selection.gpus_and_images import ImageFacts, gpu_catalogue
from attnimg.selection.judge import is_older

# The package has a newer libcuda for an older kernel driver. It is for data-centre GPUs and Jetson,
# not for GeForce; which drivers it serves is in the page's table.
# Source: https://docs.nvidia.com/deploy/cuda-compatibility/forward-compatibility.html (2026-11-27).
_COMPAT = (
    "; on a data-centre GPU such as this one, NVIDIA's package cuda-compat may do instead, in a "
    "child image: docs.nvidia.com/deploy/cuda-compatibility"
)


def judge_driver(
    machine: Machine, *, image: ImageFacts | None, images: Mapping[str, ImageFacts]
) -> tuple[Literal["ok", "warn", "fail"], str, str]:
    """Return the result of a check: its status, what was found, and what to do.

    Args:
        machine: a machine with a driver.
        image: the image of this process; None outside an image.
        images: all images. If this image does not serve the GPU (as the image for CPUs), the images
            that do decide how new the driver must be.
    """
    here = f"driver {machine.driver}"
    serving = [other for other in images.values() if machine.arch.name in other.devices]
    own = image if image is not None and machine.arch.name in image.devices else None
    wanted = [own] if own else [other for other in serving if other.channel == "stable"]
    too_old = [other for other in wanted if driver_is_too_old(machine, other)]
    if image is None or not too_old or len(too_old) < len(wanted):
        return "ok", here, ""
    lowest = too_old[0]
    for other in too_old[1:]:
        if is_older(other.driver_min or "", lowest.driver_min or ""):
            lowest = other
    what = f"{here} is too old: attnimg:{lowest.name} needs {lowest.driver_min} or newer"
    do = f"update the host's driver to {lowest.driver_min} or newer"
    fitting = [f"attnimg:{o.name}" for o in serving if not driver_is_too_old(machine, o)]
    if fitting:
        return _status(own), what, f"{do}, or run {' or '.join(fitting)}"
    what += f", and no image for {machine.arch.name} runs with an older one"
    return _status(own), what, do + (_COMPAT if is_data_center_gpu(machine.gpu) else "")


def driver_is_too_old(machine: Machine, image: ImageFacts) -> bool:
    """Return whether an image needs a newer driver than this machine's."""
    if machine.driver is None or image.driver_min is None:
        return False
    return is_older(machine.driver, image.driver_min)


def is_data_center_gpu(name: str) -> bool:
    """Return whether a GPU is one of the catalogue's for data centres.

    Args:
        name: as nvidia-smi prints it, "NVIDIA A100-SXM4-80GB" or "Tesla T4".
    """
    model = re.split(r"[ -]", name.removeprefix("NVIDIA ").removeprefix("Tesla "))[0]
    return any(
        gpu.data_center and gpu.label.removeprefix("NVIDIA ").split(" ")[0] == model
        for gpu in gpu_catalogue().values()
    )


def _status(own: ImageFacts | None) -> Literal["warn", "fail"]:
    """Return the status of an old driver: an image that does not use the GPU works with any."""
    return "fail" if own else "warn"
