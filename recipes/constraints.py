"""Write what pip may not replace in a child image: every version that the image installs."""

from __future__ import annotations

from recipes.facts import Plan, Unresolved
from recipes.files import NOTICE


def constraints(plan: Plan, *, lock: str) -> str:
    """Write one image's /etc/pip/constraint.txt.

    Args:
        plan: the image's.
        lock: the text of requirements/images/IMAGE.txt.
    """
    versions = pins(plan, lock=lock)
    lines = (f"{name}=={versions[name]}" for name in sorted(versions))
    return "\n".join([f"# {NOTICE}", *lines]) + "\n"


def pins(plan: Plan, *, lock: str) -> dict[str, str]:
    """Give every package of an image with its version: those of a lock file, torch, kernels."""
    found = {}
    for line in lock.splitlines():
        if "==" in line and not line.startswith(("#", " ")):
            name, _, version = line.removesuffix("\\").strip().partition("==")
            found[name] = version
    if not isinstance(plan.image.torch, Unresolved):
        found["torch"] = plan.image.torch
    return found | {step.kernel.name: step.kernel.version for step in plan.steps}
