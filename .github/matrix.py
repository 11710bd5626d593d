"""Print a part of matrix.json for GitHub's `fromJSON`, or what is skipped as Markdown.

    matrix.py images | layers | kernels | gpu [IMAGE]    the jobs, as JSON
    matrix.py published [IMAGE]       the GPU tests of images that are published, as JSON
    matrix.py pushed [IMAGE]          the published images, as JSON
    matrix.py skipped | untested | unpublished [IMAGE]   what has no job, and why, as Markdown
    matrix.py releases                the images that may be published, in one line
    matrix.py registry                host/namespace that this run may push to, or nothing

Standard library alone, because it runs before anything is installed.
"""

from __future__ import annotations

import json
import os
import sys
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MARKDOWN = {"skipped": "not built", "untested": "not tested", "unpublished": "not tested"}
PARTS = ("images", "layers", "kernels", "gpu", "published", "pushed", *MARKDOWN, "releases")


def part(name: str, matrix: dict[str, list[dict[str, Any]]], published: dict[str, str]) -> str:
    """Return one part as text.

    Args:
        name: one of PARTS.
        matrix: what `make render` wrote; of one image, where one is asked for.
        published: image -> its reference by digest.
    """
    if name == "releases":
        images = (entry["image"] for entry in matrix["images"] if entry["publish"])
        return " ".join(dict.fromkeys(images))
    if name == "pushed":
        return json.dumps(
            [{"image": image, "reference": reference} for image, reference in published.items()]
        )
    key = {"skipped": "images"}.get(name, "gpu" if name not in matrix else name)
    entries = matrix[key]
    if name in ("published", "unpublished"):
        entries = [
            {
                **entry,
                "skip": entry["skip"] or ("" if entry["image"] in published else "not published"),
                "digest": published.get(entry["image"], "").partition("@")[2],
            }
            for entry in entries
        ]
    if name not in MARKDOWN:
        return json.dumps([entry for entry in entries if not entry.get("skip")])
    columns = ("image", "platform" if key == "images" else "arch", "skip")
    titles = {"arch": "GPU", "skip": f"{MARKDOWN[name]}, because"}
    lines = [[titles.get(column, column) for column in columns], ["---"] * len(columns)]
    lines += [[entry[column] for column in columns] for entry in entries if entry["skip"]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def registry(content: dict[str, Any], env: dict[str, str]) -> str:
    """Return host/namespace: REGISTRY, or in the repository itself that of registry.toml.

    A fork has none, so that its runs push nothing and read no cache.

    Args:
        content: of recipes/registry.toml.
        env: the environment variables.
    """
    if own := env.get("REGISTRY", "").rstrip("/"):
        return own
    server = env.get("GITHUB_SERVER_URL", "https://github.com")
    here = f"{server}/{env.get('GITHUB_REPOSITORY', '')}"
    return str(content["registry"]) if here == content["source"] else ""


def fail(what: str, why: str, do: str) -> None:
    """Exit with an error in three parts."""
    sys.exit(f"matrix: {what}\n  why: {why}\n  do:  {do}")


def main(arguments: list[str]) -> None:
    """Print a part."""
    name, image = (*arguments, "", "")[:2]
    if name not in (*PARTS, "registry") or len(arguments) > 2:
        known = ", ".join((*PARTS, "registry"))
        fail(f"there is no part {' '.join(arguments)!r}", f"known: {known}", "make matrix/images")
    content = tomllib.loads((ROOT / "recipes" / "registry.toml").read_text(encoding="utf-8"))
    if name == "registry":
        sys.stdout.write(registry(content, dict(os.environ)) + "\n")
        return
    matrix = json.loads(Path(__file__).with_name("matrix.json").read_text(encoding="utf-8"))
    names = sorted({entry["image"] for entry in matrix["images"]})
    if image and image not in names:
        fail(f"there is no image {image!r}", f"known: {', '.join(names)}", "name one of these")
    asked = {
        key: [entry for entry in entries if image in ("", entry["image"])]
        for key, entries in matrix.items()
        if key != "//"
    }
    published = {
        entry["image"]: f"{content['registry']}/attnimg@{entry['digest']}"
        for entry in content.get("published", [])  # the newest is the last
        if image in ("", entry["image"])
    }
    sys.stdout.write(part(name, asked, published) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
