"""Read Markdown pages: their links, headings and code, as GitHub and the site show them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote

from markdown_it import MarkdownIt
from markdown_it.token import Token

_ID = re.compile(r'<a id="([^"]+)">')
_SOURCE = re.compile(r'<(?:img|a)\b[^>]*\b(?:src|href)="([^"]+)"')
_COMMAND = re.compile(r"^\s*(?:\$ |sudo )?(?:[A-Z_]+=\S* )*(?:\.venv/bin/)?(make|attnimg)\s+(.*)")
_PATH = re.compile(
    r"(?:attnimg|recipes|docker|docs|tests|examples|benchmarks|requirements)/[\w./*-]+"
)
_IMAGE_RUN = re.compile(r"\battnimg:([\w-]+)(?: ([a-z]+)\b)?")


@dataclass(frozen=True)
class Page:
    """One page.

    Attributes:
        links: destinations of links and images, without those to other sites.
        anchors: names that a link to this page may end with.
        commands: lines of its code that run make or attnimg: the program and its arguments.
        paths: files and folders of the repository that it names as code; `*` stands for anything.
        images: pairs of an image's tag and the word after it, of `docker run ... attnimg:TAG WORD`.
    """

    links: tuple[str, ...]
    anchors: frozenset[str]
    commands: tuple[tuple[str, tuple[str, ...]], ...]
    paths: tuple[str, ...]
    images: tuple[tuple[str, str], ...]


def read_page(text: str) -> Page:
    """Parse one page."""
    tokens = [*_flat(MarkdownIt("commonmark").enable("table").parse(text))]
    html = "".join(token.content for token in tokens if token.type.startswith("html_"))
    links = [str(token.attrs[name]) for token in tokens for name in ("href", "src")
             if name in token.attrs]  # fmt: skip
    code = [
        line
        for token in tokens
        if token.type in ("fence", "code_block", "code_inline")
        for line in token.content.replace("\\\n", " ").splitlines()
    ]
    return Page(
        links=tuple(
            unquote(link)
            for link in (*links, *_SOURCE.findall(html))
            if not re.match(r"[a-z]+:", link)
        ),
        anchors=frozenset(_ID.findall(html)) | frozenset(_headings(tokens)),
        commands=tuple(
            (found[1], tuple(words(found[2]))) for line in code if (found := _COMMAND.match(line))
        ),
        paths=tuple(
            token.content
            for token in tokens
            if token.type == "code_inline" and _PATH.fullmatch(token.content)
        ),
        images=tuple(
            (tag, word)
            for line in code
            if "docker run" in line
            for tag, word in _IMAGE_RUN.findall(line)
        ),
    )


def words(arguments: str) -> Iterator[str]:
    """Yield the words of a command line up to the next command or comment, without NAME=value."""
    quoted = re.sub(r"\"[^\"]*\"|'[^']*'", "Q", arguments)
    for word in re.split(r"[;|&#`<>]", quoted)[0].split():
        if "=" not in word:
            yield word.rstrip(".,:)")


def _flat(tokens: list[Token]) -> Iterator[Token]:
    for token in tokens:
        yield token
        yield from _flat(token.children or [])


def _headings(tokens: list[Token]) -> Iterator[str]:
    """Yield the anchor of each heading, as GitHub names it."""
    seen: dict[str, int] = {}
    for before, token in pairwise(tokens):
        if before.type != "heading_open":
            continue
        text = "".join(part.content for part in token.children or []).strip().lower()
        slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        count = seen[slug] = seen.get(slug, -1) + 1
        yield f"{slug}-{count}" if count else slug


def broken_links(path: Path, page: Page, *, root: Path) -> list[str]:
    """Return the links of a page that lead nowhere, or out of the repository."""
    broken = []
    for link in page.links:
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        if not target.is_relative_to(root) or not target.exists():
            broken.append(link)
            continue
        anchors = read_page(target.read_text(encoding="utf-8")).anchors if anchor else ()
        if anchor and anchor not in anchors:
            broken.append(link)
    return broken


def missing_paths(page: Page, *, root: Path) -> list[str]:
    """Return the paths that a page names and that the repository does not have."""
    return [path for path in page.paths if not any(root.glob(path.rstrip("/")))]
