"""Images of examples/child-images, built FROM the image that the variable IMAGE names.

make test/children        on attnimg:cpu and attnimg:cpu-devel; 10 minutes on two idle cores
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from child_images_record import EXAMPLES, RECORD, inputs

CA = Path("/etc/ssl/certs/ca-certificates.crt")
IMAGE = os.environ.get("IMAGE", "attnimg:cpu")

Child = Callable[..., str]


@pytest.fixture(scope="session")
def child(request: pytest.FixtureRequest) -> Iterator[Child]:
    """Return a function that builds an example and returns its tag; record time and size."""
    built: dict[str, dict[str, float]] = {}

    def build(name: str, *, context: Path) -> str:
        tag, began = f"attnimg-test-{name}", time.monotonic()
        secret = ["--secret", f"id=ca,src={CA}"] if CA.exists() else []
        done = subprocess.run(
            ["docker", "build", "--progress=plain", f"--file={EXAMPLES / name / 'Dockerfile'}",
             f"--build-arg=IMAGE={IMAGE}", f"--tag={tag}", *secret, str(context)],
            capture_output=True, text=True, check=False, timeout=3600,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        added = _bytes(tag) - _bytes(IMAGE)
        seconds = round(time.monotonic() - began)
        built[name] = {"build_seconds": seconds, "added_mb": round(added / 1e6)}
        return tag

    yield build
    for name in built:
        command = ["docker", "rmi", "--force", f"attnimg-test-{name}"]
        subprocess.run(command, capture_output=True, check=False)
    if os.environ.get("CHILDREN_RECORD") and not request.session.testsfailed:
        devel = round((_bytes(f"{IMAGE}-devel") - _bytes(IMAGE)) / 1e6)
        record = {
            "date": datetime.now(UTC).date().isoformat(),
            "image": IMAGE,
            "devel_added_mb": devel,
            "inputs": inputs(),
            "children": dict(sorted(built.items())),
        }
        RECORD.write_text(f"{json.dumps(record, indent=2)}\n", encoding="utf-8")


def _bytes(image: str) -> int:
    command = ["docker", "image", "inspect", "--format", "{{.Size}}", image]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
