"""The command line: one file a command; each strings the steps and prints what they found."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Annotated

import typer

from attnimg import __version__

OnOption = Annotated[
    str | None,
    typer.Option("--on", metavar="GPU", help="Judge for this GPU: h100, t4, sm_90, gfx942, cpu."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, one object a line.")]
COMMANDS = ("check", "explain", "doctor", "verify", "train", "selftest")


def app_for(arguments: Sequence[str]) -> typer.Typer:
    """Build the command line.

    Where the arguments begin with a command, it alone is imported: `check` starts in half the time
    that all of them take.

    Args:
        arguments: what stands after `attnimg`.
    """
    named = [name for name in arguments[:1] if name in COMMANDS]
    app = typer.Typer(
        help="The right attention kernels for your GPU: chosen, checked, applied to your run.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        epilog="--debug, anywhere, shows the traceback of what went wrong.",
    )
    app.callback()(_top)
    for name in named or COMMANDS:
        app.command()(getattr(import_module(f"attnimg.cli.{name}"), name))
    return app


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"attnimg {__version__}")
        raise typer.Exit


def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """The right attention kernels for your GPU: chosen, checked, applied to your run."""
