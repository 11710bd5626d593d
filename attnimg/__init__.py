"""Select the attention kernels for a GPU, verify them, and use them in a training run.

The functions below are described in docs/use-your-own-trainer.md. They are imported at their first
use: importing attnimg imports neither torch nor anything else that is large. An image does so at
each start of Python (docker/image_files.py).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from attnimg.api import Choice, apply, check_packing, restore, select, use, verify
    from attnimg.errors import AttnimgError, KernelError, PackingLeak
    from attnimg.functional import attention
    from attnimg.integrations.transformers import AttnimgCallback

__version__ = "0.1.0"

__all__ = [
    "AttnimgCallback",
    "AttnimgError",
    "Choice",
    "KernelError",
    "PackingLeak",
    "apply",
    "attention",
    "check_packing",
    "restore",
    "select",
    "use",
    "verify",
]

# The modules of the names that are not in attnimg.api.
_MODULES = {
    "AttnimgCallback": "attnimg.integrations.transformers",
    "AttnimgError": "attnimg.errors",
    "KernelError": "attnimg.errors",
    "PackingLeak": "attnimg.errors",
    "attention": "attnimg.functional",
}


def __getattr__(name: str) -> object:
    """Import a name of the API at its first use (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module 'attnimg' has no attribute {name!r}")
    module = import_module(_MODULES.get(name, "attnimg.api"))
    globals()[name] = found = getattr(module, name)
    return found


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
