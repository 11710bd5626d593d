"""Run skopeo, cosign and docker, and translate the errors of a registry into plain messages."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence

from attnimg.errors import AttnimgError

_AGAIN = "then run the same command again: it continues"
# What is in the program's output -> code, what happened, what to do.
_ANSWERS = (
    (
        r"Cannot connect to the Docker daemon",
        "no-engine",
        "no Docker engine is running",
        "make engine",
    ),
    (
        r"no space left on device|quota exceeded|insufficient storage|status code 507"
        # docker-registry 2.8 answers this when its disk is full; its log has the reason.
        r"|blob upload invalid|blob upload unknown|500 Internal Server Error|unknown: unknown",
        "registry",
        "the registry {host} can't store what it gets: its disk may be full",
        f"free space there (its log has the reason), {_AGAIN}; what arrived is not sent twice",
    ),
    (
        r"unauthorized|authentication required|denied|forbidden|status code 40[13]",
        "registry",
        "the registry {host} refuses the credentials",
        f"docker login {{host}}, with an account that may push there, {_AGAIN}",
    ),
    (
        r"toomanyrequests|too many requests|status code 429",
        "registry",
        "the registry {host} takes no more requests for now",
        f"wait, {_AGAIN}",
    ),
    (
        r"x509:|tls: |server gave HTTP response to HTTPS client",
        "registry",
        "the registry {host} has no TLS certificate that this machine trusts",
        "add its CA to this machine's certificates; only one on 127.0.0.1 may be without TLS",
    ),
    (
        r"connection refused|no such host|no route to host|i/o timeout|connection reset"
        r"|Client\.Timeout|unexpected EOF|: EOF$|deadline exceeded|network is unreachable"
        r"|status code 50[234]",
        "registry",
        "the registry {host} can't be reached",
        f"start it, or correct REGISTRY, {_AGAIN}",
    ),
    (
        r"manifest unknown|name unknown|MANIFEST_UNKNOWN|NAME_UNKNOWN|status code 404",
        "no-image",
        "the registry {host} does not have the image",
        "push it first (make push/NAME), or correct REGISTRY, the tag or the digest",
    ),
)
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
        AttnimgError: it is not installed (code "no-program"), or failed: the registry refused
            (code "registry"), it has no such image (code "no-image"), or else (code "program").
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
    for pattern, code, what, do in _ANSWERS:
        matching = [line for line in lines if re.search(pattern, line, re.IGNORECASE)]
        if matching:
            return AttnimgError(
                what.format(host=host),
                why=f"{program}: {_message(matching[-1])}",
                do=do.format(host=host),
                code=code,
                exit_code=1,
            )
    return AttnimgError(
        f"{program} failed",
        why=_message(lines[-1]) if lines else "it printed nothing",
        do=f"correct that, {_AGAIN}",
        code="program",
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
