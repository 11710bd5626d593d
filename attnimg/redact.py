"""Find secrets in text, and replace them, before it is printed or written to a file."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

# A user or a password in a URI: https://user:password@host, postgresql://user@host.
_CREDENTIALS = re.compile(r"(?<=://)[^/?#\s'\"]*@")

# Variables whose values are secret; HF_TOKEN_PATH's is not.
_SECRET_VARIABLE = re.compile(r"(API_?KEY|ACCESS_KEY|TOKEN|SECRET|PASSWORD)$", re.IGNORECASE)

# Config keys whose values would be secret; special_tokens and eot_tokens are not among them.
_SECRET_KEY = re.compile(
    r"(api_?key|(auth|hub|hf|access)_token|secret|password|webhook_url)$", re.IGNORECASE
)

# A token of the Hugging Face hub.
# Source: https://huggingface.co/docs/hub/security-tokens, "hf_..." (2026-11-27)
_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")

# Shorter values may be parts of ordinary words.
_SHORTEST = 8


def has_credentials(uri: str) -> bool:
    """Return whether a URI has a user or a password."""
    return _CREDENTIALS.search(uri) is not None


def is_secret(key: str, value: object) -> bool:
    """Return whether a config key has a secret as its value; hf_use_auth_token: true has none."""
    return isinstance(value, str) and bool(value) and _SECRET_KEY.search(key) is not None


def redact(text: str, environ: Mapping[str, str] = os.environ) -> str:
    """Return text with *** in place of credentials of URIs, and of secret variables' values.

    Args:
        text: from a library or a config.
        environ: the variables; those with a name such as WANDB_API_KEY are secret.
    """
    text = _HUB_TOKEN.sub("***", _CREDENTIALS.sub("***@", text))
    for name, value in environ.items():
        if len(value) >= _SHORTEST and _SECRET_VARIABLE.search(name):
            text = text.replace(value, "***")
    return text
