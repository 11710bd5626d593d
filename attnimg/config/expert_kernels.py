"""Check axolotl's keys that choose a kernel for mixtures of experts: they must choose one.

attnimg uses none of them. A config that axolotl refuses is refused here too, since its author
can't have trained with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from attnimg.config.keys import allowed_values
from attnimg.config.schema import make_error
from attnimg.facts import Finding

# Flag -> the value of expert_backend that means the same.
_FLAGS = {"use_scattermoe": "scattermoe", "use_sonicmoe": "sonicmoe"}


def expert_kernel_errors(values: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield an error for each flag that contradicts expert_backend, or else the other flag.

    A flag that is false contradicts nothing: expert_backend turns it on.
    Source: axolotl 0.19.0, integrations/kernels/args.py, _canonicalize_expert_backend and
    check_mutually_exclusive (2026-11-27).

    Args:
        values: the keys of the config, as they are written.
    """
    on = [flag for flag in _FLAGS if values.get(flag) in (True, 1)]
    backend = values.get("expert_backend")
    if backend is None:
        if len(on) > 1:
            why = f"found {on[0]} and {on[1]}, two kernels for the same layers; needed one of them"
            yield make_error("bad-value", on[1], f"{on[1]} contradicts {on[0]}", why,
                             f"keep {on[0]} or {on[1]}")  # fmt: skip
        return
    name = str(backend).lower()
    for flag in on:
        if name in allowed_values("expert_backend") and name != _FLAGS[flag]:
            why = f"found expert_backend: {name} and {flag}: true, which means {_FLAGS[flag]}; "
            why += "axolotl refuses both together"
            yield make_error("bad-value", flag, f"{flag} contradicts expert_backend", why,
                             f"keep expert_backend or {flag}")  # fmt: skip
