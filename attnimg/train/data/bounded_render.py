"""Render a chat template within limits of time, memory and output.

A template comes with a model, and Jinja's sandbox limits what it can reach, not what it takes:
`{{ 'a' * 10**10 }}` fills the memory, and nested loops do not end.
"""

from __future__ import annotations

import os
import resource
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from itertools import pairwise
from types import FrameType
from typing import Any

# Seconds of CPU time, which a busy machine does not stretch; the longest conversations take 0.1.
SECONDS = 10.0
# The address space that rendering one record may add.
MEMORY_BYTES = 1 << 30
# The longest output: this, and so many times the characters of the record.
OUTPUT_CHARACTERS, OUTPUT_RATIO = 1 << 20, 20

# Digits that the filter `round` may keep: a double has 17, and 308 before its point.
_DIGITS = 1000

_PAGE_BYTES = resource.getpagesize()


class TemplateLimitError(Exception):
    """A template that takes too much for one record; says what was found, and the limit."""


def render_bounded(
    messages: Sequence[Mapping[str, Any]], *, template: str, **options: Any
) -> tuple[str, list[tuple[int, int]]]:
    """Return the text that a template writes, and the spans that its generation blocks mark.

    Args:
        messages: one conversation.
        template: Jinja.
        options: what else transformers' render_jinja_template takes.

    Raises:
        TemplateLimitError: it exceeds a limit.
        jinja2.TemplateError: and whatever else the template raises.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    _require_no_powers(template)
    try:
        with _limited(), _bounded_round():
            texts, spans = render_jinja_template(
                conversations=[list(messages)], chat_template=template, **options
            )
    except MemoryError:
        raise TemplateLimitError(
            f"it needs more than {MEMORY_BYTES >> 20:,} MiB of memory for one record"
        ) from None
    text = str(texts[0])
    if len(text) > OUTPUT_CHARACTERS:
        given = len(repr((messages, options)))
        if len(text) > OUTPUT_CHARACTERS + OUTPUT_RATIO * given:
            raise TemplateLimitError(
                f"it writes {len(text):,} characters for a record of {given:,}, needed at most "
                f"{OUTPUT_CHARACTERS:,} and {OUTPUT_RATIO} times the record"
            )
    return text, spans[0] if spans else []


@contextmanager
def _limited() -> Iterator[None]:
    """Limit CPU time and memory inside the block; time in the main thread only."""

    def end(_number: int, _frame: FrameType | None) -> None:
        raise TemplateLimitError(f"it takes more than {SECONDS:.0f} s for one record")

    before = resource.getrlimit(resource.RLIMIT_AS)
    timed = threading.current_thread() is threading.main_thread()
    # Not ITIMER_REAL: other programs in this process use that one, such as pytest-timeout.
    handler = signal.signal(signal.SIGVTALRM, end) if timed else None
    try:
        with suppress(OSError, ValueError):  # /proc may be missing
            _set_memory(_address_bytes() + MEMORY_BYTES, before)
        if timed:
            signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
        yield
    finally:
        if timed:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.signal(signal.SIGVTALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


@contextmanager
def _bounded_round() -> Iterator[None]:
    """Limit the digits of the filter `round` in templates that are compiled inside the block.

    It computes 10 ** digits in one step, which no signal interrupts, and for constants already when
    the template is compiled: so the filter has to be replaced where Jinja takes it from.
    """
    from jinja2.filters import FILTERS

    original = FILTERS["round"]

    def bounded(value: Any, precision: Any = 0, method: Any = "common") -> Any:
        if isinstance(precision, int) and abs(precision) > _DIGITS:
            raise TemplateLimitError(f"it rounds to {precision:,} digits, needed at most {_DIGITS}")
        return original(value, precision, method)

    FILTERS["round"] = bounded
    try:
        yield
    finally:
        FILTERS["round"] = original


def _set_memory(most: int, before: tuple[int, int]) -> None:
    """Lower the soft limit of the address space; a lower one that was set before stays."""
    given = [limit for limit in before if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min([most, *given]), before[1]))


def _address_bytes() -> int:
    opened = os.open("/proc/self/statm", os.O_RDONLY)  # four times as fast as pathlib
    try:
        return int(os.read(opened, 100).split()[0]) * _PAGE_BYTES
    finally:
        os.close(opened)


@cache
def _require_no_powers(template: str) -> None:
    """Refuse powers: Python computes 10 ** 10 ** 8 in one step, which no signal interrupts.

    No published template has one. `f(**values)` is none.
    """
    import jinja2

    try:
        tokens = [(kind, text) for _, kind, text in jinja2.Environment().lex(template)]
    except jinja2.TemplateError:  # rendering will say so
        return
    tokens = [token for token in tokens if token[0] != "whitespace"]
    for (_, before), (kind, text) in pairwise(tokens):
        if kind == "operator" and text == "**" and before not in ("(", ","):
            raise TemplateLimitError("it computes a power (**), whose result may have any size")
