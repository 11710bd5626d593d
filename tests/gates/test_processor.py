"""The gate `processor`, and `symbols` and `glibc` for arm64, on real libraries for aarch64."""

from __future__ import annotations

import base64
import platform
import shutil
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import plan_of
from small_image import SITE, Special, package, save, wheelhouse

from recipes.artifact.facts import Artifact
from recipes.artifact.linking import PROCESSORS
from recipes.artifact.read import read_image, read_wheelhouse
from recipes.gates import ExpectedContents, GateFinding, gate_named

# `void run(void) {}`, by aarch64-linux-gnu-gcc 12.2.0 -fPIC -nostdlib -shared -O2 -s with the
# linker's options -soname,ext.so --build-id=none -z,max-page-size=4096,-z,noseparate-code
# (2026-11-28); compressed by zlib.
AARCH64 = zlib.decompress(
    base64.b64decode(
        "eNrtWL1O40AQHv9cFEF0QeiQIiFICk7KCd0qoCs4aJDCQUMBlHdFZBJzRsIOso0ENLSU9xY8ApR5AGpqGqS8"
        "AFchzMaZIbsrGyjQFaf9JPvb8c63P7PrYubsx+a6aRhAsOASRhbAKvL5hPhtCQr8XYLx1PcD5GPVlBlwnIGu"
        "wJ9aeWjXqjLfgsykM1/R9UDmIvLWXdyxOdu4DpU/gcw28jbXFeDtoDDt4Hxv3R/F3MQ2xYdjTuz/dXE+/tL8"
        "A7/JwepNeR8QHgXgHscs6kr+Pat1Y0xbKxOofUiSpC7swzjdAft41pguVdNvFf5ccx8bNDQ0NDQ0NDQ0NDQ0"
        "/i98RKYc9/4xSROoP4b8vY825YpXaI+hXUKm5K3yj9ZP+WYeNprN5Vp9zd3dd4LawiJbZI2vC9++YBOARV4U"
        "h7GzC+x3cMQ8J/KAdU6C6MQfchwCi3liCcz1Wnuh47strxOOrNTL8ffbfIBunL7Y4QFvtLu+7wbxO+1zENe/"
        "SdKlMgOdD/GckF+LdQHCFI5hKudH3Hiujwzz5KJyjjPYZyr3gbiUkaeL+Czn/KOB1DxeqTMQ5lFPsrz6BkD2"
        "eN8VfcWUua74q/Fr4tot5d5R/aMnxE/U0z42cX7qv6U6STl7vqLC24q+j/p+Oft/U/U/Ud/IKehUc85PZCvj"
        "XlZR337l/J8AuJ9j9A=="
    )
)
EXT = f"{SITE}/ext/ext.so"


def judge(gate: str, artifact: Artifact, target: str) -> list[GateFinding]:
    expected = ExpectedContents(plan=plan_of("hopper"), platform=target, pins={})
    return list(gate_named(gate).check(artifact, expected))


def image(path: Path, **files: bytes | Special) -> Artifact:
    return read_image(save(path, package("ext", "1", **files)), log=lambda _: None)


@pytest.mark.parametrize(
    ("target", "found"),
    [
        pytest.param("linux/arm64", [], id="its own platform"),
        pytest.param(
            "linux/amd64",
            [(EXT, "machine code for EM_AARCH64", "EM_X86_64, the processor of linux/amd64")],
            id="another",
        ),
    ],
)
def test_a_library_for_aarch64_is_for_linux_arm64_alone(
    tmp_path: Path, target: str, found: list[tuple[str, str, str]]
) -> None:
    made = image(tmp_path / "image.tar", ext__so=AARCH64)
    assert [(f.file, f.found, f.needed) for f in judge("processor", made, target)] == found


def test_a_library_of_this_machine_is_for_its_platform_alone(gcc, tmp_path: Path) -> None:
    made = image(tmp_path / "image.tar", ext__so=gcc("int x;", soname="ext.so"))
    for target, processor in PROCESSORS.items():
        fits = processor.machine == platform.machine()
        assert bool(judge("processor", made, target)) is not fits


def test_code_of_gpus_scripts_and_data_are_for_any_processor(cuda, tmp_path: Path) -> None:
    made = image(tmp_path / "image.tar", k__cubin=cuda("sm_90a", "-cubin"), ext__py=b"x = 1\n")
    assert all(judge("processor", made, target) == [] for target in PROCESSORS)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("ext-1-cp311-cp311-linux_aarch64.whl", []),
        ("ext-1-cp311-cp311-manylinux_2_28_aarch64.whl", []),
        ("ext-1-cp39-abi3-manylinux_2_17_aarch64.manylinux2014_aarch64.whl", []),
        ("ext-1-py3-none-any.whl", []),
        ("ext-1-cp311-cp311-linux_x86_64.whl", ["the platform linux_x86_64 in its name"]),
        ("ext-1-cp311.whl", ["not the name of a wheel"]),
    ],
)
def test_the_name_of_a_wheel_says_the_platform_of_what_is_in_it(
    tmp_path: Path, name: str, found: list[str]
) -> None:
    files = package("ext", "1", site="", ext__so=AARCH64)
    made = read_wheelhouse(
        wheelhouse(tmp_path / "wheels", {name: files}, {}), over=None, log=lambda _: None
    )
    assert [f.found for f in judge("processor", made, "linux/arm64")] == found


@pytest.fixture
def cross(gcc):
    """Compile for aarch64: cross(source, *options, soname=, versions=)."""
    if shutil.which("aarch64-linux-gnu-gcc") is None:
        pytest.skip("aarch64-linux-gnu-gcc is not installed: apt-get install gcc-aarch64-linux-gnu")
    return lambda *given, **rest: gcc(*given, compiler="aarch64-linux-gnu-gcc", **rest)


def test_libraries_of_an_arm64_image_are_found_in_its_folders(cross, tmp_path: Path) -> None:
    calls = "void helper(void); void run(void) { helper(); }"
    folder = "usr/lib/aarch64-linux-gnu"
    libraries = {
        f"{folder}/libc.so.6": cross("int x;", soname="libc.so.6"),
        f"{folder}/libhelp.so": cross("void helper(void) {}", soname="libhelp.so"),
        **package("ext", "1", ext__so=cross(calls, "-lhelp", soname="ext.so")),
    }
    made = read_image(save(tmp_path / "image.tar", libraries), log=lambda _: None)
    assert judge("symbols", made, "linux/arm64") == []
    # Debian's folder of another processor is not searched.
    moved = {key.replace("aarch64", "x86_64"): data for key, data in libraries.items()}
    made = read_image(save(tmp_path / "moved.tar", moved), log=lambda _: None)
    assert [f.found for f in judge("symbols", made, "linux/arm64")] == ["it needs libhelp.so"]


def test_a_library_for_aarch64_that_needs_a_newer_c_library_is_refused(
    cross, tmp_path: Path
) -> None:
    cross("void gets(void) {}", soname="libc.so.6", versions="GLIBC_2.38 { gets; };")
    made = image(
        tmp_path / "image.tar",
        ext__so=cross(
            "void gets(void); void run(void) { gets(); }", "-l:libc.so.6", soname="ext.so"
        ),
    )
    base = plan_of("hopper").base
    expected = ExpectedContents(plan=plan_of("hopper"), platform="linux/arm64", pins={}, base=base)
    check = gate_named("glibc").check
    assert [f.found for f in check(made, expected)] == ["GLIBC 2.38"]
    assert check(made, replace(expected, base=replace(base, glibc="2.38"))) == ()
