"""Which of a package's kernels will run on this AMD GPU?"""

from __future__ import annotations

from collections.abc import Iterator

from attnimg.backends import all_backends, contrary_settings
from attnimg.facts import Machine
from attnimg.machine.host_facts import Check, Host


def check_variants(machine: Machine, host: Host) -> Iterator[Check]:
    """Name the kernels of each installed package that has several, or what is set against them."""
    for backend in all_backends():
        variant = backend.variants.get(machine.arch.name)
        package = backend.needs.packages[0][0] if backend.needs.packages else ""
        if variant is None or package not in host.installed:
            continue
        kernels = f"{package}'s {variant.name} kernels"
        if against := contrary_settings(backend, machine.arch, machine.variables):
            yield Check(
                code="variant",
                status="warn",
                what=f"{backend.name} is refused on {machine.arch.name}, where it runs {kernels}: "
                f"found {against[0]}",
                do=f"unset {against[0].partition('=')[0]}",
            )
        else:
            what = f"{backend.name} on {machine.arch.name} runs {kernels}"
            yield Check(code="variant", status="ok", what=what)
