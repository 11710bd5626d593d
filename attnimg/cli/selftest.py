"""Run `attnimg selftest`: run the tests that are in the image."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from attnimg.cli import argument
from attnimg.errors import AttnimgError
from attnimg.machine import probe
from attnimg.machine.kernel_cache import use_shipped_kernels

# docker/Dockerfile copies tests/image/inside there.
_TESTS = Path("/opt/attnimg/inside")


ARGUMENTS = (argument("--only", metavar="WORDS", help="Tests whose names match, as -k."),)


def selftest(only: str | None) -> None:
    """Run the image's own tests here: imports, a short training run, kernels on this GPU."""
    if not _TESTS.is_dir():
        raise AttnimgError(
            "there are no tests here",
            why=f"selftest runs those that travel in an image, in {_TESTS}; this is no image",
            do="docker run IMAGE selftest, or make test in a checkout",
            code="no-tests",
            exit_code=1,
        )
    use_shipped_kernels(probe.this_machine(()))
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", str(_TESTS)]
    done = subprocess.run([*command, *(["-k", only] if only else [])], check=False)
    raise SystemExit(0 if done.returncode == 0 else 1)
