"""Say in short which Triton kernels were compiled, where and when: the record in docs/built.

    PYTHONPATH=docker/fa4_cache python built_in_short.py MANIFEST

MANIFEST is build.py's.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from built import here


def in_short(manifest: dict[str, Any]) -> dict[str, Any]:
    """Leave the names of entries to their common hash."""
    targets = {
        device: {name: value for name, value in target.items() if name != "entries"}
        for device, target in manifest["targets"].items()
    }
    return {**here(), **manifest, "targets": targets}


def main(manifest: Path) -> None:
    """Print it as JSON."""
    print(json.dumps(in_short(json.loads(manifest.read_text())), indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
