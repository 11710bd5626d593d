"""Run `attnimg check`: check the values of configs."""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any

from attnimg.cli import Styled, finding_json, findings_text, json_line
from attnimg.errors import counted, printable
from attnimg.facts import Finding
from attnimg.redact import redact

if TYPE_CHECKING:
    from attnimg.config.schema import CheckResult

_FLAGS = (
    "attn_implementation",
    "attn_supports_packing",
    "attn_uses_flash_lib",
    "attn_needs_dtype_cast",
)


def check(arguments: list[str], on: str | None, torch: str | None, as_json_lines: bool) -> None:
    """Check the values of configs: no model, no GPU, no network. Lists every error."""
    with _without_garbage_collection():
        from attnimg import config  # imports pydantic, half the time of a fast command

        files, settings = config.split_settings(arguments)
        if not files:  # what is a setting can't be read, which says what to do
            files, settings = arguments[:1], ()
        failed = [file for file in files if not _check(file, settings, on, torch, as_json_lines)]
    raise SystemExit(2 if failed else 0)


def _check(
    file: str, settings: tuple[str, ...], on: str | None, torch: str | None, as_json_lines: bool
) -> bool:
    """Check one file and print the findings; return whether it has no error."""
    from attnimg import config

    arch = None
    if on is not None:
        from attnimg.selection.gpus_and_images import parse_gpu

        arch = parse_gpu(on).arch
    if torch is not None:
        config.parse_torch(torch)
    checked = config.check_file(
        file,
        on=arch,
        torch=torch,
        overrides=settings,
        variable=os.environ.get("ATTNIMG_BACKEND", "").strip(),
    )
    if as_json_lines:
        print(json_line(checked_json(checked)))
        return checked.ok
    print_styled(_summary(checked), sys.stdout)
    for findings, kind in ((checked.errors, "error"), (checked.warnings, "warning")):
        for text in findings_text(findings, kind):
            print_styled(text, sys.stderr)
    return checked.ok


def checked_json(checked: CheckResult) -> dict[str, Any]:
    """Return the object that `check --json` prints for one file."""
    attn = config = None
    if checked.config is not None:
        # pydantic's JSON has null for NaN and infinity, which JSON does not have.
        config = json.loads(checked.config.model_dump_json(exclude_none=True))
        flags = {key: getattr(checked.config, key) for key in _FLAGS}
        config |= flags
        attn = {"requested": checked.requested} | flags
    return {
        "file": redact(checked.file),
        "ok": checked.ok,
        "on": checked.on,
        "attn": attn,
        "config": config,
        "errors": [finding_json(finding) for finding in checked.errors],
        "warnings": [_warning(finding) for finding in checked.warnings],
    }


def _warning(finding: Finding) -> dict[str, Any]:
    values = finding_json(finding)
    del values["why"]
    return values


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Turn garbage collection off in the block: it takes 7 % of the CPU time and frees nothing."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _summary(checked: CheckResult) -> Styled:
    """Return the summary line of a file."""
    counts = ", ".join(
        f"{counted(len(findings), word)}"
        for findings, word in ((checked.errors, "error"), (checked.warnings, "warning"))
        if findings
    )
    name = checked.config.attn_implementation if checked.config else None
    backend = name or ("-" if checked.errors else "auto")
    mark = ("ok", "green") if checked.ok else ("no", "red")
    return [mark, (f"  {redact(checked.file)}  ", ""), (backend, "cyan"), (f"  {counts}", "")]


def print_styled(text: Styled, file: IO[str]) -> None:
    """Print text; rich, which prints styles, is imported only for a terminal."""
    if not file.isatty():
        print(printable("".join(piece for piece, _ in text)), file=file)
        return
    from attnimg.cli import as_text

    as_text.console(file).print(as_text.styled(text), soft_wrap=True)
