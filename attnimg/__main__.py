"""`attnimg` and `python -m attnimg`: run a command; turn exceptions into exit codes."""

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
        arguments: the command line after `attnimg`.
        debug: show the traceback of an exception.

    Returns:
        The exit code.
    """
    try:
        with memory_errors():
            run_command(arguments)
    except SystemExit as done:  # raised at the end of every command, and for a wrong argument
        code = done.code if isinstance(done.code, int) else 1
        if code in (1, 2):
            _tell_ranks(arguments, f"exit code {code}, see its output")
        return code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the program that reads the output has ended, such as head
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115  for Python's last flush
        return 1
    except Exception as error:
        failure = _as_failure(error)
        _say(str(failure), debug=debug)
        if failure.code != "rank-lost":
            _tell_ranks(arguments, failure.what)
        return failure.exit_code
    return 0


def _as_failure(error: Exception) -> AttnimgError:
    """Return the error to print for an exception; an unexpected one is a bug in attnimg."""
    if isinstance(error, AttnimgError):
        return error
    if isinstance(error, Warning):
        return _raised_warning(error)
    from attnimg.train.environment import environment_error  # imported here to keep `check` fast

    return environment_error(error, os.environ) or AttnimgError(
        f"it failed with {type(error).__name__}, which it should have foreseen",
        why=" ".join(str(error).split())[:300] or "it said nothing more",
        do="run it again with --debug and report what it prints",
        exit_code=1,
    )


def _tell_ranks(arguments: list[str], text: str) -> None:
    """Stop the other processes of a training run, which wait for this one."""
    if arguments[:1] == ["train"]:
        from attnimg.train.distributed import report_failure

        report_failure(text)


def _raised_warning(error: Warning) -> AttnimgError:
    """Return the error for a warning that Python raised because of PYTHONWARNINGS=error."""
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
