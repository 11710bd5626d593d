"""`attnimg check`: validate configs on values alone."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from attnimg.cli import JsonOption, OnOption, as_json
from attnimg.select.gpus import parse_gpu


def check(
    files: Annotated[list[str], typer.Argument(metavar="CONFIG...", help="YAML files.")],
    on: OnOption = None,
    torch: Annotated[
        str | None, typer.Option(metavar="VERSION", help="Judge for this torch, such as 2.13.")
    ] = None,
    as_json_lines: JsonOption = False,
) -> None:
    """Check configs on values alone: no model, no GPU, no network. Lists every error."""
    from attnimg import config  # pydantic: half of what a quick command costs

    arch = parse_gpu(on)[0] if on is not None else None
    if torch is not None:
        config.parse_torch(torch)
    failed = False
    for file in files:
        checked = config.check_file(file, on=arch, torch=torch)
        failed |= not checked.ok
        if as_json_lines:
            typer.echo(as_json.line(as_json.checked_json(checked)))
        else:
            from attnimg.cli import as_text

            as_text.print_checked(
                checked, out=as_text.console(sys.stdout), err=as_text.console(sys.stderr)
            )
    raise typer.Exit(2 if failed else 0)
