"""Run skopeo, cosign and docker, and translate the errors of a registry into plain messages."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence

from attnimg.errors import AttnimgError


def _file_fault(faults: str) -> str:
    """Return the pattern of a fault with a file here, not on the disk of a registry."""
    call = r"\b(open|openat|create|mkdir|read|write|copy_file_range|rename|link|l?stat|unlink\w*)"
    return rf"^(?!.*(HTTP status|status code)).*{call} (?!tcp|udp|unix)[^\s:]+: ({faults})"


_AGAIN = "then run the same command again"
# What is in the program's output -> code, what happened, what to do. What cosign found wrong with a
# signature and faults of this machine come first: their text may have words of a registry's answer.
_LOCAL = (
    (
        # Without an answer of the log of signatures there is no verdict.
        r"^(?!.*dial tcp).*(no matching (signatures|attestations)|no signatures found"
        r"|cert verification failed|none of the expected identities matched)",
        "not-verified",
        "{program} found no valid signature",
        "do not use the image; if you made it, sign it with the key that verifies it",
    ),
    (
        r"permission denied while trying to connect to the docker",
        "no-engine",
        "this user may not use the Docker engine",
        'sudo usermod -aG docker "$USER", log in again, {again}',
    ),
    (
        r"(reading|loading) (public |private )?key\b|loading verifier|decryption failed"
        r"|(invalid|unsupported) pem",
        "bad-key",
        "{program} can't use the key",
        "correct COSIGN_KEY, COSIGN_PUBLIC_KEY and COSIGN_PASSWORD, {again}",
    ),
    (
        r"invalid reference|could not parse reference",
        "bad-reference",
        "{program} can't read the name of the image",
        "correct REGISTRY, TAG or DIGEST",
    ),
    (
        _file_fault("no space left on device|disk quota exceeded"),
        "local",
        "this machine can't store the image: its disk is full",
        "free space there, {again}",
    ),
    (
        _file_fault("permission denied|read-only file system|no such file or directory"),
        "local",
        "{program} can't use a file of this machine",
        "correct the file or its owner and permissions, {again}",
    ),
    (
        r"Cannot connect to the Docker daemon|failed to connect to the docker API",
        "no-engine",
        "no Docker engine is running",
        "make engine",
    ),
)
_REGISTRY = (
    (
        r"unauthorized|authentication required|denied|forbidden|status code 40[13]",
        "registry",
        "the registry {host} refuses the credentials",
        "docker login {host}, with an account that may {act}, {again}",
    ),
    (
        r"toomanyrequests|too many requests|status code 429",
        "registry",
        "the registry {host} takes no more requests for now",
        "wait, {again}",
    ),
    (
        r"x509:|tls: |server gave HTTP response to HTTPS client",
        "registry",
        "{asked} has no TLS certificate that this machine trusts",
        "add its CA to this machine's certificates; a registry on 127.0.0.1 needs none",
    ),
    (
        r"connection refused|no such host|no route to host|i/o timeout|connection reset"
        r"|name resolution|server misbehaving|TLS handshake timeout"
        r"|Client\.Timeout|unexpected EOF|: EOF$|deadline exceeded|network is unreachable"
        r"|status code 50[234]",
        "registry",
        "{asked} can't be reached",
        "{reach}, {again}",
    ),
    (
        r"manifest unknown|name unknown|MANIFEST_UNKNOWN|NAME_UNKNOWN|status code 404",
        "no-image",
        "the registry {host} does not have the image",
        "{push}correct REGISTRY, TAG or DIGEST",
    ),
)
# docker-registry 2.8 answers this when its disk is full; its log has the reason.
_FULL = (
    r"no space left on device|quota exceeded|insufficient storage|status code 507"
    r"|blob upload invalid|blob upload unknown|500 Internal Server Error|unknown: unknown"
)
# What a full disk and other faults of a registry mean, to who writes there and to who reads.
_WHILE_WRITING = (
    (
        _FULL,
        "registry",
        "the registry {host} can't store what it gets: its disk may be full",
        "free space there (its log has the reason), {again}; what arrived is not sent twice",
    ),
)
_WHILE_READING = (
    (
        r"no space left on device|quota exceeded",
        "local",
        "this machine can't store the image: its disk is full",
        "free space there, {again}",
    ),
    (
        r"500 Internal Server Error|unknown: unknown|status code 500",
        "registry",
        "the registry {host} has a fault",
        "report it to the operator of the registry, whose log has the reason; later {again}",
    ),
)


def run(
    command: Sequence[str],
    *,
    host: str,
    env: Mapping[str, str] | None = None,
    show: bool = False,
    writes: bool = False,
) -> str:
    """Run a program; return its stdout.

    Args:
        command: the program and its arguments.
        host: the registry that it talks to, for the error.
        env: additional environment variables.
        show: whether its stdout, where it reports progress, goes to ours.
        writes: whether it writes to the registry, as a release does, for the error.

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
            check=False,
        )
    except FileNotFoundError as error:
        raise AttnimgError(
            f"{program} is not installed",
            why=f"found no program {program} on the PATH, needed it to move or verify images",
            do="make engine"
            if program == "docker"
            else f"sudo docker/release_tools.sh {program} on Debian; elsewhere install it by hand",
            code="no-program",
        ) from error
    # Every byte is kept, also the ends of lines: what is read has a digest.
    text = (done.stdout or b"").decode(errors="surrogateescape")
    if done.returncode:
        output = done.stderr.decode(errors="replace") or text
        raise answer_error(program, output, host=host, writes=writes)
    return text


