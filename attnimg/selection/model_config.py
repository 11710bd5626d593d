"""Find a model's config.json, and read its fields under all their names, with type checks.

Neither transformers nor the network is needed: a hub name is looked up in the hub's cache.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from attnimg.errors import AttnimgError
from attnimg.files import read_regular

# The fields in which multimodal models have the config of their language model.
LANGUAGE_PARTS = ("text_config", "llm_config", "language_config")
# The config.json of a language model is much smaller; a file of weights is larger.
_MAX_BYTES = 16 * 2**20
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_ADAPTER = "adapter_config.json"
_REVISION = re.compile(r"[\w-][\w./-]*")
# The field's name in llama -> its names in other families.
ALIASES = {
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "hidden_size": ("n_embd", "n_embed", "d_model"),
    "num_attention_heads": ("n_head", "n_heads", "num_heads", "attention_heads"),
    "num_key_value_heads": ("num_kv_heads", "n_head_kv"),
    "head_dim": ("d_kv", "attention_head_dim"),
    "layer_types": ("layers_block_type",),
    "num_experts": ("num_local_experts", "n_routed_experts"),
    "attention_dropout": ("attn_pdrop", "attention_probs_dropout_prob"),
}
# Every model's numbers are much lower; a larger one is a typo, and could fill the memory.
_MAX_WHOLE = 2**31 - 1


def find_config(base_model: str, *, revision: str | None = None) -> Path | None:
    """Return the path of a model's config.json, without network access.

    Args:
        base_model: a model folder, a config.json, or a name on the Hugging Face hub.
        revision: branch, tag or commit of a hub name; None for "main".

    Returns:
        The path; also for a folder without this file, so that reading it raises an error. None
        when the model is not on this machine.
    """
    if not base_model:
        return None
    try:
        local = Path(base_model).expanduser()
        if local.is_dir():
            return local / "config.json"
        if local.is_file():
            return local
    except (OSError, RuntimeError):  # not a valid path, no permission, or no home folder
        return None
    return _find_cached(base_model, revision) if _HUB_NAME.fullmatch(base_model) else None


def missing_folder(base_model: str) -> AttnimgError | None:
    """Return the error for the path of a folder that does not exist; None for a hub name.

    Args:
        base_model: the name of a model for which `find_config` found nothing.
    """
    if _HUB_NAME.fullmatch(base_model):
        return None
    path = Path(base_model)
    try:
        path = path.expanduser()
        others = [other.name for other in path.parent.iterdir() if other.is_dir()]
    except (OSError, RuntimeError):  # the parent folder is missing, or there is no home folder
        others = []
    similar = get_close_matches(path.name, others, n=1)
    do = "correct the path; inside a container, the folder must be mounted (-v)"
    if similar:
        folder, slash, _ = base_model.rstrip("/").rpartition("/")
        do = f"set base_model: {folder}{slash}{similar[0]}"
    return _bad_model(
        f"there is no folder {base_model}",
        why=f"looked for {path.absolute()}; only org/name or name is looked up on the hub",
        do=do,
    )


def may_be_path(name: str) -> bool:
    """Return whether a name for which nothing was found is more likely a folder than a hub name.

    That is so if it has no "/", which most names on the hub have, or if its parent folder exists.
    """
    return not _HUB_NAME.fullmatch(name) or "/" not in name or Path(name).parent.is_dir()


def read_config(path: Path) -> dict[str, Any]:
    """Read a config.json.

    Raises:
        AttnimgError: it is missing, too large, not JSON, or not an object (code "bad-model").
    """
    try:
        config = json.loads(read_regular(path, at_most=_MAX_BYTES))
    except OSError as error:
        if isinstance(error, FileNotFoundError) and (path.parent / _ADAPTER).is_file():
            raise _adapter(path.parent) from error
        raise _unreadable(path, why=f"could not read it: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise _unreadable(
            path, why=f"found bytes that are not text at byte {error.start}; needed JSON"
        ) from error
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise _unreadable(path, why=f"found invalid JSON at {where}: {error.msg}") from error
    except (ValueError, RecursionError) as error:
        raise _unreadable(path, why=f"found JSON that can't be read: {error}") from error
    if not isinstance(config, dict):
        found = type(config).__name__
        raise _unreadable(path, why=f"found a JSON {found}; needed an object of named fields")
    return config


def with_overrides(config: Mapping[str, Any], changes: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a config.json with some of its top-level fields replaced, under all their names."""
    fields = Fields(config=config, defaults={})
    return dict(fields.with_changes(changes or {}).config)


def _find_cached(name: str, revision: str | None) -> Path | None:
    """Search the hub's cache: the snapshot in refs/REVISION, or else the newest one."""
    folder = _hub_cache() / ("models--" + name.replace("/", "--"))
    wanted = revision or "main"
    if not _REVISION.fullmatch(wanted) or ".." in wanted:
        return None
    snapshots = folder / "snapshots"
    try:
        commit = (folder / "refs" / wanted).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        commit = wanted
    # With the pattern, a corrupted refs file can't lead to a path outside the cache.
    if _REVISION.fullmatch(commit) and (snapshots / commit / "config.json").is_file():
        return snapshots / commit / "config.json"
    if revision is not None:
        return None
    found = [path for path in snapshots.glob("*/config.json") if path.is_file()]
    return max(found, key=lambda path: path.parent.stat().st_mtime, default=None)


