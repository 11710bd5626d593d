"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

OnOption = Annotated[
    str | None,
    typer.Option("--on", metavar="GPU", help="Judge for this GPU: h100, t4, sm_90, gfx942, cpu."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, one object a line.")]
