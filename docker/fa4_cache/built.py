"""Say in short what was compiled, where and when: the record that docs/built keeps.

    python built.py MANIFEST SET.json

MANIFEST is build.py's; SET.json the image's whole set, of which it may be a part.
"""

from __future__ import annotations

import datetime
import json
import os
import sys
from pathlib import Path
from typing import Any

from kernel_set import Target, read_set


def in_short(manifest: dict[str, Any], asked: tuple[Target, ...]) -> dict[str, Any]:
    """Count calls, and leave the names of entries to their common hash."""
    wanted = {target.device: len(target.calls) for target in asked}
    targets = {
        device: {
            **{key: value for key, value in target.items() if key not in ("entries", "calls")},
            "calls": len(target["calls"]),
            "calls_in_set": wanted[device],
        }
        for device, target in manifest["targets"].items()
    }
    return {**here(), **manifest, "targets": targets}


def here() -> dict[str, str]:
    """Tell the day and the machine."""
    return {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "machine": f"{os.cpu_count()} cores of {cpu()}, without a GPU",
    }


def cpu() -> str:
    """Name the CPU."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "an unknown CPU"


def main(manifest: Path, set_file: Path) -> None:
    """Print it as JSON."""
    print(json.dumps(in_short(json.loads(manifest.read_text()), read_set(set_file)), indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
