"""Choose which of a package's kernels run here, where an environment variable does that."""

from __future__ import annotations

from collections.abc import Mapping

from attnimg.backends import all_backends
from attnimg.facts import Machine
from attnimg.kernel_cache.notes import say


def variant_settings(machine: Machine, environment: Mapping[str, str]) -> dict[str, str]:
    """Choose the kernels that run here; a variable that is set otherwise holds, and is named."""
    settings: dict[str, str] = {}
    for backend in all_backends():
        variant = backend.variants.get(machine.arch.name)
        for name, value in variant.variables.items() if variant else ():
            if (found := environment.get(name)) is None:
                settings[name] = value
            elif found != value:
                say(
                    f"{name} is set to {found!r}; {backend.name} runs on {machine.arch.name} "
                    f"with {value}: unset it, unless it is meant"
                )
    return settings
