"""The gate `machine-code` on what nvcc really writes: each wrong set of architectures is named."""

from __future__ import annotations

import io
import struct
import subprocess
from pathlib import Path

import pytest
from small_image import SITE, package, save

from recipes.artifact.cuobjdump import list_codes
from recipes.artifact.elf import read_elf
from recipes.artifact.fatbin import bundle_codes

FILE = f"{SITE}/flash_attn/ext.so"


def found_in(data: bytes) -> set[str]:
    elf = read_elf(io.BytesIO(data))
    assert elf.faults == ()
    return set(elf.codes)


@pytest.mark.parametrize("mode", ["none", "speed", "balance", "size"])
def test_architectures_are_read_as_cuobjdump_lists_them(cuda, mode: str) -> None:
    options = ("-shared", "-Xcompiler", "-fPIC", "-cudart", "none", f"--compress-mode={mode}")
    made = cuda("sm_75 sm_80 sm_90 sm_90a sm_103a compute_120", *options)
    assert found_in(made) == {"sm_75", "sm_80", "sm_90", "sm_90a", "sm_103a", "compute_120"}
    assert list_codes(io.BytesIO(made), len(made)) == found_in(made)


@pytest.mark.parametrize("code", ["sm_90", "sm_90a", "sm_100a", "sm_100f", "sm_121f"])
@pytest.mark.parametrize("kind", ["-shared", "-cubin", "-fatbin", "-c", "-rdc=true"])
def test_the_letter_of_an_architecture_is_read_in_every_kind_of_file(
    cuda, code: str, kind: str
) -> None:
    more = ("-shared",) if kind == "-rdc=true" else ()
    options = (kind, *more, "-Xcompiler", "-fPIC", "-cudart", "none")
    made = cuda(code, *options)
    if kind == "-fatbin":
        archive = {"x.fatbin": made}
        assert codes_of(archive) == {code}
    else:
        assert found_in(made) == {code}


def codes_of(files: dict[str, bytes]) -> set[str]:
    from recipes.artifact.entries import Entry, read_entry

    ((name, data),) = files.items()
    entry = Entry(
        path=name, bytes=len(data), mode=0o644, kind="file", open=lambda: io.BytesIO(data)
    )
    elf = read_entry(entry, layer=0).elf
    assert elf is not None
    return set(elf.codes)


def test_machine_code_among_other_data_is_found(cuda, gcc) -> None:
    cubin = cuda("sm_90a", "-cubin")
    words = ",".join(str(byte) for byte in b"before" + bytes(58) + cubin)
    made = gcc(f"const unsigned char data[] = {{{words}}};", soname="libdata.so")
    elf = read_elf(io.BytesIO(made))
    assert (elf.codes, elf.section_codes) == ({"sm_90a"}, set())


@pytest.mark.parametrize(
    ("codes", "says"),
    [
        pytest.param("sm_90", None, id="what the recipe declares passes"),
        pytest.param("sm_90 sm_80", "sm_80 too", id="an extra architecture"),
        pytest.param("sm_90 compute_90", "compute_90 too", id="PTX where none is declared"),
        pytest.param("sm_90a", "sm_90a too", id="code for 9.0 alone where 9.x is declared"),
        pytest.param("sm_80", "needed sm_90 too", id="a missing architecture"),
    ],
)
def test_a_kernel_has_its_recipe_s_machine_code(
    cuda, run_gate, tmp_path: Path, codes: str, says: str | None
) -> None:
    files = package("flash-attn", "2.8.3.post2", ext__so=cuda(codes))
    faults = run_gate("machine-code", "hopper", save(tmp_path / "image.tar", files))
    texts = [f"{f.file}: found {f.found}; needed {f.needed}" for f in faults]
    assert (texts == []) == (says is None)
    assert says is None or any(says in text and FILE in text for text in texts)


def test_a_kernel_without_any_machine_code_is_refused(run_gate, gcc, tmp_path: Path) -> None:
    files = package("flash-attn", "2.8.3.post2", ext__so=gcc("int x;", soname="ext.so"))
    faults = run_gate("machine-code", "hopper", save(tmp_path / "image.tar", files))
    assert "flash-attn" in {f.file for f in faults if f.found == "no GPU code"}


def test_a_library_that_no_promised_gpu_runs_is_refused(cuda, run_gate, tmp_path: Path) -> None:
    image = save(tmp_path / "image.tar", package("other", "1", old__so=cuda("sm_75")))
    faults = [f for f in run_gate("machine-code", "hopper", image) if f.file.endswith("old.so")]
    assert [(f.found, f.needed) for f in faults] == [("sm_75", "code that sm_90a runs")]


@pytest.mark.parametrize(
    ("codes", "lacks"),
    [
        pytest.param("sm_75 sm_80 sm_86 sm_90 sm_100 sm_120", [], id="as its release has it"),
        pytest.param(
            "sm_75 sm_80 sm_86 sm_90 sm_90a sm_100 sm_120", [], id="some kernels have more"
        ),
        pytest.param(
            "sm_75 sm_80 sm_86 sm_90 sm_120",
            ["sm_100 too, as recipes/torch.toml says"],
            id="another release",
        ),
        pytest.param(
            "sm_75 sm_80",
            ["sm_86 sm_90 sm_100 sm_120 too, as recipes/torch.toml says", "code that sm_90a runs"],
            id="nothing for the image's GPU",
        ),
    ],
)
def test_torch_has_the_machine_code_of_its_release(
    cuda, run_gate, tmp_path: Path, codes: str, lacks: list[str]
) -> None:
    image = save(tmp_path / "image.tar", package("torch", "2.14.1", libtorch_cuda__so=cuda(codes)))
    assert [f.needed for f in run_gate("machine-code", "hopper", image)] == lacks


