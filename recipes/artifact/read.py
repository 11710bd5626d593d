"""Read an archive, a folder or a wheelhouse into one Artifact."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from attnimg.errors import AttnimgError
from recipes.artifact.archive import read_archive
from recipes.artifact.distributions import distributions
from recipes.artifact.facts import Artifact, File, Layer
from recipes.artifact.folder import read_folder, read_sums, read_wheels

Say = Callable[[str], None]


def read_image(path: Path, *, say: Say) -> Artifact:
    """Read an image: an unpacked folder, or a file that `docker save` or an OCI tool wrote.

    Raises:
        AttnimgError: it is neither, or not there (code "bad-archive").
    """
    config: dict[str, Any] = {}
    layers: tuple[Layer, ...]
    files: tuple[File, ...]
    if not path.exists():
        raise AttnimgError(
            f"there is no {path}",
            why="found nothing there to read",
            do="name what `docker save` wrote, or the folder of an unpacked image",
            code="bad-archive",
        )
    if path.is_dir():
        say(f"folder {path}")
        layer, files = read_folder(path)
        layers = (layer,)
    else:
        layers, files, config = read_archive(path, say=say)
    env = dict(text.partition("=")[::2] for text in config.get("config", {}).get("Env") or [])
    return Artifact(
        source=path.name,
        kind="folder" if path.is_dir() else "image",
        layers=layers,
        files=files,
        distributions=distributions(files),
        env=env,
        sums={},
    )


def read_wheelhouse(folder: Path, *, over: Artifact | None, say: Say) -> Artifact:
    """Read a wheelhouse, as if installed over an image if one is given.

    Raises:
        AttnimgError: there is no wheel in it.
    """
    say(f"wheels {folder}")
    layers, files = read_wheels(folder, site=site_packages(over))
    sums, manifest = read_sums(folder)
    laid = {file.path for file in files}
    return Artifact(
        source=folder.name,
        kind="wheels",
        layers=layers,
        files=files,
        distributions=distributions(files),
        env={},
        sums=sums,
        manifest=manifest,
        below=tuple(f for f in over.files if f.visible and f.path not in laid) if over else (),
    )


def site_packages(artifact: Artifact | None) -> str:
    """Return the folder with the most packages; empty for none."""
    sites = [one.folder.rpartition("/")[0] for one in artifact.distributions] if artifact else []
    return max(sorted(set(sites)), key=sites.count, default="")
