"""Write the digests of the base images into recipes/bases.toml (`make lock`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import tomlkit

from recipes.facts import Recipes
from recipes.files import write_all
from recipes.solve.registry import TagDigests, UnreachableError, resolve_tag

_FILE = "recipes/bases.toml"


def lock_bases(
    recipes: Recipes, *, root: Path, resolve: Callable[[str], TagDigests] = resolve_tag
) -> Iterator[str]:
    """Resolve the tag of each base that an image has, and write the file; yield what was found.

    Without a network a digest stays what it was, with a sentence.

    Raises:
        AttnimgError: as resolve_tag; the file is not changed.
    """
    text = (root / _FILE).read_text(encoding="utf-8")
    for name in dict.fromkeys(image.base for image in recipes.images.values()):
        base = recipes.bases[name]
        try:
            found = resolve(base.reference)
        except UnreachableError as error:
            yield f"{base.reference} stays {base.digest}: {error}"
            continue
        text = set_digest(text, name, found.digest, found.platforms)
        change = "has" if found.digest == base.digest else f"was {base.digest}, is now"
        yield f"{base.reference} {change} {found.digest}, for {' '.join(found.platforms)}"
    write_all(root, {_FILE: text})


def set_digest(text: str, name: str, digest: str, platforms: Mapping[str, str]) -> str:
    """Return the text of bases.toml with other digests of one base; comments stay."""
    document = tomlkit.parse(text)
    base: Any = document[name]
    base["digest"] = digest
    base["platforms"] = tomlkit.inline_table()
    for platform, one in platforms.items():
        base["platforms"].append(platform, one)
    return tomlkit.dumps(document)
