"""Check whether the GPU's driver is new enough for an image that serves the GPU."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping
from typing import Literal

from attnimg.facts import Machine
from attnimg.selection.gpus_and_images import ImageFacts, gpu_catalogue
from attnimg.selection.judge import is_older, release

# The package has a newer libcuda for an older kernel driver. It is for data-centre GPUs and Jetson,
# not for GeForce; which drivers it serves is in the page's table.
# Source: https://docs.nvidia.com/deploy/cuda-compatibility/forward-compatibility.html (2026-11-27).
_COMPAT = (
    "; on a data-centre GPU such as this one, NVIDIA's package cuda-compat may do instead, in a "
    "child image: docs.nvidia.com/deploy/cuda-compatibility"
)


# "580.65.06"; a suffix is ignored.
_VERSION = re.compile(r"\d{1,9}(\.\d{1,9})*(?!\d)")
_BRAND = re.compile(r"^(NVIDIA|Tesla|GRID) ")


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
    floors = [other.driver_min for other in wanted if other.driver_min]
    if floors and not _VERSION.match(machine.driver or ""):
        what = f"the driver's version can't be read: found {reprlib.repr(machine.driver)}"
        do = f"run nvidia-smi on the host, and update a driver that is older than {floors[0]}"
        return "warn", what, do
    too_old = [other for other in wanted if driver_is_too_old(machine, other)]
    if image is None or not too_old or len(too_old) < len(wanted):
        return "ok", here, ""
    lowest = min(too_old, key=lambda other: release(other.driver_min or ""))
    what = f"{here} is too old: attnimg:{lowest.name} needs {lowest.driver_min} or newer"
    do = f"update the host's driver to {lowest.driver_min} or newer"
    fitting = [f"attnimg:{o.name}" for o in serving if not driver_is_too_old(machine, o)]
    if fitting:
        return _status(own), what, f"{do}, or run {' or '.join(fitting)}"
    what += f", and no image for {machine.arch.name} runs with an older one"
    return _status(own), what, do + (_COMPAT if is_data_center_gpu(machine.gpu) else "")


def driver_is_too_old(machine: Machine, image: ImageFacts) -> bool:
    """Return whether an image needs a newer driver than this machine's."""
    if not _VERSION.match(machine.driver or "") or image.driver_min is None:
        return False
    return is_older(machine.driver or "", image.driver_min)


def is_data_center_gpu(name: str) -> bool:
    """Return whether a GPU is one of the catalogue's for data centres.

    Args:
        name: as nvidia-smi prints it: "NVIDIA A100-SXM4-80GB", "Tesla T4", or "GRID A100-10C" for
            a part of one.
    """
    model = _BRAND.sub("", name)
    listed = [known for gpu in gpu_catalogue().values() for known in gpu.data_center]
    return any(re.match(rf"{re.escape(known)}(?![^ -])", model) for known in listed)


def _status(own: ImageFacts | None) -> Literal["warn", "fail"]:
    """Return the status of an old driver: an image that does not use the GPU works with any."""
    return "fail" if own else "warn"
