"""Hash the files that a run loads its model and tokenizer from.

All bytes count: another value of one weight leaves the names, sizes and headers of its file. The
hashes of large files are remembered (content_hashes.py).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attnimg.config.schema import Config
from attnimg.content_hashes import ContentHashes, cache_folder
from attnimg.train.model_files import GET_WHOLE, WEIGHT_INDEX, bad_model
from attnimg.train.safetensors_headers import weight_files

# What transformers loads a tokenizer from.
# Source: transformers 5.22.2, tokenization_utils_base.py, from_pretrained (2026-11-27).
_TOKENIZER_FILES = ("*token*.json", "vocab*", "merges.txt", "*.model", "*.tiktoken", "tekken.json",
                    "chat_template*", "additional_chat_templates/*")  # fmt: skip
# What transformers writes into config.json about itself.
_NOT_OF_THE_MODEL = ("_name_or_path", "transformers_version")


def model_of(config: Config) -> dict[str, Any] | None:
    """Return the SHA-256 of each file of the model; None when not all are on this machine.

    config.json counts by its values, so that another transformers may have written it.

    Raises:
        AttnimgError: a file can't be read (bad-model).
    """
    folder = _folder_of(config.base_model, config, holding="config.json")
    weights = weight_files(folder) if folder else []
    if folder is None or not weights or not all(path.is_file() for path in weights):
        return None
    raw = json.loads((folder / "config.json").read_bytes())
    values = {key: raw[key] for key in raw if key not in _NOT_OF_THE_MODEL}
    text = json.dumps(values, sort_keys=True)
    files = [*weights, *folder.glob(WEIGHT_INDEX), *folder.glob("*.py")]
    return {
        "path": config.base_model,
        "revision": config.revision_of_model,
        "files": {
            "config.json": hashlib.sha256(text.encode()).hexdigest(),
            **_hashes(folder, files),
        },
    }


def tokenizer_of(config: Config) -> dict[str, Any] | None:
    """Return the SHA-256 of each file of the tokenizer; None when it is not on this machine.

    Raises:
        AttnimgError: a file can't be read (bad-model).
    """
    named = config.tokenizer_config or config.base_model
    folder = _folder_of(named, config, holding="tokenizer_config.json")
    if folder is None:
        return None
    files = {path for pattern in _TOKENIZER_FILES for path in folder.glob(pattern)}
    return {
        "path": named,
        "revision": config.revision_of_model,
        "files": _hashes(folder, sorted(path for path in files if path.is_file())),
    }


def _folder_of(name: str | None, config: Config, *, holding: str) -> Path | None:
    """Return a model's folder, or that of its snapshot in the hub's cache, if it has a file."""
    folder = Path(name or "").expanduser()
    if folder.is_dir():
        return folder if (folder / holding).is_file() else None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(str(name), holding, revision=config.revision_of_model)
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def _hashes(folder: Path, files: Sequence[Path]) -> dict[str, str]:
    hashes = ContentHashes(cache_folder(os.environ))
    try:
        found = hashes.of_each(files)
    except OSError as error:
        raise bad_model(
            f"{error.filename or folder} can't be read",
            why=error.strerror or str(error),
            do=GET_WHOLE,
        ) from error
    hashes.save()
    # An index may name files outside of the folder.
    names = [os.path.relpath(path, folder) for path in files]
    return dict(zip(names, found, strict=True))
