"""Say what a start has to note: on stderr, for stdout is read by the shell."""

from __future__ import annotations

import sys


def say(text: str) -> None:
    """Print one note, where the entrypoint's own go."""
    print(f"attnimg: {text}", file=sys.stderr)  # noqa: T201
