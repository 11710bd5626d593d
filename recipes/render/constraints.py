"""Write what pip may not replace in a child image: every version that the image installs."""

from __future__ import annotations

from recipes.facts import Plan
from recipes.files import NOTICE
from recipes.solve.lock import pins


def constraints(plan: Plan, *, lock: str) -> str:
    """Write one image's /etc/pip/constraint.txt.

    Args:
        plan: the image's.
        lock: the text of requirements/images/IMAGE.txt.
    """
    versions = pins(plan, lock=lock)
    lines = (f"{name}=={versions[name]}" for name in sorted(versions))
    return "\n".join([f"# {NOTICE}", *lines]) + "\n"
