"""Which of a package's kernels will run on this AMD GPU?"""

from __future__ import annotations

from collections.abc import Iterator

from attnimg.backends import all_backends
from attnimg.facts import Machine
from attnimg.host_facts import Check, Host


def check_variants(machine: Machine, host: Host) -> Iterator[Check]:
    """Name the kernels of each installed package that has several, or what is set against them."""
    for backend in all_backends():
        variant = backend.variants.get(machine.arch.name)
        package = backend.needs.packages[0][0] if backend.needs.packages else ""
        if variant is None or package not in host.installed:
            continue
        against = [
            f"{name}={host.variables[name]}"
            for name, value in variant.variables.items()
            if host.variables.get(name, value) != value
        ]
        on = f"{backend.name} on {machine.arch.name}"
        if against:
            yield Check(
                code="variant",
                status="warn",
                what=f"{on} should run {package}'s {variant.name} kernels; found {against[0]}",
                do=f"unset {against[0].partition('=')[0]}, unless it is meant",
            )
        else:
            what = f"{on} runs {package}'s {variant.name} kernels"
            yield Check(code="variant", status="ok", what=what)
