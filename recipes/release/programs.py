"""Run skopeo, cosign and docker, and word what a registry answers."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence

from attnimg.errors import AttnimgError

# What is in the program's output -> what happened, what to do.
_ANSWERS = (
    (
        r"no space left on device|quota exceeded|insufficient storage|status code 507",
        "the registry {host} is full",
        "free space there, then run the same command again: what is there is not sent again",
    ),
    (
        r"unauthorized|authentication required|denied|forbidden|status code 40[13]",
        "the registry {host} refuses the credentials",
        "docker login {host}, with an account that may push there",
    ),
    (
        r"toomanyrequests|too many requests|status code 429",
        "the registry {host} refuses more requests for now",
        "wait, then run the same command again",
    ),
    (
        r"x509:|certificate|server gave HTTP response to HTTPS client",
        "the registry {host} has no TLS certificate that this machine trusts",
        "add its CA to the machine's certificates; only 127.0.0.1 is used without TLS",
    ),
    (
        r"connection refused|no such host|no route to host|i/o timeout|connection reset"
        r"|Client\.Timeout|unexpected EOF|context deadline exceeded|network is unreachable",
        "the registry {host} can't be reached",
        "start it, or correct REGISTRY; then run the same command again: it continues",
    ),
    (
        r"manifest unknown|name unknown|MANIFEST_UNKNOWN|NAME_UNKNOWN|not found",
        "the registry {host} does not have the image",
        "push it first: make push/NAME, or correct REGISTRY",
    ),
)  # fmt: skip
_INSTALL = "sudo docker/release_tools.sh on Debian; elsewhere install {program}"


def run(
    command: Sequence[str], *, host: str, env: Mapping[str, str] | None = None, show: bool = False
) -> str:
    """Run a program; return its stdout.

    Args:
        command: the program and its arguments.
        host: the registry that it talks to, for the error.
        env: additional environment variables.
        show: whether its stdout, where it reports progress, goes to ours.

    Raises:
        AttnimgError: it is not installed (code "no-program"), or failed (code "registry").
    """
    program = command[0]
    try:
        done = subprocess.run(
            command,
            env={**os.environ, **(env or {})},
            stdout=None if show else subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    except FileNotFoundError as error:
        raise AttnimgError(
            f"{program} is not installed",
            why=f"found no program {program} on the PATH; a release needs it",
            do=_INSTALL.format(program=program),
            code="no-program",
        ) from error
    if done.returncode:
        raise answer_error(program, done.stderr or done.stdout or "", host=host)
    return done.stdout or ""


def answer_error(program: str, output: str, *, host: str) -> AttnimgError:
    """Return the error for the output of a program that failed."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    for pattern, what, do in _ANSWERS:
        matching = [line for line in lines if re.search(pattern, line, re.IGNORECASE)]
        if matching:
            return AttnimgError(
                what.format(host=host),
                why=f"{program}: {_message(matching[-1])}",
                do=do.format(host=host),
                code="registry",
                exit_code=1,
            )
    return AttnimgError(
        f"{program} failed",
        why=_message(lines[-1]) if lines else "it printed nothing",
        do="run the same command again: the release continues where it stopped",
        code="registry",
        exit_code=1,
    )


def _message(line: str) -> str:
    """Return the message of a line of skopeo's log, without its time and level."""
    found = re.search(r'msg="((?:[^"\\]|\\.)*)"', line)
    return found.group(1).replace('\\"', '"') if found else line.removeprefix("Error: ")


def report(text: str) -> None:
    """Print a line of progress to stderr."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
