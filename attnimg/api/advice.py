"""Raise errors that name arguments of the API in place of config keys.

The steps that the API shares with the command line write their advice with config keys, such as
"set sample_packing: false". For a caller of the API this becomes "pass packing=False".
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from difflib import get_close_matches
from functools import wraps
from inspect import signature
from typing import ParamSpec, TypeVar

from attnimg.errors import AttnimgError
from attnimg.facts import Finding

P = ParamSpec("P")
R = TypeVar("R")

# Key of a config -> the argument of `select`.
_ARGUMENTS = {
    "attn_backends": "backends",
    "attn_implementation": "backend",
    "attn_strict": "strict",
    "base_model": "model",
    "bf16": "dtype",
    "gradient_checkpointing": "checkpointing",
    "micro_batch_size": "micro_batch_size",
    "sample_packing": "packing",
    "sequence_len": "sequence_len",
    "torch_compile": "compiled",
    "trust_remote_code": "trust_remote_code",
}
_KEY = rf"\b({'|'.join(_ARGUMENTS)})\b"
_NAME = r"[\w./~@:-]*\w"
_SETTING = re.compile(rf"{_KEY}: ({_NAME})((?: or {_NAME}(?=[,;)]|$))*)", re.MULTILINE)

# Whether the caller has a config, as axolotl's plugin does.
_has_config: ContextVar[bool] = ContextVar("attnimg_has_config", default=False)


def in_api_words(advice: str) -> str:
    """Return a line of advice that names the arguments of the API."""
    if _has_config.get():
        return advice
    advice = re.sub(rf"\b(?:set|write) (?={_KEY}: )", "pass ", advice)
    advice = re.sub(rf"\bset {_KEY} to\b", r"pass as \1", advice)
    advice = re.sub(rf"\bremove {_KEY}", r"leave \1 out", advice)
    advice = _SETTING.sub(_argument, advice)
    # attn_implementation= is the argument of from_pretrained.
    return re.sub(rf"{_KEY}(?!=)", lambda found: _ARGUMENTS[found[1]], advice)


def _argument(found: re.Match[str]) -> str:
    """Return `key: value or other` as `argument=value or other`, in Python's syntax."""
    key, value, others = found.groups()
    if key == "bf16" and value == "true":
        value = "bfloat16"
    names = [value, *others.split(" or ")[1:]]
    return f"{_ARGUMENTS[key]}={' or '.join(map(_literal, names))}"


def _literal(value: str) -> str:
    if value in ("true", "false"):
        return value.title()
    return value if value.isdigit() else json.dumps(value)


def finding_in_api_words(finding: Finding) -> Finding:
    """Return a warning whose advice names the arguments of the API."""
    return replace(finding, do=in_api_words(finding.do))


@contextmanager
def api_words() -> Iterator[None]:
    """Raise the AttnimgErrors of the block with the API's arguments; also a decorator."""
    try:
        yield
    except AttnimgError as error:
        if not _has_config.get():
            error.what, error.do = in_api_words(error.what), in_api_words(error.do)
            error.key = _ARGUMENTS.get(error.key or "", error.key)
        raise


def public(
    takes_too: Callable[..., object] | None = None,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return a decorator for the functions of the API, whose errors name its arguments.

    An unknown keyword argument raises TypeError with the nearest known name.

    Args:
        takes_too: a function to which the decorated one passes on keyword arguments.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        known = _keywords(function) | (_keywords(takes_too) if takes_too else set())

        @wraps(function)
        def call(*args: P.args, **keywords: P.kwargs) -> R:
            require_known(function.__name__, keywords, known)
            with api_words():
                return function(*args, **keywords)

        return call

    return decorate


def _keywords(function: Callable[..., object]) -> set[str]:
    parameters = signature(function).parameters.values()
    return {one.name for one in parameters if one.kind is not one.VAR_KEYWORD}


def require_known(called: str, given: Iterable[str], known: Collection[str]) -> None:
    """Raise TypeError for an unknown keyword argument, with the nearest known one."""
    for name in given:
        if name not in known:
            similar = get_close_matches(name, known)
            similar.sort(key=lambda other: not other.startswith(name[:3]))
            near = _ARGUMENTS.get(name) or next(iter(similar), None)
            hint = f". Did you mean {near!r}?" if near else ""
            raise TypeError(f"{called}() got an unexpected keyword argument {name!r}{hint}")


@contextmanager
def config_words() -> Iterator[None]:
    """Keep config keys in the errors of the block; also a decorator."""
    token = _has_config.set(True)
    try:
        yield
    finally:
        _has_config.reset(token)
