"""Find secrets by their format: private keys and tokens, as documented by their issuers."""

from __future__ import annotations

import re

# The format of each key or token, as documented by its issuer, with its full length.
_SECRETS = {
    "private key": rb"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----\s+[A-Za-z0-9+/=\s]{64}",
    "AWS access key": rb"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "Hugging Face token": rb"\bhf_[A-Za-z0-9]{34}\b",
    "GitHub token": rb"\b(?:gh[pousr]_[A-Za-z0-9]{36}|github_pat_[A-Za-z0-9_]{82})\b",
    "Weights & Biases key": rb"(?i)wandb[\w. -]*\s[=:]?\s*['\"]?[0-9a-f]{40}\b",
    "PyPI token": rb"\bpypi-AgE[A-Za-z0-9_-]{50}",
    "address with a password": rb"\bhttps?://(?!user|name|login|jo%40)[\w.%-]{1,64}:[^\s:/@'\"{}<>$]{8,}@[\w-]+\.[\w.-]+",
}
_PATTERNS = {name: re.compile(pattern) for name, pattern in _SECRETS.items()}


def secrets_in(data: bytes) -> tuple[str, ...]:
    """Return the kinds of secrets that a text seems to have; binary files are not searched."""
    if b"\0" in data[:4096]:
        return ()
    return tuple(name for name, pattern in _PATTERNS.items() if pattern.search(data))
