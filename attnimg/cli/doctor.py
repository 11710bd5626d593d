"""Run `attnimg doctor`: check whether this machine and this image are ready for a run."""

from __future__ import annotations

import sys
from dataclasses import asdict

from attnimg.cli import JSON, as_json
from attnimg.machine import doctor as preflight
from attnimg.machine import probe
from attnimg.machine.doctor import Check
from attnimg.machine.host import this_host
from attnimg.selection.gpus_and_images import image_catalogue, this_image

_MARKS = {"ok": "[green]ok  [/]", "warn": "[yellow]warn[/]", "fail": "[red]FAIL[/]"}


ARGUMENTS = (JSON,)


def doctor(as_json_lines: bool) -> None:
    """Look at this machine and image: GPU, driver, kernels, user, folders, shared memory."""
    image = this_image()
    checks = preflight.examine(
        probe.this_machine(()), this_host(), image=image, images=image_catalogue()
    )
    ok = all(check.status != "fail" for check in checks)
    if as_json_lines:
        name = image.name if image else None
        shown = {"ok": ok, "image": name, "checks": [asdict(check) for check in checks]}
        print(as_json.line(shown))
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
