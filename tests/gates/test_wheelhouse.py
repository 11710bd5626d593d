"""A wheelhouse is judged alone, and over an image that its symbols are looked for in."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import plan_of
from small_image import SITE, package, save, wheelhouse

from recipes.artifact.facts import Artifact
from recipes.artifact.read import read_image, read_wheelhouse
from recipes.gates.symbols import skip_reason

WHEEL = "flash_attn-2.8.3.post2-cp311-cp311-linux_x86_64.whl"
LIBC = "usr/lib/x86_64-linux-gnu/libc.so.6"


def manifest(**changes: object) -> dict[str, object]:
    plan = plan_of("hopper")
    kernels = [
        {"name": step.kernel.name, "key": changes.get("key", step.key)}
        for step in plan.steps
        if step.kernel.form != "wheel"
    ]
    return {"image": "hopper", "abi": changes.get("abi", plan.abi), "kernels": kernels}


def house(folder: Path, ext: bytes, over: Artifact | None = None, said: object = None) -> Artifact:
    files = package("flash-attn", "2.8.3.post2", site="", ext__so=ext)
    made = wheelhouse(folder, {WHEEL: files}, said or manifest())
    return read_wheelhouse(made, over=over, log=lambda _: None)


def test_an_extra_architecture_in_a_wheel_is_named(cuda, run_gate, tmp_path: Path) -> None:
    faults = run_gate("machine-code", "hopper", house(tmp_path / "wheels", cuda("sm_90 sm_80")))
    assert [(f.file, f.found) for f in faults] == [("flash_attn/ext.so", "sm_80 too")]


def test_symbols_of_a_wheel_alone_are_not_judged(gcc, tmp_path: Path) -> None:
    alone = house(tmp_path / "wheels", gcc("int x;", soname="ext.so"))
    assert "add ARCHIVE=" in skip_reason(alone, None)  # type: ignore[arg-type]


def test_symbols_of_a_wheel_are_looked_for_in_the_image_it_is_laid_over(
    run_gate, gcc, tmp_path: Path
) -> None:
    calls = "void helper(void); void run(void) { helper(); }"
    helper = gcc("void helper(void) {}", soname="libtorch.so")
    core = gcc(calls, "-ltorch", "-Wl,-rpath,$ORIGIN/lib", soname="")
    ext = gcc(calls, "-ltorch", soname="ext.so")
    torch = package("torch", "2.14.1", **{"_C__cpython-311-x86_64-linux-gnu__so": core})
    libraries = {f"{SITE}/torch/lib/libtorch.so": helper, LIBC: gcc("int x;", soname="libc.so.6")}
    image = read_image(save(tmp_path / "image.tar", torch | libraries), log=lambda _: None)
    assert run_gate("symbols", "hopper", house(tmp_path / "good", ext, over=image)) == ()
    wrong = gcc(calls.replace("helper", "gone"), "-ltorch", soname="ext.so")
    faults = run_gate("symbols", "hopper", house(tmp_path / "bad", wrong, over=image))
    assert [(f.file, f.found) for f in faults] == [
        (f"{SITE}/flash_attn/ext.so", "undefined symbol: gone")
    ]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        pytest.param(
            {"abi": "cp311-torch2.13-cu130"}, "abi cp311-torch2.13-cu130", id="another torch"
        ),
        pytest.param({"key": "0" * 16}, f"key {'0' * 16} of flash-attn", id="another recipe"),
    ],
)
def test_a_wheelhouse_of_another_recipe_is_refused(
    run_gate, gcc, tmp_path: Path, changes: dict[str, str], says: str
) -> None:
    ext = gcc("int x;", soname="ext.so")
    made = house(tmp_path / "wheels", ext, said=manifest(**changes))
    assert says in {f.found for f in run_gate("pins", "hopper", made)}


def test_a_wheel_for_a_newer_c_library_than_the_base_s_is_refused(
    run_gate, gcc, tmp_path: Path
) -> None:
    gcc("void gets(void) {}", soname="libc.so.6", versions="GLIBC_2.38 { gets; };")
    calls = "void gets(void); void run(void) { gets(); }"
    ext = gcc(calls, "-l:libc.so.6", soname="ext.so")
    faults = run_gate("glibc", "hopper", house(tmp_path / "wheels", ext))
    assert [(f.found, f.needed) for f in faults] == [
        ("GLIBC 2.38", "at most 2.36, which the base has")
    ]


def test_a_part_of_the_wheels_is_refused_with_the_kernels_that_are_missing(
    run_gate, gcc, tmp_path: Path
) -> None:
    plan = plan_of("hopper")
    (first,) = (kernel for kernel in manifest()["kernels"] if kernel["name"] == "flash-attn")
    said = {**manifest(), "kernels": [first]}
    found = run_gate(
        "pins", "hopper", house(tmp_path / "wheels", gcc("int x;", soname="ext.so"), said=said)
    )
    missing = {step.kernel.name for step in plan.steps if step.kernel.form != "wheel"}
    assert {f.file: f.do for f in found} == {
        name: f"make wheels/hopper KERNEL={name}" for name in missing - {"flash-attn"}
    }


def test_wheels_that_changed_or_are_missing_are_refused(run_gate, gcc, tmp_path: Path) -> None:
    house(tmp_path / "wheels", gcc("int x;", soname="ext.so"))
    with (tmp_path / "wheels" / WHEEL).open("ab") as wheel:
        wheel.write(b" ")
    read = read_wheelhouse(tmp_path / "wheels", over=None, log=lambda _: None)
    faults = {f.file: f.found for f in run_gate("pins", "hopper", read)}
    assert faults[WHEEL] == "a hash that is not in SHA256SUMS"
    assert faults["flash-attn-3"] == "nothing installed"