@pytest.mark.parametrize(
    ("place", "says"),
    [
        pytest.param("opt/attnimg/fa4/sm_90/key/fwd/a.cubin", [], id="in its own folder"),
        pytest.param("opt/other/a.cubin", [], id="in no architecture's folder"),
        pytest.param(
            "opt/attnimg/fa4/sm_100/key/fwd/a.cubin",
            ["what recipes/kernels/flash-attn-4.toml declares for sm_100: no GPU code"],
            id="in another's",
        ),
    ],
)
def test_what_was_compiled_ahead_of_time_is_for_its_folder(
    cuda, run_gate, tmp_path: Path, place: str, says: list[str]
) -> None:
    image = save(tmp_path / "image.tar", {place: cuda("sm_90a", "-cubin")})
    assert [f.needed for f in run_gate("machine-code", "hopper", image)] == says


def test_a_cpu_image_has_no_gpu_code(cuda, run_gate, tmp_path: Path) -> None:
    image = save(tmp_path / "image.tar", package("other", "1", gpu__so=cuda("sm_90")))
    assert [f.needed for f in run_gate("machine-code", "cpu", image)] == [
        "no GPU code in a cpu image"
    ]


def test_a_fat_binary_that_is_cut_off_is_refused(cuda, run_gate, tmp_path: Path) -> None:
    made = bytearray(cuda("sm_90"))
    place = made.index(struct.pack("<I", 0xBA55ED50))
    made[place + 8 : place + 16] = struct.pack("<Q", 1 << 40)
    files = package("flash-attn", "2.8.3.post2", ext__so=bytes(made))
    faults = run_gate("machine-code", "hopper", save(tmp_path / "image.tar", files))
    assert any("is cut off" in f.found and f.file == FILE for f in faults)


# HIP's compiler is not on PyPI, so its bundles are made by hand, as clang's documentation says.
def bundle(*targets: str) -> bytes:
    head = b"__CLANG_OFFLOAD_BUNDLE__" + struct.pack("<Q", len(targets))
    for target in targets:
        head += struct.pack("<QQQ", 4096, 0, len(target)) + target.encode()
    return head


AMD = (
    "host-x86_64-unknown-linux-gnu-",
    "hipv4-amdgcn-amd-amdhsa--gfx90a:xnack-",
    "hipv4-amdgcn-amd-amdhsa--gfx942",
)


@pytest.mark.parametrize("padding", [0, 1 << 20, (1 << 20) - 7])
def test_hip_bundles_are_read_wherever_they_stand(padding: int) -> None:
    data = (
        bytes(padding)
        + bundle(*AMD)
        + bytes(4096)
        + bundle(AMD[0], "hip-amdgcn-amd-amdhsa--gfx950")
    )
    found = bundle_codes(io.BytesIO(data), start=0, size=len(data))
    assert found == {"gfx90a", "gfx942", "gfx950"}


@pytest.mark.parametrize("version", [1, 2, 3])
@pytest.mark.parametrize("method", ["zlib", "zstd"])
def test_compressed_hip_bundles_are_read(version: int, method: str) -> None:
    import zlib

    import zstandard

    plain = bundle(*AMD)
    packed = zlib.compress(plain) if method == "zlib" else zstandard.compress(plain)
    sizes = {1: "<I", 2: "<II", 3: "<QQ"}[version]
    numbers = (len(plain),) if version == 1 else (len(packed), len(plain))
    head = b"CCOB" + struct.pack("<HH", version, ["zlib", "zstd"].index(method))
    start = {1: 20, 2: 24, 3: 32}[version]
    numbers = numbers if version == 1 else (start + len(packed), len(plain))
    data = head + struct.pack(sizes, *numbers) + bytes(8) + packed
    assert bundle_codes(io.BytesIO(data), start=0, size=len(data)) == {"gfx90a", "gfx942"}


def test_a_rocm_kernel_without_a_declared_target_is_refused(run_gate, gcc, tmp_path: Path) -> None:
    (tmp_path / "bundle").write_bytes(bundle(*AMD))
    (tmp_path / "plain.so").write_bytes(gcc("int x;", soname="plain.so"))
    command = [
        "objcopy",
        "--add-section",
        f".hip_fatbin={tmp_path / 'bundle'}",
        "plain.so",
        "hip.so",
    ]
    subprocess.run(command, check=True, cwd=tmp_path)
    files = package("flash-attn", "2.8.3.post2", ext__so=(tmp_path / "hip.so").read_bytes())
    faults = run_gate("machine-code", "rocm", save(tmp_path / "image.tar", files))
    assert [f.needed.split()[0] for f in faults if f.file == FILE] == ["gfx950"]
