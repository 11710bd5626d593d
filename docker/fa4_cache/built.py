"""Say in short what was compiled, where and when, for docs/built: the manifest without its entries.

python built.py MANIFEST
"""

from __future__ import annotations

import datetime
import json
import os
import sys
from pathlib import Path
from typing import Any


def in_short(manifest: dict[str, Any]) -> dict[str, Any]:
    """Count calls, and leave the names of entries to their common hash."""
    targets = {
        device: {
            **{key: value for key, value in target.items() if key not in ("entries", "calls")},
            "calls": len(target["calls"]),
        }
        for device, target in manifest["targets"].items()
    }
    return {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "machine": f"{os.cpu_count()} cores of {cpu()}, without a GPU",
        **manifest,
        "targets": targets,
    }


def cpu() -> str:
    """Name the CPU."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "an unknown CPU"


if __name__ == "__main__":
    print(json.dumps(in_short(json.loads(Path(sys.argv[1]).read_text())), indent=1))
