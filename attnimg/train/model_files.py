"""Refuse a model folder that can't be loaded, before anything heavy is imported."""

from __future__ import annotations

import json
import stat
from pathlib import Path

from attnimg.config.schema import Config
from attnimg.errors import AttnimgError
from attnimg.files import read_regular
from attnimg.train.pickled_weights import require_safetensors

WEIGHT_INDEX = "model.safetensors.index.json"
WEIGHT_FILES = "*.safetensors"

# Endings of files that loaders read whole; the largest published one, a tokenizer.json, has 35 MiB.
_READ_WHOLE = frozenset({".json", ".jinja", ".model", ".txt", ".py", ".tiktoken"})
_LARGEST_BYTES = 256 << 20
# Endings of files that loaders read; a folder of such a name is refused.
_READ = _READ_WHOLE | {".safetensors", ".bin"}

GET_WHOLE = "download the model again, whole, or point base_model at another folder"


def bad_model(what: str, *, why: str, do: str) -> AttnimgError:
    """Make the error that all faults of a model share."""
    return AttnimgError(what, why=why, do=do, code="bad-model", key="base_model")


def check_model_files(config: Config) -> None:
    """Refuse a model folder that can't be loaded, without importing anything heavy.

    A name on the hub is left to `load_model`: only asking the hub tells.

    Raises:
        AttnimgError: config, weights or tokenizer are missing, or an index names a shard that is
            not there (bad-model), or the weights are pickled (pickled-weights).
    """
    folder = Path(config.base_model or "").expanduser()
    if not folder.is_dir():
        # A hub name is name or org/name; anything deeper can only be a path.
        name = config.base_model or ""
        if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
            raise bad_model(
                f"there is no model folder {config.base_model}",
                why="needed a folder with config.json, weights and a tokenizer",
                do="correct base_model: the path of a folder, or a name on the hub",
            )
        return
    found = sorted(entry.name for entry in folder.iterdir())
    _require_files(folder, key="base_model")
    if config.tokenizer_config:
        _require_files(Path(config.tokenizer_config).expanduser(), key="tokenizer_config")
    if "config.json" not in found:
        raise bad_model(
            f"the model folder {folder} has no config.json",
            why=f"found {', '.join(found[:6]) or 'nothing'}",
            do=GET_WHOLE,
        )
    require_safetensors(folder, key="base_model")
    if WEIGHT_INDEX in found:
        _require_shards(folder, WEIGHT_INDEX)
    if not any(folder.glob(WEIGHT_FILES)):
        raise bad_model(
            f"the model folder {folder} has no weights",
            why=f"needed *.safetensors, found {', '.join(found[:6])}",
            do=GET_WHOLE,
        )
    tokenizers = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
    if not config.tokenizer_config and not any(name in found for name in tokenizers):
        raise bad_model(
            f"the model folder {folder} has no tokenizer",
            why=f"needed one of {', '.join(tokenizers)}",
            do="put the tokenizer's files there, or set tokenizer_config",
        )


def _require_files(folder: Path, *, key: str) -> None:
    """Refuse pipes, devices and folders in the place of files, and files that are too large.

    Raises:
        AttnimgError: code bad-model; a loader would wait forever, or run out of memory.
    """
    for entry in sorted(folder.iterdir()) if folder.is_dir() else ():
        try:
            found = entry.stat()
        except OSError:  # a broken link: loading the file reports it
            continue
        if stat.S_ISDIR(found.st_mode):
            why = "found a folder, needed a file" if entry.suffix in _READ else ""
        elif not stat.S_ISREG(found.st_mode):
            why = "found a pipe, a socket or a device, needed a regular file"
        else:
            large = entry.suffix in _READ_WHOLE and found.st_size > _LARGEST_BYTES
            why = f"found {found.st_size:,} bytes, needed at most {_LARGEST_BYTES:,}"
            why = why if large else ""
        if why:
            raise AttnimgError(
                f"{entry} can't be read", why=why, do=GET_WHOLE, code="bad-model", key=key
            )


def _require_shards(folder: Path, index: str) -> None:
    """Refuse an index that can't be read or that names a shard which is not there."""
    try:
        shards = _shards(json.loads(read_regular(folder / index, at_most=_LARGEST_BYTES)))
        missing = sorted(shard for shard in shards if not (folder / shard).is_file())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise bad_model(f"{folder / index} can't be read", why=reason, do=GET_WHOLE) from error
    if missing:
        raise bad_model(
            f"the model folder {folder} lacks {len(missing)} of {len(shards)} shards",
            why=f"{index} names {', '.join(missing[:3])}",
            do=GET_WHOLE,
        )


def _shards(index: dict[str, dict[str, object]]) -> set[str]:
    """Return the names of the shards in an index.

    Raises:
        TypeError: one is not a string.
    """
    names = index["weight_map"].values()
    if odd := next((name for name in names if not isinstance(name, str)), None):
        raise TypeError(f"found {odd!r}, needed the name of a file")
    return {str(name) for name in names}
