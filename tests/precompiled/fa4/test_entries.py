"""What is read of an entry: a wrong architecture and an instruction too new are seen."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

import pytest
from precompiled.entries import beyond_baseline, gpu_codes
from precompiled.fa4.method import refuse_other_cpu


def cuda_image(sm: int, options: bytes) -> bytes:
    """Make the header of a CUDA ELF image, with ptxas's options for content."""
    header = struct.pack(
        "<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01\x41\x08", 2, 190, 1, 0, 0, 64 + len(options),
        0x6000000 | sm << 8 | 4, 64, 0, 0, 64, 0, 0,
    )  # fmt: skip
    return header + options


@pytest.mark.parametrize(
    ("data", "codes"),
    [
        pytest.param(cuda_image(90, b"-O 3 -arch sm_90a"), ("sm_90a",), id="one image"),
        pytest.param(
            b"x" * 5 + cuda_image(100, b"-arch sm_100a ") + cuda_image(90, b"-arch sm_90 "),
            ("sm_100a", "sm_90"),
            id="two images, anywhere",
        ),
        pytest.param(
            cuda_image(103, b"-arch sm_100a"),
            ("sm_103 with options for sm_100a",),
            id="header and options disagree",
        ),
        pytest.param(cuda_image(120, b""), ("sm_120 with options for nothing",), id="no options"),
        pytest.param(b"\x7fELF\x02\x01" + b"\0" * 100, (), id="an ELF of another machine"),
        pytest.param(b"", (), id="nothing"),
    ],
)
def test_architectures(data: bytes, codes: tuple[str, ...]) -> None:
    assert gpu_codes(data) == codes


@pytest.mark.parametrize(
    ("instruction", "beyond"),
    [
        pytest.param("addps %xmm0, %xmm1", [], id="SSE is every x86-64's"),
        pytest.param("rep bsf %rax, %rbx", [], id="tzcnt runs as bsf where it is unknown"),
        pytest.param("vaddps %ymm0, %ymm1, %ymm2", ["vaddps"], id="AVX"),
        pytest.param("vmovdqu64 %zmm0, (%rax)", ["vmovdqu64"], id="AVX-512"),
        pytest.param("shlx %rax, %rbx, %rcx", ["shlx"], id="BMI2"),
        pytest.param("popcnt %rax, %rbx", ["popcnt"], id="popcnt"),
    ],
)
def test_instructions(tmp_path: Path, instruction: str, beyond: list[str]) -> None:
    entry = tmp_path / "entry.o"
    subprocess.run(["as", "-o", str(entry)], input=instruction + "\n", text=True, check=True)
    assert beyond_baseline(entry, objdump="objdump") == beyond


def test_a_file_without_code_is_no_file_without_avx(tmp_path: Path) -> None:
    entry = tmp_path / "entry.o"
    subprocess.run(["as", "-o", str(entry)], input=".data\n.byte 1\n", text=True, check=True)
    with pytest.raises(ValueError, match="no instructions"):
        beyond_baseline(entry, objdump="objdump")


def test_another_cpu_than_the_launchers_is_refused() -> None:
    refuse_other_cpu("x86_64")
    with pytest.raises(SystemExit, match="found aarch64; no entry was tried on another CPU"):
        refuse_other_cpu("aarch64")
