"""Write the pages and tables that people read: docs/*.md and a part of README.md."""

from collections.abc import Iterable


def markdown_table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """Return a table in Markdown."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def code_list(names: Iterable[str]) -> str:
    """Return sorted names as code with commas between them; "-" for none."""
    return ", ".join(f"`{name}`" for name in sorted(names)) or "-"
