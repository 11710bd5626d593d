"""Are the kernels that came compiled with the image the ones that are looked for here?"""

from __future__ import annotations

from collections.abc import Iterator

from attnimg.facts import Machine, Reason
from attnimg.machine.host_facts import ShippedKernels

# They are compiled by CuTe DSL's flavour for CUDA 13, and an older driver does not load them.
# Source: recipes/cuda.toml, 13.0.
_DRIVER_MAJOR = 580


def reasons_against_shipped(shipped: ShippedKernels, machine: Machine) -> tuple[Reason, ...]:
    """Give every reason why a machine with an NVIDIA GPU can't use them; none means that it can."""
    return tuple(_reasons(shipped, machine))


def reasons_against_shipped_triton(shipped: ShippedKernels, machine: Machine) -> tuple[Reason, ...]:
    """Give every reason why Triton compiles kernels anew on a machine with NVIDIA GPUs."""
    return tuple(_triton_reasons(shipped, machine))


def _triton_reasons(shipped: ShippedKernels, machine: Machine) -> Iterator[Reason]:
    # Those of several architectures lie in one folder, each with a name of its own.
    missing = [a for a in (machine.arch.name, *machine.other_archs) if a not in shipped.kernels]
    if missing:
        text = f"they are for {' '.join(shipped.kernels)}, found {' '.join(missing)}"
        yield Reason(code="kernels-arch", text=text)
    yield from _other_packages(shipped)


def _reasons(shipped: ShippedKernels, machine: Machine) -> Iterator[Reason]:
    arch = machine.arch.name
    if arch not in shipped.kernels:
        text = f"they are for {' '.join(shipped.kernels)}, found {arch}"
        yield Reason(code="kernels-arch", text=text)
    if machine.other_archs:
        # One folder is for one architecture: some keys in it do not name theirs.
        text = f"GPUs differ: {arch} and {' '.join(machine.other_archs)}"
        yield Reason(code="kernels-mixed-gpus", text=text)
    major = (machine.driver or "").partition(".")[0]
    if major.isdecimal() and int(major) < _DRIVER_MAJOR:
        text = f"they need driver {_DRIVER_MAJOR} or newer, found {machine.driver}"
        yield Reason(code="kernels-driver", text=text)
    yield from _other_packages(shipped)


def _other_packages(shipped: ShippedKernels) -> Iterator[Reason]:
    for name, version in shipped.built.items():
        here = shipped.found.get(name, "absent")
        if here != version:
            changed = f"{name} {_short(version)} -> {_short(here)}"
            yield Reason(code="kernels-packages", text=f"compiled with another: {changed}")


def _short(version: str) -> str:
    """Shorten a hash; versions are shorter than one."""
    return version[:12]
