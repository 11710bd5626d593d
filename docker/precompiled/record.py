"""Print a summary of what was compiled, where and when: the record in docs/built.

    python record.py MANIFEST

MANIFEST is the manifest.json of build.py.
"""

from __future__ import annotations

import datetime
import json
import os
import sys
from pathlib import Path
from typing import Any


def in_short(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return the manifest without the names of entries, and with the number of calls."""
    targets = {
        device: {key: value for key, value in target.items() if key != "entries"}
        | {"calls": len(target["calls"])}
        for device, target in manifest["targets"].items()
    }
    return {**here(), **manifest, "targets": targets}


def here() -> dict[str, str]:
    """Return the day and the machine."""
    return {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "machine": f"{os.cpu_count()} cores of {cpu()}, without a GPU",
    }


def cpu() -> str:
    """Return the CPU's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "an unknown CPU"


if __name__ == "__main__":
    print(json.dumps(in_short(json.loads(Path(sys.argv[1]).read_text())), indent=1))
