"""Write an image's labels: what a machine can read of it without starting it."""

from __future__ import annotations

from recipes.facts import Plan, Unresolved


def labels(plan: Plan) -> dict[str, str]:
    """Give the labels of OCI and of attnimg; ${...} are variables of the bake file.

    Source of OCI's: https://github.com/opencontainers/image-spec, annotations.md (2026-11-21).
    """
    image = plan.image
    kernels = [f"{step.kernel.name}=={step.kernel.version}" for step in plan.steps]
    return {
        "org.opencontainers.image.title": f"attnimg:{image.name}",
        "org.opencontainers.image.description": f"Attention kernels for {image.summary}",
        "org.opencontainers.image.licenses": "Apache-2.0",
        "org.opencontainers.image.version": "${VERSION}",
        "org.opencontainers.image.revision": "${REVISION}",
        "org.opencontainers.image.created": "${CREATED}",
        "org.opencontainers.image.base.name": image.base,
        "attnimg.arch": " ".join(image.archs),
        "attnimg.kernels": " ".join(kernels),
        "attnimg.driver_min": _text(plan.driver_min),
        "attnimg.torch": _text(image.torch),
        "attnimg.abi": plan.abi,
    }


def _text(value: str | Unresolved | None) -> str:
    return "unresolved" if isinstance(value, Unresolved) else value or ""
