"""Look up the architecture of a GPU by its name, in the catalogue data/gpus.toml."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import Literal

from attnimg.errors import AttnimgError
from attnimg.facts import Arch
from attnimg.files import read_data

_SM = re.compile(r"sm_([1-9][0-9]?)([0-9])")
_GFX = re.compile(r"gfx[1-9][0-9a-f]{2,3}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One entry of the catalogue.

    Attributes:
        name: the value of --on, "h100".
        arch: its architecture.
        label: its full name, "NVIDIA H100 80GB".
        memory_gb: nominal device memory; None for "cpu" and for an architecture such as "sm_90".
        cpu: the CPU architecture of its machines; None for an architecture such as "sm_90".
    """

    name: str
    arch: Arch
    label: str
    memory_gb: int | None = None
    cpu: Literal["amd64", "arm64"] | None = None


def arch_from_name(name: str) -> Arch:
    """Return the architecture of a name: "sm_90", "gfx942" or "cpu".

    Raises:
        AttnimgError: the name is not of this form (code "unknown-gpu").
    """
    if name == "cpu":
        return Arch(name="cpu", vendor="cpu")
    if sm := _SM.fullmatch(name):
        return Arch(name=name, vendor="nvidia", capability=(int(sm[1]), int(sm[2])))
    if _GFX.fullmatch(name):
        return Arch(name=name, vendor="amd")
    raise _unknown(name, known=[])


def catalogue() -> dict[str, Gpu]:
    """Return data/gpus.toml: name -> GPU, in the file's order."""
    return {
        name: Gpu(
            name=name,
            arch=arch_from_name(entry["arch"]),
            label=entry["label"],
            memory_gb=entry.get("memory_gb"),
            cpu=entry.get("cpu", "amd64"),
        )
        for name, entry in read_data("gpus.toml").items()
    }


def gpu_named(text: str) -> Gpu:
    """Return the GPU for a value of --on.

    Args:
        text: a name in the catalogue, or any sm_NN, sm_NNN, gfxNNN.

    Raises:
        AttnimgError: it is neither (code "unknown-gpu"); the message suggests similar names.
    """
    if text != "cpu" and (_SM.fullmatch(text) or _GFX.fullmatch(text)):
        return Gpu(name=text, arch=arch_from_name(text), label=text)
    known = catalogue()
    if text in known:
        return known[text]
    raise _unknown(text, known=list(known))


def parse_gpu(text: str) -> tuple[Arch, str]:
    """Return the architecture and the label for a value of --on; see gpu_named."""
    gpu = gpu_named(text)
    return gpu.arch, gpu.label


def cpus_with(arch: Arch) -> frozenset[str]:
    """Return the CPU architectures of machines with a GPU architecture, from the catalogue."""
    return frozenset(gpu.cpu for gpu in catalogue().values() if gpu.arch == arch and gpu.cpu)


def _unknown(text: str, *, known: list[str]) -> AttnimgError:
    lower = text.strip().lower()
    if lower in known or _SM.fullmatch(lower) or _GFX.fullmatch(lower):
        why = f"found {text!r}; only case or blanks differ from {lower!r}"
        do = f"write {lower}"
    elif lower.startswith(("sm_", "gfx")):
        why = f"found {text!r}; needed sm_ and two or three digits, or gfx and three or four"
        do = "write an architecture as sm_90 or gfx942"
    else:
        near = difflib.get_close_matches(lower, known, n=3, cutoff=0.5)
        why = f"found {text!r}; needed sm_NN, sm_NNN, gfxNNN" + (
            f", or one of: {' '.join(known)}" if known else " or cpu"
        )
        do = f"did you mean {' or '.join(near)}?" if near else "name the GPU, such as h100 or sm_90"
    return AttnimgError(f"unknown GPU {text!r}", why=why, do=do, code="unknown-gpu")
