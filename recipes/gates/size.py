"""Refuse an image that is larger than its recipe allows, as a whole or in one layer.

Sizes are those of layers compressed with zstd -3, as a registry stores them, in 10**6 bytes:
`size_max_mb` for all of them, `layers_max_mb` for a stage of the Dockerfile.
"""

from __future__ import annotations

from recipes.artifact.facts import Artifact, stage_sizes
from recipes.facts import Unresolved
from recipes.gates import ExpectedContents, GateFinding


def skip_reason(artifact: Artifact, expected: ExpectedContents) -> str:
    """Return why the size is not known or has no limit; empty if it is and has one."""
    limit = expected.plan.image.size_max_mb
    if isinstance(limit, Unresolved):
        return f"size_max_mb is unresolved: {limit.reason}"
    return "" if artifact.kind == "image" else "only an archive has layers: add ARCHIVE=FILE"


def check(artifact: Artifact, expected: ExpectedContents) -> tuple[GateFinding, ...]:
    """Compare the compressed sizes of the layers with their limits."""
    image = expected.plan.image
    sizes = stage_sizes(artifact)
    total = sum(sizes.values())
    findings = []
    if isinstance(image.size_max_mb, int) and total > image.size_max_mb:
        largest = sorted(sizes.items(), key=lambda item: -item[1])[:3]
        text = ", ".join(f"{name} {size:.0f}" for name, size in largest)
        findings.append(_finding("image", f"{total:.1f} MB ({text})", image.size_max_mb))
    for name, limit in image.layers_max_mb.items():
        if name not in sizes:
            findings.append(
                GateFinding(
                    file=name,
                    found="no such layer",
                    needed=f"one of {', '.join(sizes)}, as layers_max_mb names them",
                    do="correct layers_max_mb, or the stages in recipes/artifact/archive.py",
                )
            )
        elif sizes[name] > limit:
            findings.append(_finding(f"layer {name}", f"{sizes[name]:.1f} MB", limit))
    return tuple(findings)


def _finding(file: str, found: str, limit: int) -> GateFinding:
    return GateFinding(
        file=file,
        found=found,
        needed=f"at most {limit} MB, compressed with zstd -3",
        do="prune files that no run loads, or raise the limit in the recipe and give the reason in "
        "the commit",
    )
