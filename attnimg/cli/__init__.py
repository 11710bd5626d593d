"""Parse the command line and run a command; each command has its own file.

It uses argparse, as importing typer takes 30 ms of CPU, a tenth of `check` (0.29 s, 2026-11-27).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from attnimg import __version__
from attnimg.errors import printable

# The positional and the keyword arguments of argparse's add_argument.
Argument = tuple[tuple[str, ...], dict[str, Any]]


def argument(*names: str, **options: Any) -> Argument:
    """Return one argument of a command, for argparse's add_argument."""
    return names, options


ON = argument("--on", metavar="GPU", help="Judge for this GPU: h100, t4, sm_90, gfx942, cpu.")
JSON = argument("--json", dest="as_json_lines", action="store_true",
                help="Print JSON, one object a line.")  # fmt: skip
COMMANDS = {
    "check": "Check configs on values alone: no model, no GPU, no network. Lists every error.",
    "explain": "Explain which backend would run, why, and the reasons against each other one.",
    "doctor": "Look at this machine and image: GPU, driver, kernels, user, folders, shared memory.",
    "verify": "Prove every backend that fits here: outputs, gradients, and no leak between "
    "documents.",
    "train": "Train: choose the attention backend, say why, prove that packing is safe, then run.",
    "selftest": "Run the image's own tests here: imports, a short training run, kernels on this "
    "GPU.",
}


def run_command(arguments: Sequence[str]) -> None:
    """Run one command; only its file is imported.

    Args:
        arguments: the command line after `attnimg`.

    Raises:
        SystemExit: at the end, with the exit code; 2 for a wrong argument.
        AttnimgError: the command failed.
    """
    name = arguments[0] if arguments else "--help"
    if name not in COMMANDS:
        _parser().parse_args([name])
    command = import_module(f"attnimg.cli.{name}")
    parser = _Parser(prog=f"attnimg {name}", description=COMMANDS[name], allow_abbrev=False)
    for names, options in command.ARGUMENTS:
        parser.add_argument(*names, **options)
    # Options may be between the files, too.
    getattr(command, name)(**vars(parser.parse_intermixed_args(arguments[1:])))


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are safe to print on a terminal."""

    def _print_message(self, message: str, file: object = None) -> None:
        super()._print_message(printable(message), file)  # type: ignore[arg-type]  # argparse's own


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS)) + 2
    parser = _Parser(
        prog="attnimg",
        description="The right attention kernels for your GPU: chosen, checked, applied to your "
        "run.\n\ncommands:\n"
        + "\n".join(f"  {name:{width}}{text}" for name, text in COMMANDS.items()),
        epilog="attnimg COMMAND --help lists its arguments. --debug, anywhere, shows the traceback "
        "of what went wrong.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"attnimg {__version__}")
    parser.add_argument("command", metavar="COMMAND", choices=tuple(COMMANDS))
    return parser
