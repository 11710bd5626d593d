"""`attnimg` and `python -m attnimg`: run a command, and turn what went wrong into an exit code."""

from __future__ import annotations

import os
import sys

from attnimg.cli import run_command
from attnimg.errors import AttnimgError, memory_errors


def main() -> None:
    """Run the command line; never show a traceback without --debug."""
    debug = "--debug" in sys.argv
    if not debug:
        # Hide errors that libraries raise at the end of the process, after the reported one.
        sys.unraisablehook = lambda _: None
    code = run([argument for argument in sys.argv[1:] if argument != "--debug"], debug=debug)
    if "WORLD_SIZE" in os.environ:
        from attnimg.train.distributed import end_process

        end_process(code)
    sys.exit(code)


def run(arguments: list[str], *, debug: bool = False) -> int:
    """Run one command.

    Args:
        arguments: what stands after `attnimg`.
        debug: show the traceback of what went wrong.

    Returns:
        The exit code.
    """
    try:
        with memory_errors():
            run_command(arguments)
    except SystemExit as done:  # every command ends so, after a wrong argument too
        return done.code if isinstance(done.code, int) else 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # what reads the output has ended, such as head
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115  for Python's last flush
        return 1
    except AttnimgError as error:
        _say(str(error), debug=debug)
        return error.exit_code
    except Warning as error:
        _say(str(_raised_warning(error)), debug=debug)
        return 2
    except Exception as error:  # the edge: whatever escaped is a fault of attnimg's own
        from attnimg.train.environment import as_bad_environment  # not for check, which is quick

        if (refusal := as_bad_environment(error, os.environ)) is not None:
            _say(str(refusal), debug=debug)
            return refusal.exit_code
        fault = AttnimgError(
            f"it failed with {type(error).__name__}, which it should have foreseen",
            why=" ".join(str(error).split())[:300] or "it said nothing more",
            do="run it again with --debug and report what it prints",
        )
        _say(str(fault), debug=debug)
        return 1
    return 0


def _raised_warning(error: Warning) -> AttnimgError:
    """Build the error for a warning that Python raised, as PYTHONWARNINGS=error asks."""
    return AttnimgError(
        f"Python raised a {type(error).__name__} as an error",
        why=" ".join(str(error).split()),
        do="follow the warning, or run without PYTHONWARNINGS=error and python -W error",
        code="bad-environment",
    )


def _say(text: str, *, debug: bool) -> None:
    if debug and sys.exc_info()[0] is not None:
        sys.excepthook(*sys.exc_info())
    sys.stderr.write(text + "\n")


if __name__ == "__main__":
    main()
