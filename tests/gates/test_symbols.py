"""The gates `symbols`, `glibc` and `duplicates` on small images with real libraries of gcc's."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_image import SITE, Special, package, save

LIB = "usr/lib/x86_64-linux-gnu"
PYTHON = "usr/bin/python3.11"
EXT = f"{SITE}/ext/ext.so"
CALLS = "void helper(void); void run(void) { helper(); }"
VERSIONED = "HELP_1 { helper; }; HELP_2 { newer; } HELP_1;"


def image(gcc, path: Path, ext: bytes, **more: bytes | Special) -> Path:
    """Save an image with a C library, an interpreter that offers PyRun, and an extension."""
    libc = gcc("void puts(void) {}", soname="libc.so.6", versions="GLIBC_2.36 { puts; };")
    main = "void PyRun(void) {} void _start(void) {}"
    files = {
        f"{LIB}/libc.so.6": libc,
        PYTHON: Special(gcc(main, "-pie", "-rdynamic", soname=""), mode=0o755),
        "lib": Special(link="usr/lib"),
    }
    named = {key.replace("__", ".").replace("___", "/"): data for key, data in more.items()}
    return save(path, files | package("ext", "1", ext__so=ext) | named)


@pytest.fixture
def broken(run_gate, gcc, tmp_path: Path):
    """Return the findings of `symbols` in an extension beside other libraries."""

    def ask(ext: bytes, others: dict[str, bytes | Special] | None = None) -> list[tuple[str, str]]:
        made = image(gcc, tmp_path / "image.tar", ext, **(others or {}))
        return [(fault.file, fault.found) for fault in run_gate("symbols", "hopper", made)]

    return ask


def test_a_symbol_that_nothing_defines_is_refused(broken, gcc) -> None:
    ext = gcc(CALLS, soname="ext.so")
    assert broken(ext) == [(EXT, "undefined symbol: helper")]


def test_a_symbol_of_a_library_beside_it_that_it_does_not_need_is_refused(broken, gcc) -> None:
    """That it lies there does not help: nobody loads it."""
    helper = gcc("void helper(void) {}", soname="libhelp.so")
    ext = gcc(CALLS, soname="ext.so")
    assert broken(ext, {f"{SITE}/ext/libhelp.so": helper}) == [(EXT, "undefined symbol: helper")]


@pytest.mark.parametrize(
    "place", [f"{SITE}/ext/libhelp.so", f"{LIB}/libhelp.so", f"{SITE}/other.libs/libhelp.so"]
)
def test_a_needed_library_is_found_by_runpath_or_where_the_system_has_it(
    broken, gcc, place: str
) -> None:
    helper = gcc("void helper(void) {}", soname="libhelp.so")
    ext = gcc(CALLS, "-lhelp", "-Wl,-rpath,$ORIGIN:$ORIGIN/../other.libs", soname="ext.so")
    assert broken(ext, {place: helper}) == []


def test_a_needed_library_that_lies_elsewhere_is_refused(broken, gcc) -> None:
    helper = gcc("void helper(void) {}", soname="libhelp.so")
    ext = gcc(CALLS, "-lhelp", soname="ext.so")
    assert broken(ext, {f"{SITE}/ext/libhelp.so": helper}) == [(EXT, "it needs libhelp.so")]


def test_a_library_that_lost_a_symbol_is_refused(broken, gcc) -> None:
    """The `undefined symbol: _ZN3c10...` of an extension built against another torch."""
    gcc("void helper(void) {}", soname="libhelp.so")
    ext = gcc(CALLS, "-lhelp", "-Wl,-rpath,$ORIGIN", soname="ext.so")
    newer = gcc("void renamed(void) {}", soname="libhelp.so")
    found = broken(ext, {f"{SITE}/ext/libhelp.so": newer})
    assert found == [(EXT, "undefined symbol: helper")]


def test_a_library_that_lacks_a_version_is_refused(broken, gcc) -> None:
    gcc("void helper(void) {} void newer(void) {}", soname="libhelp.so", versions=VERSIONED)
    ext = gcc(CALLS.replace("helper", "newer"), "-lhelp", "-Wl,-rpath,$ORIGIN", soname="ext.so")
    older = gcc("void helper(void) {}", soname="libhelp.so", versions="HELP_1 { helper; };")
    found = broken(ext, {f"{SITE}/ext/libhelp.so": older})
    assert found == [(EXT, "libhelp.so without them")]


def test_a_symbol_in_another_version_is_refused(broken, gcc) -> None:
    source = "void helper(void) {} void newer(void) {}"
    gcc(source, soname="libhelp.so", versions=VERSIONED)
    ext = gcc(CALLS.replace("helper", "newer"), "-lhelp", "-Wl,-rpath,$ORIGIN", soname="ext.so")
    moved = "HELP_1 { helper; newer; }; HELP_2 { global: other; } HELP_1;"
    other = gcc(source + " void other(void) {}", soname="libhelp.so", versions=moved)
    found = broken(ext, {f"{SITE}/ext/libhelp.so": other})
    assert found == [(EXT, "undefined symbol: newer@HELP_2")]


def test_what_torch_has_loaded_is_found_by_its_name(broken, gcc) -> None:
    """Extensions for torch have no RUNPATH to it: `import torch` comes first."""
    helper = gcc("void helper(void) {}", soname="libtorch.so")
    ext = gcc(CALLS, "-ltorch", soname="ext.so")
    core = gcc(CALLS, "-ltorch", "-Wl,-rpath,$ORIGIN/lib", soname="")
    there = {f"{SITE}/torch/lib/libtorch.so": helper, f"{SITE}/torch/_C.cpython-311.so": core}
    assert broken(ext, there) == []
    assert broken(ext, {f"{SITE}/torch/lib/libtorch.so": helper}) == [(EXT, "it needs libtorch.so")]


def test_python_s_own_symbols_and_weak_ones_are_fine(broken, gcc) -> None:
    source = (
        "void PyRun(void); __attribute__((weak)) void may(void); void run(void) { PyRun(); may(); }"
    )
    assert broken(gcc(source, soname="ext.so")) == []


@pytest.mark.parametrize(
    ("call", "says"),
    [
        pytest.param("cuLaunchKernel", [], id="the driver's functions are trusted to be there"),
        pytest.param(
            "cudaMalloc", [(EXT, "undefined symbol: cudaMalloc")], id="the runtime's are not"
        ),
    ],
)
def test_the_driver_comes_with_the_machine(
    broken, gcc, call: str, says: list[tuple[str, str]]
) -> None:
    gcc(f"void {call}(void) {{}}", soname="libcuda.so.1")
    ext = gcc(CALLS.replace("helper", call), "-l:libcuda.so.1", soname="ext.so")
    assert broken(ext) == says


def test_a_function_of_the_driver_is_not_there_without_its_library(broken, gcc) -> None:
    """SageAttention 2.2.0, linked with a stub of libcuda that the linker had left out."""
    ext = gcc(CALLS.replace("helper", "cuTensorMapEncodeTiled"), soname="ext.so")
    assert broken(ext) == [(EXT, "undefined symbol: cuTensorMapEncodeTiled")]


def test_an_extension_for_a_newer_c_library_is_refused(run_gate, gcc, tmp_path: Path) -> None:
    newer = "GLIBC_2.36 { puts; }; GLIBC_2.38 { gets; } GLIBC_2.36;"
    gcc("void puts(void) {} void gets(void) {}", soname="libc.so.6", versions=newer)
    ext = gcc(CALLS.replace("helper", "gets"), "-l:libc.so.6", soname="ext.so")
    faults = run_gate("glibc", "hopper", image(gcc, tmp_path / "image.tar", ext))
    assert [(f.file, f.found, f.needed) for f in faults] == [
        (EXT, "GLIBC 2.38", "at most 2.36, which the base has")
    ]


@pytest.mark.parametrize(
    ("second", "says"),
    [
        pytest.param("void one(void) {}", "the same bytes", id="the same bytes"),
        pytest.param("void two(void) {}", "the name libone.so", id="the same name"),
        pytest.param(None, None, id="once"),
    ],
)
def test_a_library_in_two_places_is_refused(
    run_gate, gcc, tmp_path: Path, second: str | None, says: str | None
) -> None:
    weight = "const char weight[30000] = {1};"
    files = {"opt/a/libone.so": gcc("void one(void) {}" + weight, soname="libone.so")}
    if second:
        files["opt/b/other.so"] = gcc(second + weight, soname="libone.so")
    faults = run_gate("duplicates", "cpu", save(tmp_path / "image.tar", files))
    assert [(f.file, f.found.partition(" as ")[0]) for f in faults] == (
        [("opt/b/other.so", says)] if says else []
    )


def test_a_link_to_a_library_is_no_copy_of_it(run_gate, gcc, tmp_path: Path) -> None:
    files = {
        "a/libone.so.1": gcc("int x;", soname="libone.so.1"),
        "a/libone.so": Special(link="libone.so.1"),
    }
    assert run_gate("duplicates", "cpu", save(tmp_path / "image.tar", files)) == ()
