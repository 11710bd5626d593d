"""Refuse a model folder that can't be loaded, before anything heavy is imported."""

from __future__ import annotations

import json
from pathlib import Path

from attnimg.errors import AttnimgError
from attnimg.schema import Config
from attnimg.train.pickled_weights import require_safetensors

WEIGHT_INDEX = "model.safetensors.index.json"
WEIGHT_FILES = "*.safetensors"

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


def _require_shards(folder: Path, index: str) -> None:
    """Refuse an index that can't be read or that names a shard which is not there."""
    try:
        shards = set(json.loads((folder / index).read_text())["weight_map"].values())
    except (ValueError, KeyError, AttributeError) as error:
        raise bad_model(
            f"{folder / index} can't be read", why=f"{type(error).__name__}: {error}", do=GET_WHOLE
        ) from error
    missing = sorted(shard for shard in shards if not (folder / shard).is_file())
    if missing:
        raise bad_model(
            f"the model folder {folder} lacks {len(missing)} of {len(shards)} shards",
            why=f"{index} names {', '.join(missing[:3])}",
            do=GET_WHOLE,
        )
