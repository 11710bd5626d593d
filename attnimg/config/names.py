"""The value of attn_implementation: what is a name, what is a short form, what is neither."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches

from attnimg.backends import all_backends, backend_named
from attnimg.facts import Finding

# Short names that people try, and what each stands for. Any other unknown name is unknown-backend.
ALIASES = {
    "flash": "flash_attention_2",
    "flash_attn": "flash_attention_2",
    "fa2": "flash_attention_2",
    "fa3": "flash_attention_3",
    "fa4": "flash_attention_4",
    "flex": "flex_attention",
    "sdp": "sdpa",
    "sdpa_attention": "sdpa",
    "xformer": "xformers",
    "sageattention": "sage",
}
AUTO = "auto"


def name_errors(name: object) -> Iterator[Finding]:
    """Judge the value of attn_implementation."""
    key = "attn_implementation"
    if not isinstance(name, str):
        kind = type(name).__name__
        why = f"found {name!r} ({kind}), a backend's name is a string"
        yield finding("not-a-string", key, f"{key} is not a string", why, _names_text())
    elif name in ALIASES:
        yield finding(
            "alias-rejected",
            key,
            f"{name} is a short form",
            "found an alias; one backend has one name",
            f"write {key}: {ALIASES[name]}",
        )
    elif name != AUTO and not _is_known(name):
        near = get_close_matches(name.strip().lower(), [AUTO, *_names(), *ALIASES], n=3, cutoff=0.5)
        near = list(dict.fromkeys(ALIASES.get(match, match) for match in near))
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        why = f"found {name!r}, known are {', '.join([*_names(), AUTO])} and org/name[@rev][:fn]"
        yield finding("unknown-backend", key, f"no backend is called {name!r}", why,
                       f"{hint}{_names_text()}")  # fmt: skip


def _is_known(name: str) -> bool:
    backend = backend_named(name)
    return backend is not None and backend.in_config


def _names() -> list[str]:
    return [backend.name for backend in all_backends() if backend.in_config]


def _names_text() -> str:
    return f"use one of {', '.join([AUTO, *_names()])}, or a hub kernel org/name"


def finding(code: str, key: str, what: str, why: str, do: str) -> Finding:
    """Make a finding with all its parts."""
    return Finding(code=code, key=key, what=what, why=why, do=do)
