"""Parse the patterns of unfrozen_parameters, which name weights and rows of weights."""

from __future__ import annotations

import re


def parse_weight_pattern(text: str) -> tuple[re.Pattern[str], tuple[int, int | None] | None]:
    """Parse a pattern of unfrozen_parameters.

    Source: axolotl 0.19.0, utils/freeze.py, LayerNamePattern (2026-11-27).

    Args:
        text: a regular expression for the beginning of a weight's name, in which a dot
            matches only a dot; rows may follow it, [3], [:32000] or [32000:].

    Returns:
        The expression, and the first row and the one after the last; None without rows, and in
        place of the last row where the pattern names no end.

    Raises:
        ValueError: the expression is invalid, or the rows are.
    """
    name, rows = text, None
    if found := re.fullmatch(r"(.+)\[([0-9]*)(:?)([0-9]*)\]", text):
        first, colon, last = found[2], found[3], found[4]
        if colon:
            rows = (int(first or 0), int(last) if last else None)
        elif first:
            rows = (int(first), int(first) + 1)
        if rows is not None:
            name = found[1]
            if rows[1] is not None and rows[0] >= rows[1]:
                raise ValueError(f"should end after its first row: [{rows[0]}:{rows[1]}]")
    try:
        return re.compile(re.sub(r"\.(?!\+)", r"\\.", name)), rows
    except re.error as error:
        raise ValueError(f"should be a regular expression: {error}") from None
