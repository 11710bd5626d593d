"""Find secrets in text and in configs, and replace them, before they are printed or written."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

# What stands in place of a secret.
MASK = "***"

# A user or a password in a URI: https://user:password@host, postgresql://user@host. Passwords with
# "/", "?" or "#" are found too, unless they look like a port and a path.
_CREDENTIALS = re.compile(r"(?<=://)([^/?#\s'\"]*|[^/?#@:\s'\"]*:(?!\d{1,5}[/?#])[^@\s'\"]*)@")
# The same in a path: pathlib writes https://user:password@host as https:/user:password@host.
_CREDENTIALS_IN_PATH = re.compile(r"(?<=\w:/)[^/?#@:\s'\"]*:[^/@\s'\"]+@")
_QUERY_SECRET = re.compile(
    r"(?<=[?&])([\w.-]*(?:token|sig|signature|key|password|secret|credential)=)[^&#\s'\"]+",
    re.IGNORECASE,
)
# user:password@host, without a scheme.
_USER_AT_HOST = re.compile(r"[^\s/:@]+:[^\s/:@]+@[\w.-]+(:\d+)?(/\S*)?")
_URI = re.compile(r"\w[\w+.-]*://\S+")

# Variables whose values are secret; HF_TOKEN_PATH's is not.
_SECRET_VARIABLE = re.compile(r"(API_?KEY|ACCESS_KEY|TOKEN|SECRET|PASSWORD)$", re.IGNORECASE)

# Config keys whose values would be secret; special_tokens and eot_tokens are not among them.
_SECRET_KEY = re.compile(
    r"(api_?key|access_key|(auth|hub|hf|access)_token|^token|secrets?|password|webhook_url)$",
    re.IGNORECASE,
)

# A token of the Hugging Face hub.
# Source: https://huggingface.co/docs/hub/security-tokens, "hf_..." (2026-11-27)
_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")

# Shorter values may be parts of ordinary words.
_SHORTEST = 8


def has_credentials(uri: str) -> bool:
    """Return whether a URI has a user, a password or a token."""
    return bool(_CREDENTIALS.search(uri) or _QUERY_SECRET.search(uri))


def is_secret_key(key: str) -> bool:
    """Return whether the texts and numbers of a config key are secret."""
    return _SECRET_KEY.search(key) is not None


def is_secret(key: str, value: object) -> bool:
    """Return whether a config key has a secret as its value; hf_use_auth_token: true has none."""
    if is_secret_key(key) and isinstance(value, int | float) and not isinstance(value, bool):
        return True  # a password of digits, which YAML reads as a number
    if not isinstance(value, str) or not value:
        return False
    if is_secret_key(key) or _HUB_TOKEN.search(value) or _USER_AT_HOST.fullmatch(value):
        return True
    return _URI.fullmatch(value) is not None and has_credentials(value)


def mask_secrets(value: Any, found: list[str], *, key: str = "", path: str = "") -> Any:
    """Return a value of a config with MASK in place of each secret.

    Args:
        value: of the key; mappings and lists are searched.
        found: the paths of the secrets are added to it, such as "env.WANDB_API_KEY".
        key: the name of the key; the items of a list have the list's.
        path: the path of the key.
    """
    if isinstance(value, Mapping):
        return {
            name: mask_secrets(item, found, key=str(name), path=f"{path}.{name}" if path else name)
            for name, item in value.items()
        }
    if isinstance(value, list):
        return [
            mask_secrets(item, found, key=key, path=f"{path}[{index}]")
            for index, item in enumerate(value)
        ]
    if not is_secret(key, value):
        return value
    found.append(path)
    return MASK


def redact(text: str, environ: Mapping[str, str] = os.environ) -> str:
    """Return text with *** in place of credentials of URIs, and of secret variables' values.

    Args:
        text: from a library or a config.
        environ: the variables; those with a name such as WANDB_API_KEY are secret, and the
            passwords of those that are URIs.
    """
    text = _CREDENTIALS_IN_PATH.sub(f"{MASK}@", _CREDENTIALS.sub(f"{MASK}@", text))
    text = _QUERY_SECRET.sub(rf"\1{MASK}", text)
    text = _HUB_TOKEN.sub(MASK, text)
    for secret in _secret_values(environ):
        text = text.replace(secret, MASK)
    return text


def _secret_values(environ: Mapping[str, str]) -> Iterator[str]:
    """Yield the secrets of variables, and the parts of them that an error of a URI may quote."""
    for name, value in environ.items():
        if len(value) >= _SHORTEST and _SECRET_VARIABLE.search(name):
            yield value
        elif "://" in value and (found := _CREDENTIALS.search(value)):
            password = found.group(1).partition(":")[2]
            parts = [password, *re.split("[/?#]", password)]
            yield from (part for part in parts if len(part) >= _SHORTEST)