def _hub_cache() -> Path:
    """Return the cache's folder as huggingface_hub does, which reads variables only at its import.

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
    """Return the error for a folder that has an adapter instead of a model."""
    base = "the model that it was trained on"
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        named = json.loads(read_regular(folder / _ADAPTER, at_most=_MAX_BYTES))
        base = str(named["base_model_name_or_path"] or base)
    return _bad_model(
        f"{folder} is an adapter, not a model",
        why=f"found {_ADAPTER} of a LoRA on {base}, and no config.json",
        do=f"set base_model: {base}; to train the merged model, merge the adapter first with "
        "PEFT's merge_and_unload and save_pretrained",
    )


def _unreadable(path: Path, *, why: str) -> AttnimgError:
    return _bad_model(
        f"cannot read the model's {path.name}",
        why=f"{path}: {why}",
        do="set base_model to a folder with a config.json, or to a name on the Hugging Face hub",
    )


def _bad_model(what: str, *, why: str, do: str) -> AttnimgError:
    return AttnimgError(what, why=why, do=do, code="bad-model", key="base_model")


@dataclass(frozen=True, kw_only=True, slots=True)
class Fields:
    """The fields of a config, and defaults for missing ones.

    Each method that reads a field returns None (flag: False) when the field is absent or null, and
    raises an AttnimgError (code "bad-model") when it has another type or is out of range.

    Attributes:
        config: the raw mapping.
        defaults: field -> default value, under llama's names.
        file: the name of the file, for errors.
        part: the name of the mapping when it is only a part of the file, "text_config".
    """

    config: Mapping[str, Any]
    defaults: Mapping[str, Any]
    file: str = "config.json"
    part: str | None = None

    def with_changes(self, changes: Mapping[str, Any]) -> Fields:
        """Return the fields with some values replaced, such as those of one layer."""
        names = {alias: name for name, aliases in ALIASES.items() for alias in aliases}
        hidden = {names.get(key, key) for key in changes}
        kept = {k: v for k, v in self.config.items() if names.get(k, k) not in hidden}
        return replace(self, config={**kept, **changes})

    def whole(self, name: str, *, minimum: int = 1) -> int | None:
        """Return an integer."""

        def fits(value: Any) -> bool:
            return type(value) is int and minimum <= value <= _MAX_WHOLE

        value: int | None = self._read(name, fits, f"a whole number of at least {minimum}")
        return value

    def number(self, name: str) -> float | None:
        """Return a number of at least 0."""

        def fits(value: Any) -> bool:
            return type(value) in (int, float) and 0 <= value < math.inf

        value = self._read(name, fits, "a number of at least 0")
        return None if value is None else float(value)

    def text(self, name: str) -> str | None:
        """Return a string."""
        value: str | None = self._read(name, lambda v: isinstance(v, str), "a string")
        return value

    def flag(self, name: str) -> bool:
        """Return true or false."""
        return bool(self._read(name, lambda value: value in (True, False), "true or false"))

    def names(self, name: str) -> list[str] | None:
        """Return a list of strings; None when it is empty."""
        found = self._read(name, _list_of(lambda v: isinstance(v, str)), "a list of strings")
        return found or None

    def flags(self, name: str) -> list[bool] | None:
        """Return a list of 0 and 1 as booleans; None when it is empty."""
        found = self._read(name, _list_of(lambda v: v in (0, 1)), "a list of 0 and 1")
        return [bool(v) for v in found] if found else None

    def mapping(self, name: str) -> Mapping[str, Any] | None:
        """Return an object."""
        needed = "an object of named fields"
        value: Mapping[str, Any] | None = self._read(name, lambda v: isinstance(v, dict), needed)
        return value

    def refusal(self, key: str, value: object, *, needed: str) -> AttnimgError:
        """Return the error for a field with an invalid value."""
        shown = repr(value)
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        return self._refusal(key, why=f"found {shown}; needed {needed}")

    def wrong_length(self, key: str, found: int, *, count: int) -> AttnimgError:
        """Return the error for a list that does not have one entry for each of `count` layers."""
        why = f"found {found} entries; needed {count}, one for each of num_hidden_layers"
        return self._refusal(key, why=why)

    def _refusal(self, key: str, *, why: str) -> AttnimgError:
        where = f"{self.file}: {self.part}" if self.part else self.file
        do = f"correct {key} in the model's {self.file}"
        return _bad_model(f"{where}: {key} cannot be used", why=why, do=do)

    def _read(self, name: str, fits: Callable[[Any], bool], needed: str) -> Any:
        """Return a field under the name that the config uses, or its default."""
        present = [key for key in (name, *ALIASES.get(name, ())) if key in self.config]
        key = next((key for key in present if self.config[key] is not None), name)
        value = self.config.get(key) if present else self.defaults.get(name)
        if value is not None and not fits(value):
            raise self.refusal(key, value, needed=needed)
        return value


def _list_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(fits, value))
