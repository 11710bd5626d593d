"""Format JSON, errors and warnings for all commands. Each command has a file of its own."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from attnimg.errors import CONTROL_CHARACTERS, shortened
from attnimg.redact import redact

if TYPE_CHECKING:
    from attnimg.facts import Finding

# Pieces of text, each with its style as rich names it.
Styled = list[tuple[str, str]]


def json_line(value: dict[str, Any]) -> str:
    """Return a JSON object as one line, with control characters escaped."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    # JSON itself escapes only those below U+0020, not those that reorder text on a terminal.
    return CONTROL_CHARACTERS.sub(lambda found: f"\\u{ord(found.group()):04x}", text)


def finding_json(finding: Finding) -> dict[str, Any]:
    """Return an error or a warning as JSON, without secrets."""
    values = asdict(finding)
    return values | {name: redact(values[name]) for name in ("what", "why", "do") if values[name]}


def findings_text(findings: Iterable[Finding], kind: str) -> Iterator[Styled]:
    """Yield the lines of each error or warning: what happened, why, what to do."""
    for finding in findings:
        text = [
            (f"  {kind}", "red" if kind == "error" else "yellow"),
            (f" {finding.code}:", "dim"),
            (f" {shortened(redact(finding.what))}", ""),
        ]
        for label, part in (("why:", finding.why), ("do:", finding.do)):
            if part:
                text.append((f"\n    {label:<4} ", "dim"))
                text.append((shortened(redact(part)).replace("\n", "\n" + " " * 9), ""))
        yield text
