"""Print as JSON what `attnimg doctor` sees of flash-attn's packages in the venv that runs this."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from importlib.machinery import PathFinder

from attnimg.machine.host import this_host

MODULES = ("flash_attn.flash_attn_interface", "flash_attn.cute.interface")


def is_found(name: str) -> bool:
    """Find a module as an import would, without importing what needs torch and cutlass."""
    path: Sequence[str] | None = None
    done: list[str] = []
    for part in name.split("."):
        done.append(part)
        spec = PathFinder.find_spec(".".join(done), path)
        if spec is None:
            return False
        path = spec.submodule_search_locations
    return True


host = this_host()
json.dump(
    {
        "owners": host.cute_owners,
        "damaged": host.damaged,
        "shadows": dict(host.shadows),
        "found": {name: is_found(name) for name in MODULES},
    },
    sys.stdout,
)
