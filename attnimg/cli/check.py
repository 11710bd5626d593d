"""Run `attnimg check`: check the values of configs."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING

from attnimg.cli import JSON, ON, argument
from attnimg.errors import printable, shortened

if TYPE_CHECKING:
    from attnimg.config.schema import Checked
    from attnimg.facts import Finding

ARGUMENTS = (
    argument("files", metavar="CONFIG", nargs="+", help="YAML files."),
    ON,
    argument("--torch", metavar="VERSION", help="Judge for this torch, such as 2.13."),
    JSON,
)
# Pieces of text, each with its style in rich.
Styled = list[tuple[str, str]]


def check(files: list[str], on: str | None, torch: str | None, as_json_lines: bool) -> None:
    """Check configs on values alone: no model, no GPU, no network. Lists every error."""
    with _without_collection():
        failed = [file for file in files if not _check(file, on, torch, as_json_lines)]
    raise SystemExit(2 if failed else 0)


def _check(file: str, on: str | None, torch: str | None, as_json_lines: bool) -> bool:
    """Check one file and print the findings; return whether it has no error."""
    from attnimg import config  # imports pydantic, half the time of a fast command

    arch = None
    if on is not None:
        from attnimg.selection.gpus_and_images import parse_gpu

        arch = parse_gpu(on).arch
    if torch is not None:
        config.parse_torch(torch)
    checked = config.check_file(file, on=arch, torch=torch)
    if as_json_lines:
        from attnimg.cli import as_json

        print(as_json.line(as_json.checked_json(checked)))
        return checked.ok
    _print(_summary(checked), sys.stdout)
    for found in findings_text(checked.errors, "error"):
        _print(found, sys.stderr)
    for found in findings_text(checked.warnings, "warning"):
        _print(found, sys.stderr)
    return checked.ok


@contextmanager
def _without_collection() -> Iterator[None]:
    """Turn garbage collection off in the block: it takes 7 % of the CPU time and frees nothing."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _summary(checked: Checked) -> Styled:
    """Return the summary line of a file."""
    said = ", ".join(
        f"{len(found)} {word}{'s' if len(found) > 1 else ''}"
        for found, word in ((checked.errors, "error"), (checked.warnings, "warning"))
        if found
    )
    name = checked.config.attn_implementation if checked.config else None
    shown = name or ("-" if checked.errors else "auto")
    mark = ("ok", "green") if checked.ok else ("no", "red")
    return [mark, (f"  {checked.file}  ", ""), (shown, "cyan"), (f"  {said}", "")]


def findings_text(findings: Iterable[Finding], kind: str) -> Iterator[Styled]:
    """Yield the lines of each error or warning: what happened, why, what to do."""
    for found in findings:
        text = [
            (f"  {kind}", "red" if kind == "error" else "yellow"),
            (f" {found.code}:", "dim"),
            (f" {shortened(found.what)}", ""),
        ]
        for label, part in (("why:", found.why), ("do:", found.do)):
            if part:
                text.append((f"\n    {label:<4} ", "dim"))
                text.append((shortened(part).replace("\n", "\n" + " " * 9), ""))
        yield text


def _print(text: Styled, file: IO[str]) -> None:
    """Print text; rich, which prints styles, is imported only for a terminal."""
    if not file.isatty():
        print(printable("".join(piece for piece, _ in text)), file=file)
        return
    from attnimg.cli import as_text

    as_text.console(file).print(as_text.styled(text), soft_wrap=True)
