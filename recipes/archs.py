"""Compare architectures: the devices that they name, and the machine code that a device runs."""

from __future__ import annotations

import re

_CODE = re.compile(r"(sm|compute|lto)_(\d+)(\d)([af]?)")


def device_name(arch: str) -> str:
    """Return the device that a compiler target is for: sm_90a is machine code for sm_90."""
    return re.sub(r"(?<=\d)[af]$", "", arch) if arch.startswith("sm_") else arch


def torch_arch(arch: str) -> str:
    """Return torch's name of an architecture, as TORCH_CUDA_ARCH_LIST has it: 9.0a for sm_90a."""
    return re.sub(r"sm_(\d+)(\d)([af]?)", r"\1.\2\3", arch)


def can_run(arch: str, code: str) -> bool:
    """Return whether a device runs a code: the same major and no newer minor; PTX, no newer.

    sm_90a runs on 9.0 only; sm_100f on 10.x. Source: CUDA C++ Programming Guide 13.0, 5.1.2,
    Feature Set Compiler Targets (2026-11-25).
    """
    device, target = _CODE.fullmatch(arch), _CODE.fullmatch(code)
    if device is None or target is None:
        return arch == code
    kind, letter = target[1], target[4]
    here, built = (int(device[2]), int(device[3])), (int(target[2]), int(target[3]))
    if letter == "a":
        return here == built
    if kind == "compute" and not letter:
        return here >= built
    return kind in ("sm", "compute") and here[0] == built[0] and here >= built


def sort_key(code: str) -> tuple[str, int, str]:
    """Return a key by which codes are sorted: PTX apart, then by number."""
    match = _CODE.fullmatch(code)
    return (match[1], int(match[2] + match[3]), match[4]) if match else (code, 0, "")
