"""Choose the chat template of a run, and render it with limits on time, memory and output.

The template is the tokenizer's, one with a known name, or one written in the config. It is code
that comes with a model or a config, so it runs in Jinja's sandbox, with limits.
"""

from __future__ import annotations

import difflib
import resource
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from attnimg.config.dataset_rules import FALLBACK
from attnimg.config.schema import Config, DatasetSpec
from attnimg.errors import AttnimgError
from attnimg.files import read_regular
from attnimg.train.data.named_templates import NAMED, OF_TRL, named_template

# Published templates have up to 20 KiB.
_TEMPLATE_BYTES = 1 << 20

# Limit in CPU seconds, which does not depend on how busy the machine is; the longest conversations
# take 0.1.
SECONDS = 10.0

# Address space that rendering one record may allocate.
MEMORY_BYTES = 1 << 30

# Limits of the output: at most this many characters, or this many times the record's characters.
OUTPUT_CHARACTERS, OUTPUT_RATIO = 1 << 20, 20

# In place of a template, where mistral-common writes the tokens.
MISTRAL_COMMON = "mistral-common"

# Digits that the filter `round` may round to: a double has 17, and up to 308 before the point.
_DIGITS = 1000

_PROCESS = psutil.Process()


def choose_chat_template(
    config: Config, tokenizer: Any, *, spec: DatasetSpec | None = None, key: str = "datasets[0]"
) -> str | dict[str, str]:
    """Return the Jinja text of the template; a dataset entry's overrides that of the run.

    A tokenizer may have several by name (Command-R, Mistral v0.3, Hermes): all of them are
    returned, and conversations with tools use "tool_use", all others "default".

    Args:
        config: names a template (chat_template) or contains one (chat_template_jinja).
        tokenizer: a transformers tokenizer; its own template is the default.
        spec: the dataset entry, which may name its own.
        key: the config key of that entry.

    Raises:
        AttnimgError: the name is not known, or neither config nor tokenizer has a template.
    """
    if config.tokenizer_use_mistral_common:
        return MISTRAL_COMMON
    if spec is not None and (spec.chat_template or spec.chat_template_jinja):
        name, jinja, where = spec.chat_template, spec.chat_template_jinja, f"{key}.chat_template"
    else:
        name, jinja, where = config.chat_template, config.chat_template_jinja, "chat_template"
    if jinja and name in (None, "jinja"):
        return _read_jinja(jinja, key=where + "_jinja")
    own = tokenizer.chat_template
    named = dict(own) if isinstance(own, Mapping) else {}
    if name in named:
        return str(named[name])
    if named and "default" not in named:
        own = None
    is_own = name is None or name == "tokenizer_default"
    if own and (is_own or str(name).startswith(FALLBACK)):
        return named or str(own)
    if name is None or is_own:
        what = "the tokenizer has no default chat template"
        why = f"found {', '.join(named) or 'none'}; a dataset of type chat_template needs one"
        choices = ", ".join([*named, "chatml", "llama3"])
        do = f"set chat_template to one of {choices}, or write one in chat_template_jinja"
        raise AttnimgError(what, why=why, do=do, code="missing-key", key=where)
    plain = name.removeprefix(FALLBACK)
    if (found := named_template(plain)) is not None:
        return found
    known = [*named, *NAMED, *OF_TRL, "tokenizer_default"]
    similar = difflib.get_close_matches(plain, known, n=1, cutoff=0.0)
    what = f"unknown chat template {name!r}"
    why = f"needed one of {', '.join(known)}, or jinja with chat_template_jinja"
    do = f"set {where}: {similar[0] if own else next(iter(NAMED))}"
    raise AttnimgError(what, why=why, do=do, code="bad-value", key=where)


def _read_jinja(jinja: str, *, key: str) -> str:
    if not jinja.endswith((".jinja", ".jinja2")):
        return jinja
    path = Path(jinja).expanduser()
    try:
        return read_regular(path, at_most=_TEMPLATE_BYTES).decode()
    except FileNotFoundError:
        what, why = "not found", f"which is not a file under {Path.cwd()}"
    except OSError as error:
        what, why = "cannot be read", f"and {error.strerror}"
    except UnicodeDecodeError as error:
        what, why = "is not text", f"and its byte {error.start} is not valid UTF-8"
    what, why = f"chat template {what}: {jinja}", f"{key} is {jinja}, {why}"
    do = "correct the path, or write the template itself in the config"
    raise AttnimgError(what, why=why, do=do, code="file-missing", key=key)


class TemplateLimitError(Exception):
    """Raised where a template exceeds a limit; the message has the value found and the limit."""


def render_bounded(
    messages: Sequence[Mapping[str, Any]], *, template: str, **options: Any
) -> tuple[str, list[tuple[int, int]]]:
    """Return the text that a template renders, and the spans of its generation blocks.

    Args:
        messages: one conversation.
        template: the template in Jinja.
        options: other arguments of transformers' render_jinja_template.

    Raises:
        TemplateLimitError: it exceeds a limit.
        jinja2.TemplateError: the template is wrong; it may also raise any other exception.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    _refuse_powers(template)
    try:
        with _limit_time_and_memory(), _limit_rounding():
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
def _limit_time_and_memory() -> Iterator[None]:
    """Limit CPU time and memory inside the block; time in the main thread only."""

    def end(_number: int, _frame: FrameType | None) -> None:
        raise TemplateLimitError(f"it takes more than {SECONDS:.0f} s for one record")

    before = resource.getrlimit(resource.RLIMIT_AS)
    timed = threading.current_thread() is threading.main_thread()
    # Not ITIMER_REAL, which other code in this process may use, such as pytest-timeout.
    handler = signal.signal(signal.SIGVTALRM, end) if timed else None
    try:
        with suppress(OSError, ValueError, psutil.Error):  # /proc may be missing
            lower = [limit for limit in before if limit != resource.RLIM_INFINITY]
            most = min([_PROCESS.memory_info().vms + MEMORY_BYTES, *lower])
            resource.setrlimit(resource.RLIMIT_AS, (most, before[1]))
        if timed:
            signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
        yield
    finally:
        if timed:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.signal(signal.SIGVTALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


@contextmanager
def _limit_rounding() -> Iterator[None]:
    """Limit the digits of the filter `round` in templates that are compiled inside the block.

    It computes 10 ** digits in one step, which no signal interrupts, and for constants already when
    the template is compiled: so the filter is replaced in Jinja's own table of filters.
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


@cache
def _refuse_powers(template: str) -> None:
    """Raise for a template with powers: no signal interrupts Python in 10 ** 10 ** 8.

    No published template has a power. `f(**values)` is not one.
    """
    import jinja2

    try:
        tokens = [(kind, text) for _, kind, text in jinja2.Environment().lex(template)]
    except jinja2.TemplateError:  # rendering reports it
        return
    tokens = [token for token in tokens if token[0] != "whitespace"]
    for (_, before), (kind, text) in pairwise(tokens):
        if kind == "operator" and text == "**" and before not in ("(", ","):
            raise TemplateLimitError("it computes a power (**), whose result may have any size")
