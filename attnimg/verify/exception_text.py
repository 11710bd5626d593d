"""Describe an exception or a signal in one line, for a reason or a note."""

from __future__ import annotations

import signal

from attnimg.errors import AttnimgError

# Characters of a message that are kept. Some name the call first and the cause last: xFormers lists
# its kernels with the reasons against each.
BEGINNING, ENDING = 250, 350


def raised(error: BaseException) -> str:
    """Return the kind and the message of an exception, without the middle of a long one."""
    if isinstance(error, AttnimgError):
        return f"{error.what}: {' '.join(error.why.split())}"
    return f"{type(error).__name__}: {shortened(' '.join(str(error).split()))}"


def shortened(text: str) -> str:
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
