"""Choose which of a package's kernels run here, where an environment variable does that."""

from __future__ import annotations

from collections.abc import Mapping

from attnimg.backends import all_backends, contrary_settings
from attnimg.facts import Machine
from attnimg.machine.kernel_cache.notes import say


def variant_settings(machine: Machine, environment: Mapping[str, str]) -> dict[str, str]:
    """Choose the kernels that run here; what is set holds, and is named where it errs."""
    settings: dict[str, str] = {}
    for backend in all_backends():
        for setting in contrary_settings(backend, machine.arch, environment):
            kernels, arch = backend.variants[machine.arch.name].name, machine.arch.name
            say(f"{setting} is set; on {arch} {backend.name} runs its {kernels} kernels: unset it")
        variant = backend.variants.get(machine.arch.name)
        for name, value in variant.variables.items() if variant else ():
            if name not in environment:
                settings[name] = value
    return settings
