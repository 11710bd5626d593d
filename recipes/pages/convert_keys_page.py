"""Write docs/convert-keys.md: what `attnimg convert` does with each key of other trainers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from attnimg.config.conversion.tables import NAMES, OF_TRL, SourceKey, key_table
from recipes.files import NOTICE
from recipes.pages import code_list, markdown_table

_INTRO = """# Keys of other trainers

What `attnimg convert` ([page](convert.md)) does with each key of TRL's scripts and of
LLaMA-Factory. A key that this page does not list is refused, except those of axolotl, which are in
[Config keys](config-keys.md). A default of the old trainer that differs from attnimg's is written
into the new config. Answers other than `done` apply only to values that differ from the default.

"""
_TITLES = {
    "done-otherwise": "done by other means (`done-otherwise`)",
    "hint-not-used": "hints that are not used (`hint-not-used`)",
    "refused": "refused (`unsupported-key`)",
}


def convert_keys_page() -> str:
    """Write docs/convert-keys.md from attnimg/data/convert/*.toml."""
    tables = {trainer: key_table(trainer).keys for trainer in NAMES if trainer != "axolotl"}
    shared = {
        key: found
        for key, found in tables["trl"].items()
        if tables["llama-factory"].get(key) == found
    }
    parts = [f"<!-- {NOTICE} -->\n\n{_INTRO}"]
    parts += _section("Shared by TRL and LLaMA-Factory", shared)
    for trainer, keys in tables.items():
        known = {**shared, **tables["trl"]} if trainer in OF_TRL[1:] else shared
        own = {key: found for key, found in keys.items() if known.get(key) != found}
        parts += _section(f"{NAMES[trainer]} (`--from {trainer}`)", own)
        if absent := known.keys() - keys:
            parts.append(f"{NAMES[trainer]} does not have: {code_list(absent)}.\n\n")
    templates = key_table("llama-factory").templates
    parts.append(f"Templates of LLaMA-Factory that are converted: {code_list(templates)}.\n")
    return "".join(parts)


def _section(title: str, keys: Mapping[str, SourceKey]) -> Iterator[str]:
    """Yield a table of the keys that are done, and one for each other answer."""
    done = [
        (f"`{key}`", code_list(found.to), _default(found), found.how or "-")
        for key, found in keys.items()
        if found.answer == "done"
    ]
    head = ("key", "becomes", "old default", "how")
    yield f"## {title}\n\n{markdown_table(head, done)}\n"
    for answer, name in _TITLES.items():
        groups: dict[tuple[str, str], list[str]] = {}
        for key, found in keys.items():
            if found.answer == answer:
                groups.setdefault((found.reason, found.do or "-"), []).append(f"`{key}`")
        rows = ((reason, do, ", ".join(names)) for (reason, do), names in groups.items())
        if groups:
            table = markdown_table(("why", "what to do", "keys"), rows)
            yield f"{title.partition(' (')[0]}, {name}:\n\n{table}\n"


def _default(found: SourceKey) -> str:
    if found.default is None:
        return "-"
    text = str(found.default)
    return f"`{text.lower() if isinstance(found.default, bool) else text}`"
