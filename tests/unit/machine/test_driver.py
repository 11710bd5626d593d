"""The driver is part of the choice of an image, in every image and with every GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest

from attnimg.facts import Machine
from attnimg.machine.driver import driver_is_too_old, is_data_center_gpu, judge_driver
from attnimg.selection.gpus_and_images import ImageFacts, arch_from_name, image_catalogue

IMAGES = image_catalogue()
FLOOR = "580.65.06"


def machine(arch: str, driver: str, gpu: str = "NVIDIA GeForce RTX 3090") -> Machine:
    return Machine(arch=arch_from_name(arch), gpu=gpu, driver=driver)


@pytest.mark.parametrize(
    ("here", "image", "status", "what", "do"),
    [
        pytest.param(
            machine("sm_80", "550.54", "NVIDIA A100-SXM4-80GB"), "cpu", "warn",
            f"550.54 is too old: attnimg:ampere needs {FLOOR} or newer, and no image for sm_80",
            "cuda-compat", id="cpu on an A100 with driver 550",
        ),
        pytest.param(
            machine("sm_86", "550.54"), "cpu", "warn", FLOOR, f"to {FLOOR} or newer",
            id="cpu on a GeForce with driver 550",
        ),
        pytest.param(
            machine("sm_90", "535.104", "NVIDIA H100 PCIe"), "ampere", "warn",
            f"attnimg:hopper needs {FLOOR}", f"to {FLOOR}", id="another GPU's image",
        ),
        pytest.param(
            machine("sm_90", "535.104", "NVIDIA H100 PCIe"), "hopper", "fail",
            f"attnimg:hopper needs {FLOOR}", f"to {FLOOR}", id="the GPU's own image",
        ),
        pytest.param(
            machine("sm_75", "580.65.05", "Tesla T4"), "turing", "fail", FLOOR, "cuda-compat",
            id="a driver that is older by one patch release",
        ),
    ],
)  # fmt: skip
def test_a_driver_that_is_too_old_is_reported_with_the_needed_one(
    here: Machine, image: str, status: str, what: str, do: str
) -> None:
    found = judge_driver(here, image=IMAGES[image], images=IMAGES)
    assert found[0] == status
    assert what in found[1]
    assert do in found[2]
    assert ("cuda-compat" in found[2]) == is_data_center_gpu(here.gpu)


@pytest.mark.parametrize(
    ("here", "image"),
    [
        (machine("sm_80", FLOOR), "ampere"),
        (machine("sm_80", "615.10"), "cpu"),
        (machine("sm_70", "470.1", "Tesla V100-SXM2-16GB"), "cpu"),
        (machine("gfx942", "6.10.5", "AMD gfx942"), "rocm"),
        (machine("gfx942", "6.10.5", "AMD gfx942"), "cpu"),
        (machine("sm_80", "535.1"), None),
    ],
)
def test_a_driver_that_is_new_enough_passes(here: Machine, image: str | None) -> None:
    own = IMAGES[image] if image else None
    assert judge_driver(here, image=own, images=IMAGES) == ("ok", f"driver {here.driver}", "")


@pytest.mark.parametrize("driver", ["", "abc", "[N/A]", "[Unknown Error]", "9" * 5000])
@pytest.mark.parametrize("image", ["ampere", "cpu"])
def test_a_driver_that_cannot_be_read_is_not_called_too_old(driver: str, image: str) -> None:
    here = machine("sm_80", driver)
    status, what, do = judge_driver(here, image=IMAGES[image], images=IMAGES)
    assert (status, FLOOR in do) == ("warn", True)
    assert what.startswith("the driver's version can't be read: found '")
    assert len(what) < 100
    assert not driver_is_too_old(here, IMAGES["ampere"])


def test_an_image_for_the_older_driver_is_named() -> None:
    older = replace(IMAGES["ampere"], name="ampere-cu128", driver_min="570.26")
    images: dict[str, ImageFacts] = {**IMAGES, older.name: older}
    here = machine("sm_80", "570.30")
    status, what, do = judge_driver(here, image=IMAGES["ampere"], images=images)
    assert (status, "no image" in what) == ("fail", False)
    assert do.endswith("or run attnimg:ampere-cu128")
    assert judge_driver(here, image=IMAGES["cpu"], images=images)[0] == "ok"


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("NVIDIA A100-SXM4-80GB", True), ("NVIDIA A100 80GB PCIe", True), ("Tesla T4", True),
        ("NVIDIA H100 80GB HBM3", True), ("NVIDIA L4", True), ("NVIDIA GH200 480GB", True),
        ("NVIDIA A10G", True), ("Tesla V100-SXM2-16GB", True), ("NVIDIA B200", True),
        ("NVIDIA A30", True), ("NVIDIA A40", True), ("NVIDIA A10", True), ("NVIDIA A2", True),
        ("NVIDIA A800-SXM4-80GB", True), ("NVIDIA H800", True), ("NVIDIA A100X", True),
        ("GRID A100X-10C", True), ("NVIDIA A40-48Q", True), ("GRID T4-16Q", True),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", True),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", False), ("GRID RTX6000-4Q", False),
        ("NVIDIA RTX A4000", False), ("NVIDIA A1000", False),
        ("NVIDIA GeForce RTX 4090", False), ("NVIDIA RTX A6000", False), ("NVIDIA T400", False),
        ("NVIDIA RTX 6000 Ada Generation", False), ("NVIDIA GB10", False), ("", False),
    ],
)  # fmt: skip
def test_data_center_gpus_are_known_by_nvidia_smi_s_names(name: str, answer: bool) -> None:
    assert is_data_center_gpu(name) == answer