def answer_error(program: str, output: str, *, host: str, writes: bool = False) -> AttnimgError:
    """Return the error for the output of a program that failed.

    Args:
        program: its name.
        output: what it printed.
        host: the registry that it talked to.
        writes: whether it writes there, as a release does, which continues where it stopped.
    """
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    asked = _asked(lines, host=host)
    if asked in (None, host):
        where = f"the registry {host}"
        reach = f"start it, or correct REGISTRY or this machine's network to {host}"
    else:
        where, reach = str(asked), f"correct this machine's network, DNS or proxy for {asked}"
    names = {
        "program": program,
        "host": host,
        "asked": where,
        "reach": reach,
        "again": f"{_AGAIN}: it continues" if writes else _AGAIN,
        "act": "push there" if writes else "pull from there, or correct REGISTRY",
        "push": "push the image first, or " if writes else "",
    }
    # The name of the image is no answer: it may be registry.example.com/forbidden.
    name = re.compile(rf"{re.escape(host)}/[^\s:@\"\\]*") if host else None
    for pattern, code, what, do in (
        *_LOCAL, *(_WHILE_WRITING if writes else _WHILE_READING), *_REGISTRY,
    ):  # fmt: skip
        matching = [
            line
            for line in lines
            if re.search(pattern, name.sub(host, line) if name else line, re.IGNORECASE)
        ]
        if matching:
            return AttnimgError(
                what.format(**names),
                why=f"{program}: {_message(matching[-1])}",
                do=do.format(**names),
                code=code,
                exit_code=1,
            )
    return AttnimgError(
        f"{program} failed",
        why=_message(lines[-1]) if lines else "it printed nothing",
        do=f"correct that, {names['again']}",
        code="program",
        exit_code=1,
    )


def _asked(lines: Sequence[str], *, host: str) -> str | None:
    """Return the host that a failed request went to, which may be one of sigstore; else None."""
    for line in reversed(lines):
        request = re.search(r'\b(?:Get|Head|Post|Put|Patch|Delete) \\?"https?://([^/"\\]+)', line)
        lookup = re.search(r"\blookup ([^\s:]+)", line)
        if request or lookup:
            found = (request or lookup).group(1)  # type: ignore[union-attr]  # one matched
            # A lookup is of a name without its port.
            return host if found == host.partition(":")[0] else found
    return None


def _message(line: str) -> str:
    """Return the message of a line of skopeo's log, without its time and level."""
    found = re.search(r'msg="((?:[^"\\]|\\.)*)"', line)
    return (
        found.group(1).replace('\\"', '"')
        if found
        else re.sub(r"^error( during command execution)?: ", "", line, flags=re.IGNORECASE)
    )


def report(text: str) -> None:
    """Print a line of progress to stderr."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
