"""Run `attnimg doctor` and `attnimg selftest`: check this machine and this image."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from attnimg.cli import json_line
from attnimg.errors import AttnimgError, shortened
from attnimg.machine import doctor as preflight
from attnimg.machine import probe
from attnimg.machine.doctor import Check
from attnimg.machine.host import this_host
from attnimg.machine.kernel_cache import use_shipped_kernels
from attnimg.selection.gpus_and_images import image_catalogue, image_record, this_image

_MARKS = {"ok": "[green]ok  [/]", "warn": "[yellow]warn[/]", "fail": "[red]FAIL[/]"}
# docker/Dockerfile copies tests/image/inside to this folder.
_TESTS = Path("/opt/attnimg/inside")


def doctor(as_json_lines: bool) -> None:
    """Check this machine and image: GPU, driver, kernels, network, CPUs, user, folders, memory."""
    image = this_image()
    checks = preflight.check_machine(
        probe.this_machine(()), this_host(), image=image, images=image_catalogue()
    )
    ok = all(check.status != "fail" for check in checks)
    if as_json_lines:
        found = [asdict(check) for check in checks]
        record = image_record(os.environ) or {}
        identity = {name: record.get(name) for name in ("version", "revision", "digest")}
        print(json_line({"ok": ok, "image": record.get("name"), **identity, "checks": found}))
    else:
        _print(checks)
    raise SystemExit(0 if ok else 1)


def _print(checks: tuple[Check, ...]) -> None:
    from rich.markup import escape

    from attnimg.cli import as_text

    out = as_text.console(sys.stdout)
    for check in checks:
        out.print(f"{_MARKS[check.status]}  {escape(check.what)}", soft_wrap=True)
        if check.do:
            out.print(f"      [dim]do:[/] {escape(check.do)}", soft_wrap=True)


def selftest(only: str | None) -> None:
    """Run the image's own tests: imports, a short training run, kernels on this GPU."""
    if not _TESTS.is_dir():
        raise AttnimgError(
            "there are no tests to run",
            why=f"selftest runs the tests of an image, in {_TESTS}; this is not an image",
            do="docker run IMAGE selftest, or make test in a checkout",
            code="no-tests",
            exit_code=1,
        )
    use_shipped_kernels(probe.this_machine(()))
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", str(_TESTS)]
    selected = [] if only is None else ["-k", only]
    code = subprocess.run([*command, *selected], check=False).returncode
    # pytest's exit codes for a wrong argument, and for no test.
    if only is not None and code in (4, 5):
        raise _nothing_selected(only)
    raise SystemExit(0 if code == 0 else 1)


def _nothing_selected(only: str) -> AttnimgError:
    names = sorted(path.stem.removeprefix("test_") for path in _TESTS.glob("test_*.py"))
    return AttnimgError(
        "no test was run",
        why=f"found --only {shortened(repr(only))}, which is in the name of no test; needed words "
        f"of one, joined by and, or, not; the files of tests are {', '.join(names)}",
        do=f"attnimg selftest --only {names[0]}, or omit --only to run all tests"
        if names
        else "docker run IMAGE selftest",
        code="no-tests",
    )
