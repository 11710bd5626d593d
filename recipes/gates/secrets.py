"""Refuse credentials, in any layer and in the image's history.

It finds private keys and tokens by their format, files of credentials by their name, and build
arguments and environment variables by a name that is usual for a secret value.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from recipes.artifact.facts import Artifact
from recipes.artifact.secret_patterns import secrets_in
from recipes.gates import ExpectedContents, GateFinding

_FILES = re.compile(
    r"(.*/)?(\.netrc|_netrc|\.pypirc|\.git-credentials|\.aws/credentials|\.docker/config\.json"
    r"|\.huggingface/token|huggingface/(stored_tokens|token)|\.npmrc|\.ssh/id_\w+|id_(rsa|dsa|ecdsa|ed25519)"
    r"|\.config/gcloud/.*|\.kube/config|run/secrets/.+)"
)
# NAME=value, where the value is neither a path nor a reference to another variable.
_ASSIGNED = re.compile(
    r"\b([A-Z0-9_]*(?:TOKEN|SECRET|PASSWORD|PASSWD|API_KEY|ACCESS_KEY|CREDENTIALS)[A-Z0-9_]*)=['\"]?([^\s'\"$/|]{6,})"
)


def check(artifact: Artifact, expected: ExpectedContents) -> tuple[GateFinding, ...]:
    """Check every file of every layer, the variables and the history."""
    return tuple(
        GateFinding(
            file=place,
            found=found,
            needed="none: everybody who has the image can read it",
            do="revoke it; pass it to a build as a secret (--secret) and to a run as a variable",
        )
        for place, found in _find_secrets(artifact)
    )


def _find_secrets(artifact: Artifact) -> Iterator[tuple[str, str]]:
    """Yield the place and the kind of each secret."""
    for file in artifact.files:
        layer = f"layer {file.layer + 1} ({artifact.layers[file.layer].name})"
        for secret in file.secrets:
            yield file.path, f"{secret} in {layer}"
        if file.kind == "file" and file.bytes and _FILES.fullmatch(file.path):
            yield file.path, f"a file of credentials in {layer}"
    texts = [(f"history of layer {layer.name}", layer.made_by) for layer in artifact.layers]
    texts += [("variables of the image", f"{k}={v}") for k, v in artifact.env.items()]
    for place, text in texts:
        for match in _ASSIGNED.finditer(text):
            yield place, f"a value for {match[1]}"
        for secret in secrets_in(text.encode()):
            yield place, secret
