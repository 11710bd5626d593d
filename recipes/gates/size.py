"""Refuse an image that is larger than its recipe allows, as a whole or in one layer.

Sizes are those of layers compressed with zstd -3, as a registry stores them, in 10**6 bytes:
`size_max_mb` for all of them, `layers_max_mb` for a stage of the Dockerfile.
"""

from __future__ import annotations

from recipes.artifact.facts import Artifact
from recipes.facts import Unresolved
from recipes.gates import Expected, Gate, GateFinding

_NAME = "size"


def skip_reason(artifact: Artifact, expected: Expected) -> str:
    """Return why the size is not known or has no limit; empty if it is and has one."""
    if isinstance(expected.plan.image.size_max_mb, Unresolved):
        return f"size_max_mb is unresolved: {expected.plan.image.size_max_mb.reason}"
    return "" if artifact.kind == "image" else "only an archive has layers: give one with ARCHIVE="


def check(artifact: Artifact, expected: Expected) -> tuple[GateFinding, ...]:
    """Add up the compressed sizes of the layers."""
    image = expected.plan.image
    stages: dict[str, float] = {}
    for layer in artifact.layers:
        stages[layer.name] = stages.get(layer.name, 0.0) + (layer.zstd_bytes or 0) / 1e6
    total = sum(stages.values())
    faults = []
    if isinstance(image.size_max_mb, int) and total > image.size_max_mb:
        largest = sorted(stages.items(), key=lambda item: -item[1])[:3]
        text = ", ".join(f"{name} {size:.0f}" for name, size in largest)
        faults.append(_finding("image", f"{total:.1f} MB ({text})", image.size_max_mb))
    for name, most in image.layers_max_mb.items():
        if name not in stages:
            need = f"one of {', '.join(stages)}, as layers_max_mb names them"
            do = "correct layers_max_mb, or the stages in recipes/artifact/archive.py"
            faults.append(
                GateFinding(gate=_NAME, file=name, found="no such layer", needed=need, do=do)
            )
        elif stages[name] > most:
            faults.append(_finding(f"layer {name}", f"{stages[name]:.1f} MB", most))
    return tuple(faults)


def _finding(what: str, found: str, most: int) -> GateFinding:
    return GateFinding(
        gate=_NAME,
        file=what,
        found=found,
        needed=f"at most {most} MB, compressed with zstd -3",
        do="prune what no run loads, or raise the budget in the recipe and say why in the commit",
    )


GATE = Gate(name=_NAME, check=check, skip_reason=skip_reason)
