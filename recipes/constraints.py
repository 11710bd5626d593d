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
    pins = {}
    for line in lock.splitlines():
        if "==" in line and not line.startswith(("#", " ")):
            name, _, version = line.removesuffix("\\").strip().partition("==")
            pins[name] = version
    if not isinstance(plan.image.torch, Unresolved):
        pins["torch"] = plan.image.torch
    pins |= {step.kernel.name: step.kernel.version for step in plan.steps}
    return "\n".join([f"# {NOTICE}", *(f"{name}=={pins[name]}" for name in sorted(pins))]) + "\n"
