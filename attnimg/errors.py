"""What went wrong, why, and what to do: the one exception that reaches people."""

from __future__ import annotations

import re
import signal
from functools import partial
from pathlib import Path

# Control characters of ASCII and Latin-1, and bidirectional ones, which reorder the text.
# Source: Unicode 17, categories Cc and Cf (Bidi_Control), less tab and newline (2026-11-27).
_CONTROL_CHARACTERS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]"
)
# Longer parts of a message would fill the screen.
_LONGEST_PART = 4000


def printable(text: str) -> str:
    """Return text that is safe to print on a terminal: its control characters are escaped.

    Args:
        text: from outside, such as a path, a key or a library's message. Tabs and newlines stay.
    """
    return _CONTROL_CHARACTERS.sub(lambda found: ascii(found.group())[1:-1], text)


def shortened(text: str) -> str:
    """Return text cut to 4,000 characters, followed by the number of characters left out."""
    if len(text) <= _LONGEST_PART:
        return text
    return f"{text[:_LONGEST_PART]} ... ({len(text) - _LONGEST_PART:,} more characters)"


class AttnimgError(Exception):
    """Something a person can fix: their input, their machine, or a kernel that failed.

    Args:
        what: what happened, one line, no full stop.
        why: what was found and what is needed; may have several lines.
        do: the fix, as a command or a config line where there is one.
        code: the contract's code, such as "packing-not-isolated".
        key: the config key at fault, such as "datasets[0].path".
        exit_code: 2 when it could be known before the run, 1 when the run itself failed.
    """

    def __init__(
        self,
        what: str,
        *,
        why: str,
        do: str,
        code: str = "error",
        key: str | None = None,
        exit_code: int = 2,
    ) -> None:
        super().__init__(what)
        self.what, self.why, self.do = what, why, do
        self.code, self.key, self.exit_code = code, key, exit_code

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle with the keywords, so that a worker process can raise it in its parent."""
        rest = {name: getattr(self, name) for name in ("why", "do", "code", "key", "exit_code")}
        return partial(type(self), **rest), (self.what,)

    def __str__(self) -> str:
        """Return the three parts, aligned, and safe to print on a terminal."""
        parts = [f"attnimg: {printable(shortened(self.what))}"]
        for label, text in (("why", self.why), ("do", self.do)):
            first, *rest = printable(shortened(text)).splitlines() or [""]
            parts.append(f"  {label + ':':<4} {first}")
            parts.extend(f"       {line}" for line in rest)
        return "\n".join(parts)


def bad_manifest(path: Path, error: Exception) -> AttnimgError:
    """Return the error of a file that an image's build wrote and that cannot be read."""
    return AttnimgError(
        f"{path} cannot be read",
        why=f"{type(error).__name__}: {error}; an image writes it when it is built",
        do="pull the image again",
        code="bad-image",
        exit_code=1,
    )


# Characters of a message that are kept. Some name the call first and the cause last: xFormers lists
# its kernels with the reasons against each.
BEGINNING, ENDING = 250, 350


def exception_text(error: BaseException) -> str:
    """Return the kind and the message of an exception, without the middle of a long one."""
    if isinstance(error, AttnimgError):
        return f"{error.what}: {' '.join(error.why.split())}"
    return f"{type(error).__name__}: {without_middle(' '.join(str(error).split()))}"


def without_middle(text: str) -> str:
    """Return the beginning and the end of a long text."""
    if len(text) <= BEGINNING + ENDING:
        return text
    return f"{text[:BEGINNING]} ... {text[-ENDING:]}"


def signal_name(number: int) -> str:
    """Return a signal's name; real-time signals have none."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
