"""Where a model's config.json lies on this machine, and what is in it."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from attnimg.errors import AttnimgError
from attnimg.files import read_regular

# The largest config.json of a language model is far below this; weights given by mistake are above.
_MAX_BYTES = 16 * 2**20
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_ADAPTER = "adapter_config.json"
_REVISION = re.compile(r"[\w-][\w./-]*")


def find_config(base_model: str, *, revision: str | None = None) -> Path | None:
    """Find the config.json of a model without asking the network.

    Args:
        base_model: a model folder, a config.json, or a name on the Hugging Face hub.
        revision: branch, tag or commit of a hub name; None for "main".

    Returns:
        The file; for a folder also where it has none, so that reading it names what the folder
        lacks. None when the model is not at hand.
    """
    if not base_model:
        return None
    try:
        local = Path(base_model).expanduser()
        if local.is_dir():
            return local / "config.json"
        if local.is_file():
            return local
    except (OSError, RuntimeError):  # no name of a file, no right to look, or no such user's home
        return None
    if not _HUB_NAME.fullmatch(base_model):
        return None
    return _find_cached(base_model, revision=revision)


def read_config(path: Path) -> dict[str, Any]:
    """Read a config.json.

    Raises:
        AttnimgError: it is missing, too large, not JSON, or not an object (code "bad-model").
    """
    try:
        config = json.loads(read_regular(path, at_most=_MAX_BYTES))
    except FileNotFoundError as error:
        if (path.parent / _ADAPTER).is_file():
            raise _adapter(path.parent) from error
        raise _refusal(path, why=f"could not read it: {error.strerror}") from error
    except OSError as error:
        raise _refusal(path, why=f"could not read it: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise _refusal(path, why=f"found no text at byte {error.start}; needed JSON") from error
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise _refusal(path, why=f"found no JSON at {where}: {error.msg}") from error
    except (ValueError, RecursionError) as error:
        raise _refusal(path, why=f"found JSON that can't be read: {error}") from error
    if not isinstance(config, dict):
        found = type(config).__name__
        raise _refusal(path, why=f"found a JSON {found}; needed an object of named fields")
    return config


def _find_cached(name: str, *, revision: str | None) -> Path | None:
    """Look into the hub's cache: refs/REVISION names a snapshot, else the newest one counts."""
    folder = _hub_cache() / ("models--" + name.replace("/", "--"))
    wanted = revision or "main"
    if not _REVISION.fullmatch(wanted) or ".." in wanted:
        return None
    snapshots = folder / "snapshots"
    try:
        commit = (folder / "refs" / wanted).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        commit = wanted
    # The pattern also keeps a broken refs file from leading out of the cache.
    if _REVISION.fullmatch(commit) and (snapshots / commit / "config.json").is_file():
        return snapshots / commit / "config.json"
    if revision is not None:
        return None
    found = [path for path in snapshots.glob("*/config.json") if path.is_file()]
    return max(found, key=lambda path: path.parent.stat().st_mtime, default=None)


def _hub_cache() -> Path:
    """Find the cache as huggingface_hub does.

    Source: constants.py of huggingface_hub 2.4.0 (2026-11-21).
    """
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if given := os.environ.get(variable):
            return Path(given).expanduser()
    home = os.environ.get("HF_HOME")
    if not home:
        home = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")  # noqa: PTH118  the user's "~" comes first
    return Path(home).expanduser() / "hub"


def _adapter(folder: Path) -> AttnimgError:
    """Return the refusal of an adapter's folder in the place of a model's."""
    try:
        named = json.loads(read_regular(folder / _ADAPTER, at_most=_MAX_BYTES))
        base = str(named["base_model_name_or_path"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        base = "the model that it was trained on"
    return AttnimgError(
        f"{folder} is an adapter, not a model",
        why=f"found {_ADAPTER} of a LoRA on {base}, and no config.json",
        do=f"set base_model: {base}; to train the merged model, merge the adapter first with "
        "PEFT's merge_and_unload and save_pretrained",
        code="bad-model",
        key="base_model",
    )


def _refusal(path: Path, *, why: str) -> AttnimgError:
    return AttnimgError(
        f"cannot read the model's {path.name}",
        why=f"{path}: {why}",
        do="give a model folder with its config.json, or a name on the Hugging Face hub",
        code="bad-model",
        key="base_model",
    )
