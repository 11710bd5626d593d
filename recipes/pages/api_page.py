"""Write docs/api.md, the reference of the Python API, from the docstrings of attnimg."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

import attnimg
from recipes.files import NOTICE

_PAGE = """# Python API

The functions for a training run of your own; [use-your-own-trainer.md](use-your-own-trainer.md)
shows them in four trainers. `import attnimg` imports no torch. All names are typed, and the tests
run the examples.

"""
# The sections of a docstring in Google's style that a page shows, with the head of their table.
_TABLES = {"Args": "argument", "Attributes": "attribute", "Raises": "raises"}
_SECTION = re.compile(r"^(Args|Attributes|Raises|Returns|Example):$", re.MULTILINE)
# A name, a colon and its text, whose further lines are indented.
_ENTRY = re.compile(r"^(\w+): (.*(?:\n +.*)*)", re.MULTILINE)
_LONGEST_LINE = 88


def api_page() -> str:
    """Return the text of docs/api.md."""
    functions = [name for name in attnimg.__all__ if not inspect.isclass(getattr(attnimg, name))]
    classes = [name for name in attnimg.__all__ if inspect.isclass(getattr(attnimg, name))]
    parts = [part for name in (*functions, *classes) for part in _documented(name)]
    return f"<!-- {NOTICE} -->\n\n" + _PAGE + "\n\n".join(parts) + "\n"


def _documented(name: str) -> Iterator[str]:
    """Return the parts of the page about a name, and about a class's own public members."""
    found = getattr(attnimg, name)
    yield f"## {name}"
    if not inspect.isclass(found):
        yield f"```python\n{_signature(name, found)}\n```"
    yield _as_markdown(inspect.getdoc(found) or "")
    if not inspect.isclass(found) or issubclass(found, Exception):
        return
    for member, value in vars(found).items():
        if member.startswith("_") or not inspect.getdoc(value):
            continue
        is_property = isinstance(value, property)
        yield f"### {name}.{member}"
        if not is_property:
            yield f"```python\n{_signature(member, value)}\n```"
        yield _as_markdown(inspect.getdoc(value) or "")


class _Bare:
    """An annotation that is shown without quotes."""

    def __init__(self, text: object) -> None:
        self.text = str(text)

    def __repr__(self) -> str:
        return self.text


def _signature(name: str, function: object) -> str:
    """Return a signature, with an argument a line if it is long."""
    assert callable(function)
    signature = inspect.signature(function)
    arguments = [
        str(argument.replace(annotation=_Bare(argument.annotation)))
        if argument.annotation is not argument.empty
        else str(argument)
        for argument in signature.parameters.values()
        if argument.name != "self"
    ]
    kinds = [argument.kind for argument in signature.parameters.values() if argument.name != "self"]
    if inspect.Parameter.KEYWORD_ONLY in kinds:
        arguments.insert(kinds.index(inspect.Parameter.KEYWORD_ONLY), "*")
    line = f"{name}({', '.join(arguments)}) -> {signature.return_annotation}"
    if len(line) <= _LONGEST_LINE:
        return line
    lines = "".join(f"    {argument},\n" for argument in arguments)
    return f"{name}(\n{lines}) -> {signature.return_annotation}"


def _as_markdown(docstring: str) -> str:
    """Return a docstring in Google's style as Markdown."""
    text, *sections = _SECTION.split(docstring)
    parts = [_escaped(text.strip())]
    for title, body in zip(sections[::2], sections[1::2], strict=True):
        body = inspect.cleandoc(body)
        if title == "Example":
            parts.append(f"```pycon\n{body}\n```")
        elif title == "Returns":
            parts.append(f"Returns: {_escaped(body)}")
        else:
            rows = "".join(
                f"| `{name}` | {_escaped(' '.join(words.split()))} |\n"
                for name, words in _ENTRY.findall(body)
            )
            parts.append(f"| {_TABLES[title]} | |\n|---|---|\n{rows}".rstrip())
    return "\n\n".join(parts)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
