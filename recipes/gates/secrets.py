"""Refuse credentials, in any layer and in the image's history.

It finds private keys and tokens by their format, files of credentials by their name, and build
arguments and environment variables by a name that is usual for a secret value.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from recipes.artifact.facts import Artifact
from recipes.artifact.secret_patterns import secrets_in
from recipes.gates import Expected, Gate, GateFinding

_NAME = "secrets"
_FILES = re.compile(
    r"(.*/)?(\.netrc|_netrc|\.pypirc|\.git-credentials|\.aws/credentials|\.docker/config\.json"
    r"|\.huggingface/token|huggingface/(stored_tokens|token)|\.npmrc|\.ssh/id_\w+|id_(rsa|dsa|ecdsa|ed25519)"
    r"|\.config/gcloud/.*|\.kube/config|run/secrets/.+)"
)
# NAME=value, where the value is no reference to another variable and no path.
_ASSIGNED = re.compile(
    r"\b([A-Z0-9_]*(?:TOKEN|SECRET|PASSWORD|PASSWD|API_KEY|ACCESS_KEY|CREDENTIALS)[A-Z0-9_]*)=['\"]?([^\s'\"$/|]{6,})"
)


def check(artifact: Artifact, expected: Expected) -> tuple[GateFinding, ...]:
    """Check every file of every layer, the variables and the history."""
    faults: list[GateFinding] = []
    for file in artifact.files:
        where = f"layer {file.layer + 1} ({artifact.layers[file.layer].name})"
        for secret in file.secrets:
            faults.append(_finding(file.path, f"{secret} in {where}"))
        if file.kind == "file" and file.bytes and _FILES.fullmatch(file.path):
            faults.append(_finding(file.path, f"a file of credentials in {where}"))
    for layer in artifact.layers:
        faults += _texts(f"history of layer {layer.name}", layer.made_by)
    for name, value in artifact.env.items():
        faults += _texts("variables of the image", f"{name}={value}")
    return tuple(faults)


def _texts(where: str, text: str) -> Iterator[GateFinding]:
    for match in _ASSIGNED.finditer(text):
        yield _finding(where, f"a value for {match[1]}")
    for secret in secrets_in(text.encode()):
        yield _finding(where, secret)


def _finding(file: str, found: str) -> GateFinding:
    return GateFinding(
        gate=_NAME,
        file=file,
        found=found,
        needed="none: whoever has the image has it",
        do="revoke it, then give it to the build as a secret (--secret) and to a run as a variable",
    )


GATE = Gate(name=_NAME, check=check)
